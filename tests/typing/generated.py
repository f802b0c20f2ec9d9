"""A program over the modules made from tests/protos/depot: mypy --strict takes it, and tests/test_ttrpc_gen.py runs it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

from depot.item_types_pb2 import Id, Item
from depot.store_pb2 import GetItemRequest, PutAllResponse
from depot.store_ttrpc import AsyncStoreBase, AsyncStoreClient, StoreBase, StoreClient
from google.protobuf.empty_pb2 import Empty

from shimcore import Context, inline, ttrpc
from shimcore.errors import NotFound, Unimplemented
from shimcore.ttrpc import aio


class Blocking(StoreBase):
    """Every kind of method; import_ is not written."""

    def __init__(self) -> None:
        self.items: dict[str, Item] = {}

    @inline
    def get_item(self, request: GetItemRequest, context: Context) -> Item:
        item = self.items.get(request.id.value)
        if item is None:
            raise NotFound(f"no item {request.id.value}, {context.get('user')}")
        return item

    def put_all(self, requests: Iterator[Item], context: Context) -> PutAllResponse.Summary:
        summary = PutAllResponse.Summary()
        for item in requests:
            self.items[item.id.value] = item
            summary.count += 1
            summary.bytes += len(item.content)
        return summary

    def list_ids(self, request: Empty, context: Context) -> Iterator[Id]:
        for name in sorted(self.items):
            yield Id(value=name)

    def exchange(self, requests: Iterator[Item], context: Context) -> Iterator[Item]:
        for item in requests:
            before = self.items.get(item.id.value, Item())
            self.items[item.id.value] = item
            yield before


class Coroutines(StoreBase):
    """The same as coroutines of shimcore.jobs, but one that is written the other way: the two may be mixed."""

    def __init__(self) -> None:
        self.blocking = Blocking()

    async def get_item(self, request: GetItemRequest, context: Context) -> Item:
        return self.blocking.get_item(request, context)

    async def put_all(self, requests: AsyncIterator[Item], context: Context) -> PutAllResponse.Summary:
        return self.blocking.put_all(iter([item async for item in requests]), context)

    def list_ids(self, request: Empty, context: Context) -> list[Id]:
        return list(self.blocking.list_ids(request, context))

    async def exchange(self, requests: AsyncIterator[Item], context: Context) -> AsyncIterator[Item]:
        async for item in requests:
            for answer in self.blocking.exchange(iter([item]), context):
                yield answer


def serve(address: str, store: StoreBase) -> ttrpc.Server:
    server = ttrpc.Server()
    server.register(StoreBase.DESCRIPTOR, store)
    server.listen(address)
    server.start()
    return server


def put(store: StoreClient, items: list[Item], timeout: float) -> PutAllResponse.Summary:
    with store.put_all(timeout=timeout) as stream:
        for item in items:
            stream.send(item)
        stream.close_send()
        summary = stream.receive()
    assert summary is not None
    return summary


def names(store: StoreClient, timeout: float) -> list[str]:
    return [id.value for id in store.list_ids(Empty(), timeout=timeout)]


def swap(store: StoreClient, item: Item, timeout: float) -> bytes:
    with store.exchange(timeout=timeout, metadata={"user": "u"}) as stream:
        stream.send(item)
        before: Item | None = stream.receive()
        stream.close_send()
        assert before is not None and stream.receive() is None
        return before.content


def get(client: ttrpc.Client, name: str, timeout: float) -> bytes:
    item = StoreClient(client).get_item(GetItemRequest(id=Id(value=name)), timeout=timeout, metadata=[("user", "u")])
    return item.content


class Asynchronous(AsyncStoreBase):
    """For asyncio; one method blocks, and is run on a thread."""

    def __init__(self) -> None:
        self.items: dict[str, Item] = {}

    async def get_item(self, request: GetItemRequest, context: aio.Context) -> Item:
        return self.items[request.id.value]

    async def put_all(self, requests: AsyncIterator[Item], context: aio.Context) -> PutAllResponse.Summary:
        self.items.update({item.id.value: item async for item in requests})
        return PutAllResponse.Summary(count=len(self.items))

    def list_ids(self, request: Empty, context: aio.Context) -> Iterator[Id]:
        for name in sorted(self.items):
            yield Id(value=name)

    async def exchange(self, requests: AsyncIterator[Item], context: aio.Context) -> AsyncIterator[Item]:
        async for item in requests:
            yield self.items[item.id.value]


async def with_asyncio(address: str, items: list[Item], timeout: float) -> tuple[int, list[str], bytes, bytes, str]:
    """What PutAll, ListIDs, Exchange and GetItem answer, and how Import is refused."""
    async with aio.Server() as server:
        server.register(AsyncStoreBase.DESCRIPTOR, Asynchronous())
        await server.listen(address)
        async with aio.Client(address) as client:
            store = AsyncStoreClient(client)
            async with store.put_all(timeout=timeout) as stream:
                for item in items:
                    await stream.send(item)
                await stream.close_send()
                summary = await stream.receive()
            assert summary is not None
            names = [id.value async for id in store.list_ids(Empty(), timeout=timeout)]
            async with store.exchange(timeout=timeout, metadata={"user": "u"}) as both:
                await both.send(items[0])
                before: Item | None = await both.receive()
            assert before is not None
            got = await store.get_item(GetItemRequest(id=items[0].id), timeout=timeout)
            try:
                await store.import_(items[0], timeout=timeout)
            except Unimplemented as error:
                refused = str(error)
    return summary.count, names, before.content, got.content, refused
