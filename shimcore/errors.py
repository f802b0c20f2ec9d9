"""The errors that a shim answers with, each with its code on the wire, and the one conversion at the server's
edge.

Codes are those of google.rpc.Code, which ttrpc's Status carries and from which containerd's client makes its
own errors; it looks at the code alone, so a wrong code is a wrong behaviour (Kill's NotFound makes it wait
for the exit, for one).

Compiled code and `os` raise OSError; only `from_exception` turns those into a code and a text, so that
nothing below the server has to know about the wire.
"""

from __future__ import annotations

OK = 0


class ShimError(Exception):
    """Base of all errors that have a code on the wire. code: int (google.rpc.Code); message: str, sent to the
    client.
    """

    code: int = 2

    def __init__(self, message: str = "") -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return self.message


class Canceled(ShimError):
    """The caller has gone, or what was waited for was closed."""

    code = 1


class Unknown(ShimError):
    """Anything that no other code names; what a failed runtime or a failed system call becomes."""

    code = 2


class InvalidArgument(ShimError):
    """The request, a flag or a file makes no sense, whatever the state of the task."""

    code = 3


class DeadlineExceeded(ShimError):
    """The time allowed for an operation has passed; it may still take effect."""

    code = 4


class NotFound(ShimError):
    """No such container, process, exec or file; Kill of a process that has ended."""

    code = 5


class AlreadyExists(ShimError):
    """The id is in use."""

    code = 6


class PermissionDenied(ShimError):
    """The caller may not do this."""

    code = 7


class ResourceExhausted(ShimError):
    """A bound was reached: memory, file descriptors, a queue, the size of a message."""

    code = 8


class FailedPrecondition(ShimError):
    """The operation is not legal in the present state of the task."""

    code = 9


class Aborted(ShimError):
    """A concurrent operation came in between."""

    code = 10


class OutOfRange(ShimError):
    """A value lies outside of its range."""

    code = 11


class Unimplemented(ShimError):
    """A service or method that this shim does not have; containerd 2.x tries an older API on it."""

    code = 12


class Internal(ShimError):
    """An invariant of this library is broken."""

    code = 13


class Unavailable(ShimError):
    """The peer can't be reached now; trying again may help."""

    code = 14


class DataLoss(ShimError):
    """Data were lost or damaged beyond recovery."""

    code = 15


class Unauthenticated(ShimError):
    """The caller's identity is not known."""

    code = 16


class Closed(Unavailable):
    """A connection ended under a call.

    peer: address of the other side, "" when unknown; errno: the system call's, 0 for an orderly end; method:
    full name of the call under way, "" for none; stream_id: its stream, 0 for none.
    """

    def __init__(
        self, message: str = "", *, peer: str = "", errno: int = 0, method: str = "", stream_id: int = 0
    ) -> None:
        if not message:
            message = "connection closed" + (f" by {peer}" if peer else "")
        super().__init__(message)
        self.peer = peer
        self.errno = errno
        self.method = method
        self.stream_id = stream_id


_BY_CODE: dict[int, type[ShimError]] = {
    cls.code: cls
    for cls in (
        Canceled, Unknown, InvalidArgument, DeadlineExceeded, NotFound, AlreadyExists, PermissionDenied,
        ResourceExhausted, FailedPrecondition, Aborted, OutOfRange, Unimplemented, Internal, Unavailable,
        DataLoss, Unauthenticated,
    )
}  # fmt: skip


def from_code(code: int, message: str) -> ShimError:
    """The error object for a Status received from a peer.

    A number that google.rpc.Code does not name (0 too, which is no error) gives a plain ShimError that keeps
    the number.
    """
    cls = _BY_CODE.get(code)
    if cls is not None:
        return cls(message)
    error = ShimError(message)
    error.code = code
    return error


def _os_text(exc: OSError) -> str:
    # Our compiled code puts the syscall's name where os puts the file's, so both read "what: why".
    if exc.errno is None:
        return str(exc) or type(exc).__name__
    from errno import errorcode

    name = errorcode.get(exc.errno, str(exc.errno))
    about = [n.decode("utf-8", "replace") if isinstance(n, bytes) else str(n)
             for n in (exc.filename, exc.filename2) if n is not None]  # fmt: skip
    prefix = " -> ".join(about) + ": " if about else ""
    return f"{prefix}{exc.strerror or 'error'} ({name})"


def from_exception(exc: BaseException) -> tuple[int, str]:
    """(code, text) that a client is answered with when a handler raised `exc`; never raises.

    A ShimError gives its own code and message. An OSError is Unknown with the failed call or file and
    strerror: its errno says what the kernel thought of some path, which must not reach the client as a
    NotFound of the task. NotImplementedError is Unimplemented. All else is Unknown, with the type's name. The
    text can always be encoded as UTF-8, as protobuf demands of a string: undecodable bytes of file names
    appear as \\udcXX.
    """
    code = Unknown.code
    try:
        if isinstance(exc, ShimError):
            code = int(exc.code)
            text = str(exc) or type(exc).__name__
        elif isinstance(exc, OSError):
            text = _os_text(exc)
        elif isinstance(exc, NotImplementedError):
            code = Unimplemented.code
            text = str(exc) or "not implemented"
        else:
            detail = str(exc)
            text = f"{type(exc).__name__}: {detail}" if detail else type(exc).__name__
    except Exception:  # an author's __str__ may raise, and the client still needs its answer
        text = type(exc).__name__
    return code, text.encode("utf-8", "backslashreplace").decode("utf-8")
