"""What a client may ask of the runtime: the options of Create and of `start`, whichever message they come in.

Three messages mean the same thing: containerd.runc.v1.Options (ctr, CRI towards runc's names, any 2.x
client), containerd.linux.runc.CreateOptions (1.6 clients, towards names outside io.containerd.runc*) and
runtimeoptions.v1.Options (CRI, towards names that are not runc's: the admin's TOML section). They are decoded
by hand, since `start` needs shim_cgroup and may not import protobuf.
"""

from __future__ import annotations

from .. import wire
from ..errors import InvalidArgument

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

RUNC_OPTIONS = "containerd.runc.v1.Options"
LINUX_RUNC_OPTIONS = "containerd.linux.runc.CreateOptions"
GENERIC_OPTIONS = "runtimeoptions.v1.Options"

# Field number -> name in Options below, per message. runc.v1 has lost 8 in 2.x; what is not named here is
# skipped.
_RUNC_FIELDS = {
    1: "no_pivot_root", 2: "no_new_keyring", 3: "shim_cgroup", 4: "io_uid", 5: "io_gid", 6: "binary_name",
    7: "root", 8: "criu_path", 9: "systemd_cgroup", 10: "criu_image_path", 11: "criu_work_path",
    12: "task_api_address", 13: "task_api_version",
}  # fmt: skip
_LINUX_FIELDS = {
    1: "no_pivot_root", 8: "no_new_keyring", 9: "shim_cgroup", 10: "io_uid", 11: "io_gid",
    12: "criu_work_path", 13: "criu_image_path",
}  # fmt: skip
_GENERIC_FIELDS = {1: "type_url", 2: "config_path", 3: "config_body"}

# A TOML document names the fields of Go's struct, in any case: BinaryName, SystemdCgroup.
_BY_TOML_KEY = {name.replace("_", ""): name for name in _RUNC_FIELDS.values()}


class Options:
    """containerd.runc.v1.Options; `values()` gives the fields by their proto names."""

    __slots__ = (*_RUNC_FIELDS.values(),)

    def __init__(self) -> None:
        self.no_pivot_root = False
        self.no_new_keyring = False
        self.shim_cgroup = ""
        self.io_uid = 0
        self.io_gid = 0
        self.binary_name = ""
        self.root = ""
        self.criu_path = ""
        self.systemd_cgroup = False
        self.criu_image_path = ""
        self.criu_work_path = ""
        self.task_api_address = ""
        self.task_api_version = 0

    def values(self) -> dict[str, bool | int | str]:
        return {name: getattr(self, name) for name in self.__slots__}

    def update(self, values: Mapping[str, Any]) -> Options:
        """Take the fields that are named; others are left alone. Raises InvalidArgument when a type is
        wrong."""
        for name in self.__slots__:
            if name not in values:
                continue
            value, kind = values[name], type(getattr(self, name))
            # Varints come as int for bool fields; a TOML true for an int field is a mistake of its writer.
            if kind is bool and isinstance(value, int):
                value = bool(value)
            if type(value) is not kind:
                raise InvalidArgument(f"runtime option {name}: {value!r} is not a {kind.__name__}")
            setattr(self, name, value)
        return self


def _named(data: bytes, names: Mapping[int, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    try:
        fields = list(wire.fields(data))
    except ValueError as error:
        raise InvalidArgument(f"runtime options: {error}") from None
    for number, value in fields:
        name = names.get(number)
        if name is None:
            continue
        if isinstance(value, bytes) and name != "config_body":
            try:
                values[name] = value.decode()
            except UnicodeDecodeError:
                raise InvalidArgument(f"runtime option {name}: not UTF-8") from None
        else:
            values[name] = value
    return values


def _from_toml(text: str) -> dict[str, Any]:
    import tomllib

    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidArgument(f"runtime options: {error}") from None
    values = {}
    for key, value in document.items():
        name = _BY_TOML_KEY.get(key.replace("_", "").lower())
        if name is not None:
            values[name] = value
    return values


def _from_generic(data: bytes) -> dict[str, Any]:
    values = _named(data, _GENERIC_FIELDS)
    body = values.get("config_body", b"")
    path = values.get("config_path", "")
    if not isinstance(body, bytes) or not isinstance(path, str):
        raise InvalidArgument("runtime options: not a runtimeoptions.v1.Options")
    if not body and path:
        try:
            with open(path, "rb", buffering=0) as file:
                body = file.readall()
        except OSError as error:
            raise InvalidArgument(f"runtime options: {path}: {error.strerror}") from None
    try:
        return _from_toml(body.decode())
    except UnicodeDecodeError:
        raise InvalidArgument("runtime options: the TOML document is not UTF-8") from None


def from_any(type_url: str, value: bytes) -> Options:
    """The options in an Any; nothing in it, of whatever type, is the defaults.

    It may read the file that a runtimeoptions.v1.Options names, so it belongs on the pool. Raises
    InvalidArgument: a type that is not known, a message or document that can't be read, a value of the wrong
    type."""
    options = Options()
    if not value:
        return options
    kind = type_url.rpartition("/")[2]
    if kind == RUNC_OPTIONS:
        return options.update(_named(value, _RUNC_FIELDS))
    if kind == LINUX_RUNC_OPTIONS:
        return options.update(_named(value, _LINUX_FIELDS))
    if kind == GENERIC_OPTIONS:
        return options.update(_from_generic(value))
    raise InvalidArgument(f"runtime options of the unknown type {type_url!r}")


def from_bundle(bundle: str) -> Options:
    """The options that Create kept in the bundle's options.json, the defaults when there is none or it makes
    no sense: `delete` has to try whatever happened before it."""
    from ..errors import NotFound
    from ..util import read_options

    options = Options()
    try:
        options.update(read_options(bundle))
    except NotFound:
        pass
    except (InvalidArgument, OSError) as error:
        from .. import logger

        logger.warn("options.json of the bundle is not used", error=error)
    return options
