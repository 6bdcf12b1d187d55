/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* lib/session_file.c: what is created is mapped again; a damaged file is refused. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "lib/session_file.h"
#include "lib/util.h"

static int new_file(void)
{
    int fd = memfd_create("test-session", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    assert_true(fd >= 0);
    return fd;
}

static const uint64_t two_regions[] = {5000, 3};

static void maps_what_was_created(void **state)
{
    (void)state;
    cleanup_close int fd = new_file();
    struct mf_session_view view, other;
    struct mf_error err = {0};
    assert_int_equal(mf_session_file_create(fd, two_regions, 2, &err), 0);
    assert_int_equal(mf_session_file_map(fd, &view, &err), 0);
    assert_int_equal(view.file->region_count, 2);
    assert_int_equal(view.pages[0].count, 5000);
    assert_int_equal(view.pages[1].count, 3);
    assert_int_equal((uintptr_t)view.pages[0].state % 4096, 0);
    assert_int_equal((uintptr_t)view.pages[1].state % 4096, 0);
    for (uint64_t p = 0; p < 5000; p++)
        assert_int_equal(mf_page_load(&view.pages[0], p), MF_PAGE_UNCONFIRMED);
    assert_int_equal(atomic_load(&view.file->figures.data_pages), 0);

    /* A successor sees what its predecessor left. */
    assert_int_equal(mf_session_file_map(fd, &other, &err), 0);
    mf_page_fill(&view.pages[0], 4999, 1, MF_PAGE_CONFIRMED);
    assert_true(mf_page_claim(&view.pages[1], 2));
    atomic_store(&view.file->figures.data_pages, 7);
    mf_session_file_unmap(&view);
    assert_null(view.file);
    assert_int_equal(mf_page_load(&other.pages[0], 4999), MF_PAGE_CONFIRMED);
    assert_int_equal(mf_page_load(&other.pages[0], 4998), MF_PAGE_UNCONFIRMED);
    assert_int_equal(mf_page_load(&other.pages[1], 2), MF_PAGE_LANDING);
    assert_int_equal(atomic_load(&other.file->figures.data_pages), 7);
    mf_session_file_unmap(&other);
    mf_session_file_unmap(&other);
}

static void takes_as_many_regions_as_there_may_be(void **state)
{
    (void)state;
    uint64_t pages[MF_REGIONS_MAX + 1];
    struct mf_session_view view;
    struct mf_error err = {0};
    for (unsigned i = 0; i <= MF_REGIONS_MAX; i++)
        pages[i] = 4095 + i % 3;
    cleanup_close int fd = new_file(), none = new_file();
    assert_int_equal(mf_session_file_create(fd, pages, MF_REGIONS_MAX, &err), 0);
    assert_int_equal(mf_session_file_map(fd, &view, &err), 0);
    /* Each has its own bytes. */
    for (unsigned i = 0; i < MF_REGIONS_MAX; i++)
        for (uint64_t p = 0; p < view.pages[i].count; p++)
            assert_true(mf_page_claim(&view.pages[i], p));
    mf_session_file_unmap(&view);
    assert_int_equal(mf_session_file_create(none, pages, MF_REGIONS_MAX + 1, &err), -EINVAL);
    assert_int_equal(mf_session_file_create(none, pages, 0, &err), -EINVAL);
}

/* Whoever holds the descriptor can't pull the ground from under the others' mappings. */
static void keeps_its_size(void **state)
{
    (void)state;
    cleanup_close int fd = new_file();
    struct stat st;
    assert_int_equal(mf_session_file_create(fd, two_regions, 2, NULL), 0);
    assert_int_equal(fstat(fd, &st), 0);
    assert_int_equal(ftruncate(fd, 0), -1);
    assert_int_equal(ftruncate(fd, st.st_size + 4096), -1);
}

/* A file that is good but for @bytes at @at. */
static void refuses(uint64_t at, const void *bytes, size_t length_bytes)
{
    cleanup_close int fd = new_file();
    struct mf_session_view view;
    struct mf_error err = {0};
    assert_int_equal(mf_session_file_create(fd, two_regions, 2, &err), 0);
    assert_int_equal(pwrite(fd, bytes, length_bytes, (off_t)at), length_bytes);
    int rc = mf_session_file_map(fd, &view, &err);
    if (rc != -EPROTO)
        fail_msg("damage at byte %llu was not seen", (unsigned long long)at);
    assert_true(strlen(err.text) > 10);
}
#define REFUSES(field, type, ...)                                                                  \
    do {                                                                                           \
        static const type values[] = {__VA_ARGS__};                                                \
        for (size_t i = 0; i < sizeof(values) / sizeof(values[0]); i++)                            \
            refuses(offsetof(struct mf_session_file, field), &values[i], sizeof(type));            \
    } while (0)

static void refuses_damage(void **state)
{
    (void)state;
    REFUSES(magic, uint64_t, 0, UINT64_MAX);
    REFUSES(version, uint32_t, 0, 2, UINT32_MAX);
    REFUSES(region_count, uint32_t, 0, 1, 3, MF_REGIONS_MAX, MF_REGIONS_MAX + 1, UINT32_MAX);
    REFUSES(region[0].pages, uint64_t, 1, 8193, 1 << 20, UINT64_MAX, UINT64_MAX - 8191);
    REFUSES(region[1].pages, uint64_t, 4097, UINT64_MAX, UINT64_C(1) << 63);
    REFUSES(region[0].offset_bytes, uint64_t, 0, 4096, 8191, 8200, 16384, UINT64_MAX,
            UINT64_MAX - 7);
    REFUSES(region[1].offset_bytes, uint64_t, 0, 8192, 8192 + 4096, 8192 + 8184, UINT64_MAX - 4095);
}

static void refuses_other_sizes(void **state)
{
    (void)state;
    static const off_t sizes[] = {0,
                                  1,
                                  4096,
                                  MF_SESSION_FILE_HEADER_BYTES - 1,
                                  MF_SESSION_FILE_HEADER_BYTES,
                                  MF_SESSION_FILE_HEADER_BYTES + 8192};
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        /* A copy, for the original's size is sealed. */
        cleanup_close int fd = new_file(), copy = new_file();
        struct mf_session_view view;
        struct mf_error err = {0};
        static uint8_t bytes[MF_SESSION_FILE_HEADER_BYTES + 3 * 4096];
        assert_int_equal(mf_session_file_create(fd, two_regions, 2, &err), 0);
        assert_int_equal(pread(fd, bytes, sizeof(bytes), 0), sizeof(bytes));
        assert_int_equal(mf_write_all(copy, bytes, sizeof(bytes)), 0);
        assert_int_equal(ftruncate(copy, sizes[i]), 0);
        assert_int_equal(mf_session_file_map(copy, &view, &err), -EPROTO);
        assert_true(strlen(err.text) > 10);
    }
}

static void says_what_is_no_file(void **state)
{
    (void)state;
    struct mf_session_view view;
    struct mf_error err = {0};
    cleanup_close int zero = open("/dev/null", O_RDONLY | O_CLOEXEC);
    assert_int_equal(mf_session_file_map(-1, &view, &err), -EBADF);
    assert_true(mf_session_file_map(zero, &view, &err) < 0);
    assert_true(mf_session_file_create(zero, two_regions, 2, &err) < 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(maps_what_was_created),
        cmocka_unit_test(takes_as_many_regions_as_there_may_be),
        cmocka_unit_test(keeps_its_size),
        cmocka_unit_test(refuses_damage),
        cmocka_unit_test(refuses_other_sizes),
        cmocka_unit_test(says_what_is_no_file),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
