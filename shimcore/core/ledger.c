#define _GNU_SOURCE
#include "ledger.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "exits.h"

#ifndef TMPFS_MAGIC
#define TMPFS_MAGIC 0x01021994
#endif
#define LATE_NS 5000000LL /* how long telling waits for the writer thread: a write to a frozen filesystem hangs in D */
enum { RECORD_MAX = 2048, QUEUE_MAX = 65536 };

struct entry {
    struct entry *next;
    sc_slot *slot;
    sc_ledger *ledger;
    int64_t at;
    size_t n;
    uint8_t record[];
};

struct sc_recorder {
    pthread_t thread;
    pthread_cond_t work;
    struct entry *head, **tail;
    size_t count;
    bool stop, busy;
};

uint32_t sc_crc32(const uint8_t *p, size_t n)
{
    static const uint32_t table[16] = {0x00000000, 0x1db71064, 0x3b6e20c8, 0x26d930ac, 0x76dc4190, 0x6b6b51f4, 0x4db26158, 0x5005713c,
                                       0xedb88320, 0xf00f9344, 0xd6d6a3e8, 0xcb61b38c, 0x9b64c2b0, 0x86d3d2d4, 0xa00ae278, 0xbdbdf21c};
    uint32_t crc = ~0U;
    for (size_t i = 0; i < n; i++) {
        crc = table[(crc ^ p[i]) & 15] ^ crc >> 4;
        crc = table[(crc ^ p[i] >> 4) & 15] ^ crc >> 4;
    }
    return ~crc;
}

static void put(uint8_t **p, uint64_t v, unsigned bytes)
{
    for (unsigned i = 0; i < bytes; i++)
        *(*p)++ = (uint8_t)(v >> 8 * i);
}

size_t sc_ledger_encode(const sc_slot *s, uint8_t *out, size_t room)
{
    size_t id = strlen(s->id), ex = strlen(s->exec_id), body = 20 + id + ex;
    if (SC_LEDGER_HEAD + body > room || body > UINT16_MAX)
        return 0;
    uint8_t *b = out + SC_LEDGER_HEAD, *p = b;
    put(&p, s->exit.pid, 4);
    put(&p, s->exit.status, 4);
    put(&p, (uint64_t)s->exit.exited_at, 8);
    put(&p, id, 2);
    put(&p, ex, 2);
    memcpy(p, s->id, id);
    memcpy(p + id, s->exec_id, ex);
    p = out;
    put(&p, SC_LEDGER_MAGIC, 4);
    put(&p, body, 2);
    put(&p, 0, 2);
    put(&p, sc_crc32(b, body), 4);
    return SC_LEDGER_HEAD + body;
}

/* Where the records of an old file end. */
static int64_t end_of(int fd)
{
    int64_t at = 0;
    uint8_t head[SC_LEDGER_HEAD], body[RECORD_MAX];
    while (pread(fd, head, sizeof head, at) == (ssize_t)sizeof head) {
        uint32_t magic = (uint32_t)head[0] | (uint32_t)head[1] << 8 | (uint32_t)head[2] << 16 | (uint32_t)head[3] << 24;
        size_t n = (size_t)head[4] | (size_t)head[5] << 8;
        uint32_t crc = (uint32_t)head[8] | (uint32_t)head[9] << 8 | (uint32_t)head[10] << 16 | (uint32_t)head[11] << 24;
        if (magic != SC_LEDGER_MAGIC || n > sizeof body || pread(fd, body, n, at + SC_LEDGER_HEAD) != (ssize_t)n ||
            sc_crc32(body, n) != crc)
            break;
        at += SC_LEDGER_HEAD + (int64_t)n;
    }
    return at;
}

int sc_ledger_open(const char *path, sc_ledger **out)
{
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (fd < 0)
        return -errno;
    struct statfs fs;
    sc_ledger *l = calloc(1, sizeof *l);
    if (!l) {
        close(fd);
        return -ENOMEM;
    }
    atomic_init(&l->refs, 1);
    l->fd = fd;
    l->inline_ = fstatfs(fd, &fs) == 0 && fs.f_type == TMPFS_MAGIC;
    l->at = end_of(fd);
    if (posix_fallocate(fd, 0, l->at + SC_LEDGER_ROOM) != 0) {
        /* A full disk, or a filesystem that can't: records are written all the same, as far as there is room. */
    }
    *out = l;
    return 0;
}

sc_ledger *sc_ledger_adopt(int fd, int64_t at)
{
    struct statfs fs;
    sc_ledger *l = calloc(1, sizeof *l);
    if (!l)
        return NULL;
    atomic_init(&l->refs, 1);
    l->fd = fd;
    l->at = at;
    l->inline_ = fstatfs(fd, &fs) == 0 && fs.f_type == TMPFS_MAGIC;
    return l;
}

void sc_ledger_unref(sc_ledger *l)
{
    if (!l || atomic_fetch_sub(&l->refs, 1) != 1)
        return;
    close(l->fd);
    free(l);
}

static bool write_record(const sc_ledger *l, const uint8_t *record, size_t n, int64_t at)
{
    ssize_t r;
    do
        r = pwrite(l->fd, record, n, at);
    while (r < 0 && errno == EINTR);
    return r == (ssize_t)n;
}

static void recorded(sc_core *c, sc_slot *s, bool ok)
{
    if (ok) {
        c->stats.recorded++;
        s->recorded_mono = sc_now_mono();
    } else {
        c->stats.unrecorded++;
    }
    if (s->record == SC_RECORD_PENDING) {
        s->record = SC_RECORD_DONE;
        sc_timer_clear(c, &s->record_late);
        sc_tell_if_due(s);
    }
}

static void *writer(void *arg)
{
    sc_core *c = arg;
    struct sc_recorder *r = c->recorder;
    pthread_mutex_lock(&c->lock);
    for (;;) {
        while (!r->head && !r->stop)
            pthread_cond_wait(&r->work, &c->lock);
        struct entry *e = r->head;
        if (!e)
            break;
        r->head = e->next;
        if (!r->head)
            r->tail = &r->head;
        r->count--;
        r->busy = true;
        pthread_mutex_unlock(&c->lock);
        bool ok = write_record(e->ledger, e->record, e->n, e->at);
        sc_lock(c);
        recorded(c, e->slot, ok);
        sc_unlock(c);
        sc_core_wake(c);
        sc_slot_unref(e->slot);
        sc_ledger_unref(e->ledger);
        free(e);
        pthread_mutex_lock(&c->lock);
        r->busy = false;
    }
    pthread_mutex_unlock(&c->lock);
    return NULL;
}

static struct sc_recorder *recorder(sc_core *c)
{
    if (c->recorder)
        return c->recorder;
    struct sc_recorder *r = calloc(1, sizeof *r);
    if (!r)
        return NULL;
    r->tail = &r->head;
    pthread_cond_init(&r->work, NULL);
    pthread_attr_t attr;
    pthread_attr_init(&attr);
    pthread_attr_setstacksize(&attr, PTHREAD_STACK_MIN > 65536 ? PTHREAD_STACK_MIN : 65536);
    c->recorder = r;
    if (pthread_create(&r->thread, &attr, writer, c) != 0) {
        c->recorder = NULL;
        pthread_cond_destroy(&r->work);
        free(r);
    }
    pthread_attr_destroy(&attr);
    return c->recorder;
}

void sc_recorder_stop(sc_core *c)
{
    struct sc_recorder *r = c->recorder;
    if (!r)
        return;
    pthread_mutex_lock(&c->lock);
    r->stop = true;
    pthread_cond_signal(&r->work);
    pthread_mutex_unlock(&c->lock);
    pthread_join(r->thread, NULL);
    pthread_cond_destroy(&r->work);
    free(r);
    c->recorder = NULL;
}

bool sc_recorder_idle(const sc_core *c)
{
    return !c->recorder || (!c->recorder->head && !c->recorder->busy);
}

void sc_record(sc_core *c, sc_slot *s)
{
    sc_ledger *l = s->init ? s->init->ledger : s->ledger;
    s->record = SC_RECORD_DONE;
    if (!l)
        return;
    uint8_t record[RECORD_MAX];
    size_t n = sc_ledger_encode(s, record, sizeof record);
    if (!n) {
        c->stats.unrecorded++;
        return;
    }
    int64_t at = l->at;
    l->at += (int64_t)n;
    if (l->inline_) {
        recorded(c, s, write_record(l, record, n, at));
        return;
    }
    struct sc_recorder *r = recorder(c);
    struct entry *e = r && r->count < QUEUE_MAX ? malloc(sizeof *e + n) : NULL;
    if (!e) {
        c->stats.unrecorded++;
        return;
    }
    *e = (struct entry){.slot = s, .ledger = l, .at = at, .n = n};
    memcpy(e->record, record, n);
    sc_slot_ref(s);
    atomic_fetch_add(&l->refs, 1);
    *r->tail = e;
    r->tail = &e->next;
    r->count++;
    s->record = SC_RECORD_PENDING;
    sc_timer_set(c, &s->record_late, sc_now_mono() + LATE_NS);
    pthread_cond_signal(&r->work);
}
