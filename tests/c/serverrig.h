/* A server of the core with a thread of its own, and clients that say what they like to it over a socket. */
#ifndef SERVERRIG_H
#define SERVERRIG_H
#include <dirent.h>

#include "rig.h"
#include "server.h"

enum { M_ECHO = 0, M_PARK, M_LARGE, M_FAIL, M_HOLD, M_UP, M_DOWN, M_BOTH };

static sc_server *srv;
static char srv_path[108];
static pthread_t srv_thread;
/* Calls of "Park", and of the methods that stream: the test answers them. */
static sc_call *parked[64];
static size_t nparked;
static pthread_mutex_t park_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t park_cond = PTHREAD_COND_INITIALIZER;
static size_t large_size = 1 << 20;
/* "Hold" keeps the RPC thread until the test lets it go. */
static bool srv_held, srv_let_go;

static inline void srv_handle(sc_call *k)
{
    switch (k->method) {
    case M_ECHO: sc_call_reply(k, 0, NULL, 0, k->payload.p, k->payload.n, true); break;
    case M_FAIL: sc_call_reply(k, SC_NOT_FOUND, "no \xff such\xed\xa0\x80 thing", 18, NULL, 0, true); break;
    case M_LARGE: {
        uint8_t *p = malloc(large_size);
        for (size_t i = 0; i < large_size; i++)
            p[i] = (uint8_t)(i * 7 >> 3);
        sc_call_reply(k, 0, NULL, 0, p, large_size, true);
        free(p);
        break;
    }
    case M_HOLD:
        sc_call_reply(k, 0, NULL, 0, "held", 4, true); /* told once the batch is over */
        pthread_mutex_lock(&park_lock);
        srv_held = true;
        pthread_cond_broadcast(&park_cond);
        while (!srv_let_go)
            pthread_cond_wait(&park_cond, &park_lock);
        srv_held = srv_let_go = false;
        pthread_cond_broadcast(&park_cond);
        pthread_mutex_unlock(&park_lock);
        break;
    default:
        pthread_mutex_lock(&park_lock);
        CHECK(nparked < 64);
        sc_call_ref(k);
        parked[nparked++] = k;
        pthread_cond_broadcast(&park_cond);
        pthread_mutex_unlock(&park_lock);
        break;
    }
    sc_call_unref(k);
}

/* Events of streams, as they were told; under park_lock. */
static struct told {
    sc_call *k;
    int events;
} told[64];
static size_t ntold;

static inline void srv_events(void)
{
    struct told t;
    pthread_mutex_lock(&park_lock);
    while ((t.k = sc_server_events(srv, &t.events))) {
        CHECK(ntold < 64);
        told[ntold++] = t;
        pthread_cond_broadcast(&park_cond);
    }
    pthread_mutex_unlock(&park_lock);
}

/* The next one; the call's reference stays the test's own. */
static inline int srv_told(const sc_call *k)
{
    pthread_mutex_lock(&park_lock);
    while (!ntold)
        pthread_cond_wait(&park_cond, &park_lock);
    struct told t = told[0];
    memmove(told, told + 1, --ntold * sizeof *told);
    pthread_mutex_unlock(&park_lock);
    CHECK(t.k == k);
    sc_call_unref(t.k);
    return t.events;
}

/* Room for large requests: how much is out, how often it was given, and whether there is any. */
static size_t rooms_out, rooms_given;
static atomic_bool no_room;

static inline void srv_room(void)
{
    void *owner;
    while ((owner = sc_server_scrap(srv))) {
        free(owner);
        rooms_out--;
    }
    size_t n = sc_server_room(srv);
    uint8_t *p = n && !atomic_load(&no_room) ? malloc(n) : NULL;
    if (p) {
        rooms_out++;
        rooms_given++;
        sc_server_give(srv, p, p);
    }
}

static inline void *srv_loop(void *arg)
{
    CHECK_EQ(sc_standin_start(srv), 0);
    for (;;) {
        int work = sc_server_wait(srv);
        sc_call *k;
        if (work & SC_WORK_ROOM)
            srv_room();
        while ((k = sc_server_next(srv)))
            srv_handle(k);
        if (work & SC_WORK_EVENTS)
            srv_events();
        if (work & SC_WORK_NOTES)
            rig_take(0);
        if (work & SC_WORK_STOPPED)
            break;
    }
    sc_server_close_all(srv);
    srv_room();
    return arg;
}

static const sc_limits srv_defaults = {SC_MAX_MESSAGE, 65536, 4096, 8388608, true, 8388608};

static inline void srv_start(const sc_limits *limits)
{
    static int number;
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    snprintf(srv_path, sizeof srv_path, "/tmp/sc-srv-%d-%d.sock", (int)getpid(), ++number);
    strcpy(a.sun_path, srv_path);
    srv = sc_server_new(core, limits);
    CHECK(srv != NULL);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    CHECK(fd >= 0 && bind(fd, (struct sockaddr *)&a, sizeof a) == 0 && listen(fd, 256) == 0);
    CHECK_EQ(chmod(srv_path, 0777), 0);
    CHECK_EQ(sc_server_listen(srv, fd), 0);
    static const char *names[] = {"Echo", "Park", "Large", "Fail", "Hold", "Up", "Down", "Both"};
    for (int i = 0; i <= M_BOTH; i++)
        CHECK_EQ(sc_server_method(srv, "t.Test", names[i], i < M_UP ? 0 : (i - M_UP + 1) * SC_STREAM_CLIENT, i), 0);
    CHECK_EQ(sc_server_method(srv, "t.Task", "State", SC_NATIVE_STATE, -1), 0);
    CHECK_EQ(sc_server_method(srv, "t.Task", "Wait", SC_NATIVE_WAIT, -1), 0);
    CHECK_EQ(sc_server_method(srv, "t.Task", "Connect", SC_NATIVE_CONNECT, -1), 0);
    CHECK(pthread_create(&srv_thread, NULL, srv_loop, NULL) == 0);
}

static inline void srv_stop(void)
{
    sc_server_stop(srv);
    pthread_join(srv_thread, NULL);
    pthread_mutex_lock(&park_lock);
    while (nparked) /* their connections are gone */
        sc_call_unref(parked[--nparked]);
    pthread_mutex_unlock(&park_lock);
    sc_server_free(srv);
    srv = NULL;
    unlink(srv_path);
}

static inline void with_limits(const sc_limits *l)
{
    srv_stop();
    srv_start(l);
}

/* The RPC thread is away until srv_go. */
static inline void srv_away(int fd, uint32_t stream)
{
    sc_buf b = {0};
    CHECK(sc_request_frame(&b, stream, (sc_slice){(const uint8_t *)"t.Test", 6}, (sc_slice){(const uint8_t *)"Hold", 4},
                           (sc_slice){NULL, 0}, 0));
    CHECK_EQ(send(fd, b.p, b.len, MSG_NOSIGNAL), (ssize_t)b.len);
    sc_buf_free(&b);
    pthread_mutex_lock(&park_lock);
    while (!srv_held)
        pthread_cond_wait(&park_cond, &park_lock);
    pthread_mutex_unlock(&park_lock);
}

static inline void srv_go(void)
{
    pthread_mutex_lock(&park_lock);
    srv_let_go = true;
    pthread_cond_broadcast(&park_cond);
    while (srv_let_go)
        pthread_cond_wait(&park_cond, &park_lock);
    pthread_mutex_unlock(&park_lock);
}

static inline sc_call *srv_parked(void)
{
    pthread_mutex_lock(&park_lock);
    while (!nparked)
        pthread_cond_wait(&park_cond, &park_lock);
    sc_call *k = parked[--nparked];
    pthread_mutex_unlock(&park_lock);
    return k;
}

/* ---- a client ---- */

static inline int dial(void)
{
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    strcpy(a.sun_path, srv_path);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    CHECK(fd >= 0);
    CHECK_EQ(connect(fd, (struct sockaddr *)&a, sizeof a), 0);
    return fd;
}

static inline void say(int fd, const void *p, size_t n)
{
    size_t at = 0;
    while (at < n) {
        ssize_t sent = send(fd, (const uint8_t *)p + at, n - at, MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR)
            continue;
        CHECK(sent > 0);
        at += (size_t)sent;
    }
}

static inline sc_slice word(const char *s)
{
    return (sc_slice){(const uint8_t *)s, strlen(s)};
}

/* Appends a request. */
static inline void request_to(sc_buf *b, uint32_t stream, const char *service, const char *method, sc_slice payload)
{
    CHECK(sc_request_frame(b, stream, word(service), word(method), payload, 0));
}

static inline void ask(int fd, uint32_t stream, const char *service, const char *method, const char *payload)
{
    sc_buf b = {0};
    request_to(&b, stream, service, method, word(payload));
    say(fd, b.p, b.len);
    sc_buf_free(&b);
}

static inline void frame_of(int fd, uint32_t length, uint32_t stream, uint8_t type, uint8_t flags)
{
    uint8_t h[SC_HEADER];
    sc_header_write(h, length, stream, type, flags);
    say(fd, h, sizeof h);
}

/* false: the connection has ended before this many. */
static inline bool hear(int fd, void *p, size_t n)
{
    size_t at = 0;
    while (at < n) {
        ssize_t got = recv(fd, (uint8_t *)p + at, n - at, 0);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return false;
        at += (size_t)got;
    }
    return true;
}

typedef struct {
    uint32_t stream;
    int32_t code;
    sc_slice message, payload;
    uint8_t *raw;
} reply;

static inline bool reply_of(int fd, reply *r)
{
    uint8_t h[SC_HEADER];
    sc_header head;
    sc_response q;
    if (!hear(fd, h, sizeof h))
        return false;
    sc_header_read(h, &head);
    CHECK_EQ(head.type, SC_RESPONSE);
    CHECK_EQ(head.flags, 0);
    CHECK(head.length <= SC_MAX_MESSAGE);
    r->raw = malloc(head.length + 1);
    if (!hear(fd, r->raw, head.length)) {
        free(r->raw);
        return false;
    }
    CHECK(sc_response_parse(r->raw, head.length, &q));
    *r = (reply){head.stream, q.code, q.message, q.payload, r->raw};
    return true;
}

static inline void expect(int fd, uint32_t stream, int32_t code, const char *message, const char *payload)
{
    reply r;
    CHECK(reply_of(fd, &r));
    CHECK_EQ(r.stream, stream);
    CHECK_EQ(r.code, code);
    if (message && !sc_slice_is(r.message, message)) {
        fprintf(stderr, "message: %.*s\n", (int)r.message.n, (const char *)r.message.p);
        CHECK(!"the message is as expected");
    }
    if (payload)
        CHECK(sc_slice_is(r.payload, payload));
    free(r.raw);
}

static inline void hung_up(int fd)
{
    char c;
    ssize_t n;
    do
        n = recv(fd, &c, 1, 0);
    while (n < 0 && errno == EINTR);
    CHECK(n == 0 || (n < 0 && errno == ECONNRESET));
    close(fd);
}

/* The server is alive, and the connection too. */
static inline void echoes(int fd, uint32_t stream)
{
    ask(fd, stream, "t.Test", "Echo", "hello");
    expect(fd, stream, 0, "", "hello");
}

static inline void still_serves(void)
{
    int fd = dial();
    echoes(fd, 1);
    close(fd);
}

static inline int count_fds(void)
{
    int n = 0;
    DIR *d = opendir("/proc/self/fd");
    while (readdir(d))
        n++;
    closedir(d);
    return n;
}

/* Fds of closed connections go when the server has seen the end of them. */
static inline void fds_are(int want)
{
    while (count_fds() != want)
        still_serves();
}

static void (*served)(void);
static inline void serve_it(void)
{
    sc_lock(core);
    sc_outbox_push(core, rig_make_event("/connected", "c", "")); /* from here on no fd comes or goes unless a test has it so */
    sc_unlock(core);
    sc_core_wake(core);
    CHECK_EQ(sc_core_drain(core, 60000000000LL), 1);
    srv_start(&srv_defaults);
    served();
    srv_stop();
}

/* A test with a server, on a thread that is not the leader. */
static inline void serve(void (*body)(void))
{
    served = body;
    with_leader(serve_it);
}
#endif
