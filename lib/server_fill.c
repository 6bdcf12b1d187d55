/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib/server.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/ioctl.h>

#include "lib/uffd.h"
#include "lib/util.h"

#define AGAIN_NS UINT64_C(100000000)

static void count(_Atomic uint64_t *figure, uint64_t more)
{
    atomic_fetch_add_explicit(figure, more, memory_order_relaxed);
}

/* ---- what landing tells ---- */

static void served(void *server, uint32_t region, uint64_t page)
{
    (void)server;
    (void)region;
    (void)page;
}

static void landed(void *argument, enum mf_landed what, uint64_t pages)
{
    struct memferry_server *s = argument;
    if (pages == 0 || what == MF_LANDED_ROUND)
        return;
    count(what == MF_LANDED_DATA        ? &s->data_pages
          : what == MF_LANDED_CURRENT   ? &s->present_pages
          : what == MF_LANDED_DISCARDED ? &s->discarded_pages
                                        : &s->zero_pages,
          pages);
    atomic_fetch_sub(&s->missing_pages, pages);
}

static void broken(void *argument, uint32_t region, int error)
{
    struct memferry_server *s = argument;
    const struct memferry_failure failure = {
        .struct_bytes = sizeof(failure), .region = region, .error = error};
    if (s->options.on_failure)
        s->options.on_failure(s->options.arg, &failure);
}

/* The thread that serves reads events. Where none does at the moment, whoever fills has to: nobody
 * else would end its EAGAIN. Faults that it reads are served by the next one that serves. */
static void read_if_nobody_does(void *argument, uint32_t context)
{
    struct memferry_server *s = argument;
    if (!server_try_turn(s))
        return;
    if (!s->closing)
        server_read_any(s, context);
    const bool faults = s->events.fault_count > 0;
    server_give_turn(s);
    if (faults)
        server_wake(s);
}

struct mf_lander server_lander(struct memferry_server *s)
{
    static const struct mf_lander_ops ops = {served, landed, broken};
    return (struct mf_lander){.resolver = {.region = s->region,
                                           .layout = &s->layout,
                                           .contexts = &s->contexts,
                                           .on_event = read_if_nobody_does,
                                           .arg = s},
                              .pages = s->pages,
                              .ops = &ops,
                              .arg = s};
}

struct mf_gate_lane *server_lane(struct memferry_server *s)
{
    /* Threads share lanes, but neighbours rarely the same one. */
    static _Thread_local unsigned mine;
    static _Atomic unsigned next;
    if (mine == 0)
        mine = 1 + atomic_fetch_add(&next, 1) % SERVER_LANES;
    struct mf_gate_lane *lane = atomic_load_explicit(&s->lane[mine - 1], memory_order_acquire);
    if (lane)
        return lane;
    pthread_mutex_lock(&s->jobs_lock);
    lane = atomic_load(&s->lane[mine - 1]);
    if (!lane) {
        lane = mf_gate_join(&s->gate); /* there are more than these */
        atomic_store_explicit(&s->lane[mine - 1], lane, memory_order_release);
    }
    pthread_mutex_unlock(&s->jobs_lock);
    return lane;
}

void server_discard(void *argument, uint32_t region, uint64_t first, uint64_t pages)
{
    struct memferry_server *s = argument;
    s->applying = true; /* on_failure may be told */
    mf_land_discard(&s->lander, region, first, pages, false);
    s->applying = false;
}

/* ---- what could not be had ---- */

/* Inside the gate. Return: 0, -EAGAIN: an event is unread, -ENOMEM, -EOPNOTSUPP: the kernel can't
 * (before Linux 6.6). */
static int poison_place(int uffd, const struct mf_range *place)
{
    struct uffdio_poison arg = {.range = {.start = place->start_addr, .len = place->length_bytes}};
    if (uffd < 0 || ioctl(uffd, UFFDIO_POISON, &arg) == 0)
        return 0;
    switch (errno) {
    case EAGAIN:
        return -EAGAIN;
    case ENOMEM:
        return -ENOMEM;
    case EINVAL:
        return -EOPNOTSUPP;
    }
    /* EEXIST: it has the page. ENOENT: it is not mapped there any more. Who waits sees for himself.
     */
    mf_uffd_wake(uffd, place->start_addr, place->length_bytes);
    return 0;
}

/* Whoever waits for it dies. From now on whoever makes it resolvable resolves it; who did so before
 * that was seen may have been overtaken by this. */
static int poison(const struct mf_lander *lander, uint32_t region, uint64_t page)
{
    const struct mf_pages *pages = &lander->pages[region];
    if (!mf_page_poison(pages, page))
        return 0; /* it is here, or comes at this moment */
    int r = mf_resolve_each_place(&lander->resolver, region, page, poison_place, false);
    uint8_t byte = r == -EOPNOTSUPP ? mf_page_fault(pages, page) : mf_page_load(pages, page);
    const bool copied = lander->resolver.region[region].kind == MF_MEMORY_PRIVATE &&
                        (byte & MF_PAGE_PLACED); /* which overwrites it, or was there before */
    if (mf_page_resolvable(byte) && !copied)
        mf_resolve_page(&lander->resolver, region, page);
    return r;
}

/* Let all who wait fault again, a little later. */
static void again(struct memferry_server *s)
{
    uint64_t none = 0;
    if (atomic_compare_exchange_strong(&s->again_at_ns, &none, mf_now_ns() + AGAIN_NS))
        server_wake(s);
}

void server_failed(struct memferry_server *s, const struct mf_lander *lander, uint32_t region,
                   uint64_t first, uint64_t pages, int error)
{
    const uint64_t end = first + pages;
    while (first < end && !(mf_page_load(&s->pages[region], first) & MF_PAGE_FAULTED))
        first++;
    pages = end - first;
    if (pages == 0)
        return;
    const struct memferry_failure failure = {.struct_bytes = sizeof(failure),
                                             .region = region,
                                             .error = error,
                                             .first_page = first,
                                             .pages = pages};
    int remedy = MEMFERRY_AGAIN;
    if (s->options.on_failure)
        remedy = s->options.on_failure(s->options.arg, &failure);
    if (remedy == MEMFERRY_HOLD)
        return;
    bool later = remedy != MEMFERRY_POISON;
    for (uint64_t page = first; page < end; page++) {
        if (remedy == MEMFERRY_POISON)
            later |= poison(lander, region, page) == -ENOMEM;
        else
            mf_page_unfault(&s->pages[region], page);
    }
    if (later)
        again(s);
}

/* ---- filling ---- */

int server_check_run(const struct memferry_server *s, uint32_t region, uint64_t first,
                     uint64_t pages)
{
    if (region >= atomic_load(&s->region_count))
        return server_fail(EINVAL, "there is no region %u", region);
    const uint64_t all = s->region[region].pages;
    if (first > all || pages > all - first)
        return server_fail(EINVAL, "pages %llu to %llu go beyond the %llu of region %u",
                           (unsigned long long)first, (unsigned long long)first + pages,
                           (unsigned long long)all, region);
    return 0;
}

/* A page of hugetlbfs: into the second mapping, as there is no write(2). */
static int land_huge(const struct mf_lander *lander, const struct mf_frame *frame,
                     const uint8_t *bytes)
{
    uint8_t *to;
    int r = mf_land_begin_huge(lander, frame, &to);
    if (r < 0 || !to)
        return r;
    memcpy(to, bytes, lander->resolver.region[frame->region].page_bytes);
    mf_land_end_huge(lander, frame, true);
    return 0;
}

static int land_bytes(const struct mf_lander *lander, struct mf_frame frame, const uint8_t *bytes)
{
    const struct mf_region *region = &lander->resolver.region[frame.region];
    if (region->kind != MF_MEMORY_HUGETLB)
        return mf_land_data(lander, &frame, bytes);
    const uint64_t end = frame.first_page + frame.pages;
    int r = 0;
    for (frame.pages = 1; r == 0 && frame.first_page < end; frame.first_page++) {
        r = land_huge(lander, &frame, bytes);
        bytes += region->page_bytes;
    }
    return r;
}

int server_land(struct memferry_server *s, const struct mf_lander *lander,
                enum memferry_answer answer, uint32_t region, uint64_t first, uint64_t pages,
                const void *bytes)
{
    const struct mf_frame frame = {.type = answer == MEMFERRY_DATA ? MF_FRAME_DATA : MF_FRAME_ZERO,
                                   .region = (uint16_t)region,
                                   .first_page = first,
                                   .pages = pages};
    if (answer == MEMFERRY_DATA) {
        int r = land_bytes(lander, frame, bytes);
        if (r == -EBUSY) { /* a context is held: it is asked for again when it may no longer be */
            for (uint64_t page = first; page < first + pages; page++)
                mf_page_unfault(&s->pages[region], page);
            again(s);
        } else if (r < 0) {
            server_failed(s, lander, region, first, pages, r);
        }
        return r;
    }
    if (answer == MEMFERRY_PRESENT)
        mf_land_present(lander, region, first, pages);
    else
        mf_land_zero(lander, &frame);
    return 0;
}

/* A provider may answer at once by filling: then this is the serving thread, which must read events
 * itself where they are in the way. */
static struct mf_lander own_lander(struct memferry_server *s)
{
    if (server_serves_here(s))
        return s->lander;
    struct mf_lander lander = server_lander(s);
    lander.resolver.lane = server_lane(s);
    return lander;
}

/* A fill may meet an event that is to be read first. That can't be while one is being applied. */
static int check_fill(const struct memferry_server *s, uint32_t region, uint64_t first,
                      uint64_t pages)
{
    if (server_serves_here(s) && s->applying)
        return server_fail(EDEADLK, "pages can't be filled while a change is being told");
    return server_check_run(s, region, first, pages);
}

static int fill(struct memferry_server *s, enum memferry_answer answer, uint32_t region,
                uint64_t first, uint64_t pages, const void *bytes)
{
    int r = check_fill(s, region, first, pages);
    if (r < 0 || pages == 0)
        return r;
    const struct mf_lander lander = own_lander(s);
    r = server_land(s, &lander, answer, region, first, pages, bytes);
    return r < 0 ? server_fail(-r, "cannot fill %llu pages of region %u: %s",
                               (unsigned long long)pages, region, strerror(-r))
                 : 0;
}

int memferry_fill(struct memferry_server *s, uint32_t region, uint64_t first_page, uint64_t pages,
                  const void *bytes)
{
    return fill(s, MEMFERRY_DATA, region, first_page, pages, bytes);
}

int memferry_fill_zero(struct memferry_server *s, uint32_t region, uint64_t first_page,
                       uint64_t pages)
{
    return fill(s, MEMFERRY_ZERO, region, first_page, pages, NULL);
}

int memferry_fill_present(struct memferry_server *s, uint32_t region, uint64_t first_page,
                          uint64_t pages)
{
    int r = server_check_run(s, region, first_page, pages);
    if (r == 0 && s->region[region].kind == MF_MEMORY_PRIVATE)
        return server_fail(EINVAL, "anonymous memory has no file in which pages could be present");
    return r < 0 ? r : fill(s, MEMFERRY_PRESENT, region, first_page, pages, NULL);
}

int memferry_fill_failed(struct memferry_server *s, uint32_t region, uint64_t first_page,
                         uint64_t pages, int error)
{
    int r = check_fill(s, region, first_page, pages);
    if (r < 0)
        return r;
    const struct mf_lander lander = own_lander(s);
    server_failed(s, &lander, region, first_page, pages, error);
    return 0;
}

int memferry_forget(struct memferry_server *s, uint32_t region, uint64_t first_page, uint64_t pages)
{
    int r = server_check_run(s, region, first_page, pages);
    if (r == 0)
        atomic_fetch_add(&s->missing_pages, mf_page_forget(&s->pages[region], first_page, pages));
    return r;
}

struct run {
    uint32_t region;
    uint64_t first, pages;
};

static int discard(struct memferry_server *s, void *argument)
{
    const struct run *run = argument;
    const struct mf_pages *pages = &s->pages[run->region];
    const uint64_t end = run->first + run->pages;
    for (uint64_t page = run->first; page < end;) {
        uint8_t poisoned; /* which punching does not take out of page tables */
        const uint64_t next = page + mf_page_run_of(pages, MF_PAGE_POISONED, page, end, &poisoned);
        mf_gate_close(&s->gate);
        s->applying = true;
        mf_land_discard(&s->lander, run->region, page, next - page, true);
        s->applying = false;
        mf_gate_open(&s->gate);
        for (; poisoned && page < next; page++)
            if (mf_page_resolvable(mf_page_load(pages, page)))
                mf_resolve_page(&s->lander.resolver, run->region, page);
        page = next;
    }
    return 0;
}

int memferry_discard(struct memferry_server *s, uint32_t region, uint64_t first_page,
                     uint64_t pages)
{
    struct run run = {region, first_page, pages};
    int r = server_check_run(s, region, first_page, pages);
    if (r == 0 && s->region[region].kind == MF_MEMORY_PRIVATE)
        return server_fail(EINVAL, "anonymous memory is discarded by madvise(2) in its process");
    return r < 0 ? r : server_do(s, discard, &run);
}

/* ---- looking ---- */

int memferry_page_state(const struct memferry_server *s, uint32_t region, uint64_t page)
{
    int r = server_check_run(s, region, page, 1);
    return r < 0 ? r : (int)mf_page_state_of(mf_page_load(&s->pages[region], page));
}

uint64_t memferry_next_missing(const struct memferry_server *s, uint32_t region,
                               uint64_t *first_page)
{
    return region < atomic_load(&s->region_count)
               ? mf_page_next_run(&s->pages[region], MF_PAGE_UNCONFIRMED, first_page)
               : 0;
}

uint64_t memferry_missing_pages(const struct memferry_server *s)
{
    return atomic_load(&s->missing_pages);
}
