"""Reading the exit ledger that the core writes into a bundle (core/ledger.h states the format).

`delete` asks it what a shim that is gone knew: how each process ended, and when. A record that is torn, the last one of a shim
that was killed in mid-write, ends the reading and is no error.
"""

from __future__ import annotations

import os
from binascii import crc32

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

FILE_NAME: Final = "exits.ledger"
_MAGIC = b"SCL1"
_HEAD = 12
_FIXED = 20
_SIZE_MAX = 64 << 20


class Exit:
    """One exit: container_id, exec_id ("" for init), pid, exit_status (0 to 255), exited_at (ns since the epoch)."""

    __slots__ = ("container_id", "exec_id", "exit_status", "exited_at", "pid")

    def __init__(self, container_id: str, exec_id: str, pid: int, exit_status: int, exited_at: int) -> None:
        self.container_id = container_id
        self.exec_id = exec_id
        self.pid = pid
        self.exit_status = exit_status
        self.exited_at = exited_at

    def __repr__(self) -> str:
        name = f"{self.container_id!r}, {self.exec_id!r}"
        return f"Exit({name}, pid={self.pid}, exit_status={self.exit_status}, at={self.exited_at})"


def parse(data: bytes) -> list[Exit]:
    """Every whole record, in the order of writing."""
    out: list[Exit] = []
    at = 0
    while len(data) - at >= _HEAD + _FIXED and data[at : at + 4] == _MAGIC:
        size = int.from_bytes(data[at + 4 : at + 6], "little")
        body = data[at + _HEAD : at + _HEAD + size]
        if len(body) != size or size < _FIXED or crc32(body) != int.from_bytes(data[at + 8 : at + 12], "little"):
            break
        id_len = int.from_bytes(body[16:18], "little")
        exec_len = int.from_bytes(body[18:20], "little")
        if _FIXED + id_len + exec_len != size:
            break
        ids = body[_FIXED:]
        out.append(
            Exit(
                os.fsdecode(ids[:id_len]),
                os.fsdecode(ids[id_len:]),
                int.from_bytes(body[0:4], "little"),
                int.from_bytes(body[4:8], "little"),
                int.from_bytes(body[8:16], "little", signed=True),
            )
        )
        at += _HEAD + size
    return out


def read(bundle: str = ".") -> list[Exit]:
    """The exits recorded in a bundle; none when it has no ledger. Raises OSError."""
    try:
        with open(os.path.join(bundle, FILE_NAME), "rb", buffering=0) as file:
            return parse(file.read(_SIZE_MAX) or b"")
    except FileNotFoundError:
        return []


def last_exit(container_id: str, exec_id: str = "", bundle: str = ".") -> Exit | None:
    """How a process ended, as its shim recorded it, or None when it did not. Raises OSError."""
    found = [e for e in read(bundle) if e.container_id == container_id and e.exec_id == exec_id]
    return found[-1] if found else None
