/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Changes of 2 GiB and more, where an int would not hold the length: discarded, moved, cut and
 * doubled, over a file that is all holes. In one process; a thread reads the events.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "lib/events.h"
#include "lib/land.h"
#include "lib/uffd.h"
#include "lib/util.h"

#define PAGE UINT64_C(4096)
#define GIB (UINT64_C(1) << 30)
#define BYTES (5 * GIB)

static struct mf_region region;
static struct mf_pages pages;
static struct mf_contexts contexts;
static struct mf_layout layout;
static struct mf_events events;
static struct mf_lander lander;
static _Atomic bool stop;
static _Atomic uint64_t discarded;
static char *base;

static void nobody(void *arg, const struct mf_fault *fault, uint32_t index, uint64_t page)
{
    (void)arg;
    (void)fault;
    mf_resolve_page(&lander.resolver, index, page);
}

static void discard(void *arg, uint32_t index, uint64_t first, uint64_t count)
{
    (void)arg;
    mf_land_discard(&lander, index, first, count, false);
}

static void served(void *arg, uint32_t index, uint64_t page)
{
    (void)arg;
    (void)index;
    (void)page;
}

static void landed(void *arg, enum mf_landed what, uint64_t count)
{
    (void)arg;
    if (what == MF_LANDED_DISCARDED)
        atomic_fetch_add(&discarded, count);
}

static void broken(void *arg, uint32_t index, int error)
{
    (void)arg;
    (void)index;
    (void)error;
    abort();
}

static void on_event(void *arg, uint32_t context)
{
    (void)arg;
    if (mf_events_read(&events, context) < 0)
        abort();
}

static void *read_events(void *arg)
{
    struct pollfd wait = {.fd = mf_context_uffd(&contexts, 0), .events = POLLIN};
    (void)arg;
    while (!atomic_load(&stop)) {
        if (poll(&wait, 1, 20) > 0)
            on_event(NULL, 0);
        mf_events_serve(&events, true);
    }
    return NULL;
}

/* The reader has applied what was told: who changed something goes on after the reading, which may
 * be a moment before. */
static bool is_known(const char *from, uint64_t length_bytes, uint64_t offset_bytes)
{
    struct mf_mapping m;
    for (unsigned i = 0; i < 5000; i++) {
        if (mf_layout_covers(&layout, 0, (uintptr_t)from, (uintptr_t)from + length_bytes) &&
            mf_layout_find(&layout, 0, (uintptr_t)from, &m) &&
            m.offset_bytes + ((uintptr_t)from - m.start_addr) == offset_bytes)
            return true;
        usleep(1000);
    }
    return false;
}

static bool is_forgotten(const char *from, uint64_t length_bytes)
{
    struct mf_mapping m;
    for (unsigned i = 0; i < 5000; i++) {
        if (!mf_layout_from(&layout, 0, (uintptr_t)from, &m) ||
            m.start_addr >= (uintptr_t)from + length_bytes)
            return true;
        usleep(1000);
    }
    return false;
}

static uint64_t in_state(enum mf_page_state state)
{
    uint64_t count = 0;
    for (uint64_t page = 0; page < pages.count; page++)
        count += mf_page_state_of(mf_page_load(&pages, page)) == state;
    return count;
}

static char *room(uint64_t length_bytes)
{
    char *at =
        mmap(NULL, length_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    assert_true(at != MAP_FAILED);
    return at;
}

static void ranges_beyond_2_gib_are_discarded(void **state)
{
    (void)state;
    const uint64_t first = GIB / 2, length_bytes = 5 * GIB / 2;
    assert_int_equal(madvise(base + first, length_bytes, MADV_REMOVE), 0);
    for (unsigned i = 0; i < 5000 && atomic_load(&discarded) < length_bytes / PAGE; i++)
        usleep(1000);
    assert_int_equal(atomic_load(&discarded), length_bytes / PAGE);
    assert_int_equal(in_state(MF_PAGE_DISCARDED), length_bytes / PAGE);
    assert_int_equal(mf_page_state_of(mf_page_load(&pages, first / PAGE - 1)), MF_PAGE_UNCONFIRMED);
    assert_int_equal(mf_page_state_of(mf_page_load(&pages, (first + length_bytes) / PAGE)),
                     MF_PAGE_UNCONFIRMED);
    /* And read as zeros at both ends. */
    assert_int_equal(*(volatile char *)(base + first), 0);
    assert_int_equal(*(volatile char *)(base + first + length_bytes - 1), 0);
}

static void ranges_beyond_2_gib_are_moved_and_cut(void **state)
{
    (void)state;
    const uint64_t from = 2 * GIB, length_bytes = 9 * GIB / 4;
    char *to = room(length_bytes);
    assert_true(
        mremap(base + from, length_bytes, length_bytes, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to);
    assert_true(is_forgotten(base + from, length_bytes));
    assert_true(is_known(to, length_bytes, from));
    assert_true(is_known(base, from, 0));
    /* A discarded page is found where it is now. */
    assert_int_equal(*(volatile char *)(to + GIB / 2), 0);
    const uint64_t cut = 17 * GIB / 8;
    assert_int_equal(munmap(to, cut), 0);
    assert_true(is_forgotten(to, cut));
    assert_true(is_known(to + cut, length_bytes - cut, from + cut));
    /* Something else over all that is left of the first, 2 GiB. */
    assert_true(mmap(base, from, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED,
                     -1, 0) == base);
    assert_true(is_forgotten(base, from));
    assert_true(
        is_known(base + from + length_bytes, BYTES - from - length_bytes, from + length_bytes));
}

static int set_up(void **state)
{
    static pthread_t reader;
    static const struct mf_events_ops ops = {.fault = nobody, .discard = discard};
    static const struct mf_lander_ops lander_ops = {served, landed, broken};
    struct mf_error err;
    struct stat st;
    (void)state;
    int fd = memfd_create("memferry-large", MFD_CLOEXEC), uffd = mf_uffd_open();
    if (fd < 0 || uffd < 0 || ftruncate(fd, (off_t)BYTES) != 0 || fstat(fd, &st) != 0 ||
        mf_uffd_api(uffd, MF_UFFD_FEATURES, MF_UFFD_FEATURES_WANTED, NULL, &err) < 0)
        return -1;
    base = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
    region = (struct mf_region){.size_bytes = BYTES,
                                .pages = BYTES / PAGE,
                                .page_bytes = (uint32_t)PAGE,
                                .fd = fd,
                                .device = st.st_dev,
                                .inode = st.st_ino};
    pages = (struct mf_pages){.state = calloc(BYTES / PAGE, 1), .count = BYTES / PAGE};
    int maps_fd = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
    if (base == MAP_FAILED || !pages.state || maps_fd < 0 ||
        mf_contexts_add(&contexts, uffd, maps_fd, false) != 0)
        return -1;
    events.ops = &ops;
    events.layout = &layout;
    events.contexts = &contexts;
    events.region = &region;
    events.region_count = 1;
    lander = (struct mf_lander){.resolver = {.region = &region,
                                             .layout = &layout,
                                             .contexts = &contexts,
                                             .on_event = on_event},
                                .pages = &pages,
                                .ops = &lander_ops};
    if (mf_events_learn(&events, 0, (uintptr_t)base, (uintptr_t)base + BYTES) < 0)
        return -1;
    return pthread_create(&reader, NULL, read_events, NULL);
}

int main(void)
{
    uint64_t features;
    struct mf_error err;
    if (mf_uffd_features(&features, &err) < 0 ||
        (features & MF_UFFD_FEATURES) != MF_UFFD_FEATURES) {
        fprintf(stderr, "skipped: userfaultfd with MINOR_SHMEM is not to be had here\n");
        return 77;
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(ranges_beyond_2_gib_are_discarded),
        cmocka_unit_test(ranges_beyond_2_gib_are_moved_and_cut),
    };
    int r = cmocka_run_group_tests_name("large", tests, set_up, NULL);
    _exit(r); /* what is still mapped is watched, and nobody need read of its end */
}
