/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Watching the memory layout of a process that knows nothing of it, without making it wait on any
 * page: a userfaultfd with all layout events, registered for nothing but asynchronous write
 * protection (Linux 6.7), which is never used to protect anything.
 *
 * The userfaultfd is made inside the process (lib/inject.h) and closed there again before anything
 * is registered. So the watching process holds the only reference: when it goes, in whatever way,
 * the kernel takes everything back by itself and lets go of threads that wait for an event to be
 * read. (A session's userfaultfd is treated the other way round: there, pages would be lost.)
 *
 * The process does wait for each event to be read. Whoever watches must keep reading. New mappings
 * are found by looking (mf_watch_scan()); only what is mapped over something that is watched is
 * watched at once.
 *
 * Not thread-safe: one thread a watch. Needs CAP_SYS_PTRACE, and what lib/inject.h needs.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "lib/change.h"
#include "lib/error.h"
#include "lib/extents.h"
#include "lib/observe.h"

/** struct mf_watched - a mapping of the process that was met. */
struct mf_watched {
    uint64_t start_addr, end_addr, offset_bytes;
    dev_t device;
    ino_t inode;
    bool shared;
    int refused; /**< 0: it is watched; else why not, a positive errno */
};

/** struct mf_watch - one address space.
 * @pid:     0: a child whose number could not be found out.
 * @pidfd:   becomes readable when the process has ended; -1: not known, or ended long ago.
 * @uffd:    becomes readable with an event; -1: no address space is watched at present.
 * @maps:    @count mappings as of the last mf_watch_scan(), in ascending order.
 * @stale:   the layout has changed since.
 * @ranges:  the addresses that are watched, as far as events and scans tell.
 * @mark:    of a child: memory that it has inherited, by which it can be found; empty: unknown.
 * @woken:   for mf_observe(): others waited when the last message was read.
 * @gone_since_ns: when some of them were first seen to be mapped no more without a word; 0: none.
 */
struct mf_watch {
    pid_t pid;
    int pidfd, proc_fd, statm_fd, uffd;
    struct mf_watched *maps;
    size_t count;
    uint64_t total_pages; /**< size of the address space at the last scan: proc_pid_statm(5) */
    bool stale, woken;
    struct mf_extents ranges;
    struct mf_extent mark;
    struct mf_observe_cache *threads; /**< NULL until it is needed */
    uint64_t gone_since_ns;
};

/** mf_watch_find() - a process by its number, before it is attached to.
 * Refuses, by name: no such process, a thread's number, a kernel thread, one that has ended, no
 * permission. Return: 0 with @watch initialised (mf_watch_end() ends it), or -errno with a
 * sentence.
 */
int mf_watch_find(struct mf_watch *watch, pid_t pid, struct mf_error *err);

/** mf_watch_attach() - begin to watch, or, after an exec, begin anew. Stops one thread for under a
 * millisecond, twice. Nothing is registered yet: mf_watch_scan() does that. Return: 0 or -errno
 * with a sentence (the kernel is too old, lib/inject.h's). */
int mf_watch_attach(struct mf_watch *watch, struct mf_error *err);

/**
 * mf_watch_adopt() - watch a child that was forked: what the child inherited is watched already.
 * @parent: as it was at the fork.
 * @pid:  0 if it is not known.
 * @uffd: as handed over with the fork; owned by @watch from now on.
 * A child that has ended meanwhile is no error: it is told by `pidfd` or mf_watch_has_ended().
 */
void mf_watch_adopt(struct mf_watch *watch, const struct mf_watch *parent, pid_t pid, int uffd);

/** mf_watch_identify() - a child whose number is not known: it could not be seen in time, and may
 * be by now. Looks at every process: some milliseconds. */
void mf_watch_identify(struct mf_watch *watch);

/** mf_watch_let_go() - of the address space: the kernel takes everything back. The process itself
 * is still known. */
void mf_watch_let_go(struct mf_watch *watch);

/** mf_watch_end() - let go, and free everything. */
void mf_watch_end(struct mf_watch *watch);

/** mf_watch_grown() - has the size of the address space changed since the last scan? About 2 µs. */
bool mf_watch_grown(struct mf_watch *watch);

/** mf_watch_has_ended() - has the process exited? */
bool mf_watch_has_ended(const struct mf_watch *watch);

/** mf_watch_has_memory() - has the process an address space at present? One that exits has none;
 * one that has lost the one that was watched and has memory has done an exec. */
bool mf_watch_has_memory(struct mf_watch *watch);

/** mf_watch_fn - is told of each change, in the kernel's order. @change is complete but for
 * `time_us`. @child_uffd: of a fork, else -1; the callee owns it and has to keep reading it. */
typedef void mf_watch_fn(struct mf_watch *watch, const struct mf_change *change, int child_uffd,
                         void *arg);

/**
 * mf_watch_scan() - take up mappings that are not watched yet, and tell @fn of those that are gone
 * without an event (shmdt(2)): an UNMAP of unknown reason.
 * A few µs a mapping. Mappings that can't be watched stay in `maps` with the reason. Return: 0 or
 * -errno (-ESRCH: the address space is gone).
 */
int mf_watch_scan(struct mf_watch *watch, mf_watch_fn *fn, void *arg);

/**
 * mf_watch_read() - read what is there, at most about a hundred events, and find out who did it.
 * Does not wait for events, but up to 20 ms for a forked child to appear. Return: how many were
 * read, or -errno. -EMFILE: a fork waits, and with it the thread, until a descriptor of ours is
 * free; the callee should not let it come to that.
 */
int mf_watch_read(struct mf_watch *watch, mf_watch_fn *fn, void *arg);
