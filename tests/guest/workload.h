/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What the test guests do: fill memory with a pattern that betrays any wrong word, rewrite and
 * check whole pages for ever, print heartbeats, obey commands. The same code runs as the init of a
 * Linux guest (linux_guest.c) and without any system under KVM (bare_guest.c), so it uses no
 * library and no 64-bit division.
 *
 * Output, one line each:
 *   READY                              waits for `start`
 *   FILLED pages=N                     every page was filled
 *   h BEAT WRITES CHECKS               heartbeat, three hexadecimal counters that only grow
 *   WRONG page=N word=N generation=N expected=HEX found=HEX
 *   VERIFIED pages=N wrong=N           answer to `verify`
 *   QUIET / MODE / STATS ... / BYE     answers to the other commands
 * Commands, one line each:
 *   start MIB MODE RATE   fill MIB mebibytes, then work; MODE: idle, hot, random, sequential,
 *                         zeroes (pages change between the pattern and zeros);
 *                         RATE: pages rewritten a second, 0 as many as go
 *   mode MODE RATE        from now on
 *   quiet                 stop rewriting and checking, only heartbeats
 *   verify                check every page wholly
 *   stats                 counters in decimal
 *   poweroff
 */
#pragma once

#include <stdint.h>

#define GUEST_BEAT_US 5000u

/** struct guest_platform - what the workload runs on. All functions run on the only thread. */
struct guest_platform {
    uint32_t ticks_per_ms;                        /**< of ticks() */
    uint64_t (*ticks)(void);                      /**< monotonic, stands still while paused */
    void (*put)(const char *text, uint32_t size); /**< to the host, unbuffered */
    int (*get)(void);                             /**< next byte from the host, or -1 */
    void (*idle)(uint64_t until_ticks);           /**< nothing to do until then */
    void *(*memory)(uint32_t pages);              /**< room for that many pages, or null */
    uint32_t *(*generations)(uint32_t pages);     /**< zeroed room for that many counters */
    void (*discard)(void *page); /**< give a page back, it reads as zeros; or null */
    void (*poweroff)(void) __attribute__((noreturn));
};

/** workload_run() - obey commands until `poweroff`. Does not return. */
void workload_run(const struct guest_platform *platform) __attribute__((noreturn));
