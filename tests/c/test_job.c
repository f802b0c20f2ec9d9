/* job.c: the cap, the deadline, and what must not hold a call's end up. */
#define _GNU_SOURCE
#include "rig.h"

static sc_job *start(const char *script, size_t cap, int64_t timeout_ns)
{
    char *argv[] = {"sh", "-c", (char *)script, NULL};
    int err = 0, at;
    sc_job *j = sc_job_start(core, &(sc_spawn_args){.path = "/bin/sh", .argv = argv}, cap, timeout_ns, NULL, &err, &at);
    CHECK(j != NULL);
    return j;
}

static void ended(sc_job *j)
{
    CHECK(rig_note_wait(SC_NOTE_JOB).ptr == j);
}

static bool output_is(const sc_job *j, const char *want)
{
    return j->out.len == strlen(want) && !memcmp(j->out.p, want, j->out.len);
}

#define HOUR 3600000000000LL

static void output_and_status(void)
{
    sc_job *j = start("echo one; echo two >&2; exit 3", 65536, HOUR);
    ended(j);
    CHECK_EQ(j->status, 3);
    CHECK(!j->signaled && !j->timed_out && !j->truncated);
    CHECK(output_is(j, "one\ntwo\n"));
    sc_job_take(core, j);
    j = start("kill -TERM $$", 65536, HOUR);
    ended(j);
    CHECK_EQ(j->status, 143);
    CHECK(j->signaled && !j->timed_out);
    CHECK_EQ(j->out.len, 0);
    sc_job_take(core, j);
    CHECK_EQ(rig_stats().jobs, 2);
    CHECK_EQ(rig_stats().jobs_timed_out, 0);
}

/* More than the cap, and than a pipe holds: read to its end, or the runtime would hang on its write. */
static void output_over_the_cap(void)
{
    sc_job *j = start("head -c 1000000 /dev/zero; exit 5", 1000, HOUR);
    ended(j);
    CHECK_EQ(j->status, 5);
    CHECK(j->truncated);
    CHECK_EQ(j->out.len, 1000);
    sc_job_take(core, j);
    j = start("head -c 1000 /dev/zero", 1000, HOUR);
    ended(j);
    CHECK(!j->truncated);
    CHECK_EQ(j->out.len, 1000);
    sc_job_take(core, j);
    j = start("echo x", 0, HOUR);
    ended(j);
    CHECK(j->truncated);
    CHECK_EQ(j->out.len, 0);
    sc_job_take(core, j);
}

static void the_deadline_kills_the_group(void)
{
    sc_job *j = start("sleep 1000 & echo $!; wait", 65536, 100000000);
    ended(j);
    CHECK(j->timed_out && j->signaled);
    CHECK_EQ(j->status, 137);
    CHECK_EQ(rig_stats().jobs_timed_out, 1);
    char text[32] = "";
    memcpy(text, j->out.p, j->out.len < 31 ? j->out.len : 31);
    rig_dead(atoi(text)); /* hangs here if only the first process was killed */
    sc_job_take(core, j);
}

static void a_grandchild_keeps_the_pipe(void)
{
    sc_job *j = start("sleep 1000 & echo $!", 65536, HOUR);
    ended(j);
    CHECK_EQ(j->status, 0);
    CHECK(!j->timed_out && j->out.len > 1);
    char text[32] = "";
    memcpy(text, j->out.p, j->out.len < 31 ? j->out.len : 31);
    sc_job_take(core, j);
    kill(atoi(text), SIGKILL);
}

/* Output without an end must not keep the exit thread, whose lock everybody needs. */
static void a_flood_holds_nobody_up(void)
{
    enum { N = 4 };
    for (int i = 0; i < N; i++)
        start("exec 2>/dev/null; cat /dev/zero & cat /dev/zero & cat /dev/zero & cat /dev/zero & wait", 1000, 1500000000);
    rig_process p = rig_fork();
    sc_slot *s;
    CHECK_EQ(sc_slot_open_init(core, "c", NULL, 0, &s), 0);
    CHECK_EQ(sc_slot_bind(s, p.pid), 0);
    CHECK_EQ(sc_slot_announce(s, NULL), 0);
    rig_end(&p, 1);
    sc_note n = rig_note_wait(SC_NOTE_TOLD); /* while they all write */
    CHECK(n.ptr == s);
    sc_slot_unref(s);
    CHECK_EQ(rig_stats().jobs_timed_out, 0);
    CHECK_EQ(sc_slot_forget(s), 0);
    sc_slot_unref(s);
    for (int i = 0; i < N; i++) {
        sc_job *ended_job = rig_note_wait(SC_NOTE_JOB).ptr;
        CHECK(ended_job->timed_out && ended_job->truncated);
        sc_job_take(core, ended_job);
    }
}

/* The first process ends and its group writes on: what was there is read, and no more. */
static void a_flood_after_the_end(void)
{
    sc_job *j = start("(while :; do echo y; done) & echo $!; exit 9", 65536, HOUR);
    ended(j);
    CHECK_EQ(j->status, 9);
    char text[32] = "";
    memcpy(text, j->out.p, j->out.len < 31 ? j->out.len : 31);
    char *line = strchr(text, 'y') ? NULL : text;
    sc_job_take(core, j);
    if (line)
        kill(atoi(line), SIGKILL);
}

static void what_cannot_be_started(void)
{
    char *argv[] = {"/nonexistent", NULL};
    int err = 0, at = -1;
    CHECK(sc_job_start(core, &(sc_spawn_args){.path = argv[0], .argv = argv}, 10, HOUR, NULL, &err, &at) == NULL);
    CHECK_EQ(err, ENOENT);
    CHECK_EQ(at, SC_AT_EXEC);
    CHECK_EQ(rig_stats().jobs, 0);
}

static void mapped_output_is_not_captured(void)
{
    int p[2], err = 0, at;
    char *argv[] = {"sh", "-c", "echo out; echo err >&2", NULL}, buf[16] = "";
    CHECK(pipe2(p, O_CLOEXEC) == 0);
    sc_fd_map map = {1, p[1]};
    sc_spawn_args a = {.path = "/bin/sh", .argv = argv, .fds = &map, .nfds = 1};
    sc_job *j = sc_job_start(core, &a, 100, HOUR, NULL, &err, &at);
    CHECK(j != NULL);
    close(p[1]);
    ended(j);
    CHECK(output_is(j, "err\n"));
    sc_job_take(core, j);
    CHECK_EQ(read(p[0], buf, sizeof buf), 4);
    CHECK(!memcmp(buf, "out\n", 4));
    close(p[0]);
}

static void *run_some(void *arg)
{
    for (int i = 0; i < 25; i++)
        start("echo hello; exit 7", 100, HOUR);
    return arg;
}

static void many_from_many_threads(void)
{
    pthread_t t[8];
    for (int i = 0; i < 8; i++)
        CHECK(pthread_create(&t[i], NULL, run_some, NULL) == 0);
    for (int i = 0; i < 200; i++) {
        sc_job *j = rig_note_wait(SC_NOTE_JOB).ptr;
        CHECK_EQ(j->status, 7);
        CHECK(output_is(j, "hello\n"));
        sc_job_take(core, j);
    }
    for (int i = 0; i < 8; i++)
        pthread_join(t[i], NULL);
    CHECK_EQ(rig_stats().orphans, 0);
    CHECK_EQ(rig_stats().stolen, 0);
}

#define LED(body) \
    static void run_##body(void) { with_leader(body); }
#define BODIES(X)                                                                                            \
    X(output_and_status) X(output_over_the_cap) X(the_deadline_kills_the_group) X(a_grandchild_keeps_the_pipe) \
    X(a_flood_holds_nobody_up) X(a_flood_after_the_end) X(what_cannot_be_started) X(mapped_output_is_not_captured) \
    X(many_from_many_threads)
BODIES(LED)

int main(void)
{
#define GO(body) RUN(run_##body);
    BODIES(GO)
    return 0;
}
