/* A Request frame: where it belongs, and the answers that C gives itself (State, Wait, Connect). */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <unistd.h>

#include "server.h"

static size_t route_hash(sc_slice service, sc_slice method)
{
    uint64_t h = 1469598103934665603ULL;
    for (size_t i = 0; i < service.n; i++)
        h = (h ^ service.p[i]) * 1099511628211ULL;
    for (size_t i = 0; i < method.n; i++)
        h = (h ^ method.p[i]) * 1099511628211ULL;
    return h % (sizeof((sc_server *)0)->routes / sizeof(struct sc_route *));
}

static sc_slice slice(const char *text)
{
    return (sc_slice){(const uint8_t *)text, strlen(text)};
}

int sc_server_method(sc_server *s, const char *service, const char *method, int kind, int index)
{
    struct sc_route *r = calloc(1, sizeof *r);
    if (!r || !(r->service = strdup(service)) || !(r->method = strdup(method)))
        return -ENOMEM;
    r->service_len = strlen(service);
    r->method_len = strlen(method);
    r->kind = kind;
    r->index = index;
    size_t h = route_hash(slice(service), slice(method));
    r->next = s->routes[h]; /* in front: the last registration of a name counts */
    s->routes[h] = r;
    return 0;
}

void sc_conn_answer(sc_conn *c, uint32_t stream, int32_t code, const char *text)
{
    uint8_t head[SC_RESPONSE_HEAD + 256];
    size_t n = strlen(text);
    sc_conn_send(c, head, sc_response_head(head, stream, code, text, n > 256 ? 256 : n, 0), NULL, 0, true, NULL, false);
}

static void answer_named(sc_call *k, int32_t code, const char *what, sc_slice name)
{
    char text[300];
    size_t n = (size_t)snprintf(text, sizeof text, "%s ", what), more = name.n > 256 ? 256 : name.n;
    if (more)
        memcpy(text + n, name.p, more); /* there may be a NUL in it */
    sc_call_reply(k, code, text, n + more, NULL, 0, true);
}

static bool read_ids(sc_slice payload, char *id, char *exec_id, size_t size)
{
    sc_reader r = {payload.p, payload.p + payload.n};
    sc_field f;
    int more;
    *id = *exec_id = 0;
    while ((more = sc_read_field(&r, &f)) == 1) {
        char *to = f.type != 2 ? NULL : f.field == 1 ? id : f.field == 2 ? exec_id : NULL;
        if (!to)
            continue;
        if (f.bytes.n >= size)
            return false;
        memcpy(to, f.bytes.p, f.bytes.n);
        to[f.bytes.n] = 0;
    }
    return more == 0;
}

static size_t wait_response(uint8_t *out, const sc_exit *e)
{
    uint8_t *p = out;
    if (e->status)
        p = sc_write_uint(p, 1, e->status);
    return (size_t)(sc_write_timestamp(p, 2, e->exited_at) - out);
}

static void wait_fired(sc_waiter *w)
{
    sc_call *k = (sc_call *)((char *)w - offsetof(sc_call, waiter));
    static const char late[] = "context deadline exceeded";
    uint8_t out[64];
    if (w->late)
        sc_call_reply(k, SC_DEADLINE_EXCEEDED, late, sizeof late - 1, NULL, 0, false);
    else
        sc_call_reply(k, 0, NULL, 0, out, wait_response(out, &w->exit), false);
    sc_call_unref(k); /* the waiter's */
}

/* A Wait: 0 or 1, or what sc_slot_wait has against it. */
static int park(sc_server *s, sc_call *k, const char *id, const char *exec_id)
{
    uint8_t small[64];
    k->waiter.fire = wait_fired;
    pthread_mutex_lock(&k->conn->lock);
    k->parked = true;
    k->conn->inflight--;
    bool many = ++k->conn->parked > s->limits.max_inflight;
    pthread_mutex_unlock(&k->conn->lock);
    atomic_fetch_sub(&s->inflight, 1);
    if (many) {
        static const char text[] = "too many Waits in flight";
        sc_call_reply(k, SC_RESOURCE_EXHAUSTED, text, sizeof text - 1, NULL, 0, true);
        return 1;
    }
    sc_call_ref(k); /* the waiter's */
    int r = sc_slot_wait(s->core, id, exec_id, &k->waiter, k->deadline);
    if (r == 1)
        sc_call_reply(k, 0, NULL, 0, small, wait_response(small, &k->waiter.exit), true);
    if (r)
        sc_call_unref(k);
    return r;
}

static void answer_unknown(sc_call *k, int r, const char *id, const char *exec_id)
{
    char text[2200];
    int n = *exec_id ? snprintf(text, sizeof text, "exec %.1023s of container %.1023s not found", exec_id, id)
                     : snprintf(text, sizeof text, "container %.1023s not found", id);
    sc_call_reply(k, r == -ENOENT ? SC_NOT_FOUND : SC_INTERNAL, text, (size_t)n, NULL, 0, true);
}

/* Among the calls that are kept for Python may be the Create, or the Exec, of what this one asks about: who has given that up and
 * asks now would be told that there is none, and clear away what is made a moment later. */
static bool must_queue(sc_server *s, const char *id, const char *exec_id)
{
    if (!s->standin.acting || !s->standin.ready)
        return false;
    sc_slot *slot = sc_slot_find(s->core, id, exec_id);
    if (slot)
        sc_slot_unref(slot);
    return !slot;
}

void sc_call_native(sc_server *s, sc_call *k, int native)
{
    char id[1024], exec_id[1024];
    if (!read_ids(k->payload, id, exec_id, sizeof id)) {
        static const char text[] = "request can't be parsed";
        sc_call_reply(k, SC_INTERNAL, text, sizeof text - 1, NULL, 0, true);
        return;
    }
    if (native != SC_NATIVE_CONNECT && must_queue(s, id, exec_id)) {
        k->native = (uint8_t)native;
        sc_call_ref(k);
        sc_standin_hold(s, k);
        return;
    }
    int r = 0;
    uint8_t small[64];
    if (native == SC_NATIVE_STATE) {
        sc_buf out = {0};
        r = sc_slot_state(s->core, id, exec_id, &out);
        if (r == 0)
            sc_call_reply(k, 0, NULL, 0, out.p, out.len, true);
        sc_buf_free(&out);
    } else if (native == SC_NATIVE_WAIT) {
        r = park(s, k, id, exec_id);
    } else {
        sc_slot *slot = sc_slot_find(s->core, id, "");
        uint8_t *p = sc_write_uint(small, 1, (uint64_t)getpid());
        if (slot) {
            sc_slot_info info;
            sc_slot_info_get(slot, &info);
            if (info.pid)
                p = sc_write_uint(p, 2, (uint64_t)info.pid);
            sc_slot_unref(slot);
        }
        p = sc_write_bytes(p, 3, "2", 1);
        sc_call_reply(k, 0, NULL, 0, small, (size_t)(p - small), true);
    }
    if (r < 0)
        answer_unknown(k, r, id, exec_id);
}

/* A request's payload is the first message, if it has one. */
static bool open_stream(sc_call *k, uint8_t flags, const sc_request *q)
{
    bool ok = true;
    pthread_mutex_lock(&k->conn->lock);
    k->messages_tail = &k->messages;
    if (q->has_payload && !(flags & SC_FLAG_NO_DATA))
        ok = sc_stream_push(k, q->payload.p, q->payload.n);
    k->ended = flags & SC_FLAG_REMOTE_CLOSED;
    pthread_mutex_unlock(&k->conn->lock);
    k->payload.n = 0;
    return ok;
}

static sc_call *new_call(sc_conn *c, uint32_t stream)
{
    sc_call *k = calloc(1, sizeof *k);
    if (!k)
        return NULL;
    atomic_init(&k->refs, 2); /* the connection's list, and ours */
    atomic_fetch_add(&c->refs, 1);
    k->conn = c;
    k->stream = stream;
    return k;
}

static void list_call(sc_call *k)
{
    sc_conn *c = k->conn;
    pthread_mutex_lock(&c->lock);
    k->next = c->calls;
    if (k->next)
        k->next->prev = k;
    c->calls = k;
    sc_call **chain = &c->streams[k->stream / 2 % (sizeof c->streams / sizeof *c->streams)];
    k->next_stream = *chain;
    *chain = k;
    c->inflight++;
    pthread_mutex_unlock(&c->lock);
    atomic_fetch_add(&c->srv->inflight, 1);
}

int sc_conn_adopt_wait(sc_conn *c, uint32_t stream, const char *id, const char *exec_id, int64_t deadline)
{
    sc_call *k = new_call(c, stream);
    if (!k)
        return -ENOMEM;
    k->deadline = deadline;
    list_call(k);
    int r = park(c->srv, k, id, exec_id);
    if (r < 0)
        answer_unknown(k, r, id, exec_id);
    sc_call_unref(k);
    return 0;
}

void sc_conn_answer_with(sc_conn *c, uint32_t stream, int32_t code, const char *text, const void *payload, size_t n)
{
    uint8_t head[SC_RESPONSE_HEAD + 1024];
    size_t len = strlen(text);
    sc_conn_send(c, head, sc_response_head(head, stream, code, text, len > 1024 ? 1024 : len, n), payload, n, false, NULL, false);
}

void sc_server_request(sc_server *s, sc_conn *c, const sc_header *h, const uint8_t *data, size_t n, sc_large **large)
{
    uint32_t stream = h->stream;
    if (stream <= c->last_stream) {
        sc_conn_answer(c, stream, SC_INVALID_ARGUMENT, "StreamID cannot be re-used and must increment");
        return;
    }
    c->last_stream = stream;
    sc_request q;
    if (!sc_request_parse(data, n, &q)) {
        sc_conn_answer(c, stream, SC_INVALID_ARGUMENT, "request can't be parsed");
        return;
    }
    bool apart = large && !q.has_payload; /* else there was another one behind it, and the last one counts */
    if (apart) {
        q.payload = (sc_slice){(*large)->p, (*large)->n};
        q.has_payload = true;
    }
    if (atomic_load(&s->draining)) {
        sc_conn_answer(c, stream, SC_UNAVAILABLE, "server is shutting down");
        return;
    }
    pthread_mutex_lock(&c->lock);
    bool many = c->inflight >= s->limits.max_inflight;
    pthread_mutex_unlock(&c->lock);
    if (many) {
        sc_conn_answer(c, stream, SC_RESOURCE_EXHAUSTED, "too many requests in flight");
        return;
    }
    sc_call *k = new_call(c, stream);
    if (!k) {
        sc_conn_answer(c, stream, SC_RESOURCE_EXHAUSTED, "out of memory");
        return;
    }
    k->payload = q.payload;
    if (q.timeout_ns) {
        int64_t now = sc_now_mono();
        k->deadline = q.timeout_ns < 0 ? now : q.timeout_ns > INT64_MAX - now ? INT64_MAX : now + q.timeout_ns;
    }
    if (q.pairs && (k->metadata = malloc(q.metadata.n))) {
        memcpy(k->metadata, q.metadata.p, q.metadata.n);
        k->metadata_len = q.metadata.n;
    }
    list_call(k);
    atomic_fetch_add_explicit(&s->calls, 1, memory_order_relaxed);

    struct sc_route *r = s->routes[route_hash(q.service, q.method)];
    while (r && (r->service_len != q.service.n || r->method_len != q.method.n || memcmp(r->service, q.service.p, q.service.n) ||
                 memcmp(r->method, q.method.p, q.method.n)))
        r = r->next;
    if (!r) {
        bool service = false;
        for (size_t i = 0; i < sizeof s->routes / sizeof *s->routes && !service; i++)
            for (struct sc_route *o = s->routes[i]; o && !service; o = o->next)
                service = o->service_len == q.service.n && !memcmp(o->service, q.service.p, q.service.n);
        answer_named(k, SC_UNIMPLEMENTED, service ? "method" : "service", service ? q.method : q.service);
        sc_call_unref(k);
    } else if (r->kind && r->kind < SC_STREAM_CLIENT) {
        sc_call_native(s, k, r->kind);
        sc_call_unref(k);
    } else {
        k->method = r->index;
        k->streams = (uint8_t)r->kind;
        if (r->kind & SC_STREAM_CLIENT && !open_stream(k, h->flags, &q)) {
            sc_call_reply(k, SC_RESOURCE_EXHAUSTED, "out of memory", 13, NULL, 0, true);
            sc_call_unref(k);
            return;
        }
        if (apart && k->payload.n) {
            k->large = *large;
            *large = NULL;
        } else if (large && k->payload.n && !sc_call_copy(k)) {
            return;
        }
        if (s->standin.acting) {
            sc_standin_hold(s, k);
        } else {
            *s->ready_tail = k;
            s->ready_tail = &k->next_ready;
        }
    }
}
