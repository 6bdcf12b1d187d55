/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The progress of a migration on stderr: a bar that is redrawn on a terminal, a line now and then
 * elsewhere.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "control.pb-c.h"

/** A quantity and how fast it grows, smoothed over about two seconds. */
struct rate {
    uint64_t value, at_ns;
    double per_second;
    bool known; /**< per_second was measured */
};

/** What the rounds of precopy have come to so far. */
struct forecast {
    uint32_t round;
    uint64_t begun_bytes; /**< what the round had to send when it was first seen */
    double again;         /**< what a round has to send, as a share of the one before */
    bool known;           /**< `again` was measured: more than one round was seen */
};

/** forecast_update() - the round now, and what is left of it. A migration that begins anew (round 1
 * after another) begins a new forecast. */
void forecast_update(struct forecast *forecast, uint32_t round, uint64_t left_bytes);

/**
 * forecast_bytes() - what will have to be sent in all from now on: the rest of this round, and what
 * is written meanwhile.
 * @follows: what is left over may follow the guest (hybrid), so that the sending ends in any case.
 * Return: false if it ends never, as each round leaves no less than the one before.
 */
bool forecast_bytes(const struct forecast *forecast, uint64_t left_bytes, bool follows,
                    uint64_t *out);

struct progress {
    bool wanted;   /**< false: print nothing */
    bool terminal; /**< redraw one line */
    bool drawn;    /**< a bar is on the screen */
    uint64_t printed_ns;
    char state[16];   /**< as printed last */
    char mode[16];    /**< as seen last: a fallback changes it */
    char reason[256]; /**< as printed last */
    struct rate sent, confirmed, round;
    struct forecast forecast;
};

/** rate_update() - the value at @now_ns. A value that shrinks (a new round) restarts the estimate.
 */
void rate_update(struct rate *rate, uint64_t value, uint64_t now_ns);

/** progress_open() - look at stderr. @wanted: false makes all the others do nothing. */
void progress_open(struct progress *progress, bool wanted);

/** progress_show() - draw the session as it is; cheap enough for every reply. */
void progress_show(struct progress *progress, const Memferry__Control__Session *session);

/** progress_clear() - take the bar off the screen, before anything else is printed. */
void progress_clear(struct progress *progress);
