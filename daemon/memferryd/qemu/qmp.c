/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/memferryd/qemu/qmp.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "daemon/memferryd/qemu/qmp_parse.h"
#include "lib/util.h"

/* A QEMU that is not stuck greets within milliseconds. One that already serves another client
 * accepts us into its backlog (or leaves connect(2) at EAGAIN) and says nothing. */
#define GREETING_TIMEOUT_S 5
#define CONNECT_RETRY_US 50000
#define READ_BYTES 65536

/* A command on its way out, then waiting for its answer. */
struct command {
    struct command *next;
    uint64_t id;
    char *text;
    size_t length_bytes, sent_bytes;
    int fd; /* owned; -1: none, or already handed over */
    qmp_reply reply;
    void *arg;
};

enum qmp_state { CONNECTING, GREETING, NEGOTIATING, READY, DOWN };

struct qmp {
    struct qmp_callbacks callbacks;
    char *vm_name, *path;
    enum qmp_state state;
    int fd;
    struct event *readable, *writable, *timer;
    struct qmp_parser parser;
    struct command *first, *last; /* in order of sending: unsent, partly sent, unanswered */
    uint64_t next_id;
    unsigned connect_tries;
    pid_t peer_pid;
    json_t *version;
    char why[1024]; /* state DOWN: the sentence */
    bool told_down;
    unsigned users; /* event-loop handlers at work on this object */
    bool closed;    /* freed when users drops to 0 */
};

static void command_free(struct command *command)
{
    if (command->fd >= 0)
        close(command->fd);
    free(command->text);
    free(command);
}

static void qmp_free(struct qmp *qmp)
{
    while (qmp->first) {
        struct command *command = qmp->first;
        qmp->first = command->next;
        command_free(command);
    }
    if (qmp->readable)
        event_free(qmp->readable);
    if (qmp->writable)
        event_free(qmp->writable);
    if (qmp->timer)
        event_free(qmp->timer);
    if (qmp->fd >= 0)
        close(qmp->fd);
    qmp_parser_clear(&qmp->parser);
    json_decref(qmp->version);
    free(qmp->vm_name);
    free(qmp->path);
    free(qmp);
}

static void enter(struct qmp *qmp)
{
    qmp->users++;
}

static void leave(struct qmp *qmp)
{
    if (--qmp->users == 0 && qmp->closed)
        qmp_free(qmp);
}

static void arm_timer(struct qmp *qmp, long us)
{
    struct timeval tv = {.tv_sec = us / 1000000, .tv_usec = us % 1000000};
    event_add(qmp->timer, &tv);
}

/* The connection is over. `down` is told from the timer, so never inside a caller's call. */
__attribute__((format(printf, 2, 3))) static void go_down(struct qmp *qmp, const char *fmt, ...)
{
    if (qmp->state == DOWN)
        return;
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(qmp->why, sizeof(qmp->why), fmt, ap);
    va_end(ap);
    qmp->state = DOWN;
    if (qmp->readable)
        event_del(qmp->readable);
    if (qmp->writable)
        event_del(qmp->writable);
    arm_timer(qmp, 0);
}

/* Hand @command's next bytes to the kernel. The descriptor goes with the first byte: QEMU keeps
 * what came last for the next `getfd`. Return: true when all is out. */
static bool transmit(struct qmp *qmp, struct command *command)
{
    while (command->sent_bytes < command->length_bytes) {
        struct iovec iov = {.iov_base = command->text + command->sent_bytes,
                            .iov_len = command->length_bytes - command->sent_bytes};
        union {
            char space[CMSG_SPACE(sizeof(int))];
            struct cmsghdr align;
        } control = {0};
        struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};
        if (command->fd >= 0) {
            msg.msg_control = control.space;
            msg.msg_controllen = sizeof(control.space);
            struct cmsghdr *header = CMSG_FIRSTHDR(&msg);
            header->cmsg_level = SOL_SOCKET;
            header->cmsg_type = SCM_RIGHTS;
            header->cmsg_len = CMSG_LEN(sizeof(int));
            memcpy(CMSG_DATA(header), &command->fd, sizeof(int));
        }
        ssize_t n = sendmsg(qmp->fd, &msg, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
            event_add(qmp->writable, NULL);
            return false;
        }
        if (n < 0) {
            /* What QEMU said before it went is still to be read: let the reader find the end. */
            if (errno != EPIPE && errno != ECONNRESET)
                go_down(qmp, "sending to the QMP socket %s of VM '%s' failed: %s", qmp->path,
                        qmp->vm_name, strerror(errno));
            return false;
        }
        command->sent_bytes += (size_t)n;
        if (command->fd >= 0) {
            close(command->fd);
            command->fd = -1;
        }
    }
    return true;
}

static void on_writable(evutil_socket_t fd, short what, void *arg)
{
    (void)fd;
    (void)what;
    struct qmp *qmp = arg;
    for (struct command *command = qmp->first; command; command = command->next)
        if (!transmit(qmp, command))
            return;
}

static void enqueue(struct qmp *qmp, const char *name, json_t *arguments, int fd, qmp_reply reply,
                    void *arg)
{
    struct command *command = calloc(1, sizeof(*command));
    json_t *object = json_pack("{s:s, s:I, s:o*}", "execute", name, "id",
                               (json_int_t)++qmp->next_id, "arguments", arguments);
    char *text = object ? json_dumps(object, JSON_COMPACT) : NULL;
    json_decref(object);
    int own_fd = -1;
    if (fd >= 0)
        own_fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (!command || !text || (fd >= 0 && own_fd < 0)) {
        go_down(qmp, "sending '%s' to VM '%s' failed: %s", name, qmp->vm_name,
                fd >= 0 && own_fd < 0 ? strerror(errno) : "out of memory");
        if (own_fd >= 0)
            close(own_fd);
        free(command);
        free(text);
        return;
    }
    size_t length = strlen(text);
    text[length] = '\n'; /* in place of the NUL: never used as a string again */
    *command = (struct command){.id = qmp->next_id,
                                .text = text,
                                .length_bytes = length + 1,
                                .fd = own_fd,
                                .reply = reply,
                                .arg = arg};
    bool clear = !qmp->last || qmp->last->sent_bytes == qmp->last->length_bytes;
    if (qmp->last)
        qmp->last->next = command;
    else
        qmp->first = command;
    qmp->last = command;
    if (clear)
        transmit(qmp, command);
}

void qmp_send(struct qmp *qmp, const char *command, json_t *arguments, int fd, qmp_reply reply,
              void *arg)
{
    if (qmp->state != READY) {
        json_decref(arguments);
        return;
    }
    enqueue(qmp, command, arguments, fd, reply, arg);
}

void qmp_forget(struct qmp *qmp)
{
    for (struct command *command = qmp->first; command; command = command->next)
        command->reply = NULL;
}

static void negotiated(void *arg, json_t *value, const char *error)
{
    (void)value;
    struct qmp *qmp = arg;
    if (error) {
        go_down(qmp, "VM '%s' refused to enter QMP command mode: %s", qmp->vm_name, error);
        return;
    }
    qmp->state = READY;
    event_del(qmp->timer);
    qmp->callbacks.ready(qmp->callbacks.arg);
}

static void greeted(struct qmp *qmp, json_t *version)
{
    struct ucred peer = {0};
    socklen_t length = sizeof(peer);
    if (getsockopt(qmp->fd, SOL_SOCKET, SO_PEERCRED, &peer, &length) == 0)
        qmp->peer_pid = peer.pid;
    qmp->version = json_incref(version);
    qmp->state = NEGOTIATING;
    enqueue(qmp, "qmp_capabilities", NULL, -1, negotiated, qmp);
}

static void answered(struct qmp *qmp, const struct qmp_message *message)
{
    struct command *command = qmp->first;
    if (!command || !message->has_id || message->id != command->id || !command->sent_bytes) {
        go_down(qmp, "VM '%s' answered a command on its QMP socket %s that was not asked",
                qmp->vm_name, qmp->path);
        return;
    }
    qmp->first = command->next;
    if (!qmp->first)
        qmp->last = NULL;
    qmp_reply reply = command->reply;
    void *arg = command->arg;
    command_free(command);
    if (reply)
        reply(arg, message->kind == QMP_RETURN ? message->body : NULL, message->desc);
}

static bool on_message(void *arg, const struct qmp_message *message)
{
    struct qmp *qmp = arg;
    switch (message->kind) {
    case QMP_GREETING:
        if (qmp->state == GREETING)
            greeted(qmp, message->body);
        break;
    case QMP_EVENT:
        if (qmp->state == READY)
            qmp->callbacks.event(qmp->callbacks.arg, message->name, message->body);
        break;
    case QMP_RETURN:
    case QMP_ERROR:
        answered(qmp, message);
        break;
    }
    return !qmp->closed && qmp->state != DOWN;
}

static void on_readable(evutil_socket_t fd, short what, void *arg)
{
    (void)what;
    struct qmp *qmp = arg;
    char data[READ_BYTES];
    ssize_t n = recv(fd, data, sizeof(data), MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR))
        return;
    if (n < 0 && errno != ECONNRESET) {
        go_down(qmp, "reading the QMP socket %s of VM '%s' failed: %s", qmp->path, qmp->vm_name,
                strerror(errno));
        return;
    }
    if (n <= 0) {
        go_down(qmp, "QEMU of VM '%s' closed its QMP socket %s: it ended, or was told to",
                qmp->vm_name, qmp->path);
        return;
    }
    enter(qmp);
    struct mf_error err = {0};
    if (qmp_parser_feed(&qmp->parser, data, (size_t)n, on_message, qmp, &err) < 0)
        go_down(qmp, "%s, which should be the QMP socket of VM '%s', %s?", qmp->path, qmp->vm_name,
                err.text);
    leave(qmp);
}

/* Return: 0 connected, -EAGAIN try again later, or -errno. */
static int try_connect(struct qmp *qmp)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    memcpy(address.sun_path, qmp->path, strlen(qmp->path) + 1);
    if (connect(qmp->fd, (struct sockaddr *)&address, sizeof(address)) < 0)
        return -errno;
    qmp->state = GREETING;
    event_add(qmp->readable, NULL);
    arm_timer(qmp, GREETING_TIMEOUT_S * 1000000L);
    return 0;
}

static void on_timer(evutil_socket_t fd, short what, void *arg)
{
    (void)fd;
    (void)what;
    struct qmp *qmp = arg;
    static const unsigned tries_max = GREETING_TIMEOUT_S * 1000000 / CONNECT_RETRY_US;

    if (qmp->state == CONNECTING && qmp->connect_tries++ < tries_max) {
        int rc = try_connect(qmp);
        if (rc == -EAGAIN)
            arm_timer(qmp, CONNECT_RETRY_US);
        else if (rc)
            go_down(qmp, "connecting to the QMP socket %s of VM '%s' failed: %s", qmp->path,
                    qmp->vm_name, strerror(-rc));
        return;
    }
    if (qmp->state != DOWN && qmp->state != READY)
        go_down(
            qmp,
            "QEMU of VM '%s' did not greet on %s within %d s: a QMP monitor serves one client at a "
            "time, another one (libvirt, a script) is probably connected; give memferry one of its "
            "own with a second -qmp unix:PATH,server=on,wait=off",
            qmp->vm_name, qmp->path, GREETING_TIMEOUT_S);
    if (qmp->state == DOWN && !qmp->told_down) {
        qmp->told_down = true;
        enter(qmp);
        qmp->callbacks.down(qmp->callbacks.arg, qmp->why);
        leave(qmp);
    }
}

static const char *connect_remedy(int error)
{
    switch (error) {
    case ENOENT:
        return "is the VM running, and is that its -qmp unix:PATH?";
    case ECONNREFUSED:
        return "nobody listens there; is the VM running?";
    case EACCES:
    case EPERM:
        return "memferryd may not open it; mind the modes of the socket and its directories";
    default:
        return "is that a -qmp unix:PATH,server=on,wait=off socket?";
    }
}

int qmp_open(struct event_base *base, const char *vm_name, const char *path,
             const struct qmp_callbacks *callbacks, struct qmp **out, struct mf_error *err)
{
    if (strlen(path) >= sizeof(((struct sockaddr_un *)0)->sun_path))
        return mf_fail(
            err, ENAMETOOLONG,
            "the path of VM '%s''s QMP socket is longer than a unix socket's may be (%zu "
            "characters): %s",
            vm_name, sizeof(((struct sockaddr_un *)0)->sun_path) - 1, path);
    struct qmp *qmp = calloc(1, sizeof(*qmp));
    if (!qmp)
        return mf_fail(err, ENOMEM, "out of memory for VM '%s'", vm_name);
    qmp->callbacks = *callbacks;
    qmp->vm_name = strdup(vm_name);
    qmp->path = strdup(path);
    qmp->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    int rc = qmp->fd < 0 ? -errno : 0;
    if (!rc) {
        qmp->readable = event_new(base, qmp->fd, EV_READ | EV_PERSIST, on_readable, qmp);
        qmp->writable = event_new(base, qmp->fd, EV_WRITE, on_writable, qmp);
        qmp->timer = event_new(base, -1, 0, on_timer, qmp);
        if (!qmp->readable || !qmp->writable || !qmp->timer || !qmp->vm_name || !qmp->path)
            rc = -ENOMEM;
    }
    if (!rc) {
        rc = try_connect(qmp);
        if (rc == -EAGAIN) {
            arm_timer(qmp, CONNECT_RETRY_US);
            rc = 0;
        }
    }
    if (rc) {
        qmp_free(qmp);
        return mf_fail(err, -rc, "connecting to the QMP socket %s of VM '%s' failed: %s; %s", path,
                       vm_name, strerror(-rc), connect_remedy(-rc));
    }
    *out = qmp;
    return 0;
}

pid_t qmp_peer_pid(const struct qmp *qmp)
{
    return qmp->peer_pid;
}

json_t *qmp_version(const struct qmp *qmp)
{
    return qmp->version;
}

void qmp_close(struct qmp *qmp)
{
    if (!qmp)
        return;
    qmp->closed = true;
    qmp->state = DOWN;
    qmp->told_down = true;
    event_del(qmp->readable);
    event_del(qmp->writable);
    event_del(qmp->timer);
    if (qmp->users == 0)
        qmp_free(qmp);
}
