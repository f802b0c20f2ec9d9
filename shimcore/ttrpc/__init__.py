"""ttrpc for any program: a client and a server, for every kind of method (docs/ttrpc.md).

    from shimcore import ttrpc

shimcore.ttrpc.aio is the same for asyncio.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shimcore.ttrpc.calls import Call, Stream
from shimcore.ttrpc.client import NAMESPACE_KEY, Client, Outgoing

if TYPE_CHECKING:
    from shimcore.ttrpc.server import Server
    from shimcore.ttrpc.stubs import stub
else:

    def __getattr__(name: str) -> object:
        # They need protobuf's descriptors, 30 ms that a client of bytes does not.
        if name == "Server":
            from shimcore.ttrpc import server

            return server.Server
        if name == "stub":
            from shimcore.ttrpc import stubs

            return stubs.stub
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["NAMESPACE_KEY", "Call", "Client", "Outgoing", "Server", "Stream", "stub"]
