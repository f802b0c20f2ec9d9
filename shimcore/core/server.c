/* The RPC thread's loop: accept, read, hand out. */
#define _GNU_SOURCE
#include "server.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
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

/* glibc gives memory back to the kernel whenever 128 KiB at the top of a heap are free, so each message of 64 KiB would be paid for
 * with hundreds of page faults. Once a block of this size has been freed, it keeps twice as much. */
static void keep_memory(void)
{
    void *volatile block = malloc(SC_KEPT); /* volatile: a compiler leaves out what nobody uses */
    free(block);
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
    s->events_tail = &s->events;
    pthread_mutex_init(&s->event_lock, NULL);
    pthread_mutex_init(&s->dirty_lock, NULL);
    s->wake_kind = K_WAKE;
    s->mail_kind = K_MAIL;
    s->epfd = epoll_create1(EPOLL_CLOEXEC);
    s->wakefd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    s->rbuf = malloc(SC_RBUF);
    keep_memory();
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
    sc_call *k;
    int events;
    while ((k = sc_server_events(s, &events)))
        sc_call_unref(k);
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
    pthread_mutex_destroy(&s->event_lock);
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
    sc_large_end(s);
    while (s->conns)
        sc_conn_drop(s, s->conns);
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

/* NULL with errno: the fd is still the caller's. */
static sc_conn *new_conn(sc_server *s, int fd, const struct ucred *cred)
{
    sc_conn *c = calloc(1, sizeof *c);
    if (!c)
        return NULL;
    *c = (sc_conn){.kind = K_CONN, .fd = fd, .srv = s, .pid = cred->pid, .uid = (int)cred->uid, .gid = (int)cred->gid};
    int r = watch(s, fd, EPOLLIN, c);
    if (r < 0) {
        free(c);
        errno = -r;
        return NULL;
    }
    atomic_init(&c->refs, 1);
    atomic_fetch_add(&s->refs, 1);
    pthread_mutex_init(&c->lock, NULL);
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&c->changed, &attr);
    pthread_condattr_destroy(&attr);
    c->armed = EPOLLIN;
    c->next = s->conns;
    if (c->next)
        c->next->prev = c;
    s->conns = c;
    s->nconns++;
    return c;
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
        if (!new_conn(s, fd, &cred)) {
            close(fd);
            return;
        }
    }
}

sc_conn *sc_server_adopt(sc_server *s, int fd, uint32_t last_stream, size_t skip, bool eof, const void *in, size_t n,
                         const void *out, size_t m)
{
    struct ucred cred = {0, (uid_t)-1, (gid_t)-1};
    socklen_t len = sizeof cred;
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &cred, &len) < 0)
        return NULL;
    sc_conn *c = new_conn(s, fd, &cred);
    if (!c)
        return NULL;
    c->last_stream = last_stream;
    c->skip = skip;
    c->eof = eof;
    if (!sc_buf_put(&c->in, in, n) || !sc_buf_put(&c->out, out, m))
        abort(); /* no memory at start */
    pthread_mutex_lock(&c->lock);
    sc_conn_arm(c);
    pthread_mutex_unlock(&c->lock);
    return c;
}

/* Connections whose peer had shut its sending side and whose last call has been answered since. */
static void reap_half_closed(sc_server *s)
{
    for (sc_conn *c = s->conns, *next; c; c = next) {
        next = c->next;
        if (c->eof && sc_conn_quiet(c, false))
            sc_conn_drop(s, c);
    }
}

bool sc_server_idle(sc_server *s)
{
    for (sc_conn *c = s->conns; c; c = c->next)
        if (!sc_conn_quiet(c, true))
            return false;
    return !s->ready && atomic_load(&s->inflight) == 0;
}

sc_call *sc_server_next(sc_server *s)
{
    for (;;) {
        sc_call *k = s->ready;
        if (!k)
            return NULL;
        s->ready = k->next_ready;
        if (!s->ready)
            s->ready_tail = &s->ready;
        if (!k->native)
            return k;
        if (atomic_load(&k->cancelled)) /* nobody would take a Wait back that is parked only now */
            sc_call_reply(k, SC_UNAVAILABLE, "", 0, NULL, 0, true);
        else
            sc_call_native(s, k, k->native);
        sc_call_unref(k);
    }
}

static int handle(sc_server *s, struct epoll_event *e)
{
    uint64_t n;
    switch (*(int *)e->data.ptr) {
    case K_LISTENER: accept_all(s, e->data.ptr); return 0;
    case K_CONN: {
        /* With a server that drains, the last bytes of the last answer may have gone. */
        int work = e->events & EPOLLOUT && atomic_load(&s->draining) ? SC_WORK_WOKEN : 0;
        sc_conn_ready(s, e->data.ptr, e->events);
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
    while (s->at < s->nev && (standin || (!s->ready && !s->wanting))) {
        struct epoll_event *e = &s->evs[s->at++];
        if (e->data.ptr && (!atomic_load(&s->held) || *(int *)e->data.ptr >= K_WAKE)) /* what is left out shows again */
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
    if (atomic_load(&s->held)) {
        struct pollfd p[2] = {{.fd = s->wakefd, .events = POLLIN}, {.fd = s->core->mailfd, .events = POLLIN}};
        s->at = s->nev = 0;
        if (poll(p, s->standin.mail_muted ? 1 : 2, -1) > 0) {
            if (p[0].revents)
                s->evs[s->nev++] = (struct epoll_event){.events = EPOLLIN, .data.ptr = &s->wake_kind};
            if (p[1].revents)
                s->evs[s->nev++] = (struct epoll_event){.events = EPOLLIN, .data.ptr = &s->mail_kind};
        }
        return;
    }
    int n = epoll_wait(s->epfd, s->evs, sizeof s->evs / sizeof *s->evs, timeout);
    s->at = 0;
    s->nev = n > 0 ? n : 0;
}

int sc_server_wait(sc_server *s)
{
    int work = sc_standin_return(s);
    sc_large_begin(s);
    atomic_store_explicit(&s->reader, pthread_self(), memory_order_relaxed); /* only compared with one's own */
    for (;;) {
        work |= sc_server_handle(s, false);
        if (atomic_load(&s->has_events))
            work |= SC_WORK_EVENTS;
        if (s->wanting || s->unused || atomic_load(&s->has_scrap))
            work |= SC_WORK_ROOM;
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

void sc_server_hold(sc_server *s, bool on)
{
    atomic_store(&s->held, on);
    sc_server_wake(s);
}

bool sc_server_receiving(sc_server *s)
{
    for (sc_conn *c = s->conns; c; c = c->next)
        if (c->large && c->large->owner)
            return true;
    return false;
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
