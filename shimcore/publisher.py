"""Events for containerd: the topics, and the publisher that a task service is given.

`publish` queues and returns: the core's exit thread sends, in order, over one connection, and keeps an event until containerd
has acknowledged it, however long containerd is away. So there is nothing to retry, and no error to handle, for the caller.
An exit is never published here: the exit table does that alone (core/exits.h).
"""

from __future__ import annotations

from ._reaper import Core
from .errors import InvalidArgument

TYPE_CHECKING = False
if TYPE_CHECKING:
    from google.protobuf.message import Message

TOPIC_CREATE = "/tasks/create"
TOPIC_START = "/tasks/start"
TOPIC_OOM = "/tasks/oom"
TOPIC_EXIT = "/tasks/exit"
TOPIC_DELETE = "/tasks/delete"
TOPIC_EXEC_ADDED = "/tasks/exec-added"
TOPIC_EXEC_STARTED = "/tasks/exec-started"
TOPIC_PAUSED = "/tasks/paused"
TOPIC_RESUMED = "/tasks/resumed"
TOPIC_CHECKPOINTED = "/tasks/checkpointed"
TOPIC_UNKNOWN = "?"

_TOPICS = {
    "containerd.events.TaskCreate": TOPIC_CREATE,
    "containerd.events.TaskStart": TOPIC_START,
    "containerd.events.TaskOOM": TOPIC_OOM,
    "containerd.events.TaskExit": TOPIC_EXIT,
    "containerd.events.TaskDelete": TOPIC_DELETE,
    "containerd.events.TaskExecAdded": TOPIC_EXEC_ADDED,
    "containerd.events.TaskExecStarted": TOPIC_EXEC_STARTED,
    "containerd.events.TaskPaused": TOPIC_PAUSED,
    "containerd.events.TaskResumed": TOPIC_RESUMED,
    "containerd.events.TaskCheckpointed": TOPIC_CHECKPOINTED,
}

# sun_path has 108 bytes, the last of them a NUL (unix(7)).
_PATH_MAX = 107


def topic_of(message: Message) -> str:
    """The topic that containerd expects an event of this type under; "?" for a type it does not know."""
    return _TOPICS.get(message.DESCRIPTOR.full_name, TOPIC_UNKNOWN)


class RemotePublisher:
    """Publishes to the events service of the containerd that started this shim.

    core: the Core whose outbox carries the events; namespace: containerd's namespace, part of every envelope.
    """

    __slots__ = ("core", "namespace")

    def __init__(self, core: Core, namespace: str) -> None:
        self.core = core
        self.namespace = namespace

    def publish(self, topic: str, event: Message, container_id: str = "", exec_id: str = "") -> None:
        """Queue an event. topic: one of TOPIC_*; event: a message of shimcore.protos.events_pb2, or an author's own.

        container_id and exec_id (taken from the event's own fields when empty) say what it is about: events of one exec, and
        those of a whole container against all of its execs', reach containerd's subscribers in the order of these calls.
        Raises InvalidArgument for an empty topic, ValueError for an event over ttrpc's 4 MiB.
        """
        if not topic:
            raise InvalidArgument("topic is empty")
        self.core.publish(
            topic,
            event.DESCRIPTOR.full_name,
            event.SerializeToString(),
            container_id or getattr(event, "container_id", ""),
            exec_id or getattr(event, "exec_id", ""),
        )

    def flush(self, timeout: float) -> bool:
        """Wait until every event has been acknowledged, at most `timeout` seconds; whether that is so."""
        return self.core.drain(timeout)


def new_core(namespace: str, ttrpc_address: str) -> Core:
    """A Core whose events go to TTRPC_ADDRESS (a plain path, or unix://path). Raises InvalidArgument when that is too long."""
    path = ttrpc_address.removeprefix("unix://")
    if len(path.encode()) > _PATH_MAX:
        raise InvalidArgument(f"TTRPC_ADDRESS is {len(path.encode())} bytes long, a socket path has at most {_PATH_MAX}: {path}")
    return Core(namespace, path)
