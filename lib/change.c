/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Which system call leads to which message, after mm/mmap.c, mm/vma.c, mm/mremap.c, mm/madvise.c,
 * kernel/fork.c and fs/userfaultfd.c of the kernel:
 *
 *   UNMAP   munmap: its range, the length rounded up to pages, also what was never registered;
 *           mmap with MAP_FIXED: likewise, on hugetlbfs rounded up to huge pages;
 *           mremap: the tail it cuts off, what was in the way of MREMAP_FIXED, and the old place;
 *           brk: down from the old end, which only the kernel knows, to the new one, rounded up.
 *   REMAP   mremap: from the old place, with the old length, or the new one if it was cut first.
 *           Since 6.17 a move may go over several mappings, each with a message of its own.
 *   REMOVE  madvise: each mapping in the range sends a message for its part of it; a part of
 *           hugetlbfs is rounded down to whole huge pages. So: somewhere inside the range.
 *   FORK    fork, vfork and clone without CLONE_VM.
 *
 * One call may send several messages, one after another: the thread waits for each to be read.
 */
#include "lib/change.h"

#include <linux/sched.h>
#include <sys/mman.h>
#include <sys/shm.h>
#include <unistd.h>

/* mremap(2), madvise(2): newer than some headers. */
#define REMAP_FIXED 2u
#define ADVICE_FREE 8u
#define ADVICE_DONTNEED_LOCKED 24u
#ifndef SYS_process_madvise
#define SYS_process_madvise 440
#endif
#ifndef SYS_clone3
#define SYS_clone3 435
#endif

const char *mf_change_kind_name(enum mf_change_kind kind)
{
    switch (kind) {
    case MF_CHANGE_UNMAP:
        return "unmap";
    case MF_CHANGE_REMAP:
        return "remap";
    case MF_CHANGE_REMOVE:
        return "remove";
    case MF_CHANGE_FORK:
        return "fork";
    case MF_CHANGE_EXIT:
        return "exit";
    case MF_CHANGE_EXEC:
        return "exec";
    }
    return "unknown";
}

const char *mf_reason_name(enum mf_reason reason)
{
    switch (reason) {
    case MF_REASON_MUNMAP:
        return "munmap";
    case MF_REASON_MREMAP:
        return "mremap";
    case MF_REASON_MMAP_OVER:
        return "mmap-over";
    case MF_REASON_DONTNEED:
        return "dontneed";
    case MF_REASON_REMOVE:
        return "remove";
    case MF_REASON_FORK:
        return "fork";
    case MF_REASON_TRUNCATE:
        return "truncate";
    case MF_REASON_PUNCH:
        return "punch";
    case MF_REASON_EXIT:
        return "exit";
    case MF_REASON_EXEC:
        return "exec";
    case MF_REASON_UNKNOWN:
        break;
    }
    return "unknown";
}

/* ------------------------------------------------------------------------------------- rounding */

static uint64_t page_size(void)
{
    return (uint64_t)sysconf(_SC_PAGESIZE);
}

/** without_tag() - arm64 and x86-64 (LAM) ignore an address's uppermost bits in these calls; a
 * user's address needs at most 56. */
static uint64_t without_tag(uint64_t addr)
{
    return addr & ((UINT64_C(1) << 56) - 1);
}

/** rounded() - PAGE_ALIGN() of a length; it may wrap to 0, as it does in the kernel. */
static uint64_t rounded(uint64_t length_bytes, uint64_t page_bytes)
{
    return (length_bytes + page_bytes - 1) & ~(page_bytes - 1);
}

/** is_rounded() - is @got what the kernel makes of @asked: whole pages, on hugetlbfs whole huge
 * pages of whatever size (64 KiB to 16 GiB)? */
static bool is_rounded(uint64_t got, uint64_t asked)
{
    if (got == rounded(asked, page_size()))
        return true;
    for (unsigned shift = 16; shift <= 34; shift++) {
        if (got == rounded(asked, UINT64_C(1) << shift))
            return true;
    }
    return false;
}

struct span {
    uint64_t start_addr, end_addr;
};

/** inside() - is @inner a part of [@start_addr, + @length_bytes rounded up)? */
static bool inside(struct span inner, uint64_t start_addr, uint64_t length_bytes)
{
    if (inner.start_addr < start_addr || inner.start_addr >= inner.end_addr)
        return false;
    return inner.end_addr - start_addr <= rounded(length_bytes, page_size()) ||
           is_rounded(inner.end_addr - start_addr, length_bytes);
}

/* ----------------------------------------------------------------------- what a call can lead to
 */

bool mf_blocked_relevant(long number)
{
    switch (number) {
    case SYS_munmap:
#ifdef SYS_mmap
    case SYS_mmap:
#endif
    case SYS_mremap:
    case SYS_brk:
    case SYS_io_destroy:
#ifdef SYS_shmat
    case SYS_shmat:
    case SYS_shmdt:
#endif
    case SYS_madvise:
    case SYS_process_madvise:
    case SYS_io_uring_enter:
    case SYS_io_uring_setup:
#ifdef SYS_fork
    case SYS_fork:
#endif
    case SYS_clone:
    case SYS_clone3:
        return true;
    }
    return false;
}

/** What one call says about one message. */
enum verdict { NOT_THIS, THIS, PERHAPS /**< it may be, and the reason is not known then */ };

static enum verdict mremap_unmaps(const uint64_t *args, struct span gone)
{
    uint64_t from = without_tag(args[0]), to = args[4];
    if (inside(gone, from, args[1]))
        return THIS; /* the tail, the old place, or a mapping's part of it */
    if ((args[3] & REMAP_FIXED) && inside(gone, to, args[2]))
        return THIS; /* what was in the way */
    return NOT_THIS;
}

static enum verdict unmaps(const struct mf_blocked *call, struct span gone, enum mf_reason *reason)
{
    const uint64_t *args = call->args;
    uint64_t length_bytes = gone.end_addr - gone.start_addr;

    switch (call->number) {
    case SYS_munmap:
        *reason = MF_REASON_MUNMAP;
        return gone.start_addr == without_tag(args[0]) &&
                       length_bytes == rounded(args[1], page_size())
                   ? THIS
                   : NOT_THIS;
#ifdef SYS_mmap
    case SYS_mmap:
        *reason = MF_REASON_MMAP_OVER;
        return (args[3] & MAP_FIXED) && gone.start_addr == args[0] &&
                       is_rounded(length_bytes, args[1])
                   ? THIS
                   : NOT_THIS;
#endif
    case SYS_mremap:
        *reason = MF_REASON_MREMAP;
        return mremap_unmaps(args, gone);
    case SYS_brk:
        *reason = MF_REASON_MUNMAP;
        return gone.start_addr == rounded(args[0], page_size()) ? THIS : NOT_THIS;
    case SYS_io_destroy: /* the ring of completions was mapped at what is the context's name */
        *reason = MF_REASON_MUNMAP;
        return gone.start_addr == args[0] ? THIS : NOT_THIS;
#ifdef SYS_shmat
    /* Kernels as of 6.18 send nothing for these two; one that did would send this. */
    case SYS_shmat:
        *reason = MF_REASON_MMAP_OVER;
        return (args[2] & SHM_REMAP) && gone.start_addr == (args[1] & ~(page_size() - 1))
                   ? THIS
                   : NOT_THIS;
    case SYS_shmdt: /* from where the segment was attached on; how far, only the kernel knows */
        *reason = MF_REASON_MUNMAP;
        return gone.start_addr >= without_tag(args[0]) ? THIS : NOT_THIS;
#endif
    }
    /* A driver's ioctl(2), say: it waits for its message, and that is all there is to see. */
    *reason = MF_REASON_UNKNOWN;
    return call->certain && !mf_blocked_relevant(call->number) ? PERHAPS : NOT_THIS;
}

static enum verdict remaps(const struct mf_blocked *call, struct span moved, uint64_t to_addr,
                           enum mf_reason *reason)
{
    const uint64_t *args = call->args;
    if (call->number != SYS_mremap)
        return NOT_THIS;
    *reason = MF_REASON_MREMAP;
    uint64_t from = without_tag(args[0]);
    if ((args[3] & REMAP_FIXED) && to_addr - args[4] != moved.start_addr - from)
        return NOT_THIS;
    if (moved.start_addr == moved.end_addr) /* an old length of 0 maps shared memory once more */
        return args[1] == 0 && moved.start_addr == from ? THIS : NOT_THIS;
    return inside(moved, from, args[1]) ? THIS : NOT_THIS;
}

static enum verdict advises(uint64_t advice, enum mf_reason *reason)
{
    switch (advice) {
    case MADV_DONTNEED:
    case ADVICE_DONTNEED_LOCKED:
    case ADVICE_FREE: /* anonymous memory may read as zeros from now on; a file's refuses it */
        *reason = MF_REASON_DONTNEED;
        return THIS;
    case MADV_REMOVE:
        *reason = MF_REASON_REMOVE;
        return THIS;
    }
    return NOT_THIS;
}

static enum verdict removes(const struct mf_blocked *call, struct span gone, enum mf_reason *reason)
{
    const uint64_t *args = call->args;
    uint64_t from = without_tag(args[0]);

    switch (call->number) {
    case SYS_madvise:
        return inside(gone, from, args[1]) ? advises(args[2], reason) : NOT_THIS;
    case SYS_process_madvise: /* its ranges are in memory; the advice is not */
        return advises(args[3], reason);
    /* What a worker of io_uring shows, whatever it does: the call in which it was made, or, where a
     * kernel thread submits, in which that one was. */
    case SYS_io_uring_enter:
    case SYS_io_uring_setup:
        return PERHAPS;
    }
    return NOT_THIS;
}

bool mf_blocked_frees(const struct mf_blocked *call)
{
    switch (call->number) {
    case SYS_madvise:
        return call->args[2] == MADV_REMOVE;
    case SYS_process_madvise:
        return call->args[3] == MADV_REMOVE;
    case SYS_io_uring_enter:
    case SYS_io_uring_setup:
        return true;
    }
    return !mf_blocked_relevant(call->number);
}

static enum verdict forks(const struct mf_blocked *call, enum mf_reason *reason)
{
    *reason = MF_REASON_FORK;
    switch (call->number) {
#ifdef SYS_fork
    case SYS_fork:
        return THIS;
#endif
#ifdef SYS_vfork
    case SYS_vfork: /* shares the address space: sends nothing, in no kernel that is known */
        return NOT_THIS;
#endif
    case SYS_clone: /* which argument the flags are is the architecture's choice; s390 only has them
                       second */
#ifdef __s390x__
        return call->args[1] & CLONE_VM ? NOT_THIS : THIS;
#else
        return call->args[0] & CLONE_VM ? NOT_THIS : THIS;
#endif
    case SYS_clone3: /* its flags are in memory: a thread that is made sends nothing and so does
                        not wait */
        return THIS;
    }
    return NOT_THIS;
}

/* ------------------------------------------------------------------------------------- matching */

static enum verdict judge(const struct mf_blocked *call, const struct mf_change *change,
                          enum mf_reason *reason)
{
    struct span range = {change->start_addr, change->end_addr};
    *reason = MF_REASON_UNKNOWN;
    switch (change->kind) {
    case MF_CHANGE_UNMAP:
        return unmaps(call, range, reason);
    case MF_CHANGE_REMAP:
        return remaps(call, range, change->to_addr, reason);
    case MF_CHANGE_REMOVE:
        return removes(call, range, reason);
    case MF_CHANGE_FORK:
        return forks(call, reason);
    case MF_CHANGE_EXIT:
    case MF_CHANGE_EXEC:
        break;
    }
    return NOT_THIS;
}

static void take(struct mf_blocked *blocked, size_t count, size_t who)
{
    for (size_t i = 0; i < count; i++)
        blocked[i].candidate = i == who;
    blocked[who].taken = true;
}

size_t mf_change_from_event(const struct uffd_msg *message, struct mf_blocked *blocked,
                            size_t count, struct mf_change *out)
{
    *out = (struct mf_change){.kind = MF_CHANGE_FORK};
    switch (message->event) {
    case UFFD_EVENT_UNMAP:
        out->kind = MF_CHANGE_UNMAP;
        out->start_addr = message->arg.remove.start;
        out->end_addr = message->arg.remove.end;
        break;
    case UFFD_EVENT_REMOVE:
        out->kind = MF_CHANGE_REMOVE;
        out->start_addr = message->arg.remove.start;
        out->end_addr = message->arg.remove.end;
        break;
    case UFFD_EVENT_REMAP:
        out->kind = MF_CHANGE_REMAP;
        out->start_addr = message->arg.remap.from;
        out->end_addr = message->arg.remap.from + message->arg.remap.len;
        out->to_addr = message->arg.remap.to;
        break;
    }

    size_t candidates = 0, last = 0;
    for (size_t i = 0; i < count; i++) {
        enum mf_reason reason;
        blocked[i].candidate = false;
        if (blocked[i].taken)
            continue;
        enum verdict verdict = judge(&blocked[i], out, &reason);
        if (verdict == NOT_THIS)
            continue;
        blocked[i].candidate = true;
        out->reason = candidates == 0 || out->reason == reason ? reason : MF_REASON_UNKNOWN;
        last = i;
        candidates++;
    }
    /* A third one that agrees with the first must not bring the reason back. */
    for (size_t i = 0; candidates > 1 && i < count; i++) {
        enum mf_reason reason;
        if (blocked[i].candidate) {
            judge(&blocked[i], out, &reason);
            if (reason != out->reason)
                out->reason = MF_REASON_UNKNOWN;
        }
    }
    if (candidates == 1) {
        take(blocked, count, last);
        out->tid = blocked[last].tid;
    }
    return candidates;
}

uint64_t mf_change_moved_bytes(const struct uffd_msg *message, const struct mf_blocked *blocked,
                               size_t count)
{
    const uint64_t told_bytes = message->arg.remap.len;
    const struct span range = {message->arg.remap.from, message->arg.remap.from + told_bytes};
    uint64_t moved_bytes = 0;
    for (size_t i = 0; i < count; i++) {
        enum mf_reason reason;
        if (remaps(&blocked[i], range, message->arg.remap.to, &reason) == NOT_THIS)
            continue;
        const uint64_t new_bytes = rounded(blocked[i].args[2], page_size());
        const uint64_t bytes = new_bytes < told_bytes ? new_bytes : told_bytes;
        if (moved_bytes && bytes != moved_bytes)
            return told_bytes;
        moved_bytes = bytes;
    }
    return moved_bytes ? moved_bytes : told_bytes;
}

void mf_change_settle(struct mf_blocked *blocked, size_t count, ssize_t who,
                      struct mf_change *change)
{
    if (who < 0)
        return;
    judge(&blocked[who], change, &change->reason);
    change->tid = blocked[who].tid;
    take(blocked, count, (size_t)who);
}
