/* Closed-loop callers of State: each has a connection of its own, asks, reads the whole answer and asks again, until stdin ends.
 *
 *   callers ADDRESS SERVICE ID COUNT       prints "ok" when all have had an answer, and at the end how many there were */
#define _GNU_SOURCE
#include <pthread.h>

#include "bench.h"
#include "frame.h"

static const char *address, *service, *id;
static _Atomic uint64_t answers;
static _Atomic uint32_t begun;

static void *caller(void *arg)
{
    (void)arg;
    int fd = unix_socket(address, 0);
    uint8_t payload[256], answer[4096], *end = sc_write_bytes(payload, 1, id, strlen(id));
    sc_buf request = {0};
    for (uint32_t stream = 1;; stream += 2) {
        request.len = 0;
        sc_request_frame(&request, stream, (sc_slice){(const uint8_t *)service, strlen(service)},
                         (sc_slice){(const uint8_t *)"State", 5}, (sc_slice){payload, (size_t)(end - payload)}, 0);
        write_all(fd, request.p, request.len);
        size_t got = 0, whole = SC_HEADER;
        while (got < whole) {
            ssize_t n = recv(fd, answer + got, sizeof answer - got, 0);
            if (n <= 0)
                die("State");
            got += (size_t)n;
            sc_header h;
            if (got >= SC_HEADER) {
                sc_header_read(answer, &h);
                whole = SC_HEADER + h.length;
            }
        }
        atomic_fetch_add(&answers, 1);
        if (stream == 1)
            set_and_wake(&begun, atomic_load(&begun) + 1);
    }
    return NULL;
}

int main(int argc, char **argv)
{
    if (argc != 5)
        return 2;
    address = argv[1];
    service = argv[2];
    id = argv[3];
    int count = atoi(argv[4]);
    for (int i = 0; i < count; i++) {
        pthread_t thread;
        uint32_t before = atomic_load(&begun);
        if (pthread_create(&thread, NULL, caller, NULL))
            die("pthread_create");
        if (wait_while(&begun, before) < 0)
            die("State is not answered");
    }
    printf("ok\n");
    fflush(stdout);
    char c;
    while (read(0, &c, 1) > 0)
        ;
    printf("%llu\n", (unsigned long long)atomic_load(&answers));
    return fflush(stdout) ? 1 : 0;
}
