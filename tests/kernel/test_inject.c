/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * lib/inject.c and lib/tracee.c on live processes: victim.c in each of its modes, a QEMU with its
 * sandbox on, stopped, dying, gone and already traced ones. Arguments: the path of victim and, in
 * the suites that have it, the number of rounds.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <setjmp.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#include "lib/inject.h"
#include "lib/target.h"
#include "lib/tracee.h"
#include "lib/uapi.h"
#include "lib/uffd.h"
#include "lib/util.h"
#include "lib/withdraw.h"

static const char *victim_path;
static unsigned rounds = 60;

struct child {
    pid_t pid;
    int pidfd, in, out;
};

static void start(struct child *child, char *const argv[])
{
    int in[2], out[2];
    assert_int_equal(pipe2(in, O_CLOEXEC), 0);
    assert_int_equal(pipe2(out, O_CLOEXEC), 0);
    child->pid = fork();
    if (child->pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        dup2(in[0], STDIN_FILENO);
        dup2(out[1], STDOUT_FILENO);
        execv(argv[0], argv);
        _exit(127);
    }
    assert_true(child->pid > 0);
    close(in[0]);
    close(out[1]);
    child->in = in[1];
    child->out = out[0];
    child->pidfd = (int)syscall(SYS_pidfd_open, child->pid, 0);
    assert_true(child->pidfd >= 0);
}

static void start_victim(struct child *child, const char *modes)
{
    char line[16] = "";
    start(child, (char *const[]){(char *)(uintptr_t)victim_path, (char *)(uintptr_t)modes, NULL});
    assert_true(read(child->out, line, sizeof(line)) > 0);
    assert_string_equal(line, "ready\n");
}

/** finish() - the victim's own verdict on what was done to it. */
static void finish(struct child *child)
{
    char verdict[64] = "";
    int status = -1;
    close(child->in);
    ssize_t got = read(child->out, verdict, sizeof(verdict) - 1);
    waitpid(child->pid, &status, 0);
    close(child->out);
    close(child->pidfd);
    if (got <= 0 || strncmp(verdict, "ok ", 3) != 0 || status != 0)
        fail_msg("the victim says '%s', status %#x", verdict, status);
}

static void end(struct child *child)
{
    kill(child->pid, SIGKILL);
    waitpid(child->pid, NULL, 0);
    close(child->in);
    close(child->out);
    close(child->pidfd);
}

static int inject(const struct child *child, int *remote_fd)
{
    struct mf_error err = {0};
    int fd = mf_inject_userfaultfd(child->pid, child->pidfd, remote_fd, &err);
    if (fd < 0)
        fail_msg("not attached: %s", err.text);
    return fd;
}

static unsigned count_fds(pid_t pid)
{
    char path[64];
    unsigned count = 0;
    snprintf(path, sizeof(path), "/proc/%d/fd", pid);
    cleanup_closedir DIR *dir = opendir(path);
    while (dir && readdir(dir))
        count++;
    return count;
}

/** The whole public part, on one victim. */
static void makes_fetches_and_closes(void **state)
{
    (void)state;
    struct child child;
    int remote_fd = -1;
    start_victim(&child, "nanosleep,futex");
    unsigned before = count_fds(child.pid);
    int fd = inject(&child, &remote_fd);
    assert_int_equal(fcntl(fd, F_GETFD), FD_CLOEXEC);
    assert_int_equal(fcntl(fd, F_GETFL) & O_NONBLOCK, O_NONBLOCK);
    assert_int_equal(count_fds(child.pid), before + 1);

    struct mf_error err = {0};
    uint64_t enabled = 0;
    assert_int_equal(mf_uffd_api(fd, MF_UFFD_FEATURES, MF_UFFD_FEATURES_WANTED, &enabled, &err), 0);
    assert_int_equal(enabled & MF_UFFD_FEATURES, MF_UFFD_FEATURES);
    /* It watches the victim's memory, not ours. */
    void *mine = mmap(NULL, 4096, PROT_READ, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    assert_true(mf_uffd_register(fd, (uintptr_t)mine, 4096, &err) < 0);
    munmap(mine, 4096);

    int again = mf_uffd_fetch(child.pid, child.pidfd, remote_fd, &err);
    assert_true(again >= 0);
    /* The same userfaultfd: a second handshake is refused. */
    assert_int_equal(mf_uffd_api(again, MF_UFFD_FEATURES, 0, NULL, &err), -EINVAL);
    close(again);

    assert_int_equal(mf_uffd_fetch(child.pid, child.pidfd, 0, &err), -EBADF);
    assert_int_equal(mf_inject_close(child.pid, 0, &err), -EBADF); /* not ours to close */
    assert_int_equal(mf_inject_close(child.pid, remote_fd, &err), 0);
    assert_int_equal(count_fds(child.pid), before);
    assert_int_equal(mf_uffd_fetch(child.pid, child.pidfd, remote_fd, &err), -EBADF);
    close(fd);
    finish(&child);
}

static unsigned count_userfaultfds(pid_t pid)
{
    char path[64], link[64];
    unsigned count = 0;
    snprintf(path, sizeof(path), "/proc/%d/fd", pid);
    cleanup_closedir DIR *dir = opendir(path);
    for (struct dirent *entry; dir && (entry = readdir(dir));) {
        ssize_t length = readlinkat(dirfd(dir), entry->d_name, link, sizeof(link) - 1);
        link[length > 0 ? length : 0] = '\0';
        count += strcmp(link, "anon_inode:[userfaultfd]") == 0;
    }
    return count;
}

static void find_vdso(pid_t pid, uint64_t *addr, uint64_t *length_bytes)
{
    cleanup_free struct mf_vma *vmas = NULL;
    size_t count;
    *addr = *length_bytes = 0;
    assert_int_equal(mf_target_vmas(pid, &vmas, &count, NULL), 0);
    for (size_t i = 0; i < count; i++) {
        if (strcmp(vmas[i].path, "[vdso]") == 0) {
            *addr = vmas[i].start_addr;
            *length_bytes = vmas[i].end_addr - vmas[i].start_addr;
        }
    }
}

/** run() - one call in one given thread. */
static int64_t run(const struct child *child, pid_t tid, long number, uint64_t argument)
{
    struct mf_error err = {0};
    uint64_t vdso_addr, vdso_bytes;
    int64_t result = 0;
    int rc;
    find_vdso(child->pid, &vdso_addr, &vdso_bytes);
    do {
        if (mf_tracee_seize(child->pid, tid, &err) < 0)
            fail_msg("thread %d: %s", tid, err.text);
        while ((rc = mf_tracee_stopped(tid)) == 0)
            nanosleep(&(struct timespec){.tv_nsec = 10000}, NULL);
        assert_int_equal(rc, 1);
        rc = mf_tracee_run(child->pid, tid, vdso_addr, vdso_bytes, number, (uint64_t[3]){argument},
                           &result, &err);
    } while (rc == -EAGAIN);
    if (rc < 0)
        fail_msg("thread %d: %s", tid, err.text);
    return result;
}

/** In each thread in turn, whatever it does: none may notice. */
static void goes_unnoticed_in(const char *modes)
{
    struct child child;
    start_victim(&child, modes);
    char path[64];
    snprintf(path, sizeof(path), "/proc/%d/task", child.pid);
    for (unsigned round = 0; round < rounds; round++) {
        cleanup_closedir DIR *dir = opendir(path);
        for (struct dirent *entry; (entry = readdir(dir));) {
            pid_t tid = (pid_t)strtol(entry->d_name, NULL, 10);
            if (tid <= 0)
                continue;
            int64_t fd = run(&child, tid, SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
            assert_true(fd > 2);
            assert_int_equal(run(&child, tid, SYS_close, (uint64_t)fd), 0);
        }
    }
    finish(&child);
}

static void goes_unnoticed_by_waiting_threads(void **state)
{
    (void)state;
    goes_unnoticed_in("nanosleep,futex,poll,read,epoll");
}

static void goes_unnoticed_by_running_threads(void **state)
{
    (void)state;
    goes_unnoticed_in("registers,calls");
}

static void goes_unnoticed_by_signalled_threads(void **state)
{
    (void)state;
    goes_unnoticed_in("signals,nanosleep");
}

static void goes_unnoticed_by_threads_with_a_dispatcher(void **state)
{
    (void)state;
    struct utsname system;
    unsigned major = 0, minor = 0;
    assert_int_equal(uname(&system), 0);
    if (sscanf(system.release, "%u.%u", &major, &minor) != 2 || major < 6 ||
        (major == 6 && minor < 4)) {
        print_message("skipped: no tracer can see a dispatcher before Linux 6.4\n");
        skip();
    }
    goes_unnoticed_in("dispatch,dispatch-range,nanosleep");
}

static void works_on_a_stopped_process(void **state)
{
    (void)state;
    struct child child;
    int remote_fd, status;
    start_victim(&child, "nanosleep,registers");
    kill(child.pid, SIGSTOP);
    assert_int_equal(waitpid(child.pid, &status, WUNTRACED), child.pid);
    for (unsigned i = 0; i < 10; i++) {
        close(inject(&child, &remote_fd));
        assert_int_equal(mf_inject_close(child.pid, remote_fd, NULL), 0);
    }
    /* It is still stopped, or about to be again: let go, a thread runs for just as long as it takes
     * to see that its process is stopped. */
    char path[64], line[256] = ") ?";
    snprintf(path, sizeof(path), "/proc/%d/stat", child.pid);
    for (unsigned i = 0; i < 5000 && strrchr(line, ')')[2] != 'T'; i++) {
        cleanup_fclose FILE *f = fopen(path, "re");
        assert_non_null(fgets(line, sizeof(line), f));
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    }
    assert_int_equal(strrchr(line, ')')[2], 'T');
    kill(child.pid, SIGCONT);
    /* The clock went on for the sleeper while it stood: only that it is alive and well counts. */
    finish(&child);
}

static void survives_stops_in_between(void **state)
{
    (void)state;
    struct child child;
    int remote_fd;
    start_victim(&child, "nanosleep,calls");
    pid_t nagger = fork();
    if (nagger == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        for (;;) {
            kill(child.pid, SIGSTOP);
            kill(child.pid, SIGCONT);
            nanosleep(&(struct timespec){.tv_nsec = 300000}, NULL);
        }
    }
    for (unsigned i = 0; i < rounds; i++) {
        close(inject(&child, &remote_fd));
        assert_int_equal(mf_inject_close(child.pid, remote_fd, NULL), 0);
    }
    kill(nagger, SIGKILL);
    waitpid(nagger, NULL, 0);
    kill(child.pid, SIGCONT);
    finish(&child);
}

static void refuses_the_gone(void **state)
{
    (void)state;
    struct child child;
    struct mf_error err = {0};
    int remote_fd;
    start_victim(&child, "poll");
    kill(child.pid, SIGKILL);
    siginfo_t info;
    assert_int_equal(waitid(P_PID, (id_t)child.pid, &info, WEXITED | WNOWAIT), 0);
    /* A zombie, then nothing at all. */
    assert_int_equal(mf_inject_userfaultfd(child.pid, child.pidfd, &remote_fd, &err), -ESRCH);
    assert_non_null(strstr(err.text, "is gone"));
    assert_int_equal(mf_inject_close(child.pid, 5, &err), 0);
    waitpid(child.pid, NULL, 0);
    assert_int_equal(mf_inject_userfaultfd(child.pid, child.pidfd, &remote_fd, &err), -ESRCH);
    assert_int_equal(mf_uffd_fetch(child.pid, child.pidfd, 5, &err), -ESRCH);
    assert_int_equal(mf_inject_close(child.pid, 5, &err), 0);
    close(child.in);
    close(child.out);
    close(child.pidfd);
}

/** Killed at any moment while it is attached to: an error or a descriptor, never a hang. */
static void survives_death_in_between(void **state)
{
    (void)state;
    for (unsigned i = 0; i < rounds / 2; i++) {
        struct child child;
        int remote_fd;
        start_victim(&child, "calls,nanosleep");
        pid_t killer = fork();
        if (killer == 0) {
            nanosleep(&(struct timespec){.tv_nsec = (long)(i * 100000 % 3000000)}, NULL);
            kill(child.pid, SIGKILL);
            _exit(0);
        }
        int fd = mf_inject_userfaultfd(child.pid, child.pidfd, &remote_fd, NULL);
        if (fd >= 0)
            close(fd);
        else
            assert_int_equal(fd, -ESRCH);
        waitpid(killer, NULL, 0);
        end(&child);
    }
}

/** status_line() - the number after @key in the status of a thread, or -1. */
static long status_line(pid_t tid, const char *key)
{
    char path[64], line[256];
    snprintf(path, sizeof(path), "/proc/%d/status", tid);
    cleanup_fclose FILE *f = fopen(path, "re");
    while (f && fgets(line, sizeof(line), f)) {
        if (strncmp(line, key, strlen(key)) == 0)
            return strtol(line + strlen(key), NULL, 10);
    }
    return -1;
}

/** untraced() - has no thread of @pid a tracer? */
static bool untraced(pid_t pid)
{
    char path[64];
    snprintf(path, sizeof(path), "/proc/%d/task", pid);
    cleanup_closedir DIR *dir = opendir(path);
    for (struct dirent *entry; dir && (entry = readdir(dir));) {
        pid_t tid = (pid_t)strtol(entry->d_name, NULL, 10);
        if (tid > 0 && status_line(tid, "TracerPid:") > 0)
            return false;
    }
    return true;
}

/** memferryd may be killed at any moment: the helper puts everything right without it. */
static void survives_the_death_of_who_asked(void **state)
{
    (void)state;
    struct child child;
    start_victim(&child, "calls,nanosleep,registers");
    prctl(PR_SET_CHILD_SUBREAPER, 1); /* so that the orphaned helpers are ours to reap */
    for (unsigned i = 0; i < rounds / 2; i++) {
        pid_t asker = fork();
        if (asker == 0) {
            int remote_fd;
            mf_inject_userfaultfd(child.pid, child.pidfd, &remote_fd, NULL);
            _exit(0);
        }
        nanosleep(&(struct timespec){.tv_nsec = (long)(i * 70000 % 2000000)}, NULL);
        kill(asker, SIGKILL);
        waitpid(asker, NULL, 0);
        /* All that is left to wait for are the helpers and the victim. */
        siginfo_t info = {0};
        do {
            info.si_pid = 0;
            waitpid(-1, NULL, WNOHANG);
        } while (waitid(P_ALL, 0, &info, WEXITED | WNOHANG | WNOWAIT) == 0 &&
                 (info.si_pid != 0 || !untraced(child.pid)));
    }
    prctl(PR_SET_CHILD_SUBREAPER, 0);
    finish(&child);
    while (waitpid(-1, NULL, 0) > 0)
        ;
}

static void refuses_one_traced_by_another(void **state)
{
    (void)state;
    struct child child;
    struct mf_error err = {0};
    int remote_fd, ready[2];
    char byte;
    start_victim(&child, "");
    assert_int_equal(pipe2(ready, O_CLOEXEC), 0);
    pid_t debugger = fork();
    if (debugger == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        ptrace(PTRACE_SEIZE, child.pid, NULL, NULL);
        mf_write_all(ready[1], "", 1);
        for (;;)
            pause();
    }
    assert_int_equal(read(ready[0], &byte, 1), 1);
    close(ready[0]);
    close(ready[1]);
    int rc = mf_inject_userfaultfd(child.pid, child.pidfd, &remote_fd, &err);
    char expected[64];
    snprintf(expected, sizeof(expected), "test_inject (pid %d) is tracing it", debugger);
    kill(debugger, SIGKILL);
    waitpid(debugger, NULL, 0);
    assert_int_equal(rc, -EPERM);
    if (!strstr(err.text, expected))
        fail_msg("no '%s' in: %s", expected, err.text);
    close(inject(&child, &remote_fd)); /* the debugger is gone: nothing stands in the way */
    finish(&child);
}

static const char qemu_path[] = "/usr/bin/qemu-system-x86_64";

static void start_qemu(struct child *child)
{
    static const char sandbox[] =
        "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";
    start(child, (char *const[]){(char *)(uintptr_t)qemu_path, "-nodefaults", "-display", "none",
                                 "-accel", "tcg", "-m", "64", "-smp", "2", "-S", "-sandbox",
                                 (char *)(uintptr_t)sandbox, "-qmp", "stdio", NULL});
    char line[512];
    assert_true(read(child->out, line, sizeof(line)) > 0); /* QMP's greeting: it is up */
}

static void quit_qemu(struct child *child)
{
    static const char quit[] = "{\"execute\":\"qmp_capabilities\"}{\"execute\":\"quit\"}";
    int status = -1;
    assert_int_equal(mf_write_all(child->in, quit, sizeof(quit) - 1), 0);
    assert_int_equal(waitpid(child->pid, &status, 0), child->pid);
    assert_int_equal(status, 0);
    close(child->in);
    close(child->out);
    close(child->pidfd);
}

static void passes_through_qemus_sandbox(void **state)
{
    (void)state;
    if (access(qemu_path, X_OK) != 0) {
        print_message("skipped: %s is not installed\n", qemu_path);
        skip();
    }
    struct child child;
    int remote_fd;
    start_qemu(&child);
    for (unsigned i = 0; i < rounds; i++) {
        close(inject(&child, &remote_fd));
        assert_int_equal(count_userfaultfds(child.pid), 1);
        assert_int_equal(mf_inject_close(child.pid, remote_fd, NULL), 0);
    }
    assert_int_equal(count_userfaultfds(child.pid), 0);
    quit_qemu(&child);
}

static int allow_everything(void)
{
    struct sock_filter allow = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    struct sock_fprog program = {.len = 1, .filter = &allow};
    return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) ||
           prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program);
}

/** As a hardened service, which can't suspend the target's filter: QEMU's is known, another's is
 * not. */
static void under_a_filter_of_its_own_takes_only_qemu(void **state)
{
    (void)state;
    struct child filtered = {.pid = fork()};
    if (filtered.pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (allow_everything() != 0)
            _exit(1);
        for (;;)
            pause();
    }
    filtered.pidfd = (int)syscall(SYS_pidfd_open, filtered.pid, 0);
    bool have_qemu = access(qemu_path, X_OK) == 0;
    struct child qemu;
    if (have_qemu)
        start_qemu(&qemu);

    /* From a child, since a filter is for good; its exit status tells what went wrong. */
    pid_t asker = fork();
    if (asker == 0) {
        int remote_fd;
        struct mf_error err = {0};
        while (status_line(filtered.pid, "Seccomp:") != SECCOMP_MODE_FILTER)
            sched_yield();
        int fd = mf_inject_userfaultfd(filtered.pid, filtered.pidfd, &remote_fd, &err);
        bool could = fd >= 0 && mf_inject_close(filtered.pid, remote_fd, NULL) == 0;
        if (!could || allow_everything() != 0)
            _exit(1); /* without a filter of ours it must work */
        fd = mf_inject_userfaultfd(filtered.pid, filtered.pidfd, &remote_fd, &err);
        if (fd != -EACCES || !strstr(err.text, "seccomp filter"))
            _exit(2);
        if (have_qemu && mf_inject_userfaultfd(qemu.pid, qemu.pidfd, &remote_fd, &err) < 0)
            _exit(3);
        _exit(0);
    }
    int status = -1;
    waitpid(asker, &status, 0);
    kill(filtered.pid, SIGKILL);
    waitpid(filtered.pid, NULL, 0);
    close(filtered.pidfd);
    if (have_qemu)
        quit_qemu(&qemu);
    assert_int_equal(status, 0);
}

static unsigned holders(const struct stat *of, int fd)
{
    unsigned count = 0;
    cleanup_closedir DIR *proc = opendir("/proc");
    for (struct dirent *entry; proc && (entry = readdir(proc));) {
        char path[300];
        struct stat st;
        snprintf(path, sizeof(path), "/proc/%s/fd/%d", entry->d_name, fd);
        count += stat(path, &st) == 0 && st.st_dev == of->st_dev && st.st_ino == of->st_ino &&
                 strtol(entry->d_name, NULL, 10) != getpid();
    }
    return count;
}

static _Noreturn void *fork_without_end(void *arg)
{
    pid_t alive[24] = {0};
    const pid_t self = getpid();
    (void)arg;
    for (size_t i = 0;; i = (i + 1) % (sizeof(alive) / sizeof(alive[0]))) {
        if (alive[i]) {
            kill(alive[i], SIGKILL);
            waitpid(alive[i], NULL, 0);
        }
        alive[i] = fork();
        if (alive[i] == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            while (getppid() == self) /* it may have died before that was said */
                pause();
            _exit(0);
        }
    }
}

/** A thread forks children that stay, and copies enough memory for a fork to take a while. */
static void leaves_no_copy_to_children(void **state)
{
    (void)state;
    const size_t length_bytes = (size_t)64 << 20;
    struct child child = {.pid = fork()};
    if (child.pid == 0) {
        pthread_t forker;
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        char *memory =
            mmap(NULL, length_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        madvise(memory, length_bytes, MADV_NOHUGEPAGE);
        memset(memory, 1, length_bytes);
        if (pthread_create(&forker, NULL, fork_without_end, NULL) != 0)
            _exit(1);
        for (;;)
            pause();
    }
    child.pidfd = (int)syscall(SYS_pidfd_open, child.pid, 0);
    unsigned copies = 0;
    nanosleep(&(struct timespec){.tv_nsec = 100000000}, NULL);
    for (unsigned i = 0; i < rounds; i++) {
        int remote_fd = -1;
        struct mf_error err = {0};
        struct stat st;
        cleanup_close int fd = inject(&child, &remote_fd);
        assert_int_equal(fstat(fd, &st), 0);
        assert_int_equal(mf_uffd_api(fd, MF_UFFD_FEATURES, 0, NULL, &err), 0);
        copies += holders(&st, remote_fd) - 1;
        if (mf_withdraw(child.pid, fd, remote_fd, &err) < 0)
            fail_msg("not withdrawn: %s", err.text);
        nanosleep(&(struct timespec){.tv_nsec = 20000000}, NULL);
        assert_int_equal(holders(&st, remote_fd), 0);
    }
    print_message("%u copies in %u rounds\n", copies, rounds);
    kill(child.pid, SIGKILL);
    waitpid(child.pid, NULL, 0);
    close(child.pidfd);
}

/** Nothing of ours may remain: no child, hence no helper, and no descriptor. */
static unsigned fds_at_start;

static int leaves_nothing_behind(void **state)
{
    (void)state;
    if (waitpid(-1, NULL, WNOHANG) != -1 || errno != ECHILD) {
        print_error("a child process is left behind\n");
        return -1;
    }
    if (count_fds(getpid()) != fds_at_start) {
        print_error("descriptors are left behind\n");
        return -1;
    }
    return 0;
}

int main(int argc, char **argv)
{
    if (argc < 2)
        return 2;
    victim_path = argv[1];
    if (argc > 2)
        rounds = (unsigned)strtoul(argv[2], NULL, 10);
    if (!mf_tracee_supported()) {
        fprintf(stderr, "skipped: attaching is implemented for x86-64 only\n");
        return 77;
    }
    if (geteuid() != 0) {
        fprintf(stderr, "skipped: attaching to another process needs root\n");
        return 77;
    }
    fds_at_start = count_fds(getpid());
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(makes_fetches_and_closes, leaves_nothing_behind),
        cmocka_unit_test_teardown(goes_unnoticed_by_waiting_threads, leaves_nothing_behind),
        cmocka_unit_test_teardown(goes_unnoticed_by_running_threads, leaves_nothing_behind),
        cmocka_unit_test_teardown(goes_unnoticed_by_signalled_threads, leaves_nothing_behind),
        cmocka_unit_test_teardown(goes_unnoticed_by_threads_with_a_dispatcher,
                                  leaves_nothing_behind),
        cmocka_unit_test_teardown(works_on_a_stopped_process, leaves_nothing_behind),
        cmocka_unit_test_teardown(survives_stops_in_between, leaves_nothing_behind),
        cmocka_unit_test_teardown(refuses_the_gone, leaves_nothing_behind),
        cmocka_unit_test_teardown(survives_death_in_between, leaves_nothing_behind),
        cmocka_unit_test_teardown(survives_the_death_of_who_asked, leaves_nothing_behind),
        cmocka_unit_test_teardown(refuses_one_traced_by_another, leaves_nothing_behind),
        cmocka_unit_test_teardown(passes_through_qemus_sandbox, leaves_nothing_behind),
        cmocka_unit_test_teardown(under_a_filter_of_its_own_takes_only_qemu, leaves_nothing_behind),
        cmocka_unit_test_teardown(leaves_no_copy_to_children, leaves_nothing_behind),
    };
    return cmocka_run_group_tests_name("inject", tests, NULL, NULL);
}
