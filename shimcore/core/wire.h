/* The protobuf wire format, as much of it as the exit path needs: varints, length-delimited fields, skipping what is unknown.
 * Rule: protobuf.dev, "Encoding". Groups (wire types 3 and 4) are skipped by a depth counter, never by recursion. */
#ifndef SC_WIRE_H
#define SC_WIRE_H
#include "buf.h"

typedef struct {
    const uint8_t *p, *end;
} sc_reader;

typedef struct {
    uint32_t field;
    uint8_t type;   /* wire type 0, 1, 2 or 5 */
    uint64_t value; /* types 0, 1, 5 */
    sc_slice bytes; /* type 2 */
} sc_field;

static inline bool sc_read_varint(sc_reader *r, uint64_t *out)
{
    uint64_t v = 0;
    for (unsigned shift = 0; shift < 70; shift += 7) {
        if (r->p == r->end)
            return false;
        uint8_t b = *r->p++;
        if (shift == 63 && b > 1)
            return false; /* more than 64 bits */
        v |= (uint64_t)(b & 0x7f) << shift;
        if (!(b & 0x80)) {
            *out = v;
            return true;
        }
    }
    return false;
}

enum { SC_GROUP_DEPTH = 10000 }; /* groups in one another; Go's protobuf takes no more */
/* Next field: 1 = one was read, 0 = end, -1 = malformed. */
int sc_read_field(sc_reader *r, sc_field *f);

static inline size_t sc_varint_size(uint64_t v)
{
    size_t n = 1;
    while (v >= 0x80) {
        v >>= 7;
        n++;
    }
    return n;
}

static inline uint8_t *sc_write_varint(uint8_t *p, uint64_t v)
{
    while (v >= 0x80) {
        *p++ = (uint8_t)v | 0x80;
        v >>= 7;
    }
    *p++ = (uint8_t)v;
    return p;
}

/* Size of, and writer for, one length-delimited field with a number below 16. */
static inline size_t sc_bytes_size(size_t n)
{
    return 1 + sc_varint_size(n) + n;
}

static inline uint8_t *sc_write_bytes(uint8_t *p, unsigned field, const void *data, size_t n)
{
    *p++ = (uint8_t)(field << 3 | 2);
    p = sc_write_varint(p, n);
    if (n)
        memcpy(p, data, n);
    return p + n;
}

static inline uint8_t *sc_write_uint(uint8_t *p, unsigned field, uint64_t v)
{
    *p++ = (uint8_t)(field << 3);
    return sc_write_varint(p, v);
}

/* google.protobuf.Timestamp as a field; at most SC_TIMESTAMP_MAX bytes. */
#define SC_TIMESTAMP_MAX 20
uint8_t *sc_write_timestamp(uint8_t *p, unsigned field, int64_t ns);

bool sc_utf8_valid(const uint8_t *p, size_t n);
#endif
