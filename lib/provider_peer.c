/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Pages from a peer: REQUEST frames out, DATA and ZERO frames in (proto/frame.md).
 *
 * The serving thread sends; what the socket does not take is kept for the receiving thread, which
 * lands what comes. A request that there is no room for, or that was lost with a connection, is not
 * forgotten: FAULTED stands in the page's state, and the receiving thread asks for all those.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "lib/server.h"
#include "lib/util.h"

#define IN_ROOM (2u * MF_FRAME_DATA_MAX_BYTES)
#define OUT_ROOM (4096u * MF_FRAME_HEADER_BYTES)

struct peer {
    struct memferry_server *server;
    struct mf_lander lander; /**< the receiving thread's */
    void (*lost)(void *arg, int error);
    void *lost_arg;
    pthread_t thread;
    int wake_fd;
    _Atomic bool stop;

    pthread_mutex_t lock; /**< of what follows */
    int fd;               /**< -1: no connection; only the receiving thread takes it away */
    int next_fd;          /**< what memferry_peer_reconnect() brought */
    bool ask_again;       /**< a request was dropped */
    size_t out_have;
    uint8_t out[OUT_ROOM];

    /* The receiving thread's. */
    uint8_t *in;
    size_t in_have;
};

static void wake(struct peer *p)
{
    const uint64_t one = 1;
    ssize_t n = write(p->wake_fd, &one, sizeof(one));
    (void)n;
}

/* ---- requests; with the lock ---- */

static void flush(struct peer *p)
{
    while (p->out_have > 0 && p->fd >= 0) {
        ssize_t n = send(p->fd, p->out, p->out_have, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return; /* full; or broken, which the receiving thread finds */
        p->out_have -= (size_t)n;
        memmove(p->out, p->out + n, p->out_have);
    }
}

static void request(struct peer *p, uint32_t region, uint64_t page)
{
    if (p->fd < 0)
        return;
    if (p->out_have + MF_FRAME_HEADER_BYTES > sizeof(p->out)) {
        p->ask_again = true;
        return;
    }
    mf_frame_encode(
        &(struct mf_frame){
            .type = MF_FRAME_REQUEST, .region = (uint16_t)region, .first_page = page, .pages = 1},
        p->out + p->out_have);
    p->out_have += MF_FRAME_HEADER_BYTES;
}

static void request_all(struct peer *p)
{
    const struct memferry_server *s = p->server;
    const uint32_t regions = atomic_load(&s->region_count);
    p->ask_again = false;
    for (uint32_t region = 0; region < regions; region++) {
        const uint64_t pages = s->region[region].pages;
        for (uint64_t page = 0; page < pages && !p->ask_again;) {
            uint8_t faulted;
            uint64_t run =
                mf_page_run_of(&s->pages[region], MF_PAGE_FAULTED, page, pages, &faulted);
            for (uint64_t i = 0; faulted && i < run && !p->ask_again; i++)
                request(p, region, page + i);
            page += run;
        }
    }
}

static int want(void *argument, struct memferry_server *server, struct memferry_want *want)
{
    (void)server;
    struct peer *p = argument;
    pthread_mutex_lock(&p->lock);
    const bool first = p->out_have == 0;
    request(p, want->region, want->first_page);
    flush(p);
    const bool kept = first && p->out_have > 0;
    pthread_mutex_unlock(&p->lock);
    if (kept) /* the receiving thread must wait for room too */
        wake(p);
    return MEMFERRY_LATER;
}

/* ---- answers ---- */

/* Wait until the socket has something, and send what is still to be sent. Return: 0 or -errno. */
static int await(struct peer *p)
{
    while (!atomic_load(&p->stop)) {
        pthread_mutex_lock(&p->lock);
        if (p->ask_again && p->out_have == 0)
            request_all(p);
        flush(p);
        struct pollfd ready[2] = {
            {.fd = p->fd, .events = (short)(p->out_have > 0 ? POLLIN | POLLOUT : POLLIN)},
            {.fd = p->wake_fd, .events = POLLIN}};
        pthread_mutex_unlock(&p->lock);
        if (poll(ready, 2, -1) < 0 && errno != EINTR)
            return -errno;
        if (ready[1].revents) {
            uint64_t woken;
            ssize_t n = read(p->wake_fd, &woken, sizeof(woken));
            (void)n;
        }
        if (ready[0].revents & (POLLIN | POLLHUP | POLLERR) || ready[0].fd < 0)
            return 0;
    }
    return -ECANCELED;
}

/* Up to @room bytes. Return: how many, or -errno; the peer's close is -ECONNRESET. */
static ssize_t receive(struct peer *p, uint8_t *to, size_t room)
{
    for (;;) {
        ssize_t n = recv(p->fd, to, room, MSG_DONTWAIT);
        if (n > 0)
            return n;
        if (n == 0)
            return -ECONNRESET;
        if (errno != EAGAIN && errno != EINTR)
            return -errno;
        int r = await(p);
        if (r < 0)
            return r;
    }
}

static int receive_all(struct peer *p, uint8_t *to, uint64_t length_bytes)
{
    while (length_bytes > 0) {
        ssize_t n = receive(p, to, length_bytes);
        if (n < 0)
            return (int)n;
        to += n;
        length_bytes -= (uint64_t)n;
    }
    return 0;
}

/* @bytes of the buffer are done with. */
static void consume(struct peer *p, size_t bytes)
{
    p->in_have -= bytes;
    memmove(p->in, p->in + bytes, p->in_have);
}

/* @length_bytes of payload, a part of which may be in the buffer. */
static int receive_payload(struct peer *p, uint8_t *to, uint64_t length_bytes)
{
    const size_t along = p->in_have < length_bytes ? p->in_have : length_bytes;
    memcpy(to, p->in, along);
    consume(p, along);
    return receive_all(p, to + along, length_bytes - along);
}

/* Pages of hugetlbfs: the header is in the buffer. */
static int receive_huge(struct peer *p, struct mf_frame frame)
{
    const uint64_t end = frame.first_page + frame.pages;
    const uint32_t page_bytes = p->server->region[frame.region].page_bytes;
    cleanup_free uint8_t *scratch = NULL;
    int r = 0;
    consume(p, MF_FRAME_HEADER_BYTES);
    for (frame.pages = 1; r == 0 && frame.first_page < end; frame.first_page++) {
        uint8_t *to = NULL;
        int begun = mf_land_begin_huge(&p->lander, &frame, &to);
        if (begun < 0)
            server_failed(p->server, &p->lander, frame.region, frame.first_page, 1, begun);
        if (!to && !scratch && !(scratch = malloc(page_bytes)))
            return -ENOMEM;
        r = receive_payload(p, to ? to : scratch, page_bytes);
        if (to)
            mf_land_end_huge(&p->lander, &frame, r == 0);
    }
    return r;
}

static int take_frame(struct peer *p)
{
    struct memferry_server *s = p->server;
    struct mf_frame_region regions[MEMFERRY_REGIONS_MAX];
    const uint32_t region_count = atomic_load(&s->region_count);
    struct mf_frame frame;
    const char *why_not;
    for (uint32_t i = 0; i < region_count; i++)
        regions[i] = (struct mf_frame_region){s->region[i].pages, s->region[i].page_bytes};
    if (mf_frame_decode(p->in, &frame, &why_not) < 0 ||
        mf_frame_check(&frame, regions, region_count, true, &why_not) < 0 ||
        (frame.flags & MF_FRAME_FLAG_ROUND))
        return -EPROTO;
    if (frame.type == MF_FRAME_DATA && s->region[frame.region].kind == MF_MEMORY_HUGETLB)
        return receive_huge(p, frame);
    const size_t length = MF_FRAME_HEADER_BYTES + frame.length_bytes;
    if (p->in_have < length) {
        int r = receive_all(p, p->in + p->in_have, length - p->in_have);
        if (r < 0)
            return r;
        p->in_have = length;
    }
    if (frame.type == MF_FRAME_DATA)
        server_land(s, &p->lander, MEMFERRY_DATA, frame.region, frame.first_page, frame.pages,
                    p->in + MF_FRAME_HEADER_BYTES);
    else if (frame.type == MF_FRAME_ZERO)
        server_land(s, &p->lander, MEMFERRY_ZERO, frame.region, frame.first_page, frame.pages,
                    NULL);
    consume(p, length);
    return 0;
}

/* One connection from beginning to end. Return: why it ended. */
static int serve_connection(struct peer *p)
{
    p->in_have = 0;
    for (;;) {
        while (p->in_have < MF_FRAME_HEADER_BYTES) {
            ssize_t n = receive(p, p->in + p->in_have, IN_ROOM - p->in_have);
            if (n < 0)
                return (int)n;
            p->in_have += (size_t)n;
        }
        int r = take_frame(p);
        if (r < 0)
            return r;
    }
}

static void *receive_main(void *argument)
{
    struct peer *p = argument;
    prctl(PR_SET_NAME, "memferry-peer");
    while (!atomic_load(&p->stop)) {
        pthread_mutex_lock(&p->lock);
        if (p->fd < 0 && p->next_fd >= 0) {
            p->fd = p->next_fd;
            p->next_fd = -1;
            p->out_have = 0;
            request_all(p);
        }
        const bool connected = p->fd >= 0;
        pthread_mutex_unlock(&p->lock);
        if (!connected) {
            await(p); /* no socket: poll(2) leaves a negative descriptor out */
            continue;
        }
        int r = serve_connection(p);
        pthread_mutex_lock(&p->lock);
        close(p->fd);
        p->fd = -1;
        pthread_mutex_unlock(&p->lock);
        if (p->lost && !atomic_load(&p->stop))
            p->lost(p->lost_arg, r);
    }
    return NULL;
}

/* ---- from beginning to end ---- */

static void free_peer(struct peer *p)
{
    mf_close_p(&p->fd);
    mf_close_p(&p->next_fd);
    mf_close_p(&p->wake_fd);
    pthread_mutex_destroy(&p->lock);
    free(p->in);
    free(p);
}

static void end_peer(void *argument)
{
    struct peer *p = argument;
    atomic_store(&p->stop, true);
    wake(p);
    pthread_join(p->thread, NULL);
    free_peer(p);
}

/* Return: a duplicate of a socket, or -errno. */
static int own_socket(int socket)
{
    int type;
    socklen_t size = sizeof(type);
    if (getsockopt(socket, SOL_SOCKET, SO_TYPE, &type, &size) != 0)
        return -errno;
    if (type != SOCK_STREAM)
        return -ENOTSOCK;
    int fd = fcntl(socket, F_DUPFD_CLOEXEC, 0);
    return fd < 0 ? -errno : fd;
}

int memferry_provider_peer(struct memferry_server *server, int socket,
                           void (*lost)(void *arg, int error), void *arg,
                           struct memferry_provider *out)
{
    if (server_check_out(out) < 0)
        return -EINVAL;
    struct peer *p = calloc(1, sizeof(*p));
    if (!p)
        return server_fail(ENOMEM, "out of memory for a provider");
    p->server = server;
    p->lander = server_lander(server);
    p->lander.resolver.lane = server_lane(server);
    p->lost = lost;
    p->lost_arg = arg;
    p->fd = -1;
    p->next_fd = own_socket(socket);
    p->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    p->in = aligned_alloc(4096, IN_ROOM);
    pthread_mutex_init(&p->lock, NULL);
    int r = p->next_fd < 0 ? p->next_fd : p->wake_fd < 0 || !p->in ? -ENOMEM : 0;
    if (r == 0) {
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_BLOCK, &all, &before);
        r = -pthread_create(&p->thread, NULL, receive_main, p);
        pthread_sigmask(SIG_SETMASK, &before, NULL);
    }
    if (r < 0) {
        free_peer(p);
        return server_fail(-r, "cannot take pages from a peer: %s", strerror(-r));
    }
    return server_give_provider(
        &(struct memferry_provider){.arg = p, .want = want, .close = end_peer}, out);
}

int memferry_peer_reconnect(const struct memferry_provider *provider, int socket)
{
    if (provider->want != want)
        return server_fail(EINVAL, "this provider is no peer");
    struct peer *p = provider->arg;
    int fd = own_socket(socket);
    if (fd < 0)
        return server_fail(-fd, "cannot take pages from this peer: %s", strerror(-fd));
    pthread_mutex_lock(&p->lock);
    const bool taken = p->fd >= 0 || p->next_fd >= 0;
    if (!taken)
        p->next_fd = fd;
    pthread_mutex_unlock(&p->lock);
    if (taken) {
        close(fd);
        return server_fail(EALREADY, "the peer's connection has not been lost");
    }
    wake(p);
    return 0;
}
