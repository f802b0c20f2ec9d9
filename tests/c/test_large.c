/* large.c: requests whose payload is received into room of its own; what breaks off gives it back. */
#define _GNU_SOURCE
#include "serverrig.h"

static void fill(uint8_t *p, size_t n, unsigned seed)
{
    for (size_t i = 0; i < n; i++)
        p[i] = (uint8_t)((i * 2654435761u + seed) >> 16);
}

/* Appends a request with what else a request may have, before and behind its payload. */
static void put(sc_buf *b, uint32_t stream, const char *before, size_t before_len, const uint8_t *payload, size_t n,
                const char *behind, size_t behind_len)
{
    static const char names[] = "\x0a\x06t.Test\x12\x04" "Echo";
    uint8_t head[16], *p = head;
    *p++ = 3 << 3 | 2;
    p = sc_write_varint(p, n);
    uint8_t h[SC_HEADER];
    sc_header_write(h, (uint32_t)(sizeof names - 1 + before_len + (size_t)(p - head) + n + behind_len), stream, SC_REQUEST, 0);
    CHECK(sc_buf_put(b, h, sizeof h) && sc_buf_put(b, names, sizeof names - 1) && sc_buf_put(b, before, before_len));
    CHECK(sc_buf_put(b, head, (size_t)(p - head)) && sc_buf_put(b, payload, n) && sc_buf_put(b, behind, behind_len));
}

static void is(int fd, uint32_t stream, const uint8_t *p, size_t n)
{
    reply r;
    CHECK(reply_of(fd, &r));
    CHECK_EQ(r.stream, stream);
    CHECK_EQ(r.code, 0);
    CHECK_EQ(r.payload.n, n);
    CHECK(!memcmp(r.payload.p, p, n));
    free(r.raw);
}

enum { N = 300000 };
static uint8_t one[N], two[N];

static const char behind[] = "\x20\x80\xc8\xaf\xa0\x25\x2a\x06\x0a\x01k\x12\x01v"; /* timeout 10 s, metadata k: v */

/* Cut anywhere: before, in and behind the payload, and in the next request. */
static void pieces(void)
{
    static const size_t cuts[] = {5, 10, 11, 20, 24, 26, 27, 28, 29, 30, 1000, N / 2, N + 27, N + 28, N + 30, N + 41, N + 42, N + 45, N + 80};
    for (size_t i = 0; i < sizeof cuts / sizeof *cuts; i++) {
        int fd = dial();
        sc_buf b = {0};
        size_t given = rooms_given;
        put(&b, 1, "", 0, one, N, behind, sizeof behind - 1);
        put(&b, 3, "\x78\x01", 2, two, N, "", 0); /* an unknown field */
        echoes(fd, 1);
        b.p[7] = 5; /* the first one's id */
        say(fd, b.p, cuts[i]);
        still_serves();
        say(fd, b.p + cuts[i], b.len - cuts[i]);
        b.len = 0;
        for (int k = 0; k < 2; k++) { /* what C answers may come before what a handler does */
            reply r;
            CHECK(reply_of(fd, &r));
            CHECK_EQ(r.stream, r.code ? 3 : 5);
            CHECK_EQ(r.code, r.code ? SC_INVALID_ARGUMENT : 0); /* an id that falls; its room comes back, too */
            CHECK_EQ(r.payload.n, r.code ? 0 : N);
            CHECK(!memcmp(r.payload.p, one, r.payload.n));
            free(r.raw);
        }
        put(&b, 7, "", 0, two, N, behind, sizeof behind - 1);
        say(fd, b.p, b.len);
        is(fd, 7, two, N);
        echoes(fd, 9);
        CHECK(rooms_given > given);
        sc_buf_free(&b);
        close(fd);
    }
}

static void the_last_payload_counts(void)
{
    int fd = dial();
    sc_buf b = {0};
    size_t given = rooms_given;
    put(&b, 1, "", 0, one, N, "\x1a\x03" "end", 5);
    say(fd, b.p, 100);
    still_serves();
    say(fd, b.p + 100, b.len - 100);
    is(fd, 1, (const uint8_t *)"end", 3);
    CHECK_EQ(rooms_given, given + 1);
    b.len = 0;
    put(&b, 3, "\x1a\x05" "first", 7, one, 0, behind, sizeof behind - 1);
    say(fd, b.p, b.len);
    expect(fd, 3, 0, "", "");
    sc_buf_free(&b);
    close(fd);
}

/* A malformed tail fails that request alone. */
static void bad_behind(void)
{
    int fd = dial();
    sc_buf b = {0};
    put(&b, 1, "", 0, one, N, "\x07", 1);
    say(fd, b.p, 60);
    still_serves();
    say(fd, b.p + 60, b.len - 60);
    expect(fd, 1, SC_INVALID_ARGUMENT, "request can't be parsed", "");
    echoes(fd, 3);
    sc_buf_free(&b);
    close(fd);
}

/* A payload that would be longer than its frame is no reason to wait for it. */
static void a_length_that_lies(void)
{
    int fd = dial();
    sc_buf b = {0};
    size_t given = rooms_given;
    put(&b, 1, "", 0, one, N, "", 0);
    sc_header_write(b.p, 65536, 1, SC_REQUEST, 0); /* the frame ends before its payload */
    say(fd, b.p, SC_HEADER + 65536);
    expect(fd, 1, SC_INVALID_ARGUMENT, NULL, "");
    CHECK_EQ(rooms_given, given);
    sc_buf_free(&b);
    close(fd);
}

static void without_room(void)
{
    int fd = dial();
    sc_buf b = {0};
    size_t given = rooms_given;
    atomic_store(&no_room, true);
    put(&b, 1, "", 0, one, N, behind, sizeof behind - 1);
    put(&b, 3, "", 0, two, N, behind, sizeof behind - 1);
    say(fd, b.p, b.len);
    is(fd, 1, one, N);
    is(fd, 3, two, N);
    CHECK_EQ(rooms_given, given);
    atomic_store(&no_room, false);
    sc_buf_free(&b);
    close(fd);
}

/* More than PROMISED_MAX of it is not given, whatever headers say; the rest is received as any other. */
static void promises_are_bounded(void)
{
    enum { CLIENTS = 12, SIZE = 4000000 };
    uint8_t *payload = malloc(SIZE);
    sc_buf b = {0};
    int fds[CLIENTS];
    fill(payload, SIZE, 3);
    put(&b, 1, "", 0, payload, SIZE, "", 0);
    size_t given = rooms_given;
    for (int i = 0; i < CLIENTS; i++) {
        fds[i] = dial();
        say(fds[i], b.p, 2000);
        still_serves();
    }
    CHECK_EQ(rooms_given, given + 4);
    for (int i = 0; i < CLIENTS; i++) {
        say(fds[i], b.p + 2000, b.len - 2000);
        is(fds[i], 1, payload, SIZE);
        close(fds[i]);
    }
    sc_buf_free(&b);
    free(payload);
}

/* Clients that go in the middle leave no room out, and no fd. */
static void broken_off(void)
{
    int fds = count_fds();
    sc_buf b = {0};
    put(&b, 1, "", 0, one, N, "", 0);
    for (int i = 0; i < 50; i++) {
        int fd = dial();
        say(fd, b.p, i % 2 ? 100 : N / 2);
        if (i % 3)
            still_serves();
        close(fd);
    }
    fds_are(fds);
    still_serves();
    sc_buf_free(&b);
    with_limits(&srv_defaults);
    CHECK_EQ(rooms_out, 0);
}

/* The RPC thread goes away in the middle of one, and its stand-in goes on. */
static void across_the_change(void)
{
    for (size_t cut = 100; cut < N; cut += 70000) {
        int busy = dial(), fd = dial();
        sc_buf b = {0};
        put(&b, 1, "", 0, one, N, behind, sizeof behind - 1);
        put(&b, 3, "", 0, two, N, behind, sizeof behind - 1);
        say(fd, b.p, cut);
        still_serves();
        srv_away(busy, 1);
        say(fd, b.p + cut, b.len - cut - 1000);
        ask(busy, 3, "t.Task", "Connect", "");
        expect(busy, 1, 0, "", "held");
        expect(busy, 3, 0, "", NULL);
        srv_go();
        is(fd, 1, one, N);
        say(fd, b.p + b.len - 1000, 1000);
        is(fd, 3, two, N);
        echoes(fd, 5);
        sc_buf_free(&b);
        close(busy);
        close(fd);
    }
}

/* Two that wait for room at the same time. */
static void two_at_once(void)
{
    int a = dial(), b = dial(), busy = dial();
    sc_buf x = {0}, y = {0};
    put(&x, 1, "", 0, one, N, "", 0);
    put(&y, 1, "", 0, two, N, "", 0);
    say(a, x.p, 100);
    say(b, y.p, 100);
    srv_away(busy, 1);
    say(a, x.p + 100, 100);
    say(b, y.p + 100, 100);
    srv_go();
    say(a, x.p + 200, x.len - 200);
    say(b, y.p + 200, y.len - 200);
    is(b, 1, two, N);
    is(a, 1, one, N);
    sc_buf_free(&x);
    sc_buf_free(&y);
    close(a);
    close(b);
    close(busy);
}

#define LED(body) \
    static void run_##body(void) { serve(body); }
#define BODIES(X) \
    X(pieces) X(the_last_payload_counts) X(bad_behind) X(a_length_that_lies) X(without_room) X(promises_are_bounded) \
    X(broken_off) X(across_the_change) X(two_at_once)
BODIES(LED)

int main(void)
{
    fill(one, N, 1);
    fill(two, N, 2);
#define GO(body) RUN(run_##body);
    BODIES(GO)
    CHECK_EQ(rooms_out, 0);
    return 0;
}
