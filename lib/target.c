/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * From what a VMM says about a memory backend to an open descriptor of its RAM file.
 *
 * The VMM names a path, but the path alone proves nothing: it is in the VMM's mount namespace, it
 * may be a directory in which the VMM made a file and removed its name at once, and a file may
 * since have been removed or replaced. So the file is identified among what the process has mapped,
 * by device and inode where the path still leads to it and by name where not, and then opened
 * through /proc/PID/map_files, which needs no path (CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE).
 * Without that right the process's own descriptors (/proc/PID/fd) are searched for the same file,
 * then the path is tried.
 */
#include "lib/target.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/vfs.h>

#include "lib/uapi.h"
#include "lib/util.h"

/** What is being looked for; the parameters of mf_target_region(). */
struct wanted {
    pid_t pid;
    const char *name, *mem_path;
    uint64_t size_bytes;
    char process[64];
};

/** open_in_target() - @path as the target would open it. Return: an O_PATH descriptor or -errno. */
static int open_in_target(pid_t pid, const char *path)
{
    char base[64];
    snprintf(base, sizeof(base), "/proc/%d/%s", pid, path[0] == '/' ? "root" : "cwd");
    cleanup_close int dir = open(base, O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (dir < 0)
        return -errno;
    /* Absolute links must be followed from the target's root, not from ours. A relative path may
     * leave its directory by "..", which RESOLVE_IN_ROOT would stop. */
    struct open_how how = {.flags = O_PATH | O_CLOEXEC,
                           .resolve = path[0] == '/' ? RESOLVE_IN_ROOT : 0};
    int fd = (int)syscall(SYS_openat2, dir, path, &how, sizeof(how));
    return fd >= 0 ? fd : -errno;
}

/** mapped_size() - how many bytes of the file behind @vma are mapped, up to its last mapped byte.
 */
static uint64_t mapped_size(const struct mf_vma *vmas, size_t count, const struct mf_vma *file)
{
    uint64_t end_bytes = 0;
    for (size_t i = 0; i < count; i++) {
        uint64_t end = vmas[i].offset_bytes + (vmas[i].end_addr - vmas[i].start_addr);
        if (vmas[i].inode == file->inode && vmas[i].device == file->device && end > end_bytes)
            end_bytes = end;
    }
    return end_bytes;
}

static bool same_file(const struct mf_vma *a, const struct mf_vma *b)
{
    return a->inode == b->inode && a->device == b->device;
}

static const char *base_name(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

/** names_backend() - is this QEMU's name for the unnamed file of backend @name in a directory? It
 * is qemu_back_mem.NAME.RANDOM, with NAME the id or the object's path with '/' made '_'. */
static bool names_backend(const char *file, const char *name)
{
    static const char prefix[] = "qemu_back_mem.", objects[] = "_objects_";
    if (strncmp(file, prefix, sizeof(prefix) - 1) != 0)
        return false;
    file += sizeof(prefix) - 1;
    if (strncmp(file, objects, sizeof(objects) - 1) == 0)
        file += sizeof(objects) - 1;
    size_t length = strlen(name);
    return strncmp(file, name, length) == 0 && file[length] == '.';
}

/**
 * find_mapping() - the one mapping to open.
 * Candidates are weighed: 3 the file the path leads to, 2 a file that has lost its name and bears
 * the right one, 1 a file of the right place and size. More than one file at the best weight is
 * ambiguous. Return: the mapping, or NULL with *@ambiguous telling why.
 */
static const struct mf_vma *find_mapping(const struct wanted *w, const struct mf_vma *vmas,
                                         size_t count, const struct stat *st, bool *ambiguous)
{
    const struct mf_vma *best = NULL;
    int best_weight = 0;
    bool memfd = !w->mem_path || !w->mem_path[0];
    *ambiguous = false;

    for (size_t i = 0; i < count; i++) {
        const struct mf_vma *vma = &vmas[i];
        int weight = 0;
        if (vma->inode == 0)
            continue;
        if (memfd) {
            if (strncmp(vma->path, "/memfd:", 7) == 0 &&
                mapped_size(vmas, count, vma) == w->size_bytes)
                weight = strcmp(vma->path + 7, w->name) == 0 ? 2 : 1;
        } else if (st && S_ISREG(st->st_mode) && vma->inode == st->st_ino &&
                   vma->device == st->st_dev) {
            weight = 3;
        } else if (st && S_ISDIR(st->st_mode)) {
            if (vma->deleted && vma->device == st->st_dev) {
                if (names_backend(base_name(vma->path), w->name))
                    weight = 2;
                else if (mapped_size(vmas, count, vma) == w->size_bytes)
                    weight = 1;
            }
        } else if (!st && strcmp(vma->path, w->mem_path) == 0) {
            weight = 2;
        } else if (!st && vma->deleted &&
                   strcmp(base_name(vma->path), base_name(w->mem_path)) == 0 &&
                   mapped_size(vmas, count, vma) == w->size_bytes) {
            weight = 1; /* seen from here, another mount namespace's path may look different */
        }
        if (weight == 0 || weight < best_weight)
            continue;
        if (weight > best_weight) {
            *ambiguous = false;
        } else if (!same_file(vma, best)) {
            *ambiguous = true;
            continue;
        } else if (!vma->shared || best->shared) {
            continue; /* another mapping of the same file; a shared one is preferred */
        }
        best = vma;
        best_weight = weight;
    }
    return *ambiguous ? NULL : best;
}

/** is_file() - does @fd refer to the file behind @vma? */
static bool is_file(int fd, const struct mf_vma *vma)
{
    struct stat st;
    return fstat(fd, &st) == 0 && st.st_dev == vma->device && st.st_ino == vma->inode;
}

/** open_from_fds() - the target's own descriptors. Return: a new descriptor or -errno. */
static int open_from_fds(pid_t pid, const struct mf_vma *vma, int flags)
{
    char path[64], entry_path[384];
    snprintf(path, sizeof(path), "/proc/%d/fd", pid);
    cleanup_closedir DIR *dir = opendir(path);
    if (!dir)
        return -errno;
    int rc = -ENOENT;
    for (struct dirent *entry; (entry = readdir(dir));) {
        struct stat st;
        snprintf(entry_path, sizeof(entry_path), "%s/%s", path, entry->d_name);
        /* Looked at before it is opened: opening a device or a FIFO may have effects. */
        if (stat(entry_path, &st) != 0 || !S_ISREG(st.st_mode) || st.st_dev != vma->device ||
            st.st_ino != vma->inode)
            continue;
        int fd = open(entry_path, flags);
        if (fd >= 0)
            return fd;
        rc = -errno;
    }
    return rc;
}

static int open_file(const struct wanted *w, const struct mf_vma *vma, int path_fd, bool writable,
                     struct mf_error *err)
{
    int flags = (writable ? O_RDWR : O_RDONLY) | O_CLOEXEC;
    char path[96];
    snprintf(path, sizeof(path), "/proc/%d/map_files/%llx-%llx", w->pid,
             (unsigned long long)vma->start_addr, (unsigned long long)vma->end_addr);
    int fd = open(path, flags);
    int code = errno;
    if (fd < 0)
        fd = open_from_fds(w->pid, vma, flags);
    if (fd < 0 && path_fd >= 0) {
        snprintf(path, sizeof(path), "/proc/self/fd/%d", path_fd);
        fd = open(path, flags);
    }
    if (fd < 0)
        return mf_fail(
            err, code,
            "cannot open the RAM file of '%s' of %s (pid %d): %s; memferryd needs "
            "CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE, and CAP_DAC_OVERRIDE for another user's "
            "files",
            w->name, w->process, w->pid, strerror(code));
    if (!is_file(fd, vma)) {
        close(fd);
        return mf_fail(err, ESTALE,
                       "the memory map of %s (pid %d) changed while it was looked at: try again",
                       w->process, w->pid);
    }
    return fd;
}

/** classify() - which kind of memory, and its page size. Return: 0, or -EOPNOTSUPP with a sentence.
 */
static int classify(const struct wanted *w, int fd, const char *path, struct mf_region_source *out,
                    struct mf_error *err)
{
    static const char remedy[] =
        "put it on tmpfs (mem-path=/dev/shm/NAME) or hugetlbfs and start the VM again";
    struct statfs fs;
    if (fstatfs(fd, &fs) != 0)
        return mf_fail(err, errno, "cannot look at the RAM file of '%s': %s", w->name,
                       strerror(errno));
    if ((unsigned long)fs.f_type == TMPFS_MAGIC) {
        out->kind = MF_MEMORY_TMPFS;
        out->page_bytes = (uint32_t)sysconf(_SC_PAGESIZE);
        return 0;
    }
    if ((unsigned long)fs.f_type == HUGETLBFS_MAGIC) {
        out->kind = MF_MEMORY_HUGETLB;
        out->page_bytes = (uint32_t)fs.f_bsize;
        return 0;
    }
    struct statx stx;
    bool dax = statx(fd, "", AT_EMPTY_PATH, 0, &stx) == 0 && (stx.stx_attributes & STATX_ATTR_DAX);
    out->kind = dax ? MF_MEMORY_DAX : MF_MEMORY_OTHER;
    return mf_fail(
        err, EOPNOTSUPP, "RAM '%s' of %s (pid %d) is %s (%s), which userfaultfd can't serve: %s",
        w->name, w->process, w->pid,
        dax ? "on persistent memory (fs-dax)" : "a file on a disk file system", path, remedy);
}

int mf_target_region(pid_t pid, const struct mf_vma *vmas, size_t count, const char *name,
                     const char *mem_path, uint64_t size_bytes, bool writable,
                     struct mf_region_source *out, struct mf_error *err)
{
    if (mem_path && strncmp(mem_path, MF_TARGET_ANON, strlen(MF_TARGET_ANON)) == 0)
        return mf_target_private(pid, vmas, count, name, mem_path, size_bytes, writable, out, err);
    struct wanted w = {.pid = pid, .name = name, .mem_path = mem_path, .size_bytes = size_bytes};
    mf_target_comm(pid, w.process, sizeof(w.process));
    bool memfd = !mem_path || !mem_path[0];
    const char *where = memfd ? "a memfd" : mem_path;

    if (strnlen(name, sizeof(out->name)) == sizeof(out->name))
        return mf_fail(err, ENAMETOOLONG,
                       "the name of memory backend '%s' is longer than %zu characters", name,
                       sizeof(out->name) - 1);
    struct stat st;
    cleanup_close int path_fd = memfd ? -1 : open_in_target(pid, mem_path);
    bool there = path_fd >= 0 && fstat(path_fd, &st) == 0;

    bool ambiguous;
    const struct mf_vma *vma = find_mapping(&w, vmas, count, there ? &st : NULL, &ambiguous);
    if (!vma && !ambiguous && there && S_ISREG(st.st_mode))
        /* Another file of that name has been made since; the mapped one was removed. */
        vma = find_mapping(&w, vmas, count, NULL, &ambiguous);
    if (ambiguous)
        return mf_fail(
            err, ENOTUNIQ,
            "%s (pid %d) maps several files that could be RAM '%s' (%s): give each memory "
            "backend a mem-path of its own",
            w.process, pid, name, where);
    if (!vma)
        return mf_fail(err, ENOENT,
                       "%s (pid %d) maps no file that could be RAM '%s' (%s): it must be a "
                       "memory-backend-file with share=on",
                       w.process, pid, name, where);
    if (!vma->shared)
        return mf_fail(
            err, EINVAL,
            "RAM '%s' of %s (pid %d) is mapped privately (share=off): add share=on to its "
            "memory backend and start the VM again",
            name, w.process, pid);

    struct mf_region_source found = {
        .size_bytes = size_bytes, .fd = -1, .device = vma->device, .inode = vma->inode};
    snprintf(found.name, sizeof(found.name), "%s", name);
    cleanup_close int fd =
        open_file(&w, vma, there && S_ISREG(st.st_mode) ? path_fd : -1, writable, err);
    if (fd < 0)
        return fd;
    int rc = classify(&w, fd, vma->path, &found, err);
    if (rc < 0)
        return rc;
    if (fstat(fd, &st) != 0)
        return mf_fail(err, errno, "cannot look at the RAM file of '%s': %s", name,
                       strerror(errno));
    if ((uint64_t)st.st_size != size_bytes || size_bytes == 0 || size_bytes % found.page_bytes != 0)
        return mf_fail(
            err, EINVAL,
            "RAM '%s' of %s (pid %d) has %llu bytes, but its file %s has %llu, in pages of %u: "
            "they must agree",
            name, w.process, pid, (unsigned long long)size_bytes, vma->path,
            (unsigned long long)st.st_size, found.page_bytes);
    found.fd = mf_steal_fd(&fd);
    *out = found;
    return 0;
}

int mf_target_file(pid_t pid, const struct mf_vma *vma, const char *name, bool writable,
                   struct mf_region_source *out, struct mf_error *err)
{
    struct wanted w = {.pid = pid, .name = name};
    char path[96];
    struct stat st;
    mf_target_comm(pid, w.process, sizeof(w.process));
    snprintf(path, sizeof(path), "/proc/%d/map_files/%llx-%llx", pid,
             (unsigned long long)vma->start_addr, (unsigned long long)vma->end_addr);
    if (stat(path, &st) == 0 && !S_ISREG(st.st_mode))
        return mf_fail(err, ENODEV, "%s, which %s (pid %d) maps, is a device", vma->path, w.process,
                       pid);
    struct mf_region_source found = {.fd = -1, .device = vma->device, .inode = vma->inode};
    snprintf(found.name, sizeof(found.name), "%s", name);
    cleanup_close int fd = open_file(&w, vma, -1, writable, err);
    if (fd < 0)
        return fd;
    int rc = classify(&w, fd, vma->path, &found, err);
    if (rc < 0) {
        out->kind = found.kind;
        return rc;
    }
    if (fstat(fd, &st) != 0)
        return mf_fail(err, errno, "cannot look at %s: %s", vma->path, strerror(errno));
    found.size_bytes = (uint64_t)st.st_size;
    if (found.size_bytes == 0 || found.size_bytes % found.page_bytes != 0)
        return mf_fail(err, EINVAL,
                       "%s, which %s (pid %d) maps, has %llu bytes, which is no number of pages of "
                       "%u: give it a size in whole pages (ftruncate)",
                       vma->path, w.process, pid, (unsigned long long)found.size_bytes,
                       found.page_bytes);
    found.fd = mf_steal_fd(&fd);
    *out = found;
    return 0;
}

int mf_target_vfio(pid_t pid)
{
    static const char *const marks[] = {"/dev/vfio/", "/dev/vhost-vdpa", "anon_inode:[vfio"};
    char path[64], link[128];
    snprintf(path, sizeof(path), "/proc/%d/fd", pid);
    cleanup_closedir DIR *dir = opendir(path);
    if (!dir)
        return errno == ENOENT ? -ESRCH : -errno;
    for (struct dirent *entry; (entry = readdir(dir));) {
        ssize_t length = readlinkat(dirfd(dir), entry->d_name, link, sizeof(link) - 1);
        if (length < 0)
            continue;
        link[length] = '\0';
        for (size_t i = 0; i < sizeof(marks) / sizeof(marks[0]); i++) {
            if (strncmp(link, marks[i], strlen(marks[i])) == 0)
                return 1;
        }
    }
    return 0;
}

/** read_u64() - the number after @key in a file, or its first number if @key is "". */
static int read_u64(const char *path, const char *key, uint64_t *out)
{
    char line[256];
    cleanup_fclose FILE *f = fopen(path, "re");
    if (!f)
        return -errno;
    while (fgets(line, sizeof(line), f)) {
        if (strncmp(line, key, strlen(key)) == 0) {
            *out = strtoull(line + strlen(key), NULL, 10);
            return 0;
        }
    }
    return -ENODATA;
}

int mf_memory_available(int fd, uint64_t *available_bytes)
{
    struct statfs fs;
    uint64_t available;
    if (fstatfs(fd, &fs) != 0)
        return -errno;
    uint64_t block_bytes = (uint64_t)fs.f_bsize;
    if ((unsigned long)fs.f_type == HUGETLBFS_MAGIC) {
        char path[128];
        snprintf(path, sizeof(path), "/sys/kernel/mm/hugepages/hugepages-%llukB/free_hugepages",
                 (unsigned long long)(block_bytes >> 10));
        int rc = read_u64(path, "", &available);
        if (rc < 0)
            return rc;
        available *= block_bytes;
    } else {
        int rc = read_u64("/proc/meminfo", "MemAvailable:", &available);
        if (rc < 0)
            return rc;
        available *= 1024;
    }
    /* A mount without a limit (size=0, memfd, hugetlbfs as a rule) reports no blocks at all. */
    if (fs.f_blocks > 0 && (uint64_t)fs.f_bavail * block_bytes < available)
        available = (uint64_t)fs.f_bavail * block_bytes;
    *available_bytes = available;
    return 0;
}
