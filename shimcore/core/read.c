/* A connection's reading side: bytes to frames, and its end. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <sys/socket.h>

#include "server.h"

/* ---- the end of a connection ---- */

void sc_conn_drop(sc_server *s, sc_conn *c)
{
    pthread_mutex_lock(&c->lock);
    if (c->dead) {
        pthread_mutex_unlock(&c->lock);
        return;
    }
    c->dead = true;
    epoll_ctl(s->epfd, EPOLL_CTL_DEL, c->fd, NULL); /* before the close: a forked child may hold the fd */
    shutdown(c->fd, SHUT_RDWR);
    sc_call *parked = NULL;
    for (sc_call *k = c->calls; k; k = k->next) {
        atomic_store(&k->cancelled, true);
        if (k->parked) {
            sc_call_ref(k);
            k->next_ready = parked; /* it has been handed out, so it is on no other list */
            parked = k;
        }
    }
    sc_stream_broken(c);
    sc_buf_free(&c->out);
    pthread_mutex_unlock(&c->lock);
    sc_large_forget(s, c);
    while (parked) {
        sc_call *k = parked;
        parked = k->next_ready;
        if (sc_waiter_cancel(s->core, &k->waiter)) {
            sc_call_reply(k, SC_UNAVAILABLE, "", 0, NULL, 0, false);
            sc_call_unref(k); /* the waiter's */
        }
        sc_call_unref(k);
    }
    if (c->prev)
        c->prev->next = c->next;
    else
        s->conns = c->next;
    if (c->next)
        c->next->prev = c->prev;
    s->nconns--;
    for (int e = s->at; e < s->nev; e++)
        if (s->evs[e].data.ptr == c)
            s->evs[e].data.ptr = NULL;
    s->accept_again = s->accept_again ? 1 : 0; /* an fd may be free now */
    sc_conn_unref(c);
}

/* One frame, whole. */
static void frame(sc_server *s, sc_conn *c, const sc_header *h, const uint8_t *data)
{
    if (h->stream % 2 == 0)
        sc_conn_answer(c, h->stream, SC_INVALID_ARGUMENT, "StreamID must be odd for client initiated streams");
    else if (h->type == SC_REQUEST)
        sc_server_request(s, c, h, data, h->length, NULL);
    else if (h->type == SC_DATA)
        sc_stream_data(c, h, data);
}

/* Every whole frame of p; returns the bytes taken, or -1: not a peer to go on with. */
static ssize_t frames(sc_server *s, sc_conn *c, const uint8_t *p, size_t n)
{
    size_t at = 0;
    while (at < n) {
        if (c->skip) {
            size_t k = c->skip < n - at ? c->skip : n - at;
            c->skip -= k;
            at += k;
            continue;
        }
        if (n - at < SC_HEADER)
            break;
        sc_header h;
        sc_header_read(p + at, &h);
        if (h.length > s->limits.max_message) {
            if (h.length >> 24)
                return -1;
            char text[128];
            snprintf(text, sizeof text, "message length %u exceed maximum message size of %zu", h.length, s->limits.max_message);
            sc_conn_answer(c, h.stream, SC_RESOURCE_EXHAUSTED, text);
            c->skip = h.length;
            at += SC_HEADER;
            continue;
        }
        if (n - at - SC_HEADER < h.length)
            break;
        frame(s, c, &h, p + at + SC_HEADER);
        c->large_last = h.length >= SC_LARGE;
        at += SC_HEADER + h.length;
    }
    return (ssize_t)at;
}

/* Nothing is being answered, and no answer waits to be sent. Parked Waits count for a peer that has shut its sending side, not
 * for a server that ends: nobody can answer them. */
bool sc_conn_quiet(sc_conn *c, bool ending)
{
    pthread_mutex_lock(&c->lock);
    bool over = !c->inflight && (ending || !c->parked) && !c->out.len && !c->sending;
    pthread_mutex_unlock(&c->lock);
    return over;
}

/* Whole frames from the reader's buffer; the beginning of one more is kept. */
static void take(sc_server *s, sc_conn *c, const uint8_t *p, size_t n)
{
    ssize_t took = frames(s, c, p, n);
    if (took < 0 || ((size_t)took < n && !sc_buf_put(&c->in, p + took, n - (size_t)took))) {
        sc_conn_flush(c);
        sc_conn_drop(s, c);
    } else if (c->in.len) {
        sc_large_plan(s, c);
    }
}

static void readable(sc_server *s, sc_conn *c, uint32_t ev)
{
    uint8_t *rbuf = s->standin.acting ? s->standin.rbuf : s->rbuf, *to = rbuf;
    if (!s->standin.acting)
        sc_buf_free(&c->lent);
    if (c->consumed && s->standin.acting && !c->lent.p) { /* calls that the RPC thread has in hand may borrow these bytes */
        sc_buf rest = {0};
        if (!sc_buf_put(&rest, c->in.p + c->consumed, c->in.len - c->consumed)) {
            sc_conn_drop(s, c);
            return;
        }
        c->lent = c->in;
        c->in = rest;
        c->consumed = 0;
    } else if (c->consumed) {
        sc_buf_shift(&c->in, c->consumed);
        c->consumed = 0;
        if (!c->in.len)
            sc_buf_free(&c->in);
    }
    if (c->large && !c->large->owner)
        sc_large_forget(s, c); /* its room has not come yet, and we don't wait */
    size_t room = c->large_last ? SC_FEW : SC_RBUF; /* few: what is received twice is copied twice */
    if (c->in.len) { /* the rest of a frame goes behind its beginning */
        size_t want = 65536;
        if (c->in.len >= SC_HEADER) {
            sc_header h;
            sc_header_read(c->in.p, &h);
            if (h.length + SC_HEADER - c->in.len > want)
                want = 1048576; /* grown as it comes in, not as its header promises */
        }
        if (!sc_buf_reserve(&c->in, want)) {
            sc_conn_drop(s, c);
            return;
        }
        to = c->in.p + c->in.len;
        room = c->in.cap - c->in.len;
    }
    bool apart = c->large;
    sc_slice behind;
    ssize_t n = apart ? sc_large_receive(s, c, rbuf, &behind) : recv(c->fd, to, room, MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR))
        return;
    if (n <= 0) {
        sc_conn_flush(c);
        pthread_mutex_lock(&c->lock);
        c->eof = true;
        sc_stream_broken(c);
        sc_conn_arm(c);
        pthread_mutex_unlock(&c->lock);
        /* SHUT_WR of a peer that still reads: its answers go out first. A peer that has gone gives EPOLLHUP. */
        if (n < 0 || ev & (EPOLLHUP | EPOLLERR) || sc_conn_quiet(c, false))
            sc_conn_drop(s, c);
        return;
    }
    if (apart) {
        if (!c->large)
            take(s, c, behind.p, behind.n);
    } else if (to == rbuf) {
        take(s, c, to, (size_t)n);
    } else {
        c->in.len += (size_t)n;
        ssize_t took = frames(s, c, c->in.p, c->in.len);
        if (took < 0) {
            sc_conn_flush(c);
            sc_conn_drop(s, c);
        } else {
            c->consumed = (size_t)took;
            sc_large_plan(s, c);
        }
    }
}

void sc_conn_ready(sc_server *s, sc_conn *c, uint32_t ev)
{
    if (ev & EPOLLOUT)
        sc_conn_flush(c);
    if (ev & EPOLLIN)
        readable(s, c, ev);
    else if (ev & (EPOLLHUP | EPOLLERR) || (c->eof && sc_conn_quiet(c, false)))
        sc_conn_drop(s, c);
}
