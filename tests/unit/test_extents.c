/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Sets of bytes, against a set of single bytes. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "lib/extents.h"

#define BYTES 64u

static void fill(const struct mf_extents *set, bool *bytes)
{
    memset(bytes, 0, BYTES * sizeof(bytes[0]));
    for (size_t i = 0; i < set->count; i++) {
        assert_true(set->list[i].start_bytes < set->list[i].end_bytes);
        if (i > 0) /* in order, with a gap between them */
            assert_true(set->list[i - 1].end_bytes < set->list[i].start_bytes);
        for (uint64_t b = set->list[i].start_bytes; b < set->list[i].end_bytes; b++)
            bytes[b] = true;
    }
}

static void random_set(struct mf_extents *set, bool *model)
{
    memset(model, 0, BYTES * sizeof(model[0]));
    for (int n = rand() % 12; n > 0; n--) {
        uint64_t start = (uint64_t)rand() % BYTES, end = start + (uint64_t)rand() % 9;
        if (end > BYTES)
            end = BYTES;
        assert_int_equal(mf_extents_add(set, start, end), 0);
        for (uint64_t b = start; b < end; b++)
            model[b] = true;
        bool bytes[BYTES];
        fill(set, bytes);
        assert_memory_equal(bytes, model, sizeof(bytes));
    }
}

static void random_sets_agree_with_a_model(void **state)
{
    (void)state;
    srand(1);
    for (int round = 0; round < 5000; round++) {
        struct mf_extents a = {0}, b = {0}, difference = {0};
        bool in_a[BYTES], in_b[BYTES], left[BYTES];
        random_set(&a, in_a);
        random_set(&b, in_b);
        assert_int_equal(mf_extents_minus(&a, &b, &difference), 0);
        fill(&difference, left);
        for (unsigned i = 0; i < BYTES; i++)
            assert_int_equal(left[i], in_a[i] && !in_b[i]);
        for (int n = 0; n < 10; n++) {
            uint64_t start = (uint64_t)rand() % BYTES, end = start + (uint64_t)rand() % 9;
            bool meets = false;
            for (uint64_t at = start; at < end && at < BYTES; at++)
                meets |= in_a[at];
            assert_int_equal(mf_extents_meets(&a, start, end), meets);
        }
        mf_extents_free(&a);
        mf_extents_free(&b);
        mf_extents_free(&difference);
    }
}

static void lengths_are_not_ints(void **state)
{
    (void)state;
    struct mf_extents a = {0}, b = {0}, left = {0};
    uint64_t tib = UINT64_C(1) << 40;
    assert_int_equal(mf_extents_add(&a, 0, 5 * tib), 0);
    assert_int_equal(mf_extents_add(&b, tib, 3 * tib), 0);
    assert_int_equal(mf_extents_minus(&a, &b, &left), 0);
    assert_int_equal(left.count, 2);
    assert_true(left.list[0].end_bytes == tib && left.list[1].start_bytes == 3 * tib &&
                left.list[1].end_bytes == 5 * tib);
    mf_extents_free(&a);
    mf_extents_free(&b);
    mf_extents_free(&left);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(random_sets_agree_with_a_model),
        cmocka_unit_test(lengths_are_not_ints),
    };
    return cmocka_run_group_tests_name("extents", tests, NULL, NULL);
}
