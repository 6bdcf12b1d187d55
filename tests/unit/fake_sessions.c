/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A memferryd without virtual machines: control.c and config.c as they are, over sessions that act
 * by a script. test_cli.py drives it through memferry itself. The script is chosen by the host that
 * `migrate --to` names, or by the file name that `receive --qmp` names.
 *
 * usage: fake-memferryd RUNTIME-DIR     (until SIGTERM)
 */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/queue.h>
#include <unistd.h>

#include "daemon/memferryd/daemon.h"
#include "daemon/memferryd/vmm.h"
#include "lib/log.h"

#define RAM_BYTES ((uint64_t)1 << 30)

enum state {
    WAITING,
    CONNECTING,
    PRECOPY,
    SWITCHOVER,
    POSTCOPY,
    DRAINED,
    DONE,
    RECOVERING,
    FAILED,
    CANCELLED
};
static const char *const state_words[] = {"waiting",  "connecting", "precopy", "switchover",
                                          "postcopy", "drained",    "done",    "recovering",
                                          "failed",   "cancelled"};

/** What becomes of a migration; a state that the script stays in is its last. */
static const struct script {
    const char *host;
    enum state states[8];
    unsigned count;
    const char *reason; /**< of the last state */
} scripts[] = {
    {"ok", {CONNECTING, PRECOPY, SWITCHOVER, POSTCOPY, DRAINED, DONE}, 6, ""},
    {"fail", {CONNECTING, PRECOPY, FAILED}, 3, "vm: the link to fail:7466 broke; try again"},
    {"stay-precopy", {CONNECTING, PRECOPY}, 2, ""},
    {"rounds", {CONNECTING, PRECOPY, PRECOPY, PRECOPY, PRECOPY, SWITCHOVER, POSTCOPY, DONE}, 8, ""},
    {"stay-postcopy", {CONNECTING, PRECOPY, SWITCHOVER, POSTCOPY}, 4, ""},
    {"recover",
     {CONNECTING, PRECOPY, SWITCHOVER, POSTCOPY, RECOVERING, POSTCOPY, DRAINED, DONE},
     8,
     ""},
    {"lost",
     {CONNECTING, PRECOPY, SWITCHOVER, POSTCOPY, FAILED},
     5,
     "vm: the destination forgot it"},
    {"stay-recovering",
     {CONNECTING, PRECOPY, SWITCHOVER, RECOVERING},
     4,
     "mover \xff\x1b[2J\xc2\x9b died"},
};

struct session {
    struct daemon *daemon;
    char name[64];
    char peer[300];
    const struct script *script; /**< NULL: a destination that waits */
    unsigned step;
    enum state state;
    bool was_released;
    bool fell_back;
    const char *mode;
    uint64_t bandwidth_bits_s;
    char asked[160]; /**< the options that have no field of their own, shown as the reason */
    uint64_t ticks;
    struct event *timer;
    TAILQ_ENTRY(session) link;
};

/** An answer that is on its way: session_waiter promises that it never comes from inside the call.
 */
struct answer {
    struct session_waiter waiter;
    struct session *session;
    char error[300];
    unsigned exit_code;
    struct daemon *daemon;
    struct event *timer;
    TAILQ_ENTRY(answer) link;
};

struct daemon {
    struct event_base *base;
    struct config config;
    struct control *control;
    TAILQ_HEAD(session_list, session) sessions;
    TAILQ_HEAD(answer_list, answer) answers;
    struct session_waiter starting; /**< of a migration that stays in preflight */
};

struct event_base *daemon_base(struct daemon *daemon)
{
    return daemon->base;
}
const struct config *daemon_config(struct daemon *daemon)
{
    return &daemon->config;
}
struct control *daemon_control(struct daemon *daemon)
{
    return daemon->control;
}

static void answer_free(struct answer *answer)
{
    event_free(answer->timer);
    TAILQ_REMOVE(&answer->daemon->answers, answer, link);
    free(answer);
}

static void on_answer(evutil_socket_t fd, short what, void *arg)
{
    (void)fd;
    (void)what;
    struct answer *answer = arg;
    if (answer->waiter.done)
        answer->waiter.done(answer->waiter.arg, answer->session,
                            answer->error[0] ? answer->error : NULL, answer->exit_code);
    answer_free(answer);
}

static void answer_later(struct daemon *daemon, struct session_waiter waiter,
                         struct session *session, unsigned exit_code, const char *error)
{
    struct answer *answer = calloc(1, sizeof(*answer));
    if (!answer)
        abort();
    answer->waiter = waiter;
    answer->session = session;
    answer->exit_code = exit_code;
    answer->daemon = daemon;
    snprintf(answer->error, sizeof(answer->error), "%s", error);
    answer->timer = evtimer_new(daemon->base, on_answer, answer);
    TAILQ_INSERT_TAIL(&daemon->answers, answer, link);
    struct timeval soon = {.tv_usec = 20000};
    event_add(answer->timer, &soon);
}

void session_waiter_drop(struct daemon *daemon, void *arg)
{
    struct answer *answer;
    TAILQ_FOREACH(answer, &daemon->answers, link)
    {
        if (answer->waiter.arg == arg)
            answer->waiter.done = NULL;
    }
    if (daemon->starting.arg == arg)
        daemon->starting.done = NULL;
    mf_log(MF_LOG_INFO, "dropped a waiter");
}

static void enter(struct session *session, enum state state)
{
    session->state = state;
    if (state == POSTCOPY || state == RECOVERING)
        session->was_released = true;
    control_session_changed(session->daemon->control, session);
}

static void on_tick(evutil_socket_t fd, short what, void *arg)
{
    (void)fd;
    (void)what;
    struct session *session = arg;
    session->ticks++;
    if (session->ticks == 4 && strcmp(session->name, "falls-back") == 0)
        session->fell_back = true;
    if (session->step + 1 < session->script->count) {
        enter(session, session->script->states[++session->step]);
    } else {
        control_session_changed(session->daemon->control, session);
        if (session_ended(session))
            event_del(session->timer);
    }
}

static struct session *make_session(struct daemon *daemon, const char *name)
{
    struct session *session = calloc(1, sizeof(*session));
    if (!session)
        abort();
    session->daemon = daemon;
    snprintf(session->name, sizeof(session->name), "%s", name);
    session->timer = event_new(daemon->base, -1, EV_PERSIST, on_tick, session);
    TAILQ_INSERT_TAIL(&daemon->sessions, session, link);
    return session;
}

void session_receive(struct daemon *daemon, const char *name, const struct vmm_target *target,
                     struct session_waiter waiter)
{
    const char *qmp_path = target->qmp_path ? target->qmp_path : target->load;
    if (strstr(qmp_path, "refuse"))
        answer_later(daemon, waiter, NULL, 1, "vm: QEMU does not wait for a migration");
    else if (strstr(qmp_path, "never"))
        mf_log(MF_LOG_INFO, "a waiter that is never answered");
    else
        answer_later(daemon, waiter, make_session(daemon, name), 0, "");
}

void session_migrate(struct daemon *daemon, const struct migrate_options *options,
                     struct session_waiter waiter)
{
    if (strcmp(options->host, "stay-starting") == 0) {
        daemon->starting = waiter;
        mf_log(MF_LOG_INFO, "stays in preflight");
        return;
    }
    for (size_t i = 0; i < sizeof(scripts) / sizeof(scripts[0]); i++) {
        if (strcmp(options->host, scripts[i].host) != 0)
            continue;
        struct session *session = make_session(daemon, options->name);
        session->script = &scripts[i];
        session->state = CONNECTING;
        session->mode = options->mode;
        session->bandwidth_bits_s = options->bandwidth_bits_s;
        snprintf(session->asked, sizeof(session->asked),
                 "rounds %u, after %u s, blackout %u ms, fallback %d", options->max_rounds,
                 options->switch_after_s, options->max_blackout_ms, options->fallback);
        snprintf(session->peer, sizeof(session->peer), "%s:%u", options->host,
                 options->port ? options->port : MF_DEFAULT_PORT);
        struct timeval tick = {.tv_usec = 60000};
        event_add(session->timer, &tick);
        answer_later(daemon, waiter, session, 0, "");
        return;
    }
    answer_later(daemon, waiter, NULL, 1, "vm: memory-backend-ram is not share=on; use share=on");
}

void session_cancel(struct daemon *daemon, const char *name, struct session_waiter waiter)
{
    struct session *session = session_find(daemon, name);
    if (!session && daemon->starting.done) {
        answer_later(daemon, daemon->starting, NULL, 1, "vm was cancelled before it began");
        answer_later(daemon, waiter, NULL, 0, "");
        daemon->starting.done = NULL;
    } else if (!session) {
        answer_later(daemon, waiter, NULL, 1, "there is no such session");
    } else if (session_ended(session)) {
        answer_later(daemon, waiter, session, session->was_released ? 4 : 1, "it has ended");
    } else if (session->was_released) {
        answer_later(daemon, waiter, session, 4, "the guest has changed hosts already");
    } else {
        event_del(session->timer);
        enter(session, CANCELLED);
        answer_later(daemon, waiter, session, 0, "");
    }
}

int session_set_bandwidth(struct daemon *daemon, const char *name, uint64_t bits_s,
                          struct mf_error *err)
{
    struct session *session = session_find(daemon, name);
    if (!session)
        return mf_fail(err, ENOENT, "there is no session %s", name);
    if (session_ended(session))
        return mf_fail(err, EINVAL, "%s has ended", name);
    session->bandwidth_bits_s = bits_s;
    return 0;
}

/* Of a script that stays in precopy: goes on to the end. */
int session_switch(struct daemon *daemon, const char *name, struct mf_error *err)
{
    struct session *session = session_find(daemon, name);
    if (!session)
        return mf_fail(err, ENOENT, "there is no session %s", name);
    if (!session->script || session->state > POSTCOPY)
        return mf_fail(err, EINVAL, "%s sends no memory ahead", name);
    if (session->state < SWITCHOVER) {
        session->script = &scripts[0];
        session->step = 1;
    }
    return 0;
}

int session_forget(struct daemon *daemon, const char *name, struct mf_error *err)
{
    struct session *session = session_find(daemon, name);
    if (!session)
        return mf_fail(err, ENOENT, "there is no session %s", name);
    /* A test wants to forget under a watcher's eyes. */
    if (!session_ended(session) && strcmp(name, "forgettable") != 0)
        return mf_fail(err, EBUSY, "%s has not ended", name);
    TAILQ_REMOVE(&daemon->sessions, session, link);
    event_free(session->timer);
    free(session);
    return 0;
}

struct session *session_find(struct daemon *daemon, const char *name)
{
    struct session *session;
    TAILQ_FOREACH(session, &daemon->sessions, link)
    {
        if (strcmp(session->name, name) == 0)
            return session;
    }
    return NULL;
}
struct session *session_first(struct daemon *daemon)
{
    return TAILQ_FIRST(&daemon->sessions);
}
struct session *session_next(struct session *session)
{
    return TAILQ_NEXT(session, link);
}
const char *session_name(const struct session *session)
{
    return session->name;
}
bool session_ended(const struct session *session)
{
    return session->state == DONE || session->state == FAILED || session->state == CANCELLED;
}
unsigned session_exit_code(const struct session *session)
{
    if (session->state == DONE)
        return 0;
    return session->was_released ? 4 : 1;
}

void session_describe(struct session *session, Memferry__Control__Session *out,
                      Memferry__Control__Faults *faults)
{
    memferry__control__session__init(out);
    memferry__control__faults__init(faults);
    bool ended = session_ended(session);
    out->name = session->name;
    out->id = session->script ? "0123456789abcdef" : "";
    out->role = session->script ? "source" : "destination";
    out->state = (char *)state_words[session->state];
    out->reason = session->script && session->step + 1 == session->script->count
                      ? (char *)session->script->reason
                      : "";
    out->peer = session->peer;
    out->released = session->was_released;
    out->guest_safe_at_source = !session->was_released;
    if (!session->script)
        return;
    out->mode = (char *)(session->fell_back ? "hybrid" : session->mode);
    out->bandwidth_bits_s = session->bandwidth_bits_s;
    if (session->state == PRECOPY && strncmp(session->name, "asked-", 6) == 0)
        out->reason = session->asked;
    if (session->state == PRECOPY && session->ticks > 8 && strcmp(session->name, "slow-vm") == 0)
        out->reason = (char *)"the guest writes faster than is sent";
    if (strcmp(out->mode, "postcopy") != 0 && session->state >= PRECOPY) {
        out->rounds = session->ticks < 4 ? (uint32_t)session->ticks : 4;
        out->round_left_bytes = RAM_BYTES >> 2 * out->rounds;
        out->dirty_rate_pages_s = out->rounds > 1 ? 4120 : 0;
    }
    out->precopy_bytes = RAM_BYTES / 20;
    if (session->was_released) {
        out->postcopy_bytes = session->ticks * (RAM_BYTES / 20) - out->precopy_bytes;
        out->dirty_pages_at_switch = 2345;
        out->unconfirmed_at_release = 262144;
    }
    out->ram_bytes = RAM_BYTES;
    out->total_us = session->ticks * 60000;
    out->sent_bytes = session->ticks * (RAM_BYTES / 20);
    out->confirmed_bytes = ended && session->state == DONE ? RAM_BYTES
                           : session->ticks < 20           ? session->ticks * (RAM_BYTES / 20)
                                                           : RAM_BYTES;
    out->blackout_us = session->was_released ? 43210 : 0;
    out->data_pages = 105472;
    out->zero_pages = 2048;
    out->hole_pages = 154624;
    faults->count = session->was_released ? 1234 : 0;
    faults->p50_us = 180.5;
    faults->p99_us = 1200;
    faults->p999_us = 3000;
    faults->max_us = 3100;
    out->faults = faults;
}

static void on_term(evutil_socket_t fd, short what, void *arg)
{
    (void)fd;
    (void)what;
    event_base_loopbreak(arg);
}

int main(int argc, char **argv)
{
    struct daemon daemon = {0};
    struct mf_error err;
    if (argc != 2)
        return 2;
    mf_log_setup("fake-memferryd", MF_LOG_INFO);
    TAILQ_INIT(&daemon.sessions);
    TAILQ_INIT(&daemon.answers);
    config_defaults(&daemon.config);
    snprintf(daemon.config.runtime_dir, sizeof(daemon.config.runtime_dir), "%s", argv[1]);
    daemon.base = event_base_new();
    struct event *term = evsignal_new(daemon.base, SIGTERM, on_term, daemon.base);
    event_add(term, NULL);
    if (control_open(&daemon, &daemon.control, &err) < 0) {
        mf_log(MF_LOG_ERR, "%s", err.text);
        return 1;
    }
    printf("ready\n");
    fflush(stdout);
    event_base_dispatch(daemon.base);

    control_close(daemon.control);
    struct answer *answer;
    while ((answer = TAILQ_FIRST(&daemon.answers)))
        answer_free(answer);
    struct session *session;
    while ((session = TAILQ_FIRST(&daemon.sessions))) {
        TAILQ_REMOVE(&daemon.sessions, session, link);
        event_free(session->timer);
        free(session);
    }
    event_free(term);
    event_base_free(daemon.base);
    return 0;
}
