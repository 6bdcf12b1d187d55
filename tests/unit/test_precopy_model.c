/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The way of every page from precopy rounds to the end, by the code of mover and lib (sender.c,
 * land.c, resolve.c, fault_table.c, the page states, the frames), against a model of memory: at the
 * end, and whenever the guest looks, a page at the destination must be what it was at the source
 * when the guest was frozen, or what the guest made of it since.
 *
 * Everything runs in one thread, and chance decides who goes next: threads of both movers, the
 * guest, discards, the loss of the link, a crash. In the middle of what one does others may come in
 * at every call that matters (precopy_hooks.h). RAM is real memory of this process; userfaultfd,
 * PAGEMAP_SCAN and the sockets are modelled as doc/kernel.md describes them. Connections keep their
 * order, and nothing else does.
 *
 * In some runs the small pages are private memory: the source's file is then what is read through
 * /proc/PID/mem, the destination's is where pages wait to be confirmed, and each of the places
 * where the destination maps them (a parent and the child it forked) has pages of its own.
 *
 * In some runs the source's guest moves, unmaps and maps its memory in between, and has children
 * that write to it without being seen. What that means is decided by the mover's own changes.c.
 *
 * A failure prints its seed; MF_SEED=that MF_RUNS=1 repeats it. Runs: MF_RUNS, else 3000.
 */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "daemon/mover/destination/destination.h"
#include "daemon/mover/source/changes.h"
#include "daemon/mover/source/sender.h"
#include "lib/pagemap.h"
#include "lib/uffd.h"
#include "lib/util.h"
#include "tests/unit/precopy_hooks.h"
#undef pwrite
#undef nanosleep
#undef mf_page_mark
#undef mf_page_unmark
#undef lseek
#undef memcpy
#undef pread
#undef madvise
#undef fallocate
#undef mf_is_zero
#undef mf_page_claim
#undef mf_page_confirm
#undef mf_page_place
#undef mf_page_unclaim
#undef mf_page_land_unconfirmed
#undef mf_page_mark_sent
#undef mf_page_set_copied
#undef mf_page_run_of
#undef mf_page_confirm_empty
#undef mf_page_discard_finish

#define REGIONS 2u /* small pages, and "huge" ones */
#define SMALL_MOST 72u
#define HUGE_MOST 3u
#define HUGE_BYTES SENDER_BATCH_BYTES /* the least of which a frame carries one */
#define FILE_BYTES (HUGE_MOST * HUGE_BYTES)
#define MOST SMALL_MOST
#define MAPS 2u  /* each region is mapped twice at the destination, once or twice at the source */
#define SPOTS 3u /* where mappings can lie: at the destination, mapping m at spot m */
#define CHUNK 16u
#define STREAMS_MOST 3u
#define URGENT STREAMS_MOST /* the connection behind the bulk ones */
#define QUEUE_BYTES (8u << 20)

enum phase { ROUNDS, FROZEN, RELEASED, SETTLING };
enum actor {
    SOURCE_BULK,
    SOURCE_URGENT = STREAMS_MOST,
    DEST_BULK,
    DEST_FAULTS = DEST_BULK + STREAMS_MOST,
    ACTORS
};

struct page_at {
    uint32_t region;
    uint64_t page;
};

static struct mover source, dest;
static struct mf_session_file source_file;
static struct mf_figures source_figures, dest_figures;
static struct fault_table table;
static struct sender *sender[STREAMS_MOST + 1];
static _Alignas(8) _Atomic uint8_t source_state[REGIONS][MOST], dest_state[REGIONS][MOST];
static uint8_t *guest_memory[REGIONS]; /* the source's RAM as its guest writes it */
static uint8_t *expected[REGIONS];     /* what the destination's guest must find */

static struct {
    uint8_t *bytes;
    size_t have, taken;
} queue[STREAMS_MOST + 1];
static struct page_at requests[4096];
static unsigned request_count;

static bool written[REGIONS][MAPS][MOST]; /* at the source, since it was protected */
static bool present[REGIONS][MAPS][MOST]; /* at the source: in the page table */
static bool mapped[REGIONS][MAPS][MOST];  /* at the destination */
static bool waiting[REGIONS][MAPS][MOST], wanted[REGIONS][MAPS][MOST];
static struct {
    struct page_at at;
    unsigned map;
} fault[REGIONS * MAPS * MOST];
static unsigned fault_count;

/* At the source. */
static unsigned spot[REGIONS][MAPS];   /* of a mapping that is there */
static bool is_there[REGIONS][MAPS];   /* it is mapped, … */
static bool is_watched[REGIONS][MAPS]; /* … and registered */
#define VICTIMS 3u
static struct unread {
    bool moved; /* else unmapped */
    uint32_t region;
    unsigned from, to; /* spots */
} unread[VICTIMS];     /* what the tracker has not read yet; each of those who did it waits */
static unsigned unread_count;
static bool tracker_reads, has_child, child_known, may_move, may_have_child;
static struct changes changes;
static uint32_t doubts; /* when the round began */

static bool private_kind; /* region 0 is private memory */
static unsigned places;   /* where it is mapped at the destination: 2 after a fork */
static uint8_t *private_memory[MAPS], *private_expected[MAPS];
static bool zeros_there[MAPS][SMALL_MOST]; /* discarded by one of two */

static enum phase phase;
static unsigned streams, round_number, rounds_wanted;
static bool confirm_first, tracked, source_vm_gone, cut, barrier_out[STREAMS_MOST];
static uint8_t chunk_taken[REGIONS][MOST]; /* so often in this pass */
static unsigned looked_chunks, source_maps;
static bool guest_runs_there, broken, may_discard, may_break, may_crash, may_fork, may_switch,
    protect_fails;
static unsigned barriers, hook_rate, depth;
static bool busy[ACTORS];
static jmp_buf crashed;
static bool crash_armed;
static unsigned weight[ACTORS + 3];
static uint64_t pass;

static uint64_t seed, random_state;

static uint32_t below(uint32_t limit)
{
    random_state += UINT64_C(0x9e3779b97f4a7c15);
    uint64_t z = random_state;
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return (uint32_t)((z ^ (z >> 31)) >> 32) % limit;
}

static bool trace;
#define TRACE(...)                                                                                 \
    do {                                                                                           \
        if (trace)                                                                                 \
            fprintf(stderr, __VA_ARGS__);                                                          \
    } while (0)

static _Noreturn void fail(const char *what, uint32_t region, uint64_t page)
{
    fprintf(stderr,
            "%s: region %u page %llu, source state %#x, destination state %#x, phase %u, round %u\n"
            "repeat it with MF_SEED=%llu MF_RUNS=1 (MF_TRACE=1 tells the story)\n",
            what, region, (unsigned long long)page, source_state[region][page],
            dest_state[region][page], (unsigned)phase, round_number, (unsigned long long)seed);
    exit(1);
}

static void must(bool condition, const char *what, uint32_t region, uint64_t page)
{
    if (!condition)
        fail(what, region, page);
}

/* ---- addresses: a region's spot m begins at (region * SPOTS + m + 1) << 32 ---- */

static uint64_t address(uint32_t region, unsigned map)
{
    return (uint64_t)(region * SPOTS + map + 1) << 32;
}

static unsigned decode(uint64_t addr, uint32_t *region, uint64_t *page)
{
    unsigned index = (unsigned)(addr >> 32) - 1;
    *region = index / SPOTS;
    *page = (addr & UINT32_MAX) / source.region[*region].page_bytes;
    return index % SPOTS;
}

/* ---- what the mover's code calls ---- */

static void somebody_else(void);
static bool is_hole(const struct mf_region *r, uint64_t page);

static bool is_private(uint32_t region)
{
    return private_kind && region == 0;
}

void model_hook(void)
{
    if (below(hook_rate) != 0)
        return;
    if (crash_armed && may_crash && phase == RELEASED && below(40) == 0)
        longjmp(crashed, 1);
    if (phase == RELEASED && !private_kind && below(300) == 0)
        source_vm_gone = true;
    if (depth >= 3)
        return;
    depth++;
    for (unsigned n = 1 + below(3); n > 0; n--)
        somebody_else();
    depth--;
}

static bool is_huge_file(int fd)
{
    return fd == source.region[1].fd || fd == dest.region[1].fd;
}

off_t model_lseek(int fd, off_t offset_bytes, int whence)
{
    model_hook();
    if (is_huge_file(fd) && whence == SEEK_DATA) /* as hugetlbfs: everything is data */
        return offset_bytes;
    return lseek(fd, offset_bytes, whence);
}

/* Short writes let others see a page that is half there. */
/* Of private memory: /proc/PID/mem, where the offset is the address; the guest runs meanwhile. */
ssize_t model_pread(int fd, void *to, size_t length_bytes, off_t offset_bytes)
{
    model_hook();
    if (!private_kind || fd != source.region[0].fd)
        return pread(fd, to, length_bytes, offset_bytes);
    uint32_t region = 0;
    uint64_t page = 0;
    const unsigned map = decode((uint64_t)offset_bytes, &region, &page);
    must(map == 0 && region == 0, "read from nowhere", region, page);
    size_t part = below(2) || length_bytes < 4096 ? length_bytes : length_bytes / 2;
    return pread(fd, to, part, offset_bytes - (off_t)address(0, 0));
}

ssize_t model_pwrite(int fd, const void *from, size_t length_bytes, off_t offset_bytes)
{
    model_hook();
    if (may_break && phase >= RELEASED && below(200) == 0) {
        errno = ENOSPC;
        return -1;
    }
    size_t part = below(2) ? length_bytes : 1 + below((uint32_t)length_bytes);
    return pwrite(fd, from, part, offset_bytes);
}

void *model_memcpy(void *to, const void *from, size_t length_bytes)
{
    const size_t half = length_bytes / 2;
    memcpy(to, from, half);
    model_hook();
    memcpy((uint8_t *)to + half, (const uint8_t *)from + half, length_bytes - half);
    model_hook();
    return to;
}

int ring_send_all(struct io_uring *ring, int fd, struct msghdr *msg)
{
    (void)ring;
    if (queue[fd].taken == queue[fd].have &&
        !busy[fd == (int)URGENT ? DEST_FAULTS : DEST_BULK + fd])
        queue[fd].have = queue[fd].taken = 0;
    for (size_t i = 0; i < msg->msg_iovlen; i++) {
        const struct iovec *v = &msg->msg_iov[i];
        if (queue[fd].have + v->iov_len > QUEUE_BYTES)
            fail("the model's queue is full", 0, 0);
        for (size_t at = 0; at < v->iov_len;) {
            size_t part = v->iov_len > 65536 ? v->iov_len / 2 : 2048;
            part = part < v->iov_len - at ? part : v->iov_len - at;
            memcpy(queue[fd].bytes + queue[fd].have, (uint8_t *)v->iov_base + at, part);
            queue[fd].have += part;
            at += part;
            if (v->iov_len > MF_FRAME_HEADER_BYTES)
                model_hook(); /* the guest may change the other half of the page */
        }
    }
    return broken ? -EPIPE : 0;
}

void sweep_pace(struct mover *mover, uint64_t bytes)
{
    (void)mover;
    (void)bytes;
}

void mover_wake(struct mover *mover)
{
    (void)mover;
}

void link_fail(struct mover *mover, const char *fmt, ...)
{
    (void)mover;
    (void)fmt;
    broken = true;
}

void mover_fatal(const char *fmt, ...)
{
    fail(fmt, 0, 0);
}

/* Which of the source's mappings lies there, MAPS: none.  */
static unsigned mapping_at(uint32_t region, unsigned at)
{
    for (unsigned m = 0; m < MAPS; m++)
        if (is_there[region][m] && spot[region][m] == at)
            return m;
    return MAPS;
}

static bool
    moved; /* what was mapped is there no more, as the last COPY found; its event is to come */

int mf_uffd_event_pending(int uffd)
{
    (void)uffd;
    return unread_count > 0 || moved;
}

int mf_pagemap_scan(int pagemap_fd, uint64_t start_addr, uint64_t length_bytes, uint64_t page_bytes,
                    uint8_t *out)
{
    uint32_t region;
    uint64_t first;
    unsigned map = decode(start_addr, &region, &first);
    if (pagemap_fd < 0 || source_vm_gone)
        return -ESRCH;
    for (uint64_t i = 0; i < length_bytes / page_bytes; i++) {
        model_hook();
        const unsigned m = mapping_at(region, map);
        out[i] = MF_PAGEMAP_WRITTEN;
        if (m == MAPS)
            continue;
        if (!is_watched[region][m])
            return -EPERM;
        out[i] = (uint8_t)((written[region][m][first + i] ? MF_PAGEMAP_WRITTEN : 0) |
                           (present[region][m][first + i] ? MF_PAGEMAP_PRESENT : 0));
    }
    return 0;
}

int mf_pagemap_populated(int pagemap_fd, uint64_t start_addr, uint64_t length_bytes,
                         uint64_t page_bytes, uint8_t *out)
{
    uint32_t region;
    uint64_t first;
    decode(start_addr, &region, &first);
    must(pagemap_fd >= 0 && private_kind && region == 0, "not private memory", region, first);
    for (uint64_t i = 0; i < length_bytes / page_bytes; i++) {
        model_hook();
        out[i] = is_hole(&source.region[0], first + i) ? 0 : MF_PAGEMAP_PRESENT;
    }
    return 0;
}

int mf_pagemap_protect(int pagemap_fd, uint64_t start_addr, uint64_t length_bytes,
                       uint64_t page_bytes, uint8_t *out)
{
    uint32_t region;
    uint64_t first;
    unsigned map = decode(start_addr, &region, &first);
    if (pagemap_fd < 0 || source_vm_gone)
        return -ESRCH;
    for (uint64_t i = 0; i < length_bytes / page_bytes; i++) {
        model_hook();
        if (protect_fails && below(40) == 0)
            return -EIO; /* pages before this one are protected */
        out[i] = 0;
        const unsigned m = mapping_at(region, map);
        if (m == MAPS)
            continue;
        if (!is_watched[region][m])
            return -EPERM;
        if (!written[region][m][first + i] || !present[region][m][first + i])
            continue;
        written[region][m][first + i] = false;
        out[i] = MF_PAGEMAP_WRITTEN | MF_PAGEMAP_PRESENT;
    }
    return 0;
}

int mf_uffd_protect(int uffd, uint64_t start_addr, uint64_t length_bytes)
{
    uint32_t region;
    uint64_t first;
    unsigned map = decode(start_addr, &region, &first);
    (void)uffd;
    for (uint64_t i = 0; i < length_bytes / source.region[region].page_bytes; i++) {
        model_hook();
        if (unread_count > 0)
            return -EAGAIN;
        const unsigned m = mapping_at(region, map);
        must(m < MAPS, "protected what is not there", region, first + i);
        if (protect_fails && below(10) == 0)
            return -ENOENT; /* pages before this one are protected */
        written[region][m][first + i] = false;
    }
    return 0;
}

static bool is_hole(const struct mf_region *r, uint64_t page)
{
    off_t at = (off_t)(page * r->page_bytes);
    off_t found = lseek(r->fd, at, SEEK_DATA);
    return found < 0 || (uint64_t)found / r->page_bytes != page;
}

static void let_guest_have(uint32_t region, unsigned map, uint64_t page)
{
    must(mf_page_resolvable(dest_state[region][page]), "resolved before it is confirmed (I1)",
         region, page);
    mapped[region][map][page] = true;
    waiting[region][map][page] = false;
}

int mf_uffd_continue(int uffd, uint64_t start_addr, uint64_t length_bytes, uint64_t *done_bytes)
{
    uint32_t region;
    uint64_t first;
    unsigned map = decode(start_addr, &region, &first);
    (void)uffd;
    const struct mf_region *r = &dest.region[region];
    *done_bytes = 0;
    must(!is_private(region), "CONTINUE on private memory", region, first);
    for (uint64_t page = first; page < first + length_bytes / r->page_bytes; page++) {
        model_hook();
        int error = mapped[region][map][page] ? -EEXIST : is_hole(r, page) ? -EFAULT : 0;
        if (error)
            return *done_bytes ? -EAGAIN : error;
        let_guest_have(region, map, page);
        *done_bytes += r->page_bytes;
    }
    return 0;
}

int mf_uffd_zeropage(int uffd, uint64_t start_addr, uint64_t length_bytes, uint64_t *done_bytes)
{
    uint32_t region;
    uint64_t page;
    unsigned map = decode(start_addr, &region, &page);
    const struct mf_region *r = &dest.region[region];
    (void)uffd;
    model_hook();
    if (is_private(region)) {
        if (mapped[0][map][page])
            return -EEXIST;
        if (below(16) == 0)
            return -EAGAIN;
        memset(private_memory[map] + page * 4096, 0, 4096);
        if (!zeros_there[map][page]) {
            must(!(dest_state[0][page] & MF_PAGE_PLACED), "zeros for bytes", 0, page);
            let_guest_have(0, map, page);
        }
        mapped[0][map][page] = true;
        waiting[0][map][page] = false;
        return 0;
    }
    if (mapped[region][map][page] || !is_hole(r, page))
        return -EEXIST;
    if (fallocate(r->fd, FALLOC_FL_KEEP_SIZE, (off_t)(page * r->page_bytes), r->page_bytes) != 0)
        fail("out of memory", region, page);
    let_guest_have(region, map, page);
    *done_bytes = length_bytes;
    return 0;
}

/* Others can't come in while the gate is held for as long as the kernel copies. */
int mf_uffd_copy(int uffd, uint64_t start_addr, const void *from, uint64_t length_bytes,
                 uint64_t *done_bytes)
{
    uint32_t region;
    uint64_t first;
    unsigned map = decode(start_addr, &region, &first);
    (void)uffd;
    *done_bytes = 0;
    must(is_private(region), "COPY to a file", region, first);
    must(phase != ROUNDS, "copied before it is known to be right", region, first);
    for (uint64_t page = first; page < first + length_bytes / 4096; page++) {
        model_hook();
        int error = mapped[0][map][page]                                ? -EEXIST
                    : below(80) == 0                                    ? -ENOENT
                    : below(40) == 0                                    ? -EAGAIN
                    : may_break && phase == RELEASED && below(300) == 0 ? -ENOMEM
                                                                        : 0;
        moved = error == -ENOENT;
        if (error)
            return *done_bytes ? -EAGAIN : error;
        must(mf_page_state_of(dest_state[0][page]) == MF_PAGE_LANDING &&
                 !(dest_state[0][page] & MF_PAGE_DISCARD) && !zeros_there[map][page],
             "copied although it is discarded, or not claimed", 0, page);
        memcpy(private_memory[map] + page * 4096, (const uint8_t *)from + *done_bytes, 4096);
        mapped[0][map][page] = true;
        waiting[0][map][page] = false;
        *done_bytes += 4096;
    }
    return 0;
}

int mf_uffd_wake(int uffd, uint64_t start_addr, uint64_t length_bytes)
{
    uint32_t region;
    uint64_t first;
    unsigned map = decode(start_addr, &region, &first);
    (void)uffd;
    for (uint64_t i = 0; i < length_bytes / dest.region[region].page_bytes; i++)
        waiting[region][map][first + i] = false;
    return 0;
}

static void nothing(void *arg, uint32_t context)
{
    (void)arg;
    (void)context;
}

/* ---- the guests ---- */

static void any_page(uint32_t *region, uint64_t *page)
{
    *region = source.region[1].pages && below(3) == 0;
    /* A hot set, so that a page meets several things. */
    uint64_t limit = source.region[*region].pages;
    *page = below(2) ? below((uint32_t)(limit < 6 ? limit : 6)) : below((uint32_t)limit);
}

static void scribble(uint8_t *at, uint32_t page_bytes)
{
    const uint64_t value = below(UINT32_MAX) + 1u;
    const uint32_t spots[] = {0, page_bytes / 2, page_bytes - 8};
    if (below(4) == 0) {
        memset(at, 0, page_bytes);
        return;
    }
    uint32_t which = below(4);
    for (uint32_t i = 0; i < 3; i++)
        if (which == 3 || which == i)
            memcpy(at + spots[i], &value, sizeof(value));
}

static void punch_file(const struct mf_region *r, uint64_t page)
{
    if (fallocate(r->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)(page * r->page_bytes),
                  r->page_bytes) != 0)
        fail("cannot punch", 0, page);
}

static void fresh_mapping(uint32_t region, unsigned map)
{
    for (uint64_t p = 0; p < MOST; p++) {
        written[region][map][p] = true; /* never protected */
        present[region][map][p] = false;
    }
}

/* A thread that changes the layout, and waits until that was read. */
static void change_layout(void)
{
    const uint32_t region = source.region[1].pages && below(3) == 0;
    const unsigned map = below(MAPS);
    if (is_private(region) || unread_count == VICTIMS)
        return;
    unsigned to = below(SPOTS);
    if (!is_there[region][map]) {
        if (mapping_at(region, to) < MAPS)
            return;
        TRACE("  maps %u anew at %u\n", region, to);
        is_there[region][map] = true;
        is_watched[region][map] = false;
        spot[region][map] = to;
        fresh_mapping(region, map);
        return;
    }
    const unsigned from = spot[region][map];
    /* What is not watched is not told. */
    if (below(3)) {
        if (mapping_at(region, to) < MAPS)
            return;
        TRACE("  moves %u from %u to %u\n", region, from, to);
        if (is_watched[region][map])
            unread[unread_count++] = (struct unread){true, region, from, to};
        spot[region][map] = to;
        return;
    }
    if (!is_watched[region][map])
        return; /* it came and went unseen: see doc/kernel.md */
    TRACE("  unmaps %u at %u\n", region, from);
    is_there[region][map] = false;
    unread[unread_count++] = (struct unread){false, region, from, from};
}

/* The child exists as soon as its parent's event was read. */
static void have_child(void)
{
    if (has_child && below(4) == 0) {
        TRACE("  the child ends\n");
        has_child = false;
    } else if (!has_child && !child_known && below(4) == 0) {
        TRACE("  forks\n");
        has_child = child_known = true;
        mf_copies_writer(source.copies, true, MF_DOUBT_FORK);
    }
}

static bool inside_at_source(void);

static bool known_still(void *arg, const struct mf_mapping *part)
{
    uint32_t region;
    uint64_t page;
    (void)arg;
    const unsigned at = decode(part->start_addr, &region, &page);
    return mapping_at(region, at) < MAPS;
}

/* lib/events.c's learning. */
static void learn_mapping(uint32_t region, unsigned at)
{
    struct mf_range dropped[2];
    const unsigned m = mapping_at(region, at);
    if (m == MAPS || is_private(region) || source.region[region].pages == 0)
        return;
    is_watched[region][m] = true;
    must(mf_layout_learn(&source.layout,
                         &(struct mf_mapping){.start_addr = address(region, at),
                                              .length_bytes = source.region[region].size_bytes,
                                              .region = region},
                         dropped) == 0,
         "no room", region, 0);
}

/* As tracker.c: one event, while nobody is inside the gate. */
static void tracker_step(void)
{
    struct mf_range dropped[1];
    if (tracker_reads)
        return;
    if (child_known && !has_child && below(3) == 0) {
        child_known = false;
        mf_copies_writer(source.copies, false, MF_DOUBT_FORK);
    }
    if (unread_count == 0 || inside_at_source())
        return;
    /* They queue their events in any order, but each its own one after the other. */
    const unsigned which = below(unread_count);
    const struct unread event = unread[which];
    const uint64_t bytes = source.region[event.region].size_bytes;
    const uint64_t from = address(event.region, event.from);
    TRACE("  tracker reads %s of %u at %u\n", event.moved ? "move" : "unmap", event.region,
          event.from);
    depth++; /* it may be interrupted, but not by itself */
    tracker_reads = true;
    if (event.moved) {
        learn_mapping(event.region, event.to);
        changes_moved(&changes, from, address(event.region, event.to), bytes);
        unread[which].moved = false; /* now the unmap of the old place */
    } else {
        changes_unmapped(&changes, from, from + bytes);
        mf_layout_unmap(&source.layout, 0, from, from + bytes, dropped);
        unread[which] = unread[--unread_count];
    }
    tracker_reads = false;
    depth--;
}

/* As tracker_look(): a round begins, or the guest is paused. */
static void tracker_looks(void)
{
    while (unread_count > 0)
        tracker_step();
    for (uint32_t region = 0; region < REGIONS; region++)
        for (unsigned at = 0; at < SPOTS; at++)
            learn_mapping(region, at);
}

int model_nanosleep(const struct timespec *time, struct timespec *left)
{
    (void)time;
    (void)left;
    tracker_step();
    return 0;
}

static void guest_at_source(void)
{
    uint32_t region;
    uint64_t page;
    any_page(&region, &page);
    const struct mf_region *r = &source.region[region];
    uint8_t *at = guest_memory[region] + page * r->page_bytes;
    if (may_move && below(16) == 0)
        change_layout();
    if (may_have_child && below(6) == 0)
        have_child();
    unsigned map = is_private(region) ? 0 : below(MAPS);
    if (!is_there[region][map])
        map = !is_private(region) && is_there[region][1 - map] ? 1 - map : MAPS;
    if (has_child && !is_private(region) && below(4) == 0) {
        TRACE("  the child writes %u:%llu\n", region, (unsigned long long)page);
        scribble(at, r->page_bytes);
        return;
    }
    if (map == MAPS)
        return;
    switch (below(8)) {
    case 0: /* a balloon, or free page reporting */
        for (uint64_t n = 1 + below(3); n > 0 && page < r->pages; n--, page++) {
            TRACE("  guest punches %u:%llu\n", region, (unsigned long long)page);
            punch_file(r, page);
            for (unsigned m = 0; m < MAPS; m++) {
                present[region][m][page] = false;
                /* What comes there next is a page that was never protected. */
                written[region][m][page] |= is_private(region);
            }
        }
        break;
    case 1: /* it reads: a hole becomes a page of zeros, and is not "written" */
        TRACE("  guest reads %u:%llu\n", region, (unsigned long long)page);
        if (is_private(region) && is_hole(r, page))
            break; /* the page of zeros, which counts as nothing */
        (void)*(volatile uint8_t *)at;
        present[region][map][page] = true;
        break;
    default:
        TRACE("  guest writes %u:%llu\n", region, (unsigned long long)page);
        written[region][map][page] = present[region][map][page] = true;
        scribble(at, r->page_bytes);
    }
}

/* In the place @map. Where there is no page yet: what a fault would bring. */
static void look_private(unsigned map, uint64_t page)
{
    static const uint8_t zeros[4096];
    const uint8_t *finds = zeros;
    if (mapped[0][map][page])
        finds = private_memory[map] + page * 4096;
    else if (!zeros_there[map][page])
        must(!(dest_state[0][page] & MF_PAGE_PLACED), "a page that was copied is not there", 0,
             page);
    if (memcmp(finds, private_expected[map] + page * 4096, 4096) != 0)
        fail("the process finds something else", 0, page);
}

static void look(uint32_t region, uint64_t page)
{
    const struct mf_region *r = &dest.region[region];
    if (is_private(region)) {
        for (unsigned map = 0; map < places; map++)
            look_private(map, page);
        return;
    }
    if (memcmp(r->map + page * r->page_bytes, expected[region] + page * r->page_bytes,
               r->page_bytes) != 0)
        fail("the guest finds something else", region, page);
}

static void guest_at_destination(void)
{
    uint32_t region;
    uint64_t page;
    any_page(&region, &page);
    unsigned map = below(is_private(region) ? places : MAPS);
    const struct mf_region *r = &dest.region[region];
    if (!mapped[region][map][page]) {
        wanted[region][map][page] = true;
        if (waiting[region][map][page])
            return;
        TRACE("  guest faults on %u:%llu\n", region, (unsigned long long)page);
        waiting[region][map][page] = true;
        fault[fault_count].at = (struct page_at){region, page};
        fault[fault_count++].map = map;
        return;
    }
    wanted[region][map][page] = false;
    if (!guest_runs_there)
        return; /* the VMM loads device state */
    if (is_private(region)) {
        look_private(map, page);
        if (below(2)) {
            scribble(private_expected[map] + page * 4096, 4096);
            memcpy(private_memory[map] + page * 4096, private_expected[map] + page * 4096, 4096);
        }
        return;
    }
    look(region, page);
    if (below(2)) {
        TRACE("  guest there writes %u:%llu\n", region, (unsigned long long)page);
        scribble(expected[region] + page * r->page_bytes, r->page_bytes);
        memcpy(r->map + page * r->page_bytes, expected[region] + page * r->page_bytes,
               r->page_bytes);
    }
}

/* ---- threads of the destination's mover ---- */

struct fault_table *faults_table(struct mover *mover)
{
    (void)mover;
    return &table;
}

static struct mf_gate_lane *lanes[STREAMS_MOST];

/* A gate whose lanes nobody holds: a crash leaves them behind locked. */
static void new_gate(void)
{
    memset(&dest.gate, 0, sizeof(dest.gate));
    must(mf_gate_init(&dest.gate) == 0, "no gate", 0, 0);
    for (unsigned i = 0; i < STREAMS_MOST; i++)
        lanes[i] = mf_gate_join(&dest.gate);
}

/* The reader would have to wait. */
static bool somebody_is_inside(void)
{
    for (unsigned i = 0; i < STREAMS_MOST; i++) {
        if (pthread_mutex_trylock(&lanes[i]->lock) != 0)
            return true;
        pthread_mutex_unlock(&lanes[i]->lock);
    }
    return false;
}

static struct mf_lander lander_of(unsigned connection)
{
    struct mf_lander lander = account_lander(&dest, nothing, NULL);
    lander.by_mapping = connection == URGENT;
    lander.resolver.lane = connection == URGENT ? NULL : lanes[connection];
    return lander;
}

static void land(unsigned connection)
{
    struct mf_lander lander = lander_of(connection);
    struct mf_frame frame;
    const char *why = NULL;
    const size_t have = queue[connection].have - queue[connection].taken;
    if (have < MF_FRAME_HEADER_BYTES)
        return;
    uint8_t *at = queue[connection].bytes + queue[connection].taken;
    if (mf_frame_decode(at, &frame, &why) < 0 ||
        mf_frame_check(&frame, dest.frame_region, dest.region_count, true, &why) < 0)
        fail(why, frame.region, frame.first_page);
    if (have < MF_FRAME_HEADER_BYTES + frame.length_bytes)
        return; /* the rest is still under way */
    queue[connection].taken += MF_FRAME_HEADER_BYTES + frame.length_bytes;
    const uint8_t *payload = at + MF_FRAME_HEADER_BYTES;
    TRACE("  connection %u brings %u flags %u %u:%llu+%llu\n", connection, frame.type, frame.flags,
          frame.region, (unsigned long long)frame.first_page, (unsigned long long)frame.pages);
    must(phase >= FROZEN || (frame.flags & MF_FRAME_FLAG_ROUND), "confirmed while the guest runs",
         frame.region, frame.first_page);
    must(phase == ROUNDS || !(frame.flags & MF_FRAME_FLAG_ROUND), "a late frame of a round (I7)",
         frame.region, frame.first_page);
    if (frame.type == MF_FRAME_BARRIER) {
        must(frame.first_page == (phase == ROUNDS ? round_number : pass),
             "a barrier of another pass", 0, 0);
        barriers++;
    } else if (frame.type == MF_FRAME_DATA && frame.region == 1) {
        uint8_t *to = NULL;
        bool arrives = !(may_break && phase == RELEASED && below(10) == 0);
        if (mf_land_begin_huge(&lander, &frame, &to) < 0)
            fail("no memory", frame.region, frame.first_page);
        for (uint32_t part = 0; to && part < (arrives ? 4u : 2u); part++) {
            memcpy(to + part * (HUGE_BYTES / 4), payload + part * (HUGE_BYTES / 4), HUGE_BYTES / 4);
            model_hook();
        }
        if (to)
            mf_land_end_huge(&lander, &frame, arrives);
        broken |= !arrives;
    } else if (frame.type == MF_FRAME_DATA) {
        if (mf_land_data(&lander, &frame, payload) < 0)
            broken = true;
    } else if (frame.type == MF_FRAME_ZERO || frame.type == MF_FRAME_DISCARD) {
        mf_land_zero(&lander, &frame);
    } else {
        mf_land_current(&lander, &frame);
    }
}

/* As faults.c's serve(). */
static void serve_fault(void)
{
    unsigned which = below(fault_count), map = fault[which].map;
    struct page_at at = fault[which].at;
    fault[which] = fault[--fault_count];
    struct mf_lander lander = lander_of(URGENT);
    const struct mf_pages *states = &dest.view.pages[at.region];
    uint8_t byte = mf_page_load(states, at.page);
    if (!waiting[at.region][map][at.page])
        return;
    if (is_private(at.region) && zeros_there[map][at.page]) {
        mf_resolve_zeros(&lander.resolver, map, address(0, map) + at.page * 4096 + 17);
        return;
    }
    if (is_private(at.region) && mf_page_resolvable(byte) && (byte & MF_PAGE_PLACED)) {
        mf_resolve_wake(&lander.resolver, at.region, at.page);
        return;
    }
    if (!mf_page_resolvable(byte)) {
        if (byte & MF_PAGE_FAULTED)
            return;
        fault_table_add(&table, at.region, at.page, 1);
        model_hook();
        byte = mf_page_fault(states, at.page);
        if (!mf_page_resolvable(byte)) {
            requests[request_count++] = at;
            return;
        }
        fault_table_take(&table, at.region, at.page);
    }
    mf_resolve_page(&lander.resolver, at.region, at.page);
}

/* madvise(MADV_DONTNEED) by one of them: as lib/events.c's discard_range(). */
static void discard_private(uint64_t page)
{
    const unsigned map = below(places);
    struct mf_lander lander = lander_of(URGENT);
    const bool other = places == 2;
    if (somebody_is_inside() || zeros_there[map][page])
        return; /* the reader waits; nothing more is to be done */
    TRACE("  discard 0:%llu by %u\n", (unsigned long long)page, map);
    if (other)
        must(mf_zeros_set(&mf_context_at(&dest.contexts, map)->zeros, 0, dest.region[0].pages, page,
                          1) == 0,
             "no room", 0, page);
    zeros_there[map][page] = other;
    memset(private_expected[map] + page * 4096, 0, 4096);
    mapped[0][map][page] = waiting[0][map][page] = false;
    if (!other)
        mf_land_discard(&lander, 0, page, 1, false);
}

static void fork_it(void)
{
    struct mf_mapping mappings[MF_MAPPINGS_MAX];
    if (places == 2 || somebody_is_inside())
        return;
    TRACE("  forks\n");
    unsigned count = mf_layout_get(&dest.layout, mappings, MF_MAPPINGS_MAX);
    mappings[count] = mappings[0];
    must(mappings[0].region == 0 && mappings[0].start_addr == address(0, 0), "not its mapping", 0,
         0);
    mappings[count].context = 1;
    mappings[count++].start_addr = address(0, 1);
    mf_layout_set(&dest.layout, mappings, count);
    const uint64_t pages[MF_REGIONS_MAX] = {dest.region[0].pages, dest.region[1].pages};
    struct mf_zeros **zeros = &mf_context_at(&dest.contexts, 1)->zeros;
    must(mf_zeros_copy(mf_context_at(&dest.contexts, 0)->zeros, pages, zeros) == 0, "no memory", 0,
         0);
    memcpy(private_memory[1], private_memory[0], dest.region[0].size_bytes);
    memcpy(private_expected[1], private_expected[0], dest.region[0].size_bytes);
    memcpy(mapped[0][1], mapped[0][0], sizeof(mapped[0][1]));
    places = 2;
}

/* As the guest's balloon and faults.c's discard_range(): QEMU punches, then the event is read. */
static void discard(void)
{
    struct mf_lander lander = lander_of(URGENT);
    uint32_t region;
    uint64_t page;
    any_page(&region, &page);
    /* Rather one that somebody is landing. */
    for (unsigned tries = 0;
         tries < 8 && mf_page_state_of(dest_state[region][page]) != MF_PAGE_LANDING; tries++)
        any_page(&region, &page);
    const struct mf_region *r = &dest.region[region];
    if (is_private(region)) {
        discard_private(page);
        return;
    }
    TRACE("  discard %u:%llu\n", region, (unsigned long long)page);
    punch_file(r, page);
    memset(expected[region] + page * r->page_bytes, 0, r->page_bytes);
    for (unsigned map = 0; map < MAPS; map++)
        mapped[region][map][page] = false;
    const bool landing = mf_page_state_of(dest_state[region][page]) == MF_PAGE_LANDING;
    mf_land_discard(&lander, region, page, 1, true);
    if (landing && crash_armed && may_crash && below(4) == 0)
        longjmp(crashed, 1);
}

static void fault_thread(void)
{
    if (guest_runs_there && may_discard && below(depth ? 4 : 60) == 0)
        discard();
    else if (guest_runs_there && private_kind && may_fork && below(100) == 0)
        fork_it();
    else if (fault_count && below(2))
        serve_fault();
    else
        land(URGENT);
}

/* ---- threads of the source's mover ---- */

static struct mf_gate_lane *source_lanes[STREAMS_MOST];

static bool inside_at_source(void)
{
    for (unsigned i = 0; i < STREAMS_MOST; i++) {
        if (pthread_mutex_trylock(&source_lanes[i]->lock) != 0)
            return true;
        pthread_mutex_unlock(&source_lanes[i]->lock);
    }
    return false;
}

/* The first time along the row after precopy. Return: was there anything left to do? */
static bool look_step(struct sender *s)
{
    unsigned chunks_in_all = 0;
    for (uint32_t region = 0; region < REGIONS; region++)
        chunks_in_all += (unsigned)((source.region[region].pages + CHUNK - 1) / CHUNK);
    for (uint32_t region = 0; region < REGIONS; region++)
        for (uint64_t first = 0; first < source.region[region].pages; first += CHUNK) {
            if (chunk_taken[region][first / CHUNK])
                continue;
            chunk_taken[region][first / CHUNK] = 1;
            const uint64_t pages = source.region[region].pages - first;
            TRACE("  looks at %u:%llu\n", region, (unsigned long long)first);
            if (sender_confirm(s, region, first, pages < CHUNK ? pages : CHUNK) < 0)
                return true;
            if (++looked_chunks == chunks_in_all)
                source_file.looked = 1;
            return true;
        }
    return false;
}

static void sweep_step(unsigned stream)
{
    struct sender *s = sender[stream];
    const bool round = phase == ROUNDS;
    if (barrier_out[stream] || phase == SETTLING || broken)
        return;
    if (phase == FROZEN && !confirm_first)
        return;
    s->round = round;
    if (!round && source.pagemap_fd >= 0 && !source_file.looked && look_step(s))
        return;
    uint32_t region = source.region[1].pages && below(6) == 0;
    for (unsigned tries = 0; tries < REGIONS && !(round && cut); tries++, region ^= 1u) {
        const uint64_t pages = source.region[region].pages;
        const uint32_t chunks = (uint32_t)((pages + CHUNK - 1) / CHUNK);
        if (chunks == 0)
            continue;
        const uint32_t begin = below(chunks);
        for (uint32_t i = 0; i < chunks; i++) {
            const uint32_t chunk = (begin + i) % chunks;
            if (chunk_taken[region][chunk] >= (round ? 1 : 2))
                continue;
            chunk_taken[region][chunk] = round ? 1 : 2;
            const uint64_t first = chunk * CHUNK,
                           end = first + CHUNK < pages ? first + CHUNK : pages;
            TRACE("  stream %u takes %u:%llu\n", stream, region, (unsigned long long)first);
            if (round) {
                sender_round(s, region, first, end - first, round_number == 1);
                return;
            }
            const struct mf_pages part = {.state = source_state[region], .count = end};
            uint64_t at = first, run;
            while ((run = mf_page_next_run(&part, MF_PAGE_UNSENT, &at)) > 0) {
                if (sender_pages(s, region, at, run, false) < 0)
                    return;
                at += run;
            }
            return;
        }
    }
    barrier_out[stream] = true;
    bool all_through = round && !cut;
    for (unsigned i = 0; i < streams; i++)
        all_through = all_through && barrier_out[i];
    if (all_through)
        mf_copies_settle(source.copies, doubts);
    sender_barrier(s, round ? round_number : (uint32_t)pass);
    sender_flush(s);
}

static void answer_step(void)
{
    struct sender *s = sender[URGENT];
    if (phase < FROZEN || request_count == 0 || broken)
        return; /* requests wait in the socket */
    struct page_at at = requests[0];
    memmove(&requests[0], &requests[1], --request_count * sizeof(requests[0]));
    TRACE("  answers %u:%llu\n", at.region, (unsigned long long)at.page);
    if (sender_pages(s, at.region, at.page, 1, true) < 0 || sender_flush(s) < 0)
        return;
    if (at.region == 0 && below(2)) {
        uint64_t first = at.page - at.page % 16, pages = source.region[0].pages - first;
        sender_pages(s, 0, first, pages < 16 ? pages : 16, false);
        sender_flush(s);
    }
}

static void step(unsigned actor)
{
    /* Inside the gate nobody waits for others, who here would have to come in between. */
    if (busy[actor] || (actor < SOURCE_URGENT && (inside_at_source() || tracker_reads)))
        return;
    busy[actor] = true;
    if (actor < SOURCE_URGENT)
        actor - SOURCE_BULK < streams ? sweep_step(actor - SOURCE_BULK) : (void)0;
    else if (actor == SOURCE_URGENT)
        answer_step();
    else if (actor < DEST_FAULTS)
        actor - DEST_BULK < streams ? land(actor - DEST_BULK) : (void)0;
    else
        fault_thread();
    busy[actor] = false;
}

static void guest_step(void)
{
    if (phase == ROUNDS) {
        guest_at_source();
        if (below(2))
            tracker_step();
    }
    if (phase >= FROZEN || below(20) == 0)
        guest_at_destination();
}

static void somebody_else(void)
{
    unsigned total = 0, who = 0;
    for (unsigned i = 0; i <= ACTORS; i++)
        total += weight[i];
    uint32_t pick = below(total);
    while (pick >= weight[who])
        pick -= weight[who++];
    if (who == ACTORS)
        guest_step();
    else
        step(who);
}

/* ---- the session ---- */

static void fill_missing(void)
{
    uint64_t missing = 0;
    for (uint32_t r = 0; r < REGIONS; r++) {
        mf_page_fill(&source.view.pages[r], 0, source.region[r].pages, MF_PAGE_SENT);
        for (uint64_t p = 0; p < source.region[r].pages; p++)
            if (!mf_page_resolvable(dest_state[r][p])) {
                mf_page_fill(&source.view.pages[r], p, 1, MF_PAGE_UNSENT);
                missing++;
            }
    }
    atomic_store(&source_figures.missing_pages, missing);
}

static void begin_pass(void)
{
    memset(chunk_taken, 0, sizeof(chunk_taken));
    looked_chunks = 0;
    memset(barrier_out, 0, sizeof(barrier_out));
    barriers = 0;
}

static void make_senders(void)
{
    for (unsigned i = 0; i <= STREAMS_MOST; i++) {
        memset(sender[i], 0xa5, sizeof(*sender[i])); /* as malloc may give it */
        sender_init(sender[i], &source, NULL, (int)i);
        if (i < STREAMS_MOST)
            sender[i]->lane = source_lanes[i];
    }
}

static void request_again(void *arg, uint32_t region, uint64_t page)
{
    (void)arg;
    if (!mf_page_resolvable(dest_state[region][page]))
        requests[request_count++] = (struct page_at){region, page};
}

static void punch_at_restart(void *arg, uint64_t page)
{
    punch_file(arg, page);
}

static void restart_destination(void)
{
    uint64_t missing = 0;
    TRACE("the destination's mover dies\n");
    for (uint32_t r = 0; r < REGIONS; r++)
        missing += mf_page_restart(&dest.view.pages[r], punch_at_restart, &dest.region[r]);
    atomic_store(&dest_figures.missing_pages, missing);
    memset(&table, 0, sizeof(table));
    memset(waiting, 0, sizeof(waiting)); /* one wake over everything */
    fault_count = 0;
    new_gate();
}

/* What had been sent may still arrive, in part. Then nothing of it does. */
static void lose_link(bool source_died, bool dest_died)
{
    TRACE("the link is lost\n");
    broken = true;
    if (!dest_died)
        for (unsigned n = below(40); n > 0; n--)
            step(DEST_BULK + below(STREAMS_MOST + 1));
    for (unsigned i = 0; i <= STREAMS_MOST; i++)
        queue[i].have = queue[i].taken = 0;
    request_count = 0;
    if (dest_died)
        restart_destination();
    if (source_died) {
        TRACE("the source's mover dies\n");
        if (below(4) == 0)
            source.pagemap_fd = -1; /* its VM is gone, the successor gets none */
    }
    source_vm_gone |= !private_kind && below(6) == 0; /* private memory would go with it */
    make_senders();
    fill_missing();
    streams = 1 + below(STREAMS_MOST);
    pass++;
    begin_pass();
    broken = false;
    fault_table_each(&table, request_again, NULL);
}

static void freeze(void)
{
    has_child = false; /* or the program would not be migrated */
    tracker_looks();
    phase = FROZEN;
    TRACE("frozen\n");
    for (uint32_t r = 0; r < REGIONS; r++)
        for (uint64_t p = 0; p < source.region[r].pages; p++) {
            const uint64_t at = p * source.region[r].page_bytes;
            if (is_hole(&source.region[r], p))
                memset(expected[r] + at, 0, source.region[r].page_bytes);
            else
                memcpy(expected[r] + at, guest_memory[r] + at, source.region[r].page_bytes);
        }
    if (private_kind)
        for (unsigned m = 0; m < MAPS; m++)
            memcpy(private_expected[m], expected[0], source.region[0].size_bytes);
    begin_pass();
    fill_missing(); /* the hello's list: nothing is confirmed */
    pass = 1;
}

/* What the daemons and the movers' main threads do. */
static void direct(void)
{
    const uint64_t missing = atomic_load(&dest_figures.missing_pages);
    switch (phase) {
    case ROUNDS:
        if (rounds_wanted == 0) {
            freeze();
        } else if (round_number == 0 || barriers == streams) {
            cut = false;
            if (round_number == rounds_wanted) {
                freeze();
                break;
            }
            round_number++;
            TRACE("round %u\n", round_number);
            tracker_looks();
            doubts = mf_copies_round(source.copies);
            begin_pass();
        } else if (may_switch && below(200) == 0) {
            cut = true;
            rounds_wanted = round_number;
        }
        break;
    case FROZEN:
        if (!confirm_first || missing == 0) {
            TRACE("released\n");
            phase = RELEASED;
            guest_runs_there = true;
        }
        break;
    case RELEASED:
        if (missing == 0)
            phase = SETTLING;
        break;
    case SETTLING:
        break;
    }
    if ((phase == FROZEN || phase == RELEASED) && barriers == streams && missing > 0) {
        TRACE("named again\n");
        fill_missing();
        pass++;
        begin_pass();
    }
    if (phase == RELEASED && (broken || (may_break && below(150) == 0)))
        lose_link(below(4) == 0, below(4) == 0);
}

static void nobody_waits(void)
{
    for (uint32_t r = 0; r < REGIONS; r++)
        for (unsigned m = 0; m < MAPS; m++)
            for (uint64_t p = 0; p < dest.region[r].pages; p++)
                must(!waiting[r][m][p] || mapped[r][m][p], "a vCPU waits for ever", r, p);
}

static void settle(void)
{
    may_discard = may_crash = may_fork = false;
    /* Late frames, with the guest at work; then all that is left, without it. */
    for (unsigned n = below(400); n > 0; n--)
        somebody_else();
    depth = UINT16_MAX;
    for (bool more = true; more;) {
        for (unsigned i = 0; i <= STREAMS_MOST; i++)
            land(i);
        if (fault_count)
            serve_fault();
        more = fault_count > 0;
        for (unsigned i = 0; i <= STREAMS_MOST; i++)
            more |= queue[i].have != queue[i].taken;
    }
    nobody_waits();
    for (uint32_t r = 0; r < REGIONS; r++)
        for (uint64_t p = 0; p < dest.region[r].pages; p++) {
            must(mf_page_resolvable(dest_state[r][p]), "never confirmed", r, p);
            look(r, p);
        }
}

static void set_up_region(uint32_t index, uint64_t pages)
{
    struct mf_region *s = &source.region[index], *d = &dest.region[index];
    s->pages = d->pages = pages;
    s->size_bytes = d->size_bytes = pages * s->page_bytes;
    source.view.pages[index] = (struct mf_pages){source_state[index], pages};
    dest.view.pages[index] = (struct mf_pages){dest_state[index], pages};
    dest.frame_region[index] = source.frame_region[index] =
        (struct mf_frame_region){pages, s->page_bytes};
    fallocate(s->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, FILE_BYTES);
    fallocate(d->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, FILE_BYTES);
    for (uint64_t p = 0; p < pages; p++) {
        if (below(3))
            scribble(guest_memory[index] + p * s->page_bytes, s->page_bytes);
        for (unsigned m = 0; m < MAPS; m++)
            written[index][m][p] = true; /* never protected */
        for (unsigned m = 0; m < MAPS; m++)
            present[index][m][p] = below(2) && !is_hole(s, p);
    }
}

static void set_up(void)
{
    struct mf_mapping mappings[REGIONS * MAPS];
    memset(&source.gate, 0, sizeof(source.gate));
    must(mf_gate_init(&source.gate) == 0, "no gate", 0, 0);
    for (unsigned i = 0; i < STREAMS_MOST; i++)
        source_lanes[i] = mf_gate_join(&source.gate);
    memset(&changes, 0, sizeof(changes));
    changes.mover = &source;
    changes.has_files = true;
    changes.is_still_there = known_still;
    memset(&source_file.copies, 0, sizeof(source_file.copies));
    source.layout_moves = source.protect_raced = false;
    unread_count = 0;
    tracker_reads = false;
    has_child = child_known = false;
    random_state = seed;
    depth = 0;
    crash_armed = false;
    hook_rate = 1;
    memset((void *)source_state, 0, sizeof(source_state));
    memset((void *)dest_state, 0, sizeof(dest_state));
    memset(&source_figures, 0, sizeof(source_figures));
    memset(&dest_figures, 0, sizeof(dest_figures));
    memset(&table, 0, sizeof(table));
    memset(mapped, 0, sizeof(mapped));
    memset(waiting, 0, sizeof(waiting));
    memset(wanted, 0, sizeof(wanted));
    memset(busy, 0, sizeof(busy));
    fault_count = request_count = round_number = barriers = 0;
    guest_runs_there = broken = cut = source_vm_gone = false;
    source_file.looked = 0;
    source_maps = 1 + below(MAPS);
    may_move = below(3) == 0;
    may_have_child = below(6) == 0;
    pass = 0;
    phase = ROUNDS;
    for (unsigned i = 0; i <= STREAMS_MOST; i++)
        queue[i].have = queue[i].taken = 0;
    private_kind = below(3) == 0;
    places = 1;
    may_fork = below(2);
    memset(zeros_there, 0, sizeof(zeros_there));
    for (uint32_t i = 0; i < 2; i++) {
        mf_zeros_free(mf_context_at(&dest.contexts, i)->zeros);
        mf_context_at(&dest.contexts, i)->zeros = NULL;
    }
    new_gate();
    source.private_memory = dest.private_memory = private_kind;
    source.populated_fd = private_kind ? 3 : -1;
    source.region[0].kind = dest.region[0].kind =
        private_kind ? MF_MEMORY_PRIVATE : MF_MEMORY_TMPFS;
    set_up_region(0, 1 + below(SMALL_MOST));
    set_up_region(1, below(3) ? 0 : 1 + below(HUGE_MOST));
    for (uint32_t r = 0; r < REGIONS; r++)
        for (unsigned m = 0; m < MAPS; m++)
            mappings[m * REGIONS + r] =
                (struct mf_mapping){.start_addr = address(r, m),
                                    .length_bytes = dest.region[r].size_bytes,
                                    .region = r};
    /* A region without pages has mappings without pages. Private memory has one place, at the
     * destination a second one by a fork. */
    const unsigned all_maps = REGIONS * MAPS - private_kind;
    if (private_kind)
        mappings[REGIONS] = mappings[REGIONS + 1];
    mf_layout_set(&source.layout, mappings, source_maps == 1 ? REGIONS : all_maps);
    for (uint32_t r = 0; r < REGIONS; r++)
        for (unsigned m = 0; m < MAPS; m++) {
            spot[r][m] = m;
            is_there[r][m] = is_watched[r][m] = m < source_maps && (m == 0 || !is_private(r));
        }
    mf_layout_set(&dest.layout, mappings, all_maps);
    atomic_store(&dest_figures.missing_pages, dest.region[0].pages + dest.region[1].pages);
    streams = 1 + below(STREAMS_MOST);
    tracked = below(8) != 0;
    rounds_wanted = tracked ? below(5) : 0;
    source.pagemap_fd = tracked ? 3 : -1;
    confirm_first = below(4) == 0;
    may_discard = below(2);
    may_break = below(2);
    may_switch = below(2);
    protect_fails = below(4) == 0;
    may_crash = below(3) == 0;
    /* Some hardly ever get to run: a connection that is slow, a guest that writes much. */
    for (unsigned i = 0; i <= ACTORS; i++)
        weight[i] = 1u << below(6);
    hook_rate = 4u << below(6);
    make_senders();
    begin_pass();
}

static void run(void)
{
    set_up();
    if (setjmp(crashed)) {
        TRACE("crash\n");
        bool source_died = below(4) == 0, dest_died = below(4) == 0;
        for (unsigned i = 0; i < ACTORS; i++) {
            if (i <= SOURCE_URGENT)
                source_died |= busy[i];
            else
                dest_died |= busy[i];
            busy[i] = false;
        }
        depth = 0;
        crash_armed = false;
        lose_link(source_died, dest_died);
    }
    for (unsigned steps = 0; phase != SETTLING; steps++) {
        crash_armed = false;
        direct();
        crash_armed = true;
        somebody_else();
        if (steps > 20000)
            may_break = may_crash = false;
        if (steps > 2000000)
            fail("it does not end", 0, 0);
    }
    crash_armed = false;
    settle();
}

static void make_file(struct mf_region *source_region, struct mf_region *dest_region,
                      uint32_t index)
{
    struct mf_region *both[] = {source_region, dest_region};
    const size_t bytes = FILE_BYTES;
    for (unsigned i = 0; i < 2; i++) {
        struct mf_region *r = both[i];
        r->page_bytes = index ? HUGE_BYTES : 4096;
        r->kind = index ? MF_MEMORY_HUGETLB : MF_MEMORY_TMPFS;
        r->fd = memfd_create("memferry-model", MFD_CLOEXEC);
        if (r->fd < 0 || ftruncate(r->fd, (off_t)bytes) != 0)
            fail("no memory", 0, 0);
        r->map = mmap(NULL, bytes, i ? PROT_READ | PROT_WRITE : PROT_READ, MAP_SHARED, r->fd, 0);
    }
    guest_memory[index] =
        mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, source_region->fd, 0);
    expected[index] = malloc(bytes);
    for (unsigned m = 0; index == 0 && m < MAPS; m++) {
        private_memory[m] = malloc(bytes);
        private_expected[m] = malloc(bytes);
    }
}

static uint64_t from_environment(const char *name, uint64_t otherwise)
{
    const char *text = getenv(name);
    return text ? strtoull(text, NULL, 0) : otherwise;
}

int main(void)
{
    const uint64_t first = from_environment("MF_SEED", (uint64_t)time(NULL) << 20);
    const uint64_t runs = from_environment("MF_RUNS", 3000);
    trace = getenv("MF_TRACE") != NULL;
    source.role = MF_SOURCE;
    dest.role = MF_DESTINATION;
    source.figures = &source_figures;
    source.view.file = &source_file;
    source.copies = &source_file.copies;
    dest.figures = &dest_figures;
    source.region_count = dest.region_count = REGIONS;
    /* The descriptors are never used: the calls that take them are modelled. */
    if (mf_contexts_add(&source.contexts, INT_MAX, -1, false) != 0 ||
        mf_contexts_add(&dest.contexts, INT_MAX, -1, false) != 0 ||
        mf_contexts_add(&dest.contexts, INT_MAX, -1, true) != 1)
        fail("no context", 0, 0);
    for (uint32_t r = 0; r < REGIONS; r++)
        make_file(&source.region[r], &dest.region[r], r);
    for (unsigned i = 0; i <= STREAMS_MOST; i++) {
        sender[i] = aligned_alloc(64, sizeof(*sender[i]));
        queue[i].bytes = malloc(QUEUE_BYTES);
    }
    printf("MF_SEED=%llu, %llu runs\n", (unsigned long long)first, (unsigned long long)runs);
    for (seed = first; seed < first + runs; seed++)
        run();
    for (uint32_t r = 0; r < REGIONS; r++)
        free(expected[r]);
    for (unsigned m = 0; m < MAPS; m++) {
        free(private_memory[m]);
        free(private_expected[m]);
    }
    for (unsigned i = 0; i <= STREAMS_MOST; i++) {
        free(sender[i]);
        free(queue[i].bytes);
    }
    return 0;
}
