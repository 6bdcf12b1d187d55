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

void sender_init(struct sender *sender, struct mover *mover, struct io_uring *ring, int fd)
{
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
    uint64_t fresh = mf_page_confirm_empty(&mover->view.pages[region], first, pages, NULL, NULL);
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

/*
 * Does a page read as zeros? On hugetlbfs, which calls its holes data, a look through the mapping
 * would allocate a huge page for a hole, or end in SIGBUS where none is free. read(2) does neither;
 * the mapping is touched only for pages that have bytes.
 */
static bool reads_as_zeros(struct sender *s, const struct region *r, uint64_t page)
{
    if (r->kind != MF_MEMORY_HUGETLB)
        return mf_is_zero(r->map + page * r->page_bytes, r->page_bytes);
    for (uint64_t at = 0; at < r->page_bytes; at += sizeof(s->look)) {
        ssize_t n = pread(r->fd, s->look, sizeof(s->look), (off_t)(page * r->page_bytes + at));
        if (n != (ssize_t)sizeof(s->look) || !mf_is_zero(s->look, sizeof(s->look)))
            return false;
    }
    return true;
}

/* Pages that the file holds: zeros are found and not sent. */
static int offer_present(struct sender *s, uint32_t region, uint64_t first, uint64_t end,
                         bool again)
{
    struct mover *mover = s->mover;
    const struct region *r = &mover->region[region];
    const struct mf_pages *states = &mover->view.pages[region];
    const uint64_t most =
        r->page_bytes >= SENDER_BATCH_BYTES ? 1 : SENDER_BATCH_BYTES / r->page_bytes;
    /* One call instead of a fault for every sixteenth page; a failure only means those faults. */
    if (end - first > 16 && r->kind != MF_MEMORY_HUGETLB)
        madvise(r->map + first * r->page_bytes, (end - first) * r->page_bytes, MADV_POPULATE_READ);
    uint64_t page = first;
    while (page < end) {
        uint64_t run = page, fresh = 0, zeros;
        int result = 0;
        /* The run of zeros that begins here … */
        while (page < end &&
               (again || mf_page_state_of(mf_page_load(states, page)) == MF_PAGE_UNSENT) &&
               reads_as_zeros(s, r, page))
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
            if (page < end && reads_as_zeros(s, r, page))
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
 * A hole must not even be read: reading it through a mapping would allocate it. SEEK_HOLE would
 * name the end of the data in one call, but it looks at every page up to the next hole, which in a
 * well filled guest is most of its RAM; asked for every chunk that took more time than everything
 * else together. SEEK_DATA stops at the first page it finds, so it is asked page by page. hugetlbfs
 * knows no SEEK_DATA and calls everything data.
 */
static int next_extent(const struct region *r, uint64_t page, uint64_t end, bool *data,
                       uint64_t *until)
{
    for (uint64_t at = page;; at++) {
        off_t found = at < end ? lseek(r->fd, (off_t)(at * r->page_bytes), SEEK_DATA) : -1;
        if (found < 0 && at < end && errno != ENXIO)
            return -errno;
        uint64_t data_page = found < 0 ? end : (uint64_t)found / r->page_bytes;
        if (data_page == at && at < end)
            continue;
        *data = at > page;
        *until = *data ? at : data_page < end ? data_page : end;
        return 0;
    }
}

int sender_pages(struct sender *s, uint32_t region, uint64_t first, uint64_t pages, bool again)
{
    const struct region *r = &s->mover->region[region];
    const uint64_t end = first + pages;
    uint64_t page = first;
    while (page < end) {
        bool data = false;
        uint64_t until = end;
        int result = next_extent(r, page, end, &data, &until);
        if (result == 0)
            result = data ? offer_present(s, region, page, until, again)
                          : put_empty(s, region, page, until - page, true, again);
        if (result < 0)
            return result;
        page = until;
    }
    return 0;
}
