/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "daemon/memferryd/qemu/qemu.h"
#include "lib/util.h"

/* STEP_WAIT asks again after this long, and not for longer than that. */
#define WAIT_STEP_MS 10u
#define PATIENCE_NS UINT64_C(15000000000)
/* A monitor that answers nothing for so long hangs (or its process is stopped). */
#define ANSWER_MS 60000u

static void ask(struct vmm *vmm);

static void end(struct vmm *vmm, const struct mf_error *err)
{
    steps_stop(vmm);
    vmm->run.ended(vmm, err);
}

static void proceed(struct vmm *vmm, int verdict, const struct mf_error *err)
{
    struct qemu_run *run = &vmm->run;
    switch (verdict) {
    case STEP_NEXT:
        run->at++;
        run->deadline_ns = 0;
        run->last_error[0] = '\0';
        ask(vmm);
        return;
    case STEP_AGAIN:
        ask(vmm);
        return;
    case STEP_WAIT:
        if (run->deadline_ns == 0)
            run->deadline_ns = mf_now_ns() + PATIENCE_NS;
        if (mf_now_ns() < run->deadline_ns) {
            run->waits = true;
            vmm_arm(run->timer, WAIT_STEP_MS);
            return;
        }
        struct mf_error late;
        mf_fail(&late, ETIMEDOUT, "QEMU of VM '%s' could not %s within %u s%s%s", vmm->name,
                run->steps[run->at].what, (unsigned)(PATIENCE_NS / 1000000000),
                run->last_error[0] ? ": " : "", run->last_error);
        end(vmm, &late);
        return;
    default:
        end(vmm, err);
    }
}

static void answered(void *arg, json_t *value, const char *error)
{
    struct vmm *vmm = arg;
    const struct qemu_step *step = &vmm->run.steps[vmm->run.at];
    struct mf_error err = {0};
    int verdict = STEP_NEXT;

    vmm_hold(vmm);
    if (!value)
        snprintf(vmm->run.last_error, sizeof(vmm->run.last_error), "%s", error);
    if (!value && !step->may_fail)
        verdict =
            mf_fail(&err, EIO, "QEMU of VM '%s' could not %s: %s", vmm->name, step->what, error);
    else if (step->done)
        verdict = step->done(vmm, value, error, &err);
    if (!vmm->closed)
        proceed(vmm, verdict, &err);
    vmm_release(vmm);
}

/* Ask the present step, or the next one that is not skipped. */
static void ask(struct vmm *vmm)
{
    struct qemu_run *run = &vmm->run;
    for (; run->steps[run->at].command; run->at++) {
        const struct qemu_step *step = &run->steps[run->at];
        json_t *arguments = NULL;
        if (step->arguments && !step->arguments(vmm, &arguments))
            continue;
        qmp_send(vmm->qmp, step->command, arguments, step->with_fd ? vmm->device_fd : -1, answered,
                 vmm);
        if (step->with_fd)
            vmm_drop_fd(vmm);
        run->waits = false;
        vmm_arm(run->timer, ANSWER_MS);
        return;
    }
    end(vmm, NULL);
}

void steps_run(struct vmm *vmm, const struct qemu_step *steps,
               void (*ended)(struct vmm *vmm, const struct mf_error *err))
{
    steps_stop(vmm);
    vmm->run.steps = steps;
    vmm->run.at = 0;
    vmm->run.ended = ended;
    vmm->run.deadline_ns = 0;
    vmm->run.last_error[0] = '\0';
    ask(vmm);
}

void steps_on_timer(evutil_socket_t fd, short what, void *arg)
{
    (void)fd;
    (void)what;
    struct vmm *vmm = arg;
    vmm_hold(vmm);
    if (vmm->run.steps && vmm->run.waits) {
        ask(vmm);
    } else if (vmm->run.steps) {
        struct mf_error err;
        mf_fail(
            &err, ETIMEDOUT,
            "QEMU of VM '%s' has not answered '%s' on its QMP socket for %u s: it hangs, or its "
            "process is stopped",
            vmm->name, vmm->run.steps[vmm->run.at].command, ANSWER_MS / 1000);
        end(vmm, &err);
    }
    vmm_release(vmm);
}

void steps_stop(struct vmm *vmm)
{
    qmp_forget(vmm->qmp);
    event_del(vmm->run.timer);
    vmm->run.steps = NULL;
}
