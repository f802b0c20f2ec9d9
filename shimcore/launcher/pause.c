/* Holds a pod's namespaces open: the process whose /proc/PID/ns/ the pod's containers join.
 *
 *   pause FD [net=PATH] [ipc] [uts=HOSTNAME] [pid] [sysctl=NAME=VALUE ...]
 *
 * FD is one end of a socket pair. Two processes: this one, which the shim made and waits for, enters the namespaces and makes
 * the holder, which alone is in a new pid namespace (pid_namespaces(7): it is the child that is). The answer on FD is "ok PID", or
 * the reason why not and the end. After that FD only says whether the shim lives: at its end, however that came about, the
 * holder is killed. When the holder ends, this ends with its code, or 128 and the signal. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

static int control = -1;

static void say(const char *what, const char *about, int error)
{
    char line[1024];
    int n = snprintf(line, sizeof line, "%s%s%s%s%s", what, *about ? " " : "", about, error ? ": " : "",
                     error ? strerror(error) : "");
    if (n >= (int)sizeof line)
        n = sizeof line - 1;
    if (send(control, line, (size_t)n, MSG_NOSIGNAL) < 0)
        return; /* the shim has gone: nobody is left to tell */
}

static void fail(const char *what, const char *about)
{
    say(what, about, errno);
    _exit(1);
}

static void enter(const char *path)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || setns(fd, CLONE_NEWNET) < 0)
        fail("can't enter the network namespace", path);
    close(fd);
}

static void set_sysctl(char *assignment)
{
    char path[512], *value = strchr(assignment, '=');
    if (!value) {
        errno = EINVAL;
        fail("not a sysctl:", assignment);
    }
    *value++ = 0;
    if (strstr(assignment, "..") || snprintf(path, sizeof path, "/proc/sys/%s", assignment) >= (int)sizeof path) {
        errno = EINVAL;
        fail("not a sysctl:", assignment);
    }
    for (char *p = path + sizeof "/proc/sys/" - 1; *p; p++) /* net.ipv4.x, and with a slash where the name has a dot */
        *p = *p == '.' ? '/' : *p == '/' ? '.' : *p;
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0 || write(fd, value, strlen(value)) < 0)
        fail("can't set sysctl", assignment);
    close(fd);
}

/* Reaps what it inherits as pid 1 of the pod; signals but SIGKILL from outside do nothing to it. */
static void hold(int ready)
{
    sigset_t all;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    prctl(PR_SET_NAME, "pause");
    sigfillset(&all);
    sigprocmask(SIG_SETMASK, &all, NULL);
    if (write(ready, "", 1) < 0) /* its parent has gone before the death signal was set */
        _exit(1);
    close(ready);
    close(control);
    for (;;) {
        int signum = sigwaitinfo(&all, NULL);
        if (signum == SIGCHLD)
            while (waitpid(-1, NULL, WNOHANG) > 0)
                ;
    }
}

static int ended(pid_t pid)
{
    int status;
    while (waitpid(pid, &status, 0) < 0)
        if (errno != EINTR)
            return 255;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

static int watch(pid_t holder, int children)
{
    struct pollfd fds[] = {{.fd = control, .events = POLLIN}, {.fd = children, .events = POLLIN}};
    for (;;) {
        char unused[64];
        if (poll(fds, 2, -1) < 0 && errno != EINTR)
            fds[0].revents = POLLERR;
        if (fds[1].revents)
            return ended(holder);
        if (fds[0].revents && recv(control, unused, sizeof unused, MSG_DONTWAIT) <= 0 && errno != EAGAIN && errno != EINTR) {
            kill(holder, SIGKILL);
            return ended(holder);
        }
    }
}

int main(int argc, char **argv)
{
    int flags = 0, ready[2];
    const char *hostname = "";
    sigset_t child;

    if (argc < 2) {
        fputs("this is run by the shim: pause FD [net=PATH] [ipc] [uts=HOSTNAME] [pid] [sysctl=NAME=VALUE]\n", stderr);
        return 2;
    }
    control = atoi(argv[1]);
    fcntl(control, F_SETFD, FD_CLOEXEC);
    for (int i = 2; i < argc; i++) {
        if (!strncmp(argv[i], "net=", 4))
            enter(argv[i] + 4);
        else if (!strcmp(argv[i], "ipc"))
            flags |= CLONE_NEWIPC;
        else if (!strcmp(argv[i], "pid"))
            flags |= CLONE_NEWPID;
        else if (!strncmp(argv[i], "uts=", 4)) {
            flags |= CLONE_NEWUTS;
            hostname = argv[i] + 4;
        } else if (strncmp(argv[i], "sysctl=", 7)) {
            errno = EINVAL;
            fail("unknown argument", argv[i]);
        }
    }
    if (flags && unshare(flags) < 0)
        fail("can't make the pod's namespaces", "");
    if (*hostname && sethostname(hostname, strlen(hostname)) < 0)
        fail("can't set the host name", hostname);
    for (int i = 2; i < argc; i++)
        if (!strncmp(argv[i], "sysctl=", 7))
            set_sysctl(argv[i] + 7);

    sigemptyset(&child);
    sigaddset(&child, SIGCHLD);
    sigprocmask(SIG_BLOCK, &child, NULL);
    int children = signalfd(-1, &child, SFD_CLOEXEC);
    if (children < 0 || pipe2(ready, O_CLOEXEC) < 0)
        fail("can't make the pod's process", "");
    pid_t holder = fork();
    if (holder < 0)
        fail("can't make the pod's process", "");
    if (!holder) {
        close(ready[0]);
        hold(ready[1]);
    }
    close(ready[1]);
    char byte, pid[32];
    if (read(ready[0], &byte, 1) != 1)
        return ended(holder);
    close(ready[0]);
    prctl(PR_SET_NAME, "pause-keeper");
    snprintf(pid, sizeof pid, "%d", (int)holder);
    say("ok", pid, 0);
    return watch(holder, children);
}
