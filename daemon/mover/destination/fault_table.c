/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/mover/destination/destination.h"

static uint64_t key_of(uint32_t region, uint64_t page)
{
    return ((uint64_t)region << 48 | page) + 1;
}

static uint32_t slot_of(uint64_t key)
{
    return (uint32_t)((key * UINT64_C(0x9e3779b97f4a7c15)) >> 40) % FAULT_SLOTS;
}

bool fault_table_add(struct fault_table *table, uint32_t region, uint64_t page, uint64_t since_ns)
{
    const uint64_t key = key_of(region, page);
    for (uint32_t i = 0, at = slot_of(key); i < FAULT_SLOTS; i++, at = (at + 1) % FAULT_SLOTS) {
        struct fault_slot *slot = &table->slot[at];
        if (atomic_load_explicit(&slot->key, memory_order_acquire) != 0)
            continue;
        slot->since_ns = since_ns;
        atomic_store_explicit(&slot->key, key, memory_order_release);
        atomic_fetch_add_explicit(&table->used, 1, memory_order_relaxed);
        return true;
    }
    return false;
}

/* A free slot does not end the search, for others free slots at any time. It is short nevertheless:
 * FAULTED says that the entry is there, and it is near its slot. */
uint64_t fault_table_take(struct fault_table *table, uint32_t region, uint64_t page)
{
    const uint64_t key = key_of(region, page);
    for (uint32_t i = 0, at = slot_of(key); i < FAULT_SLOTS; i++, at = (at + 1) % FAULT_SLOTS) {
        struct fault_slot *slot = &table->slot[at];
        if (atomic_load_explicit(&slot->key, memory_order_acquire) != key)
            continue;
        uint64_t since_ns = slot->since_ns;
        uint64_t expected = key;
        if (!atomic_compare_exchange_strong_explicit(&slot->key, &expected, 0, memory_order_acq_rel,
                                                     memory_order_relaxed))
            continue;
        atomic_fetch_sub_explicit(&table->used, 1, memory_order_relaxed);
        return since_ns;
    }
    return 0;
}

void fault_table_each(struct fault_table *table,
                      void (*each)(void *arg, uint32_t region, uint64_t page), void *arg)
{
    if (atomic_load_explicit(&table->used, memory_order_relaxed) == 0)
        return;
    for (uint32_t at = 0; at < FAULT_SLOTS; at++) {
        uint64_t key = atomic_load_explicit(&table->slot[at].key, memory_order_acquire);
        if (key != 0)
            each(arg, (uint32_t)((key - 1) >> 48), (key - 1) & ((UINT64_C(1) << 48) - 1));
    }
}
