/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/mover/ring.h"

#include <errno.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

/* liburing 2.3 as Debian 12 has it declares its wrappers for these two without exporting them. */
static int ring_register(const struct io_uring *ring, unsigned opcode, const void *arg,
                         unsigned count)
{
    return syscall(SYS_io_uring_register, ring->ring_fd, opcode, arg, count) < 0 ? -errno : 0;
}

int ring_open(struct io_uring *ring, unsigned entries)
{
    static const unsigned flags[] = {
        /* 6.1: completions are worked off by the one thread that waits for them. */
        IORING_SETUP_R_DISABLED | IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN,
        IORING_SETUP_R_DISABLED,
    };
    static const uint8_t allowed[] = {IORING_OP_NOP,     IORING_OP_SENDMSG,    IORING_OP_SEND,
                                      IORING_OP_RECV,    IORING_OP_POLL_ADD,   IORING_OP_READ,
                                      IORING_OP_TIMEOUT, IORING_OP_POLL_REMOVE};
    struct io_uring_restriction rules[sizeof(allowed) + 1];
    int r = -EINVAL;
    for (unsigned i = 0; r == -EINVAL && i < sizeof(flags) / sizeof(flags[0]); i++)
        r = io_uring_queue_init(entries, ring, flags[i]);
    if (r < 0)
        return r;
    memset(rules, 0, sizeof(rules));
    for (unsigned i = 0; i < sizeof(allowed); i++) {
        rules[i].opcode = IORING_RESTRICTION_SQE_OP;
        rules[i].sqe_op = allowed[i];
    }
    /* Newer kernels (seen on Linux 7.2) restrict registering, and with it pins, only where a rule
     * speaks of it: so one harmless thing is allowed. */
    rules[sizeof(allowed)].opcode = IORING_RESTRICTION_REGISTER_OP;
    rules[sizeof(allowed)].register_op = IORING_REGISTER_PROBE;
    r = ring_register(ring, IORING_REGISTER_RESTRICTIONS, rules, sizeof(allowed) + 1);
    if (r == 0)
        r = ring_register(ring, IORING_REGISTER_ENABLE_RINGS, NULL, 0);
    if (r < 0)
        io_uring_queue_exit(ring);
    return r;
}

void ring_close(struct io_uring *ring)
{
    io_uring_queue_exit(ring);
}

/* One operation, waited for. */
static int run(struct io_uring *ring)
{
    struct io_uring_cqe *cqe;
    int r;
    do
        r = io_uring_submit_and_wait(ring, 1);
    while (r == -EINTR);
    if (r < 0)
        return r;
    do
        r = io_uring_wait_cqe(ring, &cqe);
    while (r == -EINTR);
    if (r < 0)
        return r;
    r = cqe->res;
    io_uring_cqe_seen(ring, cqe);
    return r;
}

int ring_send_all(struct io_uring *ring, int fd, struct msghdr *msg)
{
    while (msg->msg_iovlen > 0) {
        struct io_uring_sqe *sqe = io_uring_get_sqe(ring);
        /* WAITALL: the kernel goes on after a short send instead of waking us for it. */
        io_uring_prep_sendmsg(sqe, fd, msg, MSG_NOSIGNAL | MSG_WAITALL);
        int n = run(ring);
        if (n == -EINTR || n == -EAGAIN)
            continue;
        if (n < 0)
            return n;
        size_t done = (size_t)n;
        while (msg->msg_iovlen > 0 && done >= msg->msg_iov->iov_len) {
            done -= msg->msg_iov->iov_len;
            msg->msg_iov++;
            msg->msg_iovlen--;
        }
        if (msg->msg_iovlen > 0) {
            msg->msg_iov->iov_base = (uint8_t *)msg->msg_iov->iov_base + done;
            msg->msg_iov->iov_len -= done;
        }
    }
    return 0;
}

ssize_t ring_recv(struct io_uring *ring, int fd, void *at, size_t room_bytes)
{
    for (;;) {
        struct io_uring_sqe *sqe = io_uring_get_sqe(ring);
        io_uring_prep_recv(sqe, fd, at, room_bytes, 0);
        int n = run(ring);
        if (n != -EINTR && n != -EAGAIN)
            return n;
    }
}
