/* The exit thread and what it owns: children, the exit table, runtime jobs, timers, the outbox, the mailbox.
 *
 * Threads. The exit thread runs sc_core_run and is the thread-group leader in a shim; it never takes the interpreter's lock.
 * Every other thread calls the functions below. `lock` covers everything in sc_core and in the slots, children, jobs and
 * events that hang from it; nobody holds it over a call that can block (waitid is WNOHANG, sends are non-blocking).
 * Replies to parked calls are sent after it has been let go: a connection's lock is never taken under it.
 *
 * Memory. What has an fd in the epoll set is freed by the exit thread at the end of a batch (the graveyard), since an event
 * for it may stand later in the same batch. */
#ifndef SC_CORE_H
#define SC_CORE_H
#include <pthread.h>
#include <stdatomic.h>
#include <sys/epoll.h>

#include "buf.h"
#include "process.h"

typedef struct sc_core sc_core;
typedef struct sc_slot sc_slot;
typedef struct sc_event sc_event;

/* Something in the epoll set; the first member of whoever owns the fd. Called under the lock. */
typedef struct sc_source {
    void (*ready)(sc_core *, struct sc_source *, uint32_t events);
} sc_source;

/* One-shot timer on CLOCK_MONOTONIC; fire is called under the lock by the exit thread. */
typedef struct sc_timer {
    int64_t when; /* ns */
    size_t at;    /* place in the heap + 1; 0: not set */
    void (*fire)(sc_core *, struct sc_timer *);
} sc_timer;

/* A process that we own: waited for by pidfd, or by number when there was no fd to be had. */
typedef struct sc_child {
    sc_source src;
    pid_t pid;
    int pidfd;      /* -1: by number, tried at each SIGCHLD */
    bool disarmed;  /* readable, but not our child yet: tried at each SIGCHLD */
    bool listed;
    struct sc_child *next;
    void (*died)(sc_core *, struct sc_child *, const sc_exit_status *, int64_t mono, int64_t real);
} sc_child;

/* ---- mailbox: what the exit thread tells Python, afterwards ---- */
enum { SC_NOTE_JOB = 1, SC_NOTE_TIMER, SC_NOTE_TOLD, SC_NOTE_PID, SC_NOTE_SIGNAL, SC_NOTE_POST, SC_NOTE_TEARDOWN, SC_NOTE_ASKED };
typedef struct sc_note {
    struct sc_note *next;
    int kind;
    void *ptr;      /* job, timer cookie or slot (with a reference) */
    int64_t a, b, c;
} sc_note;

/* ---- waiters: parked Wait calls ---- */
typedef struct {
    uint32_t pid, status;
    int64_t exited_at; /* ns since the epoch */
} sc_exit;

typedef struct sc_waiter {
    struct sc_waiter *next, *prev;
    sc_slot *slot; /* NULL once it has been taken out to be answered */
    sc_exit exit;
    sc_timer timer;
    bool late; /* the deadline came first */
    void (*fire)(struct sc_waiter *); /* without the lock, on the thread that told the exit */
} sc_waiter;

enum { SC_RESERVED = 1, SC_OPENED, SC_BOUND, SC_EXITED, SC_TOLD, SC_DROPPED };
enum { SC_CREATED = 1, SC_RUNNING, SC_STOPPED, SC_PAUSED, SC_PAUSING };
enum { SC_RECORD_NONE, SC_RECORD_PENDING, SC_RECORD_DONE }; /* pending: telling waits for it, a little */

struct sc_slot {
    sc_child child; /* pid and pidfd once bound */
    atomic_int refs;
    sc_core *core;
    char *id, *exec_id; /* exec_id "" for init */
    uint64_t key_id, key_exec;
    sc_slot *hash_next;
    sc_slot *init;            /* an exec's container; referenced */
    sc_slot *execs, *sibling; /* init: its execs; an exec: the next one */
    int phase, task_status;
    bool announced, in_table, overdue;
    unsigned holds;
    unsigned busy;            /* init: execs that are opened, bound or exited */
    pid_t pid;
    sc_exit exit;
    int64_t opened_mono, reaped_mono;
    uint8_t *state;           /* constant fields of StateResponse, serialized */
    size_t state_len;
    char *kill_procs;         /* init without a private pid namespace: cgroup.procs of what to kill at its exit */
    int64_t bound_ns;         /* how long init waits for its execs */
    int kill_tries;
    bool kill_queued;
    sc_slot *kill_next;
    struct sc_ledger *ledger; /* init: where its exits, and its execs', are recorded */
    int record;
    int64_t recorded_mono;
    struct sc_oom *oom;       /* init: what watches for its OOM kills */
    bool oom_over;
    int64_t teardown_ns;      /* > 0: an author's hook runs before the exit is told, at most so long */
    bool tearing_down;
    sc_timer bound, kill_again, record_late, teardown;
    sc_waiter *waiters;
    void *cookie;             /* Python's Slot; owned by the table entry */
};

/* ---- jobs: runtime calls ---- */
typedef struct sc_job {
    sc_child child;
    sc_source out_src;
    int out_fd; /* read end of stdout and stderr, -1 when neither is captured */
    sc_buf out;
    size_t cap;
    bool truncated, timed_out;
    bool done;  /* the note has been posted */
    bool dead;  /* reaped */
    bool taken; /* Python has the result: freed when dead */
    sc_timer deadline;
    int status;
    bool signaled;
    void *cookie;
    struct sc_job *grave;
} sc_job;

/* ---- outbox ---- */
struct sc_event {
    sc_event *next;
    uint64_t key_id, key_exec; /* key_exec 0: concerns the whole container */
    uint64_t stamp;            /* 1 + number of its stamp, 0 none */
    uint32_t stream;
    int64_t refused_since; /* ns of CLOCK_MONOTONIC, 0: not refused yet */
    bool vital; /* an exit or a deletion */
    size_t len;
    uint8_t body[]; /* the ttrpc Request, without its header */
};

typedef struct {
    sc_event *head, **tail;
    size_t count;
} sc_event_list;

typedef struct {
    sc_source src;
    char *address; /* of containerd's events socket; NULL: nowhere, events are dropped and counted */
    int fd;
    bool armed_out;
    uint32_t next_stream;
    sc_event_list queue, flight;
    sc_buf out, in; /* what the socket has not taken yet; what came in and is no whole frame yet */
    int64_t backoff_ns;
    sc_timer retry, mute;
    struct sc_spill *spill;
} sc_outbox;

/* Dead, its status read and told, but not reaped yet; see children.c. */
typedef struct {
    int pidfd;
    pid_t pid;
} sc_closing;

enum { SC_CLOSING = 64, SC_CLOSING_FEW = 8 };
enum { SC_STAMPS = 256, SC_ID_MAX = 96 };
typedef struct {
    char id[SC_ID_MAX], exec_id[SC_ID_MAX]; /* cut */
    pid_t pid;
    int64_t reaped, recorded, sent, acked; /* ns of CLOCK_MONOTONIC, 0: not yet */
} sc_stamp;

enum { SC_PAST = 128 };
typedef struct {
    uint8_t *body; /* the ttrpc Request of an event; NULL: not kept */
    size_t len;
} sc_past;

typedef struct {
    uint64_t told, orphans, stolen, overdue, jobs, jobs_timed_out, events, acked, rejected, unsent, reconnects, by_number, notes, recorded,
        unrecorded, record_late, ooms, teardown_late, spilled, dropped;
} sc_stats;

typedef struct {
    pid_t pid;
    sc_exit_status st;
    int64_t mono, real;
} sc_early;

typedef struct {
    pid_t pid;
    int64_t seen; /* ns of CLOCK_MONOTONIC */
} sc_left;

struct sc_core {
    pthread_mutex_t lock;
    pthread_cond_t drained;
    int epfd, wakefd;
    sc_source wake_src, sig_src;
    atomic_bool stop, pause;
    bool reap_orphans, tell_pids, need_sweep;
    bool has_signals, has_sigchld;
    atomic_bool running;
    pthread_t runner;       /* the exit thread, while running */
    char *ns;               /* containerd's namespace */
    sc_child *pids[4096];
    unsigned by_number, disarmed; /* children that SIGCHLD has to look after */
    unsigned jobs;          /* runtime calls that have not been reaped */
    sc_closing closing[SC_CLOSING]; /* oldest first */
    unsigned closing_len;
    int64_t sweep_after;    /* ns of CLOCK_MONOTONIC: no sweep before that */
    sc_slot **slots;        /* hash by (id, exec_id) */
    size_t slot_cap, slot_count;
    unsigned open_unbound;
    int64_t oldest_open;
    sc_early *early;
    size_t early_len, early_cap;
    sc_timer **heap;
    size_t heap_len, heap_cap;
    sc_timer sweep_timer, look_timer;
    sc_left *left;          /* zombies that may be an author's children */
    size_t left_len, left_cap;
    sc_slot *killing;       /* their cgroups are to be killed; referenced */
    sc_waiter *firing;      /* taken out under the lock, answered after it */
    sc_job *graveyard;
    struct sc_oom *oom_grave;
    struct sc_recorder *recorder;
    sc_outbox outbox;
    sc_stamp *stamps;
    uint64_t stamp_count;
    sc_past *past; /* the last events */
    uint64_t past_count;
    bool past_over; /* nobody waits for more */
    pthread_cond_t news; /* there is one more */
    sc_stats stats;
    pthread_mutex_t mail_lock;
    sc_note *mail, **mail_tail;
    bool mail_rung; /* mailfd has been written since the notes were taken */
    sc_timer told_timer;
    sc_source ask_src; /* the listener on which the shim is asked about itself */
    int ask_fd;        /* -1: none */
    int mailfd;
};

/* reactor.c */
sc_core *sc_core_new(const char *ns, const char *events_address);
void sc_core_free(sc_core *);
void sc_signals_early(void); /* remember signals until sc_core_signals, and unblock them here */
int sc_core_signals(sc_core *, bool sigchld); /* handlers for this process; -EBUSY: another core has them */
int sc_core_run(sc_core *); /* until stopped: 0; until paused: 1, and it may be run again */
void sc_core_stop(sc_core *);
void sc_core_pause(sc_core *, bool on);
bool sc_on_exit_thread(sc_core *);
void sc_core_wake(sc_core *); /* no-op on the exit thread: it looks before it sleeps */
int sc_core_drain(sc_core *, int64_t timeout_ns); /* 1: the outbox is empty */
void sc_lock(sc_core *);
void sc_unlock(sc_core *); /* then answers what was put on `firing`, on this thread */
int sc_watch_fd(sc_core *, int fd, uint32_t events, sc_source *);
void sc_timer_set(sc_core *, sc_timer *, int64_t when);
void sc_timer_clear(sc_core *, sc_timer *);
int sc_delay(sc_core *, int64_t ns, void *cookie); /* SC_NOTE_TIMER */
void sc_sweep_soon(sc_core *);

/* children.c */
int sc_child_add(sc_core *, sc_child *, pid_t pid, int pidfd);
void sc_child_remove(sc_core *, sc_child *);
void sc_children_on_sigchld(sc_core *);
void sc_sweep(sc_core *);
bool sc_sweep_is_due(const sc_core *, int64_t now);
void sc_children_close(sc_core *, unsigned oldest); /* reap so many of those that have been told */
bool sc_children_told(sc_core *, pid_t pid);
bool sc_early_take(sc_core *, pid_t pid, sc_early *out);
int sc_watch_pid(sc_core *, pid_t pid);

/* mailbox.c */
enum { SC_TOLD_QUIET_NS = 1000000 };
void sc_post(sc_core *, int kind, void *ptr, int64_t a, int64_t b, int64_t c);
void sc_post_told(sc_core *, sc_slot *); /* under the lock; rings later */
void sc_told_ring(sc_core *, sc_timer *);
bool sc_has_notes(sc_core *);
/* SC_NOTE_ASKED once somebody connects to this listener; then it is left alone until the next call. fd -1: no more. */
int sc_ask_fd(sc_core *, int fd);
sc_note *sc_take_notes(sc_core *);
int sc_wait_notes(sc_core *, int64_t timeout_ns);

/* exits.c: the rules stand in exits.h */
/* outbox.c */
void sc_outbox_init(sc_outbox *, const char *address);
void sc_outbox_free(sc_core *);
/* Take over what an earlier shim of this address could not hand over, and use the file from now on. May block. */
int sc_outbox_spill(sc_core *, const char *path, int64_t cap);
/* What another image of this process has not handed over: the events in their order, and the connection on which those in flight
 * were sent. Before the core runs. 0 or -errno; the fd is the outbox's if it is 0. */
int sc_outbox_adopt(sc_core *, bool flight, const sc_event *like, const uint8_t *body, size_t n);
int sc_outbox_adopt_socket(sc_core *, int fd, uint32_t next_stream, const uint8_t *out, size_t n, const uint8_t *in, size_t m);
int sc_outbox_keep(sc_core *); /* at the end: what is unsent goes to the file; how many, or -errno */
sc_event *sc_event_new(sc_core *, sc_slice topic, sc_slice type_url, sc_slice payload, const char *id, const char *exec_id);
void sc_outbox_push(sc_core *, sc_event *); /* under the lock */
bool sc_outbox_empty(const sc_core *);      /* under the lock */
void sc_outbox_pump(sc_core *);             /* under the lock, exit thread */
sc_stamp *sc_stamp_of(sc_core *, uint64_t stamp);

/* past.c */
void sc_past_keep(sc_core *, const sc_event *); /* under the lock */
/* Until there are more than `after`, sc_past_end, or the time is over; how many there have been. */
uint64_t sc_past_wait(sc_core *, uint64_t after, int64_t timeout_ns);
bool sc_past_get(sc_core *, uint64_t number, sc_buf *out); /* false: overwritten since, or not kept */
void sc_past_end(sc_core *);
/* Have one that another image of this process has told; n 0: it was not kept. false: no memory. */
bool sc_past_adopt(sc_core *, uint64_t number, const uint8_t *body, size_t n);
void sc_past_free(sc_core *);

/* job.c */
sc_job *sc_job_start(sc_core *, const sc_spawn_args *, size_t cap, int64_t timeout_ns, void *cookie, int *err, int *at);
void sc_job_take(sc_core *, sc_job *); /* the result has been read: let go of it */
void sc_job_free(sc_job *);

uint64_t sc_hash(const char *text);
#endif
