/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The client side of the control socket: a request out, replies in. Blocking, for one thread.
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "control.pb-c.h"
#include "lib/error.h"

/** struct client - a connection to memferryd. Close it with client_close(). */
struct client {
    int fd;          /**< owned */
    uint8_t *buffer; /**< owned; what was received and not yet unpacked */
    size_t have_bytes, room_bytes;
};

/** client_open() - connect to the memferryd of @runtime_dir. @err says why it can't be reached and
 *  what to do. Return: 0 or -errno. */
int client_open(struct client *client, const char *runtime_dir, struct mf_error *err);
void client_close(struct client *client);

/** client_send() - send the connection's one request. Return: 0 or -errno. */
int client_send(struct client *client, const Memferry__Control__Request *request,
                struct mf_error *err);

enum client_event { CLIENT_REPLY = 1, CLIENT_TIMEOUT = 2, CLIENT_WAKE = 3 };

/**
 * client_receive() - wait for a reply.
 * @timeout_ms: from now; negative: no limit.
 * @wake_fd:    also end when this becomes readable (it is not read); -1: none.
 * @reply:      with CLIENT_REPLY the caller's, memferry__control__reply__free_unpacked() frees it.
 * Return: an enum client_event, or -errno: the connection is lost.
 */
int client_receive(struct client *client, int timeout_ms, int wake_fd,
                   Memferry__Control__Reply **reply, struct mf_error *err);

/**
 * client_ask() - the whole of a verb that takes one reply: connect, send, receive the last reply.
 * @timeout_ms: how long memferryd may take; negative: no limit.
 * Return: 0 with *@reply the caller's (its `error` may be set), or -errno: memferryd can't be
 * reached.
 */
int client_ask(const char *runtime_dir, const Memferry__Control__Request *request, int timeout_ms,
               Memferry__Control__Reply **reply, struct mf_error *err);

/** How long memferryd may take for what it answers from memory. */
#define CLIENT_PATIENCE_MS 10000
