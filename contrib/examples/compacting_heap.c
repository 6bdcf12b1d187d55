/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A heap that is compacted while its users run.
 *
 *     compacting-heap [CYCLES [MUTATORS]]
 *
 * The heap is a memfd of two halves, mapped twice: at `heap`, where the mutators use it and
 * libmemferry serves its faults, and at `second`, where the collector works and nothing faults. One
 * half is in use. To collect, the mutators are stopped for as long as it takes to mark what is
 * reachable and to decide where each object goes in the other half; their references are set to the
 * new places, and they go on at once, although nothing has been copied yet. A mutator that touches
 * a page which is not there waits; the page's objects are copied to it through `second`, and
 * UFFDIO_CONTINUE lets the mutator have it. Meanwhile a thread copies all other pages. When it is
 * through, the old half is punched out, and is the next to be used.
 *
 * It checks what it does: an object knows its own number and those of the objects that it refers
 * to, its bytes follow from its number and from how often it was changed, and each mutator knows
 * that of what its roots hold.
 *
 * Build: cc compacting_heap.c $(pkg-config --cflags --libs libmemferry)
 */
#include <errno.h>
#include <fcntl.h>
#include <memferry.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096u
#define HALF_PAGES 1024u
#define HALF_BYTES (HALF_PAGES * PAGE)
#define GRANULE 16u
#define ROOTS 400u
#define MUTATORS_MAX 16u
#define REFS 3u
#define NOWHERE UINT32_MAX

/** An object never crosses the end of a page, so a page can be made by itself. */
struct object {
    uint64_t number; /**< never 0 */
    uint32_t bytes;  /**< with this header, a multiple of GRANULE */
    uint32_t version;
    struct object *ref[REFS];
    uint64_t ref_number[REFS];
    uint64_t word[]; /**< as word_of() has them */
};

enum page { TODO, BUSY, DONE };

static int file;
static uint8_t *heap, *second;
static struct memferry_server *server;
static uint32_t region;

/* Changed while the mutators stand still only. */
static unsigned half;                           /* the one in use */
static uint32_t forward[HALF_BYTES / GRANULE];  /* where an object of the old half goes */
static uint32_t incoming[HALF_BYTES / GRANULE]; /* the old objects, in the new order */
static uint32_t page_first[HALF_PAGES + 1];     /* of a new page's in incoming[] */
static uint32_t filled_pages;                   /* of the new half */
static _Atomic uint8_t page_state[HALF_PAGES];  /* enum page, of the half in use */
static _Atomic uint64_t copied_on_demand, copied_in_background;

/* Allocation: from `next`, a page at a time to each mutator. */
static pthread_mutex_t alloc_lock = PTHREAD_MUTEX_INITIALIZER;
static uint32_t next_page;

/* Stopping the mutators: each holds it shared while it works. */
static pthread_rwlock_t world = PTHREAD_RWLOCK_INITIALIZER;
static _Atomic bool stop_wanted, finished;
static _Atomic uint64_t next_number = 1;
static unsigned cycles_wanted = 6;
static _Atomic unsigned cycles;

/** One that a mutator holds, and what it must find there. */
struct root {
    struct object *object; /**< NULL: none */
    uint64_t number;
    uint32_t version;
};

static struct mutator {
    pthread_t thread;
    uint64_t random, checked;
    struct root root[ROOTS];
    uint8_t *at, *end; /* its page to allocate from */
} mutators[MUTATORS_MAX];
static unsigned mutator_count = 3;

static _Noreturn void die(const char *what)
{
    fprintf(stderr, "compacting-heap: %s: %s\n", what,
            *memferry_why() ? memferry_why() : strerror(errno));
    _exit(1);
}

static _Noreturn void wrong(const char *what, const struct object *o, uint64_t expected)
{
    fprintf(stderr,
            "compacting-heap: %s: object %p is number %llu, version %u; %llu was expected\n", what,
            (const void *)o, (unsigned long long)o->number, o->version,
            (unsigned long long)expected);
    _exit(1);
}

static uint64_t below(uint64_t *state, uint64_t limit)
{
    uint64_t z = (*state += UINT64_C(0x9e3779b97f4a7c15));
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    return (z ^ (z >> 31)) % limit;
}

static uint64_t word_of(uint64_t number, uint32_t version, uint64_t i)
{
    return (number * 0x10001 + version) * UINT64_C(0x9e3779b97f4a7c15) + i;
}

/* ---- collecting; never through `heap` ---- */

/* An object as the collector sees it. */
static struct object *seen(const struct object *o)
{
    return (struct object *)(void *)(second + ((const uint8_t *)o - heap));
}

static uint32_t granule_of(const struct object *o)
{
    return (uint32_t)(((const uint8_t *)o - heap) % HALF_BYTES / GRANULE);
}

/* Where an object of the old half is in the new one. */
static struct object *moved(const struct object *o)
{
    return o ? (struct object *)(void *)(heap + (uint64_t)half * HALF_BYTES +
                                         (uint64_t)forward[granule_of(o)] * GRANULE)
             : NULL;
}

static void mark(struct object *root)
{
    static struct object *stack[HALF_BYTES / sizeof(struct object) + 1];
    size_t depth = 0;
    if (root && forward[granule_of(root)] == NOWHERE) {
        forward[granule_of(root)] = 0;
        stack[depth++] = root;
    }
    while (depth > 0) {
        const struct object *o = seen(stack[--depth]);
        for (unsigned i = 0; i < REFS; i++) {
            struct object *ref = o->ref[i];
            if (!ref || forward[granule_of(ref)] != NOWHERE)
                continue;
            forward[granule_of(ref)] = 0;
            stack[depth++] = ref;
        }
    }
}

/* Sliding: objects keep their order, and no hole stays between them, but at the ends of pages. */
static void decide_places(const uint8_t *old)
{
    uint32_t count = 0;
    uint64_t at = 0;
    filled_pages = 0;
    for (uint32_t g = 0; g < HALF_BYTES / GRANULE; g++) {
        if (forward[g] == NOWHERE)
            continue;
        const struct object *o = (const void *)(old + (uint64_t)g * GRANULE);
        if (at % PAGE + o->bytes > PAGE)
            at += PAGE - at % PAGE;
        while (filled_pages <= at / PAGE)
            page_first[filled_pages++] = count;
        forward[g] = (uint32_t)(at / GRANULE);
        incoming[count++] = g;
        at += o->bytes;
    }
    page_first[filled_pages] = count;
}

/* Make one page of the new half: BUSY by the caller. */
static void compact_page(uint32_t page)
{
    const uint8_t *old = second + (uint64_t)(1 - half) * HALF_BYTES;
    uint8_t *new = second + (uint64_t)half *HALF_BYTES;
    for (uint32_t i = page_first[page]; i < page_first[page + 1]; i++) {
        const struct object *from = (const void *)(old + (uint64_t)incoming[i] * GRANULE);
        struct object *to = (void *)(new + (uint64_t)forward[incoming[i]] * GRANULE);
        memcpy(to, from, from->bytes);
        for (unsigned k = 0; k < REFS; k++)
            to->ref[k] = moved(to->ref[k]);
    }
}

static bool take_page(uint32_t page)
{
    uint8_t todo = TODO;
    return atomic_compare_exchange_strong(&page_state[page], &todo, BUSY);
}

/* A mutator waits for a page: on the server's thread. */
static int want(void *arg, struct memferry_server *s, struct memferry_want *wanted)
{
    (void)arg;
    (void)s;
    const uint32_t page = (uint32_t)(wanted->first_page % HALF_PAGES);
    wanted->pages = 1;
    if (wanted->first_page / HALF_PAGES != half)
        return -EFAULT; /* nobody has a reference to there */
    if (take_page(page)) {
        compact_page(page);
        atomic_store(&page_state[page], DONE);
        atomic_fetch_add(&copied_on_demand, 1);
    }
    /* BUSY: the collector is at it, and says so when it is done. */
    return atomic_load(&page_state[page]) == DONE ? MEMFERRY_PRESENT : MEMFERRY_LATER;
}

static void flip(void)
{
    const unsigned old = half;
    for (uint32_t g = 0; g < HALF_BYTES / GRANULE; g++)
        forward[g] = NOWHERE;
    for (unsigned m = 0; m < mutator_count; m++)
        for (unsigned i = 0; i < ROOTS; i++)
            mark(mutators[m].root[i].object);
    decide_places(second + (uint64_t)old * HALF_BYTES);
    half = 1 - old;
    for (uint32_t page = 0; page < HALF_PAGES; page++) /* fresh ones are holes, and right */
        atomic_store(&page_state[page], page < filled_pages ? TODO : DONE);
    for (unsigned m = 0; m < mutator_count; m++) {
        mutators[m].at = mutators[m].end = NULL;
        for (unsigned i = 0; i < ROOTS; i++)
            mutators[m].root[i].object = moved(mutators[m].root[i].object);
    }
    next_page = filled_pages;
    if (filled_pages > HALF_PAGES * 3 / 4)
        die("the heap is too small for what is reachable");
}

static void collect(void)
{
    atomic_store(&stop_wanted, true);
    pthread_rwlock_wrlock(&world);
    flip();
    atomic_store(&stop_wanted, false);
    pthread_rwlock_unlock(&world);

    const uint64_t first = (uint64_t)half * HALF_PAGES;
    for (uint32_t page = 0; page < filled_pages; page++) {
        if (!take_page(page))
            continue;
        compact_page(page);
        atomic_store(&page_state[page], DONE);
        atomic_fetch_add(&copied_in_background, 1);
        if (memferry_fill_present(server, region, first + page, 1) < 0)
            die("cannot let a page through");
        if (page % 16 == 0)
            sched_yield(); /* so that some are asked for before */
    }
    for (uint32_t page = 0; page < filled_pages; page++)
        while (atomic_load(&page_state[page]) != DONE)
            sched_yield();

    /* Nobody has a reference to the old half any more. */
    const uint64_t old = (uint64_t)(1 - half) * HALF_PAGES;
    if (fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)(old * PAGE),
                  HALF_BYTES) != 0)
        die("cannot punch the old half out");
    if (memferry_forget(server, region, old, HALF_PAGES) < 0)
        die("cannot forget the old half");
}

/* ---- using the heap ---- */

/* Return: NULL when a collection is needed. */
static struct object *allocate(struct mutator *m, uint32_t words)
{
    const uint32_t bytes =
        (uint32_t)((sizeof(struct object) + words * 8 + GRANULE - 1) / GRANULE * GRANULE);
    if (!m->at || m->at + bytes > m->end) {
        pthread_mutex_lock(&alloc_lock);
        const uint32_t page = next_page;
        next_page += page < HALF_PAGES;
        pthread_mutex_unlock(&alloc_lock);
        if (page == HALF_PAGES)
            return NULL;
        m->at = heap + ((uint64_t)half * HALF_PAGES + page) * PAGE;
        m->end = m->at + PAGE;
    }
    struct object *o = (void *)m->at;
    m->at += bytes;
    o->bytes = bytes;
    return o;
}

static uint64_t words_in(const struct object *o)
{
    return (o->bytes - sizeof(*o)) / 8;
}

static void scribble(struct object *o)
{
    for (uint64_t i = 0; i < words_in(o); i++)
        o->word[i] = word_of(o->number, o->version, i);
}

/* All of an object, and that it refers to what it should. */
static void check(const struct object *o, uint64_t number)
{
    if (o->number != number || o->bytes > PAGE || o->bytes < sizeof(*o))
        wrong("number", o, number);
    for (uint64_t i = 0; i < words_in(o); i++)
        if (o->word[i] != word_of(o->number, o->version, i))
            wrong("content", o, number);
    for (unsigned k = 0; k < REFS; k++) {
        if (!o->ref[k] != !o->ref_number[k])
            wrong("reference", o, number);
        if (o->ref[k] && o->ref[k]->number != o->ref_number[k])
            wrong("what is referred to", o->ref[k], o->ref_number[k]);
    }
}

/* A root and all it refers to are its mutator's own; what is no root any more is never changed. */
static void check_root(struct mutator *m, const struct root *r)
{
    if (r->object->version != r->version)
        wrong("version", r->object, r->number);
    check(r->object, r->number);
    const struct object *o = r->object;
    for (unsigned steps = 0; steps < 8; steps++) {
        const unsigned k = (unsigned)below(&m->random, REFS);
        if (!o->ref[k])
            break;
        check(o->ref[k], o->ref_number[k]);
        o = o->ref[k];
    }
    m->checked++;
}

static bool make_object(struct mutator *m)
{
    struct root *r = &m->root[below(&m->random, ROOTS)];
    struct object *o = allocate(m, (uint32_t)below(&m->random, 120));
    if (!o)
        return false;
    o->number = atomic_fetch_add(&next_number, 1);
    o->version = 0;
    for (unsigned k = 0; k < REFS; k++) {
        const struct root *other = &m->root[below(&m->random, ROOTS)];
        /* What it refers to becomes its own: from then on that is not changed, being no root any
         * more. Long chains would keep everything alive, so most refer to nothing. */
        const bool refer = other != r && other->object && below(&m->random, 6) == 0;
        o->ref[k] = refer ? other->object : NULL;
        o->ref_number[k] = refer ? other->number : 0;
        if (refer)
            m->root[other - m->root] = (struct root){0};
    }
    scribble(o);
    *r = (struct root){.object = o, .number = o->number};
    return true;
}

static void change_object(struct mutator *m)
{
    struct root *r = &m->root[below(&m->random, ROOTS)];
    if (!r->object)
        return;
    r->object->version = ++r->version;
    scribble(r->object);
}

static void *mutate(void *argument)
{
    struct mutator *m = argument;
    while (!atomic_load(&finished)) {
        if (atomic_load(&stop_wanted)) { /* a writer does not go before readers by itself */
            sched_yield();
            continue;
        }
        pthread_rwlock_rdlock(&world);
        bool room = true;
        for (unsigned i = 0; i < 64 && room && !atomic_load(&stop_wanted); i++) {
            const struct root *r = &m->root[below(&m->random, ROOTS)];
            if (r->object)
                check_root(m, r);
            change_object(m);
            room = make_object(m);
        }
        pthread_rwlock_unlock(&world);
        if (!room)
            sched_yield(); /* the collector comes */
    }
    return NULL;
}

/* ---- from beginning to end ---- */

static void set_up(void)
{
    file = memfd_create("heap", MFD_CLOEXEC);
    if (file < 0 || ftruncate(file, 2 * HALF_BYTES) != 0)
        die("cannot make the heap");
    heap = mmap(NULL, 2 * HALF_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    second = mmap(NULL, 2 * HALF_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (heap == MAP_FAILED || second == MAP_FAILED)
        die("cannot map the heap");
    for (uint32_t page = 0; page < HALF_PAGES; page++)
        atomic_store(&page_state[page], DONE); /* empty, which is right */
    if (memferry_server_new(NULL, &server) < 0 ||
        memferry_server_set_provider(
            server, &(struct memferry_provider){.struct_bytes = sizeof(struct memferry_provider),
                                                .want = want}) < 0)
        die("cannot make a server");
    int context = memferry_context_open(server);
    if (context < 0)
        die("cannot watch memory");
    int number = memferry_region_add(
        server, &(struct memferry_region){.struct_bytes = sizeof(struct memferry_region),
                                          .memory = MEMFERRY_SHMEM,
                                          .length_bytes = 2 * HALF_BYTES,
                                          .fd = file});
    if (number < 0)
        die("cannot serve the heap");
    region = (uint32_t)number;
    if (memferry_mapping_add(
            server, &(struct memferry_mapping){.struct_bytes = sizeof(struct memferry_mapping),
                                               .context = (uint32_t)context,
                                               .region = region,
                                               .start_addr = (uintptr_t)heap,
                                               .length_bytes = 2 * HALF_BYTES}) < 0 ||
        memferry_server_start(server) < 0)
        die("cannot serve the heap");
}

int main(int argc, char **argv)
{
    if (argc > 1)
        cycles_wanted = (unsigned)strtoul(argv[1], NULL, 0);
    if (argc > 2)
        mutator_count = (unsigned)strtoul(argv[2], NULL, 0);
    if (argc > 3 || cycles_wanted == 0 || mutator_count == 0 || mutator_count > MUTATORS_MAX) {
        fprintf(stderr, "usage: compacting-heap [CYCLES [MUTATORS, up to %u]]\n", MUTATORS_MAX);
        return 2;
    }
    set_up();
    for (unsigned i = 0; i < mutator_count; i++) {
        mutators[i].random = i + 1;
        if (pthread_create(&mutators[i].thread, NULL, mutate, &mutators[i]) != 0)
            die("cannot start a thread");
    }
    for (; cycles < cycles_wanted; cycles++) {
        for (bool full = false; !full;) { /* half of it garbage, as a rule */
            pthread_mutex_lock(&alloc_lock);
            full = next_page > HALF_PAGES * 3 / 4;
            pthread_mutex_unlock(&alloc_lock);
            sched_yield();
        }
        collect();
    }
    atomic_store(&finished, true);
    uint64_t checked = 0, alive = 0;
    for (unsigned i = 0; i < mutator_count; i++)
        pthread_join(mutators[i].thread, NULL);
    for (unsigned i = 0; i < mutator_count; i++) {
        for (unsigned k = 0; k < ROOTS; k++) {
            if (!mutators[i].root[k].object)
                continue;
            check_root(&mutators[i], &mutators[i].root[k]);
            alive++;
        }
        checked += mutators[i].checked;
    }
    printf("%u collections while %u mutators made %llu objects and checked them %llu times; %llu "
           "pages were copied for somebody who waited, %llu in the background; %llu roots are "
           "right\n",
           cycles, mutator_count, (unsigned long long)(next_number - 1),
           (unsigned long long)checked, (unsigned long long)copied_on_demand,
           (unsigned long long)copied_in_background, (unsigned long long)alive);
    /* What is missing belongs to the half that nobody uses. */
    if (memferry_server_free(server, MEMFERRY_END_ZEROS) < 0)
        die("cannot end the server");
    return 0;
}
