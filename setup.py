"""The compiled half of shimcore: everything else about the build is in pyproject.toml.

The C core is built once, as a static library with strict warnings, and linked into both modules:
warnings about Cython's own C can't hide ours then. A module exports its init function and nothing else
(-fvisibility=hidden).
"""

from __future__ import annotations

import os
from glob import glob

from Cython.Build import cythonize
from setuptools import Extension, setup

CORE = sorted(glob("shimcore/core/*.c"))
HEADERS = sorted(glob("shimcore/core/*.h"))

# Empty, as a source file's own #define would have it: a different value would be a warning.
MACROS = [("_GNU_SOURCE", "")]
FLAGS = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-fvisibility=hidden", "-pthread", "-fPIC"]
if os.environ.get("CI") or os.environ.get("SHIMCORE_WERROR") == "1":
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


setup(
    libraries=[
        (
            "shimcore_core",
            {
                "sources": CORE,
                "macros": MACROS,
                "include_dirs": ["shimcore/core"],
                "cflags": FLAGS,
                "obj_deps": {"": HEADERS},
            },
        )
    ],
    ext_modules=cythonize([module("_reaper"), module("_ttrpc")], language_level=3),
    options={"build_ext": {"parallel": os.cpu_count() or 1}},
)
