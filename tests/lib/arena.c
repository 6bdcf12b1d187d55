/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "tests/lib/arena.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#include "tests/kernel/area.h"

#define PATIENCE_S 20

void must_be(bool condition, const char *what, const char *file, int line)
{
    if (condition)
        return;
    fprintf(stderr, "%s:%d: not so: %s (%s)\n", file, line, what, memferry_why());
    exit(1); /* gives back the huge pages */
}

enum memferry_memory arena_memory(int argc, char **argv, unsigned huge_pages)
{
    const char *name = argc > 1 ? argv[1] : "shmem";
    if (strcmp(name, "anonymous") == 0)
        return MEMFERRY_ANONYMOUS;
    if (strcmp(name, "hugetlb") != 0)
        return MEMFERRY_SHMEM;
    if (!huge_pages_reserve(huge_pages))
        exit(77);
    return MEMFERRY_HUGETLB;
}

void arena_map(struct arena *a, enum memferry_memory memory, uint64_t pages)
{
    const bool huge = memory == MEMFERRY_HUGETLB, anonymous = memory == MEMFERRY_ANONYMOUS;
    *a = (struct arena){.memory = memory, .fd = -1, .pages = huge && pages > 8 ? 8 : pages};
    a->page_bytes = (uint64_t)sysconf(_SC_PAGESIZE);
    if (!anonymous) {
        struct stat st;
        a->fd = memfd_create("memferry-test", MFD_CLOEXEC | (huge ? MFD_HUGETLB : 0));
        must(a->fd >= 0 && fstat(a->fd, &st) == 0);
        if (huge)
            a->page_bytes = (uint64_t)st.st_blksize;
        must(ftruncate(a->fd, (off_t)(a->pages * a->page_bytes)) == 0);
    }
    a->length_bytes = a->pages * a->page_bytes;
    a->at = mmap(NULL, a->length_bytes, PROT_READ | PROT_WRITE,
                 anonymous ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED, a->fd, 0);
    must(a->at != MAP_FAILED);
}

void arena_watch(struct arena *a)
{
    a->context = memferry_context_open(a->server);
    must(a->context >= 0);
    int region = memferry_region_add(
        a->server, &(struct memferry_region){.struct_bytes = sizeof(struct memferry_region),
                                             .memory = a->memory,
                                             .length_bytes = a->length_bytes,
                                             .fd = a->fd});
    must(region >= 0);
    a->region = (uint32_t)region;
    must(memferry_mapping_add(
             a->server, &(struct memferry_mapping){.struct_bytes = sizeof(struct memferry_mapping),
                                                   .context = (uint32_t)a->context,
                                                   .region = a->region,
                                                   .start_addr = (uintptr_t)a->at,
                                                   .length_bytes = a->length_bytes}) == 0);
}

void arena_make(struct arena *a, enum memferry_memory memory, uint64_t pages,
                const struct memferry_server_options *options,
                const struct memferry_provider *provider)
{
    arena_map(a, memory, pages);
    must(memferry_server_new(options, &a->server) == 0);
    if (provider)
        must(memferry_server_set_provider(a->server, provider) == 0);
    arena_watch(a);
}

void arena_free(struct arena *a)
{
    must(memferry_server_free(a->server, MEMFERRY_END_ZEROS) == 0);
    if (a->at)
        munmap(a->at, a->length_bytes);
    if (a->fd >= 0)
        close(a->fd);
}

uint64_t page_word(uint64_t page, uint64_t word, uint64_t generation)
{
    return ((page << 24 | word << 4) * UINT64_C(0x9e3779b97f4a7c15) + generation * 2) | 1;
}

void page_make(void *to, uint64_t page_bytes, uint64_t page, uint64_t generation)
{
    uint64_t *words = to;
    for (uint64_t i = 0; i < page_bytes / 8; i++)
        words[i] = page_word(page, i, generation);
}

bool page_is(const void *at, uint64_t page_bytes, uint64_t page, uint64_t generation)
{
    const volatile uint64_t *words = at;
    for (uint64_t i = 0; i < page_bytes / 8; i++)
        if (words[i] != page_word(page, i, generation))
            return false;
    return true;
}

bool page_is_zero(const void *at, uint64_t page_bytes)
{
    const volatile uint64_t *words = at;
    for (uint64_t i = 0; i < page_bytes / 8; i++)
        if (words[i])
            return false;
    return true;
}

uint64_t random_below(uint64_t *state, uint64_t limit)
{
    uint64_t z = (*state += UINT64_C(0x9e3779b97f4a7c15));
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return (z ^ (z >> 31)) % limit;
}

static void *run_body(void *argument)
{
    struct runner *runner = argument;
    runner->body(runner->arg);
    return NULL;
}

void runner_start(struct runner *runner, void (*body)(void *arg), void *arg)
{
    runner->body = body;
    runner->arg = arg;
    must(pthread_create(&runner->thread, NULL, run_body, runner) == 0);
}

void runner_join(struct runner *runner)
{
    struct timespec limit;
    clock_gettime(CLOCK_REALTIME, &limit);
    limit.tv_sec += PATIENCE_S;
    must(pthread_timedjoin_np(runner->thread, NULL, &limit) == 0);
}

void nap_ms(unsigned ms)
{
    nanosleep(&(struct timespec){.tv_sec = ms / 1000, .tv_nsec = (long)(ms % 1000) * 1000000},
              NULL);
}
