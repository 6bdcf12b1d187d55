/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A session on the terminal, for people and for programs. Everything goes to stdout except where
 * said otherwise.
 */
#pragma once

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>

#include "control.pb-c.h"

/** show_json_session() - the object that memferry(1) promises: every field, always.
 *  Return: a new reference, or NULL without memory. */
json_t *show_json_session(const Memferry__Control__Session *session);

/** show_json_failure() - the same object when there is no session to tell about.
 *  @role, @state: may be NULL, which becomes null. */
json_t *show_json_failure(const char *name, const char *role, const char *state,
                          const char *reason);

/** show_json_text() - a JSON string of any bytes: what is not UTF-8 becomes '?'. */
json_t *show_json_text(const char *text);

/** show_json() - print one object and a newline, and drop the reference (NULL: out of memory).
 *  Return: 0, or 1 with a sentence on stderr when it can't be printed. */
int show_json(json_t *object);

/** show_status() - everything about one session. */
void show_status(const Memferry__Control__Session *session);

/** show_table() - a line a session. */
void show_table(Memferry__Control__Session *const *sessions, size_t count);

/** show_summary() - what a migration that has succeeded did, to somebody who sees it first. */
void show_summary(const Memferry__Control__Session *session, bool keep_source);

/** show_share() - how much of the guest's memory the destination holds, 0 to 1: with precopy all
 * but what the present round has still to send. */
double show_share(const Memferry__Control__Session *session);

/** show_state() - a state in words, as seen from the session's role. */
const char *show_state(const Memferry__Control__Session *session);
