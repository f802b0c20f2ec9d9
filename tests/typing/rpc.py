"""A program that uses all that shimcore.ttrpc offers: mypy --strict takes it, and no public name may be left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from google.protobuf.descriptor import ServiceDescriptor

from shimcore import Context, errors
from shimcore.protos.task_pb2 import StateRequest, StateResponse
from shimcore.ttrpc import NAMESPACE_KEY, Call, Client, Outgoing, Server, Stream, stub

TASK = "containerd.task.v2.Task"


class Implementation:
    def state(self, request: StateRequest, context: Context) -> StateResponse:
        return StateResponse(id=request.id, bundle=context.get(NAMESPACE_KEY) or "")


def around(request: Any, context: Context, handler: Callable[[Any, Context], Any]) -> Any:
    if not context.get_all("token"):
        raise errors.Unauthenticated("no token")
    return handler(request, context)


def serve(service: ServiceDescriptor, path: str) -> dict[str, int]:
    with Server(max_message=1 << 20, workers=4, interceptors=[around]) as server:
        server.register(service, Implementation())
        server.listen(path)
        server.start()
        server.shutdown(timeout=1)
        return server.stats()


def with_token(outgoing: Outgoing, proceed: Callable[[Outgoing], Any]) -> Any:
    outgoing.metadata.append(("token", "t"))
    outgoing.timeout = outgoing.timeout or 5
    return proceed(outgoing)


def calls(path: str, ended: Callable[[errors.Closed], None]) -> Iterator[str]:
    with Client(path, namespace="n", metadata={"k": "v"}, interceptors=[with_token], reconnect=True, connect_timeout=1) as client:
        client.on_close(ended)
        yield client.call(TASK, "State", StateRequest(id="a"), StateResponse, timeout=1, metadata=[("k", "w")]).id
        raw: bytes = client.call(TASK, "State", StateRequest(id="a").SerializeToString())
        call: Call[StateResponse] = client.start(TASK, "State", StateRequest(id="a"), StateResponse)
        if not call.done():
            call.cancel()
        yield call.result().bundle + raw.decode() + str(client.peer_credentials()[0] + client.closed)


def streams(client: Client) -> Iterator[str]:
    both: Stream[StateResponse]
    with client.stream(TASK, "Echo", None, StateResponse, client_streams=True, server_streams=True, timeout=1) as both:
        both.send(StateRequest(id="a"))
        both.send(b"")
        both.close_send()
        first = both.receive()
        if first is not None:
            yield first.id
        for one in both:
            yield one.id
        both.cancel()
    for raw in client.stream(TASK, "List", b"", client_streams=False, server_streams=True):
        yield raw.decode()


def dynamic(service: ServiceDescriptor, client: Client) -> str:
    task = stub(service, client)
    answer = task.state(task.state.request_class(id="a"), timeout=1, metadata={"k": "v"})
    return str(answer.id)
