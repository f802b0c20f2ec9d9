"""A program that uses all that shimcore.ttrpc.aio offers: mypy --strict takes it, and no public name may be left out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

from google.protobuf.descriptor import ServiceDescriptor

from shimcore import errors, ttrpc
from shimcore.protos.task_pb2 import StateRequest, StateResponse
from shimcore.ttrpc.aio import Client, Context, Server, Stream

TASK = "containerd.task.v2.Task"


class Implementation:
    async def state(self, request: StateRequest, context: Context) -> StateResponse:
        context.on_cancel(lambda: None)
        return StateResponse(id=request.id, bundle=context.get("bundle") or f"{context.service}/{context.method}")


def around(request: Any, context: Context, handler: Callable[[Any, Context], Any]) -> Any:
    if context.cancelled or not context.get_all("token"):
        raise errors.Unauthenticated("no token")
    return handler(request, context)


async def serve(service: ServiceDescriptor, path: str) -> dict[str, int]:
    async with Server(max_inflight=8, interceptors=[around]) as server:
        server.register(service, Implementation())
        await server.listen(path)
        await server.shutdown(timeout=1)
        return server.stats()


def with_token(outgoing: ttrpc.Outgoing, proceed: Callable[[ttrpc.Outgoing], Any]) -> Any:
    outgoing.metadata.append(("token", "t"))
    return proceed(outgoing)


async def calls(path: str, service: ServiceDescriptor, ended: Callable[[errors.Closed], None]) -> AsyncIterator[str]:
    async with Client(path, namespace="n", interceptors=[with_token], connect_timeout=1) as client:
        client.on_close(ended)
        yield (await client.call(TASK, "State", StateRequest(id="a"), StateResponse, timeout=1)).id
        raw: bytes = await client.call(TASK, "State", metadata={"k": "v"})
        yield raw.decode() + str(client.peer_credentials()[0] + client.closed)
        both: Stream[StateResponse]
        async with client.stream(TASK, "Echo", None, StateResponse, client_streams=True, server_streams=True) as both:
            await both.send(StateRequest(id="a"))
            await both.close_send()
            first = await both.receive()
            if first is not None:
                yield first.id
            async for one in both:
                yield one.id
            both.cancel()
        task = ttrpc.stub(service, client)
        yield str((await task.state(task.state.request_class(id="a"))).id)
