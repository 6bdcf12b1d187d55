/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * From page states to frames on a connection: what both the sweep and the urgent answers use.
 *
 * A sender belongs to one thread and one connection. Page bytes go from the second mapping into the
 * socket without a copy of ours; frames of several runs share a sendmsg(2).
 *
 * Outside precopy rounds the source's RAM is frozen when this runs: the guest was paused before
 * anything was asked for, and after RELEASE it never runs here again. So all copies of a page are
 * equal, and a page that went both by the sweep and by an urgent answer does no harm (I7).
 */
#pragma once

#include "daemon/mover/mover.h"
#include "daemon/mover/ring.h"

#define SENDER_FRAMES 64u
#define SENDER_CHUNK_PAGES                                                                         \
    512u /**< most pages that one call of sender_pages or sender_round is given */
#define SENDER_BATCH_BYTES                                                                         \
    (256u * 1024u) /**< sent in one go; bounds what an urgent answer waits behind */

#define SENDER_ROOM_BYTES                                                                          \
    (2 * SENDER_BATCH_BYTES) /**< for bytes of private memory: one piece is sent while the next is \
                                read */

struct sender {
    struct mover *mover;
    struct io_uring *ring;
    int fd;
    struct mf_gate_lane *lane; /**< NULL: of a thread that protects nothing */
    bool round;                /**< in a precopy round: frames land unconfirmed */
    bool paced;                /**< keeps to the bandwidth limit */
    unsigned frames;
    unsigned iovecs;
    uint64_t batch_bytes;
    uint64_t seen_first;
    uint8_t seen_once[SENDER_CHUNK_PAGES];
    uint8_t seen[SENDER_CHUNK_PAGES]; /**< MF_PAGEMAP_… of the pages looked at now, from seen_first
                                         on */
    uint8_t look[65536] __attribute__((aligned(64))); /**< a piece of a huge page */
    /* Private memory (private.h): what is held of the pages looked at now, and bytes that were read
     * and may not have left yet. */
    uint64_t private_page_bytes, held_first, fetched_first, room_used;
    const uint8_t *fetched;
    uint8_t held[SENDER_CHUNK_PAGES];
    uint8_t room[SENDER_ROOM_BYTES] __attribute__((aligned(64)));
    uint8_t header[SENDER_FRAMES][MF_FRAME_HEADER_BYTES];
    struct iovec iov[2 * SENDER_FRAMES];
};

void sender_init(struct sender *sender, struct mover *mover, struct io_uring *ring, int fd);

/**
 * sender_pages() - offer a run of pages: DATA, ZERO or hole, as they are.
 * @again: send pages that were sent before too (an answer to a fault); else only those that this
 * call wins. Return: 0 or -errno of the connection.
 */
int sender_pages(struct sender *sender, uint32_t region, uint64_t first, uint64_t pages,
                 bool again);

/**
 * sender_confirm() - say of a run's copies which are CURRENT, and take the others for no copies any
 * more: after a call for every page the VM's page tables are needed no longer. RAM is frozen. At
 * most SENDER_CHUNK_PAGES. Return: 0 or -errno of the connection.
 */
int sender_confirm(struct sender *sender, uint32_t region, uint64_t first, uint64_t pages);

/**
 * sender_round() - a precopy round's part: protect, then copy, what was written since it was last
 * protected (in the first round: everything). The guest runs.
 */
int sender_round(struct sender *sender, uint32_t region, uint64_t first, uint64_t pages, bool all);

/** sender_count_dirty() - how many of a run's copies were written since. At most
 * SENDER_CHUNK_PAGES; sends nothing. */
uint64_t sender_count_dirty(struct sender *sender, uint32_t region, uint64_t first, uint64_t pages);

/** sender_barrier() - a BARRIER behind everything so far. */
int sender_barrier(struct sender *sender, uint32_t pass);

/** sender_flush() - get everything out. */
int sender_flush(struct sender *sender);
