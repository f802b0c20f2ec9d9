/* The RPC thread: connections, frames, routing; State, Wait and Connect answered from the exit table.
 *
 * One thread calls sc_server_wait in a loop and is the only one that reads, accepts and drops connections, but for its stand-in
 * (standin.c), which does so while that thread is kept away in Python: what is said here to belong to the RPC thread belongs to
 * whoever holds `role`. Any thread may reply. A connection's lock covers its queue of bytes, its list of calls and their messages,
 * never a system call but epoll_ctl and an eventfd's write: who sends marks the connection, lets the lock go and sends; who finds
 * it marked queues. The server's event_lock may be taken under it. The fd is closed by the last reference. */
#ifndef SC_SERVER_H
#define SC_SERVER_H
#include "exits.h"
#include "frame.h"

typedef struct sc_server sc_server;
typedef struct sc_call sc_call;

/* A message of a stream that its handler has not taken yet. */
typedef struct sc_message {
    struct sc_message *next;
    size_t n;
    uint8_t p[];
} sc_message;

/* A request whose payload is received apart; see large.c. */
typedef struct sc_large {
    struct sc_large *next;
    sc_header h;
    void *owner; /* of the room; NULL until it is given */
    uint8_t *p;  /* the payload: n bytes, of which `got` are there */
    size_t n, got;
    sc_buf rest; /* the request without its payload */
    size_t tail; /* bytes of it that are to come behind the payload */
} sc_large;

typedef struct sc_conn {
    int kind; /* what epoll's pointer points to; see server.c */
    int fd;
    atomic_int refs;
    sc_server *srv;
    int pid, uid, gid; /* SO_PEERCRED */
    struct sc_conn *next, *prev;       /* the server's list; RPC thread */
    /* RPC thread alone: */
    sc_buf in;       /* a frame that is not whole yet */
    size_t consumed; /* bytes of `in` that have been handled */
    sc_buf lent;     /* an earlier `in`, whose bytes calls of the RPC thread may still borrow */
    sc_large *large; /* the request that is being received apart */
    bool large_last; /* the last frame had many bytes */
    size_t skip;     /* what is left of a frame that is too long */
    uint32_t last_stream;
    bool eof; /* under lock too */
    /* under the server's dirty_lock: */
    bool dirty;
    struct sc_conn *next_dirty;
    /* under lock: */
    pthread_mutex_t lock;
    sc_buf out;
    bool sending, dead, paused;
    bool stalled;         /* it is left unread until handlers have taken what their streams were sent */
    size_t unread;        /* bytes of messages that handlers have not taken yet, with what each costs */
    unsigned waiting;     /* threads that wait for `changed` */
    unsigned want_write;  /* calls that are to be told when they may send again */
    pthread_cond_t changed;
    uint32_t armed; /* events asked of epoll */
    sc_call *calls;
    sc_call *streams[64]; /* the same calls, by stream id: chains */
    unsigned inflight;    /* calls being handled */
    unsigned parked;      /* Waits; they may stay for days */
} sc_conn;

struct sc_call {
    atomic_int refs;
    sc_conn *conn;
    sc_call *next, *prev;
    sc_call *next_ready;
    sc_call *next_stream;
    uint32_t stream;
    int method;        /* index given to sc_server_method */
    atomic_bool done, cancelled;
    int64_t deadline;  /* ns of CLOCK_MONOTONIC; 0 none */
    sc_slice payload;  /* borrowed: until the next sc_server_wait */
    uint8_t *owned;    /* or a copy, where it can't be borrowed */
    sc_large *large;   /* or the room in which it was received; sc_call_room */
    uint8_t *metadata; /* a copy, NULL if there is none */
    size_t metadata_len;
    bool parked;
    sc_waiter waiter;
    uint8_t streams; /* SC_STREAM_* */
    uint8_t native;  /* SC_NATIVE_* that had to queue behind others */
    /* under the connection's lock: */
    bool ended;      /* the peer sends no more messages */
    uint8_t want;    /* what it is to be told of: SC_READABLE … */
    sc_message *messages, **messages_tail;
    /* under the server's event_lock: */
    uint8_t events;
    sc_call *next_event;
    void *cookie;    /* Python's Context, while it wants to be told; RPC thread */
};

typedef struct {
    size_t max_message;
    unsigned max_inflight, max_connections; /* max_inflight: of calls being handled, and of parked Waits, each */
    size_t max_unsent; /* bytes waiting for a peer that does not read, before its requests are left unread */
    bool check_peer;
    size_t max_unread; /* bytes waiting for handlers of streams that do not read, before their connection is left unread */
} sc_limits;

/* IDLE: draining, no call is left, and no answer is left to be sent. */
enum { SC_WORK_CALLS = 1, SC_WORK_NOTES = 2, SC_WORK_STOPPED = 4, SC_WORK_WOKEN = 8, SC_WORK_IDLE = 16, SC_WORK_EVENTS = 32,
       SC_WORK_ROOM = 64 };

sc_server *sc_server_new(sc_core *, const sc_limits *);
void sc_server_free(sc_server *);
int sc_server_listen(sc_server *, int fd);
enum { SC_RBUF = 262144, SC_KEPT = 1048576, SC_LARGE = 32768, SC_FEW = 4096 }; /* bytes read at a time; see sc_server_new */
enum { SC_NATIVE_STATE = 1, SC_NATIVE_WAIT, SC_NATIVE_CONNECT, SC_STREAM_CLIENT = 16, SC_STREAM_SERVER = 32 };
/* kind: 0 a Python method, SC_NATIVE_*, or which side of a Python method streams. Before the first wait only. */
int sc_server_method(sc_server *, const char *service, const char *method, int kind, int index);
/* Block for work; a mask of SC_WORK_*. */
int sc_server_wait(sc_server *);
sc_call *sc_server_next(sc_server *); /* the caller owns the reference; NULL: none left */
/* On SC_WORK_ROOM: what to free, until it is NULL; then the bytes that are wanted, or 0, and an owner of so many at p. */
void *sc_server_scrap(sc_server *);
size_t sc_server_room(sc_server *);
void sc_server_give(sc_server *, void *owner, uint8_t *p);
void *sc_call_room(sc_call *); /* the owner of its payload, from now on the caller's; only where `large` is set */
void sc_server_flush(sc_server *);
void sc_server_wake(sc_server *);
void sc_server_drain(sc_server *); /* no new connections or calls; any thread */
void sc_server_stop(sc_server *);  /* sc_server_wait returns SC_WORK_STOPPED; any thread */
unsigned sc_server_inflight(sc_server *); /* calls not answered yet; any thread */
bool sc_server_idle(sc_server *);         /* none, and no answer is left to be sent; whoever holds the role */
void sc_server_close_all(sc_server *); /* RPC thread, or after it has ended */
/* While it is held, nothing is accepted or read: requests wait in their sockets. Calls that were taken are answered. Any thread. */
void sc_server_hold(sc_server *, bool on);
bool sc_server_receiving(sc_server *); /* part of a request is where its handler will have it; RPC thread */
/* A connection, and a Wait, of an earlier image of this process, before the first wait. NULL with errno: the fd is the caller's.
 * in: the beginning of a frame; skip: bytes of one to pass over; out: what has not been sent. */
sc_conn *sc_server_adopt(sc_server *, int fd, uint32_t last_stream, size_t skip, bool eof, const void *in, size_t n,
                         const void *out, size_t m);
int sc_conn_adopt_wait(sc_conn *, uint32_t stream, const char *id, const char *exec_id, int64_t deadline);
void sc_conn_answer_with(sc_conn *, uint32_t stream, int32_t code, const char *text, const void *payload, size_t n);

/* standin.c: 0 or -errno. Stopped before sc_server_close_all. */
int sc_standin_start(sc_server *);
void sc_standin_stop(sc_server *);
void sc_standin_leave(sc_server *); /* the RPC thread goes to Python, and gives up the role */
int sc_standin_return(sc_server *); /* it is back, and has it again; what it has missed, as a mask of SC_WORK_* */
void sc_standin_hold(sc_server *, sc_call *); /* for the RPC thread's return */
/* server.c, for standin.c */
int sc_server_handle(sc_server *, bool standin);
void sc_server_poll(sc_server *);
void sc_server_mail(sc_server *, bool watched);

void sc_call_ref(sc_call *);
void sc_call_unref(sc_call *);
/* Answer, once. batch: the RPC thread may send it with others at the next flush. */
void sc_call_reply(sc_call *, int32_t code, const char *message, size_t message_len, const void *payload, size_t n, bool batch);

/* stream.c. What the peer of a stream sends is taken, and what it is sent is given, message by message. Any thread. */
enum { SC_READABLE = 1, SC_WRITABLE = 2, SC_CANCELLED = 4 };
/* The next message, which the caller frees: 1; no more will come: 0; -ECANCELED: the connection or the call has ended;
 * -EAGAIN: there is none yet, and `wait` was false; -ETIMEDOUT: none before the call's deadline. */
int sc_call_recv(sc_call *, bool wait, sc_message **out);
/* Send a message: 0, or an error as above; -EAGAIN: the peer has not read what it was sent; -EMSGSIZE. */
int sc_call_send(sc_call *, const void *p, size_t n, bool wait);
/* Be told of one of these by sc_server_events, once. What holds already; 0: it will be told. */
int sc_call_want(sc_call *, int events);
sc_call *sc_server_events(sc_server *, int *events); /* RPC thread; the caller owns the reference; NULL: none */
void sc_stream_data(sc_conn *, const sc_header *, const uint8_t *data);
bool sc_stream_push(sc_call *, const uint8_t *p, size_t n); /* under the connection's lock; false: no memory */
void sc_stream_tell(sc_call *, int events);                 /* under the connection's lock */
void sc_stream_broken(sc_conn *);                           /* under its lock: it has ended, or its peer sends no more */
void sc_stream_writable(sc_conn *);                         /* under its lock */
void sc_stream_over(sc_call *);                             /* under the connection's lock: it has been answered */
void sc_stream_free(sc_call *);

/* read.c and request.c, for each other and server.c */
void sc_conn_drop(sc_server *, sc_conn *);
void sc_conn_ready(sc_server *, sc_conn *, uint32_t events);
bool sc_conn_quiet(sc_conn *, bool ending);
void sc_conn_answer(sc_conn *, uint32_t stream, int32_t code, const char *text);
void sc_call_native(sc_server *, sc_call *, int native); /* answers it, in C */
/* large: the payload that stands apart from `data`, or NULL; NULL in it when a call has taken it. */
void sc_server_request(sc_server *, sc_conn *, const sc_header *h, const uint8_t *data, size_t n, sc_large **large);
/* large.c, with the role */
void sc_large_plan(sc_server *, sc_conn *);   /* `in` has the beginning of a frame: ask for room if it is worth it */
void sc_large_begin(sc_server *);             /* with the room that was given */
void sc_large_forget(sc_server *, sc_conn *); /* receive it like any other, or not at all */
void sc_large_end(sc_server *);
/* What recv gives; behind: what came that is not this request's. */
ssize_t sc_large_receive(sc_server *, sc_conn *, uint8_t *rbuf, sc_slice *behind);
void sc_large_drop(sc_server *, sc_large *); /* any thread */
sc_call *sc_conn_call(sc_conn *, uint32_t stream); /* under its lock */
/* conn.c, for server.c */
bool sc_call_copy(sc_call *); /* of its payload; false: no memory, and it has been answered and let go of */
void sc_conn_unref(sc_conn *);
void sc_server_unref(sc_server *);
/* of: the call that it belongs to, or NULL. With its last frame it leaves the connection's list in the same step in which that
 * takes its place in the order of sending, so that what comes for it later is answered, and behind that frame. Another frame of a
 * call that has its answer is not sent: false. */
bool sc_conn_send(sc_conn *, const void *head, size_t head_len, const void *body, size_t body_len, bool batch, sc_call *of,
                  bool last);
void sc_conn_flush(sc_conn *);
void sc_conn_arm(sc_conn *); /* under its lock */
void sc_conn_mark_dirty(sc_conn *);

struct sc_server {
    atomic_int refs; /* its connections', and its owner's */
    sc_core *core;
    sc_limits limits;
    int epfd, wakefd;
    struct listener {
        int kind, fd;
    } listeners[8];
    unsigned nlisteners;
    int wake_kind, mail_kind;
    struct standin {
        pthread_t thread;
        bool running;
        pthread_mutex_t role;
        atomic_uint moves;  /* odd: the RPC thread is away */
        atomic_uint asleep; /* 1: it waits for the RPC thread to go */
        atomic_bool back, quit;
        pid_t pid;          /* whose thread it is */
        atomic_uint acted;  /* times; for tests and statistics */
        bool acting;        /* under role, as all below */
        int missed;         /* SC_WORK_* for the RPC thread */
        bool mail_muted;
        sc_call *ready, **ready_tail;
        size_t held;        /* bytes of the calls in `ready` */
        uint8_t *rbuf;
    } standin;
    pthread_mutex_t dirty_lock;
    struct sc_route {
        struct sc_route *next;
        char *service, *method;
        size_t service_len, method_len;
        int kind, index;
    } *routes[64];
    sc_conn *conns, *dirty;
    unsigned nconns;
    sc_call *ready, **ready_tail;
    struct epoll_event evs[64];
    int nev, at;
    uint8_t *rbuf;
    int64_t accept_again; /* 0, or when to try accept after EMFILE */
    atomic_bool draining, stop, held;
    sc_conn *wanting;      /* it waits for room; under role */
    size_t room;           /* how much; RPC thread, as the next three */
    void *given, *unused;  /* room; and what came to nothing */
    uint8_t *given_at;
    atomic_size_t promised; /* bytes of room, all connections' */
    sc_large *scrap;       /* under dirty_lock */
    atomic_bool has_scrap;
    pthread_mutex_t event_lock;
    sc_call *events, **events_tail;
    atomic_bool has_events;
    _Atomic pthread_t reader; /* who has the role, or had it last */
    atomic_uint inflight;
    atomic_ullong calls, failures; /* so far: requests that were taken, and answers with another code than OK */
};
#endif
