/* libFuzzer: whatever bytes come in, parsing reads no further than they go, and agrees with itself.
 * First byte: what the rest is. `make fuzz` runs it. */
#include "frame.h"

#include <stdlib.h>

#define MUST(cond) ((cond) ? (void)0 : abort())

static void inside(sc_slice s, const uint8_t *p, size_t n)
{
    MUST(s.n == 0 || (s.p >= p && s.n <= n && s.p + s.n <= p + n));
}

static void request(const uint8_t *p, size_t n)
{
    sc_request q;
    if (!sc_request_parse(p, n, &q))
        return;
    inside(q.service, p, n);
    inside(q.method, p, n);
    inside(q.payload, p, n);
    MUST(sc_utf8_valid(q.service.p, q.service.n) && sc_utf8_valid(q.method.p, q.method.n));
    uint32_t pairs = 0;
    if (q.pairs) {
        inside(q.metadata, p, n);
        sc_reader r = {q.metadata.p, q.metadata.p + q.metadata.n};
        sc_slice key, value;
        while (sc_metadata_next(&r, &key, &value) == 1) {
            inside(key, p, n);
            inside(value, p, n);
            pairs++;
        }
    }
    MUST(pairs == q.pairs);
    /* Written again it reads the same. */
    sc_buf b = {0};
    if (sc_request_frame(&b, 1, q.service, q.method, q.payload, q.timeout_ns)) {
        sc_request again;
        sc_header h;
        sc_header_read(b.p, &h);
        MUST(h.length + SC_HEADER == b.len);
        MUST(sc_request_parse(b.p + SC_HEADER, h.length, &again));
        MUST(again.service.n == q.service.n && again.method.n == q.method.n && again.payload.n == q.payload.n);
        MUST(again.timeout_ns == q.timeout_ns);
        MUST(!q.payload.n || !memcmp(again.payload.p, q.payload.p, q.payload.n));
    }
    sc_buf_free(&b);
}

static void response(const uint8_t *p, size_t n)
{
    sc_response q;
    if (!sc_response_parse(p, n, &q))
        return;
    inside(q.message, p, n);
    inside(q.payload, p, n);
    if (q.message.n > 4096)
        return;
    uint8_t head[SC_RESPONSE_HEAD + 4096];
    size_t len = sc_response_head(head, 1, q.code, (const char *)q.message.p, q.code ? q.message.n : 0, q.payload.n);
    sc_header h;
    sc_header_read(head, &h);
    MUST(len <= sizeof head);
    MUST(h.length == sc_response_size(q.code, q.message.n, q.payload.n));
    MUST(h.length + SC_HEADER == len + q.payload.n);
}

static void fields(const uint8_t *p, size_t n)
{
    sc_reader r = {p, p + n};
    sc_field f;
    const uint8_t *at = p;
    int more;
    while ((more = sc_read_field(&r, &f)) == 1) {
        MUST(r.p > at && r.p <= p + n);
        MUST(f.field >= 1 && f.field <= 0x1fffffff);
        if (f.type == 2)
            inside(f.bytes, p, n);
        at = r.p;
    }
    MUST(more <= 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    if (!n)
        return 0;
    switch (data[0] & 3) {
    case 0: request(data + 1, n - 1); break;
    case 1: response(data + 1, n - 1); break;
    case 2: fields(data + 1, n - 1); break;
    case 3: sc_utf8_valid(data + 1, n - 1); break;
    }
    return 0;
}
