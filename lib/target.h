/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What a target process maps: /proc/PID/maps (proc_pid_maps(5)) read into mappings, and the RAM
 * files behind them opened as regions. Run by memferryd, with CAP_SYS_PTRACE and CAP_SYS_ADMIN (for
 * /proc/PID/map_files). Nothing here changes the target.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "lib/error.h"

#define MF_REGIONS_MAX 64   /**< regions of one session */
#define MF_MAPPINGS_MAX 512 /**< mappings of its regions that a session can begin with */

/** struct mf_vma - one line of /proc/PID/maps. */
struct mf_vma {
    uint64_t start_addr, end_addr; /**< [start, end) in the target */
    uint64_t offset_bytes;         /**< of the file at start_addr */
    bool readable, writable, executable, shared;
    dev_t device;
    ino_t inode;
    char path[512]; /**< without " (deleted)"; truncated if longer */
    bool deleted;
};

enum mf_memory_kind {
    MF_MEMORY_TMPFS,
    MF_MEMORY_HUGETLB,
    MF_MEMORY_PRIVATE, /**< anonymous memory of one process: no file holds it */
    MF_MEMORY_DAX,
    MF_MEMORY_OTHER,
};

/** struct mf_region_source - a RAM file, or private memory, as found: what a region is made from.
 * Owns `fd`. */
struct mf_region_source {
    char name[64];
    uint64_t size_bytes;
    uint32_t page_bytes; /**< 4096 on tmpfs (also with transparent huge pages), the huge page size
                            on hugetlbfs */
    enum mf_memory_kind kind;
    /** The RAM file, opened through /proc/PID/map_files; -1 when empty. Private memory: at the
     * source /proc/PID/mem, at the destination a memfd of ours in which pages of precopy rounds
     * wait to be confirmed. */
    int fd;
    dev_t device;
    ino_t inode;
    uint64_t start_addr; /**< private memory: where its first byte lay when it was found */
};

/** struct mf_mapping - where the target maps a part of a region. */
struct mf_mapping {
    uint64_t start_addr, length_bytes;
    uint64_t offset_bytes; /**< in the region's file */
    uint32_t region;
    uint32_t context; /**< which userfaultfd it is registered with (index), 0 at first */
};

/** mf_vma_parse() - parse one line of maps. Pure. Return: 0, or -EINVAL on a line that is none. */
int mf_vma_parse(const char *line, struct mf_vma *out);

/**
 * mf_target_vmas() - read all of /proc/PID/maps.
 * @out: malloc'ed array of *@count, owned by the caller.
 * Return: 0 or -errno (-ESRCH: the process is gone).
 */
int mf_target_vmas(pid_t pid, struct mf_vma **out, size_t *count, struct mf_error *err);

/**
 * mf_target_region() - find the RAM file of one memory backend and open it.
 * @vmas:     of the target, from mf_target_vmas.
 * @name:     the region's name (the backend's id).
 * @mem_path: as the VMM says it: a file or a directory, in the target's mount namespace. A file
 * that was deleted meanwhile is still found. NULL or "": the memory is a memfd, told from others by
 * its size. MF_TARGET_ANON…: private memory, see mf_target_private.
 * @writable: open O_RDWR (destination), else O_RDONLY (source).
 * Refuses, naming the cause and the remedy: no shared mapping of such a file; size that differs;
 * anything that is neither tmpfs nor hugetlbfs (fs-dax by name).
 * Return: 0 with @out filled (the caller closes out->fd), or -errno.
 */
int mf_target_region(pid_t pid, const struct mf_vma *vmas, size_t count, const char *name,
                     const char *mem_path, uint64_t size_bytes, bool writable,
                     struct mf_region_source *out, struct mf_error *err);

/** What names private memory instead of a file's path: "anon:NAME" (prctl(2), PR_SET_VMA_ANON_NAME,
 * Linux 5.17) or "anon:START-END" (addresses in hexadecimal, as in /proc/PID/maps). */
#define MF_TARGET_ANON "anon:"

/**
 * mf_target_private() - find private anonymous memory of one process. What mf_target_region() does
 * with a @where of that kind; the other parameters as there.
 * @size_bytes: 0 takes what is found, else it must agree.
 * Refuses, naming the cause: a gap in the range; a piece that is a file (MAP_PRIVATE of a file,
 * shared memory), huge pages of hugetlbfs or a stack that grows; memory that can't be read.
 * Return: 0 with @out filled (the caller closes out->fd), or -errno.
 */
int mf_target_private(pid_t pid, const struct mf_vma *vmas, size_t count, const char *name,
                      const char *where, uint64_t size_bytes, bool writable,
                      struct mf_region_source *out, struct mf_error *err);

/** mf_vma_is_private() - private anonymous memory, which no file holds? */
bool mf_vma_is_private(const struct mf_vma *vma);

/**
 * mf_target_file() - open the file behind one mapping, whatever it is called.
 * @vma:      a mapping of it, from mf_target_vmas.
 * @name:     the region's name, for `out` and for messages.
 * Return: 0 with @out filled (the caller closes out->fd; size and pages are the file's), or -errno:
 * -EOPNOTSUPP, with out->kind set, for what userfaultfd can't serve, -EINVAL for a size that is not
 * a number of pages, -ENODEV for what is no regular file (it is not opened: that may have effects).
 */
int mf_target_file(pid_t pid, const struct mf_vma *vma, const char *name, bool writable,
                   struct mf_region_source *out, struct mf_error *err);

/** mf_region_of() - which of @regions @vma maps a part of, and the part's place; -1: none. Of
 * private memory only what lies within its range counts. */
int mf_region_of(const struct mf_vma *vma, const struct mf_region_source *regions,
                 unsigned region_count, struct mf_mapping *part);

/**
 * mf_target_mappings() - the target's mappings of all regions, neighbours merged.
 * @out: malloc'ed array, owned by the caller.
 * Return: how many, or -EINVAL with a sentence when a region is mapped MAP_PRIVATE too. Private
 * memory is taken to be where it was found: changes of its place since then are known only to who
 * follows the events.
 */
int mf_target_mappings(const struct mf_vma *vmas, size_t count,
                       const struct mf_region_source *regions, unsigned region_count,
                       struct mf_mapping **out, struct mf_error *err);

/**
 * mf_target_foreign() - does a process other than @pid, the caller and its children (movers) map
 * one of the regions? A writer that can't be seen (vhost-user back end). Reads every /proc/N/maps
 * that is readable. Return: 0 none, 1 with @who (a name such as "virtiofsd (pid 123)") filled, or
 * -errno.
 * @descendants: whether those of @pid count. @since_ticks: only who was started since
 * (mf_proc_ticks()), which is quicker; 0: all.
 */
int mf_target_foreign(pid_t pid, bool descendants, uint64_t since_ticks,
                      const struct mf_region_source *regions, unsigned region_count, char *who,
                      size_t who_size);

/** mf_target_maps() - does @pid map one of the regions shared? (Private memory is nobody else's.) A
 * process that can't be read does not. */
bool mf_target_maps(pid_t pid, const struct mf_region_source *regions, unsigned region_count);

/** mf_target_vfio() - has the target VFIO or vDPA devices open (/proc/PID/fd)? Return: 1, 0 or
 * -errno. */
int mf_target_vfio(pid_t pid);

/** mf_target_comm() - the process's name for messages, "pid N" if unreadable. */
void mf_target_comm(pid_t pid, char *out, size_t size);

/**
 * mf_memory_available() - how much a RAM file's file system can still take, in bytes: on tmpfs the
 * smaller of its free space and MemAvailable of /proc/meminfo, on hugetlbfs the free huge pages of
 * that size.
 * @fd: of the RAM file. Return: 0 or -errno.
 */
int mf_memory_available(int fd, uint64_t *available_bytes);
