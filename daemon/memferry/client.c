/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/memferry/client.h"

#include <errno.h>
#include <poll.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "lib/control_message.h"
#include "lib/util.h"

static int fail_connect(const char *path, int code, struct mf_error *err)
{
    switch (code) {
    case ENOENT:
        return mf_fail(err, code,
                       "cannot reach memferryd: there is no %s; start it with 'systemctl start "
                       "memferryd', or name its directory with --runtime-dir",
                       path);
    case ECONNREFUSED:
        return mf_fail(err, code,
                       "cannot reach memferryd: nobody listens on %s any more; start it with "
                       "'systemctl start memferryd'",
                       path);
    case EACCES:
    case EPERM:
        return mf_fail(err, code,
                       "cannot reach memferryd: %s is open to root and memferryd's own user only; "
                       "try again with sudo",
                       path);
    default:
        return mf_fail(err, code, "cannot reach memferryd on %s: %s", path, strerror(code));
    }
}

int client_open(struct client *client, const char *runtime_dir, struct mf_error *err)
{
    *client = (struct client){.fd = -1};
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int length = snprintf(address.sun_path, sizeof(address.sun_path), "%s/%s", runtime_dir,
                          MF_CONTROL_SOCKET_NAME);
    if (length < 0 || (size_t)length >= sizeof(address.sun_path))
        return mf_fail(
            err, ENAMETOOLONG,
            "cannot reach memferryd: the path of the control socket in %s is longer than "
            "%zu characters",
            runtime_dir, sizeof(address.sun_path) - 1);
    cleanup_close int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return mf_fail(err, errno, "cannot make a socket: %s", strerror(errno));
    if (connect(fd, (struct sockaddr *)&address, sizeof(address)) < 0)
        return fail_connect(address.sun_path, errno, err);
    client->fd = mf_steal_fd(&fd);
    return 0;
}

void client_close(struct client *client)
{
    if (client->fd >= 0)
        close(client->fd);
    free(client->buffer);
    *client = (struct client){.fd = -1};
}

int client_send(struct client *client, const Memferry__Control__Request *request,
                struct mf_error *err)
{
    cleanup_free uint8_t *frame = NULL;
    size_t frame_bytes = 0;
    int rc = mf_control_frame(&request->base, &frame, &frame_bytes, err);
    if (rc < 0)
        return rc;
    for (size_t sent = 0; sent < frame_bytes;) {
        ssize_t n = send(client->fd, frame + sent, frame_bytes - sent, MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return mf_fail(err, errno, "memferryd closed the connection: %s", strerror(errno));
        sent += (size_t)n;
    }
    return 0;
}

static void clean_reply(const Memferry__Control__Reply *reply)
{
    mf_clean_text(reply->error);
    mf_clean_text(reply->message);
    for (size_t i = 0; i < reply->n_sessions; i++) {
        const Memferry__Control__Session *session = reply->sessions[i];
        mf_clean_text(session->name);
        mf_clean_text(session->id);
        mf_clean_text(session->role);
        mf_clean_text(session->state);
        mf_clean_text(session->reason);
        mf_clean_text(session->peer);
    }
}

/* Takes the first whole message out of the buffer. Return: 1, 0 (none yet), -EPROTO. */
static int take_reply(struct client *client, Memferry__Control__Reply **reply, struct mf_error *err)
{
    size_t body_bytes = 0;
    int rc = mf_control_body(client->buffer, client->have_bytes, &body_bytes, err);
    if (rc <= 0)
        return rc;
    rc = mf_control_reply(client->buffer + MF_CONTROL_HEADER_BYTES, body_bytes, reply, err);
    if (rc < 0)
        return rc;
    clean_reply(*reply);
    size_t frame_bytes = MF_CONTROL_HEADER_BYTES + body_bytes;
    client->have_bytes -= frame_bytes;
    memmove(client->buffer, client->buffer + frame_bytes, client->have_bytes);
    return 1;
}

static int read_more(struct client *client, struct mf_error *err)
{
    enum { STEP_BYTES = 16384 };
    if (client->room_bytes - client->have_bytes < STEP_BYTES) {
        size_t room_bytes = client->room_bytes + 2 * STEP_BYTES;
        uint8_t *grown = realloc(client->buffer, room_bytes);
        if (!grown)
            return mf_fail(err, ENOMEM, "out of memory for a reply of memferryd");
        client->buffer = grown;
        client->room_bytes = room_bytes;
    }
    ssize_t n = recv(client->fd, client->buffer + client->have_bytes, STEP_BYTES, 0);
    if (n < 0 && errno == EINTR)
        return 0;
    if (n < 0)
        return mf_fail(err, errno, "lost the connection to memferryd: %s", strerror(errno));
    if (n == 0)
        return mf_fail(err, ECONNRESET,
                       "memferryd closed the connection without a last word; its log says why "
                       "('journalctl -u memferryd')");
    client->have_bytes += (size_t)n;
    return 0;
}

int client_receive(struct client *client, int timeout_ms, int wake_fd,
                   Memferry__Control__Reply **reply, struct mf_error *err)
{
    uint64_t end_ns = mf_now_ns() + (uint64_t)(timeout_ms < 0 ? 0 : timeout_ms) * 1000000u;
    for (;;) {
        int rc = take_reply(client, reply, err);
        if (rc != 0)
            return rc < 0 ? rc : CLIENT_REPLY;

        uint64_t now_ns = mf_now_ns();
        int left_ms = timeout_ms < 0     ? -1
                      : end_ns <= now_ns ? 0
                                         : (int)((end_ns - now_ns + 999999u) / 1000000u);
        struct pollfd fds[] = {{.fd = client->fd, .events = POLLIN},
                               {.fd = wake_fd, .events = POLLIN}};
        int ready = poll(fds, 2, left_ms);
        if (ready < 0 && errno != EINTR)
            return mf_fail(err, errno, "cannot wait for memferryd: %s", strerror(errno));
        if (ready <= 0) {
            if (ready == 0)
                return CLIENT_TIMEOUT;
            continue;
        }
        if (fds[0].revents) {
            rc = read_more(client, err);
            if (rc < 0)
                return rc;
        } else if (fds[1].revents) {
            return CLIENT_WAKE;
        }
    }
}

static int ask_connected(struct client *client, const Memferry__Control__Request *request,
                         int timeout_ms, Memferry__Control__Reply **reply, struct mf_error *err)
{
    int rc = client_send(client, request, err);
    while (rc == 0) {
        rc = client_receive(client, timeout_ms, -1, reply, err);
        if (rc == CLIENT_TIMEOUT)
            return mf_fail(
                err, ETIMEDOUT,
                "memferryd did not answer within %d seconds; it runs, but its log should "
                "be looked at ('journalctl -u memferryd')",
                timeout_ms / 1000);
        if (rc < 0 || (*reply)->last)
            break;
        memferry__control__reply__free_unpacked(*reply, NULL);
        *reply = NULL;
        rc = 0;
    }
    return rc < 0 ? rc : 0;
}

int client_ask(const char *runtime_dir, const Memferry__Control__Request *request, int timeout_ms,
               Memferry__Control__Reply **reply, struct mf_error *err)
{
    struct client client;
    int rc = client_open(&client, runtime_dir, err);
    if (rc < 0)
        return rc;
    rc = ask_connected(&client, request, timeout_ms, reply, err);
    client_close(&client);
    return rc;
}
