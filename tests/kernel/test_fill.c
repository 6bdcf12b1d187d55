/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What UFFDIO_CONTINUE, COPY, ZEROPAGE and the range ioctls answer, in every case that memferry
 * meets. */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "lib/uffd.h"
#include "lib/util.h"
#include "tests/kernel/area.h"
#include "tests/kernel/fact.h"

static void continue_stops_at_a_hole(void **state)
{
    (void)state;
    struct area area;
    int64_t result;
    area_make(&area, AREA_SHMEM, 8);
    area_register(&area, BOTH_MODES);
    for (size_t i = 0; i < 3; i++)
        put(&area, i, 'a');
    assert_int_equal(continue_pages(&area, 0, 8, &result), EAGAIN);
    assert_int_equal(result, 3 * area.page_bytes);
    uint64_t done_bytes = 99;
    put(&area, 3, 'b');
    assert_int_equal(
        mf_uffd_continue(area.uffd, (uintptr_t)page_of(&area, 3), 2 * area.page_bytes, &done_bytes),
        -EAGAIN);
    assert_int_equal(done_bytes, area.page_bytes);
    area_free(&area);
}

static void continue_stops_at_a_mapped_page(void **state)
{
    (void)state;
    struct area area;
    int64_t result;
    area_make(&area, AREA_SHMEM, 8);
    area_register(&area, BOTH_MODES);
    for (size_t i = 0; i < 8; i++)
        put(&area, i, 'a');
    assert_int_equal(continue_pages(&area, 5, 1, &result), 0);
    assert_int_equal(result, area.page_bytes);
    assert_int_equal(continue_pages(&area, 2, 6, &result), EAGAIN);
    assert_int_equal(result, 3 * area.page_bytes);
    area_free(&area);
}

static void continue_on_a_mapped_page_is_eexist(void **state)
{
    (void)state;
    struct area area;
    int64_t result;
    uint64_t done_bytes = 99;
    area_make(&area, AREA_SHMEM, 2);
    area_register(&area, BOTH_MODES);
    put(&area, 0, 'a');
    put(&area, 1, 'a');
    assert_int_equal(continue_pages(&area, 0, 1, &result), 0);
    assert_int_equal(continue_pages(&area, 0, 2, &result), EEXIST);
    assert_int_equal(result, -EEXIST);
    assert_int_equal(
        mf_uffd_continue(area.uffd, (uintptr_t)area.guest, area.page_bytes, &done_bytes), -EEXIST);
    assert_int_equal(done_bytes, 0);
    area_free(&area);
}

static void continue_on_a_hole_is_efault(void **state)
{
    (void)state;
    struct area area;
    int64_t result;
    area_make(&area, AREA_SHMEM, 2);
    area_register(&area, BOTH_MODES);
    assert_int_equal(continue_pages(&area, 0, 1, &result), EFAULT);
    assert_int_equal(result, -EFAULT);
    area_free(&area);
}

static void continue_outside_a_registration_is_enoent(void **state)
{
    (void)state;
    struct area area;
    int64_t result;
    area_make(&area, AREA_SHMEM, 8);
    for (size_t i = 0; i < 8; i++)
        put(&area, i, 'a');
    assert_int_equal(continue_pages(&area, 0, 1, &result), ENOENT); /* not registered at all */
    assert_int_equal(result, -ENOENT);
    area_free(&area);
}

/** A mapping that ends: nothing is done even where the range begins well. */
static void continue_across_the_end_is_enoent(void **state)
{
    (void)state;
    struct area area;
    int64_t result;
    area_make(&area, AREA_SHMEM, 8);
    for (size_t i = 0; i < 8; i++)
        put(&area, i, 'a');
    /* Unmapped before it is registered: no event, so nobody has to read one. */
    assert_int_equal(munmap(page_of(&area, 4), 4 * area.page_bytes), 0);
    struct uffdio_register reg = {
        .range = {.start = (uintptr_t)area.guest, .len = 4 * area.page_bytes}, .mode = BOTH_MODES};
    assert_int_equal(ioctl_errno(area.uffd, UFFDIO_REGISTER, &reg), 0);
    assert_int_equal(continue_pages(&area, 2, 4, &result), ENOENT);
    assert_int_equal(result, -ENOENT);
    assert_int_equal(continue_pages(&area, 5, 1, &result), ENOENT);
    assert_int_equal(continue_pages(&area, 2, 2, &result), 0);
    area_free(&area);
}

/** With EFAULT on newer kernels, as on a hole: seen on Linux 7.2. */
static void continue_beyond_the_file_is_refused(void **state)
{
    (void)state;
    struct area area;
    int64_t result;
    area_make(&area, AREA_SHMEM, 8);
    area_register(&area, BOTH_MODES);
    assert_int_equal(ftruncate(area.file, (off_t)(4 * area.page_bytes)), 0);
    put(&area, 0, 'a');
    int code = continue_pages(&area, 4, 1, &result);
    assert_true(code == EINVAL || code == EFAULT);
    area_free(&area);
}

static void zeropage_on_shmem(void **state)
{
    (void)state;
    struct area area;
    uint64_t done_bytes = 99;
    area_make(&area, AREA_SHMEM, 8);
    area_register(&area, BOTH_MODES);
    assert_int_equal(
        mf_uffd_zeropage(area.uffd, (uintptr_t)area.guest, 4 * area.page_bytes, &done_bytes), 0);
    assert_int_equal(done_bytes, 4 * area.page_bytes);
    for (size_t i = 0; i < 4 * area.page_bytes; i++)
        assert_int_equal(area.guest[i], 0);
    assert_int_equal(
        mf_uffd_zeropage(area.uffd, (uintptr_t)area.guest, area.page_bytes, &done_bytes), -EEXIST);
    assert_int_equal(done_bytes, 0);
    /* A page that is in the file but not mapped is not overwritten: the zeros lose. */
    put(&area, 6, 'a');
    assert_int_equal(
        mf_uffd_zeropage(area.uffd, (uintptr_t)page_of(&area, 5), 3 * area.page_bytes, &done_bytes),
        -EAGAIN);
    assert_int_equal(done_bytes, area.page_bytes);
    assert_int_equal(area.second[6 * area.page_bytes], 'a');
    area_free(&area);
}

static void registering_what_another_owns_is_ebusy(void **state)
{
    (void)state;
    struct area area;
    struct mf_error err = {0};
    area_make(&area, AREA_SHMEM, 2);
    area_register(&area, BOTH_MODES);
    cleanup_close int other = mf_uffd_open();
    assert_int_equal(mf_uffd_api(other, MF_UFFD_FEATURES, 0, NULL, &err), 0);
    assert_int_equal(mf_uffd_register(other, (uintptr_t)area.guest, area.length_bytes, &err),
                     -EBUSY);
    assert_non_null(strstr(err.text, "another program"));
    area_free(&area);
}

/** Refused since about 6.17; before that nobody looked whose it was. */
static void unregistering_what_another_owns_may_be_done(void **state)
{
    (void)state;
    struct area area;
    area_make(&area, AREA_SHMEM, 2);
    area_register(&area, BOTH_MODES);
    cleanup_close int other = mf_uffd_open();
    assert_int_equal(mf_uffd_api(other, MF_UFFD_FEATURES, 0, NULL, &(struct mf_error){0}), 0);
    struct uffdio_range range = {.start = (uintptr_t)area.guest, .len = area.length_bytes};
    const int code = ioctl_errno(other, UFFDIO_UNREGISTER, &range);
    /* If it was done it is no longer the first one's, and can be had. */
    assert_int_equal(range_register(other, area.guest, area.length_bytes, BOTH_MODES),
                     code == 0 ? 0 : EBUSY);
    assert_true(code == 0 || code == EINVAL);
    /* Its unmapping would be told to whoever has it, who does not read. */
    if (code == 0)
        assert_int_equal(ioctl_errno(other, UFFDIO_UNREGISTER, &range), 0);
    area_free(&area);
}

/** A process that has ended: fills say ESRCH and leave the result field alone. */
static void after_exit_fills_are_esrch(void **state)
{
    (void)state;
    struct area area;
    struct mf_error err;
    area_make(&area, AREA_SHMEM, 2);
    int ends[2];
    assert_int_equal(pipe2(ends, O_CLOEXEC), 0);
    pid_t child = fork();
    if (child == 0) {
        /* The child's own userfaultfd, over its own copy of the mapping. */
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        int fd = mf_uffd_open();
        mf_uffd_api(fd, MF_UFFD_FEATURES, 0, NULL, NULL);
        mf_uffd_register(fd, (uintptr_t)area.guest, area.length_bytes, NULL);
        mf_write_all(ends[1], &fd, sizeof(fd));
        for (;;)
            pause();
    }
    int remote_fd, saved = area.uffd;
    assert_int_equal(read(ends[0], &remote_fd, sizeof(remote_fd)), sizeof(remote_fd));
    cleanup_close int pidfd = (int)syscall(SYS_pidfd_open, child, 0);
    area.uffd = (int)syscall(SYS_pidfd_getfd, pidfd, remote_fd, 0);
    assert_true(area.uffd >= 0);
    int64_t result;
    put(&area, 0, 'a');
    assert_int_equal(continue_pages(&area, 0, 1, &result),
                     0); /* works from outside while it lives */
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);

    assert_int_equal(continue_pages(&area, 1, 1, &result), ESRCH);
    assert_int_equal(result, 12345);
    uint64_t done_bytes = 99;
    assert_int_equal(
        mf_uffd_continue(area.uffd, (uintptr_t)area.guest, area.page_bytes, &done_bytes), -ESRCH);
    assert_int_equal(done_bytes, 0);
    assert_int_equal(
        mf_uffd_zeropage(area.uffd, (uintptr_t)area.guest, area.page_bytes, &done_bytes), -ESRCH);
    assert_int_equal(mf_uffd_register(area.uffd, (uintptr_t)area.guest, area.length_bytes, &err),
                     -ENOMEM);
    assert_int_equal(mf_uffd_wake(area.uffd, (uintptr_t)area.guest, area.length_bytes), 0);
    assert_int_equal(mf_uffd_unregister(area.uffd, (uintptr_t)area.guest, area.length_bytes), 0);
    assert_true(no_message(area.uffd)); /* and it never polls as hung up: a pidfd has to tell */
    close(area.uffd);
    area.uffd = saved;
    close(ends[0]);
    close(ends[1]);
    area_free(&area);
}

static void continue_overwrites_poison(void **state)
{
    (void)state;
    struct area area;
    area_make_with(&area, AREA_SHMEM, 2, MF_UFFD_FEATURES | UFFD_FEATURE_POISON);
    area_register(&area, BOTH_MODES);
    struct uffdio_poison poison = {
        .range = {.start = (uintptr_t)area.guest, .len = area.page_bytes}};
    assert_int_equal(ioctl_errno(area.uffd, UFFDIO_POISON, &poison), 0);
    assert_int_equal(poison.updated, area.page_bytes);
    put(&area, 0, 'a');
    assert_int_equal(continue_pages(&area, 0, 1, NULL), 0);
    assert_int_equal(area.guest[0], 'a');
    area_free(&area);
}

/** In private memory, where COPY does; in shared memory it overwrites it. */
static void zeropage_leaves_poison_in_private_memory(void **state)
{
    (void)state;
    static const char letters[65536] = "b";
    struct area area;
    area_make_with(&area, AREA_SHMEM, 2, MF_UFFD_FEATURES | UFFD_FEATURE_POISON);
    area_register(&area, BOTH_MODES);
    char *private =
        mmap(NULL, area.page_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    assert_ptr_not_equal(private, MAP_FAILED);
    assert_int_equal(
        range_register(area.uffd, private, area.page_bytes, UFFDIO_REGISTER_MODE_MISSING), 0);
    char *const place[] = {area.guest, private};
    for (size_t i = 0; i < 2; i++) {
        struct uffdio_poison poison = {
            .range = {.start = (uintptr_t)place[i], .len = area.page_bytes}};
        struct uffdio_zeropage zeros = {.range = poison.range};
        assert_int_equal(ioctl_errno(area.uffd, UFFDIO_POISON, &poison), 0);
        assert_int_equal(ioctl_errno(area.uffd, UFFDIO_ZEROPAGE, &zeros), i == 0 ? 0 : EEXIST);
    }
    assert_int_equal(area.guest[0], 0);
    struct uffdio_copy copy = {
        .dst = (uintptr_t) private, .src = (uintptr_t)letters, .len = area.page_bytes};
    assert_int_equal(ioctl_errno(area.uffd, UFFDIO_COPY, &copy), 0);
    assert_int_equal(private[0], 'b');
    area_free(&area);
    munmap(private, area.page_bytes);
}

#ifndef MADV_GUARD_INSTALL
#define MADV_GUARD_INSTALL 102
#endif

/** On newer kernels it stays, and the page counts as mapped: seen on Linux 7.2. */
static void continue_on_a_guard_overwrites_it_or_is_eexist(void **state)
{
    (void)state;
    struct area area;
    int64_t result;
    area_make(&area, AREA_SHMEM, 2);
    area_register(&area, BOTH_MODES);
    if (madvise(area.guest, area.page_bytes, MADV_GUARD_INSTALL) != 0)
        lacking("guards in shared memory (Linux 6.15: %s)", strerror(errno));
    put(&area, 0, 'a');
    int code = continue_pages(&area, 0, 1, &result);
    if (code == 0)
        assert_int_equal(area.guest[0], 'a');
    else
        assert_int_equal(code, EEXIST);
    area_free(&area);
}

/** Why a private mapping of RAM is refused: what is written to it is seen by nobody. */
static void continue_of_a_private_mapping_is_read_only(void **state)
{
    (void)state;
    struct area area;
    area_make(&area, AREA_SHMEM, 2);
    map_at(area.guest, area.length_bytes, MAP_PRIVATE, area.file);
    area_register(&area, BOTH_MODES);
    put(&area, 0, 'a');
    assert_int_equal(continue_pages(&area, 0, 1, NULL), 0);
    assert_int_equal(area.guest[0], 'a');
    area.guest[0] = 'p'; /* its own copy, without a message */
    assert_true(no_message(area.uffd));
    assert_int_equal(area.second[0], 'a');
    area_free(&area);
}

/** Private anonymous memory: it can be copied into, not continued. */
static void private_memory_is_filled_by_copy_and_zeropage(void **state)
{
    (void)state;
    struct area area;
    uint64_t done_bytes;
    area_make(&area, AREA_SHMEM, 4);
    map_at(area.guest, area.length_bytes, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    assert_int_equal(area_register_pages(&area, 0, 4, UFFDIO_REGISTER_MODE_MINOR), EINVAL);
    assert_int_equal(area_register_pages(&area, 0, 4, UFFDIO_REGISTER_MODE_MISSING), 0);
    char bytes[2 * 4096];
    memset(bytes, 'c', sizeof(bytes));
    struct uffdio_copy copy = {
        .dst = (uintptr_t)page_of(&area, 1), .src = (uintptr_t)bytes, .len = sizeof(bytes)};
    assert_int_equal(ioctl_errno(area.uffd, UFFDIO_COPY, &copy), 0);
    assert_int_equal(copy.copy, sizeof(bytes));
    assert_memory_equal(page_of(&area, 1), bytes, sizeof(bytes));
    /* From a page that is a hole into those that are not. */
    copy.dst = (uintptr_t)area.guest;
    copy.copy = 12345;
    assert_int_equal(ioctl_errno(area.uffd, UFFDIO_COPY, &copy), EAGAIN);
    assert_int_equal(copy.copy, area.page_bytes);
    assert_int_equal(ioctl_errno(area.uffd, UFFDIO_COPY, &copy), EEXIST);
    assert_int_equal(copy.copy, -EEXIST);
    assert_int_equal(
        mf_uffd_zeropage(area.uffd, (uintptr_t)page_of(&area, 3), area.page_bytes, &done_bytes), 0);
    assert_int_equal(*page_of(&area, 3), 0);
    int64_t result;
    assert_int_equal(continue_pages(&area, 3, 1, &result), EINVAL);
    area_free(&area);
}

/** Modes are replaced when one of them is new, but never merely taken away: that takes UNREGISTER.
 */
static void registering_fewer_modes_changes_nothing(void **state)
{
    (void)state;
    struct area area;
    area_make(&area, AREA_SHMEM, 8);
    area_register(&area, BOTH_MODES);
    assert_int_equal(area_register_pages(&area, 0, 8, UFFDIO_REGISTER_MODE_MINOR), 0);
    assert_int_equal(area_register_pages(&area, 2, 2, UFFDIO_REGISTER_MODE_MINOR), 0);
    for (size_t page = 1; page <= 2; page++) {
        struct actor reader = {.act = ACT_READ, .at = page_of(&area, page)};
        actor_start(&reader);
        struct uffd_msg message = next_message(area.uffd);
        assert_int_equal(message.event, UFFD_EVENT_PAGEFAULT);
        assert_int_equal(message.arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_MINOR, 0);
        put(&area, page, 'a');
        assert_int_equal(continue_pages(&area, page, 1, NULL), 0);
        actor_finish(&reader);
    }
    area_free(&area);
}

int main(int argc, char **argv)
{
    static const struct fact facts[] = {
        FACT(continue_stops_at_a_hole),
        FACT(continue_stops_at_a_mapped_page),
        FACT(continue_on_a_mapped_page_is_eexist),
        FACT(continue_on_a_hole_is_efault),
        FACT(continue_outside_a_registration_is_enoent),
        FACT(continue_across_the_end_is_enoent),
        FACT(continue_beyond_the_file_is_refused),
        FACT(zeropage_on_shmem),
        FACT(registering_what_another_owns_is_ebusy),
        FACT(unregistering_what_another_owns_may_be_done),
        FACT(after_exit_fills_are_esrch),
        FACT_NEEDS(continue_overwrites_poison, UFFD_FEATURE_POISON),
        FACT_NEEDS(zeropage_leaves_poison_in_private_memory, UFFD_FEATURE_POISON),
        FACT(continue_on_a_guard_overwrites_it_or_is_eexist),
        FACT(continue_of_a_private_mapping_is_read_only),
        FACT(private_memory_is_filled_by_copy_and_zeropage),
        FACT(registering_fewer_modes_changes_nothing),
    };
    return facts_main(argc, argv, facts, sizeof(facts) / sizeof(facts[0]), MF_UFFD_FEATURES);
}
