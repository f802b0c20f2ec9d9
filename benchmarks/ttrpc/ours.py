"""The echo server of the benchmark on shimcore's: PROGRAM [--same] serve PATH. Ends when its stdin does.

Its handler makes a message anew, with a copy of the value. --same: it answers with the message that it was asked with; Go's and
Rust's handlers hand the value on without a copy, too.
"""

import os
import socket
import sys
import threading

from google.protobuf.wrappers_pb2 import BytesValue

from shimcore._reaper import Core
from shimcore._ttrpc import INLINE, Context, Server


def echo(request: BytesValue, context: Context) -> BytesValue:
    return BytesValue(value=request.value)


def same(request: BytesValue, context: Context) -> BytesValue:
    return request


def until_stdin_ends() -> None:
    while os.read(0, 4096):
        pass
    os._exit(0)


def main() -> None:
    core = Core("bench", "")
    server = Server(core)
    *flags, _, path = sys.argv[1:]
    server.add_service("bench.Echo", {"Echo": (INLINE, same if "--same" in flags else echo, BytesValue)})
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(128)
    server.add_listener(listener.detach())
    threading.Thread(target=server.run, daemon=True).start()
    threading.Thread(target=until_stdin_ends, daemon=True).start()
    print("ok", flush=True)
    core.run()


if __name__ == "__main__":
    main()
