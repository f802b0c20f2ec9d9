/* An OCI runtime without containers, with runc's command line, for tests that decide what it does and when.
 *
 *   [--root DIR] [--log FILE] [--log-format json] [--systemd-cgroup]
 *   create --bundle DIR --pid-file FILE ID | start ID | exec --detach --process FILE --pid-file FILE ID |
 *   delete [--force] ID | kill ID SIGNAL | state ID | ps ID | pause ID | resume ID | update ID | features
 *
 * As far as a shim sees it, this is runc: `create` leaves a process that reparents to the nearest subreaper and waits for
 * `start`, `exec` one that runs. Processes are plain ones: no namespaces, no cgroups, and the environment that the shim gave,
 * by which a rig finds them again. Both fork twice, so that a process may be the shim's, and dead, while the runtime runs.
 *
 * Steps, at which a rule may do something: `begin`; `made`, the process is there and its pid file is not (create, exec), or
 * the process has been let go (start); `end`, all has been done. Rules are the lines of the first of these files in the
 * directory $SHIMCORE_FAKE_RUNTIME that is there: COMMAND.ID.EXEC, COMMAND.ID, COMMAND. A line is a step and
 *
 *   hold       say so on the socket `control` and wait there for `go`, `exit N` or `kill N`
 *   exit N     end with that status              kill N     die by that signal
 *   signal N   send the process a signal, and wait for its death if that is SIGKILL
 *   dead       wait for the process's death      log TEXT   write an error to the runtime's log
 *   stderr F   copy file F to stderr
 *
 * Programs that need no exec, as args of a process: @exit N, @signal N (a core dump allowed), @sleep, @gate FIFO N (exit with
 * N, or die by signal -N, once somebody has the FIFO open for writing), @orphans N (leave N orphans that exit with 1, then
 * sleep), @signals FILE (append a line for each signal that comes; SIGKILL ends it). */
#define _GNU_SOURCE
#include "fake_parts.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>

static const char *root = "/run/fake-runtime", *logfile, *bundle = ".", *pid_file, *process_file, *command = "", *id = "", *dir;
static char exec_id[256], *rules;
static bool force;

/* ---- errors ---- */

static void log_error(const char *text)
{
    char *line;
    if (logfile && asprintf(&line, "{\"level\":\"error\",\"msg\":\"%s\"}\n", text) >= 0)
        append(logfile, line);
    dprintf(2, "%s\n", text);
}

static void fail(const char *text)
{
    log_error(text);
    exit(1);
}

/* ---- processes ---- */

static int pidfd(pid_t pid)
{
    return (int)syscall(434, pid, 0); /* pidfd_open */
}

static void await_death(int fd, int ms)
{
    struct pollfd p = {.fd = fd, .events = POLLIN};
    if (fd >= 0)
        while (poll(&p, 1, ms) < 0 && errno == EINTR)
            ;
}

/* Field 22 of /proc/PID/stat, in ticks since boot; 0: there is no such process, or it is a zombie. */
static unsigned long long start_time(pid_t pid)
{
    char name[64], state = 'Z';
    unsigned long long start = 0;
    snprintf(name, sizeof name, "/proc/%d/stat", pid);
    char *text = slurp(name), *p = text ? strrchr(text, ')') : NULL;
    if (p)
        sscanf(p + 2, "%c %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %llu", &state, &start);
    free(text);
    return state == 'Z' || state == 'X' ? 0 : start;
}

/* init's pid, 0 when it is dead; exits when there is no such container. */
static pid_t init_pid(void)
{
    char *text = slurp(path(root, id, "state.json"));
    if (!text)
        fail("container does not exist");
    const char *pid = member(text, "init_process_pid"), *start = member(text, "init_process_start");
    pid_t n = pid ? (pid_t)atol(pid) : 0;
    return n > 0 && start && start_time(n) == strtoull(start, NULL, 10) ? n : 0;
}

static int signals_fd;

static void note_signal(int sig)
{
    char line[16];
    int saved = errno, n = snprintf(line, sizeof line, "%d\n", sig);
    if (write(signals_fd, line, (size_t)n) < 0)
        _exit(99);
    errno = saved;
}

static void end_by(int how)
{
    struct rlimit all = {RLIM_INFINITY, RLIM_INFINITY};
    if (how >= 0)
        _exit(how);
    setrlimit(RLIMIT_CORE, &all);
    signal(-how, SIG_DFL);
    raise(-how);
    for (;;)
        pause(); /* a signal that ends nobody */
}

static void become(char **args)
{
    const char *a = args[0] ? args[0] : "@exit", *b = args[0] && args[1] ? args[1] : "0";
    if (!strcmp(a, "@exit"))
        end_by(atoi(b));
    if (!strcmp(a, "@signal"))
        end_by(-atoi(b));
    if (!strcmp(a, "@gate")) {
        int fd = open(b, O_RDONLY); /* returns when a writer has come (fifo(7)) */
        end_by(fd < 0 ? 98 : args[2] ? atoi(args[2]) : 0);
    }
    if (!strcmp(a, "@orphans")) {
        for (int n = atoi(b); n > 0; n--)
            if (fork() == 0)
                _exit(fork() == 0); /* the parent is gone at once, and its child is an orphan */
        while (wait(NULL) > 0 || errno == EINTR)
            ;
    }
    if (!strcmp(a, "@signals")) {
        signals_fd = open(b, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
        for (int sig = 1; sig < 65; sig++)
            signal(sig, note_signal);
    }
    while (*a == '@')
        pause();
    execvp(a, args);
    dprintf(2, "%s: %s\n", a, strerror(errno));
    _exit(127);
}

/* The spec's process, as an orphan. fifo: what to wait on before it runs, NULL: nothing. */
static pid_t make(const char *spec, const char *fifo)
{
    char **args = strings(member(spec, "args")), **env = strings(member(spec, "env"));
    const char *cwd = member(spec, "cwd");
    char *at = cwd && *cwd == '"' ? string(&cwd) : NULL;
    int link[2];
    if (!args || !args[0])
        fail("process.args is empty");
    if (pipe2(link, O_CLOEXEC) < 0)
        fail("pipe");
    pid_t middle = fork(), pid = 0;
    if (middle == 0) {
        if ((pid = fork()) != 0) {
            _exit(write(link[1], &pid, sizeof pid) != sizeof pid);
        }
        close(link[0]);
        close(link[1]);
        setsid();
        if (fifo) {
            int fd = open(fifo, O_WRONLY | O_CLOEXEC);
            if (fd < 0 || write(fd, "0", 1) != 1)
                _exit(97);
            close(fd);
        }
        for (; env && *env; env++)
            if (strncmp(*env, "SHIMCORE", 8) != 0)
                putenv(*env);
        if (at && strcmp(at, "/") != 0 && chdir(at) < 0)
            _exit(96);
        become(args);
    }
    close(link[1]);
    if (middle < 0 || read(link[0], &pid, sizeof pid) != sizeof pid || pid <= 0)
        fail("fork");
    close(link[0]);
    waitpid(middle, NULL, 0);
    return pid;
}

/* ---- rules ---- */

static void obey(const char *verb)
{
    int n = 0;
    if (sscanf(verb, "exit %d", &n) == 1)
        _exit(n);
    if (sscanf(verb, "kill %d", &n) == 1)
        raise(n);
}

static void hold(const char *step, pid_t pid)
{
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    snprintf(a.sun_path, sizeof a.sun_path, "%s/control", dir);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&a, sizeof a) < 0)
        fail("nobody holds the runtime");
    dprintf(fd, "%d\t%d\t%s\t%s\t%s\t%s\n", getpid(), pid, command, step, id, exec_id);
    char answer[64];
    ssize_t got = read(fd, answer, sizeof answer - 1);
    answer[got > 0 ? got : 0] = 0;
    close(fd);
    obey(answer);
}

static void step(const char *name, pid_t pid)
{
    size_t n = strlen(name);
    for (const char *p = rules; p && *p; p = strchr(p, '\n') ? strchr(p, '\n') + 1 : "") {
        if (strncmp(p, name, n) != 0 || p[n] != ' ')
            continue;
        char *verb = strndup(p + n + 1, strcspn(p + n + 1, "\n")), *rest = strchr(verb, ' ');
        rest = rest ? rest + 1 : verb + strlen(verb);
        int fd = pid ? pidfd(pid) : -1;
        if (!strcmp(verb, "hold"))
            hold(name, pid);
        else if (!strncmp(verb, "signal ", 7)) {
            if (fd >= 0)
                syscall(424, fd, atoi(rest), NULL, 0); /* pidfd_send_signal */
            if (atoi(rest) == SIGKILL)
                await_death(fd, -1);
        } else if (!strcmp(verb, "dead"))
            await_death(fd, -1);
        else if (!strncmp(verb, "log ", 4))
            log_error(rest);
        else if (!strncmp(verb, "stderr ", 7)) {
            int from = open(rest, O_RDONLY | O_CLOEXEC);
            while (sendfile(2, from, NULL, 1 << 20) > 0)
                ;
            close(from);
        } else
            obey(verb);
        if (fd >= 0)
            close(fd);
        free(verb);
    }
}

static void load_rules(void)
{
    char *line, *name;
    dir = getenv("SHIMCORE_FAKE_RUNTIME");
    if (!dir)
        return;
    if (asprintf(&line, "%s %s%s%s\n", command, id, *exec_id ? " " : "", exec_id) >= 0)
        append(path(dir, "calls", NULL), line);
    if (*exec_id && asprintf(&name, "%s/%s.%s.%s", dir, command, id, exec_id) >= 0)
        rules = slurp(name);
    if (!rules && asprintf(&name, "%s/%s.%s", dir, command, id) >= 0)
        rules = slurp(name);
    if (!rules)
        rules = slurp(path(dir, command, NULL));
}

/* ---- commands ---- */

static void write_pid(pid_t pid)
{
    char text[16];
    snprintf(text, sizeof text, "%d", pid);
    if (pid_file && !replace(pid_file, text))
        fail("the pid file can't be written");
}

static void create(void)
{
    char *text = slurp(path(bundle, "config.json", NULL)), *state;
    const char *spec = member(text, "process");
    if (!spec)
        fail("config.json has no process");
    for (char *p = strdup(path(root, id, NULL)), *q = p; q; *q = '/') { /* mkdir -p */
        if ((q = strchr(q + 1, '/')))
            *q = 0;
        if (mkdir(p, 0700) < 0 && (errno != EEXIST || !q))
            fail(errno == EEXIST ? "container with given ID already exists" : "the state directory can't be made");
        if (!q)
            break;
    }
    char *fifo = path(root, id, "exec.fifo");
    if (mkfifo(fifo, 0600) < 0)
        fail("exec.fifo can't be made");
    pid_t pid = make(spec, fifo);
    if (asprintf(&state, "{\"id\":\"%s\",\"init_process_pid\":%d,\"init_process_start\":%llu}", id, pid, start_time(pid)) < 0 ||
        !replace(path(root, id, "state.json"), state))
        fail("the state can't be written");
    step("made", pid);
    write_pid(pid);
    step("end", pid);
}

static void start(void)
{
    pid_t pid = init_pid();
    char *fifo = path(root, id, "exec.fifo"), byte;
    int to = open(fifo, O_RDONLY | O_NONBLOCK | O_CLOEXEC), fd = pid ? pidfd(pid) : -1;
    if (to < 0)
        fail("cannot start a container that has been started");
    struct pollfd p[2] = {{.fd = to, .events = POLLIN}, {.fd = fd, .events = POLLIN}};
    if (pid == 0 || (poll(p, 2, -1) > 0 && !(p[0].revents & POLLIN)) || read(to, &byte, 1) != 1)
        fail("cannot start a container that has stopped");
    unlink(fifo);
    step("made", pid);
    step("end", pid);
}

static void delete(void)
{
    pid_t pid = init_pid();
    if (pid && !force)
        fail("cannot delete container that is not stopped");
    int fd = pid ? pidfd(pid) : -1;
    if (fd >= 0 && start_time(pid))
        syscall(424, fd, SIGKILL, NULL, 0);
    if (pid)
        await_death(fd, 1000);
    unlink(path(root, id, "exec.fifo"));
    unlink(path(root, id, "state.json"));
    rmdir(path(root, id, NULL));
    step("end", 0);
}

int main(int argc, char **argv)
{
    const char *signal_name = "15";
    for (int i = 1; i < argc; i++) {
        const char *a = argv[i], *next = i + 1 < argc ? argv[i + 1] : "";
        const char **into = !strcmp(a, "--root") ? &root : !strcmp(a, "--log") ? &logfile : !strcmp(a, "--bundle") ? &bundle
            : !strcmp(a, "--pid-file") ? &pid_file : !strcmp(a, "--process") ? &process_file : NULL;
        if (into)
            *into = next, i++;
        else if (!strcmp(a, "--log-format"))
            i++;
        else if (!strcmp(a, "--force"))
            force = true;
        else if (*a == '-')
            continue; /* switches that change nothing here */
        else if (!*command)
            command = a;
        else if (!*id)
            id = a;
        else
            signal_name = a;
    }
    if (!strcmp(command, "exec") && pid_file) {
        const char *base = strrchr(pid_file, '/');
        snprintf(exec_id, sizeof exec_id, "%s", base ? base + 1 : pid_file);
        char *dot = strrchr(exec_id, '.');
        if (dot)
            *dot = 0;
    }
    if (argc > 2 && !strcmp(argv[1], "run")) /* a program of the list above, as a plain child of the caller */
        become(argv + 2);
    load_rules();
    step("begin", 0);
    if (!strcmp(command, "features")) {
        puts("{\"ociVersionMin\":\"1.0.0\",\"ociVersionMax\":\"1.1.0\"}");
    } else if (!strcmp(command, "create")) {
        create();
    } else if (!strcmp(command, "start")) {
        start();
    } else if (!strcmp(command, "exec")) {
        if (!init_pid())
            fail("cannot exec in a stopped container");
        pid_t pid = make(slurp(process_file ? process_file : ""), NULL);
        step("made", pid);
        write_pid(pid);
        step("end", pid);
    } else if (!strcmp(command, "delete")) {
        delete();
    } else {
        pid_t pid = init_pid();
        if (!strcmp(command, "kill") && (!pid || kill(pid, atoi(signal_name)) < 0))
            fail("process already finished");
        if (!strcmp(command, "ps"))
            printf("[%d]\n", pid);
        if (!strcmp(command, "state"))
            printf("{\"ociVersion\":\"1.0.2\",\"id\":\"%s\",\"status\":\"%s\",\"pid\":%d,\"bundle\":\"%s\"}\n", id,
                   !pid ? "stopped" : access(path(root, id, "exec.fifo"), F_OK) ? "running" : "created", pid, bundle);
        step("end", pid);
    }
    return 0;
}
