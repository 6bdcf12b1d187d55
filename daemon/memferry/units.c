/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/memferry/units.h"

#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

static bool is_digit(char c)
{
    return c >= '0' && c <= '9';
}

/* The factor of a suffix, or 0. */
static uint64_t suffix_factor(const char *suffix)
{
    static const char suffixes[] = "kKmMgGtT";
    if (!suffix[0])
        return 1;
    const char *at = strchr(suffixes, suffix[0]);
    if (!at || suffix[1])
        return 0;
    uint64_t factor = 1000;
    for (ptrdiff_t i = (at - suffixes) / 2; i > 0; i--)
        factor *= 1000;
    return factor;
}

int rate_parse(const char *text, uint64_t *out)
{
    if (strcmp(text, "none") == 0) {
        *out = 0;
        return 0;
    }
    if (!is_digit(*text))
        return -EINVAL;
    const unsigned most_places = 6;
    uint64_t whole = 0, fraction = 0, scale = 1;
    bool too_large = false;
    for (; is_digit(*text); text++)
        too_large |= __builtin_mul_overflow(whole, 10u, &whole) ||
                     __builtin_add_overflow(whole, (uint64_t)(*text - '0'), &whole);
    if (*text == '.') {
        const char *places = ++text;
        for (; is_digit(*text); text++, scale *= 10) {
            if (text - places == most_places)
                return -EINVAL;
            fraction = fraction * 10 + (uint64_t)(*text - '0');
        }
        if (text == places)
            return -EINVAL;
    }
    uint64_t factor = suffix_factor(text);
    if (!factor)
        return -EINVAL;
    /* Six places of 10^12 stay below 2^64. */
    if (too_large || __builtin_mul_overflow(whole, factor, &whole) ||
        __builtin_add_overflow(whole, fraction * factor / scale, &whole))
        return -ERANGE;
    *out = whole == 0 && fraction ? 1 : whole;
    return 0;
}

struct text show_bits(uint64_t bits_s)
{
    static const char *const units[] = {"bit/s",  "kbit/s", "Mbit/s", "Gbit/s",
                                        "Tbit/s", "Pbit/s", "Ebit/s"};
    struct text out;
    double value = (double)bits_s;
    unsigned unit = 0;
    while (value >= 999.5) {
        value /= 1000;
        unit++;
    }
    snprintf(out.text, sizeof(out.text), unit && value < 9.95 ? "%.1f %s" : "%.0f %s", value,
             units[unit]);
    return out;
}

struct text show_bytes(uint64_t bytes)
{
    static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
    struct text out;
    double value = (double)bytes;
    unsigned unit = 0;
    /* 1023.5 would be printed as 1024. */
    while (value >= 1023.5) {
        value /= 1024;
        unit++;
    }
    snprintf(out.text, sizeof(out.text), unit && value < 9.95 ? "%.1f %s" : "%.0f %s", value,
             units[unit]);
    return out;
}

struct text show_us(double us)
{
    struct text out;
    if (us < 999.5) {
        snprintf(out.text, sizeof(out.text), "%.0f µs", us);
    } else if (us < 999500) {
        snprintf(out.text, sizeof(out.text), us < 9950 ? "%.1f ms" : "%.0f ms", us / 1e3);
    } else if (us < 59.95e6) {
        snprintf(out.text, sizeof(out.text), "%.1f s", us / 1e6);
    } else {
        uint64_t seconds = (uint64_t)(us / 1e6 + 0.5);
        if (seconds < 3600)
            snprintf(out.text, sizeof(out.text), "%u min %02u s", (unsigned)(seconds / 60),
                     (unsigned)(seconds % 60));
        else
            snprintf(out.text, sizeof(out.text), "%llu h %02u min",
                     (unsigned long long)(seconds / 3600), (unsigned)(seconds % 3600 / 60));
    }
    return out;
}

struct text show_count(uint64_t count)
{
    struct text out = {""};
    char digits[24];
    int length = snprintf(digits, sizeof(digits), "%llu", (unsigned long long)count);
    char *at = out.text;
    for (int i = 0; i < length; i++) {
        if (i && (length - i) % 3 == 0)
            *at++ = ',';
        *at++ = digits[i];
    }
    *at = '\0';
    return out;
}
