/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * userfaultfd(2) by name: thin, no policy. Facts and sources: ioctl_userfaultfd(2),
 * Documentation/admin-guide/mm/userfaultfd.rst, and doc/kernel.md. All functions are thread-safe;
 * those of the fault path allocate nothing.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "lib/error.h"
#include "lib/uapi.h"

/** Features that a destination's userfaultfd must have; see mf_uffd_api. */
#define MF_UFFD_FEATURES                                                                           \
    (UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MINOR_SHMEM | UFFD_FEATURE_EVENT_UNMAP |            \
     UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_EVENT_REMOVE)
/** And those it also asks for where the kernel has them. */
#define MF_UFFD_FEATURES_WANTED                                                                    \
    (UFFD_FEATURE_MISSING_HUGETLBFS | UFFD_FEATURE_MINOR_HUGETLBFS | UFFD_FEATURE_THREAD_ID)

/** mf_uffd_open() - a userfaultfd of the calling process itself (probing, tests, libmemferry), by
 *  userfaultfd(2) or, where that is refused, /dev/userfaultfd. O_CLOEXEC | O_NONBLOCK, faults of
 * the kernel included. Return: the descriptor, owned by the caller, or -errno of userfaultfd(2). */
int mf_uffd_open(void);

/** mf_uffd_open_user() - the same for faults of user mode alone (UFFD_USER_MODE_ONLY, Linux 5.11),
 * which takes no permission: a system call that touches memory which is not there fails with
 * EFAULT. Return: as mf_uffd_open. */
int mf_uffd_open_user(void);

/** mf_uffd_feature_name() - the name of one feature bit in <linux/userfaultfd.h> without its prefix
 * and the kernel that brought it, e.g. "MINOR_SHMEM" and "5.14"; "unknown" and "a newer kernel" if
 * unknown.
 *  @since may be NULL. */
const char *mf_uffd_feature_name(uint64_t feature, const char **since);

/** mf_uffd_features() - what this kernel offers (opens a throw-away userfaultfd). Return: 0 or
 * -errno. */
int mf_uffd_features(uint64_t *features, struct mf_error *err);

/**
 * mf_uffd_api() - the UFFDIO_API handshake, once on a fresh userfaultfd.
 * Asks for @required plus those of @wanted that the kernel has. Return: 0 with what was enabled in
 * @enabled, or -errno with a sentence that names the missing feature and the kernel that has it.
 */
int mf_uffd_api(int uffd, uint64_t required, uint64_t wanted, uint64_t *enabled,
                struct mf_error *err);

/** mf_uffd_register() - MISSING|MINOR over [@start_addr, +@length_bytes). Always the union of
 * modes: registering again replaces them. Return: 0 or -errno with a sentence (-EBUSY: somebody
 * else's uffd). */
int mf_uffd_register(int uffd, uint64_t start_addr, uint64_t length_bytes, struct mf_error *err);

/** mf_uffd_register_private() - MISSING alone over private anonymous memory, which knows no MINOR
 * faults. As mf_uffd_register. */
int mf_uffd_register_private(int uffd, uint64_t start_addr, uint64_t length_bytes,
                             struct mf_error *err);

/** Features of a source's userfaultfd, which watches for writes without stopping anybody. */
#define MF_UFFD_FEATURES_WP                                                                        \
    (UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_HUGETLBFS_SHMEM)

/** And those that tell it of changes to the layout: without REMAP and FORK a mapping that moves or
 * is inherited would go on unwatched, without a word. FORK takes CAP_SYS_PTRACE at the handshake.
 */
#define MF_UFFD_FEATURES_WP_EVENTS                                                                 \
    (MF_UFFD_FEATURES_WP | UFFD_FEATURE_EVENT_UNMAP | UFFD_FEATURE_EVENT_REMAP |                   \
     UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_EVENT_FORK)

/** mf_uffd_register_wp() - watch [@start_addr, +@length_bytes) for writes (needs WP_ASYNC). As
 *  mf_uffd_register. */
int mf_uffd_register_wp(int uffd, uint64_t start_addr, uint64_t length_bytes, struct mf_error *err);

/** mf_uffd_protect() - write-protect a watched range: a page written from now on is "written"
 * again. Return: 0 or -errno (-ENOENT: a part is not watched, -ESRCH, -EAGAIN: an event is unread,
 * so that what lies in the range may have changed). */
int mf_uffd_protect(int uffd, uint64_t start_addr, uint64_t length_bytes);

/** mf_uffd_unregister() - wakes waiters too (a MINOR-only range would not: WAKE is sent first and
 * after). Return: 0 or -errno; a range that is unmapped or a process that is gone is no error. */
int mf_uffd_unregister(int uffd, uint64_t start_addr, uint64_t length_bytes);

/** mf_uffd_wake() - make every waiter in the range fault again. Return: 0 or -errno. */
int mf_uffd_wake(int uffd, uint64_t start_addr, uint64_t length_bytes);

/** mf_uffd_wake_all() - everybody, wherever their memory may lie by now. */
void mf_uffd_wake_all(int uffd);

/**
 * mf_uffd_continue(), mf_uffd_zeropage() - map present pages / zeros for the guest.
 * @done_bytes: bytes done from the start, also on failure; 0 if none. The kernel's result field is
 * preset, so that a call that does not touch it (-ESRCH) reads as none.
 * Return: 0 when all was done, else -errno of what stopped it, kernel-facts' table: -EAGAIN (an
 * event is unread, or a part was done: look at @done_bytes), -EEXIST (first page already mapped;
 * nobody was woken), -EFAULT (CONTINUE: first page is a hole), -ENOENT (range left the mapping),
 * -EINVAL, -ESRCH.
 */
int mf_uffd_continue(int uffd, uint64_t start_addr, uint64_t length_bytes, uint64_t *done_bytes);
int mf_uffd_zeropage(int uffd, uint64_t start_addr, uint64_t length_bytes, uint64_t *done_bytes);

/**
 * mf_uffd_event_pending() - is an event (UNMAP, REMAP, REMOVE, FORK; not a fault) waiting to be
 * read? Cheap, changes nothing. Return: 0: certainly none was when this was called. 1: one is, or
 * is about to be sent, or was read a moment ago and its thread has not gone on yet; poll(2) and
 * read(2) tell. -errno on a descriptor that is none.
 */
int mf_uffd_event_pending(int uffd);

/** mf_uffd_open_info() - what the kernel says of @uffd, of this process: proc_pid_fdinfo(5). It
 * goes by the number: close both together. Return: a descriptor, or -errno. */
int mf_uffd_open_info(int uffd);

/** mf_uffd_faults_pending() - how many faults wait to be read; events do not count. Takes five
 * times as long as poll(2). @info_fd: of mf_uffd_open_info(). Return: 0 also if it can't be told.
 */
size_t mf_uffd_faults_pending(int info_fd);

/** mf_uffd_alive() - does the address space still exist that @uffd belongs to? It ends with the
 * last thread, and by exec. Return: false only if it is certainly gone. */
bool mf_uffd_alive(int uffd);

/** mf_uffd_copy() - give private memory pages of its own with what lies at @from. As
 * mf_uffd_continue; of private memory -EEXIST means that this page is there for good, for nothing
 * but a fill makes one while it is registered. -ENOMEM. */
int mf_uffd_copy(int uffd, uint64_t start_addr, const void *from, uint64_t length_bytes,
                 uint64_t *done_bytes);
