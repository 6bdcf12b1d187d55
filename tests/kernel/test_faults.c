/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Which faults are delivered and what lets a waiter go. With the argument "hugetlb" the same on
 * huge pages, where they can be reserved.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "lib/uffd.h"
#include "lib/util.h"
#include "tests/kernel/area.h"
#include "tests/kernel/fact.h"

#define PAGES 4

static enum area_kind kind;

/** expect_fault() - the next message is a fault of @actor; returns its flags. */
static uint64_t expect_fault(const struct area *area, const struct actor *actor)
{
    struct uffd_msg message = next_message(area->uffd);
    assert_int_equal(message.event, UFFD_EVENT_PAGEFAULT);
    uintptr_t mask = ~((uintptr_t)area->page_bytes - 1);
    assert_true(((uintptr_t)message.arg.pagefault.address & mask) == ((uintptr_t)actor->at & mask));
    return message.arg.pagefault.flags;
}

/** Not on a kernel that counts a fault for what no fault is due: it would hang the test. */
static void touch_without_fault(const struct area *area, size_t index, char expected)
{
    struct actor actor = {.act = ACT_READ, .at = page_of(area, index)};
    actor_start(&actor);
    actor_finish(&actor);
    assert_int_equal(actor.value, expected);
    assert_true(no_message(area->uffd));
}

static void a_hole_is_missing_a_page_is_minor(void **state)
{
    (void)state;
    struct area area;
    area_make(&area, kind, PAGES);
    area_register(&area, BOTH_MODES);
    put(&area, 1, 'm');

    struct actor hole = {.act = ACT_READ, .at = page_of(&area, 0) + 5};
    actor_start(&hole);
    assert_int_equal(expect_fault(&area, &hole) & UFFD_PAGEFAULT_FLAG_MINOR, 0);
    /* A MISSING fault, too, is resolved by landing the page in the second mapping and CONTINUE. */
    put(&area, 0, 'h');
    assert_int_equal(continue_pages(&area, 0, 1, NULL), 0);
    actor_finish(&hole);
    assert_int_equal(hole.value, 'h');

    struct actor page = {.act = ACT_WRITE, .at = page_of(&area, 1), .value = 'w'};
    actor_start(&page);
    uint64_t flags = expect_fault(&area, &page);
    assert_true((flags & UFFD_PAGEFAULT_FLAG_MINOR) && (flags & UFFD_PAGEFAULT_FLAG_WRITE));
    assert_int_equal(continue_pages(&area, 1, 1, NULL), 0);
    actor_finish(&page);
    assert_int_equal(area.second[area.page_bytes], 'w'); /* one page, seen from both sides */
    area_free(&area);
}

static void continue_maps_writable(void **state)
{
    (void)state;
    struct area area;
    area_make(&area, kind, PAGES);
    area_register(&area, BOTH_MODES);
    put(&area, 0, 'a');
    assert_int_equal(continue_pages(&area, 0, 1, NULL), 0);
    struct actor writer = {.act = ACT_WRITE, .at = page_of(&area, 0), .value = 'w'};
    actor_start(&writer);
    actor_finish(&writer);
    assert_true(no_message(area.uffd));
    area_free(&area);
}

static void after_dontneed_minor_after_a_punch_missing(void **state)
{
    (void)state;
    struct area area;
    area_make(&area, kind, PAGES);
    area_register(&area, BOTH_MODES);
    put(&area, 0, 'a');
    assert_int_equal(continue_pages(&area, 0, 1, NULL), 0);

    struct actor dropper = {.act = ACT_DONTNEED, .at = area.guest, .length_bytes = area.page_bytes};
    actor_start(&dropper);
    assert_int_equal(next_message(area.uffd).event, UFFD_EVENT_REMOVE);
    actor_finish(&dropper);
    assert_int_equal(dropper.rc, 0);

    struct actor reader = {.act = ACT_READ, .at = page_of(&area, 0)};
    actor_start(&reader);
    assert_true(expect_fault(&area, &reader) & UFFD_PAGEFAULT_FLAG_MINOR);
    assert_int_equal(continue_pages(&area, 0, 1, NULL), 0);
    actor_finish(&reader);
    assert_int_equal(reader.value, 'a');

    assert_int_equal(
        fallocate(area.file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, (off_t)area.page_bytes),
        0);
    actor_start(&reader);
    assert_int_equal(expect_fault(&area, &reader) & UFFD_PAGEFAULT_FLAG_MINOR, 0);
    put(&area, 0, 'b');
    assert_int_equal(continue_pages(&area, 0, 1, NULL), 0);
    actor_finish(&reader);
    assert_int_equal(reader.value, 'b');
    area_free(&area);
}

static void minor_alone_fills_holes_with_zeros(void **state)
{
    (void)state;
    struct area area;
    area_make(&area, kind, PAGES);
    area_register(&area, UFFDIO_REGISTER_MODE_MINOR);
    touch_without_fault(&area, 0, 0);
    area_free(&area);
}

static void registering_again_replaces_the_modes(void **state)
{
    (void)state;
    struct area area;
    area_make(&area, kind, PAGES);
    area_register(&area, UFFDIO_REGISTER_MODE_MISSING);
    area_register(&area, UFFDIO_REGISTER_MODE_MINOR);
    touch_without_fault(&area, 0, 0); /* MISSING is gone, without a word */
    area_free(&area);
}

static void what_was_touched_never_faults_until_punched(void **state)
{
    (void)state;
    struct area area;
    area_make(&area, kind, PAGES);
    area.guest[0] = 't';
    area_register(&area, BOTH_MODES);
    touch_without_fault(&area, 0, 't');

    assert_int_equal(fallocate(area.file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0,
                               (off_t)area.length_bytes),
                     0);
    struct actor reader = {.act = ACT_READ, .at = page_of(&area, 0)};
    actor_start(&reader);
    assert_int_equal(expect_fault(&area, &reader) & UFFD_PAGEFAULT_FLAG_MINOR, 0);
    put(&area, 0, 'n');
    assert_int_equal(continue_pages(&area, 0, 1, NULL), 0);
    actor_finish(&reader);
    assert_int_equal(reader.value, 'n');
    area_free(&area);
}

static void eexist_does_not_wake(void **state)
{
    (void)state;
    struct area area;
    area_make(&area, kind, PAGES);
    area_register(&area, BOTH_MODES);
    struct actor reader = {.act = ACT_READ, .at = page_of(&area, 0)};
    actor_start(&reader);
    expect_fault(&area, &reader);
    put(&area, 0, 'a');
    struct uffdio_continue quiet = {
        .range = {.start = (uintptr_t)area.guest, .len = area.page_bytes},
        .mode = UFFDIO_CONTINUE_MODE_DONTWAKE};
    assert_int_equal(ioctl_errno(area.uffd, UFFDIO_CONTINUE, &quiet), 0);
    assert_int_equal(continue_pages(&area, 0, 1, NULL), EEXIST);
    assert_true(actor_waits(&reader));
    assert_int_equal(mf_uffd_wake(area.uffd, (uintptr_t)area.guest, area.page_bytes), 0);
    actor_finish(&reader);
    assert_int_equal(reader.value, 'a');
    area_free(&area);
}

static void each_waiter_sends_a_message_one_continue_frees_all(void **state)
{
    (void)state;
    struct area area;
    struct actor readers[5];
    struct uffd_msg messages[16];
    area_make(&area, kind, PAGES);
    area_register(&area, BOTH_MODES);
    for (int i = 0; i < 5; i++) {
        readers[i] = (struct actor){.act = ACT_READ, .at = page_of(&area, i % 2 ? 0 : 1)};
        actor_start(&readers[i]);
    }
    await_pending(area.uffd, 5);
    /* One read(2) hands out all of them. */
    assert_int_equal(read(area.uffd, messages, sizeof(messages)), 5 * sizeof(messages[0]));
    put(&area, 0, 'a');
    put(&area, 1, 'a');
    assert_int_equal(continue_pages(&area, 0, 2, NULL), 0);
    for (int i = 0; i < 5; i++)
        actor_finish(&readers[i]);
    area_free(&area);
}

static void a_wake_over_all_brings_back_what_a_dead_reader_took(void **state)
{
    (void)state;
    struct area area;
    area_make(&area, kind, PAGES);
    area_register(&area, BOTH_MODES);
    struct actor readers[2] = {{.act = ACT_READ, .at = page_of(&area, 0)},
                               {.act = ACT_READ, .at = page_of(&area, 3)}};
    actor_start(&readers[0]);
    actor_start(&readers[1]);
    next_message(area.uffd);
    next_message(area.uffd); /* read, and whoever read them died */
    assert_true(no_message(area.uffd));
    assert_int_equal(mf_uffd_wake(area.uffd, (uintptr_t)area.guest, area.length_bytes), 0);
    await_pending(area.uffd, 2);
    next_message(area.uffd);
    next_message(area.uffd);
    put(&area, 0, 'a');
    put(&area, 3, 'b');
    assert_int_equal(continue_pages(&area, 0, 1, NULL), 0);
    assert_int_equal(continue_pages(&area, 3, 1, NULL), 0);
    actor_finish(&readers[0]);
    actor_finish(&readers[1]);
    assert_true(readers[0].value == 'a' && readers[1].value == 'b');
    area_free(&area);
}

static void the_last_close_hands_out_zeros_another_reference_holds(void **state)
{
    (void)state;
    struct area area;
    area_make(&area, kind, PAGES);
    area_register(&area, BOTH_MODES);
    int kept = dup(area.uffd); /* stands for the descriptor that stays open in the target */
    struct actor reader = {.act = ACT_READ, .at = page_of(&area, 0)};
    actor_start(&reader);
    expect_fault(&area, &reader);
    close(area.uffd);
    area.uffd = -1;
    assert_true(actor_waits(&reader));
    close(kept);
    actor_finish(&reader);
    assert_int_equal(reader.value, 0);
    area_free(&area);
}

static void unregistering_frees_waiters(void **state)
{
    (void)state;
    struct area area;
    area_make(&area, kind, PAGES);
    area_register(&area, BOTH_MODES);
    struct actor reader = {.act = ACT_READ, .at = page_of(&area, 0)};
    actor_start(&reader);
    expect_fault(&area, &reader);
    struct uffdio_range range = {.start = (uintptr_t)area.guest, .len = area.length_bytes};
    assert_int_equal(ioctl_errno(area.uffd, UFFDIO_UNREGISTER, &range), 0);
    actor_finish(&reader);

    /* Where MINOR stands alone the kernel does not wake; mf_uffd_unregister() does it itself. */
    area_register(&area, UFFDIO_REGISTER_MODE_MINOR);
    put(&area, 2, 'm');
    struct actor minor = {.act = ACT_READ, .at = page_of(&area, 2)};
    actor_start(&minor);
    expect_fault(&area, &minor);
    assert_int_equal(mf_uffd_unregister(area.uffd, (uintptr_t)area.guest, area.length_bytes), 0);
    actor_finish(&minor);
    assert_int_equal(minor.value, 'm');
    area_free(&area);
}

static void a_blocking_userfaultfd_polls_as_an_error(void **state)
{
    (void)state;
    struct area area;
    area_make(&area, kind, PAGES);
    struct pollfd ready = {.fd = area.uffd, .events = POLLIN};
    assert_int_equal(poll(&ready, 1, 0), 0);
    fcntl(area.uffd, F_SETFL, 0);
    assert_int_equal(poll(&ready, 1, 0), 1);
    assert_int_equal(ready.revents, POLLERR);
    area_free(&area);
}

static void hugetlb_has_no_zeropage_and_no_part_of_a_page(void **state)
{
    (void)state;
    struct area area;
    uint64_t done_bytes;
    area_make(&area, kind, PAGES);
    area_register(&area, BOTH_MODES);
    assert_int_equal(
        mf_uffd_zeropage(area.uffd, (uintptr_t)area.guest, area.page_bytes, &done_bytes), -EINVAL);
    put(&area, 0, 'a');
    assert_int_equal(mf_uffd_continue(area.uffd, (uintptr_t)area.guest, 4096, &done_bytes),
                     -EINVAL);
    assert_int_equal(
        mf_uffd_continue(area.uffd, (uintptr_t)area.guest, area.page_bytes, &done_bytes), 0);
    area_free(&area);
}

/** What mf_uffd_unregister() is there for. */
static void unregistering_minor_alone_leaves_its_waiters(void **state)
{
    (void)state;
    struct area area;
    area_make(&area, kind, PAGES);
    area_register(&area, UFFDIO_REGISTER_MODE_MINOR);
    put(&area, 2, 'm');
    struct actor reader = {.act = ACT_READ, .at = page_of(&area, 2)};
    actor_start(&reader);
    expect_fault(&area, &reader);
    struct uffdio_range range = {.start = (uintptr_t)area.guest, .len = area.length_bytes};
    assert_int_equal(ioctl_errno(area.uffd, UFFDIO_UNREGISTER, &range), 0);
    assert_true(actor_waits(&reader));
    assert_int_equal(mf_uffd_wake(area.uffd, (uintptr_t)area.guest, area.length_bytes), 0);
    actor_finish(&reader);
    assert_int_equal(reader.value, 'm');
    area_free(&area);
}

static void ignore(int number)
{
    (void)number;
}

static long call_read(struct actor *actor)
{
    return read(*(int *)actor->context, actor->at, 1);
}

/** A thread that faults inside a system call takes the signal only when it is through: until then
 * it leaves the fault and comes back, each time with another message. */
static void a_signal_makes_it_fault_again_and_again(void **state)
{
    (void)state;
    struct area area;
    int ends[2];
    area_make(&area, kind, PAGES);
    area_register(&area, BOTH_MODES);
    signal(SIGUSR1, ignore);
    assert_int_equal(pipe2(ends, O_CLOEXEC), 0);
    assert_int_equal(write(ends[1], "s", 1), 1);
    struct actor reader = {
        .act = ACT_CALL, .call = call_read, .at = page_of(&area, 0), .context = &ends[0]};
    actor_start(&reader);
    expect_fault(&area, &reader);
    assert_int_equal(pthread_kill(reader.thread, SIGUSR1), 0);
    for (int told = 0; told < 20;) { /* of one page and one thread */
        struct uffd_msg message;
        await_readable(area.uffd);
        ssize_t length = read(area.uffd, &message, sizeof(message));
        if (length < 0 && errno == EAGAIN)
            continue; /* it has just left to come again */
        assert_int_equal(length, sizeof(message));
        assert_int_equal(message.event, UFFD_EVENT_PAGEFAULT);
        told++;
    }
    put(&area, 0, 'a');
    assert_int_equal(continue_pages(&area, 0, 1, NULL), 0);
    actor_finish(&reader);
    assert_int_equal(reader.rc, 1);
    assert_int_equal(area.second[0], 's');
    close(ends[0]);
    close(ends[1]);
    area_free(&area);
}

static long call_lock(struct actor *actor)
{
    return syscall(SYS_mlock, actor->at,
                   actor->length_bytes); /* a sanitizer makes mlock() nothing */
}

/** A range of mlock(2) is touched page by page, and each touch is reported. */
static void locking_waits_for_its_pages(void **state)
{
    (void)state;
    struct area area;
    area_make(&area, kind, PAGES);
    area_register(&area, BOTH_MODES);
    struct actor locker = {
        .act = ACT_CALL, .call = call_lock, .at = area.guest, .length_bytes = area.length_bytes};
    actor_start(&locker);
    for (size_t i = 0; i < PAGES; i++) {
        struct actor at = {.at = page_of(&area, i)};
        expect_fault(&area, &at);
        put(&area, i, 'l');
        assert_int_equal(continue_pages(&area, i, 1, NULL), 0);
    }
    actor_finish(&locker);
    assert_int_equal(locker.rc, 0);
    /* Punched out and filled again as any other. */
    assert_int_equal(
        fallocate(area.file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, (off_t)area.page_bytes),
        0);
    struct actor reader = {.act = ACT_READ, .at = area.guest};
    actor_start(&reader);
    expect_fault(&area, &reader);
    put(&area, 0, 'n');
    assert_int_equal(continue_pages(&area, 0, 1, NULL), 0);
    actor_finish(&reader);
    assert_int_equal(reader.value, 'n');
    area_free(&area);
}

/** One byte written through the second mapping brings 2 MiB with it, of which the neighbours fault
 * as if somebody had filled them. */
static void a_transparent_huge_page_makes_neighbours_present(void **state)
{
    (void)state;
    const size_t huge_bytes = 2u << 20;
    char directory[] = "/tmp/memferry-kernel-XXXXXX", path[64];
    struct area area;
    area_make(&area, AREA_SHMEM, 2 * huge_bytes / 4096);
    assert_non_null(mkdtemp(directory));
    if (unshare(CLONE_NEWNS) != 0 || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) != 0 ||
        mount("none", directory, "tmpfs", 0, "huge=always,size=16m") != 0) {
        int code = errno;
        rmdir(directory);
        lacking("a tmpfs with transparent huge pages (%s)", strerror(code));
    }
    snprintf(path, sizeof(path), "%s/ram", directory);
    int file = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    assert_true(file >= 0);
    assert_int_equal(ftruncate(file, (off_t)(2 * huge_bytes)), 0);
    dup2(file, area.file);
    close(file);
    umount2(directory, MNT_DETACH);
    rmdir(directory);
    /* In both, one huge page begins where the file has a multiple of it. */
    char *spare = mmap(NULL, 2 * huge_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    assert_true(spare != MAP_FAILED);
    char *aligned = (char *)(((uintptr_t)spare + huge_bytes - 1) & ~(huge_bytes - 1));
    map_at(aligned, huge_bytes, MAP_SHARED, area.file);
    char *second = area.second;
    area.second = aligned;
    munmap(second, area.length_bytes);
    map_at(area.guest, huge_bytes, MAP_SHARED, area.file);
    munmap(area.guest + huge_bytes, area.length_bytes - huge_bytes);
    area.length_bytes = huge_bytes;
    area.pages = huge_bytes / area.page_bytes;
    area_register(&area, BOTH_MODES);
    area.second[0] = 'o';
    struct stat st;
    assert_int_equal(fstat(area.file, &st), 0);
    if (st.st_blocks * 512 < (blkcnt_t)huge_bytes)
        lacking("a free huge page (the tmpfs gave %lld bytes)", (long long)st.st_blocks * 512);
    struct actor reader = {.act = ACT_READ, .at = page_of(&area, 77)};
    actor_start(&reader);
    assert_true(expect_fault(&area, &reader) & UFFD_PAGEFAULT_FLAG_MINOR); /* not MISSING */
    assert_int_equal(continue_pages(&area, 77, 1, NULL), 0);
    actor_finish(&reader);
    assert_int_equal(reader.value, 0);
    /* And only what was asked for is mapped. */
    struct actor other = {.act = ACT_READ, .at = page_of(&area, 78)};
    actor_start(&other);
    expect_fault(&area, &other);
    assert_int_equal(continue_pages(&area, 78, 1, NULL), 0);
    actor_finish(&other);
    area_free(&area);
}

int main(int argc, char **argv)
{
    struct fact facts[] = {
        FACT(a_hole_is_missing_a_page_is_minor),
        FACT(continue_maps_writable),
        FACT(after_dontneed_minor_after_a_punch_missing),
        FACT(minor_alone_fills_holes_with_zeros),
        FACT(registering_again_replaces_the_modes),
        FACT(what_was_touched_never_faults_until_punched),
        FACT(eexist_does_not_wake),
        FACT(each_waiter_sends_a_message_one_continue_frees_all),
        FACT(a_wake_over_all_brings_back_what_a_dead_reader_took),
        FACT(the_last_close_hands_out_zeros_another_reference_holds),
        FACT(unregistering_frees_waiters),
        FACT(a_blocking_userfaultfd_polls_as_an_error),
        FACT(unregistering_minor_alone_leaves_its_waiters),
        FACT(a_signal_makes_it_fault_again_and_again),
        FACT(locking_waits_for_its_pages),
        /* tmpfs only */
        FACT(a_transparent_huge_page_makes_neighbours_present),
    };
    size_t count = sizeof(facts) / sizeof(facts[0]);
    if (argc < 2 || strcmp(argv[1], "hugetlb") != 0)
        return facts_main(argc, argv, facts, count, MF_UFFD_FEATURES);
    kind = AREA_HUGETLB;
    facts[count - 1] = (struct fact)FACT(hugetlb_has_no_zeropage_and_no_part_of_a_page);
    if (!huge_pages_reserve(PAGES))
        return 77;
    argv[1] = argv[0];
    return facts_main(argc - 1, argv + 1, facts, count,
                      MF_UFFD_FEATURES | UFFD_FEATURE_MISSING_HUGETLBFS |
                          UFFD_FEATURE_MINOR_HUGETLBFS);
}
