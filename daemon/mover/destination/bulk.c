/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A bulk connection's thread on the destination: receive a frame, check it, land it, and so on.
 *
 * A long payload is asked for together with the header that follows, so it costs one receive. Short
 * frames (scattered pages, words about copies) come many at a time, and are taken from where they
 * lie. What is received next lands where the last lay, which is in the processor's cache still.
 */
#include "daemon/mover/destination/destination.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>

#include "daemon/mover/ring.h"
#include "daemon/mover/schedule.h"
#include "lib/log.h"

#define PAYLOAD_ROOM MF_FRAME_DATA_MAX_BYTES
#define AHEAD 65536u /**< received at once where less is needed */
#define LEAD 4096u   /**< room for the first header, so that a long payload is page-aligned */

struct bulk {
    struct bulk_thread *self;
    struct mover *mover;
    struct mf_lander lander;
    struct io_uring ring;
    uint8_t *buffer; /**< LEAD, and room for the longest payload and the next header, aligned */
    size_t at;       /**< how far behind LEAD the present payload begins; a multiple of 8 */
    size_t have;     /**< bytes from there on */
};

static void nothing(void *arg, uint32_t context)
{
    (void)arg;
    (void)context; /* the fault thread reads events; this one only waits */
}

static uint8_t *frame_at(const struct bulk *b)
{
    return b->buffer + LEAD - MF_FRAME_HEADER_BYTES + b->at;
}

/* Have at least @need bytes from the header on; more is welcome. Return: 1, 0 at the end of the
 * stream between frames, or -errno. */
static int have_bytes(struct bulk *b, size_t need)
{
    if (b->have < need && b->at) {
        const uint8_t *from = frame_at(b);
        b->at = 0;
        memmove(frame_at(b), from, b->have);
    }
    while (b->have < need) {
        const size_t upto = need < AHEAD ? AHEAD : need + MF_FRAME_HEADER_BYTES;
        ssize_t n = ring_recv(&b->ring, b->self->fd, frame_at(b) + b->have, upto - b->have);
        if (n <= 0)
            return n < 0 ? (int)n : b->have == 0 ? 0 : -ECONNRESET;
        b->have += (size_t)n;
        atomic_fetch_add_explicit(&b->mover->figures->wire_bytes, (uint64_t)n,
                                  memory_order_relaxed);
    }
    return 1;
}

static void consume(struct bulk *b, size_t bytes)
{
    b->at += bytes;
    b->have -= bytes;
}

/* A huge page goes straight into the second mapping; what came along with the header is moved
 * there. */
static int receive_huge(struct bulk *b, const struct mf_frame *frame)
{
    uint8_t *to = NULL;
    int begun = mf_land_begin_huge(&b->lander, frame, &to);
    if (begun < 0)
        return account_failed(b->mover, begun);
    uint64_t got = b->have - MF_FRAME_HEADER_BYTES;
    if (got > frame->length_bytes)
        got = frame->length_bytes;
    int r = 1;
    if (to)
        memcpy(to, frame_at(b) + MF_FRAME_HEADER_BYTES, got);
    consume(b, MF_FRAME_HEADER_BYTES + got);
    while (r > 0 && got < frame->length_bytes) {
        uint64_t want = frame->length_bytes - got;
        if (!to && want > PAYLOAD_ROOM)
            want = PAYLOAD_ROOM;
        ssize_t n = ring_recv(&b->ring, b->self->fd, to ? to + got : b->buffer, want);
        if (n <= 0) {
            r = n < 0 ? (int)n : -ECONNRESET;
        } else {
            got += (uint64_t)n;
            atomic_fetch_add_explicit(&b->mover->figures->wire_bytes, (uint64_t)n,
                                      memory_order_relaxed);
        }
    }
    if (to)
        mf_land_end_huge(&b->lander, frame, r > 0);
    return r;
}

static int one_frame(struct bulk *b)
{
    struct mover *mover = b->mover;
    struct mf_frame frame;
    const char *why = NULL;
    int r = have_bytes(b, MF_FRAME_HEADER_BYTES);
    if (r <= 0)
        return r;
    if (mf_frame_decode(frame_at(b), &frame, &why) < 0 ||
        mf_frame_check(&frame, mover->frame_region, mover->region_count, true, &why) < 0) {
        link_fail(mover, "bulk connection %u: the source sent %s", b->self->stream, why);
        return -EPROTO;
    }
    if (frame.type == MF_FRAME_DATA && mover->region[frame.region].kind == MF_MEMORY_HUGETLB)
        return receive_huge(b, &frame);
    r = have_bytes(b, MF_FRAME_HEADER_BYTES + frame.length_bytes);
    if (r <= 0)
        return r;
    switch (frame.type) {
    case MF_FRAME_DATA:
        r = mf_land_data(&b->lander, &frame, frame_at(b) + MF_FRAME_HEADER_BYTES);
        if (r < 0)
            return account_failed(b->mover, r);
        break;
    case MF_FRAME_ZERO:
    case MF_FRAME_DISCARD: /* zeros, unconfirmed: what a round brought is punched out */
        mf_land_zero(&b->lander, &frame);
        break;
    case MF_FRAME_CURRENT:
        mf_land_current(&b->lander, &frame);
        break;
    case MF_FRAME_BARRIER:
        if (frame.flags & MF_FRAME_FLAG_ROUND) {
            atomic_store(&mover->link.round, (uint32_t)frame.first_page);
            if (atomic_fetch_add(&mover->link.round_barriers, 1) + 1 == mover->link.streams)
                mover_wake(mover);
        } else if (atomic_fetch_add(&mover->link.barriers, 1) + 1 == mover->link.streams)
            mover_wake(mover);
        break;
    }
    consume(b, MF_FRAME_HEADER_BYTES + frame.length_bytes);
    return 1;
}

void *destination_bulk_main(void *argument)
{
    struct bulk_thread *self = argument;
    struct bulk b = {.self = self, .mover = self->mover};
    prctl(PR_SET_NAME, "bulk-receive");
    schedule_beside();
    b.lander = account_lander(self->mover, nothing, NULL);
    b.lander.resolver.lane = mf_gate_join(&self->mover->gate);
    if (!b.lander.resolver.lane)
        mover_fatal("there are more bulk connections than the gate has lanes");
    int r = ring_open(&b.ring, 4);
    if (r < 0)
        mover_fatal("cannot use io_uring: %s (sysctl kernel.io_uring_disabled?)", strerror(-r));
    b.buffer = aligned_alloc(4096, LEAD + PAYLOAD_ROOM + 4096);
    if (!b.buffer)
        mover_fatal("out of memory for a bulk connection's buffer");
    do
        r = one_frame(&b);
    while (r > 0 && !atomic_load_explicit(&self->mover->link.stop, memory_order_relaxed));
    if (r <= 0 && !atomic_load(&self->mover->link.stop))
        link_fail(self->mover, "bulk connection %u to the source broke: %s", self->stream,
                  r < 0 ? strerror(-r) : "the source closed it");
    mf_gate_leave(b.lander.resolver.lane);
    free(b.buffer);
    ring_close(&b.ring);
    return NULL;
}
