/* past.c: the last events, as they were queued, for whoever asks. */
#define _GNU_SOURCE
#include "rig.h"

static sc_core *lone(void)
{
    sc_core *c = sc_core_new("ns", "");
    CHECK(c != NULL);
    return c;
}

static void publish(sc_core *c, const char *topic)
{
    sc_core *was = core;
    core = c;
    sc_event *e = rig_make_event(topic, "a", "");
    core = was;
    sc_lock(c);
    sc_outbox_push(c, e);
    sc_unlock(c);
}

/* Whether the event of this number is there and holds this text. */
static bool holds(sc_core *c, uint64_t number, const char *text)
{
    sc_buf b = {0};
    bool there = sc_past_get(c, number, &b) && memmem(b.p, b.len, text, strlen(text)) != NULL;
    sc_buf_free(&b);
    return there;
}

static void numbered_in_order(void)
{
    sc_core *c = lone();
    CHECK(!holds(c, 0, ""));
    CHECK(!holds(c, 1, ""));
    CHECK_EQ(sc_past_wait(c, 0, 0), 0);
    publish(c, "/one");
    publish(c, "/two");
    CHECK_EQ(sc_past_wait(c, 0, 0), 2);
    CHECK(holds(c, 1, "/one") && holds(c, 2, "/two") && !holds(c, 2, "/one"));
    CHECK(!holds(c, 3, ""));
    sc_core_free(c);
}

static void the_oldest_go(void)
{
    sc_core *c = lone();
    char topic[32];
    for (int i = 1; i <= 3 * SC_PAST + 5; i++) {
        snprintf(topic, sizeof topic, "/%d.", i);
        publish(c, topic);
    }
    uint64_t last = 3 * SC_PAST + 5, first = last - SC_PAST + 1;
    CHECK_EQ(sc_past_wait(c, 0, 0), last);
    for (uint64_t i = first; i <= last; i++) {
        snprintf(topic, sizeof topic, "/%d.", (int)i);
        CHECK(holds(c, i, topic));
    }
    CHECK(!holds(c, first - 1, ""));
    sc_core_free(c);
}

static void too_long_keeps_its_number(void)
{
    sc_core *c = lone();
    static uint8_t big[9000];
    sc_slice t = {(const uint8_t *)"/big", 4};
    publish(c, "/one");
    sc_event *e = sc_event_new(c, t, t, (sc_slice){big, sizeof big}, "a", "");
    sc_lock(c);
    sc_outbox_push(c, e);
    sc_unlock(c);
    publish(c, "/three");
    CHECK(holds(c, 1, "/one") && !holds(c, 2, "") && holds(c, 3, "/three"));
    sc_core_free(c);
}

static void *later(void *arg)
{
    publish(arg, "/late");
    return NULL;
}

static void waits_for_the_next(void)
{
    sc_core *c = lone();
    pthread_t t;
    CHECK_EQ(pthread_create(&t, NULL, later, c), 0);
    CHECK_EQ(sc_past_wait(c, 0, 60000000000LL), 1);
    pthread_join(t, NULL);
    sc_past_end(c);
    CHECK_EQ(sc_past_wait(c, 1, 60000000000LL), 1); /* at once: a hang is the failure */
    sc_core_free(c);
}

int main(void)
{
    RUN(numbered_in_order);
    RUN(the_oldest_go);
    RUN(too_long_keeps_its_number);
    RUN(waits_for_the_next);
    return 0;
}
