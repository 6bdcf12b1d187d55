/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Sets of bytes: which parts of a file hold data, which of them have gone since. Pure. Not
 * thread-safe.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct mf_extent {
    uint64_t start_bytes, end_bytes; /**< [start, end) */
};

/** struct mf_extents - a set, as extents in ascending order that neither touch nor overlap. All
 * zeros is the empty set. Owns @list. */
struct mf_extents {
    struct mf_extent *list;
    size_t count, room;
};

void mf_extents_free(struct mf_extents *set);

/** mf_extents_add() - set := set ∪ [@start_bytes, @end_bytes). Return: 0 or -ENOMEM. Adding in
 * ascending order costs nothing extra. */
int mf_extents_add(struct mf_extents *set, uint64_t start_bytes, uint64_t end_bytes);

/** mf_extents_minus() - @out := @a \ @b. @out is overwritten (and freed before), neither @a nor @b.
 *  Return: 0 or -ENOMEM. */
int mf_extents_minus(const struct mf_extents *a, const struct mf_extents *b,
                     struct mf_extents *out);

/** mf_extents_meets() - has the set a byte in [@start_bytes, @end_bytes)? */
bool mf_extents_meets(const struct mf_extents *set, uint64_t start_bytes, uint64_t end_bytes);
