/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The changes of a mapping: each way to move, grow, shrink, replace and copy it, and which of them
 * the kernel tells. What it tells in general, and when, is in test_events.c. */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/shm.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "lib/uffd.h"
#include "lib/util.h"
#include "tests/kernel/area.h"
#include "tests/kernel/fact.h"

#define PAGES 8
#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4
#endif
#ifndef MADV_GUARD_INSTALL
#define MADV_GUARD_INSTALL 102
#endif

static void expect_unmap(int uffd, const void *start, size_t length_bytes)
{
    struct uffd_msg message = next_message(uffd);
    assert_int_equal(message.event, UFFD_EVENT_UNMAP);
    assert_true(message.arg.remove.start == (uintptr_t)start);
    assert_true(message.arg.remove.end == (uintptr_t)start + length_bytes);
}

static void expect_remap(int uffd, const void *from, const void *to, size_t length_bytes)
{
    struct uffd_msg message = next_message(uffd);
    assert_int_equal(message.event, UFFD_EVENT_REMAP);
    assert_true(message.arg.remap.from == (uintptr_t)from);
    assert_true(message.arg.remap.to == (uintptr_t)to);
    assert_true(message.arg.remap.len == length_bytes);
}

/** expect_watched() - a first touch of page @at is reported, as MINOR: the file has it. */
static void expect_watched(const struct area *area, int uffd, char *at, size_t index)
{
    put(area, index, 'w');
    struct actor reader = {.act = ACT_READ, .at = at};
    actor_start(&reader);
    struct uffd_msg message = next_message(uffd);
    assert_int_equal(message.event, UFFD_EVENT_PAGEFAULT);
    assert_true((message.arg.pagefault.address & ~(__u64)(area->page_bytes - 1)) == (uintptr_t)at);
    struct uffdio_continue arg = {.range = {.start = (uintptr_t)at, .len = area->page_bytes}};
    assert_int_equal(ioctl_errno(uffd, UFFDIO_CONTINUE, &arg), 0);
    actor_finish(&reader);
    assert_int_equal(reader.value, 'w');
}

/* --------------------------------------------------------------------------------------- mremap */

static char *reserve(size_t length_bytes)
{
    char *at = mmap(NULL, length_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    assert_true(at != MAP_FAILED);
    return at;
}

static long call_mremap_onto(struct actor *actor)
{
    unsigned flags = MREMAP_MAYMOVE | MREMAP_FIXED | (unsigned)(uintptr_t)actor->context;
    return mremap(actor->at, actor->length_bytes, actor->length_bytes, (int)flags, actor->to) ==
                   actor->to
               ? 0
               : -1;
}

static void onto_an_occupied_range_tells_its_unmap_first(void **state)
{
    (void)state;
    struct area area;
    area_make(&area, AREA_SHMEM, PAGES);
    area_register(&area, BOTH_MODES);
    size_t half_bytes = area.length_bytes / 2;
    struct actor mover = {.act = ACT_CALL,
                          .call = call_mremap_onto,
                          .at = area.guest,
                          .length_bytes = half_bytes,
                          .to = page_of(&area, PAGES / 2)};
    actor_start(&mover);
    expect_unmap(area.uffd, mover.to, half_bytes);
    expect_remap(area.uffd, area.guest, mover.to, half_bytes);
    expect_unmap(area.uffd, area.guest, half_bytes);
    actor_finish(&mover);
    assert_int_equal(mover.rc, 0);
    expect_watched(&area, area.uffd, mover.to, 0);
    area_free(&area);
}

static void dontunmap_tells_remap_alone_and_both_stay_registered(void **state)
{
    (void)state;
    struct area area;
    area_make(&area, AREA_SHMEM, PAGES);
    area_register(&area, BOTH_MODES);
    struct actor mover = {.act = ACT_CALL,
                          .call = call_mremap_onto,
                          .context = (void *)MREMAP_DONTUNMAP,
                          .at = area.guest,
                          .length_bytes = area.length_bytes,
                          .to = reserve(area.length_bytes)};
    actor_start(&mover);
    expect_remap(area.uffd, area.guest, mover.to, area.length_bytes);
    actor_finish(&mover);
    assert_int_equal(mover.rc, 0);
    assert_true(no_message(area.uffd));
    expect_watched(&area, area.uffd, mover.to + area.page_bytes, 1);
    expect_watched(&area, area.uffd, page_of(&area, 2), 2);
    area_free(&area);
}

static long call_grow(struct actor *actor)
{
    size_t from_bytes = actor->length_bytes / 2;
    return mremap(actor->at, from_bytes, actor->length_bytes, 0) == actor->at ? 0 : -1;
}

static void growing_in_place_is_not_told_and_the_tail_is_watched(void **state)
{
    (void)state;
    struct area area;
    area_make(&area, AREA_SHMEM, PAGES);
    munmap(page_of(&area, PAGES / 2), area.length_bytes / 2);
    assert_int_equal(area_register_pages(&area, 0, PAGES / 2, BOTH_MODES), 0);
    struct actor grower = {
        .act = ACT_CALL, .call = call_grow, .at = area.guest, .length_bytes = area.length_bytes};
    actor_start(&grower);
    actor_finish(&grower); /* nobody read anything */
    assert_int_equal(grower.rc, 0);
    assert_true(no_message(area.uffd));
    expect_watched(&area, area.uffd, page_of(&area, PAGES - 1), PAGES - 1);
    area_free(&area);
}

static long call_grow_moving(struct actor *actor)
{
    return mremap(actor->at, actor->length_bytes / 2, actor->length_bytes,
                  MREMAP_MAYMOVE | MREMAP_FIXED, actor->to) == actor->to
               ? 0
               : -1;
}

static void growing_by_moving_tells_the_old_length(void **state)
{
    (void)state;
    struct area area;
    area_make(&area, AREA_SHMEM, PAGES);
    size_t half_bytes = area.length_bytes / 2;
    char *to = reserve(area.length_bytes);
    assert_int_equal(area_register_pages(&area, 0, PAGES / 2, BOTH_MODES), 0);
    struct actor mover = {.act = ACT_CALL,
                          .call = call_grow_moving,
                          .at = area.guest,
                          .length_bytes = area.length_bytes,
                          .to = to};
    actor_start(&mover);
    expect_remap(area.uffd, area.guest, to, half_bytes);
    expect_unmap(area.uffd, area.guest, half_bytes);
    actor_finish(&mover);
    assert_int_equal(mover.rc, 0);
    expect_watched(&area, area.uffd, to + half_bytes, PAGES / 2); /* the tail too */
    area_free(&area);
}

static long call_shrink_moving(struct actor *actor)
{
    return mremap(actor->at, actor->length_bytes, actor->length_bytes / 2,
                  MREMAP_MAYMOVE | MREMAP_FIXED, actor->to) == actor->to
               ? 0
               : -1;
}

/** What REMAP says is therefore no length of what is mapped now: /proc/PID/maps knows. */
static void shrinking_by_moving_tells_either_length(void **state)
{
    (void)state;
    struct area area;
    area_make(&area, AREA_SHMEM, PAGES);
    area_register(&area, BOTH_MODES);
    struct actor mover = {.act = ACT_CALL,
                          .call = call_shrink_moving,
                          .at = area.guest,
                          .length_bytes = area.length_bytes,
                          .to = reserve(area.length_bytes)};
    actor_start(&mover);
    size_t gone_bytes = 0;
    for (bool remapped = false; !remapped || gone_bytes < area.length_bytes;) {
        struct uffd_msg message = next_message(area.uffd);
        if (message.event == UFFD_EVENT_REMAP) {
            assert_true(message.arg.remap.from == (uintptr_t)area.guest);
            assert_true(message.arg.remap.to == (uintptr_t)mover.to);
            /* The new one (seen on 6.18 and 7.2), the old one (on 6.1 and 6.12). */
            assert_true(message.arg.remap.len == area.length_bytes / 2 ||
                        message.arg.remap.len == area.length_bytes);
            remapped = true;
        } else {
            assert_int_equal(message.event, UFFD_EVENT_UNMAP);
            gone_bytes += message.arg.remove.end - message.arg.remove.start;
        }
    }
    actor_finish(&mover);
    assert_int_equal(mover.rc, 0);
    expect_watched(&area, area.uffd, mover.to, 0);
    area_free(&area);
}

static long call_shrink(struct actor *actor)
{
    return mremap(actor->at, actor->length_bytes, actor->length_bytes / 2, 0) == actor->at ? 0 : -1;
}

static void shrinking_tells_an_unmap(void **state)
{
    (void)state;
    struct area area;
    area_make(&area, AREA_SHMEM, PAGES);
    area_register(&area, BOTH_MODES);
    struct actor shrinker = {
        .act = ACT_CALL, .call = call_shrink, .at = area.guest, .length_bytes = area.length_bytes};
    actor_start(&shrinker);
    expect_unmap(area.uffd, page_of(&area, PAGES / 2), area.length_bytes / 2);
    actor_finish(&shrinker);
    area_free(&area);
}

static long call_map_over(struct actor *actor)
{
    map_at(actor->at, actor->length_bytes, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    return 0;
}

static void mapping_over_tells_an_unmap(void **state)
{
    (void)state;
    struct area area;
    area_make(&area, AREA_SHMEM, PAGES);
    area_register(&area, BOTH_MODES);
    struct actor mapper = {.act = ACT_CALL,
                           .call = call_map_over,
                           .at = page_of(&area, 1),
                           .length_bytes = 2 * area.page_bytes};
    actor_start(&mapper);
    expect_unmap(area.uffd, mapper.at, mapper.length_bytes);
    actor_finish(&mapper);
    assert_int_equal(mapper.rc, 0);
    assert_int_equal(*mapper.at, 0); /* the new mapping is not watched */
    assert_true(no_message(area.uffd));
    area_free(&area);
}

static long call_brk(struct actor *actor)
{
    return syscall(SYS_brk, actor->to) == (long)(uintptr_t)actor->to ? 0 : -1;
}

static void a_shrinking_heap_tells_an_unmap(void **state)
{
    (void)state;
    size_t page_bytes = (size_t)sysconf(_SC_PAGESIZE);
    cleanup_close int uffd = mf_uffd_open();
    struct mf_error err;
    assert_int_equal(mf_uffd_api(uffd, MF_UFFD_FEATURES, 0, NULL, &err), 0);
    /* Above what malloc(3) has: nobody else touches it. */
    uintptr_t end = ((uintptr_t)syscall(SYS_brk, 0) + page_bytes - 1) & ~(page_bytes - 1);
    uintptr_t grown = end + 8 * page_bytes;
    assert_true((uintptr_t)syscall(SYS_brk, grown) == grown);
    assert_int_equal(range_register(uffd, (void *)(end + 4 * page_bytes), 4 * page_bytes,
                                    UFFDIO_REGISTER_MODE_MISSING),
                     0);
    struct actor shrinker = {
        .act = ACT_CALL, .call = call_brk, .to = (char *)(end + 4 * page_bytes)};
    actor_start(&shrinker);
    expect_unmap(uffd, shrinker.to, 4 * page_bytes);
    actor_finish(&shrinker);
    assert_int_equal(shrinker.rc, 0);
}

static void without_event_remap_a_moved_mapping_is_not_watched(void **state)
{
    (void)state;
    struct area area;
    area_make_with(&area, AREA_SHMEM, PAGES, UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MINOR_SHMEM);
    area_register(&area, BOTH_MODES);
    char *to = reserve(area.length_bytes);
    struct actor mover = {
        .act = ACT_REMAP, .at = area.guest, .length_bytes = area.length_bytes, .to = to};
    actor_start(&mover);
    actor_finish(&mover);
    assert_int_equal(mover.rc, 0);
    assert_int_equal(*(volatile char *)to, 0); /* a hole, and nobody is asked */
    assert_true(no_message(area.uffd));
    area_free(&area);
}

static void each_userfaultfd_is_told_by_itself(void **state)
{
    (void)state;
    struct area area;
    struct mf_error err;
    area_make(&area, AREA_SHMEM, PAGES);
    int other = mf_uffd_open();
    assert_int_equal(mf_uffd_api(other, MF_UFFD_FEATURES, 0, NULL, &err), 0);
    assert_int_equal(area_register_pages(&area, 0, PAGES / 2, BOTH_MODES), 0);
    assert_int_equal(
        range_register(other, page_of(&area, PAGES / 2), area.length_bytes / 2, BOTH_MODES), 0);
    struct actor unmapper = {
        .act = ACT_UNMAP, .at = page_of(&area, 1), .length_bytes = (PAGES - 2) * area.page_bytes};
    actor_start(&unmapper);
    /* Neither message is cut to what its userfaultfd watches. */
    expect_unmap(area.uffd, unmapper.at, unmapper.length_bytes);
    assert_true(actor_waits(&unmapper));
    expect_unmap(other, unmapper.at, unmapper.length_bytes);
    actor_finish(&unmapper);
    close(other);
    area_free(&area);
}

/** vm_flags() - the row VmFlags of the mapping that begins at @at. */
static void vm_flags(const char *at, char *flags, size_t size)
{
    char line[512];
    unsigned long start, end;
    bool here = false;
    cleanup_fclose FILE *f = fopen("/proc/self/smaps", "re");
    flags[0] = '\0';
    while (f && fgets(line, sizeof(line), f)) {
        if (sscanf(line, "%lx-%lx ", &start, &end) == 2)
            here = start == (uintptr_t)at;
        else if (here && strncmp(line, "VmFlags:", 8) == 0)
            snprintf(flags, size, "%s", line + 8);
    }
}

/** What a successor goes by, who was not there when it was registered. */
static void smaps_tells_what_is_registered(void **state)
{
    (void)state;
    struct area area;
    char flags[512];
    area_make(&area, AREA_SHMEM, PAGES);
    vm_flags(area.guest, flags, sizeof(flags));
    assert_true(flags[0] && !strstr(flags, " um ") && !strstr(flags, " ui "));
    area_register(&area, UFFDIO_REGISTER_MODE_MISSING);
    vm_flags(area.guest, flags, sizeof(flags));
    assert_true(strstr(flags, " um ") && !strstr(flags, " ui "));
    area_register(&area, BOTH_MODES);
    vm_flags(area.guest, flags, sizeof(flags));
    assert_true(strstr(flags, " um ") && strstr(flags, " ui "));
    close(area.uffd);
    area.uffd = -1;
    vm_flags(area.guest, flags, sizeof(flags));
    assert_true(flags[0] && !strstr(flags, " um ") && !strstr(flags, " ui "));
    area_free(&area);
}

static void protecting_keeps_the_registration(void **state)
{
    (void)state;
    struct area area;
    area_make(&area, AREA_SHMEM, PAGES);
    area_register(&area, BOTH_MODES);
    assert_int_equal(mprotect(page_of(&area, 2), area.page_bytes, PROT_NONE), 0);
    put(&area, 2, 'p');
    /* Filled while nobody may read it, which is how a page behind PROT_NONE is served. */
    assert_int_equal(continue_pages(&area, 2, 1, NULL), 0);
    assert_int_equal(mprotect(page_of(&area, 2), area.page_bytes, PROT_READ), 0);
    assert_int_equal(*page_of(&area, 2), 'p');
    assert_int_equal(mprotect(page_of(&area, 3), area.page_bytes, PROT_READ), 0);
    assert_true(no_message(area.uffd));
    expect_watched(&area, area.uffd, page_of(&area, 3), 3);
    area_free(&area);
}

/* ------------------------------------------------------------------------- what sends no message
 */

/** shmat(2): not tmpfs to userfaultfd, though it lies there. Watched for writes, as any memory can
 * be, its end is not told. */
static void system_v_memory_is_not_served_and_its_end_not_told(void **state)
{
    (void)state;
    struct mf_error err;
    size_t length_bytes = 4 * (size_t)sysconf(_SC_PAGESIZE);
    int id = shmget(IPC_PRIVATE, length_bytes, 0600);
    if (id < 0)
        lacking("System V shared memory (%s)", strerror(errno));
    char *at = shmat(id, NULL, 0);
    shmctl(id, IPC_RMID, NULL);
    assert_true(at != (void *)-1);
    cleanup_close int uffd = mf_uffd_open();
    assert_int_equal(mf_uffd_api(uffd, MF_UFFD_FEATURES, UFFD_FEATURE_WP_ASYNC, NULL, &err), 0);
    assert_int_equal(range_register(uffd, at, length_bytes, UFFDIO_REGISTER_MODE_MISSING), EINVAL);
    assert_int_equal(range_register(uffd, at, length_bytes, BOTH_MODES), EINVAL);
    int code = range_register(uffd, at, length_bytes, UFFDIO_REGISTER_MODE_WP);
    assert_true(code == 0 || code == EINVAL); /* before WP_ASYNC */
    assert_int_equal(shmdt(at), 0);
    assert_true(no_message(uffd));
}

static void paging_out_is_not_told(void **state)
{
    (void)state;
    struct area area;
    area_make(&area, AREA_SHMEM, PAGES);
    area_register(&area, BOTH_MODES);
    put(&area, 0, 'a');
    assert_int_equal(continue_pages(&area, 0, 1, NULL), 0);
    assert_int_equal(madvise(area.guest, area.length_bytes, MADV_COLD), 0);
    assert_true(no_message(area.uffd));
    assert_int_equal(madvise(area.guest, area.length_bytes, MADV_PAGEOUT), 0);
    assert_true(no_message(area.uffd));
    /* If it was paged out, it may fault again, as a page that the file has: nothing is lost. */
    struct actor reader = {.act = ACT_READ, .at = area.guest};
    actor_start(&reader);
    if (actor_waits(&reader)) {
        struct uffd_msg message = next_message(area.uffd);
        assert_int_equal(message.event, UFFD_EVENT_PAGEFAULT);
        assert_true(message.arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_MINOR);
        assert_int_equal(continue_pages(&area, 0, 1, NULL), 0);
    }
    actor_finish(&reader);
    assert_int_equal(reader.value, 'a');
    area_free(&area);
}

static void a_guard_is_not_told(void **state)
{
    (void)state;
    struct area area;
    area_make(&area, AREA_SHMEM, PAGES);
    area_register(&area, BOTH_MODES);
    if (madvise(page_of(&area, 1), area.page_bytes, MADV_GUARD_INSTALL) != 0)
        lacking("guards in shared memory (Linux 6.15: %s)", strerror(errno));
    assert_true(no_message(area.uffd));
    area_free(&area);
}

static long call_double(struct actor *actor)
{
    return (long)mremap(actor->at, 0, actor->length_bytes, MREMAP_MAYMOVE | MREMAP_FIXED,
                        actor->to);
}

/** mremap(2) with an old length of 0 maps the same once more. */
static void doubling_tells_a_length_of_0_and_both_are_watched(void **state)
{
    (void)state;
    struct area area;
    area_make(&area, AREA_SHMEM, PAGES);
    area_register(&area, BOTH_MODES);
    char *to = mmap(NULL, area.length_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    assert_true(to != MAP_FAILED);
    struct actor doubler = {.act = ACT_CALL,
                            .call = call_double,
                            .at = area.guest,
                            .length_bytes = area.length_bytes,
                            .to = to};
    actor_start(&doubler);
    expect_remap(area.uffd, area.guest, to, 0);
    actor_finish(&doubler);
    assert_true(doubler.rc == (long)(uintptr_t)to);
    assert_true(no_message(area.uffd));
    expect_watched(&area, area.uffd, to + 2 * area.page_bytes, 2);
    expect_watched(&area, area.uffd, page_of(&area, 3), 3);
    area_free(&area);
}

int main(int argc, char **argv)
{
    static const struct fact facts[] = {
        FACT(doubling_tells_a_length_of_0_and_both_are_watched),
        FACT(onto_an_occupied_range_tells_its_unmap_first),
        FACT(dontunmap_tells_remap_alone_and_both_stay_registered),
        FACT(growing_in_place_is_not_told_and_the_tail_is_watched),
        FACT(growing_by_moving_tells_the_old_length),
        FACT(shrinking_by_moving_tells_either_length),
        FACT(shrinking_tells_an_unmap),
        FACT(mapping_over_tells_an_unmap),
        FACT(a_shrinking_heap_tells_an_unmap),
        FACT(without_event_remap_a_moved_mapping_is_not_watched),
        FACT(each_userfaultfd_is_told_by_itself),
        FACT(smaps_tells_what_is_registered),
        FACT(protecting_keeps_the_registration),
        FACT(system_v_memory_is_not_served_and_its_end_not_told),
        FACT(paging_out_is_not_told),
        FACT(a_guard_is_not_told),
    };
    return facts_main(argc, argv, facts, sizeof(facts) / sizeof(facts[0]), MF_UFFD_FEATURES);
}
