/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Small things used everywhere: scope cleanup, the clock.
 */
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <stdio.h>
#include <unistd.h>
#include <dirent.h>

static inline void mf_free_p(void *p)
{
    free(*(void **)p);
}
static inline void mf_close_p(const int *fd)
{
    if (*fd >= 0)
        close(*fd);
}
static inline void mf_fclose_p(FILE **f)
{
    if (*f)
        fclose(*f);
}
static inline void mf_closedir_p(DIR **d)
{
    if (*d)
        closedir(*d);
}

#define cleanup_free __attribute__((cleanup(mf_free_p)))
#define cleanup_close __attribute__((cleanup(mf_close_p)))
#define cleanup_fclose __attribute__((cleanup(mf_fclose_p)))
#define cleanup_closedir __attribute__((cleanup(mf_closedir_p)))

/** mf_steal_fd() - take a descriptor out of a cleanup variable, leaving -1 behind. */
static inline int mf_steal_fd(int *fd)
{
    int out = *fd;
    *fd = -1;
    return out;
}

/** mf_now_ns() - CLOCK_MONOTONIC in nanoseconds. */
uint64_t mf_now_ns(void);

/** mf_pages_alloc() - zeroed memory straight from the kernel, for where malloc(3) can't be called:
 * a process that serves its own faults waits inside fork(3), with malloc's locks held, until the
 * event was read. Return: NULL: out of memory. */
void *mf_pages_alloc(size_t length_bytes);
/** mf_pages_free() - @at: of mf_pages_alloc(), or NULL. */
void mf_pages_free(void *at);

/** mf_write_all() - write(2) until all of @length_bytes are out. Return: 0 or -errno. */
int mf_write_all(int fd, const void *data, size_t length_bytes);

/** mf_name_valid() - is @name usable as the name of a session: 1 to 63 characters of
 *  [A-Za-z0-9._-], not starting with '.' or '-'. It becomes part of file names and of the preamble.
 */
int mf_name_valid(const char *name);

#define MF_NAME_MAX 63 /**< longest session name, without the NUL */
