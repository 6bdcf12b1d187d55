/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Source: pause, save. */
#include "daemon/memferryd/process/process.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "lib/log.h"

void process_pause_done(struct vmm *vmm)
{
    struct mf_error err;
    if (process_recheck(vmm, &err) < 0) {
        process_fail(vmm, &err);
        return;
    }
    vmm->phase = PROCESS_PAUSED;
    process_tell(vmm, VMM_PAUSED, NULL);
}

void process_begin_pause(struct vmm *vmm)
{
    struct mf_error err;
    struct command_order resume = process_order(vmm, "resume", vmm->resume ? vmm->resume : "");
    if (!vmm->guard && guard_start(vmm->base, vmm->pidfd, &resume, &vmm->guard, &err) < 0) {
        process_fail(vmm, &err);
        return;
    }
    /* What the destination was told of it by now has to be true still, and so has what is to be
     * undone. */
    if ((mf_process_run(vmm->pid) != MF_RUN_STOPPED) != vmm->info.was_running) {
        mf_fail(&err, EBUSY, "%s (pid %d) was %s since the migration began: try again",
                vmm->info.version, (int)vmm->pid,
                vmm->info.was_running ? "stopped (SIGSTOP)" : "let go on (SIGCONT)");
        process_fail(vmm, &err);
        return;
    }
    vmm->paused = vmm->info.was_running;
    guard_return(vmm->guard, vmm->paused);
    process_tell(vmm, VMM_STOPPED, NULL);
    if (vmm->closed || vmm->phase != PROCESS_PAUSING)
        return;
    if (!vmm->pause)
        process_stop(vmm, PROCESS_PAUSING, PROCESS_STOP_MS);
    else if (process_command(vmm, "pause", vmm->pause, -1, -1, &err) < 0)
        process_fail(vmm, &err);
}

void process_saved(struct vmm *vmm)
{
    if (!vmm->command_ended || !vmm->relay_ended)
        return;
    /* All of it is out and was meant to be all: now, and only now, is its end passed on. */
    shutdown(vmm->device_fd, SHUT_WR);
    process_stop(vmm, PROCESS_HOLDING, PROCESS_STOP_MS);
}

static void on_saved_bytes(void *arg, int error, uint64_t passed_bytes)
{
    struct vmm *vmm = arg;
    struct mf_error err;
    process_hold(vmm);
    mf_log(MF_LOG_DEBUG, "%s: %llu bytes of state", vmm->name, (unsigned long long)passed_bytes);
    vmm->relay_ended = true;
    if (error) {
        mf_fail(&err, error, "the state of %s could not be sent: %s", vmm->name, strerror(error));
        process_fail(vmm, &err);
    } else {
        process_saved(vmm);
    }
    process_release(vmm);
}

void process_begin_save(struct vmm *vmm)
{
    struct mf_error err;
    int pipe_fds[2], device = -1;
    if (pipe2(pipe_fds, O_CLOEXEC) != 0) {
        mf_fail(&err, errno, "cannot make a pipe for the state of %s: %s", vmm->name,
                strerror(errno));
        process_fail(vmm, &err);
        return;
    }
    device = fcntl(vmm->device_fd, F_DUPFD_CLOEXEC, 3);
    if (device < 0) {
        mf_fail(&err, errno, "cannot keep the device stream of %s: %s", vmm->name, strerror(errno));
        close(pipe_fds[0]);
        close(pipe_fds[1]);
        process_fail(vmm, &err);
        return;
    }
    vmm->relay_ended = false;
    int r = process_command(vmm, "save", vmm->save, -1, pipe_fds[1], &err);
    close(pipe_fds[1]);
    vmm->relay = relay_start(vmm->base, pipe_fds[0], device, false, on_saved_bytes, vmm);
    if (r == 0 && !vmm->relay)
        r = mf_fail(&err, ENOMEM, "out of memory for the state of %s", vmm->name);
    if (r < 0)
        process_fail(vmm, &err);
}
