/* What the exit thread has for Python: a list and an eventfd. Its own lock, so that a reader never waits for the table's. */
#include "core.h"

#include <errno.h>
#include <poll.h>
#include <unistd.h>

void sc_post(sc_core *c, int kind, void *ptr, int64_t a, int64_t b, int64_t x)
{
    sc_note *n = malloc(sizeof *n);
    while (!n) { /* a note is an RPC's answer: waiting for memory is better than losing it */
        usleep(1000);
        n = malloc(sizeof *n);
    }
    *n = (sc_note){.kind = kind, .ptr = ptr, .a = a, .b = b, .c = x};
    pthread_mutex_lock(&c->mail_lock);
    bool first = !c->mail;
    *c->mail_tail = n;
    c->mail_tail = &n->next;
    c->stats.notes++;
    pthread_mutex_unlock(&c->mail_lock);
    uint64_t one = 1;
    if (first && write(c->mailfd, &one, sizeof one) < 0) {
        /* EAGAIN: the reader is being woken already. */
    }
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
