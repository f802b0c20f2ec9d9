# cython: language_level=3, freethreading_compatible=False, binding=False, embedsignature=False
"""See _frames.pyi."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

cdef extern from "core/frame.h" nogil:
    enum: SC_HEADER, SC_RESPONSE_HEAD
    ctypedef struct sc_slice:
        const uint8_t *p
        size_t n
    ctypedef struct sc_buf:
        uint8_t *p
        size_t len
    ctypedef struct sc_reader:
        const uint8_t *p
        const uint8_t *end
    ctypedef struct sc_header:
        uint32_t length
        uint32_t stream
        uint8_t type
        uint8_t flags
    ctypedef struct sc_request:
        sc_slice service
        sc_slice method
        sc_slice payload
        int64_t timeout_ns
        uint32_t pairs
        sc_slice metadata
    ctypedef struct sc_response:
        int32_t code
        sc_slice message
        sc_slice payload
    bint sc_buf_put(sc_buf *, const void *, size_t)
    void sc_buf_shift(sc_buf *, size_t)
    void sc_buf_free(sc_buf *)
    void sc_header_read(const uint8_t *, sc_header *)
    void sc_header_write(uint8_t *, uint32_t, uint32_t, uint8_t, uint8_t)
    bint sc_request_parse(const uint8_t *, size_t, sc_request *)
    bint sc_response_parse(const uint8_t *, size_t, sc_response *)
    int sc_metadata_next(sc_reader *, sc_slice *, sc_slice *)
    size_t sc_response_size(int32_t, size_t, size_t)
    size_t sc_response_head(uint8_t *, uint32_t, int32_t, const char *, size_t, size_t)
    size_t sc_varint_size(uint64_t)
    size_t sc_bytes_size(size_t)
    uint8_t *sc_write_varint(uint8_t *, uint64_t)
    uint8_t *sc_write_bytes(uint8_t *, unsigned, const void *, size_t)
    uint8_t *sc_write_uint(uint8_t *, unsigned, uint64_t)

from .ttrpc.codec import MESSAGE_MAX, DecodeError, Frame, Request, Response


cdef class FrameParser:
    cdef sc_buf held  # a frame that is not whole yet
    cdef size_t skip  # what is left of one that is too long
    cdef size_t message_max

    def __init__(self, message_max=MESSAGE_MAX):
        self.message_max = message_max

    def __dealloc__(self):
        sc_buf_free(&self.held)

    @property
    def pending(self):
        return self.held.len + self.skip

    def feed(self, const uint8_t[::1] data):
        cdef list frames = []
        cdef const uint8_t *p = NULL
        cdef size_t n = data.shape[0], taken
        if n:
            p = &data[0]
        if self.skip:
            taken = min(self.skip, n)
            self.skip -= taken
            p += taken
            n -= taken
        if not self.held.len:
            taken = self.cut(p, n, frames)
            if taken < n and not sc_buf_put(&self.held, p + taken, n - taken):
                raise MemoryError
        else:
            if not sc_buf_put(&self.held, p, n):
                raise MemoryError
            sc_buf_shift(&self.held, self.cut(self.held.p, self.held.len, frames))
            if not self.held.len:
                sc_buf_free(&self.held)
        return frames

    cdef size_t cut(self, const uint8_t *p, size_t n, list frames) except? 0:
        """Every whole frame of p; the bytes that they took."""
        cdef size_t at = 0, left
        cdef sc_header h
        while n - at >= SC_HEADER:
            sc_header_read(p + at, &h)
            left = n - at - SC_HEADER
            if h.length > self.message_max:
                frames.append(Frame(h.stream, h.type, h.flags, b"", h.length))
                if left < h.length:
                    self.skip = h.length - left
                    return n
            elif left < h.length:
                break
            else:
                frames.append(Frame(h.stream, h.type, h.flags, PyBytes_FromStringAndSize(<const char *>p + at + SC_HEADER, h.length)))
            at += SC_HEADER + h.length
        return at


cdef size_t checked(size_t n) except? 0:
    if n > <size_t>MESSAGE_MAX:
        raise ValueError(f"message length {n} exceed maximum message size of {MESSAGE_MAX}")
    return n


def encode_frame(stream_id, type, flags, bytes data):
    cdef size_t n = checked(PyBytes_GET_SIZE(data))
    cdef bytes out = PyBytes_FromStringAndSize(NULL, SC_HEADER + n)
    cdef uint8_t *p = <uint8_t *>PyBytes_AS_STRING(out)
    try:
        sc_header_write(p, n, stream_id, type, flags)
    except OverflowError as error:
        raise ValueError(str(error)) from None
    memcpy(p + SC_HEADER, PyBytes_AS_STRING(data), n)
    return out


cdef size_t field_size(bytes value) noexcept:
    return sc_bytes_size(PyBytes_GET_SIZE(value)) if PyBytes_GET_SIZE(value) else 0


cdef uint8_t *write_field(uint8_t *p, unsigned field, bytes value) noexcept:
    return sc_write_bytes(p, field, PyBytes_AS_STRING(value), PyBytes_GET_SIZE(value)) if PyBytes_GET_SIZE(value) else p


def encode_request(str service, str method, bytes payload=b"", int64_t timeout_nano=0, metadata=()):
    cdef bytes s = service.encode(), m = method.encode(), key, value
    cdef list pairs = [(k.encode(), v.encode()) for k, v in metadata]
    cdef size_t n = field_size(s) + field_size(m) + field_size(payload)
    if timeout_nano:
        n += 1 + sc_varint_size(<uint64_t>timeout_nano)
    for key, value in pairs:
        n += sc_bytes_size(field_size(key) + field_size(value))
    cdef bytes out = PyBytes_FromStringAndSize(NULL, n)
    cdef uint8_t *p = <uint8_t *>PyBytes_AS_STRING(out)
    p = write_field(write_field(write_field(p, 1, s), 2, m), 3, payload)
    if timeout_nano:
        p = sc_write_uint(p, 4, <uint64_t>timeout_nano)
    for key, value in pairs:
        p[0] = 5 << 3 | 2
        p = sc_write_varint(p + 1, field_size(key) + field_size(value))
        p = write_field(write_field(p, 1, key), 2, value)
    return out


cdef str text(sc_slice s):
    try:
        return (<const char *>s.p)[:s.n].decode()
    except UnicodeDecodeError:
        raise DecodeError("string field contains invalid UTF-8") from None


def decode_request(bytes data):
    cdef sc_request q
    cdef sc_reader r
    cdef sc_slice key, value
    cdef list pairs = []
    if not sc_request_parse(<const uint8_t *>PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data), &q):
        raise DecodeError("request can't be parsed")
    r.p = q.metadata.p
    r.end = q.metadata.p + q.metadata.n
    while q.pairs and sc_metadata_next(&r, &key, &value) == 1:
        pairs.append((text(key), (<const char *>value.p)[:value.n].decode("utf-8", "replace")))
    payload = PyBytes_FromStringAndSize(<const char *>q.payload.p, q.payload.n)
    return Request(text(q.service), text(q.method), payload, q.timeout_ns, tuple(pairs))


def encode_response(bytes payload=b"", int32_t code=0, str message=""):
    """The data of a Response, without its frame's header."""
    cdef bytes t = message.encode() if code else b""
    cdef size_t n = PyBytes_GET_SIZE(payload), size = sc_response_size(code, PyBytes_GET_SIZE(t), n), k
    cdef bytes head = PyBytes_FromStringAndSize(NULL, SC_RESPONSE_HEAD + PyBytes_GET_SIZE(t))
    k = sc_response_head(<uint8_t *>PyBytes_AS_STRING(head), 0, code, PyBytes_AS_STRING(t), PyBytes_GET_SIZE(t), n)
    cdef bytes out = PyBytes_FromStringAndSize(NULL, size)
    memcpy(PyBytes_AS_STRING(out), PyBytes_AS_STRING(head) + SC_HEADER, k - SC_HEADER)
    memcpy(PyBytes_AS_STRING(out) + (k - SC_HEADER), PyBytes_AS_STRING(payload), n)
    return out


def decode_response(bytes data):
    cdef sc_response q
    if not sc_response_parse(<const uint8_t *>PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data), &q):
        raise DecodeError("response can't be parsed")
    return Response(q.code, text(q.message), PyBytes_FromStringAndSize(<const char *>q.payload.p, q.payload.n))
