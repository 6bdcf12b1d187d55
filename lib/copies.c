/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib/copies.h"

/* Sequentially consistent throughout: a handful of operations for a chunk of pages. */

void mf_copies_doubt(struct mf_copies *copies, enum mf_doubt why)
{
    atomic_store(&copies->why, (uint32_t)why);
    atomic_fetch_add(&copies->doubts, 1);
}

void mf_copies_writer(struct mf_copies *copies, bool comes, enum mf_doubt why)
{
    /* A round that began while he was there settles nothing, so his leaving is a doubt too. */
    if (comes)
        atomic_fetch_add(&copies->writers, 1);
    mf_copies_doubt(copies, why);
    if (!comes)
        atomic_fetch_sub(&copies->writers, 1);
}

bool mf_copies_good(const struct mf_copies *copies)
{
    return atomic_load(&copies->writers) == 0 &&
           atomic_load(&copies->doubts) == atomic_load(&copies->settled);
}

uint32_t mf_copies_round(const struct mf_copies *copies)
{
    return atomic_load(&copies->doubts);
}

bool mf_copies_settle(struct mf_copies *copies, uint32_t round)
{
    if (atomic_load(&copies->writers) == 0 && atomic_load(&copies->doubts) == round)
        atomic_store(&copies->settled, round);
    return mf_copies_good(copies);
}

const char *mf_copies_why(const struct mf_copies *copies)
{
    static const char *const words[MF_DOUBTS] = {
        [MF_DOUBT_NONE] = "",
        [MF_DOUBT_FORK] =
            "it forked, and what a child writes to memory that both share is not seen",
        [MF_DOUBT_UNWATCHED] = "it has mapped its memory in a way that can't be watched for writes",
        [MF_DOUBT_MANY] = "it maps its memory in more pieces than can be watched",
        [MF_DOUBT_GONE] = "a mapping of its memory came and went before it could be watched",
        [MF_DOUBT_MOVED] = "it began to move its memory just while that was being copied",
        [MF_DOUBT_UNREAD] = "for a while nobody followed what it did to its memory mappings",
    };
    const uint32_t why = atomic_load(&copies->why); /* written by a mover, which may be anybody */
    return why < MF_DOUBTS ? words[why] : "";
}
