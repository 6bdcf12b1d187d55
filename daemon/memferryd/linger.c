/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A destination's userfaultfd after its session.
 *
 * A thread that forks or changes its layout waits until the event of that is read. When the session
 * ends, its memory is unregistered and causes no more of them; but one may be on its way: the
 * kernel sends it after the copying of the address space, say, with no lock held. Closing the
 * descriptor would let its sender go on, if that were the last reference. It may not be: the child
 * that is just being made has the descriptor of its parent already, and its parent waits, for ever.
 * So what comes is still read for a while, by nobody but this.
 */
#include "daemon/memferryd/session.h"

#include <stdlib.h>
#include <unistd.h>

#include "lib/uapi.h"

/* From the unregistering on; what is on its way takes microseconds, if the processor is not taken
 * away from it. */
#define LINGER_S 2

struct lingering {
    struct lingering *next;
    int uffd;
    struct event *readable, *timer;
};

static struct lingering *lingers; /* of the one daemon of this process */

void drop_events(int uffd)
{
    struct uffd_msg messages[64];
    ssize_t n;
    while ((n = read(uffd, messages, sizeof(messages))) > 0)
        for (size_t i = 0; i < (size_t)n / sizeof(messages[0]); i++)
            if (messages[i].event == UFFD_EVENT_FORK)
                close((int)messages[i].arg.fork.ufd);
}

static void destroy(struct lingering *l)
{
    if (l->readable)
        event_free(l->readable);
    if (l->timer)
        event_free(l->timer);
    drop_events(l->uffd);
    close(l->uffd);
    free(l);
}

static void on_readable(evutil_socket_t fd, short what, void *arg)
{
    (void)what;
    (void)arg;
    drop_events((int)fd);
}

static void on_time(evutil_socket_t fd, short what, void *arg)
{
    struct lingering **at = &lingers;
    (void)fd;
    (void)what;
    while (*at != arg)
        at = &(*at)->next;
    *at = (*at)->next;
    destroy(arg);
}

void linger(struct daemon *daemon, int uffd)
{
    struct lingering *l = calloc(1, sizeof(*l));
    drop_events(uffd);
    if (!l) {
        close(uffd);
        return;
    }
    l->uffd = uffd;
    l->readable = event_new(daemon_base(daemon), uffd, EV_READ | EV_PERSIST, on_readable, l);
    l->timer = evtimer_new(daemon_base(daemon), on_time, l);
    if (!l->readable || !l->timer || event_add(l->readable, NULL) != 0 ||
        evtimer_add(l->timer, &(struct timeval){.tv_sec = LINGER_S}) != 0) {
        destroy(l);
        return;
    }
    l->next = lingers;
    lingers = l;
}

void lingers_drop(void)
{
    while (lingers) {
        struct lingering *l = lingers;
        lingers = l->next;
        destroy(l);
    }
}
