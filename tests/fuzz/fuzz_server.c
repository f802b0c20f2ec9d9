/* libFuzzer: a connection that says anything, in pieces of any size, and ends in any way. The server must answer what can be
 * answered, keep no connection, and go on serving another one. `make fuzz` runs it.
 *
 * Input: byte 0 how it ends (bit 0: half-closes and reads; bit 1: parked calls are answered first; bit 2: handlers of streams
 * take and send messages in every turn), byte 1 the size of the pieces, then what is sent. */
#define _GNU_SOURCE
#include "server.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define MUST(cond) ((cond) ? (void)0 : (fprintf(stderr, "line %d: %s\n", __LINE__, #cond), abort()))

static sc_core *core;
static sc_server *srv;
static sc_slot *slot;
static char path[108];
static sc_call *parked[4096];
static size_t nparked;
static bool busy;

static int dial(void)
{
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    memcpy(a.sun_path, path, strlen(path));
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    MUST(fd >= 0 && connect(fd, (struct sockaddr *)&a, sizeof a) == 0);
    return fd;
}

static void handle_stream(sc_call *k)
{
    sc_message *m;
    while (sc_call_recv(k, false, &m) == 1) {
        sc_call_send(k, m->p, m->n, false);
        free(m);
    }
    sc_call_want(k, SC_READABLE | SC_WRITABLE | SC_CANCELLED);
}

/* One turn of the RPC thread; woken beforehand, so that it does not block. */
static void turn(void)
{
    sc_server_wake(srv);
    int work = sc_server_wait(srv), events;
    sc_call *k;
    void *room;
    if (work & SC_WORK_ROOM) {
        while ((room = sc_server_scrap(srv)))
            free(room);
        if (sc_server_room(srv) && (room = malloc(sc_server_room(srv))))
            sc_server_give(srv, room, room);
    }
    while ((k = sc_server_events(srv, &events))) {
        MUST(events && !(events & ~(SC_READABLE | SC_WRITABLE | SC_CANCELLED)));
        sc_call_unref(k);
    }
    while ((k = sc_server_next(srv))) {
        if (k->method && nparked < sizeof parked / sizeof *parked) {
            parked[nparked++] = k;
            continue;
        }
        sc_call_reply(k, 0, NULL, 0, k->payload.p, k->payload.n, true);
        sc_call_unref(k);
    }
    for (size_t i = 0; busy && i < nparked; i++)
        if (parked[i]->streams)
            handle_stream(parked[i]);
    sc_server_flush(srv);
}

static void answer_parked(void)
{
    while (nparked) {
        sc_call *k = parked[--nparked];
        if (k->streams && busy)
            sc_call_reply(k, 0, NULL, 0, "late", 4, false);
        else
            sc_call_reply(k, SC_UNKNOWN, "\xff late", 6, NULL, 0, false);
        sc_call_unref(k);
    }
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc, (void)argv;
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    const sc_limits limits = {SC_MAX_MESSAGE, 64, 64, 262144, true, 65536};
    snprintf(path, sizeof path, "/tmp/sc-fuzz-%d.sock", (int)getpid());
    memcpy(a.sun_path, path, strlen(path));
    unlink(path);
    core = sc_core_new("ns", "");
    srv = sc_server_new(core, &limits);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    MUST(core && srv && fd >= 0 && bind(fd, (struct sockaddr *)&a, sizeof a) == 0 && listen(fd, 64) == 0);
    MUST(sc_server_listen(srv, fd) == 0);
    MUST(sc_server_method(srv, "s", "E", 0, 0) == 0 && sc_server_method(srv, "s", "P", 0, 1) == 0);
    MUST(sc_server_method(srv, "s", "U", SC_STREAM_CLIENT, 2) == 0 && sc_server_method(srv, "s", "D", SC_STREAM_SERVER, 3) == 0);
    MUST(sc_server_method(srv, "s", "B", SC_STREAM_CLIENT | SC_STREAM_SERVER, 4) == 0);
    MUST(sc_server_method(srv, "s", "S", SC_NATIVE_STATE, -1) == 0 && sc_server_method(srv, "s", "W", SC_NATIVE_WAIT, -1) == 0);
    MUST(sc_server_method(srv, "s", "C", SC_NATIVE_CONNECT, -1) == 0);
    MUST(sc_slot_open_init(core, "c", NULL, 0, &slot) == 0);
    return 0;
}

/* Reads what is there; true: the server has closed. */
static bool hear(int fd)
{
    char buf[65536];
    for (;;) {
        ssize_t n = recv(fd, buf, sizeof buf, MSG_DONTWAIT);
        if (n == 0 || (n < 0 && errno == ECONNRESET))
            return true;
        if (n < 0)
            return false;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    if (n < 2)
        return 0;
    int fd = dial();
    size_t piece = data[1] ? data[1] : 65536, at = 2;
    bool over = false;
    busy = data[0] & 4;
    while (at < n && !over) {
        size_t k = n - at < piece ? n - at : piece;
        ssize_t sent = send(fd, data + at, k, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent > 0)
            at += (size_t)sent;
        else if (errno != EAGAIN)
            break;
        turn();
        over = hear(fd);
    }
    if (data[0] & 2)
        answer_parked();
    if (data[0] & 1) {
        shutdown(fd, SHUT_WR);
        /* Everything gets its answer, the Waits too: then the server must close. */
        sc_slot_drop(slot);
        for (int i = 0; i < 1000 && !over; i++) {
            turn();
            answer_parked();
            over = hear(fd);
        }
        MUST(over);
        sc_slot_forget(slot);
        sc_slot_unref(slot);
        MUST(sc_slot_open_init(core, "c", NULL, 0, &slot) == 0);
    }
    close(fd);
    for (int i = 0; i < 1000 && srv->conns; i++)
        turn();
    MUST(!srv->conns);
    answer_parked();
    MUST(sc_server_inflight(srv) == 0);
    MUST(!slot->waiters);
    MUST(!atomic_load(&srv->has_events));
    turn();
    MUST(!atomic_load(&srv->promised) && !srv->scrap && !srv->unused);

    /* Another client finds all well. */
    static const uint8_t ping[] = "\0\0\0\x09\0\0\0\1\1\1\x0a\1s\x12\1E\x1a\1!", pong[] = "\0\0\0\3\0\0\0\1\2\0\x12\1!";
    uint8_t got[sizeof pong];
    fd = dial();
    MUST(send(fd, ping, sizeof ping - 1, MSG_NOSIGNAL) == sizeof ping - 1);
    ssize_t len = -1;
    for (int i = 0; i < 1000 && len < 0; i++) {
        turn();
        len = recv(fd, got, sizeof got, MSG_DONTWAIT);
    }
    MUST(len == sizeof pong - 1 && !memcmp(got, pong, sizeof pong - 1));
    close(fd);
    for (int i = 0; i < 1000 && srv->conns; i++)
        turn();
    MUST(!srv->conns);
    return 0;
}
