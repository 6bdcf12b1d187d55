/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/memferryd/qemu/qemu.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "lib/log.h"

/* ---- life ---- */

static void vmm_free(struct vmm *vmm)
{
    qmp_close(vmm->qmp);
    if (vmm->later)
        event_free(vmm->later);
    if (vmm->pace)
        event_free(vmm->pace);
    if (vmm->run.timer)
        event_free(vmm->run.timer);
    vmm_drop_fd(vmm);
    settings_change_clear(&vmm->capabilities);
    settings_change_clear(&vmm->parameters);
    json_decref(vmm->probe);
    free(vmm->info.backends);
    free(vmm);
}

void vmm_hold(struct vmm *vmm)
{
    vmm->users++;
}

void vmm_release(struct vmm *vmm)
{
    if (--vmm->users == 0 && vmm->closed)
        vmm_free(vmm);
}

void vmm_arm(struct event *timer, unsigned delay_ms)
{
    struct timeval tv = {.tv_sec = delay_ms / 1000, .tv_usec = (delay_ms % 1000) * 1000};
    event_add(timer, &tv);
}

/* ---- telling ---- */

void vmm_tell(struct vmm *vmm, enum vmm_event event, const char *detail)
{
    if (!vmm->closed)
        vmm->callbacks.event(vmm->callbacks.arg, event, detail);
}

void vmm_tell_later(struct vmm *vmm, enum vmm_event event, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    if (fmt)
        vsnprintf(vmm->later_text, sizeof(vmm->later_text), fmt, ap);
    va_end(ap);
    vmm->later_event = event;
    vmm_arm(vmm->later, 0);
}

static void on_later(evutil_socket_t fd, short what, void *arg)
{
    (void)fd;
    (void)what;
    struct vmm *vmm = arg;
    vmm_hold(vmm);
    vmm_tell(vmm, vmm->later_event, vmm->later_event == VMM_FAILED ? vmm->later_text : NULL);
    vmm_release(vmm);
}

void vmm_fail(struct vmm *vmm, const struct mf_error *err)
{
    steps_stop(vmm);
    event_del(vmm->pace);
    vmm->phase = QEMU_FAILED;
    vmm_tell(vmm, VMM_FAILED, err->text);
}

/* ---- what comes from the monitor ---- */

static void on_ready(void *arg)
{
    struct vmm *vmm = arg;
    vmm_hold(vmm);
    probe_start(vmm);
    vmm_release(vmm);
}

static void on_event(void *arg, const char *name, json_t *data)
{
    struct vmm *vmm = arg;
    bool source = vmm->role == VMM_SOURCE;
    vmm_hold(vmm);
    if (strcmp(name, "MIGRATION") == 0) {
        const char *status = json_string_value(json_object_get(data, "status"));
        mf_log(MF_LOG_DEBUG, "%s: QEMU migration status %s", vmm->name, status ? status : "?");
        if (status)
            (source ? outgoing_migration_event : incoming_migration_event)(vmm, status);
    } else if (strcmp(name, "STOP") == 0 || strcmp(name, "RESUME") == 0) {
        mf_log(MF_LOG_DEBUG, "%s: QEMU event %s", vmm->name, name);
        (source ? outgoing_run_event : incoming_run_event)(vmm, strcmp(name, "RESUME") == 0);
    }
    vmm_release(vmm);
}

static void on_down(void *arg, const char *why)
{
    struct vmm *vmm = arg;
    enum qemu_phase phase = vmm->phase;
    struct mf_error err;

    vmm_hold(vmm);
    vmm->phase = QEMU_DOWN;
    vmm->run.steps = NULL;
    event_del(vmm->run.timer);
    event_del(vmm->pace);
    switch (phase) {
    case QEMU_PROBING:
        vmm->callbacks.probed(vmm->callbacks.arg, NULL, why);
        break;
    case QEMU_QUITTING:
        vmm_tell(vmm, VMM_GONE, NULL);
        break;
    case QEMU_LISTENING: /* QEMU before 9.1 exits when it can't load what it is sent */
        mf_fail(&err, EIO, "%s; it was receiving its device state: what QEMU printed last says why",
                why);
        vmm_tell(vmm, VMM_FAILED, err.text);
        break;
    default:
        vmm_tell(vmm, VMM_FAILED, why);
    }
    vmm_release(vmm);
}

static void on_pace(evutil_socket_t fd, short what, void *arg)
{
    (void)fd;
    (void)what;
    struct vmm *vmm = arg;
    vmm_hold(vmm);
    outgoing_pace(vmm);
    vmm_release(vmm);
}

/* ---- the table ---- */

static int qemu_open(struct event_base *base, const char *vm_name, const struct vmm_target *target,
                     enum vmm_role role, const struct vmm_callbacks *callbacks, struct vmm **out,
                     struct mf_error *err)
{
    struct vmm *vmm = calloc(1, sizeof(*vmm));
    if (!vmm)
        return mf_fail(err, ENOMEM, "out of memory for VM '%s'", vm_name);
    vmm->base = base;
    vmm->callbacks = *callbacks;
    vmm->role = role;
    vmm->device_fd = -1;
    snprintf(vmm->name, sizeof(vmm->name), "%s", vm_name);
    vmm->later = event_new(base, -1, 0, on_later, vmm);
    vmm->pace = event_new(base, -1, 0, on_pace, vmm);
    vmm->run.timer = event_new(base, -1, 0, steps_on_timer, vmm);
    int rc = 0;
    if (!vmm->later || !vmm->pace || !vmm->run.timer)
        rc = mf_fail(err, ENOMEM, "out of memory for VM '%s'", vm_name);
    struct qmp_callbacks monitor = {
        .ready = on_ready, .event = on_event, .down = on_down, .arg = vmm};
    if (!rc)
        rc = qmp_open(base, vmm->name, target->qmp_path, &monitor, &vmm->qmp, err);
    if (rc) {
        vmm_free(vmm);
        return rc;
    }
    *out = vmm;
    return 0;
}

/* A table's function can do nothing when the monitor is gone. */
static bool down(struct vmm *vmm, const char *what)
{
    if (vmm->phase != QEMU_DOWN)
        return false;
    vmm_tell_later(vmm, VMM_FAILED,
                   "QEMU of VM '%s' can't be told to %s: its QMP connection has ended", vmm->name,
                   what);
    return true;
}

static void qemu_start_outgoing(struct vmm *vmm, int device_fd)
{
    if (!down(vmm, "send its device state"))
        outgoing_start(vmm, device_fd);
}

static void qemu_finish_outgoing(struct vmm *vmm)
{
    if (!down(vmm, "go on sending its device state"))
        outgoing_finish(vmm);
}

static void qemu_return_guest(struct vmm *vmm)
{
    if (!down(vmm, "let the guest go on"))
        outgoing_return(vmm);
}

static void qemu_quit(struct vmm *vmm)
{
    if (vmm->phase == QEMU_DOWN)
        vmm_tell_later(vmm, VMM_GONE, NULL);
    else
        outgoing_quit(vmm);
}

static void qemu_start_incoming(struct vmm *vmm, int device_fd)
{
    if (!down(vmm, "load its device state"))
        incoming_start(vmm, device_fd);
}

static void qemu_resume(struct vmm *vmm, bool run)
{
    if (!down(vmm, "run the guest"))
        incoming_resume(vmm, run);
}

static void qemu_close(struct vmm *vmm)
{
    if (!vmm)
        return;
    vmm->closed = true;
    qmp_close(vmm->qmp);
    vmm->qmp = NULL;
    event_del(vmm->later);
    event_del(vmm->pace);
    event_del(vmm->run.timer);
    if (vmm->users == 0)
        vmm_free(vmm);
}

const struct vmm_ops vmm_qemu = {
    .name = "qemu",
    .noun = "VM",
    .open = qemu_open,
    .start_outgoing = qemu_start_outgoing,
    .finish_outgoing = qemu_finish_outgoing,
    .return_guest = qemu_return_guest,
    .quit = qemu_quit,
    .start_incoming = qemu_start_incoming,
    .resume = qemu_resume,
    .close = qemu_close,
};
