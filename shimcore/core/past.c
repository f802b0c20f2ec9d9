/* The last events, for whoever asks the shim what it has told: as they were queued, whether or not containerd has taken them.
 *
 * Numbered from 1. A copy each, since the outbox frees an event when it is acknowledged; what is longer than PAST_MAX, or finds no
 * memory, keeps its number and nothing else. Nothing here is waited for by what tells events. */
#define _GNU_SOURCE
#include "core.h"

#include <string.h>

enum { PAST_MAX = 8192 };

void sc_past_keep(sc_core *c, const sc_event *e)
{
    if (!c->past && !(c->past = calloc(SC_PAST, sizeof *c->past)))
        return;
    sc_past *p = &c->past[c->past_count++ % SC_PAST];
    free(p->body);
    p->body = e->len <= PAST_MAX ? malloc(e->len) : NULL;
    p->len = e->len;
    if (p->body)
        memcpy(p->body, e->body, e->len);
    pthread_cond_broadcast(&c->news);
}

uint64_t sc_past_wait(sc_core *c, uint64_t after, int64_t timeout_ns)
{
    int64_t until = sc_now_mono() + timeout_ns;
    struct timespec ts = {until / 1000000000, until % 1000000000};
    sc_lock(c);
    int r = 0;
    while (c->past_count <= after && !c->past_over && r == 0)
        r = pthread_cond_timedwait(&c->news, &c->lock, &ts);
    uint64_t count = c->past_count;
    sc_unlock(c);
    return count;
}

bool sc_past_get(sc_core *c, uint64_t number, sc_buf *out)
{
    out->len = 0;
    sc_lock(c);
    bool there = number && number <= c->past_count && c->past_count - number < SC_PAST;
    if (there) {
        const sc_past *p = &c->past[(number - 1) % SC_PAST];
        there = p->body && sc_buf_put(out, p->body, p->len);
    }
    sc_unlock(c);
    return there;
}

void sc_past_end(sc_core *c)
{
    sc_lock(c);
    c->past_over = true;
    pthread_cond_broadcast(&c->news);
    sc_unlock(c);
}

bool sc_past_adopt(sc_core *c, uint64_t number, const uint8_t *body, size_t n)
{
    sc_lock(c);
    bool ok = number && (c->past || (c->past = calloc(SC_PAST, sizeof *c->past)));
    if (ok) {
        c->past_count = number;
        sc_past *p = &c->past[(number - 1) % SC_PAST];
        free(p->body);
        p->body = n ? malloc(n) : NULL;
        if (p->body)
            memcpy(p->body, body, n);
        p->len = n;
    }
    sc_unlock(c);
    return ok;
}

void sc_past_free(sc_core *c)
{
    for (size_t i = 0; c->past && i < SC_PAST; i++)
        free(c->past[i].body);
    free(c->past);
}
