/* ttrpc frames and envelopes: bytes in, slices out; no I/O.
 *
 * Header: u32 length, u32 stream id (big-endian), u8 type, u8 flags; then `length` bytes of data.
 * Request{service=1 method=2 payload=3 timeout_nano=4 metadata=5}, Response{status=1{code=1 message=2} payload=2}. */
#ifndef SC_FRAME_H
#define SC_FRAME_H
#include "wire.h"

enum { SC_HEADER = 10, SC_MAX_MESSAGE = 4194304 };
enum { SC_REQUEST = 1, SC_RESPONSE = 2, SC_DATA = 3 };
enum { SC_FLAG_REMOTE_CLOSED = 1, SC_FLAG_REMOTE_OPEN = 2, SC_FLAG_NO_DATA = 4 };

/* gRPC codes, as far as the core answers them itself. */
enum {
    SC_OK = 0,
    SC_UNKNOWN = 2,
    SC_INVALID_ARGUMENT = 3,
    SC_DEADLINE_EXCEEDED = 4,
    SC_NOT_FOUND = 5,
    SC_ALREADY_EXISTS = 6,
    SC_RESOURCE_EXHAUSTED = 8,
    SC_FAILED_PRECONDITION = 9,
    SC_UNIMPLEMENTED = 12,
    SC_INTERNAL = 13,
    SC_UNAVAILABLE = 14,
};

typedef struct {
    uint32_t length, stream;
    uint8_t type, flags;
} sc_header;

typedef struct {
    sc_slice service, method, payload;
    bool has_payload;      /* it may be empty and there all the same */
    int64_t timeout_ns;    /* 0 none, negative expired */
    uint32_t pairs;        /* metadata pairs */
    sc_slice metadata;     /* from the first pair to the end of the last one; other fields may stand between */
} sc_request;

typedef struct {
    int32_t code; /* 0 when there is no status */
    sc_slice message, payload;
} sc_response;

void sc_header_read(const uint8_t *p, sc_header *h);
void sc_header_write(uint8_t *p, uint32_t length, uint32_t stream, uint8_t type, uint8_t flags);
/* False: malformed, or a name or a metadata key is not UTF-8. A metadata value may be any bytes. */
bool sc_request_parse(const uint8_t *p, size_t n, sc_request *out);
bool sc_response_parse(const uint8_t *p, size_t n, sc_response *out);
/* Next pair of a metadata run: 1 read, 0 end, -1 malformed. */
int sc_metadata_next(sc_reader *r, sc_slice *key, sc_slice *value);

/* Bytes of a Response's data. code 0: no status is written (as Go does). */
size_t sc_response_size(int32_t code, size_t message_len, size_t payload_len);
/* Header and data up to, not including, the payload's bytes, which the caller sends behind it. Returns the bytes written;
 * `out` has room for SC_RESPONSE_HEAD + message_len. */
#define SC_RESPONSE_HEAD 48
size_t sc_response_head(uint8_t *out, uint32_t stream, int32_t code, const char *message, size_t message_len, size_t payload_len);
/* A whole Request frame for a unary call, appended to a buffer. */
bool sc_request_frame(sc_buf *out, uint32_t stream, sc_slice service, sc_slice method, sc_slice payload, int64_t timeout_ns);
#endif
