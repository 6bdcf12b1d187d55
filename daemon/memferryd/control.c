/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The server side of the control socket: one client, one Request, Replies until the last one.
 *
 * A client is in one of three phases. READING: its request is not complete. WATCHING: it is told
 * what becomes of a session, until that has ended or the verb is answered. LEAVING: its last reply
 * is on the way out. Whatever a client does, sessions don't notice: the only things that reach them
 * are calls of session_*() with a request that mf_control_request() has checked as a whole.
 */
#include "daemon/memferryd/daemon.h"

#include <errno.h>
#include <event2/buffer.h>
#include <event2/bufferevent.h>
#include <event2/listener.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/queue.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "daemon/memferryd/control_socket.h"
#include "daemon/memferryd/vmm.h"
#include "lib/control_message.h"
#include "lib/log.h"
#include "lib/util.h"

/** Clients at a time: each may hold MF_CONTROL_MESSAGE_MAX_BYTES of memory. More wait in line. */
#define CLIENTS_MAX 64u
/** What a client that does not read may leave unread before it misses updates. */
#define BACKLOG_MAX_BYTES ((size_t)256 * 1024)

/** Who follows a session is told this often, and at once when the state changes. */
static const struct timeval update_interval = {.tv_usec = 200000};
/** A client sends its request, and takes its last reply, within this time. */
static const struct timeval client_patience = {.tv_sec = 10};

enum phase { CLIENT_READING, CLIENT_WATCHING, CLIENT_LEAVING };

struct client {
    struct control *control;
    struct bufferevent *bev; /**< owned, with its descriptor */
    enum phase phase;
    bool waits;                 /**< session.c holds a session_waiter of this client */
    bool will_follow;           /**< once the waiter says that the session has started */
    bool follows;               /**< is told about the session until that has ended */
    char name[MF_NAME_MAX + 1]; /**< of the session it is about */
    char state[16];             /**< the session's state as sent last */
    struct event *timer;        /**< owned; the next update, while `follows` */
    LIST_ENTRY(client) link;
};

struct control {
    struct daemon *daemon;
    struct evconnlistener *listener;
    int lock_fd; /**< the runtime directory, locked for as long as this daemon serves it */
    char path[sizeof(((struct sockaddr_un *)NULL)->sun_path)];
    unsigned clients;
    LIST_HEAD(client_list, client) list;
};

/** A reply and room for what it points to. */
struct reply {
    Memferry__Control__Reply message;
    Memferry__Control__Session session, *session_p;
    Memferry__Control__Faults faults;
};

static void client_free(struct client *client)
{
    if (client->waits)
        session_waiter_drop(client->control->daemon, client);
    if (client->timer)
        event_free(client->timer);
    bufferevent_free(client->bev);
    LIST_REMOVE(client, link);
    client->control->clients--;
    evconnlistener_enable(client->control->listener);
    free(client);
}

/* ---- replies ---- */

/* Nothing is left to send: the peer has got its last reply. */
static void on_drained(struct bufferevent *bev, void *arg)
{
    (void)bev;
    client_free(arg);
}

static void on_gone(struct bufferevent *bev, short what, void *arg)
{
    struct client *client = arg;
    /* A client that has said all it had to may close its writing side and still read. */
    if (client->phase == CLIENT_LEAVING && what == (BEV_EVENT_EOF | BEV_EVENT_READING))
        bufferevent_disable(bev, EV_READ);
    else
        client_free(client);
}

static void on_read_too_much(struct bufferevent *bev, void *arg)
{
    struct evbuffer *input = bufferevent_get_input(bev);
    if (((struct client *)arg)->phase == CLIENT_LEAVING) {
        evbuffer_drain(input, evbuffer_get_length(input));
        return;
    }
    /* One request a connection: what follows can't be meant for us. */
    client_free(arg);
}

/** send_reply() - queue a reply. After one with `last` the client only waits to be emptied. A reply
 *  that does not fit is replaced by an error that says so. The client may be gone afterwards only
 *  through the event loop, never here. */
static void send_reply(struct client *client, Memferry__Control__Reply *reply)
{
    cleanup_free uint8_t *frame = NULL;
    size_t frame_bytes = 0;
    struct mf_error err;
    if (mf_control_frame(&reply->base, &frame, &frame_bytes, &err) < 0) {
        Memferry__Control__Reply failure = MEMFERRY__CONTROL__REPLY__INIT;
        failure.last = true;
        failure.error = err.text;
        failure.exit_code = 1;
        reply->last = true;
        if (mf_control_frame(&failure.base, &frame, &frame_bytes, NULL) < 0)
            frame_bytes = 0; /* no memory for thirty bytes: closing the connection says it too */
    }
    if (reply->last) {
        client->phase = CLIENT_LEAVING;
        client->follows = false;
        bufferevent_setcb(client->bev, on_read_too_much, on_drained, on_gone, client);
        bufferevent_set_timeouts(client->bev, NULL, &client_patience);
    }
    /* The write callback comes from the event loop, for an empty buffer too once it is triggered.
     */
    if (frame_bytes)
        bufferevent_write(client->bev, frame, frame_bytes);
    else
        bufferevent_trigger(client->bev, EV_WRITE, BEV_OPT_DEFER_CALLBACKS);
}

static void send_error(struct client *client, unsigned exit_code, const char *text)
{
    Memferry__Control__Reply reply = MEMFERRY__CONTROL__REPLY__INIT;
    reply.last = true;
    reply.error = (char *)text;
    reply.exit_code = exit_code;
    send_reply(client, &reply);
}

/* protobuf-c's structures are not const, but packing changes none of them. */
static struct reply *with_session(struct reply *reply, struct session *session)
{
    memferry__control__reply__init(&reply->message);
    if (session) {
        session_describe(session, &reply->session, &reply->faults);
        reply->session_p = &reply->session;
        reply->message.sessions = &reply->session_p;
        reply->message.n_sessions = 1;
    }
    return reply;
}

/* ---- following a session ---- */

static void send_update(struct client *client, struct session *session)
{
    struct reply reply;
    Memferry__Control__Reply *message = &with_session(&reply, session)->message;
    if (session_ended(session)) {
        message->last = true;
        message->exit_code = session_exit_code(session);
        struct mf_error err;
        mf_fail(&err, EIO, "the session %s has ended in state %s", client->name,
                reply.session.state);
        if (message->exit_code)
            message->error = reply.session.reason[0] ? reply.session.reason : err.text;
        event_del(client->timer);
        send_reply(client, message);
        return;
    }
    event_add(client->timer, &update_interval);
    if (evbuffer_get_length(bufferevent_get_output(client->bev)) > BACKLOG_MAX_BYTES)
        return;
    snprintf(client->state, sizeof(client->state), "%s", reply.session.state);
    send_reply(client, message);
}

static void send_forgotten(struct client *client)
{
    struct mf_error err;
    mf_fail(&err, ENOENT, "the session %s was forgotten meanwhile", client->name);
    event_del(client->timer);
    send_error(client, 1, err.text);
}

static void on_timer(evutil_socket_t fd, short what, void *arg)
{
    (void)fd;
    (void)what;
    struct client *client = arg;
    struct session *session = session_find(client->control->daemon, client->name);
    if (session)
        send_update(client, session);
    else
        send_forgotten(client);
}

static void follow(struct client *client, struct session *session)
{
    client->timer = evtimer_new(daemon_base(client->control->daemon), on_timer, client);
    if (!client->timer) {
        send_error(client, 1, "memferryd is out of memory to report; the session goes on");
        return;
    }
    client->follows = true;
    send_update(client, session);
}

void control_session_changed(struct control *control, struct session *session)
{
    struct client *client;
    LIST_FOREACH(client, &control->list, link)
    {
        if (!client->follows || strcmp(client->name, session_name(session)) != 0)
            continue;
        struct reply reply;
        with_session(&reply, session);
        /* Figures wait for the timer. */
        if (session_ended(session) || strcmp(reply.session.state, client->state) != 0)
            send_update(client, session);
    }
}

/* ---- the verbs ---- */

static void on_waiter_done(void *arg, struct session *session, const char *error,
                           unsigned exit_code)
{
    struct client *client = arg;
    client->waits = false;
    struct reply reply;
    Memferry__Control__Reply *message = &with_session(&reply, session)->message;
    if (!error && session && client->will_follow) {
        follow(client, session);
        return;
    }
    message->last = true;
    message->error = (char *)(error ? error : "");
    message->exit_code = exit_code;
    send_reply(client, message);
}

static struct session_waiter wait_for(struct client *client, const char *name)
{
    snprintf(client->name, sizeof(client->name), "%s", name);
    client->waits = true;
    return (struct session_waiter){.done = on_waiter_done, .arg = client};
}

static void send_unknown(struct client *client, const char *name)
{
    struct mf_error err;
    mf_fail(&err, ENOENT, "there is no session %s on this host; 'memferry status' lists them",
            name);
    send_error(client, 1, err.text);
}

static void serve_status(struct client *client, const char *name)
{
    struct daemon *daemon = client->control->daemon;
    struct reply one;
    if (name[0]) {
        struct session *session = session_find(daemon, name);
        if (!session) {
            send_unknown(client, name);
            return;
        }
        with_session(&one, session)->message.last = true;
        send_reply(client, &one.message);
        return;
    }

    size_t count = 0, i = 0;
    for (struct session *s = session_first(daemon); s; s = session_next(s))
        count++;
    cleanup_free Memferry__Control__Session *sessions = calloc(count + 1, sizeof(*sessions));
    cleanup_free Memferry__Control__Session **pointers = calloc(count + 1, sizeof(*pointers));
    cleanup_free Memferry__Control__Faults *faults = calloc(count + 1, sizeof(*faults));
    if (!sessions || !pointers || !faults) {
        send_error(client, 1, "memferryd is out of memory to list its sessions");
        return;
    }
    for (struct session *s = session_first(daemon); s; s = session_next(s), i++) {
        session_describe(s, &sessions[i], &faults[i]);
        pointers[i] = &sessions[i];
    }
    Memferry__Control__Reply reply = MEMFERRY__CONTROL__REPLY__INIT;
    reply.last = true;
    reply.sessions = pointers;
    reply.n_sessions = count;
    send_reply(client, &reply);
}

/* Answers a verb that is carried out at once. @rc: what carrying it out came to. */
static void send_done(struct client *client, int rc, const struct mf_error *err)
{
    if (rc < 0) {
        send_error(client, 1, err->text);
        return;
    }
    Memferry__Control__Reply reply = MEMFERRY__CONTROL__REPLY__INIT;
    reply.last = true;
    send_reply(client, &reply);
}

static void serve_forget(struct client *client, const char *name)
{
    struct control *control = client->control;
    struct mf_error err = {.text = ""};
    int rc = session_forget(control->daemon, name, &err);
    struct client *other;
    LIST_FOREACH(other, &control->list, link)
    {
        if (rc == 0 && other->follows && strcmp(other->name, name) == 0)
            send_forgotten(other);
    }
    send_done(client, rc, &err);
}

static void serve_set(struct client *client, const Memferry__Control__SetRequest *set)
{
    struct mf_error err = {.text = ""};
    int rc = session_set_bandwidth(client->control->daemon, set->name, set->bandwidth_bits_s, &err);
    send_done(client, rc, &err);
}

static void serve_switch(struct client *client, const char *name)
{
    struct mf_error err = {.text = ""};
    int rc = session_switch(client->control->daemon, name, &err);
    send_done(client, rc, &err);
}

static void serve_watch(struct client *client, const char *name)
{
    struct session *session = session_find(client->control->daemon, name);
    if (!session) {
        send_unknown(client, name);
        return;
    }
    snprintf(client->name, sizeof(client->name), "%s", name);
    follow(client, session);
}

/** struct named_target - what a request says about the VM or process, and room for its regions. */
struct named_target {
    struct vmm_target target;
    struct mf_choice choices[MF_CHOICES_MAX];
};

static const struct vmm_target *name_target(struct named_target *named, const char *qmp_path,
                                            const Memferry__Control__Process *process)
{
    named->target = (struct vmm_target){.qmp_path = process ? NULL : qmp_path};
    if (!process)
        return &named->target;
    named->target = (struct vmm_target){
        .pid = (pid_t)process->pid,
        .pause = process->pause,
        .save = process->save,
        .load = process->load,
        .resume = process->resume,
        .timeout_s = process->timeout_s ? process->timeout_s : MF_CONTROL_TIMEOUT_DEFAULT_S,
        .choices = named->choices,
        .choice_count = (unsigned)process->n_regions,
    };
    for (size_t i = 0; i < process->n_regions; i++) {
        snprintf(named->choices[i].name, sizeof(named->choices[i].name), "%s",
                 process->regions[i]->name);
        snprintf(named->choices[i].what, sizeof(named->choices[i].what), "%s",
                 process->regions[i]->what);
    }
    return &named->target;
}

static void serve_receive(struct client *client, const Memferry__Control__ReceiveRequest *receive)
{
    struct named_target named;
    session_receive(client->control->daemon, receive->name,
                    name_target(&named, receive->qmp_path, receive->process),
                    wait_for(client, receive->name));
}

static void serve_migrate(struct client *client, const Memferry__Control__MigrateRequest *migrate)
{
    struct named_target named;
    struct migrate_options options = {.name = migrate->name,
                                      .target =
                                          name_target(&named, migrate->qmp_path, migrate->process),
                                      .host = migrate->host,
                                      .port = (uint16_t)migrate->port,
                                      .streams = migrate->streams,
                                      .keep_source = migrate->keep_source,
                                      .mode = mf_control_migrate_mode(migrate),
                                      .bandwidth_bits_s = migrate->bandwidth_bits_s,
                                      .max_rounds = migrate->max_rounds,
                                      .switch_after_s = migrate->switch_after_s,
                                      .max_blackout_ms = migrate->max_blackout_ms,
                                      .fallback = migrate->fallback};
    client->will_follow = !migrate->detach;
    session_migrate(client->control->daemon, &options, wait_for(client, migrate->name));
}

static void serve(struct client *client, const Memferry__Control__Request *request)
{
    struct daemon *daemon = client->control->daemon;
    client->phase = CLIENT_WATCHING;
    bufferevent_setcb(client->bev, on_read_too_much, NULL, on_gone, client);
    bufferevent_set_timeouts(client->bev, NULL, NULL);
    switch (request->verb_case) {
    case MEMFERRY__CONTROL__REQUEST__VERB_RECEIVE:
        serve_receive(client, request->receive);
        return;
    case MEMFERRY__CONTROL__REQUEST__VERB_MIGRATE:
        serve_migrate(client, request->migrate);
        return;
    case MEMFERRY__CONTROL__REQUEST__VERB_STATUS:
        serve_status(client, request->status->name);
        return;
    case MEMFERRY__CONTROL__REQUEST__VERB_CANCEL:
        session_cancel(daemon, request->cancel->name, wait_for(client, request->cancel->name));
        return;
    case MEMFERRY__CONTROL__REQUEST__VERB_FORGET:
        serve_forget(client, request->forget->name);
        return;
    case MEMFERRY__CONTROL__REQUEST__VERB_WATCH:
        serve_watch(client, request->watch->name);
        return;
    case MEMFERRY__CONTROL__REQUEST__VERB_SET:
        serve_set(client, request->set);
        return;
    case MEMFERRY__CONTROL__REQUEST__VERB_SWITCH_NOW:
        serve_switch(client, request->switch_now->name);
        return;
    case MEMFERRY__CONTROL__REQUEST__VERB__NOT_SET:
    case _MEMFERRY__CONTROL__REQUEST__VERB__CASE_IS_INT_SIZE:
        break; /* mf_control_request() lets none of these through */
    }
    send_error(client, 2, "the request has no verb");
}

/* ---- connections ---- */

static void on_read(struct bufferevent *bev, void *arg)
{
    struct client *client = arg;
    struct evbuffer *input = bufferevent_get_input(bev);
    uint8_t header[MF_CONTROL_HEADER_BYTES];
    size_t body_bytes = 0;
    struct mf_error err;

    ssize_t got = evbuffer_copyout(input, header, sizeof(header));
    int rc = mf_control_body(header, got < 0 ? 0 : (size_t)got, &body_bytes, &err);
    if (rc < 0) {
        send_error(client, 2, err.text);
        return;
    }
    size_t frame_bytes = MF_CONTROL_HEADER_BYTES + body_bytes;
    if ((size_t)got < sizeof(header) || evbuffer_get_length(input) < frame_bytes)
        return;
    if (evbuffer_get_length(input) > frame_bytes) {
        send_error(client, 2, "something follows the request; one request is made a connection");
        return;
    }
    uint8_t *frame = evbuffer_pullup(input, (ev_ssize_t)frame_bytes);
    Memferry__Control__Request *request = NULL;
    rc = frame ? mf_control_request(frame + MF_CONTROL_HEADER_BYTES, body_bytes, &request, &err)
               : mf_fail(&err, ENOMEM, "memferryd is out of memory for a request");
    evbuffer_drain(input, frame_bytes);
    if (rc < 0) {
        send_error(client, 2, err.text);
        return;
    }
    serve(client, request);
    memferry__control__request__free_unpacked(request, NULL);
}

static bool peer_allowed(int fd)
{
    struct ucred peer;
    socklen_t length = sizeof(peer);
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &length) < 0)
        return false;
    if (peer.uid == 0 || peer.uid == geteuid())
        return true;
    mf_log(MF_LOG_WARNING, "refused process %d of user %u on the control socket", (int)peer.pid,
           (unsigned)peer.uid);
    return false;
}

static void on_accept(struct evconnlistener *listener, evutil_socket_t fd, struct sockaddr *address,
                      int address_bytes, void *arg)
{
    (void)address;
    (void)address_bytes;
    struct control *control = arg;
    struct event_base *base = evconnlistener_get_base(listener);
    struct client *client = NULL;
    struct bufferevent *bev = NULL;
    if (peer_allowed(fd)) {
        client = calloc(1, sizeof(*client));
        bev = bufferevent_socket_new(base, fd, BEV_OPT_CLOSE_ON_FREE);
    }
    if (!client || !bev) {
        free(client);
        if (bev)
            bufferevent_free(bev);
        else
            close(fd);
        return;
    }
    client->control = control;
    client->bev = bev;
    LIST_INSERT_HEAD(&control->list, client, link);
    if (++control->clients >= CLIENTS_MAX)
        evconnlistener_disable(listener);
    bufferevent_setcb(bev, on_read, NULL, on_gone, client);
    bufferevent_setwatermark(bev, EV_READ, 0,
                             MF_CONTROL_HEADER_BYTES + MF_CONTROL_MESSAGE_MAX_BYTES + 1);
    bufferevent_set_timeouts(bev, &client_patience, NULL);
    bufferevent_enable(bev, EV_READ | EV_WRITE);
}

/* ---- opening and closing ---- */

int control_open(struct daemon *daemon, struct control **out, struct mf_error *err)
{
    const char *runtime_dir = daemon_config(daemon)->runtime_dir;
    cleanup_free struct control *control = calloc(1, sizeof(*control));
    if (!control)
        return mf_fail(err, ENOMEM, "out of memory for the control socket");
    control->daemon = daemon;
    LIST_INIT(&control->list);
    int length = snprintf(control->path, sizeof(control->path), "%s/%s", runtime_dir,
                          MF_CONTROL_SOCKET_NAME);
    if (length < 0 || (size_t)length >= sizeof(control->path))
        return mf_fail(err, ENAMETOOLONG,
                       "the runtime directory %s is too long: the path of the control socket in it "
                       "has to stay under %zu characters",
                       runtime_dir, sizeof(control->path));

    cleanup_close int lock_fd = -1, fd = -1;
    int rc = control_lock_directory(runtime_dir, &lock_fd, err);
    if (rc == 0)
        rc = control_bind(control->path, &fd, err);
    if (rc < 0)
        return rc;
    control->listener =
        evconnlistener_new(daemon_base(daemon), on_accept, control,
                           LEV_OPT_CLOSE_ON_FREE | LEV_OPT_CLOSE_ON_EXEC, (int)CLIENTS_MAX, fd);
    if (!control->listener) {
        unlink(control->path);
        return mf_fail(err, ENOMEM, "cannot listen on the control socket %s", control->path);
    }
    /* libevent writes with writev(2): a client that left must not be a signal to the daemon. */
    signal(SIGPIPE, SIG_IGN);
    mf_steal_fd(&fd);
    control->lock_fd = mf_steal_fd(&lock_fd);
    *out = control;
    control = NULL;
    return 0;
}

void control_close(struct control *control)
{
    if (!control)
        return;
    struct client *client;
    while ((client = LIST_FIRST(&control->list)))
        client_free(client);
    evconnlistener_free(control->listener);
    unlink(control->path);
    close(control->lock_fd);
    free(control);
}
