/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The target process: from what its VMM says to regions, and at the destination to an armed
 * userfaultfd.
 *
 * Order at the destination (I3): register every mapping here, then the first mover empties the
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

#include "lib/inject.h"
#include "lib/layout_file.h"
#include "lib/log.h"
#include "lib/pagemap.h"
#include "lib/uffd.h"
#include "lib/util.h"
#include "lib/withdraw.h"

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

int target_mappings(const struct session *session, struct mf_mapping **out, struct mf_error *err)
{
    cleanup_free struct mf_vma *vmas = NULL;
    size_t count = 0;
    int r = mf_target_vmas(session->pid, &vmas, &count, err);
    if (r < 0)
        return r;
    return mf_target_mappings(vmas, count, session->region, session->region_count, out, err);
}

/* Those that a session begins with: all are handed to the mover. */
static int first_mappings(const struct session *session, struct mf_mapping **out,
                          struct mf_error *err)
{
    int count = target_mappings(session, out, err);
    if (count == 0)
        return mf_fail(err, ENOENT, "the %s of %s does not map its memory", session_noun(session),
                       session->name);
    if (count > MF_MAPPINGS_MAX)
        return mf_fail(
            err, E2BIG,
            "the %s of %s maps its memory in %d pieces, which is more than the %d that a "
            "migration can begin with",
            session_noun(session), session->name, count, MF_MAPPINGS_MAX);
    return count;
}

/* Private memory can't be emptied from outside: the target is made to give up what it holds there,
 * then watched; and what it has touched in between is in use. */
static int arm_private(struct session *session, const struct mf_mapping *mapping,
                       struct mf_error *err)
{
    const struct mf_region_source *region = &session->region[mapping->region];
    const uint64_t page_bytes = region->page_bytes, chunk_bytes = 512 * page_bytes;
    uint8_t held[512];
    /* First to see whether somebody else watches it: who discards under their eyes destroys what
     * they serve, and nobody else could give it up for them. */
    int r =
        mf_uffd_register_private(session->uffd, mapping->start_addr, mapping->length_bytes, err);
    if (r == 0)
        mf_uffd_unregister(session->uffd, mapping->start_addr, mapping->length_bytes);
    if (r == 0)
        r = mf_inject_discard(session->pid, session->pidfd, mapping->start_addr,
                              mapping->length_bytes, err);
    if (r == 0)
        r = mf_uffd_register_private(session->uffd, mapping->start_addr, mapping->length_bytes,
                                     err);
    cleanup_close int pagemap = r == 0 ? mf_pagemap_open((int)session->pid, err) : -1;
    if (r == 0 && pagemap < 0)
        r = pagemap;
    for (uint64_t at = 0; r == 0 && at < mapping->length_bytes; at += chunk_bytes) {
        uint64_t left = mapping->length_bytes - at;
        uint64_t length_bytes = left < chunk_bytes ? left : chunk_bytes;
        r = mf_pagemap_populated(pagemap, mapping->start_addr + at, length_bytes, page_bytes, held);
        if (r < 0)
            r = mf_fail(err, -r, "cannot look at the memory '%s' of %s: %s", region->name,
                        session->name, strerror(-r));
        else if (memchr(held, MF_PAGEMAP_PRESENT, length_bytes / page_bytes))
            r = mf_fail(err, EBUSY,
                        "the process of %s uses its memory '%s' while it should wait for it: have "
                        "it leave that alone until its state is loaded",
                        session->name, region->name);
    }
    return r;
}

static int arm(struct session *session, struct mf_error *err)
{
    cleanup_free struct mf_mapping *mappings = NULL;
    int count = first_mappings(session, &mappings, err);
    if (count < 0)
        return count;
    session->uffd = mf_inject_userfaultfd(session->pid, session->pidfd, &session->remote_uffd, err);
    if (session->uffd < 0)
        return session->uffd;
    /* A child that the target forks shares its memory, and waits for it in the same way. */
    uint64_t features = MF_UFFD_FEATURES | UFFD_FEATURE_EVENT_FORK, enabled = 0;
    for (unsigned i = 0; i < session->region_count; i++)
        if (session->region[i].kind == MF_MEMORY_HUGETLB)
            features |= UFFD_FEATURE_MISSING_HUGETLBFS | UFFD_FEATURE_MINOR_HUGETLBFS;
    int r = mf_uffd_api(session->uffd, features, MF_UFFD_FEATURES_WANTED, &enabled, err);
    for (int i = 0; r == 0 && i < count; i++)
        r = session->region[mappings[i].region].kind == MF_MEMORY_PRIVATE
                ? arm_private(session, &mappings[i], err)
                : mf_uffd_register(session->uffd, mappings[i].start_addr, mappings[i].length_bytes,
                                   err);
    return r;
}

/* The target stands still, or keeps its memory where it is. @first: a mapping that is watched. */
static int watch_writes(struct session *session, struct mf_mapping *first, struct mf_error *err)
{
    cleanup_free struct mf_mapping *mappings = NULL;
    int count = first_mappings(session, &mappings, err);
    if (count < 0)
        return count;
    for (int i = 0; i < count; i++) {
        int r = mf_uffd_register_wp(session->uffd, mappings[i].start_addr, mappings[i].length_bytes,
                                    err);
        if (r < 0)
            return r;
    }
    *first = mappings[0];
    return 0;
}

/*
 * At the source nobody needs the descriptor inside the target (I2 is about the destination), and
 * nobody may: a target that changes its layout waits until somebody reads the event. When memferryd
 * and the mover are gone, so must be the last reference, which frees whoever waits.
 */
static void close_remote(struct session *session)
{
    struct mf_error err;
    if (session->remote_uffd < 0 || session->target_exited)
        return;
    if (mf_withdraw(session->pid, session->uffd, session->remote_uffd, &err) < 0)
        mf_log(MF_LOG_WARNING, "%s: the userfaultfd stays open in the %s: %s", session->name,
               session_noun(session), err.text);
    else
        session->remote_uffd = -1;
}

int target_track(struct session *session, struct mf_error *err)
{
    session->pagemap_fd = mf_pagemap_open((int)session->pid, err);
    if (session->pagemap_fd < 0)
        return session->pagemap_fd;
    session->uffd = mf_inject_userfaultfd(session->pid, session->pidfd, &session->remote_uffd, err);
    if (session->uffd < 0)
        return session->uffd;
    uint64_t enabled = 0;
    struct mf_mapping first = {0};
    int r = mf_uffd_api(session->uffd, MF_UFFD_FEATURES_WP_EVENTS, 0, &enabled, err);
    /* While nothing is registered nobody waits for events, and the target can still be stopped. */
    if (r == 0)
        close_remote(session);
    if (r == 0)
        r = watch_writes(session, &first, err);
    if (r < 0)
        return r;
    /* Is PAGEMAP_SCAN there, and does it see that the memory is watched? */
    uint8_t written = 0;
    const uint64_t page_bytes = session->region[first.region].page_bytes;
    r = mf_pagemap_scan(session->pagemap_fd, first.start_addr, page_bytes, page_bytes, &written);
    if (r < 0)
        return mf_fail(err, -r,
                       "this kernel can't say which pages were written (PAGEMAP_SCAN, Linux 6.7): "
                       "%s",
                       strerror(-r));
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
    if (r == 0 && session->role == MF_DESTINATION)
        r = arm(session, err);
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

/* Private memory may have been moved anywhere, and nothing but its registration tells where. All
 * that could be registered is unregistered, since a child may hold the descriptor open beyond us.
 */
static void stop_watching_private(const struct session *session)
{
    cleanup_free struct mf_vma *vmas = NULL;
    size_t count = 0;
    struct mf_error err;
    if (session->role != MF_DESTINATION || !has_private(session) || session->target_exited ||
        mf_target_vmas(session->pid, &vmas, &count, &err) < 0)
        return;
    for (size_t i = 0; i < count; i++)
        if (mf_vma_is_private(&vmas[i]))
            mf_uffd_unregister(session->uffd, vmas[i].start_addr,
                               vmas[i].end_addr - vmas[i].start_addr);
}

static bool same_mapping(const struct mf_mapping *a, const struct mf_mapping *b)
{
    return a->start_addr == b->start_addr && a->length_bytes == b->length_bytes &&
           a->offset_bytes == b->offset_bytes && a->region == b->region;
}

/* A process at work may move a mapping between the look at it and the call, which then leaves a
 * part of it registered and so cuts it in two: until nothing has moved. */
#define UNREGISTER_TRIES 10u

static void unregister(struct session *session)
{
    cleanup_free struct mf_mapping *mappings = NULL;
    struct mf_error err;
    int count = target_mappings(session, &mappings, &err);
    for (unsigned tries = 0; count > 0 && tries < UNREGISTER_TRIES; tries++) {
        struct mf_mapping *after = NULL;
        for (int i = 0; i < count; i++)
            mf_uffd_unregister(session->uffd, mappings[i].start_addr, mappings[i].length_bytes);
        int now = target_mappings(session, &after, &err);
        bool same = now == count;
        for (int i = 0; same && i < count; i++)
            same = same_mapping(&mappings[i], &after[i]);
        free(mappings);
        mappings = after;
        if (same)
            return;
        count = now;
    }
}

void target_stop_watching(struct session *session)
{
    struct mf_error err;
    if (session->events_event)
        event_free(session->events_event);
    session->events_event = NULL;
    /* A mover that is leaving holds the userfaultfd a moment longer, so it is unregistered by hand;
     * closing the last descriptor would do it too. Either lets all waiters go on. */
    if (session->uffd >= 0) {
        if (!session->target_exited)
            unregister(session);
        stop_watching_private(session);
        if (session->remote_uffd >= 0 && !session->target_exited)
            linger(session->daemon, session->uffd);
        else
            close(session->uffd);
    }
    session->uffd = -1;
    if (session->remote_uffd >= 0 && !session->target_exited &&
        mf_inject_close(session->pid, session->remote_uffd, &err) < 0)
        mf_log(MF_LOG_WARNING, "%s: the userfaultfd stays open in the %s: %s", session->name,
               session_noun(session), err.text);
    session->remote_uffd = -1;
    keeper_drop(&session->children);
    if (session->pagemap_fd >= 0)
        close(session->pagemap_fd);
    session->pagemap_fd = -1;
}

void target_let_go(struct session *session)
{
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
