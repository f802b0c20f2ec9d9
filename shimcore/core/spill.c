#define _GNU_SOURCE
#include "spill.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "frame.h"
#include "ledger.h"

#ifndef TMPFS_MAGIC
#define TMPFS_MAGIC 0x01021994
#endif

static void put32(uint8_t *p, uint32_t v)
{
    for (int i = 0; i < 4; i++)
        p[i] = (uint8_t)(v >> 8 * i);
}

static uint32_t get32(const uint8_t *p)
{
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static uint64_t get64(const uint8_t *p)
{
    return get32(p) | (uint64_t)get32(p + 4) << 32;
}

void sc_spill_init(struct sc_spill *s)
{
    *s = (struct sc_spill){.fd = -1};
}

static void forget_file(struct sc_spill *s)
{
    if (s->fd >= 0) {
        close(s->fd);
        unlink(s->path);
    }
    s->fd = -1;
    s->from = s->to = 0;
    s->count = 0;
}

void sc_spill_free(struct sc_spill *s)
{
    if (s->fd >= 0)
        close(s->fd);
    free(s->path);
    sc_spill_init(s);
}

static bool write_all(int fd, const uint8_t *p, size_t n, int64_t at)
{
    while (n) {
        ssize_t k = pwrite(fd, p, n, at);
        if (k < 0 && errno == EINTR)
            continue;
        if (k <= 0)
            return false;
        p += k;
        n -= (size_t)k;
        at += k;
    }
    return true;
}

static bool append(int fd, const sc_event *e, int64_t *to)
{
    uint8_t head[SC_SPILL_HEAD];
    put32(head, SC_SPILL_MAGIC);
    put32(head + 4, (uint32_t)e->len);
    put32(head + 8, sc_crc32(e->body, e->len));
    put32(head + 12, e->vital);
    put32(head + 16, (uint32_t)e->key_id);
    put32(head + 20, (uint32_t)(e->key_id >> 32));
    put32(head + 24, (uint32_t)e->key_exec);
    put32(head + 28, (uint32_t)(e->key_exec >> 32));
    /* The body first: a record whose head is there is whole. */
    if (!write_all(fd, e->body, e->len, *to + SC_SPILL_HEAD) || !write_all(fd, head, sizeof head, *to)) {
        if (ftruncate(fd, *to) < 0) {
            /* Its CRC tells a reader where the good records end. */
        }
        return false;
    }
    *to += SC_SPILL_HEAD + (int64_t)e->len;
    return true;
}

bool sc_spill_put(struct sc_spill *s, const sc_event *e)
{
    if (!s->path || !s->usable || s->to - s->from > (e->vital ? 2 * s->cap : s->cap))
        return false;
    if (s->fd < 0 && (s->fd = open(s->path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600)) < 0)
        return false;
    if (!append(s->fd, e, &s->to))
        return false;
    s->count++;
    return true;
}

/* The record at *at; *at moves behind it. */
static sc_event *read_at(int fd, int64_t *at)
{
    uint8_t head[SC_SPILL_HEAD];
    if (pread(fd, head, sizeof head, *at) != (ssize_t)sizeof head || get32(head) != SC_SPILL_MAGIC)
        return NULL;
    uint32_t len = get32(head + 4);
    sc_event *e = len <= SC_MAX_MESSAGE ? malloc(sizeof *e + len) : NULL;
    if (!e)
        return NULL;
    *e = (sc_event){.len = len, .key_id = get64(head + 16), .key_exec = get64(head + 24), .vital = get32(head + 12) & 1};
    if (pread(fd, e->body, len, *at + SC_SPILL_HEAD) != (ssize_t)len || sc_crc32(e->body, len) != get32(head + 8)) {
        free(e);
        return NULL;
    }
    *at += SC_SPILL_HEAD + (int64_t)len;
    return e;
}

sc_event *sc_spill_take(struct sc_spill *s)
{
    if (!s->count)
        return NULL;
    sc_event *e = read_at(s->fd, &s->from);
    if (e)
        s->count--;
    if (!e || !s->count)
        forget_file(s); /* all read, or damaged from here on */
    return e;
}

static int begin(struct sc_spill *s, const char *path, int64_t cap)
{
    char folder[4096];
    const char *slash = strrchr(path, '/');
    if (!slash || (size_t)(slash - path) >= sizeof folder)
        return -EINVAL;
    memcpy(folder, path, (size_t)(slash - path) + 1);
    folder[slash - path + 1] = 0;
    struct statfs fs;
    free(s->path);
    *s = (struct sc_spill){.path = strdup(path), .fd = -1, .cap = cap};
    if (!s->path)
        return -ENOMEM;
    s->usable = statfs(folder, &fs) == 0 && fs.f_type == TMPFS_MAGIC;
    return 0;
}

bool sc_spill_adopt(struct sc_spill *s, const char *path, int fd, int64_t from, int64_t to, size_t count, int64_t cap)
{
    if (begin(s, path, cap) < 0)
        return false;
    s->fd = fd;
    s->from = from;
    s->to = to;
    s->count = count;
    return true;
}

int sc_spill_open(struct sc_spill *s, const char *path, int64_t cap)
{
    int r = begin(s, path, cap);
    if (r < 0)
        return r;
    int fd = open(path, O_RDWR | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0)
        return errno == ENOENT ? 0 : -errno;
    struct stat st;
    if (fstat(fd, &st) < 0 || !S_ISREG(st.st_mode) || st.st_uid != geteuid()) {
        close(fd);
        return -EPERM;
    }
    s->fd = fd;
    sc_event *e;
    while ((e = read_at(fd, &s->to))) {
        s->count++;
        free(e);
    }
    int n = (int)s->count;
    if (!n)
        forget_file(s);
    return n;
}

int sc_spill_keep(struct sc_spill *s, const sc_event *first, const sc_event *second)
{
    if (!first && !second && (!s->count || !s->from))
        return (int)s->count; /* the file, if there is one, holds what is left and nothing else */
    if (!s->path)
        return -ENOENT;
    char *path = NULL;
    if (asprintf(&path, "%s.new", s->path) < 0)
        return -ENOMEM;
    int r = 0, n = 0, fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (fd < 0)
        r = -errno;
    int64_t to = 0;
    const sc_event *lists[] = {first, second};
    for (int i = 0; i < 2 && r == 0; i++)
        for (const sc_event *e = lists[i]; e && r == 0; e = e->next, n++)
            if (!append(fd, e, &to))
                r = -ENOSPC;
    sc_event *e;
    while (r == 0 && s->count && (e = read_at(s->fd, &s->from))) {
        if (!append(fd, e, &to))
            r = -ENOSPC;
        s->count--;
        n++;
        free(e);
    }
    if (r == 0 && rename(path, s->path) < 0)
        r = -errno;
    if (r < 0 && fd >= 0)
        unlink(path);
    if (fd >= 0)
        close(fd);
    free(path);
    return r < 0 ? r : n;
}
