/* Processes: subreaper, pidfds, waiting, and spawning with an fd map. No state but the saved RLIMIT_NOFILE. */
#ifndef SC_PROCESS_H
#define SC_PROCESS_H
#include "buf.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* Functions return 0 or a fd/pid, or -errno. */

int sc_kernel_check(void); /* -ENOSYS below Linux 5.4: no pidfd_open, or no waitid(P_PIDFD) */
int sc_set_subreaper(bool on);
int sc_get_subreaper(void);
int sc_pidfd_open(pid_t pid); /* works on a zombie too */
int sc_pidfd_send_signal(int pidfd, int sig);
/* What children get, which is what there was before sc_raise_nofile; set: from now on. */
void sc_nofile_before(uint64_t *soft, uint64_t *hard, bool set);
int sc_raise_nofile(uint64_t *was, uint64_t *is);

typedef struct {
    pid_t pid;
    int status;        /* exit code, or 128 + signal */
    bool signaled;
} sc_exit_status;

/* Reap, without blocking. 1 reaped, 0 not dead yet, -ECHILD not a child of ours. */
int sc_reap_pidfd(int pidfd, sc_exit_status *out);
int sc_reap_pid(pid_t pid, sc_exit_status *out);
/* Any dead child of the calling thread alone (__WNOTHREAD), left as it is: its pid, or <= 0. */
pid_t sc_peek_orphan(void);
int sc_peek_pid(pid_t pid); /* 1: a dead child of ours, left as it is */
int sc_peek_pidfd(int pidfd, sc_exit_status *out); /* as sc_reap_pidfd, but the zombie stays */

typedef struct {
    int child, parent; /* parent < 0: /dev/null */
} sc_fd_map;

typedef struct {
    const char *path;  /* what to exec: a path, not searched */
    char *const *argv; /* NULL-terminated */
    char *const *envp; /* NULL-terminated, or NULL for ours */
    const char *cwd;   /* or NULL */
    const sc_fd_map *fds;
    size_t nfds;
    bool new_session, new_group;
    bool dies_with_thread; /* SIGKILLed when the thread that makes it ends (PR_SET_PDEATHSIG, prctl(2)), and so with its process */
} sc_spawn_args;

/* What failed, beside the errno. */
enum { SC_AT_FORK, SC_AT_CHDIR, SC_AT_FDS, SC_AT_EXEC };

/* Start a child: only the mapped fds, empty signal mask, default dispositions, the RLIMIT_NOFILE from before
 * sc_raise_nofile. Returns the pid and its pidfd (close-on-exec); -errno with *at saying where. The child shares our memory
 * until it execs (CLONE_VM | CLONE_VFORK), so no page table is copied and the errno of its exec reaches us. */
pid_t sc_spawn(const sc_spawn_args *args, int *pidfd, int *at);

/* The calling thread gets a core as soon as it has something to do: the highest nice value that it may have (CAP_SYS_NICE), and
 * short turns (Linux >= 6.12, EEVDF's custom slice), so that on waking it takes the core from a thread that computes, where it
 * would else wait for the next tick. For threads that run microseconds at a time. Children inherit nothing of it. A policy that
 * somebody chose stays, and where nothing is allowed nothing changes. */
void sc_run_first(void);

/* What /proc/self/cmdline, environ and comm say; both blocks are NUL-terminated strings one after the other. For
 * processes with one thread. -EINVAL on kernels without CONFIG_CHECKPOINT_RESTORE. */
/* environ is `block` now: strings with their NULs. putenv(3) and its like work on it. Not while other threads run. */
int sc_set_environment(const char *block, size_t n);
/* Two arenas at most for malloc: the main thread's and one for all others, where each thread would have its own. */
void sc_bound_malloc(void);
/* pages.c. Adds what another process, with the same mappings, has written of ours: pairs of uint64_t, address and length in bytes.
 * 0 or -errno. */
int sc_written_pages(pid_t pid, sc_buf *runs);
/* Have these pages, n bytes of such pairs, as if they had been written: what is not mapped is passed over. 0 or -errno; -EINVAL
 * before Linux 5.14. */
int sc_own_pages(const void *runs, size_t n);
int sc_set_title(const char *args, size_t nargs, const char *env, size_t nenv, const char *name);

int64_t sc_now_mono(void); /* ns */
int64_t sc_now_real(void); /* ns since the epoch */

int sc_mount_in(const char *cwd, const char *source, const char *target, const char *fstype, unsigned long flags, const void *data);
#endif
