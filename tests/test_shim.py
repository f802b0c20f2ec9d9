"""run(), spawn() and the daemon's life, through installed executables as containerd runs them."""

from __future__ import annotations

import os
import re
import socket
import stat
import subprocess
import time
from pathlib import Path

import pytest

from shimcore.protos import task_pb2, types_pb2
from shimcore.ttrpc import Client
from tests.authors import HANG, TASK, Make, author, log_of, until

__all__ = ["author"]


# ---- the command line ----


def test_no_namespace(author: Make) -> None:
    shim = author()
    for action in "start", "delete", "":
        done = shim.run(action, namespace="")
        assert (done.returncode, done.stdout) == (1, "")
        assert re.fullmatch(r"[\w.]+: Shim namespace cannot be empty\n", done.stderr)


def test_ttrpc_address_is_missing(author: Make) -> None:
    shim = author()
    for action in "start", "":
        done = shim.run(action, env={"TTRPC_ADDRESS": ""})
        assert (done.returncode, done.stdout) == (1, "")
        assert re.fullmatch(r"[\w.]+: TTRPC_ADDRESS is not set\n", done.stderr)


def test_ttrpc_address_is_too_long(author: Make) -> None:
    done = author().run("start", env={"TTRPC_ADDRESS": "/" + "x" * 200})
    assert done.returncode == 1
    assert "TTRPC_ADDRESS is 201 bytes long" in done.stderr


def test_bad_flags(author: Make) -> None:
    done = author().run("start", "-nonsense")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "nonsense" in done.stderr


def test_version(author: Make) -> None:
    from shimcore import __version__

    shim = author("raise RuntimeError('not imported for this')")
    done = subprocess.run([shim.binary, "-v"], capture_output=True, text=True, timeout=HANG)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0] == f"{os.path.basename(shim.binary)}:"
    assert __version__ in done.stdout and "io.containerd.author" in done.stdout


def test_info(author: Make) -> None:
    shim = author()
    done = subprocess.run([shim.binary, "-info"], input=b"", capture_output=True, timeout=HANG)
    assert done.returncode == 0
    assert types_pb2.RuntimeInfo.FromString(done.stdout).name.startswith("io.containerd.author")


# ---- start ----


def test_start_prints_the_address_and_nothing_else(author: Make) -> None:
    shim = author()
    address = shim.start()
    assert address == shim.address()
    assert (shim.bundle / "address").read_text() == address
    mode = os.lstat(address.removeprefix("unix://")).st_mode
    assert stat.S_ISSOCK(mode) and stat.S_IMODE(mode) == 0o600
    shim.stop(address)
    assert not os.path.exists(address.removeprefix("unix://"))


def test_it_serves_when_start_has_returned(author: Make) -> None:
    shim = author()
    for number in range(5):
        address = shim.start(id=f"c{number}")
        assert shim.pid(address) > 0


def test_the_daemon(author: Make) -> None:
    shim = author()
    address = shim.start()
    pid = shim.pid(address)
    assert shim.look(address, "os.getsid(0) == os.getpid()")
    assert os.readlink(f"/proc/{pid}/cwd") == str(shim.bundle)
    fds = {int(fd): os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
    assert fds[0] == fds[1] == fds[2] == "/dev/null"
    assert not [path for path in fds.values() if path.startswith("pipe:")]  # no way to keep somebody's output open
    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    assert b"-namespace" in words and shim.namespace.encode() in words and b"start" not in words
    assert "SHIMCORE_READY_FD" not in shim.look(address, "list(os.environ)")
    assert shim.look(address, "_reaper.get_subreaper()") is True
    assert shim.look(address, "made_on[-1] != os.getpid()")  # no author's code on the leader
    assert shim.look(address, "threading.get_native_id() != os.getpid()")


def test_an_authors_subprocess_and_orphans_in_the_daemon(author: Make) -> None:
    shim = author("""
        def orphans(count):
            before = shim_core().stats()["orphans"]
            for _ in range(count):
                subprocess.run(["sh", "-c", "setsid sh -c 'exit 3' & exit 0"])
            while shim_core().stats()["orphans"] < before + count:
                os.sched_yield()
            return True

        def shim_core():
            import gc
            return next(one for one in gc.get_objects() if isinstance(one, Author)).core
    """)
    address = shim.start()
    assert shim.look(address, "[subprocess.run(['sh', '-c', f'exit {n}']).returncode for n in range(20)]") == list(range(20))
    assert shim.look(address, "orphans(5)") is True


def test_environment_of_the_daemon(author: Make) -> None:
    shim = author("""
        def start_shim(self, opts):
            pid, address = spawn(opts, "", [("EXTRA", "given"), ("HOME", "/changed")])
            return address
        Author.start_shim = start_shim
    """)
    address = shim.start(env={"INHERITED": "yes", "HOME": "/root"})
    names = "EXTRA", "HOME", "INHERITED", "TTRPC_ADDRESS"
    assert shim.look(address, f"[os.environ.get(name) for name in {names!r}]") == ["given", "/changed", "yes", shim.ttrpc]


def test_debug_is_passed_on(author: Make) -> None:
    shim = author()
    assert shim.look(shim.start("-debug"), "shim.flags.debug") is True
    assert shim.look(shim.start(id="c2"), "shim.flags.debug") is False


def test_a_class_instead_of_its_name(author: Make, tmp_path: Path) -> None:
    shim = author()
    script = Path(shim.binary + ".py")
    text = script.read_text()
    module = re.search(r"'(author\d+):Author'", text)
    assert module
    imported = f"from shimcore.shim import run\nfrom {module[1]} import Author\n"
    script.write_text(text.replace("from shimcore.shim import run\n", imported).replace(module[0], "Author"))
    assert shim.start() == shim.address()


def test_what_is_no_shim(author: Make) -> None:
    for source, text in ("class Author: pass", "is not a subclass of Shim"), ("del Author", "has no class Author"):
        shim = author(source)
        done = shim.run("start")
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        assert text in done.stderr


# ---- D3: what an author's module says ----

LOUD = """
import ctypes, warnings
def shout(where):
    print("print", where, flush=True)
    print("stderr", where, file=sys.stderr, flush=True)
    warnings.warn("warning " + where)
    libc = ctypes.CDLL(None)
    libc.printf(b"printf %s\\n", where.encode())
    libc.fflush(None)
    libc.printf(b"unflushed %s\\n", where.encode())
    libc.write(1, b"write\\n", 6)
    os.system("echo child; echo child >&2")
shout("import")
class Author(Author):
    def __init__(self, *args):
        super().__init__(*args)
        shout("constructor")
    def start_shim(self, opts):
        shout("start_shim")
        return super().start_shim(opts)
    def delete_shim(self):
        shout("delete_shim")
        return super().delete_shim()
"""


def test_stray_output_does_not_reach_the_address(author: Make) -> None:
    shim = author(LOUD)
    done = shim.run("start")
    assert (done.returncode, done.stdout, done.stderr) == (0, shim.address(), "")
    done = shim.run("delete", "-bundle", str(shim.bundle))
    assert (done.returncode, done.stderr) == (0, "")
    assert task_pb2.DeleteResponse.FromString(done.stdout.encode("latin-1")).exit_status == 137


def test_stray_output_does_not_reach_an_error(author: Make) -> None:
    shim = author(LOUD + "\nraise ValueError('the\\n\\n  reason')")
    done = shim.run("start")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"[\w.]+: ValueError: the; reason\n", done.stderr)


def test_stray_output_goes_to_the_log(author: Make) -> None:
    shim = author(LOUD)
    with log_of(shim) as log:
        shim.start()
        until(log, b"print import", b"printf start_shim", b"child", b"write")


# ---- delete ----


def test_delete_without_containerd(author: Make) -> None:
    shim = author()
    before = time.time_ns()
    words = ["-namespace", shim.namespace, "-id", "c1", "-address", shim.grpc, "-bundle", str(shim.bundle), "delete"]
    environment = {name: value for name, value in os.environ.items() if name != "TTRPC_ADDRESS"}
    done = subprocess.run([shim.binary, *words], cwd=shim.bundle, env=environment, capture_output=True, timeout=HANG)
    assert (done.returncode, done.stderr) == (0, b"")
    answer = task_pb2.DeleteResponse.FromString(done.stdout)
    assert (answer.pid, answer.exit_status) == (0, 137)
    assert before <= answer.exited_at.ToNanoseconds() <= time.time_ns()


def test_delete_reaps_and_leaves_subprocesses_alone(author: Make) -> None:
    shim = author("""
        from shimcore.bootstrap import DeleteResult
        class Author(Author):
            def delete_shim(self):
                assert threading.get_native_id() != os.getpid()
                assert _reaper.get_subreaper()
                orphan = int(subprocess.check_output(["sh", "-c", "setsid sh -c 'echo $$' & exit 0"]))
                while os.path.exists(f"/proc/{orphan}"):
                    os.sched_yield()  # for ever, if nobody reaped it
                return DeleteResult(12, subprocess.run(["sh", "-c", "exit 34"]).returncode, 56)
    """)
    done = shim.run("delete", "-bundle", str(shim.bundle))
    assert (done.returncode, done.stderr) == (0, "")
    answer = task_pb2.DeleteResponse.FromString(done.stdout.encode("latin-1"))
    assert (answer.pid, answer.exit_status, answer.exited_at.ToNanoseconds()) == (12, 34, 56)


def test_delete_may_return_the_message_itself(author: Make) -> None:
    shim = author("""
        class Author(Author):
            def delete_shim(self):
                from shimcore.protos import task_pb2
                return task_pb2.DeleteResponse(pid=1, exit_status=2)
    """)
    done = shim.run("delete")
    assert task_pb2.DeleteResponse.FromString(done.stdout.encode("latin-1")) == task_pb2.DeleteResponse(pid=1, exit_status=2)


@pytest.mark.parametrize(
    ("act", "text"), [("raise OSError(28, 'No space left on device', '/x')", "/x: No space left on device"), ("return 7", "int")]
)
def test_delete_that_fails(author: Make, act: str, text: str) -> None:
    shim = author(f"""
        class Author(Author):
            def delete_shim(self):
                {act}
    """)
    done = shim.run("delete")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert text in done.stderr


# ---- the end ----


def test_calls_in_flight_are_answered_at_the_end(author: Make) -> None:
    shim = author()
    address = shim.start()
    with Client(address) as client:
        answer = client.call(TASK, "Shutdown", task_pb2.ShutdownRequest(id="c1"), timeout=HANG)
    assert answer == b""


def test_a_socket_that_is_not_its_own_any_more_is_left(author: Make) -> None:
    shim = author()
    address = shim.start()
    path = Path(address.removeprefix("unix://"))
    moved = path.with_name(path.name + ".moved")
    path.rename(moved)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        shim.started = [f"unix://{moved}"]
        shim.stop(f"unix://{moved}")
        assert path.exists()
    path.unlink()
    moved.unlink(missing_ok=True)


def test_wait_that_raises_is_logged_and_the_socket_goes(author: Make) -> None:
    shim = author("""
        class Author(Author):
            def wait(self):
                super().wait()
                raise ValueError("at the end")
    """)
    with log_of(shim) as log:
        address = shim.start()
        shim.stop(address)
        until(log, b"ValueError: at the end")
    assert not os.path.exists(address.removeprefix("unix://"))
