/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib/layout.h"

#include <errno.h>

/*
 * The orders, without fences (which thread sanitizers don't follow): a field is stored with
 * release, so behind the store that made the sequence odd, and loaded with acquire, so before the
 * second look at it. Whoever loaded a new field therefore sees the odd number, or a later one, and
 * reads again.
 */
static uint64_t get(const _Atomic uint64_t *field)
{
    return atomic_load_explicit(field, memory_order_acquire);
}

static void put(_Atomic uint64_t *field, uint64_t value)
{
    atomic_store_explicit(field, value, memory_order_release);
}

static struct mf_mapping load_entry(const struct mf_layout_entry *entry)
{
    uint64_t both = get(&entry->region_context);
    return (struct mf_mapping){
        .start_addr = get(&entry->start_addr),
        .length_bytes = get(&entry->length_bytes),
        .offset_bytes = get(&entry->offset_bytes),
        .region = (uint32_t)(both >> 32),
        .context = (uint32_t)both,
    };
}

static void store_entry(struct mf_layout_entry *entry, const struct mf_mapping *mapping)
{
    put(&entry->start_addr, mapping->start_addr);
    put(&entry->length_bytes, mapping->length_bytes);
    put(&entry->offset_bytes, mapping->offset_bytes);
    put(&entry->region_context, (uint64_t)mapping->region << 32 | mapping->context);
}

static uint32_t read_begin(const struct mf_layout *layout)
{
    uint32_t sequence;
    while ((sequence = atomic_load_explicit(&layout->sequence, memory_order_acquire)) & 1u)
        ; /* a change is a few stores */
    return sequence;
}

static bool read_again(const struct mf_layout *layout, uint32_t sequence)
{
    return atomic_load_explicit(&layout->sequence, memory_order_relaxed) != sequence;
}

static void replace(struct mf_layout *layout, const struct mf_mapping *mappings, unsigned count)
{
    uint32_t sequence = atomic_load_explicit(&layout->sequence, memory_order_relaxed);
    atomic_store_explicit(&layout->sequence, sequence + 1, memory_order_relaxed);
    for (unsigned i = 0; i < count; i++)
        store_entry(&layout->entry[i], &mappings[i]);
    atomic_store_explicit(&layout->count, count, memory_order_release);
    atomic_store_explicit(&layout->sequence, sequence + 2, memory_order_release);
}

void mf_layout_set(struct mf_layout *layout, const struct mf_mapping *mappings, unsigned count)
{
    replace(layout, mappings, count);
}

bool mf_layout_find(const struct mf_layout *layout, uint32_t context, uint64_t addr,
                    struct mf_mapping *out)
{
    uint32_t sequence;
    bool found;
    do {
        sequence = read_begin(layout);
        found = false;
        uint32_t count = atomic_load_explicit(&layout->count, memory_order_acquire);
        for (uint32_t i = 0; i < count && i < MF_MAPPINGS_MAX && !found; i++) {
            struct mf_mapping m = load_entry(&layout->entry[i]);
            if (m.context == context && addr >= m.start_addr &&
                addr - m.start_addr < m.length_bytes) {
                *out = m;
                found = true;
            }
        }
    } while (read_again(layout, sequence));
    return found;
}

unsigned mf_layout_ranges(const struct mf_layout *layout, uint32_t region, uint64_t offset_bytes,
                          uint64_t length_bytes, struct mf_range *out, unsigned max)
{
    const uint64_t end_bytes = offset_bytes + length_bytes;
    uint32_t sequence;
    unsigned found;
    do {
        sequence = read_begin(layout);
        found = 0;
        uint32_t count = atomic_load_explicit(&layout->count, memory_order_acquire);
        for (uint32_t i = 0; i < count && i < MF_MAPPINGS_MAX; i++) {
            struct mf_mapping m = load_entry(&layout->entry[i]);
            uint64_t mapped_end = m.offset_bytes + m.length_bytes;
            if (m.region != region || m.offset_bytes >= end_bytes || mapped_end <= offset_bytes)
                continue;
            uint64_t from = offset_bytes > m.offset_bytes ? offset_bytes : m.offset_bytes;
            uint64_t to = end_bytes < mapped_end ? end_bytes : mapped_end;
            if (found < max)
                out[found] = (struct mf_range){.start_addr = m.start_addr + (from - m.offset_bytes),
                                               .length_bytes = to - from,
                                               .offset_bytes = from,
                                               .context = m.context};
            found++;
        }
    } while (read_again(layout, sequence));
    return found;
}

unsigned mf_layout_get(const struct mf_layout *layout, struct mf_mapping *out, unsigned max)
{
    uint32_t sequence;
    unsigned copied;
    do {
        sequence = read_begin(layout);
        copied = 0;
        uint32_t count = atomic_load_explicit(&layout->count, memory_order_acquire);
        for (uint32_t i = 0; i < count && i < MF_MAPPINGS_MAX && copied < max; i++)
            out[copied++] = load_entry(&layout->entry[i]);
    } while (read_again(layout, sequence));
    return copied;
}

int mf_layout_unmap(struct mf_layout *layout, uint32_t context, uint64_t start_addr,
                    uint64_t end_addr)
{
    struct mf_mapping next[MF_MAPPINGS_MAX];
    unsigned count = 0;
    uint32_t had = atomic_load_explicit(&layout->count, memory_order_relaxed);
    for (uint32_t i = 0; i < had; i++) {
        struct mf_mapping m = load_entry(&layout->entry[i]);
        uint64_t mapped_end = m.start_addr + m.length_bytes;
        if (m.context != context || mapped_end <= start_addr || m.start_addr >= end_addr) {
            if (count == MF_MAPPINGS_MAX)
                return -E2BIG;
            next[count++] = m;
            continue;
        }
        if (m.start_addr < start_addr) {
            struct mf_mapping head = m;
            head.length_bytes = start_addr - m.start_addr;
            if (count == MF_MAPPINGS_MAX)
                return -E2BIG;
            next[count++] = head;
        }
        if (mapped_end > end_addr) {
            struct mf_mapping tail = m;
            tail.offset_bytes += end_addr - m.start_addr;
            tail.start_addr = end_addr;
            tail.length_bytes = mapped_end - end_addr;
            if (count == MF_MAPPINGS_MAX)
                return -E2BIG;
            next[count++] = tail;
        }
    }
    replace(layout, next, count);
    return 0;
}

int mf_layout_remap(struct mf_layout *layout, uint32_t context, uint64_t from_addr,
                    uint64_t to_addr, uint64_t length_bytes)
{
    struct mf_mapping next[MF_MAPPINGS_MAX];
    uint32_t count = mf_layout_get(layout, next, MF_MAPPINGS_MAX), had = count;
    const uint64_t end_addr = from_addr + length_bytes;
    for (uint32_t i = 0; i < had; i++) {
        struct mf_mapping m = next[i];
        uint64_t mapped_end = m.start_addr + m.length_bytes;
        if (m.context != context || mapped_end <= from_addr || m.start_addr >= end_addr)
            continue;
        uint64_t start = m.start_addr > from_addr ? m.start_addr : from_addr;
        uint64_t end = mapped_end < end_addr ? mapped_end : end_addr;
        if (count == MF_MAPPINGS_MAX)
            return -E2BIG;
        next[count++] = (struct mf_mapping){.start_addr = to_addr + (start - from_addr),
                                            .length_bytes = end - start,
                                            .offset_bytes = m.offset_bytes + (start - m.start_addr),
                                            .region = m.region,
                                            .context = context};
    }
    replace(layout, next, count);
    return 0;
}

int mf_layout_zeros(struct mf_layout *layout, uint32_t context, uint32_t region,
                    uint64_t start_addr, uint64_t end_addr)
{
    struct mf_mapping had[MF_MAPPINGS_MAX], next[MF_MAPPINGS_MAX];
    uint32_t had_count = mf_layout_get(layout, had, MF_MAPPINGS_MAX), count = 0;
    for (uint32_t i = 0; i < had_count; i++) {
        struct mf_mapping m = had[i];
        const uint64_t mapped_end = m.start_addr + m.length_bytes;
        if (count + 3 > MF_MAPPINGS_MAX)
            return -E2BIG;
        if (m.context != context || m.region != region || mapped_end <= start_addr ||
            m.start_addr >= end_addr) {
            next[count++] = m;
            continue;
        }
        const uint64_t from = m.start_addr > start_addr ? m.start_addr : start_addr;
        const uint64_t to = mapped_end < end_addr ? mapped_end : end_addr;
        if (from > m.start_addr) {
            next[count] = m;
            next[count++].length_bytes = from - m.start_addr;
        }
        next[count++] = (struct mf_mapping){.start_addr = from,
                                            .length_bytes = to - from,
                                            .region = MF_REGION_ZEROS,
                                            .context = context};
        if (mapped_end > to) {
            next[count] = m;
            next[count].start_addr = to;
            next[count].offset_bytes += to - m.start_addr;
            next[count++].length_bytes = mapped_end - to;
        }
    }
    replace(layout, next, count);
    return 0;
}
