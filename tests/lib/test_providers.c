/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The providers that come with libmemferry, and what becomes of pages that one can't give. Run once
 * for each kind of memory (argv[1]: shmem, hugetlb, anonymous).
 */
#include <errno.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cmocka.h>

#include "lib/uffd.h"
#include "proto/frame.h"
#include "tests/lib/arena.h"

#define PAGES ARENA_PAGES_MAX
#define THREADS 4u

static enum memferry_memory memory;

/* ---- snapshots ---- */

static int snapshot_file(const struct arena *a, uint64_t offset_bytes)
{
    int fd = memfd_create("memferry-snapshot", MFD_CLOEXEC);
    uint8_t *bytes = malloc(a->page_bytes);
    must(fd >= 0);
    for (uint64_t page = 0; page < a->pages; page++) {
        if (every_third(page))
            continue; /* a hole */
        page_make(bytes, a->page_bytes, page, 1);
        must(pwrite(fd, bytes, a->page_bytes, (off_t)(offset_bytes + page * a->page_bytes)) ==
             (ssize_t)a->page_bytes);
    }
    free(bytes);
    return fd;
}

static void a_snapshot_is_restored_as_it_is_touched(void **state)
{
    (void)state;
    for (uint32_t around = 0; around <= 16; around += 16) {
        struct arena a;
        struct toucher threads[THREADS];
        struct memferry_provider provider = {.struct_bytes = sizeof(provider)};
        arena_map(&a, memory, PAGES);
        int snapshot = snapshot_file(&a, 3 * a.page_bytes);
        assert_int_equal(memferry_provider_file(
                             &(struct memferry_file){.struct_bytes = sizeof(struct memferry_file),
                                                     .fd = snapshot,
                                                     .offset_bytes = 3 * a.page_bytes,
                                                     .length_bytes = around ? a.length_bytes : 0},
                             1, &provider),
                         0);
        close(snapshot);
        assert_int_equal(memferry_server_new(OPTIONS(.around_pages = around), &a.server), 0);
        assert_int_equal(memferry_server_set_provider(a.server, &provider), 0);
        arena_watch(&a);
        memferry_server_start(a.server);
        touch_by(threads, THREADS, &a, every_third);
        join_all(threads, THREADS);
        arena_free(&a);
    }
}

static _Atomic int bad_page;
static int tell_bad_page(void *arg, const struct memferry_failure *failure)
{
    (void)arg;
    must(failure->error == -EIO);
    bad_page = (int)failure->first_page;
    return MEMFERRY_HOLD;
}

static void touch_bad_page(void *argument)
{
    const struct arena *a = argument;
    must(page_is_zero(arena_page(a, 5), a->page_bytes));
}

static void a_snapshot_that_is_cut_off_gives_no_zeros(void **state)
{
    (void)state;
    struct arena a;
    struct runner toucher;
    struct memferry_provider provider = {.struct_bytes = sizeof(provider)};
    arena_map(&a, memory, PAGES);
    int snapshot = snapshot_file(&a, 0);
    struct memferry_file file = {
        .struct_bytes = sizeof(file), .fd = snapshot, .length_bytes = (a.pages + 1) * a.page_bytes};
    assert_int_equal(memferry_provider_file(&file, 1, &provider), -EINVAL);
    file.length_bytes = 0;
    assert_int_equal(memferry_provider_file(&file, 1, &provider), 0);
    assert_int_equal(
        memferry_server_new(OPTIONS(.around_pages = 16, .on_failure = tell_bad_page), &a.server),
        0);
    assert_int_equal(memferry_server_set_provider(a.server, &provider), 0);
    arena_watch(&a);
    bad_page = 0;
    memferry_server_start(a.server);
    must(ftruncate(snapshot, (off_t)(5 * a.page_bytes)) == 0);
    must(page_is(arena_page(&a, 4), a.page_bytes, 4, 1)); /* in spite of its neighbour */
    runner_start(&toucher, touch_bad_page, &a);
    while (bad_page != 5)
        nap_ms(1);
    assert_int_equal(memferry_page_state(a.server, a.region, 5), MEMFERRY_PAGE_MISSING);
    assert_int_equal(memferry_fill_zero(a.server, a.region, 5, 1), 0);
    runner_join(&toucher);
    close(snapshot);
    arena_free(&a);
}

/* ---- a peer ---- */

struct peer {
    int fd;
    const struct arena *arena;
    unsigned answers; /* hang up after so many, 0: never */
    bool unasked;     /* send neighbours too */
};

static bool send_all(int fd, const void *data, size_t length_bytes)
{
    const uint8_t *at = data;
    while (length_bytes > 0) {
        ssize_t n = send(fd, at, length_bytes, MSG_NOSIGNAL);
        if (n <= 0)
            return false;
        at += n;
        length_bytes -= (size_t)n;
    }
    return true;
}

static void answer_peer(void *argument)
{
    struct peer *p = argument;
    const struct arena *a = p->arena;
    uint8_t header[MF_FRAME_HEADER_BYTES], *bytes = malloc(a->page_bytes);
    struct mf_frame frame;
    const char *why;
    for (unsigned answered = 1;
         recv(p->fd, header, sizeof(header), MSG_WAITALL) == (ssize_t)sizeof(header); answered++) {
        must(mf_frame_decode(header, &frame, &why) == 0 && frame.type == MF_FRAME_REQUEST);
        uint64_t pages = p->unasked && frame.first_page + 2 <= a->pages ? 2 : 1;
        for (uint64_t page = frame.first_page; page < frame.first_page + pages; page++) {
            const bool zero = every_third(page);
            mf_frame_encode(&(struct mf_frame){.type = zero ? MF_FRAME_ZERO : MF_FRAME_DATA,
                                               .region = frame.region,
                                               .first_page = page,
                                               .pages = 1,
                                               .length_bytes = zero ? 0 : a->page_bytes},
                            header);
            page_make(bytes, a->page_bytes, page, 1);
            /* The last answer breaks off in the middle of a page. */
            const bool last = p->answers && answered == p->answers;
            if (!send_all(p->fd, header, sizeof(header)) ||
                (!zero && !send_all(p->fd, bytes, last ? a->page_bytes / 2 : a->page_bytes)))
                break;
            if (last) {
                shutdown(p->fd, SHUT_RDWR);
                break;
            }
        }
    }
    close(p->fd);
    free(bytes);
}

static _Atomic int times_lost;
static void count_lost(void *arg, int error)
{
    (void)arg;
    must(error == -ECONNRESET || error == -EPROTO);
    atomic_fetch_add(&times_lost, 1);
}

static void pages_come_from_a_peer_and_from_the_next_when_it_is_lost(void **state)
{
    (void)state;
    struct arena a;
    struct toucher threads[THREADS];
    struct memferry_provider provider = {.struct_bytes = sizeof(provider)};
    int pair[2];
    atomic_store(&times_lost, 0);
    arena_map(&a, memory, PAGES);
    assert_int_equal(memferry_server_new(NULL, &a.server), 0);
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair), 0);
    assert_int_equal(memferry_provider_peer(a.server, pair[0], count_lost, NULL, &provider), 0);
    close(pair[0]);
    assert_int_equal(memferry_peer_reconnect(&provider, pair[1]), -EALREADY);
    assert_int_equal(memferry_server_set_provider(a.server, &provider), 0);
    arena_watch(&a);
    memferry_server_start(a.server);
    struct peer peers[3] = {{pair[1], &a, a.pages > 8 ? 50 : 2, false}};
    struct runner runners[3];
    runner_start(&runners[0], answer_peer, &peers[0]);
    touch_by(threads, THREADS, &a, every_third);
    /* Twice the connection breaks with somebody waiting; the second one lies, the third is good. */
    for (int i = 1; i < 3; i++) {
        while (atomic_load(&times_lost) < i)
            nap_ms(1);
        assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair), 0);
        assert_int_equal(memferry_peer_reconnect(&provider, pair[0]), 0);
        close(pair[0]);
        if (i == 1) {
            uint8_t header[MF_FRAME_HEADER_BYTES];
            mf_frame_encode(&(struct mf_frame){.type = MF_FRAME_DATA,
                                               .first_page = 0,
                                               .pages = 1,
                                               .length_bytes = a.page_bytes / 2},
                            header);
            must(send_all(pair[1], header, sizeof(header)));
            nap_ms(5);
            close(pair[1]);
            runner_join(&runners[0]);
        } else {
            peers[2] = (struct peer){pair[1], &a, 0, true};
            runner_start(&runners[2], answer_peer, &peers[2]);
        }
    }
    join_all(threads, THREADS);
    arena_free(&a);
    runner_join(&runners[2]);
}

/* ---- a provider that fails ---- */

struct failing {
    _Atomic int left, told;
    int remedy;
};

static int fail_first(void *arg, struct memferry_server *server, struct memferry_want *want)
{
    struct failing *f = arg;
    if (atomic_fetch_sub(&f->left, 1) > 0)
        return -EIO;
    return make_page(NULL, server, want);
}

static int tell_failure(void *arg, const struct memferry_failure *failure)
{
    struct failing *f = arg;
    must(failure->error == -EIO);
    atomic_fetch_add(&f->told, 1);
    return f->remedy;
}

static void a_provider_that_fails_is_asked_again(void **state)
{
    (void)state;
    struct arena a;
    struct toucher threads[THREADS];
    struct failing f = {.left = 5, .remedy = MEMFERRY_AGAIN};
    arena_make(&a, memory, PAGES, OPTIONS(.arg = &f, .on_failure = tell_failure),
               PROVIDER(.want = fail_first, .arg = &f));
    memferry_server_start(a.server);
    touch_by(threads, THREADS, &a, NULL);
    join_all(threads, THREADS);
    assert_int_equal(f.told, 5);
    arena_free(&a);
}

static void who_waits_may_be_held_until_somebody_fills(void **state)
{
    (void)state;
    struct arena a;
    struct toucher threads[THREADS];
    struct failing f = {.left = (int)PAGES, .remedy = MEMFERRY_HOLD};
    struct filler filler;
    arena_make(&a, memory, PAGES, OPTIONS(.arg = &f, .on_failure = tell_failure),
               PROVIDER(.want = fail_first, .arg = &f));
    memferry_server_start(a.server);
    touch_by(threads, THREADS, &a, NULL);
    while (f.told == 0)
        nap_ms(1);
    filler = (struct filler){.arena = &a, .seed = 3};
    fill_all(&filler);
    join_all(threads, THREADS);
    arena_free(&a);
}

static sigjmp_buf bus;
static void on_bus(int number)
{
    (void)number;
    siglongjmp(bus, 1);
}

static bool kernel_poisons(void)
{
    uint64_t features = 0;
    struct mf_error err;
    return mf_uffd_features(&features, &err) == 0 && (features & UFFD_FEATURE_POISON);
}

/* Does it die who touches this page? */
static bool dies(const struct arena *a, uint64_t page)
{
    volatile bool died = false;
    signal(SIGBUS, on_bus);
    if (sigsetjmp(bus, 1) == 0)
        (void)*(volatile uint64_t *)arena_page(a, page);
    else
        died = true;
    signal(SIGBUS, SIG_DFL);
    return died;
}

static void a_page_that_cannot_be_had_may_be_poisoned(void **state)
{
    (void)state;
    struct arena a;
    struct failing f = {.left = 4, .remedy = MEMFERRY_POISON};
    if (!kernel_poisons())
        skip();
    arena_make(&a, memory, PAGES, OPTIONS(.arg = &f, .on_failure = tell_failure),
               PROVIDER(.want = fail_first, .arg = &f));
    memferry_server_start(a.server);
    for (uint64_t page = 1; page < 5; page++)
        assert_true(dies(&a, page));
    assert_true(dies(&a, 1));
    must(page_is(arena_page(&a, 5), a.page_bytes, 5, 1));
    /* Somebody has found it after all, or knows that it is zeros. */
    uint8_t *bytes = malloc(a.page_bytes);
    page_make(bytes, a.page_bytes, 1, 1);
    assert_int_equal(memferry_fill(a.server, a.region, 1, 1, bytes), 0);
    free(bytes);
    must(page_is(arena_page(&a, 1), a.page_bytes, 1, 1));
    assert_int_equal(memferry_fill_zero(a.server, a.region, 2, 1), 0);
    must(page_is_zero(arena_page(&a, 2), a.page_bytes));
    assert_int_equal(memory == MEMFERRY_ANONYMOUS ? memferry_fill_zero(a.server, a.region, 3, 3)
                                                  : memferry_fill_present(a.server, a.region, 2, 2),
                     0);
    must(page_is_zero(arena_page(&a, 3), a.page_bytes));
    if (memory != MEMFERRY_ANONYMOUS)
        assert_int_equal(memferry_discard(a.server, a.region, 4, 2), 0);
    must(page_is_zero(arena_page(&a, 4), a.page_bytes));
    arena_free(&a);
}

struct unmapper {
    struct failing failing;
    struct arena *arena;
    struct runner runner;
};

static void unmap_last(void *argument)
{
    const struct arena *a = argument;
    must(munmap(a->at + a->length_bytes - a->page_bytes, a->page_bytes) == 0);
}

static int fail_while_an_event_waits(void *arg, struct memferry_server *server,
                                     struct memferry_want *want)
{
    struct unmapper *u = arg;
    (void)server;
    (void)want;
    runner_start(&u->runner, unmap_last, u->arena);
    nap_ms(30); /* it waits for this thread to read its event */
    return -EIO;
}

static void poison_waits_for_an_event_to_be_read(void **state)
{
    (void)state;
    struct arena a;
    struct unmapper u = {.failing.remedy = MEMFERRY_POISON, .arena = &a};
    if (!kernel_poisons())
        skip();
    arena_make(&a, memory, PAGES, OPTIONS(.arg = &u.failing, .on_failure = tell_failure),
               PROVIDER(.want = fail_while_an_event_waits, .arg = &u));
    memferry_server_start(a.server);
    assert_true(dies(&a, 1));
    assert_int_equal(u.failing.told, 1);
    runner_join(&u.runner);
    assert_int_equal(memferry_fill_zero(a.server, a.region, 0, 3), 0);
    must(page_is_zero(arena_page(&a, 1), a.page_bytes));
    arena_free(&a);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_snapshot_is_restored_as_it_is_touched),
        cmocka_unit_test(a_snapshot_that_is_cut_off_gives_no_zeros),
        cmocka_unit_test(pages_come_from_a_peer_and_from_the_next_when_it_is_lost),
        cmocka_unit_test(a_provider_that_fails_is_asked_again),
        cmocka_unit_test(who_waits_may_be_held_until_somebody_fills),
        cmocka_unit_test(a_page_that_cannot_be_had_may_be_poisoned),
        cmocka_unit_test(poison_waits_for_an_event_to_be_read),
    };
    return arena_tests(argc, argv, memory, tests);
}
