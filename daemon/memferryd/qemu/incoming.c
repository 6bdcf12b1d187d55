/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The destination: device state in, then the guest runs when it is told to.
 *
 *     start ─ configure, stop, getfd, migrate-incoming ─► LISTENING ─ MIGRATION completed ─► LOADED
 *     resume ─ cont ─► RUNNING
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/memferryd/qemu/qemu.h"

/* Since 9.1 QEMU can be asked not to exit when it can't load what comes, so that it tells why. */
static bool knows_exit_on_error(const struct vmm *vmm)
{
    json_t *qemu = json_object_get(qmp_version(vmm->qmp), "qemu");
    json_int_t release = 100 * json_integer_value(json_object_get(qemu, "major")) +
                         json_integer_value(json_object_get(qemu, "minor"));
    return release >= 901;
}

static bool incoming_uri(struct vmm *vmm, json_t **out)
{
    *out = json_pack("{s:s}", "uri", "fd:" QEMU_FD_NAME);
    if (knows_exit_on_error(vmm))
        json_object_set_new(*out, "exit-on-error", json_false());
    return true;
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
    /* While it waits for a migration, `stop` means: don't start the guest by yourself when it has
     * come. So a missing -S can't make two guests run. */
    {.command = "stop", .what = "promise to leave the guest paused"},
    {.command = "getfd",
     .what = "take the device connection",
     .arguments = common_fd_name,
     .with_fd = true},
    {.command = "migrate-incoming",
     .what = "listen for the device state",
     .arguments = incoming_uri},
    {0},
};

static void started(struct vmm *vmm, const struct mf_error *err)
{
    if (err)
        vmm_fail(vmm, err);
    else
        vmm_tell(vmm, VMM_INCOMING, NULL);
}

void incoming_start(struct vmm *vmm, int device_fd)
{
    if (!vmm_take_fd(vmm, device_fd))
        return;
    vmm->phase = QEMU_LISTENING;
    steps_run(vmm, start_steps, started);
}

static const struct qemu_step resume_steps[] = {
    {.command = "cont",
     .what = "let the guest run",
     .done = common_until_accepted,
     .may_fail = true},
    {0},
};

static void resumed(struct vmm *vmm, const struct mf_error *err)
{
    if (err) {
        vmm_fail(vmm, err);
        return;
    }
    vmm->phase = QEMU_RUNNING;
    vmm_tell(vmm, VMM_RUNNING, NULL);
}

void incoming_resume(struct vmm *vmm, bool run)
{
    if (!run) {
        vmm->phase = QEMU_RUNNING;
        vmm_tell_later(vmm, VMM_RUNNING, NULL);
        return;
    }
    vmm->phase = QEMU_RESUMING;
    steps_run(vmm, resume_steps, resumed);
}

void incoming_run_event(struct vmm *vmm, bool running)
{
    if (!running || vmm->phase != QEMU_RESUMING)
        return;
    /* The event is out before the answer to `cont`. */
    steps_stop(vmm);
    resumed(vmm, NULL);
}

void incoming_migration_event(struct vmm *vmm, const char *status)
{
    if (vmm->phase != QEMU_LISTENING)
        return;
    if (strcmp(status, "completed") == 0) {
        vmm->phase = QEMU_LOADED;
        vmm_tell(vmm, VMM_LOADED, NULL);
    } else if (strcmp(status, "failed") == 0) {
        common_failed(vmm);
    }
}
