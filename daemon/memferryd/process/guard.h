/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What becomes of a target process if memferryd dies (kill -9) in the middle: a small child of
 * memferryd that does nothing but wait for that.
 *
 * A QEMU whose migration stream breaks lets its guest go on by itself. A process that was stopped,
 * or paused by a command, would stand still for ever. So before memferryd pauses one, it starts a
 * guard and tells it what would have to be undone. When memferryd's end of the pipe closes, the
 * guard kills the command that was running and, unless RELEASE was about to be given, lets the
 * process go on: SIGCONT, then the resume command.
 */
#pragma once

#include <event2/event.h>
#include <stdbool.h>
#include <sys/types.h>

#include "daemon/memferryd/process/command.h"

struct guard;

/**
 * guard_start() - @pidfd: of the target (duplicated). @resume: the order of the resume command; its
 * text may be "": there is none. Return: 0 or -errno with @err.
 */
int guard_start(struct event_base *base, int pidfd, const struct command_order *resume,
                struct guard **out, struct mf_error *err);

/** guard_command() - the process group that runs now; 0: none. */
void guard_command(struct guard *guard, pid_t group);

/** guard_return() - shall the target be let go if memferryd dies now? When this returns the guard
 * will act so, whatever happens to memferryd. */
void guard_return(struct guard *guard, bool shall);

/** guard_dismiss() - memferryd needs it no more: it acts by what it was told last, then leaves, and
 * is reaped by itself. NULL is allowed. */
void guard_dismiss(struct guard *guard);
