/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Source: the connections of a link. The control connection goes first, since its preamble makes
 * the destination take the session's id; then all others at once. Each sends its preamble and waits
 * for the answer; when all are there they go to the mover.
 */
#include "daemon/memferryd/session.h"

#include <errno.h>
#include <event2/util.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "lib/log.h"
#include "lib/util.h"
#include "proto/frame.h"

#define CONNECT_TIMEOUT_S 10
#define ABANDON_TRIES 30
#define CONNECTIONS_MAX (MF_MAX_STREAMS + 3u)

struct connection {
    struct connector *connector;
    enum mf_connection_kind kind;
    uint16_t stream;
    int fd;
    struct event *event;
    bool sent, done;
    uint8_t reply[MF_PREAMBLE_REPLY_BYTES];
    size_t have;
};

struct connector {
    struct connector *next;  /**< of those that abandon */
    struct session *session; /**< NULL: it only abandons, and lives on its own */
    struct daemon *daemon;
    struct evdns_getaddrinfo_request *resolving;
    struct event *timeout;
    struct evutil_addrinfo *addresses;     /**< owned; all that the host's name stands for */
    const struct evutil_addrinfo *address; /**< the one that is tried */
    char name[MF_NAME_MAX + 1], host[256], peer[300];
    uint16_t port;
    uint8_t id[MF_SESSION_ID_BYTES];
    uint32_t link;
    unsigned streams, count, ready;
    unsigned tries; /**< abandoning */
    bool abandoning;
    struct connection connection[CONNECTIONS_MAX];
};

static struct connector *abandoners;

void peer_socket_options(int fd)
{
    const int one = 1, idle_s = 5, interval_s = 2, probes = 5;
    const unsigned unacknowledged_ms = 15000;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &one, sizeof(one));
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle_s, sizeof(idle_s));
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval_s, sizeof(interval_s));
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &probes, sizeof(probes));
    setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &unacknowledged_ms, sizeof(unacknowledged_ms));
}

static void drop_connections(struct connector *c)
{
    if (c->resolving)
        evdns_getaddrinfo_cancel(c->resolving); /* its callback sees EVUTIL_EAI_CANCEL and no `c` */
    c->resolving = NULL;
    for (unsigned i = 0; i < c->count; i++) {
        struct connection *n = &c->connection[i];
        if (n->event)
            event_free(n->event);
        if (n->fd >= 0)
            close(n->fd);
        *n = (struct connection){.fd = -1};
    }
    c->count = c->ready = 0;
}

static void destroy(struct connector *c)
{
    drop_connections(c);
    if (c->addresses)
        evutil_freeaddrinfo(c->addresses);
    if (c->timeout)
        event_free(c->timeout);
    free(c);
}

void connector_stop(struct session *session)
{
    if (session->connector)
        destroy(session->connector);
    session->connector = NULL;
}

static void begin(struct connector *c);

static void abandon_again(struct connector *c)
{
    drop_connections(c);
    if (++c->tries < ABANDON_TRIES) {
        evtimer_add(c->timeout, &(struct timeval){.tv_sec = 1});
        return;
    }
    for (struct connector **at = &abandoners; *at; at = &(*at)->next)
        if (*at == c) {
            *at = c->next;
            break;
        }
    destroy(c);
}

static void abandoned(struct connector *c)
{
    c->tries = ABANDON_TRIES;
    abandon_again(c);
}

/* This attempt failed. The connector is gone afterwards. */
__attribute__((format(printf, 2, 3))) static void fail(struct connector *c, const char *fmt, ...)
{
    if (c->abandoning) {
        abandon_again(c);
        return;
    }
    struct session *session = c->session;
    char text[512];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    session_set_reason(session, "%s", text);
    connector_stop(session);
    session_event(session, MF_EV_LINK_LOST);
}

static void refused(struct connector *c, const struct mf_preamble_reply *reply)
{
    struct session *session = c->session;
    if (c->abandoning) {
        abandoned(c); /* an answer is an answer: the destination knows, or has forgotten */
        return;
    }
    switch ((enum mf_preamble_status)reply->status) {
    case MF_PREAMBLE_DRAINED:
        connector_stop(session);
        session_event(session, MF_EV_PEER_DRAINED);
        return;
    case MF_PREAMBLE_ENDED:
        /* Before RELEASE this is a failure like others; after it the destination has lost its VM.
         */
        session_set_reason(session, "the session has failed or was cancelled on %s", c->peer);
        connector_stop(session);
        session_event(session, MF_EV_PEER_FAILED);
        return;
    case MF_PREAMBLE_VERSION:
        fail(c,
             "the memferryd at %s speaks version %u of the protocol (oldest %u), this one %u "
             "(oldest %u); bring both hosts to the same release",
             c->peer, reply->version, reply->oldest_version, MF_WIRE_VERSION,
             MF_WIRE_OLDEST_VERSION);
        return;
    case MF_PREAMBLE_UNKNOWN_NAME:
        if (session->released)
            fail(c,
                 "the memferryd at %s knows nothing of %s any more: was it restarted? The guest "
                 "there may wait for its memory, so end neither of the two VMs",
                 c->peer, c->name);
        else if (session_vmm_ops(session) == &vmm_process)
            fail(c,
                 "nothing waits for %s at %s; start the program there so that it waits, and run "
                 "\"memferry receive %s --pid PID --load COMMAND\"",
                 c->name, c->peer, c->name);
        else
            fail(c,
                 "nothing waits for %s at %s; start the VM there with -S -incoming defer and run "
                 "\"memferry receive %s --qmp PATH\"",
                 c->name, c->peer, c->name);
        return;
    case MF_PREAMBLE_TAKEN:
        fail(c, "the name %s is taken at %s by another migration", c->name, c->peer);
        return;
    case MF_PREAMBLE_BUSY:
        fail(c, "the memferryd at %s is not ready for %s yet", c->peer, c->name);
        return;
    case MF_PREAMBLE_OK:
        break;
    }
    fail(c,
         "the memferryd at %s refused the connection for a reason this version does not know "
         "(%u)",
         c->peer, reply->status);
}

static int open_connection(struct connector *c, enum mf_connection_kind kind, unsigned stream);

/* Connect to c->address, or to the first behind it that can be had. Return: 0 or the last one's
 * -errno. */
static int open_first(struct connector *c)
{
    int r = -EADDRNOTAVAIL;
    for (; c->address; c->address = c->address->ai_next) {
        drop_connections(c);
        r = open_connection(c, c->abandoning ? MF_CONNECTION_ABANDON : MF_CONNECTION_CONTROL, 0);
        if (r == 0)
            return 0;
    }
    return r;
}

/* A name may stand for several addresses, of which memferryd listens on one. Return: whether
 * another one is tried now. */
static bool try_next_address(struct connector *c)
{
    if (c->ready || !c->address || !c->address->ai_next)
        return false;
    c->address = c->address->ai_next;
    return open_first(c) == 0;
}

static void hand_over(struct connector *c)
{
    struct session *session = c->session;
    mover_order(session,
                &(struct mf_ipc){.type = MF_IPC_LINK,
                                 .link = {.link = c->link,
                                          .streams = c->streams,
                                          .released = session->released,
                                          .guest_running = session->guest_was_running}},
                -1);
    session->link_open = true;
    for (unsigned i = 0; i < c->count; i++)
        mover_order(session,
                    &(struct mf_ipc){.type = MF_IPC_CONNECTION,
                                     .connection = {.kind = c->connection[i].kind,
                                                    .stream = c->connection[i].stream}},
                    c->connection[i].fd);
    connector_stop(session);
}

/* What is sent from here: the memory, its answers to faults, the device state. */
static void control_congestion(const struct connection *n)
{
    const struct connector *c = n->connector;
    const char *setting = daemon_config(c->daemon)->congestion;
    char used[MF_CONGESTION_MAX];
    int changed = mf_congestion_apply(n->fd, setting, used);
    if (n->kind == MF_CONNECTION_CONTROL)
        mf_log(MF_LOG_INFO, "%s: the connections to %s use the congestion control %s%s", c->name,
               c->peer, used[0] ? used : "of the system", changed ? "" : ", as the system says");
}

static void answered(struct connection *n)
{
    struct connector *c = n->connector;
    struct mf_preamble_reply reply;
    const char *why = NULL;
    if (mf_preamble_reply_decode(n->reply, &reply, &why) < 0) {
        fail(c, "%s at %s", why, c->peer);
        return;
    }
    if (reply.status == MF_PREAMBLE_OK && !mf_versions_meet(reply.version, reply.oldest_version))
        reply.status = MF_PREAMBLE_VERSION;
    if (reply.status != MF_PREAMBLE_OK) {
        refused(c, &reply);
        return;
    }
    if (c->abandoning) {
        abandoned(c);
        return;
    }
    control_congestion(n);
    n->done = true;
    event_free(n->event);
    n->event = NULL;
    c->ready++;
    if (n->kind == MF_CONNECTION_CONTROL) {
        int r = open_connection(c, MF_CONNECTION_URGENT, 0);
        if (r == 0 && c->link == 1)
            r = open_connection(c, MF_CONNECTION_DEVICE, 0);
        for (unsigned i = 0; r == 0 && i < c->streams; i++)
            r = open_connection(c, MF_CONNECTION_BULK, i);
        if (r < 0)
            fail(c, "cannot connect to %s: %s", c->peer, strerror(-r));
        return;
    }
    if (c->ready == c->count)
        hand_over(c);
}

static void on_socket(evutil_socket_t fd, short what, void *arg)
{
    struct connection *n = arg;
    struct connector *c = n->connector;
    if ((what & EV_WRITE) && !n->sent) {
        int error = 0;
        socklen_t length = sizeof(error);
        getsockopt((int)fd, SOL_SOCKET, SO_ERROR, &error, &length);
        if (error) {
            if (try_next_address(c))
                return;
            fail(c, "cannot connect to memferryd at %s: %s%s", c->peer, strerror(error),
                 error == ECONNREFUSED ? "; does it run there, and does it listen on that address?"
                                       : "");
            return;
        }
        struct mf_preamble preamble = {.version = MF_WIRE_VERSION,
                                       .oldest_version = MF_WIRE_OLDEST_VERSION,
                                       .kind = n->kind,
                                       .stream = n->stream,
                                       .streams = (uint16_t)c->streams,
                                       .link = c->link};
        uint8_t bytes[MF_PREAMBLE_BYTES];
        memcpy(preamble.session_id, c->id, sizeof(c->id));
        snprintf(preamble.name, sizeof(preamble.name), "%s", c->name);
        mf_preamble_encode(&preamble, bytes);
        /* A fresh connection's buffer takes it whole. */
        if (send((int)fd, bytes, sizeof(bytes), MSG_NOSIGNAL) != (ssize_t)sizeof(bytes)) {
            fail(c, "cannot send to memferryd at %s: %s", c->peer, strerror(errno));
            return;
        }
        n->sent = true;
        event_free(n->event);
        n->event = event_new(daemon_base(c->daemon), fd, EV_READ | EV_PERSIST, on_socket, n);
        if (!n->event || event_add(n->event, NULL) != 0)
            fail(c, "out of memory");
        return;
    }
    ssize_t r = recv((int)fd, n->reply + n->have, sizeof(n->reply) - n->have, 0);
    if (r < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (r <= 0) {
        fail(c, "memferryd at %s closed the connection%s%s; is it memferryd that listens there?",
             c->peer, r < 0 ? ": " : "", r < 0 ? strerror(errno) : "");
        return;
    }
    n->have += (size_t)r;
    if (n->have == sizeof(n->reply))
        answered(n);
}

static int open_connection(struct connector *c, enum mf_connection_kind kind, unsigned stream)
{
    if (c->count == CONNECTIONS_MAX)
        return -E2BIG;
    struct connection *n = &c->connection[c->count++];
    *n = (struct connection){.connector = c, .kind = kind, .stream = (uint16_t)stream, .fd = -1};
    n->fd = socket(c->address->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (n->fd < 0)
        return -errno;
    peer_socket_options(n->fd);
    if (connect(n->fd, c->address->ai_addr, (socklen_t)c->address->ai_addrlen) != 0 &&
        errno != EINPROGRESS)
        return -errno;
    n->event = event_new(daemon_base(c->daemon), n->fd, EV_WRITE, on_socket, n);
    if (!n->event || event_add(n->event, NULL) != 0)
        return -ENOMEM;
    return 0;
}

static void on_timeout(evutil_socket_t fd, short what, void *arg)
{
    struct connector *c = arg;
    (void)fd;
    (void)what;
    if (c->abandoning && c->count == 0 && !c->resolving) {
        begin(c); /* the pause between tries is over */
        return;
    }
    if (c->resolving)
        fail(c,
             "the address of the host %s was not found within %d s; does its name server answer? "
             "Give its address, or put its name into /etc/hosts",
             c->host, CONNECT_TIMEOUT_S);
    else
        fail(c, "memferryd at %s did not answer within %d s", c->peer, CONNECT_TIMEOUT_S);
}

static void on_address(int result, struct evutil_addrinfo *list, void *arg)
{
    struct connector *c = arg;
    if (result == EVUTIL_EAI_CANCEL)
        return;
    c->resolving = NULL;
    if (result != 0) {
        fail(c, "the host %s cannot be found: %s", c->host, evutil_gai_strerror(result));
        return;
    }
    if (c->addresses)
        evutil_freeaddrinfo(c->addresses);
    c->addresses = list;
    c->address = list;
    int r = open_first(c);
    if (r < 0)
        fail(c, "cannot connect to memferryd at %s: %s", c->peer, strerror(-r));
}

static void resolve_later(evutil_socket_t fd, short what, void *arg)
{
    (void)fd;
    (void)what;
    begin(arg);
}

static void begin(struct connector *c)
{
    char port[8];
    struct evutil_addrinfo hints = {.ai_family = AF_UNSPEC, .ai_socktype = SOCK_STREAM};
    event_assign(c->timeout, daemon_base(c->daemon), -1, 0, on_timeout, c);
    evtimer_add(c->timeout, &(struct timeval){.tv_sec = CONNECT_TIMEOUT_S});
    snprintf(port, sizeof(port), "%u", c->port);
    /* libevent reads the file once; who runs memferryd for weeks adds hosts to it. */
    evdns_base_clear_host_addresses(daemon_dns(c->daemon));
    evdns_base_load_hosts(daemon_dns(c->daemon), "/etc/hosts");
    /* May call back at once, and then `c` may be gone: nothing after it. */
    struct evdns_getaddrinfo_request *request =
        evdns_getaddrinfo(daemon_dns(c->daemon), c->host, port, &hints, on_address, c);
    if (request)
        c->resolving = request;
}

static struct connector *create(struct session *session, unsigned after_s)
{
    struct connector *c = calloc(1, sizeof(*c));
    if (!c)
        return NULL;
    c->daemon = session->daemon;
    memcpy(c->name, session->name, sizeof(c->name));
    memcpy(c->host, session->host, sizeof(c->host));
    memcpy(c->peer, session->peer, sizeof(c->peer));
    memcpy(c->id, session->id, sizeof(c->id));
    c->port = session->port;
    c->streams = session->streams;
    for (unsigned i = 0; i < CONNECTIONS_MAX; i++)
        c->connection[i].fd = -1;
    /* From the event loop, so that no failure comes from inside the call that started it. */
    c->timeout = evtimer_new(daemon_base(c->daemon), resolve_later, c);
    if (!c->timeout) {
        free(c);
        return NULL;
    }
    evtimer_add(c->timeout, &(struct timeval){.tv_sec = after_s});
    return c;
}

void connector_start(struct session *session)
{
    connector_stop(session);
    struct connector *c = create(session, 0);
    if (!c) {
        session_set_reason(session, "memferryd is out of memory");
        session_event(session, MF_EV_LINK_LOST);
        return;
    }
    c->session = session;
    c->link = ++session->link;
    session->connector = c;
}

void connector_abandon(struct session *session, unsigned after_s)
{
    struct connector *c = create(session, after_s);
    if (!c)
        return;
    c->abandoning = true;
    c->link = session->link + 1;
    c->next = abandoners;
    abandoners = c;
}

unsigned connectors_abandoning(void)
{
    unsigned count = 0;
    for (const struct connector *c = abandoners; c; c = c->next)
        count++;
    return count;
}

void connectors_drop(struct daemon *daemon)
{
    (void)daemon;
    while (abandoners) {
        struct connector *c = abandoners;
        abandoners = c->next;
        destroy(c);
    }
}
