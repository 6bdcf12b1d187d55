/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The destination's fault path, file by file:
 *   faults.c       the fault thread: faults and events in, REQUESTs out, urgent answers in
 *   fault_table.c  who waits since when
 *   account.c      what landing a page means to the session
 *   changes.c      what is to be found out when the target changes its layout
 *   catch_up.c     where a successor finds private memory
 *   bulk.c         a bulk connection's thread
 * What a userfaultfd says is read by lib/events.c; lib/land.c gets bytes into the page cache, and
 * lib/resolve.c makes the ioctls that resolve.
 */
#pragma once

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "daemon/mover/mover.h"
#include "lib/events.h"
#include "lib/land.h"

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

/* ---- account.c ---- */

/** account_lander() - what a thread lands with, its figures and failures being those of @mover.
 * @on_event, @arg: see struct mf_resolver. */
struct mf_lander account_lander(struct mover *mover, void (*on_event)(void *arg, uint32_t context),
                                void *arg);

/** account_served() - a page that had FAULTED has been resolved: stop the clock. Any thread. */
void account_served(struct mover *mover, uint32_t region, uint64_t page);

/** account_missing() - @pages have become resolvable; tells the main thread at the last one. Any
 * thread. */
void account_missing(struct mover *mover, uint64_t pages);

/** account_failed() - @error, an -errno of landing a frame, ends the link: what is not known to be
 * here is asked for again over the next one. Says that it is memory that lacks. Return: @error. */
int account_failed(struct mover *mover, int error);

/* ---- changes.c: struct mf_events_ops, as far as the companion is asked ---- */

/** changes_learn() - look at everything that memferryd handed over: it was mapped when it looked,
 * but was it registered then? Before anything is served. */
void changes_learn(struct mover *mover, struct mf_events *events);
void changes_forked(struct mover *mover, struct mf_events *events, uint32_t parent,
                    uint32_t context);
int changes_maps(struct mover *mover, uint32_t context, pid_t tid, uint64_t addr);
unsigned changes_observe(struct mover *mover, uint32_t context);
enum mf_removed changes_removed(struct mover *mover, struct mf_events *events, uint32_t context,
                                uint64_t start_addr, uint64_t end_addr);
uint64_t changes_moved_bytes(const struct mover *mover, const struct uffd_msg *message);

/* ---- catch_up.c ---- */

/** catch_up() - a successor, before it serves anybody: bring the layout of private memory up to
 * date.
 * @read: read the events of a context. Fault thread. */
void catch_up(struct mover *mover, void (*read)(void *arg, uint32_t context), void *arg);

/* ---- faults.c ---- */
struct fault_table *faults_table(struct mover *mover);
