"""The runc task service on a core of its own, over a runtime that is a shell script: what goes wrong, and in which order."""

from __future__ import annotations

import gc
import os
import queue
import shutil
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.any_pb2 import Any as AnyMessage

from shimcore import _reaper, jobs
from shimcore.errors import (
    AlreadyExists,
    Canceled,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unknown,
)
from shimcore.oci import control, forgotten, service
from shimcore.oci.options import RUNC_OPTIONS
from shimcore.oci.service import RuncTask
from shimcore.protos import runc_options_pb2, task_pb2
from shimcore.publisher import RemotePublisher

# Does what runc does as far as the shim sees it; a file named do-<command> beside it is run instead.
RUNTIME = r"""#!/bin/sh
here=$(dirname "$0")
log=; pidfile=; root=
while :; do
    case $1 in
    --root) root=$2; shift 2 ;;
    --log) log=$2; shift 2 ;;
    --log-format) shift 2 ;;
    *) break ;;
    esac
done
command=$1; shift
for id; do :; done
for arg; do
    [ "$last" = --pid-file ] && pidfile=$arg
    last=$arg
done
echo "$command $id" >> "$here/calls"
fail() { echo "{\"level\":\"error\",\"msg\":\"$1\"}" >> "$log"; exit 1; }
leave() { "$@" & echo $! > "$pidfile.new"; mv "$pidfile.new" "$pidfile"; }
[ -e "$here/do-$command-$id" ] && . "$here/do-$command-$id"
[ -e "$here/do-$command" ] && . "$here/do-$command"
case $command in
create) mkdir -p "$root/$id"; leave sleep 1000 ;;
exec) leave sleep 1000 ;;
delete) [ -d "$root/$id" ] || fail "container $id does not exist"; rmdir "$root/$id" ;;
esac
exit 0
"""


class Context:
    """What a handler asks of its call."""

    def __init__(self, remaining: float | None = None, cancelled: bool = False) -> None:
        self.remaining = remaining
        self.cancelled = cancelled


class Pool:
    def submit(self, work: Callable[[], None]) -> None:
        threading.Thread(target=work, daemon=True).start()


class Rig:
    """A core, its exit thread, a thread that consumes its notes as the RPC thread does, and the service."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runtime = path / "runtime"
        self.runtime.write_text(RUNTIME)
        self.runtime.chmod(0o755)
        self.core = _reaper.Core("ns", "")
        self.core.pool = Pool()
        self.exit = _reaper.ExitSignal()
        self.task = RuncTask(RemotePublisher(self.core, "ns"), self.exit)
        self.stopping = False
        self.threads = [threading.Thread(target=target) for target in (self.core.run, self._notes)]
        for thread in self.threads:
            thread.start()

    def _notes(self) -> None:
        while not self.stopping:
            for note in self.core.notes(1.0):
                if not jobs.resume(note) and note[0] == _reaper.NOTE_TOLD:
                    self.task.on_exit(note[1])

    def begin(self, coro: Coroutine[Any, Any, Any]) -> queue.Queue[tuple[Any, BaseException | None]]:
        done: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue()
        self.core.post(jobs.Task(self.core, coro, lambda value, error: done.put((value, error))).step)
        return done

    def call(self, coro: Coroutine[Any, Any, Any], timeout: float = 20.0) -> Any:
        value, error = self.begin(coro).get(timeout=timeout)
        if error is not None:
            raise error
        return value

    def close(self) -> None:
        for slot in self.core.slots():
            try:
                slot.kill(signal.SIGKILL)
            except (NotFound, FailedPrecondition, OSError):
                pass
        wait_for(lambda: all(s.phase not in (_reaper.BOUND, _reaper.EXITED) for s in self.core.slots()))
        self.stopping = True
        self.core.post(lambda: None)
        self.core.stop()
        for thread in self.threads:
            thread.join(10)
            assert not thread.is_alive()

    # --- what the tests say

    def do(self, command: str, script: str) -> None:
        (self.path / f"do-{command}").write_text(script)

    def calls(self) -> list[str]:
        path = self.path / "calls"
        return path.read_text().split("\n")[:-1] if path.exists() else []

    def bundle(self, id: str) -> Path:
        path = self.path / id
        path.mkdir(exist_ok=True)
        if not (path / "config.json").exists():
            (path / "config.json").write_text('{"linux":{"namespaces":[{"type":"pid"}]}}')
        return path

    def create(self, id: str = "c1", context: Context | None = None, **fields: Any) -> Any:
        return self.call(self.creating(id, context, **fields))

    def creating(self, id: str = "c1", context: Context | None = None, **fields: Any) -> Any:
        options = runc_options_pb2.Options(binary_name=str(self.runtime), root=str(self.path / "state"))
        fields.setdefault("bundle", str(self.bundle(id)))
        fields.setdefault("options", AnyMessage(type_url=RUNC_OPTIONS, value=options.SerializeToString()))
        request = task_pb2.CreateTaskRequest(id=id, **fields)
        return self.task.create(request, context or Context())

    def start(self, id: str = "c1", exec_id: str = "", context: Context | None = None) -> int:
        request = task_pb2.StartRequest(id=id, exec_id=exec_id)
        return int(self.call(self.task.start(request, context or Context())).pid)

    def exec(self, exec_id: str, id: str = "c1", **fields: Any) -> None:
        fields.setdefault("spec", AnyMessage(type_url="x", value=b'{"args":["x"]}'))
        self.call(self.task.exec(task_pb2.ExecProcessRequest(id=id, exec_id=exec_id, **fields), Context()))

    def kill(self, id: str = "c1", exec_id: str = "", signum: int = 9, all: bool = False) -> None:
        request = task_pb2.KillRequest(id=id, exec_id=exec_id, signal=signum, all=all)
        self.call(self.task.kill(request, Context()))

    def deleting(self, id: str = "c1", exec_id: str = "") -> Any:
        return self.task.delete(task_pb2.DeleteRequest(id=id, exec_id=exec_id), Context())

    def delete(self, id: str = "c1", exec_id: str = "") -> Any:
        return self.call(self.deleting(id, exec_id))

    def told(self, id: str = "c1", exec_id: str = "") -> _reaper.Slot:
        slot = self.core.find(id, exec_id)
        assert slot is not None
        wait_for(lambda: slot.phase == _reaper.TOLD)
        return slot


def wait_for(predicate: Callable[[], bool], timeout: float = 10.0) -> None:
    deadline = time.monotonic() + timeout
    while not predicate():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def open_fds() -> int:
    gc.collect()  # the cores of earlier tests
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    before = _reaper.get_subreaper()
    _reaper.set_subreaper()
    rig = Rig(tmp_path)
    yield rig
    rig.close()
    _reaper.set_subreaper(before)


# --- a whole life


def test_a_life(rig: Rig) -> None:
    fds = open_fds()
    pid = rig.create().pid
    slot = rig.core.find("c1")
    assert slot is not None and slot.status == _reaper.CREATED and slot.pid == pid
    assert (rig.path / "c1/runtime").read_text() == str(rig.runtime)
    assert rig.start() == pid
    assert slot.status == _reaper.RUNNING
    with pytest.raises(FailedPrecondition, match="cannot start a running process"):
        rig.start()
    with pytest.raises(FailedPrecondition, match="cannot delete a running process"):
        rig.delete()
    rig.kill(signum=15)
    rig.told()
    with pytest.raises(NotFound):
        rig.kill()
    with pytest.raises(FailedPrecondition):
        rig.start()
    done = rig.delete()
    assert (done.pid, done.exit_status) == (pid, 143)
    assert abs(done.exited_at.ToNanoseconds() - time.time_ns()) < 60e9
    with pytest.raises(NotFound):
        rig.delete()
    assert rig.core.slots() == []
    assert rig.calls() == ["create c1", "start c1", "delete c1"]
    del slot  # it holds the ledger
    wait_for(lambda: open_fds() == fds)  # the exit thread closes a job's in its own time


def test_created_and_never_started(rig: Rig) -> None:
    pid = rig.create().pid
    done = rig.delete()
    assert (done.pid, done.exit_status) == (pid, 137)


def test_the_id_is_taken(rig: Rig) -> None:
    rig.create()
    with pytest.raises(AlreadyExists):
        rig.create()
    assert rig.calls() == ["create c1"]


def test_two_deletes_at_once_get_the_same_answer(rig: Rig) -> None:
    rig.create()
    rig.start()
    rig.kill()
    rig.told()
    rig.do("delete", "sleep 0.2")
    answers = [rig.begin(rig.deleting()) for _ in range(2)]
    first, second = [answer.get(timeout=10) for answer in answers]
    assert first[1] is None and second[1] is None
    assert first[0] == second[0]
    assert rig.calls().count("delete c1") == 1


def test_delete_tries_force_and_fails_in_the_runtimes_words(rig: Rig) -> None:
    rig.create()
    rig.kill()
    rig.told()
    rig.do("delete", 'fail "device busy"')
    with pytest.raises(Unknown, match="failed to delete task: device busy"):
        rig.delete()
    assert rig.calls()[-2:] == ["delete c1", "delete c1"]
    rig.do("delete", "")
    assert rig.delete().exit_status == 137


def test_delete_of_what_the_runtime_has_forgotten(rig: Rig) -> None:
    rig.create()
    rig.kill()
    rig.told()
    (rig.path / "state/ns/c1").rmdir()
    assert rig.delete().exit_status == 137


# --- Create fails


def gone(rig: Rig, id: str = "c1") -> None:
    assert rig.core.slots() == [] and rig.task.containers == {}
    for call in (rig.start, rig.delete, rig.kill):
        with pytest.raises(NotFound):
            call(id)


def test_create_fails_in_the_runtimes_words(rig: Rig) -> None:
    fds = open_fds()
    rig.do("create", 'fail "no such executable"')
    with pytest.raises(Unknown, match=r"^OCI runtime create failed: no such executable$"):
        rig.create()
    gone(rig)
    assert rig.calls() == ["create c1", "delete c1"]
    wait_for(lambda: open_fds() == fds)  # the exit thread closes a job's in its own time
    rig.do("create", "")
    rig.create()


def test_create_of_a_runtime_that_makes_no_process(rig: Rig) -> None:
    rig.do("create", "exit 0")
    with pytest.raises(OSError):
        rig.create()
    gone(rig)


def test_a_frozen_runtime_is_killed_at_the_callers_deadline(rig: Rig) -> None:
    rig.do("create", "sleep 1000")
    before = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        rig.create(context=Context(remaining=0.2))
    assert time.monotonic() - before < 5
    gone(rig)


def test_a_runtime_that_is_not_there(rig: Rig) -> None:
    options = runc_options_pb2.Options(binary_name="/nonexistent/runc")
    with pytest.raises(Unknown, match="/nonexistent/runc"):
        rig.create(options=AnyMessage(type_url=RUNC_OPTIONS, value=options.SerializeToString()))
    gone(rig)


def test_a_create_whose_caller_has_gone_meanwhile_is_taken_back(rig: Rig) -> None:
    rig.do("delete", 'kill -9 $(cat "$here/c1/init.pid"); rmdir "$root/$id"; exit 0')
    context = Context()
    rig.do("create", 'touch "$here/began"; while [ ! -e "$here/go" ]; do sleep 0.01; done')
    made = rig.begin(rig.creating(context=context))
    wait_for((rig.path / "began").exists)
    context.cancelled = True
    (rig.path / "go").touch()
    with pytest.raises(Canceled):
        raise made.get(timeout=20)[1] or AssertionError
    gone(rig)
    assert rig.calls() == ["create c1", "delete c1"]


def test_a_create_whose_caller_has_gone_is_not_begun(rig: Rig) -> None:
    """It may be clearing the bundle away: nothing is written, mounted or made."""
    bundle = rig.bundle("c1")
    before = sorted(bundle.iterdir())
    with pytest.raises(Canceled):
        rig.create(context=Context(cancelled=True))
    gone(rig)
    assert rig.calls() == [] and sorted(bundle.iterdir()) == before


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"id": "../x"}, InvalidArgument),
        ({"id": "-x"}, InvalidArgument),
        ({"bundle": "relative"}, InvalidArgument),
        ({"checkpoint": "x"}, InvalidArgument),
        ({"stdout": "binary://x"}, InvalidArgument),
        ({"stdout": "/nonexistent/fifo"}, InvalidArgument),
        ({"options": AnyMessage(type_url="some.Unknown", value=b"x")}, InvalidArgument),
    ],
)
def test_create_refuses(rig: Rig, fields: dict[str, Any], error: type[Exception]) -> None:
    fields = {"bundle": str(rig.bundle("c1")), **fields}
    with pytest.raises(error):
        rig.create(fields.pop("id", "c1"), **fields)
    assert rig.core.slots() == [] and rig.calls() == []


def test_a_slow_container_delays_no_other(rig: Rig) -> None:
    rig.do("create-slow", "sleep 3")
    slow = rig.begin(rig.creating("slow"))
    before = time.monotonic()
    rig.create("quick")
    rig.start("quick")
    rig.kill("quick")
    rig.told("quick")
    rig.delete("quick")
    assert time.monotonic() - before < 2
    # What is being created is not there yet.
    with pytest.raises(NotFound):
        rig.kill("slow")
    assert slow.get(timeout=20)[1] is None


# --- Start


def test_start_fails(rig: Rig) -> None:
    rig.create()
    rig.do("start", 'fail "cannot start"')
    with pytest.raises(Unknown, match=r"^OCI runtime start failed: cannot start$"):
        rig.start()
    rig.do("start", "exit 3")
    # Not the words of the call before.
    with pytest.raises(Unknown, match="exited with status 3"):
        rig.start()
    rig.do("start", "")
    rig.start()


def test_an_exit_during_start_is_told_after_it(rig: Rig) -> None:
    rig.create()
    rig.do("start", 'kill -9 $(cat "$here/c1/init.pid"); sleep 0.3')
    slot = rig.core.find("c1")
    assert slot is not None
    answer = rig.begin(rig.task.start(task_pb2.StartRequest(id="c1"), Context()))
    wait_for(lambda: slot.phase >= _reaper.EXITED)
    assert slot.phase == _reaper.EXITED and answer.empty()
    assert answer.get(timeout=10)[1] is None
    rig.told()


# --- execs


def test_execs(rig: Rig) -> None:
    rig.create()
    rig.start()
    rig.exec("e1")
    with pytest.raises(AlreadyExists):
        rig.exec("e1")
    with pytest.raises(FailedPrecondition):
        rig.kill(exec_id="e1")
    pid = rig.start(exec_id="e1")
    assert (rig.path / "c1/e1.pid").exists()
    assert not (rig.path / "c1/e1.process.json").exists()
    with pytest.raises(FailedPrecondition, match="cannot start a running process"):
        rig.start(exec_id="e1")
    with pytest.raises(FailedPrecondition, match="cannot delete a running process"):
        rig.delete(exec_id="e1")
    rig.kill(exec_id="e1", signum=15)
    rig.told(exec_id="e1")
    done = rig.delete(exec_id="e1")
    assert (done.pid, done.exit_status) == (pid, 143)
    assert not (rig.path / "c1/e1.pid").exists()
    with pytest.raises(NotFound):
        rig.delete(exec_id="e1")
    rig.exec("e1")
    assert rig.delete(exec_id="e1").pid == 0  # never started


def test_an_exec_called_init_leaves_inits_pid_alone(rig: Rig) -> None:
    pid = rig.create().pid
    rig.start()
    rig.exec("init")
    assert rig.start(exec_id="init") != pid
    assert (rig.path / "c1/init.pid").read_text().strip() == str(pid)


def test_a_failed_exec_tells_its_own_error(rig: Rig) -> None:
    fds = open_fds()
    rig.create()
    rig.start()
    rig.do("exec", 'fail "exec: not found"')
    rig.exec("e1")
    with pytest.raises(Unknown, match=r"^OCI runtime exec failed: exec: not found$"):
        rig.start(exec_id="e1")
    with pytest.raises(FailedPrecondition):
        rig.start(exec_id="e1")
    assert rig.delete(exec_id="e1").exit_status == 255
    assert [p.name for p in (rig.path / "c1").glob("e1*")] == []
    rig.kill()
    rig.told()
    rig.delete()
    wait_for(lambda: open_fds() == fds)  # the exit thread closes a job's in its own time


def test_no_exec_after_inits_exit(rig: Rig) -> None:
    rig.create()
    rig.start()
    rig.exec("e1")
    rig.kill()
    rig.told()
    with pytest.raises(FailedPrecondition):
        rig.start(exec_id="e1")
    with pytest.raises(FailedPrecondition):
        rig.exec("e2")


def test_execs_start_side_by_side(rig: Rig) -> None:
    rig.create()
    rig.start()
    rig.do("exec", "sleep 0.5; leave sleep 1000; exit 0")
    for number in range(4):
        rig.exec(f"e{number}")
    before = time.monotonic()
    answers = [rig.begin(rig.task.start(task_pb2.StartRequest(id="c1", exec_id=f"e{number}"), Context())) for number in range(4)]
    assert len({answer.get(timeout=10)[0].pid for answer in answers}) == 4
    assert time.monotonic() - before < 1.5


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"exec_id": "a/b"}, InvalidArgument),
        ({"exec_id": ""}, InvalidArgument),
        ({"spec": AnyMessage(value=b"{")}, InvalidArgument),
        ({"spec": AnyMessage(value=b"[]")}, InvalidArgument),
        ({"id": "other"}, NotFound),
    ],
)
def test_exec_refuses(rig: Rig, fields: dict[str, Any], error: type[Exception]) -> None:
    rig.create()
    with pytest.raises(error):
        rig.exec(fields.pop("exec_id", "e1"), **fields)
    assert len(rig.core.slots()) == 1


# --- the rest


def test_pids(rig: Rig) -> None:
    pid = rig.create().pid
    rig.start()
    rig.exec("e1")
    exec_pid = rig.start(exec_id="e1")

    def pids() -> dict[int, str]:
        answer = rig.call(rig.task.pids(task_pb2.PidsRequest(id="c1"), Context()))
        return {p.pid: runc_options_pb2.ProcessDetails.FromString(p.info.value).exec_id for p in answer.processes}

    # The script puts nothing into a cgroup, so these are the processes that the shim knows itself.
    assert rig.task.containers["c1"].cgroup == ""
    assert pids() == {pid: "", exec_pid: "e1"}
    rig.kill(exec_id="e1")
    rig.told(exec_id="e1")
    rig.kill()
    rig.told()
    # With no pid at all containerd would take the shim for a leaked one.
    assert pids() == {pid: ""}


def test_close_io_ends_stdin(rig: Rig, tmp_path: Path) -> None:
    fifo = str(tmp_path / "stdin")
    os.mkfifo(fifo)
    # A shell's background jobs have /dev/null for stdin.
    rig.do("create", 'mkdir -p "$root/$id"; exec 3<&0; cat <&3 & echo $! > "$pidfile"; exit 0')
    rig.create(stdin=fifo)
    rig.start()
    slot = rig.core.find("c1")
    assert slot is not None and slot.phase == _reaper.BOUND
    request = task_pb2.CloseIORequest(id="c1", stdin=True)
    rig.call(rig.task.close_io(request, Context()))
    assert rig.told().exit_status == 0
    rig.call(rig.task.close_io(request, Context()))


def test_shutdown_waits_for_the_last_container(rig: Rig) -> None:
    rig.create()
    request = task_pb2.ShutdownRequest(id="c1", now=True)
    rig.call(rig.task.shutdown(request, Context()))
    assert not rig.exit.is_set()
    rig.delete()
    rig.call(rig.task.shutdown(request, Context()))
    assert rig.exit.is_set()
    rig.call(rig.task.shutdown(request, Context()))


# red: a shim that lived on for ever. ttrpc says nothing of a Delete that containerd has given up, and no Shutdown follows
def test_a_shim_ends_when_nobody_says_shutdown_after_the_last_delete(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    ends: queue.Queue[None] = queue.Queue()

    async def sleep(seconds: float) -> None:
        assert seconds == service.ORPHAN_TIMEOUT
        await jobs.in_pool(ends.get)

    monkeypatch.setattr(service.jobs, "sleep", sleep)
    rig.create("c1")
    rig.create("c2")
    rig.delete("c1")
    rig.delete("c2")
    rig.create("c3")
    ends.put(None)  # what c2's Delete began finds c3
    rig.delete("c3")
    assert not rig.exit.is_set()
    ends.put(None)
    wait_for(rig.exit.is_set)


# red: its slot, FIFOs and ledger stayed for as long as the pod
def test_a_container_that_containerd_has_forgotten_is_forgotten(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """containerd runs `delete` for it and removes its bundle, and says no Delete, when its connection breaks."""
    looks: queue.Queue[None] = queue.Queue()
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        await jobs.in_pool(looks.get)

    monkeypatch.setattr(forgotten, "sleep", sleep)
    rig.create("c1")
    rig.create("c2")
    rig.start("c1")
    rig.exec("e1")
    rig.start("c1", "e1")
    rig.kill("c1", "e1")
    rig.kill("c1")
    rig.told("c1")
    looks.put(None)  # its bundle is there
    wait_for(lambda: pauses == [10.0, 20.0])
    assert rig.core.find("c1") is not None
    shutil.rmtree(rig.bundle("c1"))
    looks.put(None)
    wait_for(lambda: rig.core.find("c1") is None)
    assert set(rig.task.containers) == {"c2"} and {slot.container_id for slot in rig.core.slots()} == {"c2"}
    rig.create("c1")  # the id is free
    rig.delete("c1")
    rig.delete("c2")


def test_the_last_one_that_containerd_has_forgotten_ends_the_shim(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    async def now(seconds: float) -> None:
        await jobs.in_pool(wait_for, lambda: not (rig.path / "c1").exists())

    monkeypatch.setattr(forgotten, "sleep", now)
    monkeypatch.setattr(service, "ORPHAN_TIMEOUT", 0.01)
    rig.create("c1")
    rig.start("c1")
    rig.kill("c1")
    rig.told("c1")
    shutil.rmtree(rig.bundle("c1"))
    wait_for(rig.exit.is_set)
    assert rig.task.containers == {}


def test_who_was_killed_frozen_and_is_dead_needs_no_thawing(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """On cgroup v2 a frozen process dies at once, and a runtime then refuses to resume what does not run."""
    rig.do("resume", 'touch "$here/asked"; while [ ! -e "$here/go" ]; do sleep 0.01; done; fail "it is not running"')
    rig.create()
    rig.start()
    rig.call(rig.task.pause(task_pb2.PauseRequest(id="c1"), Context()))
    slot = rig.core.find("c1")
    assert slot is not None
    slot.hold()  # its exit is told once the runtime was asked
    killed = rig.begin(rig.task.kill(task_pb2.KillRequest(id="c1", signal=9), Context()))
    wait_for((rig.path / "asked").exists)
    slot.release()
    (rig.path / "go").touch()
    assert killed.get(timeout=20)[1] is None
    # One that is not seen to die is told of.
    monkeypatch.setattr(control, "FROZEN_DEATH_TIMEOUT", 0.05)
    rig.create("c2")
    rig.start("c2")
    rig.call(rig.task.pause(task_pb2.PauseRequest(id="c2"), Context()))
    slot = rig.core.find("c2")
    assert slot is not None
    slot.hold()
    with pytest.raises(Unknown, match="not running"):
        rig.call(rig.task.kill(task_pb2.KillRequest(id="c2", signal=9), Context()))
    slot.release()


def test_pause_and_resume(rig: Rig) -> None:
    rig.create()
    pause = lambda: rig.call(rig.task.pause(task_pb2.PauseRequest(id="c1"), Context()))  # noqa: E731
    resume = lambda: rig.call(rig.task.resume(task_pb2.ResumeRequest(id="c1"), Context()))  # noqa: E731
    with pytest.raises(FailedPrecondition):
        pause()
    rig.start()
    with pytest.raises(FailedPrecondition):
        resume()
    slot = rig.core.find("c1")
    assert slot is not None
    rig.do("pause", 'fail "no freezer"')
    with pytest.raises(Unknown, match="no freezer"):
        pause()
    assert slot.status == _reaper.RUNNING
    rig.do("pause", "")
    pause()
    assert slot.status == _reaper.PAUSED
    with pytest.raises(FailedPrecondition):
        rig.exec("e1")
    resume()
    assert slot.status == _reaper.RUNNING
    pause()
    slot.hold()  # nothing is frozen here: it dies at once, and one that is told has nothing to be thawed
    rig.kill()  # thaws it, or it would never die
    assert rig.calls()[-2:] == ["pause c1", "resume c1"]
    slot.release()


def test_update_hands_the_resources_to_the_runtime(rig: Rig) -> None:
    rig.create()
    rig.do("update", 'cat > "$here/resources"')
    value = b'{"memory":{"limit":1}}'
    request = task_pb2.UpdateTaskRequest(id="c1", resources=AnyMessage(type_url="x", value=value))
    rig.call(rig.task.update(request, Context()))
    assert (rig.path / "resources").read_bytes() == value


def test_a_signal_takes_no_runtime_call(rig: Rig) -> None:
    rig.create()
    rig.start()
    rig.exec("e")
    rig.start(exec_id="e")
    before = rig.calls()
    rig.kill(exec_id="e")
    rig.told(exec_id="e")
    rig.kill(all=True)
    rig.told()
    assert rig.calls() == before
    rig.delete()


def test_a_signal_that_is_none(rig: Rig) -> None:
    rig.create()
    with pytest.raises(InvalidArgument):
        rig.kill(signum=65)


def test_systemds_socket_is_not_the_containers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/systemd/notify")
    rig = Rig(tmp_path)
    try:
        rig.do("create", 'fail "socket: $NOTIFY_SOCKET"')
        with pytest.raises(Unknown, match=r"socket:$"):
            rig.create()
    finally:
        rig.close()
