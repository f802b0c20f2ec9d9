/* The RPC thread's stand-in.
 *
 * The RPC thread hands calls and notes to Python, for which it needs the interpreter's lock, and while it waits for that lock, or
 * runs a handler, it reads nothing. A handler that computes, an extension module that sleeps with the lock held or a teardown
 * that never returns would keep State, Wait and Connect from being answered. So a thread that runs no Python looks whether the
 * RPC thread has been away for AWAY_NS, and then does its work: it accepts, reads, answers what C can answer, and keeps the calls
 * that need Python, in order, for its return.
 *
 * AWAY_NS is twice the time after which CPython asks a thread that computes for its lock. With less, the stand-in acts beside each
 * spinning thread, for nothing, and its hand-offs take processor time from exits.
 *
 * While calls come often it looks once in AWAY_NS; else it sleeps until the RPC thread goes away, so an idle server has no ticks.
 *
 * What it reads is copied, since the bytes that the RPC thread borrowed must stay where they are until that is back. It keeps no
 * more than HELD_MAX bytes; beyond that the peers wait, as they would without it. */
#define _GNU_SOURCE
#include "server.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#define AWAY_NS 10000000L
enum { HELD_MAX = 8388608, STACK = 131072 };

static void futex_wait(atomic_uint *at, unsigned value, const struct timespec *timeout)
{
    syscall(SYS_futex, at, FUTEX_WAIT_PRIVATE, value, timeout, NULL, 0);
}

static void futex_wake(atomic_uint *at)
{
    syscall(SYS_futex, at, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

static void rouse(struct standin *t)
{
    if (atomic_exchange(&t->asleep, 0))
        futex_wake(&t->asleep);
}

void sc_standin_hold(sc_server *s, sc_call *k)
{
    struct standin *t = &s->standin;
    if (k->payload.n && !k->large && !k->owned && !sc_call_copy(k))
        return;
    t->held += sizeof *k + k->payload.n + k->metadata_len;
    *t->ready_tail = k;
    t->ready_tail = &k->next_ready;
}

/* What has been kept goes to the RPC thread. */
static int take_back(sc_server *s)
{
    struct standin *t = &s->standin;
    if (!t->rbuf) /* it has not acted */
        return 0;
    int missed = t->missed;
    if (t->ready) {
        *s->ready_tail = t->ready;
        s->ready_tail = t->ready_tail;
        t->ready = NULL;
        t->ready_tail = &t->ready;
    }
    if (t->mail_muted)
        sc_server_mail(s, true);
    t->mail_muted = false;
    t->missed = 0;
    t->held = 0;
    free(t->rbuf);
    t->rbuf = NULL;
    return missed;
}

/* Entered and left with the role. */
static void act(sc_server *s, unsigned moves)
{
    struct standin *t = &s->standin;
    if (!t->rbuf && !(t->rbuf = malloc(SC_RBUF)))
        return;
    t->acting = true;
    atomic_store(&s->reader, pthread_self());
    atomic_fetch_add(&t->acted, 1);
    while (atomic_load(&t->moves) == moves && !atomic_load(&t->back) && !atomic_load(&t->quit) && !atomic_load(&s->held) &&
           t->held < HELD_MAX) {
        int work = sc_server_handle(s, true);
        if (work & SC_WORK_NOTES && !t->mail_muted) {
            sc_server_mail(s, false);
            t->mail_muted = true;
        }
        t->missed |= work;
        if (atomic_load(&t->back) || atomic_load(&t->quit))
            break;
        if (s->at == s->nev)
            sc_server_poll(s);
    }
    t->acting = false;
}

static void *stand_in(void *arg)
{
    sc_server *s = arg;
    struct standin *t = &s->standin;
    static const struct timespec away = {.tv_nsec = AWAY_NS}, later = {.tv_nsec = 10 * AWAY_NS};
    sc_run_first();
    while (!atomic_load(&t->quit)) {
        unsigned moves = atomic_load(&t->moves);
        if (moves % 2 == 0) {
            atomic_store(&t->asleep, 1);
            if (atomic_load(&t->moves) == moves && !atomic_load(&t->quit))
                futex_wait(&t->asleep, 1, NULL);
            atomic_store(&t->asleep, 0);
            continue;
        }
        futex_wait(&t->moves, moves, &away); /* nobody wakes it but a stop */
        if (atomic_load(&t->moves) != moves || atomic_load(&t->quit))
            continue;
        pthread_mutex_lock(&t->role);
        if (atomic_load(&t->moves) == moves && !atomic_load(&s->held))
            act(s, moves);
        pthread_mutex_unlock(&t->role);
        if (atomic_load(&t->moves) == moves && !atomic_load(&t->quit)) /* it holds all that it may, or is being called back */
            futex_wait(&t->moves, moves, &later);
    }
    return NULL;
}

int sc_standin_start(sc_server *s)
{
    struct standin *t = &s->standin;
    pthread_attr_t attr;
    sigset_t all, old;
    int e = pthread_attr_init(&attr);
    if (e)
        return -e;
    pthread_attr_setstacksize(&attr, STACK);
    atomic_store(&t->moves, 1);
    t->pid = getpid();
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old); /* signals are for the others */
    e = pthread_create(&t->thread, &attr, stand_in, s);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    pthread_attr_destroy(&attr);
    t->running = e == 0;
    return -e;
}

void sc_standin_stop(sc_server *s)
{
    struct standin *t = &s->standin;
    if (!t->running)
        return;
    t->running = false;
    if (t->pid != getpid()) /* a forked child has no such thread */
        return;
    atomic_store(&t->quit, true);
    rouse(t);
    futex_wake(&t->moves);
    sc_server_wake(s);
    pthread_join(t->thread, NULL);
    take_back(s);
}

void sc_standin_leave(sc_server *s)
{
    struct standin *t = &s->standin;
    if (!t->running)
        return;
    atomic_fetch_add(&t->moves, 1);
    pthread_mutex_unlock(&t->role);
    rouse(t);
}

int sc_standin_return(sc_server *s)
{
    struct standin *t = &s->standin;
    if (!t->running)
        return 0;
    if (pthread_mutex_trylock(&t->role)) {
        atomic_store(&t->back, true);
        sc_server_wake(s);
        pthread_mutex_lock(&t->role);
        atomic_store(&t->back, false);
    }
    atomic_fetch_add(&t->moves, 1);
    return take_back(s);
}
