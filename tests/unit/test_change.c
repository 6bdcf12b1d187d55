/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Which observed system call explains which message of a userfaultfd, and that nothing else does.
 */
#include <linux/sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/shm.h>

#include <cmocka.h>

#include "lib/change.h"

#define A UINT64_C(0x7f0000000000)
#define B UINT64_C(0x7e0000000000)
#define PAGE UINT64_C(4096)
#define GIB (UINT64_C(1) << 30)
#define FIXED_ANON (MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED)
#define MOVE_FIXED (MREMAP_MAYMOVE | MREMAP_FIXED)
#define DONTUNMAP 4
#define PROCESS_MADVISE 440
#define CLONE3 435

static struct uffd_msg ranged(unsigned char event, uint64_t start_addr, uint64_t length_bytes)
{
    struct uffd_msg message = {.event = event};
    message.arg.remove.start = start_addr;
    message.arg.remove.end = start_addr + length_bytes;
    return message;
}

static struct uffd_msg unmapped(uint64_t start_addr, uint64_t length_bytes)
{
    return ranged(UFFD_EVENT_UNMAP, start_addr, length_bytes);
}

static struct uffd_msg removed(uint64_t start_addr, uint64_t length_bytes)
{
    return ranged(UFFD_EVENT_REMOVE, start_addr, length_bytes);
}

static struct uffd_msg remapped(uint64_t from_addr, uint64_t to_addr, uint64_t length_bytes)
{
    struct uffd_msg message = {.event = UFFD_EVENT_REMAP};
    message.arg.remap.from = from_addr;
    message.arg.remap.to = to_addr;
    message.arg.remap.len = length_bytes;
    return message;
}

static struct uffd_msg forked(void)
{
    return (struct uffd_msg){.event = UFFD_EVENT_FORK};
}

/** explains() - does one such call explain the message, and how? MF_REASON_EXIT stands for no. */
#define NO MF_REASON_EXIT
static enum mf_reason explains(const struct mf_blocked *call, struct uffd_msg message)
{
    struct mf_blocked blocked = *call;
    struct mf_change change;
    blocked.tid = 77;
    size_t candidates = mf_change_from_event(&message, &blocked, 1, &change);
    assert_int_equal(blocked.taken, candidates == 1);
    assert_int_equal(change.tid, candidates == 1 ? 77 : 0);
    if (candidates == 0)
        assert_int_equal(change.reason, MF_REASON_UNKNOWN);
    return candidates ? change.reason : NO;
}

#define CALL(n, ...) (&(struct mf_blocked){.number = (n), .args = {__VA_ARGS__}})

static void assert_reason(const struct mf_blocked *call, struct uffd_msg message,
                          enum mf_reason wanted)
{
    enum mf_reason got = explains(call, message);
    if (got != wanted)
        fail_msg("call %ld(%#llx, %#llx, %#llx): %s, wanted %s", call->number,
                 (unsigned long long)call->args[0], (unsigned long long)call->args[1],
                 (unsigned long long)call->args[2], got == NO ? "no" : mf_reason_name(got),
                 wanted == NO ? "no" : mf_reason_name(wanted));
}

static void munmap_rounds_its_length_up(void **state)
{
    (void)state;
    assert_reason(CALL(SYS_munmap, A, PAGE), unmapped(A, PAGE), MF_REASON_MUNMAP);
    assert_reason(CALL(SYS_munmap, A, 1), unmapped(A, PAGE), MF_REASON_MUNMAP);
    assert_reason(CALL(SYS_munmap, A, PAGE + 1), unmapped(A, 2 * PAGE), MF_REASON_MUNMAP);
    assert_reason(CALL(SYS_munmap, A, PAGE + 1), unmapped(A, PAGE), NO);
    assert_reason(CALL(SYS_munmap, A, PAGE), unmapped(A + PAGE, PAGE), NO);
    assert_reason(CALL(SYS_munmap, A, PAGE), unmapped(A, 2 * PAGE), NO);
    assert_reason(CALL(SYS_munmap, A, PAGE), removed(A, PAGE), NO);
    assert_reason(CALL(SYS_munmap, A, PAGE), remapped(A, B, PAGE), NO);
    assert_reason(CALL(SYS_munmap, A, PAGE), forked(), NO);
    for (uint64_t gib = 1; gib <= 1024; gib *= 2) { /* 2 GiB and 4 GiB are where ints end */
        assert_reason(CALL(SYS_munmap, A, gib * GIB), unmapped(A, gib * GIB), MF_REASON_MUNMAP);
        assert_reason(CALL(SYS_munmap, A, gib * GIB), unmapped(A, gib * GIB + 4 * GIB), NO);
    }
    /* An address's tag is ignored by the kernel. */
    assert_reason(CALL(SYS_munmap, A | UINT64_C(0x5a) << 56, PAGE), unmapped(A, PAGE),
                  MF_REASON_MUNMAP);
}

static void mmap_unmaps_only_where_it_must_be(void **state)
{
    (void)state;
    assert_reason(CALL(SYS_mmap, A, 3 * PAGE - 1, PROT_READ, FIXED_ANON), unmapped(A, 3 * PAGE),
                  MF_REASON_MMAP_OVER);
    assert_reason(CALL(SYS_mmap, A, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS),
                  unmapped(A, PAGE), NO);
    assert_reason(CALL(SYS_mmap, A, PAGE, PROT_READ, MAP_PRIVATE | 0x100000 /* NOREPLACE */),
                  unmapped(A, PAGE), NO);
    assert_reason(CALL(SYS_mmap, A, PAGE, PROT_READ, FIXED_ANON), unmapped(A, 2 * PAGE), NO);
    /* Huge pages. */
    assert_reason(CALL(SYS_mmap, A, PAGE, PROT_READ, FIXED_ANON), unmapped(A, 2 << 20),
                  MF_REASON_MMAP_OVER);
    assert_reason(CALL(SYS_mmap, A, (2 << 20) + 1, PROT_READ, FIXED_ANON), unmapped(A, 4 << 20),
                  MF_REASON_MMAP_OVER);
    assert_reason(CALL(SYS_mmap, A, GIB - 1, PROT_READ, FIXED_ANON), unmapped(A, GIB),
                  MF_REASON_MMAP_OVER);
    assert_reason(CALL(SYS_mmap, A, (2 << 20) + 1, PROT_READ, FIXED_ANON),
                  unmapped(A, (2 << 20) + 2 * PAGE), NO);
}

static void mremap_unmaps_and_moves(void **state)
{
    (void)state;
    /* Shrunk in place. */
    assert_reason(CALL(SYS_mremap, A, 4 * PAGE, 2 * PAGE - 3, 0), unmapped(A + 2 * PAGE, 2 * PAGE),
                  MF_REASON_MREMAP);
    assert_reason(CALL(SYS_mremap, A, 4 * PAGE, 2 * PAGE, 0), unmapped(A + 4 * PAGE, PAGE), NO);
    assert_reason(CALL(SYS_mremap, A, 4 * PAGE, 2 * PAGE, 0), unmapped(A - PAGE, PAGE), NO);
    /* Moved, with what was in the way. */
    const struct mf_blocked *move = CALL(SYS_mremap, A, 4 * PAGE, 4 * PAGE, MOVE_FIXED, B);
    assert_reason(move, unmapped(B, 4 * PAGE), MF_REASON_MREMAP);
    assert_reason(move, remapped(A, B, 4 * PAGE), MF_REASON_MREMAP);
    assert_reason(move, unmapped(A, 4 * PAGE), MF_REASON_MREMAP);
    assert_reason(move, unmapped(B + 4 * PAGE, PAGE), NO);
    assert_reason(move, remapped(A, B + PAGE, 4 * PAGE), NO);
    assert_reason(move, remapped(A, B, 5 * PAGE), NO);
    assert_reason(move, removed(A, 4 * PAGE), NO);
    /* Several mappings at once (6.17): each by itself. */
    assert_reason(move, remapped(A + PAGE, B + PAGE, PAGE), MF_REASON_MREMAP);
    assert_reason(move, remapped(A + PAGE, B + 2 * PAGE, PAGE), NO);
    /* Without FIXED the fifth argument means nothing, and the kernel chose the place. */
    const struct mf_blocked *grow = CALL(SYS_mremap, A, 4 * PAGE, 9 * PAGE, MREMAP_MAYMOVE, B);
    assert_reason(grow, remapped(A, 0x123000, 4 * PAGE), MF_REASON_MREMAP);
    assert_reason(grow, unmapped(B, 4 * PAGE), NO);
    /* Cut, then moved. */
    const struct mf_blocked *cut = CALL(SYS_mremap, A, 4 * PAGE, 2 * PAGE, MOVE_FIXED, B);
    assert_reason(cut, remapped(A, B, 2 * PAGE), MF_REASON_MREMAP);
    assert_reason(cut, unmapped(A + 2 * PAGE, 2 * PAGE), MF_REASON_MREMAP);
    assert_reason(cut, unmapped(A, 2 * PAGE), MF_REASON_MREMAP);
    /* Left behind, and mapped once more. */
    assert_reason(CALL(SYS_mremap, A, PAGE, PAGE, MREMAP_MAYMOVE | DONTUNMAP, 0),
                  remapped(A, B, PAGE), MF_REASON_MREMAP);
    assert_reason(CALL(SYS_mremap, A, 0, PAGE, MREMAP_MAYMOVE, 0), remapped(A, B, 0),
                  MF_REASON_MREMAP);
    assert_reason(CALL(SYS_mremap, A, PAGE, PAGE, MREMAP_MAYMOVE, 0), remapped(A, B, 0), NO);
    /* Huge pages: a length is rounded up. */
    assert_reason(CALL(SYS_mremap, A, PAGE, PAGE, MOVE_FIXED, B), remapped(A, B, 2 << 20),
                  MF_REASON_MREMAP);
}

static void the_heap_and_rarer_calls(void **state)
{
    (void)state;
    assert_reason(CALL(SYS_brk, A + 1), unmapped(A + PAGE, 7 * PAGE), MF_REASON_MUNMAP);
    assert_reason(CALL(SYS_brk, A), unmapped(A, PAGE), MF_REASON_MUNMAP);
    assert_reason(CALL(SYS_brk, A), unmapped(A + PAGE, PAGE), NO);
    assert_reason(CALL(SYS_shmat, 1, A, SHM_REMAP), unmapped(A, 5 * PAGE), MF_REASON_MMAP_OVER);
    assert_reason(CALL(SYS_shmat, 1, A + 9, SHM_REMAP | SHM_RND), unmapped(A, PAGE),
                  MF_REASON_MMAP_OVER);
    assert_reason(CALL(SYS_shmat, 1, A, 0), unmapped(A, PAGE), NO);
    assert_reason(CALL(SYS_shmdt, A), unmapped(A, 5 * PAGE), MF_REASON_MUNMAP);
    assert_reason(CALL(SYS_io_destroy, A), unmapped(A, PAGE), MF_REASON_MUNMAP);
    /* A call that is not in any table, in a thread that waits for its message: who, but not why. */
    struct mf_blocked odd = {.number = SYS_ioctl, .args = {3}};
    assert_reason(&odd, unmapped(A, PAGE), NO);
    odd.certain = true;
    assert_reason(&odd, unmapped(A, PAGE), MF_REASON_UNKNOWN);
    assert_false(mf_blocked_relevant(SYS_ioctl));
    assert_false(mf_blocked_relevant(SYS_read));
    assert_true(mf_blocked_relevant(SYS_munmap));
}

static void every_advice_has_its_reason(void **state)
{
    (void)state;
    static const struct {
        uint64_t advice;
        enum mf_reason reason;
    } rows[] = {{MADV_DONTNEED, MF_REASON_DONTNEED},
                {24, MF_REASON_DONTNEED},
                {MADV_FREE, MF_REASON_DONTNEED},
                {MADV_REMOVE, MF_REASON_REMOVE},
                {MADV_WILLNEED, NO},
                {MADV_COLD, NO},
                {MADV_PAGEOUT, NO},
                {102 /* GUARD_INSTALL */, NO}};
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        assert_reason(CALL(SYS_madvise, A, 3 * PAGE, rows[i].advice), removed(A, 3 * PAGE),
                      rows[i].reason);
        assert_reason(CALL(PROCESS_MADVISE, 9, B, 1, rows[i].advice), removed(A, 3 * PAGE),
                      rows[i].reason);
    }
    /* A part, as each mapping in the range sends; never more. */
    const struct mf_blocked *drop = CALL(SYS_madvise, A, 3 * PAGE - 5, MADV_DONTNEED);
    assert_reason(drop, removed(A + PAGE, PAGE), MF_REASON_DONTNEED);
    assert_reason(drop, removed(A + PAGE, 2 * PAGE), MF_REASON_DONTNEED);
    assert_reason(drop, removed(A - PAGE, 2 * PAGE), NO);
    assert_reason(drop, removed(A + 3 * PAGE, PAGE), NO);
    assert_reason(drop, removed(A + 2 * PAGE, 2 * PAGE), NO);
    assert_reason(drop, unmapped(A, 3 * PAGE), NO);
    assert_reason(CALL(SYS_madvise, A, 5 * GIB, MADV_REMOVE), removed(A + 4 * GIB, GIB),
                  MF_REASON_REMOVE);
    /* io_uring's workers show the call they were made in, not what they do. */
    assert_reason(CALL(SYS_io_uring_enter, 4, 1, 1), removed(A, PAGE), MF_REASON_UNKNOWN);
    assert_reason(CALL(SYS_io_uring_enter, 4, 1, 1), unmapped(A, PAGE), NO);
}

static void only_copies_of_the_address_space_are_forks(void **state)
{
    (void)state;
    assert_reason(CALL(SYS_fork, 0), forked(), MF_REASON_FORK);
    assert_reason(CALL(SYS_clone, SIGCHLD), forked(), MF_REASON_FORK);
    assert_reason(CALL(SYS_clone, CLONE_CHILD_SETTID | SIGCHLD), forked(), MF_REASON_FORK);
    assert_reason(CALL(SYS_clone, CLONE_VM | CLONE_THREAD | CLONE_SIGHAND), forked(), NO);
    assert_reason(CALL(SYS_vfork, 0), forked(), NO);
    assert_reason(CALL(CLONE3, A, 88), forked(), MF_REASON_FORK);
    assert_reason(CALL(SYS_execve, A), forked(), NO);
    assert_reason(CALL(SYS_fork, 0), unmapped(A, PAGE), NO);
}

static void the_message_is_told_whoever_did_it(void **state)
{
    (void)state;
    struct mf_change change;
    struct uffd_msg message = remapped(A, B, 5 * GIB);
    assert_int_equal(mf_change_from_event(&message, NULL, 0, &change), 0);
    assert_int_equal(change.kind, MF_CHANGE_REMAP);
    assert_true(change.start_addr == A && change.end_addr == A + 5 * GIB && change.to_addr == B);
    assert_int_equal(change.reason, MF_REASON_UNKNOWN);
    assert_int_equal(change.tid, 0);
    message = unmapped(A, 5 * GIB);
    mf_change_from_event(&message, NULL, 0, &change);
    assert_int_equal(change.kind, MF_CHANGE_UNMAP);
    assert_true(change.start_addr == A && change.end_addr == A + 5 * GIB && change.to_addr == 0);
    message = removed(A, PAGE);
    mf_change_from_event(&message, NULL, 0, &change);
    assert_int_equal(change.kind, MF_CHANGE_REMOVE);
    message = forked();
    mf_change_from_event(&message, NULL, 0, &change);
    assert_int_equal(change.kind, MF_CHANGE_FORK);
    assert_true(change.start_addr == 0 && change.end_addr == 0);
}

/* ---- several threads ---- */

#define ADVISER(id, advice)                                                                        \
    {                                                                                              \
        .tid = (id), .number = SYS_madvise, .args = { A, 4 * PAGE, (advice) }                      \
    }

static void each_message_takes_its_thread(void **state)
{
    (void)state;
    struct mf_blocked blocked[] = {
        {.tid = 1, .number = SYS_munmap, .args = {A, PAGE}},
        {.tid = 2, .number = SYS_munmap, .args = {A + PAGE, PAGE}},
        {.tid = 3, .number = SYS_madvise, .args = {B, PAGE, MADV_REMOVE}},
    };
    struct mf_change change;
    struct uffd_msg message = removed(B, PAGE);
    assert_int_equal(mf_change_from_event(&message, blocked, 3, &change), 1);
    assert_int_equal(change.tid, 3);
    message = unmapped(A + PAGE, PAGE);
    assert_int_equal(mf_change_from_event(&message, blocked, 3, &change), 1);
    assert_int_equal(change.tid, 2);
    /* The same once more: it is another one's, not seen. */
    assert_int_equal(mf_change_from_event(&message, blocked, 3, &change), 0);
    assert_int_equal(change.tid, 0);
    assert_int_equal(change.reason, MF_REASON_UNKNOWN);
    message = unmapped(A, PAGE);
    assert_int_equal(mf_change_from_event(&message, blocked, 3, &change), 1);
    assert_int_equal(change.tid, 1);
}

static void equal_calls_agree_in_the_reason(void **state)
{
    (void)state;
    struct mf_blocked blocked[] = {ADVISER(1, MADV_REMOVE), ADVISER(2, MADV_REMOVE),
                                   ADVISER(3, MADV_REMOVE)};
    struct uffd_msg message = removed(A, 4 * PAGE);
    struct mf_change change;
    assert_int_equal(mf_change_from_event(&message, blocked, 3, &change), 3);
    assert_int_equal(change.reason, MF_REASON_REMOVE);
    assert_int_equal(change.tid, 0);
    mf_change_settle(blocked, 3, 1, &change);
    assert_int_equal(change.tid, 2);
    assert_int_equal(change.reason, MF_REASON_REMOVE);
    assert_true(blocked[1].taken && !blocked[0].taken && !blocked[2].taken);

    assert_int_equal(mf_change_from_event(&message, blocked, 3, &change), 2);
    assert_false(blocked[1].candidate);
    mf_change_settle(blocked, 3, -1, &change); /* can't be told */
    assert_int_equal(change.tid, 0);
    assert_int_equal(change.reason, MF_REASON_REMOVE);
    assert_int_equal(mf_change_from_event(&message, blocked, 3, &change), 2);
}

static void calls_that_differ_are_not_guessed_at(void **state)
{
    (void)state;
    struct mf_blocked blocked[] = {ADVISER(1, MADV_REMOVE), ADVISER(2, MADV_DONTNEED),
                                   ADVISER(3, MADV_REMOVE), ADVISER(4, MADV_REMOVE)};
    struct uffd_msg message = removed(A + PAGE, PAGE);
    struct mf_change change;
    assert_int_equal(mf_change_from_event(&message, blocked, 4, &change), 4);
    assert_int_equal(change.reason, MF_REASON_UNKNOWN);
    assert_int_equal(change.tid, 0);
    mf_change_settle(blocked, 4, 1, &change);
    assert_int_equal(change.reason, MF_REASON_DONTNEED);
    assert_int_equal(change.tid, 2);
    assert_int_equal(mf_change_from_event(&message, blocked, 4, &change), 3);
    assert_int_equal(change.reason, MF_REASON_REMOVE);
    mf_change_settle(blocked, 4, -1, &change);
    assert_int_equal(change.reason, MF_REASON_REMOVE);

    /* A worker of io_uring might have done it as well. */
    struct mf_blocked worker[] = {ADVISER(1, MADV_REMOVE),
                                  {.tid = 2, .number = SYS_io_uring_enter}};
    assert_int_equal(mf_change_from_event(&message, worker, 2, &change), 2);
    assert_int_equal(change.reason, MF_REASON_UNKNOWN);
    mf_change_settle(worker, 2, -1, &change);
    assert_int_equal(change.reason, MF_REASON_UNKNOWN);
}

static void every_word_is_there_once(void **state)
{
    (void)state;
    static const char *const kinds[] = {"unmap", "remap", "remove", "fork", "exit", "exec"};
    static const char *const reasons[] = {"unknown",  "munmap", "mremap", "mmap-over",
                                          "dontneed", "remove", "fork",   "truncate",
                                          "punch",    "exit",   "exec"};
    for (unsigned i = 0; i < sizeof(kinds) / sizeof(kinds[0]); i++)
        assert_string_equal(mf_change_kind_name((enum mf_change_kind)i), kinds[i]);
    for (unsigned i = 0; i < sizeof(reasons) / sizeof(reasons[0]); i++)
        assert_string_equal(mf_reason_name((enum mf_reason)i), reasons[i]);
}

static uint64_t moved_bytes(struct uffd_msg message, const struct mf_blocked *a,
                            const struct mf_blocked *b)
{
    const struct mf_blocked both[] = {*a, *b};
    return mf_change_moved_bytes(&message, both, 2);
}

/* 6.1 and 6.12 tell the old length. */
static void what_was_moved_is_what_the_call_says(void **state)
{
    (void)state;
    const struct mf_blocked *other = CALL(SYS_munmap, A, 4 * PAGE);
    const struct mf_blocked *shrink = CALL(SYS_mremap, A, 4 * PAGE, PAGE + 1, MOVE_FIXED, B);
    assert_int_equal(moved_bytes(remapped(A, B, 4 * PAGE), other, shrink), 2 * PAGE);
    assert_int_equal(moved_bytes(remapped(A, B, 2 * PAGE), other, shrink), 2 * PAGE);
    assert_int_equal(moved_bytes(remapped(A, B, 4 * PAGE), other, other), 4 * PAGE);
    assert_int_equal(moved_bytes(remapped(A, B + PAGE, 4 * PAGE), other, shrink), 4 * PAGE);
    const struct mf_blocked *grow = CALL(SYS_mremap, A, 4 * PAGE, 9 * PAGE, MOVE_FIXED, B);
    assert_int_equal(moved_bytes(remapped(A, B, 4 * PAGE), grow, other), 4 * PAGE);
    assert_int_equal(moved_bytes(remapped(A, B, 4 * PAGE), grow, shrink), 4 * PAGE); /* which? */
    const struct mf_blocked *doubles = CALL(SYS_mremap, A, 0, PAGE, MREMAP_MAYMOVE, 0);
    assert_int_equal(moved_bytes(remapped(A, B, 0), doubles, other), 0);
}

static void who_may_free_is_told_from_who_does_not(void **state)
{
    (void)state;
    assert_true(mf_blocked_frees(CALL(SYS_madvise, A, PAGE, MADV_REMOVE)));
    assert_false(mf_blocked_frees(CALL(SYS_madvise, A, PAGE, MADV_DONTNEED)));
    assert_true(mf_blocked_frees(CALL(PROCESS_MADVISE, 3, A, 1, MADV_REMOVE)));
    assert_false(mf_blocked_frees(CALL(PROCESS_MADVISE, 3, A, 1, MADV_DONTNEED)));
    assert_false(mf_blocked_frees(CALL(SYS_munmap, A, PAGE)));
    assert_false(mf_blocked_frees(CALL(SYS_mremap, A, PAGE, PAGE, MREMAP_MAYMOVE)));
    assert_false(mf_blocked_frees(CALL(CLONE3, A, 88)));
    /* Workers show the call in which they were made; of other calls nothing is known. */
    assert_true(mf_blocked_frees(CALL(SYS_io_uring_enter, 3)));
    assert_true(mf_blocked_frees(CALL(SYS_io_uring_setup, 3)));
    assert_true(mf_blocked_frees(CALL(SYS_ioctl, 3)));
    assert_reason(CALL(SYS_io_uring_setup, 3), removed(A, PAGE), MF_REASON_UNKNOWN);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(munmap_rounds_its_length_up),
        cmocka_unit_test(mmap_unmaps_only_where_it_must_be),
        cmocka_unit_test(mremap_unmaps_and_moves),
        cmocka_unit_test(the_heap_and_rarer_calls),
        cmocka_unit_test(every_advice_has_its_reason),
        cmocka_unit_test(only_copies_of_the_address_space_are_forks),
        cmocka_unit_test(the_message_is_told_whoever_did_it),
        cmocka_unit_test(each_message_takes_its_thread),
        cmocka_unit_test(equal_calls_agree_in_the_reason),
        cmocka_unit_test(calls_that_differ_are_not_guessed_at),
        cmocka_unit_test(every_word_is_there_once),
        cmocka_unit_test(who_may_free_is_told_from_who_does_not),
        cmocka_unit_test(what_was_moved_is_what_the_call_says),
    };
    return cmocka_run_group_tests_name("change", tests, NULL, NULL);
}
