/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib/pagemap.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
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

/* Have @found called for every stretch that the kernel reports; see PAGEMAP_SCAN. */
static int walk(int pagemap_fd, struct pm_scan_arg scan, uint64_t page_bytes, uint8_t *pages,
                uint8_t (*bits_of)(uint64_t categories))
{
    struct page_region found[REGIONS_A_CALL];
    const uint64_t start_addr = scan.start;
    scan.size = sizeof(scan);
    scan.vec = (uint64_t)(uintptr_t)found;
    scan.vec_len = REGIONS_A_CALL;
    while (scan.start < scan.end) {
        long count = ioctl(pagemap_fd, PAGEMAP_SCAN, &scan);
        if (count < 0)
            return -errno;
        for (long i = 0; i < count; i++) {
            /* Only pages that lie in it as a whole. */
            uint64_t first = (found[i].start - start_addr + page_bytes - 1) / page_bytes;
            uint64_t last = (found[i].end - start_addr) / page_bytes;
            for (uint64_t page = first; page < last; page++)
                pages[page] = bits_of(found[i].categories);
        }
        if (scan.walk_end <= scan.start)
            return -EIO;
        scan.start = scan.walk_end;
    }
    return 0;
}

static uint8_t as_found(uint64_t categories)
{
    return (uint8_t)((categories & PAGE_IS_WRITTEN ? MF_PAGEMAP_WRITTEN : 0) |
                     (categories & PAGE_IS_PRESENT ? MF_PAGEMAP_PRESENT : 0));
}

int mf_pagemap_scan(int pagemap_fd, uint64_t start_addr, uint64_t length_bytes, uint64_t page_bytes,
                    uint8_t *pages)
{
    memset(pages, MF_PAGEMAP_WRITTEN, length_bytes / page_bytes);
    return walk(pagemap_fd,
                (struct pm_scan_arg){
                    .flags = PM_SCAN_CHECK_WPASYNC,
                    .start = start_addr,
                    .end = start_addr + length_bytes,
                    /* A protected page that is not mapped any more has a marker, which counts as
                     * swapped. */
                    .category_anyof_mask = PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
                    .return_mask = PAGE_IS_WRITTEN | PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
                },
                page_bytes, pages, as_found);
}

int mf_pagemap_protect(int pagemap_fd, uint64_t start_addr, uint64_t length_bytes,
                       uint64_t page_bytes, uint8_t *pages)
{
    memset(pages, 0, length_bytes / page_bytes);
    return walk(pagemap_fd,
                (struct pm_scan_arg){
                    .flags = PM_SCAN_CHECK_WPASYNC | PM_SCAN_WP_MATCHING,
                    .start = start_addr,
                    .end = start_addr + length_bytes,
                    .category_mask = PAGE_IS_WRITTEN | PAGE_IS_PRESENT,
                    .return_mask = PAGE_IS_WRITTEN | PAGE_IS_PRESENT,
                },
                page_bytes, pages, as_found);
}

/* Linux before 6.7: a word a page, Documentation/admin-guide/mm/pagemap.rst. The page of zeros
 * can't be told from others. */
static int read_words(int pagemap_fd, uint64_t start_addr, uint64_t length_bytes,
                      uint64_t page_bytes, uint8_t *pages)
{
    static const uint64_t present = UINT64_C(1) << 63, swapped = UINT64_C(1) << 62;
    const uint64_t small_bytes = (uint64_t)sysconf(_SC_PAGESIZE);
    uint64_t word[512];
    for (uint64_t at = 0; at < length_bytes;) {
        uint64_t want = (length_bytes - at) / small_bytes;
        if (want > sizeof(word) / sizeof(word[0]))
            want = sizeof(word) / sizeof(word[0]);
        ssize_t n = pread(pagemap_fd, word, want * sizeof(word[0]),
                          (off_t)((start_addr + at) / small_bytes * sizeof(word[0])));
        if (n < (ssize_t)sizeof(word[0]))
            return n < 0 ? -errno : -ESRCH;
        for (size_t i = 0; i < (size_t)n / sizeof(word[0]); i++, at += small_bytes)
            if (word[i] & (present | swapped))
                pages[at / page_bytes] = MF_PAGEMAP_PRESENT;
    }
    return 0;
}

/** is_alive() - has the address space any users left? PAGEMAP_SCAN finds nothing in one that is
 * gone, without an error on some kernels (seen on Linux 6.12 and 7.2); a read ends there on all. */
static bool is_alive(int pagemap_fd, uint64_t addr)
{
    const uint64_t small_bytes = (uint64_t)sysconf(_SC_PAGESIZE);
    uint64_t word;
    return pread(pagemap_fd, &word, sizeof(word), (off_t)(addr / small_bytes * sizeof(word))) ==
           (ssize_t)sizeof(word);
}

int mf_pagemap_populated(int pagemap_fd, uint64_t start_addr, uint64_t length_bytes,
                         uint64_t page_bytes, uint8_t *pages)
{
    struct page_region found[REGIONS_A_CALL];
    const uint64_t end = start_addr + length_bytes;
    memset(pages, 0, length_bytes / page_bytes);
    for (uint64_t at = start_addr; at < end;) {
        struct pm_scan_arg scan = {
            .size = sizeof(scan),
            .start = at,
            .end = end,
            .vec = (uint64_t)(uintptr_t)found,
            .vec_len = REGIONS_A_CALL,
            .category_anyof_mask = PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            .return_mask = PAGE_IS_PRESENT | PAGE_IS_SWAPPED | PAGE_IS_PFNZERO,
        };
        long count = ioctl(pagemap_fd, PAGEMAP_SCAN, &scan);
        if (count < 0 && (errno == ENOTTY || errno == EINVAL))
            return read_words(pagemap_fd, start_addr, length_bytes, page_bytes, pages);
        if (count < 0)
            return -errno;
        for (long i = 0; i < count; i++) {
            /* The huge page of zeros has no pages of its own either. */
            if (found[i].categories & PAGE_IS_PFNZERO)
                continue;
            uint64_t first = (found[i].start - start_addr) / page_bytes;
            uint64_t last = (found[i].end - start_addr + page_bytes - 1) / page_bytes;
            memset(pages + first, MF_PAGEMAP_PRESENT, last - first);
        }
        if (scan.walk_end <= at)
            return -EIO;
        at = scan.walk_end;
    }
    return is_alive(pagemap_fd, start_addr) ? 0 : -ESRCH;
}
