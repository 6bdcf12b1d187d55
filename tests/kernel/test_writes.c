/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Which writes to a watched mapping are seen (lib/pagemap.h over WP_ASYNC), and which are not. With
 * the argument "hugetlb" the same on huge pages, where they can be reserved.
 */
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include <cmocka.h>

#include "lib/pagemap.h"
#include "lib/uffd.h"
#include "lib/util.h"
#include "tests/kernel/area.h"

#define PAGES 6u

static enum area_kind kind;
static struct area area;
static int pagemap_fd;

/* Every page holds bytes, is mapped by the guest and has been protected. */
static int watch(void **state)
{
    (void)state;
    struct mf_error err;
    area_make(&area, kind, PAGES);
    close(area.uffd);
    area.uffd = mf_uffd_open();
    assert_true(area.uffd >= 0);
    assert_int_equal(mf_uffd_api(area.uffd, MF_UFFD_FEATURES_WP, 0, NULL, &err), 0);
    pagemap_fd = mf_pagemap_open((int)getpid(), &err);
    assert_true(pagemap_fd >= 0);
    for (size_t i = 0; i < PAGES; i++)
        page_of(&area, i)[0] = 'b';
    assert_int_equal(mf_uffd_register_wp(area.uffd, (uintptr_t)area.guest, area.length_bytes, &err),
                     0);
    return 0;
}

static int unwatch(void **state)
{
    (void)state;
    close(pagemap_fd);
    area_free(&area);
    return 0;
}

static void protect(size_t first, size_t pages)
{
    assert_int_equal(
        mf_uffd_protect(area.uffd, (uintptr_t)page_of(&area, first), pages * area.page_bytes), 0);
}

static int scan(uint8_t seen[PAGES])
{
    memset(seen, 0xff, PAGES);
    return mf_pagemap_scan(pagemap_fd, (uintptr_t)area.guest, area.length_bytes, area.page_bytes,
                           seen);
}

/* @written: a letter a page: w or - */
static void expect_written(const char *written)
{
    uint8_t seen[PAGES];
    char found[PAGES + 1] = {0};
    assert_int_equal(scan(seen), 0);
    for (size_t i = 0; i < PAGES; i++)
        found[i] = seen[i] & MF_PAGEMAP_WRITTEN ? 'w' : '-';
    assert_string_equal(found, written);
}

static bool is_present(size_t page)
{
    uint8_t seen[PAGES];
    assert_int_equal(scan(seen), 0);
    return seen[page] & MF_PAGEMAP_PRESENT;
}

static void punch(size_t page)
{
    assert_int_equal(fallocate(area.file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                               (off_t)(page * area.page_bytes), (off_t)area.page_bytes),
                     0);
}

static void sees_stores(void **state)
{
    (void)state;
    expect_written("wwwwww"); /* never protected */
    protect(0, PAGES);
    expect_written("------");
    page_of(&area, 2)[area.page_bytes - 1] = 'x'; /* nobody is stopped */
    *(volatile char *)page_of(&area, 4);          /* reading is not writing */
    expect_written("--w---");
    page_of(&area, 2)[7] = 'y';
    expect_written("--w---"); /* looking does not protect */
}

static void sees_what_the_kernel_writes_for_the_process(void **state)
{
    (void)state;
    int ends[2];
    assert_int_equal(pipe2(ends, O_CLOEXEC), 0);
    protect(0, PAGES);
    assert_int_equal(write(ends[1], "four", 4), 4);
    assert_int_equal(read(ends[0], page_of(&area, 1) + 9, 4), 4);
    assert_memory_equal(page_of(&area, 1) + 9, "four", 4);
    char word[] = "word";
    const struct iovec from = {word, 4}, to = {page_of(&area, 3), 4};
    assert_int_equal(process_vm_writev(getpid(), &from, 1, &to, 1, 0), 4);
    expect_written("-w-w--");
    close(ends[0]);
    close(ends[1]);
}

static void does_not_see_other_ways_into_the_file(void **state)
{
    (void)state;
    protect(0, PAGES);
    area.second[1 * area.page_bytes] = 's'; /* a vhost-user back end's mapping */
    expect_written("------");
    assert_int_equal(page_of(&area, 1)[0], 's');
    if (kind == AREA_HUGETLB)
        return; /* it has no write(2) */
    assert_int_equal(pwrite(area.file, "p", 1, (off_t)(3 * area.page_bytes)), 1);
    expect_written("------");
    assert_int_equal(page_of(&area, 3)[0], 'p');
}

static void a_punched_page_is_not_written_but_zero(void **state)
{
    (void)state;
    protect(0, PAGES);
    punch(2);
    expect_written("------");
    assert_false(is_present(2)); /* so it is asked whether it is a hole */
    assert_int_equal(page_of(&area, 2)[0], 0);
    expect_written("------"); /* read again it is a page of zeros, still not written */
    assert_true(is_present(2));
    page_of(&area, 2)[0] = 'n';
    expect_written("--w---");
    punch(4);
    page_of(&area, 4)[0] = 'n'; /* without a look in between */
    expect_written("--w-w-");
}

static void what_was_never_touched_counts_as_written(void **state)
{
    (void)state;
    munmap(area.guest, area.length_bytes);
    punch(0);
    area.guest = mmap(area.guest, area.length_bytes, PROT_READ | PROT_WRITE,
                      MAP_SHARED | MAP_FIXED_NOREPLACE, area.file, 0);
    assert_true(area.guest != MAP_FAILED);
    struct mf_error err;
    assert_int_equal(mf_uffd_register_wp(area.uffd, (uintptr_t)area.guest, area.length_bytes, &err),
                     0);
    expect_written("wwwwww");
    for (size_t i = 0; i < PAGES; i++)
        assert_false(is_present(i));
    /* Protected though nothing is mapped: a first touch shows whether it writes. */
    protect(0, PAGES);
    expect_written("------");
    *(volatile char *)page_of(&area, 1);
    page_of(&area, 2)[0] = 'w';
    page_of(&area, 0)[0] = 'w'; /* a hole */
    expect_written("w-w---");
}

static void protects_a_part(void **state)
{
    (void)state;
    protect(0, PAGES);
    for (size_t i = 0; i < PAGES; i++)
        page_of(&area, i)[0] = 'c';
    protect(1, 2);
    expect_written("w--www");
    page_of(&area, 2)[0] = 'd';
    expect_written("w-wwww");
}

static void what_is_not_watched_is_an_error(void **state)
{
    (void)state;
    uint8_t seen[PAGES];
    assert_int_equal(mf_pagemap_scan(pagemap_fd, (uintptr_t)area.second, area.length_bytes,
                                     area.page_bytes, seen),
                     -EPERM);
    assert_int_equal(mf_uffd_protect(area.uffd, (uintptr_t)area.second, area.length_bytes),
                     -ENOENT);
    protect(0, PAGES);
    /* A part that is not watched any more. */
    const struct uffdio_range range = {.start = (uintptr_t)page_of(&area, 3),
                                       .len = area.page_bytes};
    assert_int_equal(ioctl_errno(area.uffd, UFFDIO_UNREGISTER, (void *)(uintptr_t)&range), 0);
    assert_int_equal(scan(seen), -EPERM);
}

static void what_is_not_mapped_counts_as_written(void **state)
{
    (void)state;
    protect(0, PAGES);
    munmap(page_of(&area, 2), area.page_bytes);
    expect_written("--w---");
    /* Moved away, it has lost its registration and is written unseen. */
    char *to = mmap(NULL, 2 * area.page_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    assert_true(to != MAP_FAILED);
    char *aligned =
        (char *)(((uintptr_t)to + area.page_bytes - 1) & ~((uintptr_t)area.page_bytes - 1));
    if (mremap(page_of(&area, 4), area.page_bytes, area.page_bytes, MREMAP_MAYMOVE | MREMAP_FIXED,
               aligned) == aligned) {
        aligned[0] = 'u';
        expect_written("--w-w-");
    }
    munmap(to, 2 * area.page_bytes);
}

int main(int argc, char **argv)
{
    uint64_t features = 0;
    struct mf_error err;
    if (mf_uffd_features(&features, &err) < 0 ||
        (features & MF_UFFD_FEATURES_WP) != MF_UFFD_FEATURES_WP) {
        fprintf(stderr, "skipped: this kernel's userfaultfd has no WP_ASYNC (Linux 6.7)\n");
        return 77;
    }
    if (argc > 1 && strcmp(argv[1], "hugetlb") == 0) {
        if (!huge_pages_reserve(PAGES + 2))
            return 77;
        kind = AREA_HUGETLB;
    }
#define WATCHED(test) cmocka_unit_test_setup_teardown(test, watch, unwatch)
    const struct CMUnitTest tests[] = {
        WATCHED(sees_stores),
        WATCHED(sees_what_the_kernel_writes_for_the_process),
        WATCHED(does_not_see_other_ways_into_the_file),
        WATCHED(a_punched_page_is_not_written_but_zero),
        WATCHED(what_was_never_touched_counts_as_written),
        WATCHED(protects_a_part),
        WATCHED(what_is_not_watched_is_an_error),
        WATCHED(what_is_not_mapped_counts_as_written),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
