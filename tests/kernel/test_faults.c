/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Which faults are delivered and what lets a waiter go. With the argument "hugetlb" the same on
 * huge pages, where they can be reserved.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cmocka.h>

#include "lib/uffd.h"
#include "lib/util.h"
#include "tests/kernel/area.h"

#define PAGES 4

static enum area_kind kind;

/** expect_fault() - the next message is a fault of @actor; returns its flags. */
static uint64_t expect_fault(const struct area *area, const struct actor *actor)
{
    struct uffd_msg message = next_message(area->uffd);
    assert_int_equal(message.event, UFFD_EVENT_PAGEFAULT);
    uintptr_t mask = ~((uintptr_t)area->page_bytes - 1);
    assert_true(((uintptr_t)message.arg.pagefault.address & mask) == ((uintptr_t)actor->at & mask));
    return message.arg.pagefault.flags;
}

/** Not on a kernel that counts a fault for what no fault is due: it would hang the test. */
static void touch_without_fault(const struct area *area, size_t index, char expected)
{
    struct actor actor = {.act = ACT_READ, .at = page_of(area, index)};
    actor_start(&actor);
    actor_finish(&actor);
    assert_int_equal(actor.value, expected);
    assert_true(no_message(area->uffd));
}

static void a_hole_is_missing_a_page_is_minor(void **state)
{
    (void)state;
    struct area area;
    area_make(&area, kind, PAGES);
    area_register(&area, BOTH_MODES);
    put(&area, 1, 'm');

    struct actor hole = {.act = ACT_READ, .at = page_of(&area, 0) + 5};
    actor_start(&hole);
    assert_int_equal(expect_fault(&area, &hole) & UFFD_PAGEFAULT_FLAG_MINOR, 0);
    /* A MISSING fault, too, is resolved by landing the page in the second mapping and CONTINUE. */
    put(&area, 0, 'h');
    assert_int_equal(continue_pages(&area, 0, 1, NULL), 0);
    actor_finish(&hole);
    assert_int_equal(hole.value, 'h');

    struct actor page = {.act = ACT_WRITE, .at = page_of(&area, 1), .value = 'w'};
    actor_start(&page);
    uint64_t flags = expect_fault(&area, &page);
    assert_true((flags & UFFD_PAGEFAULT_FLAG_MINOR) && (flags & UFFD_PAGEFAULT_FLAG_WRITE));
    assert_int_equal(continue_pages(&area, 1, 1, NULL), 0);
    actor_finish(&page);
    assert_int_equal(area.second[area.page_bytes], 'w'); /* one page, seen from both sides */
    area_free(&area);
}

static void continue_maps_writable(void **state)
{
    (void)state;
    struct area area;
    area_make(&area, kind, PAGES);
    area_register(&area, BOTH_MODES);
    put(&area, 0, 'a');
    assert_int_equal(continue_pages(&area, 0, 1, NULL), 0);
    struct actor writer = {.act = ACT_WRITE, .at = page_of(&area, 0), .value = 'w'};
    actor_start(&writer);
    actor_finish(&writer);
    assert_true(no_message(area.uffd));
    area_free(&area);
}

static void after_dontneed_minor_after_a_punch_missing(void **state)
{
    (void)state;
    struct area area;
    area_make(&area, kind, PAGES);
    area_register(&area, BOTH_MODES);
    put(&area, 0, 'a');
    assert_int_equal(continue_pages(&area, 0, 1, NULL), 0);

    struct actor dropper = {.act = ACT_DONTNEED, .at = area.guest, .length_bytes = area.page_bytes};
    actor_start(&dropper);
    assert_int_equal(next_message(area.uffd).event, UFFD_EVENT_REMOVE);
    actor_finish(&dropper);
    assert_int_equal(dropper.rc, 0);

    struct actor reader = {.act = ACT_READ, .at = page_of(&area, 0)};
    actor_start(&reader);
    assert_true(expect_fault(&area, &reader) & UFFD_PAGEFAULT_FLAG_MINOR);
    assert_int_equal(continue_pages(&area, 0, 1, NULL), 0);
    actor_finish(&reader);
    assert_int_equal(reader.value, 'a');

    assert_int_equal(
        fallocate(area.file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, (off_t)area.page_bytes),
        0);
    actor_start(&reader);
    assert_int_equal(expect_fault(&area, &reader) & UFFD_PAGEFAULT_FLAG_MINOR, 0);
    put(&area, 0, 'b');
    assert_int_equal(continue_pages(&area, 0, 1, NULL), 0);
    actor_finish(&reader);
    assert_int_equal(reader.value, 'b');
    area_free(&area);
}

static void minor_alone_fills_holes_with_zeros(void **state)
{
    (void)state;
    struct area area;
    area_make(&area, kind, PAGES);
    area_register(&area, UFFDIO_REGISTER_MODE_MINOR);
    touch_without_fault(&area, 0, 0);
    area_free(&area);
}

static void registering_again_replaces_the_modes(void **state)
{
    (void)state;
    struct area area;
    area_make(&area, kind, PAGES);
    area_register(&area, UFFDIO_REGISTER_MODE_MISSING);
    area_register(&area, UFFDIO_REGISTER_MODE_MINOR);
    touch_without_fault(&area, 0, 0); /* MISSING is gone, without a word */
    area_free(&area);
}

static void what_was_touched_never_faults_until_punched(void **state)
{
    (void)state;
    struct area area;
    area_make(&area, kind, PAGES);
    area.guest[0] = 't';
    area_register(&area, BOTH_MODES);
    touch_without_fault(&area, 0, 't');

    assert_int_equal(fallocate(area.file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0,
                               (off_t)area.length_bytes),
                     0);
    struct actor reader = {.act = ACT_READ, .at = page_of(&area, 0)};
    actor_start(&reader);
    assert_int_equal(expect_fault(&area, &reader) & UFFD_PAGEFAULT_FLAG_MINOR, 0);
    put(&area, 0, 'n');
    assert_int_equal(continue_pages(&area, 0, 1, NULL), 0);
    actor_finish(&reader);
    assert_int_equal(reader.value, 'n');
    area_free(&area);
}

static void eexist_does_not_wake(void **state)
{
    (void)state;
    struct area area;
    area_make(&area, kind, PAGES);
    area_register(&area, BOTH_MODES);
    struct actor reader = {.act = ACT_READ, .at = page_of(&area, 0)};
    actor_start(&reader);
    expect_fault(&area, &reader);
    put(&area, 0, 'a');
    struct uffdio_continue quiet = {
        .range = {.start = (uintptr_t)area.guest, .len = area.page_bytes},
        .mode = UFFDIO_CONTINUE_MODE_DONTWAKE};
    assert_int_equal(ioctl_errno(area.uffd, UFFDIO_CONTINUE, &quiet), 0);
    assert_int_equal(continue_pages(&area, 0, 1, NULL), EEXIST);
    assert_true(actor_waits(&reader));
    assert_int_equal(mf_uffd_wake(area.uffd, (uintptr_t)area.guest, area.page_bytes), 0);
    actor_finish(&reader);
    assert_int_equal(reader.value, 'a');
    area_free(&area);
}

static void each_waiter_sends_a_message_one_continue_frees_all(void **state)
{
    (void)state;
    struct area area;
    struct actor readers[5];
    struct uffd_msg messages[16];
    area_make(&area, kind, PAGES);
    area_register(&area, BOTH_MODES);
    for (int i = 0; i < 5; i++) {
        readers[i] = (struct actor){.act = ACT_READ, .at = page_of(&area, i % 2 ? 0 : 1)};
        actor_start(&readers[i]);
    }
    await_pending(area.uffd, 5);
    /* One read(2) hands out all of them. */
    assert_int_equal(read(area.uffd, messages, sizeof(messages)), 5 * sizeof(messages[0]));
    put(&area, 0, 'a');
    put(&area, 1, 'a');
    assert_int_equal(continue_pages(&area, 0, 2, NULL), 0);
    for (int i = 0; i < 5; i++)
        actor_finish(&readers[i]);
    area_free(&area);
}

static void a_wake_over_all_brings_back_what_a_dead_reader_took(void **state)
{
    (void)state;
    struct area area;
    area_make(&area, kind, PAGES);
    area_register(&area, BOTH_MODES);
    struct actor readers[2] = {{.act = ACT_READ, .at = page_of(&area, 0)},
                               {.act = ACT_READ, .at = page_of(&area, 3)}};
    actor_start(&readers[0]);
    actor_start(&readers[1]);
    next_message(area.uffd);
    next_message(area.uffd); /* read, and whoever read them died */
    assert_true(no_message(area.uffd));
    assert_int_equal(mf_uffd_wake(area.uffd, (uintptr_t)area.guest, area.length_bytes), 0);
    await_pending(area.uffd, 2);
    next_message(area.uffd);
    next_message(area.uffd);
    put(&area, 0, 'a');
    put(&area, 3, 'b');
    assert_int_equal(continue_pages(&area, 0, 1, NULL), 0);
    assert_int_equal(continue_pages(&area, 3, 1, NULL), 0);
    actor_finish(&readers[0]);
    actor_finish(&readers[1]);
    assert_true(readers[0].value == 'a' && readers[1].value == 'b');
    area_free(&area);
}

static void the_last_close_hands_out_zeros_another_reference_holds(void **state)
{
    (void)state;
    struct area area;
    area_make(&area, kind, PAGES);
    area_register(&area, BOTH_MODES);
    int kept = dup(area.uffd); /* stands for the descriptor that stays open in the target */
    struct actor reader = {.act = ACT_READ, .at = page_of(&area, 0)};
    actor_start(&reader);
    expect_fault(&area, &reader);
    close(area.uffd);
    area.uffd = -1;
    assert_true(actor_waits(&reader));
    close(kept);
    actor_finish(&reader);
    assert_int_equal(reader.value, 0);
    area_free(&area);
}

static void unregistering_frees_waiters(void **state)
{
    (void)state;
    struct area area;
    area_make(&area, kind, PAGES);
    area_register(&area, BOTH_MODES);
    struct actor reader = {.act = ACT_READ, .at = page_of(&area, 0)};
    actor_start(&reader);
    expect_fault(&area, &reader);
    struct uffdio_range range = {.start = (uintptr_t)area.guest, .len = area.length_bytes};
    assert_int_equal(ioctl_errno(area.uffd, UFFDIO_UNREGISTER, &range), 0);
    actor_finish(&reader);

    /* Where MINOR stands alone the kernel does not wake; mf_uffd_unregister() does it itself. */
    area_register(&area, UFFDIO_REGISTER_MODE_MINOR);
    put(&area, 2, 'm');
    struct actor minor = {.act = ACT_READ, .at = page_of(&area, 2)};
    actor_start(&minor);
    expect_fault(&area, &minor);
    assert_int_equal(mf_uffd_unregister(area.uffd, (uintptr_t)area.guest, area.length_bytes), 0);
    actor_finish(&minor);
    assert_int_equal(minor.value, 'm');
    area_free(&area);
}

static void a_blocking_userfaultfd_polls_as_an_error(void **state)
{
    (void)state;
    struct area area;
    area_make(&area, kind, PAGES);
    struct pollfd ready = {.fd = area.uffd, .events = POLLIN};
    assert_int_equal(poll(&ready, 1, 0), 0);
    fcntl(area.uffd, F_SETFL, 0);
    assert_int_equal(poll(&ready, 1, 0), 1);
    assert_int_equal(ready.revents, POLLERR);
    area_free(&area);
}

static void hugetlb_has_no_zeropage_and_no_part_of_a_page(void **state)
{
    (void)state;
    struct area area;
    uint64_t done_bytes;
    area_make(&area, kind, PAGES);
    area_register(&area, BOTH_MODES);
    assert_int_equal(
        mf_uffd_zeropage(area.uffd, (uintptr_t)area.guest, area.page_bytes, &done_bytes), -EINVAL);
    put(&area, 0, 'a');
    assert_int_equal(mf_uffd_continue(area.uffd, (uintptr_t)area.guest, 4096, &done_bytes),
                     -EINVAL);
    assert_int_equal(
        mf_uffd_continue(area.uffd, (uintptr_t)area.guest, area.page_bytes, &done_bytes), 0);
    area_free(&area);
}

int main(int argc, char **argv)
{
    uint64_t features, wanted = MF_UFFD_FEATURES;
    struct mf_error err;
    if (argc > 1 && strcmp(argv[1], "hugetlb") == 0) {
        kind = AREA_HUGETLB;
        wanted |= UFFD_FEATURE_MISSING_HUGETLBFS | UFFD_FEATURE_MINOR_HUGETLBFS;
    }
    if (mf_uffd_features(&features, &err) < 0 || (features & wanted) != wanted) {
        fprintf(stderr, "skipped: userfaultfd with MINOR faults is not to be had here\n");
        return 77;
    }
    if (kind == AREA_HUGETLB && !huge_pages_reserve(PAGES))
        return 77;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_hole_is_missing_a_page_is_minor),
        cmocka_unit_test(continue_maps_writable),
        cmocka_unit_test(after_dontneed_minor_after_a_punch_missing),
        cmocka_unit_test(minor_alone_fills_holes_with_zeros),
        cmocka_unit_test(registering_again_replaces_the_modes),
        cmocka_unit_test(what_was_touched_never_faults_until_punched),
        cmocka_unit_test(eexist_does_not_wake),
        cmocka_unit_test(each_waiter_sends_a_message_one_continue_frees_all),
        cmocka_unit_test(a_wake_over_all_brings_back_what_a_dead_reader_took),
        cmocka_unit_test(the_last_close_hands_out_zeros_another_reference_holds),
        cmocka_unit_test(unregistering_frees_waiters),
        cmocka_unit_test(a_blocking_userfaultfd_polls_as_an_error),
    };
    const struct CMUnitTest hugetlb_tests[] = {
        cmocka_unit_test(hugetlb_has_no_zeropage_and_no_part_of_a_page),
    };
    if (kind == AREA_SHMEM)
        return cmocka_run_group_tests_name("faults, shmem", tests, NULL, NULL);
    return cmocka_run_group_tests_name("faults, hugetlb", tests, NULL, NULL) +
           cmocka_run_group_tests_name("hugetlb alone", hugetlb_tests, NULL, NULL);
}
