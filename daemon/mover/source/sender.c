/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/mover/source/sender.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "lib/zero.h"

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif

void sender_init(struct sender *sender, struct mover *mover, struct io_uring *ring, int fd,
                 bool urgent)
{
    sender->urgent = urgent;
    sender->mover = mover;
    sender->ring = ring;
    sender->fd = fd;
    sender->frames = sender->iovecs = 0;
    sender->batch_bytes = 0;
}

int sender_flush(struct sender *s)
{
    if (s->iovecs == 0)
        return 0;
    struct msghdr msg = {.msg_iov = s->iov, .msg_iovlen = s->iovecs};
    uint64_t bytes = s->batch_bytes;
    s->frames = s->iovecs = 0;
    s->batch_bytes = 0;
    int r = ring_send_all(s->ring, s->fd, &msg);
    if (r == 0)
        atomic_fetch_add_explicit(&s->mover->figures->wire_bytes, bytes, memory_order_relaxed);
    return r;
}

static int put_frame(struct sender *s, const struct mf_frame *frame, const uint8_t *payload)
{
    if (s->frames == SENDER_FRAMES || s->batch_bytes >= SENDER_BATCH_BYTES) {
        int r = sender_flush(s);
        if (r < 0)
            return r;
    }
    uint8_t *header = s->header[s->frames++];
    mf_frame_encode(frame, header);
    s->iov[s->iovecs++] = (struct iovec){header, MF_FRAME_HEADER_BYTES};
    if (payload)
        s->iov[s->iovecs++] = (struct iovec){(void *)(uintptr_t)payload, frame->length_bytes};
    s->batch_bytes += MF_FRAME_HEADER_BYTES + frame->length_bytes;
    return 0;
}

int sender_barrier(struct sender *s, uint32_t pass)
{
    return put_frame(s, &(struct mf_frame){.type = MF_FRAME_BARRIER, .first_page = pass}, NULL);
}

static void count(_Atomic uint64_t *figure, uint64_t pages)
{
    atomic_fetch_add_explicit(figure, pages, memory_order_relaxed);
}

/* One frame for pages that need no bytes. How many of them are new decides the figures. */
static int put_empty(struct sender *s, uint32_t region, uint64_t first, uint64_t pages, bool hole,
                     bool again)
{
    struct mover *mover = s->mover;
    uint64_t fresh =
        mf_page_confirm_empty(&mover->view.pages[region], first, pages, NULL, NULL);
    if (fresh == 0 && !again)
        return 0;
    count(hole ? &mover->figures->hole_pages : &mover->figures->zero_pages, fresh);
    atomic_fetch_sub_explicit(&mover->figures->missing_pages, fresh, memory_order_relaxed);
    return put_frame(s,
                     &(struct mf_frame){.type = MF_FRAME_ZERO,
                                        .flags = hole ? MF_FRAME_FLAG_HOLE : 0,
                                        .region = (uint16_t)region,
                                        .first_page = first,
                                        .pages = pages},
                     NULL);
}

static int put_data(struct sender *s, uint32_t region, uint64_t first, uint64_t pages,
                    uint64_t fresh)
{
    const struct region *r = &s->mover->region[region];
    count(&s->mover->figures->data_pages, fresh);
    atomic_fetch_sub_explicit(&s->mover->figures->missing_pages, fresh, memory_order_relaxed);
    return put_frame(s,
                     &(struct mf_frame){.type = MF_FRAME_DATA,
                                        .region = (uint16_t)region,
                                        .first_page = first,
                                        .pages = pages,
                                        .length_bytes = pages * r->page_bytes},
                     r->map + first * r->page_bytes);
}

/* Pages that the file holds: zeros are found and not sent. */
static int offer_present(struct sender *s, uint32_t region, uint64_t first, uint64_t end,
                         bool again)
{
    struct mover *mover = s->mover;
    const struct region *r = &mover->region[region];
    const struct mf_pages *states = &mover->view.pages[region];
    const uint64_t most = r->page_bytes >= SENDER_BATCH_BYTES
                              ? 1
                              : SENDER_BATCH_BYTES / r->page_bytes;
    /* One call instead of a fault for every sixteenth page; a failure only means those faults. */
    if (end - first > 16)
        madvise(r->map + first * r->page_bytes, (end - first) * r->page_bytes,
                MADV_POPULATE_READ);
    uint64_t page = first;
    while (page < end) {
        uint64_t run = page, fresh = 0, zeros;
        int result = 0;
        /* The run of zeros that begins here … */
        while (page < end &&
               (again || mf_page_state_of(mf_page_load(states, page)) == MF_PAGE_UNSENT) &&
               mf_is_zero(r->map + page * r->page_bytes, r->page_bytes))
            page++;
        zeros = page - run;
        if (zeros > 0) {
            result = put_empty(s, region, run, zeros, false, again);
            if (result < 0)
                return result;
            continue;
        }
        /* … or of pages with bytes. The page that ends the run is looked at again as the next. */
        while (page < end && page - run < most) {
            bool won = mf_page_confirm_empty(states, page, 1, NULL, NULL) == 1;
            if (!won && !again)
                break;
            fresh += won;
            page++;
            if (page < end && mf_is_zero(r->map + page * r->page_bytes, r->page_bytes))
                break;
        }
        if (page > run)
            result = put_data(s, region, run, page - run, fresh);
        else
            page++; /* sent already by somebody else */
        if (result < 0)
            return result;
    }
    return 0;
}

/*
 * What [page, end) begins with: data or a hole, and up to where.
 *
 * A hole must not even be read: reading it through a mapping would allocate it. SEEK_DATA is quick, for it
 * stops at the first page it finds; SEEK_HOLE looks at every page up to the next hole, which in a well
 * filled guest is most of its RAM. So the sweep asks for the end of an extent once and keeps it for all
 * threads (RAM is frozen), and the urgent thread asks only about single pages. hugetlbfs knows no SEEK_DATA and
 * calls everything data.
 */
static int next_extent(struct sender *s, struct region *r, uint64_t page, uint64_t end, bool *data,
                       uint64_t *until)
{
    uint64_t known = atomic_load_explicit(&r->extent, memory_order_relaxed);
    uint64_t known_first = known >> 32, known_end = known & UINT32_MAX;
    *data = true;
    if (page >= known_first && page < known_end) {
        *until = known_end < end ? known_end : end;
        return 0;
    }
    off_t at = lseek(r->fd, (off_t)(page * r->page_bytes), SEEK_DATA);
    if (at < 0 && errno != ENXIO)
        return -errno;
    uint64_t data_page = at < 0 ? end : (uint64_t)at / r->page_bytes;
    if (data_page > page) {
        *data = false;
        *until = data_page < end ? data_page : end;
        return 0;
    }
    *until = page + 1;
    if (s->urgent || end - page == 1)
        return 0;
    at = lseek(r->fd, (off_t)(page * r->page_bytes), SEEK_HOLE);
    uint64_t hole_page = at < 0 ? r->pages : ((uint64_t)at + r->page_bytes - 1) / r->page_bytes;
    if (hole_page > r->pages)
        hole_page = r->pages;
    if (hole_page <= UINT32_MAX)
        atomic_store_explicit(&r->extent, page << 32 | hole_page, memory_order_relaxed);
    *until = hole_page < end ? hole_page : end;
    return 0;
}

int sender_pages(struct sender *s, uint32_t region, uint64_t first, uint64_t pages, bool again)
{
    struct region *r = &s->mover->region[region];
    const uint64_t end = first + pages;
    uint64_t page = first;
    while (page < end) {
        bool data = false;
        uint64_t until = end;
        int result = next_extent(s, r, page, end, &data, &until);
        if (result == 0)
            result = data ? offer_present(s, region, page, until, again)
                          : put_empty(s, region, page, until - page, true, again);
        if (result < 0)
            return result;
        page = until;
    }
    return 0;
}
