/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib/server.h"

#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <time.h>

#include "lib/uffd.h"
#include "lib/util.h"

#define PARKED_RETRY_NS UINT64_C(5000000)
#define WAKE_TAG UINT32_MAX

/* ---- errors ---- */

static _Thread_local char why[768];

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

/* ---- faults and events ---- */

static void count(_Atomic uint64_t *figure, uint64_t more)
{
    atomic_fetch_add_explicit(figure, more, memory_order_relaxed);
}

/* Ask the provider for a page of which FAULTED has just been set. */
static void ask(struct memferry_server *s, uint32_t region, uint64_t page)
{
    if (!s->provider.want)
        return; /* somebody fills it some time */
    const struct mf_region *r = &s->region[region];
    struct memferry_want want = {
        .struct_bytes = sizeof(want),
        .region = region,
        .page_bytes = r->page_bytes,
        .first_page = page,
        .pages = 1,
        .bytes = s->scratch,
    };
    if (s->options.around_pages > 1) {
        uint64_t end = page + s->options.around_pages;
        uint8_t state;
        want.pages = mf_page_run_of(&s->pages[region], MF_PAGE_STATE_MASK, page,
                                    end < r->pages ? end : r->pages, &state);
        if (want.pages * r->page_bytes > s->scratch_bytes)
            want.pages = 1;
    }
    const uint64_t offered = want.pages;
    count(&s->wanted, 1);
    int answer = s->provider.want(s->provider.arg, s, &want);
    if (answer == MEMFERRY_LATER)
        return;
    if (answer > MEMFERRY_LATER || want.pages == 0 || want.pages > offered)
        answer = -EPROTO;
    if (answer < 0)
        server_failed(s, region, page, 1, answer);
    else
        server_land(s, &s->lander, (enum memferry_answer)answer, region, page, want.pages,
                    want.bytes);
}

static void on_fault(void *argument, const struct mf_fault *fault, uint32_t region, uint64_t page)
{
    struct memferry_server *s = argument;
    count(&s->faults, 1);
    if (region == MF_REGION_ZEROS) {
        mf_resolve_zeros(&s->lander.resolver, fault->context, fault->addr);
        return;
    }
    uint8_t byte = mf_page_load(&s->pages[region], page);
    if (s->region[region].kind == MF_MEMORY_PRIVATE && mf_page_resolvable(byte) &&
        (byte & MF_PAGE_PLACED)) {
        /* It has the page: the fault is older than that. Zeros would be wrong, whatever happens. */
        mf_resolve_wake(&s->lander.resolver, region, page);
        return;
    }
    if (!mf_page_resolvable(byte)) {
        if (byte & MF_PAGE_FAULTED)
            return; /* it has been asked for; one ioctl will wake them all */
        byte = mf_page_fault(&s->pages[region], page);
        if (!mf_page_resolvable(byte)) {
            /* Who lands it at this moment resolves it too. */
            if (mf_page_state_of(byte) != MF_PAGE_LANDING)
                ask(s, region, page);
            return;
        }
    }
    mf_resolve_page(&s->lander.resolver, region, page);
}

static const struct mf_events_ops events_ops = {.fault = on_fault, .discard = server_discard};

static int read_context(struct memferry_server *s, uint32_t context)
{
    int r = mf_events_read(&s->events, context);
    if (r == -E2BIG)
        return server_fail(E2BIG, "a process maps its served memory in more than %u pieces",
                           MF_MAPPINGS_MAX);
    if (r < 0)
        return server_fail(-r, "reading a userfaultfd failed: %s", strerror(-r));
    return r;
}

/* An ioctl on the serving thread has met an unread event. */
static void on_event(void *argument)
{
    struct memferry_server *s = argument;
    const uint32_t contexts = atomic_load(&s->context_count);
    for (uint32_t i = 0; i < contexts; i++) {
        int r = read_context(s, i);
        if (r < 0)
            s->ended = r;
    }
}

/* ---- turns and jobs ---- */

static bool take_turn(struct memferry_server *s)
{
    if (pthread_mutex_trylock(&s->turn) != 0)
        return false;
    atomic_store(&s->who, pthread_self());
    atomic_store(&s->busy, true);
    return true;
}

static void give_turn(struct memferry_server *s)
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
        job->done = true;
    }
    s->jobs = NULL;
    atomic_store(&s->have_jobs, false);
    pthread_cond_broadcast(&s->jobs_done);
    pthread_mutex_unlock(&s->jobs_lock);
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
            return server_fail(EDEADLK, "mappings can't be changed from on_change");
        return run(s, arg);
    }
    struct server_job job = {.run = run, .arg = arg};
    pthread_mutex_lock(&s->jobs_lock);
    job.next = s->jobs;
    s->jobs = &job;
    atomic_store(&s->have_jobs, true);
    server_wake(s);
    while (!job.done) {
        if (take_turn(s)) { /* nobody serves: all that waits is done here */
            pthread_mutex_unlock(&s->jobs_lock);
            do_jobs(s);
            give_turn(s);
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
    return job.result;
}

/* ---- the loop ---- */

/* Make everybody who waits fault again: after a failure that may be over by now. */
static void wake_all(struct memferry_server *s)
{
    struct mf_mapping mappings[MF_MAPPINGS_MAX];
    unsigned n = mf_layout_get(&s->layout, mappings, MF_MAPPINGS_MAX);
    for (unsigned i = 0; i < n; i++)
        mf_uffd_wake(s->context_fd[mappings[i].context], mappings[i].start_addr,
                     mappings[i].length_bytes);
}

static int until_ms(uint64_t at_ns, uint64_t now_ns, int timeout_ms)
{
    uint64_t ms = at_ns > now_ns ? (at_ns - now_ns + 999999) / 1000000 : 0;
    return timeout_ms >= 0 && (uint64_t)timeout_ms < ms ? timeout_ms : (int)ms;
}

static int take_up(struct memferry_server *s, uint32_t context)
{
    int r = read_context(s, context);
    if (r >= 0)
        mf_events_serve(&s->events, r > 0);
    return r < 0 ? r : s->ended;
}

/* Look for more without sleeping. */
static int spin(struct memferry_server *s, uint64_t faults_before)
{
    const uint64_t spin_ns = s->options.spin_us * UINT64_C(1000);
    const uint32_t contexts = atomic_load(&s->context_count);
    uint64_t faults = atomic_load_explicit(&s->faults, memory_order_relaxed);
    if (faults == faults_before)
        return 0;
    for (uint64_t end_ns = mf_now_ns() + spin_ns, now_ns = 0; now_ns < end_ns;) {
        if (atomic_load(&s->have_jobs) || atomic_load(&s->stop))
            break;
        for (uint32_t i = 0; i < contexts; i++) {
            int r = take_up(s, i);
            if (r < 0)
                return r;
        }
        now_ns = mf_now_ns();
        uint64_t seen = atomic_load_explicit(&s->faults, memory_order_relaxed);
        if (seen != faults) {
            faults = seen;
            end_ns = now_ns + spin_ns;
        }
    }
    return 0;
}

/* With the turn. Return: 0 or -errno. */
static int serve_once(struct memferry_server *s, int timeout_ms)
{
    const uint64_t faults_before = atomic_load_explicit(&s->faults, memory_order_relaxed);
    const uint64_t again_at_ns = atomic_load(&s->again_at_ns);
    const bool parked = mf_events_parked(&s->events);
    if (parked || again_at_ns) {
        const uint64_t now_ns = mf_now_ns();
        if (parked)
            timeout_ms = until_ms(now_ns + PARKED_RETRY_NS, now_ns, timeout_ms);
        if (again_at_ns)
            timeout_ms = until_ms(again_at_ns, now_ns, timeout_ms);
    }
    struct epoll_event ready[8];
    int n = epoll_wait(s->epoll_fd, ready, sizeof(ready) / sizeof(ready[0]), timeout_ms);
    if (n < 0 && errno != EINTR)
        return server_fail(errno, "waiting for faults failed: %s", strerror(errno));
    int r = 0;
    for (int i = 0; i < n && r >= 0; i++) {
        if (ready[i].data.u32 == WAKE_TAG) {
            uint64_t woken;
            ssize_t got = read(s->wake_fd, &woken, sizeof(woken));
            (void)got;
            do_jobs(s);
        } else {
            r = take_up(s, ready[i].data.u32);
        }
    }
    if (again_at_ns && mf_now_ns() >= again_at_ns) {
        uint64_t expected = again_at_ns;
        atomic_compare_exchange_strong(&s->again_at_ns, &expected, 0);
        wake_all(s);
    }
    if (r >= 0 && n == 0 && parked)
        mf_events_give_up_parked(&s->events);
    if (r >= 0 && s->options.spin_us)
        r = spin(s, faults_before);
    return r < 0 ? r : s->ended;
}

int memferry_server_run(struct memferry_server *s, int timeout_ms)
{
    if (server_serves_here(s) || !take_turn(s))
        return server_fail(EALREADY, "another thread serves, or this one in a callback");
    const uint64_t before = atomic_load_explicit(&s->faults, memory_order_relaxed);
    do_jobs(s);
    int r = serve_once(s, timeout_ms);
    const uint64_t faults = atomic_load_explicit(&s->faults, memory_order_relaxed) - before;
    give_turn(s);
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
    atomic_store(&s->who, pthread_self());
    atomic_store(&s->busy, true);
    int r = 0;
    while (r >= 0 && !atomic_load_explicit(&s->stop, memory_order_relaxed))
        r = serve_once(s, -1);
    s->ended = r < 0 ? r : 0;
    do_jobs(s);
    give_turn(s);
    return NULL;
}

int memferry_server_start(struct memferry_server *s)
{
    sigset_t all, before;
    pthread_mutex_lock(&s->jobs_lock);
    int r = s->started ? EALREADY : 0;
    if (r == 0) {
        atomic_store(&s->stop, false);
        s->ended = 0;
        sigfillset(&all);
        pthread_sigmask(SIG_BLOCK, &all, &before);
        r = pthread_create(&s->thread, NULL, serve_main, s);
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        s->started = r == 0;
    }
    pthread_mutex_unlock(&s->jobs_lock);
    if (r == EALREADY)
        return server_fail(r, "the server has a thread already");
    return r == 0 ? 0 : server_fail(r, "cannot start a thread that serves: %s", strerror(r));
}

int memferry_server_stop(struct memferry_server *s)
{
    if (!s->started)
        return 0;
    if (pthread_equal(s->thread, pthread_self()))
        return server_fail(EDEADLK, "the serving thread can't wait for its own end");
    atomic_store(&s->stop, true);
    server_wake(s);
    pthread_join(s->thread, NULL);
    pthread_mutex_lock(&s->jobs_lock);
    s->started = false;
    int r = s->ended;
    s->ended = 0;
    pthread_mutex_unlock(&s->jobs_lock);
    return r < 0 ? server_fail(-r, "serving had ended: %s", strerror(-r)) : 0;
}

/* ---- from beginning to end ---- */

int memferry_server_new(const struct memferry_server_options *options,
                        struct memferry_server **server)
{
    struct memferry_server *s = calloc(1, sizeof(*s));
    if (!s)
        return server_fail(ENOMEM, "out of memory for a server");
    if (options)
        memcpy(&s->options, options,
               options->struct_bytes < sizeof(*options) ? options->struct_bytes : sizeof(*options));
    s->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    s->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    struct epoll_event event = {.events = EPOLLIN, .data.u32 = WAKE_TAG};
    if (s->epoll_fd < 0 || s->wake_fd < 0 ||
        epoll_ctl(s->epoll_fd, EPOLL_CTL_ADD, s->wake_fd, &event) != 0) {
        int r = server_fail(errno, "cannot make a descriptor for a server: %s", strerror(errno));
        mf_close_p(&s->epoll_fd);
        mf_close_p(&s->wake_fd);
        free(s);
        return r;
    }
    pthread_mutex_init(&s->turn, NULL);
    pthread_mutex_init(&s->jobs_lock, NULL);
    pthread_cond_init(&s->jobs_done, NULL);
    s->lander = server_lander(s, on_event, s);
    s->lander.by_mapping = true;
    s->events.ops = &events_ops;
    s->events.arg = s;
    s->events.layout = &s->layout;
    s->events.region = s->region;
    s->events.context_fd = s->context_fd;
    s->events.gate = &s->gate;
    *server = s;
    return 0;
}

int memferry_server_set_provider(struct memferry_server *s,
                                 const struct memferry_provider *provider)
{
    if (s->provider.want || s->started)
        return server_fail(EALREADY, "the server has a provider, or serves already");
    memset(&s->provider, 0, sizeof(s->provider));
    memcpy(&s->provider, provider,
           provider->struct_bytes < sizeof(*provider) ? provider->struct_bytes : sizeof(*provider));
    if (!s->provider.want)
        return server_fail(EINVAL, "a provider needs a function `want'");
    return 0;
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

int memferry_server_free(struct memferry_server *s, int end)
{
    if (!s)
        return 0;
    server_do(s, nothing, NULL); /* what is being served is counted when it is through */
    const uint64_t missing = memferry_missing_pages(s);
    if (missing && end == MEMFERRY_END_COMPLETE)
        return server_fail(EBUSY, "%llu pages are missing: fill them, or say what becomes of them",
                           (unsigned long long)missing);
    memferry_server_stop(s);
    if (!missing || end != MEMFERRY_END_LEAVE) {
        struct mf_mapping mappings[MF_MAPPINGS_MAX];
        unsigned n = mf_layout_get(&s->layout, mappings, MF_MAPPINGS_MAX);
        for (unsigned i = 0; i < n; i++)
            mf_uffd_unregister(s->context_fd[mappings[i].context], mappings[i].start_addr,
                               mappings[i].length_bytes);
    }
    if (s->provider.close)
        s->provider.close(s->provider.arg);
    const uint32_t contexts = atomic_load(&s->context_count);
    for (uint32_t i = 0; i < contexts; i++)
        mf_close_p(&s->context_fd[i]);
    const uint32_t regions = atomic_load(&s->region_count);
    for (uint32_t i = 0; i < regions; i++) {
        munmap((void *)s->pages[i].state, s->state_bytes[i]);
        if (s->region[i].map)
            munmap(s->region[i].map, s->region[i].size_bytes);
        mf_close_p(&s->region[i].fd);
    }
    if (s->scratch)
        munmap(s->scratch, s->scratch_bytes);
    close(s->epoll_fd);
    close(s->wake_fd);
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
