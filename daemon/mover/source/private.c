/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/mover/source/private.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "lib/pagemap.h"

#define PIECE_BYTES SENDER_BATCH_BYTES

static int look(const struct mover *mover, uint32_t region, uint64_t first, uint64_t pages,
                uint8_t *held)
{
    const uint64_t page_bytes = mover->region[region].page_bytes;
    struct mf_range ranges[16];
    unsigned found = mf_layout_ranges(&mover->layout, region, first * page_bytes,
                                      pages * page_bytes, ranges, 16);
    int r = found > 16 ? -E2BIG : 0;
    memset(held, 0, pages); /* where nothing is mapped there is nothing */
    for (unsigned i = 0; r == 0 && i < found; i++)
        r = mf_pagemap_populated(mover->populated_fd, ranges[i].start_addr, ranges[i].length_bytes,
                                 page_bytes, held + ranges[i].offset_bytes / page_bytes - first);
    return r;
}

int private_failed(struct mover *mover, uint32_t region, int error)
{
    const char *name = mover->region[region].name;
    if (error == -ESRCH)
        link_fail(mover, "the process of %s has ended, and its memory %s with it", mover->name,
                  name);
    else
        link_fail(mover, "the memory %s of %s can't be read: %s%s", name, mover->name,
                  strerror(-error),
                  error == -EIO || error == -EFAULT
                      ? " (a page that is broken, or protected memory that this kernel lets only a "
                        "tracer read: boot with proc_mem.force_override=always)"
                      : "");
    return error;
}

int private_look(struct sender *s, uint32_t region, uint64_t first, uint64_t pages)
{
    int r = look(s->mover, region, first, pages, s->held);
    s->held_first = first;
    s->private_page_bytes = s->mover->region[region].page_bytes;
    return r < 0 ? private_failed(s->mover, region, r) : 0;
}

void private_extent(const struct sender *s, uint64_t page, uint64_t end, bool *data,
                    uint64_t *until)
{
    const uint8_t *held = s->held - s->held_first;
    uint64_t at = page;
    *data = held[page] != 0;
    const uint64_t piece = PIECE_BYTES / s->private_page_bytes;
    const uint64_t limit = *data && end - page > piece ? page + piece : end;
    while (at < limit && (held[at] != 0) == *data)
        at++;
    *until = at;
}

/* /proc/PID/mem: the offset is the address. 0 bytes: the address space is no more. */
static int read_all(int fd, uint8_t *to, uint64_t addr, uint64_t length_bytes)
{
    while (length_bytes > 0) {
        ssize_t n = pread(fd, to, length_bytes, (off_t)addr);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n < 0 ? -errno : -ESRCH;
        to += n;
        addr += (uint64_t)n;
        length_bytes -= (uint64_t)n;
    }
    return 0;
}

int private_fetch(struct sender *s, uint32_t region, uint64_t first, uint64_t end, int *error)
{
    const struct mf_region *r = &s->mover->region[region];
    const uint64_t bytes = (end - first) * r->page_bytes;
    struct mf_range ranges[16];
    *error = 0;
    if (s->room_used + bytes > SENDER_ROOM_BYTES) {
        int result = sender_flush(s);
        if (result < 0)
            return result;
        s->room_used = 0;
    }
    uint8_t *to = s->room + s->room_used;
    s->fetched = to;
    s->fetched_first = first;
    s->room_used += bytes;
    unsigned found =
        mf_layout_ranges(&s->mover->layout, region, first * r->page_bytes, bytes, ranges, 16);
    if (found > 16)
        *error = -E2BIG;
    for (unsigned i = 0; *error == 0 && i < found; i++)
        *error = read_all(r->fd, to + (ranges[i].offset_bytes - first * r->page_bytes),
                          ranges[i].start_addr, ranges[i].length_bytes);
    return 0;
}

const uint8_t *private_page(const struct sender *s, uint64_t page)
{
    return s->fetched + (page - s->fetched_first) * s->private_page_bytes;
}

uint64_t private_allocated_bytes(const struct mover *mover, uint32_t region)
{
    const struct mf_region *r = &mover->region[region];
    uint8_t held[SENDER_CHUNK_PAGES];
    uint64_t sum = 0;
    for (uint64_t first = 0; first < r->pages; first += SENDER_CHUNK_PAGES) {
        uint64_t pages =
            r->pages - first < SENDER_CHUNK_PAGES ? r->pages - first : SENDER_CHUNK_PAGES;
        if (look(mover, region, first, pages, held) < 0)
            return sum; /* said when it is needed */
        for (uint64_t i = 0; i < pages; i++)
            sum += held[i] ? r->page_bytes : 0;
    }
    return sum;
}
