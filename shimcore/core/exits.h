/* The exit table: when an exit may be told, decided in one place.
 *
 * A slot is a process of a container: its init (exec_id "") or an exec. Its life:
 *
 *   reserved ──▶ opened ──▶ bound ──▶ exited ──▶ told
 *   (no process     │         (pid)    (reaped)
 *     before Start) │
 *                   └──▶ dropped   the runtime failed and there is no pid
 *
 * Rules, each kept by the function named:
 *  1. No exit is too early: the slot is opened before the process is made, and zombies that nobody knows are left alone while
 *     a slot is opened and not bound (open, sweep); bind takes a process that is dead already.
 *  2. No exit before its start: `announce` queues TaskCreate or TaskExecStarted and only then lets the exit be told; a hold
 *     (Start of init) does the same for TaskStart.
 *  3. One exit each: exited → told happens once, under the lock, and nothing else makes a TaskExit.
 *  4. Init last: init is told when none of its execs is opened, bound or exited; the wait is bounded (set_bound), after which
 *     execs that are still there are counted as overdue, and told whenever they do end.
 *  5. Without a private pid namespace what is left in init's cgroup is killed when init has exited, before 4.
 *  6. A slot that is dropped answers its Waits with 255; a status that somebody stole from us is 255 as well, never 0.
 *  7. Until it is told, a process counts as alive for State and Delete; Kill knows better and says not found.
 *  8. An exit is recorded in the ledger before it is told; where that takes longer than 5 ms it is told all the same (ledger.h).
 *  9. A TaskOOM stands before the exit that it caused (oom.h). A teardown hook of the author's delays the telling, not beyond
 *     its deadline.
 * Telling is, in this order: the event is queued, the Waits are answered, Python is told. */
#ifndef SC_EXITS_H
#define SC_EXITS_H
#include "core.h"

/* All return 0 or -errno; they take the lock. References: what makes or finds a slot gives one to the caller. */
sc_slot *sc_slot_find(sc_core *, const char *id, const char *exec_id);
void sc_tell_if_due(sc_slot *);                     /* under the lock */
void sc_slot_timers_clear(sc_core *, sc_slot *); /* under the lock */
void sc_slot_ref(sc_slot *);
void sc_slot_unref(sc_slot *);
int sc_slot_open_init(sc_core *, const char *id, const uint8_t *state, size_t n, sc_slot **out);                       /* -EEXIST */
/* An exec, or with exec_id "" an init that Start restores from a checkpoint. -EEXIST -ENOENT */
int sc_slot_reserve(sc_core *, const char *id, const char *exec_id, const uint8_t *state, size_t n, sc_slot **out);
int sc_slot_open(sc_slot *);           /* -ESRCH: init has exited; -EINVAL: not reserved */
int sc_slot_bind(sc_slot *, pid_t);    /* -EINVAL: not opened */
int sc_slot_announce(sc_slot *, sc_event *); /* takes the event, which may be NULL */
int sc_slot_hold(sc_slot *);
int sc_slot_release(sc_slot *, sc_event *);
int sc_slot_set_status(sc_slot *, int status);
int sc_slot_set_kill_rest(sc_slot *, const char *procs, int64_t bound_ns);
/* The slot owns the ledger from now on. */
int sc_slot_set_ledger(sc_slot *, struct sc_ledger *);
/* At its exit a SC_NOTE_TEARDOWN is posted, and the telling waits for sc_slot_teardown_done, at most ns. */
int sc_slot_set_teardown(sc_slot *, int64_t ns);
int sc_slot_teardown_done(sc_slot *);
int sc_slot_drop(sc_slot *);
int sc_slot_forget(sc_slot *);         /* -EBUSY: not told yet */
int sc_slot_kill(sc_slot *, int sig);  /* -ESRCH: exited; -EINVAL: no process yet */

/* 1: it has been told, w->exit is filled; 0: parked, fire will be called; -ENOENT. deadline: ns of CLOCK_MONOTONIC after which
 * it fires with `late` set, 0: none. */
int sc_slot_wait(sc_core *, const char *id, const char *exec_id, sc_waiter *, int64_t deadline);
bool sc_waiter_cancel(sc_core *, sc_waiter *); /* true: taken out, fire will not be called */
/* StateResponse, serialized, appended to out. */
int sc_slot_state(sc_core *, const char *id, const char *exec_id, sc_buf *out);

/* handover.c: what outlives an exec of this process by itself (docs/upgrade.md). The exit thread does not run meanwhile. */
typedef struct {
    int phase, task_status;
    bool announced, overdue, oom_over, killing;
    pid_t pid;
    sc_exit exit;
    int64_t opened_mono, reaped_mono, recorded_mono;
    const uint8_t *state; /* here and in kill_procs: the slot's, or the caller's */
    size_t state_len;
    const char *kill_procs; /* NULL: none */
    int64_t bound_ns, bound_at; /* bound_at: when an init that has exited waits no longer, 0: it does not */
    int ledger_fd; /* -1: none, as oom_fd */
    int64_t ledger_at;
    int oom_fd;
    bool oom_v2;
    uint64_t oom_seen;
} sc_saved_slot;
const char *sc_core_busy(sc_core *); /* why nothing can be handed over now; NULL: it can */
void sc_slot_save(sc_slot *, sc_saved_slot *out); /* under the lock */
/* As it was, but nothing is watched, told or killed. Init before its execs. -EEXIST -ENOENT -EINVAL -ENOMEM */
int sc_slot_restore(sc_core *, const char *id, const char *exec_id, const sc_saved_slot *, sc_slot **out);
/* Go on with it: its death is seen, and so is one that came meanwhile. The fds of the saved slot are the core's from now on. */
int sc_slot_resume(sc_slot *, const sc_saved_slot *);
/* exits.c, for handover.c; under the lock but for the first */
sc_slot *sc_slot_new(sc_core *, const char *id, const char *exec_id, const uint8_t *state, size_t n);
sc_slot *sc_slot_in_table(sc_core *, const char *id, const char *exec_id);
void sc_slot_insert(sc_core *, sc_slot *);
void sc_slot_add_exec(sc_slot *init, sc_slot *exec);
void sc_slot_kill_rest(sc_slot *);
void sc_slot_exited(sc_slot *, const sc_exit_status *, int64_t mono, int64_t real);

typedef struct {
    int phase, status;
    pid_t pid;
    sc_exit exit;
} sc_slot_info;
void sc_slot_info_get(sc_slot *, sc_slot_info *);

/* The exit thread, without the lock: kill what is left of containers whose init has exited. */
void sc_kill_queued(sc_core *);
/* A signal to every process listed in a cgroup.procs file and those below its folder: by cgroup.kill for SIGKILL where the kernel
 * has it, else each through a pidfd. Returns how many were signalled, where more may have come to be since; -1: could not look. */
int sc_cgroup_signal(const char *procs, int sig);
#endif
