/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib/limbo.h"

#include <errno.h>

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
 * most @end. */
static int find(const struct mf_limbo *limbo, uint32_t context, uint64_t addr, uint64_t end,
                uint64_t *next)
{
    *next = end;
    for (unsigned i = 0; i < limbo->count; i++) {
        const struct mf_mapping *m = &limbo->piece[i];
        if (m->context != context || end_of(m) <= addr)
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

/* Whatever is known in [@start, @end) has left before. */
static void displace(struct mf_limbo *limbo, struct mf_layout *layout, uint32_t context,
                     uint64_t start, uint64_t end)
{
    struct mf_mapping m;
    struct mf_range dropped[1];
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

int mf_limbo_remap(struct mf_limbo *limbo, struct mf_layout *layout, uint32_t context,
                   uint64_t from_addr, uint64_t to_addr, uint64_t length_bytes, bool *files)
{
    const uint64_t from_end = from_addr + length_bytes;
    const bool lost_before = layout->lost;
    displace(limbo, layout, context, to_addr, to_addr + length_bytes);
    *files = false;
    for (uint64_t at = from_addr, next = from_addr; at < from_end; at = next) {
        struct mf_mapping piece;
        int i = find(limbo, context, at, from_end, &next);
        const bool in_limbo = i >= 0;
        if (in_limbo) {
            piece = take(limbo, layout, (unsigned)i, at, from_end);
        } else if (mf_layout_from(layout, context, at, &piece) && piece.start_addr < next) {
            piece = clip(&piece, at, next);
        } else {
            *files = true;
            continue;
        }
        if (!in_limbo && piece.start_addr > at)
            *files = true;
        next = end_of(&piece);
        if (!mf_layout_keeps(layout, &piece)) {
            *files = true;
            continue;
        }
        struct mf_mapping zeros = piece, moved = piece;
        zeros.region = MF_REGION_ZEROS;
        zeros.offset_bytes = 0;
        moved.start_addr = piece.start_addr - from_addr + to_addr;
        if (in_limbo)
            add(limbo, layout, &zeros);
        else
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
        int i = find(limbo, context, at, end_addr, &next);
        if (i >= 0) {
            const struct mf_mapping gone = take(limbo, layout, (unsigned)i, at, end_addr);
            next = end_of(&gone);
            continue;
        }
        struct mf_range one[1];
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
    return false;
}

void mf_limbo_forget(struct mf_limbo *limbo, struct mf_layout *layout, uint32_t context)
{
    unsigned kept = 0;
    for (unsigned i = 0; i < limbo->count; i++)
        if (limbo->piece[i].context != context)
            limbo->piece[kept++] = limbo->piece[i];
    limbo->count = kept;
    count_owed(limbo, layout);
}

void mf_limbo_clear(struct mf_limbo *limbo, struct mf_layout *layout)
{
    limbo->count = 0;
    count_owed(limbo, layout);
}
