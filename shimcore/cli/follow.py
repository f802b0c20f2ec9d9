"""events and logs: what shims tell on their debug sockets as it comes (shimcore.follow).

Why from the shims, and not from containerd: it needs no gRPC, it is there when containerd is not, and it is what a shim has told,
in its order, whether or not containerd has taken it. What it can't give are events of shims made otherwise: `ctr events` does.

A shim that starts is seen by its debug socket (inotify(7)); it is asked for all that it has told, so what came before the
connection is not lost, and at its end it waits a moment for its followers. So containers that live for milliseconds are seen from
create to delete.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import queue
import re
import select
import struct
import sys
import threading
import time
from base64 import b64decode
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from ..address import DEBUG_SUFFIX, SOCKET_DIR
from . import nodes
from .out import fail, json_option, living, namespace_option, note, note_of_root, print_line, shim_argument

RESCAN = 1.0  # seconds between two looks for what inotify does not tell: other directories, shims that were there
_IN_CREATE = 0x100
_NONBLOCK_CLOEXEC = os.O_NONBLOCK | os.O_CLOEXEC


@dataclass
class Told:
    """One event. time: ns since the epoch, as the shim says; message: decoded, or the Any of a kind that is not known here.

    missed: how many before it the shim did not keep.
    """

    shim_pid: int
    number: int
    missed: int
    time: int = 0
    namespace: str = ""
    topic: str = ""
    message: Any = None

    @property
    def container(self) -> str:
        return str(getattr(self.message, "container_id", ""))

    def json(self) -> dict[str, Any]:
        from google.protobuf.json_format import MessageToDict

        from ..logger import rfc3339

        return {
            "time": rfc3339(self.time), "namespace": self.namespace, "topic": self.topic, "container": self.container,
            "event": MessageToDict(self.message, preserving_proto_field_name=True),
            "shim_pid": self.shim_pid, "number": self.number,
        }  # fmt: skip

    def text(self) -> str:
        names = ("exec_id", "id", "pid", "exit_status")
        fields = [
            f"{field.name}={value}"
            for field, value in getattr(self.message, "ListFields", list)()
            if field.name in names and value != self.container
        ]
        at = time.strftime("%H:%M:%S", time.localtime(self.time // 1_000_000_000))
        micros = self.time % 1_000_000_000 // 1000
        if self.topic == "/tasks/exit" and not self.message.exit_status:
            fields.append("exit_status=0")
        return f"{at}.{micros:06}  {self.namespace}  {self.container}  {self.topic:20} {' '.join(fields)}".rstrip()


def _decode(pid: int, line: bytes, last: int) -> Told:
    from ..protos import forward_pb2
    from ..rig.events import message_of
    from ..ttrpc import codec

    told = json.loads(line)
    number = told["number"]
    event = Told(pid, number, max(number - last - 1, 0) if last >= 0 else 0)
    if told["request"] is None:
        event.missed += 1
        return event
    envelope = forward_pb2.ForwardRequest.FromString(codec.decode_request(b64decode(told["request"])).payload).envelope
    event.time = envelope.timestamp.ToNanoseconds()
    event.namespace, event.topic, event.message = envelope.namespace, envelope.topic, message_of(envelope.event)
    return event


class Node:
    """Follows the events of shims, each on a thread of its own; they come out of `queue`, in the order of arrival.

    past: of the shims that are there already, also what they still have. Of those that come later, everything. namespace: of this
    one alone, "" for all.
    """

    def __init__(self, *, past: bool, namespace: str = "") -> None:
        self._namespace = namespace
        self.queue: queue.SimpleQueue[Told | str] = queue.SimpleQueue()
        self._past = past
        self._followed: set[str] = set()
        self._mute: set[int] = set()
        self._last: dict[int, int] = {}  # pid -> number of the last event that it told
        self._noted: set[str] = set()
        self._lock = threading.Lock()
        self._first = True
        self._closed = threading.Event()

    def close(self) -> None:
        """Looks for no more shims."""
        self._closed.set()

    def follow(self, path: str, *, everything: bool) -> None:
        """The shim of this debug socket, once."""
        with self._lock:
            if path in self._followed:
                return
            self._followed.add(path)
        threading.Thread(target=self._read_all, args=(path, everything), daemon=True).start()

    def scan(self) -> None:
        """Follows all that are there; says of which that can't be."""
        for shim in nodes.shims(self._namespace):
            if shim.debug:
                self.follow(shim.debug, everything=self._past or not self._first)
            elif shim.pid not in self._mute:
                self._mute.add(shim.pid)
                self.queue.put(f"{shim.name} (pid {shim.pid}) has no debug socket: its events are not seen here")
        self._first = False

    def watch(self) -> None:
        """Follows those that are there and those that come, on a thread of its own, until close."""
        watched = _Sockets(SOCKET_DIR)  # before the first look: what comes between is seen twice, and followed once
        self.scan()

        def run() -> None:
            looked = time.monotonic()
            while not self._closed.is_set():
                for path in watched.wait(max(looked + RESCAN - time.monotonic(), 0)):
                    self.follow(path, everything=True)
                if time.monotonic() >= looked + RESCAN:
                    self.scan()
                    looked = time.monotonic()
            watched.close()

        threading.Thread(target=run, daemon=True).start()

    def _read_all(self, path: str, everything: bool) -> None:
        try:
            again = self._read(path, everything, say=True)
            while again and os.path.exists(path):  # a shim that ends has taken its socket away; one that was upgraded goes on
                again = self._read(path, True, say=False)
        finally:
            with self._lock:
                self._followed.discard(path)  # another shim of that address may come

    def _read(self, path: str, everything: bool, *, say: bool) -> bool:
        """Whether there was a shim to be followed. say: if not, why."""
        last = 0 if everything else -1
        try:
            with nodes.Lines(path, "/events?follow" + ("" if everything else "&after=now"), self._namespace) as lines:
                for line in lines:
                    event = _decode(lines.pid, line, last)
                    last = event.number
                    if last > self._last.get(lines.pid, 0):  # else told before a connection that was lost
                        self._last[lines.pid] = last
                        self.queue.put(event)
        except nodes.NoAnswer as error:
            if say and os.path.exists(path) and str(error) not in self._noted:  # else it has just ended, or was said
                self._noted.add(str(error))
                self.queue.put(str(error))
            return False
        return lines.asked


class _Sockets:
    """Debug sockets as they are made in a directory (inotify(7)); it need not be there yet."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._libc.inotify_init1(_NONBLOCK_CLOEXEC)
        self._watching = False
        self._add()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def _add(self) -> None:
        if self._fd >= 0 and not self._watching:
            self._watching = self._libc.inotify_add_watch(self._fd, os.fsencode(self.directory), _IN_CREATE) >= 0

    def wait(self, seconds: float) -> Iterator[str]:
        """Paths of those that were made within so many seconds, or of none; returns after the first."""
        self._add()
        if self._fd < 0 or not self._watching:
            time.sleep(seconds)
            return
        select.select([self._fd], [], [], seconds)
        try:
            data = os.read(self._fd, 65536)
        except BlockingIOError:
            return
        at = 0
        while at < len(data):
            _, _, _, length = struct.unpack_from("iIII", data, at)
            name = os.fsdecode(data[at + 16 : at + 16 + length].rstrip(b"\0"))
            at += 16 + length
            if name.endswith(DEBUG_SUFFIX):
                yield os.path.join(self.directory, name)


def _once(shims: list[nodes.Shim]) -> Iterator[Told | str]:
    """What the shims still have, by time."""
    found: list[Told] = []
    for shim in shims:
        last = 0
        try:
            for line in nodes.ask(shim, "/events").splitlines():
                found.append(_decode(shim.pid, line, last))
                last = found[-1].number
        except nodes.NoAnswer as error:
            yield str(error)
    yield from sorted(found, key=lambda event: event.time)


def _followed(shims: list[nodes.Shim] | None, past: bool, namespace: str) -> Iterator[Told | str]:
    node = Node(past=past, namespace=namespace)
    if shims is None:
        node.watch()
    else:
        for shim in shims:
            if not shim.debug:
                raise nodes.NoAnswer(f"{shim.name} (pid {shim.pid}) has no debug socket: its events are not seen here")
            node.follow(shim.debug, everything=past)
    try:
        while True:
            yield node.queue.get()
    finally:
        node.close()


@click.command(short_help="What shims tell containerd, as it comes.")
@json_option
@namespace_option
@click.option("--past", is_flag=True, help="Also what the shims still have (the last 128 of each).")
@click.option("--once", is_flag=True, help="That alone: nothing is waited for.")
@click.option("--count", type=click.IntRange(1), default=None, metavar="N", help="End after so many.")
@click.argument("shims", nargs=-1, metavar="[SHIM]...", shell_complete=living)
def events(shims: tuple[str, ...], namespace: str, past: bool, once: bool, count: int | None, as_json: bool) -> None:
    """The events of all shims of this node, those that come included, or of each SHIM (container id, or pid), until Ctrl-C.

    The shims themselves are asked, not containerd, so this is what they have told whether or not containerd runs. Shims that are
    not made with shimcore can't be asked: `ctr events` has theirs. With --json a line for each.
    """
    try:
        all_of_them = nodes.shims(namespace) if shims or once else []
        chosen = [nodes.choose(name, all_of_them) for name in shims] if shims else all_of_them
        source = _once(chosen) if once else _followed(chosen if shims else None, past, namespace)
        note_of_root("other users' shims can't be asked")
        for told in source:
            if isinstance(told, str):
                note(told)
                continue
            if told.missed:
                note(f"the shim of pid {told.shim_pid} has not kept {told.missed} events before this one")
            if not told.topic:
                continue
            if as_json:
                print_line(told.json())
            else:
                click.echo(told.text())
            if count is not None:
                count -= 1
                if not count:
                    return
    except nodes.NoAnswer as error:
        fail(error)
    except KeyboardInterrupt:
        return


# --- logs

_FIELD = re.compile(r'(\S+?)=(?:"((?:[^"\\]|\\.)*)"|(\S*))')
_ESCAPED = re.compile(r"\\(x[0-9a-f]{2}|u[0-9a-f]{4}|.)")
_LEVELS = {"error": "red", "warn": "yellow", "debug": "bright_black", "trace": "bright_black"}


def _unescaped(match: re.Match[str]) -> str:
    word = match[1]
    if word[0] in "xu" and len(word) > 1:
        return chr(int(word[1:], 16))
    return {"n": "\n", "r": "\r", "t": "\t"}.get(word, word)


def fields(line: str) -> dict[str, str]:
    """The fields of one line of a shim's log, logfmt or JSON."""
    if line.startswith("{"):
        return {name: value if isinstance(value, str) else json.dumps(value) for name, value in json.loads(line).items()}
    return {name: _ESCAPED.sub(_unescaped, quoted) if quoted else bare for name, quoted, bare in _FIELD.findall(line)}


def _print_log(line: str, as_json: bool) -> None:
    if as_json:
        print_line(fields(line))
        return
    level = re.search(r' level=(\w+) |^\{"time":"[^"]*","level":"(\w+)"', line)
    click.secho(line, fg=_LEVELS.get(level[1] or level[2]) if level else None)


@click.command(short_help="What one shim has logged.")
@json_option
@click.option("-f", "--follow", is_flag=True, help="And what it will, until it ends.")
@shim_argument
def logs(shim: str, follow: bool, as_json: bool) -> None:
    """The last lines (up to 128) of the log of one SHIM (container id, or pid). Not its container's output: that is containerd's.

    The lines are those that the shim writes to containerd, which puts them into its own log. Shims that are not made with
    shimcore keep none: look there (journalctl -u containerd).
    """
    try:
        chosen = nodes.choose(shim, nodes.shims())
        if not chosen.debug:
            fail(f"{chosen.name} (pid {chosen.pid}) keeps no log; what it says is in containerd's: journalctl -u containerd")
        with nodes.Lines(chosen.debug, "/log?follow" if follow else "/log") as lines:
            for line in lines:
                _print_log(line.decode(errors="replace").rstrip("\n"), as_json)
    except nodes.NoAnswer as error:
        fail(error)
    except KeyboardInterrupt:
        return
    crash = Path(chosen.bundle) / "shim.crash"
    with contextlib.suppress(OSError):
        if crash.stat().st_size:
            note(f"there is a traceback in {crash}")
    sys.stdout.flush()
