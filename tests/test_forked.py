"""The plain way: what each action imports, and a `start` that is divided into one that acts and one that prints."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from shimcore.address import remove_socket, socket_address, start_listener
from shimcore.install import install
from tests.authors import HANG, Make, author

__all__ = ["author"]

ROOT = Path(__file__).resolve().parent.parent

# Each costs every container time. What `import os` brings is not counted.
COMMON = {"__future__", "gc", "shimcore", *(f"shimcore.{name}" for name in ("bootstrap", "errors", "flags", "shim", "wire"))}
OCI = {"shimcore.util", "shimcore.oci", *(f"shimcore.oci.{name}" for name in ("options", "runc", "shim"))}
REAPER = {"errno", "shimcore._reaper"}


def named(words: str) -> set[str]:
    return {f"shimcore.{word}" for word in words.split()}


ACTIONS = {
    "-v": COMMON,
    "-info": COMMON | OCI | REAPER | named("address logger oci.features") | {"_sha256", "binascii", "select"},
    # Of a container that joins the shim of its group: one that makes a daemon imports what the daemon needs.
    "start": COMMON | OCI | REAPER | named("address daemon forked logger") | {"_json", "_sha256", "_socket", "fcntl"},
    "delete": COMMON
    | OCI
    | REAPER
    | named("address cgroup daemon debug jobs ledger logger monitor mount mountinfo oci.aborted publisher serve")
    | {"_queue", "binascii", "_json", "_sha256", "_socket"},
}


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(install(str(tmp_path_factory.mktemp("bin"))) + ".py")  # the script that the launcher would run


def imported(binary: Path, words: list[str], bundle: Path) -> set[str]:
    """What the interpreter says of its imports; stderr goes to the bundle's log, as soon as the shim has put it there."""
    os.mkfifo(bundle / "log")
    said: list[bytes] = []

    def read() -> None:
        with open(bundle / "log", "rb") as log:
            said.append(log.read())

    reader = threading.Thread(target=read)
    reader.start()
    keep = os.open(bundle / "log", os.O_WRONLY)  # the reader's end opens, and sees no end before ours
    command = [sys.executable, "-IS", "-X", "importtime", str(binary), *words]
    env = {**os.environ, "TTRPC_ADDRESS": str(bundle / "none")}
    done = subprocess.run(command, cwd=bundle, env=env, input=b"", capture_output=True, timeout=HANG)
    os.close(keep)
    reader.join(HANG)
    assert done.returncode == 0, done.stderr
    return names(done.stderr + b"\n" + said[0])


def names(stderr: bytes) -> set[str]:
    lines = [line for line in stderr.decode().splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip() for line in lines[1:]}


@pytest.mark.parametrize("action", ACTIONS)
def test_what_an_action_imports(binary: Path, tmp_path: Path, action: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHIMCORE_FEATURES_DIR", str(tmp_path / "features"))
    program = [sys.executable, "-IS", "-X", "importtime", "-c", "import os"]
    bare = names(subprocess.run(program, capture_output=True, check=True).stderr)
    bundle = tmp_path / "c1"
    bundle.mkdir()
    (bundle / "config.json").write_text("{}")
    containerd = str(tmp_path / "containerd.sock")
    words = [action] if action.startswith("-") else ["-namespace", "n", "-address", containerd, "-id", "c1", action]
    address = socket_address(containerd, "n", "c1")
    listener = start_listener(address) if action == "start" else -1
    try:
        assert imported(binary, words, bundle) - bare == ACTIONS[action]
    finally:
        if listener >= 0:
            os.close(listener)
            remove_socket(address)


def test_the_daemon_serves_before_it_has_protobuf() -> None:
    code = "import shimcore.serve, shimcore.forked, shimcore._ttrpc, shimcore.debug, shimcore.task, shimcore.oci.service"
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-IS", "-c", program], capture_output=True, text=True, check=True)
    assert not [name for name in done.stdout.split() if name.startswith("google") or name.endswith("_pb2")]


def test_the_one_that_acts_becomes_the_daemon(author: Make) -> None:
    shim = author("""
        class Author(Author):
            def start_shim(self, opts):
                pid, address = spawn(opts)
                assert pid == os.getpid()
                return address
    """)
    address = shim.start()
    assert shim.look(address, "os.path.exists('address')")
    assert shim.look(address, "sys.orig_argv[-2:]") == shim.look(address, "sys.argv[-2:]")


@pytest.mark.parametrize("why", ["its class is imported already", "it has two threads"])
def test_a_start_that_can_not_be_divided_makes_a_process(author: Make, why: str) -> None:
    shim = author("""
        class Author(Author):
            def start_shim(self, opts):
                pid, address = spawn(opts)
                assert pid not in (0, os.getpid())
                return address
    """)
    script = Path(shim.binary)
    if script.with_name(script.name + ".py").exists():
        script = script.with_name(script.name + ".py")
    lines = script.read_text().splitlines()
    call = next(line for line in lines if line.startswith("run("))
    module = call.split("'")[3].partition(":")[0]
    if why == "it has two threads":
        changed = ["import threading", "threading.Thread(target=threading.Event().wait, daemon=True).start()", call]
    else:
        changed = [f"import {module}", call.replace(f"'{module}:Author'", f"{module}.Author")]
    assert changed[-1] != call or "threading" in changed[0]
    script.write_text("\n".join([*lines[: lines.index(call)], *changed, ""]))
    address = shim.start()
    assert shim.look(address, "os.getppid()") != os.getpid()


def test_nobody_reads_what_start_prints(author: Make) -> None:
    """The address was told to nobody: the daemon ends again."""
    shim = author()
    read, write = os.pipe()
    os.close(read)
    words = ["-namespace", shim.namespace, "-address", shim.grpc, "-id", "c1", "start"]
    done = subprocess.run([shim.binary, *words], cwd=shim.bundle, stdin=subprocess.DEVNULL, stdout=write, timeout=HANG)
    os.close(write)
    assert done.returncode == 1
    path = shim.address().removeprefix("unix://")
    until = time.monotonic() + HANG
    while os.path.exists(path):
        assert time.monotonic() < until
        time.sleep(0.005)


def test_a_container_may_be_called_start(author: Make) -> None:
    """The action is what the flags leave, not any word: nothing but a `start` is divided."""
    shim = author("""
        class Author(Author):
            def delete_shim(self):
                from shimcore import daemon
                assert daemon.warm is None
                return super().delete_shim()
    """)
    done = shim.run("delete", "-bundle", str(shim.bundle), id="start")
    assert (done.returncode, done.stderr) == (0, "")
