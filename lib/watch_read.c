/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Reading a watched process's events: who did it, and whose child it is. */
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <time.h>

#include "lib/children.h"
#include "lib/observe.h"
#include "lib/owner.h"
#include "lib/process_events.h"
#include "lib/uffd.h"
#include "lib/util.h"
#include "lib/watch_internal.h"

#define READ_MAX 100        /**< events before others get their turn */
#define WAITERS_LIMIT_MS 50 /**< for whoever sent an event to be seen waiting */
#define CHILD_LIMIT_MS 20   /**< for a forked child to appear */

/** keep_threads() - descriptors for looking at threads, where there is no lack of them. */
static void keep_threads(struct mf_watch *watch)
{
    struct rlimit limit;
    if (watch->threads || getrlimit(RLIMIT_NOFILE, &limit) != 0 ||
        limit.rlim_cur < 16 * MF_OBSERVE_SLOTS)
        return;
    watch->threads = malloc(sizeof(*watch->threads));
    if (watch->threads)
        mf_observe_cache_init(watch->threads);
}

static bool readable(int uffd)
{
    struct pollfd ready = {.fd = uffd, .events = POLLIN};
    return poll(&ready, 1, 0) > 0 && (ready.revents & POLLIN);
}

/**
 * take_over() - what is being mapped over something that was watched.
 * The event that tells is sent when the new mapping is there, and its thread waits: so if it is
 * watched before the event is read, it is from its first moment on. If the thread waits for
 * something else, it is the old mapping that is registered once more, which changes nothing.
 */
static void take_over(const struct mf_watch *watch, const struct mf_blocked *call)
{
#ifdef SYS_mmap
    const uint64_t page_mask = (uint64_t)sysconf(_SC_PAGESIZE) - 1;
    if (call->number != SYS_mmap || !(call->args[3] & MAP_FIXED))
        return;
    const struct mf_watched one = {.start_addr = call->args[0],
                                   .end_addr =
                                       call->args[0] + ((call->args[1] + page_mask) & ~page_mask)};
    if (one.start_addr < one.end_addr)
        mf_watch_take_up(watch->uffd, &one);
#endif
}

/** struct forker - the children of a thread that waits in a fork, before there is a new one. */
struct forker {
    pid_t tid;
    struct mf_children before;
};

/** struct batch - what is known about who waits. */
struct batch {
    struct mf_blocked blocked[MF_OBSERVE_MAX];
    struct mf_observation seen;
    struct forker forkers[MF_OBSERVE_MAX];
    size_t forker_count;
    int forks_fd; /**< of mf_forks_listen() while somebody forks; -1: not, or not to be had */
};

static void batch_end(struct batch *batch)
{
    for (size_t i = 0; i < batch->forker_count; i++)
        mf_children_free(&batch->forkers[i].before);
    batch->forker_count = 0;
    mf_watch_close(&batch->forks_fd);
}

static bool forks(const struct mf_blocked *blocked)
{
    struct uffd_msg message = {.event = UFFD_EVENT_FORK};
    struct mf_blocked copy = *blocked;
    struct mf_change change;
    return mf_change_from_event(&message, &copy, 1, &change) == 1;
}

/**
 * observe() - who waits, given that an event is there.
 * Whoever sent it may have been about to sleep when it was looked at. Return: how many messages may
 * be read; 1 with nobody seen if nobody shows up in time (another process that shares the memory).
 */
static size_t observe(struct mf_watch *watch, struct batch *batch)
{
    batch_end(batch);
    batch->seen = (struct mf_observation){0};
    uint64_t start_ns = mf_now_ns();
    keep_threads(watch);
    while (watch->pid) {
        if (mf_observe_cached(watch->proc_fd, watch->threads, watch->woken, batch->blocked,
                              MF_OBSERVE_MAX, &batch->seen) < 0)
            break;
        if (batch->seen.readable || mf_now_ns() - start_ns > WAITERS_LIMIT_MS * UINT64_C(1000000))
            break;
        nanosleep(&(struct timespec){.tv_nsec = 50000}, NULL);
    }
    for (size_t i = 0; i < batch->seen.count; i++) {
        take_over(watch, &batch->blocked[i]);
        if (!forks(&batch->blocked[i]))
            continue;
        struct forker *forker = &batch->forkers[batch->forker_count++];
        *forker = (struct forker){.tid = batch->blocked[i].tid};
        mf_children_read(watch->proc_fd, forker->tid, &forker->before);
    }
    if (batch->forker_count)
        batch->forks_fd = mf_forks_listen();
    return batch->seen.readable ? batch->seen.readable : 1;
}

/** find_by_memory() - whose the child's userfaultfd is. For a parent that ends at once, and for
 * CLONE_PARENT. */
static pid_t find_by_memory(const struct mf_watch *watch, int child_uffd)
{
    const struct mf_extent mark = mf_watch_mark(watch);
    return mark.start_bytes < mark.end_bytes
               ? mf_owner_find(child_uffd, mark.start_bytes, mark.end_bytes)
               : 0;
}

/** find_child() - the one that was not there before. Return: 0 if it can't be found: it was gone
 * before it could be seen. */
static pid_t find_child(const struct mf_watch *watch, const struct batch *batch, pid_t tid,
                        int child_uffd)
{
    uint64_t start_ns = mf_now_ns();
    for (bool last = false;;) {
        for (size_t i = 0; i < batch->forker_count; i++) {
            const struct forker *forker = &batch->forkers[i];
            if (tid && forker->tid != tid)
                continue;
            pid_t child = mf_children_new(watch->proc_fd, forker->tid, &forker->before);
            if (child)
                return child;
        }
        /* It may be gone already, and its parent have taken note of it. */
        pid_t told = batch->forks_fd >= 0 && tid ? mf_forks_child(batch->forks_fd, tid) : 0;
        if (told)
            return told;
        if (last)
            return mf_uffd_alive(child_uffd) ? find_by_memory(watch, child_uffd) : 0;
        /* Its memory is gone again: it has ended, or was never completed. */
        last = !mf_uffd_alive(child_uffd) || mf_watch_has_ended(watch) ||
               mf_now_ns() - start_ns > CHILD_LIMIT_MS * UINT64_C(1000000);
        if (!last)
            nanosleep(&(struct timespec){.tv_nsec = 20000}, NULL);
    }
}

/** told() - one message: what it means, and on to the caller. Return: false if the threads have to
 * be observed anew before the next message. */
static bool told(struct mf_watch *watch, struct batch *batch, const struct uffd_msg *message,
                 mf_watch_fn *fn, void *arg)
{
    struct mf_change change;
    size_t candidates = mf_change_from_event(message, batch->blocked, batch->seen.count, &change);
    bool sure = candidates < 2 ||
                mf_observe_settle(watch->proc_fd, batch->blocked, batch->seen.count, &change);
    int child_uffd = -1;
    change.pid = watch->pid;
    switch (change.kind) {
    case MF_CHANGE_FORK:
        child_uffd = (int)message->arg.fork.ufd;
        change.child = find_child(watch, batch, change.tid, child_uffd);
        break;
    case MF_CHANGE_REMAP:
    case MF_CHANGE_UNMAP:
        mf_watch_forget(watch, change.start_addr, change.end_addr);
        break;
    case MF_CHANGE_REMOVE:
    case MF_CHANGE_EXIT:
    case MF_CHANGE_EXEC:
        break;
    }
    fn(watch, &change, child_uffd, arg);
    return sure;
}

int mf_watch_read(struct mf_watch *watch, mf_watch_fn *fn, void *arg)
{
    int read_count = 0, rc = 0;
    if (watch->uffd < 0 || !readable(watch->uffd))
        return 0;
    struct batch *batch = calloc(1, sizeof(*batch));
    if (!batch)
        return -ENOMEM;
    batch->forks_fd = -1;
    while (rc == 0 && read_count < READ_MAX && watch->uffd >= 0 && readable(watch->uffd)) {
        size_t allowed = observe(watch, batch);
        for (bool sure = true; sure && allowed > 0; allowed--) {
            struct uffd_msg message;
            ssize_t got = read(watch->uffd, &message, sizeof(message));
            if (got != (ssize_t)sizeof(message)) {
                rc = got < 0 && errno != EAGAIN ? -errno : 0;
                break;
            }
            watch->woken = readable(watch->uffd);
            if (message.event == UFFD_EVENT_PAGEFAULT)
                continue; /* nothing is ever registered that would send one */
            sure = told(watch, batch, &message, fn, arg);
            read_count++;
        }
    }
    batch_end(batch);
    free(batch);
    return rc < 0 ? rc : read_count;
}
