/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A target: threads that read, write, discard, move, duplicate, cut, grow, replace and protect
 * parts of their address space, and fork children that do so too.
 *
 * A mapping belongs to the thread that made it, so that the model of an address is exact; what a
 * page of a file holds is its owner's to change (stress.h).
 */
#include "tests/stress/stress.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "lib/uapi.h"
#include "lib/uffd.h"
#include "lib/util.h"

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif
#define NOBODY UINT32_MAX
#define RUN_MAX 12u /* pages that most operations are for, at most */

struct thread {
    pthread_t thread;
    uint32_t owner; /**< number among all threads of all processes, or NOBODY: owns no page */
    unsigned depth; /**< 0: the target's own, 1: in a child, 2: in a grandchild */
    uint64_t random;
    struct slot *slot;
    struct space space;
    struct page_model *plain;
    uint64_t anonymous_next[REGIONS_MAX], anonymous_end[REGIONS_MAX]; /**< not mapped yet */
    int scratch_fd;
    pid_t orphan; /**< a child that nobody waits for … */
    bool alone;   /**< … is this, which may be killed at any moment */
};

/** struct run - pages of an extent. */
struct run {
    uint8_t *at;
    uint32_t pages;
    bool file;
    const uint16_t *id; /**< in the extent: gone once that is changed */
};

static struct thread *threads;
static struct page_model *region_model;
static struct serving *serving; /* NULL: another process serves */
static int request_socket;
static pthread_mutex_t request_lock = PTHREAD_MUTEX_INITIALIZER;
static uint32_t context_number[CONTEXTS_MAX];
static int context_uffd[CONTEXTS_MAX];

static bool is_file(void)
{
    return config.memory != MEMFERRY_ANONYMOUS;
}

/* ---- the watchdog's view ---- */

static void begin(struct thread *t, const char *what, const void *at)
{
    atomic_store(&t->slot->what, what);
    atomic_store(&t->slot->addr, (uintptr_t)at);
    atomic_store(&t->slot->since_ns, mf_now_ns());
}

static void end(struct thread *t)
{
    atomic_store(&t->slot->touches, false);
    const uint64_t took_ns = mf_now_ns() - atomic_exchange(&t->slot->since_ns, 0);
    uint64_t longest = atomic_load(&shared->longest_wait_ns);
    while (took_ns > longest &&
           !atomic_compare_exchange_weak(&shared->longest_wait_ns, &longest, took_ns))
        ;
}

static void take_slot(struct thread *t, struct slot *slot)
{
    t->slot = slot;
    atomic_store(&slot->since_ns, 0);
    atomic_store(&slot->pid, getpid());
    atomic_store(&slot->tid, gettid());
}

/* MF_TRACE=1: what is done to which pages, as it is done. */
static bool tracing;

static void trace(const struct thread *t, const char *what, const struct run *run, const void *to,
                  uint32_t to_pages)
{
    if (!tracing)
        return;
    char text[256];
    const unsigned page = run->id ? run->id[0] : 0;
    int length = snprintf(text, sizeof(text), "%d/%u: %s %p +%u (page %u ...)", gettid(), t->depth,
                          what, (void *)run->at, run->pages, page);
    if (to_pages)
        length +=
            snprintf(text + length, sizeof(text) - (size_t)length, " to %p +%u", to, to_pages);
    text[length++] = '\n';
    mf_write_all(STDERR_FILENO, text, (size_t)length);
}

/* ---- the server ---- */

static int request_fd(const struct request *request, int fd)
{
    if (serving)
        return serving_request(serving, request, fd);
    union {
        struct cmsghdr header;
        char room[CMSG_SPACE(sizeof(int))];
    } control = {0};
    struct iovec part = {(void *)(uintptr_t)request, sizeof(*request)};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    if (fd >= 0) {
        message.msg_control = &control;
        message.msg_controllen = sizeof(control);
        control.header = (struct cmsghdr){
            .cmsg_len = CMSG_LEN(sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
        memcpy(CMSG_DATA(&control.header), &fd, sizeof(fd));
    }
    int answer = -EIO;
    pthread_mutex_lock(&request_lock);
    need(sendmsg(request_socket, &message, MSG_NOSIGNAL) == (ssize_t)sizeof(*request));
    need(recv(request_socket, &answer, sizeof(answer), 0) == (ssize_t)sizeof(answer));
    pthread_mutex_unlock(&request_lock);
    return answer;
}

static int ask_server(const struct request *request)
{
    return request_fd(request, -1);
}

static void serve_mapping(const void *at, uint32_t region, uint64_t first_page, uint64_t pages,
                          uint32_t context)
{
    const struct request request = {.kind = REQUEST_ADD,
                                    .context = context_number[context],
                                    .region = region,
                                    .start_addr = (uintptr_t)at,
                                    .first_page = first_page,
                                    .pages = pages};
    const int answer = ask_server(&request);
    if (answer < 0)
        fprintf(stderr, "a mapping could not be added: %s\n", strerrorname_np(-answer));
    need(answer == 0);
}

/* ---- pages ---- */

static struct page_model *model_of(const struct thread *t, uint32_t id)
{
    return id < REGION_IDS ? &region_model[id] : &t->plain[id - t->space.first_plain];
}

/* Is it this thread's to change? */
static bool owns(const struct thread *t, uint32_t id)
{
    if (!is_file() || id >= REGION_IDS)
        return true;
    const uint64_t page = id % config.pages, frozen = config.pages / 4;
    const uint64_t owners = config.processes * config.threads;
    return page >= frozen && (page - frozen) * owners / (config.pages - frozen) == t->owner;
}

static bool is_frozen(uint32_t id)
{
    return is_file() && id < REGION_IDS && id % config.pages < config.pages / 4;
}

static void set_generation(struct page_model *model, uint32_t generation)
{
    atomic_store(&model->generation, generation);
    atomic_store(&model->next, generation);
}

static void wrong(const void *at, uint32_t id, uint32_t generation, uint32_t next, const char *when)
{
    pattern_tell(at, id, generation, next, when);
    atomic_fetch_add(&shared->wrong_pages, 1);
    atomic_store(&shared->stop, true);
}

static void verify(struct thread *t, const uint8_t *at, uint32_t id, const char *when)
{
    struct page_model *model = model_of(t, id);
    atomic_store(&t->slot->id, id);
    atomic_store(&t->slot->touches, true);
    begin(t, when, at);
    pattern_touch(at);
    end(t);
    atomic_fetch_add_explicit(&shared->verified_pages, 1, memory_order_relaxed);
    if (!owns(t, id) && !is_frozen(id)) {
        if (!pattern_is_of(at, id))
            wrong(at, id, 0, 0, when);
        return;
    }
    const uint32_t generation = atomic_load(&model->generation), next = atomic_load(&model->next);
    if (pattern_is(at, id, generation)) {
        set_generation(model, generation); /* if it was not certain, now it is */
        return;
    }
    if (next != generation && pattern_is(at, id, next)) {
        set_generation(model, next);
        return;
    }
    wrong(at, id, generation, next, when);
}

static uint32_t new_generation(void)
{
    return atomic_fetch_add(&shared->generation, 1) + 1;
}

static void write_page(struct thread *t, uint8_t *at, uint32_t id)
{
    struct page_model *model = model_of(t, id);
    const uint32_t generation = new_generation();
    atomic_store(&model->next, generation);
    trace(t, "write", &(struct run){at, 1, false, &(uint16_t){(uint16_t)id}}, NULL, 0);
    atomic_store(&t->slot->id, id);
    atomic_store(&t->slot->touches, true);
    begin(t, "write", at);
    pattern_touch_write(at);
    end(t);
    pattern_fill(at, id, generation);
    set_generation(model, generation);
}

/* ---- choosing ---- */

static bool pick(struct thread *t, uint32_t most, struct run *run)
{
    if (t->space.count == 0)
        return false;
    const struct extent *extent = &t->space.extent[draw(&t->random, t->space.count)];
    const uint32_t from = (uint32_t)draw(&t->random, extent->pages);
    const uint32_t left = extent->pages - from;
    run->at = extent->at + from * config.page_bytes;
    run->pages = 1 + (uint32_t)draw(&t->random, left < most ? left : most);
    run->file = extent->file;
    run->id = extent->id + from;
    return true;
}

static uint64_t bytes_of(uint32_t pages)
{
    return pages * config.page_bytes;
}

/* Room for @pages where this thread has something else mapped. Return: NULL: not this time. */
static uint8_t *pick_occupied(struct thread *t, const struct run *beside, uint32_t pages)
{
    const struct extent *extent = &t->space.extent[draw(&t->random, t->space.count)];
    if (extent->pages < pages)
        return NULL;
    uint8_t *at = extent->at + bytes_of((uint32_t)draw(&t->random, extent->pages - pages + 1));
    return at >= beside->at + bytes_of(beside->pages) || at + bytes_of(pages) <= beside->at ? at
                                                                                            : NULL;
}

/* The owned pages from a random one on. */
static bool pick_owned(struct thread *t, struct run *run)
{
    for (unsigned tries = 0; tries < 8; tries++) {
        if (!pick(t, RUN_MAX, run))
            return false;
        uint32_t pages = 0;
        while (pages < run->pages && owns(t, run->id[pages]))
            pages++;
        run->pages = pages;
        if (pages > 0)
            return true;
    }
    return false;
}

/* An address range that nothing uses, aligned to the page size. */
static uint8_t *reserve(uint32_t pages)
{
    const uint64_t bytes = bytes_of(pages), more = bytes + config.page_bytes;
    uint8_t *at = mmap(NULL, more, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    need(at != MAP_FAILED);
    uint8_t *aligned =
        (uint8_t *)(((uintptr_t)at + config.page_bytes - 1) & ~(uintptr_t)(config.page_bytes - 1));
    if (aligned > at)
        munmap(at, (size_t)(aligned - at));
    if (at + more > aligned + bytes)
        munmap(aligned + bytes, (size_t)(at + more - (aligned + bytes)));
    return aligned;
}

/* mremap(2) may be refused (a mapping that another thread's mprotect(2) has split; hugetlbfs): then
 * what it may have done to the places is undone by unmapping both. */
static bool moved(struct thread *t, void *result, const struct run *from, uint8_t *to,
                  uint32_t to_pages)
{
    if (result != MAP_FAILED)
        return true;
    need(errno == EFAULT || errno == EINVAL || errno == ENOMEM);
    atomic_fetch_add(&shared->refused, 1);
    begin(t, "munmap", from->at);
    munmap(from->at, bytes_of(from->pages));
    if (to)
        munmap(to, bytes_of(to_pages));
    end(t);
    space_cut(&t->space, from->at, from->pages, false);
    if (to)
        space_cut(&t->space, to, to_pages, false);
    return false;
}

/* ---- what a thread does ---- */

static void do_verify(struct thread *t)
{
    struct run run;
    if (!pick(t, RUN_MAX, &run))
        return;
    for (uint32_t i = 0; i < run.pages; i++)
        verify(t, run.at + bytes_of(i), run.id[i], "read");
}

static void do_write(struct thread *t)
{
    struct run run;
    if (!pick_owned(t, &run))
        return;
    for (uint32_t i = 0; i < run.pages && i < 3; i++)
        write_page(t, run.at + bytes_of(i), run.id[i]);
}

/* How many pages a run can have at most if it grows. */
static uint32_t may_grow(struct thread *t, const struct run *run)
{
    uint32_t more = 1 + (uint32_t)draw(&t->random, RUN_MAX);
    if (config.memory == MEMFERRY_HUGETLB)
        return 0;
    if (run->file) {
        const uint64_t last = run->id[run->pages - 1] % config.pages;
        const uint64_t left = config.pages - 1 - last;
        more = left < more ? (uint32_t)left : more;
    }
    return run->pages + more > REGION_PAGES_MAX || !space_room(&t->space, more) ? 0 : more;
}

/* The ids of a run at its new place, of another length maybe. */
static void new_ids(struct thread *t, const struct run *run, uint16_t *id, uint32_t pages)
{
    const uint32_t same = run->pages < pages ? run->pages : pages;
    memcpy(id, run->id, same * sizeof(*id));
    if (pages > same && run->file)
        for (uint32_t i = same; i < pages; i++)
            id[i] = (uint16_t)(id[i - 1] + 1);
    else if (pages > same)
        space_new_plain(&t->space, id + same, pages - same);
}

static void drop_plain(struct space *space, const uint16_t *id, uint32_t pages)
{
    for (uint32_t i = 0; i < pages; i++)
        if (id[i] >= space->first_plain)
            space->free_id[space->free_count++] = id[i];
}

/* Moved, moved and grown, moved and shrunk; to a free place or onto what this thread maps. */
static void do_move(struct thread *t)
{
    struct run run;
    uint16_t id[REGION_PAGES_MAX];
    if (!space_room(&t->space, RUN_MAX) || !pick(t, REGION_PAGES_MAX, &run))
        return;
    uint32_t pages = run.pages;
    const uint64_t how = draw(&t->random, 4);
    if (how == 0)
        pages = 1 + (uint32_t)draw(&t->random, pages);
    else if (how == 1)
        pages += may_grow(t, &run);
    uint8_t *to = draw(&t->random, 3) == 0 ? pick_occupied(t, &run, pages) : NULL;
    if (!to)
        to = reserve(pages);
    trace(t, "move", &run, to, pages);
    begin(t, "mremap", run.at);
    void *at =
        mremap(run.at, bytes_of(run.pages), bytes_of(pages), MREMAP_MAYMOVE | MREMAP_FIXED, to);
    end(t);
    if (!moved(t, at, &run, to, pages))
        return;
    new_ids(t, &run, id, pages);
    if (pages < run.pages)
        drop_plain(&t->space, run.id + pages, run.pages - pages);
    const bool file = run.file;
    space_cut(&t->space, run.at, run.pages, true);
    space_cut(&t->space, to, pages, false);
    space_add(&t->space, to, file, id, pages);
}

/* In place if the kernel finds room behind it, of which nothing is told. */
static void do_grow(struct thread *t)
{
    struct run run;
    uint16_t id[REGION_PAGES_MAX];
    if (!space_room(&t->space, RUN_MAX) || !pick(t, REGION_PAGES_MAX, &run))
        return;
    const uint32_t more = may_grow(t, &run);
    const struct extent *extent = &t->space.extent[0];
    for (unsigned i = 1; i < t->space.count; i++)
        if (run.id >= t->space.extent[i].id &&
            run.id < t->space.extent[i].id + t->space.extent[i].pages)
            extent = &t->space.extent[i];
    run.pages = extent->pages - (uint32_t)(run.id - extent->id); /* to its end */
    if (more == 0 || run.pages + more > REGION_PAGES_MAX || may_grow(t, &run) == 0 ||
        (run.file && run.id[run.pages - 1] % config.pages + more >= config.pages))
        return;
    trace(t, "grow", &run, NULL, run.pages + more);
    begin(t, "mremap", run.at);
    uint8_t *at = mremap(run.at, bytes_of(run.pages), bytes_of(run.pages + more), MREMAP_MAYMOVE);
    end(t);
    if (!moved(t, at, &run, NULL, 0))
        return;
    new_ids(t, &run, id, run.pages + more);
    const bool file = run.file;
    space_cut(&t->space, run.at, run.pages, true);
    space_add(&t->space, at, file, id, run.pages + more);
}

/* A second mapping of the same: an old length of 0, or MREMAP_DONTUNMAP, which leaves what is
 * private behind empty. */
static void do_duplicate(struct thread *t)
{
    struct run run;
    uint16_t id[REGION_PAGES_MAX], left[REGION_PAGES_MAX];
    if (!pick(t, 64, &run) || !space_room(&t->space, run.pages))
        return;
    const bool whole = !run.file || draw(&t->random, 2);
    uint8_t *to = reserve(run.pages);
    trace(t, whole ? "leave (MREMAP_DONTUNMAP)" : "duplicate", &run, to, run.pages);
    begin(t, "mremap", run.at);
    uint8_t *at = whole ? mremap(run.at, bytes_of(run.pages), bytes_of(run.pages),
                                 MREMAP_MAYMOVE | MREMAP_DONTUNMAP | MREMAP_FIXED, to)
                        : mremap(run.at, 0, bytes_of(run.pages), MREMAP_MAYMOVE | MREMAP_FIXED, to);
    end(t);
    if (!moved(t, at, &run, to, run.pages))
        return;
    memcpy(id, run.id, run.pages * sizeof(id[0]));
    const bool file = run.file;
    if (!file) {
        space_new_plain(&t->space, left, run.pages);
        space_cut(&t->space, run.at, run.pages, true);
        space_add(&t->space, run.at, false, left, run.pages);
    }
    space_add(&t->space, to, file, id, run.pages);
}

static void do_unmap(struct thread *t)
{
    struct run run;
    if (t->space.count + 3 > EXTENTS_MAX) {
        const struct extent *extent = &t->space.extent[draw(&t->random, t->space.count)];
        run = (struct run){.at = extent->at, .pages = extent->pages};
    } else if (!pick(t, REGION_PAGES_MAX, &run)) {
        return;
    }
    trace(t, "unmap", &run, NULL, 0);
    begin(t, "munmap", run.at);
    need(munmap(run.at, bytes_of(run.pages)) == 0);
    end(t);
    space_cut(&t->space, run.at, run.pages, false);
}

/* Memory of another kind takes its place; a page that is still on its way must not land in it. */
static void do_map_over(struct thread *t)
{
    struct run run;
    uint16_t id[REGION_PAGES_MAX];
    if (!pick(t, RUN_MAX, &run) || !space_room(&t->space, run.pages))
        return;
    trace(t, "map over", &run, NULL, 0);
    begin(t, "mmap over", run.at);
    void *at = mmap(run.at, bytes_of(run.pages), PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    end(t);
    need(at == run.at);
    space_cut(&t->space, run.at, run.pages, false);
    space_new_plain(&t->space, id, run.pages);
    space_add(&t->space, run.at, false, id, run.pages);
    if (draw(&t->random, 2))
        write_page(t, run.at, id[0]);
}

/* The region once more: elsewhere, or over what is there. */
static void map_file(struct thread *t, uint8_t *over, uint32_t pages)
{
    uint16_t id[REGION_PAGES_MAX];
    const uint32_t region = (uint32_t)draw(&t->random, config.regions);
    pages = pages < config.pages ? pages : (uint32_t)config.pages;
    const uint64_t first = draw(&t->random, config.pages - pages + 1);
    uint8_t *at = over ? over : reserve(pages);
    begin(t, "mmap", at);
    void *got = mmap(at, bytes_of(pages), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
                     region_fd[region], (off_t)(first * config.page_bytes));
    end(t);
    need(got == at);
    trace(t, "map", &(struct run){.at = at, .pages = (uint32_t)pages},
          (void *)(uintptr_t)region_id(region, first), 1);
    begin(t, "adding a mapping", at);
    serve_mapping(at, region, first, pages, (uint32_t)draw(&t->random, config.contexts));
    end(t);
    if (over)
        space_cut(&t->space, at, pages, false);
    for (uint32_t i = 0; i < pages; i++)
        id[i] = (uint16_t)region_id(region, first + i);
    space_add(&t->space, at, true, id, pages);
}

/* More of a region of private memory: pages that were nowhere until now. */
static void map_anonymous(struct thread *t, uint32_t region, uint64_t pages)
{
    uint16_t id[REGION_PAGES_MAX];
    const uint64_t first = t->anonymous_next[region], left = t->anonymous_end[region] - first;
    pages = pages < left ? pages : left;
    if (pages == 0)
        return;
    uint8_t *at = reserve((uint32_t)pages);
    need(mmap(at, bytes_of((uint32_t)pages), PROT_READ | PROT_WRITE,
              MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == at);
    trace(t, "map", &(struct run){.at = at, .pages = (uint32_t)pages},
          (void *)(uintptr_t)region_id(region, first), 1);
    begin(t, "adding a mapping", at);
    serve_mapping(at, region, first, pages, (uint32_t)draw(&t->random, config.contexts));
    end(t);
    t->anonymous_next[region] += pages;
    for (uint32_t i = 0; i < pages; i++) {
        id[i] = (uint16_t)region_id(region, first + i);
        atomic_store(&shared->mapped[id[i]], true);
    }
    space_add(&t->space, at, false, id, (uint32_t)pages);
}

static void do_map(struct thread *t)
{
    struct run run;
    if (!space_room(&t->space, 0))
        return;
    if (!is_file())
        map_anonymous(t, (uint32_t)draw(&t->random, config.regions), 1 + draw(&t->random, 24));
    else if (draw(&t->random, 2) && pick(t, RUN_MAX, &run))
        map_file(t, run.at, run.pages);
    else
        map_file(t, NULL, 1 + (uint32_t)draw(&t->random, 48));
}

/* A file keeps what it holds; of a page that had not come yet the server can't always tell that the
 * file was to keep it: then it is zeros from now on. */
static void do_dontneed(struct thread *t)
{
    struct run run;
    if (!pick_owned(t, &run))
        return;
    for (uint32_t i = 0; i < run.pages; i++) {
        struct page_model *model = model_of(t, run.id[i]);
        const uint32_t initial = run.id[i] < REGION_IDS ? initial_generation(run.id[i]) : 0;
        if (!run.file || (initial && atomic_load(&model->generation) == initial))
            atomic_store(&model->next, 0);
    }
    trace(t, "drop", &run, NULL, 0);
    begin(t, "madvise(MADV_DONTNEED)", run.at);
    need(madvise(run.at, bytes_of(run.pages), MADV_DONTNEED) == 0);
    end(t);
    for (uint32_t i = 0; i < run.pages && !run.file; i++)
        set_generation(model_of(t, run.id[i]), 0);
}

static void do_remove(struct thread *t)
{
    struct run run;
    if (!pick_owned(t, &run) || !run.file)
        return;
    for (uint32_t i = 0; i < run.pages; i++)
        atomic_store(&model_of(t, run.id[i])->next, 0);
    trace(t, "remove", &run, NULL, 0);
    begin(t, "madvise(MADV_REMOVE)", run.at);
    need(madvise(run.at, bytes_of(run.pages), MADV_REMOVE) == 0);
    end(t);
    for (uint32_t i = 0; i < run.pages; i++)
        set_generation(model_of(t, run.id[i]), 0);
}

/* Of a punch no event tells, so the server does it. */
static void do_punch(struct thread *t)
{
    struct run run;
    if (!pick_owned(t, &run) || !run.file)
        return;
    const uint32_t region = (uint32_t)(run.id[0] / config.pages);
    const uint64_t first = run.id[0] % config.pages;
    for (uint32_t i = 0; i < run.pages; i++)
        atomic_store(&model_of(t, run.id[i])->next, 0);
    trace(t, "punch", &run, NULL, 0);
    begin(t, "punching a hole", run.at);
    need(ask_server(&(struct request){
             .kind = REQUEST_DISCARD, .region = region, .first_page = first, .pages = run.pages}) ==
         0);
    end(t);
    for (uint32_t i = 0; i < run.pages; i++)
        set_generation(model_of(t, run.id[i]), 0);
}

static void do_protect(struct thread *t)
{
    struct run run;
    if (!pick(t, 4, &run))
        return;
    trace(t, "protect", &run, NULL, 0);
    begin(t, "mprotect", run.at);
    need(mprotect(run.at, bytes_of(run.pages), PROT_NONE) == 0);
    end(t);
    if (draw(&t->random, 2))
        nap_us((unsigned)draw(&t->random, 500)); /* pages come meanwhile */
    need(mprotect(run.at, bytes_of(run.pages), PROT_READ) == 0);
    for (uint32_t i = 0; i < run.pages; i++)
        verify(t, run.at + bytes_of(i), run.id[i], "read where writing is forbidden");
    need(mprotect(run.at, bytes_of(run.pages), PROT_READ | PROT_WRITE) == 0);
}

/* The kernel touches the page in place of the thread. */
static void do_kernel(struct thread *t)
{
    static _Thread_local uint8_t copy[4096];
    /* A child writes beside its parent. */
    const off_t scratch_at = (t->slot - shared->slot) * (off_t)sizeof(copy);
    struct run run;
    if (!pick(t, RUN_MAX, &run))
        return;
    if (config.page_bytes > sizeof(copy) || draw(&t->random, 2)) {
        begin(t, "madvise(MADV_POPULATE_READ)", run.at);
        (void)madvise(run.at, bytes_of(run.pages), MADV_POPULATE_READ);
        end(t);
        return;
    }
    for (uint32_t i = 0; i < run.pages; i++) {
        begin(t, "write(2) from it", run.at + bytes_of(i));
        need(pwrite(t->scratch_fd, run.at + bytes_of(i), sizeof(copy), scratch_at) == sizeof(copy));
        end(t);
        if (!owns(t, run.id[i]))
            continue;
        verify(t, run.at + bytes_of(i), run.id[i], "read after write(2) from it");
        need(pread(t->scratch_fd, copy, sizeof(copy), scratch_at) == sizeof(copy));
        if (!pattern_is(copy, run.id[i], atomic_load(&model_of(t, run.id[i])->generation)))
            wrong(copy, run.id[i], atomic_load(&model_of(t, run.id[i])->generation), 0,
                  "what write(2) took");
    }
}

/* ---- children ---- */

/* glibc's fork(2) holds malloc's locks, as a real program's does. A thread sanitizer would hold its
 * own, which its runtime needs on the thread that serves. */
static pid_t fork_now(void)
{
#ifdef __SANITIZE_THREAD__
    return _Fork();
#else
    return fork();
#endif
}

static void work_once(struct thread *t);

static void verify_everything(struct thread *t, const char *when)
{
    for (unsigned i = 0; i < t->space.count; i++) {
        const struct extent *extent = &t->space.extent[i];
        for (uint32_t page = 0; page < extent->pages; page++)
            verify(t, extent->at + bytes_of(page), extent->id[page], when);
    }
}

/* Not by _exit(3): a thread sanitizer would miss the parent's threads in a child. */
__attribute__((noreturn)) static void leave(int status)
{
    for (;;)
        syscall(SYS_exit_group, status);
}

__attribute__((noreturn)) static void be_child(struct thread *t, bool waited_for)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    t->depth++;
    take_slot(t, t->slot + (waited_for ? 1 : 3));
    t->alone = !waited_for;
    if (t->alone && is_file())
        t->owner = NOBODY; /* its parent changes those pages meanwhile */
    t->orphan = 0;
    /* Where a child maps what is learned from its first fault. */
    do_verify(t);
    const uint64_t wrong_before = atomic_load(&shared->wrong_pages);
    for (uint64_t i = draw(&t->random, 8); i > 0; i--)
        (config.quiet_children ? do_verify : work_once)(t);
    if (draw(&t->random, 4) == 0)
        verify_everything(t, "read by a child");
    if (atomic_load(&shared->wrong_pages) != wrong_before)
        leave(1);
    if (draw(&t->random, 6) == 0) {
        atomic_fetch_add(&shared->execs, 1);
        execl("/proc/self/exe", "stress", "exec-child", (char *)NULL);
        leave(2);
    }
    leave(0);
}

static void reap(struct thread *t, pid_t pid, struct slot *slot, bool killed)
{
    int status = 0;
    begin(t, "waiting for a child", NULL);
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
        ;
    end(t);
    atomic_store(&slot->since_ns, 0); /* it may have been killed while it waited */
    if (killed && WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL)
        return;
    if (WIFEXITED(status) && WEXITSTATUS(status) == 0)
        return;
    fprintf(stderr, "WRONG a child ended with status %#x\n", (unsigned)status);
    atomic_fetch_add(&shared->wrong_pages, 1);
    atomic_store(&shared->stop, true);
}

static void reap_orphan(struct thread *t)
{
    if (t->orphan == 0)
        return;
    const bool killed = draw(&t->random, 3) == 0;
    if (killed && kill(t->orphan, SIGKILL) == 0)
        atomic_fetch_add(&shared->kills, 1);
    reap(t, t->orphan, t->slot + 3, killed);
    t->orphan = 0;
}

static void do_fork(struct thread *t)
{
    const bool waited_for = t->depth > 0 || draw(&t->random, 2);
    if (t->depth >= 2 || t->alone)
        return;
    if (!waited_for)
        reap_orphan(t);
    trace(t, waited_for ? "fork" : "fork alone", &(struct run){0}, NULL, 0);
    begin(t, "fork", NULL);
    pid_t pid = fork_now();
    if (pid == 0)
        be_child(t, waited_for);
    end(t);
    need(pid > 0);
    atomic_fetch_add(&shared->forks, 1);
    if (waited_for)
        reap(t, pid, t->slot + 1, false);
    else
        t->orphan = pid;
}

/* ---- the way of a thread ---- */

struct operation {
    void (*body)(struct thread *t);
    unsigned weight;
    bool in_child; /**< a child may do it: it asks nothing of the server */
};

static const struct operation operations[] = {
    {do_verify, 30, true},   {do_write, 14, true}, {do_move, 7, true},     {do_grow, 3, true},
    {do_duplicate, 4, true}, {do_unmap, 2, true},  {do_map_over, 2, true}, {do_map, 9, false},
    {do_dontneed, 5, true},  {do_remove, 5, true}, {do_punch, 4, false},   {do_protect, 4, true},
    {do_kernel, 4, true},    {do_fork, 2, true},
};

static void work_once(struct thread *t)
{
    unsigned all = 0;
    const struct operation *operation = operations;
    for (size_t i = 0; i < sizeof(operations) / sizeof(operations[0]); i++)
        all += operations[i].weight;
    for (uint64_t at = draw(&t->random, all); at >= operation->weight; operation++)
        at -= operation->weight;
    if (t->space.count + 3 > EXTENTS_MAX)
        do_unmap(t);
    if (t->depth == 0 || operation->in_child)
        operation->body(t);
    atomic_fetch_add_explicit(&shared->operations, 1, memory_order_relaxed);
}

static void *work(void *argument)
{
    struct thread *t = argument;
    take_slot(t, t->slot);
    for (unsigned i = 0; i < config.operations && !atomic_load(&shared->stop); i++) {
        work_once(t);
        if (t->space.count == 0 || draw(&t->random, 64) == 0)
            do_map(t);
    }
    reap_orphan(t);
    verify_everything(t, "read at the end");
    return NULL;
}

/* ---- the process ---- */

static void set_up_thread(struct thread *t, unsigned process, unsigned number)
{
    const uint32_t owner = process * config.threads + number;
    *t = (struct thread){.owner = owner,
                         .random = config.seed * 64 + owner,
                         .slot = &shared->slot[owner * SLOTS_OF_THREAD]};
    t->plain = calloc(PLAIN_IDS, sizeof(*t->plain));
    t->scratch_fd = memfd_create("memferry-stress-scratch", MFD_CLOEXEC);
    need(t->plain && t->scratch_fd >= 0);
    space_init(&t->space, t->plain, REGION_IDS + owner * PLAIN_IDS);
    take_slot(t, t->slot);
    for (uint32_t region = 0; region < config.regions; region++) {
        if (is_file()) {
            map_file(t, NULL, (uint32_t)config.pages / 2);
            continue;
        }
        t->anonymous_next[region] = config.pages * number / config.threads;
        t->anonymous_end[region] = config.pages * (number + 1) / config.threads;
        map_anonymous(t, region, config.pages / config.threads / 3);
    }
}

static void open_contexts(void)
{
    for (unsigned i = 0; i < config.contexts; i++) {
        /* It stays open: the server must not hold the last reference while pages are missing. */
        int uffd = mf_uffd_open();
        need(uffd >= 0);
        int context = request_fd(&(struct request){.kind = REQUEST_ADOPT, .pid = getpid()}, uffd);
        if (context < 0)
            fprintf(stderr, "a userfaultfd could not be adopted: %s\n", strerrorname_np(-context));
        need(context >= 0);
        context_number[i] = (uint32_t)context;
        context_uffd[i] = uffd;
    }
}

static void set_up_model(void)
{
    region_model = shared->page;
    if (is_file())
        return;
    /* In memory that children of fork(2) get a copy of, as they do of the pages. */
    region_model = calloc(REGION_IDS, sizeof(*region_model));
    need(region_model);
    for (uint32_t id = 0; id < REGION_IDS; id++)
        set_generation(&region_model[id], initial_generation(id));
}

/* When all is lost anyway: the watchdog wants to know. */
static void tell(int number)
{
    (void)number;
    if (serving)
        serving_tell(serving, atomic_load(&shared->tell_id), atomic_load(&shared->tell_addr));
}

int target_main(unsigned number, int requests)
{
    const unsigned descriptors = open_descriptors();
    request_socket = requests;
    signal(SIGUSR1, tell);
    tracing = getenv("MF_TRACE") != NULL;
    serving = requests < 0 ? serving_start() : NULL;
    threads = calloc(config.threads, sizeof(*threads));
    need(threads);
    set_up_model();
    open_contexts();
    for (unsigned i = 0; i < config.threads; i++)
        set_up_thread(&threads[i], number, i);
    atomic_fetch_add(&shared->set_up, 1);
    for (unsigned i = 0; i < config.threads; i++)
        need(pthread_create(&threads[i].thread, NULL, work, &threads[i]) == 0);
    for (unsigned i = 0; i < config.threads; i++)
        pthread_join(threads[i].thread, NULL);
    bool right = !atomic_load(&shared->stop);
    if (right) {
        need(ask_server(&(struct request){.kind = REQUEST_FINISH}) == 0);
        /* Nobody serves any more, and nothing is missing. */
        for (unsigned i = 0; i < config.threads; i++) {
            take_slot(&threads[i], threads[i].slot);
            verify_everything(&threads[i], "read after the server's end");
        }
    }
    for (unsigned i = 0; i < config.threads; i++) {
        free(threads[i].plain);
        close(threads[i].scratch_fd);
    }
    free(threads);
    if (!is_file())
        free(region_model);
    serving_free(serving);
    for (unsigned i = 0; i < config.contexts; i++)
        close(context_uffd[i]);
    const unsigned left = open_descriptors();
    if (left != descriptors)
        fprintf(stderr, "a target had %u descriptors before, %u afterwards\n", descriptors, left);
    right &= left == descriptors;
    return right && !atomic_load(&shared->stop) ? 0 : 1;
}
