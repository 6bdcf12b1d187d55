/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A histogram of durations with fixed buckets: eight to each power of two, so a quantile is off by
 * at most 1/8. It is plain memory of atomics, fit for a shared file; any thread may add, none
 * allocates.
 */
#pragma once

#include <stdatomic.h>
#include <stdint.h>

#define MF_HISTOGRAM_BUCKETS 320u /**< up to 2^42 ns, over an hour */

struct mf_histogram {
    _Atomic uint64_t count, max_ns;
    _Atomic uint64_t bucket[MF_HISTOGRAM_BUCKETS];
};

/** struct mf_quantiles - what is reported, in nanoseconds. */
struct mf_quantiles {
    uint64_t count, p50_ns, p99_ns, p999_ns, max_ns;
};

void mf_histogram_add(struct mf_histogram *histogram, uint64_t duration_ns);
/** mf_histogram_read() - safe while others add: the figures are then of some moment. */
void mf_histogram_read(const struct mf_histogram *histogram, struct mf_quantiles *out);
