"""Our side of the interop checks: PROGRAM serve PATH, which ends when its stdin does, and PROGRAM call PATH CHECK, which prints
ok or what was wrong."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from google.protobuf import wrappers_pb2
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import Default
from google.protobuf.wrappers_pb2 import BytesValue

from shimcore import task
from shimcore.errors import DeadlineExceeded, FailedPrecondition, ShimError, from_code
from shimcore.ttrpc import Client, Server

SERVICE = "interop.Peer"
METHODS = {
    "Echo": (False, False), "Fail": (False, False), "Metadata": (False, False), "Timeout": (False, False),
    "Sleep": (False, False), "Sum": (True, False), "Count": (False, True), "Chat": (True, True),
}  # name -> (the client streams, the server does)
CALLERS, CALLS = 32, 50


def descriptor() -> Any:
    value = f".{BytesValue.DESCRIPTOR.full_name}"
    file = FileDescriptorProto(name="interop.proto", package="interop", syntax="proto3")
    file.dependency.append(wrappers_pb2.DESCRIPTOR.name)
    service = file.service.add(name="Peer")
    for name, (client, server) in METHODS.items():
        service.method.add(name=name, input_type=value, output_type=value, client_streaming=client, server_streaming=server)
    Default().Add(file)
    return Default().FindServiceByName(SERVICE)


def message(text: str) -> BytesValue:
    return BytesValue(value=text.encode())


class Peer:
    @task.inline
    def echo(self, request: BytesValue, context: Any) -> BytesValue:
        return BytesValue(value=request.value)

    def fail(self, request: BytesValue, context: Any) -> BytesValue:
        code, _, text = request.value.decode().partition(" ")
        raise from_code(int(code), text)

    def metadata(self, request: BytesValue, context: Any) -> BytesValue:
        return message(",".join(context.get_all(request.value.decode())))

    def timeout(self, request: BytesValue, context: Any) -> BytesValue:
        return message("none" if context.remaining is None else str(int(context.remaining * 1000)))

    def sleep(self, request: BytesValue, context: Any) -> BytesValue:
        time.sleep(int(request.value) / 1000)
        return request

    def sum(self, requests: Iterator[BytesValue], context: Any) -> BytesValue:
        lengths = [len(request.value) for request in requests]
        return message(f"{len(lengths)} {sum(lengths)}")

    def count(self, request: BytesValue, context: Any) -> Iterator[BytesValue]:
        for number in range(int(request.value)):
            yield message(str(number))

    def chat(self, requests: Iterator[BytesValue], context: Any) -> Iterator[BytesValue]:
        for request in requests:
            if request.value == b"fail":
                raise FailedPrecondition("as asked")
            yield request


def expect(got: Any, want: Any) -> None:
    if got != want:
        raise AssertionError(f"got {got!r:.200}, not {want!r:.200}")


class Checks:
    """Each method is a check."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def _ask(self, method: str, text: str = "", **options: Any) -> str:
        return self._client.call(SERVICE, method, message(text), BytesValue, **options).value.decode()

    def _stream(self, method: str, request: BytesValue | None = None) -> Any:
        client, server = METHODS[method]
        return self._client.stream(SERVICE, method, request, BytesValue, client_streams=client, server_streams=server)

    def unary(self) -> None:
        expect(self._ask("Echo", "hello"), "hello")

    def empty(self) -> None:
        expect(self._ask("Echo"), "")

    def megabyte(self) -> None:
        text = "0123456789abcdef" * (1 << 16)
        expect(self._ask("Echo", text), text)

    def _fails(self, code: int, text: str, call: Callable[[], Any]) -> None:
        try:
            got = call()
        except ShimError as error:
            expect((error.code, error.message), (code, text))
        else:
            raise AssertionError(f"got {got!r:.200}, not the status {code}")

    def codes(self) -> None:
        for code in range(1, 17):
            self._fails(code, f"text é {code}", lambda code=code: self._ask("Fail", f"{code} text é {code}"))

    def unknown_method(self) -> None:
        try:
            got = self._ask("Nothing")
        except ShimError as error:
            expect(error.code, 12)
        else:
            raise AssertionError(f"got {got!r}, not a status")

    def metadata(self) -> None:
        expect(self._ask("Metadata", "one", metadata=[("one", "a"), ("Two", "b"), ("one", "c")]), "a,c")

    def timeout(self) -> None:
        expect(self._ask("Timeout"), "none")
        left = self._ask("Timeout", timeout=60)
        expect(0 < int(left) <= 60000 or left, True)

    def deadline(self) -> None:
        try:
            got = self._ask("Sleep", "500", timeout=0.05)
        except DeadlineExceeded:
            expect(self._ask("Echo", "after"), "after")
        else:
            raise AssertionError(f"got {got}, not a timeout")

    def many(self) -> None:
        wrong: list[BaseException] = []

        def caller(number: int) -> None:
            try:
                for call in range(CALLS):
                    text = f"{number} {call} " * (number * 10 + 1)
                    expect(self._ask("Echo", text), text)
            except BaseException as error:
                wrong.append(error)

        threads = [threading.Thread(target=caller, args=(number,)) for number in range(CALLERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if wrong:
            raise wrong[0]

    def client_streams(self, messages: int = 100, want: str = "100 4950") -> None:
        with self._stream("Sum") as stream:
            for number in range(messages):
                stream.send(BytesValue(value=bytes(number)))
            stream.close_send()
            expect([answer.value.decode() for answer in stream], [want])

    def client_streams_nothing(self) -> None:
        self.client_streams(0, "0 0")

    def server_streams(self) -> None:
        with self._stream("Count", message("100")) as stream:
            expect([int(answer.value) for answer in stream], list(range(100)))

    def both_stream(self) -> None:
        with self._stream("Chat") as stream:
            self._chat(stream)
            stream.close_send()
            expect(stream.receive(), None)

    def stream_fails(self) -> None:
        with self._stream("Chat") as stream:
            self._chat(stream)
            stream.send(message("fail"))
            self._fails(9, "as asked", stream.receive)

    def _chat(self, stream: Any) -> None:
        for number in range(100):
            sent = message(f"message {number}")
            stream.send(sent)
            expect(stream.receive(), sent)


CHECKS = [name for name in vars(Checks) if not name.startswith("_")]
STREAMED = CHECKS[CHECKS.index("client_streams"):]


def main() -> int:
    if sys.argv[1] == "serve":
        with Server() as server:
            server.register(descriptor(), Peer())
            server.listen(sys.argv[2])
            server.start()
            print("ok", flush=True)
            sys.stdin.read()
        return 0
    try:
        with Client(sys.argv[2]) as client:
            getattr(Checks(client), sys.argv[3])()
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
        return 1
    print("ok")
    return 0


if __name__ == "__main__":
    sys.exit(main())
