#define _GNU_SOURCE
#include "exits.h"

#include <errno.h>
#include <signal.h>
#include <unistd.h>

#include "ledger.h"
#include "oom.h"
#include "wire.h"

enum { KILL_AGAIN_MAX = 500 };
#define KILL_AGAIN_NS 20000000LL
#define INIT_BOUND_NS 10000000000LL

static void take_out(sc_core *c, sc_slot *s);

uint64_t sc_hash(const char *text)
{
    uint64_t h = 1469598103934665603ULL; /* FNV-1a */
    for (; *text; text++)
        h = (h ^ (uint8_t)*text) * 1099511628211ULL;
    return h ? h : 1;
}

/* ---- the table: a hash by (id, exec_id) ---- */

static sc_slot **place(sc_core *c, uint64_t key_id, uint64_t key_exec)
{
    return &c->slots[(key_id ^ key_exec * 31) & (c->slot_cap - 1)];
}

static sc_slot *find(sc_core *c, const char *id, const char *exec_id)
{
    sc_slot *s = *place(c, sc_hash(id), sc_hash(exec_id));
    while (s && (strcmp(s->id, id) || strcmp(s->exec_id, exec_id)))
        s = s->hash_next;
    return s;
}

static void grow(sc_core *c)
{
    size_t old = c->slot_cap;
    sc_slot **was = c->slots, **now = calloc(old * 2, sizeof *now);
    if (!now)
        return; /* longer chains, nothing worse */
    c->slots = now;
    c->slot_cap = old * 2;
    for (size_t i = 0; i < old; i++) {
        while (was[i]) {
            sc_slot *s = was[i], **p = place(c, s->key_id, s->key_exec);
            was[i] = s->hash_next;
            s->hash_next = *p;
            *p = s;
        }
    }
    free(was);
}

void sc_slot_insert(sc_core *c, sc_slot *s)
{
    if (++c->slot_count > c->slot_cap)
        grow(c);
    sc_slot **p = place(c, s->key_id, s->key_exec);
    s->hash_next = *p;
    *p = s;
    s->in_table = true;
    sc_slot_ref(s);
}

void sc_slot_ref(sc_slot *s)
{
    atomic_fetch_add(&s->refs, 1);
}

void sc_slot_unref(sc_slot *s)
{
    if (atomic_fetch_sub(&s->refs, 1) != 1)
        return;
    if (s->init)
        sc_slot_unref(s->init);
    free(s->id);
    free(s->exec_id);
    free(s->state);
    free(s->kill_procs);
    sc_ledger_unref(s->ledger);
    free(s);
}

static void bound_fire(sc_core *c, sc_timer *t);
static void kill_again_fire(sc_core *c, sc_timer *t);
static void record_late_fire(sc_core *c, sc_timer *t);
static void teardown_fire(sc_core *c, sc_timer *t);
static void slot_died(sc_core *c, sc_child *k, const sc_exit_status *st, int64_t mono, int64_t real);

sc_slot *sc_slot_new(sc_core *c, const char *id, const char *exec_id, const uint8_t *state, size_t n)
{
    sc_slot *s = calloc(1, sizeof *s);
    if (!s)
        return NULL;
    atomic_init(&s->refs, 1);
    s->core = c;
    s->id = strdup(id);
    s->exec_id = strdup(exec_id);
    s->state = malloc(n + 1);
    if (!s->id || !s->exec_id || !s->state) {
        sc_slot_unref(s);
        return NULL;
    }
    if (n)
        memcpy(s->state, state, n);
    s->state_len = n;
    s->key_id = sc_hash(id);
    s->key_exec = sc_hash(exec_id);
    s->task_status = SC_CREATED;
    s->child.pidfd = -2;
    s->child.died = slot_died;
    s->bound.fire = bound_fire;
    s->kill_again.fire = kill_again_fire;
    s->record_late.fire = record_late_fire;
    s->teardown.fire = teardown_fire;
    s->bound_ns = INIT_BOUND_NS;
    return s;
}

sc_slot *sc_slot_in_table(sc_core *c, const char *id, const char *exec_id)
{
    return find(c, id, exec_id);
}

sc_slot *sc_slot_find(sc_core *c, const char *id, const char *exec_id)
{
    sc_lock(c);
    sc_slot *s = find(c, id, exec_id);
    if (s)
        sc_slot_ref(s);
    sc_unlock(c);
    return s;
}

static void opened(sc_core *c, sc_slot *s)
{
    s->phase = SC_OPENED;
    s->opened_mono = sc_now_mono();
    if (!c->open_unbound++)
        c->oldest_open = s->opened_mono;
    if (s->init)
        s->init->busy++;
}

/* Opened no more: bound or dropped. */
static void closed(sc_core *c)
{
    if (!--c->open_unbound && c->reap_orphans)
        sc_sweep_soon(c);
}

int sc_slot_open_init(sc_core *c, const char *id, const uint8_t *state, size_t n, sc_slot **out)
{
    sc_slot *s = sc_slot_new(c, id, "", state, n);
    if (!s)
        return -ENOMEM;
    sc_lock(c);
    bool used = find(c, id, "") != NULL;
    if (!used) {
        sc_slot_insert(c, s);
        opened(c, s);
    }
    sc_unlock(c);
    if (used) {
        sc_slot_unref(s);
        return -EEXIST;
    }
    *out = s;
    return 0;
}

void sc_slot_add_exec(sc_slot *init, sc_slot *exec)
{
    exec->init = init;
    sc_slot_ref(init);
    exec->sibling = init->execs;
    init->execs = exec;
}

int sc_slot_reserve(sc_core *c, const char *id, const char *exec_id, const uint8_t *state, size_t n, sc_slot **out)
{
    sc_slot *s = sc_slot_new(c, id, exec_id, state, n);
    if (!s)
        return -ENOMEM;
    sc_lock(c);
    sc_slot *init = *exec_id ? find(c, id, "") : NULL;
    int r = *exec_id && !init ? -ENOENT : find(c, id, exec_id) ? -EEXIST : 0;
    if (r == 0) {
        s->phase = SC_RESERVED;
        if (init)
            sc_slot_add_exec(init, s);
        sc_slot_insert(c, s);
    }
    sc_unlock(c);
    if (r < 0) {
        sc_slot_unref(s);
        return r;
    }
    *out = s;
    return 0;
}

int sc_slot_open(sc_slot *s)
{
    sc_core *c = s->core;
    sc_lock(c);
    int r = 0;
    if (s->phase != SC_RESERVED)
        r = -EINVAL;
    else if (s->init && s->init->phase != SC_BOUND)
        r = -ESRCH;
    else
        opened(c, s);
    sc_unlock(c);
    return r;
}

/* ---- telling ---- */

static void unpark(sc_core *c, sc_waiter *w)
{
    if (w->prev)
        w->prev->next = w->next;
    else
        w->slot->waiters = w->next;
    if (w->next)
        w->next->prev = w->prev;
    w->slot = NULL;
    sc_timer_clear(c, &w->timer);
}

static void answer_waits(sc_slot *s)
{
    while (s->waiters) {
        sc_waiter *w = s->waiters;
        unpark(s->core, w);
        w->exit = s->exit;
        w->next = s->core->firing;
        s->core->firing = w;
    }
}

static void wait_late(sc_core *c, sc_timer *t)
{
    sc_waiter *w = (sc_waiter *)((char *)t - offsetof(sc_waiter, timer));
    unpark(c, w);
    w->late = true;
    w->next = c->firing;
    c->firing = w;
}

static uint8_t *put_exit(uint8_t *p, const sc_slot *s)
{
    const char *id = *s->exec_id ? s->exec_id : s->id; /* TaskExit.id is the container's for init */
    p = sc_write_bytes(p, 1, s->id, strlen(s->id));
    p = sc_write_bytes(p, 2, id, strlen(id));
    p = sc_write_uint(p, 3, s->exit.pid);
    if (s->exit.status)
        p = sc_write_uint(p, 4, s->exit.status);
    return sc_write_timestamp(p, 5, s->exit.exited_at);
}

static uint64_t stamp(sc_core *c, const sc_slot *s)
{
    if (!c->stamps && !(c->stamps = calloc(SC_STAMPS, sizeof *c->stamps)))
        return 0;
    sc_stamp *t = &c->stamps[c->stamp_count % SC_STAMPS];
    memset(t, 0, sizeof *t);
    strncpy(t->id, s->id, SC_ID_MAX - 1);
    strncpy(t->exec_id, s->exec_id, SC_ID_MAX - 1);
    t->pid = (pid_t)s->exit.pid;
    t->reaped = s->reaped_mono;
    t->recorded = s->recorded_mono;
    return ++c->stamp_count;
}

void sc_slot_timers_clear(sc_core *c, sc_slot *s)
{
    sc_timer_clear(c, &s->bound);
    sc_timer_clear(c, &s->record_late);
    sc_timer_clear(c, &s->teardown);
}

/* The exit thread frees it: an event for its fd may be in the batch. */
static void bury_oom(sc_core *c, sc_slot *s)
{
    s->oom_over = true;
    if (!s->oom)
        return;
    s->oom->init = NULL;
    s->oom->grave = c->oom_grave;
    c->oom_grave = s->oom;
    s->oom = NULL;
    sc_core_wake(c);
}

static void tell(sc_slot *s)
{
    sc_core *c = s->core;
    sc_slot *init = s->init ? s->init : s;
    if (init->oom)
        sc_oom_look(c, init->oom);
    uint8_t small[512], *body = small;
    size_t need = 2 * (strlen(s->id) + 6) + strlen(s->exec_id) + 2 * 11 + SC_TIMESTAMP_MAX;
    if (need > sizeof small && !(body = malloc(need)))
        abort(); /* an exit that can't be told is worse than a shim that dies: delete tells it then */
    size_t n = (size_t)(put_exit(body, s) - body);
    static const char topic[] = "/tasks/exit", type[] = "containerd.events.TaskExit";
    sc_event *e = sc_event_new(c, (sc_slice){(const uint8_t *)topic, sizeof topic - 1},
                               (sc_slice){(const uint8_t *)type, sizeof type - 1}, (sc_slice){body, n}, s->id, s->exec_id);
    if (body != small)
        free(body);
    if (!e)
        abort();
    e->stamp = stamp(c, s);
    s->phase = SC_TOLD;
    c->stats.told++;
    sc_slot_timers_clear(c, s);
    if (s == init)
        bury_oom(c, s);
    sc_outbox_push(c, e);
    if (sc_on_exit_thread(c))
        sc_outbox_pump(c);
    else
        sc_core_wake(c);
    answer_waits(s);
    sc_slot_ref(s);
    sc_post_told(c, s);
    if (s->init) {
        s->init->busy--;
        sc_tell_if_due(s->init);
        if (!s->init->in_table)
            take_out(c, s); /* overdue, and its container was deleted before it ended */
    }
}

void sc_tell_if_due(sc_slot *s)
{
    if (s->phase != SC_EXITED || !s->announced || s->holds || s->tearing_down || s->record == SC_RECORD_PENDING)
        return;
    if (!s->init && s->busy && !s->overdue)
        return;
    tell(s);
}

static void bound_fire(sc_core *c, sc_timer *t)
{
    sc_slot *s = (sc_slot *)((char *)t - offsetof(sc_slot, bound));
    c->stats.overdue += s->busy;
    s->overdue = true;
    sc_tell_if_due(s);
}

static void record_late_fire(sc_core *c, sc_timer *t)
{
    sc_slot *s = (sc_slot *)((char *)t - offsetof(sc_slot, record_late));
    c->stats.record_late++;
    s->record = SC_RECORD_DONE;
    sc_tell_if_due(s);
}

static void teardown_fire(sc_core *c, sc_timer *t)
{
    sc_slot *s = (sc_slot *)((char *)t - offsetof(sc_slot, teardown));
    c->stats.teardown_late++;
    s->tearing_down = false;
    sc_tell_if_due(s);
}

int sc_slot_set_teardown(sc_slot *s, int64_t ns)
{
    sc_lock(s->core);
    s->teardown_ns = ns;
    sc_unlock(s->core);
    return 0;
}

int sc_slot_teardown_done(sc_slot *s)
{
    sc_core *c = s->core;
    sc_lock(c);
    if (s->tearing_down) {
        s->tearing_down = false;
        sc_timer_clear(c, &s->teardown);
        sc_tell_if_due(s);
        sc_core_wake(c);
    }
    sc_unlock(c);
    return 0;
}

int sc_slot_set_ledger(sc_slot *s, struct sc_ledger *l)
{
    sc_core *c = s->core;
    sc_lock(c);
    struct sc_ledger *was = s->ledger;
    s->ledger = l;
    sc_unlock(c);
    sc_ledger_unref(was);
    return 0;
}

/* cgroup files are read and written without the lock: the loop calls sc_kill_queued after it has let go. */
static void kill_rest(sc_core *c, sc_slot *s)
{
    if (s->kill_queued)
        return;
    s->kill_queued = true;
    sc_slot_ref(s);
    s->kill_next = c->killing;
    c->killing = s;
    sc_core_wake(c);
}

void sc_slot_kill_rest(sc_slot *s)
{
    kill_rest(s->core, s);
}

void sc_kill_queued(sc_core *c)
{
    sc_lock(c);
    sc_slot *s = c->killing;
    c->killing = NULL;
    sc_unlock(c);
    while (s) {
        sc_lock(c);
        sc_slot *next = s->kill_next;
        char *procs = s->kill_procs ? strdup(s->kill_procs) : NULL;
        s->kill_queued = false;
        sc_unlock(c);
        int n = procs ? sc_cgroup_signal(procs, SIGKILL) : 0;
        free(procs);
        sc_lock(c);
        if (n && s->in_table && ++s->kill_tries < KILL_AGAIN_MAX)
            sc_timer_set(c, &s->kill_again, sc_now_mono() + KILL_AGAIN_NS); /* who was forking escaped this round */
        sc_unlock(c);
        sc_slot_unref(s);
        s = next;
    }
}

static void kill_again_fire(sc_core *c, sc_timer *t)
{
    kill_rest(c, (sc_slot *)((char *)t - offsetof(sc_slot, kill_again)));
}

static void exited(sc_core *c, sc_slot *s, const sc_exit_status *st, int64_t mono, int64_t real)
{
    s->phase = SC_EXITED;
    s->reaped_mono = mono;
    s->exit = (sc_exit){(uint32_t)s->pid, (uint32_t)st->status, real};
    sc_record(c, s);
    if (s->teardown_ns > 0) {
        s->tearing_down = true;
        sc_timer_set(c, &s->teardown, mono + s->teardown_ns);
        sc_slot_ref(s);
        sc_post(c, SC_NOTE_TEARDOWN, s, 0, 0, 0);
    }
    if (!s->init) {
        if (s->kill_procs)
            kill_rest(c, s);
        if (s->busy)
            sc_timer_set(c, &s->bound, mono + s->bound_ns);
    }
    sc_tell_if_due(s);
}

void sc_slot_exited(sc_slot *s, const sc_exit_status *st, int64_t mono, int64_t real)
{
    exited(s->core, s, st, mono, real);
}

static void slot_died(sc_core *c, sc_child *k, const sc_exit_status *st, int64_t mono, int64_t real)
{
    exited(c, (sc_slot *)k, st, mono, real);
}

int sc_slot_bind(sc_slot *s, pid_t pid)
{
    sc_core *c = s->core;
    int fd = pid > 0 ? sc_pidfd_open(pid) : -EINVAL;
    if (fd < 0 && fd != -ESRCH && fd != -EMFILE && fd != -ENFILE && fd != -ENOMEM)
        return fd;
    sc_lock(c);
    if (s->phase != SC_OPENED) {
        sc_unlock(c);
        if (fd >= 0)
            close(fd);
        return -EINVAL;
    }
    s->phase = SC_BOUND;
    s->pid = pid;
    if (fd >= 0 && sc_children_told(c, pid)) {
        close(fd);
        fd = -ESRCH;
    }
    sc_early early;
    if (fd == -ESRCH) {
        if (!sc_early_take(c, pid, &early)) { /* gone, and not by us: somebody's wait stole it */
            early = (sc_early){.pid = pid, .st = {.pid = pid, .status = 255}, .mono = sc_now_mono(), .real = sc_now_real()};
            c->stats.stolen++;
        }
        exited(c, s, &early.st, early.mono, early.real);
    } else {
        sc_child_add(c, &s->child, pid, fd < 0 ? -1 : fd);
    }
    closed(c);
    sc_unlock(c);
    return 0;
}

static int queue_event(sc_core *c, sc_event *e)
{
    if (e) {
        sc_outbox_push(c, e);
        sc_core_wake(c);
    }
    return 0;
}

int sc_slot_announce(sc_slot *s, sc_event *e)
{
    sc_core *c = s->core;
    sc_lock(c);
    queue_event(c, e);
    s->announced = true;
    if (s->init)
        s->task_status = SC_RUNNING;
    sc_tell_if_due(s);
    sc_unlock(c);
    return 0;
}

int sc_slot_hold(sc_slot *s)
{
    sc_lock(s->core);
    s->holds++;
    sc_unlock(s->core);
    return 0;
}

int sc_slot_release(sc_slot *s, sc_event *e)
{
    sc_core *c = s->core;
    sc_lock(c);
    queue_event(c, e);
    if (s->holds)
        s->holds--;
    sc_tell_if_due(s);
    sc_unlock(c);
    return 0;
}

int sc_slot_set_status(sc_slot *s, int status)
{
    sc_lock(s->core);
    s->task_status = status;
    sc_unlock(s->core);
    return 0;
}

int sc_slot_set_kill_rest(sc_slot *s, const char *procs, int64_t bound_ns)
{
    sc_core *c = s->core;
    char *copy = procs ? strdup(procs) : NULL;
    sc_lock(c);
    free(s->kill_procs);
    s->kill_procs = copy;
    s->bound_ns = bound_ns;
    if (s->phase == SC_EXITED && copy) /* it died before it could be said what is to be killed */
        kill_rest(c, s);
    sc_unlock(c);
    return 0;
}

int sc_slot_drop(sc_slot *s)
{
    sc_core *c = s->core;
    sc_lock(c);
    if (s->phase == SC_OPENED || s->phase == SC_RESERVED) {
        bool was_open = s->phase == SC_OPENED;
        s->phase = SC_DROPPED;
        s->exit = (sc_exit){0, 255, sc_now_real()};
        answer_waits(s);
        if (was_open) {
            closed(c);
            if (s->init) {
                s->init->busy--;
                sc_tell_if_due(s->init);
                if (!s->init->in_table)
                    take_out(c, s);
            }
        }
    }
    sc_unlock(c);
    return 0;
}

static void take_out(sc_core *c, sc_slot *s)
{
    sc_slot **p = place(c, s->key_id, s->key_exec);
    while (*p && *p != s)
        p = &(*p)->hash_next;
    if (!*p)
        return;
    *p = s->hash_next;
    s->in_table = false;
    c->slot_count--;
    sc_slot_timers_clear(c, s);
    sc_timer_clear(c, &s->kill_again);
    bury_oom(c, s);
    if (!s->execs) { /* its fd goes now, not with Python's last reference */
        sc_ledger_unref(s->ledger);
        s->ledger = NULL;
    }
    if (!s->exit.exited_at)
        s->exit = (sc_exit){0, 255, sc_now_real()};
    answer_waits(s); /* of an exec that was never started */
    if (s->phase == SC_RESERVED)
        s->phase = SC_DROPPED;
    if (s->init) {
        for (sc_slot **q = &s->init->execs; *q; q = &(*q)->sibling) {
            if (*q == s) {
                *q = s->sibling;
                break;
            }
        }
    }
    sc_slot_unref(s);
}

int sc_slot_forget(sc_slot *s)
{
    sc_core *c = s->core;
    sc_lock(c);
    int r = 0;
    if (s->in_table) {
        if (s->phase != SC_TOLD && s->phase != SC_DROPPED && s->phase != SC_RESERVED)
            r = -EBUSY;
        for (sc_slot *e = s->execs; e && r == 0; e = e->sibling)
            if ((e->phase == SC_OPENED || e->phase == SC_BOUND || e->phase == SC_EXITED) && !s->overdue)
                r = -EBUSY;
        if (r == 0) {
            while (s->execs) {
                sc_slot *e = s->execs;
                if (e->phase == SC_OPENED || e->phase == SC_BOUND || e->phase == SC_EXITED) {
                    s->execs = e->sibling; /* overdue: it goes on without its container and is told when it ends */
                    continue;
                }
                take_out(c, e);
            }
            take_out(c, s);
        }
    }
    sc_unlock(c);
    return r;
}

int sc_slot_kill(sc_slot *s, int sig)
{
    sc_core *c = s->core;
    sc_lock(c);
    int r;
    if (s->phase == SC_RESERVED || s->phase == SC_OPENED)
        r = -EINVAL;
    else if (s->phase != SC_BOUND)
        r = -ESRCH;
    else if (s->child.pidfd >= 0)
        r = sc_pidfd_send_signal(s->child.pidfd, sig);
    else
        r = kill(s->pid, sig) < 0 ? -errno : 0; /* not reaped, so the number is still its own */
    sc_unlock(c);
    return r;
}

/* ---- what containerd asks ---- */

int sc_slot_wait(sc_core *c, const char *id, const char *exec_id, sc_waiter *w, int64_t deadline)
{
    sc_lock(c);
    sc_slot *s = find(c, id, exec_id);
    int r = -ENOENT;
    if (s && (s->phase == SC_TOLD || s->phase == SC_DROPPED)) {
        w->slot = NULL;
        w->exit = s->exit;
        r = 1;
    } else if (s) {
        w->slot = s;
        w->prev = NULL;
        w->next = s->waiters;
        if (w->next)
            w->next->prev = w;
        s->waiters = w;
        w->late = false;
        w->timer.fire = wait_late;
        if (deadline)
            sc_timer_set(c, &w->timer, deadline);
        r = 0;
    }
    sc_unlock(c);
    return r;
}

bool sc_waiter_cancel(sc_core *c, sc_waiter *w)
{
    sc_lock(c);
    bool ours = w->slot != NULL;
    if (ours)
        unpark(c, w);
    sc_unlock(c);
    return ours;
}

int sc_slot_state(sc_core *c, const char *id, const char *exec_id, sc_buf *out)
{
    int r = -ENOENT;
    sc_lock(c);
    sc_slot *s = find(c, id, exec_id);
    if (s) {
        bool over = s->phase == SC_TOLD || s->phase == SC_DROPPED;
        r = sc_buf_reserve(out, s->state_len + 3 * 11 + SC_TIMESTAMP_MAX) ? 0 : -ENOMEM;
        if (r == 0) {
            sc_buf_put(out, s->state, s->state_len);
            uint8_t *p = out->p + out->len;
            if (s->pid)
                p = sc_write_uint(p, 3, (uint64_t)s->pid);
            p = sc_write_uint(p, 4, (uint64_t)(over ? SC_STOPPED : s->task_status));
            if (over) {
                if (s->exit.status)
                    p = sc_write_uint(p, 9, s->exit.status);
                p = sc_write_timestamp(p, 10, s->exit.exited_at);
            }
            out->len = (size_t)(p - out->p);
        }
    }
    sc_unlock(c);
    return r;
}

void sc_slot_info_get(sc_slot *s, sc_slot_info *out)
{
    sc_lock(s->core);
    bool over = s->phase == SC_TOLD || s->phase == SC_DROPPED;
    *out = (sc_slot_info){s->phase, over ? SC_STOPPED : s->task_status, s->pid, s->exit};
    sc_unlock(s->core);
}
