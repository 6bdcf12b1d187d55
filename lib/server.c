/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib/server.h"

#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/timerfd.h>
#include <time.h>

#include "lib/uffd.h"
#include "lib/util.h"
#include "lib/vma.h"

#define PARKED_RETRY_NS UINT64_C(5000000)
#define LOOK_NS UINT64_C(100000000)    /**< how often it is looked whose process has ended */
#define STRUCT_BYTES_MAX 4096u         /**< no version has or will have a larger one */
#define LINGER_NS UINT64_C(2000000000) /**< what is on its way takes microseconds, as a rule */
#define WAKE_TAG UINT32_MAX
#define TIMER_TAG (UINT32_MAX - 1)

/* ---- errors ---- */

static _Thread_local char why[sizeof(((struct server_job *)0)->why)];

const char *memferry_why(void)
{
    return why;
}

const char *memferry_version(void)
{
    return MF_VERSION;
}

int server_fail(int code, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(why, sizeof(why), fmt, ap);
    va_end(ap);
    return -code;
}

int server_pass(const struct mf_error *err)
{
    return server_fail(err->code, "%s", err->text);
}

/* ---- structs and flags ---- */

int server_take(void *to, size_t size, const void *from, const char *what)
{
    size_t given;
    memcpy(&given, from, sizeof(given));
    if (given <= sizeof(given))
        return server_fail(EINVAL, "a %s has no struct_bytes", what);
    for (size_t i = size; i < given; i++)
        if (i >= STRUCT_BYTES_MAX || ((const char *)from)[i])
            return server_fail(E2BIG, "a %s has something that this version (%s) does not know",
                               what, MF_VERSION);
    memcpy(to, from, given < size ? given : size);
    return 0;
}

int server_check_flags(uint32_t flags, uint32_t known, const char *what)
{
    return flags & ~known
               ? server_fail(EINVAL, "a %s has flags (%#x) that this version (%s) does not know",
                             what, flags & ~known, MF_VERSION)
               : 0;
}

/* ---- turns and jobs ---- */

static void have_turn(struct memferry_server *s)
{
    atomic_store(&s->who, pthread_self());
    atomic_store(&s->busy, true);
}

bool server_try_turn(struct memferry_server *s)
{
    if (pthread_mutex_trylock(&s->turn) != 0)
        return false;
    have_turn(s);
    return true;
}

void server_give_turn(struct memferry_server *s)
{
    atomic_store(&s->busy, false);
    pthread_mutex_unlock(&s->turn);
}

bool server_serves_here(const struct memferry_server *s)
{
    return atomic_load(&s->busy) && pthread_equal(atomic_load(&s->who), pthread_self());
}

static void do_jobs(struct memferry_server *s)
{
    if (!atomic_load(&s->have_jobs))
        return;
    pthread_mutex_lock(&s->jobs_lock);
    for (struct server_job *job = s->jobs; job; job = job->next) {
        job->result = job->run(s, job->arg);
        if (job->result < 0)
            snprintf(job->why, sizeof(job->why), "%s", why);
        job->done = true;
    }
    s->jobs = NULL;
    atomic_store(&s->have_jobs, false);
    pthread_cond_broadcast(&s->jobs_done);
    pthread_mutex_unlock(&s->jobs_lock);
    mf_events_serve(&s->events, true); /* what a job has read */
}

void server_wake(struct memferry_server *s)
{
    const uint64_t one = 1;
    ssize_t n = write(s->wake_fd, &one, sizeof(one));
    (void)n; /* full: then it is awake */
}

int server_do(struct memferry_server *s, int (*run)(struct memferry_server *server, void *arg),
              void *arg)
{
    if (server_serves_here(s)) {
        if (s->applying)
            return server_fail(EDEADLK, "nothing can be changed while a change is being told");
        return run(s, arg);
    }
    struct server_job job = {.run = run, .arg = arg};
    pthread_mutex_lock(&s->jobs_lock);
    job.next = s->jobs;
    // cppcheck-suppress autoVariables ; this does not return before it was taken off the list
    s->jobs = &job;
    atomic_store(&s->have_jobs, true);
    server_wake(s);
    while (!job.done) {
        if (server_try_turn(s)) { /* nobody serves: all that waits is done here */
            pthread_mutex_unlock(&s->jobs_lock);
            do_jobs(s);
            server_give_turn(s);
            pthread_mutex_lock(&s->jobs_lock);
            continue;
        }
        struct timespec limit;
        clock_gettime(CLOCK_REALTIME, &limit);
        limit.tv_nsec += 2000000;
        if (limit.tv_nsec >= 1000000000) {
            limit.tv_sec++;
            limit.tv_nsec -= 1000000000;
        }
        /* The one who serves may end without having looked: look again soon. */
        pthread_cond_timedwait(&s->jobs_done, &s->jobs_lock, &limit);
    }
    pthread_mutex_unlock(&s->jobs_lock);
    return job.result < 0 ? server_fail(-job.result, "%s", job.why) : job.result;
}

/* ---- the loop ---- */

/* Make who waits fault again: after a failure that may be over by now. */
static void wake_mapping(struct memferry_server *s, int uffd, const struct mf_mapping *mapping)
{
    (void)s;
    mf_uffd_wake(uffd, mapping->start_addr, mapping->length_bytes);
}

static uint64_t earlier(uint64_t a_ns, uint64_t b_ns) /* 0: never */
{
    return !b_ns || (a_ns && a_ns < b_ns) ? a_ns : b_ns;
}

static void set_alarm(uint64_t *alarm_ns, bool wanted, uint64_t after_ns)
{
    if (!wanted)
        *alarm_ns = 0;
    else if (*alarm_ns == 0)
        *alarm_ns = mf_now_ns() + after_ns;
}

/* So that somebody who waits for the epoll set alone comes in time. */
static void set_timer(struct memferry_server *s)
{
    set_alarm(&s->parked_at_ns, mf_events_parked(&s->events), PARKED_RETRY_NS);
    set_alarm(&s->look_at_ns, s->contexts.used > s->opened || s->held_contexts, LOOK_NS);
    const uint64_t at_ns =
        earlier(earlier(s->parked_at_ns, s->look_at_ns), atomic_load(&s->again_at_ns));
    if (at_ns == s->timer_ns)
        return;
    s->timer_ns = at_ns;
    timerfd_settime(s->timer_fd, TFD_TIMER_ABSTIME,
                    &(struct itimerspec){.it_value = {.tv_sec = (time_t)(at_ns / 1000000000),
                                                      .tv_nsec = (long)(at_ns % 1000000000)}},
                    NULL);
}

static int take_up(struct memferry_server *s, uint32_t context)
{
    int r = server_read(s, context);
    if (r >= 0)
        mf_events_serve(&s->events, r > 0);
    return r < 0 ? r : s->ended;
}

/* Where several threads fault, the next one is there by the time the last was served: reading once
 * more costs less than asking epoll_wait(2). Not for ever, for others may want something too. */
#define AT_ONCE 16u
static int take_up_ready(struct memferry_server *s, uint32_t context)
{
    for (unsigned i = 0; i < AT_ONCE; i++) {
        const uint64_t before = atomic_load_explicit(&s->faults, memory_order_relaxed);
        int r = take_up(s, context);
        if (r < 0)
            return r;
        if (atomic_load_explicit(&s->faults, memory_order_relaxed) == before)
            break;
    }
    return 0;
}

/* Look for more without sleeping. */
static int spin(struct memferry_server *s, uint64_t faults_before)
{
    const uint64_t spin_ns = s->options.spin_us * UINT64_C(1000);
    uint64_t faults = atomic_load_explicit(&s->faults, memory_order_relaxed);
    if (faults == faults_before)
        return 0;
    for (uint64_t end_ns = mf_now_ns() + spin_ns, now_ns = 0; now_ns < end_ns;) {
        if (atomic_load(&s->have_jobs) || atomic_load(&s->stop))
            break;
        for (uint32_t i = 0; i < s->contexts.count; i++) {
            int r = take_up(s, i);
            if (r < 0)
                return r;
        }
        now_ns = mf_now_ns();
        set_timer(s);
        if (s->timer_ns && now_ns >= s->timer_ns) /* what has its time comes first */
            break;
        uint64_t seen = atomic_load_explicit(&s->faults, memory_order_relaxed);
        if (seen != faults) {
            faults = seen;
            end_ns = now_ns + spin_ns;
        }
    }
    return 0;
}

/* What is to be done at its time, however much else there is. */
static void look_at_clock(struct memferry_server *s)
{
    const uint64_t again_at_ns = atomic_load(&s->again_at_ns);
    if (!s->parked_at_ns && !s->look_at_ns && !again_at_ns)
        return;
    const uint64_t now_ns = mf_now_ns();
    if (again_at_ns && now_ns >= again_at_ns) {
        uint64_t expected = again_at_ns;
        atomic_compare_exchange_strong(&s->again_at_ns, &expected, 0);
        server_each_mapping(s, wake_mapping);
    }
    if (s->look_at_ns && now_ns >= s->look_at_ns) {
        s->look_at_ns = 0;
        server_look_around(s);
    }
    if (s->parked_at_ns && now_ns >= s->parked_at_ns) {
        s->parked_at_ns = 0;
        mf_events_give_up_parked(&s->events);
    }
}

static void clear(int fd)
{
    uint64_t times;
    ssize_t n = read(fd, &times, sizeof(times));
    (void)n;
}

/* With the turn. Return: 0 or -errno. */
static int serve_once(struct memferry_server *s, int timeout_ms)
{
    const uint64_t faults_before = atomic_load_explicit(&s->faults, memory_order_relaxed);
    if (s->events.fault_count > 0) /* read by one who filled, or who gave himself a job */
        mf_events_serve(&s->events, true);
    set_timer(s);
    struct epoll_event ready[8];
    int n = epoll_wait(s->epoll_fd, ready, sizeof(ready) / sizeof(ready[0]), timeout_ms);
    if (n < 0 && errno != EINTR)
        return server_fail(errno, "waiting for faults failed: %s", strerror(errno));
    int r = 0;
    for (int i = 0; i < n && r >= 0; i++) {
        if (ready[i].data.u32 == WAKE_TAG) {
            clear(s->wake_fd);
            do_jobs(s);
        } else if (ready[i].data.u32 == TIMER_TAG) {
            clear(s->timer_fd);
            s->timer_ns = 0;
        } else {
            r = take_up_ready(s, ready[i].data.u32);
        }
    }
    if (r >= 0 && s->options.spin_us)
        r = spin(s, faults_before);
    if (r >= 0)
        look_at_clock(s);
    set_timer(s);
    return r < 0 ? r : s->ended;
}

int memferry_server_run(struct memferry_server *s, int timeout_ms)
{
    if (server_serves_here(s) || atomic_exchange(&s->serving, true))
        return server_fail(EALREADY, "another thread serves, or this one in a callback");
    pthread_mutex_lock(&s->turn); /* a job, or a filler that reads an event: not for long */
    have_turn(s);
    const uint64_t before = atomic_load_explicit(&s->faults, memory_order_relaxed);
    do_jobs(s);
    int r = serve_once(s, timeout_ms);
    const uint64_t faults = atomic_load_explicit(&s->faults, memory_order_relaxed) - before;
    server_give_turn(s);
    atomic_store(&s->serving, false);
    return r < 0 ? r : faults > INT32_MAX ? INT32_MAX : (int)faults;
}

int memferry_server_fd(const struct memferry_server *s)
{
    return s->epoll_fd;
}

static void *serve_main(void *argument)
{
    struct memferry_server *s = argument;
    prctl(PR_SET_NAME, "memferry-faults");
    pthread_mutex_lock(&s->turn);
    have_turn(s);
    int r = 0;
    while (r >= 0 && !atomic_load_explicit(&s->stop, memory_order_relaxed))
        r = serve_once(s, -1);
    s->ended = r < 0 ? r : 0;
    do_jobs(s);
    server_give_turn(s);
    atomic_store(&s->serving, false);
    return NULL;
}

int memferry_server_start(struct memferry_server *s)
{
    sigset_t all, before;
    pthread_mutex_lock(&s->jobs_lock);
    int r = s->started || atomic_exchange(&s->serving, true) ? EALREADY : 0;
    if (r == 0) {
        atomic_store(&s->stop, false);
        s->ended = 0;
        sigfillset(&all);
        pthread_sigmask(SIG_BLOCK, &all, &before);
        r = pthread_create(&s->thread, NULL, serve_main, s);
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        s->started = r == 0;
        if (r != 0)
            atomic_store(&s->serving, false);
    }
    pthread_mutex_unlock(&s->jobs_lock);
    if (r == EALREADY)
        return server_fail(r, "the server has a thread already, or another thread serves");
    return r == 0 ? 0 : server_fail(r, "cannot start a thread that serves: %s", strerror(r));
}

int memferry_server_stop(struct memferry_server *s)
{
    if (server_serves_here(s))
        return server_fail(EDEADLK, "the serving thread can't wait for its own end");
    pthread_mutex_lock(&s->stop_lock);
    int r = 0;
    if (s->started) {
        atomic_store(&s->stop, true);
        server_wake(s);
        pthread_join(s->thread, NULL);
        pthread_mutex_lock(&s->jobs_lock);
        s->started = false;
        r = s->ended;
        s->ended = 0;
        pthread_mutex_unlock(&s->jobs_lock);
    }
    pthread_mutex_unlock(&s->stop_lock);
    return r < 0 ? server_fail(-r, "serving had ended: %s", strerror(-r)) : 0;
}

/* ---- from beginning to end ---- */

static int wait_for(struct memferry_server *s, int fd, uint32_t tag)
{
    struct epoll_event event = {.events = EPOLLIN, .data.u32 = tag};
    return epoll_ctl(s->epoll_fd, EPOLL_CTL_ADD, fd, &event) == 0 ? 0 : -errno;
}

static void close_own(const struct memferry_server *s)
{
    mf_close_p(&s->epoll_fd);
    mf_close_p(&s->wake_fd);
    mf_close_p(&s->timer_fd);
}

int memferry_server_new(const struct memferry_server_options *options,
                        struct memferry_server **server)
{
    struct memferry_server_options all = {0};
    int r = options ? server_take(&all, sizeof(all), options, "struct memferry_server_options") : 0;
    if (r == 0)
        r = server_check_flags(
            all.flags, MEMFERRY_FOLLOW_FORKS | MEMFERRY_REMOVE_DISCARDS | MEMFERRY_USER_FAULTS,
            "server");
    if (r < 0)
        return r;
    struct memferry_server *s = calloc(1, sizeof(*s));
    if (!s)
        return server_fail(ENOMEM, "out of memory for a server");
    s->options = all;
    s->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    s->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    s->timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    r = s->epoll_fd < 0 || s->wake_fd < 0 || s->timer_fd < 0 ? -errno : 0;
    if (r == 0)
        r = wait_for(s, s->wake_fd, WAKE_TAG);
    if (r == 0)
        r = wait_for(s, s->timer_fd, TIMER_TAG);
    if (r == 0)
        r = mf_gate_init(&s->gate);
    if (r < 0) {
        close_own(s);
        free(s);
        return server_fail(-r, "cannot make a server's descriptors and locks: %s", strerror(-r));
    }
    pthread_mutex_init(&s->stop_lock, NULL);
    pthread_mutex_init(&s->turn, NULL);
    pthread_mutex_init(&s->jobs_lock, NULL);
    pthread_cond_init(&s->jobs_done, NULL);
    server_begin_events(s);
    *server = s;
    return 0;
}

int memferry_server_set_provider(struct memferry_server *s,
                                 const struct memferry_provider *provider)
{
    if (s->provider.want || s->started)
        return server_fail(EALREADY, "the server has a provider, or serves already");
    struct memferry_provider all = {0};
    int r = server_take(&all, sizeof(all), provider, "struct memferry_provider");
    if (r < 0)
        return r;
    if (!all.want)
        return server_fail(EINVAL, "a provider needs a function `want'");
    s->provider = all;
    return 0;
}

int server_check_out(const struct memferry_provider *out)
{
    return out->struct_bytes < offsetof(struct memferry_provider, close) + sizeof(out->close)
               ? server_fail(EINVAL, "there is no room for a provider: struct_bytes is not set")
               : 0;
}

int server_give_provider(const struct memferry_provider *provider, struct memferry_provider *out)
{
    struct memferry_provider all = *provider;
    const size_t room = out->struct_bytes < sizeof(all) ? out->struct_bytes : sizeof(all);
    all.struct_bytes = room;
    memcpy(out, &all, room);
    return 0;
}

static int nothing(struct memferry_server *s, void *arg)
{
    (void)s;
    (void)arg;
    return 0;
}

static void unregister(struct memferry_server *s, int uffd, const struct mf_mapping *mapping)
{
    (void)s;
    mf_uffd_unregister(uffd, mapping->start_addr, mapping->length_bytes);
}

static bool shows_a_region(const struct memferry_server *s, const struct mf_vma *vma)
{
    const uint32_t regions = atomic_load(&s->region_count);
    for (uint32_t i = 0; i < regions && vma->shared; i++)
        if (s->region[i].kind != MF_MEMORY_PRIVATE && vma->inode == s->region[i].inode &&
            vma->device == s->region[i].device)
            return true;
    return false;
}

/* A mapping belongs to one userfaultfd as a whole. Not every kernel refuses to unregister another
 * one's (doc/kernel.md); but none registers it. */
static bool is_ours(const struct memferry_server *s, uint32_t context, const struct mf_vma *vma)
{
    struct mf_mapping known;
    struct mf_error err;
    if (mf_layout_from(&s->layout, context, vma->start_addr, &known) &&
        known.start_addr < vma->end_addr)
        return true;
    return shows_a_region(s, vma) &&
           mf_uffd_register(mf_context_uffd(&s->contexts, context), vma->start_addr,
                            vma->end_addr - vma->start_addr, &err) == 0;
}

/* What nobody has touched since it was moved or has grown is watched too, though not known. Who
 * holds the userfaultfd open would leave its readers waiting. */
static void unregister_all(struct memferry_server *s)
{
    for (uint32_t i = 0; i < s->contexts.count; i++) {
        const struct mf_context *context = mf_context_at(&s->contexts, i);
        struct mf_vma vma;
        for (uint64_t at = 0;
             context && context->maps_fd >= 0 && mf_vma_find(context->maps_fd, at, &vma) == 0;
             at = vma.end_addr)
            if (is_ours(s, i, &vma))
                mf_uffd_unregister(context->uffd, vma.start_addr, vma.end_addr - vma.start_addr);
    }
    server_each_mapping(s, unregister); /* of those whose maps can't be had */
}

/* Nothing is mapped any more, so nobody who fills meets anything that he would have to wait for. */
static void forget_mappings(struct memferry_server *s)
{
    mf_gate_close(&s->gate);
    for (uint32_t i = 0; i < s->contexts.count; i++) {
        mf_layout_forget(&s->layout, i);
        mf_limbo_forget(&s->events.limbo, &s->layout, i);
    }
    mf_gate_open(&s->gate);
}

/* Return: is an event on its way still? */
static bool drain_one(int uffd)
{
    struct uffd_msg message;
    while (read(uffd, &message, sizeof(message)) == (ssize_t)sizeof(message))
        if (message.event == UFFD_EVENT_FORK) /* nothing is to come: the child needs none */
            close((int)message.arg.fork.ufd);
    return mf_uffd_event_pending(uffd) > 0;
}

/* Who has changed the layout waits until that is read, and would for ever if the userfaultfd stays
 * open elsewhere: in its process, or in a child that is being made. */
static void drain(struct memferry_server *s)
{
    const uint64_t end_ns = mf_now_ns() + LINGER_NS;
    for (bool more = true; more && mf_now_ns() < end_ns;) {
        more = false;
        for (uint32_t i = 0; i < s->contexts.count; i++) {
            const struct mf_context *context = mf_context_at(&s->contexts, i);
            more |= context && drain_one(context->uffd);
        }
        if (more)
            nanosleep(&(struct timespec){.tv_nsec = 50000}, NULL);
    }
}

/* With the turn, as some may fill still. */
static void end_watching(struct memferry_server *s)
{
    for (uint32_t i = 0; i < s->contexts.count; i++)
        server_read(s, i); /* so that what is known is true */
    unregister_all(s);
    forget_mappings(s);
    drain(s);
    s->closing = true;
}

int memferry_server_free(struct memferry_server *s, int end)
{
    if (!s)
        return 0;
    if (server_serves_here(s))
        return server_fail(EDEADLK, "a server can't be freed from one of its callbacks");
    server_do(s, nothing, NULL); /* what is being served is counted when it is through */
    const uint64_t missing = memferry_missing_pages(s);
    if (missing && end == MEMFERRY_END_COMPLETE)
        return server_fail(EBUSY, "%llu pages are missing: fill them, or say what becomes of them",
                           (unsigned long long)missing);
    memferry_server_stop(s);
    const bool leave = missing && end == MEMFERRY_END_LEAVE;
    if (!leave) {
        pthread_mutex_lock(&s->turn);
        have_turn(s);
        end_watching(s);
        server_give_turn(s);
    }
    if (s->provider.close)
        s->provider.close(s->provider.arg);
    const uint32_t regions = atomic_load(&s->region_count);
    for (uint32_t i = 0; i < regions; i++) {
        munmap((void *)s->pages[i].state, s->state_bytes[i]);
        if (s->region[i].map)
            munmap(s->region[i].map, s->region[i].size_bytes);
        mf_close_p(&s->region[i].fd);
    }
    if (s->scratch)
        munmap(s->scratch, s->scratch_bytes);
    close_own(s);
    if (!leave)
        drain(s); /* again, now that descriptors are free */
    mf_contexts_free(&s->contexts);
    mf_gate_destroy(&s->gate);
    pthread_mutex_destroy(&s->stop_lock);
    pthread_cond_destroy(&s->jobs_done);
    pthread_mutex_destroy(&s->jobs_lock);
    pthread_mutex_destroy(&s->turn);
    free(s);
    return 0;
}

void memferry_figures(const struct memferry_server *s, struct memferry_figures *out)
{
    struct memferry_figures all = {
        .struct_bytes = sizeof(all),
        .faults = atomic_load(&s->faults),
        .wanted = atomic_load(&s->wanted),
        .data_pages = atomic_load(&s->data_pages),
        .zero_pages = atomic_load(&s->zero_pages),
        .present_pages = atomic_load(&s->present_pages),
        .discarded_pages = atomic_load(&s->discarded_pages),
        .events = atomic_load(&s->events_seen),
    };
    size_t room = out->struct_bytes < sizeof(all) ? out->struct_bytes : sizeof(all);
    all.struct_bytes = room;
    memcpy(out, &all, room);
}
