/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Private anonymous memory as a region: a range of one process's address space.
 *
 * No file holds it, so nothing of it can be mapped a second time. The source reads it through
 * /proc/PID/mem, for which the right is checked when it is opened: the mover that is handed the
 * descriptor needs none. The destination fills it with UFFDIO_COPY; bytes that are not known to be
 * current yet wait in a memfd of ours.
 */
#include "lib/target.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "lib/util.h"

/** parse_range() - "START-END" in hexadecimal. Return: false if @text is something else. */
static bool parse_range(const char *text, uint64_t *start_addr, uint64_t *end_addr)
{
    char *dash, *stop;
    if (text[strspn(text, "0123456789abcdefABCDEF-")] != '\0' || text[0] == '-')
        return false;
    errno = 0;
    *start_addr = strtoull(text, &dash, 16);
    if (errno || *dash != '-' || dash[1] == '\0' || dash[1] == '-')
        return false;
    *end_addr = strtoull(dash + 1, &stop, 16);
    return !errno && *stop == '\0';
}

/** named_range() - from the first to the last piece that bears the name. */
static bool named_range(const struct mf_vma *vmas, size_t count, const char *name,
                        uint64_t *start_addr, uint64_t *end_addr)
{
    const size_t length = strlen(name);
    *end_addr = 0;
    for (size_t i = 0; i < count; i++) {
        const char *path = vmas[i].path;
        if (strncmp(path, "[anon:", 6) != 0 || strncmp(path + 6, name, length) != 0 ||
            strcmp(path + 6 + length, "]") != 0)
            continue;
        if (*end_addr == 0)
            *start_addr = vmas[i].start_addr;
        *end_addr = vmas[i].end_addr;
    }
    return *end_addr != 0;
}

/** what_else() - what a piece is that is no private anonymous memory. */
static const char *what_else(const struct mf_vma *vma)
{
    if (strncmp(vma->path, "[stack", 6) == 0)
        return "a stack, which grows by itself";
    if (strcmp(vma->path, "/anon_hugepage") == 0)
        return "huge pages (MAP_HUGETLB) without a file; map a hugetlbfs file MAP_SHARED instead";
    if (vma->shared)
        return "shared memory; name its file instead";
    if (vma->inode != 0)
        return "a file mapped MAP_PRIVATE, whose pages come partly from the file; map it "
               "MAP_SHARED";
    return "of a kind that can't be migrated";
}

/** check_range() - is all of [@start_addr, @end_addr) private anonymous memory? */
static int check_range(const struct mf_vma *vmas, size_t count, const char *name, const char *who,
                       uint64_t start_addr, uint64_t end_addr, struct mf_error *err)
{
    uint64_t at = start_addr;
    for (size_t i = 0; i < count && at < end_addr; i++) {
        const struct mf_vma *vma = &vmas[i];
        if (vma->end_addr <= at || vma->start_addr > at)
            continue;
        if (!mf_vma_is_private(vma))
            return mf_fail(err, EOPNOTSUPP, "memory '%s' of %s is, at %#llx, %s", name, who,
                           (unsigned long long)at, what_else(vma));
        at = vma->end_addr;
    }
    if (at < end_addr)
        return mf_fail(err, ENOENT,
                       "memory '%s' of %s is not mapped at %#llx: its range must be without gaps",
                       name, who, (unsigned long long)at);
    return 0;
}

static int open_memory(pid_t pid, const char *name, const char *who, uint64_t start_addr,
                       struct mf_error *err)
{
    char path[64];
    uint8_t byte;
    snprintf(path, sizeof(path), "/proc/%d/mem", pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return mf_fail(err, errno,
                       "cannot read the memory '%s' of %s (%s): %s; it needs CAP_SYS_PTRACE, and "
                       "security modules must allow it",
                       name, who, path, strerror(errno));
    /* One byte, so that what forbids it is found now and not when the guest is paused. */
    ssize_t n = pread(fd, &byte, 1, (off_t)start_addr);
    int code = n < 0 ? errno : ESRCH;
    if (n == 1)
        return fd;
    close(fd);
    return mf_fail(err, code, "cannot read the memory '%s' of %s: %s", name, who, strerror(code));
}

static int make_waiting_room(const char *name, uint64_t size_bytes, struct mf_error *err)
{
    int fd = memfd_create("memferry-unconfirmed", MFD_CLOEXEC);
    if (fd >= 0 && ftruncate(fd, (off_t)size_bytes) == 0)
        return fd;
    int code = errno;
    if (fd >= 0)
        close(fd);
    return mf_fail(err, code, "cannot make the file in which pages of '%s' wait: %s", name,
                   strerror(code));
}

int mf_target_private(pid_t pid, const struct mf_vma *vmas, size_t count, const char *name,
                      const char *where, uint64_t size_bytes, bool writable,
                      struct mf_region_source *out, struct mf_error *err)
{
    char process[64], who[96];
    uint64_t start_addr = 0, end_addr = 0;
    const uint64_t page_bytes = (uint64_t)sysconf(_SC_PAGESIZE);
    mf_target_comm(pid, process, sizeof(process));
    snprintf(who, sizeof(who), "%s (pid %d)", process, pid);
    if (strncmp(where, MF_TARGET_ANON, strlen(MF_TARGET_ANON)) == 0)
        where += strlen(MF_TARGET_ANON);
    if (strnlen(name, sizeof(out->name)) == sizeof(out->name))
        return mf_fail(err, ENAMETOOLONG, "the name of memory '%s' is longer than %zu characters",
                       name, sizeof(out->name) - 1);
    if (!parse_range(where, &start_addr, &end_addr) &&
        !named_range(vmas, count, where, &start_addr, &end_addr))
        return mf_fail(err, ENOENT,
                       "%s has no anonymous memory that is named '%s': name it with "
                       "prctl(PR_SET_VMA, PR_SET_VMA_ANON_NAME) (Linux 5.17, "
                       "CONFIG_ANON_VMA_NAME), or give its addresses, " MF_TARGET_ANON "START-END",
                       who, where);
    if (start_addr >= end_addr || start_addr % page_bytes || end_addr % page_bytes)
        return mf_fail(err, EINVAL, "memory '%s': %s is no range of whole pages (%llu bytes each)",
                       name, where, (unsigned long long)page_bytes);
    if (size_bytes && size_bytes != end_addr - start_addr)
        return mf_fail(err, EINVAL, "memory '%s' of %s has %llu bytes, but should have %llu", name,
                       who, (unsigned long long)(end_addr - start_addr),
                       (unsigned long long)size_bytes);
    int rc = check_range(vmas, count, name, who, start_addr, end_addr, err);
    if (rc < 0)
        return rc;
    struct mf_region_source found = {.size_bytes = end_addr - start_addr,
                                     .page_bytes = (uint32_t)page_bytes,
                                     .kind = MF_MEMORY_PRIVATE,
                                     .start_addr = start_addr};
    snprintf(found.name, sizeof(found.name), "%s", name);
    found.fd = writable ? make_waiting_room(name, found.size_bytes, err)
                        : open_memory(pid, name, who, start_addr, err);
    if (found.fd < 0)
        return found.fd;
    *out = found;
    return 0;
}
