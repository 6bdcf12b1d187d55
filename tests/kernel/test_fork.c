/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A watched process that forks: what its userfaultfd tells, what the child has of it, and what
 * becomes of the child without. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "lib/uffd.h"
#include "lib/util.h"
#include "tests/kernel/area.h"
#include "tests/kernel/fact.h"

#define PAGES 8

static void make_with_fork(struct area *area)
{
    area_make_with(area, AREA_SHMEM, PAGES, MF_UFFD_FEATURES | UFFD_FEATURE_EVENT_FORK);
    area_register(area, BOTH_MODES);
}

/** call_fork() - the child touches @at (unless NULL) and exits with what it read; rc is its pid. */
static long call_fork(struct actor *actor)
{
    pid_t child = fork();
    if (child == 0) /* no PDEATHSIG: it would go with the thread; without a reader it reads zeros */
        _exit(actor->at ? *(volatile char *)actor->at : 0);
    return child;
}

static int exit_code(long child)
{
    int status = 0;
    assert_int_equal(waitpid((pid_t)child, &status, 0), child);
    assert_true(WIFEXITED(status));
    return WEXITSTATUS(status);
}

static void a_fork_hands_over_a_descriptor_and_holds_the_parent(void **state)
{
    (void)state;
    struct area area;
    make_with_fork(&area);
    struct actor forker = {.act = ACT_CALL, .call = call_fork, .at = page_of(&area, 1)};
    actor_start(&forker);
    await_readable(area.uffd);
    assert_true(actor_waits(&forker));
    struct uffd_msg message = next_message(area.uffd);
    assert_int_equal(message.event, UFFD_EVENT_FORK);
    cleanup_close int childs = (int)message.arg.fork.ufd;
    assert_true(fcntl(childs, F_GETFD) >= 0);
    actor_finish(&forker);

    /* It is the child's memory that it watches. */
    message = next_message(childs);
    assert_int_equal(message.event, UFFD_EVENT_PAGEFAULT);
    assert_true(no_message(area.uffd));
    put(&area, 1, 'f');
    struct uffdio_continue arg = {
        .range = {.start = (uintptr_t)page_of(&area, 1), .len = area.page_bytes}};
    assert_int_equal(ioctl_errno(childs, UFFDIO_CONTINUE, &arg), 0);
    assert_int_equal(exit_code(forker.rc), 'f');
    arg.mapped = 12345;
    assert_int_equal(ioctl_errno(childs, UFFDIO_CONTINUE, &arg), ESRCH);
    /* The parent's is as it was. */
    struct actor reader = {.act = ACT_READ, .at = page_of(&area, 1)};
    actor_start(&reader);
    message = next_message(area.uffd);
    assert_int_equal(message.event, UFFD_EVENT_PAGEFAULT);
    assert_true(message.arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_MINOR);
    assert_int_equal(continue_pages(&area, 1, 1, NULL), 0);
    actor_finish(&reader);
    area_free(&area);
}

static void a_fork_without_a_free_descriptor_stays_queued(void **state)
{
    (void)state;
    struct area area;
    struct uffd_msg message;
    struct rlimit limit, none;
    make_with_fork(&area);
    struct actor forker = {.act = ACT_CALL, .call = call_fork};
    actor_start(&forker);
    await_readable(area.uffd);
    getrlimit(RLIMIT_NOFILE, &limit);
    none = limit;
    none.rlim_cur = 0;
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &none), 0);
    ssize_t length = read(area.uffd, &message, sizeof(message));
    int code = errno;
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &limit), 0);
    assert_int_equal(length, -1);
    assert_int_equal(code, EMFILE);
    assert_true(actor_waits(&forker));
    message = next_message(area.uffd);
    assert_int_equal(message.event, UFFD_EVENT_FORK);
    actor_finish(&forker);
    close((int)message.arg.fork.ufd);
    assert_int_equal(exit_code(forker.rc), 0);
    area_free(&area);
}

static void a_childs_descriptor_has_the_flags_its_parents_was_made_with(void **state)
{
    (void)state;
    struct area area;
    make_with_fork(&area); /* made O_NONBLOCK */
    struct uffd_msg message;
    struct actor forker = {.act = ACT_CALL, .call = call_fork};
    actor_start(&forker);
    await_readable(area.uffd);
    assert_int_equal(fcntl(area.uffd, F_SETFL, O_RDONLY), 0);
    assert_int_equal(read(area.uffd, &message, sizeof(message)), sizeof(message));
    assert_int_equal(message.event, UFFD_EVENT_FORK);
    cleanup_close int childs = (int)message.arg.fork.ufd;
    assert_true(fcntl(childs, F_GETFL) & O_NONBLOCK);
    actor_finish(&forker);
    assert_int_equal(exit_code(forker.rc), 0);
    area_free(&area);
}

static void without_its_userfaultfd_a_child_reads_zeros(void **state)
{
    (void)state;
    struct area area;
    make_with_fork(&area);
    struct actor forker = {.act = ACT_CALL, .call = call_fork, .at = page_of(&area, 1)};
    actor_start(&forker);
    struct uffd_msg message = next_message(area.uffd);
    assert_int_equal(message.event, UFFD_EVENT_FORK);
    actor_finish(&forker);
    await_readable((int)message.arg.fork.ufd);
    close((int)message.arg.fork.ufd);
    assert_int_equal(exit_code(forker.rc), 0);
    area_free(&area);
}

static void without_event_fork_the_copy_is_not_watched(void **state)
{
    (void)state;
    struct area area;
    area_make(&area, AREA_SHMEM, PAGES);
    area_register(&area, BOTH_MODES);
    struct actor forker = {.act = ACT_CALL, .call = call_fork, .at = page_of(&area, 1)};
    actor_start(&forker);
    actor_finish(&forker);
    assert_int_equal(exit_code(forker.rc), 0);
    assert_true(no_message(area.uffd));
    area_free(&area);
}

static long call_vfork(struct actor *actor)
{
    (void)actor;
    pid_t child = vfork();
    if (child == 0)
        _exit(7);
    return child;
}

static void a_vfork_is_not_told(void **state)
{
    (void)state;
    struct area area;
    make_with_fork(&area);
    struct actor forker = {.act = ACT_CALL, .call = call_vfork};
    actor_start(&forker);
    actor_finish(&forker);
    assert_int_equal(exit_code(forker.rc), 7);
    assert_true(no_message(area.uffd));
    area_free(&area);
}

/** The right is asked of who makes the handshake, not of who made the userfaultfd. */
static void following_forks_takes_cap_sys_ptrace_at_the_handshake(void **state)
{
    (void)state;
    cleanup_close int uffd = mf_uffd_open();
    cleanup_close int other = mf_uffd_open();
    assert_true(uffd >= 0 && other >= 0);
    if (geteuid() != 0)
        lacking("root");
    assert_int_equal(setresuid(65534, 65534, 65534), 0);
    struct uffdio_api api = {.api = UFFD_API,
                             .features = UFFD_FEATURE_EVENT_FORK | UFFD_FEATURE_EVENT_UNMAP};
    assert_int_equal(ioctl_errno(uffd, UFFDIO_API, &api), EPERM);
    api = (struct uffdio_api){.api = UFFD_API, .features = UFFD_FEATURE_EVENT_UNMAP};
    assert_int_equal(ioctl_errno(other, UFFDIO_API, &api), 0);
}

int main(int argc, char **argv)
{
    static const struct fact facts[] = {
        FACT_NEEDS(a_fork_hands_over_a_descriptor_and_holds_the_parent, UFFD_FEATURE_EVENT_FORK),
        FACT_NEEDS(a_fork_without_a_free_descriptor_stays_queued, UFFD_FEATURE_EVENT_FORK),
        FACT_NEEDS(a_childs_descriptor_has_the_flags_its_parents_was_made_with,
                   UFFD_FEATURE_EVENT_FORK),
        FACT_NEEDS(without_its_userfaultfd_a_child_reads_zeros, UFFD_FEATURE_EVENT_FORK),
        FACT(without_event_fork_the_copy_is_not_watched),
        FACT_NEEDS(a_vfork_is_not_told, UFFD_FEATURE_EVENT_FORK),
        FACT_NEEDS(following_forks_takes_cap_sys_ptrace_at_the_handshake, UFFD_FEATURE_EVENT_FORK),
    };
    return facts_main(argc, argv, facts, sizeof(facts) / sizeof(facts[0]), MF_UFFD_FEATURES);
}
