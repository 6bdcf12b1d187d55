/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib/extents.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

void mf_extents_free(struct mf_extents *set)
{
    free(set->list);
    *set = (struct mf_extents){0};
}

/** first_after() - index of the first extent that ends at or behind @at_bytes. */
static size_t first_after(const struct mf_extents *set, uint64_t at_bytes)
{
    size_t low = 0, high = set->count;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (set->list[middle].end_bytes < at_bytes)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

int mf_extents_add(struct mf_extents *set, uint64_t start_bytes, uint64_t end_bytes)
{
    if (start_bytes >= end_bytes)
        return 0;
    size_t first = first_after(set, start_bytes), last = first;
    while (last < set->count && set->list[last].start_bytes <= end_bytes) {
        if (set->list[last].start_bytes < start_bytes)
            start_bytes = set->list[last].start_bytes;
        if (set->list[last].end_bytes > end_bytes)
            end_bytes = set->list[last].end_bytes;
        last++;
    }
    if (last == first && set->count == set->room) {
        size_t room = set->room ? set->room * 2 : 16;
        struct mf_extent *grown = reallocarray(set->list, room, sizeof(*grown));
        if (!grown)
            return -ENOMEM;
        set->list = grown;
        set->room = room;
    }
    memmove(&set->list[first + 1], &set->list[last], (set->count - last) * sizeof(set->list[0]));
    set->count = set->count - (last - first) + 1;
    set->list[first] = (struct mf_extent){.start_bytes = start_bytes, .end_bytes = end_bytes};
    return 0;
}

int mf_extents_minus(const struct mf_extents *a, const struct mf_extents *b, struct mf_extents *out)
{
    mf_extents_free(out);
    size_t k = 0;
    for (size_t i = 0; i < a->count; i++) {
        uint64_t start_bytes = a->list[i].start_bytes, end_bytes = a->list[i].end_bytes;
        while (k < b->count && b->list[k].end_bytes <= start_bytes)
            k++;
        /* An extent of b may reach into the next one of a as well: k stays at it. */
        for (size_t m = k; m < b->count && b->list[m].start_bytes < end_bytes; m++) {
            if (mf_extents_add(out, start_bytes, b->list[m].start_bytes) < 0)
                return -ENOMEM;
            start_bytes = b->list[m].end_bytes;
        }
        if (mf_extents_add(out, start_bytes, end_bytes) < 0)
            return -ENOMEM;
    }
    return 0;
}

bool mf_extents_meets(const struct mf_extents *set, uint64_t start_bytes, uint64_t end_bytes)
{
    if (start_bytes >= end_bytes)
        return false;
    size_t i = first_after(set, start_bytes + 1);
    return i < set->count && set->list[i].start_bytes < end_bytes;
}
