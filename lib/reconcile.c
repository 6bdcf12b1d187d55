/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib/reconcile.h"

#include <stdlib.h>
#include <string.h>

#include "lib/layout.h"
#include "lib/util.h"

#define SPANS_MAX 64u /**< lost or found at once; it is one event that is missing, as a rule */

static uint64_t length_of(const struct mf_span *span)
{
    return span->end_addr - span->start_addr;
}

/* What of @whole is in none of @others (sorted or not); at most SPANS_MAX parts. */
static unsigned subtract(struct mf_span whole, const struct mf_span *others, unsigned count,
                         struct mf_span *out, unsigned used)
{
    while (whole.start_addr < whole.end_addr && used < SPANS_MAX) {
        uint64_t next = whole.end_addr, covered_to = whole.start_addr;
        for (unsigned i = 0; i < count; i++) {
            if (others[i].start_addr <= whole.start_addr && others[i].end_addr > covered_to)
                covered_to = others[i].end_addr;
            else if (others[i].start_addr > whole.start_addr && others[i].start_addr < next)
                next = others[i].start_addr;
        }
        if (covered_to > whole.start_addr) {
            whole.start_addr = covered_to;
            continue;
        }
        out[used++] = (struct mf_span){whole.start_addr, next};
        whole.start_addr = next;
    }
    return used;
}

/* How many of @spans have that length, and the last of them. */
static unsigned with_length(const struct mf_span *spans, unsigned count, uint64_t length_bytes,
                            unsigned *which)
{
    unsigned found = 0;
    for (unsigned i = 0; i < count; i++)
        if (length_of(&spans[i]) == length_bytes) {
            *which = i;
            found++;
        }
    return found;
}

/* Take [@lost) out of the pieces. Return: what lay there, of one piece. */
static struct mf_mapping cut_out(struct mf_mapping *pieces, unsigned *count, unsigned max,
                                 const struct mf_span *lost)
{
    for (unsigned i = 0; i < *count; i++) {
        struct mf_mapping *m = &pieces[i];
        const uint64_t end = m->start_addr + m->length_bytes;
        if (m->region == MF_REGION_ZEROS || lost->start_addr < m->start_addr ||
            lost->end_addr > end)
            continue;
        struct mf_mapping part = *m, tail = *m;
        part.offset_bytes += lost->start_addr - m->start_addr;
        part.start_addr = lost->start_addr;
        part.length_bytes = length_of(lost);
        tail.offset_bytes += lost->end_addr - m->start_addr;
        tail.start_addr = lost->end_addr;
        tail.length_bytes = end - lost->end_addr;
        m->length_bytes = lost->start_addr - m->start_addr;
        if (tail.length_bytes && *count < max)
            pieces[(*count)++] = tail;
        if (m->length_bytes == 0)
            *m = pieces[--*count];
        return part;
    }
    return (struct mf_mapping){.length_bytes = 0};
}

unsigned mf_reconcile(struct mf_mapping *pieces, unsigned *count, unsigned max,
                      const struct mf_span *watched, unsigned watched_count)
{
    struct mf_span lost[SPANS_MAX], found[SPANS_MAX];
    unsigned lost_count = 0, found_count = 0, unclear = 0, which = 0, other = 0;
    cleanup_free struct mf_span *known = calloc(*count + 1u, sizeof(*known));
    if (!known)
        return *count;
    for (unsigned i = 0; i < *count; i++) {
        known[i] =
            (struct mf_span){pieces[i].start_addr, pieces[i].start_addr + pieces[i].length_bytes};
        if (pieces[i].region != MF_REGION_ZEROS)
            lost_count = subtract(known[i], watched, watched_count, lost, lost_count);
    }
    for (unsigned i = 0; i < watched_count; i++)
        found_count = subtract(watched[i], known, *count, found, found_count);
    for (unsigned i = 0; i < lost_count; i++) {
        const uint64_t length_bytes = length_of(&lost[i]);
        const unsigned same = with_length(found, found_count, length_bytes, &which);
        const bool alone = with_length(lost, lost_count, length_bytes, &other) == 1;
        struct mf_mapping piece = cut_out(pieces, count, max, &lost[i]);
        if (same == 1 && alone) {
            piece.start_addr = found[which].start_addr;
        } else if (same == 0 && lost_count == 1 && found_count == 1 &&
                   length_of(&found[0]) > length_bytes) {
            piece.start_addr = found[0].start_addr; /* it grew as well; the rest is new */
        } else {
            unclear += found_count > 0;
            continue;
        }
        if (piece.length_bytes && *count < max)
            pieces[(*count)++] = piece;
    }
    return unclear;
}
