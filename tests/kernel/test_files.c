/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* RAM files and io_uring: what reading a hole does, and landing a page from a socket. */
#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "lib/uffd.h"
#include "lib/util.h"
#include "tests/kernel/area.h"
#include "tests/kernel/fact.h"

#define PAGES 64

static blkcnt_t blocks(const struct area *area)
{
    struct stat st;
    assert_int_equal(fstat(area->file, &st), 0);
    return st.st_blocks;
}

/** Why the source asks SEEK_DATA instead of looking at the bytes. */
static void reading_a_hole_through_a_mapping_allocates_it(void **state)
{
    (void)state;
    struct area area;
    char page[4096];
    area_make(&area, AREA_SHMEM, PAGES);
    assert_int_equal(blocks(&area), 0);
    assert_int_equal(lseek(area.file, 0, SEEK_DATA), -1);
    assert_int_equal(errno, ENXIO);
    assert_int_equal(pread(area.file, page, sizeof(page), 0), sizeof(page));
    assert_int_equal(blocks(&area), 0); /* read(2) leaves it a hole */
    volatile char *at = area.second;
    assert_int_equal(*at, 0);
    assert_true(blocks(&area) > 0);
    assert_int_equal(lseek(area.file, 0, SEEK_DATA), 0);
    area_free(&area);
}

static void seek_tells_data_from_holes(void **state)
{
    (void)state;
    struct area area;
    area_make(&area, AREA_SHMEM, PAGES);
    off_t page_bytes = (off_t)area.page_bytes;
    put(&area, 3, 'a');
    put(&area, 4, 'a');
    put(&area, 9, 'a');
    assert_int_equal(lseek(area.file, 0, SEEK_DATA), 3 * page_bytes);
    assert_int_equal(lseek(area.file, 3 * page_bytes, SEEK_HOLE), 5 * page_bytes);
    assert_int_equal(lseek(area.file, 5 * page_bytes, SEEK_DATA), 9 * page_bytes);
    assert_int_equal(fallocate(area.file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                               3 * page_bytes, 2 * page_bytes),
                     0);
    assert_int_equal(lseek(area.file, 0, SEEK_DATA), 9 * page_bytes);
    assert_int_equal(lseek(area.file, 10 * page_bytes, SEEK_DATA), -1);
    area_free(&area);
}

static int wait_for(struct io_uring *ring)
{
    struct io_uring_cqe *cqe;
    struct __kernel_timespec limit = {.tv_sec = 20};
    int rc = io_uring_wait_cqe_timeout(ring, &cqe, &limit);
    assert_int_equal(rc, 0);
    int result = cqe->res;
    io_uring_cqe_seen(ring, cqe);
    return result;
}

#define POLL_TAG 7

static void start_poll(struct io_uring *ring, int uffd)
{
    struct io_uring_sqe *sqe = io_uring_get_sqe(ring);
    io_uring_prep_poll_multishot(sqe, uffd, POLLIN);
    io_uring_sqe_set_data64(sqe, POLL_TAG);
    assert_int_equal(io_uring_submit(ring), 1);
}

/** cancel_poll() - and see both the poll and the cancellation complete. */
static void cancel_poll(struct io_uring *ring)
{
    struct io_uring_sqe *sqe = io_uring_get_sqe(ring);
    io_uring_prep_poll_remove(sqe, POLL_TAG);
    io_uring_sqe_set_data64(sqe, POLL_TAG + 1);
    assert_int_equal(io_uring_submit(ring), 1);
    int result;
    do {
        result = wait_for(ring);
    } while (result > 0); /* a poll result that was on its way */
    if (result == -ECANCELED)
        assert_int_equal(wait_for(ring), 0);
    else
        assert_int_equal(wait_for(ring), -ECANCELED);
}

static void io_uring_polls_a_userfaultfd(void **state)
{
    (void)state;
    struct area area;
    struct io_uring ring;
    area_make(&area, AREA_SHMEM, PAGES);
    area_register(&area, BOTH_MODES);
    assert_int_equal(io_uring_queue_init(8, &ring, 0), 0);
    start_poll(&ring, area.uffd);
    for (size_t i = 0; i < 3; i++) {
        struct actor reader = {.act = ACT_READ, .at = page_of(&area, i)};
        actor_start(&reader);
        assert_int_equal(wait_for(&ring) & POLLIN, POLLIN);
        struct uffd_msg message;
        while (read(area.uffd, &message, sizeof(message)) == sizeof(message))
            ;
        put(&area, i, 'a');
        assert_int_equal(continue_pages(&area, i, 1, NULL), 0);
        actor_finish(&reader);
    }
    cancel_poll(&ring);
    io_uring_queue_exit(&ring);
    area_free(&area);
}

/** A poll that is under way counts as a user of the userfaultfd: closing the descriptor does not
 * end it. */
static void a_poll_under_way_holds_a_reference(void **state)
{
    (void)state;
    struct area area;
    struct io_uring ring;
    area_make(&area, AREA_SHMEM, PAGES);
    area_register(&area, BOTH_MODES);
    assert_int_equal(io_uring_queue_init(8, &ring, 0), 0);
    start_poll(&ring, area.uffd);
    struct actor reader = {.act = ACT_READ, .at = page_of(&area, 0)};
    actor_start(&reader);
    assert_int_equal(wait_for(&ring) & POLLIN, POLLIN);
    close(area.uffd);
    area.uffd = -1;
    assert_true(actor_waits(&reader));
    cancel_poll(&ring);
    actor_finish(&reader);
    assert_int_equal(reader.value, 0);
    io_uring_queue_exit(&ring);
    area_free(&area);
}

/** The landing: from a socket into a hole by way of the second mapping, which is not watched, while
 * a guest waits for that very page. */
static void io_uring_receives_into_a_hole(void **state)
{
    (void)state;
    struct area area;
    struct io_uring ring;
    int ends[2];
    area_make(&area, AREA_SHMEM, PAGES);
    area_register(&area, BOTH_MODES);
    assert_int_equal(io_uring_queue_init(8, &ring, 0), 0);
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), 0);

    struct actor reader = {.act = ACT_READ, .at = page_of(&area, 2)};
    actor_start(&reader);
    assert_int_equal(next_message(area.uffd).event, UFFD_EVENT_PAGEFAULT);

    size_t length_bytes = 4 * area.page_bytes;
    io_uring_prep_recv(io_uring_get_sqe(&ring), ends[0], area.second + area.page_bytes,
                       length_bytes, MSG_WAITALL);
    assert_int_equal(io_uring_submit(&ring), 1);
    cleanup_free char *sent = malloc(length_bytes);
    memset(sent, 's', length_bytes);
    assert_int_equal(mf_write_all(ends[1], sent, length_bytes), 0);
    assert_int_equal(wait_for(&ring), length_bytes);
    assert_true(no_message(area.uffd)); /* the second mapping raised no fault */
    assert_int_equal(lseek(area.file, 0, SEEK_DATA), area.page_bytes);
    assert_int_equal(lseek(area.file, (off_t)area.page_bytes, SEEK_HOLE), 5 * area.page_bytes);

    assert_int_equal(continue_pages(&area, 1, 4, NULL), 0);
    actor_finish(&reader);
    assert_int_equal(reader.value, 's');
    assert_memory_equal(page_of(&area, 1), sent, length_bytes);
    close(ends[0]);
    close(ends[1]);
    io_uring_queue_exit(&ring);
    area_free(&area);
}

int main(int argc, char **argv)
{
    struct io_uring ring;
    int rc = io_uring_queue_init(8, &ring, 0);
    if (rc < 0) {
        printf("skipped: needs io_uring (%s)\n", strerror(-rc));
        return 77;
    }
    io_uring_queue_exit(&ring);
    static const struct fact facts[] = {
        FACT(reading_a_hole_through_a_mapping_allocates_it),
        FACT(seek_tells_data_from_holes),
        FACT(io_uring_polls_a_userfaultfd),
        FACT(a_poll_under_way_holds_a_reference),
        FACT(io_uring_receives_into_a_hole),
    };
    return facts_main(argc, argv, facts, sizeof(facts) / sizeof(facts[0]), MF_UFFD_FEATURES);
}
