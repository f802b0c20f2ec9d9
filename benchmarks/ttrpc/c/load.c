/* The load: load PATH PID SIZE OUTSTANDING WARM_MS MEASURE_MS
 *
 * A closed loop over one connection: OUTSTANDING calls are always under way, each with a message of SIZE bytes; an answer is
 * decoded and checked before the next call takes its place. Sends never block while answers may be read, so a server that
 * sends blocking is served too. PID's CPU time is taken at both ends of the measured time, all its threads counted
 * (clock_getcpuclockid(3)).
 *
 * Prints: calls, ns of measured time, p50 ns, p99 ns, the server's CPU ns, answers per receive in thousandths. */
#include <poll.h>
#include <sys/uio.h>
#include "peer.h"

enum { WINDOW = 65536, MOST = 256, SMALL = 4096, ROOM = 4 << 20, SAMPLES = 16 << 20 };

static int fd;
static size_t size, frame_len;
static sc_buf body; /* a frame from behind its header */
static uint8_t *value;
static int64_t sent_at[WINDOW]; /* by call number; 0: not under way */
static uint64_t issued, answered;
static uint64_t pending[MOST]; /* calls that are not sent whole; a ring */
static size_t pending_at, pending_n, head_sent;
static uint8_t heads[MOST][SC_HEADER];
static uint8_t small[MOST * (SMALL + SC_HEADER)];

static void issue(int64_t now)
{
    uint64_t call = issued++;
    if (sent_at[call % WINDOW]) {
        fprintf(stderr, "call %llu is still not answered after %d later ones\n", (unsigned long long)(call - WINDOW), WINDOW);
        exit(1);
    }
    sent_at[call % WINDOW] = now;
    pending[(pending_at + pending_n++) % MOST] = call;
}

/* Send what the socket takes. */
static void flush(void)
{
    while (pending_n) {
        struct iovec v[2 * MOST];
        size_t bytes = 0, parts = 0;
        for (size_t i = 0; i < pending_n; i++) {
            uint64_t call = pending[(pending_at + i) % MOST];
            uint8_t *head = frame_len <= SMALL ? small + bytes : heads[i];
            sc_header_write(head, (uint32_t)body.len, (uint32_t)(2 * call + 1), SC_REQUEST, SC_FLAG_REMOTE_CLOSED);
            if (frame_len <= SMALL) {
                memcpy(head + SC_HEADER, body.p, body.len);
            } else {
                v[parts++] = (struct iovec){head, SC_HEADER};
                v[parts++] = (struct iovec){body.p, body.len};
            }
            bytes += frame_len;
        }
        struct iovec *first = v;
        if (frame_len <= SMALL) {
            v[parts++] = (struct iovec){small + head_sent, bytes - head_sent};
        } else {
            size_t skip = head_sent;
            for (; skip >= first->iov_len; first++, parts--)
                skip -= first->iov_len;
            first->iov_base = (uint8_t *)first->iov_base + skip;
            first->iov_len -= skip;
        }
        struct msghdr m = {.msg_iov = first, .msg_iovlen = parts};
        ssize_t n = sendmsg(fd, &m, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno == EAGAIN)
            return;
        if (n < 0)
            die("sendmsg");
        for (head_sent += (size_t)n; head_sent >= frame_len; head_sent -= frame_len, pending_n--)
            pending_at = (pending_at + 1) % MOST;
    }
}

/* The call's number; the answer is right, or the program ends. */
static uint64_t check(const sc_header *h, const uint8_t *data, bool whole)
{
    sc_response r;
    sc_slice got;
    uint64_t call = h->stream / 2;
    if (h->type != SC_RESPONSE || !sc_response_parse(data, h->length, &r) || r.code || !value_decode(r.payload, &got) ||
        got.n != size || (size && (got.p[0] != value[0] || got.p[size - 1] != value[size - 1])) ||
        (whole && size && memcmp(got.p, value, size)) || call >= issued || !sent_at[call % WINDOW]) {
        fprintf(stderr, "a wrong answer: stream %u, type %u, %u bytes\n", h->stream, h->type, h->length);
        exit(1);
    }
    return call;
}

static int by_value(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

int main(int argc, char **argv)
{
    if (argc != 7) {
        fprintf(stderr, "usage: %s PATH PID SIZE OUTSTANDING WARM_MS MEASURE_MS\n", argv[0]);
        return 2;
    }
    size = strtoul(argv[3], NULL, 10);
    size_t outstanding = strtoul(argv[4], NULL, 10);
    int64_t warm = atoll(argv[5]) * 1000000, measure = atoll(argv[6]) * 1000000;
    clockid_t cpu_clock;
    uint32_t *samples = malloc(SAMPLES * sizeof *samples);
    uint8_t *rbuf = malloc(ROOM), *inner = malloc(size + 16);
    value = malloc(size + 1);
    if (outstanding < 1 || outstanding > MOST || size > SC_MAX_MESSAGE - 64 || !samples || !rbuf || !inner || !value ||
        clock_getcpuclockid((pid_t)atoi(argv[2]), &cpu_clock)) {
        fprintf(stderr, "1 to %d calls, at most %d bytes, and the pid of a process, please\n", MOST, SC_MAX_MESSAGE - 64);
        return 2;
    }
    for (size_t i = 0; i < size; i++)
        value[i] = (uint8_t)(i * 31 + 7);
    sc_slice payload = {inner, (size_t)(value_encode(inner, value, size) - inner)};
    sc_slice service = {(const uint8_t *)SERVICE, sizeof SERVICE - 1}, method = {(const uint8_t *)METHOD, sizeof METHOD - 1};
    sc_buf frame = {0};
    if (!sc_request_frame(&frame, 1, service, method, payload, 0))
        die("malloc");
    body = (sc_buf){frame.p + SC_HEADER, frame.len - SC_HEADER, 0};
    frame_len = frame.len;
    fd = unix_socket(argv[1], 0);

    int64_t now = now_ns(CLOCK_MONOTONIC), start = now + warm, end = start + measure;
    int64_t began = 0, ended = 0, cpu = 0;
    uint64_t calls = 0, receives = 0;
    size_t have = 0, at = 0;
    for (size_t i = 0; i < outstanding; i++)
        issue(now);
    flush();
    while (answered < issued) {
        if (pending_n) {
            struct pollfd p = {fd, POLLIN | POLLOUT, 0};
            if (poll(&p, 1, 30000) == 0) {
                fprintf(stderr, "no answer in 30 s\n");
                return 1;
            }
            if (p.revents & POLLOUT)
                flush();
            if (!(p.revents & (POLLIN | POLLHUP)))
                continue;
        }
        ssize_t n = recv(fd, rbuf + have, ROOM - have, 0);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0) {
            fprintf(stderr, "the server has closed the connection\n");
            return 1;
        }
        now = now_ns(CLOCK_MONOTONIC);
        have += (size_t)n;
        receives += began && !ended;
        size_t fresh = 0;
        while (have - at >= SC_HEADER) {
            sc_header h;
            sc_header_read(rbuf + at, &h);
            if (have - at - SC_HEADER < h.length)
                break;
            uint64_t call = check(&h, rbuf + at + SC_HEADER, !began);
            if (began && !ended && calls < SAMPLES) {
                int64_t took = now - sent_at[call % WINDOW];
                samples[calls++] = took > UINT32_MAX ? UINT32_MAX : (uint32_t)took;
            }
            sent_at[call % WINDOW] = 0;
            answered++;
            fresh++;
            at += SC_HEADER + h.length;
        }
        if (at == have) {
            at = have = 0;
        } else if (ROOM - have < (1 << 20)) {
            memmove(rbuf, rbuf + at, have - at);
            have -= at;
            at = 0;
        }
        if (!began && now >= start) {
            cpu = now_ns(cpu_clock);
            began = now;
        } else if (began && !ended && now >= end) {
            cpu = now_ns(cpu_clock) - cpu;
            ended = now;
        }
        if (!ended && fresh) {
            now = now_ns(CLOCK_MONOTONIC);
            while (fresh--)
                issue(now);
            flush();
        }
    }
    if (!calls) {
        fprintf(stderr, "not one call in %s ms\n", argv[6]);
        return 1;
    }
    qsort(samples, calls, sizeof *samples, by_value);
    printf("%llu %lld %u %u %lld %llu\n", (unsigned long long)calls, (long long)(ended - began), samples[calls / 2],
           samples[(calls * 99 + 99) / 100 - 1], (long long)cpu, (unsigned long long)(calls * 1000 / receives));
    return 0;
}
