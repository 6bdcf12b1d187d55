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

static int find_in_text(int maps_fd, uint64_t addr, struct mf_vma *out)
{
    char text[TEXT_BYTES + 1];
    size_t have = 0;
    off_t at = 0;
    for (;;) {
        ssize_t n = pread(maps_fd, text + have, TEXT_BYTES - have, at);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -errno;
        if (n == 0)
            return at == 0 ? -ESRCH : -ENOENT;
        at += n;
        have += (size_t)n;
        text[have] = '\0';
        char *line = text;
        for (char *end; (end = strchr(line, '\n')); line = end + 1) {
            *end = '\0';
            if (mf_vma_parse(line, out) < 0)
                return -EPROTO;
            if (out->end_addr > addr)
                return 0;
        }
        have = (size_t)(text + have - line);
        if (have == TEXT_BYTES)
            return -EPROTO;
        memmove(text, line, have);
    }
}

int mf_vma_find(int maps_fd, uint64_t addr, struct mf_vma *out)
{
    static atomic_bool no_ioctl; /* an old kernel stays one */
    if (!atomic_load_explicit(&no_ioctl, memory_order_relaxed)) {
        int r = find_by_ioctl(maps_fd, addr, out);
        /* EPERM: a system-call filter from before this call. */
        if (r != -ENOTTY && r != -EINVAL && r != -EPERM && r != -EOPNOTSUPP)
            return r;
        atomic_store_explicit(&no_ioctl, true, memory_order_relaxed);
    }
    return find_in_text(maps_fd, addr, out);
}
