/* server.c and conn.c: what a client may send, rightly or not, and what it is answered (texts as Go has them). */
#define _GNU_SOURCE
#include "serverrig.h"

static void answers(void)
{
    int fd = dial();
    echoes(fd, 1);
    ask(fd, 3, "t.Test", "Echo", "");
    expect(fd, 3, 0, "", "");
    ask(fd, 5, "t.Test", "Fail", "");
    expect(fd, 5, SC_NOT_FOUND, "no ? such??? thing", "");
    ask(fd, 4294967295U, "t.Test", "Echo", "last");
    expect(fd, 4294967295U, 0, "", "last");
    close(fd);
}

static void unknown_names(void)
{
    int fd = dial();
    ask(fd, 1, "no.Such", "Echo", "");
    expect(fd, 1, SC_UNIMPLEMENTED, "service no.Such", "");
    ask(fd, 3, "t.Test", "Nope", "");
    expect(fd, 3, SC_UNIMPLEMENTED, "method Nope", "");
    ask(fd, 5, "t.Tes", "tEcho", ""); /* the same bytes, cut elsewhere */
    expect(fd, 5, SC_UNIMPLEMENTED, "service t.Tes", "");
    ask(fd, 7, "", "", "");
    expect(fd, 7, SC_UNIMPLEMENTED, "service ", "");
    ask(fd, 9, "../t.Test/..", "Echo", "");
    expect(fd, 9, SC_UNIMPLEMENTED, "service ../t.Test/..", "");
    frame_of(fd, 0, 11, SC_REQUEST, 0); /* an empty Request */
    expect(fd, 11, SC_UNIMPLEMENTED, "service ", "");
    sc_buf b = {0};
    uint8_t *name = malloc(4000000);
    memset(name, 'n', 4000000);
    CHECK(sc_request_frame(&b, 13, (sc_slice){name, 4000000}, word("m"), word(""), 0));
    say(fd, b.p, b.len);
    reply r;
    CHECK(reply_of(fd, &r));
    CHECK_EQ(r.code, SC_UNIMPLEMENTED);
    CHECK(r.message.n < 400); /* cut */
    free(r.raw);
    b.len = 0;
    CHECK(sc_request_frame(&b, 15, (sc_slice){(const uint8_t *)"t.Test\0x", 8}, word("Echo"), word(""), 0));
    say(fd, b.p, b.len);
    expect(fd, 15, SC_UNIMPLEMENTED, NULL, "");
    sc_buf_free(&b);
    free(name);
    echoes(fd, 17);
    close(fd);
}

static void stream_ids(void)
{
    int fd = dial();
    ask(fd, 2, "t.Test", "Echo", "");
    expect(fd, 2, SC_INVALID_ARGUMENT, "StreamID must be odd for client initiated streams", "");
    ask(fd, 0, "t.Test", "Echo", "");
    expect(fd, 0, SC_INVALID_ARGUMENT, "StreamID must be odd for client initiated streams", "");
    echoes(fd, 5);
    static const uint32_t used[] = {5, 3, 1};
    for (int i = 0; i < 3; i++) {
        ask(fd, used[i], "t.Test", "Echo", "");
        expect(fd, used[i], SC_INVALID_ARGUMENT, "StreamID cannot be re-used and must increment", "");
    }
    /* One that is being answered: the original is unharmed and has one answer. */
    ask(fd, 7, "t.Test", "Park", "");
    sc_call *k = srv_parked();
    ask(fd, 7, "t.Test", "Echo", "");
    expect(fd, 7, SC_INVALID_ARGUMENT, "StreamID cannot be re-used and must increment", "");
    sc_call_reply(k, 0, NULL, 0, "mine", 4, false);
    sc_call_reply(k, 0, NULL, 0, "again", 5, false);
    expect(fd, 7, 0, "", "mine");
    sc_call_unref(k);
    echoes(fd, 101); /* gaps are fine */
    close(fd);
}

static void data_and_other_types(void)
{
    int fd = dial();
    frame_of(fd, 0, 9, SC_DATA, SC_FLAG_REMOTE_CLOSED | SC_FLAG_NO_DATA);
    expect(fd, 9, SC_INVALID_ARGUMENT, "StreamID is no longer active", "");
    echoes(fd, 11);
    frame_of(fd, 3, 11, SC_DATA, 0);
    say(fd, "abc", 3);
    expect(fd, 11, SC_INVALID_ARGUMENT, "StreamID is no longer active", "");
    ask(fd, 13, "t.Test", "Park", "");
    sc_call *k = srv_parked();
    frame_of(fd, 3, 13, SC_DATA, 0); /* Go's server dies of this */
    say(fd, "abc", 3);
    for (int half_close = 0; half_close < 2; half_close++)
        frame_of(fd, 0, 13, SC_DATA, SC_FLAG_REMOTE_CLOSED | SC_FLAG_NO_DATA);
    static const uint8_t types[] = {0, 2, 4, 255};
    for (int i = 0; i < 4; i++) {
        frame_of(fd, 2, 15, types[i], 0);
        say(fd, "\xff\xff", 2);
    }
    echoes(fd, 17);
    sc_call_reply(k, 0, NULL, 0, "late", 4, false);
    expect(fd, 13, 0, "", "late");
    sc_call_unref(k);
    sc_buf b = {0};
    for (uint32_t flags = 0; flags < 256; flags++) {
        b.len = 0;
        request_to(&b, 19 + 2 * flags, "t.Test", "Echo", word("x"));
        b.p[9] = (uint8_t)flags;
        say(fd, b.p, b.len);
        expect(fd, 19 + 2 * flags, 0, "", "x");
    }
    sc_buf_free(&b);
    close(fd);
}

static void what_does_not_parse(void)
{
    static const char *bad[] = {"\x0a", "\x0a\x05x", "\x80", "\x0a\x01\xff", "\x34", "\x33"};
    int fd = dial();
    for (uint32_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        frame_of(fd, (uint32_t)strlen(bad[i]), 1 + 2 * i, SC_REQUEST, 1);
        say(fd, bad[i], strlen(bad[i]));
        expect(fd, 1 + 2 * i, SC_INVALID_ARGUMENT, NULL, "");
    }
    echoes(fd, 101);
    close(fd);
}

static void lengths(void)
{
    int fd = dial();
    frame_of(fd, SC_MAX_MESSAGE + 1, 1, SC_REQUEST, 1);
    expect(fd, 1, SC_RESOURCE_EXHAUSTED, "message length 4194305 exceed maximum message size of 4194304", "");
    uint8_t *p = calloc(1, SC_MAX_MESSAGE + 1);
    say(fd, p, SC_MAX_MESSAGE + 1); /* passed over */
    echoes(fd, 3);
    frame_of(fd, 0x00ffffff, 5, SC_REQUEST, 1);
    expect(fd, 5, SC_RESOURCE_EXHAUSTED, "message length 16777215 exceed maximum message size of 4194304", "");
    for (uint32_t left = 0x00ffffff; left; left -= left < SC_MAX_MESSAGE ? left : SC_MAX_MESSAGE)
        say(fd, p, left < SC_MAX_MESSAGE ? left : SC_MAX_MESSAGE);
    echoes(fd, 7);
    /* Exactly 4 MiB, the envelope included. The answer has less around it. */
    size_t around = sc_bytes_size(6) + sc_bytes_size(4);
    size_t n = SC_MAX_MESSAGE - around - 5;
    sc_buf b = {0};
    request_to(&b, 9, "t.Test", "Echo", (sc_slice){p, n});
    CHECK_EQ(b.len, SC_HEADER + SC_MAX_MESSAGE);
    say(fd, b.p, b.len);
    reply r;
    CHECK(reply_of(fd, &r));
    CHECK_EQ(r.code, 0);
    CHECK_EQ(r.payload.n, n);
    free(r.raw);
    sc_buf_free(&b);
    free(p);
    echoes(fd, 11);
    close(fd);
    fd = dial();
    echoes(fd, 1);
    frame_of(fd, 0xffffffff, 3, SC_REQUEST, 1); /* can't be honest */
    hung_up(fd);
    still_serves();
}

static void a_reply_that_is_too_long(void)
{
    int fd = dial();
    large_size = SC_MAX_MESSAGE;
    ask(fd, 1, "t.Test", "Large", "");
    expect(fd, 1, SC_RESOURCE_EXHAUSTED, "message length 4194309 exceed maximum message size of 4194304", "");
    large_size = SC_MAX_MESSAGE - 5;
    ask(fd, 3, "t.Test", "Large", "");
    reply r;
    CHECK(reply_of(fd, &r));
    CHECK_EQ(r.payload.n, large_size);
    free(r.raw);
    large_size = 1 << 20;
    echoes(fd, 5);
    close(fd);
}

static void a_byte_at_a_time(void)
{
    int fd = dial();
    sc_buf b = {0};
    for (uint32_t i = 0; i < 3; i++)
        request_to(&b, 1 + 2 * i, "t.Test", "Echo", word("drip"));
    for (size_t i = 0; i < b.len; i++)
        say(fd, b.p + i, 1);
    for (uint32_t i = 0; i < 3; i++)
        expect(fd, 1 + 2 * i, 0, "", "drip");
    sc_buf_free(&b);
    close(fd);
}

static void many_in_one_send(void)
{
    enum { N = 5000 };
    int fd = dial();
    sc_buf b = {0};
    char text[32];
    for (uint32_t i = 0; i < N; i++) {
        snprintf(text, sizeof text, "number %u", i);
        request_to(&b, 1 + 2 * i, "t.Test", "Echo", word(text));
    }
    /* In pieces of odd sizes, so that frames are cut at every place of theirs. */
    pid_t writer = fork();
    if (!writer) {
        for (size_t at = 0, piece = 1; at < b.len; piece = piece * 7 % 9973 + 1) {
            size_t n = b.len - at < piece ? b.len - at : piece;
            say(fd, b.p + at, n);
            at += n;
        }
        _exit(0);
    }
    for (uint32_t i = 0; i < N; i++) {
        snprintf(text, sizeof text, "number %u", i);
        expect(fd, 1 + 2 * i, 0, "", text);
    }
    CHECK_EQ(waitpid(writer, NULL, 0), writer);
    sc_buf_free(&b);
    close(fd);
}

static void random_sizes(void)
{
    int fd = dial();
    unsigned seed = 7;
    sc_buf b = {0};
    uint8_t *p = malloc(300000);
    for (size_t i = 0; i < 300000; i++)
        p[i] = (uint8_t)(i * 31 >> 4);
    for (uint32_t i = 0; i < 300; i++) {
        size_t n = (size_t)rand_r(&seed) % (i % 10 ? 3000 : 300000);
        b.len = 0;
        request_to(&b, 1 + 2 * i, "t.Test", "Echo", (sc_slice){p, n});
        say(fd, b.p, b.len);
        reply r;
        CHECK(reply_of(fd, &r));
        CHECK_EQ(r.payload.n, n);
        CHECK(!memcmp(r.payload.p, p, n));
        free(r.raw);
    }
    sc_buf_free(&b);
    free(p);
    close(fd);
}

/* ---- many threads ---- */

static void *answer_large(void *arg)
{
    sc_call *k = arg;
    uint8_t *p = malloc(65536);
    memset(p, (int)(k->stream & 0xff), 65536);
    sc_call_reply(k, 0, NULL, 0, p, 65536, false);
    sc_call_unref(k);
    free(p);
    return NULL;
}

static void frames_never_interleave(void)
{
    enum { N = 32 };
    int fd = dial();
    int small = 4096;
    setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
    for (uint32_t round = 0; round < 10; round++) {
        pthread_t t[N];
        for (uint32_t i = 0; i < N; i++)
            ask(fd, 1 + 2 * (round * N + i), "t.Test", "Park", "");
        sc_call *k[N];
        for (int i = 0; i < N; i++)
            k[i] = srv_parked();
        for (int i = 0; i < N; i++)
            CHECK(pthread_create(&t[i], NULL, answer_large, k[i]) == 0);
        for (int i = 0; i < N; i++) {
            reply r;
            CHECK(reply_of(fd, &r));
            CHECK_EQ(r.payload.n, 65536);
            for (size_t at = 0; at < r.payload.n; at++)
                CHECK(r.payload.p[at] == (uint8_t)r.stream);
            free(r.raw);
        }
        for (int i = 0; i < N; i++)
            pthread_join(t[i], NULL);
    }
    close(fd);
}

static void *churn(void *arg)
{
    unsigned seed = (unsigned)(uintptr_t)arg;
    for (int i = 0; i < 150; i++) {
        int fd = dial();
        uint8_t noise[200];
        switch (rand_r(&seed) % 5) {
        case 0: echoes(fd, 1); break;
        case 1:
            for (size_t k = 0; k < sizeof noise; k++)
                noise[k] = (uint8_t)rand_r(&seed);
            noise[0] = 0; /* else it is hung up at once */
            say(fd, noise, sizeof noise);
            break;
        case 2:
            ask(fd, 1, "t.Task", "Wait", "\x0a\x01" "w");
            break;
        case 3:
            ask(fd, 1, "t.Test", "Large", "");
            shutdown(fd, SHUT_WR);
            break;
        case 4:
            for (uint32_t k = 0; k < 50; k++)
                ask(fd, 1 + 2 * k, "t.Test", "Echo", "x");
            for (uint32_t k = 0; k < 50; k++)
                expect(fd, 1 + 2 * k, 0, "", "x");
            break;
        }
        close(fd);
    }
    return NULL;
}

static void everything_at_once(void)
{
    sc_slot *s;
    CHECK_EQ(sc_slot_open_init(core, "w", NULL, 0, &s), 0);
    int fds = count_fds();
    pthread_t t[8];
    for (uintptr_t i = 0; i < 8; i++)
        CHECK(pthread_create(&t[i], NULL, churn, (void *)(i + 1)) == 0);
    for (int i = 0; i < 8; i++)
        pthread_join(t[i], NULL);
    fds_are(fds);
    CHECK_EQ(sc_slot_drop(s), 0);
    CHECK_EQ(sc_slot_forget(s), 0);
    sc_slot_unref(s);
    CHECK_EQ(sc_server_inflight(srv), 0);
}

#define LED(body) \
    static void run_##body(void) { serve(body); }
#define BODIES(X) \
    X(answers) X(unknown_names) X(stream_ids) X(data_and_other_types) X(what_does_not_parse) X(lengths) \
    X(a_reply_that_is_too_long) X(a_byte_at_a_time) X(many_in_one_send) X(random_sizes) X(frames_never_interleave) \
    X(everything_at_once)
BODIES(LED)

int main(void)
{
#define GO(body) RUN(run_##body);
    BODIES(GO)
    return 0;
}
