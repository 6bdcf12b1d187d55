/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What test_exact and the process it serves, shifter, have in common: a page of shared memory, and
 * the contents that pages must have. */
#pragma once

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#define PAGE 4096u
#define THREADS_MAX 6u
#define PAGES_MAX 4096u

/** What a page must hold: what it came with, zeros, or what was written, the number of the write.
 */
#define ORIGINAL 0u
#define ZEROS UINT32_MAX

struct shared {
    /* set by the test */
    uint64_t seed;
    unsigned threads, pages; /**< one region a thread, of so many pages */
    int region_fd[THREADS_MAX];
    _Atomic bool armed, stop;
    bool forks, discards;
    /* set by the shifter */
    _Atomic int uffd; /**< its number there, plus one */
    _Atomic bool failed;
    char failure[512];
    _Atomic uint64_t looked[THREADS_MAX]; /**< pages that were verified */
    _Atomic uint64_t changes, forked, moved, grown_in_place;
    _Atomic uint64_t longest_ns; /**< a page took, from the touch to its bytes */
    uint32_t expected[THREADS_MAX][PAGES_MAX];
};

static inline uint64_t mix(uint64_t x)
{
    x += UINT64_C(0x9e3779b97f4a7c15);
    x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
    return x ^ (x >> 31);
}

/** came_as_zeros() - does the source send this page as one of zeros? */
static inline bool came_as_zeros(uint64_t seed, unsigned region, uint64_t page)
{
    return mix(seed ^ ((uint64_t)region << 40 | page)) % 8 == 0;
}

/** word() - the @index-th word of a page after its @write-th write (ORIGINAL: as it came). */
static inline uint64_t word(uint64_t seed, unsigned region, uint64_t page, uint32_t write,
                            unsigned index)
{
    if (write == ZEROS || (write == ORIGINAL && came_as_zeros(seed, region, page)))
        return 0;
    /* The page's name in clear, for whoever finds it in the wrong place. */
    return index == 0
               ? (UINT64_C(0xa) << 60 | (uint64_t)region << 52 | (uint64_t)write << 20 | page)
               : mix(seed ^ ((uint64_t)region << 56 | (uint64_t)write << 30 | page << 10 | index));
}
