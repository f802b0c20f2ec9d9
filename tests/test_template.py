"""The warm template and its launcher: a fork is what a fresh process would have been, and nothing is lost when either dies."""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from shimcore.address import socket_address
from shimcore.rig import ActivationError, Rig
from shimcore.template import SPARES
from shimcore.testing.leaks import parent, state
from tests.faults import Later, until

REPO = Path(__file__).resolve().parent.parent
WARM = "warm"


def send(pid: int, signum: int) -> None:
    """To one that may have gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signum)


def kill(pid: int) -> None:
    """And wait until the last of its threads has ended, with which its sockets close: its leader may be a zombie before."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(fd, signal.SIGKILL)
    assert select.select([fd], [], [], 20)[0]
    os.close(fd)


class Warm:
    """A directory for templates, the environment that turns them on, and what the launchers said of themselves."""

    def __init__(self, root: Path, shim: Path) -> None:
        self.directory = root / f"t{os.urandom(3).hex()}"
        self.trace = self.directory.with_suffix(".trace")
        self.shim = shim
        self.env = {
            "SHIMCORE_TEMPLATE": "1", "SHIMCORE_TEMPLATE_DIR": str(self.directory), "SHIMCORE_TEMPLATE_TRACE": str(self.trace),
            "SHIMCORE_TEMPLATE_IDLE": "100",
        }  # fmt: skip
        self.pids: set[int] = set()

    def said(self) -> list[str]:
        """A line for each launcher: "warm", or "plain" and why."""
        return self.trace.read_text().splitlines() if self.trace.exists() else []

    def sockets(self) -> list[Path]:
        return sorted(self.directory.glob("*.sock"))

    def refusals(self) -> list[Path]:
        return sorted(self.directory.glob("*.no"))

    def pid(self, path: Path | None = None) -> int:
        """The template's: who listens is who SO_PEERCRED names."""
        if path is None:
            (path,) = self.sockets()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(f"/proc/self/fd/{self._fd()}/{path.name}")
            pid = int.from_bytes(client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[:4], sys.byteorder)
        self.pids.add(pid)
        return pid

    def _fd(self) -> int:
        if not hasattr(self, "_directory_fd"):
            self._directory_fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        return self._directory_fd

    def run(self, *args: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, **self.env, **kwargs.pop("env", {})}
        kwargs.setdefault("stdin", subprocess.DEVNULL)
        return subprocess.run([self.shim, *args], capture_output=True, text=True, timeout=60, env=env, **kwargs)

    def last(self, *args: str, **kwargs: Any) -> str:
        """How an action that says the version was done."""
        done = self.run(*(args or ("-v",)), **kwargs)
        assert done.returncode == 0 and "Version:" in done.stdout, done
        return self.said()[-1].strip()

    def warm_up(self) -> int:
        """Make a template, if there is none, and wait until it serves; its pid."""
        until(lambda: self.last() == WARM)
        return self.pid()

    def spares(self) -> list[int]:
        pids = [int(pid) for pid in os.listdir("/proc") if pid.isdigit()]
        return [pid for pid in pids if parent(pid) in self.pids and state(pid) in ("S", "R")]

    def end(self) -> None:
        for path in self.sockets():
            try:
                pid = self.pid(path)
            except OSError:
                continue
            for one in (pid, *self.spares()):
                send(one, signal.SIGCONT)
            send(pid, signal.SIGTERM)
            until(lambda: state(pid) in ("", "Z"))  # noqa: B023
        if hasattr(self, "_directory_fd"):
            os.close(self._directory_fd)
        shutil.rmtree(self.directory, ignore_errors=True)
        self.trace.unlink(missing_ok=True)


@pytest.fixture
def new_warm(session_root: Path, shim_dir: Path) -> Iterator[Callable[..., Warm]]:
    made: list[Warm] = []

    def make(shim: Path = shim_dir / "containerd-shim-runc-v2-py") -> Warm:
        made.append(Warm(session_root, shim))
        return made[-1]

    yield make
    for warm in made:
        warm.end()


@pytest.fixture
def warm(new_warm: Callable[..., Warm]) -> Warm:
    return new_warm()


@pytest.fixture
def rig(warm: Warm, rootfs: Path) -> Iterator[Rig]:
    warm.warm_up()
    with Rig(warm.shim, rootfs=rootfs, env=warm.env) as rig:
        yield rig


# --- what it is for


def test_a_whole_life_is_warm(rig: Rig, warm: Warm) -> None:
    before = len(warm.said())
    container = rig.container(["sh", "-c", "echo out; exit 42"])
    assert container.run() == 42 and container.output == "out\n"
    container.delete()
    assert [line.strip() for line in warm.said()[before:]] == [WARM, WARM]  # start and delete
    assert rig.events.topics(container.id) == ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"]


def test_later_spares_have_the_pages_that_a_daemon_wrote(rig: Rig, warm: Warm) -> None:
    def own(pid: int) -> int:
        """KiB."""
        return int(re.search(r"Private_Dirty: +(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text())[1])  # type: ignore[index]

    def ready(pids: set[int]) -> set[int]:
        return {pid for pid in pids if "Threads:\t3\n" in Path(f"/proc/{pid}/status").read_text()}

    until(lambda: len(ready(set(warm.spares()))) == SPARES)
    early = set(warm.spares())
    container = rig.container(["sleep", "100"])
    until(lambda: len(warm.spares()) == SPARES + 1)  # the daemon is a child of the template's, too
    (late,) = set(warm.spares()) - early
    waiting = early - {container.shim_pid}
    until(lambda: own(late) > max(map(own, waiting)) + 200)


def test_pods_and_errors_are_as_ever(rig: Rig, warm: Warm) -> None:
    (rig.root / "config.json").write_text("{")
    with pytest.raises(ActivationError, match=r"config\.json"):
        rig.activator.start("no-bundle", rig.root)
    assert warm.said()[-1].strip() == WARM


LOOKED_AT = (
    "cgroup", "coredump_filter", "timerslack_ns", "oom_score_adj", "attr/current", "limits", "loginuid", "setgroups", "uid_map",
)  # fmt: skip
# Counters, addresses and what names the process itself.
STATUS_DIFFERS = {
    "Tgid", "Pid", "PPid", "Threads", "NStgid", "NSpid", "NSpgid", "NSsid", "voluntary_ctxt_switches",
    "nonvoluntary_ctxt_switches", "State", "Name", "SigQ", "FDSize",
}  # fmt: skip


def look(pid: int) -> dict[str, Any]:
    """What /proc says of a process and that should not depend on how it came to be."""
    base = Path(f"/proc/{pid}")

    def read(name: str) -> str:
        try:
            return (base / name).read_text()
        except OSError as error:
            return f"errno {error.errno}"

    found: dict[str, Any] = {name: read(name) for name in LOOKED_AT}
    for line in read("status").splitlines():
        name, _, value = line.partition(":")
        if name not in STATUS_DIFFERS and not name.startswith(("Vm", "Rss", "Hugetlb")):
            found[f"status {name}"] = value.strip()
    for name in os.listdir(base / "ns"):
        found[f"ns {name}"] = os.readlink(base / "ns" / name)
    found["comm"] = read("comm")
    found["environ"] = sorted(read("environ").split("\0"))
    found["cmdline"] = read("cmdline").split("\0")
    found["cwd"], found["root"], found["exe"] = (os.readlink(base / name) for name in ("cwd", "root", "exe"))
    found["session"] = os.getsid(pid) == pid
    policy = [os.sched_getscheduler(tid) for tid in map(int, os.listdir(base / "task"))]
    found["sched"] = sorted(policy), sorted(os.getpriority(os.PRIO_PROCESS, int(tid)) for tid in os.listdir(base / "task"))
    found["affinity"] = os.sched_getaffinity(pid)
    found["fds"] = sorted(os.readlink(base / "fd" / fd).split(":")[0] for fd in os.listdir(base / "fd"))
    found["std"] = [os.readlink(base / "fd" / str(fd)) for fd in range(3)]
    return found


def settled_look(pid: int) -> dict[str, Any]:
    """Once two looks are alike: an fd of what has just been done may still be open."""
    last = look(pid)
    for _ in range(100):
        time.sleep(0.02)
        now = look(pid)
        if now == last:
            return now
        last = now
    raise AssertionError("it does not settle")


def test_a_fork_is_what_a_fresh_process_would_have_been(warm: Warm, rootfs: Path) -> None:
    """The same container, plain and warm, from a caller with an umask, limits and an oom_score_adj of its own."""
    warm.warm_up()
    found = {}
    for mode in ("0", "1"):
        program = f"""
import os, resource, signal, sys
os.umask(0o027)
resource.setrlimit(resource.RLIMIT_CORE, (4096, 8192))
resource.setrlimit(resource.RLIMIT_NOFILE, (1000, 4000))
open("/proc/self/oom_score_adj", "w").write("123")
signal.signal(signal.SIGUSR2, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])
from shimcore.rig import Rig
env = {warm.env | {"SHIMCORE_TEMPLATE": mode}!r}
with Rig({str(warm.shim)!r}, rootfs={str(rootfs)!r}, namespace="rig-same{mode}", env=env) as rig:
    container = rig.container(["sleep", "100"], id="same")
    container.create()
    container.start()
    print(container.shim_pid, flush=True)
    sys.stdin.read()
    container.task.kill(9)
    container.wait()
    container.delete()
"""
        with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None and child.stdin is not None
            line = child.stdout.readline()
            assert line.strip(), "the rig failed"
            until(lambda pid=int(line): os.path.exists(f"/proc/{pid}/cwd"))
            found[mode] = settled_look(int(line))
            child.stdin.close()
            assert child.wait(60) == 0
    assert "warm" in warm.said()[-1]
    plain, forked = found["0"], found["1"]
    for one in (plain, forked):  # the two rigs differ in their directories, namespaces and marks
        for name in ("environ", "cmdline", "cwd", "std", "fds"):
            text = re.sub(r"rig-same[01]", "N", str(one[name]))
            text = re.sub(r"rig-\w+/", "ROOT/", text)
            one[name] = re.sub(r"('SHIMCORE_READY_FD=\w*', )|((?<=SHIMCORE_RIG=)|(?<=SHIMCORE_TEMPLATE=))\w+", "", text)
    # Deliberate differences: docs/template.md lists them.
    for one in (plain, forked):
        for name in ("status SigIgn", "status SigBlk"):
            one.pop(name)
    differing = {name: (plain[name], forked[name]) for name in plain if plain[name] != forked[name]}
    assert not differing, "\n".join(f"{name}:\n  plain {a}\n  warm  {b}" for name, (a, b) in differing.items())


# --- its life


def test_fifty_at_once_make_one(warm: Warm) -> None:
    with ThreadPoolExecutor(50) as pool:
        done = list(pool.map(lambda _: warm.run("-v"), range(50)))
    assert {one.returncode for one in done} == {0}
    until(lambda: warm.last() == WARM)
    assert len(warm.sockets()) == 1
    # In /proc/net/unix 00010000 is a listener.
    listening = [line for line in Path("/proc/net/unix").read_text().splitlines() if line.endswith(warm.sockets()[0].name)]
    assert sum(line.split()[3] == "00010000" for line in listening) == 1
    template = warm.pid()
    mine = [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and str(warm.directory).encode() in cmdline(int(pid))]
    assert [pid for pid in mine if pid != template and parent(pid) != template and state(pid) in ("S", "R")] == []


def test_who_was_late_starts_no_second_one(warm: Warm) -> None:
    """A launcher that finds no template, and gets the lock only when another's has come to listen and let go of it."""
    command = ["strace", "-o", "/dev/null", "-e", "trace=connect", "-e", "inject=connect:signal=SIGSTOP:when=1"]
    env = {**os.environ, **warm.env}
    with subprocess.Popen([*command, warm.shim, "-v"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=env) as tracer:
        until(lambda: [pid for pid in children(tracer.pid) if dialled(pid)], what="it does not stop")
        (late,) = children(tracer.pid)
        template = warm.warm_up()

        def gone_on() -> bool:
            with contextlib.suppress(ProcessLookupError):
                os.kill(late, signal.SIGCONT)  # and again: one that comes before it has stopped is lost
            return tracer.poll() is not None

        until(gone_on)
        assert tracer.returncode == 0
    assert warm.said()[-1].strip() == WARM
    assert warm.pid() == template
    mine = [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and str(warm.directory).encode() in cmdline(int(pid))]
    assert [pid for pid in mine if pid != template and parent(pid) != template and state(pid) in ("S", "R")] == []


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def dialled(pid: int) -> bool:
    """Stopped behind its connect: a strace that is only starting has stopped it elsewhere."""
    try:
        number = Path(f"/proc/{pid}/syscall").read_text().split()[0]
    except FileNotFoundError:  # it was strace's own, and has gone
        return False
    return state(pid) in ("t", "T") and number == "42" and b"containerd-shim" in cmdline(pid)


def cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_a_killed_template_is_made_anew(warm: Warm) -> None:
    first = warm.warm_up()
    spares = warm.spares()
    os.kill(first, signal.SIGKILL)
    until(lambda: all(state(pid) in ("", "Z") for pid in (first, *spares)), what="spares outlive their template")
    assert warm.last() != WARM
    assert warm.warm_up() != first


def test_it_ends_when_it_is_asked_to(warm: Warm) -> None:
    pid = warm.warm_up()
    os.kill(pid, signal.SIGTERM)
    until(lambda: state(pid) in ("", "Z"))
    assert warm.sockets() == []


def test_it_ends_when_nobody_asks(warm: Warm) -> None:
    warm.env["SHIMCORE_TEMPLATE_IDLE"] = "0.2"
    warm.run("-v")
    until(lambda: warm.directory.exists() and list(warm.directory.glob("*.lock")) != [])
    until(lambda: not [pid for pid in os.listdir("/proc") if pid.isdigit() and str(warm.directory).encode() in cmdline(int(pid))])
    assert warm.sockets() == []


def test_G9_changed_code_is_not_run_warm(warm: Warm, tmp_path: Path) -> None:
    """An author's module is replaced; our own would do as well, but others use it."""
    (tmp_path / "changing.py").write_text(CHANGING.format(version=1))
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{REPO}"}
    command = [sys.executable, "-m", "shimcore.install", "--dest", str(tmp_path / "bin"), "--template"]
    command += ["--runtime-id", "io.containerd.changing.v1", "changing:Changing"]
    subprocess.run(command, check=True, env=env, stdout=subprocess.DEVNULL)
    warm.shim = tmp_path / "bin" / "containerd-shim-changing-v1"

    def info() -> tuple[str, str]:
        done = warm.run("-info")
        assert done.returncode == 0, done
        return done.stdout, warm.said()[-1].strip()

    until(lambda: info() == ("version 1", WARM))
    pid = warm.pid()
    for version in range(2, 5):  # replaced, as pip does, and written to
        new = tmp_path / "new"
        new.write_text(CHANGING.format(version=version))
        if version % 2:
            (tmp_path / "changing.py").write_text(new.read_text())
        else:
            new.replace(tmp_path / "changing.py")
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        text, how = info()
        assert text == f"version {version}" and how != WARM
        until(lambda: state(pid) in ("", "Z"), what="the template with the old code lives")  # noqa: B023
        until(lambda: info()[1] == WARM)
        assert info()[0] == f"version {version}"
        pid = warm.pid()


CHANGING = """
from shimcore.shim import Shim
class Changing(Shim):
    def shim_info(self, invocation):
        return b"version {version}"
"""


# --- stopped, killed, wrong


def test_a_stopped_template_delays_nobody_for_long(rig: Rig, warm: Warm) -> None:
    pid = warm.pid()
    os.kill(pid, signal.SIGSTOP)
    until(lambda: state(pid) == "T")
    stopped = [pid, *warm.spares()]
    for one in stopped[1:]:
        send(one, signal.SIGSTOP)
    until(lambda: all(state(one) in ("T", "Z", "") for one in stopped))
    container = rig.container(["true"])
    assert warm.said()[-1].strip() == "plain no answer"
    assert container.run() == 0
    container.delete()
    for one in stopped:
        send(one, signal.SIGCONT)
    # What they were asked meanwhile is not done: its launchers had not said "go", and went their own way.
    other = rig.container(["true"])
    assert other.run() == 0
    other.delete()


class Peer:
    """In the place of a template: says what a test wants it to say."""

    def __init__(self, warm: Warm) -> None:
        pid = warm.warm_up()
        (path,) = warm.sockets()
        os.kill(pid, signal.SIGTERM)
        until(lambda: state(pid) in ("", "Z"))
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(f"/proc/self/fd/{warm._fd()}/{path.name}")
        self.listener.listen()
        self.listener.settimeout(30)

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.listener.close()

    def answer(self, *replies: bytes) -> Later:
        """Take one request; send each reply once there is something to read for it; b"" hangs up."""

        def run() -> bytes:
            client, _ = self.listener.accept()
            with client:
                client.settimeout(30)
                request = client.recv(1 << 20)
                for number, reply in enumerate(replies):
                    if number and client.recv(1) != b"G":
                        return request
                    if not reply:
                        return request
                    try:
                        client.sendall(reply)
                    except (BrokenPipeError, ConnectionResetError):
                        return request
                try:
                    while client.recv(100):
                        pass
                except (ConnectionResetError, TimeoutError):
                    pass
            return request

        return Later(run)


def result(status: int, out: bytes, err: bytes) -> bytes:
    return b"".join(number.to_bytes(4, "little") for number in (status, len(out), len(err))) + out + err


@pytest.mark.parametrize(
    ("replies", "how"),
    [
        ([b"S"], "plain the code has changed"),
        ([b"N"], "plain the template refused"),
        ([b"?"], "plain no answer"),
        ([b""], "plain no answer"),
        ([], "plain no answer"),
    ],
    ids=["changed", "refused", "nonsense", "hangs up", "mute"],
)
def test_before_its_go_the_launcher_does_without(warm: Warm, replies: list[bytes], how: str) -> None:
    with Peer(warm) as peer:
        asked = peer.answer(*replies)
        assert warm.last() == how
        assert b"SHIMCORE_TEMPLATE_DIR" in asked.result()


def test_after_its_go_the_launcher_relays(warm: Warm) -> None:
    with Peer(warm) as peer:
        for status, out, err in ((0, b"out", b""), (3, b"", b"no\n"), (255, b"o" * 300_000, b"e" * 70_000)):
            asked = peer.answer(b"R", result(status, out, err))
            done = warm.run("start")
            assert (done.returncode, done.stdout, done.stderr) == (status, out.decode(), err.decode())
            asked.result()
            assert warm.said()[-1].strip() == WARM


@pytest.mark.parametrize("reply", [b"", b"abc", result(0, b"x" * 100, b"")[:-1]], ids=["nothing", "half a head", "half"])
def test_after_its_go_a_lost_result_is_an_error(warm: Warm, reply: bytes) -> None:
    with Peer(warm) as peer:
        client_done = threading.Event()

        def run() -> None:
            client, _ = peer.listener.accept()
            with client:
                client.settimeout(30)
                client.recv(1 << 20)
                client.sendall(b"R")
                assert client.recv(1) == b"G"
                client.sendall(reply)
            client_done.set()

        later = Later(run)
        done = warm.run("start")
        assert done.returncode == 1 and done.stdout == "" and "ended without a word" in done.stderr
        later.result()


class Request:
    """A launcher's side of a conversation with a real template."""

    def __init__(self, warm: Warm, args: list[str], cwd: Path, env: dict[str, str]) -> None:
        (path,) = warm.sockets()
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(30)
        self.socket.connect(f"/proc/self/fd/{warm._fd()}/{path.name}")
        numbers = [0o022, 0, os.getpid(), *[-1, -1] * 16]
        limits = [(-1, -1)] * 16
        import resource

        for number in range(16):
            limits[number] = resource.getrlimit(number)
        numbers = [0o022, 0, os.getpid(), *[value for pair in limits for value in pair]]
        body = b"".join(number.to_bytes(8, "little", signed=True) for number in numbers)
        for texts in (["shim", *args], [f"{name}={value}" for name, value in env.items()]):
            body += len(texts).to_bytes(8, "little") + b"".join(os.fsencode(text) + b"\0" for text in texts)
        with open(os.devnull) as stdin:
            folder = os.open(cwd, os.O_PATH | os.O_DIRECTORY)
            socket.send_fds(self.socket, [len(body).to_bytes(8, "little") + body], [stdin.fileno(), folder])
            os.close(folder)

    def close(self) -> None:
        self.socket.close()


def start_request(rig: Rig, warm: Warm, id: str) -> tuple[Request, Path]:
    bundle = rig.bundle_path(id)
    bundle.mkdir(parents=True)
    (bundle / "config.json").write_text("{}")
    environment = {**rig.activator.environment, **warm.env}
    return Request(warm, rig.activator.arguments(id, "start")[1:], bundle, environment), bundle


def sockets_of(rig: Rig, id: str) -> list[str]:
    """The socket of this container's shim, and the files beside it; those of others on the machine come and go."""
    path = Path(socket_address(rig.activator.grpc, rig.activator.namespace, id).removeprefix("unix://"))
    return [file.name for file in path.parent.glob(path.name + "*")]


def test_a_launcher_that_dies_before_its_go_has_done_nothing(rig: Rig, warm: Warm) -> None:
    request, bundle = start_request(rig, warm, "before")
    assert request.socket.recv(1) == b"R"
    request.close()
    warm.warm_up()
    until(lambda: len(warm.spares()) == SPARES)
    assert not sockets_of(rig, "before") and os.listdir(bundle) == ["config.json"]


def test_a_launcher_that_dies_after_its_go_has_everything_undone(rig: Rig, warm: Warm) -> None:
    request, bundle = start_request(rig, warm, "after")
    before = sorted(os.listdir(bundle))
    assert request.socket.recv(1) == b"R"
    request.socket.sendall(b"G")
    request.close()
    until(lambda: not sockets_of(rig, "after") and not daemons(bundle), what="a daemon was left, or its socket")
    assert sorted(os.listdir(bundle)) == before


# red: containerd, which removes the bundle of a `start` that it has killed, left a folder with our address in it
def test_a_bundle_that_is_being_removed_goes_with_the_start_that_was_killed(rig: Rig, warm: Warm) -> None:
    request, bundle = start_request(rig, warm, "removed")
    assert request.socket.recv(1) == b"R"
    hidden = bundle.rename(bundle.with_name(".removed"))  # containerd does this first, so that it is none any more at once
    for path in hidden.iterdir():
        path.unlink()
    request.socket.sendall(b"G")
    request.close()
    until(lambda: not sockets_of(rig, "removed") and not daemons(hidden) and not hidden.exists())


def daemons(bundle: Path) -> list[int]:
    """Processes that work in this bundle."""
    found = []
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and os.readlink(f"/proc/{name}/cwd") == str(bundle):
                found.append(int(name))
        except OSError:
            pass
    return found


@pytest.mark.parametrize(
    ("mode", "after"), [*(("1", ms) for ms in (0, 0.5, 1, 2, 3, 5)), *(("0", ms) for ms in (5, 10, 15, 20, 25, 30, 35, 40, 45))]
)
def test_a_start_is_killed_at_any_moment(rig: Rig, warm: Warm, mode: str, after: float) -> None:
    """Warm and plain: either there is a daemon that answers at the address that the bundle names, or there is nothing."""
    bundle = rig.bundle_path("killed")
    bundle.mkdir(parents=True)
    (bundle / "config.json").write_text("{}")
    env = rig.activator.environment | warm.env | {"SHIMCORE_TEMPLATE": mode}
    child = subprocess.Popen(
        rig.activator.arguments("killed", "start"), cwd=bundle, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    time.sleep(after / 1000)
    child.kill()
    child.communicate()

    def settled() -> bool:
        """A plain start that is killed between bind and its daemon leaves the socket, which `delete` finds dead and removes."""
        left = daemons(bundle)
        undone = not sockets_of(rig, "killed") or mode == "0"
        return (not left and undone) or (len(left) == 1 and (bundle / "address").exists())

    def cleaned() -> bool:
        """As containerd does after a start that failed; who served before the kill came would have been found by its address."""
        for pid in daemons(bundle):
            kill(pid)
        rig.activator.delete("killed", bundle)
        return not sockets_of(rig, "killed") and not daemons(bundle)

    until(settled)
    time.sleep(0.05)  # a fork that had heard "go" may only now begin
    until(settled)
    until(cleaned)


# --- who may


def test_a_directory_that_others_can_enter_is_not_used(warm: Warm, tmp_path: Path) -> None:
    for make in ("open", "link", "file"):
        path = tmp_path / make
        if make == "open":
            path.mkdir(mode=0o755)
        elif make == "link":
            (tmp_path / "real").mkdir(mode=0o700)
            path.symlink_to(tmp_path / "real")
        else:
            path.write_text("")
        warm.env["SHIMCORE_TEMPLATE_DIR"] = str(path)
        assert warm.last() == "plain the directory can't be used"
        assert not path.is_dir() or os.listdir(path) == []


def test_a_long_directory_works(warm: Warm, session_root: Path) -> None:
    """Longer than a socket's address may be: it is reached by the directory's fd."""
    warm.directory = session_root / ("l" * 150) / ("m" * 100)
    warm.directory.parent.mkdir(exist_ok=True)
    warm.env["SHIMCORE_TEMPLATE_DIR"] = str(warm.directory)
    warm.warm_up()


def test_its_directory_and_socket_are_for_its_owner_alone(warm: Warm) -> None:
    warm.warm_up()
    assert warm.directory.stat().st_mode & 0o777 == 0o700
    assert warm.sockets()[0].stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("what", ["nice", "env", "cgroup-less-capability"])
def test_another_caller_has_another_template(warm: Warm, what: str) -> None:
    warm.warm_up()
    if what == "nice":
        assert warm.last(preexec_fn=lambda: os.nice(3)) == "plain no template yet"
    elif what == "env":
        assert warm.last(env={"LC_TIME": "C"}) == "plain no template yet"
    else:
        program = f"import ctypes, os; ctypes.CDLL(None).prctl(24, 5, 0, 0, 0); os.execv({str(warm.shim)!r}, ['shim', '-v'])"
        env = {**os.environ, **warm.env}
        subprocess.run([sys.executable, "-c", program], env=env, check=True, stdout=subprocess.DEVNULL, timeout=60)
        assert warm.said()[-1].strip() == "plain no template yet"
    until(lambda: len(warm.sockets()) == 2)


def test_off_means_off(warm: Warm) -> None:
    for value in ("0", "off"):
        assert warm.last(env={"SHIMCORE_TEMPLATE": value}) == "plain off"
    assert not warm.directory.exists()


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import threading, time; threading.Thread(target=time.sleep, args=(100,), daemon=True).start()", "makes threads"),
        ("kept = open('/etc/passwd')", "/etc/passwd"),
        ("raise RuntimeError('not today')", "not today"),
    ],
    ids=["thread", "file", "error"],
)
def test_a_module_that_can_not_be_forked_is_refused_once(
    new_warm: Callable[..., Warm], tmp_path: Path, source: str, reason: str
) -> None:
    (tmp_path / "unforkable.py").write_text(f"{source}\nfrom shimcore.shim import Shim\nclass Unforkable(Shim): pass\n")
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{REPO}"}
    command = [sys.executable, "-m", "shimcore.install", "--dest", str(tmp_path / "bin"), "--template"]
    command += ["--runtime-id", "io.containerd.unforkable.v1", "unforkable:Unforkable"]
    subprocess.run(command, check=True, env=env, stdout=subprocess.DEVNULL)
    warm = new_warm(tmp_path / "bin" / "containerd-shim-unforkable-v1")
    warm.run("-v")
    until(lambda: [path for path in warm.refusals() if path.read_text().endswith("\n")])
    assert reason in warm.refusals()[0].read_text()
    assert warm.last() == "plain no template yet" and warm.said()[-2].startswith("refused")
    assert warm.sockets() == []
