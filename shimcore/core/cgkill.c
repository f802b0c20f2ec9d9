/* Signals to all that is in a cgroup, each through a pidfd. */
#define _GNU_SOURCE
#include "exits.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

enum { DEPTH_MAX = 16 };

static int signal_listed(int dir, const char *file, int sig)
{
    int fd = openat(dir, file, O_RDONLY | O_CLOEXEC), n = 0;
    if (fd < 0)
        return 0;
    FILE *f = fdopen(fd, "r");
    if (!f) {
        close(fd);
        return 0;
    }
    int pid;
    while (fscanf(f, "%d", &pid) == 1) {
        int pidfd = pid > 0 ? sc_pidfd_open(pid) : -1;
        if (pidfd < 0)
            continue;
        n += sc_pidfd_send_signal(pidfd, sig) == 0;
        close(pidfd);
    }
    fclose(f);
    return n;
}

static int signal_tree(int dir, const char *file, int sig, int depth)
{
    int n = signal_listed(dir, file, sig);
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
        n += signal_tree(sub, file, sig, depth + 1);
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
        return 0;
    int n = signal_tree(dir, slash + 1, sig, 0);
    close(dir);
    return n;
}
