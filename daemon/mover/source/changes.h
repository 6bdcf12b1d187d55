/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What a change of the target's layout means for the copies that were made of its pages: the rules
 * that tracker.h tells, without the reading. On the thread that reads, with the gate closed.
 */
#pragma once

#include "daemon/mover/mover.h"

#define CHANGES_EXPLAINED 256u

/** struct changes_explained - the old place of a move whose unmap has not come yet. */
struct changes_explained {
    uint64_t start_addr, end_addr;
};

/** struct changes - zeroed, then the first group set by its owner. */
struct changes {
    struct mover *mover;
    bool has_files; /**< a region of which several mappings show the same page */
    /** is_still_there: is @part mapped where it was, by what the kernel says now? */
    bool (*is_still_there)(void *arg, const struct mf_mapping *part);
    void *arg;

    unsigned explained_count, explained_next;
    struct changes_explained explained[CHANGES_EXPLAINED];
};

/** changes_unmapped() - before the layout loses the range. */
void changes_unmapped(struct changes *changes, uint64_t start_addr, uint64_t end_addr);

/** changes_moved() - after what is mapped at @to_addr now was learned. Takes out of the layout what
 * is not mapped at the old place any more. @length_bytes: 0: a second mapping of the same. */
void changes_moved(struct changes *changes, uint64_t from_addr, uint64_t to_addr,
                   uint64_t length_bytes);

/** changes_gone() - no mapping is left in the range, which no event has told. Takes it out of the
 * layout. */
void changes_gone(struct changes *changes, uint64_t start_addr, uint64_t end_addr);

/** changes_discarded() - the target is about to discard pages, of the file or of a mapping. */
void changes_discarded(struct changes *changes, uint32_t region, uint64_t first, uint64_t pages);

/** changes_part() - the first of the target's known mappings that reaches into [@at_addr,
 * @end_addr), cut to that. Return: false if there is none. */
bool changes_part(const struct changes *changes, uint64_t at_addr, uint64_t end_addr,
                  struct mf_mapping *part);
