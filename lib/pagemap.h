/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Which pages of a target were written since they were last write-protected: PAGEMAP_SCAN
 * (Linux 6.7, Documentation/admin-guide/mm/pagemap.rst) over mappings that a userfaultfd with
 * WP_ASYNC watches.
 *
 * What it does not see is in doc/kernel.md: writes through other mappings and processes, I/O into
 * pages that were pinned before, and that a punched page now reads as zeros.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "lib/error.h"

/** mf_pagemap_open() - /proc/PID/pagemap for scanning. Return: a descriptor (the caller's) or
 * -errno. */
int mf_pagemap_open(int pid, struct mf_error *err);

#define MF_PAGEMAP_WRITTEN 0x01u /**< since it was last protected, or never protected */
#define MF_PAGEMAP_PRESENT 0x02u /**< mapped by the target, so certainly no hole of the file */

/**
 * mf_pagemap_populated() - which pages of private anonymous memory hold anything: neither never
 * touched nor the shared page of zeros. Such a page must not even be read, for reading makes the
 * kernel build page tables for it. What is in swap holds something.
 * @pages: one byte a page; overwritten with MF_PAGEMAP_PRESENT or 0.
 * Works with or without PAGEMAP_SCAN, watched or not. Where it is in doubt it says PRESENT.
 * Return: 0 or -errno (-ESRCH: the process is gone, or has replaced itself by exec(2)); @pages then
 * says nothing. Thread-safe.
 */
int mf_pagemap_populated(int pagemap_fd, uint64_t start_addr, uint64_t length_bytes,
                         uint64_t page_bytes, uint8_t *pages);

/**
 * mf_pagemap_scan() - what is so of the pages of [@start_addr, +@length_bytes).
 * @page_bytes: of the region.
 * @pages:      one byte a page; overwritten with MF_PAGEMAP_… bits.
 * A page is "not written" only where the kernel says so of all of it; whatever it is silent about
 * (unmapped, never touched) counts as written. Return: 0 or -errno (-ESRCH: the process is gone;
 * -EPERM: a part is not watched); @pages then says nothing. Thread-safe.
 */
int mf_pagemap_scan(int pagemap_fd, uint64_t start_addr, uint64_t length_bytes, uint64_t page_bytes,
                    uint8_t *pages);

/**
 * mf_pagemap_protect() - find the written pages of [@start_addr, +@length_bytes) and write-protect
 * them in the same step: nothing written in between is missed. One call where UFFDIO_WRITEPROTECT
 * would take one for every run, each with its interrupts to the processors the target runs on. Its
 * price: KVM drops its mappings of the whole range, so it is for ranges with many runs.
 * @pages: one byte a page; set to MF_PAGEMAP_WRITTEN | MF_PAGEMAP_PRESENT where a page was written
 *         and is protected now, else to 0 (clean, or not mapped and so not protected either).
 * Return: 0 or -errno as mf_pagemap_scan(); then some may be protected that @pages does not tell.
 */
int mf_pagemap_protect(int pagemap_fd, uint64_t start_addr, uint64_t length_bytes,
                       uint64_t page_bytes, uint8_t *pages);
