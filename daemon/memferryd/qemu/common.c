/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "daemon/memferryd/qemu/qemu.h"

bool vmm_take_fd(struct vmm *vmm, int fd)
{
    vmm_drop_fd(vmm);
    vmm->device_fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (vmm->device_fd >= 0)
        return true;
    vmm->phase = QEMU_FAILED;
    vmm_tell_later(vmm, VMM_FAILED, "the device connection of VM '%s' can't be duplicated: %s",
                   vmm->name, strerror(errno));
    return false;
}

void vmm_drop_fd(struct vmm *vmm)
{
    if (vmm->device_fd >= 0)
        close(vmm->device_fd);
    vmm->device_fd = -1;
}

int common_keep_capabilities(struct vmm *vmm, json_t *value, const char *error,
                             struct mf_error *err)
{
    (void)error;
    (void)err;
    settings_change_clear(&vmm->capabilities);
    vmm->capabilities = settings_capabilities(value);
    return STEP_NEXT;
}

int common_keep_parameters(struct vmm *vmm, json_t *value, const char *error, struct mf_error *err)
{
    (void)error;
    (void)err;
    settings_change_clear(&vmm->parameters);
    vmm->parameters = settings_parameters(value);
    return STEP_NEXT;
}

bool common_apply_capabilities(struct vmm *vmm, json_t **out)
{
    *out = json_incref(vmm->capabilities.apply);
    return *out != NULL;
}

bool common_apply_parameters(struct vmm *vmm, json_t **out)
{
    *out = json_incref(vmm->parameters.apply);
    return *out != NULL;
}

bool common_fd_name(struct vmm *vmm, json_t **out)
{
    (void)vmm;
    *out = json_pack("{s:s}", "fdname", QEMU_FD_NAME);
    return true;
}

int common_until_accepted(struct vmm *vmm, json_t *value, const char *error, struct mf_error *err)
{
    (void)vmm;
    (void)value;
    (void)err;
    return error ? STEP_WAIT : STEP_NEXT;
}

static int failure_reason(struct vmm *vmm, json_t *value, const char *error, struct mf_error *err)
{
    const char *desc = json_string_value(json_object_get(value, "error-desc"));
    const char *reason = desc ? desc : error;
    return mf_fail(err, EIO, "QEMU of VM '%s' could not %s its device state: %s", vmm->name,
                   vmm->role == VMM_SOURCE ? "send" : "load",
                   reason ? reason : "it gives no reason; its own log may");
}

static const struct qemu_step failure_steps[] = {
    {.command = "query-migrate",
     .what = "tell why its migration failed",
     .done = failure_reason,
     .may_fail = true},
    {0},
};

void common_failed(struct vmm *vmm)
{
    steps_run(vmm, failure_steps, vmm_fail);
}

bool common_flat_nodes(struct vmm *vmm, json_t **out)
{
    (void)vmm;
    *out = json_pack("{s:b}", "flat", 1);
    return true;
}
