/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* lib/page_state.c: each transition from each byte, runs against a naive model, threads against
 * each other. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "lib/page_state.h"
#include "lib/util.h"

#define PAGES 200u

static _Alignas(8) _Atomic uint8_t bytes[PAGES];
static const struct mf_pages pages = {.state = bytes, .count = PAGES};

/* A small generator of our own, so that a seed means the same run everywhere. */
static uint64_t random_state;
static uint64_t next_random(uint64_t *seed)
{
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    return *seed;
}

static uint32_t below(uint32_t limit)
{
    return (uint32_t)(next_random(&random_state) % limit);
}

/* The seed is printed, and taken from MF_SEED to repeat a run. */
static void seed_random(void)
{
    const char *text = getenv("MF_SEED");
    random_state = text ? strtoull(text, NULL, 0) : (uint64_t)time(NULL) << 20 ^ mf_now_ns();
    random_state |= 1;
    print_message("MF_SEED=%#llx\n", (unsigned long long)random_state);
}

static uint8_t one(uint8_t before)
{
    bytes[7] = before;
    return before;
}

#define U MF_PAGE_UNCONFIRMED
#define L MF_PAGE_LANDING
#define C MF_PAGE_CONFIRMED
#define D MF_PAGE_DISCARDED
#define FAULT MF_PAGE_FAULTED
#define GONE MF_PAGE_DISCARD
#define LANDED MF_PAGE_LANDED
#define ZERO MF_PAGE_COPIED_ZERO
#define COPY MF_PAGE_COPY_MASK

/* All bytes that a page can have. */
static const uint8_t possible[] = {U,
                                   U | FAULT,
                                   U | LANDED,
                                   U | LANDED | FAULT,
                                   U | ZERO,
                                   L,
                                   L | FAULT,
                                   L | LANDED,
                                   L | LANDED | FAULT,
                                   L | GONE,
                                   L | GONE | FAULT,
                                   L | LANDED | GONE,
                                   C,
                                   C | LANDED,
                                   C | ZERO,
                                   D};
#define EACH_BYTE(b)                                                                               \
    for (size_t i_ = 0; i_ < sizeof(possible); i_++)                                               \
        for (uint8_t b = one(possible[i_]), once_ = 1; once_; once_ = 0)

static void claims_what_nobody_fills(void **state)
{
    (void)state;
    EACH_BYTE(was)
    {
        bool won = mf_page_claim(&pages, 7);
        assert_int_equal(won, mf_page_state_of(was) == U);
        assert_int_equal(bytes[7], won ? (L | (was & (FAULT | COPY))) : was);
    }
}

static void confirms_what_was_claimed(void **state)
{
    (void)state;
    one(L);
    assert_int_equal(mf_page_confirm(&pages, 7), L);
    assert_int_equal(bytes[7], C);
    one(L | FAULT); /* whoever waits is told of exactly once */
    assert_int_equal(mf_page_confirm(&pages, 7), L | FAULT);
    assert_int_equal(bytes[7], C);
    one(L | GONE | FAULT);
    assert_int_equal(mf_page_confirm(&pages, 7), L | GONE | FAULT);
    assert_int_equal(bytes[7], L | GONE | FAULT); /* unchanged: punch first */
    assert_int_equal(mf_page_discard_finish(&pages, 7), L | GONE | FAULT);
    assert_int_equal(bytes[7], D);
}

static void gives_a_claim_back(void **state)
{
    (void)state;
    EACH_BYTE(was)
    {
        assert_int_equal(mf_page_unclaim(&pages, 7), was);
        if (mf_page_state_of(was) == L && !(was & GONE))
            assert_int_equal(bytes[7], U | MF_PAGE_TORN | (was & (FAULT | COPY)));
        else
            assert_int_equal(bytes[7], was);
    }
}

/* A precopy round's bytes, or zeros: nobody may have the page yet, and whoever waits still waits.
 */
static void lands_unconfirmed(void **state)
{
    (void)state;
    static const uint8_t claimed[] = {L, L | LANDED, L | FAULT, L | LANDED | FAULT};
    for (size_t i = 0; i < sizeof(claimed); i++)
        for (unsigned landed = 0; landed < 2; landed++) {
            one(claimed[i]);
            assert_int_equal(mf_page_land_unconfirmed(&pages, 7, landed), claimed[i]);
            assert_int_equal(bytes[7], U | (claimed[i] & FAULT) | (landed ? LANDED : 0));
            assert_false(mf_page_resolvable(bytes[7]));
            assert_true(mf_page_claim(&pages, 7)); /* the next round, or the answer */
        }
    one(L | LANDED | GONE | FAULT);
    assert_int_equal(mf_page_land_unconfirmed(&pages, 7, true), L | LANDED | GONE | FAULT);
    assert_int_equal(bytes[7], L | LANDED | GONE | FAULT); /* unchanged: punch first */
    assert_int_equal(mf_page_discard_finish(&pages, 7), L | LANDED | GONE | FAULT);
    assert_int_equal(bytes[7], D);
    one(L | LANDED);
    assert_int_equal(mf_page_confirm(&pages, 7), L | LANDED);
    assert_int_equal(bytes[7], C);
}

static void notes_what_was_copied(void **state)
{
    (void)state;
    static const uint8_t kinds[] = {MF_PAGE_COPIED, MF_PAGE_COPIED_ZERO, 0};
    for (size_t k = 0; k < sizeof(kinds); k++)
        EACH_BYTE(was)
        {
            mf_page_set_copied(&pages, 7, kinds[k]);
            assert_int_equal(bytes[7], (was & ~COPY) | kinds[k]);
        }
}

static void discards_for_ever(void **state)
{
    (void)state;
    EACH_BYTE(was)
    {
        for (unsigned all = 0; all < 2; all++) {
            bytes[7] = was;
            assert_int_equal(mf_page_discard(&pages, 7, all), was);
            if (!mf_page_discard_held(was, all))
                continue;
            /* What lies there is not to be seen, by a successor neither. */
            assert_true(mf_page_state_of(was) != L);
            assert_int_equal(bytes[7], L | GONE | (was & MF_PAGE_AWAITED));
            assert_false(mf_page_claim(&pages, 7));
            assert_int_equal(mf_page_confirm_empty(&pages, 7, 1, NULL, NULL), 0);
            assert_int_equal(mf_page_discard_finish(&pages, 7), L | GONE | (was & MF_PAGE_AWAITED));
            assert_int_equal(bytes[7], D);
        }
        one(was);
        mf_page_discard(&pages, 7, false);
        if (mf_page_discard_held(was, false))
            continue;
        if (mf_page_state_of(was) != L) {
            assert_int_equal(bytes[7], D);
            assert_false(mf_page_claim(&pages, 7));
            assert_int_equal(mf_page_confirm_empty(&pages, 7, 1, NULL, NULL), 0);
            assert_int_equal(mf_page_fault(&pages, 7), D);
            assert_int_equal(mf_page_unclaim(&pages, 7), D);
            assert_int_equal(bytes[7], D);
            continue;
        }
        /* Not resolvable while somebody writes to it; then whoever waits is told of. */
        assert_int_equal(bytes[7], was | GONE);
        assert_false(mf_page_resolvable(mf_page_load(&pages, 7)));
        assert_int_equal(mf_page_fault(&pages, 7), was | GONE);
        assert_false(mf_page_claim(&pages, 7));
        assert_true(mf_page_unclaim(&pages, 7) & GONE);
        assert_true(mf_page_confirm(&pages, 7) & GONE);
        assert_int_equal(mf_page_discard_finish(&pages, 7), was | GONE | FAULT);
        assert_int_equal(bytes[7], D);
    }
}

static void notes_who_waits(void **state)
{
    (void)state;
    EACH_BYTE(was)
    {
        assert_int_equal(mf_page_fault(&pages, 7), was);
        assert_int_equal(bytes[7], mf_page_resolvable(was) ? was : (was | FAULT));
    }
}

struct list {
    uint64_t page[PAGES];
    unsigned count;
};

static void note(void *arg, uint64_t page)
{
    struct list *list = arg;
    assert_true(list->count < PAGES);
    list->page[list->count++] = page;
}

/* Long runs of few states, as they are in life, so that the paths by eight are taken. */
static void scramble(uint8_t model[PAGES])
{
    for (uint32_t at = 0; at < PAGES;) {
        uint32_t run = 1 + below(below(2) ? 40 : 4);
        uint8_t byte = possible[below(sizeof(possible))];
        for (; run > 0 && at < PAGES; run--, at++)
            bytes[at] = model[at] = byte;
    }
}

static void forgets_who_waits_or_all_but_that(void **state)
{
    (void)state;
    EACH_BYTE(was)
    {
        assert_int_equal(mf_page_unfault(&pages, 7), was);
        assert_int_equal(bytes[7], was & ~FAULT);
    }
    EACH_BYTE(was)
    {
        assert_int_equal(mf_page_forget(&pages, 7, 1), mf_page_resolvable(was));
        assert_int_equal(bytes[7], was & FAULT);
    }
}

static void count_call(void *arg, uint64_t page)
{
    (void)page;
    ++*(int *)arg;
}

static void remembers_who_was_told_that_it_can_not_be_had(void **state)
{
    (void)state;
    EACH_BYTE(was)
    {
        const bool could = mf_page_state_of(was) == U && (was & FAULT);
        assert_int_equal(mf_page_poison(&pages, 7), could);
        assert_int_equal(bytes[7], could ? (was & ~FAULT) | MF_PAGE_POISONED : was);
    }
    int calls = 0;
    bytes[7] = MF_PAGE_POISONED;
    assert_int_equal(mf_page_forget(&pages, 7, 1), 0);
    assert_true(mf_page_claim(&pages, 7));
    mf_page_unclaim(&pages, 7);
    assert_int_equal(bytes[7], U | MF_PAGE_TORN | MF_PAGE_POISONED);
    assert_int_equal(mf_page_confirm_empty(&pages, 0, PAGES, count_call, &calls), PAGES);
    assert_int_equal(calls, 1);
    assert_int_equal(bytes[7], C);
}

static void confirms_empty_runs_like_the_model(void **state)
{
    (void)state;
    for (unsigned round = 0; round < 20000; round++) {
        uint8_t model[PAGES];
        struct list told = {.count = 0}, expected = {.count = 0};
        scramble(model);
        uint64_t first = below(PAGES), count = below((uint32_t)(PAGES - first) + 1), changed = 0;
        for (uint64_t p = first; p < first + count; p++) {
            if (mf_page_state_of(model[p]) != U)
                continue;
            if (model[p] & FAULT)
                note(&expected, p);
            model[p] = C;
            changed++;
        }
        bool deaf = below(8) == 0;
        assert_int_equal(mf_page_confirm_empty(&pages, first, count, deaf ? NULL : note, &told),
                         changed);
        assert_memory_equal((const void *)bytes, model, PAGES);
        if (!deaf) {
            assert_int_equal(told.count, expected.count);
            assert_memory_equal(told.page, expected.page, told.count * sizeof(told.page[0]));
        }
    }
}

static void marks_sent_like_the_model(void **state)
{
    (void)state;
    for (unsigned round = 0; round < 20000; round++) {
        uint8_t model[PAGES];
        uint64_t changed = 0;
        scramble(model);
        /* The source's bytes: nobody lands or waits there. */
        for (uint64_t p = 0; p < PAGES; p++)
            bytes[p] = model[p] &= (uint8_t)(COPY | C);
        const uint64_t first = below(PAGES), count = below((uint32_t)(PAGES - first) + 1);
        for (uint64_t p = first; p < first + count; p++) {
            changed += mf_page_state_of(model[p]) == MF_PAGE_UNSENT;
            model[p] |= MF_PAGE_SENT;
        }
        assert_int_equal(mf_page_mark_sent(&pages, first, count), changed);
        assert_memory_equal((const void *)bytes, model, PAGES);
    }
}

static void finds_runs_of_bits_like_the_model(void **state)
{
    (void)state;
    static const uint8_t masks[] = {MF_PAGE_LANDED, MF_PAGE_COPIED_ZERO, COPY, MF_PAGE_STATE_MASK,
                                    FAULT | COPY};
    for (unsigned round = 0; round < 20000; round++) {
        uint8_t model[PAGES], bits = 0xff;
        scramble(model);
        const uint8_t mask = masks[below(sizeof(masks))];
        const uint64_t first = below(PAGES), end = first + 1 + below((uint32_t)(PAGES - first));
        uint64_t at = first;
        while (at < end && (model[at] & mask) == (model[first] & mask))
            at++;
        assert_int_equal(mf_page_run_of(&pages, mask, first, end, &bits), at - first);
        assert_int_equal(bits, model[first] & mask);
    }
}

static void restarts_like_the_model(void **state)
{
    (void)state;
    for (unsigned round = 0; round < 5000; round++) {
        uint8_t model[PAGES];
        struct list punched = {.count = 0}, expected = {.count = 0};
        uint64_t missing = 0;
        scramble(model);
        for (uint64_t p = 0; p < PAGES; p++) {
            if (mf_page_resolvable(model[p]))
                continue;
            if (model[p] & GONE) {
                note(&expected, p);
                model[p] = D;
            } else {
                const bool torn = mf_page_state_of(model[p]) == L && !(model[p] & LANDED);
                model[p] = (uint8_t)(U | (model[p] & COPY) | (torn ? MF_PAGE_TORN : 0));
                missing++;
            }
        }
        assert_int_equal(mf_page_restart(&pages, note, &punched), missing);
        assert_memory_equal((const void *)bytes, model, PAGES);
        assert_int_equal(punched.count, expected.count);
        assert_memory_equal(punched.page, expected.page, punched.count * sizeof(punched.page[0]));
    }
}

static void finds_runs_like_the_model(void **state)
{
    (void)state;
    for (unsigned round = 0; round < 20000; round++) {
        uint8_t model[PAGES];
        scramble(model);
        const enum mf_page_state wanted = (enum mf_page_state)below(4);
        const struct mf_pages part = {.state = bytes, .count = below(PAGES + 1)};
        uint64_t at = below(PAGES), from = at;
        while (from < part.count && mf_page_state_of(model[from]) != wanted)
            from++;
        uint64_t end = from;
        while (end < part.count && mf_page_state_of(model[end]) == wanted)
            end++;
        uint64_t run = mf_page_next_run(&part, wanted, &at);
        assert_int_equal(run, end > from ? end - from : 0);
        if (run)
            assert_int_equal(at, from);
    }
}

static void fills_runs(void **state)
{
    (void)state;
    uint8_t model[PAGES];
    scramble(model);
    mf_page_fill(&pages, 3, 50, MF_PAGE_SENT);
    mf_page_fill(&pages, 20, 9, MF_PAGE_UNSENT);
    mf_page_fill(&pages, 100, 0, MF_PAGE_SENT);
    /* What the destination holds is another matter than what was sent on this link. */
    for (uint64_t p = 3; p < 53; p++)
        model[p] = (uint8_t)((model[p] & COPY) |
                             (p >= 20 && p < 29 ? (uint8_t)MF_PAGE_UNSENT : (uint8_t)MF_PAGE_SENT));
    assert_memory_equal((const void *)bytes, model, PAGES);
}

/*
 * Threads. As on the destination: several land pages (claim, then confirm or give back), one
 * answers with runs of zeros, one notes faults and one discards. Counted: the winners of each
 * claim, and for each fault that was noted that somebody was told of it.
 */
#define CROWD_PAGES 4096u
#define LANDERS 3u

static _Alignas(8) _Atomic uint8_t crowd_bytes[CROWD_PAGES];
static const struct mf_pages crowd = {.state = crowd_bytes, .count = CROWD_PAGES};
static _Atomic uint8_t filling[CROWD_PAGES]; /* how many believe that the page is theirs */
static _Atomic uint32_t noted[CROWD_PAGES];  /* FAULTED set by us where it was not set */
static _Atomic uint32_t told[CROWD_PAGES];   /* seen by whoever made it resolvable */
static _Atomic uint32_t made_resolvable[CROWD_PAGES];
static uint32_t content[CROWD_PAGES]; /* plain: what the orders have to carry */
static pthread_barrier_t begin;

static void resolved(uint64_t page, uint8_t was)
{
    atomic_fetch_add_explicit(&made_resolvable[page], 1, memory_order_relaxed);
    if (was & MF_PAGE_FAULTED)
        atomic_fetch_add_explicit(&told[page], 1, memory_order_relaxed);
}

static void require(bool condition)
{
    if (!condition)
        abort(); /* cmocka's assertions are for the main thread only */
}

static void *land_pages(void *arg)
{
    uint64_t seed = (uint64_t)(uintptr_t)arg;
    pthread_barrier_wait(&begin);
    for (unsigned i = 0; i < 8 * CROWD_PAGES; i++) {
        uint64_t page = next_random(&seed) % CROWD_PAGES;
        if (!mf_page_claim(&crowd, page)) {
            if (mf_page_state_of(mf_page_load(&crowd, page)) == MF_PAGE_CONFIRMED)
                require(content[page] != 1); /* 1: half landed */
            continue;
        }
        require(atomic_fetch_add_explicit(&filling[page], 1, memory_order_relaxed) == 0);
        content[page] = 1;
        const bool arrived = next_random(&seed) % 4 != 0;
        content[page] = arrived ? 2 : 0;
        atomic_fetch_sub_explicit(&filling[page], 1, memory_order_relaxed);
        uint8_t was = arrived ? mf_page_confirm(&crowd, page) : mf_page_unclaim(&crowd, page);
        require(mf_page_state_of(was) == MF_PAGE_LANDING);
        if (was & MF_PAGE_DISCARD) {
            content[page] = 0;
            resolved(page, mf_page_discard_finish(&crowd, page));
        } else if (arrived) {
            resolved(page, was);
        }
    }
    return NULL;
}

static void told_by_a_run(void *arg, uint64_t page)
{
    (void)arg;
    atomic_fetch_add_explicit(&told[page], 1, memory_order_relaxed);
}

static void *answer_zeros(void *arg)
{
    uint64_t seed = (uint64_t)(uintptr_t)arg;
    uint64_t *changed = malloc(sizeof(*changed));
    require(changed != NULL);
    *changed = 0;
    pthread_barrier_wait(&begin);
    for (unsigned i = 0; i < CROWD_PAGES / 4; i++) {
        uint64_t first = next_random(&seed) % CROWD_PAGES, count = next_random(&seed) % 24;
        if (count > CROWD_PAGES - first)
            count = CROWD_PAGES - first;
        *changed += mf_page_confirm_empty(&crowd, first, count, told_by_a_run, NULL);
    }
    return changed;
}

static void *fault_pages(void *arg)
{
    uint64_t seed = (uint64_t)(uintptr_t)arg;
    pthread_barrier_wait(&begin);
    for (unsigned i = 0; i < 4 * CROWD_PAGES; i++) {
        uint64_t page = next_random(&seed) % CROWD_PAGES;
        uint8_t was = mf_page_fault(&crowd, page);
        if (!mf_page_resolvable(was) && !(was & MF_PAGE_FAULTED))
            atomic_fetch_add_explicit(&noted[page], 1, memory_order_relaxed);
    }
    return NULL;
}

static void *discard_pages(void *arg)
{
    uint64_t seed = (uint64_t)(uintptr_t)arg;
    pthread_barrier_wait(&begin);
    for (unsigned i = 0; i < CROWD_PAGES / 2; i++) {
        uint64_t page = next_random(&seed) % CROWD_PAGES;
        uint8_t was = mf_page_discard(&crowd, page, false);
        if (mf_page_discard_held(was, false))
            was |= mf_page_discard_finish(&crowd, page) & MF_PAGE_FAULTED;
        if (mf_page_state_of(was) == MF_PAGE_UNCONFIRMED)
            resolved(page, was);
    }
    return NULL;
}

static void holds_among_threads(void **state)
{
    (void)state;
    for (unsigned round = 0; round < 10; round++) {
        pthread_t thread[LANDERS + 3];
        void *(*const body[LANDERS + 3])(void *) = {land_pages,   land_pages,  land_pages,
                                                    answer_zeros, fault_pages, discard_pages};
        memset((void *)crowd_bytes, 0, sizeof(crowd_bytes));
        memset((void *)noted, 0, sizeof(noted));
        memset((void *)told, 0, sizeof(told));
        memset((void *)made_resolvable, 0, sizeof(made_resolvable));
        memset(content, 0, sizeof(content));
        assert_int_equal(pthread_barrier_init(&begin, NULL, LANDERS + 3), 0);
        uint64_t zeroed = 0;
        for (unsigned i = 0; i < LANDERS + 3; i++)
            assert_int_equal(pthread_create(&thread[i], NULL, body[i],
                                            (void *)(uintptr_t)(next_random(&random_state) | 1)),
                             0);
        for (unsigned i = 0; i < LANDERS + 3; i++) {
            void *result = NULL;
            assert_int_equal(pthread_join(thread[i], &result), 0);
            if (result)
                zeroed = *(uint64_t *)result;
            free(result);
        }
        pthread_barrier_destroy(&begin);
        uint64_t resolvable = 0, counted = zeroed;
        for (unsigned p = 0; p < CROWD_PAGES; p++) {
            uint8_t byte = crowd_bytes[p];
            assert_int_not_equal(mf_page_state_of(byte), MF_PAGE_LANDING);
            assert_int_equal(filling[p], 0);
            assert_true(made_resolvable[p] <= 1);
            counted += made_resolvable[p];
            resolvable += mf_page_resolvable(byte);
            /* Every fault that was noted was told, once, or still stands in the byte. */
            assert_true(noted[p] <= 1);
            assert_int_equal(noted[p], told[p] + ((byte & MF_PAGE_FAULTED) ? 1 : 0));
            if (mf_page_resolvable(byte))
                assert_false(byte & (MF_PAGE_FAULTED | MF_PAGE_DISCARD));
        }
        assert_int_equal(counted, resolvable);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(claims_what_nobody_fills),
        cmocka_unit_test(confirms_what_was_claimed),
        cmocka_unit_test(gives_a_claim_back),
        cmocka_unit_test(lands_unconfirmed),
        cmocka_unit_test(notes_what_was_copied),
        cmocka_unit_test(discards_for_ever),
        cmocka_unit_test(notes_who_waits),
        cmocka_unit_test(forgets_who_waits_or_all_but_that),
        cmocka_unit_test(remembers_who_was_told_that_it_can_not_be_had),
        cmocka_unit_test(confirms_empty_runs_like_the_model),
        cmocka_unit_test(marks_sent_like_the_model),
        cmocka_unit_test(finds_runs_of_bits_like_the_model),
        cmocka_unit_test(restarts_like_the_model),
        cmocka_unit_test(finds_runs_like_the_model),
        cmocka_unit_test(fills_runs),
        cmocka_unit_test(holds_among_threads),
    };
    seed_random();
    return cmocka_run_group_tests(tests, NULL, NULL);
}
