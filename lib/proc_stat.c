/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib/proc_stat.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "lib/util.h"

int mf_proc_stat(pid_t pid, pid_t tid, struct mf_proc_stat *out)
{
    char path[64], line[1024];
    int parent = 0;
    unsigned long long start = 0;
    if (tid)
        snprintf(path, sizeof(path), "/proc/%d/task/%d/stat", (int)pid, (int)tid);
    else
        snprintf(path, sizeof(path), "/proc/%d/stat", (int)pid);
    cleanup_close int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return errno == ENOENT ? -ESRCH : -errno;
    ssize_t n = read(fd, line, sizeof(line) - 1);
    if (n <= 0)
        return n < 0 ? -errno : -ESRCH;
    line[n] = '\0';
    /* "pid (comm) state ppid pgrp session tty_nr tpgid flags …": the name may hold anything, so
     * from its last parenthesis on. */
    const char *after = strrchr(line, ')');
    if (!after || sscanf(after + 1,
                         " %c %d %*s %*s %*s %*s %u %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s "
                         "%*s %llu",
                         &out->state, &parent, &out->flags, &start) != 4)
        return -EPROTO;
    out->parent = parent;
    out->start_ticks = start;
    return 0;
}

uint64_t mf_proc_ticks(void)
{
    struct timespec now;
    const uint64_t per_second = (uint64_t)sysconf(_SC_CLK_TCK);
    clock_gettime(CLOCK_BOOTTIME, &now);
    return (uint64_t)now.tv_sec * per_second +
           (uint64_t)now.tv_nsec * per_second / UINT64_C(1000000000);
}
