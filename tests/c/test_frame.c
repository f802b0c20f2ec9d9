/* frame.c and wire.h: goldens, round trips, and what is malformed. Input is always a heap copy of exactly its length, so
 * that the address sanitiser sees a read of one byte too many. */
#include "check.h"
#include "frame.h"

static sc_slice text(const char *s)
{
    return (sc_slice){(const uint8_t *)s, strlen(s)};
}

static bool is(sc_slice s, const char *want)
{
    return sc_slice_is(s, want);
}

static bool request(const void *p, size_t n, sc_request *out)
{
    static uint8_t *copy;
    free(copy);
    copy = malloc(n ? n : 1);
    memcpy(copy, p, n);
    return sc_request_parse(copy, n, out);
}

#define PARSES(out, bytes) request(bytes, sizeof(bytes) - 1, out)

static void header(void)
{
    uint8_t p[SC_HEADER];
    static const uint8_t golden[] = {0x00, 0x40, 0x00, 0x01, 0xff, 0xff, 0xff, 0xfd, 3, 5};
    sc_header_write(p, 4194305, 4294967293U, SC_DATA, SC_FLAG_REMOTE_CLOSED | SC_FLAG_NO_DATA);
    CHECK(!memcmp(p, golden, sizeof p));
    sc_header h;
    sc_header_read(p, &h);
    CHECK_EQ(h.length, 4194305);
    CHECK_EQ(h.stream, 4294967293U);
    CHECK_EQ(h.type, 3);
    CHECK_EQ(h.flags, 5);
    for (unsigned i = 0; i < 100000; i++) {
        uint32_t length = (uint32_t)random() << 1 ^ (uint32_t)random(), stream = (uint32_t)random() << 1;
        uint8_t type = (uint8_t)random(), flags = (uint8_t)random();
        sc_header_write(p, length, stream, type, flags);
        sc_header_read(p, &h);
        CHECK(h.length == length && h.stream == stream && h.type == type && h.flags == flags);
    }
}

static void request_golden(void)
{
    static const uint8_t golden[] = "\0\0\0\x0b\0\0\0\x07\x01\x01"
                                    "\x0a\x01s\x12\x01m\x1a\x01p\x20\x01";
    sc_buf b = {0};
    CHECK(sc_request_frame(&b, 7, text("s"), text("m"), text("p"), 1));
    CHECK_EQ(b.len, sizeof golden - 1);
    CHECK(!memcmp(b.p, golden, b.len));
    sc_buf_free(&b);
    uint8_t *large = calloc(1, SC_MAX_MESSAGE);
    CHECK(!sc_request_frame(&b, 1, text("s"), text("m"), (sc_slice){large, SC_MAX_MESSAGE}, 0));
    sc_buf_free(&b);
    free(large);
}

static void response_golden(void)
{
    uint8_t out[SC_RESPONSE_HEAD + 16];
    static const uint8_t failed[] = "\0\0\0\x08\0\0\0\x03\x02\0"
                                    "\x0a\x06\x08\x05\x12\x02no";
    size_t n = sc_response_head(out, 3, SC_NOT_FOUND, "no", 2, 0);
    CHECK_EQ(n, sizeof failed - 1);
    CHECK(!memcmp(out, failed, n));
    /* The payload's own bytes are sent behind the head; fine has no status, as Go sends it. */
    static const uint8_t fine[] = "\0\0\0\xcb\0\0\0\x03\x02\0"
                                  "\x12\xc8\x01";
    n = sc_response_head(out, 3, SC_OK, NULL, 0, 200);
    CHECK_EQ(n, sizeof fine - 1);
    CHECK(!memcmp(out, fine, n));
    CHECK_EQ(sc_response_head(out, 3, SC_OK, NULL, 0, 0), SC_HEADER);
    CHECK_EQ(sc_response_size(0, 0, 200), 203);
}

static void response_parse(void)
{
    sc_response r;
    CHECK(sc_response_parse((const uint8_t *)"\x0a\x06\x08\x05\x12\x02no\x12\x01p", 11, &r));
    CHECK_EQ(r.code, 5);
    CHECK(is(r.message, "no") && is(r.payload, "p"));
    CHECK(sc_response_parse((const uint8_t *)"\x0a\x00", 2, &r)); /* the empty status that Rust writes */
    CHECK_EQ(r.code, 0);
    CHECK(sc_response_parse(NULL, 0, &r));
    CHECK_EQ(r.code, 0);
    CHECK(!sc_response_parse((const uint8_t *)"\x0a\x02\x08\x85", 4, &r)); /* cut within the status */
    CHECK(!sc_response_parse((const uint8_t *)"\x12\x02p", 3, &r));
}

/* A field with a length, appended. */
static void put(sc_buf *b, unsigned field, const void *p, size_t n)
{
    sc_buf_reserve(b, n + 16);
    b->len = (size_t)(sc_write_bytes(b->p + b->len, field, p, n) - b->p);
}

static void put_uint(sc_buf *b, unsigned field, uint64_t v)
{
    sc_buf_reserve(b, 16);
    b->len = (size_t)(sc_write_uint(b->p + b->len, field, v) - b->p);
}

static char *word(size_t n)
{
    char *w = malloc(n + 1);
    for (size_t i = 0; i < n; i++)
        w[i] = (char)('a' + random() % 26);
    w[n] = 0;
    return w;
}

static void request_round_trip(void)
{
    for (int i = 0; i < 2000; i++) {
        sc_buf b = {0};
        char *service = word((size_t)random() % 300), *method = word((size_t)random() % 40);
        char *payload = word((size_t)random() % 20000);
        int64_t timeout = i % 3 ? ((int64_t)random() << 32) * (i % 2 ? 1 : -1) : 0;
        unsigned pairs = (unsigned)random() % 5;
        put(&b, 1, service, strlen(service));
        put(&b, 2, method, strlen(method));
        for (unsigned k = 0; k < pairs; k++) {
            sc_buf pair = {0};
            put(&pair, 1, service, strlen(service) / 2);
            put(&pair, 2, method, strlen(method));
            put(&b, 5, pair.p, pair.len);
            put(&b, 9, "unknown", 7);
            sc_buf_free(&pair);
        }
        put(&b, 3, payload, strlen(payload));
        if (timeout)
            put_uint(&b, 4, (uint64_t)timeout);
        sc_request q;
        CHECK(request(b.p, b.len, &q));
        CHECK(is(q.service, service) && is(q.method, method) && is(q.payload, payload));
        CHECK_EQ(q.timeout_ns, timeout);
        CHECK_EQ(q.pairs, pairs);
        sc_reader m = {q.metadata.p, q.metadata.p + q.metadata.n};
        sc_slice key, value;
        for (unsigned k = 0; k < pairs; k++) {
            CHECK_EQ(sc_metadata_next(&m, &key, &value), 1);
            CHECK_EQ(key.n, strlen(service) / 2);
            CHECK(is(value, method));
        }
        CHECK_EQ(sc_metadata_next(&m, &key, &value), 0);
        /* Cut anywhere: it parses as less, or not at all; never past the end. */
        for (int k = 0; k < 20; k++)
            request(b.p, (size_t)random() % (b.len + 1), &q);
        free(service);
        free(method);
        free(payload);
        sc_buf_free(&b);
    }
}

static void timeouts(void)
{
    sc_request q;
    CHECK(PARSES(&q, "\x20\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"));
    CHECK_EQ(q.timeout_ns, -1);
    CHECK(PARSES(&q, "\x20\xff\xff\xff\xff\xff\xff\xff\xff\x7f"));
    CHECK_EQ(q.timeout_ns, INT64_MAX);
    CHECK(PARSES(&q, "\x20\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01"));
    CHECK_EQ(q.timeout_ns, INT64_MIN);
}

static void malformed(void)
{
    sc_request q;
    CHECK(PARSES(&q, ""));
    CHECK(!PARSES(&q, "\x20"));                                             /* a tag and nothing */
    CHECK(!PARSES(&q, "\x20\x80"));                                         /* truncated varint */
    CHECK(!PARSES(&q, "\x80"));                                             /* truncated tag */
    CHECK(!PARSES(&q, "\x20\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01")); /* 11 bytes */
    CHECK(!PARSES(&q, "\x20\xff\xff\xff\xff\xff\xff\xff\xff\xff\x02"));     /* 65 bits */
    CHECK(!PARSES(&q, "\x00\x00"));                                         /* tag 0 */
    CHECK(!PARSES(&q, "\x02\x00"));                                         /* field 0 */
    CHECK(!PARSES(&q, "\x80\x80\x80\x80\x10\x00"));                         /* a field number over 2^29 - 1 */
    CHECK(PARSES(&q, "\xf8\xff\xff\xff\x0f\x00"));                          /* that number itself */
    CHECK(!PARSES(&q, "\x0a\x05serv"));                                     /* length past the end */
    CHECK(!PARSES(&q, "\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01s"));    /* a length that overflows */
    CHECK(!PARSES(&q, "\x2a\x04\x0a\x05ke"));                               /* inner length past the pair's end */
    CHECK(!PARSES(&q, "\x2a\x02\x0a\x05keeps"));                            /* though not past the message's */
    CHECK(!PARSES(&q, "\x31seven77"));                                      /* fixed64 with 7 bytes */
    CHECK(!PARSES(&q, "\x35thr"));                                          /* fixed32 with 3 */
    CHECK(!PARSES(&q, "\x36"));                                             /* wire types 6 and 7 */
    CHECK(!PARSES(&q, "\x37"));
    CHECK(!PARSES(&q, "\x34"));         /* end of a group that never began */
    CHECK(!PARSES(&q, "\x34\x33")); /* though one follows */
    CHECK(!PARSES(&q, "\x33\x0a\x01s")); /* a group without its end */
    CHECK(PARSES(&q, "\x33\x0a\x01s\x34"));
    CHECK_EQ(q.service.n, 0); /* what is in a group is not ours */
}

static void wrong_wire_types_are_unknown_fields(void)
{
    sc_request q;
    CHECK(PARSES(&q, "\x08\x01\x0a\x01s\x0d\x01\x02\x03\x04\x22\x01t\x18\x02"));
    CHECK(is(q.service, "s"));
    CHECK_EQ(q.timeout_ns, 0);
    CHECK_EQ(q.payload.n, 0);
}

static void repeated_scalars_last_wins(void)
{
    sc_request q;
    CHECK(PARSES(&q, "\x0a\x01" "a" "\x12\x01" "x" "\x0a\x02" "bc" "\x20\x01\x12\x01" "y" "\x20\x02\x1a\x01p\x1a\x00"));
    CHECK(is(q.service, "bc") && is(q.method, "y") && is(q.payload, ""));
    CHECK_EQ(q.timeout_ns, 2);
}

static void nested_groups(void)
{
    enum { DEEP = SC_GROUP_DEPTH };
    uint8_t *p = malloc(2 * DEEP + 3);
    memset(p, 0x33, DEEP);
    memset(p + DEEP, 0x34, DEEP);
    memcpy(p + 2 * DEEP, "\x0a\x01s", 3);
    sc_request q;
    CHECK(request(p, 2 * DEEP + 3, &q));
    CHECK(is(q.service, "s"));
    CHECK(!request(p, 2 * DEEP - 1, &q));
    memset(p, 0x33, 2 * DEEP); /* all beginnings */
    CHECK(!request(p, 2 * DEEP, &q));
    free(p);
    p = malloc(2 * (DEEP + 1));
    memset(p, 0x33, DEEP + 1);
    memset(p + DEEP + 1, 0x34, DEEP + 1);
    CHECK(!request(p, 2 * (DEEP + 1), &q));
    free(p);
}

static void utf8(void)
{
    static const struct {
        const char *s;
        bool ok;
    } cases[] = {
        {"", true}, {"plain", true}, {"\xc3\xa9", true}, {"\xe2\x82\xac", true}, {"\xf0\x9f\x90\x8d", true},
        {"\xf4\x8f\xbf\xbf", true}, {"\xed\x9f\xbf", true}, {"\xee\x80\x80", true}, {"\xc2\x80", true},
        {"\x80", false}, {"\xc3", false}, {"a\xe2\x82", false}, {"\xf0\x9f\x90", false}, {"\xc0\x80", false},
        {"\xc1\xbf", false}, {"\xe0\x9f\xbf", false}, {"\xed\xa0\x80", false}, {"\xf0\x8f\xbf\xbf", false},
        {"\xf4\x90\x80\x80", false}, {"\xf5\x80\x80\x80", false}, {"\xff", false}, {"\xc3\x28", false},
        {"\xe2\x28\xa1", false}, {"\xe2\x82\x28", false}, {"\xf0\x9f\x90\x28", false},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        size_t n = strlen(cases[i].s);
        uint8_t *copy = malloc(n ? n : 1);
        memcpy(copy, cases[i].s, n);
        if (sc_utf8_valid(copy, n) != cases[i].ok) {
            fprintf(stderr, "utf8 case %zu\n", i);
            CHECK(!"as listed");
        }
        free(copy);
    }
    sc_request q;
    CHECK(!PARSES(&q, "\x0a\x01\xff"));
    CHECK(!PARSES(&q, "\x12\x01\xff"));
    CHECK(!PARSES(&q, "\x2a\x03\x0a\x01\xff"));
    CHECK(PARSES(&q, "\x1a\x01\xff"));         /* a payload is bytes */
    CHECK(PARSES(&q, "\x2a\x03\x12\x01\xff")); /* and so may be a metadata value */
    CHECK(PARSES(&q, "\x0a\x03s\0x"));
    CHECK_EQ(q.service.n, 3);
}

static void timestamps(void)
{
    uint8_t p[SC_TIMESTAMP_MAX];
    size_t n = (size_t)(sc_write_timestamp(p, 5, 1500000001) - p);
    CHECK_EQ(n, 10);
    CHECK(!memcmp(p, "\x2a\x08\x08\x01\x10\x81\xca\xb5\xee\x01", n));
    CHECK_EQ(sc_write_timestamp(p, 5, 0) - p, 2);
    n = (size_t)(sc_write_timestamp(p, 5, -1) - p); /* a second before the epoch, and 999999999 ns */
    CHECK(n <= sizeof p);
    CHECK(!memcmp(p, "\x2a\x11\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01\x10\xff\x93\xeb\xdc\x03", n));
    static const int64_t ends[] = {INT64_MAX, INT64_MIN, 1, 999999999, 1000000000};
    for (size_t i = 0; i < sizeof ends / sizeof *ends; i++)
        CHECK(sc_write_timestamp(p, 15, ends[i]) - p <= SC_TIMESTAMP_MAX);
}

static void noise(void)
{
    /* Mostly bytes that mean something, so that it gets past the first tag. */
    static const uint8_t seeds[] = {0x0a, 0x12, 0x1a, 0x20, 0x2a, 0x33, 0x34, 0x80, 0xff, 0, 1, 2, 3, 5};
    for (int i = 0; i < 300000; i++) {
        uint8_t p[64];
        size_t n = (size_t)random() % sizeof p;
        for (size_t k = 0; k < n; k++)
            p[k] = random() % 4 ? seeds[(size_t)random() % sizeof seeds] : (uint8_t)random();
        sc_request q;
        if (request(p, n, &q) && q.pairs) {
            sc_reader m = {q.metadata.p, q.metadata.p + q.metadata.n};
            sc_slice key, value;
            unsigned found = 0;
            while (sc_metadata_next(&m, &key, &value) == 1)
                found++;
            CHECK_EQ(found, q.pairs);
        }
    }
}

int main(void)
{
    srandom(1);
    RUN(header);
    RUN(request_golden);
    RUN(response_golden);
    RUN(response_parse);
    RUN(request_round_trip);
    RUN(timeouts);
    RUN(malformed);
    RUN(wrong_wire_types_are_unknown_fields);
    RUN(repeated_scalars_last_wins);
    RUN(nested_groups);
    RUN(utf8);
    RUN(timestamps);
    RUN(noise);
    sc_request q;
    request("", 0, &q);
    return 0;
}
