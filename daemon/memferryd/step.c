/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What happens to a session: events from the VMM, the mover, the peer and the operator go into the
 * state machine (lib/machine.h); its actions are carried out here.
 */
#include "daemon/memferryd/session.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "lib/log.h"
#include "lib/util.h"
#include "peer.pb-c.h"

#define RECONNECT_FIRST_MS 100u
#define RECONNECT_MOST_MS 1000u
#define QUIT_TIMEOUT_S 20
/* Before RELEASE nothing may take for ever: the guest is worth more than the attempt. */
#define READY_TIMEOUT_S 30      /**< from the start to the destination's VM listening */
#define SWITCHOVER_TIMEOUT_S 10 /**< from the guest's pause to RELEASE */
#define START_AGAIN_S 2
#define ABANDON_AGAIN_S 1

void session_send(struct session *session, uint32_t phase)
{
    mover_order(session,
                &(struct mf_ipc){.type = MF_IPC_SEND,
                                 .phase = phase,
                                 .link_number = session->link,
                                 .blackout_us = phase == MEMFERRY__PEER__PHASE__PHASE_DRAINED_ACK
                                                    ? session->blackout_us
                                                    : 0},
                -1);
}

static void tell_peer_abort(struct session *session)
{
    struct mf_ipc message = {.type = MF_IPC_SEND_ABORT};
    message.cancelled = session->state == MF_CANCELLED || session->state == MF_S_CANCELLING;
    snprintf(message.text, sizeof(message.text), "%s",
             session->reason[0] ? session->reason : "cancelled by an operator here");
    bool told = session->link_open && mover_is_ready(session);
    mover_order(session, &message, -1);
    mover_order(session, &(struct mf_ipc){.type = MF_IPC_UNLINK}, -1);
    session->link_open = false;
    /* A destination that has loaded the device state waits for a word, for ever. Without a link it
     * gets one so; what was said over a link may be lost with it, so it is said again: by then it
     * is usually known. */
    if (session->role == MF_SOURCE && session->link && !session->released)
        connector_abandon(session, told ? ABANDON_AGAIN_S : 0);
}

static void close_device_peer(struct session *session)
{
    if (session->device_peer_fd >= 0)
        close(session->device_peer_fd);
    session->device_peer_fd = -1;
}

/* Hand the VMM one end of a socket pair and the mover the other. */
static void hand_over_device(struct session *session)
{
    int pair[2];
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) != 0) {
        session_set_reason(session, "cannot make a socket for the device state of %s: %s",
                           session->name, strerror(errno));
        session_event(session, MF_EV_VMM_FAILED);
        return;
    }
    mover_order(session, &(struct mf_ipc){.type = MF_IPC_DEVICE}, pair[1]);
    if (session->role == MF_SOURCE)
        session_vmm_ops(session)->start_outgoing(session->vmm, pair[0]);
    else
        session_vmm_ops(session)->start_incoming(session->vmm, pair[0]);
    close(pair[0]);
    /* A destination's mover that dies must not look like the end of the state: the stream ends when
     * the mover says so, or with the session. */
    if (session->role == MF_DESTINATION) {
        close_device_peer(session);
        session->device_peer_fd = pair[1];
    } else {
        close(pair[1]);
    }
}

static void on_looked(struct session *session, const struct mf_error *why)
{
    if (session->state != MF_S_PAUSING)
        return; /* it is being returned */
    if (!why) {
        hand_over_device(session);
        return;
    }
    session_set_reason(session, "%s", why->text);
    session_event(session, MF_EV_VMM_FAILED);
}

/* A program may have come to serve faults of its own since it was looked at; not while it is
 * paused, since smaps takes its time. */
static void start_vmm(struct session *session)
{
    if (session->role == MF_SOURCE && session_vmm_ops(session) == &vmm_process)
        target_refuse_served(session, on_looked);
    else
        hand_over_device(session);
}

static void reconnect_now(evutil_socket_t fd, short what, void *arg)
{
    struct session *session = arg;
    (void)fd;
    (void)what;
    if (session->state == MF_S_RECOVERING && mover_is_ready(session))
        connector_start(session);
    /* Without a mover: when it is ready (session_on_mover_ready). */
}

static void reconnect(struct session *session)
{
    connector_stop(session);
    unsigned ms = RECONNECT_FIRST_MS
                  << (session->reconnect_tries < 4 ? session->reconnect_tries : 4);
    if (ms > RECONNECT_MOST_MS)
        ms = RECONNECT_MOST_MS;
    session->reconnect_tries++;
    const struct timeval wait = {ms / 1000, (suseconds_t)(ms % 1000) * 1000};
    if (!session->reconnect_timer)
        session->reconnect_timer =
            evtimer_new(daemon_base(session->daemon), reconnect_now, session);
    if (session->reconnect_timer)
        evtimer_add(session->reconnect_timer, &wait);
}

static void on_vm_timer(evutil_socket_t fd, short what, void *arg)
{
    struct session *session = arg;
    (void)fd;
    (void)what;
    if (session->state == MF_S_CONNECTING) {
        session_set_reason(session, "the destination's %s did not get ready within %d s",
                           session_noun(session), READY_TIMEOUT_S);
        session_event(session, MF_EV_VMM_FAILED);
        return;
    }
    if (session->role == MF_SOURCE && !session->released) {
        session_set_reason(session, "the destination did not take over within %u s",
                           SWITCHOVER_TIMEOUT_S + session->state_s);
        session_event(session, MF_EV_VMM_FAILED);
        return;
    }
    if (session->role == MF_DESTINATION) {
        if (session->state == MF_D_STARTING || session->state == MF_D_STARTING_LOST)
            session_vmm_ops(session)->resume(session->vmm, session->guest_was_running);
        return;
    }
    if (!session->target_exited && !session->keep_source)
        mf_log(MF_LOG_WARNING, "%s: the %s (pid %d) was told to quit and has not; end it by hand",
               session->name, session_noun(session), (int)session->pid);
    session_event(session, MF_EV_VMM_GONE);
}

/* What comes of the VM when nothing else says so. */
static void arm_vm_timer(struct session *session, unsigned after_s)
{
    if (!session->vm_timer)
        session->vm_timer = evtimer_new(daemon_base(session->daemon), on_vm_timer, session);
    if (session->vm_timer)
        evtimer_add(session->vm_timer, &(struct timeval){.tv_sec = after_s});
}

static void disarm_vm_timer(struct session *session)
{
    if (session->vm_timer)
        evtimer_del(session->vm_timer);
}

/* Source: the destination has everything. */
static void finish(struct session *session)
{
    session_send(session, MEMFERRY__PEER__PHASE__PHASE_DRAINED_ACK);
    connector_stop(session);
    if (session->target_exited || session->keep_source) {
        arm_vm_timer(session, 0);
        return;
    }
    arm_vm_timer(session, QUIT_TIMEOUT_S);
    session_vmm_ops(session)->quit(session->vmm);
}

void session_end(struct session *session)
{
    session_read_figures(session);
    if (!session->ended_ns)
        session->ended_ns = mf_now_ns();
    connector_stop(session);
    if (session->reconnect_timer)
        event_free(session->reconnect_timer);
    session->reconnect_timer = NULL;
    if (session->mover_timer)
        event_free(session->mover_timer);
    session->mover_timer = NULL;
    if (session->switch_timer)
        event_free(session->switch_timer);
    session->switch_timer = NULL;
    if (session->vm_timer)
        event_free(session->vm_timer);
    session->vm_timer = NULL;
    mover_stop(session);
    session->link_open = false;
    if (session->vmm)
        session_vmm_ops(session)->close(session->vmm);
    session->vmm = NULL;
    close_device_peer(session);
    target_let_go(session);
    mf_session_file_unmap(&session->view);
    if (session->file_fd >= 0)
        close(session->file_fd);
    session->file_fd = -1;
}

static const char *why_not_cancel(const struct session *session)
{
    if (session->role == MF_SOURCE)
        return "its guest has been released to the destination and goes on there";
    if (session->state == MF_D_SWITCHOVER || session->state == MF_D_HELD)
        return "the device state is loaded and the source may have released the guest already: "
               "cancel at the source; if the guest runs there, end the VM here";
    return "the guest runs here";
}

static void carry_out(struct session *session, enum mf_action action, enum mf_event event)
{
    char error[512];
    switch (action) {
    case MF_ACT_NONE:
        break;
    case MF_ACT_REFUSE:
        snprintf(error, sizeof(error), "%s cannot be cancelled any more: %s", session->name,
                 why_not_cancel(session));
        session_tell_cancelled(session, error);
        break;
    case MF_ACT_VIOLATION:
        mf_log(MF_LOG_WARNING, "%s: the peer said \"%s\" in state %s; dropping the link",
               session->name, mf_event_name(event), mf_state_name(session->state));
        session_set_reason(session, "the peer at %s broke the protocol", session->peer);
        mover_order(session, &(struct mf_ipc){.type = MF_IPC_UNLINK}, -1);
        session->link_open = false;
        session_event(session, MF_EV_LINK_LOST);
        break;
    case MF_ACT_START_ROUNDS:
        disarm_vm_timer(session);
        precopy_begin(session);
        break;
    case MF_ACT_CONFIRM:
        arm_vm_timer(session, SWITCHOVER_TIMEOUT_S +
                                  10 * (unsigned)(session->rounds.max_blackout_ns / 1000000000u));
        precopy_confirm(session);
        break;
    case MF_ACT_SEND_CONFIRMED:
        session_send(session, MEMFERRY__PEER__PHASE__PHASE_CONFIRMED);
        break;
    case MF_ACT_START_VMM:
        start_vmm(session);
        break;
    case MF_ACT_FINISH_VMM:
        arm_vm_timer(session, SWITCHOVER_TIMEOUT_S + session->state_s);
        session_vmm_ops(session)->finish_outgoing(session->vmm);
        break;
    case MF_ACT_RELEASE:
        /* Noted before it is sent: from here on this host never runs the guest again (I6). */
        session->released = true;
        if (session_vmm_ops(session)->released)
            session_vmm_ops(session)->released(session->vmm);
        session_send(session, MEMFERRY__PEER__PHASE__PHASE_RELEASE);
        mover_step_beside(session);
        disarm_vm_timer(session);
        session_read_figures(session);
        session->precopy_bytes = session->figures.wire_bytes;
        session->unconfirmed_at_release = session->figures.missing_pages;
        break;
    case MF_ACT_RECONNECT:
        reconnect(session);
        break;
    case MF_ACT_FINISH:
        finish(session);
        break;
    case MF_ACT_RETURN_GUEST:
        disarm_vm_timer(session);
        tell_peer_abort(session);
        session_vmm_ops(session)->return_guest(session->vmm);
        break;
    case MF_ACT_SEND_READY:
        session_send(session, MEMFERRY__PEER__PHASE__PHASE_READY);
        break;
    case MF_ACT_SEND_LOADED:
        close_device_peer(session);
        session_send(session, MEMFERRY__PEER__PHASE__PHASE_LOADED);
        break;
    case MF_ACT_START_GUEST:
        session->released = true;
        session_vmm_ops(session)->resume(session->vmm, session->guest_was_running);
        mover_step_beside(session);
        break;
    case MF_ACT_START_AGAIN:
        mf_log(MF_LOG_ERR, "%s: the guest does not start: %s; trying again", session->name,
               session->reason);
        arm_vm_timer(session, START_AGAIN_S);
        break;
    case MF_ACT_SEND_RUNNING:
        session_send(session, MEMFERRY__PEER__PHASE__PHASE_RUNNING);
        break;
    case MF_ACT_SEND_DRAINED:
        session_send(session, MEMFERRY__PEER__PHASE__PHASE_DRAINED);
        break;
    case MF_ACT_END_TELL:
        tell_peer_abort(session);
        session_end(session);
        break;
    case MF_ACT_END:
        session_end(session);
        break;
    }
}

void session_event(struct session *session, enum mf_event event)
{
    const enum mf_state was = session->state;
    const struct mf_step step = mf_machine_step(was, event);
    if (session->rejected)
        return;
    session->state = step.next;
    if (was != step.next || step.action != MF_ACT_NONE)
        mf_log(MF_LOG_DEBUG, "%s: %s, in %s, now %s", session->name, mf_event_name(event),
               mf_state_name(was), mf_state_name(step.next));
    carry_out(session, step.action, event);
    if (session->state != step.next)
        return; /* carrying it out led further; all was said there */
    if (mf_state_ended(session->state) && !mf_state_ended(was)) {
        if (session->state == MF_DONE)
            session_set_reason(session, "%s", session->mode_note);
        mf_log(session->state == MF_FAILED ? MF_LOG_WARNING : MF_LOG_NOTICE, "%s: %s%s%s",
               session->name, mf_state_name(session->state), session->reason[0] ? ": " : "",
               session->reason);
        session_tell_cancelled(session, session->state == MF_CANCELLED
                                            ? NULL
                                            : "the session ended before it was cancelled");
    }
    if (session->state != was)
        session_changed(session);
    /* The last page may have arrived before the guest was known to run. */
    if (session->state != was && session->confirmed_all &&
        (session->state == MF_D_POSTCOPY || session->state == MF_D_RECOVERING))
        session_event(session, MF_EV_CONFIRMED_ALL);
}

/* ---- the VMM ---- */

/* What was saved, or loaded, is of no use without the memory it belongs to; that it is there is
 * looked at from time to time only, and from here on this state would be relied on. */
static void with_its_memory(struct session *session, enum mf_event event)
{
    if (!session->target_exited && target_memory_gone(session)) {
        session->target_exited = true;
        session_set_reason(session,
                           "the %s of %s (pid %d) ended or became another program (execve) on this "
                           "host: its memory is gone",
                           session_noun(session), session->name, (int)session->pid);
        event = MF_EV_TARGET_EXITED;
    }
    session_event(session, event);
}

void session_on_vmm(void *arg, enum vmm_event event, const char *detail)
{
    struct session *session = arg;
    switch (event) {
    case VMM_STOPPED:
        session->stopped_ns = mf_now_ns();
        break;
    case VMM_PAUSED:
        if (!session->stopped_ns)
            session->stopped_ns = mf_now_ns();
        precopy_look_again(session);
        session_event(session, MF_EV_VMM_PAUSED);
        break;
    case VMM_COMPLETED:
        with_its_memory(session, MF_EV_VMM_COMPLETED);
        break;
    case VMM_RETURNED:
        session_event(session, MF_EV_VMM_RETURNED);
        break;
    case VMM_GONE:
        /* Its process ends a moment later, which the pidfd tells. */
        break;
    case VMM_INCOMING:
        session_event(session, MF_EV_VMM_INCOMING);
        break;
    case VMM_LOADED:
        with_its_memory(session, MF_EV_VMM_LOADED);
        break;
    case VMM_RUNNING:
        session_event(session, MF_EV_VMM_RUNNING);
        break;
    case VMM_FAILED:
        if (session->starting) {
            session_reject(session, "%s", detail);
            break;
        }
        /* The first reason is the one that explains the others. */
        if (!session->reason[0] || session->state == MF_S_FAILING ||
            session->state == MF_S_CANCELLING || session->released)
            session_set_reason(session, "%s", detail);
        session_event(session, MF_EV_VMM_FAILED);
        break;
    }
}

/* ---- the mover and, through it, the peer ---- */

void session_on_mover_ready(struct session *session)
{
    if (session->role == MF_SOURCE)
        precopy_send_settings(session);
    if (session->starting) {
        session_started(session);
        if (session->role == MF_SOURCE) {
            arm_vm_timer(session, READY_TIMEOUT_S);
            connector_start(session);
        }
        return;
    }
    if (session->state == MF_S_RECOVERING && !session->connector)
        connector_start(session);
}

static void on_peer_hello(struct session *session, const struct mf_ipc *message)
{
    struct mf_ipc answer = {.type = MF_IPC_PROCEED};
    struct mf_error err;
    if (session->state == MF_D_WAITING &&
        target_room(session, message->hello.allocated_bytes, &err) < 0)
        snprintf(answer.text, sizeof(answer.text), "%s", err.text);
    if (!answer.text[0] && session->state == MF_D_WAITING)
        session->guest_was_running = message->hello.guest_running;
    mover_order(session, &answer, -1);
    if (answer.text[0])
        session_set_reason(session, "refused the source: %s", answer.text);
}

static void on_peer_phase(struct session *session, const struct mf_ipc *message)
{
    enum mf_event event;
    switch ((Memferry__Peer__Phase)message->phase) {
    case MEMFERRY__PEER__PHASE__PHASE_READY:
        event = MF_EV_PEER_READY;
        break;
    case MEMFERRY__PEER__PHASE__PHASE_CONFIRMED:
        event = MF_EV_PEER_CONFIRMED;
        break;
    case MEMFERRY__PEER__PHASE__PHASE_LOADED:
        event = MF_EV_PEER_LOADED;
        break;
    case MEMFERRY__PEER__PHASE__PHASE_RELEASE:
        event = MF_EV_PEER_RELEASE;
        break;
    case MEMFERRY__PEER__PHASE__PHASE_RUNNING:
        event = MF_EV_PEER_RUNNING;
        if (session->stopped_ns && !session->blackout_us)
            session->blackout_us = (mf_now_ns() - session->stopped_ns) / 1000u;
        break;
    case MEMFERRY__PEER__PHASE__PHASE_DRAINED_ACK:
        event = MF_EV_PEER_DRAINED_ACK;
        session->blackout_us = message->blackout_us;
        break;
    default:
        mf_log(MF_LOG_WARNING, "%s: the peer sent an unknown phase %u", session->name,
               message->phase);
        return;
    }
    session_event(session, event);
}

/* What made the peer close the link was said before, and explains more than that it did. */
static bool is_explained(const struct session *session)
{
    return session_ended(session) || session->state == MF_S_FAILING ||
           session->state == MF_S_CANCELLING ||
           (session->state == MF_D_WAITING && session->reason[0]);
}

void session_on_mover_message(struct session *session, const struct mf_ipc *message)
{
    if (message->type != MF_IPC_CONFIRMED_ALL && message->link_number != session->link)
        return; /* about a link that has been replaced */
    switch ((enum mf_ipc_type)message->type) {
    case MF_IPC_PEER_HELLO:
        on_peer_hello(session, message);
        /* RELEASE may have been lost with an earlier link; the greeting repeats it, and takes its
         * place behind LINK_UP. */
        session->released_at_source = message->hello.released;
        break;
    case MF_IPC_LINK_UP:
        session->reconnect_tries = 0;
        if (session->reconnect_timer)
            evtimer_del(session->reconnect_timer);
        session_set_reason(session, "%s", session->mode_note);
        session_event(session, MF_EV_LINK_UP);
        if (session->role == MF_DESTINATION && session->state == MF_D_PRECOPY)
            mover_step_behind(session);
        if (session->role == MF_DESTINATION && session->released_at_source)
            session_event(session, MF_EV_PEER_RELEASE);
        break;
    case MF_IPC_LINK_LOST:
        session->link_open = false;
        if (!is_explained(session))
            session_set_reason(session, "the link to %s was lost: %s", session->peer,
                               message->text);
        session_event(session, MF_EV_LINK_LOST);
        break;
    case MF_IPC_PEER_PHASE:
        on_peer_phase(session, message);
        break;
    case MF_IPC_PEER_DRAINED:
        session->figures.faults = (struct mf_quantiles){
            .count = message->drained.count,
            .p50_ns = message->drained.p50_ns,
            .p99_ns = message->drained.p99_ns,
            .p999_ns = message->drained.p999_ns,
            .max_ns = message->drained.max_ns,
        };
        session_event(session, MF_EV_PEER_DRAINED);
        break;
    case MF_IPC_PEER_ABORT:
        /* Its "here" is not ours. */
        session_set_reason(session, "the memferryd at %s says: %s", session->peer, message->text);
        session_event(session, message->cancelled ? MF_EV_PEER_CANCELLED : MF_EV_PEER_FAILED);
        break;
    case MF_IPC_ROUND_DONE:
        precopy_round_done(session, message->round.round, message->round.copied_pages,
                           message->round.duration_ns, message->round.dirty_pages);
        break;
    case MF_IPC_COUNTED:
        precopy_counted(session, message->dirty_pages);
        break;
    case MF_IPC_CONFIRMED_ALL:
        session->confirmed_all = true;
        session_event(session, MF_EV_CONFIRMED_ALL);
        break;
    default:
        mf_log(MF_LOG_WARNING, "%s: the mover sent a message of type %u", session->name,
               message->type);
    }
}

static void restart_mover(evutil_socket_t fd, short what, void *arg)
{
    struct session *session = arg;
    struct mf_error err;
    (void)fd;
    (void)what;
    if (session_ended(session) || session->mover)
        return;
    if (mover_start(session, &err) < 0) {
        session_set_reason(session, "%s", err.text);
        mf_log(MF_LOG_ERR, "%s: %s; trying again", session->name, err.text);
        evtimer_add(session->mover_timer, &(struct timeval){.tv_sec = 1});
    }
}

void session_on_mover_exit(struct session *session, const char *how)
{
    session->link_open = false;
    if (session->rejected || session_ended(session))
        return;
    if (session->starting) {
        session_reject(session,
                       "memferry-mover of %s %s while it was starting; its last words are in "
                       "the log of memferryd",
                       session->name, how);
        return;
    }
    target_mind_events(session, true);
    mf_log(MF_LOG_WARNING, "%s: memferry-mover %s; starting another", session->name, how);
    session->mover_restarts++;
    session_set_reason(session, "memferry-mover on this host %s", how);
    connector_stop(session);
    session_event(session, MF_EV_LINK_LOST);
    if (session_ended(session))
        return;
    /* At once, but not in a circle: one that dies at once gets a second's rest. */
    const bool soon = mf_now_ns() - session->mover_started_ns < 200000000u;
    if (!session->mover_timer)
        session->mover_timer = evtimer_new(daemon_base(session->daemon), restart_mover, session);
    if (session->mover_timer)
        evtimer_add(session->mover_timer,
                    &(struct timeval){.tv_sec = soon && session->mover_restarts > 1});
}
