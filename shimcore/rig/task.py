"""The Task API of one shim, typed: v2 and v3 differ in the service's name alone, so one class drives both."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from shimcore.protos import anys, task_pb2, types_pb2
from shimcore.protos.runc_options_pb2 import ProcessDetails
from shimcore.ttrpc import Client

PROCESS_URL = "types.containerd.io/opencontainers/runtime-spec/1/Process"
RESOURCES_URL = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources"

M = TypeVar("M", bound=Message)


def pack(message: Message | None) -> AnyMessage | None:
    """The message in an Any with containerd's bare type URL; None and an Any as they are."""
    if message is None or isinstance(message, AnyMessage):
        return message
    return anys.pack(AnyMessage(), message)


def pack_json(url: str, value: Mapping[str, Any]) -> AnyMessage:
    """A type of the runtime spec in an Any."""
    return AnyMessage(type_url=url, value=json.dumps(value).encode())


class Task:
    """Calls for one container over one connection. Every call has a deadline, `timeout`, in seconds.

    All raise the errors of shimcore.errors: what the shim answered, DeadlineExceeded, or Closed.
    An empty exec_id means the container's init.
    """

    def __init__(self, client: Client, id: str, *, version: int = 2, timeout: float | None = 10.0) -> None:
        """version: 2 or 3, of the Task service."""
        self.client = client
        self.id = id
        self.service = f"containerd.task.v{version}.Task"
        self.timeout = timeout

    def call(self, method: str, request: Message, answer: type[M], timeout: float | None = None) -> M:
        """Any method of the service. timeout: seconds, math.inf for ever; that of the constructor when
        None."""
        limit = self.timeout if timeout is None else timeout
        return self.client.call(self.service, method, request, answer, timeout=limit)

    def create(
        self,
        bundle: str,
        *,
        rootfs: Sequence[types_pb2.Mount] = (),
        terminal: bool = False,
        stdin: str = "",
        stdout: str = "",
        stderr: str = "",
        options: Message | None = None,
        timeout: float | None = None,
    ) -> int:
        """Create; returns init's pid. rootfs: what the shim is to mount at bundle/rootfs. options: the
        runtime's.
        """
        request = task_pb2.CreateTaskRequest(
            id=self.id,
            bundle=bundle,
            rootfs=rootfs,
            terminal=terminal,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            options=pack(options),
        )
        return self.call("Create", request, task_pb2.CreateTaskResponse, timeout).pid

    def start(self, exec_id: str = "", *, timeout: float | None = None) -> int:
        """Start; returns the pid."""
        request = task_pb2.StartRequest(id=self.id, exec_id=exec_id)
        return self.call("Start", request, task_pb2.StartResponse, timeout).pid

    def state(self, exec_id: str = "", *, timeout: float | None = None) -> task_pb2.StateResponse:
        """State."""
        request = task_pb2.StateRequest(id=self.id, exec_id=exec_id)
        return self.call("State", request, task_pb2.StateResponse, timeout)

    def wait(self, exec_id: str = "", *, timeout: float | None = None) -> task_pb2.WaitResponse:
        """Wait: answers when the process has exited, at once if it has already."""
        request = task_pb2.WaitRequest(id=self.id, exec_id=exec_id)
        return self.call("Wait", request, task_pb2.WaitResponse, timeout)

    def delete(self, exec_id: str = "", *, timeout: float | None = None) -> task_pb2.DeleteResponse:
        """Delete."""
        request = task_pb2.DeleteRequest(id=self.id, exec_id=exec_id)
        return self.call("Delete", request, task_pb2.DeleteResponse, timeout)

    def kill(self, signal: int = 9, exec_id: str = "", *, all: bool = False, timeout: float | None = None) -> None:
        """Kill; `all` means every process of the container."""
        request = task_pb2.KillRequest(id=self.id, exec_id=exec_id, signal=signal, all=all)
        self.call("Kill", request, Empty, timeout)

    def exec(
        self,
        exec_id: str,
        process: Mapping[str, Any],
        *,
        terminal: bool = False,
        stdin: str = "",
        stdout: str = "",
        stderr: str = "",
        timeout: float | None = None,
    ) -> None:
        """Exec: adds a process, which Start starts. process: a Process of the runtime spec
        (bundle.process).
        """
        request = task_pb2.ExecProcessRequest(
            id=self.id,
            exec_id=exec_id,
            terminal=terminal,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            spec=pack_json(PROCESS_URL, process),
        )
        self.call("Exec", request, Empty, timeout)

    def pids(self, *, timeout: float | None = None) -> dict[int, str]:
        """Pids: pid → exec id, "" for init and for what the container started itself."""
        answer = self.call("Pids", task_pb2.PidsRequest(id=self.id), task_pb2.PidsResponse, timeout)
        # ProcessDetails has the same one field in both packages that shims take it from.
        return {info.pid: ProcessDetails.FromString(info.info.value).exec_id for info in answer.processes}

    def pause(self, *, timeout: float | None = None) -> None:
        """Pause."""
        self.call("Pause", task_pb2.PauseRequest(id=self.id), Empty, timeout)

    def resume(self, *, timeout: float | None = None) -> None:
        """Resume."""
        self.call("Resume", task_pb2.ResumeRequest(id=self.id), Empty, timeout)

    def checkpoint(self, path: str, options: Message | None = None, *, timeout: float | None = None) -> None:
        """Checkpoint into `path`."""
        request = task_pb2.CheckpointTaskRequest(id=self.id, path=path, options=pack(options))
        self.call("Checkpoint", request, Empty, timeout)

    def update(self, resources: Mapping[str, Any], *, timeout: float | None = None) -> None:
        """Update; resources: LinuxResources of the runtime spec."""
        request = task_pb2.UpdateTaskRequest(id=self.id, resources=pack_json(RESOURCES_URL, resources))
        self.call("Update", request, Empty, timeout)

    def resize_pty(self, width: int, height: int, exec_id: str = "", *, timeout: float | None = None) -> None:
        """ResizePty, in characters."""
        request = task_pb2.ResizePtyRequest(id=self.id, exec_id=exec_id, width=width, height=height)
        self.call("ResizePty", request, Empty, timeout)

    def close_io(self, exec_id: str = "", *, timeout: float | None = None) -> None:
        """CloseIO of stdin."""
        request = task_pb2.CloseIORequest(id=self.id, exec_id=exec_id, stdin=True)
        self.call("CloseIO", request, Empty, timeout)

    def stats(self, *, timeout: float | None = None) -> AnyMessage:
        """Stats: an Any of io.containerd.cgroups.v1.Metrics or v2.Metrics."""
        return self.call("Stats", task_pb2.StatsRequest(id=self.id), task_pb2.StatsResponse, timeout).stats

    def connect(self, *, timeout: float | None = None) -> task_pb2.ConnectResponse:
        """Connect: the shim's own pid, init's, and the shim's version."""
        return self.call("Connect", task_pb2.ConnectRequest(id=self.id), task_pb2.ConnectResponse, timeout)

    def shutdown(self, now: bool = False, *, timeout: float | None = None) -> None:
        """Shutdown. A shim may end before its answer is out: Closed is raised then."""
        self.call("Shutdown", task_pb2.ShutdownRequest(id=self.id, now=now), Empty, timeout)
