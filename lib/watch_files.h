/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What happens to the files behind a watched process's shared memory (tmpfs, memfd, System V,
 * hugetlbfs) and is told by no event: holes punched into them and truncations, by whomever.
 *
 * They are found by comparing, now and then, which parts of the file hold data with what was so the
 * last time. That is exact about what it finds and late by the time between two looks; pages that
 * come and go between them are not seen. tmpfs says which parts hold data (SEEK_DATA). hugetlbfs
 * does not; of it only pages that the process itself has mapped are compared, and only when the
 * file has become smaller (st_blocks).
 *
 * Looking costs an fstat(2) a file as long as nothing has changed, and for each file never more
 * than a tenth of the time. A tmpfs file is looked at by another thread (lib/look.h), so nothing
 * here takes long. Needs CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE to open the files
 * (/proc/PID/map_files). Not thread-safe.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <time.h>

#include "lib/extents.h"
#include "lib/look.h"
#include "lib/watch.h"

/** struct mf_watch_file - one file, owned by the set. */
struct mf_watch_file {
    dev_t device;
    ino_t inode;
    int fd; /**< -1: not one to be compared, or it could not be opened */
    bool hugetlb, mapped;
    bool known; /**< it has been looked at, and `data` is what was found */
    uint64_t page_bytes, size_bytes, blocks;
    struct timespec modified;
    struct mf_extents data;      /**< what held data at the last look */
    struct mf_extents explained; /**< what events have told of, not gone yet at the last look */
    uint64_t explained_ns, looked_ns, cost_ns;
    struct mf_look *look; /**< under way, since `began_ns`, when the file was as `began` says */
    struct stat began;
    uint64_t began_ns;
};

/** struct mf_watch_files - of one process. All zeros but for `looker` is empty.
 * @looker:  the caller's; it has to outlive the set.
 * @refused: files that could not be opened for lack of a capability. */
struct mf_watch_files {
    struct mf_looker *looker;
    struct mf_watch_file *list;
    size_t count, refused;
};

void mf_watch_files_free(struct mf_watch_files *files);

/** mf_watch_files_inherit() - a child that has just been forked maps the files that its parent
 * does, and what is known of them is known. */
void mf_watch_files_inherit(struct mf_watch_files *child, const struct mf_watch_files *parent);

/** mf_watch_files_refresh() - take up the files of mappings that mf_watch_scan() has met. Return: 0
 * or -ENOMEM. */
int mf_watch_files_refresh(struct mf_watch_files *files, const struct mf_watch *watch);

/**
 * mf_watch_files_explain() - an event has told of this REMOVE: what it takes out of a file is no
 * news. To be called before the process can do anything after it, or else soon. @fn is told of the
 * process's other mappings that lose the same pages (MADV_REMOVE), of which the kernel tells
 * nothing.
 */
void mf_watch_files_explain(struct mf_watch_files *files, struct mf_watch *watch,
                            const struct mf_change *change, mf_watch_fn *fn, void *arg);

/** mf_watch_files_compare() - begin looks that are due, and of those that are done tell @fn: a
 * REMOVE for each range of the process's memory that has lost its pages without a word. Return: 0
 * or -errno.
 */
int mf_watch_files_compare(struct mf_watch_files *files, struct mf_watch *watch, mf_watch_fn *fn,
                           void *arg);

/** mf_watch_files_known() - has every file been looked at once? What has gone before is not told.
 */
bool mf_watch_files_known(const struct mf_watch_files *files);
