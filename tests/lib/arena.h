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
/** arena_serve() - the region and mapping alone. */
void arena_serve(struct arena *arena);
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

/** arena_tests() - run them, or those that argv[2] names, for the kind that argv[1] names, which
 * @memory is set to. Return: for main(). */
#define arena_tests(argc, argv, memory, tests)                                                     \
    ((memory) = arena_memory(argc, argv, 24),                                                      \
     cmocka_set_test_filter((argc) > 2 ? (argv)[2] : NULL),                                        \
     cmocka_run_group_tests_name(__FILE__, tests, NULL, NULL))

#define OPTIONS(...)                                                                               \
    (&(struct memferry_server_options){.struct_bytes = sizeof(struct memferry_server_options),     \
                                       __VA_ARGS__})
#define PROVIDER(...)                                                                              \
    (&(struct memferry_provider){.struct_bytes = sizeof(struct memferry_provider), __VA_ARGS__})

/* ---- providers: generation 1 of each page ---- */

#define ARENA_PAGES_MAX 512u

/** every_third() - the pages that make_page_or_zero() gives as zeros. */
bool every_third(uint64_t page);
/** asked - how often make_page() was asked for each page. */
extern _Atomic uint64_t asked[ARENA_PAGES_MAX];
int make_page(void *arg, struct memferry_server *server, struct memferry_want *want);
int make_page_or_zero(void *arg, struct memferry_server *server, struct memferry_want *want);

/* ---- threads that touch, fill and discard ---- */

/** struct toucher - looks at every page, from a random one on, up or down.
 * @zero: which pages are zeros; NULL: none. */
struct toucher {
    struct runner runner;
    const struct arena *arena;
    uint64_t seed, generation;
    bool (*zero)(uint64_t page);
};
void touch_by(struct toucher *threads, unsigned count, const struct arena *arena,
              bool (*zero)(uint64_t page));
void join_all(struct toucher *threads, unsigned count);

/** struct filler - fills what is missing, in random runs. @zero: as every_third() says, or not. */
struct filler {
    struct runner runner;
    const struct arena *arena;
    uint64_t seed;
    bool zero;
};
/** fill_all() - a filler's body. */
void fill_all(void *filler);

/** arena_discard() - discards pages' contents for good, in the way that their memory takes. Return:
 * of madvise(2). */
int arena_discard(const struct arena *arena, uint64_t page, uint64_t pages);

/** arena_reserve() - a free place for a move, page-aligned. Where something was moved away from is
 * nobody's: whoever maps something next may get it, the allocator for one. So none is used twice.
 */
uint8_t *arena_reserve(const struct arena *arena, uint64_t length_bytes);

/* ---- what the server tells ---- */

struct memferry_figures figures_of(const struct arena *arena);
/** await_counted() - until @pages are here or discarded: a page is counted after its waiters were
 * let go. */
void await_counted(const struct arena *arena, uint64_t pages);

/** struct told - changes as on_change() tells them; zeroed but for its lock. */
struct told {
    pthread_mutex_t lock;
    struct memferry_change change[64];
    unsigned count;
};
/** tell() - on_change; @arg is a struct told. */
void tell(void *arg, const struct memferry_change *change);
/** await_change() - the change of that kind over that range (@start NULL: any). The thread that
 * makes it goes on before it is told. */
struct memferry_change await_change(struct told *told, uint32_t kind, const void *start,
                                    uint64_t length_bytes);
