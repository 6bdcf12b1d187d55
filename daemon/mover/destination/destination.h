/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The destination's fault path, file by file:
 *   faults.c       the fault thread: faults and events in, REQUESTs out, urgent answers in
 *   fault_table.c  who waits since when
 *   land.c         bytes into the page cache, states, then resolve
 *   bulk.c         a bulk connection's thread
 * What a userfaultfd says is read by lib/events.c; lib/resolve.c makes the ioctls that resolve.
 */
#pragma once

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "daemon/mover/mover.h"
#include "lib/resolve.h"

/* ---- fault_table.c ----
 *
 * The pages somebody waits for, with the time at which the message was read. Only the fault thread
 * adds; whoever makes a page resolvable finds FAULTED in its state and takes it out. Fixed size. An
 * entry is there whenever FAULTED is set, unless the table was full.
 */

#define FAULT_SLOTS 8192u

struct fault_slot {
    _Atomic uint64_t key; /**< 0: free; else region << 48 | page, plus one */
    uint64_t since_ns;    /**< written before key (release) */
};
struct fault_table {
    struct fault_slot slot[FAULT_SLOTS];
    _Atomic uint32_t used;
};

/** fault_table_add() - Return: false when the table is full (the page is then served untimed). */
bool fault_table_add(struct fault_table *table, uint32_t region, uint64_t page, uint64_t since_ns);
/** fault_table_take() - remove. Return: since when, or 0 if it is not there. */
uint64_t fault_table_take(struct fault_table *table, uint32_t region, uint64_t page);
/** fault_table_each() - call @each for every entry (fault thread). */
void fault_table_each(struct fault_table *table,
                      void (*each)(void *arg, uint32_t region, uint64_t page), void *arg);

/** struct resolver - how a thread lands and resolves. Only the fault thread may read events, so
 * only it can end an EAGAIN by itself; the others wait for it. */
struct resolver {
    struct mf_resolver lib;
    struct mover *mover;
    struct fault_table *table;
    bool urgent; /**< the fault thread's: lands through the second mapping (land.c) */
};

/* ---- land.c ---- */

/** resolve_done() - a page that had FAULTED has been resolved: stop the clock. */
void resolve_done(struct resolver *resolver, uint32_t region, uint64_t page);

/**
 * land_data() - the payload of a DATA frame, already received into @payload: claim the pages, write
 * them into the RAM file, confirm, resolve. Pages that somebody else has filled are skipped.
 * Return: 0, or -errno of writing the RAM file (-ENOSPC, -ENOMEM: the pages stay missing).
 */
int land_data(struct resolver *resolver, const struct mf_frame *frame, const uint8_t *payload);

/** land_begin_huge() / land_end_huge() - a page of hugetlbfs, received straight into the second
 * mapping. begin: @to is where to receive to, or NULL: somebody else has it, receive into scratch.
 *  Return: 0, or -errno: no huge page is to be had. end: has it @arrived? */
int land_begin_huge(struct resolver *resolver, const struct mf_frame *frame, uint8_t **to);
void land_end_huge(struct resolver *resolver, const struct mf_frame *frame, bool arrived);

/** land_zero() - a ZERO frame. */
void land_zero(struct resolver *resolver, const struct mf_frame *frame);

/** land_current() - a CURRENT frame: what lies here is right. */
void land_current(struct resolver *resolver, const struct mf_frame *frame);

/** land_failed() - @error, an -errno of landing a frame, ends the link: what is not known to be
 * here is asked for again over the next one. Says that it is memory that lacks. Return: @error. */
int land_failed(struct mover *mover, int error);

/** land_count_missing() - @pages have become resolvable; tells the main thread at the last one. */
void land_count_missing(struct mover *mover, uint64_t pages);

/* ---- faults.c ---- */
struct fault_table *faults_table(struct mover *mover);
