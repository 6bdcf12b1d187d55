/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Where private memory lies after whoever followed its events has died with one in its hands.
 *
 * The layout file (lib/layout_file.h) is then one event behind: a piece is said to lie where
 * nothing is watched any more, and something is watched of which nothing is said. If only one of
 * the two can be the other, that was the event. Pure.
 */
#pragma once

#include <stdint.h>
#include <sys/types.h>

#include "lib/smaps.h"
#include "lib/target.h"

/**
 * mf_reconcile() - bring @pieces (of one context, in any order) in line with @watched.
 * A piece of which nothing is watched any more is moved to where a span of the same length, or the
 * only one that is left over and longer, is watched and unknown; it goes if there is no such span.
 * @count: of @pieces, at most @max; changed.
 * Return: how many pieces could lie at several places, or several at one: they are taken out.
 */
unsigned mf_reconcile(struct mf_mapping *pieces, unsigned *count, unsigned max,
                      const struct mf_span *watched, unsigned watched_count);
