/* The exit thread's loop: epoll, signals, timers. */
#define _GNU_SOURCE
#include "exits.h"
#include "ledger.h"
#include "oom.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

/* Signals are the process's, so what the handler writes to has to be. The handler does one write, nothing else. */
static atomic_int signal_fd = -1;
static atomic_uint_fast64_t signals_seen;

static void on_signal(int sig)
{
    int saved = errno, fd = atomic_load(&signal_fd);
    uint64_t one = 1;
    atomic_fetch_or(&signals_seen, (uint_fast64_t)1 << sig);
    if (fd >= 0 && write(fd, &one, sizeof one) < 0) {
        /* EAGAIN: the counter is full, so the thread is being woken anyway. */
    }
    errno = saved;
}

void sc_lock(sc_core *c)
{
    pthread_mutex_lock(&c->lock);
}

void sc_unlock(sc_core *c)
{
    sc_waiter *w = c->firing;
    c->firing = NULL;
    pthread_mutex_unlock(&c->lock);
    while (w) {
        sc_waiter *next = w->next;
        w->fire(w);
        w = next;
    }
}

bool sc_on_exit_thread(sc_core *c)
{
    return atomic_load(&c->running) && pthread_equal(c->runner, pthread_self());
}

void sc_core_wake(sc_core *c)
{
    if (sc_on_exit_thread(c))
        return;
    uint64_t one = 1;
    if (write(c->wakefd, &one, sizeof one) < 0) {
        /* EAGAIN: awake already. */
    }
}

static void drain_eventfd(int fd)
{
    uint64_t n;
    while (read(fd, &n, sizeof n) < 0 && errno == EINTR)
        ;
}

static void wake_ready(sc_core *c, sc_source *s, uint32_t ev)
{
    (void)s, (void)ev;
    drain_eventfd(c->wakefd);
}

static void signals_ready(sc_core *c, sc_source *s, uint32_t ev)
{
    (void)s, (void)ev;
    drain_eventfd(atomic_load(&signal_fd));
    uint64_t seen = atomic_exchange(&signals_seen, 0);
    for (int sig = 1; sig < 64; sig++) {
        if (!(seen >> sig & 1))
            continue;
        if (sig == SIGCHLD)
            sc_children_on_sigchld(c);
        else
            sc_post(c, SC_NOTE_SIGNAL, NULL, sig, 0, 0);
    }
}

int sc_watch_fd(sc_core *c, int fd, uint32_t events, sc_source *src)
{
    struct epoll_event ev = {.events = events, .data.ptr = src};
    return epoll_ctl(c->epfd, EPOLL_CTL_ADD, fd, &ev) < 0 ? -errno : 0;
}

static void sweep_fire(sc_core *c, sc_timer *t)
{
    (void)t;
    c->need_sweep = true;
}

sc_core *sc_core_new(const char *ns, const char *events_address)
{
    sc_core *c = calloc(1, sizeof *c);
    if (!c)
        return NULL;
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&c->drained, &attr);
    pthread_cond_init(&c->news, &attr);
    pthread_condattr_destroy(&attr);
    pthread_mutex_init(&c->lock, NULL);
    pthread_mutex_init(&c->mail_lock, NULL);
    c->mail_tail = &c->mail;
    c->ask_fd = -1;
    c->ns = strdup(ns);
    c->slot_cap = 64;
    c->slots = calloc(c->slot_cap, sizeof *c->slots);
    c->epfd = epoll_create1(EPOLL_CLOEXEC);
    c->wakefd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    c->mailfd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    c->wake_src.ready = wake_ready;
    c->sig_src.ready = signals_ready;
    c->sweep_timer.fire = sweep_fire;
    c->look_timer.fire = sweep_fire;
    c->told_timer.fire = sc_told_ring;
    c->reap_orphans = true;
    sc_outbox_init(&c->outbox, events_address);
    if (!c->ns || !c->slots || c->epfd < 0 || c->wakefd < 0 || c->mailfd < 0 ||
        sc_watch_fd(c, c->wakefd, EPOLLIN, &c->wake_src) < 0) {
        int e = errno;
        sc_core_free(c);
        errno = e;
        return NULL;
    }
    return c;
}

static void free_graveyard(sc_core *c)
{
    while (c->graveyard) {
        sc_job *j = c->graveyard;
        c->graveyard = j->grave;
        sc_job_free(j);
    }
    while (c->oom_grave) {
        sc_oom *o = c->oom_grave;
        c->oom_grave = o->grave;
        sc_oom_free(c, o);
    }
}

static void delay_fire(sc_core *c, sc_timer *t);

/* Notes that nobody took, calls and watched pids still under way, delays: what Python keeps for them is Python's to let go of. */
static void free_unfinished(sc_core *c)
{
    for (sc_note *n = c->mail, *next; n; n = next) {
        next = n->next;
        if (n->kind == SC_NOTE_TOLD || n->kind == SC_NOTE_TEARDOWN)
            sc_slot_unref(n->ptr);
        else if (n->kind == SC_NOTE_JOB && ((sc_job *)n->ptr)->dead)
            sc_job_free(n->ptr);
        free(n);
    }
    for (size_t i = 0; i < sizeof c->pids / sizeof *c->pids; i++) {
        while (c->pids[i]) { /* slots have been taken out: what is left was made as a job */
            sc_job *j = (sc_job *)c->pids[i];
            sc_child_remove(c, &j->child);
            sc_timer_clear(c, &j->deadline);
            if (j->out_fd >= 0)
                close(j->out_fd);
            sc_job_free(j);
        }
    }
    for (size_t i = 0; i < c->heap_len; i++)
        if (c->heap[i]->fire == delay_fire)
            free(c->heap[i]);
}

void sc_core_free(sc_core *c)
{
    if (!c)
        return;
    sc_recorder_stop(c);
    if (c->has_signals) {
        /* The handlers were ours: back to the default, so that no write goes to a closed fd. */
        int fd = atomic_exchange(&signal_fd, -1);
        static const int sigs[] = {SIGCHLD, SIGTERM, SIGINT, SIGUSR1};
        for (size_t i = 0; i < sizeof sigs / sizeof *sigs; i++)
            signal(sigs[i], SIG_DFL);
        close(fd);
    }
    for (size_t i = 0; i < c->slot_cap && c->slots; i++) {
        while (c->slots[i]) {
            sc_slot *s = c->slots[i];
            c->slots[i] = s->hash_next;
            s->in_table = false;
            if (s->child.listed)
                sc_child_remove(c, &s->child);
            sc_slot_timers_clear(c, s);
            sc_timer_clear(c, &s->kill_again);
            if (s->oom)
                sc_oom_free(c, s->oom);
            sc_slot_unref(s);
        }
    }
    sc_children_close(c, SC_CLOSING);
    free_graveyard(c);
    sc_outbox_free(c);
    free_unfinished(c);
    if (c->epfd >= 0)
        close(c->epfd);
    if (c->wakefd >= 0)
        close(c->wakefd);
    if (c->mailfd >= 0)
        close(c->mailfd);
    free(c->slots);
    free(c->early);
    free(c->left);
    free(c->heap);
    free(c->stamps);
    sc_past_free(c);
    free(c->ns);
    pthread_mutex_destroy(&c->lock);
    pthread_mutex_destroy(&c->mail_lock);
    pthread_cond_destroy(&c->drained);
    pthread_cond_destroy(&c->news);
    free(c);
}

static void unblock(const int *sigs, size_t n)
{
    sigset_t open;
    sigemptyset(&open);
    for (size_t i = 0; i < n; i++)
        sigaddset(&open, sigs[i]);
    pthread_sigmask(SIG_UNBLOCK, &open, NULL);
}

static void handle(int sig, void (*handler)(int))
{
    struct sigaction sa;
    memset(&sa, 0, sizeof sa);
    sa.sa_handler = handler;
    sa.sa_flags = SA_RESTART | (sig == SIGCHLD ? SA_NOCLDSTOP : 0);
    sigfillset(&sa.sa_mask);
    sigaction(sig, &sa, NULL);
}

void sc_signals_early(void)
{
    static const int sigs[] = {SIGTERM, SIGINT, SIGPIPE, SIGUSR1};
    for (size_t i = 0; i < sizeof sigs / sizeof *sigs; i++)
        handle(sigs[i], on_signal);
    unblock(sigs, sizeof sigs / sizeof *sigs);
}

int sc_core_signals(sc_core *c, bool sigchld)
{
    int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), none = -1;
    if (fd < 0)
        return -errno;
    if (!atomic_compare_exchange_strong(&signal_fd, &none, fd)) {
        close(fd);
        return -EBUSY;
    }
    int r = sc_watch_fd(c, fd, EPOLLIN, &c->sig_src);
    if (r < 0) {
        atomic_store(&signal_fd, -1);
        close(fd);
        return r;
    }
    static const int sigs[] = {SIGTERM, SIGINT, SIGPIPE, SIGUSR1, SIGCHLD};
    /* Inherited SIG_IGN of SIGCHLD would lose every status (wait(2), notes): without our reaper it is set to default. */
    for (size_t i = 0; i < sizeof sigs / sizeof *sigs; i++)
        handle(sigs[i], sigs[i] == SIGCHLD && !sigchld ? SIG_DFL : on_signal);
    unblock(sigs, sizeof sigs / sizeof *sigs);
    uint64_t one = 1;
    if (atomic_load(&signals_seen) && write(fd, &one, sizeof one) < 0) { /* came early */
        /* EAGAIN: it is readable already. */
    }
    sc_lock(c);
    c->has_signals = true;
    c->reap_orphans = c->has_sigchld = sigchld;
    c->need_sweep |= sigchld; /* who died before the handler stood */
    sc_unlock(c);
    sc_core_wake(c);
    return 0;
}

/* ---- timers: a binary heap by `when` ---- */

static void heap_put(sc_core *c, size_t i, sc_timer *t)
{
    c->heap[i] = t;
    t->at = i + 1;
}

static void heap_fix(sc_core *c, size_t i)
{
    sc_timer *t = c->heap[i];
    while (i && c->heap[(i - 1) / 2]->when > t->when) {
        heap_put(c, i, c->heap[(i - 1) / 2]);
        i = (i - 1) / 2;
    }
    for (;;) {
        size_t k = 2 * i + 1;
        if (k >= c->heap_len)
            break;
        if (k + 1 < c->heap_len && c->heap[k + 1]->when < c->heap[k]->when)
            k++;
        if (c->heap[k]->when >= t->when)
            break;
        heap_put(c, i, c->heap[k]);
        i = k;
    }
    heap_put(c, i, t);
}

void sc_timer_clear(sc_core *c, sc_timer *t)
{
    if (!t->at)
        return;
    size_t i = t->at - 1;
    t->at = 0;
    sc_timer *last = c->heap[--c->heap_len];
    if (i < c->heap_len) {
        heap_put(c, i, last);
        heap_fix(c, i);
    }
}

void sc_timer_set(sc_core *c, sc_timer *t, int64_t when)
{
    sc_timer_clear(c, t);
    if (c->heap_len == c->heap_cap) {
        size_t cap = c->heap_cap ? 2 * c->heap_cap : 16;
        sc_timer **heap = realloc(c->heap, cap * sizeof *heap);
        if (!heap)
            return; /* out of memory: the timer is lost, what it bounds is late, nothing else breaks */
        c->heap = heap;
        c->heap_cap = cap;
    }
    t->when = when;
    heap_put(c, c->heap_len++, t);
    heap_fix(c, c->heap_len - 1);
    if (c->heap[0] == t)
        sc_core_wake(c); /* the exit thread may be sleeping past this one */
}

struct delay {
    sc_timer timer;
    void *cookie;
};

static void delay_fire(sc_core *c, sc_timer *t)
{
    struct delay *d = (struct delay *)t;
    sc_post(c, SC_NOTE_TIMER, d->cookie, 0, 0, 0);
    free(d);
}

int sc_delay(sc_core *c, int64_t ns, void *cookie)
{
    struct delay *d = calloc(1, sizeof *d);
    if (!d)
        return -ENOMEM;
    d->timer.fire = delay_fire;
    d->cookie = cookie;
    sc_lock(c);
    sc_timer_set(c, &d->timer, sc_now_mono() + (ns > 0 ? ns : 0));
    sc_unlock(c);
    return 0;
}

void sc_sweep_soon(sc_core *c)
{
    if (c->need_sweep)
        return;
    c->need_sweep = true;
    sc_core_wake(c);
}

/* ---- the loop ---- */

/* For epoll_wait: until the next thing that nobody will wake us for. */
static int timeout_ms(const sc_core *c)
{
    if (c->closing_len)
        return 1;
    if (!c->need_sweep && !c->heap_len)
        return -1;
    int64_t when = c->need_sweep ? c->sweep_after : INT64_MAX;
    if (c->heap_len && c->heap[0]->when < when)
        when = c->heap[0]->when;
    int64_t left = when - sc_now_mono();
    return left <= 0 ? 0 : left > 3600000000000LL ? 3600000 : (int)((left + 999999) / 1000000);
}

int sc_core_run(sc_core *c)
{
    struct epoll_event evs[64];
    sc_run_first();
    sc_lock(c);
    c->runner = pthread_self();
    atomic_store(&c->running, true);
    sc_unlock(c);
    while (!atomic_load(&c->stop) && !atomic_load(&c->pause)) {
        sc_lock(c);
        int timeout = timeout_ms(c);
        sc_unlock(c);
        int n = epoll_wait(c->epfd, evs, 64, timeout);
        if (n < 0 && errno != EINTR)
            return -errno;
        sc_lock(c);
        unsigned told_before = c->closing_len;
        for (int i = 0; i < n; i++) {
            sc_source *src = evs[i].data.ptr;
            src->ready(c, src, evs[i].events);
        }
        if (c->heap_len) {
            int64_t now = sc_now_mono();
            while (c->heap_len && c->heap[0]->when <= now) {
                sc_timer *t = c->heap[0];
                sc_timer_clear(c, t);
                t->fire(c, t);
            }
        }
        sc_outbox_pump(c);
        sc_children_close(c, c->closing_len > SC_CLOSING_FEW ? SC_CLOSING : told_before);
        if (c->need_sweep && sc_sweep_is_due(c, sc_now_mono())) {
            c->need_sweep = false;
            sc_sweep(c);
            sc_outbox_pump(c);
        }
        free_graveyard(c);
        bool kill = c->killing != NULL;
        sc_unlock(c);
        if (kill)
            sc_kill_queued(c);
    }
    sc_lock(c);
    sc_children_close(c, SC_CLOSING);
    atomic_store(&c->running, false);
    sc_unlock(c);
    return !atomic_load(&c->stop);
}

void sc_core_stop(sc_core *c)
{
    atomic_store(&c->stop, true);
    sc_core_wake(c);
}

void sc_core_pause(sc_core *c, bool on)
{
    atomic_store(&c->pause, on);
    if (on)
        sc_core_wake(c);
}

int sc_core_drain(sc_core *c, int64_t timeout_ns)
{
    int64_t until = sc_now_mono() + timeout_ns;
    struct timespec ts = {until / 1000000000, until % 1000000000};
    pthread_mutex_lock(&c->lock);
    int r = 0;
    while (!sc_outbox_empty(c) && r == 0)
        r = pthread_cond_timedwait(&c->drained, &c->lock, &ts);
    int empty = sc_outbox_empty(c);
    sc_unlock(c);
    return empty;
}
