/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What a mover may still do once it begins to read what the network sends.
 *
 * It is no longer root, holds no capability and can gain none (no_new_privs). It opens nothing:
 * every descriptor it will ever use is handed to it. The filter therefore leaves it reading,
 * writing, mapping memory, waiting, starting threads, and the ioctls of a userfaultfd. What
 * io_uring may do is restricted per ring (ring.c), since a filter does not see it. A call outside
 * the list fails with EPERM.
 *
 * The companion (companion.h) reads nothing from the network and keeps the capabilities to look at
 * other processes; its filter lets it open files for reading only.
 *
 * Under a sanitizer the filter is left out: its run-time opens files and maps at will.
 */
#include "daemon/mover/mover.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <seccomp.h>
#include <string.h>
#include <sys/capability.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <unistd.h>

#include "lib/uapi.h"

static int become(uid_t uid, gid_t gid, struct mf_error *err)
{
    if (geteuid() == 0 &&
        (setgroups(0, NULL) != 0 || setresgid(gid, gid, gid) != 0 || setresuid(uid, uid, uid) != 0))
        return mf_fail(err, errno,
                       "memferry-mover cannot become user %u, group %u: %s; memferryd needs "
                       "CAP_SETUID and CAP_SETGID",
                       (unsigned)uid, (unsigned)gid, strerror(errno));
    return 0;
}

static int give_up_gaining(struct mf_error *err)
{
    /* Not dumpable: its memory is a guest's. */
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 || prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) != 0)
        return mf_fail(err, errno, "memferry-mover cannot give up privileges: %s", strerror(errno));
    return 0;
}

int sandbox_drop_privileges(uid_t uid, gid_t gid, struct mf_error *err)
{
    int r = become(uid, gid, err);
    if (r < 0)
        return r;
    cap_t none = cap_init();
    r = none ? cap_set_proc(none) : -1;
    if (none)
        cap_free(none);
    if (r != 0)
        return mf_fail(err, errno, "memferry-mover cannot drop its capabilities: %s",
                       strerror(errno));
    return give_up_gaining(err);
}

/* Of what there is: to look at any process, and past the modes of its files in /proc. */
static int keep_looking(struct mf_error *err)
{
    const cap_value_t wanted[] = {CAP_SYS_PTRACE, CAP_DAC_READ_SEARCH, CAP_DAC_OVERRIDE};
    cap_t had = cap_get_proc(), kept = cap_init();
    bool reads = false;
    int r = had && kept ? 0 : -1;
    for (unsigned i = 0; r == 0 && i < 3; i++) {
        cap_flag_value_t have = CAP_CLEAR;
        cap_get_flag(had, wanted[i], CAP_PERMITTED, &have);
        if (have != CAP_SET || (reads && wanted[i] == CAP_DAC_OVERRIDE))
            continue;
        reads = reads || wanted[i] == CAP_DAC_READ_SEARCH;
        if (cap_set_flag(kept, CAP_PERMITTED, 1, &wanted[i], CAP_SET) != 0 ||
            cap_set_flag(kept, CAP_EFFECTIVE, 1, &wanted[i], CAP_SET) != 0)
            r = -1;
    }
    if (r == 0)
        r = cap_set_proc(kept);
    const int code = errno;
    if (had)
        cap_free(had);
    if (kept)
        cap_free(kept);
    return r == 0 ? 0
                  : mf_fail(err, code, "the mover's companion cannot drop capabilities: %s",
                            strerror(code));
}

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define SANITIZED 1
#endif
#endif
#ifndef SANITIZED
#define SANITIZED 0
#endif

static int load_filter(const int *calls, size_t call_count, const unsigned long *requests,
                       size_t request_count, bool opens, struct mf_error *err)
{
    if (SANITIZED)
        return 0;
    scmp_filter_ctx filter = seccomp_init(SCMP_ACT_ERRNO(EPERM));
    if (!filter)
        return mf_fail(err, ENOMEM, "out of memory for the system-call filter");
    int r = 0;
    for (size_t i = 0; r == 0 && i < call_count; i++)
        r = seccomp_rule_add(filter, SCMP_ACT_ALLOW, calls[i], 0);
    for (size_t i = 0; r == 0 && i < request_count; i++) {
        const struct scmp_arg_cmp request = {.arg = 1, .op = SCMP_CMP_EQ, .datum_a = requests[i]};
        r = seccomp_rule_add_array(filter, SCMP_ACT_ALLOW, SCMP_SYS(ioctl), 1, &request);
    }
    if (r == 0 && opens) {
        const struct scmp_arg_cmp reading = {.arg = 2,
                                             .op = SCMP_CMP_MASKED_EQ,
                                             .datum_a = O_ACCMODE | O_CREAT | O_TRUNC,
                                             .datum_b = O_RDONLY};
        r = seccomp_rule_add_array(filter, SCMP_ACT_ALLOW, SCMP_SYS(openat), 1, &reading);
    }
    if (r == 0)
        r = seccomp_load(filter);
    seccomp_release(filter);
    if (r < 0)
        return mf_fail(err, -r, "the system-call filter of memferry-mover was refused: %s",
                       strerror(-r));
    return 0;
}

int sandbox_filter(struct mf_error *err)
{
    static const int calls[] = {
        /* traffic, pages, states */
        SCMP_SYS(read),
        SCMP_SYS(write),
        SCMP_SYS(pwrite64),
        SCMP_SYS(pwritev),
        SCMP_SYS(pread64),
        SCMP_SYS(sendmsg),
        SCMP_SYS(sendto),
        SCMP_SYS(recvmsg),
        SCMP_SYS(recvfrom),
        SCMP_SYS(shutdown),
        SCMP_SYS(lseek),
        SCMP_SYS(fallocate),
        SCMP_SYS(fstat),
        SCMP_SYS(newfstatat),
        SCMP_SYS(close),
        SCMP_SYS(io_uring_setup),
        SCMP_SYS(io_uring_enter),
        SCMP_SYS(io_uring_register),
        /* waiting */
        SCMP_SYS(poll),
        SCMP_SYS(ppoll),
        SCMP_SYS(futex),
        SCMP_SYS(nanosleep),
        SCMP_SYS(clock_nanosleep),
        SCMP_SYS(clock_gettime),
        SCMP_SYS(sched_yield),
        SCMP_SYS(restart_syscall),
        SCMP_SYS(eventfd2),
        /* memory */
        SCMP_SYS(mmap),
        SCMP_SYS(munmap),
        SCMP_SYS(mprotect),
        SCMP_SYS(mremap),
        SCMP_SYS(madvise),
        SCMP_SYS(brk),
        /* threads */
        SCMP_SYS(clone),
        SCMP_SYS(clone3),
        SCMP_SYS(set_robust_list),
        SCMP_SYS(rseq),
        SCMP_SYS(rt_sigprocmask),
        SCMP_SYS(rt_sigaction),
        SCMP_SYS(rt_sigreturn),
        SCMP_SYS(gettid),
        SCMP_SYS(getpid),
        SCMP_SYS(tgkill),
        SCMP_SYS(setpriority),
        SCMP_SYS(getpriority),
        SCMP_SYS(sched_setscheduler),
        SCMP_SYS(sched_getaffinity),
        SCMP_SYS(prctl),
        SCMP_SYS(getrandom),
        SCMP_SYS(exit),
        SCMP_SYS(exit_group),
    };
    static const unsigned long requests[] = {UFFDIO_CONTINUE, UFFDIO_ZEROPAGE,     UFFDIO_COPY,
                                             UFFDIO_WAKE,     UFFDIO_WRITEPROTECT, PAGEMAP_SCAN,
                                             UFFDIO_REGISTER, UFFDIO_UNREGISTER,   PROCMAP_QUERY};
    return load_filter(calls, sizeof(calls) / sizeof(calls[0]), requests,
                       sizeof(requests) / sizeof(requests[0]), false, err);
}

int sandbox_companion(uid_t uid, gid_t gid, struct mf_error *err)
{
    static const int calls[] = {
        /* looking */
        SCMP_SYS(read), SCMP_SYS(pread64), SCMP_SYS(lseek), SCMP_SYS(getdents64),
        SCMP_SYS(newfstatat), SCMP_SYS(fstat), SCMP_SYS(close), SCMP_SYS(fcntl),
        /* answering, and the log */
        SCMP_SYS(recvfrom), SCMP_SYS(sendto), SCMP_SYS(write), SCMP_SYS(writev),
        /* waiting */
        SCMP_SYS(poll), SCMP_SYS(ppoll), SCMP_SYS(nanosleep), SCMP_SYS(clock_nanosleep),
        SCMP_SYS(clock_gettime), SCMP_SYS(restart_syscall), SCMP_SYS(sched_yield), SCMP_SYS(futex),
        /* memory */
        SCMP_SYS(brk), SCMP_SYS(mmap), SCMP_SYS(munmap), SCMP_SYS(mremap), SCMP_SYS(mprotect),
        SCMP_SYS(madvise),
        /* itself */
        SCMP_SYS(getpid), SCMP_SYS(gettid), SCMP_SYS(prlimit64), SCMP_SYS(rt_sigreturn),
        SCMP_SYS(sched_setscheduler), SCMP_SYS(setpriority), SCMP_SYS(exit), SCMP_SYS(exit_group)};
    static const unsigned long requests[] = {PROCMAP_QUERY, UFFDIO_WRITEPROTECT};
    if (prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0) != 0)
        return mf_fail(err, errno, "the mover's companion cannot keep capabilities: %s",
                       strerror(errno));
    int r = become(uid, gid, err);
    if (r == 0)
        r = keep_looking(err);
    if (r == 0)
        r = give_up_gaining(err);
    if (r == 0)
        r = load_filter(calls, sizeof(calls) / sizeof(calls[0]), requests,
                        sizeof(requests) / sizeof(requests[0]), true, err);
    return r;
}
