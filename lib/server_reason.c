/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Why the layout changes. An event is read only after it was looked who waits in which system call
 * (lib/observe.h), and that is matched with what the event tells (lib/change.h).
 *
 * It matters where a region has a file: MADV_DONTNEED leaves its pages alone, MADV_REMOVE frees
 * them, and the event is the same. What can't be told counts as the one that forbids more: then no
 * byte that was discarded comes back.
 */
#include "lib/server.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "lib/uffd.h"
#include "lib/util.h"

/* ---- children ---- */

static bool forks(const struct mf_blocked *blocked)
{
    const struct uffd_msg message = {.event = UFFD_EVENT_FORK};
    struct mf_blocked copy = *blocked;
    struct mf_change change;
    return mf_change_from_event(&message, &copy, 1, &change) == 1;
}

/* The children of a thread as the kernel lists them: proc_tid_children(5). Into a buffer, for
 * nothing may be allocated here: fork(3) holds the allocator's locks until its event is read.
 * Return: false if they are too many, or not to be had. */
static bool list_children(int proc_fd, pid_t tid, char *list, size_t size)
{
    char path[48];
    snprintf(path, sizeof(path), "task/%d/children", tid);
    cleanup_close int fd = openat(proc_fd, path, O_RDONLY | O_CLOEXEC);
    ssize_t length = fd < 0 ? -1 : read(fd, list, size - 1);
    if (length < 0)
        return false;
    list[length] = '\0';
    return (size_t)length < size - 1;
}

/* Which children those have that are in a fork now: the new one is known by that. */
static void note_forkers(struct server_reasons *r, int proc_fd)
{
    r->forker_count = 0;
    for (size_t i = 0; i < r->blocked_count && r->forker_count < SERVER_FORKERS; i++) {
        struct server_forker *forker = &r->forker[r->forker_count];
        forker->tid = r->blocked[i].tid;
        r->forker_count +=
            forks(&r->blocked[i]) &&
            list_children(proc_fd, forker->tid, forker->before, sizeof(forker->before));
    }
}

static bool listed(const char *list, long pid)
{
    char *end;
    for (long one; (one = strtol(list, &end, 10)) > 0; list = end)
        if (one == pid)
            return true;
    return false;
}

static pid_t new_child(int proc_fd, const struct server_forker *forker)
{
    char now[SERVER_CHILDREN_BYTES];
    if (!list_children(proc_fd, forker->tid, now, sizeof(now)))
        return 0;
    const char *at = now;
    char *end;
    for (long pid; (pid = strtol(at, &end, 10)) > 0; at = end)
        if (!listed(forker->before, pid))
            return (pid_t)pid;
    return 0;
}

/* Is a further userfaultfd of the same process still to be told? Then its child is not there yet.
 */
static bool more_to_tell(const struct memferry_server *s, uint32_t context, pid_t parent)
{
    for (uint32_t i = 0; i < s->contexts.count; i++) {
        const struct mf_context *other = mf_context_at(&s->contexts, i);
        if (i != context && other && other->pid == parent && mf_uffd_event_pending(other->uffd) > 0)
            return true;
    }
    return false;
}

/* The child of thread @tid appears a moment after its last event was read. */
static pid_t find_child(const struct server_reasons *r, int proc_fd, pid_t tid)
{
    const struct server_forker *forker = NULL;
    for (size_t i = 0; i < r->forker_count; i++)
        if (r->forker[i].tid == tid)
            forker = &r->forker[i];
    for (unsigned tries = 0; forker && tries < 100; tries++) {
        pid_t child = new_child(proc_fd, forker);
        if (child)
            return child;
        nanosleep(&(struct timespec){.tv_nsec = 20000}, NULL);
    }
    return 0;
}

static void place_child(struct mf_context *context, pid_t pid)
{
    char path[32];
    context->pid = pid;
    snprintf(path, sizeof(path), "/proc/%d/maps", pid);
    if (context->maps_fd < 0)
        context->maps_fd = open(path, O_RDONLY | O_CLOEXEC);
}

void server_forget_twin(struct memferry_server *s, uint32_t context)
{
    struct server_reasons *r = &s->reasons;
    size_t kept = 0;
    for (size_t i = 0; i < r->twin_count; i++)
        if (r->twin[i].context != context)
            r->twin[kept++] = r->twin[i];
    r->twin_count = kept;
}

/* Whose process number a child's context has: with it what the child maps can be looked up before
 * it has touched anything. */
static void know_child(struct memferry_server *s, uint32_t context, uint32_t child, pid_t tid)
{
    struct server_reasons *r = &s->reasons;
    struct mf_context *of_child = mf_context_at(&s->contexts, child);
    const struct mf_context *of_parent = mf_context_at(&s->contexts, context);
    const pid_t parent = of_parent ? of_parent->pid : 0;
    /* Those of an earlier fork whose child was not found never will be. */
    size_t kept = 0;
    for (size_t i = 0; i < r->twin_count; i++)
        if (r->twin[i].parent != parent || (tid && r->twin[i].tid != tid) ||
            (tid && r->twin[i].parent_context != context))
            r->twin[kept++] = r->twin[i];
    r->twin_count = kept;
    if (!parent || !tid) /* it might be another one's child */
        return;
    pid_t pid = 0;
    if (!more_to_tell(s, context, parent)) {
        cleanup_close int proc_fd = mf_observe_open(parent, NULL);
        pid = proc_fd < 0 ? 0 : find_child(r, proc_fd, tid);
    }
    if (!pid) {
        if (r->twin_count == SERVER_TWINS)
            memmove(r->twin, r->twin + 1, --r->twin_count * sizeof(r->twin[0]));
        r->twin[r->twin_count++] = (struct server_twin){child, context, parent, tid};
        return;
    }
    server_forget_twin(s, child);
    place_child(of_child, pid);
    /* Whoever forks does so for one child after another. */
    kept = 0;
    for (size_t i = 0; i < r->twin_count; i++) {
        struct mf_context *twin = mf_context_at(&s->contexts, r->twin[i].context);
        if (r->twin[i].parent != parent || r->twin[i].tid != tid)
            r->twin[kept++] = r->twin[i];
        else if (twin && twin->child && !twin->pid)
            place_child(twin, pid);
    }
    r->twin_count = kept;
}

/* ---- who waits ---- */

/* One who is seen waiting still, but whose event was read, is not who sent the next. */
static void carry_over(const struct mf_blocked *before, size_t before_count,
                       struct mf_blocked *blocked, size_t count)
{
    for (size_t i = 0; i < count; i++)
        for (size_t k = 0; k < before_count; k++)
            if (before[k].taken && before[k].tid == blocked[i].tid &&
                before[k].switches == blocked[i].switches &&
                before[k].number == blocked[i].number &&
                memcmp(before[k].args, blocked[i].args, sizeof(blocked[i].args)) == 0)
                blocked[i].taken = true;
}

static int open_process(const struct memferry_server *s, uint32_t context)
{
    const struct mf_context *of = mf_context_at(&s->contexts, context);
    return of && of->pid ? mf_observe_open(of->pid, NULL) : -ESRCH;
}

unsigned server_observe(void *argument, uint32_t context)
{
    struct memferry_server *s = argument;
    struct server_reasons *r = &s->reasons;
    struct mf_blocked before[SERVER_BLOCKED];
    const size_t before_count = r->context == context ? r->blocked_count : 0;
    struct mf_observation seen = {0};
    memcpy(before, r->blocked, before_count * sizeof(before[0]));
    r->blocked_count = 0;
    r->context = context;
    cleanup_close int proc_fd = open_process(s, context);
    if (proc_fd < 0 || mf_observe(proc_fd, mf_context_at(&s->contexts, context)->woken, r->blocked,
                                  SERVER_BLOCKED, &seen) < 0)
        return 1;
    if (seen.unsettled)
        return MF_EVENTS_BUSY;
    r->blocked_count = seen.count;
    carry_over(before, before_count, r->blocked, seen.count);
    if (s->options.flags & MEMFERRY_FOLLOW_FORKS)
        note_forkers(r, proc_fd);
    return (unsigned)seen.readable; /* 0: who sends it can't be seen yet */
}

/* ---- what it was ---- */

static struct mf_change judge(struct memferry_server *s, uint32_t context,
                              const struct uffd_msg *message)
{
    struct server_reasons *r = &s->reasons;
    struct mf_change change;
    const size_t count = r->context == context ? r->blocked_count : 0;
    size_t candidates = mf_change_from_event(message, r->blocked, count, &change);
    if (candidates < 2)
        return change;
    cleanup_close int proc_fd = open_process(s, context);
    if (proc_fd < 0 || !mf_observe_settle(proc_fd, r->blocked, count, &change))
        s->events.observed = 0;
    return change;
}

enum mf_removed server_removed(void *argument, uint32_t context, uint64_t start_addr,
                               uint64_t end_addr)
{
    struct memferry_server *s = argument;
    const struct uffd_msg message = {.event = UFFD_EVENT_REMOVE,
                                     .arg.remove = {.start = start_addr, .end = end_addr}};
    s->reasons.removed = judge(s, context, &message);
    return s->reasons.removed.reason == MF_REASON_DONTNEED ? MF_REMOVED_NOTHING : MF_REMOVED_PAGES;
}

static uint32_t public_reason(enum mf_reason reason)
{
    switch (reason) {
    case MF_REASON_MUNMAP:
        return MEMFERRY_BY_MUNMAP;
    case MF_REASON_MREMAP:
        return MEMFERRY_BY_MREMAP;
    case MF_REASON_MMAP_OVER:
        return MEMFERRY_BY_MMAP_OVER;
    case MF_REASON_DONTNEED:
        return MEMFERRY_BY_DONTNEED;
    case MF_REASON_REMOVE:
        return MEMFERRY_BY_REMOVE;
    case MF_REASON_FORK:
        return MEMFERRY_BY_FORK;
    case MF_REASON_UNKNOWN:
    case MF_REASON_TRUNCATE:
    case MF_REASON_PUNCH:
    case MF_REASON_EXIT:
    case MF_REASON_EXEC:
        break;
    }
    return MEMFERRY_UNKNOWN;
}

static uint32_t public_kind(enum mf_change_kind kind)
{
    return kind == MF_CHANGE_UNMAP    ? MEMFERRY_UNMAP
           : kind == MF_CHANGE_REMAP  ? MEMFERRY_REMAP
           : kind == MF_CHANGE_REMOVE ? MEMFERRY_REMOVE
                                      : MEMFERRY_FORK;
}

static void tell(struct memferry_server *s, const struct memferry_change *change)
{
    s->applying = true;
    s->options.on_change(s->options.arg, change);
    s->applying = false;
}

void server_changed(void *argument, uint32_t context, const struct uffd_msg *message,
                    uint32_t child)
{
    struct memferry_server *s = argument;
    struct mf_change change = message->event == UFFD_EVENT_REMOVE && s->events.ops->removed
                                  ? s->reasons.removed
                                  : judge(s, context, message);
    atomic_fetch_add_explicit(&s->events_seen, 1, memory_order_relaxed);
    struct mf_context *of_child = mf_context_at(&s->contexts, child);
    if (of_child && !of_child->pid)
        know_child(s, context, child, change.tid);
    if (!s->options.on_change)
        return;
    const struct memferry_change told = {.struct_bytes = sizeof(told),
                                         .kind = public_kind(change.kind),
                                         .reason = public_reason(change.reason),
                                         .context = context,
                                         .new_context = of_child ? child : 0,
                                         .start_addr = change.start_addr,
                                         .end_addr = change.end_addr,
                                         .to_addr = change.to_addr,
                                         .time_ns = mf_now_ns(),
                                         .tid = change.tid,
                                         .child_pid = of_child ? of_child->pid : 0};
    tell(s, &told);
}

void server_exited(struct memferry_server *s, uint32_t context)
{
    const struct mf_context *of = mf_context_at(&s->contexts, context);
    const struct memferry_change told = {.struct_bytes = sizeof(told),
                                         .kind = MEMFERRY_EXIT,
                                         .context = context,
                                         .time_ns = mf_now_ns(),
                                         .child_pid = of->child ? of->pid : 0};
    atomic_fetch_add_explicit(&s->events_seen, 1, memory_order_relaxed);
    if (s->options.on_change)
        tell(s, &told);
}
