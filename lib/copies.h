/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Are the copies that precopy rounds have made worth anything? A part of the session file.
 *
 * A round copies pages and protects them; whether one was written since, the kernel says, of every
 * mapping that is watched (lib/pagemap.h). That is all there is to know as long as nobody writes
 * through another one. When somebody may (a child that the target forked, a mapping that can't be
 * watched), every copy is in doubt, those made before and those made while he is there; and so is
 * every one when it turns out that there may have been such a writer. In doubt, everything counts
 * as written. A doubt is settled by a round that begins when no such writer is left, copies
 * everything (for everything counts as written), and sees no new one until its end.
 *
 * One thread doubts (the one that reads the events), one begins and ends rounds; any looks.
 */
#pragma once

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

enum mf_doubt {
    MF_DOUBT_NONE,
    MF_DOUBT_FORK,      /**< a child shares the memory */
    MF_DOUBT_UNWATCHED, /**< a mapping can't be watched: it is another userfaultfd's */
    MF_DOUBT_MANY,      /**< there are more mappings than are kept apart */
    MF_DOUBT_GONE,      /**< a mapping went that was not known */
    MF_DOUBT_MOVED,     /**< a mapping moved just while it was protected */
    MF_DOUBT_UNREAD,    /**< events were not followed: there was no mover, or no end to them */
    MF_DOUBTS
};

/** struct mf_copies - zeroed: no doubt. */
struct mf_copies {
    _Atomic uint32_t doubts;  /**< how many there were */
    _Atomic uint32_t settled; /**< the first so many are settled */
    _Atomic uint32_t writers; /**< who may write at this moment without being seen */
    _Atomic uint32_t why;     /**< of the last doubt, enum mf_doubt */
    _Atomic uint32_t marks;   /**< not 0: there are pages with MF_PAGE_STALE or MF_PAGE_REMOVED */
};

/** mf_copies_doubt() - there may have been a write that nobody saw. */
void mf_copies_doubt(struct mf_copies *copies, enum mf_doubt why);

/** mf_copies_writer() - somebody comes (@comes) who may write unseen, or goes. */
void mf_copies_writer(struct mf_copies *copies, bool comes, enum mf_doubt why);

/** mf_copies_good() - does the kernel's word decide which copies are current? */
bool mf_copies_good(const struct mf_copies *copies);

/** mf_copies_round() - a round begins; events have been read. Return: for mf_copies_settle(). */
uint32_t mf_copies_round(const struct mf_copies *copies);

/** mf_copies_settle() - that round is through, and left nothing out. Return: mf_copies_good(). */
bool mf_copies_settle(struct mf_copies *copies, uint32_t round);

/** mf_copies_why() - half a sentence about the last doubt, "" if there was none. */
const char *mf_copies_why(const struct mf_copies *copies);
