/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What a killed mover leaves behind, and what an open /proc/PID/maps is good for. */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "lib/uffd.h"
#include "lib/util.h"
#include "lib/vma.h"
#include "tests/kernel/area.h"
#include "tests/kernel/fact.h"

#define PAGES 8

static void make_with_fork(struct area *area)
{
    area_make_with(area, AREA_SHMEM, PAGES, MF_UFFD_FEATURES | UFFD_FEATURE_EVENT_FORK);
    area_register(area, BOTH_MODES);
}

/* The child touches @at and exits with what it read; rc is its pid. */
static long call_fork(struct actor *actor)
{
    pid_t child = fork();
    if (child == 0)
        _exit(*(volatile char *)actor->at);
    return child;
}

static ino_t inode_of(int fd)
{
    struct stat st;
    assert_int_equal(fstat(fd, &st), 0);
    return st.st_ino;
}

/* So copies of one can be told from another, in whichever process they are. */
static void each_userfaultfd_has_an_inode_of_its_own(void **state)
{
    (void)state;
    struct area area;
    make_with_fork(&area);
    cleanup_close int other = mf_uffd_open(), copy = dup(area.uffd);
    struct actor forker = {.act = ACT_CALL, .call = call_fork, .at = page_of(&area, 1)};
    put(&area, 1, 'f');
    actor_start(&forker);
    struct uffd_msg message = next_message(area.uffd);
    assert_int_equal(message.event, UFFD_EVENT_FORK);
    cleanup_close int childs = (int)message.arg.fork.ufd;
    assert_int_equal(inode_of(copy), inode_of(area.uffd));
    assert_int_not_equal(inode_of(other), inode_of(area.uffd));
    assert_int_not_equal(inode_of(childs), inode_of(area.uffd));
    assert_int_not_equal(inode_of(childs), inode_of(other));
    actor_finish(&forker);
    kill((pid_t)forker.rc, SIGKILL);
    waitpid((pid_t)forker.rc, NULL, 0);
    close(mf_steal_fd(&copy)); /* or the end of the area would be told to it */
    area_free(&area);
}

/* Where two processes share a table, the descriptor that reading a FORK event brings is in it from
 * the start, and stays when the one that read it is killed. */
static void a_forks_descriptor_stays_in_a_shared_table(void **state)
{
    (void)state;
    struct area area;
    area_make_with(&area, AREA_SHMEM, PAGES, MF_UFFD_FEATURES | UFFD_FEATURE_EVENT_FORK);
    _Atomic int *number =
        mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    assert_true(number != MAP_FAILED);
    /* Before anything is registered, or this fork would have to be read of too. */
    pid_t reader =
        (pid_t)syscall(SYS_clone, (unsigned long)(CLONE_FILES | SIGCHLD), NULL, NULL, NULL, 0UL);
    if (reader == 0) {
        struct uffd_msg message;
        struct pollfd ready = {.fd = area.uffd, .events = POLLIN};
        while (poll(&ready, 1, -1) < 1)
            ;
        ssize_t length = read(area.uffd, &message, sizeof(message));
        *number = length == sizeof(message) ? (int)message.arg.fork.ufd : -1;
        for (;;)
            pause();
    }
    area_register(&area, BOTH_MODES);
    struct actor forker = {.act = ACT_CALL, .call = call_fork, .at = page_of(&area, 1)};
    actor_start(&forker);
    actor_finish(&forker);
    while (*number == 0)
        usleep(1000);
    assert_true(*number > 0);
    assert_int_equal(kill(reader, SIGKILL), 0);
    assert_int_equal(waitpid(reader, NULL, 0), reader);
    /* Whoever is left reads the child's fault and serves it. */
    cleanup_close int childs = *number;
    assert_int_equal(next_message(childs).event, UFFD_EVENT_PAGEFAULT);
    put(&area, 1, 'f');
    struct uffdio_continue arg = {
        .range = {.start = (uintptr_t)page_of(&area, 1), .len = area.page_bytes}};
    assert_int_equal(ioctl_errno(childs, UFFDIO_CONTINUE, &arg), 0);
    int status;
    assert_int_equal(waitpid((pid_t)forker.rc, &status, 0), forker.rc);
    assert_int_equal(WEXITSTATUS(status), 'f');
    munmap((void *)number, 4096);
    area_free(&area);
}

/* The right is asked of who opens the file; it stays with that address space. */
static void open_maps_need_no_right_and_stay_with_their_address_space(void **state)
{
    (void)state;
    struct mf_vma vma;
    struct stat st;
    char path[48];
    int go[2];
    cleanup_close int file = memfd_create("memferry-test", MFD_CLOEXEC);
    assert_int_equal(ftruncate(file, 2 * 4096), 0);
    assert_int_equal(fstat(file, &st), 0);
    char *at = mmap(NULL, 2 * 4096, PROT_READ, MAP_SHARED, file, 0);
    assert_int_equal(pipe2(go, O_CLOEXEC), 0);
    pid_t child = fork();
    if (child == 0) {
        char byte;
        ssize_t n = read(go[0], &byte, 1);
        (void)n;
        execl("/bin/sleep", "sleep", "100", (char *)NULL);
        _exit(127);
    }
    snprintf(path, sizeof(path), "/proc/%d/maps", (int)child);
    cleanup_close int maps_fd = open(path, O_RDONLY | O_CLOEXEC);
    assert_true(maps_fd >= 0);
    if (geteuid() == 0)
        assert_int_equal(setresuid(65534, 65534, 65534), 0);
    assert_int_equal(mf_vma_find(maps_fd, (uintptr_t)at + 4096, &vma), 0);
    assert_int_equal(vma.start_addr, (uintptr_t)at);
    assert_int_equal(vma.end_addr, (uintptr_t)at + 2 * 4096);
    assert_int_equal(vma.inode, st.st_ino);
    assert_int_equal(vma.device, st.st_dev);
    assert_true(vma.shared && vma.readable && !vma.writable);
    assert_int_equal(write(go[1], "x", 1), 1);
    int r = 0;
    for (unsigned i = 0; i < 20000 && r != -ESRCH; i++) {
        r = mf_vma_find(maps_fd, (uintptr_t)at, &vma);
        usleep(1000);
    }
    assert_int_equal(r, -ESRCH);
    kill(child, SIGKILL); /* fails where it still belongs to root; it ends by itself */
    close(go[0]);
    close(go[1]);
}

int main(int argc, char **argv)
{
    static const struct fact facts[] = {
        FACT_NEEDS(each_userfaultfd_has_an_inode_of_its_own, UFFD_FEATURE_EVENT_FORK),
        FACT_NEEDS(a_forks_descriptor_stays_in_a_shared_table, UFFD_FEATURE_EVENT_FORK),
        FACT(open_maps_need_no_right_and_stay_with_their_address_space),
    };
    return facts_main(argc, argv, facts, sizeof(facts) / sizeof(facts[0]), MF_UFFD_FEATURES);
}
