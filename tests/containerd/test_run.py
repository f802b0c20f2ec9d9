"""Containers from start to end through ctr, by the stock shim and by ours."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.containerd.conftest import TRAPPED, Box
from tests.containerd.daemon import alive, wait_for
from tests.test_oci_checkpoint import usable_criu

pytestmark = pytest.mark.usefixtures("nothing_left")


def test_output_and_exit_code(box: Box) -> None:
    done = box.run(box.name(), "/bin/sh", "-c", "echo out; echo err >&2", flags=("--rm",))
    # A newer ctr has warnings of its own.
    errors = [line for line in done.stderr.splitlines() if not line.startswith("time=")]
    assert (done.stdout, errors) == ("out\n", ["err"])


def test_a_failing_command_gives_its_code(box: Box) -> None:
    done = box.run(box.name(), "/bin/sh", "-c", "echo before; exit 42", flags=("--rm",), check=False)
    assert (done.returncode, done.stdout) == (42, "before\n")


def test_a_command_killed_by_a_signal_gives_128_and_it(box: Box) -> None:
    # Not even SIGKILL from inside ends a pid namespace's init: a child dies, and init passes its code on.
    script = "sh -c 'kill -KILL $$'; exit $?"
    done = box.run(box.name(), "/bin/sh", "-c", script, flags=("--rm",), check=False)
    assert done.returncode == 137


def test_a_missing_command_is_told_clearly(box: Box) -> None:
    name = box.name()
    done = box.run(name, "/no/such/command", flags=("--rm",), check=False)
    assert done.returncode == 1
    assert "OCI runtime create failed" in done.stderr
    assert "/no/such/command" in done.stderr and "no such file" in done.stderr
    # ctr removes the container even so; the shim must have undone the rest.
    wait_for("end of the bundle", lambda: not box.daemon.bundle(name).exists())
    assert box.left() == []


def test_much_output_arrives_whole(box: Box) -> None:
    done = box.run(box.name(), "/bin/sh", "-c", "seq 1 50000", flags=("--rm",))
    assert done.stdout.split() == [str(number) for number in range(1, 50001)]


def test_detached_from_run_to_rm(box: Box) -> None:
    daemon = box.daemon
    with daemon.events() as events:
        name, pid = box.start("/bin/sh", "-c", TRAPPED)
        assert daemon.tasks()[name] == (pid, "RUNNING") and alive(pid)

        done = box.exec(name, "/bin/sh", "-c", "echo inside; exit 3", check=False)
        assert (done.returncode, done.stdout) == (3, "inside\n")

        refused = daemon.ctr("task", "rm", name, check=False)
        assert refused.returncode != 0 and "must be stopped" in refused.stderr
        assert box.status(name) == "RUNNING"

        # Only once sh has set its trap does SIGTERM do anything to a pid namespace's init.
        wait_for("trap", lambda: trapped(pid))
        daemon.ctr("task", "kill", "-s", "SIGTERM", name)
        box.wait_status(name, "STOPPED")
        assert box.rm(name) == 7
        assert name not in daemon.tasks() and not alive(pid)

        events.wait(name, "/tasks/delete")
        wanted = ["create", "start", "exec-added", "exec-started", "exit", "exit", "delete"]
        topics = [topic for topic in events.topics(name) if topic != "/tasks/oom"]
        assert topics[:6] == [f"/tasks/{one}" for one in wanted[:6]]
        exits = [one for one in events.of(name) if one.topic == "/tasks/exit"]
        assert [one.body.get("exit_status") for one in exits] == [3, 7]
        assert exits[0].body["id"] != name and exits[1].body["id"] == name
        assert [one.body["pid"] for one in exits][1] == pid


def test_a_created_task_lists_its_processes(box: Box) -> None:
    name, pid = box.start("/bin/sh", "-c", TRAPPED)
    rows = box.daemon.ctr("task", "ps", name).stdout.splitlines()[1:]
    assert str(pid) in {row.split()[0] for row in rows}
    box.daemon.ctr("task", "kill", "-s", "SIGKILL", name)
    box.wait_status(name, "STOPPED")
    assert box.rm(name) == 137


def test_metrics(box: Box) -> None:
    name, _ = box.start("/bin/sh", "-c", TRAPPED)
    lines = [line.split() for line in box.daemon.ctr("task", "metrics", name).stdout.splitlines()]
    rows = dict(words for words in lines if len(words) == 2)
    assert int(rows.get("cpuacct.usage") or rows["cpu.usage_usec"]) > 0
    assert int(rows.get("memory.usage_in_bytes") or rows["memory.usage"]) > 0
    box.daemon.ctr("task", "kill", "-s", "SIGKILL", name)
    box.wait_status(name, "STOPPED")
    assert box.rm(name) == 137


def test_ten_at_once(box: Box) -> None:
    names = [box.name() for _ in range(10)]

    def one(index: int) -> tuple[int, str]:
        script = f"echo {names[index]}; exit {index}"
        done = box.run(names[index], "/bin/sh", "-c", script, flags=("--rm",), check=False)
        return done.returncode, done.stdout

    with ThreadPoolExecutor(10) as pool:
        results = list(pool.map(one, range(10)))
    assert results == [(index, f"{names[index]}\n") for index in range(10)]


def test_many_execs_in_one_container(box: Box) -> None:
    name, _ = box.start("/bin/sh", "-c", TRAPPED)

    def one(code: int) -> int:
        return box.exec(name, "/bin/sh", "-c", f"exit {code}", check=False).returncode

    with ThreadPoolExecutor(5) as pool:
        assert list(pool.map(one, range(20))) == list(range(20))
    missing = box.exec(name, "/no/such/command", check=False)
    assert missing.returncode == 1 and re.search("no such file", missing.stderr)
    box.daemon.ctr("task", "rm", "-f", name, check=False)
    box.daemon.ctr("container", "rm", name)


def test_a_checkpoint_by_ctr(box: Box) -> None:
    """Of a container with ctr's FIFOs, by each shim; to a name that is not the stock's ctr hands no options on."""
    if reason := usable_criu():
        pytest.skip(reason)
    name = box.name()
    flags = ("-d", "--net-host", "--annotation", "io.shimcore.stdio=copy")  # to stop a network criu needs iptables
    box.run(name, "/bin/sh", "-c", TRAPPED, flags=flags)
    image = box.daemon.ctr("task", "checkpoint", name).stdout.strip()
    assert image in box.daemon.ctr("image", "ls", "-q").stdout.split()
    assert box.status(name) == "RUNNING"
    box.daemon.ctr("image", "rm", image)
    box.daemon.ctr("task", "rm", "-f", name, check=False)
    box.daemon.ctr("container", "rm", name)


def trapped(pid: int) -> bool:
    """Whether the process catches SIGTERM, from proc(5)'s SigCgt."""
    with open(f"/proc/{pid}/status") as file:
        mask = next(line for line in file if line.startswith("SigCgt:"))
    return bool(int(mask.split()[1], 16) >> 14 & 1)
