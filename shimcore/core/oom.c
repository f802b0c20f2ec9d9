#define _GNU_SOURCE
#include "oom.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "exits.h"
#include "wire.h"

static void tell_oom(sc_core *c, const sc_slot *s)
{
    static const char topic[] = "/tasks/oom", type[] = "containerd.events.TaskOOM";
    size_t n = strlen(s->id);
    uint8_t *body = malloc(n + 12);
    if (!body)
        return;
    size_t len = (size_t)(sc_write_bytes(body, 1, s->id, n) - body);
    sc_event *e = sc_event_new(c, (sc_slice){(const uint8_t *)topic, sizeof topic - 1},
                               (sc_slice){(const uint8_t *)type, sizeof type - 1}, (sc_slice){body, len}, s->id, "");
    free(body);
    if (e) {
        c->stats.ooms++;
        sc_outbox_push(c, e);
    }
}

/* The counter `oom_kill` of a memory.events file; the last value when it can't be read. */
static uint64_t oom_kills(const sc_oom *o)
{
    char text[1024];
    ssize_t n = pread(o->fd, text, sizeof text - 1, 0);
    if (n <= 0)
        return o->seen;
    text[n] = 0;
    const char *at = strncmp(text, "oom_kill ", 9) == 0 ? text : strstr(text, "\noom_kill ");
    return at ? strtoull(strchr(at, ' ') + 1, NULL, 10) : o->seen;
}

void sc_oom_look(sc_core *c, sc_oom *o)
{
    uint64_t n = 0;
    if (!o->init)
        return;
    if (o->v2) {
        n = oom_kills(o);
        bool more = n > o->seen;
        o->seen = n;
        if (more)
            tell_oom(c, o->init);
    } else if (read(o->fd, &n, sizeof n) == (ssize_t)sizeof n && n) {
        /* The kernel also writes when the cgroup is removed; by then init has been told, and nobody looks. */
        tell_oom(c, o->init);
    }
}

static void oom_ready(sc_core *c, sc_source *s, uint32_t ev)
{
    (void)ev;
    sc_oom_look(c, (sc_oom *)s);
}

void sc_oom_free(sc_core *c, sc_oom *o)
{
    epoll_ctl(c->epfd, EPOLL_CTL_DEL, o->fd, NULL);
    close(o->fd);
    free(o);
}

static int arm_v1(const char *folder)
{
    char path[4096], line[64];
    int r = -1, ev = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (ev < 0)
        return -errno;
    snprintf(path, sizeof path, "%s/memory.oom_control", folder);
    int control = open(path, O_RDONLY | O_CLOEXEC);
    snprintf(path, sizeof path, "%s/cgroup.event_control", folder);
    int to = control < 0 ? -1 : open(path, O_WRONLY | O_CLOEXEC);
    if (to >= 0) {
        int n = snprintf(line, sizeof line, "%d %d", ev, control);
        r = write(to, line, (size_t)n) == n ? 0 : -1;
    }
    int err = errno;
    if (to >= 0)
        close(to);
    if (control >= 0)
        close(control);
    if (r < 0) {
        close(ev);
        return -err;
    }
    return ev;
}

int sc_oom_adopt(sc_slot *init, int fd, bool v2, uint64_t seen)
{
    sc_oom *o = calloc(1, sizeof *o);
    if (!o)
        return -ENOMEM;
    *o = (sc_oom){.src.ready = oom_ready, .fd = fd, .v2 = v2, .init = init, .seen = seen};
    int r = sc_watch_fd(init->core, fd, v2 ? EPOLLPRI | EPOLLET : EPOLLIN, &o->src);
    if (r < 0)
        free(o);
    else
        init->oom = o;
    return r;
}

int sc_oom_watch(sc_slot *init, const char *folder, bool v2)
{
    sc_core *c = init->core;
    sc_oom *o = calloc(1, sizeof *o);
    if (!o)
        return -ENOMEM;
    char path[4096];
    snprintf(path, sizeof path, "%s/memory.events", folder);
    o->fd = v2 ? open(path, O_RDONLY | O_CLOEXEC) : arm_v1(folder);
    if (o->fd < 0) {
        int r = v2 ? -errno : o->fd;
        free(o);
        return r;
    }
    o->v2 = v2;
    o->init = init;
    o->src.ready = oom_ready;
    o->seen = v2 ? oom_kills(o) : 0;
    sc_lock(c);
    int r = init->oom || init->oom_over ? -EALREADY : sc_watch_fd(c, o->fd, v2 ? EPOLLPRI | EPOLLET : EPOLLIN, &o->src);
    if (r == 0)
        init->oom = o;
    sc_unlock(c);
    if (r < 0) {
        close(o->fd);
        free(o);
    }
    return r;
}
