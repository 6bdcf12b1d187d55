/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Who waits inside a system call that changes the memory layout, seen from outside.
 *
 * A thread that changes the layout waits until its message is read from the userfaultfd. So the
 * time to look is between the moment at which a message is known to be there
 * (mf_uffd_event_pending(), or poll(2) where there are no faults) and the moment at which it is
 * read. proc_pid_syscall(5) shows the call and its arguments, proc_pid_wchan(5) whether it is a
 * userfaultfd's event that the thread waits for.
 *
 * Looking at thread after thread takes time, in which others begin to wait. But the kernel hands
 * messages out in the order in which they came. All who waited when a look began are seen by it. So
 * two looks are taken: whoever queued before somebody that the first one saw is seen by the second
 * one at the latest, and as many messages may be read as the first one saw waiters. Each of them is
 * from somebody whom the second one saw.
 *
 * One who waits can be overlooked for one reason: reading a message wakes all who wait, and those
 * whose it was not have to get to a processor to sleep again, which on a busy machine takes a
 * while. But that can only be somebody who waited when the last message was read. So whoever reads
 * asks right afterwards whether there is more to be read (poll(2)), and says so here (@woken).
 *
 * Needs ptrace access to the process (ptrace(2): PTRACE_MODE_ATTACH_FSCREDS, so CAP_SYS_PTRACE for
 * anybody else's). Thread-safe. Nothing here allocates or takes a lock.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "lib/change.h"
#include "lib/error.h"

/** mf_observe_open() - /proc/PID, for the functions below. It stays this process's also when the
 * number is used again. Return: a descriptor (the caller's), or -errno with a sentence. */
int mf_observe_open(pid_t pid, struct mf_error *err);

#define MF_OBSERVE_MAX 256 /**< waiters that can be kept apart at once */

/** struct mf_observation - what mf_observe() saw.
 * @count:    entries of the caller's array that are filled.
 * @readable: so many messages may be read now, and each is from one of them. At most @count.
 * @complete: false: there were more waiters than the array can hold; messages may be from others
 *            too.
 * @unsettled: somebody was woken long ago and has not got to a CPU since, so his call can't be
 * seen: `readable` is 0 then.
 * @others_free: one of those others may free a file's pages (mf_blocked_frees()). Whoever does has
 *            his place in the array before those who do not.
 */
struct mf_observation {
    size_t count, readable;
    bool complete, others_free, unsettled;
};

/**
 * mf_observe() - who waits.
 * @proc_fd: of mf_observe_open().
 * @woken:   did others wait when the last message was read, or is that not known? Then it is waited
 *           until nobody can be one of them who has not got to a processor since.
 * @blocked: room for @max, at most MF_OBSERVE_MAX: for the threads that change the layout at the
 *           same time, not for all that there are.
 * Threads that run are no candidates, nor those in other calls, unless proc_pid_wchan(5) says that
 * they wait for a userfaultfd's event. Return: 0, or -errno (-ESRCH: the process is gone, -EPERM).
 * Takes about 5 µs a thread and look.
 */
int mf_observe(int proc_fd, bool woken, struct mf_blocked *blocked, size_t max,
               struct mf_observation *out);

#define MF_OBSERVE_SLOTS 1024

/** struct mf_observe_cache - descriptors of /proc/PID/task/TID/syscall that stay open, one a thread
 * at most: for whoever looks at the same process again and again. About four times as fast. */
struct mf_observe_cache {
    struct mf_observe_slot {
        pid_t tid;
        int fd;
    } slot[MF_OBSERVE_SLOTS];
};

void mf_observe_cache_init(struct mf_observe_cache *cache);
/** mf_observe_cache_end() - close all. It may be used again. */
void mf_observe_cache_end(struct mf_observe_cache *cache);

/** mf_observe_cached() - mf_observe() with a cache of that process alone, or NULL. */
int mf_observe_cached(int proc_fd, struct mf_observe_cache *cache, bool woken,
                      struct mf_blocked *blocked, size_t max, struct mf_observation *out);

/**
 * mf_observe_settle() - after one message was read and mf_change_from_event() named several
 * candidates: complete @change by who has gone on, while the others still wait. Takes some 50 µs
 * as a rule, 200 ms at most. Return: false where it can't be told (whoever went on waits in an
 * equal call again): then `tid` stays 0, `reason` is what all of them agree in, and no further
 * message may be read before mf_observe() was called again.
 * @proc_fd: as above; -1: they are of several processes.
 */
bool mf_observe_settle(int proc_fd, struct mf_blocked *blocked, size_t count,
                       struct mf_change *change);
