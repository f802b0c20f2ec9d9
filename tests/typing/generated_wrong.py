"""Each marked line is an error to mypy --strict, of the kind that its mark says, and no other line is."""

# ruff: noqa: B018

from __future__ import annotations

from collections.abc import Iterator

from depot.item_types_pb2 import Id, Item
from depot.store_pb2 import GetItemRequest, PutAllResponse
from depot.store_ttrpc import AsyncStoreBase, AsyncStoreClient, StoreBase, StoreClient
from google.protobuf.empty_pb2 import Empty

from shimcore import Context, ttrpc
from shimcore.ttrpc import aio


class Wrong(StoreBase):
    def get_item(self, request: Item, context: Context) -> Item:  # wrong: override
        return request

    def put_all(self, requests: Iterator[Item], context: Context) -> Iterator[PutAllResponse.Summary]:  # wrong: override
        yield PutAllResponse.Summary()

    def list_ids(self, request: Empty, context: Context) -> Id:  # wrong: override
        return Id()

    def exchange(self, requests: Item, context: Context) -> Iterator[Item]:  # wrong: override
        yield requests

    def import_(self, request: Item) -> Empty:  # wrong: override
        return Empty()


def calls(client: ttrpc.Client) -> None:
    store = StoreClient(client)
    StoreClient("unix:///run/depot.sock")  # wrong: arg-type
    store.get_item(Item())  # wrong: arg-type
    store.get_item(GetItemRequest(), timeout="5")  # wrong: arg-type
    store.GetItem(GetItemRequest())  # wrong: attr-defined
    store.get_item(GetItemRequest()).contents  # wrong: attr-defined
    store.put_all(request=Item())  # wrong: call-arg
    store.put_all().send(Id())  # wrong: arg-type
    store.list_ids(Empty()).send(Empty())  # wrong: attr-defined
    store.exchange().receive().content  # wrong: union-attr
    for summary in store.put_all():
        summary.value  # wrong: attr-defined


class WrongAsynchronous(AsyncStoreBase):
    async def get_item(self, request: GetItemRequest, context: Context) -> Item:  # wrong: override
        return Item()

    async def list_ids(self, request: Empty, context: aio.Context) -> list[Id]:  # wrong: override
        return []


async def asynchronous_calls(client: ttrpc.Client, connected: aio.Client) -> None:
    AsyncStoreClient(client)  # wrong: arg-type
    store = AsyncStoreClient(connected)
    store.get_item(GetItemRequest()).content  # wrong: attr-defined
    (await store.get_item(GetItemRequest())).contents  # wrong: attr-defined
    store.list_ids(Empty()).receive().value  # wrong: attr-defined
    await store.put_all().send(Id())  # wrong: arg-type
    for item in store.exchange():  # wrong: attr-defined
        item
