/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib/watch_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>

#include "lib/inject.h"
#include "lib/observe.h"
#include "lib/owner.h"
#include "lib/proc_stat.h"
#include "lib/target.h"
#include "lib/uffd.h"
#include "lib/util.h"
#include "lib/withdraw.h"

#define WATCH_EVENTS                                                                               \
    (UFFD_FEATURE_EVENT_UNMAP | UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_EVENT_REMOVE |             \
     UFFD_FEATURE_EVENT_FORK)
#define ATTACH_TRIES 5 /**< of a process that executes something or forks meanwhile */
#define GONE_PATIENCE_NS                                                                           \
    UINT64_C(100000000)         /**< for an exec to show, which takes memory away too */
#define KERNEL_THREAD 0x200000u /**< PF_KTHREAD of linux/sched.h, in proc_pid_stat(5)'s flags */

void mf_watch_close(int *fd)
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
    char name[64];
    struct mf_proc_stat stat;
    mf_target_comm(pid, name, sizeof(name));
    if (mf_proc_stat(pid, 0, &stat) < 0)
        return mf_fail(err, ESRCH, "there is no process %d", pid);
    if (stat.flags & KERNEL_THREAD)
        return mf_fail(err, EINVAL, "%s (pid %d) is a kernel thread: it has no memory of its own",
                       name, pid);
    struct stat tasks;
    /* proc_pid_task(5): two links and one for each thread, this one included. */
    if (stat.state == 'Z' && fstatat(proc_fd, "task", &tasks, 0) == 0 && tasks.st_nlink > 3)
        return mf_fail(err, ENOTSUP,
                       "the first thread of %s (pid %d) has ended while others go on: the kernel "
                       "shows no memory of such a process",
                       name, pid);
    if (stat.state == 'Z' || stat.state == 'X')
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

/** attach_once() - Return: 0, or -errno with a sentence (-EBADF: an exec came in between, -EBUSY: a
 * fork). */
static int attach_once(struct mf_watch *watch, struct mf_error *err)
{
    int remote_fd;
    cleanup_close int uffd =
        mf_inject_watching_userfaultfd(watch->pid, watch->pidfd, &remote_fd, err);
    if (uffd < 0)
        return uffd;
    int rc = mf_uffd_api(uffd, MF_UFFD_FEATURES_WP | WATCH_EVENTS, 0, NULL, err);
    if (rc < 0) {
        mf_inject_close(watch->pid, remote_fd, NULL);
        return rc;
    }
    /* From here on nobody but us holds it. Were this to fail, a descriptor would stay behind
     * somewhere that is registered with nothing and so does nothing. */
    rc = mf_withdraw(watch->pid, uffd, remote_fd, err);
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
    unsigned tries = 0;
    do
        rc = attach_once(watch, err);
    while ((rc == -EBADF || rc == -EBUSY) && ++tries < ATTACH_TRIES);
    return rc;
}

void mf_watch_adopt(struct mf_watch *watch, const struct mf_watch *parent, pid_t pid, int uffd)
{
    watch_init(watch, pid);
    watch->uffd = uffd;
    watch->mark = mf_watch_mark(parent);
    if (pid)
        open_process(watch, NULL);
}

struct mf_extent mf_watch_mark(const struct mf_watch *watch)
{
    for (size_t i = 0; i < watch->count; i++) {
        const struct mf_watched *map = &watch->maps[i];
        if (map->inode && !map->shared && !map->refused) /* the program itself, or a library */
            return (struct mf_extent){.start_bytes = map->start_addr, .end_bytes = map->end_addr};
    }
    return watch->mark; /* of one that has not been looked at itself */
}

void mf_watch_identify(struct mf_watch *watch)
{
    if (watch->pid || watch->mark.start_bytes >= watch->mark.end_bytes ||
        !mf_uffd_alive(watch->uffd))
        return;
    watch->pid = mf_owner_find(watch->uffd, watch->mark.start_bytes, watch->mark.end_bytes);
    if (watch->pid)
        open_process(watch, NULL);
    watch->stale = true;
}

void mf_watch_let_go(struct mf_watch *watch)
{
    if (watch->threads)
        mf_observe_cache_end(watch->threads);
    free(watch->threads);
    watch->threads = NULL;
    mf_watch_close(&watch->uffd);
    mf_watch_close(&watch->statm_fd);
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
    mf_watch_close(&watch->pidfd);
    mf_watch_close(&watch->proc_fd);
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

int mf_watch_take_up(int uffd, const struct mf_watched *one)
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
        one->refused = mf_watch_take_up(watch->uffd, one);
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

void mf_watch_forget(struct mf_watch *watch, uint64_t start_addr, uint64_t end_addr)
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
