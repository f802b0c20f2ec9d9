"""errors.py: codes on the wire and the conversion at the server's edge."""

from __future__ import annotations

import errno
import os

import pytest

from shimcore import errors

# google/rpc/code.proto
CODES = {
    "Canceled": 1,
    "Unknown": 2,
    "InvalidArgument": 3,
    "DeadlineExceeded": 4,
    "NotFound": 5,
    "AlreadyExists": 6,
    "PermissionDenied": 7,
    "ResourceExhausted": 8,
    "FailedPrecondition": 9,
    "Aborted": 10,
    "OutOfRange": 11,
    "Unimplemented": 12,
    "Internal": 13,
    "Unavailable": 14,
    "DataLoss": 15,
    "Unauthenticated": 16,
}


@pytest.mark.parametrize(("name", "code"), CODES.items())
def test_codes_there_and_back(name: str, code: int) -> None:
    cls = getattr(errors, name)
    assert cls.code == code and issubclass(cls, errors.ShimError)
    assert type(errors.from_code(code, "text")) is cls
    assert errors.from_exception(cls("text")) == (code, "text")
    assert str(cls("text")) == cls("text").message == "text"


@pytest.mark.parametrize("code", [0, 17, 99, -1])
def test_an_unnamed_code_is_kept(code: int) -> None:
    error = errors.from_code(code, "text")
    assert type(error) is errors.ShimError and error.code == code
    assert errors.ShimError.code == 2, "the class must not change with one of its objects"


def test_an_oserror_is_unknown_with_what_failed() -> None:
    try:
        os.open("/no/such", os.O_RDONLY)
    except OSError as caught:
        assert errors.from_exception(caught) == (2, "/no/such: No such file or directory (ENOENT)")
    # as compiled code raises them
    raised = OSError(errno.EBUSY, os.strerror(errno.EBUSY), "mount")
    assert errors.from_exception(raised) == (2, "mount: Device or resource busy (EBUSY)")
    assert errors.from_exception(OSError("bare")) == (2, "bare")
    assert errors.from_exception(OSError(errno.EXDEV, "across", "a", None, "b")) == (2, "a -> b: across (EXDEV)")
    assert errors.from_exception(OSError(errno.EIO, "bad", b"\xff"))[1].endswith("bad (EIO)")


def test_other_exceptions() -> None:
    assert errors.from_exception(NotImplementedError()) == (12, "not implemented")
    assert errors.from_exception(ValueError("x")) == (2, "ValueError: x")
    assert errors.from_exception(KeyError("x")) == (2, "KeyError: 'x'")
    assert errors.from_exception(SystemExit(3)) == (2, "SystemExit: 3")
    assert errors.from_exception(RuntimeError()) == (2, "RuntimeError")
    assert errors.from_exception(errors.NotFound()) == (5, "NotFound")


def test_the_text_can_always_be_sent() -> None:
    class Hostile(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no")

    assert errors.from_exception(Hostile()) == (2, "Hostile")
    code, text = errors.from_exception(FileNotFoundError(errno.ENOENT, "gone", os.fsdecode(b"/a\xff")))
    assert code == 2 and text.encode() == b"/a\\udcff: gone (ENOENT)"


def test_closed_carries_the_call() -> None:
    error = errors.Closed(peer="unix:///x", errno=32, method="Wait", stream_id=7)
    assert (error.code, error.peer, error.errno, error.method, error.stream_id) == (14, "unix:///x", 32, "Wait", 7)
    assert str(error) == "connection closed by unix:///x"
    assert isinstance(error, errors.Unavailable)
    assert errors.Closed("own words").message == "own words"
