/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * /proc/PID/maps: lines to mappings, and what follows from them alone. The format is
 * proc_pid_maps(5): "start-end perms offset major:minor inode   path", where the path may hold
 * blanks, has newlines written as \012, and ends in " (deleted)" once the file has no name any
 * more.
 */
#include "lib/target.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sysmacros.h>

#include "lib/proc_stat.h"
#include "lib/util.h"

static const char deleted_mark[] = " (deleted)";

/** number() - an unsigned number at *@at, which must be followed by @end. Moves *@at behind it. */
static bool number(const char **at, int base, char end, uint64_t *out)
{
    const char *s = *at;
    if (base == 16 ? !isxdigit((unsigned char)*s) : !isdigit((unsigned char)*s))
        return false; /* strtoull would take blanks and signs */
    char *stop;
    errno = 0;
    *out = strtoull(s, &stop, base);
    if (errno || *stop != end)
        return false;
    *at = stop + 1;
    return true;
}

int mf_vma_parse(const char *line, struct mf_vma *out)
{
    uint64_t device_major, device_minor, inode;
    struct mf_vma vma = {0};

    if (!number(&line, 16, '-', &vma.start_addr) || !number(&line, 16, ' ', &vma.end_addr) ||
        vma.start_addr >= vma.end_addr)
        return -EINVAL;
    if (strnlen(line, 5) < 5 || line[4] != ' ' || (line[3] != 's' && line[3] != 'p') ||
        (line[0] != 'r' && line[0] != '-') || (line[1] != 'w' && line[1] != '-') ||
        (line[2] != 'x' && line[2] != '-'))
        return -EINVAL;
    vma.readable = line[0] == 'r';
    vma.writable = line[1] == 'w';
    vma.executable = line[2] == 'x';
    vma.shared = line[3] == 's';
    line += 5;
    if (!number(&line, 16, ' ', &vma.offset_bytes) || !number(&line, 16, ':', &device_major) ||
        !number(&line, 16, ' ', &device_minor))
        return -EINVAL;
    /* The inode is the last field where there is no path. */
    char *stop;
    if (!isdigit((unsigned char)*line))
        return -EINVAL;
    errno = 0;
    inode = strtoull(line, &stop, 10);
    if (errno || (*stop != ' ' && *stop != '\n' && *stop != '\0') || device_major > UINT32_MAX ||
        device_minor > UINT32_MAX)
        return -EINVAL;
    vma.device = makedev((unsigned)device_major, (unsigned)device_minor);
    vma.inode = (ino_t)inode;

    const char *path = stop + strspn(stop, " ");
    size_t length = strcspn(path, "\n");
    size_t mark = sizeof(deleted_mark) - 1;
    if (length > mark && memcmp(path + length - mark, deleted_mark, mark) == 0) {
        vma.deleted = true;
        length -= mark;
    }
    if (length >= sizeof(vma.path))
        length = sizeof(vma.path) - 1;
    memcpy(vma.path, path, length);
    *out = vma;
    return 0;
}

int mf_target_vmas(pid_t pid, struct mf_vma **out, size_t *count, struct mf_error *err)
{
    char path[64], name[64];
    snprintf(path, sizeof(path), "/proc/%d/maps", pid);
    mf_target_comm(pid, name, sizeof(name));
    cleanup_fclose FILE *f = fopen(path, "re");
    if (!f) {
        int code = errno == ENOENT ? ESRCH : errno;
        if (code == ESRCH)
            return mf_fail(err, code, "%s (pid %d) is gone", name, pid);
        return mf_fail(err, code,
                       "cannot read the memory map of %s (%s): %s; it needs CAP_SYS_PTRACE", name,
                       path, strerror(code));
    }

    setvbuf(f, NULL, _IOFBF, 1 << 16); /* else it is read by the KiB */
    cleanup_free struct mf_vma *vmas = NULL;
    cleanup_free char *line = NULL;
    size_t line_size = 0, used = 0, room = 0;
    errno = 0;
    while (getline(&line, &line_size, f) > 0) {
        if (used == room) {
            room = room ? room * 2 : 128;
            struct mf_vma *grown = reallocarray(vmas, room, sizeof(*vmas));
            if (!grown)
                return mf_fail(err, ENOMEM, "out of memory reading the memory map of %s", name);
            vmas = grown;
        }
        if (mf_vma_parse(line, &vmas[used]) < 0)
            return mf_fail(err, EINVAL, "cannot make sense of the memory map of %s: '%.80s'", name,
                           line);
        used++;
    }
    /* A zombie's map opens and is empty; one that ends while it is read gives ESRCH. */
    if (used == 0 || ferror(f))
        return mf_fail(err, ESRCH, "%s (pid %d) is gone", name, pid);
    *out = vmas;
    *count = used;
    vmas = NULL;
    return 0;
}

bool mf_vma_is_private(const struct mf_vma *vma)
{
    return vma->inode == 0 && !vma->shared &&
           (vma->path[0] == '\0' || strcmp(vma->path, "[heap]") == 0 ||
            strncmp(vma->path, "[anon:", 6) == 0);
}

int mf_region_of(const struct mf_vma *vma, const struct mf_region_source *regions,
                 unsigned region_count, struct mf_mapping *part)
{
    for (unsigned i = 0; i < region_count; i++) {
        const struct mf_region_source *r = &regions[i];
        *part = (struct mf_mapping){.start_addr = vma->start_addr,
                                    .length_bytes = vma->end_addr - vma->start_addr,
                                    .offset_bytes = vma->offset_bytes,
                                    .region = i};
        if (r->kind != MF_MEMORY_PRIVATE) {
            if (vma->inode != 0 && vma->inode == r->inode && vma->device == r->device)
                return (int)i;
            continue;
        }
        const uint64_t end_addr = r->start_addr + r->size_bytes;
        if (!mf_vma_is_private(vma) || vma->end_addr <= r->start_addr ||
            vma->start_addr >= end_addr)
            continue;
        if (part->start_addr < r->start_addr)
            part->start_addr = r->start_addr;
        part->length_bytes =
            (vma->end_addr < end_addr ? vma->end_addr : end_addr) - part->start_addr;
        part->offset_bytes = part->start_addr - r->start_addr;
        return (int)i;
    }
    return -1;
}

int mf_target_mappings(const struct mf_vma *vmas, size_t count,
                       const struct mf_region_source *regions, unsigned region_count,
                       struct mf_mapping **out, struct mf_error *err)
{
    unsigned used = 0;
    cleanup_free struct mf_mapping *all = calloc(count ? count : 1, sizeof(*all));
    if (!all)
        return mf_fail(err, ENOMEM, "out of memory");
    for (size_t i = 0; i < count; i++) {
        const struct mf_vma *vma = &vmas[i];
        struct mf_mapping part;
        int region = mf_region_of(vma, regions, region_count, &part);
        if (region < 0)
            continue;
        if (!vma->shared && regions[region].kind != MF_MEMORY_PRIVATE)
            return mf_fail(
                err, EINVAL,
                "RAM '%s' is mapped privately at %#llx (share=off): give its backend share=on",
                regions[region].name, (unsigned long long)vma->start_addr);
        struct mf_mapping *before = used ? &all[used - 1] : NULL;
        /* A protection change or an madvise splits what is one mapping to us. */
        if (before && before->region == (uint32_t)region &&
            before->start_addr + before->length_bytes == part.start_addr &&
            before->offset_bytes + before->length_bytes == part.offset_bytes) {
            before->length_bytes += part.length_bytes;
            continue;
        }
        all[used++] = part;
    }
    *out = all;
    all = NULL;
    return (int)used;
}

bool mf_target_maps(pid_t pid, const struct mf_region_source *regions, unsigned region_count)
{
    char path[64];
    snprintf(path, sizeof(path), "/proc/%d/maps", pid);
    cleanup_fclose FILE *f = fopen(path, "re");
    cleanup_free char *line = NULL;
    size_t line_size = 0;
    struct mf_vma vma;
    struct mf_mapping part;
    while (f && getline(&line, &line_size, f) > 0) {
        /* Private memory is nobody else's: only shared mappings count. */
        if (mf_vma_parse(line, &vma) == 0 && vma.shared &&
            mf_region_of(&vma, regions, region_count, &part) >= 0)
            return true;
    }
    return false;
}

/** parent_of() - its parent's process id, 0 if that can't be said. */
static pid_t parent_of(pid_t other)
{
    struct mf_proc_stat stat;
    return mf_proc_stat(other, 0, &stat) == 0 ? stat.parent : 0;
}

/* A mover that has just been told to leave still maps the memory for a moment. */
static bool is_child_of_ours(pid_t other)
{
    return parent_of(other) == getpid();
}

static bool is_descendant(pid_t other, pid_t pid)
{
    for (unsigned depth = 0; depth < 64 && other > 1; depth++) {
        other = parent_of(other);
        if (other == pid)
            return true;
    }
    return false;
}

int mf_target_foreign(pid_t pid, bool descendants, uint64_t since_ticks,
                      const struct mf_region_source *regions, unsigned region_count, char *who,
                      size_t who_size)
{
    struct mf_proc_stat stat;
    cleanup_closedir DIR *proc = opendir("/proc");
    if (!proc)
        return -errno;
    for (struct dirent *entry; (entry = readdir(proc));) {
        pid_t other = (pid_t)strtol(entry->d_name, NULL, 10);
        if (other <= 0 || other == pid || other == getpid())
            continue;
        if (since_ticks && (mf_proc_stat(other, 0, &stat) < 0 || stat.start_ticks < since_ticks))
            continue;
        /* One without a parent has ended meanwhile. */
        if (mf_target_maps(other, regions, region_count) && parent_of(other) > 0 &&
            !is_child_of_ours(other) && (descendants || !is_descendant(other, pid))) {
            char name[64];
            mf_target_comm(other, name, sizeof(name));
            snprintf(who, who_size, "%s (pid %d)", name, other);
            return 1;
        }
    }
    return 0;
}

void mf_target_comm(pid_t pid, char *out, size_t size)
{
    char path[64];
    snprintf(path, sizeof(path), "/proc/%d/comm", pid);
    cleanup_close int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t length = fd >= 0 ? read(fd, out, size - 1) : -1;
    if (length > 1) {
        out[length] = '\0';
        out[strcspn(out, "\n")] = '\0';
    } else {
        snprintf(out, size, "pid %d", pid);
    }
}
