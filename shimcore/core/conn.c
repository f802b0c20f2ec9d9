/* A connection's sending side and its references. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "server.h"

enum { TEXT_MAX = 4096 }; /* of a status; a text is for people */

void sc_conn_unref(sc_conn *c)
{
    if (atomic_fetch_sub(&c->refs, 1) != 1)
        return;
    close(c->fd);
    sc_buf_free(&c->in);
    sc_buf_free(&c->lent);
    sc_buf_free(&c->out);
    pthread_mutex_destroy(&c->lock);
    pthread_cond_destroy(&c->changed);
    sc_server_unref(c->srv);
    free(c);
}

void sc_conn_arm(sc_conn *c)
{
    if (c->dead)
        return;
    c->paused = c->out.len > (c->paused ? c->srv->limits.max_unsent / 2 : c->srv->limits.max_unsent);
    c->stalled = c->unread > (c->stalled ? c->srv->limits.max_unread / 2 : c->srv->limits.max_unread);
    uint32_t want = (c->eof || c->paused || c->stalled ? 0 : EPOLLIN) | (c->out.len && !c->sending ? EPOLLOUT : 0);
    if (want == c->armed)
        return;
    struct epoll_event ev = {.events = want, .data.ptr = c};
    if (epoll_ctl(c->srv->epfd, EPOLL_CTL_MOD, c->fd, &ev) == 0)
        c->armed = want;
}

/* Send until the queue is empty or the socket is full. Entered under the lock with `sending` set by us; leaves under it. */
static void drain(sc_conn *c)
{
    bool full = false;
    while (c->out.len && !full && !c->dead) {
        sc_buf mine = c->out;
        c->out = (sc_buf){0};
        pthread_mutex_unlock(&c->lock);
        size_t at = 0;
        bool broken = false;
        while (at < mine.len) {
            ssize_t n = send(c->fd, mine.p + at, mine.len - at, MSG_NOSIGNAL | MSG_DONTWAIT);
            if (n < 0 && errno == EINTR)
                continue;
            if (n < 0) {
                broken = errno != EAGAIN && errno != EWOULDBLOCK;
                full = true;
                break;
            }
            at += (size_t)n;
        }
        pthread_mutex_lock(&c->lock);
        if (broken) { /* the reading side will see the end too, and drop the connection */
            mine.len = c->out.len = 0;
        } else if (at < mine.len) { /* what is left stands before what others have queued meanwhile */
            sc_buf_shift(&mine, at);
            sc_buf_put(&mine, c->out.p, c->out.len);
            sc_buf_free(&c->out);
            c->out = mine;
            continue;
        }
        if (c->out.len || mine.cap > 65536) {
            sc_buf_free(&mine);
        } else { /* keep a small buffer for the next one */
            sc_buf_free(&c->out);
            mine.len = 0;
            c->out = mine;
        }
    }
}

/* Under its lock, after bytes were sent. */
static void sent(sc_conn *c)
{
    sc_conn_arm(c);
    if ((c->waiting || c->want_write) && c->out.len <= c->srv->limits.max_unsent / 2)
        sc_stream_writable(c);
}

void sc_conn_flush(sc_conn *c)
{
    pthread_mutex_lock(&c->lock);
    if (!c->sending && !c->dead && c->out.len) {
        c->sending = true;
        drain(c);
        c->sending = false;
    }
    sent(c);
    pthread_mutex_unlock(&c->lock);
}

/* Under its lock. */
static void unlist(sc_call *k)
{
    sc_conn *c = k->conn;
    if (k->prev)
        k->prev->next = k->next;
    else if (c->calls == k)
        c->calls = k->next;
    if (k->next)
        k->next->prev = k->prev;
    k->next = k->prev = NULL;
    sc_call **p = &c->streams[k->stream / 2 % (sizeof c->streams / sizeof *c->streams)];
    while (*p && *p != k)
        p = &(*p)->next_stream;
    if (*p)
        *p = k->next_stream;
    if (k->streams)
        sc_stream_over(k);
}

bool sc_conn_send(sc_conn *c, const void *head, size_t head_len, const void *body, size_t body_len, bool batch, sc_call *of,
                  bool last)
{
    pthread_mutex_lock(&c->lock);
    bool late = of && !last && atomic_load(&of->done);
    if (last)
        unlist(of);
    if (c->dead || late) {
        pthread_mutex_unlock(&c->lock);
        return false;
    }
    bool alone = !c->sending && !c->out.len;
    if (!alone || (batch && body_len < 16384)) {
        sc_buf_put(&c->out, head, head_len);
        sc_buf_put(&c->out, body, body_len);
        if (batch) {
            pthread_mutex_unlock(&c->lock);
            sc_conn_mark_dirty(c);
            return true;
        }
        if (!c->sending) {
            c->sending = true;
            drain(c);
            c->sending = false;
        }
    } else {
        c->sending = true;
        pthread_mutex_unlock(&c->lock);
        struct iovec iov[2] = {{(void *)head, head_len}, {(void *)body, body_len}};
        struct msghdr m = {.msg_iov = iov, .msg_iovlen = 2};
        ssize_t n;
        do
            n = sendmsg(c->fd, &m, MSG_NOSIGNAL | MSG_DONTWAIT);
        while (n < 0 && errno == EINTR);
        bool broken = n < 0 && errno != EAGAIN && errno != EWOULDBLOCK;
        size_t sent = n < 0 ? 0 : (size_t)n;
        pthread_mutex_lock(&c->lock);
        if (!broken && sent < head_len + body_len) {
            sc_buf rest = {0};
            if (sent < head_len)
                sc_buf_put(&rest, (const uint8_t *)head + sent, head_len - sent);
            size_t off = sent > head_len ? sent - head_len : 0;
            sc_buf_put(&rest, (const uint8_t *)body + off, body_len - off);
            sc_buf_put(&rest, c->out.p, c->out.len);
            sc_buf_free(&c->out);
            c->out = rest;
        }
        drain(c);
        c->sending = false;
    }
    sent(c);
    pthread_mutex_unlock(&c->lock);
    return true;
}

/* ---- calls ---- */

sc_call *sc_conn_call(sc_conn *c, uint32_t stream)
{
    sc_call *k = c->streams[stream / 2 % (sizeof c->streams / sizeof *c->streams)];
    while (k && k->stream != stream)
        k = k->next_stream;
    return k;
}

void sc_call_ref(sc_call *k)
{
    atomic_fetch_add(&k->refs, 1);
}

bool sc_call_copy(sc_call *k)
{
    k->owned = malloc(k->payload.n);
    if (!k->owned) {
        static const char text[] = "out of memory";
        sc_call_reply(k, SC_RESOURCE_EXHAUSTED, text, sizeof text - 1, NULL, 0, true);
        sc_call_unref(k);
        return false;
    }
    memcpy(k->owned, k->payload.p, k->payload.n);
    k->payload.p = k->owned;
    return true;
}

void sc_call_unref(sc_call *k)
{
    if (atomic_fetch_sub(&k->refs, 1) != 1)
        return;
    sc_stream_free(k);
    sc_large_drop(k->conn->srv, k->large);
    sc_conn_unref(k->conn);
    free(k->metadata);
    free(k->owned);
    free(k);
}

/* A status text is UTF-8 and short; where it is not, what is wrong becomes '?'. */
static size_t clean(char *out, const char *text, size_t n)
{
    if (n > TEXT_MAX)
        n = TEXT_MAX;
    size_t k = 0;
    for (size_t i = 0; i < n;) {
        size_t step = 1;
        uint8_t b = (uint8_t)text[i];
        if (b >= 0xc2)
            step = b >= 0xf0 ? 4 : b >= 0xe0 ? 3 : 2;
        if (step <= n - i && sc_utf8_valid((const uint8_t *)text + i, step)) {
            memcpy(out + k, text + i, step);
            k += step;
            i += step;
        } else {
            out[k++] = '?';
            i++;
        }
    }
    return k;
}

void sc_call_reply(sc_call *k, int32_t code, const char *message, size_t message_len, const void *payload, size_t n, bool batch)
{
    if (atomic_exchange(&k->done, true))
        return;
    sc_conn *c = k->conn;
    uint8_t head[SC_RESPONSE_HEAD + TEXT_MAX];
    char text[TEXT_MAX];
    if (sc_response_size(code, 0, n) > c->srv->limits.max_message) {
        code = SC_RESOURCE_EXHAUSTED;
        message_len = (size_t)snprintf(text, sizeof text, "message length %zu exceed maximum message size of %zu",
                                       sc_response_size(0, 0, n), c->srv->limits.max_message);
        message = text;
        n = 0;
    } else if (code) {
        message_len = clean(text, message, message_len);
        message = text;
        n = 0;
    }
    if (code)
        atomic_fetch_add_explicit(&c->srv->failures, 1, memory_order_relaxed);
    size_t head_len = SC_HEADER;
    if (!code && k->streams & SC_STREAM_SERVER)
        sc_header_write(head, 0, k->stream, SC_DATA, SC_FLAG_REMOTE_CLOSED | SC_FLAG_NO_DATA);
    else
        head_len = sc_response_head(head, k->stream, code, message, code ? message_len : 0, n);
    sc_conn_send(c, head, head_len, payload, n, batch, k, true);
    pthread_mutex_lock(&c->lock);
    bool parked = k->parked;
    if (parked)
        c->parked--;
    else
        c->inflight--;
    bool over = c->eof && !c->inflight && !c->parked;
    pthread_mutex_unlock(&c->lock);
    bool last = !parked && atomic_fetch_sub(&c->srv->inflight, 1) == 1 && atomic_load(&c->srv->draining);
    if (over || last)
        sc_server_wake(c->srv); /* the last answer ends a half-closed connection, or a server that is being shut down */
    sc_call_unref(k); /* the list's */
}
