/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The adapter for a process that is no known VMM. Four commands of the operator's know the program:
 *
 *     source:      pause ─ save ─ [stopped] ─ RELEASE ─ ended by SIGKILL
 *     destination:              load ─ [stopped] ─ RELEASE ─ resume
 *     return:      (whatever ran is killed) ─ [goes on] ─ resume
 *
 * [stopped]: from the moment that the state has been saved here, and loaded there, the process is
 * held by SIGSTOP: whatever a command forgot, the program runs nowhere until it is known where. The
 * one that is let go goes on by SIGCONT, and then its resume command is run. Without a pause
 * command the program is paused by that SIGSTOP.
 *
 * The state is what the save command writes and the load command reads. Its end is passed on only
 * when it is known to be the end: at the source when the save command has ended with 0, between the
 * movers by a count (tunnel.c), here when the device stream ends. So a load command that sees its
 * input end has all of it; else it is killed.
 */
#include "daemon/memferryd/process/process.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "lib/log.h"
#include "lib/proc_stat.h"
#include "lib/util.h"

#define STOP_LOOK_MS 1u
/* A process that can't be resumed is tried again: its work stands still meanwhile. */
#define RETURN_TRIES 5u
#define RETURN_AGAIN_MS 1000u

void process_hold(struct vmm *vmm)
{
    vmm->users++;
}

static void vmm_free(struct vmm *vmm)
{
    if (vmm->tick)
        event_free(vmm->tick);
    if (vmm->pidfd >= 0)
        close(vmm->pidfd);
    free(vmm->pause);
    free(vmm->save);
    free(vmm->load);
    free(vmm->resume);
    free(vmm->choices);
    free(vmm->files);
    free(vmm->info.backends);
    free(vmm);
}

void process_release(struct vmm *vmm)
{
    if (--vmm->users == 0 && vmm->closed)
        vmm_free(vmm);
}

void process_tell(struct vmm *vmm, enum vmm_event event, const char *detail)
{
    if (!vmm->closed)
        vmm->callbacks.event(vmm->callbacks.arg, event, detail);
}

void process_again_in(struct vmm *vmm, unsigned ms)
{
    const struct timeval wait = {.tv_sec = (time_t)(ms / 1000),
                                 .tv_usec = (suseconds_t)(ms % 1000) * 1000};
    event_add(vmm->tick, &wait);
}

static void close_device(struct vmm *vmm)
{
    if (vmm->state_event)
        event_free(vmm->state_event);
    vmm->state_event = NULL;
    if (vmm->device_fd >= 0)
        close(vmm->device_fd);
    vmm->device_fd = -1;
}

/* Nothing of what was begun goes on; a command is killed, and still has to end. The source's
 * device stream stays open, or else its end would be passed on as the end of the state. */
static void drop_work(struct vmm *vmm)
{
    /* First, or else it would see its input end before it is killed. */
    if (vmm->command)
        command_kill(vmm->command);
    relay_free(vmm->relay);
    vmm->relay = NULL;
    if (vmm->role == VMM_DESTINATION)
        close_device(vmm);
    event_del(vmm->tick);
}

void process_fail(struct vmm *vmm, const struct mf_error *err)
{
    drop_work(vmm);
    vmm->phase = PROCESS_FAILED;
    process_tell(vmm, VMM_FAILED, err->text);
}

/* ---- signals ---- */

static int signal_target(struct vmm *vmm, int number)
{
    return syscall(SYS_pidfd_send_signal, vmm->pidfd, number, NULL, 0) == 0 ? 0 : -errno;
}

void process_stop(struct vmm *vmm, enum process_phase phase, unsigned limit_ms)
{
    vmm->phase = phase;
    vmm->held = true;
    vmm->stop_ms = limit_ms;
    vmm->stop_deadline_ns = mf_now_ns() + limit_ms * UINT64_C(1000000);
    signal_target(vmm, SIGSTOP); /* one that is gone shows as such */
    process_again_in(vmm, 0);
}

void process_let_go(struct vmm *vmm)
{
    if (vmm->held)
        signal_target(vmm, SIGCONT);
    vmm->held = false;
}

/* ---- commands ---- */

static void on_command(void *arg, const struct mf_error *why);

struct command_order process_order(struct vmm *vmm, const char *word, const char *text)
{
    snprintf(vmm->word_text, sizeof(vmm->word_text), "MEMFERRY_COMMAND=%s", word);
    return (struct command_order){.session = vmm->name,
                                  .word = word,
                                  .text = text,
                                  .environment = vmm->environment,
                                  .stdin_fd = -1,
                                  .stdout_fd = -1,
                                  .timeout_ms = vmm->timeout_ms};
}

int process_command(struct vmm *vmm, const char *word, const char *text, int stdin_fd,
                    int stdout_fd, struct mf_error *err)
{
    struct command_order what = process_order(vmm, word, text);
    what.stdin_fd = stdin_fd;
    what.stdout_fd = stdout_fd;
    vmm->command_ended = false;
    int r = command_start(vmm->base, &what, on_command, vmm, &vmm->command, err);
    /* The way on after RELEASE is right whatever becomes of memferryd. */
    if (r == 0 && vmm->guard && vmm->phase != PROCESS_RESUMING)
        guard_command(vmm->guard, command_group(vmm->command));
    return r;
}

/* ---- resume, at either end ---- */

static void going(struct vmm *vmm)
{
    if (vmm->role == VMM_SOURCE) {
        vmm->paused = false;
        if (vmm->guard)
            guard_return(vmm->guard, false);
        vmm->phase = PROCESS_READY;
        process_tell(vmm, VMM_RETURNED, NULL);
    } else {
        vmm->phase = PROCESS_RUNNING;
        process_tell(vmm, VMM_RUNNING, NULL);
    }
}

static void not_going(struct vmm *vmm, const struct mf_error *why)
{
    struct mf_error err;
    if (vmm->role == VMM_SOURCE && ++vmm->return_tries < RETURN_TRIES) {
        mf_log(MF_LOG_WARNING, "%s: %s; trying again", vmm->name, why->text);
        process_again_in(vmm, RETURN_AGAIN_MS);
        return;
    }
    if (vmm->role == VMM_DESTINATION) {
        process_fail(vmm, why); /* the session tries again for as long as it takes */
        return;
    }
    guard_return(vmm->guard, false); /* it would only fail as often */
    mf_fail(&err, why->code,
            "%s; %s (pid %d) was to go on here and may still be paused: resume it by hand",
            why->text, vmm->info.version, (int)vmm->pid);
    process_fail(vmm, &err);
}

static void begin_resume(struct vmm *vmm)
{
    struct mf_error err;
    if (vmm->role == VMM_SOURCE && !vmm->paused) {
        going(vmm);
        return;
    }
    process_let_go(vmm);
    if (!vmm->resume)
        going(vmm);
    else if (process_command(vmm, "resume", vmm->resume, -1, -1, &err) < 0)
        not_going(vmm, &err);
}

/* ---- what comes from the event loop ---- */

static void on_command(void *arg, const struct mf_error *why)
{
    struct vmm *vmm = arg;
    process_hold(vmm);
    vmm->command = NULL;
    vmm->command_ended = true;
    if (vmm->guard)
        guard_command(vmm->guard, 0);
    if (vmm->phase == PROCESS_RETURNING && vmm->return_tries == 0) {
        /* What was killed is over; now the way back. */
        vmm->return_tries = 1;
        begin_resume(vmm);
    } else if (vmm->phase == PROCESS_RETURNING || vmm->phase == PROCESS_RESUMING) {
        if (why)
            not_going(vmm, why);
        else
            going(vmm);
    } else if (why) {
        process_fail(vmm, why);
    } else if (vmm->phase == PROCESS_PAUSING) {
        process_pause_done(vmm);
    } else if (vmm->phase == PROCESS_SAVING) {
        process_saved(vmm);
    } else if (vmm->phase == PROCESS_LOADING) {
        process_loaded(vmm);
    }
    process_release(vmm);
}

/* Has every thread stopped? */
static void look_whether_stopped(struct vmm *vmm)
{
    struct mf_error err;
    enum mf_run run_state = mf_process_run(vmm->pid);
    if (run_state == MF_RUN_GONE)
        return; /* the session sees its end by itself */
    if (run_state == MF_RUN_RUNNING && mf_now_ns() < vmm->stop_deadline_ns) {
        process_again_in(vmm, STOP_LOOK_MS);
        return;
    }
    if (run_state == MF_RUN_RUNNING) {
        mf_fail(&err, ETIMEDOUT,
                "%s (pid %d) did not stop within %u ms of SIGSTOP: a thread is in a system call "
                "that can't be left, in vfork(2), or held by a debugger",
                vmm->info.version, (int)vmm->pid, vmm->stop_ms);
        if (vmm->phase == PROCESS_ARMING)
            process_answer_probe(vmm, &err);
        else
            process_fail(vmm, &err);
        return;
    }
    if (vmm->phase == PROCESS_ARMING) {
        process_probe_still(vmm);
        return;
    }
    if (vmm->phase == PROCESS_PAUSING) {
        process_pause_done(vmm);
        return;
    }
    if (process_recheck(vmm, &err) < 0) {
        process_fail(vmm, &err);
        return;
    }
    bool source = vmm->phase == PROCESS_HOLDING;
    vmm->phase = source ? PROCESS_COMPLETED : PROCESS_LOADED;
    process_tell(vmm, source ? VMM_COMPLETED : VMM_LOADED, NULL);
}

static void on_tick(evutil_socket_t fd, short what, void *arg)
{
    struct vmm *vmm = arg;
    (void)fd;
    (void)what;
    process_hold(vmm);
    switch (vmm->phase) {
    case PROCESS_PROBING:
        process_probe(vmm);
        break;
    case PROCESS_PAUSING:
        if (vmm->held)
            look_whether_stopped(vmm);
        else
            process_begin_pause(vmm);
        break;
    case PROCESS_ARMING:
    case PROCESS_HOLDING:
    case PROCESS_HOLDING_LOADED:
        look_whether_stopped(vmm);
        break;
    case PROCESS_SAVING:
        process_begin_save(vmm);
        break;
    case PROCESS_LISTENING:
        process_begin_listening(vmm);
        break;
    case PROCESS_RETURNING:
        vmm->return_tries += vmm->return_tries == 0;
        begin_resume(vmm);
        break;
    case PROCESS_RESUMING:
        if (vmm->command)
            process_again_in(vmm, STOP_LOOK_MS);
        else
            begin_resume(vmm);
        break;
    case PROCESS_RUNNING: /* it was not to run */
        process_tell(vmm, VMM_RUNNING, NULL);
        break;
    case PROCESS_QUITTING:
        process_tell(vmm, VMM_GONE, NULL);
        break;
    case PROCESS_FAILED: {
        struct mf_error err;
        mf_fail(&err, EMFILE,
                "cannot keep the device stream of %s: memferryd has no descriptor left", vmm->name);
        process_tell(vmm, VMM_FAILED, err.text);
        break;
    }
    default:
        break;
    }
    process_release(vmm);
}

/* ---- the table ---- */

static int copy_text(char **out, const char *text)
{
    if (!text || !text[0])
        return 0;
    *out = strdup(text);
    return *out ? 0 : -ENOMEM;
}

static int process_open(struct event_base *base, const char *vm_name,
                        const struct vmm_target *target, enum vmm_role role,
                        const struct vmm_callbacks *callbacks, struct vmm **out,
                        struct mf_error *err)
{
    struct vmm *vmm = calloc(1, sizeof(*vmm));
    if (!vmm)
        return mf_fail(err, ENOMEM, "out of memory for process %d", (int)target->pid);
    vmm->base = base;
    vmm->callbacks = *callbacks;
    vmm->role = role;
    vmm->pid = target->pid;
    vmm->device_fd = -1;
    vmm->timeout_ms = target->timeout_s * 1000u;
    vmm->opened_ticks = mf_proc_ticks();
    vmm->stand_still = target->stand_still;
    snprintf(vmm->name, sizeof(vmm->name), "%s", vm_name);
    snprintf(vmm->pid_text, sizeof(vmm->pid_text), "MEMFERRY_PID=%d", (int)vmm->pid);
    snprintf(vmm->session_text, sizeof(vmm->session_text), "MEMFERRY_SESSION=%s", vm_name);
    snprintf(vmm->role_text, sizeof(vmm->role_text), "MEMFERRY_ROLE=%s",
             role == VMM_SOURCE ? "source" : "destination");
    vmm->environment[0] = vmm->pid_text;
    vmm->environment[1] = vmm->session_text;
    vmm->environment[2] = vmm->role_text;
    vmm->environment[3] = vmm->word_text;
    vmm->choices = calloc(target->choice_count ? target->choice_count : 1, sizeof(*vmm->choices));
    vmm->tick = event_new(base, -1, 0, on_tick, vmm);
    vmm->pidfd = (int)syscall(SYS_pidfd_open, vmm->pid, 0);
    int r = 0;
    if (vmm->pid == getpid())
        r = mf_fail(err, EINVAL, "process %d is memferryd itself", (int)vmm->pid);
    else if (vmm->pidfd < 0)
        r = mf_fail(err, errno, "there is no process %d that could be migrated: %s", (int)vmm->pid,
                    strerror(errno));
    else if (!vmm->tick || !vmm->choices || copy_text(&vmm->pause, target->pause) < 0 ||
             copy_text(&vmm->save, target->save) < 0 || copy_text(&vmm->load, target->load) < 0 ||
             copy_text(&vmm->resume, target->resume) < 0)
        r = mf_fail(err, ENOMEM, "out of memory for process %d", (int)vmm->pid);
    else if (role == VMM_SOURCE ? !vmm->save : !vmm->load)
        r = mf_fail(err, EINVAL, "process %d needs a %s command", (int)vmm->pid,
                    role == VMM_SOURCE ? "save" : "load");
    if (r < 0) {
        vmm_free(vmm);
        return r;
    }
    vmm->choice_count = target->choice_count;
    if (target->choice_count)
        memcpy(vmm->choices, target->choices, target->choice_count * sizeof(*vmm->choices));
    process_again_in(vmm, 0);
    *out = vmm;
    return 0;
}

static void process_move_on(struct vmm *vmm)
{
    vmm->phase = PROCESS_READY;
    process_end_standing_still(vmm, vmm->guard);
    vmm->guard = NULL;
}

static void start(struct vmm *vmm, int device_fd, enum process_phase phase)
{
    close_device(vmm);
    vmm->device_fd = fcntl(device_fd, F_DUPFD_CLOEXEC, 3);
    vmm->phase = vmm->device_fd < 0 ? PROCESS_FAILED : phase; /* told by on_tick */
    vmm->return_tries = 0;
    process_again_in(vmm, 0);
}

static void process_start_outgoing(struct vmm *vmm, int device_fd)
{
    start(vmm, device_fd, PROCESS_PAUSING);
}

static void process_finish_outgoing(struct vmm *vmm)
{
    vmm->phase = PROCESS_SAVING;
    process_again_in(vmm, 0);
}

static void process_return_guest(struct vmm *vmm)
{
    drop_work(vmm);
    vmm->phase = PROCESS_RETURNING;
    vmm->return_tries = 0;
    if (!vmm->command) /* else when it has ended */
        process_again_in(vmm, 0);
}

static void process_released(struct vmm *vmm)
{
    vmm->paused = false;
    if (vmm->guard)
        guard_return(vmm->guard, false);
}

/* The process is stopped and never executes another instruction: one that was allowed to clean up
 * would do so with memory that is not its own any more. */
static void process_quit(struct vmm *vmm)
{
    vmm->phase = PROCESS_QUITTING;
    signal_target(vmm, SIGKILL);
    process_again_in(vmm, 0);
}

static void process_start_incoming(struct vmm *vmm, int device_fd)
{
    start(vmm, device_fd, PROCESS_LISTENING);
}

static void process_resume(struct vmm *vmm, bool should_run)
{
    vmm->phase = should_run ? PROCESS_RESUMING : PROCESS_RUNNING;
    process_again_in(vmm, 0);
}

static void process_close(struct vmm *vmm)
{
    if (!vmm)
        return;
    vmm->closed = true;
    drop_work(vmm);
    close_device(vmm);
    command_forget(vmm->command);
    vmm->command = NULL;
    if (vmm->guard)
        guard_command(vmm->guard, 0); /* it is killed */
    if (vmm->phase == PROCESS_ARMING)
        process_end_standing_still(vmm, vmm->guard);
    else
        guard_dismiss(vmm->guard);
    vmm->guard = NULL;
    if (vmm->users == 0)
        vmm_free(vmm);
}

const struct vmm_ops vmm_process = {
    .name = "process",
    .noun = "process",
    .open = process_open,
    .move_on = process_move_on,
    .start_outgoing = process_start_outgoing,
    .finish_outgoing = process_finish_outgoing,
    .return_guest = process_return_guest,
    .released = process_released,
    .quit = process_quit,
    .start_incoming = process_start_incoming,
    .resume = process_resume,
    .close = process_close,
};
