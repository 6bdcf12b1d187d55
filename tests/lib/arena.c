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

#define PATIENCE_S 60

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
    arena_serve(a);
}

void arena_serve(struct arena *a)
{
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

/* ---- providers ---- */

bool every_third(uint64_t page)
{
    return page % 3 == 0;
}

_Atomic uint64_t asked[ARENA_PAGES_MAX];

int make_page(void *arg, struct memferry_server *server, struct memferry_want *want)
{
    (void)arg;
    (void)server;
    atomic_fetch_add(&asked[want->first_page], 1);
    for (uint64_t i = 0; i < want->pages; i++)
        page_make((uint8_t *)want->bytes + i * want->page_bytes, want->page_bytes,
                  want->first_page + i, 1);
    return MEMFERRY_DATA;
}

int make_page_or_zero(void *arg, struct memferry_server *server, struct memferry_want *want)
{
    want->pages = 1;
    return every_third(want->first_page) ? MEMFERRY_ZERO : make_page(arg, server, want);
}

/* ---- threads that touch, fill and discard ---- */

static void touch_all(void *argument)
{
    const struct toucher *t = argument;
    const struct arena *a = t->arena;
    uint64_t state = t->seed, start = random_below(&state, a->pages);
    const bool down = random_below(&state, 2);
    for (uint64_t i = 0; i < a->pages; i++) {
        uint64_t page = (down ? start + a->pages - i : start + i) % a->pages;
        if (t->zero && t->zero(page))
            must(page_is_zero(arena_page(a, page), a->page_bytes));
        else
            must(page_is(arena_page(a, page), a->page_bytes, page, t->generation));
    }
}

void touch_by(struct toucher *threads, unsigned count, const struct arena *arena,
              bool (*zero)(uint64_t page))
{
    for (unsigned i = 0; i < count; i++) {
        threads[i] = (struct toucher){.arena = arena, .seed = i + 1, .generation = 1, .zero = zero};
        runner_start(&threads[i].runner, touch_all, &threads[i]);
    }
}

void join_all(struct toucher *threads, unsigned count)
{
    for (unsigned i = 0; i < count; i++)
        runner_join(&threads[i].runner);
}

void fill_all(void *argument)
{
    const struct filler *f = argument;
    const struct arena *a = f->arena;
    uint64_t state = f->seed;
    const uint64_t most = a->page_bytes > 65536 ? 2 : 40;
    uint8_t *bytes = malloc(most * a->page_bytes);
    uint64_t page = 0;
    for (;;) {
        uint64_t run = memferry_next_missing(a->server, a->region, &page);
        if (run == 0)
            break;
        uint64_t pages = 1 + random_below(&state, most);
        if (pages > run)
            pages = run;
        if (f->zero && every_third(page)) {
            must(memferry_fill_zero(a->server, a->region, page, 1) == 0);
            page++;
            continue;
        }
        for (uint64_t i = 0; i < pages; i++) {
            if (f->zero && every_third(page + i))
                pages = i;
            else
                page_make(bytes + i * a->page_bytes, a->page_bytes, page + i, 1);
        }
        must(memferry_fill(a->server, a->region, page, pages, bytes) == 0);
        page += pages;
    }
    free(bytes);
}

int arena_discard(const struct arena *a, uint64_t page, uint64_t pages)
{
    return madvise(arena_page(a, page), pages * a->page_bytes,
                   a->memory == MEMFERRY_ANONYMOUS ? MADV_DONTNEED : MADV_REMOVE);
}

uint8_t *arena_reserve(const struct arena *a, uint64_t length_bytes)
{
    uint8_t *at =
        mmap(NULL, length_bytes + a->page_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    must(at != MAP_FAILED);
    const uintptr_t beyond = (uintptr_t)at % a->page_bytes;
    /* cppcheck-suppress memleak ; the caller's */
    return beyond ? at + (a->page_bytes - beyond) : at;
}

/* ---- what the server tells ---- */

struct memferry_figures figures_of(const struct arena *a)
{
    struct memferry_figures figures = {.struct_bytes = sizeof(figures)};
    memferry_figures(a->server, &figures);
    return figures;
}

void await_counted(const struct arena *a, uint64_t pages)
{
    struct memferry_figures f;
    for (unsigned i = 0; i < 20000; i++, nap_ms(1)) {
        f = figures_of(a);
        if (f.data_pages + f.zero_pages + f.present_pages + f.discarded_pages >= pages)
            break;
    }
    must(f.data_pages + f.zero_pages + f.present_pages + f.discarded_pages == pages);
}

void tell(void *arg, const struct memferry_change *change)
{
    struct told *told = arg;
    pthread_mutex_lock(&told->lock);
    if (told->count < 64)
        told->change[told->count++] = *change;
    pthread_mutex_unlock(&told->lock);
}

struct memferry_change await_change(struct told *told, uint32_t kind, const void *start,
                                    uint64_t length_bytes)
{
    struct memferry_change found = {0};
    for (unsigned i = 0; i < 20000 && !found.struct_bytes; i++, nap_ms(1)) {
        pthread_mutex_lock(&told->lock);
        for (unsigned k = 0; k < told->count; k++)
            if (told->change[k].kind == kind &&
                (!start || (told->change[k].start_addr == (uintptr_t)start &&
                            told->change[k].end_addr == (uintptr_t)start + length_bytes)))
                found = told->change[k];
        pthread_mutex_unlock(&told->lock);
    }
    must(found.struct_bytes == sizeof(found));
    return found;
}
