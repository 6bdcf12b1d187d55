/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The children of a thread: /proc/PID/task/TID/children (proc_tid_children(5)), for finding the
 * number of a process that has just been forked.
 */
#pragma once

#include <stddef.h>
#include <sys/types.h>

/** struct mf_children - process numbers, in ascending order. Owns @list. */
struct mf_children {
    pid_t *list;
    size_t count;
};

void mf_children_free(struct mf_children *children);

/** mf_children_read() - those of thread @tid of the process whose /proc/PID is open as @proc_fd.
 *  Return: 0, or -errno (-ENOENT: the thread is gone, or the kernel has no such file); then there
 *  are none. */
int mf_children_read(int proc_fd, pid_t tid, struct mf_children *out);

/** mf_children_new() - one that is there now and was not in @before. Return: 0 if there is none. */
pid_t mf_children_new(int proc_fd, pid_t tid, const struct mf_children *before);
