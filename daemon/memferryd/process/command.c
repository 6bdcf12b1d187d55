/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/memferryd/process/command.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "lib/log.h"
#include "lib/util.h"

#define ENVIRONMENT_MAX 16u
#define LINE_BYTES 400u
#define LINES_MAX 200u /* of one command in the log: each may be a write that blocks */

struct command {
    command_done done; /**< NULL: forgotten */
    void *arg;
    char session[64], word[16];
    pid_t pid;
    int pidfd, output_fd;
    struct event *exit_event, *output_event, *timeout_event;
    unsigned timeout_ms;
    bool late, killed;
    char line[LINE_BYTES]; /**< of its output, the one that is not complete */
    size_t line_bytes;
    char last_line[LINE_BYTES];
    unsigned long long lines;
};

/* ---- the child's side ---- */

/* Descriptor @from becomes @to, /dev/null for -1. They are all above 2. */
static bool place(int from, int to, int flags)
{
    int null = from < 0 ? open("/dev/null", flags) : -1;
    if (from < 0 && null < 0)
        return false;
    return dup2(from < 0 ? null : from, to) >= 0;
}

/* What memferryd has for itself alone: to be in time for guests, and to live when memory is short.
 */
static void become_ordinary(void)
{
    setpriority(PRIO_PROCESS, 0, 0);
    int fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
    if (fd >= 0) {
        ssize_t n = write(fd, "0", 1);
        (void)n; /* then it lives longer than it should */
        close(fd);
    }
}

void command_exec(const struct command_order *order, int error_fd)
{
    static const char path[] = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    const char *environment[ENVIRONMENT_MAX + 3] = {path, "LC_ALL=C.UTF-8"};
    for (unsigned i = 0; i < ENVIRONMENT_MAX && order->environment[i]; i++)
        environment[2 + i] = order->environment[i];
    for (int number = 1; number < NSIG; number++)
        signal(number, SIG_DFL);
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    setsid();
    umask(077);
    become_ordinary();
    if (chdir("/") == 0 && place(order->stdin_fd, 0, O_RDONLY) &&
        place(order->stdout_fd >= 0 ? order->stdout_fd : error_fd, 1, O_WRONLY) &&
        place(error_fd, 2, O_WRONLY)) {
        syscall(SYS_close_range, 3u, ~0u, 0u);
        execle("/bin/sh", "sh", "-c", order->text, (char *)NULL,
               (char *const *)(uintptr_t)environment);
    }
    _exit(127);
}

/* ---- memferryd's side ---- */

static void destroy(struct command *command)
{
    if (command->exit_event)
        event_free(command->exit_event);
    if (command->output_event)
        event_free(command->output_event);
    if (command->timeout_event)
        event_free(command->timeout_event);
    if (command->pidfd >= 0)
        close(command->pidfd);
    if (command->output_fd >= 0)
        close(command->output_fd);
    free(command);
}

/* It becomes part of sentences, and those of JSON. Return: the bytes of a character of UTF-8 at
 * @at, 0 if it is none. Overlong forms and the like are left to who displays them. */
static size_t character(const char *at)
{
    const unsigned char first = (unsigned char)*at;
    size_t length = first < 0x80                    ? 1
                    : first >= 0xc2 && first < 0xe0 ? 2
                    : first >= 0xe0 && first < 0xf0 ? 3
                    : first >= 0xf0 && first < 0xf5 ? 4
                                                    : 0;
    for (size_t i = 1; i < length; i++)
        if (((unsigned char)at[i] & 0xc0) != 0x80)
            return 0;
    return length;
}

static void end_line(struct command *command)
{
    if (command->line_bytes == 0)
        return;
    command->line[command->line_bytes] = '\0';
    for (size_t at = 0, length; command->line[at]; at += length ? length : 1) {
        length = character(&command->line[at]);
        if (!length)
            command->line[at] = '?';
    }
    command->line_bytes = 0;
    memcpy(command->last_line, command->line, sizeof(command->last_line));
    if (++command->lines <= LINES_MAX)
        mf_log(MF_LOG_INFO, "%s: %s: %s", command->session, command->word, command->line);
}

/* At most @limit_bytes: a command that says much has no more of memferryd than others. */
static void take_output(struct command *command, size_t limit_bytes)
{
    char bytes[4096];
    while (limit_bytes >= sizeof(bytes)) {
        limit_bytes -= sizeof(bytes);
        ssize_t n = read(command->output_fd, bytes, sizeof(bytes));
        if (n < 0 && (errno == EAGAIN || errno == EINTR))
            return;
        if (n <= 0) {
            event_del(command->output_event);
            return;
        }
        for (ssize_t at = 0; at < n; at++) {
            unsigned char c = (unsigned char)bytes[at];
            if (c == '\n' || command->line_bytes + 1 == sizeof(command->line))
                end_line(command);
            if (c != '\n')
                command->line[command->line_bytes++] = (char)(c < 0x20 || c == 0x7f ? ' ' : c);
        }
    }
}

static void on_output(evutil_socket_t fd, short what, void *arg)
{
    (void)fd;
    (void)what;
    take_output(arg, 4096);
}

static void kill_group(const struct command *command)
{
    /* Its group does not exist before it has run setsid(2). */
    if (kill(-command->pid, SIGKILL) != 0)
        kill(command->pid, SIGKILL);
}

static void on_timeout(evutil_socket_t fd, short what, void *arg)
{
    struct command *command = arg;
    (void)fd;
    (void)what;
    command->late = true;
    kill_group(command);
}

/* Return: NULL for success. */
static const struct mf_error *judge(const struct command *command, const siginfo_t *info,
                                    struct mf_error *err)
{
    const char *said = command->last_line;
    const char *saying = said[0] ? "; it said: " : "";
    if (command->late)
        mf_fail(err, ETIMEDOUT,
                "the %s command of %s did not end within %u s and was killed (--timeout)%s%s",
                command->word, command->session, command->timeout_ms / 1000, saying, said);
    else if (command->killed)
        mf_fail(err, ECANCELED, "the %s command of %s was killed", command->word, command->session);
    else if (info->si_code != CLD_EXITED)
        mf_fail(err, EIO, "the %s command of %s was killed by signal %d (%s)%s%s", command->word,
                command->session, info->si_status, strsignal(info->si_status), saying, said);
    else if (info->si_status != 0)
        mf_fail(err, EIO, "the %s command of %s failed with exit status %d%s%s", command->word,
                command->session, info->si_status, saying, said);
    else
        return NULL;
    return err;
}

static void on_exit_event(evutil_socket_t fd, short what, void *arg)
{
    struct command *command = arg;
    siginfo_t info = {0};
    struct mf_error err;
    (void)fd;
    (void)what;
    if (waitid(P_PID, (id_t)command->pid, &info, WEXITED | WNOHANG) != 0 || info.si_pid == 0)
        return;
    take_output(command, 65536); /* what a pipe holds: the last line says why it failed */
    end_line(command);
    if (command->lines > LINES_MAX)
        mf_log(MF_LOG_INFO, "%s: %s: %llu more lines were not logged", command->session,
               command->word, command->lines - LINES_MAX);
    const struct mf_error *why = judge(command, &info, &err);
    if (why) /* what it left running would go on with half the work */
        kill(-command->pid, SIGKILL);
    command_done done = command->done;
    void *done_arg = command->arg;
    destroy(command);
    if (done)
        done(done_arg, why);
}

int command_start(struct event_base *base, const struct command_order *order, command_done done,
                  void *arg, struct command **out, struct mf_error *err)
{
    int output[2];
    struct command *command = calloc(1, sizeof(*command));
    if (!command)
        return mf_fail(err, ENOMEM, "out of memory for the %s command of %s", order->word,
                       order->session);
    command->pidfd = command->output_fd = -1;
    snprintf(command->session, sizeof(command->session), "%s", order->session);
    snprintf(command->word, sizeof(command->word), "%s", order->word);
    command->timeout_ms = order->timeout_ms;
    command->done = done;
    command->arg = arg;
    if (pipe2(output, O_CLOEXEC) != 0) {
        destroy(command);
        return mf_fail(err, errno, "cannot make a pipe for the %s command of %s: %s", order->word,
                       order->session, strerror(errno));
    }
    command->output_fd = output[0];
    command->pid = fork();
    int fork_errno = errno;
    if (command->pid == 0)
        command_exec(order, output[1]);
    close(output[1]);
    if (command->pid < 0) {
        destroy(command);
        return mf_fail(err, fork_errno, "cannot start the %s command of %s: %s", order->word,
                       order->session, strerror(fork_errno));
    }
    command->pidfd = (int)syscall(SYS_pidfd_open, command->pid, 0);
    evutil_make_socket_nonblocking(command->output_fd);
    command->exit_event =
        event_new(base, command->pidfd, EV_READ | EV_PERSIST, on_exit_event, command);
    command->output_event =
        event_new(base, command->output_fd, EV_READ | EV_PERSIST, on_output, command);
    command->timeout_event = evtimer_new(base, on_timeout, command);
    const struct timeval limit = {.tv_sec = (time_t)(order->timeout_ms / 1000),
                                  .tv_usec = (suseconds_t)(order->timeout_ms % 1000) * 1000};
    if (command->pidfd < 0 || !command->exit_event || !command->output_event ||
        !command->timeout_event || event_add(command->exit_event, NULL) != 0 ||
        event_add(command->output_event, NULL) != 0 ||
        event_add(command->timeout_event, &limit) != 0) {
        kill_group(command);
        waitpid(command->pid, NULL, 0);
        destroy(command);
        return mf_fail(err, ENOMEM, "cannot watch the %s command of %s", order->word,
                       order->session);
    }
    mf_log(MF_LOG_DEBUG, "%s: %s: running %s", order->session, order->word, order->text);
    *out = command;
    return 0;
}

pid_t command_group(const struct command *command)
{
    return command->pid;
}

void command_kill(struct command *command)
{
    command->killed = true;
    kill_group(command);
}

void command_forget(struct command *command)
{
    if (!command)
        return;
    command->done = NULL;
    command_kill(command);
}
