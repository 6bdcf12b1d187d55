/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Watching a process without making it wait on a page: what lib/watch.h rests on. */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "lib/owner.h"
#include "lib/process_events.h"
#include "lib/uffd.h"
#include "lib/util.h"
#include "tests/kernel/area.h"
#include "tests/kernel/fact.h"

#define PAGE ((size_t)4096)
#define EVENTS (UFFD_FEATURE_EVENT_UNMAP | UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_EVENT_REMOVE)

static int watching(uint64_t more)
{
    struct mf_error err;
    int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
    assert_true(uffd >= 0);
    assert_int_equal(mf_uffd_api(uffd, MF_UFFD_FEATURES_WP | EVENTS | more, 0, NULL, &err), 0);
    return uffd;
}

static char *anonymous(size_t length_bytes)
{
    char *at = mmap(NULL, length_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    assert_true(at != MAP_FAILED);
    return at;
}

static void registered_and_not_protected_memory_tells_events_alone(void **state)
{
    (void)state;
    cleanup_close int uffd = watching(0);
    char *memory = anonymous(8 * PAGE);
    assert_int_equal(range_register(uffd, memory, 8 * PAGE, UFFDIO_REGISTER_MODE_WP), 0);
    memset(memory, 1, 4 * PAGE); /* stores, into holes and over them again, */
    memset(memory, 2, 4 * PAGE);
    cleanup_close int zero = open("/dev/zero", O_RDONLY | O_CLOEXEC);
    assert_int_equal(read(zero, memory, 8 * PAGE), 8 * PAGE); /* and the kernel's, */
    assert_true(no_message(uffd));                            /* send nothing, and nobody waits */
    struct actor dropper = {.act = ACT_DONTNEED, .at = memory, .length_bytes = PAGE};
    actor_start(&dropper);
    assert_int_equal(next_message(uffd).event, UFFD_EVENT_REMOVE);
    actor_finish(&dropper);
    struct actor unmapper = {.act = ACT_UNMAP, .at = memory, .length_bytes = 8 * PAGE};
    actor_start(&unmapper);
    assert_int_equal(next_message(uffd).event, UFFD_EVENT_UNMAP);
    actor_finish(&unmapper);
}

static void anybody_may_have_one_for_its_own_faults(void **state)
{
    (void)state;
    if (geteuid() != 0)
        lacking("root");
    char allowed = '1';
    cleanup_close int sysctl = open("/proc/sys/vm/unprivileged_userfaultfd", O_RDONLY | O_CLOEXEC);
    if (sysctl < 0 || read(sysctl, &allowed, 1) != 1)
        lacking("the sysctl vm.unprivileged_userfaultfd");
    pid_t child = fork();
    if (child == 0) {
        if (setresgid(65534, 65534, 65534) != 0 || setresuid(65534, 65534, 65534) != 0)
            _exit(1);
        long all = syscall(SYS_userfaultfd, O_NONBLOCK);
        int code = errno;
        long own = syscall(SYS_userfaultfd, O_NONBLOCK | UFFD_USER_MODE_ONLY);
        _exit(own < 0 ? 2 : allowed == '0' && (all >= 0 || code != EPERM) ? 3 : 0);
    }
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_int_equal(status, 0);
}

static unsigned count_mappings(const char *from, size_t length_bytes)
{
    unsigned count = 0;
    cleanup_fclose FILE *maps = fopen("/proc/self/maps", "re");
    unsigned long start, end;
    char line[512];
    while (maps && fgets(line, sizeof(line), maps)) {
        if (sscanf(line, "%lx-%lx", &start, &end) == 2 && start < (uintptr_t)from + length_bytes &&
            end > (uintptr_t)from)
            count++;
    }
    return count;
}

static void closing_puts_mappings_back_together(void **state)
{
    (void)state;
    int uffd = watching(0);
    char *memory = anonymous(12 * PAGE);
    assert_int_equal(count_mappings(memory, 12 * PAGE), 1);
    assert_int_equal(range_register(uffd, memory + 4 * PAGE, 4 * PAGE, UFFDIO_REGISTER_MODE_WP), 0);
    assert_int_equal(count_mappings(memory, 12 * PAGE), 3);
    close(uffd);
    assert_int_equal(count_mappings(memory, 12 * PAGE), 1);
    munmap(memory, 12 * PAGE);
}

/** call_fork() - a child that ends when the pipe at @context does. */
static long call_fork(struct actor *actor)
{
    const int *pipe_fds = actor->context;
    long child = syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);
    if (child == 0) {
        char byte;
        close(pipe_fds[1]);
        _exit(read(pipe_fds[0], &byte, 1) == 0 ? 0 : 1);
    }
    return child;
}

static void the_pagemap_shows_whose_userfaultfd_it_is(void **state)
{
    (void)state;
    cleanup_close int uffd = watching(UFFD_FEATURE_EVENT_FORK);
    char *memory = anonymous(4 * PAGE);
    uint64_t start_addr = (uintptr_t)memory, end_addr = start_addr + 4 * PAGE;
    assert_int_equal(range_register(uffd, memory, 4 * PAGE, UFFDIO_REGISTER_MODE_WP), 0);
    int go[2];
    assert_int_equal(pipe2(go, O_CLOEXEC), 0);
    struct actor forker = {.act = ACT_CALL, .call = call_fork, .context = go};
    actor_start(&forker);
    struct uffd_msg message = next_message(uffd);
    assert_int_equal(message.event, UFFD_EVENT_FORK);
    cleanup_close int child_uffd = (int)message.arg.fork.ufd;
    actor_finish(&forker);
    assert_true(forker.rc > 0);
    assert_int_equal(mf_owner_find(child_uffd, start_addr, end_addr), forker.rc);
    assert_int_equal(mf_owner_find(uffd, start_addr, end_addr), getpid());
    close(go[1]);
    assert_int_equal(waitpid((pid_t)forker.rc, NULL, 0), forker.rc);
    assert_int_equal(mf_owner_find(child_uffd, start_addr, end_addr), 0);
    close(go[0]);
}

static void forks_and_execs_are_told_also_of_what_is_gone(void **state)
{
    (void)state;
    cleanup_close int forks = mf_forks_listen(), execs = mf_execs_listen();
    if (forks < 0 || execs < 0)
        lacking("the process events connector (CONFIG_PROC_EVENTS, CAP_NET_ADMIN)");
    uint64_t start_ns = mf_now_ns(), when_ns = 0;
    pid_t child = fork();
    if (child == 0) {
        execl("/proc/self/exe", "test_watch", "--list", NULL);
        _exit(1);
    }
    assert_int_equal(waitpid(child, NULL, 0), child);
    assert_int_equal(mf_forks_child(forks, getpid()), child);
    pid_t who;
    while ((who = mf_execs_next(execs, &when_ns)) != child)
        assert_true(who != 0); /* others exec as well */
    assert_true(when_ns > start_ns && when_ns < mf_now_ns());
}

int main(int argc, char **argv)
{
    static const struct fact facts[] = {
        FACT(registered_and_not_protected_memory_tells_events_alone),
        FACT(anybody_may_have_one_for_its_own_faults),
        FACT(closing_puts_mappings_back_together),
        FACT_NEEDS(the_pagemap_shows_whose_userfaultfd_it_is, UFFD_FEATURE_EVENT_FORK),
        FACT(forks_and_execs_are_told_also_of_what_is_gone),
    };
    return facts_main(argc, argv, facts, sizeof(facts) / sizeof(facts[0]),
                      MF_UFFD_FEATURES_WP | EVENTS);
}
