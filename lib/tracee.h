/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Stopping threads of another process with ptrace(2) and running one system call in one of them.
 *
 * Used by inject.c alone, in a helper process of its own that exits when it is done: the kernel
 * then lets go of whatever is still held. Not thread-safe: ptrace belongs to the thread that
 * seized.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "lib/error.h"

/** mf_tracee_supported() - can a system call be run in another process on this architecture? */
bool mf_tracee_supported(void);

/**
 * mf_tracee_seize() - become the tracer of thread @tid and ask it to stop; does not wait.
 * @pid: the process, for messages.
 * Return: 0; -ESRCH the thread is gone (a zombie too); -EPERM with the cause; other -errno.
 */
int mf_tracee_seize(pid_t pid, pid_t tid, struct mf_error *err);

/**
 * mf_tracee_stopped() - has a seized thread stopped yet? Never blocks. A signal that arrives first
 * is handed on to the thread, and the answer is "not yet". Return: 1 it stands in a ptrace stop
 * with its registers at rest; 0 not yet; -ESRCH it is gone.
 */
int mf_tracee_stopped(pid_t tid);

/**
 * mf_tracee_run() - run system call @number with three arguments in a stopped thread, put
 * everything back and let go of the thread, whatever happened.
 * @vdso_addr, @vdso_bytes: where its vDSO is mapped, 0 if unknown.
 * @result: what the system call returned there: a negative errno or a value.
 * Blocks for as long as the thread is inside the system call: to leave earlier would leave it with
 * borrowed registers. Gives up (-ETIMEDOUT) on a thread that does not get to run for 2 s (a frozen
 * cgroup). -EAGAIN: this thread is at a place where it must not be borrowed; take another, or
 * later. Return: 0 if the call was run, or -errno with a sentence.
 */
int mf_tracee_run(pid_t pid, pid_t tid, uint64_t vdso_addr, uint64_t vdso_bytes, long number,
                  const uint64_t args[3], int64_t *result, struct mf_error *err);
