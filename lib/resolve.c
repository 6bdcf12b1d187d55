/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib/resolve.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdbool.h>
#include <time.h>

#include "lib/uffd.h"

/* So many at a time: whoever reads events waits for those that are inside the gate. */
#define BYTES_AT_ONCE (256u * 1024u)

/* EAGAIN without progress: an event is unread, or its victim has not run on yet. Soon it has. */
void mf_resolve_wait(const struct mf_resolver *resolver, uint32_t context, unsigned attempt)
{
    resolver->on_event(resolver->arg, context);
    if (attempt < 8)
        sched_yield();
    else
        nanosleep(&(struct timespec){.tv_nsec = attempt < 64 ? 20000 : 200000}, NULL);
}

static bool lacks_memory(int error)
{
    return error == -ENOMEM || error == -ENOSPC;
}

/* Memory that is short comes back or does not; until then it is tried slowly. */
static void wait_for_memory(int error)
{
    if (lacks_memory(error))
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
}

/* Inside the gate. Who waits at a page that is not mapped by this is not served and must not wait
 * for ever: it faults again, and what is true then decides.
 * Return: 0, -EAGAIN: nothing more is to be had until an event was read; or what lacked. */
static int continue_range(int uffd, uint64_t at, uint64_t end, uint64_t page_bytes)
{
    uint64_t step = end - at;
    int lacking = 0;
    if (uffd < 0) /* gone, or held: who waits there faults again when it no longer is */
        return 0;
    while (at < end) {
        uint64_t done_bytes = 0;
        int r = mf_uffd_continue(uffd, at, end - at < step ? end - at : step, &done_bytes);
        at += done_bytes;
        if (r == 0 || done_bytes > 0)
            continue;
        if (r == -ESRCH)
            return 0; /* the process is gone */
        if (r == -EAGAIN)
            return r;
        if (r == -ENOENT && step > page_bytes) {
            /* A range is refused as a whole when an madvise(2) or mprotect(2) has split the
             * mapping, of which no event tells: page by page. */
            step = page_bytes;
            continue;
        }
        /* EEXIST: mapped already. EFAULT: punched meanwhile. */
        if (lacks_memory(r))
            lacking = r;
        mf_uffd_wake(uffd, at, page_bytes);
        at += page_bytes;
    }
    return lacking;
}

static void resolve_piece(const struct mf_resolver *resolver, uint32_t region,
                          uint64_t offset_bytes, uint64_t length_bytes)
{
    const uint64_t page_bytes = resolver->region[region].page_bytes;
    for (unsigned attempt = 0;; attempt++) {
        struct mf_range range;
        uint32_t cursor = 0;
        int r = 0;
        mf_gate_enter(resolver->lane);
        while (r != -EAGAIN && mf_layout_next(resolver->layout, region, offset_bytes, length_bytes,
                                              &cursor, &range))
            r = continue_range(mf_context_fill_uffd(resolver->contexts, range.context),
                               range.start_addr, range.start_addr + range.length_bytes, page_bytes);
        mf_gate_exit(resolver->lane);
        wait_for_memory(r);
        if (r != -EAGAIN)
            return;
        /* What is mapped by now is met again, as EEXIST. */
        mf_resolve_wait(resolver, range.context, attempt);
    }
}

void mf_resolve_run(const struct mf_resolver *resolver, uint32_t region, uint64_t first,
                    uint64_t pages)
{
    const uint64_t page_bytes = resolver->region[region].page_bytes;
    const uint64_t at_once = page_bytes < BYTES_AT_ONCE ? BYTES_AT_ONCE / page_bytes : 1;
    for (uint64_t done = 0; done < pages; done += at_once) {
        const uint64_t now = pages - done < at_once ? pages - done : at_once;
        resolve_piece(resolver, region, (first + done) * page_bytes, now * page_bytes);
    }
}

void mf_resolve_wake(const struct mf_resolver *resolver, uint32_t region, uint64_t page)
{
    const uint64_t page_bytes = resolver->region[region].page_bytes;
    struct mf_range range;
    uint32_t cursor = 0;
    mf_gate_enter(resolver->lane);
    while (mf_layout_next(resolver->layout, region, page * page_bytes, page_bytes, &cursor, &range))
        mf_uffd_wake(mf_context_uffd(resolver->contexts, range.context), range.start_addr,
                     range.length_bytes);
    mf_gate_exit(resolver->lane);
}

/* Inside the gate: one page at one address. Return: as continue_range(); -EFAULT: it is a hole of
 * hugetlbfs. */
static int give_page(const struct mf_region *region, int uffd, uint64_t addr)
{
    uint64_t done_bytes = 0;
    if (uffd < 0)
        return 0;
    int r = mf_uffd_continue(uffd, addr, region->page_bytes, &done_bytes);
    if (r == -EFAULT && region->kind == MF_MEMORY_HUGETLB)
        return r;
    if (r == -EFAULT)
        r = mf_uffd_zeropage(uffd, addr, region->page_bytes, &done_bytes);
    if (r == -EEXIST) /* ZEROPAGE may have met a page that just came */
        r = mf_uffd_continue(uffd, addr, region->page_bytes, &done_bytes);
    if (r == 0 || r == -ESRCH)
        return 0;
    if (r == -EAGAIN || r == -EFAULT) /* EFAULT: punched between the calls */
        return -EAGAIN;
    mf_uffd_wake(uffd, addr, region->page_bytes);
    return lacks_memory(r) ? r : 0;
}

/* ZEROPAGE of private memory, inside the gate. Return: 0, or -EAGAIN or -ENOMEM: to be tried
 * again. */
static int zero_place(int uffd, const struct mf_range *place)
{
    static const uint8_t zeros[4096];
    uint64_t done_bytes = 0;
    if (uffd < 0)
        return 0;
    int r = mf_uffd_zeropage(uffd, place->start_addr, place->length_bytes, &done_bytes);
    if (r == -EEXIST && place->length_bytes == sizeof(zeros)) /* a page, or UFFDIO_POISON's mark */
        r = mf_uffd_copy(uffd, place->start_addr, zeros, sizeof(zeros), &done_bytes);
    if (r == -EAGAIN || r == -ENOMEM)
        return r;
    if (r < 0 && r != -ESRCH) /* EEXIST: it has the page. ENOENT: it is gone. */
        mf_uffd_wake(uffd, place->start_addr, place->length_bytes);
    return 0;
}

int mf_resolve_each_place(const struct mf_resolver *resolver, uint32_t region, uint64_t page,
                          mf_resolve_place_fn *fill, bool wait_for_room)
{
    const uint64_t page_bytes = resolver->region[region].page_bytes;
    for (unsigned attempt = 0;; attempt++) {
        struct mf_range range;
        uint32_t cursor = 0, context = 0;
        mf_gate_enter(resolver->lane);
        int r = atomic_load_explicit(&resolver->layout->owed, memory_order_acquire) ? -EAGAIN : 0;
        while (r == 0 && mf_layout_next(resolver->layout, region, page * page_bytes, page_bytes,
                                        &cursor, &range)) {
            r = fill(mf_context_fill_uffd(resolver->contexts, range.context), &range);
            context = range.context;
        }
        mf_gate_exit(resolver->lane);
        if (r != -EAGAIN && !(wait_for_room && lacks_memory(r)))
            return r;
        wait_for_memory(r);
        mf_resolve_wait(resolver, context, attempt);
    }
}

bool mf_resolve_reads_as_zeros(const struct mf_region *regions, const struct mf_contexts *contexts,
                               const struct mf_mapping *mapping, uint64_t addr)
{
    if (mapping->region == MF_REGION_ZEROS)
        return true;
    const struct mf_context *context = mf_context_at(contexts, mapping->context);
    const uint64_t offset_bytes = addr - mapping->start_addr + mapping->offset_bytes;
    return context && mf_zeros_any(context->zeros, mapping->region,
                                   offset_bytes / regions[mapping->region].page_bytes, 1);
}

void mf_resolve_zeros(const struct mf_resolver *resolver, uint32_t context, uint64_t addr)
{
    const uint64_t start = addr & ~UINT64_C(4095);
    for (unsigned attempt = 0;; attempt++) {
        struct mf_mapping mapping;
        int r = 0;
        mf_gate_enter(resolver->lane);
        /* What has come to lie there meanwhile is served by its own fault. */
        if (mf_layout_find(resolver->layout, context, addr, &mapping) &&
            mf_resolve_reads_as_zeros(resolver->region, resolver->contexts, &mapping, addr))
            r = zero_place(mf_context_fill_uffd(resolver->contexts, context),
                           &(struct mf_range){.start_addr = start, .length_bytes = 4096});
        else
            mf_uffd_wake(mf_context_uffd(resolver->contexts, context), start, 4096);
        mf_gate_exit(resolver->lane);
        if (r == 0)
            return;
        wait_for_memory(r);
        mf_resolve_wait(resolver, context, attempt);
    }
}

void mf_resolve_page(const struct mf_resolver *resolver, uint32_t region_index, uint64_t page)
{
    const struct mf_region *region = &resolver->region[region_index];
    const uint64_t page_bytes = region->page_bytes;
    if (region->kind == MF_MEMORY_PRIVATE) {
        mf_resolve_each_place(resolver, region_index, page, zero_place, true);
        return;
    }
    for (unsigned attempt = 0;; attempt++) {
        struct mf_range range;
        uint32_t cursor = 0;
        int r = 0;
        mf_gate_enter(resolver->lane);
        while (r != -EAGAIN && r != -EFAULT &&
               mf_layout_next(resolver->layout, region_index, page * page_bytes, page_bytes,
                              &cursor, &range))
            r = give_page(region, mf_context_fill_uffd(resolver->contexts, range.context),
                          range.start_addr);
        mf_gate_exit(resolver->lane);
        /* hugetlbfs has no ZEROPAGE: allocate the page, which is zeroed, and it can be mapped. That
         * takes a while, so not inside the gate. */
        if (r == -EFAULT && fallocate(region->fd, FALLOC_FL_KEEP_SIZE, (off_t)(page * page_bytes),
                                      (off_t)page_bytes) != 0)
            r = errno == EINTR ? -EAGAIN : -ENOMEM;
        wait_for_memory(r);
        if (r == -ENOMEM)
            mf_resolve_wake(resolver, region_index, page);
        if (r != -EAGAIN && r != -EFAULT)
            return;
        if (r == -EAGAIN)
            mf_resolve_wait(resolver, range.context, attempt);
    }
}
