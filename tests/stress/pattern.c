/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A word of a page is its page's id, its generation and its own number, multiplied by an odd
 * constant: a bijection, so that a word that is wrong tells where it comes from.
 */
#include "tests/stress/stress.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <errno.h>
#include <time.h>

#include "lib/util.h"

#define STEP UINT64_C(0x9e3779b97f4a7c15)
#define STEP_INVERSE UINT64_C(0xf1de83e19937733d) /* STEP * STEP_INVERSE == 1 */
#define WORD_BITS 18u
#define GENERATION_BITS 32u

/* The sanitizers would look at every word; and two threads may look at one page, by design. */
#define PLAIN __attribute__((no_sanitize("thread", "address", "undefined")))

bool starts_as_zeros(uint32_t id)
{
    return id % 3 == 1;
}

static uint64_t first_word(uint32_t id, uint32_t generation)
{
    return ((uint64_t)id << (WORD_BITS + GENERATION_BITS) | (uint64_t)generation << WORD_BITS) *
           STEP;
}

PLAIN void pattern_fill(void *at, uint32_t id, uint32_t generation)
{
    volatile uint64_t *words = at;
    uint64_t word = generation ? first_word(id, generation) : 0;
    const uint64_t step = generation ? STEP : 0;
    for (uint64_t i = 0; i < config.page_bytes / 8; i++, word += step)
        words[i] = word;
}

PLAIN void pattern_touch(const void *at)
{
    (void)*(const volatile uint64_t *)at;
}

PLAIN void pattern_touch_write(void *at)
{
    *(volatile uint64_t *)at = 0;
}

PLAIN bool pattern_is(const void *at, uint32_t id, uint32_t generation)
{
    const volatile uint64_t *words = at;
    uint64_t word = generation ? first_word(id, generation) : 0, wrong = 0;
    const uint64_t step = generation ? STEP : 0;
    for (uint64_t i = 0; i < config.page_bytes / 8; i++, word += step)
        wrong |= words[i] ^ word;
    return wrong == 0;
}

PLAIN bool pattern_is_of(const void *at, uint32_t id)
{
    const volatile uint64_t *words = at;
    for (uint64_t i = 0; i < config.page_bytes / 8; i++) {
        const uint64_t found = words[i], plain = found * STEP_INVERSE;
        if (found && (plain >> (WORD_BITS + GENERATION_BITS) != id ||
                      (plain & ((UINT64_C(1) << WORD_BITS) - 1)) != i))
            return false;
    }
    return true;
}

PLAIN void pattern_tell(const void *at, uint32_t id, uint32_t generation, uint32_t next,
                        const char *when)
{
    const volatile uint64_t *words = at;
    uint64_t wrong = 0, first = UINT64_MAX, value = 0;
    for (uint64_t i = 0; i < config.page_bytes / 8; i++) {
        const uint64_t found = words[i];
        if (found == (generation ? first_word(id, generation) + i * STEP : 0))
            continue;
        wrong++;
        if (first == UINT64_MAX) {
            first = i;
            value = found;
        }
    }
    const uint64_t plain = value * STEP_INVERSE;
    char text[512];
    int length;
    if (first == UINT64_MAX)
        length = snprintf(text, sizeof(text), "WRONG page %u at %p (%s): it has become right\n", id,
                          at, when);
    else
        length = snprintf(
            text, sizeof(text),
            "WRONG page %u at %p (%s): generation %u (or %u) expected; %llu words differ, the "
            "first is %llu: %#llx, which is page %llu generation %u word %llu\n",
            id, at, when, generation, next, (unsigned long long)wrong, (unsigned long long)first,
            (unsigned long long)value, (unsigned long long)(plain >> (WORD_BITS + GENERATION_BITS)),
            (uint32_t)(plain >> WORD_BITS),
            (unsigned long long)(plain & ((UINT64_C(1) << WORD_BITS) - 1)));
    /* Children of fork(2) come here too. */
    mf_write_all(STDERR_FILENO, text, (size_t)length);
}

uint64_t draw(uint64_t *state, uint64_t limit)
{
    uint64_t z = (*state += STEP);
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return (z ^ (z >> 31)) % limit;
}

void need_that(bool condition, const char *what, const char *file, int line)
{
    if (condition)
        return;
    char text[512];
    int length = snprintf(text, sizeof(text), "%s:%d: not so: %s (errno: %s; library: %s)\n", file,
                          line, what, strerrorname_np(errno), memferry_why());
    mf_write_all(STDERR_FILENO, text, (size_t)length);
    atomic_store(&shared->stop, true);
    _exit(3);
}

void nap_us(unsigned us)
{
    nanosleep(&(struct timespec){.tv_sec = us / 1000000, .tv_nsec = (long)(us % 1000000) * 1000},
              NULL);
}

unsigned open_descriptors(void)
{
    cleanup_closedir DIR *list = opendir("/proc/self/fd");
    unsigned count = 0;
    while (list && readdir(list))
        count++;
    return count;
}
