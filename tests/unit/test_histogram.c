/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* lib/histogram.c: quantiles against sorted data. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "lib/histogram.h"
#include "lib/util.h"

static uint64_t random_state;
static uint64_t next_random(void)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state;
}

static struct mf_histogram histogram;
static struct mf_quantiles quantiles;

static void start(void)
{
    memset((void *)&histogram, 0, sizeof(histogram));
}

static void read_it(void)
{
    mf_histogram_read(&histogram, &quantiles);
}

static void assert_near(uint64_t is, uint64_t should)
{
    uint64_t off = is > should ? is - should : should - is;
    if (off > should / 8)
        fail_msg("%llu is more than an eighth from %llu", (unsigned long long)is,
                 (unsigned long long)should);
}

static void is_empty_at_first(void **state)
{
    (void)state;
    start();
    read_it();
    assert_int_equal(quantiles.count, 0);
    assert_int_equal(quantiles.p50_ns, 0);
    assert_int_equal(quantiles.p999_ns, 0);
    assert_int_equal(quantiles.max_ns, 0);
}

static void one_value_is_every_quantile(void **state)
{
    (void)state;
    for (unsigned bit = 0; bit < 42; bit++)
        for (int off = -1; off <= 1; off++) {
            uint64_t value = (UINT64_C(1) << bit) + (uint64_t)(int64_t)off;
            if (value >= UINT64_C(1) << 42)
                continue;
            start();
            mf_histogram_add(&histogram, value);
            read_it();
            assert_int_equal(quantiles.count, 1);
            assert_int_equal(quantiles.max_ns, value);
            assert_near(quantiles.p50_ns, value);
            assert_near(quantiles.p99_ns, value);
            assert_near(quantiles.p999_ns, value);
            assert_true(quantiles.p999_ns <= value); /* never more than the largest */
        }
}

static void small_values_are_exact(void **state)
{
    (void)state;
    for (uint64_t value = 0; value < 16; value++) {
        start();
        mf_histogram_add(&histogram, value);
        mf_histogram_add(&histogram, 15);
        read_it();
        assert_int_equal(quantiles.p50_ns, value);
    }
}

static void takes_values_beyond_its_range(void **state)
{
    (void)state;
    start();
    mf_histogram_add(&histogram, UINT64_MAX);
    mf_histogram_add(&histogram, UINT64_C(1) << 42);
    mf_histogram_add(&histogram, 1000);
    read_it();
    assert_int_equal(quantiles.count, 3);
    assert_int_equal(quantiles.max_ns, UINT64_MAX);
    assert_true(quantiles.p50_ns >= UINT64_C(1) << 41);
}

static int compare(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

/* The value with rank ceil(q * count), q as a fraction. */
static uint64_t ranked(const uint64_t *sorted, uint64_t count, uint64_t part, uint64_t whole)
{
    return sorted[(count * part + whole - 1) / whole - 1];
}

static void agrees_with_sorted_data(void **state)
{
    (void)state;
    static uint64_t values[5000];
    for (unsigned round = 0; round < 300; round++) {
        /* As many values as may be few or many; from a few nanoseconds to minutes, or all alike. */
        uint64_t count = 1 + next_random() % (round % 2 ? 5000 : 12);
        unsigned shape = (unsigned)(next_random() % 4);
        start();
        for (uint64_t i = 0; i < count; i++) {
            uint64_t value = next_random() >> 24;
            if (shape == 0)
                value >>= next_random() % 40;
            else if (shape == 1)
                value = 40000 + value % 1000;
            else if (shape == 2)
                value = i % 100 ? 50000 : value;
            values[i] = value;
            mf_histogram_add(&histogram, value);
        }
        qsort(values, count, sizeof(values[0]), compare);
        read_it();
        assert_int_equal(quantiles.count, count);
        assert_int_equal(quantiles.max_ns, values[count - 1]);
        assert_near(quantiles.p50_ns, ranked(values, count, 1, 2));
        assert_near(quantiles.p99_ns, ranked(values, count, 99, 100));
        assert_near(quantiles.p999_ns, ranked(values, count, 999, 1000));
        assert_true(quantiles.p50_ns <= quantiles.p99_ns);
        assert_true(quantiles.p99_ns <= quantiles.p999_ns);
        assert_true(quantiles.p999_ns <= quantiles.max_ns);
    }
}

#define EACH 50000u

static void *add_many(void *arg)
{
    uint64_t base = (uint64_t)(uintptr_t)arg;
    for (uint64_t i = 0; i < EACH; i++)
        mf_histogram_add(&histogram, base + i);
    return NULL;
}

static void loses_nothing_among_threads(void **state)
{
    (void)state;
    pthread_t thread[3];
    start();
    for (unsigned i = 0; i < 3; i++)
        assert_int_equal(
            pthread_create(&thread[i], NULL, add_many, (void *)(uintptr_t)(i * 1000000u)), 0);
    do /* while they add: the figures are of some moment */
        read_it();
    while (quantiles.count < EACH);
    for (unsigned i = 0; i < 3; i++)
        pthread_join(thread[i], NULL);
    read_it();
    assert_int_equal(quantiles.count, 3 * EACH);
    assert_int_equal(quantiles.max_ns, 2000000 + EACH - 1);
    assert_near(quantiles.p50_ns, 1000000 + EACH / 2);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(is_empty_at_first),       cmocka_unit_test(one_value_is_every_quantile),
        cmocka_unit_test(small_values_are_exact),  cmocka_unit_test(takes_values_beyond_its_range),
        cmocka_unit_test(agrees_with_sorted_data), cmocka_unit_test(loses_nothing_among_threads),
    };
    const char *text = getenv("MF_SEED");
    random_state = (text ? strtoull(text, NULL, 0) : (uint64_t)time(NULL) << 20 ^ mf_now_ns()) | 1;
    print_message("MF_SEED=%#llx\n", (unsigned long long)random_state);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
