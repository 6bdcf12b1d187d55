/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The internal header of the adapter for any process: one object, and what its files do with it.
 *     process.c   the object, its phases, signals and commands; resuming; the table
 *     probe.c     what is to be migrated, before it begins and when the process stands still
 *     outgoing.c  source: pause, save
 *     incoming.c  destination: load
 */
#pragma once

#include <event2/event.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "daemon/memferryd/process/command.h"
#include "daemon/memferryd/process/guard.h"
#include "daemon/memferryd/process/relay.h"
#include "daemon/memferryd/vmm.h"
#include "lib/process.h"

/* A thread that is told to stop does so at once, unless it is in a system call that can't be left.
 */
#define PROCESS_STOP_MS 5000u

enum process_phase {
    PROCESS_PROBING,
    PROCESS_ARMING, /* stopped for a moment if need be, to be looked at and watched */
    PROCESS_READY,
    PROCESS_PAUSING, /* the pause command, or SIGSTOP, is under way */
    PROCESS_PAUSED,  /* told */
    PROCESS_SAVING,
    PROCESS_HOLDING, /* source: saved; until every thread is stopped */
    PROCESS_COMPLETED,
    PROCESS_RETURNING,
    PROCESS_QUITTING,
    PROCESS_LISTENING, /* destination: until the first byte of state */
    PROCESS_LOADING,
    PROCESS_HOLDING_LOADED,
    PROCESS_LOADED,
    PROCESS_RESUMING,
    PROCESS_RUNNING,
    PROCESS_FAILED,
};

struct vmm {
    struct event_base *base;
    struct vmm_callbacks callbacks;
    char name[64];
    enum vmm_role role;
    enum process_phase phase;
    pid_t pid;
    int pidfd;
    char *pause, *save, *load, *resume;
    unsigned timeout_ms;
    struct mf_choice *choices;
    unsigned choice_count;
    struct vmm_info info;
    struct mf_file *files;
    size_t file_count;

    unsigned users; /* event-loop handlers at work on this object */
    bool closed;    /* freed when users drops to 0; nothing is told any more */
    struct event *tick;

    struct command *command;
    struct relay *relay;
    struct guard *guard;
    struct event *state_event; /* destination: the state begins to arrive */
    int device_fd;             /* our duplicate, -1: none */
    bool paused;               /* source: something is to be undone to have it run */
    bool held;                 /* SIGSTOP was sent */
    bool command_ended, relay_ended;
    unsigned return_tries;
    uint64_t stop_deadline_ns, child_deadline_ns;
    unsigned stop_ms;
    uint64_t opened_ticks; /* mf_proc_ticks() */
    bool stand_still;

    char pid_text[32], session_text[96], role_text[32], word_text[32];
    const char *environment[5];
};

/* ---- process.c ---- */

/** process_hold() / process_release() - keep the object over callbacks that may close it. */
void process_hold(struct vmm *vmm);
void process_release(struct vmm *vmm);
/** process_tell() - as vmm_callbacks says; from event-loop handlers only. */
void process_tell(struct vmm *vmm, enum vmm_event event, const char *detail);
/** process_fail() - nothing of what was begun goes on, and VMM_FAILED is told. */
void process_fail(struct vmm *vmm, const struct mf_error *err);
/** process_again_in() - the event loop comes back to the phase (on_tick) after @ms. */
void process_again_in(struct vmm *vmm, unsigned ms);
/** process_stop() - enter @phase and stop every thread by SIGSTOP; @limit_ms: then it has failed.
 */
void process_stop(struct vmm *vmm, enum process_phase phase, unsigned limit_ms);
/** process_let_go() - SIGCONT, if it was stopped here. */
void process_let_go(struct vmm *vmm);
/** process_order() - of a command of this process's; its strings are the object's. */
struct command_order process_order(struct vmm *vmm, const char *word, const char *text);
/** process_command() - run one; its end comes to the phase. Descriptors are the caller's, -1: none.
 * Return: 0 or -errno with @err. */
int process_command(struct vmm *vmm, const char *word, const char *text, int stdin_fd,
                    int stdout_fd, struct mf_error *err);

/* ---- probe.c ---- */

/** process_probe() - look at the process; it may have to stand still, and be looked at again. */
void process_probe(struct vmm *vmm);
/** process_probe_still() - it stands still. */
void process_probe_still(struct vmm *vmm);
/** process_answer_probe() - answer the open. @why: refused, and the process goes on. */
void process_answer_probe(struct vmm *vmm, const struct mf_error *why);
/** process_end_standing_still() - let it go, and its @guard. */
void process_end_standing_still(struct vmm *vmm, struct guard *guard);
/** process_recheck() - is what stands still now what is being migrated? Return: 0 or -errno. */
int process_recheck(struct vmm *vmm, struct mf_error *err);

/* ---- outgoing.c ---- */

void process_begin_pause(struct vmm *vmm);
/** process_pause_done() - the pause command has ended, or every thread is stopped. */
void process_pause_done(struct vmm *vmm);
void process_begin_save(struct vmm *vmm);
/** process_saved() - the command or the relay of its output has ended. */
void process_saved(struct vmm *vmm);

/* ---- incoming.c ---- */

/** process_begin_listening() - until the first byte of state. */
void process_begin_listening(struct vmm *vmm);
/** process_loaded() - the command or the relay of its input has ended. */
void process_loaded(struct vmm *vmm);
