/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The contexts of a target: one for each userfaultfd, which is one for each address space. A child
 * that the target forks brings one more, and takes it with it when it ends.
 *
 * One thread changes the table, with the gate closed where others resolve (lib/gate.h); those look
 * contexts up inside the gate. An index is given again to another context once it was dropped.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "lib/zeros.h"

#define MF_CONTEXT_CHUNK 64u
#define MF_CONTEXT_CHUNKS 1024u
#define MF_CONTEXTS_MAX (MF_CONTEXT_CHUNK * MF_CONTEXT_CHUNKS)

/** struct mf_context - one address space. Owns its descriptors. */
struct mf_context {
    int uffd;    /**< -1: this place is free */
    int maps_fd; /**< its /proc/PID/maps, -1: not known */
    int info_fd; /**< of mf_uffd_open_info(), -1: none; makes reading many faults cheaper */
    pid_t pid;   /**< for its owner: whose it is, 0: not known */
    /** For lib/events.c: since when its messages could not be read, for who sends an event is not
     * seen, or (busy) gets to no CPU; 0: they were read. */
    uint64_t unread_ns, busy_ns;
    /** Others waited when its last event was read, or that is not known (lib/observe.h). */
    bool woken;
    bool more; /**< for lib/events.c: a fault was read, and since then there always was more to read
                */
    bool child;             /**< came by a fork */
    bool unknown;           /**< for its owner: what private memory it maps is not known */
    bool leaving;           /**< for its owner: it is being dropped */
    bool held;              /**< for its owner: a fork waits in it, as no descriptor is free */
    struct mf_zeros *zeros; /**< owned; private pages that were discarded here alone */
    unsigned maps_tries;    /**< for its owner: maps_fd was asked for in vain so often */
};

/** struct mf_contexts - zeroed is empty. */
struct mf_contexts {
    uint32_t count; /**< all that are not free are below */
    uint32_t used;
    struct mf_context *chunk[MF_CONTEXT_CHUNKS];
};

/** mf_context_at() - Return: NULL if there is none of that number. */
static inline struct mf_context *mf_context_at(const struct mf_contexts *contexts, uint32_t index)
{
    if (index >= contexts->count)
        return 0;
    struct mf_context *context =
        &contexts->chunk[index / MF_CONTEXT_CHUNK][index % MF_CONTEXT_CHUNK];
    return context->uffd >= 0 ? context : 0;
}

/*
 * A held context. A fork's event that brings a descriptor can't be read when none is free, and as
 * long as it is unread the kernel refuses every fill of its address space. So nothing is filled
 * there meanwhile, or those who fill would serve nobody else; whoever waits goes on waiting. Its
 * owner sets `held`, with the gate closed, when reading has failed so; tries to read again now and
 * then; and when that works clears it and wakes all who wait (mf_uffd_wake_all()), who fault again.
 */

/** mf_context_uffd() - the userfaultfd, or -1, on which every call fails harmlessly with EBADF. */
static inline int mf_context_uffd(const struct mf_contexts *contexts, uint32_t index)
{
    const struct mf_context *context = mf_context_at(contexts, index);
    return context ? context->uffd : -1;
}

/** mf_context_fill_uffd() - the same for filling: -1 as well if it is held. */
static inline int mf_context_fill_uffd(const struct mf_contexts *contexts, uint32_t index)
{
    const struct mf_context *context = mf_context_at(contexts, index);
    return context && !context->held ? context->uffd : -1;
}

/** mf_contexts_add() - takes @uffd and @maps_fd (-1: none) over if it succeeds.
 * Return: its index, -ENOMEM, or -EMFILE when there are MF_CONTEXTS_MAX. */
int mf_contexts_add(struct mf_contexts *contexts, int uffd, int maps_fd, bool child);

/** mf_contexts_drop() - close its descriptors and free its place. */
void mf_contexts_drop(struct mf_contexts *contexts, uint32_t index);

/** mf_contexts_free() - drop all of them, and the table's memory. */
void mf_contexts_free(struct mf_contexts *contexts);
