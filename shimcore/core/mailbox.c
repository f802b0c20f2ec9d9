/* What the exit thread has for Python: a list and an eventfd. Its own lock, so that a reader never waits for the table's.
 *
 * A note that an exit was told does not ring at once. Nobody waits for it, and the thread that it wakes would run at the very
 * moment at which containerd reads the event, where both may need the same core, and ask a handler that computes for the
 * interpreter's lock. It rings after SC_TOLD_QUIET_NS, or comes with the next note or call. */
#include "core.h"

#include <errno.h>
#include <poll.h>
#include <unistd.h>

static void ring(sc_core *c)
{
    uint64_t one = 1;
    if (write(c->mailfd, &one, sizeof one) < 0) {
        /* EAGAIN: the reader is being woken already. */
    }
}

static void post(sc_core *c, int kind, void *ptr, int64_t a, int64_t b, int64_t x, bool aloud)
{
    sc_note *n = malloc(sizeof *n);
    while (!n) { /* a note is an RPC's answer: waiting for memory is better than losing it */
        usleep(1000);
        n = malloc(sizeof *n);
    }
    *n = (sc_note){.kind = kind, .ptr = ptr, .a = a, .b = b, .c = x};
    pthread_mutex_lock(&c->mail_lock);
    bool rings = aloud && !c->mail_rung;
    c->mail_rung |= aloud;
    *c->mail_tail = n;
    c->mail_tail = &n->next;
    c->stats.notes++;
    pthread_mutex_unlock(&c->mail_lock);
    if (rings)
        ring(c);
}

void sc_post(sc_core *c, int kind, void *ptr, int64_t a, int64_t b, int64_t x)
{
    post(c, kind, ptr, a, b, x, true);
}

void sc_post_told(sc_core *c, sc_slot *s)
{
    post(c, SC_NOTE_TOLD, s, 0, 0, 0, false);
    if (!c->told_timer.at)
        sc_timer_set(c, &c->told_timer, sc_now_mono() + SC_TOLD_QUIET_NS);
    if (!c->told_timer.at)
        sc_told_ring(c, &c->told_timer); /* out of memory */
}

void sc_told_ring(sc_core *c, sc_timer *t)
{
    (void)t;
    pthread_mutex_lock(&c->mail_lock);
    bool rings = c->mail && !c->mail_rung;
    c->mail_rung |= rings;
    pthread_mutex_unlock(&c->mail_lock);
    if (rings)
        ring(c);
}

static void asked(sc_core *c, sc_source *s, uint32_t ev)
{
    (void)s, (void)ev;
    sc_post(c, SC_NOTE_ASKED, NULL, c->ask_fd, 0, 0);
}

int sc_ask_fd(sc_core *c, int fd)
{
    struct epoll_event ev = {.events = EPOLLIN | EPOLLONESHOT, .data.ptr = &c->ask_src};
    sc_lock(c);
    c->ask_src.ready = asked;
    int r = 0;
    if (fd == c->ask_fd && fd >= 0) {
        r = epoll_ctl(c->epfd, EPOLL_CTL_MOD, fd, &ev);
    } else {
        if (c->ask_fd >= 0)
            epoll_ctl(c->epfd, EPOLL_CTL_DEL, c->ask_fd, NULL);
        if (fd >= 0)
            r = epoll_ctl(c->epfd, EPOLL_CTL_ADD, fd, &ev);
        c->ask_fd = r < 0 ? -1 : fd;
    }
    r = r < 0 ? -errno : 0;
    sc_unlock(c);
    return r;
}

bool sc_has_notes(sc_core *c)
{
    pthread_mutex_lock(&c->mail_lock);
    bool has = c->mail != NULL;
    pthread_mutex_unlock(&c->mail_lock);
    return has;
}

sc_note *sc_take_notes(sc_core *c)
{
    uint64_t n;
    pthread_mutex_lock(&c->mail_lock);
    if (read(c->mailfd, &n, sizeof n) < 0) {
        /* Not written yet: its writer will, and a wake-up for nothing follows, which is why the fd is read with no mail, too. */
    }
    sc_note *list = c->mail;
    c->mail = NULL;
    c->mail_tail = &c->mail;
    c->mail_rung = false;
    pthread_mutex_unlock(&c->mail_lock);
    return list;
}

int sc_wait_notes(sc_core *c, int64_t timeout_ns)
{
    struct pollfd p = {.fd = c->mailfd, .events = POLLIN};
    int ms = timeout_ns < 0 ? -1 : timeout_ns > 2000000000LL * 1000000 ? 2000000000 : (int)((timeout_ns + 999999) / 1000000);
    int r = poll(&p, 1, ms);
    if (r < 0)
        return -errno;
    if (r > 0) {
        pthread_mutex_lock(&c->mail_lock);
        bool none = !c->mail;
        uint64_t n;
        if (none && read(c->mailfd, &n, sizeof n) < 0) {
            /* The late wake-up of sc_take_notes. */
        }
        pthread_mutex_unlock(&c->mail_lock);
    }
    return r;
}
