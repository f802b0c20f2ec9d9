/* Which pages a fork has written, and how another one has them before they are needed.
 *
 * A fork shares its pages with the process that made it, and pays for a copy when it first writes to one. Python writes to much
 * that it only reads, since references are counted in the objects, so most of what a start waits for are such copies. The next
 * fork will write to the same pages: so it makes them its own while nobody waits for it. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

#include "process.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23 /* Linux 5.14 */
#endif

#define PRESENT (1ULL << 63)
#define OF_A_FILE (1ULL << 61)
#define ITS_OWN (1ULL << 56) /* mapped by nobody else */

enum { ENTRIES = 512 };

/* Adds the runs of pages between these addresses. False: no memory. */
static bool look(int pagemap, uint64_t at, uint64_t end, uint64_t page, sc_buf *runs)
{
    uint64_t entries[ENTRIES], run[2] = {0, 0};
    bool ok = true;
    while (ok && at < end) {
        size_t want = (end - at) / page < ENTRIES ? (size_t)((end - at) / page) : ENTRIES;
        ssize_t got = pread(pagemap, entries, want * sizeof *entries, (off_t)(at / page * sizeof *entries));
        if (got <= 0)
            break;
        for (size_t i = 0; ok && i < (size_t)got / sizeof *entries; i++, at += page) {
            if ((entries[i] & (PRESENT | OF_A_FILE | ITS_OWN)) != (PRESENT | ITS_OWN))
                continue;
            if (run[0] + run[1] != at) {
                ok = !run[1] || sc_buf_put(runs, run, sizeof run);
                run[0] = at;
                run[1] = 0;
            }
            run[1] += page;
        }
    }
    return ok && (!run[1] || sc_buf_put(runs, run, sizeof run));
}

int sc_written_pages(pid_t pid, sc_buf *runs)
{
    char path[40], *line = NULL;
    size_t cap = 0;
    snprintf(path, sizeof path, "/proc/%d/pagemap", (int)pid);
    int pagemap = open(path, O_RDONLY | O_CLOEXEC);
    FILE *maps = pagemap < 0 ? NULL : fopen("/proc/self/maps", "re");
    int r = maps ? 0 : -errno;
    while (r == 0 && getline(&line, &cap, maps) > 0) {
        uint64_t start, end;
        char mode[5];
        if (sscanf(line, "%" SCNx64 "-%" SCNx64 " %4s", &start, &end, mode) == 3 && !strcmp(mode, "rw-p") &&
            !look(pagemap, start, end, (uint64_t)sysconf(_SC_PAGESIZE), runs))
            r = -ENOMEM;
    }
    free(line);
    if (maps)
        fclose(maps);
    if (pagemap >= 0)
        close(pagemap);
    return r;
}

int sc_own_pages(const void *runs, size_t n)
{
    for (size_t at = 0; at + 2 * sizeof(uint64_t) <= n; at += 2 * sizeof(uint64_t)) {
        uint64_t run[2];
        memcpy(run, (const char *)runs + at, sizeof run);
        if (madvise((void *)(uintptr_t)run[0], run[1], MADV_POPULATE_WRITE) < 0 && errno != ENOMEM) /* ENOMEM: not mapped */
            return -errno;
    }
    return 0;
}
