/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * `memferry migrate`: start it, show how it goes, end with what became of it. The migration is
 * memferryd's; this process can go away at any time without harming it.
 */
#include "daemon/memferry/verbs.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include "daemon/memferry/client.h"
#include "daemon/memferry/progress.h"
#include "daemon/memferry/show.h"
#include "lib/util.h"

/** How often to look whether the cancellation was answered. */
#define CANCEL_POLL_MS 50

struct migration {
    const struct cli_args *args;
    struct client watch;              /**< the connection on which the migration was asked for */
    struct client cancel;             /**< that on which Ctrl-C asked to cancel, fd -1: none */
    bool interrupted;                 /**< Ctrl-C was seen */
    int signal_fd;                    /**< owned; SIGINT and SIGTERM */
    Memferry__Control__Reply *latest; /**< owned; the last reply that had a session, or NULL */
    struct progress progress;
};

static const Memferry__Control__Session *latest_session(const struct migration *m)
{
    return m->latest ? m->latest->sessions[0] : NULL;
}

static bool released(const struct migration *m)
{
    const Memferry__Control__Session *session = latest_session(m);
    return session && session->released;
}

/* The last word: JSON on stdout if that was asked for, a sentence on stderr in any case. @sentence
 * overrides the session's own reason; NULL keeps it. */
static int leave(struct migration *m, int code, const char *sentence)
{
    const Memferry__Control__Session *session = latest_session(m);
    progress_clear(&m->progress);
    if (!session && m->interrupted && m->args->json) {
        show_json(
            show_json_failure(m->args->name, "source", "cancelled", sentence ? sentence : ""));
        return verb_complain(code, sentence ? sentence : "cancelled");
    }
    if (!session)
        return verb_fail(m->args, code, sentence ? sentence : "memferryd told of no session");
    if (m->args->json) {
        Memferry__Control__Session copy = *session;
        if (sentence && !copy.reason[0])
            copy.reason = (char *)sentence;
        show_json(show_json_session(&copy));
    }
    return sentence ? verb_complain(code, sentence) : code;
}

/* ---- Ctrl-C ---- */

static int leave_behind(struct migration *m)
{
    struct mf_error text;
    if (released(m))
        mf_fail(
            &text, EINTR,
            "detached: the guest already runs on the other host and its memory goes on following; "
            "'memferry status %s' shows how far it is",
            m->args->name);
    else
        mf_fail(&text, EINTR,
                "detached without waiting for the cancellation; 'memferry status %s' shows what "
                "becomes "
                "of it",
                m->args->name);
    return leave(m, released(m) ? CLI_RELEASED : CLI_FAILED, text.text);
}

/* Return: -1 go on, else the exit code. */
static int on_interrupt(struct migration *m)
{
    struct signalfd_siginfo info;
    if (read(m->signal_fd, &info, sizeof(info)) != (ssize_t)sizeof(info))
        return -1;
    if (m->interrupted || released(m))
        return leave_behind(m);
    m->interrupted = true;
    progress_clear(&m->progress);
    fputs("memferry: cancelling; press Ctrl-C again to leave without waiting\n", stderr);

    Memferry__Control__NameRequest name = MEMFERRY__CONTROL__NAME_REQUEST__INIT;
    name.name = (char *)m->args->name;
    Memferry__Control__Request request = MEMFERRY__CONTROL__REQUEST__INIT;
    request.verb_case = MEMFERRY__CONTROL__REQUEST__VERB_CANCEL;
    request.cancel = &name;
    struct mf_error err;
    int rc = client_open(&m->cancel, m->args->runtime_dir, &err);
    if (rc == 0)
        rc = client_send(&m->cancel, &request, &err);
    if (rc < 0) {
        client_close(&m->cancel);
        verb_complain(0, err.text);
    }
    return -1;
}

static bool has_ended(const Memferry__Control__Session *session)
{
    return strcmp(session->state, "done") == 0 || strcmp(session->state, "failed") == 0 ||
           strcmp(session->state, "cancelled") == 0;
}

/* Has memferryd answered the cancellation? What became of the session is told on the other
 * connection; here it matters only that it was refused. Return: -1 go on, else the exit code. */
static int look_at_cancel(struct migration *m)
{
    Memferry__Control__Reply *reply = NULL;
    struct mf_error err;
    int rc = client_receive(&m->cancel, 0, -1, &reply, &err);
    if (rc == CLIENT_TIMEOUT)
        return -1;
    client_close(&m->cancel);
    if (rc < 0) {
        verb_complain(0, err.text);
        return -1;
    }
    int code = -1;
    if (reply->error[0]) {
        bool gone = released(m);
        bool ended = m->latest && has_ended(latest_session(m));
        if (reply->n_sessions == 1) {
            gone |= reply->sessions[0]->released;
            ended |= has_ended(reply->sessions[0]);
        }
        if (!ended) {
            progress_clear(&m->progress);
            verb_complain(0, reply->error);
        }
        if (gone && !ended) {
            if (reply->n_sessions == 1) {
                memferry__control__reply__free_unpacked(m->latest, NULL);
                m->latest = reply;
                reply = NULL;
            }
            code = leave_behind(m);
        }
    }
    if (reply)
        memferry__control__reply__free_unpacked(reply, NULL);
    return code;
}

/* ---- the migration ---- */

static int on_last(struct migration *m, const Memferry__Control__Reply *reply)
{
    const Memferry__Control__Session *session = latest_session(m);
    int code = verb_reply_code(reply);
    if (code != CLI_DONE) {
        code = leave(m, code, reply->error[0] ? reply->error : "the migration failed");
        if (session && session->guest_safe_at_source && has_ended(session))
            fprintf(stderr, "memferry: the guest is safe: it is still here, at the source\n");
        else if (session && session->released && has_ended(session))
            fprintf(stderr,
                    "memferry: the guest had changed hosts already and is not started again here: "
                    "see what became of the VM at %s before you do anything with the one here\n",
                    session->peer);
        return code;
    }
    if (m->args->json)
        return leave(m, code, NULL);
    progress_clear(&m->progress);
    if (!session)
        return code;
    if (has_ended(session))
        show_summary(session, m->args->keep_source);
    else
        printf("The migration of %s has started; 'memferry status %s' shows how it goes.\n",
               session->name, session->name);
    return code;
}

static int follow(struct migration *m)
{
    for (;;) {
        Memferry__Control__Reply *reply = NULL;
        struct mf_error err;
        int rc = client_receive(&m->watch, m->cancel.fd >= 0 ? CANCEL_POLL_MS : -1, m->signal_fd,
                                &reply, &err);
        if (rc < 0) {
            if (released(m))
                return leave(m, CLI_RELEASED, err.text);
            return leave(m, CLI_UNREACHABLE, err.text);
        }
        int code = -1;
        if (rc == CLIENT_WAKE)
            code = on_interrupt(m);
        if (rc == CLIENT_REPLY) {
            bool last = reply->last;
            Memferry__Control__Reply *old = reply;
            if (reply->n_sessions == 1) {
                old = m->latest;
                m->latest = reply;
            }
            if (last)
                code = on_last(m, reply);
            else if (reply->n_sessions == 1)
                progress_show(&m->progress, latest_session(m));
            if (old)
                memferry__control__reply__free_unpacked(old, NULL);
        }
        if (code < 0 && m->cancel.fd >= 0)
            code = look_at_cancel(m);
        if (code >= 0)
            return code;
    }
}

static int start(struct migration *m, const struct verb_target *target)
{
    const struct cli_args *args = m->args;
    Memferry__Control__MigrateRequest migrate = MEMFERRY__CONTROL__MIGRATE_REQUEST__INIT;
    migrate.name = (char *)args->name;
    migrate.qmp_path = target->qmp_path;
    migrate.process = target->process_p;
    migrate.host = (char *)args->to.host;
    migrate.port = args->to.port;
    migrate.keep_source = args->keep_source;
    migrate.streams = args->streams;
    migrate.detach = args->detach;
    migrate.mode = (char *)args->rounds.mode;
    migrate.bandwidth_bits_s = args->bandwidth_bits_s;
    migrate.max_rounds = args->rounds.max_rounds;
    migrate.switch_after_s = args->rounds.switch_after_s;
    migrate.max_blackout_ms = args->rounds.max_blackout_ms;
    migrate.fallback = args->rounds.fallback;
    Memferry__Control__Request request = MEMFERRY__CONTROL__REQUEST__INIT;
    request.verb_case = MEMFERRY__CONTROL__REQUEST__VERB_MIGRATE;
    request.migrate = &migrate;
    struct mf_error err;
    if (client_open(&m->watch, args->runtime_dir, &err) < 0 ||
        client_send(&m->watch, &request, &err) < 0)
        return leave(m, CLI_UNREACHABLE, err.text);
    return follow(m);
}

int verb_migrate(const struct cli_args *args)
{
    struct migration m = {.args = args, .watch.fd = -1, .cancel.fd = -1, .signal_fd = -1};
    progress_open(&m.progress, !args->json && !args->detach);
    cleanup_free char *qmp_path = NULL;
    struct verb_target target;
    struct mf_error err;
    if (verb_target(args, &target, &qmp_path, &err) < 0)
        return leave(&m, CLI_FAILED, err.text);

    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGINT);
    sigaddset(&signals, SIGTERM);
    sigprocmask(SIG_BLOCK, &signals, NULL);
    m.signal_fd = signalfd(-1, &signals, SFD_CLOEXEC | SFD_NONBLOCK);
    if (m.signal_fd < 0)
        return leave(&m, CLI_FAILED, "cannot watch for Ctrl-C: the kernel refuses a signalfd");

    int code = start(&m, &target);
    if (m.latest)
        memferry__control__reply__free_unpacked(m.latest, NULL);
    client_close(&m.watch);
    client_close(&m.cancel);
    close(m.signal_fd);
    return code;
}
