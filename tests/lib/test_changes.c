/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * libmemferry while the layout of what it serves changes: discarded, moved, unmapped, forked, taken
 * over by another server, in another process. Whole pages are checked. Run once for each kind of
 * memory (argv[1]: shmem, hugetlb, anonymous).
 */
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "lib/uapi.h"
#include "tests/lib/arena.h"

#define PAGES 512u
#define THREADS 3u

static enum memferry_memory memory;

#define OPTIONS(...)                                                                               \
    (&(struct memferry_server_options){.struct_bytes = sizeof(struct memferry_server_options),     \
                                       __VA_ARGS__})
#define PROVIDER(...)                                                                              \
    (&(struct memferry_provider){.struct_bytes = sizeof(struct memferry_provider), __VA_ARGS__})

static int make_page(void *arg, struct memferry_server *server, struct memferry_want *want)
{
    (void)arg;
    (void)server;
    want->pages = 1;
    page_make(want->bytes, want->page_bytes, want->first_page, 1);
    return MEMFERRY_DATA;
}

/* Discards a page's contents for good, in the way that its memory takes. */
static int discard(const struct arena *a, uint64_t page, uint64_t pages)
{
    return madvise(arena_page(a, page), pages * a->page_bytes,
                   memory == MEMFERRY_ANONYMOUS ? MADV_DONTNEED : MADV_REMOVE);
}

/* A free place for a move, page-aligned. Where something was moved away from is nobody's: whoever
 * maps something next may get it, the allocator for one. So no place is used twice. */
static uint8_t *reserve(const struct arena *a, uint64_t length_bytes)
{
    uint8_t *at =
        mmap(NULL, length_bytes + a->page_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    must(at != MAP_FAILED);
    at += a->page_bytes - 1;
    return at - (uintptr_t)at % a->page_bytes;
}

/* ---- changes that are told ---- */

struct told {
    pthread_mutex_t lock;
    struct memferry_change change[64];
    unsigned count;
};

static void tell(void *arg, const struct memferry_change *change)
{
    struct told *told = arg;
    pthread_mutex_lock(&told->lock);
    if (told->count < 64)
        told->change[told->count++] = *change;
    pthread_mutex_unlock(&told->lock);
}

/* The change of that kind over that range. The thread that makes it goes on before it is told. */
static struct memferry_change await_change(struct told *told, uint32_t kind, const void *start,
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

static void each_change_is_told_with_its_reason(void **state)
{
    (void)state;
    struct arena a;
    struct told told = {.lock = PTHREAD_MUTEX_INITIALIZER};
    arena_make(&a, memory, PAGES, OPTIONS(.arg = &told, .on_change = tell),
               PROVIDER(.want = make_page));
    memferry_server_start(a.server);
    const pid_t me = (pid_t)syscall(SYS_gettid);

    assert_int_equal(discard(&a, 1, 1), 0);
    struct memferry_change c =
        await_change(&told, MEMFERRY_REMOVE, arena_page(&a, 1), a.page_bytes);
    assert_int_equal(c.reason,
                     memory == MEMFERRY_ANONYMOUS ? MEMFERRY_BY_DONTNEED : MEMFERRY_BY_REMOVE);
    assert_int_equal(c.tid, me);
    must(page_is_zero(arena_page(&a, 1), a.page_bytes));

    assert_int_equal(munmap(arena_page(&a, 2), a.page_bytes), 0);
    c = await_change(&told, MEMFERRY_UNMAP, arena_page(&a, 2), a.page_bytes);
    assert_int_equal(c.reason, MEMFERRY_BY_MUNMAP);

    uint8_t *to = reserve(&a, a.page_bytes);
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
        must(discard(a, page, 1) == 0);
        must(page_is_zero(at, a->page_bytes));
        if (random_below(&random, 2)) {
            page_make(at, a->page_bytes, page, 3);
            must(page_is(at, a->page_bytes, page, 3));
            must(discard(a, page, 1) == 0);
            must(page_is_zero(at, a->page_bytes));
        }
    }
}

static void fill_all(void *argument)
{
    const struct arena *a = argument;
    const uint64_t most = a->page_bytes > 65536 ? 2 : 24;
    uint8_t *bytes = malloc(most * a->page_bytes);
    uint64_t page = 0, run;
    while ((run = memferry_next_missing(a->server, a->region, &page)) > 0) {
        if (run > most)
            run = most;
        for (uint64_t i = 0; i < run; i++)
            page_make(bytes + i * a->page_bytes, a->page_bytes, page + i, 1);
        must(memferry_fill(a->server, a->region, page, run, bytes) == 0);
        page += run;
    }
    free(bytes);
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
        runner_start(&filler, fill_all, &a);
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
        uint8_t *to = reserve(a, a->length_bytes);
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
    runner_start(&filler, fill_all, &a);
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
    fill_all(&a);
    for (uint64_t page = 0; page < a.pages; page++)
        must(page == 5 || page_is(arena_page(&a, page), a.page_bytes, page, 1));
    a.at = NULL; /* page 5 may be somebody else's by now */
    arena_free(&a);
}

/* ---- fork ---- */

static void a_child_finds_the_same_pages(void **state)
{
    (void)state;
    struct arena a;
    struct told told = {.lock = PTHREAD_MUTEX_INITIALIZER};
    arena_make(&a, memory, PAGES,
               OPTIONS(.arg = &told, .on_change = tell, .flags = MEMFERRY_FOLLOW_FORKS),
               PROVIDER(.want = make_page));
    memferry_server_start(a.server);
    must(page_is(arena_page(&a, 0), a.page_bytes, 0, 1));
    if (memory == MEMFERRY_ANONYMOUS)
        page_make(arena_page(&a, 1), a.page_bytes, 1, 2);
    pid_t child = fork();
    if (child == 0) {
        /* Its own way: whatever it does to private memory is its own. */
        bool good = true;
        for (uint64_t page = 0; page < a.pages; page++)
            good = good && page_is(arena_page(&a, page), a.page_bytes, page,
                                   memory == MEMFERRY_ANONYMOUS && page == 1 ? 2 : 1);
        if (memory == MEMFERRY_ANONYMOUS) {
            page_make(arena_page(&a, 2), a.page_bytes, 2, 3);
            good = good && discard(&a, 3, 1) == 0 && page_is_zero(arena_page(&a, 3), a.page_bytes);
        }
        _exit(good ? 0 : 1);
    }
    const struct memferry_change c = await_change(&told, MEMFERRY_FORK, NULL, 0);
    assert_int_equal(c.reason, MEMFERRY_BY_FORK);
    assert_int_equal(c.child_pid, child);
    for (uint64_t page = a.pages; page-- > 0;)
        must(page_is(arena_page(&a, page), a.page_bytes, page,
                     memory == MEMFERRY_ANONYMOUS && page == 1 ? 2 : 1));
    int status = 0;
    must(waitpid(child, &status, 0) == child);
    assert_int_equal(status, 0);
    /* Two more, one of which never touches it. */
    for (int i = 0; i < 2; i++) {
        child = fork();
        if (child == 0)
            _exit(i == 0 || page_is(arena_page(&a, 0), a.page_bytes, 0, 1) ? 0 : 1);
        must(waitpid(child, &status, 0) == child);
        assert_int_equal(status, 0);
    }
    nap_ms(250); /* they are let go */
    must(page_is(arena_page(&a, 0), a.page_bytes, 0, 1));
    arena_free(&a);
}

/* ---- another server takes over ---- */

static void touch_all(void *argument)
{
    const struct arena *a = argument;
    for (uint64_t page = 0; page < a->pages; page++)
        must(page_is(arena_page(a, page), a->page_bytes, page, 1));
}

static int make_a_few(void *arg, struct memferry_server *server, struct memferry_want *want)
{
    _Atomic int *left = arg;
    if (atomic_fetch_sub(left, 1) > 0)
        return make_page(NULL, server, want);
    return MEMFERRY_LATER; /* and never comes */
}

static void a_successor_takes_over_where_a_server_ended(void **state)
{
    (void)state;
    struct arena a;
    struct runner toucher;
    _Atomic int left = 4;
    arena_map(&a, memory, PAGES);
    int states = memfd_create("memferry-states", MFD_CLOEXEC);
    must(ftruncate(states, 8192 + (off_t)a.pages) == 0);
    int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
    must(uffd >= 0);
    struct memferry_region region = {.struct_bytes = sizeof(region),
                                     .memory = memory,
                                     .length_bytes = a.length_bytes,
                                     .fd = a.fd,
                                     .states_in_file = 1,
                                     .states_fd = states,
                                     .states_offset_bytes = 8192};
    struct memferry_mapping mapping = {.struct_bytes = sizeof(mapping),
                                       .start_addr = (uintptr_t)a.at,
                                       .length_bytes = a.length_bytes};
    for (int i = 0; i < 2; i++) {
        must(memferry_server_new(NULL, &a.server) == 0);
        must(memferry_server_set_provider(a.server, PROVIDER(.want = make_a_few, .arg = &left)) ==
             0);
        must(memferry_context_adopt(a.server, uffd, getpid()) == 0);
        must(memferry_region_add(a.server, &region) == 0);
        must(memferry_mapping_add(a.server, &mapping) == 0);
        must(memferry_server_start(a.server) == 0);
        if (i == 1)
            break;
        runner_start(&toucher, touch_all, &a);
        while (atomic_load(&left) >= 0)
            nap_ms(1);
        nap_ms(5);
        must(memferry_server_free(a.server, MEMFERRY_END_LEAVE) == 0);
        atomic_store(&left, 1 << 30);
        region.flags = MEMFERRY_REGION_TAKE_OVER;
        mapping.flags = MEMFERRY_MAPPING_REGISTERED;
    }
    runner_join(&toucher);
    struct memferry_figures figures = {.struct_bytes = sizeof(figures)};
    for (unsigned i = 0; i < 20000 && memferry_missing_pages(a.server); i++)
        nap_ms(1);
    memferry_figures(a.server, &figures);
    assert_int_equal(figures.data_pages, a.pages - 4); /* the others are not asked for again */
    arena_free(&a);
    close(uffd);
    close(states);
}

/* ---- a server that is killed, and the next ---- */

#define SERVERS 6u

static int make_slowly(void *arg, struct memferry_server *server, struct memferry_want *want)
{
    if (want->first_page % 7 == 0)
        nap_ms(1);
    return make_page(arg, server, want);
}

/* The memory of its parent, from the userfaultfd and the states that it shares with it. */
static _Noreturn void serve_parent(struct arena *a, int uffd, int states, int go, bool first)
{
    struct runner filler;
    char byte;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (read(go, &byte, 1) != 1)
        _exit(0);
    must(memferry_server_new(OPTIONS(.flags = MEMFERRY_REMOVE_DISCARDS), &a->server) == 0);
    must(memferry_server_set_provider(a->server, PROVIDER(.want = make_slowly)) == 0);
    must(memferry_context_adopt(a->server, uffd, getppid()) == 0);
    must(memferry_region_add(a->server, &(struct memferry_region){
                                            .struct_bytes = sizeof(struct memferry_region),
                                            .memory = memory,
                                            .length_bytes = a->length_bytes,
                                            .fd = a->fd,
                                            .states_in_file = 1,
                                            .states_fd = states,
                                            .flags = first ? 0 : MEMFERRY_REGION_TAKE_OVER}) == 0);
    must(memferry_mapping_add(
             a->server,
             &(struct memferry_mapping){.struct_bytes = sizeof(struct memferry_mapping),
                                        .start_addr = (uintptr_t)a->at,
                                        .length_bytes = a->length_bytes,
                                        .flags = first ? 0 : MEMFERRY_MAPPING_REGISTERED}) == 0);
    must(memferry_server_start(a->server) == 0);
    must(write(go, "", 1) == 1);
    nap_ms(2);
    runner_start(&filler, fill_all, a);
    for (;;)
        pause();
}

static void nothing_is_lost_when_servers_are_killed(void **state)
{
    (void)state;
    struct arena a;
    struct runner touchers[2];
    int go[SERVERS][2];
    pid_t pid[SERVERS];
    char byte;
    uint64_t random = 5;
    arena_map(&a, memory, PAGES);
    int states = memfd_create("memferry-states", MFD_CLOEXEC);
    must(ftruncate(states, (off_t)a.pages) == 0);
    int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
    must(uffd >= 0);
    for (unsigned i = 0; i < SERVERS; i++) { /* while there are no threads yet */
        must(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, go[i]) == 0);
        pid[i] = fork();
        if (pid[i] == 0)
            serve_parent(&a, uffd, states, go[i][1], i == 0);
    }
    for (unsigned i = 0; i < SERVERS; i++) {
        must(write(go[i][0], "", 1) == 1 && read(go[i][0], &byte, 1) == 1);
        for (unsigned k = 0; i == 0 && k < 2; k++)
            runner_start(&touchers[k], touch_all, &a);
        if (i + 1 == SERVERS)
            break;
        nap_ms((unsigned)random_below(&random, 8));
        kill(pid[i], SIGKILL);
        must(waitpid(pid[i], NULL, 0) == pid[i]);
    }
    for (unsigned k = 0; k < 2; k++)
        runner_join(&touchers[k]);
    kill(pid[SERVERS - 1], SIGKILL);
    must(waitpid(pid[SERVERS - 1], NULL, 0) == pid[SERVERS - 1]);
    close(uffd);
    touch_all(&a);
    munmap(a.at, a.length_bytes);
    for (unsigned i = 0; i < SERVERS; i++) {
        close(go[i][0]);
        close(go[i][1]);
    }
    close(states);
    if (a.fd >= 0)
        close(a.fd);
}

/* ---- another process ---- */

static void send_fd(int sock, int fd)
{
    char byte = 0, room[CMSG_SPACE(sizeof(int))] = {0};
    struct iovec iov = {&byte, 1};
    struct msghdr m = {
        .msg_iov = &iov, .msg_iovlen = 1, .msg_control = room, .msg_controllen = sizeof(room)};
    struct cmsghdr *c = CMSG_FIRSTHDR(&m);
    c->cmsg_level = SOL_SOCKET;
    c->cmsg_type = SCM_RIGHTS;
    c->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(c), &fd, sizeof(fd));
    must(sendmsg(sock, &m, 0) == 1);
}

static int receive_fd(int sock)
{
    char byte, room[CMSG_SPACE(sizeof(int))];
    int fd;
    struct iovec iov = {&byte, 1};
    struct msghdr m = {
        .msg_iov = &iov, .msg_iovlen = 1, .msg_control = room, .msg_controllen = sizeof(room)};
    must(recvmsg(sock, &m, MSG_CMSG_CLOEXEC) == 1 && CMSG_FIRSTHDR(&m));
    memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&m)), sizeof(fd));
    return fd;
}

static void the_memory_of_another_process_is_served(void **state)
{
    (void)state;
    struct arena a;
    int pair[2];
    char byte;
    arena_map(&a, memory, PAGES);
    must(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0);
    pid_t child = fork();
    if (child == 0) {
        int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
        must(uffd >= 0);
        send_fd(pair[1], uffd);
        must(read(pair[1], &byte, 1) == 1);
        bool good = true;
        for (uint64_t page = 0; page < a.pages; page++)
            good = good && page_is(arena_page(&a, page), a.page_bytes, page, 1);
        /* And where it is moved to. */
        uint8_t *to = reserve(&a, a.length_bytes);
        good = good && discard(&a, 1, 1) == 0;
        good = good && mremap(a.at, a.length_bytes, a.length_bytes, MREMAP_MAYMOVE | MREMAP_FIXED,
                              to) == to;
        for (uint64_t page = 0; page < a.pages; page++)
            good = good && (page == 1 ? page_is_zero(to + page * a.page_bytes, a.page_bytes)
                                      : page_is(to + page * a.page_bytes, a.page_bytes, page, 1));
        _exit(good ? 0 : 1);
    }
    int uffd = receive_fd(pair[0]);
    must(memferry_server_new(NULL, &a.server) == 0);
    must(memferry_server_set_provider(a.server, PROVIDER(.want = make_page)) == 0);
    must(memferry_context_adopt(a.server, uffd, child) == 0);
    must(memferry_region_add(
             a.server, &(struct memferry_region){.struct_bytes = sizeof(struct memferry_region),
                                                 .memory = memory,
                                                 .length_bytes = a.length_bytes,
                                                 .fd = a.fd}) == 0);
    must(memferry_mapping_add(
             a.server, &(struct memferry_mapping){.struct_bytes = sizeof(struct memferry_mapping),
                                                  .start_addr = (uintptr_t)a.at,
                                                  .length_bytes = a.length_bytes}) == 0);
    must(memferry_server_start(a.server) == 0);
    must(write(pair[0], &byte, 1) == 1);
    int status = 0;
    must(waitpid(child, &status, 0) == child);
    assert_int_equal(status, 0);
    /* It is gone; filling does no harm. */
    uint8_t *bytes = calloc(1, a.page_bytes);
    assert_int_equal(memferry_fill(a.server, 0, 0, 1, bytes), 0);
    free(bytes);
    arena_free(&a);
    close(uffd);
    close(pair[0]);
    close(pair[1]);
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
        cmocka_unit_test(a_page_may_be_unmapped_while_somebody_waits_for_it),
        cmocka_unit_test(a_child_finds_the_same_pages),
        cmocka_unit_test(a_successor_takes_over_where_a_server_ended),
        cmocka_unit_test(nothing_is_lost_when_servers_are_killed),
        cmocka_unit_test(the_memory_of_another_process_is_served),
    };
    memory = arena_memory(argc, argv, 24);
    if (argc > 2) /* only these */
        cmocka_set_test_filter(argv[2]);
    return cmocka_run_group_tests_name("changes", tests, NULL, NULL);
}
