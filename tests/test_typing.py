"""What a type checker makes of the public surface: of programs that are right and wrong, and of the .pyi of what is compiled."""

from __future__ import annotations

import ast
import importlib
from types import ModuleType

import pytest

import shimcore
import shimcore.aio
from shimcore import ttrpc
from shimcore.ttrpc import aio
from tests.checked import PROGRAMS, errors, marked, mypy, stubtest

pytest.importorskip("mypy")


@pytest.mark.parametrize("program", ["author", "author_asyncio", "rpc", "rpc_asyncio"])
def test_mypy_takes_a_program_that_is_right(program: str) -> None:
    assert mypy(PROGRAMS / f"{program}.py") == []


def test_mypy_tells_of_each_mistake() -> None:
    wrong = PROGRAMS / "wrong.py"
    assert len(marked(wrong)) > 25
    assert errors(mypy(wrong)) == marked(wrong)


@pytest.mark.parametrize(
    ("program", "package"),
    [("author", shimcore), ("author_asyncio", shimcore.aio), ("rpc", ttrpc), ("rpc_asyncio", aio)],
)
def test_no_public_name_is_left_out(monkeypatch: pytest.MonkeyPatch, program: str, package: ModuleType) -> None:
    path = PROGRAMS / f"{program}.py"
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    assert set(package.__all__) <= names | {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    monkeypatch.syspath_prepend(str(PROGRAMS))
    importlib.import_module(program)  # and what it imports is there


def test_the_stubs_of_compiled_modules_are_true() -> None:
    # Cython gives an object's own constructor no signature; the rest is nobody's to use.
    allowed = [
        r"shimcore\._(ttrpc\.Server|reaper\.Core)\.__init__",
        r"shimcore\._(ttrpc|reaper)\.__(test|pyx_capi)__",
        r"shimcore\._ttrpc\.(intercepted|adapted|current_trace)",
        r"shimcore\._reaper\.SpawnArgs",
    ]
    assert stubtest(["shimcore._ttrpc", "shimcore._reaper"], allowed) == []
