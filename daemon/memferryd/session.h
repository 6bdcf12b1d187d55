/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A session's inside, for the files that make it work:
 *   session.c       the list of sessions, what the control socket asks, what users see
 *   step.c          the state machine's events in, its actions out
 *   target.c        the target process: discovery, its end
 *   arm.c           what is done to it, in threads (work.h): arming, watching, letting go
 *   supervisor.c    the mover process and its messages
 *   connector.c     source: connections to the peer
 *   listener.c      destination: connections from the peer
 *   linger.c        destination: what a userfaultfd says after the session
 */
#pragma once

#include <event2/dns.h>
#include <event2/event.h>
#include <stdbool.h>
#include <stdint.h>

#include "daemon/memferryd/daemon.h"
#include "daemon/memferryd/keeper.h"
#include "daemon/memferryd/vmm.h"
#include "lib/ipc.h"
#include "lib/machine.h"
#include "lib/rounds.h"
#include "lib/session_file.h"
#include "lib/target.h"
#include "lib/util.h"

struct mover_process;
struct target_job;
struct connector;
struct listener;

/** struct figures - a copy of what the session file says, kept after it is gone. */
struct figures {
    uint64_t dirty_pages, round_left_pages;
    uint64_t wire_bytes, data_pages, zero_pages, hole_pages, missing_pages, faults_asked;
    struct mf_quantiles faults;
};

/** struct waiting - one who waits for a session to start or to be cancelled. */
struct waiting {
    struct waiting *next;
    struct session_waiter waiter;
};

struct session {
    struct session *next;
    struct daemon *daemon;

    char name[MF_NAME_MAX + 1];
    uint8_t id[MF_SESSION_ID_BYTES];
    char id_text[2 * MF_SESSION_ID_BYTES + 1];
    enum mf_role role;
    enum mf_state state;
    bool starting; /**< probing and arming: not yet in `state`, shown as waiting or connecting */
    bool released; /**< RELEASE was given or taken; stays true when the session has ended */
    bool rejected; /**< being taken down before it began: nobody sees it any more */
    char reason[896];
    char peer[300]; /**< "HOST:PORT" */
    char host[256];
    uint16_t port;
    unsigned streams;
    bool keep_source;
    bool guest_was_running; /**< before the migration: then it shall run after it */

    /* The VMM and the target process. */
    const struct vmm_ops *vmm_ops;
    struct vmm *vmm;
    unsigned state_s;   /**< vmm_info's: how long the device state may take */
    int device_peer_fd; /**< destination: the mover's end of the device stream, until it is loaded
                         */
    pid_t pid;
    int pidfd;
    struct event *pidfd_event;
    int maps_fd; /**< /proc/PID/maps as it was opened: empty once that memory is gone */
    struct event *exec_event; /**< looks from time to time: nothing tells of an execve(2) */
    bool target_exited;
    unsigned exec_seen; /**< so often its memory was seen to be gone while it lived */
    struct mf_region_source region[MF_REGIONS_MAX];
    unsigned region_count;
    uint64_t ram_bytes, total_pages;
    int pagemap_fd;             /**< source: -1 if writes are not tracked */
    int populated_fd;           /**< source with private memory: /proc/PID/pagemap, else -1 */
    int layout_fd;              /**< destination with private memory: lib/layout_file.h, else -1 */
    struct event *events_event; /**< source: on `uffd` while there is no mover to read it */
    int uffd;                   /**< our duplicate; -1 at a source that does not track writes */
    int remote_uffd;            /**< its number inside the target (I2), -1: none */
    struct keeper children;     /**< destination: of the target's, between two movers */
    bool dontneed_discards;     /**< as in MF_IPC_SETUP */
    struct target_job *job;     /**< arm.c, NULL: none is under way */

    /* The mover and the session file. */
    int file_fd;
    struct mf_session_view view;
    struct figures figures;
    struct mover_process *mover;
    unsigned mover_restarts;
    uint64_t mover_started_ns;
    struct event *mover_timer;
    struct event *vm_timer; /**< a VM, here or there, was told something and has not done it */

    /* Precopy, source. */
    struct mf_rounds rounds;
    bool round_in_doubt;  /**< after the last round the copies were (lib/copies.h) */
    unsigned round_begun; /**< number of the last round that was begun */
    unsigned switch_after_s;
    struct event *switch_timer;
    uint64_t bandwidth_bits_s;
    uint64_t precopy_bytes;          /**< wire_bytes at RELEASE */
    uint64_t unconfirmed_at_release; /**< pages */
    char mode_note[896];             /**< why the mode is not what was asked for */
    char memory_note[400];           /**< said where there is no other reason: vmm_info.set_aside */

    /* The link. */
    uint32_t link;  /**< number of the present or last one */
    bool link_open; /**< handed to the mover, not yet lost */
    struct connector *connector;
    struct event *reconnect_timer;
    unsigned reconnect_tries;
    bool confirmed_all;      /**< destination: said by the mover, maybe before the guest runs */
    bool released_at_source; /**< destination: the last hello said so */

    /* Times, CLOCK_MONOTONIC; 0: not yet. */
    uint64_t started_ns, ended_ns, stopped_ns;
    uint64_t blackout_us;

    struct waiting *start_waiters, *cancel_waiters;
};

/* ---- session.c ---- */

/** session_changed() - tell watchers. */
void session_changed(struct session *session);
/** session_set_reason() - keep the sentence that explains the state. */
void session_set_reason(struct session *session, const char *fmt, ...)
    __attribute__((format(printf, 2, 3)));
/** session_prepared() - the target is armed, watched or looked at; @why: it can't be. */
void session_prepared(struct session *session, const struct mf_error *why);
/** session_started() - preflight and arming succeeded: whoever waits is told. */
void session_started(struct session *session);
/** session_reject() - preflight or arming failed with `reason`: whoever waits is told, the session
 * goes. */
void session_reject(struct session *session, const char *fmt, ...)
    __attribute__((format(printf, 2, 3)));
/** session_tell_cancelled() - answer those who asked to cancel. NULL: it worked. */
void session_tell_cancelled(struct session *session, const char *error);
/** session_read_figures() - from the session file into `figures`. */
void session_read_figures(struct session *session);
/** session_of_pid() - the session other than @except that has this process and has not ended; NULL:
 * none. */
const struct session *session_of_pid(struct daemon *daemon, pid_t pid,
                                     const struct session *except);
/** session_set_id() - as bytes and as text. */
void session_set_id(struct session *session, const uint8_t id[MF_SESSION_ID_BYTES]);
const struct vmm_ops *session_vmm_ops(const struct session *session);
/** session_noun() - what messages call the target: "VM" or "process". */
const char *session_noun(const struct session *session);
/** sessions_stop() - SIGTERM: cancel what can be cancelled. Return: how many sessions must go on.
 */
unsigned sessions_stop(struct daemon *daemon);
/** sessions_drop() - give up everything that is left (the daemon ends). */
void sessions_drop(struct daemon *daemon);

/* ---- step.c ---- */

/** session_event() - feed the state machine and carry out what it says. */
void session_event(struct session *session, enum mf_event event);
/** session_on_vmm() - the adapter's callback. */
void session_on_vmm(void *arg, enum vmm_event event, const char *detail);
/** session_end() - give everything back; the session stays to be looked at. */
void session_end(struct session *session);
/** session_send() - have the mover send a phase change. */
void session_send(struct session *session, uint32_t phase);

/* ---- precopy.c ---- */

/** precopy_setup() - source, after target_find: begin to track, or change the mode and say so.
 * session_prepared() follows, with the reason if the mode that was asked for can't be had. */
void precopy_setup(struct session *session, const struct vmm_info *info);
/** precopy_send_settings() - give the mover what an operator has set: a new one knows nothing of
 * it. */
void precopy_send_settings(struct session *session);
/** precopy_begin() - the destination is ready: first round, or MF_EV_COPIED at once in mode
 * postcopy. */
void precopy_begin(struct session *session);
void precopy_round_done(struct session *session, unsigned round, uint64_t pages,
                        uint64_t duration_ns, uint64_t dirty_pages);
/** precopy_switch() - an operator's word or the time: end precopy now. */
void precopy_switch(struct session *session);
/** precopy_look_again() - source, the guest is paused: are the copies worth anything? If not,
 * precopy becomes hybrid: all is sent after RELEASE. */
void precopy_look_again(struct session *session);
/** precopy_confirm() - the guest is paused: MF_EV_PEER_CONFIRMED follows when RELEASE may be
 * prepared. */
void precopy_confirm(struct session *session);
/** precopy_counted() - mode precopy, the guest is paused: so much would have to be sent while it
 * is.
 */
void precopy_counted(struct session *session, uint64_t dirty_pages);

/* ---- target.c ---- */

/** target_refuse_taken() - two sessions of one process would run it on two hosts (I6). Return: 0 or
 * -EBUSY with a sentence that names the other. */
int target_refuse_taken(const struct session *session, struct mf_error *err);
/** target_find() - from what the VMM said to regions. Return: 0 or -errno with the sentence of the
 * refusal. */
int target_find(struct session *session, const struct vmm_info *info, struct mf_error *err);
/** target_memory_gone() - has the memory that the session began with gone, by execve(2) or the
 * process's end? */
bool target_memory_gone(const struct session *session);
/** target_mind_events() - source: read what the target's userfaultfd says, since there is no mover
 * that does (@mind), or stop doing so. The target waits for it in its system call. */
void target_mind_events(struct session *session, bool mind);
/** target_room() - can the destination take @needed_bytes more? Return: 0 or -ENOSPC with a
 * sentence. */
int target_room(struct session *session, uint64_t needed_bytes, struct mf_error *err);
/** target_let_go() - close the userfaultfd inside the target and here, and the RAM files. */
void target_let_go(struct session *session);

/* ---- arm.c: a session has one of these under way at most ---- */

/** target_then - what follows, called once from the event loop, if the session has not ended by
 * then. @why: what went wrong, else NULL. Where nothing can be begun it is called at once. */
typedef void (*target_then)(struct session *session, const struct mf_error *why);

/** target_arm() - destination: make its userfaultfd and register all of its memory (I3). */
void target_arm(struct session *session, target_then then);
/** target_track() - source: watch the target's memory for writes. */
void target_track(struct session *session, target_then then);
/** target_refuse_served() - source: mf_refuse_served(), which takes as long as looking at every
 * page. */
void target_refuse_served(struct session *session, target_then then);
/** target_job_abandon() - the session ends: what is under way is undone when it is done. */
void target_job_abandon(struct session *session);
/** target_mappings() - the target's present mappings of the regions, in an array to be freed.
 * Return: how many, or -errno. */
int target_mappings(const struct session *session, struct mf_mapping **out, struct mf_error *err);
/** target_stop_watching() - close the userfaultfd here and, a moment later, inside the target; and
 * the pagemap. */
void target_stop_watching(struct session *session);

/* ---- linger.c ---- */

/** linger() - read what a destination's userfaultfd has still to say, then close it. Takes @uffd
 * over; nothing is registered with it any more. */
void linger(struct daemon *daemon, int uffd);
void lingers_drop(void);
/** drop_events() - read all that a userfaultfd says, so that nobody waits for it, and do nothing
 * with it: nothing is missing, so a child that was forked needs no userfaultfd. */
void drop_events(int uffd);

/* ---- supervisor.c ---- */

/** mover_start() - start a mover and hand it everything; session_on_mover_ready follows. */
int mover_start(struct session *session, struct mf_error *err);
/** mover_order() - send a message, with @fd or -1 (kept by the caller). */
void mover_order(struct session *session, const struct mf_ipc *message, int fd);
/** mover_stop() - close its socket; it leaves by itself and is reaped. */
void mover_stop(struct session *session);
bool mover_is_ready(const struct session *session);
/** mover_step_behind() / mover_step_beside() - its bulk threads behind the guest's vCPUs, while
 * that does not wait for them, and back. (A mover, which has no privileges, could not come back
 * itself.)
 */
void mover_step_behind(const struct session *session);
void mover_step_beside(const struct session *session);

/** session_remembered() - has this destination had a session with this @id that has ended and is
 * gone? @done: whether it ended with all memory here. Of the last 256. */
bool session_remembered(const uint8_t id[MF_SESSION_ID_BYTES], bool *done);

/* What the supervisor calls, in step.c. */
void session_on_mover_ready(struct session *session);
void session_on_mover_message(struct session *session, const struct mf_ipc *message);
void session_on_mover_exit(struct session *session, const char *how);

/* ---- connector.c ---- */

/** connector_start() - make a new link to the peer; LINK and its connections go to the mover, or
 *  MF_EV_LINK_LOST comes. */
void connector_start(struct session *session);
void connector_stop(struct session *session);
/** connector_abandon() - tell the destination by a connection of its own that the source gave up
 * before RELEASE: what was said over the link may have been lost with it. First tried @after_s
 * seconds from now, then for half a minute, whatever becomes of the session. */
void connector_abandon(struct session *session, unsigned after_s);
/** connectors_abandoning() - how many of these are under way. */
unsigned connectors_abandoning(void);
void connectors_drop(struct daemon *daemon);

/** peer_socket_options() - what every connection between two hosts gets: no delay, and an end
 * within seconds when the other host is gone without a word. */
void peer_socket_options(int fd);

/* ---- listener.c ---- */

int listener_open(struct daemon *daemon, struct listener **out, struct mf_error *err);
void listener_close(struct listener *listener);

/* ---- main.c ---- */

struct session **daemon_sessions(struct daemon *daemon);
struct evdns_base *daemon_dns(struct daemon *daemon);
