/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib/watch_files.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>

#include "lib/pagemap.h"
#include "lib/uapi.h"
#include "lib/util.h"

#define SECOND_NS UINT64_C(1000000000)
#define DESCRIPTORS_LEFT 40 /**< not taken: a forked child's must be had, or it waits */
#define HUGE_AGAIN_NS                                                                              \
    (SECOND_NS / 4) /**< pages of a file that were mapped change nothing in it                     \
                     */

static void file_free(struct mf_looker *looker, struct mf_watch_file *file)
{
    struct mf_extents data = {0};
    uint64_t took_ns;
    if (file->look)
        mf_look_end(looker, file->look, &data, &took_ns);
    mf_extents_free(&data);
    if (file->fd >= 0)
        close(file->fd);
    mf_extents_free(&file->data);
    mf_extents_free(&file->explained);
}

void mf_watch_files_free(struct mf_watch_files *files)
{
    for (size_t i = 0; i < files->count; i++)
        file_free(files->looker, &files->list[i]);
    free(files->list);
    *files = (struct mf_watch_files){.looker = files->looker};
}

/* ---------------------------------------------------------------------------------- opening files
 */

/**
 * is_elsewhere() - is the device a mounted file system other than tmpfs and hugetlbfs? Asked before
 * the file is touched: one on a network may keep us waiting for ever. The kernel's own mounts,
 * where memfd and System V memory are, are not listed.
 */
static bool is_elsewhere(int proc_fd, dev_t device)
{
    int fd = openat(proc_fd, "mountinfo", O_RDONLY | O_CLOEXEC);
    cleanup_fclose FILE *f = fd >= 0 ? fdopen(fd, "r") : NULL;
    cleanup_free char *line = NULL;
    size_t size = 0;
    if (!f && fd >= 0)
        close(fd);
    /* proc_pid_mountinfo(5): "id parent major:minor root point options … - type source options" */
    while (f && getline(&line, &size, f) > 0) {
        unsigned major_number, minor_number;
        char type[32];
        const char *dash = strstr(line, " - ");
        if (sscanf(line, "%*d %*d %u:%u", &major_number, &minor_number) != 2 || !dash ||
            sscanf(dash, " - %31s", type) != 1 || makedev(major_number, minor_number) != device)
            continue;
        return strcmp(type, "tmpfs") != 0 && strcmp(type, "hugetlbfs") != 0 &&
               strcmp(type, "devtmpfs") != 0;
    }
    return major(device) != 0; /* a disk that is mounted nowhere any more */
}

/** affordable() - are enough descriptors left beside @fd, the lowest that was free? Return: @fd, or
 * -EMFILE with it closed. */
static int affordable(int fd)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || (rlim_t)fd + DESCRIPTORS_LEFT < limit.rlim_cur)
        return fd;
    close(fd);
    return -EMFILE;
}

/** open_file() - the file behind a mapping. Return: a descriptor with @hugetlb set, or -errno
 * (-EOPNOTSUPP: not one to be compared; -ENOENT: the mapping has changed meanwhile). */
static int open_file(int proc_fd, const struct mf_watched *map, bool *hugetlb)
{
    char path[80];
    if (is_elsewhere(proc_fd, map->device))
        return -EOPNOTSUPP;
    snprintf(path, sizeof(path), "map_files/%llx-%llx", (unsigned long long)map->start_addr,
             (unsigned long long)map->end_addr);
    /* By name only at first: opening a device has effects. */
    cleanup_close int name_fd = openat(proc_fd, path, O_PATH | O_CLOEXEC);
    struct stat st;
    struct statfs fs;
    if (name_fd < 0 || fstat(name_fd, &st) != 0 || fstatfs(name_fd, &fs) != 0)
        return -errno;
    if (st.st_dev != map->device || st.st_ino != map->inode)
        return -ENOENT;
    *hugetlb = (unsigned long)fs.f_type == HUGETLBFS_MAGIC;
    if (!S_ISREG(st.st_mode) || (!*hugetlb && (unsigned long)fs.f_type != TMPFS_MAGIC))
        return -EOPNOTSUPP;
    snprintf(path, sizeof(path), "/proc/self/fd/%d", name_fd);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    return fd >= 0 ? affordable(fd) : -errno;
}

static struct mf_watch_file *find_file(struct mf_watch_files *files, const struct mf_watched *map)
{
    for (size_t i = 0; i < files->count; i++) {
        if (files->list[i].inode == map->inode && files->list[i].device == map->device)
            return &files->list[i];
    }
    return NULL;
}

/* -------------------------------------------------------------------------------------- looking */

static uint64_t page_end(uint64_t bytes, uint64_t page_bytes)
{
    return (bytes + page_bytes - 1) & ~(page_bytes - 1);
}

/** data_of_huge() - which pages the process has mapped; what it has not is unknown. */
static int data_of_huge(const struct mf_watch_file *file, const struct mf_watch *watch,
                        struct mf_extents *out)
{
    struct mf_error err;
    uint8_t pages[512];
    cleanup_close int pagemap = mf_pagemap_open(watch->pid, &err);
    if (pagemap < 0)
        return pagemap;
    for (size_t i = 0; i < watch->count; i++) {
        const struct mf_watched *map = &watch->maps[i];
        if (map->inode != file->inode || map->device != file->device || map->refused)
            continue;
        uint64_t step_bytes = sizeof(pages) * file->page_bytes;
        for (uint64_t at = map->start_addr; at < map->end_addr; at += step_bytes) {
            uint64_t length_bytes =
                map->end_addr - at < step_bytes ? map->end_addr - at : step_bytes;
            if (mf_pagemap_scan(pagemap, at, length_bytes, file->page_bytes, pages) < 0)
                continue; /* changing under our hands: unknown as well */
            for (uint64_t p = 0; p < length_bytes / file->page_bytes; p++) {
                uint64_t offset = map->offset_bytes + (at - map->start_addr) + p * file->page_bytes;
                if ((pages[p] & MF_PAGEMAP_PRESENT) &&
                    mf_extents_add(out, offset, offset + file->page_bytes) < 0)
                    return -ENOMEM;
            }
        }
    }
    return 0;
}

/** remember() - what the file was like when the look began, and what was found. Takes over @data.
 */
static void remember(struct mf_watch_file *file, struct mf_extents *data, uint64_t took_ns)
{
    mf_extents_free(&file->data);
    file->data = *data;
    file->size_bytes = (uint64_t)file->began.st_size;
    file->blocks = (uint64_t)file->began.st_blocks;
    file->modified = file->began.st_mtim;
    file->looked_ns = mf_now_ns();
    file->cost_ns = took_ns;
    file->known = true;
}

static int copy(struct mf_extents *to, const struct mf_extents *from)
{
    *to = (struct mf_extents){0};
    return mf_extents_minus(from, &(struct mf_extents){0}, to);
}

void mf_watch_files_inherit(struct mf_watch_files *child, const struct mf_watch_files *parent)
{
    child->list = calloc(parent->count ? parent->count : 1, sizeof(*child->list));
    for (size_t i = 0; child->list && i < parent->count; i++) {
        const struct mf_watch_file *from = &parent->list[i];
        struct mf_watch_file *to = &child->list[child->count];
        *to = *from;
        to->look = NULL;
        to->known &= !from->hugetlb; /* what the child has mapped itself */
        to->fd = from->fd < 0 ? -1 : fcntl(from->fd, F_DUPFD_CLOEXEC, 0);
        if (to->fd >= 0)
            to->fd = affordable(to->fd);
        int rc = copy(&to->data, &from->data);
        if (copy(&to->explained, &from->explained) < 0 || rc < 0)
            file_free(child->looker, to); /* it will be met as one that is new */
        else
            child->count++;
    }
}

int mf_watch_files_refresh(struct mf_watch_files *files, const struct mf_watch *watch)
{
    files->refused = 0;
    for (size_t i = 0; i < files->count; i++)
        files->list[i].mapped = false;
    for (size_t i = 0; i < watch->count; i++) {
        const struct mf_watched *map = &watch->maps[i];
        if (!map->shared || !map->inode)
            continue;
        struct mf_watch_file *file = find_file(files, map);
        if (file) {
            file->mapped = true;
            continue;
        }
        struct mf_watch_file fresh = {
            .device = map->device, .inode = map->inode, .fd = -1, .mapped = true};
        fresh.fd = open_file(watch->proc_fd, map, &fresh.hugetlb);
        if (fresh.fd == -ENOENT)
            continue; /* the next scan sees what it has become */
        files->refused += fresh.fd == -EPERM || fresh.fd == -EACCES;
        struct stat st;
        if (fresh.fd >= 0)
            fresh.page_bytes = fresh.hugetlb && fstat(fresh.fd, &st) == 0
                                   ? (uint64_t)st.st_blksize
                                   : (uint64_t)sysconf(_SC_PAGESIZE);
        struct mf_watch_file *grown =
            reallocarray(files->list, files->count + 1, sizeof(*files->list));
        if (!grown) {
            file_free(files->looker, &fresh);
            return -ENOMEM;
        }
        files->list = grown;
        files->list[files->count++] = fresh;
    }
    size_t kept = 0;
    for (size_t i = 0; i < files->count; i++) {
        if (files->list[i].mapped)
            files->list[kept++] = files->list[i];
        else
            file_free(files->looker, &files->list[i]);
    }
    files->count = kept;
    return 0;
}

/* ------------------------------------------------------------------------------------ comparing */

struct teller {
    struct mf_watch *watch;
    mf_watch_fn *fn;
    void *arg;
};

/** tell() - [@start_bytes, @end_bytes) of the file has gone: wherever it is mapped, save in @told,
 * addresses of which that is known. @like: by whom, and for what reason. */
static void tell(const struct teller *to, const struct mf_watch_file *file, uint64_t start_bytes,
                 uint64_t end_bytes, const struct mf_change *like, struct mf_extent told)
{
    for (size_t i = 0; i < to->watch->count; i++) {
        const struct mf_watched *map = &to->watch->maps[i];
        uint64_t length_bytes = map->end_addr - map->start_addr;
        uint64_t map_end = map->offset_bytes + length_bytes;
        if (map->inode != file->inode || map->device != file->device || !map->shared ||
            end_bytes <= map->offset_bytes || start_bytes >= map_end ||
            (map->start_addr < told.end_bytes && map->end_addr > told.start_bytes))
            continue;
        uint64_t from = start_bytes > map->offset_bytes ? start_bytes : map->offset_bytes;
        uint64_t to_bytes = end_bytes < map_end ? end_bytes : map_end;
        struct mf_change change = {.pid = to->watch->pid,
                                   .tid = like->tid,
                                   .kind = MF_CHANGE_REMOVE,
                                   .reason = like->reason,
                                   .start_addr = map->start_addr + (from - map->offset_bytes),
                                   .end_addr = map->start_addr + (to_bytes - map->offset_bytes)};
        to->fn(to->watch, &change, -1, to->arg);
    }
}

/** tell_unsaid() - of what happened to the file by no call of this process, or by one unknown. */
static void tell_unsaid(const struct teller *to, const struct mf_watch_file *file,
                        uint64_t start_bytes, uint64_t end_bytes, enum mf_reason reason)
{
    const struct mf_change like = {.reason = reason};
    tell(to, file, start_bytes, end_bytes, &like, (struct mf_extent){0});
}

void mf_watch_files_explain(struct mf_watch_files *files, struct mf_watch *watch,
                            const struct mf_change *change, mf_watch_fn *fn, void *arg)
{
    const struct teller to = {.watch = watch, .fn = fn, .arg = arg};
    if (change->kind != MF_CHANGE_REMOVE)
        return;
    for (size_t i = 0; i < watch->count; i++) {
        const struct mf_watched *map = &watch->maps[i];
        uint64_t start = change->start_addr, end = change->end_addr;
        if (!map->shared || map->end_addr <= start || map->start_addr >= end)
            continue;
        struct mf_watch_file *file = find_file(files, map);
        /* A tmpfs file keeps its pages when they are only not needed any more in the mapping. */
        if (!file || (change->reason == MF_REASON_DONTNEED && !file->hugetlb))
            continue;
        start = start > map->start_addr ? start : map->start_addr;
        end = end < map->end_addr ? end : map->end_addr;
        start = map->offset_bytes + (start - map->start_addr);
        end = map->offset_bytes + (end - map->start_addr);
        mf_extents_add(&file->explained, start, end);
        file->explained_ns = mf_now_ns();
        if (change->reason == MF_REASON_REMOVE)
            tell(&to, file, start, end, change,
                 (struct mf_extent){.start_bytes = change->start_addr,
                                    .end_bytes = change->end_addr});
    }
}

/** drop_explained() - what has gone by now, and what is too old to come, explains nothing more. */
static void drop_explained(struct mf_watch_file *file, const struct mf_extents *data)
{
    struct mf_extents gone = {0}, left = {0};
    uint64_t look_ns = mf_now_ns() - file->began_ns;
    uint64_t patience_ns = SECOND_NS > 20 * look_ns ? SECOND_NS : 20 * look_ns;
    if (mf_now_ns() - file->explained_ns < patience_ns &&
        mf_extents_minus(&file->explained, data, &gone) == 0)
        mf_extents_minus(&file->explained, &gone, &left);
    mf_extents_free(&gone);
    mf_extents_free(&file->explained);
    file->explained = left;
}

/** is_due() - has the file changed so that it must be looked at, and is it time? */
static bool is_due(const struct mf_watch_file *file, const struct stat *st)
{
    uint64_t ago_ns = mf_now_ns() - file->looked_ns;
    if (!file->known)
        return true;
    if (ago_ns < 10 * file->cost_ns)
        return false;
    if ((uint64_t)st->st_size != file->size_bytes || (uint64_t)st->st_blocks != file->blocks)
        return true;
    if (file->hugetlb)
        return ago_ns > HUGE_AGAIN_NS;
    return st->st_mtim.tv_sec != file->modified.tv_sec ||
           st->st_mtim.tv_nsec != file->modified.tv_nsec;
}

/** compare() - a look is done: tell what has gone since the last one. Takes over @data. Return: 0
 * or -ENOMEM. */
static int compare(struct mf_watch_file *file, struct mf_extents *data, uint64_t took_ns,
                   const struct teller *to)
{
    struct mf_extents vanished = {0}, news = {0};
    struct stat now;
    int rc = file->known ? mf_extents_minus(&file->data, data, &vanished) : 0;
    if (rc == 0)
        rc = mf_extents_minus(&vanished, &file->explained, &news);
    /* What has been cut off during the look is for the next one to tell. */
    uint64_t size_bytes = (uint64_t)file->began.st_size;
    if (fstat(file->fd, &now) == 0 && (uint64_t)now.st_size < size_bytes)
        size_bytes = (uint64_t)now.st_size;
    uint64_t end_bytes = page_end(size_bytes, file->page_bytes);
    /* Of hugetlbfs a page may only not be mapped any more: then the file is as large as before. */
    bool believe = !file->hugetlb || (uint64_t)file->began.st_blocks < file->blocks;
    for (size_t i = 0; rc == 0 && believe && i < news.count; i++) {
        const struct mf_extent *one = &news.list[i];
        uint64_t stop = one->end_bytes < end_bytes ? one->end_bytes : end_bytes;
        if (one->start_bytes < stop)
            tell_unsaid(to, file, one->start_bytes, stop, MF_REASON_PUNCH);
    }
    size_bytes = (uint64_t)file->began.st_size;
    if (rc == 0 && file->known && size_bytes < file->size_bytes)
        tell_unsaid(to, file, page_end(size_bytes, file->page_bytes),
                    page_end(file->size_bytes, file->page_bytes), MF_REASON_TRUNCATE);
    mf_extents_free(&vanished);
    mf_extents_free(&news);
    if (rc < 0) {
        mf_extents_free(data);
        return rc;
    }
    drop_explained(file, data);
    remember(file, data, took_ns);
    return 0;
}

/** look() - begin to, if it is due, or see what has come of it. Return: 0 or -errno. */
static int look(struct mf_looker *looker, struct mf_watch_file *file, const struct teller *to)
{
    struct mf_extents data = {0};
    uint64_t took_ns = 0;
    int rc;
    if (!file->look) {
        struct stat st;
        if (fstat(file->fd, &st) != 0 || !is_due(file, &st))
            return 0;
        file->began = st;
        file->began_ns = mf_now_ns();
        if (!file->hugetlb) {
            file->look = mf_look_begin(looker, file->fd, file->page_bytes);
            return 0;
        }
        rc = data_of_huge(file, to->watch, &data);
        took_ns = mf_now_ns() - file->began_ns;
    } else {
        if (!mf_look_done(looker, file->look))
            return 0;
        rc = mf_look_end(looker, file->look, &data, &took_ns);
        file->look = NULL;
    }
    if (rc == 0)
        return compare(file, &data, took_ns, to);
    mf_extents_free(&data);
    return rc;
}

int mf_watch_files_compare(struct mf_watch_files *files, struct mf_watch *watch, mf_watch_fn *fn,
                           void *arg)
{
    const struct teller to = {.watch = watch, .fn = fn, .arg = arg};
    for (size_t i = 0; i < files->count; i++) {
        struct mf_watch_file *file = &files->list[i];
        int rc = file->fd >= 0 ? look(files->looker, file, &to) : 0;
        if (rc == -ENOMEM)
            return rc;
        if (rc < 0) { /* in more pieces than can be kept */
            close(file->fd);
            file->fd = -1;
        }
    }
    return 0;
}

bool mf_watch_files_known(const struct mf_watch_files *files)
{
    for (size_t i = 0; i < files->count; i++) {
        if (files->list[i].fd >= 0 && !files->list[i].known)
            return false;
    }
    return true;
}
