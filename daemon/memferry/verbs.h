/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The verbs, a file each, and what they share.
 */
#pragma once

#include "control.pb-c.h"
#include "daemon/memferry/args.h"

/** cli_verbs - the table, ended by a row without a word. */
extern const struct cli_verb cli_verbs[];

int verb_receive(const struct cli_args *args);
int verb_migrate(const struct cli_args *args);
int verb_status(const struct cli_args *args);
int verb_cancel(const struct cli_args *args);
int verb_check(const struct cli_args *args);
int verb_forget(const struct cli_args *args);
int verb_monitor(const struct cli_args *args);
int verb_set(const struct cli_args *args);
int verb_switch(const struct cli_args *args);

/** verb_complain() - "memferry: SENTENCE" on stderr. Return: @code, so that verbs `return` it. */
int verb_complain(int code, const char *sentence);

/** verb_fail() - a failure without a session to tell about: verb_complain(), and with --json the
 * object that memferry(1) promises for the verb. Return: @code. */
int verb_fail(const struct cli_args *args, int code, const char *sentence);

/** verb_simple() - send a request that is answered once, and say what came of it: the reply's
 * message, else @success, else nothing. @timeout_ms as client_ask(). Return: an enum cli_exit. */
int verb_simple(const struct cli_args *args, const Memferry__Control__Request *request,
                int timeout_ms, const char *success);

/** struct verb_target - what a request says about the VM or process. Points into the arguments. */
struct verb_target {
    char *qmp_path; /**< absolute; "" with a process */
    Memferry__Control__Process process, *process_p;
    Memferry__Control__RegionChoice region[MF_CHOICES_MAX], *region_p[MF_CHOICES_MAX];
};

/** verb_target() - from the command line. @owned: what @out->qmp_path points to, malloc'ed, the
 * caller's. Return: 0 or -errno. */
int verb_target(const struct cli_args *args, struct verb_target *out, char **owned,
                struct mf_error *err);

/** verb_reply_code() - the exit code of a last reply: its own, and never 0 with an error. */
int verb_reply_code(const Memferry__Control__Reply *reply);
