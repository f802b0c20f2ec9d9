"""The files of the project that `shimcore new` makes. $name: as given; $module, $cls and the rest: made of it."""

from __future__ import annotations

import keyword
import os
import re
from pathlib import Path
from string import Template

from .. import __version__

# What may stand between the dots of a runtime's name, and be a Python module's once its dashes are underscores.
_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
NAME_MAX = 40

SHIM = '''\
"""$runtime: runc's shim, and what `edit` does to each container before runc makes it."""

from __future__ import annotations

import os
from typing import Any

from shimcore import run, util
from shimcore.jobs import in_pool
from shimcore.oci.service import RuncTask
from shimcore.oci.shim import RuncShim

RUNTIME_ID = "$runtime"


class ${stem}Task(RuncTask):
    """One method for each RPC of containerd's Task API; those that are not written here are runc's."""

    def edit(self, spec: dict[str, Any]) -> None:
        """Yours: change the container's config.json, of which `spec` is the content.

        What there is in it: https://github.com/opencontainers/runtime-spec/blob/main/config.md
        An error raised here fails the container's creation, and its text reaches the user.
        """
        spec["process"].setdefault("env", []).append("SHIM=$name")

    async def create(self, request, context):
        await in_pool(self._rewrite, request.bundle)  # files are not for the thread that answers RPCs
        return await super().create(request, context)

    def _rewrite(self, bundle: str) -> None:
        spec = util.read_spec(bundle)
        self.edit(spec)
        util.write_str_to_file(os.path.join(bundle, "config.json"), util.json_dumps(spec))


class $cls(RuncShim):
    def task_class(self):
        return ${stem}Task


def main() -> None:
    run(RUNTIME_ID, "$module:$cls")


if __name__ == "__main__":
    main()
'''

CONFTEST = '''\
"""The fixtures are shimcore.testing's: see its docstring for all of them."""

from pathlib import Path

import pytest

pytest_plugins = ["shimcore.testing"]


@pytest.fixture(scope="session")
def shim(install_shim):
    return install_shim("$module:$cls", "$runtime", Path(__file__).resolve().parent.parent)
'''

TESTS = '''\
"""The shim with real containers, without containerd. Needs root, runc and a static busybox."""

import pytest

from shimcore.errors import ShimError


def test_a_container(rig):
    container = rig.container(["sh", "-c", "echo hello from $$SHIM; exit 3"])
    assert container.run() == 3
    assert container.output == "hello from $name\\n"
    exited = rig.events.wait("/tasks/exit", container=container.id)
    assert exited.message.exit_status == 3
    container.delete()


def test_a_command_that_is_not_there(rig):
    container = rig.container(["/no/such/command"])
    with pytest.raises(ShimError, match="no/such/command"):
        container.run()
    container.end()
'''

PYPROJECT = """\
[build-system]
requires = ["setuptools>=70"]
build-backend = "setuptools.build_meta"

[project]
name = "$name-shim"
version = "0.1.0"
description = "A containerd shim: $runtime"
requires-python = ">=3.11"
dependencies = ["shimcore>=$version"]

[project.optional-dependencies]
dev = ["shimcore[cli,testing]"]

# containerd makes this name of the runtime's, and looks for it on its PATH.
[project.scripts]
$binary = "$module:main"

[tool.setuptools]
py-modules = ["$module"]

[tool.pytest.ini_options]
testpaths = ["tests"]
"""

README = """\
# $name

A containerd shim, `$runtime`, made with shimcore.
What it does to each container is `${stem}Task.edit` in [$module.py]($module.py).

```console
pip install -e '.[dev]'
pytest    # as root, with runc and busybox-static
shimcore run --shim $binary -- sh -c 'echo hello from $$SHIM'
shimcore install --runtime-id $runtime $module:$cls    # into /usr/local/bin, for containerd
ctr run --rm --runtime $runtime IMAGE NAME COMMAND
```
"""

IGNORED = """\
__pycache__/
*.egg-info/
build/
dist/
.venv/
.pytest_cache/
"""


class Project:
    """Names of a new project: name, module, cls, stem, runtime, binary.

    Raises ValueError for a name that no runtime could have.
    """

    def __init__(self, name: str) -> None:
        if not _NAME.fullmatch(name) or len(name) > NAME_MAX:
            raise ValueError(
                f"{name!r} can't be a shim's name: lower-case letters and digits, single dashes between them, a letter first, "
                f"{NAME_MAX} at most"
            )
        self.name = name
        self.module = name.replace("-", "_") + "_shim"
        self.stem = "".join(part.capitalize() for part in name.split("-"))
        self.cls = self.stem + "Shim"
        self.runtime = f"io.containerd.{name}.v1"
        self.binary = f"containerd-shim-{name}-v1"
        assert self.cls.isidentifier() and not keyword.iskeyword(self.module)

    def files(self) -> dict[str, str]:
        """Path to text of each file."""
        words = {**vars(self), "version": __version__}
        texts = {
            f"{self.module}.py": SHIM,
            "tests/conftest.py": CONFTEST,
            "tests/test_shim.py": TESTS,
            "pyproject.toml": PYPROJECT,
            "README.md": README,
            ".gitignore": IGNORED,
        }
        return {path: Template(text).substitute(words) for path, text in texts.items()}

    def write(self, folder: Path) -> list[Path]:
        """Makes the folder, which must be empty or not exist, and writes the files. Raises OSError."""
        if folder.exists() and (not folder.is_dir() or os.listdir(folder)):
            raise FileExistsError(f"{folder} is there already and is not an empty folder")
        written = []
        for name, text in self.files().items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            written.append(path)
        return written
