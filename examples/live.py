"""A shim whose containers' output can be watched while they run, by any number of watchers, over HTTP:

    curl --unix-socket BUNDLE/live.sock http://shim/

A watcher is told the last KEPT bytes, then what comes, until the process has ended. The process is a plain one, as in
skeleton.py, from which this takes what has nothing to wait for.

Install it with   python -m shimcore.install --dest DIR --runtime-id io.containerd.live.v1 live:Live
"""

import asyncio
import contextlib
import os

from skeleton import SkeletonTask

from shimcore import aio, errors, util
from shimcore._reaper import RUNNING
from shimcore.protos import events_pb2 as events
from shimcore.protos import task_pb2 as api
from shimcore.publisher import TOPIC_START

KEPT = 65536
SOCKET = "live.sock"  # in the daemon's working directory, which is the bundle: a path of its own could be too long for a socket
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\n"


class Output:
    """What a process has written. All on the loop, so it needs no lock."""

    def __init__(self):
        self.kept = bytearray()
        self.written = 0
        self.ended = False
        self.news = asyncio.Event()

    def add(self, piece):
        """b"": there is no more."""
        self.kept += piece
        del self.kept[:-KEPT]
        self.written += len(piece)
        self.ended = not piece
        self.news.set()
        self.news = asyncio.Event()  # the next; who waits for this one has been woken

    async def follow(self):
        seen = self.written - len(self.kept)
        while True:
            if missing := min(self.written - seen, len(self.kept)):
                seen = self.written
                yield bytes(self.kept[-missing:])
            elif self.ended:
                return
            else:
                await self.news.wait()


class LiveTask(aio.Task, SkeletonTask):
    def __init__(self, publisher, exit):
        super().__init__(publisher, exit)
        self.output = Output()
        self.copying = None
        self.fifo = -1

    async def start(self, request, context):
        slot = self.slot(request)
        spec = await asyncio.to_thread(util.read_spec, slot.cookie.bundle)
        argv, cwd = self.command(slot.cookie.bundle, spec)
        env = dict(item.split("=", 1) for item in spec["process"].get("env", []))
        # Now, and not with the first output: a client gives up those that are not open when the process has ended.
        fifo = os.open(slot.cookie.stdout, os.O_RDWR | os.O_CLOEXEC) if slot.cookie.stdout else -1
        if slot.cookie.stderr:
            os.close(os.open(slot.cookie.stderr, os.O_RDWR | os.O_CLOEXEC))  # nothing comes there, and its reader sees that
        reading, writing = os.pipe()
        try:
            pid = aio.spawn_in(slot, argv, env=env, cwd=cwd, fds={1: writing, 2: writing})
        except OSError as error:
            for fd in reading, fifo:
                if fd >= 0:
                    os.close(fd)
            raise errors.InvalidArgument(f"{argv[0]}: {error.strerror}") from None
        finally:
            os.close(writing)
        self.fifo = fifo
        self.copying = asyncio.create_task(self.copy(reading, fifo))
        slot.set_status(RUNNING)
        started = events.TaskStart(container_id=request.id, pid=pid)
        slot.announce(TOPIC_START, "containerd.events.TaskStart", started.SerializeToString())
        return api.StartResponse(pid=pid)

    async def copy(self, reading, fifo):
        """From the process to the watchers, and to containerd as fast as that reads."""
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        file = open(reading, "rb", 0)  # noqa: SIM115  # the transport closes it
        pipe, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), file)
        try:
            while piece := await reader.read(KEPT):
                self.output.add(piece)
                if fifo >= 0:
                    await asyncio.to_thread(os.write, fifo, piece)  # it blocks while the FIFO is full
        finally:
            self.output.add(b"")
            pipe.close()

    async def watch(self, reader, writer):
        with contextlib.suppress(ConnectionError), contextlib.closing(writer):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(HEAD)
            async for piece in self.output.follow():
                writer.write(piece)
                await writer.drain()

    async def delete(self, request, context):
        answer = await asyncio.to_thread(super().delete, request, context)
        if self.copying is not None:  # a process that it has left behind may keep the pipe open
            await asyncio.wait({self.copying}, timeout=1)
        if self.fifo >= 0:  # not before: who comes to read now finds what was written
            os.close(self.fifo)
            self.fifo = -1
        return answer


class Live(aio.Shim):
    def create_task_service(self, publisher):
        self.task = LiveTask(publisher, self.exit)
        return self.task

    async def setup(self):
        self.server = await asyncio.start_unix_server(self.task.watch, SOCKET)
        os.chmod(SOCKET, 0o600)

    async def cleanup(self):
        self.server.close()
