"""monitor.py: topics in order, early exits, waiting, and bounds."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator

import pytest

from shimcore import monitor as m
from shimcore.errors import Canceled, DeadlineExceeded, InvalidArgument

Pid, Exec = m.Subject.Pid, m.Subject.Exec


def taken(subscription: m.Subscription) -> list[m.ExitEvent]:
    """What is in it now."""
    events = []
    try:
        while True:
            events.append(subscription.get(0))
    except DeadlineExceeded:
        return events


def test_topics_in_order() -> None:
    monitor = m.Monitor()
    by_pid, by_exec, all_ = (monitor.subscribe(t) for t in (m.Topic.PID, m.Topic.EXEC, m.Topic.ALL))
    again = monitor.subscribe(m.Topic.PID)
    monitor.notify_by_pid(13, 128)
    monitor.notify_by_exec("container", "exec", 139)
    monitor.notify_by_pid(14, 0)
    pids = [m.ExitEvent(Pid(13), 128), m.ExitEvent(Pid(14), 0)]
    execs = [m.ExitEvent(Exec("container", "exec"), 139)]
    assert taken(by_pid) == taken(again) == pids
    assert taken(by_exec) == execs
    assert taken(all_) == [pids[0], execs[0], pids[1]]


def test_a_topics_own_subscribers_hear_before_those_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    put = m._Subscriber.put
    monkeypatch.setattr(m._Subscriber, "put", lambda self, event: (order.append(self.topic), put(self, event)))
    monitor = m.Monitor()
    keep = [monitor.subscribe(t) for t in (m.Topic.ALL, m.Topic.EXEC, m.Topic.PID, m.Topic.ALL)]
    monitor.notify_by_pid(1, 0)
    monitor.notify_by_exec("c", "e", 0)
    assert order == ["pid", "all", "all", "exec", "all", "all"] and keep


def test_unsubscribed_hears_no_more() -> None:
    monitor = m.Monitor()
    subscription = monitor.subscribe(m.Topic.ALL)
    monitor.notify_by_pid(1, 0)
    monitor.unsubscribe(subscription.id)
    monitor.unsubscribe(subscription.id)
    monitor.notify_by_pid(2, 0)
    assert list(subscription) == [m.ExitEvent(Pid(1), 0)]
    for _ in range(2):
        with pytest.raises(Canceled):
            subscription.get()


def test_no_such_topic() -> None:
    with pytest.raises(InvalidArgument):
        m.Monitor().subscribe("pids")


def test_subjects_compare_by_value() -> None:
    assert Pid(1) == Pid(1) != Pid(2) and Exec("a", "b") == Exec("a", "b") != Exec("a", "c")
    assert len({Pid(1), Pid(1), Exec("a", "b"), Exec("a", "b")}) == 2
    assert m.ExitEvent(Pid(1), 0) != m.ExitEvent(Pid(1), 1) != Pid(1)
    assert repr(m.ExitEvent(Exec("a", "b"), 3)) == "ExitEvent(Exec('a', 'b'), 3)" and repr(Pid(4)) == "Pid(4)"


# --- the end of a subscription


def test_close_wakes_all_who_wait() -> None:
    subscription = m.Monitor().subscribe(m.Topic.ALL)
    errors: list[Exception] = []

    def wait() -> None:
        try:
            subscription.get()
        except Canceled as error:
            errors.append(error)

    threads = [threading.Thread(target=wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    subscription.close()
    for thread in threads:
        thread.join(10)
    assert len(errors) == 3


def test_context_manager_and_garbage() -> None:
    monitor = m.Monitor()
    with monitor.subscribe(m.Topic.ALL):
        assert len(monitor._subscribers) == 1
    assert len(monitor._subscribers) == 0
    forgotten = monitor.subscribe(m.Topic.ALL)
    del forgotten
    gc.collect()
    monitor.notify_by_pid(1, 0)
    assert len(monitor._subscribers) == 0


def test_garbage_collected_under_the_monitors_own_lock() -> None:
    """The collector runs wherever something is allocated: also where the lock is held."""
    monitor = m.Monitor()
    subscription = monitor.subscribe(m.Topic.ALL)
    with monitor._lock:
        del subscription
        gc.collect()
    monitor.notify_by_pid(1, 0)
    assert not monitor._subscribers


# --- waiting


def test_wait_pid_passes_over_the_others() -> None:
    monitor = m.Monitor()
    subscription = monitor.subscribe(m.Topic.ALL)
    monitor.notify_by_pid(7, 1)
    monitor.notify_by_exec("c", "8", 2)
    thread = threading.Thread(target=monitor.notify_by_pid, args=(8, 137))
    thread.start()
    assert m.wait_pid(8, subscription, timeout=10) == 137
    thread.join()


def test_wait_pid_times_out_over_all() -> None:
    monitor = m.Monitor()
    subscription = monitor.subscribe(m.Topic.PID)
    stop = threading.Event()

    def others() -> None:
        while not stop.wait(0.01):
            monitor.notify_by_pid(1, 0)

    thread = threading.Thread(target=others)
    thread.start()
    begun = time.monotonic()
    try:
        with pytest.raises(DeadlineExceeded):
            m.wait_pid(2, subscription, timeout=0.1)
    finally:
        stop.set()
        thread.join()
    assert 0.09 < time.monotonic() - begun < 5


def test_wait_pid_on_a_closed_subscription() -> None:
    subscription = m.Monitor().subscribe(m.Topic.PID)
    subscription.close()
    with pytest.raises(Canceled):
        m.wait_pid(1, subscription)


# --- early exits


def test_an_exit_before_the_subscription_is_not_lost() -> None:
    monitor = m.Monitor()
    with monitor.starting():
        monitor.notify_by_pid(5, 3)
        monitor.notify_by_exec("c", "e", 4)
        subscription = monitor.subscribe(m.Topic.PID)
        monitor.notify_by_pid(6, 0)
    assert taken(subscription) == [m.ExitEvent(Pid(5), 3), m.ExitEvent(Pid(6), 0)]


def test_without_a_start_nothing_is_kept() -> None:
    monitor = m.Monitor()
    monitor.notify_by_pid(5, 3)
    assert taken(monitor.subscribe(m.Topic.ALL)) == []
    with monitor.starting():
        assert taken(monitor.subscribe(m.Topic.ALL)) == []


def test_kept_exits_go_with_the_last_start() -> None:
    monitor = m.Monitor()
    outer, inner = monitor.starting(), monitor.starting()
    with outer:
        with inner:
            monitor.notify_by_pid(5, 3)
        assert len(taken(monitor.subscribe(m.Topic.ALL))) == 1
        inner.__exit__()  # a second end is none
        monitor.notify_by_pid(6, 3)
        assert len(taken(monitor.subscribe(m.Topic.ALL))) == 2
    assert taken(monitor.subscribe(m.Topic.ALL)) == [] and monitor._early == []


def test_a_failed_start_ends_too() -> None:
    monitor = m.Monitor()
    with pytest.raises(RuntimeError), monitor.starting():
        raise RuntimeError
    monitor.notify_by_pid(1, 0)
    assert monitor._early == []


# --- bounds


def test_early_exits_are_bounded() -> None:
    monitor = m.Monitor(max_early=10)
    with monitor.starting():
        for pid in range(1, 16):
            monitor.notify_by_pid(pid, 0)
        assert len(taken(monitor.subscribe(m.Topic.ALL))) == 10
    assert monitor.early_dropped == 5


def test_a_stalled_subscriber_is_bounded_and_harms_nobody() -> None:
    monitor = m.Monitor()
    stalled, other = monitor.subscribe(m.Topic.ALL, limit=10), monitor.subscribe(m.Topic.ALL)
    for pid in range(1, 16):
        monitor.notify_by_pid(pid, 0)
    assert (stalled.dropped, other.dropped) == (5, 0)
    assert len(taken(stalled)) == 10 and len(taken(other)) == 15
    monitor.notify_by_pid(16, 0)
    assert taken(stalled) == [m.ExitEvent(Pid(16), 0)]


def test_many_threads_and_subscribers_lose_nothing_and_agree_on_the_order() -> None:
    monitor = m.Monitor()
    subscribers = [monitor.subscribe(m.Topic.PID) for _ in range(4)]

    def notify(base: int) -> None:
        for index in range(1000):
            monitor.notify_by_pid(base + index, index % 256)

    threads = [threading.Thread(target=notify, args=(base,)) for base in (10_000, 20_000, 30_000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seen = [taken(s) for s in subscribers]
    assert len(seen[0]) == 3000 == len(set(seen[0]))
    assert all(events == seen[0] for events in seen)


# --- the default monitor


@pytest.fixture
def fresh() -> Iterator[m.Monitor]:
    monitor = m.Monitor()
    before = m.set_default(monitor)
    yield monitor
    assert m.set_default(before) is monitor


def test_module_functions_use_the_default_which_can_be_replaced(fresh: m.Monitor) -> None:
    assert m.get_default() is fresh
    subscription = m.monitor_subscribe(m.Topic.ALL)
    m.monitor_notify_by_pid(1, 2)
    m.monitor_notify_by_exec("c", "e", 3)
    assert [e.exit_code for e in taken(subscription)] == [2, 3]
    m.monitor_unsubscribe(subscription)
    assert subscription.closed and not fresh._subscribers
