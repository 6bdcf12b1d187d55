/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What the layout and its file do for private memory: zeros, room, and what a successor finds. */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "lib/layout.h"
#include "lib/layout_file.h"

#define PAGE 4096u

static struct mf_layout layout;

static int fresh(void **state)
{
    (void)state;
    memset(&layout, 0, sizeof(layout));
    return 0;
}

static struct mf_mapping at(uint64_t start, uint64_t pages, uint64_t offset_pages, uint32_t region,
                            uint32_t context)
{
    return (struct mf_mapping){.start_addr = start,
                               .length_bytes = pages * PAGE,
                               .offset_bytes = offset_pages * PAGE,
                               .region = region,
                               .context = context};
}

static void expect(uint32_t context, uint64_t addr, int64_t region, uint64_t page)
{
    struct mf_mapping m;
    const bool found = mf_layout_find(&layout, context, addr, &m);
    if (region < 0) {
        assert_false(found);
        return;
    }
    assert_true(found);
    assert_int_equal(m.region, region);
    if (m.region != MF_REGION_ZEROS)
        assert_int_equal((addr - m.start_addr + m.offset_bytes) / PAGE, page);
}

/* Mappings of files make room; where only private memory is left, what is new is left out. */
static void private_memory_is_not_left_out_for_files(void **state)
{
    (void)state;
    struct mf_range dropped[2];
    layout.keep = 1u << 2;
    for (uint32_t i = 0; i < MF_LAYOUT_MAX; i++) {
        const struct mf_mapping m = at(0x100000 + i * UINT64_C(0x10000), 1, i,
                                       i % 64 == 7   ? 0
                                       : i % 64 == 8 ? 1
                                                     : 2,
                                       0);
        assert_int_equal(mf_layout_learn(&layout, &m, dropped), 0);
    }
    assert_false(layout.overflowed);
    const unsigned of_files = MF_LAYOUT_MAX / 64 * 2;
    for (uint32_t i = 0; i < of_files; i++) {
        const struct mf_mapping m = at(0x900000000 + i * UINT64_C(0x10000), 1, i, 2, 1);
        assert_int_equal(mf_layout_learn(&layout, &m, dropped), 1);
        assert_int_equal(dropped[0].context, 0);
        expect(1, m.start_addr, 2, i);
    }
    assert_true(layout.overflowed);
    assert_false(layout.lost);
    const struct mf_mapping more = at(0xa00000000, 1, 5, 2, 1);
    assert_int_equal(mf_layout_learn(&layout, &more, dropped), 1);
    assert_int_equal(dropped[0].start_addr, more.start_addr);
    expect(1, more.start_addr, -1, 0);
    expect(0, 0x100000, 2, 0);
    assert_true(layout.lost);
}

/* Cutting in two takes a place more: then that part is not known any more, but never wrong. */
static void what_is_cut_off_may_be_lost(void **state)
{
    (void)state;
    struct mf_range dropped[2];
    layout.keep = 1u << 2;
    for (uint32_t i = 0; i < MF_LAYOUT_MAX; i++) {
        const struct mf_mapping m =
            at(0x100000 + i * UINT64_C(0x10000), 3, 7 * i, i % 2 ? 2 : 0, 0);
        assert_int_equal(mf_layout_learn(&layout, &m, dropped), 0);
    }
    assert_int_equal(mf_layout_unmap(&layout, 0, 0x101000, 0x102000, dropped), 1);
    assert_true(layout.overflowed);
    assert_false(layout.lost);
    assert_int_equal(mf_layout_unmap(&layout, 0, 0x111000, 0x112000, dropped), 1);
    assert_true(layout.lost);
    expect(0, 0x110000, 2, 7);
    expect(0, 0x112000, -1, 0);
}

static void zeros_that_are_left_out_are_lost(void **state)
{
    (void)state;
    struct mf_range dropped[2];
    layout.keep = 1u << 2;
    for (uint32_t i = 0; i < MF_LAYOUT_MAX; i++) {
        const struct mf_mapping m = at(0x100000 + i * UINT64_C(0x10000), 1, i, 2, 0);
        assert_int_equal(mf_layout_learn(&layout, &m, dropped), 0);
    }
    const struct mf_mapping zeros = at(0xa00000000, 1, 0, MF_REGION_ZEROS, 0);
    assert_int_equal(mf_layout_learn(&layout, &zeros, dropped), 1);
    assert_int_equal(dropped[0].start_addr, zeros.start_addr);
    assert_true(layout.lost);
}

static void a_successor_finds_what_was_kept(void **state)
{
    (void)state;
    struct mf_error err;
    static struct mf_mapping out[MF_LAYOUT_MAX], many[MF_LAYOUT_MAX];
    const struct mf_mapping first[] = {at(0x10000, 16, 0, 0, 0), at(0x90000, 1, 0, 1, 0)};
    const uint64_t pages[] = {1000, 0, 65};
    int fd = mf_layout_file_create(pages, 3, &err);
    assert_true(fd >= 0);
    struct mf_layout_file *writer = mf_layout_file_map(fd, &err);
    struct mf_layout_file *reader = mf_layout_file_map(fd, &err);
    close(fd);
    assert_true(writer && reader);
    assert_int_equal(mf_layout_file_load(reader, out), -ENODATA);
    mf_layout_file_store(writer, first, 2);
    assert_int_equal(mf_layout_file_load(reader, out), 2);
    assert_memory_equal(out, first, sizeof(first));
    for (uint32_t i = 0; i < MF_LAYOUT_MAX; i++)
        many[i] = at(0x100000 + i * UINT64_C(0x10000), 1, i, 0, 0);
    mf_layout_file_store(writer, many, MF_LAYOUT_MAX);
    assert_int_equal(mf_layout_file_load(reader, out), MF_LAYOUT_MAX);
    assert_memory_equal(out, many, sizeof(many));
    mf_layout_file_store(writer, first, 1);
    assert_int_equal(mf_layout_file_load(reader, out), 1);
    mf_layout_file_store(writer, first, 0);
    assert_int_equal(mf_layout_file_load(reader, out), 0);
    struct mf_zeros *written = mf_layout_file_zeros(writer, pages, 3);
    struct mf_zeros *found = mf_layout_file_zeros(reader, pages, 3), *copy = NULL;
    assert_int_equal(mf_zeros_set(&written, 2, 65, 63, 2), 0);
    assert_false(mf_zeros_any(found, 2, 0, 63));
    assert_true(mf_zeros_any(found, 2, 0, 64) && mf_zeros_any(found, 2, 64, 1));
    assert_false(mf_zeros_any(found, 0, 0, 1000) || mf_zeros_any(found, 1, 0, 1));
    assert_int_equal(mf_zeros_copy(found, pages, &copy), 0);
    assert_int_equal(mf_zeros_set(&copy, 0, 1000, 999, 1), 0);
    assert_true(mf_zeros_any(copy, 2, 64, 1) && mf_zeros_any(copy, 0, 990, 10));
    assert_false(mf_zeros_any(found, 0, 990, 10));
    assert_null(mf_layout_file_zeros(reader, pages, 2));
    mf_zeros_free(copy);
    mf_zeros_free(written);
    mf_zeros_free(found);
    mf_layout_file_unmap(writer);
    mf_layout_file_unmap(reader);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup(private_memory_is_not_left_out_for_files, fresh),
        cmocka_unit_test_setup(what_is_cut_off_may_be_lost, fresh),
        cmocka_unit_test_setup(zeros_that_are_left_out_are_lost, fresh),
        cmocka_unit_test(a_successor_finds_what_was_kept),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
