/* Stands in for a shim's binary and runs it, so that what is timed is the shim and not the driver, whose own fork costs more than
 * the half of a start. From posix_spawn to the end of the output and the exit, as containerd waits for both.
 *
 * BENCH_SHIM: the binary; BENCH_TIMES: a file to which it adds "ACTION NANOSECONDS". */
#include <errno.h>
#include <fcntl.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static long long now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

int main(int argc, char **argv)
{
    static char output[1 << 20];
    char *shim = getenv("BENCH_SHIM"), *times = getenv("BENCH_TIMES");
    int ends[2], status;
    size_t n = 0;
    if (!shim || !times || argc < 2 || pipe2(ends, O_CLOEXEC) < 0) {
        fprintf(stderr, "usage: BENCH_SHIM=BINARY BENCH_TIMES=FILE %s ARGUMENTS\n", argv[0]);
        return 2;
    }
    int log = open(times, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    unsetenv("BENCH_SHIM");
    unsetenv("BENCH_TIMES");
    posix_spawn_file_actions_t actions;
    pid_t pid;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, ends[1], 1);
    argv[0] = shim;
    long long began = now();
    if (posix_spawn(&pid, shim, &actions, NULL, argv, environ))
        pid = -1;
    close(ends[1]);
    ssize_t got;
    while (pid > 0 && n < sizeof output && ((got = read(ends[0], output + n, sizeof output - n)) > 0 || (got < 0 && errno == EINTR)))
        n += got > 0 ? (size_t)got : 0;
    if (pid < 0 || waitpid(pid, &status, 0) < 0)
        return 127;
    long long ended = now();
    dprintf(log, "%s %lld\n", argv[argc - 1], ended - began);
    for (size_t at = 0; at < n; at += (size_t)got)
        if ((got = write(1, output + at, n - at)) < 0)
            return 127;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 127;
}
