/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* When are copies that precopy rounds have made worth anything (lib/copies.h)? */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "lib/copies.h"

static void good_until_doubted(void **state)
{
    (void)state;
    struct mf_copies copies = {0};
    assert_true(mf_copies_good(&copies));
    assert_string_equal(mf_copies_why(&copies), "");
    mf_copies_doubt(&copies, MF_DOUBT_GONE);
    assert_false(mf_copies_good(&copies));
    assert_true(strlen(mf_copies_why(&copies)) > 0);
}

static void a_whole_round_settles(void **state)
{
    (void)state;
    struct mf_copies copies = {0};
    mf_copies_doubt(&copies, MF_DOUBT_GONE);
    uint32_t round = mf_copies_round(&copies);
    assert_false(mf_copies_good(&copies)); /* not before its end */
    assert_true(mf_copies_settle(&copies, round));
    assert_true(mf_copies_good(&copies));
}

static void a_doubt_within_the_round_is_not_settled_by_it(void **state)
{
    (void)state;
    struct mf_copies copies = {0};
    uint32_t round = mf_copies_round(&copies);
    mf_copies_doubt(&copies, MF_DOUBT_MOVED);
    assert_false(mf_copies_settle(&copies, round));
    assert_true(mf_copies_settle(&copies, mf_copies_round(&copies)));
}

/* A round settles nothing that a writer saw the begin, the middle or the end of. */
static void a_writer_puts_every_round_in_doubt_that_he_meets(void **state)
{
    (void)state;
    struct mf_copies copies = {0};
    mf_copies_writer(&copies, true, MF_DOUBT_FORK);
    uint32_t round = mf_copies_round(&copies);
    assert_false(mf_copies_settle(&copies, round)); /* he is still there */
    round = mf_copies_round(&copies);
    mf_copies_writer(&copies, false, MF_DOUBT_FORK);
    assert_false(mf_copies_settle(&copies, round)); /* he was there when it began */
    round = mf_copies_round(&copies);
    mf_copies_writer(&copies, true, MF_DOUBT_FORK);
    mf_copies_writer(&copies, false, MF_DOUBT_FORK);
    assert_false(mf_copies_settle(&copies, round)); /* he came and went within it */
    assert_true(mf_copies_settle(&copies, mf_copies_round(&copies)));
}

static void of_two_writers_both_must_go(void **state)
{
    (void)state;
    struct mf_copies copies = {0};
    mf_copies_writer(&copies, true, MF_DOUBT_FORK);
    mf_copies_writer(&copies, true, MF_DOUBT_UNWATCHED);
    mf_copies_writer(&copies, false, MF_DOUBT_FORK);
    assert_false(mf_copies_settle(&copies, mf_copies_round(&copies)));
    mf_copies_writer(&copies, false, MF_DOUBT_UNWATCHED);
    assert_true(mf_copies_settle(&copies, mf_copies_round(&copies)));
}

/* The file is written by a mover. */
static void any_number_is_a_reason(void **state)
{
    (void)state;
    struct mf_copies copies = {.why = UINT32_MAX};
    assert_string_equal(mf_copies_why(&copies), "");
    for (uint32_t why = MF_DOUBT_NONE + 1; why < MF_DOUBTS; why++) {
        copies.why = why;
        assert_true(strlen(mf_copies_why(&copies)) > 20);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(good_until_doubted),
        cmocka_unit_test(a_whole_round_settles),
        cmocka_unit_test(a_doubt_within_the_round_is_not_settled_by_it),
        cmocka_unit_test(a_writer_puts_every_round_in_doubt_that_he_meets),
        cmocka_unit_test(of_two_writers_both_must_go),
        cmocka_unit_test(any_number_is_a_reason),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
