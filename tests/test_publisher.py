"""RemotePublisher against the rig's events endpoint, as it comes, goes and comes back."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shimcore import publisher
from shimcore._reaper import Core
from shimcore.errors import InvalidArgument
from shimcore.protos import events_pb2
from shimcore.publisher import RemotePublisher, new_core, topic_of
from shimcore.rig import DOWN, FROZEN, MUTE, UP, Events

HANG = 60.0  # seconds after which a test that should have ended has hung


@pytest.fixture
def address(session_root: Path) -> Path:
    return session_root / f"ev-{time.monotonic_ns()}.sock"


@pytest.fixture
def remote(address: Path) -> Iterator[RemotePublisher]:
    core = new_core("moby", str(address))
    thread = threading.Thread(target=core.run)
    thread.start()
    yield RemotePublisher(core, "moby")
    core.stop()
    thread.join(HANG)
    assert not thread.is_alive()


def starts(remote: RemotePublisher, *numbers: int, container: str = "c") -> None:
    for number in numbers:
        remote.publish(publisher.TOPIC_START, events_pb2.TaskStart(container_id=container, pid=number))


def pids(events: Events) -> list[int]:
    return [event.message.pid for event in events.all]


# ---- where to ----


def test_a_path_that_is_too_long() -> None:
    with pytest.raises(InvalidArgument, match="TTRPC_ADDRESS is 108 bytes long"):
        new_core("ns", "/" + "x" * 107)
    with pytest.raises(InvalidArgument, match="108 bytes"):
        new_core("ns", "unix:///" + "ü" * 53 + "x")
    assert isinstance(new_core("ns", "/" + "x" * 106), Core)


def test_an_address_with_a_scheme(address: Path) -> None:
    core = new_core("moby", f"unix://{address}")
    thread = threading.Thread(target=core.run)
    thread.start()
    with Events(address) as events:
        starts(RemotePublisher(core, "moby"), 1)
        events.wait(publisher.TOPIC_START, timeout=HANG)
    core.stop()
    thread.join(HANG)


def test_no_socket_yet(remote: RemotePublisher, address: Path) -> None:
    starts(remote, 1, 2)
    assert not remote.flush(0.05)
    assert remote.core.stats()["queued"] == 2
    with Events(address) as events:
        events.wait(publisher.TOPIC_START, count=2, timeout=HANG)
        assert remote.flush(HANG)
        assert pids(events) == [1, 2]


def test_nobody_listens_at_the_socket(remote: RemotePublisher, address: Path) -> None:
    import socket

    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(address))
    starts(remote, 1)
    assert not remote.flush(0.05)
    with Events(address) as events:  # takes its place
        assert remote.flush(HANG)
        assert pids(events) == [1]


def test_no_address_at_all() -> None:
    core = new_core("ns", "")
    remote = RemotePublisher(core, "ns")
    starts(remote, 1)
    assert remote.flush(0)
    assert core.stats()["unsent"] == 1


# ---- what ----


def test_a_fake_server_gets_tasks_oom(remote: RemotePublisher, address: Path) -> None:
    with Events(address) as events:
        before = time.time_ns()
        remote.publish(publisher.TOPIC_OOM, events_pb2.TaskOOM(container_id="test"))
        event = events.wait(timeout=HANG)
        assert (event.topic, event.namespace, event.message) == ("/tasks/oom", "moby", events_pb2.TaskOOM(container_id="test"))
        assert before <= event.sent <= time.time_ns()
        assert remote.flush(HANG)
        assert remote.core.stats()["acknowledged"] == 1


def test_an_event_of_an_authors_own(remote: RemotePublisher, address: Path) -> None:
    from google.protobuf.duration_pb2 import Duration

    with Events(address) as events:
        remote.publish("/mine", Duration(seconds=3), container_id="c")
        assert events.wait("/mine", timeout=HANG).message == Duration(seconds=3)
        remote.core.publish("/mine", "mine.NobodyHasImportedIt", b"x", "c", "")
        message = events.wait("/mine", count=2, timeout=HANG).message
        assert (message.type_url, message.value) == ("mine.NobodyHasImportedIt", b"x")


def test_an_empty_event(remote: RemotePublisher, address: Path) -> None:
    with Events(address) as events:
        remote.publish("/empty", events_pb2.TaskOOM())
        assert events.wait("/empty", timeout=HANG).message == events_pb2.TaskOOM()


def test_what_cannot_be_published(remote: RemotePublisher) -> None:
    with pytest.raises(InvalidArgument, match="topic"):
        remote.publish("", events_pb2.TaskOOM(container_id="c"))
    with pytest.raises(ValueError, match="at most 4194304"):
        remote.publish("/t", events_pb2.TaskOOM(container_id="c" * 4_200_000))
    assert remote.core.stats()["events"] == 0


def test_topics() -> None:
    names = {
        "TaskCreate": "/tasks/create", "TaskStart": "/tasks/start", "TaskOOM": "/tasks/oom", "TaskExit": "/tasks/exit",
        "TaskDelete": "/tasks/delete", "TaskExecAdded": "/tasks/exec-added", "TaskExecStarted": "/tasks/exec-started",
        "TaskPaused": "/tasks/paused", "TaskResumed": "/tasks/resumed", "TaskCheckpointed": "/tasks/checkpointed",
    }  # fmt: skip
    for name, topic in names.items():
        assert topic_of(getattr(events_pb2, name)()) == topic
    from google.protobuf.empty_pb2 import Empty

    assert topic_of(Empty()) == "?"


# ---- in which order ----


def test_order_is_kept(remote: RemotePublisher, address: Path) -> None:
    with Events(address) as events:
        starts(remote, *range(1, 501))
        assert remote.flush(HANG)
        assert pids(events) == list(range(1, 501))


def test_order_is_kept_from_many_threads(remote: RemotePublisher, address: Path) -> None:
    with Events(address) as events:
        threads = [
            threading.Thread(target=starts, args=(remote, *range(1, 101)), kwargs={"container": f"c{n}"}) for n in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert remote.flush(HANG)
        for n in range(8):
            assert [event.message.pid for event in events.of(f"c{n}")] == list(range(1, 101))


# ---- when containerd goes ----


def test_containerd_restarts(remote: RemotePublisher, address: Path) -> None:
    with Events(address) as events:
        starts(remote, 1)
        assert remote.flush(HANG)
        events.set_mode(DOWN)
        starts(remote, 2, 3)
        assert not remote.flush(0.05)
        events.set_mode(UP)
        assert remote.flush(HANG)
        assert pids(events) == [1, 2, 3]
        assert [event.connection for event in events.all] == [1, 2, 2]


def test_containerd_goes_before_it_has_answered(remote: RemotePublisher, address: Path) -> None:
    """What was not acknowledged comes again: an event may come twice, and is never lost or overtaken."""
    with Events(address, mode=MUTE) as events:
        starts(remote, 1, container="a")
        starts(remote, 2, container="b")
        events.wait(count=2, timeout=HANG)
        events.set_mode(DOWN)
        starts(remote, 3, container="a")
        events.set_mode(UP)
        assert remote.flush(HANG)
        assert pids(events) == [1, 2, 1, 2, 3]


def test_containerd_restarts_over_and_over(remote: RemotePublisher, address: Path) -> None:
    with Events(address) as events:
        ended = threading.Event()

        def publish() -> None:
            for number in range(1, 301):
                starts(remote, number, container=f"c{number % 3}")
                if number % 10 == 0:
                    remote.flush(0.002)
            ended.set()

        thread = threading.Thread(target=publish)
        thread.start()
        while not ended.is_set():
            events.restart()
        thread.join()
        assert remote.flush(HANG)
        for container in range(3):
            seen = [event.message.pid for event in events.of(f"c{container}")]
            first = list(dict.fromkeys(seen))  # repetitions aside
            assert first == [number for number in range(1, 301) if number % 3 == container]


def test_a_mute_or_frozen_containerd_blocks_nobody(remote: RemotePublisher, address: Path) -> None:
    with Events(address, mode=MUTE) as events:
        starts(remote, 1)
        events.wait(count=1, timeout=HANG)
        events.set_mode(FROZEN)
        for number in range(2, 102):
            remote.publish("/t", events_pb2.TaskOOM(container_id="x" * 10000 + str(number)))  # more than a socket's buffer
        assert not remote.flush(0.05)
        events.restart()
        assert remote.flush(HANG)
        assert len({str(event.message) for event in events.all}) == 101


def test_a_container_that_is_slow_to_be_taken_holds_no_other_one_up(remote: RemotePublisher, address: Path) -> None:
    with Events(address, mode=MUTE) as events:
        starts(remote, 1, container="a")
        starts(remote, 2, container="b")
        starts(remote, 3, container="c")
        events.wait(count=3, timeout=HANG)  # none of them answered
        starts(remote, 4, container="a")
        assert not remote.flush(0.05)
        assert pids(events) == [1, 2, 3]  # a's second waits for the answer to its first
