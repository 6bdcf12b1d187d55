/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Moves and unmappings of private memory whose events come in another order than they were made. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "lib/limbo.h"

#define PAGE 4096u

static struct mf_layout layout;
static struct mf_limbo limbo;

static int fresh(void **state)
{
    (void)state;
    memset(&layout, 0, sizeof(layout));
    memset(&limbo, 0, sizeof(limbo));
    layout.keep = 1;
    return 0;
}

static void map(uint64_t addr, uint64_t pages, uint64_t first)
{
    struct mf_range dropped[2];
    assert_int_equal(mf_layout_learn(&layout,
                                     &(struct mf_mapping){.start_addr = addr,
                                                          .length_bytes = pages * PAGE,
                                                          .offset_bytes = first * PAGE},
                                     dropped),
                     0);
}

static void remap(uint64_t from, uint64_t to, uint64_t pages)
{
    bool files;
    assert_int_equal(mf_limbo_remap(&limbo, &layout, 0, from, to, pages * PAGE, &files), 0);
    assert_false(files);
}

static void unmap(uint64_t addr, uint64_t pages)
{
    struct mf_range dropped[1];
    assert_int_equal(mf_limbo_unmap(&limbo, &layout, 0, addr, addr + pages * PAGE, dropped), 0);
}

/* @page: -1 nothing, -2 zeros. */
static void expect(uint64_t addr, int64_t page)
{
    struct mf_mapping m;
    int64_t found = -1;
    if (mf_layout_find(&layout, 0, addr, &m))
        found = m.region == MF_REGION_ZEROS
                    ? -2
                    : (int64_t)((addr - m.start_addr + m.offset_bytes) / PAGE);
    assert_int_equal(found, page);
}

static void in_order(void **state)
{
    (void)state;
    map(0x10000, 8, 0);
    remap(0x12000, 0x80000, 2);
    expect(0x80000, 2);
    expect(0x12000, -2);
    expect(0x14000, 4);
    unmap(0x12000, 2);
    expect(0x12000, -1);
    expect(0x80000, 2);
    assert_int_equal(limbo.count, 0);
    /* Left mapped, then moved over: its UNMAP comes first. */
    remap(0x80000, 0x90000, 2);
    unmap(0x80000, 2);
    remap(0x10000, 0x80000, 1);
    expect(0x80000, 0);
    unmap(0x80000, 1);
    expect(0x80000, -1);
    assert_int_equal(limbo.count, 0);
}

/* A is moved away, and something else moved to A; whose events come first is chance. */
static void what_came_to_a_place_stays_when_the_place_is_left(void **state)
{
    (void)state;
    /* Its UNMAP comes late. */
    map(0x10000, 4, 0);
    map(0x20000, 4, 100);
    remap(0x10000, 0x30000, 4);
    remap(0x20000, 0x10000, 4);
    unmap(0x10000, 4);
    expect(0x10000, 100);
    expect(0x30000, 0);
    unmap(0x20000, 4);
    expect(0x20000, -1);
    assert_int_equal(limbo.count, 0);
    /* Both of its events come late. */
    fresh(NULL);
    map(0x10000, 4, 0);
    map(0x20000, 4, 100);
    remap(0x20000, 0x10000, 4);
    expect(0x10000, 100);
    unmap(0x20000, 4);
    remap(0x10000, 0x30000, 4);
    expect(0x10000, 100);
    expect(0x30000, 0);
    unmap(0x10000, 4);
    expect(0x10000, 100);
    expect(0x30000, 0);
    assert_int_equal(limbo.count, 0);
    /* It was unmapped, and that comes late. */
    fresh(NULL);
    map(0x10000, 4, 0);
    map(0x20000, 4, 100);
    remap(0x20000, 0x11000, 2);
    unmap(0x10000, 4);
    expect(0x10000, -1);
    expect(0x11000, 100);
    expect(0x12000, 101);
    expect(0x13000, -1);
    unmap(0x20000, 2);
    expect(0x22000, 102);
    unmap(0x11000, 2);
    expect(0x11000, -1);
    assert_int_equal(limbo.count, 0);
}

static void files_are_looked_up(void **state)
{
    (void)state;
    struct mf_range dropped[2];
    bool files = false;
    map(0x10000, 2, 0);
    assert_int_equal(
        mf_layout_learn(
            &layout, &(struct mf_mapping){.start_addr = 0x12000, .length_bytes = PAGE, .region = 5},
            dropped),
        0);
    assert_int_equal(mf_limbo_remap(&limbo, &layout, 0, 0x10000, 0x50000, 3 * PAGE, &files), 0);
    assert_true(files);
    expect(0x51000, 1);
    expect(0x52000, -1);
    assert_int_equal(mf_limbo_remap(&limbo, &layout, 0, 0x70000, 0x90000, PAGE, &files), 0);
    assert_true(files);
}

/* A child that never had what its parent has there: no event tells of that. */
static void what_never_was_there_does_not_stay_in_limbo(void **state)
{
    (void)state;
    map(0x10000, 4, 0);
    map(0x20000, 4, 100);
    remap(0x10000, 0x20000, 4);
    unmap(0x10000, 4);
    expect(0x20000, 0);
    assert_true(mf_limbo_holds(&limbo, 0));
    assert_false(mf_limbo_holds(&limbo, 1));
    assert_int_equal(layout.owed, 1);
    mf_limbo_forget(&limbo, &layout, 1);
    assert_int_equal(layout.owed, 1);
    mf_limbo_forget(&limbo, &layout, 0);
    assert_false(mf_limbo_holds(&limbo, 0));
    assert_int_equal(layout.owed, 0);
    expect(0x20000, 0);
    unmap(0x20000, 4);
    expect(0x20000, -1);
}

static void remap_unknown(uint64_t from, uint64_t to, uint64_t pages)
{
    bool files = false;
    assert_int_equal(mf_limbo_remap(&limbo, &layout, 0, from, to, pages * PAGE, &files), 0);
    assert_true(files);
}

/* Of what a mapping has grown by nothing is known until it is touched. */
static void what_came_to_a_place_of_which_nothing_was_known_stays(void **state)
{
    (void)state;
    map(0x20000, 4, 100);
    remap_unknown(0x10000, 0x30000, 4);
    expect(0x10000, -1);
    expect(0x30000, -1);
    remap(0x20000, 0x10000, 4);
    unmap(0x10000, 4);
    expect(0x10000, 100);
    expect(0x13000, 103);
    unmap(0x20000, 4);
    unmap(0x10000, 4);
    expect(0x10000, -1);
    assert_false(mf_limbo_holds(&limbo, 0));
    /* A part of it was known, and what comes takes another part. */
    fresh(NULL);
    map(0x11000, 1, 0);
    map(0x20000, 2, 100);
    remap_unknown(0x10000, 0x30000, 8);
    expect(0x31000, 0);
    remap(0x20000, 0x11000, 2);
    unmap(0x20000, 2);
    unmap(0x10000, 8);
    expect(0x10000, -1);
    expect(0x11000, 100);
    expect(0x12000, 101);
    expect(0x13000, -1);
    expect(0x31000, 0);
    assert_false(mf_limbo_holds(&limbo, 0));
    /* In order: its UNMAP was before, so the next one is of what came. */
    fresh(NULL);
    map(0x20000, 4, 100);
    remap_unknown(0x10000, 0x30000, 4);
    unmap(0x10000, 4);
    remap(0x20000, 0x10000, 4);
    unmap(0x20000, 4);
    expect(0x10000, 100);
    unmap(0x10000, 4);
    expect(0x10000, -1);
    assert_false(mf_limbo_holds(&limbo, 0));
    /* It stays mapped, and no event is to come. */
    remap_unknown(0x10000, 0x30000, 4);
    assert_true(mf_limbo_holds(&limbo, 0));
    mf_limbo_forget(&limbo, &layout, 0);
    assert_false(mf_limbo_holds(&limbo, 0));
}

/* Whose UNMAP is to come has made its move: the next one is of what came. */
static void what_came_to_a_place_may_move_on(void **state)
{
    (void)state;
    map(0x10000, 4, 0);
    map(0x20000, 2, 100);
    remap(0x10000, 0x30000, 4);
    remap(0x20000, 0x10000, 2);
    unmap(0x20000, 2);
    remap(0x10000, 0x40000, 2);
    expect(0x30000, 0);
    expect(0x40000, 100);
    unmap(0x10000, 4);
    unmap(0x10000, 2);
    expect(0x10000, -1);
    expect(0x40000, 100);
    assert_false(mf_limbo_holds(&limbo, 0));
    /* The same, but it was put in limbo, and its REMAP read then. */
    fresh(NULL);
    map(0x10000, 4, 0);
    map(0x20000, 2, 100);
    remap(0x20000, 0x10000, 2);
    remap(0x10000, 0x30000, 4);
    expect(0x30000, 0);
    unmap(0x20000, 2);
    remap(0x10000, 0x40000, 2);
    expect(0x40000, 100);
    unmap(0x10000, 2);
    unmap(0x10000, 4);
    expect(0x10000, -1);
    expect(0x40000, 100);
    assert_false(mf_limbo_holds(&limbo, 0));
}

/* MREMAP_DONTUNMAP: no UNMAP is to come; its next move is read after that of what came. */
static void what_stayed_mapped_may_move_when_something_has_come(void **state)
{
    (void)state;
    map(0x10000, 4, 0);
    map(0x20000, 2, 100);
    remap(0x10000, 0x30000, 4);
    remap(0x20000, 0x11000, 2);
    remap_unknown(0x10000, 0x50000, 4);
    expect(0x11000, 100);
    expect(0x51000, -1);
    unmap(0x10000, 4);
    unmap(0x20000, 2);
    expect(0x10000, -1);
    expect(0x11000, 100);
    expect(0x12000, 101);
    expect(0x13000, -1);
    expect(0x30000, 0);
    assert_false(mf_limbo_holds(&limbo, 0));
}

/* What is noted beyond the room for it is forgotten, and harms nothing. */
static void places_that_were_left_are_noted_as_far_as_there_is_room(void **state)
{
    (void)state;
    for (uint64_t i = 0; i < 2 * MF_LIMBO_LEFT_MAX; i++)
        remap_unknown(0x100000 + i * 0x10000, 0x40000000 + i * 0x10000, 4);
    assert_int_equal(limbo.left_count, MF_LIMBO_LEFT_MAX);
    unmap(0x100000 + (MF_LIMBO_LEFT_MAX + 7) * UINT64_C(0x10000) + PAGE, 2); /* in the middle */
    assert_int_equal(limbo.left_count, MF_LIMBO_LEFT_MAX);
    unmap(0x100000, UINT64_C(0x10000) / PAGE * 2 * MF_LIMBO_LEFT_MAX);
    assert_int_equal(limbo.left_count, 0);
}

/* ---- any order that can be, against what truly is ---- */

#define PLACES 7u
#define ACTORS 4u
#define UNKNOWN (ACTORS - 1)

struct event {
    bool is_unmap;
    unsigned from, to;
};

static uint64_t random_state;

static unsigned below(unsigned limit)
{
    random_state += UINT64_C(0x9e3779b97f4a7c15);
    uint64_t z = (random_state ^ (random_state >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    return (unsigned)((z ^ (z >> 27)) >> 33) % limit;
}

static uint64_t place(unsigned at)
{
    return (at + 1) * UINT64_C(0x100000);
}

/* Is the REMAP of @at's last owner still to come? Then what is there now does not leave it: that
 * its own event were read, it went on, and its next one still came first, takes a thread that is
 * held up for long between its change and its event (lib/limbo.h says what is not covered). */
static bool is_owed(const struct event *queued, const unsigned *stage, unsigned at)
{
    for (unsigned i = 0; i < ACTORS; i++)
        if (stage[i] == 1 && queued[i].from == at)
            return true;
    return false;
}

/* Each actor moves what it owns to a free place, and waits until its REMAP is read, then its UNMAP;
 * only then does it go on. Their events are queued and read in any order otherwise; but of what the
 * last one owns nothing is known, and its REMAP is read at once. */
static void chance(uint64_t seed)
{
    int truth[PLACES];
    unsigned where[ACTORS];
    struct event queued[ACTORS] = {0};
    unsigned stage[ACTORS] = {0}; /* 0: works, 1: REMAP to be read, 2: UNMAP to be read */
    fresh(NULL);
    random_state = seed;
    for (unsigned i = 0; i < PLACES; i++)
        truth[i] = i < ACTORS ? (int)i : -1;
    for (unsigned i = 0; i < ACTORS; i++) {
        where[i] = i;
        if (i != UNKNOWN)
            map(place(i), 4, i * 4);
    }
    for (unsigned step = 0; step < 200; step++) {
        unsigned a = below(ACTORS), to = below(PLACES);
        if (stage[a] == 0 && truth[to] < 0 && !is_owed(queued, stage, where[a])) {
            queued[a] = (struct event){.from = where[a], .to = to};
            truth[to] = (int)a;
            truth[where[a]] = -1;
            where[a] = to;
            stage[a] = 1;
            if (a == UNKNOWN) {
                remap_unknown(place(queued[a].from), place(to), 4);
                stage[a] = 2;
            }
        } else if (stage[a] == 1) {
            remap(place(queued[a].from), place(queued[a].to), 4);
            stage[a] = 2;
        } else if (stage[a] == 2) {
            unmap(place(queued[a].from), 4);
            stage[a] = 0;
        }
        bool quiet = true;
        for (unsigned i = 0; i < ACTORS; i++)
            quiet &= stage[i] == 0;
        for (unsigned i = 0; quiet && i < PLACES; i++)
            expect(place(i) + PAGE,
                   truth[i] < 0 || truth[i] == (int)UNKNOWN ? -1 : truth[i] * 4 + 1);
        if (quiet)
            assert_false(mf_limbo_holds(&limbo, 0));
    }
}

static void by_chance(void **state)
{
    (void)state;
    for (uint64_t seed = 1; seed <= 20000; seed++)
        chance(seed);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup(in_order, fresh),
        cmocka_unit_test_setup(what_came_to_a_place_stays_when_the_place_is_left, fresh),
        cmocka_unit_test_setup(files_are_looked_up, fresh),
        cmocka_unit_test_setup(what_never_was_there_does_not_stay_in_limbo, fresh),
        cmocka_unit_test_setup(what_came_to_a_place_of_which_nothing_was_known_stays, fresh),
        cmocka_unit_test_setup(what_came_to_a_place_may_move_on, fresh),
        cmocka_unit_test_setup(what_stayed_mapped_may_move_when_something_has_come, fresh),
        cmocka_unit_test_setup(places_that_were_left_are_noted_as_far_as_there_is_room, fresh),
        cmocka_unit_test(by_chance),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
