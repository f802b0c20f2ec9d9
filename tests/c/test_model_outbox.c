/* The outbox and a containerd that takes events, acknowledges or refuses them, is mute, goes and returns: every order of these.
 *
 * As in test_model.c, states are found breadth first, and each is reached by its steps from the beginning. In each state that is
 * found containerd is then made to behave: all events must come to it that have not come yet.
 *
 *   - nothing is lost, and nothing is sent that was not pushed;
 *   - the events of one process, and of a container beside those of its processes, come in the order in which they were pushed,
 *     and none before its predecessor has been acknowledged;
 *   - what comes again is the same, byte for byte;
 *   - what has been acknowledged does not come again. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "check.h"
#include "core.h"
#include "frame.h"

enum { EVENTS = 4 };
static const struct {
    const char *id, *exec;
} of[EVENTS] = {{"a", ""}, {"b", ""}, {"a", "x"}, {"a", ""}};

static sc_core *core;
static char path[64];
static int lfd = -1, fd = -1;

/* What containerd has seen. */
static struct {
    uint8_t *bytes;
    size_t n;
    bool came, acknowledged;
} event[EVENTS];
static unsigned pushed;
static struct {
    uint32_t stream;
    int event;
} unanswered[EVENTS];
static unsigned nunanswered, unheard; /* unheard: answers on their way */
static sc_buf in;

static bool depends(int later, int earlier)
{
    return !strcmp(of[later].id, of[earlier].id) &&
           (!*of[later].exec || !*of[earlier].exec || !strcmp(of[later].exec, of[earlier].exec));
}

static void listen_again(void)
{
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    strcpy(a.sun_path, path);
    unlink(path);
    lfd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    CHECK(lfd >= 0 && bind(lfd, (struct sockaddr *)&a, sizeof a) == 0 && listen(lfd, 8) == 0);
}

static void hang_up(void)
{
    if (fd >= 0)
        close(fd);
    fd = -1;
    in.len = 0;
    nunanswered = unheard = 0;
}

static void take_frame(const sc_header *h, const uint8_t *data)
{
    int i = 0;
    CHECK_EQ(h->type, SC_REQUEST);
    while (i < EVENTS && !memmem(data, h->length, (char[]){'/', 't', (char)('0' + i)}, 3))
        i++;
    CHECK(i < (int)pushed);
    CHECK(!event[i].acknowledged);
    if (event[i].came) {
        CHECK_EQ(event[i].n, h->length);
        CHECK(!memcmp(event[i].bytes, data, h->length));
    } else {
        event[i].came = true;
        event[i].n = h->length;
        event[i].bytes = malloc(h->length);
        memcpy(event[i].bytes, data, h->length);
    }
    for (int k = 0; k < i; k++)
        CHECK(!depends(i, k) || event[k].acknowledged);
    CHECK(nunanswered < EVENTS);
    unanswered[nunanswered].stream = h->stream;
    unanswered[nunanswered++].event = i;
}

/* The newest connection counts: an old one has been given up by the shim. */
static void containerd_reads(void)
{
    int next;
    while (lfd >= 0 && (next = accept4(lfd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK)) >= 0) {
        hang_up();
        fd = next;
    }
    if (fd < 0)
        return;
    uint8_t buf[4096];
    ssize_t n;
    while ((n = recv(fd, buf, sizeof buf, 0)) > 0)
        CHECK(sc_buf_put(&in, buf, (size_t)n));
    size_t at = 0;
    while (in.len - at >= SC_HEADER) {
        sc_header h;
        sc_header_read(in.p + at, &h);
        if (in.len - at - SC_HEADER < h.length)
            break;
        take_frame(&h, in.p + at + SC_HEADER);
        at += SC_HEADER + h.length;
    }
    sc_buf_shift(&in, at);
    if (n == 0)
        hang_up();
}

static void answer(int32_t code)
{
    uint8_t head[SC_RESPONSE_HEAD + 8];
    size_t n = sc_response_head(head, unanswered[0].stream, code, "no", 2, 0);
    if (send(fd, head, n, MSG_NOSIGNAL) == (ssize_t)n)
        unheard++;
    nunanswered--;
    memmove(unanswered, unanswered + 1, nunanswered * sizeof *unanswered);
}

/* An answer counts when the shim has it: who goes before may see the event again. */
static void shim_hears(void)
{
    struct epoll_event evs[8];
    sc_lock(core);
    int n = epoll_wait(core->epfd, evs, 8, 0);
    for (int i = 0; i < n; i++) {
        sc_source *s = evs[i].data.ptr;
        s->ready(core, s, evs[i].events);
    }
    sc_unlock(core);
    unheard = 0;
}

static bool holds(const sc_event_list *l, int i)
{
    for (const sc_event *e = l->head; e; e = e->next)
        if (memmem(e->body, e->len, (char[]){'/', 't', (char)('0' + i)}, 3))
            return true;
    return false;
}

static void look(void)
{
    for (int i = 0; i < (int)pushed; i++)
        if (event[i].came && !holds(&core->outbox.queue, i) && !holds(&core->outbox.flight, i))
            event[i].acknowledged = true;
    size_t acked = 0;
    for (int i = 0; i < (int)pushed; i++)
        acked += event[i].acknowledged;
    CHECK_EQ(core->outbox.queue.count + core->outbox.flight.count + acked, pushed);
    CHECK_EQ(core->stats.acked, acked);
}

/* ---- steps ---- */

enum { PUSH, PUMP, HEAR, READ, ACKNOWLEDGE, REFUSE, HANG_UP, GO, RETURN, RETRY, MUTE, STEPS };

static bool possible(int step)
{
    const sc_outbox *o = &core->outbox;
    switch (step) {
    case PUSH: return pushed < EVENTS;
    case ACKNOWLEDGE:
    case REFUSE: return nunanswered > 0;
    case HANG_UP: return fd >= 0;
    case GO: return lfd >= 0;
    case RETURN: return lfd < 0;
    case RETRY: return o->retry.at;
    case MUTE: return o->mute.at;
    }
    return true;
}

static void fire(sc_timer *t)
{
    sc_lock(core);
    sc_timer_clear(core, t);
    t->fire(core, t);
    sc_unlock(core);
}

static void take(int step)
{
    switch (step) {
    case PUSH: {
        char topic[] = {'/', 't', (char)('0' + pushed), 0};
        sc_event *e = sc_event_new(core, (sc_slice){(uint8_t *)topic, 3}, (sc_slice){(const uint8_t *)"t", 1}, (sc_slice){NULL, 0},
                                   of[pushed].id, of[pushed].exec);
        e->vital = true;
        if (!*of[pushed].exec)
            e->key_exec = 0; /* concerns the whole container */
        sc_lock(core);
        sc_outbox_push(core, e);
        sc_unlock(core);
        pushed++;
        break;
    }
    case PUMP:
        sc_lock(core);
        sc_outbox_pump(core);
        sc_unlock(core);
        break;
    case HEAR: shim_hears(); break;
    case READ: containerd_reads(); break;
    case ACKNOWLEDGE: answer(SC_OK); break;
    case REFUSE: answer(SC_UNAVAILABLE); break;
    case HANG_UP: hang_up(); break;
    case GO:
        hang_up();
        close(lfd);
        lfd = -1;
        break;
    case RETURN: listen_again(); break;
    case RETRY: fire(&core->outbox.retry); break;
    case MUTE: fire(&core->outbox.mute); break;
    }
    look();
}

/* ---- every order ---- */

typedef struct {
    uint8_t pushed, queue, flight, unanswered, unheard, connected, fd, lfd, retry, mute, refused;
    uint8_t order[2 * EVENTS], came, acknowledged, asked[EVENTS];
} view; /* all that decides what comes next, but bytes on their way to containerd: those follow from it */

static view seen_now(void)
{
    const sc_outbox *o = &core->outbox;
    view v = {.pushed = (uint8_t)pushed, .queue = (uint8_t)o->queue.count, .flight = (uint8_t)o->flight.count,
              .unanswered = (uint8_t)nunanswered, .unheard = (uint8_t)unheard, .connected = o->fd >= 0, .fd = fd >= 0, .lfd = lfd >= 0,
              .retry = o->retry.at != 0, .mute = o->mute.at != 0};
    int k = 0;
    for (int l = 0; l < 2; l++)
        for (const sc_event *e = l ? o->flight.head : o->queue.head; e; e = e->next)
            for (int i = 0; i < EVENTS; i++)
                if (memmem(e->body, e->len, (char[]){'/', 't', (char)('0' + i)}, 3)) {
                    v.order[k++] = (uint8_t)(i + 1);
                    v.refused |= (uint8_t)((e->refused_since != 0) << i);
                }
    for (int i = 0; i < EVENTS; i++) {
        v.came |= (uint8_t)(event[i].came << i);
        v.acknowledged |= (uint8_t)(event[i].acknowledged << i);
    }
    for (unsigned i = 0; i < nunanswered; i++)
        v.asked[i] = (uint8_t)(unanswered[i].event + 1);
    return v;
}

static void begin(void)
{
    core = sc_core_new("ns", path);
    CHECK(core != NULL);
    listen_again();
}

static void end(void)
{
    hang_up();
    if (lfd >= 0)
        close(lfd);
    lfd = -1;
    unlink(path);
    sc_core_free(core);
    for (int i = 0; i < EVENTS; i++)
        free(event[i].bytes);
    memset(event, 0, sizeof event);
    pushed = 0;
}

/* From here on containerd is there and takes everything. */
static void all_comes(void)
{
    if (lfd < 0)
        take(RETURN);
    for (int round = 0; core->outbox.queue.count + core->outbox.flight.count; round++) {
        CHECK(round < 40);
        if (possible(RETRY))
            take(RETRY);
        take(HEAR);
        take(PUMP);
        take(READ);
        while (nunanswered)
            take(ACKNOWLEDGE);
        take(HEAR);
    }
    for (int i = 0; i < (int)pushed; i++)
        CHECK(event[i].came && event[i].acknowledged);
}

typedef struct {
    view v;
    uint32_t from;
    uint8_t by, depth;
} node;
static node *nodes;
static size_t nnodes, cap;

static bool known(const view *v)
{
    for (size_t i = 0; i < nnodes; i++)
        if (!memcmp(&nodes[i].v, v, sizeof *v))
            return true;
    return false;
}

static void add(const view *v, uint32_t from, int by, unsigned depth)
{
    if (nnodes == cap)
        nodes = realloc(nodes, (cap = cap ? 2 * cap : 1024) * sizeof *nodes);
    nodes[nnodes++] = (node){*v, from, (uint8_t)by, (uint8_t)depth};
}

static void walk(uint32_t at)
{
    uint8_t steps[256];
    size_t n = 0;
    for (uint32_t k = at; k; k = nodes[k].from)
        steps[n++] = nodes[k].by;
    begin();
    while (n-- > 0)
        take(steps[n]);
}

static void every_order(void)
{
    size_t steps = 0;
    begin();
    view v = seen_now();
    add(&v, 0, 0, 0);
    end();
    for (uint32_t at = 0; at < nnodes; at++) {
        for (int step = 0; step < STEPS; step++) {
            walk(at);
            bool any = possible(step);
            if (any) {
                take(step);
                steps++;
                v = seen_now();
                if (!known(&v))
                    add(&v, at, step, nodes[at].depth + 1U);
                all_comes();
            }
            end();
        }
    }
    printf("  outbox: %zu states, %zu steps, up to %d long\n", nnodes, steps, nodes[nnodes - 1].depth);
}

int main(void)
{
    snprintf(path, sizeof path, "/tmp/sc-model-%d.sock", (int)getpid());
    RUN(every_order);
    sc_buf_free(&in);
    free(nodes);
    return 0;
}
