/* What the programs of the exit benchmark share: the file of stamps, mapped by all, and ttrpc over blocking sockets.
 *
 * Who writes what: the dying process `ready` and `death` of its own slot and the count of the dead; the driver the gates. */
#ifndef BENCH_H
#define BENCH_H
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

typedef struct { /* a cache line each, so that two processes never share one */
    _Atomic uint32_t gate;  /* 1: die */
    _Atomic uint32_t ready; /* 1: waits at its gate */
    _Atomic int64_t death;  /* ns of CLOCK_MONOTONIC, taken as the process's last act */
    char rest[48];
} bench_slot;

typedef struct {
    _Atomic uint32_t gate; /* 1: all of a burst die */
    _Atomic uint32_t dead, want; /* of a burst; whoever makes dead reach want wakes who waits for it */
    char rest[52];
    bench_slot slots[];
} bench_stamps;

static inline int64_t now_ns(clockid_t clock)
{
    struct timespec ts;
    clock_gettime(clock, &ts);
    return ts.tv_sec * 1000000000LL + ts.tv_nsec;
}

static inline void die(const char *what)
{
    perror(what);
    exit(1);
}

/* The file is shared between mount namespaces, so the futex is not a private one. 0, or -1 after 10 s. */
static inline int wait_while(_Atomic uint32_t *word, uint32_t value)
{
    struct timespec limit = {10, 0};
    while (atomic_load(word) == value)
        if (syscall(SYS_futex, word, FUTEX_WAIT, value, &limit, NULL, 0) < 0 && errno == ETIMEDOUT)
            return -1;
    return 0;
}

static inline void set_and_wake(_Atomic uint32_t *word, uint32_t value)
{
    atomic_store(word, value);
    syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

static inline bench_stamps *map_stamps(const char *path, size_t *slots)
{
    int fd = open(path, O_RDWR | O_CLOEXEC);
    struct stat st;
    if (fd < 0 || fstat(fd, &st) < 0)
        die(path);
    void *p = mmap(NULL, (size_t)st.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (p == MAP_FAILED)
        die("mmap");
    close(fd);
    *slots = ((size_t)st.st_size - sizeof(bench_stamps)) / sizeof(bench_slot);
    return p;
}

static inline int unix_socket(const char *path, int listening)
{
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    size_t n = strlen(path);
    if (fd < 0 || n >= sizeof a.sun_path)
        die(path);
    memcpy(a.sun_path, path, n);
    if (*path == '@') /* abstract: its length counts */
        a.sun_path[0] = 0;
    socklen_t len = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + n + (*path != '@'));
    if (listening ? bind(fd, (struct sockaddr *)&a, len) < 0 || listen(fd, 128) < 0 : connect(fd, (struct sockaddr *)&a, len) < 0)
        die(path);
    return fd;
}

static inline void write_all(int fd, const void *data, size_t n)
{
    const char *p = data;
    while (n) {
        ssize_t w = send(fd, p, n, MSG_NOSIGNAL);
        if (w < 0 && errno == EINTR)
            continue;
        if (w < 0)
            die("send");
        p += w;
        n -= (size_t)w;
    }
}
#endif
