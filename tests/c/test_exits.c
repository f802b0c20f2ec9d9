/* exits.c, children.c and the reactor: the rules that stand in exits.h, each with real processes. */
#define _GNU_SOURCE
#include <fcntl.h>

#include "rig.h"

static sc_slot *new_init(const char *id)
{
    sc_slot *s;
    CHECK_EQ(sc_slot_open_init(core, id, NULL, 0, &s), 0);
    return s;
}

static sc_slot *new_exec(const char *id, const char *exec)
{
    sc_slot *s;
    CHECK_EQ(sc_slot_reserve(core, id, exec, NULL, 0, &s), 0);
    CHECK_EQ(sc_slot_open(s), 0);
    return s;
}

/* Bound and announced. */
static sc_slot *running(const char *id, const char *exec, rig_process *p)
{
    sc_slot *s = *exec ? new_exec(id, exec) : new_init(id);
    *p = rig_orphan();
    CHECK_EQ(sc_slot_bind(s, p->pid), 0);
    CHECK_EQ(sc_slot_announce(s, rig_make_event(*exec ? "/tasks/exec-started" : "/tasks/create", id, exec)), 0);
    return s;
}

static void told(sc_slot *s)
{
    sc_note n = rig_note_wait(SC_NOTE_TOLD);
    CHECK(n.ptr == s);
    sc_slot_unref(s);
}

static void forget(sc_slot *s)
{
    CHECK_EQ(sc_slot_forget(s), 0);
    sc_slot_unref(s);
}

static void event_is(size_t i, const char *topic, const char *id, const char *exec, int status)
{
    rig_event e = rig_wait(&peer, i);
    CHECK_STR(e.topic, topic);
    CHECK_STR(e.id, id);
    if (!strcmp(topic, "/tasks/exit")) {
        CHECK_STR(e.exec, exec);
        CHECK_EQ(e.status, status);
    }
}

/* ---- the life of one process ---- */

static void one_life(void)
{
    rig_waiter w;
    rig_process p;
    int64_t before = sc_now_real();
    sc_slot *s = new_init("c");
    CHECK_EQ(rig_phase(s), SC_OPENED);
    p = rig_orphan();
    CHECK_EQ(sc_slot_bind(s, p.pid), 0);
    CHECK_EQ(rig_phase(s), SC_BOUND);
    CHECK_EQ(sc_slot_announce(s, rig_make_event("/tasks/create", "c", "")), 0);
    rig_waiter_init(&w);
    CHECK_EQ(sc_slot_wait(core, "c", "", &w.w, 0), 0);
    rig_end(&p, 42);
    sc_exit x = rig_fired(&w);
    CHECK_EQ(x.pid, p.pid);
    CHECK_EQ(x.status, 42);
    CHECK(x.exited_at >= before && x.exited_at <= sc_now_real());
    told(s);
    CHECK_EQ(rig_phase(s), SC_TOLD);
    event_is(0, "/tasks/create", "c", "", 0);
    event_is(1, "/tasks/exit", "c", "", 42);
    CHECK_EQ(rig_wait(&peer, 1).pid, p.pid);
    CHECK_EQ(sc_slot_wait(core, "c", "", &w.w, 0), 1); /* told already */
    CHECK_EQ(w.w.exit.status, 42);
    CHECK_EQ(w.times, 1);
    CHECK_EQ(rig_stats().told, 1);
    forget(s);
    CHECK_EQ(sc_slot_wait(core, "c", "", &w.w, 0), -ENOENT);
}

static void killed_by_a_signal(void)
{
    rig_process p;
    sc_slot *s = running("c", "", &p);
    CHECK_EQ(sc_slot_kill(s, SIGKILL), 0);
    told(s);
    event_is(1, "/tasks/exit", "c", "", 137);
    close(p.control);
    forget(s);
}

static void dead_before_it_is_bound(void)
{
    sc_slot *s = new_init("c");
    rig_process p = rig_orphan();
    rig_end(&p, 7);
    rig_dead(p.pid);
    rig_settle(); /* its SIGCHLD has been seen: the sweep has left it alone */
    CHECK_EQ(rig_stats().orphans, 0);
    CHECK(sc_pidfd_open(p.pid) >= 0); /* a zombie still */
    CHECK_EQ(sc_slot_bind(s, p.pid), 0);
    CHECK_EQ(sc_slot_announce(s, NULL), 0);
    told(s);
    event_is(0, "/tasks/exit", "c", "", 7);
    forget(s);
}

/* A slot that stays open for long lets zombies go to the table of early exits, and bind takes them from there. */
static void dead_long_before_it_is_bound(void)
{
    sc_slot *s = new_init("c");
    rig_process p = rig_orphan(), other = rig_orphan();
    sc_lock(core);
    core->oldest_open -= 11000000000LL;
    s->opened_mono -= 11000000000LL;
    sc_unlock(core);
    rig_end(&p, 8);
    rig_end(&other, 9);
    while (sc_pidfd_open(p.pid) != -ESRCH || sc_pidfd_open(other.pid) != -ESRCH)
        rig_settle();
    CHECK_EQ(sc_slot_bind(s, p.pid), 0);
    CHECK_EQ(sc_slot_announce(s, NULL), 0);
    told(s);
    event_is(0, "/tasks/exit", "c", "", 8);
    CHECK_EQ(rig_stats().stolen, 0);
    forget(s);
    for (size_t left = 1; left;) { /* a sweep may be put off */
        rig_settle();
        sc_lock(core);
        left = core->early_len;
        sc_unlock(core);
    }
}

static void dead_before_it_is_announced(void)
{
    sc_slot *s = new_init("c");
    rig_process p = rig_orphan();
    rig_waiter w;
    rig_waiter_init(&w);
    CHECK_EQ(sc_slot_wait(core, "c", "", &w.w, 0), 0); /* a slot that is opened can be waited for */
    CHECK_EQ(sc_slot_bind(s, p.pid), 0);
    rig_end(&p, 1);
    while (rig_phase(s) != SC_EXITED)
        rig_settle();
    CHECK(!w.fired);
    CHECK_EQ(rig_count(&peer), 0);
    CHECK_EQ(sc_slot_kill(s, SIGTERM), -ESRCH); /* Kill knows better */
    CHECK_EQ(sc_slot_forget(s), -EBUSY);        /* for Delete it is alive */
    sc_slot_info i;
    sc_slot_info_get(s, &i);
    CHECK_EQ(i.status, SC_CREATED);
    CHECK_EQ(sc_slot_announce(s, rig_make_event("/tasks/create", "c", "")), 0);
    CHECK_EQ(rig_fired(&w).status, 1);
    event_is(0, "/tasks/create", "c", "", 0);
    event_is(1, "/tasks/exit", "c", "", 1);
    told(s);
    forget(s);
}

static void holds(void)
{
    rig_process p;
    sc_slot *s = running("c", "", &p);
    CHECK_EQ(sc_slot_hold(s), 0);
    CHECK_EQ(sc_slot_hold(s), 0);
    rig_end(&p, 3);
    while (rig_phase(s) != SC_EXITED)
        rig_settle();
    CHECK_EQ(sc_slot_release(s, NULL), 0);
    rig_settle();
    CHECK_EQ(rig_phase(s), SC_EXITED);
    CHECK_EQ(sc_slot_release(s, rig_make_event("/tasks/start", "c", "")), 0);
    told(s);
    event_is(0, "/tasks/create", "c", "", 0);
    event_is(1, "/tasks/start", "c", "", 0);
    event_is(2, "/tasks/exit", "c", "", 3);
    forget(s);
}

static void dropped(void)
{
    rig_waiter w;
    sc_slot *s = new_init("c");
    rig_waiter_init(&w);
    CHECK_EQ(sc_slot_wait(core, "c", "", &w.w, 0), 0);
    CHECK_EQ(sc_slot_drop(s), 0);
    CHECK_EQ(rig_fired(&w).status, 255);
    CHECK_EQ(rig_phase(s), SC_DROPPED);
    CHECK_EQ(sc_slot_bind(s, 1), -EINVAL);
    CHECK_EQ(sc_slot_wait(core, "c", "", &w.w, 0), 1);
    CHECK_EQ(w.w.exit.status, 255);
    forget(s);
    /* After bind it is no-op. */
    rig_process p;
    s = running("c", "", &p);
    CHECK_EQ(sc_slot_drop(s), 0);
    CHECK_EQ(rig_phase(s), SC_BOUND);
    rig_end(&p, 0);
    told(s);
    event_is(1, "/tasks/exit", "c", "", 0);
    CHECK_EQ(rig_stats().told, 1); /* the dropped one was never told */
    forget(s);
}

/* ---- init and its execs ---- */

static void init_waits_for_its_execs(void)
{
    rig_process p, q;
    sc_slot *init = running("c", "", &p), *x = running("c", "x", &q);
    sc_slot *unstarted = new_exec("c", "opened");
    rig_end(&p, 1);
    while (rig_phase(init) != SC_EXITED)
        rig_settle();
    rig_end(&q, 2);
    told(x);
    rig_settle();
    CHECK_EQ(rig_phase(init), SC_EXITED); /* one of its execs may still become a process */
    sc_slot *late;
    CHECK_EQ(sc_slot_reserve(core, "c", "late", NULL, 0, &late), 0);
    CHECK_EQ(sc_slot_open(late), -ESRCH); /* but no other one may begin */
    CHECK_EQ(sc_slot_forget(init), -EBUSY);
    CHECK_EQ(sc_slot_drop(unstarted), 0);
    told(init);
    event_is(2, "/tasks/exit", "c", "x", 2);
    event_is(3, "/tasks/exit", "c", "", 1);
    forget(init); /* its execs go with it */
    CHECK(sc_slot_find(core, "c", "x") == NULL);
    CHECK_EQ(sc_slot_forget(x), 0); /* once more is nothing */
    sc_slot_unref(x);
    sc_slot_unref(late);
    sc_slot_unref(unstarted);
    CHECK_EQ(core->slot_count, 0);
}

static void the_wait_for_execs_is_bounded(void)
{
    rig_process p, q;
    sc_slot *init = running("c", "", &p), *x = running("c", "x", &q);
    CHECK_EQ(sc_slot_set_kill_rest(init, NULL, 1000000), 0);
    rig_end(&p, 1);
    told(init);
    CHECK_EQ(rig_stats().overdue, 1);
    event_is(2, "/tasks/exit", "c", "", 1);
    forget(init); /* Delete does not wait for it either */
    rig_end(&q, 5);
    told(x);
    event_is(3, "/tasks/exit", "c", "x", 5);
    CHECK(sc_slot_find(core, "c", "x") == NULL);
    sc_slot_unref(x);
    CHECK_EQ(core->slot_count, 0);
}

/* What is left in init's cgroup is killed at its exit; the file stands for a cgroup.procs. */
static void the_rest_is_killed(void)
{
    char dir[] = "/tmp/sc-cg-XXXXXX", top[64], sub[64], path[80];
    CHECK(mkdtemp(dir) != NULL);
    snprintf(top, sizeof top, "%s/cgroup.procs", dir);
    snprintf(sub, sizeof sub, "%s/below", dir);
    CHECK(mkdir(sub, 0700) == 0);
    snprintf(path, sizeof path, "%s/cgroup.procs", sub);
    rig_process p, q, r = rig_orphan();
    sc_slot *init = running("c", "", &p), *x = running("c", "x", &q);
    FILE *f = fopen(top, "w");
    fprintf(f, "%d\n", (int)q.pid);
    fclose(f);
    f = fopen(path, "w");
    fprintf(f, "%d\n", (int)r.pid);
    fclose(f);
    CHECK_EQ(sc_slot_set_kill_rest(init, top, 60000000000LL), 0);
    rig_end(&p, 4);
    told(x);
    told(init);
    event_is(2, "/tasks/exit", "c", "x", 137);
    event_is(3, "/tasks/exit", "c", "", 4);
    rig_dead(r.pid);
    unlink(path);
    rmdir(sub);
    unlink(top);
    rmdir(dir);
    close(q.control);
    close(r.control);
    sc_slot_unref(x);
    forget(init);
}

static void duplicates(void)
{
    sc_slot *s = new_init("c"), *none;
    CHECK_EQ(sc_slot_open_init(core, "c", NULL, 0, &none), -EEXIST);
    CHECK_EQ(sc_slot_reserve(core, "other", "x", NULL, 0, &none), -ENOENT);
    CHECK_EQ(sc_slot_reserve(core, "c", "", NULL, 0, &none), -EEXIST);
    sc_slot *x;
    CHECK_EQ(sc_slot_reserve(core, "c", "x", NULL, 0, &x), 0);
    CHECK_EQ(sc_slot_reserve(core, "c", "x", NULL, 0, &none), -EEXIST);
    CHECK_EQ(sc_slot_kill(x, SIGTERM), -EINVAL);
    CHECK_EQ(sc_slot_kill(s, SIGTERM), -EINVAL);
    rig_process p = rig_orphan();
    CHECK_EQ(sc_slot_bind(s, p.pid), 0);
    CHECK_EQ(sc_slot_bind(s, p.pid), -EINVAL);
    CHECK_EQ(sc_slot_open(x), 0);
    CHECK_EQ(sc_slot_open(x), -EINVAL);
    CHECK_EQ(sc_slot_drop(x), 0);
    CHECK_EQ(sc_slot_open(x), -EINVAL);
    CHECK_EQ(sc_slot_kill(s, 0), 0);
    CHECK_EQ(sc_slot_announce(s, NULL), 0);
    rig_end(&p, 0);
    told(s);
    CHECK_EQ(sc_slot_kill(s, 0), -ESRCH);
    forget(x);
    CHECK_EQ(sc_slot_reserve(core, "c", "x", NULL, 0, &x), 0); /* the id is free again */
    forget(x);
    forget(s);
    s = new_init("c");
    CHECK_EQ(sc_slot_drop(s), 0);
    forget(s);
}

/* An exec that is not started goes with its container, and whoever waits for it is answered. */
static void a_reserved_exec(void)
{
    rig_process p;
    sc_slot *init = running("c", "", &p), *x;
    rig_waiter w;
    CHECK_EQ(sc_slot_reserve(core, "c", "x", NULL, 0, &x), 0);
    rig_waiter_init(&w);
    CHECK_EQ(sc_slot_wait(core, "c", "x", &w.w, 0), 0);
    rig_end(&p, 0);
    told(init); /* it does not wait for what was never started */
    forget(init);
    CHECK_EQ(rig_fired(&w).status, 255);
    sc_slot_unref(x);
}

/* An init that is made in Start only: it can be deleted before, its exit comes after what announces it, and it can fail. */
static void a_reserved_init(void)
{
    sc_slot *s, *x;
    rig_waiter w;
    CHECK_EQ(sc_slot_reserve(core, "r", "", NULL, 0, &s), 0);
    CHECK_EQ(sc_slot_kill(s, SIGTERM), -EINVAL);
    CHECK_EQ(sc_slot_reserve(core, "r", "x", NULL, 0, &x), 0);
    CHECK_EQ(sc_slot_open(x), -ESRCH); /* nothing runs in it yet */
    forget(x);
    forget(s);
    CHECK_EQ(sc_slot_reserve(core, "r", "", NULL, 0, &s), 0);
    rig_waiter_init(&w);
    CHECK_EQ(sc_slot_wait(core, "r", "", &w.w, 0), 0);
    CHECK_EQ(sc_slot_open(s), 0);
    CHECK_EQ(sc_slot_open(s), -EINVAL);
    CHECK_EQ(sc_slot_forget(s), -EBUSY);
    rig_process p = rig_orphan();
    CHECK_EQ(sc_slot_bind(s, p.pid), 0);
    CHECK_EQ(sc_slot_announce(s, rig_make_event("/tasks/start", "r", "")), 0);
    rig_end(&p, 3);
    told(s);
    CHECK_EQ(rig_fired(&w).status, 3);
    forget(s);
    CHECK_EQ(sc_slot_reserve(core, "r", "", NULL, 0, &s), 0);
    CHECK_EQ(sc_slot_open(s), 0);
    CHECK_EQ(sc_slot_drop(s), 0);
    CHECK_EQ(sc_slot_open(s), -EINVAL);
    forget(s);
}

static void many_slots(void)
{
    enum { N = 500 };
    static sc_slot *s[N];
    char id[32];
    for (int i = 0; i < N; i++) {
        snprintf(id, sizeof id, "c%d", i);
        s[i] = new_init(id);
    }
    for (int i = 0; i < N; i++) {
        snprintf(id, sizeof id, "c%d", i);
        sc_slot *found = sc_slot_find(core, id, "");
        CHECK(found == s[i]);
        sc_slot_unref(found);
        CHECK(sc_slot_find(core, id, "x") == NULL);
    }
    for (int i = 0; i < N; i++) {
        CHECK_EQ(sc_slot_drop(s[i]), 0);
        forget(s[i]);
    }
    CHECK_EQ(core->slot_count, 0);
}

/* ---- Wait ---- */

static void waits(void)
{
    enum { N = 101 };
    static rig_waiter w[N];
    rig_process p;
    sc_slot *s = running("c", "", &p);
    for (int i = 0; i < N; i++) {
        rig_waiter_init(&w[i]);
        CHECK_EQ(sc_slot_wait(core, "c", "", &w[i].w, 0), 0);
    }
    for (int i = 0; i < N; i += 2) { /* the last and the first of the list among them */
        CHECK(sc_waiter_cancel(core, &w[i].w));
        CHECK(!sc_waiter_cancel(core, &w[i].w));
    }
    rig_waiter none;
    rig_waiter_init(&none);
    CHECK_EQ(sc_slot_wait(core, "c", "x", &none.w, 0), -ENOENT);
    CHECK_EQ(sc_slot_wait(core, "d", "", &none.w, 0), -ENOENT);
    rig_end(&p, 6);
    for (int i = 1; i < N; i += 2) {
        CHECK_EQ(rig_fired(&w[i]).status, 6);
        CHECK(!sc_waiter_cancel(core, &w[i].w));
    }
    told(s);
    rig_settle();
    for (int i = 0; i < N; i++)
        CHECK_EQ(w[i].times, i % 2);
    forget(s);
}

/* ---- State ---- */

static uint64_t number(const sc_buf *b, unsigned field)
{
    uint64_t v = 0;
    rig_field((sc_slice){b->p, b->len}, field, &v);
    return v;
}

static void state(void)
{
    static const uint8_t constant[] = "\x0a\x01" "c" "\x12\x02/b";
    sc_slot *s;
    sc_buf b = {0};
    CHECK_EQ(sc_slot_open_init(core, "c", constant, sizeof constant - 1, &s), 0);
    CHECK_EQ(sc_slot_state(core, "c", "", &b), 0);
    static const uint8_t opened[] = "\x0a\x01" "c" "\x12\x02/b\x20\x01";
    CHECK_EQ(b.len, sizeof opened - 1);
    CHECK(!memcmp(b.p, opened, b.len));
    rig_process p = rig_orphan();
    CHECK_EQ(sc_slot_bind(s, p.pid), 0);
    CHECK_EQ(sc_slot_announce(s, NULL), 0);
    static const int statuses[] = {SC_CREATED, SC_RUNNING, SC_PAUSING, SC_PAUSED};
    for (size_t i = 0; i < sizeof statuses / sizeof *statuses; i++) {
        b.len = 0;
        CHECK_EQ(sc_slot_set_status(s, statuses[i]), 0);
        CHECK_EQ(sc_slot_state(core, "c", "", &b), 0);
        CHECK_EQ(number(&b, 4), statuses[i]);
        CHECK_EQ(number(&b, 3), p.pid);
        CHECK_EQ(number(&b, 9), 0);
    }
    rig_end(&p, 200);
    told(s);
    b.len = 0;
    CHECK_EQ(sc_slot_state(core, "c", "", &b), 0);
    sc_slice all = {b.p, b.len};
    CHECK(sc_slice_is(rig_field(all, 1, NULL), "c") && sc_slice_is(rig_field(all, 2, NULL), "/b"));
    CHECK_EQ(number(&b, 3), p.pid);
    CHECK_EQ(number(&b, 4), SC_STOPPED);
    CHECK_EQ(number(&b, 9), 200);
    uint64_t sec = 0, nano = 0;
    sc_slot_info i;
    sc_slot_info_get(s, &i);
    rig_field(rig_field(all, 10, NULL), 1, &sec);
    rig_field(rig_field(all, 10, NULL), 2, &nano);
    CHECK_EQ(sec * 1000000000 + nano, i.exit.exited_at);
    CHECK_EQ(sc_slot_state(core, "c", "x", &b), -ENOENT);
    sc_buf_free(&b);
    forget(s);
}

/* A Wait with a deadline is answered by it, and by nothing else then. */
static void a_wait_that_is_too_late(void)
{
    rig_process p;
    rig_waiter w, patient;
    sc_slot *s = running("c", "", &p);
    rig_waiter_init(&w);
    rig_waiter_init(&patient);
    CHECK_EQ(sc_slot_wait(core, "c", "", &w.w, sc_now_mono() + 1000000), 0);
    CHECK_EQ(sc_slot_wait(core, "c", "", &patient.w, sc_now_mono() + 3600000000000LL), 0);
    rig_fired(&w);
    CHECK(w.w.late);
    CHECK(!sc_waiter_cancel(core, &w.w));
    rig_end(&p, 9);
    CHECK_EQ(rig_fired(&patient).status, 9);
    CHECK(!patient.w.late);
    told(s);
    CHECK_EQ(w.times, 1);
    forget(s);
}

/* ---- everything at once ---- */

typedef struct {
    char id[16];
    unsigned char status;
} life;

static void *live(void *arg)
{
    life *l = arg;
    unsigned seed = (unsigned)strtoul(l->id + 1, NULL, 10);
    sc_slot *s = new_init(l->id), *x = NULL;
    rig_process p = rig_orphan(), q;
    bool early = rand_r(&seed) % 2;
    if (early)
        rig_end(&p, l->status);
    CHECK_EQ(sc_slot_bind(s, p.pid), 0);
    CHECK_EQ(sc_slot_announce(s, rig_make_event("/tasks/create", l->id, "")), 0);
    CHECK_EQ(sc_slot_reserve(core, l->id, "x", NULL, 0, &x), 0);
    if (sc_slot_open(x) == 0) { /* else init is dead already */
        q = rig_orphan();
        if (rand_r(&seed) % 2) {
            rig_end(&q, l->status);
            CHECK_EQ(sc_slot_bind(x, q.pid), 0);
        } else {
            CHECK_EQ(sc_slot_bind(x, q.pid), 0);
            rig_end(&q, l->status);
        }
        CHECK_EQ(sc_slot_announce(x, rig_make_event("/tasks/exec-started", l->id, "x")), 0);
    }
    if (!early)
        rig_end(&p, l->status);
    rig_waiter w;
    rig_waiter_init(&w);
    int r = sc_slot_wait(core, l->id, "", &w.w, 0);
    CHECK_EQ(r ? w.w.exit.status : rig_fired(&w).status, l->status);
    sc_slot_unref(x);
    while (sc_slot_forget(s) == -EBUSY)
        sched_yield();
    sc_slot_unref(s);
    return NULL;
}

static void random_lives(void)
{
    enum { ROUNDS = 8, N = 16 };
    static life l[N];
    for (int round = 0; round < ROUNDS; round++) {
        pthread_t t[N];
        size_t from = rig_count(&peer);
        for (int i = 0; i < N; i++) {
            snprintf(l[i].id, sizeof l[i].id, "c%d", round * N + i);
            l[i].status = (unsigned char)(1 + i);
            CHECK(pthread_create(&t[i], NULL, live, &l[i]) == 0);
        }
        for (int i = 0; i < N; i++)
            pthread_join(t[i], NULL);
        CHECK_EQ(sc_core_drain(core, 60000000000LL), 1);
        size_t to = rig_count(&peer);
        for (int i = 0; i < N; i++) {
            int created = 0, exits = 0, started = 0, exec_exits = 0;
            for (size_t k = from; k < to; k++) {
                rig_event e = rig_wait(&peer, k);
                if (strcmp(e.id, l[i].id))
                    continue;
                CHECK_EQ(exits, 0); /* init's exit is the last */
                if (!strcmp(e.topic, "/tasks/create")) {
                    created++;
                } else if (!strcmp(e.topic, "/tasks/exec-started")) {
                    started++;
                } else {
                    CHECK_EQ(e.status, l[i].status);
                    CHECK_EQ(created, 1);
                    if (*e.exec) {
                        CHECK_EQ(started, 1);
                        exec_exits++;
                    } else {
                        exits++;
                    }
                }
            }
            CHECK_EQ(created, 1);
            CHECK_EQ(exits, 1);
            CHECK_EQ(exec_exits, started);
        }
        rig_take(0);
    }
    CHECK_EQ(rig_stats().stolen, 0);
    CHECK_EQ(core->slot_count, 0);
}

#define LED(body) \
    static void run_##body(void) { with_leader(body); }
#define BODIES(X) \
    X(one_life) X(killed_by_a_signal) X(dead_before_it_is_bound) X(dead_long_before_it_is_bound) \
    X(dead_before_it_is_announced) X(holds) X(dropped) X(init_waits_for_its_execs) X(the_wait_for_execs_is_bounded) \
    X(the_rest_is_killed) X(duplicates) X(a_reserved_exec) X(a_reserved_init) X(many_slots) X(waits) X(state) \
    X(a_wait_that_is_too_late) X(random_lives)
BODIES(LED)

int main(void)
{
    CHECK_EQ(sc_set_subreaper(true), 0);
#define GO(body) RUN(run_##body);
    BODIES(GO)
    return 0;
}
