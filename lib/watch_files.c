/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib/watch_files.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>

#include "lib/pagemap.h"
#include "lib/uapi.h"
#include "lib/util.h"

#define SECOND_NS UINT64_C(1000000000)
#define EXTENTS_MAX                                                                                \
    1000000u /**< 16 MiB of memory a file; a file in more pieces is not compared                   \
              */
#define HUGE_AGAIN_NS                                                                              \
    (SECOND_NS / 4) /**< pages of a file that were mapped change nothing in it                     \
                     */

static void file_free(struct mf_watch_file *file)
{
    if (file->fd >= 0)
        close(file->fd);
    mf_extents_free(&file->data);
    mf_extents_free(&file->explained);
}

void mf_watch_files_free(struct mf_watch_files *files)
{
    for (size_t i = 0; i < files->count; i++)
        file_free(&files->list[i]);
    free(files->list);
    *files = (struct mf_watch_files){0};
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
    return fd >= 0 ? fd : -errno;
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

/** data_of_tmpfs() - which pages hold data. The last one counts whole: SEEK_HOLE says the file's
 * size of it. */
static int data_of_tmpfs(int fd, uint64_t page_bytes, struct mf_extents *out)
{
    for (off_t at = 0;;) {
        off_t data = lseek(fd, at, SEEK_DATA);
        if (data < 0)
            return errno == ENXIO ? 0 : -errno;
        at = lseek(fd, data, SEEK_HOLE);
        if (at < 0)
            return errno == ENXIO ? 0 : -errno; /* cut off between the two calls */
        int rc = mf_extents_add(out, (uint64_t)data, page_end((uint64_t)at, page_bytes));
        if (rc == 0 && out->count > EXTENTS_MAX)
            rc = -E2BIG;
        if (rc < 0)
            return rc;
    }
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

static int data_of(const struct mf_watch_file *file, const struct mf_watch *watch,
                   struct mf_extents *out)
{
    return file->hugetlb ? data_of_huge(file, watch, out)
                         : data_of_tmpfs(file->fd, file->page_bytes, out);
}

/** remember() - what the file is like now. Takes over @data. */
static void remember(struct mf_watch_file *file, const struct stat *st, struct mf_extents *data,
                     uint64_t start_ns)
{
    mf_extents_free(&file->data);
    file->data = *data;
    file->size_bytes = (uint64_t)st->st_size;
    file->blocks = (uint64_t)st->st_blocks;
    file->modified = st->st_mtim;
    file->looked_ns = mf_now_ns();
    file->cost_ns = file->looked_ns - start_ns;
}

/** first_look() - Return: 0 or -errno, then the file is not compared. */
static int first_look(struct mf_watch_file *file, const struct mf_watch *watch)
{
    struct stat st;
    struct mf_extents data = {0};
    uint64_t start_ns = mf_now_ns();
    if (fstat(file->fd, &st) != 0)
        return -errno;
    file->page_bytes = file->hugetlb ? (uint64_t)st.st_blksize : (uint64_t)sysconf(_SC_PAGESIZE);
    int rc = data_of(file, watch, &data);
    if (rc < 0)
        mf_extents_free(&data);
    else
        remember(file, &st, &data, start_ns);
    return rc;
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
        if (fresh.fd >= 0 && first_look(&fresh, watch) < 0) {
            close(fresh.fd);
            fresh.fd = -1;
        }
        struct mf_watch_file *grown =
            reallocarray(files->list, files->count + 1, sizeof(*files->list));
        if (!grown) {
            file_free(&fresh);
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
            file_free(&files->list[i]);
    }
    files->count = kept;
    return 0;
}

/* ------------------------------------------------------------------------------------ comparing */

void mf_watch_files_explain(struct mf_watch_files *files, const struct mf_watch *watch,
                            const struct mf_change *change)
{
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
        mf_extents_add(&file->explained, map->offset_bytes + (start - map->start_addr),
                       map->offset_bytes + (end - map->start_addr));
        file->explained_ns = mf_now_ns();
    }
}

struct teller {
    struct mf_watch *watch;
    mf_watch_fn *fn;
    void *arg;
};

/** tell() - [@start_bytes, @end_bytes) of the file has gone: wherever it is mapped. */
static void tell(const struct teller *to, const struct mf_watch_file *file, uint64_t start_bytes,
                 uint64_t end_bytes, enum mf_reason reason)
{
    for (size_t i = 0; i < to->watch->count; i++) {
        const struct mf_watched *map = &to->watch->maps[i];
        uint64_t length_bytes = map->end_addr - map->start_addr;
        uint64_t map_end = map->offset_bytes + length_bytes;
        if (map->inode != file->inode || map->device != file->device || !map->shared ||
            end_bytes <= map->offset_bytes || start_bytes >= map_end)
            continue;
        uint64_t from = start_bytes > map->offset_bytes ? start_bytes : map->offset_bytes;
        uint64_t to_bytes = end_bytes < map_end ? end_bytes : map_end;
        struct mf_change change = {.pid = to->watch->pid,
                                   .kind = MF_CHANGE_REMOVE,
                                   .reason = reason,
                                   .start_addr = map->start_addr + (from - map->offset_bytes),
                                   .end_addr = map->start_addr + (to_bytes - map->offset_bytes)};
        to->fn(to->watch, &change, -1, to->arg);
    }
}

/** drop_explained() - what has gone by now, and what is too old to come, explains nothing more. */
static void drop_explained(struct mf_watch_file *file, const struct mf_extents *data)
{
    struct mf_extents gone = {0}, left = {0};
    uint64_t patience_ns = SECOND_NS > 20 * file->cost_ns ? SECOND_NS : 20 * file->cost_ns;
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
    if (ago_ns < 10 * file->cost_ns)
        return false;
    if ((uint64_t)st->st_size != file->size_bytes || (uint64_t)st->st_blocks != file->blocks)
        return true;
    if (file->hugetlb)
        return ago_ns > HUGE_AGAIN_NS;
    return st->st_mtim.tv_sec != file->modified.tv_sec ||
           st->st_mtim.tv_nsec != file->modified.tv_nsec;
}

static int compare(struct mf_watch_file *file, const struct stat *st, const struct teller *to)
{
    struct mf_extents data = {0}, vanished = {0}, news = {0};
    uint64_t start_ns = mf_now_ns(), size_bytes = (uint64_t)st->st_size;
    int rc = data_of(file, to->watch, &data);
    if (rc == 0)
        rc = mf_extents_minus(&file->data, &data, &vanished);
    if (rc == 0)
        rc = mf_extents_minus(&vanished, &file->explained, &news);
    uint64_t end_bytes = page_end(size_bytes, file->page_bytes);
    /* Of hugetlbfs a page may only not be mapped any more: then the file is as large as before. */
    bool believe = !file->hugetlb || (uint64_t)st->st_blocks < file->blocks;
    for (size_t i = 0; rc == 0 && believe && i < news.count; i++) {
        const struct mf_extent *one = &news.list[i];
        uint64_t stop = one->end_bytes < end_bytes ? one->end_bytes : end_bytes;
        if (one->start_bytes < stop)
            tell(to, file, one->start_bytes, stop, MF_REASON_PUNCH);
    }
    if (rc == 0 && size_bytes < file->size_bytes)
        tell(to, file, end_bytes, page_end(file->size_bytes, file->page_bytes), MF_REASON_TRUNCATE);
    mf_extents_free(&vanished);
    mf_extents_free(&news);
    if (rc < 0) {
        mf_extents_free(&data);
        return rc;
    }
    drop_explained(file, &data);
    remember(file, st, &data, start_ns);
    return 0;
}

int mf_watch_files_compare(struct mf_watch_files *files, struct mf_watch *watch, mf_watch_fn *fn,
                           void *arg)
{
    const struct teller to = {.watch = watch, .fn = fn, .arg = arg};
    for (size_t i = 0; i < files->count; i++) {
        struct mf_watch_file *file = &files->list[i];
        struct stat st;
        if (file->fd < 0 || fstat(file->fd, &st) != 0 || !is_due(file, &st))
            continue;
        int rc = compare(file, &st, &to);
        if (rc == -ENOMEM)
            return rc;
        if (rc < 0) { /* in more pieces than can be kept */
            close(file->fd);
            file->fd = -1;
        }
    }
    return 0;
}
