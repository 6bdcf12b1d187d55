/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib/util.h"

#include <errno.h>
#include <string.h>
#include <time.h>

uint64_t mf_now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

int mf_write_all(int fd, const void *data, size_t length_bytes)
{
    const char *at = data;
    while (length_bytes > 0) {
        ssize_t n = write(fd, at, length_bytes);
        if (n < 0) {
            if (errno == EINTR)
                continue;
            return -errno;
        }
        at += n;
        length_bytes -= (size_t)n;
    }
    return 0;
}

int mf_name_valid(const char *name)
{
    static const char allowed[] =
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-";
    size_t length = strlen(name);
    return length >= 1 && length <= MF_NAME_MAX && name[0] != '.' && name[0] != '-' &&
           strspn(name, allowed) == length;
}
