/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib/histogram.h"

static unsigned bucket_of(uint64_t ns)
{
    if (ns < 16)
        return (unsigned)ns;
    unsigned log2 = 63u - (unsigned)__builtin_clzll(ns);
    unsigned bucket = (log2 - 2u) * 8u + (unsigned)((ns >> (log2 - 3u)) & 7u);
    return bucket < MF_HISTOGRAM_BUCKETS ? bucket : MF_HISTOGRAM_BUCKETS - 1;
}

/* The middle of a bucket's range. */
static uint64_t value_of(unsigned bucket)
{
    if (bucket < 16)
        return bucket;
    unsigned log2 = bucket / 8u + 2u;
    uint64_t step = UINT64_C(1) << (log2 - 3u);
    return (UINT64_C(1) << log2) + (bucket & 7u) * step + step / 2;
}

void mf_histogram_add(struct mf_histogram *h, uint64_t duration_ns)
{
    atomic_fetch_add_explicit(&h->bucket[bucket_of(duration_ns)], 1, memory_order_relaxed);
    atomic_fetch_add_explicit(&h->count, 1, memory_order_relaxed);
    uint64_t max = atomic_load_explicit(&h->max_ns, memory_order_relaxed);
    while (duration_ns > max &&
           !atomic_compare_exchange_weak_explicit(&h->max_ns, &max, duration_ns,
                                                  memory_order_relaxed, memory_order_relaxed))
        ;
}

void mf_histogram_read(const struct mf_histogram *h, struct mf_quantiles *out)
{
    uint64_t total = 0, seen = 0;
    uint64_t counts[MF_HISTOGRAM_BUCKETS];
    for (unsigned i = 0; i < MF_HISTOGRAM_BUCKETS; i++) {
        counts[i] = atomic_load_explicit(&h->bucket[i], memory_order_relaxed);
        total += counts[i];
    }
    *out = (struct mf_quantiles){.count = total,
                                 .max_ns = atomic_load_explicit(&h->max_ns, memory_order_relaxed)};
    for (unsigned i = 0; i < MF_HISTOGRAM_BUCKETS && total; i++) {
        if (!counts[i])
            continue;
        uint64_t before = seen;
        uint64_t value = value_of(i) < out->max_ns ? value_of(i) : out->max_ns;
        seen += counts[i];
        /* The q-quantile is the value with rank ceil(q * total). */
        uint64_t rank50 = (total + 1) / 2, rank99 = total - total / 100,
                 rank999 = total - total / 1000;
        if (before < rank50 && rank50 <= seen)
            out->p50_ns = value;
        if (before < rank99 && rank99 <= seen)
            out->p99_ns = value;
        if (before < rank999 && rank999 <= seen)
            out->p999_ns = value;
    }
}
