/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The life of a link: connections arrive, the hellos run (control.c), threads start; and the way
 * back. */
#include "daemon/mover/mover.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "lib/log.h"

void link_begin(struct mover *mover, const struct mf_ipc *message)
{
    struct link *link = &mover->link;
    link_drop(mover);
    pthread_mutex_lock(&link->reason_lock);
    atomic_store(&link->failed, false); /* what a thread of an older link may still have said */
    pthread_mutex_unlock(&link->reason_lock);
    if (message->link.link == 0 || message->link.streams == 0 ||
        message->link.streams > MOVER_STREAMS_MAX)
        mover_fatal("memferryd began a link with %u streams", message->link.streams);
    link->number = message->link.link;
    link->streams = message->link.streams;
    link->urgent_fd = -1;
    for (unsigned i = 0; i < MOVER_STREAMS_MAX; i++)
        link->bulk[i] = (struct bulk_thread){.mover = mover, .stream = i, .fd = -1};
    if (mover->role == MF_SOURCE) {
        mover->released = message->link.released;
        mover->guest_running = message->link.guest_running;
    }
}

static bool complete(const struct link *link)
{
    if (link->control.fd < 0 || link->urgent_fd < 0)
        return false;
    for (unsigned i = 0; i < link->streams; i++)
        if (link->bulk[i].fd < 0)
            return false;
    return true;
}

void link_add(struct mover *mover, uint32_t kind, uint32_t stream, int fd)
{
    struct link *link = &mover->link;
    int *place = NULL;
    if (kind == MF_CONNECTION_CONTROL)
        place = &link->control.fd;
    else if (kind == MF_CONNECTION_URGENT)
        place = &link->urgent_fd;
    else if (kind == MF_CONNECTION_BULK && stream < link->streams)
        place = &link->bulk[stream].fd;
    if (kind == MF_CONNECTION_DEVICE && link->number && mover->tunnel.fd[1] < 0) {
        tunnel_set(&mover->tunnel, 1, fd);
        return;
    }
    if (!link->number) {
        close(fd); /* of a link that has been dropped meanwhile */
        return;
    }
    if (!place || *place >= 0) {
        close(fd);
        link_fail(mover, "the peer opened a connection twice");
        return;
    }
    *place = fd;
    if (complete(link) && mover->role == MF_SOURCE)
        control_send_hello(mover);
}

void link_fail(struct mover *mover, const char *fmt, ...)
{
    struct link *link = &mover->link;
    pthread_mutex_lock(&link->reason_lock);
    if (!atomic_load(&link->failed)) {
        va_list ap;
        va_start(ap, fmt);
        vsnprintf(link->reason, sizeof(link->reason), fmt, ap);
        va_end(ap);
        atomic_store(&link->failed, true);
    }
    pthread_mutex_unlock(&link->reason_lock);
    mover_wake(mover);
}

void link_start_threads(struct mover *mover)
{
    struct link *link = &mover->link;
    atomic_store(&link->stop, false);
    atomic_store(&link->barriers, 0);
    atomic_store(&link->round_barriers, 0);
    if (mover->role == MF_DESTINATION) {
        faults_attach(mover, link->urgent_fd);
    } else {
        if (pthread_create(&link->urgent_thread, NULL, source_urgent_main, mover) != 0)
            mover_fatal("cannot start the urgent thread of %s", mover->name);
        link->urgent_started = true;
    }
    for (unsigned i = 0; i < link->streams; i++) {
        struct bulk_thread *bulk = &link->bulk[i];
        if (pthread_create(&bulk->thread, NULL,
                           mover->role == MF_SOURCE ? source_bulk_main : destination_bulk_main,
                           bulk) != 0)
            mover_fatal("cannot start a bulk thread of %s", mover->name);
        bulk->started = true;
    }
    link->up = true;
}

static void hang_up(int fd)
{
    if (fd >= 0)
        shutdown(fd, SHUT_RDWR);
}

void link_drop(struct mover *mover)
{
    struct link *link = &mover->link;
    if (!link->number)
        return;
    atomic_store(&link->stop, true);
    hang_up(link->control.fd);
    hang_up(link->urgent_fd);
    for (unsigned i = 0; i < link->streams; i++)
        hang_up(link->bulk[i].fd);
    if (mover->role == MF_SOURCE) {
        /* Those that wait for a pass must see `stop`. */
        pthread_mutex_lock(&mover->sweep.lock);
        pthread_cond_broadcast(&mover->sweep.changed);
        pthread_mutex_unlock(&mover->sweep.lock);
    } else if (link->up) {
        faults_detach(mover);
    }
    if (link->urgent_started)
        pthread_join(link->urgent_thread, NULL);
    for (unsigned i = 0; i < link->streams; i++) {
        if (link->bulk[i].started)
            pthread_join(link->bulk[i].thread, NULL);
        if (link->bulk[i].fd >= 0)
            close(link->bulk[i].fd);
        link->bulk[i] = (struct bulk_thread){.fd = -1};
    }
    if (link->urgent_fd >= 0)
        close(link->urgent_fd);
    control_close(&link->control);
    tunnel_close(&mover->tunnel);
    link->number = 0;
    link->streams = 0;
    link->up = link->hello_seen = link->missing_open = link->urgent_started = false;
    link->urgent_fd = -1;
    pthread_mutex_lock(&link->reason_lock);
    atomic_store(&link->failed, false);
    link->reason[0] = '\0';
    pthread_mutex_unlock(&link->reason_lock);
}

void link_reap(struct mover *mover)
{
    struct link *link = &mover->link;
    if (!link->number || !atomic_load(&link->failed))
        return;
    struct mf_ipc lost = {.type = MF_IPC_LINK_LOST, .link_number = link->number};
    pthread_mutex_lock(&link->reason_lock);
    memcpy(lost.text, link->reason, sizeof(link->reason));
    pthread_mutex_unlock(&link->reason_lock);
    mf_log(MF_LOG_NOTICE, "%s: %s", mover->name, lost.text);
    link_drop(mover);
    mover_tell(mover, &lost);
}
