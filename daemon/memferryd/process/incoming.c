/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Destination: load. */
#include "daemon/memferryd/process/process.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "lib/log.h"

void process_loaded(struct vmm *vmm)
{
    if (vmm->command_ended && vmm->relay_ended)
        process_stop(vmm, PROCESS_HOLDING_LOADED, PROCESS_STOP_MS);
}

static void on_loaded_bytes(void *arg, int error, uint64_t passed_bytes)
{
    struct vmm *vmm = arg;
    struct mf_error err;
    process_hold(vmm);
    mf_log(MF_LOG_DEBUG, "%s: %llu bytes of state", vmm->name, (unsigned long long)passed_bytes);
    vmm->relay_ended = true;
    if (error) {
        mf_fail(&err, error, "the state of %s could not be received: %s", vmm->name,
                strerror(error));
        process_fail(vmm, &err);
    } else {
        relay_free(vmm->relay); /* the load command's input ends */
        vmm->relay = NULL;
        process_loaded(vmm);
    }
    process_release(vmm);
}

static void on_state(evutil_socket_t fd, short what, void *arg)
{
    struct vmm *vmm = arg;
    struct mf_error err;
    int pipe_fds[2];
    (void)fd;
    (void)what;
    process_hold(vmm);
    event_free(vmm->state_event);
    vmm->state_event = NULL;
    vmm->phase = PROCESS_LOADING;
    vmm->relay_ended = false;
    if (pipe2(pipe_fds, O_CLOEXEC) != 0) {
        mf_fail(&err, errno, "cannot make a pipe for the state of %s: %s", vmm->name,
                strerror(errno));
        process_fail(vmm, &err);
        process_release(vmm);
        return;
    }
    int r = process_command(vmm, "load", vmm->load, pipe_fds[0], -1, &err);
    close(pipe_fds[0]);
    int device = vmm->device_fd;
    vmm->device_fd = -1;
    vmm->relay = relay_start(vmm->base, device, pipe_fds[1], true, on_loaded_bytes, vmm);
    if (r == 0 && !vmm->relay)
        r = mf_fail(&err, ENOMEM, "out of memory for the state of %s", vmm->name);
    if (r < 0)
        process_fail(vmm, &err);
    process_release(vmm);
}

void process_begin_listening(struct vmm *vmm)
{
    struct mf_error err;
    struct command_order none = process_order(vmm, "resume", "");
    int r = vmm->guard ? 0 : guard_start(vmm->base, vmm->pidfd, &none, &vmm->guard, &err);
    vmm->state_event = event_new(vmm->base, vmm->device_fd, EV_READ, on_state, vmm);
    if (r == 0 && (!vmm->state_event || event_add(vmm->state_event, NULL) != 0))
        r = mf_fail(&err, ENOMEM, "out of memory for the state of %s", vmm->name);
    if (r < 0)
        process_fail(vmm, &err);
    else
        process_tell(vmm, VMM_INCOMING, NULL);
}
