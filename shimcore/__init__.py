"""shimcore: a framework for containerd runtime-v2 shims. This file is the whole public surface, and imports none of it.

Names are loaded when they are first used: a shim's `start` needs few of them, and each costs start time and memory.
"""

from __future__ import annotations

import sys

# What a call's waiters and its Context share is kept together by the interpreter's lock alone. A free-threaded interpreter takes
# it back when it loads a module of ours, unless it was told not to.
if getattr(sys.flags, "gil", None) == 0:
    raise ImportError("shimcore needs the interpreter's lock (GIL): unset PYTHON_GIL=0, or leave -X gil=0 away")

__version__ = "0.1.0"

TYPE_CHECKING = False
if TYPE_CHECKING:
    from . import address as address
    from . import cgroup as cgroup
    from . import errors as errors
    from . import jobs as jobs
    from . import logger as logger
    from . import monitor as monitor
    from . import mount as mount
    from . import publisher as publisher
    from . import state as state
    from . import trace as trace
    from . import ttrpc as ttrpc
    from . import util as util
    from ._reaper import Core as Core
    from ._reaper import ExitSignal as ExitSignal
    from ._reaper import Slot as Slot
    from ._ttrpc import Context as Context
    from .bootstrap import Config as Config
    from .bootstrap import DeleteResult as DeleteResult
    from .bootstrap import StartOpts as StartOpts
    from .daemon import spawn as spawn
    from .flags import Flags as Flags
    from .jobs import Lock as Lock
    from .jobs import in_pool as in_pool
    from .jobs import run_job as run_job
    from .jobs import sleep as sleep
    from .logger import debug as debug
    from .logger import error as error
    from .logger import info as info
    from .logger import warn as warn
    from .publisher import RemotePublisher as RemotePublisher
    from .shim import Shim as Shim
    from .shim import run as run
    from .task import Task as Task
    from .task import inline as inline

_NAMES = {
    "Config": "bootstrap", "Context": "_ttrpc", "Core": "_reaper", "DeleteResult": "bootstrap", "ExitSignal": "_reaper",
    "Flags": "flags", "Lock": "jobs", "RemotePublisher": "publisher", "Shim": "shim", "Slot": "_reaper",
    "StartOpts": "bootstrap", "Task": "task", "debug": "logger", "error": "logger", "in_pool": "jobs", "info": "logger",
    "inline": "task", "run": "shim", "run_job": "jobs", "sleep": "jobs", "spawn": "daemon", "warn": "logger",
}  # fmt: skip
_MODULES = ("address", "cgroup", "errors", "jobs", "logger", "monitor", "mount", "publisher", "state", "trace", "ttrpc", "util")

__all__ = ["__version__", *sorted(_NAMES), *_MODULES]


if not TYPE_CHECKING:  # to a type checker there is what stands above, and nothing else

    def __getattr__(name: str) -> object:
        module = _NAMES.get(name, name if name in _MODULES else "")
        if not module:
            raise AttributeError(f"module 'shimcore' has no attribute {name!r}")
        import sys

        full = f"shimcore.{module}"
        if full not in sys.modules:
            __import__(full)
        found = sys.modules[full]
        return getattr(found, name) if name in _NAMES else found


def __dir__() -> list[str]:
    return sorted(__all__)
