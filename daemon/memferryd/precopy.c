/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Precopy: memory is copied in rounds while the guest runs at the source. The mover copies and
 * tracks (daemon/mover/source/); lib/rounds.c says after each round whether another one is worth
 * it; here is what connects the two, and what an operator may say meanwhile.
 *
 * All rounds have landed at the destination before the VMM is told to switch, so nothing of them is
 * under way when the guest is paused (I7).
 */
#include "daemon/memferryd/session.h"

#include <errno.h>
#include <string.h>

#include "lib/log.h"

static int refuse_direct_io(const struct session *session, const struct vmm_info *info,
                            struct mf_error *err)
{
    if (info->direct_io[0] && session_vmm_ops(session) == &vmm_process)
        return mf_fail(err, ENOTSUP,
                       "it holds %s, and what is read through that into memory is not seen as "
                       "written",
                       info->direct_io);
    if (info->direct_io[0])
        return mf_fail(err, ENOTSUP,
                       "its drive %s bypasses the page cache (cache.direct=on), and what such a "
                       "drive reads into memory is not seen as written",
                       info->direct_io);
    return 0;
}

/* @why: it can't be. Memory that is tracked is nobody else's: registering it would have failed. Of
 * other memory smaps has to tell. */
static void on_tracked(struct session *session, const struct mf_error *why)
{
    struct mf_rounds *rounds = &session->rounds;
    struct mf_error err;
    if (!why) {
        session_prepared(session, NULL);
        return;
    }
    target_stop_watching(session);
    if (rounds->mode == MF_PRECOPY && !rounds->fallback) {
        mf_fail(&err, why->code,
                "%s can't be migrated in mode precopy, for the guest's writes can't be "
                "followed: %s; use --mode postcopy, or --fallback",
                session->name, why->text);
        session_prepared(session, &err);
        return;
    }
    snprintf(session->mode_note, sizeof(session->mode_note),
             "memory goes by postcopy alone, for the guest's writes can't be followed: %s",
             why->text);
    mf_log(MF_LOG_NOTICE, "%s: %s", session->name, session->mode_note);
    rounds->mode = MF_POSTCOPY;
    target_refuse_served(session, session_prepared);
}

void precopy_setup(struct session *session, const struct vmm_info *info)
{
    struct mf_error why;
    if (session->rounds.mode == MF_POSTCOPY)
        target_refuse_served(session, session_prepared);
    else if (refuse_direct_io(session, info, &why) < 0)
        on_tracked(session, &why);
    else
        target_track(session, on_tracked);
}

static void on_switch_time(evutil_socket_t fd, short what, void *arg)
{
    (void)fd;
    (void)what;
    precopy_switch(arg);
}

static void begin_round(struct session *session)
{
    session->round_begun++;
    mover_step_behind(session);
    mover_order(session, &(struct mf_ipc){.type = MF_IPC_ROUND}, -1);
    session_changed(session);
}

void precopy_send_settings(struct session *session)
{
    mover_order(
        session,
        &(struct mf_ipc){.type = MF_IPC_SETTINGS, .bandwidth_bits_s = session->bandwidth_bits_s},
        -1);
}

void precopy_begin(struct session *session)
{
    if (session->rounds.switch_now && session->rounds.mode == MF_PRECOPY)
        session->rounds.mode = MF_HYBRID;
    if (session->rounds.mode == MF_POSTCOPY || session->rounds.switch_now) {
        session_event(session, MF_EV_COPIED);
        return;
    }
    if (session->switch_after_s) {
        session->switch_timer = evtimer_new(daemon_base(session->daemon), on_switch_time, session);
        if (session->switch_timer)
            evtimer_add(session->switch_timer,
                        &(struct timeval){.tv_sec = (time_t)session->switch_after_s});
    }
    begin_round(session);
}

static void doubt_note(struct session *session, const char *what)
{
    snprintf(session->mode_note, sizeof(session->mode_note),
             "%s: %s; --mode postcopy suits such a program better", what,
             mf_copies_why(&session->view.file->copies));
    mf_log(MF_LOG_NOTICE, "%s: %s", session->name, session->mode_note);
}

void precopy_round_done(struct session *session, unsigned round, uint64_t pages,
                        uint64_t duration_ns, uint64_t dirty_pages)
{
    if (session->state != MF_S_PRECOPY)
        return;
    struct mf_rounds *rounds = &session->rounds;
    enum mf_rounds_next next = mf_rounds_done(rounds, round, pages, duration_ns, dirty_pages);
    mf_log(MF_LOG_DEBUG, "%s: round %u: %llu pages in %llu ms, %llu dirty by then", session->name,
           round, (unsigned long long)pages, (unsigned long long)(duration_ns / 1000000u),
           (unsigned long long)dirty_pages);
    /* A round that should have settled what the one before left in doubt has not: nor will others.
     */
    const bool in_doubt = !mf_copies_good(&session->view.file->copies);
    if (in_doubt && session->round_in_doubt && rounds->mode == MF_PRECOPY) {
        rounds->mode = MF_HYBRID;
        doubt_note(session, "precopy became hybrid");
        session_event(session, MF_EV_COPIED);
        return;
    }
    session->round_in_doubt = in_doubt;
    if (next == MF_ROUNDS_AGAIN) {
        if (rounds->mode == MF_PRECOPY && round >= MF_ROUNDS_HYBRID)
            session_set_reason(
                session,
                "the guest writes %llu pages a second and the link carries %llu; a "
                "blackout of %llu ms would be needed: it goes on (memferry switch "
                "%s ends precopy now)",
                (unsigned long long)mf_rounds_dirty_rate(rounds),
                (unsigned long long)((double)pages * 1e9 / (double)duration_ns),
                (unsigned long long)(mf_rounds_expected_blackout_ns(rounds) / 1000000u),
                session->name);
        begin_round(session);
        return;
    }
    if (next == MF_ROUNDS_FALL_BACK) {
        rounds->mode = MF_HYBRID;
        snprintf(session->mode_note, sizeof(session->mode_note),
                 "precopy became hybrid after %u rounds: the guest writes %llu pages a second",
                 round, (unsigned long long)mf_rounds_dirty_rate(rounds));
        mf_log(MF_LOG_NOTICE, "%s: %s", session->name, session->mode_note);
    }
    session_event(session, MF_EV_COPIED);
}

void precopy_switch(struct session *session)
{
    session->rounds.switch_now = true;
    /* The round that is under way ends where it is; what it did not reach is sent after RELEASE. */
    if (session->state == MF_S_PRECOPY)
        mover_order(session, &(struct mf_ipc){.type = MF_IPC_CUT_ROUND}, -1);
}

void precopy_look_again(struct session *session)
{
    struct mf_rounds *rounds = &session->rounds;
    if (session->pagemap_fd < 0 || mf_copies_good(&session->view.file->copies))
        return;
    /* To confirm before RELEASE would mean to send everything while the guest stands still. */
    doubt_note(session, rounds->mode == MF_PRECOPY
                            ? "precopy became hybrid, and all memory is sent again"
                            : "all memory is sent again");
    rounds->mode = MF_HYBRID;
}

void precopy_confirm(struct session *session)
{
    mover_order(session, &(struct mf_ipc){.type = MF_IPC_FROZEN}, -1);
    if (session->rounds.mode == MF_PRECOPY) {
        mover_step_beside(session); /* the guest stands still */
        mover_order(session, &(struct mf_ipc){.type = MF_IPC_COUNT}, -1);
    } else {
        session_event(session, MF_EV_PEER_CONFIRMED);
    }
}

void precopy_counted(struct session *session, uint64_t dirty_pages)
{
    struct mf_rounds *rounds = &session->rounds;
    if (session->state != MF_S_CONFIRMING || rounds->mode != MF_PRECOPY)
        return;
    if (mf_rounds_fit(rounds, dirty_pages)) {
        mover_order(session, &(struct mf_ipc){.type = MF_IPC_CONFIRM}, -1);
        return;
    }
    snprintf(session->mode_note, sizeof(session->mode_note),
             "precopy became hybrid: %llu pages were written or mapped anew between the last round "
             "and the pause, too many to send while %s stands still",
             (unsigned long long)dirty_pages, session->name);
    mf_log(MF_LOG_NOTICE, "%s: %s", session->name, session->mode_note);
    rounds->mode = MF_HYBRID;
    session_event(session, MF_EV_PEER_CONFIRMED);
}

int session_set_bandwidth(struct daemon *daemon, const char *name, uint64_t bits_s,
                          struct mf_error *err)
{
    struct session *session = session_find(daemon, name);
    if (!session)
        return mf_fail(err, ENOENT, "there is no session named %s on this host", name);
    if (session->role != MF_SOURCE || session_ended(session))
        return mf_fail(err, EINVAL,
                       "%s sends nothing from this host that could be limited: it is %s", name,
                       session_ended(session) ? mf_state_name(session->state) : "a destination");
    session->bandwidth_bits_s = bits_s;
    precopy_send_settings(session);
    return 0;
}

int session_switch(struct daemon *daemon, const char *name, struct mf_error *err)
{
    struct session *session = session_find(daemon, name);
    if (!session)
        return mf_fail(err, ENOENT, "there is no session named %s on this host", name);
    if (session->role != MF_SOURCE)
        return mf_fail(err, EINVAL, "%s arrives on this host; switch it where it comes from", name);
    if (session_ended(session))
        return mf_fail(err, EINVAL, "%s has ended already: it is %s", name,
                       mf_state_name(session->state));
    precopy_switch(session);
    return 0;
}
