/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/memferryd/process/guard.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "lib/log.h"
#include "lib/util.h"

#define TRIES 30u
#define WORD_FD 3
#define TARGET_FD 4

/** What memferryd tells: always the whole. Less than PIPE_BUF, so it arrives in one piece. */
struct word {
    pid_t group;
    bool shall_return;
};

struct guard {
    struct word word;
    pid_t pid;
    int pidfd, pipe_fd;
    struct event *exit_event;
};

/* ---- the guard itself ---- */

static bool is_alive(int pidfd)
{
    return syscall(SYS_pidfd_send_signal, pidfd, 0, NULL, 0) == 0;
}

/* Return: true if it ended with 0 within its time. */
static bool run(const struct command_order *order)
{
    const uint64_t deadline_ns = mf_now_ns() + order->timeout_ms * UINT64_C(1000000);
    pid_t pid = fork();
    if (pid == 0)
        command_exec(order, STDERR_FILENO);
    int status = 0;
    while (pid > 0) {
        pid_t ended = waitpid(pid, &status, WNOHANG);
        if (ended == pid)
            return WIFEXITED(status) && WEXITSTATUS(status) == 0;
        if (ended < 0 && errno != EINTR)
            return false;
        if (mf_now_ns() > deadline_ns)
            kill(-pid, SIGKILL);
        poll(NULL, 0, 10);
    }
    return false;
}

static void let_go(const struct command_order *resume)
{
    if (!is_alive(TARGET_FD))
        return;
    mf_log(MF_LOG_WARNING, "%s: memferryd has left the process paused; letting it go on",
           resume->session);
    syscall(SYS_pidfd_send_signal, TARGET_FD, SIGCONT, NULL, 0);
    for (unsigned i = 0; resume->text[0] && i < TRIES && is_alive(TARGET_FD); i++) {
        if (run(resume))
            return;
        poll(NULL, 0, 1000);
    }
}

static void watch(const struct command_order *resume)
{
    struct word word = {0}, next;
    for (;;) {
        ssize_t n = read(WORD_FD, &next, sizeof(next));
        if (n < 0 && errno == EINTR)
            continue;
        if (n != (ssize_t)sizeof(next))
            break;
        word = next;
    }
    if (word.group > 0)
        kill(-word.group, SIGKILL);
    if (word.shall_return)
        let_go(resume);
}

__attribute__((noreturn)) static void guard_main(int word_fd, int target_fd,
                                                 const struct command_order *resume)
{
    prctl(PR_SET_NAME, "memferry-guard", 0, 0, 0);
    setsid();
    for (int number = 1; number < NSIG; number++)
        signal(number, SIG_DFL);
    /* It leaves when memferryd does, not before. */
    signal(SIGTERM, SIG_IGN);
    signal(SIGINT, SIG_IGN);
    signal(SIGHUP, SIG_IGN);
    signal(SIGPIPE, SIG_IGN);
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    /* All else goes: a mover, say, has to see the end of memferryd's socket. */
    int word_high = fcntl(word_fd, F_DUPFD, 10), target_high = fcntl(target_fd, F_DUPFD, 10);
    if (word_high < 0 || target_high < 0 || dup2(word_high, WORD_FD) < 0 ||
        dup2(target_high, TARGET_FD) < 0)
        _exit(1);
    syscall(SYS_close_range, 5u, ~0u, 0u);
    watch(resume);
    _exit(0);
}

/* ---- memferryd's side ---- */

static void destroy(struct guard *guard)
{
    if (guard->exit_event)
        event_free(guard->exit_event);
    if (guard->pidfd >= 0)
        close(guard->pidfd);
    if (guard->pipe_fd >= 0)
        close(guard->pipe_fd);
    free(guard);
}

static void on_exit_event(evutil_socket_t fd, short what, void *arg)
{
    struct guard *guard = arg;
    (void)fd;
    (void)what;
    if (waitpid(guard->pid, NULL, WNOHANG) != guard->pid)
        return;
    if (guard->pipe_fd < 0) { /* dismissed */
        destroy(guard);
        return;
    }
    mf_log(MF_LOG_WARNING,
           "a guard (pid %d) ended before its time: should memferryd die now, a "
           "paused process would have to be resumed by hand",
           (int)guard->pid);
    event_del(guard->exit_event);
    guard->pid = -1;
}

int guard_start(struct event_base *base, int pidfd, const struct command_order *resume,
                struct guard **out, struct mf_error *err)
{
    int pipe_fds[2];
    struct guard *guard = calloc(1, sizeof(*guard));
    if (!guard)
        return mf_fail(err, ENOMEM, "out of memory for the guard of %s", resume->session);
    guard->pidfd = guard->pipe_fd = -1;
    if (pipe2(pipe_fds, O_CLOEXEC) != 0) {
        destroy(guard);
        return mf_fail(err, errno, "cannot make a pipe for the guard of %s: %s", resume->session,
                       strerror(errno));
    }
    guard->pipe_fd = pipe_fds[1];
    guard->pid = fork();
    int fork_errno = errno;
    if (guard->pid == 0) {
        close(pipe_fds[1]);
        guard_main(pipe_fds[0], pidfd, resume);
    }
    close(pipe_fds[0]);
    if (guard->pid < 0) {
        destroy(guard);
        return mf_fail(err, fork_errno, "cannot start the guard of %s: %s", resume->session,
                       strerror(fork_errno));
    }
    guard->pidfd = (int)syscall(SYS_pidfd_open, guard->pid, 0);
    guard->exit_event = event_new(base, guard->pidfd, EV_READ | EV_PERSIST, on_exit_event, guard);
    if (guard->pidfd < 0 || !guard->exit_event || event_add(guard->exit_event, NULL) != 0) {
        kill(guard->pid, SIGKILL);
        waitpid(guard->pid, NULL, 0);
        destroy(guard);
        return mf_fail(err, ENOMEM, "cannot watch the guard of %s", resume->session);
    }
    *out = guard;
    return 0;
}

static void say(struct guard *guard)
{
    ssize_t n = write(guard->pipe_fd, &guard->word, sizeof(guard->word));
    (void)n; /* EPIPE: its end was logged */
}

void guard_command(struct guard *guard, pid_t group)
{
    guard->word.group = group;
    say(guard);
}

void guard_return(struct guard *guard, bool shall)
{
    guard->word.shall_return = shall;
    say(guard);
}

void guard_dismiss(struct guard *guard)
{
    if (!guard)
        return;
    close(guard->pipe_fd);
    guard->pipe_fd = -1;
    if (guard->pid < 0)
        destroy(guard);
}
