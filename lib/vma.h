/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What lies at an address of another process, asked of an open /proc/PID/maps.
 *
 * The permission is checked when that file is opened (proc_pid_maps(5)) and it stays with that one
 * address space, whatever becomes of the process. So a privileged process opens it and hands it to
 * one that is none.
 */
#pragma once

#include <stdint.h>

#include "lib/target.h"

/**
 * mf_vma_find() - the mapping that covers @addr, or else the first behind it.
 * @maps_fd: open for reading; its file offset is not used. Since Linux 6.11 one ioctl, about a
 *           microsecond; before, the text is read as far as @addr.
 * @out:     `path` and `deleted` are not filled.
 * Return: 0, -ENOENT when nothing is mapped from @addr on, -ESRCH when the address space is gone,
 * or another -errno.
 */
int mf_vma_find(int maps_fd, uint64_t addr, struct mf_vma *out);

/**
 * mf_vma_each() - call @each for every mapping, in order, until it returns something else than 0.
 * What changes meanwhile may be seen or not. Return: 0, what @each returned, -ESRCH when the
 * address space is gone, or another -errno.
 */
int mf_vma_each(int maps_fd, int (*each)(void *arg, const struct mf_vma *vma), void *arg);
