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

struct progress {
    bool wanted;   /**< false: print nothing */
    bool terminal; /**< redraw one line */
    bool drawn;    /**< a bar is on the screen */
    uint64_t printed_ns;
    char state[16]; /**< as printed last */
    struct rate sent, confirmed;
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
