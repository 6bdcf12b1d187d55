/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Private anonymous memory: what UFFDIO_COPY and ZEROPAGE do with it, what /proc/PID/mem and
 * pagemap say of it, and what forking, moving and discarding make of a page that is still missing.
 */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "lib/inject.h"
#include "lib/pagemap.h"
#include "lib/target.h"
#include "lib/uffd.h"
#include "lib/util.h"
#include "tests/kernel/area.h"
#include "tests/kernel/fact.h"

#define PAGES 8u
#define PAGE 4096u
#define LENGTH ((size_t)PAGES * PAGE)

static char *memory;
static int uffd;
static char bytes[LENGTH];

static char *map(void)
{
    char *at = mmap(NULL, LENGTH, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    assert_true(at != MAP_FAILED);
    /* Pages of their own, whatever the machine's setting is. */
    madvise(at, LENGTH, MADV_NOHUGEPAGE);
    return at;
}

static void watch_missing(char *at)
{
    struct uffdio_register reg = {.range = {.start = (uintptr_t)at, .len = LENGTH},
                                  .mode = UFFDIO_REGISTER_MODE_MISSING};
    assert_int_equal(ioctl_errno(uffd, UFFDIO_REGISTER, &reg), 0);
}

static int set_up(void **state)
{
    (void)state;
    struct mf_error err;
    memory = map();
    uffd = mf_uffd_open();
    assert_true(uffd >= 0);
    assert_int_equal(mf_uffd_api(uffd, MF_UFFD_FEATURES | UFFD_FEATURE_EVENT_FORK,
                                 MF_UFFD_FEATURES_WANTED, NULL, &err),
                     0);
    for (size_t i = 0; i < PAGES; i++)
        memset(bytes + i * PAGE, (int)('a' + i), PAGE);
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    if (uffd >= 0)
        close(uffd);
    munmap(memory, LENGTH);
    return 0;
}

/* Bytes of pages @first on, to @at. Return: errno or 0; *@done as the kernel left it. */
static int copy_to(int fd, char *at, size_t first, size_t pages, int64_t *done)
{
    struct uffdio_copy arg = {.dst = (uintptr_t)at,
                              .src = (uintptr_t)bytes + first * PAGE,
                              .len = pages * PAGE,
                              .copy = 12345};
    int code = ioctl_errno(fd, UFFDIO_COPY, &arg);
    if (done)
        *done = arg.copy;
    return code;
}

static int copy_pages(size_t first, size_t pages, int64_t *done)
{
    return copy_to(uffd, memory + first * PAGE, first, pages, done);
}

static void copy_lands_and_wakes(void **state)
{
    (void)state;
    struct actor reader = {.act = ACT_READ, .at = memory + 3 * PAGE};
    watch_missing(memory);
    actor_start(&reader);
    assert_int_equal(next_message(uffd).event, UFFD_EVENT_PAGEFAULT);
    assert_int_equal(copy_pages(2, 4, NULL), 0);
    actor_finish(&reader);
    assert_int_equal(reader.value, 'd');
}

/* So EEXIST says that the page is there, with what was copied, or what was made of that since. */
static void only_a_fill_makes_a_page_and_a_second_one_is_eexist(void **state)
{
    (void)state;
    int64_t done = 0;
    watch_missing(memory);
    assert_int_equal(copy_pages(1, 1, NULL), 0);
    memory[PAGE] = 'X';
    assert_int_equal(copy_pages(1, 1, &done), EEXIST);
    assert_int_equal(done, -EEXIST);
    assert_int_equal(memory[PAGE], 'X');
    assert_int_equal(copy_pages(0, 3, &done), EAGAIN);
    assert_int_equal(done, PAGE);
}

/* A mapping that was split, of which no event tells, is filled page by page. */
static void copy_across_a_split_is_enoent(void **state)
{
    (void)state;
    watch_missing(memory);
    assert_int_equal(mprotect(memory + 2 * PAGE, PAGE, PROT_READ), 0);
    assert_int_equal(copy_pages(1, 3, NULL), ENOENT);
    assert_int_equal(copy_pages(1, 1, NULL), 0);
    assert_int_equal(copy_pages(2, 1, NULL), 0);
    assert_int_equal(memory[2 * PAGE], 'c');
    assert_int_equal(mprotect(memory + 3 * PAGE, PAGE, PROT_NONE), 0);
    assert_int_equal(copy_pages(3, 1, NULL), 0);
    assert_int_equal(mprotect(memory + 3 * PAGE, PAGE, PROT_READ), 0);
    assert_int_equal(memory[3 * PAGE], 'd');
}

static void dontneed_tells_then_the_page_is_missing_again(void **state)
{
    (void)state;
    struct actor giver = {.act = ACT_DONTNEED, .at = memory, .length_bytes = 2 * PAGE};
    struct actor reader = {.act = ACT_READ, .at = memory};
    uint64_t done_bytes;
    watch_missing(memory);
    assert_int_equal(copy_pages(0, 1, NULL), 0);
    actor_start(&giver);
    await_readable(uffd);
    assert_int_equal(copy_pages(5, 1, NULL), EAGAIN); /* while the event is unread */
    assert_int_equal(next_message(uffd).event, UFFD_EVENT_REMOVE);
    actor_finish(&giver);
    actor_start(&reader);
    assert_int_equal(next_message(uffd).event, UFFD_EVENT_PAGEFAULT);
    assert_int_equal(mf_uffd_zeropage(uffd, (uintptr_t)memory, PAGE, &done_bytes), 0);
    actor_finish(&reader);
    assert_int_equal(reader.value, 0);
}

/* What is copied too late brings discarded bytes back, and nobody but the target can take them out:
 * so no fill may lie between reading the event and knowing that the page is discarded. */
static void a_copy_after_the_event_brings_discarded_bytes_back(void **state)
{
    (void)state;
    struct actor giver = {.act = ACT_DONTNEED, .at = memory, .length_bytes = PAGE};
    watch_missing(memory);
    actor_start(&giver);
    assert_int_equal(next_message(uffd).event, UFFD_EVENT_REMOVE);
    actor_finish(&giver);
    assert_int_equal(copy_pages(0, 1, NULL), 0);
    assert_int_equal(memory[0], 'a');
}

static void *move_away(void *to)
{
    void *at = mremap(memory, LENGTH, LENGTH, MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP, to);
    return at == to ? NULL : at;
}

/* The pages go to the new place; the old one stays watched, and reads as zeros from then on. */
static void dontunmap_takes_the_pages_along(void **state)
{
    (void)state;
    struct actor reader = {.act = ACT_READ, .at = memory};
    pthread_t thread;
    void *failed;
    uint64_t done_bytes;
    watch_missing(memory);
    assert_int_equal(copy_pages(0, 1, NULL), 0);
    char *to = map();
    assert_int_equal(pthread_create(&thread, NULL, move_away, to), 0);
    struct uffd_msg message = next_message(uffd);
    while (message.event == UFFD_EVENT_UNMAP) /* of what lay at the new place */
        message = next_message(uffd);
    assert_int_equal(message.event, UFFD_EVENT_REMAP);
    assert_int_equal(pthread_join(thread, &failed), 0);
    assert_null(failed);
    assert_int_equal(to[0], 'a');
    assert_int_equal(copy_to(uffd, to + PAGE, 1, 1, NULL), 0);
    actor_start(&reader);
    assert_int_equal(next_message(uffd).event, UFFD_EVENT_PAGEFAULT);
    assert_int_equal(mf_uffd_zeropage(uffd, (uintptr_t)memory, PAGE, &done_bytes), 0);
    actor_finish(&reader);
    assert_int_equal(reader.value, 0);
    close(uffd);
    uffd = -1;
    munmap(to, LENGTH);
}

static void a_missing_page_is_missing_where_it_was_moved_to(void **state)
{
    (void)state;
    char *to = mmap(NULL, PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    assert_true(to != MAP_FAILED);
    watch_missing(memory);
    struct actor mover = {
        .act = ACT_REMAP, .at = memory + 4 * PAGE, .length_bytes = PAGE, .to = to};
    actor_start(&mover);
    assert_int_equal(next_message(uffd).event, UFFD_EVENT_REMAP);
    assert_int_equal(next_message(uffd).event, UFFD_EVENT_UNMAP);
    actor_finish(&mover);
    assert_int_equal(mover.rc, 0);
    struct actor reader = {.act = ACT_READ, .at = to};
    actor_start(&reader);
    struct uffd_msg message = next_message(uffd);
    assert_int_equal(message.event, UFFD_EVENT_PAGEFAULT);
    assert_int_equal(copy_to(uffd, to, 4, 1, NULL), 0);
    actor_finish(&reader);
    assert_int_equal(reader.value, 'e');
    close(uffd);
    uffd = -1;
    munmap(to, PAGE);
}

static void *fork_and_read(void *arg)
{
    /* The child reads a page that is missing in both, then one that its parent has. */
    int *out = arg;
    pid_t child = fork();
    if (child == 0) {
        char found[2] = {((volatile char *)memory)[2 * PAGE], ((volatile char *)memory)[0]};
        ssize_t n = write(out[1], found, 2);
        _exit(n == 2 ? 0 : 1);
    }
    *(pid_t *)(void *)&out[2] = child;
    return NULL;
}

static void a_forked_child_misses_what_its_parent_misses(void **state)
{
    (void)state;
    int shared[3];
    char found[2];
    pthread_t thread;
    watch_missing(memory);
    assert_int_equal(copy_pages(0, 1, NULL), 0);
    assert_int_equal(pipe2(shared, O_CLOEXEC), 0);
    assert_int_equal(pthread_create(&thread, NULL, fork_and_read, shared), 0);
    await_readable(uffd);
    assert_int_equal(copy_pages(5, 1, NULL), EAGAIN);
    struct uffd_msg message = next_message(uffd);
    assert_int_equal(message.event, UFFD_EVENT_FORK);
    int child_uffd = (int)message.arg.fork.ufd;
    assert_int_equal(pthread_join(thread, NULL), 0);
    message = next_message(child_uffd);
    assert_int_equal(message.event, UFFD_EVENT_PAGEFAULT);
    assert_int_equal(message.arg.pagefault.address & ~UINT64_C(4095), (uintptr_t)memory + 2 * PAGE);
    /* Each has a page of its own: filling the parent's leaves the child's missing. */
    assert_int_equal(copy_pages(2, 1, NULL), 0);
    memory[2 * PAGE] = 'P';
    assert_int_equal(copy_to(child_uffd, memory, 0, 1, NULL), EEXIST);
    /* From here on it runs, and ends. */
    assert_int_equal(copy_to(child_uffd, memory + 2 * PAGE, 2, 1, NULL), 0);
    assert_int_equal(read(shared[0], found, 2), 2);
    assert_int_equal(found[0], 'c');
    assert_int_equal(found[1], 'a');
    assert_int_equal(memory[2 * PAGE], 'P');
    waitpid(shared[2], NULL, 0);
    close(child_uffd);
    close(shared[0]);
    close(shared[1]);
}

/* ---- the source's side: another process's memory ---- */

struct other {
    pid_t pid;
    int mem, pagemap;
};

static struct other other_start(void (*prepare)(void))
{
    struct other other = {0};
    struct mf_error err;
    char path[64], ready;
    int ends[2];
    assert_int_equal(pipe2(ends, O_CLOEXEC), 0);
    pid_t parent = getpid();
    other.pid = fork();
    if (other.pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        prepare();
        if (getppid() != parent || write(ends[1], "x", 1) != 1)
            _exit(1);
        for (;;)
            pause();
    }
    close(ends[1]);
    assert_int_equal(read(ends[0], &ready, 1), 1);
    close(ends[0]);
    snprintf(path, sizeof(path), "/proc/%d/mem", (int)other.pid);
    other.mem = open(path, O_RDONLY | O_CLOEXEC);
    other.pagemap = mf_pagemap_open((int)other.pid, &err);
    assert_true(other.mem >= 0 && other.pagemap >= 0);
    return other;
}

static void other_end(struct other *other)
{
    kill(other->pid, SIGKILL);
    waitpid(other->pid, NULL, 0);
    close(other->mem);
    close(other->pagemap);
}

/* @expected: a letter a page, x where something is held. */
static void expect_populated(const struct other *other, const char *expected)
{
    uint8_t seen[PAGES];
    char found[PAGES + 1] = {0};
    assert_int_equal(mf_pagemap_populated(other->pagemap, (uintptr_t)memory, LENGTH, PAGE, seen),
                     0);
    for (size_t i = 0; i < PAGES; i++)
        found[i] = seen[i] ? 'x' : '-';
    assert_string_equal(found, expected);
}

static void touch_some(void)
{
    memory[0] = '0';
    memory[3 * PAGE] = '3';
    (void)*(volatile char *)(memory + 5 * PAGE); /* the page of zeros */
    mprotect(memory + 3 * PAGE, PAGE, PROT_NONE);
}

/* Without PAGEMAP_SCAN (Linux 6.7) the page of zeros can't be told from others, and counts. */
static bool knows_zeros(void)
{
    uint64_t have = 0;
    mf_uffd_features(&have, NULL);
    return have & UFFD_FEATURE_WP_ASYNC;
}

static void holes_and_the_page_of_zeros_hold_nothing(void **state)
{
    (void)state;
    char page[PAGE];
    struct other other = other_start(touch_some);
    expect_populated(&other, knows_zeros() ? "x--x----" : "x--x-x--");
    /* Reading a hole is answered with zeros and does not populate it with a page of its own. */
    assert_int_equal(pread(other.mem, page, PAGE, (off_t)((uintptr_t)memory + 4 * PAGE)), PAGE);
    assert_int_equal(page[0], 0);
    expect_populated(&other, knows_zeros() ? "x--x----" : "x--xxx--");
    other_end(&other);
}

/* Whatever its protection is, unless the kernel lets only a tracer (Debian's since 7.x, and where
 * it is booted so). */
static void protected_memory_can_be_read(void **state)
{
    (void)state;
    char page[PAGE];
    struct other other = other_start(touch_some);
    ssize_t length = pread(other.mem, page, PAGE, (off_t)((uintptr_t)memory + 3 * PAGE));
    if (length < 0 && errno == EIO)
        lacking("proc_mem.force_override=always on the kernel's command line");
    assert_int_equal(length, PAGE);
    assert_int_equal(page[0], '3');
    other_end(&other);
}

/* A process that is gone must not look like one without memory. */
static void memory_of_the_dead_is_no_hole(void **state)
{
    (void)state;
    char page[PAGE];
    uint8_t seen[PAGES];
    struct other other = other_start(touch_some);
    kill(other.pid, SIGKILL);
    waitpid(other.pid, NULL, 0);
    assert_int_equal(mf_pagemap_populated(other.pagemap, (uintptr_t)memory, LENGTH, PAGE, seen),
                     -ESRCH);
    assert_int_equal(pread(other.mem, page, PAGE, (off_t)(uintptr_t)memory), 0);
    other_end(&other);
}

static void lock_it(void)
{
    syscall(SYS_mlock, memory, (size_t)4 * PAGE); /* a sanitizer makes mlock() nothing */
    memory[6 * PAGE] = '6';
}

static void discarding_reaches_locked_memory(void **state)
{
    (void)state;
    struct mf_error err = {0};
    struct rlimit limit;
    getrlimit(RLIMIT_MEMLOCK, &limit);
    struct other other = other_start(lock_it);
    cleanup_close int pidfd = (int)syscall(SYS_pidfd_open, other.pid, 0);
    expect_populated(&other, "xxxx--x-");
    if (mf_inject_discard(other.pid, pidfd, (uintptr_t)memory, LENGTH, &err) != 0)
        fail_msg("%s", err.text);
    expect_populated(&other, "--------");
    other_end(&other);
}

static void stores_to_private_memory_are_seen(void **state)
{
    (void)state;
    struct mf_error err;
    uint8_t seen[PAGES];
    cleanup_close int wp = mf_uffd_open();
    cleanup_close int pagemap = mf_pagemap_open((int)getpid(), &err);
    assert_int_equal(mf_uffd_api(wp, MF_UFFD_FEATURES_WP, 0, NULL, &err), 0);
    memset(memory, 'x', 6 * PAGE);
    assert_int_equal(mf_uffd_register_wp(wp, (uintptr_t)memory, LENGTH, &err), 0);
    assert_int_equal(mf_uffd_protect(wp, (uintptr_t)memory, 6 * PAGE), 0);
    memory[2 * PAGE] = 'y';
    /* A discarded page that is touched again is a new one, and counts as written. */
    madvise(memory + 4 * PAGE, PAGE, MADV_DONTNEED);
    (void)*(volatile char *)(memory + 4 * PAGE);
    assert_int_equal(mf_pagemap_scan(pagemap, (uintptr_t)memory, LENGTH, PAGE, seen), 0);
    for (size_t i = 0; i < PAGES; i++)
        assert_int_equal((seen[i] & MF_PAGEMAP_WRITTEN) != 0, i == 2 || i == 4 || i >= 6);
}

int main(int argc, char **argv)
{
    static const struct fact facts[] = {
        FACT_WITH(copy_lands_and_wakes, set_up, tear_down),
        FACT_WITH(only_a_fill_makes_a_page_and_a_second_one_is_eexist, set_up, tear_down),
        FACT_WITH(copy_across_a_split_is_enoent, set_up, tear_down),
        FACT_WITH(dontneed_tells_then_the_page_is_missing_again, set_up, tear_down),
        FACT_WITH(a_copy_after_the_event_brings_discarded_bytes_back, set_up, tear_down),
        FACT_WITH(dontunmap_takes_the_pages_along, set_up, tear_down),
        FACT_WITH(a_missing_page_is_missing_where_it_was_moved_to, set_up, tear_down),
        FACT_WITH(a_forked_child_misses_what_its_parent_misses, set_up, tear_down),
        FACT_WITH(holes_and_the_page_of_zeros_hold_nothing, set_up, tear_down),
        FACT_WITH(protected_memory_can_be_read, set_up, tear_down),
        FACT_WITH(memory_of_the_dead_is_no_hole, set_up, tear_down),
        FACT_WITH(discarding_reaches_locked_memory, set_up, tear_down),
        FACT_FULL(stores_to_private_memory_are_seen, set_up, tear_down, MF_UFFD_FEATURES_WP),
    };
    return facts_main(argc, argv, facts, sizeof(facts) / sizeof(facts[0]), MF_UFFD_FEATURES);
}
