/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib/resolve.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <time.h>

#include "lib/uffd.h"

/* Of one page or run; mappings beyond this are resolved when they are touched. */
#define RANGES_MAX 32u

/* EAGAIN without progress: an event is unread, or its victim has not run on yet. Soon it has. */
static void wait_for_event(const struct mf_resolver *resolver, unsigned attempt)
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

static void continue_range(const struct mf_resolver *resolver, int uffd, uint64_t at, uint64_t end,
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

void mf_resolve_run(const struct mf_resolver *resolver, uint32_t region, uint64_t first,
                    uint64_t pages)
{
    const uint64_t page_bytes = resolver->region[region].page_bytes;
    struct mf_range ranges[RANGES_MAX];
    unsigned count = mf_layout_ranges(resolver->layout, region, first * page_bytes,
                                      pages * page_bytes, ranges, RANGES_MAX);
    for (unsigned i = 0; i < count && i < RANGES_MAX; i++)
        continue_range(resolver, resolver->context_fd[ranges[i].context], ranges[i].start_addr,
                       ranges[i].start_addr + ranges[i].length_bytes, page_bytes);
}

void mf_resolve_wake(const struct mf_resolver *resolver, uint32_t region, uint64_t page)
{
    const uint64_t page_bytes = resolver->region[region].page_bytes;
    struct mf_range ranges[RANGES_MAX];
    unsigned count = mf_layout_ranges(resolver->layout, region, page * page_bytes, page_bytes,
                                      ranges, RANGES_MAX);
    for (unsigned i = 0; i < count && i < RANGES_MAX; i++)
        mf_uffd_wake(resolver->context_fd[ranges[i].context], ranges[i].start_addr,
                     ranges[i].length_bytes);
}

/* Give zeros for a hole. */
static int give_zeros(const struct mf_region *region, uint64_t page, int uffd, uint64_t addr)
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

void mf_resolve_page(const struct mf_resolver *resolver, uint32_t region_index, uint64_t page)
{
    const struct mf_region *region = &resolver->region[region_index];
    struct mf_range ranges[RANGES_MAX];
    unsigned count = mf_layout_ranges(resolver->layout, region_index, page * region->page_bytes,
                                      region->page_bytes, ranges, RANGES_MAX);
    for (unsigned i = 0; i < count && i < RANGES_MAX; i++) {
        const int uffd = resolver->context_fd[ranges[i].context];
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
