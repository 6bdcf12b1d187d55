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
void mf_resolve_wait(const struct mf_resolver *resolver, unsigned attempt)
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
            mf_resolve_wait(resolver, attempt++);
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

/* ZEROPAGE at each of the places, inside the gate. Return: 0, or -EAGAIN or -ENOMEM if a place is
 * to be tried again. */
static int zero_places(const struct mf_resolver *resolver, const struct mf_range *ranges,
                       unsigned count)
{
    int again = 0;
    for (unsigned i = 0; i < count; i++) {
        const int uffd = resolver->context_fd[ranges[i].context];
        uint64_t done_bytes = 0;
        int r = mf_uffd_zeropage(uffd, ranges[i].start_addr, ranges[i].length_bytes, &done_bytes);
        if (r == -EAGAIN || r == -ENOMEM)
            again = r;
        else if (r < 0 && r != -ESRCH) /* EEXIST: it has the page. ENOENT: it is gone. */
            mf_uffd_wake(uffd, ranges[i].start_addr, ranges[i].length_bytes);
    }
    return again;
}

static void wait_after(const struct mf_resolver *resolver, int error, unsigned attempt)
{
    if (error == -ENOMEM) /* comes back or does not; until then whoever waits goes on waiting */
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    mf_resolve_wait(resolver, attempt);
}

static void give_private_zeros(const struct mf_resolver *resolver, uint32_t region, uint64_t page)
{
    const uint64_t page_bytes = resolver->region[region].page_bytes;
    struct mf_range ranges[MF_MAPPINGS_MAX];
    for (unsigned attempt = 0;; attempt++) {
        mf_gate_enter(resolver->gate);
        unsigned count = mf_layout_ranges(resolver->layout, region, page * page_bytes, page_bytes,
                                          ranges, MF_MAPPINGS_MAX);
        int r = zero_places(resolver, ranges, count);
        mf_gate_leave(resolver->gate);
        if (r == 0)
            return;
        wait_after(resolver, r, attempt);
    }
}

void mf_resolve_zeros(const struct mf_resolver *resolver, uint32_t context, uint64_t addr)
{
    struct mf_mapping mapping;
    const struct mf_range place = {
        .start_addr = addr & ~UINT64_C(4095), .length_bytes = 4096, .context = context};
    for (unsigned attempt = 0;; attempt++) {
        mf_gate_enter(resolver->gate);
        int r = 0;
        /* What has come to lie there meanwhile is served by its own fault. */
        if (mf_layout_find(resolver->layout, context, addr, &mapping) &&
            mapping.region == MF_REGION_ZEROS)
            r = zero_places(resolver, &place, 1);
        else
            mf_uffd_wake(resolver->context_fd[context], place.start_addr, place.length_bytes);
        mf_gate_leave(resolver->gate);
        if (r == 0)
            return;
        wait_after(resolver, r, attempt);
    }
}

void mf_resolve_page(const struct mf_resolver *resolver, uint32_t region_index, uint64_t page)
{
    const struct mf_region *region = &resolver->region[region_index];
    if (region->kind == MF_MEMORY_PRIVATE) {
        give_private_zeros(resolver, region_index, page);
        return;
    }
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
            mf_resolve_wait(resolver, attempt);
        }
    }
}
