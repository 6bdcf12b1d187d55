/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib/page_state.h"

/* What a new link, or a new mover, still has to know. */
#define KEPT (MF_PAGE_COPY_MASK | MF_PAGE_STALE | MF_PAGE_REMOVED)

/* Eight states at a time where a run is long: a hole of terabytes must not take seconds. */
static _Atomic uint64_t *word_at(const struct mf_pages *pages, uint64_t page)
{
    return (_Atomic uint64_t *)(void *)&pages->state[page];
}

bool mf_page_claim(const struct mf_pages *pages, uint64_t page)
{
    uint8_t was = atomic_load_explicit(&pages->state[page], memory_order_relaxed);
    while (mf_page_state_of(was) == MF_PAGE_UNCONFIRMED) {
        uint8_t next = (uint8_t)((was & ~MF_PAGE_STATE_MASK) | MF_PAGE_LANDING);
        if (atomic_compare_exchange_weak_explicit(&pages->state[page], &was, next,
                                                  memory_order_acquire, memory_order_relaxed))
            return true;
    }
    return false;
}

static uint8_t finish_landing(const struct mf_pages *pages, uint64_t page, uint8_t next)
{
    uint8_t was = atomic_load_explicit(&pages->state[page], memory_order_relaxed);
    while (!(was & MF_PAGE_DISCARD)) {
        if (atomic_compare_exchange_weak_explicit(&pages->state[page], &was, next,
                                                  memory_order_acq_rel, memory_order_relaxed))
            break;
    }
    return was;
}

uint8_t mf_page_confirm(const struct mf_pages *pages, uint64_t page)
{
    return finish_landing(pages, page, MF_PAGE_CONFIRMED);
}

uint8_t mf_page_place(const struct mf_pages *pages, uint64_t page)
{
    return finish_landing(pages, page, MF_PAGE_CONFIRMED | MF_PAGE_PLACED);
}

uint8_t mf_page_unclaim(const struct mf_pages *pages, uint64_t page)
{
    uint8_t was = atomic_load_explicit(&pages->state[page], memory_order_relaxed);
    while (mf_page_state_of(was) == MF_PAGE_LANDING && !(was & MF_PAGE_DISCARD)) {
        uint8_t next = (uint8_t)((was & ~MF_PAGE_STATE_MASK) | MF_PAGE_UNCONFIRMED | MF_PAGE_TORN);
        if (atomic_compare_exchange_weak_explicit(&pages->state[page], &was, next,
                                                  memory_order_release, memory_order_relaxed))
            break;
    }
    return was;
}

uint8_t mf_page_land_unconfirmed(const struct mf_pages *pages, uint64_t page, bool landed)
{
    uint8_t was = atomic_load_explicit(&pages->state[page], memory_order_relaxed);
    while (!(was & MF_PAGE_DISCARD)) {
        uint8_t next = (uint8_t)((was & MF_PAGE_FAULTED) | (landed ? MF_PAGE_LANDED : 0) |
                                 MF_PAGE_UNCONFIRMED);
        if (atomic_compare_exchange_weak_explicit(&pages->state[page], &was, next,
                                                  memory_order_acq_rel, memory_order_relaxed))
            break;
    }
    return was;
}

uint64_t mf_page_mark_sent(const struct mf_pages *pages, uint64_t first, uint64_t count)
{
    const uint64_t copies = UINT64_C(0x0101010101010101) * MF_PAGE_COPY_MASK;
    const uint64_t sent = UINT64_C(0x0101010101010101) * MF_PAGE_SENT;
    uint64_t changed = 0, page = first, end = first + count;
    while (page < end) {
        if (page % 8 == 0 && end - page >= 8) {
            uint64_t unsent =
                atomic_load_explicit(word_at(pages, page), memory_order_relaxed) & copies;
            if (atomic_compare_exchange_strong_explicit(word_at(pages, page), &unsent,
                                                        unsent | sent, memory_order_relaxed,
                                                        memory_order_relaxed)) {
                changed += 8;
                page += 8;
                continue;
            }
        }
        uint8_t was = atomic_load_explicit(&pages->state[page], memory_order_relaxed);
        while (mf_page_state_of(was) == MF_PAGE_UNSENT) {
            if (atomic_compare_exchange_weak_explicit(&pages->state[page], &was,
                                                      (uint8_t)(was | MF_PAGE_SENT),
                                                      memory_order_relaxed, memory_order_relaxed)) {
                changed++;
                break;
            }
        }
        page++;
    }
    return changed;
}

void mf_page_set_copied(const struct mf_pages *pages, uint64_t page, uint8_t copied)
{
    uint8_t was = atomic_load_explicit(&pages->state[page], memory_order_relaxed), next;
    do
        next = (uint8_t)((was & ~MF_PAGE_COPY_MASK) | copied);
    while (!atomic_compare_exchange_weak_explicit(&pages->state[page], &was, next,
                                                  memory_order_relaxed, memory_order_relaxed));
}

void mf_page_mark(const struct mf_pages *pages, uint64_t first, uint64_t count, uint8_t bits)
{
    for (uint64_t page = first; page < first + count; page++)
        atomic_fetch_or_explicit(&pages->state[page], bits, memory_order_acq_rel);
}

void mf_page_unmark(const struct mf_pages *pages, uint64_t first, uint64_t count, uint8_t bits)
{
    for (uint64_t page = first; page < first + count; page++)
        if (atomic_load_explicit(&pages->state[page], memory_order_relaxed) & bits)
            atomic_fetch_and_explicit(&pages->state[page], (uint8_t)~bits, memory_order_acq_rel);
}

uint64_t mf_page_run_of(const struct mf_pages *pages, uint8_t mask, uint64_t first, uint64_t end,
                        uint8_t *bits)
{
    *bits = mf_page_load(pages, first) & mask;
    const uint64_t eight = UINT64_C(0x0101010101010101) * *bits;
    const uint64_t masks = UINT64_C(0x0101010101010101) * mask;
    uint64_t page = first + 1;
    while (page < end) {
        if (page % 8 == 0 && end - page >= 8 &&
            (atomic_load_explicit(word_at(pages, page), memory_order_acquire) & masks) == eight) {
            page += 8;
            continue;
        }
        if ((mf_page_load(pages, page) & mask) != *bits)
            break;
        page++;
    }
    return page - first;
}

uint8_t mf_page_discard(const struct mf_pages *pages, uint64_t page, bool all)
{
    uint8_t was = atomic_load_explicit(&pages->state[page], memory_order_relaxed), next;
    do {
        if (mf_page_state_of(was) == MF_PAGE_LANDING)
            next = (uint8_t)(was | MF_PAGE_DISCARD);
        else if (mf_page_discard_held(was, all))
            next = (uint8_t)((was & MF_PAGE_AWAITED) | MF_PAGE_LANDING | MF_PAGE_DISCARD);
        else
            next = MF_PAGE_DISCARDED;
    } while (!atomic_compare_exchange_weak_explicit(&pages->state[page], &was, next,
                                                    memory_order_acq_rel, memory_order_relaxed));
    return was;
}

uint8_t mf_page_discard_finish(const struct mf_pages *pages, uint64_t page)
{
    return atomic_exchange_explicit(&pages->state[page], MF_PAGE_DISCARDED, memory_order_acq_rel);
}

uint8_t mf_page_fault(const struct mf_pages *pages, uint64_t page)
{
    uint8_t was = atomic_load_explicit(&pages->state[page], memory_order_acquire);
    while (!mf_page_resolvable(was)) {
        if (atomic_compare_exchange_weak_explicit(&pages->state[page], &was,
                                                  (uint8_t)(was | MF_PAGE_FAULTED),
                                                  memory_order_acq_rel, memory_order_acquire))
            break;
    }
    return was;
}

uint8_t mf_page_unfault(const struct mf_pages *pages, uint64_t page)
{
    return atomic_fetch_and_explicit(&pages->state[page], (uint8_t)~MF_PAGE_FAULTED,
                                     memory_order_acq_rel);
}

bool mf_page_poison(const struct mf_pages *pages, uint64_t page)
{
    uint8_t was = atomic_load_explicit(&pages->state[page], memory_order_relaxed);
    while (mf_page_state_of(was) == MF_PAGE_UNCONFIRMED && (was & MF_PAGE_FAULTED)) {
        uint8_t next = (uint8_t)((was & ~MF_PAGE_FAULTED) | MF_PAGE_POISONED);
        if (atomic_compare_exchange_weak_explicit(&pages->state[page], &was, next,
                                                  memory_order_acq_rel, memory_order_relaxed))
            return true;
    }
    return false;
}

uint64_t mf_page_forget(const struct mf_pages *pages, uint64_t first, uint64_t count)
{
    uint64_t forgotten = 0;
    for (uint64_t page = first; page < first + count; page++)
        forgotten += mf_page_resolvable(
            atomic_fetch_and_explicit(&pages->state[page], MF_PAGE_AWAITED, memory_order_acq_rel));
    return forgotten;
}

uint64_t mf_page_confirm_empty(const struct mf_pages *pages, uint64_t first, uint64_t count,
                               void (*faulted)(void *arg, uint64_t page), void *arg)
{
    static const uint64_t eight_confirmed = UINT64_C(0x0101010101010101) * MF_PAGE_CONFIRMED;
    uint64_t changed = 0, page = first, end = first + count;
    while (page < end) {
        if (page % 8 == 0 && end - page >= 8) {
            /* Eight times UNCONFIRMED, nobody waiting, copied or landed before or not. */
            const uint64_t copies = UINT64_C(0x0101010101010101) * MF_PAGE_COPY_MASK;
            uint64_t untouched =
                atomic_load_explicit(word_at(pages, page), memory_order_relaxed) & copies;
            if (atomic_compare_exchange_strong_explicit(word_at(pages, page), &untouched,
                                                        eight_confirmed, memory_order_acq_rel,
                                                        memory_order_relaxed)) {
                changed += 8;
                page += 8;
                continue;
            }
        }
        uint8_t was = atomic_load_explicit(&pages->state[page], memory_order_relaxed);
        while (mf_page_state_of(was) == MF_PAGE_UNCONFIRMED) {
            if (atomic_compare_exchange_weak_explicit(&pages->state[page], &was, MF_PAGE_CONFIRMED,
                                                      memory_order_acq_rel, memory_order_relaxed)) {
                changed++;
                if ((was & MF_PAGE_AWAITED) && faulted)
                    faulted(arg, page);
                break;
            }
        }
        page++;
    }
    return changed;
}

uint64_t mf_page_restart(const struct mf_pages *pages, void (*punch)(void *arg, uint64_t page),
                         void *arg)
{
    uint64_t missing = 0;
    for (uint64_t page = 0; page < pages->count; page++) {
        uint8_t was = atomic_load_explicit(&pages->state[page], memory_order_relaxed);
        if (mf_page_resolvable(was))
            continue;
        if (was & MF_PAGE_DISCARD) {
            punch(arg, page);
            atomic_store_explicit(&pages->state[page], MF_PAGE_DISCARDED, memory_order_relaxed);
            continue;
        }
        missing++;
        /* What precopy rounds brought is still there, and still unconfirmed. Where something was
         * being landed over it the source does not call it a copy any more. */
        uint8_t next = (uint8_t)(MF_PAGE_UNCONFIRMED | (was & KEPT));
        if (mf_page_state_of(was) == MF_PAGE_LANDING && !(was & MF_PAGE_LANDED))
            next |= MF_PAGE_TORN;
        atomic_store_explicit(&pages->state[page], next, memory_order_relaxed);
    }
    return missing;
}

uint64_t mf_page_next_run(const struct mf_pages *pages, enum mf_page_state state, uint64_t *first)
{
    const uint64_t eight = UINT64_C(0x0101010101010101) * (uint64_t)state;
    const uint64_t mask = UINT64_C(0x0101010101010101) * MF_PAGE_STATE_MASK;
    uint64_t page = *first;
    while (page < pages->count && mf_page_state_of(mf_page_load(pages, page)) != state)
        page++;
    if (page >= pages->count)
        return 0;
    *first = page;
    while (page < pages->count) {
        if (page % 8 == 0 && pages->count - page >= 8 &&
            (atomic_load_explicit(word_at(pages, page), memory_order_acquire) & mask) == eight) {
            page += 8;
            continue;
        }
        if (mf_page_state_of(mf_page_load(pages, page)) != state)
            break;
        page++;
    }
    return page - *first;
}

void mf_page_fill(const struct mf_pages *pages, uint64_t first, uint64_t count,
                  enum mf_page_state state)
{
    for (uint64_t page = first; page < first + count; page++) {
        uint8_t was = atomic_load_explicit(&pages->state[page], memory_order_relaxed);
        atomic_store_explicit(&pages->state[page], (uint8_t)((was & KEPT) | state),
                              memory_order_relaxed);
    }
}
