/* outbox.c: order, and what happens when containerd goes, is mute, or answers in another order. */
#define _GNU_SOURCE
#include "rig.h"

static void publish(const char *topic, const char *id, const char *exec)
{
    sc_event *e = rig_make_event(topic, id, exec);
    CHECK(e != NULL);
    sc_lock(core);
    sc_outbox_push(core, e);
    sc_unlock(core);
    sc_core_wake(core);
}

static void answer(size_t i, int32_t code)
{
    rig_event e = rig_wait(&peer, i);
    pthread_mutex_lock(&peer.lock);
    rig_answer(&peer, e.stream, code);
    pthread_mutex_unlock(&peer.lock);
}

static void set_ack(bool on)
{
    pthread_mutex_lock(&peer.lock);
    peer.ack = on;
    pthread_mutex_unlock(&peer.lock);
}

static void topic_is(size_t i, const char *topic)
{
    CHECK_STR(rig_wait(&peer, i).topic, topic);
}

static void drained(void)
{
    CHECK_EQ(sc_core_drain(core, 60000000000LL), 1);
}

static void queued(size_t queue, size_t flight)
{
    rig_settle();
    sc_lock(core);
    size_t q = core->outbox.queue.count, f = core->outbox.flight.count;
    sc_unlock(core);
    CHECK_EQ(q, queue);
    CHECK_EQ(f, flight);
}

/* Every bound of time in the outbox is far too long for a test: have this timer fire now. */
static void fire(sc_timer *t)
{
    sc_lock(core);
    sc_timer_set(core, t, sc_now_mono());
    sc_unlock(core);
    rig_settle();
}

static void in_order(void)
{
    char topic[32];
    for (int i = 0; i < 1000; i++) {
        snprintf(topic, sizeof topic, "/%d", i);
        publish(topic, i % 3 ? "a" : "b", i % 5 ? "" : "x");
    }
    for (int i = 0; i < 1000; i++) {
        snprintf(topic, sizeof topic, "/%d", i);
        topic_is((size_t)i, topic);
    }
    drained();
    CHECK_EQ(rig_stats().acked, 1000);
    CHECK_EQ(rig_stats().reconnects, 1);
    for (size_t i = 0; i < 1000; i++)
        CHECK_EQ(rig_wait(&peer, i).stream, 2 * i + 1); /* odd, and rising */
}

/* containerd handles requests side by side: what depends on another event waits for that one's answer. */
static void what_depends_waits(void)
{
    set_ack(false);
    publish("/a-create", "a", "");
    publish("/a-start", "a", "");
    publish("/b-create", "b", "");
    rig_wait(&peer, 0);
    queued(2, 1); /* b's would overtake on the wire, which is in the order of queueing */
    answer(0, 0);
    topic_is(1, "/a-start");
    topic_is(2, "/b-create");
    publish("/a-x", "a", "x");
    queued(1, 2);
    answer(1, 0);
    topic_is(3, "/a-x");
    publish("/a-y", "a", "y"); /* execs do not depend on each other */
    topic_is(4, "/a-y");
    publish("/a-x2", "a", "x");
    queued(1, 3);
    publish("/a-exit", "a", ""); /* the container waits for both */
    answer(4, 0); /* out of order */
    queued(2, 2);
    answer(3, 0);
    topic_is(5, "/a-x2");
    queued(1, 2);
    answer(5, 0);
    topic_is(6, "/a-exit");
    answer(6, 0);
    answer(2, 0);
    drained();
    CHECK_EQ(rig_stats().acked, 7);
}

static void acknowledged_out_of_order(void)
{
    char id[16];
    set_ack(false);
    for (int i = 0; i < 100; i++) {
        snprintf(id, sizeof id, "c%d", i);
        publish("/t", id, "");
    }
    rig_wait(&peer, 99);
    for (size_t i = 100; i-- > 0;)
        answer(i, 0);
    drained();
    answer(5, 0); /* once more: nobody waits for it */
    pthread_mutex_lock(&peer.lock);
    rig_answer(&peer, 77777, 0);
    pthread_mutex_unlock(&peer.lock);
    set_ack(true);
    publish("/last", "c", "");
    topic_is(100, "/last");
    drained();
    CHECK_EQ(rig_stats().acked, 101);
}

static void the_window_is_bounded(void)
{
    char id[16];
    set_ack(false);
    for (int i = 0; i < 200; i++) {
        snprintf(id, sizeof id, "c%d", i);
        publish("/t", id, "");
    }
    rig_wait(&peer, 127);
    queued(72, 128);
    set_ack(true);
    for (size_t i = 0; i < 128; i++)
        answer(i, 0);
    rig_wait(&peer, 199);
    drained();
}

static void waits_for_containerd(void)
{
    rig_down(&peer);
    publish("/1", "a", "");
    publish("/2", "a", "");
    queued(2, 0);
    CHECK_EQ(sc_core_drain(core, 1000000), 0);
    rig_listen(&peer);
    topic_is(0, "/1");
    topic_is(1, "/2");
    drained();
}

/* containerd restarts with events unanswered: they come again, byte for byte, in their order, before what is newer. */
static void what_is_unacknowledged_comes_again(void)
{
    publish("/0", "a", "");
    topic_is(0, "/0");
    drained();
    set_ack(false);
    publish("/1", "a", "");
    publish("/2", "b", "");
    publish("/3", "c", "");
    rig_wait(&peer, 1);
    rig_wait(&peer, 2);
    rig_wait(&peer, 3);
    answer(2, 0);
    publish("/1b", "a", "");
    queued(1, 2);
    rig_down(&peer);
    publish("/4", "d", "");
    set_ack(true);
    rig_listen(&peer);
    topic_is(4, "/1");
    topic_is(5, "/3");
    topic_is(6, "/1b"); /* what had not gone out yet stands behind them */
    topic_is(7, "/4");
    drained();
    CHECK_EQ(rig_stats().acked, 6);
    CHECK_EQ(rig_stats().reconnects, 2);
    static const size_t pairs[][2] = {{1, 4}, {3, 5}};
    for (int i = 0; i < 2; i++) {
        rig_event first = rig_wait(&peer, pairs[i][0]), second = rig_wait(&peer, pairs[i][1]);
        CHECK_EQ(first.len, second.len);
        CHECK(!memcmp(first.raw, second.raw, first.len));
        CHECK_EQ(first.conn + 1, second.conn);
    }
    CHECK_EQ(rig_wait(&peer, 4).stream, 1); /* a new connection counts from the start */
}

/* A peer that reads and never answers blocks nothing, and is left for another connection in the end. */
static void a_mute_peer(void)
{
    set_ack(false);
    publish("/1", "a", "");
    topic_is(0, "/1");
    rig_process p = rig_fork();
    sc_slot *s;
    rig_waiter w;
    CHECK_EQ(sc_slot_open_init(core, "c", NULL, 0, &s), 0);
    CHECK_EQ(sc_slot_bind(s, p.pid), 0);
    CHECK_EQ(sc_slot_announce(s, NULL), 0);
    rig_waiter_init(&w);
    CHECK_EQ(sc_slot_wait(core, "c", "", &w.w, 0), 0);
    rig_end(&p, 3);
    CHECK_EQ(rig_fired(&w).status, 3);
    CHECK_EQ(sc_slot_forget(s), 0);
    sc_slot_unref(s);
    topic_is(1, "/tasks/exit");
    queued(0, 2);
    sc_lock(core);
    CHECK(core->outbox.mute.at != 0);
    sc_unlock(core);
    set_ack(true);
    fire(&core->outbox.mute);
    topic_is(2, "/1");
    topic_is(3, "/tasks/exit");
    drained();
    sc_lock(core);
    CHECK_EQ(core->outbox.mute.at, 0);
    sc_unlock(core);
}

/* A peer that does not even read: the socket fills, the rest is queued, and goes out when it reads again. */
static void a_deaf_peer(void)
{
    static char id[40000];
    publish("/first", "a", "");
    topic_is(0, "/first");
    drained();
    pthread_mutex_lock(&peer.lock);
    peer.deaf = true;
    pthread_mutex_unlock(&peer.lock);
    rig_kick(&peer, 'x');
    memset(id, 'x', sizeof id - 1);
    for (int i = 0; i < 300; i++) {
        id[0] = (char)('A' + i % 26); /* containers that do not depend on each other, mostly */
        id[1] = (char)('A' + i / 26);
        publish("/large", id, "");
    }
    rig_settle();
    sc_lock(core);
    CHECK(core->outbox.out.len > 0);
    CHECK(core->outbox.armed_out);
    sc_unlock(core);
    pthread_mutex_lock(&peer.lock);
    peer.deaf = false;
    pthread_mutex_unlock(&peer.lock);
    rig_kick(&peer, 'x');
    drained();
    CHECK_EQ(rig_count(&peer), 301);
    CHECK_EQ(rig_stats().acked, 301);
    CHECK_EQ(rig_stats().reconnects, 1);
    sc_lock(core);
    CHECK(!core->outbox.armed_out);
    sc_unlock(core);
}

/* An event that containerd refuses is tried again, at its place; for a reason that won't pass not for ever. */
static void refused(void)
{
    set_ack(false);
    publish("/bad", "a", "");
    publish("/next", "a", "");
    for (size_t i = 0; i < 5; i++) {
        topic_is(i, "/bad");
        if (i == 3) { /* half a minute later: it is nobody's fault that containerd is busy */
            sc_lock(core);
            core->outbox.flight.head->refused_since -= 31000000000LL;
            sc_unlock(core);
        }
        answer(i, i == 3 ? SC_UNAVAILABLE : SC_UNKNOWN);
    }
    topic_is(5, "/next");
    answer(5, 0);
    drained();
    CHECK_EQ(rig_stats().rejected, 1);
    CHECK_EQ(rig_stats().acked, 1);
}

/* What a confused peer sends costs it the connection at most. */
static void garbage_for_an_answer(void)
{
    set_ack(false);
    publish("/1", "a", "");
    rig_wait(&peer, 0);
    pthread_mutex_lock(&peer.lock);
    CHECK_EQ(send(peer.fd, "\xff\xff\xff\xff\0\0\0\1\2\0", 10, MSG_NOSIGNAL), 10);
    peer.ack = true;
    pthread_mutex_unlock(&peer.lock);
    topic_is(1, "/1");
    drained();
    CHECK_EQ(rig_stats().reconnects, 2);
}

static void an_answer_a_byte_at_a_time(void)
{
    set_ack(false);
    publish("/1", "a", "");
    rig_event e = rig_wait(&peer, 0);
    uint8_t head[SC_RESPONSE_HEAD];
    size_t n = sc_response_head(head, e.stream, 0, NULL, 0, 3);
    memcpy(head + n, "abc", 3);
    for (size_t i = 0; i < n + 3; i++) {
        CHECK_EQ(send(peer.fd, head + i, 1, MSG_NOSIGNAL), 1);
        rig_settle();
    }
    drained();
}

/* Stream ids end at 2^32 - 1: what comes next takes another connection. */
static void stream_ids_run_out(void)
{
    publish("/0", "a", "");
    topic_is(0, "/0");
    drained();
    sc_lock(core);
    core->outbox.next_stream = 4294967293U;
    sc_unlock(core);
    publish("/1", "a", "");
    publish("/2", "b", "");
    publish("/3", "c", "");
    drained();
    /* Those that had gone out on the first connection unanswered come again on the second: count distinct topics. */
    bool seen[4] = {false};
    size_t n = rig_count(&peer);
    for (size_t i = 0; i < n; i++) {
        rig_event e = rig_wait(&peer, i);
        seen[e.topic[1] - '0'] = true;
        CHECK(e.stream % 2 == 1);
    }
    CHECK(seen[0] && seen[1] && seen[2] && seen[3]);
}

static void nobody_to_tell(void)
{
    sc_core *lone = sc_core_new("ns", "");
    sc_core *was = core;
    core = lone;
    sc_event *e = rig_make_event("/1", "a", "");
    sc_lock(lone);
    sc_outbox_push(lone, e);
    CHECK_EQ(lone->stats.unsent, 1);
    sc_unlock(lone);
    CHECK_EQ(sc_core_drain(lone, 0), 1);
    core = was;
    sc_core_free(lone);
}

static void too_large(void)
{
    uint8_t *p = calloc(1, SC_MAX_MESSAGE);
    sc_slice t = {(const uint8_t *)"t", 1};
    CHECK(sc_event_new(core, t, t, (sc_slice){p, SC_MAX_MESSAGE}, "a", "") == NULL);
    sc_event *e = sc_event_new(core, t, t, (sc_slice){p, SC_MAX_MESSAGE - 200}, "a", "");
    CHECK(e != NULL);
    free(e);
    free(p);
}

#define LED(body) \
    static void run_##body(void) { with_leader(body); }
#define BODIES(X)                                                                                                \
    X(in_order) X(what_depends_waits) X(acknowledged_out_of_order) X(the_window_is_bounded) X(waits_for_containerd) \
    X(what_is_unacknowledged_comes_again) X(a_mute_peer) X(a_deaf_peer) X(refused) X(garbage_for_an_answer)      \
    X(an_answer_a_byte_at_a_time) X(stream_ids_run_out) X(nobody_to_tell) X(too_large)
BODIES(LED)

int main(void)
{
#define GO(body) RUN(run_##body);
    BODIES(GO)
    return 0;
}
