# cython: language_level=3, freethreading_compatible=False, binding=False, embedsignature=False
"""See _ttrpc.pyi. The thread in Server.run holds the interpreter's lock only while it steps handlers."""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport uint8_t
from libc.stdlib cimport free

from ._reaper cimport Core, sc_has_notes, sc_now_mono, switch_call

cdef extern from "<errno.h>" nogil:
    int errno
    enum:
        EAGAIN, EMSGSIZE, ETIMEDOUT

cdef extern from "<strings.h>" nogil:
    int strncasecmp(const char *, const char *, size_t)

import os
from _thread import get_ident

from . import logger
from ._reaper import ExitSignal, handled
from .errors import Canceled, DeadlineExceeded, ResourceExhausted, ShimError, from_exception
from .jobs import Pool, Task, resume

MAX_MESSAGE = SC_MAX_MESSAGE
INLINE = 1
POOL = 2
COROUTINE = 3
CLIENT_STREAM = 1
SERVER_STREAM = 2
READABLE = SC_READABLE
WRITABLE = SC_WRITABLE


@cython.no_gc_clear
cdef class Context:
    cdef sc_call *k  # a reference
    cdef Server server  # which must outlive the call
    cdef list pairs
    cdef object traced  # False: nobody has asked yet
    cdef list waiting  # (events, callback); while it holds any, the call has a reference to this

    def __cinit__(self):
        self.traced = False

    def __dealloc__(self):
        if self.k != NULL:
            sc_call_unref(self.k)

    @property
    def metadata(self):
        cdef sc_reader r
        cdef sc_slice key, value
        cdef list pairs
        if self.pairs is None:
            pairs = []
            r.p = self.k.metadata
            r.end = self.k.metadata + self.k.metadata_len
            while self.k.metadata != NULL and sc_metadata_next(&r, &key, &value) == 1:
                pairs.append(((<const char *>key.p)[:key.n].decode(), (<const char *>value.p)[:value.n].decode("utf-8", "replace")))
            self.pairs = pairs
        return list(self.pairs)

    @property
    def trace(self):
        found = self.traced
        if found is False:  # any thread may ask, also while another does
            found = None
            if self.may_trace():
                from .trace import of

                found = of(self.metadata)
            self.traced = found
        return found

    cdef bint may_trace(self) noexcept:
        """Whether there is a traceparent: without one, which is the rule, nothing is decoded or imported."""
        cdef sc_reader r
        cdef sc_slice key, value
        r.p = self.k.metadata
        r.end = self.k.metadata + self.k.metadata_len
        while self.k.metadata != NULL and sc_metadata_next(&r, &key, &value) == 1:
            if key.n == 11 and strncasecmp(<const char *>key.p, b"traceparent", 11) == 0:
                return True
        return False

    def get(self, key, default=None):
        key = key.lower()
        for name, value in self.metadata:
            if name.lower() == key:
                return value
        return default

    def get_all(self, key):
        key = key.lower()
        return [value for name, value in self.metadata if name.lower() == key]

    @property
    def remaining(self):
        return (self.k.deadline - sc_now_mono()) / 1e9 if self.k.deadline else None

    @property
    def cancelled(self):
        return bool(self.k.cancelled) or (self.k.deadline != 0 and sc_now_mono() >= self.k.deadline)

    @property
    def peer(self):
        return self.k.conn.pid, self.k.conn.uid, self.k.conn.gid

    @property
    def place(self):
        return self.k.conn.fd, self.k.stream

    @property
    def service(self):
        return self.server.methods[self.k.method][4]

    @property
    def method(self):
        return self.server.methods[self.k.method][5]

    def on_cancel(self, callback):
        if self.want(SC_CANCELLED, callback):
            callback()

    # ---- streams; see streams.py ----

    def receive(self, bint wait):
        """The peer's next message, None after the last one; False: none yet, and not to be waited for."""
        cdef sc_message *m
        cdef int r
        with nogil:
            r = sc_call_recv(self.k, wait, &m)
        if r == 1:
            try:
                return PyBytes_FromStringAndSize(<const char *>m.p, m.n)
            finally:
                free(m)
        return None if r == 0 else self.failed(r)

    def send(self, bytes message, bint wait):
        """False: the peer has too much to read already, which was not to be waited for."""
        cdef const char *p = PyBytes_AS_STRING(message)
        cdef size_t n = PyBytes_GET_SIZE(message)
        cdef int r
        with nogil:
            r = sc_call_send(self.k, p, n, wait)
        return True if r == 0 else self.failed(r)

    cdef failed(self, int r):
        if r == -EAGAIN:
            return False
        if r == -ETIMEDOUT:
            raise DeadlineExceeded("the caller's deadline has passed")
        if r == -EMSGSIZE:
            raise ResourceExhausted(f"message exceeds maximum message size of {self.server.max_message}")
        raise Canceled("the caller has gone")

    cpdef int want(self, int events, callback) except -1:
        """Have callback called once on the RPC thread when one of the events holds; 0, or those that hold now: then it is not
        called."""
        cdef int now
        cdef tuple entry = (events, callback)
        if not self.waiting:
            self.waiting = []
            Py_INCREF(self)
            self.k.cookie = <void *>self
        self.waiting.append(entry)
        with nogil:
            now = sc_call_want(self.k, events)
        if now:
            self.waiting.remove(entry)
            self.let_go()
        return now

    cdef let_go(self):
        if not self.waiting and self.k.cookie != NULL:
            self.k.cookie = NULL
            Py_DECREF(self)

    cdef told(self, int events):
        cdef list due = [entry for entry in self.waiting if <int>entry[0] & events]
        self.waiting = [entry for entry in self.waiting if not <int>entry[0] & events]
        self.let_go()
        cdef void *before = switch_call(<void *>self)
        for entry in due:
            try:
                entry[1]()
            except BaseException as exc:
                logger.error("a callback failed", method=self.method, error=repr(exc))
        switch_call(before)

    cdef end(self):
        """It has been answered: nobody waits for its events any more, but for those of a connection that has ended."""
        if not self.k.cancelled:
            self.waiting = []
            self.let_go()

    cdef reply(self, bytes payload, bint batch):
        cdef const char *p = PyBytes_AS_STRING(payload)
        cdef size_t n = PyBytes_GET_SIZE(payload)
        with nogil:
            sc_call_reply(self.k, 0, NULL, 0, p, n, batch)

    cdef fail(self, int code, str text, bint batch):
        cdef bytes b = text.encode("utf-8", "replace")
        cdef const char *p = PyBytes_AS_STRING(b)
        cdef size_t n = PyBytes_GET_SIZE(b)
        with nogil:
            sc_call_reply(self.k, code, p, n, NULL, 0, batch)

    cdef answer(self, response, error, bint batch):
        if self.waiting:
            self.end()
        if error is not None:
            code, text = from_exception(error)
            self.fail(code, text, batch)
            if code == SC_UNKNOWN and not isinstance(error, (ShimError, OSError)):
                from .debug import report

                report(error, "a handler")
            return
        if self.k.streams & SC_STREAM_SERVER:  # all its messages have been sent
            self.reply(b"", batch)
            return
        try:
            payload = response.SerializeToString()
            if not isinstance(payload, bytes):
                raise TypeError("its SerializeToString returns no bytes")
        except BaseException as exc:
            self.fail(SC_UNKNOWN, f"handler returned {type(response).__name__}, not a message: {exc}", batch)
        else:
            self.reply(payload, batch)


def adapted(kind, handler, parse, streams):
    """streams.adapted, imported with the first call: most shims never get one."""
    made = []

    def first(request, context):
        if not made:
            from .streams import adapted as adapt

            made.append(adapt(kind, handler, parse, streams))
        return made[0](request, context)

    return first


@cython.no_gc_clear  # the core must outlive the server, in a cycle too
cdef class Server:
    cdef sc_server *s
    cdef readonly Core core
    cdef list methods    # (kind, handler, FromString, request class, service, method)
    cdef tuple interceptors
    cdef readonly size_t max_message
    cdef object callback
    cdef list batch  # notes that have been taken and not handled, the last one first
    cdef object idle, ended
    cdef object pool
    cdef bint draining, running, closed
    cdef object thread

    def __cinit__(self, Core core, *, size_t max_message=SC_MAX_MESSAGE, unsigned max_inflight=65536,
                  unsigned max_connections=4096, size_t max_unsent=8388608, size_t max_unread=8388608, int workers=2, check_peer=True,
                  interceptors=()):
        cdef sc_limits limits
        limits.max_message = max_message
        limits.max_inflight = max_inflight
        limits.max_connections = max_connections
        limits.max_unsent = max_unsent
        limits.max_unread = max_unread
        limits.check_peer = bool(check_peer)
        self.max_message = max_message
        self.interceptors = tuple(interceptors)
        self.core = core
        self.methods = []
        self.batch = []
        self.idle = ExitSignal()
        self.ended = ExitSignal()
        self.s = sc_server_new(core.p, &limits)
        if self.s == NULL:
            raise OSError("sc_server_new")
        if core.pool is None:
            core.pool = Pool(workers)
        self.pool = core.pool

    def __dealloc__(self):
        if self.s != NULL:
            sc_server_free(self.s)

    def add_listener(self, int fd):
        cdef int r = sc_server_listen(self.s, fd)
        if r < 0:
            raise OSError(-r, os.strerror(-r), "epoll_ctl")

    def add_service(self, name, methods):
        for method, (kind, handler, request_class, *streams) in methods.items():
            streams = streams[0] if streams else 0
            if kind not in (INLINE, POOL, COROUTINE):
                raise ValueError(f"{name}/{method}: kind {kind!r} is none of INLINE, POOL, COROUTINE")
            if streams not in (0, 1, 2, 3) or streams and kind == INLINE:
                raise ValueError(f"{name}/{method}: a method that streams is of kind POOL or COROUTINE")
            for interceptor in reversed(self.interceptors):
                handler = intercepted(interceptor, handler)
            if streams:
                handler = adapted(kind, handler, request_class.FromString, streams)
            if sc_server_method(self.s, name.encode(), method.encode(), streams * SC_STREAM_CLIENT, len(self.methods)) < 0:
                raise MemoryError
            self.methods.append((kind, handler, request_class.FromString, request_class, name, method))

    def native_task(self, *names):
        for name in names:
            for method, native in ((b"State", SC_NATIVE_STATE), (b"Wait", SC_NATIVE_WAIT), (b"Connect", SC_NATIVE_CONNECT)):
                if sc_server_method(self.s, name.encode(), method, native, -1) < 0:
                    raise MemoryError

    def on_note(self, callback):
        self.callback = callback

    # ---- across an exec of this process by itself; see upgrade.py. On the RPC thread, or where there is none ----

    def hold(self, bint on):
        sc_server_hold(self.s, on)

    def under_way(self):
        cdef sc_conn *c = self.s.conns
        cdef sc_call *k
        cdef list out = [(-1, 0, "a large request")] if sc_server_receiving(self.s) else []
        while c != NULL:
            k = c.calls
            while k != NULL:
                if not k.parked:
                    method = self.methods[k.method]
                    out.append((c.fd, k.stream, f"{method[4]}/{method[5]}"))
                k = k.next
            c = c.next
        return out

    def save(self):
        cdef sc_conn *c = self.s.conns
        cdef sc_call *k
        cdef list out = []
        while c != NULL:
            waits = []
            k = c.calls
            while k != NULL:
                if k.parked and k.waiter.slot != NULL:
                    slot = k.waiter.slot
                    waits.append([k.stream, slot.id.decode(), slot.exec_id.decode(), k.deadline])
                k = k.next
            out.append({
                "fd": c.fd, "last_stream": c.last_stream, "skip": c.skip, "eof": bool(c.eof), "waits": waits,
                "in": (<const char *>c.in_.p)[c.consumed:c.in_.len] if c.in_.len > c.consumed else b"",
                "out": (<const char *>c.out.p)[:c.out.len] if c.out.len else b"",
            })
            c = c.next
        return out

    def adopt(self, state):
        cdef sc_conn *c
        cdef bytes into, out, container_id, exec_id
        for saved in state:
            into, out = saved["in"], saved["out"]
            c = sc_server_adopt(
                self.s, saved["fd"], saved["last_stream"], saved["skip"], saved["eof"], <const char *>into, len(into),
                <const char *>out, len(out),
            )
            if c == NULL:
                raise OSError(errno, os.strerror(errno), "a client's connection")
            for stream, id, exec_of, deadline in saved["waits"]:
                container_id, exec_id = id.encode(), exec_of.encode()
                if sc_conn_adopt_wait(c, stream, container_id, exec_id, deadline) < 0:
                    raise MemoryError

    def answer(self, int fd, stream, bytes payload):
        cdef sc_conn *c = self.s.conns
        while c != NULL and c.fd != fd:
            c = c.next
        if c != NULL:
            sc_conn_answer_with(c, stream, 0, b"", <const char *>payload, len(payload))

    def spawn_task(self, coro):
        self.core.post(Task(self.core, coro).step)

    cdef dispatch(self, sc_call *k):
        cdef Context ctx = Context.__new__(Context)
        ctx.k = k
        ctx.server = self
        kind, handler, parse, make, _, _ = <tuple>self.methods[k.method]
        cdef bytes received
        try:
            if k.large != NULL:
                received = <bytes>sc_call_room(k)
                Py_DECREF(received)  # it was the call's
                request = parse(received)
                received = None
            elif k.payload.n:
                request = parse(PyBytes_FromStringAndSize(<const char *>k.payload.p, k.payload.n))
            elif k.streams & SC_STREAM_CLIENT:
                request = None
            else:
                request = make()
        except BaseException as exc:
            ctx.fail(SC_INTERNAL, f"request can't be parsed: {exc}", True)
            return
        k.payload.p = NULL
        k.payload.n = 0
        cdef void *before = switch_call(<void *>ctx)
        try:
            if kind == 1:
                response = handler(request, ctx)
            elif kind == 2:
                self.pool.submit(lambda: work(handler, request, ctx))
                return
            else:
                Task(self.core, handler(request, ctx), lambda value, error: ctx.answer(value, error, False)).step()
                return
        except BaseException as exc:
            ctx.answer(None, exc, True)
        else:
            ctx.answer(response, None, True)
        finally:
            switch_call(before)

    cdef make_room(self):
        cdef void *owner
        cdef bytes room
        cdef size_t n
        while True:
            owner = sc_server_scrap(self.s)
            if owner == NULL:
                break
            Py_DECREF(<object>owner)
        n = sc_server_room(self.s)
        if n:
            try:
                room = PyBytes_FromStringAndSize(NULL, n)
            except MemoryError:
                return
            Py_INCREF(room)
            sc_server_give(self.s, <void *>room, <uint8_t *>PyBytes_AS_STRING(room))

    cdef tell(self):
        cdef int events
        cdef sc_call *k
        cdef Context ctx
        while True:
            k = sc_server_events(self.s, &events)
            if k == NULL:
                return
            if k.cookie != NULL:
                ctx = <Context>k.cookie  # a reference: the call may let go of its own meanwhile
                ctx.told(events)
            sc_call_unref(k)

    cdef note(self, tuple n):
        try:
            if not resume(n) and self.callback is not None:
                self.callback(n)
        except BaseException as exc:
            logger.error("a note's handler failed", note=str(n), error=repr(exc))

    cdef handle_batch(self):
        self.batch.reverse()
        while self.batch:
            self.note(self.batch.pop())  # held by nobody else: a note keeps its call, and that its connection

    def catch_up(self):
        cdef bint any = False
        self.batch.reverse()
        while True:
            any = any or bool(self.batch)
            self.handle_batch()
            self.batch = self.core.take()
            if not self.batch:
                return any

    def run(self):
        cdef int work
        cdef sc_call *k
        if self.closed or self.running:
            return
        self.running = True
        self.thread = get_ident()
        try:
            work = sc_standin_start(self.s)
            if work < 0:  # it serves without: State may wait for Python then
                logger.warn("no stand-in for the RPC thread", error=os.strerror(-work))
            while True:
                with nogil:
                    work = sc_server_wait(self.s)
                if work & SC_WORK_ROOM:
                    self.make_room()
                # First, so that a handler knows of the exits that its caller has been told of.
                if work & SC_WORK_NOTES or (work & SC_WORK_CALLS and sc_has_notes(self.core.p)):
                    self.batch = self.core.take()
                    self.handle_batch()
                if work & SC_WORK_CALLS:
                    while True:
                        k = sc_server_next(self.s)
                        if k == NULL:
                            break
                        self.dispatch(k)
                if work & SC_WORK_EVENTS:
                    self.tell()
                if work & SC_WORK_IDLE:
                    self.idle.signal()
                if work & SC_WORK_STOPPED:
                    break
        finally:
            self.closed = True
            with nogil:
                sc_server_close_all(self.s)
            self.tell()
            self.make_room()
            self.running = False
            self.ended.signal()

    def stats(self):
        return {
            "connections": self.s.nconns, "in_flight": self.s.inflight, "calls": self.s.calls, "failures": self.s.failures,
            "stood_in": self.s.standin.acted,
        }

    def shutdown(self, timeout=5.0):
        if self.running and self.thread == get_ident():
            raise RuntimeError("shutdown() waits for the thread that called it")
        self.draining = True
        with nogil:
            sc_server_drain(self.s)
        if not self.running:
            if not self.closed:
                self.closed = True
                with nogil:
                    sc_server_close_all(self.s)
            return True
        self.idle.wait(timeout)
        with nogil:
            sc_server_stop(self.s)
        return self.ended.wait(timeout)


def intercepted(interceptor, handler):
    return lambda request, context: interceptor(request, context, handler)


cdef work(handler, request, Context ctx):
    cdef void *before = switch_call(<void *>ctx)
    try:
        response = handler(request, ctx)
    except BaseException as exc:
        ctx.answer(None, exc, False)
    else:
        ctx.answer(response, None, False)
    finally:
        switch_call(before)


def current_trace():
    """For the logger."""
    call = handled()
    return None if call is None else call.trace


logger.trace_of_call = current_trace
