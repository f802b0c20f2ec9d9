/* The exit table across an exec of this process by itself: what of a slot is carried over, and how it goes on.
 *
 * The kernel keeps what matters: our children stay ours, who dies meanwhile stays a zombie, and a zombie keeps its pid. So a process
 * that was bound is taken up by its pid again, and its death is told whenever it came. Nothing is told between save and resume. */
#define _GNU_SOURCE
#include <errno.h>
#include <unistd.h>

#include "exits.h"
#include "ledger.h"
#include "oom.h"

static const char *busy_slot(const sc_slot *s)
{
    if (s->phase == SC_OPENED)
        return "a process is being made";
    if (s->holds)
        return "a start is under way";
    if (s->tearing_down)
        return "a process is being torn down";
    if (s->record == SC_RECORD_PENDING)
        return "an exit is being recorded";
    if (*s->exec_id && !s->init->in_table)
        return "an exec has outlived its container";
    return NULL;
}

const char *sc_core_busy(sc_core *c)
{
    const char *why = NULL;
    sc_lock(c);
    for (size_t i = 0; i < c->slot_cap && !why; i++)
        for (sc_slot *s = c->slots[i]; s && !why; s = s->hash_next)
            why = busy_slot(s);
    if (!why && c->jobs)
        why = "a call of the runtime is under way";
    if (!why && !sc_recorder_idle(c))
        why = "the ledger is being written";
    if (!why && c->killing)
        why = "what is left of a container is being killed";
    sc_unlock(c);
    return why;
}

void sc_slot_save(sc_slot *s, sc_saved_slot *out)
{
    *out = (sc_saved_slot){
        .phase = s->phase,
        .task_status = s->task_status,
        .announced = s->announced,
        .overdue = s->overdue,
        .oom_over = s->oom_over,
        .killing = s->kill_queued || s->kill_again.at,
        .pid = s->pid,
        .exit = s->exit,
        .opened_mono = s->opened_mono,
        .reaped_mono = s->reaped_mono,
        .recorded_mono = s->recorded_mono,
        .state = s->state,
        .state_len = s->state_len,
        .kill_procs = s->kill_procs,
        .bound_ns = s->bound_ns,
        .bound_at = s->bound.at ? s->bound.when : 0,
        .ledger_fd = s->ledger ? s->ledger->fd : -1,
        .ledger_at = s->ledger ? s->ledger->at : 0,
        .oom_fd = s->oom ? s->oom->fd : -1,
        .oom_v2 = s->oom && s->oom->v2,
        .oom_seen = s->oom ? s->oom->seen : 0,
    };
}

int sc_slot_restore(sc_core *c, const char *id, const char *exec_id, const sc_saved_slot *v, sc_slot **out)
{
    if (v->phase < SC_RESERVED || v->phase > SC_DROPPED || v->phase == SC_OPENED || (v->phase == SC_BOUND && v->pid <= 0))
        return -EINVAL;
    sc_slot *s = sc_slot_new(c, id, exec_id, v->state, v->state_len);
    if (!s)
        return -ENOMEM;
    s->phase = v->phase;
    s->task_status = v->task_status;
    s->announced = v->announced;
    s->overdue = v->overdue;
    s->oom_over = v->oom_over;
    s->pid = v->pid;
    s->exit = v->exit;
    s->opened_mono = v->opened_mono;
    s->reaped_mono = v->reaped_mono;
    s->recorded_mono = v->recorded_mono;
    s->bound_ns = v->bound_ns;
    s->record = v->phase == SC_EXITED || v->phase == SC_TOLD ? SC_RECORD_DONE : SC_RECORD_NONE;
    if (v->kill_procs && !(s->kill_procs = strdup(v->kill_procs))) {
        sc_slot_unref(s);
        return -ENOMEM;
    }
    sc_lock(c);
    sc_slot *init = *exec_id ? sc_slot_in_table(c, id, "") : NULL;
    int r = *exec_id && !init ? -ENOENT : sc_slot_in_table(c, id, exec_id) ? -EEXIST : 0;
    if (r == 0) {
        if (init) {
            sc_slot_add_exec(init, s);
            init->busy += s->phase == SC_BOUND || s->phase == SC_EXITED;
        }
        sc_slot_insert(c, s);
    }
    sc_unlock(c);
    if (r < 0)
        sc_slot_unref(s);
    else
        *out = s;
    return r;
}

int sc_slot_resume(sc_slot *s, const sc_saved_slot *v)
{
    sc_core *c = s->core;
    int fd = s->phase == SC_BOUND ? sc_pidfd_open(s->pid) : -1, r = 0;
    sc_lock(c);
    if (v->ledger_fd >= 0) {
        if ((s->ledger = sc_ledger_adopt(v->ledger_fd, v->ledger_at)) == NULL)
            close(v->ledger_fd);
    }
    if (v->oom_fd >= 0 && (r = sc_oom_adopt(s, v->oom_fd, v->oom_v2, v->oom_seen)) < 0)
        close(v->oom_fd);
    if (s->phase == SC_BOUND && fd == -ESRCH) { /* somebody has waited for it since */
        sc_exit_status st = {.pid = s->pid, .status = 255};
        c->stats.stolen++;
        sc_slot_exited(s, &st, sc_now_mono(), sc_now_real());
    } else if (s->phase == SC_BOUND) {
        sc_child_add(c, &s->child, s->pid, fd < 0 ? -1 : fd);
    } else if (v->bound_at) {
        sc_timer_set(c, &s->bound, v->bound_at);
    }
    if (v->killing)
        sc_slot_kill_rest(s);
    sc_tell_if_due(s);
    sc_unlock(c);
    sc_core_wake(c);
    return r;
}
