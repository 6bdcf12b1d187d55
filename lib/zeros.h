/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Pages of private memory that one address space has discarded while another (a parent, a forked
 * child) is still owed them: a bit a page, of one context. There the page reads as zeros, whatever
 * its state says, and nothing is ever copied there.
 *
 * A page that nobody else maps is simply DISCARDED (lib/page_state.h) and has no bit.
 *
 * One thread changes them, with the gate closed (lib/gate.h); the others look inside the gate.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "lib/target.h"

/** struct mf_zeros - NULL instead of one says: no page of any region. */
struct mf_zeros {
    uint64_t *bits[MF_REGIONS_MAX]; /**< NULL: no page of the region */
    bool kept;                      /**< the bits are somebody else's (a file): not freed */
};

/** mf_zeros_words() - how many words the bits of so many pages take. */
static inline uint64_t mf_zeros_words(uint64_t pages)
{
    return (pages + 63) / 64;
}

/** mf_zeros_set() - [@first, +@pages) of @region, which has @region_pages; makes *@zeros if need
 * be. Return: 0 or -ENOMEM, and nothing was changed. */
int mf_zeros_set(struct mf_zeros **zeros, uint32_t region, uint64_t region_pages, uint64_t first,
                 uint64_t pages);

/** mf_zeros_any() - is one of [@first, +@pages) among them? */
bool mf_zeros_any(const struct mf_zeros *zeros, uint32_t region, uint64_t first, uint64_t pages);

/** mf_zeros_copy() - for a child. @region_pages: of all regions, by index. Return: 0 with *@out,
 * NULL for NULL, or -ENOMEM. */
int mf_zeros_copy(const struct mf_zeros *zeros, const uint64_t *region_pages,
                  struct mf_zeros **out);

void mf_zeros_free(struct mf_zeros *zeros);
