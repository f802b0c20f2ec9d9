"""Runtime options: the three messages they come in, and options.json."""

from __future__ import annotations

from pathlib import Path

import pytest

from shimcore.errors import InvalidArgument
from shimcore.oci.options import (
    GENERIC_OPTIONS,
    LINUX_RUNC_OPTIONS,
    RUNC_OPTIONS,
    Options,
    from_any,
    from_bundle,
)
from shimcore.protos import linux_runc_pb2, runc_options_pb2, runtimeoptions_pb2
from shimcore.util import write_options

RUNC = {
    "no_pivot_root": True,
    "no_new_keyring": True,
    "shim_cgroup": "/shims",
    "io_uid": 1000,
    "io_gid": 4294967294,
    "binary_name": "/usr/bin/crun",
    "root": "/run/other",
    "criu_path": "/criu",
    "systemd_cgroup": True,
    "criu_image_path": "/image",
    "criu_work_path": "/work",
    "task_api_address": "unix:///x",
    "task_api_version": 3,
}


def test_defaults_match_the_message() -> None:
    message = runc_options_pb2.Options()
    assert Options().values() == {f.name: getattr(message, f.name) for f in message.DESCRIPTOR.fields}


@pytest.mark.parametrize("prefix", ["", "type.googleapis.com/"])
def test_runc_options(prefix: str) -> None:
    message = runc_options_pb2.Options(**RUNC)
    assert from_any(prefix + RUNC_OPTIONS, message.SerializeToString()).values() == RUNC


def test_linux_runc_options() -> None:
    message = linux_runc_pb2.CreateOptions(
        no_pivot_root=True, no_new_keyring=True, open_tcp=True, terminal=True, shim_cgroup="/s", io_uid=7, io_gid=8,
        criu_work_path="/w", criu_image_path="/i", empty_namespaces=["a"],
    )  # fmt: skip
    want = Options()
    want.no_pivot_root = want.no_new_keyring = True
    want.shim_cgroup, want.io_uid, want.io_gid = "/s", 7, 8
    want.criu_work_path, want.criu_image_path = "/w", "/i"
    assert from_any(LINUX_RUNC_OPTIONS, message.SerializeToString()).values() == want.values()


TOML = b'BinaryName = "/usr/bin/youki"\nSystemdCgroup = true\nIoUid = 5\nroot = "/r"\nWhatever = [1]\n'


def test_generic_options_inline() -> None:
    message = runtimeoptions_pb2.Options(type_url="x", config_body=TOML)
    options = from_any(GENERIC_OPTIONS, message.SerializeToString())
    assert (options.binary_name, options.systemd_cgroup, options.io_uid, options.root) == (
        "/usr/bin/youki",
        True,
        5,
        "/r",
    )


def test_generic_options_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "options.toml"
    path.write_bytes(TOML)
    message = runtimeoptions_pb2.Options(config_path=str(path))
    assert from_any(GENERIC_OPTIONS, message.SerializeToString()).binary_name == "/usr/bin/youki"
    path.unlink()
    with pytest.raises(InvalidArgument):
        from_any(GENERIC_OPTIONS, message.SerializeToString())


@pytest.mark.parametrize("type_url", ["", RUNC_OPTIONS, "some.Unknown"])
def test_nothing_is_the_defaults(type_url: str) -> None:
    assert from_any(type_url, b"").values() == Options().values()


@pytest.mark.parametrize(
    ("type_url", "value"),
    [
        ("some.Unknown", b"\x08\x01"),
        (RUNC_OPTIONS, b"\x32\xff"),  # cut off
        (RUNC_OPTIONS, b"\x32\x01\xff"),  # not UTF-8
        (RUNC_OPTIONS, b"\x30\x01"),  # a number for binary_name
        (RUNC_OPTIONS, b"\x0a\x01x"),  # text for a bool
        (GENERIC_OPTIONS, b"\x1a\x03= =\x18\x01"),
        (GENERIC_OPTIONS, runtimeoptions_pb2.Options(config_body=b"= =").SerializeToString()),
        (GENERIC_OPTIONS, runtimeoptions_pb2.Options(config_body=b"\xff").SerializeToString()),
        (GENERIC_OPTIONS, runtimeoptions_pb2.Options(config_body=b"BinaryName = 1").SerializeToString()),
    ],
)
def test_refused(type_url: str, value: bytes) -> None:
    with pytest.raises(InvalidArgument):
        from_any(type_url, value)


def test_unknown_fields_are_skipped() -> None:
    message = runc_options_pb2.Options(root="/r").SerializeToString()
    assert from_any(RUNC_OPTIONS, b"\xa0\x06\x01" + message + b"\xad\x06abcd").root == "/r"


def test_the_bundle_keeps_them(tmp_path: Path) -> None:
    assert from_bundle(str(tmp_path)).values() == Options().values()
    write_options(str(tmp_path), Options().update(RUNC).values())
    assert from_bundle(str(tmp_path)).values() == RUNC
    # What Go's shim writes leaves out what is not set.
    (tmp_path / "options.json").write_text('{"binary_name":"crun","systemd_cgroup":true}')
    options = from_bundle(str(tmp_path))
    assert (options.binary_name, options.systemd_cgroup, options.root) == ("crun", True, "")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"root":1}'])
def test_a_spoilt_file_is_the_defaults(tmp_path: Path, text: str) -> None:
    (tmp_path / "options.json").write_text(text)
    assert from_bundle(str(tmp_path)).values() == Options().values()
