/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* daemon/mover/destination/fault_table.c: what is added is taken once, with its time; by many at a
 * time. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/mover/destination/destination.h"

static struct fault_table table;

static int clear(void **state)
{
    (void)state;
    memset((void *)&table, 0, sizeof(table));
    return 0;
}

static void takes_what_was_added(void **state)
{
    (void)state;
    assert_int_equal(fault_table_take(&table, 0, 0), 0);
    assert_true(fault_table_add(&table, 0, 0, 111));
    assert_true(fault_table_add(&table, 1, 0, 222)); /* the same page of another region */
    assert_true(fault_table_add(&table, MF_REGIONS_MAX - 1, (UINT64_C(1) << 48) - 2, 333));
    assert_int_equal(fault_table_take(&table, 0, 1), 0);
    assert_int_equal(fault_table_take(&table, 2, 0), 0);
    assert_int_equal(fault_table_take(&table, 1, 0), 222);
    assert_int_equal(fault_table_take(&table, 1, 0), 0); /* once */
    assert_int_equal(fault_table_take(&table, 0, 0), 111);
    assert_int_equal(fault_table_take(&table, MF_REGIONS_MAX - 1, (UINT64_C(1) << 48) - 2), 333);
    assert_int_equal(table.used, 0);
    assert_true(fault_table_add(&table, 0, 0, 444)); /* and again */
    assert_int_equal(fault_table_take(&table, 0, 0), 444);
}

struct seen {
    uint32_t count;
    bool page[FAULT_SLOTS + 1];
};

static void see(void *arg, uint32_t region, uint64_t page)
{
    struct seen *seen = arg;
    assert_int_equal(region, 5);
    assert_in_range(page, 0, FAULT_SLOTS);
    assert_false(seen->page[page]);
    seen->page[page] = true;
    seen->count++;
}

static void is_full_at_some_time(void **state)
{
    (void)state;
    static struct seen seen;
    for (uint64_t p = 0; p < FAULT_SLOTS; p++)
        assert_true(fault_table_add(&table, 5, p, p + 1));
    assert_int_equal(table.used, FAULT_SLOTS);
    assert_false(fault_table_add(&table, 5, FAULT_SLOTS, 1));
    assert_int_equal(fault_table_take(&table, 5, FAULT_SLOTS), 0);
    fault_table_each(&table, see, &seen);
    assert_int_equal(seen.count, FAULT_SLOTS);
    /* One goes, another fits, wherever its slot would be. */
    assert_int_equal(fault_table_take(&table, 5, 4711), 4712);
    assert_true(fault_table_add(&table, 5, FAULT_SLOTS, 99));
    assert_false(fault_table_add(&table, 5, 4711, 1));
    for (uint64_t p = 0; p <= FAULT_SLOTS; p++)
        assert_int_equal(fault_table_take(&table, 5, p), p == 4711          ? 0
                                                         : p == FAULT_SLOTS ? 99
                                                                            : p + 1);
    assert_int_equal(table.used, 0);
    memset(&seen, 0, sizeof(seen));
    fault_table_each(&table, see, &seen);
    assert_int_equal(seen.count, 0);
}

/*
 * As in the mover: one thread adds, then sets FAULTED (here: publishes the page's number); whoever
 * wins the page takes it, which is one of several. Pages come again after they were taken.
 */
#define PAGES 300u
#define TAKERS 3u
#define ADDS 60000u
#define BEING_TAKEN UINT64_MAX

static _Atomic uint64_t faulted[PAGES]; /* 0, or the time that the entry must have */
static _Atomic uint64_t taken;
static _Atomic bool over;

static void require(bool condition)
{
    if (!condition)
        abort(); /* cmocka's assertions are for the main thread only */
}

static void *take_faults(void *arg)
{
    uint64_t at = (uint64_t)(uintptr_t)arg;
    for (bool last = false; !last;) {
        last = atomic_load(&over); /* one round more after the end */
        for (unsigned i = 0; i < PAGES; i++, at++) {
            uint64_t page = at * 7 % PAGES;
            uint64_t since = atomic_load(&faulted[page]);
            if (since == 0 || since == BEING_TAKEN ||
                !atomic_compare_exchange_strong(&faulted[page], &since, BEING_TAKEN))
                continue;
            require(fault_table_take(&table, (uint32_t)(page % 3), page) == since);
            atomic_store(&faulted[page], 0);
            atomic_fetch_add(&taken, 1);
        }
    }
    return NULL;
}

static void ignore(void *arg, uint32_t region, uint64_t page)
{
    (void)arg;
    require(region == page % 3 && page < PAGES);
}

static void loses_nothing_among_threads(void **state)
{
    (void)state;
    pthread_t thread[TAKERS];
    for (unsigned i = 0; i < TAKERS; i++)
        assert_int_equal(
            pthread_create(&thread[i], NULL, take_faults, (void *)(uintptr_t)(i * 100u)), 0);
    uint64_t added = 0;
    for (uint64_t i = 1; i <= ADDS; i++) {
        uint64_t page = i * 31 % PAGES;
        if (atomic_load(&faulted[page]) != 0)
            continue; /* waited for already */
        require(fault_table_add(&table, (uint32_t)(page % 3), page, i));
        atomic_store(&faulted[page], i);
        added++;
        if (i % 512 == 0)
            fault_table_each(&table, ignore, NULL);
    }
    atomic_store(&over, true);
    for (unsigned i = 0; i < TAKERS; i++)
        pthread_join(thread[i], NULL);
    assert_int_equal(taken, added);
    assert_int_equal(table.used, 0);
    for (unsigned i = 0; i < FAULT_SLOTS; i++)
        assert_int_equal(table.slot[i].key, 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup(takes_what_was_added, clear),
        cmocka_unit_test_setup(is_full_at_some_time, clear),
        cmocka_unit_test_setup(loses_nothing_among_threads, clear),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
