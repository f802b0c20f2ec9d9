/* handover.c: a second core goes on where the first one has stopped, in one process instead of across an exec. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <sys/stat.h>

#include "ledger.h"
#include "rig.h"
#include "spill.h"

enum { SLOTS = 3 };
static rig_process processes[SLOTS];
static sc_slot *slots[SLOTS];
static const char *const names[SLOTS] = {"", "a", "b"};
static char ledger_path[64];

/* An init and two execs. */
static void begin(void)
{
    for (int i = 0; i < SLOTS; i++) {
        if (i == 0)
            CHECK_EQ(sc_slot_open_init(core, "c", (const uint8_t *)"\x0a\x01"
                                                                   "c", 3, &slots[i]), 0);
        else {
            CHECK_EQ(sc_slot_reserve(core, "c", names[i], NULL, 0, &slots[i]), 0);
            CHECK_EQ(sc_slot_open(slots[i]), 0);
        }
        CHECK(sc_core_busy(core) != NULL);
        processes[i] = rig_orphan();
        CHECK_EQ(sc_slot_bind(slots[i], processes[i].pid), 0);
        CHECK_EQ(sc_slot_announce(slots[i], rig_make_event(i ? "/tasks/exec-started" : "/tasks/create", "c", names[i])), 0);
        CHECK_EQ(sc_slot_set_status(slots[i], SC_RUNNING), 0);
    }
    snprintf(ledger_path, sizeof ledger_path, "/tmp/sct-ledger-%d", (int)getpid());
    sc_ledger *l;
    CHECK_EQ(sc_ledger_open(ledger_path, &l), 0);
    CHECK_EQ(sc_slot_set_ledger(slots[0], l), 0);
    rig_wait(&peer, SLOTS - 1);
    CHECK_EQ(sc_core_drain(core, 10000000000LL), 1);
    CHECK(sc_core_busy(core) == NULL);
}

static void (*first_body)(void);

static void *first(void *arg)
{
    (void)arg;
    begin();
    first_body();
    rig_settle();
    sc_core_pause(core, true);
    return NULL;
}

/* first_half runs beside a core that is paused then; between, when no core runs; second_half beside the one that goes on. */
static void over(void (*first_half)(void), void (*between)(void), void (*second_half)(void))
{
    pthread_t t;
    sc_saved_slot saved[SLOTS];
    uint8_t state[SLOTS][64];
    rig_peer_init(&peer);
    rig_listen(&peer);
    core = sc_core_new("ns", peer.path);
    CHECK(core != NULL);
    CHECK_EQ(sc_core_signals(core, true), 0);
    first_body = first_half;
    CHECK(pthread_create(&t, NULL, first, NULL) == 0);
    CHECK_EQ(sc_core_run(core), 1);
    pthread_join(t, NULL);
    rig_take(0);
    while (sc_core_busy(core)) /* the ledger's thread may be at it still */
        usleep(1000);
    for (int i = 0; i < SLOTS; i++) {
        sc_slot_save(slots[i], &saved[i]);
        CHECK(saved[i].state_len <= sizeof state[i] && !saved[i].kill_procs);
        memcpy(state[i], saved[i].state, saved[i].state_len);
        saved[i].state = state[i];
        if (saved[i].ledger_fd >= 0)
            saved[i].ledger_fd = dup(saved[i].ledger_fd); /* the first core closes its own */
        sc_slot_unref(slots[i]);
    }
    sc_outbox *o = &core->outbox;
    CHECK(o->queue.count == 0 && o->flight.count == 0 && o->fd >= 0);
    int fd = dup(o->fd);
    uint32_t next = o->next_stream;
    sc_core_free(core);
    between();
    core = sc_core_new("ns", peer.path);
    CHECK(core != NULL);
    CHECK_EQ(sc_outbox_adopt_socket(core, fd, next, NULL, 0, NULL, 0), 0);
    CHECK_EQ(sc_slot_restore(core, "c", "a", &saved[1], &slots[1]), -ENOENT); /* init first */
    for (int i = 0; i < SLOTS; i++)
        CHECK_EQ(sc_slot_restore(core, "c", names[i], &saved[i], &slots[i]), 0);
    sc_slot *twice;
    CHECK_EQ(sc_slot_restore(core, "c", "", &saved[0], &twice), -EEXIST);
    for (int i = 0; i < SLOTS; i++)
        CHECK_EQ(sc_slot_resume(slots[i], &saved[i]), 0);
    CHECK_EQ(sc_core_signals(core, true), 0);
    CHECK(pthread_create(&t, NULL, rig_body, (void *)(uintptr_t)second_half) == 0);
    CHECK_EQ(sc_core_run(core), 0);
    pthread_join(t, NULL);
    rig_take(0);
    CHECK_EQ(core->stats.stolen, 0);
    CHECK_EQ(core->stats.reconnects, 0); /* the first one's connection has served */
    for (int i = 0; i < SLOTS; i++)
        sc_slot_unref(slots[i]);
    sc_core_free(core);
    core = NULL;
    rig_peer_free(&peer);
    unlink(ledger_path);
}

static void nothing(void)
{
}

static void told_in_this_order(const char *const *order, const int *status)
{
    for (int i = 0; i < SLOTS; i++) {
        rig_event e = rig_wait(&peer, (size_t)(SLOTS + i));
        CHECK_STR(e.topic, "/tasks/exit");
        CHECK_STR(e.exec, order[i]);
        CHECK_EQ(e.status, status[i]);
    }
    for (int i = 0; i < SLOTS; i++)
        CHECK_EQ(rig_phase(slots[i]), SC_TOLD);
}

static void they_end(void)
{
    rig_waiter w;
    rig_waiter_init(&w);
    CHECK_EQ(sc_slot_wait(core, "c", "", &w.w, 0), 0);
    sc_buf state = {0};
    CHECK_EQ(sc_slot_state(core, "c", "", &state), 0);
    CHECK(state.len > 3 && !memcmp(state.p, "\x0a\x01"
                                            "c", 3));
    sc_buf_free(&state);
    rig_end(&processes[2], 2);
    rig_wait(&peer, SLOTS);
    rig_end(&processes[0], 7); /* told last */
    rig_dead(processes[0].pid);
    rig_settle();
    CHECK_EQ(rig_phase(slots[0]), SC_EXITED);
    rig_end(&processes[1], 1);
    told_in_this_order((const char *const[]){"b", "a", ""}, (const int[]){2, 1, 7});
    CHECK_EQ(rig_fired(&w).status, 7);
    CHECK_EQ(w.times, 1);
}

static void who_lives_is_told_when_it_dies(void)
{
    over(nothing, nothing, they_end);
}

static void all_die(void)
{
    for (int i = 0; i < SLOTS; i++) {
        rig_end(&processes[i], (unsigned char)(10 + i));
        rig_dead(processes[i].pid);
    }
}

static void init_is_last(void)
{
    rig_event e = rig_wait(&peer, 2 * SLOTS - 1);
    CHECK_STR(e.exec, "");
    CHECK_EQ(e.status, 10);
    int sum = 0;
    for (size_t i = SLOTS; i < 2 * SLOTS - 1; i++)
        sum += rig_wait(&peer, i).status;
    CHECK_EQ(sum, 11 + 12);
}

static void who_died_meanwhile_is_told(void)
{
    over(nothing, all_die, init_is_last);
}

static void init_ends(void)
{
    rig_end(&processes[0], 7);
    rig_dead(processes[0].pid);
    rig_settle();
    CHECK_EQ(rig_phase(slots[0]), SC_EXITED); /* it waits for its execs */
}

static void the_execs_end(void)
{
    CHECK_EQ(rig_phase(slots[0]), SC_EXITED);
    rig_end(&processes[1], 1);
    rig_wait(&peer, SLOTS);
    rig_end(&processes[2], 2);
    told_in_this_order((const char *const[]){"a", "b", ""}, (const int[]){1, 2, 7});
    sc_slot *s = sc_slot_find(core, "c", "");
    sc_ledger *l = s->ledger;
    struct stat st;
    CHECK(l && fstat(l->fd, &st) == 0 && l->at > 0);
    int64_t before = l->at;
    sc_slot_unref(s);
    sc_ledger *again; /* what it has on it is what a reader finds */
    CHECK_EQ(sc_ledger_open(ledger_path, &again), 0);
    CHECK_EQ(again->at, before);
    sc_ledger_unref(again);
}

static void an_exit_that_waits_for_others_goes_on_waiting(void)
{
    over(init_ends, nothing, the_execs_end);
}

static void what_makes_no_sense_is_refused(void)
{
    core = sc_core_new("ns", "");
    sc_slot *s;
    for (int phase = 0; phase < 9; phase++) {
        sc_saved_slot v = {.phase = phase, .ledger_fd = -1, .oom_fd = -1};
        bool good = phase == SC_RESERVED || phase == SC_EXITED || phase == SC_TOLD || phase == SC_DROPPED;
        CHECK_EQ(sc_slot_restore(core, phase == SC_TOLD ? "t" : phase == SC_EXITED ? "e" : phase == SC_DROPPED ? "d" : "r", "", &v, &s),
                 good ? 0 : -EINVAL);
        if (good)
            sc_slot_unref(s);
    }
    sc_core_free(core);
    core = NULL;
}

/* The order of events, and what was in flight. */
static void events_are_taken_over_in_order(void)
{
    rig_peer_init(&peer);
    core = sc_core_new("ns", peer.path);
    sc_event *e[3];
    for (int i = 0; i < 3; i++) {
        char id[2] = {(char)('a' + i), 0};
        e[i] = rig_make_event("/tasks/create", id, "");
        e[i]->stream = (uint32_t)(2 * i + 1);
    }
    CHECK_EQ(sc_outbox_adopt(core, false, e[1], e[1]->body, e[1]->len), 0);
    CHECK_EQ(sc_outbox_adopt(core, true, e[0], e[0]->body, e[0]->len), 0);
    CHECK_EQ(sc_outbox_adopt(core, false, e[2], e[2]->body, e[2]->len), 0);
    sc_outbox *o = &core->outbox;
    CHECK(o->flight.count == 1 && o->queue.count == 2 && !sc_outbox_empty(core));
    CHECK(o->flight.head->key_id == e[0]->key_id && o->flight.head->stream == 1);
    CHECK(o->queue.head->key_id == e[1]->key_id && o->queue.head->next->key_id == e[2]->key_id);
    for (int i = 0; i < 3; i++)
        free(e[i]);
    char path[64];
    snprintf(path, sizeof path, "/tmp/sct-spill-%d", (int)getpid());
    CHECK(sc_spill_adopt(o->spill, path, -1, 0, 0, 0, 1 << 20));
    CHECK_STR(o->spill->path, path);
    CHECK(!sc_spill_adopt(o->spill, "nowhere", -1, 0, 0, 0, 0));
    sc_core_free(core);
    core = NULL;
    rig_peer_free(&peer);
}

int main(void)
{
    CHECK_EQ(sc_set_subreaper(true), 0);
    RUN(who_lives_is_told_when_it_dies);
    RUN(who_died_meanwhile_is_told);
    RUN(an_exit_that_waits_for_others_goes_on_waiting);
    RUN(what_makes_no_sense_is_refused);
    RUN(events_are_taken_over_in_order);
    return 0;
}
