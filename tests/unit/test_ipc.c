/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* lib/ipc.c: messages and descriptors between memferryd and a mover that may be in an attacker's
 * hands. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "lib/ipc.h"
#include "lib/util.h"

static int pair[2];

static int open_pair(void **state)
{
    (void)state;
    return socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair);
}

static int close_pair(void **state)
{
    (void)state;
    for (unsigned i = 0; i < 2; i++)
        if (pair[i] >= 0)
            close(pair[i]);
    return 0;
}

static unsigned open_descriptors(void)
{
    cleanup_closedir DIR *directory = opendir("/proc/self/fd");
    unsigned count = 0;
    assert_non_null(directory);
    while (readdir(directory))
        count++;
    return count;
}

/* Any bytes with any descriptors, as only a stranger would send them. */
static void send_raw(const void *bytes, size_t length_bytes, const int *fds, unsigned fd_count)
{
    struct iovec iov = {.iov_base = (void *)(uintptr_t)bytes, .iov_len = length_bytes};
    union {
        char bytes[CMSG_SPACE(16 * sizeof(int))];
        struct cmsghdr align;
    } room = {0};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};
    if (fd_count) {
        msg.msg_control = room.bytes;
        msg.msg_controllen = CMSG_SPACE(fd_count * sizeof(int));
        struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(fd_count * sizeof(int));
        memcpy(CMSG_DATA(c), fds, fd_count * sizeof(int));
    }
    assert_int_equal(sendmsg(pair[0], &msg, MSG_NOSIGNAL), length_bytes);
}

static struct mf_ipc region_message(void)
{
    struct mf_ipc message = {.type = MF_IPC_REGION};
    snprintf(message.region.name, sizeof(message.region.name), "ram0");
    message.region.size_bytes = UINT64_C(1) << 42;
    message.region.page_bytes = 1u << 21;
    return message;
}

static void carries_messages(void **state)
{
    (void)state;
    struct mf_ipc out = region_message(), in;
    int fd = 99;
    snprintf(out.text, sizeof(out.text), "a sentence");
    for (unsigned i = 0; i < 3; i++)
        assert_int_equal(mf_ipc_send(pair[0], &out, -1), 0);
    for (unsigned i = 0; i < 3; i++) {
        memset(&in, 0xee, sizeof(in));
        assert_int_equal(mf_ipc_receive(pair[1], &in, &fd), 1);
        assert_int_equal(fd, -1);
        assert_memory_equal(&in, &out, sizeof(in));
    }
    assert_int_equal(mf_ipc_receive(pair[1], &in, &fd), -EAGAIN);
    assert_int_equal(fd, -1);
}

static void carries_one_descriptor(void **state)
{
    (void)state;
    int pipe_ends[2], fd = -1;
    struct mf_ipc out = region_message(), in;
    struct stat sent, got;
    assert_int_equal(pipe2(pipe_ends, O_CLOEXEC), 0);
    const unsigned before = open_descriptors();
    assert_int_equal(mf_ipc_send(pair[0], &out, pipe_ends[0]), 0);
    assert_int_equal(mf_ipc_receive(pair[1], &in, &fd), 1);
    assert_true(fd >= 0);
    assert_int_equal(open_descriptors(), before + 1); /* the sender has kept its own */
    assert_true(fcntl(fd, F_GETFD) & FD_CLOEXEC);
    assert_int_equal(fstat(pipe_ends[0], &sent), 0);
    assert_int_equal(fstat(fd, &got), 0);
    assert_int_equal(sent.st_ino, got.st_ino);
    close(fd);
    close(pipe_ends[0]);
    close(pipe_ends[1]);
}

static void closes_surplus_descriptors(void **state)
{
    (void)state;
    const struct mf_ipc out = region_message();
    struct mf_ipc in;
    int fds[12];
    for (unsigned i = 0; i < 12; i++)
        fds[i] = STDERR_FILENO;
    for (unsigned count = 2; count <= 12; count++) {
        const unsigned before = open_descriptors();
        int fd = -1;
        send_raw(&out, sizeof(out), fds, count);
        int rc = mf_ipc_receive(pair[1], &in, &fd);
        if (count <= 4) {
            assert_int_equal(rc, 1);
            assert_true(fd >= 0);
            close(fd);
        } else { /* cut off: what was meant can't be known */
            assert_int_equal(rc, -EPROTO);
            assert_int_equal(fd, -1);
        }
        assert_int_equal(open_descriptors(), before);
    }
}

static void refuses_other_lengths(void **state)
{
    (void)state;
    struct {
        struct mf_ipc message;
        char more[16];
    } longer = {.message = region_message()};
    static const size_t lengths[] = {1, 4, sizeof(struct mf_ipc) - 1, sizeof(struct mf_ipc) + 1,
                                     sizeof(struct mf_ipc) + 16};
    const int fds[] = {STDERR_FILENO, STDERR_FILENO};
    for (size_t i = 0; i < sizeof(lengths) / sizeof(lengths[0]); i++)
        for (unsigned fd_count = 0; fd_count <= 2; fd_count++) {
            const unsigned before = open_descriptors();
            struct mf_ipc in;
            int fd = 99;
            send_raw(&longer, lengths[i], fds, fd_count);
            assert_int_equal(mf_ipc_receive(pair[1], &in, &fd), -EPROTO);
            assert_int_equal(fd, -1);
            assert_int_equal(open_descriptors(), before);
        }
}

static void refuses_unknown_types(void **state)
{
    (void)state;
    static const uint32_t types[] = {0, MF_IPC_TYPES, MF_IPC_TYPES + 1, UINT32_MAX};
    for (size_t i = 0; i < sizeof(types) / sizeof(types[0]); i++) {
        const unsigned before = open_descriptors();
        struct mf_ipc out = region_message(), in;
        int fd = 99;
        out.type = types[i];
        assert_int_equal(mf_ipc_send(pair[0], &out, STDERR_FILENO), 0);
        assert_int_equal(mf_ipc_receive(pair[1], &in, &fd), -EPROTO);
        assert_int_equal(fd, -1);
        assert_int_equal(open_descriptors(), before);
    }
}

static void ends_the_text(void **state)
{
    (void)state;
    struct mf_ipc out = region_message(), in;
    int fd;
    memset(out.text, 'x', sizeof(out.text));
    assert_int_equal(mf_ipc_send(pair[0], &out, -1), 0);
    assert_int_equal(mf_ipc_receive(pair[1], &in, &fd), 1);
    assert_int_equal(strlen(in.text), sizeof(in.text) - 1);
}

static void notices_the_end(void **state)
{
    (void)state;
    struct mf_ipc message = region_message();
    int fd = 99;
    close(pair[0]);
    pair[0] = -1;
    assert_int_equal(mf_ipc_receive(pair[1], &message, &fd), 0);
    assert_int_equal(fd, -1);
    message = region_message();
    assert_int_equal(mf_ipc_send(pair[1], &message, -1), -EPIPE); /* and no SIGPIPE */
}

/* An empty packet reads like the end. What came with it must not stay open. */
static void closes_what_comes_with_nothing(void **state)
{
    (void)state;
    const int fds[] = {STDERR_FILENO, STDERR_FILENO};
    for (unsigned fd_count = 0; fd_count <= 2; fd_count++) {
        const unsigned before = open_descriptors();
        struct mf_ipc in;
        int fd = 99;
        send_raw("", 0, fds, fd_count);
        assert_int_equal(mf_ipc_receive(pair[1], &in, &fd), 0);
        assert_int_equal(fd, -1);
        assert_int_equal(open_descriptors(), before);
    }
}

static void says_when_the_socket_is_full(void **state)
{
    (void)state;
    const struct mf_ipc out = region_message();
    int rc;
    do
        rc = mf_ipc_send(pair[0], &out, -1);
    while (rc == 0);
    assert_int_equal(rc, -EAGAIN);
}

int main(void)
{
#define TEST(f) cmocka_unit_test_setup_teardown(f, open_pair, close_pair)
    const struct CMUnitTest tests[] = {
        TEST(carries_messages),
        TEST(carries_one_descriptor),
        TEST(closes_surplus_descriptors),
        TEST(refuses_other_lengths),
        TEST(refuses_unknown_types),
        TEST(ends_the_text),
        TEST(notices_the_end),
        TEST(closes_what_comes_with_nothing),
        TEST(says_when_the_socket_is_full),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
