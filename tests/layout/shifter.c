/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A process that test_exact serves with pages: its threads change their mappings at random, each of
 * a region of its own, and verify what they find. Addresses are chosen by the kernel, so what one
 * thread gives back another is soon given. Not linked with anything of memferry's.
 *
 * Usage: shifter FD, where FD is the struct shared.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "tests/layout/shifter.h"

#define MAPPINGS 20u

struct mapping {
    char *at;
    uint64_t first, pages; /* of the region */
};

struct shifting {
    unsigned index; /* thread and region */
    uint64_t random;
    uint32_t writes;
    bool alone;     /* nobody else changes what pages hold */
    unsigned depth; /* of forks */
    struct mapping mapping[MAPPINGS];
    unsigned count; /* [0] is the whole region, and stays */
};

static struct shared *shared;

static _Noreturn void fail(const struct shifting *s, const char *fmt, ...)
{
    char text[400];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    if (!atomic_exchange(&shared->failed, true))
        snprintf(shared->failure, sizeof(shared->failure), "thread %u, depth %u: %s", s->index,
                 s->depth, text);
    _exit(3);
}

static uint64_t below(struct shifting *s, uint64_t limit)
{
    s->random = mix(s->random);
    return s->random % limit;
}

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static char *place(const struct mapping *m, uint64_t page)
{
    return m->at + (page - m->first) * PAGE;
}

static void look(struct shifting *s, const struct mapping *m, uint64_t page)
{
    const volatile uint64_t *at = (const volatile uint64_t *)(void *)place(m, page);
    const uint64_t start_ns = now_ns();
    uint64_t found = at[0];
    const uint64_t took_ns = now_ns() - start_ns;
    uint64_t longest = atomic_load(&shared->longest_ns);
    while (took_ns > longest &&
           !atomic_compare_exchange_weak(&shared->longest_ns, &longest, took_ns))
        ;
    const uint32_t write = shared->expected[s->index][page];
    for (unsigned i = 0; i < PAGE / 8; i++)
        if ((found = at[i]) != word(shared->seed, s->index, page, write, i))
            fail(s, "page %u:%llu at %p, word %u is %#llx, not %#llx (write %u)", s->index,
                 (unsigned long long)page, (const void *)at, i, (unsigned long long)found,
                 (unsigned long long)word(shared->seed, s->index, page, write, i), write);
    atomic_fetch_add(&shared->looked[s->index], 1);
}

static void write_page(struct shifting *s, const struct mapping *m, uint64_t page)
{
    uint64_t *at = (uint64_t *)(void *)place(m, page);
    const uint32_t write = ++s->writes;
    for (unsigned i = 0; i < PAGE / 8; i++)
        at[i] = word(shared->seed, s->index, page, write, i);
    shared->expected[s->index][page] = write;
}

static void add(struct shifting *s, char *at, uint64_t first, uint64_t pages)
{
    s->mapping[s->count++] = (struct mapping){at, first, pages};
}

static void forget(struct shifting *s, struct mapping *m)
{
    *m = s->mapping[--s->count];
}

/* A part of a mapping. */
static struct mapping part(struct shifting *s, const struct mapping *m)
{
    uint64_t from = below(s, m->pages), pages = 1 + below(s, m->pages - from);
    return (struct mapping){m->at + from * PAGE, m->first + from, pages};
}

/* A second mapping of a part: an old length of 0 (mremap(2)). It is registered as the first is. */
static void duplicate(struct shifting *s, const struct mapping *m)
{
    struct mapping p = part(s, m);
    if (s->count == MAPPINGS)
        return;
    char *at = mremap(p.at, 0, p.pages * PAGE, MREMAP_MAYMOVE);
    if (at != MAP_FAILED)
        add(s, at, p.first, p.pages);
}

static void unmap(struct shifting *s, struct mapping *m)
{
    struct mapping whole = *m, p = below(s, 3) ? whole : part(s, m);
    if (s->count + 1 > MAPPINGS && p.pages != whole.pages)
        return;
    /* Forgotten first: the addresses may be somebody else's at once. */
    forget(s, m);
    munmap(p.at, p.pages * PAGE);
    if (p.first > whole.first)
        add(s, whole.at, whole.first, p.first - whole.first);
    if (p.first + p.pages < whole.first + whole.pages)
        add(s, p.at + p.pages * PAGE, p.first + p.pages,
            whole.first + whole.pages - p.first - p.pages);
}

static void move(struct shifting *s, struct mapping *m)
{
    struct mapping from = *m;
    char *to = MAP_FAILED;
    switch (below(s, 3)) {
    case 0: /* to where nothing is */
        to = mmap(NULL, from.pages * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        break;
    case 1: /* onto another mapping, or the beginning of it */
        for (unsigned i = 1; i < s->count; i++) {
            struct mapping *other = &s->mapping[i];
            if (other == m || other->pages < from.pages)
                continue;
            to = other->at;
            other->at += from.pages * PAGE;
            other->first += from.pages;
            other->pages -= from.pages;
            if (other->pages == 0) {
                const bool last = m == &s->mapping[s->count - 1];
                forget(s, other);
                m = last ? other : m;
            }
            break;
        }
        break;
    case 2: /* both stay */
        if (s->count == MAPPINGS)
            return;
        to = mremap(from.at, from.pages * PAGE, from.pages * PAGE,
                    MREMAP_MAYMOVE | 4 /* MREMAP_DONTUNMAP */);
        if (to != MAP_FAILED)
            add(s, to, from.first, from.pages);
        return;
    }
    if (to == MAP_FAILED)
        return;
    char *at =
        mremap(from.at, from.pages * PAGE, from.pages * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to);
    if (at == MAP_FAILED) { /* it lies in several pieces (mprotect) */
        munmap(to, from.pages * PAGE);
        return;
    }
    m->at = at;
    atomic_fetch_add(&shared->moved, 1);
}

static void resize(struct shifting *s, struct mapping *m)
{
    if (below(s, 2) && m->pages > 1) {
        uint64_t pages = 1 + below(s, m->pages - 1), had = m->pages;
        if (mremap(m->at, had * PAGE, pages * PAGE, 0) == MAP_FAILED)
            return;
        m->pages = pages;
        if (below(s, 2))
            return;
    }
    const uint64_t room = shared->pages - m->first - m->pages;
    if (room == 0)
        return;
    const uint64_t more = 1 + below(s, room < 16 ? room : 16);
    char *at =
        mremap(m->at, m->pages * PAGE, (m->pages + more) * PAGE, below(s, 2) ? MREMAP_MAYMOVE : 0);
    if (at == MAP_FAILED)
        return;
    atomic_fetch_add(&shared->grown_in_place, at == m->at);
    m->at = at;
    m->pages += more;
    look(s, m, m->first + m->pages - 1);
}

static void discard(struct shifting *s, const struct mapping *m)
{
    struct mapping p = part(s, m);
    if (p.pages > 24)
        p.pages = 24;
    if (madvise(p.at, p.pages * PAGE, MADV_REMOVE) != 0)
        return;
    for (uint64_t i = 0; i < p.pages; i++)
        shared->expected[s->index][p.first + i] = ZEROS;
    look(s, &p, p.first);
}

static void protect(struct shifting *s, const struct mapping *m)
{
    struct mapping p = part(s, m);
    mprotect(p.at, p.pages * PAGE, PROT_READ);
    look(s, &p, p.first);
    mprotect(p.at, p.pages * PAGE, PROT_READ | PROT_WRITE);
}

static void act(struct shifting *s);

/* The child has everything at the same places, and goes on in the same way for a while. */
static void fork_it(struct shifting *s)
{
    if (!shared->forks || s->depth >= 2)
        return;
    const pid_t pid = fork();
    if (pid < 0)
        return;
    if (pid == 0) {
        s->depth++;
        s->random = mix(s->random ^ 0x1234567);
        const uint64_t what = below(s, 8);
        for (uint64_t n = what == 0 ? 0 : below(s, 60); n > 0; n--)
            act(s);
        if (what == 1)
            execl("/bin/true", "true", (char *)NULL);
        _exit(0);
    }
    atomic_fetch_add(&shared->forked, 1);
    int status;
    /* Meanwhile only the child changes what pages hold. */
    s->alone = false;
    while (waitpid(pid, &status, WNOHANG) == 0) {
        act(s);
        /* While any change is under way the kernel refuses every fill: changes without a pause in
         * all threads leave no moment for one. */
        usleep(300);
    }
    s->alone = true;
    if (!WIFEXITED(status) || (WEXITSTATUS(status) != 0 && WEXITSTATUS(status) != 3))
        fail(s, "a child ended with status %#x", (unsigned)status);
    if (WEXITSTATUS(status) == 3)
        _exit(3);
    s->writes += 1000; /* the child's numbers */
}

static void act(struct shifting *s)
{
    struct mapping *m = &s->mapping[below(s, s->count)];
    struct mapping *other = s->count > 1 ? &s->mapping[1 + below(s, s->count - 1)] : NULL;
    const uint64_t page = m->first + below(s, m->pages);
    atomic_fetch_add(&shared->changes, 1);
    /* Two who know of each other's doings only by what pages hold may look at what neither changes.
     */
    switch (below(s, 20)) {
    case 0:
    case 1:
        duplicate(s, m);
        break;
    case 2:
        if (other)
            unmap(s, other);
        break;
    case 3:
    case 4:
        if (other)
            move(s, other);
        break;
    case 5:
        if (other && s->alone)
            resize(s, other);
        break;
    case 6: {
        struct mapping p = part(s, m);
        madvise(p.at, p.pages * PAGE, MADV_DONTNEED);
        break;
    }
    case 7:
        if (s->alone && shared->discards && below(s, 3) == 0)
            discard(s, m);
        break;
    case 8:
        if (s->alone)
            protect(s, m);
        break;
    case 9:
        if (s->alone && below(s, 12) == 0)
            fork_it(s);
        break;
    case 10:
        if (s->alone)
            write_page(s, m, page);
        break;
    default:
        atomic_fetch_sub(&shared->changes, 1);
        if (s->alone)
            look(s, m, page);
        else
            (void)*(volatile char *)place(m, page);
    }
}

static void *shift(void *arg)
{
    static struct shifting all[THREADS_MAX];
    const unsigned index = (unsigned)(uintptr_t)arg;
    struct shifting *s = &all[index];
    s->index = index;
    s->alone = true;
    s->random = mix(shared->seed + index);
    char *at = mmap(NULL, (size_t)shared->pages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED,
                    shared->region_fd[index], 0);
    if (at == MAP_FAILED)
        fail(s, "no mapping: %s", strerror(errno));
    add(s, at, 0, shared->pages);
    while (!atomic_load(&shared->armed))
        usleep(1000);
    while (!atomic_load(&shared->stop))
        act(s);
    return NULL;
}

int main(int argc, char **argv)
{
    pthread_t thread[THREADS_MAX];
    if (argc != 2)
        return 2;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED, atoi(argv[1]), 0);
    if (shared == MAP_FAILED)
        return 2;
    const int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    for (unsigned i = 0; i < shared->threads; i++)
        if (pthread_create(&thread[i], NULL, shift, (void *)(uintptr_t)i) != 0)
            return 2;
    usleep(50000); /* all have mapped their regions: the test finds them by looking */
    atomic_store(&shared->uffd, uffd + 1);
    for (unsigned i = 0; i < shared->threads; i++)
        pthread_join(thread[i], NULL);
    return 0;
}
