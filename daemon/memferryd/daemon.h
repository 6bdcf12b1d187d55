/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * memferryd's internal header, in sections per source file. Everything runs on the event-loop
 * thread, but for what work.h has done by others.
 */
#pragma once

#include <event2/event.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "lib/congestion.h"
#include "lib/error.h"
#include "control.pb-c.h"

struct session;
struct daemon;
struct vmm_target;

/* ---- config.c: the configuration file (memferryd(8)) and the command line ---- */

#define MF_DEFAULT_PORT 7466
#define MF_DEFAULT_RUNTIME_DIR "/run/memferry"
#define MF_CPUS_PER_STREAM 4u /**< a bulk connection keeps a core busy: see doc/performance.md */
#define MF_MOST_DEFAULT_STREAMS 4u
#define MF_MAX_STREAMS 16u

/** struct config - what memferryd runs by. Strings are owned. */
struct config {
    char runtime_dir[512];
    char listen_address[256]; /**< numeric address, without the port */
    uint16_t listen_port;
    unsigned streams;     /**< bulk connections when the command line names none */
    char mover_user[64];  /**< whom memferry-mover becomes; "nobody" where it does not exist */
    char mover_path[512]; /**< empty: beside memferryd, else libexecdir */
    char congestion[MF_CONGESTION_MAX]; /**< lib/congestion.h */
    int log_level;
};

/** config_defaults() / config_load() / config_listen() - fill; load a file (inih; unknown keys, bad
 *  values and missing files are errors with file and line); parse "ADDR:PORT", "ADDR", ":PORT",
 *  "[V6]:PORT". Return: 0 or -errno. */
void config_defaults(struct config *config);
int config_load(struct config *config, const char *path, struct mf_error *err);
int config_listen(struct config *config, const char *text, struct mf_error *err);

/* ---- control.c: the control socket, RUNTIME/control.sock, mode 0600 ---- */

struct control;

/** control_open() - listen on RUNTIME/control.sock. A stale socket is replaced, a live daemon's is
 * an error that says so. Return: 0 or -errno. */
int control_open(struct daemon *daemon, struct control **out, struct mf_error *err);
void control_close(struct control *control);

/** control_session_changed() - a session's state or figures changed: tell those who watch it. */
void control_session_changed(struct control *control, struct session *session);

/* ---- session.c: the sessions of this host, as control.c sees them ---- */

/** struct session_waiter - told once: the session got where the verb wanted it, or did not.
 * Called from the event loop, never from inside the call that was given it. `session` may be NULL
 * when the request was refused before one existed. `error` is NULL on success; exit_code as in
 * memferry(1). */
struct session_waiter {
    void (*done)(void *arg, struct session *session, const char *error, unsigned exit_code);
    void *arg;
};

/** session_receive() - arm a destination; done when the VM is armed or refused. */
void session_receive(struct daemon *daemon, const char *name, const struct vmm_target *target,
                     struct session_waiter waiter);

struct migrate_options {
    const char *name, *host;
    const struct vmm_target *target;
    uint16_t port;    /**< 0: default */
    unsigned streams; /**< 0: the configuration's */
    bool keep_source;
    const char *mode;          /**< "hybrid", "postcopy", "precopy" */
    uint64_t bandwidth_bits_s; /**< 0: no limit */
    unsigned max_rounds;       /**< 0: default */
    unsigned switch_after_s;   /**< 0: never by time */
    unsigned max_blackout_ms;  /**< precopy; 0: default */
    bool fallback;             /**< precopy that does not converge becomes hybrid */
};
/** session_migrate() - start a source; done when preflight passed and connecting began, or refused.
 *  What comes after is seen by watching. */
void session_migrate(struct daemon *daemon, const struct migrate_options *options,
                     struct session_waiter waiter);

/** session_cancel() - done when the session is cancelled, or refused with the reason. */
void session_cancel(struct daemon *daemon, const char *name, struct session_waiter waiter);

/** session_set_bandwidth() - limit the bulk connections of a session that has not ended, source
 * only; 0: no limit. Return: 0 or -errno with a sentence. */
int session_set_bandwidth(struct daemon *daemon, const char *name, uint64_t bits_s,
                          struct mf_error *err);

/** session_switch() - end precopy now. Return: 0, also when it has ended by itself, or -errno
 * (-ENOENT, -EINVAL: no source session in precopy or before). */
int session_switch(struct daemon *daemon, const char *name, struct mf_error *err);

/** session_forget() - drop an ended session. Return: 0 or -errno (-ENOENT, -EBUSY while it is not
 * ended). */
int session_forget(struct daemon *daemon, const char *name, struct mf_error *err);

/** session_waiter_drop() - the one who waited is gone (closed its connection): forget waiters with
 * @arg. */
void session_waiter_drop(struct daemon *daemon, void *arg);

struct session *session_find(struct daemon *daemon, const char *name);
struct session *session_first(struct daemon *daemon);
struct session *session_next(struct session *session);
const char *session_name(const struct session *session);
bool session_ended(const struct session *session); /**< done, failed or cancelled */
/** session_exit_code() - what `migrate` exits with given the session's present state: 0, 1 or 4. */
unsigned session_exit_code(const struct session *session);

/** session_describe() - fill a protobuf message. Strings point into the session: valid until the
 * event loop runs again. @faults is storage for out->faults. */
void session_describe(struct session *session, Memferry__Control__Session *out,
                      Memferry__Control__Faults *faults);

/* ---- main.c ---- */

struct event_base *daemon_base(struct daemon *daemon);
const struct config *daemon_config(struct daemon *daemon);
struct control *daemon_control(struct daemon *daemon);
