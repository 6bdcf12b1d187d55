/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* lib/layout.c: against a naive model (one entry an address block), at sizes beyond 32 bits, and
 * read while it is written. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "lib/layout.h"
#include "lib/util.h"

#define GIB (UINT64_C(1) << 30)
#define TIB (UINT64_C(1) << 40)

static uint64_t random_state;
static uint32_t below(uint32_t limit)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (uint32_t)(random_state % limit);
}

/* ---- one thing at a time ---- */

static struct mf_layout layout;

static void set_one(uint64_t start, uint64_t length, uint64_t offset)
{
    mf_layout_set(&layout,
                  &(struct mf_mapping){.start_addr = start,
                                       .length_bytes = length,
                                       .offset_bytes = offset,
                                       .region = 3,
                                       .context = 1},
                  1);
}

static struct mf_range dropped[2];
static unsigned unmapped(struct mf_layout *from, uint32_t context, uint64_t start, uint64_t end)
{
    return mf_layout_unmap(from, context, start, end, dropped);
}

static void assert_found(uint64_t addr, uint64_t offset)
{
    struct mf_mapping m;
    assert_true(mf_layout_find(&layout, 1, addr, &m));
    assert_int_equal(m.region, 3);
    assert_int_equal(m.offset_bytes + (addr - m.start_addr), offset);
}

static void assert_nothing_at(uint64_t addr)
{
    struct mf_mapping m;
    assert_false(mf_layout_find(&layout, 1, addr, &m));
}

static void finds_addresses(void **state)
{
    (void)state;
    struct mf_mapping m;
    set_one(0x10000, 0x4000, 0x8000);
    assert_nothing_at(0xffff);
    assert_found(0x10000, 0x8000);
    assert_found(0x13fff, 0xbfff);
    assert_nothing_at(0x14000);
    assert_false(mf_layout_find(&layout, 2, 0x10000, &m)); /* another process's */
    assert_false(mf_layout_find(&layout, 0, 0x10000, &m));
}

static void cuts_at_every_place(void **state)
{
    (void)state;
    struct mf_mapping all[4];
    set_one(0x10000, 0x4000, 0x8000);
    assert_int_equal(unmapped(&layout, 1, 0x8000, 0x10000), 0);  /* right before it */
    assert_int_equal(unmapped(&layout, 1, 0x14000, 0x20000), 0); /* right behind it */
    assert_int_equal(unmapped(&layout, 0, 0x10000, 0x14000), 0); /* another context's */
    assert_int_equal(mf_layout_get(&layout, all, 4), 1);
    assert_int_equal(unmapped(&layout, 1, 0xf000, 0x11000), 0); /* the head */
    assert_nothing_at(0x10fff);
    assert_found(0x11000, 0x9000);
    assert_int_equal(unmapped(&layout, 1, 0x13000, 0x15000), 0); /* the tail */
    assert_found(0x12fff, 0xafff);
    assert_nothing_at(0x13000);
    assert_int_equal(unmapped(&layout, 1, 0x11800, 0x12000), 0); /* the middle */
    assert_int_equal(mf_layout_get(&layout, all, 4), 2);
    assert_found(0x117ff, 0x97ff);
    assert_nothing_at(0x11800);
    assert_found(0x12000, 0xa000);
    assert_int_equal(unmapped(&layout, 1, 0, UINT64_MAX), 0); /* all */
    assert_int_equal(mf_layout_get(&layout, all, 4), 0);
}

/* An `int` length is what a peer loops on for ever (an unmap of 2 GiB and more). */
static void takes_ranges_beyond_32_bits(void **state)
{
    (void)state;
    const uint64_t base = UINT64_C(0x7000) << 32;
    struct mf_range ranges[4];
    for (unsigned i = 0; i < 5; i++) {
        const uint64_t size = (uint64_t[]){2 * GIB, 3 * GIB, 4 * GIB, 4 * TIB, 5 * TIB}[i];
        set_one(base, 3 * size, 0);
        assert_int_equal(unmapped(&layout, 1, base + size, base + 2 * size), 0);
        assert_found(base + size - 1, size - 1);
        assert_nothing_at(base + size);
        assert_nothing_at(base + 2 * size - 1);
        assert_found(base + 2 * size, 2 * size);
        assert_int_equal(mf_layout_ranges(&layout, 3, 0, 3 * size, ranges, 4), 2);
        assert_int_equal(ranges[0].length_bytes + ranges[1].length_bytes, 2 * size);
        assert_int_equal(mf_layout_ranges(&layout, 3, size, size, ranges, 4), 0);

        set_one(base, size, size);
        const struct mf_mapping again = {.start_addr = base + 2 * size,
                                         .length_bytes = size,
                                         .offset_bytes = size,
                                         .region = 3,
                                         .context = 1};
        assert_int_equal(mf_layout_learn(&layout, &again, dropped), 0);
        assert_found(base + 2 * size, size);
        assert_found(base + 3 * size - 1, 2 * size - 1);
        assert_found(base, size);
        assert_int_equal(mf_layout_ranges(&layout, 3, 2 * size - 4096, 4096, ranges, 4), 2);
        assert_int_equal(unmapped(&layout, 1, base, base + size), 0);
        assert_int_equal(mf_layout_ranges(&layout, 3, 2 * size - 4096, 4096, ranges, 4), 1);
        assert_int_equal(ranges[0].start_addr, base + 3 * size - 4096);
        assert_int_equal(ranges[0].context, 1);
    }
}

static void says_what_it_had_no_room_for(void **state)
{
    (void)state;
    static struct mf_mapping many[MF_LAYOUT_MAX], after[MF_LAYOUT_MAX + 1];
    for (unsigned i = 0; i < MF_LAYOUT_MAX; i++)
        many[i] = (struct mf_mapping){.start_addr = (i + 1u) * UINT64_C(0x10000),
                                      .length_bytes = 0x4000,
                                      .offset_bytes = i * UINT64_C(0x4000),
                                      .region = 3,
                                      .context = 1};
    mf_layout_set(&layout, many, MF_LAYOUT_MAX);
    /* What is cut in two loses its tail. */
    assert_int_equal(unmapped(&layout, 1, 0x11000, 0x12000), 1);
    assert_int_equal(dropped[0].start_addr, 0x12000);
    assert_int_equal(dropped[0].length_bytes, 0x2000);
    assert_int_equal(dropped[0].context, 1);
    assert_found(0x10fff, 0xfff);
    assert_nothing_at(0x12000);
    assert_int_equal(unmapped(&layout, 1, 0x10000, 0x10800), 0); /* cutting off an end fits */
    /* A new one takes the place of an old one, and is itself known. */
    struct mf_mapping more = {.start_addr = UINT64_C(1) << 40,
                              .length_bytes = 0x1000,
                              .offset_bytes = 0x7000,
                              .region = 3,
                              .context = 1};
    for (unsigned i = 0; i < 3; i++, more.start_addr += 0x10000) {
        assert_int_equal(mf_layout_learn(&layout, &more, dropped), 1);
        assert_nothing_at(dropped[0].start_addr);
        assert_nothing_at(dropped[0].start_addr + dropped[0].length_bytes - 1);
        assert_found(more.start_addr, 0x7000);
    }
    assert_int_equal(mf_layout_get(&layout, after, MF_LAYOUT_MAX + 1), MF_LAYOUT_MAX);
    /* Into the middle of another: the tail of that one and an old one. */
    more.start_addr = UINT64_C(0x10000) * 1000 + 0x1000;
    assert_int_equal(mf_layout_learn(&layout, &more, dropped), 2);
    assert_found(more.start_addr, 0x7000);
    assert_nothing_at(more.start_addr + 0x1000);
    mf_layout_forget(&layout, 2);
    assert_int_equal(mf_layout_get(&layout, after, 5), 5);
    mf_layout_forget(&layout, 1);
    assert_int_equal(mf_layout_get(&layout, after, 5), 0);
}

static void neighbours_become_one(void **state)
{
    (void)state;
    struct mf_mapping all[4], piece = {.start_addr = 0x14000,
                                       .length_bytes = 0x1000,
                                       .offset_bytes = 0xc000,
                                       .region = 3,
                                       .context = 1};
    set_one(0x10000, 0x4000, 0x8000);
    assert_int_equal(mf_layout_learn(&layout, &piece, dropped), 0); /* it has grown in place */
    assert_int_equal(mf_layout_get(&layout, all, 4), 1);
    assert_true(mf_layout_covers(&layout, 1, 0x10000, 0x15000));
    assert_false(mf_layout_covers(&layout, 1, 0x10000, 0x15001));
    assert_false(mf_layout_covers(&layout, 1, 0xffff, 0x15000));
    /* The same once more changes nothing; a hole that is filled again neither. */
    assert_int_equal(mf_layout_learn(&layout, &piece, dropped), 0);
    assert_int_equal(mf_layout_get(&layout, all, 4), 1);
    assert_int_equal(unmapped(&layout, 1, 0x12000, 0x13000), 0);
    assert_int_equal(mf_layout_get(&layout, all, 4), 2);
    assert_false(mf_layout_covers(&layout, 1, 0x10000, 0x15000));
    piece.start_addr = 0x12000;
    piece.offset_bytes = 0xa000;
    assert_int_equal(mf_layout_learn(&layout, &piece, dropped), 0);
    assert_int_equal(mf_layout_get(&layout, all, 4), 1);
    assert_found(0x14fff, 0xcfff);
    /* Another part of the region, or another region: not. */
    piece.offset_bytes = 0x2000;
    assert_int_equal(mf_layout_learn(&layout, &piece, dropped), 0);
    assert_int_equal(mf_layout_get(&layout, all, 4), 3);
    assert_found(0x12000, 0x2000);
    assert_found(0x13000, 0xb000);
    assert_true(mf_layout_covers(&layout, 1, 0x10000, 0x15000));
    struct mf_mapping m;
    assert_true(mf_layout_from(&layout, 1, 0, &m));
    assert_int_equal(m.start_addr, 0x10000);
    assert_true(mf_layout_from(&layout, 1, 0x12fff, &m));
    assert_int_equal(m.start_addr, 0x12000);
    assert_false(mf_layout_from(&layout, 1, 0x15000, &m));
    assert_false(mf_layout_from(&layout, 0, 0, &m));
}

/* ---- against a model: what every block of two address spaces shows ---- */

#define BLOCK UINT64_C(0x80000000) /* 2 GIB: every range in the model is beyond 31 bits */
#define BLOCKS 96u
#define CONTEXTS 2u
#define REGIONS 2u

struct cell {
    bool mapped;
    uint32_t region;
    uint64_t offset;
};
static struct cell model[CONTEXTS][BLOCKS];

static uint64_t address(uint64_t block)
{
    return (UINT64_C(0x100) << 32) + block * BLOCK;
}

static void check_against_model(void)
{
    struct mf_mapping m;
    for (uint32_t c = 0; c < CONTEXTS; c++)
        for (uint32_t b = 0; b < BLOCKS; b++) {
            uint64_t addr = address(b) + below(2) * (BLOCK - 1);
            bool found = mf_layout_find(&layout, c, addr, &m);
            assert_int_equal(found, model[c][b].mapped);
            if (found) {
                assert_int_equal(m.region, model[c][b].region);
                assert_int_equal(m.offset_bytes + (addr - m.start_addr),
                                 model[c][b].offset + (addr - address(b)));
            }
        }
    /* A piece of a region: the same blocks, each exactly once. */
    static struct mf_range ranges[MF_LAYOUT_MAX];
    const uint32_t region = below(REGIONS);
    const uint64_t from = below(BLOCKS) * BLOCK, length = (1 + below(20)) * BLOCK;
    unsigned count = mf_layout_ranges(&layout, region, from, length, ranges, MF_LAYOUT_MAX);
    uint64_t expected = 0, got = 0;
    for (uint32_t c = 0; c < CONTEXTS; c++)
        for (uint32_t b = 0; b < BLOCKS; b++) {
            const struct cell *cell = &model[c][b];
            if (!cell->mapped || cell->region != region || cell->offset < from ||
                cell->offset >= from + length)
                continue;
            expected += BLOCK;
            unsigned covered = 0;
            for (unsigned i = 0; i < count; i++)
                covered += ranges[i].context == c && address(b) >= ranges[i].start_addr &&
                           address(b) - ranges[i].start_addr < ranges[i].length_bytes;
            assert_int_equal(covered, 1);
        }
    for (unsigned i = 0; i < count; i++) {
        got += ranges[i].length_bytes;
        /* It says which part of the region it is: looked up, its ends are that part's. */
        const uint64_t length_of = ranges[i].length_bytes;
        assert_true(ranges[i].offset_bytes >= from &&
                    ranges[i].offset_bytes + length_of <= from + length);
        assert_true(mf_layout_find(&layout, ranges[i].context, ranges[i].start_addr, &m));
        assert_int_equal(m.offset_bytes + (ranges[i].start_addr - m.start_addr),
                         ranges[i].offset_bytes);
    }
    assert_int_equal(got, expected);
    assert_int_equal(mf_layout_ranges(&layout, region, from, length, ranges, 0), count);
    uint32_t cursor = 0;
    struct mf_range one;
    for (unsigned i = 0; i < count; i++) {
        assert_true(mf_layout_next(&layout, region, from, length, &cursor, &one));
        assert_true(one.start_addr == ranges[i].start_addr && one.context == ranges[i].context);
        assert_int_equal(one.length_bytes, ranges[i].length_bytes);
    }
    assert_false(mf_layout_next(&layout, region, from, length, &cursor, &one));
}

static void unmap_both(uint32_t context, uint32_t first, uint32_t blocks)
{
    for (uint32_t b = first; b < first + blocks; b++)
        model[context][b].mapped = false;
    assert_int_equal(unmapped(&layout, context, address(first), address(first + blocks)), 0);
}

static void agrees_with_the_model(void **state)
{
    (void)state;
    for (unsigned round = 0; round < 60; round++) {
        struct mf_mapping mappings[8];
        unsigned count = 0;
        memset(model, 0, sizeof(model));
        for (uint32_t c = 0; c < CONTEXTS; c++)
            for (uint32_t at = below(10); at < BLOCKS && count < 8;) {
                uint32_t blocks = 1 + below(30), region = below(REGIONS);
                if (blocks > BLOCKS - at)
                    blocks = BLOCKS - at;
                uint64_t offset = below(40) * BLOCK;
                mappings[count++] = (struct mf_mapping){.start_addr = address(at),
                                                        .length_bytes = blocks * BLOCK,
                                                        .offset_bytes = offset,
                                                        .region = region,
                                                        .context = c};
                for (uint32_t b = 0; b < blocks; b++)
                    model[c][at + b] = (struct cell){true, region, offset + b * BLOCK};
                at += blocks + below(12);
            }
        mf_layout_set(&layout, mappings, count);
        check_against_model();
        for (unsigned change = 0; change < 40; change++) {
            uint32_t c = below(CONTEXTS), first = below(BLOCKS);
            uint32_t blocks = 1 + below(below(2) ? 4 : 30);
            if (blocks > BLOCKS - first)
                blocks = BLOCKS - first;
            const unsigned what = below(3);
            if (what == 0) {
                unmap_both(c, first, blocks);
            } else if (what == 1) {
                /* Something is found there, which may continue what lies before it. */
                uint32_t region = below(REGIONS);
                uint64_t offset = below(40) * BLOCK;
                if (first > 0 && model[c][first - 1].mapped && below(2)) {
                    region = model[c][first - 1].region;
                    offset = model[c][first - 1].offset + BLOCK;
                }
                for (uint32_t b = 0; b < blocks; b++)
                    model[c][first + b] = (struct cell){true, region, offset + b * BLOCK};
                struct mf_mapping found = {.start_addr = address(first),
                                           .length_bytes = blocks * BLOCK,
                                           .offset_bytes = offset,
                                           .region = region,
                                           .context = c};
                assert_int_equal(mf_layout_learn(&layout, &found, dropped), 0);
            } else {
                /* Moved, and found there piece by piece. */
                uint32_t to = below(BLOCKS - blocks + 1);
                if (to < first + blocks && first < to + blocks)
                    continue;
                unmap_both(c, to, blocks);
                for (uint32_t b = 0; b < blocks; b++) {
                    const struct cell *from = &model[c][first + b];
                    const struct mf_mapping found = {.start_addr = address(to + b),
                                                     .length_bytes = BLOCK,
                                                     .offset_bytes = from->offset,
                                                     .region = from->region,
                                                     .context = c};
                    if (from->mapped)
                        assert_int_equal(mf_layout_learn(&layout, &found, dropped), 0);
                }
                memcpy(&model[c][to], &model[c][first], blocks * sizeof(model[c][0]));
                if (below(4))
                    unmap_both(c, first, blocks);
            }
            check_against_model();
        }
    }
}

/* ---- read while it is written ---- */

/* The writer moves one mapping to and fro and cuts another; the region's block 0 is mapped exactly
 * once or twice at any moment (learned, then unmapped), and what a reader sees is always one of
 * these tables, whole. */
static struct mf_layout shared;
static _Atomic bool stop;
static _Atomic uint64_t reads;
#define HOME (UINT64_C(1) << 44)
#define AWAY (UINT64_C(2) << 44)
#define SIZE (5 * TIB)

static void require(bool condition)
{
    if (!condition)
        abort(); /* cmocka's assertions are for the main thread only */
}

static void *read_layout(void *arg)
{
    (void)arg;
    while (!atomic_load_explicit(&stop, memory_order_relaxed)) {
        struct mf_range ranges[4];
        struct mf_mapping m;
        unsigned count = mf_layout_ranges(&shared, 9, 0, SIZE, ranges, 4);
        require(count == 1 || count == 2);
        for (unsigned i = 0; i < count; i++) {
            require(ranges[i].start_addr == HOME || ranges[i].start_addr == AWAY);
            require(ranges[i].length_bytes == SIZE && ranges[i].context == 2);
        }
        if (mf_layout_find(&shared, 2, HOME + SIZE - 1, &m))
            require(m.start_addr == HOME && m.length_bytes == SIZE && m.region == 9 &&
                    m.offset_bytes == 0);
        require(mf_layout_find(&shared, 2, 0x1000, &m) && m.region == 4);
        require(mf_layout_get(&shared, (struct mf_mapping[4]){0}, 4) >= 2);
        atomic_fetch_add_explicit(&reads, 1, memory_order_relaxed);
    }
    return NULL;
}

static void is_read_while_it_is_written(void **state)
{
    (void)state;
    const struct mf_mapping start[] = {
        {.start_addr = HOME, .length_bytes = SIZE, .region = 9, .context = 2},
        {.start_addr = 0x1000, .length_bytes = 0x1000, .region = 4, .context = 2},
    };
    pthread_t reader[2];
    mf_layout_set(&shared, start, 2);
    for (unsigned i = 0; i < 2; i++)
        assert_int_equal(pthread_create(&reader[i], NULL, read_layout, NULL), 0);
    /* Until the readers have seen enough: not a matter of time. */
    for (unsigned i = 0; i < 2000 || atomic_load(&reads) < 2000; i++) {
        uint64_t from = i % 2 ? AWAY : HOME, to = i % 2 ? HOME : AWAY;
        const struct mf_mapping moved = {
            .start_addr = to, .length_bytes = SIZE, .region = 9, .context = 2};
        assert_int_equal(mf_layout_learn(&shared, &moved, dropped), 0);
        assert_int_equal(unmapped(&shared, 2, from, from + SIZE), 0);
    }
    atomic_store(&stop, true);
    for (unsigned i = 0; i < 2; i++)
        pthread_join(reader[i], NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(finds_addresses),
        cmocka_unit_test(cuts_at_every_place),
        cmocka_unit_test(takes_ranges_beyond_32_bits),
        cmocka_unit_test(says_what_it_had_no_room_for),
        cmocka_unit_test(neighbours_become_one),
        cmocka_unit_test(agrees_with_the_model),
        cmocka_unit_test(is_read_while_it_is_written),
    };
    const char *text = getenv("MF_SEED");
    random_state = (text ? strtoull(text, NULL, 0) : (uint64_t)time(NULL) << 20 ^ mf_now_ns()) | 1;
    print_message("MF_SEED=%#llx\n", (unsigned long long)random_state);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
