"""What docs/security.md claims of the launcher and the template, and test_template.py has no test for."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shimcore.rig import Rig
from shimcore.template import SPARES
from shimcore.testing.leaks import state
from tests.faults import until
from tests.test_template import WARM, Warm, new_warm, warm

__all__ = ["new_warm", "warm"]

NOBODY = 65534


def beside(warm: Warm, program: str, *before: str) -> subprocess.Popen[str]:
    """A program that has the template's directory as an open fd, its first argument; the second is the socket's name."""
    fd = warm._fd()
    words = [*before, sys.executable, "-c", program, str(fd), warm.sockets()[0].name]
    return subprocess.Popen(words, pass_fds=[fd], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


CONNECT = r"""
import os, socket, sys
s = socket.socket(socket.AF_UNIX)
s.settimeout(30)
try:
    s.connect(f"/proc/self/fd/{sys.argv[1]}/{sys.argv[2]}")
    number = lambda n: n.to_bytes(8, "little", signed=True)
    body = b"".join(map(number, [0o22, 0, os.getppid()] + 32 * [-1])) + number(2) + b"shim\0-v\0" + number(0)
    socket.send_fds(s, [number(len(body)) + body], [0, os.open("/", os.O_PATH)])
    print(s.recv(1) in (b"R", b"N"))
except OSError as error:
    print(type(error).__name__)
"""


def test_another_user_can_not_connect(warm: Warm) -> None:
    """Even one who was handed the directory."""
    warm.warm_up()
    became = f"import os; os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})\n"
    assert beside(warm, became + CONNECT).communicate(timeout=60)[0].strip() == "PermissionError"


def test_a_caller_of_another_user_is_hung_up_on(warm: Warm) -> None:
    """One whom the modes do not keep out."""
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        pytest.skip("there is no setpriv")
    warm.warm_up()
    caps = ["--inh-caps=+dac_override", "--ambient-caps=+dac_override"]
    assert beside(warm, CONNECT).communicate(timeout=60)[0].strip() == "True"
    caller = beside(warm, CONNECT, setpriv, f"--reuid={NOBODY}", "--clear-groups", *caps)
    assert caller.communicate(timeout=60)[0].strip() in ("False", "ConnectionResetError", "BrokenPipeError")
    assert warm.last() == WARM


def test_a_listener_of_another_user_is_not_asked(warm: Warm) -> None:
    pid = warm.warm_up()
    (path,) = warm.sockets()
    listen = f"""
import os, socket, sys
s = socket.socket(socket.AF_UNIX)
s.bind(f"/proc/self/fd/{{sys.argv[1]}}/{{sys.argv[2]}}")
os.seteuid({NOBODY})  # SO_PEERCRED names who listens
s.listen()
print("listens", flush=True)
sys.stdin.read()
"""
    os.kill(pid, signal.SIGTERM)
    until(lambda: state(pid) in ("", "Z"))
    impostor = subprocess.Popen(
        [sys.executable, "-c", listen, str(warm._fd()), path.name],
        pass_fds=[warm._fd()], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert impostor.stdout is not None and impostor.stdout.readline() == "listens\n"
        assert warm.last() == f"plain {os.strerror(1)}"
    finally:
        impostor.communicate(timeout=60)
        path.unlink()


def test_nothing_of_an_action_stays(warm: Warm) -> None:
    """A secret in one action's environment and arguments is in no process that serves the next."""
    pid = warm.warm_up()
    secret = f"secret-{os.urandom(8).hex()}"
    assert warm.last("-id", secret, "-v", env={"A_SECRET": secret}) == WARM
    until(lambda: len(warm.spares()) == SPARES)  # the one that was asked has ended, and another one stands in its place
    for one in (pid, *warm.spares()):
        with open(f"/proc/{one}/maps") as maps, open(f"/proc/{one}/mem", "rb", 0) as memory:
            for line in maps:
                found = re.match(r"([0-9a-f]+)-([0-9a-f]+) rw", line)
                if found:
                    first, last = (int(number, 16) for number in found.groups())
                    memory.seek(first)
                    assert secret.encode() not in memory.read(last - first)


def layout(pid: int) -> list[str]:
    """Where the interpreter's libraries and its stack lie."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return [line.split("-")[0] for line in lines if "libc.so" in line or "[stack]" in line]


def test_forks_lie_alike_and_plain_daemons_do_not(warm: Warm, rootfs: Path) -> None:
    warm.warm_up()
    if Path("/proc/sys/kernel/randomize_va_space").read_text().strip() == "0":
        pytest.skip("this kernel lays out every process alike")
    for value, alike in (("1", True), ("0", False)):
        with Rig(warm.shim, rootfs=rootfs, env={**warm.env, "SHIMCORE_TEMPLATE": value}) as rig:
            one, other = (rig.container(["sleep", "100"]) for _ in range(2))
            assert (layout(one.shim_pid) == layout(other.shim_pid)) is alike
