/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What the tests of kernel facts share: a RAM file mapped twice, once as the guest sees it and once
 * as the mover does, and threads that touch it. Everything fails the running cmocka test on
 * trouble.
 */
#pragma once

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "lib/uapi.h"

#define BOTH_MODES (UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR)

/** struct area - @pages of a file, mapped at @guest and at @second. */
struct area {
    int file, uffd;
    size_t page_bytes, pages, length_bytes;
    char *guest;  /**< watched by uffd once area_register() was called */
    char *second; /**< never watched */
};

enum area_kind { AREA_SHMEM, AREA_HUGETLB };

/** area_make() - all holes; a fresh userfaultfd with the features memferry asks for, nothing
 * registered. */
void area_make(struct area *area, enum area_kind kind, size_t pages);
/** area_make_with() - the same, its userfaultfd with exactly @features (UFFD_FEATURE_...). */
void area_make_with(struct area *area, enum area_kind kind, size_t pages, uint64_t features);
void area_register(const struct area *area, uint64_t modes);
/** area_register_pages() - only @pages from @first on; the errno. */
int area_register_pages(const struct area *area, size_t first, size_t pages, uint64_t modes);
/** range_register() - any memory; the errno. */
int range_register(int uffd, const void *at, size_t length_bytes, uint64_t modes);
/** map_at() - MAP_FIXED at @at, readable and writable; fails the test on trouble.
 *  @file: or -1 with MAP_ANONYMOUS in @flags. */
void map_at(void *at, size_t length_bytes, int flags, int file);
void area_free(struct area *area);

/** page_of() - the address of page @index in the guest's mapping. */
static inline char *page_of(const struct area *area, size_t index)
{
    return area->guest + index * area->page_bytes;
}

/** put() - bytes into page @index, by way of the second mapping: present, but not mapped for the
 * guest. */
void put(const struct area *area, size_t index, char value);

/** struct actor - a thread that does one thing to memory and says when it is through. */
struct actor {
    enum { ACT_READ, ACT_WRITE, ACT_REMOVE, ACT_DONTNEED, ACT_UNMAP, ACT_REMAP, ACT_CALL } act;
    char *at;
    size_t length_bytes;
    char *to;   /**< ACT_REMAP: the new address */
    char value; /**< ACT_READ: what was read */
    long rc;    /**< of the system call, -1 with its errno in code */
    int code;
    long (*call)(struct actor *actor); /**< ACT_CALL: a system call of its own kind */
    void *context;                     /**< ACT_CALL: whatever it wants */
    atomic_bool through;
    pthread_t thread;
};

void actor_start(struct actor *actor);
/** actor_finish() - wait until it is through; fails the test after 20 s, as nobody may be left
 * waiting. */
void actor_finish(struct actor *actor);
/** actor_waits() - true if it is still not through after a grace of 50 ms. */
bool actor_waits(const struct actor *actor);

/** await_through() - until it is through, without joining it; fails as actor_finish(). */
void await_through(const struct actor *actor);

/** next_message() - the next message of @uffd; fails the test if none comes within 20 s. */
struct uffd_msg next_message(int uffd);
/** no_message() - true if nothing can be read now. */
bool no_message(int uffd);
/** await_pending() - until @count faults are queued and unread: /proc/self/fdinfo. */
void await_pending(int uffd, unsigned count);
/** await_readable() - until poll(2) says so. */
void await_readable(int uffd);

/** ioctl_errno() - ioctl(2): 0 or the errno it failed with. */
int ioctl_errno(int fd, unsigned long request, void *argument);

/** continue_pages() - UFFDIO_CONTINUE; returns errno or 0; *@result is its result field, preset to
 * 12345. */
int continue_pages(const struct area *area, size_t first, size_t pages, int64_t *result);

/** huge_pages_reserve() - have @count free huge pages of the default size; put back at exit.
 *  Return: false, with a line on stderr, where the machine has not got them. */
bool huge_pages_reserve(unsigned count);
