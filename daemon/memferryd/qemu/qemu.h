/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The QEMU adapter's internal header. What QEMU is told is written as tables of steps (a step: one
 * QMP command and what to make of its answer), one table a sequence; what QEMU tells by itself
 * arrives in qemu.c's event handler, which knows by the phase what it means.
 */
#pragma once

#include <event2/event.h>
#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "daemon/memferryd/qemu/qmp.h"
#include "daemon/memferryd/qemu/settings.h"
#include "daemon/memferryd/vmm.h"

/* ---- steps.c: running a table of steps ---- */

/** What a step's `done` says: go on, ask the same step again at once, ask again a little later
 * (until the table's patience ends), or a negative errno value with the error filled in. */
enum { STEP_NEXT, STEP_AGAIN, STEP_WAIT };

/** struct qemu_step - one command. A table ends with a zeroed step.
 * @command:   the QMP command
 * @what:      completes "QEMU of VM 'x' could not …"; also what is waited for when patience ends
 * @arguments: NULL: none. Return: false to skip the step; else *out may be set (reference given
 * away).
 * @done:      NULL: nothing to do with the answer. @value is NULL and @error set when QEMU answered
 * with an error, which happens only with @may_fail.
 * @may_fail:  an error answer does not end the table; without `done` it is ignored
 * @with_fd:   hand the device descriptor over with the command
 */
struct qemu_step {
    const char *command, *what;
    bool (*arguments)(struct vmm *vmm, json_t **out);
    int (*done)(struct vmm *vmm, json_t *value, const char *error, struct mf_error *err);
    bool may_fail, with_fd;
};

/** struct qemu_run - a table being worked on. */
struct qemu_run {
    const struct qemu_step *steps; /* NULL: none */
    size_t at;
    void (*ended)(struct vmm *vmm, const struct mf_error *err);
    uint64_t deadline_ns; /* when STEP_WAIT stops being granted */
    char last_error[256]; /* why it waits, in QEMU's words */
    bool waits;           /* between two askings (STEP_WAIT), else an answer is due */
    struct event *timer;
};

/** steps_run() - start @steps in place of whatever runs; its answers are forgotten. @ended is
 * called from the event loop with NULL or the reason; a table has at least one step that is never
 * skipped. */
void steps_run(struct vmm *vmm, const struct qemu_step *steps,
               void (*ended)(struct vmm *vmm, const struct mf_error *err));

/** steps_on_timer() - the libevent callback of run.timer. */
void steps_on_timer(evutil_socket_t fd, short what, void *arg);

/** steps_stop() - drop the table being worked on; what was sent was sent. */
void steps_stop(struct vmm *vmm);

/* ---- qemu.c: the object, its phases and what QEMU tells ---- */

enum qemu_phase {
    QEMU_PROBING,
    QEMU_READY,     /* passed preflight */
    QEMU_STARTING,  /* source: being configured */
    QEMU_MIGRATING, /* source: `migrate` is sent */
    QEMU_PAUSED,    /* source: in pre-switchover */
    QEMU_FINISHING, /* source: device state on its way */
    QEMU_COMPLETED,
    QEMU_RETURNING,
    QEMU_QUITTING,
    QEMU_LISTENING, /* destination: being configured, then waiting for the state */
    QEMU_LOADED,
    QEMU_RESUMING,
    QEMU_RUNNING,
    QEMU_FAILED, /* told; only return_guest, quit, close make sense */
    QEMU_DOWN,   /* the monitor is gone */
};

struct vmm {
    struct event_base *base;
    struct vmm_callbacks callbacks;
    char name[64];
    enum vmm_role role;
    enum qemu_phase phase;
    struct qmp *qmp;
    struct vmm_info info;
    struct qemu_run run;

    unsigned users; /* event-loop handlers at work on this object */
    bool closed;    /* freed when users drops to 0; nothing is told any more */

    struct event *later; /* tells `later_event` from the event loop */
    enum vmm_event later_event;
    char later_text[1024];

    /* probe.c */
    json_t *probe; /* object: the replies by name */
    size_t probe_at;

    /* outgoing.c, incoming.c */
    int device_fd; /* our duplicate until QEMU has it, else -1 */
    struct qemu_change capabilities, parameters;
    bool stopped_told;
    bool must_continue; /* return_guest: the guest stands still and shall run */
    bool migrate_sent, finish_sent;
    uint64_t return_since_ns;
    unsigned cancel_waits; /* how often a cancelled migration was found still ending */
    unsigned downtime_ms;
    struct event *pace; /* raises the downtime limit; guards quit */
};

/** vmm_tell() - tell an event, now; only from event-loop handlers. @detail as vmm_callbacks says.
 */
void vmm_tell(struct vmm *vmm, enum vmm_event event, const char *detail);

/** vmm_tell_later() - the same from inside a function of the table. @fmt: the sentence of
 * VMM_FAILED, else NULL. */
__attribute__((format(printf, 3, 4))) void vmm_tell_later(struct vmm *vmm, enum vmm_event event,
                                                          const char *fmt, ...);

/** vmm_fail() - enter QEMU_FAILED and tell VMM_FAILED with @err's sentence. Event-loop handlers
 * only. */
void vmm_fail(struct vmm *vmm, const struct mf_error *err);

/** vmm_hold() / vmm_release() - keep the object over callbacks that may close it. */
void vmm_hold(struct vmm *vmm);
void vmm_release(struct vmm *vmm);

/** vmm_arm() - (re)start a timer. */
void vmm_arm(struct event *timer, unsigned delay_ms);

/* ---- probe.c: preflight's questions ---- */

void probe_start(struct vmm *vmm);

/* ---- common.c: steps that both roles use ---- */

/** vmm_take_fd() - keep a duplicate of @fd for the steps; tells VMM_FAILED later if that fails. */
bool vmm_take_fd(struct vmm *vmm, int fd);
void vmm_drop_fd(struct vmm *vmm);

int common_keep_capabilities(struct vmm *vmm, json_t *value, const char *error,
                             struct mf_error *err);
int common_keep_parameters(struct vmm *vmm, json_t *value, const char *error, struct mf_error *err);
bool common_apply_capabilities(struct vmm *vmm, json_t **out);
bool common_apply_parameters(struct vmm *vmm, json_t **out);
bool common_fd_name(struct vmm *vmm, json_t **out);
/** common_flat_nodes() - arguments of query-named-block-nodes: without each node's backing chain.
 */
bool common_flat_nodes(struct vmm *vmm, json_t **out);
/** common_until_accepted() - `done` of a step with may_fail: waits while QEMU refuses. For `cont`:
 * a peer that is just ending may still hold the disks' locks. */
int common_until_accepted(struct vmm *vmm, json_t *value, const char *error, struct mf_error *err);

#define QEMU_FD_NAME "memferry-device"

/** common_failed() - QEMU reported a failed migration: ask why, then vmm_fail. */
void common_failed(struct vmm *vmm);

/* ---- outgoing.c and incoming.c: the table's functions, and what QEMU's events mean to them ----
 */

void outgoing_start(struct vmm *vmm, int device_fd);
void outgoing_finish(struct vmm *vmm);
void outgoing_return(struct vmm *vmm);
void outgoing_quit(struct vmm *vmm);
void outgoing_migration_event(struct vmm *vmm, const char *status);
void outgoing_run_event(struct vmm *vmm, bool running);
void outgoing_pace(struct vmm *vmm);

void incoming_start(struct vmm *vmm, int device_fd);
void incoming_resume(struct vmm *vmm, bool run);
void incoming_migration_event(struct vmm *vmm, const char *status);
void incoming_run_event(struct vmm *vmm, bool running);
