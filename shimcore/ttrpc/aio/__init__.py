"""ttrpc for asyncio: the same client and server as shimcore.ttrpc's, with coroutines, on the same compiled framing.

    async with aio.Client("unix:///run/greeter.sock") as client:
        hello = await client.call("greeter.Greeter", "SayHello", Name(name="you"), Greeting, timeout=5)

Nothing else of shimcore imports it. What a coroutine waits for here is asyncio's, never of shimcore.jobs.
"""

from __future__ import annotations

from shimcore.ttrpc.aio.calls import Context
from shimcore.ttrpc.aio.client import Client, Stream
from shimcore.ttrpc.aio.server import Server

__all__ = ["Client", "Context", "Server", "Stream"]
