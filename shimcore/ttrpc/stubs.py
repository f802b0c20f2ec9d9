"""Calls by the names of a service's rpcs: `stub` for a descriptor, without a generated module, and the types of generated ones.

    store = stub(store_pb2.DESCRIPTOR.services_by_name["Store"], client)
    item = store.get_item(store_pb2.GetItemRequest(id="1"), timeout=5)
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Coroutine, Iterable, Iterator
from typing import Any, Protocol, Self, TypeAlias, TypeVar

from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from shimcore.ttrpc.client import MetadataLike
from shimcore.ttrpc.names import python_name

S_contra = TypeVar("S_contra", contravariant=True)
R_co = TypeVar("R_co", covariant=True)
R = TypeVar("R")

# What a handler returns, written with `def` or with `async def`: one message, or many where the server streams.
Answer: TypeAlias = R | Coroutine[Any, Any, R]
Messages: TypeAlias = Iterable[R] | AsyncIterable[R]


class Requests(Protocol[R_co]):
    """What a handler gets where the client streams; its parameter is an Iterator or, of a coroutine, an AsyncIterator."""

    def __iter__(self) -> Iterator[R_co]: ...
    def __next__(self) -> R_co: ...
    def __aiter__(self) -> AsyncIterator[R_co]: ...
    def __anext__(self) -> Awaitable[R_co]: ...


class ServerStream(Protocol[R_co]):
    """A ttrpc.Stream of a method whose server alone streams."""

    def receive(self) -> R_co | None: ...
    def cancel(self) -> bool: ...
    def __iter__(self) -> Iterator[R_co]: ...
    def __next__(self) -> R_co: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *exc: object) -> None: ...


class ClientStream(ServerStream[R_co], Protocol[S_contra, R_co]):
    """A ttrpc.Stream of a method whose client streams."""

    def send(self, message: S_contra, /) -> None: ...
    def close_send(self) -> None: ...


class AsyncServerStream(Protocol[R_co]):
    """A ttrpc.aio.Stream of a method whose server alone streams."""

    async def receive(self) -> R_co | None: ...
    def cancel(self) -> bool: ...
    def __aiter__(self) -> AsyncIterator[R_co]: ...
    async def __anext__(self) -> R_co: ...
    async def __aenter__(self) -> Self: ...
    async def __aexit__(self, *exc: object) -> None: ...


class AsyncClientStream(AsyncServerStream[R_co], Protocol[S_contra, R_co]):
    """A ttrpc.aio.Stream of a method whose client streams."""

    async def send(self, message: S_contra, /) -> None: ...
    async def close_send(self) -> None: ...


class Caller(Protocol):
    """A ttrpc.Client, or one for asyncio, as far as a stub needs it."""

    @property
    def call(self) -> Any: ...
    @property
    def stream(self) -> Any: ...


class Rpc:
    """One rpc of a stub, to be called with a request (none where the client streams), timeout and metadata: see Client.call and
    Client.stream, which it returns the result of.

    request_class, response_class: of the rpc's messages. Raises TypeError for a request of another class.
    """

    def __init__(self, client: Caller, method: MethodDescriptor) -> None:
        self.name = method.name
        self.service = method.containing_service.full_name
        self.request_class: type[Message] = GetMessageClass(method.input_type)
        self.response_class: type[Message] = GetMessageClass(method.output_type)
        self._client = client
        self._client_streams = method.client_streaming
        self._server_streams = method.server_streaming

    def __repr__(self) -> str:
        return f"<rpc {self.service}/{self.name}>"

    def __call__(self, request: Message | None = None, *, timeout: float | None = None, metadata: MetadataLike = ()) -> Any:
        if self._client_streams:
            if request is not None:
                raise TypeError(f"{self.service}/{self.name}: its client streams: send the request on the stream")
        elif not isinstance(request, self.request_class):
            wanted = self.request_class.DESCRIPTOR.full_name
            raise TypeError(f"{self.service}/{self.name} takes {wanted}, not {type(request).__name__}")
        if not self._client_streams and not self._server_streams:
            return self._client.call(self.service, self.name, request, self.response_class, timeout, metadata)
        return self._client.stream(
            self.service,
            self.name,
            request,
            self.response_class,
            client_streams=self._client_streams,
            server_streams=self._server_streams,
            timeout=timeout,
            metadata=metadata,
        )


class Stub:
    """The rpcs of a service as attributes, named as in Python: `CloseIO` is close_io."""

    def __init__(self, service: ServiceDescriptor, client: Caller) -> None:
        self._service = service.full_name
        for method in service.methods:
            name = python_name(method.name)
            if name in self.__dict__:
                raise ValueError(f"{service.full_name}: two methods would be named {name}")
            self.__dict__[name] = Rpc(client, method)

    def __getattr__(self, name: str) -> Rpc:
        names = ", ".join(sorted(name for name, value in self.__dict__.items() if isinstance(value, Rpc)))
        raise AttributeError(f"{self.__dict__.get('_service')} has no method {name} (of: {names})")

    def __repr__(self) -> str:
        return f"<stub of {self._service}>"


def stub(service: ServiceDescriptor, client: Caller) -> Stub:
    """A method for each rpc of a service. client: a ttrpc.Client, or one of shimcore.ttrpc.aio: what is called returns awaitables
    then."""
    return Stub(service, client)
