/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A QMP client: one AF_UNIX connection to a QEMU's monitor, on a libevent loop, never blocking.
 *
 * Callbacks run from the event loop only, never inside qmp_open or qmp_send. A callback may call
 * any function here, qmp_close included. Commands are answered in the order they were sent.
 */
#pragma once

#include <event2/event.h>
#include <jansson.h>
#include <sys/types.h>

#include "lib/error.h"

struct qmp;

/** struct qmp_callbacks - @ready: once, capabilities are negotiated, commands may be sent.
 *  @event: QEMU told something; @data is borrowed, may be NULL.
 *  @down: once, the connection is no more or never came to be; @why completes "what happened" as a
 * whole sentence. Nothing follows but qmp_close. Replies not yet given are given no more. */
struct qmp_callbacks {
    void (*ready)(void *arg);
    void (*event)(void *arg, const char *name, json_t *data);
    void (*down)(void *arg, const char *why);
    void *arg;
};

/** qmp_reply - the answer to a command: @value (borrowed) on success, else NULL and QEMU's @error.
 */
typedef void (*qmp_reply)(void *arg, json_t *value, const char *error);

/**
 * qmp_open() - connect to the monitor at @path.
 * @vm_name: for sentences. Both strings are copied.
 * Return: 0, or -errno with @err when the socket can't even be tried.
 */
int qmp_open(struct event_base *base, const char *vm_name, const char *path,
             const struct qmp_callbacks *callbacks, struct qmp **out, struct mf_error *err);

/**
 * qmp_send() - send @command with @arguments (reference taken over; may be NULL).
 * @fd:    descriptor to hand over with it (SCM_RIGHTS; duplicated, the caller keeps its own), or
 * -1.
 * @reply: called with @arg once, or not at all if the connection goes down or qmp_forget is called;
 *         may be NULL.
 * Sent at once where the socket takes it. Failures come as `down`.
 */
void qmp_send(struct qmp *qmp, const char *command, json_t *arguments, int fd, qmp_reply reply,
              void *arg);

/** qmp_forget() - the replies still due are nobody's any more. */
void qmp_forget(struct qmp *qmp);

/** qmp_peer_pid() - the process at the other end, as the kernel tells it (SO_PEERCRED: who called
 *  listen(2)), in our pid namespace; 0 when it is not visible there. Valid from `ready` on. */
pid_t qmp_peer_pid(const struct qmp *qmp);

/** qmp_version() - the greeting's version object, borrowed; valid from `ready` on. */
json_t *qmp_version(const struct qmp *qmp);

/** qmp_close() - forget the connection. No callback follows. NULL is allowed. */
void qmp_close(struct qmp *qmp);
