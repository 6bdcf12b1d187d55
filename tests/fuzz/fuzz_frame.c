/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A frame header from the network against a session: whatever passes mf_frame_check may be used
 * without looking again. The first bytes make the session's regions, the rest is headers.
 *
 * Input: a byte of which the lowest bit says the direction and the others how many regions; for
 * each a byte (page size) and 8 bytes (pages); then headers.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "lib/target.h"
#include "proto/frame.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t length_bytes);

static void require(bool condition)
{
    if (!condition)
        abort();
}

static void try_header(const uint8_t *header, const struct mf_frame_region *regions, unsigned count,
                       bool to_destination)
{
    struct mf_frame frame;
    const char *why = NULL;
    uint8_t again[MF_FRAME_HEADER_BYTES];
    if (mf_frame_decode(header, &frame, &why) < 0) {
        require(why && why[0]);
        return;
    }
    mf_frame_encode(&frame, again);
    require(memcmp(header, again, sizeof(again)) == 0);
    if (mf_frame_check(&frame, regions, count, to_destination, &why) < 0) {
        require(why && why[0]);
        return;
    }
    require((frame.type == MF_FRAME_REQUEST) != to_destination);
    require(frame.type != MF_FRAME_DISCARD || frame.flags == MF_FRAME_FLAG_ROUND);
    require(!(frame.flags & ~(MF_FRAME_FLAG_HOLE | MF_FRAME_FLAG_ROUND)));
    require(!(frame.flags & MF_FRAME_FLAG_HOLE) || frame.type == MF_FRAME_ZERO);
    require(!(frame.flags & MF_FRAME_FLAG_ROUND) || frame.type == MF_FRAME_DATA ||
            frame.type == MF_FRAME_ZERO || frame.type == MF_FRAME_BARRIER ||
            frame.type == MF_FRAME_DISCARD);
    if (frame.type == MF_FRAME_BARRIER) {
        require(frame.pages == 0 && frame.length_bytes == 0);
        return;
    }
    require(frame.region < count);
    const struct mf_frame_region *region = &regions[frame.region];
    uint64_t end = 0, bytes = 0;
    require(frame.pages > 0 && !__builtin_add_overflow(frame.first_page, frame.pages, &end));
    require(end <= region->pages);
    if (frame.type == MF_FRAME_DATA) {
        require(!__builtin_mul_overflow(frame.pages, (uint64_t)region->page_bytes, &bytes));
        require(bytes == frame.length_bytes);
        require(bytes <= MF_FRAME_DATA_MAX_BYTES || frame.pages == 1);
    } else {
        require(frame.type == MF_FRAME_ZERO || frame.type == MF_FRAME_CURRENT ||
                frame.type == MF_FRAME_REQUEST || frame.type == MF_FRAME_DISCARD);
        require(frame.length_bytes == 0);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t length_bytes)
{
    struct mf_frame_region regions[MF_REGIONS_MAX];
    if (length_bytes == 0)
        return 0;
    const bool to_destination = data[0] & 1u;
    const unsigned count = (data[0] >> 1u) % (MF_REGIONS_MAX + 1u);
    size_t at = 1;
    for (unsigned i = 0; i < count; i++) {
        if (length_bytes - at < 9)
            return 0;
        /* Page sizes from 4 KiB to 1 GiB; sizes in pages are the session's own, and may be any. */
        regions[i].page_bytes = UINT32_C(4096) << (data[at] % 19u);
        memcpy(&regions[i].pages, data + at + 1, sizeof(regions[i].pages));
        at += 9;
    }
    for (; length_bytes - at >= MF_FRAME_HEADER_BYTES; at += MF_FRAME_HEADER_BYTES)
        try_header(data + at, regions, count, to_destination);
    return 0;
}
