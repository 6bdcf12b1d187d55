/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib/rounds.h"

#include <errno.h>
#include <stddef.h>
#include <string.h>

static const char *const names[] = {
    [MF_HYBRID] = "hybrid",
    [MF_POSTCOPY] = "postcopy",
    [MF_PRECOPY] = "precopy",
};

const char *mf_mode_name(enum mf_mode mode)
{
    return names[mode];
}

int mf_mode_of(const char *name, enum mf_mode *mode)
{
    if (!name || !name[0]) {
        *mode = MF_HYBRID;
        return 0;
    }
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++)
        if (strcmp(name, names[i]) == 0) {
            *mode = (enum mf_mode)i;
            return 0;
        }
    return -EINVAL;
}

uint64_t mf_rounds_dirty_rate(const struct mf_rounds *r)
{
    /* Copied one after the other, the pages were open to writes for half of the round. */
    if (r->round && r->dirty_pages != MF_ROUNDS_UNKNOWN)
        return (uint64_t)(2 * (double)r->dirty_pages * 1e9 / (double)r->duration_ns);
    if (r->round < 2 || r->before_ns == 0)
        return 0;
    return (uint64_t)((double)r->pages * 1e9 / (double)r->before_ns);
}

uint64_t mf_rounds_expected_blackout_ns(const struct mf_rounds *r)
{
    if (r->round < 2)
        return 0;
    if (r->pages == 0)
        return r->duration_ns;
    /* A guest that writes few pages over and over dirties them all in a round much shorter than the
     * one before: as many as were copied are expected to be dirty again, more where the round was
     * longer. */
    double longer =
        r->duration_ns > r->before_ns ? (double)r->duration_ns / (double)r->before_ns : 1;
    return (uint64_t)(longer * (double)r->duration_ns) + 1;
}

bool mf_rounds_fit(const struct mf_rounds *r, uint64_t pages)
{
    /* A round of few pages says nothing of how fast many are sent. */
    const double page_ns = r->pages >= MF_ROUNDS_FEW_PAGES
                               ? (double)r->duration_ns / (double)r->pages
                               : MF_ROUNDS_PAGE_NS;
    return (double)pages * page_ns <= 2 * (double)r->max_blackout_ns;
}

static enum mf_rounds_next decide(const struct mf_rounds *r)
{
    if (r->switch_now)
        return r->mode == MF_PRECOPY ? MF_ROUNDS_FALL_BACK : MF_ROUNDS_SWITCH;
    if (r->mode == MF_PRECOPY) {
        uint64_t blackout_ns = mf_rounds_expected_blackout_ns(r);
        if (blackout_ns && blackout_ns <= r->max_blackout_ns)
            return MF_ROUNDS_SWITCH;
        if (r->max_rounds && r->round >= r->max_rounds)
            return MF_ROUNDS_FALL_BACK;
        /* Not clearly less than before, several times over: it will not converge. */
        if (r->fallback && r->round >= MF_ROUNDS_HYBRID && r->pages * 10 >= r->before_pages * 7)
            return MF_ROUNDS_FALL_BACK;
        return MF_ROUNDS_AGAIN;
    }
    if (r->round >= (r->max_rounds ? r->max_rounds : MF_ROUNDS_HYBRID))
        return MF_ROUNDS_SWITCH;
    if (r->dirty_pages != MF_ROUNDS_UNKNOWN) {
        /*
         * What would the next round leave? Pages that are dirty now stay open to writes for all of
         * it, or for half of it once they are copied: with a share q of a round's pages dirty at
         * its end, the next leaves q / (1 - q) of what is dirty now. A round that does not leave a
         * third or less costs more than it saves: what is dirty follows after RELEASE.
         */
        return r->dirty_pages < MF_ROUNDS_FEW_PAGES || r->dirty_pages >= r->pages / 4
                   ? MF_ROUNDS_SWITCH
                   : MF_ROUNDS_AGAIN;
    }
    if (r->round == 1)
        return MF_ROUNDS_AGAIN;
    if (r->pages < MF_ROUNDS_FEW_PAGES || r->pages * 2 >= r->before_pages)
        return MF_ROUNDS_SWITCH;
    return MF_ROUNDS_AGAIN;
}

enum mf_rounds_next mf_rounds_done(struct mf_rounds *r, unsigned round, uint64_t pages,
                                   uint64_t duration_ns, uint64_t dirty_pages)
{
    r->before_pages = r->pages;
    r->before_ns = r->duration_ns;
    r->round = round;
    r->pages = pages;
    r->duration_ns = duration_ns ? duration_ns : 1;
    r->dirty_pages = dirty_pages;
    return decide(r);
}
