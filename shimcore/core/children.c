/* Children: who is ours, and what becomes of the others.
 *
 * Ours are waited for by pidfd. Anything else that dies is either an orphan, which the kernel gives to the thread-group leader
 * (find_new_reaper takes the subreaper's first live thread), or a child of another thread of this process, made by an
 * author's subprocess. So the leader sweeps with __WNOTHREAD, and does not see the latter.
 *
 * But when the thread that made such a child has ended, its child is the leader's too. It is told by its process group, which is
 * ours unless its author chose another: orphans of containers and of runtime calls are in groups of their own. A zombie of our
 * group is left to its author for a minute.
 *
 * Told first, reaped after. To reap a process costs twenty times what it costs to read its status (WNOWAIT), so a death that a
 * pidfd shows is read and told, and the zombie waits on `closing` for the loop's next turn: whoever waits for the exit is not
 * kept waiting for ours. A zombie keeps its pid, so nothing can be mixed up meanwhile. No sweep while any is left there: it
 * would take them for strangers. */
#define _GNU_SOURCE
#include "exits.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <unistd.h>

enum { EARLY_AT_ONCE = 1000 };          /* this many zombies waiting, or */
#define LEFT_NS 60000000000LL           /* how long an author has to wait for a child of his */
#define LOOK_NS 250000000LL             /* how often the unarmed are looked at where no SIGCHLD says when */
#define SWEEP_PUT_OFF_NS 10000000LL     /* how long it waits for those that were told and not reaped */
#define SWEEP_PAUSE_NS 200000000LL      /* the longest pause between two sweeps */
enum { SWEEP_SHARE = 20, SWEEP_OWNED = 16 }; /* owned: those whose pidfds say the same, in one sweep */
#define EARLY_AFTER_NS 10000000000LL    /* this long an open slot: unknown zombies go to the early table */

static sc_child **bucket(sc_core *c, pid_t pid)
{
    return &c->pids[(unsigned)pid % (sizeof c->pids / sizeof *c->pids)];
}

static sc_child *find(sc_core *c, pid_t pid)
{
    sc_child *k = *bucket(c, pid);
    while (k && k->pid != pid)
        k = k->next;
    return k;
}

static void unlist(sc_core *c, sc_child *k)
{
    if (!k->listed)
        return;
    sc_child **p = bucket(c, k->pid);
    while (*p && *p != k)
        p = &(*p)->next;
    if (*p)
        *p = k->next;
    k->listed = false;
}

void sc_child_remove(sc_core *c, sc_child *k)
{
    unlist(c, k);
    if (k->disarmed) {
        k->disarmed = false;
        c->disarmed--;
    } else if (k->pidfd >= 0) {
        /* Before the close: a registration outlives it while a forked child holds the fd. */
        epoll_ctl(c->epfd, EPOLL_CTL_DEL, k->pidfd, NULL);
    } else if (k->pidfd == -1) {
        c->by_number--;
    }
    if (k->pidfd >= 0)
        close(k->pidfd);
    k->pidfd = -2;
}

static void tell(sc_core *c, sc_child *k, const sc_exit_status *st, int64_t mono, int64_t real)
{
    if (c->tell_pids && k->died)
        sc_post(c, SC_NOTE_PID, NULL, st->pid, st->status, real);
    k->died(c, k, st, mono, real);
}

static void dead(sc_core *c, sc_child *k, const sc_exit_status *st, int64_t mono, int64_t real)
{
    sc_child_remove(c, k);
    tell(c, k, st, mono, real);
}

/* Its pidfd's registration is disarmed (one-shot), and goes with the fd. */
static void dead_for_now(sc_core *c, sc_child *k, const sc_exit_status *st, int64_t mono, int64_t real)
{
    c->closing[c->closing_len++] = (sc_closing){k->pidfd, k->pid};
    unlist(c, k);
    k->pidfd = -2;
    tell(c, k, st, mono, real);
}

void sc_children_close(sc_core *c, unsigned oldest)
{
    sc_exit_status st;
    if (oldest > c->closing_len)
        oldest = c->closing_len;
    for (unsigned i = 0; i < oldest; i++) {
        sc_reap_pidfd(c->closing[i].pidfd, &st); /* -ECHILD: somebody else's wait took it, after us */
        epoll_ctl(c->epfd, EPOLL_CTL_DEL, c->closing[i].pidfd, NULL);
        close(c->closing[i].pidfd);
    }
    c->closing_len -= oldest;
    memmove(c->closing, c->closing + oldest, c->closing_len * sizeof *c->closing);
}

/* Was its exit told, and is it only its zombie that is left? Then that goes now. */
bool sc_children_told(sc_core *c, pid_t pid)
{
    for (unsigned i = 0; i < c->closing_len; i++) {
        if (c->closing[i].pid == pid) {
            sc_children_close(c, i + 1);
            return true;
        }
    }
    return false;
}

/* Its status was taken by somebody else's wait: 255, never 0. */
static void stolen(sc_core *c, sc_child *k)
{
    sc_exit_status st = {.pid = k->pid, .status = 255};
    c->stats.stolen++;
    dead(c, k, &st, sc_now_mono(), sc_now_real());
}

static void look_again(sc_core *c)
{
    if (!c->has_sigchld && !c->look_timer.at)
        sc_timer_set(c, &c->look_timer, sc_now_mono() + LOOK_NS);
}

static void look(sc_core *c, sc_child *k)
{
    sc_exit_status st;
    bool later = k->pidfd >= 0 && !k->disarmed && c->closing_len < SC_CLOSING;
    int r = later ? sc_peek_pidfd(k->pidfd, &st) : k->pidfd >= 0 ? sc_reap_pidfd(k->pidfd, &st) : sc_reap_pid(k->pid, &st);
    if (r == 1) {
        (later ? dead_for_now : dead)(c, k, &st, sc_now_mono(), sc_now_real());
        return;
    }
    /* 0 with a readable pidfd: a tracer has it and has not let go; then, too, a SIGCHLD comes when it does. */
    bool gone = r == -ECHILD && (k->pidfd >= 0 ? sc_pidfd_send_signal(k->pidfd, 0) == -ESRCH : kill(k->pid, 0) < 0 && errno == ESRCH);
    if (gone) {
        stolen(c, k);
    } else if (k->pidfd >= 0 && !k->disarmed) {
        /* Dead, but still somebody else's child: its parent's death will give it to us, with a SIGCHLD. */
        epoll_ctl(c->epfd, EPOLL_CTL_DEL, k->pidfd, NULL);
        k->disarmed = true;
        c->disarmed++;
        look_again(c);
    }
}

static void child_ready(sc_core *c, sc_source *s, uint32_t ev)
{
    (void)ev;
    look(c, (sc_child *)s);
}

int sc_child_add(sc_core *c, sc_child *k, pid_t pid, int pidfd)
{
    sc_child **b = bucket(c, pid);
    k->src.ready = child_ready;
    k->pid = pid;
    k->pidfd = pidfd;
    k->disarmed = false;
    k->next = *b;
    *b = k;
    k->listed = true;
    if (pidfd >= 0 && sc_watch_fd(c, pidfd, EPOLLIN | EPOLLONESHOT, &k->src) < 0) {
        close(pidfd);
        k->pidfd = -1;
    }
    if (k->pidfd < 0) {
        k->pidfd = -1;
        c->by_number++;
        c->stats.by_number++;
        sc_sweep_soon(c); /* it may be dead already, its SIGCHLD long gone */
        look_again(c);
    }
    return 0;
}

void sc_children_on_sigchld(sc_core *c)
{
    c->need_sweep = true;
}

static void look_at_the_unarmed(sc_core *c)
{
    if (!c->disarmed && !c->by_number)
        return;
    for (size_t i = 0; i < sizeof c->pids / sizeof *c->pids; i++) {
        sc_child *k = c->pids[i], *next;
        for (; k; k = next) {
            next = k->next;
            if (k->disarmed || k->pidfd < 0)
                look(c, k);
        }
    }
    if (c->disarmed || c->by_number)
        look_again(c);
}

static void stranger(sc_core *c, const sc_exit_status *st, int64_t real)
{
    c->stats.orphans++;
    if (c->tell_pids)
        sc_post(c, SC_NOTE_PID, NULL, st->pid, st->status, real);
}

static bool early_put(sc_core *c, const sc_exit_status *st)
{
    if (c->early_len == c->early_cap) {
        size_t cap = c->early_cap ? 2 * c->early_cap : 64;
        sc_early *e = realloc(c->early, cap * sizeof *e);
        if (!e)
            return false;
        c->early = e;
        c->early_cap = cap;
    }
    c->early[c->early_len++] = (sc_early){st->pid, *st, sc_now_mono(), sc_now_real()};
    return true;
}

/* Who died before the oldest open slot was opened belongs to none of them. 0: nobody does. */
static void early_drop(sc_core *c, int64_t before)
{
    size_t kept = 0;
    for (size_t i = 0; i < c->early_len; i++) {
        if (before && c->early[i].mono >= before)
            c->early[kept++] = c->early[i];
        else
            stranger(c, &c->early[i].st, c->early[i].real);
    }
    c->early_len = kept;
}

/* The latest of that pid. */
bool sc_early_take(sc_core *c, pid_t pid, sc_early *out)
{
    for (size_t i = c->early_len; i-- > 0;) {
        if (c->early[i].pid == pid) {
            *out = c->early[i];
            memmove(&c->early[i], &c->early[i + 1], (--c->early_len - i) * sizeof *c->early);
            return true;
        }
    }
    return false;
}

static int64_t oldest_open(sc_core *c)
{
    int64_t oldest = INT64_MAX;
    for (size_t i = 0; i < c->slot_cap; i++)
        for (sc_slot *s = c->slots[i]; s; s = s->hash_next)
            if (s->phase == SC_OPENED && s->opened_mono < oldest)
                oldest = s->opened_mono;
    return oldest;
}

/* The leader's own children, dead or alive: calls back with each pid. */
static void each_child(sc_core *c, void (*call)(sc_core *, pid_t))
{
    char path[64];
    snprintf(path, sizeof path, "/proc/self/task/%d/children", (int)getpid());
    FILE *f = fopen(path, "re");
    int pid, *pids = NULL;
    size_t n = 0, cap = 0;
    while (f && fscanf(f, "%d", &pid) == 1) { /* all of them first: reaping changes the list */
        if (n == cap) {
            int *p = realloc(pids, (cap = cap ? 2 * cap : 64) * sizeof *p);
            if (!p)
                break;
            pids = p;
        }
        pids[n++] = pid;
    }
    if (f)
        fclose(f);
    for (size_t i = 0; i < n; i++)
        call(c, pids[i]);
    free(pids);
}

/* Children of this thread, dead or alive, for the decision whether zombies may be left to wait; stops counting at `enough`. */
static int children_waiting(int enough)
{
    char path[64], buf[4096];
    snprintf(path, sizeof path, "/proc/self/task/%d/children", (int)getpid());
    int fd = open(path, O_RDONLY | O_CLOEXEC), n = 0;
    if (fd < 0)
        return 0;
    ssize_t got;
    while (n < enough && (got = read(fd, buf, sizeof buf)) > 0)
        for (ssize_t i = 0; i < got; i++)
            n += buf[i] == ' ';
    close(fd);
    return n;
}

static void reaped(sc_core *c, const sc_exit_status *st)
{
    sc_child *k = find(c, st->pid);
    if (k)
        dead(c, k, st, sc_now_mono(), sc_now_real());
    else if (!c->open_unbound || !early_put(c, st))
        stranger(c, st, sc_now_real());
}

static bool maybe_an_authors(pid_t pid)
{
    return getpgid(pid) == getpgrp();
}

/* Whether this zombie of our process group has been left long enough. */
static bool left_enough(sc_core *c, pid_t pid, int64_t now)
{
    for (size_t i = 0; i < c->left_len; i++) {
        if (c->left[i].pid != pid)
            continue;
        if (now - c->left[i].seen < LEFT_NS)
            return false;
        c->left[i] = c->left[--c->left_len];
        return true;
    }
    if (c->left_len == c->left_cap) {
        size_t cap = c->left_cap ? 2 * c->left_cap : 16;
        sc_left *l = realloc(c->left, cap * sizeof *l);
        if (!l)
            return false;
        c->left = l;
        c->left_cap = cap;
    }
    c->left[c->left_len++] = (sc_left){pid, now};
    return false;
}

static void sweep_one(sc_core *c, pid_t pid)
{
    sc_exit_status st;
    if (find(c, pid) || sc_peek_pid(pid) != 1 || (maybe_an_authors(pid) && !left_enough(c, pid, sc_now_mono())))
        return;
    if (sc_reap_pid(pid, &st) == 1)
        reaped(c, &st);
}

/* Forget those whose authors have waited for them since. */
static void trim_left(sc_core *c)
{
    size_t kept = 0;
    for (size_t i = 0; i < c->left_len; i++)
        if (sc_peek_pid(c->left[i].pid) == 1)
            c->left[kept++] = c->left[i];
    c->left_len = kept;
    if (kept)
        sc_timer_set(c, &c->sweep_timer, c->left[0].seen + LEFT_NS);
}

/* Those that we own are told by their pidfds; the sweep is for all others, and has time. Beside many children it is dear, since the
 * kernel goes through the living ones to find a dead one: it gets a twentieth of the time, so that a burst of exits is not held up
 * by it. */
bool sc_sweep_is_due(const sc_core *c, int64_t now)
{
    return now >= c->sweep_after && (!c->closing_len || now - c->sweep_after >= SWEEP_PUT_OFF_NS);
}

static void sweep(sc_core *c)
{
    sc_children_close(c, SC_CLOSING);
    look_at_the_unarmed(c);
    if (!c->reap_orphans)
        return;
    int64_t now = sc_now_mono();
    if (c->open_unbound) {
        if (now >= c->oldest_open + EARLY_AFTER_NS)
            c->oldest_open = oldest_open(c);
        early_drop(c, c->oldest_open);
        int64_t due = c->oldest_open + EARLY_AFTER_NS;
        if (now < due && children_waiting(EARLY_AT_ONCE) < EARLY_AT_ONCE) {
            sc_timer_set(c, &c->sweep_timer, due);
            return; /* a zombie keeps its pid; bind will find it */
        }
    } else {
        early_drop(c, 0);
        sc_timer_clear(c, &c->sweep_timer);
    }
    sc_exit_status st;
    pid_t pid;
    int owned = 0;
    while ((pid = sc_peek_orphan()) > 0) {
        bool ours = find(c, pid) != NULL;
        if (ours && ++owned > SWEEP_OWNED) {
            c->need_sweep = true; /* their pidfds' turn */
            break;
        }
        if (!ours && maybe_an_authors(pid)) {
            each_child(c, sweep_one); /* waitid would show this one for ever, and what stands behind it never */
            trim_left(c);
            break;
        }
        if (sc_reap_pid(pid, &st) != 1)
            break;
        reaped(c, &st);
    }
}

void sc_sweep(sc_core *c)
{
    int64_t began = sc_now_mono();
    sweep(c);
    int64_t now = sc_now_mono(), pause = SWEEP_SHARE * (now - began);
    c->sweep_after = now + (pause < SWEEP_PAUSE_NS ? pause : SWEEP_PAUSE_NS);
}

/* ---- children that are no task's process ---- */

static void watched_died(sc_core *c, sc_child *k, const sc_exit_status *st, int64_t mono, int64_t real)
{
    (void)mono;
    if (!c->tell_pids) /* else `dead` has told it already */
        sc_post(c, SC_NOTE_PID, NULL, st->pid, st->status, real);
    sc_job *grave = (sc_job *)k; /* made as a job, so that the graveyard frees it */
    grave->grave = c->graveyard;
    c->graveyard = grave;
}

int sc_watch_pid(sc_core *c, pid_t pid)
{
    sc_job *j = calloc(1, sizeof *j);
    if (!j)
        return -ENOMEM;
    j->out_fd = -1;
    j->child.died = watched_died;
    int fd = sc_pidfd_open(pid);
    if (fd == -ESRCH) {
        free(j);
        return fd;
    }
    sc_lock(c);
    bool told = fd >= 0 && sc_children_told(c, pid);
    if (!told)
        sc_child_add(c, &j->child, pid, fd < 0 ? -1 : fd);
    sc_unlock(c);
    if (!told)
        return 0;
    close(fd);
    free(j);
    return -ESRCH;
}
