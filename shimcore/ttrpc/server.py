"""A ttrpc server for any program, on the same compiled core as a shim's own.

    class Greeter:
        def say_hello(self, request, context):
            return HelloReply(text=f"hello {request.name}")

    with ttrpc.Server() as server:
        server.register(greeter_pb2.DESCRIPTOR.services_by_name["Greeter"], Greeter())
        server.listen("unix:///run/greeter.sock")
        server.serve()
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any, Self

from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass

from shimcore import _ttrpc
from shimcore._reaper import Core
from shimcore.address import remove_socket, start_listener
from shimcore.task import kind_of
from shimcore.ttrpc.codec import MESSAGE_MAX
from shimcore.ttrpc.names import handlers

Interceptor = Callable[[Any, _ttrpc.Context, Callable[[Any, _ttrpc.Context], Any]], Any]


class Server:
    """A ttrpc server; a context manager that shuts it down.

    max_message: bytes of one message, the envelope included. max_inflight: requests being handled, of one connection; more are
    answered with ResourceExhausted. max_connections: more wait to be accepted. max_unsent: bytes of answers that a peer may leave
    unread before its requests are left unread. max_unread: bytes that the handlers of a connection's streams may leave untaken
    before it is left unread. workers: threads for handlers that block; they are made when they are needed.
    check_peer: only peers with our effective user and group are let in (SO_PEERCRED, unix(7)). interceptors: called around each
    handler as interceptor(request, context, handler), the first one outermost; each returns what handler(request, context)
    returns.
    """

    def __init__(
        self,
        *,
        max_message: int = MESSAGE_MAX,
        max_inflight: int = 65536,
        max_connections: int = 4096,
        max_unsent: int = 8 << 20,
        max_unread: int = 8 << 20,
        workers: int = 16,
        check_peer: bool = True,
        interceptors: Iterable[Interceptor] = (),
    ) -> None:
        self._core = Core()
        self._server = _ttrpc.Server(
            self._core,
            max_message=max_message,
            max_inflight=max_inflight,
            max_connections=max_connections,
            max_unsent=max_unsent,
            max_unread=max_unread,
            workers=workers,
            check_peer=check_peer,
            interceptors=tuple(interceptors),
        )
        self._addresses: list[str] = []
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._ended = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.shutdown()

    def register(self, service: ServiceDescriptor, implementation: object) -> None:
        """Serve a service, before start(): the rpc `CloseIO` by the implementation's method `close_io`, and so on. What it does
        not have is answered Unimplemented.

        A method gets (request, Context) and returns the response, both real protobuf messages. Where the client streams, the
        request is an iterator of messages; where the server does, what is returned is one. It runs on a thread of the pool, so it
        may block; marked with shimcore.inline it runs on the thread that reads, which is quicker, and must not block. What it
        raises of shimcore.errors becomes the answer's status; all else is code 2, Unknown. A coroutine is one of shimcore.jobs;
        for asyncio see shimcore.ttrpc.aio.

        Raises ValueError when the implementation has no method of the service, or one that streams is marked inline.
        """
        methods = {}
        for method, handler in handlers(service, implementation):
            streams = _ttrpc.CLIENT_STREAM * method.client_streaming | _ttrpc.SERVER_STREAM * method.server_streaming
            methods[method.name] = (kind_of(handler), handler, GetMessageClass(method.input_type), streams)
        self._server.add_service(service.full_name, methods)

    def listen(self, address: str) -> None:
        """Listen at an address: `unix:///path`, a plain path, or `unix://@name` for an abstract socket. There may be more than
        one. The socket is 0600, and is removed at shutdown.

        Raises InvalidArgument, AlreadyExists and OSError as shimcore.address.start_listener.
        """
        address = address if address.startswith("unix://") else f"unix://{address}"
        self._server.add_listener(start_listener(address))
        self._addresses.append(address)

    def start(self) -> None:
        """Serve, on threads of the server's own. Raises RuntimeError when it serves already, or has been shut down."""
        with self._lock:
            if self._threads or self._ended:
                raise RuntimeError("the server " + ("has been shut down" if self._ended else "serves already"))
            for run in (self._core.run, self._server.run):
                self._threads.append(threading.Thread(target=run, name="ttrpc server", daemon=True))
        for thread in self._threads:
            thread.start()

    def serve(self) -> None:
        """start(), and wait until another thread has called shutdown()."""
        self.start()
        for thread in self._threads:
            thread.join()

    def shutdown(self, timeout: float = 5.0) -> None:
        """End it: no new connection and no new call; calls in flight are answered, for at most timeout seconds; then they are
        cancelled and every connection is closed. Idempotent. Not to be called by a handler that is marked inline, or a coroutine.
        """
        with self._lock:
            ended, self._ended = self._ended, True
        if not ended:
            for address in self._addresses:
                remove_socket(address)
            self._server.shutdown(timeout)
            self._core.stop()
            self._core.pool.close()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    def stats(self) -> dict[str, int]:
        """connections and in_flight (calls) now; calls and failures (answers with an error) so far."""
        stats = self._server.stats()
        return {name: stats[name] for name in ("connections", "in_flight", "calls", "failures")}
