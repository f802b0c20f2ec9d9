# Declares only; the rules stand in core/server.h.
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t

from ._reaper cimport sc_buf, sc_core, sc_slice, sc_waiter

cdef extern from "core/server.h" nogil:
    struct standin:
        unsigned acted
    ctypedef struct sc_server:
        standin standin
        unsigned nconns
        sc_conn *conns
        unsigned inflight
        unsigned long long calls
        unsigned long long failures
    ctypedef struct sc_conn:
        int fd
        int pid
        int uid
        int gid
        sc_conn *next
        sc_buf in_ "in"
        size_t consumed
        size_t skip
        uint32_t last_stream
        bint eof
        sc_buf out
        sc_call *calls
    ctypedef struct sc_call:
        sc_conn *conn
        sc_call *next
        bint parked
        sc_waiter waiter
        uint32_t stream
        int method
        bint done
        bint cancelled
        int64_t deadline
        sc_slice payload
        void *large
        uint8_t *metadata
        size_t metadata_len
        uint8_t streams
        void *cookie
    ctypedef struct sc_message:
        size_t n
        uint8_t *p
    ctypedef struct sc_limits:
        size_t max_message
        unsigned max_inflight
        unsigned max_connections
        size_t max_unsent
        bint check_peer
        size_t max_unread
    enum:
        SC_WORK_CALLS, SC_WORK_NOTES, SC_WORK_STOPPED, SC_WORK_WOKEN, SC_WORK_IDLE, SC_WORK_EVENTS, SC_WORK_ROOM
        SC_NATIVE_STATE, SC_NATIVE_WAIT, SC_NATIVE_CONNECT, SC_STREAM_CLIENT, SC_STREAM_SERVER
        SC_READABLE, SC_WRITABLE, SC_CANCELLED
        SC_MAX_MESSAGE
        SC_INTERNAL, SC_UNKNOWN, SC_RESOURCE_EXHAUSTED
    sc_server *sc_server_new(sc_core *core, const sc_limits *limits)
    void sc_server_free(sc_server *s)
    bint sc_server_receiving(sc_server *s)
    void sc_server_hold(sc_server *s, bint on)
    sc_conn *sc_server_adopt(sc_server *s, int fd, uint32_t last_stream, size_t skip, bint eof, const void *in_, size_t n,
                             const void *out, size_t m)
    int sc_conn_adopt_wait(sc_conn *c, uint32_t stream, const char *id, const char *exec_id, int64_t deadline)
    void sc_conn_answer_with(sc_conn *c, uint32_t stream, int32_t code, const char *text, const void *payload, size_t n)
    int sc_server_listen(sc_server *s, int fd)
    int sc_server_method(sc_server *s, const char *service, const char *method, int kind, int index)
    int sc_server_wait(sc_server *s)
    sc_call *sc_server_next(sc_server *s)
    void *sc_server_scrap(sc_server *s)
    size_t sc_server_room(sc_server *s)
    void sc_server_give(sc_server *s, void *owner, uint8_t *p)
    void *sc_call_room(sc_call *k)
    void sc_server_drain(sc_server *s)
    void sc_server_stop(sc_server *s)
    void sc_server_wake(sc_server *s)
    unsigned sc_server_inflight(sc_server *s)
    int sc_standin_start(sc_server *s)
    void sc_server_close_all(sc_server *s)
    void sc_call_unref(sc_call *k)
    int sc_call_recv(sc_call *k, bint wait, sc_message **out)
    int sc_call_send(sc_call *k, const void *p, size_t n, bint wait)
    int sc_call_want(sc_call *k, int events)
    sc_call *sc_server_events(sc_server *s, int *events)
    void sc_call_reply(sc_call *k, int32_t code, const char *message, size_t message_len, const void *payload, size_t n,
                       bint batch)

cdef extern from "core/frame.h" nogil:
    ctypedef struct sc_reader:
        const uint8_t *p
        const uint8_t *end
    int sc_metadata_next(sc_reader *r, sc_slice *key, sc_slice *value)
