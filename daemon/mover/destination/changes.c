/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What is to be found out when the target changes its layout, by asking the companion: which
 * process was forked, what it maps, which call emptied memory. On the fault thread.
 */
#include "daemon/mover/destination/destination.h"

#include <errno.h>
#include <inttypes.h>

#include "lib/log.h"

#define UNKNOWN_SAID 16u /**< so many are logged one by one */

static pid_t process_of(const struct mover *mover, uint32_t context)
{
    const struct mf_context *of = mf_context_at(&mover->contexts, context);
    /* A child of which nobody knows yet which process it is: any that is not known. */
    return of->child && !of->pid ? -1 : of->pid;
}

void changes_learn(struct mover *mover, struct mf_events *events)
{
    static struct mf_mapping mappings[MF_LAYOUT_MAX]; /* once, on one thread */
    const unsigned count = mf_layout_get(&mover->layout, mappings, MF_LAYOUT_MAX);
    for (unsigned i = 0; i < count; i++) {
        const struct mf_mapping *m = &mappings[i];
        const struct mf_context *context = mf_context_at(&mover->contexts, m->context);
        struct mf_range dropped[1];
        if (context->maps_fd < 0 || m->region == MF_REGION_ZEROS ||
            mover->region[m->region].kind == MF_MEMORY_PRIVATE)
            continue;
        mf_layout_unmap(&mover->layout, m->context, m->start_addr, m->start_addr + m->length_bytes,
                        dropped);
        mf_events_learn(events, m->context, m->start_addr, m->start_addr + m->length_bytes);
    }
}

void changes_forked(struct mover *mover, struct mf_events *events, uint32_t parent,
                    uint32_t context)
{
    struct mf_context *child = mf_context_at(&mover->contexts, context);
    const struct uffd_msg message = {.event = UFFD_EVENT_FORK};
    struct mf_change change = {0};
    atomic_fetch_add(mover->companion.children, 1);
    if (mover->dontneed_discards)
        return; /* nobody was observed; its first fault will tell */
    if (!companion_reason(&mover->companion, process_of(mover, parent), &message, true, &change))
        events->observed = 0;
    pid_t pid = 0;
    const int maps_fd = change.tid ? companion_child(&mover->companion, change.tid, &pid) : -1;
    if (maps_fd < 0)
        return; /* likewise; or it has ended, or become another program already */
    child->maps_fd = maps_fd;
    child->pid = pid;
}

int changes_maps(struct mover *mover, uint32_t context, pid_t tid, uint64_t addr)
{
    pid_t pid = 0;
    int r = companion_maps(&mover->companion, tid, addr, &pid);
    if (r >= 0)
        mf_context_at(&mover->contexts, context)->pid = pid;
    return r;
}

unsigned changes_observe(struct mover *mover, uint32_t context)
{
    int r = companion_observe(&mover->companion, process_of(mover, context),
                              mf_context_at(&mover->contexts, context)->woken);
    if (r == -EBUSY || r == -ETIMEDOUT)
        return MF_EVENTS_BUSY;
    return r >= 0 ? (unsigned)r : 1;
}

uint64_t changes_moved_bytes(const struct mover *mover, const struct uffd_msg *message)
{
    return mf_change_moved_bytes(message, mover->companion.blocked, mover->companion.blocked_count);
}

/* Which pages these are can't be told before the process's maps are there. */
static void know_sender(struct mover *mover, uint32_t context, pid_t tid, uint64_t addr)
{
    struct mf_context *of = mf_context_at(&mover->contexts, context);
    pid_t pid = 0;
    const int maps_fd =
        of->maps_fd < 0 && tid ? companion_sender(&mover->companion, tid, addr, &pid) : -1;
    if (maps_fd < 0)
        return;
    of->maps_fd = maps_fd;
    of->pid = pid;
}

enum mf_removed changes_removed(struct mover *mover, struct mf_events *events, uint32_t context,
                                uint64_t start_addr, uint64_t end_addr)
{
    const struct uffd_msg message = {.event = UFFD_EVENT_REMOVE,
                                     .arg.remove = {.start = start_addr, .end = end_addr}};
    struct mf_change change;
    const bool who = mf_context_at(&mover->contexts, context)->maps_fd < 0;
    if (!companion_reason(&mover->companion, process_of(mover, context), &message, who, &change))
        events->observed = 0;
    if (change.reason == MF_REASON_DONTNEED)
        return MF_REMOVED_NOTHING;
    know_sender(mover, context, change.tid, start_addr);
    if (change.reason != MF_REASON_REMOVE &&
        atomic_fetch_add(&mover->figures->removes_unknown, 1) < UNKNOWN_SAID)
        mf_log(MF_LOG_WARNING,
               "%s: %" PRIu64 " KiB at %#" PRIx64 " were emptied by a call that could not be "
               "seen; what has not arrived of them counts as discarded",
               mover->name, (end_addr - start_addr) >> 10, start_addr);
    return MF_REMOVED_PAGES;
}
