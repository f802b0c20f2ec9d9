/* What is installed under a shim's name: it has an action done by a fork of the warm template, or does it the plain way.
 *
 * It hands its arguments, environment, working directory and stdin to the template, and waits. Nothing happens before it has said
 * "go": until then it may change its mind, and does so whenever anything is other than it should be, or takes longer than
 * ANSWER_MS. From then on it relays the result: what is to be printed, and the exit status. Its stdout and stderr stay here, since
 * containerd reads them to their end. When it is killed, the other end sees that, and undoes what it has begun.
 *
 * No template: it starts one for those who come after it, and does its own action the plain way, which is to execute the
 * interpreter.
 *
 * What a fork can't take over from its caller is part of the template's name, so that nobody is served by a wrong one: the code, the
 * user, namespaces, cgroups, capabilities, seccomp, LSM label, scheduling, and those variables that are read when a process starts.
 * template.py is the other end; docs/template.md describes both. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { ANSWER_MS = 200, RESULT_MS = 90000, LIMITS = 16, RESULT_MAX = 4 << 20 };
#define MAGIC "shimcore"
#define DIRECTORY "/run/shimcore"

extern char **environ;

/* Behind the program itself: interpreter, script and "1" or "0" (whether to use a template), each with its NUL; the length of that
 * (4 bytes, little-endian); MAGIC. */
static char *interpreter, *script;
static bool wanted;
static const char *trace;

static void note(const char *what, const char *why)
{
    if (!trace)
        return;
    int fd = open(trace, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0)
        return;
    dprintf(fd, "%s %s\n", what, why);
    close(fd);
}

static void load(void)
{
    int fd = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
    struct stat st;
    unsigned char tail[12];
    if (fd < 0 || fstat(fd, &st) < 0 || pread(fd, tail, sizeof tail, st.st_size - 12) != 12 || memcmp(tail + 4, MAGIC, 8)) {
        fprintf(stderr, "this is shimcore's launcher, and it names no shim: install one with python -m shimcore.install\n");
        exit(1);
    }
    uint32_t n = tail[0] | tail[1] << 8 | tail[2] << 16 | (uint32_t)tail[3] << 24;
    char *text = n < 65536 ? malloc(n + 1) : NULL;
    if (!text || pread(fd, text, n, st.st_size - 12 - n) != (ssize_t)n)
        exit(1);
    text[n] = 0;
    close(fd);
    interpreter = text;
    script = text + strlen(text) + 1;
    wanted = script < text + n && script + strlen(script) + 1 < text + n && script[strlen(script) + 1] == '1';
}

static _Noreturn void plain(int argc, char **argv, const char *why)
{
    note("plain", why);
    char **args = calloc((size_t)argc + 3, sizeof *args);
    if (args) {
        args[0] = interpreter;
        args[1] = "-IS";
        args[2] = script;
        memcpy(args + 3, argv + 1, (size_t)(argc ? argc : 1) * sizeof *args);
        execv(interpreter, args);
    }
    fprintf(stderr, "%s: %s can't be executed: %s\n", argc ? argv[0] : "shim", interpreter, strerror(errno));
    exit(1);
}

/* ---- the name of the template ---- */

struct key {
    uint64_t a, b; /* two FNV-1a hashes: against accidents, not against enemies, whom the directory keeps out */
};

static void mix(struct key *k, const void *data, size_t n)
{
    const unsigned char *p = data;
    for (size_t i = 0; i < n; i++) {
        k->a = (k->a ^ p[i]) * 0x100000001b3;
        k->b = (k->b ^ p[i]) * 0x10000000233;
    }
    k->a = (k->a ^ 0xff) * 0x100000001b3;
    k->b = (k->b ^ 0x100) * 0x10000000233;
}

static void mix_text(struct key *k, const char *text)
{
    mix(k, text, strlen(text));
}

static void mix_number(struct key *k, int64_t n)
{
    mix(k, &n, sizeof n);
}

/* Of a small file; the lines that begin with one of `lines` (a NULL-terminated list), or all of it. */
static void mix_file(struct key *k, const char *path, const char *const *lines)
{
    char buf[8192];
    ssize_t n = 0, got;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        mix_number(k, errno);
        return;
    }
    while (n < (ssize_t)sizeof buf - 1 && (got = read(fd, buf + n, sizeof buf - 1 - (size_t)n)) > 0)
        n += got;
    close(fd);
    buf[n] = 0;
    if (!lines) {
        mix(k, buf, (size_t)n);
        return;
    }
    for (char *line = buf, *end; *line; line = end) {
        end = strchrnul(line, '\n');
        for (const char *const *l = lines; *l; l++)
            if (!strncmp(line, *l, strlen(*l)))
                mix(k, line, (size_t)(end - line));
        end += *end != 0;
    }
}

/* Which file it is and, with `content`, which version of it. */
static void mix_stat(struct key *k, const char *path, bool content)
{
    struct stat st;
    if (stat(path, &st) < 0) {
        mix_number(k, errno);
        return;
    }
    mix_number(k, (int64_t)st.st_dev);
    mix_number(k, (int64_t)st.st_ino);
    if (content) {
        mix_number(k, st.st_size);
        mix_number(k, st.st_mtim.tv_sec);
        mix_number(k, st.st_mtim.tv_nsec);
    }
}

/* Read by the libraries when a process starts. The template has these, and no other, until it serves. */
static bool read_at_start(const char *variable)
{
    static const char *const names[] = {"LD_", "MALLOC_", "GLIBC_TUNABLES=", "PYTHON", "LANG", "LC_", "TZ", NULL};
    for (const char *const *n = names; *n; n++)
        if (!strncmp(variable, *n, strlen(*n)))
            return true;
    return false;
}

static struct key make_key(void)
{
    static const char *const lines[] = {"Uid:", "Gid:", "Groups:", "Cap", "NoNewPrivs:", "Seccomp", "Cpus_allowed:", "Mems_allowed:",
                                        "THP_enabled:", NULL};
    static const char *const spaces[] = {"cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts", NULL};
    struct key k = {0xcbf29ce484222325, 0x84222325cbf29ce4};
    char path[64];
    mix_text(&k, interpreter);
    mix_text(&k, script);
    mix_stat(&k, interpreter, true);
    mix_stat(&k, script, true);
    mix_stat(&k, "/", false);
    for (const char *const *s = spaces; *s; s++) {
        snprintf(path, sizeof path, "/proc/self/ns/%s", *s);
        mix_stat(&k, path, false);
    }
    mix_file(&k, "/proc/self/status", lines);
    mix_file(&k, "/proc/self/cgroup", NULL);
    mix_file(&k, "/proc/self/attr/current", NULL);
    mix_file(&k, "/proc/self/coredump_filter", NULL);
    mix_file(&k, "/proc/self/timerslack_ns", NULL);
    mix_number(&k, personality(0xffffffff));
    mix_number(&k, prctl(PR_GET_SECUREBITS, 0, 0, 0, 0));
    mix_number(&k, sched_getscheduler(0));
    mix_number(&k, getpriority(PRIO_PROCESS, 0));
    mix_number(&k, syscall(SYS_ioprio_get, 1, 0));
    for (char **e = environ; *e; e++)
        if (read_at_start(*e))
            mix_text(&k, *e);
    return k;
}

/* ---- the directory and the socket ---- */

/* Ours alone, and not through a link; -1 where it can't be had. */
static int open_directory(const char *path)
{
    struct stat st;
    if (mkdir(path, 0700) < 0 && errno != EEXIST)
        return -1;
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (fd >= 0 && (fstat(fd, &st) < 0 || st.st_uid != geteuid() || st.st_mode & 077)) {
        close(fd);
        errno = EPERM;
        return -1;
    }
    return fd;
}

/* By the directory's fd, so that no length of its path matters, and nobody puts another in its place. */
static int dial(int directory, const char *name)
{
    struct sockaddr_un to = {.sun_family = AF_UNIX};
    struct ucred peer;
    socklen_t n = sizeof peer;
    snprintf(to.sun_path, sizeof to.sun_path, "/proc/self/fd/%d/%s", directory, name);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return -1;
    if (connect(fd, (struct sockaddr *)&to, sizeof to) < 0 || getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &n) < 0 ||
        (peer.uid != geteuid() && (errno = EPERM))) {
        int e = errno;
        close(fd);
        errno = e;
        return -1;
    }
    return fd;
}

/* ---- the request ---- */

static struct {
    char *p;
    size_t n, cap;
} request;

static void put(const void *data, size_t n)
{
    if (request.cap - request.n < n) {
        size_t cap = 2 * (request.n + n) + 4096;
        char *p = realloc(request.p, cap);
        if (!p)
            exit(1);
        request.p = p;
        request.cap = cap;
    }
    memcpy(request.p + request.n, data, n);
    request.n += n;
}

static void put_number(int64_t n)
{
    put(&n, sizeof n);
}

static void put_texts(char *const *list)
{
    int64_t n = 0;
    while (list[n])
        n++;
    put_number(n);
    for (int64_t i = 0; i < n; i++)
        put(list[i], strlen(list[i]) + 1);
}

static int64_t number_in(const char *path)
{
    char buf[32] = {0};
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd >= 0) {
        if (read(fd, buf, sizeof buf - 1) < 0)
            buf[0] = 0;
        close(fd);
    }
    return strtoll(buf, NULL, 10);
}

/* Numbers of 8 bytes: the length of all that follows, umask, oom_score_adj, our parent, the soft and hard limits; then arguments and
 * environment, each a number and so many strings with their NULs. */
static void make_request(char **argv)
{
    mode_t mask = umask(0);
    umask(mask);
    put_number(0);
    put_number(mask);
    put_number(number_in("/proc/self/oom_score_adj"));
    put_number(getppid());
    for (int i = 0; i < LIMITS; i++) {
        struct rlimit r = {0, 0};
        getrlimit(i, &r);
        put_number((int64_t)r.rlim_cur);
        put_number((int64_t)r.rlim_max);
    }
    put_texts(argv);
    put_texts(environ);
    int64_t length = (int64_t)request.n - 8;
    memcpy(request.p, &length, sizeof length);
}

static int64_t now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

/* Until `until` (now_ms); whether there is something. */
static bool wait_for(int fd, short events, int64_t until)
{
    struct pollfd p = {.fd = fd, .events = events};
    for (;;) {
        int64_t left = until - now_ms();
        int r = poll(&p, 1, left > 0 ? (int)left : 0);
        if (r > 0)
            return true;
        if (r == 0 || errno != EINTR)
            return false;
    }
}

static bool send_request(int fd, int64_t until)
{
    int fds[2] = {0, open(".", O_PATH | O_DIRECTORY | O_CLOEXEC)};
    if (fds[1] < 0)
        return false;
    if (fcntl(0, F_GETFD) < 0) /* no stdin */
        fds[0] = fds[1];
    union {
        struct cmsghdr head;
        char room[CMSG_SPACE(sizeof fds)];
    } control = {.head = {.cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN(sizeof fds)}};
    memcpy(CMSG_DATA(&control.head), fds, sizeof fds);
    size_t sent = 0;
    while (sent < request.n) {
        struct iovec part = {request.p + sent, request.n - sent};
        struct msghdr m = {.msg_iov = &part, .msg_iovlen = 1};
        if (!sent) {
            m.msg_control = &control;
            m.msg_controllen = sizeof control.room;
        }
        ssize_t n = sendmsg(fd, &m, MSG_NOSIGNAL);
        if (n > 0)
            sent += (size_t)n;
        else if (errno != EINTR && (errno != EAGAIN || !wait_for(fd, POLLOUT, until)))
            break;
    }
    close(fds[1]);
    return sent == request.n;
}

/* One byte, 0 when none came. */
static char answer(int fd, int64_t until)
{
    char c = 0;
    ssize_t n;
    do
        n = wait_for(fd, POLLIN, until) ? read(fd, &c, 1) : 0;
    while (n < 0 && (errno == EINTR || errno == EAGAIN));
    return n == 1 ? c : 0;
}

/* ---- the result ---- */

static bool print(int fd, const char *p, size_t n)
{
    while (n) {
        ssize_t w = write(fd, p, n);
        if (w < 0 && errno == EINTR)
            continue;
        if (w <= 0)
            return false;
        p += w;
        n -= (size_t)w;
    }
    return true;
}

/* Exit status, length of what goes to stdout and of what goes to stderr, 4 bytes each, then both. */
static _Noreturn void relay(int fd, const char *name)
{
    static char buf[RESULT_MAX];
    uint32_t head[3] = {0};
    size_t n = 0;
    int64_t until = now_ms() + RESULT_MS;
    while (n < sizeof buf && wait_for(fd, POLLIN, until)) {
        ssize_t got = read(fd, buf + n, sizeof buf - n);
        if (got < 0 && (errno == EINTR || errno == EAGAIN))
            continue;
        if (got <= 0)
            break;
        n += (size_t)got;
        if (n >= sizeof head) {
            memcpy(head, buf, sizeof head);
            if ((uint64_t)head[1] + head[2] + sizeof head <= n) {
                /* A daemon whose address is not printed ends again: that we have done so is the last word. */
                bool printed = print(1, buf + sizeof head, head[1]);
                print(2, buf + sizeof head + head[1], head[2]);
                if (printed)
                    send(fd, "P", 1, MSG_NOSIGNAL);
                _exit(printed ? (int)head[0] : 1);
            }
        }
    }
    dprintf(2, "%s: %s\n", name, now_ms() < until ? "it ended without a word" : "no result in time");
    _exit(1);
}

/* ---- a template for those who come after us ---- */

#ifndef SYS_close_range
#define SYS_close_range 436
#endif

/* Made with what a template's name says, and nothing else. The lock is held until it listens or has ended: who gets it later than
 * that has still seen no template, so it looks once more. A connection if there is one by now, else -1. */
static int start_template(int directory, const char *path, const char *name)
{
    char file[64];
    struct stat st;
    snprintf(file, sizeof file, "%s.no", name);
    if (fstatat(directory, file, &st, 0) == 0) { /* it has refused itself; the file says why */
        note("refused", file);
        return -1;
    }
    snprintf(file, sizeof file, "%s.lock", name);
    int lock = openat(directory, file, O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (lock < 0)
        return -1;
    snprintf(file, sizeof file, "%s.sock", name);
    int fd = -1;
    if (flock(lock, LOCK_EX | LOCK_NB) < 0 /* somebody starts it */ || (fd = dial(directory, file)) >= 0) {
        close(lock);
        return fd;
    }
    size_t n = 0;
    for (char **e = environ; *e; e++)
        n += read_at_start(*e);
    char **env = calloc(n + 2, sizeof *env), *idle = getenv("SHIMCORE_TEMPLATE_IDLE");
    char idle_variable[64];
    n = 0;
    for (char **e = environ; env && *e; e++)
        if (read_at_start(*e))
            env[n++] = *e;
    if (env && idle && snprintf(idle_variable, sizeof idle_variable, "SHIMCORE_TEMPLATE_IDLE=%s", idle) < (int)sizeof idle_variable)
        env[n] = idle_variable;
    /* Twice, so that the template is nobody's child: the process that we become knows nothing of it. */
    pid_t pid = env ? fork() : -1;
    if (pid == 0) {
        sigset_t none;
        sigemptyset(&none);
        sigprocmask(SIG_SETMASK, &none, NULL);
        setsid();
        if (fork() == 0) {
            int null = open("/dev/null", O_RDWR), kept = dup2(lock, 3);
            if (null < 0 || kept < 0 || chdir("/") < 0)
                _exit(1);
            for (int i = 0; i < 3; i++)
                dup2(null, i);
            if (syscall(SYS_close_range, 4, ~0U, 0) < 0)
                for (int i = 4; i < 4096; i++) /* before Linux 5.9 */
                    close(i);
            execle(interpreter, interpreter, "-IS", script, "--shimcore-template", path, name, (char *)NULL, env);
        }
        _exit(0);
    }
    if (pid > 0)
        while (waitpid(pid, NULL, 0) < 0 && errno == EINTR)
            ;
    free(env);
    close(lock);
    return -1;
}

int main(int argc, char **argv)
{
    load();
    trace = getenv("SHIMCORE_TEMPLATE_TRACE");
    if (getenv("SHIMCORE_UPGRADE")) /* by a daemon, which is to be this very process (upgrade.py) */
        plain(argc, argv, "an upgrade");
    const char *off = getenv("SHIMCORE_TEMPLATE"), *path = getenv("SHIMCORE_TEMPLATE_DIR");
    if (off ? !strcmp(off, "0") || !strcmp(off, "off") : !wanted)
        plain(argc, argv, "off");
    if (argc < 1)
        return 1;
    if (!path || !*path)
        path = DIRECTORY;
    int directory = open_directory(path);
    if (directory < 0)
        plain(argc, argv, "the directory can't be used");
    struct key key = make_key();
    char name[40], file[48];
    snprintf(name, sizeof name, "%016llx%016llx", (unsigned long long)key.a, (unsigned long long)key.b);
    snprintf(file, sizeof file, "%s.sock", name);
    int fd = dial(directory, file);
    if (fd < 0) {
        if (errno != ENOENT && errno != ECONNREFUSED)
            plain(argc, argv, strerror(errno));
        fd = start_template(directory, path, name);
        if (fd < 0)
            plain(argc, argv, "no template yet");
    }
    close(directory);
    make_request(argv);
    int64_t until = now_ms() + ANSWER_MS;
    if (!send_request(fd, until))
        plain(argc, argv, "the request could not be sent");
    char c = answer(fd, until);
    if (c != 'R')
        plain(argc, argv, c == 'S' ? "the code has changed" : c == 'N' ? "the template refused" : "no answer");
    if (send(fd, "G", 1, MSG_NOSIGNAL) != 1)
        plain(argc, argv, "the template has gone");
    note("warm", "");
    relay(fd, argv[0]);
}
