"""Each marked line is an error to mypy --strict, of the kind that its mark says, and no other line is."""

# ruff: noqa: B018

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

import shimcore
from shimcore import (
    Config,
    Context,
    Core,
    ExitSignal,
    RemotePublisher,
    Shim,
    Slot,
    StartOpts,
    Task,
    aio,
    in_pool,
    run,
    spawn,
    ttrpc,
)
from shimcore._ttrpc import Server
from shimcore.monitor import monitor_subscribe, wait_pid
from shimcore.protos.task_pb2 import StateRequest, StateResponse


class Wrong(Shim):
    def start_shim(self, opts: StartOpts) -> bytes:  # wrong: override
        return b""

    def delete_shim(self) -> int:  # wrong: override
        return 0

    def create_task_service(self, publisher: RemotePublisher) -> Core:  # wrong: override
        return publisher.core


class WrongTask(Task):
    native = "yes"  # wrong: assignment

    def teardown(self, slot: str) -> None:  # wrong: override
        pass


class WrongAsyncio(aio.Shim):
    async def create_task_service(self, publisher: RemotePublisher) -> Task:  # wrong: override
        return Task()

    def setup(self) -> None:  # wrong: override
        pass


def author(context: Context, core: Core, slot: Slot, exit: ExitSignal, opts: StartOpts) -> Coroutine[Any, Any, int]:
    Config(log_level="debug")  # wrong: call-arg
    shimcore.Skeleton  # wrong: attr-defined
    ttrpc.Caller  # wrong: attr-defined
    spawn(opts.id)  # wrong: arg-type
    spawn(opts, vars=[("KEY", 1)])  # wrong: list-item
    context.get("user").upper()  # wrong: union-attr
    context.remaining + 1  # wrong: operator
    context.deadline  # wrong: attr-defined
    core.find("id").pid  # wrong: union-attr
    slot.pid = 3  # wrong: misc
    slot.kill("SIGKILL")  # wrong: arg-type
    exit.signal(1)  # wrong: call-arg
    wait_pid(1, monitor_subscribe(1))  # wrong: arg-type
    RemotePublisher(core, "ns").publish("/tasks/exit")  # wrong: call-arg
    return in_pool(str)  # wrong: arg-type


def rpc(client: ttrpc.Client, server: ttrpc.Server, core: Core) -> str:
    client.call("s", "M", "request")  # wrong: call-overload
    client.call("s", "M", StateRequest(), StateResponse).ids  # wrong: attr-defined
    client.stream("s", "M", StateRequest(), StateResponse)  # wrong: call-overload
    with client.stream("s", "M", None, StateResponse, client_streams=True, server_streams=True) as stream:
        stream.send(1)  # wrong: arg-type
        stream.receive().id  # wrong: union-attr
    client.start("s", "M", b"", StateResponse).result().bundles  # wrong: attr-defined
    server.register("s", object())  # wrong: arg-type
    ttrpc.Server(interceptors=[len])  # wrong: list-item
    Server(core, max_messages=1)  # wrong: call-arg
    ttrpc.stub(StateRequest.DESCRIPTOR, client)  # wrong: arg-type
    return client.call("s", "M")  # wrong: return-value


def main() -> None:
    run("io.containerd.wrong.v1", Task)  # wrong: arg-type
