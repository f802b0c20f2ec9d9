"""A C compiler for wheels that are built for another machine than this: zig's, with the target that the environment names.

SHIMCORE_TARGET is zig's name of one, `x86_64-linux-gnu.2.17` say; SHIMCORE_INCLUDE a directory with Python's headers alone.
Called as gcc is, with the flags that the interpreter was built with. Those that hold for its machine only, and directories of
this machine's headers, are left out. Programs are linked with musl whatever the target: it can be linked into them, glibc can't
be.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import ziglang  # type: ignore[import-not-found]

# Of the machine, of its gcc, or of no use in a wheel: debugging symbols make it four times as large.
DROPPED = re.compile(
    r"-(fcf-protection|mbranch-protection|fstack-clash-protection|flto|ffat-lto|fuse-linker|ffile-prefix-map|fdebug-prefix-map"
    r"|fmacro-prefix-map|specs|march|mtune|g$|Wl,-z,relro|Wl,-z,now|Wl,-Bsymbolic-functions|I/usr/|L/usr/).*"
)


def main(arguments: list[str]) -> int:
    target = os.environ["SHIMCORE_TARGET"]
    arch = target.partition("-")[0]
    of_a_program = any(re.search(r"/(launcher|rig)/", one) for one in arguments)
    program = of_a_program if "-c" in arguments else "-shared" not in arguments
    if program:
        target = f"{arch}-linux-musl"
    kept = [one for one in arguments if not DROPPED.fullmatch(one)]
    include = [] if program else ["-I", os.environ["SHIMCORE_INCLUDE"]]
    last = ["-g0"] if "-c" in arguments else ["-s"]
    zig = os.path.join(os.path.dirname(ziglang.__file__), "zig")
    return subprocess.run([zig, "cc", "-target", target, *include, *kept, *last], check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
