/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The layout: where targets map which part of which region. One thread writes (the one that reads
 * the userfaultfd's events), any thread reads; a reader never waits for a lock and sees either the
 * table before a change or after it (a sequence counter; every field is an atomic of its own).
 * Between the look and the use of what was seen, lib/gate.h keeps it true.
 *
 * It is what is known, not all there is. What it says must be true, for a page is given to whoever
 * maps it by what stands here; what it does not say is found out when it is touched. So:
 * - UNMAP events only take out. In whatever order several of them are read, the outcome is the
 *   same. That order is the one in which threads came to queue their events, after they let go of
 *   the lock under which they made their changes: not the order of the changes.
 * - A mapping comes in only by looking at the process (mf_layout_learn, lib/events.c), after it was
 *   registered: whatever changes it after the look sends an event that is read after the look.
 * - Where there is no room, something is left out (`dropped`): whoever waits there has to be woken,
 *   faults again, and it is learned again.
 *
 * A page is (region, index), never an address: addresses come from here at the last moment.
 */
#pragma once

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "lib/target.h"

/** Instead of a region's index: private memory that the target has moved away from here, while the
 * place stays mapped, or by which a mapping grew. It reads as zeros and belongs to no region. */
#define MF_REGION_ZEROS UINT32_MAX

struct mf_layout_entry {
    _Atomic uint64_t start_addr, length_bytes, offset_bytes,
        region_context; /**< region << 32 | context */
};

/** How many mappings are known at most. */
#define MF_LAYOUT_MAX 4096u

struct mf_layout {
    _Atomic uint32_t sequence; /**< odd while a change is under way */
    _Atomic uint32_t count;
    uint32_t hand; /**< what goes next when there is no room */
    /** Regions, a bit each, whose mappings can't be learned again: private memory. Those of others
     * go first. Set by the owner, before anything is mapped. */
    uint64_t keep;
    /** How many pieces of private memory are mapped at a place of which only an event to come tells
     * (lib/limbo.h). As long as there are any, where a page is mapped can't be said. */
    _Atomic uint32_t owed;
    bool unsettled;  /**< counted in `owed`: nothing is known yet (mf_layout_unsettle) */
    bool overflowed; /**< something was left out, and what is not here may be mapped all the same */
    bool lost;       /**< that was something which can't be learned again */
    struct mf_layout_entry entry[MF_LAYOUT_MAX];
};

/** struct mf_range - a piece of a target's address space. */
struct mf_range {
    uint64_t start_addr, length_bytes;
    uint64_t offset_bytes; /**< in the region */
    uint32_t context;
};

/** mf_layout_set() - replace everything (before readers exist). */
void mf_layout_set(struct mf_layout *layout, const struct mf_mapping *mappings, unsigned count);

/** mf_layout_find() - which mapping covers an address. Any thread. */
bool mf_layout_find(const struct mf_layout *layout, uint32_t context, uint64_t addr,
                    struct mf_mapping *out);

/** mf_layout_from() - the mapping that covers an address, or else the first behind it. Any thread.
 */
bool mf_layout_from(const struct mf_layout *layout, uint32_t context, uint64_t addr,
                    struct mf_mapping *out);

/**
 * mf_layout_ranges() - where [@offset_bytes, +@length_bytes) of a region is mapped, any thread.
 * @out: at most @max ranges, in no order.
 * Return: how many there are (more than @max: only @max were written).
 */
unsigned mf_layout_ranges(const struct mf_layout *layout, uint32_t region, uint64_t offset_bytes,
                          uint64_t length_bytes, struct mf_range *out, unsigned max);

/**
 * mf_layout_next() - the same, one by one: for whoever must leave none out, however many there are.
 * Any thread, inside the gate (or the writer): the table must not change between two calls.
 * @cursor: 0 at first. Return: false when there is no further one.
 */
bool mf_layout_next(const struct mf_layout *layout, uint32_t region, uint64_t offset_bytes,
                    uint64_t length_bytes, uint32_t *cursor, struct mf_range *out);

/** mf_layout_get() - copy all mappings out, any thread. Return: how many. */
unsigned mf_layout_get(const struct mf_layout *layout, struct mf_mapping *out, unsigned max);

/** mf_layout_unsettle() - where private memory is mapped is still being found out: until
 * mf_layout_settle() nothing is copied there, and no zeros are given. Writer only. */
static inline void mf_layout_unsettle(struct mf_layout *layout)
{
    layout->unsettled = true;
    atomic_fetch_add(&layout->owed, 1);
}
static inline void mf_layout_settle(struct mf_layout *layout)
{
    if (layout->unsettled)
        atomic_fetch_sub(&layout->owed, 1);
    layout->unsettled = false;
}

/** mf_layout_keeps() - can @mapping not be learned again? */
static inline bool mf_layout_keeps(const struct mf_layout *layout, const struct mf_mapping *mapping)
{
    return mapping->region == MF_REGION_ZEROS ||
           (mapping->region < 64 && (layout->keep >> mapping->region & 1));
}

/** mf_layout_lose() - something that can't be learned again is not known any more. Writer only. */
static inline void mf_layout_lose(struct mf_layout *layout)
{
    layout->overflowed = layout->lost = true;
}

/** mf_layout_count() - how many mappings are known. Any thread. */
static inline uint32_t mf_layout_count(const struct mf_layout *layout)
{
    return atomic_load_explicit(&layout->count, memory_order_relaxed);
}

/** mf_layout_covers() - is all of [@start_addr, @end_addr) known to be mapped? Any thread. */
bool mf_layout_covers(const struct mf_layout *layout, uint32_t context, uint64_t start_addr,
                      uint64_t end_addr);

/** mf_layout_unmap() - an address range is gone; mappings are cut or dropped. Writer only.
 * @dropped: room for one. Return: how many ranges (0 or 1) went beyond those, for lack of room. */
unsigned mf_layout_unmap(struct mf_layout *layout, uint32_t context, uint64_t start_addr,
                         uint64_t end_addr, struct mf_range *dropped);

/**
 * mf_layout_learn() - this is what is mapped there, whatever was thought before. Neighbours that
 * continue it become one with it. Writer only.
 * @dropped: room for two. Return: how many ranges (0 to 2) were left out for lack of room.
 */
unsigned mf_layout_learn(struct mf_layout *layout, const struct mf_mapping *mapping,
                         struct mf_range *dropped);

/** mf_layout_forget() - a context is gone. Writer only. */
void mf_layout_forget(struct mf_layout *layout, uint32_t context);
