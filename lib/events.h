/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What a userfaultfd says: messages read, events applied to the layout, faults handed on.
 *
 * Rules (I4): read until EAGAIN (or, with `at_once`, until faults were read and no event is
 * unread); apply events before serving the faults that were read with them. What there is no room
 * for is made to fault again, so nobody is ever left waiting.
 *
 * One thread reads, and it is the one writer of the layout and the contexts; it closes the gate
 * (lib/gate.h) for as long as it reads. That costs a few dozen nanoseconds a resolving thread, and
 * a wait for those that are inside: at most one ioctl over a quarter of a MiB.
 *
 * What an event means, and how a mapping is learned (lib/layout.h says why so):
 *
 *   UNMAP    takes the range out of the layout. So does the one that follows a REMAP, and the one
 *            before it, if something was mapped at the new place.
 *   REMAP    is a hint: what is mapped at the new place now is learned, so that pages that come
 *            later are mapped there without a fault.
 *   REMOVE   discards pages or does not: see mf_events_ops.removed.
 *   FORK     brings a context. Nothing is known of what it maps: that is learned as it is touched.
 *            The parent's layout would not do: what other threads of the parent changed while it
 *            forked comes in no order, and MADV_DONTFORK is not told.
 *   a fault  at an address that is not in the layout (a mapping that was moved, that has grown in
 *            place, of which no event tells, or that a child inherited): it is learned.
 *
 * To learn an address: look it up in the process's maps (lib/vma.h); register it, which changes
 * nothing if it is registered; look again. If it is the same, it was registered when it was looked
 * at the second time, so that whatever changes it later sends an event, which is read after this.
 * Until that is read the kernel refuses every fill. So what is learned is true whenever it is used.
 *
 * A fault at an address of which nothing can be learned (yet) is parked, tried again after the next
 * event, and after some milliseconds made to fault again.
 *
 * Reading and serving are two calls because serving may read: a fill that meets EAGAIN can go on
 * only when the events are read (mf_resolver.on_event). What was read meanwhile is served
 * afterwards, in order.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "lib/context.h"
#include "lib/gate.h"
#include "lib/layout.h"
#include "lib/limbo.h"
#include "lib/region.h"
#include "lib/uapi.h"

#define MF_FAULTS_ROOM 1024u /**< faults read but not served yet */
#define MF_PARKED_ROOM 256u
#define MF_TAILS_ROOM 64u

/** struct mf_fault - a thread waits. */
struct mf_fault {
    uint64_t addr;
    uint64_t since_ns; /**< when its message was read, mf_now_ns() */
    uint32_t context;
    pid_t tid; /**< of the thread, in its own pid namespace; 0 without UFFD_FEATURE_THREAD_ID */
};

/** struct mf_tail - where private memory that was moved ended; it may be longer by now. */
struct mf_tail {
    uint32_t context;
    uint64_t addr;
};

/** What became of the pages of a REMOVE event's range. */
enum mf_removed {
    MF_REMOVED_NOTHING, /**< MADV_DONTNEED of a file's pages: their contents stay */
    MF_REMOVED_PAGES,   /**< they are gone: they read as zeros, and nothing may come back */
};

/** What a userfaultfd is for. */
enum mf_events_watch {
    MF_EVENTS_FAULTS, /**< a destination: MISSING and MINOR, or MISSING alone of private memory */
    /**
     * A source: write protection without messages (WP_ASYNC); nobody waits for a page. Only the
     * target itself is followed: of its children, contexts without a layout, it is known that they
     * are there. The layout of private memory stays as it was set, for there a page is what lies at
     * its place.
     */
    MF_EVENTS_WRITES,
};

/** struct mf_events_ops - what the owner does. All are called on the reading thread. */
struct mf_events_ops {
    /** fault: somebody waits for @page of @region, which may be MF_REGION_ZEROS (@page says nothing
     * then: give zeros at the address). From mf_events_serve() only. */
    void (*fault)(void *arg, const struct mf_fault *fault, uint32_t region, uint64_t page);
    /** discard: pages whose contents the target discarded (REMOVE). The event is sent before the
     * pages go, and the target goes on once it was read. From mf_events_read(), so it must not
     * resolve (the gate is closed, and it may meet an EAGAIN that only reading ends): who waits is
     * woken and faults again. */
    void (*discard)(void *arg, uint32_t region, uint64_t first, uint64_t pages);

    /** observe: an event of @context waits to be read, and whoever sent it waits in its system
     * call: the last chance to see in which. NULL: nobody wants to know. Return: how many events
     * may be read before it must be asked again; 0: nobody is seen to wait (the event is about to
     * be sent, or was read a moment ago), ask again. */
    unsigned (*observe)(void *arg, uint32_t context);
#define MF_EVENTS_BUSY                                                                             \
    UINT32_MAX /**< from `observe`: not yet, for a busy machine lets nobody run */
    /** removed: what a REMOVE event over [@start_addr, @end_addr) does. NULL: it removes. */
    enum mf_removed (*removed)(void *arg, uint32_t context, uint64_t start_addr, uint64_t end_addr);
    /** moved: how much a REMAP event's call has moved, which may be less than it says. NULL: as
     * much as it says. */
    uint64_t (*moved)(void *arg, uint32_t context, const struct uffd_msg *message);
    /** changed: @message, an event, has taken effect. @child: the context that a fork brought, else
     * UINT32_MAX. From mf_events_read(), as discard. May be NULL. */
    void (*changed)(void *arg, uint32_t context, const struct uffd_msg *message, uint32_t child);
    /** unmapped: the layout is about to lose the range. From mf_events_read(), as discard. May be
     * NULL. */
    void (*unmapped)(void *arg, uint32_t context, uint64_t start_addr, uint64_t end_addr);
    /** forked: @context is new. May be NULL. */
    void (*forked)(void *arg, uint32_t parent, uint32_t context);
    /** maps: open the maps of @context, in which thread @tid waits at @addr. Return: a descriptor,
     * which this takes over, or -errno. May be NULL. */
    int (*maps)(void *arg, uint32_t context, pid_t tid, uint64_t addr);
};

/** struct mf_events - zeroed, then the first group set by its owner. */
struct mf_events {
    const struct mf_events_ops *ops;
    void *arg;
    struct mf_layout *layout;
    struct mf_contexts *contexts;
    struct mf_gate *gate;           /**< NULL: nobody else resolves */
    const struct mf_region *region; /**< all regions, by index */
    unsigned region_count;
    enum mf_events_watch watch;

    /** mf_events_read() does not look for more once it has read faults and no event is unread:
     * those who are served first can go on while others are. Its owner reads again until no fault
     * comes.
     */
    bool at_once;
    /** How many events may still be read before `observe` is asked again. `removed` may set it to
     * 0.
     */
    unsigned observed;
    bool unread; /**< a context's unread_ns is set */
    struct mf_limbo limbo;
    unsigned tail_count;
    struct mf_tail tail[MF_TAILS_ROOM];
    bool serving;
    unsigned fault_count, parked_count;
    struct mf_fault fault[MF_FAULTS_ROOM];
    struct mf_fault parked[MF_PARKED_ROOM];
};

/**
 * mf_events_read() - read all that a context's userfaultfd has to say (but see `at_once`): events
 * take effect now, faults are queued for mf_events_serve().
 * Return: 1 if there was an event, 0 if there was none, -EMFILE or -ENFILE when a fork has to wait
 * because no descriptor is free for it (everything else of that userfaultfd waits as well: give
 * some back and read again), -ENOMEM likewise, or another -errno of read(2).
 */
int mf_events_read(struct mf_events *events, uint32_t context);

/** mf_events_serve() - hand the queued faults on; with @event, those that were parked first. Does
 * nothing if it is already under way. */
void mf_events_serve(struct mf_events *events, bool event);

/** mf_events_parked() - are faults waiting for an event that explains them, messages to be read
 * because who sends an event is not to be seen yet, or pieces of memory in limbo, or to be looked
 * at? Then call
 * mf_events_give_up_parked() within some milliseconds. */
static inline bool mf_events_parked(const struct mf_events *events)
{
    return events->parked_count > 0 || events->unread || events->limbo.count > 0 ||
           events->tail_count > 0;
}

/** mf_events_give_up_parked() - try the parked ones once more, and let those that still nothing
 * explains fault again; read what could not be read before. */
void mf_events_give_up_parked(struct mf_events *events);

/** mf_events_learn() - what is mapped in [@start_addr, @end_addr) of @context, as far as it is of a
 * region. Needs its maps_fd. Not from within mf_events_ops. Return: 0, or -errno: what was learned
 * until then is known. */
int mf_events_learn(struct mf_events *events, uint32_t context, uint64_t start_addr,
                    uint64_t end_addr);

/** mf_events_region() - which region @vma maps, if any. Return: its index or -1. */
int mf_events_region(const struct mf_events *events, const struct mf_vma *vma);

/** mf_events_forget_faults() - nobody waits in this range any more: it was unregistered. Faults
 * that were read and not served would make it be watched again. */
void mf_events_forget_faults(struct mf_events *events, uint32_t context, uint64_t start_addr,
                             uint64_t end_addr);

/** mf_events_drop() - a context is at its end: forget and close it, and everything about it. Not
 * while anything else waits on its userfaultfd. */
void mf_events_drop(struct mf_events *events, uint32_t context);
