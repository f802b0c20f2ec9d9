/* The RPC thread's loop: accept, read, answer what C can answer, hand the rest out. */
#define _GNU_SOURCE
#include "server.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

enum { K_LISTENER = 1, K_CONN, K_WAKE, K_MAIL };

#define ACCEPT_PAUSE_NS 50000000LL

static int watch(sc_server *s, int fd, uint32_t events, void *ptr)
{
    struct epoll_event ev = {.events = events, .data.ptr = ptr};
    return epoll_ctl(s->epfd, EPOLL_CTL_ADD, fd, &ev) < 0 ? -errno : 0;
}

sc_server *sc_server_new(sc_core *core, const sc_limits *limits)
{
    sc_server *s = calloc(1, sizeof *s);
    if (!s)
        return NULL;
    atomic_init(&s->refs, 1);
    s->core = core;
    s->limits = *limits;
    s->ready_tail = &s->ready;
    s->standin.ready_tail = &s->standin.ready;
    pthread_mutex_init(&s->standin.role, NULL);
    pthread_mutex_init(&s->dirty_lock, NULL);
    s->wake_kind = K_WAKE;
    s->mail_kind = K_MAIL;
    s->epfd = epoll_create1(EPOLL_CLOEXEC);
    s->wakefd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    s->rbuf = malloc(SC_RBUF);
    if (s->epfd < 0 || s->wakefd < 0 || !s->rbuf || watch(s, s->wakefd, EPOLLIN, &s->wake_kind) < 0 ||
        watch(s, core->mailfd, EPOLLIN, &s->mail_kind) < 0) {
        int e = errno;
        sc_server_free(s);
        errno = e;
        return NULL;
    }
    return s;
}

/* The mail is the RPC thread's alone, and level-triggered. */
void sc_server_mail(sc_server *s, bool watched)
{
    struct epoll_event ev = {.events = watched ? EPOLLIN : 0, .data.ptr = &s->mail_kind};
    epoll_ctl(s->epfd, EPOLL_CTL_MOD, s->core->mailfd, &ev);
}

static void close_listener(sc_server *s, struct listener *l)
{
    if (l->fd < 0)
        return;
    epoll_ctl(s->epfd, EPOLL_CTL_DEL, l->fd, NULL);
    close(l->fd);
    l->fd = -1;
}

void sc_server_free(sc_server *s)
{
    if (!s)
        return;
    sc_server_close_all(s);
    if (s->epfd >= 0)
        close(s->epfd);
    s->epfd = -1;
    sc_server_unref(s);
}

/* A call that is still being handled keeps its connection, and that keeps what it needs of the server. */
void sc_server_unref(sc_server *s)
{
    if (atomic_fetch_sub(&s->refs, 1) != 1)
        return;
    for (size_t i = 0; i < sizeof s->routes / sizeof *s->routes; i++) {
        while (s->routes[i]) {
            struct sc_route *r = s->routes[i];
            s->routes[i] = r->next;
            free(r->service);
            free(r->method);
            free(r);
        }
    }
    if (s->wakefd >= 0)
        close(s->wakefd);
    pthread_mutex_destroy(&s->standin.role);
    pthread_mutex_destroy(&s->dirty_lock);
    free(s->rbuf);
    free(s);
}

int sc_server_listen(sc_server *s, int fd)
{
    if (s->nlisteners == sizeof s->listeners / sizeof *s->listeners)
        return -ENOSPC;
    int flags = fcntl(fd, F_GETFL);
    if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0 || fcntl(fd, F_SETFD, FD_CLOEXEC) < 0)
        return -errno;
    struct listener *l = &s->listeners[s->nlisteners];
    *l = (struct listener){K_LISTENER, fd};
    int r = watch(s, fd, EPOLLIN, l);
    if (r == 0)
        s->nlisteners++;
    return r;
}

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

int sc_server_method(sc_server *s, const char *service, const char *method, int native, int index)
{
    struct sc_route *r = calloc(1, sizeof *r);
    if (!r || !(r->service = strdup(service)) || !(r->method = strdup(method)))
        return -ENOMEM;
    r->service_len = strlen(service);
    r->method_len = strlen(method);
    r->native = native;
    r->index = index;
    size_t h = route_hash(slice(service), slice(method));
    r->next = s->routes[h]; /* in front: the last registration of a name counts */
    s->routes[h] = r;
    return 0;
}

void sc_server_wake(sc_server *s)
{
    uint64_t one = 1;
    if (write(s->wakefd, &one, sizeof one) < 0) {
        /* EAGAIN: awake already. */
    }
}

void sc_conn_mark_dirty(sc_conn *c)
{
    sc_server *s = c->srv;
    pthread_mutex_lock(&s->dirty_lock);
    if (!c->dirty) {
        c->dirty = true;
        atomic_fetch_add(&c->refs, 1);
        c->next_dirty = s->dirty;
        s->dirty = c;
    }
    pthread_mutex_unlock(&s->dirty_lock);
}

void sc_server_flush(sc_server *s)
{
    for (;;) {
        pthread_mutex_lock(&s->dirty_lock);
        sc_conn *c = s->dirty;
        if (c) {
            s->dirty = c->next_dirty;
            c->dirty = false;
        }
        pthread_mutex_unlock(&s->dirty_lock);
        if (!c)
            return;
        sc_conn_flush(c);
        sc_conn_unref(c);
    }
}

/* ---- the end of a connection ---- */

static void drop(sc_server *s, sc_conn *c)
{
    pthread_mutex_lock(&c->lock);
    if (c->dead) {
        pthread_mutex_unlock(&c->lock);
        return;
    }
    c->dead = true;
    epoll_ctl(s->epfd, EPOLL_CTL_DEL, c->fd, NULL); /* before the close: a forked child may hold the fd */
    shutdown(c->fd, SHUT_RDWR);
    size_t n = 0;
    for (sc_call *k = c->calls; k; k = k->next) {
        atomic_store(&k->cancelled, true);
        n += k->parked;
    }
    sc_call **parked = n ? malloc(n * sizeof *parked) : NULL;
    size_t i = 0;
    for (sc_call *k = c->calls; parked && k; k = k->next) {
        if (k->parked) {
            sc_call_ref(k);
            parked[i++] = k;
        }
    }
    sc_buf_free(&c->out);
    pthread_mutex_unlock(&c->lock);
    while (i-- > 0) {
        sc_call *k = parked[i];
        if (sc_waiter_cancel(s->core, &k->waiter)) {
            sc_call_reply(k, SC_UNAVAILABLE, "", 0, NULL, 0, false);
            sc_call_unref(k); /* the waiter's */
        }
        sc_call_unref(k);
    }
    free(parked);
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

void sc_server_close_all(sc_server *s)
{
    sc_standin_stop(s);
    for (unsigned i = 0; i < s->nlisteners; i++)
        close_listener(s, &s->listeners[i]);
    while (s->ready) {
        sc_call *k = sc_server_next(s);
        sc_call_reply(k, SC_UNAVAILABLE, "server is shutting down", 23, NULL, 0, false);
        sc_call_unref(k);
    }
    sc_server_flush(s);
    while (s->conns)
        drop(s, s->conns);
}

/* ---- accepting ---- */

static void listeners_arm(sc_server *s, uint32_t events)
{
    for (unsigned i = 0; i < s->nlisteners; i++) {
        struct epoll_event ev = {.events = events, .data.ptr = &s->listeners[i]};
        if (s->listeners[i].fd >= 0)
            epoll_ctl(s->epfd, EPOLL_CTL_MOD, s->listeners[i].fd, &ev);
    }
}

static void accept_all(sc_server *s, struct listener *l)
{
    while (l->fd >= 0) {
        if (s->nconns >= s->limits.max_connections) {
            s->accept_again = sc_now_mono() + ACCEPT_PAUSE_NS;
            listeners_arm(s, 0);
            return;
        }
        int fd = accept4(l->fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
        if (fd < 0) {
            if (errno == EINTR || errno == ECONNABORTED)
                continue;
            if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM) {
                s->accept_again = sc_now_mono() + ACCEPT_PAUSE_NS; /* else level-triggered epoll spins */
                listeners_arm(s, 0);
            }
            return;
        }
        struct ucred cred = {0, (uid_t)-1, (gid_t)-1};
        socklen_t len = sizeof cred;
        int known = getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &cred, &len);
        if (s->limits.check_peer && (known < 0 || cred.uid != geteuid() || cred.gid != getegid())) {
            close(fd);
            continue;
        }
        sc_conn *c = calloc(1, sizeof *c);
        if (!c) {
            close(fd);
            return;
        }
        *c = (sc_conn){.kind = K_CONN, .fd = fd, .srv = s, .pid = cred.pid, .uid = (int)cred.uid, .gid = (int)cred.gid};
        atomic_init(&c->refs, 1);
        atomic_fetch_add(&s->refs, 1);
        pthread_mutex_init(&c->lock, NULL);
        c->armed = EPOLLIN;
        if (watch(s, fd, EPOLLIN, c) < 0) {
            sc_conn_unref(c);
            return;
        }
        c->next = s->conns;
        if (c->next)
            c->next->prev = c;
        s->conns = c;
        s->nconns++;
    }
}

/* ---- requests ---- */

static void answer_frame(sc_conn *c, uint32_t stream, int32_t code, const char *text)
{
    uint8_t head[SC_RESPONSE_HEAD + 256];
    size_t n = strlen(text);
    sc_conn_send(c, head, sc_response_head(head, stream, code, text, n > 256 ? 256 : n, 0), NULL, 0, true);
}

static void answer_named(sc_call *k, int32_t code, const char *what, sc_slice name)
{
    char text[300];
    int n = snprintf(text, sizeof text, "%s %.*s", what, (int)(name.n > 256 ? 256 : name.n), (const char *)name.p);
    sc_call_reply(k, code, text, (size_t)n, NULL, 0, true);
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

static void answer_native(sc_server *s, sc_call *k, int native)
{
    char id[1024], exec_id[1024];
    if (!read_ids(k->payload, id, exec_id, sizeof id)) {
        static const char text[] = "request can't be parsed";
        sc_call_reply(k, SC_INTERNAL, text, sizeof text - 1, NULL, 0, true);
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
            return;
        }
        sc_call_ref(k); /* the waiter's */
        r = sc_slot_wait(s->core, id, exec_id, &k->waiter, k->deadline);
        if (r == 1)
            sc_call_reply(k, 0, NULL, 0, small, wait_response(small, &k->waiter.exit), true);
        if (r)
            sc_call_unref(k);
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
    if (r < 0) {
        char text[2200];
        int n = *exec_id ? snprintf(text, sizeof text, "exec %s of container %s not found", exec_id, id)
                         : snprintf(text, sizeof text, "container %s not found", id);
        sc_call_reply(k, r == -ENOENT ? SC_NOT_FOUND : SC_INTERNAL, text, (size_t)n, NULL, 0, true);
    }
}

static bool active(sc_conn *c, uint32_t stream)
{
    pthread_mutex_lock(&c->lock);
    sc_call *k = c->streams[stream / 2 % (sizeof c->streams / sizeof *c->streams)];
    while (k && k->stream != stream)
        k = k->next_stream;
    pthread_mutex_unlock(&c->lock);
    return k != NULL;
}

static void request(sc_server *s, sc_conn *c, uint32_t stream, const uint8_t *data, size_t n)
{
    if (stream <= c->last_stream) {
        answer_frame(c, stream, SC_INVALID_ARGUMENT, "StreamID cannot be re-used and must increment");
        return;
    }
    c->last_stream = stream;
    sc_request q;
    if (!sc_request_parse(data, n, &q)) {
        answer_frame(c, stream, SC_INVALID_ARGUMENT, "request can't be parsed");
        return;
    }
    if (atomic_load(&s->draining)) {
        answer_frame(c, stream, SC_UNAVAILABLE, "server is shutting down");
        return;
    }
    pthread_mutex_lock(&c->lock);
    bool many = c->inflight >= s->limits.max_inflight;
    pthread_mutex_unlock(&c->lock);
    if (many) {
        answer_frame(c, stream, SC_RESOURCE_EXHAUSTED, "too many requests in flight");
        return;
    }
    sc_call *k = calloc(1, sizeof *k);
    if (!k) {
        answer_frame(c, stream, SC_RESOURCE_EXHAUSTED, "out of memory");
        return;
    }
    atomic_init(&k->refs, 2); /* the connection's list, and ours */
    atomic_fetch_add(&c->refs, 1);
    k->conn = c;
    k->stream = stream;
    k->payload = q.payload;
    if (q.timeout_ns) {
        int64_t now = sc_now_mono();
        k->deadline = q.timeout_ns < 0 ? now : q.timeout_ns > INT64_MAX - now ? INT64_MAX : now + q.timeout_ns;
    }
    if (q.pairs && (k->metadata = malloc(q.metadata.n))) {
        memcpy(k->metadata, q.metadata.p, q.metadata.n);
        k->metadata_len = q.metadata.n;
    }
    pthread_mutex_lock(&c->lock);
    k->next = c->calls;
    if (k->next)
        k->next->prev = k;
    c->calls = k;
    sc_call **chain = &c->streams[stream / 2 % (sizeof c->streams / sizeof *c->streams)];
    k->next_stream = *chain;
    *chain = k;
    c->inflight++;
    pthread_mutex_unlock(&c->lock);
    atomic_fetch_add(&s->inflight, 1);
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
    } else if (r->native) {
        answer_native(s, k, r->native);
        sc_call_unref(k);
    } else {
        k->method = r->index;
        if (s->standin.acting) {
            sc_standin_hold(s, k);
        } else {
            *s->ready_tail = k;
            s->ready_tail = &k->next_ready;
        }
    }
}

/* One frame, whole. */
static void frame(sc_server *s, sc_conn *c, const sc_header *h, const uint8_t *data)
{
    if (h->stream % 2 == 0)
        answer_frame(c, h->stream, SC_INVALID_ARGUMENT, "StreamID must be odd for client initiated streams");
    else if (h->type == SC_REQUEST)
        request(s, c, h->stream, data, h->length);
    else if (h->type == SC_DATA && !active(c, h->stream))
        answer_frame(c, h->stream, SC_INVALID_ARGUMENT, "StreamID is no longer active");
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
            answer_frame(c, h.stream, SC_RESOURCE_EXHAUSTED, text);
            c->skip = h.length;
            at += SC_HEADER;
            continue;
        }
        if (n - at - SC_HEADER < h.length)
            break;
        frame(s, c, &h, p + at + SC_HEADER);
        at += SC_HEADER + h.length;
    }
    return (ssize_t)at;
}

/* Nothing is being answered, and no answer waits to be sent. Parked Waits count for a peer that has shut its sending side, not
 * for a server that ends: nobody can answer them. */
static bool quiet(sc_conn *c, bool ending)
{
    pthread_mutex_lock(&c->lock);
    bool over = !c->inflight && (ending || !c->parked) && !c->out.len && !c->sending;
    pthread_mutex_unlock(&c->lock);
    return over;
}

static void readable(sc_server *s, sc_conn *c, uint32_t ev)
{
    uint8_t *rbuf = s->standin.acting ? s->standin.rbuf : s->rbuf, *to = rbuf;
    if (!s->standin.acting)
        sc_buf_free(&c->lent);
    if (c->consumed && s->standin.acting && !c->lent.p) { /* calls that the RPC thread has in hand may borrow these bytes */
        sc_buf rest = {0};
        if (!sc_buf_put(&rest, c->in.p + c->consumed, c->in.len - c->consumed)) {
            drop(s, c);
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
    size_t room = SC_RBUF;
    if (c->in.len) { /* the rest of a frame goes behind its beginning */
        size_t want = 65536;
        if (c->in.len >= SC_HEADER) {
            sc_header h;
            sc_header_read(c->in.p, &h);
            if (h.length + SC_HEADER - c->in.len > want)
                want = 1048576; /* grown as it comes in, not as its header promises */
        }
        if (!sc_buf_reserve(&c->in, want)) {
            drop(s, c);
            return;
        }
        to = c->in.p + c->in.len;
        room = c->in.cap - c->in.len;
    }
    ssize_t n = recv(c->fd, to, room, MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR))
        return;
    if (n <= 0) {
        sc_conn_flush(c);
        pthread_mutex_lock(&c->lock);
        c->eof = true;
        sc_conn_arm(c);
        pthread_mutex_unlock(&c->lock);
        /* SHUT_WR of a peer that still reads: its answers go out first. A peer that has gone gives EPOLLHUP. */
        if (n < 0 || ev & (EPOLLHUP | EPOLLERR) || quiet(c, false))
            drop(s, c);
        return;
    }
    if (to == rbuf) {
        ssize_t took = frames(s, c, to, (size_t)n);
        if (took < 0 || (took < n && !sc_buf_put(&c->in, to + took, (size_t)(n - took)))) {
            sc_conn_flush(c);
            drop(s, c);
        }
    } else {
        c->in.len += (size_t)n;
        ssize_t took = frames(s, c, c->in.p, c->in.len);
        if (took < 0) {
            sc_conn_flush(c);
            drop(s, c);
        } else {
            c->consumed = (size_t)took;
        }
    }
}

static void conn_ready(sc_server *s, sc_conn *c, uint32_t ev)
{
    if (ev & EPOLLOUT)
        sc_conn_flush(c);
    if (ev & EPOLLIN)
        readable(s, c, ev);
    else if (ev & (EPOLLHUP | EPOLLERR) || (c->eof && quiet(c, false)))
        drop(s, c);
}

/* Connections whose peer had shut its sending side and whose last call has been answered since. */
static void reap_half_closed(sc_server *s)
{
    for (sc_conn *c = s->conns, *next; c; c = next) {
        next = c->next;
        if (c->eof && quiet(c, false))
            drop(s, c);
    }
}

bool sc_server_idle(sc_server *s)
{
    for (sc_conn *c = s->conns; c; c = c->next)
        if (!quiet(c, true))
            return false;
    return !s->ready && atomic_load(&s->inflight) == 0;
}

sc_call *sc_server_next(sc_server *s)
{
    sc_call *k = s->ready;
    if (k) {
        s->ready = k->next_ready;
        if (!s->ready)
            s->ready_tail = &s->ready;
    }
    return k;
}

static int handle(sc_server *s, struct epoll_event *e)
{
    uint64_t n;
    switch (*(int *)e->data.ptr) {
    case K_LISTENER: accept_all(s, e->data.ptr); return 0;
    case K_CONN: {
        /* With a server that drains, the last bytes of the last answer may have gone. */
        int work = e->events & EPOLLOUT && atomic_load(&s->draining) ? SC_WORK_WOKEN : 0;
        conn_ready(s, e->data.ptr, e->events);
        return work;
    }
    case K_MAIL: return SC_WORK_NOTES;
    case K_WAKE:
        if (read(s->wakefd, &n, sizeof n) < 0) {
            /* Somebody else's wake-up was taken with ours. */
        }
        reap_half_closed(s);
        return SC_WORK_WOKEN;
    }
    return 0;
}

/* What epoll has told and nobody has handled yet; by the RPC thread, up to a call for Python. */
int sc_server_handle(sc_server *s, bool standin)
{
    int work = 0;
    while (s->at < s->nev && (standin || !s->ready)) {
        struct epoll_event *e = &s->evs[s->at++];
        if (e->data.ptr)
            work |= handle(s, e);
    }
    sc_server_flush(s); /* what C has answered does not wait for the handlers of this batch */
    if ((standin || !s->ready) && atomic_load(&s->draining))
        for (unsigned i = 0; i < s->nlisteners; i++)
            close_listener(s, &s->listeners[i]);
    return work;
}

void sc_server_poll(sc_server *s)
{
    int timeout = -1;
    if (s->accept_again) {
        int64_t left = s->accept_again - sc_now_mono();
        if (left <= 0) {
            s->accept_again = 0;
            listeners_arm(s, EPOLLIN);
        } else {
            timeout = (int)(left / 1000000) + 1;
        }
    }
    int n = epoll_wait(s->epfd, s->evs, sizeof s->evs / sizeof *s->evs, timeout);
    s->at = 0;
    s->nev = n > 0 ? n : 0;
}

int sc_server_wait(sc_server *s)
{
    int work = sc_standin_return(s);
    for (;;) {
        work |= sc_server_handle(s, false);
        if (s->ready)
            work |= SC_WORK_CALLS;
        else if (atomic_load(&s->stop))
            work |= SC_WORK_STOPPED;
        if (work && atomic_load(&s->draining) && sc_server_idle(s))
            work |= SC_WORK_IDLE;
        if (work)
            break;
        sc_server_poll(s);
    }
    sc_standin_leave(s);
    return work;
}

void sc_server_drain(sc_server *s)
{
    atomic_store(&s->draining, true);
    sc_server_wake(s);
}

void sc_server_stop(sc_server *s)
{
    atomic_store(&s->stop, true);
    sc_server_wake(s);
}

unsigned sc_server_inflight(sc_server *s)
{
    return atomic_load(&s->inflight);
}
