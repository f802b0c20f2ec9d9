/* Streams of a server: messages of the peer that wait for their handler, messages of the handler that wait for the peer.
 *
 * Nothing is dropped, and nothing grows without bound: a connection whose handlers leave more than max_unread bytes untaken is
 * left unread, and a handler whose peer leaves more than max_unsent bytes unread waits. A message costs MESSAGE_COST besides its
 * bytes, so that empty ones are bounded too.
 *
 * A handler that may block waits on its connection's `changed`; one that may not asks to be told (sc_call_want), and the RPC
 * thread finds it in the server's list of events. */
#define _GNU_SOURCE
#include <errno.h>

#include "server.h"

enum { MESSAGE_COST = sizeof(sc_message) + 32 };

bool sc_stream_push(sc_call *k, const uint8_t *p, size_t n)
{
    sc_message *m = malloc(sizeof *m + n);
    if (!m)
        return false;
    m->next = NULL;
    m->n = n;
    if (n)
        memcpy(m->p, p, n);
    *k->messages_tail = m;
    k->messages_tail = &m->next;
    k->conn->unread += n + MESSAGE_COST;
    return true;
}

static void drop_messages(sc_call *k)
{
    while (k->messages) {
        sc_message *m = k->messages;
        k->messages = m->next;
        k->conn->unread -= m->n + MESSAGE_COST;
        free(m);
    }
    k->messages_tail = &k->messages;
}

void sc_stream_free(sc_call *k)
{
    while (k->messages) { /* the connection's other fields may be another thread's by now */
        sc_message *m = k->messages;
        k->messages = m->next;
        free(m);
    }
}

/* Into the server's list; whoever holds the role looks there before it sleeps. */
static void add_event(sc_call *k, uint8_t events)
{
    sc_server *s = k->conn->srv;
    bool first = false;
    pthread_mutex_lock(&s->event_lock);
    if (!k->events) {
        sc_call_ref(k);
        k->next_event = NULL;
        *s->events_tail = k;
        s->events_tail = &k->next_event;
        first = !atomic_exchange(&s->has_events, true);
    }
    k->events |= events;
    pthread_mutex_unlock(&s->event_lock);
    if (first && !pthread_equal(atomic_load(&s->reader), pthread_self()))
        sc_server_wake(s);
}

sc_call *sc_server_events(sc_server *s, int *events)
{
    pthread_mutex_lock(&s->event_lock);
    sc_call *k = s->events;
    if (k) {
        s->events = k->next_event;
        if (!s->events)
            s->events_tail = &s->events;
        *events = k->events;
        k->events = 0;
    }
    if (!s->events)
        atomic_store(&s->has_events, false);
    pthread_mutex_unlock(&s->event_lock);
    return k;
}

void sc_stream_tell(sc_call *k, int events)
{
    uint8_t told = k->want & (uint8_t)events;
    if (told & SC_WRITABLE)
        k->conn->want_write--;
    k->want &= (uint8_t)~told;
    if (told)
        add_event(k, told);
    if (k->conn->waiting)
        pthread_cond_broadcast(&k->conn->changed);
}

void sc_stream_over(sc_call *k)
{
    drop_messages(k);
    k->ended = true;
    sc_stream_tell(k, SC_READABLE | SC_WRITABLE);
    sc_conn_arm(k->conn);
}

/* Under the lock: its caller has gone, or sends no more without having said so. */
static bool cut_off(const sc_call *k)
{
    return k->conn->dead || (k->conn->eof && k->streams & SC_STREAM_CLIENT && !k->ended);
}

void sc_stream_broken(sc_conn *c)
{
    for (sc_call *k = c->calls; k; k = k->next) {
        if (cut_off(k))
            atomic_store(&k->cancelled, true); /* before its handler, which learns of it from recv, can end it */
        sc_stream_tell(k, SC_READABLE | (c->dead ? SC_WRITABLE : 0) | (cut_off(k) ? SC_CANCELLED : 0));
    }
}

void sc_stream_writable(sc_conn *c)
{
    for (sc_call *k = c->calls; k && c->want_write; k = k->next)
        sc_stream_tell(k, SC_WRITABLE);
    if (c->waiting)
        pthread_cond_broadcast(&c->changed);
}

void sc_stream_data(sc_conn *c, const sc_header *h, const uint8_t *data)
{
    pthread_mutex_lock(&c->lock);
    sc_call *k = sc_conn_call(c, h->stream);
    if (!k) {
        pthread_mutex_unlock(&c->lock);
        sc_conn_answer(c, h->stream, SC_INVALID_ARGUMENT, "StreamID is no longer active");
        return;
    }
    if (!(k->streams & SC_STREAM_CLIENT)) { /* its request was all that counts */
        pthread_mutex_unlock(&c->lock);
        return;
    }
    const char *wrong = NULL;
    int32_t code = SC_INVALID_ARGUMENT;
    bool has_data = !(h->flags & SC_FLAG_NO_DATA) && (h->length || !(h->flags & SC_FLAG_REMOTE_CLOSED));
    if (has_data && k->ended) {
        wrong = "data handling error: the stream was closed by its sender";
    } else if (has_data && !sc_stream_push(k, data, h->length)) {
        wrong = "out of memory";
        code = SC_RESOURCE_EXHAUSTED;
    }
    if (h->flags & SC_FLAG_REMOTE_CLOSED)
        k->ended = true;
    sc_stream_tell(k, SC_READABLE);
    if (c->unread > c->srv->limits.max_unread && !c->stalled)
        sc_conn_arm(c);
    if (wrong)
        sc_call_ref(k);
    pthread_mutex_unlock(&c->lock);
    if (wrong) {
        sc_call_reply(k, code, wrong, strlen(wrong), NULL, 0, true);
        sc_call_unref(k);
    }
}

/* Under the lock: false when the deadline has passed. */
static bool wait_changed(sc_call *k)
{
    sc_conn *c = k->conn;
    struct timespec until = {.tv_sec = k->deadline / 1000000000, .tv_nsec = k->deadline % 1000000000};
    c->waiting++;
    int r = k->deadline ? pthread_cond_timedwait(&c->changed, &c->lock, &until) : pthread_cond_wait(&c->changed, &c->lock);
    c->waiting--;
    return r != ETIMEDOUT;
}

/* Under the lock: what `can` says, once it is no more -EAGAIN. */
static int wait_until(sc_call *k, int (*can)(const sc_call *))
{
    int r;
    bool late = false;
    while ((r = can(k)) == -EAGAIN && !late)
        late = !wait_changed(k);
    return r == -EAGAIN ? -ETIMEDOUT : r;
}

/* Under the lock: what sc_call_recv would say now, without taking anything. */
static int can_recv(const sc_call *k)
{
    if (k->conn->dead || atomic_load(&k->done))
        return -ECANCELED;
    if (k->messages)
        return 1;
    return k->ended ? 0 : k->conn->eof ? -ECANCELED : -EAGAIN;
}

int sc_call_recv(sc_call *k, bool wait, sc_message **out)
{
    sc_conn *c = k->conn;
    pthread_mutex_lock(&c->lock);
    int r = wait ? wait_until(k, can_recv) : can_recv(k);
    if (r == 1) {
        *out = k->messages;
        k->messages = k->messages->next;
        if (!k->messages)
            k->messages_tail = &k->messages;
        c->unread -= (*out)->n + MESSAGE_COST;
        if (c->stalled)
            sc_conn_arm(c);
    }
    pthread_mutex_unlock(&c->lock);
    return r;
}

static int can_send(const sc_call *k)
{
    if (k->conn->dead || atomic_load(&k->done))
        return -ECANCELED;
    return k->conn->out.len > k->conn->srv->limits.max_unsent ? -EAGAIN : 0;
}

int sc_call_send(sc_call *k, const void *p, size_t n, bool wait)
{
    sc_conn *c = k->conn;
    uint8_t head[SC_HEADER];
    if (n > c->srv->limits.max_message)
        return -EMSGSIZE;
    pthread_mutex_lock(&c->lock);
    int r = wait ? wait_until(k, can_send) : can_send(k);
    pthread_mutex_unlock(&c->lock);
    if (r)
        return r;
    sc_header_write(head, (uint32_t)n, k->stream, SC_DATA, 0);
    return sc_conn_send(c, head, sizeof head, p, n, false, k, false) ? 0 : -ECANCELED;
}

int sc_call_want(sc_call *k, int events)
{
    sc_conn *c = k->conn;
    pthread_mutex_lock(&c->lock);
    int now = (events & SC_READABLE && can_recv(k) != -EAGAIN ? SC_READABLE : 0) |
              (events & SC_WRITABLE && can_send(k) != -EAGAIN ? SC_WRITABLE : 0) |
              (events & SC_CANCELLED && cut_off(k) ? SC_CANCELLED : 0);
    if (!now) {
        c->want_write += events & SC_WRITABLE && !(k->want & SC_WRITABLE);
        k->want |= (uint8_t)events;
    }
    pthread_mutex_unlock(&c->lock);
    return now;
}
