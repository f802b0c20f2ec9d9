"""Where a call's trace context goes: environments, calls to others, and what an asyncio server makes of it."""

from __future__ import annotations

import asyncio
import gc
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.wrappers_pb2 import BytesValue

from shimcore import jobs, logger, trace
from shimcore._ttrpc import COROUTINE, INLINE, POOL, Context
from shimcore.rig import Rig as RealRig
from shimcore.rig.task import Task
from shimcore.ttrpc import Client, aio
from tests.served import HANG, Rig, call, rig
from tests.test_trace import ID, METADATA, OTHER, PARENT, SPAN, log, seen

__all__ = ["log", "rig"]



def test_the_environment() -> None:
    def within(metadata: list[tuple[str, str]], env: dict[str, str] | None) -> Any:
        token = trace.calling.set(trace.of(metadata))
        try:
            return trace.environ(env)
        finally:
            trace.calling.reset(token)

    env = {"A": "b", "TRACEPARENT": "old", "TRACESTATE": "old"}
    assert within([], env) is env
    assert within([], None) is os.environ
    assert within(METADATA, env) == {"A": "b", "TRACEPARENT": PARENT, "TRACESTATE": "a=1,b=2"}
    assert within(METADATA[:1], env) == {"A": "b", "TRACEPARENT": PARENT}
    assert within(METADATA, None) == {**os.environ, "TRACEPARENT": PARENT, "TRACESTATE": "a=1,b=2"}


@pytest.mark.parametrize("asked", [True, False])
def test_a_job_has_it_when_it_is_asked_for(rig: Rig, asked: bool) -> None:
    async def run(request: BytesValue, context: Context) -> BytesValue:
        await jobs.sleep(0)
        done = await jobs.run_job(["/usr/bin/env"], timeout=HANG, env={"A": "b"}, trace=asked)
        return BytesValue(value=done.output)

    rig.add("Run", COROUTINE, run)
    rig.start()
    with rig.client() as client:
        traced = {"A=b", f"TRACEPARENT={PARENT}", "TRACESTATE=a=1,b=2"}
        assert set(call(client, "Run", metadata=METADATA).decode().split()) == (traced if asked else {"A=b"})
        assert call(client, "Run").decode().split() == ["A=b"]


def test_a_client_forwards_it(rig: Rig) -> None:
    """A shim that asks another server for each call: `Pass` calls `See` of the same server."""
    clients: list[Client] = []

    def see(request: BytesValue, context: Context) -> BytesValue:
        return BytesValue(value=repr(context.metadata).encode())

    def ask(metadata: list[tuple[str, str]]) -> Callable[[BytesValue, Context], BytesValue]:
        def handler(request: BytesValue, context: Context) -> BytesValue:
            return BytesValue(value=call(clients[0], "See", metadata=metadata))

        return handler

    rig.add("See", INLINE, see)
    rig.add("Pass", POOL, ask([]))
    rig.add("Other", POOL, ask([("traceparent", OTHER)]))
    rig.start()
    with rig.client() as client, Client(rig.path, namespace="ns", interceptors=[trace.forward]) as forwards:
        clients.append(forwards)
        namespace = ("containerd-namespace-ttrpc", "ns")
        assert call(client, "Pass", metadata=METADATA) == repr([namespace, *METADATA]).encode()
        assert call(client, "Pass") == repr([namespace]).encode()
        assert call(client, "Other", metadata=METADATA) == repr([namespace, ("traceparent", OTHER)]).encode()
        assert call(forwards, "See") == repr([namespace]).encode()


def test_asyncio_sees_logs_and_forwards_it(session_root: Path, log: logger.Logger, tmp_path: Path) -> None:
    file = descriptor_pb2.FileDescriptorProto(name="tests/traced.proto", package="traced", syntax="proto3")
    file.dependency.append("google/protobuf/wrappers.proto")
    service = file.service.add(name="Traced")
    for name in "See", "Blocks", "Passes":
        service.method.add(name=name, input_type=".google.protobuf.BytesValue", output_type=".google.protobuf.BytesValue")
    described = descriptor_pool.Default().AddSerializedFile(file.SerializeToString()).services_by_name["Traced"]

    class Traced:
        client: aio.Client

        async def see(self, request: BytesValue, context: aio.Context) -> BytesValue:
            await asyncio.sleep(0)
            logger.info("seen")
            return BytesValue(value=seen(context.trace) + b"|" + seen(trace.current()))

        def blocks(self, request: BytesValue, context: aio.Context) -> BytesValue:
            logger.info("on a thread")
            return BytesValue(value=seen(context.trace) + b"|" + seen(trace.current()))

        async def passes(self, request: BytesValue, context: aio.Context) -> BytesValue:
            return await self.client.call("traced.Traced", "See", b"", BytesValue, HANG)

    async def main() -> None:
        path = str(session_root / "traced.sock")
        implementation = Traced()
        async with aio.Server() as server:
            server.register(described, implementation)
            await server.listen(path)
            async with aio.Client(path, interceptors=[trace.forward]) as client:
                implementation.client = client

                def ask(name: str, metadata: list[tuple[str, str]]) -> Any:
                    return client.call("traced.Traced", name, b"", BytesValue, HANG, metadata)

                there = f"{PARENT} a=1,b=2".encode()
                other = f"{OTHER} ".encode()
                names = "See", "Blocks", "Passes"
                answers = await asyncio.gather(
                    *(ask(name, METADATA) for name in names),
                    *(ask(name, [("traceparent", OTHER)]) for name in names),
                    *(ask(name, []) for name in names),
                )
                wanted = [there + b"|" + there] * 3 + [other + b"|" + other] * 3 + [b"none|none"] * 3
                assert [one.value for one in answers] == wanted

    asyncio.run(main())
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == 9
    assert sum(f'trace="{ID}-{SPAN}"' in line for line in lines) == sum(' trace="1' in line for line in lines) == 3


def test_a_task_that_outlives_its_call_does_not_keep_it(session_root: Path) -> None:
    file = descriptor_pb2.FileDescriptorProto(name="tests/outlived.proto", package="outlived", syntax="proto3")
    file.dependency.append("google/protobuf/wrappers.proto")
    text = ".google.protobuf.BytesValue"
    file.service.add(name="Outlived").method.add(name="Begin", input_type=text, output_type=text)
    described = descriptor_pool.Default().AddSerializedFile(file.SerializeToString()).services_by_name["Outlived"]
    contexts: list[weakref.ref[aio.Context]] = []
    tasks: list[asyncio.Task[bytes]] = []

    class Outlived:
        over: asyncio.Event

        async def begin(self, request: BytesValue, context: aio.Context) -> BytesValue:
            contexts.append(weakref.ref(context))
            tasks.append(asyncio.create_task(self.goes_on()))
            return BytesValue()

        async def goes_on(self) -> bytes:
            await self.over.wait()
            return seen(trace.current())

    async def main() -> None:
        path = str(session_root / "outlived.sock")
        implementation = Outlived()
        implementation.over = asyncio.Event()
        async with aio.Server() as server:
            server.register(described, implementation)
            await server.listen(path)
            async with aio.Client(path) as client:
                await client.call("outlived.Outlived", "Begin", b"", BytesValue, HANG, METADATA)
        gc.collect()
        assert contexts[0]() is None
        implementation.over.set()
        assert await tasks[0] == f"{PARENT} a=1,b=2".encode()

    asyncio.run(main())


RUNTIME = """#!/bin/sh
for word; do case $word in create|start|kill|delete) env | grep ^TRACE | sed "s/^/$word /" >>{folder}/seen; esac; done
exec runc "$@"
"""
LOGGER = """#!/bin/sh
env | cut -d= -f1 | grep -v -e ^PWD -e ^OLDPWD -e ^SHLVL -e ^_ | sort >{folder}/logger
exec 5>&-
cat <&3 >{folder}/stdout
"""


@pytest.mark.parametrize("asked", [True, False])
def test_runc_has_it_where_that_is_asked_for_and_nobody_else(
    shim_dir: Path, rootfs: Path, tmp_path: Path, asked: bool
) -> None:
    """Not the container, and not its logger, whose environment is containerd's contract (CONTAINER_ID, CONTAINER_NAMESPACE)."""
    for name, text in ("runtime", RUNTIME), ("logger", LOGGER):
        (tmp_path / name).write_text(text.format(folder=tmp_path))
        (tmp_path / name).chmod(0o755)
    env = {"SHIMCORE_TRACE_ENV": "1"} if asked else {}
    shim = shim_dir / "containerd-shim-runc-v2-py"
    with RealRig(shim, rootfs=rootfs, runtime=str(tmp_path / "runtime"), env=env) as real:
        container = real.container(["sh", "-c", "env"])
        with Client(container.started.address, namespace=real.namespace, metadata=METADATA) as client:
            task = Task(client, container.id, version=container.started.version)
            uri = f"binary://{tmp_path}/logger"
            task.create(str(container.bundle.path), stdout=uri, stderr=uri, options=real.options)
            task.start()
            assert container.wait() == 0  # whose caller sends no trace
            task.delete()
    lines = [f"TRACEPARENT={PARENT}", "TRACESTATE=a=1,b=2"] if asked else []
    told = (tmp_path / "seen").read_text().splitlines() if (tmp_path / "seen").exists() else []
    for command in "create", "start":
        assert sorted(line.partition(" ")[2] for line in told if line.startswith(f"{command} ")) == lines
    assert (tmp_path / "logger").read_text().split() == ["CONTAINER_ID", "CONTAINER_NAMESPACE"]
    assert "PATH=" in (tmp_path / "stdout").read_text() and "TRACE" not in (tmp_path / "stdout").read_text()
