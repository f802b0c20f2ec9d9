/* standin.c: what is answered, and what is kept, while the RPC thread is away in Python. */
#define _GNU_SOURCE
#include "serverrig.h"

static sc_slot *container(const char *id)
{
    sc_slot *s;
    CHECK_EQ(sc_slot_open_init(core, id, NULL, 0, &s), 0);
    return s;
}

static void gone(sc_slot *s)
{
    CHECK_EQ(sc_slot_drop(s), 0);
    CHECK_EQ(sc_slot_forget(s), 0);
    sc_slot_unref(s);
}

static void c_answers_go_on(void)
{
    sc_slot *s = container("c");
    int busy = dial(), old = dial();
    echoes(old, 1);
    srv_away(busy, 1);
    for (uint32_t i = 0; i < 100; i++) {
        ask(old, 3 + 2 * i, "t.Task", "Connect", "\x0a\x01" "c");
        expect(old, 3 + 2 * i, 0, "", NULL);
    }
    int new = dial(); /* accepted, too */
    ask(new, 1, "t.Task", "State", "\x0a\x01" "x");
    expect(new, 1, SC_NOT_FOUND, "container x not found", "");
    ask(new, 2, "t.Test", "Echo", "");
    expect(new, 2, SC_INVALID_ARGUMENT, "StreamID must be odd for client initiated streams", "");
    ask(new, 3, "no.Such", "Echo", "");
    expect(new, 3, SC_UNIMPLEMENTED, "service no.Such", "");
    expect(busy, 1, 0, "", "held"); /* answered before it went away, if in a batch */
    close(new);
    srv_go();
    echoes(old, 1001);
    gone(s);
    close(busy);
    close(old);
}

/* Calls for Python come to it in their order, with their bytes, wherever those were read. */
static void calls_are_kept(void)
{
    int busy = dial(), fd = dial();
    sc_buf b = {0};
    char text[40];
    srv_away(busy, 1);
    for (uint32_t i = 0; i < 500; i++) {
        snprintf(text, sizeof text, "number %u", i);
        request_to(&b, 1 + 2 * i, "t.Test", "Echo", word(text));
    }
    say(fd, b.p, b.len);
    ask(fd, 1001, "t.Task", "Connect", "");
    expect(fd, 1001, 0, "", NULL); /* it overtakes: all before it has been read */
    srv_go();
    for (uint32_t i = 0; i < 500; i++) {
        snprintf(text, sizeof text, "number %u", i);
        expect(fd, 1 + 2 * i, 0, "", text);
    }
    sc_buf_free(&b);
    close(busy);
    close(fd);
}

/* One who asks about what a kept call may be about to make waits for that, and is told of it. */
static void no_answer_about_what_is_to_come(void)
{
    int busy = dial(), fd = dial(), other = dial();
    srv_away(busy, 1);
    ask(other, 1, "t.Task", "State", "\x0a\x01" "x");
    expect(other, 1, SC_NOT_FOUND, "container x not found", ""); /* nothing is kept */
    ask(fd, 1, "t.Test", "Echo", "create x");
    ask(fd, 3, "t.Task", "State", "\x0a\x01" "x");
    ask(fd, 5, "t.Task", "Wait", "\x0a\x01" "x");
    ask(fd, 7, "t.Task", "State", "\x0a\x01" "y");
    ask(fd, 9, "t.Task", "Connect", "\x0a\x01" "x");
    expect(fd, 9, 0, "", NULL); /* all before it has been read */
    sc_slot *s = container("x"); /* as the Create would */
    ask(fd, 11, "t.Task", "State", "\x0a\x01" "x");
    expect(fd, 11, 0, "", NULL); /* it is there now */
    srv_go();
    bool seen[8] = {false};
    for (int i = 0; i < 3; i++) { /* what C answers may leave before what a handler does */
        reply r;
        CHECK(reply_of(fd, &r));
        CHECK(r.stream < 8 && !seen[r.stream]);
        seen[r.stream] = true;
        CHECK_EQ(r.code, r.stream == 7 ? SC_NOT_FOUND : 0);
        CHECK(r.stream == 1 || r.stream == 3 || r.stream == 7);
        free(r.raw);
    }
    int fds = count_fds();
    srv_away(busy, 3);
    int leaver = dial();
    ask(leaver, 1, "t.Test", "Echo", "create z");
    ask(leaver, 3, "t.Task", "Wait", "\x0a\x01" "z");
    ask(leaver, 5, "t.Task", "Connect", "");
    expect(leaver, 5, 0, "", NULL);
    sc_slot *z = container("z");
    close(leaver);
    ask(other, 3, "t.Task", "Connect", ""); /* its end has been seen when this is answered, or soon after */
    expect(other, 3, 0, "", NULL);
    expect(busy, 1, 0, "", "held");
    srv_go();
    expect(busy, 3, 0, "", "held");
    fds_are(fds); /* its Wait keeps nothing open */
    gone(z);
    gone(s); /* answers the Wait, with no exit */
    reply r;
    CHECK(reply_of(fd, &r));
    CHECK_EQ(r.stream, 5);
    free(r.raw);
    close(busy);
    close(fd);
    close(other);
}

static void fill(uint8_t *p, size_t n, unsigned seed)
{
    for (size_t i = 0; i < n; i++)
        p[i] = (uint8_t)((i * 2654435761u + seed) >> 16);
}

static void big_is(int fd, uint32_t stream, const uint8_t *p, size_t n)
{
    reply r;
    CHECK(reply_of(fd, &r));
    CHECK_EQ(r.stream, stream);
    CHECK_EQ(r.payload.n, n);
    CHECK(!memcmp(r.payload.p, p, n));
    free(r.raw);
}

/* Frames that began with one thread and end with the other, in both directions, and bytes in the RPC thread's hands. */
static void frames_across_the_change(void)
{
    enum { N = 600000 };
    int busy = dial(), fd = dial();
    uint8_t *one = malloc(N), *two = malloc(N);
    fill(one, N, 1);
    fill(two, N, 2);
    sc_buf b = {0};
    request_to(&b, 1, "t.Test", "Echo", (sc_slice){one, N});
    request_to(&b, 3, "t.Test", "Echo", (sc_slice){two, N});
    request_to(&b, 5, "t.Test", "Hold", word(""));
    request_to(&b, 7, "t.Test", "Echo", (sc_slice){one, N});
    say(fd, b.p, 100000);
    echoes(busy, 1);
    srv_away(busy, 3);
    say(fd, b.p + 100000, 900000); /* the first is whole, the second is not */
    ask(busy, 5, "t.Task", "Connect", "");
    expect(busy, 3, 0, "", "held");
    expect(busy, 5, 0, "", NULL);
    srv_go();
    big_is(fd, 1, one, N);
    say(fd, b.p + 1000000, b.len - 1000000 - 200000);
    big_is(fd, 3, two, N); /* while it is away in the Hold behind it, with bytes of this connection lent */
    expect(fd, 5, 0, "", "held");
    say(fd, b.p + b.len - 200000, 200000);
    ask(fd, 9, "t.Task", "Connect", "");
    expect(fd, 9, 0, "", NULL);
    srv_go();
    big_is(fd, 7, one, N);
    echoes(fd, 11);
    sc_buf_free(&b);
    free(one);
    free(two);
    close(busy);
    close(fd);
}

/* Beyond a bound it reads no more, and nothing is lost. */
static void what_is_kept_is_bounded(void)
{
    enum { N = 1 << 20, CALLS = 40 };
    int busy = dial(), fd = dial();
    uint8_t *p = malloc(N);
    fill(p, N, 3);
    srv_away(busy, 1);
    sc_buf b = {0};
    size_t sent = 0;
    for (uint32_t i = 0; i < CALLS; i++)
        request_to(&b, 1 + 2 * i, "t.Test", "Park", (sc_slice){p, N});
    for (int quiet = 0; quiet < 200;) { /* ms in which nothing was taken */
        ssize_t n = send(fd, b.p + sent, b.len - sent, MSG_NOSIGNAL | MSG_DONTWAIT);
        quiet = n > 0 ? 0 : quiet + 1;
        sent += n > 0 ? (size_t)n : 0;
        if (n <= 0)
            usleep(1000);
    }
    CHECK(sent < (16 << 20));
    srv_go();
    say(fd, b.p + sent, b.len - sent);
    for (uint32_t i = 0; i < CALLS; i++) {
        sc_call *k = srv_parked();
        sc_call_reply(k, 0, NULL, 0, "ok", 2, false);
        sc_call_unref(k);
    }
    for (uint32_t i = 0; i < CALLS; i++) {
        reply r;
        CHECK(reply_of(fd, &r));
        CHECK(sc_slice_is(r.payload, "ok"));
        free(r.raw);
    }
    sc_buf_free(&b);
    free(p);
    close(busy);
    close(fd);
}

static void connections_end_meanwhile(void)
{
    sc_slot *s = container("c");
    int busy = dial();
    echoes(busy, 1);
    int fds = count_fds();
    srv_away(busy, 3);
    for (int i = 0; i < 50; i++) {
        int fd = dial();
        ask(fd, 1, "t.Task", "Wait", "\x0a\x01" "c");
        ask(fd, 3, "t.Test", "Echo", "for nobody");
        ask(fd, 5, "t.Task", "Connect", "");
        expect(fd, 5, 0, "", NULL);
        close(fd);
    }
    expect(busy, 3, 0, "", "held");
    srv_go();
    fds_are(fds);
    CHECK(s->waiters == NULL);
    gone(s);
    close(busy);
}

/* A note is for Python; it makes the stand-in neither spin nor forget it. */
static void notes_wait(void)
{
    int busy = dial();
    echoes(busy, 1);
    srv_away(busy, 3);
    sc_post(core, SC_NOTE_POST, NULL, 1, 0, 0);
    ask(busy, 5, "t.Task", "Connect", "");
    expect(busy, 3, 0, "", "held");
    expect(busy, 5, 0, "", NULL);
    struct timespec a, b;
    clockid_t clock;
    CHECK_EQ(pthread_getcpuclockid(srv->standin.thread, &clock), 0);
    clock_gettime(clock, &a);
    usleep(100000);
    clock_gettime(clock, &b);
    CHECK((b.tv_sec - a.tv_sec) * 1000000000L + b.tv_nsec - a.tv_nsec < 50000000L);
    srv_go();
    echoes(busy, 7);
    while (1) { /* srv_loop takes it */
        pthread_mutex_lock(&core->mail_lock);
        bool none = !core->mail;
        pthread_mutex_unlock(&core->mail_lock);
        if (none)
            break;
        sched_yield();
    }
    close(busy);
}

static void many_changes(void)
{
    int busy = dial(), fd = dial();
    unsigned acted = atomic_load(&srv->standin.acted);
    for (uint32_t i = 0; i < 50; i++) {
        srv_away(busy, 1 + 2 * i);
        ask(fd, 1 + 4 * i, "t.Test", "Echo", "later");
        if (i % 2) {
            ask(fd, 3 + 4 * i, "t.Task", "Connect", "");
            expect(fd, 3 + 4 * i, 0, "", NULL);
        }
        srv_go();
        expect(fd, 1 + 4 * i, 0, "", "later");
        expect(busy, 1 + 2 * i, 0, "", "held");
    }
    CHECK(atomic_load(&srv->standin.acted) >= acted + 25);
    close(busy);
    close(fd);
}

static void stopped_meanwhile(void)
{
    int busy = dial(), fd = dial();
    srv_away(busy, 1);
    ask(fd, 1, "t.Test", "Echo", "never answered as asked");
    ask(fd, 3, "t.Task", "Connect", "");
    expect(fd, 3, 0, "", NULL);
    sc_server_drain(srv);
    ask(fd, 5, "t.Test", "Echo", "");
    expect(fd, 5, SC_UNAVAILABLE, "server is shutting down", "");
    sc_server_stop(srv);
    srv_go();
    expect(fd, 1, 0, "", "never answered as asked");
    hung_up(fd);
    close(busy);
}

#define LED(body) \
    static void run_##body(void) { serve(body); }
#define BODIES(X) \
    X(c_answers_go_on) X(no_answer_about_what_is_to_come) X(calls_are_kept) X(frames_across_the_change) X(what_is_kept_is_bounded) X(connections_end_meanwhile) \
    X(notes_wait) X(many_changes) X(stopped_meanwhile)
BODIES(LED)

int main(void)
{
#define GO(body) RUN(run_##body);
    BODIES(GO)
    return 0;
}
