/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Work that may take long, off the event loop: all sessions of the host share the loop, and one of
 * them may have its guest paused. Each piece of work has a thread of its own.
 *
 * Two pieces of work on one process are never at it together: one tracer keeps another out, and
 * what is given back at the end of one session may be taken anew by the next. They are done in the
 * order in which they were started.
 */
#pragma once

#include <event2/event.h>
#include <pthread.h>
#include <stdbool.h>
#include <sys/types.h>

#include "lib/error.h"

/** struct work - a part of what its owner needs to do it. Until done() nobody else may touch what
 * run() uses. */
struct work {
    pid_t pid;                       /**< the process it is done to */
    void (*run)(struct work *work);  /**< in a thread, with all signals blocked */
    void (*done)(struct work *work); /**< then, on the event loop: the work is the owner's again */

    /* work.c's. */
    struct work *next;
    struct event *ended;
    int ended_fd; /**< eventfd(2) */
    pthread_t thread;
    bool begun, has_thread;
};

/** work_start() - do it as soon as nothing else is done to its process. done() is never called from
 * inside this. Return: 0 or -errno with a sentence: then it was not begun, and is not. */
int work_start(struct event_base *base, struct work *work, struct mf_error *err);

/** works_finish() - wait for all there is, and for what follows from it (the daemon ends). */
void works_finish(void);
