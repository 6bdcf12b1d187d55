/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib/server.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "lib/uffd.h"

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
        struct mf_range range;
        uint32_t cursor = 0;
        /* What of private memory nobody maps would get lost. */
        if (r->kind == MF_MEMORY_PRIVATE &&
            mf_layout_next(&s->layout, region, page * r->page_bytes,
                           s->options.around_pages * (uint64_t)r->page_bytes, &cursor, &range))
            end = range.offset_bytes > page * r->page_bytes
                      ? page + 1
                      : page + range.length_bytes / r->page_bytes;
        want.pages = mf_page_run_of(&s->pages[region], MF_PAGE_STATE_MASK, page,
                                    end < r->pages ? end : r->pages, &state);
        if (want.pages * r->page_bytes > s->scratch_bytes)
            want.pages = 1;
    }
    const uint64_t offered = want.pages;
    count(&s->wanted, 1);
    s->asking = true;
    int answer = s->provider.want(s->provider.arg, s, &want);
    s->asking = false;
    if (answer == MEMFERRY_LATER)
        return;
    if (answer >= 0 && (answer > MEMFERRY_LATER || want.pages == 0 || want.pages > offered))
        answer = -EPROTO;
    if (answer < 0)
        server_failed(s, &s->lander, region, page, 1, answer);
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

/* Nothing more is read or filled there (lib/context.h). @context: there is one. */
static void hold(struct memferry_server *s, uint32_t context)
{
    struct mf_context *at = mf_context_at(&s->contexts, context);
    if (at->held)
        return;
    mf_gate_close(&s->gate);
    at->held = true;
    mf_gate_open(&s->gate);
    s->held_contexts++;
    server_watch(s, context, false);
}

static void unhold(struct memferry_server *s, uint32_t context)
{
    struct mf_context *at = mf_context_at(&s->contexts, context);
    if (!at->held || server_watch(s, context, true) < 0)
        return;
    mf_gate_close(&s->gate);
    at->held = false;
    mf_gate_open(&s->gate);
    s->held_contexts--;
    mf_uffd_wake_all(at->uffd);
}

/* Return: 1 if there was an event, 0, or -errno. */
int server_read(struct memferry_server *s, uint32_t context)
{
    int r = mf_events_read(&s->events, context);
    if (r == -EMFILE || r == -ENFILE || r == -ENOMEM) {
        /* The fork's event stays where it is: once a child has ended or a descriptor was closed it
         * is tried again. */
        hold(s, context);
        return 0;
    }
    if (r < 0)
        return server_fail(-r, "reading a userfaultfd failed: %s", strerror(-r));
    if (mf_context_at(&s->contexts, context))
        unhold(s, context);
    return r;
}

/* The event may be another context's: fork(2) and munmap(2) across two of them hold up the fills of
 * both from the beginning, but send the second's event only when the first's was read. */
void server_read_any(struct memferry_server *s, uint32_t context)
{
    int r = server_read(s, context);
    for (uint32_t i = 0; r == 0 && i < s->contexts.count; i++)
        r = i == context ? 0 : server_read(s, i);
    if (r < 0)
        s->ended = r;
}

static void on_event(void *argument, uint32_t context)
{
    server_read_any(argument, context);
}

/* ---- contexts that come and go ---- */

int server_watch(struct memferry_server *s, uint32_t context, bool watch)
{
    struct epoll_event event = {.events = EPOLLIN, .data.u32 = context};
    return epoll_ctl(s->epoll_fd, watch ? EPOLL_CTL_ADD : EPOLL_CTL_DEL,
                     mf_context_uffd(&s->contexts, context), &event) == 0
               ? 0
               : -errno;
}

static void on_fork(void *argument, uint32_t parent, uint32_t context)
{
    struct memferry_server *s = argument;
    (void)parent;
    if (server_watch(s, context, true) == 0)
        return;
    mf_context_at(&s->contexts, context)->held = true; /* it waits until it can be watched */
    s->held_contexts++;
}

/* Of a thread that waits for a page, so its process is alive. */
static int on_maps(void *argument, uint32_t context, pid_t tid, uint64_t addr)
{
    struct memferry_server *s = argument;
    (void)addr;
    char path[48];
    snprintf(path, sizeof(path), "/proc/%d/maps", tid);
    int fd = tid > 0 ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    struct mf_context *of = mf_context_at(&s->contexts, context);
    if (fd >= 0 && !of->pid)
        of->pid = tid; /* as good as its process's number: /proc/TID shows all threads of that */
    return fd >= 0 ? fd : -ENOENT;
}

static void let_go(struct memferry_server *s, uint32_t context)
{
    const struct mf_context *of = mf_context_at(&s->contexts, context);
    server_exited(s, context);
    if (of->held)
        s->held_contexts--;
    else
        server_watch(s, context, false);
    s->own_contexts -= !of->child;
    server_forget_twin(s, context);
    mf_events_drop(&s->events, context);
}

/* Nothing tells of an exit. */
void server_look_around(struct memferry_server *s)
{
    for (uint32_t i = 0; i < s->contexts.count; i++) {
        const struct mf_context *context = mf_context_at(&s->contexts, i);
        if (context && !mf_uffd_alive(context->uffd))
            let_go(s, i);
    }
    for (uint32_t i = 0; s->held_contexts > 0 && i < s->contexts.count; i++) {
        const struct mf_context *context = mf_context_at(&s->contexts, i);
        int r = context && context->held ? server_read(s, i) : 0;
        if (r < 0)
            s->ended = r;
    }
    mf_events_serve(&s->events, true);
}

void server_each_mapping(struct memferry_server *s,
                         void (*each)(struct memferry_server *server, int uffd,
                                      const struct mf_mapping *mapping))
{
    for (uint32_t i = 0; i < s->contexts.count; i++) {
        struct mf_mapping m;
        const struct mf_context *context = mf_context_at(&s->contexts, i);
        for (uint64_t at = 0; context && mf_layout_from(&s->layout, i, at, &m);
             at = m.start_addr + m.length_bytes)
            each(s, context->uffd, &m);
    }
}

void server_begin_events(struct memferry_server *s)
{
    s->lander = server_lander(s);
    s->lander.resolver.on_event = on_event;
    s->lander.resolver.arg = s;
    s->lander.by_mapping = true;
    s->events_ops = (struct mf_events_ops){.fault = on_fault,
                                           .discard = server_discard,
                                           .changed = server_changed,
                                           .forked = on_fork,
                                           .maps = on_maps};
    if (s->options.on_change)
        s->events_ops.observe = server_observe;
    s->events.ops = &s->events_ops;
    s->events.arg = s;
    s->events.layout = &s->layout;
    s->events.region = s->region;
    s->events.contexts = &s->contexts;
    s->events.gate = &s->gate;
    s->events.at_once = true;
}
