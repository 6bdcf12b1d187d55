/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/mover/source/private.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "lib/pagemap.h"
#include "lib/uffd.h"
#include "lib/zero.h"

#define NOT_SEEN 0xffu  /**< in `seen`: no mapping covers it */
#define PROTECTED 0x80u /**< in `seen`: written, and write-protected by now */
#define REMOVED 0x40u   /**< in `seen`: discarded by the target; a hole, as a rule */
#define AGAIN_NS 20000
#define SCATTERED_RUNS                                                                             \
    6u /**< of written pages in a chunk: as of here they are protected together */

#define FAULT_AROUND_PAGES 16u /**< that a fault maps, as a rule */

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif

void sender_init(struct sender *sender, struct mover *mover, struct io_uring *ring, int fd)
{
    sender->mover = mover;
    sender->ring = ring;
    sender->fd = fd;
    sender->lane = NULL;
    sender->round = sender->paced = false;
    sender->frames = sender->iovecs = 0;
    sender->batch_bytes = sender->room_used = 0;
}

int sender_flush(struct sender *s)
{
    if (s->iovecs == 0)
        return 0;
    struct msghdr msg = {.msg_iov = s->iov, .msg_iovlen = s->iovecs};
    uint64_t bytes = s->batch_bytes;
    s->frames = s->iovecs = 0;
    s->batch_bytes = 0;
    if (s->paced)
        sweep_pace(s->mover, bytes);
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
    return put_frame(s,
                     &(struct mf_frame){.type = MF_FRAME_BARRIER,
                                        .flags = s->round ? MF_FRAME_FLAG_ROUND : 0,
                                        .first_page = pass},
                     NULL);
}

static void count(_Atomic uint64_t *figure, uint64_t pages)
{
    atomic_fetch_add_explicit(figure, pages, memory_order_relaxed);
}

static const uint8_t *bytes_of(const struct sender *s, const struct mf_region *r, uint64_t page)
{
    return r->kind == MF_MEMORY_PRIVATE ? private_page(s, page) : r->map + page * r->page_bytes;
}

static int put_run(struct sender *s, enum mf_frame_type type, uint8_t flags, uint32_t region,
                   uint64_t first, uint64_t pages)
{
    const struct mf_region *r = &s->mover->region[region];
    const bool data = type == MF_FRAME_DATA;
    return put_frame(s,
                     &(struct mf_frame){.type = (uint8_t)type,
                                        .flags = flags,
                                        .region = (uint16_t)region,
                                        .first_page = first,
                                        .pages = pages,
                                        .length_bytes = data ? pages * r->page_bytes : 0},
                     data ? bytes_of(s, r, first) : NULL);
}

/* Where bytes or zeros are sent the destination's copy is no copy any more: they may break off in
 * the middle of it, and then a later answer, which may know more of what was written, must not say
 * that the copy is current. */
static void forget_copies(const struct mf_pages *states, uint64_t first, uint64_t pages)
{
    const uint64_t end = first + pages;
    for (uint64_t page = first; page < end;) {
        uint8_t copied = 0;
        const uint64_t until = page + mf_page_run_of(states, MF_PAGE_COPY_MASK, page, end, &copied);
        for (; page < until && copied; page++)
            mf_page_set_copied(states, page, 0);
        page = until;
    }
}

/* An answer for a run of pages, for good: RAM is frozen. How many of them are new decides the
 * figures. */
static int put_answer(struct sender *s, enum mf_frame_type type, bool hole, uint32_t region,
                      uint64_t first, uint64_t pages, bool again)
{
    struct mf_figures *figures = s->mover->figures;
    uint64_t fresh = mf_page_mark_sent(&s->mover->view.pages[region], first, pages);
    if (fresh == 0 && !again)
        return 0;
    if (type != MF_FRAME_CURRENT)
        forget_copies(&s->mover->view.pages[region], first, pages);
    if (type == MF_FRAME_DATA)
        count(&figures->data_pages, fresh);
    else if (type == MF_FRAME_ZERO)
        count(hole ? &figures->hole_pages : &figures->zero_pages, fresh);
    atomic_fetch_sub_explicit(&figures->missing_pages, fresh, memory_order_relaxed);
    return put_run(s, type, hole ? MF_FRAME_FLAG_HOLE : 0, region, first, pages);
}

/*
 * Does a page read as zeros? On hugetlbfs, which calls its holes data, a look through the mapping
 * would allocate a huge page for a hole, or end in SIGBUS where none is free. read(2) does neither;
 * the mapping is touched only for pages that have bytes.
 */
static bool reads_as_zeros(struct sender *s, const struct mf_region *r, uint64_t page)
{
    if (r->kind != MF_MEMORY_HUGETLB)
        return mf_is_zero(bytes_of(s, r, page), r->page_bytes);
    for (uint64_t at = 0; at < r->page_bytes; at += sizeof(s->look)) {
        ssize_t n = pread(r->fd, s->look, sizeof(s->look), (off_t)(page * r->page_bytes + at));
        if (n != (ssize_t)sizeof(s->look) || !mf_is_zero(s->look, sizeof(s->look)))
            return false;
    }
    return true;
}

/* What the tracker has marked: may have been written through a mapping that is gone; discarded. */
static void look_at_marks(struct sender *s, uint32_t region, uint64_t first, uint64_t pages)
{
    const struct mf_pages *states = &s->mover->view.pages[region];
    for (uint64_t i = 0; i < pages; i++) {
        const uint8_t byte = mf_page_load(states, first + i);
        s->seen[i] |= (uint8_t)((byte & MF_PAGE_STALE ? MF_PAGEMAP_WRITTEN : 0) |
                                (byte & MF_PAGE_REMOVED ? REMOVED : 0));
    }
}

/*
 * Which of [first, first + pages) were written since they were last protected, in any mapping.
 * Where that can't be said (the VM is gone, a mapping is not watched any more, somebody may have
 * written unseen) all count as written.
 *
 * Not inside the gate: while the guest runs, what is looked up may be somewhere else by the time it
 * is scanned. Then the answer is about other pages, or that all are written; and while the guest
 * runs nothing is decided by it but what a round copies. When it decides, nothing moves any more.
 */
static void look_for_writes(struct sender *s, uint32_t region, uint64_t first, uint64_t pages)
{
    const struct mover *mover = s->mover;
    const uint64_t page_bytes = mover->region[region].page_bytes;
    struct mf_range ranges[16];
    uint8_t *one = s->seen_once;
    memset(s->seen, NOT_SEEN, pages);
    s->seen_first = first;
    unsigned found = mf_layout_ranges(&mover->layout, region, first * page_bytes,
                                      pages * page_bytes, ranges, 16);
    /* The successor of a mover may have no VM to look at any more, and yet copies to answer for. */
    int r = mover->pagemap_fd < 0 || !mf_copies_good(mover->copies) ? -EBADF
            : found > 16                                            ? -E2BIG
                                                                    : 0;
    for (unsigned i = 0; r == 0 && i < found; i++) {
        const uint64_t at = ranges[i].offset_bytes / page_bytes - first;
        const uint64_t count = ranges[i].length_bytes / page_bytes;
        r = mf_pagemap_scan(mover->pagemap_fd, ranges[i].start_addr, ranges[i].length_bytes,
                            page_bytes, one);
        /* Written in one mapping is written. */
        for (uint64_t page = at; r == 0 && page < at + count; page++)
            s->seen[page] =
                s->seen[page] == NOT_SEEN ? one[page - at] : s->seen[page] | one[page - at];
    }
    /* Since then RAM is frozen, and what was found written is not called a copy any more. */
    const bool settled = atomic_load_explicit(&mover->view.file->looked, memory_order_acquire);
    for (uint64_t page = 0; page < pages; page++)
        if (r < 0 || s->seen[page] == NOT_SEEN)
            s->seen[page] = MF_PAGEMAP_WRITTEN;
    if (atomic_load_explicit(&mover->copies->marks, memory_order_acquire))
        look_at_marks(s, region, first, pages);
    for (uint64_t page = 0; settled && page < pages; page++)
        s->seen[page] &= (uint8_t)~MF_PAGEMAP_WRITTEN;
}

/*
 * What is to be said of a page that the file holds.
 *
 * CURRENT: the destination holds a copy and the page was not written since it was protected. Its
 * contents can have changed all the same, in one way: it was punched, which does not count as
 * written, and read again, which made it a page of zeros. So a copy of bytes is current only while
 * the page has bytes.
 */
static enum mf_frame_type classify(struct sender *s, uint32_t region, uint64_t page)
{
    const struct mf_region *r = &s->mover->region[region];
    const uint8_t byte = mf_page_load(&s->mover->view.pages[region], page);
    const uint8_t copied = byte & MF_PAGE_COPY_MASK;
    const bool zero = reads_as_zeros(s, r, page);
    if (copied && !(s->seen[page - s->seen_first] & MF_PAGEMAP_WRITTEN)) {
        if (copied == (zero ? MF_PAGE_COPIED_ZERO : MF_PAGE_COPIED))
            return MF_FRAME_CURRENT;
    } else if (copied && mf_page_state_of(byte) == MF_PAGE_UNSENT) {
        count(&s->mover->figures->dirty_pages, 1);
    }
    return zero ? MF_FRAME_ZERO : MF_FRAME_DATA;
}

static uint64_t longest_run(const struct mf_region *r)
{
    return r->page_bytes >= SENDER_BATCH_BYTES ? 1 : SENDER_BATCH_BYTES / r->page_bytes;
}

/* One call instead of a fault for every sixteenth page; a failure only means those faults. Pages
 * that were copied are mapped already, and what was sent is not looked at. */
static void populate(const struct sender *s, uint32_t region, uint64_t first, uint64_t end)
{
    const struct mf_region *r = &s->mover->region[region];
    const struct mf_pages *states = &s->mover->view.pages[region];
    unsigned fresh = 0;
    if (r->kind != MF_MEMORY_TMPFS)
        return;
    for (uint64_t page = first; page < end && fresh <= FAULT_AROUND_PAGES; page++) {
        const uint8_t byte = mf_page_load(states, page);
        fresh += !(byte & MF_PAGE_COPY_MASK) && mf_page_state_of(byte) == MF_PAGE_UNSENT;
    }
    if (fresh > FAULT_AROUND_PAGES)
        madvise(r->map + first * r->page_bytes, (end - first) * r->page_bytes, MADV_POPULATE_READ);
}

/* Pages that the file holds: runs of the same answer. */
static int offer_present(struct sender *s, uint32_t region, uint64_t first, uint64_t end,
                         bool again)
{
    const struct mf_region *r = &s->mover->region[region];
    const struct mf_pages *states = &s->mover->view.pages[region];
    uint64_t page = first, run = first;
    enum mf_frame_type type = MF_FRAME_DATA;
    if (r->kind == MF_MEMORY_PRIVATE) {
        int error = 0, result = private_fetch(s, region, first, end, &error);
        if (result < 0 || error < 0)
            return result < 0 ? result : private_failed(s->mover, region, error);
    }
    populate(s, region, first, end);
    while (page < end) {
        const bool sent = mf_page_state_of(mf_page_load(states, page)) == MF_PAGE_SENT;
        const enum mf_frame_type next = sent && !again ? type : classify(s, region, page);
        const bool full = type == MF_FRAME_DATA && page - run == longest_run(r);
        if (page > run && (next != type || full || (sent && !again))) {
            int result = put_answer(s, type, false, region, run, page - run, again);
            if (result < 0)
                return result;
            run = page;
        }
        type = next;
        page++;
        if (sent && !again)
            run = page; /* somebody else has sent it */
    }
    return page > run ? put_answer(s, type, false, region, run, page - run, again) : 0;
}

/*
 * What [page, end) begins with: data or a hole, and up to where.
 *
 * A hole must not even be read: reading it through a mapping would allocate it. SEEK_HOLE would
 * name the end of the data in one call, but it looks at every page up to the next hole, which in a
 * well filled guest is most of its RAM; asked for every chunk that took more time than everything
 * else together. SEEK_DATA stops at the first page it finds, so it is asked page by page, and not
 * about pages that a scan of the VM's page tables has just found mapped. hugetlbfs knows no
 * SEEK_DATA and calls everything data.
 */
static int next_extent(const struct sender *s, const struct mf_region *r, uint64_t page,
                       uint64_t end, bool *data, uint64_t *until)
{
    const bool tracked = s->mover->pagemap_fd >= 0;
    if (r->kind == MF_MEMORY_PRIVATE) {
        private_extent(s, page, end, data, until);
        return 0;
    }
    for (uint64_t at = page;; at++) {
        if (tracked && at < end && (s->seen[at - s->seen_first] & MF_PAGEMAP_PRESENT))
            continue; /* the VM maps it: no hole */
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
    const struct mf_region *r = &s->mover->region[region];
    const uint64_t end = first + pages;
    uint64_t page = first;
    look_for_writes(s, region, first, pages);
    if (r->kind == MF_MEMORY_PRIVATE) {
        int result = private_look(s, region, first, pages);
        if (result < 0)
            return result;
    }
    while (page < end) {
        bool data = false;
        uint64_t until = end;
        int result = next_extent(s, r, page, end, &data, &until);
        if (result == 0)
            result = data ? offer_present(s, region, page, until, again)
                          : put_answer(s, MF_FRAME_ZERO, true, region, page, until - page, again);
        if (result < 0)
            return result;
        page = until;
    }
    return 0;
}

/* Of pages that the file holds: what is current is said so, and the rest is no copy any more. */
static int confirm_copied(struct sender *s, uint32_t region, uint64_t first, uint64_t end)
{
    const struct mf_region *r = &s->mover->region[region];
    const struct mf_pages *states = &s->mover->view.pages[region];
    uint64_t run = first;
    if (r->kind == MF_MEMORY_PRIVATE) {
        int error = 0, result = private_fetch(s, region, first, end, &error);
        if (result < 0 || error < 0)
            return result < 0 ? result : private_failed(s->mover, region, error);
    }
    for (uint64_t page = first; page <= end; page++) {
        bool current = false;
        if (page < end) {
            const bool unsent = mf_page_state_of(mf_page_load(states, page)) == MF_PAGE_UNSENT;
            const bool written = s->seen[page - s->seen_first] & MF_PAGEMAP_WRITTEN;
            current = unsent && classify(s, region, page) == MF_FRAME_CURRENT;
            /* Also of what was sent already: should its connection be lost, it is no copy. */
            if (written || (unsent && !current))
                mf_page_set_copied(states, page, 0);
        }
        if (current)
            continue;
        if (page > run) {
            int result = put_answer(s, MF_FRAME_CURRENT, false, region, run, page - run, false);
            if (result < 0)
                return result;
        }
        run = page + 1;
    }
    return 0;
}

int sender_confirm(struct sender *s, uint32_t region, uint64_t first, uint64_t pages)
{
    const struct mf_pages *states = &s->mover->view.pages[region];
    const uint64_t end = first + pages;
    look_for_writes(s, region, first, pages);
    if (s->mover->region[region].kind == MF_MEMORY_PRIVATE) {
        int r = private_look(s, region, first, pages);
        if (r < 0)
            return r;
    }
    for (uint64_t page = first; page < end;) {
        uint8_t copied = 0;
        const uint64_t run = mf_page_run_of(states, MF_PAGE_COPY_MASK, page, end, &copied);
        uint64_t until = page + run;
        /* Punched meanwhile: a hole must not be read, and is no copy of bytes. */
        for (bool data; copied && page < until;) {
            uint64_t extent = until;
            int r = next_extent(s, &s->mover->region[region], page, until, &data, &extent);
            if (r == 0 && data)
                r = confirm_copied(s, region, page, extent);
            for (uint64_t hole = page; r == 0 && !data && hole < extent; hole++)
                mf_page_set_copied(states, hole, 0);
            if (r < 0)
                return r;
            page = extent;
        }
        page = until;
    }
    return 0;
}

/* ---- precopy rounds ---- */

/*
 * In every mapping that is known; one that is not has pages that count as written when it is. What
 * lies at an address may change: to protect another page than the one that is copied would lose
 * what was written to it. So it is looked up and named to the kernel inside the gate; the kernel
 * refuses (EAGAIN) as long as a change has not been read.
 */
static int protect(struct sender *s, uint32_t region, uint64_t first, uint64_t pages)
{
    const struct mover *mover = s->mover;
    const uint64_t page_bytes = mover->region[region].page_bytes;
    struct mf_range ranges[16];
    for (;;) {
        mf_gate_enter(s->lane);
        unsigned found = mf_layout_ranges(&mover->layout, region, first * page_bytes,
                                          pages * page_bytes, ranges, 16);
        int r = found > 16 ? -E2BIG : 0;
        for (unsigned i = 0; r == 0 && i < found; i++)
            r = mf_uffd_protect(mf_context_uffd(&mover->contexts, ranges[i].context),
                                ranges[i].start_addr, ranges[i].length_bytes);
        mf_gate_exit(s->lane);
        if (r != -EAGAIN || atomic_load_explicit(&mover->link.stop, memory_order_relaxed))
            return r;
        nanosleep(&(struct timespec){.tv_nsec = AGAIN_NS}, NULL);
    }
}

/*
 * What the destination holds of these pages is not what they are: it shall have zeros there.
 * @type: ZERO, or DISCARD for holes.
 *
 * It keeps its place among a page's DATA (I7): in a round only the one thread that took the page's
 * chunk sends anything of it, on its own connection; the rounds before have landed; and behind a
 * hole in this round nothing can follow but another round, or the answers after RELEASE.
 */
static int take_back(struct sender *s, enum mf_frame_type type, uint32_t region, uint64_t first,
                     uint64_t pages, uint8_t copied_now)
{
    const struct mf_pages *states = &s->mover->view.pages[region];
    const uint64_t end = first + pages;
    for (uint64_t page = first; page < end;) {
        uint8_t copied = 0;
        uint64_t run = mf_page_run_of(states, MF_PAGE_COPIED, page, end, &copied);
        if (copied) {
            int r = put_run(s, type, MF_FRAME_FLAG_ROUND, region, page, run);
            if (r < 0)
                return r;
        }
        for (uint64_t i = page; i < page + run; i++)
            mf_page_set_copied(states, i, copied_now);
        page += run;
    }
    return 0;
}

/*
 * Written pages that lie scattered are protected by one call for all of them: each protecting call
 * interrupts the processors that the guest runs on and waits for them, which for single pages takes
 * many times as long as sending them. The call finds anew what is written, so that nothing is
 * missed that was written since the first look.
 */
static void protect_scattered(struct sender *s, uint32_t region, uint64_t pages)
{
    struct mover *mover = s->mover;
    const uint64_t page_bytes = mover->region[region].page_bytes;
    unsigned runs = 0;
    for (uint64_t i = 0; i < pages; i++)
        runs += (s->seen[i] & MF_PAGEMAP_WRITTEN) && !(i && (s->seen[i - 1] & MF_PAGEMAP_WRITTEN));
    if (runs < SCATTERED_RUNS)
        return;
    struct mf_range range;
    /* This call, unlike the other one, protects whatever lies there, also while a change is unread.
     * So it is not for memory that moves; and should the first move come just now, the tracker,
     * which reads it behind this, puts all copies in doubt. */
    if (atomic_load_explicit(&mover->layout_moves, memory_order_relaxed))
        return;
    mf_gate_enter(s->lane);
    /* With several mappings each would have to be protected by the same call; that is rare. */
    if (mf_layout_ranges(&mover->layout, region, s->seen_first * page_bytes, pages * page_bytes,
                         &range, 1) != 1) {
        mf_gate_exit(s->lane);
        return;
    }
    const uint64_t at = range.offset_bytes / page_bytes - s->seen_first;
    int r = mf_pagemap_protect(mover->pagemap_fd, range.start_addr, range.length_bytes, page_bytes,
                               s->seen_once);
    if (mf_uffd_event_pending(mf_context_uffd(&mover->contexts, range.context)) > 0)
        atomic_store(&mover->protect_raced, true);
    mf_gate_exit(s->lane);
    for (uint64_t i = 0; i < range.length_bytes / page_bytes; i++) {
        if (r < 0)
            s->seen[at + i] |= MF_PAGEMAP_WRITTEN;
        else if (s->seen_once[i])
            s->seen[at + i] = MF_PAGEMAP_WRITTEN | MF_PAGEMAP_PRESENT | PROTECTED;
    }
}

/* A run that the file holds and that was written: protected first, so that what is written from now
 * on shows, then read. The bytes themselves are read when the batch is sent, which is later still.
 */
static int copy_run(struct sender *s, uint32_t region, uint64_t first, uint64_t end,
                    bool is_protected)
{
    const struct mf_region *r = &s->mover->region[region];
    const struct mf_pages *states = &s->mover->view.pages[region];
    if (!is_protected && protect(s, region, first, end - first) < 0)
        return take_back(s, MF_FRAME_ZERO, region, first, end - first,
                         0); /* can't be followed: sent after RELEASE */
    if (r->kind == MF_MEMORY_PRIVATE) {
        int error = 0, result = private_fetch(s, region, first, end, &error);
        if (result < 0)
            return result;
        if (error < 0) /* unmapped meanwhile, or it can't be read: that is for later */
            return take_back(s, MF_FRAME_ZERO, region, first, end - first, 0);
    }
    populate(s, region, first, end);
    count(&s->mover->figures->round_pages, end - first);
    for (uint64_t page = first; page < end;) {
        uint64_t run = page;
        int result;
        while (page < end && reads_as_zeros(s, r, page))
            page++;
        if (page > run) {
            result = take_back(s, MF_FRAME_ZERO, region, run, page - run, MF_PAGE_COPIED_ZERO);
        } else {
            do
                mf_page_set_copied(states, page++, MF_PAGE_COPIED);
            while (page < end && page - run < longest_run(r) && !reads_as_zeros(s, r, page));
            count(&s->mover->figures->data_pages, page - run);
            result = put_run(s, MF_FRAME_DATA, MF_FRAME_FLAG_ROUND, region, run, page - run);
        }
        if (result < 0)
            return result;
    }
    return 0;
}

/*
 * What was marked until it was looked at, a moment ago, is taken care of now: it is copied, or
 * found to be a hole. Before anything is protected: a mapping that goes from now on marks its pages
 * once more, and whatever was written through one that had gone before is in the copy.
 */
static void unmark(struct sender *s, uint32_t region, uint64_t first, uint64_t pages)
{
    const struct mf_pages *states = &s->mover->view.pages[region];
    if (!atomic_load_explicit(&s->mover->copies->marks, memory_order_acquire))
        return;
    for (uint64_t i = 0; i < pages; i++)
        mf_page_unmark(states, first + i, 1,
                       (uint8_t)((s->seen[i] & MF_PAGEMAP_WRITTEN ? MF_PAGE_STALE : 0) |
                                 (s->seen[i] & REMOVED ? MF_PAGE_REMOVED : 0)));
}

int sender_round(struct sender *s, uint32_t region, uint64_t first, uint64_t pages, bool all)
{
    const struct mf_region *r = &s->mover->region[region];
    const uint64_t end = first + pages;
    look_for_writes(s, region, first, pages);
    bool any = all;
    for (uint64_t i = 0; i < pages; i++) {
        if (all)
            s->seen[i] |= MF_PAGEMAP_WRITTEN;
        any = any || (s->seen[i] & (MF_PAGEMAP_WRITTEN | REMOVED));
    }
    if (!any)
        return 0;
    unmark(s, region, first, pages);
    if (r->kind == MF_MEMORY_PRIVATE) {
        int result = private_look(s, region, first, pages);
        if (result < 0)
            return result;
    }
    if (!all)
        protect_scattered(s, region, pages);
    for (uint64_t page = first; page < end;) {
        bool data = false;
        uint64_t until = end;
        int result = next_extent(s, r, page, end, &data, &until);
        if (result == 0 && !data)
            result = take_back(s, MF_FRAME_DISCARD, region, page, until - page, 0);
        for (uint64_t at = page; result == 0 && data && at < until;) {
            uint64_t run = at;
            const uint8_t is_protected = s->seen[at - first] & PROTECTED;
            while (at < until && (s->seen[at - first] & MF_PAGEMAP_WRITTEN) &&
                   (s->seen[at - first] & PROTECTED) == is_protected)
                at++;
            if (at > run)
                result = copy_run(s, region, run, at, is_protected);
            else
                at++;
        }
        if (result < 0)
            return result;
        page = until;
    }
    return 0;
}

uint64_t sender_count_dirty(struct sender *s, uint32_t region, uint64_t first, uint64_t pages)
{
    const struct mf_pages *states = &s->mover->view.pages[region];
    uint64_t dirty_pages = 0;
    look_for_writes(s, region, first, pages);
    for (uint64_t i = 0; i < pages; i++)
        dirty_pages += (s->seen[i] & MF_PAGEMAP_WRITTEN) &&
                       (mf_page_load(states, first + i) & MF_PAGE_COPY_MASK);
    return dirty_pages;
}
