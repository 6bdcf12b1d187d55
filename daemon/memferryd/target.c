/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The target process: from what its VMM says to regions. What is then done to it is in arm.c.
 *
 * Order at the destination (I3): register every mapping there, then the first mover empties the
 * files (its setup.c), and only then does the session wait for a source.
 */
#include "daemon/memferryd/session.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "lib/layout_file.h"
#include "lib/log.h"
#include "lib/pagemap.h"
#include "lib/util.h"

static void on_target_exit(evutil_socket_t fd, short what, void *arg)
{
    struct session *session = arg;
    (void)fd;
    (void)what;
    session->target_exited = true;
    event_del(session->pidfd_event);
    if (session->starting) {
        session_reject(session, "the %s of %s ended while it was being prepared",
                       session_noun(session), session->name);
        return;
    }
    if (!session_ended(session) && !session->released)
        session_set_reason(session, "the %s of %s (pid %d) ended on this host",
                           session_noun(session), session->name, (int)session->pid);
    session_event(session, MF_EV_TARGET_EXITED);
}

bool target_memory_gone(const struct session *session)
{
    char byte;
    return session->maps_fd >= 0 && pread(session->maps_fd, &byte, 1, 0) == 0;
}

/* Its memory is gone while it lives: it has become another program. An exit is told by the pidfd,
 * but the memory goes a moment before that, so it has to be seen twice. */
static void look_for_exec(evutil_socket_t fd, short what, void *arg)
{
    struct session *session = arg;
    struct pollfd exited = {.fd = session->pidfd, .events = POLLIN};
    (void)fd;
    (void)what;
    if (session->target_exited || !target_memory_gone(session) || poll(&exited, 1, 0) != 0) {
        session->exec_seen = 0;
        return;
    }
    if (++session->exec_seen < 2)
        return;
    session->target_exited = true; /* what is known of it */
    event_del(session->exec_event);
    if (session->starting) {
        session_reject(session, "the %s of %s became another program while it was being prepared",
                       session_noun(session), session->name);
        return;
    }
    if (!session_ended(session) && !session->released)
        session_set_reason(session,
                           "the %s of %s (pid %d) became another program (execve) on this host: "
                           "its memory is gone",
                           session_noun(session), session->name, (int)session->pid);
    session_event(session, MF_EV_TARGET_EXITED);
}

static int watch(struct session *session, struct mf_error *err)
{
    static const struct timeval often = {.tv_usec = 500000};
    char path[64];
    snprintf(path, sizeof(path), "/proc/%d/maps", (int)session->pid);
    session->maps_fd = open(path, O_RDONLY | O_CLOEXEC);
    if (session->maps_fd < 0)
        return mf_fail(err, errno, "cannot read the memory map of the %s of %s (%s): %s",
                       session_noun(session), session->name, path, strerror(errno));
    session->pidfd = (int)syscall(SYS_pidfd_open, session->pid, 0);
    if (session->pidfd < 0)
        return mf_fail(err, errno, "cannot watch the %s of %s (pid %d): %s", session_noun(session),
                       session->name, (int)session->pid, strerror(errno));
    session->pidfd_event = event_new(daemon_base(session->daemon), session->pidfd,
                                     EV_READ | EV_PERSIST, on_target_exit, session);
    session->exec_event =
        event_new(daemon_base(session->daemon), -1, EV_PERSIST, look_for_exec, session);
    if (!session->pidfd_event || event_add(session->pidfd_event, NULL) != 0 ||
        !session->exec_event || event_add(session->exec_event, &often) != 0)
        return mf_fail(err, ENOMEM, "cannot watch the %s of %s: out of memory",
                       session_noun(session), session->name);
    return 0;
}

static int by_id(const void *a, const void *b)
{
    return strcmp(((const struct vmm_backend *)a)->id, ((const struct vmm_backend *)b)->id);
}

/* The file that the adapter pointed at, opened through a mapping of it. The process may change its
 * mappings meanwhile: then it is looked at again. */
static int open_known(const struct session *session, const struct vmm_backend *backend,
                      struct mf_region_source *region, struct mf_error *err)
{
    int r = -ESTALE;
    for (unsigned tries = 0; tries < 20 && (r == -ESTALE || r == -ENOENT); tries++) {
        cleanup_free struct mf_vma *vmas = NULL;
        const struct mf_vma *found = NULL;
        size_t count = 0;
        r = mf_target_vmas(session->pid, &vmas, &count, err);
        if (r < 0)
            return r;
        for (size_t i = 0; i < count && !found; i++)
            if (vmas[i].shared && vmas[i].inode == backend->inode &&
                vmas[i].device == backend->device)
                found = &vmas[i];
        r = found ? mf_target_file(session->pid, found, backend->id,
                                   session->role == MF_DESTINATION, region, err)
                  : mf_fail(err, ENOENT, "the process of %s does not map %s any more",
                            session->name, backend->path);
    }
    if (r == 0 && region->size_bytes != backend->size_bytes) {
        close(region->fd);
        r = mf_fail(err, ESTALE, "%s of %s changes its size: try again", backend->path,
                    session->name);
    }
    return r;
}

/* Both hosts number the regions in the order of their names. */
static int find_regions(struct session *session, const struct vmm_info *info,
                        const struct mf_vma *vmas, size_t vma_count, struct mf_error *err)
{
    if (info->backend_count == 0 || info->backend_count > MF_REGIONS_MAX)
        return mf_fail(err, ENOTSUP, "the %s of %s has %u memory backends; 1 to %u can be migrated",
                       session_noun(session), session->name, info->backend_count, MF_REGIONS_MAX);
    cleanup_free struct vmm_backend *backends = calloc(info->backend_count, sizeof(*backends));
    if (!backends)
        return mf_fail(err, ENOMEM, "out of memory");
    memcpy(backends, info->backends, info->backend_count * sizeof(*backends));
    qsort(backends, info->backend_count, sizeof(*backends), by_id);
    for (unsigned i = 0; i < info->backend_count; i++) {
        struct mf_region_source *region = &session->region[i];
        region->fd = -1;
        int r = backends[i].inode ? open_known(session, &backends[i], region, err)
                                  : mf_target_region(session->pid, vmas, vma_count, backends[i].id,
                                                     backends[i].path, backends[i].size_bytes,
                                                     session->role == MF_DESTINATION, region, err);
        if (r < 0)
            return r;
        session->region_count = i + 1;
        session->ram_bytes += region->size_bytes;
        session->total_pages += region->size_bytes / region->page_bytes;
    }
    return 0;
}

static int refuse_unseen_writers(struct session *session, struct mf_error *err)
{
    char who[128];
    if (mf_target_vfio(session->pid) > 0)
        return mf_fail(err, ENOTSUP,
                       "the %s of %s has a device passed through (VFIO or vDPA): its memory is "
                       "pinned and written behind the host's back; detach the device first",
                       session_noun(session), session->name);
    /* Children of a program at work come and go; those that stay are seen when it is paused. */
    const bool children =
        session->role == MF_DESTINATION || session_vmm_ops(session) != &vmm_process;
    if (mf_target_foreign(session->pid, children, 0, session->region, session->region_count, who,
                          sizeof(who)) > 0)
        return mf_fail(err, ENOTSUP,
                       "the memory of %s is also mapped by %s, whose writes can't be followed "
                       "(a vhost-user back end?); stop it or detach its device first",
                       session->name, who);
    return 0;
}

/* The mover reads events; here they are only taken out of the way. What a child that was forked
 * does is not followed. */
static void on_unread_events(evutil_socket_t fd, short what, void *arg)
{
    struct session *session = arg;
    (void)what;
    drop_events((int)fd);
    if (session->view.file)
        mf_copies_doubt(&session->view.file->copies, MF_DOUBT_UNREAD);
}

void target_mind_events(struct session *session, bool mind)
{
    if (session->events_event)
        event_free(session->events_event);
    session->events_event = NULL;
    if (!mind || session->role != MF_SOURCE || session->uffd < 0)
        return;
    session->events_event = event_new(daemon_base(session->daemon), session->uffd,
                                      EV_READ | EV_PERSIST, on_unread_events, session);
    if (!session->events_event || event_add(session->events_event, NULL) != 0)
        target_stop_watching(session); /* nobody must wait for an event that nobody reads */
}

static bool has_private(const struct session *session)
{
    for (unsigned i = 0; i < session->region_count; i++)
        if (session->region[i].kind == MF_MEMORY_PRIVATE)
            return true;
    return false;
}

int target_refuse_taken(const struct session *session, struct mf_error *err)
{
    const struct session *other = session_of_pid(session->daemon, session->pid, session);
    if (!other)
        return 0;
    return mf_fail(err, EBUSY,
                   "process %d belongs to session %s already, which is in state %s on this host; a "
                   "process can have one session at a time",
                   (int)session->pid, other->name, mf_state_name(other->state));
}

int target_find(struct session *session, const struct vmm_info *info, struct mf_error *err)
{
    cleanup_free struct mf_vma *vmas = NULL;
    size_t vma_count = 0;
    session->pid = info->pid;
    session->dontneed_discards = info->dontneed_discards;
    int r = target_refuse_taken(session, err);
    if (r == 0)
        r = watch(session, err);
    if (r == 0)
        r = mf_target_vmas(session->pid, &vmas, &vma_count, err);
    if (r == 0)
        r = find_regions(session, info, vmas, vma_count, err);
    if (r == 0)
        r = refuse_unseen_writers(session, err);
    if (r == 0 && session->role == MF_DESTINATION && has_private(session)) {
        uint64_t pages[MF_REGIONS_MAX];
        for (unsigned i = 0; i < session->region_count; i++)
            pages[i] = session->region[i].kind == MF_MEMORY_PRIVATE
                           ? session->region[i].size_bytes / session->region[i].page_bytes
                           : 0;
        session->layout_fd = mf_layout_file_create(pages, session->region_count, err);
        r = session->layout_fd < 0 ? session->layout_fd : 0;
    }
    if (r == 0 && session->role == MF_SOURCE && has_private(session)) {
        /* Kept for later movers: of a process that is gone nothing can be opened any more, and it
         * must not look like one that holds nothing. */
        session->populated_fd = mf_pagemap_open((int)session->pid, err);
        r = session->populated_fd < 0 ? session->populated_fd : 0;
    }
    return r;
}

int target_room(struct session *session, uint64_t needed_bytes, struct mf_error *err)
{
    uint64_t room = 0;
    for (unsigned i = 0; i < session->region_count; i++) {
        struct stat st, before;
        bool counted = false;
        uint64_t available = 0;
        if (fstat(session->region[i].fd, &st) != 0)
            continue;
        for (unsigned j = 0; j < i && !counted; j++)
            counted = fstat(session->region[j].fd, &before) == 0 && before.st_dev == st.st_dev;
        if (!counted && mf_memory_available(session->region[i].fd, &available) == 0)
            room += available;
    }
    if (needed_bytes <= room)
        return 0;
    return mf_fail(err, ENOSPC,
                   "the destination has too little memory for %s: %llu MiB are needed and %llu MiB "
                   "are free where its memory lies; free some there, or enlarge that file system",
                   session->name, (unsigned long long)((needed_bytes + 0xfffff) >> 20),
                   (unsigned long long)(room >> 20));
}

void target_let_go(struct session *session)
{
    target_job_abandon(session);
    if (session->pidfd_event)
        event_free(session->pidfd_event);
    session->pidfd_event = NULL;
    if (session->exec_event)
        event_free(session->exec_event);
    session->exec_event = NULL;
    target_stop_watching(session);
    if (session->pidfd >= 0)
        close(session->pidfd);
    session->pidfd = -1;
    if (session->maps_fd >= 0)
        close(session->maps_fd);
    session->maps_fd = -1;
    if (session->populated_fd >= 0)
        close(session->populated_fd);
    if (session->layout_fd >= 0)
        close(session->layout_fd);
    session->populated_fd = session->layout_fd = -1;
    for (unsigned i = 0; i < session->region_count; i++)
        close(session->region[i].fd);
    session->region_count = 0;
}
