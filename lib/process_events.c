/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib/process_events.h"

#include <arpa/inet.h>
#include <errno.h>
#include <linux/cn_proc.h>
#include <linux/connector.h>
#include <linux/filter.h>
#include <linux/netlink.h>
#include <stdbool.h>
#include <stddef.h>
#include <string.h>
#include <sys/socket.h>

#include "lib/util.h"

/** A datagram is a netlink header, a connector header, and the event. */
#define EVENT_AT (NLMSG_HDRLEN + sizeof(struct cn_msg))

/** let_through() - drop all other kinds of event before they are queued. */
static int let_through(int fd, uint32_t what)
{
    /* A filter sees numbers in network order, whatever they are. */
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, EVENT_AT + offsetof(struct proc_event, what)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, htonl(what), 0, 1),
        BPF_STMT(BPF_RET | BPF_K, UINT32_MAX),
        BPF_STMT(BPF_RET | BPF_K, 0),
    };
    const struct sock_fprog program = {.len = sizeof(code) / sizeof(code[0]), .filter = code};
    return setsockopt(fd, SOL_SOCKET, SO_ATTACH_FILTER, &program, sizeof(program)) == 0 ? 0
                                                                                        : -errno;
}

static int listen_for(uint32_t what)
{
    cleanup_close int fd =
        socket(AF_NETLINK, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, NETLINK_CONNECTOR);
    if (fd < 0)
        return -errno;
    int rc = let_through(fd, what);
    if (rc < 0)
        return rc;
    const struct sockaddr_nl local = {.nl_family = AF_NETLINK, .nl_groups = CN_IDX_PROC};
    if (bind(fd, (const struct sockaddr *)&local, sizeof(local)) != 0)
        return -errno;
    const int order = PROC_CN_MCAST_LISTEN;
    const struct cn_msg message = {.id = {.idx = CN_IDX_PROC, .val = CN_VAL_PROC},
                                   .len = sizeof(order)};
    const struct nlmsghdr header = {.nlmsg_len = NLMSG_LENGTH(sizeof(message) + sizeof(order)),
                                    .nlmsg_type = NLMSG_DONE};
    char request[NLMSG_SPACE(sizeof(struct cn_msg) + sizeof(order))] = {0};
    memcpy(request, &header, sizeof(header));
    memcpy(request + NLMSG_HDRLEN, &message, sizeof(message));
    memcpy(request + EVENT_AT, &order, sizeof(order));
    if (send(fd, request, header.nlmsg_len, 0) < 0)
        return -errno;
    return mf_steal_fd(&fd);
}

/** next_event() - the next one of the kernel's, as far as it goes. Return: false if there is none.
 */
static bool next_event(int fd, struct proc_event *event)
{
    char datagram[1024];
    for (;;) {
        struct sockaddr_nl from = {0};
        socklen_t from_bytes = sizeof(from);
        ssize_t length =
            recvfrom(fd, datagram, sizeof(datagram), 0, (struct sockaddr *)&from, &from_bytes);
        if (length < 0 && (errno == EINTR || errno == ENOBUFS))
            continue; /* some were lost, others are there */
        if (length < 0)
            return false;
        if (from.nl_pid != 0 || (size_t)length <= EVENT_AT)
            continue;
        size_t event_bytes = (size_t)length - EVENT_AT;
        memset(event, 0, sizeof(*event));
        memcpy(event, datagram + EVENT_AT,
               event_bytes < sizeof(*event) ? event_bytes : sizeof(*event));
        return true;
    }
}

int mf_forks_listen(void)
{
    return listen_for(PROC_EVENT_FORK);
}

pid_t mf_forks_child(int fd, pid_t tid)
{
    struct proc_event event;
    while (next_event(fd, &event)) {
        bool is_process = event.event_data.fork.child_pid == event.event_data.fork.child_tgid;
        if (event.what == PROC_EVENT_FORK && is_process && event.event_data.fork.parent_pid == tid)
            return event.event_data.fork.child_pid;
    }
    return 0;
}

int mf_execs_listen(void)
{
    return listen_for(PROC_EVENT_EXEC);
}

pid_t mf_execs_next(int fd, uint64_t *when_ns)
{
    struct proc_event event;
    while (next_event(fd, &event)) {
        if (event.what != PROC_EVENT_EXEC)
            continue;
        *when_ns = event.timestamp_ns; /* ktime_get_ns(): CLOCK_MONOTONIC */
        return event.event_data.exec.process_tgid;
    }
    return 0;
}
