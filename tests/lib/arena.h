/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What the tests of libmemferry share: served memory of each kind, pages whose every word tells
 * where it belongs and which generation it is of, threads that touch them.
 */
#pragma once

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "memferry.h"

/** struct arena - a region with one mapping, and the server that serves it. */
struct arena {
    enum memferry_memory memory;
    struct memferry_server *server;
    int fd; /**< -1 for anonymous memory */
    uint64_t pages, page_bytes, length_bytes;
    uint8_t *at; /**< served */
    int context;
    uint32_t region;
};

/** arena_memory() - the kind that this run of the program tests: argv[1] "shmem", "hugetlb" or
 * "anonymous". Reserves huge pages where they are needed. Exits with 77 where it can't. */
enum memferry_memory arena_memory(int argc, char **argv, unsigned huge_pages);

/** arena_map() - memory of a kind, nothing watched. @pages: of hugetlb at most 8 are made. */
void arena_map(struct arena *arena, enum memferry_memory memory, uint64_t pages);

/** arena_make() - arena_map(), and a server with one context, region and mapping, which is not
 * started. Fails the test on trouble. */
void arena_make(struct arena *arena, enum memferry_memory memory, uint64_t pages,
                const struct memferry_server_options *options,
                const struct memferry_provider *provider);
/** arena_watch() - the context, region and mapping alone, for a server made otherwise. */
void arena_watch(struct arena *arena);
/** arena_free() - free the server (whatever is missing becomes zeros) and the memory. */
void arena_free(struct arena *arena);

static inline uint64_t *arena_page(const struct arena *arena, uint64_t page)
{
    return (uint64_t *)(void *)(arena->at + page * arena->page_bytes);
}

/** page_word() - what word @word of @page is in @generation; never zero. */
uint64_t page_word(uint64_t page, uint64_t word, uint64_t generation);
/** page_make() - a whole page of that. */
void page_make(void *to, uint64_t page_bytes, uint64_t page, uint64_t generation);
/** page_is() - is all of it that? Reads every word. */
bool page_is(const void *at, uint64_t page_bytes, uint64_t page, uint64_t generation);
bool page_is_zero(const void *at, uint64_t page_bytes);

/** must() - ends the program, saying what was expected: a thread may stand on memory that would go
 * away. Usable on any thread. */
#define must(condition) must_be((condition), #condition, __FILE__, __LINE__)
void must_be(bool condition, const char *what, const char *file, int line);

/** random_below() - repeatable from *@state. */
uint64_t random_below(uint64_t *state, uint64_t limit);

/** struct runner - a thread of the test; runner_join() ends the program if it takes 60 s. */
struct runner {
    pthread_t thread;
    void (*body)(void *arg);
    void *arg;
};
void runner_start(struct runner *runner, void (*body)(void *arg), void *arg);
void runner_join(struct runner *runner);

/** nap_ms() - sleep. */
void nap_ms(unsigned ms);
