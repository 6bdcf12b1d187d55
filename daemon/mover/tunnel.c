/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The VMM's device stream between its socket and the peer, both ways, without a look at it. The end
 * of one direction is passed on as such: QEMU's return path ends later than its stream.
 *
 * End of file is never success (I5): a mover that is killed closes its connections too, and a state
 * that was cut off must not pass for a whole one. So the side whose VMM ended its stream says, on
 * the control connection, how many bytes it had; the other side ends the stream to its own VMM when
 * it has passed on so many.
 */
#include "daemon/mover/mover.h"

#include <errno.h>
#include <inttypes.h>
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
    if (!tunnel->from[end].closed && tunnel->from[end].have == 0)
        events |= POLLIN;
    if (tunnel->from[!end].have > 0)
        events |= POLLOUT;
    return events;
}

/* Return: false when there is nothing to do but wait. */
static bool fill(struct tunnel *t, unsigned end)
{
    if (t->from[end].have > 0 || t->from[end].closed)
        return true;
    ssize_t n = recv(t->fd[end], t->from[end].data, TUNNEL_BUFFER_BYTES, MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return false;
    if (n <= 0) {
        t->from[end].closed = true;
        t->from[end].eof = end == 0; /* a reset is an end too: the VMM will say what it lost */
        return true;
    }
    t->from[end].have = (size_t)n;
    t->from[end].sent = 0;
    t->from[end].read_bytes += (uint64_t)n;
    return true;
}

static void pump_one(struct tunnel *t, unsigned end)
{
    for (;;) {
        if (!fill(t, end))
            return;
        if (t->from[end].have > 0) {
            ssize_t n = send(t->fd[!end], t->from[end].data + t->from[end].sent, t->from[end].have,
                             MSG_DONTWAIT | MSG_NOSIGNAL);
            if (n < 0 && (errno == EAGAIN || errno == EINTR))
                return;
            if (n < 0) {
                t->from[end].have = 0;
                t->from[end].closed = true;
                t->from[end].eof = true;
            } else {
                t->from[end].sent += (size_t)n;
                t->from[end].have -= (size_t)n;
            }
        }
        if (t->from[end].have == 0 && end == 1 && t->peer_told &&
            t->from[1].read_bytes == t->peer_bytes)
            t->from[1].closed = t->from[1].eof = true;
        if (t->from[end].have == 0 && t->from[end].closed) {
            if (t->from[end].eof && !t->from[end].shut) {
                shutdown(t->fd[!end], SHUT_WR);
                t->from[end].shut = true;
            }
            return;
        }
    }
}

void tunnel_pump(struct mover *mover)
{
    struct tunnel *t = &mover->tunnel;
    if (t->fd[0] < 0 || t->fd[1] < 0)
        return;
    pump_one(t, 0);
    pump_one(t, 1);
    if (t->from[0].shut && !t->told) {
        t->told = true;
        control_send_device_end(mover, t->from[0].read_bytes);
    }
    if (t->peer_told && !t->from[1].eof &&
        (t->from[1].read_bytes > t->peer_bytes || t->from[1].closed)) {
        link_fail(mover,
                  "the device connection brought %" PRIu64
                  " bytes where the VM's state has %" PRIu64,
                  t->from[1].read_bytes, t->peer_bytes);
        return;
    }
    if (t->from[0].shut && t->from[1].shut)
        tunnel_close(t);
}

void tunnel_expect(struct mover *mover, uint64_t bytes)
{
    mover->tunnel.peer_told = true;
    mover->tunnel.peer_bytes = bytes;
    tunnel_pump(mover);
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
