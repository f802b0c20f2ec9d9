/* stream.c: messages both ways, what ends a stream, and what is bounded. */
#define _GNU_SOURCE
#include "serverrig.h"

static void open_stream(int fd, uint32_t stream, const char *method)
{
    sc_buf b = {0};
    request_to(&b, stream, "t.Test", method, word(""));
    b.p[9] = SC_FLAG_REMOTE_OPEN | SC_FLAG_NO_DATA;
    say(fd, b.p, b.len);
    sc_buf_free(&b);
}

static sc_call *opened(int fd, uint32_t stream, const char *method)
{
    open_stream(fd, stream, method);
    return srv_parked();
}

static void data(int fd, uint32_t stream, const char *text)
{
    frame_of(fd, (uint32_t)strlen(text), stream, SC_DATA, 0);
    say(fd, text, strlen(text));
}

static void half_close(int fd, uint32_t stream)
{
    frame_of(fd, 0, stream, SC_DATA, SC_FLAG_REMOTE_CLOSED | SC_FLAG_NO_DATA);
}

/* The next frame's header; its data goes to `to`, which is large enough. */
static sc_header heard(int fd, void *to)
{
    uint8_t raw[SC_HEADER];
    sc_header h;
    CHECK(hear(fd, raw, sizeof raw));
    sc_header_read(raw, &h);
    CHECK(hear(fd, to, h.length));
    return h;
}

static void heard_data(int fd, uint32_t stream, const char *text)
{
    char got[64];
    sc_header h = heard(fd, got);
    CHECK_EQ(h.stream, stream);
    CHECK_EQ(h.type, SC_DATA);
    CHECK_EQ(h.flags, text ? 0 : SC_FLAG_REMOTE_CLOSED | SC_FLAG_NO_DATA);
    CHECK_EQ(h.length, text ? strlen(text) : 0);
    CHECK(!text || !memcmp(got, text, h.length));
}

static void taken(sc_call *k, const char *text)
{
    sc_message *m;
    CHECK_EQ(sc_call_recv(k, true, &m), 1);
    CHECK_EQ(m->n, strlen(text));
    CHECK(!memcmp(m->p, text, m->n));
    free(m);
}

static void done(sc_call *k)
{
    sc_call_reply(k, 0, NULL, 0, NULL, 0, false);
    sc_call_unref(k);
}

static void messages_both_ways(void)
{
    int fd = dial();
    sc_message *m;
    sc_call *k = opened(fd, 1, "Both");
    CHECK_EQ(sc_call_recv(k, false, &m), -EAGAIN);
    data(fd, 1, "a");
    data(fd, 1, "");
    data(fd, 1, "ccc");
    half_close(fd, 1);
    taken(k, "a");
    taken(k, "");
    taken(k, "ccc");
    CHECK_EQ(sc_call_recv(k, true, &m), 0);
    CHECK_EQ(sc_call_recv(k, true, &m), 0);
    CHECK_EQ(sc_call_send(k, "out", 3, true), 0);
    CHECK_EQ(sc_call_send(k, "", 0, false), 0);
    CHECK_EQ(sc_call_send(k, NULL, SC_MAX_MESSAGE + 1, true), -EMSGSIZE);
    done(k);
    heard_data(fd, 1, "out");
    heard_data(fd, 1, "");
    heard_data(fd, 1, NULL);
    k = opened(fd, 3, "Up");
    data(fd, 3, "x");
    taken(k, "x");
    sc_call_reply(k, 0, NULL, 0, "sum", 3, false); /* before its client has ended */
    expect(fd, 3, 0, "", "sum");
    CHECK_EQ(sc_call_recv(k, true, &m), -ECANCELED);
    CHECK_EQ(sc_call_send(k, "late", 4, true), -ECANCELED);
    sc_call_unref(k);
    data(fd, 3, "late");
    expect(fd, 3, SC_INVALID_ARGUMENT, "StreamID is no longer active", "");
    close(fd);
}

static void a_first_message_in_the_request(void)
{
    int fd = dial();
    sc_message *m;
    ask(fd, 1, "t.Test", "Up", "first"); /* and the last one: its flags say so */
    sc_call *k = srv_parked();
    taken(k, "first");
    CHECK_EQ(sc_call_recv(k, false, &m), 0);
    done(k);
    expect(fd, 1, 0, "", "");
    close(fd);
}

static void data_behind_the_end(void)
{
    int fd = dial();
    sc_message *m;
    sc_call *k = opened(fd, 1, "Both");
    half_close(fd, 1);
    half_close(fd, 1); /* twice does no harm */
    data(fd, 1, "late");
    expect(fd, 1, SC_INVALID_ARGUMENT, NULL, "");
    CHECK_EQ(sc_call_recv(k, true, &m), -ECANCELED);
    CHECK_EQ(sc_call_send(k, "x", 1, true), -ECANCELED);
    sc_call_unref(k);
    echoes(fd, 3);
    close(fd);
}

static int waited;
static void *waiter(void *arg)
{
    sc_message *m;
    waited = sc_call_recv(arg, true, &m);
    return NULL;
}

static void wait_begins(pthread_t *t, sc_call *k)
{
    CHECK(pthread_create(t, NULL, waiter, k) == 0);
    for (unsigned waiting = 0; !waiting;) {
        pthread_mutex_lock(&k->conn->lock);
        waiting = k->conn->waiting;
        pthread_mutex_unlock(&k->conn->lock);
    }
}

static void what_ends_a_wait(void)
{
    pthread_t t;
    for (int how = 0; how < 3; how++) {
        int fd = dial();
        sc_call *k = opened(fd, 1, "Up");
        wait_begins(&t, k);
        if (how == 0)
            close(fd);
        else if (how == 1)
            CHECK_EQ(shutdown(fd, SHUT_WR), 0); /* without a half-close: its messages are not whole */
        else
            half_close(fd, 1);
        pthread_join(t, NULL);
        CHECK_EQ(waited, how == 2 ? 0 : -ECANCELED);
        done(k);
        if (how)
            close(fd);
    }
    int fd = dial();
    sc_buf b = {0};
    CHECK(sc_request_frame(&b, 1, word("t.Test"), word("Up"), word(""), 1000000));
    b.p[9] = SC_FLAG_REMOTE_OPEN | SC_FLAG_NO_DATA;
    say(fd, b.p, b.len);
    sc_buf_free(&b);
    sc_call *k = srv_parked();
    sc_message *m;
    CHECK_EQ(sc_call_recv(k, true, &m), -ETIMEDOUT);
    done(k);
    close(fd);
}

static void told_of_events(void)
{
    int fd = dial();
    sc_call *k = opened(fd, 1, "Both");
    CHECK_EQ(sc_call_want(k, SC_WRITABLE), SC_WRITABLE);
    CHECK_EQ(sc_call_want(k, SC_READABLE | SC_CANCELLED), 0);
    data(fd, 1, "a");
    CHECK_EQ(srv_told(k), SC_READABLE);
    CHECK_EQ(sc_call_want(k, SC_READABLE), SC_READABLE);
    taken(k, "a");
    CHECK_EQ(sc_call_want(k, SC_READABLE), 0);
    half_close(fd, 1);
    CHECK_EQ(srv_told(k), SC_READABLE);
    close(fd);
    CHECK_EQ(srv_told(k), SC_CANCELLED);
    CHECK_EQ(sc_call_want(k, SC_CANCELLED), SC_CANCELLED);
    done(k);
}

static void a_peer_that_does_not_read(void)
{
    sc_limits l = srv_defaults;
    l.max_unsent = 1 << 20;
    with_limits(&l);
    int fd = dial();
    sc_call *k = opened(fd, 1, "Down");
    static char block[65536];
    uint32_t n = 0;
    int r;
    while ((r = sc_call_send(k, block, sizeof block, false)) == 0)
        n++;
    CHECK_EQ(r, -EAGAIN);
    CHECK(n >= 16 && n < 100);
    CHECK_EQ(sc_call_want(k, SC_WRITABLE), 0);
    still_serves();
    for (uint32_t i = 0; i < n; i++)
        CHECK_EQ(heard(fd, block).length, sizeof block);
    CHECK_EQ(srv_told(k), SC_WRITABLE);
    CHECK_EQ(sc_call_send(k, "more", 4, false), 0);
    heard_data(fd, 1, "more");
    done(k);
    heard_data(fd, 1, NULL);
    close(fd);
}

static int talker_fd;
static void *talker(void *arg)
{
    for (int i = 0; i < 2000; i++) {
        char text[1000] = {0};
        frame_of(talker_fd, sizeof text, 1, SC_DATA, 0);
        snprintf(text, sizeof text, "%d", i);
        say(talker_fd, text, sizeof text);
    }
    return arg;
}

static void a_handler_that_does_not_read(void)
{
    sc_limits l = srv_defaults;
    l.max_unread = 100000;
    with_limits(&l);
    talker_fd = dial();
    sc_call *k = opened(talker_fd, 1, "Up");
    sc_conn *c = k->conn;
    pthread_t t;
    CHECK(pthread_create(&t, NULL, talker, NULL) == 0);
    for (bool stalled = false; !stalled;) {
        pthread_mutex_lock(&c->lock);
        stalled = c->stalled;
        CHECK(c->unread < 100000 + SC_RBUF + (SC_RBUF / 1000) * 100);
        pthread_mutex_unlock(&c->lock);
    }
    still_serves();
    for (int i = 0; i < 2000; i++) {
        sc_message *m;
        CHECK_EQ(sc_call_recv(k, true, &m), 1);
        CHECK_EQ(atoi((char *)m->p), i);
        free(m);
    }
    pthread_join(t, NULL);
    CHECK_EQ(c->unread, 0);
    done(k);
    expect(talker_fd, 1, 0, "", "");
    close(talker_fd);
}

static void *sender(void *arg)
{
    while (sc_call_send(arg, "m", 1, true) == 0)
        ;
    return NULL;
}

/* A peer's fault is answered by the thread that reads, while another may be sending. */
static void nothing_follows_the_answer(void)
{
    for (int i = 0; i < 200; i++) {
        int fd = dial();
        sc_call *k = opened(fd, 1, "Both");
        pthread_t t;
        CHECK(pthread_create(&t, NULL, sender, k) == 0);
        half_close(fd, 1);
        data(fd, 1, "late");
        char got[4096];
        while (heard(fd, got).type == SC_DATA)
            ;
        pthread_join(t, NULL);
        sc_call_unref(k);
        ask(fd, 3, "t.Test", "Echo", "x");
        expect(fd, 3, 0, "", "x");
        close(fd);
    }
}

static void left_with_messages(void)
{
    int fd = dial();
    sc_call *k = opened(fd, 1, "Both");
    for (int i = 0; i < 100; i++)
        data(fd, 1, "nobody takes this");
    echoes(fd, 3);
    close(fd);
    still_serves();
    done(k);
}

#define LED(body) \
    static void run_##body(void) { serve(body); }
#define BODIES(X) \
    X(messages_both_ways) X(a_first_message_in_the_request) X(data_behind_the_end) X(what_ends_a_wait) X(told_of_events) \
    X(a_peer_that_does_not_read) X(a_handler_that_does_not_read) X(nothing_follows_the_answer) X(left_with_messages)
BODIES(LED)

int main(void)
{
#define GO(body) RUN(run_##body);
    BODIES(GO)
    return 0;
}
