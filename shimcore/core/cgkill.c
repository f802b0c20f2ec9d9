/* Signals to all that is in a cgroup, each through a pidfd. */
#define _GNU_SOURCE
#include "exits.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

enum { DEPTH_MAX = 16 };

struct listed {
    int *pids;
    size_t n, cap;
};

/* False: could not look, for want of fds or memory. */
static bool list(int dir, const char *file, struct listed *l)
{
    int fd = openat(dir, file, O_RDONLY | O_CLOEXEC), pid;
    if (fd < 0)
        return errno != EMFILE && errno != ENFILE && errno != ENOMEM;
    FILE *f = fdopen(fd, "r");
    if (!f) {
        close(fd);
        return false;
    }
    while (fscanf(f, "%d", &pid) == 1) {
        if (l->n == l->cap) {
            size_t cap = l->cap ? 2 * l->cap : 64;
            int *p = realloc(l->pids, cap * sizeof *p);
            if (!p)
                break;
            l->pids = p;
            l->cap = cap;
        }
        l->pids[l->n++] = pid;
    }
    fclose(f);
    return true;
}

static bool has(const struct listed *l, int pid)
{
    for (size_t i = 0; i < l->n; i++)
        if (l->pids[i] == pid)
            return true;
    return false;
}

enum { AT_ONCE = 64 }; /* pidfds open at a time */

/* A pid may have been given to a stranger between the list and pidfd_open: one that is listed again has not. */
static int signal_listed(int dir, const char *file, int sig)
{
    struct listed first = {0};
    int n = 0;
    if (!list(dir, file, &first))
        return -1;
    for (size_t at = 0; at < first.n; at += AT_ONCE) {
        int fds[AT_ONCE];
        size_t some = first.n - at < AT_ONCE ? first.n - at : AT_ONCE;
        for (size_t i = 0; i < some; i++)
            fds[i] = first.pids[at + i] > 0 ? sc_pidfd_open(first.pids[at + i]) : -1;
        struct listed again = {0};
        list(dir, file, &again);
        for (size_t i = 0; i < some; i++) {
            if (fds[i] == -EMFILE || fds[i] == -ENFILE) { /* by number then: better than not at all */
                if (has(&again, first.pids[at + i]))
                    n += kill(first.pids[at + i], sig) == 0;
                continue;
            }
            if (fds[i] < 0)
                continue;
            if (has(&again, first.pids[at + i]))
                n += sc_pidfd_send_signal(fds[i], sig) == 0;
            close(fds[i]);
        }
        free(again.pids);
    }
    free(first.pids);
    return n;
}

static int signal_tree(int dir, const char *file, int sig, int depth)
{
    int n = signal_listed(dir, file, sig), below;
    int again = depth < DEPTH_MAX ? openat(dir, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC) : -1;
    DIR *d = again >= 0 ? fdopendir(again) : NULL;
    if (!d) {
        if (again >= 0)
            close(again);
        return n;
    }
    struct dirent *e;
    while ((e = readdir(d))) {
        if (e->d_type != DT_DIR || e->d_name[0] == '.')
            continue;
        int sub = openat(dir, e->d_name, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
        if (sub < 0)
            continue;
        below = signal_tree(sub, file, sig, depth + 1);
        n = n < 0 || below < 0 ? -1 : n + below;
        close(sub);
    }
    closedir(d);
    return n;
}

int sc_cgroup_signal(const char *procs, int sig)
{
    char folder[4096];
    const char *slash = strrchr(procs, '/');
    if (!slash || slash == procs || (size_t)(slash - procs) >= sizeof folder)
        return 0;
    memcpy(folder, procs, (size_t)(slash - procs));
    folder[slash - procs] = 0;
    int dir = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (dir < 0)
        return errno == EMFILE || errno == ENFILE || errno == ENOMEM ? -1 : 0;
    int all = sig == SIGKILL ? openat(dir, "cgroup.kill", O_WRONLY | O_CLOEXEC) : -1;
    if (all >= 0) { /* cgroup v2 since Linux 5.14: nobody escapes by forking */
        bool done = write(all, "1", 1) == 1;
        close(all);
        if (done) {
            close(dir);
            return 0;
        }
    }
    int n = signal_tree(dir, slash + 1, sig, 0);
    close(dir);
    return n;
}
