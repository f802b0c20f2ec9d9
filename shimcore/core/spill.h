/* Where events wait that memory has no room for, or that the shim could not hand over before its end: one file per shim.
 *
 * Record, little-endian: u32 magic, u32 length of the body, u32 CRC-32 of the body, u32 flags (1: an exit or a deletion), u64 and
 * u64 the event's keys, body. Read from the front, written at the end, unlinked when it is empty. Not on a filesystem that can
 * hang: only tmpfs is used while the shim lives, since the exit thread itself reads and writes. */
#ifndef SC_SPILL_H
#define SC_SPILL_H
#include "core.h"

enum { SC_SPILL_MAGIC = 0x314f4353 };
enum { SC_SPILL_HEAD = 32 };

struct sc_spill {
    char *path;  /* NULL: none is used */
    int fd;      /* -1 until it is needed */
    bool usable; /* on tmpfs */
    int64_t from, to;
    size_t count;
    int64_t cap; /* bytes; beyond it only exits and deletions are taken, up to twice as much */
};

void sc_spill_init(struct sc_spill *);
void sc_spill_free(struct sc_spill *);
/* A file that another one of this process's images had open; fd -1: none. false: no memory. */
bool sc_spill_adopt(struct sc_spill *, const char *path, int fd, int64_t from, int64_t to, size_t count, int64_t cap);
bool sc_spill_put(struct sc_spill *, const sc_event *);
sc_event *sc_spill_take(struct sc_spill *); /* the oldest, or NULL */
/* Open what an earlier shim of this address left. Returns the number of events, or -errno. May block. */
int sc_spill_open(struct sc_spill *, const char *path, int64_t cap);
/* At the end: all that was not handed over, oldest first, in one step. */
int sc_spill_keep(struct sc_spill *, const sc_event *first, const sc_event *second);
#endif
