/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib/pagemap.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "lib/uapi.h"

#define REGIONS_A_CALL 128u

int mf_pagemap_open(int pid, struct mf_error *err)
{
    char path[64];
    snprintf(path, sizeof(path), "/proc/%d/pagemap", pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return mf_fail(err, errno, "cannot open %s: %s", path, strerror(errno));
    return fd;
}

int mf_pagemap_scan(int pagemap_fd, uint64_t start_addr, uint64_t length_bytes, uint64_t page_bytes,
                    uint8_t *pages)
{
    struct page_region found[REGIONS_A_CALL];
    const uint64_t end = start_addr + length_bytes;
    uint64_t at = start_addr;
    memset(pages, MF_PAGEMAP_WRITTEN, length_bytes / page_bytes);
    while (at < end) {
        struct pm_scan_arg scan = {
            .size = sizeof(scan),
            .flags = PM_SCAN_CHECK_WPASYNC,
            .start = at,
            .end = end,
            .vec = (uint64_t)(uintptr_t)found,
            .vec_len = REGIONS_A_CALL,
            /* A protected page that is not mapped any more has a marker, which counts as swapped.
             */
            .category_anyof_mask = PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            .return_mask = PAGE_IS_WRITTEN | PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
        };
        long count = ioctl(pagemap_fd, PAGEMAP_SCAN, &scan);
        if (count < 0)
            return -errno;
        for (long i = 0; i < count; i++) {
            /* Only pages that lie in it as a whole. */
            uint64_t first = (found[i].start - start_addr + page_bytes - 1) / page_bytes;
            uint64_t last = (found[i].end - start_addr) / page_bytes;
            const uint8_t bits =
                (uint8_t)((found[i].categories & PAGE_IS_WRITTEN ? MF_PAGEMAP_WRITTEN : 0) |
                          (found[i].categories & PAGE_IS_PRESENT ? MF_PAGEMAP_PRESENT : 0));
            for (uint64_t page = first; page < last; page++)
                pages[page] = bits;
        }
        if (scan.walk_end <= at)
            return -EIO;
        at = scan.walk_end;
    }
    return 0;
}
