/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What is done to a target and may take long: it is armed or watched, which takes system calls run
 * inside it (lib/inject.h), looked at page by page (lib/smaps.h), and made to close its userfaultfd
 * at the end. A thread does it (work.h), with a copy of what it needs of the session.
 *
 * So the session may end meanwhile. Then what has come of it is given back when it is done. And
 * what is given back may take a moment longer than the session: another one of the same target
 * waits for it.
 */
#include "daemon/memferryd/session.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "daemon/memferryd/work.h"
#include "lib/inject.h"
#include "lib/log.h"
#include "lib/pagemap.h"
#include "lib/smaps.h"
#include "lib/uffd.h"
#include "lib/util.h"
#include "lib/withdraw.h"

/** struct grip - a target, and what is held of it. */
struct grip {
    char name[MF_NAME_MAX + 1]; /**< of the session */
    const char *noun;           /**< session_noun() */
    enum mf_role role;
    pid_t pid;
    int pidfd; /**< owned; -1: none */
    bool gone; /**< known to be: it ended, or became another program */
    struct mf_region_source region[MF_REGIONS_MAX]; /**< `fd` is the session's: not used */
    unsigned region_count;
    /* Owned until a session takes them; -1: none. As in struct session. */
    int uffd, remote_uffd, pagemap_fd;
};

struct target_job {
    struct work work;
    struct daemon *daemon;
    struct session *session; /**< NULL: it has ended */
    bool gone;               /**< the target had, when the session ended */
    struct grip grip;
    int (*carry_out)(struct grip *grip, struct mf_error *err);
    target_then then;
    int result;
    struct mf_error err;
};

static void hold(const struct session *session, struct grip *grip)
{
    *grip = (struct grip){.noun = session_noun(session),
                          .role = session->role,
                          .pid = session->pid,
                          .pidfd = fcntl(session->pidfd, F_DUPFD_CLOEXEC, 3),
                          .gone = session->target_exited,
                          .region_count = session->region_count,
                          .uffd = -1,
                          .remote_uffd = -1,
                          .pagemap_fd = -1};
    memcpy(grip->name, session->name, sizeof(grip->name));
    memcpy(grip->region, session->region, sizeof(grip->region));
}

static bool is_gone(const struct grip *grip)
{
    struct pollfd exited = {.fd = grip->pidfd, .events = POLLIN};
    return grip->gone || poll(&exited, 1, 0) > 0;
}

static int find_mappings(pid_t pid, const struct mf_region_source *region, unsigned region_count,
                         struct mf_mapping **out, struct mf_error *err)
{
    cleanup_free struct mf_vma *vmas = NULL;
    size_t count = 0;
    int r = mf_target_vmas(pid, &vmas, &count, err);
    if (r < 0)
        return r;
    return mf_target_mappings(vmas, count, region, region_count, out, err);
}

int target_mappings(const struct session *session, struct mf_mapping **out, struct mf_error *err)
{
    return find_mappings(session->pid, session->region, session->region_count, out, err);
}

/* Those that a session begins with: all are handed to the mover. */
static int first_mappings(const struct grip *grip, struct mf_mapping **out, struct mf_error *err)
{
    int count = find_mappings(grip->pid, grip->region, grip->region_count, out, err);
    if (count == 0)
        return mf_fail(err, ENOENT, "the %s of %s does not map its memory", grip->noun, grip->name);
    if (count > MF_MAPPINGS_MAX)
        return mf_fail(
            err, E2BIG,
            "the %s of %s maps its memory in %d pieces, which is more than the %d that a "
            "migration can begin with",
            grip->noun, grip->name, count, MF_MAPPINGS_MAX);
    return count;
}

/* ---- in a thread ---- */

/* Private memory can't be emptied from outside: the target is made to give up what it holds there,
 * then watched; and what it has touched in between is in use. */
static int arm_private(const struct grip *grip, const struct mf_mapping *mapping,
                       struct mf_error *err)
{
    const struct mf_region_source *region = &grip->region[mapping->region];
    const uint64_t page_bytes = region->page_bytes, chunk_bytes = 512 * page_bytes;
    uint8_t held[512];
    /* First to see whether somebody else watches it: who discards under their eyes destroys what
     * they serve, and nobody else could give it up for them. */
    int r = mf_uffd_register_private(grip->uffd, mapping->start_addr, mapping->length_bytes, err);
    if (r == 0)
        mf_uffd_unregister(grip->uffd, mapping->start_addr, mapping->length_bytes);
    if (r == 0)
        r = mf_inject_discard(grip->pid, grip->pidfd, mapping->start_addr, mapping->length_bytes,
                              err);
    if (r == 0)
        r = mf_uffd_register_private(grip->uffd, mapping->start_addr, mapping->length_bytes, err);
    cleanup_close int pagemap = r == 0 ? mf_pagemap_open((int)grip->pid, err) : -1;
    if (r == 0 && pagemap < 0)
        r = pagemap;
    for (uint64_t at = 0; r == 0 && at < mapping->length_bytes; at += chunk_bytes) {
        uint64_t left = mapping->length_bytes - at;
        uint64_t length_bytes = left < chunk_bytes ? left : chunk_bytes;
        r = mf_pagemap_populated(pagemap, mapping->start_addr + at, length_bytes, page_bytes, held);
        if (r < 0)
            r = mf_fail(err, -r, "cannot look at the memory '%s' of %s: %s", region->name,
                        grip->name, strerror(-r));
        else if (memchr(held, MF_PAGEMAP_PRESENT, length_bytes / page_bytes))
            r = mf_fail(err, EBUSY,
                        "the process of %s uses its memory '%s' while it should wait for it: have "
                        "it leave that alone until its state is loaded",
                        grip->name, region->name);
    }
    return r;
}

static int arm(struct grip *grip, struct mf_error *err)
{
    cleanup_free struct mf_mapping *mappings = NULL;
    int count = first_mappings(grip, &mappings, err);
    if (count < 0)
        return count;
    grip->uffd = mf_inject_userfaultfd(grip->pid, grip->pidfd, &grip->remote_uffd, err);
    if (grip->uffd < 0)
        return grip->uffd;
    /* A child that the target forks shares its memory, and waits for it in the same way. */
    uint64_t features = MF_UFFD_FEATURES | UFFD_FEATURE_EVENT_FORK, enabled = 0;
    for (unsigned i = 0; i < grip->region_count; i++)
        if (grip->region[i].kind == MF_MEMORY_HUGETLB)
            features |= UFFD_FEATURE_MISSING_HUGETLBFS | UFFD_FEATURE_MINOR_HUGETLBFS;
    int r = mf_uffd_api(grip->uffd, features, MF_UFFD_FEATURES_WANTED, &enabled, err);
    for (int i = 0; r == 0 && i < count; i++)
        r = grip->region[mappings[i].region].kind == MF_MEMORY_PRIVATE
                ? arm_private(grip, &mappings[i], err)
                : mf_uffd_register(grip->uffd, mappings[i].start_addr, mappings[i].length_bytes,
                                   err);
    return r;
}

/* The target stands still, or keeps its memory where it is. @first: a mapping that is watched. */
static int watch_writes(const struct grip *grip, struct mf_mapping *first, struct mf_error *err)
{
    cleanup_free struct mf_mapping *mappings = NULL;
    int count = first_mappings(grip, &mappings, err);
    if (count < 0)
        return count;
    for (int i = 0; i < count; i++) {
        int r =
            mf_uffd_register_wp(grip->uffd, mappings[i].start_addr, mappings[i].length_bytes, err);
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
static void withdraw(struct grip *grip)
{
    struct mf_error err;
    if (is_gone(grip))
        return;
    if (mf_withdraw(grip->pid, grip->uffd, grip->remote_uffd, &err) < 0)
        mf_log(MF_LOG_WARNING, "%s: the userfaultfd stays open in the %s: %s", grip->name,
               grip->noun, err.text);
    else
        grip->remote_uffd = -1;
}

static int track(struct grip *grip, struct mf_error *err)
{
    grip->pagemap_fd = mf_pagemap_open((int)grip->pid, err);
    if (grip->pagemap_fd < 0)
        return grip->pagemap_fd;
    grip->uffd = mf_inject_userfaultfd(grip->pid, grip->pidfd, &grip->remote_uffd, err);
    if (grip->uffd < 0)
        return grip->uffd;
    uint64_t enabled = 0;
    struct mf_mapping first = {0};
    int r = mf_uffd_api(grip->uffd, MF_UFFD_FEATURES_WP_EVENTS, 0, &enabled, err);
    /* While nothing is registered nobody waits for events, and the target can still be stopped. */
    if (r == 0)
        withdraw(grip);
    if (r == 0)
        r = watch_writes(grip, &first, err);
    if (r < 0)
        return r;
    /* Is PAGEMAP_SCAN there, and does it see that the memory is watched? */
    uint8_t written = 0;
    const uint64_t page_bytes = grip->region[first.region].page_bytes;
    r = mf_pagemap_scan(grip->pagemap_fd, first.start_addr, page_bytes, page_bytes, &written);
    if (r < 0)
        return mf_fail(err, -r,
                       "this kernel can't say which pages were written (PAGEMAP_SCAN, Linux 6.7): "
                       "%s",
                       strerror(-r));
    return 0;
}

static int refuse_served(struct grip *grip, struct mf_error *err)
{
    return mf_refuse_served(grip->pid, grip->region, grip->region_count, err);
}

static int close_remote(struct grip *grip, struct mf_error *err)
{
    int r = is_gone(grip) ? 0 : mf_inject_close(grip->pid, grip->remote_uffd, err);
    if (r < 0)
        mf_log(MF_LOG_WARNING, "%s: the userfaultfd stays open in the %s: %s", grip->name,
               grip->noun, err->text);
    grip->remote_uffd = -1;
    return r;
}

/* ---- on the event loop ---- */

static bool has_private(const struct grip *grip)
{
    for (unsigned i = 0; i < grip->region_count; i++)
        if (grip->region[i].kind == MF_MEMORY_PRIVATE)
            return true;
    return false;
}

/* Private memory may have been moved anywhere, and nothing but its registration tells where. All
 * that could be registered is unregistered, since a child may hold the descriptor open beyond us.
 */
static void unregister_private(const struct grip *grip)
{
    cleanup_free struct mf_vma *vmas = NULL;
    size_t count = 0;
    struct mf_error err;
    if (grip->role != MF_DESTINATION || !has_private(grip) ||
        mf_target_vmas(grip->pid, &vmas, &count, &err) < 0)
        return;
    for (size_t i = 0; i < count; i++)
        if (mf_vma_is_private(&vmas[i]))
            mf_uffd_unregister(grip->uffd, vmas[i].start_addr,
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

static void unregister(const struct grip *grip)
{
    cleanup_free struct mf_mapping *mappings = NULL;
    struct mf_error err;
    int count = find_mappings(grip->pid, grip->region, grip->region_count, &mappings, &err);
    for (unsigned tries = 0; count > 0 && tries < UNREGISTER_TRIES; tries++) {
        struct mf_mapping *after = NULL;
        for (int i = 0; i < count; i++)
            mf_uffd_unregister(grip->uffd, mappings[i].start_addr, mappings[i].length_bytes);
        int now = find_mappings(grip->pid, grip->region, grip->region_count, &after, &err);
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

static void let_go(struct daemon *daemon, struct grip *grip);

static void on_done(struct work *work)
{
    struct target_job *job = (struct target_job *)work;
    struct session *session = job->session;
    struct grip *grip = &job->grip;
    if (session) {
        session->job = NULL;
        if (grip->uffd >= 0)
            session->uffd = grip->uffd;
        if (grip->remote_uffd >= 0)
            session->remote_uffd = grip->remote_uffd;
        if (grip->pagemap_fd >= 0)
            session->pagemap_fd = grip->pagemap_fd;
        if (grip->pidfd >= 0)
            close(grip->pidfd);
        job->then(session, job->result < 0 ? &job->err : NULL);
    } else {
        grip->gone |= job->gone;
        let_go(job->daemon, grip);
    }
    free(job);
}

static void run(struct work *work)
{
    struct target_job *job = (struct target_job *)work;
    job->result = job->carry_out(&job->grip, &job->err);
}

/* Takes the grip over; @session: NULL is told nothing. Return: 0 or -errno with a sentence. */
static int start(struct daemon *daemon, struct session *session, const struct grip *grip,
                 int (*carry_out)(struct grip *grip, struct mf_error *err), target_then then,
                 struct mf_error *err)
{
    struct target_job *job = calloc(1, sizeof(*job));
    if (!job)
        return mf_fail(err, ENOMEM, "out of memory");
    job->work = (struct work){.pid = grip->pid, .run = run, .done = on_done};
    job->daemon = daemon;
    job->session = session;
    job->grip = *grip;
    job->carry_out = carry_out;
    job->then = then;
    int r = work_start(daemon_base(daemon), &job->work, err);
    if (r < 0)
        free(job);
    else if (session)
        session->job = job;
    return r;
}

/* Takes the grip over. A mover that is leaving holds the userfaultfd a moment longer, so it is
 * unregistered by hand; closing the last descriptor would do it too. Either lets all waiters go on.
 */
static void let_go(struct daemon *daemon, struct grip *grip)
{
    struct mf_error err;
    const bool gone = is_gone(grip);
    if (grip->uffd >= 0) {
        if (!gone) {
            unregister(grip);
            unregister_private(grip);
        }
        if (grip->remote_uffd >= 0 && !gone)
            linger(daemon, grip->uffd);
        else
            close(grip->uffd);
    }
    if (grip->pagemap_fd >= 0)
        close(grip->pagemap_fd);
    grip->uffd = grip->pagemap_fd = -1;
    if (grip->remote_uffd >= 0 && !gone) {
        if (start(daemon, NULL, grip, close_remote, NULL, &err) == 0)
            return;
        close_remote(grip, &err);
    }
    if (grip->pidfd >= 0)
        close(grip->pidfd);
}

static void begin(struct session *session,
                  int (*carry_out)(struct grip *grip, struct mf_error *err), target_then then)
{
    struct grip grip;
    struct mf_error err;
    hold(session, &grip);
    int r = grip.pidfd < 0 ? mf_fail(&err, errno, "cannot take hold of the %s of %s: %s", grip.noun,
                                     grip.name, strerror(errno))
                           : start(session->daemon, session, &grip, carry_out, then, &err);
    if (r == 0)
        return;
    if (grip.pidfd >= 0)
        close(grip.pidfd);
    then(session, &err);
}

void target_arm(struct session *session, target_then then)
{
    begin(session, arm, then);
}

void target_track(struct session *session, target_then then)
{
    begin(session, track, then);
}

void target_refuse_served(struct session *session, target_then then)
{
    begin(session, refuse_served, then);
}

void target_job_abandon(struct session *session)
{
    if (!session->job)
        return;
    session->job->gone = session->target_exited;
    session->job->session = NULL;
    session->job = NULL;
}

void target_stop_watching(struct session *session)
{
    struct grip grip;
    if (session->events_event)
        event_free(session->events_event);
    session->events_event = NULL;
    hold(session, &grip);
    grip.uffd = session->uffd;
    grip.remote_uffd = session->remote_uffd;
    grip.pagemap_fd = session->pagemap_fd;
    session->uffd = session->remote_uffd = session->pagemap_fd = -1;
    let_go(session->daemon, &grip);
    keeper_drop(&session->children);
}
