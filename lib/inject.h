/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Running one system call inside a process that knows nothing of it, by ptrace(2).
 *
 * Theory of operation is at the top of inject.c. No byte of the target's memory is written: an
 * existing `syscall` instruction is executed by one stopped thread with borrowed registers. The
 * thread is stopped for well under a millisecond. Needs CAP_SYS_PTRACE; where the
 * target runs under a seccomp filter and is no QEMU, CAP_SYS_ADMIN too, and no filter of one's own.
 * Injecting starts a short-lived child process and waits for it, 5 s at most. Only
 * userfaultfd(2), close(2) and madvise(2) are ever injected.
 */
#pragma once

#include <stdint.h>
#include <sys/types.h>

#include "lib/error.h"

/**
 * mf_inject_userfaultfd() - make a userfaultfd inside @pid and fetch a duplicate of it.
 * @pidfd:     of @pid (pidfd_open(2)).
 * @remote_fd: the descriptor's number inside the target; it stays open there (I2) until
 *             mf_inject_close.
 * O_CLOEXEC | O_NONBLOCK, not USER_MODE_ONLY (KVM faults come from the kernel).
 * Return: our duplicate (O_CLOEXEC, owned by the caller), or -errno with a sentence (-EPERM: Yama,
 * a security module, already traced by a debugger; -ETIMEDOUT: no thread could be stopped within 2
 * s).
 */
int mf_inject_userfaultfd(pid_t pid, int pidfd, int *remote_fd, struct mf_error *err);

/**
 * mf_inject_watching_userfaultfd() - the same, for events and WP_ASYNC only: UFFD_USER_MODE_ONLY
 * (5.11), which every process may have whatever vm.unprivileged_userfaultfd says. Faults that the
 * kernel takes on memory registered with it for anything that waits are errors (EFAULT).
 */
int mf_inject_watching_userfaultfd(pid_t pid, int pidfd, int *remote_fd, struct mf_error *err);

/**
 * mf_inject_close() - close @remote_fd inside the target, after checking that it is a userfaultfd.
 * Return: 0 (also when the process is gone), or -errno.
 */
int mf_inject_close(pid_t pid, int remote_fd, struct mf_error *err);

/**
 * mf_uffd_fetch() - fetch again a userfaultfd left open in a target: what a restarted daemon does.
 * @remote_fd: its number there. Return: our duplicate, or -errno (-EBADF: no such userfaultfd).
 */
int mf_uffd_fetch(pid_t pid, int pidfd, int remote_fd, struct mf_error *err);

/**
 * mf_inject_discard() - have @pid give up what [@start_addr, +@length_bytes), private anonymous
 * memory, holds (madvise(2), MADV_DONTNEED_LOCKED or MADV_DONTNEED): nobody else can do that.
 * Only while no userfaultfd watches the range, for else the thread would wait for its event to be
 * read. Return: 0 or -errno with a sentence.
 */
int mf_inject_discard(pid_t pid, int pidfd, uint64_t start_addr, uint64_t length_bytes,
                      struct mf_error *err);
