/* What ps shows of a process that was forked and not executed: its command line, its environment and its name.
 *
 * The kernel reads /proc/PID/cmdline and environ from where the process says that they are. prctl(2)'s PR_SET_MM_MAP takes the whole
 * description of the memory at once, needs no capability as long as the executable stays, and is there on kernels with
 * CONFIG_CHECKPOINT_RESTORE, which distributions set. What is not to change comes from /proc/self/stat (proc(5), fields 26 to 51). */
#define _GNU_SOURCE
#include "process.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdlib.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

enum { FIRST = 26, LAST = 51, START_CODE = 26, END_CODE = 27, START_STACK = 28, START_DATA = 45, END_DATA = 46, START_BRK = 47 };

/* The numbers of /proc/self/stat from FIRST to LAST. */
static int read_stat(unsigned long long out[LAST - FIRST + 1])
{
    char buf[2048];
    int fd = open("/proc/self/stat", O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    ssize_t n = read(fd, buf, sizeof buf - 1);
    close(fd);
    if (n <= 0)
        return -EIO;
    buf[n] = 0;
    char *at = strrchr(buf, ')'); /* the name may hold anything; what follows it is field 3 */
    for (int field = 3; at && field <= LAST; field++) {
        at = strchr(at + 1, ' ');
        if (at && field >= FIRST && sscanf(at, " %llu", &out[field - FIRST]) != 1)
            return -EIO;
    }
    return at ? 0 : -EIO;
}

int sc_set_title(const char *args, size_t nargs, const char *env, size_t nenv, const char *name)
{
    static char *was;
    static size_t was_len;
    /* What is read does not change, in a fork neither. */
    static unsigned long long stat[LAST - FIRST + 1];
    static bool known;
    size_t len = nargs + nenv;
    int r = nargs ? known ? 0 : read_stat(stat) : -EINVAL;
    if (r < 0)
        return r;
    known = true;
    char *block = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (block == MAP_FAILED)
        return -errno;
    memcpy(block, args, nargs);
    if (nenv)
        memcpy(block + nargs, env, nenv);
    struct prctl_mm_map map = {
        .start_code = stat[START_CODE - FIRST],
        .end_code = stat[END_CODE - FIRST],
        .start_data = stat[START_DATA - FIRST],
        .end_data = stat[END_DATA - FIRST],
        .start_brk = stat[START_BRK - FIRST],
        .brk = (uint64_t)(uintptr_t)sbrk(0),
        .start_stack = stat[START_STACK - FIRST],
        .arg_start = (uint64_t)(uintptr_t)block,
        .arg_end = (uint64_t)(uintptr_t)(block + nargs),
        .env_start = (uint64_t)(uintptr_t)(block + nargs),
        .env_end = (uint64_t)(uintptr_t)(block + len),
        .exe_fd = (uint32_t)-1,
    };
    if (prctl(PR_SET_MM, PR_SET_MM_MAP, (unsigned long)&map, sizeof map, 0) < 0) {
        r = -errno;
        munmap(block, len);
        return r;
    }
    if (was)
        munmap(was, was_len);
    was = block;
    was_len = len;
    return prctl(PR_SET_NAME, (unsigned long)name, 0, 0, 0) < 0 ? -errno : 0;
}

int sc_set_environment(const char *block, size_t n)
{
    static char *kept;
    static char **list;
    size_t count = 0, at = 0;
    if (n && block[n - 1])
        return -EINVAL;
    for (size_t i = 0; i < n; i++)
        count += !block[i];
    char *copy = malloc(n ? n : 1), **pointers = malloc((count + 1) * sizeof *pointers);
    if (!copy || !pointers) {
        free(copy);
        free(pointers);
        return -ENOMEM;
    }
    memcpy(copy, block, n);
    for (size_t i = 0; i < n; i += strlen(copy + i) + 1)
        pointers[at++] = copy + i;
    pointers[at] = NULL;
    clearenv(); /* what the libraries have allocated for it is theirs to forget */
    environ = pointers;
    free(kept);
    free(list);
    kept = copy;
    list = pointers;
    return 0;
}
