/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The pattern of the guest without a system: mix(page, generation), then a stretch of a table of
 * random words from an offset that the mix decides. Written and compared by string instructions: a
 * KVM that can only emulate such a guest handles those many times faster than a loop.
 */
#include "pattern.h"

#define TABLE_WORDS 8192u

static uint64_t table[TABLE_WORDS + PATTERN_WORDS];

void pattern_init(void)
{
    for (uint32_t i = 0; i < TABLE_WORDS + PATTERN_WORDS; i++)
        table[i] = pattern_mix(UINT32_MAX, i);
}

static const uint64_t *stretch(uint64_t mix)
{
    return table + (uint32_t)mix % TABLE_WORDS;
}

void pattern_fill(uint64_t *words, uint32_t page, uint32_t generation)
{
    uint64_t mix = pattern_mix(page, generation);
    const uint64_t *from = stretch(mix);
    uint32_t count = (PATTERN_WORDS - 1) * 2;

    *words++ = mix;
    __asm__ volatile("rep movsl" : "+D"(words), "+S"(from), "+c"(count) : : "memory");
}

int pattern_check(const uint64_t *words, uint32_t page, uint32_t generation,
                  struct pattern_error *error)
{
    uint64_t mix = pattern_mix(page, generation);
    const uint64_t *expected = stretch(mix), *found = words + 1;
    uint32_t count = (PATTERN_WORDS - 1) * 2, index = 0;
    uint8_t equal = 0;

    if (*words != mix) {
        *error = (struct pattern_error){.word = 0, .expected = mix, .found = *words};
        return -1;
    }
    __asm__ volatile("repe cmpsl\n\tsete %3"
                     : "+D"(found), "+S"(expected), "+c"(count), "=q"(equal)
                     :
                     : "memory", "cc");
    if (equal)
        return 0;
    index = ((PATTERN_WORDS - 1) * 2 - count - 1) / 2;
    *error = (struct pattern_error){
        .word = index + 1, .expected = stretch(mix)[index], .found = words[index + 1]};
    return -1;
}
