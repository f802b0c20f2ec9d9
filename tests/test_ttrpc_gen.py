"""The modules that shimcore.ttrpc.gen makes, and stubs without any: what they say, what mypy says of them, what they do."""

from __future__ import annotations

import asyncio
import importlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from shimcore import ttrpc
from shimcore.errors import NotFound, Unimplemented
from shimcore.ttrpc import gen
from tests.checked import PROGRAMS, errors, marked, mypy, stubtest
from tests.served import HANG

pytest.importorskip("grpc_tools")

PROTOS = Path(__file__).resolve().parent / "protos"
FILES = [str(PROTOS / "depot" / name) for name in ("store.proto", "item-types.proto")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    assert gen.main([*FILES, "-I", str(PROTOS), "--out", str(folder), "--messages"]) == 0
    return folder


@pytest.fixture(scope="module")
def program(made: Path) -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(made))
        patch.syspath_prepend(str(PROGRAMS))
        yield importlib.import_module("generated")


@pytest.fixture
def address(session_root: Path) -> str:
    return f"unix://{session_root}/gen-{time.monotonic_ns()}.sock"


# ---- the text ----


def test_a_module_is_made_for_each_file_with_services(made: Path) -> None:
    names = sorted(path.name for path in (made / "depot").iterdir() if path.is_file())
    assert names == [
        "item_types_pb2.py", "item_types_pb2.pyi", "store_pb2.py", "store_pb2.pyi", "store_ttrpc.py", "store_ttrpc.pyi",
    ]  # fmt: skip


def test_every_run_makes_the_same(made: Path, tmp_path: Path) -> None:
    ascii = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment = {**os.environ, **ascii, "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-m", "shimcore.ttrpc.gen", "depot/store.proto", "--out", str(tmp_path)]
    subprocess.run(command, cwd=PROTOS, env=environment, check=True, timeout=HANG)
    assert sorted(path.name for path in (tmp_path / "depot").iterdir()) == ["store_ttrpc.py", "store_ttrpc.pyi"]
    for path in (tmp_path / "depot").iterdir():
        assert path.read_text() == (made / "depot" / path.name).read_text()


def test_comments_become_docstrings(made: Path) -> None:
    found: dict[str, Any] = {"__name__": "stub"}
    text = (made / "depot/store_ttrpc.pyi").read_text()
    head = text.index("class StoreClient")
    exec("from __future__ import annotations\n" + text[head : text.index("class StoreBase")], found)
    client = found["StoreClient"]
    assert client.__doc__ == 'Keeps items.\n\n    Its "quotes", a \\ and """ do no harm.'
    assert client.get_item.__doc__ == "Answers with the item, or NotFound."
    assert client.list_ids.__doc__ == "Lists the ids\n        in order."
    assert client.exchange.__doc__ == "One for one, naïvely."
    assert client.put_all.__doc__ is None


def test_protoc_may_run_it_as_a_plugin(made: Path, tmp_path: Path) -> None:
    program = tmp_path / "plugin"
    program.write_text(f"#!{sys.executable}\nfrom shimcore.ttrpc.gen import plugin\nraise SystemExit(plugin())\n")
    program.chmod(0o755)
    out = tmp_path / "out"
    out.mkdir()
    command = [*gen.compiler(), f"--plugin=protoc-gen-shimcore-ttrpc={program}", f"--shimcore-ttrpc_out={out}", f"-I{PROTOS}"]
    subprocess.run([*command, *FILES], check=True, timeout=HANG)
    assert sorted(path.name for path in (out / "depot").iterdir()) == ["store_ttrpc.py", "store_ttrpc.pyi"]
    for path in (out / "depot").iterdir():
        assert path.read_text() == (made / "depot" / path.name).read_text()
    bad = tmp_path / "bad.proto"
    bad.write_text(proto("rpc _Hidden(M) returns (M);"))
    done = subprocess.run([*command, f"-I{tmp_path}", str(bad)], capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 1 and "would be private in Python" in done.stderr


def test_check_names_what_differs(made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    command = [*FILES, "-I", str(PROTOS), "--out", str(tmp_path), "--messages", "--check"]
    assert gen.main(command) == 0
    (tmp_path / "depot/store_ttrpc.py").write_text("")
    (tmp_path / "depot/item_types_pb2.pyi").unlink()
    assert gen.main(command) == 1
    assert sorted(capfd.readouterr().err.splitlines()) == [
        f"differs: {tmp_path}/depot/store_ttrpc.py", f"missing: {tmp_path}/depot/item_types_pb2.pyi",
    ]  # fmt: skip
    assert (tmp_path / "depot/store_ttrpc.py").read_text() == ""


# ---- what can't be made ----


def proto(rpcs: str, head: str = "", message: str = "message M {}") -> str:
    return f'syntax = "proto3";\npackage bad;\n{head}\nservice S {{ {rpcs} }}\n{message}\n'


GOOD = "rpc Get(M) returns (M);"


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("x.proto", proto("rpc Get(M returns (M);"), 'x.proto:4:23: Expected ")".'),
        ("x.proto", 'syntax = "proto3";\nmessage M {}\n', "no service in {}"),
        ("x.proto", proto(GOOD, 'import "gone.proto";'), "gone.proto: File not found."),
        ("x.proto", proto("rpc Get(Gone) returns (M);"), '"Gone" is not defined'),
        ("x.proto", proto("rpc CloseIO(M) returns (M); rpc CloseIo(M) returns (M);"),
         "x.proto: bad.S: 2 methods would be named `close_io` in Python"),
        ("x.proto", proto("rpc Import(M) returns (M); rpc Import_(M) returns (M);"),
         "x.proto: bad.S: 2 methods would be named `import_` in Python"),
        ("x.proto", proto("rpc _Get(M) returns (M);"), "x.proto: bad.S: a method named `_get` would be private in Python"),
        ("x.proto", proto("rpc Get(None) returns (None);", "", "message None {}"),
         "x.proto: message bad.None: `None` can't be a name in Python"),
        ("x.proto", proto(GOOD, "service AsyncS {}"), "x.proto: 2 classes would be named `AsyncSClient` in Python"),
        ("import/x.proto", proto(GOOD), "import/x.proto: its module would be import.x_pb2, and `import` can't"),
        ("3d.proto", proto(GOOD), "3d.proto: its module would be 3d_pb2, and `3d_pb2` can't be a name in Python"),
    ],
)  # fmt: skip
def test_what_can_not_be_made(tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, text: str, error: str) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    assert gen.main([str(file), "-I", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    told = capfd.readouterr().err
    assert error.format(file) in told and told.splitlines()[-1].startswith("gen: ")
    assert not (tmp_path / "out").exists()


def test_files_that_are_not_there(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert gen.main([f"{tmp_path}/gone.proto", "-I", str(tmp_path)]) == 1
    assert gen.main([FILES[0], "-I", str(tmp_path)]) == 1
    (tmp_path / "file").touch()
    assert gen.main([FILES[0], "-I", str(PROTOS), "--out", f"{tmp_path}/file"]) == 1
    gone, outside, out = capfd.readouterr().err.splitlines()
    assert gone == f"gen: {tmp_path}/gone.proto: no such file"
    assert outside == f"gen: {FILES[0]}: in none of the folders given by -I ({tmp_path})"
    assert out.startswith("gen: ") and out.endswith(f"Not a directory: '{tmp_path}/file/depot'")


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gen.main([FILES[0], "-I", str(PROTOS)]) == 1
    assert capfd.readouterr().err == "gen: no protobuf compiler: install the package grpcio-tools, or put protoc on PATH\n"
    protoc = tmp_path / "protoc"
    protoc.write_text("#!/bin/sh\necho called >&2\nexit 1\n")
    protoc.chmod(0o755)
    assert gen.main([FILES[0], "-I", str(PROTOS)]) == 1
    assert capfd.readouterr().err == "called\ngen: protoc has failed\n"


# ---- types ----


def test_mypy_takes_a_program_over_them(made: Path) -> None:
    pytest.importorskip("mypy")
    assert mypy(PROGRAMS / "generated.py", made) == []
    assert mypy(made / "depot/store_ttrpc.py") == []  # whoever names the file itself


def test_mypy_tells_of_each_mistake(made: Path) -> None:
    pytest.importorskip("mypy")
    wrong = PROGRAMS / "generated_wrong.py"
    assert len(marked(wrong)) > 10
    assert errors(mypy(wrong, made)) == marked(wrong)


def test_the_types_are_those_of_the_code(made: Path) -> None:
    pytest.importorskip("mypy")
    # protobuf's descriptors are of a class that its types do not name.
    assert stubtest(["depot.store_ttrpc"], [r"depot\.store_ttrpc\.(Async)?StoreBase\.DESCRIPTOR"], made) == []


# ---- calls ----


@pytest.mark.parametrize("implementation", ["Blocking", "Coroutines"])
def test_calls_of_every_kind(program: Any, address: str, implementation: str) -> None:
    item, id = program.Item, program.Id
    items = [item(id=id(value=name), content=b"12") for name in ("b", "a")]
    with program.serve(address, getattr(program, implementation)()), ttrpc.Client(address) as client:
        store = program.StoreClient(client)
        summary = program.put(store, items, HANG)
        assert (summary.count, summary.bytes) == (2, 4)
        assert program.names(store, HANG) == ["a", "b"]
        assert program.get(client, "a", HANG) == b"12"
        assert program.swap(store, item(id=id(value="a"), content=b"new"), HANG) == b"12"
        assert program.get(client, "a", HANG) == b"new"
        with pytest.raises(NotFound, match="no item z, u"):
            program.get(client, "z", HANG)
        with pytest.raises(Unimplemented, match=r"depot.v1.Store/Import is not implemented"):
            store.import_(item(), timeout=HANG)


def test_calls_with_asyncio(program: Any, address: str) -> None:
    items = [program.Item(id=program.Id(value=name), content=name.encode()) for name in ("b", "a")]
    answers = asyncio.run(program.with_asyncio(address, items, HANG))
    assert answers == (2, ["a", "b"], b"b", b"b", "depot.v1.Store/Import is not implemented")


def test_a_base_that_nobody_has_written(program: Any, address: str) -> None:
    with program.serve(address, program.StoreBase()), ttrpc.Client(address) as client:
        store = program.StoreClient(client)
        for call in (
            lambda: store.get_item(program.GetItemRequest(), timeout=HANG),
            lambda: store.put_all(timeout=HANG).receive(),
            lambda: store.list_ids(program.Empty(), timeout=HANG).receive(),
            lambda: store.exchange(timeout=HANG).receive(),
        ):
            with pytest.raises(Unimplemented, match=r"depot.v1.Store/[A-Za-z]* is not implemented"):
                call()


def test_a_stub_without_a_generated_module(program: Any, address: str) -> None:
    with program.serve(address, program.Blocking()), ttrpc.Client(address) as client:
        store = ttrpc.stub(program.StoreBase.DESCRIPTOR, client)
        assert store.get_item.request_class is program.GetItemRequest
        item = store.exchange.response_class
        with store.put_all(timeout=HANG) as stream:
            stream.send(item(id={"value": "a"}, content=b"12"))
            stream.close_send()
            assert stream.receive() == store.put_all.response_class(count=1, bytes=2)
        request = store.get_item.request_class(id={"value": "a"})
        assert store.get_item(request, timeout=HANG).content == b"12"
        assert [id.value for id in store.list_ids(program.Empty(), timeout=HANG)] == ["a"]
        with store.exchange(timeout=HANG, metadata={"user": "u"}) as both:
            both.send(item(id={"value": "a"}, content=b"new"))
            assert both.receive().content == b"12"
        with pytest.raises(Unimplemented):
            store.import_(item(), timeout=HANG)


def test_what_a_stub_refuses(program: Any) -> None:
    store: Any = ttrpc.stub(program.StoreBase.DESCRIPTOR, ttrpc.Client.__new__(ttrpc.Client))
    assert repr(store) == "<stub of depot.v1.Store>" and repr(store.get_item) == "<rpc depot.v1.Store/GetItem>"
    with pytest.raises(AttributeError, match=r"Store has no method get \(of: exchange, get_item, import_, list_ids, put_all\)"):
        store.get()
    with pytest.raises(TypeError, match=r"depot.v1.Store/GetItem takes depot.v1.GetItemRequest, not Item"):
        store.get_item(program.Item())
    with pytest.raises(TypeError, match=r"depot.v1.Store/ListIDs takes google.protobuf.Empty, not NoneType"):
        store.list_ids()
    with pytest.raises(TypeError, match=r"depot.v1.Store/PutAll: its client streams"):
        store.put_all(program.Item())
