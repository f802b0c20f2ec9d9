/* The floor: a bare loop that does what nobody who tells of exits can leave out. pidfd readable → waitid → TaskExit → socket; on
 * the same thread it answers State. No ledger, no order, no retry, nothing held back.
 *
 *   loop SOCKET EVENTS NAMESPACE ID
 *
 * Commands on stdin, words parted by tabs, answers on stdout:
 *   run ARG...               run a program to its end                    → its exit status
 *   own SLOT FILE            wait for the process whose pid is in FILE, and for the following slots' if there are more → count
 *   spin ARG... / unspin     a program that runs beside it               → its pid
 */
#define _GNU_SOURCE
#include <signal.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/wait.h>

#include "bench.h"
#include "frame.h"

typedef struct {
    enum { LISTENER, CONTROL, EVENTS, CALLER, PROCESS } kind;
    int fd;
    pid_t pid;
    unsigned slot;
    sc_buf in;
} source;

static const char *ns, *container;
static int ep;
static uint32_t stream = 1;
static source events;
static sc_buf unsent;
static pid_t spinner;
static char answer_state[512];
static size_t answer_len;

static void watch(source *s, uint32_t what, int op)
{
    struct epoll_event ev = {.events = what, .data.ptr = s};
    if (epoll_ctl(ep, op, s->fd, &ev) < 0)
        die("epoll_ctl");
}

static void send_events(void)
{
    while (unsent.len) {
        ssize_t n = send(events.fd, unsent.p, unsent.len, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n < 0 && errno != EAGAIN && errno != EINTR)
            die("events");
        if (n < 0)
            break;
        sc_buf_shift(&unsent, (size_t)n);
    }
    static bool armed;
    if (armed != (unsent.len > 0)) {
        armed = !armed;
        watch(&events, EPOLLIN | (armed ? EPOLLOUT : 0), EPOLL_CTL_MOD);
    }
}

static void tell(const source *s, int status)
{
    static const char service[] = "containerd.services.events.ttrpc.v1.Events", topic[] = "/tasks/exit",
                      type[] = "containerd.events.TaskExit";
    uint8_t exit[512], any[640], envelope[1024], forward[1100], *p;
    char id[16];
    int64_t now = now_ns(CLOCK_REALTIME);
    snprintf(id, sizeof id, "e%u", s->slot);
    p = sc_write_bytes(exit, 1, container, strlen(container));
    p = sc_write_bytes(p, 2, id, strlen(id));
    p = sc_write_uint(p, 3, (uint64_t)s->pid);
    if (status)
        p = sc_write_uint(p, 4, (uint64_t)status);
    p = sc_write_timestamp(p, 5, now);
    uint8_t *q = sc_write_bytes(any, 1, type, sizeof type - 1);
    q = sc_write_bytes(q, 2, exit, (size_t)(p - exit));
    p = sc_write_timestamp(envelope, 1, now);
    p = sc_write_bytes(p, 2, ns, strlen(ns));
    p = sc_write_bytes(p, 3, topic, sizeof topic - 1);
    p = sc_write_bytes(p, 4, any, (size_t)(q - any));
    q = sc_write_bytes(forward, 1, envelope, (size_t)(p - envelope));
    bool at_once = !unsent.len;
    sc_request_frame(&unsent, stream, (sc_slice){(const uint8_t *)service, sizeof service - 1},
                     (sc_slice){(const uint8_t *)"Forward", 7}, (sc_slice){forward, (size_t)(q - forward)}, 0);
    stream += 2;
    if (at_once)
        send_events();
}

static void reap(source *s)
{
    siginfo_t info = {0};
    if (waitid((idtype_t)3 /* P_PIDFD */, (id_t)s->fd, &info, WEXITED | WNOHANG) < 0)
        die("waitid");
    if (!info.si_pid)
        return;
    close(s->fd);
    tell(s, info.si_code == CLD_EXITED ? info.si_status : 128 + info.si_status);
    free(s);
}

static void hang_up(source *s)
{
    close(s->fd);
    sc_buf_free(&s->in);
    free(s);
}

static void serve(source *s)
{
    if (!sc_buf_reserve(&s->in, 4096))
        die("memory");
    ssize_t n = recv(s->fd, s->in.p + s->in.len, 4096, MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (n <= 0) {
        hang_up(s);
        return;
    }
    s->in.len += (size_t)n;
    size_t done = 0;
    while (s->in.len - done >= SC_HEADER) {
        sc_header h;
        sc_header_read(s->in.p + done, &h);
        if (s->in.len - done - SC_HEADER < h.length)
            break;
        sc_header_write((uint8_t *)answer_state, (uint32_t)(answer_len - SC_HEADER), h.stream, SC_RESPONSE, 0);
        ssize_t sent = send(s->fd, answer_state, answer_len, MSG_NOSIGNAL | MSG_DONTWAIT);
        (void)sent; /* a caller that has gone; its socket's end is read next */
        done += SC_HEADER + h.length;
    }
    sc_buf_shift(&s->in, done);
}

static void acknowledged(void)
{
    char buf[16384];
    if (recv(events.fd, buf, sizeof buf, MSG_DONTWAIT) == 0)
        exit(0);
}

static void welcome(int listener)
{
    int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    source *s = calloc(1, sizeof *s);
    if (fd < 0 || !s)
        die("accept");
    s->kind = CALLER;
    s->fd = fd;
    watch(s, EPOLLIN, EPOLL_CTL_ADD);
}

static pid_t spawn(char **argv)
{
    pid_t pid = fork();
    if (pid < 0)
        die("fork");
    if (pid)
        return pid;
    int null = open("/dev/null", O_RDWR);
    dup2(null, 0);
    dup2(null, 1);
    dup2(null, 2);
    execvp(argv[0], argv);
    _exit(127);
}

static int wait_for(pid_t pid)
{
    int status = 0;
    while (waitpid(pid, &status, 0) < 0)
        if (errno != EINTR)
            die("waitpid");
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

static int own(unsigned slot, const char *file)
{
    FILE *f = fopen(file, "re");
    int pid, count = 0;
    while (f && fscanf(f, "%d", &pid) == 1) {
        source *s = calloc(1, sizeof *s);
        s->kind = PROCESS;
        s->pid = pid;
        s->slot = slot++;
        s->fd = (int)syscall(SYS_pidfd_open, pid, 0);
        if (s->fd < 0)
            die("pidfd_open");
        watch(s, EPOLLIN, EPOLL_CTL_ADD);
        count++;
    }
    if (f)
        fclose(f);
    return count;
}

static void command(void)
{
    char line[8192], *words[64], *at = line;
    int n = 0;
    if (!fgets(line, sizeof line, stdin))
        exit(0);
    line[strcspn(line, "\n")] = 0;
    while (n < 63 && (words[n] = strsep(&at, "\t")))
        n++;
    words[n] = NULL;
    int result = -1;
    if (!strcmp(words[0], "run") && n > 1)
        result = wait_for(spawn(words + 1));
    else if (!strcmp(words[0], "own") && n == 3)
        result = own((unsigned)atoi(words[1]), words[2]);
    else if (!strcmp(words[0], "spin") && n > 1)
        result = spinner = spawn(words + 1);
    else if (!strcmp(words[0], "unspin") && spinner) {
        kill(spinner, SIGKILL);
        result = wait_for(spinner);
        spinner = 0;
    }
    printf("%d\n", result);
    fflush(stdout);
}

int main(int argc, char **argv)
{
    if (argc != 5)
        return 2;
    ns = argv[3];
    container = argv[4];
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
    ep = epoll_create1(EPOLL_CLOEXEC);
    static source listener, control;
    listener = (source){.kind = LISTENER, .fd = unix_socket(argv[1], 1)};
    events = (source){.kind = EVENTS, .fd = unix_socket(argv[2], 0)};
    control = (source){.kind = CONTROL, .fd = 0};
    setvbuf(stdin, NULL, _IONBF, 0);
    watch(&listener, EPOLLIN, EPOLL_CTL_ADD);
    watch(&events, EPOLLIN, EPOLL_CTL_ADD);
    watch(&control, EPOLLIN, EPOLL_CTL_ADD);
    uint8_t state[256], *p = sc_write_bytes(state, 1, container, strlen(container));
    p = sc_write_uint(p, 3, (uint64_t)getpid());
    p = sc_write_uint(p, 4, 2); /* running */
    answer_len = (size_t)(sc_write_bytes((uint8_t *)answer_state + SC_HEADER, 2, state, (size_t)(p - state)) - (uint8_t *)answer_state);
    printf("ok\n");
    fflush(stdout);
    struct epoll_event evs[64];
    for (;;) {
        int n = epoll_wait(ep, evs, 64, -1);
        for (int i = 0; i < n; i++) {
            source *s = evs[i].data.ptr;
            switch (s->kind) {
            case PROCESS: reap(s); break;
            case CALLER: serve(s); break;
            case LISTENER: welcome(s->fd); break;
            case CONTROL: command(); break;
            case EVENTS:
                if (evs[i].events & EPOLLOUT)
                    send_events();
                if (evs[i].events & ~EPOLLOUT)
                    acknowledged();
                break;
            }
        }
    }
}
