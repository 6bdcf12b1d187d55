/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * memferry-mover: the data plane of one session on one host. Started by memferryd, never by hand:
 *
 *     memferry-mover IPC-FD UID GID LOG-LEVEL source|destination
 *
 * It becomes UID:GID without capabilities, takes descriptors over IPC-FD, puts a system-call filter
 * around itself and then serves until memferryd closes the socket.
 */
#include "daemon/mover/mover.h"
#include "daemon/mover/schedule.h"
#include "daemon/mover/source/tracker.h"

#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <unistd.h>

#include "lib/log.h"
#include "lib/util.h"

void mover_fatal(const char *fmt, ...)
{
    char text[768];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    mf_log(MF_LOG_ERR, "%s", text);
    _exit(EXIT_FAILURE);
}

void mover_tell(struct mover *mover, const struct mf_ipc *message)
{
    struct mf_ipc numbered = *message;
    if (!numbered.link_number)
        numbered.link_number = mover->link.number;
    /* Without memferryd there is nobody to serve for; the page states are in the file. */
    if (mf_ipc_send(mover->ipc_fd, &numbered, -1) < 0)
        exit(EXIT_SUCCESS);
}

void mover_wake(struct mover *mover)
{
    const uint64_t one = 1;
    ssize_t n = write(mover->wake_fd, &one, sizeof(one));
    (void)n; /* EAGAIN: it is awake already */
}

static void take_order(struct mover *mover)
{
    struct mf_ipc message;
    int fd = -1;
    int r = mf_ipc_receive(mover->ipc_fd, &message, &fd);
    if (r == -EAGAIN)
        return;
    if (r <= 0)
        exit(EXIT_SUCCESS);
    switch ((enum mf_ipc_type)message.type) {
    case MF_IPC_LINK:
        link_begin(mover, &message);
        break;
    case MF_IPC_CONNECTION:
        link_add(mover, message.connection.kind, message.connection.stream, mf_steal_fd(&fd));
        break;
    case MF_IPC_DEVICE:
        tunnel_set(&mover->tunnel, 0, mf_steal_fd(&fd));
        break;
    case MF_IPC_PROCEED:
        control_proceed(mover, message.text);
        break;
    case MF_IPC_ROUND:
        sweep_round(mover);
        break;
    case MF_IPC_CUT_ROUND:
        sweep_cut_round(mover);
        break;
    case MF_IPC_SETTINGS:
        sweep_set_pace(mover, message.bandwidth_bits_s);
        break;
    case MF_IPC_FROZEN:
        sweep_frozen(mover);
        break;
    case MF_IPC_COUNT:
        mover_tell(mover, &(struct mf_ipc){.type = MF_IPC_COUNTED,
                                           .dirty_pages = sweep_count_dirty(mover)});
        break;
    case MF_IPC_CONFIRM:
        sweep_release(mover);
        break;
    case MF_IPC_SEND:
        if (message.link_number != mover->link.number)
            break; /* it was meant for a link that is no more; the next hello says the same */
        if (message.phase == MEMFERRY__PEER__PHASE__PHASE_RELEASE)
            mover->released = true;
        control_send_phase(mover, message.phase, message.blackout_us);
        if (message.phase == MEMFERRY__PEER__PHASE__PHASE_RELEASE)
            sweep_release(mover);
        break;
    case MF_IPC_SEND_ABORT:
        control_send_abort(mover, message.text, message.cancelled);
        break;
    case MF_IPC_UNLINK:
        control_flush(mover, 200);
        link_drop(mover);
        break;
    default:
        mover_fatal("memferryd sent a message of type %" PRIu32 " that a mover does not take",
                    message.type);
    }
    if (fd >= 0)
        close(fd);
}

static void look_at_flags(struct mover *mover)
{
    uint64_t count;
    ssize_t n = read(mover->wake_fd, &count, sizeof(count));
    (void)n;
    link_reap(mover);
    if (atomic_load(&mover->confirmed_all) && !mover->confirmed_all_told) {
        mover->confirmed_all_told = true;
        mover_tell(mover, &(struct mf_ipc){.type = MF_IPC_CONFIRMED_ALL});
    }
}

/* Every connection has brought the round's barrier: all of it lies in the RAM files. */
static void acknowledge_round(struct mover *mover)
{
    struct link *link = &mover->link;
    if (mover->role == MF_DESTINATION && link->up &&
        atomic_load(&link->round_barriers) >= link->streams) {
        atomic_store(&link->round_barriers, 0);
        control_send_round_landed(mover, atomic_load(&link->round));
    }
}

/* Every connection has brought its barrier and pages are still missing: say which, once more. Not
 * while an earlier list has not left: a source that does not read must not make it grow. */
static void name_missing(struct mover *mover)
{
    struct link *link = &mover->link;
    if (mover->role == MF_DESTINATION && link->up && !atomic_load(&mover->confirmed_all) &&
        link->control.out_have == 0 && atomic_load(&link->barriers) >= link->streams) {
        atomic_store(&link->barriers, 0);
        control_send_missing(mover);
    }
}

static void serve(struct mover *mover)
{
    for (;;) {
        struct pollfd wait[5] = {
            {.fd = mover->ipc_fd, .events = POLLIN},
            {.fd = mover->wake_fd, .events = POLLIN},
            {.fd = mover->link.control.fd,
             .events = (short)(POLLIN | (mover->link.control.out_have ? POLLOUT : 0))},
            {.fd = -1},
            {.fd = -1},
        };
        for (unsigned end = 0; end < 2; end++) {
            wait[3 + end].events = tunnel_events(&mover->tunnel, end);
            if (wait[3 + end].events)
                wait[3 + end].fd = mover->tunnel.fd[end];
        }
        if (poll(wait, 5, -1) < 0) {
            if (errno == EINTR)
                continue;
            mover_fatal("waiting for events failed: %s", strerror(errno));
        }
        /* The device stream first: it is what a paused guest waits for. */
        if (wait[3].revents || wait[4].revents)
            tunnel_pump(mover);
        if (wait[2].revents & POLLOUT)
            control_writable(mover);
        if (wait[2].revents & (POLLIN | POLLHUP | POLLERR))
            control_readable(mover);
        if (wait[1].revents)
            look_at_flags(mover);
        else
            link_reap(mover);
        acknowledge_round(mover);
        name_missing(mover);
        if (wait[0].revents)
            take_order(mover);
    }
}

/* Every process that the target forks takes two. @left: so many are not for this process. */
static void set_fd_limit(rlim_t left)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_max > 2 * left) {
        limit.rlim_cur = limit.rlim_max - left;
        setrlimit(RLIMIT_NOFILE, &limit);
    }
}

int main(int argc, char **argv)
{
    static struct mover mover; /* large: the layout's table */
    if (argc != 6) {
        fprintf(stderr,
                "memferry-mover is started by memferryd; there is nothing to run by hand.\n");
        return 2;
    }
    /* A mover must not outlive the memferryd that knows of it unnoticed. */
    mf_log_setup("memferry-mover", (enum mf_log_level)atoi(argv[4]));
    signal(SIGPIPE, SIG_IGN);
    signal(SIGINT, SIG_IGN); /* a Ctrl-C on memferryd's terminal is memferryd's to act on */
    mover.ipc_fd = atoi(argv[1]);
    mover.link.control.fd = -1;
    mover.link.urgent_fd = -1;
    mover.pagemap_fd = mover.populated_fd = mover.smaps_fd = -1;
    tunnel_init(&mover.tunnel);
    pthread_mutex_init(&mover.link.reason_lock, NULL);

    struct mf_error err;
    const uid_t uid = (uid_t)strtoul(argv[2], NULL, 10);
    const gid_t gid = (gid_t)strtoul(argv[3], NULL, 10);
    set_fd_limit(0);
    schedule_first(); /* the companion too: while it looks nobody resolves */
    mover.companion.sock = -1;
    if (strcmp(argv[5], "destination") == 0 &&
        companion_start(&mover.companion, mover.ipc_fd, uid, gid, &err) < 0)
        mover_fatal("%s", err.text);
    if (mover.companion.sock >= 0)
        set_fd_limit(COMPANION_FDS);
    if (sandbox_drop_privileges(uid, gid, &err) < 0)
        mover_fatal("%s", err.text);
    mover.wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (mover.wake_fd < 0)
        mover_fatal("cannot make an eventfd: %s", strerror(errno));
    mover_setup(&mover);
    if (sandbox_filter(&err) < 0)
        mover_fatal("%s", err.text);
    if (mover.role == MF_DESTINATION && faults_start(&mover) < 0)
        mover_fatal("cannot start the fault thread of %s: %s", mover.name, strerror(errno));
    if (mover.role == MF_SOURCE && tracker_start(&mover) < 0)
        mover_fatal("cannot follow the layout of %s: %s", mover.name, strerror(errno));
    mover_tell(&mover, &(struct mf_ipc){.type = MF_IPC_READY});
    serve(&mover);
}
