/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Landing in private anonymous memory.
 *
 * There is no file to land in: UFFDIO_COPY gives the target a page with the bytes, and from that
 * moment the target has it. It can't be overwritten or taken out again from outside. So what a
 * precopy round brings, which may be sent again, waits in a memfd (the region's file, filled as any
 * RAM file is) and is copied when it is confirmed; what comes confirmed is copied straight from
 * where it was received.
 *
 * Order of state and ioctl. With a file the state is stored first: the bytes are safe in the file.
 * Here the target's page is the only place where they are safe, so: claimed, copied, then
 * CONFIRMED. If this process dies in between, its successor finds LANDING, which counts as
 * UNCONFIRMED, and is sent the same bytes again: the copy then fails with EEXIST where the page is
 * there already, and that is right, whatever the target has made of it since. I1 holds, for only
 * bytes that are known to be right are ever copied.
 *
 * A page is copied to every place where it is mapped: after fork(2) parent and child each miss a
 * page of their own, and are owed the same bytes.
 *
 * Nothing may be copied after it was discarded or to where it is not mapped any more: lib/gate.h.
 */
#include "lib/land_internal.h"

#include <errno.h>
#include <time.h>

#include "lib/uffd.h"

#define RUN_PAGES 16u

/*
 * One look at the layout, one ioctl for each place. Inside the gate.
 * Return: 0; -EAGAIN: again, when the event has been read in @context; -E2BIG: the kernel did not
 * take it whole, page by page then; -EBUSY: it is owed to a context that is held; another -errno:
 * no memory.
 */
static int copy_once(const struct mf_resolver *resolver, uint32_t region, uint64_t first,
                     uint64_t pages, const uint8_t *from, uint32_t *context)
{
    const uint64_t page_bytes = resolver->region[region].page_bytes;
    struct mf_range range;
    uint32_t cursor = 0;
    /* It may be mapped where only an event to come tells. */
    if (atomic_load_explicit(&resolver->layout->owed, memory_order_acquire))
        return -EAGAIN;
    while (mf_layout_next(resolver->layout, region, first * page_bytes, pages * page_bytes, &cursor,
                          &range)) {
        const struct mf_context *at = mf_context_at(resolver->contexts, range.context);
        const int uffd = mf_context_uffd(resolver->contexts, range.context);
        if (at && mf_zeros_any(at->zeros, region, range.offset_bytes / page_bytes,
                               range.length_bytes / page_bytes)) {
            if (pages > 1)
                return -E2BIG;
            continue; /* discarded here, while others still want it */
        }
        if (at && at->held)
            return pages > 1 ? -E2BIG : -EBUSY;
        const uint8_t *bytes = from + (range.offset_bytes - first * page_bytes);
        uint64_t done_bytes = 0;
        *context = range.context;
        int r = mf_uffd_copy(uffd, range.start_addr, bytes, range.length_bytes, &done_bytes);
        if (r == 0 || r == -ESRCH) /* the process is gone */
            continue;
        if (r == -EAGAIN && done_bytes == 0)
            return -EAGAIN;
        if (pages > 1)
            return -E2BIG;
        if (r != -EEXIST && r != -ENOENT)
            return r;
        /* The kernel looks for the mapping after it has looked for an event, so what is moved away
         * in between is ENOENT too: its event is on the way. */
        if (r == -ENOENT && mf_uffd_event_pending(uffd) != 0)
            return -EAGAIN;
        /* EEXIST: it has the page. ENOENT: it is not mapped there in a way of which no event tells
         * (MADV_DONTFORK); who waits, if anybody does, must not wait for ever. */
        mf_uffd_wake(uffd, range.start_addr, range.length_bytes);
    }
    return 0;
}

static uint64_t until_discarded(const struct mf_pages *states, uint64_t first, uint64_t pages)
{
    uint64_t n = 0;
    while (n < pages && !(mf_page_load(states, first + n) & MF_PAGE_DISCARD))
        n++;
    return n;
}

/* Pages that are discarded are left out. */
static int copy(const struct mf_lander *lander, uint32_t region, uint64_t first, uint64_t pages,
                const uint8_t *from)
{
    const uint64_t page_bytes = lander->resolver.region[region].page_bytes;
    uint64_t step = pages;
    unsigned attempt = 0;
    for (uint64_t at = 0; at < pages;) {
        uint64_t n = pages - at < step ? pages - at : step;
        uint32_t context = 0;
        mf_gate_enter(lander->resolver.lane);
        n = until_discarded(&lander->pages[region], first + at, n);
        int r = n ? copy_once(&lander->resolver, region, first + at, n, from + at * page_bytes,
                              &context)
                  : 0;
        mf_gate_exit(lander->resolver.lane);
        if (r == -E2BIG) {
            step = 1;
        } else if (r == -EAGAIN) {
            mf_resolve_wait(&lander->resolver, context, attempt++);
        } else if (r < 0) {
            return r;
        } else {
            at += n ? n : 1;
            attempt = 0;
        }
    }
    return 0;
}

int land_private(const struct mf_lander *lander, uint32_t region, uint64_t first, uint64_t pages,
                 const uint8_t *from, bool staged, uint64_t *confirmed)
{
    const struct mf_pages *states = &lander->pages[region];
    *confirmed = 0;
    int r = copy(lander, region, first, pages, from);
    for (uint64_t page = first; page < first + pages; page++) {
        uint8_t was = r == 0   ? mf_page_place(states, page)
                      : staged ? mf_page_land_unconfirmed(states, page, true)
                               : mf_page_unclaim(states, page);
        if (was & MF_PAGE_DISCARD) {
            land_finish_discard(lander, region, page);
            continue;
        }
        if (r < 0)
            continue;
        ++*confirmed;
        if (was & MF_PAGE_FAULTED) {
            /* The copy woke who waited, and whoever came since finds the page. */
            lander->ops->served(lander->arg, region, page);
        }
        staged = staged || (was & MF_PAGE_LANDED);
    }
    if (r == 0 && staged) {
        int error = land_punch(&lander->resolver.region[region], first, pages);
        if (error < 0)
            lander->ops->broken(lander->arg, region, error);
    }
    return r;
}

uint64_t land_private_current(const struct mf_lander *lander, uint32_t region, uint64_t first,
                              uint64_t end)
{
    const struct mf_region *r = &lander->resolver.region[region];
    const struct mf_pages *states = &lander->pages[region];
    uint64_t confirmed = 0;
    for (uint64_t page = first; page < end;) {
        uint64_t run = page, done = 0;
        while (page < end && page - run < RUN_PAGES && mf_page_claim(states, page))
            page++;
        if (page == run) {
            page++; /* somebody else has it */
            continue;
        }
        int error = land_private(lander, region, run, page - run, r->map + run * r->page_bytes,
                                 true, &done);
        if (error < 0) /* it is named as missing again; not at once, for memory is short */
            nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
        confirmed += done;
    }
    return confirmed;
}
