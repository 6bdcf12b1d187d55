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
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "daemon/memferryd/process/command.h"
#include "daemon/memferryd/process/guard.h"
#include "daemon/memferryd/process/relay.h"
#include "daemon/memferryd/vmm.h"
#include "lib/log.h"
#include "lib/proc_stat.h"
#include "lib/process.h"
#include "lib/util.h"

/* A thread that is told to stop does so at once, unless it is in a system call that can't be left.
 */
#define STOP_LOOK_MS 1u
#define STOP_MS 5000u
#define ARM_STOP_MS 1000u
/* How long a process may have children that share its memory before it is refused. */
#define CHILD_MS 5000u
#define CHILD_LOOK_MS 10u
/* A process that can't be resumed is tried again: its work stands still meanwhile. */
#define RETURN_TRIES 5u
#define RETURN_AGAIN_MS 1000u

enum phase {
    PROBING,
    ARMING, /* stopped for a moment, to be looked at and watched */
    READY,
    PAUSING, /* the pause command, or SIGSTOP, is under way */
    PAUSED,  /* told */
    SAVING,
    HOLDING, /* source: saved; until every thread is stopped */
    COMPLETED,
    RETURNING,
    QUITTING,
    LISTENING, /* destination: until the first byte of state */
    LOADING,
    HOLDING_LOADED,
    LOADED,
    RESUMING,
    RUNNING,
    FAILED,
};

struct vmm {
    struct event_base *base;
    struct vmm_callbacks callbacks;
    char name[64];
    enum vmm_role role;
    enum phase phase;
    pid_t pid;
    int pidfd;
    char *pause, *save, *load, *resume;
    unsigned timeout_ms;
    struct mf_choice *choices;
    unsigned choice_count;
    struct vmm_info info;
    struct mf_file *files;
    size_t file_count;

    unsigned users; /* event-loop handlers at work on this object */
    bool closed;    /* freed when users drops to 0; nothing is told any more */
    struct event *tick;

    struct command *command;
    struct relay *relay;
    struct guard *guard;
    struct event *state_event; /* destination: the state begins to arrive */
    int device_fd;             /* our duplicate, -1: none */
    bool paused;               /* source: something is to be undone to have it run */
    bool held;                 /* SIGSTOP was sent */
    bool command_ended, relay_ended;
    unsigned return_tries;
    uint64_t stop_deadline_ns, child_deadline_ns;
    unsigned stop_ms;
    uint64_t opened_ticks; /* mf_proc_ticks() */
    bool stand_still;

    char pid_text[32], session_text[96], role_text[32], word_text[32];
    const char *environment[5];
};

static void hold(struct vmm *vmm)
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

static void release(struct vmm *vmm)
{
    if (--vmm->users == 0 && vmm->closed)
        vmm_free(vmm);
}

static void tell(struct vmm *vmm, enum vmm_event event, const char *detail)
{
    if (!vmm->closed)
        vmm->callbacks.event(vmm->callbacks.arg, event, detail);
}

static void again_in(struct vmm *vmm, unsigned ms)
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

static void fail(struct vmm *vmm, const struct mf_error *err)
{
    drop_work(vmm);
    vmm->phase = FAILED;
    tell(vmm, VMM_FAILED, err->text);
}

/* ---- signals ---- */

static int signal_target(struct vmm *vmm, int number)
{
    return syscall(SYS_pidfd_send_signal, vmm->pidfd, number, NULL, 0) == 0 ? 0 : -errno;
}

static void begin_hold(struct vmm *vmm, enum phase phase, unsigned limit_ms)
{
    vmm->phase = phase;
    vmm->held = true;
    vmm->stop_ms = limit_ms;
    vmm->stop_deadline_ns = mf_now_ns() + limit_ms * UINT64_C(1000000);
    signal_target(vmm, SIGSTOP); /* one that is gone shows as such */
    again_in(vmm, 0);
}

static void let_go(struct vmm *vmm)
{
    if (vmm->held)
        signal_target(vmm, SIGCONT);
    vmm->held = false;
}

/* ---- commands ---- */

static void on_command(void *arg, const struct mf_error *why);

static struct command_order order(struct vmm *vmm, const char *word, const char *text)
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

static int run(struct vmm *vmm, const char *word, const char *text, int stdin_fd, int stdout_fd,
               struct mf_error *err)
{
    struct command_order what = order(vmm, word, text);
    what.stdin_fd = stdin_fd;
    what.stdout_fd = stdout_fd;
    vmm->command_ended = false;
    int r = command_start(vmm->base, &what, on_command, vmm, &vmm->command, err);
    /* The way on after RELEASE is right whatever becomes of memferryd. */
    if (r == 0 && vmm->guard && vmm->phase != RESUMING)
        guard_command(vmm->guard, command_group(vmm->command));
    return r;
}

/* ---- probing ---- */

/* Files on disks are left alone as a matter of course; one that looks like memory is told of. */
static void note_set_aside(struct vmm *vmm)
{
    vmm->info.set_aside[0] = '\0';
    for (size_t i = vmm->file_count; i-- > 0;) {
        const struct mf_file *file = &vmm->files[i];
        if (file->verdict == MF_FILE_LEFT && file->kind == MF_MEMORY_DAX && file->written_to)
            snprintf(vmm->info.set_aside, sizeof(vmm->info.set_aside),
                     "%.200s is not migrated, nor is any of it pinned: %s", file->path, file->why);
    }
}

static int set_info(struct vmm *vmm, struct mf_error *err)
{
    struct vmm_info *info = &vmm->info;
    info->pid = vmm->pid;
    /* Saving and loading may each take their time, and then threads have to stop. What is set at
     * the destination is not known here. */
    info->state_s = 2 * (vmm->timeout_ms + STOP_MS) / 1000;
    if (mf_process_direct(vmm->pid, info->direct_io, sizeof(info->direct_io)) <= 0)
        info->direct_io[0] = '\0';
    note_set_aside(vmm);
    info->backends = calloc(vmm->file_count + vmm->choice_count + 1, sizeof(*info->backends));
    if (!info->backends)
        return mf_fail(err, ENOMEM, "out of memory");
    for (size_t i = 0; i < vmm->file_count; i++) {
        const struct mf_file *file = &vmm->files[i];
        if (file->verdict != MF_FILE_REGION)
            continue;
        struct vmm_backend *backend = &info->backends[info->backend_count++];
        memcpy(backend->id, file->name, sizeof(backend->id));
        snprintf(backend->path, sizeof(backend->path), "%s", file->path);
        backend->size_bytes = file->size_bytes;
        backend->device = file->device;
        backend->inode = file->inode;
    }
    for (unsigned i = 0; i < vmm->choice_count; i++) {
        const struct mf_choice *choice = &vmm->choices[i];
        if (!mf_choice_private(choice))
            continue;
        struct vmm_backend *backend = &info->backends[info->backend_count++];
        memcpy(backend->id, choice->name, sizeof(backend->id));
        snprintf(backend->path, sizeof(backend->path), "%s", choice->what);
    }
    return 0;
}

/* A child that was forked a moment ago shares the memory and would write to it unseen. Most live
 * for moments. Return: true when there is none, or no more waiting. */
static bool without_child(struct vmm *vmm, struct mf_error *err)
{
    pid_t child = mf_process_child(vmm->pid, vmm->files, vmm->file_count);
    err->code = 0;
    if (child == 0)
        return true;
    if (vmm->child_deadline_ns == 0)
        vmm->child_deadline_ns = mf_now_ns() + CHILD_MS * UINT64_C(1000000);
    if (mf_now_ns() < vmm->child_deadline_ns) {
        again_in(vmm, CHILD_LOOK_MS);
        return false;
    }
    mf_fail(
        err, EBUSY,
        "process %d has a child process (pid %d) that shares the memory of %s; only one process "
        "can be migrated: have it end first",
        (int)vmm->pid, (int)child, vmm->name);
    return true;
}

static void end_standing_still(struct vmm *vmm, struct guard *guard)
{
    let_go(vmm);
    if (guard)
        guard_return(guard, false);
    guard_dismiss(guard);
}

/* Answers the open, and lets the process go again, whatever became of the session. */
static void answer_probe(struct vmm *vmm, const struct mf_error *why)
{
    struct guard *guard = vmm->guard;
    vmm->guard = NULL;
    vmm->phase = why ? FAILED : READY;
    vmm->callbacks.probed(vmm->callbacks.arg, why ? NULL : &vmm->info, why ? why->text : NULL);
    end_standing_still(vmm, guard);
}

/* A process at work changes its layout while it is looked at. And memory that is registered with a
 * userfaultfd by a layout of a moment ago cuts mappings in two, which mremap(2) then refuses to
 * move (EFAULT). So for the moment of arming it stands still. */
static int begin_standing_still(struct vmm *vmm, struct mf_error *err)
{
    struct command_order none = order(vmm, "resume", "");
    int r = guard_start(vmm->base, vmm->pidfd, &none, &vmm->guard, err);
    if (r < 0)
        return r;
    guard_return(vmm->guard, true);
    begin_hold(vmm, ARMING, ARM_STOP_MS);
    return 0;
}

static int look_at_memory(struct vmm *vmm, struct mf_error *err)
{
    free(vmm->files);
    vmm->files = NULL;
    return mf_process_files(vmm->pid, vmm->choices, vmm->choice_count, &vmm->files,
                            &vmm->file_count, err);
}

static void probe(struct vmm *vmm)
{
    struct mf_error err = {0};
    int r = look_at_memory(vmm, &err);
    if (r == 0 && !without_child(vmm, &err))
        return;
    if (r == 0)
        r = -err.code;
    vmm->info.was_running = mf_process_run(vmm->pid) != MF_RUN_STOPPED;
    mf_target_comm(vmm->pid, vmm->info.version, sizeof(vmm->info.version));
    if (r == 0 && vmm->role == VMM_SOURCE && !vmm->info.was_running && vmm->pause)
        r = mf_fail(&err, EINVAL,
                    "%s (pid %d) is stopped (SIGSTOP), and a stopped process can't be paused by "
                    "the pause command of %s: let it go on first (kill -CONT %d), or leave --pause "
                    "out",
                    vmm->info.version, (int)vmm->pid, vmm->name, (int)vmm->pid);
    if (r == 0 && vmm->stand_still && vmm->info.was_running) {
        r = begin_standing_still(vmm, &err);
        if (r == 0)
            return;
    }
    if (r == 0)
        r = set_info(vmm, &err);
    answer_probe(vmm, r < 0 ? &err : NULL);
}

/* It stands still: what was found before is looked at once more. */
static void probe_still(struct vmm *vmm)
{
    struct mf_error err = {0};
    int r = look_at_memory(vmm, &err);
    if (r == 0 && mf_process_child(vmm->pid, vmm->files, vmm->file_count) > 0) {
        /* Forked a moment ago; it may be that it is waited for. */
        end_standing_still(vmm, vmm->guard);
        vmm->guard = NULL;
        vmm->phase = PROBING;
        again_in(vmm, CHILD_LOOK_MS);
        return;
    }
    if (r == 0)
        r = set_info(vmm, &err);
    answer_probe(vmm, r < 0 ? &err : NULL);
}

/* ---- source: pause, save ---- */

/* Is what stands still now what is being migrated? */
static int recheck(struct vmm *vmm, struct mf_error *err)
{
    char what[192];
    int r = mf_process_recheck(vmm->pid, vmm->files, vmm->file_count, vmm->choice_count == 0, err);
    if (r < 0)
        return r;
    pid_t child = mf_process_child(vmm->pid, vmm->files, vmm->file_count);
    if (child > 0)
        return mf_fail(err, EBUSY,
                       "%s (pid %d) has a child process (pid %d) that shares the memory of %s and "
                       "would be left behind with it; have it end before the program is paused",
                       vmm->info.version, (int)vmm->pid, (int)child, vmm->name);
    struct mf_region_source regions[MF_REGIONS_MAX];
    const unsigned region_count = mf_files_regions(vmm->files, vmm->file_count, regions);
    /* One whose parent has ended is init's child. Who was there before was looked at then. */
    if (mf_target_foreign(vmm->pid, true, vmm->opened_ticks, regions, region_count, what,
                          sizeof(what)) > 0)
        return mf_fail(
            err, EBUSY,
            "the memory of %s is mapped by %s too, which was started since the migration "
            "began and whose writes can't be followed; end it and try again",
            vmm->name, what);
    if (mf_target_vfio(vmm->pid) > 0)
        return mf_fail(err, EBUSY,
                       "%s (pid %d) has come to hold a device passed through (VFIO or vDPA), which "
                       "writes to its memory unseen; close it and try again",
                       vmm->info.version, (int)vmm->pid);
    if (vmm->role == VMM_SOURCE && !vmm->info.direct_io[0] &&
        mf_process_direct(vmm->pid, what, sizeof(what)) > 0)
        return mf_fail(err, EBUSY,
                       "%s (pid %d) has come to hold %s since the migration began: what that "
                       "wrote to its memory was not seen; try again",
                       vmm->info.version, (int)vmm->pid, what);
    return 0;
}

static void pause_done(struct vmm *vmm)
{
    struct mf_error err;
    if (recheck(vmm, &err) < 0) {
        fail(vmm, &err);
        return;
    }
    vmm->phase = PAUSED;
    tell(vmm, VMM_PAUSED, NULL);
}

static void begin_pause(struct vmm *vmm)
{
    struct mf_error err;
    struct command_order resume = order(vmm, "resume", vmm->resume ? vmm->resume : "");
    if (!vmm->guard && guard_start(vmm->base, vmm->pidfd, &resume, &vmm->guard, &err) < 0) {
        fail(vmm, &err);
        return;
    }
    /* What the destination was told of it by now has to be true still, and so has what is to be
     * undone. */
    if ((mf_process_run(vmm->pid) != MF_RUN_STOPPED) != vmm->info.was_running) {
        mf_fail(&err, EBUSY, "%s (pid %d) was %s since the migration began: try again",
                vmm->info.version, (int)vmm->pid,
                vmm->info.was_running ? "stopped (SIGSTOP)" : "let go on (SIGCONT)");
        fail(vmm, &err);
        return;
    }
    vmm->paused = vmm->info.was_running;
    guard_return(vmm->guard, vmm->paused);
    tell(vmm, VMM_STOPPED, NULL);
    if (vmm->closed || vmm->phase != PAUSING)
        return;
    if (!vmm->pause)
        begin_hold(vmm, PAUSING, STOP_MS);
    else if (run(vmm, "pause", vmm->pause, -1, -1, &err) < 0)
        fail(vmm, &err);
}

static void saved(struct vmm *vmm)
{
    if (!vmm->command_ended || !vmm->relay_ended)
        return;
    /* All of it is out and was meant to be all: now, and only now, is its end passed on. */
    shutdown(vmm->device_fd, SHUT_WR);
    begin_hold(vmm, HOLDING, STOP_MS);
}

static void on_saved_bytes(void *arg, int error, uint64_t passed_bytes)
{
    struct vmm *vmm = arg;
    struct mf_error err;
    hold(vmm);
    mf_log(MF_LOG_DEBUG, "%s: %llu bytes of state", vmm->name, (unsigned long long)passed_bytes);
    vmm->relay_ended = true;
    if (error) {
        mf_fail(&err, error, "the state of %s could not be sent: %s", vmm->name, strerror(error));
        fail(vmm, &err);
    } else {
        saved(vmm);
    }
    release(vmm);
}

static void begin_save(struct vmm *vmm)
{
    struct mf_error err;
    int pipe_fds[2], device = -1;
    if (pipe2(pipe_fds, O_CLOEXEC) != 0) {
        mf_fail(&err, errno, "cannot make a pipe for the state of %s: %s", vmm->name,
                strerror(errno));
        fail(vmm, &err);
        return;
    }
    device = fcntl(vmm->device_fd, F_DUPFD_CLOEXEC, 3);
    if (device < 0) {
        mf_fail(&err, errno, "cannot keep the device stream of %s: %s", vmm->name, strerror(errno));
        close(pipe_fds[0]);
        close(pipe_fds[1]);
        fail(vmm, &err);
        return;
    }
    vmm->relay_ended = false;
    int r = run(vmm, "save", vmm->save, -1, pipe_fds[1], &err);
    close(pipe_fds[1]);
    vmm->relay = relay_start(vmm->base, pipe_fds[0], device, false, on_saved_bytes, vmm);
    if (r == 0 && !vmm->relay)
        r = mf_fail(&err, ENOMEM, "out of memory for the state of %s", vmm->name);
    if (r < 0)
        fail(vmm, &err);
}

/* ---- destination: load ---- */

static void loaded(struct vmm *vmm)
{
    if (vmm->command_ended && vmm->relay_ended)
        begin_hold(vmm, HOLDING_LOADED, STOP_MS);
}

static void on_loaded_bytes(void *arg, int error, uint64_t passed_bytes)
{
    struct vmm *vmm = arg;
    struct mf_error err;
    hold(vmm);
    mf_log(MF_LOG_DEBUG, "%s: %llu bytes of state", vmm->name, (unsigned long long)passed_bytes);
    vmm->relay_ended = true;
    if (error) {
        mf_fail(&err, error, "the state of %s could not be received: %s", vmm->name,
                strerror(error));
        fail(vmm, &err);
    } else {
        relay_free(vmm->relay); /* the load command's input ends */
        vmm->relay = NULL;
        loaded(vmm);
    }
    release(vmm);
}

static void on_state(evutil_socket_t fd, short what, void *arg)
{
    struct vmm *vmm = arg;
    struct mf_error err;
    int pipe_fds[2];
    (void)fd;
    (void)what;
    hold(vmm);
    event_free(vmm->state_event);
    vmm->state_event = NULL;
    vmm->phase = LOADING;
    vmm->relay_ended = false;
    if (pipe2(pipe_fds, O_CLOEXEC) != 0) {
        mf_fail(&err, errno, "cannot make a pipe for the state of %s: %s", vmm->name,
                strerror(errno));
        fail(vmm, &err);
        release(vmm);
        return;
    }
    int r = run(vmm, "load", vmm->load, pipe_fds[0], -1, &err);
    close(pipe_fds[0]);
    int device = vmm->device_fd;
    vmm->device_fd = -1;
    vmm->relay = relay_start(vmm->base, device, pipe_fds[1], true, on_loaded_bytes, vmm);
    if (r == 0 && !vmm->relay)
        r = mf_fail(&err, ENOMEM, "out of memory for the state of %s", vmm->name);
    if (r < 0)
        fail(vmm, &err);
    release(vmm);
}

static void begin_listening(struct vmm *vmm)
{
    struct mf_error err;
    struct command_order none = order(vmm, "resume", "");
    int r = vmm->guard ? 0 : guard_start(vmm->base, vmm->pidfd, &none, &vmm->guard, &err);
    vmm->state_event = event_new(vmm->base, vmm->device_fd, EV_READ, on_state, vmm);
    if (r == 0 && (!vmm->state_event || event_add(vmm->state_event, NULL) != 0))
        r = mf_fail(&err, ENOMEM, "out of memory for the state of %s", vmm->name);
    if (r < 0)
        fail(vmm, &err);
    else
        tell(vmm, VMM_INCOMING, NULL);
}

/* ---- resume, at either end ---- */

static void going(struct vmm *vmm)
{
    if (vmm->role == VMM_SOURCE) {
        vmm->paused = false;
        if (vmm->guard)
            guard_return(vmm->guard, false);
        vmm->phase = READY;
        tell(vmm, VMM_RETURNED, NULL);
    } else {
        vmm->phase = RUNNING;
        tell(vmm, VMM_RUNNING, NULL);
    }
}

static void not_going(struct vmm *vmm, const struct mf_error *why)
{
    struct mf_error err;
    if (vmm->role == VMM_SOURCE && ++vmm->return_tries < RETURN_TRIES) {
        mf_log(MF_LOG_WARNING, "%s: %s; trying again", vmm->name, why->text);
        again_in(vmm, RETURN_AGAIN_MS);
        return;
    }
    if (vmm->role == VMM_DESTINATION) {
        fail(vmm, why); /* the session tries again for as long as it takes */
        return;
    }
    guard_return(vmm->guard, false); /* it would only fail as often */
    mf_fail(&err, why->code,
            "%s; %s (pid %d) was to go on here and may still be paused: resume it by hand",
            why->text, vmm->info.version, (int)vmm->pid);
    fail(vmm, &err);
}

static void begin_resume(struct vmm *vmm)
{
    struct mf_error err;
    if (vmm->role == VMM_SOURCE && !vmm->paused) {
        going(vmm);
        return;
    }
    let_go(vmm);
    if (!vmm->resume)
        going(vmm);
    else if (run(vmm, "resume", vmm->resume, -1, -1, &err) < 0)
        not_going(vmm, &err);
}

/* ---- what comes from the event loop ---- */

static void on_command(void *arg, const struct mf_error *why)
{
    struct vmm *vmm = arg;
    hold(vmm);
    vmm->command = NULL;
    vmm->command_ended = true;
    if (vmm->guard)
        guard_command(vmm->guard, 0);
    if (vmm->phase == RETURNING && vmm->return_tries == 0) {
        /* What was killed is over; now the way back. */
        vmm->return_tries = 1;
        begin_resume(vmm);
    } else if (vmm->phase == RETURNING || vmm->phase == RESUMING) {
        if (why)
            not_going(vmm, why);
        else
            going(vmm);
    } else if (why) {
        fail(vmm, why);
    } else if (vmm->phase == PAUSING) {
        pause_done(vmm);
    } else if (vmm->phase == SAVING) {
        saved(vmm);
    } else if (vmm->phase == LOADING) {
        loaded(vmm);
    }
    release(vmm);
}

/* Has every thread stopped? */
static void look_whether_stopped(struct vmm *vmm)
{
    struct mf_error err;
    enum mf_run run_state = mf_process_run(vmm->pid);
    if (run_state == MF_RUN_GONE)
        return; /* the session sees its end by itself */
    if (run_state == MF_RUN_RUNNING && mf_now_ns() < vmm->stop_deadline_ns) {
        again_in(vmm, STOP_LOOK_MS);
        return;
    }
    if (run_state == MF_RUN_RUNNING) {
        mf_fail(&err, ETIMEDOUT,
                "%s (pid %d) did not stop within %u ms of SIGSTOP: a thread is in a system call "
                "that can't be left, in vfork(2), or held by a debugger",
                vmm->info.version, (int)vmm->pid, vmm->stop_ms);
        if (vmm->phase == ARMING)
            answer_probe(vmm, &err);
        else
            fail(vmm, &err);
        return;
    }
    if (vmm->phase == ARMING) {
        probe_still(vmm);
        return;
    }
    if (vmm->phase == PAUSING) {
        pause_done(vmm);
        return;
    }
    if (recheck(vmm, &err) < 0) {
        fail(vmm, &err);
        return;
    }
    bool source = vmm->phase == HOLDING;
    vmm->phase = source ? COMPLETED : LOADED;
    tell(vmm, source ? VMM_COMPLETED : VMM_LOADED, NULL);
}

static void on_tick(evutil_socket_t fd, short what, void *arg)
{
    struct vmm *vmm = arg;
    (void)fd;
    (void)what;
    hold(vmm);
    switch (vmm->phase) {
    case PROBING:
        probe(vmm);
        break;
    case PAUSING:
        if (vmm->held)
            look_whether_stopped(vmm);
        else
            begin_pause(vmm);
        break;
    case ARMING:
    case HOLDING:
    case HOLDING_LOADED:
        look_whether_stopped(vmm);
        break;
    case SAVING:
        begin_save(vmm);
        break;
    case LISTENING:
        begin_listening(vmm);
        break;
    case RETURNING:
        vmm->return_tries += vmm->return_tries == 0;
        begin_resume(vmm);
        break;
    case RESUMING:
        if (vmm->command)
            again_in(vmm, STOP_LOOK_MS);
        else
            begin_resume(vmm);
        break;
    case RUNNING: /* it was not to run */
        tell(vmm, VMM_RUNNING, NULL);
        break;
    case QUITTING:
        tell(vmm, VMM_GONE, NULL);
        break;
    case FAILED: {
        struct mf_error err;
        mf_fail(&err, EMFILE,
                "cannot keep the device stream of %s: memferryd has no descriptor left", vmm->name);
        tell(vmm, VMM_FAILED, err.text);
        break;
    }
    default:
        break;
    }
    release(vmm);
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
    again_in(vmm, 0);
    *out = vmm;
    return 0;
}

static void start(struct vmm *vmm, int device_fd, enum phase phase)
{
    close_device(vmm);
    vmm->device_fd = fcntl(device_fd, F_DUPFD_CLOEXEC, 3);
    vmm->phase = vmm->device_fd < 0 ? FAILED : phase; /* told by on_tick */
    vmm->return_tries = 0;
    again_in(vmm, 0);
}

static void process_start_outgoing(struct vmm *vmm, int device_fd)
{
    start(vmm, device_fd, PAUSING);
}

static void process_finish_outgoing(struct vmm *vmm)
{
    vmm->phase = SAVING;
    again_in(vmm, 0);
}

static void process_return_guest(struct vmm *vmm)
{
    drop_work(vmm);
    vmm->phase = RETURNING;
    vmm->return_tries = 0;
    if (!vmm->command) /* else when it has ended */
        again_in(vmm, 0);
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
    vmm->phase = QUITTING;
    signal_target(vmm, SIGKILL);
    again_in(vmm, 0);
}

static void process_start_incoming(struct vmm *vmm, int device_fd)
{
    start(vmm, device_fd, LISTENING);
}

static void process_resume(struct vmm *vmm, bool should_run)
{
    vmm->phase = should_run ? RESUMING : RUNNING;
    again_in(vmm, 0);
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
    if (vmm->phase == ARMING)
        end_standing_still(vmm, vmm->guard);
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
    .start_outgoing = process_start_outgoing,
    .finish_outgoing = process_finish_outgoing,
    .return_guest = process_return_guest,
    .released = process_released,
    .quit = process_quit,
    .start_incoming = process_start_incoming,
    .resume = process_resume,
    .close = process_close,
};
