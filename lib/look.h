/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Looking which parts of a tmpfs file hold data (SEEK_DATA), by a thread of its own: of a file of
 * 64 GiB that takes the better part of a second, in a single system call, and whoever reads a
 * process's events must not be away for so long.
 *
 * One thread begins and ends looks; a second, the looker's, does them one after another.
 */
#pragma once

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "lib/extents.h"

/** struct mf_look - one look at one file; see mf_look_begin(). */
struct mf_look;

/** struct mf_looker - the thread, and the looks that wait for it. */
struct mf_looker {
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t asked;
    struct mf_look *first, **last;
    bool closing;
};

/** mf_looker_start() - Return: 0 or -errno. */
int mf_looker_start(struct mf_looker *looker);

/** mf_looker_end() - once every look has been ended. Waits for the one under way. */
void mf_looker_end(struct mf_looker *looker);

/** mf_look_begin() - @fd: may be closed meanwhile. Return: NULL: out of memory or descriptors. */
struct mf_look *mf_look_begin(struct mf_looker *looker, int fd, uint64_t page_bytes);

/** mf_look_done() - has it been done? Does not wait. */
bool mf_look_done(struct mf_looker *looker, struct mf_look *look);

/** mf_look_end() - of any look, done or not; frees it. @data: what was found, the caller's from now
 * on, if it is done; the last page of the file counts whole. @took_ns: how long it took.
 * Return: 0; -EAGAIN: it was not done; other -errno (-E2BIG: the file is in too many pieces). */
int mf_look_end(struct mf_looker *looker, struct mf_look *look, struct mf_extents *data,
                uint64_t *took_ns);
