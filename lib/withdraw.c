/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib/withdraw.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <sys/stat.h>
#include <time.h>

#include "lib/inject.h"
#include "lib/target.h"
#include "lib/uffd.h"
#include "lib/util.h"

#define PASSES_MAX 50            /**< of a process whose children fork as well */
#define FORK_SETTLES_NS 2000000L /**< what a fork does before and after it copies the memory */

/**
 * await_forks() - until those that are under way have copied the memory.
 * A fork copies the descriptors first and the memory after that, which may take long; only then can
 * the child be found. It holds the lock of the address space meanwhile, which mf_uffd_alive() takes
 * as well.
 */
static void await_forks(int uffd)
{
    mf_uffd_alive(uffd);
    nanosleep(&(struct timespec){.tv_nsec = FORK_SETTLES_NS}, NULL);
}

/** close_copies() - in all who have it at present. Return: how many had, or -EBUSY with a sentence.
 */
static int close_copies(pid_t pid, const struct stat *ours, int remote_fd, struct mf_error *err)
{
    int found = 0;
    cleanup_closedir DIR *proc = opendir("/proc");
    for (struct dirent *entry; proc && (entry = readdir(proc));) {
        char path[48];
        struct stat st;
        struct mf_error why = {0};
        pid_t holder = (pid_t)strtol(entry->d_name, NULL, 10);
        snprintf(path, sizeof(path), "%d/fd/%d", holder, remote_fd);
        /* Each userfaultfd has an inode of its own. */
        if (holder <= 0 || holder == getpid() || fstatat(dirfd(proc), path, &st, 0) != 0 ||
            st.st_dev != ours->st_dev || st.st_ino != ours->st_ino)
            continue;
        found++;
        int rc = mf_inject_close(holder, remote_fd, &why);
        if (rc == 0 || rc == -EBADF) /* it has closed it itself, by an exec */
            continue;
        char name[64];
        mf_target_comm(pid, name, sizeof(name));
        return mf_fail(err, EBUSY,
                       "%s (pid %d) has forked a process that holds a copy of its userfaultfd and "
                       "can't be made to close it: %s",
                       name, pid, why.text);
    }
    return found;
}

int mf_withdraw(pid_t pid, int uffd, int remote_fd, struct mf_error *err)
{
    struct stat ours;
    if (fstat(uffd, &ours) != 0)
        return mf_fail(err, errno, "cannot look at a userfaultfd");
    int rc = mf_inject_close(pid, remote_fd, err);
    if (rc < 0)
        return rc;
    /* While somebody had a copy, another fork may have copied it. */
    for (unsigned passes = 0; passes < PASSES_MAX; passes++) {
        await_forks(uffd);
        rc = close_copies(pid, &ours, remote_fd, err);
        if (rc <= 0)
            return rc;
    }
    return mf_fail(err, EBUSY, "pid %d forks faster than copies of its userfaultfd can be closed",
                   pid);
}
