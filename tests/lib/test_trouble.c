/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * libmemferry where something is in the way: an event that nobody reads, no descriptor, calls from
 * callbacks, the end. Run once for each kind of memory (argv[1]: shmem, hugetlb, anonymous).
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "lib/uapi.h"
#include "lib/uffd.h"
#include "tests/kernel/area.h"
#include "tests/lib/arena.h"

#define PAGES 64u

static enum memferry_memory memory;

/* An arena whose userfaultfd stays open when the server ends. */
static int adopt_own(struct arena *a, const struct memferry_server_options *options,
                     const struct memferry_provider *provider)
{
    int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
    must(uffd >= 0);
    arena_map(a, memory, PAGES);
    must(memferry_server_new(options, &a->server) == 0);
    if (provider)
        must(memferry_server_set_provider(a->server, provider) == 0);
    a->context = memferry_context_adopt(a->server, uffd, getpid());
    must(a->context >= 0);
    arena_serve(a);
    return uffd;
}

static void unmap_last(void *argument)
{
    struct arena *a = argument;
    must(munmap(a->at + a->length_bytes - a->page_bytes, a->page_bytes) == 0);
}

/* A thread unmaps the last page and waits for its event to be read. */
static void start_unmapping(struct arena *a, int uffd, struct runner *runner)
{
    runner_start(runner, unmap_last, a);
    while (mf_uffd_event_pending(uffd) == 0)
        nap_ms(1);
    nap_ms(5);
}

static void fill_first(const struct arena *a)
{
    uint8_t *bytes = malloc(a->page_bytes);
    page_make(bytes, a->page_bytes, 0, 1);
    must(memferry_fill(a->server, a->region, 0, 1, bytes) == 0);
    free(bytes);
}

static void whoever_fills_reads_events_while_nobody_serves(void **state)
{
    (void)state;
    struct arena a;
    struct runner unmapper;
    int uffd = adopt_own(&a, NULL, PROVIDER(.want = make_page));
    assert_int_equal(memferry_server_start(a.server), 0);
    assert_int_equal(memferry_server_stop(a.server), 0);
    assert_int_equal(memferry_server_stop(a.server), 0);
    start_unmapping(&a, uffd, &unmapper);
    fill_first(&a);
    runner_join(&unmapper);
    assert_int_equal(memferry_server_start(a.server), 0);
    for (uint64_t page = 0; page + 1 < a.pages; page++)
        must(page_is(arena_page(&a, page), a.page_bytes, page, 1));
    arena_free(&a);
    close(uffd);
}

static void the_end_reads_what_nobody_has_read(void **state)
{
    (void)state;
    struct arena a;
    struct runner unmapper;
    int uffd = adopt_own(&a, NULL, NULL);
    start_unmapping(&a, uffd, &unmapper);
    arena_free(&a);
    runner_join(&unmapper);
    close(uffd);
}

/* ---- a provider that still fills when it is closed ---- */

struct closing {
    struct arena *arena;
    int uffd;
    struct runner unmapper;
};

static int never(void *arg, struct memferry_server *server, struct memferry_want *want)
{
    (void)arg;
    (void)server;
    (void)want;
    return MEMFERRY_LATER;
}

static void fill_while_closing(void *argument)
{
    struct closing *c = argument;
    runner_start(&c->unmapper, unmap_last, c->arena);
    nap_ms(20);
    fill_first(c->arena);
}

static void a_provider_may_fill_until_it_is_closed(void **state)
{
    (void)state;
    for (int end = MEMFERRY_END_LEAVE; end <= MEMFERRY_END_ZEROS; end++) {
        struct arena a;
        struct closing c = {.arena = &a};
        c.uffd =
            adopt_own(&a, NULL, PROVIDER(.want = never, .close = fill_while_closing, .arg = &c));
        assert_int_equal(memferry_server_start(a.server), 0);
        assert_int_equal(memferry_server_free(a.server, end), 0);
        close(c.uffd);
        runner_join(&c.unmapper);
        munmap(a.at, a.length_bytes);
        if (a.fd >= 0)
            close(a.fd);
    }
}

static void the_end_leaves_others_alone(void **state)
{
    (void)state;
    struct arena a, other;
    struct actor reader = {.act = ACT_READ};
    arena_map(&other, memory, 2);
    int uffd = mf_uffd_open();
    must(uffd >= 0 && mf_uffd_api(uffd, MF_UFFD_FEATURES, MF_UFFD_FEATURES_WANTED, NULL,
                                  &(struct mf_error){0}) == 0);
    must(range_register(uffd, other.at, other.length_bytes, UFFDIO_REGISTER_MODE_MISSING) == 0);
    arena_make(&a, memory, PAGES, NULL, PROVIDER(.want = make_page));
    arena_free(&a);
    reader.at = (char *)other.at;
    actor_start(&reader);
    assert_int_equal(next_message(uffd).event, UFFD_EVENT_PAGEFAULT);
    close(uffd);
    actor_finish(&reader);
    munmap(other.at, other.length_bytes);
    if (other.fd >= 0)
        close(other.fd);
}

/* ---- calls from callbacks ---- */

struct caller {
    struct arena *arena;
    _Atomic int fill, free, stop, region, told;
};

static void call_from_change(void *argument, const struct memferry_change *change)
{
    struct caller *c = argument;
    (void)change;
    static uint64_t bytes[(2 << 20) / 8];
    c->fill = memferry_fill(c->arena->server, 0, 0, 1, bytes);
    c->free = memferry_server_free(c->arena->server, MEMFERRY_END_ZEROS);
    c->stop = memferry_server_stop(c->arena->server);
    c->told = 1;
}

static int add_a_region(void *argument, struct memferry_server *server, struct memferry_want *want)
{
    struct caller *c = argument;
    c->region = memferry_region_add(
        server, &(struct memferry_region){.struct_bytes = sizeof(struct memferry_region),
                                          .memory = MEMFERRY_ANONYMOUS,
                                          .length_bytes = 4096});
    return make_page(NULL, server, want);
}

static void what_callbacks_may_not_do_is_refused(void **state)
{
    (void)state;
    struct arena a;
    struct caller c = {.arena = &a};
    arena_make(&a, memory, PAGES, OPTIONS(.arg = &c, .on_change = call_from_change),
               PROVIDER(.want = add_a_region, .arg = &c));
    memferry_server_start(a.server);
    must(page_is(arena_page(&a, 1), a.page_bytes, 1, 1));
    assert_int_equal(c.region, -EDEADLK);
    unmap_last(&a);
    while (!c.told)
        nap_ms(1);
    assert_int_equal(c.fill, -EDEADLK);
    assert_int_equal(c.free, -EDEADLK);
    assert_int_equal(c.stop, -EDEADLK);
    arena_free(&a);
}

/* ---- a loop that waits for the descriptor alone ---- */

struct patient {
    const struct arena *arena;
    int stop_fd;
};

static void serve_when_told(void *argument)
{
    const struct patient *p = argument;
    struct pollfd ready[2] = {{.fd = memferry_server_fd(p->arena->server), .events = POLLIN},
                              {.fd = p->stop_fd, .events = POLLIN}};
    while (poll(ready, 2, -1) > 0 && !ready[1].revents)
        must(memferry_server_run(p->arena->server, 0) >= 0);
}

static int fail_thrice(void *arg, struct memferry_server *server, struct memferry_want *want)
{
    _Atomic int *left = arg;
    return atomic_fetch_sub(left, 1) > 0 ? -EIO : make_page(NULL, server, want);
}

static void the_descriptor_says_when_there_is_something_to_do(void **state)
{
    (void)state;
    struct arena a;
    struct runner server;
    _Atomic int left = 3;
    int pipes[2];
    must(pipe(pipes) == 0);
    arena_make(&a, memory, PAGES, NULL, PROVIDER(.want = fail_thrice, .arg = &left));
    struct patient p = {&a, pipes[0]};
    runner_start(&server, serve_when_told, &p);
    must(page_is(arena_page(&a, 1), a.page_bytes, 1, 1));
    assert_int_equal(left, -1);
    close(pipes[1]);
    runner_join(&server);
    close(pipes[0]);
    arena_free(&a);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(whoever_fills_reads_events_while_nobody_serves),
        cmocka_unit_test(the_end_reads_what_nobody_has_read),
        cmocka_unit_test(a_provider_may_fill_until_it_is_closed),
        cmocka_unit_test(the_end_leaves_others_alone),
        cmocka_unit_test(what_callbacks_may_not_do_is_refused),
        cmocka_unit_test(the_descriptor_says_when_there_is_something_to_do),
    };
    return arena_tests(argc, argv, memory, tests);
}
