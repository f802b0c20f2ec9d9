#include "frame.h"

int sc_read_field(sc_reader *r, sc_field *f)
{
    unsigned depth = 0; /* of groups being skipped */
    for (;;) {
        uint64_t tag;
        if (r->p == r->end)
            return depth ? -1 : 0;
        if (!sc_read_varint(r, &tag) || tag >> 3 == 0 || tag >> 3 > 0x1fffffff)
            return -1;
        f->field = (uint32_t)(tag >> 3);
        f->type = tag & 7;
        f->value = 0;
        switch (f->type) {
        case 0:
            if (!sc_read_varint(r, &f->value))
                return -1;
            break;
        case 1:
        case 5: {
            size_t n = f->type == 1 ? 8 : 4;
            if ((size_t)(r->end - r->p) < n)
                return -1;
            for (size_t i = 0; i < n; i++)
                f->value |= (uint64_t)r->p[i] << 8 * i;
            r->p += n;
            break;
        }
        case 2: {
            uint64_t n;
            if (!sc_read_varint(r, &n) || n > (uint64_t)(r->end - r->p))
                return -1;
            f->bytes.p = r->p;
            f->bytes.n = (size_t)n;
            r->p += n;
            break;
        }
        case 3:
            if (++depth > SC_GROUP_DEPTH)
                return -1;
            continue;
        case 4:
            if (!depth)
                return -1;
            depth--;
            continue;
        default:
            return -1;
        }
        if (!depth)
            return 1;
    }
}

uint8_t *sc_write_timestamp(uint8_t *p, unsigned field, int64_t ns)
{
    int64_t sec = ns / 1000000000, nano = ns % 1000000000;
    if (nano < 0) {
        nano += 1000000000;
        sec--;
    }
    size_t n = (sec ? 1 + sc_varint_size((uint64_t)sec) : 0) + (nano ? 1 + sc_varint_size((uint64_t)nano) : 0);
    *p++ = (uint8_t)(field << 3 | 2);
    p = sc_write_varint(p, n);
    if (sec)
        p = sc_write_uint(p, 1, (uint64_t)sec);
    if (nano)
        p = sc_write_uint(p, 2, (uint64_t)nano);
    return p;
}

bool sc_utf8_valid(const uint8_t *p, size_t n)
{
    size_t i = 0;
    while (i < n) {
        uint8_t c = p[i];
        if (c < 0x80) {
            i++;
            continue;
        }
        unsigned extra = c >= 0xf0 ? 3 : c >= 0xe0 ? 2 : 1;
        if (c < 0xc2 || c > 0xf4 || n - i <= extra)
            return false;
        uint8_t low = 0x80, high = 0xbf; /* of the second byte: no overlong forms, no surrogates, not past U+10FFFF */
        if (c == 0xe0)
            low = 0xa0;
        else if (c == 0xed)
            high = 0x9f;
        else if (c == 0xf0)
            low = 0x90;
        else if (c == 0xf4)
            high = 0x8f;
        if (p[i + 1] < low || p[i + 1] > high)
            return false;
        for (unsigned k = 2; k <= extra; k++)
            if ((p[i + k] & 0xc0) != 0x80)
                return false;
        i += extra + 1;
    }
    return true;
}

static uint32_t be32(const uint8_t *p)
{
    return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
}

void sc_header_read(const uint8_t *p, sc_header *h)
{
    h->length = be32(p);
    h->stream = be32(p + 4);
    h->type = p[8];
    h->flags = p[9];
}

void sc_header_write(uint8_t *p, uint32_t length, uint32_t stream, uint8_t type, uint8_t flags)
{
    for (int i = 0; i < 4; i++) {
        p[i] = (uint8_t)(length >> (24 - 8 * i));
        p[4 + i] = (uint8_t)(stream >> (24 - 8 * i));
    }
    p[8] = type;
    p[9] = flags;
}

int sc_metadata_next(sc_reader *r, sc_slice *key, sc_slice *value)
{
    sc_field f, g;
    int more;
    while ((more = sc_read_field(r, &f)) == 1) {
        if (f.field != 5 || f.type != 2)
            continue;
        sc_reader pair = {f.bytes.p, f.bytes.p + f.bytes.n};
        *key = *value = (sc_slice){(const uint8_t *)"", 0};
        while ((more = sc_read_field(&pair, &g)) == 1) {
            if (g.type == 2 && g.field == 1)
                *key = g.bytes;
            else if (g.type == 2 && g.field == 2)
                *value = g.bytes;
        }
        return more < 0 ? -1 : 1;
    }
    return more;
}

bool sc_request_parse(const uint8_t *p, size_t n, sc_request *out)
{
    static const uint8_t none[1];
    *out = (sc_request){.service = {none, 0}, .method = {none, 0}, .payload = {none, 0}, .metadata = {none, 0}};
    sc_reader r = {p, p + n};
    sc_field f;
    const uint8_t *at = p;
    int more;
    while ((more = sc_read_field(&r, &f)) == 1) {
        if (f.type == 2) {
            switch (f.field) {
            case 1: out->service = f.bytes; break;
            case 2: out->method = f.bytes; break;
            case 3: out->payload = f.bytes; out->has_payload = true; break;
            case 5:
                if (!out->pairs++)
                    out->metadata.p = at;
                out->metadata.n = (size_t)(r.p - out->metadata.p);
                break;
            }
        } else if (f.type == 0 && f.field == 4) {
            out->timeout_ns = (int64_t)f.value;
        }
        at = r.p;
    }
    if (more < 0 || !sc_utf8_valid(out->service.p, out->service.n) || !sc_utf8_valid(out->method.p, out->method.n))
        return false;
    sc_reader m = {out->metadata.p, out->metadata.p + out->metadata.n};
    sc_slice key, value;
    while (out->pairs && (more = sc_metadata_next(&m, &key, &value)) == 1)
        if (!sc_utf8_valid(key.p, key.n)) /* a value's bytes are no reason to refuse a call that may not even look at it */
            return false;
    return more >= 0;
}

bool sc_response_parse(const uint8_t *p, size_t n, sc_response *out)
{
    static const uint8_t none[1];
    *out = (sc_response){.message = {none, 0}, .payload = {none, 0}};
    sc_reader r = {p, p + n};
    sc_field f, g;
    int more, inner;
    while ((more = sc_read_field(&r, &f)) == 1) {
        if (f.type != 2)
            continue;
        if (f.field == 2) {
            out->payload = f.bytes;
        } else if (f.field == 1) {
            sc_reader s = {f.bytes.p, f.bytes.p + f.bytes.n};
            while ((inner = sc_read_field(&s, &g)) == 1) {
                if (g.field == 1 && g.type == 0)
                    out->code = (int32_t)g.value;
                else if (g.field == 2 && g.type == 2)
                    out->message = g.bytes;
            }
            if (inner < 0)
                return false;
        }
    }
    return more == 0;
}

static size_t status_size(int32_t code, size_t message_len)
{
    return 1 + sc_varint_size((uint64_t)code) + (message_len ? sc_bytes_size(message_len) : 0);
}

size_t sc_response_size(int32_t code, size_t message_len, size_t payload_len)
{
    return (code ? sc_bytes_size(status_size(code, message_len)) : 0) + (payload_len ? sc_bytes_size(payload_len) : 0);
}

size_t sc_response_head(uint8_t *out, uint32_t stream, int32_t code, const char *message, size_t message_len, size_t payload_len)
{
    sc_header_write(out, (uint32_t)sc_response_size(code, message_len, payload_len), stream, SC_RESPONSE, 0);
    uint8_t *p = out + SC_HEADER;
    if (code) {
        *p++ = 1 << 3 | 2;
        p = sc_write_varint(p, status_size(code, message_len));
        p = sc_write_uint(p, 1, (uint64_t)code); /* a negative int32 has ten bytes */
        if (message_len)
            p = sc_write_bytes(p, 2, message, message_len);
    }
    if (payload_len) {
        *p++ = 2 << 3 | 2;
        p = sc_write_varint(p, payload_len);
    }
    return (size_t)(p - out);
}

bool sc_request_frame(sc_buf *out, uint32_t stream, sc_slice service, sc_slice method, sc_slice payload, int64_t timeout_ns)
{
    size_t n = sc_bytes_size(service.n) + sc_bytes_size(method.n) + (payload.n ? sc_bytes_size(payload.n) : 0) +
               (timeout_ns ? 1 + sc_varint_size((uint64_t)timeout_ns) : 0);
    if (n > SC_MAX_MESSAGE || !sc_buf_reserve(out, SC_HEADER + n))
        return false;
    uint8_t *p = out->p + out->len;
    sc_header_write(p, (uint32_t)n, stream, SC_REQUEST, SC_FLAG_REMOTE_CLOSED);
    p = sc_write_bytes(p + SC_HEADER, 1, service.p, service.n);
    p = sc_write_bytes(p, 2, method.p, method.n);
    if (payload.n)
        p = sc_write_bytes(p, 3, payload.p, payload.n);
    if (timeout_ns)
        p = sc_write_uint(p, 4, (uint64_t)timeout_ns);
    out->len += SC_HEADER + n;
    return true;
}
