/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Destination: connections from the network. All that memferryd reads of one is the preamble, of
 * fixed size; then the connection goes to the mover of the session that it names, or is answered
 * with a refusal and closed. Whoever does not send a preamble in time is closed too.
 */
#include "daemon/memferryd/session.h"

#include <arpa/inet.h>
#include <errno.h>
#include <event2/listener.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "lib/log.h"
#include "lib/util.h"
#include "proto/frame.h"

#define GUESTS_MAX 128 /**< connections whose preamble is awaited */
#define PREAMBLE_TIMEOUT_S 10

struct guest {
    struct guest *next;
    struct listener *listener;
    int fd;
    struct event *event;
    char peer[64];
    uint8_t bytes[MF_PREAMBLE_BYTES];
    size_t have;
};

struct listener {
    struct daemon *daemon;
    struct evconnlistener *accepting;
    struct guest *guests;
    unsigned guest_count;
};

static void drop(struct guest *g)
{
    struct guest **at = &g->listener->guests;
    while (*at != g)
        at = &(*at)->next;
    *at = g->next;
    g->listener->guest_count--;
    event_free(g->event);
    if (g->fd >= 0)
        close(g->fd);
    free(g);
}

static void reply(const struct guest *g, enum mf_preamble_status status)
{
    uint8_t bytes[MF_PREAMBLE_REPLY_BYTES];
    mf_preamble_reply_encode(&(struct mf_preamble_reply){.version = MF_WIRE_VERSION,
                                                         .oldest_version = MF_WIRE_OLDEST_VERSION,
                                                         .status = (uint32_t)status},
                             bytes);
    ssize_t n = send(g->fd, bytes, sizeof(bytes), MSG_NOSIGNAL | MSG_DONTWAIT);
    (void)n; /* the mover will see a connection that is broken */
}

static bool same_id(const struct session *session, const struct mf_preamble *preamble)
{
    return session->id_text[0] &&
           memcmp(session->id, preamble->session_id, sizeof(session->id)) == 0;
}

/* What a source of an ended session is to hear: may it let its VM go? */
static enum mf_preamble_status ended_status(const struct session *session)
{
    return session->state == MF_DONE ? MF_PREAMBLE_DRAINED : MF_PREAMBLE_ENDED;
}

/* The control connection opens a link. */
static enum mf_preamble_status open_link(struct session *session, const struct guest *g,
                                         const struct mf_preamble *preamble)
{
    if (preamble->streams == 0 || preamble->streams > MF_MAX_STREAMS)
        return MF_PREAMBLE_BUSY;
    if (!same_id(session, preamble)) {
        /* A source that reconnects means an earlier session, which a memferryd before this one had;
         * its guest is not to be put into a VM that waits for another. */
        if (preamble->link != 1)
            return MF_PREAMBLE_UNKNOWN_NAME;
        /* Until the VM has been touched another attempt may take the place of one that broke. */
        if (session->state != MF_D_WAITING || session->link_open)
            return MF_PREAMBLE_TAKEN;
    } else if (preamble->link <= session->link) {
        return MF_PREAMBLE_BUSY;
    }
    if (!mover_is_ready(session))
        return MF_PREAMBLE_BUSY;
    if (session->link_open) {
        /* The source noticed sooner than this host that the link before was lost. */
        mover_order(session, &(struct mf_ipc){.type = MF_IPC_UNLINK}, -1);
        session->link_open = false;
        session_set_reason(session, "the source at %s connected anew", g->peer);
        session_event(session, MF_EV_LINK_LOST);
        if (session_ended(session))
            return ended_status(session);
    }
    if (session->state == MF_D_WAITING) {
        session_set_id(session, preamble->session_id);
        session->started_ns = mf_now_ns();
    }
    session->link = preamble->link;
    session->streams = preamble->streams;
    session->link_open = true;
    snprintf(session->peer, sizeof(session->peer), "%s", g->peer);
    mover_order(session,
                &(struct mf_ipc){.type = MF_IPC_LINK,
                                 .link = {.link = preamble->link, .streams = preamble->streams}},
                -1);
    return MF_PREAMBLE_OK;
}

static enum mf_preamble_status welcome(struct guest *g, const struct mf_preamble *preamble)
{
    if (!mf_versions_meet(preamble->version, preamble->oldest_version))
        return MF_PREAMBLE_VERSION;
    bool done = false;
    if (session_remembered(preamble->session_id, &done))
        return done ? MF_PREAMBLE_DRAINED : MF_PREAMBLE_ENDED;
    struct session *session = session_find(g->listener->daemon, preamble->name);
    if (!session || session->role != MF_DESTINATION || session->starting)
        return MF_PREAMBLE_UNKNOWN_NAME;
    if (session_ended(session)) {
        if (!same_id(session, preamble))
            return MF_PREAMBLE_UNKNOWN_NAME;
        return ended_status(session);
    }
    if (preamble->kind == MF_CONNECTION_ABANDON) {
        if (same_id(session, preamble)) {
            session_set_reason(session, "the source at %s gave up; the guest runs there", g->peer);
            session_event(session, MF_EV_PEER_FAILED);
        }
        return MF_PREAMBLE_OK;
    }
    if (preamble->kind == MF_CONNECTION_CONTROL) {
        enum mf_preamble_status status = open_link(session, g, preamble);
        if (status != MF_PREAMBLE_OK)
            return status;
    } else if (!same_id(session, preamble) || !session->link_open ||
               preamble->link != session->link || preamble->streams != session->streams) {
        return MF_PREAMBLE_BUSY;
    }
    /* The mover has it before the source hears that it may speak. */
    mover_order(
        session,
        &(struct mf_ipc){.type = MF_IPC_CONNECTION,
                         .connection = {.kind = preamble->kind, .stream = preamble->stream}},
        g->fd);
    return MF_PREAMBLE_OK;
}

static void on_bytes(evutil_socket_t fd, short what, void *arg)
{
    struct guest *g = arg;
    struct mf_preamble preamble;
    const char *why = NULL;
    if (what & EV_TIMEOUT) {
        mf_log(MF_LOG_NOTICE, "%s connected and said nothing for %d s; closed", g->peer,
               PREAMBLE_TIMEOUT_S);
        drop(g);
        return;
    }
    ssize_t n = recv((int)fd, g->bytes + g->have, sizeof(g->bytes) - g->have, 0);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (n <= 0) {
        drop(g);
        return;
    }
    g->have += (size_t)n;
    if (g->have < sizeof(g->bytes))
        return;
    if (mf_preamble_decode(g->bytes, &preamble, &why) < 0) {
        mf_log(MF_LOG_NOTICE, "%s: %s; closed", g->peer, why);
        drop(g);
        return;
    }
    enum mf_preamble_status status = welcome(g, &preamble);
    if (status != MF_PREAMBLE_OK)
        mf_log(MF_LOG_DEBUG, "%s: a connection for \"%.63s\" was refused (%d)", g->peer,
               preamble.name, (int)status);
    reply(g, status);
    drop(g); /* our copy of the descriptor */
}

static void on_accept(struct evconnlistener *accepting, evutil_socket_t fd,
                      struct sockaddr *address, int length, void *arg)
{
    struct listener *listener = arg;
    (void)accepting;
    (void)length;
    /* Whoever sends nothing must not keep those out who do: the oldest makes room. */
    if (listener->guest_count == GUESTS_MAX) {
        struct guest *oldest = listener->guests;
        while (oldest->next)
            oldest = oldest->next;
        drop(oldest);
    }
    struct guest *g = calloc(1, sizeof(*g));
    if (!g) {
        close((int)fd);
        return;
    }
    g->listener = listener;
    g->fd = (int)fd;
    char host[INET6_ADDRSTRLEN] = "?";
    if (address->sa_family == AF_INET6) {
        const struct sockaddr_in6 *in6 = (const struct sockaddr_in6 *)(const void *)address;
        inet_ntop(AF_INET6, &in6->sin6_addr, host, sizeof(host));
        snprintf(g->peer, sizeof(g->peer), "[%s]:%u", host, ntohs(in6->sin6_port));
    } else {
        const struct sockaddr_in *in = (const struct sockaddr_in *)(const void *)address;
        inet_ntop(AF_INET, &in->sin_addr, host, sizeof(host));
        snprintf(g->peer, sizeof(g->peer), "%s:%u", host, ntohs(in->sin_port));
    }
    peer_socket_options(g->fd);
    g->event = event_new(daemon_base(listener->daemon), fd, EV_READ | EV_PERSIST, on_bytes, g);
    if (!g->event) {
        close(g->fd);
        free(g);
        return;
    }
    g->next = listener->guests;
    listener->guests = g;
    listener->guest_count++;
    event_add(g->event, &(struct timeval){.tv_sec = PREAMBLE_TIMEOUT_S});
}

static bool is_loopback(const char *address)
{
    return strncmp(address, "127.", 4) == 0 || strcmp(address, "::1") == 0;
}

int listener_open(struct daemon *daemon, struct listener **out, struct mf_error *err)
{
    const struct config *config = daemon_config(daemon);
    char text[300];
    struct sockaddr_storage address = {0};
    int length = sizeof(address);
    snprintf(text, sizeof(text), strchr(config->listen_address, ':') ? "[%s]:%u" : "%s:%u",
             config->listen_address, config->listen_port);
    if (evutil_parse_sockaddr_port(text, (struct sockaddr *)&address, &length) != 0)
        return mf_fail(err, EINVAL, "%s is not an address to listen on; give a numeric one", text);
    struct listener *listener = calloc(1, sizeof(*listener));
    if (!listener)
        return mf_fail(err, ENOMEM, "out of memory");
    listener->daemon = daemon;
    listener->accepting =
        evconnlistener_new_bind(daemon_base(daemon), on_accept, listener,
                                LEV_OPT_CLOSE_ON_FREE | LEV_OPT_CLOSE_ON_EXEC | LEV_OPT_REUSEABLE,
                                128, (struct sockaddr *)&address, length);
    if (!listener->accepting) {
        int error = errno;
        free(listener);
        return mf_fail(
            err, error, "cannot listen on %s: %s%s", text, strerror(error),
            error == EADDRINUSE      ? "; another memferryd? choose another port with --listen"
            : error == EADDRNOTAVAIL ? "; no interface of this host has that address (yet?)"
                                     : "");
    }
    if (!is_loopback(config->listen_address))
        mf_log(MF_LOG_WARNING,
               "listening on %s: peers are not authenticated and memory travels unencrypted, so "
               "whoever reaches this port can offer memory to a VM that waits here; use a network "
               "that only your hypervisors reach",
               text);
    *out = listener;
    return 0;
}

void listener_close(struct listener *listener)
{
    if (!listener)
        return;
    while (listener->guests)
        drop(listener->guests);
    evconnlistener_free(listener->accepting);
    free(listener);
}
