/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * libmemferry with more than one process: children, successors of a server that has ended or was
 * killed, the memory of another process. Whole pages are checked. Run once for each kind of memory
 * (argv[1]: shmem, hugetlb, anonymous).
 */
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "lib/uapi.h"
#include "tests/lib/arena.h"

#define PAGES ARENA_PAGES_MAX

static enum memferry_memory memory;

/* ---- fork ---- */

static void a_child_finds_the_same_pages(void **state)
{
    (void)state;
    struct arena a;
    struct told told = {.lock = PTHREAD_MUTEX_INITIALIZER};
    arena_make(&a, memory, PAGES,
               OPTIONS(.arg = &told, .on_change = tell, .flags = MEMFERRY_FOLLOW_FORKS),
               PROVIDER(.want = make_page));
    memferry_server_start(a.server);
    must(page_is(arena_page(&a, 0), a.page_bytes, 0, 1));
    if (memory == MEMFERRY_ANONYMOUS)
        page_make(arena_page(&a, 1), a.page_bytes, 1, 2);
    pid_t child = fork();
    if (child == 0) {
        /* Its own way: whatever it does to private memory is its own. */
        bool good = true;
        for (uint64_t page = 0; page < a.pages; page++)
            good = good && page_is(arena_page(&a, page), a.page_bytes, page,
                                   memory == MEMFERRY_ANONYMOUS && page == 1 ? 2 : 1);
        if (memory == MEMFERRY_ANONYMOUS) {
            page_make(arena_page(&a, 2), a.page_bytes, 2, 3);
            good = good && arena_discard(&a, 3, 1) == 0 &&
                   page_is_zero(arena_page(&a, 3), a.page_bytes);
        }
        _exit(good ? 0 : 1);
    }
    const struct memferry_change c = await_change(&told, MEMFERRY_FORK, NULL, 0);
    assert_int_equal(c.reason, MEMFERRY_BY_FORK);
    assert_int_equal(c.child_pid, child);
    for (uint64_t page = a.pages; page-- > 0;)
        must(page_is(arena_page(&a, page), a.page_bytes, page,
                     memory == MEMFERRY_ANONYMOUS && page == 1 ? 2 : 1));
    int status = 0;
    must(waitpid(child, &status, 0) == child);
    assert_int_equal(status, 0);
    /* Two more, one of which never touches it. */
    for (int i = 0; i < 2; i++) {
        child = fork();
        if (child == 0)
            _exit(i == 0 || page_is(arena_page(&a, 0), a.page_bytes, 0, 1) ? 0 : 1);
        must(waitpid(child, &status, 0) == child);
        assert_int_equal(status, 0);
    }
    nap_ms(250); /* they are let go */
    must(page_is(arena_page(&a, 0), a.page_bytes, 0, 1));
    arena_free(&a);
}

/* ---- another server takes over ---- */

static void touch_all(void *argument)
{
    const struct arena *a = argument;
    for (uint64_t page = 0; page < a->pages; page++)
        must(page_is(arena_page(a, page), a->page_bytes, page, 1));
}

static int make_a_few(void *arg, struct memferry_server *server, struct memferry_want *want)
{
    _Atomic int *left = arg;
    if (atomic_fetch_sub(left, 1) > 0)
        return make_page(NULL, server, want);
    return MEMFERRY_LATER; /* and never comes */
}

static void a_successor_takes_over_where_a_server_ended(void **state)
{
    (void)state;
    struct arena a;
    struct runner toucher;
    _Atomic int left = 4;
    arena_map(&a, memory, PAGES);
    int states = memfd_create("memferry-states", MFD_CLOEXEC);
    must(ftruncate(states, 8192 + (off_t)a.pages) == 0);
    int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
    must(uffd >= 0);
    struct memferry_region region = {.struct_bytes = sizeof(region),
                                     .memory = memory,
                                     .length_bytes = a.length_bytes,
                                     .fd = a.fd,
                                     .states_in_file = 1,
                                     .states_fd = states,
                                     .states_offset_bytes = 8192};
    struct memferry_mapping mapping = {.struct_bytes = sizeof(mapping),
                                       .start_addr = (uintptr_t)a.at,
                                       .length_bytes = a.length_bytes};
    for (int i = 0; i < 2; i++) {
        must(memferry_server_new(NULL, &a.server) == 0);
        must(memferry_server_set_provider(a.server, PROVIDER(.want = make_a_few, .arg = &left)) ==
             0);
        must(memferry_context_adopt(a.server, uffd, getpid()) == 0);
        must(memferry_region_add(a.server, &region) == 0);
        must(memferry_mapping_add(a.server, &mapping) == 0);
        must(memferry_server_start(a.server) == 0);
        if (i == 1)
            break;
        runner_start(&toucher, touch_all, &a);
        while (atomic_load(&left) >= 0)
            nap_ms(1);
        nap_ms(5);
        must(memferry_server_free(a.server, MEMFERRY_END_LEAVE) == 0);
        atomic_store(&left, 1 << 30);
        region.flags = MEMFERRY_REGION_TAKE_OVER;
        mapping.flags = MEMFERRY_MAPPING_REGISTERED;
    }
    runner_join(&toucher);
    struct memferry_figures figures = {.struct_bytes = sizeof(figures)};
    for (unsigned i = 0; i < 20000 && memferry_missing_pages(a.server); i++)
        nap_ms(1);
    memferry_figures(a.server, &figures);
    assert_int_equal(figures.data_pages, a.pages - 4); /* the others are not asked for again */
    arena_free(&a);
    close(uffd);
    close(states);
}

/* ---- a server that is killed, and the next ---- */

#define SERVERS 6u

static int make_slowly(void *arg, struct memferry_server *server, struct memferry_want *want)
{
    if (want->first_page % 7 == 0)
        nap_ms(1);
    return make_page(arg, server, want);
}

/* The memory of its parent, from the userfaultfd and the states that it shares with it. */
static _Noreturn void serve_parent(struct arena *a, int uffd, int states, int go, bool first)
{
    struct runner filler;
    char byte = 0;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (read(go, &byte, 1) != 1)
        _exit(0);
    must(memferry_server_new(OPTIONS(.flags = MEMFERRY_REMOVE_DISCARDS), &a->server) == 0);
    must(memferry_server_set_provider(a->server, PROVIDER(.want = make_slowly)) == 0);
    must(memferry_context_adopt(a->server, uffd, getppid()) == 0);
    must(memferry_region_add(a->server, &(struct memferry_region){
                                            .struct_bytes = sizeof(struct memferry_region),
                                            .memory = memory,
                                            .length_bytes = a->length_bytes,
                                            .fd = a->fd,
                                            .states_in_file = 1,
                                            .states_fd = states,
                                            .flags = first ? 0 : MEMFERRY_REGION_TAKE_OVER}) == 0);
    must(memferry_mapping_add(
             a->server,
             &(struct memferry_mapping){.struct_bytes = sizeof(struct memferry_mapping),
                                        .start_addr = (uintptr_t)a->at,
                                        .length_bytes = a->length_bytes,
                                        .flags = first ? 0 : MEMFERRY_MAPPING_REGISTERED}) == 0);
    must(memferry_server_start(a->server) == 0);
    must(write(go, "", 1) == 1);
    nap_ms(2);
    runner_start(&filler, fill_all, &(struct filler){.arena = a});
    for (;;)
        pause();
}

static void nothing_is_lost_when_servers_are_killed(void **state)
{
    (void)state;
    struct arena a;
    struct runner touchers[2];
    int go[SERVERS][2];
    pid_t pid[SERVERS];
    char byte = 0;
    uint64_t random = 5;
    arena_map(&a, memory, PAGES);
    int states = memfd_create("memferry-states", MFD_CLOEXEC);
    must(ftruncate(states, (off_t)a.pages) == 0);
    int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
    must(uffd >= 0);
    for (unsigned i = 0; i < SERVERS; i++) { /* while there are no threads yet */
        must(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, go[i]) == 0);
        pid[i] = fork();
        if (pid[i] == 0)
            serve_parent(&a, uffd, states, go[i][1], i == 0);
    }
    for (unsigned i = 0; i < SERVERS; i++) {
        must(write(go[i][0], "", 1) == 1 && read(go[i][0], &byte, 1) == 1);
        for (unsigned k = 0; i == 0 && k < 2; k++)
            runner_start(&touchers[k], touch_all, &a);
        if (i + 1 == SERVERS)
            break;
        nap_ms((unsigned)random_below(&random, 8));
        kill(pid[i], SIGKILL);
        must(waitpid(pid[i], NULL, 0) == pid[i]);
    }
    for (unsigned k = 0; k < 2; k++)
        runner_join(&touchers[k]);
    kill(pid[SERVERS - 1], SIGKILL);
    must(waitpid(pid[SERVERS - 1], NULL, 0) == pid[SERVERS - 1]);
    close(uffd);
    touch_all(&a);
    munmap(a.at, a.length_bytes);
    for (unsigned i = 0; i < SERVERS; i++) {
        close(go[i][0]);
        close(go[i][1]);
    }
    close(states);
    if (a.fd >= 0)
        close(a.fd);
}

/* ---- another process ---- */

static void send_fd(int sock, int fd)
{
    char byte = 0, room[CMSG_SPACE(sizeof(int))] = {0};
    struct iovec iov = {&byte, 1};
    struct msghdr m = {
        .msg_iov = &iov, .msg_iovlen = 1, .msg_control = room, .msg_controllen = sizeof(room)};
    struct cmsghdr *c = CMSG_FIRSTHDR(&m);
    c->cmsg_level = SOL_SOCKET;
    c->cmsg_type = SCM_RIGHTS;
    c->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(c), &fd, sizeof(fd));
    must(sendmsg(sock, &m, 0) == 1);
}

static int receive_fd(int sock)
{
    char byte, room[CMSG_SPACE(sizeof(int))];
    int fd;
    struct iovec iov = {&byte, 1};
    struct msghdr m = {
        .msg_iov = &iov, .msg_iovlen = 1, .msg_control = room, .msg_controllen = sizeof(room)};
    must(recvmsg(sock, &m, MSG_CMSG_CLOEXEC) == 1 && CMSG_FIRSTHDR(&m));
    memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&m)), sizeof(fd));
    return fd;
}

static void the_memory_of_another_process_is_served(void **state)
{
    (void)state;
    struct arena a;
    int pair[2];
    char byte = 0;
    arena_map(&a, memory, PAGES);
    must(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0);
    pid_t child = fork();
    if (child == 0) {
        int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
        must(uffd >= 0);
        send_fd(pair[1], uffd);
        must(read(pair[1], &byte, 1) == 1);
        bool good = true;
        for (uint64_t page = 0; page < a.pages; page++)
            good = good && page_is(arena_page(&a, page), a.page_bytes, page, 1);
        /* And where it is moved to. */
        uint8_t *to = arena_reserve(&a, a.length_bytes);
        good = good && arena_discard(&a, 1, 1) == 0;
        good = good && mremap(a.at, a.length_bytes, a.length_bytes, MREMAP_MAYMOVE | MREMAP_FIXED,
                              to) == to;
        for (uint64_t page = 0; page < a.pages; page++)
            good = good && (page == 1 ? page_is_zero(to + page * a.page_bytes, a.page_bytes)
                                      : page_is(to + page * a.page_bytes, a.page_bytes, page, 1));
        _exit(good ? 0 : 1);
    }
    int uffd = receive_fd(pair[0]);
    must(memferry_server_new(NULL, &a.server) == 0);
    must(memferry_server_set_provider(a.server, PROVIDER(.want = make_page)) == 0);
    must(memferry_context_adopt(a.server, uffd, child) == 0);
    must(memferry_region_add(
             a.server, &(struct memferry_region){.struct_bytes = sizeof(struct memferry_region),
                                                 .memory = memory,
                                                 .length_bytes = a.length_bytes,
                                                 .fd = a.fd}) == 0);
    must(memferry_mapping_add(
             a.server, &(struct memferry_mapping){.struct_bytes = sizeof(struct memferry_mapping),
                                                  .start_addr = (uintptr_t)a.at,
                                                  .length_bytes = a.length_bytes}) == 0);
    must(memferry_server_start(a.server) == 0);
    must(write(pair[0], &byte, 1) == 1);
    int status = 0;
    must(waitpid(child, &status, 0) == child);
    assert_int_equal(status, 0);
    /* It is gone; filling does no harm. */
    uint8_t *bytes = calloc(1, a.page_bytes);
    assert_int_equal(memferry_fill(a.server, 0, 0, 1, bytes), 0);
    free(bytes);
    arena_free(&a);
    close(uffd);
    close(pair[0]);
    close(pair[1]);
}

/* ---- another process that forks, and that ends ---- */

/* It has a userfaultfd of its own, does what it is told by a byte, and answers with one. */
static _Noreturn void be_served(const struct arena *a, int sock)
{
    int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
    char byte = 0;
    must(uffd >= 0);
    send_fd(sock, uffd);
    while (read(sock, &byte, 1) == 1) {
        if (byte == 'f') {
            int status = 1;
            pid_t child = fork();
            if (child == 0)
                _exit(page_is(arena_page(a, 1), a->page_bytes, 1, 1) ? 0 : 1);
            must(waitpid(child, &status, 0) == child && status == 0);
            must(page_is(arena_page(a, 1), a->page_bytes, 1, 1));
        }
        must(write(sock, "", 1) == 1);
    }
    _exit(0);
}

struct served {
    struct arena own, a;
    struct told told;
    int sock, uffd, context, region;
    pid_t pid;
};

/* A server of a process's memory and of some of its own. */
static void serve_another(struct served *s, int *pid_socket)
{
    int pair[2];
    *s = (struct served){.told.lock = PTHREAD_MUTEX_INITIALIZER};
    arena_map(&s->a, memory, 8);
    must(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0);
    s->pid = fork();
    if (s->pid == 0) {
        close(pair[0]);
        be_served(&s->a, pair[1]);
    }
    close(pair[1]);
    *pid_socket = pair[0];
    s->uffd = receive_fd(pair[0]);
    arena_make(&s->own, memory, 8,
               OPTIONS(.arg = &s->told, .on_change = tell, .flags = MEMFERRY_FOLLOW_FORKS),
               PROVIDER(.want = make_page));
    s->context = memferry_context_adopt(s->own.server, s->uffd, s->pid);
    s->region = memferry_region_add(
        s->own.server, &(struct memferry_region){.struct_bytes = sizeof(struct memferry_region),
                                                 .memory = memory,
                                                 .length_bytes = s->a.length_bytes,
                                                 .fd = s->a.fd});
    must(s->context >= 0 && s->region >= 0);
    struct memferry_mapping mapping = {.struct_bytes = sizeof(mapping),
                                       .context = (uint32_t)s->context,
                                       .region = (uint32_t)s->region,
                                       .start_addr = (uintptr_t)s->a.at,
                                       .length_bytes = s->a.length_bytes};
    must(memferry_mapping_add(s->own.server, &mapping) == 0);
    if (memory != MEMFERRY_ANONYMOUS) { /* both see it */
        mapping.context = (uint32_t)s->own.context;
        must(memferry_mapping_add(s->own.server, &mapping) == 0);
    }
    must(memferry_server_start(s->own.server) == 0);
}

static void free_another(struct served *s, int pid_socket)
{
    int status = 0;
    close(pid_socket);
    must(waitpid(s->pid, &status, 0) == s->pid);
    arena_free(&s->own);
    munmap(s->a.at, s->a.length_bytes);
    if (s->a.fd >= 0)
        close(s->a.fd);
    close(s->uffd);
}

static void a_fork_without_a_descriptor_holds_up_nobody_else(void **state)
{
    (void)state;
    struct served s;
    struct rlimit limit, none;
    int sock;
    char byte;
    must(getrlimit(RLIMIT_NOFILE, &limit) == 0);
    serve_another(&s, &sock);
    const int lowest = dup(sock);
    none = (struct rlimit){.rlim_cur = (rlim_t)lowest, .rlim_max = limit.rlim_max};
    close(lowest);
    must(setrlimit(RLIMIT_NOFILE, &none) == 0);
    must(write(sock, "f", 1) == 1);
    nap_ms(250);
    for (uint64_t page = 0; page < s.own.pages; page++)
        must(page_is(arena_page(&s.own, page), s.own.page_bytes, page, 1));
    if (memory != MEMFERRY_ANONYMOUS)
        for (uint64_t page = 0; page < s.a.pages; page++)
            must(page_is(arena_page(&s.a, page), s.a.page_bytes, page, 1));
    assert_int_equal(memferry_server_stop(s.own.server), 0);
    assert_int_equal(memferry_server_start(s.own.server), 0);
    must(setrlimit(RLIMIT_NOFILE, &limit) == 0);
    must(read(sock, &byte, 1) == 1);
    free_another(&s, sock);
}

static void who_serves_is_told_when_a_process_ends(void **state)
{
    (void)state;
    struct served s;
    int sock;
    serve_another(&s, &sock);
    kill(s.pid, SIGKILL);
    struct memferry_change c = await_change(&s.told, MEMFERRY_EXIT, NULL, 0);
    assert_int_equal(c.context, s.context);
    for (uint64_t page = 0; page < s.own.pages; page++)
        must(page_is(arena_page(&s.own, page), s.own.page_bytes, page, 1));
    assert_int_equal(memferry_fill_zero(s.own.server, (uint32_t)s.region, 0, 1), 0);
    assert_int_equal(memferry_mapping_remove(s.own.server, (uint32_t)s.context, (uintptr_t)s.a.at,
                                             s.a.length_bytes),
                     -EINVAL);
    free_another(&s, sock);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_child_finds_the_same_pages),
        cmocka_unit_test(a_successor_takes_over_where_a_server_ended),
        cmocka_unit_test(nothing_is_lost_when_servers_are_killed),
        cmocka_unit_test(the_memory_of_another_process_is_served),
        cmocka_unit_test(a_fork_without_a_descriptor_holds_up_nobody_else),
        cmocka_unit_test(who_serves_is_told_when_a_process_ends),
    };
    return arena_tests(argc, argv, memory, tests);
}
