/* A process that waits to be told, stamps its death and dies. Linked statically: it runs in a container's bare rootfs.
 *
 *   dying STAMPS SLOT                    one process, at the gate of its slot
 *   dying STAMPS FIRST COUNT PIDS        COUNT processes at the common gate, left as orphans; their pids go to the file PIDS
 */
#define _GNU_SOURCE
#include "bench.h"

static _Noreturn void last_act(bench_slot *slot)
{
    atomic_store(&slot->death, now_ns(CLOCK_MONOTONIC));
    for (;;)
        syscall(SYS_exit_group, 0);
}

static _Noreturn void wait_and_die(bench_stamps *all, bench_slot *slot, _Atomic uint32_t *gate)
{
    set_and_wake(&slot->ready, 1);
    while (!atomic_load(gate))
        wait_while(gate, 0);
    if (gate == &all->gate && atomic_fetch_add(&all->dead, 1) + 1 == atomic_load(&all->want))
        syscall(SYS_futex, &all->dead, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
    last_act(slot);
}

int main(int argc, char **argv)
{
    if (argc != 3 && argc != 5)
        return 2;
    size_t slots, first = strtoul(argv[2], NULL, 10), count = argc == 5 ? strtoul(argv[3], NULL, 10) : 1;
    bench_stamps *all = map_stamps(argv[1], &slots);
    if (first + count > slots)
        return 2;
    if (argc == 3)
        wait_and_die(all, &all->slots[first], &all->slots[first].gate);
    setsid(); /* a session of its own, so that with sched_autogroup the burst does not share its parent's part of the CPU */
    FILE *pids = fopen(argv[4], "we");
    if (!pids)
        die(argv[4]);
    for (size_t i = first; i < first + count; i++) {
        pid_t pid = fork();
        if (pid < 0)
            die("fork");
        if (pid == 0)
            wait_and_die(all, &all->slots[i], &all->gate);
        fprintf(pids, "%d\n", (int)pid);
    }
    for (size_t i = first; i < first + count; i++)
        wait_while(&all->slots[i].ready, 0);
    return fclose(pids) ? 1 : 0;
}
