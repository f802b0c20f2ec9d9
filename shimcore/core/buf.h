/* A growable run of bytes. One owner; no locking of its own. */
#ifndef SC_BUF_H
#define SC_BUF_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    uint8_t *p; /* malloc'd, or NULL */
    size_t len; /* bytes in use */
    size_t cap; /* bytes allocated */
} sc_buf;

typedef struct {
    const uint8_t *p; /* borrowed from whoever made the slice */
    size_t n;
} sc_slice;

static inline bool sc_buf_reserve(sc_buf *b, size_t extra)
{
    if (extra <= b->cap - b->len)
        return true;
    if (extra > SIZE_MAX / 2 - b->len)
        return false;
    size_t cap = b->cap ? b->cap : 256;
    while (cap < b->len + extra)
        cap *= 2;
    uint8_t *p = realloc(b->p, cap);
    if (!p)
        return false;
    b->p = p;
    b->cap = cap;
    return true;
}

static inline bool sc_buf_put(sc_buf *b, const void *data, size_t n)
{
    if (!sc_buf_reserve(b, n))
        return false;
    if (n)
        memcpy(b->p + b->len, data, n);
    b->len += n;
    return true;
}

/* Drop the first n bytes. */
static inline void sc_buf_shift(sc_buf *b, size_t n)
{
    b->len -= n;
    if (b->len)
        memmove(b->p, b->p + n, b->len);
}

static inline void sc_buf_free(sc_buf *b)
{
    free(b->p);
    b->p = NULL;
    b->len = b->cap = 0;
}

static inline bool sc_slice_is(sc_slice s, const char *text)
{
    size_t n = strlen(text);
    return s.n == n && memcmp(s.p, text, n) == 0;
}

static inline char *sc_slice_dup(sc_slice s)
{
    char *c = malloc(s.n + 1);
    if (c) {
        if (s.n)
            memcpy(c, s.p, s.n);
        c[s.n] = 0;
    }
    return c;
}
#endif
