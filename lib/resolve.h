/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Resolving: letting the target have a page, by the ioctl that its memory takes, and what the
 * kernel's answers to that mean (doc/kernel.md has them as a table).
 *
 * Whoever calls has stored the page's state first (I1). A page may be mapped at several addresses,
 * or at none any more; between the look at the layout and the ioctl a mapping may go away, which
 * the kernel answers with ENOENT, and the UNMAP event then takes it out of the layout.
 *
 * Any number of threads may resolve at a time. Nothing here allocates or takes a lock.
 */
#pragma once

#include <stdint.h>

#include "lib/gate.h"
#include "lib/layout.h"
#include "lib/region.h"

/** struct mf_resolver - what a thread resolves with. Everything pointed at outlives it. */
struct mf_resolver {
    const struct mf_region *region; /**< all regions, by index */
    const struct mf_layout *layout;
    const int *context_fd; /**< the userfaultfd of each context of the layout */
    /** on_event: called whenever an ioctl met EAGAIN, before it is tried again. The thread that
     * reads the userfaultfds reads events in it, for nobody else can end that EAGAIN; any other
     * thread does nothing in it and so waits for that one. */
    void (*on_event)(void *arg);
    void *arg;
    struct mf_gate *gate; /**< where there are regions of private memory, else NULL */
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

/** mf_resolve_zeros() - give zeros at an address that belongs to no region any more
 * (MF_REGION_ZEROS). */
void mf_resolve_zeros(const struct mf_resolver *resolver, uint32_t context, uint64_t addr);

/** mf_resolve_wait() - an ioctl met EAGAIN without progress, for the @attempt-th time in a row. */
void mf_resolve_wait(const struct mf_resolver *resolver, unsigned attempt);

/** mf_resolve_wake() - make everybody who waits for a page fault again. */
void mf_resolve_wake(const struct mf_resolver *resolver, uint32_t region, uint64_t page);
