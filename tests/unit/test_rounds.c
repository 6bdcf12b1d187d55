/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* lib/rounds.c: after which round precopy goes on, switches or falls back, and the rates it tells
 * of. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <errno.h>

#include "lib/rounds.h"

#define MS UINT64_C(1000000)
#define SECOND (1000 * MS)
#define MANY (UINT64_C(1) << 34) /* pages: 64 TiB of RAM */

static void has_names(void **state)
{
    (void)state;
    enum mf_mode mode = MF_PRECOPY;
    for (unsigned m = MF_HYBRID; m <= MF_PRECOPY; m++) {
        assert_int_equal(mf_mode_of(mf_mode_name((enum mf_mode)m), &mode), 0);
        assert_int_equal(mode, m);
    }
    mode = MF_PRECOPY;
    assert_int_equal(mf_mode_of(NULL, &mode), 0);
    assert_int_equal(mode, MF_HYBRID);
    mode = MF_PRECOPY;
    assert_int_equal(mf_mode_of("", &mode), 0);
    assert_int_equal(mode, MF_HYBRID);
    assert_int_equal(mf_mode_of("Hybrid", &mode), -EINVAL);
    assert_int_equal(mf_mode_of("hybrid ", &mode), -EINVAL);
    assert_int_equal(mode, MF_HYBRID);
}

/* Pages of one round after another, a second each; the last one's answer must be @last, the others'
 * AGAIN. */
static void expect(struct mf_rounds rounds, const uint64_t *pages, unsigned count,
                   enum mf_rounds_next last)
{
    for (unsigned i = 0; i < count; i++)
        assert_int_equal(mf_rounds_done(&rounds, i + 1, pages[i], SECOND, MF_ROUNDS_UNKNOWN),
                         i + 1 < count ? MF_ROUNDS_AGAIN : last);
}
#define EXPECT(rounds, last, ...)                                                                  \
    expect(rounds, (const uint64_t[]){__VA_ARGS__},                                                \
           sizeof((const uint64_t[]){__VA_ARGS__}) / sizeof(uint64_t), last)

static void hybrid_goes_on_while_less_is_left(void **state)
{
    (void)state;
    const struct mf_rounds hybrid = {.mode = MF_HYBRID};
    EXPECT(hybrid, MF_ROUNDS_SWITCH, 100000, 100000); /* all dirty again */
    EXPECT(hybrid, MF_ROUNDS_SWITCH, 100000, 50000);  /* not clearly less */
    EXPECT(hybrid, MF_ROUNDS_SWITCH, 100000, 49999, 48000);
    EXPECT(hybrid, MF_ROUNDS_SWITCH, 100000, 49000, 24000, 11000, 5000, 2400, 1100, 500);
    EXPECT(hybrid, MF_ROUNDS_SWITCH, 100000, 0); /* idle */
    EXPECT(hybrid, MF_ROUNDS_SWITCH, 100000, MF_ROUNDS_FEW_PAGES - 1);
    EXPECT(hybrid, MF_ROUNDS_SWITCH, 100000, MF_ROUNDS_FEW_PAGES, MF_ROUNDS_FEW_PAGES - 1);
    EXPECT(hybrid, MF_ROUNDS_SWITCH, 0, 0); /* nothing but holes */
    EXPECT(hybrid, MF_ROUNDS_SWITCH, MANY, MANY / 3, MANY / 3);
}

static enum mf_rounds_next after(unsigned round, uint64_t pages, uint64_t dirty_pages)
{
    struct mf_rounds rounds = {.mode = MF_HYBRID};
    return mf_rounds_done(&rounds, round, pages, SECOND, dirty_pages);
}

static void hybrid_looks_ahead_where_it_knows_what_is_dirty(void **state)
{
    (void)state;
    /* Nothing, or next to nothing, is left for a second round. */
    assert_int_equal(after(1, MANY, 0), MF_ROUNDS_SWITCH);
    assert_int_equal(after(1, 0, 0), MF_ROUNDS_SWITCH);
    assert_int_equal(after(1, MANY, MF_ROUNDS_FEW_PAGES - 1), MF_ROUNDS_SWITCH);
    assert_int_equal(after(1, MANY, MF_ROUNDS_FEW_PAGES), MF_ROUNDS_AGAIN);
    /* Another round must leave a third at most. */
    assert_int_equal(after(1, 100000, 24999), MF_ROUNDS_AGAIN);
    assert_int_equal(after(1, 100000, 25000), MF_ROUNDS_SWITCH);
    assert_int_equal(after(2, 100000, 20000), MF_ROUNDS_AGAIN);
    assert_int_equal(after(2, 100000, 24999), MF_ROUNDS_AGAIN);
    assert_int_equal(after(2, 100000, 25000), MF_ROUNDS_SWITCH);
    assert_int_equal(after(2, 100000, MANY), MF_ROUNDS_SWITCH);
    assert_int_equal(after(MF_ROUNDS_HYBRID, MANY, MANY / 100), MF_ROUNDS_SWITCH);
}

static void hybrid_keeps_to_its_number_of_rounds(void **state)
{
    (void)state;
    struct mf_rounds rounds = {.mode = MF_HYBRID, .max_rounds = 1};
    EXPECT(rounds, MF_ROUNDS_SWITCH, 100000);
    rounds.max_rounds = 3;
    EXPECT(rounds, MF_ROUNDS_SWITCH, 100000, 10000, 1000);
    /* More than by itself, if told so, but still not without a gain. */
    rounds.max_rounds = 30;
    EXPECT(rounds, MF_ROUNDS_SWITCH, MANY, MANY / 3, MANY / 9, MANY / 27, MANY / 81, MANY / 243,
           MANY / 729, MANY / 2187, MANY / 6561, MANY / 19683, MANY / 19683);
}

static void switches_when_told(void **state)
{
    (void)state;
    struct mf_rounds rounds = {.mode = MF_HYBRID, .switch_now = true};
    EXPECT(rounds, MF_ROUNDS_SWITCH, 100000);
    /* Precopy can't confirm the rest in time then: it becomes hybrid. */
    rounds =
        (struct mf_rounds){.mode = MF_PRECOPY, .switch_now = true, .max_blackout_ns = 300 * MS};
    EXPECT(rounds, MF_ROUNDS_FALL_BACK, 100000);
}

static void precopy_switches_when_the_rest_fits(void **state)
{
    (void)state;
    struct mf_rounds rounds = {.mode = MF_PRECOPY, .max_blackout_ns = 300 * MS};
    assert_int_equal(mf_rounds_expected_blackout_ns(&rounds), 0);
    /* A first round that is short says nothing of what is dirty by then. */
    assert_int_equal(mf_rounds_done(&rounds, 1, 10, 1 * MS, MF_ROUNDS_UNKNOWN), MF_ROUNDS_AGAIN);
    assert_int_equal(mf_rounds_expected_blackout_ns(&rounds), 0);
    assert_int_equal(mf_rounds_done(&rounds, 2, 10, 1 * MS, MF_ROUNDS_UNKNOWN), MF_ROUNDS_SWITCH);

    /* A round that took twice as long as may be never fits, one that is much shorter does. */
    rounds = (struct mf_rounds){.mode = MF_PRECOPY, .max_blackout_ns = 300 * MS};
    assert_int_equal(mf_rounds_done(&rounds, 1, 100000, 10 * SECOND, MF_ROUNDS_UNKNOWN),
                     MF_ROUNDS_AGAIN);
    assert_int_equal(mf_rounds_done(&rounds, 2, 10000, 600 * MS, MF_ROUNDS_UNKNOWN),
                     MF_ROUNDS_AGAIN);
    assert_true(mf_rounds_expected_blackout_ns(&rounds) > 300 * MS);
    assert_int_equal(mf_rounds_done(&rounds, 3, 1000, 60 * MS, MF_ROUNDS_UNKNOWN),
                     MF_ROUNDS_SWITCH);
    assert_in_range(mf_rounds_expected_blackout_ns(&rounds), 1, 300 * MS);

    /* Rounds that get longer promise more still. */
    rounds = (struct mf_rounds){.mode = MF_PRECOPY, .max_blackout_ns = 300 * MS};
    assert_int_equal(mf_rounds_done(&rounds, 1, 1000, 20 * MS, MF_ROUNDS_UNKNOWN), MF_ROUNDS_AGAIN);
    assert_int_equal(mf_rounds_done(&rounds, 2, 10000, 200 * MS, MF_ROUNDS_UNKNOWN),
                     MF_ROUNDS_AGAIN);
}

static void knows_what_fits(void **state)
{
    (void)state;
    struct mf_rounds rounds = {.mode = MF_PRECOPY, .max_blackout_ns = 100 * MS};
    mf_rounds_done(&rounds, 1, 1000, SECOND, MF_ROUNDS_UNKNOWN); /* a millisecond each */
    assert_true(mf_rounds_fit(&rounds, 0));
    assert_true(mf_rounds_fit(&rounds, 200));
    assert_false(mf_rounds_fit(&rounds, 201));
    assert_false(mf_rounds_fit(&rounds, UINT64_MAX));
    /* So few that their time says nothing. */
    mf_rounds_done(&rounds, 2, 1, SECOND, MF_ROUNDS_UNKNOWN);
    assert_true(mf_rounds_fit(&rounds, 200 * MS / MF_ROUNDS_PAGE_NS));
    assert_false(mf_rounds_fit(&rounds, 200 * MS / MF_ROUNDS_PAGE_NS + 1));
}

static void precopy_goes_on_or_falls_back(void **state)
{
    (void)state;
    struct mf_rounds rounds = {.mode = MF_PRECOPY, .max_blackout_ns = 300 * MS};
    for (unsigned round = 1; round < 1000; round++)
        assert_int_equal(mf_rounds_done(&rounds, round, 100000, SECOND, MF_ROUNDS_UNKNOWN),
                         MF_ROUNDS_AGAIN);
    rounds.fallback = true;
    EXPECT(rounds, MF_ROUNDS_FALL_BACK, 9, 9, 9, 9, 9, 9, 9, 9);
    rounds.max_rounds = 3;
    EXPECT(rounds, MF_ROUNDS_FALL_BACK, 100000, 100000, 100000);
    /* It still converges: no reason to give up yet. */
    rounds = (struct mf_rounds){.mode = MF_PRECOPY, .max_blackout_ns = 300 * MS, .fallback = true};
    uint64_t pages = MANY;
    for (unsigned round = 1; round < 20; round++, pages /= 2)
        assert_int_equal(mf_rounds_done(&rounds, round, pages, SECOND, MF_ROUNDS_UNKNOWN),
                         MF_ROUNDS_AGAIN);
    assert_int_equal(mf_rounds_done(&rounds, 20, pages * 2, SECOND, MF_ROUNDS_UNKNOWN),
                     MF_ROUNDS_FALL_BACK);
}

static void knows_the_rates(void **state)
{
    (void)state;
    struct mf_rounds rounds = {.mode = MF_HYBRID};
    assert_int_equal(mf_rounds_dirty_rate(&rounds), 0);
    mf_rounds_done(&rounds, 1, 1000000, 10 * SECOND, MF_ROUNDS_UNKNOWN);
    assert_int_equal(mf_rounds_dirty_rate(&rounds), 0); /* the first round copies what is there */
    /* Dirtied in the ten seconds of the round before, copied in one. */
    mf_rounds_done(&rounds, 2, 50000, SECOND, MF_ROUNDS_UNKNOWN);
    assert_int_equal(mf_rounds_dirty_rate(&rounds), 5000);
    mf_rounds_done(&rounds, 3, 5000, SECOND / 2, MF_ROUNDS_UNKNOWN);
    assert_int_equal(mf_rounds_dirty_rate(&rounds), 5000);
    mf_rounds_done(&rounds, 4, 0, 0, MF_ROUNDS_UNKNOWN); /* a clock that stands still */
    assert_int_equal(mf_rounds_dirty_rate(&rounds), 0);
    mf_rounds_done(&rounds, 5, 0, 0, MF_ROUNDS_UNKNOWN);
    assert_int_equal(mf_rounds_dirty_rate(&rounds), 0);
    mf_rounds_done(&rounds, 6, 1000, SECOND / 2, 300);
    assert_int_equal(mf_rounds_dirty_rate(&rounds), 1200); /* each open to writes for half of it */
    mf_rounds_done(&rounds, 6, MANY, SECOND, MF_ROUNDS_UNKNOWN);
    mf_rounds_done(&rounds, 7, MANY, SECOND, MF_ROUNDS_UNKNOWN);
    assert_true(mf_rounds_dirty_rate(&rounds) == MANY);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(has_names),
        cmocka_unit_test(hybrid_goes_on_while_less_is_left),
        cmocka_unit_test(hybrid_looks_ahead_where_it_knows_what_is_dirty),
        cmocka_unit_test(hybrid_keeps_to_its_number_of_rounds),
        cmocka_unit_test(switches_when_told),
        cmocka_unit_test(precopy_switches_when_the_rest_fits),
        cmocka_unit_test(knows_what_fits),
        cmocka_unit_test(precopy_goes_on_or_falls_back),
        cmocka_unit_test(knows_the_rates),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
