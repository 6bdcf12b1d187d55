/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/memferryd/keeper.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "lib/uapi.h"
#include "lib/uffd.h"
#include "lib/util.h"

/* Every userfaultfd has an inode of its own. */
static bool same(int a, int b)
{
    struct stat of_a, of_b;
    return a >= 0 && b >= 0 && fstat(a, &of_a) == 0 && fstat(b, &of_b) == 0 &&
           of_a.st_ino == of_b.st_ino && of_a.st_dev == of_b.st_dev;
}

static bool wanted(const struct keeper *keeper, int uffd, int except)
{
    for (unsigned i = 0; i < keeper->count; i++)
        if (same(keeper->uffd[i], uffd))
            return false;
    return !same(uffd, except) && mf_uffd_alive(uffd);
}

static int add(struct keeper *keeper, int *uffd)
{
    if (keeper->count == keeper->room) {
        const unsigned room = keeper->room ? 2 * keeper->room : 16;
        int *grown = reallocarray(keeper->uffd, room, sizeof(int));
        if (!grown)
            return -ENOMEM;
        keeper->uffd = grown;
        keeper->room = room;
    }
    keeper->uffd[keeper->count++] = mf_steal_fd(uffd);
    return 1;
}

int keeper_take(struct keeper *keeper, pid_t pid, int except, struct mf_error *err)
{
    char path[600], link[64];
    int added = 0;
    cleanup_close int pidfd = (int)syscall(SYS_pidfd_open, pid, 0);
    snprintf(path, sizeof(path), "/proc/%d/fd", (int)pid);
    cleanup_closedir DIR *table = opendir(path);
    if (pidfd < 0 || !table)
        return mf_fail(err, errno, "cannot look at the descriptors of process %d: %s", (int)pid,
                       strerror(errno));
    for (struct dirent *entry; (entry = readdir(table));) {
        snprintf(path, sizeof(path), "/proc/%d/fd/%s", (int)pid, entry->d_name);
        ssize_t n = readlink(path, link, sizeof(link) - 1);
        if (n <= 0)
            continue;
        link[n] = '\0';
        if (strcmp(link, "anon_inode:[userfaultfd]") != 0)
            continue;
        cleanup_close int uffd =
            (int)syscall(SYS_pidfd_getfd, pidfd, (int)strtol(entry->d_name, NULL, 10), 0);
        if (uffd < 0)
            return mf_fail(err, errno, "cannot take descriptor %s of process %d over: %s",
                           entry->d_name, (int)pid, strerror(errno));
        int r = wanted(keeper, uffd, except) ? add(keeper, &uffd) : 0;
        if (r < 0)
            return mf_fail(err, -r, "out of memory for the target's children");
        added += r;
    }
    return added;
}

void keeper_drop(struct keeper *keeper)
{
    for (unsigned i = 0; i < keeper->count; i++)
        close(keeper->uffd[i]);
    free(keeper->uffd);
    *keeper = (struct keeper){0};
}
