"""An upgrade in place: the same process goes on with other code, and nobody notices but who asks it for its version."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from shimcore.cli.nodes import NoAnswer
from shimcore.rig import Rig
from tests.authors import Make, author
from tests.upgrades import HANG, Copy, Later, command, copy, exits, parent, rig, told, until, upgrade, words

__all__ = ["author", "copy", "rig"]

COUNT = "i=0; while :; do echo $i; i=$((i+1)); done"


def test_the_same_process_goes_on_with_other_code(rig: Rig, copy: Copy) -> None:
    one = rig.container(["sh", "-c", COUNT])
    one.create()
    one.start()
    other = one.exec(["sh", "-c", "trap 'exit 3' TERM; while :; do sleep 0.01; done"])
    reserved = one.exec(["sh", "-c", "exit 5"], start=False)
    waits = [Later(lambda: one.task.wait(timeout=HANG)), Later(lambda: one.task.wait(other.id, timeout=HANG))]
    before = (one.task.state(), one.task.state(other.id), one.task.state(reserved.id), one.task.connect())
    for_ps, parents = words(one.shim_pid), [parent(pid) for pid in (one.pid, other.pid, one.shim_pid)]
    old = told(one)["shimcore"]
    version = copy.change()
    said = upgrade(one)
    assert (said["pid"], said["from"], said["to"]) == (one.shim_pid, old, version)
    assert told(one)["shimcore"] == version
    # Over the connection that was there before, on which the Waits still stand.
    assert (one.task.state(), one.task.state(other.id), one.task.state(reserved.id), one.task.connect()) == before
    assert words(one.shim_pid) == for_ps
    assert [parent(pid) for pid in (one.pid, other.pid, one.shim_pid)] == parents
    reserved.start()
    assert reserved.wait(timeout=HANG) == 5
    one.task.kill(signal.SIGTERM, exec_id=other.id)
    assert waits[1].get().exit_status == 3
    one.task.kill(signal.SIGKILL)
    assert waits[0].get().exit_status == 137
    one.stdio.drain()
    lines = one.output.split("\n")
    assert lines[:-1] == [str(number) for number in range(len(lines) - 1)] and len(lines) > 100
    rig.events.wait("/tasks/exit", container=one.id, timeout=HANG)
    until("exits", lambda: len(exits(one)) == 3)
    assert exits(one) == [(reserved.id, 5), (other.id, 3), (one.id, 137)]
    one.delete()


BROKEN: dict[str, tuple[str, Callable[[str], str], str]] = {
    "a syntax error": ("serve.py", lambda text: text + "\n)", "unmatched"),
    "an import that raises": ("oci/service.py", lambda text: text + "\nraise RuntimeError('of no use')\n", "of no use"),
    "code that ends": ("serve.py", lambda text: text + "\nimport os\nos._exit(7)\n", "status 7"),
    "code that kills itself": ("serve.py", lambda text: text + "\nimport os\nos.kill(os.getpid(), 9)\n", "status 137"),
    "code that hangs": ("serve.py", lambda text: text + "\nimport time\ntime.sleep(1000)\n", "not ready within 1 s"),
    "another form": ("upgrade.py", lambda text: text.replace("FORMAT = 1 ", "FORMAT = 0  "), "it knows 0"),
    "one that can not read it": ("oci/handover.py", lambda text: text + "\ndef restore(task, state): raise KeyError(3)\n", "3"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_code_that_does_not_start_is_refused(rig: Rig, copy: Copy, what: str) -> None:
    name, how, words_of_it = BROKEN[what]
    one = rig.container(["sh", "-c", "trap 'exit 3' TERM; while :; do sleep 0.01; done"])
    one.create()
    one.start()
    wait = Later(lambda: one.task.wait(timeout=HANG))
    before, old = one.task.state(), told(one)["shimcore"]
    copy.change()
    copy.edit(name, how)
    with pytest.raises(NoAnswer, match=words_of_it):
        upgrade(one, timeout=1.0 if "hangs" in what else HANG)
    assert told(one)["shimcore"] == old
    assert one.task.state() == before
    other = one.exec(["sh", "-c", "exit 4"])
    assert other.wait(timeout=HANG) == 4
    # And when it has been mended, it is taken.
    copy.mend()
    version = copy.change()
    assert upgrade(one)["to"] == version
    one.task.kill(signal.SIGTERM)
    assert wait.get().exit_status == 3
    one.delete()


def test_a_shim_that_can_not_hand_over_says_so(author: Make) -> None:
    shim = author()
    address = shim.start()
    done = command(str(shim.pid(address)))
    assert done.returncode == 1 and "Service has no hand_over() and take_over()" in done.stderr
    assert shim.pid(address)
    shim.stop(address)


def test_one_without_a_container_says_so(rig: Rig, copy: Copy) -> None:
    one = rig.container(["true"])
    with pytest.raises(NoAnswer, match=r"^it has no container yet, or none any more"):
        upgrade(one)
    one.run()
    copy.change()
    upgrade(one)  # a container that has ended, and is still there
    assert one.task.state().exit_status == 0
    one.delete()


DIES = """
import signal, time
for pid in map(int, open("{pids}").read().split()):
    os.kill(pid, signal.SIGKILL)
    while open(f"/proc/{{pid}}/stat").read().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.001)
"""


def test_who_dies_between_old_and_new_is_told(rig: Rig, copy: Copy, tmp_path: Path) -> None:
    one = rig.container(["sleep", "1000"])
    one.create()
    one.start()
    others = [one.exec(["sleep", "1000"]) for _ in range(3)]
    waits = [Later(lambda id=other.id: one.task.wait(id, timeout=HANG)) for other in others]  # type: ignore[misc]
    last = Later(lambda: one.task.wait(timeout=HANG))
    copy.in_the_window(DIES.format(pids=tmp_path / "pids"))
    # The init of a pid namespace is no zombie before the namespace's others have been reaped, which in the window nobody does.
    for dying in ([others[0].pid], [others[1].pid, others[2].pid], [one.pid]):
        (tmp_path / "pids").write_text(" ".join(map(str, dying)))
        copy.change()
        upgrade(one)
    assert {wait.get().exit_status for wait in [*waits, last]} == {137}
    until("exits", lambda: len(exits(one)) == 4)
    assert exits(one)[0] == (others[0].id, 137) and exits(one)[3] == (one.id, 137)
    assert {id for id, _ in exits(one)} == {one.id, *(other.id for other in others)}
    for other in others:
        other.delete()
    assert one.delete().exit_status == 137


def test_new_code_that_is_gone_when_it_is_to_be_run(rig: Rig, copy: Copy) -> None:
    """It was there for the trial: execve itself fails, and the old code goes on."""
    one = rig.container(["sleep", "1000"])
    one.create()
    one.start()
    wait = Later(lambda: one.task.wait(timeout=HANG))
    program = copy.binary.with_name("containerd-shim-other-v1")
    first, rest = copy.text.split("\n", 1)
    program.write_text(f"{first}\nimport os\nos.unlink({str(program)!r})\n{rest}")
    program.chmod(0o755)
    old = told(one)["shimcore"]
    with pytest.raises(NoAnswer, match=r"can't be executed: .*No such file"):
        upgrade(one, to=str(program))
    assert told(one)["shimcore"] == old
    other = one.exec(["sh", "-c", "echo still here; exit 4"])
    assert other.wait(timeout=HANG) == 4
    other.stdio.drain()
    assert other.stdio.output() == b"still here\n"
    version = copy.change()
    assert upgrade(one)["to"] == version
    one.task.kill(signal.SIGKILL)
    assert wait.get().exit_status == 137
    one.delete()
