/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The end of a watched process, by exit, exec and signal: what its userfaultfd says of it, which
 * is nothing, and what can still be done with it. */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "lib/uffd.h"
#include "lib/util.h"
#include "tests/kernel/area.h"
#include "tests/kernel/fact.h"

#define PAGES 4

/** struct watched - a process whose own mapping of the area its own userfaultfd watches. */
struct watched {
    struct area area; /**< uffd: the process's, fetched */
    pid_t pid;
    int orders; /**< one letter: e exit, x exec, t touch page 0 */
    int pidfd;
};

static _Noreturn void live(const struct area *area, int orders, int answers)
{
    char order;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    int fd = mf_uffd_open();
    mf_uffd_api(fd, MF_UFFD_FEATURES, 0, NULL, NULL);
    mf_uffd_register(fd, (uintptr_t)area->guest, area->length_bytes, NULL);
    mf_write_all(answers, &fd, sizeof(fd));
    while (read(orders, &order, 1) == 1) {
        if (order == 't')
            (void)*(volatile char *)area->guest;
        if (order == 'e')
            _exit(0);
        if (order == 'x')
            execl("/proc/self/exe", "test_process", "--sleep", NULL);
    }
    _exit(1);
}

static void start(struct watched *watched)
{
    int orders[2], answers[2], remote_fd;
    area_make(&watched->area, AREA_SHMEM, PAGES);
    close(watched->area.uffd);
    assert_int_equal(pipe2(orders, O_CLOEXEC), 0);
    assert_int_equal(pipe2(answers, O_CLOEXEC), 0);
    watched->pid = fork();
    assert_true(watched->pid >= 0);
    if (watched->pid == 0)
        live(&watched->area, orders[0], answers[1]);
    assert_int_equal(read(answers[0], &remote_fd, sizeof(remote_fd)), sizeof(remote_fd));
    watched->pidfd = (int)syscall(SYS_pidfd_open, watched->pid, 0);
    watched->area.uffd = (int)syscall(SYS_pidfd_getfd, watched->pidfd, remote_fd, 0);
    assert_true(watched->area.uffd >= 0);
    watched->orders = orders[1];
    close(orders[0]);
    close(answers[0]);
    close(answers[1]);
}

static void order(const struct watched *watched, char letter)
{
    assert_int_equal(write(watched->orders, &letter, 1), 1);
}

static void end(struct watched *watched)
{
    kill(watched->pid, SIGKILL);
    waitpid(watched->pid, NULL, 0);
    close(watched->pidfd);
    close(watched->orders);
    area_free(&watched->area);
}

static void expect_silence(const struct watched *watched)
{
    struct pollfd ready = {.fd = watched->area.uffd, .events = POLLIN};
    assert_true(no_message(watched->area.uffd));
    assert_int_equal(poll(&ready, 1, 50), 0); /* not even POLLHUP */
}

/** Whatever was watched is gone, so nothing may be done, each in its own way. */
static void expect_gone(const struct area *area)
{
    struct mf_error err;
    uint64_t done_bytes = 99;
    int64_t result;
    uintptr_t start_addr = (uintptr_t)area->guest;
    put(area, 1, 'a');
    assert_int_equal(continue_pages(area, 1, 1, &result), ESRCH);
    assert_int_equal(result, 12345); /* not written: preset it */
    assert_int_equal(mf_uffd_continue(area->uffd, start_addr, area->page_bytes, &done_bytes),
                     -ESRCH);
    assert_int_equal(done_bytes, 0);
    assert_int_equal(mf_uffd_zeropage(area->uffd, start_addr, area->page_bytes, &done_bytes),
                     -ESRCH);
    char page[4096] = {0};
    struct uffdio_copy copy = {.dst = start_addr, .src = (uintptr_t)page, .len = sizeof(page)};
    assert_int_equal(ioctl_errno(area->uffd, UFFDIO_COPY, &copy), ESRCH);
    assert_int_equal(mf_uffd_register(area->uffd, start_addr, area->length_bytes, &err), -ENOMEM);
    assert_int_equal(mf_uffd_wake(area->uffd, start_addr, area->length_bytes), 0);
    assert_int_equal(mf_uffd_unregister(area->uffd, start_addr, area->length_bytes), 0);
}

static void await_end(const struct watched *watched)
{
    struct pollfd ready = {.fd = watched->pidfd, .events = POLLIN};
    assert_int_equal(poll(&ready, 1, 20000), 1); /* this is what does tell */
    /* The descriptor says so when the process is a zombie; its memory is gone by then. */
}

static void an_exit_is_not_told_and_fills_are_esrch(void **state)
{
    (void)state;
    struct watched watched;
    start(&watched);
    order(&watched, 'e');
    await_end(&watched);
    expect_silence(&watched);
    expect_gone(&watched.area);
    end(&watched);
}

static void a_kill_is_not_told_and_fills_are_esrch(void **state)
{
    (void)state;
    struct watched watched;
    start(&watched);
    kill(watched.pid, SIGKILL);
    await_end(&watched);
    expect_silence(&watched);
    expect_gone(&watched.area);
    end(&watched);
}

/** A process that waits for a page can be killed, and its fault goes with it. */
static void a_waiting_process_can_be_killed(void **state)
{
    (void)state;
    struct watched watched;
    start(&watched);
    order(&watched, 't');
    assert_int_equal(next_message(watched.area.uffd).event, UFFD_EVENT_PAGEFAULT);
    kill(watched.pid, SIGKILL);
    await_end(&watched);
    expect_silence(&watched);
    expect_gone(&watched.area);
    end(&watched);
}

static bool has_execed(pid_t pid)
{
    char path[64], text[64] = "";
    snprintf(path, sizeof(path), "/proc/%d/cmdline", pid);
    cleanup_close int fd = open(path, O_RDONLY | O_CLOEXEC);
    return fd >= 0 && read(fd, text, sizeof(text) - 1) > 0 && strcmp(text, "test_process") == 0;
}

static void an_exec_is_not_told_and_fills_are_esrch(void **state)
{
    (void)state;
    struct watched watched;
    start(&watched);
    order(&watched, 'x');
    uint64_t start_ns = mf_now_ns();
    while (!has_execed(watched.pid)) {
        assert_true(mf_now_ns() - start_ns < UINT64_C(20000000000));
        usleep(1000);
    }
    expect_silence(&watched);
    expect_gone(&watched.area);
    end(&watched);
}

int main(int argc, char **argv)
{
    static const struct fact facts[] = {
        FACT(an_exit_is_not_told_and_fills_are_esrch),
        FACT(a_kill_is_not_told_and_fills_are_esrch),
        FACT(a_waiting_process_can_be_killed),
        FACT(an_exec_is_not_told_and_fills_are_esrch),
    };
    if (argc > 1 && strcmp(argv[1], "--sleep") == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL); /* exec has kept it, but not so for all kinds */
        for (;;)
            pause();
    }
    return facts_main(argc, argv, facts, sizeof(facts) / sizeof(facts[0]), MF_UFFD_FEATURES);
}
