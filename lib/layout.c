/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib/layout.h"

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

static void write_begin(struct mf_layout *layout)
{
    uint32_t sequence = atomic_load_explicit(&layout->sequence, memory_order_relaxed);
    atomic_store_explicit(&layout->sequence, sequence + 1, memory_order_relaxed);
}

static void write_end(struct mf_layout *layout)
{
    uint32_t sequence = atomic_load_explicit(&layout->sequence, memory_order_relaxed);
    atomic_store_explicit(&layout->sequence, sequence + 1, memory_order_release);
}

static uint32_t count_of(const struct mf_layout *layout)
{
    return atomic_load_explicit(&layout->count, memory_order_relaxed);
}

static void set_count(struct mf_layout *layout, uint32_t count)
{
    atomic_store_explicit(&layout->count, count, memory_order_release);
}

void mf_layout_set(struct mf_layout *layout, const struct mf_mapping *mappings, unsigned count)
{
    write_begin(layout);
    for (unsigned i = 0; i < count && i < MF_LAYOUT_MAX; i++)
        store_entry(&layout->entry[i], &mappings[i]);
    set_count(layout, count < MF_LAYOUT_MAX ? count : MF_LAYOUT_MAX);
    write_end(layout);
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
        for (uint32_t i = 0; i < count && i < MF_LAYOUT_MAX && !found; i++) {
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

bool mf_layout_from(const struct mf_layout *layout, uint32_t context, uint64_t addr,
                    struct mf_mapping *out)
{
    uint32_t sequence;
    bool found;
    do {
        sequence = read_begin(layout);
        found = false;
        uint32_t count = atomic_load_explicit(&layout->count, memory_order_acquire);
        for (uint32_t i = 0; i < count && i < MF_LAYOUT_MAX; i++) {
            struct mf_mapping m = load_entry(&layout->entry[i]);
            if (m.context == context && addr < m.start_addr + m.length_bytes &&
                (!found || m.start_addr < out->start_addr)) {
                *out = m;
                found = true;
            }
        }
    } while (read_again(layout, sequence));
    return found;
}

/* The part of [@offset_bytes, @end_bytes) that @m maps, if any. */
static bool part_of(const struct mf_mapping *m, uint32_t region, uint64_t offset_bytes,
                    uint64_t end_bytes, struct mf_range *out)
{
    const uint64_t mapped_end = m->offset_bytes + m->length_bytes;
    if (m->region != region || m->offset_bytes >= end_bytes || mapped_end <= offset_bytes)
        return false;
    const uint64_t from = offset_bytes > m->offset_bytes ? offset_bytes : m->offset_bytes;
    const uint64_t to = end_bytes < mapped_end ? end_bytes : mapped_end;
    *out = (struct mf_range){.start_addr = m->start_addr + (from - m->offset_bytes),
                             .length_bytes = to - from,
                             .offset_bytes = from,
                             .context = m->context};
    return true;
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
        for (uint32_t i = 0; i < count && i < MF_LAYOUT_MAX; i++) {
            struct mf_range range;
            struct mf_mapping m = load_entry(&layout->entry[i]);
            if (!part_of(&m, region, offset_bytes, end_bytes, &range))
                continue;
            if (found < max)
                out[found] = range;
            found++;
        }
    } while (read_again(layout, sequence));
    return found;
}

bool mf_layout_next(const struct mf_layout *layout, uint32_t region, uint64_t offset_bytes,
                    uint64_t length_bytes, uint32_t *cursor, struct mf_range *out)
{
    const uint32_t count = atomic_load_explicit(&layout->count, memory_order_acquire);
    while (*cursor < count) {
        struct mf_mapping m = load_entry(&layout->entry[(*cursor)++]);
        if (part_of(&m, region, offset_bytes, offset_bytes + length_bytes, out))
            return true;
    }
    return false;
}

unsigned mf_layout_get(const struct mf_layout *layout, struct mf_mapping *out, unsigned max)
{
    uint32_t sequence;
    unsigned copied;
    do {
        sequence = read_begin(layout);
        copied = 0;
        uint32_t count = atomic_load_explicit(&layout->count, memory_order_acquire);
        for (uint32_t i = 0; i < count && i < MF_LAYOUT_MAX && copied < max; i++)
            out[copied++] = load_entry(&layout->entry[i]);
    } while (read_again(layout, sequence));
    return copied;
}

bool mf_layout_covers(const struct mf_layout *layout, uint32_t context, uint64_t start_addr,
                      uint64_t end_addr)
{
    struct mf_mapping m;
    while (start_addr < end_addr && mf_layout_find(layout, context, start_addr, &m))
        start_addr = m.start_addr + m.length_bytes;
    return start_addr >= end_addr;
}

static void leave_out(struct mf_layout *layout, const struct mf_mapping *m,
                      struct mf_range *dropped)
{
    layout->overflowed = true;
    layout->lost |= mf_layout_keeps(layout, m);
    *dropped = (struct mf_range){.start_addr = m->start_addr,
                                 .length_bytes = m->length_bytes,
                                 .offset_bytes = m->offset_bytes,
                                 .context = m->context};
}

static void remove_entry(struct mf_layout *layout, uint32_t i)
{
    const uint32_t last = count_of(layout) - 1;
    if (i != last) {
        struct mf_mapping m = load_entry(&layout->entry[last]);
        store_entry(&layout->entry[i], &m);
    }
    set_count(layout, last);
}

/* Within a change. */
static unsigned cut(struct mf_layout *layout, uint32_t context, uint64_t start_addr,
                    uint64_t end_addr, struct mf_range *dropped)
{
    unsigned dropped_count = 0;
    for (uint32_t i = 0; i < count_of(layout);) {
        struct mf_mapping m = load_entry(&layout->entry[i]);
        const uint64_t mapped_end = m.start_addr + m.length_bytes;
        if (m.context != context || mapped_end <= start_addr || m.start_addr >= end_addr) {
            i++;
            continue;
        }
        struct mf_mapping head = m, tail = m;
        head.length_bytes = m.start_addr < start_addr ? start_addr - m.start_addr : 0;
        tail.length_bytes = mapped_end > end_addr ? mapped_end - end_addr : 0;
        tail.start_addr = mapped_end - tail.length_bytes;
        tail.offset_bytes += m.length_bytes - tail.length_bytes;
        if (!head.length_bytes && !tail.length_bytes) {
            remove_entry(layout, i);
            continue;
        }
        store_entry(&layout->entry[i], head.length_bytes ? &head : &tail);
        i++;
        if (!head.length_bytes || !tail.length_bytes)
            continue;
        /* Mappings of one process don't overlap: at most one is cut in two. */
        const uint32_t count = count_of(layout);
        if (count < MF_LAYOUT_MAX) {
            store_entry(&layout->entry[count], &tail);
            set_count(layout, count + 1);
        } else if (dropped_count == 0) {
            leave_out(layout, &tail, &dropped[dropped_count++]);
        }
    }
    return dropped_count;
}

unsigned mf_layout_unmap(struct mf_layout *layout, uint32_t context, uint64_t start_addr,
                         uint64_t end_addr, struct mf_range *dropped)
{
    write_begin(layout);
    unsigned count = cut(layout, context, start_addr, end_addr, dropped);
    write_end(layout);
    return count;
}

/* Does @b begin where @a ends, in memory and in the region? */
static bool continues(const struct mf_mapping *a, const struct mf_mapping *b)
{
    return a->context == b->context && a->region == b->region &&
           a->start_addr + a->length_bytes == b->start_addr &&
           a->offset_bytes + a->length_bytes == b->offset_bytes;
}

/* What is left out for @whole: the next one that can be learned again, or, if there is none, @whole
 * itself. Return: where it goes, MF_LAYOUT_MAX: nowhere. */
static uint32_t make_room(struct mf_layout *layout, const struct mf_mapping *whole,
                          struct mf_range *dropped)
{
    struct mf_mapping gone = *whole;
    uint32_t at = MF_LAYOUT_MAX;
    for (uint32_t i = 0; at == MF_LAYOUT_MAX && i < MF_LAYOUT_MAX; i++) {
        const uint32_t next = layout->hand++ % MF_LAYOUT_MAX;
        struct mf_mapping m = load_entry(&layout->entry[next]);
        if (!mf_layout_keeps(layout, &m)) {
            gone = m;
            at = next;
        }
    }
    leave_out(layout, &gone, dropped);
    return at;
}

unsigned mf_layout_learn(struct mf_layout *layout, const struct mf_mapping *mapping,
                         struct mf_range *dropped)
{
    struct mf_mapping whole = *mapping;
    write_begin(layout);
    unsigned dropped_count = cut(layout, whole.context, whole.start_addr,
                                 whole.start_addr + whole.length_bytes, dropped);
    for (uint32_t i = 0; i < count_of(layout);) {
        struct mf_mapping m = load_entry(&layout->entry[i]);
        if (continues(&m, &whole)) {
            whole.start_addr = m.start_addr;
            whole.offset_bytes = m.offset_bytes;
        } else if (!continues(&whole, &m)) {
            i++;
            continue;
        }
        whole.length_bytes += m.length_bytes;
        remove_entry(layout, i);
        i = 0;
    }
    uint32_t at = count_of(layout);
    if (at == MF_LAYOUT_MAX) {
        at = make_room(layout, &whole, &dropped[dropped_count++]);
    } else {
        set_count(layout, at + 1);
    }
    if (at < MF_LAYOUT_MAX)
        store_entry(&layout->entry[at], &whole);
    write_end(layout);
    return dropped_count;
}

void mf_layout_forget(struct mf_layout *layout, uint32_t context)
{
    write_begin(layout);
    for (uint32_t i = 0; i < count_of(layout);) {
        struct mf_mapping m = load_entry(&layout->entry[i]);
        if (m.context == context)
            remove_entry(layout, i);
        else
            i++;
    }
    write_end(layout);
}
