/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A process that is killed while it takes up that pages were discarded, at each step, and its
 * successor. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "lib/land.h"
#include "lib/util.h"
#include "lib/zero.h"
#include "tests/unit/killed_fallocate.h"
#undef fallocate

#define PAGE 4096u
#define PAGES 12u
#define KILLED 99

static const uint8_t before[PAGES] = {
    MF_PAGE_CONFIRMED,
    MF_PAGE_LANDED,
    MF_PAGE_LANDED | MF_PAGE_FAULTED,
    MF_PAGE_UNCONFIRMED,
    MF_PAGE_TORN,
    MF_PAGE_LANDING,
    MF_PAGE_LANDING | MF_PAGE_LANDED,
    MF_PAGE_LANDED,
    MF_PAGE_CONFIRMED,
    MF_PAGE_UNCONFIRMED | MF_PAGE_FAULTED,
    MF_PAGE_DISCARDED,
    MF_PAGE_TORN | MF_PAGE_FAULTED,
};

static struct mf_region region = {
    .size_bytes = PAGES * PAGE, .pages = PAGES, .page_bytes = PAGE, .kind = MF_MEMORY_TMPFS};
static struct mf_pages states;
static unsigned calls_left;

int killed_fallocate(int fd, int mode, off_t offset_bytes, off_t length_bytes)
{
    if (calls_left-- == 0)
        _exit(KILLED);
    return fallocate(fd, mode, offset_bytes, length_bytes);
}

static void served(void *arg, uint32_t index, uint64_t page)
{
    (void)arg;
    (void)index;
    (void)page;
}

static void landed(void *arg, enum mf_landed what, uint64_t pages)
{
    (void)arg;
    (void)what;
    (void)pages;
}

static void broken(void *arg, uint32_t index, int error)
{
    (void)arg;
    (void)index;
    (void)error;
    _exit(1);
}

static void punch(void *arg, uint64_t page)
{
    (void)arg;
    assert_int_equal(fallocate(region.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                               (off_t)(page * PAGE), PAGE),
                     0);
}

static void set_up(void)
{
    memset(region.map, 0x5a, PAGES * PAGE);
    punch(NULL, 3); /* nothing has come for these */
    punch(NULL, 9);
    punch(NULL, 10);
    for (uint64_t page = 0; page < PAGES; page++)
        states.state[page] = before[page];
}

/* In a process of its own. Return: was it killed? */
static bool discard(unsigned calls, bool all)
{
    static const struct mf_lander_ops ops = {served, landed, broken};
    static struct mf_layout layout;
    static struct mf_contexts contexts;
    const struct mf_lander lander = {
        .resolver = {.region = &region, .layout = &layout, .contexts = &contexts},
        .pages = &states,
        .ops = &ops};
    int status = 0;
    fflush(NULL);
    const pid_t pid = fork();
    if (pid == 0) {
        calls_left = calls;
        mf_land_discard(&lander, 0, 0, PAGES, all);
        _exit(0);
    }
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_true(WIFEXITED(status) && (WEXITSTATUS(status) == 0 || WEXITSTATUS(status) == KILLED));
    return WEXITSTATUS(status) == KILLED;
}

static void what_a_killed_one_has_called_discarded_has_no_bytes(void **state)
{
    (void)state;
    for (unsigned all = 0; all < 2; all++)
        for (unsigned calls = 0, killed = 1; killed; calls++) {
            set_up();
            killed = discard(calls, all);
            mf_page_restart(&states, punch, NULL);
            for (uint64_t page = 0; page < PAGES; page++) {
                const uint8_t byte = mf_page_load(&states, page);
                const bool seen = mf_page_resolvable(before[page]) && !all;
                assert_true(killed || mf_page_state_of(byte) == MF_PAGE_DISCARDED);
                if (mf_page_state_of(byte) == MF_PAGE_DISCARDED && !seen)
                    assert_true(mf_is_zero(region.map + page * PAGE, PAGE));
            }
            assert_true(calls < 2 * PAGES);
        }
}

int main(void)
{
    region.fd = memfd_create("memferry-test", MFD_CLOEXEC);
    if (region.fd < 0 || ftruncate(region.fd, PAGES * PAGE) != 0)
        return 1;
    region.map = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, region.fd, 0);
    states.count = PAGES;
    states.state = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (region.map == MAP_FAILED || (void *)states.state == MAP_FAILED)
        return 1;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_a_killed_one_has_called_discarded_has_no_bytes),
    };
    return cmocka_run_group_tests_name("land", tests, NULL, NULL);
}
