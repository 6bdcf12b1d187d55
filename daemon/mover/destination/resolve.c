/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Resolving: what the kernel's answers mean (doc/kernel.md has them as a table).
 *
 * Whoever calls has stored the state first (I1). A page may be mapped at several addresses, or at
 * none any more; between the look at the layout and the ioctl a mapping may go away, which the
 * kernel answers with ENOENT, and the UNMAP event then takes it out of the layout.
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

/*
 * Whoever waits at @addr is not served: it must not wait for ever. It faults again, and what is
 * true then decides. Memory that is short comes back or does not; until then that is a slow circle.
 */
static void let_fault_again(int uffd, uint64_t addr, uint64_t length_bytes, int error)
{
    if (error == -ENOMEM || error == -ENOSPC)
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    mf_uffd_wake(uffd, addr, length_bytes);
}

static void continue_range(struct resolver *resolver, int uffd, uint64_t at, uint64_t end,
                           uint64_t page_bytes)
{
    uint64_t step = end - at;
    unsigned attempt = 0;
    while (at < end) {
        uint64_t done_bytes = 0;
        int r = mf_uffd_continue(uffd, at, end - at < step ? end - at : step, &done_bytes);
        at += done_bytes;
        if (r == 0 || done_bytes > 0) {
            attempt = 0;
        } else if (r == -ESRCH) {
            return; /* the process is gone */
        } else if (r == -EAGAIN) {
            wait_for_event(resolver, attempt++);
        } else if (r == -ENOENT && step > page_bytes) {
            /* A range is refused as a whole when a piece of it was unmapped, and also when an
             * madvise(2) or mprotect(2) has split the mapping, of which no event tells: page by
             * page. */
            step = page_bytes;
        } else {
            /* EEXIST: mapped already. EFAULT: punched meanwhile. ENOENT: unmapped or moved. */
            let_fault_again(uffd, at, page_bytes, r);
            at += page_bytes;
        }
    }
}

void resolve_run(struct resolver *resolver, uint32_t region, uint64_t first, uint64_t pages)
{
    struct mover *mover = resolver->mover;
    const uint64_t page_bytes = mover->region[region].page_bytes;
    struct mf_range ranges[RANGES_MAX];
    unsigned count = mf_layout_ranges(&mover->layout, region, first * page_bytes,
                                      pages * page_bytes, ranges, RANGES_MAX);
    /* Mappings beyond the table's room are resolved when they are touched. */
    for (unsigned i = 0; i < count && i < RANGES_MAX; i++)
        continue_range(resolver, mover->context_fd[ranges[i].context], ranges[i].start_addr,
                       ranges[i].start_addr + ranges[i].length_bytes, page_bytes);
}

void resolve_wake(struct resolver *resolver, uint32_t region, uint64_t page)
{
    struct mover *mover = resolver->mover;
    const uint64_t page_bytes = mover->region[region].page_bytes;
    struct mf_range ranges[RANGES_MAX];
    unsigned count =
        mf_layout_ranges(&mover->layout, region, page * page_bytes, page_bytes, ranges, RANGES_MAX);
    for (unsigned i = 0; i < count && i < RANGES_MAX; i++)
        mf_uffd_wake(mover->context_fd[ranges[i].context], ranges[i].start_addr,
                     ranges[i].length_bytes);
}

/* Give zeros for a hole. */
static int give_zeros(const struct region *region, uint64_t page, int uffd, uint64_t addr)
{
    uint64_t done_bytes = 0;
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
                r = give_zeros(region, page, uffd, addr);
            if (r == -EEXIST) /* ZEROPAGE may have met a page that just came */
                r = mf_uffd_continue(uffd, addr, ranges[i].length_bytes, &done_bytes);
            if (r == 0 || r == -ESRCH)
                break;
            if (r != -EAGAIN && r != -EFAULT) {
                let_fault_again(uffd, addr, ranges[i].length_bytes, r);
                break;
            }
            wait_for_event(resolver, attempt);
        }
    }
}
