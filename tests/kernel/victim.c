/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A process for test_inject to attach to. Its threads wait in different system calls, compute, and
 * call the kernel without pause; each checks that what it gets is what it must get: that its
 * registers keep their values, that no wait ends early or with EINTR, that handlers run as often as
 * signals were sent.
 *
 * Usage: victim MODE, where MODE names the threads to start (see modes below), comma-separated.
 * It prints "ready", runs until its standard input ends, prints "ok ITERATIONS" and exits 0, or
 * says what went wrong and exits 1.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "lib/util.h"

static atomic_bool stop;
static atomic_ulong iterations;
static atomic_int problems;
static int wake_pipe[2];

static void problem(const char *what, long value)
{
    atomic_fetch_add(&problems, 1);
    fprintf(stderr, "victim: %s (%ld, errno %d)\n", what, value, errno);
}

/** run_nanosleep() - restarted through restart_block: must sleep its whole time and never see
 * EINTR. */
static void run_nanosleep(void)
{
    struct timespec nap = {.tv_nsec = 30000000}, rest = {0};
    uint64_t start_ns = mf_now_ns();
    if (nanosleep(&nap, &rest) != 0)
        problem("nanosleep failed", 0);
    if (mf_now_ns() - start_ns < 30000000)
        problem("nanosleep ended early after ns", (long)(mf_now_ns() - start_ns));
}

/** run_futex() - a timed wait on a word that nobody wakes: only a time-out may end it. */
static void run_futex(void)
{
    uint32_t word = 1;
    struct timespec limit = {.tv_nsec = 25000000};
    uint64_t start_ns = mf_now_ns();
    long rc = syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 1, &limit, NULL, 0);
    if (rc != -1 || errno != ETIMEDOUT)
        problem("futex did not time out", rc);
    if (mf_now_ns() - start_ns < 25000000)
        problem("futex ended early after ns", (long)(mf_now_ns() - start_ns));
}

static void run_poll(void)
{
    struct pollfd none = {.fd = wake_pipe[0], .events = POLLIN};
    int rc = poll(&none, 1, 20);
    if (rc < 0)
        problem("poll failed", rc);
}

/** run_read() - blocks until the end, when the pipe is closed. */
static void run_read(void)
{
    char byte;
    ssize_t rc = read(wake_pipe[0], &byte, 1);
    if (rc != 0)
        problem("read did not wait for the end of the pipe", rc);
}

/** run_epoll() - EINTR is what the kernel itself gives after any stop: signal(7). */
static void run_epoll(void)
{
    int fd = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event event = {.events = EPOLLIN};
    if (epoll_ctl(fd, EPOLL_CTL_ADD, wake_pipe[0], &event) != 0)
        problem("epoll_ctl failed", fd);
    int rc = epoll_wait(fd, &event, 1, 20);
    if (rc < 0 && errno != EINTR)
        problem("epoll_wait failed", rc);
    close(fd);
}

/** run_registers() - computes with every general register loaded and looks whether they kept. */
static void run_registers(void)
{
#if defined(__x86_64__)
    uint64_t bad;
    __asm__ volatile("movq $0x1111111111111111, %%rax\n\t"
                     "movq $0x2222222222222222, %%rcx\n\t"
                     "movq $0x3333333333333333, %%rdx\n\t"
                     "movq $0x4444444444444444, %%rsi\n\t"
                     "movq $0x5555555555555555, %%rdi\n\t"
                     "movq $0x6666666666666666, %%r8\n\t"
                     "movq $0x7777777777777777, %%r9\n\t"
                     "movq $0x1212121212121212, %%r10\n\t"
                     "movq $0x1313131313131313, %%r11\n\t"
                     "movq $0x1414141414141414, %%r12\n\t"
                     "movq $0x1515151515151515, %%r13\n\t"
                     "pcmpeqd %%xmm7, %%xmm7\n\t"
                     "movl $200000, %%r14d\n"
                     "1:\tdecl %%r14d\n\t"
                     "jnz 1b\n\t"
                     "movq %%rax, %%r15\n\t"
                     "xorq $0x11111111, %%r15\n\t"
                     "xorq %%rcx, %%r15\n\t"
                     "xorq %%rdx, %%r15\n\t"
                     "xorq %%rsi, %%r15\n\t"
                     "xorq %%rdi, %%r15\n\t"
                     "xorq %%r8, %%r15\n\t"
                     "xorq %%r9, %%r15\n\t"
                     "xorq %%r10, %%r15\n\t"
                     "xorq %%r11, %%r15\n\t"
                     "xorq %%r12, %%r15\n\t"
                     "xorq %%r13, %%r15\n\t"
                     "movq %%xmm7, %%r14\n\t"
                     "xorq %%r14, %%r15\n\t"
                     "movq %%r15, %0"
                     : "=r"(bad)
                     :
                     : "rax", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
                       "r14", "r15", "xmm7", "cc");
    uint64_t expected = UINT64_C(0x1111111111111111) ^ 0x11111111 ^ UINT64_C(0x2222222222222222) ^
                        UINT64_C(0x3333333333333333) ^ UINT64_C(0x4444444444444444) ^
                        UINT64_C(0x5555555555555555) ^ UINT64_C(0x6666666666666666) ^
                        UINT64_C(0x7777777777777777) ^ UINT64_C(0x1212121212121212) ^
                        UINT64_C(0x1313131313131313) ^ UINT64_C(0x1414141414141414) ^
                        UINT64_C(0x1515151515151515) ^ ~UINT64_C(0);
    if (bad != expected)
        problem("a register changed", (long)(bad ^ expected));
#endif
}

/** run_calls() - short system calls with known answers, without pause. */
static void run_calls(void)
{
    static _Thread_local pid_t tid;
    if (!tid)
        tid = (pid_t)syscall(SYS_gettid);
    for (int i = 0; i < 1000; i++) {
        long got = syscall(SYS_gettid);
        if (got != tid)
            problem("gettid gave", got);
        got = syscall(SYS_lseek, -1, 0, SEEK_SET);
        if (got != -1 || errno != EBADF)
            problem("lseek of a bad descriptor gave", got);
    }
}

static atomic_ulong handled;

static void on_signal(int number)
{
    (void)number;
    atomic_fetch_add(&handled, 1);
}

/** run_signals() - a handler must run once for each signal sent, and the call it interrupts see
 * EINTR only from that. */
static void run_signals(void)
{
    unsigned long before = atomic_load(&handled);
    for (int i = 0; i < 100; i++)
        syscall(SYS_tgkill, getpid(), (pid_t)syscall(SYS_gettid), SIGUSR1);
    if (atomic_load(&handled) - before != 100)
        problem("handlers run for 100 signals", (long)(atomic_load(&handled) - before));
}

#ifndef PR_SET_SYSCALL_USER_DISPATCH
#define PR_SET_SYSCALL_USER_DISPATCH 59
#endif

static _Thread_local volatile char dispatched; /* 1: the next call is the handler's */
static _Thread_local volatile unsigned long caught;

static void on_dispatch(int number)
{
    (void)number;
    dispatched = 0;
    caught++;
}

/**
 * run_dispatch() - the thread's own calls go to a handler (prctl(2), syscall user dispatch)
 * whenever it says so; before and after, whoever borrows the thread must not meet it, nor switch it
 * off.
 * @mode: 1: all calls; 2: those from a range, which is everything here (Linux 6.17).
 */
static void run_dispatch(unsigned long mode)
{
    static _Thread_local bool on;
    const unsigned long from = mode == 2 ? 4096 : 0, length = mode == 2 ? (1ul << 47) - 8192 : 0;
    if (!on && prctl(PR_SET_SYSCALL_USER_DISPATCH, mode, from, length, &dispatched) != 0)
        pthread_exit(NULL);
    on = true;
    const unsigned long before = caught;
    dispatched = 1;
    for (volatile unsigned i = 0; i < 3000000; i++)
        ;
    syscall(SYS_getppid);
    if (caught != before + 1)
        problem("a call was not sent to its handler", (long)(caught - before));
}

static void run_dispatch_all(void)
{
    run_dispatch(1);
}

static void run_dispatch_range(void)
{
    run_dispatch(2);
}

static const struct mode {
    const char *name;
    void (*run)(void);
} modes[] = {
    {"nanosleep", run_nanosleep},
    {"futex", run_futex},
    {"poll", run_poll},
    {"read", run_read},
    {"epoll", run_epoll},
    {"registers", run_registers},
    {"calls", run_calls},
    {"signals", run_signals},
    {"dispatch", run_dispatch_all},
    {"dispatch-range", run_dispatch_range},
};

static void *thread(void *arg)
{
    const struct mode *mode = arg;
    sigset_t mask;
    sigemptyset(&mask);
    sigaddset(&mask, SIGUSR2);
    sigaddset(&mask, SIGTRAP);
    pthread_sigmask(SIG_BLOCK, &mask, NULL);
    while (!atomic_load(&stop)) {
        mode->run();
        atomic_fetch_add(&iterations, 1);
    }
    sigset_t now;
    pthread_sigmask(SIG_BLOCK, NULL, &now);
    for (int i = 1; i < 32; i++) {
        if (sigismember(&now, i) != sigismember(&mask, i))
            problem("the signal mask changed at signal", i);
    }
    return NULL;
}

int main(int argc, char **argv)
{
    pthread_t threads[32];
    size_t count = 0;

    if (argc != 2 || pipe2(wake_pipe, O_CLOEXEC) != 0)
        return 2;
    signal(SIGUSR1, on_signal);
    signal(SIGSYS, on_dispatch);
    signal(SIGTRAP, SIG_IGN);
    for (char *name = strtok(argv[1], ","); name && count < 32; name = strtok(NULL, ",")) {
        for (size_t i = 0; i < sizeof(modes) / sizeof(modes[0]); i++) {
            if (strcmp(modes[i].name, name) == 0)
                pthread_create(&threads[count++], NULL, thread, (void *)(uintptr_t)&modes[i]);
        }
    }
    printf("ready\n");
    fflush(stdout);
    char line[64];
    ssize_t got = read(STDIN_FILENO, line, sizeof(line));
    if (got != 0)
        problem("reading standard input gave", (long)got);
    atomic_store(&stop, true);
    close(wake_pipe[1]);
    for (size_t i = 0; i < count; i++)
        pthread_join(threads[i], NULL);
    struct sigaction trap;
    sigaction(SIGTRAP, NULL, &trap);
    if (trap.sa_handler != SIG_IGN)
        problem("SIGTRAP is no longer ignored", 0);
    printf("%s %lu\n", atomic_load(&problems) ? "bad" : "ok", atomic_load(&iterations));
    return atomic_load(&problems) ? 1 : 0;
}
