/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib/observe.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "lib/util.h"

int mf_observe_open(pid_t pid, struct mf_error *err)
{
    char path[32];
    snprintf(path, sizeof(path), "/proc/%d", pid);
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd >= 0)
        return fd;
    if (errno == ENOENT)
        return mf_fail(err, ESRCH, "there is no process %d", pid);
    return mf_fail(err, errno, "cannot look at process %d (%s): %s", pid, path, strerror(errno));
}

/** struct subject - a process that is looked at. @woken: as mf_observe(). @cache: NULL for none. */
struct subject {
    int proc_fd;
    bool woken;
    struct mf_observe_cache *cache;
};

/** read_text() - a small file of a thread. Return: its length, or -errno. */
static ssize_t read_text(int proc_fd, pid_t tid, const char *file, char *text, size_t size)
{
    char path[48];
    snprintf(path, sizeof(path), "task/%d/%s", tid, file);
    cleanup_close int fd = openat(proc_fd, path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    ssize_t length = read(fd, text, size - 1);
    if (length < 0)
        return -errno;
    text[length] = '\0';
    return length;
}

/** struct runs - how often a thread has been switched to, and for how long it has run in all:
 * proc_pid_schedstat(5), or on kernels without it proc_pid_status(5), which tells the first only.
 */
struct runs {
    uint64_t switches, run_ns;
};

static struct runs runs_of(int proc_fd, pid_t tid)
{
    char text[4096];
    struct runs runs = {0};
    if (read_text(proc_fd, tid, "schedstat", text, sizeof(text)) > 0 &&
        sscanf(text, "%" SCNu64 " %*u %" SCNu64, &runs.run_ns, &runs.switches) == 2 &&
        runs.switches > 0)
        return runs;
    runs = (struct runs){0};
    if (read_text(proc_fd, tid, "status", text, sizeof(text)) > 0) {
        const char *wanted = "\nvoluntary_ctxt_switches:";
        const char *at = strstr(text, wanted);
        runs.switches = at ? strtoull(at + strlen(wanted), NULL, 10) : 0;
    }
    return runs;
}

enum waits { WAITS_NOT, WAITS_PERHAPS, WAITS_SURELY };

/** waits_for_reader() - does the thread wait for an event to be read? By the function it sleeps in
 * (fs/userfaultfd.c): userfaultfd_event_wait_completion(), or whichever it was inlined into, all of
 * which bear userfaultfd_ in their names; one that waits for a page sleeps in handle_userfault().
 */
static enum waits waits_for_reader(int proc_fd, pid_t tid)
{
    char where[128];
    if (read_text(proc_fd, tid, "wchan", where, sizeof(where)) <= 0 || strcmp(where, "0") == 0)
        return WAITS_PERHAPS; /* kernels without symbols, or not permitted */
    return strstr(where, "userfaultfd_") ? WAITS_SURELY : WAITS_NOT;
}

void mf_observe_cache_init(struct mf_observe_cache *cache)
{
    for (size_t i = 0; i < MF_OBSERVE_SLOTS; i++)
        cache->slot[i] = (struct mf_observe_slot){.fd = -1};
}

void mf_observe_cache_end(struct mf_observe_cache *cache)
{
    for (size_t i = 0; i < MF_OBSERVE_SLOTS; i++) {
        if (cache->slot[i].fd >= 0)
            close(cache->slot[i].fd);
    }
    mf_observe_cache_init(cache);
}

/** read_syscall() - /proc/PID/task/TID/syscall, which is read again and again: by a descriptor that
 * stays open where there is a cache. It stays this thread's also when the id is used again. */
static ssize_t read_syscall(const struct subject *of, pid_t tid, char *text, size_t size)
{
    if (!of->cache)
        return read_text(of->proc_fd, tid, "syscall", text, size);
    struct mf_observe_slot *slot = &of->cache->slot[(unsigned)tid % MF_OBSERVE_SLOTS];
    for (bool fresh = false;; fresh = true) {
        if (slot->fd < 0 || slot->tid != tid) {
            char path[48];
            snprintf(path, sizeof(path), "task/%d/syscall", tid);
            if (slot->fd >= 0)
                close(slot->fd);
            *slot = (struct mf_observe_slot){.tid = tid,
                                             .fd = openat(of->proc_fd, path, O_RDONLY | O_CLOEXEC)};
            if (slot->fd < 0)
                return -errno;
            fresh = true;
        }
        ssize_t length = pread(slot->fd, text, size - 1, 0);
        if (length >= 0) {
            text[length] = '\0';
            return length;
        }
        int code = errno;
        close(slot->fd);
        slot->fd = -1;
        if (fresh || code != ESRCH)
            return -code;
    }
}

/** read_call() - which call a thread is blocked in. "running", "-1 SP PC" (blocked, but not in a
 * call), or "NUMBER ARGUMENT×6 SP PC". @any: false: only calls that can lead to an event as far as
 * is known. Return: 1 with @out filled, 0 if it runs, -EAGAIN if it is blocked elsewhere, or
 * -errno. */
static int read_call(const struct subject *of, pid_t tid, bool any, struct mf_blocked *out)
{
    char text[256];
    ssize_t length = read_syscall(of, tid, text, sizeof(text));
    if (length < 0)
        return (int)length;
    if (text[0] == 'r')
        return 0;
    *out = (struct mf_blocked){.tid = tid, .number = strtol(text, NULL, 10)};
    if (out->number < 0 || (!any && !mf_blocked_relevant(out->number)))
        return -EAGAIN;
    return sscanf(text, "%ld %" SCNx64 " %" SCNx64 " %" SCNx64 " %" SCNx64 " %" SCNx64 " %" SCNx64,
                  &out->number, &out->args[0], &out->args[1], &out->args[2], &out->args[3],
                  &out->args[4], &out->args[5]) == 7
               ? 1
               : -EAGAIN;
}

static bool same_call(const struct mf_blocked *a, const struct mf_blocked *b)
{
    return a->number == b->number && memcmp(a->args, b->args, sizeof(a->args)) == 0;
}

enum sight {
    SEEN_RUNNING,
    SEEN_UNCLEAR, /**< SEEN_RUNNING or SEEN_WOKEN: nobody may read its stack */
    SEEN_WAITING,
    SEEN_ELSEWHERE,
    SEEN_WOKEN, /**< inside the wait, but not asleep: it goes on, or to sleep again */
};

/** running() - a thread that can run: is it still inside the wait? While it waits for a CPU its
 * stack shows so (proc_pid_stack(5), for which CAP_SYS_ADMIN is needed). */
static enum sight running(int proc_fd, pid_t tid)
{
    char stack[2048];
    ssize_t length = read_text(proc_fd, tid, "stack", stack, sizeof(stack));
    if (length < 0)
        return SEEN_UNCLEAR;
    return length > 0 && strstr(stack, "userfaultfd_") ? SEEN_WOKEN : SEEN_RUNNING;
}

/** look_at() - one thread. @any: as read_call(). Return: an enum sight, @out filled if it waits, or
 * -errno. */
static int look_at(const struct subject *of, pid_t tid, bool any, struct mf_blocked *out)
{
    const int proc_fd = of->proc_fd;
    int rc = read_call(of, tid, any, out);
    if (rc == 0)
        return (int)running(proc_fd, tid);
    if (rc < 0)
        return rc == -EAGAIN ? SEEN_ELSEWHERE : rc;
    enum waits waits = waits_for_reader(proc_fd, tid);
    if (waits == WAITS_PERHAPS) {
        /* No name is also what a thread shows that has begun to run meanwhile. */
        struct mf_blocked again;
        rc = read_call(of, tid, any, &again);
        if (rc <= 0 || !same_call(out, &again))
            return rc < 0 && rc != -EAGAIN ? rc : SEEN_WOKEN;
    }
    if (waits == WAITS_NOT || (waits == WAITS_PERHAPS && !mf_blocked_relevant(out->number)))
        return SEEN_ELSEWHERE;
    struct runs runs = runs_of(proc_fd, tid);
    out->certain = waits == WAITS_SURELY;
    out->switches = runs.switches;
    out->run_ns = runs.run_ns;
    return SEEN_WAITING;
}

#define RUNNERS 512u
#define REALLY_RUNS_NS 50000u /**< more than it takes to look and sleep again */

/** struct runners - threads that were seen running, and for how long they had run by then. A place
 * is a thread's by its number; who finds it taken is left out. */
struct runners {
    struct {
        pid_t tid;
        uint64_t run_ns;
    } seen[RUNNERS];
};

/** perhaps_woken() - of a thread whose stack nobody may read: if it can run, and has not run since
 * it was first seen so, it is perhaps still inside the wait. */
static bool perhaps_woken(int proc_fd, struct runners *runners, pid_t tid)
{
    const uint64_t run_ns = runs_of(proc_fd, tid).run_ns;
    const unsigned at = (unsigned)tid % RUNNERS;
    if (run_ns == 0)
        return false; /* the kernel does not count */
    if (!runners->seen[at].tid) {
        runners->seen[at].tid = tid;
        runners->seen[at].run_ns = run_ns;
    }
    return runners->seen[at].tid == tid && run_ns <= runners->seen[at].run_ns + REALLY_RUNS_NS;
}

/** struct dirent64_head - what getdents64(2) gives, before the name. */
struct dirent64_head {
    uint64_t inode;
    int64_t offset;
    uint16_t length_bytes;
    uint8_t type;
};
#define DIRENT_NAME 19 /**< where the name begins */

/** struct pass - one look at the threads, in the order in which /proc lists them: that of their
 * creation.
 * @any:    as read_call().
 * @woken:  how many are about to wait again, or to go on; perhaps (perhaps_woken()).
 * @last_waiter, @last: the last one that waits, and the last of all; 0: none.
 * @others_free: of those for whom there was no room one may free a file's pages.
 */
struct pass {
    bool any, others_free;
    size_t woken;
    pid_t last_waiter, last;
};

/** make_room() - for a waiter that may free a file's pages, in the place of one that does not.
 * @from: where to look for one; all before it free. Return: true if there was one. */
static bool make_room(struct mf_blocked *blocked, size_t max, size_t *from,
                      const struct mf_blocked *waiter)
{
    while (*from < max && mf_blocked_frees(&blocked[*from]))
        ++*from;
    if (*from == max)
        return false;
    blocked[(*from)++] = *waiter;
    return true;
}

/** look() - at all threads, or, given a @before, at those of which it could not be sure: who was
 * looked at after its last waiter was seen, and did not wait, has queued later than any of its
 * waiters. Newer threads are at the end. Return: how many wait (at most @max were written), or
 * -errno (-EAGAIN: not without looking at all).
 * Not by readdir(3), which allocates: a process that looks at itself may have a thread in fork(3),
 * which holds the allocator's locks until its event is read. */
static ssize_t look(const struct subject *of, const struct pass *before, struct pass *pass,
                    struct runners *runners, struct mf_blocked *blocked, size_t max)
{
    pass->woken = 0;
    pass->last_waiter = pass->last = 0;
    pass->others_free = false;
    cleanup_close int task = openat(of->proc_fd, "task", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (task < 0)
        return errno == ENOENT ? -ESRCH : -errno;
    _Alignas(8) char entries[4096];
    size_t count = 0, replaceable = 0;
    bool skipping = false;
    struct mf_blocked one;
    for (long length; (length = syscall(SYS_getdents64, task, entries, sizeof(entries))) != 0;) {
        if (length < 0)
            return errno == ENOENT ? -ESRCH : -errno;
        struct dirent64_head head;
        for (const char *at = entries; at < entries + length; at += head.length_bytes) {
            memcpy(&head, at, sizeof(head));
            pid_t tid = (pid_t)strtol(at + DIRENT_NAME, NULL, 10);
            if (tid <= 0)
                continue;
            pass->last = tid;
            if (skipping) {
                skipping = tid != before->last;
                continue;
            }
            if (before && tid == before->last_waiter)
                skipping = tid != before->last;
            int rc = look_at(of, tid, pass->any, &one);
            if (rc == -ENOENT || rc == -ESRCH)
                continue; /* it has ended */
            if (rc < 0)
                return rc;
            pass->woken += rc == SEEN_WOKEN;
            pass->woken +=
                rc == SEEN_UNCLEAR && of->woken && perhaps_woken(of->proc_fd, runners, tid);
            if (rc != SEEN_WAITING)
                continue;
            pass->last_waiter = tid;
            if (count < max)
                blocked[count] = one;
            else if (mf_blocked_frees(&one) && !make_room(blocked, max, &replaceable, &one))
                pass->others_free = true;
            count++;
        }
    }
    return skipping ? -EAGAIN : (ssize_t)count;
}

/* A thread that was woken gets to a CPU sooner or later, and on a busy machine later. */
#define WOKEN_LIMIT_NS UINT64_C(1000000000)
#define SETTLE_LIMIT_NS UINT64_C(200000000)
#define SPURIOUS_RUN_NS 200000u /**< more than it takes to look and sleep again */

/** look_settled() - look until nobody is in between. Reading a message wakes all who wait; those
 * whose it was not sleep again, as soon as they get to a CPU. Until then their call can't be seen.
 */
static ssize_t look_settled(const struct subject *of, const struct pass *before, struct pass *pass,
                            struct mf_blocked *blocked, size_t max)
{
    uint64_t start_ns = mf_now_ns();
    long pause_ns = 5000;
    struct runners runners;
    memset(&runners, 0, sizeof(runners));
    for (;;) {
        ssize_t count = look(of, before, pass, &runners, blocked, max);
        if (count == -EAGAIN) {
            before = NULL;
            continue;
        }
        if (count < 0 || pass->woken == 0 || mf_now_ns() - start_ns > WOKEN_LIMIT_NS)
            return count;
        nanosleep(&(struct timespec){.tv_nsec = pause_ns}, NULL);
        pause_ns = pause_ns < 1000000 ? pause_ns * 2 : pause_ns;
    }
}

/** struct seen - a wait of the first look. */
struct seen {
    pid_t tid;
    uint64_t switches;
};

int mf_observe(int proc_fd, bool woken, struct mf_blocked *blocked, size_t max,
               struct mf_observation *out)
{
    return mf_observe_cached(proc_fd, NULL, woken, blocked, max, out);
}

int mf_observe_cached(int proc_fd, struct mf_observe_cache *cache, bool woken,
                      struct mf_blocked *blocked, size_t max, struct mf_observation *out)
{
    const struct subject of = {.proc_fd = proc_fd, .woken = woken, .cache = cache};
    struct seen before[MF_OBSERVE_MAX];
    if (max > MF_OBSERVE_MAX)
        max = MF_OBSERVE_MAX;
    *out = (struct mf_observation){.complete = true};
    struct pass pass = {.any = false}, again;
    ssize_t first = look_settled(&of, NULL, &pass, blocked, max);
    if (first == 0) {
        pass.any = true; /* a driver's ioctl(2), say: takes looking at every thread more closely */
        first = look_settled(&of, NULL, &pass, blocked, max);
    }
    out->unsettled = pass.woken > 0;
    if (first <= 0)
        return (int)first;
    size_t before_count = (size_t)first < max ? (size_t)first : max;
    for (size_t i = 0; i < before_count; i++)
        before[i] = (struct seen){.tid = blocked[i].tid, .switches = blocked[i].switches};

    again.any = pass.any;
    ssize_t second = look_settled(&of, &pass, &again, blocked, max);
    if (second < 0)
        return (int)second;
    out->complete = (size_t)first <= max && (size_t)second <= max;
    out->others_free = again.others_free;
    out->count = (size_t)second < max ? (size_t)second : max;
    /* Only a wait that both have seen: another was perhaps for a lock. */
    for (size_t i = 0; i < out->count; i++) {
        bool seen = false;
        for (size_t k = 0; k < before_count && !seen; k++)
            seen = before[k].tid == blocked[i].tid && before[k].switches == blocked[i].switches;
        out->readable += seen;
    }
    /* What is read may be from one of those, who queued before all others perhaps. */
    out->unsettled = pass.woken > 0 || again.woken > 0;
    if (out->unsettled)
        out->readable = 0;
    return 0;
}

/**
 * has_gone_on() - is it this one's message that was read?
 * Reading one message wakes all who wait (fs/userfaultfd.c, userfaultfd_event_complete()): those
 * whose message it was not look at it and sleep again, in a few microseconds.
 * Return: 1 it has gone on, 0 it waits (still or again), -1 it can't be told yet.
 */
static int has_gone_on(int proc_fd, const struct mf_blocked *before)
{
    struct mf_blocked now;
    cleanup_close int own_fd = proc_fd < 0 ? mf_observe_open(before->tid, NULL) : -1;
    if (proc_fd < 0)
        proc_fd = own_fd;
    const struct subject of = {.proc_fd = proc_fd};
    int rc = look_at(&of, before->tid, true, &now);
    if (rc < 0 || rc == SEEN_ELSEWHERE)
        return 1;
    if (rc == SEEN_WAITING) {
        if (!same_call(&now, before))
            return 1;
        return now.switches != before->switches ? 0 : -1;
    }
    if (rc == SEEN_WOKEN)
        return -1;
    /* Running: to look and sleep again, or on and on? */
    return runs_of(proc_fd, before->tid).run_ns > before->run_ns + SPURIOUS_RUN_NS ? 1 : -1;
}

bool mf_observe_settle(int proc_fd, struct mf_blocked *blocked, size_t count,
                       struct mf_change *change)
{
    uint64_t start_ns = mf_now_ns();
    size_t candidates = 0;
    long pause_ns = 10000;
    for (size_t i = 0; i < count; i++)
        candidates += blocked[i].candidate;
    for (;;) {
        ssize_t who = -1;
        size_t gone_on = 0, wait = 0;
        for (size_t i = 0; i < count; i++) {
            int rc = blocked[i].candidate ? has_gone_on(proc_fd, &blocked[i]) : -1;
            gone_on += rc == 1;
            wait += rc == 0;
            who = rc == 1 ? (ssize_t)i : who;
        }
        bool told = gone_on == 1 && wait == candidates - 1;
        /* All wait: whoever went on was back in an equal call before it was looked at. */
        if (told || gone_on > 1 || wait == candidates || mf_now_ns() - start_ns > SETTLE_LIMIT_NS) {
            mf_change_settle(blocked, count, told ? who : -1, change);
            return told;
        }
        nanosleep(&(struct timespec){.tv_nsec = pause_ns}, NULL);
        pause_ns = pause_ns < 1000000 ? pause_ns * 2 : pause_ns;
    }
}
