/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/mover/source/tracker.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#include "daemon/mover/schedule.h"
#include "daemon/mover/source/changes.h"
#include "lib/events.h"
#include "lib/log.h"
#include "lib/uffd.h"
#include "lib/util.h"
#include "lib/vma.h"

#define CHILDREN_LOOK_MS 50           /* nothing tells that a child has gone */
#define DRAIN_NS UINT64_C(1000000000) /* a target that is paused is through in microseconds */
#define DRAIN_AGAIN_NS 20000

struct tracker {
    struct mover *mover;
    struct mf_events events;
    int uffd; /**< of the target; the table of contexts is the tracking thread's own */
    int maps_fd;
    struct changes changes;
    unsigned children; /**< contexts of processes that the target has forked */
    bool looked_before;
    bool refused;   /**< in the present look: something could not be watched */
    bool unwatched; /**< and so it was in the last one */
    bool too_many;
    int wake_fd;
    pthread_mutex_t lock; /**< of what follows */
    pthread_cond_t looked;
    unsigned wanted, done; /**< looks */
};

/* ---- what events mean ---- */

/* Up to where is @part mapped, from its start on, by what the kernel says now? */
static uint64_t mapped_to(const struct tracker *t, const struct mf_mapping *part)
{
    const uint64_t end = part->start_addr + part->length_bytes;
    uint64_t at = part->start_addr;
    struct mf_vma vma;
    while (at < end && mf_vma_find(t->maps_fd, at, &vma) == 0 && vma.start_addr <= at &&
           mf_events_region(&t->events, &vma) == (int)part->region &&
           vma.offset_bytes - vma.start_addr == part->offset_bytes - part->start_addr)
        at = vma.end_addr;
    return at < end ? at : end;
}

static bool is_still_there(void *arg, const struct mf_mapping *part)
{
    return mapped_to(arg, part) > part->start_addr;
}

static void unmapped(void *arg, uint32_t context, uint64_t start, uint64_t end)
{
    struct tracker *t = arg;
    if (context == 0)
        changes_unmapped(&t->changes, start, end);
}

static void changed(void *arg, uint32_t context, const struct uffd_msg *message, uint32_t child)
{
    struct tracker *t = arg;
    (void)child;
    if (context == 0 && message->event == UFFD_EVENT_REMAP)
        changes_moved(&t->changes, message->arg.remap.from, message->arg.remap.to,
                      message->arg.remap.len);
}

static void forked(void *arg, uint32_t parent, uint32_t context)
{
    struct tracker *t = arg;
    (void)parent;
    if (context != UINT32_MAX)
        t->children++;
    /* Private memory is the child's own from then on. */
    if (t->changes.has_files)
        mf_copies_writer(t->mover->copies, true, MF_DOUBT_FORK);
}

static void discarded(void *arg, uint32_t region, uint64_t first, uint64_t pages)
{
    struct tracker *t = arg;
    changes_discarded(&t->changes, region, first, pages);
}

/* WP_ASYNC sends none. */
static void fault(void *arg, const struct mf_fault *fault, uint32_t region, uint64_t page)
{
    (void)arg;
    (void)fault;
    (void)region;
    (void)page;
}

static const struct mf_events_ops ops = {
    .fault = fault,
    .discard = discarded,
    .unmapped = unmapped,
    .changed = changed,
    .forked = forked,
};

/* ---- reading ---- */

static void drop_child(struct tracker *t, uint32_t context, bool gone)
{
    mf_events_drop(&t->events, context);
    t->children--;
    /* One that is not gone, and not watched any more, may write for ever. */
    if (gone && t->changes.has_files)
        mf_copies_writer(t->mover->copies, false, MF_DOUBT_FORK);
}

static void drop_children(struct tracker *t, bool all)
{
    for (uint32_t i = 1; t->children > 0 && i < t->mover->contexts.count; i++) {
        const struct mf_context *child = mf_context_at(&t->mover->contexts, i);
        if (!child)
            continue;
        const bool gone = !mf_uffd_alive(child->uffd);
        if (gone || all || !t->changes.has_files)
            drop_child(t, i, gone);
    }
}

static void read_context(struct tracker *t, uint32_t context)
{
    int r = mf_events_read(&t->events, context);
    /* A fork that waits for a descriptor makes everything else wait. */
    if (r == -EMFILE || r == -ENFILE || r == -ENOMEM) {
        drop_children(t, true);
        r = mf_events_read(&t->events, context);
    }
    if (r < 0)
        mf_log(MF_LOG_ERR, "cannot read what %s does to its memory: %s", t->mover->name,
               strerror(-r));
}

static void read_all(struct tracker *t)
{
    for (uint32_t i = 0; i < t->mover->contexts.count; i++)
        if (mf_context_at(&t->mover->contexts, i))
            read_context(t, i);
}

/* ---- looking ---- */

static bool is_pending(const struct tracker *t)
{
    return mf_uffd_event_pending(t->uffd) > 0;
}

/* Everything that has begun to change is read, and its thread has gone on. */
static void drain(struct tracker *t)
{
    const uint64_t until_ns = mf_now_ns() + DRAIN_NS;
    read_all(t);
    while (is_pending(t)) {
        if (mf_now_ns() > until_ns) {
            mf_copies_doubt(t->mover->copies, MF_DOUBT_UNREAD);
            return;
        }
        nanosleep(&(struct timespec){.tv_nsec = DRAIN_AGAIN_NS}, NULL);
        read_all(t);
    }
}

/* Private memory that was mapped anew at a region's place: where it can't be watched it counts as
 * written. */
static void watch_private(struct tracker *t, const struct mf_vma *vma)
{
    struct mf_mapping part;
    struct mf_error err;
    for (uint64_t at = vma->start_addr; changes_part(&t->changes, at, vma->end_addr, &part);
         at = part.start_addr + part.length_bytes)
        if (t->mover->region[part.region].kind == MF_MEMORY_PRIVATE)
            mf_uffd_register_wp(t->uffd, part.start_addr, part.length_bytes, &err);
}

/* What is known is watched, and stays so. To register it again by what lay there a moment ago might
 * cut in two what lies there now, which mremap(2) would then refuse to move. */
static bool is_known(const struct tracker *t, const struct mf_vma *vma)
{
    struct mf_mapping m;
    return mf_layout_find(&t->mover->layout, 0, vma->start_addr, &m) &&
           (int)m.region == mf_events_region(&t->events, vma) &&
           m.offset_bytes - m.start_addr == vma->offset_bytes - vma->start_addr &&
           (m.start_addr + m.length_bytes >= vma->end_addr ||
            m.offset_bytes + m.length_bytes == t->mover->region[m.region].size_bytes);
}

static int look_at(void *arg, const struct mf_vma *vma)
{
    struct tracker *t = arg;
    if (t->looked_before && is_known(t, vma)) {
        /* nothing to learn */
    } else if (mf_events_region(&t->events, vma) >= 0) {
        int r = mf_events_learn(&t->events, 0, vma->start_addr, vma->end_addr);
        t->refused |= r < 0 && r != -ESRCH;
    } else if (t->mover->private_memory) {
        watch_private(t, vma);
    }
    return 0;
}

/* What went without an event: the kernel sends none when System V memory is detached. */
static void forget_gone(struct tracker *t)
{
    struct mf_mapping part;
    mf_gate_close(&t->mover->gate);
    for (uint64_t at = 0; changes_part(&t->changes, at, UINT64_MAX, &part);
         at = part.start_addr + part.length_bytes) {
        const uint64_t end = part.start_addr + part.length_bytes;
        if (t->mover->region[part.region].kind == MF_MEMORY_PRIVATE)
            continue;
        const uint64_t gone = mapped_to(t, &part);
        /* What will be told is pending from before it goes until it is read, which is here. */
        if (gone < end && !is_pending(t))
            changes_gone(&t->changes, gone, end);
    }
    mf_gate_open(&t->mover->gate);
}

static void look(struct tracker *t)
{
    struct mf_copies *copies = t->mover->copies;
    t->refused = false;
    drain(t);
    int r = mf_vma_each(t->maps_fd, look_at, t);
    t->refused |= r < 0 && r != -ESRCH;
    t->looked_before = true;
    drain(t);
    if (r == 0)
        forget_gone(t);
    if (t->refused != t->unwatched)
        mf_copies_writer(copies, t->refused, MF_DOUBT_UNWATCHED);
    t->unwatched = t->refused;
    /* What there was no room for is not looked at any more. */
    if (t->mover->layout.overflowed && !t->too_many)
        mf_copies_writer(copies, true, MF_DOUBT_MANY);
    t->too_many = t->mover->layout.overflowed;
}

void tracker_look(struct mover *mover)
{
    struct tracker *t = mover->tracker;
    if (!t || mover->released)
        return;
    pthread_mutex_lock(&t->lock);
    const unsigned mine = ++t->wanted;
    const uint64_t one = 1;
    ssize_t n = write(t->wake_fd, &one, sizeof(one));
    (void)n;
    while ((int)(t->done - mine) < 0)
        pthread_cond_wait(&t->looked, &t->lock);
    pthread_mutex_unlock(&t->lock);
}

static void look_if_wanted(struct tracker *t)
{
    uint64_t count;
    ssize_t n = read(t->wake_fd, &count, sizeof(count));
    (void)n;
    pthread_mutex_lock(&t->lock);
    const unsigned wanted = t->wanted;
    const bool due = t->done != wanted;
    pthread_mutex_unlock(&t->lock);
    if (!due)
        return;
    look(t);
    pthread_mutex_lock(&t->lock);
    t->done = wanted;
    pthread_cond_broadcast(&t->looked);
    pthread_mutex_unlock(&t->lock);
}

/* ---- the thread ---- */

/* With the gate closed: whoever protects may notice a change at any moment. */
static void forget_race(struct tracker *t)
{
    if (!atomic_load(&t->mover->protect_raced))
        return;
    mf_gate_close(&t->mover->gate);
    if (!is_pending(t)) /* it was an event that moves nothing */
        atomic_store(&t->mover->protect_raced, false);
    mf_gate_open(&t->mover->gate);
}

/* Room for @count of them; the program ends where there is none. */
static struct pollfd *make_room(struct tracker *t, struct pollfd *wait, uint32_t count)
{
    struct pollfd *grown = realloc(wait, count * sizeof(*wait));
    if (!grown)
        mover_fatal("out of memory for the children of %s", t->mover->name);
    return grown;
}

static void *tracker_main(void *arg)
{
    struct tracker *t = arg;
    uint32_t room = 64;
    struct pollfd *wait = make_room(t, NULL, room);
    prctl(PR_SET_NAME, "layout");
    schedule_first();
    for (;;) {
        const uint32_t count = t->mover->contexts.count;
        if (count >= room)
            wait = make_room(t, wait, room = count + 64);
        for (uint32_t i = 0; i < count; i++)
            wait[i] =
                (struct pollfd){.fd = mf_context_uffd(&t->mover->contexts, i), .events = POLLIN};
        wait[count] = (struct pollfd){.fd = t->wake_fd, .events = POLLIN};
        if (poll(wait, count + 1, t->children ? CHILDREN_LOOK_MS : -1) < 0) {
            if (errno == EINTR)
                continue;
            mover_fatal("cannot wait for what %s does to its memory: %s", t->mover->name,
                        strerror(errno));
        }
        for (uint32_t i = 0; i < count; i++)
            if (wait[i].revents)
                read_context(t, i);
        forget_race(t);
        drop_children(t, false);
        if (wait[count].revents)
            look_if_wanted(t);
    }
    return NULL;
}

int tracker_start(struct mover *mover)
{
    pthread_t thread;
    const struct mf_context *target = mf_context_at(&mover->contexts, 0);
    if (!target || target->maps_fd < 0)
        return 0; /* not tracked, or the target is gone */
    struct tracker *t = calloc(1, sizeof(*t));
    if (!t)
        return -1;
    t->mover = mover;
    t->uffd = target->uffd;
    t->maps_fd = target->maps_fd;
    t->changes = (struct changes){.mover = mover, .is_still_there = is_still_there, .arg = t};
    t->events = (struct mf_events){.ops = &ops,
                                   .arg = t,
                                   .layout = &mover->layout,
                                   .contexts = &mover->contexts,
                                   .gate = &mover->gate,
                                   .region = mover->region,
                                   .region_count = mover->region_count,
                                   .watch = MF_EVENTS_WRITES};
    for (unsigned i = 0; i < mover->region_count; i++)
        t->changes.has_files |= mover->region[i].kind != MF_MEMORY_PRIVATE;
    pthread_mutex_init(&t->lock, NULL);
    pthread_cond_init(&t->looked, NULL);
    t->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (t->wake_fd < 0)
        return -1;
    mover->tracker = t;
    return pthread_create(&thread, NULL, tracker_main, t) == 0 ? 0 : -1;
}
