/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/memferry/units.h"

#include <stdio.h>

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
