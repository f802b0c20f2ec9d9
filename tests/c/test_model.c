/* The exit table against a model of it, in every order in which things can happen to a few processes.
 *
 * The model below says in its own words what must be told when; after each step the table's answers are compared with it. All
 * sequences are tried: states are found breadth first, each is reached by its steps from an empty table, and each step that is
 * possible in it is taken once.
 *
 * The steps. Of RPCs: open (Create's and Start's beginning), the runtime's making of the process, bind, announce, failure of the
 * runtime; Start of init, which holds its exit, and that Start's success or failure; Wait; Delete. Of processes: death, before or
 * after bind. Of time: the bound on init's wait for its execs, a record that is written or late, a teardown hook that ends or is
 * late. Beside each step, in each state: Kill, State, and whatever Delete and Start must refuse.
 *
 * The invariants, all consequences of the comparison:
 *   - no exit before its start: TaskExit stands behind TaskCreate or TaskExecStarted, and behind TaskStart when that was asked;
 *   - one exit each, for each process that was announced, and none for what was dropped;
 *   - init last, but for execs that were there when the bound ended;
 *   - an exited task has a record: it was asked for before the exit was told, and written if that did not take too long;
 *   - each Wait is answered once, with the status that is told, and not before it is told;
 *   - until it is told, Delete is refused and State says it runs; afterwards Kill finds nothing.
 */
#define _GNU_SOURCE
#include "check.h"
#include "exits.h"
#include "ledger.h"

/* ---- the world: processes exist in it only as numbers ---- */

enum { SLOTS = 6, FIRST_PID = 5000000 };
static bool records, dead_early[SLOTS];
static int killed, asked_record[SLOTS];

static int slot_of_pid(pid_t pid)
{
    return (pid - FIRST_PID) % SLOTS;
}

int __wrap_sc_pidfd_open(pid_t pid);
int __wrap_sc_pidfd_open(pid_t pid)
{
    return dead_early[slot_of_pid(pid)] ? -ESRCH : -EMFILE; /* by number: then the test alone says when it dies */
}

int __wrap_kill(pid_t pid, int sig);
int __wrap_kill(pid_t pid, int sig)
{
    (void)sig;
    killed = pid;
    return 0;
}

void __wrap_sc_record(sc_core *c, sc_slot *s);
void __wrap_sc_record(sc_core *c, sc_slot *s)
{
    asked_record[slot_of_pid(s->pid)]++;
    s->record = records ? SC_RECORD_PENDING : SC_RECORD_DONE;
    if (records)
        sc_timer_set(c, &s->record_late, INT64_MAX / 2);
}

/* ---- the model ---- */

enum { NONE, RESERVED, OPENED, BOUND, EXITED, TOLD, DROPPED };
enum { NO_PROCESS, ALIVE, DEAD };
enum { NOT_STARTED, STARTING, STARTED };
enum { NO_WAIT, PARKED, ANSWERED };

typedef struct {
    uint8_t phase, process, announced, start, tearing_down, recording, wait, bounded, overdue, orphaned, lives;
} spec;

typedef struct {
    spec of[SLOTS];
} world;

typedef struct {
    const char *name;
    int containers, execs, lives;
    bool waits, teardown, records;
} shape;

static shape now;
static int nslots;

static int init_of(int i)
{
    return i - i % (1 + now.execs);
}

static bool is_init(int i)
{
    return init_of(i) == i;
}

static bool in_progress(const spec *s)
{
    return s->phase == OPENED || s->phase == BOUND || s->phase == EXITED;
}

static bool has_busy_execs(const world *w, int i)
{
    for (int e = i + 1; e <= i + now.execs; e++)
        if (in_progress(&w->of[e]) && !w->of[e].orphaned)
            return true;
    return false;
}

static bool due(const world *w, int i)
{
    const spec *s = &w->of[i];
    if (s->phase != EXITED || !s->announced || s->start == STARTING || s->tearing_down || s->recording)
        return false;
    return !is_init(i) || !has_busy_execs(w, i) || s->overdue;
}

static bool may_be_deleted(const world *w, int i)
{
    const spec *s = &w->of[i];
    if (s->phase != RESERVED && s->phase != TOLD && s->phase != DROPPED)
        return false;
    return !is_init(i) || !has_busy_execs(w, i) || s->overdue;
}

/* ---- what was told ---- */

enum { CREATED, STARTED_EXEC, STARTED_INIT, EXIT };
static const char *const topics[] = {"/tasks/create", "/tasks/exec-started", "/tasks/start", "/tasks/exit"};
typedef struct {
    int what, slot;
} fact;
static fact seen[64], expected[64];
static size_t nseen, nexpected;

static sc_core *core;
static sc_slot *slots[SLOTS];
static sc_waiter waiters[SLOTS];
static int answers[SLOTS];

static void name_of(int i, char *id, char *exec)
{
    memcpy(id, (char[]){(char)(0x61 + init_of(i)), 0}, 2);
    *exec = 0;
    if (!is_init(i))
        memcpy(exec, (char[]){(char)(0x61 + i), 0}, 2);
}

static void take_events(void)
{
    sc_outbox *o = &core->outbox;
    while (o->queue.head) {
        sc_event *e = o->queue.head;
        fact f = {-1, -1};
        for (int t = 0; t < 4; t++)
            if (memmem(e->body, e->len, topics[t], strlen(topics[t])))
                f.what = t;
        for (int i = 0; i < nslots; i++) {
            char id[8], exec[8];
            name_of(i, id, exec);
            if (sc_hash(id) == e->key_id && (is_init(i) ? e->key_exec == sc_hash("") || !e->key_exec : e->key_exec == sc_hash(exec)))
                f.slot = i;
        }
        CHECK(f.what >= 0 && f.slot >= 0 && nseen < 64);
        seen[nseen++] = f;
        o->queue.head = e->next;
        o->queue.count--;
        free(e);
    }
    o->queue.tail = &o->queue.head;
}

static void answered(sc_waiter *w)
{
    int i = (int)(w - waiters);
    take_events();
    if (w->exit.status != 255) { /* told first */
        CHECK_EQ(w->exit.status, 10 + i);
        CHECK(nseen && seen[nseen - 1].what == EXIT);
    }
    answers[i]++;
}

static sc_event *event(int what, int i)
{
    char id[8], exec[8];
    name_of(i, id, exec);
    sc_event *e = sc_event_new(core, (sc_slice){(const uint8_t *)topics[what], strlen(topics[what])},
                               (sc_slice){(const uint8_t *)"t", 1}, (sc_slice){NULL, 0}, id, exec);
    CHECK(e != NULL);
    return e;
}

/* ---- steps ---- */

enum { OPEN, MADE, DIE, FAIL, BIND, ANNOUNCE, HOLD, RELEASE, UNHOLD, WAIT, BOUND_ENDS, TORN, TORN_LATE, RECORDED, RECORD_LATE, FORGET,
       RESERVE, STEPS };
typedef struct {
    uint8_t step, slot;
} move;

static bool possible(const world *w, move m)
{
    const spec *s = &w->of[m.slot], *init = &w->of[init_of(m.slot)];
    bool first = is_init(m.slot);
    switch (m.step) {
    case OPEN:
        if (first)
            return s->phase == NONE && s->lives < now.lives;
        return s->phase == RESERVED && init->phase == BOUND && init->announced;
    case RESERVE: return !first && s->phase == NONE && s->lives < now.lives && init->phase != NONE;
    case MADE: return s->phase == OPENED && s->process == NO_PROCESS;
    case DIE: return s->process == ALIVE;
    case FAIL: return s->phase == OPENED;
    case BIND: return s->phase == OPENED && s->process != NO_PROCESS;
    case ANNOUNCE: return (s->phase == BOUND || s->phase == EXITED) && !s->announced;
    case HOLD: return first && s->announced && s->start == NOT_STARTED && (s->phase == BOUND || s->phase == EXITED);
    case RELEASE:
    case UNHOLD: return s->start == STARTING;
    case WAIT: return now.waits && s->phase != NONE && s->wait == NO_WAIT;
    case BOUND_ENDS: return s->phase == EXITED && s->bounded && !s->overdue;
    case TORN:
    case TORN_LATE: return s->tearing_down;
    case RECORDED:
    case RECORD_LATE: return s->recording;
    case FORGET: return s->phase != NONE && !s->orphaned && may_be_deleted(w, m.slot);
    }
    return false;
}

static void expect(int what, int slot)
{
    CHECK(nexpected < 64);
    expected[nexpected++] = (fact){what, slot};
}

static void gone(spec *s)
{
    uint8_t lives = s->lives;
    *s = (spec){.lives = lives};
}

static void settle(world *w)
{
    for (bool again = true; again;) {
        again = false;
        for (int i = nslots; i-- > 0;) { /* execs before their init */
            if (!due(w, i))
                continue;
            w->of[i].phase = TOLD;
            if (w->of[i].wait == PARKED)
                w->of[i].wait = ANSWERED;
            expect(EXIT, i);
            if (w->of[i].orphaned)
                gone(&w->of[i]);
            again = true;
        }
    }
}

static void has_exited(world *w, int i)
{
    spec *s = &w->of[i];
    s->phase = EXITED;
    s->recording = now.records;
    s->tearing_down = now.teardown;
    s->bounded = is_init(i) && has_busy_execs(w, i);
}

static void fire(sc_timer *t)
{
    sc_lock(core);
    CHECK(t->at);
    sc_timer_clear(core, t);
    t->fire(core, t);
    sc_unlock(core);
}

static void die(int i)
{
    sc_slot *s = slots[i];
    sc_exit_status st = {.pid = FIRST_PID + i, .status = 10 + i};
    sc_lock(core);
    if (s->phase == SC_BOUND) {
        sc_child_remove(core, &s->child);
        s->child.died(core, &s->child, &st, 1, 1);
    } else { /* reaped before anybody knew whose it is */
        core->early = realloc(core->early, (core->early_len + 1) * sizeof *core->early);
        core->early[core->early_len++] = (sc_early){FIRST_PID + i, st, 1, 1};
        core->early_cap = core->early_len;
        dead_early[i] = true;
    }
    sc_unlock(core);
}

static size_t taken[STEPS];

static void take(world *w, move m)
{
    int i = m.slot;
    spec *s = &w->of[i];
    sc_slot *c = slots[i];
    char id[8], exec[8];
    name_of(i, id, exec);
    switch (m.step) {
    case OPEN:
        if (is_init(i)) {
            CHECK_EQ(sc_slot_open_init(core, id, NULL, 0, &slots[i]), 0);
            s->lives++;
            answers[i] = asked_record[i] = 0;
        } else {
            CHECK_EQ(sc_slot_open(c), 0);
        }
        if (now.teardown)
            sc_slot_set_teardown(slots[i], INT64_MAX / 4);
        dead_early[i] = false;
        s->phase = OPENED;
        break;
    case RESERVE:
        CHECK_EQ(sc_slot_reserve(core, id, exec, NULL, 0, &slots[i]), 0);
        s->lives++;
        answers[i] = asked_record[i] = 0;
        s->phase = RESERVED;
        break;
    case MADE: s->process = ALIVE; break;
    case DIE:
        die(i);
        s->process = DEAD;
        if (s->phase == BOUND)
            has_exited(w, i);
        break;
    case FAIL:
        CHECK_EQ(sc_slot_drop(c), 0);
        s->process = NO_PROCESS; /* if there is one, it is nobody's */
        s->phase = DROPPED;
        if (s->wait == PARKED)
            s->wait = ANSWERED;
        if (s->orphaned)
            gone(s);
        break;
    case BIND:
        CHECK_EQ(sc_slot_bind(c, FIRST_PID + i), 0);
        s->phase = BOUND;
        if (s->process == DEAD)
            has_exited(w, i);
        break;
    case ANNOUNCE:
        expect(is_init(i) ? CREATED : STARTED_EXEC, i);
        CHECK_EQ(sc_slot_announce(c, event(is_init(i) ? CREATED : STARTED_EXEC, i)), 0);
        s->announced = true;
        break;
    case HOLD:
        CHECK_EQ(sc_slot_hold(c), 0);
        s->start = STARTING;
        break;
    case RELEASE:
        expect(STARTED_INIT, i);
        CHECK_EQ(sc_slot_release(c, event(STARTED_INIT, i)), 0);
        s->start = STARTED;
        break;
    case UNHOLD: /* and it may be asked again */
        CHECK_EQ(sc_slot_release(c, NULL), 0);
        s->start = NOT_STARTED;
        break;
    case WAIT: {
        waiters[i] = (sc_waiter){.fire = answered};
        bool over = s->phase == TOLD || s->phase == DROPPED;
        CHECK_EQ(sc_slot_wait(core, id, exec, &waiters[i], 0), over);
        if (over) {
            CHECK_EQ(waiters[i].exit.status, s->phase == TOLD ? 10 + i : 255);
            answers[i]++;
        }
        s->wait = over ? ANSWERED : PARKED;
        break;
    }
    case BOUND_ENDS:
        fire(&c->bound);
        s->overdue = true;
        break;
    case TORN:
        sc_slot_teardown_done(c);
        s->tearing_down = false;
        break;
    case TORN_LATE:
        fire(&c->teardown);
        s->tearing_down = false;
        break;
    case RECORDED: /* as the recorder does */
        sc_lock(core);
        c->record = SC_RECORD_DONE;
        sc_timer_clear(core, &c->record_late);
        sc_tell_if_due(c);
        sc_unlock(core);
        s->recording = false;
        break;
    case RECORD_LATE:
        fire(&c->record_late);
        s->recording = false;
        break;
    case FORGET:
        CHECK_EQ(sc_slot_forget(c), 0);
        if (is_init(i)) {
            for (int e = i + 1; e <= i + now.execs; e++) {
                if (in_progress(&w->of[e]))
                    w->of[e].orphaned = true;
                else if (w->of[e].phase != NONE)
                    gone(&w->of[e]);
            }
        }
        gone(s);
        break;
    }
    settle(w);
    take_events();
}

/* ---- the comparison ---- */

static const int c_phase[] = {[RESERVED] = SC_RESERVED, [OPENED] = SC_OPENED, [BOUND] = SC_BOUND,
                              [EXITED] = SC_EXITED,     [TOLD] = SC_TOLD,     [DROPPED] = SC_DROPPED};

static void compare(const world *w)
{
    CHECK_EQ(nseen, nexpected);
    for (size_t k = 0; k < nseen; k++) {
        CHECK_EQ(seen[k].what, expected[k].what);
        CHECK_EQ(seen[k].slot, expected[k].slot);
    }
    size_t there = 0;
    unsigned open = 0;
    for (int i = 0; i < nslots; i++) {
        const spec *s = &w->of[i];
        char id[8], exec[8];
        name_of(i, id, exec);
        sc_slot *c = sc_slot_find(core, id, exec);
        CHECK((c != NULL) == (s->phase != NONE));
        if (!c)
            continue;
        sc_slot_unref(c);
        CHECK(c == slots[i]);
        there++;
        open += s->phase == OPENED;
        sc_slot_info info;
        sc_slot_info_get(c, &info);
        CHECK_EQ(info.phase, c_phase[s->phase]);
        bool over = s->phase == TOLD || s->phase == DROPPED;
        CHECK_EQ(info.status == SC_STOPPED, over);
        if (over)
            CHECK_EQ(info.exit.status, s->phase == TOLD ? 10 + i : 255);
        killed = 0;
        CHECK_EQ(sc_slot_kill(c, 15), s->phase == BOUND ? 0 : s->phase == RESERVED || s->phase == OPENED ? -EINVAL : -ESRCH);
        CHECK_EQ(killed, s->phase == BOUND ? FIRST_PID + i : 0);
        if (now.waits)
            CHECK_EQ(answers[i], s->wait == ANSWERED);
        if (!may_be_deleted(w, i) && !s->orphaned)
            CHECK_EQ(sc_slot_forget(c), -EBUSY);
        if (s->phase == RESERVED && w->of[init_of(i)].phase != BOUND)
            CHECK_EQ(sc_slot_open(c), -ESRCH);
        else if (!is_init(i) && s->phase != RESERVED)
            CHECK_EQ(sc_slot_open(c), -EINVAL);
        if (s->phase != OPENED)
            CHECK_EQ(sc_slot_bind(c, FIRST_PID + i), -EINVAL);
        if (s->phase == EXITED)
            CHECK_EQ(c->bound.at != 0 || s->overdue, s->bounded);
        CHECK_EQ(asked_record[i], s->phase == EXITED || s->phase == TOLD);
    }
    CHECK_EQ(core->slot_count, there);
    CHECK_EQ(core->open_unbound, open);
}

/* ---- every state ---- */

static void let_go(void)
{
    for (sc_note *n = sc_take_notes(core), *next; n; n = next) {
        next = n->next;
        if (n->kind == SC_NOTE_TOLD || n->kind == SC_NOTE_TEARDOWN)
            sc_slot_unref(n->ptr);
        free(n);
    }
}

typedef struct {
    world w;
    uint32_t from;
    move by;
    uint8_t depth;
} node;
static node *nodes;
static size_t nnodes, node_cap;
static uint32_t *table;
static size_t table_cap;

/* Execs of one container are alike: their order makes no other state. */
static world canonical(const world *w)
{
    world out = *w;
    for (int i = 0; i < nslots; i += 1 + now.execs)
        for (int a = i + 1; a <= i + now.execs; a++)
            for (int b = a; b > i + 1 && memcmp(&out.of[b - 1], &out.of[b], sizeof(spec)) > 0; b--) {
                spec t = out.of[b];
                out.of[b] = out.of[b - 1];
                out.of[b - 1] = t;
            }
    return out;
}

static bool is_new(const world *canon)
{
    if (2 * (nnodes + 1) > table_cap) {
        size_t old = table_cap;
        uint32_t *was = table;
        table_cap = old ? 2 * old : 4096;
        table = calloc(table_cap, sizeof *table);
        for (size_t i = 0; i < old; i++) {
            if (!was[i])
                continue;
            world c = canonical(&nodes[was[i] - 1].w);
            size_t h = 0;
            for (size_t k = 0; k < sizeof c; k++)
                h = h * 1099511628211ULL + ((uint8_t *)&c)[k];
            while (table[h & (table_cap - 1)])
                h++;
            table[h & (table_cap - 1)] = was[i];
        }
        free(was);
    }
    size_t h = 0;
    for (size_t k = 0; k < sizeof *canon; k++)
        h = h * 1099511628211ULL + ((const uint8_t *)canon)[k];
    for (;; h++) {
        uint32_t at = table[h & (table_cap - 1)];
        if (!at) {
            table[h & (table_cap - 1)] = (uint32_t)nnodes + 1;
            return true;
        }
        world other = canonical(&nodes[at - 1].w);
        if (!memcmp(&other, canon, sizeof other))
            return false;
    }
}

static void add(const world *w, uint32_t from, move by, uint8_t depth)
{
    if (nnodes == node_cap) {
        node_cap = node_cap ? 2 * node_cap : 4096;
        nodes = realloc(nodes, node_cap * sizeof *nodes);
    }
    nodes[nnodes++] = (node){*w, from, by, depth};
}

static sc_slot *held[64];
static size_t nheld;

static void begin(void)
{
    core = sc_core_new("ns", "/nowhere");
    CHECK(core != NULL);
    memset(slots, 0, sizeof slots);
    memset(waiters, 0, sizeof waiters);
    memset(answers, 0, sizeof answers);
    memset(asked_record, 0, sizeof asked_record);
    memset(dead_early, 0, sizeof dead_early);
    nseen = nexpected = 0;
}

static void end(void)
{
    while (nheld)
        sc_slot_unref(held[--nheld]);
    for (int i = 0; i < nslots; i++)
        sc_waiter_cancel(core, &waiters[i]);
    let_go();
    core->outbox.queue.tail = &core->outbox.queue.head;
    sc_core_free(core);
}

/* The reference that it makes is kept, as an RPC's is. */
static void step(world *w, move m)
{
    sc_slot *was = slots[m.slot];
    take(w, m);
    if (slots[m.slot] != was)
        held[nheld++] = slots[m.slot];
}

/* The steps from the empty table to a state; each was checked when the state behind it was found. */
static void walk(world *w, uint32_t at)
{
    move path[256];
    size_t n = 0;
    for (uint32_t k = at; k; k = nodes[k].from)
        path[n++] = nodes[k].by;
    memset(w, 0, sizeof *w);
    while (n-- > 0)
        step(w, path[n]);
}

static void every_order(const shape *s)
{
    now = *s;
    records = now.records;
    nslots = now.containers * (1 + now.execs);
    CHECK(nslots <= SLOTS);
    nnodes = 0;
    free(table);
    table = NULL;
    table_cap = 0;
    size_t steps = 0, told = 0;
    uint8_t deepest = 0;
    world w = {0};
    CHECK(is_new(&w));
    add(&w, 0, (move){0, 0}, 0);
    for (uint32_t at = 0; at < nnodes; at++) {
        for (unsigned m = 0; m < (unsigned)(STEPS * nslots); m++) {
            move next = {(uint8_t)(m / (unsigned)nslots), (uint8_t)(m % (unsigned)nslots)};
            if (!possible(&nodes[at].w, next))
                continue;
            begin();
            walk(&w, at);
            step(&w, next);
            compare(&w);
            steps++;
            taken[next.step]++;
            told += nseen;
            world canon = canonical(&w);
            if (is_new(&canon))
                add(&w, at, next, (uint8_t)(nodes[at].depth + 1));
            deepest = nodes[nnodes - 1].depth;
            end();
        }
    }
    printf("  %s: %zu states, %zu steps, up to %d long, %zu events\n", now.name, nnodes, steps, deepest, told);
}

static void execs(void)
{
    every_order(&(shape){.name = __func__, .containers = 1, .execs = 3, .lives = 1});
}

static void containers(void)
{
    every_order(&(shape){.name = __func__, .containers = 2, .execs = 1, .lives = 1});
}

static void all_that_delays_an_exit(void)
{
    every_order(&(shape){.name = __func__, .containers = 1, .execs = 1, .lives = 1, .waits = true, .teardown = true, .records = true});
}

static void delays_with_two_execs(void)
{
    every_order(&(shape){.name = __func__, .containers = 1, .execs = 2, .lives = 1, .teardown = true, .records = true});
}

static void waits_with_two_execs(void)
{
    every_order(&(shape){.name = __func__, .containers = 1, .execs = 2, .lives = 1, .waits = true});
}

static void ids_used_again(void)
{
    every_order(&(shape){.name = __func__, .containers = 1, .execs = 2, .lives = 2});
}

int main(void)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    RUN(execs);
    RUN(containers);
    RUN(all_that_delays_an_exit);
    RUN(delays_with_two_execs);
    RUN(waits_with_two_execs);
    RUN(ids_used_again);
    for (int i = 0; i < STEPS; i++)
        CHECK(taken[i] > 0);
    return 0;
}
