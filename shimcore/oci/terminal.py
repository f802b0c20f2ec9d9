"""The console socket: how a runtime hands over the terminal that it has made for a process.

The runtime connects to a unix socket and sends one descriptor, the terminal's master, by SCM_RIGHTS (runc's --console-socket,
which crun and youki have too). The socket stands in the bundle and is named through a descriptor of that folder, since a bundle's
path may be longer than the 107 bytes of a socket's address.
"""

from __future__ import annotations

import os

from ..errors import Unknown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket
    from typing import Any

# In a runtime's call the folder of the socket is this descriptor.
FOLDER_FD = 3
TIMEOUT = 5.0  # seconds from the runtime's success to the descriptor, which was sent before


class ConsoleSocket:
    """For the pool, but for path and fds. Close it when the runtime has ended."""

    __slots__ = ("_folder", "_listener", "_name")

    def __init__(self, bundle: str) -> None:
        """Listen. Raises OSError."""
        import _socket

        self._folder = -1
        self._listener: socket | None = None
        # Not by an id of the client's, which may be as long as a file's name can be.
        self._name = f".console-{os.urandom(8).hex()}"
        try:
            self._folder = os.open(bundle, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            self._listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
            self._listener.bind(f"/proc/self/fd/{self._folder}/{self._name}")
            self._listener.listen(1)
        except BaseException:
            self.close()
            raise

    @property
    def path(self) -> str:
        """What to tell the runtime, which has the folder as FOLDER_FD."""
        return f"/proc/self/fd/{FOLDER_FD}/{self._name}"

    @property
    def fds(self) -> dict[int, int]:
        """What the runtime needs of ours."""
        return {FOLDER_FD: self._folder}

    def receive(self) -> int:
        """The terminal's master, after the runtime has said that it has succeeded. Raises Unknown."""
        import _socket

        try:
            listener: Any = self._listener  # accept() is in the heavier module around it
            listener.settimeout(TIMEOUT)
            fd, _ = listener._accept()
            peer = _socket.socket(fileno=fd)
            try:
                peer.settimeout(TIMEOUT)
                _, ancillary, _, _ = peer.recvmsg(4096, _socket.CMSG_SPACE(4 * 4), _socket.MSG_CMSG_CLOEXEC)
            finally:
                peer.close()
        except OSError as error:
            raise Unknown(f"the runtime has sent no terminal: {error}") from None
        masters = [
            int.from_bytes(data[at : at + 4], "little")
            for level, kind, data in ancillary
            if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS
            for at in range(0, len(data) - 3, 4)
        ]
        for extra in masters[1:]:
            os.close(extra)
        if not masters:
            raise Unknown("the runtime has sent no terminal")
        return masters[0]

    def close(self) -> None:
        """Idempotent."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        if self._folder >= 0:
            try:
                os.unlink(self._name, dir_fd=self._folder)
            except OSError:
                pass
            os.close(self._folder)
            self._folder = -1
