/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib/watch.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <time.h>

#include "lib/children.h"
#include "lib/inject.h"
#include "lib/observe.h"
#include "lib/owner.h"
#include "lib/process_events.h"
#include "lib/target.h"
#include "lib/uffd.h"
#include "lib/util.h"

#define WATCH_EVENTS                                                                               \
    (UFFD_FEATURE_EVENT_UNMAP | UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_EVENT_REMOVE |             \
     UFFD_FEATURE_EVENT_FORK)
#define EXECS_MAX 5         /**< while one attaches */
#define READ_MAX 100        /**< events before others get their turn */
#define WAITERS_LIMIT_MS 20 /**< for whoever sent an event to be seen waiting */
#define CHILD_LIMIT_MS 20   /**< for a forked child to appear */
#define GONE_PATIENCE_NS                                                                           \
    UINT64_C(100000000)         /**< for an exec to show, which takes memory away too */
#define KERNEL_THREAD 0x200000u /**< PF_KTHREAD of linux/sched.h, in proc_pid_stat(5)'s flags */

static void close_fd(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

/** read_at() - a small file of /proc/PID. Return: true with @text filled. */
static bool read_at(int proc_fd, const char *file, char *text, size_t size)
{
    cleanup_close int fd = openat(proc_fd, file, O_RDONLY | O_CLOEXEC);
    ssize_t length = fd >= 0 ? read(fd, text, size - 1) : -1;
    if (length <= 0)
        return false;
    text[length] = '\0';
    return true;
}

/* --------------------------------------------------------------------------- finding the process
 */

/** refuse_thread() - if @pid is a thread's number, say whose. Return: 0 if it is none. */
static int refuse_thread(int proc_fd, pid_t pid, struct mf_error *err)
{
    char text[4096];
    int leader = pid;
    if (read_at(proc_fd, "status", text, sizeof(text))) {
        const char *line = strstr(text, "\nTgid:");
        if (line)
            sscanf(line, "\nTgid: %d", &leader);
    }
    if (leader == pid)
        return 0;
    return mf_fail(err, EINVAL, "%d is a thread of process %d: give the number of the process", pid,
                   leader);
}

/** refuse_odd() - kernel threads and what has ended. Return: 0 for an ordinary process. */
static int refuse_odd(int proc_fd, pid_t pid, struct mf_error *err)
{
    char text[1024], name[64], state = '?';
    unsigned flags = 0;
    mf_target_comm(pid, name, sizeof(name));
    if (!read_at(proc_fd, "stat", text, sizeof(text)))
        return mf_fail(err, ESRCH, "there is no process %d", pid);
    /* "pid (comm) state ppid pgrp session tty_nr tpgid flags": the name may hold anything. */
    const char *after = strrchr(text, ')');
    if (after)
        sscanf(after + 1, " %c %*d %*d %*d %*d %*d %u", &state, &flags);
    if (flags & KERNEL_THREAD)
        return mf_fail(err, EINVAL, "%s (pid %d) is a kernel thread: it has no memory of its own",
                       name, pid);
    if (state == 'Z' || state == 'X')
        return mf_fail(err, ESRCH, "%s (pid %d) has ended; only its parent has not taken note yet",
                       name, pid);
    return 0;
}

static void watch_init(struct mf_watch *watch, pid_t pid)
{
    *watch = (struct mf_watch){
        .pid = pid, .pidfd = -1, .proc_fd = -1, .statm_fd = -1, .uffd = -1, .stale = true};
}

/** open_process() - the descriptors by which a process is known. */
static int open_process(struct mf_watch *watch, struct mf_error *err)
{
    watch->proc_fd = mf_observe_open(watch->pid, err);
    if (watch->proc_fd < 0)
        return watch->proc_fd;
    watch->pidfd = (int)syscall(SYS_pidfd_open, watch->pid, 0);
    if (watch->pidfd >= 0)
        return 0;
    int code = errno;
    int rc = refuse_thread(watch->proc_fd, watch->pid, err);
    if (rc < 0)
        return rc;
    if (code == ESRCH)
        return mf_fail(err, code, "there is no process %d", watch->pid);
    return mf_fail(err, code, "cannot get hold of process %d (pidfd_open): %s", watch->pid,
                   strerror(code));
}

int mf_watch_find(struct mf_watch *watch, pid_t pid, struct mf_error *err)
{
    watch_init(watch, pid);
    if (pid == getpid())
        return mf_fail(err, EDEADLK,
                       "a process can't watch itself: it would wait for its own word");
    int rc = open_process(watch, err);
    if (rc == 0)
        rc = refuse_odd(watch->proc_fd, pid, err);
    char text[64];
    if (rc == 0 && !read_at(watch->proc_fd, "syscall", text, sizeof(text)) &&
        (errno == EPERM || errno == EACCES)) {
        char name[64];
        mf_target_comm(pid, name, sizeof(name));
        rc = mf_fail(err, EPERM,
                     "not permitted to watch %s (pid %d): it takes root, or CAP_SYS_PTRACE with a "
                     "security module (Yama, AppArmor, SELinux) that allows it",
                     name, pid);
    }
    if (rc < 0)
        mf_watch_end(watch);
    return rc;
}

/* ------------------------------------------------------------------------------------- attaching
 */

/** attach_once() - Return: 0, or -errno with a sentence (-EBADF: an exec came in between). */
static int attach_once(struct mf_watch *watch, struct mf_error *err)
{
    int remote_fd;
    cleanup_close int uffd =
        mf_inject_watching_userfaultfd(watch->pid, watch->pidfd, &remote_fd, err);
    if (uffd < 0)
        return uffd;
    /* From here on nobody but us holds it. Were this to fail, a descriptor would stay behind in the
     * process that is registered with nothing and so does nothing. */
    int rc = mf_inject_close(watch->pid, remote_fd, err);
    if (rc == 0)
        rc = mf_uffd_api(uffd, MF_UFFD_FEATURES_WP | WATCH_EVENTS, 0, NULL, err);
    if (rc < 0)
        return rc;
    watch->uffd = mf_steal_fd(&uffd);
    watch->stale = true;
    return 0;
}

int mf_watch_attach(struct mf_watch *watch, struct mf_error *err)
{
    mf_watch_let_go(watch);
    uint64_t available;
    int rc = mf_uffd_features(&available, err);
    if (rc < 0)
        return rc;
    if (!(available & UFFD_FEATURE_WP_ASYNC))
        return mf_fail(err, EOPNOTSUPP,
                       "this kernel's userfaultfd can't watch memory without making the process "
                       "wait on its pages (WP_ASYNC): boot Linux 6.7 or newer");

    /* An exec in between closes the descriptor there: then once more, with what it is now. */
    for (unsigned tries = 0; (rc = attach_once(watch, err)) == -EBADF && tries < EXECS_MAX; tries++)
        ;
    return rc;
}

void mf_watch_adopt(struct mf_watch *watch, pid_t pid, int uffd)
{
    watch_init(watch, pid);
    watch->uffd = uffd;
    if (pid)
        open_process(watch, NULL);
}

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

void mf_watch_let_go(struct mf_watch *watch)
{
    if (watch->threads)
        mf_observe_cache_end(watch->threads);
    free(watch->threads);
    watch->threads = NULL;
    close_fd(&watch->uffd);
    close_fd(&watch->statm_fd);
    free(watch->maps);
    watch->maps = NULL;
    watch->count = 0;
    watch->total_pages = 0;
    watch->gone_since_ns = 0;
    mf_extents_free(&watch->ranges);
}

void mf_watch_end(struct mf_watch *watch)
{
    mf_watch_let_go(watch);
    close_fd(&watch->pidfd);
    close_fd(&watch->proc_fd);
}

bool mf_watch_has_ended(const struct mf_watch *watch)
{
    if (watch->pid == 0)
        return !mf_uffd_alive(watch->uffd);
    struct pollfd ended = {.fd = watch->pidfd, .events = POLLIN};
    return watch->pidfd < 0 || poll(&ended, 1, 0) > 0;
}

/** total_pages() - of the address space; 0 if the process has none. */
static uint64_t total_pages(struct mf_watch *watch)
{
    char text[128];
    if (watch->statm_fd < 0)
        watch->statm_fd = openat(watch->proc_fd, "statm", O_RDONLY | O_CLOEXEC);
    ssize_t length = watch->statm_fd >= 0 ? pread(watch->statm_fd, text, sizeof(text) - 1, 0) : -1;
    if (length <= 0)
        return 0;
    text[length] = '\0';
    return strtoull(text, NULL, 10);
}

bool mf_watch_has_memory(struct mf_watch *watch)
{
    return watch->pid && total_pages(watch) > 0;
}

bool mf_watch_grown(struct mf_watch *watch)
{
    return watch->pid && total_pages(watch) != watch->total_pages;
}

/* --------------------------------------------------------------------------- taking mappings up */

static bool same_mapping(const struct mf_watched *a, const struct mf_watched *b)
{
    return a->start_addr == b->start_addr && a->end_addr == b->end_addr &&
           a->offset_bytes == b->offset_bytes && a->device == b->device && a->inode == b->inode &&
           a->shared == b->shared;
}

/** take_up() - Return: 0 or the errno that refused it. */
static int take_up(int uffd, const struct mf_watched *one)
{
    struct uffdio_register reg = {
        .range = {.start = one->start_addr, .len = one->end_addr - one->start_addr},
        .mode = UFFDIO_REGISTER_MODE_WP};
    return ioctl(uffd, UFFDIO_REGISTER, &reg) == 0 ? 0 : errno;
}

/** meet() - go through the mappings that there are; watch what is new. Return: 0 or -ENOMEM. */
static int meet(struct mf_watch *watch, const struct mf_vma *vmas, size_t count,
                struct mf_extents *mapped)
{
    struct mf_watched *maps = calloc(count, sizeof(*maps));
    if (!maps)
        return -ENOMEM;
    size_t used = 0, before = 0;
    int rc = 0;
    for (size_t i = 0; i < count && rc == 0; i++) {
        struct mf_watched *one = &maps[used];
        *one = (struct mf_watched){.start_addr = vmas[i].start_addr,
                                   .end_addr = vmas[i].end_addr,
                                   .offset_bytes = vmas[i].offset_bytes,
                                   .device = vmas[i].device,
                                   .inode = vmas[i].inode,
                                   .shared = vmas[i].shared};
        if (one->start_addr >> 63)
            continue; /* [vsyscall] is the kernel's, and no mapping */
        used++;
        rc = mf_extents_add(mapped, one->start_addr, one->end_addr);
        while (before < watch->count && watch->maps[before].start_addr < one->start_addr)
            before++;
        const struct mf_watched *old = before < watch->count ? &watch->maps[before] : NULL;
        /* Another's userfaultfd may have let go of it meanwhile; the other reasons stay. */
        if (old && same_mapping(old, one) && old->refused != EBUSY) {
            one->refused = old->refused;
            continue;
        }
        one->refused = take_up(watch->uffd, one);
        /* Changed since the list was read; or special memory, then it will be the same again. */
        watch->stale |= one->refused == EINVAL;
        if (!one->refused && rc == 0)
            rc = mf_extents_add(&watch->ranges, one->start_addr, one->end_addr);
    }
    free(watch->maps);
    watch->maps = maps;
    watch->count = used;
    return rc;
}

/** subtract() - from the ranges that are watched. */
static int subtract(struct mf_watch *watch, const struct mf_extents *gone)
{
    struct mf_extents left = {0};
    int rc = mf_extents_minus(&watch->ranges, gone, &left);
    mf_extents_free(rc < 0 ? &left : &watch->ranges);
    if (rc == 0)
        watch->ranges = left;
    return rc;
}

/**
 * tell_gone() - of what is watched and not mapped any more.
 * An event that is on its way explains it, and so does the end of the address space; both are given
 * time to show. An unmapping is announced (mmap_changing) before /proc/PID/maps shows it.
 */
static int tell_gone(struct mf_watch *watch, const struct mf_extents *mapped, mf_watch_fn *fn,
                     void *arg)
{
    struct mf_extents gone = {0};
    int rc = mf_extents_minus(&watch->ranges, mapped, &gone);
    bool quiet = mf_uffd_event_pending(watch->uffd) == 0 && mf_uffd_alive(watch->uffd);
    if (rc < 0 || gone.count == 0) {
        watch->gone_since_ns = 0;
        mf_extents_free(&gone);
        return rc;
    }
    watch->stale = true; /* look again soon */
    if (!watch->gone_since_ns)
        watch->gone_since_ns = mf_now_ns();
    if (quiet && mf_now_ns() - watch->gone_since_ns > GONE_PATIENCE_NS) {
        rc = subtract(watch, &gone);
        for (size_t i = 0; i < gone.count && rc == 0; i++) {
            struct mf_change change = {.pid = watch->pid,
                                       .kind = MF_CHANGE_UNMAP,
                                       .start_addr = gone.list[i].start_bytes,
                                       .end_addr = gone.list[i].end_bytes};
            fn(watch, &change, -1, arg);
        }
        watch->gone_since_ns = 0;
    }
    mf_extents_free(&gone);
    return rc;
}

int mf_watch_scan(struct mf_watch *watch, mf_watch_fn *fn, void *arg)
{
    if (watch->uffd < 0 || !watch->pid)
        return watch->uffd < 0 ? -ESRCH : 0;
    uint64_t pages = total_pages(watch);
    cleanup_free struct mf_vma *vmas = NULL;
    size_t count = 0;
    struct mf_extents mapped = {0};
    watch->stale = false;
    int rc = mf_target_vmas(watch->pid, &vmas, &count, NULL);
    if (rc == 0)
        rc = meet(watch, vmas, count, &mapped);
    if (rc == 0)
        rc = tell_gone(watch, &mapped, fn, arg);
    if (rc == 0)
        watch->total_pages = pages;
    mf_extents_free(&mapped);
    return rc;
}

/** forget() - mappings that a change has touched: what is there now is seen by the next scan. */
static void forget(struct mf_watch *watch, uint64_t start_addr, uint64_t end_addr)
{
    size_t kept = 0;
    for (size_t i = 0; i < watch->count; i++) {
        if (watch->maps[i].end_addr <= start_addr || watch->maps[i].start_addr >= end_addr)
            watch->maps[kept++] = watch->maps[i];
    }
    watch->count = kept;
    watch->stale = true;
    struct mf_extent range = {.start_bytes = start_addr, .end_bytes = end_addr};
    subtract(watch,
             &(struct mf_extents){.list = &range, .count = start_addr < end_addr, .room = 1});
}

/* ---------------------------------------------------------------------------------- reading events
 */

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
        take_up(watch->uffd, &one);
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
    close_fd(&batch->forks_fd);
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
        if (mf_observe_cached(watch->proc_fd, watch->threads, batch->blocked, MF_OBSERVE_MAX,
                              &batch->seen) < 0)
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
    for (size_t i = 0; i < watch->count; i++) {
        const struct mf_watched *map = &watch->maps[i];
        if (map->inode && !map->shared && !map->refused) /* the program itself, or a library */
            return mf_owner_find(child_uffd, map->start_addr, map->end_addr);
    }
    return 0;
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
        forget(watch, change.start_addr, change.end_addr);
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
