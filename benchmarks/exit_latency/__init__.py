"""From the last act of a process to its TaskExit frame on containerd's socket.

    python -m benchmarks.exit_latency [--quick] [--rust PATH] [--json FILE]

Four sides take turns in one run: our shim, Go's stock shim, Rust's shim where there is one, and a bare C loop
(pidfd readable → waitid → TaskExit → socket), which is the floor. All get their processes from
`runc exec --detach` in one container each, with bundle and rootfs on a tmpfs.

The first stamp is written to shared memory by the dying process as its last act, so the kernel's own work of
ending a process counts; the second is taken after the read that completes the frame. A process may die only
when the exit before it was acknowledged and two more calls were answered.

idle      nobody else calls
callers   four closed-loop callers of State, each on a connection of its own; the C loop answers them on its
          one thread
spin      a Python handler of the shim spins, holding the interpreter's lock; beside the others, and beside the
          C loop in its session, the same Python spins as a process of its own

Rust's shim is measured where it is found on PATH or named by --rust; it can be had with
`cargo install containerd-runc-shim --root DIR`. --also NAME=PATH adds another shim, such as ours at another commit.

Each with the machine's cores free to use and with everything pinned to one.

burst     10,000 plain processes, orphans of one spawner, die at once. Ours has them in its exit table by a shim of
          the benchmark's own; the C loop gets the same. Once with a consumer that reads, once with one
          that sleeps until all are dead. "reaped" is the exit's own time (exited_at), "told" its frame's read.
"""
