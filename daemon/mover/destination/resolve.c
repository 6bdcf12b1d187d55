/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Resolving: what the kernel's answers mean (doc/kernel.md has them as a table).
 *
 * Whoever calls has stored the state first (I1). A page may be mapped at several addresses, or at none any
 * more; between the look at the layout and the ioctl a mapping may go away, which the kernel answers with
 * ENOENT, and the UNMAP event then takes it out of the layout.
 */
#include "daemon/mover/destination/destination.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <time.h>

#include "lib/uffd.h"
#include "lib/util.h"

#define RANGES_MAX 32u

void resolve_done(struct resolver *resolver, uint32_t region, uint64_t page)
{
    uint64_t since_ns = fault_table_take(resolver->table, region, page);
    if (since_ns)
        mf_histogram_add(&resolver->mover->figures->faults, mf_now_ns() - since_ns);
}

/* EAGAIN without progress: an event is unread, or its victim has not run on yet. Soon it has. */
static void wait_for_event(struct resolver *resolver, unsigned attempt)
{
    resolver->on_event(resolver->arg);
    if (attempt < 8)
        sched_yield();
    else
        nanosleep(&(struct timespec){.tv_nsec = attempt < 64 ? 20000 : 1000000}, NULL);
}

void resolve_run(struct resolver *resolver, uint32_t region, uint64_t first, uint64_t pages)
{
    struct mover *mover = resolver->mover;
    const uint64_t page_bytes = mover->region[region].page_bytes;
    struct mf_range ranges[RANGES_MAX];
    unsigned count = mf_layout_ranges(&mover->layout, region, first * page_bytes,
                                      pages * page_bytes, ranges, RANGES_MAX);
    /* Pages beyond the table's room are resolved when they are touched. */
    for (unsigned i = 0; i < count && i < RANGES_MAX; i++) {
        const int uffd = mover->context_fd[ranges[i].context];
        uint64_t at = ranges[i].start_addr, end = at + ranges[i].length_bytes;
        unsigned attempt = 0;
        while (at < end) {
            uint64_t done_bytes = 0;
            int r = mf_uffd_continue(uffd, at, end - at, &done_bytes);
            at += done_bytes;
            if (r == 0)
                break;
            if (done_bytes > 0) {
                attempt = 0;
                continue;
            }
            if (r == -EAGAIN) {
                wait_for_event(resolver, attempt++);
            } else if (r == -EEXIST) {
                /* Mapped already; those who came later than that must be told. */
                mf_uffd_wake(uffd, at, page_bytes);
                at += page_bytes;
            } else if (r == -EFAULT) {
                at += page_bytes; /* punched meanwhile: a later touch is a MISSING fault */
            } else {
                break; /* ENOENT: unmapped or moved; ESRCH: the process is gone */
            }
        }
    }
}

/* Give zeros for a hole. */
static int give_zeros(struct resolver *resolver, const struct region *region, uint64_t page,
                      int uffd, uint64_t addr)
{
    uint64_t done_bytes = 0;
    (void)resolver;
    if (region->kind != MF_MEMORY_HUGETLB)
        return mf_uffd_zeropage(uffd, addr, region->page_bytes, &done_bytes);
    /* hugetlbfs has no ZEROPAGE: allocate the page, which is zeroed, and map it. */
    if (fallocate(region->fd, FALLOC_FL_KEEP_SIZE, (off_t)(page * region->page_bytes),
                  region->page_bytes) != 0)
        return -errno;
    return mf_uffd_continue(uffd, addr, region->page_bytes, &done_bytes);
}

void resolve_page(struct resolver *resolver, uint32_t region_index, uint64_t page)
{
    struct mover *mover = resolver->mover;
    const struct region *region = &mover->region[region_index];
    struct mf_range ranges[RANGES_MAX];
    unsigned count = mf_layout_ranges(&mover->layout, region_index, page * region->page_bytes,
                                      region->page_bytes, ranges, RANGES_MAX);
    for (unsigned i = 0; i < count && i < RANGES_MAX; i++) {
        const int uffd = mover->context_fd[ranges[i].context];
        const uint64_t addr = ranges[i].start_addr;
        for (unsigned attempt = 0;; attempt++) {
            uint64_t done_bytes = 0;
            int r = mf_uffd_continue(uffd, addr, ranges[i].length_bytes, &done_bytes);
            if (r == -EFAULT)
                r = give_zeros(resolver, region, page, uffd, addr);
            if (r == -EEXIST) {
                /* Either it is mapped (wake), or ZEROPAGE met a page that just came: once more. */
                r = mf_uffd_continue(uffd, addr, ranges[i].length_bytes, &done_bytes);
                if (r == -EEXIST)
                    r = mf_uffd_wake(uffd, addr, ranges[i].length_bytes);
            }
            if (r != -EAGAIN && r != -EFAULT)
                break;
            wait_for_event(resolver, attempt);
        }
    }
}
