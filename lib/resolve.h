/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Resolving: letting the target have a page, by the ioctl that its memory takes, and what the
 * kernel's answers to that mean (doc/kernel.md has them as a table).
 *
 * Whoever calls has stored the page's state first (I1). A page may be mapped at several addresses,
 * in several processes, or at none any more. The look at the layout and the ioctl that relies on it
 * are made inside the gate (lib/gate.h), which keeps the one true for the other: while an event is
 * unread the ioctl fails with EAGAIN, and then the layout is looked at again. Contexts that are
 * held (lib/context.h) are left out.
 *
 * Any number of threads may resolve at a time, each with a lane of its own. Nothing here allocates.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "lib/context.h"
#include "lib/gate.h"
#include "lib/layout.h"
#include "lib/region.h"

/** struct mf_resolver - what a thread resolves with. Everything pointed at outlives it. */
struct mf_resolver {
    const struct mf_region *region; /**< all regions, by index */
    const struct mf_layout *layout;
    const struct mf_contexts *contexts;
    struct mf_gate_lane *lane; /**< this thread's; NULL: it is the one that reads events */
    /** on_event: called outside the gate whenever an ioctl on @context met EAGAIN, before it is
     * tried again. The thread that reads the userfaultfds reads that one's events in it, for nobody
     * else can end that EAGAIN; any other thread does nothing in it and so waits for that one. */
    void (*on_event)(void *arg, uint32_t context);
    void *arg;
};

/**
 * mf_resolve_run() - let the target have pages whose states say so and which are in the page cache.
 * One ioctl for each mapping of the run as long as the kernel takes it whole. Pages that are mapped
 * already, that were punched or that have moved are made to fault again, so nobody is left waiting.
 * Blocks only while an event is unread.
 * @first, @pages: within the region.
 */
void mf_resolve_run(const struct mf_resolver *resolver, uint32_t region, uint64_t first,
                    uint64_t pages);

/** mf_resolve_page() - the same for one page that may also be a hole: it is given as zeros. A page
 * of private memory always is: bytes are copied by who lands them (lib/land.h). */
void mf_resolve_page(const struct mf_resolver *resolver, uint32_t region, uint64_t page);

/** mf_resolve_reads_as_zeros() - is @addr, in @mapping, private memory that reads as zeros whatever
 * the state of a page: it belongs to no region any more, or was discarded there alone? Inside the
 * gate, or on the thread that reads events. */
bool mf_resolve_reads_as_zeros(const struct mf_region *regions, const struct mf_contexts *contexts,
                               const struct mf_mapping *mapping, uint64_t addr);

/** mf_resolve_zeros() - give zeros at such an address. */
void mf_resolve_zeros(const struct mf_resolver *resolver, uint32_t context, uint64_t addr);

/** mf_resolve_place_fn - do something by @uffd (-1: nothing is to be done) where a page is mapped.
 * Inside the gate. Return: 0, -EAGAIN: an event is unread; or -errno. */
typedef int mf_resolve_place_fn(int uffd, const struct mf_range *place);

/** mf_resolve_each_place() - call @fill for each place where a page is mapped; for all of them anew
 * after -EAGAIN, and with @wait_for_room after -ENOMEM. Return: 0, or what else @fill returned,
 * which ends it. */
int mf_resolve_each_place(const struct mf_resolver *resolver, uint32_t region, uint64_t page,
                          mf_resolve_place_fn *fill, bool wait_for_room);

/** mf_resolve_wait() - an ioctl on @context met EAGAIN without progress, for the @attempt-th time
 * in a row. Outside the gate. */
void mf_resolve_wait(const struct mf_resolver *resolver, uint32_t context, unsigned attempt);

/** mf_resolve_wake() - make everybody who waits for a page fault again. */
void mf_resolve_wake(const struct mf_resolver *resolver, uint32_t region, uint64_t page);
