"""The compiled half of shimcore: everything else about the build is in pyproject.toml.

The C core is built once, as a static library with strict warnings, and linked into the modules:
warnings about Cython's own C can't hide ours then. A module exports its init function and nothing else
(-fvisibility=hidden).
"""

from __future__ import annotations

import os
from glob import glob

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import LinkError

CORE = sorted(glob("shimcore/core/*.c"))
HEADERS = sorted(glob("shimcore/core/*.h"))
PROGRAMS = {
    "launcher": ["shimcore/launcher/launcher.c"],
    "pause": ["shimcore/launcher/pause.c"],
    "fake-runtime": ["shimcore/rig/fake_runtime.c", "shimcore/rig/fake_parts.h"],
}

# Empty, as a source file's own #define would have it: a different value would be a warning.
MACROS = [("_GNU_SOURCE", "")]
FLAGS = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-fvisibility=hidden", "-pthread", "-fPIC"]
if os.environ.get("SHIMCORE_WERROR") == "1":  # not by CI: that may be anybody's, with a compiler that we have not seen
    FLAGS.append("-Werror")


def module(name: str) -> Extension:
    return Extension(
        f"shimcore.{name}",
        [f"shimcore/{name}.pyx"],
        include_dirs=["shimcore/core"],
        depends=[*CORE, *HEADERS],
        extra_compile_args=["-O2", "-fvisibility=hidden", "-pthread"],
        extra_link_args=["-pthread"],
    )


class BuildExt(build_ext):
    """Also the programs, into shimcore/_bin: a static one starts in half the time, but not every libc comes as an archive."""

    def run(self) -> None:
        super().run()
        folder = os.path.join("" if self.inplace else self.build_lib, "shimcore", "_bin")
        for name, files in PROGRAMS.items():
            path, new = os.path.join(folder, name), os.path.join(folder, f"{name}.new")
            if os.path.exists(path) and os.path.getmtime(path) > max(map(os.path.getmtime, [__file__, *files])):
                continue
            objects = self.compiler.compile(files[:1], output_dir=self.build_temp, macros=MACROS, extra_postargs=FLAGS)
            try:
                self.compiler.link_executable(objects, new, extra_postargs=["-static"])
            except LinkError:
                self.compiler.link_executable(objects, new)
            os.replace(new, path)  # in one step: somebody may be running it


LIBRARY = {"sources": CORE, "macros": MACROS, "include_dirs": ["shimcore/core"], "cflags": FLAGS, "obj_deps": {"": HEADERS}}

setup(
    cmdclass={"build_ext": BuildExt},
    libraries=[("shimcore_core", LIBRARY)],
    ext_modules=cythonize([module(name) for name in ("_reaper", "_ttrpc", "_frames")], language_level=3),
    options={"build_ext": {"parallel": os.cpu_count() or 1}},
)
