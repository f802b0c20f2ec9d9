/* children.c, mailbox.c and the reactor: whose child is it, notes, timers, signals, and the end of a core. */
#define _GNU_SOURCE
#include <fcntl.h>

#include "rig.h"

static sc_slot *new_init(const char *id)
{
    sc_slot *s;
    CHECK_EQ(sc_slot_open_init(core, id, NULL, 0, &s), 0);
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

/* ---- whose child is it? ---- */

static void orphans_are_reaped_and_told_to_nobody(void)
{
    rig_process p[20];
    for (int i = 0; i < 20; i++)
        p[i] = rig_orphan();
    for (int i = 0; i < 20; i++)
        rig_end(&p[i], 1);
    while (rig_stats().orphans < 20)
        rig_settle();
    for (int i = 0; i < 20; i++)
        CHECK_EQ(sc_pidfd_open(p[i].pid), -ESRCH);
    CHECK_EQ(rig_stats().events, 0);
}

/* Beside many living children a sweep is dear, and the next one waits; the orphan is reaped all the same. */
static void a_sweep_keeps_its_pause(void)
{
    rig_process orphan = rig_orphan();
    sc_lock(core);
    int64_t after = core->sweep_after = sc_now_mono() + 50000000;
    sc_unlock(core);
    rig_end(&orphan, 1);
    while (rig_stats().orphans < 1)
        rig_settle();
    CHECK(sc_now_mono() >= after);
    sc_lock(core);
    CHECK(core->sweep_after > after && core->sweep_after <= sc_now_mono() + 200000000);
    sc_unlock(core);
}

static void another_threads_child_is_left_to_it(void)
{
    rig_process mine = rig_fork(), grouped = rig_fork_in(true), orphan = rig_orphan();
    rig_end(&mine, 33);
    rig_end(&grouped, 35);
    rig_dead(mine.pid);
    rig_dead(grouped.pid);
    rig_end(&orphan, 1);
    while (rig_stats().orphans < 1) /* a sweep has been over everything */
        rig_settle();
    int st = 0;
    CHECK_EQ(waitpid(mine.pid, &st, 0), mine.pid);
    CHECK_EQ(WEXITSTATUS(st), 33);
    CHECK_EQ(waitpid(grouped.pid, &st, 0), grouped.pid);
    CHECK_EQ(WEXITSTATUS(st), 35);
    CHECK_EQ(rig_stats().orphans, 1);
}

static rig_process leftover;

static void *leave_one(void *arg)
{
    leftover = rig_fork();
    return arg;
}

/* The kernel gives it to the leader then, like an orphan. */
static void an_ended_threads_child_is_left_to_its_author(void)
{
    pthread_t t;
    CHECK(pthread_create(&t, NULL, leave_one, NULL) == 0);
    pthread_join(t, NULL);
    rig_end(&leftover, 34);
    rig_dead(leftover.pid);
    rig_process orphan = rig_orphan(); /* behind it in the kernel's list, and not hidden by it */
    rig_end(&orphan, 1);
    while (rig_stats().orphans < 1)
        rig_settle();
    int st = 0;
    CHECK_EQ(waitpid(leftover.pid, &st, 0), leftover.pid);
    CHECK_EQ(WEXITSTATUS(st), 34);
    CHECK_EQ(rig_stats().orphans, 1);
}

/* One of our own processes that somebody else's wait took: 255, never 0. */
static void a_stolen_status(void)
{
    rig_process p = rig_fork();
    sc_slot *s = new_init("c");
    rig_end(&p, 0);
    CHECK_EQ(waitpid(p.pid, NULL, 0), p.pid);
    CHECK_EQ(sc_slot_bind(s, p.pid), 0);
    CHECK_EQ(sc_slot_announce(s, NULL), 0);
    told(s);
    event_is(0, "/tasks/exit", "c", "", 255);
    CHECK_EQ(rig_stats().stolen, 1);
    forget(s);
}

static void a_watched_pid(void)
{
    rig_process p = rig_fork();
    CHECK_EQ(sc_watch_pid(core, p.pid), 0);
    rig_end(&p, 12);
    sc_note n = rig_note_wait(SC_NOTE_PID);
    CHECK_EQ(n.a, p.pid);
    CHECK_EQ(n.b, 12);
    core->tell_pids = true;
    rig_process q = rig_orphan();
    rig_end(&q, 13);
    n = rig_note_wait(SC_NOTE_PID);
    CHECK_EQ(n.a, q.pid);
    CHECK_EQ(n.b, 13);
    p = rig_fork();
    CHECK_EQ(sc_watch_pid(core, p.pid), 0);
    rig_end(&p, 14);
    n = rig_note_wait(SC_NOTE_PID);
    CHECK_EQ(n.b, 14);
    rig_settle();
    CHECK_EQ(rig_take(SC_NOTE_PID), 0); /* once */
    core->tell_pids = false;
    CHECK_EQ(sc_watch_pid(core, p.pid), -ESRCH);
}

/* Its zombie may outlive the telling by a turn of the loop; nobody can take it for a new process meanwhile. */
static pid_t told_and_not_reaped(void)
{
    rig_process p = rig_fork();
    rig_end(&p, 15);
    rig_dead(p.pid);
    rig_settle();
    int fd = sc_pidfd_open(p.pid);
    CHECK(fd >= 0);
    sc_lock(core);
    CHECK_EQ(core->closing_len, 0);
    core->closing[core->closing_len++] = (sc_closing){fd, p.pid};
    sc_unlock(core);
    return p.pid;
}

static void a_zombie_that_has_been_told(void)
{
    pid_t pid = told_and_not_reaped();
    CHECK_EQ(sc_watch_pid(core, pid), -ESRCH);
    CHECK_EQ(core->closing_len, 0);
    CHECK_EQ(sc_pidfd_open(pid), -ESRCH);
    sc_slot *s = new_init("c");
    CHECK_EQ(sc_slot_bind(s, told_and_not_reaped()), 0);
    CHECK_EQ(sc_slot_announce(s, NULL), 0);
    told(s);
    event_is(0, "/tasks/exit", "c", "", 255);
    forget(s);
}

/* ---- notes ---- */

/* A writer that is late with its wake-up leaves no fd that stays readable, or the RPC thread spins. */
static void a_late_wake_up_is_taken(void)
{
    sc_post(core, SC_NOTE_POST, NULL, 0, 0, 0);
    CHECK_EQ(rig_take(SC_NOTE_POST), 1);
    uint64_t one = 1;
    CHECK(write(core->mailfd, &one, sizeof one) == sizeof one);
    CHECK_EQ(rig_take(SC_NOTE_POST), 0);
    struct pollfd f = {.fd = core->mailfd, .events = POLLIN};
    CHECK_EQ(poll(&f, 1, 0), 0);
    sc_post(core, SC_NOTE_POST, NULL, 0, 0, 0);
    CHECK_EQ(poll(&f, 1, 0), 1);
    CHECK_EQ(rig_take(SC_NOTE_POST), 1);
}

/* A told exit's note is there at once and rings later, or with the next note. */
static void a_told_exit_rings_later(void)
{
    struct pollfd f = {.fd = core->mailfd, .events = POLLIN};
    for (int with_another = 0; with_another < 2; with_another++) {
        sc_slot *s = new_init("c");
        sc_lock(core);
        sc_slot_ref(s);
        sc_post_told(core, s);
        CHECK_EQ(poll(&f, 1, 0), 0);
        sc_unlock(core);
        CHECK(sc_has_notes(core));
        if (with_another)
            sc_post(core, SC_NOTE_POST, NULL, 0, 0, 0);
        CHECK_EQ(poll(&f, 1, with_another ? 0 : 10000), 1);
        CHECK_EQ(rig_take(SC_NOTE_TOLD), 1);
        CHECK(!sc_has_notes(core));
        CHECK_EQ(poll(&f, 1, 20), 0); /* the timer of a note that was taken already does not ring */
        CHECK_EQ(sc_slot_drop(s), 0);
        forget(s);
    }
}

static void timers_in_order(void)
{
    static const int order[] = {5, 1, 4, 2, 3};
    int64_t began = sc_now_mono();
    for (int i = 0; i < 5; i++)
        CHECK_EQ(sc_delay(core, order[i] * 2000000, (void *)(intptr_t)order[i]), 0);
    for (int i = 1; i <= 5; i++) {
        sc_note n = rig_note_wait(SC_NOTE_TIMER);
        CHECK_EQ((intptr_t)n.ptr, i);
        CHECK(sc_now_mono() - began >= i * 2000000);
    }
}

static void signals(void)
{
    static const int sent[] = {SIGTERM, SIGINT, SIGUSR1, SIGPIPE};
    for (size_t i = 0; i < sizeof sent / sizeof *sent; i++) {
        kill(getpid(), sent[i]);
        CHECK_EQ(rig_note_wait(SC_NOTE_SIGNAL).a, sent[i]);
    }
    sc_core *other = sc_core_new("other", NULL);
    CHECK_EQ(sc_core_signals(other, true), -EBUSY);
    sc_core_free(other);
}

/* A core that goes with all this under way leaves no memory (the address sanitiser says so) and no fd. */
static void unfinished(void)
{
    char *argv[] = {"sh", "-c", "echo x; exec sleep 1000", NULL}, *quick[] = {"true", NULL};
    int err, at, ended = 0;
    sc_core *was = core;
    core = sc_core_new("ns", "/nonexistent");
    CHECK_EQ(sc_delay(core, 3600000000000LL, NULL), 0);
    sc_post(core, SC_NOTE_POST, NULL, 0, 0, 0);
    sc_job *j = sc_job_start(core, &(sc_spawn_args){.path = "/bin/sh", .argv = argv}, 100, 3600000000000LL, NULL, &err, &at);
    CHECK(j != NULL);
    pid_t pid = j->child.pid;
    j = sc_job_start(core, &(sc_spawn_args){.path = "/bin/true", .argv = quick}, 100, 3600000000000LL, NULL, &err, &at);
    CHECK(j != NULL);
    rig_process p = rig_fork(), q = rig_fork(), r = rig_fork();
    CHECK_EQ(sc_watch_pid(core, p.pid), 0);
    sc_slot *s = new_init("c"), *gone = new_init("d");
    CHECK_EQ(sc_slot_bind(s, q.pid), 0);
    CHECK_EQ(sc_slot_announce(s, rig_make_event("/tasks/create", "c", "")), 0);
    CHECK_EQ(sc_slot_bind(gone, r.pid), 0);
    CHECK_EQ(sc_slot_announce(gone, NULL), 0);
    rig_end(&r, 0);
    pthread_t t;
    CHECK(pthread_create(&t, NULL, (void *(*)(void *))(void (*)(void))sc_core_run, core) == 0);
    while (ended < 2) { /* their notes are there, and are not taken */
        pthread_mutex_lock(&core->mail_lock);
        ended = 0;
        for (sc_note *n = core->mail; n; n = n->next)
            ended += n->kind == SC_NOTE_JOB || n->kind == SC_NOTE_TOLD;
        pthread_mutex_unlock(&core->mail_lock);
        sched_yield();
    }
    sc_core_stop(core);
    pthread_join(t, NULL);
    sc_slot_unref(s);
    sc_slot_unref(gone);
    sc_core_free(core);
    core = was;
    kill(pid, SIGKILL);
    rig_end(&p, 0);
    rig_end(&q, 0);
    CHECK_EQ(waitpid(pid, NULL, 0), pid);
    CHECK_EQ(waitpid(p.pid, NULL, 0), p.pid);
    CHECK_EQ(waitpid(q.pid, NULL, 0), q.pid);
}

#define LED(body) \
    static void run_##body(void) { with_leader(body); }
#define BODIES(X) \
    X(orphans_are_reaped_and_told_to_nobody) X(a_sweep_keeps_its_pause) X(another_threads_child_is_left_to_it) \
    X(an_ended_threads_child_is_left_to_its_author) X(a_stolen_status) X(a_zombie_that_has_been_told) \
    X(a_watched_pid) X(a_late_wake_up_is_taken) \
    X(a_told_exit_rings_later) X(timers_in_order) X(signals) X(unfinished)
BODIES(LED)

int main(void)
{
    CHECK_EQ(sc_set_subreaper(true), 0);
#define GO(body) RUN(run_##body);
    BODIES(GO)
    return 0;
}
