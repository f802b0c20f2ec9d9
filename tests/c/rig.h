/* For tests with an exit thread: a core whose thread is the leader, and a containerd that takes its events.
 *
 * with_leader(body) runs the body on a second thread while main is the exit thread, as in a shim: orphans go to main, and
 * what the body forks itself is the body's. */
#ifndef RIG_H
#define RIG_H
#include "peer.h"

/* ---- the core and its thread ---- */

static sc_core *core;
static rig_peer peer;

static inline void *rig_body(void *arg)
{
    ((void (*)(void))(uintptr_t)arg)();
    sc_core_stop(core);
    return NULL;
}

static sc_note *rig_left; /* taken and not looked at yet */

/* Notes carry references: let go of them, as Python would. */
static inline int rig_let_go(sc_note *n)
{
    int kind = n->kind;
    if (kind == SC_NOTE_TOLD || kind == SC_NOTE_TEARDOWN)
        sc_slot_unref(n->ptr);
    else if (kind == SC_NOTE_JOB)
        sc_job_take(core, n->ptr);
    free(n);
    return kind;
}

/* Lets go of all that are there; returns how many were of this kind. */
static inline int rig_take(int kind)
{
    int n = 0;
    do {
        while (rig_left) {
            sc_note *note = rig_left;
            rig_left = note->next;
            n += rig_let_go(note) == kind;
        }
    } while ((rig_left = sc_take_notes(core)));
    return n;
}

/* One note of this kind, waiting for it; others that stand before it are let go of. */
static inline sc_note rig_note_wait(int kind)
{
    for (;;) {
        while (rig_left) {
            sc_note *note = rig_left, copy = *note;
            rig_left = note->next;
            if (note->kind == kind) {
                free(note);
                return copy;
            }
            rig_let_go(note);
        }
        int r = sc_wait_notes(core, -1);
        CHECK(r >= 0 || r == -EINTR);
        rig_left = sc_take_notes(core);
    }
}

static inline void with_leader(void (*body)(void))
{
    pthread_t t;
    rig_peer_init(&peer);
    rig_listen(&peer);
    core = sc_core_new("ns", peer.path);
    CHECK(core != NULL);
    CHECK_EQ(sc_core_signals(core, true), 0);
    CHECK(pthread_create(&t, NULL, rig_body, (void *)(uintptr_t)body) == 0);
    CHECK_EQ(sc_core_run(core), 0);
    pthread_join(t, NULL);
    rig_take(0);
    sc_core_free(core);
    core = NULL;
    rig_peer_free(&peer);
}

/* ---- processes ---- */

typedef struct {
    pid_t pid;
    int control; /* write a byte, the exit status; close: 99 */
} rig_process;

static inline void rig_child(int control)
{
    unsigned char status;
    _exit(read(control, &status, 1) == 1 ? status : 99);
}

/* A child of the calling thread; in a process group of its own, or in ours. */
static inline rig_process rig_fork_in(bool own_group)
{
    int c[2];
    CHECK(pipe2(c, O_CLOEXEC) == 0);
    pid_t pid = fork();
    if (!pid) {
        close(c[1]);
        if (own_group)
            setpgid(0, 0);
        rig_child(c[0]);
    }
    CHECK(pid > 0);
    if (own_group)
        setpgid(pid, 0);
    close(c[0]);
    return (rig_process){pid, c[1]};
}

static inline rig_process rig_fork(void)
{
    return rig_fork_in(false);
}

/* An orphan, as a runtime's process is: its parent is gone, so it is the subreaper's; it leads a session of its own. */
static inline rig_process rig_orphan(void)
{
    int c[2], r[2];
    CHECK(sc_set_subreaper(true) == 0);
    CHECK(pipe2(c, O_CLOEXEC) == 0 && pipe2(r, O_CLOEXEC) == 0);
    pid_t middle = fork();
    if (!middle) {
        pid_t pid = fork();
        if (!pid) {
            close(c[1]);
            setsid();
            if (write(r[1], &(pid_t){getpid()}, sizeof pid) < 0)
                _exit(1);
            close(r[1]);
            rig_child(c[0]);
        }
        _exit(0);
    }
    rig_process p = {0, c[1]};
    CHECK(middle > 0 && read(r[0], &p.pid, sizeof p.pid) == sizeof p.pid);
    CHECK(waitpid(middle, NULL, 0) == middle);
    close(c[0]);
    close(r[0]);
    close(r[1]);
    return p;
}

static inline void rig_end(rig_process *p, unsigned char status)
{
    CHECK(write(p->control, &status, 1) == 1);
    close(p->control);
    p->control = -1;
}

/* Until it is a zombie; a pidfd is readable then, reaped or not. */
static inline void rig_dead(pid_t pid)
{
    struct pollfd f = {.fd = sc_pidfd_open(pid), .events = POLLIN};
    if (f.fd < 0)
        return;
    while (poll(&f, 1, -1) < 0)
        CHECK_EQ(errno, EINTR); /* its own SIGCHLD, for one */
    close(f.fd);
}

static inline sc_event *rig_make_event(const char *topic, const char *id, const char *exec)
{
    return sc_event_new(core, (sc_slice){(const uint8_t *)topic, strlen(topic)}, (sc_slice){(const uint8_t *)"t", 1},
                        (sc_slice){(const uint8_t *)id, strlen(id)}, id, exec);
}

/* ---- waiters ---- */

typedef struct {
    sc_waiter w;
    bool fired;
    int times;
    pthread_mutex_t lock;
    pthread_cond_t cond;
} rig_waiter;

static inline void rig_fire(sc_waiter *w)
{
    rig_waiter *r = (rig_waiter *)w;
    pthread_mutex_lock(&r->lock);
    r->fired = true;
    r->times++;
    pthread_cond_signal(&r->cond);
    pthread_mutex_unlock(&r->lock);
}

static inline void rig_waiter_init(rig_waiter *w)
{
    memset(w, 0, sizeof *w);
    w->w.fire = rig_fire;
    pthread_mutex_init(&w->lock, NULL);
    pthread_cond_init(&w->cond, NULL);
}

static inline sc_exit rig_fired(rig_waiter *w)
{
    pthread_mutex_lock(&w->lock);
    while (!w->fired)
        pthread_cond_wait(&w->cond, &w->lock);
    pthread_mutex_unlock(&w->lock);
    return w->w.exit;
}

static inline int rig_phase(sc_slot *s)
{
    sc_slot_info i;
    sc_slot_info_get(s, &i);
    return i.phase;
}

static inline sc_stats rig_stats(void)
{
    sc_lock(core);
    sc_stats s = core->stats;
    sc_unlock(core);
    return s;
}

/* Has the exit thread done all that was there to do? Two timers, one after the other: the first may be fired by a turn of
 * the loop that had begun before; what stood before the second has been handled, the sweep of that turn included. */
static inline void rig_settle(void)
{
    for (int i = 0; i < 2; i++) {
        CHECK_EQ(sc_delay(core, 0, NULL), 0);
        rig_note_wait(SC_NOTE_TIMER);
    }
}
#endif
