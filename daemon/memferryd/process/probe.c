/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What of the process is migrated, and whether it may be. */
#include "daemon/memferryd/process/process.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "lib/util.h"

#define ARM_STOP_MS 1000u
/* How long a process may have children that share its memory before it is refused. */
#define CHILD_MS 5000u
#define CHILD_LOOK_MS 10u

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
    info->state_s = 2 * (vmm->timeout_ms + PROCESS_STOP_MS) / 1000;
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
        process_again_in(vmm, CHILD_LOOK_MS);
        return false;
    }
    mf_fail(
        err, EBUSY,
        "process %d has a child process (pid %d) that shares the memory of %s; only one process "
        "can be migrated: have it end first",
        (int)vmm->pid, (int)child, vmm->name);
    return true;
}

void process_end_standing_still(struct vmm *vmm, struct guard *guard)
{
    process_let_go(vmm);
    if (guard)
        guard_return(guard, false);
    guard_dismiss(guard);
}

void process_answer_probe(struct vmm *vmm, const struct mf_error *why)
{
    if (!why) {
        vmm->phase = PROCESS_ARMING;
        vmm->callbacks.probed(vmm->callbacks.arg, &vmm->info, NULL);
        return;
    }
    struct guard *guard = vmm->guard;
    vmm->guard = NULL;
    vmm->phase = PROCESS_FAILED;
    vmm->callbacks.probed(vmm->callbacks.arg, NULL, why->text);
    process_end_standing_still(vmm, guard);
}

/* A process at work changes its layout while it is looked at. And memory that is registered with a
 * userfaultfd by a layout of a moment ago cuts mappings in two, which mremap(2) then refuses to
 * move (EFAULT). So for the moment of arming it stands still. */
static int begin_standing_still(struct vmm *vmm, struct mf_error *err)
{
    struct command_order none = process_order(vmm, "resume", "");
    int r = guard_start(vmm->base, vmm->pidfd, &none, &vmm->guard, err);
    if (r < 0)
        return r;
    guard_return(vmm->guard, true);
    process_stop(vmm, PROCESS_ARMING, ARM_STOP_MS);
    return 0;
}

static int look_at_memory(struct vmm *vmm, struct mf_error *err)
{
    free(vmm->files);
    vmm->files = NULL;
    return mf_process_files(vmm->pid, vmm->choices, vmm->choice_count, &vmm->files,
                            &vmm->file_count, err);
}

void process_probe(struct vmm *vmm)
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
    process_answer_probe(vmm, r < 0 ? &err : NULL);
}

/* It stands still: what was found before is looked at once more. */
void process_probe_still(struct vmm *vmm)
{
    struct mf_error err = {0};
    int r = look_at_memory(vmm, &err);
    if (r == 0 && mf_process_child(vmm->pid, vmm->files, vmm->file_count) > 0) {
        /* Forked a moment ago; it may be that it is waited for. */
        process_end_standing_still(vmm, vmm->guard);
        vmm->guard = NULL;
        vmm->phase = PROCESS_PROBING;
        process_again_in(vmm, CHILD_LOOK_MS);
        return;
    }
    if (r == 0)
        r = set_info(vmm, &err);
    process_answer_probe(vmm, r < 0 ? &err : NULL);
}

/* Is what stands still now what is being migrated? */
int process_recheck(struct vmm *vmm, struct mf_error *err)
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
