# cython: language_level=3, freethreading_compatible=False, binding=False, embedsignature=False
"""See _reaper.pyi. Every call into the core lets the interpreter's lock go first: nobody waits for a core lock holding it."""

from cpython.exc cimport PyErr_CheckSignals
from cpython.ref cimport Py_DECREF, Py_INCREF, Py_XDECREF
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

import os

from .errors import AlreadyExists, FailedPrecondition, NotFound

# Here, and not in the core, of which each compiled module has a copy.
cdef extern from *:
    """
    static _Thread_local void *sc_handled;
    """
    void *sc_handled

cdef extern from "<errno.h>" nogil:
    int errno
    enum:
        EBUSY, EEXIST, EINTR, EINVAL, ENOENT, ENOEXEC, ENOSYS, ESRCH, EACCES, ENOMEM

cdef extern from "<sys/prctl.h>" nogil:
    enum:
        PR_SET_PDEATHSIG
    int prctl(int option, unsigned long a, unsigned long b, unsigned long c, unsigned long d)

cdef extern from "<sys/inotify.h>" nogil:
    enum:
        IN_ACCESS, IN_CLOEXEC, IN_NONBLOCK, IN_MODIFY, IN_OPEN, IN_ATTRIB, IN_DELETE_SELF, IN_MOVE_SELF
    int inotify_init1(int flags)
    int inotify_add_watch(int fd, const char *path, uint32_t mask)

cdef extern from "<sys/resource.h>" nogil:
    struct rlimit:
        uint64_t rlim_cur
        uint64_t rlim_max
    int getrlimit(int number, rlimit *out)
    int setrlimit(int number, const rlimit *limit)

cdef extern from "<sys/mount.h>" nogil:
    int c_mount "mount"(const char *source, const char *target, const char *fstype, unsigned long flags, const void *data)
    int c_umount2 "umount2"(const char *target, int flags)

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass
    ctypedef struct pthread_condattr_t:
        pass
    struct timespec:
        long tv_sec
        long tv_nsec
    int pthread_mutex_init(pthread_mutex_t *m, void *attr)
    int pthread_mutex_lock(pthread_mutex_t *m)
    int pthread_mutex_unlock(pthread_mutex_t *m)
    int pthread_cond_init(pthread_cond_t *c, pthread_condattr_t *attr)
    int pthread_condattr_init(pthread_condattr_t *attr)
    int pthread_condattr_setclock(pthread_condattr_t *attr, int clock)
    int pthread_cond_wait(pthread_cond_t *c, pthread_mutex_t *m)
    int pthread_cond_timedwait(pthread_cond_t *c, pthread_mutex_t *m, const timespec *until)
    int pthread_cond_broadcast(pthread_cond_t *c)
    enum:
        CLOCK_MONOTONIC

NOTE_JOB = SC_NOTE_JOB
NOTE_TIMER = SC_NOTE_TIMER
NOTE_TOLD = SC_NOTE_TOLD
NOTE_PID = SC_NOTE_PID
NOTE_SIGNAL = SC_NOTE_SIGNAL
NOTE_POST = SC_NOTE_POST
NOTE_TEARDOWN = SC_NOTE_TEARDOWN
NOTE_ASKED = SC_NOTE_ASKED
RESERVED = SC_RESERVED
OPENED = SC_OPENED
BOUND = SC_BOUND
EXITED = SC_EXITED
TOLD = SC_TOLD
DROPPED = SC_DROPPED
CREATED = SC_CREATED
RUNNING = SC_RUNNING
STOPPED = SC_STOPPED
PAUSED = SC_PAUSED
PAUSING = SC_PAUSING


cdef failed(int err, str call):
    """OSError with the system call's name where a file's would stand."""
    return OSError(err, os.strerror(err), call)


cdef int64_t to_ns(double seconds) noexcept:
    return <int64_t>(min(max(seconds, 0.0), 1e9) * 1e9)


cdef int checked(int r, str call) except -1:
    if r < 0:
        raise failed(-r, call)
    return r


def kernel_check():
    if sc_kernel_check() == -ENOSYS:
        raise OSError(ENOSYS, f"shimcore needs Linux 5.4 or newer (pidfd_open, waitid(P_PIDFD)); this is {os.uname().release}")


def set_subreaper(enable=True):
    checked(sc_set_subreaper(bool(enable)), "prctl")


def set_title(bytes args, bytes env, str name):
    checked(sc_set_title(args, len(args), env, len(env), name.encode()), "prctl")


def set_environment(bytes block):
    checked(sc_set_environment(block, len(block)), "environment")


def bound_malloc():
    sc_bound_malloc()


def written_pages(int pid):
    cdef sc_buf runs
    memset(&runs, 0, sizeof(runs))
    try:
        checked(sc_written_pages(pid, &runs), "pagemap")
        return (<const char *>runs.p)[:runs.len] if runs.p != NULL else b""
    finally:
        sc_buf_free(&runs)


def own_pages(bytes runs):
    checked(sc_own_pages(<const char *>runs, len(runs)), "madvise")


def set_death_signal(int signum):
    if prctl(PR_SET_PDEATHSIG, signum, 0, 0, 0) < 0:
        raise OSError(errno, os.strerror(errno), "prctl")


def watch_files(paths):
    cdef int fd = inotify_init1(IN_CLOEXEC | IN_NONBLOCK)
    if fd < 0:
        raise OSError(errno, os.strerror(errno), "inotify_init1")
    for path in paths:
        if inotify_add_watch(fd, os.fsencode(path), IN_MODIFY | IN_ATTRIB | IN_DELETE_SELF | IN_MOVE_SELF) < 0:
            error = OSError(errno, os.strerror(errno), path)
            os.close(fd)
            raise error
    return fd


def watch_readers(int file):
    cdef int fd = inotify_init1(IN_CLOEXEC | IN_NONBLOCK)
    if fd < 0:
        raise OSError(errno, os.strerror(errno), "inotify_init1")
    if inotify_add_watch(fd, b"/proc/self/fd/%d" % file, IN_ACCESS | IN_OPEN) < 0:
        error = OSError(errno, os.strerror(errno), "inotify_add_watch")
        os.close(fd)
        raise error
    return fd


def set_limits(limits):
    cdef rlimit have, want
    cdef int number
    for number in range(len(limits)):
        soft, hard = limits[number]
        want.rlim_cur, want.rlim_max = <uint64_t><int64_t>soft, <uint64_t><int64_t>hard
        if getrlimit(number, &have) < 0:
            raise OSError(errno, os.strerror(errno), "getrlimit")
        if have.rlim_cur != want.rlim_cur or have.rlim_max != want.rlim_max:
            if setrlimit(number, &want) < 0:
                raise OSError(errno, os.strerror(errno), "setrlimit")


def get_subreaper():
    return bool(checked(sc_get_subreaper(), "prctl"))


def raise_nofile():
    cdef uint64_t was = 0, now = 0
    checked(sc_raise_nofile(&was, &now), "setrlimit")
    return was, now


def nofile_before(set=None):
    cdef uint64_t soft = 0, hard = 0
    if set is not None:
        soft, hard = set
    sc_nofile_before(&soft, &hard, set is not None)
    return soft, hard


def early_signals():
    sc_signals_early()


def pidfd_open(pid_t pid):
    return checked(sc_pidfd_open(pid), "pidfd_open")


def pidfd_send_signal(int pidfd, int signum):
    checked(sc_pidfd_send_signal(pidfd, signum), "pidfd_send_signal")


def wait_pidfd(int pidfd):
    """The exit status of a child that has ended, or None: it has not. Raises ChildProcessError."""
    cdef sc_exit_status st
    return st.status if checked(sc_reap_pidfd(pidfd, &st), "waitid") else None


def exit_code(int status):
    cdef int sig = status & 0x7f
    return 128 + sig if sig else (status >> 8) & 0xff


def mount(source, target, fstype, unsigned long flags, data):
    cdef const char *s = NULL if source is None else <char *>source
    cdef const char *t = target
    cdef const char *f = NULL if fstype is None else <char *>fstype
    cdef const char *d = NULL if data is None else <char *>data
    cdef int r
    with nogil:
        r = c_mount(s, t, f, flags, d)
        if r < 0:
            r = -errno
    checked(r, "mount")


def mount_in(cwd, source, target, fstype, unsigned long flags, data):
    cdef const char *w = cwd
    cdef const char *s = NULL if source is None else <char *>source
    cdef const char *t = target
    cdef const char *f = NULL if fstype is None else <char *>fstype
    cdef const char *d = NULL if data is None else <char *>data
    cdef int r
    with nogil:
        r = sc_mount_in(w, s, t, f, flags, d)
    checked(r, "mount")


def umount2(target, int flags):
    cdef const char *t = target
    cdef int r
    with nogil:
        r = c_umount2(t, flags)
        if r < 0:
            r = -errno
    checked(r, "umount2")


def cgroup_signal(procs, int signum):
    """Signal every process of a cgroup.procs file and of those below its folder, through pidfds. Returns how many."""
    cdef bytes path = os.fsencode(procs)
    cdef const char *p = path
    cdef int n
    with nogil:
        n = sc_cgroup_signal(p, signum)
    return n


cdef class SpawnArgs:
    """argv, environment and fd map as C wants them; keeps their memory."""

    cdef sc_spawn_args a
    cdef list keep
    cdef sc_fd_map *maps

    def __cinit__(self):
        self.maps = NULL

    def __dealloc__(self):
        free(<void *>self.a.argv)
        free(<void *>self.a.envp)
        free(self.maps)

    cdef char **strings(self, list items) except NULL:
        cdef char **out = <char **>malloc((len(items) + 1) * sizeof(char *))
        cdef Py_ssize_t i
        if out == NULL:
            raise MemoryError
        for i, item in enumerate(items):
            out[i] = <char *><bytes>item
        out[len(items)] = NULL
        self.keep.append(items)
        return out


cdef bytes encoded(item):
    cdef bytes b = os.fsencode(item)
    if 0 in b:
        raise ValueError("embedded null byte")
    return b


cdef void *switch_call(void *call) noexcept:
    global sc_handled
    cdef void *before = sc_handled
    sc_handled = call
    return before


def switch(call):
    cdef void *before = switch_call(NULL if call is None else <void *>call)
    return None if before == NULL else <object>before


def handled():
    return None if sc_handled == NULL else <object>sc_handled


cdef bytes resolve(bytes name, env):
    if b"/" in name:
        return name
    path = (env if env is not None else os.environ).get("PATH", os.defpath)
    for folder in path.split(":"):
        candidate = os.path.join(os.fsencode(folder or "."), name)
        if os.access(candidate, os.X_OK) and not os.path.isdir(candidate):
            return candidate
    raise FileNotFoundError(ENOENT, "executable file not found in PATH", os.fsdecode(name))


cdef SpawnArgs spawn_args(argv, env, cwd, fds, bint new_session, bint new_group):
    cdef SpawnArgs s = SpawnArgs()
    cdef bytes path, where
    s.keep = []
    args = [encoded(a) for a in argv]
    if not args:
        raise ValueError("argv is empty")
    path = resolve(args[0], env)
    s.keep.append(path)
    s.a.path = path
    s.a.argv = s.strings(args)
    if env is None:
        s.a.envp = s.strings([encoded(f"{k}={v}") for k, v in os.environ.items()])
    else:
        s.a.envp = s.strings([encoded(f"{k}={v}") for k, v in env.items()])
    if cwd is not None:
        where = encoded(cwd)
        s.keep.append(where)
        s.a.cwd = where
    fds = fds or {}
    s.maps = <sc_fd_map *>malloc((len(fds) + 1) * sizeof(sc_fd_map))
    if s.maps == NULL:
        raise MemoryError
    for child, parent in fds.items():
        if child < 0 or parent < 0:
            raise ValueError(f"fd map {child} -> {parent}: negative")
        s.maps[s.a.nfds].child = child
        s.maps[s.a.nfds].parent = parent
        s.a.nfds += 1
    s.a.fds = s.maps
    s.a.new_session = new_session
    s.a.new_group = new_group
    return s


cdef raise_spawn(int err, int at, argv, cwd):
    if at == SC_AT_EXEC:
        raise OSError(err, f"exec: {os.strerror(err)}", os.fsdecode(argv[0]))
    if at == SC_AT_CHDIR:
        raise OSError(err, f"chdir: {os.strerror(err)}", cwd)
    raise failed(err, "dup2" if at == SC_AT_FDS else "clone")


def spawn(argv, *, env=None, cwd=None, fds=None, new_session=False, new_group=False):
    cdef SpawnArgs s = spawn_args(argv, env, cwd, fds, new_session, new_group)
    cdef int pidfd = -1, at = 0
    cdef pid_t pid
    with nogil:
        pid = sc_spawn(&s.a, &pidfd, &at)
    if pid < 0:
        raise_spawn(-pid, at, argv, cwd)
    return pid, pidfd


cdef class ExitSignal:
    cdef pthread_mutex_t lock
    cdef pthread_cond_t cond
    cdef bint on

    def __cinit__(self):
        cdef pthread_condattr_t attr
        pthread_mutex_init(&self.lock, NULL)
        pthread_condattr_init(&attr)
        pthread_condattr_setclock(&attr, CLOCK_MONOTONIC)
        pthread_cond_init(&self.cond, &attr)

    def signal(self):
        with nogil:
            pthread_mutex_lock(&self.lock)
            self.on = True
            pthread_cond_broadcast(&self.cond)
            pthread_mutex_unlock(&self.lock)

    def is_set(self):
        return self.on

    def wait(self, timeout=None):
        cdef timespec until
        cdef bint limited = timeout is not None, set
        cdef int r = 0
        cdef int64_t when = 0
        if limited:
            when = sc_now_mono() + <int64_t>(min(max(float(timeout), 0.0), 1e9) * 1e9)
        until.tv_sec = when // 1000000000
        until.tv_nsec = when % 1000000000
        with nogil:
            pthread_mutex_lock(&self.lock)
            while not self.on and r == 0:
                if limited:
                    r = pthread_cond_timedwait(&self.cond, &self.lock, &until)
                else:
                    r = pthread_cond_wait(&self.cond, &self.lock)
            set = self.on
            pthread_mutex_unlock(&self.lock)
        return set


cdef class JobResult:
    def __repr__(self):
        return (f"JobResult(pid={self.pid}, status={self.status}, timed_out={bool(self.timed_out)}, "
                f"output={self.output!r})")


cdef class Job:
    def result(self):
        if self.value is None:
            raise ValueError("the job has not ended")
        return self.value


cdef class Slot:
    def __dealloc__(self):
        if self.p != NULL:
            sc_slot_unref(self.p)

    def __repr__(self):
        return f"Slot({self.container_id!r}, {self.exec_id!r}, phase={self.phase}, pid={self.pid})"

    cdef sc_slot_info info(self) noexcept:
        cdef sc_slot_info i
        with nogil:
            sc_slot_info_get(self.p, &i)
        return i

    @property
    def phase(self):
        return self.info().phase

    @property
    def pid(self):
        return self.info().pid

    @property
    def status(self):
        return self.info().status

    @property
    def exit_status(self):
        return self.info().exit.status

    @property
    def exited_at(self):
        return self.info().exit.exited_at

    def open(self):
        cdef int r
        with nogil:
            r = sc_slot_open(self.p)
        if r == -ESRCH:
            raise FailedPrecondition(f"container {self.container_id}: init has exited")
        if r < 0:
            raise FailedPrecondition(f"exec {self.exec_id} of container {self.container_id} was started before")

    def bind(self, pid_t pid):
        cdef int r
        with nogil:
            r = sc_slot_bind(self.p, pid)
        if r < 0:
            raise failed(-r, "bind")

    def announce(self, topic="", type_url="", payload=b""):
        cdef sc_event *e = NULL
        try:
            e = self.core.event(topic, type_url, payload, self.p.id, self.p.exec_id)
        finally:  # an event that can't be made must not keep the exit from being told
            with nogil:
                sc_slot_announce(self.p, e)

    def hold(self):
        with nogil:
            sc_slot_hold(self.p)

    def release(self, topic="", type_url="", payload=b""):
        cdef sc_event *e = NULL
        try:
            e = self.core.event(topic, type_url, payload, self.p.id, self.p.exec_id)
        finally:  # an event that can't be made must not keep the exit from being told
            with nogil:
                sc_slot_release(self.p, e)

    def set_status(self, int status):
        with nogil:
            sc_slot_set_status(self.p, status)

    def set_kill_rest(self, cgroup_procs, double timeout=10.0):
        cdef bytes path = os.fsencode(cgroup_procs)
        cdef const char *p = path
        cdef int64_t ns = <int64_t>(timeout * 1e9)
        with nogil:
            sc_slot_set_kill_rest(self.p, p, ns)

    def set_ledger(self, path):
        cdef bytes b = os.fsencode(path)
        cdef const char *p = b
        cdef sc_ledger *l = NULL
        cdef int r
        with nogil:
            r = sc_ledger_open(p, &l)
            if r == 0:
                sc_slot_set_ledger(self.p, l)
        if r < 0:
            raise OSError(-r, os.strerror(-r), path)

    def set_teardown(self, double timeout):
        cdef int64_t ns = <int64_t>(timeout * 1e9)
        with nogil:
            sc_slot_set_teardown(self.p, ns)

    def teardown_done(self):
        with nogil:
            sc_slot_teardown_done(self.p)

    def watch_oom(self, folder, v2):
        cdef bytes b = os.fsencode(folder)
        cdef const char *p = b
        cdef bint is_v2 = bool(v2)
        cdef int r
        with nogil:
            r = sc_oom_watch(self.p, p, is_v2)
        if r < 0:
            raise OSError(-r, os.strerror(-r), folder)

    def drop(self):
        with nogil:
            sc_slot_drop(self.p)

    def forget(self):
        cdef int r
        with nogil:
            r = sc_slot_forget(self.p)
        if r < 0:
            raise FailedPrecondition(f"container {self.container_id}: a process is still running")
        self.core.forgotten(self)

    def kill(self, int signum):
        cdef int r
        with nogil:
            r = sc_slot_kill(self.p, signum)
        if r == -ESRCH:
            raise NotFound("process already finished")
        if r == -EINVAL and self.info().pid == 0:
            raise FailedPrecondition("process not created")
        checked(r, "pidfd_send_signal")


cdef void fill(saved, sc_saved_slot *v) except *:
    """All but what points to memory."""
    memset(v, 0, sizeof(v[0]))
    v.phase, v.task_status, v.pid = saved["phase"], saved["status"], saved["pid"]
    v.announced, v.overdue, v.oom_over, v.killing = saved["announced"], saved["overdue"], saved["oom_over"], saved["killing"]
    v.exit.pid, v.exit.status, v.exit.exited_at = saved["exit_pid"], saved["exit_status"], saved["exited_at"]
    v.opened_mono, v.reaped_mono, v.recorded_mono = saved["opened"], saved["reaped"], saved["recorded"]
    v.bound_ns, v.bound_at = saved["bound_ns"], saved["bound_at"]
    v.ledger_fd, v.ledger_at = saved["ledger_fd"], saved["ledger_at"]
    v.oom_fd, v.oom_v2, v.oom_seen = saved["oom_fd"], saved["oom_v2"], saved["oom_seen"]


cdef void take_stats(sc_stats *s, saved) except *:
    """As stats() names them."""
    get = saved.get
    s.told, s.orphans, s.stolen, s.overdue = get("told", 0), get("orphans", 0), get("stolen", 0), get("overdue", 0)
    s.jobs, s.jobs_timed_out, s.events, s.acked = get("jobs", 0), get("jobs_timed_out", 0), get("events", 0), get("acknowledged", 0)
    s.rejected, s.unsent, s.reconnects = get("rejected", 0), get("unsent", 0), get("connections", 0)
    s.by_number, s.notes, s.recorded, s.unrecorded = get("by_number", 0), get("notes", 0), get("recorded", 0), get("unrecorded", 0)
    s.record_late, s.ooms, s.teardown_late = get("record_late", 0), get("ooms", 0), get("teardown_late", 0)
    s.spilled, s.dropped = get("spilled", 0), get("dropped", 0)


cdef list saved_events(sc_event_list *l):
    cdef sc_event *e = l.head
    cdef list out = []
    while e != NULL:
        out.append({
            "id": e.key_id, "exec": e.key_exec, "stream": e.stream, "vital": bool(e.vital), "refused": e.refused_since,
            "body": (<const char *>e.body)[:e.len],
        })
        e = e.next
    return out


cdef void adopt_event(sc_core *c, bint flight, saved) except *:
    cdef sc_event e
    cdef bytes body = saved["body"]
    memset(&e, 0, sizeof(e))
    e.key_id, e.key_exec, e.stream = saved["id"], saved["exec"], saved["stream"]
    e.vital, e.refused_since = saved["vital"], saved["refused"]
    checked(sc_outbox_adopt(c, flight, &e, <const uint8_t *><const char *>body, len(body)), "malloc")


cdef class Core:
    """The exit thread and what it owns; see core/core.h."""

    def __cinit__(self, namespace="", events_address=""):
        self.all = {}
        self.noting = {}
        self.p = sc_core_new(os.fsencode(namespace), os.fsencode(events_address))
        if self.p == NULL:
            raise failed(errno or ENOMEM, "epoll_create1")

    def __dealloc__(self):
        if self.p != NULL:
            sc_core_free(self.p)

    def install_signals(self, sigchld=True):
        cdef bint on = bool(sigchld)
        cdef int r
        with nogil:
            r = sc_core_signals(self.p, on)
        if r == -EBUSY:
            raise RuntimeError("another Core of this process has the signal handlers")
        checked(r, "sigaction")

    def run(self):
        cdef int r
        with nogil:
            r = sc_core_run(self.p)
        return bool(checked(r, "epoll_wait"))

    def pause(self, bint on):
        sc_core_pause(self.p, on)

    def stop(self):
        sc_core_stop(self.p)

    def drain(self, double timeout):
        cdef int r
        cdef int64_t ns = to_ns(timeout)
        with nogil:
            r = sc_core_drain(self.p, ns)
        return bool(r)

    @property
    def tell_pids(self):
        """Whether every reaped child, orphans included, comes back as NOTE_PID."""
        return bool(self.p.tell_pids)

    @tell_pids.setter
    def tell_pids(self, on):
        self.p.tell_pids = bool(on)

    @property
    def notes_fd(self):
        """Readable when there are notes (eventfd)."""
        return self.p.mailfd

    # ---- slots ----

    cdef Slot wrap(self, sc_slot *p, container_id, exec_id):
        cdef Slot s = Slot.__new__(Slot)
        s.p = p
        s.core = self
        s.container_id = container_id
        s.exec_id = exec_id
        self.all[(container_id, exec_id)] = s
        self.noting[<size_t>p] = s
        if self.teardown_timeout > 0:
            s.set_teardown(self.teardown_timeout)
        return s

    def open(self, container_id, bytes state=b""):
        cdef bytes id = container_id.encode()
        cdef const char *c = id
        cdef const uint8_t *st = <const uint8_t *><const char *>state
        cdef size_t n = len(state)
        cdef sc_slot *p = NULL
        cdef int r
        with nogil:
            r = sc_slot_open_init(self.p, c, st, n, &p)
        if r == -EEXIST:
            raise AlreadyExists(f"container {container_id} already exists")
        checked(r, "malloc")
        return self.wrap(p, container_id, "")

    def reserve(self, container_id, exec_id, bytes state=b""):
        cdef bytes id = container_id.encode(), ex = exec_id.encode()
        cdef const char *c = id
        cdef const char *e = ex
        cdef const uint8_t *st = <const uint8_t *><const char *>state
        cdef size_t n = len(state)
        cdef sc_slot *p = NULL
        cdef int r
        with nogil:
            r = sc_slot_reserve(self.p, c, e, st, n, &p)
        if r == -ENOENT:
            raise NotFound(f"container {container_id} not found")
        if r == -EEXIST:
            raise AlreadyExists(
                f"exec {exec_id} of container {container_id} already exists" if exec_id else f"container {container_id} already exists"
            )
        checked(r, "malloc")
        return self.wrap(p, container_id, exec_id)

    def find(self, container_id, exec_id=""):
        return self.all.get((container_id, exec_id))

    def slots(self):
        return list(self.all.values())

    cdef forgotten(self, Slot s):
        if self.all.get((s.container_id, s.exec_id)) is not s:
            return
        keys = [(s.container_id, s.exec_id)]
        if not s.exec_id:
            keys = [k for k in self.all if k[0] == s.container_id]
        for key in keys:
            self.forget_one(<Slot>self.all.pop(key))

    cdef forget_one(self, Slot s):
        s.gone = True
        if s.noted or s.info().phase in (SC_RESERVED, SC_DROPPED):
            self.noting.pop(<size_t>s.p, None)  # else its note, still to be taken, is the last that needs it

    # ---- events ----

    cdef sc_event *event(self, topic, type_url, bytes payload, const char *id, const char *exec_id) except? NULL:
        cdef sc_slice t, u, v
        cdef bytes topic_b, url_b
        cdef sc_event *e
        if not topic:
            return NULL
        topic_b = topic.encode()
        url_b = type_url.encode()
        t.p, t.n = <const uint8_t *><const char *>topic_b, len(topic_b)
        u.p, u.n = <const uint8_t *><const char *>url_b, len(url_b)
        v.p, v.n = <const uint8_t *><const char *>payload, len(payload)
        e = sc_event_new(self.p, t, u, v, id, exec_id)
        if e == NULL:
            raise ValueError(f"event of {len(payload)} bytes: a ttrpc message has at most 4194304")
        return e

    def publish(self, topic, type_url, bytes payload, container_id="", exec_id=""):
        cdef bytes id = container_id.encode(), ex = exec_id.encode()
        cdef sc_event *e = self.event(topic, type_url, payload, id, ex)
        if e == NULL:
            raise ValueError("topic is empty")
        with nogil:
            sc_lock(self.p)
            sc_outbox_push(self.p, e)
            sc_unlock(self.p)
            sc_core_wake(self.p)

    def spill(self, path, int64_t cap=67108864):
        cdef bytes b = os.fsencode(path)
        cdef const char *p = b
        cdef int r
        with nogil:
            r = sc_outbox_spill(self.p, p, cap)
        if r < 0:
            raise OSError(-r, os.strerror(-r), path)
        return r

    def keep(self):
        cdef int r
        with nogil:
            r = sc_outbox_keep(self.p)
        return checked(r, "write")

    # ---- children and jobs ----

    def watch(self, pid_t pid):
        cdef int r
        with nogil:
            r = sc_watch_pid(self.p, pid)
        checked(r, "pidfd_open")

    def job(
        self, argv, *, double timeout, size_t cap=65536, env=None, cwd=None, fds=None, cookie=None, bint dies_with_thread=False
    ):
        cdef SpawnArgs s = spawn_args(argv, env, cwd, fds, False, True)
        s.a.dies_with_thread = dies_with_thread
        cdef Job j = Job()
        cdef sc_job *p
        cdef int err = 0, at = 0
        cdef int64_t ns = to_ns(timeout)
        j.cookie = cookie
        Py_INCREF(j)  # the note's
        with nogil:
            p = sc_job_start(self.p, &s.a, cap, ns, <void *>j, &err, &at)
        if p == NULL:
            Py_DECREF(j)
            raise_spawn(err, at, argv, cwd)
        return j

    def timer(self, double seconds, cookie):
        cdef int r
        cdef int64_t ns = to_ns(seconds)
        Py_INCREF(cookie)
        with nogil:
            r = sc_delay(self.p, ns, <void *>cookie)
        if r < 0:
            Py_DECREF(cookie)
            raise MemoryError

    def post(self, callable):
        Py_INCREF(callable)
        with nogil:
            sc_post(self.p, SC_NOTE_POST, <void *>callable, 0, 0, 0)

    def ask_fd(self, int fd):
        cdef int r
        with nogil:
            r = sc_ask_fd(self.p, fd)
        if r < 0:
            raise OSError(-r, os.strerror(-r), "epoll_ctl")

    # ---- notes ----

    cpdef list take(self):
        """The notes that are there, without waiting."""
        cdef sc_note *n
        cdef sc_note *next
        cdef list out = []
        with nogil:
            n = sc_take_notes(self.p)
        while n != NULL:
            next = n.next
            if n.kind == SC_NOTE_JOB:
                out.append((n.kind, self.job_ended(<sc_job *>n.ptr)))
            elif n.kind == SC_NOTE_TIMER or n.kind == SC_NOTE_POST:
                out.append((n.kind, <object>n.ptr))
                Py_DECREF(<object>n.ptr)
            elif n.kind == SC_NOTE_TOLD or n.kind == SC_NOTE_TEARDOWN:
                self.told(n.kind, <sc_slot *>n.ptr, out)
            elif n.kind == SC_NOTE_PID:
                out.append((n.kind, n.a, n.b, n.c))
            else:
                out.append((n.kind, n.a))
            free(n)
            n = next
        return out

    cdef told(self, int kind, sc_slot *p, list out):
        cdef Slot s = self.noting.get(<size_t>p)
        if s is not None:
            out.append((kind, s))
            if kind == SC_NOTE_TOLD:
                s.noted = True
                if s.gone:
                    del self.noting[<size_t>p]
        with nogil:
            sc_slot_unref(p)

    cdef Job job_ended(self, sc_job *p):
        cdef Job j = <Job><object>p.cookie
        cdef JobResult r = JobResult.__new__(JobResult)
        r.pid = p.child.pid
        r.status = p.status
        r.signaled = p.signaled
        r.output = (<const char *>p.out.p)[:p.out.len] if p.out.len else b""
        r.truncated = p.truncated
        r.timed_out = p.timed_out
        j.value = r
        with nogil:
            sc_job_take(self.p, p)
        Py_DECREF(j)
        return j

    def notes(self, timeout=None):
        cdef int64_t left = -1, until = 0
        cdef int r
        if timeout is not None:
            until = sc_now_mono() + <int64_t>(float(timeout) * 1e9)
        while True:
            out = self.take()
            if out:
                return out
            if timeout is not None:
                left = until - sc_now_mono()
                if left <= 0:
                    return out
            with nogil:
                r = sc_wait_notes(self.p, left)
            if r == -EINTR:
                PyErr_CheckSignals()

    # ---- across an exec of this process by itself; see upgrade.py ----

    def busy(self):
        cdef const char *why
        with nogil:
            why = sc_core_busy(self.p)
        return None if why == NULL else why.decode()

    def save(self, bint whole=True):
        cdef list slots = [], fds = []
        cdef sc_saved_slot v
        cdef Slot s
        cdef sc_outbox *o = &self.p.outbox
        cdef sc_spill *f = o.spill
        for s in sorted(self.all.values(), key=lambda slot: slot.exec_id != ""):
            with nogil:
                sc_lock(self.p)
                sc_slot_save(s.p, &v)
                sc_unlock(self.p)
            if not whole and (v.phase == SC_OPENED or (s.container_id, "") not in self.all):
                continue
            slots.append({
                "id": s.container_id, "exec": s.exec_id, "phase": v.phase, "status": v.task_status,
                "announced": bool(v.announced), "overdue": bool(v.overdue), "oom_over": bool(v.oom_over),
                "killing": bool(v.killing), "pid": v.pid, "exit_pid": v.exit.pid, "exit_status": v.exit.status,
                "exited_at": v.exit.exited_at, "opened": v.opened_mono, "reaped": v.reaped_mono,
                "recorded": v.recorded_mono, "state": (<const char *>v.state)[:v.state_len],
                "kill_procs": None if v.kill_procs == NULL else os.fsdecode(v.kill_procs),
                "bound_ns": v.bound_ns, "bound_at": v.bound_at, "ledger_fd": v.ledger_fd, "ledger_at": v.ledger_at,
                "oom_fd": v.oom_fd, "oom_v2": bool(v.oom_v2), "oom_seen": v.oom_seen,
            })
            fds += [fd for fd in (v.ledger_fd, v.oom_fd) if fd >= 0]
        if not whole:
            return {"slots": slots, "outbox": None, "spill": None, "fds": []}
        outbox = {
            "flight": saved_events(&o.flight), "queue": saved_events(&o.queue), "fd": o.fd, "next_stream": o.next_stream,
            "out": (<const char *>o.out.p)[:o.out.len] if o.out.len else b"",
            "in": (<const char *>o.in_.p)[:o.in_.len] if o.in_.len else b"",
        }
        spill = None if f.path == NULL else {
            "path": os.fsdecode(f.path), "fd": f.fd, "from": f.from_, "to": f.to, "count": f.count, "cap": f.cap,
        }
        fds += [fd for fd in (o.fd, f.fd) if fd >= 0]
        return {
            "slots": slots, "outbox": outbox, "spill": spill, "fds": fds, "past": self.events(), "stats": self.stats(),
        }

    def restore(self, state):
        cdef sc_saved_slot v
        cdef sc_slot *p
        cdef Slot s
        cdef bytes id, ex, out, into, body
        outbox, spill = state["outbox"], state["spill"]
        if outbox is not None:
            for number, past in state.get("past", ()):
                body = past or b""
                if not sc_past_adopt(self.p, number, <const uint8_t *><const char *>body, len(body)):
                    raise MemoryError
            take_stats(&self.p.stats, state.get("stats", {}))
            for flight in (True, False):
                for event in outbox["flight" if flight else "queue"]:
                    adopt_event(self.p, flight, event)
            if outbox["fd"] >= 0:
                out, into = outbox["out"], outbox["in"]
                checked(
                    sc_outbox_adopt_socket(self.p, outbox["fd"], outbox["next_stream"], out, len(out), into, len(into)), "epoll_ctl"
                )
        if spill is not None and not sc_spill_adopt(
            self.p.outbox.spill, os.fsencode(spill["path"]), spill["fd"], spill["from"], spill["to"], spill["count"], spill["cap"]
        ):
            raise MemoryError
        for saved in state["slots"]:
            fill(saved, &v)
            id, ex = saved["id"].encode(), saved["exec"].encode()
            constant, procs = saved["state"], saved["kill_procs"]
            procs = None if procs is None else os.fsencode(procs)
            v.state, v.state_len = <const uint8_t *><const char *><bytes>constant, len(constant)
            if procs is not None:
                v.kill_procs = <char *><bytes>procs
            p = NULL
            checked(sc_slot_restore(self.p, id, ex, &v, &p), "restore")
            s = self.wrap(p, saved["id"], saved["exec"])
            s.noted = v.phase == SC_TOLD

    def resume(self, state):
        cdef sc_saved_slot v
        cdef Slot s
        for saved in state["slots"]:
            fill(saved, &v)
            s = self.all[(saved["id"], saved["exec"])]
            with nogil:
                sc_slot_resume(s.p, &v)

    # ---- figures ----

    def stats(self):
        cdef sc_stats s
        cdef size_t queue, flight, slots
        with nogil:
            sc_lock(self.p)
            s = self.p.stats
            queue = self.p.outbox.queue.count
            flight = self.p.outbox.flight.count
            slots = self.p.slot_count
            sc_unlock(self.p)
        return {
            "told": s.told, "orphans": s.orphans, "stolen": s.stolen, "overdue": s.overdue, "jobs": s.jobs,
            "jobs_timed_out": s.jobs_timed_out, "events": s.events, "acknowledged": s.acked, "rejected": s.rejected,
            "unsent": s.unsent, "connections": s.reconnects, "by_number": s.by_number, "notes": s.notes,
            "recorded": s.recorded, "unrecorded": s.unrecorded, "record_late": s.record_late, "ooms": s.ooms,
            "teardown_late": s.teardown_late, "spilled": s.spilled, "dropped": s.dropped,
            "queued": queue, "in_flight": flight, "slots": slots,
        }

    def stamps(self):
        cdef list out = []
        cdef sc_stamp *copy = <sc_stamp *>malloc(SC_STAMPS * sizeof(sc_stamp))
        cdef uint64_t count = 0, first, i
        if copy == NULL:
            raise MemoryError
        try:
            with nogil:
                sc_lock(self.p)
                if self.p.stamps != NULL:
                    count = self.p.stamp_count
                    memcpy(copy, self.p.stamps, SC_STAMPS * sizeof(sc_stamp))
                sc_unlock(self.p)
            first = count - SC_STAMPS if count > SC_STAMPS else 0
            for i in range(first, count):
                s = &copy[i % SC_STAMPS]
                out.append((s.id.decode(errors="replace"), s.exec_id.decode(errors="replace"), s.pid, s.reaped,
                            s.recorded, s.sent, s.acked))
        finally:
            free(copy)
        return out

    def events(self, after=0, timeout=0.0):
        cdef uint64_t number = after, count
        cdef int64_t ns = <int64_t>(float(timeout) * 1e9)
        cdef sc_buf buf
        cdef bint there
        cdef list out = []
        memset(&buf, 0, sizeof(buf))
        with nogil:
            count = sc_past_wait(self.p, number, ns)
        number = min(number, count)
        if count - number > SC_PAST:
            number = count - SC_PAST
        try:
            while number < count:
                number += 1
                with nogil:
                    there = sc_past_get(self.p, number, &buf)
                out.append((number, (<const char *>buf.p)[:buf.len] if there else None))
        finally:
            sc_buf_free(&buf)
        return out

    def end_events(self):
        with nogil:
            sc_past_end(self.p)
