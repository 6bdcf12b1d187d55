/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The session's state machine: one table a role, state × event → action, next state. Pure; the
 * tests walk the whole table. memferryd feeds it and carries the actions out.
 *
 * The rule that shapes it is I6: RELEASE is the one moment at which the guest changes hands. Before
 * it every failure returns the guest to the source; after it the source never runs the guest again,
 * whatever is lost, and only ever reconnects.
 */
#pragma once

#include <stdbool.h>

enum mf_role { MF_SOURCE, MF_DESTINATION };

/** States of both roles. What users see of them is mf_state_name(). */
enum mf_state {
    /* source */
    MF_S_CONNECTING, /**< until the destination's VMM is ready for the device state */
    MF_S_PRECOPY,    /**< the VMM prepares; the guest still runs here */
    MF_S_PAUSING,    /**< precopy is over, the VMM has been told to switch */
    MF_S_CONFIRMING, /**< the guest is paused; in mode precopy the rest is confirmed now */
    MF_S_SWITCHOVER, /**< the guest is paused, the VMM sends its device state */
    MF_S_SENT,       /**< our VMM says that all is out; the destination's word is missing */
    MF_S_LOADED,     /**< the destination's word is here; our VMM's is missing */
    MF_S_RELEASED,   /**< RELEASE is given; not yet told that the guest runs there */
    MF_S_POSTCOPY,
    MF_S_RECOVERING, /**< after RELEASE, no link */
    MF_S_DRAINED,    /**< everything is there; the VMM is being ended */
    MF_S_FAILING,    /**< before RELEASE: the guest is being returned, then failed */
    MF_S_CANCELLING, /**< before RELEASE: the guest is being returned, then cancelled */
    /* destination */
    MF_D_WAITING,
    MF_D_PRECOPY,       /**< the VMM listens to the device stream */
    MF_D_SWITCHOVER,    /**< device state loaded; waits for RELEASE */
    MF_D_HELD,          /**< the same without a link: the source may have released, so it waits */
    MF_D_STARTING,      /**< RELEASE is here, the guest is being started */
    MF_D_STARTING_LOST, /**< the same without a link */
    MF_D_POSTCOPY,
    MF_D_RECOVERING, /**< the guest runs, no link */
    MF_D_DRAINED,    /**< everything is here; the source's acknowledgement is missing */
    /* both: ended */
    MF_DONE,
    MF_FAILED,
    MF_CANCELLED,
    MF_STATES
};

enum mf_event {
    /* of this host */
    MF_EV_LINK_LOST,     /**< a connection or the mover was lost, or connecting failed */
    MF_EV_LINK_UP,       /**< every connection stands and the hellos agree */
    MF_EV_COPIED,        /**< source: precopy has copied what it is to copy */
    MF_EV_VMM_PAUSED,    /**< source: the guest is paused for the switchover */
    MF_EV_VMM_COMPLETED, /**< source: device state is out and was loaded */
    MF_EV_VMM_RETURNED,  /**< source: the guest is as it was before */
    MF_EV_VMM_GONE,      /**< source: the VMM has been ended (or is to be kept) */
    MF_EV_VMM_INCOMING,  /**< destination: the VMM listens */
    MF_EV_VMM_LOADED,    /**< destination: device state is loaded */
    MF_EV_VMM_RUNNING,   /**< destination: the guest runs */
    MF_EV_VMM_FAILED,    /**< the VMM reported a failure */
    MF_EV_TARGET_EXITED, /**< the target process is gone */
    MF_EV_CONFIRMED_ALL, /**< destination: no page is missing any more */
    MF_EV_CANCEL,        /**< an operator's command */
    /* of the peer */
    MF_EV_PEER_READY,     /**< destination's VMM listens */
    MF_EV_PEER_CONFIRMED, /**< what is to be confirmed before RELEASE is (mode precopy: everything)
                           */
    MF_EV_PEER_LOADED,
    MF_EV_PEER_RELEASE,
    MF_EV_PEER_RUNNING,
    MF_EV_PEER_DRAINED,
    MF_EV_PEER_DRAINED_ACK,
    MF_EV_PEER_FAILED,    /**< the peer gave up */
    MF_EV_PEER_CANCELLED, /**< the peer's operator cancelled */
    MF_EVENTS
};

enum mf_action {
    MF_ACT_NONE,
    MF_ACT_REFUSE,       /**< (CANCEL) not possible in this state: say why */
    MF_ACT_VIOLATION,    /**< the peer said what it must not say now: drop the link */
    MF_ACT_START_ROUNDS, /**< source: begin precopy, or go on at once if there is none */
    MF_ACT_CONFIRM, /**< source: guest paused: confirm what is to be confirmed before RELEASE */
    MF_ACT_SEND_CONFIRMED,
    MF_ACT_START_VMM,    /**< source: start_outgoing; destination: start_incoming */
    MF_ACT_FINISH_VMM,   /**< source: finish_outgoing */
    MF_ACT_RELEASE,      /**< source: note that it is released, then send RELEASE */
    MF_ACT_RECONNECT,    /**< source: make a new link, with a pause between tries */
    MF_ACT_FINISH,       /**< source: acknowledge DRAINED, end the VMM */
    MF_ACT_RETURN_GUEST, /**< source: tell the peer, return_guest */
    MF_ACT_SEND_READY,
    MF_ACT_SEND_LOADED,
    MF_ACT_START_GUEST, /**< destination: resume */
    MF_ACT_START_AGAIN, /**< destination: resume failed; try it again after a while */
    MF_ACT_SEND_RUNNING,
    MF_ACT_SEND_DRAINED,
    MF_ACT_END,      /**< give everything back; the session has ended */
    MF_ACT_END_TELL, /**< tell the peer, then END */
};

struct mf_step {
    enum mf_action action;
    enum mf_state next;
};

/** mf_machine_step() - what to do when @event happens in @state. An event that a state does not
 * know leaves it as it is: NONE for one of this host, VIOLATION for one of the peer, REFUSE for
 * CANCEL. */
struct mf_step mf_machine_step(enum mf_state state, enum mf_event event);

/** mf_state_name() - one of the public names (memferry(1)): waiting, connecting, precopy,
 * switchover, postcopy, drained, done, recovering, failed, cancelled. */
const char *mf_state_name(enum mf_state state);

/** mf_event_name() - for logs. */
const char *mf_event_name(enum mf_event event);

bool mf_state_ended(enum mf_state state);

/** mf_state_released() - has the source given RELEASE (source), or the destination taken it?
 * Meaningless for ended states. */
bool mf_state_released(enum mf_state state);
