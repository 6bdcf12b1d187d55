/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A mapping is learned (lib/events.h) while another thread of the process puts something else in
 * its place, between the look at it and the registration, or between that and the next look. What
 * belongs to a region must be watched whenever the process runs; what belongs to none must not be,
 * or who touches it would wait for ever.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "lib/events.h"
#include "lib/uffd.h"
#include "lib/util.h"
#include "tests/layout/steps.h"
#undef mf_vma_find
#undef mf_uffd_register

#define PAGE 4096u
#define LENGTH (4u * PAGE)

static struct mf_region region;
static struct mf_contexts contexts;
static struct mf_layout layout;
static struct mf_events events;

/* ---- a thread that changes something after a certain step, and waits for its event to be read */

enum step { LOOK = 1, REGISTER, LOOK_AGAIN };

/** struct change - of what lies at `place`. */
static struct change {
    enum step after; /**< 0: none */
    void *(*make)(void *arg);
    pthread_t thread;
} change[2];
static unsigned steps;
static char *base, *place, *elsewhere;
static int other_fd;

static void step(void)
{
    steps++;
    for (unsigned i = 0; i < 2; i++) {
        if (change[i].after != steps)
            continue;
        const int pending = mf_uffd_event_pending(mf_context_uffd(&contexts, 0));
        assert_int_equal(pthread_create(&change[i].thread, NULL, change[i].make, NULL), 0);
        /* It is made by the time its event is there to be read. */
        while (pending == 0 && mf_uffd_event_pending(mf_context_uffd(&contexts, 0)) == 0)
            nanosleep(&(struct timespec){.tv_nsec = 100000}, NULL);
        nanosleep(&(struct timespec){.tv_nsec = 5000000}, NULL);
    }
}

int step_find(int maps_fd, uint64_t addr, struct mf_vma *out)
{
    int r = mf_vma_find(maps_fd, addr, out);
    step();
    return r;
}

int step_register(int uffd, uint64_t start_addr, uint64_t length_bytes, struct mf_error *err)
{
    int r = mf_uffd_register(uffd, start_addr, length_bytes, err);
    step();
    return r;
}

static void *unmap(void *arg)
{
    return munmap(place, LENGTH) == 0 ? arg : MAP_FAILED;
}

static void *put_other_memory(void *arg)
{
    return mmap(place, LENGTH, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, other_fd, 0) == place
               ? arg
               : MAP_FAILED;
}

static void *move_ours_there(void *arg)
{
    return mremap(elsewhere, LENGTH, LENGTH, MREMAP_MAYMOVE | MREMAP_FIXED, place) == place
               ? arg
               : MAP_FAILED;
}

static void read_until(const struct change *of)
{
    void *result = MAP_FAILED;
    const uint64_t deadline_ns = mf_now_ns() + UINT64_C(10000000000);
    while (of->after && pthread_tryjoin_np(of->thread, &result) != 0) {
        assert_true(mf_now_ns() < deadline_ns);
        assert_true(mf_events_read(&events, 0) >= 0);
    }
    assert_true(!of->after || result == NULL);
}

static bool is_watched(const char *at)
{
    char line[512];
    bool here = false, watched = false;
    cleanup_fclose FILE *f = fopen("/proc/self/smaps", "re");
    unsigned long long start, end;
    while (f && fgets(line, sizeof(line), f)) {
        if (sscanf(line, "%llx-%llx ", &start, &end) == 2)
            here = start <= (uintptr_t)at && (uintptr_t)at < end;
        if (here && strncmp(line, "VmFlags:", 8) == 0)
            watched = strstr(line, " um") && strstr(line, " ui");
    }
    return watched;
}

static void nobody(void *arg, const struct mf_fault *fault, uint32_t index, uint64_t page)
{
    (void)arg;
    (void)fault;
    (void)index;
    (void)page;
}

static char *map_ours(char *at, uint64_t offset_bytes)
{
    assert_true(mmap(at, LENGTH, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, region.fd,
                     (off_t)offset_bytes) == at);
    return at;
}

static int set_up(void **state)
{
    struct mf_error err;
    struct stat st;
    (void)state;
    /* All but the two places is memory of nobody's. */
    base = mmap(NULL, 16 * LENGTH, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    int uffd = mf_uffd_open();
    assert_true(base != MAP_FAILED && uffd >= 0);
    assert_int_equal(mf_uffd_api(uffd, MF_UFFD_FEATURES, MF_UFFD_FEATURES_WANTED, NULL, &err), 0);
    region = (struct mf_region){.size_bytes = 2 * LENGTH,
                                .pages = 2 * LENGTH / PAGE,
                                .page_bytes = PAGE,
                                .fd = memfd_create("memferry-test", MFD_CLOEXEC)};
    other_fd = memfd_create("memferry-other", MFD_CLOEXEC);
    assert_int_equal(ftruncate(region.fd, 2 * LENGTH), 0);
    assert_int_equal(ftruncate(other_fd, LENGTH), 0);
    assert_int_equal(fstat(region.fd, &st), 0);
    region.device = st.st_dev;
    region.inode = st.st_ino;
    place = map_ours(base + 4 * LENGTH, 0);
    elsewhere = map_ours(base + 8 * LENGTH, LENGTH);
    static const struct mf_events_ops ops = {.fault = nobody};
    events = (struct mf_events){.ops = &ops,
                                .layout = &layout,
                                .contexts = &contexts,
                                .region = &region,
                                .region_count = 1};
    layout = (struct mf_layout){0};
    assert_int_equal(
        mf_contexts_add(&contexts, uffd, open("/proc/self/maps", O_RDONLY | O_CLOEXEC), false), 0);
    memset(change, 0, sizeof(change));
    steps = 1000; /* none of these */
    assert_int_equal(mf_events_learn(&events, 0, (uintptr_t)place, (uintptr_t)place + LENGTH), 0);
    assert_int_equal(
        mf_events_learn(&events, 0, (uintptr_t)elsewhere, (uintptr_t)elsewhere + LENGTH), 0);
    assert_true(is_watched(place) && is_watched(elsewhere));
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    mf_contexts_free(&contexts);
    munmap(base, 16 * LENGTH);
    close(region.fd);
    close(other_fd);
    return 0;
}

static void learn(void)
{
    steps = 0;
    assert_int_equal(mf_events_learn(&events, 0, (uintptr_t)place, (uintptr_t)place + LENGTH), 0);
}

static void what_comes_while_it_is_looked_at_stays_watched(void **state)
{
    (void)state;
    change[0] = (struct change){.after = REGISTER, .make = unmap};
    change[1] = (struct change){.after = LOOK_AGAIN, .make = move_ours_there};
    learn();
    /* Whoever moved it goes on when the event is read: it was never unwatched until then. */
    assert_true(is_watched(place));
    read_until(&change[0]);
    read_until(&change[1]);
    assert_true(is_watched(place));
}

static void others_memory_does_not_stay_watched(void **state)
{
    (void)state;
    change[0] = (struct change){.after = LOOK, .make = put_other_memory};
    learn();
    read_until(&change[0]);
    assert_false(is_watched(place));
    assert_true(is_watched(elsewhere));
}

static void what_comes_over_others_memory_is_watched(void **state)
{
    (void)state;
    change[0] = (struct change){.after = LOOK, .make = put_other_memory};
    change[1] = (struct change){.after = LOOK_AGAIN, .make = move_ours_there};
    learn();
    assert_true(is_watched(place));
    read_until(&change[0]);
    read_until(&change[1]);
    assert_true(is_watched(place));
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
        cmocka_unit_test_setup_teardown(what_comes_while_it_is_looked_at_stays_watched, set_up,
                                        tear_down),
        cmocka_unit_test_setup_teardown(others_memory_does_not_stay_watched, set_up, tear_down),
        cmocka_unit_test_setup_teardown(what_comes_over_others_memory_is_watched, set_up,
                                        tear_down),
    };
    return cmocka_run_group_tests_name("learn", tests, NULL, NULL);
}
