"""Python code in an interpreter of its own, for tests of what a whole process is: its leader, its signals, its limits."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable

HANG = 60.0  # seconds after which a test that should have ended has hung

# led(core, body) runs body on another thread while this one, the leader, is the exit thread.
LED = '''
import _thread, traceback
def led(core, body):
    failed = []
    def run():
        try:
            body()
        except BaseException:
            failed.append(traceback.format_exc())
        finally:
            core.stop()
    thread = threading.Thread(target=run)
    thread.start()
    core.run()
    thread.join()
    if failed:
        print(failed[0])
        os._exit(1)
def orphan(status):
    """A process that ends with this status and whose parent is gone; it leads a session, as a container's does."""
    reader, writer = os.pipe()
    middle = os.fork()
    if not middle:
        if not os.fork():
            os.setsid()
            os.write(writer, str(os.getpid()).encode())
            os._exit(status)
        os._exit(0)
    os.close(writer)
    os.waitpid(middle, 0)
    pid = int(os.read(reader, 20))
    os.close(reader)
    return pid
def until(what):
    while not what():
        os.sched_yield()
'''


def script(body: str, *, preexec: Callable[[], object] | None = None, **env: str) -> str:
    """Runs Python code in a process of its own, and returns what it printed; it fails when the code does."""
    start = "import os, sys, signal, subprocess, threading, time\nfrom shimcore import _reaper\n"
    done = subprocess.run(
        [sys.executable, "-c", start + LED + textwrap.dedent(body)],
        capture_output=True, text=True, timeout=HANG, preexec_fn=preexec, env={**os.environ, **env},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
