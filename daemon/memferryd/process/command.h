/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A command of the operator's, run by `sh -c` as a child of memferryd, which never waits for it but
 * in the event loop.
 *
 * It runs as memferryd's user, in `/`, with a session and process group of its own, umask 077,
 * default signals and no environment but PATH, LC_ALL and what the caller gives. Its standard error
 * (and its standard output, unless that goes elsewhere) goes to memferryd's log line by line, of
 * many the first; the last line explains a failure.
 */
#pragma once

#include <event2/event.h>
#include <sys/types.h>

#include "lib/error.h"

struct command;

/** struct command_order - what to run. Strings are borrowed for the call.
 * @session, @word: for messages: "the save command of NAME".
 * @text:    the shell's.
 * @environment: NULL-terminated "NAME=VALUE".
 * @stdin_fd:  -1: /dev/null. @stdout_fd: -1: the log. The caller keeps both.
 * @timeout_ms: then it is killed, with its process group. */
struct command_order {
    const char *session, *word, *text;
    const char *const *environment;
    int stdin_fd, stdout_fd;
    unsigned timeout_ms;
};

/** command_done - it has ended. @err: NULL for exit status 0, else the sentence. The command is
 * gone afterwards. From the event loop only. */
typedef void (*command_done)(void *arg, const struct mf_error *err);

/** command_start() - Return: 0 or -errno with @err (then @done is not called). */
int command_start(struct event_base *base, const struct command_order *order, command_done done,
                  void *arg, struct command **out, struct mf_error *err);

/** command_group() - its process group. */
pid_t command_group(const struct command *command);

/** command_kill() - SIGKILL to its process group; @done follows when it has ended. */
void command_kill(struct command *command);

/** command_forget() - the same, but nobody is told. It is reaped by itself. NULL is allowed. */
void command_forget(struct command *command);

/** command_exec() - in a forked child: become `sh -c` with @order's text, environment and standard
 * streams (@error_fd: standard error). Does not return. */
void command_exec(const struct command_order *order, int error_fd) __attribute__((noreturn));
