/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Theory of operation: one system call in somebody else's thread.
 *
 * 1. PTRACE_SEIZE, not PTRACE_ATTACH: no SIGSTOP is sent, so nothing that the target or its parent
 * could notice. PTRACE_INTERRUPT then makes the thread stop on its way back to user space. A system
 * call it was blocked in has by then returned one of the kernel-internal codes -ERESTART*, which is
 * seen in rax beside the call's number in orig_rax; whether and how to restart it is decided only
 * after this stop.
 * 2. All registers and the signal mask are saved. The mask is filled, so that no handler can run,
 * and no frame be built, on borrowed registers. SIGSTOP can't be blocked and is passed on: it needs
 * no frame.
 * 3. rip is set to an instruction `syscall` that exists already, rax and the argument registers to
 * the call, orig_rax to -1, which tells the kernel that there is nothing to restart. No byte of
 * memory is written: other threads may be executing the same code. The stack pointer is not touched
 * either.
 * 4. PTRACE_SYSCALL twice: to the call's entry and to its exit. Single-stepping would do, but it
 * sends SIGTRAP, and where SIGTRAP is blocked or ignored (QEMU blocks it in its threads) the kernel
 * resets its disposition for the whole process. System call stops send no signal.
 * 5. At the exit the thread is interrupted again before its registers and mask are put back, so
 * that it comes through the same kind of stop as in 1. Detaching there lets the kernel go on as if
 * only the first stop had been: it finds -ERESTART* and the call's number, and restarts poll,
 * futex, read and, with the time that is left, nanosleep. (Detaching at the exit itself would hand
 * -ERESTART* to user space if no signal is pending.) Calls that never survive a stop, epoll_wait(2)
 * for one, return EINTR as signal(7) says they do; inject.c picks a thread in another call where
 * there is one.
 *
 * A seccomp filter of the target may answer a call it does not know by killing the process. It is
 * suspended for the one call (PTRACE_O_SUSPEND_SECCOMP), which takes CAP_SYS_ADMIN and a tracer
 * without a filter of its own; where that is not to be had, the attempt is given up rather than
 * risked. QEMU is the exception: its filter (-sandbox) lists what is forbidden, and can't list
 * userfaultfd, which QEMU's own postcopy uses, nor close.
 *
 * A thread between system calls may stand in a restartable sequence (rseq(2)): the kernel would
 * take the borrowed rip for "it has left the sequence" and not abort it later. Such a thread is let
 * go (-EAGAIN).
 *
 * A thread may have its system calls sent to a handler of its own (syscall user dispatch,
 * prctl(2)): that is looked at before the stop at a call's entry, and with all signals blocked it
 * would kill the process. So it is switched off for the one call.
 *
 * Stopped processes (SIGSTOP) work too: the thread is in a group stop, PTRACE_SYSCALL takes it out
 * of it, and on detaching the kernel puts it back.
 */
#include "lib/tracee.h"

#include <errno.h>
#include <inttypes.h>
#include <sched.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <time.h>

#include "lib/target.h"
#include "lib/util.h"

#ifndef PTRACE_EVENT_STOP
#define PTRACE_EVENT_STOP 128
#endif

#ifndef PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG /* Linux 6.4 */
#define PTRACE_SET_SYSCALL_USER_DISPATCH_CONFIG 0x4210
#define PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG 0x4211
#endif

/** struct dispatch_config - struct ptrace_sud_config of newer <linux/ptrace.h>. */
struct dispatch_config {
    uint64_t mode, selector_addr, offset_addr, length_bytes;
};

enum { DISPATCH_OFF, DISPATCH_OUTSIDE, DISPATCH_INSIDE }; /* prctl(2), PR_SYS_DISPATCH_… */

enum stop { STOP_NOT_YET, STOP_SYSCALL, STOP_EVENT, STOP_SIGNAL, STOP_GONE };

/** next_stop() - ask once, without blocking; @signal is set for STOP_SIGNAL. */
static enum stop next_stop(pid_t tid, int *signal)
{
    int status;
    pid_t got = waitpid(tid, &status, __WALL | WNOHANG);
    if (got == 0 || (got < 0 && errno == EINTR))
        return STOP_NOT_YET;
    if (got < 0 || !WIFSTOPPED(status))
        return STOP_GONE;
    if (status >> 16 == PTRACE_EVENT_STOP)
        return STOP_EVENT;
    if (WSTOPSIG(status) == (SIGTRAP | 0x80))
        return STOP_SYSCALL;
    *signal = WSTOPSIG(status);
    return STOP_SIGNAL;
}

/** status_value() - what follows @key in a thread's status file. Return: false if there is none. */
static bool status_value(pid_t pid, pid_t tid, const char *key, char *value, size_t size)
{
    char path[64], line[256];
    snprintf(path, sizeof(path), "/proc/%d/task/%d/status", pid, tid);
    cleanup_fclose FILE *f = fopen(path, "re");
    while (f && fgets(line, sizeof(line), f)) {
        if (strncmp(line, key, strlen(key)) == 0) {
            snprintf(value, size, "%s", line + strlen(key) + strspn(line + strlen(key), " \t"));
            return true;
        }
    }
    return false;
}

/** status_number() - the number after @key, or -1. */
static long status_number(pid_t pid, pid_t tid, const char *key)
{
    char value[64];
    return status_value(pid, tid, key, value, sizeof(value)) ? strtol(value, NULL, 10) : -1;
}

/** is_dead() - a thread that has ended refuses a tracer with EPERM, like one that is forbidden. */
static bool is_dead(pid_t pid, pid_t tid)
{
    char state[64];
    return !status_value(pid, tid, "State:", state, sizeof(state)) || strchr("ZXx", state[0]);
}

/** yama_scope() - kernel.yama.ptrace_scope, 0 on a kernel without Yama. */
static int yama_scope(void)
{
    int scope;
    cleanup_fclose FILE *f = fopen("/proc/sys/kernel/yama/ptrace_scope", "re");
    if (!f)
        return 0;
    return fscanf(f, "%d", &scope) == 1 ? scope : 0;
}

int mf_tracee_seize(pid_t pid, pid_t tid, struct mf_error *err)
{
    if (ptrace(PTRACE_SEIZE, tid, NULL, (void *)(uintptr_t)PTRACE_O_TRACESYSGOOD) != 0) {
        int code = errno;
        char name[64];
        mf_target_comm(pid, name, sizeof(name));
        if (code == ESRCH || is_dead(pid, tid))
            return mf_fail(err, ESRCH, "%s (pid %d) is gone", name, pid);
        long tracer = status_number(pid, tid, "TracerPid:");
        if (tracer > 0) {
            char other_name[64];
            mf_target_comm((pid_t)tracer, other_name, sizeof(other_name));
            return mf_fail(
                err, EPERM,
                "cannot attach to %s (pid %d): %s (pid %ld) is tracing it already; end that "
                "debugger or tracer and try again",
                name, pid, other_name, tracer);
        }
        int scope = yama_scope();
        if (scope == 3)
            return mf_fail(
                err, EPERM,
                "cannot attach to %s (pid %d): Yama forbids ptrace on this host until it is "
                "rebooted (kernel.yama.ptrace_scope=3)",
                name, pid);
        if (code == EPERM)
            return mf_fail(err, code,
                           "cannot attach to %s (pid %d): ptrace is not permitted%s; it takes "
                           "CAP_SYS_PTRACE in the process's user namespace, and a security module "
                           "(AppArmor, SELinux) must allow it",
                           name, pid, scope > 0 ? " (kernel.yama.ptrace_scope restricts it)" : "");
        return mf_fail(err, code, "cannot attach to %s (pid %d): %s", name, pid, strerror(code));
    }
    /* Fails only if the thread is gone, which waiting for it will tell. */
    ptrace(PTRACE_INTERRUPT, tid, NULL, NULL);
    return 0;
}

int mf_tracee_stopped(pid_t tid)
{
    int signal = 0;
    switch (next_stop(tid, &signal)) {
    case STOP_NOT_YET:
        return 0;
    case STOP_EVENT:
        return 1;
    case STOP_SYSCALL:
        ptrace(PTRACE_CONT, tid, NULL, NULL);
        return 0;
    case STOP_SIGNAL:
        /* On its way before we came. The interrupt stays requested. */
        ptrace(PTRACE_CONT, tid, NULL, (void *)(intptr_t)signal);
        return 0;
    case STOP_GONE:
        break;
    }
    return -ESRCH;
}

#if defined(__x86_64__)

#define CS_64BIT 0x33

/** A thread that is not run by the kernel for this long is left alone. */
#define RUN_LIMIT_NS 2000000000u

/** Time spent asking without sleeping: a stop normally takes a few tens of microseconds. */
#define SPIN_NS 200000u

/** await_stop() - next_stop() until there is one, or @limit_ns has passed (0: without limit). */
static enum stop await_stop(pid_t tid, int *signal, uint64_t limit_ns)
{
    uint64_t start_ns = mf_now_ns();
    for (;;) {
        enum stop stop = next_stop(tid, signal);
        if (stop != STOP_NOT_YET)
            return stop;
        uint64_t waited_ns = mf_now_ns() - start_ns;
        if (limit_ns && waited_ns > limit_ns)
            return STOP_NOT_YET;
        if (waited_ns < SPIN_NS)
            sched_yield();
        else
            nanosleep(&(struct timespec){.tv_nsec = 100000}, NULL);
    }
}

static const unsigned char syscall_instruction[2] = {0x0f, 0x05};

bool mf_tracee_supported(void)
{
    return true;
}

/** is_syscall_at() - do the two bytes at @addr in the stopped thread read 0f 05? */
static bool is_syscall_at(pid_t tid, uint64_t addr)
{
    errno = 0;
    long word = ptrace(PTRACE_PEEKTEXT, tid, (void *)(uintptr_t)addr, NULL);
    return errno == 0 && memcmp(&word, syscall_instruction, sizeof(syscall_instruction)) == 0;
}

/** find_syscall() - the address of a `syscall` instruction in the thread's address space, or 0. */
static uint64_t find_syscall(pid_t tid, const struct user_regs_struct *regs, uint64_t vdso_addr,
                             uint64_t vdso_bytes)
{
    if ((int64_t)regs->orig_rax >= 0 && is_syscall_at(tid, regs->rip - sizeof(syscall_instruction)))
        return regs->rip - sizeof(syscall_instruction);

    unsigned char code[16384];
    size_t length_bytes = vdso_bytes < sizeof(code) ? (size_t)vdso_bytes : sizeof(code);
    if (vdso_addr == 0 || length_bytes == 0)
        return 0;
    struct iovec local = {.iov_base = code, .iov_len = length_bytes};
    struct iovec remote = {.iov_base = (void *)(uintptr_t)vdso_addr, .iov_len = length_bytes};
    ssize_t got = process_vm_readv(tid, &local, 1, &remote, 1, 0);
    if (got <= 0)
        return 0;
    const unsigned char *hit =
        memmem(code, (size_t)got, syscall_instruction, sizeof(syscall_instruction));
    if (!hit)
        return 0;
    uint64_t addr = vdso_addr + (uint64_t)(hit - code);
    return is_syscall_at(tid, addr) ? addr : 0;
}

/** in_rseq() - may the thread stand in a restartable sequence? Only asked between system calls. */
static bool in_rseq(pid_t tid)
{
    struct __ptrace_rseq_configuration conf;
    long got = ptrace(PTRACE_GET_RSEQ_CONFIGURATION, tid, (void *)sizeof(conf), &conf);
    if (got < (long)sizeof(conf) || conf.rseq_abi_pointer == 0)
        return false; /* not registered, or a kernel before 5.13, of which nothing can be learned */
    errno = 0;
    /* struct rseq of <linux/rseq.h>: two 32-bit processor numbers, then rseq_cs. */
    long rseq_cs =
        ptrace(PTRACE_PEEKDATA, tid, (void *)(uintptr_t)(conf.rseq_abi_pointer + 8), NULL);
    return errno == 0 && rseq_cs != 0;
}

/** A thread as it was found. */
struct saved {
    struct user_regs_struct regs;
    uint64_t signal_mask;
    struct dispatch_config dispatch;
};

static int set_dispatch(pid_t tid, const struct dispatch_config *config)
{
    struct dispatch_config copy = *config;
    return ptrace(PTRACE_SET_SYSCALL_USER_DISPATCH_CONFIG, tid, (void *)sizeof(copy), &copy) == 0
               ? 0
               : -errno;
}

/** get_dispatch() - all zeros where there is none, or the kernel can't tell. */
static void get_dispatch(pid_t tid, struct dispatch_config *config)
{
    if (ptrace(PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG, tid, (void *)sizeof(*config), config) != 0)
        *config = (struct dispatch_config){0};
    /* Calls from inside a range (6.17) are kept, and told, as those from outside of all the rest,
     * which is not taken when it is set. */
    const uint64_t end_addr = config->offset_addr + config->length_bytes;
    if (config->mode != DISPATCH_OFF && config->offset_addr && end_addr <= config->offset_addr)
        *config = (struct dispatch_config){.mode = DISPATCH_INSIDE,
                                           .selector_addr = config->selector_addr,
                                           .offset_addr = end_addr,
                                           .length_bytes = -config->length_bytes};
}

/** put_back() - all that was saved; on failure the thread has been killed. */
static void put_back(pid_t tid, struct saved *saved)
{
    if (saved->dispatch.mode != DISPATCH_OFF)
        set_dispatch(tid, &saved->dispatch);
    ptrace(PTRACE_SETREGS, tid, NULL, &saved->regs);
    ptrace(PTRACE_SETSIGMASK, tid, (void *)sizeof(saved->signal_mask), &saved->signal_mask);
}

static void detach(pid_t tid, int signal)
{
    ptrace(PTRACE_DETACH, tid, NULL, (void *)(intptr_t)signal);
}

/** release_from_exit() - at the call's exit: back to a stop where the kernel decides on restarting.
 */
static void release_from_exit(pid_t tid, struct saved *saved)
{
    int signal = 0;
    ptrace(PTRACE_INTERRUPT, tid, NULL, NULL);
    put_back(tid, saved);
    ptrace(PTRACE_CONT, tid, NULL, NULL);
    enum stop stop = await_stop(tid, &signal, 0);
    if (stop == STOP_GONE)
        return;
    detach(tid, stop == STOP_SIGNAL ? signal : 0);
}

/** is_qemu() - by its program file: its own name can be set to anything (-name process=). */
static bool is_qemu(pid_t pid)
{
    char path[64], program[512];
    snprintf(path, sizeof(path), "/proc/%d/exe", pid);
    ssize_t length = readlink(path, program, sizeof(program) - 1);
    if (length <= 0)
        return false;
    program[length] = '\0';
    const char *slash = strrchr(program, '/');
    return strncmp(slash ? slash + 1 : program, "qemu", 4) == 0;
}

/** suspend_seccomp() - see the top. Return: 0, or -EACCES with a sentence. */
static int suspend_seccomp(pid_t pid, pid_t tid, struct mf_error *err)
{
    if (status_number(pid, tid, "Seccomp:") <= 0)
        return 0;
    uintptr_t options = PTRACE_O_TRACESYSGOOD | PTRACE_O_SUSPEND_SECCOMP;
    if (ptrace(PTRACE_SETOPTIONS, tid, NULL, (void *)options) == 0 || is_qemu(pid))
        return 0;
    int code = errno;
    char name[64];
    mf_target_comm(pid, name, sizeof(name));
    return mf_fail(
        err, EACCES,
        "%s (pid %d) runs under a seccomp filter, which can't be suspended (%s): that takes "
        "CAP_SYS_ADMIN, no seccomp filter of one's own (SystemCallFilter= in memferryd's unit), "
        "and a kernel with CONFIG_CHECKPOINT_RESTORE=y",
        name, pid, strerror(code));
}

/** step_through() - from the first stop to the call's exit. Leaves the thread stopped on success
 * and let go on failure. */
static int step_through(pid_t pid, pid_t tid, struct saved *saved, int64_t *result,
                        struct mf_error *err)
{
    bool entered = false;
    uintptr_t pass_on = 0;
    char name[64];
    mf_target_comm(pid, name, sizeof(name));

    for (;;) {
        if (ptrace(PTRACE_SYSCALL, tid, NULL, (void *)pass_on) != 0)
            return mf_fail(err, ESRCH, "%s (pid %d) ended while it was being attached to", name,
                           pid);
        pass_on = 0;

        int signal = 0;
        enum stop stop = await_stop(tid, &signal, entered ? 0 : RUN_LIMIT_NS);
        if (stop == STOP_NOT_YET) {
            /* Taken out of its stop, but not run: a frozen cgroup does that. A frozen thread still
             * comes to a ptrace stop, before the call, where all can be put back. */
            ptrace(PTRACE_INTERRUPT, tid, NULL, NULL);
            stop = await_stop(tid, &signal, 0);
            if (stop == STOP_EVENT) {
                put_back(tid, saved);
                detach(tid, 0);
                return mf_fail(err, ETIMEDOUT,
                               "%s (pid %d) does not run: thaw its cgroup and try again", name,
                               pid);
            }
        }

        switch (stop) {
        case STOP_SYSCALL: {
            if (!entered) {
                entered = true;
                break;
            }
            struct user_regs_struct regs;
            if (ptrace(PTRACE_GETREGS, tid, NULL, &regs) != 0)
                return mf_fail(err, ESRCH, "%s (pid %d) ended while it was being attached to", name,
                               pid);
            *result = (int64_t)regs.rax;
            return 0;
        }
        case STOP_EVENT:
            break; /* a group stop began or ended meanwhile; the kernel goes back to it on detach */
        case STOP_SIGNAL:
            if (signal == SIGSTOP) {
                pass_on = SIGSTOP;
                break;
            }
            /* Everything that can be blocked is, so this is a fault of the borrowed call itself. */
            put_back(tid, saved);
            detach(tid, 0);
            return mf_fail(err, EINTR,
                           "%s (pid %d) got signal %d (%s) while it was being attached to", name,
                           pid, signal, strsignal(signal));
        case STOP_GONE:
        case STOP_NOT_YET:
            return mf_fail(err, ESRCH, "%s (pid %d) ended while it was being attached to", name,
                           pid);
        }
    }
}

int mf_tracee_run(pid_t pid, pid_t tid, uint64_t vdso_addr, uint64_t vdso_bytes, long number,
                  const uint64_t args[3], int64_t *result, struct mf_error *err)
{
    char name[64];
    mf_target_comm(pid, name, sizeof(name));

    struct saved saved = {0};
    if (ptrace(PTRACE_GETREGS, tid, NULL, &saved.regs) != 0 ||
        ptrace(PTRACE_GETSIGMASK, tid, (void *)sizeof(saved.signal_mask), &saved.signal_mask) !=
            0) {
        int code = errno;
        detach(tid, 0);
        return mf_fail(err, code, "%s (pid %d) ended while it was being attached to", name, pid);
    }
    int rc = 0;
    uint64_t instruction = 0;
    if (saved.regs.cs != CS_64BIT) {
        rc = mf_fail(err, EAGAIN, "%s (pid %d) runs 32-bit code, where it can't be attached to",
                     name, pid);
    } else if ((int64_t)saved.regs.orig_rax < 0 && in_rseq(tid)) {
        rc = mf_fail(err, EAGAIN, "thread %d of %s is in a restartable sequence", tid, name);
    } else {
        instruction = find_syscall(tid, &saved.regs, vdso_addr, vdso_bytes);
        if (!instruction)
            rc = mf_fail(
                err, EAGAIN,
                "no system call instruction was found in %s (pid %d): it runs without a vDSO "
                "and no thread of it waits in a system call",
                name, pid);
    }
    if (rc == 0)
        rc = suspend_seccomp(pid, tid, err);
    if (rc < 0) {
        detach(tid, 0);
        return rc;
    }

    struct user_regs_struct borrowed = saved.regs;
    borrowed.rip = instruction;
    borrowed.rax = (unsigned long long)number;
    borrowed.orig_rax = (unsigned long long)-1;
    borrowed.rdi = args[0];
    borrowed.rsi = args[1];
    borrowed.rdx = args[2];
    uint64_t all_blocked = ~UINT64_C(0);
    get_dispatch(tid, &saved.dispatch);
    rc = saved.dispatch.mode == DISPATCH_OFF ? 0 : set_dispatch(tid, &(struct dispatch_config){0});
    if (rc < 0) {
        detach(tid, 0);
        return mf_fail(err, -rc, "cannot suspend the syscall user dispatch of %s (pid %d): %s",
                       name, pid, strerror(-rc));
    }
    if (ptrace(PTRACE_SETSIGMASK, tid, (void *)sizeof(all_blocked), &all_blocked) != 0 ||
        ptrace(PTRACE_SETREGS, tid, NULL, &borrowed) != 0) {
        int code = errno;
        put_back(tid, &saved);
        detach(tid, 0);
        return mf_fail(err, code, "cannot set the registers of %s (pid %d): %s", name, pid,
                       strerror(code));
    }
    rc = step_through(pid, tid, &saved, result, err);
    if (rc == 0)
        release_from_exit(tid, &saved);
    return rc;
}

#else

bool mf_tracee_supported(void)
{
    return false;
}

int mf_tracee_run(pid_t pid, pid_t tid, uint64_t vdso_addr, uint64_t vdso_bytes, long number,
                  const uint64_t args[3], int64_t *result, struct mf_error *err)
{
    (void)vdso_addr, (void)vdso_bytes, (void)number, (void)args, (void)result;
    ptrace(PTRACE_DETACH, tid, NULL, NULL);
    return mf_fail(
        err, ENOSYS,
        "attaching to a process (pid %d) that does not cooperate is implemented for x86-64 "
        "only",
        pid);
}

#endif
