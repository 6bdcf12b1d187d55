/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Theory of operation: a userfaultfd made inside a process that knows nothing of it.
 *
 * How a system call is run in a stopped thread is told at the top of tracee.c. Here is what stands
 * around it:
 *
 * A helper process. While a thread has borrowed registers its tracer must not die: the kernel would
 * let the thread go on with them. memferryd may be killed at any moment, so the tracing is done by
 * a child in a session of its own, with all signals blocked, that ends when it is done. Its end is
 * also what lets go of threads that were asked to stop and have not: the kernel takes the request
 * back. If memferryd is gone, or has given up waiting, by the time the helper has its descriptor,
 * the helper closes it again in the target.
 *
 * Which thread. Best is one that waits in a system call that the kernel restarts without a trace
 * (poll, futex, nanosleep, read, …); then any other wait; then a running thread; last a KVM vCPU,
 * whose stop the guest would feel, and what can't be interrupted (state D). Threads are asked one
 * after another, those asked earlier stay asked, the first one to stop is taken. 2 s in all.
 */
#include "lib/inject.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>

#include "lib/proc_stat.h"
#include "lib/target.h"
#include "lib/tracee.h"
#include "lib/uapi.h"
#include "lib/util.h"

#define STOP_LIMIT_NS 2000000000u /**< for a thread to be found and stopped */
#define NEXT_THREAD_NS 20000000u  /**< before another thread is asked as well */
#define HELPER_LIMIT_MS 5000      /**< who asks gives up; the helper still puts things right */
#define LATE_MAX 64               /**< helpers that were given up and are not reaped yet */
#define THREADS_MAX 512           /**< looked at; a VMM has one a vCPU and a few more */
#define SEIZED_MAX 16             /**< asked to stop at the same time */
#define DYING_MS 50 /**< a process that does not answer as it should may be about to end */
#define KVM_RUN_REQUEST UINT64_C(0xae80) /**< ioctl request of a vCPU thread: linux/kvm.h */

/* -------------------------------------------------------------------------------- which thread */

enum rank { RANK_RESTARTS, RANK_WAITS, RANK_RUNS, RANK_VCPU, RANK_STUCK, RANK_NEVER };

struct thread {
    pid_t tid;
    enum rank rank;
};

/** restarts_silently() - signal(7): is this call restarted after a stop, whatever its arguments? */
static bool restarts_silently(long number)
{
    static const long good[] = {
#ifdef SYS_poll
        SYS_poll,          SYS_select,          SYS_pause,
#endif
        SYS_ppoll,         SYS_pselect6,        SYS_futex,
        SYS_nanosleep,     SYS_clock_nanosleep, SYS_restart_syscall,
        SYS_read,          SYS_wait4,           SYS_waitid,
        SYS_rt_sigsuspend,
    };
    for (size_t i = 0; i < sizeof(good) / sizeof(good[0]); i++) {
        if (good[i] == number)
            return true;
    }
    return false;
}

static bool read_line(const char *path, char *line, int size)
{
    cleanup_fclose FILE *f = fopen(path, "re");
    return f && fgets(line, size, f);
}

static enum rank thread_rank(pid_t pid, pid_t tid)
{
    char path[64], line[512];

    struct mf_proc_stat stat;
    if (mf_proc_stat(pid, tid, &stat) < 0 || stat.state == 'Z' || stat.state == 'X')
        return RANK_NEVER;
    if (stat.state == 'D')
        return RANK_STUCK;

    /* proc_pid_syscall(5): "running", or the call's number (-1: blocked, but not in a call),
     * arguments. */
    snprintf(path, sizeof(path), "/proc/%d/task/%d/syscall", pid, tid);
    long number;
    uint64_t request = 0;
    if (!read_line(path, line, sizeof(line)) ||
        sscanf(line, "%ld %*x %" SCNx64, &number, &request) < 1 || number < 0)
        return RANK_RUNS;
    if (number == SYS_ioctl)
        return request == KVM_RUN_REQUEST ? RANK_VCPU : RANK_WAITS;
    return restarts_silently(number) ? RANK_RESTARTS : RANK_WAITS;
}

static int by_rank(const void *a, const void *b)
{
    const struct thread *x = a, *y = b;
    return x->rank != y->rank ? (int)x->rank - (int)y->rank : (x->tid > y->tid) - (x->tid < y->tid);
}

/** list_threads() - best first. Return: how many can be tried, 0 if the process has none left. */
static size_t list_threads(pid_t pid, struct thread *threads)
{
    char path[64];
    snprintf(path, sizeof(path), "/proc/%d/task", pid);
    cleanup_closedir DIR *dir = opendir(path);
    size_t count = 0;
    for (struct dirent *entry; dir && count < THREADS_MAX && (entry = readdir(dir));) {
        pid_t tid = (pid_t)strtol(entry->d_name, NULL, 10);
        enum rank rank = tid > 0 ? thread_rank(pid, tid) : RANK_NEVER;
        if (rank != RANK_NEVER)
            threads[count++] = (struct thread){.tid = tid, .rank = rank};
    }
    if (count)
        qsort(threads, count, sizeof(threads[0]), by_rank);
    return count;
}

static void find_vdso(pid_t pid, uint64_t *addr, uint64_t *length_bytes)
{
    cleanup_free struct mf_vma *vmas = NULL;
    size_t count = 0;
    *addr = *length_bytes = 0;
    if (mf_target_vmas(pid, &vmas, &count, NULL) < 0)
        return;
    for (size_t i = 0; i < count; i++) {
        if (strcmp(vmas[i].path, "[vdso]") == 0) {
            *addr = vmas[i].start_addr;
            *length_bytes = vmas[i].end_addr - vmas[i].start_addr;
        }
    }
}

/* -------------------------------------------------------------------------------- in the helper */

struct call {
    pid_t pid;
    int pidfd;
    long number;
    uint64_t args[3];
};

/** has_ended() - has the process exited, or does it within @wait_ms? A killed process loses its
 * descriptors and threads a little before that shows. */
static bool has_ended(int pidfd, int wait_ms)
{
    struct pollfd ended = {.fd = pidfd, .events = POLLIN};
    return poll(&ended, 1, wait_ms) > 0;
}

/** run_in() - the thread stands still: run the call there. */
static int run_in(const struct call *call, pid_t tid, int64_t *result, struct mf_error *err)
{
    uint64_t vdso_addr, vdso_bytes;
    find_vdso(call->pid, &vdso_addr, &vdso_bytes);
    return mf_tracee_run(call->pid, tid, vdso_addr, vdso_bytes, call->number, call->args, result,
                         err);
}

/** first_stopped() - wait up to @limit_ns for one of the seized threads; the gone are struck out.
 */
static pid_t first_stopped(pid_t *seized, size_t *count, uint64_t limit_ns)
{
    uint64_t start_ns = mf_now_ns();
    for (;;) {
        for (size_t i = 0; i < *count; i++) {
            int rc = mf_tracee_stopped(seized[i]);
            if (rc == 0)
                continue;
            pid_t tid = seized[i];
            seized[i] = seized[--*count];
            if (rc > 0)
                return tid;
            i--;
        }
        uint64_t waited_ns = mf_now_ns() - start_ns;
        if (*count == 0 || waited_ns > limit_ns)
            return 0;
        if (waited_ns < 200000)
            sched_yield();
        else
            nanosleep(&(struct timespec){.tv_nsec = 100000}, NULL);
    }
}

/** run_in_any() - stop a thread, the best that can be had within 2 s, and run the call in it. */
static int run_in_any(const struct call *call, int64_t *result, struct mf_error *err)
{
    struct thread threads[THREADS_MAX];
    pid_t seized[SEIZED_MAX];
    size_t seized_count = 0;
    struct mf_error odd = {0}; /* threads stop, but are none to be borrowed: why */
    char name[64];
    uint64_t start_ns = mf_now_ns();

    mf_target_comm(call->pid, name, sizeof(name));
    do {
        size_t count = list_threads(call->pid, threads);
        if (count == 0 || has_ended(call->pidfd, 0))
            return mf_fail(err, ESRCH, "%s (pid %d) is gone", name, call->pid);
        int refusal = 0; /* of the last thread that would not have us; its sentence is in err */
        for (size_t i = 0; i <= count; i++) {
            bool last = i == count || seized_count == SEIZED_MAX;
            if (!last) {
                struct mf_error why = {0};
                bool again = false;
                for (size_t k = 0; k < seized_count; k++)
                    again |= seized[k] == threads[i].tid;
                int rc = again ? 0 : mf_tracee_seize(call->pid, threads[i].tid, &why);
                if (rc < 0) {
                    if (rc != -ESRCH) {
                        refusal = rc;
                        if (err)
                            *err = why;
                    }
                    continue;
                }
                if (!again)
                    seized[seized_count++] = threads[i].tid;
            }
            uint64_t left_ns = STOP_LIMIT_NS - (mf_now_ns() - start_ns);
            if (left_ns > STOP_LIMIT_NS)
                left_ns = 0;
            pid_t tid = first_stopped(seized, &seized_count, last ? left_ns : NEXT_THREAD_NS);
            if (tid) {
                struct mf_error why = {0};
                int rc = run_in(call, tid, result, &why);
                if (rc == -EAGAIN) {
                    odd = why;
                } else if (rc != -ESRCH || has_ended(call->pidfd, 0)) {
                    /* A thread may also end while its process goes on. */
                    if (rc < 0 && err)
                        *err = why;
                    return rc;
                }
            }
            if (last)
                break;
        }
        if (refusal && seized_count == 0)
            return refusal;
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    } while (mf_now_ns() - start_ns < STOP_LIMIT_NS);
    if (odd.code)
        return mf_fail(err, ETIMEDOUT, "%s", odd.text);
    return mf_fail(
        err, ETIMEDOUT,
        "no thread of %s (pid %d) could be stopped within 2 s: it hangs in the kernel (a dead "
        "network file system or disk?) or its cgroup is frozen",
        name, call->pid);
}

/** What the helper sends back, in one write (less than PIPE_BUF). */
struct reply {
    int rc;
    int64_t result;
    struct mf_error err;
};

static _Noreturn void helper(struct call call, int pipe_fd)
{
    /* Keep the two descriptors in use and nothing of memferryd's: a helper may outlive it. */
    int out = fcntl(pipe_fd, F_DUPFD_CLOEXEC, 10);
    int pidfd = fcntl(call.pidfd, F_DUPFD_CLOEXEC, 10);
    struct reply reply = {0};
    if (out < 0 || pidfd < 0)
        _exit(1);
    dup2(out, 3);
    dup2(pidfd, 4);
    close_range(5, ~0u, 0);
    call.pidfd = 4;
    setsid();
    prctl(PR_SET_NAME, "memferry-attach");
    prctl(PR_SET_TIMERSLACK, 1);

    reply.rc = run_in_any(&call, &reply.result, &reply.err);
    ssize_t written = write(3, &reply, sizeof(reply));
    if (written < 0 && reply.rc == 0 && reply.result >= 0 && call.number == SYS_userfaultfd) {
        /* Nobody is left to use it. */
        call.number = SYS_close;
        call.args[0] = (uint64_t)reply.result;
        run_in_any(&call, &reply.result, NULL);
    }
    _exit(0);
}

static struct {
    pthread_mutex_t lock;
    pid_t pid[LATE_MAX];
    size_t count;
} late = {.lock = PTHREAD_MUTEX_INITIALIZER};

/** reap_late() - helpers that have ended after they were given up; and @helper, not 0, is one more
 * to remember. */
static void reap_late(pid_t helper)
{
    pthread_mutex_lock(&late.lock);
    size_t kept = 0;
    for (size_t i = 0; i < late.count; i++) {
        if (waitpid(late.pid[i], NULL, WNOHANG) == 0)
            late.pid[kept++] = late.pid[i];
    }
    late.count = kept;
    if (helper && late.count < LATE_MAX)
        late.pid[late.count++] = helper;
    pthread_mutex_unlock(&late.lock);
}

/** run_by_helper() - see the top. Return: 0 with @result filled, or -errno with a sentence. */
static int run_by_helper(const struct call *call, int64_t *result, struct mf_error *err)
{
    if (!mf_tracee_supported())
        return mf_fail(
            err, ENOSYS,
            "attaching to a process that does not cooperate is implemented for x86-64 only");
    reap_late(0);
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) != 0)
        return mf_fail(err, errno, "cannot make a pipe: %s", strerror(errno));
    cleanup_close int in = ends[0];
    cleanup_close int out = ends[1];

    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pid_t child = fork();
    if (child == 0)
        helper(*call, out);
    int code = errno;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (child < 0)
        return mf_fail(err, code, "cannot start the helper that attaches: %s", strerror(code));
    close(mf_steal_fd(&out));

    struct pollfd ready = {.fd = in, .events = POLLIN};
    uint64_t start_ns = mf_now_ns();
    for (int left_ms = HELPER_LIMIT_MS; left_ms > 0;
         left_ms = HELPER_LIMIT_MS - (int)((mf_now_ns() - start_ns) / 1000000)) {
        if (poll(&ready, 1, left_ms) >= 0 || errno != EINTR)
            break;
    }
    struct reply reply;
    if (!(ready.revents & (POLLIN | POLLHUP))) {
        reap_late(child); /* when somebody is attached to next */
        return mf_fail(err, ETIMEDOUT,
                       "pid %d is stuck in the kernel: attaching to it was given up", call->pid);
    }
    ssize_t got = read(in, &reply, sizeof(reply));
    while (waitpid(child, NULL, 0) < 0 && errno == EINTR)
        ;
    if (got != (ssize_t)sizeof(reply))
        return mf_fail(
            err, EIO,
            "the helper that attaches to pid %d was killed; nothing else is wrong with it",
            call->pid);
    if (reply.rc < 0)
        return mf_fail(err, -reply.rc, "%s", reply.err.text);
    *result = reply.result;
    return 0;
}

/* ---------------------------------------------------------------------------------- public part */

/** is_userfaultfd() - descriptor @fd of @pid (0: ourselves). */
static bool is_userfaultfd(pid_t pid, int fd)
{
    static const char wanted[] = "anon_inode:[userfaultfd]";
    char path[64], link[64];
    if (pid)
        snprintf(path, sizeof(path), "/proc/%d/fd/%d", pid, fd);
    else
        snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    ssize_t length = readlink(path, link, sizeof(link) - 1);
    if (length < 0)
        return false;
    link[length] = '\0';
    return strcmp(link, wanted) == 0;
}

int mf_uffd_fetch(pid_t pid, int pidfd, int remote_fd, struct mf_error *err)
{
    char name[64];
    mf_target_comm(pid, name, sizeof(name));
    if (remote_fd < 0 || !is_userfaultfd(pid, remote_fd)) {
        if (has_ended(pidfd, DYING_MS))
            return mf_fail(err, ESRCH, "%s (pid %d) is gone", name, pid);
        return mf_fail(err, EBADF, "descriptor %d of %s (pid %d) is not a userfaultfd", remote_fd,
                       name, pid);
    }
    int fd = (int)syscall(SYS_pidfd_getfd, pidfd, remote_fd, 0);
    if (fd < 0) {
        int code = errno;
        if (code == EBADF && has_ended(pidfd, DYING_MS))
            code = ESRCH;
        const char *remedy = code == EPERM || code == EACCES
                                 ? ": it takes CAP_SYS_PTRACE, and security modules must allow it"
                             : code == ENOSYS ? ": boot Linux 5.6 or newer"
                                              : "";
        return mf_fail(err, code, "cannot fetch the userfaultfd of %s (pid %d): %s%s", name, pid,
                       strerror(code), remedy);
    }
    /* The number may have been closed and used again since it was looked at. */
    if (!is_userfaultfd(0, fd)) {
        close(fd);
        return mf_fail(err, EBADF, "descriptor %d of %s (pid %d) is not a userfaultfd", remote_fd,
                       name, pid);
    }
    return fd;
}

/** refused_by_kernel() - the target's own userfaultfd(2) failed with @code. */
static int refused_by_kernel(pid_t pid, int code, struct mf_error *err)
{
    char name[64];
    mf_target_comm(pid, name, sizeof(name));
    switch (code) {
    case EPERM:
        return mf_fail(
            err, code,
            "%s (pid %d) may not use userfaultfd: it has no CAP_SYS_PTRACE and "
            "vm.unprivileged_userfaultfd is 0; run 'sysctl vm.unprivileged_userfaultfd=1' "
            "on this host",
            name, pid);
    case EACCES:
        return mf_fail(
            err, code,
            "a security module forbids userfaultfd to %s (pid %d): allow it in its AppArmor "
            "profile or SELinux domain",
            name, pid);
    case EMFILE:
    case ENFILE:
        return mf_fail(
            err, code,
            "%s (pid %d) has no descriptor left for a userfaultfd: raise its limit on open "
            "files (RLIMIT_NOFILE, LimitNOFILE=)",
            name, pid);
    case ENOSYS:
        return mf_fail(err, code, "this kernel was built without userfaultfd (CONFIG_USERFAULTFD)");
    }
    return mf_fail(err, code, "cannot make a userfaultfd in %s (pid %d): %s", name, pid,
                   strerror(code));
}

static int inject_userfaultfd(pid_t pid, int pidfd, int flags, int *remote_fd, struct mf_error *err)
{
    char name[64];
    mf_target_comm(pid, name, sizeof(name));
    if (has_ended(pidfd, 0))
        return mf_fail(err, ESRCH, "%s (pid %d) is gone", name, pid);

    struct call call = {.pid = pid,
                        .pidfd = pidfd,
                        .number = SYS_userfaultfd,
                        .args = {(uint64_t)(O_CLOEXEC | O_NONBLOCK | flags)}};
    int64_t result;
    int rc = run_by_helper(&call, &result, err);
    if (rc < 0)
        return rc;
    if (result < 0)
        return refused_by_kernel(pid, (int)-result, err);

    int fd = mf_uffd_fetch(pid, pidfd, (int)result, err);
    if (fd < 0) {
        mf_inject_close(pid, (int)result, NULL);
        return fd;
    }
    *remote_fd = (int)result;
    return fd;
}

int mf_inject_userfaultfd(pid_t pid, int pidfd, int *remote_fd, struct mf_error *err)
{
    return inject_userfaultfd(pid, pidfd, 0, remote_fd, err);
}

int mf_inject_watching_userfaultfd(pid_t pid, int pidfd, int *remote_fd, struct mf_error *err)
{
    return inject_userfaultfd(pid, pidfd, UFFD_USER_MODE_ONLY, remote_fd, err);
}

int mf_inject_close(pid_t pid, int remote_fd, struct mf_error *err)
{
    char name[64];
    mf_target_comm(pid, name, sizeof(name));
    cleanup_close int pidfd = (int)syscall(SYS_pidfd_open, pid, 0);
    if (pidfd < 0)
        return errno == ESRCH ? 0
                              : mf_fail(err, errno, "cannot refer to %s (pid %d): %s", name, pid,
                                        strerror(errno));
    if (remote_fd < 0 || !is_userfaultfd(pid, remote_fd)) {
        if (has_ended(pidfd, DYING_MS))
            return 0;
        return mf_fail(err, EBADF, "descriptor %d of %s (pid %d) is not a userfaultfd: left alone",
                       remote_fd, name, pid);
    }
    struct call call = {
        .pid = pid, .pidfd = pidfd, .number = SYS_close, .args = {(uint64_t)remote_fd}};
    int64_t result;
    int rc = run_by_helper(&call, &result, err);
    if (rc == -ESRCH)
        return 0;
    if (rc == 0 && result < 0)
        rc = mf_fail(err, (int)-result, "cannot close descriptor %d of %s (pid %d): %s", remote_fd,
                     name, pid, strerror((int)-result));
    return rc;
}

#ifndef MADV_DONTNEED_LOCKED
#define MADV_DONTNEED_LOCKED 24 /* Linux 5.18 */
#endif

int mf_inject_discard(pid_t pid, int pidfd, uint64_t start_addr, uint64_t length_bytes,
                      struct mf_error *err)
{
    static const int advice[] = {MADV_DONTNEED_LOCKED, MADV_DONTNEED};
    char name[64];
    int64_t result = -EINVAL;
    mf_target_comm(pid, name, sizeof(name));
    if (has_ended(pidfd, 0))
        return mf_fail(err, ESRCH, "%s (pid %d) is gone", name, pid);
    for (size_t i = 0; result == -EINVAL && i < sizeof(advice) / sizeof(advice[0]); i++) {
        struct call call = {.pid = pid,
                            .pidfd = pidfd,
                            .number = SYS_madvise,
                            .args = {start_addr, length_bytes, (uint64_t)advice[i]}};
        int rc = run_by_helper(&call, &result, err);
        if (rc < 0)
            return rc;
    }
    if (result < 0)
        return mf_fail(err, (int)-result,
                       "%s (pid %d) can't empty its memory at %#llx (%llu KiB): %s", name, pid,
                       (unsigned long long)start_addr, (unsigned long long)(length_bytes >> 10),
                       strerror((int)-result));
    return 0;
}
