/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib/events.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "lib/log.h"
#include "lib/resolve.h"
#include "lib/uapi.h"
#include "lib/uffd.h"
#include "lib/util.h"
#include "lib/vma.h"

#define MESSAGES_A_READ 64u
#define OBSERVE_TRIES 8u
#define UNREAD_NS 200000000u /**< so long an event may keep others from being read */
/* The same where its sender would be seen if he got to a CPU. */
#define BUSY_NS UINT64_C(10000000000)
/* Looked at twice and different each time: somebody changes it faster than that. */
#define LOOKS_MAX 8u

static int uffd_of(const struct mf_events *events, uint32_t context)
{
    return mf_context_uffd(events->contexts, context);
}

static void let_fault_again(const struct mf_events *events, const struct mf_fault *fault)
{
    mf_uffd_wake(uffd_of(events, fault->context), fault->addr & ~UINT64_C(4095), 4096);
}

/* ---- learning ---- */

/* Whoever waits there is known to nobody any more. */
static void wake_dropped(const struct mf_events *events, const struct mf_range *dropped,
                         unsigned count)
{
    for (unsigned i = 0; i < count; i++)
        mf_uffd_wake(uffd_of(events, dropped[i].context), dropped[i].start_addr,
                     dropped[i].length_bytes);
}

int mf_events_region(const struct mf_events *events, const struct mf_vma *vma)
{
    for (unsigned i = 0; i < events->region_count; i++) {
        const struct mf_region *region = &events->region[i];
        if (vma->shared && region->kind != MF_MEMORY_PRIVATE && vma->inode != 0 &&
            vma->inode == region->inode && vma->device == region->device &&
            vma->offset_bytes < region->size_bytes)
            return (int)i;
    }
    return -1;
}

static bool same(const struct mf_vma *a, const struct mf_vma *b)
{
    return a->start_addr == b->start_addr && a->end_addr == b->end_addr &&
           a->offset_bytes == b->offset_bytes && a->inode == b->inode && a->device == b->device &&
           a->shared == b->shared;
}

/* What was registered may have been none of ours, which must not stay registered. Of the rest of
 * the range nothing is touched: if ours has come to lie there meanwhile it brought its registration
 * along, and its event is unread. Only shared memory can be registered as ours is. */
static void unregister_others(const struct mf_events *events, const struct mf_context *from,
                              uint64_t start, uint64_t end)
{
    struct mf_vma vma;
    for (uint64_t at = start; mf_vma_find(from->maps_fd, at, &vma) == 0 && vma.start_addr < end;
         at = vma.end_addr) {
        const uint64_t first = vma.start_addr > start ? vma.start_addr : start;
        const uint64_t last = vma.end_addr < end ? vma.end_addr : end;
        if (vma.shared && mf_events_region(events, &vma) < 0)
            mf_uffd_unregister(from->uffd, first, last - first);
    }
}

/* The mapping at @addr or the next behind it. Return: 1 with where it ends, 0 if there is none
 * below @end, or -errno. The gate is closed. */
static int learn_one(struct mf_events *events, uint32_t context, uint64_t addr, uint64_t end,
                     uint64_t *next)
{
    const struct mf_context *from = mf_context_at(events->contexts, context);
    struct mf_vma vma, again;
    struct mf_error err;
    if (!from || from->maps_fd < 0)
        return -EBADF;
    int r = mf_vma_find(from->maps_fd, addr, &vma);
    for (unsigned looks = 0; r == 0 && looks < LOOKS_MAX; looks++) {
        if (vma.start_addr >= end)
            return 0;
        *next = vma.end_addr;
        const int region = mf_events_region(events, &vma);
        if (region < 0)
            return 1;
        const uint64_t vma_bytes = vma.end_addr - vma.start_addr;
        if (events->watch == MF_EVENTS_FAULTS) {
            r = mf_uffd_register(from->uffd, vma.start_addr, vma_bytes, &err);
        } else {
            r = mf_uffd_register_wp(from->uffd, vma.start_addr, vma_bytes, &err);
            if (r == -EPERM) /* which nobody ever can write through */
                return 1;
            if (r == -EBUSY)
                return r;
        }
        if (r == -EBUSY) /* of another context of this target, which is asked for itself */
            return 1;
        if (r < 0 && r != -EINVAL)
            return r;
        int looked = mf_vma_find(from->maps_fd, addr, &again);
        if (looked < 0)
            return looked;
        if (r == 0 && same(&vma, &again)) {
            const uint64_t room = events->region[region].size_bytes - vma.offset_bytes;
            struct mf_range dropped[2];
            struct mf_mapping mapping = {.start_addr = vma.start_addr,
                                         .length_bytes = vma_bytes < room ? vma_bytes : room,
                                         .offset_bytes = vma.offset_bytes,
                                         .region = (uint32_t)region,
                                         .context = context};
            wake_dropped(events, dropped, mf_layout_learn(events->layout, &mapping, dropped));
            return 1;
        }
        if (r == 0 && mf_events_region(events, &again) < 0) {
            unregister_others(events, from, vma.start_addr, vma.end_addr);
            looked = mf_vma_find(from->maps_fd, addr, &again);
        }
        vma = again;
        r = looked;
    }
    return r == -ENOENT ? 0 : r < 0 ? r : -EAGAIN;
}

static int learn(struct mf_events *events, uint32_t context, uint64_t start, uint64_t end)
{
    int r = 1;
    for (uint64_t at = start; r > 0 && at < end;) {
        uint64_t next = 0;
        r = learn_one(events, context, at, end, &next);
        at = next;
    }
    return r < 0 ? r : 0;
}

int mf_events_learn(struct mf_events *events, uint32_t context, uint64_t start_addr,
                    uint64_t end_addr)
{
    mf_gate_close(events->gate);
    int r = learn(events, context, start_addr, end_addr);
    mf_gate_open(events->gate);
    return r;
}

static void open_maps(struct mf_events *events, const struct mf_fault *fault)
{
    struct mf_context *context = mf_context_at(events->contexts, fault->context);
    if (!context || context->maps_fd >= 0 || !events->ops->maps)
        return;
    int fd = events->ops->maps(events->arg, fault->context, fault->tid, fault->addr);
    if (fd >= 0)
        context->maps_fd = fd;
    else
        context->maps_tries++;
}

/* ---- faults ---- */

static bool has_private(const struct mf_events *events)
{
    for (unsigned i = 0; i < events->region_count; i++)
        if (events->region[i].kind == MF_MEMORY_PRIVATE)
            return true;
    return false;
}

/*
 * Private memory at @addr that belongs to no region, and yet is watched: it grew out of what is (a
 * mapping that grows inherits that, and no event tells), and is new. What was moved there would be
 * known, for no event is unread. The gate is closed.
 * @mapped_from: so far ahead of it the same mapping must reach.
 */
static bool learn_grown(struct mf_events *events, uint32_t index, uint64_t addr,
                        uint64_t mapped_from)
{
    const struct mf_context *context = mf_context_at(events->contexts, index);
    struct mf_vma vma;
    struct mf_mapping behind;
    struct mf_range dropped[2];
    if (events->layout->lost || events->limbo.count > 0 || !context || context->maps_fd < 0 ||
        context->unknown || events->layout->unsettled ||
        mf_vma_find(context->maps_fd, addr, &vma) < 0 || vma.start_addr > mapped_from ||
        vma.inode != 0 || vma.shared || mf_uffd_event_pending(context->uffd) != 0)
        return false;
    const bool more = mf_layout_from(events->layout, index, addr, &behind);
    const uint64_t end =
        more && behind.start_addr < vma.end_addr ? behind.start_addr : vma.end_addr;
    wake_dropped(events, dropped,
                 mf_layout_learn(events->layout,
                                 &(struct mf_mapping){.start_addr = addr,
                                                      .length_bytes = end - addr,
                                                      .region = MF_REGION_ZEROS,
                                                      .context = index},
                                 dropped));
    return true;
}

/* It faults, so it is watched. */
static bool has_grown(struct mf_events *events, const struct mf_fault *fault)
{
    if (!has_private(events))
        return false;
    const uint64_t addr = fault->addr & ~UINT64_C(4095);
    mf_gate_close(events->gate);
    bool grown = learn_grown(events, fault->context, addr, addr);
    mf_gate_open(events->gate);
    return grown;
}

static void serve(struct mf_events *events, const struct mf_fault *fault)
{
    struct mf_mapping mapping;
    bool found = mf_layout_find(events->layout, fault->context, fault->addr, &mapping);
    if (!found) {
        open_maps(events, fault);
        found = mf_events_learn(events, fault->context, fault->addr, fault->addr + 1) == 0 &&
                mf_layout_find(events->layout, fault->context, fault->addr, &mapping);
    }
    if (!found && has_grown(events, fault))
        found = mf_layout_find(events->layout, fault->context, fault->addr, &mapping);
    if (!found) {
        if (events->parked_count < MF_PARKED_ROOM)
            events->parked[events->parked_count++] = *fault;
        else
            let_fault_again(events, fault);
        return;
    }
    if (mf_resolve_reads_as_zeros(events->region, events->contexts, &mapping, fault->addr)) {
        events->ops->fault(events->arg, fault, MF_REGION_ZEROS, 0);
        return;
    }
    events->ops->fault(events->arg, fault, mapping.region,
                       (fault->addr - mapping.start_addr + mapping.offset_bytes) /
                           events->region[mapping.region].page_bytes);
}

/* ---- events; the gate is closed ---- */

static bool is_private(const struct mf_events *events, const struct mf_mapping *mapping)
{
    return mapping->region == MF_REGION_ZEROS ||
           events->region[mapping->region].kind == MF_MEMORY_PRIVATE;
}

/* Whoever touches it waits for ever from now on: better than to find what it has discarded. */
static void no_room(void)
{
    mf_log(MF_LOG_ERR,
           "a target maps its private memory in more than %u pieces: part of it is not "
           "served any more",
           MF_LAYOUT_MAX);
}

/* Is a part of a private region's pages mapped by anybody beside @except? Then each has or misses
 * pages of its own, and what one discards the other keeps. */
static bool mapped_elsewhere(const struct mf_events *events, const struct mf_mapping *except,
                             uint64_t offset_bytes, uint64_t length_bytes)
{
    struct mf_range range;
    uint32_t cursor = 0;
    if (atomic_load_explicit(&events->layout->owed, memory_order_relaxed))
        return true; /* perhaps */
    while (
        mf_layout_next(events->layout, except->region, offset_bytes, length_bytes, &cursor, &range))
        if (range.context != except->context ||
            range.start_addr - range.offset_bytes != except->start_addr - except->offset_bytes)
            return true;
    return false;
}

/* What one of several discards reads as zeros for it alone. */
static void discard_here(struct mf_events *events, uint32_t context, uint32_t region,
                         uint64_t offset_bytes, uint64_t length_bytes)
{
    const struct mf_region *r = &events->region[region];
    struct mf_context *at = mf_context_at(events->contexts, context);
    struct mf_range range, dropped[1];
    uint32_t cursor = 0;
    if (!at || mf_zeros_set(&at->zeros, region, r->pages, offset_bytes / r->page_bytes,
                            length_bytes / r->page_bytes) == 0)
        return;
    no_room();
    while (mf_layout_next(events->layout, region, offset_bytes, length_bytes, &cursor, &range))
        if (range.context == context) {
            mf_layout_unmap(events->layout, context, range.start_addr,
                            range.start_addr + range.length_bytes, dropped);
            cursor = 0; /* entries have moved */
        }
    mf_layout_lose(events->layout);
}

/* @files: not only of private memory, which has nowhere to keep what it discards. */
static void discard_range(struct mf_events *events, uint32_t context, uint64_t start, uint64_t end,
                          bool files)
{
    /* The event is sent for each mapping by itself, before anything is done to it. */
    int r = files && !mf_layout_covers(events->layout, context, start, end)
                ? learn(events, context, start, end)
                : 0;
    if (r < 0)
        mf_log(MF_LOG_WARNING,
               "which pages lie at %#" PRIx64 ", of which a process has discarded %" PRIu64
               " KiB, can't be told (%s): those that have not arrived still come",
               start, (end - start) >> 10, strerror(-r));
    struct mf_mapping m;
    for (uint64_t at = start; mf_layout_from(events->layout, context, at, &m);) {
        if (m.start_addr > at)
            at = m.start_addr;
        if (at >= end)
            return;
        const uint64_t mapped_end = m.start_addr + m.length_bytes;
        const uint64_t to = end < mapped_end ? end : mapped_end;
        const uint64_t offset_bytes = at - m.start_addr + m.offset_bytes;
        if (m.region == MF_REGION_ZEROS || (!files && !is_private(events, &m))) {
            /* stays as it is */
        } else if (is_private(events, &m) && mapped_elsewhere(events, &m, offset_bytes, to - at)) {
            discard_here(events, context, m.region, offset_bytes, to - at);
        } else {
            const uint64_t page_bytes = events->region[m.region].page_bytes;
            const uint64_t first = offset_bytes / page_bytes;
            const uint64_t last = (to - 1 - m.start_addr + m.offset_bytes) / page_bytes;
            events->ops->discard(events->arg, m.region, first, last + 1 - first);
        }
        at = to;
    }
}

/* What was moved may have grown by that, and if another moves something to where that was, it must
 * be known that something was there (lib/limbo.h). Where it ends now can be seen, but what lies
 * behind it can be told from what it grew by only when no event is unread. */
static void note_tail(struct mf_events *events, uint32_t context, uint64_t addr)
{
    if (events->tail_count == MF_TAILS_ROOM) {
        events->tail_count--;
        memmove(events->tail, events->tail + 1, events->tail_count * sizeof(events->tail[0]));
    }
    events->tail[events->tail_count++] = (struct mf_tail){.context = context, .addr = addr};
}

static void remapped(struct mf_events *events, uint32_t context, const struct uffd_msg *message)
{
    const uint64_t from = message->arg.remap.from, to = message->arg.remap.to;
    const uint64_t length_bytes = events->ops->moved
                                      ? events->ops->moved(events->arg, context, message)
                                      : message->arg.remap.len;
    /* Memory without a file can't be known again at its new place. */
    bool files = true;
    if (has_private(events) && events->watch == MF_EVENTS_FAULTS &&
        mf_limbo_remap(&events->limbo, events->layout, context, from, to, length_bytes, &files) < 0)
        no_room();
    if (has_private(events) && events->watch == MF_EVENTS_FAULTS && length_bytes)
        note_tail(events, context, to + length_bytes);
    if (!files && length_bytes)
        return;
    /* An old length of 0 makes a second mapping of the same. */
    learn(events, context, to, to + (length_bytes ? length_bytes : 1));
}

/* Children that are gone are dropped now and then; but where many are forked, what is known of them
 * must not take the room of what others map. */
static void forget_gone(struct mf_events *events)
{
    struct mf_layout *layout = events->layout;
    if (mf_layout_count(layout) < MF_LAYOUT_MAX / 2)
        return;
    for (uint32_t i = 0; i < events->contexts->count; i++) {
        const struct mf_context *context = mf_context_at(events->contexts, i);
        if (context && context->child && !mf_uffd_alive(context->uffd))
            mf_layout_forget(layout, i);
    }
}

/* Private memory has no file to know it by. The child has what the parent had when it forked. */
static void inherit_private(struct mf_events *events, uint32_t parent, uint32_t child)
{
    uint64_t pages[MF_REGIONS_MAX];
    const struct mf_context *from = mf_context_at(events->contexts, parent);
    struct mf_context *to = mf_context_at(events->contexts, child);
    const bool lost_before = events->layout->lost;
    for (unsigned i = 0; i < events->region_count; i++)
        pages[i] = events->region[i].pages;
    if (from && mf_zeros_copy(from->zeros, pages, &to->zeros) < 0) {
        no_room(); /* it maps nothing that is known, and so waits */
        mf_layout_lose(events->layout);
        return;
    }
    struct mf_mapping m;
    for (uint64_t at = 0; mf_layout_from(events->layout, parent, at, &m);) {
        struct mf_range dropped[2];
        at = m.start_addr + m.length_bytes;
        if (!is_private(events, &m))
            continue;
        m.context = child;
        wake_dropped(events, dropped, mf_layout_learn(events->layout, &m, dropped));
    }
    if (events->layout->lost && !lost_before)
        no_room();
}

/* Return: the new context, UINT32_MAX: none. */
static uint32_t forked(struct mf_events *events, uint32_t context, const struct uffd_msg *message)
{
    const int uffd = (int)message->arg.fork.ufd;
    /* Its flags are those with which its parent's was made, whatever was done to that since; and
     * who reads must not wait. */
    fcntl(uffd, F_SETFL, O_RDONLY | O_NONBLOCK);
    const int index = mf_contexts_add(events->contexts, uffd, -1, true);
    if (index < 0 && events->watch == MF_EVENTS_WRITES) {
        close(uffd); /* it waits for nothing */
        events->ops->forked(events->arg, context, UINT32_MAX);
        return UINT32_MAX;
    }
    if (index < 0) {
        /* Closing it would let the child read zeros, so it stays open, and the child waits. */
        mf_log(MF_LOG_ERR, "no room to follow a process that was forked: it will wait for ever");
        return UINT32_MAX;
    }
    if (has_private(events) && events->watch == MF_EVENTS_FAULTS) {
        forget_gone(events);
        inherit_private(events, context, (uint32_t)index);
    }
    if (events->ops->forked)
        events->ops->forked(events->arg, context, (uint32_t)index);
    return (uint32_t)index;
}

/* All that is mapped in the range, but for private memory. */
static void unmap_files(struct mf_events *events, uint32_t context, uint64_t start, uint64_t end)
{
    struct mf_mapping m;
    struct mf_range dropped[1];
    for (uint64_t at = start;
         mf_layout_from(events->layout, context, at, &m) && m.start_addr < end;) {
        const uint64_t from = m.start_addr > at ? m.start_addr : at;
        at = m.start_addr + m.length_bytes;
        if (!is_private(events, &m))
            mf_layout_unmap(events->layout, context, from, at < end ? at : end, dropped);
    }
}

/* Does a REMOVE take pages out of a file? Of private memory there is nothing to ask: what it
 * discards is gone, by whichever call. */
static bool removes_files(const struct mf_events *events, uint32_t context, uint64_t start,
                          uint64_t end)
{
    struct mf_mapping m;
    uint64_t at = start;
    while (at < end && mf_layout_find(events->layout, context, at, &m) && is_private(events, &m))
        at = m.start_addr + m.length_bytes;
    return at < end && (!events->ops->removed ||
                        events->ops->removed(events->arg, context, start, end) == MF_REMOVED_PAGES);
}

static void apply_event(struct mf_events *events, uint32_t context, const struct uffd_msg *message)
{
    const int uffd = uffd_of(events, context);
    const uint64_t start = message->arg.remove.start, end = message->arg.remove.end;
    struct mf_range dropped[1];
    uint32_t child = UINT32_MAX;
    switch (message->event) {
    case UFFD_EVENT_REMOVE:
        discard_range(events, context, start, end, removes_files(events, context, start, end));
        mf_uffd_wake(uffd, start, end - start);
        break;
    case UFFD_EVENT_UNMAP:
        if (events->ops->unmapped)
            events->ops->unmapped(events->arg, context, start, end);
        if (events->watch == MF_EVENTS_WRITES)
            unmap_files(events, context, start, end);
        else
            wake_dropped(
                events, dropped,
                mf_limbo_unmap(&events->limbo, events->layout, context, start, end, dropped));
        mf_uffd_wake(uffd, start, end - start);
        break;
    case UFFD_EVENT_REMAP:
        remapped(events, context, message);
        break;
    case UFFD_EVENT_FORK:
        child = forked(events, context, message);
        break;
    default:
        mf_log(MF_LOG_WARNING, "a userfaultfd message of unknown kind %#x", message->event);
        return;
    }
    if (events->ops->changed)
        events->ops->changed(events->arg, context, message, child);
}

static void queue_fault(struct mf_events *events, uint32_t context, const struct uffd_msg *message)
{
    const struct mf_fault fault = {.addr = message->arg.pagefault.address,
                                   .since_ns = mf_now_ns(),
                                   .context = context,
                                   .tid = (pid_t)message->arg.pagefault.feat.ptid};
    if (events->fault_count < MF_FAULTS_ROOM)
        events->fault[events->fault_count++] = fault;
    else /* events must be read whatever happens */
        let_fault_again(events, &fault);
}

enum may {
    MAY_READ_NOTHING,
    MAY_READ_FAULTS, /**< no event is pending */
    MAY_READ_ALL,
};

/* So many messages are faults, but for one that may go away (see below). 0: it is not known.
 * Counting takes longer than to ask twice for one, and so is done where they come faster than they
 * are served. */
static size_t count_faults(const struct mf_context *context)
{
    if (!context->more || context->info_fd < 0)
        return 0;
    const size_t faults = mf_uffd_faults_pending(context->info_fd);
    return faults < 2 ? 0 : faults - 1 < MESSAGES_A_READ ? faults - 1 : MESSAGES_A_READ;
}

/*
 * May a message be read now, with @room for how many? If it matters who sent an event, not one is
 * read whose sender was not seen before.
 *
 * If poll(2) says that there is something to read, and after that no event is pending, it is a
 * fault; and read(2) hands out faults before events. So one message can be read, and is that one,
 * if it does not go away. While the gate is closed nobody else fills or wakes. But a thread that
 * faults while its page is being mapped is seen for an instant (handle_userfault() queues, and then
 * looks once more): so all is asked twice; or, where faults were counted, one less is read. What is
 * left is a thread that is killed by a signal just then, with an event at the same time: that one's
 * sender is not seen.
 *
 * If an event is pending: as many events as were seen to wait. None was seen: it is not queued yet,
 * or its thread has not gone on since it was read. Either takes some microseconds. So does what
 * those do who still wait when one message is read: all are woken and sleep again, and whoever is
 * awake just then can't be told from one who does not wait.
 */
static enum may may_read(struct mf_events *events, struct mf_context *context, uint32_t index,
                         bool event, size_t *room)
{
    *room = MESSAGES_A_READ;
    if (!events->ops->observe)
        return MAY_READ_ALL;
    *room = 1;
    bool busy = false;
    for (unsigned tries = 0; tries < OBSERVE_TRIES; tries++) {
        struct pollfd readable = {.fd = context->uffd, .events = POLLIN};
        if (poll(&readable, 1, 0) <= 0) {
            context->more = false;
            return MAY_READ_NOTHING;
        }
        if (events->observed > 0)
            return MAY_READ_ALL;
        const size_t faults = count_faults(context);
        if (mf_uffd_event_pending(context->uffd) <= 0) {
            if (faults > 0) {
                *room = faults;
                return MAY_READ_FAULTS;
            }
            if (poll(&readable, 1, 0) <= 0)
                return MAY_READ_NOTHING;
            if (mf_uffd_event_pending(context->uffd) <= 0)
                return MAY_READ_FAULTS;
        }
        if (event || tries > 0)
            nanosleep(&(struct timespec){.tv_nsec = 20000}, NULL);
        events->observed = events->ops->observe(events->arg, index);
        busy = events->observed == MF_EVENTS_BUSY;
        if (busy) {
            events->observed = 0;
            break;
        }
        if (events->observed > 0)
            return MAY_READ_ALL;
    }
    /* Later: there are others to be served. Not for ever: what is read then is from somebody
     * unknown. */
    const uint64_t now_ns = mf_now_ns();
    if (busy && !context->busy_ns)
        context->busy_ns = now_ns;
    const uint64_t since_ns = busy ? context->busy_ns : context->unread_ns;
    if (since_ns && now_ns - since_ns > (busy ? BUSY_NS : UNREAD_NS))
        return MAY_READ_ALL;
    if (busy || !context->unread_ns)
        context->unread_ns = now_ns;
    events->unread = true;
    return MAY_READ_NOTHING;
}

static void learn_tails(struct mf_events *events, uint32_t context)
{
    unsigned kept = 0;
    for (unsigned i = 0; i < events->tail_count; i++) {
        const struct mf_tail tail = events->tail[i];
        struct mf_mapping m;
        if (tail.context != context)
            events->tail[kept++] = tail;
        else if (mf_layout_find(events->layout, context, tail.addr - 1, &m) &&
                 is_private(events, &m) && !mf_layout_find(events->layout, context, tail.addr, &m))
            learn_grown(events, context, tail.addr, tail.addr - 1);
    }
    events->tail_count = kept;
}

static bool has_tails(const struct mf_events *events, uint32_t context)
{
    for (unsigned i = 0; i < events->tail_count; i++)
        if (events->tail[i].context == context)
            return true;
    return false;
}

/* The gate is closed. */
static int read_all(struct mf_events *events, uint32_t context)
{
    struct uffd_msg messages[MESSAGES_A_READ];
    struct mf_context *from = mf_context_at(events->contexts, context);
    size_t room;
    int event = 0;
    events->observed = 0;
    for (enum may may; (may = may_read(events, from, context, event, &room));) {
        ssize_t n = read(from->uffd, messages, room * sizeof(messages[0]));
        from->unread_ns = from->busy_ns = 0;
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno != EAGAIN)
            return -errno;
        if (n < (ssize_t)sizeof(messages[0]))
            return event;
        /* Faults are handed out before events. */
        if (events->ops->observe &&
            messages[(size_t)n / sizeof(messages[0]) - 1].event != UFFD_EVENT_PAGEFAULT)
            from->woken = poll(&(struct pollfd){.fd = from->uffd, .events = POLLIN}, 1, 0) != 0;
        for (size_t i = 0; i < (size_t)n / sizeof(messages[0]); i++) {
            if (messages[i].event == UFFD_EVENT_PAGEFAULT) {
                queue_fault(events, context, &messages[i]);
                continue;
            }
            events->observed -= events->observed > 0;
            apply_event(events, context, &messages[i]);
            event = 1;
        }
        from->more = may == MAY_READ_FAULTS;
        /* Fewer than there was room for: the kernel stopped at its own EAGAIN. */
        if ((size_t)n < room * sizeof(messages[0]) || (from->more && events->at_once))
            return event;
    }
    return event;
}

/* What displaced a piece found its place free, so the piece had left before, and from then on until
 * that event is read one is pending. If none is, none is to come. */
static void settle(struct mf_events *events, uint32_t context)
{
    if ((!mf_limbo_holds(&events->limbo, context) && !has_tails(events, context)) ||
        mf_uffd_event_pending(uffd_of(events, context)) != 0)
        return;
    mf_limbo_forget(&events->limbo, events->layout, context);
    if (events->limbo.count == 0)
        learn_tails(events, context);
}

int mf_events_read(struct mf_events *events, uint32_t context)
{
    if (!mf_context_at(events->contexts, context))
        return 0;
    mf_gate_close(events->gate);
    int r = read_all(events, context);
    settle(events, context);
    mf_gate_open(events->gate);
    return r;
}

void mf_events_serve(struct mf_events *events, bool event)
{
    if (events->serving)
        return;
    events->serving = true;
    if (event && events->parked_count > 0) {
        struct mf_fault again[MF_PARKED_ROOM];
        unsigned count = events->parked_count;
        memcpy(again, events->parked, count * sizeof(again[0]));
        events->parked_count = 0;
        for (unsigned i = 0; i < count; i++)
            serve(events, &again[i]);
    }
    /* Serving may read more: so a batch is taken out, and then the next. */
    while (events->fault_count > 0) {
        struct mf_fault batch[MF_FAULTS_ROOM];
        unsigned count = events->fault_count;
        memcpy(batch, events->fault, count * sizeof(batch[0]));
        events->fault_count = 0;
        for (unsigned i = 0; i < count; i++)
            serve(events, &batch[i]);
    }
    events->serving = false;
}

static bool read_unread(struct mf_events *events)
{
    bool event = false;
    events->unread = false;
    for (uint32_t i = 0; i < events->contexts->count; i++) {
        const struct mf_context *context = mf_context_at(events->contexts, i);
        /* What fails is met again by whoever waits for the userfaultfd. */
        if (context &&
            (context->unread_ns || mf_limbo_holds(&events->limbo, i) || has_tails(events, i)))
            event |= mf_events_read(events, i) > 0;
    }
    return event;
}

void mf_events_give_up_parked(struct mf_events *events)
{
    if ((events->unread || events->limbo.count > 0 || events->tail_count > 0) &&
        read_unread(events)) {
        mf_events_serve(events, true);
        return; /* they have had another chance just now */
    }
    mf_events_serve(events, true);
    for (unsigned i = 0; i < events->parked_count; i++)
        let_fault_again(events, &events->parked[i]);
    events->parked_count = 0;
}

static unsigned keep_others(struct mf_fault *faults, unsigned count, uint32_t context,
                            uint64_t start_addr, uint64_t end_addr)
{
    unsigned kept = 0;
    for (unsigned i = 0; i < count; i++)
        if (faults[i].context != context || faults[i].addr < start_addr ||
            faults[i].addr >= end_addr)
            faults[kept++] = faults[i];
    return kept;
}

void mf_events_forget_faults(struct mf_events *events, uint32_t context, uint64_t start_addr,
                             uint64_t end_addr)
{
    events->fault_count =
        keep_others(events->fault, events->fault_count, context, start_addr, end_addr);
    events->parked_count =
        keep_others(events->parked, events->parked_count, context, start_addr, end_addr);
}

void mf_events_drop(struct mf_events *events, uint32_t context)
{
    mf_gate_close(events->gate);
    mf_layout_forget(events->layout, context);
    mf_limbo_forget(&events->limbo, events->layout, context);
    mf_contexts_drop(events->contexts, context);
    for (unsigned i = events->tail_count; i-- > 0;)
        if (events->tail[i].context == context)
            events->tail[i] = events->tail[--events->tail_count];
    mf_gate_open(events->gate);
    mf_events_forget_faults(events, context, 0, UINT64_MAX);
}
