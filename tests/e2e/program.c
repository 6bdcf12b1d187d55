/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A program to be migrated: threads that write, verify, discard, move, duplicate, protect and unmap
 * parts of their shared memory, and fork children that look at it (and write to it) too, all the
 * time. Every page holds a pattern made of its region, its number and its generation, so that a
 * page that is stale, lost, misplaced or mixed is noticed by whoever reads it next, word by word.
 *
 * What each page has to hold (the model) is the program's private state: `save` writes it, `load`
 * reads it. With --shared-model it lies in a region of its own, and there is nothing to save.
 *
 * usage: program serve SOCKET [--wait] [--shared-model] [--regions N] [--mib N] [--threads N]
 *                [--hugetlb | --private [--thp]] [--ops LETTERS] [--droppers N] [--seed N]
 *        program ask SOCKET VERB        pause, resume, save (to stdout), load (from stdin), verify,
 *                                       status; serve (faults of its own), scatter (its mappings),
 *                                       orphan (a process with the same memory), exec;
 *                                       prints the answer; exit 0 if it is OK
 * --wait: do nothing before `resume`.
 * --thp: asks for huge pages (MADV_HUGEPAGE).
 * --droppers: so many threads more, which MADV_DONTNEED what the others have mapped, all at once;
 *   to files this changes nothing. Not with LETTERS that move or unmap.
 * --private: the regions are private anonymous memory, at PRIVATE_ADDR; what is a change to a file
 *   there is one to the process's own pages here, a move leaves zeros behind, and children have
 *   copies. It moves nothing before it has been loaded: at the source, a page is its address.
 * LETTERS: w write, v verify, d discard (MADV_REMOVE), n drop (MADV_DONTNEED), m move (mremap), u
 *   duplicate and unmap, p protect, f fork a child that verifies, F fork one that writes, M map the
 *   file anew, l lock and unlock (mlock), r read through a second mapping, which can't be written
 * to, g grow and shrink (private only), o fork a child without one chunk (MADV_DONTFORK), which
 * moves another to its place (private only). The default is w, v, d, n, m, u, p and f.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "lib/util.h"

#define REGIONS_MAX 8u
#define THREADS_MAX 8u
#define CHUNKS 4u /* of a thread in a region: each is a mapping of its own */
#define PRIVATE_ADDR UINT64_C(0x500000000000) /* region i: plus i << 36 */
#define PIECES 700u /* more than a session is begun with (MF_MAPPINGS_MAX) */
#define STATE_MAGIC UINT64_C(0x6d66727970726f67)

/** The model of a page: generation, and the one that it is being brought to. 0: zeros. */
struct model {
    _Atomic uint32_t generation, next;
};

struct state_header {
    uint64_t magic, pages, beats, checksum;
};

static unsigned regions = 2, threads = 3, droppers;
static uint64_t region_bytes = UINT64_C(16) << 20, page_bytes = 4096;
static bool hugetlb, private_memory, huge, shared_model, waiting;
static const char *ops = "wwwwvvvvdnmupf";
static uint64_t seed = 1;

static int region_fd[REGIONS_MAX];
static struct model *model; /* region after region */
static uint64_t region_pages;

static _Atomic bool parked_wanted;
static _Atomic unsigned verify_wanted; /* counts requests */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static unsigned parked_count, verify_count;
static uint64_t verified_pages;
static _Atomic uint64_t beats, wrong_pages;

struct worker {
    pthread_t thread;
    unsigned number;
    uint64_t random;
    uint8_t *chunk[REGIONS_MAX][CHUNKS];
    uint8_t *alias[REGIONS_MAX][CHUNKS]; /* a second mapping, for reading only; if ops has an r */
};

static struct worker worker[THREADS_MAX];
static pthread_barrier_t drop_together;

__attribute__((format(printf, 1, 2), noreturn)) static void die(const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    vfprintf(stderr, fmt, ap);
    va_end(ap);
    fprintf(stderr, ": %s\n", strerror(errno));
    _exit(2);
}

/* ---- patterns ---- */

static uint64_t mix(uint64_t x)
{
    x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
    return x ^ (x >> 31);
}

static uint64_t word_of(unsigned region, uint64_t page, uint32_t generation, uint64_t word)
{
    if (generation == 0)
        return 0;
    return mix(((uint64_t)region << 56) ^ (page << 32) ^ generation) + word * UINT64_C(0x9e3779b9);
}

static void fill(uint8_t *at, unsigned region, uint64_t page, uint32_t generation)
{
    volatile uint64_t *words = (volatile uint64_t *)(void *)at;
    for (uint64_t i = 0; i < page_bytes / 8; i++)
        words[i] = word_of(region, page, generation, i);
}

/* Return: is it right? A page that was being changed when the program was stopped may be of either
 * generation, word by word. */
static bool verify(const uint8_t *at, unsigned region, uint64_t page)
{
    const struct model *m = &model[region * region_pages + page];
    const uint32_t now = m->generation, next = m->next;
    const volatile uint64_t *words = (const volatile uint64_t *)(const void *)at;
    for (uint64_t i = 0; i < page_bytes / 8; i++) {
        uint64_t found = words[i];
        if (found == word_of(region, page, now, i) || found == word_of(region, page, next, i))
            continue;
        uint32_t older = 0;
        while (older < now && found != word_of(region, page, older, i))
            older++;
        fprintf(stderr,
                "WRONG region %u page %llu word %llu at %p: generation %u (to be %u) expected, "
                "found %#llx, which is %s %u\n",
                region, (unsigned long long)page, (unsigned long long)i, (const void *)&words[i],
                now, next, (unsigned long long)found,
                older < now ? "generation" : "none known up to", older);
        atomic_fetch_add(&wrong_pages, 1);
        return false;
    }
    return true;
}

/* ---- what a thread does ---- */

static uint64_t draw(struct worker *w, uint64_t below)
{
    w->random += UINT64_C(0x9e3779b97f4a7c15);
    return mix(w->random) % below;
}

static uint64_t chunk_pages(void)
{
    return region_pages / threads / CHUNKS;
}

static uint64_t first_page(const struct worker *w, unsigned chunk)
{
    return (w->number * CHUNKS + chunk) * chunk_pages();
}

static void *map_chunk(const struct worker *w, unsigned region, unsigned chunk)
{
    if (private_memory)
        return (uint8_t *)(uintptr_t)(PRIVATE_ADDR + ((uint64_t)region << 36)) +
               first_page(w, chunk) * page_bytes;
    void *at = mmap(NULL, chunk_pages() * page_bytes, PROT_READ | PROT_WRITE, MAP_SHARED,
                    region_fd[region], (off_t)(first_page(w, chunk) * page_bytes));
    if (at == MAP_FAILED)
        die("mmap");
    return at;
}

/* An address range of @bytes that nothing else uses, aligned to @page_bytes. */
static uint8_t *reserve(uint64_t bytes)
{
    uint64_t more = bytes + page_bytes;
    uint8_t *at = mmap(NULL, more, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED)
        die("mmap of a place");
    uint8_t *aligned = (uint8_t *)(((uintptr_t)at + page_bytes - 1) & ~(uintptr_t)(page_bytes - 1));
    if (aligned > at)
        munmap(at, (size_t)(aligned - at));
    if (at + more > aligned + bytes)
        munmap(aligned + bytes, (size_t)((at + more) - (aligned + bytes)));
    return aligned;
}

static void set_generation(unsigned region, uint64_t page, uint32_t generation)
{
    struct model *m = &model[region * region_pages + page];
    atomic_store(&m->generation, generation);
    atomic_store(&m->next, generation);
}

/* Never 0 again once it was counted up: a stale page must not look like a new one. */
static uint32_t next_generation(struct worker *w)
{
    return (uint32_t)(1 + atomic_load(&beats) * 16 + draw(w, 16));
}

static void write_page(struct worker *w, unsigned region, uint64_t page, uint8_t *at)
{
    struct model *m = &model[region * region_pages + page];
    uint32_t generation = next_generation(w);
    atomic_store(&m->next, generation);
    fill(at, region, page, generation);
    atomic_store(&m->generation, generation);
}

static void discard(struct worker *w, unsigned region, uint64_t page, uint64_t pages, uint8_t *at)
{
    (void)w;
    for (uint64_t i = 0; i < pages; i++)
        atomic_store(&model[region * region_pages + page + i].next, 0);
    if (madvise(at, pages * page_bytes, private_memory ? MADV_DONTNEED : MADV_REMOVE) != 0)
        die("MADV_REMOVE");
    for (uint64_t i = 0; i < pages; i++)
        set_generation(region, page + i, 0);
}

/* A chunk of private memory may have come to lie in several mappings (its pages were locked,
 * protected or forked apart), which can't be moved in one; then it stays. */
static bool stays(const uint8_t *at)
{
    return at == MAP_FAILED && errno == EFAULT && private_memory;
}

static void move_chunk(struct worker *w, unsigned region, unsigned chunk)
{
    const uint64_t bytes = chunk_pages() * page_bytes;
    uint8_t *to = reserve(bytes);
    uint8_t *at = mremap(w->chunk[region][chunk], bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, to);
    if (stays(at))
        return;
    if (at == MAP_FAILED)
        die("mremap");
    w->chunk[region][chunk] = at;
}

/* A second mapping of the same; the first goes. hugetlbfs can't keep the old one of a move. */
static void duplicate_chunk(struct worker *w, unsigned region, unsigned chunk, bool anew)
{
    const uint64_t bytes = chunk_pages() * page_bytes;
    uint8_t *old = w->chunk[region][chunk], *at;
    if (anew) {
        at = map_chunk(w, region, chunk);
    } else {
        at = mremap(old, bytes, bytes, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, NULL);
        if (at == MAP_FAILED && errno == EINVAL) {
            move_chunk(w, region, chunk);
            return;
        }
        if (at == MAP_FAILED)
            die("mremap with MREMAP_DONTUNMAP");
    }
    /* Both have to show the same. */
    uint64_t page = draw(w, chunk_pages());
    verify(old + page * page_bytes, region, first_page(w, chunk) + page);
    verify(at + page * page_bytes, region, first_page(w, chunk) + page);
    if (munmap(old, bytes) != 0)
        die("munmap");
    w->chunk[region][chunk] = at;
}

static bool is_zero(const uint8_t *at, uint64_t bytes)
{
    for (uint64_t i = 0; i < bytes; i++)
        if (((const volatile uint8_t *)at)[i])
            return false;
    return true;
}

static void must_be_zero(const uint8_t *at, const char *what)
{
    if (is_zero(at, page_bytes))
        return;
    fprintf(stderr, "WRONG %s at %p: should read as zeros\n", what, (const void *)at);
    atomic_fetch_add(&wrong_pages, 1);
}

/* Private memory: the pages go along, the place they were at reads as zeros and is one's own. */
static void move_leaving(struct worker *w, unsigned region, unsigned chunk)
{
    const uint64_t bytes = chunk_pages() * page_bytes, page = draw(w, chunk_pages());
    uint8_t *old = w->chunk[region][chunk];
    uint8_t *at = mremap(old, bytes, bytes, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, NULL);
    if (stays(at))
        return;
    if (at == MAP_FAILED)
        die("mremap with MREMAP_DONTUNMAP");
    must_be_zero(old + page * page_bytes, "the old place of a move");
    memset(old + page * page_bytes, 0x5a, page_bytes);
    verify(at + page * page_bytes, region, first_page(w, chunk) + page);
    if (munmap(old, bytes) != 0)
        die("munmap");
    w->chunk[region][chunk] = at;
}

/* In place if there is room behind it, else moved; the end is new memory. Then it shrinks again, in
 * place or on the way to another. */
static void grow_and_shrink(struct worker *w, unsigned region, unsigned chunk)
{
    const uint64_t bytes = chunk_pages() * page_bytes, more = 8 * page_bytes;
    const uint64_t page = draw(w, chunk_pages());
    if (draw(w, 2)) { /* to where there is room */
        uint8_t *to = reserve(bytes + more);
        uint8_t *at =
            mremap(w->chunk[region][chunk], bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, to);
        if (stays(at))
            return;
        if (at == MAP_FAILED || munmap(to + bytes, more) != 0)
            die("mremap");
        w->chunk[region][chunk] = at;
    }
    uint8_t *at = mremap(w->chunk[region][chunk], bytes, bytes + more, MREMAP_MAYMOVE);
    if (stays(at))
        return;
    if (at == MAP_FAILED)
        die("mremap to more");
    must_be_zero(at + bytes + 3 * page_bytes, "what a mapping grew by");
    memset(at + bytes, 0x77, more);
    verify(at + page * page_bytes, region, first_page(w, chunk) + page);
    uint8_t *to = draw(w, 2) ? reserve(bytes) : NULL;
    uint8_t *less =
        mremap(at, bytes + more, bytes, to ? MREMAP_MAYMOVE | MREMAP_FIXED : 0, to ? to : at);
    if (less == MAP_FAILED)
        die("mremap to less");
    w->chunk[region][chunk] = less;
    verify(less + page * page_bytes, region, first_page(w, chunk) + page);
}

static void lock_and_unlock(struct worker *w, unsigned region, uint64_t page, uint64_t pages,
                            uint8_t *at)
{
    if (mlock2(at, pages * page_bytes, draw(w, 2) ? MLOCK_ONFAULT : 0) != 0)
        die("mlock");
    verify(at, region, page);
    /* Sanitizers make nothing of munlock(3), but do not know mlock2(2). */
    if (syscall(SYS_munlock, at, pages * page_bytes) != 0)
        die("munlock");
}

static void protect(struct worker *w, unsigned region, uint64_t page, uint8_t *at)
{
    (void)w;
    if (mprotect(at, page_bytes, PROT_NONE) != 0 || mprotect(at, page_bytes, PROT_READ) != 0)
        die("mprotect");
    verify(at, region, page);
    if (mprotect(at, page_bytes, PROT_READ | PROT_WRITE) != 0)
        die("mprotect");
}

/* A child, and at times its child, sees the same memory as the thread, which waits for it. */
static void fork_child(struct worker *w, unsigned region, unsigned chunk, bool writes)
{
    const uint64_t pages = chunk_pages(), first = first_page(w, chunk), start = draw(w, pages);
    const uint64_t target = draw(w, pages);
    const uint32_t generation = next_generation(w);
    const bool deeper = draw(w, 4) == 0;
    uint8_t *base = w->chunk[region][chunk];
    if (writes)
        atomic_store(&model[region * region_pages + first + target].next, generation);
    pid_t pid = fork();
    if (pid < 0)
        die("fork");
    if (pid == 0) {
        pid_t grandchild = deeper ? fork() : 0;
        if (grandchild > 0) {
            int status = 1;
            waitpid(grandchild, &status, 0);
            _exit(WIFEXITED(status) ? WEXITSTATUS(status) : 1);
        }
        bool right = true;
        for (uint64_t i = 0; i < 4; i++) {
            uint64_t page = (start + i * 7) % pages;
            right &= verify(base + page * page_bytes, region, first + page);
        }
        if (writes)
            fill(base + target * page_bytes, region, first + target, generation);
        _exit(right ? 0 : 1);
    }
    int status = 1;
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
        ;
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) {
        fprintf(stderr, "WRONG a child ended with status %#x\n", (unsigned)status);
        atomic_fetch_add(&wrong_pages, 1);
    }
    if (writes)
        set_generation(region, first + target, generation);
}

/* Of private memory each has pages of its own from now on: the child writes and discards, and so
 * does its parent, and neither sees the other's. Both look at all pages, most of which neither had
 * when they parted. */
static void fork_private_child(struct worker *w, unsigned region, unsigned chunk)
{
    const uint64_t pages = chunk_pages(), first = first_page(w, chunk);
    uint8_t *base = w->chunk[region][chunk];
    pid_t pid = fork();
    if (pid < 0)
        die("fork");
    struct worker mine = *w;
    mine.random += pid == 0 ? 77 : 7;
    struct worker *me = pid == 0 ? &mine : w;
    const uint64_t wrong_before = wrong_pages;
    for (unsigned i = 0; i < 12; i++) {
        const uint64_t page = draw(me, pages);
        uint8_t *at = base + page * page_bytes;
        switch (draw(me, 4)) {
        case 0:
            write_page(me, region, first + page, at);
            break;
        case 1:
            discard(me, region, first + page, 1 + draw(me, pages - page < 4 ? pages - page : 4),
                    at);
            break;
        default:
            verify(at, region, first + page);
        }
    }
    if (pid == 0) {
        pid_t grandchild = draw(me, 4) == 0 ? fork() : 0;
        int status = 0;
        for (uint64_t page = draw(me, 3); page < pages; page += 3)
            verify(base + page * page_bytes, region, first + page);
        if (grandchild > 0)
            waitpid(grandchild, &status, 0);
        _exit(status || wrong_pages != wrong_before ? 1 : 0);
    }
    int status = 1;
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
        ;
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) {
        fprintf(stderr, "WRONG a child ended with status %#x\n", (unsigned)status);
        atomic_fetch_add(&wrong_pages, 1);
    }
}

static bool may_move(void)
{
    return !private_memory || waiting;
}

static void fork_without(struct worker *w, unsigned region, unsigned chunk)
{
    const unsigned other = (chunk + 1) % CHUNKS;
    const uint64_t bytes = chunk_pages() * page_bytes;
    uint8_t *to = w->chunk[region][chunk], *from = w->chunk[region][other];
    if (madvise(to, bytes, MADV_DONTFORK) != 0)
        die("MADV_DONTFORK");
    pid_t pid = fork();
    if (pid < 0)
        die("fork");
    if (pid == 0) {
        const uint64_t wrong_before = wrong_pages;
        uint8_t *at = mremap(from, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, to);
        if (stays(at))
            _exit(0);
        if (at == MAP_FAILED)
            die("mremap in a child");
        for (uint64_t page = 0; page < chunk_pages(); page += 5)
            verify(at + page * page_bytes, region, first_page(w, other) + page);
        usleep(20000); /* others want pages meanwhile */
        _exit(wrong_pages != wrong_before ? 1 : 0);
    }
    int status = 1;
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
        ;
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) {
        fprintf(stderr, "WRONG a child without a chunk ended with status %#x\n", (unsigned)status);
        atomic_fetch_add(&wrong_pages, 1);
    }
    if (madvise(to, bytes, MADV_DOFORK) != 0)
        die("MADV_DOFORK");
}

static void work_once(struct worker *w)
{
    const unsigned region = (unsigned)draw(w, regions), chunk = (unsigned)draw(w, CHUNKS);
    const uint64_t in_chunk = draw(w, chunk_pages()), page = first_page(w, chunk) + in_chunk;
    uint8_t *at = w->chunk[region][chunk] + in_chunk * page_bytes;
    uint64_t pages = 1 + draw(w, chunk_pages() - in_chunk < 16 ? chunk_pages() - in_chunk : 16);
    switch (ops[draw(w, strlen(ops))]) {
    case 'w':
        write_page(w, region, page, at);
        break;
    case 'v':
        verify(at, region, page);
        break;
    case 'd':
        discard(w, region, page, pages, at);
        break;
    case 'n':
        if (private_memory) {
            discard(w, region, page, pages, at);
            break;
        }
        if (madvise(at, pages * page_bytes, MADV_DONTNEED) != 0)
            die("MADV_DONTNEED");
        verify(at, region, page);
        break;
    /* What is rare in real programs is rare here, for it costs so much more than a page. */
    case 'm':
        if (draw(w, 16) == 0 && may_move())
            move_chunk(w, region, chunk);
        break;
    case 'u':
        if (draw(w, 16) == 0 && private_memory && may_move())
            move_leaving(w, region, chunk);
        else if (draw(w, 16) == 0 && !private_memory)
            duplicate_chunk(w, region, chunk, false);
        break;
    case 'g':
        if (draw(w, 16) == 0 && private_memory && may_move())
            grow_and_shrink(w, region, chunk);
        break;
    case 'r':
        verify((private_memory ? w->chunk : w->alias)[region][chunk] + in_chunk * page_bytes,
               region, page);
        break;
    case 'l':
        lock_and_unlock(w, region, page, pages, at);
        break;
    case 'M':
        if (draw(w, 16) == 0)
            duplicate_chunk(w, region, chunk, true);
        break;
    case 'p':
        protect(w, region, page, at);
        break;
    case 'f':
        if (draw(w, 64) == 0)
            fork_child(w, region, chunk, false);
        break;
    case 'F':
        if (draw(w, 64) == 0 && private_memory)
            fork_private_child(w, region, chunk);
        else if (draw(w, 64) == 0 && !private_memory)
            fork_child(w, region, chunk, true);
        break;
    case 'o':
        if (draw(w, 64) == 0 && private_memory && may_move())
            fork_without(w, region, chunk);
        break;
    default:
        die("no operation");
    }
    atomic_fetch_add(&beats, 1);
}

static void verify_all(struct worker *w)
{
    for (unsigned region = 0; region < regions; region++)
        for (unsigned chunk = 0; chunk < CHUNKS; chunk++)
            for (uint64_t page = 0; page < chunk_pages(); page++)
                verify(w->chunk[region][chunk] + page * page_bytes, region,
                       first_page(w, chunk) + page);
}

static void *work(void *arg)
{
    struct worker *w = arg;
    unsigned verified = 0;
    for (;;) {
        if (atomic_load(&parked_wanted)) {
            pthread_mutex_lock(&lock);
            parked_count++;
            pthread_cond_broadcast(&changed);
            while (parked_wanted)
                pthread_cond_wait(&changed, &lock);
            parked_count--;
            pthread_cond_broadcast(&changed);
            pthread_mutex_unlock(&lock);
        }
        unsigned wanted = atomic_load(&verify_wanted);
        if (wanted != verified) {
            verified = wanted;
            verify_all(w);
            pthread_mutex_lock(&lock);
            verify_count++;
            verified_pages += regions * CHUNKS * chunk_pages();
            pthread_cond_broadcast(&changed);
            pthread_mutex_unlock(&lock);
        }
        work_once(w);
        if (draw(w, 64) == 0)
            usleep(1000); /* a machine with few processors has others to serve */
    }
    return NULL;
}

/* They meet before each time, so that all wait at once for somebody to read what they have done. */
static void *drop(void *arg)
{
    struct worker self = {.random = mix((uintptr_t)arg)};
    for (;;) {
        const struct worker *w = &worker[draw(&self, threads)];
        const uint64_t in_chunk = draw(&self, chunk_pages());
        const uint8_t *at = w->chunk[draw(&self, regions)][draw(&self, CHUNKS)];
        pthread_barrier_wait(&drop_together);
        if (!parked_wanted &&
            madvise((void *)(uintptr_t)(at + in_chunk * page_bytes),
                    (1 + draw(&self, chunk_pages() - in_chunk)) * page_bytes, MADV_DONTNEED) != 0)
            die("MADV_DONTNEED");
        usleep(100000);
    }
    return NULL;
}

/* ---- the control socket ---- */

static uint64_t checksum(const struct model *pages, uint64_t count)
{
    uint64_t sum = 0;
    for (uint64_t i = 0; i < count; i++)
        sum = mix(sum ^ ((uint64_t)pages[i].generation << 32) ^ pages[i].next);
    return sum;
}

static bool read_all(int fd, void *data, size_t bytes)
{
    for (uint8_t *at = data; bytes > 0;) {
        ssize_t n = read(fd, at, bytes);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return false;
        at += n;
        bytes -= (size_t)n;
    }
    return true;
}

static const char *save(int fd)
{
    const uint64_t pages = regions * region_pages;
    struct state_header header = {
        .magic = STATE_MAGIC, .pages = pages, .beats = beats, .checksum = checksum(model, pages)};
    uint64_t bytes = sizeof(header) + pages * sizeof(*model);
    if (mf_write_all(fd, &bytes, sizeof(bytes)) < 0 ||
        mf_write_all(fd, &header, sizeof(header)) < 0 ||
        mf_write_all(fd, model, pages * sizeof(*model)) < 0)
        return "ERROR writing the state";
    return NULL;
}

static const char *load(int fd)
{
    uint64_t bytes, pages = regions * region_pages;
    struct state_header header;
    cleanup_free struct model *loaded = calloc(pages, sizeof(*loaded));
    if (!loaded || !read_all(fd, &bytes, sizeof(bytes)) ||
        bytes != sizeof(header) + pages * sizeof(*loaded) ||
        !read_all(fd, &header, sizeof(header)) || !read_all(fd, loaded, pages * sizeof(*loaded)))
        return "ERROR the state has another size";
    if (header.magic != STATE_MAGIC || header.pages != pages ||
        header.checksum != checksum(loaded, pages))
        return "ERROR the state is damaged";
    memcpy(model, loaded, pages * sizeof(*loaded));
    atomic_store(&beats, header.beats);
    return "OK loaded";
}

static void park(bool wanted)
{
    pthread_mutex_lock(&lock);
    atomic_store(&parked_wanted, wanted);
    pthread_cond_broadcast(&changed);
    while (parked_count != (wanted ? threads : 0))
        pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
}

/* A userfaultfd of its own over another mapping of a region, which nobody touches. */
static const char *serve_itself(void)
{
    struct uffdio_api api = {.api = UFFD_API};
    int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    void *at = mmap(NULL, page_bytes, PROT_READ, MAP_SHARED, region_fd[0], 0);
    struct uffdio_register range = {.range = {.start = (uintptr_t)at, .len = page_bytes},
                                    .mode = UFFDIO_REGISTER_MODE_MISSING};
    if (uffd < 0 || at == MAP_FAILED || ioctl(uffd, UFFDIO_API, &api) != 0 ||
        ioctl(uffd, UFFDIO_REGISTER, &range) != 0)
        return "ERROR no userfaultfd";
    return "OK serves";
}

/* All of a region once more, to stay. */
static const char *map_again(void)
{
    return mmap(NULL, region_bytes, PROT_READ, MAP_SHARED, region_fd[0], 0) == MAP_FAILED
               ? "ERROR mapping"
               : "OK mapped again";
}

/* Into many pieces: every second page of a mapping that is made for it. */
static const char *scatter(void)
{
    uint8_t *at = mmap(NULL, 2 * PIECES * page_bytes, PROT_NONE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    for (unsigned i = 0; at != MAP_FAILED && i < PIECES; i++)
        if (mmap(at + 2 * i * page_bytes, page_bytes, PROT_READ, MAP_SHARED | MAP_FIXED,
                 region_fd[0], (off_t)(i * page_bytes)) == MAP_FAILED)
            at = MAP_FAILED;
    return at == MAP_FAILED ? "ERROR mapping" : "OK in pieces";
}

/* A grandchild that nobody is the parent of, with all memory shared; it writes nothing. */
static void leave_orphan(char *text, size_t size)
{
    int pair[2];
    pid_t orphan = 0;
    if (pipe(pair) != 0)
        return;
    pid_t child = fork();
    if (child == 0) {
        orphan = fork();
        if (orphan == 0) {
            sleep(60);
            _exit(0);
        }
        mf_write_all(pair[1], &orphan, sizeof(orphan));
        _exit(0);
    }
    if (child > 0 && waitpid(child, NULL, 0) == child && read_all(pair[0], &orphan, sizeof(orphan)))
        snprintf(text, size, "OK %d", (int)orphan);
    close(pair[0]);
    close(pair[1]);
}

static void answer(int fd)
{
    char verb[16] = "", text[128] = "ERROR no such verb";
    const char *said = NULL;
    if (!read_all(fd, verb, sizeof(verb)))
        return;
    verb[sizeof(verb) - 1] = '\0';
    if (strcmp(verb, "pause") == 0) {
        park(true);
        said = "OK paused";
    } else if (strcmp(verb, "resume") == 0) {
        park(false);
        said = "OK runs";
    } else if (strcmp(verb, "save") == 0) {
        said = save(fd);
        if (!said)
            return;
    } else if (strcmp(verb, "load") == 0) {
        said = load(fd);
    } else if (strcmp(verb, "verify") == 0) {
        pthread_mutex_lock(&lock);
        verify_count = 0;
        verified_pages = 0;
        atomic_fetch_add(&verify_wanted, 1);
        while (verify_count != threads)
            pthread_cond_wait(&changed, &lock);
        snprintf(text, sizeof(text), "OK pages=%llu wrong=%llu", (unsigned long long)verified_pages,
                 (unsigned long long)wrong_pages);
        pthread_mutex_unlock(&lock);
    } else if (strcmp(verb, "serve") == 0) {
        said = serve_itself();
    } else if (strcmp(verb, "scatter") == 0) {
        said = scatter();
    } else if (strcmp(verb, "again") == 0) {
        said = map_again();
    } else if (strcmp(verb, "orphan") == 0) {
        leave_orphan(text, sizeof(text));
    } else if (strcmp(verb, "exec") == 0) {
        mf_write_all(fd, "OK", 2);
        close(fd);
        execl("/bin/sleep", "sleep", "1000", (char *)NULL);
    } else if (strcmp(verb, "status") == 0) {
        snprintf(text, sizeof(text), "OK beats=%llu wrong=%llu parked=%d",
                 (unsigned long long)beats, (unsigned long long)wrong_pages,
                 (int)atomic_load(&parked_wanted));
    }
    if (said)
        snprintf(text, sizeof(text), "%s", said);
    mf_write_all(fd, text, strlen(text));
}

static void set_up_memory(void)
{
    region_pages = region_bytes / page_bytes;
    for (unsigned i = 0; private_memory && i < regions; i++) {
        void *wanted = (void *)(uintptr_t)(PRIVATE_ADDR + ((uint64_t)i << 36));
        if (mmap(wanted, region_bytes, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE | MAP_NORESERVE, -1,
                 0) != wanted)
            die("mmap of private memory");
        if (huge && madvise(wanted, region_bytes, MADV_HUGEPAGE) != 0)
            die("MADV_HUGEPAGE");
    }
    for (unsigned i = 0; !private_memory && i < regions; i++) {
        char name[32];
        snprintf(name, sizeof(name), "heap%u", i);
        region_fd[i] = memfd_create(name, MFD_CLOEXEC | (hugetlb ? MFD_HUGETLB : 0u));
        if (region_fd[i] < 0 || ftruncate(region_fd[i], (off_t)region_bytes) != 0)
            die("memfd");
    }
    const uint64_t model_bytes = (regions * region_pages * sizeof(*model) + 4095) / 4096 * 4096;
    int flags = MAP_PRIVATE | MAP_ANONYMOUS, fd = -1;
    if (shared_model) {
        flags = MAP_SHARED;
        fd = memfd_create("model", MFD_CLOEXEC);
        if (fd < 0 || ftruncate(fd, (off_t)model_bytes) != 0)
            die("memfd of the model");
    }
    model = mmap(NULL, model_bytes, PROT_READ | PROT_WRITE, flags, fd, 0);
    if (model == MAP_FAILED)
        die("mmap of the model");
    for (unsigned i = 0; i < threads; i++) {
        worker[i].number = i;
        worker[i].random = seed * 1000 + i + (uint64_t)getpid() * 1000003;
        for (unsigned region = 0; region < regions; region++)
            for (unsigned chunk = 0; chunk < CHUNKS; chunk++) {
                worker[i].chunk[region][chunk] = map_chunk(&worker[i], region, chunk);
                if (private_memory || !strchr(ops, 'r'))
                    continue;
                worker[i].alias[region][chunk] =
                    mmap(NULL, chunk_pages() * page_bytes, PROT_READ, MAP_SHARED, region_fd[region],
                         (off_t)(first_page(&worker[i], chunk) * page_bytes));
                if (worker[i].alias[region][chunk] == MAP_FAILED)
                    die("mmap for reading");
            }
    }
    /* A program that has been at work for a while: half of its memory holds something. */
    for (unsigned i = 0; !waiting && i < threads; i++)
        for (unsigned region = 0; region < regions; region++)
            for (unsigned chunk = 0; chunk < CHUNKS; chunk++)
                for (uint64_t page = 0; page < chunk_pages(); page += 2)
                    write_page(&worker[i], region, first_page(&worker[i], chunk) + page,
                               worker[i].chunk[region][chunk] + page * page_bytes);
}

static struct sockaddr_un address_of(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof(address.sun_path), "%s", path);
    return address;
}

static int serve(const char *path)
{
    signal(SIGPIPE, SIG_IGN);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    set_up_memory();
    atomic_store(&parked_wanted, waiting);
    for (unsigned i = 0; i < threads; i++)
        if (pthread_create(&worker[i].thread, NULL, work, &worker[i]) != 0)
            die("pthread_create");
    pthread_t dropper;
    if (droppers && pthread_barrier_init(&drop_together, NULL, droppers) != 0)
        die("pthread_barrier_init");
    for (unsigned i = 0; i < droppers; i++)
        if (pthread_create(&dropper, NULL, drop, (void *)(uintptr_t)(i + 1)) != 0)
            die("pthread_create");
    struct sockaddr_un address = address_of(path);
    int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (listener < 0 || bind(listener, (struct sockaddr *)&address, sizeof(address)) != 0 ||
        listen(listener, 8) != 0)
        die("listening on %s", path);
    for (;;) {
        /* cppcheck-suppress nullPointer ; both may be: accept(2) */
        int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        if (fd < 0)
            continue;
        answer(fd);
        shutdown(fd, SHUT_RDWR); /* a child that was forked meanwhile has it too */
        close(fd);
    }
}

/* ---- the other side of it ---- */

static bool copy(int from, int to, uint64_t bytes)
{
    uint8_t buffer[65536];
    while (bytes > 0) {
        size_t want = bytes < sizeof(buffer) ? (size_t)bytes : sizeof(buffer);
        if (!read_all(from, buffer, want) || mf_write_all(to, buffer, want) < 0)
            return false;
        bytes -= want;
    }
    return true;
}

static int ask(const char *path, const char *verb)
{
    signal(SIGPIPE, SIG_IGN); /* one that refuses a state closes at once, and says why */
    char word[16] = "", text[256] = "";
    uint64_t bytes = 0;
    struct sockaddr_un address = address_of(path);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof(address)) != 0)
        die("connecting to %s", path);
    snprintf(word, sizeof(word), "%s", verb);
    if (mf_write_all(fd, word, sizeof(word)) < 0)
        die("asking");
    if (strcmp(verb, "save") == 0)
        return read_all(fd, &bytes, sizeof(bytes)) && copy(fd, STDOUT_FILENO, bytes) ? 0 : 1;
    if (strcmp(verb, "load") == 0) {
        /* All of the input: its end has to be where the state says. */
        size_t have = 0, room = 1 << 20;
        cleanup_free uint8_t *data = malloc(room);
        ssize_t n;
        while (data && (n = read(STDIN_FILENO, data + have, room - have)) > 0) {
            have += (size_t)n;
            if (have == room) {
                uint8_t *more = realloc(data, room *= 2);
                if (!more)
                    die("memory for the state");
                data = more;
            }
        }
        bytes = have;
        if (!data || mf_write_all(fd, &bytes, sizeof(bytes)) < 0)
            die("sending the state");
        mf_write_all(fd, data, have); /* refused on the way, it says why */
    }
    size_t have = 0;
    ssize_t n;
    while (have + 1 < sizeof(text) && (n = read(fd, text + have, sizeof(text) - 1 - have)) > 0)
        have += (size_t)n;
    text[have] = '\0';
    puts(text);
    return strncmp(text, "OK", 2) == 0 ? 0 : 1;
}

int main(int argc, char **argv)
{
    if (argc == 4 && strcmp(argv[1], "ask") == 0)
        return ask(argv[2], argv[3]);
    if (argc < 3 || strcmp(argv[1], "serve") != 0) {
        fprintf(stderr, "usage: program serve SOCKET [OPTION...] | ask SOCKET VERB\n");
        return 2;
    }
    for (int i = 3; i < argc; i++) {
        const char *value = i + 1 < argc ? argv[i + 1] : "";
        if (strcmp(argv[i], "--wait") == 0) {
            waiting = true;
            continue;
        }
        if (strcmp(argv[i], "--shared-model") == 0) {
            shared_model = true;
            continue;
        }
        if (strcmp(argv[i], "--private") == 0) {
            private_memory = true;
            continue;
        }
        if (strcmp(argv[i], "--thp") == 0) {
            huge = true;
            continue;
        }
        if (strcmp(argv[i], "--hugetlb") == 0) {
            hugetlb = true;
            page_bytes = UINT64_C(2) << 20;
            continue;
        }
        if (strcmp(argv[i], "--regions") == 0)
            regions = (unsigned)strtoul(value, NULL, 10);
        else if (strcmp(argv[i], "--mib") == 0)
            region_bytes = strtoull(value, NULL, 10) << 20;
        else if (strcmp(argv[i], "--threads") == 0)
            threads = (unsigned)strtoul(value, NULL, 10);
        else if (strcmp(argv[i], "--droppers") == 0)
            droppers = (unsigned)strtoul(value, NULL, 10);
        else if (strcmp(argv[i], "--ops") == 0)
            ops = value;
        else if (strcmp(argv[i], "--seed") == 0)
            seed = strtoull(value, NULL, 10);
        else
            die("%s is not understood", argv[i]);
        i++;
    }
    if (!regions || regions > REGIONS_MAX || !threads || threads > THREADS_MAX ||
        region_bytes / page_bytes / threads / CHUNKS == 0)
        die("the memory can't be divided so");
    return serve(argv[2]);
}
