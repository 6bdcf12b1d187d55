/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What /proc/PID/stat says of a process or a thread (proc_pid_stat(5)). */
#pragma once

#include <stdint.h>
#include <sys/types.h>

struct mf_proc_stat {
    char state; /**< 'R', 'S', 'T', 'Z'… */
    pid_t parent;
    uint32_t flags;       /**< the kernel's PF_… */
    uint64_t start_ticks; /**< when it was started, in clock ticks since the host was */
};

/** mf_proc_stat() - @tid: of thread @tid, 0: of the process as a whole. By open(2) and read(2)
 * alone. Return: 0 or -errno (-ESRCH: it is gone). */
int mf_proc_stat(pid_t pid, pid_t tid, struct mf_proc_stat *out);

/** mf_proc_ticks() - now, as in start_ticks. */
uint64_t mf_proc_ticks(void);
