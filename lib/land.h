/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Landing: bytes into the RAM file, so that they are in the page cache that the target maps; the
 * page's state; then resolving it.
 *
 * Any number of threads may land at a time, each with a struct mf_lander of its own; one page is
 * filled by exactly one of them (lib/page_state.h), and what the others brought is dropped. Nothing
 * here allocates or takes a lock.
 *
 * What is landed is named by a frame (proto/frame.h) that mf_frame_check() has passed; only its
 * type's own fields are looked at, and of the flags ROUND and HOLE.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "lib/page_state.h"
#include "lib/resolve.h"
#include "proto/frame.h"

enum mf_landed {
    MF_LANDED_DATA,
    MF_LANDED_ROUND, /**< a precopy round's bytes: unconfirmed, so not resolvable */
    MF_LANDED_ZERO,
    MF_LANDED_HOLE,
    MF_LANDED_CURRENT,
    MF_LANDED_DISCARDED, /**< discarded while it was being landed */
};

/** struct mf_lander_ops - what the owner is told; called on the landing thread. */
struct mf_lander_ops {
    /** served: a page that somebody waited for (FAULTED) has been resolved. */
    void (*served)(void *arg, uint32_t region, uint64_t page);
    /** landed: so many pages; all but MF_LANDED_ROUND have become resolvable just now. */
    void (*landed)(void *arg, enum mf_landed what, uint64_t pages);
    /** broken: a page that was discarded while it landed can't be punched out (@error, an -errno of
     * fallocate(2)). If this returns, the page stays as it is and is never resolved: no stale byte
     * is seen, but who waits for it goes on waiting. */
    void (*broken)(void *arg, uint32_t region, int error);
};

/** struct mf_lander - what a thread lands with. Everything pointed at outlives it. */
struct mf_lander {
    struct mf_resolver resolver;
    const struct mf_pages *pages; /**< the states, by region */
    bool by_mapping; /**< store through the second mapping, not by write(2) (see land.c) */
    const struct mf_lander_ops *ops;
    void *arg;
};

/**
 * mf_land_data() - the payload of a DATA frame, already received into @payload: claim the pages,
 * write them into the RAM file, confirm, resolve. Pages that somebody else has filled are skipped.
 * Return: 0, or -errno of writing the RAM file (-ENOSPC, -ENOMEM: the pages stay missing). -EBUSY,
 * of private memory: one of the contexts that map it is held (lib/context.h).
 */
int mf_land_data(const struct mf_lander *lander, const struct mf_frame *frame,
                 const uint8_t *payload);

/**
 * mf_land_begin_huge() - a page of hugetlbfs, to be received straight into the second mapping.
 * @to: where to receive to, or NULL: somebody else has the page, receive into scratch.
 * Return: 0, or -errno: no huge page is to be had.
 */
int mf_land_begin_huge(const struct mf_lander *lander, const struct mf_frame *frame, uint8_t **to);

/** mf_land_end_huge() - has it @arrived? Only after begin gave a place. */
void mf_land_end_huge(const struct mf_lander *lander, const struct mf_frame *frame, bool arrived);

/** mf_land_zero() - a ZERO frame. */
void mf_land_zero(const struct mf_lander *lander, const struct mf_frame *frame);

/** mf_land_current() - a CURRENT frame: what lies here is right. */
void mf_land_current(const struct mf_lander *lander, const struct mf_frame *frame);

/** mf_land_present() - somebody has written these pages' bytes into the RAM file by himself: those
 * that are UNCONFIRMED are confirmed and resolved; holes among them are zeros. Told as
 * MF_LANDED_CURRENT. */
void mf_land_present(const struct mf_lander *lander, uint32_t region, uint64_t first,
                     uint64_t pages);

/**
 * mf_land_discard() - the target has discarded pages: they are DISCARDED, or will be when who lands
 * them is through. By the thread that reads events, with the gate closed, so it does not resolve:
 * who waits is woken and faults again.
 * @all: take out of the file whatever lies there. Else only what the target has never seen, which
 * must not be seen now either; the rest it takes out itself, if that is what it does.
 */
void mf_land_discard(const struct mf_lander *lander, uint32_t region, uint64_t first,
                     uint64_t pages, bool all);
