/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "tests/stress/stress.h"

#include <string.h>

void space_init(struct space *space, struct page_model *plain, uint32_t first_plain)
{
    space->count = 0;
    space->plain = plain;
    space->first_plain = first_plain;
    space->free_count = PLAIN_IDS;
    for (uint32_t i = 0; i < PLAIN_IDS; i++)
        space->free_id[i] = (uint16_t)(first_plain + PLAIN_IDS - 1 - i);
}

bool space_room(const struct space *space, uint32_t pages)
{
    return space->count + 3 <= EXTENTS_MAX && pages <= space->free_count;
}

void space_new_plain(struct space *space, uint16_t *id, uint32_t pages)
{
    for (uint32_t i = 0; i < pages; i++) {
        id[i] = space->free_id[--space->free_count];
        struct page_model *model = &space->plain[id[i] - space->first_plain];
        atomic_store(&model->generation, 0);
        atomic_store(&model->next, 0);
    }
}

void space_add(struct space *space, void *at, bool file, const uint16_t *id, uint32_t pages)
{
    if (pages == 0)
        return;
    need(space->count < EXTENTS_MAX && pages <= REGION_PAGES_MAX);
    struct extent *extent = &space->extent[space->count++];
    extent->at = at;
    extent->pages = pages;
    extent->file = file;
    memmove(extent->id, id, pages * sizeof(*id));
}

void space_cut(struct space *space, const void *at, uint32_t pages, bool keep)
{
    const uint8_t *start = at, *end = start + pages * config.page_bytes;
    for (unsigned i = 0; i < space->count;) {
        struct extent *extent = &space->extent[i];
        uint8_t *extent_end = extent->at + extent->pages * config.page_bytes;
        if (extent->at >= end || extent_end <= start) {
            i++;
            continue;
        }
        const uint32_t from =
            start > extent->at ? (uint32_t)((uint64_t)(start - extent->at) / config.page_bytes) : 0;
        const uint32_t to = end < extent_end
                                ? (uint32_t)((uint64_t)(end - extent->at) / config.page_bytes)
                                : extent->pages;
        for (uint32_t page = from; page < to && !keep; page++)
            if (extent->id[page] >= space->first_plain)
                space->free_id[space->free_count++] = extent->id[page];
        if (to < extent->pages && from > 0)
            space_add(space, extent->at + to * config.page_bytes, extent->file, extent->id + to,
                      extent->pages - to);
        if (from > 0) {
            extent->pages = from;
            i++;
        } else if (to < extent->pages) {
            memmove(extent->id, extent->id + to, (extent->pages - to) * sizeof(extent->id[0]));
            extent->at += to * config.page_bytes;
            extent->pages -= to;
            i++;
        } else {
            *extent = space->extent[--space->count];
        }
    }
}
