/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Figures as people read them. Pure; each returns a struct by value that holds the text, so that
 * several fit in one printf: show_bytes(n).text.
 */
#pragma once

#include <stdint.h>

struct text {
    char text[32];
};

/** show_bytes() - "512 B", "440 MiB", "1.5 GiB": three digits at least, binary units. */
struct text show_bytes(uint64_t bytes);

/** show_us() - a duration: "180 µs", "43 ms", "3.2 s", "2 min 05 s", "3 h 07 min". */
struct text show_us(double us);

/** show_count() - "1,234,567". */
struct text show_count(uint64_t count);
