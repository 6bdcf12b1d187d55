/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A region: one backing object of a target's memory, as this process uses it. A page is (region,
 * index), never an address.
 */
#pragma once

#include <stdint.h>
#include <sys/types.h>

#include "lib/target.h"

/** struct mf_region - its owner closes @fd and unmaps @map. */
struct mf_region {
    char name[64];
    uint64_t size_bytes, pages;
    uint32_t page_bytes;
    enum mf_memory_kind kind;
    int fd;       /**< -1: memory without a file */
    dev_t device; /**< of the file, as /proc/PID/maps has it */
    ino_t inode;
    uint8_t *map; /**< the second mapping: read-only at the source */
};
