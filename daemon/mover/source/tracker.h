/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The tracker: a thread of the source's mover that knows where the target maps its memory, while
 * precopy rounds ask what was written through that.
 *
 * It reads the events of the userfaultfd that watches for writes (lib/events.h). The target waits
 * in its system call until that is done: so it reads from the first moment to the last, with a link
 * or without. Without a mover memferryd reads (target.c); when that goes too, so does the last
 * reference to the userfaultfd, and with it whatever anybody waits for.
 *
 * The bits that tell written pages from others lie in the target's page tables. So:
 *
 *   a move       takes them along. What is mapped at the new place is learned.
 *   an unmap     loses them. Where a page is mapped elsewhere too, nothing tells any more that it
 *                was written here: it is marked (MF_PAGE_STALE) and counts as written until it is
 *                copied anew. It is marked after the mapping has gone, and unmarked before a page
 *                is protected and copied: so a mark that is too late for one copy is still there
 *                for the next look, and a mark that a copy takes away was for writes that are in
 *                it.
 *   a new one    of which no event tells is found by looking at /proc/PID/maps, when a round begins
 *                and when the guest is paused, and watched from then on. What is new there has no
 *                protected pages: all of it counts as written.
 *   a fork       makes a process that writes through bits of its own, which go with it. While it is
 *                there, and until a whole round was copied after it, all copies are in doubt
 *                (lib/copies.h). The userfaultfd over its memory is kept to know when it is gone;
 *                its events are read, or else it would wait.
 *   a discard    marks its pages (MF_PAGE_REMOVED): the next round looks whether they are holes.
 *                What they hold decides, not the mark: the event comes before the discard, and does
 *                not tell whether the file's pages go or only the mapping's.
 *
 * An unmap of what was not known may have been of a mapping that grew in place, or of one that was
 * moved and moved again before anybody looked: that puts all copies in doubt, unless a move
 * explains it, which is followed by the unmap of its old place.
 *
 * What no event tells and no look finds, a mapping or a writer that comes and goes in between, is
 * not seen (doc/kernel.md).
 */
#pragma once

#include <stdbool.h>

#include "daemon/mover/mover.h"

/** tracker_start() - if writes are tracked. Return: 0, or -1 with errno. */
int tracker_start(struct mover *mover);

/**
 * tracker_look() - main thread: have everything read that the target has said until now, and its
 * maps looked at. Does nothing where writes are not tracked, and after RELEASE, when nothing
 * changes any more.
 */
void tracker_look(struct mover *mover);
