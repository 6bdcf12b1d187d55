/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * One small atomic state per page (design: "page state"), in a shared file, so that a mover's
 * successor finds what its predecessor had done. Lock-free: any thread may call any function here
 * for any page.
 *
 * Destination. Two views matter: may the page be resolved (CONFIRMED or DISCARDED), and who is
 * filling it (the one thread whose claim succeeded).
 *
 *     UNCONFIRMED --claim--> LANDING --confirm--> CONFIRMED
 *     UNCONFIRMED --confirm_empty--------------> CONFIRMED       (zeros: nothing to land)
 *     any other   --discard--------------------> DISCARDED       (reads as zeros for ever)
 *                                or: LANDING + DISCARD --discard_finish--> DISCARDED
 *     LANDING     --discard--> LANDING + DISCARD --discard_finish--> DISCARDED
 *     LANDING     --unclaim--------------------> UNCONFIRMED     (its connection was lost)
 *
 * A page that is discarded while somebody lands it must not be resolved before the lander is done:
 * the guest could write to it, and the late landing would overwrite that. So the discard is noted
 * in the flag DISCARD, and the lander punches the page out before it makes it DISCARDED (I9).
 * Whoever discards a page does the same where bytes lie that must not be seen any more: until they
 * are out the page is LANDING + DISCARD, so that a successor takes them out if this process dies.
 *
 * The other flag, FAULTED, says that somebody waits for this page and its fault is in the mover's
 * fault table. Whoever makes the page resolvable gets the byte as it was before, and so knows that
 * a waiter's clock has to be stopped.
 *
 * Source. The same bytes say UNSENT or SENT for this link; a new link starts from what the
 * destination says it misses (I7: what was sent on a lost connection counts as never sent).
 *
 * Orders: a state is stored with release after the bytes are in the page cache, and loaded with
 * acquire before the page is resolved (I1).
 */
#pragma once

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

enum mf_page_state {
    MF_PAGE_UNCONFIRMED = 0, /**< source: UNSENT */
    MF_PAGE_LANDING = 1,
    MF_PAGE_CONFIRMED = 2, /**< source: SENT */
    MF_PAGE_DISCARDED = 3,
};
#define MF_PAGE_STATE_MASK 0x03u
#define MF_PAGE_DISCARD 0x40u
#define MF_PAGE_FAULTED 0x80u
/** Destination: bytes of a precopy round lie in the RAM file under an UNCONFIRMED page. */
#define MF_PAGE_LANDED 0x20u
/** Destination, private memory, CONFIRMED: bytes were copied into the target. A page that is
 * CONFIRMED without is one of zeros that it has not touched. */
#define MF_PAGE_PLACED 0x20u
/** Destination, of libmemferry alone: the process was told that this page can't be had
 * (UFFDIO_POISON), where it is mapped. Nobody waits, and nobody will fault there; so whoever makes
 * the page resolvable resolves it, as for FAULTED. */
#define MF_PAGE_POISONED 0x08u
/** Whoever makes a page resolvable that has one of these must resolve it. */
#define MF_PAGE_AWAITED (MF_PAGE_FAULTED | MF_PAGE_POISONED)
/** Destination: a landing broke off in the middle; only bytes or zeros make this page right again.
 */
#define MF_PAGE_TORN 0x10u
/** Source: the destination holds what this page was when it was last protected; as bytes, or as
 * zeros. */
#define MF_PAGE_COPIED 0x20u
#define MF_PAGE_COPIED_ZERO 0x10u
#define MF_PAGE_COPY_MASK 0x30u
/** Source: written, maybe, through a mapping that is no more; so it counts as written. */
#define MF_PAGE_STALE 0x04u
/** Source: the target discarded it, or nothing came of that: worth a look whether it is a hole. */
#define MF_PAGE_REMOVED 0x08u

#define MF_PAGE_UNSENT MF_PAGE_UNCONFIRMED
#define MF_PAGE_SENT MF_PAGE_CONFIRMED

/** struct mf_pages - the states of one region. */
struct mf_pages {
    _Atomic uint8_t *state; /**< 8-byte aligned */
    uint64_t count;
};

static inline enum mf_page_state mf_page_state_of(uint8_t byte)
{
    return (enum mf_page_state)(byte & MF_PAGE_STATE_MASK);
}

/** mf_page_load() - the byte, with acquire. */
static inline uint8_t mf_page_load(const struct mf_pages *pages, uint64_t page)
{
    return atomic_load_explicit(&pages->state[page], memory_order_acquire);
}

/** mf_page_resolvable() - CONFIRMED or DISCARDED? */
static inline bool mf_page_resolvable(uint8_t byte)
{
    return mf_page_state_of(byte) >= MF_PAGE_CONFIRMED;
}

/** mf_page_claim() - UNCONFIRMED → LANDING. Return: did this caller win the page? */
bool mf_page_claim(const struct mf_pages *pages, uint64_t page);

/** mf_page_confirm() - LANDING → CONFIRMED by the claimer, clearing FAULTED.
 *  Return: the byte before. If it has DISCARD, nothing was changed: the claimer punches the page
 * out and calls mf_page_discard_finish (I9). */
uint8_t mf_page_confirm(const struct mf_pages *pages, uint64_t page);

/** mf_page_place() - as mf_page_confirm, for a page of private memory that was copied into the
 * target: CONFIRMED + PLACED. */
uint8_t mf_page_place(const struct mf_pages *pages, uint64_t page);

/** mf_page_unclaim() - LANDING → UNCONFIRMED + TORN by the claimer; FAULTED stays. Return: the byte
 * before; with DISCARD as for mf_page_confirm. */
uint8_t mf_page_unclaim(const struct mf_pages *pages, uint64_t page);

/** mf_page_land_unconfirmed() - LANDING → UNCONFIRMED by the claimer, after a precopy round's bytes
 * (or, with
 *  @landed false, zeros) came in; FAULTED stays. Return: the byte before; with DISCARD as for
 *  mf_page_confirm. */
uint8_t mf_page_land_unconfirmed(const struct mf_pages *pages, uint64_t page, bool landed);

/** mf_page_mark_sent() - source: UNSENT → SENT over a run; what the destination holds stays noted.
 *  Return: how many pages changed. */
uint64_t mf_page_mark_sent(const struct mf_pages *pages, uint64_t first, uint64_t count);

/** mf_page_set_copied() - source: note what the destination holds: MF_PAGE_COPIED,
 * MF_PAGE_COPIED_ZERO or 0. */
void mf_page_set_copied(const struct mf_pages *pages, uint64_t page, uint8_t copied);

/** mf_page_mark() - source: set @bits, MF_PAGE_STALE or MF_PAGE_REMOVED, over a run. With release.
 */
void mf_page_mark(const struct mf_pages *pages, uint64_t first, uint64_t count, uint8_t bits);

/** mf_page_unmark() - source: clear @bits over a run, which is copied anew from now on: what marks
 * it later stays. With acquire. */
void mf_page_unmark(const struct mf_pages *pages, uint64_t first, uint64_t count, uint8_t bits);

/** mf_page_run_of() - how many pages from @first on, below @end, have the same bits of @mask as the
 * first.
 *  @bits: those bits. */
uint64_t mf_page_run_of(const struct mf_pages *pages, uint8_t mask, uint64_t first, uint64_t end,
                        uint8_t *bits);

/** mf_page_discard() - any → DISCARDED, clearing FAULTED; LANDING stays, with DISCARD set.
 *  @all: whatever lies there is to be taken out, not only what nobody has seen.
 *  Return: the byte before: if LANDING, the lander will finish it; if mf_page_discard_held(), the
 *  caller takes out what lies there and calls mf_page_discard_finish(). */
uint8_t mf_page_discard(const struct mf_pages *pages, uint64_t page, bool all);

/** mf_page_discard_held() - is a page that was @was LANDING + DISCARD of the caller's now? */
static inline bool mf_page_discard_held(uint8_t was, bool all)
{
    return mf_page_state_of(was) != MF_PAGE_LANDING &&
           (all || (!mf_page_resolvable(was) && (was & (MF_PAGE_LANDED | MF_PAGE_TORN))));
}

/** mf_page_discard_finish() - LANDING + DISCARD → DISCARDED by the claimer. Return: the byte
 * before. */
uint8_t mf_page_discard_finish(const struct mf_pages *pages, uint64_t page);

/** mf_page_fault() - set FAULTED unless the page is resolvable. Return: the byte before. */
uint8_t mf_page_fault(const struct mf_pages *pages, uint64_t page);

/** mf_page_unfault() - clear FAULTED: whoever waits is made to fault again, or left for good.
 *  Return: the byte before. */
uint8_t mf_page_unfault(const struct mf_pages *pages, uint64_t page);

/** mf_page_poison() - UNCONFIRMED and FAULTED: POISONED instead of FAULTED. Return: was it? */
bool mf_page_poison(const struct mf_pages *pages, uint64_t page);

/** mf_page_forget() - UNCONFIRMED again, over a run, whatever it was; AWAITED stays. Nobody lands
 * these pages, and nobody has them mapped. Return: how many pages were resolvable. */
uint64_t mf_page_forget(const struct mf_pages *pages, uint64_t first, uint64_t count);

/**
 * mf_page_confirm_empty() - UNCONFIRMED → CONFIRMED over a run; pages in other states are left.
 * @faulted: called for each page that was AWAITED (that is cleared), or NULL.
 * Return: how many pages changed.
 */
uint64_t mf_page_confirm_empty(const struct mf_pages *pages, uint64_t first, uint64_t count,
                               void (*faulted)(void *arg, uint64_t page), void *arg);

/**
 * mf_page_restart() - after a crash, before any other thread exists: LANDING counts as UNCONFIRMED,
 * TORN if nothing lay there before; no FAULTED flag has an owner any more.
 * @punch: called for each page that is LANDING + DISCARD; it is DISCARDED then.
 * Return: how many pages are not resolvable.
 */
uint64_t mf_page_restart(const struct mf_pages *pages, void (*punch)(void *arg, uint64_t page),
                         void *arg);

/**
 * mf_page_next_run() - the next run of pages with @state from *@first on.
 * Return: its length in pages with *@first moved to its start, or 0 when there is none.
 */
uint64_t mf_page_next_run(const struct mf_pages *pages, enum mf_page_state state, uint64_t *first);

/** mf_page_fill() - set a run to @state whatever it was (source, between links, one thread). */
void mf_page_fill(const struct mf_pages *pages, uint64_t first, uint64_t count,
                  enum mf_page_state state);
