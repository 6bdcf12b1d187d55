/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib/util.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

uint64_t mf_now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* In front of what is handed out: its length, so that it is aligned for anything. */
#define HEAD_BYTES 64u

void *mf_pages_alloc(size_t length_bytes)
{
    const size_t all_bytes = length_bytes + HEAD_BYTES;
    char *at = mmap(NULL, all_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED)
        return NULL;
    memcpy(at, &all_bytes, sizeof(all_bytes));
    return at + HEAD_BYTES;
}

void mf_pages_free(void *at)
{
    if (!at)
        return;
    char *head = (char *)at - HEAD_BYTES;
    size_t all_bytes;
    memcpy(&all_bytes, head, sizeof(all_bytes));
    munmap(head, all_bytes);
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
