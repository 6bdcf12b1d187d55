/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What land.c and land_private.c share. */
#pragma once

#include "lib/land.h"

/** land_punch() - take pages out of the region's file (of private memory: out of the file in which
 * they waited). Return: 0 or -errno. */
int land_punch(const struct mf_region *region, uint64_t first, uint64_t pages);

/** land_finish_discard() - a page was discarded while this thread filled it: take the bytes out
 * again, then let it be zeros. */
void land_finish_discard(const struct mf_lander *lander, uint32_t region, uint64_t page);

/**
 * land_private() - [@first, +@pages) of private memory, claimed by the caller, whose bytes at @from
 * are known to be right: copy them to every place where the pages are mapped, then CONFIRMED.
 * @staged: they were in the region's file, and leave it.
 * Return: how many are confirmed now in *@confirmed, and 0; or -ENOMEM: all are UNCONFIRMED again.
 */
int land_private(const struct mf_lander *lander, uint32_t region, uint64_t first, uint64_t pages,
                 const uint8_t *from, bool staged, uint64_t *confirmed);

/** land_private_current() - of [@first, @end) what an earlier round brought, all in the region's
 * file, is right. Return: how many pages are confirmed now. */
uint64_t land_private_current(const struct mf_lander *lander, uint32_t region, uint64_t first,
                              uint64_t end);
