/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Moves and unmappings of memory that can't be looked up again (private memory), where events of
 * several threads are read in another order than that of the changes.
 *
 * A thread queues its event after it let go of the lock under which it made the change. In between
 * another thread may have moved something to where there is room now, and its event may be read
 * first. But it tells: what is moved to an address found it free. So whatever was thought to be
 * there has left before, by an event that is still to come. It is put in limbo: out of the layout,
 * remembered by its old address. The next event that moves or unmaps that address means what is in
 * limbo, not what has come there since.
 *
 * Every REMAP is followed by the UNMAP of the old place (not with MREMAP_DONTUNMAP, but then the
 * place is not free). Until then zeros stand there. Between the two its thread has to wake up,
 * which takes as long as it likes, and meanwhile another may come to the old place and even leave
 * it again. So old places are noted, also where nothing was known (what a mapping has grown by, of
 * which no event tells, may be unknown until it is touched). Who comes to one puts in limbo that
 * its UNMAP is to come: the next UNMAP there is that one, a REMAP is not. Unless all that a REMAP
 * moves lies in old places, and a part of it where nobody has come to: then it is of what stayed
 * mapped.
 *
 * Not covered, where who leaves a place is held up between the change and its event for as long as
 * events of others take to be read:
 * - what came to the place moves on, and that event is read as well, before any of who left first;
 * - nothing was known of what left: its mapping had grown in place, and was not touched since.
 *
 * One thread, with the gate closed.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "lib/layout.h"

#define MF_LIMBO_MAX 256u
#define MF_LIMBO_LEFT_MAX 64u

/** struct mf_limbo - zeroed at first; the oldest first. */
struct mf_limbo {
    unsigned count, left_count;
    struct mf_mapping piece[MF_LIMBO_MAX];
    /** Old places of REMAPs, to which nobody has come: their UNMAP is still to come, or they stay
     * mapped (MREMAP_DONTUNMAP). */
    struct mf_range left[MF_LIMBO_LEFT_MAX];
};

/**
 * mf_limbo_remap() - [@from, +@length_bytes) was moved to @to.
 * @files: set if a piece of a file moved along, or nothing was known: look at what is at @to now.
 *         Regions that can be looked up again are those not in layout->keep.
 * Return: 0, or -E2BIG: now something is not known any more (layout->lost is set).
 */
int mf_limbo_remap(struct mf_limbo *limbo, struct mf_layout *layout, uint32_t context,
                   uint64_t from_addr, uint64_t to_addr, uint64_t length_bytes, bool *files);

/** mf_limbo_unmap() - [@start, @end) was unmapped. As mf_layout_unmap(), but for what is in limbo.
 */
unsigned mf_limbo_unmap(struct mf_limbo *limbo, struct mf_layout *layout, uint32_t context,
                        uint64_t start_addr, uint64_t end_addr, struct mf_range *dropped);

/** mf_limbo_holds() - is anything of @context in limbo, or noted? */
bool mf_limbo_holds(const struct mf_limbo *limbo, uint32_t context);

/**
 * mf_limbo_forget() - of this context no event is still to come: what is in limbo is gone. Either
 * the context is, or it never had it (a child that was forked while another thread moved memory, or
 * without what is MADV_DONTFORK), and moves something to where it was thought to be.
 */
void mf_limbo_forget(struct mf_limbo *limbo, struct mf_layout *layout, uint32_t context);

/** mf_limbo_clear() - the same of all contexts. */
void mf_limbo_clear(struct mf_limbo *limbo, struct mf_layout *layout);
