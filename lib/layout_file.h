/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Where private memory lies by now, in a file that outlives the mover.
 *
 * What is mapped where of a file, a successor sees by looking. Of private memory it sees only
 * addresses, not which page came from where: that follows from the events alone, and those that
 * were read are gone. So whoever applies events writes down, after each, what it then knows.
 *
 * What dies between the reading of an event and the writing leaves the file one event behind; that
 * is some microseconds, only while the target changes its layout, and lib/reconcile.h finds out
 * which event it was.
 *
 * Not for several writers. memferryd makes the file and never looks into it.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "lib/error.h"
#include "lib/layout.h"
#include "lib/zeros.h"

struct mf_layout_file;

/** mf_layout_file_create() - @pages: of each region, 0 for those that are not private memory.
 * Return: a memfd that is empty, owned by the caller, or -errno. */
int mf_layout_file_create(const uint64_t *pages, unsigned region_count, struct mf_error *err);

/** mf_layout_file_map() - map a file that mf_layout_file_create() made; @fd may be closed then.
 * Return: NULL with @err. Unmap with mf_layout_file_unmap. */
struct mf_layout_file *mf_layout_file_map(int fd, struct mf_error *err);

/** mf_layout_file_zeros() - the bits of the target itself (not of its children, which are followed
 * by one mover only), in the file: whoever comes later finds those that were set. @pages: as they
 * were given to create. Return: to be freed before the file is unmapped; NULL: out of memory, or
 * the file does not fit. */
struct mf_zeros *mf_layout_file_zeros(struct mf_layout_file *file, const uint64_t *pages,
                                      unsigned region_count);
void mf_layout_file_unmap(struct mf_layout_file *file);

/** mf_layout_file_store() - @mappings instead of what was there; whoever reads finds one or the
 * other. @count: at most MF_LAYOUT_MAX. */
void mf_layout_file_store(struct mf_layout_file *file, const struct mf_mapping *mappings,
                          unsigned count);

/** mf_layout_file_load() - what was stored last. @out: room for MF_LAYOUT_MAX.
 * Return: how many, or -ENODATA if nothing ever was. */
int mf_layout_file_load(const struct mf_layout_file *file, struct mf_mapping *out);
