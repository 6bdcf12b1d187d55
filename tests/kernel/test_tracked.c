/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What becomes of the marks by which written pages are told (test_writes.c), and of the watching,
 * when a mapping is moved, unmapped, made a second time or inherited by a child. With the argument
 * "hugetlb" the same on huge pages, where they can be reserved.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "lib/pagemap.h"
#include "lib/uffd.h"
#include "lib/util.h"
#include "tests/kernel/area.h"
#include "tests/kernel/fact.h"

#define PAGES 6u
#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4
#endif

static enum area_kind kind;
static struct area area;
static int pagemap_fd;

static void track(uint64_t features)
{
    struct mf_error err;
    area_make(&area, kind, PAGES);
    close(area.uffd);
    area.uffd = mf_uffd_open();
    assert_true(area.uffd >= 0);
    assert_int_equal(mf_uffd_api(area.uffd, features, 0, NULL, &err), 0);
    pagemap_fd = mf_pagemap_open((int)getpid(), &err);
    assert_true(pagemap_fd >= 0);
    for (size_t i = 0; i < PAGES; i++)
        page_of(&area, i)[0] = 'b';
    assert_int_equal(mf_uffd_register_wp(area.uffd, (uintptr_t)area.guest, area.length_bytes, &err),
                     0);
}

static void untrack(void)
{
    close(pagemap_fd);
    close(area.uffd); /* before it would have to be told of the rest */
    area.uffd = open("/dev/null", O_RDONLY | O_CLOEXEC);
    area_free(&area);
}

static int protect(const char *at, size_t pages)
{
    return mf_uffd_protect(area.uffd, (uintptr_t)at, pages * area.page_bytes);
}

/* @written: a letter a page: w or - */
static void expect_written(const char *at, const char *written)
{
    uint8_t seen[PAGES];
    char found[PAGES + 1] = {0};
    const size_t pages = strlen(written);
    assert_int_equal(
        mf_pagemap_scan(pagemap_fd, (uintptr_t)at, pages * area.page_bytes, area.page_bytes, seen),
        0);
    for (size_t i = 0; i < pages; i++)
        found[i] = seen[i] & MF_PAGEMAP_WRITTEN ? 'w' : '-';
    assert_string_equal(found, written);
}

static int scan(const char *at)
{
    uint8_t seen[PAGES];
    return mf_pagemap_scan(pagemap_fd, (uintptr_t)at, area.length_bytes, area.page_bytes, seen);
}

static void expect_event(int uffd, unsigned event)
{
    assert_int_equal(next_message(uffd).event, event);
}

/* Somewhere with room, and on a boundary of huge pages. */
static char *reserve(void)
{
    const size_t huge_bytes = area.page_bytes;
    char *at =
        mmap(NULL, area.length_bytes + huge_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    assert_true(at != MAP_FAILED);
    return (char *)(((uintptr_t)at + huge_bytes - 1) / huge_bytes * huge_bytes);
}

static long call_move(struct actor *actor)
{
    const int flags = MREMAP_MAYMOVE | MREMAP_FIXED | (actor->context ? MREMAP_DONTUNMAP : 0);
    return mremap(actor->at, actor->length_bytes, actor->length_bytes, flags, actor->to) ==
                   actor->to
               ? 0
               : -1;
}

static void a_move_takes_the_marks_along(void **state)
{
    (void)state;
    track(MF_UFFD_FEATURES_WP_EVENTS);
    char *to = reserve();
    struct actor mover = {.act = ACT_CALL,
                          .call = call_move,
                          .at = area.guest,
                          .length_bytes = area.length_bytes,
                          .to = to};
    assert_int_equal(protect(area.guest, PAGES), 0);
    page_of(&area, 2)[0] = 'w';
    actor_start(&mover);
    expect_event(area.uffd, UFFD_EVENT_REMAP);
    expect_event(area.uffd, UFFD_EVENT_UNMAP);
    actor_finish(&mover);
    assert_int_equal(mover.rc, 0);
    expect_written(to, "--w---");
    to[4 * area.page_bytes] = 'w';
    expect_written(to, "--w-w-");
    expect_written(area.guest, "wwwwww"); /* nothing is mapped there */
    area.guest = to;
    untrack();
}

static void without_event_remap_a_moved_mapping_is_not_tracked(void **state)
{
    (void)state;
    track(MF_UFFD_FEATURES_WP);
    char *to = reserve();
    assert_int_equal(protect(area.guest, PAGES), 0);
    assert_true(mremap(area.guest, area.length_bytes, area.length_bytes,
                       MREMAP_MAYMOVE | MREMAP_FIXED, to) == to);
    assert_int_equal(scan(to), -EPERM);
    area.guest = to;
    untrack();
}

/** The pages go along; where they were all count as written. */
static void what_dontunmap_leaves_counts_as_written(void **state)
{
    (void)state;
    track(MF_UFFD_FEATURES_WP_EVENTS);
    char *to = reserve();
    struct actor mover = {.act = ACT_CALL,
                          .call = call_move,
                          .at = area.guest,
                          .context = &mover,
                          .length_bytes = area.length_bytes,
                          .to = to};
    assert_int_equal(protect(area.guest, PAGES), 0);
    page_of(&area, 2)[0] = 'w';
    actor_start(&mover);
    if (kind == AREA_SHMEM) {
        expect_event(area.uffd, UFFD_EVENT_REMAP);
        actor_finish(&mover);
        assert_int_equal(mover.rc, 0);
        expect_written(to, "--w---");
        expect_written(area.guest, "wwwwww");
    } else {
        actor_finish(&mover);
        assert_int_equal(mover.rc, -1); /* huge pages can't */
        assert_int_equal(mover.code, EINVAL);
    }
    untrack();
}

/* Another mapping of the file, that is not registered. */
static char *map_again(void)
{
    char *at = reserve();
    map_at(at, area.length_bytes, MAP_SHARED, area.file);
    return at;
}

static void a_second_mapping_counts_as_written_until_it_is_protected(void **state)
{
    (void)state;
    struct mf_error err;
    track(MF_UFFD_FEATURES_WP_EVENTS);
    char *again = map_again();
    again[0] = 'w';
    assert_int_equal(protect(area.guest, PAGES), 0);
    assert_int_equal(scan(again), -EPERM);
    assert_int_equal(mf_uffd_register_wp(area.uffd, (uintptr_t)again, area.length_bytes, &err), 0);
    expect_written(again, "wwwwww");
    expect_written(area.guest, "------");
    assert_int_equal(protect(again, PAGES), 0);
    expect_written(again, "------");
    again[3 * area.page_bytes] = 'w';
    expect_written(again, "---w--");
    expect_written(area.guest, "------");
    untrack();
}

static void what_was_written_through_an_unmapped_mapping_is_forgotten(void **state)
{
    (void)state;
    struct mf_error err;
    track(MF_UFFD_FEATURES_WP_EVENTS);
    char *again = map_again();
    assert_int_equal(mf_uffd_register_wp(area.uffd, (uintptr_t)again, area.length_bytes, &err), 0);
    assert_int_equal(protect(area.guest, PAGES), 0);
    assert_int_equal(protect(again, PAGES), 0);
    again[3 * area.page_bytes] = 'w';
    struct actor unmapper = {.act = ACT_UNMAP, .at = again, .length_bytes = area.length_bytes};
    actor_start(&unmapper);
    expect_event(area.uffd, UFFD_EVENT_UNMAP);
    actor_finish(&unmapper);
    expect_written(area.guest, "------");
    assert_int_equal(page_of(&area, 3)[0], 'w');
    /* Nor does a mapping that is made there again know of it; but nothing of it is protected. */
    map_at(again, area.length_bytes, MAP_SHARED, area.file);
    assert_int_equal(mf_uffd_register_wp(area.uffd, (uintptr_t)again, area.length_bytes, &err), 0);
    expect_written(again, "wwwwww");
    untrack();
}

static void a_tail_that_grew_in_place_counts_as_written(void **state)
{
    (void)state;
    track(MF_UFFD_FEATURES_WP_EVENTS);
    assert_int_equal(protect(area.guest, PAGES), 0);
    struct actor unmapper = {
        .act = ACT_UNMAP, .at = page_of(&area, 3), .length_bytes = 3 * area.page_bytes};
    actor_start(&unmapper);
    expect_event(area.uffd, UFFD_EVENT_UNMAP);
    actor_finish(&unmapper);
    if (mremap(area.guest, 3 * area.page_bytes, area.length_bytes, 0) == MAP_FAILED) {
        assert_true(kind == AREA_HUGETLB); /* which can't grow */
    } else {
        assert_true(no_message(area.uffd));
        expect_written(area.guest, "---www");
        assert_int_equal(protect(area.guest, PAGES), 0); /* it is watched */
        expect_written(area.guest, "------");
        page_of(&area, 5)[0] = 'w';
        expect_written(area.guest, "-----w");
    }
    untrack();
}

/* ------------------------------------------------------------------------------------ children */

static long call_fork_and_write(struct actor *actor)
{
    pid_t pid = fork();
    if (pid == 0) {
        actor->at[0] = 'c';
        _exit(0);
    }
    int status = 0;
    return pid > 0 && waitpid(pid, &status, 0) == pid ? status : -1;
}

static void a_child_writes_unseen(void **state)
{
    (void)state;
    track(MF_UFFD_FEATURES_WP_EVENTS);
    assert_int_equal(protect(area.guest, PAGES), 0);
    struct actor forker = {.act = ACT_CALL, .call = call_fork_and_write, .at = page_of(&area, 1)};
    actor_start(&forker);
    struct uffd_msg message = next_message(area.uffd);
    assert_int_equal(message.event, UFFD_EVENT_FORK);
    cleanup_close int childs = (int)message.arg.fork.ufd;
    actor_finish(&forker);
    assert_int_equal(forker.rc, 0);
    assert_int_equal(page_of(&area, 1)[0], 'c');
    expect_written(area.guest, "------");
    assert_false(mf_uffd_alive(childs));
    assert_true(mf_uffd_alive(area.uffd));
    untrack();
}

static void closing_a_childs_userfaultfd_lets_it_write_unhindered(void **state)
{
    (void)state;
    track(MF_UFFD_FEATURES_WP_EVENTS);
    assert_int_equal(protect(area.guest, PAGES), 0);
    struct actor forker = {.act = ACT_CALL, .call = call_fork_and_write, .at = page_of(&area, 1)};
    actor_start(&forker);
    struct uffd_msg message = next_message(area.uffd);
    assert_int_equal(message.event, UFFD_EVENT_FORK);
    close((int)message.arg.fork.ufd);
    actor_finish(&forker);
    assert_int_equal(forker.rc, 0);
    assert_int_equal(page_of(&area, 1)[0], 'c');
    untrack();
}

static long call_fork_and_leave(struct actor *actor)
{
    (void)actor;
    pid_t pid = fork();
    if (pid == 0)
        _exit(0);
    int status = 0;
    return pid > 0 && waitpid(pid, &status, 0) == pid ? status : -1;
}

static void memory_that_children_do_not_get_tells_no_fork(void **state)
{
    (void)state;
    track(MF_UFFD_FEATURES_WP_EVENTS);
    assert_int_equal(madvise(area.guest, area.length_bytes, MADV_DONTFORK), 0);
    struct actor forker = {.act = ACT_CALL, .call = call_fork_and_leave};
    actor_start(&forker);
    actor_finish(&forker);
    assert_int_equal(forker.rc, 0);
    assert_true(no_message(area.uffd));
    untrack();
}

/* -------------------------------------------------------------------------------------- events */

static void an_unread_event_stops_protecting_but_not_the_scan_that_protects(void **state)
{
    (void)state;
    uint8_t seen[PAGES];
    track(MF_UFFD_FEATURES_WP_EVENTS);
    struct actor giver = {
        .act = ACT_DONTNEED, .at = page_of(&area, 5), .length_bytes = area.page_bytes};
    actor_start(&giver);
    await_readable(area.uffd);
    assert_int_equal(protect(area.guest, PAGES), -EAGAIN);
    expect_written(area.guest, "wwwwww");
    assert_int_equal(mf_pagemap_protect(pagemap_fd, (uintptr_t)area.guest, 3 * area.page_bytes,
                                        area.page_bytes, seen),
                     0);
    expect_written(area.guest, "---www");
    assert_int_equal(mf_uffd_event_pending(area.uffd), 1);
    expect_event(area.uffd, UFFD_EVENT_REMOVE);
    actor_finish(&giver);
    untrack();
}

/** The mapping loses the page, the file keeps it: so it need not be copied again. */
static void dontneed_keeps_the_mark(void **state)
{
    (void)state;
    track(MF_UFFD_FEATURES_WP_EVENTS);
    assert_int_equal(protect(area.guest, PAGES), 0);
    page_of(&area, 2)[0] = 'w';
    struct actor giver = {
        .act = ACT_DONTNEED, .at = page_of(&area, 1), .length_bytes = 2 * area.page_bytes};
    actor_start(&giver);
    expect_event(area.uffd, UFFD_EVENT_REMOVE);
    actor_finish(&giver);
    expect_written(area.guest, "--w---");
    assert_int_equal(page_of(&area, 1)[0], 'b');
    assert_int_equal(page_of(&area, 2)[0], 'w');
    expect_written(area.guest, "--w---");
    untrack();
}

/** What lies at a place is another page then, and does not count as written. */
static void private_memory_takes_its_marks_along(void **state)
{
    (void)state;
    struct mf_error err;
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | (kind == AREA_HUGETLB ? MAP_HUGETLB : 0);
    track(MF_UFFD_FEATURES_WP_EVENTS);
    char *from = reserve(), *to = reserve();
    map_at(from, area.page_bytes, flags, -1);
    map_at(to, area.page_bytes, flags, -1);
    from[0] = 'f';
    to[0] = 't';
    assert_int_equal(mf_uffd_register_wp(area.uffd, (uintptr_t)from, area.page_bytes, &err), 0);
    assert_int_equal(mf_uffd_register_wp(area.uffd, (uintptr_t)to, area.page_bytes, &err), 0);
    assert_int_equal(protect(from, 1), 0);
    assert_int_equal(protect(to, 1), 0);
    struct actor mover = {
        .act = ACT_CALL, .call = call_move, .at = from, .length_bytes = area.page_bytes, .to = to};
    actor_start(&mover);
    expect_event(area.uffd, UFFD_EVENT_UNMAP);
    expect_event(area.uffd, UFFD_EVENT_REMAP);
    expect_event(area.uffd, UFFD_EVENT_UNMAP);
    actor_finish(&mover);
    assert_int_equal(mover.rc, 0);
    assert_int_equal(to[0], 'f');
    expect_written(to, "-");
    untrack();
}

int main(int argc, char **argv)
{
    static const struct fact facts[] = {
        FACT(a_move_takes_the_marks_along),
        FACT(without_event_remap_a_moved_mapping_is_not_tracked),
        FACT(what_dontunmap_leaves_counts_as_written),
        FACT(a_second_mapping_counts_as_written_until_it_is_protected),
        FACT(what_was_written_through_an_unmapped_mapping_is_forgotten),
        FACT(a_tail_that_grew_in_place_counts_as_written),
        FACT(a_child_writes_unseen),
        FACT(closing_a_childs_userfaultfd_lets_it_write_unhindered),
        FACT(memory_that_children_do_not_get_tells_no_fork),
        FACT(an_unread_event_stops_protecting_but_not_the_scan_that_protects),
        FACT(dontneed_keeps_the_mark),
        FACT(private_memory_takes_its_marks_along),
    };
    if (argc > 1 && strcmp(argv[1], "hugetlb") == 0) {
        if (!huge_pages_reserve(PAGES + 2))
            return 77;
        kind = AREA_HUGETLB;
        argv[1] = argv[0];
        argc--;
        argv++;
    }
    return facts_main(argc, argv, facts, sizeof(facts) / sizeof(facts[0]),
                      MF_UFFD_FEATURES_WP_EVENTS);
}
