"""The command `shimcore` beside a real containerd: it sees what ctr does, and takes nothing away from it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

from tests.containerd.conftest import TRAPPED, Box

pytestmark = pytest.mark.usefixtures("nothing_left")

CLI = [sys.executable, "-m", "shimcore.cli"]
LIFE = ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"]


def test_events_are_those_that_containerd_gets(box: Box) -> None:
    """red: a watch that looks once a second alone: the second container is not seen"""
    if not box.ours:
        pytest.skip("the stock shim has no debug socket")
    name, _ = box.start("/bin/sh", "-c", TRAPPED)
    command = [*CLI, "events", "--json", "--past", "--namespace", box.daemon.namespace]
    with box.daemon.events() as events, subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        try:
            # Once the first one's past has come, those that start are watched for.
            told = [json.loads(child.stdout.readline()) for _ in range(2)]
            assert [(one["container"], one["topic"]) for one in told] == [(name, topic) for topic in LIFE[:2]]
            short = box.name()
            assert box.run(short, "/bin/sh", "-c", "exit 3", flags=("--rm",), check=False).returncode == 3
            told = [json.loads(child.stdout.readline()) for _ in LIFE]
        finally:
            child.send_signal(signal.SIGINT)
        assert child.wait() == 0
        assert [(one["container"], one["topic"], one["namespace"]) for one in told] == [
            (short, topic, box.daemon.namespace) for topic in LIFE
        ]
        events.wait(short, LIFE[-1])
        assert [topic for topic in events.topics(short) if topic in LIFE] == LIFE
    box.daemon.ctr("task", "kill", "-s", "SIGKILL", name)
    box.wait_status(name, "STOPPED")
    box.rm(name)


def test_stats_and_ps_of_either_shim(box: Box) -> None:
    name, _ = box.start("/bin/sh", "-c", TRAPPED)
    shim = box.daemon.shim_pid(name)
    space = ["--namespace", box.daemon.namespace]
    told = json.loads(subprocess.run([*CLI, "ps", "--json", *space], check=True, capture_output=True, text=True).stdout)
    assert [(one["pid"], one["id"]) for one in told] == [(shim, name)]
    command = [*CLI, "stats", "--once", "-n", "0.1", "--json", *space]
    (usage,) = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert (usage["container"], usage["shim_pid"], usage["error"]) == (name, shim, "")
    assert usage["memory"] > 0 and usage["pids"] >= 1
    box.daemon.ctr("task", "kill", "-s", "SIGKILL", name)
    box.wait_status(name, "STOPPED")
    box.rm(name)
