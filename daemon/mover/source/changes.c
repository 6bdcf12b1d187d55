/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/mover/source/changes.h"

static bool is_private(const struct changes *c, const struct mf_mapping *m)
{
    return c->mover->region[m->region].kind == MF_MEMORY_PRIVATE;
}

static void mark(struct changes *c, uint32_t region, uint64_t offset_bytes, uint64_t length_bytes,
                 uint8_t bits)
{
    const struct mf_region *r = &c->mover->region[region];
    const uint64_t first = offset_bytes / r->page_bytes;
    uint64_t end = (offset_bytes + length_bytes + r->page_bytes - 1) / r->page_bytes;
    if (end > r->pages)
        end = r->pages;
    atomic_store(&c->mover->copies->marks, 1);
    if (first < end)
        mf_page_mark(&c->mover->view.pages[region], first, end - first, bits);
}

/* The part of @m within [@start, @end). */
static struct mf_mapping part_of(const struct mf_mapping *m, uint64_t start, uint64_t end)
{
    struct mf_mapping part = *m;
    const uint64_t m_end = m->start_addr + m->length_bytes;
    part.start_addr = m->start_addr > start ? m->start_addr : start;
    part.length_bytes = (m_end < end ? m_end : end) - part.start_addr;
    part.offset_bytes = m->offset_bytes + (part.start_addr - m->start_addr);
    return part;
}

bool changes_part(const struct changes *c, uint64_t at, uint64_t end, struct mf_mapping *part)
{
    struct mf_mapping m;
    if (at >= end || !mf_layout_from(&c->mover->layout, 0, at, &m) || m.start_addr >= end)
        return false;
    *part = part_of(&m, at, end);
    return true;
}

static void layout_changes(struct changes *c)
{
    atomic_store(&c->mover->layout_moves, true);
    if (atomic_exchange(&c->mover->protect_raced, false))
        mf_copies_doubt(c->mover->copies, MF_DOUBT_MOVED);
}

static void explain(struct changes *c, uint64_t start_addr, uint64_t end_addr)
{
    const struct changes_explained entry = {start_addr, end_addr};
    if (c->explained_count < CHANGES_EXPLAINED)
        c->explained[c->explained_count++] = entry;
    else /* the unmap of the one that goes will be in doubt */
        c->explained[c->explained_next++ % CHANGES_EXPLAINED] = entry;
}

/* Each explains one unmap. The unmap of a move that also shrinks may be the shorter one. */
static bool is_explained(struct changes *c, uint64_t start_addr, uint64_t end_addr)
{
    for (unsigned i = 0; i < c->explained_count; i++)
        if (c->explained[i].start_addr <= start_addr && end_addr <= c->explained[i].end_addr) {
            c->explained[i] = c->explained[--c->explained_count];
            return true;
        }
    return false;
}

void changes_gone(struct changes *c, uint64_t start, uint64_t end)
{
    struct mf_mapping part;
    struct mf_range dropped[1];
    layout_changes(c);
    for (uint64_t at = start; changes_part(c, at, end, &part);
         at = part.start_addr + part.length_bytes)
        if (!is_private(c, &part)) {
            mark(c, part.region, part.offset_bytes, part.length_bytes, MF_PAGE_STALE);
            mf_layout_unmap(&c->mover->layout, 0, part.start_addr,
                            part.start_addr + part.length_bytes, dropped);
        }
}

void changes_unmapped(struct changes *c, uint64_t start, uint64_t end)
{
    struct mf_mapping part;
    uint64_t known_to = start;
    bool all_known = true;
    layout_changes(c);
    while (changes_part(c, known_to, end, &part)) {
        if (!is_private(c, &part))
            mark(c, part.region, part.offset_bytes, part.length_bytes, MF_PAGE_STALE);
        all_known = all_known && part.start_addr == known_to;
        known_to = part.start_addr + part.length_bytes;
    }
    all_known = all_known && known_to >= end;
    /* What else of this went, was it of a region? */
    if (!all_known && c->has_files && !is_explained(c, start, end))
        mf_copies_doubt(c->mover->copies, MF_DOUBT_GONE);
}

/* Is all of @part mapped at @addr, too? By what is known. */
static bool is_known_at(const struct changes *c, const struct mf_mapping *part, uint64_t addr)
{
    struct mf_mapping m;
    if (!mf_layout_find(&c->mover->layout, 0, addr, &m) || m.region != part->region)
        return false;
    m = part_of(&m, addr, addr + part->length_bytes);
    return m.offset_bytes == part->offset_bytes && m.length_bytes == part->length_bytes;
}

void changes_moved(struct changes *c, uint64_t from, uint64_t to, uint64_t length_bytes)
{
    struct mf_mapping part;
    struct mf_range dropped[1];
    bool stays = false;
    layout_changes(c);
    /* A page of private memory is what lies at its place. That is something else now, and came
     * with the bits of another page. */
    for (uint64_t at = to; changes_part(c, at, to + length_bytes, &part);
         at = part.start_addr + part.length_bytes)
        if (is_private(c, &part))
            mark(c, part.region, part.offset_bytes, part.length_bytes, MF_PAGE_STALE);
    if (length_bytes == 0)
        return; /* a second mapping of the same: nothing has gone */
    for (uint64_t at = from; changes_part(c, at, from + length_bytes, &part);
         at = part.start_addr + part.length_bytes) {
        if (is_private(c, &part))
            continue;
        /* It was moved on, or unmapped there, before anybody looked. */
        if (!is_known_at(c, &part, part.start_addr - from + to))
            mark(c, part.region, part.offset_bytes, part.length_bytes, MF_PAGE_STALE);
        /* MREMAP_DONTUNMAP leaves the mapping, without pages. */
        if (c->is_still_there(c->arg, &part))
            stays = true;
        else
            mf_layout_unmap(&c->mover->layout, 0, part.start_addr,
                            part.start_addr + part.length_bytes, dropped);
    }
    if (!stays)
        explain(c, from, from + length_bytes);
}

void changes_discarded(struct changes *c, uint32_t region, uint64_t first, uint64_t pages)
{
    const uint64_t page_bytes = c->mover->region[region].page_bytes;
    mark(c, region, first * page_bytes, pages * page_bytes, MF_PAGE_REMOVED);
}
