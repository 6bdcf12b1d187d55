/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* When the kernel tells of a changed layout, in which order, and what does not work until it was
 * read. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "lib/uffd.h"
#include "lib/util.h"
#include "tests/kernel/area.h"
#include "tests/kernel/fact.h"

#define PAGES 8

static void remove_tells_before_it_happens(void **state)
{
    (void)state;
    struct area area;
    area_make(&area, AREA_SHMEM, PAGES);
    area_register(&area, BOTH_MODES);
    put(&area, 2, 'a');
    struct actor remover = {
        .act = ACT_REMOVE, .at = page_of(&area, 1), .length_bytes = 3 * area.page_bytes};
    actor_start(&remover);
    await_readable(area.uffd);
    assert_int_equal(area.second[2 * area.page_bytes],
                     'a'); /* it waits for the message to be read */
    assert_true(actor_waits(&remover));
    struct uffd_msg message = next_message(area.uffd);
    assert_int_equal(message.event, UFFD_EVENT_REMOVE);
    assert_true(message.arg.remove.start == (uintptr_t)page_of(&area, 1));
    assert_true(message.arg.remove.end == (uintptr_t)page_of(&area, 4));
    actor_finish(&remover);
    assert_int_equal(remover.rc, 0);
    assert_int_equal(lseek(area.file, 0, SEEK_DATA), -1); /* punched out of the file */
    area_free(&area);
}

static long call_free(struct actor *actor)
{
    return madvise(actor->at, actor->length_bytes, MADV_FREE);
}

static void dontneed_looks_like_remove(void **state)
{
    (void)state;
    struct area area;
    area_make(&area, AREA_SHMEM, PAGES);
    area_register(&area, BOTH_MODES);
    put(&area, 0, 'a');
    struct actor dropper = {.act = ACT_DONTNEED, .at = area.guest, .length_bytes = area.page_bytes};
    actor_start(&dropper);
    struct uffd_msg message = next_message(area.uffd);
    assert_int_equal(message.event, UFFD_EVENT_REMOVE);
    actor_finish(&dropper);
    assert_int_equal(lseek(area.file, 0, SEEK_DATA), 0); /* but the content stays */
    area_free(&area);
}

static void unmap_tells_the_raw_range_afterwards(void **state)
{
    (void)state;
    struct area area;
    area_make(&area, AREA_SHMEM, PAGES);
    /* Only the first half is registered; the message covers what was unmapped. */
    struct uffdio_register reg = {
        .range = {.start = (uintptr_t)area.guest, .len = area.length_bytes / 2},
        .mode = BOTH_MODES};
    assert_int_equal(ioctl_errno(area.uffd, UFFDIO_REGISTER, &reg), 0);
    struct actor unmapper = {
        .act = ACT_UNMAP, .at = page_of(&area, 2), .length_bytes = 4 * area.page_bytes};
    actor_start(&unmapper);
    await_readable(area.uffd);
    unsigned char there;
    assert_int_equal(mincore(page_of(&area, 2), area.page_bytes, &there), -1);
    assert_int_equal(errno, ENOMEM); /* gone already */
    assert_true(actor_waits(&unmapper));
    struct uffd_msg message = next_message(area.uffd);
    assert_int_equal(message.event, UFFD_EVENT_UNMAP);
    assert_true(message.arg.remove.start == (uintptr_t)page_of(&area, 2));
    assert_true(message.arg.remove.end == (uintptr_t)page_of(&area, 6));
    actor_finish(&unmapper);
    area_free(&area);
}

static void remap_tells_the_move_then_the_unmap(void **state)
{
    (void)state;
    struct area area;
    area_make(&area, AREA_SHMEM, PAGES);
    area_register(&area, BOTH_MODES);
    char *to = mmap(NULL, area.length_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    assert_true(to != MAP_FAILED);
    /* It stays reserved until it is moved onto: given back, it might become a thread's stack. */
    struct actor mover = {
        .act = ACT_REMAP, .at = area.guest, .length_bytes = area.length_bytes, .to = to};
    actor_start(&mover);
    struct uffd_msg message = next_message(area.uffd);
    assert_int_equal(message.event, UFFD_EVENT_REMAP);
    assert_true(message.arg.remap.from == (uintptr_t)area.guest);
    assert_true(message.arg.remap.to == (uintptr_t)to);
    assert_true(message.arg.remap.len == area.length_bytes);
    message = next_message(area.uffd);
    assert_int_equal(message.event, UFFD_EVENT_UNMAP);
    assert_true(message.arg.remove.start == (uintptr_t)area.guest);
    assert_true(message.arg.remove.end == (uintptr_t)area.guest + area.length_bytes);
    actor_finish(&mover);
    assert_int_equal(mover.rc, 0);

    /* The registration moved along. */
    area.guest = to;
    struct actor reader = {.act = ACT_READ, .at = page_of(&area, 0)};
    actor_start(&reader);
    assert_int_equal(next_message(area.uffd).event, UFFD_EVENT_PAGEFAULT);
    put(&area, 0, 'a');
    assert_int_equal(continue_pages(&area, 0, 1, NULL), 0);
    actor_finish(&reader);
    area_free(&area);
}

static void an_unread_event_stops_every_fill(void **state)
{
    (void)state;
    struct area area;
    int64_t result;
    uint64_t done_bytes;
    area_make(&area, AREA_SHMEM, PAGES);
    area_register(&area, BOTH_MODES);
    put(&area, 0, 'a');
    struct actor remover = {
        .act = ACT_REMOVE, .at = page_of(&area, 7), .length_bytes = area.page_bytes};
    actor_start(&remover);
    await_readable(area.uffd);
    /* Far from the range in question, and still: */
    assert_int_equal(continue_pages(&area, 0, 1, &result), EAGAIN);
    assert_true(result == -EAGAIN || result == 12345); /* 6.1 does not write it */
    assert_int_equal(
        mf_uffd_continue(area.uffd, (uintptr_t)area.guest, area.page_bytes, &done_bytes), -EAGAIN);
    assert_int_equal(done_bytes, 0);
    assert_int_equal(
        mf_uffd_zeropage(area.uffd, (uintptr_t)page_of(&area, 1), area.page_bytes, &done_bytes),
        -EAGAIN);
    char bytes[4096] = {0};
    struct uffdio_copy copy = {.dst = (uintptr_t)page_of(&area, 1),
                               .src = (uintptr_t)bytes,
                               .len = area.page_bytes,
                               .copy = 12345};
    assert_int_equal(ioctl_errno(area.uffd, UFFDIO_COPY, &copy), EAGAIN);
    struct uffdio_poison poison = {
        .range = {.start = (uintptr_t)page_of(&area, 1), .len = area.page_bytes}};
    int code = ioctl_errno(area.uffd, UFFDIO_POISON, &poison);
    assert_true(code == EAGAIN || code == EINVAL); /* EINVAL: before Linux 6.6 */
    struct uffdio_writeprotect protect = {
        .range = {.start = (uintptr_t)page_of(&area, 1), .len = area.page_bytes},
        .mode = UFFDIO_WRITEPROTECT_MODE_WP};
    assert_int_equal(ioctl_errno(area.uffd, UFFDIO_WRITEPROTECT, &protect), EAGAIN);
    /* These work. */
    assert_int_equal(mf_uffd_wake(area.uffd, (uintptr_t)area.guest, area.length_bytes), 0);
    area_register(&area, BOTH_MODES);
    struct uffdio_range last = {.start = (uintptr_t)page_of(&area, 6), .len = area.page_bytes};
    assert_int_equal(ioctl_errno(area.uffd, UFFDIO_UNREGISTER, &last), 0);

    assert_int_equal(next_message(area.uffd).event, UFFD_EVENT_REMOVE);
    actor_finish(&remover);
    assert_int_equal(continue_pages(&area, 0, 1, &result), 0);
    area_free(&area);
}

static void faults_are_read_before_events(void **state)
{
    (void)state;
    struct area area;
    area_make(&area, AREA_SHMEM, PAGES);
    area_register(&area, BOTH_MODES);
    struct actor unmapper = {
        .act = ACT_UNMAP, .at = page_of(&area, 4), .length_bytes = 4 * area.page_bytes};
    struct actor reader = {.act = ACT_READ, .at = page_of(&area, 0)};
    actor_start(&unmapper);
    await_readable(area.uffd); /* the event came first … */
    actor_start(&reader);
    await_pending(area.uffd, 1); /* … the fault after it */
    assert_int_equal(next_message(area.uffd).event, UFFD_EVENT_PAGEFAULT);
    assert_int_equal(next_message(area.uffd).event, UFFD_EVENT_UNMAP);
    actor_finish(&unmapper);
    put(&area, 0, 'a');
    assert_int_equal(continue_pages(&area, 0, 1, NULL), 0);
    actor_finish(&reader);
    area_free(&area);
}

/** /proc/self/fdinfo tells how many faults are pending, and reading no more messages than that
 * brings no event. */
static void the_count_of_what_is_pending_is_that_of_the_faults(void **state)
{
    (void)state;
    struct area area;
    struct uffd_msg messages[2];
    area_make(&area, AREA_SHMEM, PAGES);
    area_register(&area, BOTH_MODES);
    cleanup_close int info_fd = mf_uffd_open_info(area.uffd);
    assert_true(info_fd >= 0);
    struct actor unmapper = {
        .act = ACT_UNMAP, .at = page_of(&area, 4), .length_bytes = 4 * area.page_bytes};
    struct actor readers[] = {{.act = ACT_READ, .at = page_of(&area, 0)},
                              {.act = ACT_READ, .at = page_of(&area, 1)}};
    actor_start(&unmapper);
    await_readable(area.uffd);
    assert_int_equal(mf_uffd_faults_pending(info_fd), 0);
    actor_start(&readers[0]);
    actor_start(&readers[1]);
    await_pending(area.uffd, 2);
    assert_int_equal(mf_uffd_faults_pending(info_fd), 2);
    assert_int_equal(read(area.uffd, messages, sizeof(messages)), sizeof(messages));
    assert_int_equal(messages[0].event, UFFD_EVENT_PAGEFAULT);
    assert_int_equal(messages[1].event, UFFD_EVENT_PAGEFAULT);
    assert_int_equal(mf_uffd_faults_pending(info_fd), 0); /* they wait, but are read */
    assert_int_equal(next_message(area.uffd).event, UFFD_EVENT_UNMAP);
    actor_finish(&unmapper);
    put(&area, 0, 'a');
    put(&area, 1, 'b');
    assert_int_equal(continue_pages(&area, 0, 2, NULL), 0);
    actor_finish(&readers[0]);
    actor_finish(&readers[1]);
    close(mf_steal_fd(&info_fd));
    area_free(&area);
}

/** A fault at the new address of a move is read before the move itself. */
static void a_fault_is_read_before_the_move_that_explains_it(void **state)
{
    (void)state;
    struct area area;
    area_make(&area, AREA_SHMEM, PAGES);
    area_register(&area, BOTH_MODES);
    char *to = mmap(NULL, area.length_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    assert_true(to != MAP_FAILED);
    struct actor mover = {
        .act = ACT_REMAP, .at = area.guest, .length_bytes = area.length_bytes, .to = to};
    struct actor reader = {.act = ACT_READ, .at = to};
    actor_start(&mover);
    await_readable(area.uffd);
    actor_start(&reader);
    await_pending(area.uffd, 1);
    struct uffd_msg message = next_message(area.uffd);
    assert_int_equal(message.event, UFFD_EVENT_PAGEFAULT);
    assert_true(message.arg.pagefault.address == (uintptr_t)to);
    assert_int_equal(next_message(area.uffd).event, UFFD_EVENT_REMAP);
    assert_int_equal(next_message(area.uffd).event, UFFD_EVENT_UNMAP);
    actor_finish(&mover);
    put(&area, 0, 'm');
    area.guest = to;
    assert_int_equal(continue_pages(&area, 0, 1, NULL), 0);
    actor_finish(&reader);
    assert_int_equal(reader.value, 'm');
    area_free(&area);
}

static void changes_to_the_file_are_not_told(void **state)
{
    (void)state;
    struct area area;
    area_make(&area, AREA_SHMEM, PAGES);
    area_register(&area, BOTH_MODES);
    put(&area, 0, 'a');
    assert_int_equal(continue_pages(&area, 0, 1, NULL), 0);
    /* Were there an event, these would wait for it to be read. */
    assert_int_equal(
        fallocate(area.file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, (off_t)area.page_bytes),
        0);
    assert_true(no_message(area.uffd));
    assert_int_equal(ftruncate(area.file, 0), 0);
    assert_int_equal(ftruncate(area.file, (off_t)area.length_bytes), 0);
    assert_true(no_message(area.uffd));
    assert_int_equal(mprotect(area.guest, area.page_bytes, PROT_READ), 0);
    assert_true(no_message(area.uffd));
    area_free(&area);
}

static void a_failing_madv_free_looks_like_remove_too(void **state)
{
    (void)state;
    struct area area;
    area_make(&area, AREA_SHMEM, PAGES);
    area_register(&area, BOTH_MODES);
    put(&area, 0, 'a');
    struct actor freer = {
        .act = ACT_CALL, .call = call_free, .at = area.guest, .length_bytes = area.page_bytes};
    actor_start(&freer);
    assert_int_equal(next_message(area.uffd).event, UFFD_EVENT_REMOVE);
    actor_finish(&freer);
    assert_int_equal(freer.rc, -1);
    assert_int_equal(freer.code, EINVAL);
    assert_int_equal(area.second[0], 'a');
    area_free(&area);
}

/** Changed by MADV_REMOVE, not by MADV_DONTNEED; by one's own writes as well. */
static void the_time_of_the_file_tells_remove_from_dontneed(void **state)
{
    (void)state;
    struct area area;
    struct stat before, after;
    area_make(&area, AREA_SHMEM, PAGES);
    area_register(&area, BOTH_MODES);
    put(&area, 0, 'a');
    for (int removed = 0; removed <= 1; removed++) {
        usleep(20000); /* a file's time has the grain of a tick */
        assert_int_equal(fstat(area.file, &before), 0);
        struct actor actor = {.act = removed ? ACT_REMOVE : ACT_DONTNEED,
                              .at = area.guest,
                              .length_bytes = area.page_bytes};
        actor_start(&actor);
        assert_int_equal(next_message(area.uffd).event, UFFD_EVENT_REMOVE);
        actor_finish(&actor);
        assert_int_equal(actor.rc, 0);
        assert_int_equal(fstat(area.file, &after), 0);
        bool changed = before.st_mtim.tv_sec != after.st_mtim.tv_sec ||
                       before.st_mtim.tv_nsec != after.st_mtim.tv_nsec;
        assert_int_equal(changed, removed);
    }
    area_free(&area);
}

int main(int argc, char **argv)
{
    static const struct fact facts[] = {
        FACT(remove_tells_before_it_happens),
        FACT(dontneed_looks_like_remove),
        FACT(unmap_tells_the_raw_range_afterwards),
        FACT(remap_tells_the_move_then_the_unmap),
        FACT(an_unread_event_stops_every_fill),
        FACT(faults_are_read_before_events),
        FACT(the_count_of_what_is_pending_is_that_of_the_faults),
        FACT(a_fault_is_read_before_the_move_that_explains_it),
        FACT(changes_to_the_file_are_not_told),
        FACT(a_failing_madv_free_looks_like_remove_too),
        FACT(the_time_of_the_file_tells_remove_from_dontneed),
    };
    return facts_main(argc, argv, facts, sizeof(facts) / sizeof(facts[0]), MF_UFFD_FEATURES);
}
