/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What changes of the source's layout mean for copies (daemon/mover/source/changes.h). */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "daemon/mover/source/changes.h"

#define PAGE UINT64_C(4096)
#define PAGES 8u
#define AT UINT64_C(0x100000)
#define TO UINT64_C(0x900000)

static struct mover mover;
static struct mf_session_file file;
static _Alignas(8) _Atomic uint8_t states[PAGES];
static struct changes changes;
static bool stays;

static bool still_there(void *arg, const struct mf_mapping *part)
{
    (void)arg;
    (void)part;
    return stays;
}

/* One region, mapped at AT. */
static int set_up(void **state)
{
    (void)state;
    const struct mf_mapping mapping = {.start_addr = AT, .length_bytes = PAGES * PAGE};
    memset(&mover, 0, sizeof(mover));
    memset(&file, 0, sizeof(file));
    memset((void *)states, 0, sizeof(states));
    mover.region_count = 1;
    mover.region[0] = (struct mf_region){
        .kind = MF_MEMORY_TMPFS, .page_bytes = PAGE, .pages = PAGES, .size_bytes = PAGES * PAGE};
    mover.view.pages[0] = (struct mf_pages){states, PAGES};
    mover.copies = &file.copies;
    mf_layout_set(&mover.layout, &mapping, 1);
    changes = (struct changes){.mover = &mover, .has_files = true, .is_still_there = still_there};
    stays = false;
    return 0;
}

static void learn(uint64_t addr, uint64_t offset_bytes, uint64_t length_bytes)
{
    struct mf_range dropped[2];
    mf_layout_learn(&mover.layout,
                    &(struct mf_mapping){.start_addr = addr,
                                         .length_bytes = length_bytes,
                                         .offset_bytes = offset_bytes},
                    dropped);
}

static void expect_stale(const char *expected)
{
    char found[PAGES + 1] = {0};
    for (unsigned i = 0; i < PAGES; i++)
        found[i] = states[i] & MF_PAGE_STALE ? 's' : '-';
    assert_string_equal(found, expected);
}

static bool is_known(uint64_t addr)
{
    struct mf_mapping m;
    return mf_layout_find(&mover.layout, 0, addr, &m);
}

static void an_unmap_marks_its_pages(void **state)
{
    (void)state;
    changes_unmapped(&changes, AT + 2 * PAGE, AT + 5 * PAGE);
    expect_stale("--sss---");
    assert_true(mf_copies_good(mover.copies));
}

static void an_unmap_of_the_unknown_is_doubted(void **state)
{
    (void)state;
    changes_unmapped(&changes, AT + 6 * PAGE, AT + 9 * PAGE);
    expect_stale("------ss");
    assert_false(mf_copies_good(mover.copies));
}

static void a_move_marks_nothing_and_explains_one_unmap(void **state)
{
    (void)state;
    learn(TO, 2 * PAGE, 3 * PAGE);
    changes_moved(&changes, AT + 2 * PAGE, TO, 3 * PAGE);
    assert_true(is_known(TO) && is_known(AT) && !is_known(AT + 2 * PAGE));
    changes_unmapped(&changes, AT + 2 * PAGE, AT + 5 * PAGE);
    expect_stale("--------");
    assert_true(mf_copies_good(mover.copies));
    changes_unmapped(&changes, AT + 2 * PAGE, AT + 5 * PAGE);
    assert_false(mf_copies_good(mover.copies));
}

static void what_was_moved_on_before_the_look_is_marked(void **state)
{
    (void)state;
    changes_moved(&changes, AT + 2 * PAGE, TO, 3 * PAGE);
    expect_stale("--sss---");
    /* A part of it, or other pages. */
    set_up(NULL);
    learn(TO, 2 * PAGE, PAGE);
    changes_moved(&changes, AT + 2 * PAGE, TO, 3 * PAGE);
    expect_stale("--sss---");
    set_up(NULL);
    learn(TO, 4 * PAGE, 3 * PAGE);
    changes_moved(&changes, AT + 2 * PAGE, TO, 3 * PAGE);
    expect_stale("--sss---");
}

static void what_stays_is_still_known(void **state)
{
    (void)state;
    stays = true; /* MREMAP_DONTUNMAP */
    learn(TO, 0, PAGES * PAGE);
    changes_moved(&changes, AT, TO, PAGES * PAGE);
    assert_true(is_known(AT) && is_known(TO));
    changes_unmapped(&changes, AT, AT + PAGES * PAGE);
    expect_stale("ssssssss");
    assert_true(mf_copies_good(mover.copies));
}

static void private_memory_is_marked_where_something_came(void **state)
{
    (void)state;
    mover.region[0].kind = MF_MEMORY_PRIVATE;
    changes_moved(&changes, TO, AT + 6 * PAGE, 4 * PAGE);
    expect_stale("------ss");
    changes_unmapped(&changes, AT, AT + PAGE); /* nothing is there, which the kernel tells */
    expect_stale("------ss");
}

static void a_race_with_protecting_is_doubted(void **state)
{
    (void)state;
    mover.protect_raced = true;
    changes_discarded(&changes, 0, 1, 2); /* moves nothing */
    assert_true(mf_copies_good(mover.copies));
    assert_true(states[1] & states[2] & MF_PAGE_REMOVED);
    changes_unmapped(&changes, AT, AT + PAGE);
    assert_false(mf_copies_good(mover.copies));
    assert_true(mover.layout_moves && !mover.protect_raced);
}

static void what_went_without_an_event_is_marked(void **state)
{
    (void)state;
    changes_gone(&changes, AT + 4 * PAGE, AT + PAGES * PAGE);
    expect_stale("----ssss");
    assert_true(is_known(AT) && !is_known(AT + 4 * PAGE));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup(an_unmap_marks_its_pages, set_up),
        cmocka_unit_test_setup(an_unmap_of_the_unknown_is_doubted, set_up),
        cmocka_unit_test_setup(a_move_marks_nothing_and_explains_one_unmap, set_up),
        cmocka_unit_test_setup(what_was_moved_on_before_the_look_is_marked, set_up),
        cmocka_unit_test_setup(what_stays_is_still_known, set_up),
        cmocka_unit_test_setup(private_memory_is_marked_where_something_came, set_up),
        cmocka_unit_test_setup(a_race_with_protecting_is_doubted, set_up),
        cmocka_unit_test_setup(what_went_without_an_event_is_marked, set_up),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
