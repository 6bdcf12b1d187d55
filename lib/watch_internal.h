/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What the files of lib/watch.h share. */
#pragma once

#include "lib/watch.h"

/** mf_watch_take_up() - watch one mapping. Return: 0 or the (positive) errno that refused it. */
int mf_watch_take_up(int uffd, const struct mf_watched *one);

/** mf_watch_mark() - memory that a child of it inherits, by which it can be found. */
struct mf_extent mf_watch_mark(const struct mf_watch *watch);

/** mf_watch_forget() - mappings that a change has touched: what is there now is seen by the next
 * scan.
 */
void mf_watch_forget(struct mf_watch *watch, uint64_t start_addr, uint64_t end_addr);

/** mf_watch_close() - close a descriptor, if it is one, and mark it so. */
void mf_watch_close(int *fd);
