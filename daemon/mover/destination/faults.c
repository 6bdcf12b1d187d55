/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The fault thread: the one reader of the userfaultfds, and the owner of the urgent connection.
 *
 * One io_uring waits for everything: a userfaultfd readable, bytes on the urgent connection, a
 * request sent, a word from the main thread, a timer while something is to be tried again. A fault
 * therefore costs one wake-up to be read and one when its page arrives, and while it travels others
 * are served.
 *
 * Reading messages, applying events and parking faults is lib/events.c. Faults are de-duplicated by
 * page (FAULTED in its state).
 */
#include "daemon/mover/destination/destination.h"

#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <semaphore.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "daemon/mover/ring.h"
#include "lib/events.h"
#include "lib/log.h"
#include "lib/uffd.h"
#include "lib/util.h"

#define REQUESTS_ROOM 4096u /**< REQUESTs not sent yet */
#define UNREAD_NS 500000    /**< messages that could not be read yet are tried again so often */
#define RETRY_NS 5000000    /**< parked faults are tried again this often, at the latest */

#define CHILDREN_NS 500000000 /**< so often it is seen which children are gone */

enum tag { TAG_KICK = 1, TAG_RECV, TAG_SEND, TAG_TIMER, TAG_UFFD, TAG_CHILDREN, TAG_CANCEL };

struct fault_thread {
    struct mover *mover;
    pthread_t thread;
    struct io_uring ring;
    struct fault_table table;
    struct mf_lander lander;
    int kick_fd;
    uint64_t kick_value;
    struct mf_events events;
    bool timer_armed, children_armed;
    struct __kernel_timespec timer, children_timer;
    bool short_of_fds; /**< a fork waits for a descriptor */

    /* The urgent connection. wanted_fd is the main thread's wish; fd is what this thread uses. */
    _Atomic int wanted_fd;
    sem_t done;
    int fd;
    bool receiving, sending, broken;
    uint8_t *in; /**< a header, then its page-aligned payload (as in bulk.c) */
    size_t in_have, in_need;
    struct mf_frame frame;
    uint8_t *huge; /**< a huge page's place in the second mapping while it is received */
    bool unwanted; /**< one is received that has no place: it is overwritten piece by piece */
    uint8_t out[REQUESTS_ROOM * MF_FRAME_HEADER_BYTES];
    size_t out_have, out_sending;
};

#define LEAD 4096u
#define FRAME_START (LEAD - MF_FRAME_HEADER_BYTES)

struct fault_table *faults_table(struct mover *mover)
{
    return &mover->faults->table;
}

static struct io_uring_sqe *get_sqe(struct fault_thread *t)
{
    struct io_uring_sqe *sqe = io_uring_get_sqe(&t->ring);
    if (!sqe) {
        io_uring_submit(&t->ring);
        sqe = io_uring_get_sqe(&t->ring);
    }
    if (!sqe)
        mover_fatal("the fault thread's io_uring is full");
    return sqe;
}

/* Set the tag after the prep call: io_uring_prep_* clears user_data in some versions of liburing.
 */
static void tag_sqe(struct io_uring_sqe *sqe, enum tag tag, unsigned index)
{
    io_uring_sqe_set_data64(sqe, (uint64_t)tag | (uint64_t)index << 8);
}

static void arm_uffd(struct fault_thread *t, unsigned context)
{
    struct io_uring_sqe *sqe = get_sqe(t);
    io_uring_prep_poll_multishot(sqe, mf_context_uffd(&t->mover->contexts, context), POLLIN);
    tag_sqe(sqe, TAG_UFFD, context);
}

static void arm_kick(struct fault_thread *t)
{
    struct io_uring_sqe *sqe = get_sqe(t);
    io_uring_prep_read(sqe, t->kick_fd, &t->kick_value, sizeof(t->kick_value), 0);
    tag_sqe(sqe, TAG_KICK, 0);
}

/* ---- the urgent connection ---- */

static void urgent_broken(struct fault_thread *t, const char *why)
{
    if (!t->broken && !atomic_load(&t->mover->link.stop))
        link_fail(t->mover, "the urgent connection to the source broke: %s", why);
    t->broken = true;
}

static void send_requests(struct fault_thread *t)
{
    if (t->sending || t->fd < 0 || t->broken || t->out_have == 0)
        return;
    struct io_uring_sqe *sqe = get_sqe(t);
    io_uring_prep_send(sqe, t->fd, t->out, t->out_have, MSG_NOSIGNAL | MSG_WAITALL);
    tag_sqe(sqe, TAG_SEND, 0);
    t->sending = true;
    t->out_sending = t->out_have;
}

static void request(struct fault_thread *t, uint32_t region, uint64_t page)
{
    if (t->fd < 0 || t->broken)
        return; /* asked for when there is a link again: it is in the table */
    if (t->out_have + MF_FRAME_HEADER_BYTES > sizeof(t->out)) {
        /* Thousands of faults in one batch: the sweep brings what was not asked for. */
        return;
    }
    mf_frame_encode(
        &(struct mf_frame){
            .type = MF_FRAME_REQUEST, .region = (uint16_t)region, .first_page = page, .pages = 1},
        t->out + t->out_have);
    t->out_have += MF_FRAME_HEADER_BYTES;
    atomic_fetch_add_explicit(&t->mover->figures->faults_asked, 1, memory_order_relaxed);
}

static void sent(struct fault_thread *t, int result)
{
    t->sending = false;
    if (result < 0 || (size_t)result > t->out_sending) {
        urgent_broken(t, strerror(-result));
        return;
    }
    t->out_have -= (size_t)result;
    memmove(t->out, t->out + result, t->out_have);
}

static void arm_recv(struct fault_thread *t)
{
    if (t->receiving || t->fd < 0 || t->broken)
        return;
    struct io_uring_sqe *sqe = get_sqe(t);
    const size_t missing = t->in_need - t->in_have;
    if (t->huge)
        io_uring_prep_recv(sqe, t->fd, t->huge + t->in_have, missing, 0);
    else if (t->unwanted)
        io_uring_prep_recv(sqe, t->fd, t->in + LEAD,
                           missing < MF_FRAME_DATA_MAX_BYTES ? missing : MF_FRAME_DATA_MAX_BYTES,
                           0);
    else
        io_uring_prep_recv(sqe, t->fd, t->in + FRAME_START + t->in_have,
                           missing + MF_FRAME_HEADER_BYTES, 0);
    tag_sqe(sqe, TAG_RECV, 0);
    t->receiving = true;
}

static void start_frame(struct fault_thread *t)
{
    t->frame.type = 0; /* header not seen */
    t->in_need = MF_FRAME_HEADER_BYTES;
}

/* A huge page's payload: from now on in_have and in_need count its bytes. */
static void begin_huge(struct fault_thread *t)
{
    size_t along = t->in_have - MF_FRAME_HEADER_BYTES;
    int r = mf_land_begin_huge(&t->lander, &t->frame, &t->huge);
    if (r < 0) {
        account_failed(t->mover, r);
        t->broken = true;
        return;
    }
    t->unwanted = !t->huge; /* somebody else has it, or is receiving it */
    if (t->huge)
        memcpy(t->huge, t->in + LEAD, along);
    t->in_have = along;
    t->in_need = t->frame.length_bytes;
}

static bool in_huge(const struct fault_thread *t)
{
    return t->huge || t->unwanted;
}

static void end_huge(struct fault_thread *t, bool arrived)
{
    if (t->huge)
        mf_land_end_huge(&t->lander, &t->frame, arrived);
    t->huge = NULL;
    t->unwanted = false;
}

/* Work off what has been received. */
static void take_frames(struct fault_thread *t)
{
    struct mover *mover = t->mover;
    while (!t->broken && t->in_have >= t->in_need) {
        const char *why = NULL;
        uint8_t *header = t->in + FRAME_START;
        if (in_huge(t)) {
            end_huge(t, true);
            t->in_have = 0;
            start_frame(t);
            continue;
        }
        if (t->frame.type == 0) {
            if (mf_frame_decode(header, &t->frame, &why) < 0 ||
                mf_frame_check(&t->frame, mover->frame_region, mover->region_count, true, &why) <
                    0) {
                t->frame.type = 0;
                urgent_broken(t, why);
                return;
            }
            if (t->frame.type == MF_FRAME_DATA &&
                mover->region[t->frame.region].kind == MF_MEMORY_HUGETLB) {
                begin_huge(t);
                continue;
            }
            t->in_need = MF_FRAME_HEADER_BYTES + t->frame.length_bytes;
            continue;
        }
        int r = 0;
        if (t->frame.type == MF_FRAME_DATA)
            r = mf_land_data(&t->lander, &t->frame, header + MF_FRAME_HEADER_BYTES);
        else if (t->frame.type == MF_FRAME_ZERO)
            mf_land_zero(&t->lander, &t->frame);
        else if (t->frame.type == MF_FRAME_CURRENT)
            mf_land_current(&t->lander, &t->frame);
        if (r < 0) {
            account_failed(t->mover, r);
            t->broken = true;
            return;
        }
        t->in_have -= t->in_need;
        memmove(header, header + t->in_need, t->in_have);
        start_frame(t);
    }
}

static void received(struct fault_thread *t, int result)
{
    t->receiving = false;
    if (result == -EAGAIN || result == -EINTR)
        return;
    if (result <= 0) {
        urgent_broken(t, result < 0 ? strerror(-result) : "the source closed it");
        return;
    }
    t->in_have += (size_t)result;
    atomic_fetch_add_explicit(&t->mover->figures->wire_bytes, (uint64_t)result,
                              memory_order_relaxed);
    take_frames(t);
}

static void request_again(void *argument, uint32_t region, uint64_t page)
{
    struct fault_thread *t = argument;
    if (!mf_page_resolvable(mf_page_load(&t->mover->view.pages[region], page)))
        request(t, region, page);
}

/* The main thread wants another urgent connection, or none. */
static void change_connection(struct fault_thread *t)
{
    int wanted = atomic_load(&t->wanted_fd);
    if (wanted == t->fd || t->sending || t->receiving)
        return; /* what is under way ends first: the main thread has shut the old socket down */
    if (in_huge(t))
        end_huge(t, false);
    t->fd = wanted;
    t->broken = false;
    t->in_have = t->out_have = 0;
    start_frame(t);
    if (t->fd >= 0)
        fault_table_each(&t->table, request_again, t);
    sem_post(&t->done);
}

/* ---- faults and events ---- */

/* Somebody waits for a page (struct mf_events_ops). */
static void fault(void *argument, const struct mf_fault *fault, uint32_t region, uint64_t page)
{
    struct fault_thread *t = argument;
    struct mover *mover = t->mover;
    if (region == MF_REGION_ZEROS) {
        mf_resolve_zeros(&t->lander.resolver, fault->context, fault->addr);
        return;
    }
    const struct mf_pages *states = &mover->view.pages[region];
    uint8_t byte = mf_page_load(states, page);
    if (mover->region[region].kind == MF_MEMORY_PRIVATE && mf_page_resolvable(byte) &&
        (byte & MF_PAGE_PLACED)) {
        /* It has the page: this fault is older than that. Zeros would be wrong, whatever happens.
         */
        mf_resolve_wake(&t->lander.resolver, region, page);
        return;
    }
    if (!mf_page_resolvable(byte)) {
        if (byte & MF_PAGE_FAULTED)
            return; /* somebody waits for it already; one ioctl will wake them all */
        /* In a table that is full it is served untimed; FAULTED is set all the same. */
        fault_table_add(&t->table, region, page, fault->since_ns);
        byte = mf_page_fault(states, page);
        if (!mf_page_resolvable(byte)) {
            request(t, region, page);
            return;
        }
        fault_table_take(&t->table, region, page);
    }
    mf_resolve_page(&t->lander.resolver, region, page);
    mf_histogram_add(&mover->figures->faults, mf_now_ns() - fault->since_ns);
}

/* The target discarded pages (struct mf_events_ops). */
static void discard(void *argument, uint32_t region, uint64_t first, uint64_t pages)
{
    struct fault_thread *t = argument;
    mf_land_discard(&t->lander, region, first, pages, t->mover->dontneed_discards);
}

/* A poll that is under way holds a reference to the userfaultfd: it is cancelled first, and when
 * that is through the context is dropped (doc/kernel.md: a_poll_under_way_holds_a_reference). */
static void let_go(struct fault_thread *t, uint32_t context)
{
    mf_context_at(&t->mover->contexts, context)->leaving = true;
    struct io_uring_sqe *sqe = get_sqe(t);
    io_uring_prep_poll_remove(sqe, (uint64_t)TAG_UFFD | (uint64_t)context << 8);
    tag_sqe(sqe, TAG_CANCEL, 0);
}

/* A child's address space ends by exit or exec, of which nothing tells. */
static void look_for_gone_children(struct fault_thread *t)
{
    struct mf_contexts *contexts = &t->mover->contexts;
    for (uint32_t i = 0; i < contexts->count; i++) {
        const struct mf_context *context = mf_context_at(contexts, i);
        if (context && context->child && !context->leaving && !mf_uffd_alive(context->uffd))
            let_go(t, i);
    }
}

/* Of a child that has ended the maps tell nothing any more, while the userfaultfd is waited for and
 * goes later. Return: is there a descriptor more? */
static bool spare_maps(struct fault_thread *t)
{
    for (uint32_t i = 0; i < t->mover->contexts.count; i++) {
        struct mf_context *context = mf_context_at(&t->mover->contexts, i);
        if (!context || !context->child || context->maps_fd < 0 || mf_uffd_alive(context->uffd))
            continue;
        close(context->maps_fd);
        context->maps_fd = -1;
        return true;
    }
    return false;
}

static bool is_short(int error)
{
    return error == -EMFILE || error == -ENFILE || error == -ENOMEM;
}

/* See lib/context.h. */
static void hold(struct fault_thread *t, struct mf_context *context, bool held)
{
    if (context->held == held)
        return;
    mf_gate_close(&t->mover->gate);
    context->held = held;
    mf_gate_open(&t->mover->gate);
    if (!held)
        mf_uffd_wake_all(context->uffd);
}

/* Return: was there an event? */
static bool read_messages(struct fault_thread *t, uint32_t context)
{
    struct mf_context *of = mf_context_at(&t->mover->contexts, context);
    if (!of)
        return false;
    int r = mf_events_read(&t->events, context);
    while (is_short(r) && spare_maps(t))
        r = mf_events_read(&t->events, context);
    if (is_short(r)) {
        /* The fork's event stays where it is, and with it everything that waits for a page of this
         * process, until a child has ended. */
        if (!of->held)
            mf_log(MF_LOG_ERR,
                   "%s: a fork of the target has to wait until one of its %u children whose memory "
                   "is followed has ended: %s (LimitNOFILE= of memferryd.service)",
                   t->mover->name, t->mover->contexts.used - 1, strerror(-r));
        hold(t, of, true);
        t->short_of_fds = true;
        return false;
    }
    if (r < 0)
        mover_fatal("%s: reading the userfaultfd failed: %s", t->mover->name, strerror(-r));
    hold(t, of, false);
    return r > 0;
}

/* The event may be another context's: fork(2) and munmap(2) across two of them hold up the fills of
 * both from the beginning, but send the second's event only when the first's was read. */
static void on_event(void *argument, uint32_t context)
{
    struct fault_thread *t = argument;
    bool event = read_messages(t, context);
    for (uint32_t i = 0; !event && i < t->mover->contexts.count; i++)
        event = i != context && read_messages(t, i);
}

static void changed(void *argument, uint32_t context, const struct uffd_msg *message,
                    uint32_t child)
{
    struct fault_thread *t = argument;
    (void)context;
    (void)message;
    (void)child;
    mover_keep_layout(t->mover);
}

static void forked(void *argument, uint32_t parent, uint32_t context)
{
    struct fault_thread *t = argument;
    arm_uffd(t, context);
    changes_forked(t->mover, &t->events, parent, context);
}

static int maps(void *argument, uint32_t context, pid_t tid, uint64_t addr)
{
    const struct fault_thread *t = argument;
    return changes_maps(t->mover, context, tid, addr);
}

static unsigned observe(void *argument, uint32_t context)
{
    const struct fault_thread *t = argument;
    return changes_observe(t->mover, context);
}

static enum mf_removed removed(void *argument, uint32_t context, uint64_t start_addr,
                               uint64_t end_addr)
{
    struct fault_thread *t = argument;
    return changes_removed(t->mover, &t->events, context, start_addr, end_addr);
}

static uint64_t moved(void *argument, uint32_t context, const struct uffd_msg *message)
{
    const struct fault_thread *t = argument;
    (void)context;
    return changes_moved_bytes(t->mover, message);
}

static void arm_timer(struct fault_thread *t)
{
    if (t->timer_armed || !mf_events_parked(&t->events))
        return;
    struct io_uring_sqe *sqe = get_sqe(t);
    t->timer = (struct __kernel_timespec){.tv_nsec = t->events.unread ? UNREAD_NS : RETRY_NS};
    io_uring_prep_timeout(sqe, &t->timer, 0, 0);
    tag_sqe(sqe, TAG_TIMER, 0);
    t->timer_armed = true;
}

static void arm_children_timer(struct fault_thread *t)
{
    if (t->children_armed || (t->mover->contexts.used <= 1 && !t->short_of_fds))
        return;
    struct io_uring_sqe *sqe = get_sqe(t);
    t->children_timer = (struct __kernel_timespec){.tv_nsec = CHILDREN_NS};
    io_uring_prep_timeout(sqe, &t->children_timer, 0, 0);
    tag_sqe(sqe, TAG_CHILDREN, 0);
    t->children_armed = true;
}

static void uffd_readable(struct fault_thread *t, uint32_t context, const struct io_uring_cqe *cqe)
{
    const struct mf_context *of = mf_context_at(&t->mover->contexts, context);
    const bool more = cqe->flags & IORING_CQE_F_MORE;
    if (of && of->leaving) {
        if (!more) {
            mf_events_drop(&t->events, context);
            atomic_fetch_sub(t->mover->companion.children, 1);
        }
        return;
    }
    if (cqe->res < 0 || (cqe->res & POLLERR))
        mover_fatal("%s: the userfaultfd can't be waited for", t->mover->name);
    mf_events_serve(&t->events, read_messages(t, context));
    if (!more)
        arm_uffd(t, context);
}

static void read_every_context(struct fault_thread *t)
{
    for (uint32_t i = 0; i < t->mover->contexts.count; i++)
        mf_events_serve(&t->events, read_messages(t, i));
}

static void handle(struct fault_thread *t, const struct io_uring_cqe *cqe)
{
    const unsigned index = (unsigned)(cqe->user_data >> 8);
    switch ((enum tag)(cqe->user_data & 0xff)) {
    case TAG_UFFD:
        uffd_readable(t, index, cqe);
        break;
    case TAG_CHILDREN:
        t->children_armed = false;
        look_for_gone_children(t);
        if (t->short_of_fds) {
            t->short_of_fds = false; /* or it is found so again */
            read_every_context(t);
        }
        break;
    case TAG_CANCEL:
        break;
    case TAG_RECV:
        received(t, cqe->res);
        break;
    case TAG_SEND:
        sent(t, cqe->res);
        break;
    case TAG_KICK:
        arm_kick(t);
        break;
    case TAG_TIMER:
        t->timer_armed = false;
        mf_events_give_up_parked(&t->events);
        mover_keep_layout(t->mover);
        break;
    }
}

static void *fault_main(void *argument)
{
    struct fault_thread *t = argument;
    prctl(PR_SET_NAME, "faults");
    int r = ring_open(&t->ring, 64);
    if (r < 0)
        mover_fatal("cannot use io_uring: %s (sysctl kernel.io_uring_disabled?)", strerror(-r));
    for (uint32_t i = 0; i < t->mover->contexts.count; i++)
        arm_uffd(t, i);
    arm_kick(t);
    changes_learn(t->mover, &t->events);
    catch_up(t->mover, on_event, t);
    mf_limbo_clear(&t->events.limbo, &t->mover->layout);
    /* A poll says "readable" on the way from not to readable: what came before is read here. */
    read_every_context(t);
    for (;;) {
        struct io_uring_cqe *cqe;
        change_connection(t);
        send_requests(t);
        arm_recv(t);
        arm_timer(t);
        arm_children_timer(t);
        r = io_uring_submit_and_wait(&t->ring, 1);
        if (r < 0 && r != -EINTR)
            mover_fatal("waiting on io_uring failed: %s", strerror(-r));
        while (io_uring_peek_cqe(&t->ring, &cqe) == 0) {
            struct io_uring_cqe copy = *cqe;
            io_uring_cqe_seen(&t->ring, cqe);
            handle(t, &copy);
            mf_events_serve(&t->events, false); /* what landing a page may have read on the way */
        }
    }
    return NULL;
}

static void kick(struct fault_thread *t)
{
    const uint64_t one = 1;
    ssize_t n = write(t->kick_fd, &one, sizeof(one));
    (void)n;
}

static const struct mf_events_ops discarding_ops = {
    .fault = fault, .discard = discard, .changed = changed, .forked = forked, .maps = maps};
static const struct mf_events_ops telling_ops = {.fault = fault,
                                                 .discard = discard,
                                                 .changed = changed,
                                                 .forked = forked,
                                                 .maps = maps,
                                                 .observe = observe,
                                                 .removed = removed,
                                                 .moved = moved};

int faults_start(struct mover *mover)
{
    struct fault_thread *t = calloc(1, sizeof(*t));
    if (!t)
        return -ENOMEM;
    t->mover = mover;
    t->fd = -1;
    atomic_store(&t->wanted_fd, -1);
    t->lander = account_lander(mover, on_event, t);
    t->lander.by_mapping = true;
    t->events.ops = mover->dontneed_discards ? &discarding_ops : &telling_ops;
    t->events.arg = t;
    t->events.layout = &mover->layout;
    t->events.region = mover->region;
    t->events.region_count = mover->region_count;
    t->events.contexts = &mover->contexts;
    t->events.gate = &mover->gate;
    t->in = aligned_alloc(4096, LEAD + MF_FRAME_DATA_MAX_BYTES + 4096);
    t->kick_fd = eventfd(0, EFD_CLOEXEC);
    if (!t->in || t->kick_fd < 0 || sem_init(&t->done, 0, 0) != 0)
        return -ENOMEM;
    mover->faults = t;
    if (pthread_create(&t->thread, NULL, fault_main, t) != 0)
        return -EAGAIN;
    return 0;
}

static void change(struct fault_thread *t, int fd)
{
    atomic_store(&t->wanted_fd, fd);
    kick(t);
    while (sem_wait(&t->done) != 0)
        ;
}

void faults_attach(struct mover *mover, int urgent_fd)
{
    change(mover->faults, urgent_fd);
}

void faults_detach(struct mover *mover)
{
    change(mover->faults, -1);
}
