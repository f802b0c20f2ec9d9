"""Lines on the FIFO `log` in the bundle, which containerd copies to its own log.

    time="2024-05-01T10:00:00.123456789Z" level=info namespace="k8s.io" id="c1" key="value" msg="text"

or, where that is asked for (SHIMCORE_LOG_FORMAT=json), one JSON object a line with the same keys.

A log that blocks or raises takes the shim's RPCs down with it, so nothing here does: the FIFO is opened and
written non-blocking, and a line that finds no reader (ENXIO, EPIPE) or no room (EAGAIN) is counted in
`dropped` and gone. The next line that gets through says how many were lost since the last. A line is one
write of at most PIPE_BUF bytes, which the kernel keeps whole between writers (pipe(7)); what is longer is cut
and says so.

SIGPIPE is blocked around the write and taken off the thread after an EPIPE, so its disposition, which belongs
to the process and not to a logger, is of no consequence.
"""

from __future__ import annotations

import os
import time
from _thread import RLock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _thread import LockType
    from collections.abc import Callable, Mapping
    from signal import SIG_BLOCK, SIG_SETMASK, SIGPIPE, pthread_sigmask, sigtimedwait

    from .trace import Trace
else:  # the module signal wraps these in enums
    from _signal import SIG_BLOCK, SIG_SETMASK, SIGPIPE, pthread_sigmask, sigtimedwait

OFF, ERROR, WARN, INFO, DEBUG, TRACE = range(6)
LEVEL_ENV = "SHIMCORE_LOG"
FORMAT_ENV = "SHIMCORE_LOG_FORMAT"
# Linux's PIPE_BUF; select.PIPE_BUF would cost an import.
MAX_LINE = 4096
# Lines that are kept for whoever asks.
RECENT_MAX = 128
# Room kept for the text when the fields are long.
_MIN_MSG = 1024

_NAMES = ("off", "error", "warn", "info", "debug", "trace")
_LEVELS = {name: level for level, name in enumerate(_NAMES)} | {
    "none": OFF, "panic": ERROR, "fatal": ERROR, "warning": WARN,
}  # fmt: skip

_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))}
_ESCAPES |= {0x2028: "\\u2028", 0x2029: "\\u2029"}
_ESCAPES |= {ord("\n"): "\\n", ord("\r"): "\\r", ord("\t"): "\\t", ord('"'): '\\"', ord("\\"): "\\\\"}
# As JSON has them; a lone surrogate becomes \\udcXX by "backslashreplace", which is JSON, too.
_JSON_ESCAPES = {code: f"\\u{code:04x}" for code in (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029)}
_JSON_ESCAPES |= {ord("\n"): "\\n", ord("\r"): "\\r", ord("\t"): "\\t", ord('"'): '\\"', ord("\\"): "\\\\"}
_RESERVED = ("time", "level", "msg")


def parse_level(name: str | None) -> int | None:
    """OFF to TRACE for a level's name in any case ("warning", "fatal" and "panic" too), or None when it is
    not one.
    """
    return _LEVELS.get(name.strip().lower()) if name else None


def choose_level(debug: bool, default: str = "info", env: Mapping[str, str] | None = None) -> int:
    """The level to log at: SHIMCORE_LOG, else `default` (Config.default_log_level), else info; -debug raises
    it to DEBUG.

    env: where SHIMCORE_LOG is looked up, os.environ when None. -debug wins over "off" and never lowers
    "trace", as in containerd's Rust crate.
    """
    level = parse_level((os.environ if env is None else env).get(LEVEL_ENV))
    if level is None:
        level = parse_level(default)
    if level is None:
        level = INFO
    return max(level, DEBUG) if debug else level


def rfc3339(ns: int) -> str:
    """Nanoseconds since the epoch as RFC 3339 in UTC with nine digits: all of one length, so lines sort as
    text.
    """
    seconds, nanos = divmod(ns, 1_000_000_000)
    t = time.gmtime(seconds)
    return f"{t[0]:04}-{t[1]:02}-{t[2]:02}T{t[3]:02}:{t[4]:02}:{t[5]:02}.{nanos:09}Z"


def _encode(text: str, escapes: Mapping[int, str] = _ESCAPES) -> bytes:
    # Lone surrogates are undecodable bytes of a file name.
    return text.translate(escapes).encode("utf-8", "backslashreplace")


def _escape(text: str, room: int, escapes: Mapping[int, str] = _ESCAPES) -> bytes:
    """`text` escaped, in at most `room` bytes; never cut inside an escape or a character."""
    data = _encode(text[: room + 1], escapes)
    if len(data) <= room and len(text) <= room:
        return data
    out = bytearray()
    for index, char in enumerate(text):
        piece = _encode(char, escapes)
        # Room for the longest mark, whatever is cut.
        if len(out) + len(piece) > room - 24:
            out += b"[... %d more]" % (len(text) - index)
            break
        out += piece
    return bytes(out)


def _key(name: str) -> str:
    safe = "".join(c if c.isascii() and (c.isalnum() or c in "_.-") else "_" for c in name[:64])
    return f"fields.{safe}" if safe in _RESERVED else safe or "_"


def format_line(level: int, msg: object, fields: Mapping[str, object], ns: int) -> bytes:
    """One line, at most MAX_LINE bytes, with exactly one newline, its last byte. ns: wall clock since the
    epoch.
    """
    head = [f'time="{rfc3339(ns)}" level={_NAMES[level]}'.encode()]
    room = MAX_LINE - _MIN_MSG - len(head[0])
    for name, value in fields.items():
        key = _key(name).encode()
        room -= len(key) + 4
        if room < 32:
            break
        data = _escape(str(value), room)
        room -= len(data)
        head.append(b'%s="%s"' % (key, data))
    start = b" ".join(head) + b' msg="'
    return start + _escape(str(msg), MAX_LINE - len(start) - 2) + b'"\n'


def format_json(level: int, msg: object, fields: Mapping[str, object], ns: int) -> bytes:
    """format_line's record as a JSON object, in one line of at most MAX_LINE bytes. A field that is a bool, None, or an integer
    that a double holds exactly stays one; all else is a string.
    """
    out = bytearray(b'{"time":"%s","level":"%s"' % (rfc3339(ns).encode(), _NAMES[level].encode()))
    room = MAX_LINE - _MIN_MSG - len(out)
    seen: set[str] = set()
    for name, value in fields.items():
        key = _key(name)
        while key in seen:  # readers do not agree on what a name that comes twice means
            key += "_"
        seen.add(key)
        room -= len(key) + 6
        if room < 32:
            break
        if value is None or value is True or value is False:
            data = {None: b"null", True: b"true", False: b"false"}[value]
        elif type(value) is int and -(2**53) <= value <= 2**53:
            data = b"%d" % value
        else:
            data = b'"%s"' % _escape(str(value), room, _JSON_ESCAPES)
        room -= len(data)
        out += b',"%s":%s' % (key.encode(), data)
    out += b',"msg":"'
    return bytes(out) + _escape(str(msg), MAX_LINE - len(out) - 3, _JSON_ESCAPES) + b'"}\n'


def choose_format(default: str = "logfmt", env: Mapping[str, str] | None = None) -> Callable[..., bytes]:
    """format_json or format_line: SHIMCORE_LOG_FORMAT ("json" or "logfmt", in any case), else `default` (Config.log_format)."""
    for name in (os.environ if env is None else env).get(FORMAT_ENV, ""), default:
        if name.strip().lower() in ("json", "logfmt"):
            return format_json if name.strip().lower() == "json" else format_line
    return format_line


class Logger:
    """A log of one FIFO (or file). Any thread may use it; no method raises.

    path: str, resolved now, since an author may chdir later; None logs nowhere. level: OFF to TRACE. fields:
    on every line. format: format_line unless it is set to format_json. Counters: `written` and `dropped`
    lines; those below the level are neither. recent: the last lines, of which `count` have been in all, for
    whoever asks the shim; waiting: locks, released when there is another.
    """

    __slots__ = (
        "_fd", "_lock", "_reported", "count", "dropped", "fields", "format", "level", "path", "recent", "waiting", "written",
    )  # fmt: skip

    def __init__(self, path: str | None, level: int = INFO, **fields: object) -> None:
        self.path: str | None = path
        if path is not None and not path.startswith("/"):
            try:
                self.path = os.path.join(os.getcwd(), path)
            except OSError:  # the bundle is gone already
                pass
        self.level = level
        self.fields = fields
        self.format: Callable[..., bytes] = format_line
        self.written = 0
        self.dropped = 0
        self._reported = 0
        self.recent: list[bytes] = []
        self.count = 0
        self.waiting: list[LockType] = []
        self._fd = -1
        self._lock = RLock()

    def log(self, level: int, msg: object, /, **fields: object) -> None:
        """Write one line unless `level` is above the logger's. Fields stand before msg, in the order given.
        """
        if level > self.level or level <= OFF:
            return
        if self.path is None:
            self.dropped += 1
            return
        try:
            extra = {**self.fields, **self._traced(), **fields}
            lost = self.dropped - self._reported
            if lost:
                extra["dropped"] = lost
            line = self.format(level, msg, extra, time.time_ns())
            self._keep(line)
            if self._write(line):
                self.written += 1
                self._reported += lost
                return
        except Exception:  # an author's __str__, the stack's end, no memory: never the caller's trouble
            pass
        self.dropped += 1

    def _traced(self) -> Mapping[str, object]:
        trace = None if trace_of_call is None else trace_of_call()
        if trace is None:
            return {}
        if self.format is format_json:  # as OpenTelemetry names them in logs
            return {"trace_id": trace.trace_id, "span_id": trace.span_id}
        return {"trace": f"{trace.trace_id}-{trace.span_id}"}

    def _keep(self, line: bytes) -> None:
        with self._lock:
            if len(self.recent) >= RECENT_MAX:
                del self.recent[: RECENT_MAX // 2]
            self.recent.append(line)
            self.count += 1
        for lock in self.waiting:
            try:
                lock.release()
            except RuntimeError:  # it has been already
                pass

    def lines(self, after: int) -> tuple[int, list[bytes]]:
        """(count, the lines with a number above `after`, counted from 1, that are still kept)."""
        with self._lock:
            new = max(self.count - max(after, 0), 0)
            return self.count, self.recent[-new:] if new else []

    def _write(self, line: bytes) -> bool:
        fd = self._fd
        if fd < 0:
            fd = self._open()
        while fd >= 0:
            old = pthread_sigmask(SIG_BLOCK, (SIGPIPE,))
            try:
                return os.write(fd, line) == len(line)
            except BrokenPipeError:
                # Sent to this thread by its own write (signal(7)), so it is pending here, if it is anywhere.
                sigtimedwait((SIGPIPE,), 0)
            except OSError:  # EAGAIN first of all: the pipe is full
                return False
            finally:
                pthread_sigmask(SIG_SETMASK, old)
            # A write end that is held works again when a reader returns to this FIFO. A new FIFO at the path
            # has to be opened.
            fd = self._open()
        return False

    def _open(self) -> int:
        """Open the path; the fd, or -1 when nobody reads there.

        A number once given out is never closed while others may be writing to it: it might be a socket's by
        then. A later open takes its place by dup3(2). The lock is re-entrant, since a signal's handler may
        log on the thread that holds it.
        """
        flags = os.O_WRONLY | os.O_NONBLOCK | os.O_APPEND | os.O_CLOEXEC | os.O_NOCTTY
        with self._lock:
            try:
                new = os.open(self.path or "", flags)
            except OSError:
                return -1
            if self._fd < 0:
                self._fd = new
            else:
                try:
                    os.dup2(new, self._fd, inheritable=False)
                finally:
                    os.close(new)
            return self._fd

    def close(self) -> None:
        """Close the FIFO; the next line opens it again. Only for when no other thread is logging."""
        with self._lock:
            fd, self._fd = self._fd, -1
            if fd >= 0:
                try:
                    os.close(fd)
                except OSError:
                    pass

    def trace(self, msg: object, /, **fields: object) -> None:
        self.log(TRACE, msg, **fields)

    def debug(self, msg: object, /, **fields: object) -> None:
        self.log(DEBUG, msg, **fields)

    def info(self, msg: object, /, **fields: object) -> None:
        self.log(INFO, msg, **fields)

    def warn(self, msg: object, /, **fields: object) -> None:
        self.log(WARN, msg, **fields)

    def error(self, msg: object, /, **fields: object) -> None:
        self.log(ERROR, msg, **fields)


# The trace of the call that the calling thread handles, or None. Set by what serves calls: without that there are none.
trace_of_call: Callable[[], Trace | None] | None = None

_current = Logger(None)


def init(
    debug: bool,
    namespace: str,
    id: str,
    *,
    default_level: str = "info",
    default_format: str = "logfmt",
    bundle: str = ".",
    env: Mapping[str, str] | None = None,
) -> Logger:
    """Make the logger of a shim's daemon, on `log` in its bundle, current, and return it. Opens nothing yet.
    """
    path = os.path.join(bundle, "log") if bundle != "." else "log"
    logger = Logger(path, choose_level(debug, default_level, env), namespace=namespace, id=id)
    logger.format = choose_format(default_format, env)
    set_logger(logger)
    return logger


def get_logger() -> Logger:
    """The logger that the functions of this module write to; before init or set_logger, one that drops
    everything.
    """
    return _current


def set_logger(logger: Logger) -> Logger:
    """Make `logger` current; returns the one before, which stays open."""
    global _current
    previous, _current = _current, logger
    return previous


def trace(msg: object, /, **fields: object) -> None:
    """Log at level trace through the current logger; likewise debug, info, warn and error."""
    _current.log(TRACE, msg, **fields)


def debug(msg: object, /, **fields: object) -> None:
    _current.log(DEBUG, msg, **fields)


def info(msg: object, /, **fields: object) -> None:
    _current.log(INFO, msg, **fields)


def warn(msg: object, /, **fields: object) -> None:
    _current.log(WARN, msg, **fields)


def error(msg: object, /, **fields: object) -> None:
    _current.log(ERROR, msg, **fields)
