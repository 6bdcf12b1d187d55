/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What the test guests write into their pages: contents that depend on the page's number, its
 * generation and the place within the page, so that any wrong word is found.
 */
#pragma once

#include <stdint.h>

#define GUEST_PAGE_BYTES 4096u
#define PATTERN_WORDS (GUEST_PAGE_BYTES / 8u)

/** struct pattern_error - the first wrong word of a page. */
struct pattern_error {
    uint32_t word; /**< index of a 64-bit word */
    uint64_t expected, found;
};

/** pattern_mix() - 64 bits that depend on every bit of both. */
static inline uint64_t pattern_mix(uint32_t page, uint32_t generation)
{
    uint64_t x = ((uint64_t)page << 32 | generation) + UINT64_C(0x9e3779b97f4a7c15);

    x = (x ^ x >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ x >> 27) * UINT64_C(0x94d049bb133111eb);
    return x ^ x >> 31;
}

/** pattern_init() - once, before the others. */
void pattern_init(void);

/** pattern_fill() - write the whole page at @words (GUEST_PAGE_BYTES). */
void pattern_fill(uint64_t *words, uint32_t page, uint32_t generation);

/** pattern_check() - compare the whole page. Return: 0, or -1 with @error filled. */
int pattern_check(const uint64_t *words, uint32_t page, uint32_t generation,
                  struct pattern_error *error);
