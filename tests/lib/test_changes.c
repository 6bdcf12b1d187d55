/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * libmemferry while the layout of what it serves changes: discarded, moved, unmapped. Whole pages
 * are checked. Run once for each kind of memory (argv[1]: shmem, hugetlb, anonymous).
 */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cmocka.h>

#include "lib/proc_stat.h"
#include "tests/lib/arena.h"

#define PAGES ARENA_PAGES_MAX
#define THREADS 3u

static enum memferry_memory memory;

static void each_change_is_told_with_its_reason(void **state)
{
    (void)state;
    struct arena a;
    struct told told = {.lock = PTHREAD_MUTEX_INITIALIZER};
    arena_make(&a, memory, PAGES, OPTIONS(.arg = &told, .on_change = tell),
               PROVIDER(.want = make_page));
    memferry_server_start(a.server);
    const pid_t me = (pid_t)syscall(SYS_gettid);

    assert_int_equal(arena_discard(&a, 1, 1), 0);
    struct memferry_change c =
        await_change(&told, MEMFERRY_REMOVE, arena_page(&a, 1), a.page_bytes);
    assert_int_equal(c.reason,
                     memory == MEMFERRY_ANONYMOUS ? MEMFERRY_BY_DONTNEED : MEMFERRY_BY_REMOVE);
    assert_int_equal(c.tid, me);
    must(page_is_zero(arena_page(&a, 1), a.page_bytes));

    assert_int_equal(munmap(arena_page(&a, 2), a.page_bytes), 0);
    c = await_change(&told, MEMFERRY_UNMAP, arena_page(&a, 2), a.page_bytes);
    assert_int_equal(c.reason, MEMFERRY_BY_MUNMAP);

    uint8_t *to = arena_reserve(&a, a.page_bytes);
    must(mremap(arena_page(&a, 4), a.page_bytes, a.page_bytes, MREMAP_MAYMOVE | MREMAP_FIXED, to) ==
         to);
    c = await_change(&told, MEMFERRY_REMAP, arena_page(&a, 4), a.page_bytes);
    assert_int_equal(c.reason, MEMFERRY_BY_MREMAP);
    assert_int_equal(c.to_addr, (uintptr_t)to);
    must(page_is(to, a.page_bytes, 4, 1));

    must(mmap(arena_page(&a, 6), a.page_bytes, PROT_READ | PROT_WRITE,
              MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == (void *)arena_page(&a, 6));
    c = await_change(&told, MEMFERRY_UNMAP, arena_page(&a, 6), a.page_bytes);
    assert_int_equal(c.reason, MEMFERRY_BY_MMAP_OVER);
    must(page_is_zero(arena_page(&a, 6), a.page_bytes));

    struct memferry_mapping mappings[16] = {{.struct_bytes = sizeof(mappings[0])}};
    assert_int_equal(memferry_mappings(a.server, mappings, 16), 5);
    a.at = NULL; /* what was unmapped may be somebody else's by now */
    arena_free(&a);
}

static void dontneed_leaves_the_bytes_of_a_file(void **state)
{
    (void)state;
    struct arena a;
    if (memory == MEMFERRY_ANONYMOUS)
        skip();
    arena_make(&a, memory, PAGES, NULL, PROVIDER(.want = make_page));
    memferry_server_start(a.server);
    /* Once over what is here, once over what is missing. */
    for (unsigned i = 0; i < 2; i++) {
        must(page_is(arena_page(&a, 0), a.page_bytes, 0, 1));
        assert_int_equal(madvise(a.at, a.length_bytes, MADV_DONTNEED), 0);
    }
    for (uint64_t page = 0; page < a.pages; page++)
        must(page_is(arena_page(&a, page), a.page_bytes, page, 1));
    arena_free(&a);
}

/* ---- discarding while pages come ---- */

struct discarder {
    struct runner runner;
    const struct arena *arena;
    uint64_t first, step, seed;
};

/* Of its own pages: looks or not, discards, looks; what it has discarded must never come back. */
static void discard_own(void *argument)
{
    const struct discarder *d = argument;
    const struct arena *a = d->arena;
    uint64_t random = d->seed;
    for (uint64_t page = d->first; page < a->pages; page += d->step) {
        uint64_t *at = arena_page(a, page);
        switch (random_below(&random, 4)) {
        case 0:
            must(page_is(at, a->page_bytes, page, 1));
            break;
        case 1: /* written before it is discarded */
            page_make(at, a->page_bytes, page, 2);
            must(page_is(at, a->page_bytes, page, 2));
            break;
        case 2:
            nap_ms(1);
            break;
        }
        must(arena_discard(a, page, 1) == 0);
        must(page_is_zero(at, a->page_bytes));
        if (random_below(&random, 2)) {
            page_make(at, a->page_bytes, page, 3);
            must(page_is(at, a->page_bytes, page, 3));
            must(arena_discard(a, page, 1) == 0);
            must(page_is_zero(at, a->page_bytes));
        }
    }
}

static void what_was_discarded_while_it_came_stays_zero(void **state)
{
    (void)state;
    for (unsigned round = 0; round < 6; round++) {
        struct arena a;
        struct discarder threads[THREADS];
        struct runner filler;
        arena_make(&a, memory, PAGES, NULL, PROVIDER(.want = make_page));
        memferry_server_start(a.server);
        runner_start(&filler, fill_all, &(struct filler){.arena = &a});
        for (unsigned i = 0; i < THREADS; i++) {
            threads[i] = (struct discarder){
                .arena = &a, .first = i, .step = THREADS, .seed = round * 10 + i};
            runner_start(&threads[i].runner, discard_own, &threads[i]);
        }
        for (unsigned i = 0; i < THREADS; i++)
            runner_join(&threads[i].runner);
        runner_join(&filler);
        for (uint64_t page = 0; page < a.pages; page++)
            must(page_is_zero(arena_page(&a, page), a.page_bytes));
        for (unsigned i = 0; i < 20000 && memferry_missing_pages(a.server); i++)
            nap_ms(1);
        assert_int_equal(memferry_missing_pages(a.server), 0);
        arena_free(&a);
    }
}

static void what_the_server_was_told_to_discard_is_zero(void **state)
{
    (void)state;
    struct arena a;
    if (memory == MEMFERRY_ANONYMOUS)
        skip();
    arena_make(&a, memory, PAGES, NULL, PROVIDER(.want = make_page));
    memferry_server_start(a.server);
    must(page_is(arena_page(&a, 3), a.page_bytes, 3, 1));
    for (uint64_t page = 3; page < 5; page++) {
        assert_int_equal(memferry_discard(a.server, a.region, page, 1), 0);
        assert_int_equal(memferry_page_state(a.server, a.region, page), MEMFERRY_PAGE_DISCARDED);
        must(page_is_zero(arena_page(&a, page), a.page_bytes));
    }
    arena_free(&a);
}

/* ---- moving ---- */

struct mover {
    struct runner runner;
    const struct arena *arena;
    uint8_t *now;
};

/* Again and again, as long as pages come. */
static void move_about(void *argument)
{
    struct mover *m = argument;
    const struct arena *a = m->arena;
    for (unsigned i = 1; i <= 40; i++) {
        uint8_t *to = arena_reserve(a, a->length_bytes);
        must(mremap(m->now, a->length_bytes, a->length_bytes, MREMAP_MAYMOVE | MREMAP_FIXED, to) ==
             to);
        m->now = to;
        /* While the others' pages come: some are touched here, at once. */
        uint64_t page = i * 7 % a->pages;
        must(page_is(to + page * a->page_bytes, a->page_bytes, page, 1));
        nap_ms(1);
    }
}

static void memory_is_served_where_it_was_moved_to(void **state)
{
    (void)state;
    struct arena a;
    struct runner filler;
    arena_make(&a, memory, PAGES, NULL, PROVIDER(.want = make_page));
    struct mover m = {.arena = &a, .now = a.at};
    memferry_server_start(a.server);
    runner_start(&m.runner, move_about, &m);
    nap_ms(5);
    runner_start(&filler, fill_all, &(struct filler){.arena = &a});
    runner_join(&filler);
    runner_join(&m.runner);
    for (uint64_t page = 0; page < a.pages; page++)
        must(page_is(m.now + page * a.page_bytes, a.page_bytes, page, 1));
    a.at = m.now;
    arena_free(&a);
}

static void what_is_left_behind_by_dontunmap_is_served_too(void **state)
{
    (void)state;
    struct arena a;
    if (memory == MEMFERRY_HUGETLB)
        skip(); /* mremap(2) refuses it */
    arena_make(&a, memory, PAGES, NULL, PROVIDER(.want = make_page));
    memferry_server_start(a.server);
    must(page_is(arena_page(&a, 1), a.page_bytes, 1, 1));
    uint8_t *to = mremap(a.at, a.length_bytes, a.length_bytes,
                         MREMAP_MAYMOVE | 4 /* MREMAP_DONTUNMAP, Linux 5.7 */, NULL);
    must(to != MAP_FAILED);
    for (uint64_t page = 0; page < a.pages; page++) {
        /* A file's pages are at both places, private memory has moved. */
        if (memory == MEMFERRY_ANONYMOUS)
            must(page_is_zero(arena_page(&a, page), a.page_bytes));
        else
            must(page_is(arena_page(&a, page), a.page_bytes, page, 1));
        must(page_is(to + page * a.page_bytes, a.page_bytes, page, 1));
    }
    munmap(to, a.length_bytes);
    arena_free(&a);
}

/* ---- moving to where something was moved away from ---- */

struct move {
    struct runner runner;
    uint8_t *from, *to;
    uint64_t length_bytes;
    _Atomic pid_t tid;
    _Atomic bool done;
};

static void move_once(void *argument)
{
    struct move *m = argument;
    atomic_store(&m->tid, gettid());
    must(mremap(m->from, m->length_bytes, m->length_bytes, MREMAP_MAYMOVE | MREMAP_FIXED, m->to) ==
         m->to);
    atomic_store(&m->done, true);
}

/* Until it has moved, and waits for that to be read. */
static void start_move(struct move *m)
{
    unsigned char in_core;
    struct mf_proc_stat stat;
    runner_start(&m->runner, move_once, m);
    while (!atomic_load(&m->tid) || mincore(m->from, 1, &in_core) == 0)
        nap_ms(1);
    while (mf_proc_stat(getpid(), m->tid, &stat) < 0 || stat.state == 'R')
        nap_ms(1);
}

/* What it has grown by is moved away, and when an event of that is read its thread has to wake up
 * before it tells the next; meanwhile another thread moves something there, which must not be taken
 * for what is to leave.
 * @onto: it is moved over something else, so that what is told first is the end of that. @look: is
 * there time to look how much it has grown by? */
static void leave_and_come(bool onto, bool look)
{
    struct arena a;
    arena_make(&a, memory, PAGES, NULL, PROVIDER(.want = make_page));
    const uint64_t bytes = 4 * a.page_bytes;
    memferry_server_start(a.server);
    uint8_t *grown = arena_reserve(&a, 2 * bytes);
    must(mremap(a.at, bytes, 2 * bytes, MREMAP_MAYMOVE | MREMAP_FIXED, grown) == grown);
    memferry_server_stop(a.server);
    for (unsigned i = 0; look && i < 10; i++)
        assert_true(memferry_server_run(a.server, 20) >= 0);
    struct move leaves = {.from = grown + bytes,
                          .to = onto ? (uint8_t *)arena_page(&a, 16) : arena_reserve(&a, bytes),
                          .length_bytes = bytes};
    struct move comes = {
        .from = (uint8_t *)arena_page(&a, 8), .to = grown + bytes, .length_bytes = bytes};
    start_move(&leaves);
    start_move(&comes);
    while (!leaves.done || !comes.done)
        assert_true(memferry_server_run(a.server, 10) >= 0);
    runner_join(&leaves.runner);
    runner_join(&comes.runner);
    memferry_server_start(a.server);
    for (uint64_t page = 0; page < 4; page++) {
        const uint64_t offset_bytes = page * a.page_bytes;
        must(page_is(grown + offset_bytes, a.page_bytes, page, 1));
        must(page_is(comes.to + offset_bytes, a.page_bytes, 8 + page, 1));
        if (memory == MEMFERRY_ANONYMOUS)
            must(page_is_zero(leaves.to + offset_bytes, a.page_bytes));
        else
            must(page_is(leaves.to + offset_bytes, a.page_bytes, 4 + page, 1));
    }
    munmap(grown, 2 * bytes);
    munmap(leaves.to, bytes);
    a.at = NULL; /* parts of it may be somebody else's by now */
    arena_free(&a);
}

static void what_comes_to_where_something_was_stays(void **state)
{
    (void)state;
    if (memory == MEMFERRY_HUGETLB)
        skip(); /* mremap(2) refuses to make it longer */
    leave_and_come(false, false);
    leave_and_come(false, true);
    leave_and_come(true, true);
}

/* ---- unmapping under somebody who waits ---- */

struct waiter {
    struct runner runner;
    const struct arena *arena;
    uint64_t page;
    _Atomic bool waits;
    ssize_t result;
    int error;
};

static int never(void *arg, struct memferry_server *server, struct memferry_want *want)
{
    struct waiter *w = arg;
    (void)server;
    (void)want;
    atomic_store(&w->waits, true);
    return MEMFERRY_LATER;
}

/* The kernel touches it for us: then an unmapped page is an error, not a signal. */
static void write_from(void *argument)
{
    struct waiter *w = argument;
    int fd = memfd_create("memferry-sink", MFD_CLOEXEC);
    w->result = write(fd, arena_page(w->arena, w->page), w->arena->page_bytes);
    w->error = errno;
    close(fd);
}

static void a_page_may_be_unmapped_while_somebody_waits_for_it(void **state)
{
    (void)state;
    struct arena a;
    struct waiter w = {.arena = &a, .page = 5};
    arena_make(&a, memory, PAGES, NULL, PROVIDER(.want = never, .arg = &w));
    memferry_server_start(a.server);
    runner_start(&w.runner, write_from, &w);
    while (!atomic_load(&w.waits))
        nap_ms(1);
    nap_ms(5);
    must(munmap(arena_page(&a, 5), a.page_bytes) == 0);
    runner_join(&w.runner);
    assert_true(w.result < 0 && w.error == EFAULT);
    /* Its bytes may come all the same. */
    uint8_t *bytes = malloc(a.page_bytes);
    page_make(bytes, a.page_bytes, 5, 1);
    assert_int_equal(memferry_fill(a.server, a.region, 5, 1, bytes), 0);
    free(bytes);
    fill_all(&(struct filler){.arena = &a});
    for (uint64_t page = 0; page < a.pages; page++)
        must(page == 5 || page_is(arena_page(&a, page), a.page_bytes, page, 1));
    a.at = NULL; /* page 5 may be somebody else's by now */
    arena_free(&a);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(each_change_is_told_with_its_reason),
        cmocka_unit_test(dontneed_leaves_the_bytes_of_a_file),
        cmocka_unit_test(what_was_discarded_while_it_came_stays_zero),
        cmocka_unit_test(what_the_server_was_told_to_discard_is_zero),
        cmocka_unit_test(memory_is_served_where_it_was_moved_to),
        cmocka_unit_test(what_is_left_behind_by_dontunmap_is_served_too),
        cmocka_unit_test(what_comes_to_where_something_was_stays),
        cmocka_unit_test(a_page_may_be_unmapped_while_somebody_waits_for_it),
    };
    return arena_tests(argc, argv, memory, tests);
}
