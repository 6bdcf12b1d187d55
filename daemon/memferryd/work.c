/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/memferryd/work.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

static struct work *works; /* of the one daemon of this process, in the order they were started */

static void *thread_main(void *arg)
{
    struct work *work = arg;
    work->run(work);
    eventfd_write(work->ended_fd, 1);
    return NULL;
}

static void begin(struct work *work)
{
    sigset_t all, before;
    work->begun = true;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    work->has_thread = pthread_create(&work->thread, NULL, thread_main, work) == 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (!work->has_thread)
        thread_main(work); /* late is better than not at all */
}

/* The oldest of @pid, unless it is being done. */
static void begin_next(pid_t pid)
{
    struct work *work = works;
    while (work && work->pid != pid)
        work = work->next;
    if (work && !work->begun)
        begin(work);
}

static void end(struct work *work)
{
    const pid_t pid = work->pid;
    struct work **at = &works;
    if (work->has_thread)
        pthread_join(work->thread, NULL);
    while (*at != work)
        at = &(*at)->next;
    *at = work->next;
    event_free(work->ended);
    close(work->ended_fd);
    work->done(work);
    begin_next(pid);
}

static void on_ended(evutil_socket_t fd, short what, void *arg)
{
    (void)fd;
    (void)what;
    end(arg);
}

int work_start(struct event_base *base, struct work *work, struct mf_error *err)
{
    struct work **last = &works;
    work->next = NULL;
    work->begun = work->has_thread = false;
    work->ended_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (work->ended_fd < 0)
        return mf_fail(err, errno, "cannot wait for a thread: %s", strerror(errno));
    work->ended = event_new(base, work->ended_fd, EV_READ, on_ended, work);
    if (!work->ended || event_add(work->ended, NULL) != 0) {
        if (work->ended)
            event_free(work->ended);
        close(work->ended_fd);
        return mf_fail(err, ENOMEM, "cannot wait for a thread: out of memory");
    }
    while (*last)
        last = &(*last)->next;
    *last = work;
    begin_next(work->pid);
    return 0;
}

void works_finish(void)
{
    /* The oldest of all is the oldest of its process, so it has begun. */
    while (works)
        end(works);
}
