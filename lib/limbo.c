/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib/limbo.h"

#include <errno.h>
#include <string.h>

/* The region of a piece of which a REMAP was read: all that is to come is its UNMAP. */
#define LEFT (UINT32_MAX - 1)

static uint64_t end_of(const struct mf_mapping *m)
{
    return m->start_addr + m->length_bytes;
}

/* The part of @m in [@start, @end), which overlaps it. */
static struct mf_mapping clip(const struct mf_mapping *m, uint64_t start, uint64_t end)
{
    struct mf_mapping part = *m;
    if (start > part.start_addr) {
        part.offset_bytes += start - part.start_addr;
        part.length_bytes -= start - part.start_addr;
        part.start_addr = start;
    }
    if (end < end_of(&part))
        part.length_bytes = end - part.start_addr;
    return part;
}

static void add(struct mf_limbo *limbo, struct mf_layout *layout, const struct mf_mapping *piece)
{
    if (limbo->count < MF_LIMBO_MAX) {
        limbo->piece[limbo->count++] = *piece;
        return;
    }
    layout->overflowed = true;
    layout->lost |= mf_layout_keeps(layout, piece);
}

/* Which piece in limbo covers @addr: the oldest. Else @next is where the first behind it begins, at
 * most @end. @left: also what has been moved already. */
static int find(const struct mf_limbo *limbo, uint32_t context, uint64_t addr, uint64_t end,
                bool left, uint64_t *next)
{
    *next = end;
    for (unsigned i = 0; i < limbo->count; i++) {
        const struct mf_mapping *m = &limbo->piece[i];
        if (m->context != context || end_of(m) <= addr || (m->region == LEFT && !left))
            continue;
        if (m->start_addr <= addr)
            return (int)i;
        if (m->start_addr < *next)
            *next = m->start_addr;
    }
    return -1;
}

/* The part of piece @i in [@start, @end) leaves limbo. */
static struct mf_mapping take(struct mf_limbo *limbo, struct mf_layout *layout, unsigned i,
                              uint64_t start, uint64_t end)
{
    const struct mf_mapping whole = limbo->piece[i], part = clip(&whole, start, end);
    const bool head = whole.start_addr<part.start_addr, tail = end_of(&whole)> end_of(&part);
    if (head)
        limbo->piece[i] = clip(&whole, 0, part.start_addr);
    else if (tail)
        limbo->piece[i] = clip(&whole, end_of(&part), UINT64_MAX);
    if (head && tail) {
        const struct mf_mapping rest = clip(&whole, end_of(&part), UINT64_MAX);
        add(limbo, layout, &rest);
    }
    if (!head && !tail) {
        limbo->count--;
        for (unsigned at = i; at < limbo->count; at++)
            limbo->piece[at] = limbo->piece[at + 1];
    }
    return part;
}

static void put_left(struct mf_limbo *limbo, uint32_t context, uint64_t start, uint64_t end)
{
    if (start >= end)
        return;
    if (limbo->left_count > 0) {
        struct mf_range *last = &limbo->left[limbo->left_count - 1];
        if (last->context == context && last->start_addr + last->length_bytes == start) {
            last->length_bytes += end - start;
            return;
        }
    }
    if (limbo->left_count == MF_LIMBO_LEFT_MAX) { /* the oldest most likely stays mapped */
        limbo->left_count--;
        memmove(limbo->left, limbo->left + 1, limbo->left_count * sizeof(limbo->left[0]));
    }
    limbo->left[limbo->left_count++] =
        (struct mf_range){.start_addr = start, .length_bytes = end - start, .context = context};
}

/* What was noted of [@start, @end) is no longer so. */
static void take_left(struct mf_limbo *limbo, uint32_t context, uint64_t start, uint64_t end)
{
    for (unsigned i = limbo->left_count; i-- > 0;) {
        const struct mf_range range = limbo->left[i];
        const uint64_t range_end = range.start_addr + range.length_bytes;
        if (range.context != context || range.start_addr >= end || range_end <= start)
            continue;
        limbo->left_count--;
        memmove(limbo->left + i, limbo->left + i + 1,
                (limbo->left_count - i) * sizeof(limbo->left[0]));
        put_left(limbo, context, range.start_addr, start);
        put_left(limbo, context, end, range_end);
    }
}

/* Whatever was in [@start, @end) has left before. Of what a REMAP was read the UNMAP is to come. */
static void displace(struct mf_limbo *limbo, struct mf_layout *layout, uint32_t context,
                     uint64_t start, uint64_t end)
{
    struct mf_mapping m;
    struct mf_range dropped[1];
    for (unsigned i = 0; i < limbo->left_count; i++) {
        const struct mf_range *range = &limbo->left[i];
        const struct mf_mapping whole = {.start_addr = range->start_addr,
                                         .length_bytes = range->length_bytes,
                                         .region = LEFT,
                                         .context = context};
        if (range->context != context || whole.start_addr >= end || end_of(&whole) <= start)
            continue;
        const struct mf_mapping part = clip(&whole, start, end);
        add(limbo, layout, &part);
        mf_layout_unmap(layout, context, part.start_addr, end_of(&part), dropped);
    }
    take_left(limbo, context, start, end);
    for (uint64_t at = start;
         at < end && mf_layout_from(layout, context, at, &m) && m.start_addr < end;
         at = end_of(&m)) {
        const struct mf_mapping part = clip(&m, start, end);
        add(limbo, layout, &part);
    }
    mf_layout_unmap(layout, context, start, end, dropped);
}

static void count_owed(const struct mf_limbo *limbo, struct mf_layout *layout)
{
    uint32_t owed = layout->unsettled;
    for (unsigned i = 0; i < limbo->count; i++)
        owed +=
            limbo->piece[i].region != MF_REGION_ZEROS && mf_layout_keeps(layout, &limbo->piece[i]);
    atomic_store_explicit(&layout->owed, owed, memory_order_release);
}

static void put(struct mf_layout *layout, const struct mf_mapping *mapping)
{
    struct mf_range dropped[2];
    mf_layout_learn(layout, mapping, dropped);
}

static bool is_left(const struct mf_limbo *limbo, uint32_t context, uint64_t addr, uint64_t *end)
{
    for (unsigned i = 0; i < limbo->left_count; i++) {
        const struct mf_range *range = &limbo->left[i];
        if (range->context == context && addr >= range->start_addr &&
            addr - range->start_addr < range->length_bytes) {
            *end = range->start_addr + range->length_bytes;
            return true;
        }
    }
    return false;
}

static bool is_displaced(const struct mf_limbo *limbo, uint32_t context, uint64_t addr,
                         uint64_t *end)
{
    for (unsigned i = 0; i < limbo->count; i++) {
        const struct mf_mapping *m = &limbo->piece[i];
        if (m->context == context && m->region == LEFT && addr >= m->start_addr &&
            addr < end_of(m)) {
            *end = end_of(m);
            return true;
        }
    }
    return false;
}

/* Is it what stayed mapped when it was moved away from (MREMAP_DONTUNMAP) that moves now? Then all
 * of it lies where that was. What has come to a part of it since may lie there too, but a move is
 * one of a whole mapping, and that can't be both. */
static bool stayed(const struct mf_limbo *limbo, uint32_t context, uint64_t start, uint64_t end)
{
    bool undisturbed = false;
    for (uint64_t at = start; at < end;) {
        if (is_left(limbo, context, at, &at))
            undisturbed = true;
        else if (!is_displaced(limbo, context, at, &at))
            return false;
    }
    return undisturbed;
}

int mf_limbo_remap(struct mf_limbo *limbo, struct mf_layout *layout, uint32_t context,
                   uint64_t from_addr, uint64_t to_addr, uint64_t length_bytes, bool *files)
{
    const uint64_t from_end = from_addr + length_bytes;
    const bool lost_before = layout->lost;
    const bool left = stayed(limbo, context, from_addr, from_end);
    displace(limbo, layout, context, to_addr, to_addr + length_bytes);
    *files = false;
    for (uint64_t at = from_addr, next = from_addr; at < from_end; at = next) {
        struct mf_mapping piece;
        int i = find(limbo, context, at, from_end, left, &next);
        const bool in_limbo = i >= 0;
        const bool known =
            in_limbo || (mf_layout_from(layout, context, at, &piece) && piece.start_addr < next);
        if (in_limbo)
            piece = take(limbo, layout, (unsigned)i, at, from_end);
        else if (known)
            piece = clip(&piece, at, next);
        const bool kept = known && mf_layout_keeps(layout, &piece);
        *files |= !kept || piece.start_addr > at;
        if (known)
            next = end_of(&piece);
        if (in_limbo) {
            struct mf_mapping owed = piece;
            owed.region = LEFT;
            add(limbo, layout, &owed);
        } else {
            take_left(limbo, context, at, next); /* not twice */
            put_left(limbo, context, at, next);
        }
        if (!kept)
            continue;
        struct mf_mapping zeros = piece, moved = piece;
        zeros.region = MF_REGION_ZEROS;
        zeros.offset_bytes = 0;
        moved.start_addr = piece.start_addr - from_addr + to_addr;
        if (!in_limbo)
            put(layout, &zeros);
        put(layout, &moved);
    }
    count_owed(limbo, layout);
    return layout->lost && !lost_before ? -E2BIG : 0;
}

unsigned mf_limbo_unmap(struct mf_limbo *limbo, struct mf_layout *layout, uint32_t context,
                        uint64_t start_addr, uint64_t end_addr, struct mf_range *dropped)
{
    unsigned count = 0;
    for (uint64_t at = start_addr, next; at < end_addr; at = next) {
        int i = find(limbo, context, at, end_addr, true, &next);
        if (i >= 0) {
            const struct mf_mapping gone = take(limbo, layout, (unsigned)i, at, end_addr);
            next = end_of(&gone);
            continue;
        }
        struct mf_range one[1];
        take_left(limbo, context, at, next);
        if (mf_layout_unmap(layout, context, at, next, one) > 0) {
            *dropped = one[0];
            count = 1; /* only the last piece can be cut in two */
        }
    }
    count_owed(limbo, layout);
    return count;
}

bool mf_limbo_holds(const struct mf_limbo *limbo, uint32_t context)
{
    for (unsigned i = 0; i < limbo->count; i++)
        if (limbo->piece[i].context == context)
            return true;
    for (unsigned i = 0; i < limbo->left_count; i++)
        if (limbo->left[i].context == context)
            return true;
    return false;
}

void mf_limbo_forget(struct mf_limbo *limbo, struct mf_layout *layout, uint32_t context)
{
    unsigned kept = 0;
    for (unsigned i = 0; i < limbo->count; i++)
        if (limbo->piece[i].context != context)
            limbo->piece[kept++] = limbo->piece[i];
    limbo->count = kept;
    take_left(limbo, context, 0, UINT64_MAX);
    count_owed(limbo, layout);
}

void mf_limbo_clear(struct mf_limbo *limbo, struct mf_layout *layout)
{
    limbo->count = limbo->left_count = 0;
    count_owed(limbo, layout);
}
