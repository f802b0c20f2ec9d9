/* Events on their way to containerd: in order, over one connection, kept until acknowledged.
 *
 * containerd handles the requests of one connection side by side, so what must not overtake waits for the acknowledgement of
 * what it depends on: events of the same exec, and everything of a container against what concerns the whole container. Events
 * of different containers, and of different execs, are in flight together. On the wire the order is the order of queueing.
 *
 * Beyond MEMORY_MAX events the rest waits in the spill file, in order. When that is full too (or there is none), exits and
 * deletions are taken up to twice its cap and up to MEMORY_HARD_MAX in memory, other events are dropped, and each is counted. */
#define _GNU_SOURCE
#include "core.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "frame.h"
#include "spill.h"

enum { WINDOW = 128, MEMORY_MAX = 4096, MEMORY_HARD_MAX = 65536 };
#define BACKOFF_MIN_NS 10000000LL
#define BACKOFF_MAX_NS 1000000000LL
#define REFUSED_NS 30000000000LL /* refused for this long for a reason that won't pass: given up, and counted */
#define MUTE_NS 60000000000LL /* nothing acknowledged for this long: another connection */

static void list_init(sc_event_list *l)
{
    l->head = NULL;
    l->tail = &l->head;
    l->count = 0;
}

static void list_add(sc_event_list *l, sc_event *e)
{
    e->next = NULL;
    *l->tail = e;
    l->tail = &e->next;
    l->count++;
}

static sc_event *list_pop(sc_event_list *l)
{
    sc_event *e = l->head;
    if (e) {
        l->head = e->next;
        if (!l->head)
            l->tail = &l->head;
        l->count--;
    }
    return e;
}

static void list_push_front(sc_event_list *l, sc_event *e)
{
    e->next = l->head;
    l->head = e;
    if (!e->next)
        l->tail = &e->next;
    l->count++;
}

static void socket_ready(sc_core *c, sc_source *s, uint32_t ev);
static void retry_fire(sc_core *c, sc_timer *t);
static void mute_fire(sc_core *c, sc_timer *t);

void sc_outbox_init(sc_outbox *o, const char *address)
{
    o->address = address && *address ? strdup(address) : NULL;
    o->fd = -1;
    o->next_stream = 1;
    o->src.ready = socket_ready;
    o->retry.fire = retry_fire;
    o->mute.fire = mute_fire;
    o->backoff_ns = 0;
    list_init(&o->queue);
    list_init(&o->flight);
    o->spill = malloc(sizeof *o->spill);
    if (!o->spill)
        abort(); /* at start, before anything was promised */
    sc_spill_init(o->spill);
}

void sc_outbox_free(sc_core *c)
{
    sc_outbox *o = &c->outbox;
    sc_event *e;
    while ((e = list_pop(&o->flight)) || (e = list_pop(&o->queue)))
        free(e);
    if (o->fd >= 0)
        close(o->fd);
    sc_buf_free(&o->out);
    sc_buf_free(&o->in);
    sc_spill_free(o->spill);
    free(o->spill);
    free(o->address);
}

sc_stamp *sc_stamp_of(sc_core *c, uint64_t stamp)
{
    if (!stamp || c->stamp_count - (stamp - 1) > SC_STAMPS)
        return NULL; /* overwritten since */
    return &c->stamps[(stamp - 1) % SC_STAMPS];
}

/* Request{service method payload=ForwardRequest{envelope=1{timestamp=1 namespace=2 topic=3 event=4{type_url=1 value=2}}}} */
sc_event *sc_event_new(sc_core *c, sc_slice topic, sc_slice type_url, sc_slice payload, const char *id, const char *exec_id)
{
    static const char service[] = "containerd.services.events.ttrpc.v1.Events", method[] = "Forward";
    size_t ns = strlen(c->ns);
    uint8_t time[SC_TIMESTAMP_MAX];
    size_t time_n = (size_t)(sc_write_timestamp(time, 1, sc_now_real()) - time);
    size_t any = (type_url.n ? sc_bytes_size(type_url.n) : 0) + (payload.n ? sc_bytes_size(payload.n) : 0);
    size_t envelope = time_n + sc_bytes_size(ns) + sc_bytes_size(topic.n) + sc_bytes_size(any);
    size_t forward = sc_bytes_size(envelope);
    size_t all = sc_bytes_size(sizeof service - 1) + sc_bytes_size(sizeof method - 1) + sc_bytes_size(forward);
    if (all > SC_MAX_MESSAGE)
        return NULL;
    sc_event *e = malloc(sizeof *e + all);
    if (!e)
        return NULL;
    *e = (sc_event){.len = all};
    e->key_id = sc_hash(id);
    e->key_exec = *exec_id ? sc_hash(exec_id) : 0;
    e->vital = sc_slice_is(topic, "/tasks/exit") || sc_slice_is(topic, "/tasks/delete");
    uint8_t *p = sc_write_bytes(e->body, 1, service, sizeof service - 1);
    p = sc_write_bytes(p, 2, method, sizeof method - 1);
    *p++ = 3 << 3 | 2;
    p = sc_write_varint(p, forward);
    *p++ = 1 << 3 | 2;
    p = sc_write_varint(p, envelope);
    memcpy(p, time, time_n);
    p = sc_write_bytes(p + time_n, 2, c->ns, ns);
    p = sc_write_bytes(p, 3, topic.p, topic.n);
    *p++ = 4 << 3 | 2;
    p = sc_write_varint(p, any);
    if (type_url.n)
        p = sc_write_bytes(p, 1, type_url.p, type_url.n);
    if (payload.n)
        sc_write_bytes(p, 2, payload.p, payload.n);
    return e;
}

void sc_outbox_push(sc_core *c, sc_event *e)
{
    sc_outbox *o = &c->outbox;
    c->stats.events++;
    sc_past_keep(c, e);
    if (!o->address) { /* no containerd was named: `delete`, or a test */
        c->stats.unsent++;
        free(e);
        return;
    }
    e->next = NULL;
    if (o->queue.count >= MEMORY_MAX || o->spill->count) {
        if (sc_spill_put(o->spill, e)) {
            c->stats.spilled++;
            free(e);
            return;
        }
        if (o->spill->count || !e->vital || o->queue.count >= MEMORY_HARD_MAX) {
            c->stats.dropped++; /* behind a file that is full nothing may be put in front of */
            free(e);
            return;
        }
    }
    list_add(&o->queue, e);
}

bool sc_outbox_empty(const sc_core *c)
{
    return !c->outbox.queue.count && !c->outbox.flight.count && !c->outbox.spill->count;
}

static void refill(sc_outbox *o)
{
    sc_event *e;
    if (o->spill->count && o->queue.count < MEMORY_MAX / 2)
        while (o->queue.count < MEMORY_MAX && (e = sc_spill_take(o->spill)))
            list_add(&o->queue, e);
}

int sc_outbox_spill(sc_core *c, const char *path, int64_t cap)
{
    sc_lock(c);
    int r = sc_spill_open(c->outbox.spill, path, cap);
    sc_unlock(c);
    sc_core_wake(c);
    return r;
}

int sc_outbox_adopt(sc_core *c, bool flight, const sc_event *like, const uint8_t *body, size_t n)
{
    sc_event *e = malloc(sizeof *e + n);
    if (!e)
        return -ENOMEM;
    *e = (sc_event){.key_id = like->key_id, .key_exec = like->key_exec, .stream = like->stream, .vital = like->vital, .len = n};
    e->refused_since = like->refused_since;
    memcpy(e->body, body, n);
    sc_lock(c);
    list_add(flight ? &c->outbox.flight : &c->outbox.queue, e);
    sc_unlock(c);
    return 0;
}

int sc_outbox_adopt_socket(sc_core *c, int fd, uint32_t next_stream, const uint8_t *out, size_t n, const uint8_t *in, size_t m)
{
    sc_outbox *o = &c->outbox;
    sc_lock(c);
    int r = sc_buf_put(&o->out, out, n) && sc_buf_put(&o->in, in, m) ? 0 : -ENOMEM;
    if (r == 0)
        r = sc_watch_fd(c, fd, EPOLLIN | (n ? EPOLLOUT : 0), &o->src);
    if (r == 0) {
        o->fd = fd;
        o->armed_out = n > 0;
        o->next_stream = next_stream;
        if (o->flight.count)
            sc_timer_set(c, &o->mute, sc_now_mono() + MUTE_NS);
    }
    sc_unlock(c);
    return r;
}

int sc_outbox_keep(sc_core *c)
{
    sc_outbox *o = &c->outbox;
    sc_lock(c);
    int r = sc_spill_keep(o->spill, o->flight.head, o->queue.head);
    sc_unlock(c);
    return r;
}

static void disconnect(sc_core *c)
{
    sc_outbox *o = &c->outbox;
    if (o->fd >= 0) {
        epoll_ctl(c->epfd, EPOLL_CTL_DEL, o->fd, NULL);
        close(o->fd);
        o->fd = -1;
    }
    o->out.len = o->in.len = 0;
    o->armed_out = false;
    sc_timer_clear(c, &o->mute);
    /* What was not acknowledged goes first again, in its order. */
    if (o->flight.count) {
        *o->flight.tail = o->queue.head;
        if (!o->queue.head)
            o->queue.tail = o->flight.tail;
        o->queue.head = o->flight.head;
        o->queue.count += o->flight.count;
        list_init(&o->flight);
    }
}

static void back_off(sc_core *c)
{
    sc_outbox *o = &c->outbox;
    o->backoff_ns = !o->backoff_ns ? BACKOFF_MIN_NS : o->backoff_ns >= BACKOFF_MAX_NS / 2 ? BACKOFF_MAX_NS : 2 * o->backoff_ns;
    sc_timer_set(c, &o->retry, sc_now_mono() + o->backoff_ns);
}

static bool connect_now(sc_core *c)
{
    sc_outbox *o = &c->outbox;
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    size_t n = strlen(o->address);
    if (n >= sizeof a.sun_path)
        return false;
    memcpy(a.sun_path, o->address, n);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return false;
    if (connect(fd, (struct sockaddr *)&a, sizeof a) < 0 || sc_watch_fd(c, fd, EPOLLIN, &o->src) < 0) {
        close(fd);
        return false;
    }
    o->fd = fd;
    o->next_stream = 1;
    c->stats.reconnects++;
    return true;
}

static bool must_wait(const sc_outbox *o, const sc_event *e)
{
    for (const sc_event *f = o->flight.head; f; f = f->next)
        if (f->key_id == e->key_id && (!f->key_exec || !e->key_exec || f->key_exec == e->key_exec))
            return true;
    return false;
}

static void lost(sc_core *c)
{
    disconnect(c);
    if (c->outbox.queue.count)
        back_off(c);
}

/* Send what the socket takes. */
static bool flush(sc_core *c)
{
    sc_outbox *o = &c->outbox;
    while (o->out.len) {
        ssize_t n = send(o->fd, o->out.p, o->out.len, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
            break;
        if (n < 0) {
            lost(c);
            return false;
        }
        sc_buf_shift(&o->out, (size_t)n);
    }
    bool want = o->out.len > 0;
    if (want != o->armed_out) {
        struct epoll_event ev = {.events = EPOLLIN | (want ? EPOLLOUT : 0), .data.ptr = &o->src};
        epoll_ctl(c->epfd, EPOLL_CTL_MOD, o->fd, &ev);
        o->armed_out = want;
    }
    return true;
}

void sc_outbox_pump(sc_core *c)
{
    sc_outbox *o = &c->outbox;
    if (o->spill->count && o->address)
        refill(o);
    if (!o->queue.head || o->retry.at)
        return;
    if (o->fd < 0 && !connect_now(c)) {
        back_off(c);
        return;
    }
    if (o->out.len)
        return; /* EPOLLOUT will come */
    while (o->queue.head && o->flight.count < WINDOW && o->out.len < 262144 && !must_wait(o, o->queue.head)) {
        sc_event *e = o->queue.head;
        if (!sc_buf_reserve(&o->out, SC_HEADER + e->len))
            break;
        list_pop(&o->queue);
        e->stream = o->next_stream;
        o->next_stream += 2;
        sc_header_write(o->out.p + o->out.len, (uint32_t)e->len, e->stream, SC_REQUEST, SC_FLAG_REMOTE_CLOSED);
        o->out.len += SC_HEADER;
        sc_buf_put(&o->out, e->body, e->len);
        sc_stamp *t = sc_stamp_of(c, e->stamp);
        if (t)
            t->sent = sc_now_mono();
        list_add(&o->flight, e);
        if (o->next_stream < e->stream) { /* stream ids have run out: the next event takes another connection */
            if (flush(c))
                lost(c);
            return;
        }
    }
    if (o->flight.count && !o->mute.at)
        sc_timer_set(c, &o->mute, sc_now_mono() + MUTE_NS);
    flush(c);
}

static void acknowledged(sc_core *c, uint32_t stream, int32_t code)
{
    sc_outbox *o = &c->outbox;
    sc_event **p = &o->flight.head;
    while (*p && (*p)->stream != stream)
        p = &(*p)->next;
    sc_event *e = *p;
    if (!e)
        return;
    *p = e->next;
    if (!e->next)
        o->flight.tail = p;
    o->flight.count--;
    if (code != SC_OK) {
        int64_t now = sc_now_mono();
        bool passes = code == SC_UNAVAILABLE || code == SC_RESOURCE_EXHAUSTED || code == SC_DEADLINE_EXCEEDED;
        if (!e->refused_since)
            e->refused_since = now;
        if (passes || now - e->refused_since < REFUSED_NS) {
            /* Whatever depends on it has been waiting for it, so the front of the queue is its place. */
            list_push_front(&o->queue, e);
            back_off(c);
            return;
        }
        c->stats.rejected++;
    } else {
        c->stats.acked++;
        o->backoff_ns = 0;
    }
    sc_stamp *t = sc_stamp_of(c, e->stamp);
    if (t)
        t->acked = sc_now_mono();
    free(e);
    sc_timer_clear(c, &o->mute);
    if (o->flight.count)
        sc_timer_set(c, &o->mute, sc_now_mono() + MUTE_NS);
    if (!o->flight.count && !o->queue.count && !o->spill->count)
        pthread_cond_broadcast(&c->drained);
}

static void socket_ready(sc_core *c, sc_source *s, uint32_t ev)
{
    (void)s;
    sc_outbox *o = &c->outbox;
    if (o->fd < 0)
        return; /* closed earlier in this batch */
    if (ev & EPOLLOUT && !flush(c))
        return;
    char buf[16384];
    for (;;) {
        ssize_t n = recv(o->fd, buf, sizeof buf, MSG_DONTWAIT);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
            return;
        if (n <= 0 || !sc_buf_put(&o->in, buf, (size_t)n)) {
            lost(c);
            return;
        }
        size_t at = 0;
        while (o->in.len - at >= SC_HEADER) {
            sc_header h;
            sc_header_read(o->in.p + at, &h);
            if (h.length > SC_MAX_MESSAGE) {
                lost(c);
                return;
            }
            if (o->in.len - at - SC_HEADER < h.length)
                break;
            sc_response r;
            if (h.type == SC_RESPONSE) {
                bool ok = sc_response_parse(o->in.p + at + SC_HEADER, h.length, &r);
                acknowledged(c, h.stream, ok ? r.code : SC_UNKNOWN);
            }
            at += SC_HEADER + h.length;
        }
        sc_buf_shift(&o->in, at);
        if ((size_t)n < sizeof buf)
            return;
    }
}

static void retry_fire(sc_core *c, sc_timer *t)
{
    (void)c, (void)t; /* the loop pumps after every batch */
}

static void mute_fire(sc_core *c, sc_timer *t)
{
    (void)t;
    lost(c);
}
