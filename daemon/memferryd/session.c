/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The sessions of this host: made, found, described, forgotten. */
#include "daemon/memferryd/session.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>

#include "lib/log.h"
#include "lib/util.h"

/* ---- those who wait ---- */

/** struct answer - an answer on its way: never given from inside the call that asked. */
struct answer {
    struct answer *next;
    struct daemon *daemon;
    struct session_waiter waiter;
    char name[MF_NAME_MAX + 1]; /**< the session, looked up again when the answer is given */
    bool failed;
    char error[768];
    unsigned exit_code;
};

static struct answer *answers; /* of the one daemon of this process */

static void give_answer(evutil_socket_t fd, short what, void *arg)
{
    struct answer *a = arg;
    (void)fd;
    (void)what;
    for (struct answer **at = &answers; *at; at = &(*at)->next)
        if (*at == a) {
            *at = a->next;
            break;
        }
    if (a->waiter.done)
        a->waiter.done(a->waiter.arg, a->name[0] ? session_find(a->daemon, a->name) : NULL,
                       a->failed ? a->error : NULL, a->exit_code);
    free(a);
}

static void answer_later(struct daemon *daemon, struct session_waiter waiter,
                         const struct session *session, const char *error, unsigned exit_code)
{
    struct answer *a = calloc(1, sizeof(*a));
    static const struct timeval now = {0, 0};
    if (!a)
        return; /* the one who waits will see the session in `status` */
    a->daemon = daemon;
    a->waiter = waiter;
    if (session)
        snprintf(a->name, sizeof(a->name), "%s", session->name);
    if (error) {
        a->failed = true;
        snprintf(a->error, sizeof(a->error), "%s", error);
    }
    a->exit_code = exit_code;
    a->next = answers;
    answers = a;
    event_base_once(daemon_base(daemon), -1, EV_TIMEOUT, give_answer, a, &now);
}

static void wait_in(struct waiting **list, struct session_waiter waiter)
{
    struct waiting *w = calloc(1, sizeof(*w));
    if (!w)
        return;
    w->waiter = waiter;
    w->next = *list;
    *list = w;
}

static void tell_all(struct session *session, struct waiting **list, const struct session *shown,
                     const char *error, unsigned exit_code)
{
    while (*list) {
        struct waiting *w = *list;
        *list = w->next;
        answer_later(session->daemon, w->waiter, shown, error, exit_code);
        free(w);
    }
}

static void drop_from(struct waiting **list, const void *arg)
{
    while (*list) {
        struct waiting *w = *list;
        if (w->waiter.arg == arg) {
            *list = w->next;
            free(w);
        } else {
            list = &w->next;
        }
    }
}

void session_waiter_drop(struct daemon *daemon, void *arg)
{
    for (struct answer *a = answers; a; a = a->next)
        if (a->waiter.arg == arg)
            a->waiter.done = NULL;
    for (struct session *s = *daemon_sessions(daemon); s; s = s->next) {
        drop_from(&s->start_waiters, arg);
        drop_from(&s->cancel_waiters, arg);
    }
}

/* ---- the list ---- */

struct session *session_find(struct daemon *daemon, const char *name)
{
    for (struct session *s = *daemon_sessions(daemon); s; s = s->next)
        if (!s->rejected && strcmp(s->name, name) == 0)
            return s;
    return NULL;
}

struct session *session_first(struct daemon *daemon)
{
    struct session *s = *daemon_sessions(daemon);
    while (s && s->rejected)
        s = s->next;
    return s;
}

struct session *session_next(struct session *session)
{
    struct session *s = session->next;
    while (s && s->rejected)
        s = s->next;
    return s;
}

const char *session_name(const struct session *session)
{
    return session->name;
}

bool session_ended(const struct session *session)
{
    return mf_state_ended(session->state);
}

unsigned session_exit_code(const struct session *session)
{
    if (session->state == MF_DONE)
        return 0;
    return session->released ? 4 : 1;
}

const struct vmm_ops *session_vmm_ops(const struct session *session)
{
    return session->vmm_ops;
}

const char *session_noun(const struct session *session)
{
    return session->vmm_ops->noun;
}

/* ---- what became of sessions that are gone ---- */

#define EPITAPHS 256u

/* A source that lost its link may come back after the session was forgotten here, or its name given
 * to another: it still has to hear that it may let its VM go, or try for ever. */
static struct epitaph {
    uint8_t id[MF_SESSION_ID_BYTES];
    bool used, done;
} epitaphs[EPITAPHS];
static unsigned next_epitaph;

static void bury(const struct session *session)
{
    if (session->role != MF_DESTINATION || !session->id_text[0] || !session_ended(session))
        return;
    struct epitaph *e = &epitaphs[next_epitaph++ % EPITAPHS];
    memcpy(e->id, session->id, sizeof(e->id));
    e->done = session->state == MF_DONE;
    e->used = true;
}

bool session_remembered(const uint8_t id[MF_SESSION_ID_BYTES], bool *done)
{
    for (unsigned i = 0; i < EPITAPHS; i++)
        if (epitaphs[i].used && memcmp(epitaphs[i].id, id, MF_SESSION_ID_BYTES) == 0) {
            *done = epitaphs[i].done;
            return true;
        }
    return false;
}

static void destroy(struct session *session)
{
    bury(session);
    struct session **at = daemon_sessions(session->daemon);
    while (*at && *at != session)
        at = &(*at)->next;
    if (*at)
        *at = session->next;
    tell_all(session, &session->start_waiters, NULL, "the session was dropped", 1);
    tell_all(session, &session->cancel_waiters, NULL, "the session was dropped", 1);
    free(session);
}

static void destroy_later(evutil_socket_t fd, short what, void *arg)
{
    (void)fd;
    (void)what;
    destroy(arg);
}

const struct session *session_of_pid(struct daemon *daemon, pid_t pid, const struct session *except)
{
    for (const struct session *s = *daemon_sessions(daemon); s; s = s->next)
        if (s != except && s->pid == pid && !s->target_exited && !s->rejected && !session_ended(s))
            return s;
    return NULL;
}

/* A new session under @name; one that has ended makes room. NULL: refused, the waiter is told. */
static struct session *create(struct daemon *daemon, const char *name,
                              const struct vmm_target *target, enum mf_role role,
                              struct session_waiter waiter)
{
    struct session *old = session_find(daemon, name);
    char error[256];
    if (old && !session_ended(old)) {
        snprintf(error, sizeof(error),
                 "the name %s is taken by a session in state %s on this host; choose another or "
                 "cancel it (memferry cancel %s)",
                 name, mf_state_name(old->state), name);
        answer_later(daemon, waiter, NULL, error, 1);
        return NULL;
    }
    if (old)
        destroy(old);
    struct session *s = calloc(1, sizeof(*s));
    if (!s) {
        answer_later(daemon, waiter, NULL, "memferryd is out of memory", 1);
        return NULL;
    }
    s->daemon = daemon;
    snprintf(s->name, sizeof(s->name), "%s", name);
    s->vmm_ops = target->qmp_path ? &vmm_qemu : &vmm_process;
    s->role = role;
    s->state = role == MF_SOURCE ? MF_S_CONNECTING : MF_D_WAITING;
    s->starting = true;
    s->pid = target->pid;
    s->pagemap_fd = s->populated_fd = s->layout_fd = -1;
    s->maps_fd = s->pidfd = s->uffd = s->remote_uffd = s->file_fd = s->device_peer_fd = -1;
    s->started_ns = mf_now_ns();
    s->streams = daemon_config(daemon)->streams;
    wait_in(&s->start_waiters, waiter);
    s->next = *daemon_sessions(daemon);
    *daemon_sessions(daemon) = s;
    return s;
}

void session_set_id(struct session *session, const uint8_t id[MF_SESSION_ID_BYTES])
{
    memcpy(session->id, id, sizeof(session->id));
    for (unsigned i = 0; i < MF_SESSION_ID_BYTES; i++)
        snprintf(session->id_text + 2 * (size_t)i, 3, "%02x", id[i]);
}

/* ---- starting ---- */

void session_started(struct session *session)
{
    session->starting = false;
    tell_all(session, &session->start_waiters, session, NULL, 0);
    session_changed(session);
}

void session_reject(struct session *session, const char *fmt, ...)
{
    static const struct timeval now = {0, 0};
    char text[768];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    if (session->rejected)
        return;
    mf_log(MF_LOG_NOTICE, "%s: refused: %s", session->name, text);
    session->rejected = true;
    session->state = MF_FAILED;
    tell_all(session, &session->start_waiters, NULL, text, 1);
    tell_all(session, &session->cancel_waiters, NULL, NULL, 0);
    session_end(session);
    /* The caller may still look at it. */
    event_base_once(daemon_base(session->daemon), -1, EV_TIMEOUT, destroy_later, session, &now);
}

/* Preflight at the VMM is done. */
static void on_probed(void *arg, const struct vmm_info *info, const char *why)
{
    struct session *s = arg;
    struct mf_error err;
    if (!info) {
        session_reject(s, "%s", why);
        return;
    }
    s->guest_was_running = info->was_running;
    s->state_s = info->state_s;
    snprintf(s->memory_note, sizeof(s->memory_note), "%s", info->set_aside);
    if (target_find(s, info, &err) < 0)
        session_reject(s, "%s", err.text);
    else if (s->role == MF_DESTINATION)
        target_arm(s, session_prepared);
    else
        precopy_setup(s, info);
}

void session_prepared(struct session *s, const struct mf_error *why)
{
    struct mf_error err;
    if (why) {
        session_reject(s, "%s", why->text);
        return;
    }
    uint64_t pages[MF_REGIONS_MAX];
    for (unsigned i = 0; i < s->region_count; i++)
        pages[i] = s->region[i].size_bytes / s->region[i].page_bytes;
    s->file_fd = memfd_create("memferry-session", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (s->file_fd < 0) {
        session_reject(s, "cannot make the session file of %s: %s", s->name, strerror(errno));
        return;
    }
    if (mf_session_file_create(s->file_fd, pages, s->region_count, &err) < 0 ||
        mf_session_file_map(s->file_fd, &s->view, &err) < 0 || mover_start(s, &err) < 0)
        session_reject(s, "%s", err.text);
    else if (session_vmm_ops(s)->move_on)
        session_vmm_ops(s)->move_on(s->vmm);
}

static void open_vmm(struct session *s, const struct vmm_target *named)
{
    struct vmm_target target = *named;
    target.stand_still = s->role == MF_SOURCE && s->rounds.mode != MF_POSTCOPY;
    const struct vmm_callbacks callbacks = {.probed = on_probed, .event = session_on_vmm, .arg = s};
    struct mf_error err;
    if (target.pid && target_refuse_taken(s, &err) < 0) {
        session_reject(s, "%s", err.text);
        return;
    }
    if (session_vmm_ops(s)->open(daemon_base(s->daemon), s->name, &target,
                                 s->role == MF_SOURCE ? VMM_SOURCE : VMM_DESTINATION, &callbacks,
                                 &s->vmm, &err) < 0)
        session_reject(s, "%s", err.text);
}

void session_receive(struct daemon *daemon, const char *name, const struct vmm_target *target,
                     struct session_waiter waiter)
{
    struct session *s = create(daemon, name, target, MF_DESTINATION, waiter);
    if (s)
        open_vmm(s, target);
}

void session_migrate(struct daemon *daemon, const struct migrate_options *options,
                     struct session_waiter waiter)
{
    struct session *s = create(daemon, options->name, options->target, MF_SOURCE, waiter);
    if (!s)
        return;
    snprintf(s->host, sizeof(s->host), "%s", options->host);
    s->port = options->port ? options->port : MF_DEFAULT_PORT;
    snprintf(s->peer, sizeof(s->peer), strchr(s->host, ':') ? "[%s]:%u" : "%s:%u", s->host,
             s->port);
    if (options->streams)
        s->streams = options->streams;
    s->keep_source = options->keep_source;
    s->rounds.max_rounds = options->max_rounds;
    s->rounds.max_blackout_ns =
        (options->max_blackout_ms ? options->max_blackout_ms : MF_ROUNDS_MAX_BLACKOUT_MS) *
        UINT64_C(1000000);
    s->rounds.fallback = options->fallback;
    s->switch_after_s = options->switch_after_s;
    s->bandwidth_bits_s = options->bandwidth_bits_s;
    if (mf_mode_of(options->mode, &s->rounds.mode) < 0) {
        session_reject(s, "the mode %s is not known; it is hybrid, postcopy or precopy",
                       options->mode);
        return;
    }
    uint8_t id[MF_SESSION_ID_BYTES];
    if (getrandom(id, sizeof(id), 0) != (ssize_t)sizeof(id)) {
        session_reject(s, "cannot draw a session id: %s", strerror(errno));
        return;
    }
    session_set_id(s, id);
    open_vmm(s, options->target);
}

/* ---- cancelling and forgetting ---- */

void session_tell_cancelled(struct session *session, const char *error)
{
    tell_all(session, &session->cancel_waiters, session, error,
             error ? (session->released ? 4u : 1u) : 0u);
}

void session_cancel(struct daemon *daemon, const char *name, struct session_waiter waiter)
{
    struct session *s = session_find(daemon, name);
    char error[512];
    if (!s || session_ended(s)) {
        if (!s)
            snprintf(error, sizeof(error), "there is no session named %s on this host", name);
        else
            snprintf(error, sizeof(error), "%s has ended already: it is %s", name,
                     mf_state_name(s->state));
        answer_later(daemon, waiter, s, error, s && s->released ? 4 : 1);
        return;
    }
    wait_in(&s->cancel_waiters, waiter);
    if (s->starting) {
        /* Nothing was touched yet but the destination's userfaultfd, which goes again. */
        s->starting = false;
        s->state = MF_CANCELLED;
        session_set_reason(s, "cancelled before it began");
        session_end(s);
        tell_all(s, &s->start_waiters, s, "cancelled before it began", 1);
        session_tell_cancelled(s, NULL);
        session_changed(s);
        return;
    }
    session_event(s, MF_EV_CANCEL);
}

int session_forget(struct daemon *daemon, const char *name, struct mf_error *err)
{
    struct session *s = session_find(daemon, name);
    if (!s)
        return mf_fail(err, ENOENT, "there is no session named %s on this host", name);
    if (!session_ended(s))
        return mf_fail(err, EBUSY,
                       "%s has not ended: it is %s; only an ended session can be forgotten "
                       "(memferry cancel %s ends one that may be cancelled)",
                       name, mf_state_name(s->state), name);
    destroy(s);
    return 0;
}

unsigned sessions_stop(struct daemon *daemon)
{
    unsigned left = 0;
    struct session *next;
    for (struct session *s = *daemon_sessions(daemon); s; s = next) {
        next = s->next;
        if (s->rejected || session_ended(s))
            continue;
        if (s->starting)
            session_reject(s, "memferryd is stopping");
        else if (!mf_state_released(s->state) && s->state != MF_D_SWITCHOVER &&
                 s->state != MF_D_HELD) {
            session_set_reason(s, "memferryd was stopped");
            session_event(s, MF_EV_CANCEL);
        }
        left += !session_ended(s);
    }
    return left;
}

void sessions_drop(struct daemon *daemon)
{
    while (*daemon_sessions(daemon)) {
        struct session *s = *daemon_sessions(daemon);
        if (!session_ended(s))
            session_end(s);
        destroy(s);
    }
    while (answers) {
        struct answer *a = answers;
        answers = a->next;
        free(a);
    }
}

/* ---- what users see ---- */

void session_changed(struct session *session)
{
    if (!session->rejected)
        control_session_changed(daemon_control(session->daemon), session);
}

void session_set_reason(struct session *session, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(session->reason, sizeof(session->reason), fmt, ap);
    va_end(ap);
}

void session_read_figures(struct session *session)
{
    if (!session->view.file)
        return;
    const struct mf_figures *from = &session->view.file->figures;
    struct figures *to = &session->figures;
    struct mf_quantiles peers = to->faults;
    to->wire_bytes = atomic_load(&from->wire_bytes);
    to->data_pages = atomic_load(&from->data_pages);
    to->zero_pages = atomic_load(&from->zero_pages);
    to->hole_pages = atomic_load(&from->hole_pages);
    to->missing_pages = atomic_load(&from->missing_pages);
    to->faults_asked = atomic_load(&from->faults_asked);
    to->dirty_pages = atomic_load(&from->dirty_pages);
    to->round_left_pages = atomic_load(&from->round_left_pages);
    mf_histogram_read(&from->faults, &to->faults);
    if (session->role == MF_SOURCE) {
        /* The destination measures; its figures come with DRAINED. */
        to->faults = peers;
        if (!peers.count)
            to->faults.count = 0;
    }
}

static double us(uint64_t ns)
{
    return (double)ns / 1000.0;
}

void session_describe(struct session *session, Memferry__Control__Session *out,
                      Memferry__Control__Faults *faults)
{
    session_read_figures(session);
    const struct figures *f = &session->figures;
    memferry__control__session__init(out);
    memferry__control__faults__init(faults);
    out->name = session->name;
    out->id = session->id_text;
    out->role = (char *)(uintptr_t)(session->role == MF_SOURCE ? "source" : "destination");
    out->state = (char *)(uintptr_t)mf_state_name(session->state);
    out->reason = session->reason[0] ? session->reason : session->memory_note;
    out->ram_bytes = session->ram_bytes;
    out->blackout_us = session->blackout_us;
    if (session->started_ns)
        out->total_us =
            ((session->ended_ns ? session->ended_ns : mf_now_ns()) - session->started_ns) / 1000u;
    out->sent_bytes = f->wire_bytes;
    out->data_pages = f->data_pages;
    out->zero_pages = f->zero_pages;
    out->hole_pages = f->hole_pages;
    faults->count = f->faults.count;
    faults->p50_us = us(f->faults.p50_ns);
    faults->p99_us = us(f->faults.p99_ns);
    faults->p999_us = us(f->faults.p999_ns);
    faults->max_us = us(f->faults.max_ns);
    if (session->role == MF_SOURCE && !session_ended(session))
        faults->count = f->faults_asked; /* so far; the destination's figure comes at the end */
    out->faults = faults;
    out->mover_restarts = session->mover_restarts;
    /* The mover counts what its peer names as missing, as often as it does so. */
    const uint64_t missing_pages =
        f->missing_pages < session->total_pages ? f->missing_pages : session->total_pages;
    if (session->link && session->total_pages)
        out->confirmed_bytes =
            session->state == MF_DONE
                ? session->ram_bytes
                : (uint64_t)((double)session->ram_bytes *
                             (1.0 - (double)missing_pages / (double)session->total_pages));
    if (session->role == MF_SOURCE) {
        out->mode = (char *)(uintptr_t)mf_mode_name(session->rounds.mode);
        out->rounds = session->round_begun;
        out->precopy_bytes = session->released ? session->precopy_bytes : f->wire_bytes;
        out->postcopy_bytes = f->wire_bytes - out->precopy_bytes;
        out->dirty_pages_at_switch = f->dirty_pages;
        out->dirty_rate_pages_s = mf_rounds_dirty_rate(&session->rounds);
        out->unconfirmed_at_release = session->unconfirmed_at_release;
        if (session->total_pages)
            out->round_left_bytes =
                (uint64_t)((double)session->ram_bytes * (double)f->round_left_pages /
                           (double)session->total_pages);
        out->bandwidth_bits_s = session->bandwidth_bits_s;
    }
    out->released = session->released;
    out->guest_safe_at_source = !session->released;
    out->peer = session->peer;
    out->adapter = (char *)(uintptr_t)session->vmm_ops->name;
    out->pid = (uint32_t)session->pid;
}
