/* The exit ledger: one append-only file in a bundle, one record for each exit, written before the exit is told.
 *
 * Record, little-endian: u32 magic, u16 length of the body, u16 0, u32 CRC-32 of the body; body: u32 pid, u32 exit status, i64 ns
 * since the epoch, u16 length of the id, u16 length of the exec id, id, exec id. The file is preallocated with zeros, so the
 * first records find room on a full disk, and a reader ends at a magic of 0 or at a CRC that is wrong (a torn last record). */
#ifndef SC_LEDGER_H
#define SC_LEDGER_H
#include "core.h"

enum { SC_LEDGER_MAGIC = 0x314c4353, SC_LEDGER_HEAD = 12, SC_LEDGER_ROOM = 16384 };

typedef struct sc_ledger {
    atomic_int refs;
    int fd;
    int64_t at;  /* where the next record goes; under the core's lock */
    bool inline_; /* on tmpfs, where a write does not wait: elsewhere the writer thread does it */
} sc_ledger;

/* May block: not on the exit thread. An old file is kept and added to. 0 or -errno. */
int sc_ledger_open(const char *path, sc_ledger **out);
/* One that is open already, whose next record goes to `at`; the fd is the ledger's. NULL: no memory. */
sc_ledger *sc_ledger_adopt(int fd, int64_t at);
void sc_ledger_unref(sc_ledger *);

/* Under the lock. Begin to record a slot's exit; afterwards slot->record says how it stands. */
void sc_record(sc_core *, sc_slot *);
void sc_recorder_stop(sc_core *); /* at the core's end */
bool sc_recorder_idle(const sc_core *);
uint32_t sc_crc32(const uint8_t *p, size_t n);
size_t sc_ledger_encode(const sc_slot *, uint8_t *out, size_t room);
#endif
