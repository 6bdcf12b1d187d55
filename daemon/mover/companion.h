/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The companion of a destination's mover: a second process for the two things that the mover can't
 * do for itself.
 *
 * It keeps descriptors. When the target forks, the kernel makes a userfaultfd for the child and
 * puts it into the descriptor table of whoever reads the event; nobody else has it. If that was
 * closed, by the mover's death, the child would read zeros where its memory has not arrived. So the
 * companion shares the mover's descriptor table (CLONE_FILES): what the kernel puts there is
 * theirs from the same moment, and stays open when one of the two is killed. memferryd then takes
 * the userfaultfds out of the table of the survivor (pidfd_getfd(2)) and gives them to the next
 * mover. Only a kill of both at the same moment loses a child's.
 *
 * It looks. Which system call a thread waits in, which memory a child maps: both need privileges
 * over the target (CAP_SYS_PTRACE) that a process which reads from the network must not have. The
 * companion has these and a filter under which it can open files for reading only. It answers the
 * mover's questions about processes that map the session's memory, and no others; it is told which
 * memory that is before the mover has read a byte from the network. Since descriptors are shared,
 * what it opens the mover has.
 *
 * It is a child of memferryd (CLONE_PARENT), which ends it after the mover. When memferryd has died
 * it waits, without a purpose but to keep what it has, until every process whose userfaultfd is in
 * the table has ended.
 */
#pragma once

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "lib/error.h"
#include "lib/observe.h"
#include "lib/target.h"

/** So many descriptors of the table that both share are left to it, or it could not look when they
 * run out. */
#define COMPANION_FDS 12u

/** struct companion - the mover's side. */
struct companion {
    int sock;                   /**< -1: there is none */
    uint32_t asked;             /**< questions so far: an answer may come too late for its own */
    _Atomic uint32_t *children; /**< shared with it: how many contexts came by forks */
    uint64_t read_ns;           /**< when an event was read last, or may have been */
    /* What it saw. */
    struct mf_blocked blocked[MF_OBSERVE_MAX];
    size_t blocked_count;
    bool complete, others_free; /**< as in struct mf_observation */
};

/**
 * companion_start() - first thing in main, with all privileges, before there are threads.
 * @ipc_fd: the mover's connection to memferryd; its end is memferryd's.
 * @uid, @gid: as the mover's. Return: 0 or -errno with a sentence.
 */
int companion_start(struct companion *companion, int ipc_fd, uid_t uid, gid_t gid,
                    struct mf_error *err);

/** companion_introduce() - once, before anything is read from the network: the target, and the
 * files of its memory as /proc/PID/maps has them. @uffd: the target's own, which the target keeps
 * open itself. */
int companion_introduce(struct companion *companion, pid_t target, int uffd,
                        const uint64_t (*files)[2], unsigned count);

/* What follows is asked by one thread. Each takes some 50 µs and more; -ETIMEDOUT when there is no
 * answer within ten seconds. */

/** companion_observe() - mf_observe() of a process into `blocked`. @pid: 0 is the target, -1 all
 * processes that map the session's memory, are younger than the target, and were not named yet.
 * @woken: as there.
 * Return: how many events may be read now, at least 0, or -errno (-EBUSY: not yet, some have not
 * got to a CPU for long). */
int companion_observe(struct companion *companion, pid_t pid, bool woken);

/** companion_settle() - mf_observe_settle() of what companion_observe() saw. */
int companion_settle(struct companion *companion, pid_t pid, struct mf_change *change);

/**
 * companion_maps() - open the maps of the process in which thread @tid (its number there) waits at
 * @addr, which must lie in memory of the session.
 * @pid: that process. Return: a descriptor, owned by the caller, or -errno.
 */
int companion_maps(struct companion *companion, pid_t tid, uint64_t addr, pid_t *pid);

/** companion_sender() - the same for a thread that companion_observe() saw, by its number here. */
int companion_sender(struct companion *companion, pid_t tid, uint64_t addr, pid_t *pid);

/** companion_child() - the process that thread @tid has just forked: its maps, as companion_maps().
 * After the event was read; waits some milliseconds for it to appear. */
int companion_child(struct companion *companion, pid_t tid, pid_t *pid);

/**
 * companion_reason() - why an event came about, from what companion_observe() saw before it was
 * read. @pid: as there. @who: it matters who did it, not only why.
 * Fills `tid` and `reason`; unknown if that can't be told. Where more wait than can be kept apart
 * nobody is named. If it may be one who frees the range or one who does not, it counts as freed:
 * for it will be in a moment, whoever this was. Return: false: ask companion_observe() again before
 * another is read.
 */
bool companion_reason(struct companion *companion, pid_t pid, const struct uffd_msg *message,
                      bool who, struct mf_change *change);
