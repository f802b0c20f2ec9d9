"""What docs/contract.md shows: name of the picture's file → the picture."""

from __future__ import annotations

from .draw import sequence, states

START = """\
who: containerd | start | the daemon
containerd -> start: BIN -namespace -address -id c1 start
at start: cwd is the bundle; stdin: options, or BootstrapParams
start -> the daemon: makes it
at the daemon: own session, subreaper, socket listens
the daemon --> start: ready (or why not)
start --> containerd: address on stdout, exit 0
at containerd: reads stdout and stderr to their end
containerd -> the daemon: connects: Create, Start, … over ttrpc
"""

LIFE = """\
who: containerd | the shim | runc | the process
containerd -> the shim: Create(id, bundle, rootfs, stdio)
the shim -> runc: mounts; runc create
runc -> the process: made, waits
the shim --> containerd: pid
the shim ~> containerd: /tasks/create
containerd -> the shim: Wait (answered at the end)
containerd -> the shim: Start
the shim -> runc: runc start
runc -> the process: goes
the shim --> containerd: pid
the shim ~> containerd: /tasks/start
at the process: runs, ends
the process ~> the shim: its pidfd is readable
at the shim: status into the ledger
the shim ~> containerd: /tasks/exit
the shim --> containerd: Wait's answer
containerd -> the shim: Delete
the shim -> runc: output drained; runc delete; unmounts
the shim --> containerd: pid, status, time
the shim ~> containerd: /tasks/delete
containerd -> the shim: Shutdown
at containerd: closes; BIN … delete, though all is well
"""

EXITS = """\
who: the container | the shim | containerd
part: an exec that is over before Start could say so
the container ~> the shim: the exec ends
the shim ~> containerd: /tasks/exec-started
the shim ~> containerd: /tasks/exit of the exec
part: init ends while an exec runs, in one pid namespace with others
the container ~> the shim: init ends
the shim -> the container: SIGKILL to all that is left
the container ~> the shim: the exec ends
the shim ~> containerd: /tasks/exit of the exec
the shim ~> containerd: /tasks/exit of init
part: the kernel's OOM killer
the container ~> the shim: memory.events, or the eventfd of v1
the shim ~> containerd: /tasks/oom
the container ~> the shim: init ends by SIGKILL
the shim ~> containerd: /tasks/exit, status 137
"""

FAULTS = """\
who: containerd | the shim | BIN delete
part: containerd restarts
at containerd: comes back, reads the bundle: address, or bootstrap.json
containerd -> the shim: Connect, Pids (5 s)
the shim --> containerd: pids (none: reaped as leaked)
the shim ~> containerd: what has happened meanwhile, in order
part: the shim is killed
the shim --> containerd: the connection closes
containerd -> BIN delete: cwd is the bundle, no TTRPC_ADDRESS
at BIN delete: kills what is left, unmounts, reads the ledger
BIN delete --> containerd: DeleteResponse: pid, status, time
at containerd: tells exit and delete itself
"""


def pictures() -> dict[str, str]:
    made = {
        "contract-start.svg": ("What containerd runs to have a shim", START, 260),
        "contract-life.svg": ("A container's life", LIFE, 225),
        "contract-exits.svg": ("The order of exits", EXITS, 280),
        "contract-faults.svg": ("When one of them is gone", FAULTS, 290),
    }
    drawn = {name: sequence(title, text.splitlines(), column) for name, (title, text, column) in made.items()}
    drawn["contract-states.svg"] = states(
        "What State says of a task",
        (800, 190),
        {
            "(none)": (60, 90),
            "CREATED": (220, 90),
            "RUNNING": (400, 90),
            "STOPPED": (590, 90),
            "PAUSED": (400, 160),
            "(gone)": (735, 90),
        },
        [
            ("(none)", "CREATED", "Create"),
            ("CREATED", "RUNNING", "Start"),
            ("RUNNING", "STOPPED", "init ends"),
            ("STOPPED", "(gone)", "Delete"),
            ("RUNNING", "PAUSED", "Pause"),
            ("PAUSED", "RUNNING", "Resume"),
        ],
    )
    return drawn
