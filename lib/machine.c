/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib/machine.h"

#include <stddef.h>

static const char *const state_names[MF_STATES] = {
    [MF_S_CONNECTING] = "connecting",
    [MF_S_PRECOPY] = "precopy",
    [MF_S_PAUSING] = "precopy",
    [MF_S_CONFIRMING] = "switchover",
    [MF_S_SWITCHOVER] = "switchover",
    [MF_S_SENT] = "switchover",
    [MF_S_LOADED] = "switchover",
    [MF_S_RELEASED] = "postcopy",
    [MF_S_POSTCOPY] = "postcopy",
    [MF_S_RECOVERING] = "recovering",
    [MF_S_DRAINED] = "drained",
    [MF_S_FAILING] = "switchover",
    [MF_S_CANCELLING] = "switchover",
    [MF_D_WAITING] = "waiting",
    [MF_D_PRECOPY] = "precopy",
    [MF_D_SWITCHOVER] = "switchover",
    [MF_D_HELD] = "recovering",
    [MF_D_STARTING] = "switchover",
    [MF_D_STARTING_LOST] = "recovering",
    [MF_D_POSTCOPY] = "postcopy",
    [MF_D_RECOVERING] = "recovering",
    [MF_D_DRAINED] = "drained",
    [MF_DONE] = "done",
    [MF_FAILED] = "failed",
    [MF_CANCELLED] = "cancelled",
};

static const char *const event_names[MF_EVENTS] = {
    [MF_EV_LINK_LOST] = "link lost",
    [MF_EV_LINK_UP] = "link up",
    [MF_EV_COPIED] = "memory copied",
    [MF_EV_VMM_PAUSED] = "guest paused",
    [MF_EV_VMM_COMPLETED] = "device state sent",
    [MF_EV_VMM_RETURNED] = "guest returned",
    [MF_EV_VMM_GONE] = "VM ended",
    [MF_EV_VMM_INCOMING] = "VM listens",
    [MF_EV_VMM_LOADED] = "device state loaded",
    [MF_EV_VMM_RUNNING] = "guest runs",
    [MF_EV_VMM_FAILED] = "VM failed",
    [MF_EV_TARGET_EXITED] = "target exited",
    [MF_EV_CONFIRMED_ALL] = "all pages confirmed",
    [MF_EV_CANCEL] = "cancel",
    [MF_EV_PEER_READY] = "peer is ready",
    [MF_EV_PEER_CONFIRMED] = "memory confirmed",
    [MF_EV_PEER_LOADED] = "peer has loaded",
    [MF_EV_PEER_RELEASE] = "RELEASE",
    [MF_EV_PEER_RUNNING] = "guest runs at the peer",
    [MF_EV_PEER_DRAINED] = "DRAINED",
    [MF_EV_PEER_DRAINED_ACK] = "DRAINED acknowledged",
    [MF_EV_PEER_FAILED] = "peer failed",
    [MF_EV_PEER_CANCELLED] = "peer cancelled",
};

struct row {
    enum mf_state state;
    enum mf_event event;
    enum mf_action action;
    enum mf_state next;
};

/* Before RELEASE, with the VMM already at work: everything that goes wrong returns the guest. */
#define BEFORE_RELEASE(state)                                                                      \
    {state, MF_EV_LINK_LOST, MF_ACT_RETURN_GUEST, MF_S_FAILING},                                   \
        {state, MF_EV_PEER_FAILED, MF_ACT_RETURN_GUEST, MF_S_FAILING},                             \
        {state, MF_EV_PEER_CANCELLED, MF_ACT_RETURN_GUEST, MF_S_CANCELLING},                       \
        {state, MF_EV_CANCEL, MF_ACT_RETURN_GUEST, MF_S_CANCELLING},                               \
        {state, MF_EV_VMM_FAILED, MF_ACT_RETURN_GUEST, MF_S_FAILING},                              \
    {                                                                                              \
        state, MF_EV_TARGET_EXITED, MF_ACT_END_TELL, MF_FAILED                                     \
    }

/* After RELEASE: the source's VMM may even die, its RAM is a file that we hold. */
#define AFTER_RELEASE(state)                                                                       \
    {state, MF_EV_LINK_LOST, MF_ACT_RECONNECT, MF_S_RECOVERING},                                   \
        {state, MF_EV_PEER_DRAINED, MF_ACT_FINISH, MF_S_DRAINED},                                  \
    {                                                                                              \
        state, MF_EV_PEER_FAILED, MF_ACT_END, MF_FAILED                                            \
    }

/* Destination, from LOADED on: the source may have released the guest. A VMM that does not answer
 * is no reason to take its pages away (they would read as zeros): only the end of its process ends
 * this. */
#define GUEST_IS_HERE(state)                                                                       \
    {                                                                                              \
        state, MF_EV_TARGET_EXITED, MF_ACT_END_TELL, MF_FAILED                                     \
    }

static const struct row rows[] = {
    /* ---- source ---- */
    {MF_S_CONNECTING, MF_EV_LINK_UP, MF_ACT_NONE, MF_S_CONNECTING},
    {MF_S_CONNECTING, MF_EV_PEER_READY, MF_ACT_START_ROUNDS, MF_S_PRECOPY},
    {MF_S_CONNECTING, MF_EV_LINK_LOST, MF_ACT_END, MF_FAILED},
    {MF_S_CONNECTING, MF_EV_PEER_FAILED, MF_ACT_END, MF_FAILED},
    {MF_S_CONNECTING, MF_EV_PEER_CANCELLED, MF_ACT_END, MF_CANCELLED},
    {MF_S_CONNECTING, MF_EV_CANCEL, MF_ACT_END_TELL, MF_CANCELLED},
    {MF_S_CONNECTING, MF_EV_VMM_FAILED, MF_ACT_END_TELL, MF_FAILED},
    {MF_S_CONNECTING, MF_EV_TARGET_EXITED, MF_ACT_END_TELL, MF_FAILED},

    {MF_S_PRECOPY, MF_EV_COPIED, MF_ACT_START_VMM, MF_S_PAUSING},
    BEFORE_RELEASE(MF_S_PRECOPY),

    {MF_S_PAUSING, MF_EV_VMM_PAUSED, MF_ACT_CONFIRM, MF_S_CONFIRMING},
    BEFORE_RELEASE(MF_S_PAUSING),

    {MF_S_CONFIRMING, MF_EV_PEER_CONFIRMED, MF_ACT_FINISH_VMM, MF_S_SWITCHOVER},
    BEFORE_RELEASE(MF_S_CONFIRMING),

    {MF_S_SWITCHOVER, MF_EV_VMM_COMPLETED, MF_ACT_NONE, MF_S_SENT},
    {MF_S_SWITCHOVER, MF_EV_PEER_LOADED, MF_ACT_NONE, MF_S_LOADED},
    BEFORE_RELEASE(MF_S_SWITCHOVER),

    {MF_S_SENT, MF_EV_PEER_LOADED, MF_ACT_RELEASE, MF_S_RELEASED},
    BEFORE_RELEASE(MF_S_SENT),

    {MF_S_LOADED, MF_EV_VMM_COMPLETED, MF_ACT_RELEASE, MF_S_RELEASED},
    BEFORE_RELEASE(MF_S_LOADED),

    /* Urgent answers may have confirmed all of a small VM before anybody waited for that. */
    {MF_S_SWITCHOVER, MF_EV_PEER_CONFIRMED, MF_ACT_NONE, MF_S_SWITCHOVER},
    {MF_S_SENT, MF_EV_PEER_CONFIRMED, MF_ACT_NONE, MF_S_SENT},
    {MF_S_LOADED, MF_EV_PEER_CONFIRMED, MF_ACT_NONE, MF_S_LOADED},
    {MF_S_RELEASED, MF_EV_PEER_CONFIRMED, MF_ACT_NONE, MF_S_RELEASED},
    {MF_S_POSTCOPY, MF_EV_PEER_CONFIRMED, MF_ACT_NONE, MF_S_POSTCOPY},

    {MF_S_RELEASED, MF_EV_PEER_RUNNING, MF_ACT_NONE, MF_S_POSTCOPY},
    AFTER_RELEASE(MF_S_RELEASED),
    {MF_S_POSTCOPY, MF_EV_PEER_RUNNING, MF_ACT_NONE, MF_S_POSTCOPY},
    AFTER_RELEASE(MF_S_POSTCOPY),
    {MF_S_RECOVERING, MF_EV_LINK_UP, MF_ACT_NONE, MF_S_RELEASED},
    AFTER_RELEASE(MF_S_RECOVERING),

    {MF_S_DRAINED, MF_EV_VMM_GONE, MF_ACT_END, MF_DONE},
    {MF_S_DRAINED, MF_EV_TARGET_EXITED, MF_ACT_END, MF_DONE},
    {MF_S_DRAINED, MF_EV_VMM_FAILED, MF_ACT_END, MF_DONE},

    {MF_S_FAILING, MF_EV_VMM_RETURNED, MF_ACT_END, MF_FAILED},
    {MF_S_FAILING, MF_EV_VMM_FAILED, MF_ACT_END, MF_FAILED},
    {MF_S_FAILING, MF_EV_TARGET_EXITED, MF_ACT_END, MF_FAILED},
    {MF_S_FAILING, MF_EV_CANCEL, MF_ACT_NONE, MF_S_CANCELLING},
    {MF_S_FAILING, MF_EV_PEER_LOADED, MF_ACT_NONE, MF_S_FAILING},
    {MF_S_FAILING, MF_EV_PEER_CONFIRMED, MF_ACT_NONE, MF_S_FAILING},
    {MF_S_FAILING, MF_EV_PEER_FAILED, MF_ACT_NONE, MF_S_FAILING},
    {MF_S_FAILING, MF_EV_PEER_CANCELLED, MF_ACT_NONE, MF_S_FAILING},
    {MF_S_CANCELLING, MF_EV_VMM_RETURNED, MF_ACT_END, MF_CANCELLED},
    {MF_S_CANCELLING, MF_EV_VMM_FAILED, MF_ACT_END, MF_FAILED},
    {MF_S_CANCELLING, MF_EV_TARGET_EXITED, MF_ACT_END, MF_FAILED},
    {MF_S_CANCELLING, MF_EV_CANCEL, MF_ACT_NONE, MF_S_CANCELLING},
    {MF_S_CANCELLING, MF_EV_PEER_LOADED, MF_ACT_NONE, MF_S_CANCELLING},
    {MF_S_CANCELLING, MF_EV_PEER_CONFIRMED, MF_ACT_NONE, MF_S_CANCELLING},
    {MF_S_CANCELLING, MF_EV_PEER_FAILED, MF_ACT_NONE, MF_S_CANCELLING},
    {MF_S_CANCELLING, MF_EV_PEER_CANCELLED, MF_ACT_NONE, MF_S_CANCELLING},

    /* ---- destination ---- */
    /* Nothing of the VM has been touched by the peer yet: a refused or broken attempt leaves it
       armed. */
    {MF_D_WAITING, MF_EV_LINK_UP, MF_ACT_START_VMM, MF_D_PRECOPY},
    {MF_D_WAITING, MF_EV_LINK_LOST, MF_ACT_NONE, MF_D_WAITING},
    {MF_D_WAITING, MF_EV_PEER_FAILED, MF_ACT_NONE, MF_D_WAITING},
    {MF_D_WAITING, MF_EV_PEER_CANCELLED, MF_ACT_NONE, MF_D_WAITING},
    {MF_D_WAITING, MF_EV_CANCEL, MF_ACT_END, MF_CANCELLED},
    {MF_D_WAITING, MF_EV_VMM_FAILED, MF_ACT_END, MF_FAILED},
    {MF_D_WAITING, MF_EV_TARGET_EXITED, MF_ACT_END, MF_FAILED},

    {MF_D_PRECOPY, MF_EV_VMM_INCOMING, MF_ACT_SEND_READY, MF_D_PRECOPY},
    {MF_D_PRECOPY, MF_EV_CONFIRMED_ALL, MF_ACT_SEND_CONFIRMED, MF_D_PRECOPY},
    {MF_D_PRECOPY, MF_EV_VMM_LOADED, MF_ACT_SEND_LOADED, MF_D_SWITCHOVER},
    {MF_D_PRECOPY, MF_EV_LINK_LOST, MF_ACT_END, MF_FAILED},
    {MF_D_PRECOPY, MF_EV_PEER_FAILED, MF_ACT_END, MF_FAILED},
    {MF_D_PRECOPY, MF_EV_PEER_CANCELLED, MF_ACT_END, MF_CANCELLED},
    {MF_D_PRECOPY, MF_EV_CANCEL, MF_ACT_END_TELL, MF_CANCELLED},
    {MF_D_PRECOPY, MF_EV_VMM_FAILED, MF_ACT_END_TELL, MF_FAILED},
    {MF_D_PRECOPY, MF_EV_TARGET_EXITED, MF_ACT_END_TELL, MF_FAILED},

    {MF_D_SWITCHOVER, MF_EV_PEER_RELEASE, MF_ACT_START_GUEST, MF_D_STARTING},
    {MF_D_SWITCHOVER, MF_EV_LINK_LOST, MF_ACT_NONE, MF_D_HELD},
    {MF_D_SWITCHOVER, MF_EV_PEER_FAILED, MF_ACT_END, MF_FAILED},
    {MF_D_SWITCHOVER, MF_EV_PEER_CANCELLED, MF_ACT_END, MF_CANCELLED},
    GUEST_IS_HERE(MF_D_SWITCHOVER),

    {MF_D_HELD, MF_EV_LINK_UP, MF_ACT_NONE, MF_D_SWITCHOVER},
    {MF_D_HELD, MF_EV_LINK_LOST, MF_ACT_NONE, MF_D_HELD},
    {MF_D_HELD, MF_EV_PEER_FAILED, MF_ACT_END, MF_FAILED},
    {MF_D_HELD, MF_EV_PEER_CANCELLED, MF_ACT_END, MF_CANCELLED},
    GUEST_IS_HERE(MF_D_HELD),

    {MF_D_STARTING, MF_EV_VMM_RUNNING, MF_ACT_SEND_RUNNING, MF_D_POSTCOPY},
    {MF_D_STARTING, MF_EV_VMM_FAILED, MF_ACT_START_AGAIN, MF_D_STARTING},
    {MF_D_STARTING, MF_EV_LINK_LOST, MF_ACT_NONE, MF_D_STARTING_LOST},
    {MF_D_STARTING, MF_EV_PEER_RELEASE, MF_ACT_NONE, MF_D_STARTING},
    GUEST_IS_HERE(MF_D_STARTING),

    {MF_D_STARTING_LOST, MF_EV_VMM_RUNNING, MF_ACT_NONE, MF_D_RECOVERING},
    {MF_D_STARTING_LOST, MF_EV_VMM_FAILED, MF_ACT_START_AGAIN, MF_D_STARTING_LOST},
    {MF_D_STARTING_LOST, MF_EV_LINK_UP, MF_ACT_NONE, MF_D_STARTING},
    {MF_D_STARTING_LOST, MF_EV_LINK_LOST, MF_ACT_NONE, MF_D_STARTING_LOST},
    GUEST_IS_HERE(MF_D_STARTING_LOST),

    {MF_D_POSTCOPY, MF_EV_CONFIRMED_ALL, MF_ACT_SEND_DRAINED, MF_D_DRAINED},
    {MF_D_POSTCOPY, MF_EV_LINK_LOST, MF_ACT_NONE, MF_D_RECOVERING},
    {MF_D_POSTCOPY, MF_EV_PEER_RELEASE, MF_ACT_NONE, MF_D_POSTCOPY},
    GUEST_IS_HERE(MF_D_POSTCOPY),

    {MF_D_RECOVERING, MF_EV_LINK_UP, MF_ACT_SEND_RUNNING, MF_D_POSTCOPY},
    {MF_D_RECOVERING, MF_EV_LINK_LOST, MF_ACT_NONE, MF_D_RECOVERING},
    {MF_D_RECOVERING, MF_EV_CONFIRMED_ALL, MF_ACT_END, MF_DONE},
    GUEST_IS_HERE(MF_D_RECOVERING),

    /* Everything is here. Without a link the session is over for this host: a source that comes
     * back is told so by the answer to its preamble, and only then lets its VM go (I5). */
    {MF_D_DRAINED, MF_EV_PEER_DRAINED_ACK, MF_ACT_END, MF_DONE},
    {MF_D_DRAINED, MF_EV_LINK_LOST, MF_ACT_END, MF_DONE},
    {MF_D_DRAINED, MF_EV_LINK_UP, MF_ACT_SEND_DRAINED, MF_D_DRAINED},
    {MF_D_DRAINED, MF_EV_PEER_RELEASE, MF_ACT_NONE, MF_D_DRAINED},
};

struct mf_step mf_machine_step(enum mf_state state, enum mf_event event)
{
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++)
        if (rows[i].state == state && rows[i].event == event)
            return (struct mf_step){rows[i].action, rows[i].next};
    if (event == MF_EV_CANCEL)
        return (struct mf_step){MF_ACT_REFUSE, state};
    if (event >= MF_EV_PEER_READY && !mf_state_ended(state))
        return (struct mf_step){MF_ACT_VIOLATION, state};
    return (struct mf_step){MF_ACT_NONE, state};
}

const char *mf_state_name(enum mf_state state)
{
    return state_names[state];
}

const char *mf_event_name(enum mf_event event)
{
    return event_names[event];
}

bool mf_state_ended(enum mf_state state)
{
    return state == MF_DONE || state == MF_FAILED || state == MF_CANCELLED;
}

bool mf_state_released(enum mf_state state)
{
    switch (state) {
    case MF_S_RELEASED:
    case MF_S_POSTCOPY:
    case MF_S_RECOVERING:
    case MF_S_DRAINED:
    case MF_D_STARTING:
    case MF_D_STARTING_LOST:
    case MF_D_POSTCOPY:
    case MF_D_RECOVERING:
    case MF_D_DRAINED:
        return true;
    default:
        return false;
    }
}
