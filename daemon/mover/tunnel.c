/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The VMM's device stream between its socket and the peer, both ways, without a look at it. The end
 * of one direction is passed on as such: QEMU's return path ends later than its stream.
 */
#include "daemon/mover/mover.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#define TUNNEL_BUFFER_BYTES (256u * 1024u)

void tunnel_init(struct tunnel *tunnel)
{
    *tunnel = (struct tunnel){.fd = {-1, -1}};
}

void tunnel_set(struct tunnel *tunnel, unsigned end, int fd)
{
    if (tunnel->fd[end] >= 0)
        close(tunnel->fd[end]);
    tunnel->fd[end] = fd;
    if (!tunnel->from[end].data)
        tunnel->from[end].data = malloc(TUNNEL_BUFFER_BYTES);
    if (!tunnel->from[end].data)
        mover_fatal("out of memory for the device stream's buffer");
}

short tunnel_events(const struct tunnel *tunnel, unsigned end)
{
    if (tunnel->fd[0] < 0 || tunnel->fd[1] < 0)
        return 0;
    short events = 0;
    if (!tunnel->from[end].eof && tunnel->from[end].have == 0)
        events |= POLLIN;
    if (tunnel->from[!end].have > 0)
        events |= POLLOUT;
    return events;
}

static void pump_one(struct tunnel *t, unsigned end)
{
    for (;;) {
        if (t->from[end].have == 0 && !t->from[end].eof) {
            ssize_t n = recv(t->fd[end], t->from[end].data, TUNNEL_BUFFER_BYTES, MSG_DONTWAIT);
            if (n < 0 && (errno == EAGAIN || errno == EINTR))
                return;
            if (n <= 0)
                t->from[end].eof = true; /* a reset is an end too: the VMM will say what it lost */
            else
                t->from[end].have = (size_t)n;
            t->from[end].sent = 0;
        }
        if (t->from[end].have > 0) {
            ssize_t n = send(t->fd[!end], t->from[end].data + t->from[end].sent, t->from[end].have,
                             MSG_DONTWAIT | MSG_NOSIGNAL);
            if (n < 0 && (errno == EAGAIN || errno == EINTR))
                return;
            if (n < 0) {
                t->from[end].have = 0;
                t->from[end].eof = true;
            } else {
                t->from[end].sent += (size_t)n;
                t->from[end].have -= (size_t)n;
            }
        }
        if (t->from[end].have == 0 && t->from[end].eof) {
            if (!t->from[end].shut)
                shutdown(t->fd[!end], SHUT_WR);
            t->from[end].shut = true;
            return;
        }
    }
}

void tunnel_pump(struct tunnel *tunnel)
{
    if (tunnel->fd[0] < 0 || tunnel->fd[1] < 0)
        return;
    pump_one(tunnel, 0);
    pump_one(tunnel, 1);
    if (tunnel->from[0].shut && tunnel->from[1].shut)
        tunnel_close(tunnel);
}

void tunnel_close(struct tunnel *tunnel)
{
    for (unsigned end = 0; end < 2; end++) {
        if (tunnel->fd[end] >= 0)
            close(tunnel->fd[end]);
        free(tunnel->from[end].data);
    }
    tunnel_init(tunnel);
}
