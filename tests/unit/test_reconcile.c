/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* lib/reconcile.c: a layout that is one event behind what is watched. */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cmocka.h>

#include "lib/layout.h"
#include "lib/reconcile.h"

#define PAGE 4096u
#define MAX 8u

static struct mf_mapping pieces[MAX];
static unsigned count;

static int fresh(void **state)
{
    (void)state;
    count = 0;
    return 0;
}

static void known(uint64_t addr, uint64_t pages, uint64_t first)
{
    pieces[count++] = (struct mf_mapping){
        .start_addr = addr, .length_bytes = pages * PAGE, .offset_bytes = first * PAGE};
}

static void expect(uint64_t addr, int64_t page)
{
    int64_t found = -1;
    for (unsigned i = 0; i < count; i++)
        if (addr >= pieces[i].start_addr && addr - pieces[i].start_addr < pieces[i].length_bytes)
            found = (int64_t)((addr - pieces[i].start_addr + pieces[i].offset_bytes) / PAGE);
    assert_int_equal(found, page);
}

static void nothing_is_missing(void **state)
{
    (void)state;
    const struct mf_span watched[] = {{0x10000, 0x1c000}, {0x20000, 0x24000}};
    known(0x10000, 8, 0);
    known(0x18000, 4, 100);
    known(0x20000, 2, 8); /* and grew since */
    assert_int_equal(mf_reconcile(pieces, &count, MAX, watched, 2), 0);
    assert_int_equal(count, 3);
    expect(0x19000, 101);
    expect(0x22000, -1);
}

static void one_has_moved(void **state)
{
    (void)state;
    const struct mf_span whole[] = {{0x18000, 0x1c000}, {0x50000, 0x58000}};
    known(0x10000, 8, 0);
    known(0x18000, 4, 100);
    assert_int_equal(mf_reconcile(pieces, &count, MAX, whole, 2), 0);
    expect(0x10000, -1);
    expect(0x51000, 1);
    expect(0x18000, 100);
    /* A part of it, to right behind another one. */
    const struct mf_span part[] = {{0x18000, 0x1e000}, {0x50000, 0x52000}, {0x54000, 0x58000}};
    assert_int_equal(mf_reconcile(pieces, &count, MAX, part, 3), 0);
    expect(0x51000, 1);
    expect(0x52000, -1);
    expect(0x54000, 4);
    expect(0x1b000, 103);
    expect(0x1c000, 2);
    expect(0x1d000, 3);
    /* It grew on the way. */
    const struct mf_span more[] = {{0x18000, 0x1e000}, {0x50000, 0x52000}, {0x90000, 0x99000}};
    assert_int_equal(mf_reconcile(pieces, &count, MAX, more, 3), 0);
    expect(0x90000, 4);
    expect(0x94000, -1);
}

static void one_is_gone(void **state)
{
    (void)state;
    const struct mf_span watched[] = {{0x10000, 0x12000}, {0x14000, 0x18000}};
    known(0x10000, 8, 0);
    assert_int_equal(mf_reconcile(pieces, &count, MAX, watched, 2), 0);
    expect(0x11000, 1);
    expect(0x12000, -1);
    expect(0x14000, 4);
}

static void two_alike_are_not_guessed_at(void **state)
{
    (void)state;
    const struct mf_span watched[] = {{0x50000, 0x54000}, {0x60000, 0x64000}, {0x70000, 0x71000}};
    known(0x10000, 4, 0);
    known(0x20000, 4, 100);
    known(0x30000, 1, 200);
    assert_int_equal(mf_reconcile(pieces, &count, MAX, watched, 3), 2);
    expect(0x50000, -1);
    expect(0x60000, -1);
    expect(0x10000, -1);
    expect(0x70000, 200); /* this one is clear */
}

static void zeros_are_not_missed(void **state)
{
    (void)state;
    const struct mf_span watched[] = {{0x50000, 0x54000}};
    known(0x10000, 4, 0);
    pieces[0].region = MF_REGION_ZEROS;
    assert_int_equal(mf_reconcile(pieces, &count, MAX, watched, 1), 0);
    expect(0x50000, -1);
}

/* Nothing of this process is watched; the file is read to its end all the same. */
static void reads_smaps(void **state)
{
    (void)state;
    struct mf_span *spans = NULL;
    unsigned spans_count = 7;
    FILE *f = fopen("/proc/self/smaps", "re");
    assert_non_null(f);
    assert_int_equal(mf_served_spans(fileno(f), mf_served_private, NULL, &spans, &spans_count), 0);
    assert_int_equal(spans_count, 0);
    free(spans);
    fclose(f);
    static const char text[] =
        "1000-3000 rw-p 00000000 00:00 0 \nSize: 8 kB\nVmFlags: rd wr mr mw me um ac sd \n"
        "3000-4000 r--p 00000000 00:00 0 \nSize: 4 kB\nVmFlags: rd mr mw me um ac sd \n"
        "4000-5000 rw-p 00000000 00:00 0 [heap]\nVmFlags: rd wr mr mw me ac sd \n"
        "5000-6000 rw-s 00000000 00:01 7 /memfd:x (deleted)\nVmFlags: rd wr mr mw me um ui ac \n"
        "8000-9000 rw-p 00000000 00:00 0 [anon:x]\nVmFlags: rd wr um\n";
    int fd = memfd_create("smaps", MFD_CLOEXEC);
    assert_int_equal(write(fd, text, sizeof(text) - 1), sizeof(text) - 1);
    assert_int_equal(lseek(fd, 0, SEEK_SET), 0);
    assert_int_equal(mf_served_spans(fd, mf_served_private, NULL, &spans, &spans_count), 0);
    assert_int_equal(spans_count, 2);
    assert_true(spans[0].start_addr == 0x1000 && spans[0].end_addr == 0x4000);
    assert_true(spans[1].start_addr == 0x8000 && spans[1].end_addr == 0x9000);
    free(spans);
    close(fd);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup(nothing_is_missing, fresh),
        cmocka_unit_test_setup(one_has_moved, fresh),
        cmocka_unit_test_setup(one_is_gone, fresh),
        cmocka_unit_test_setup(two_alike_are_not_guessed_at, fresh),
        cmocka_unit_test_setup(zeros_are_not_missed, fresh),
        cmocka_unit_test(reads_smaps),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
