# Declares only; the rules stand in core/*.h.
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t

cdef extern from "core/process.h" nogil:
    ctypedef int pid_t
    ctypedef struct sc_exit_status:
        pid_t pid
        int status
        bint signaled
    ctypedef struct sc_fd_map:
        int child
        int parent
    ctypedef struct sc_spawn_args:
        const char *path
        char **argv
        char **envp
        const char *cwd
        const sc_fd_map *fds
        size_t nfds
        bint new_session
        bint new_group
        bint dies_with_thread
    enum:
        SC_AT_FORK, SC_AT_CHDIR, SC_AT_FDS, SC_AT_EXEC
    int sc_kernel_check()
    int sc_set_environment(const char *block, size_t n)
    void sc_bound_malloc() nogil
    int sc_own_pages(const void *runs, size_t n)
    int sc_set_title(const char *args, size_t nargs, const char *env, size_t nenv, const char *name)
    int sc_set_subreaper(bint on)
    int sc_get_subreaper()
    int sc_pidfd_open(pid_t pid)
    int sc_pidfd_send_signal(int pidfd, int sig)
    int sc_raise_nofile(uint64_t *was, uint64_t *now)
    void sc_nofile_before(uint64_t *soft, uint64_t *hard, bint set)
    int sc_reap_pidfd(int pidfd, sc_exit_status *out)
    pid_t sc_spawn(const sc_spawn_args *args, int *pidfd, int *at)
    int sc_mount_in(const char *cwd, const char *source, const char *target, const char *fstype, unsigned long flags,
                    const void *data)
    int64_t sc_now_mono()

cdef extern from "core/buf.h" nogil:
    ctypedef struct sc_buf:
        uint8_t *p
        size_t len
    void sc_buf_free(sc_buf *b)
    int sc_written_pages(int pid, sc_buf *runs)
    ctypedef struct sc_slice:
        const uint8_t *p
        size_t n

cdef extern from "core/ledger.h" nogil:
    ctypedef struct sc_ledger:
        pass
    int sc_ledger_open(const char *path, sc_ledger **out)

cdef extern from "core/exits.h" nogil:
    enum:
        SC_NOTE_JOB, SC_NOTE_TIMER, SC_NOTE_TOLD, SC_NOTE_PID, SC_NOTE_SIGNAL, SC_NOTE_POST, SC_NOTE_TEARDOWN, SC_NOTE_ASKED
        SC_RESERVED, SC_OPENED, SC_BOUND, SC_EXITED, SC_TOLD, SC_DROPPED
        SC_CREATED, SC_RUNNING, SC_STOPPED, SC_PAUSED, SC_PAUSING
        SC_STAMPS
        SC_PAST
    ctypedef struct sc_note:
        sc_note *next
        int kind
        void *ptr
        int64_t a
        int64_t b
        int64_t c
    ctypedef struct sc_exit:
        uint32_t pid
        uint32_t status
        int64_t exited_at
    ctypedef struct sc_slot:
        char *id
        char *exec_id
        void *cookie
        sc_slot *hash_next
        int phase
    ctypedef struct sc_waiter:
        sc_slot *slot
    ctypedef struct sc_child:
        pid_t pid
    ctypedef struct sc_job:
        sc_child child
        sc_buf out
        bint truncated
        bint timed_out
        int status
        bint signaled
        void *cookie
    ctypedef struct sc_event:
        sc_event *next
        uint64_t key_id
        uint64_t key_exec
        uint32_t stream
        int64_t refused_since
        bint vital
        size_t len
        uint8_t *body
    ctypedef struct sc_stamp:
        char id[96]
        char exec_id[96]
        pid_t pid
        int64_t reaped
        int64_t recorded
        int64_t sent
        int64_t acked
    ctypedef struct sc_stats:
        uint64_t told, orphans, stolen, overdue, jobs, jobs_timed_out, events, acked, rejected, unsent, reconnects
        uint64_t by_number, notes, recorded, unrecorded, record_late, ooms, teardown_late, spilled, dropped
    ctypedef struct sc_spill "struct sc_spill":
        char *path
        int fd
        int64_t from_ "from"
        int64_t to
        size_t count
        int64_t cap
    ctypedef struct sc_event_list:
        sc_event *head
        size_t count
    ctypedef struct sc_outbox:
        sc_event_list queue
        sc_event_list flight
        int fd
        uint32_t next_stream
        sc_buf out
        sc_buf in_ "in"
        sc_spill *spill
    ctypedef struct sc_core:
        bint tell_pids
        sc_slot **slots
        size_t slot_cap
        size_t slot_count
        sc_outbox outbox
        sc_stamp *stamps
        uint64_t stamp_count
        sc_stats stats
        int mailfd
    ctypedef struct sc_slot_info:
        int phase
        int status
        pid_t pid
        sc_exit exit

    sc_core *sc_core_new(const char *ns, const char *events_address)
    void sc_core_free(sc_core *c)
    void sc_signals_early()
    int sc_core_signals(sc_core *c, bint sigchld)
    int sc_core_run(sc_core *c)
    void sc_core_stop(sc_core *c)
    void sc_core_pause(sc_core *c, bint on)
    void sc_core_wake(sc_core *c)
    int sc_core_drain(sc_core *c, int64_t timeout_ns)
    void sc_lock(sc_core *c)
    void sc_unlock(sc_core *c)
    int sc_delay(sc_core *c, int64_t ns, void *cookie)
    int sc_watch_pid(sc_core *c, pid_t pid)
    void sc_post(sc_core *c, int kind, void *ptr, int64_t a, int64_t b, int64_t x)
    sc_note *sc_take_notes(sc_core *c)
    bint sc_has_notes(sc_core *c)
    int sc_ask_fd(sc_core *c, int fd)
    int sc_wait_notes(sc_core *c, int64_t timeout_ns)
    sc_event *sc_event_new(sc_core *c, sc_slice topic, sc_slice type_url, sc_slice payload, const char *id,
                           const char *exec_id)
    void sc_outbox_push(sc_core *c, sc_event *e)
    sc_job *sc_job_start(sc_core *c, const sc_spawn_args *args, size_t cap, int64_t timeout_ns, void *cookie, int *err,
                         int *at)
    void sc_job_take(sc_core *c, sc_job *j)

    sc_slot *sc_slot_find(sc_core *c, const char *id, const char *exec_id)
    void sc_slot_ref(sc_slot *s)
    void sc_slot_unref(sc_slot *s)
    int sc_slot_open_init(sc_core *c, const char *id, const uint8_t *state, size_t n, sc_slot **out)
    int sc_slot_reserve(sc_core *c, const char *id, const char *exec_id, const uint8_t *state, size_t n, sc_slot **out)
    int sc_slot_open(sc_slot *s)
    int sc_slot_bind(sc_slot *s, pid_t pid)
    int sc_slot_announce(sc_slot *s, sc_event *e)
    int sc_slot_hold(sc_slot *s)
    int sc_slot_release(sc_slot *s, sc_event *e)
    int sc_slot_set_status(sc_slot *s, int status)
    int sc_slot_set_kill_rest(sc_slot *s, const char *procs, int64_t bound_ns)
    int sc_slot_set_ledger(sc_slot *s, sc_ledger *l)
    int sc_slot_set_teardown(sc_slot *s, int64_t ns)
    int sc_slot_teardown_done(sc_slot *s)
    int sc_outbox_spill(sc_core *c, const char *path, int64_t cap)
    int sc_outbox_keep(sc_core *c)
    int sc_outbox_adopt(sc_core *c, bint flight, const sc_event *like, const uint8_t *body, size_t n)
    int sc_outbox_adopt_socket(sc_core *c, int fd, uint32_t next_stream, const uint8_t *out, size_t n, const uint8_t *in_, size_t m)
    uint64_t sc_past_wait(sc_core *c, uint64_t after, int64_t timeout_ns)
    bint sc_past_get(sc_core *c, uint64_t number, sc_buf *out)
    void sc_past_end(sc_core *c)
    bint sc_past_adopt(sc_core *c, uint64_t number, const uint8_t *body, size_t n)
    int sc_slot_drop(sc_slot *s)
    int sc_slot_forget(sc_slot *s)
    int sc_slot_kill(sc_slot *s, int sig)
    void sc_slot_info_get(sc_slot *s, sc_slot_info *out)
    int sc_cgroup_signal(const char *procs, int sig)
    ctypedef struct sc_saved_slot:
        int phase, task_status
        bint announced, overdue, oom_over, killing
        pid_t pid
        sc_exit exit
        int64_t opened_mono, reaped_mono, recorded_mono
        const uint8_t *state
        size_t state_len
        const char *kill_procs
        int64_t bound_ns, bound_at
        int ledger_fd
        int64_t ledger_at
        int oom_fd
        bint oom_v2
        uint64_t oom_seen
    const char *sc_core_busy(sc_core *c)
    void sc_slot_save(sc_slot *s, sc_saved_slot *out)
    int sc_slot_restore(sc_core *c, const char *id, const char *exec_id, const sc_saved_slot *v, sc_slot **out)
    int sc_slot_resume(sc_slot *s, const sc_saved_slot *v)

cdef extern from "core/spill.h" nogil:
    bint sc_spill_adopt(sc_spill *s, const char *path, int fd, int64_t from_, int64_t to, size_t count, int64_t cap)

cdef extern from "core/oom.h" nogil:
    int sc_oom_watch(sc_slot *init, const char *folder, bint v2)

# The call that this thread handles: a borrowed reference to an object, or NULL. Returns the one before.
cdef void *switch_call(void *call) noexcept

cdef class Slot
cdef class Job

cdef class Core:
    cdef sc_core *p          # freed with this object
    cdef public object pool  # what jobs.in_pool submits to
    cdef public double teardown_timeout  # seconds; > 0: every slot's exit waits for a NOTE_TEARDOWN's handler
    cdef object __weakref__
    cdef dict all            # (container_id, exec_id) -> Slot: what stands in the table
    cdef Slot wrap(self, sc_slot *p, container_id, exec_id)
    cdef dict noting         # address of the C slot -> Slot: in the table, or its told note has not been taken yet
    cdef forgotten(self, Slot s)
    cdef forget_one(self, Slot s)
    cdef sc_event *event(self, topic, type_url, bytes payload, const char *id, const char *exec_id) except? NULL
    cpdef list take(self)
    cdef told(self, int kind, sc_slot *p, list out)
    cdef Job job_ended(self, sc_job *p)

cdef class JobResult:
    cdef readonly int pid
    cdef readonly int status
    cdef readonly bint signaled
    cdef readonly bytes output
    cdef readonly bint truncated
    cdef readonly bint timed_out

cdef class Job:
    cdef public object cookie
    cdef JobResult value

cdef class Slot:
    cdef sc_slot *p  # a reference
    cdef Core core
    cdef readonly str container_id
    cdef readonly str exec_id
    cdef public object cookie
    cdef bint gone, noted  # forgotten; its told note has been taken
    cdef sc_slot_info info(self) noexcept
