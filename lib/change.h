/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Changes of a process's memory layout, and why they came about. Pure: no I/O.
 *
 * A userfaultfd's message says what happened to which range, but neither who did it nor by which
 * call: MADV_DONTNEED, which leaves a file's pages alone, and MADV_REMOVE, which frees them, look
 * the same. The thread that did it waits inside its system call until the message is read, so
 * whoever looked at the waiting threads before (lib/observe.h) can match the two here.
 *
 * Nothing is guessed: what fits no observed call, or calls that would mean different things, is
 * MF_REASON_UNKNOWN.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "lib/uapi.h"

enum mf_change_kind {
    MF_CHANGE_UNMAP,  /**< nothing is mapped any more in [start_addr, end_addr) */
    MF_CHANGE_REMAP,  /**< what was mapped in [start_addr, end_addr) is (also) mapped at to_addr */
    MF_CHANGE_REMOVE, /**< the pages of [start_addr, end_addr) are gone from the mapping; the reason
                         says whether from the file too */
    MF_CHANGE_FORK,   /**< the whole address space was copied into process `child` */
    MF_CHANGE_EXIT,   /**< the process is gone */
    MF_CHANGE_EXEC,   /**< it has replaced its address space by a new one */
};

enum mf_reason {
    MF_REASON_UNKNOWN,
    MF_REASON_MUNMAP,    /**< munmap(2), or a shrinking brk(2) */
    MF_REASON_MREMAP,    /**< mremap(2): moved, shrunk, or moved onto what was mapped there */
    MF_REASON_MMAP_OVER, /**< mmap(2) with MAP_FIXED over what was mapped there */
    MF_REASON_DONTNEED,  /**< MADV_DONTNEED, MADV_DONTNEED_LOCKED, MADV_FREE: a file's pages stay */
    MF_REASON_REMOVE,    /**< MADV_REMOVE: a file's pages are freed */
    MF_REASON_FORK,      /**< fork(2), or clone(2) without CLONE_VM */
    MF_REASON_TRUNCATE,  /**< the file was made shorter; no event tells, found by comparison */
    MF_REASON_PUNCH,     /**< pages vanished from the file while its size stayed; likewise */
    MF_REASON_EXIT,
    MF_REASON_EXEC,
};

/** struct mf_change - one change. Fields that do not apply are 0. */
struct mf_change {
    uint64_t time_us; /**< filled by whoever knows the clock that is wanted */
    pid_t pid;        /**< filled by the caller of mf_change_from_event() */
    pid_t tid;        /**< who did it; 0: not known, or nobody */
    enum mf_change_kind kind;
    enum mf_reason reason;
    uint64_t start_addr, end_addr;
    uint64_t to_addr; /**< MF_CHANGE_REMAP */
    pid_t child;      /**< MF_CHANGE_FORK; 0: not known */
};

/** mf_change_kind_name(), mf_reason_name() - the words of memferry(1): "unmap", "mmap-over", … */
const char *mf_change_kind_name(enum mf_change_kind kind);
const char *mf_reason_name(enum mf_reason reason);

/** struct mf_blocked - a thread that was seen waiting inside a system call.
 * @number:    of the call, with its arguments as /proc/PID/task/TID/syscall gives them.
 * @switches, @run_ns: how often the thread has been switched to, and for how long it has run.
 * @certain:   it was seen waiting for a userfaultfd's event to be read, not just in such a call.
 * @candidate: set by mf_change_from_event(): could be who caused the last message.
 * @taken:     its message has been read: it matches no other one.
 */
struct mf_blocked {
    pid_t tid;
    long number;
    uint64_t args[6];
    uint64_t switches, run_ns;
    bool certain, candidate, taken;
};

/** mf_blocked_relevant() - can call @number lead to an event at all, as far as is known here? */
bool mf_blocked_relevant(long number);

/** mf_blocked_frees() - can what this thread waits for free a file's pages, as far as can be seen?
 */
bool mf_blocked_frees(const struct mf_blocked *call);

/**
 * mf_change_from_event() - what a message tells, and who among the observed threads did it.
 * @message: read from a userfaultfd; not a page fault.
 * @blocked: seen before the message was read. Those that are not taken and whose call, with its
 *           lengths rounded as the kernel does, can lead to this message become candidates. If
 *           there is one, it is taken.
 * @out:     kind and addresses; `reason` if the candidates agree in it, else unknown; `tid` if
 *           there is one candidate. The rest is 0.
 * Return: the number of candidates. With two or more, ask who of them has gone on since
 * (mf_observe_settle()).
 */
size_t mf_change_from_event(const struct uffd_msg *message, struct mf_blocked *blocked,
                            size_t count, struct mf_change *out);

/**
 * mf_change_moved_bytes() - how much a REMAP message's call has moved. Where mremap(2) shrinks and
 * moves some kernels tell the old length (doc/kernel.md). @blocked: as above. Return: what the
 * message says if the call can't be told.
 */
uint64_t mf_change_moved_bytes(const struct uffd_msg *message, const struct mf_blocked *blocked,
                               size_t count);

/**
 * mf_change_settle() - complete a change that had several candidates.
 * @who: index of the one that did it, or -1 if that can't be told: the change stays as it is, and
 *       before the next message is read the threads have to be observed anew, since what one of
 *       them has already told would be taken for another's.
 */
void mf_change_settle(struct mf_blocked *blocked, size_t count, ssize_t who,
                      struct mf_change *change);
