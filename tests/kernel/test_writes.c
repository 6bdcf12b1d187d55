/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Which writes to a watched mapping are seen (lib/pagemap.h over WP_ASYNC), and which are not. With
 * the argument "hugetlb" the same on huge pages, where they can be reserved.
 */
#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include "lib/pagemap.h"
#include "lib/uffd.h"
#include "lib/util.h"
#include "tests/kernel/area.h"
#include "tests/kernel/fact.h"

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

/** scan_raw() - one PAGEMAP_SCAN over the guest's mapping, or another; the number of runs, or
 * -errno. */
static long scan_raw(const char *at, uint64_t flags, uint64_t categories)
{
    struct page_region found[PAGES];
    struct pm_scan_arg arg = {.size = sizeof(arg),
                              .flags = flags,
                              .start = (uintptr_t)at,
                              .end = (uintptr_t)at + area.length_bytes,
                              .vec = (uintptr_t)found,
                              .vec_len = PAGES,
                              .category_mask = categories,
                              .return_mask = categories};
    long count = ioctl(pagemap_fd, PAGEMAP_SCAN, &arg);
    return count < 0 ? -errno : count;
}

static void without_a_check_what_is_not_watched_is_left_out_in_silence(void **state)
{
    (void)state;
    area.second[0] = 'x';
    assert_int_equal(scan_raw(area.second, PM_SCAN_CHECK_WPASYNC, PAGE_IS_WRITTEN), -EPERM);
    assert_int_equal(scan_raw(area.second, PM_SCAN_WP_MATCHING, PAGE_IS_WRITTEN), 0);
}

static void getting_and_protecting_can_be_one_call(void **state)
{
    (void)state;
    protect(0, PAGES);
    page_of(&area, 2)[0] = 'x';
    assert_int_equal(
        scan_raw(area.guest, PM_SCAN_CHECK_WPASYNC | PM_SCAN_WP_MATCHING, PAGE_IS_WRITTEN), 1);
    expect_written("------");
    page_of(&area, 2)[0] = 'y';
    expect_written("--w---");
}

/** Asked for what is written and present, PM_SCAN_WP_MATCHING leaves holes alone; asked for all of
 * huge pages' holes it is known to lock up older kernels. */
static void protecting_what_was_written_leaves_holes_alone(void **state)
{
    (void)state;
    struct mf_error err;
    uint8_t seen[PAGES];
    munmap(area.guest, area.length_bytes);
    area.guest = mmap(area.guest, area.length_bytes, PROT_READ | PROT_WRITE,
                      MAP_SHARED | MAP_FIXED_NOREPLACE, area.file, 0);
    assert_true(area.guest != MAP_FAILED);
    punch(0);
    assert_int_equal(mf_uffd_register_wp(area.uffd, (uintptr_t)area.guest, area.length_bytes, &err),
                     0);
    page_of(&area, 1)[0] = 'w';
    page_of(&area, 4)[0] = 'w';
    const uint8_t written = MF_PAGEMAP_WRITTEN | MF_PAGEMAP_PRESENT;
    assert_int_equal(mf_pagemap_protect(pagemap_fd, (uintptr_t)area.guest, area.length_bytes,
                                        area.page_bytes, seen),
                     0);
    for (size_t i = 0; i < PAGES; i++)
        assert_int_equal(seen[i], i == 1 || i == 4 ? written : 0);
    expect_written("w-ww-w"); /* what is not mapped counts, as ever */
    page_of(&area, 4)[1] = 'x';
    expect_written("w-wwww");
}

/** I/O of a ring into a buffer that was registered before protection: it goes past page tables. */
static void does_not_see_input_into_pages_pinned_before(void **state)
{
    (void)state;
    struct io_uring ring;
    struct io_uring_cqe *cqe;
    struct iovec buffer = {page_of(&area, 1), area.page_bytes};
    int ends[2];
    int rc = io_uring_queue_init(4, &ring, 0);
    if (rc < 0)
        lacking("io_uring (%s)", strerror(-rc));
    assert_int_equal(io_uring_register_buffers(&ring, &buffer, 1), 0);
    protect(0, PAGES);
    assert_int_equal(pipe2(ends, O_CLOEXEC), 0);
    assert_int_equal(write(ends[1], "p", 1), 1);
    io_uring_prep_read_fixed(io_uring_get_sqe(&ring), ends[0], buffer.iov_base, 1, 0, 0);
    assert_int_equal(io_uring_submit(&ring), 1);
    assert_int_equal(io_uring_wait_cqe(&ring, &cqe), 0);
    assert_int_equal(cqe->res, 1);
    expect_written("------");
    assert_int_equal(page_of(&area, 1)[0], 'p');
    close(ends[0]);
    close(ends[1]);
    io_uring_unregister_buffers(&ring); /* or the pin outlives the ring for a while */
    io_uring_queue_exit(&ring);
}

/** On huge pages truncation takes the protection along, so there it counts as written: safe too. */
static void a_truncated_page_is_not_written_either(void **state)
{
    (void)state;
    protect(0, PAGES);
    assert_int_equal(ftruncate(area.file, (off_t)(3 * area.page_bytes)), 0);
    assert_int_equal(ftruncate(area.file, (off_t)area.length_bytes), 0);
    expect_written(kind == AREA_HUGETLB ? "---www" : "------");
    assert_false(is_present(4));
    assert_int_equal(page_of(&area, 4)[0], 0);
    expect_written(kind == AREA_HUGETLB ? "---www" : "------");
}

/** Both kinds of watching on one mapping, which a destination that is a source at once would need.
 */
static void minor_and_write_protection_stand_together(void **state)
{
    (void)state;
    struct mf_error err;
    close(area.uffd);
    area.uffd = mf_uffd_open();
    assert_int_equal(mf_uffd_api(area.uffd, MF_UFFD_FEATURES_WP | MF_UFFD_FEATURES,
                                 MF_UFFD_FEATURES_WANTED, NULL, &err),
                     0);
    area_register(&area, BOTH_MODES | UFFDIO_REGISTER_MODE_WP);
    protect(0, PAGES);
    expect_written("------");
    for (size_t i = 1; i <= 2; i++) {
        struct actor dropper = {
            .act = ACT_DONTNEED, .at = page_of(&area, i), .length_bytes = area.page_bytes};
        actor_start(&dropper);
        assert_int_equal(next_message(area.uffd).event, UFFD_EVENT_REMOVE);
        actor_finish(&dropper);
    }
    /* Continued as ever, the page counts as written; with MODE_WP it does not, until it is. */
    assert_int_equal(continue_pages(&area, 1, 1, NULL), 0);
    struct uffdio_continue arg = {
        .range = {.start = (uintptr_t)page_of(&area, 2), .len = area.page_bytes},
        .mode = UFFDIO_CONTINUE_MODE_WP};
    assert_int_equal(ioctl_errno(area.uffd, UFFDIO_CONTINUE, &arg), 0);
    expect_written("-w----");
    page_of(&area, 2)[0] = 'w'; /* nobody is stopped */
    assert_true(no_message(area.uffd));
    expect_written("-ww---");
}

/** In this mode alone any memory may be registered, and nobody is ever made to wait. */
static void any_kind_of_memory_can_be_watched_for_writes(void **state)
{
    (void)state;
    struct mf_error err;
    size_t page_bytes = (size_t)sysconf(_SC_PAGESIZE);
    cleanup_close int both = mf_uffd_open(), file = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
    assert_true(both >= 0 && file >= 0);
    char *of_file = mmap(NULL, page_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
    char *shared = mmap(NULL, page_bytes, PROT_READ, MAP_SHARED, file, 0);
    char *anonymous =
        mmap(NULL, page_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    assert_true(of_file != MAP_FAILED && shared != MAP_FAILED && anonymous != MAP_FAILED);
    assert_int_equal(range_register(area.uffd, of_file, page_bytes, UFFDIO_REGISTER_MODE_WP), 0);
    assert_int_equal(range_register(area.uffd, shared, page_bytes, UFFDIO_REGISTER_MODE_WP), EPERM);
    assert_int_equal(range_register(area.uffd, anonymous, page_bytes, UFFDIO_REGISTER_MODE_WP), 0);
    of_file[0] = 'w';
    anonymous[0] = 'w';
    assert_true(no_message(area.uffd));
    /* Not in another mode, and not without the feature. */
    assert_int_equal(range_register(area.uffd, of_file, page_bytes, UFFDIO_REGISTER_MODE_MISSING),
                     EINVAL);
    assert_int_equal(mf_uffd_api(both, UFFD_FEATURE_PAGEFAULT_FLAG_WP, 0, NULL, &err), 0);
    struct uffdio_range range = {.start = (uintptr_t)of_file, .len = page_bytes};
    assert_int_equal(ioctl_errno(area.uffd, UFFDIO_UNREGISTER, &range), 0);
    assert_int_equal(range_register(both, of_file, page_bytes, UFFDIO_REGISTER_MODE_WP), EINVAL);
    munmap(of_file, page_bytes);
    munmap(shared, page_bytes);
    munmap(anonymous, page_bytes);
}

int main(int argc, char **argv)
{
    static const struct fact facts[] = {
        FACT_WITH(sees_stores, watch, unwatch),
        FACT_WITH(sees_what_the_kernel_writes_for_the_process, watch, unwatch),
        FACT_WITH(does_not_see_other_ways_into_the_file, watch, unwatch),
        FACT_WITH(a_punched_page_is_not_written_but_zero, watch, unwatch),
        FACT_WITH(what_was_never_touched_counts_as_written, watch, unwatch),
        FACT_WITH(protects_a_part, watch, unwatch),
        FACT_WITH(what_is_not_watched_is_an_error, watch, unwatch),
        FACT_WITH(what_is_not_mapped_counts_as_written, watch, unwatch),
        FACT_WITH(without_a_check_what_is_not_watched_is_left_out_in_silence, watch, unwatch),
        FACT_WITH(getting_and_protecting_can_be_one_call, watch, unwatch),
        FACT_WITH(protecting_what_was_written_leaves_holes_alone, watch, unwatch),
        FACT_WITH(does_not_see_input_into_pages_pinned_before, watch, unwatch),
        FACT_WITH(a_truncated_page_is_not_written_either, watch, unwatch),
        FACT_WITH(minor_and_write_protection_stand_together, watch, unwatch),
        FACT_WITH(any_kind_of_memory_can_be_watched_for_writes, watch, unwatch),
    };
    if (argc > 1 && strcmp(argv[1], "hugetlb") == 0) {
        if (!huge_pages_reserve(PAGES + 2))
            return 77;
        kind = AREA_HUGETLB;
        argv[1] = argv[0];
        argc--;
        argv++;
    }
    return facts_main(argc, argv, facts, sizeof(facts) / sizeof(facts[0]), MF_UFFD_FEATURES_WP);
}
