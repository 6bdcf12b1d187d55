/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Precopy rounds: go on, switch, or give the goal up? Pure; memferryd asks after every round.
 *
 * Hybrid needs no converging guest: what is stale follows after RELEASE. It goes on only while a
 * round leaves clearly less than the one before. Precopy wants the rest to fit into a blackout, and
 * says so if it never will.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

enum mf_mode { MF_HYBRID, MF_POSTCOPY, MF_PRECOPY };

enum mf_rounds_next {
    MF_ROUNDS_AGAIN,
    MF_ROUNDS_SWITCH,
    MF_ROUNDS_FALL_BACK, /**< precopy does not converge and may become hybrid: switch as that */
};

/** struct mf_rounds - options, and what the rounds so far have shown. */
struct mf_rounds {
    enum mf_mode mode;
    unsigned
        max_rounds; /**< 0: the mode's own: hybrid MF_ROUNDS_HYBRID, precopy as many as it takes */
    uint64_t max_blackout_ns; /**< precopy */
    bool fallback;
    bool switch_now; /**< an operator's word, or the time is up: precopy becomes hybrid */

    unsigned round;               /**< of the last one that ended */
    uint64_t pages, before_pages; /**< copied in it, and in the one before */
    uint64_t duration_ns, before_ns;
    uint64_t dirty_pages; /**< copied, and written again by the end of it; MF_ROUNDS_UNKNOWN */
};

#define MF_ROUNDS_UNKNOWN UINT64_MAX

#define MF_ROUNDS_HYBRID 8u
#define MF_ROUNDS_MAX_BLACKOUT_MS 300u
#define MF_ROUNDS_PAGE_NS 5000u  /**< to send a page, where nothing better is known */
#define MF_ROUNDS_FEW_PAGES 256u /**< fewer than these are not worth another round */

/** mf_rounds_done() - a round has landed; what now?
 *  @dirty_pages: of what was copied so far, written again by now; or MF_ROUNDS_UNKNOWN. */
enum mf_rounds_next mf_rounds_done(struct mf_rounds *rounds, unsigned round, uint64_t pages,
                                   uint64_t duration_ns, uint64_t dirty_pages);

/** mf_rounds_dirty_rate() - pages the guest dirties a second: what was found dirty at the end of
 * the last round; where that is not known, what it found was dirtied while the one before ran. 0 as
 * long as nothing is known. */
uint64_t mf_rounds_dirty_rate(const struct mf_rounds *rounds);

/** mf_rounds_expected_blackout_ns() - how long it would take by now to send what is dirty and to
 * confirm everything. 0: not known yet. */
uint64_t mf_rounds_expected_blackout_ns(const struct mf_rounds *rounds);

/** mf_rounds_fit() - may @pages be sent while the guest stands still, as fast as the last round
 * was? What is written between that round's end and the pause is no surprise, so up to twice as
 * long as was asked for; but the guest must not stand still for whatever has come up meanwhile. */
bool mf_rounds_fit(const struct mf_rounds *rounds, uint64_t pages);

/** mf_mode_name() / mf_mode_of() - "hybrid", "postcopy", "precopy". mf_mode_of: 0 or -EINVAL; NULL
 * and "" mean hybrid. */
const char *mf_mode_name(enum mf_mode mode);
int mf_mode_of(const char *name, enum mf_mode *mode);
