/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * How landing is done fastest, and why not in one way.
 *
 * On tmpfs a run is received into a small buffer that stays in the processor's cache and written
 * with one pwrite(2). That is one copy more than receiving into a mapping, and still much faster:
 * write(2) of whole pages allocates without clearing them first, needs no page-table entry of ours
 * and takes no fault (doc/performance.md has the figures). It also means that a page is LANDING
 * only for as long as a copy within memory takes, never for as long as the network does.
 *
 * But write(2) holds the file's lock, and a bulk thread that is preempted with it would keep the
 * fault thread waiting. So that one, which lands single pages, stores through the second mapping.
 *
 * hugetlbfs has no write(2); its pages are received straight into the second mapping.
 *
 * Private memory has no file: land_private.c.
 */
#include "lib/land_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
/* Claimed at once: who waits for one of these pages waits for all. */
#define RUN_BYTES (64u * 1024u)

int land_punch(const struct mf_region *region, uint64_t first, uint64_t pages)
{
    if (region->fd < 0)
        return 0; /* private memory without a file to wait in */
    int r;
    do
        r = fallocate(region->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                      (off_t)(first * region->page_bytes), (off_t)(pages * region->page_bytes));
    while (r != 0 && errno == EINTR);
    return r == 0 ? 0 : -errno;
}

void land_finish_discard(const struct mf_lander *lander, uint32_t region, uint64_t page)
{
    int r = land_punch(&lander->resolver.region[region], page, 1);
    if (r < 0) {
        lander->ops->broken(lander->arg, region, r);
        return;
    }
    uint8_t was = mf_page_discard_finish(&lander->pages[region], page);
    if (was & MF_PAGE_AWAITED) {
        mf_resolve_page(&lander->resolver, region, page);
        lander->ops->served(lander->arg, region, page);
    }
    lander->ops->landed(lander->arg, MF_LANDED_DISCARDED, 1);
}

static int write_all(int fd, const uint8_t *from, uint64_t length_bytes, uint64_t offset_bytes)
{
    while (length_bytes > 0) {
        ssize_t n = pwrite(fd, from, length_bytes, (off_t)offset_bytes);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n < 0 ? -errno : -EIO;
        from += n;
        offset_bytes += (uint64_t)n;
        length_bytes -= (uint64_t)n;
    }
    return 0;
}

/* Through the mapping. Populating first turns "no memory" into an error instead of a signal. */
static int store(const struct mf_region *region, uint64_t first, uint64_t pages,
                 const uint8_t *from)
{
    uint8_t *to = region->map + first * region->page_bytes;
    if (madvise(to, pages * region->page_bytes, MADV_POPULATE_WRITE) != 0)
        return errno == EFAULT ? -ENOSPC : -errno;
    memcpy(to, from, pages * region->page_bytes);
    return 0;
}

/*
 * Not while an event is being taken up, so inside the gate. When it was read its thread goes on: it
 * may have punched the pages out before these bytes came, and the one who applies the event has not
 * said yet that they are discarded. Confirmed in between they would count as bytes that the punch
 * is still to take.
 */
static void confirm(const struct mf_lander *lander, uint32_t region, uint64_t first, uint64_t pages,
                    uint8_t *was)
{
    mf_gate_enter(lander->resolver.lane);
    for (uint64_t i = 0; i < pages; i++)
        was[i] = mf_page_confirm(&lander->pages[region], first + i);
    mf_gate_exit(lander->resolver.lane);
}

/* [first, first + pages): claimed by this call. */
static int land_run(const struct mf_lander *lander, uint32_t region_index, uint64_t first,
                    uint64_t pages, const uint8_t *from, bool round)
{
    const struct mf_region *region = &lander->resolver.region[region_index];
    const struct mf_pages *states = &lander->pages[region_index];
    uint64_t confirmed = 0;
    if (region->kind == MF_MEMORY_PRIVATE && !round) {
        int error = land_private(lander, region_index, first, pages, from, false, &confirmed);
        lander->ops->landed(lander->arg, MF_LANDED_DATA, confirmed);
        return error;
    }
    int r = lander->by_mapping ? store(region, first, pages, from)
                               : write_all(region->fd, from, pages * region->page_bytes,
                                           first * region->page_bytes);
    if (r < 0) {
        for (uint64_t page = first; page < first + pages; page++)
            if (mf_page_unclaim(states, page) & MF_PAGE_DISCARD)
                land_finish_discard(lander, region_index, page);
        return r;
    }
    if (round) {
        /* The guest still runs at the source: what this is worth is said after RELEASE. */
        for (uint64_t page = first; page < first + pages; page++)
            if (mf_page_land_unconfirmed(states, page, true) & MF_PAGE_DISCARD)
                land_finish_discard(lander, region_index, page);
        lander->ops->landed(lander->arg, MF_LANDED_ROUND, pages);
        return 0;
    }
    uint8_t was[RUN_BYTES / 4096];
    confirm(lander, region_index, first, pages, was);
    /* Almost always nothing was discarded; then this is one ioctl for the run. */
    uint64_t run = first;
    for (uint64_t page = first; page <= first + pages; page++) {
        const bool discarded = page < first + pages && (was[page - first] & MF_PAGE_DISCARD);
        if (page < first + pages && !discarded)
            continue;
        if (page > run)
            mf_resolve_run(&lander->resolver, region_index, run, page - run);
        for (confirmed += page - run; run < page; run++)
            if (was[run - first] & MF_PAGE_FAULTED)
                lander->ops->served(lander->arg, region_index, run);
        if (discarded)
            land_finish_discard(lander, region_index, page);
        run = page + 1;
    }
    lander->ops->landed(lander->arg, MF_LANDED_DATA, confirmed);
    return 0;
}

int mf_land_data(const struct mf_lander *lander, const struct mf_frame *frame,
                 const uint8_t *payload)
{
    const struct mf_pages *states = &lander->pages[frame->region];
    const uint64_t page_bytes = lander->resolver.region[frame->region].page_bytes;
    const uint64_t end = frame->first_page + frame->pages;
    uint64_t page = frame->first_page;
    while (page < end) {
        uint64_t first = page;
        while (page < end && (page - first) * page_bytes < RUN_BYTES && mf_page_claim(states, page))
            page++;
        if (page > first) {
            int r = land_run(lander, frame->region, first, page - first,
                             payload + (first - frame->first_page) * page_bytes,
                             frame->flags & MF_FRAME_FLAG_ROUND);
            if (r < 0)
                return r;
        } else {
            page++; /* CONFIRMED, DISCARDED, or another thread's: these bytes are dropped */
        }
    }
    return 0;
}

int mf_land_begin_huge(const struct mf_lander *lander, const struct mf_frame *frame, uint8_t **to)
{
    const struct mf_region *region = &lander->resolver.region[frame->region];
    uint8_t *at = region->map + frame->first_page * region->page_bytes;
    *to = NULL;
    if (!mf_page_claim(&lander->pages[frame->region], frame->first_page))
        return 0;
    if (madvise(at, region->page_bytes, MADV_POPULATE_WRITE) != 0) {
        int r = -errno;
        mf_land_end_huge(lander, frame, false);
        return r;
    }
    *to = at;
    return 0;
}

void mf_land_end_huge(const struct mf_lander *lander, const struct mf_frame *frame, bool arrived)
{
    const struct mf_pages *states = &lander->pages[frame->region];
    const bool round = frame->flags & MF_FRAME_FLAG_ROUND;
    uint8_t was;
    if (!arrived)
        was = mf_page_unclaim(states, frame->first_page);
    else if (round)
        was = mf_page_land_unconfirmed(states, frame->first_page, true);
    else
        confirm(lander, frame->region, frame->first_page, 1, &was);
    if (was & MF_PAGE_DISCARD) {
        land_finish_discard(lander, frame->region, frame->first_page);
        return;
    }
    if (!arrived)
        return;
    if (round) {
        lander->ops->landed(lander->arg, MF_LANDED_ROUND, 1);
        return;
    }
    mf_resolve_run(&lander->resolver, frame->region, frame->first_page, 1);
    if (was & MF_PAGE_FAULTED)
        lander->ops->served(lander->arg, frame->region, frame->first_page);
    lander->ops->landed(lander->arg, MF_LANDED_DATA, 1);
}

struct zero_waiter {
    const struct mf_lander *lander;
    uint32_t region;
};

static void zero_waiter(void *argument, uint64_t page)
{
    struct zero_waiter *z = argument;
    mf_resolve_page(&z->lander->resolver, z->region, page);
    z->lander->ops->served(z->lander->arg, z->region, page);
}

/* Zeros over what a precopy round brought: the bytes must go first. */
static uint64_t zero_landed(const struct mf_lander *lander, const struct mf_frame *frame,
                            uint64_t first, uint64_t pages)
{
    const struct mf_pages *states = &lander->pages[frame->region];
    const struct mf_region *region = &lander->resolver.region[frame->region];
    uint64_t confirmed = 0;
    for (uint64_t page = first; page < first + pages; page++) {
        if (!mf_page_claim(states, page))
            continue;
        int r = land_punch(region, page, 1);
        if (r < 0)
            lander->ops->broken(lander->arg, frame->region, r);
        uint8_t was = r < 0 ? mf_page_unclaim(states, page)
                      : frame->flags & MF_FRAME_FLAG_ROUND
                          ? mf_page_land_unconfirmed(states, page, false)
                          : mf_page_confirm(states, page);
        if (was & MF_PAGE_DISCARD) {
            land_finish_discard(lander, frame->region, page);
            continue;
        }
        if (r < 0 || frame->flags & MF_FRAME_FLAG_ROUND)
            continue;
        confirmed++;
        if (was & MF_PAGE_AWAITED) {
            mf_resolve_page(&lander->resolver, frame->region, page);
            lander->ops->served(lander->arg, frame->region, page);
        }
    }
    return confirmed;
}

void mf_land_zero(const struct mf_lander *lander, const struct mf_frame *frame)
{
    const struct mf_pages *states = &lander->pages[frame->region];
    struct zero_waiter z = {lander, frame->region};
    const uint64_t end = frame->first_page + frame->pages;
    uint64_t confirmed = 0;
    for (uint64_t page = frame->first_page; page < end;) {
        uint8_t landed = 0;
        uint64_t run = mf_page_run_of(states, MF_PAGE_LANDED | MF_PAGE_TORN, page, end, &landed);
        if (landed)
            confirmed += zero_landed(lander, frame, page, run);
        else if (!(frame->flags & MF_FRAME_FLAG_ROUND))
            /* Nothing lies in the file here: it was empty when the VM was armed. */
            confirmed += mf_page_confirm_empty(states, page, run, zero_waiter, &z);
        page += run;
    }
    lander->ops->landed(lander->arg,
                        frame->flags & MF_FRAME_FLAG_HOLE ? MF_LANDED_HOLE : MF_LANDED_ZERO,
                        confirmed);
}

/* Not what another thread is landing at this moment: the guest could write to it under that
 * thread's hands. */
static void resolve_confirmed(const struct mf_lander *lander, uint32_t region, uint64_t page,
                              uint64_t end)
{
    const struct mf_pages *states = &lander->pages[region];
    while (page < end) {
        uint8_t state = 0;
        uint64_t run = mf_page_run_of(states, MF_PAGE_STATE_MASK, page, end, &state);
        if (state == MF_PAGE_CONFIRMED)
            mf_resolve_run(&lander->resolver, region, page, run);
        page += run;
    }
}

void mf_land_current(const struct mf_lander *lander, const struct mf_frame *frame)
{
    const struct mf_pages *states = &lander->pages[frame->region];
    struct zero_waiter z = {lander, frame->region};
    const uint64_t end = frame->first_page + frame->pages;
    uint64_t confirmed = 0;
    for (uint64_t page = frame->first_page; page < end;) {
        /* Where a round brought bytes they can be mapped at once; the rest is holes. */
        uint8_t landed = 0;
        uint64_t run = mf_page_run_of(states, MF_PAGE_LANDED | MF_PAGE_TORN, page, end, &landed);
        if (landed & MF_PAGE_TORN) {
            page += run; /* a later answer broke off over it: it is named as missing again */
            continue;
        }
        if (landed && lander->resolver.region[frame->region].kind == MF_MEMORY_PRIVATE) {
            confirmed += land_private_current(lander, frame->region, page, page + run);
            page += run;
            continue;
        }
        confirmed += mf_page_confirm_empty(states, page, run, zero_waiter, &z);
        if (landed)
            resolve_confirmed(lander, frame->region, page, page + run);
        page += run;
    }
    lander->ops->landed(lander->arg, MF_LANDED_CURRENT, confirmed);
}

struct present {
    const struct mf_lander *lander;
    uint32_t region;
    uint64_t waiting[16];
    unsigned waiting_count;
};

/* One ioctl will serve the run, so who waits is only remembered; where many wait, not all are. */
static void present_waiter(void *argument, uint64_t page)
{
    struct present *p = argument;
    if (p->waiting_count < sizeof(p->waiting) / sizeof(p->waiting[0])) {
        p->waiting[p->waiting_count++] = page;
        return;
    }
    mf_resolve_page(&p->lander->resolver, p->region, page);
    p->lander->ops->served(p->lander->arg, p->region, page);
}

static void land_present_run(const struct mf_lander *lander, uint32_t region, uint64_t first,
                             uint64_t pages)
{
    struct present p = {.lander = lander, .region = region};
    uint64_t confirmed =
        mf_page_confirm_empty(&lander->pages[region], first, pages, present_waiter, &p);
    if (confirmed == 0)
        return;
    if (pages == 1) /* may be a hole */
        mf_resolve_page(&lander->resolver, region, first);
    else /* at a hole who waits faults again, and is given zeros */
        resolve_confirmed(lander, region, first, first + pages);
    while (p.waiting_count > 0)
        lander->ops->served(lander->arg, region, p.waiting[--p.waiting_count]);
    lander->ops->landed(lander->arg, MF_LANDED_CURRENT, confirmed);
}

void mf_land_present(const struct mf_lander *lander, uint32_t region, uint64_t first,
                     uint64_t pages)
{
    for (uint64_t page = first; page < first + pages;) {
        uint8_t poisoned; /* nobody would fault again at a hole: one by one */
        uint64_t run = mf_page_run_of(&lander->pages[region], MF_PAGE_POISONED, page, first + pages,
                                      &poisoned);
        run = poisoned ? 1 : run;
        land_present_run(lander, region, page, run);
        page += run;
    }
}

/* Take [first, first + pages), which are LANDING + DISCARD of this thread's, out of the file. */
static int discard_held(const struct mf_lander *lander, uint32_t region, uint64_t first,
                        uint64_t pages)
{
    int r = land_punch(&lander->resolver.region[region], first, pages);
    for (uint64_t page = first; r == 0 && page < first + pages; page++)
        if (mf_page_discard_finish(&lander->pages[region], page) & MF_PAGE_FAULTED) {
            mf_resolve_wake(&lander->resolver, region, page);
            lander->ops->served(lander->arg, region, page);
        }
    return r;
}

void mf_land_discard(const struct mf_lander *lander, uint32_t region, uint64_t first,
                     uint64_t pages, bool all)
{
    const struct mf_pages *states = &lander->pages[region];
    const uint64_t end = first + pages;
    uint64_t missing = 0, held = 0; /* so many in a row before `page` */
    int error = 0;
    for (uint64_t page = first; page < end; page++) {
        const uint8_t was = mf_page_discard(states, page, all);
        const bool landing = mf_page_state_of(was) == MF_PAGE_LANDING; /* its lander finishes it */
        const bool holds = mf_page_discard_held(was, all);
        missing += !landing && !mf_page_resolvable(was);
        if (!landing && !holds && (was & MF_PAGE_FAULTED)) {
            mf_resolve_wake(&lander->resolver, region, page);
            lander->ops->served(lander->arg, region, page);
        }
        held += holds;
        if (held > 0 && (!holds || page + 1 == end)) {
            const uint64_t behind = holds ? page + 1 : page;
            int r = discard_held(lander, region, behind - held, held);
            error = r < 0 ? r : error;
            held = 0;
        }
    }
    if (error < 0)
        lander->ops->broken(lander->arg, region, error);
    lander->ops->landed(lander->arg, MF_LANDED_DISCARDED, missing);
}
