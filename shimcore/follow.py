"""Being followed: a shim's events and its log, told on the debug socket as they come.

    curl -sN --unix-socket /run/containerd/s/….debug 'http://shim/log?follow'

`/events` is a line of JSON for each event: its number, from 1, and the ttrpc Request in which containerd gets it, in base64;
`shimcore events` reads it. `/log` is the log's lines as they are. Without a query: what the shim still has (the last 128).
`after=N`: what has a number above N; `after=now`: nothing that was before. `follow`: and what comes until the shim ends or the
peer leaves.

Each follower has a thread of its own, which is made when it comes. Nothing waits for it but the shim's end, for END_TIMEOUT at
most, so that the last event reaches it too.
"""

from __future__ import annotations

import time
from _thread import allocate_lock, start_new_thread

from . import logger

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket
    from collections.abc import Callable

    from .debug import Debug

FOLLOWERS_MAX = 8
TICK = 0.5  # seconds after which a follower's thread looks whether its peer is still there
SEND_TIMEOUT = 2.0  # seconds that a peer may take to read
END_TIMEOUT = 0.3

_PATHS = ("/events", "/log")
_LATEST = 1 << 62


def _target(request: bytes) -> tuple[str, dict[str, str]]:
    """(path, its query's words) of a request's first line; ("", {}) for what is no GET."""
    words = request.split(b"\r\n", 1)[0].decode("latin-1").split()
    if len(words) != 3 or words[0] != "GET" or not words[2].startswith("HTTP/1."):
        return "", {}
    path, _, query = words[1].partition("?")
    pairs = (word.partition("=") for word in query.split("&"))
    return path, {name: value for name, _, value in pairs if name}


def wanted(request: bytes) -> bool:
    """Whether this is answered here."""
    return _target(request)[0] in _PATHS


def _reply(status: str, kind: str, body: bytes = b"") -> bytes:
    return f"HTTP/1.0 {status}\r\nContent-Type: {kind}\r\nConnection: close\r\n\r\n".encode() + body


def begin(about: Debug, peer: _socket.socket, request: bytes) -> None:
    """Answer, for which a follower gets a thread; the socket is that thread's then, and `peer` has none. Raises OSError."""
    import _socket

    path, query = _target(request)
    after = query.get("after", "0")
    if after != "now" and not after.isdecimal():
        peer.sendall(_reply("400 Bad Request", "text/plain", b"after= is a number, or now\n"))
        return
    number = _LATEST if after == "now" else min(int(after[:19]), _LATEST)
    follow = "follow" in query
    if follow and len(about.followers) >= FOLLOWERS_MAX:
        peer.sendall(_reply("503 Service Unavailable", "text/plain", b"too many follow this shim\n"))
        return
    source = _events if path == "/events" else _log
    if number == _LATEST:
        number = source(about, 0, 0)[0]
    peer.sendall(_reply("200 OK", "application/x-ndjson" if path == "/events" else "text/plain; charset=utf-8"))
    if not follow:
        peer.sendall(b"".join(source(about, number, 0)[1]))
        return
    alive = allocate_lock()
    alive.acquire()
    about.followers.append(alive)
    start_new_thread(_follow, (about, _socket.socket(fileno=peer.detach()), source, number, alive))


def _events(about: Debug, after: int, timeout: float) -> tuple[int, list[bytes]]:
    """(number of the last event, lines of those above `after`)."""
    from binascii import b2a_base64

    found = about.core.events(after, timeout)
    lines = []
    for number, request in found:
        body = b"null" if request is None else b'"' + b2a_base64(request, newline=False) + b'"'
        lines.append(b'{"number": %d, "request": %s}\n' % (number, body))
    return found[-1][0] if found else after, lines


def _log(about: Debug, after: int, timeout: float) -> tuple[int, list[bytes]]:
    """The same of the log's lines."""
    log = logger.get_logger()
    count, lines = log.lines(after)
    if lines or not timeout:
        return count, lines
    wake = allocate_lock()
    wake.acquire()
    log.waiting.append(wake)
    try:
        if log.count == count and not about.ending:
            wake.acquire(timeout=timeout)
    finally:
        log.waiting.remove(wake)
    return log.lines(after)


def _gone(peer: _socket.socket) -> bool:
    import _socket
    from select import POLLIN, poll

    poller = poll()  # recv would wait for as long as a send may, be it told not to
    poller.register(peer.fileno(), POLLIN)
    return bool(poller.poll(0)) and not peer.recv(1, _socket.MSG_PEEK)


def _follow(
    about: Debug, peer: _socket.socket, source: Callable[[Debug, int, float], tuple[int, list[bytes]]], number: int, alive: object
) -> None:
    try:
        peer.settimeout(SEND_TIMEOUT)
        while True:
            ending = about.ending
            number, lines = source(about, number, TICK)
            if lines:
                peer.sendall(b"".join(lines))
            elif ending or _gone(peer):
                break
    except OSError:  # it left, or reads too slowly
        pass
    except Exception as error:
        logger.error("a follower is told no more", error=repr(error))
    finally:
        peer.close()
        about.followers.remove(alive)  # type: ignore[arg-type]
        alive.release()  # type: ignore[attr-defined]


def end(about: Debug) -> None:
    """The shim ends: wait until the followers have been told everything, for END_TIMEOUT at most."""
    about.ending = True
    about.core.end_events()
    for lock in list(logger.get_logger().waiting):
        try:
            lock.release()
        except RuntimeError:
            pass
    until = time.monotonic() + END_TIMEOUT
    for alive in list(about.followers):
        if alive.acquire(timeout=max(until - time.monotonic(), 0)):
            alive.release()
