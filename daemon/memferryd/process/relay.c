/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/memferryd/process/relay.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdlib.h>
#include <unistd.h>

#define BUFFER_BYTES ((size_t)256 * 1024)
/* Others have to be served in between. */
#define TURNS 4u

struct relay {
    int in_fd, out_fd;
    bool lossy, dropping, ended;
    struct event *in_event, *out_event;
    relay_done done;
    void *arg;
    uint64_t passed_bytes;
    size_t have_bytes, sent_bytes;
    uint8_t buffer[BUFFER_BYTES];
};

static void end(struct relay *relay, int error)
{
    relay->ended = true;
    event_del(relay->in_event);
    event_del(relay->out_event);
    relay->done(relay->arg, error, relay->passed_bytes);
}

/* Return: true to be called again, false when it waits or has ended. */
static bool turn(struct relay *relay)
{
    if (relay->have_bytes == 0) {
        ssize_t n = read(relay->in_fd, relay->buffer, BUFFER_BYTES);
        if (n < 0 && (errno == EAGAIN || errno == EINTR)) {
            event_add(relay->in_event, NULL);
            return false;
        }
        if (n <= 0) {
            end(relay, n < 0 ? errno : 0);
            return false;
        }
        relay->have_bytes = (size_t)n;
        relay->sent_bytes = 0;
    }
    ssize_t n = relay->dropping
                    ? (ssize_t)relay->have_bytes
                    : write(relay->out_fd, relay->buffer + relay->sent_bytes, relay->have_bytes);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) {
        event_add(relay->out_event, NULL);
        return false;
    }
    if (n < 0 && errno == EPIPE && relay->lossy) {
        relay->dropping = true;
        return true;
    }
    if (n < 0) {
        end(relay, errno);
        return false;
    }
    relay->passed_bytes += (uint64_t)n;
    relay->sent_bytes += (size_t)n;
    relay->have_bytes -= (size_t)n;
    return true;
}

static void on_ready(evutil_socket_t fd, short what, void *arg)
{
    struct relay *relay = arg;
    (void)fd;
    (void)what;
    for (unsigned i = 0; i < TURNS; i++)
        if (!turn(relay))
            return;
    event_add(relay->have_bytes ? relay->out_event : relay->in_event, NULL);
}

struct relay *relay_start(struct event_base *base, int in_fd, int out_fd, int lossy,
                          relay_done done, void *arg)
{
    struct relay *relay = calloc(1, sizeof(*relay));
    if (!relay) {
        close(in_fd);
        close(out_fd);
        return NULL;
    }
    relay->in_fd = in_fd;
    relay->out_fd = out_fd;
    relay->lossy = lossy;
    relay->done = done;
    relay->arg = arg;
    evutil_make_socket_nonblocking(in_fd);
    evutil_make_socket_nonblocking(out_fd);
    relay->in_event = event_new(base, in_fd, EV_READ, on_ready, relay);
    relay->out_event = event_new(base, out_fd, EV_WRITE, on_ready, relay);
    if (!relay->in_event || !relay->out_event || event_add(relay->in_event, NULL) != 0) {
        relay_free(relay);
        return NULL;
    }
    return relay;
}

void relay_free(struct relay *relay)
{
    if (!relay)
        return;
    if (relay->in_event)
        event_free(relay->in_event);
    if (relay->out_event)
        event_free(relay->out_event);
    close(relay->in_fd);
    close(relay->out_fd);
    free(relay);
}
