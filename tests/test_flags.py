"""flags.py: the rules of Go's package flag."""

from __future__ import annotations

import pytest

from shimcore.bootstrap import Flags, parse_flags
from shimcore.errors import InvalidArgument


def test_all() -> None:
    argv = [
        "-debug", "-id", "123", "-namespace", "default", "-socket", "/path/to/socket", "-publish-binary",
        "/path/to/binary", "-bundle", "bundle", "-address", "address", "delete",
    ]  # fmt: skip
    assert parse_flags(argv) == Flags(
        debug=True,
        id="123",
        namespace="default",
        socket="/path/to/socket",
        publish_binary="/path/to/binary",
        bundle="bundle",
        address="address",
        action="delete",
    )


def test_flags_without_an_action() -> None:
    flags = parse_flags(["-id", "123", "-namespace", "default"])
    assert flags == Flags(id="123", namespace="default")
    assert flags.action == "" and not flags.debug


def test_action() -> None:
    flags = parse_flags(["-namespace", "1", "start"])
    assert (flags.action, flags.id) == ("start", "")


def test_version_flags() -> None:
    assert parse_flags(["-v"]) == Flags(v=True, version=True)
    assert parse_flags(["-version"]) == Flags(version=True)
    assert parse_flags(["-info"]) == Flags(info=True)


@pytest.mark.parametrize("arg", ["-h", "--help"])
def test_help(arg: str) -> None:
    assert parse_flags([arg]) == Flags(help=True)


@pytest.mark.parametrize(
    ("argv", "flags"),
    [
        (["-id=a"], Flags(id="a")),
        (["--id=a"], Flags(id="a")),
        (["--id", "a"], Flags(id="a")),
        (["-id=a=b"], Flags(id="a=b")),
        (["-id="], Flags()),
        (["-id", ""], Flags()),
        (["-id", "-namespace"], Flags(id="-namespace")),  # a string takes what comes
        (["-id", "a", "-id", "b"], Flags(id="b")),
        (["-debug", "true"], Flags(debug=True, action="true")),  # a bool doesn't
        (["start", "-id", "a"], Flags(action="start", args=["-id", "a"])),
        (["-id", "a", "--", "-debug", "x"], Flags(id="a", action="-debug", args=["x"])),
        (["-", "x"], Flags(action="-", args=["x"])),
        (["", "x"], Flags(args=["x"])),
        ([], Flags()),
    ],
)
def test_rules(argv: list[str], flags: Flags) -> None:
    assert parse_flags(argv) == flags


@pytest.mark.parametrize("text", ["1", "t", "T", "TRUE", "true", "True"])
def test_true(text: str) -> None:
    assert parse_flags([f"-debug={text}"]).debug is True


@pytest.mark.parametrize("text", ["0", "f", "F", "FALSE", "false", "False"])
def test_false(text: str) -> None:
    assert parse_flags(["-debug", f"-debug={text}"]).debug is False


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["-nope"], "flag provided but not defined: -nope"),
        (["-ids", "x"], "not defined: -ids"),  # no abbreviations, no prefixes
        (["-id"], "flag needs an argument: -id"),
        (["-debug=yes"], 'invalid boolean value "yes" for -debug'),
        (["-debug="], "invalid boolean value"),
        (["---id", "x"], "bad flag syntax: ---id"),
        (["-=x"], "bad flag syntax: -=x"),
        (["--=x"], "bad flag syntax: --=x"),
    ],
)
def test_refused(argv: list[str], text: str) -> None:
    with pytest.raises(InvalidArgument, match=text):
        parse_flags(argv)


def test_repr_and_inequality() -> None:
    assert repr(Flags(id="a", debug=True)) == "Flags(debug=True, id='a')"
    assert Flags() != Flags(id="a") and Flags() != 1
