/* conn.c and server.c: how connections and the server end, and what is bounded. */
#define _GNU_SOURCE
#include "serverrig.h"

#include <sys/resource.h>

/* ---- how a connection ends ---- */

static void half_closed_is_answered(void)
{
    int fd = dial();
    ask(fd, 1, "t.Test", "Park", "");
    ask(fd, 3, "t.Test", "Echo", "now");
    CHECK_EQ(shutdown(fd, SHUT_WR), 0);
    expect(fd, 3, 0, "", "now");
    still_serves(); /* which has seen the half-close too */
    sc_call *k = srv_parked();
    CHECK(!k->cancelled);
    sc_call_reply(k, 0, NULL, 0, "later", 5, false);
    expect(fd, 1, 0, "", "later");
    sc_call_unref(k);
    hung_up(fd);
}

/* The answer is larger than the socket takes at once, and nothing else is in flight. */
static void half_closed_with_a_large_answer(void)
{
    large_size = 3 << 20;
    for (int parks = 0; parks < 2; parks++) {
        int fd = dial();
        ask(fd, 1, "t.Test", parks ? "Park" : "Large", "");
        CHECK_EQ(shutdown(fd, SHUT_WR), 0);
        still_serves();
        still_serves();
        if (parks) {
            sc_call *k = srv_parked();
            uint8_t *p = calloc(1, large_size);
            sc_call_reply(k, 0, NULL, 0, p, large_size, false);
            free(p);
            sc_call_unref(k);
            still_serves();
        }
        reply r;
        CHECK(reply_of(fd, &r));
        CHECK_EQ(r.payload.n, large_size);
        free(r.raw);
        hung_up(fd);
    }
    large_size = 1 << 20;
}

static void the_client_goes_in_mid_call(void)
{
    int fds = count_fds(), fd = dial();
    ask(fd, 1, "t.Test", "Park", "");
    sc_call *k = srv_parked();
    close(fd);
    while (!k->cancelled)
        still_serves();
    sc_call_reply(k, 0, NULL, 0, "nobody", 6, false);
    sc_call_unref(k);
    fds_are(fds);
}

static void the_client_goes_in_mid_frame(void)
{
    int fds = count_fds();
    sc_buf b = {0};
    request_to(&b, 1, "t.Test", "Echo", word("0123456789"));
    for (int i = 0; i < 200; i++) {
        int fd = dial();
        say(fd, b.p, (size_t)i % b.len);
        close(fd);
    }
    sc_buf_free(&b);
    fds_are(fds);
}

static void the_client_goes_before_its_answers(void)
{
    int fds = count_fds();
    for (int i = 0; i < 100; i++) {
        int fd = dial();
        for (uint32_t k = 0; k < 4; k++)
            ask(fd, 1 + 2 * k, "t.Test", k % 2 ? "Large" : "Echo", "x");
        close(fd);
    }
    fds_are(fds);
}

static void a_parked_wait(void)
{
    static const char payload[] = "\x0a\x01" "c";
    rig_process p = rig_orphan();
    sc_slot *s;
    CHECK_EQ(sc_slot_open_init(core, "c", NULL, 0, &s), 0);
    CHECK_EQ(sc_slot_bind(s, p.pid), 0);
    CHECK_EQ(sc_slot_announce(s, NULL), 0);
    int fds = count_fds(), gone = dial(), stays = dial(), half = dial();
    for (uint32_t i = 0; i < 20; i++)
        ask(gone, 1 + 2 * i, "t.Task", "Wait", payload);
    echoes(gone, 101);
    ask(stays, 1, "t.Task", "Wait", payload);
    ask(half, 1, "t.Task", "Wait", payload);
    CHECK_EQ(shutdown(half, SHUT_WR), 0);
    echoes(stays, 3); /* nobody is held up by them */
    sc_buf b = {0};
    CHECK(sc_request_frame(&b, 5, word("t.Task"), word("Wait"), word(payload), 1000000));
    say(stays, b.p, b.len);
    sc_buf_free(&b);
    expect(stays, 5, SC_DEADLINE_EXCEEDED, NULL, "");
    close(gone);
    fds_are(fds + 4); /* two here, two there */
    sc_lock(core);
    int n = 0;
    for (sc_waiter *w = s->waiters; w; w = w->next)
        n++;
    sc_unlock(core);
    CHECK_EQ(n, 2); /* those of the connection that has gone are out */
    ask(stays, 7, "t.Task", "State", payload);
    reply r;
    CHECK(reply_of(stays, &r));
    uint64_t v = 0;
    rig_field(r.payload, 3, &v);
    CHECK_EQ(v, p.pid);
    free(r.raw);
    rig_end(&p, 77);
    for (int i = 0; i < 2; i++) {
        CHECK(reply_of(i ? half : stays, &r));
        CHECK_EQ(r.stream, 1);
        rig_field(r.payload, 1, &v);
        CHECK_EQ(v, 77);
        CHECK(rig_field(r.payload, 2, NULL).n > 0);
        free(r.raw);
    }
    hung_up(half);
    ask(stays, 9, "t.Task", "Wait", payload); /* at once, now that it has been told */
    CHECK(reply_of(stays, &r));
    rig_field(r.payload, 1, &v);
    CHECK_EQ(v, 77);
    free(r.raw);
    ask(stays, 11, "t.Task", "Wait", "\x0a\x01" "d");
    expect(stays, 11, SC_NOT_FOUND, "container d not found", "");
    ask(stays, 13, "t.Task", "State", "\x0a\x01" "c\x12\x01x");
    expect(stays, 13, SC_NOT_FOUND, "exec x of container c not found", "");
    ask(stays, 15, "t.Task", "State", "\x0a\x05" "c");
    expect(stays, 15, SC_INTERNAL, NULL, "");
    ask(stays, 17, "t.Task", "Connect", payload);
    CHECK(reply_of(stays, &r));
    rig_field(r.payload, 1, &v);
    CHECK_EQ(v, getpid());
    rig_field(r.payload, 2, &v);
    CHECK_EQ(v, p.pid);
    free(r.raw);
    close(stays);
    CHECK_EQ(sc_slot_forget(s), 0);
    sc_slot_unref(s);
    fds_are(fds - 2); /* without the process's pidfd and our pipe to it */
}

/* Waits whose connections end while the exit is being told: each is answered or cancelled, once. */
static void waits_and_ends_at_once(void)
{
    static const char payload[] = "\x0a\x01" "c";
    int fds = count_fds();
    for (int round = 0; round < 100; round++) {
        rig_process p = rig_fork();
        sc_slot *s;
        CHECK_EQ(sc_slot_open_init(core, "c", NULL, 0, &s), 0);
        CHECK_EQ(sc_slot_bind(s, p.pid), 0);
        CHECK_EQ(sc_slot_announce(s, NULL), 0);
        int fd[4];
        for (int i = 0; i < 4; i++) {
            fd[i] = dial();
            for (uint32_t k = 0; k < 5; k++)
                ask(fd[i], 1 + 2 * k, "t.Task", "Wait", payload);
            echoes(fd[i], 11);
        }
        rig_end(&p, 1);
        for (int i = 0; i < 4; i++)
            close(fd[i]);
        rig_waiter w;
        rig_waiter_init(&w);
        if (sc_slot_wait(core, "c", "", &w.w, 0) == 0)
            rig_fired(&w);
        while (sc_slot_forget(s) == -EBUSY)
            sched_yield();
        sc_slot_unref(s);
    }
    fds_are(fds);
}

/* ---- bounds ---- */

static void inflight_is_bounded(void)
{
    sc_limits l = srv_defaults;
    l.max_inflight = 3;
    with_limits(&l);
    int fd = dial();
    for (uint32_t i = 0; i < 4; i++)
        ask(fd, 1 + 2 * i, "t.Test", "Park", "");
    expect(fd, 7, SC_RESOURCE_EXHAUSTED, "too many requests in flight", "");
    still_serves(); /* another connection's bound is its own */
    for (int i = 0; i < 3; i++) {
        sc_call *k = srv_parked();
        sc_call_reply(k, 0, NULL, 0, "x", 1, false);
        expect(fd, k->stream, 0, "", "x");
        sc_call_unref(k);
    }
    echoes(fd, 9);
    close(fd);
}

static void connections_are_bounded(void)
{
    sc_limits l = srv_defaults;
    l.max_connections = 2;
    with_limits(&l);
    int a = dial(), b = dial(), c = dial(); /* the third waits in the backlog */
    echoes(a, 1);
    echoes(b, 1);
    ask(c, 1, "t.Test", "Echo", "patient");
    echoes(a, 3);
    CHECK_EQ(recv(c, &(char){0}, 1, MSG_DONTWAIT), -1);
    close(a);
    expect(c, 1, 0, "", "patient");
    close(b);
    close(c);
}

/* It sends and sends and never reads: what waits for it is bounded, and nobody else notices. */
static void a_client_that_never_reads(void)
{
    sc_limits l = srv_defaults;
    l.max_unsent = 1 << 20;
    with_limits(&l);
    int fd = dial();
    sc_buf b = {0};
    uint8_t *p = calloc(1, 100000);
    echoes(fd, 1);
    sc_conn *c = srv->conns; /* the only one */
    for (uint32_t i = 0; i < 100; i++) {
        b.len = 0;
        request_to(&b, 3 + 2 * i, "t.Test", "Echo", (sc_slice){p, 100000});
        size_t at = 0;
        while (at < b.len) { /* until the server does not take any more */
            struct pollfd f = {.fd = fd, .events = POLLOUT};
            ssize_t n = send(fd, b.p + at, b.len - at, MSG_NOSIGNAL | MSG_DONTWAIT);
            if (n > 0) {
                at += (size_t)n;
            } else {
                CHECK(errno == EAGAIN || errno == EINTR);
                pthread_mutex_lock(&c->lock);
                bool paused = c->paused;
                pthread_mutex_unlock(&c->lock);
                if (paused)
                    goto full;
                poll(&f, 1, 10);
            }
        }
    }
    CHECK(!"the server stops reading");
full:
    for (int i = 0; i < 20; i++)
        still_serves();
    uint32_t got = 0;
    reply r;
    shutdown(fd, SHUT_WR); /* its last frame is cut: no answer to that one */
    while (reply_of(fd, &r)) { /* it reads after all: all answers are there, in order */
        CHECK_EQ(r.stream, 3 + 2 * got);
        CHECK_EQ(r.payload.n, 100000);
        got++;
        free(r.raw);
    }
    CHECK(got >= 11);
    close(fd);
    free(p);
    sc_buf_free(&b);
}

static void no_fd_for_accept(void)
{
    int fd = dial(), hoard[4096], n = 0;
    echoes(fd, 1);
    struct rlimit lim, was;
    getrlimit(RLIMIT_NOFILE, &was);
    lim = was;
    lim.rlim_cur = 128;
    CHECK_EQ(setrlimit(RLIMIT_NOFILE, &lim), 0);
    int late = dial(); /* its end here has an fd */
    echoes(fd, 3);
    while ((hoard[n] = dup(0)) >= 0)
        n++;
    CHECK_EQ(errno, EMFILE);
    close(hoard[--n]);
    int last = dial(); /* and the server has none left for it */
    ask(last, 1, "t.Test", "Echo", "at last");
    for (uint32_t i = 0; i < 20; i++)
        echoes(fd, 5 + 2 * i); /* it serves on, and does not spin on the listener */
    while (n > 0)
        close(hoard[--n]);
    expect(last, 1, 0, "", "at last");
    setrlimit(RLIMIT_NOFILE, &was);
    close(fd);
    close(late);
    close(last);
}

static void another_users_connection(void)
{
    if (geteuid() != 0)
        return;
    pid_t pid = fork();
    if (!pid) {
        if (setgid(65534) < 0 || setuid(65534) < 0)
            _exit(3);
        int fd = dial();
        char c;
        _exit(recv(fd, &c, 1, 0) <= 0 ? 0 : 4);
    }
    int st;
    CHECK_EQ(waitpid(pid, &st, 0), pid);
    CHECK_EQ(st, 0);
    sc_limits l = srv_defaults;
    l.check_peer = false;
    with_limits(&l);
    pid = fork();
    if (!pid) {
        if (setgid(65534) < 0 || setuid(65534) < 0)
            _exit(3);
        still_serves();
        _exit(0);
    }
    CHECK_EQ(waitpid(pid, &st, 0), pid);
    CHECK_EQ(st, 0);
}

static void fds_that_come_with_bytes(void)
{
    int fds = count_fds(), fd = dial();
    sc_buf b = {0};
    request_to(&b, 1, "t.Test", "Echo", word("x"));
    union {
        char space[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } u;
    struct iovec iov = {b.p, b.len};
    struct msghdr m = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = u.space, .msg_controllen = sizeof u.space};
    struct cmsghdr *h = CMSG_FIRSTHDR(&m);
    h->cmsg_level = SOL_SOCKET;
    h->cmsg_type = SCM_RIGHTS;
    h->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(h), &(int){0}, sizeof(int));
    CHECK(sendmsg(fd, &m, 0) == (ssize_t)b.len);
    expect(fd, 1, 0, "", "x");
    close(fd);
    sc_buf_free(&b);
    fds_are(fds);
}

static void much_metadata(void)
{
    sc_buf b = {0};
    int fd = dial();
    request_to(&b, 1, "t.Test", "Park", word(""));
    for (int i = 0; i < 100000; i++)
        sc_buf_put(&b, "\x2a\x06\x0a\x01k\x12\x01v", 8);
    sc_header_write(b.p, (uint32_t)b.len - SC_HEADER, 1, SC_REQUEST, 1);
    say(fd, b.p, b.len);
    sc_call *k = srv_parked();
    sc_reader r = {k->metadata, k->metadata + k->metadata_len};
    sc_slice key, value;
    int n = 0;
    while (sc_metadata_next(&r, &key, &value) == 1) {
        CHECK(sc_slice_is(key, "k") && sc_slice_is(value, "v"));
        n++;
    }
    CHECK_EQ(n, 100000);
    sc_call_reply(k, 0, NULL, 0, NULL, 0, false);
    sc_call_unref(k);
    expect(fd, 1, 0, "", "");
    sc_buf_free(&b);
    close(fd);
}

static void deadlines(void)
{
    static const int64_t timeouts[] = {0, -1, INT64_MAX, INT64_MIN, 1000000000};
    int fd = dial();
    for (uint32_t i = 0; i < 5; i++) {
        sc_buf b = {0};
        int64_t before = sc_now_mono();
        CHECK(sc_request_frame(&b, 1 + 2 * i, word("t.Test"), word("Park"), word(""), timeouts[i]));
        say(fd, b.p, b.len);
        sc_buf_free(&b);
        sc_call *k = srv_parked();
        if (timeouts[i] == 0)
            CHECK_EQ(k->deadline, 0);
        else if (timeouts[i] < 0)
            CHECK(k->deadline >= before && k->deadline <= sc_now_mono());
        else if (timeouts[i] == INT64_MAX)
            CHECK_EQ(k->deadline, INT64_MAX);
        else
            CHECK(k->deadline >= before + 1000000000 && k->deadline <= sc_now_mono() + 1000000000);
        sc_call_reply(k, 0, NULL, 0, NULL, 0, false);
        sc_call_unref(k);
        expect(fd, 1 + 2 * i, 0, "", "");
    }
    close(fd);
}

/* ---- shutting down ---- */

static void draining(void)
{
    int fd = dial();
    ask(fd, 1, "t.Test", "Park", "");
    sc_call *k = srv_parked();
    sc_server_drain(srv);
    ask(fd, 3, "t.Test", "Echo", "");
    expect(fd, 3, SC_UNAVAILABLE, "server is shutting down", "");
    CHECK_EQ(sc_server_inflight(srv), 1);
    sc_call_reply(k, 0, NULL, 0, "done", 4, false); /* what was in flight is answered */
    sc_call_unref(k);
    expect(fd, 1, 0, "", "done");
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    strcpy(a.sun_path, srv_path);
    int late;
    do { /* the listener is closed as soon as the thread comes round to it */
        late = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (connect(late, (struct sockaddr *)&a, sizeof a) < 0)
            break;
        close(late);
    } while (true);
    CHECK_EQ(errno, ECONNREFUSED);
    close(late);
    CHECK_EQ(sc_server_inflight(srv), 0);
    sc_server_stop(srv);
    hung_up(fd);
}

/* Not idle before the last byte of the last answer has gone: else a shutdown would cut it. */
static void idle_means_sent(void)
{
    int fd = dial();
    ask(fd, 1, "t.Test", "Park", "");
    sc_call *k = srv_parked();
    sc_server_drain(srv);
    large_size = 3 << 20;
    uint8_t *p = calloc(1, large_size);
    sc_call_reply(k, 0, NULL, 0, p, large_size, false);
    sc_call_unref(k);
    free(p);
    CHECK_EQ(sc_server_inflight(srv), 0);
    CHECK(!sc_server_idle(srv)); /* nothing moves the list of connections meanwhile */
    reply r;
    CHECK(reply_of(fd, &r));
    CHECK_EQ(r.payload.n, large_size);
    free(r.raw);
    while (!sc_server_idle(srv))
        sched_yield();
    large_size = 1 << 20;
    close(fd);
}

static void stopped_with_connections(void)
{
    int fds = count_fds(), fd[20];
    sc_slot *s;
    CHECK_EQ(sc_slot_open_init(core, "c", NULL, 0, &s), 0);
    for (int i = 0; i < 20; i++) {
        fd[i] = dial();
        ask(fd[i], 1, "t.Task", "Wait", "\x0a\x01" "c");
        echoes(fd[i], 3);
    }
    srv_stop();
    for (int i = 0; i < 20; i++)
        hung_up(fd[i]);
    CHECK(s->waiters == NULL);
    CHECK_EQ(sc_slot_drop(s), 0);
    CHECK_EQ(sc_slot_forget(s), 0);
    sc_slot_unref(s);
    srv_start(&srv_defaults);
    fds_are(fds);
}

#define LED(body) \
    static void run_##body(void) { serve(body); }
#define BODIES(X) \
    X(half_closed_is_answered) X(half_closed_with_a_large_answer) X(the_client_goes_in_mid_call) \
    X(the_client_goes_in_mid_frame) X(the_client_goes_before_its_answers) X(a_parked_wait) X(waits_and_ends_at_once) \
    X(inflight_is_bounded) X(connections_are_bounded) X(a_client_that_never_reads) X(no_fd_for_accept) \
    X(another_users_connection) X(fds_that_come_with_bytes) X(much_metadata) X(deadlines) X(draining) \
    X(idle_means_sent) X(stopped_with_connections)
BODIES(LED)

int main(void)
{
#define GO(body) RUN(run_##body);
    BODIES(GO)
    return 0;
}
