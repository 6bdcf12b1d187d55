/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The pattern of the Linux guest: word i is mix(page, generation) + i * STEP. */
#include "pattern.h"

#define STEP UINT64_C(0x9e3779b97f4a7c15)

void pattern_init(void)
{
}

void pattern_fill(uint64_t *words, uint32_t page, uint32_t generation)
{
    uint64_t value = pattern_mix(page, generation);

    for (uint32_t i = 0; i < PATTERN_WORDS; i++, value += STEP)
        words[i] = value;
}

int pattern_check(const uint64_t *words, uint32_t page, uint32_t generation,
                  struct pattern_error *error)
{
    const volatile uint64_t *memory = words;
    uint64_t expected = pattern_mix(page, generation);

    for (uint32_t i = 0; i < PATTERN_WORDS; i++, expected += STEP) {
        uint64_t found = memory[i];

        if (found != expected) {
            *error = (struct pattern_error){.word = i, .expected = expected, .found = found};
            return -1;
        }
    }
    return 0;
}
