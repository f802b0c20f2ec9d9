/* A containerd that takes events, and does with them what a test says. */
#ifndef PEER_H
#define PEER_H
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>

#include "check.h"
#include "exits.h"
#include "frame.h"

typedef struct {
    char topic[64], id[64], exec[64];
    uint32_t pid, status, stream;
    int conn; /* number of the connection, from 1 */
    uint8_t *raw; /* the request's data */
    size_t len;
} rig_event;

typedef struct {
    char path[108];
    int lfd, fd, stopfd[2];
    int conns;
    bool ack, deaf;    /* answer at once; do not even read */
    rig_event *got;
    size_t n;
    pthread_mutex_t lock;
    pthread_cond_t cond;
    pthread_t thread;
} rig_peer;

static inline void rig_slice(char *out, size_t size, sc_slice s)
{
    size_t n = s.n < size - 1 ? s.n : size - 1;
    memcpy(out, s.p, n);
    out[n] = 0;
}

/* Field `number` of a message, as bytes; {NULL, 0} when it is not there. */
static inline sc_slice rig_field(sc_slice message, unsigned number, uint64_t *value)
{
    sc_reader r = {message.p, message.p + message.n};
    sc_slice found = {NULL, 0};
    sc_field f;
    int more;
    while ((more = sc_read_field(&r, &f)) == 1) {
        if (f.field == number && f.type == 2)
            found = f.bytes;
        if (f.field == number && f.type == 0 && value)
            *value = f.value;
    }
    CHECK_EQ(more, 0);
    return found;
}

static inline void rig_note(rig_peer *p, const sc_header *h, const uint8_t *data)
{
    sc_request q;
    CHECK_EQ(h->type, SC_REQUEST);
    CHECK_EQ(h->flags, SC_FLAG_REMOTE_CLOSED);
    CHECK(sc_request_parse(data, h->length, &q));
    CHECK(sc_slice_is(q.service, "containerd.services.events.ttrpc.v1.Events") && sc_slice_is(q.method, "Forward"));
    sc_slice envelope = rig_field(q.payload, 1, NULL);
    sc_slice any = rig_field(envelope, 4, NULL), message = rig_field(any, 2, NULL);
    p->got = realloc(p->got, (p->n + 1) * sizeof *p->got);
    rig_event *e = &p->got[p->n++];
    memset(e, 0, sizeof *e);
    e->stream = h->stream;
    e->conn = p->conns;
    e->len = h->length;
    e->raw = malloc(h->length);
    memcpy(e->raw, data, h->length);
    rig_slice(e->topic, sizeof e->topic, rig_field(envelope, 3, NULL));
    if (!strcmp(e->topic, "/tasks/exit")) {
        uint64_t pid = 0, status = 0;
        CHECK(sc_slice_is(rig_field(any, 1, NULL), "containerd.events.TaskExit"));
        rig_slice(e->id, sizeof e->id, rig_field(message, 1, NULL));
        rig_slice(e->exec, sizeof e->exec, rig_field(message, 2, NULL));
        if (!strcmp(e->exec, e->id))
            e->exec[0] = 0;
        rig_field(message, 3, &pid);
        rig_field(message, 4, &status);
        e->pid = (uint32_t)pid;
        e->status = (uint32_t)status;
        CHECK(rig_field(message, 5, NULL).n > 0);
    } else if (message.n) {
        rig_slice(e->id, sizeof e->id, message); /* the tests' own events carry nothing else */
    }
}

static inline void rig_answer(rig_peer *p, uint32_t stream, int32_t code)
{
    uint8_t head[SC_RESPONSE_HEAD + 8];
    size_t n = sc_response_head(head, stream, code, "no", 2, 0);
    if (p->fd >= 0)
        CHECK(send(p->fd, head, n, MSG_NOSIGNAL) == (ssize_t)n || errno == EPIPE);
}

static inline void *rig_serve(void *arg)
{
    rig_peer *p = arg;
    uint8_t *buf = malloc(16 << 20);
    size_t len = 0;
    for (;;) {
        pthread_mutex_lock(&p->lock);
        struct pollfd f[3] = {{p->stopfd[0], POLLIN, 0}, {p->lfd, POLLIN, 0}, {p->deaf ? -1 : p->fd, POLLIN, 0}};
        pthread_mutex_unlock(&p->lock);
        poll(f, 3, -1);
        if (f[0].revents) {
            char c;
            CHECK(read(p->stopfd[0], &c, 1) == 1);
            if (c == 'q')
                break;
        }
        pthread_mutex_lock(&p->lock);
        if (f[1].revents) {
            if (p->fd >= 0)
                close(p->fd);
            p->fd = accept4(p->lfd, NULL, NULL, SOCK_CLOEXEC);
            p->conns++;
            len = 0;
            pthread_cond_broadcast(&p->cond);
        } else if (f[2].revents && f[2].fd == p->fd) {
            ssize_t n = recv(p->fd, buf + len, (16 << 20) - len, MSG_DONTWAIT);
            if (n == 0 || (n < 0 && errno == ECONNRESET)) {
                close(p->fd);
                p->fd = -1;
            }
            if (n > 0)
                len += (size_t)n;
            size_t at = 0;
            while (len - at >= SC_HEADER) {
                sc_header h;
                sc_header_read(buf + at, &h);
                if (len - at - SC_HEADER < h.length)
                    break;
                rig_note(p, &h, buf + at + SC_HEADER);
                if (p->ack)
                    rig_answer(p, h.stream, 0);
                at += SC_HEADER + h.length;
            }
            memmove(buf, buf + at, len - at);
            len -= at;
            pthread_cond_broadcast(&p->cond);
        }
        pthread_mutex_unlock(&p->lock);
    }
    free(buf);
    return NULL;
}

static inline void rig_listen(rig_peer *p)
{
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    strcpy(a.sun_path, p->path);
    p->lfd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    CHECK(p->lfd >= 0 && bind(p->lfd, (struct sockaddr *)&a, sizeof a) == 0 && listen(p->lfd, 16) == 0);
    CHECK(pthread_create(&p->thread, NULL, rig_serve, p) == 0);
}

/* An address with nobody at it yet. */
static inline void rig_peer_init(rig_peer *p)
{
    static int number;
    memset(p, 0, sizeof *p);
    snprintf(p->path, sizeof p->path, "/tmp/sc-%d-%d.sock", (int)getpid(), ++number);
    p->lfd = p->fd = -1;
    p->ack = true;
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->cond, NULL);
    CHECK(pipe2(p->stopfd, O_CLOEXEC) == 0);
}

static inline void rig_kick(rig_peer *p, char c)
{
    CHECK(write(p->stopfd[1], &c, 1) == 1);
}

/* Gone, with its connection and its socket; rig_listen brings it back. */
static inline void rig_down(rig_peer *p)
{
    if (p->lfd < 0)
        return;
    rig_kick(p, 'q');
    pthread_join(p->thread, NULL);
    close(p->lfd);
    if (p->fd >= 0)
        close(p->fd);
    p->lfd = p->fd = -1;
    unlink(p->path);
}

static inline void rig_peer_free(rig_peer *p)
{
    rig_down(p);
    for (size_t i = 0; i < p->n; i++)
        free(p->got[i].raw);
    free(p->got);
    close(p->stopfd[0]);
    close(p->stopfd[1]);
    pthread_mutex_destroy(&p->lock);
    pthread_cond_destroy(&p->cond);
}

/* The i-th event, waiting for it; valid until the peer is freed or another one comes. */
static inline rig_event rig_wait(rig_peer *p, size_t i)
{
    pthread_mutex_lock(&p->lock);
    while (p->n <= i)
        pthread_cond_wait(&p->cond, &p->lock);
    rig_event e = p->got[i];
    pthread_mutex_unlock(&p->lock);
    return e;
}

static inline size_t rig_count(rig_peer *p)
{
    pthread_mutex_lock(&p->lock);
    size_t n = p->n;
    pthread_mutex_unlock(&p->lock);
    return n;
}

#endif
