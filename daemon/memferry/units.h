/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Figures as people write and read them. Pure; each show_*() returns a struct by value that holds
 * the text, so that several fit in one printf: show_bytes(n).text.
 */
#pragma once

#include <stdint.h>

/**
 * rate_parse() - bits per second as people write them: a decimal number, perhaps with a fraction of
 * up to six digits, perhaps with one of k, M, G and T (decimal, in either case) behind it; "none"
 * is 0.
 * @out: written only on success; what is left of a bit is dropped, but what is not 0
 *       does not become 0, which is no limit.
 * Return: 0, -EINVAL (none of that) or -ERANGE (over 2^64).
 */
int rate_parse(const char *text, uint64_t *out);

struct text {
    char text[32];
};

/** show_bytes() - "512 B", "440 MiB", "1.5 GiB": three digits at least, binary units. */
struct text show_bytes(uint64_t bytes);

/** show_bits() - a rate in bits per second: "2.5 Gbit/s", decimal units as rate_parse() reads them.
 */
struct text show_bits(uint64_t bits_s);

/** show_us() - a duration: "180 µs", "43 ms", "3.2 s", "2 min 05 s", "3 h 07 min". */
struct text show_us(double us);

/** show_count() - "1,234,567". */
struct text show_count(uint64_t count);
