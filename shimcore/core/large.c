/* A request of many bytes is received where its handler will have it.
 *
 * Once a request's beginning tells where its payload begins and how long it is, the RPC thread asks whoever runs it for room
 * (SC_WORK_ROOM, sc_server_room, sc_server_give): for Python that is the bytes object that will be parsed, which takes the
 * interpreter's lock to make. What is still to come of the payload is received into it. What stands before and behind the payload
 * is kept apart, and parsed as a request without one.
 *
 * Where there is no room, or the stand-in comes to the connection first, the frame is put together in `in` like any other. Room
 * that is not needed any more goes back by sc_server_scrap, as only who gave it can free it. */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "server.h"

enum {
    TAIL_MAX = 4096,         /* of what may stand behind a payload: timeout, metadata */
    WORTH_IT = 16384,        /* bytes still to come */
    PROMISED_MAX = 16777216, /* bytes of room at a time: a header is quickly sent */
};

void sc_large_drop(sc_server *s, sc_large *l)
{
    if (!l)
        return;
    atomic_fetch_sub(&s->promised, l->n);
    sc_buf_free(&l->rest);
    if (!l->owner) {
        free(l);
        return;
    }
    pthread_mutex_lock(&s->dirty_lock);
    l->next = s->scrap;
    s->scrap = l;
    atomic_store(&s->has_scrap, true);
    pthread_mutex_unlock(&s->dirty_lock);
}

void sc_large_forget(sc_server *s, sc_conn *c)
{
    if (s->wanting == c)
        s->wanting = NULL;
    sc_large_drop(s, c->large);
    c->large = NULL;
}

void *sc_call_room(sc_call *k)
{
    sc_large *l = k->large;
    void *owner = l->owner;
    k->large = NULL;
    l->owner = NULL;
    sc_large_drop(k->conn->srv, l);
    return owner;
}

size_t sc_server_room(sc_server *s)
{
    return s->room;
}

void sc_server_give(sc_server *s, void *owner, uint8_t *p)
{
    s->given = owner;
    s->given_at = p;
}

void *sc_server_scrap(sc_server *s)
{
    void *owner = s->unused;
    s->unused = NULL;
    if (owner)
        return owner;
    pthread_mutex_lock(&s->dirty_lock);
    sc_large *l = s->scrap;
    if (l)
        s->scrap = l->next;
    else
        atomic_store(&s->has_scrap, false);
    pthread_mutex_unlock(&s->dirty_lock);
    if (l)
        owner = l->owner;
    free(l);
    return owner;
}

void sc_large_plan(sc_server *s, sc_conn *c)
{
    size_t n = c->in.len - c->consumed;
    if (s->standin.acting || s->wanting || n < SC_HEADER)
        return;
    const uint8_t *start = c->in.p + c->consumed + SC_HEADER, *payload;
    sc_header h;
    sc_header_read(start - SC_HEADER, &h);
    if (h.type != SC_REQUEST || h.length < SC_LARGE)
        return;
    sc_reader r = {start, start + n - SC_HEADER};
    uint64_t tag, size;
    for (;;) {
        payload = r.p;
        if (!sc_read_varint(&r, &tag))
            return;
        if (tag == (3 << 3 | 2))
            break;
        sc_field f;
        r.p = payload;
        if (sc_read_field(&r, &f) != 1)
            return;
    }
    if (!sc_read_varint(&r, &size))
        return;
    size_t before = (size_t)(r.p - start), have = (size_t)(r.end - r.p);
    if (size > h.length - before || size < have + WORTH_IT || h.length - before - size > TAIL_MAX ||
        atomic_load(&s->promised) + size > PROMISED_MAX)
        return;
    sc_large *l = calloc(1, sizeof *l);
    if (!l)
        return;
    if (!sc_buf_reserve(&l->rest, 1) || !sc_buf_put(&l->rest, start, (size_t)(payload - start))) {
        sc_buf_free(&l->rest);
        free(l);
        return;
    }
    l->h = h;
    l->n = size;
    l->got = have;
    l->tail = h.length - before - size;
    atomic_fetch_add(&s->promised, size);
    c->large = l;
    s->wanting = c;
    s->room = size;
}

void sc_large_begin(sc_server *s)
{
    sc_conn *c = s->wanting;
    void *owner = s->given;
    s->wanting = NULL;
    s->given = NULL;
    s->room = 0;
    if (!c || !owner) {
        s->unused = owner; /* the connection has gone, or the stand-in has it in hand */
        if (c)
            sc_large_forget(s, c);
        return;
    }
    sc_large *l = c->large;
    l->owner = owner;
    l->p = s->given_at;
    memcpy(l->p, c->in.p + c->in.len - l->got, l->got);
    sc_buf_free(&c->in);
    c->consumed = 0;
    sc_conn_ready(s, c, EPOLLIN); /* the rest is most likely there */
}

ssize_t sc_large_receive(sc_server *s, sc_conn *c, uint8_t *rbuf, sc_slice *behind)
{
    sc_large *l = c->large;
    struct iovec iov[2] = {{l->p + l->got, l->n - l->got}, {rbuf, SC_FEW + l->tail}};
    struct msghdr m = {.msg_iov = iov, .msg_iovlen = 2};
    ssize_t n = recvmsg(c->fd, &m, MSG_DONTWAIT);
    if (n <= 0)
        return n;
    size_t more = (size_t)n, k = more < l->n - l->got ? more : l->n - l->got;
    l->got += k;
    more -= k;
    k = more < l->tail ? more : l->tail;
    if (!sc_buf_put(&l->rest, rbuf, k)) {
        errno = ENOMEM;
        return -1;
    }
    l->tail -= k;
    *behind = (sc_slice){rbuf + k, more - k};
    if (l->got == l->n && !l->tail) {
        c->large = NULL;
        c->large_last = true;
        sc_server_request(s, c, &l->h, l->rest.p, l->rest.len, &l);
        sc_large_drop(s, l);
    }
    return n;
}

/* The server ends: what was given and not begun goes back. */
void sc_large_end(sc_server *s)
{
    if (s->given)
        s->unused = s->given;
    s->given = NULL;
}
