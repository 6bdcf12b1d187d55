/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib/vma.h"

#include <errno.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "lib/uapi.h"

/* Lines have at most 73 columns before the path, and that ends with a newline (PATH_MAX). */
#define TEXT_BYTES 8192u

static int find_by_ioctl(int maps_fd, uint64_t addr, struct mf_vma *out)
{
    struct procmap_query query = {.size = sizeof(query),
                                  .query_flags = PROCMAP_QUERY_COVERING_OR_NEXT_VMA,
                                  .query_addr = addr};
    if (ioctl(maps_fd, PROCMAP_QUERY, &query) != 0)
        return -errno;
    *out = (struct mf_vma){.start_addr = query.vma_start,
                           .end_addr = query.vma_end,
                           .offset_bytes = query.vma_offset,
                           .readable = query.vma_flags & PROCMAP_QUERY_VMA_READABLE,
                           .writable = query.vma_flags & PROCMAP_QUERY_VMA_WRITABLE,
                           .executable = query.vma_flags & PROCMAP_QUERY_VMA_EXECUTABLE,
                           .shared = query.vma_flags & PROCMAP_QUERY_VMA_SHARED,
                           .device = makedev(query.dev_major, query.dev_minor),
                           .inode = query.inode};
    return 0;
}

/* The lines of the text, until @each returns something else than 0. */
static int each_in_text(int maps_fd, int (*each)(void *arg, const struct mf_vma *vma), void *arg)
{
    char text[TEXT_BYTES + 1];
    struct mf_vma vma;
    size_t have = 0;
    off_t at = 0;
    for (;;) {
        ssize_t n = pread(maps_fd, text + have, TEXT_BYTES - have, at);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -errno;
        if (n == 0)
            return at == 0 ? -ESRCH : 0;
        at += n;
        have += (size_t)n;
        text[have] = '\0';
        char *line = text;
        for (char *end; (end = strchr(line, '\n')); line = end + 1) {
            *end = '\0';
            if (mf_vma_parse(line, &vma) < 0)
                return -EPROTO;
            int r = each(arg, &vma);
            if (r != 0)
                return r;
        }
        have = (size_t)(text + have - line);
        if (have == TEXT_BYTES)
            return -EPROTO;
        memmove(text, line, have);
    }
}

struct wanted {
    uint64_t addr;
    struct mf_vma *out;
};

static int ends_behind(void *arg, const struct mf_vma *vma)
{
    const struct wanted *wanted = arg;
    if (vma->end_addr <= wanted->addr)
        return 0;
    *wanted->out = *vma;
    return 1;
}

static int find_in_text(int maps_fd, uint64_t addr, struct mf_vma *out)
{
    struct wanted wanted = {addr, out};
    int r = each_in_text(maps_fd, ends_behind, &wanted);
    return r == 0 ? -ENOENT : r < 0 ? r : 0;
}

/* Return: is there such an ioctl? With what came of it in @r. */
static bool try_ioctl(int maps_fd, uint64_t addr, struct mf_vma *out, int *r)
{
    static atomic_bool no_ioctl; /* an old kernel stays one */
    if (atomic_load_explicit(&no_ioctl, memory_order_relaxed))
        return false;
    *r = find_by_ioctl(maps_fd, addr, out);
    /* EPERM: a system-call filter from before this call. */
    if (*r != -ENOTTY && *r != -EINVAL && *r != -EPERM && *r != -EOPNOTSUPP)
        return true;
    atomic_store_explicit(&no_ioctl, true, memory_order_relaxed);
    return false;
}

int mf_vma_find(int maps_fd, uint64_t addr, struct mf_vma *out)
{
    int r;
    return try_ioctl(maps_fd, addr, out, &r) ? r : find_in_text(maps_fd, addr, out);
}

int mf_vma_each(int maps_fd, int (*each)(void *arg, const struct mf_vma *vma), void *arg)
{
    struct mf_vma vma;
    int r = 0;
    for (uint64_t at = 0; try_ioctl(maps_fd, at, &vma, &r); at = vma.end_addr) {
        if (r == 0)
            r = each(arg, &vma);
        if (r != 0)
            return r == -ENOENT ? 0 : r;
    }
    return each_in_text(maps_fd, each, arg);
}
