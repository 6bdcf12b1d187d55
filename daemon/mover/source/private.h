/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Private anonymous memory at the source: what sender.c does differently where no file holds the
 * pages.
 *
 * A page is what lies at its place in the region's range of addresses, whatever the process maps
 * there by now: the layout does not change. What it maps anew is not watched, and so counts as
 * written.
 *
 * Bytes are read(2) through /proc/PID/mem, opened by memferryd, into a buffer of the sender's, and
 * sent from there: one copy more than from a file. A page that holds nothing is not read.
 */
#pragma once

#include "daemon/mover/source/sender.h"

/** private_look() - before anything else is asked about [@first, +@pages) of @region, at most
 * SENDER_CHUNK_PAGES: which of them hold anything.
 * Return: 0, or -errno (-ESRCH: the process is gone, and the memory with it), said to link_fail().
 */
int private_look(struct sender *sender, uint32_t region, uint64_t first, uint64_t pages);

/** private_extent() - what [@page, @end) begins with: @data or a hole, and up to where; data in
 * pieces that private_fetch() takes. Within what private_look() saw. */
void private_extent(const struct sender *sender, uint64_t page, uint64_t end, bool *data,
                    uint64_t *until);

/**
 * private_fetch() - read [@first, @end), at most one piece, for private_page(). May flush the
 * sender.
 * @error: 0, or the -errno of reading: the bytes are not there. While the process runs that may
 * only mean that it has unmapped them meanwhile. Return: 0 or -errno of the connection.
 */
int private_fetch(struct sender *sender, uint32_t region, uint64_t first, uint64_t end, int *error);

/** private_page() - the bytes of a page that was fetched last. Valid until they are sent. */
const uint8_t *private_page(const struct sender *sender, uint64_t page);

/** private_failed() - the memory can't be read, and it is needed now: end the link with a sentence.
 * Return: @error. */
int private_failed(struct mover *mover, uint32_t region, int error);

/** private_allocated_bytes() - how much of a region holds anything. */
uint64_t private_allocated_bytes(const struct mover *mover, uint32_t region);
