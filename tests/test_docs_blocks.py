"""Every code block of README.md and docs/ is run: WAYS says by which test.

Each page's commands are typed into a shell of a folder of their own (tests/pages.py says how what they print is compared). What a
reader would put in the place of what stands there is put there (`places`); what takes long, or goes on for ever, gets one option
more (`changes`). Shims that live are those of tests/node.py, `ctr run` goes to a containerd of the tests' own. What no single
machine can do is a stub that writes down what it was called with.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shimcore import __version__, cgroup
from shimcore.install import install
from shimcore.oci import readers
from shimcore.rig import Events, Rig
from shimcore.testing import Install
from tests.authors import Make, author
from tests.containerd.daemon import Containerd
from tests.faults import until
from tests.node import Node, dead_socket, node
from tests.pages import FENCE, HANG, ROOT, Reader, alike, blocks, only, pages, parts, read, said_alike
from tests.stand_ins import Tools
from tests.test_deploy import DEPLOY, containerd, documents, runtimes
from tests.test_docs import BLOCK, PROGRAMS
from tests.upgrades import command

__all__ = ["author"]

OURS = "containerd-shim-runc-v2-py"
# What goes on until a container or its shim ends is left after its first line.
FOLLOW = {r"^(curl -sN .*)$": r"exec 3< <(exec \1); head -n 1 <&3; kill $!; exec 3<&-"}
# (page, language) -> its test, which takes all such blocks of the page or fails. What of it is a program and what that prints, on
# the pages of PROGRAMS, test_docs.py runs.
WAYS = {
    ("README.md", "console"): "test_the_readme",
    ("README.md", "python"): "test_the_readmes_shim",
    ("docs/asyncio.md", "python"): "test_the_pages_shim",
    ("docs/cli.md", "console"): "test_the_command",
    ("docs/conform.md", "console"): "test_conform",
    ("docs/cookbook.md", "python title"): "test_each_recipe",
    ("docs/debugging.md", "console"): "test_debugging",
    ("docs/debugging.md", "json"): "test_a_line_of_the_log",
    ("docs/examples.md", "sh"): "test_the_examples",
    ("docs/install.md", "console"): "test_installing",
    ("docs/kubernetes.md", "console"): "test_kubernetes",
    ("docs/stdio.md", "text"): "test_an_annotation",
    ("docs/ttrpc-gen.md", "console"): "test_clients_from_a_proto",
    ("docs/ttrpc-gen.md", "proto"): "test_clients_from_a_proto",
    ("docs/ttrpc-gen.md", "python"): "test_clients_from_a_proto",
    ("docs/tutorial.md", "console"): "test_the_tutorial",
    ("docs/tutorial.md", "python"): "test_the_tutorial",
    ("docs/upgrade.md", "console"): "test_upgrading",
    ("docs/upgrade.md", "python"): "test_a_service_that_hands_over",
}


def test_each_block_is_run() -> None:
    """red: a block more, on any page"""
    programs = {text for page in PROGRAMS for pair in BLOCK.findall(read(f"docs/{page}")) for text in pair}
    found = [block for page in pages() for block in blocks(page)]
    assert len(found) > 35
    for page in pages():
        assert len(FENCE.findall(read(page))) == 2 * len(blocks(page)), f"{page}: a block that is not closed, or indented"
    assert [str(one) for one in found if (one.page, one.language) not in WAYS and one.text not in programs] == []
    assert set(WAYS) <= {(one.page, one.language) for one in found}, "a way for what is not there"
    sources = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert [name for name in WAYS.values() if f"def {name}(" not in sources] == []


@pytest.mark.parametrize(
    ("shown", "said", "same"),
    [
        ("32138  web  1  9.8M  2s", "7  web  12  10.2K  1m", True),
        ("32138  web  1  9.8M  2s", "7  web  -  10.2K  1m", False),
        ("   186.4   event  /tasks/exit  id=c447f2139", " 1.0 event /tasks/delete id=c447f2139", False),
        ("pid=1 exit_status=3", "pid=22 exit_status=3", True),
        ("pid=1 exit_status=3", "pid=22 exit_status=4", False),
        ("id=c447f2139 at /tmp/rig-ftkg339y", "id=c0123abcd at /tmp/rig-abc", True),
        ('time="2026-11-27T12:50:25.213885667Z" msg="serving"', 'time="2024-01-01T00:00:00.000000001Z" msg="serving"', True),
        ("io.containerd.runc.v2-py", "io.containerd.runc.v3-py", False),
        ("wait    ████▊ 100.9", "wait  █▏ 3.2", True),
        ("wait    ████▊ 100.9", "start  █▏ 3.2", False),
        ("passed  execs  an exec is told", "failed  execs  an exec is told", False),
    ],
)
def test_what_is_alike(shown: str, said: str, same: bool) -> None:
    assert (re.fullmatch(alike(shown), said) is not None) == same


class Desk:
    """Where a page's reader sits. bin: what stands for /usr/local/bin; tools: what else is on PATH; daemon: a containerd."""

    def __init__(self, home: Path, bin: Path, daemon: Containerd, rootfs: Path) -> None:
        self.home = home
        self.bin = bin
        self.daemon = daemon
        self.tools = Tools(home, bin)
        of_ctr = {"CONTAINERD_ADDRESS": str(daemon.address), "CONTAINERD_NAMESPACE": daemon.namespace}
        self.env = {**self.tools.env, **of_ctr, "PYTEST_ADDOPTS": "-p no:cacheprovider --color=no"}
        self.places = {"/usr/local/bin": str(bin), "/path/to/rootfs": str(rootfs), "/opt/shimcore": f"{home}/opt/shimcore"}

    def reader(self, places: dict[str, str] | None = None, **options: Any) -> Reader:
        return Reader(self.home, self.env, {**self.places, **(places or {})}, **options)

    def play(self, page: str, language: str = "console", **options: Any) -> dict[str, str]:
        """All of the page's blocks in this language, in one shell; each command, and what it said."""
        said = {}
        with self.reader(**options) as reader:
            for block in blocks(page, language):
                said.update(reader.play(block.text))
        assert reader.changed == set(reader.changes), "a change of what is not there"
        return said


@pytest.fixture(scope="module")
def bin(session_root: Path) -> Path:
    folder = session_root / "local"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def daemon(bin: Path, session_root: Path, namespace: str) -> Iterator[Containerd]:
    made = Containerd(session_root / "docs", namespace, path=[bin])
    made.start()
    yield made
    assert (made.tasks(), made.containers()) == ({}, [])
    made.stop()


@pytest.fixture
def desk(tmp_path: Path, bin: Path, daemon: Containerd, rootfs: Path) -> Desk:
    home = tmp_path / "home"
    home.mkdir()
    return Desk(home, bin, daemon, rootfs)


@pytest.fixture
def live(tmp_path: Path, namespace: str, rootfs: Path, session_root: Path) -> Iterator[Node]:
    with node(tmp_path / "node", namespace, rootfs, session_root) as made:
        yield made


# --- README.md


def test_the_readme(desk: Desk, live: Node) -> None:
    # What make builds is what the tests run by: it is taken as built, and not built anew below them. What may have
    # called the tests, `make test ARGS=…`, leaves its words in the environment.
    make = f"env -u MAKEFLAGS -u MAKEOVERRIDES -u MAKELEVEL -u ARGS {shutil.which('make')}"
    desk.tools.program("make", f'#!/bin/sh\nexec {make} -s -C {ROOT} -o build PY={sys.executable} "$@"\n')
    shutil.copytree(ROOT / "examples", desk.home / "examples")
    said = desk.play(
        "README.md",
        places={"ID": live.places["web"], "SHIM": OURS, "DIR": str(desk.home / "there")},
        changes={
            r"^make test\b": "make test ARGS=--version",  # all tests are this one too
            r"^shimcore conform\b": "shimcore conform --only execs",
            r"^shimcore bench SHIM…": f"shimcore bench --rounds 1 {live.stock} SHIM",
            r"^shimcore events\b": "shimcore events --past --count 1",
            r"^shimcore new NAME": "shimcore new hello",
            r"^shimcore install\b": "shimcore install --dest /usr/local/bin",
        },
        statuses={"shimcore doctor": (0, 1)},  # as the machine is
    )
    assert [text for line, text in said.items() if line.startswith("ctr run")] == ["hello\n"]
    assert "nothing left behind" in next(text for line, text in said.items() if line.startswith("make run"))
    assert (desk.home / "there" / "containerd-shim-skeleton-v1").exists()


def test_the_readmes_shim(install_shim: Install, make_rig: Callable[..., Rig], tmp_path: Path) -> None:
    shutil.copy(ROOT / "examples" / "skeleton.py", tmp_path)
    head = "from skeleton import SkeletonTask as HelloTask\n\nfrom shimcore import Shim, spawn\n\n\n"
    (tmp_path / "readmes_hello.py").write_text(head + only("README.md", "python"))
    container = make_rig(install_shim("readmes_hello:Hello", "io.containerd.readmes.v1", tmp_path)).container(["echo", "hello"])
    assert (container.run(), container.output) == (0, "hello\n")
    container.delete()


# --- docs/


def test_the_command(desk: Desk, live: Node, session_root: Path) -> None:
    runtimes_here = [name for name in ("runc", "crun", "youki") if shutil.which(name)]
    places = {
        **live.places, "/usr/bin/containerd-shim-runc-v2": live.stock, "/tmp": str(session_root),
        "/opt/shims/2/containerd-shim-runc-v2-py": str(live.copies[1].binary),
        "Linux 6.18.44": f"Linux {platform.release()}", "cgroups: hybrid": f"cgroups: {cgroup.mode()}",
        "OCI runtimes: runc": f"OCI runtimes: {', '.join(runtimes_here)}",
    }  # fmt: skip
    changes = {
        r"^shimcore install$": "shimcore install --dest /usr/local/bin",
        r"^shimcore uninstall$": "shimcore uninstall --dest /usr/local/bin",
        r"^shimcore bench\b": "shimcore bench --rounds 1",
        r"^shimcore upgrade --all": "shimcore upgrade --all --namespace demo --timeout 1",  # of the others none is ours
        r'^eval "(\$\(shimcore completion zsh\))"': r'test -n "\1"',  # this shell is another
    }
    statuses = {
        "shimcore run -- ": (3,), "shimcore dump other": (1,), "shimcore upgrade --all": (1,), "shimcore doctor": (0, 1),
    }  # fmt: skip
    (desk.home / ".config" / "fish" / "completions").mkdir(parents=True)
    for copy in live.copies:
        copy.change()
    reader = desk.reader(places, changes=changes, statuses=statuses, compare=said_alike)
    with reader:
        for block in blocks("docs/cli.md", "console"):
            if block.text.startswith("$ shimcore run"):
                install(str(desk.bin))  # it has been uninstalled
            # No longer than it is looked for: other sessions' guards see it too.
            with dead_socket() if block.text.startswith("$ shimcore doctor") else contextlib.nullcontext():
                reader.play(block.text)
            if "venv" in block.text:
                reader.type("deactivate")  # whose shims would be found first
    assert reader.changed == set(changes)


def test_conform(desk: Desk) -> None:
    ours = install(str(desk.bin))
    rust = "/usr/local/bin/containerd-shim-runc-v2-rs"  # nobody has it here; the command is the same for ours
    said = desk.play(
        "docs/conform.md", places={rust: ours}, changes={r"^shimcore conform\b": "shimcore conform --only execs"}
    )
    assert all("1 of 1 passed" in text for text in said.values()) and len(said) == 2


def test_debugging(desk: Desk, live: Node) -> None:
    said = desk.play(
        "docs/debugging.md",
        places={"/run/containerd/s/….debug": live.debug},
        changes=FOLLOW,
    )
    listed, dump, metrics, log = said.values()
    assert "/run/containerd/s/….debug" in listed.splitlines()  # that of web, among others
    table = read("docs/debugging.md").partition("\n`/dump` is JSON:\n")[2].partition("\n\nIt holds")[0]
    keys = [key for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for key in row.split("`")[1::2]]
    assert "processes" in keys and set(keys) <= set(json.loads(dump))
    assert metrics.endswith("# EOF\n") and 'msg="serving"' in log


def test_a_line_of_the_log(make_rig: Callable[..., Rig], shim_dir: Path) -> None:
    shown = json.loads(only("docs/debugging.md", "json"))
    session = make_rig(shim_dir / OURS, env={"SHIMCORE_LOG_FORMAT": "json"}).container(["true"])
    until(lambda: '"serving"' in session.bundle.log)
    line = json.loads(next(line for line in session.bundle.log.splitlines() if '"serving"' in line))
    assert list(line) == list(shown)
    assert [type(value) for value in line.values()] == [type(value) for value in shown.values()]
    assert (line["level"], line["msg"]) == (shown["level"], shown["msg"])
    assert re.sub(r"\d", "0", line["time"]) == re.sub(r"\d", "0", shown["time"])
    session.end()


def test_the_examples(desk: Desk) -> None:
    wasmtime = pytest.importorskip("wasmtime")
    from tests.test_example_wasm import HELLO

    shutil.copytree(ROOT / "examples", desk.home / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    (desk.home / "examples" / "modules").mkdir()
    (desk.home / "examples" / "modules" / "hello.wasm").write_bytes(wasmtime.wat2wasm(HELLO))
    try:
        said = desk.play(
            "docs/examples.md",
            "sh",
            places={"/run/containerd/io.containerd.runtime.v2.task/default/one": str(desk.daemon.bundle("one"))},
            changes={r"^ctr run -d": f"ctr run -d --fifo-dir {desk.daemon.fifos}", **FOLLOW},
            statuses={"ctr run --rm --runtime io.containerd.wasm.v1": (7,)},
        )
    finally:
        desk.daemon.ctr("task", "rm", "-f", "one", check=False)  # the last one is detached
        desk.daemon.ctr("container", "rm", "one", check=False)
    printed = [text for line, text in said.items() if line.startswith(("ctr", "curl"))]
    assert printed[:2] == ["here\n", "hello from a module\n"]
    # A date; ctr may have shown the first, before it let go of the container.
    assert re.search(r"\d\d:\d\d:\d\d", printed[3])


def test_installing(desk: Desk) -> None:
    shutil.copy(desk.tools.wheel, desk.home)
    *_, version, put, ran = desk.play("docs/install.md").values()
    assert __version__ in version
    assert (put, ran) == (f"/usr/local/bin/{OURS}\n", "hello\n")
    assert str(desk.home / "opt") in (desk.bin / f"{OURS}.py").read_text()


def test_kubernetes(desk: Desk) -> None:
    shutil.copytree(DEPLOY, desk.home / "deploy")
    (desk.home / "deploy" / f"shimcore-{__version__}-cp311-cp311-manylinux2014_x86_64.whl").touch()
    (desk.home / "deploy" / "wheels").mkdir()  # by pip
    config = ["--config", str(DEPLOY / "containerd-v2.toml")]
    desk.tools.program("containerd", f'#!/bin/sh\nexec {containerd(2)} {" ".join(config)} "$@"\n')
    # The machine's own daemons, the network's files and a cluster are not the tests' to touch.
    desk.tools.stub("systemctl", "crictl", "pip", "buildah", "kubectl")
    said = desk.play("docs/kubernetes.md")
    dumped = next(text for line, text in said.items() if line.startswith("containerd config dump"))
    assert dumped.split() == ["runtime_type", "=", f'"{runtimes(2)["shimcore"]["runtime_type"]}"']
    calls = {name: desk.tools.calls(name) for name in ("systemctl", "crictl", "pip", "buildah", "kubectl")}
    (pulled,) = calls["pip"]
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert pulled[0] == "download" and pulled[-1] in requirements and pulled[pulled.index("--dest") + 1] == "wheels"
    (daemonset,) = documents("daemonset.yaml")
    image = daemonset["spec"]["template"]["spec"]["initContainers"][0]["image"]
    assert calls["buildah"] == [["build", "-t", image, "."]]
    assert calls["systemctl"] == [["restart", "containerd"]]
    assert [call[:3] for call in calls["crictl"]] == [["runp", "--runtime", next(iter(runtimes(2)))]]
    applied = [word for call in calls["kubectl"] if call[0] == "apply" for word in call[1:]]
    assert {"daemonset.yaml", "runtimeclass.yaml", "pod.yaml"} == set(applied) - {"-f"}
    assert applied[::2] == ["-f"] * 3 and all((DEPLOY / name).is_file() for name in applied[1::2])
    (labelled,) = [call[1:] for call in calls["kubectl"] if call[0] == "label"]
    selector = daemonset["spec"]["template"]["spec"]["nodeSelector"]
    assert labelled == ["node", "NODE", *(f"{key}={value}" for key, value in selector.items())]


def test_an_annotation() -> None:
    found = readers.parse(only("docs/stdio.md", "text").strip(), "the page")
    assert (found.action, found.after, found.max) == (readers.SPILL, readers.AFTER, readers.SPILL_MAX)


def test_clients_from_a_proto(desk: Desk) -> None:
    """Files are written, commands run, and print what the page says; then the stub's lines do what those of the client do."""
    for name in ("grpc_tools", "mypy"):
        pytest.importorskip(name)
    page = "docs/ttrpc-gen.md"
    (proto,), (program, fragment) = blocks(page, "proto"), blocks(page, "python")
    for name, block in (("greeter.proto", proto), ("greeting.py", program)):
        assert f"`{name}`:\n\n```{block.language}\n{block.text}```" in read(page)
        (desk.home / name).write_text(block.text)
    call = "from shimcore.ttrpc.gen import plugin\nraise SystemExit(plugin())\n"
    desk.tools.program("protoc-gen-shimcore-ttrpc", f"#!{sys.executable}\n{call}")
    with desk.reader() as reader:
        for block in blocks(page, "console"):
            said = reader.play(block.text)
            assert [(line, text.splitlines()) for line, text in said.items()] == list(parts(block.text))
    served, client, _ = program.text.partition("as client:\n")
    (desk.home / "stub.py").write_text(f"import greeter_pb2\n{served}{client}{textwrap.indent(fragment.text, ' ' * 8)}")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "stub.py"], cwd=desk.home, env=env, capture_output=True, text=True, timeout=HANG)
    assert (done.stdout, done.stderr) == ("hello you\n", "")


def test_upgrading(desk: Desk, live: Node) -> None:
    desk.tools.stub("pip")  # the code is changed below
    for copy in live.copies:
        copy.change()
    said = desk.play(
        "docs/upgrade.md",
        places={"web-1": live.places["web"], "/opt/shims/2/containerd-shim-runc-v2-py": str(live.copies[1].binary)},
        changes={r"--all": f"--all --namespace {live.places['demo']} --timeout 1"},
        statuses={"shimcore upgrade --all": (1,)},  # job's has a call under way
    )
    assert desk.tools.calls("pip") == [["install", "--upgrade", "shimcore"]]
    _, one, everyone, to = said.values()
    assert "web-1" in one and "web-1" in to and "calls are under way" in everyone


HANDS_OVER = """
class Mine(Service):
    native = True
    def __init__(self, shim):
        super().__init__(shim)
        self.names, self.log_fd = {}, -1
    def begin(self):
        slot = self.core.open("c1")
        read, self.log_fd = os.pipe()
        pid, fd = _reaper.spawn(["/bin/sh", "-c", "read x; exit 6"], fds={0: read}, new_session=True)
        os.close(fd)
        os.close(read)
        slot.bind(pid)
        slot.announce()
        self.names["c1"] = "one"
        return self.log_fd

class Author(Author):
    def create_task_service(self, publisher):
        self.publisher = publisher
        self.core = publisher.core
        self.task = Mine(self)
        self.task.core = publisher.core
        return self.task
"""


def test_a_service_that_hands_over(author: Make, fake_containerd: Events) -> None:
    methods = textwrap.indent(only("docs/upgrade.md", "python"), "    ")
    shim = author(HANDS_OVER.replace("\nclass Author", f"\n{methods}\nclass Author"))
    address = shim.start(env={"TTRPC_ADDRESS": fake_containerd.address})
    kept = shim.look(address, "shim.task.begin()")
    done = command(str(shim.pid(address)))
    assert done.returncode == 0, done.stderr
    assert shim.look(address, "shim.task.names, [slot.cookie for slot in shim.core.slots()]") == ({"c1": "one"}, ["one"])
    assert shim.look(address, f"os.write({kept}, b'x\\n')") == 2
    assert fake_containerd.wait("/tasks/exit").message.exit_status == 6
    shim.look(address, "shim.core.find('c1').forget()")
    shim.stop(address)
