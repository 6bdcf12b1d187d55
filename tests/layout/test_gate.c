/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A page of region A is resolved again and again, wherever it is mapped, while another thread moves
 * it away and page B, which nobody has confirmed, to the same address. B must never become mapped.
 *
 * The resolving thread waits for a while between its look at the layout and the ioctl (that is all
 * that slow_continue.h changes), so without the gate B is mapped within a few turns: MF_NO_GATE=1
 * shows it, and the test then fails.
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
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "lib/events.h"
#include "lib/resolve.h"
#include "lib/uffd.h"
#include "lib/util.h"

#define PAGE 4096u
#define TURNS 400u
enum { A, B };

static struct mf_region region[2];
static struct mf_contexts contexts;
static struct mf_layout layout;
static struct mf_gate gate;
static struct mf_events events;
static _Atomic bool stop;
static _Atomic uint64_t resolved;
static bool without_gate;

int slow_continue(int uffd, uint64_t start_addr, uint64_t length_bytes, uint64_t *done_bytes);

int slow_continue(int uffd, uint64_t start_addr, uint64_t length_bytes, uint64_t *done_bytes)
{
    nanosleep(&(struct timespec){.tv_nsec = 50000}, NULL);
    int r = mf_uffd_continue(uffd, start_addr, length_bytes, done_bytes);
    atomic_fetch_add(&resolved, r == 0);
    return r;
}

static void nobody(void *arg, const struct mf_fault *fault, uint32_t index, uint64_t page)
{
    (void)arg;
    (void)fault;
    (void)index;
    (void)page;
}

static enum mf_removed removed(void *arg, uint32_t context, uint64_t start, uint64_t end)
{
    (void)arg;
    (void)context;
    (void)start;
    (void)end;
    return MF_REMOVED_NOTHING; /* it is MADV_DONTNEED */
}

static void nothing(void *arg, uint32_t context)
{
    (void)arg;
    (void)context;
}

static void *read_events(void *arg)
{
    struct pollfd wait = {.fd = mf_context_uffd(&contexts, 0), .events = POLLIN};
    (void)arg;
    while (!atomic_load(&stop)) {
        if (poll(&wait, 1, 20) > 0 && mf_events_read(&events, 0) < 0)
            abort();
        mf_events_serve(&events, true);
    }
    return NULL;
}

static void *resolve(void *arg)
{
    struct mf_resolver resolver = {.region = region,
                                   .layout = &layout,
                                   .contexts = &contexts,
                                   .lane = without_gate ? NULL : mf_gate_join(&gate),
                                   .on_event = nothing};
    (void)arg;
    while (!atomic_load(&stop))
        mf_resolve_run(&resolver, A, 0, 1);
    mf_gate_leave(resolver.lane);
    return NULL;
}

static bool is_mapped(int pagemap_fd, const char *at)
{
    uint64_t entry = 0;
    off_t offset = (off_t)((uintptr_t)at / PAGE * sizeof(entry));
    assert_int_equal(pread(pagemap_fd, &entry, sizeof(entry), offset), sizeof(entry));
    return entry >> 63;
}

static char *move(char *from, char *to)
{
    char *at = mremap(from, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to);
    assert_true(at == to);
    return at;
}

static void what_is_moved_in_between_is_not_resolved(void **state)
{
    (void)state;
    struct mf_error err;
    struct stat st;
    pthread_t reader, resolving;
    /* A place, and one for each of the two to be away. All stay reserved. */
    char *place = mmap(NULL, 16 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    assert_true(place != MAP_FAILED);
    char *away[2] = {place + 4 * PAGE, place + 8 * PAGE};
    int uffd = mf_uffd_open();
    assert_true(uffd >= 0);
    assert_int_equal(mf_uffd_api(uffd, MF_UFFD_FEATURES, MF_UFFD_FEATURES_WANTED, NULL, &err), 0);
    for (unsigned i = 0; i < 2; i++) {
        struct mf_region *r = &region[i];
        r->fd = memfd_create("memferry-test", MFD_CLOEXEC);
        assert_int_equal(ftruncate(r->fd, PAGE), 0);
        assert_int_equal(fstat(r->fd, &st), 0);
        *r = (struct mf_region){.size_bytes = PAGE,
                                .pages = 1,
                                .page_bytes = PAGE,
                                .fd = r->fd,
                                .device = st.st_dev,
                                .inode = st.st_ino};
        r->map = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, r->fd, 0);
        r->map[0] = 1; /* in the page cache, which proves nothing */
        assert_true(mmap(away[i], PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, r->fd, 0) ==
                    away[i]);
    }
    int maps_fd = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
    int pagemap_fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    assert_true(maps_fd >= 0 && pagemap_fd >= 0);
    assert_int_equal(mf_contexts_add(&contexts, uffd, maps_fd, false), 0);
    assert_int_equal(mf_gate_init(&gate), 0);
    static const struct mf_events_ops ops = {.fault = nobody, .removed = removed};
    events.ops = &ops;
    events.layout = &layout;
    events.contexts = &contexts;
    events.gate = without_gate ? NULL : &gate;
    events.region = region;
    events.region_count = 2;
    for (unsigned i = 0; i < 2; i++)
        assert_int_equal(mf_events_learn(&events, 0, (uintptr_t)away[i], (uintptr_t)away[i] + PAGE),
                         0);
    assert_int_equal(pthread_create(&reader, NULL, read_events, NULL), 0);
    assert_int_equal(pthread_create(&resolving, NULL, resolve, NULL), 0);
    unsigned wrong = 0;
    for (unsigned turn = 0; turn < TURNS; turn++) {
        move(away[A], place);
        /* The page goes, so that resolving it has something to do again, and away. */
        madvise(place, PAGE, MADV_DONTNEED);
        const uint64_t before = atomic_load(&resolved);
        for (unsigned i = 0; i < 20 && atomic_load(&resolved) == before; i++)
            nanosleep(&(struct timespec){.tv_nsec = 20000}, NULL);
        move(place, away[A]);
        move(away[B], place);
        for (unsigned i = 0; i < 4; i++) {
            nanosleep(&(struct timespec){.tv_nsec = 30000}, NULL);
            wrong += is_mapped(pagemap_fd, place);
        }
        move(place, away[B]);
        /* Away again as it was. */
        madvise(away[B], PAGE, MADV_DONTNEED);
        madvise(away[A], PAGE, MADV_DONTNEED);
    }
    atomic_store(&stop, true);
    pthread_join(resolving, NULL);
    pthread_join(reader, NULL);
    print_message("resolved %llu times\n", (unsigned long long)atomic_load(&resolved));
    assert_int_equal(wrong, 0);
    assert_true(atomic_load(&resolved) > TURNS / 2);
    mf_contexts_free(&contexts);
    close(pagemap_fd);
    mf_gate_destroy(&gate);
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
    without_gate = getenv("MF_NO_GATE") != NULL;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_is_moved_in_between_is_not_resolved),
    };
    return cmocka_run_group_tests_name("gate", tests, NULL, NULL);
}
