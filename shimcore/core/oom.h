/* Out-of-memory kills of a container, told before the exit that they cause.
 *
 * cgroup v1: an eventfd registered with memory.oom_control; it becomes readable at each OOM. cgroup v2: the counter oom_kill in
 * memory.events, whose file polls with POLLPRI when it changes; oom_kill and not oom, since the limit may stand on a parent. */
#ifndef SC_OOM_H
#define SC_OOM_H
#include "core.h"

typedef struct sc_oom {
    sc_source src;
    sc_slot *init;   /* borrowed: it owns this; NULL once it has been told */
    struct sc_oom *grave;
    int fd;          /* v1: the eventfd; v2: memory.events */
    bool v2;
    uint64_t seen;   /* v2: oom_kill when it was last read */
} sc_oom;

/* Watch a container. path: v1 the memory cgroup's folder, v2 the cgroup's folder. 0 or -errno. */
int sc_oom_watch(sc_slot *init, const char *folder, bool v2);
/* What an earlier image of this process has watched; fd is its, and ours if 0 is returned. Under the lock. */
int sc_oom_adopt(sc_slot *init, int fd, bool v2, uint64_t seen);
/* Under the lock: queue TaskOOM if there was a kill since the last look. */
void sc_oom_look(sc_core *, sc_oom *);
void sc_oom_free(sc_core *, sc_oom *); /* exit thread, or when the core is not running */
#endif
