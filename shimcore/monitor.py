"""Exits of processes, told to whoever has subscribed: the seed's monitor.

It observes and decides nothing: TaskExit and the answers to Wait are the exit table's, which tells the
monitor afterwards. Events of a pid go to the subscribers of Topic.PID, then to those of Topic.ALL; those of
an exec to Topic.EXEC, then Topic.ALL; each subscriber sees all its events in the order of the notifications.

The seed forgets an exit that nobody had subscribed for, so who starts a process first and subscribes then can
wait for ever. Here exits are kept while a start is in flight (`with monitor.starting()`) and given to those
who subscribe meanwhile; they are dropped when the last start has ended, since a cache of strangers' exits
that lives on is a leak, and pids come again. Both bounds are counted when they bite: `early_dropped` of the
monitor, `dropped` of a subscription.

Any thread may call anything here. The lock is held for no more than queue operations, which never block.
"""

from __future__ import annotations

from _queue import Empty, SimpleQueue
from _thread import allocate_lock

from .errors import Canceled, DeadlineExceeded, InvalidArgument

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_EARLY = 16384
MAX_QUEUED = 131072


class Topic:
    """What a subscriber wants to hear of: exits of pids, of execs, or all."""

    PID = "pid"
    EXEC = "exec"
    ALL = "all"


class Subject:
    """Whose exit it was: Subject.Pid(pid) or Subject.Exec(container_id, exec_id). Compared by value."""

    __slots__ = ("container_id", "exec_id", "pid")

    def __init__(self, pid: int, container_id: str, exec_id: str) -> None:
        self.pid = pid
        self.container_id = container_id
        self.exec_id = exec_id

    @staticmethod
    def Pid(pid: int) -> Subject:
        """The exit of a pid (> 0)."""
        return Subject(pid, "", "")

    @staticmethod
    def Exec(container_id: str, exec_id: str) -> Subject:
        """The exit of a container's exec, whatever its pid."""
        return Subject(0, container_id, exec_id)

    @property
    def topic(self) -> str:
        return Topic.PID if self.pid else Topic.EXEC

    def _key(self) -> tuple[int, str, str]:
        return self.pid, self.container_id, self.exec_id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Subject) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        return f"Pid({self.pid})" if self.pid else f"Exec({self.container_id!r}, {self.exec_id!r})"


class ExitEvent:
    """One exit. exit_code: 0-255, 128 + signal for a process that a signal ended."""

    __slots__ = ("exit_code", "subject")

    def __init__(self, subject: Subject, exit_code: int) -> None:
        self.subject = subject
        self.exit_code = exit_code

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ExitEvent):
            return False
        return self.subject == other.subject and self.exit_code == other.exit_code

    def __hash__(self) -> int:
        return hash((self.subject, self.exit_code))

    def __repr__(self) -> str:
        return f"ExitEvent({self.subject!r}, {self.exit_code})"


class _Subscriber:
    """The monitor's half of a subscription; it does not hold the other, so that one forgotten by its owner
    can go.
    """

    __slots__ = ("dropped", "limit", "queue", "topic")

    def __init__(self, topic: str, limit: int) -> None:
        self.topic = topic
        self.limit = limit
        self.dropped = 0
        # None ends the stream.
        self.queue: SimpleQueue[ExitEvent | None] = SimpleQueue()

    def put(self, event: ExitEvent) -> None:
        if self.queue.qsize() < self.limit:
            self.queue.put(event)
        else:
            self.dropped += 1


class Subscription:
    """A subscriber's end. Ends by close(), as a context manager, or by being garbage."""

    __slots__ = ("_monitor", "_subscriber", "closed", "id")

    def __init__(self, monitor: Monitor, id: int, subscriber: _Subscriber) -> None:
        self.id = id
        self.closed = False
        self._monitor = monitor
        self._subscriber = subscriber

    @property
    def dropped(self) -> int:
        """Events lost because this subscriber did not take them."""
        return self._subscriber.dropped

    def get(self, timeout: float | None = None) -> ExitEvent:
        """The next event. timeout: seconds, None for ever.

        Raises DeadlineExceeded when none came, Canceled when the subscription was closed and what came before
        is taken.
        """
        queue = self._subscriber.queue
        try:
            event = queue.get(True, None if timeout is None else max(timeout, 0))
        except Empty:
            raise DeadlineExceeded(f"no exit within {timeout} s") from None
        if event is None:
            queue.put(None)  # for the next caller, or one that waits beside us
            raise Canceled("subscription closed")
        return event

    def __iter__(self) -> Iterator[ExitEvent]:
        """Events until the subscription is closed."""
        while True:
            try:
                event = self.get()
            except Canceled:
                return
            yield event

    def close(self) -> None:
        """Unsubscribe; whoever waits in get() is woken. Any number of times."""
        if not self.closed:
            self.closed = True
            self._monitor.unsubscribe(self.id)

    def __enter__(self) -> Subscription:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        # The collector may run this on a thread that holds the monitor's lock; SimpleQueue's put is made for
        # that.
        if not self.closed:
            self._monitor._abandoned.put(self.id)


class Starting:
    """A start in flight, from Monitor.starting(): exits are kept until it ends. Use it in a with statement.
    """

    __slots__ = ("_entered", "_monitor")

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._entered = False

    def __enter__(self) -> Starting:
        if not self._entered:
            self._entered = True
            self._monitor._begin()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._entered:
            self._entered = False
            self._monitor._end()


class Monitor:
    """Subscribers and, while a start is in flight, the exits that came early."""

    def __init__(self, max_early: int = MAX_EARLY) -> None:
        self._lock = allocate_lock()
        self._next_id = 0
        self._subscribers: dict[int, _Subscriber] = {}
        self._abandoned: SimpleQueue[int] = SimpleQueue()
        self._starting = 0
        self._early: list[ExitEvent] = []
        self._max_early = max_early
        self.early_dropped = 0

    def subscribe(self, topic: str, limit: int = MAX_QUEUED) -> Subscription:
        """A subscription to a Topic; while a start is in flight it begins with the exits kept so far.

        limit: events that may wait in it; later ones are dropped and counted. Raises InvalidArgument for no
        topic.
        """
        if topic not in (Topic.PID, Topic.EXEC, Topic.ALL):
            raise InvalidArgument(f"no such topic: {topic!r}")
        subscriber = _Subscriber(topic, limit)
        with self._lock:
            self._sweep()
            id = self._next_id
            self._next_id += 1
            self._subscribers[id] = subscriber
            for event in self._early:
                if topic in (event.subject.topic, Topic.ALL):
                    subscriber.put(event)
        return Subscription(self, id, subscriber)

    def unsubscribe(self, id: int) -> None:
        """End a subscription by its id; nothing happens when there is none."""
        with self._lock:
            subscriber = self._subscribers.pop(id, None)
        if subscriber is not None:
            subscriber.queue.put(None)

    def notify_by_pid(self, pid: int, exit_code: int) -> None:
        """A process has exited."""
        self._notify(ExitEvent(Subject.Pid(pid), exit_code))

    def notify_by_exec(self, container_id: str, exec_id: str, exit_code: int) -> None:
        """A container's exec has exited."""
        self._notify(ExitEvent(Subject.Exec(container_id, exec_id), exit_code))

    def starting(self) -> Starting:
        """Enter before a process is made, leave when its pid is known and subscribed for."""
        return Starting(self)

    def _notify(self, event: ExitEvent) -> None:
        topic = event.subject.topic
        with self._lock:
            self._sweep()
            if self._starting:
                if len(self._early) < self._max_early:
                    self._early.append(event)
                else:
                    self.early_dropped += 1
            for wanted in (topic, Topic.ALL):
                for subscriber in self._subscribers.values():
                    if subscriber.topic == wanted:
                        subscriber.put(event)

    def _sweep(self) -> None:
        while self._abandoned.qsize():
            self._subscribers.pop(self._abandoned.get(), None)

    def _begin(self) -> None:
        with self._lock:
            self._starting += 1

    def _end(self) -> None:
        with self._lock:
            self._starting -= 1
            if not self._starting:
                self._early = []


def wait_pid(pid: int, subscription: Subscription, timeout: float | None = None) -> int:
    """The exit code of a pid, from a subscription to Topic.PID or Topic.ALL that began before the process, or
    in its start.

    Events of others are taken off the subscription and dropped, so it should be the caller's own. timeout:
    seconds over all, None for ever. Raises DeadlineExceeded, and Canceled when the subscription is closed
    meanwhile.
    """
    from time import monotonic

    deadline = None if timeout is None else monotonic() + timeout
    wanted = Subject.Pid(pid)
    while True:
        event = subscription.get(None if deadline is None else deadline - monotonic())
        if event.subject == wanted:
            return event.exit_code


_default = Monitor()


def get_default() -> Monitor:
    """The monitor behind this module's functions: one per process, as the seed's."""
    return _default


def set_default(monitor: Monitor) -> Monitor:
    """Put another monitor behind this module's functions; returns the one before."""
    global _default
    previous, _default = _default, monitor
    return previous


def monitor_subscribe(topic: str) -> Subscription:
    """Monitor.subscribe on the default monitor."""
    return _default.subscribe(topic)


def monitor_unsubscribe(subscription: Subscription) -> None:
    """Close a subscription, whichever monitor it is of."""
    subscription.close()


def monitor_notify_by_pid(pid: int, exit_code: int) -> None:
    """Monitor.notify_by_pid on the default monitor."""
    _default.notify_by_pid(pid, exit_code)


def monitor_notify_by_exec(container_id: str, exec_id: str, exit_code: int) -> None:
    """Monitor.notify_by_exec on the default monitor."""
    _default.notify_by_exec(container_id, exec_id, exit_code)
