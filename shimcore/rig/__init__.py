"""A containerd for shim authors: activates, drives and breaks any shim binary, with no containerd.

::

    with Rig("containerd-shim-foo-v1") as rig:
        container = rig.container(["sh", "-c", "echo hello; exit 42"])
        assert container.run() == 42
        assert container.output == "hello\\n"
        rig.events.wait("/tasks/exit", container=container.id)
        container.delete()

By hand: `python -m shimcore.rig run -- echo hello`.
"""

from __future__ import annotations

from shimcore.rig.activate import ActivationError, Activator, Deleted, Started
from shimcore.rig.events import DOWN, FROZEN, MUTE, SLOW, UP, Event, EventError, Events
from shimcore.rig.runtime import FakeRuntime, Gate, Held, RuntimeTimeout
from shimcore.rig.session import Exec, LeakError, Rig, Session
from shimcore.rig.stdio import Reader, Stdio
from shimcore.rig.task import Task

__all__ = [
    "DOWN",
    "FROZEN",
    "MUTE",
    "SLOW",
    "UP",
    "ActivationError",
    "Activator",
    "Deleted",
    "Event",
    "EventError",
    "Events",
    "Exec",
    "FakeRuntime",
    "Gate",
    "Held",
    "LeakError",
    "Reader",
    "Rig",
    "RuntimeTimeout",
    "Session",
    "Started",
    "Stdio",
    "Task",
]
