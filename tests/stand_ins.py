"""Programs for whoever plays the documents: this checkout in the place of an installed shimcore, and what can't be run here.

pip is the real one, without its network: what it finds is a wheel that leads to this checkout. A stub only writes down what it
was called with, for the test to judge.
"""

from __future__ import annotations

import json
import os
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

from shimcore import __version__
from tests.pages import ROOT
from tests.test_deploy import wheel

PIP = {
    "PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_ROOT_USER_ACTION": "ignore",
    "PIP_NO_BUILD_ISOLATION": "0",  # which turns isolation off: pip's options of this kind say the opposite there
}  # fmt: skip

PYTHON3 = """\
#!/bin/sh
# python3 -m venv DIR: quickly, as pip comes from outside.
{python} "$@" $([ "$2" = venv ] && echo --without-pip) || exit
for folder; do :; done
[ "$2" != venv ] || cp {pip} "$folder/bin/pip"
"""
PIP_OF = """\
#!/bin/sh
exec {python} -m pip --python "${{0%/*}}/python" "$@"
"""
STUB = """\
#!{python} -IS
import json, sys
with open({calls!r}, "a") as file:
    print(json.dumps(sys.argv[1:]), file=file)
"""


class Tools:
    """A folder of programs for a reader's PATH. env: the reader's environment; wheels: the folder that pip looks into."""

    def __init__(self, folder: Path, *more: Path) -> None:
        self.folder = folder / "tools"
        self.wheels = folder / "found"
        for one in (self.folder, self.wheels):
            one.mkdir()
        self.wheel = self._wheel()
        path = [str(self.folder), *map(str, more), os.environ["PATH"]]
        self.env = {"PATH": os.pathsep.join(path), "HOME": str(folder), "PIP_FIND_LINKS": str(self.wheels), **PIP}
        here = f"#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable}"
        self.program("python", f'{here} "$@"\n')
        self.program("shimcore", f'{here} -m shimcore.cli "$@"\n')
        pip = folder / "pip"
        pip.write_text(PIP_OF.format(python=sys.executable))
        pip.chmod(0o755)
        self.program("python3", PYTHON3.format(python=sys.executable, pip=pip))

    def _wheel(self) -> Path:
        """One that leads to this checkout and what it needs, with the commands that pip would make."""
        wheel(self.wheels, "shimcore", __version__, f"{ROOT}\n{sysconfig.get_path('purelib')}")
        (path,) = self.wheels.iterdir()
        scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
        lines = [f"{name} = {call}" for name, call in {**scripts, "pytest": "pytest:console_main"}.items()]
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(f"shimcore-{__version__}.dist-info/entry_points.txt", "\n".join(["[console_scripts]", *lines, ""]))
        return path

    def program(self, name: str, text: str) -> None:
        path = self.folder / name
        path.write_text(text)
        path.chmod(0o755)

    def stub(self, *names: str) -> None:
        for name in names:
            self.program(name, STUB.format(python=sys.executable, calls=str(self.folder / f"{name}.calls")))

    def calls(self, name: str) -> list[list[str]]:
        """The words of each call of a stub."""
        path = self.folder / f"{name}.calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
