/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* lib/machine.c: the table as such. What two hosts do together is test_machine_pair.c's. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <string.h>

#include "lib/machine.h"

#define EACH_STATE(s) for (unsigned s = 0; s < MF_STATES; s++)
#define EACH_EVENT(e) for (unsigned e = 0; e < MF_EVENTS; e++)

static struct mf_step step(unsigned state, unsigned event)
{
    return mf_machine_step((enum mf_state)state, (enum mf_event)event);
}

static bool is_source(unsigned state)
{
    return state <= MF_S_CANCELLING;
}

static bool is_destination(unsigned state)
{
    return state >= MF_D_WAITING && state <= MF_D_DRAINED;
}

static bool ended(unsigned state)
{
    return mf_state_ended((enum mf_state)state);
}

static bool released(unsigned state)
{
    return mf_state_released((enum mf_state)state);
}

/* Everything that can be reached from @from, itself included. */
static void reach(unsigned from, bool seen[MF_STATES])
{
    seen[from] = true;
    EACH_EVENT(e)
    {
        unsigned next = step(from, e).next;
        if (!seen[next])
            reach(next, seen);
    }
}

static void walks_the_whole_table(void **state)
{
    (void)state;
    EACH_STATE(s)
    {
        EACH_EVENT(e)
        {
            const struct mf_step now = step(s, e);
            assert_in_range(now.action, MF_ACT_NONE, MF_ACT_END_TELL);
            assert_true((unsigned)now.next < MF_STATES);
            /* Roles never mix, and what has ended stays as it ended. */
            assert_true(is_source(s) ? is_source(now.next) || ended(now.next) : true);
            assert_true(is_destination(s) ? is_destination(now.next) || ended(now.next) : true);
            if (ended(s)) {
                assert_int_equal(now.next, s);
                assert_int_equal(now.action, e == MF_EV_CANCEL ? MF_ACT_REFUSE : MF_ACT_NONE);
                continue;
            }
            /* Ending and the action that gives everything back come together. */
            assert_int_equal(ended(now.next),
                             now.action == MF_ACT_END || now.action == MF_ACT_END_TELL);
            if (now.action == MF_ACT_REFUSE || now.action == MF_ACT_VIOLATION)
                assert_int_equal(now.next, s);
            if (now.action == MF_ACT_REFUSE)
                assert_int_equal(e, MF_EV_CANCEL);
            if (now.action == MF_ACT_VIOLATION)
                assert_true(e >= MF_EV_PEER_READY);
        }
    }
}

static void is_closed_under_loss(void **state)
{
    (void)state;
    /* A violation drops the link, so losing it must be an event that every state survives without
     * breaking the protocol again. */
    EACH_STATE(s)
    {
        assert_int_not_equal(step(s, MF_EV_LINK_LOST).action, MF_ACT_VIOLATION);
        if (!ended(s) && released(s) && is_source(s) && s != MF_S_DRAINED)
            assert_int_equal(step(s, MF_EV_LINK_LOST).action, MF_ACT_RECONNECT);
        /* The guest that runs or may run at the destination is never given up for a link. */
        if (is_destination(s) && (released(s) || s == MF_D_SWITCHOVER || s == MF_D_HELD)) {
            unsigned next = step(s, MF_EV_LINK_LOST).next;
            assert_int_not_equal(next, MF_FAILED);
            assert_int_not_equal(next, MF_CANCELLED);
            if (next == MF_DONE)
                assert_int_equal(s, MF_D_DRAINED);
        }
    }
}

static void release_is_the_point_of_no_return(void **state)
{
    (void)state;
    EACH_STATE(from)
    {
        if (!released(from))
            continue;
        bool seen[MF_STATES] = {false};
        reach(from, seen);
        EACH_STATE(s)
        {
            if (!seen[s] || ended(s))
                continue;
            assert_true(released(s));
            EACH_EVENT(e)
            {
                const struct mf_step now = step(s, e);
                assert_int_not_equal(now.action, MF_ACT_RETURN_GUEST);
                assert_int_not_equal(now.action, MF_ACT_RELEASE);
                assert_int_not_equal(now.action, MF_ACT_START_VMM);
                assert_int_not_equal(now.next, MF_CANCELLED);
            }
        }
    }
}

static void hands_the_guest_over_by_release_alone(void **state)
{
    (void)state;
    unsigned releases = 0, starts = 0, returns = 0;
    EACH_STATE(s)
    {
        EACH_EVENT(e)
        {
            const struct mf_step now = step(s, e);
            switch (now.action) {
            case MF_ACT_RELEASE:
                /* Both hosts have said that the device state is over there. */
                assert_true((s == MF_S_SENT && e == MF_EV_PEER_LOADED) ||
                            (s == MF_S_LOADED && e == MF_EV_VMM_COMPLETED));
                assert_true(released(now.next));
                releases++;
                break;
            case MF_ACT_START_GUEST:
                assert_int_equal(e, MF_EV_PEER_RELEASE);
                assert_int_equal(s, MF_D_SWITCHOVER);
                assert_true(released(now.next));
                starts++;
                break;
            case MF_ACT_FINISH:
                assert_int_equal(e, MF_EV_PEER_DRAINED);
                assert_true(is_source(s) && released(s));
                break;
            case MF_ACT_RETURN_GUEST:
                assert_true(is_source(s) && !released(s));
                assert_true(now.next == MF_S_FAILING || now.next == MF_S_CANCELLING);
                returns++;
                break;
            case MF_ACT_START_ROUNDS:
                assert_true(s == MF_S_CONNECTING && e == MF_EV_PEER_READY);
                break;
            case MF_ACT_START_VMM:
                assert_true((s == MF_S_PRECOPY && e == MF_EV_COPIED) || s == MF_D_WAITING);
                break;
            case MF_ACT_CONFIRM:
                assert_true(s == MF_S_PAUSING && e == MF_EV_VMM_PAUSED);
                break;
            case MF_ACT_FINISH_VMM:
                /* The device state leaves only once what is to be confirmed before RELEASE is. */
                assert_true(s == MF_S_CONFIRMING && e == MF_EV_PEER_CONFIRMED);
                break;
            case MF_ACT_SEND_CONFIRMED:
                assert_true(e == MF_EV_CONFIRMED_ALL && !released(s) && now.next == s);
                break;
            default:
                break;
            }
            /* In and out of "released" by nothing else. */
            if (!ended(s) && !ended(now.next) && !released(s) && released(now.next))
                assert_true(now.action == MF_ACT_RELEASE || now.action == MF_ACT_START_GUEST);
        }
    }
    assert_int_equal(releases, 2);
    assert_int_equal(starts, 1);
    assert_true(returns > 0);
}

static void done_means_that_every_page_arrived(void **state)
{
    (void)state;
    EACH_STATE(s)
    {
        EACH_EVENT(e)
        {
            if (ended(s) || step(s, e).next != MF_DONE)
                continue;
            if (is_source(s))
                assert_int_equal(s, MF_S_DRAINED);
            else
                assert_true(s == MF_D_DRAINED || e == MF_EV_CONFIRMED_ALL);
        }
        /* The only way into the states that lead there. */
        EACH_EVENT(e)
        {
            if (step(s, e).next == MF_S_DRAINED && s != MF_S_DRAINED)
                assert_int_equal(e, MF_EV_PEER_DRAINED);
            if (step(s, e).next == MF_D_DRAINED && s != MF_D_DRAINED)
                assert_int_equal(e, MF_EV_CONFIRMED_ALL);
        }
    }
}

static void cancels_before_release_only(void **state)
{
    (void)state;
    EACH_STATE(s)
    {
        const struct mf_step now = step(s, MF_EV_CANCEL);
        /* A destination that loaded can't know whether it is released already. */
        bool refused = ended(s) || released(s) || s == MF_D_SWITCHOVER || s == MF_D_HELD;
        assert_int_equal(now.action == MF_ACT_REFUSE, refused);
        if (!refused) {
            bool seen[MF_STATES] = {false};
            reach(now.next, seen);
            assert_true(seen[MF_CANCELLED]);
            assert_false(seen[MF_DONE]);
        }
    }
}

static void every_failure_before_release_returns_the_guest(void **state)
{
    (void)state;
    static const enum mf_event failures[] = {MF_EV_LINK_LOST, MF_EV_VMM_FAILED, MF_EV_PEER_FAILED,
                                             MF_EV_PEER_CANCELLED, MF_EV_CANCEL};
    EACH_STATE(s)
    {
        if (!is_source(s) || released(s) || s == MF_S_FAILING || s == MF_S_CANCELLING)
            continue;
        for (size_t i = 0; i < sizeof(failures) / sizeof(failures[0]); i++) {
            const struct mf_step now = step(s, failures[i]);
            if (s == MF_S_CONNECTING) /* nothing of the VM was touched yet */
                assert_true(ended(now.next));
            else
                assert_int_equal(now.action, MF_ACT_RETURN_GUEST);
        }
    }
}

/* The source's way to RELEASE, step by step; what a returning guest makes of late words. */
static void goes_by_precopy_and_confirming(void **state)
{
    (void)state;
    static const struct {
        enum mf_event event;
        enum mf_action action;
        enum mf_state next;
    } way[] = {
        {MF_EV_PEER_READY, MF_ACT_START_ROUNDS, MF_S_PRECOPY},
        {MF_EV_COPIED, MF_ACT_START_VMM, MF_S_PAUSING},
        {MF_EV_VMM_PAUSED, MF_ACT_CONFIRM, MF_S_CONFIRMING},
        {MF_EV_PEER_CONFIRMED, MF_ACT_FINISH_VMM, MF_S_SWITCHOVER},
    };
    unsigned now = MF_S_CONNECTING;
    for (size_t i = 0; i < sizeof(way) / sizeof(way[0]); i++) {
        /* None of the later ones is skipped to. */
        for (size_t later = i + 1; later < sizeof(way) / sizeof(way[0]); later++)
            assert_int_equal(step(now, way[later].event).next, now);
        const struct mf_step s = step(now, way[i].event);
        assert_int_equal(s.action, way[i].action);
        assert_int_equal(s.next, way[i].next);
        now = s.next;
    }
    assert_string_equal(mf_state_name(MF_S_PAUSING), "precopy");
    assert_string_equal(mf_state_name(MF_S_CONFIRMING), "switchover");
    static const enum mf_state returning[] = {MF_S_FAILING, MF_S_CANCELLING};
    for (size_t i = 0; i < 2; i++) {
        assert_int_equal(step(returning[i], MF_EV_PEER_CONFIRMED).action, MF_ACT_NONE);
        assert_int_equal(step(returning[i], MF_EV_COPIED).action, MF_ACT_NONE);
        assert_int_equal(step(returning[i], MF_EV_VMM_PAUSED).action, MF_ACT_NONE);
    }
    /* Before it waits for that, nothing can be confirmed. */
    EACH_STATE(s)
    {
        if (!is_source(s))
            continue;
        const struct mf_step word = step(s, MF_EV_PEER_CONFIRMED);
        if (s < MF_S_CONFIRMING)
            assert_int_equal(word.action, MF_ACT_VIOLATION);
        else if (s != MF_S_CONFIRMING) /* later it says nothing new */
            assert_true(word.next == s &&
                        (word.action == MF_ACT_NONE || s == MF_S_RECOVERING || s == MF_S_DRAINED));
    }
}

static void every_state_is_reached_and_can_end(void **state)
{
    (void)state;
    bool reached[MF_STATES] = {false};
    reach(MF_S_CONNECTING, reached);
    reach(MF_D_WAITING, reached);
    EACH_STATE(s)
    {
        bool seen[MF_STATES] = {false};
        assert_true(reached[s]);
        reach(s, seen);
        assert_true(seen[MF_DONE] || seen[MF_FAILED] || seen[MF_CANCELLED]);
    }
}

static void says_a_thing_once(void **state)
{
    (void)state;
    /* Whoever repeats what was said (an answer to a retransmission that never happens over TCP)
     * breaks the protocol; RELEASE is the exception, because every later greeting repeats it. */
    EACH_STATE(s)
    {
        if (is_source(s) && !ended(s))
            assert_int_equal(step(s, MF_EV_PEER_RELEASE).action, MF_ACT_VIOLATION);
        if (is_destination(s) && released(s) && s != MF_D_STARTING_LOST && s != MF_D_RECOVERING) {
            assert_int_equal(step(s, MF_EV_PEER_RELEASE).action, MF_ACT_NONE);
            assert_int_equal(step(s, MF_EV_PEER_RELEASE).next, s);
        }
        if (is_destination(s))
            for (unsigned e = MF_EV_PEER_READY; e <= MF_EV_PEER_LOADED; e++)
                assert_int_equal(step(s, e).action, MF_ACT_VIOLATION);
    }
}

static void has_the_ten_public_names(void **state)
{
    (void)state;
    static const char *const names[] = {"waiting",  "connecting", "precopy", "switchover",
                                        "postcopy", "drained",    "done",    "recovering",
                                        "failed",   "cancelled"};
    bool used[sizeof(names) / sizeof(names[0])] = {false};
    EACH_STATE(s)
    {
        bool known = false;
        for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++)
            if (strcmp(mf_state_name((enum mf_state)s), names[i]) == 0)
                known = used[i] = true;
        assert_true(known);
    }
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++)
        assert_true(used[i]);
    EACH_EVENT(e)
    {
        assert_non_null(mf_event_name((enum mf_event)e));
        for (unsigned other = 0; other < e; other++)
            assert_string_not_equal(mf_event_name((enum mf_event)e),
                                    mf_event_name((enum mf_event)other));
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(walks_the_whole_table),
        cmocka_unit_test(is_closed_under_loss),
        cmocka_unit_test(release_is_the_point_of_no_return),
        cmocka_unit_test(hands_the_guest_over_by_release_alone),
        cmocka_unit_test(done_means_that_every_page_arrived),
        cmocka_unit_test(cancels_before_release_only),
        cmocka_unit_test(every_failure_before_release_returns_the_guest),
        cmocka_unit_test(goes_by_precopy_and_confirming),
        cmocka_unit_test(every_state_is_reached_and_can_end),
        cmocka_unit_test(says_a_thing_once),
        cmocka_unit_test(has_the_ten_public_names),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
