/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What `memferry monitor` prints: changes as lines, and lines out of the way.
 *
 * The monitored process waits for its events to be read. Were it the one that shows them (a
 * terminal, an sshd, a pager) or slow to read them, writing to it could wait for the very process
 * that waits for us. So a thread of its own writes, and between the two lie a few MiB. When those
 * are full the process waits; who asks to end must not, so lines that nobody takes are lost then.
 */
#pragma once

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>

#include "lib/change.h"

#define MONITOR_LINE_BYTES 256 /**< the longest line, with its newline and NUL */

/** monitor_header() - the titles of the columns. */
const char *monitor_header(void);

/** monitor_line(), monitor_json() - a change for people, and as memferry(1) promises it. Pure but
 * for the time zone. @out: MONITOR_LINE_BYTES. Return: the length, with the newline. */
size_t monitor_line(const struct mf_change *change, char *out);
size_t monitor_json(const struct mf_change *change, char *out);

/** struct monitor_output - lines on their way to the standard output. */
struct monitor_output {
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t filled, drained;
    char *ring;
    size_t head, used; /**< where the next byte goes; how many wait */
    int signal_fd;     /**< readable once somebody asks to end; nobody reads it */
    bool closing, failed, ended;
};

/** monitor_output_start() - @signal_fd: signalfd(2) of the signals that ask to end. Return: 0 or
 * -errno. */
int monitor_output_start(struct monitor_output *output, int signal_fd);

/** monitor_output_add() - one line; waits while the room is full. Never part of a line. */
void monitor_output_add(struct monitor_output *output, const char *line, size_t length_bytes);

/** monitor_output_failed() - has the reader gone, or taken nothing for a second when somebody asked
 * to end? Nothing is written any more then. */
bool monitor_output_failed(struct monitor_output *output);

/** monitor_output_finish() - write what is left and end the thread. Return: false if not everything
 * could be written. */
bool monitor_output_finish(struct monitor_output *output);
