#define _GNU_SOURCE
#include "process.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* Not in every libc that we build against (glibc 2.17 for manylinux2014). */
#ifndef SYS_pidfd_send_signal
#define SYS_pidfd_send_signal 424
#endif
#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif
#ifndef SYS_close_range
#define SYS_close_range 436
#endif
#define SC_CLOSE_RANGE_CLOEXEC 4
#define SC_P_PIDFD 3
#ifndef CLONE_PIDFD
#define CLONE_PIDFD 0x1000
#endif
#ifndef __WNOTHREAD
#define __WNOTHREAD 0x20000000
#endif

/* struct sched_attr of sched_setattr(2), which no older libc declares; its first version. */
struct attr {
    uint32_t size, policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime, deadline, period;
};
enum { RESET_ON_FORK = 1, TURN_NS = 100000 }; /* the shortest turn that the kernel gives */

void sc_run_first(void)
{
    struct attr a = {.size = sizeof a};
    if (syscall(SYS_sched_getattr, 0, &a, sizeof a, 0) < 0 || a.policy != SCHED_OTHER)
        return;
    int32_t nice = a.nice;
    a.size = sizeof a;
    a.flags = RESET_ON_FORK;
    a.runtime = TURN_NS;
    a.nice = -20;
    if (syscall(SYS_sched_setattr, 0, &a, 0) == 0)
        return;
    a.nice = nice;
    syscall(SYS_sched_setattr, 0, &a, 0);
}

static struct rlimit nofile_before;
static bool nofile_raised;

int64_t sc_now_mono(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return ts.tv_sec * 1000000000LL + ts.tv_nsec;
}

int64_t sc_now_real(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_REALTIME, &ts);
    return ts.tv_sec * 1000000000LL + ts.tv_nsec;
}

int sc_pidfd_open(pid_t pid)
{
    int fd = (int)syscall(SYS_pidfd_open, pid, 0);
    return fd < 0 ? -errno : fd;
}

int sc_pidfd_send_signal(int pidfd, int sig)
{
    return syscall(SYS_pidfd_send_signal, pidfd, sig, NULL, 0) < 0 ? -errno : 0;
}

int sc_kernel_check(void)
{
    int fd = sc_pidfd_open(getpid());
    if (fd == -ENOSYS)
        return fd;
    if (fd < 0)
        return 0; /* no fd to spare: not the kernel's fault */
    siginfo_t info;
    /* We are not our own child: ECHILD where P_PIDFD is known, EINVAL where it is not. */
    int r = waitid((idtype_t)SC_P_PIDFD, (id_t)fd, &info, WEXITED | WNOHANG) < 0 && errno == EINVAL ? -ENOSYS : 0;
    close(fd);
    return r;
}

int sc_set_subreaper(bool on)
{
    return prctl(PR_SET_CHILD_SUBREAPER, (unsigned long)on, 0, 0, 0) < 0 ? -errno : 0;
}

int sc_get_subreaper(void)
{
    int on = 0;
    return prctl(PR_GET_CHILD_SUBREAPER, &on, 0, 0, 0) < 0 ? -errno : on;
}

int sc_raise_nofile(uint64_t *was, uint64_t *is)
{
    struct rlimit lim;
    if (getrlimit(RLIMIT_NOFILE, &lim) < 0)
        return -errno;
    if (!nofile_raised)
        nofile_before = lim;
    *was = lim.rlim_cur;
    lim.rlim_cur = lim.rlim_max;
    if (setrlimit(RLIMIT_NOFILE, &lim) < 0)
        return -errno;
    nofile_raised = true;
    *is = lim.rlim_cur;
    return 0;
}

void sc_nofile_before(uint64_t *soft, uint64_t *hard, bool set)
{
    if (set) {
        nofile_before = (struct rlimit){*soft, *hard};
        nofile_raised = true;
    } else if (!nofile_raised) {
        getrlimit(RLIMIT_NOFILE, &nofile_before);
    }
    *soft = nofile_before.rlim_cur;
    *hard = nofile_before.rlim_max;
}

static int waited(int r, const siginfo_t *info, sc_exit_status *out)
{
    if (r < 0)
        return -errno;
    if (info->si_pid == 0)
        return 0;
    out->pid = info->si_pid;
    out->signaled = info->si_code != CLD_EXITED;
    out->status = out->signaled ? 128 + info->si_status : info->si_status;
    return 1;
}

static int wait_for(idtype_t type, id_t id, int flags, sc_exit_status *out)
{
    siginfo_t info;
    int r;
    info.si_pid = 0; /* WNOHANG leaves it alone when nobody is dead (waitid(2)) */
    do
        r = waitid(type, id, &info, WEXITED | WNOHANG | flags);
    while (r < 0 && errno == EINTR);
    return waited(r, &info, out);
}

int sc_reap_pidfd(int pidfd, sc_exit_status *out)
{
    return wait_for((idtype_t)SC_P_PIDFD, (id_t)pidfd, 0, out);
}

int sc_peek_pidfd(int pidfd, sc_exit_status *out)
{
    return wait_for((idtype_t)SC_P_PIDFD, (id_t)pidfd, WNOWAIT, out);
}

int sc_reap_pid(pid_t pid, sc_exit_status *out)
{
    return wait_for(P_PID, (id_t)pid, 0, out);
}

pid_t sc_peek_orphan(void)
{
    sc_exit_status st;
    int r = wait_for(P_ALL, 0, __WNOTHREAD | WNOWAIT, &st);
    return r == 1 ? st.pid : r;
}

int sc_peek_pid(pid_t pid)
{
    sc_exit_status st;
    return wait_for(P_PID, (id_t)pid, WNOWAIT, &st);
}

/* ---- spawn ---- */

/* What runs on a child's stack leaves it by exec or _exit, never by returning: instrumented, it would leave the address
 * sanitiser's marks on memory that the next mmap is given. */
#if defined(__GNUC__)
#define IN_CHILD __attribute__((no_sanitize("address")))
#else
#define IN_CHILD
#endif

struct child {
    const sc_spawn_args *a;
    sigset_t mask_before;
    pid_t parent;
    struct rlimit nofile;
    bool set_nofile;
    int error, at; /* written by the child, read by us after it has exec'd or ended */
};

IN_CHILD static void cloexec_rest(int from)
{
    if (syscall(SYS_close_range, (unsigned)from, ~0U, SC_CLOSE_RANGE_CLOEXEC) == 0)
        return;
    /* Linux 5.4 to 5.10: mark them one by one. */
    struct rlimit lim;
    long max = getrlimit(RLIMIT_NOFILE, &lim) == 0 && lim.rlim_cur < 1048576 ? (long)lim.rlim_cur : 1048576;
    for (int fd = from; fd < max; fd++)
        fcntl(fd, F_SETFD, FD_CLOEXEC);
}

IN_CHILD static int map_fds(const sc_spawn_args *a)
{
    int top = 2;
    for (size_t i = 0; i < a->nfds; i++)
        if (a->fds[i].child > top)
            top = a->fds[i].child;
    /* First every source to a number above all targets, so that a target never overwrites a source (a and b swapped). */
    int high[a->nfds + 1];
    bool wanted[3] = {false, false, false};
    for (size_t i = 0; i < a->nfds; i++) {
        int from = a->fds[i].parent;
        if (from < 0 && (from = open("/dev/null", O_RDWR | O_CLOEXEC)) < 0)
            return errno;
        if ((high[i] = fcntl(from, F_DUPFD_CLOEXEC, top + 1)) < 0)
            return errno;
        if (a->fds[i].child < 3)
            wanted[a->fds[i].child] = true;
    }
    cloexec_rest(3);
    for (size_t i = 0; i < a->nfds; i++)
        if (dup2(high[i], a->fds[i].child) < 0)
            return errno;
    int null = -1;
    for (int fd = 0; fd < 3; fd++) {
        if (wanted[fd])
            continue;
        if (null < 0) {
            null = open("/dev/null", O_RDWR | O_CLOEXEC);
            if (null < 0)
                return errno;
            int up = fcntl(null, F_DUPFD_CLOEXEC, 3);
            if (up < 0)
                return errno;
            null = up;
        }
        if (dup2(null, fd) < 0)
            return errno;
    }
    return 0;
}

IN_CHILD static int child_main(void *arg)
{
    struct child *c = arg;
    const sc_spawn_args *a = c->a;
    /* The system call, since sigaction(3) refuses glibc's own two, which posix_spawn leaves ignored in whoever it starts. Zeros
     * are SIG_DFL without flags in every architecture's struct; 8: bytes of the kernel's sigset_t. */
    static const unsigned long dfl[8];
    for (int sig = 1; sig < NSIG; sig++)
        syscall(SYS_rt_sigaction, sig, dfl, NULL, 8);
    if (a->new_session)
        setsid();
    else if (a->new_group)
        setpgid(0, 0);
    c->at = SC_AT_FORK;
    if (a->dies_with_thread) {
        if (prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) < 0)
            goto failed;
        if (getppid() != c->parent) /* it died before that */
            _exit(127);
    }
    c->at = SC_AT_CHDIR;
    if (a->cwd && chdir(a->cwd) < 0)
        goto failed;
    c->at = SC_AT_FDS;
    int e = map_fds(a);
    if (e) {
        errno = e;
        goto failed;
    }
    if (c->set_nofile)
        setrlimit(RLIMIT_NOFILE, &c->nofile);
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    c->at = SC_AT_EXEC;
    execve(a->path, a->argv, a->envp);
failed:
    c->error = errno ? errno : EIO;
    _exit(127);
}

pid_t sc_spawn(const sc_spawn_args *args, int *pidfd, int *at)
{
    extern char **environ;
    sc_spawn_args a = *args;
    if (!a.envp)
        a.envp = environ;
    struct child c = {.a = &a, .parent = getpid(), .nofile = nofile_before, .set_nofile = nofile_raised, .at = SC_AT_FORK};
    *pidfd = -1;
    size_t size = 65536 + a.nfds * sizeof(int);
    size = (size + 4095) & ~(size_t)4095;
    char *stack = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
    if (stack == MAP_FAILED) {
        *at = SC_AT_FORK;
        return -errno;
    }
    /* No handler of ours may run in the child while it shares our memory: all signals are blocked across the clone. */
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &c.mask_before);
    pid_t pid = clone(child_main, stack + size, CLONE_VM | CLONE_VFORK | CLONE_PIDFD | SIGCHLD, &c, pidfd);
    int err = errno;
    pthread_sigmask(SIG_SETMASK, &c.mask_before, NULL);
    munmap(stack, size);
    *at = c.at;
    if (pid < 0)
        return -err;
    if (c.error) {
        siginfo_t info;
        while (waitid(P_PID, (id_t)pid, &info, WEXITED) < 0 && errno == EINTR)
            ;
        close(*pidfd);
        *pidfd = -1;
        return -c.error;
    }
    return pid;
}

/* mount(2) with a cwd of its own: chdir is the whole process's, so a child that shares no fs state does it. */
struct mounter {
    const char *cwd, *source, *target, *fstype;
    unsigned long flags;
    const void *data;
    int error;
};

IN_CHILD static int mount_child(void *arg)
{
    struct mounter *m = arg;
    if (chdir(m->cwd) < 0 || mount(m->source, m->target, m->fstype, m->flags, m->data) < 0)
        m->error = errno;
    _exit(0);
}

int sc_mount_in(const char *cwd, const char *source, const char *target, const char *fstype, unsigned long flags, const void *data)
{
    struct mounter m = {cwd, source, target, fstype, flags, data, 0};
    size_t size = 65536;
    char *stack = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
    if (stack == MAP_FAILED)
        return -errno;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pid_t pid = clone(mount_child, stack + size, CLONE_VM | CLONE_VFORK | SIGCHLD, &m);
    int err = errno;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    munmap(stack, size);
    if (pid < 0)
        return -err;
    siginfo_t info;
    while (waitid(P_PID, (id_t)pid, &info, WEXITED) < 0 && errno == EINTR)
        ;
    return -m.error;
}

void sc_bound_malloc(void)
{
#ifdef __GLIBC__
    mallopt(M_ARENA_MAX, 2);
#endif
}
