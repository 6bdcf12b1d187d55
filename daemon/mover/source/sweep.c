/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The sweep: the source's background pass over everything that the destination does not have.
 *
 * All regions are cut into chunks, in one row. Each bulk thread takes the next chunk that nobody
 * took, beginning behind the last fault (the pivot): where the guest works now it will soon want
 * more. Taking a chunk is one atomic exchange. Behind the last chunk every thread sends a BARRIER;
 * once the destination has all of them it knows that what it still misses must be named again.
 *
 * After precopy the row is gone along twice. First to look for writes and to say of all copies that
 * are current that they are: that takes few bytes and lets the guest have most of its memory. It
 * also notes here what was written, so that from then on nothing of the source's VM is needed but
 * its RAM files. Then the bytes of the rest.
 */
#include "daemon/mover/mover.h"
#include "daemon/mover/ring.h"
#include "daemon/mover/schedule.h"
#include "daemon/mover/source/sender.h"
#include "daemon/mover/source/tracker.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "lib/util.h"

#define CHUNK_BYTES (2u << 20)
#define LOOKED_AT_CHUNKS 32768u /**< 64 GiB */
#define SCATTERED_RUNS 4u       /**< of missing pages in a chunk: as of here looked at together */

static uint64_t chunk_pages(const struct mf_region *region)
{
    return region->page_bytes >= CHUNK_BYTES ? 1 : CHUNK_BYTES / region->page_bytes;
}

void sweep_set_pivot(struct mover *mover, uint32_t region, uint64_t page)
{
    struct sweep *sweep = &mover->sweep;
    atomic_store_explicit(&sweep->pivot,
                          sweep->chunk_base[region] + page / chunk_pages(&mover->region[region]),
                          memory_order_relaxed);
}

int sweep_init(struct mover *mover)
{
    struct sweep *sweep = &mover->sweep;
    for (unsigned i = 0; i < mover->region_count; i++) {
        const struct mf_region *region = &mover->region[i];
        sweep->chunk_base[i] = sweep->chunk_count;
        sweep->chunk_count += (region->pages + chunk_pages(region) - 1) / chunk_pages(region);
    }
    sweep->chunk_base[mover->region_count] = sweep->chunk_count;
    sweep->taken = calloc(sweep->chunk_count, 1);
    pthread_mutex_init(&sweep->lock, NULL);
    pthread_cond_init(&sweep->changed, NULL);
    return sweep->taken ? 0 : -ENOMEM;
}

void sweep_forget_sent(struct mover *mover)
{
    for (unsigned i = 0; i < mover->region_count; i++)
        mf_page_fill(&mover->view.pages[i], 0, mover->region[i].pages, MF_PAGE_SENT);
    atomic_store(&mover->figures->missing_pages, 0);
}

int sweep_missing(struct mover *mover, uint32_t region, uint64_t first, uint64_t pages)
{
    if (region >= mover->region_count)
        return -EPROTO;
    const struct mf_region *r = &mover->region[region];
    if (pages == 0 || first >= r->pages || pages > r->pages - first)
        return -EPROTO;
    mf_page_fill(&mover->view.pages[region], first, pages, MF_PAGE_UNSENT);
    atomic_fetch_add(&mover->figures->missing_pages, pages);
    return 0;
}

/* Behind what all threads have finished: the next pass can begin as soon as something lets it. */
static void prepare_pass(struct sweep *sweep)
{
    for (uint64_t i = 0; i < sweep->chunk_count; i++)
        atomic_store_explicit(&sweep->taken[i], 0, memory_order_relaxed);
    atomic_store(&sweep->looked_chunks, 0);
    sweep->finished = 0;
    sweep->pass++;
}

bool sweep_pass_finished(struct mover *mover)
{
    struct sweep *sweep = &mover->sweep;
    pthread_mutex_lock(&sweep->lock);
    bool finished = !sweep->in_round && sweep->finished == mover->link.streams;
    pthread_mutex_unlock(&sweep->lock);
    return finished;
}

void sweep_next_pass(struct mover *mover)
{
    struct sweep *sweep = &mover->sweep;
    pthread_mutex_lock(&sweep->lock);
    prepare_pass(sweep);
    if (mover->released)
        sweep->frozen = sweep->released = true;
    pthread_cond_broadcast(&sweep->changed);
    pthread_mutex_unlock(&sweep->lock);
}

void sweep_frozen(struct mover *mover)
{
    struct sweep *sweep = &mover->sweep;
    /* Before anybody looks for writes: all changes of the layout until now are known. */
    tracker_look(mover);
    pthread_mutex_lock(&sweep->lock);
    sweep->frozen = true;
    pthread_cond_broadcast(&sweep->changed);
    pthread_mutex_unlock(&sweep->lock);
}

bool sweep_wait_frozen(struct mover *mover)
{
    struct sweep *sweep = &mover->sweep;
    pthread_mutex_lock(&sweep->lock);
    while (!atomic_load(&mover->link.stop) && !sweep->frozen)
        pthread_cond_wait(&sweep->changed, &sweep->lock);
    bool frozen = sweep->frozen;
    pthread_mutex_unlock(&sweep->lock);
    return frozen;
}

void sweep_release(struct mover *mover)
{
    struct sweep *sweep = &mover->sweep;
    pthread_mutex_lock(&sweep->lock);
    sweep->frozen = sweep->released = true;
    pthread_cond_broadcast(&sweep->changed);
    pthread_mutex_unlock(&sweep->lock);
}

void sweep_round(struct mover *mover)
{
    struct sweep *sweep = &mover->sweep;
    uint64_t pages = 0;
    for (unsigned i = 0; i < mover->region_count; i++)
        pages += mover->region[i].pages;
    tracker_look(mover);
    atomic_store(&mover->figures->round_pages, 0);
    atomic_store(&mover->figures->round_left_pages, pages);
    pthread_mutex_lock(&sweep->lock);
    sweep->doubts = mf_copies_round(mover->copies);
    sweep->round++;
    sweep->in_round = true;
    sweep->finished = 0;
    atomic_store(&sweep->through, 0);
    atomic_store(&sweep->cut, false);
    sweep->round_began_ns = mf_now_ns();
    pthread_cond_broadcast(&sweep->changed);
    pthread_mutex_unlock(&sweep->lock);
}

void sweep_cut_round(struct mover *mover)
{
    atomic_store(&mover->sweep.cut, true);
}

void sweep_round_landed(struct mover *mover, uint32_t round)
{
    struct sweep *sweep = &mover->sweep;
    struct mf_ipc done = {.type = MF_IPC_ROUND_DONE};
    pthread_mutex_lock(&sweep->lock);
    bool ours = sweep->in_round && sweep->round == round && sweep->finished == mover->link.streams;
    if (ours) {
        sweep->in_round = false;
        prepare_pass(sweep);
        done.round.round = round;
        done.round.copied_pages = atomic_load(&mover->figures->round_pages);
        done.round.dirty_pages = atomic_load(&sweep->dirty_pages);
        done.round.duration_ns = mf_now_ns() - sweep->round_began_ns;
    }
    pthread_mutex_unlock(&sweep->lock);
    if (ours)
        mover_tell(mover, &done);
    else
        link_fail(mover, "the destination acknowledged a round that has not ended");
}

void sweep_set_pace(struct mover *mover, uint64_t bits_s)
{
    atomic_store(&mover->sweep.pace_bits_s, bits_s);
}

/* The bulk threads share one row of sending times: a batch takes its place in it and waits for it.
 */
void sweep_pace(struct mover *mover, uint64_t bytes)
{
    struct sweep *sweep = &mover->sweep;
    uint64_t bits_s = atomic_load_explicit(&sweep->pace_bits_s, memory_order_relaxed);
    if (bits_s == 0)
        return;
    const uint64_t takes_ns = (uint64_t)((double)bytes * 8e9 / (double)bits_s);
    uint64_t next = atomic_load(&sweep->pace_next_ns), start_ns, now_ns = mf_now_ns();
    do
        start_ns = next > now_ns ? next : now_ns;
    while (!atomic_compare_exchange_weak(&sweep->pace_next_ns, &next, start_ns + takes_ns));
    /* In short sleeps: a lifted limit or the link's end is not waited out. */
    while ((now_ns = mf_now_ns()) < start_ns && !atomic_load(&mover->link.stop) &&
           atomic_load(&sweep->pace_bits_s) == bits_s) {
        uint64_t wait_ns = start_ns - now_ns;
        nanosleep(&(struct timespec){.tv_nsec = (long)(wait_ns < 20000000 ? wait_ns : 20000000)},
                  NULL);
    }
    if (atomic_load(&sweep->pace_bits_s) != bits_s)
        atomic_store(&sweep->pace_next_ns, 0);
}

/* Wait for RELEASE and a pass after @done. Return: its number, 0 when the link ends. */
static uint32_t wait_for_pass(struct mover *mover, uint32_t done)
{
    struct sweep *sweep = &mover->sweep;
    pthread_mutex_lock(&sweep->lock);
    while (!atomic_load(&mover->link.stop) &&
           (!(sweep->released || sweep->in_round) || sweep->pass == done))
        pthread_cond_wait(&sweep->changed, &sweep->lock);
    uint32_t pass = atomic_load(&mover->link.stop) ? 0 : sweep->pass;
    pthread_mutex_unlock(&sweep->lock);
    return pass;
}

/* The next chunk from @from on, around the end, that was not taken for @time (1, or 2: the second
 * time); taken by this call. */
static bool take_chunk(struct sweep *sweep, uint64_t from, uint8_t time, uint64_t *chunk)
{
    for (uint64_t i = 0; i < sweep->chunk_count; i++) {
        uint64_t at = from + i < sweep->chunk_count ? from + i : from + i - sweep->chunk_count;
        uint8_t taken = atomic_load_explicit(&sweep->taken[at], memory_order_relaxed);
        while (taken < time)
            if (atomic_compare_exchange_weak_explicit(&sweep->taken[at], &taken, time,
                                                      memory_order_relaxed, memory_order_relaxed)) {
                *chunk = at;
                return true;
            }
    }
    return false;
}

/* A fault's answer is on its way: give it the processor and the link, but never for long. */
static void let_urgent_by(struct sweep *sweep)
{
    for (unsigned i = 0; i < 20 && atomic_load_explicit(&sweep->urgent_busy, memory_order_relaxed);
         i++)
        nanosleep(&(struct timespec){.tv_nsec = 20000}, NULL);
}

/* What a chunk is taken for. */
enum along { ALONG_ROUND, ALONG_COPIES, ALONG_REST };

static void count_looked(struct mover *mover)
{
    struct sweep *sweep = &mover->sweep;
    if (atomic_fetch_add(&sweep->looked_chunks, 1) + 1 == sweep->chunk_count)
        atomic_store_explicit(&mover->view.file->looked, 1, memory_order_release);
}

/* Which pages a chunk is. Return: of which region. */
static unsigned chunk_place(const struct mover *mover, uint64_t chunk, uint64_t *first,
                            uint64_t *pages)
{
    const struct sweep *sweep = &mover->sweep;
    unsigned region = 0;
    while (chunk >= sweep->chunk_base[region + 1])
        region++;
    const struct mf_region *r = &mover->region[region];
    *first = (chunk - sweep->chunk_base[region]) * chunk_pages(r);
    *pages = chunk_pages(r) < r->pages - *first ? chunk_pages(r) : r->pages - *first;
    return region;
}

/* On a later link little may be missing: only that is looked at. Where it lies scattered one look
 * is cheaper than one for each run, and what was sent already is passed over. Private memory is
 * copied out to be looked at, so of that never more than is missing. */
static int send_unsent(struct sender *sender, unsigned region, uint64_t first, uint64_t pages)
{
    const struct mover *mover = sender->mover;
    const struct mf_pages part = {.state = mover->view.pages[region].state, .count = first + pages};
    uint64_t at = first, from = 0, end = 0, run;
    unsigned runs = 0;
    for (; (run = mf_page_next_run(&part, MF_PAGE_UNSENT, &at)) > 0; end = at += run)
        if (runs++ == 0)
            from = at;
    if (runs >= SCATTERED_RUNS && mover->region[region].kind != MF_MEMORY_PRIVATE)
        return sender_pages(sender, region, from, end - from, false);
    int r = 0;
    for (at = first; r == 0 && (run = mf_page_next_run(&part, MF_PAGE_UNSENT, &at)) > 0; at += run)
        r = sender_pages(sender, region, at, run, false);
    return r;
}

static int send_chunk(struct sender *sender, uint64_t chunk, enum along along, bool all)
{
    struct mover *mover = sender->mover;
    uint64_t first, pages;
    const unsigned region = chunk_place(mover, chunk, &first, &pages);
    if (along == ALONG_ROUND) {
        atomic_fetch_sub_explicit(&mover->figures->round_left_pages, pages, memory_order_relaxed);
        return sender_round(sender, region, first, pages, all);
    }
    if (along == ALONG_COPIES) {
        int result = sender_confirm(sender, region, first, pages);
        if (result == 0)
            count_looked(mover);
        return result;
    }
    return send_unsent(sender, region, first, pages);
}

/* Once along the row, together with the other bulk threads. */
static int go_along(struct sender *sender, enum along along, bool all)
{
    struct mover *mover = sender->mover;
    struct sweep *sweep = &mover->sweep;
    uint64_t pivot = UINT64_MAX, chunk = 0;
    while (!atomic_load_explicit(&mover->link.stop, memory_order_relaxed)) {
        uint64_t now = atomic_load_explicit(&sweep->pivot, memory_order_relaxed);
        if ((along == ALONG_ROUND && atomic_load_explicit(&sweep->cut, memory_order_relaxed)) ||
            !take_chunk(sweep, now == pivot ? chunk : now, along == ALONG_REST ? 2 : 1, &chunk))
            break;
        pivot = now;
        let_urgent_by(sweep);
        int r = send_chunk(sender, chunk, along, all);
        if (r < 0)
            return r;
    }
    return 0;
}

/* How many of the copied pages were written since. A page table's worth of pages takes a
 * microsecond or two where few are dirty; of very much RAM only a part is looked at. */
static uint64_t count_dirty(struct sender *sender)
{
    const struct mover *mover = sender->mover;
    const struct sweep *sweep = &mover->sweep;
    const uint64_t step = sweep->chunk_count / LOOKED_AT_CHUNKS + 1;
    uint64_t dirty_pages = 0;
    for (uint64_t chunk = 0; chunk < sweep->chunk_count; chunk += step) {
        uint64_t first, pages;
        const unsigned region = chunk_place(mover, chunk, &first, &pages);
        dirty_pages += sender_count_dirty(sender, region, first, pages);
    }
    return dirty_pages * step;
}

uint64_t sweep_count_dirty(struct mover *mover)
{
    struct sender *sender = aligned_alloc(64, sizeof(*sender));
    if (!sender)
        mover_fatal("out of memory for looking at what is dirty");
    sender_init(sender, mover, NULL, -1);
    const uint64_t dirty_pages = count_dirty(sender);
    free(sender);
    return dirty_pages;
}

/* The last thread that is through settles doubts (lib/copies.h), if no chunk was left out. Then it
 * looks at how much is dirty by now: what another round would have to copy. */
static void end_round(struct sender *sender, uint32_t doubts)
{
    struct mover *mover = sender->mover;
    struct sweep *sweep = &mover->sweep;
    if (atomic_fetch_add(&sweep->through, 1) + 1 < mover->link.streams)
        return;
    if (!atomic_load(&sweep->cut))
        mf_copies_settle(mover->copies, doubts);
    atomic_store(&sweep->dirty_pages, count_dirty(sender));
}

static int one_pass(struct sender *sender, uint32_t pass)
{
    struct mover *mover = sender->mover;
    struct sweep *sweep = &mover->sweep;
    /* Stays as it is for the whole pass: it changes only when all threads are through. */
    pthread_mutex_lock(&sweep->lock);
    const uint32_t round = sweep->in_round ? sweep->round : 0, doubts = sweep->doubts;
    pthread_mutex_unlock(&sweep->lock);
    sender->round = round != 0;
    int r = 0;
    if (round) {
        r = go_along(sender, ALONG_ROUND, round == 1);
        /* It lands while this end looks at what is dirty. */
        if (r == 0)
            r = sender_flush(sender);
        end_round(sender, doubts);
    } else {
        if (mover->pagemap_fd >= 0 && !atomic_load(&mover->view.file->looked))
            r = go_along(sender, ALONG_COPIES, false);
        if (r == 0)
            r = go_along(sender, ALONG_REST, false);
    }
    if (r == 0)
        r = sender_barrier(sender, round ? round : pass);
    if (r == 0) {
        /* Counted before it is out, for the answer may come at once. */
        pthread_mutex_lock(&sweep->lock);
        sweep->finished++;
        pthread_mutex_unlock(&sweep->lock);
    }
    return r < 0 ? r : sender_flush(sender);
}

void *source_bulk_main(void *argument)
{
    struct bulk_thread *bulk = argument;
    struct mover *mover = bulk->mover;
    struct io_uring ring;
    prctl(PR_SET_NAME, "bulk-send");
    schedule_beside();
    int r = ring_open(&ring, 4);
    struct sender *sender = aligned_alloc(64, sizeof(*sender));
    if (!sender)
        mover_fatal("out of memory for the frames of a bulk connection");
    if (r < 0)
        mover_fatal("cannot use io_uring: %s (sysctl kernel.io_uring_disabled?)", strerror(-r));
    sender_init(sender, mover, &ring, bulk->fd);
    sender->paced = true;
    sender->lane = mf_gate_join(&mover->gate);
    if (!sender->lane)
        mover_fatal("there are more bulk connections than the gate has lanes");
    uint32_t pass = 0;
    while (r == 0 && (pass = wait_for_pass(mover, pass)) != 0)
        r = one_pass(sender, pass);
    if (r < 0 && !atomic_load(&mover->link.stop))
        link_fail(mover, "bulk connection %u to the destination broke: %s", bulk->stream,
                  strerror(-r));
    mf_gate_leave(sender->lane);
    free(sender);
    ring_close(&ring);
    return NULL;
}
