/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * libmemferry's fault server: every page that is looked at is checked as a whole. Run once for each
 * kind of memory (argv[1]: shmem, hugetlb, anonymous).
 */
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <poll.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "lib/uapi.h"
#include "tests/lib/arena.h"

#define PAGES ARENA_PAGES_MAX
#define THREADS 4u

static enum memferry_memory memory;

static void many_threads_ask_for_each_page_once(void **state)
{
    (void)state;
    struct arena a;
    struct toucher threads[THREADS];
    memset((void *)asked, 0, sizeof(asked));
    arena_make(&a, memory, PAGES, NULL, PROVIDER(.want = make_page));
    assert_int_equal(memferry_server_start(a.server), 0);
    assert_int_equal(memferry_server_start(a.server), -EALREADY);
    touch_by(threads, THREADS, &a, NULL);
    join_all(threads, THREADS);
    for (uint64_t page = 0; page < a.pages; page++)
        assert_int_equal(asked[page], 1);
    await_counted(&a, a.pages);
    assert_int_equal(memferry_missing_pages(a.server), 0);
    assert_int_equal(figures_of(&a).data_pages, a.pages);
    assert_int_equal(figures_of(&a).wanted, a.pages);
    assert_int_equal(memferry_server_free(a.server, MEMFERRY_END_COMPLETE), 0);
    /* No longer watched, and all there. */
    for (uint64_t page = 0; page < a.pages; page++)
        must(page_is(arena_page(&a, page), a.page_bytes, page, 1));
    munmap(a.at, a.length_bytes);
    if (a.fd >= 0)
        close(a.fd);
}

static void holes_are_zeros_and_stay_holes(void **state)
{
    (void)state;
    struct arena a;
    struct toucher threads[THREADS];
    struct stat st = {0};
    arena_make(&a, memory, PAGES, NULL, PROVIDER(.want = make_page_or_zero));
    memferry_server_start(a.server);
    for (uint64_t page = 0; page < a.pages; page += 3)
        assert_int_equal(memferry_fill_zero(a.server, a.region, page, 1), 0);
    if (a.fd >= 0)
        fstat(a.fd, &st);
    assert_int_equal(st.st_blocks, 0);
    touch_by(threads, THREADS, &a, every_third);
    join_all(threads, THREADS);
    await_counted(&a, a.pages);
    assert_int_equal(figures_of(&a).zero_pages, (a.pages + 2) / 3);
    assert_int_equal(figures_of(&a).wanted, a.pages - (a.pages + 2) / 3);
    arena_free(&a);
}

static void what_was_filled_can_be_written(void **state)
{
    (void)state;
    struct arena a;
    arena_make(&a, memory, PAGES, NULL, PROVIDER(.want = make_page_or_zero));
    memferry_server_start(a.server);
    for (uint64_t page = 0; page < a.pages; page++)
        page_make(arena_page(&a, page), a.page_bytes, page, 2); /* a write is the first touch */
    for (uint64_t page = 0; page < a.pages; page++)
        must(page_is(arena_page(&a, page), a.page_bytes, page, 2));
    arena_free(&a);
}

/* ---- a provider that answers later ---- */

struct later {
    pthread_mutex_t lock;
    struct {
        struct memferry_server *server;
        uint32_t region, page_bytes;
        uint64_t page;
    } queue[PAGES];
    unsigned count;
    _Atomic unsigned in_flight_most;
    uint64_t random;
    _Atomic bool stop;
    bool zero;
};

static int ask_later(void *arg, struct memferry_server *server, struct memferry_want *want)
{
    struct later *later = arg;
    pthread_mutex_lock(&later->lock);
    must(later->count < PAGES);
    later->queue[later->count].server = server;
    later->queue[later->count].region = want->region;
    later->queue[later->count].page_bytes = want->page_bytes;
    later->queue[later->count].page = want->first_page;
    later->count++;
    if (later->count > later->in_flight_most)
        later->in_flight_most = later->count;
    pthread_mutex_unlock(&later->lock);
    return MEMFERRY_LATER;
}

static void answer_later(void *arg)
{
    struct later *later = arg;
    uint8_t *bytes = malloc(2u << 20);
    while (!atomic_load(&later->stop)) {
        pthread_mutex_lock(&later->lock);
        if (later->count == 0) {
            pthread_mutex_unlock(&later->lock);
            nap_ms(1);
            continue;
        }
        unsigned which = (unsigned)random_below(&later->random, later->count);
        struct memferry_server *server = later->queue[which].server;
        const uint32_t region = later->queue[which].region;
        const uint32_t page_bytes = later->queue[which].page_bytes;
        const uint64_t page = later->queue[which].page;
        later->queue[which] = later->queue[--later->count];
        pthread_mutex_unlock(&later->lock);
        if (later->zero && every_third(page)) {
            must(memferry_fill_zero(server, region, page, 1) == 0);
        } else {
            page_make(bytes, page_bytes, page, 1);
            must(memferry_fill(server, region, page, 1, bytes) == 0);
        }
    }
    free(bytes);
}

static void pages_may_come_later_from_any_thread(void **state)
{
    (void)state;
    struct arena a;
    struct later later = {.lock = PTHREAD_MUTEX_INITIALIZER, .zero = true};
    struct toucher threads[THREADS];
    struct runner answerers[2];
    arena_make(&a, memory, PAGES, NULL, PROVIDER(.want = ask_later, .arg = &later));
    memferry_server_start(a.server);
    touch_by(threads, THREADS, &a, every_third);
    while (later.in_flight_most < 2)
        nap_ms(1);
    for (unsigned i = 0; i < 2; i++)
        runner_start(&answerers[i], answer_later, &later);
    join_all(threads, THREADS);
    atomic_store(&later.stop, true);
    for (unsigned i = 0; i < 2; i++)
        runner_join(&answerers[i]);
    assert_int_equal(figures_of(&a).wanted, a.pages);
    arena_free(&a);
}

/* ---- filling in the background ---- */

static void filling_races_with_faults(void **state)
{
    (void)state;
    for (unsigned round = 0; round < 8; round++) {
        struct arena a;
        struct toucher threads[THREADS];
        struct filler fillers[2];
        arena_make(&a, memory, PAGES, NULL, PROVIDER(.want = make_page_or_zero));
        memferry_server_start(a.server);
        touch_by(threads, THREADS, &a, every_third);
        for (unsigned i = 0; i < 2; i++) {
            fillers[i] = (struct filler){.arena = &a, .seed = round * 2 + i, .zero = true};
            runner_start(&fillers[i].runner, fill_all, &fillers[i]);
        }
        join_all(threads, THREADS);
        for (unsigned i = 0; i < 2; i++)
            runner_join(&fillers[i].runner);
        await_counted(&a, a.pages);
        assert_int_equal(memferry_missing_pages(a.server), 0);
        const struct memferry_figures f = figures_of(&a);
        assert_int_equal(f.data_pages + f.zero_pages, a.pages);
        arena_free(&a);
    }
}

static void without_a_provider_faults_wait_for_the_filler(void **state)
{
    (void)state;
    struct arena a;
    struct toucher threads[THREADS];
    struct filler filler;
    arena_make(&a, memory, PAGES, NULL, NULL);
    memferry_server_start(a.server);
    touch_by(threads, THREADS, &a, NULL);
    nap_ms(20);
    filler = (struct filler){.arena = &a, .seed = 7};
    fill_all(&filler);
    join_all(threads, THREADS);
    await_counted(&a, a.pages);
    assert_int_equal(memferry_missing_pages(a.server), 0);
    arena_free(&a);
}

/* ---- bytes that lie in the file ---- */

static int already_there(void *arg, struct memferry_server *server, struct memferry_want *want)
{
    (void)server;
    const struct arena *a = arg;
    /* As a collector would: through a second mapping or, here, by whatever writes the file. */
    uint8_t *second = mmap(NULL, a->page_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, a->fd,
                           (off_t)(want->first_page * a->page_bytes));
    must(second != MAP_FAILED);
    if (!every_third(want->first_page))
        page_make(second, a->page_bytes, want->first_page, 1);
    munmap(second, a->page_bytes);
    want->pages = 1;
    return MEMFERRY_PRESENT;
}

static void what_lies_in_the_file_is_only_mapped(void **state)
{
    (void)state;
    struct arena a;
    struct toucher threads[THREADS];
    if (memory == MEMFERRY_ANONYMOUS)
        skip();
    arena_make(&a, memory, PAGES, NULL, PROVIDER(.want = already_there, .arg = &a));
    memferry_server_start(a.server);
    touch_by(threads, THREADS, &a, every_third);
    join_all(threads, THREADS);
    await_counted(&a, a.pages);
    assert_int_equal(figures_of(&a).present_pages, a.pages);

    /* The next generation: take the pages out, forget them, and they are asked for again. */
    must(fallocate(a.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, (off_t)a.length_bytes) ==
         0);
    assert_int_equal(memferry_forget(a.server, a.region, 0, a.pages), 0);
    assert_int_equal(memferry_missing_pages(a.server), a.pages);
    touch_by(threads, THREADS, &a, every_third);
    join_all(threads, THREADS);
    await_counted(&a, 2 * a.pages);
    assert_int_equal(figures_of(&a).present_pages, 2 * a.pages);
    arena_free(&a);
}

/* ---- serving on a thread of one's own ---- */

struct own_loop {
    const struct arena *arena;
    _Atomic bool stop;
};

static void serve_by_poll(void *argument)
{
    struct own_loop *loop = argument;
    struct pollfd ready = {.fd = memferry_server_fd(loop->arena->server), .events = POLLIN};
    while (!atomic_load(&loop->stop)) {
        poll(&ready, 1, 1000);
        must(memferry_server_run(loop->arena->server, 0) >= 0);
    }
}

static void a_program_may_serve_in_its_own_loop(void **state)
{
    (void)state;
    struct arena a;
    struct toucher threads[THREADS];
    struct runner runner;
    arena_make(&a, memory, PAGES, OPTIONS(.spin_us = 20), PROVIDER(.want = make_page));
    struct own_loop loop = {.arena = &a};
    runner_start(&runner, serve_by_poll, &loop);
    touch_by(threads, THREADS, &a, NULL);
    join_all(threads, THREADS);
    atomic_store(&loop.stop, true);
    runner_join(&runner);
    assert_int_equal(memferry_server_run(a.server, 0), 0);
    arena_free(&a);
}

/* ---- without any permission ---- */

static void nobody_may_serve_faults_of_user_mode(void **state)
{
    (void)state;
    pid_t child = fork();
    if (child == 0) {
        struct arena a;
        struct toucher threads[THREADS];
        if (getuid() == 0)
            must(setgroups(0, NULL) == 0 && setgid(65534) == 0 && setuid(65534) == 0);
        arena_make(&a, memory, PAGES, OPTIONS(.flags = MEMFERRY_USER_FAULTS),
                   PROVIDER(.want = make_page));
        memferry_server_start(a.server);
        int sink = memfd_create("memferry-sink", MFD_CLOEXEC);
        must(write(sink, arena_page(&a, 1), 8) < 0 && errno == EFAULT);
        touch_by(threads, THREADS, &a, NULL);
        join_all(threads, THREADS);
        must(write(sink, arena_page(&a, 1), 8) == 8);
        arena_free(&a);
        _exit(0);
    }
    int status = 0;
    must(waitpid(child, &status, 0) == child);
    assert_int_equal(status, 0);
}

/* ---- misuse ---- */

static void misuse_is_refused_with_a_sentence(void **state)
{
    (void)state;
    struct arena a;
    arena_make(&a, memory, PAGES, NULL, PROVIDER(.want = make_page));
    assert_int_equal(memferry_server_set_provider(a.server, PROVIDER(.want = make_page)),
                     -EALREADY);
    assert_int_equal(memferry_server_free(a.server, MEMFERRY_END_COMPLETE), -EBUSY);
    assert_non_null(strstr(memferry_why(), "missing"));
    assert_int_equal(memferry_fill(a.server, a.region, a.pages, 1, a.at), -EINVAL);
    assert_int_equal(memferry_fill(a.server, a.region, 1, UINT64_MAX, a.at), -EINVAL);
    assert_int_equal(memferry_fill(a.server, 9, 0, 1, a.at), -EINVAL);
    assert_int_equal(memferry_page_state(a.server, a.region, a.pages), -EINVAL);
    assert_int_equal(memferry_page_state(a.server, a.region, 0), MEMFERRY_PAGE_MISSING);
    struct memferry_mapping m = {
        .struct_bytes = sizeof(m), .start_addr = (uintptr_t)a.at, .length_bytes = a.length_bytes};
    /* A file's may be known already, if it is the same. */
    assert_int_equal(memferry_mapping_add(a.server, &m),
                     memory == MEMFERRY_ANONYMOUS ? -EINVAL : 0);
    m.offset_bytes = a.page_bytes;
    m.length_bytes -= a.page_bytes;
    assert_int_equal(memferry_mapping_add(a.server, &m), -EINVAL); /* overlaps */
    m.start_addr++;
    assert_int_equal(memferry_mapping_add(a.server, &m), -EINVAL);
    m.region = 7;
    assert_int_equal(memferry_mapping_add(a.server, &m), -EINVAL);
    int pipes[2];
    assert_int_equal(pipe(pipes), 0);
    assert_int_equal(memferry_context_adopt(a.server, pipes[0], 0), -EINVAL);
    assert_int_equal(memferry_context_adopt(a.server, -1, 0), -EBADF);
    struct memferry_region r = {.struct_bytes = sizeof(r),
                                .memory = MEMFERRY_SHMEM,
                                .length_bytes = a.page_bytes,
                                .fd = pipes[0]};
    assert_int_equal(memferry_region_add(a.server, &r), -EINVAL);
    assert_non_null(strstr(memferry_why(), "tmpfs"));
    close(pipes[0]);
    close(pipes[1]);
    int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
    struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_EVENT_UNMAP};
    must(uffd >= 0 && ioctl(uffd, UFFDIO_API, &api) == 0);
    assert_int_equal(memferry_context_adopt(a.server, uffd, getpid()), -EINVAL);
    assert_non_null(strstr(memferry_why(), "EVENT_REMAP"));
    close(uffd);
    arena_free(&a);
}

static void structs_of_other_versions_are_understood_or_refused(void **state)
{
    (void)state;
    struct memferry_server *server = NULL;
    struct {
        struct memferry_server_options options;
        uint64_t newer[4];
    } o = {.options.struct_bytes = sizeof(o)};
    assert_int_equal(memferry_server_new(&o.options, &server), 0);
    memferry_server_free(server, MEMFERRY_END_COMPLETE);
    o.newer[3] = 1;
    assert_int_equal(memferry_server_new(&o.options, &server), -E2BIG);
    o.options.struct_bytes = 0;
    assert_int_equal(memferry_server_new(&o.options, &server), -EINVAL);
    o.options.struct_bytes = offsetof(struct memferry_server_options, around_pages);
    o.options.flags = 1u << 31; /* not given */
    assert_int_equal(memferry_server_new(&o.options, &server), 0);
    memferry_server_free(server, MEMFERRY_END_COMPLETE);
    o.options.struct_bytes = sizeof(o.options);
    assert_int_equal(memferry_server_new(&o.options, &server), -EINVAL);
    assert_non_null(strstr(memferry_why(), "flags"));
}

static void what_is_removed_is_not_served(void **state)
{
    (void)state;
    struct arena a;
    arena_make(&a, memory, PAGES, NULL, PROVIDER(.want = make_page));
    const uint64_t at = (uintptr_t)a.at, half = a.length_bytes / 2, context = (uint32_t)a.context;
    memferry_server_start(a.server);
    memset((void *)asked, 0, sizeof(asked));
    assert_int_equal(memferry_mapping_remove(a.server, 9, at, half), -EINVAL);
    assert_int_equal(memferry_mapping_remove(a.server, (uint32_t)context, at + 1, half), -EINVAL);
    assert_int_equal(memferry_mapping_remove(a.server, (uint32_t)context, at, a.page_bytes / 2 + 1),
                     -EINVAL);
    assert_int_equal(memferry_mapping_remove(a.server, (uint32_t)context, at, 0), -EINVAL);
    assert_int_equal(memferry_mapping_remove(a.server, (uint32_t)context, at, UINT64_MAX - 4095),
                     -EINVAL);
    assert_int_equal(memferry_mapping_remove(a.server, (uint32_t)context, at + half, half), 0);
    must(page_is_zero(arena_page(&a, a.pages - 1), a.page_bytes));
    assert_int_equal(asked[a.pages - 1], 0);
    must(page_is(arena_page(&a, 0), a.page_bytes, 0, 1));
    struct memferry_mapping left = {.struct_bytes = sizeof(left)};
    assert_int_equal(memferry_mappings(a.server, &left, 1), 1);
    assert_int_equal(left.length_bytes, half);
    assert_int_equal(memferry_mapping_remove(a.server, (uint32_t)context, at, a.length_bytes), 0);
    assert_int_equal(memferry_mappings(a.server, &left, 1), 0);
    arena_free(&a);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(many_threads_ask_for_each_page_once),
        cmocka_unit_test(holes_are_zeros_and_stay_holes),
        cmocka_unit_test(what_was_filled_can_be_written),
        cmocka_unit_test(pages_may_come_later_from_any_thread),
        cmocka_unit_test(filling_races_with_faults),
        cmocka_unit_test(without_a_provider_faults_wait_for_the_filler),
        cmocka_unit_test(what_lies_in_the_file_is_only_mapped),
        cmocka_unit_test(a_program_may_serve_in_its_own_loop),
        cmocka_unit_test(nobody_may_serve_faults_of_user_mode),
        cmocka_unit_test(misuse_is_refused_with_a_sentence),
        cmocka_unit_test(structs_of_other_versions_are_understood_or_refused),
        cmocka_unit_test(what_is_removed_is_not_served),
    };
    return arena_tests(argc, argv, memory, tests);
}
