/* The floor: floor [--batched] serve PATH. One thread, blocking receive, one connection after the other.
 *
 * Every whole frame of a receive is parsed, its inner message decoded, and the echo of it encoded. Plainly each answer is sent
 * by itself; --batched sends all answers of one receive at once. Ends when its stdin does. */
#include <pthread.h>
#include "peer.h"

enum { ROOM = 262144 };
static sc_buf in, out;

static void *until_stdin_ends(void *unused)
{
    char c;
    (void)unused;
    while (read(0, &c, 1) > 0)
        ;
    _exit(0);
}

static bool flush(int fd)
{
    size_t at = 0;
    while (at < out.len) {
        ssize_t n = send(fd, out.p + at, out.len - at, MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return false;
        at += (size_t)n;
    }
    out.len = 0;
    return true;
}

static bool answer(uint32_t stream, const uint8_t *data, size_t n)
{
    sc_request q;
    sc_slice value;
    if (!sc_request_parse(data, n, &q) || q.service.n != sizeof SERVICE - 1 || memcmp(q.service.p, SERVICE, q.service.n) ||
        q.method.n != sizeof METHOD - 1 || memcmp(q.method.p, METHOD, q.method.n) || !value_decode(q.payload, &value))
        return false;
    size_t size = value_size(value.n);
    if (!sc_buf_reserve(&out, SC_RESPONSE_HEAD + size))
        return false;
    uint8_t *p = out.p + out.len;
    p += sc_response_head(p, stream, 0, NULL, 0, size);
    out.len = (size_t)(value_encode(p, value.p, value.n) - out.p);
    return true;
}

static void serve(int fd, bool batched)
{
    size_t at = 0;
    in.len = out.len = 0;
    for (;;) {
        if (at) {
            memmove(in.p, in.p + at, in.len - at);
            in.len -= at;
            at = 0;
        }
        if (!sc_buf_reserve(&in, ROOM))
            return;
        ssize_t n = recv(fd, in.p + in.len, in.cap - in.len, 0);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return;
        in.len += (size_t)n;
        while (in.len - at >= SC_HEADER) {
            sc_header h;
            sc_header_read(in.p + at, &h);
            if (h.length > SC_MAX_MESSAGE)
                return;
            if (in.len - at - SC_HEADER < h.length)
                break;
            if (!answer(h.stream, in.p + at + SC_HEADER, h.length) || (!batched && !flush(fd)))
                return;
            at += SC_HEADER + h.length;
        }
        if (!flush(fd))
            return;
    }
}

int main(int argc, char **argv)
{
    bool batched = argc > 1 && !strcmp(argv[1], "--batched");
    if (argc != 3 + batched || strcmp(argv[1 + batched], "serve")) {
        fprintf(stderr, "usage: %s [--batched] serve PATH\n", argv[0]);
        return 2;
    }
    int listener = unix_socket(argv[2 + batched], 1);
    pthread_t thread;
    if (pthread_create(&thread, NULL, until_stdin_ends, NULL))
        die("pthread_create");
    puts("ok");
    fflush(stdout);
    for (;;) {
        int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        if (fd < 0 && errno == EINTR)
            continue;
        if (fd < 0)
            die("accept");
        serve(fd, batched);
        close(fd);
    }
}
