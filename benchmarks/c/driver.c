/* containerd's Events endpoint, and the hand that opens the gates: it lets processes die and stamps the frames that tell of it.
 *
 *   driver SOCKET STAMPS
 *
 * Commands on stdin, answers on stdout:
 *   chain FIRST COUNT FILE PAUSE ADDRESS SERVICE ID   one death after the other, see chain(); PAUSE: ms between two
 *   burst FIRST COUNT FILE ASLEEP                     all at once; ASLEEP 1: nothing is read before all are dead
 * Each writes a line "slot death read exited_at" for each process to FILE, in ns of CLOCK_MONOTONIC, and then answers "ok", or
 * "lost N". A frame's stamp is taken right after the read that completes it; every Forward is answered at once. */
#define _GNU_SOURCE
#include <poll.h>
#include <sys/epoll.h>

#include "bench.h"
#include "frame.h"

enum { LIMIT_MS = 20000, CONNS = 64 };

typedef struct {
    int fd;
    sc_buf in;
} conn;

static bench_stamps *all;
static size_t slots;
static int64_t *read_at, *exited_at;
static size_t seen; /* exits, of slots that had not been seen */
static int ep, listener;
static conn conns[CONNS];
static int64_t real_ahead; /* CLOCK_REALTIME less CLOCK_MONOTONIC */

static sc_slice field(sc_slice in, uint32_t number)
{
    sc_reader r = {in.p, in.p + in.n};
    sc_field f;
    while (sc_read_field(&r, &f) == 1)
        if (f.type == 2 && f.field == number)
            return f.bytes;
    return (sc_slice){in.p, 0};
}

static int64_t timestamp(sc_slice in)
{
    sc_reader r = {in.p, in.p + in.n};
    sc_field f;
    int64_t ns = 0;
    while (sc_read_field(&r, &f) == 1)
        ns += f.field == 1 ? (int64_t)f.value * 1000000000 : f.field == 2 ? (int64_t)f.value : 0;
    return ns;
}

/* TaskExit{container_id=1 id=2 pid=3 exit_status=4 exited_at=5}; the id of slot 7 is e7. */
static void note_exit(sc_slice event, int64_t at)
{
    sc_slice id = field(event, 2);
    if (id.n < 2 || id.p[0] != 'e')
        return;
    size_t slot = 0;
    for (size_t i = 1; i < id.n; i++)
        slot = slot * 10 + (size_t)(id.p[i] - '0');
    if (slot >= slots || read_at[slot])
        return;
    read_at[slot] = at;
    exited_at[slot] = timestamp(field(event, 5)) - real_ahead;
    seen++;
}

static void frames(conn *c, int64_t at)
{
    size_t done = 0;
    while (c->in.len - done >= SC_HEADER) {
        sc_header h;
        sc_header_read(c->in.p + done, &h);
        if (c->in.len - done - SC_HEADER < h.length)
            break;
        sc_request q;
        if (h.type == SC_REQUEST && sc_request_parse(c->in.p + done + SC_HEADER, h.length, &q)) {
            uint8_t answer[SC_HEADER];
            sc_header_write(answer, 0, h.stream, SC_RESPONSE, 0);
            write_all(c->fd, answer, sizeof answer);
            sc_slice envelope = field(q.payload, 1);
            if (sc_slice_is(field(envelope, 3), "/tasks/exit"))
                note_exit(field(field(envelope, 4), 2), at);
        }
        done += SC_HEADER + h.length;
    }
    sc_buf_shift(&c->in, done);
}

static void hang_up(conn *c)
{
    close(c->fd);
    sc_buf_free(&c->in);
    c->fd = -1;
}

static void readable(conn *c)
{
    if (!sc_buf_reserve(&c->in, 16384))
        die("memory");
    ssize_t n = recv(c->fd, c->in.p + c->in.len, 16384, MSG_DONTWAIT);
    int64_t at = now_ns(CLOCK_MONOTONIC);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (n <= 0) {
        hang_up(c);
        return;
    }
    c->in.len += (size_t)n;
    frames(c, at);
}

static void welcome(void)
{
    int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
    for (int i = 0; fd >= 0 && i < CONNS; i++) {
        if (conns[i].fd >= 0)
            continue;
        conns[i].fd = fd;
        struct epoll_event ev = {.events = EPOLLIN, .data.ptr = &conns[i]};
        epoll_ctl(ep, EPOLL_CTL_ADD, fd, &ev);
        return;
    }
    close(fd);
}

static bool pump(int ms)
{
    struct epoll_event evs[CONNS];
    int n = epoll_wait(ep, evs, CONNS, ms);
    for (int i = 0; i < n; i++) {
        if (evs[i].data.ptr == &listener)
            welcome();
        else if (evs[i].data.ptr)
            readable(evs[i].data.ptr);
    }
    return n != 0;
}

/* One State of the container, answered. */
static void ask_state(int fd, sc_buf *request, uint32_t stream)
{
    uint8_t answer[4096];
    for (int i = 0; i < 4; i++)
        request->p[4 + i] = (uint8_t)(stream >> 8 * (3 - i));
    write_all(fd, request->p, request->len);
    size_t got = 0;
    sc_header h = {0};
    while (got < SC_HEADER || got < SC_HEADER + h.length) {
        ssize_t n = recv(fd, answer + got, sizeof answer - got, 0);
        if (n <= 0)
            die("State");
        got += (size_t)n;
        if (got >= SC_HEADER)
            sc_header_read(answer, &h);
        if (SC_HEADER + h.length > sizeof answer)
            die("State's answer is long");
    }
}

static void report(const char *file, size_t first, size_t count)
{
    FILE *f = fopen(file, "we");
    size_t lost = 0;
    if (!f)
        die(file);
    for (size_t i = first; i < first + count; i++) {
        lost += !read_at[i];
        fprintf(f, "%zu %lld %lld %lld\n", i, (long long)atomic_load(&all->slots[i].death), (long long)read_at[i],
                (long long)exited_at[i]);
    }
    if (fclose(f))
        die(file);
    if (lost)
        printf("lost %zu\n", lost);
    else
        printf("ok\n");
}

/* The next process may die when the exit of the one before has been acknowledged and two more calls have been answered: by then
 * the shim is done with what it does after telling, and no clock had to be waited for. */
static void chain(size_t first, size_t count, const char *file, int pause, const char *address, const char *service, const char *id)
{
    int fd = unix_socket(address, 0);
    uint8_t payload[256], *end = sc_write_bytes(payload, 1, id, strlen(id));
    sc_buf request = {0};
    uint32_t stream = 1;
    sc_request_frame(&request, stream, (sc_slice){(const uint8_t *)service, strlen(service)}, (sc_slice){(const uint8_t *)"State", 5},
                     (sc_slice){payload, (size_t)(end - payload)}, 0);
    for (size_t i = first; i < first + count; i++)
        if (wait_while(&all->slots[i].ready, 0) < 0)
            die("a process is not at its gate");
    for (size_t i = first; i < first + count; i++) {
        size_t before = seen;
        set_and_wake(&all->slots[i].gate, 1);
        while (seen == before && pump(LIMIT_MS))
            ;
        for (int k = 0; k < 2; k++, stream += 2)
            ask_state(fd, &request, stream);
        for (int64_t until = now_ns(CLOCK_MONOTONIC) + pause * 1000000LL, left; (left = until - now_ns(CLOCK_MONOTONIC)) > 0;)
            pump((int)(left / 1000000) + 1);
    }
    sc_buf_free(&request);
    close(fd);
    report(file, first, count);
}

static void burst(size_t first, size_t count, const char *file, bool asleep)
{
    size_t before = seen;
    atomic_store(&all->dead, 0);
    atomic_store(&all->want, (uint32_t)count);
    set_and_wake(&all->gate, 1);
    uint32_t dead;
    while (asleep && (dead = atomic_load(&all->dead)) < count && wait_while(&all->dead, dead) == 0)
        ;
    while (seen < before + count && pump(LIMIT_MS))
        ;
    report(file, first, count);
    atomic_store(&all->gate, 0);
}

static void command(char *line)
{
    char file[256], address[256], service[128], id[128];
    size_t first, count;
    int asleep, pause;
    real_ahead = now_ns(CLOCK_REALTIME) - now_ns(CLOCK_MONOTONIC); /* anew each time: only the former is ever set */
    if (sscanf(line, "chain %zu %zu %255s %d %255s %127s %127s", &first, &count, file, &pause, address, service, id) == 7)
        chain(first, count, file, pause, address, service, id);
    else if (sscanf(line, "burst %zu %zu %255s %d", &first, &count, file, &asleep) == 4)
        burst(first, count, file, asleep);
    else
        printf("what? %s", line);
    fflush(stdout);
}

int main(int argc, char **argv)
{
    if (argc != 3)
        return 2;
    all = map_stamps(argv[2], &slots);
    read_at = calloc(slots, sizeof *read_at);
    exited_at = calloc(slots, sizeof *exited_at);
    for (int i = 0; i < CONNS; i++)
        conns[i].fd = -1;
    ep = epoll_create1(EPOLL_CLOEXEC);
    listener = unix_socket(argv[1], 1);
    struct epoll_event ev = {.events = EPOLLIN, .data.ptr = &listener};
    epoll_ctl(ep, EPOLL_CTL_ADD, listener, &ev);
    setvbuf(stdin, NULL, _IONBF, 0); /* what stdio has read ahead, poll does not show */
    printf("ok\n");
    fflush(stdout);
    struct pollfd p[2] = {{.fd = 0, .events = POLLIN}, {.fd = ep, .events = POLLIN}};
    char line[1024];
    for (;;) {
        if (poll(p, 2, -1) < 0 && errno != EINTR)
            die("poll");
        if (p[1].revents)
            pump(0);
        if (p[0].revents) {
            if (!fgets(line, sizeof line, stdin))
                return 0;
            command(line);
        }
    }
}
