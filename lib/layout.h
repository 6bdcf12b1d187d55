/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The layout: where targets map which part of which region. One thread writes (the one that reads
 * the userfaultfd's events), any thread reads; a reader never waits for a lock and sees either the
 * table before a change or after it (a sequence counter; every field is an atomic of its own).
 *
 * A page is (region, index), never an address: addresses come from here at the last moment, and the
 * kernel refuses (-ENOENT) what was unmapped in between.
 */
#pragma once

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "lib/target.h"

/** Instead of a region's index: private memory that the target has discarded or moved away from
 * here, while what it held is still wanted at another place. It reads as zeros and belongs to no
 * region. */
#define MF_REGION_ZEROS UINT32_MAX

struct mf_layout_entry {
    _Atomic uint64_t start_addr, length_bytes, offset_bytes,
        region_context; /**< region << 32 | context */
};

struct mf_layout {
    _Atomic uint32_t sequence; /**< odd while a change is under way */
    _Atomic uint32_t count;
    struct mf_layout_entry entry[MF_MAPPINGS_MAX];
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

/**
 * mf_layout_ranges() - where [@offset_bytes, +@length_bytes) of a region is mapped, any thread.
 * @out: at most @max ranges, in no order.
 * Return: how many there are (more than @max: only @max were written).
 */
unsigned mf_layout_ranges(const struct mf_layout *layout, uint32_t region, uint64_t offset_bytes,
                          uint64_t length_bytes, struct mf_range *out, unsigned max);

/** mf_layout_get() - copy all mappings out, any thread. Return: how many. */
unsigned mf_layout_get(const struct mf_layout *layout, struct mf_mapping *out, unsigned max);

/** mf_layout_unmap() - an address range is gone; mappings are cut or dropped. Writer only.
 *  Return: 0, or -E2BIG when cutting needs more room than there is (nothing was changed). */
int mf_layout_unmap(struct mf_layout *layout, uint32_t context, uint64_t start_addr,
                    uint64_t end_addr);

/**
 * mf_layout_remap() - [@from, +@length_bytes) was moved to @to: the mappings there are added at the
 * new place. The old place goes by the UNMAP that follows; none follows MREMAP_DONTUNMAP. Writer
 * only. Return: 0 or -E2BIG.
 */
int mf_layout_remap(struct mf_layout *layout, uint32_t context, uint64_t from_addr,
                    uint64_t to_addr, uint64_t length_bytes);

/** mf_layout_zeros() - the part of [@start, @end) in which @region is mapped becomes
 * MF_REGION_ZEROS. Writer only. Return: 0 or -E2BIG. */
int mf_layout_zeros(struct mf_layout *layout, uint32_t context, uint32_t region,
                    uint64_t start_addr, uint64_t end_addr);
