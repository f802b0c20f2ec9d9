/* What the load generator and the floor share: the call that is measured, and the inner message.
 *
 * The message is google.protobuf.BytesValue: one field, 1, of bytes; empty when the bytes are. */
#ifndef PEER_H
#define PEER_H
#include "../../c/bench.h"
#include "frame.h"

static const char SERVICE[] = "bench.Echo", METHOD[] = "Echo";

/* Decode one BytesValue; false if it is malformed. The last field of a kind counts, as in protobuf. */
static inline bool value_decode(sc_slice data, sc_slice *value)
{
    sc_reader r = {data.p, data.p + data.n};
    sc_field f;
    int more;
    *value = (sc_slice){NULL, 0};
    while ((more = sc_read_field(&r, &f)) == 1)
        if (f.field == 1 && f.type == 2)
            *value = f.bytes;
    return more == 0;
}

static inline size_t value_size(size_t n)
{
    return n ? sc_bytes_size(n) : 0;
}

static inline uint8_t *value_encode(uint8_t *p, const void *data, size_t n)
{
    return n ? sc_write_bytes(p, 1, data, n) : p;
}
#endif
