/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The server of a round: a provider that answers a part at once and a part later, threads that fill
 * pages which nobody has asked for, and what targets ask for.
 */
#include "tests/stress/stress.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define FILLERS 2u
#define QUEUE_MAX (REGION_IDS * 2u)
#define RUN_MAX 8u

struct serving {
    struct memferry_server *server;
    pthread_t filler[FILLERS];
    _Atomic bool stop;
    _Atomic uint32_t number; /* of the next filler */
    uint64_t random;         /* the serving thread's */
    bool serving_task_known, sabotaged;

    pthread_mutex_t lock; /* of the queue and of finishing */
    pthread_cond_t finished_cond;
    unsigned count, finish_calls;
    bool finished;
    int finish_result;
    uint16_t queue[QUEUE_MAX]; /* promised for later */
};

static void this_is_a_server_task(void)
{
    const unsigned number = atomic_fetch_add(&shared->server_tasks, 1);
    need(number < SERVER_TASKS);
    atomic_store(&shared->server[number].pid, getpid());
    atomic_store(&shared->server[number].tid, gettid());
}

/* ---- the provider ---- */

static bool promise(struct serving *s, uint32_t id)
{
    pthread_mutex_lock(&s->lock);
    const bool room = s->count < QUEUE_MAX;
    if (room)
        s->queue[s->count++] = (uint16_t)id;
    pthread_mutex_unlock(&s->lock);
    return room;
}

static int want_page(void *argument, struct memferry_server *server, struct memferry_want *want)
{
    struct serving *s = argument;
    (void)server;
    if (!s->serving_task_known)
        this_is_a_server_task();
    s->serving_task_known = true;
    const uint32_t id = region_id(want->region, want->first_page);
    const bool sabotage = config.sabotage != SABOTAGE_NONE && !s->sabotaged && !starts_as_zeros(id);
    if (sabotage && config.sabotage == SABOTAGE_LOST_FAULT) {
        s->sabotaged = true;
        atomic_store(&shared->mapped[id], false);
        return MEMFERRY_LATER;
    }
    if (draw(&s->random, 3) == 0 && promise(s, id))
        return MEMFERRY_LATER;
    uint64_t pages = 1;
    while (pages < want->pages && starts_as_zeros(id + (uint32_t)pages) == starts_as_zeros(id))
        pages++;
    want->pages = pages;
    if (starts_as_zeros(id))
        return MEMFERRY_ZERO;
    for (uint64_t i = 0; i < pages; i++)
        pattern_fill((uint8_t *)want->bytes + i * config.page_bytes, id + (uint32_t)i, INITIAL);
    if (sabotage && id % config.pages + 3 < config.pages) {
        s->sabotaged = true;
        pattern_fill(want->bytes, id + 3, INITIAL);
    }
    return MEMFERRY_DATA;
}

/* ---- pages that nobody asked for ---- */

static void fill(struct serving *s, uint32_t id, uint64_t pages, uint8_t *bytes)
{
    const uint32_t region = (uint32_t)(id / config.pages);
    const uint64_t first = id % config.pages;
    for (uint64_t at = 0; at < pages;) {
        const bool zeros = starts_as_zeros(id + (uint32_t)at);
        uint64_t run = 0;
        for (; at + run < pages && starts_as_zeros(id + (uint32_t)(at + run)) == zeros; run++)
            if (!zeros)
                pattern_fill(bytes + run * config.page_bytes, id + (uint32_t)(at + run), INITIAL);
        int r = zeros ? memferry_fill_zero(s->server, region, first + at, run)
                      : memferry_fill(s->server, region, first + at, run, bytes);
        need(r == 0);
        at += run;
    }
}

static bool keep_promise(struct serving *s, uint64_t *random, uint8_t *bytes)
{
    pthread_mutex_lock(&s->lock);
    const bool any = s->count > 0;
    uint32_t id = 0;
    if (any) {
        const unsigned which = (unsigned)draw(random, s->count);
        id = s->queue[which];
        s->queue[which] = s->queue[--s->count];
    }
    pthread_mutex_unlock(&s->lock);
    if (any)
        fill(s, id, 1, bytes);
    return any;
}

static void *fill_in_background(void *argument)
{
    struct serving *s = argument;
    uint64_t random = config.seed * 64 + 32 + atomic_fetch_add(&s->number, 1);
    uint8_t *bytes = calloc(RUN_MAX, config.page_bytes);
    need(bytes);
    this_is_a_server_task();
    while (!atomic_load(&s->stop)) {
        if (keep_promise(s, &random, bytes))
            continue;
        nap_us((unsigned)draw(&random, 3000));
        if (atomic_load(&shared->set_up) < config.processes)
            continue;
        const uint32_t region = (uint32_t)draw(&random, config.regions);
        uint64_t page = draw(&random, config.pages);
        uint64_t run = memferry_next_missing(s->server, region, &page);
        const uint32_t id = region_id(region, page);
        const uint64_t most = 1 + draw(&random, RUN_MAX);
        uint64_t pages = 0;
        /* What nobody maps has nowhere to go. */
        while (pages < run && pages < most && atomic_load(&shared->mapped[id + pages]))
            pages++;
        if (pages > 0)
            fill(s, id, pages, bytes);
    }
    free(bytes);
    return NULL;
}

/* ---- from beginning to end ---- */

struct serving *serving_start(void)
{
    struct serving *s = calloc(1, sizeof(*s));
    need(s);
    s->random = config.seed * 64 + 40;
    pthread_mutex_init(&s->lock, NULL);
    pthread_cond_init(&s->finished_cond, NULL);
    const struct memferry_server_options options = {
        .struct_bytes = sizeof(options),
        .flags = MEMFERRY_FOLLOW_FORKS,
        .around_pages = draw(&s->random, 2) ? 0 : 1 + (uint32_t)draw(&s->random, 8),
        .spin_us = draw(&s->random, 2) ? 0 : 20,
    };
    need(memferry_server_new(&options, &s->server) == 0);
    const struct memferry_provider provider = {
        .struct_bytes = sizeof(provider), .arg = s, .want = want_page};
    need(memferry_server_set_provider(s->server, &provider) == 0);
    for (uint32_t region = 0; region < config.regions; region++)
        need(memferry_region_add(s->server, &(struct memferry_region){
                                                .struct_bytes = sizeof(struct memferry_region),
                                                .memory = config.memory,
                                                .length_bytes = config.pages * config.page_bytes,
                                                .fd = region_fd[region]}) == (int)region);
    need(memferry_server_start(s->server) == 0);
    for (unsigned i = 0; i < FILLERS; i++)
        need(pthread_create(&s->filler[i], NULL, fill_in_background, s) == 0);
    return s;
}

static void note_figures(const struct serving *s)
{
    struct memferry_figures figures = {.struct_bytes = sizeof(figures)};
    memferry_figures(s->server, &figures);
    atomic_fetch_add(&shared->faults, figures.faults);
    atomic_fetch_add(&shared->events, figures.events);
    atomic_fetch_add(&shared->wanted, figures.wanted);
    atomic_fetch_add(&shared->data_pages, figures.data_pages);
    atomic_fetch_add(&shared->zero_pages, figures.zero_pages);
    atomic_fetch_add(&shared->discarded_pages, figures.discarded_pages);
}

static void stop_fillers(struct serving *s)
{
    if (atomic_exchange(&s->stop, true))
        return;
    for (unsigned i = 0; i < FILLERS; i++)
        pthread_join(s->filler[i], NULL);
}

/* Every page of every region is filled once, whatever happened to it: what is counted says so. */
static int finish(struct serving *s)
{
    uint8_t *bytes = calloc(config.pages, config.page_bytes);
    need(bytes);
    stop_fillers(s);
    for (uint32_t region = 0; region < config.regions; region++) {
        uint64_t page = 0, run;
        while ((run = memferry_next_missing(s->server, region, &page)) > 0)
            fill(s, region_id(region, page), run, bytes);
    }
    free(bytes);
    /* A page may be just being landed by the thread that serves. */
    for (unsigned i = 0; memferry_missing_pages(s->server) > 0 && i < 10000; i++)
        nap_us(1000);
    note_figures(s);
    int r = memferry_server_free(s->server, MEMFERRY_END_COMPLETE);
    if (r < 0)
        fprintf(stderr, "%s\n", memferry_why());
    else
        s->server = NULL;
    return r;
}

static int finish_when_all_have(struct serving *s)
{
    pthread_mutex_lock(&s->lock);
    if (++s->finish_calls == config.processes) {
        pthread_mutex_unlock(&s->lock);
        int r = finish(s);
        pthread_mutex_lock(&s->lock);
        s->finish_result = r;
        s->finished = true;
        pthread_cond_broadcast(&s->finished_cond);
    }
    while (!s->finished && !atomic_load(&shared->stop)) {
        pthread_mutex_unlock(&s->lock);
        nap_us(1000);
        pthread_mutex_lock(&s->lock);
    }
    int r = s->finished ? s->finish_result : -ECANCELED;
    pthread_mutex_unlock(&s->lock);
    return r;
}

int serving_request(struct serving *s, const struct request *request, int fd)
{
    int r = -EINVAL;
    switch (request->kind) {
    case REQUEST_ADOPT:
        return memferry_context_adopt(s->server, fd, request->pid);
    case REQUEST_ADD:
        r = memferry_mapping_add(
            s->server,
            &(struct memferry_mapping){.struct_bytes = sizeof(struct memferry_mapping),
                                       .context = request->context,
                                       .region = request->region,
                                       .start_addr = request->start_addr,
                                       .length_bytes = request->pages * config.page_bytes,
                                       .offset_bytes = request->first_page * config.page_bytes});
        break;
    case REQUEST_DISCARD:
        r = memferry_discard(s->server, request->region, request->first_page, request->pages);
        break;
    case REQUEST_FINISH:
        return finish_when_all_have(s);
    default:
        break;
    }
    if (r < 0)
        fprintf(stderr, "a target asked in vain: %s\n", memferry_why());
    return r;
}

void serving_free(struct serving *s)
{
    if (!s)
        return;
    stop_fillers(s);
    if (s->server)
        memferry_server_free(s->server, MEMFERRY_END_ZEROS);
    pthread_cond_destroy(&s->finished_cond);
    pthread_mutex_destroy(&s->lock);
    free(s);
}

void serving_tell(const struct serving *s, uint32_t id, uint64_t addr)
{
    static struct memferry_mapping mappings[4096];
    if (!s->server || id >= REGION_IDS)
        return;
    fprintf(stderr, "  page %u: state %d\n", id,
            memferry_page_state(s->server, (uint32_t)(id / config.pages), id % config.pages));
    mappings[0].struct_bytes = sizeof(mappings[0]);
    const int count = memferry_mappings(s->server, mappings, 4096);
    for (int i = 0; i < count; i++)
        if (addr >= mappings[i].start_addr &&
            addr < mappings[i].start_addr + mappings[i].length_bytes)
            fprintf(
                stderr, "  context %u shows region %u page %llu there\n", mappings[i].context,
                mappings[i].region,
                (unsigned long long)((addr - mappings[i].start_addr + mappings[i].offset_bytes) /
                                     config.page_bytes));
}
