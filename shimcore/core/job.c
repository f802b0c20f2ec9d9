/* Runtime calls: spawned by whoever asks, watched by the exit thread, ended by their deadline at the latest. */
#define _GNU_SOURCE
#include "core.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <unistd.h>

#define GIVE_UP_NS 1000000000LL /* after the SIGKILL: a call in uninterruptible sleep is left to itself */

void sc_job_free(sc_job *j)
{
    sc_buf_free(&j->out);
    free(j);
}

void sc_job_take(sc_core *c, sc_job *j)
{
    sc_lock(c);
    bool dead = j->dead;
    j->taken = true;
    sc_unlock(c);
    if (dead)
        sc_job_free(j);
}

static void stop_reading(sc_core *c, sc_job *j)
{
    if (j->out_fd < 0)
        return;
    epoll_ctl(c->epfd, EPOLL_CTL_DEL, j->out_fd, NULL);
    close(j->out_fd);
    j->out_fd = -1;
}

/* At most `most` bytes: who writes faster than we read would keep this thread, and the lock, as long as it liked. */
static void read_output(sc_core *c, sc_job *j, size_t most)
{
    char sink[16384];
    while (j->out_fd >= 0 && most) {
        ssize_t n = read(j->out_fd, sink, most < sizeof sink ? most : sizeof sink);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0) {
            if (n == 0)
                stop_reading(c, j);
            return;
        }
        most -= (size_t)n;
        size_t room = j->cap - j->out.len, take = (size_t)n < room ? (size_t)n : room;
        if (take < (size_t)n)
            j->truncated = true; /* read on all the same: a full pipe would hold the runtime up */
        sc_buf_put(&j->out, sink, take);
    }
}

static void output_ready(sc_core *c, sc_source *s, uint32_t ev)
{
    (void)ev;
    read_output(c, (sc_job *)((char *)s - offsetof(sc_job, out_src)), 65536);
}

/* Answered once; the memory goes when Python has taken the result and the process has been reaped. */
static void finish(sc_core *c, sc_job *j)
{
    if (j->done)
        return;
    j->done = true;
    sc_timer_clear(c, &j->deadline);
    stop_reading(c, j);
    sc_post(c, SC_NOTE_JOB, j, 0, 0, 0);
}

static void job_died(sc_core *c, sc_child *k, const sc_exit_status *st, int64_t mono, int64_t real)
{
    (void)mono, (void)real;
    sc_job *j = (sc_job *)k;
    j->dead = true;
    c->jobs--;
    if (j->done) { /* given up before */
        if (j->taken) {
            j->grave = c->graveyard;
            c->graveyard = j;
        }
        return;
    }
    j->status = st->status;
    j->signaled = st->signaled;
    int there = 0;
    if (j->out_fd >= 0 && ioctl(j->out_fd, FIONREAD, &there) == 0)
        read_output(c, j, (size_t)there); /* no more: its grandchildren may write, or keep the pipe open, for ever */
    finish(c, j);
}

static void deadline_fire(sc_core *c, sc_timer *t)
{
    sc_job *j = (sc_job *)((char *)t - offsetof(sc_job, deadline));
    if (!j->timed_out) {
        j->timed_out = true;
        c->stats.jobs_timed_out++;
        kill(-j->child.pid, SIGKILL); /* its group: not reaped, so the number is still its own */
        if (j->child.pidfd >= 0)
            sc_pidfd_send_signal(j->child.pidfd, SIGKILL);
        sc_timer_set(c, &j->deadline, sc_now_mono() + GIVE_UP_NS);
        return;
    }
    j->status = 255;
    finish(c, j);
}

sc_job *sc_job_start(sc_core *c, const sc_spawn_args *args, size_t cap, int64_t timeout_ns, void *cookie, int *err, int *at)
{
    sc_job *j = calloc(1, sizeof *j);
    int pipefd[2] = {-1, -1};
    sc_fd_map maps[args->nfds + 2];
    sc_spawn_args a = *args;
    bool has[3] = {false, false, false};
    *at = SC_AT_FORK;
    if (!j) {
        *err = ENOMEM;
        return NULL;
    }
    for (size_t i = 0; i < args->nfds; i++) {
        maps[i] = args->fds[i];
        if (maps[i].child < 3)
            has[maps[i].child] = true;
    }
    if (!has[1] || !has[2]) {
        if (pipe2(pipefd, O_CLOEXEC) < 0) {
            *err = errno;
            free(j);
            return NULL;
        }
        fcntl(pipefd[0], F_SETFL, O_NONBLOCK);
        for (int fd = 1; fd < 3; fd++)
            if (!has[fd])
                maps[a.nfds++] = (sc_fd_map){fd, pipefd[1]};
    }
    a.fds = maps;
    a.new_group = !a.new_session;
    j->out_fd = pipefd[0];
    j->out_src.ready = output_ready;
    j->cap = cap;
    j->cookie = cookie;
    j->child.died = job_died;
    j->deadline.fire = deadline_fire;
    int pidfd;
    pid_t pid = sc_spawn(&a, &pidfd, at);
    if (pipefd[1] >= 0)
        close(pipefd[1]);
    if (pid < 0) {
        *err = -pid;
        if (pipefd[0] >= 0)
            close(pipefd[0]);
        free(j);
        return NULL;
    }
    sc_lock(c);
    c->stats.jobs++;
    c->jobs++;
    if (j->out_fd >= 0 && sc_watch_fd(c, j->out_fd, EPOLLIN, &j->out_src) < 0) {
        close(j->out_fd);
        j->out_fd = -1;
    }
    sc_timer_set(c, &j->deadline, sc_now_mono() + timeout_ns);
    sc_child_add(c, &j->child, pid, pidfd);
    sc_unlock(c);
    return j;
}
