/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The source: device state out, or the guest back.
 *
 *     start ─ configure, getfd, migrate ─► MIGRATING ─ MIGRATION pre-switchover ─► PAUSED
 *     finish ─ migrate-continue ─► FINISHING ─ MIGRATION completed ─► COMPLETED
 *     return ─ migrate_cancel (in FINISHING: its own end) ─ rest ─ cont if need be ─ restore
 * settings
 *
 * The guest stands still from STOP to the destination's `cont`: between them nothing is asked, only
 * events and the one `migrate-continue` travel.
 */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "daemon/memferryd/qemu/preflight.h"
#include "daemon/memferryd/qemu/qemu.h"
#include "lib/util.h"

#define PACE_MS 500u
#define QUIT_MS 15000u

/* ---- start ---- */

static bool migrate_uri(struct vmm *vmm, json_t **out)
{
    *out = json_pack("{s:s}", "uri", "fd:" QEMU_FD_NAME);
    vmm->phase = QEMU_MIGRATING; /* events may come before the answer */
    vmm->migrate_sent = true;
    return true;
}

/*
 * A drive that was plugged in while memory was being copied: what it read into pages that were
 * write-protected then was not seen. From `migrate` on QEMU itself lets nothing be plugged in.
 */
static int no_new_direct_drive(struct vmm *vmm, json_t *value, const char *error,
                               struct mf_error *err)
{
    (void)error;
    const char *drive = vmm->info.direct_io[0] ? NULL : preflight_direct_drive(value);
    if (drive)
        return mf_fail(err, EBUSY,
                       "VM '%s' was given the drive %s, which bypasses the page cache "
                       "(cache.direct=on), while its memory was being copied, and what such a "
                       "drive reads into memory is not seen as written; migrate it again: it will "
                       "go by postcopy alone",
                       vmm->name, drive);
    return STEP_NEXT;
}

static const struct qemu_step start_steps[] = {
    {.command = "query-migrate-capabilities",
     .what = "list its migration capabilities",
     .done = common_keep_capabilities},
    {.command = "query-migrate-parameters",
     .what = "list its migration parameters",
     .done = common_keep_parameters},
    {.command = "migrate-set-capabilities",
     .what = "set its migration capabilities",
     .arguments = common_apply_capabilities},
    {.command = "migrate-set-parameters",
     .what = "set its migration parameters",
     .arguments = common_apply_parameters},
    {.command = "getfd",
     .what = "take the device connection",
     .arguments = common_fd_name,
     .with_fd = true},
    {.command = "query-named-block-nodes",
     .what = "list its drives",
     .arguments = common_flat_nodes,
     .done = no_new_direct_drive},
    {.command = "migrate", .what = "start sending its device state", .arguments = migrate_uri},
    {0},
};

static void started(struct vmm *vmm, const struct mf_error *err)
{
    if (err)
        vmm_fail(vmm, err);
    else if (vmm->phase == QEMU_MIGRATING)
        vmm_arm(vmm->pace, PACE_MS);
}

void outgoing_start(struct vmm *vmm, int device_fd)
{
    if (!vmm_take_fd(vmm, device_fd))
        return;
    vmm->phase = QEMU_STARTING;
    vmm->stopped_told = vmm->migrate_sent = vmm->finish_sent = false;
    vmm->downtime_ms = QEMU_DOWNTIME_FIRST_MS;
    steps_run(vmm, start_steps, started);
}

static bool raised_limit(struct vmm *vmm, json_t **out)
{
    *out = settings_downtime(vmm->downtime_ms);
    return true;
}

static const struct qemu_step pace_steps[] = {
    {.command = "migrate-set-parameters",
     .what = "raise its downtime limit",
     .arguments = raised_limit,
     .may_fail = true},
    {0},
};

static void paced(struct vmm *vmm, const struct mf_error *err)
{
    (void)vmm;
    (void)err;
}

void outgoing_pace(struct vmm *vmm)
{
    if (vmm->phase == QEMU_QUITTING) {
        struct mf_error err;
        mf_fail(
            &err, ETIMEDOUT,
            "QEMU of VM '%s' (process %d) was told to quit and has not done so for %u s; its guest "
            "runs at the destination: end this process by hand",
            vmm->name, (int)vmm->info.pid, QUIT_MS / 1000);
        vmm_fail(vmm, &err);
        return;
    }
    if (vmm->phase != QEMU_MIGRATING || vmm->stopped_told ||
        vmm->downtime_ms >= QEMU_DOWNTIME_MOST_MS)
        return;
    vmm->downtime_ms *= 2;
    if (vmm->downtime_ms > QEMU_DOWNTIME_MOST_MS)
        vmm->downtime_ms = QEMU_DOWNTIME_MOST_MS;
    steps_run(vmm, pace_steps, paced);
    vmm_arm(vmm->pace, PACE_MS);
}

/* ---- finish ---- */

static bool in_pre_switchover(struct vmm *vmm, json_t **out)
{
    (void)vmm;
    *out = json_pack("{s:s}", "state", "pre-switchover");
    return true;
}

static const struct qemu_step finish_steps[] = {
    {.command = "migrate-continue",
     .what = "go on to send its device state",
     .arguments = in_pre_switchover},
    {0},
};

static void finish_sent(struct vmm *vmm, const struct mf_error *err)
{
    /* Success is told by the event; it may have come already. */
    if (err && vmm->phase == QEMU_FINISHING)
        vmm_fail(vmm, err);
}

void outgoing_finish(struct vmm *vmm)
{
    vmm->phase = QEMU_FINISHING;
    vmm->finish_sent = true;
    steps_run(vmm, finish_steps, finish_sent);
}

/* ---- what QEMU tells meanwhile ---- */

static void tell_stopped(struct vmm *vmm)
{
    if (vmm->stopped_told)
        return;
    vmm->stopped_told = true;
    vmm_tell(vmm, VMM_STOPPED, NULL);
}

void outgoing_run_event(struct vmm *vmm, bool running)
{
    if (vmm->phase == QEMU_READY)
        vmm->info.was_running = running; /* an administrator paused or resumed it meanwhile */
    else if (vmm->phase == QEMU_MIGRATING && !running)
        tell_stopped(vmm);
    else if (vmm->phase == QEMU_MIGRATING)
        vmm->stopped_told = false; /* somebody else's stop and cont */
}

void outgoing_migration_event(struct vmm *vmm, const char *status)
{
    bool under_way =
        vmm->phase == QEMU_MIGRATING || vmm->phase == QEMU_PAUSED || vmm->phase == QEMU_FINISHING;
    struct mf_error err;

    if (strcmp(status, "pre-switchover") == 0 && vmm->phase == QEMU_MIGRATING) {
        vmm->phase = QEMU_PAUSED;
        tell_stopped(vmm); /* a guest that was paused stops without a STOP event */
        vmm_tell(vmm, VMM_PAUSED, NULL);
    } else if (strcmp(status, "completed") == 0 && vmm->phase == QEMU_FINISHING) {
        vmm->phase = QEMU_COMPLETED;
        vmm_tell(vmm, VMM_COMPLETED, NULL);
    } else if (strcmp(status, "completed") == 0 && under_way) {
        mf_fail(&err, EIO,
                "QEMU of VM '%s' completed its migration without being told to: somebody else sent "
                "migrate-continue",
                vmm->name);
        vmm_fail(vmm, &err);
    } else if (strcmp(status, "failed") == 0 && under_way) {
        common_failed(vmm);
    } else if (strcmp(status, "cancelled") == 0 && under_way) {
        mf_fail(&err, ECANCELED, "somebody else cancelled the migration on the monitor of VM '%s'",
                vmm->name);
        vmm_fail(vmm, &err);
    }
}

/* ---- return ---- */

static bool if_migrate_sent(struct vmm *vmm, json_t **out)
{
    (void)out;
    return vmm->migrate_sent;
}

/* A cancel that comes just when QEMU's migration thread enters pre-switchover does not wake the
 * thread: it sleeps on in state "cancelling", the guest stopped, for ever (seen with 7.2 by calling
 * a guest back at random moments; migration_maybe_pause() looks at the state and then sleeps,
 * without a lock around the two). migrate-continue wakes it whatever the state, if it is told the
 * right one. To a thread that does not sleep it does nothing. */
#define NUDGE_WAITS 5u

static void nudge(struct vmm *vmm)
{
    qmp_send(vmm->qmp, "migrate-continue", json_pack("{s:s}", "state", "cancelling"), -1, NULL,
             NULL);
}

/* QEMU's migration is over one way or the other, or was never begun. */
static bool is_at_rest(const char *status)
{
    static const char *const states[] = {"none", "cancelled", "failed", "completed"};
    for (size_t i = 0; status && i < sizeof(states) / sizeof(states[0]); i++)
        if (strcmp(status, states[i]) == 0)
            return true;
    return status == NULL;
}

static int at_rest(struct vmm *vmm, json_t *value, const char *error, struct mf_error *err)
{
    (void)error;
    (void)err;
    const char *status = json_string_value(json_object_get(value, "status"));
    if (is_at_rest(status))
        return STEP_NEXT;
    if (strcmp(status, "cancelling") == 0 && ++vmm->cancel_waits % NUDGE_WAITS == 0)
        nudge(vmm);
    return STEP_WAIT;
}

/* Once the device state is on its way the migration shall rather end by itself, well or badly,
 * within milliseconds: QEMU 7.2, cancelled in that state, at times goes on running the guest with
 * its disks inactivated, and the guest's next write (or the next migration) then ends it by an
 * assertion. Only a stalled peer makes this wait long. */
#define OWN_END_NS UINT64_C(3000000000)

static bool if_finish_sent(struct vmm *vmm, json_t **out)
{
    (void)out;
    return vmm->finish_sent;
}

static int ended_by_itself(struct vmm *vmm, json_t *value, const char *error, struct mf_error *err)
{
    (void)error;
    (void)err;
    bool late = mf_now_ns() - vmm->return_since_ns > OWN_END_NS;
    return late || is_at_rest(json_string_value(json_object_get(value, "status"))) ? STEP_NEXT
                                                                                   : STEP_WAIT;
}

/* What the guest does now. The run state is set a moment after the migration's status: until then
 * it is finish-migrate. */
static int run_state(struct vmm *vmm, json_t *value, const char *error, struct mf_error *err)
{
    (void)error;
    (void)err;
    const char *state = json_string_value(json_object_get(value, "status"));
    if (state && strcmp(state, "finish-migrate") == 0)
        return STEP_WAIT;
    bool running = json_is_true(json_object_get(value, "running")) ||
                   (state && strcmp(state, "suspended") == 0);
    /* `cont` also activates the disks, which is no harm where they are active. */
    vmm->must_continue = vmm->info.was_running && (!running || vmm->finish_sent);
    return STEP_NEXT;
}

static bool if_must_continue(struct vmm *vmm, json_t **out)
{
    (void)out;
    return vmm->must_continue;
}

static bool undo_capabilities(struct vmm *vmm, json_t **out)
{
    *out = json_incref(vmm->capabilities.undo);
    return *out != NULL;
}

static bool undo_parameters(struct vmm *vmm, json_t **out)
{
    *out = json_incref(vmm->parameters.undo);
    return *out != NULL;
}

/* The settings may be refused for a moment: QEMU's migration thread ends a little after its status
 * says so, and until then "a migration is in progress". */
static const struct qemu_step return_steps[] = {
    {.command = "query-migrate",
     .what = "come to the end of its migration",
     .arguments = if_finish_sent,
     .done = ended_by_itself},
    {.command = "migrate_cancel",
     .what = "cancel its migration",
     .arguments = if_migrate_sent,
     .may_fail = true},
    {.command = "query-migrate", .what = "come to the end of its migration", .done = at_rest},
    {.command = "query-status", .what = "come to the end of its migration", .done = run_state},
    {.command = "cont",
     .what = "let the guest go on",
     .arguments = if_must_continue,
     .done = common_until_accepted,
     .may_fail = true},
    {.command = "migrate-set-capabilities",
     .what = "put back its migration capabilities (the guest is back, though)",
     .arguments = undo_capabilities,
     .done = common_until_accepted,
     .may_fail = true},
    {.command = "migrate-set-parameters",
     .what = "put back its migration parameters (the guest is back, though)",
     .arguments = undo_parameters,
     .done = common_until_accepted,
     .may_fail = true},
    {.command = "closefd",
     .what = "close the device connection",
     .arguments = common_fd_name,
     .may_fail = true},
    {0},
};

static void returned(struct vmm *vmm, const struct mf_error *err)
{
    if (err) {
        vmm_fail(vmm, err);
        return;
    }
    settings_change_clear(&vmm->capabilities);
    settings_change_clear(&vmm->parameters);
    vmm->migrate_sent = vmm->finish_sent = false;
    vmm->phase = QEMU_READY;
    vmm_tell(vmm, VMM_RETURNED, NULL);
}

void outgoing_return(struct vmm *vmm)
{
    vmm->phase = QEMU_RETURNING;
    vmm->cancel_waits = 0;
    vmm->return_since_ns = mf_now_ns();
    event_del(vmm->pace);
    vmm_drop_fd(vmm);
    steps_run(vmm, return_steps, returned);
}

/* ---- quit ---- */

static const struct qemu_step quit_steps[] = {
    {.command = "quit", .what = "quit"},
    {0},
};

static void quit_sent(struct vmm *vmm, const struct mf_error *err)
{
    if (err)
        vmm_fail(vmm, err); /* else its end is what is waited for */
}

void outgoing_quit(struct vmm *vmm)
{
    vmm->phase = QEMU_QUITTING;
    vmm_arm(vmm->pace, QUIT_MS);
    steps_run(vmm, quit_steps, quit_sent);
}
