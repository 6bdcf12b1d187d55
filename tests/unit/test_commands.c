/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* daemon/memferryd/process: commands, the relay of their bytes, and the guard, each alone. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "daemon/memferryd/process/command.h"
#include "daemon/memferryd/process/guard.h"
#include "daemon/memferryd/process/relay.h"
#include "lib/process.h"
#include "lib/util.h"

static struct event_base *base;

/* ---- commands ---- */

struct ended {
    unsigned times;
    int code; /* 0: success */
    char text[768];
};

static void on_ended(void *arg, const struct mf_error *why)
{
    struct ended *ended = arg;
    ended->times++;
    ended->code = why ? why->code : 0;
    snprintf(ended->text, sizeof(ended->text), "%s", why ? why->text : "");
}

static const char *const environment[] = {"MEMFERRY_PID=17", NULL};

static struct command_order order_of(const char *text, unsigned timeout_ms)
{
    return (struct command_order){.session = "db",
                                  .word = "save",
                                  .text = text,
                                  .environment = environment,
                                  .stdin_fd = -1,
                                  .stdout_fd = -1,
                                  .timeout_ms = timeout_ms};
}

static void run_until(const unsigned *times)
{
    while (!*times)
        event_base_loop(base, EVLOOP_ONCE);
}

/* Children that were forgotten are reaped by the loop. */
static void reap_all(void)
{
    for (unsigned i = 0; i < 2000; i++) {
        siginfo_t info = {0};
        if (waitid(P_ALL, 0, &info, WEXITED | WNOHANG | WNOWAIT) != 0 && errno == ECHILD)
            return;
        event_base_loop(base, EVLOOP_NONBLOCK);
        usleep(1000);
    }
    fail_msg("a child is left");
}

static struct ended outcome(const char *text, unsigned timeout_ms)
{
    struct ended ended = {0};
    struct command *command = NULL;
    struct mf_error err;
    struct command_order order = order_of(text, timeout_ms);
    assert_int_equal(command_start(base, &order, on_ended, &ended, &command, &err), 0);
    run_until(&ended.times);
    assert_int_equal(ended.times, 1);
    return ended;
}

static void test_exit_codes(void **state)
{
    (void)state;
    assert_int_equal(outcome("exit 0", 10000).code, 0);
    assert_int_equal(outcome("true | false | true", 10000).code, 0);
    struct ended ended = outcome("echo first; echo ' the reason' >&2; exit 3", 10000);
    assert_int_equal(ended.code, EIO);
    assert_string_equal(ended.text,
                        "the save command of db failed with exit status 3; it said:  the "
                        "reason");
    ended = outcome("kill -TERM $$", 10000);
    assert_non_null(strstr(ended.text, "was killed by signal 15"));
    ended = outcome("/nowhere/program", 10000);
    assert_non_null(strstr(ended.text, "exit status 127"));
}

static void test_what_it_says_is_fit_to_print(void **state)
{
    (void)state;
    struct ended ended = outcome("printf 'a\\001b\\377\\303\\244c'; exit 1", 10000);
    assert_non_null(strstr(ended.text, "it said: a b?\303\244c"));
    /* Of many the last counts. */
    ended = outcome("seq 100000; exit 1", 10000);
    assert_non_null(strstr(ended.text, "it said: 100000"));
    /* No line's length matters. */
    ended = outcome("head -c 3000 /dev/zero | tr '\\0' x; exit 1", 10000);
    assert_true(strlen(ended.text) < 600);
}

static void test_timeout_kills_the_group(void **state)
{
    (void)state;
    char path[] = "/tmp/memferry-commands-XXXXXX", text[200];
    int fd = mkstemp(path);
    snprintf(text, sizeof(text), "sleep 1000 & echo $! > %s; wait", path);
    struct ended ended = outcome(text, 300);
    assert_int_equal(ended.code, ETIMEDOUT);
    char number[16] = "";
    assert_true(pread(fd, number, sizeof(number) - 1, 0) > 0);
    pid_t sleeper = (pid_t)atoi(number);
    assert_true(sleeper > 1);
    for (unsigned i = 0; mf_process_run(sleeper) != MF_RUN_GONE && i < 5000; i++)
        usleep(1000);
    assert_int_equal(mf_process_run(sleeper), MF_RUN_GONE);
    close(fd);
    unlink(path);
}

static void test_environment(void **state)
{
    (void)state;
    setenv("SECRET", "of memferryd", 1);
    signal(SIGPIPE, SIG_IGN);
    struct ended ended =
        outcome("[ \"$SECRET\" = '' ] && [ $MEMFERRY_PID = 17 ] && [ $(pwd) = / ] && "
                "[ $(umask) = 0077 ] && "
                /* SIGPIPE is what ends it, and not an error of write(2). */
                "{ (trap '' TERM; yes; echo $? >&2) | head -n 1; }",
                20000);
    assert_int_equal(ended.code, 0);
    signal(SIGPIPE, SIG_DFL);
    unsetenv("SECRET");
}

static void test_killed_and_forgotten(void **state)
{
    (void)state;
    struct ended ended = {0};
    struct command *command = NULL;
    struct command_order order = order_of("sleep 1000", 100000);
    assert_int_equal(command_start(base, &order, on_ended, &ended, &command, NULL), 0);
    command_kill(command);
    run_until(&ended.times);
    assert_int_equal(ended.code, ECANCELED);

    ended = (struct ended){0};
    assert_int_equal(command_start(base, &order, on_ended, &ended, &command, NULL), 0);
    command_forget(command);
    reap_all();
    assert_int_equal(ended.times, 0);
}

/* ---- the relay ---- */

struct relayed {
    unsigned times;
    int error;
    uint64_t bytes;
};

static void on_relayed(void *arg, int error, uint64_t passed_bytes)
{
    struct relayed *relayed = arg;
    relayed->times++;
    relayed->error = error;
    relayed->bytes = passed_bytes;
}

#define MUCH_BYTES ((size_t)3 << 20)

static void test_relay_passes_all(void **state)
{
    (void)state;
    int in[2], out[2];
    assert_int_equal(pipe2(in, O_CLOEXEC), 0);
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, out), 0);
    pid_t writer = fork();
    if (writer == 0) {
        uint8_t *data = malloc(MUCH_BYTES);
        for (size_t i = 0; data && i < MUCH_BYTES; i++)
            data[i] = (uint8_t)(i * 7 / 3);
        _exit(!data || mf_write_all(in[1], data, MUCH_BYTES) < 0 ? 1 : 0);
    }
    close(in[1]);
    struct relayed relayed = {0};
    struct relay *relay = relay_start(base, in[0], out[0], false, on_relayed, &relayed);
    assert_non_null(relay);
    size_t have = 0;
    cleanup_free uint8_t *got = malloc(MUCH_BYTES);
    while (!relayed.times || have < MUCH_BYTES) {
        event_base_loop(base, EVLOOP_NONBLOCK);
        ssize_t n = recv(out[1], got + have, MUCH_BYTES - have, MSG_DONTWAIT);
        have += n > 0 ? (size_t)n : 0;
    }
    assert_int_equal(relayed.error, 0);
    assert_int_equal(relayed.bytes, MUCH_BYTES);
    for (size_t i = 0; i < MUCH_BYTES; i++)
        assert_int_equal(got[i], (uint8_t)(i * 7 / 3));
    /* The end is not passed on before it is told to. */
    uint8_t byte;
    assert_int_equal(recv(out[1], &byte, 1, MSG_DONTWAIT), -1);
    assert_int_equal(errno, EAGAIN);
    relay_free(relay);
    assert_int_equal(recv(out[1], &byte, 1, MSG_DONTWAIT), 0);
    close(out[1]);
    waitpid(writer, NULL, 0);
}

static void test_relay_without_a_reader(void **state)
{
    (void)state;
    signal(SIGPIPE, SIG_IGN);
    for (int lossy = 0; lossy < 2; lossy++) {
        int in[2], out[2];
        assert_int_equal(pipe2(in, O_CLOEXEC), 0);
        assert_int_equal(pipe2(out, O_CLOEXEC), 0);
        close(out[0]);
        assert_int_equal(write(in[1], "state", 5), 5);
        close(in[1]);
        struct relayed relayed = {0};
        struct relay *relay = relay_start(base, in[0], out[1], lossy, on_relayed, &relayed);
        run_until(&relayed.times);
        assert_int_equal(relayed.error, lossy ? 0 : EPIPE);
        relay_free(relay);
    }
    signal(SIGPIPE, SIG_DFL);
}

/* ---- the guard ---- */

struct guarded {
    pid_t target;
    int pidfd;
    char mark[64];
};

/* A process that does nothing, stopped; and the resume command leaves a mark. */
static struct guarded stopped_target(void)
{
    struct guarded g = {.target = fork()};
    if (g.target == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        for (;;)
            pause();
    }
    g.pidfd = (int)syscall(SYS_pidfd_open, g.target, 0);
    assert_true(g.pidfd >= 0);
    kill(g.target, SIGSTOP);
    while (mf_process_run(g.target) != MF_RUN_STOPPED)
        usleep(1000);
    snprintf(g.mark, sizeof(g.mark), "/tmp/memferry-guard-%d", (int)g.target);
    return g;
}

static void end_target(struct guarded *g)
{
    kill(g->target, SIGKILL);
    waitpid(g->target, NULL, 0);
    close(g->pidfd);
    unlink(g->mark);
}

static struct guard *guard_of(const struct guarded *g)
{
    char text[128];
    struct guard *guard = NULL;
    struct mf_error err;
    snprintf(text, sizeof(text), "touch %s", g->mark);
    struct command_order order = order_of(text, 5000);
    assert_int_equal(guard_start(base, g->pidfd, &order, &guard, &err), 0);
    return guard;
}

static void test_guard_returns_the_target(void **state)
{
    (void)state;
    struct guarded g = stopped_target();
    struct guard *guard = guard_of(&g);
    guard_return(guard, true);
    guard_dismiss(guard); /* to the guard this is what memferryd's death is */
    while (access(g.mark, F_OK) != 0)
        usleep(1000);
    assert_int_equal(mf_process_run(g.target), MF_RUN_RUNNING);
    kill(g.target, SIGKILL);
    waitpid(g.target, NULL, 0);
    reap_all();
    close(g.pidfd);
    unlink(g.mark);
}

static void test_guard_keeps_what_was_released(void **state)
{
    (void)state;
    struct guarded g = stopped_target();
    struct guard *guard = guard_of(&g);
    guard_return(guard, true);
    guard_return(guard, false);
    guard_dismiss(guard);
    /* It leaves without having done anything. */
    for (bool left = false; !left;) {
        siginfo_t info = {0};
        event_base_loop(base, EVLOOP_NONBLOCK);
        left = waitid(P_ALL, 0, &info, WEXITED | WNOHANG | WNOWAIT) == 0 && info.si_pid == 0 &&
               event_base_get_num_events(base, EVENT_BASE_COUNT_ADDED) == 0;
        usleep(1000);
    }
    assert_int_equal(mf_process_run(g.target), MF_RUN_STOPPED);
    assert_int_not_equal(access(g.mark, F_OK), 0);
    end_target(&g);
}

static void test_guard_kills_the_command(void **state)
{
    (void)state;
    struct guarded g = stopped_target();
    struct guard *guard = guard_of(&g);
    struct ended ended = {0};
    struct command *command = NULL;
    struct command_order order = order_of("sleep 1000", 100000);
    assert_int_equal(command_start(base, &order, on_ended, &ended, &command, NULL), 0);
    usleep(50000); /* it has a group of its own by then, or is killed all the same by the end */
    guard_command(guard, command_group(command));
    guard_dismiss(guard);
    run_until(&ended.times);
    assert_non_null(strstr(ended.text, "killed by signal 9"));
    kill(g.target, SIGKILL);
    waitpid(g.target, NULL, 0);
    reap_all();
    close(g.pidfd);
}

static int set_up(void **state)
{
    (void)state;
    base = event_base_new();
    return base ? 0 : -1;
}

static int tear_down(void **state)
{
    (void)state;
    event_base_free(base);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_exit_codes),
        cmocka_unit_test(test_what_it_says_is_fit_to_print),
        cmocka_unit_test(test_timeout_kills_the_group),
        cmocka_unit_test(test_environment),
        cmocka_unit_test(test_killed_and_forgotten),
        cmocka_unit_test(test_relay_passes_all),
        cmocka_unit_test(test_relay_without_a_reader),
        cmocka_unit_test(test_guard_returns_the_target),
        cmocka_unit_test(test_guard_keeps_what_was_released),
        cmocka_unit_test(test_guard_kills_the_command),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
