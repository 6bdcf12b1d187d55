/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The program's state between a command's pipe and the session's device stream: bytes that
 * memferryd passes on and does not look at. In the event loop, never blocking.
 */
#pragma once

#include <event2/event.h>
#include <stdint.h>

struct relay;

/** relay_done - all that came from the input up to its end has been passed on, or @error (a
 * positive errno value) stopped it. The relay remains until relay_free. From the event loop only.
 */
typedef void (*relay_done)(void *arg, int error, uint64_t passed_bytes);

/**
 * relay_start() - take both descriptors over (also on failure) and pass on what comes.
 * @lossy: the reader may leave before the end; the rest is then read and dropped.
 * Return: NULL when out of memory.
 */
struct relay *relay_start(struct event_base *base, int in_fd, int out_fd, int lossy,
                          relay_done done, void *arg);

/** relay_free() - close both descriptors, which is the end of file to the reader. NULL is allowed.
 */
void relay_free(struct relay *relay);
