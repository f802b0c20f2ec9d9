/* process.c: what a spawned child has, and what it has not. The child is this program again, which reports on itself. */
#define _GNU_SOURCE
#include "check.h"
#include "process.h"

#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>

extern char **environ;
static char self[4096];

/* ---- the child ---- */

static int report(void)
{
    char line[512], cwd[512];
    FILE *f = fopen("/proc/self/status", "re");
    while (f && fgets(line, sizeof line, f))
        if (!strncmp(line, "SigBlk", 6) || !strncmp(line, "SigIgn", 6))
            dprintf(1, "%s", line);
    if (f)
        fclose(f);
    DIR *d = opendir("/proc/self/fd");
    for (struct dirent *e; d && (e = readdir(d));) {
        char path[320], target[256];
        int fd = atoi(e->d_name);
        if (e->d_name[0] == '.' || fd == dirfd(d))
            continue;
        snprintf(path, sizeof path, "/proc/self/fd/%s", e->d_name);
        ssize_t n = readlink(path, target, sizeof target - 1);
        target[n < 0 ? 0 : n] = 0;
        dprintf(1, "fd %d %s\n", fd, strchr(target, '[') ? "pipe" : target);
    }
    if (d)
        closedir(d);
    struct rlimit lim;
    getrlimit(RLIMIT_NOFILE, &lim);
    dprintf(1, "nofile %lu\n", (unsigned long)lim.rlim_cur);
    dprintf(1, "cwd %s\n", getcwd(cwd, sizeof cwd) ? cwd : "?");
    dprintf(1, "leader %d group %d\n", getsid(0) == getpid(), getpgid(0) == getpid());
    for (char **e = environ; *e; e++)
        dprintf(1, "env %s\n", *e);
    return 0;
}

/* Writes "N" to each fd N that it was told of. */
static int sign(char **fds)
{
    for (; *fds; fds++)
        if (write(atoi(*fds), *fds, strlen(*fds)) < 0)
            return 1;
    return 0;
}

/* ---- the parent ---- */

static int wait_for(int pidfd)
{
    struct pollfd p = {.fd = pidfd, .events = POLLIN};
    CHECK_EQ(poll(&p, 1, -1), 1);
    sc_exit_status st;
    CHECK_EQ(sc_reap_pidfd(pidfd, &st), 1);
    CHECK_EQ(st.pid > 0, 1);
    close(pidfd);
    return st.status;
}

static void read_all(int fd, char *out, size_t size)
{
    size_t n = 0;
    ssize_t got;
    while ((got = read(fd, out + n, size - 1 - n)) > 0)
        n += (size_t)got;
    CHECK(got == 0);
    out[n] = 0;
    close(fd);
}

/* What the child says of itself. */
static void run_report(sc_spawn_args a, char *out, size_t size)
{
    int p[2], pidfd, at;
    CHECK(pipe2(p, O_CLOEXEC) == 0);
    char *argv[] = {self, "--report", NULL};
    sc_fd_map maps[8];
    for (size_t i = 0; i < a.nfds; i++)
        maps[i] = a.fds[i];
    maps[a.nfds++] = (sc_fd_map){1, p[1]};
    a.path = self;
    a.argv = argv;
    a.fds = maps;
    pid_t pid = sc_spawn(&a, &pidfd, &at);
    CHECK(pid > 0);
    CHECK(fcntl(pidfd, F_GETFD) & FD_CLOEXEC);
    close(p[1]);
    read_all(p[0], out, size);
    CHECK_EQ(wait_for(pidfd), 0);
}

static int count_fds(void)
{
    int n = 0;
    DIR *d = opendir("/proc/self/fd");
    while (readdir(d))
        n++;
    closedir(d);
    return n;
}

/* glibc's own: posix_spawn leaves them ignored in its children, and sigaction(3) does not take them. */
static void ignore_internal(void)
{
    unsigned long ignore[8] = {(unsigned long)(uintptr_t)SIG_IGN};
    CHECK(syscall(SYS_rt_sigaction, 32, ignore, NULL, 8) == 0 && syscall(SYS_rt_sigaction, 33, ignore, NULL, 8) == 0);
}

static void signals_are_reset(void)
{
    char out[16384];
    sigset_t all, before;
    sigfillset(&all);
    signal(SIGPIPE, SIG_IGN);
    signal(SIGUSR2, SIG_IGN);
    signal(SIGTERM, SIG_IGN);
    signal(SIGRTMIN + 3, SIG_IGN);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    ignore_internal();
    run_report((sc_spawn_args){0}, out, sizeof out);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    signal(SIGPIPE, SIG_DFL);
    signal(SIGUSR2, SIG_DFL);
    signal(SIGTERM, SIG_DFL);
    signal(SIGRTMIN + 3, SIG_DFL);
    CHECK(strstr(out, "SigBlk:\t0000000000000000"));
    CHECK(strstr(out, "SigIgn:\t0000000000000000"));
    sigset_t now;
    pthread_sigmask(SIG_SETMASK, NULL, &now);
    CHECK(!sigismember(&now, SIGTERM)); /* ours is what it was */
}

static void ignored_sigchld(void)
{
    /* The status is lost to us then, but nothing hangs and the child has the default again. */
    char *argv[] = {"/nonexistent", NULL};
    int pidfd, at;
    signal(SIGCHLD, SIG_IGN);
    CHECK_EQ(sc_spawn(&(sc_spawn_args){.path = argv[0], .argv = argv}, &pidfd, &at), -ENOENT);
    signal(SIGCHLD, SIG_DFL);
}

static void only_mapped_fds(void)
{
    char out[16384];
    int files[40];
    for (int i = 0; i < 40; i++)
        files[i] = dup(2); /* open across exec, unless somebody sees to it */
    int null = open("/etc/passwd", O_RDONLY);
    sc_fd_map maps[] = {{7, null}, {200, null}, {9, -1}};
    run_report((sc_spawn_args){.fds = maps, .nfds = 3}, out, sizeof out);
    for (int i = 0; i < 40; i++)
        close(files[i]);
    close(null);
    CHECK(strstr(out, "fd 0 /dev/null\n"));
    CHECK(strstr(out, "fd 1 pipe\n"));
    CHECK(strstr(out, "fd 2 /dev/null\n"));
    CHECK(strstr(out, "fd 7 /etc/passwd\n"));
    CHECK(strstr(out, "fd 9 /dev/null\n"));
    CHECK(strstr(out, "fd 200 /etc/passwd\n"));
    int lines = 0;
    for (char *p = out; (p = strstr(p, "fd ")); p++)
        lines += p == out || p[-1] == '\n';
    CHECK_EQ(lines, 6);
}

/* Every permutation of three fds onto each other's numbers: whoever stands at N must write what N is mapped to. */
static void permutations(void)
{
    static const int order[6][3] = {{0, 1, 2}, {0, 2, 1}, {1, 0, 2}, {1, 2, 0}, {2, 0, 1}, {2, 1, 0}};
    for (int i = 0; i < 6; i++) {
        int r[3], w[3];
        char names[3][16], *argv[] = {self, "--sign", names[0], names[1], names[2], NULL};
        for (int k = 0; k < 3; k++) {
            int p[2];
            CHECK(pipe2(p, O_CLOEXEC) == 0);
            r[k] = fcntl(p[0], F_DUPFD_CLOEXEC, 40);
            w[k] = p[1];
            close(p[0]);
        }
        sc_fd_map maps[3];
        for (int k = 0; k < 3; k++) {
            maps[k] = (sc_fd_map){w[order[i][k]], w[k]}; /* the child's number is that of another of ours */
            snprintf(names[k], sizeof names[k], "%d", w[k]);
        }
        int pidfd, at;
        CHECK(sc_spawn(&(sc_spawn_args){.path = self, .argv = argv, .fds = maps, .nfds = 3}, &pidfd, &at) > 0);
        for (int k = 0; k < 3; k++)
            close(w[k]);
        for (int k = 0; k < 3; k++) {
            char out[64], want[16];
            read_all(r[k], out, sizeof out);
            snprintf(want, sizeof want, "%d", w[order[i][k]]);
            CHECK_STR(out, want);
        }
        CHECK_EQ(wait_for(pidfd), 0);
    }
}

/* Targets that are free here are what the kernel hands out next. */
static void free_numbers(void)
{
    for (int reversed = 0; reversed < 2; reversed++) {
        int r[4], w[4], low[4], pidfd, at;
        char names[4][16], *argv[] = {self, "--sign", names[0], names[1], names[2], names[3], NULL};
        for (int k = 0; k < 4; k++) {
            int p[2];
            CHECK(pipe2(p, O_CLOEXEC) == 0);
            r[k] = fcntl(p[0], F_DUPFD_CLOEXEC, 60);
            w[k] = fcntl(p[1], F_DUPFD_CLOEXEC, 60);
            close(p[0]);
            close(p[1]);
        }
        for (int k = 0; k < 4; k++)
            low[k] = dup(0);
        sc_fd_map maps[4];
        for (int k = 0; k < 4; k++) {
            close(low[k]);
            maps[k] = (sc_fd_map){low[reversed ? 3 - k : k], w[k]};
            snprintf(names[k], sizeof names[k], "%d", maps[k].child);
        }
        CHECK(sc_spawn(&(sc_spawn_args){.path = self, .argv = argv, .fds = maps, .nfds = 4}, &pidfd, &at) > 0);
        for (int k = 0; k < 4; k++) {
            char out[64];
            close(w[k]);
            read_all(r[k], out, sizeof out);
            CHECK_STR(out, names[k]);
        }
        CHECK_EQ(wait_for(pidfd), 0);
    }
}

static void stdio_swapped(void)
{
    int a[2], b[2], pidfd, at;
    CHECK(pipe2(a, O_CLOEXEC) == 0 && pipe2(b, O_CLOEXEC) == 0);
    int one = dup(1), two = dup(2);
    fcntl(one, F_SETFD, FD_CLOEXEC);
    fcntl(two, F_SETFD, FD_CLOEXEC);
    dup2(a[1], 1);
    dup2(b[1], 2);
    sc_fd_map maps[] = {{1, 2}, {2, 1}};
    char *argv[] = {self, "--sign", "1", "2", NULL};
    pid_t pid = sc_spawn(&(sc_spawn_args){.path = self, .argv = argv, .fds = maps, .nfds = 2}, &pidfd, &at);
    dup2(one, 1);
    dup2(two, 2);
    close(one);
    close(two);
    close(a[1]);
    close(b[1]);
    CHECK(pid > 0);
    char out[16];
    read_all(a[0], out, sizeof out);
    CHECK_STR(out, "2");
    read_all(b[0], out, sizeof out);
    CHECK_STR(out, "1");
    CHECK_EQ(wait_for(pidfd), 0);
}

static void closed_stdio(void)
{
    /* A parent without fds 0 to 2: the child has them all the same. */
    int p[2];
    CHECK(pipe2(p, O_CLOEXEC) == 0);
    pid_t pid = fork();
    if (!pid) {
        int high = fcntl(p[1], F_DUPFD_CLOEXEC, 50), pidfd, at;
        close(0);
        close(1);
        close(2);
        char *argv[] = {self, "--report", NULL};
        sc_fd_map maps[] = {{1, high}};
        if (sc_spawn(&(sc_spawn_args){.path = self, .argv = argv, .fds = maps, .nfds = 1}, &pidfd, &at) < 0)
            _exit(1);
        int st;
        wait(&st);
        _exit(0);
    }
    close(p[1]);
    char out[16384];
    read_all(p[0], out, sizeof out);
    waitpid(pid, NULL, 0);
    CHECK(strstr(out, "fd 0 /dev/null\n") && strstr(out, "fd 1 pipe\n") && strstr(out, "fd 2 /dev/null\n"));
    CHECK(!strstr(out, "fd 3"));
}

static void cwd_and_environment(void)
{
    char out[16384], here[512], after[512];
    char *env[] = {"A=1", "B=two words", NULL}, *none[] = {NULL};
    CHECK(getcwd(here, sizeof here) != NULL);
    run_report((sc_spawn_args){.cwd = "/usr/lib", .envp = env}, out, sizeof out);
    CHECK(strstr(out, "cwd /usr/lib\n"));
    CHECK(strstr(out, "env A=1\nenv B=two words\n"));
    CHECK(!strstr(out, "env PATH"));
    CHECK(getcwd(after, sizeof after) != NULL);
    CHECK_STR(after, here);
    run_report((sc_spawn_args){.envp = none}, out, sizeof out);
    CHECK(!strstr(out, "env "));
    setenv("SC_TEST_INHERITED", "yes", 1);
    run_report((sc_spawn_args){0}, out, sizeof out);
    CHECK(strstr(out, "env SC_TEST_INHERITED=yes\n"));
}

static void session_and_group(void)
{
    char out[16384];
    run_report((sc_spawn_args){.new_session = true}, out, sizeof out);
    CHECK(strstr(out, "leader 1 group 1\n"));
    run_report((sc_spawn_args){.new_group = true}, out, sizeof out);
    CHECK(strstr(out, "leader 0 group 1\n"));
    run_report((sc_spawn_args){0}, out, sizeof out);
    CHECK(strstr(out, "leader 0 group 0\n"));
}

static void failures_have_their_errno(void)
{
    int pidfd, at, fds = count_fds();
    char *argv[] = {"x", NULL};
    char plain[] = "/tmp/sc-plain-XXXXXX", broken[] = "/tmp/sc-broken-XXXXXX";
    int fd = mkstemp(plain);
    CHECK(fd >= 0);
    close(fd);
    fd = mkstemp(broken);
    CHECK(fd >= 0 && write(fd, "\x7f" "ELF?", 5) == 5);
    fchmod(fd, 0755);
    close(fd);
    CHECK_EQ(sc_spawn(&(sc_spawn_args){.path = "/nonexistent", .argv = argv}, &pidfd, &at), -ENOENT);
    CHECK_EQ(at, SC_AT_EXEC);
    CHECK_EQ(pidfd, -1);
    CHECK_EQ(sc_spawn(&(sc_spawn_args){.path = plain, .argv = argv}, &pidfd, &at), -EACCES);
    CHECK_EQ(sc_spawn(&(sc_spawn_args){.path = broken, .argv = argv}, &pidfd, &at), -ENOEXEC);
    CHECK_EQ(sc_spawn(&(sc_spawn_args){.path = "/bin/true", .argv = argv, .cwd = "/nonexistent"}, &pidfd, &at), -ENOENT);
    CHECK_EQ(at, SC_AT_CHDIR);
    CHECK_EQ(sc_spawn(&(sc_spawn_args){.path = "/bin/true", .argv = argv, .cwd = plain}, &pidfd, &at), -ENOTDIR);
    sc_fd_map bad = {5, 9999};
    CHECK_EQ(sc_spawn(&(sc_spawn_args){.path = "/bin/true", .argv = argv, .fds = &bad, .nfds = 1}, &pidfd, &at), -EBADF);
    CHECK_EQ(at, SC_AT_FDS);
    unlink(plain);
    unlink(broken);
    CHECK_EQ(count_fds(), fds);
    CHECK(waitpid(-1, NULL, WNOHANG) < 0 && errno == ECHILD); /* no zombie */
}

static void statuses(void)
{
    static const struct {
        const char *script;
        int status;
        bool signaled;
    } cases[] = {{"exit 0", 0, false}, {"exit 42", 42, false}, {"exit 255", 255, false},
                 {"kill -9 $$", 137, true}, {"kill -15 $$", 143, true}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char *argv[] = {"sh", "-c", (char *)cases[i].script, NULL};
        int pidfd, at;
        pid_t pid = sc_spawn(&(sc_spawn_args){.path = "/bin/sh", .argv = argv}, &pidfd, &at);
        CHECK(pid > 0);
        struct pollfd p = {.fd = pidfd, .events = POLLIN};
        CHECK_EQ(poll(&p, 1, -1), 1);
        sc_exit_status st;
        CHECK_EQ(i % 2 ? sc_reap_pid(pid, &st) : sc_reap_pidfd(pidfd, &st), 1);
        CHECK_EQ(st.pid, pid);
        CHECK_EQ(st.status, cases[i].status);
        CHECK_EQ(st.signaled, cases[i].signaled);
        CHECK_EQ(sc_reap_pidfd(pidfd, &st), -ECHILD);
        CHECK_EQ(sc_pidfd_send_signal(pidfd, 0), -ESRCH);
        close(pidfd);
    }
    char *argv[] = {"sleep", "100", NULL};
    int pidfd, at;
    pid_t pid = sc_spawn(&(sc_spawn_args){.path = "/bin/sleep", .argv = argv}, &pidfd, &at);
    sc_exit_status st;
    CHECK_EQ(sc_reap_pidfd(pidfd, &st), 0);
    CHECK_EQ(sc_reap_pid(pid, &st), 0);
    CHECK_EQ(sc_pidfd_send_signal(pidfd, SIGKILL), 0);
    CHECK_EQ(wait_for(pidfd), 137);
    CHECK_EQ(sc_pidfd_open(pid), -ESRCH);
}

static void *spawn_many(void *arg)
{
    char *argv[] = {"true", NULL};
    for (int i = 0; i < 40; i++) {
        int pidfd, at;
        CHECK(sc_spawn(&(sc_spawn_args){.path = "/bin/true", .argv = argv}, &pidfd, &at) > 0);
        CHECK_EQ(wait_for(pidfd), 0);
    }
    return arg;
}

static void many_threads(void)
{
    pthread_t t[8];
    int fds = count_fds();
    for (int i = 0; i < 8; i++)
        CHECK(pthread_create(&t[i], NULL, spawn_many, NULL) == 0);
    for (int i = 0; i < 8; i++)
        pthread_join(t[i], NULL);
    CHECK_EQ(count_fds(), fds);
}

static void subreaper(void)
{
    CHECK_EQ(sc_get_subreaper(), 0);
    CHECK_EQ(sc_set_subreaper(true), 0);
    CHECK_EQ(sc_get_subreaper(), 1);
    CHECK_EQ(sc_set_subreaper(false), 0);
    CHECK_EQ(sc_get_subreaper(), 0);
    CHECK_EQ(sc_kernel_check(), 0);
}

static void nofile(void)
{
    char out[16384];
    struct rlimit lim;
    uint64_t was, now;
    CHECK(getrlimit(RLIMIT_NOFILE, &lim) == 0);
    lim.rlim_cur = 300;
    CHECK(setrlimit(RLIMIT_NOFILE, &lim) == 0);
    CHECK_EQ(sc_raise_nofile(&was, &now), 0);
    CHECK_EQ(was, 300);
    CHECK_EQ(now, lim.rlim_max);
    getrlimit(RLIMIT_NOFILE, &lim);
    CHECK_EQ(lim.rlim_cur, lim.rlim_max);
    run_report((sc_spawn_args){0}, out, sizeof out);
    CHECK(strstr(out, "nofile 300\n"));
    CHECK_EQ(sc_raise_nofile(&was, &now), 0); /* twice: children still get the first one */
    run_report((sc_spawn_args){0}, out, sizeof out);
    CHECK(strstr(out, "nofile 300\n"));
    getrlimit(RLIMIT_NOFILE, &lim);
    CHECK_EQ(lim.rlim_cur, lim.rlim_max);
}

static void mount_in(void)
{
    char here[512], after[512], dir[] = "/tmp/sc-mount-XXXXXX";
    CHECK(getcwd(here, sizeof here) != NULL);
    CHECK_EQ(sc_mount_in("/nonexistent", "none", ".", "tmpfs", 0, NULL), -ENOENT);
    CHECK(getcwd(after, sizeof after) != NULL);
    CHECK_STR(after, here);
    if (geteuid() != 0)
        return;
    CHECK(mkdtemp(dir) != NULL);
    pid_t pid = fork(); /* in a mount namespace of its own */
    if (!pid) {
        struct stat outer, inner;
        if (unshare(CLONE_NEWNS) < 0 || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0)
            _exit(0);
        stat("/tmp", &outer);
        if (sc_mount_in("/tmp", "none", dir + 5, "tmpfs", 0, NULL) != 0)
            _exit(2);
        _exit(stat(dir, &inner) == 0 && inner.st_dev != outer.st_dev ? 0 : 3);
    }
    int st;
    CHECK(waitpid(pid, &st, 0) == pid);
    rmdir(dir);
    CHECK_EQ(st, 0);
}

/* Exits with the nice value of a thread after sc_run_first, 20 added, and fails if a child has another one than before. */
static int nice_after(bool root)
{
    if (!root)
        CHECK_EQ(setuid(65534), 0);
    CHECK_EQ(setpriority(PRIO_PROCESS, 0, 3), 0);
    sc_run_first();
    int own = getpriority(PRIO_PROCESS, 0);
    pid_t pid = fork();
    if (!pid)
        _exit(getpriority(PRIO_PROCESS, 0) + 20);
    int st;
    CHECK_EQ(waitpid(pid, &st, 0), pid);
    CHECK_EQ(WEXITSTATUS(st), own < 0 ? 20 : 23); /* the kernel takes a raised one back to 0 */
    return own + 20;
}

static void run_first(void)
{
    for (int root = 0; root < 2; root++) {
        pid_t pid = fork();
        if (!pid)
            _exit(nice_after(root));
        int st;
        CHECK_EQ(waitpid(pid, &st, 0), pid);
        CHECK(WIFEXITED(st));
        CHECK_EQ(WEXITSTATUS(st), root ? 0 : 23);
    }
}

int main(int argc, char **argv)
{
    if (argc > 1 && !strcmp(argv[1], "--report"))
        _exit(report());
    if (argc > 1 && !strcmp(argv[1], "--sign"))
        _exit(sign(argv + 2));
    CHECK(readlink("/proc/self/exe", self, sizeof self - 1) > 0);
    RUN(signals_are_reset);
    RUN(ignored_sigchld);
    RUN(only_mapped_fds);
    RUN(permutations);
    RUN(free_numbers);
    RUN(stdio_swapped);
    RUN(closed_stdio);
    RUN(cwd_and_environment);
    RUN(session_and_group);
    RUN(failures_have_their_errno);
    RUN(statuses);
    RUN(many_threads);
    RUN(subreaper);
    RUN(mount_in);
    RUN(run_first);
    RUN(nofile);
    return 0;
}
