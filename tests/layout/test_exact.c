/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Serve a process that changes its layout in every way, in several threads and children at once,
 * while its pages arrive: lib/events.c, lib/land.c and lib/resolve.c over real userfaultfds, with
 * landing threads beside the one that reads events, as in the mover.
 *
 * Every page of the files holds something else at first (as an older precopy round might have left
 * it): a page that is resolved too early, or at the wrong place, or that comes back after it was
 * discarded, is found by whoever looks. The shifter knows what each of its pages must hold.
 *
 * Usage: test_exact SHIFTER. MF_SEED=n repeats a run (as far as threads repeat), MF_RUNS=n, else 6;
 * MF_THREADS=n.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "daemon/mover/companion.h"
#include "daemon/mover/mover.h"
#include "lib/events.h"
#include "lib/land.h"
#include "lib/uffd.h"
#include "lib/util.h"
#include "tests/layout/shifter.h"

#define LANDERS 2u
#define RUN_PAGES 16u
#define ASKED_ROOM 65536u
/* A page that nobody brings is found by this, not by a measurement. */
#define STUCK_NS UINT64_C(20000000000)
#define SETTLE_NS UINT64_C(600000000) /**< the layout goes on changing when all has arrived */

static struct shared *shared;
static pid_t shifter;
static struct mf_region region[THREADS_MAX];
static struct mf_pages pages[THREADS_MAX];
static struct mf_layout layout;
static struct mf_contexts contexts;
static struct mf_gate gate;
static struct mf_events events;
static struct mf_lander reader_lander;
static _Atomic uint64_t missing, faults, discarded, unknown, strangers;
static _Atomic bool stop;
static int epoll_fd;

/* What was asked for: the landing threads bring it first. */
static pthread_mutex_t asked_lock = PTHREAD_MUTEX_INITIALIZER;
static struct asked {
    uint32_t region;
    uint64_t page;
} asked[ASKED_ROOM];
static unsigned asked_count;

static struct companion companion;

static _Noreturn void fail(const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    vfprintf(stderr, fmt, ap);
    va_end(ap);
    fprintf(stderr, "\nMF_SEED=%llu\n", (unsigned long long)shared->seed);
    kill(shifter, SIGKILL);
    exit(1);
}

/* ---- what the lander and the reader tell ---- */

static void served(void *arg, uint32_t index, uint64_t page)
{
    (void)arg;
    (void)index;
    (void)page;
}

static void landed(void *arg, enum mf_landed what, uint64_t count)
{
    (void)arg;
    if (what != MF_LANDED_ROUND)
        atomic_fetch_sub(&missing, count);
}

static void broken(void *arg, uint32_t index, int error)
{
    (void)arg;
    fail("cannot punch region %u: %s", index, strerror(-error));
}

static void fault(void *arg, const struct mf_fault *from, uint32_t index, uint64_t page)
{
    (void)arg;
    (void)from;
    atomic_fetch_add(&faults, 1);
    uint8_t byte = mf_page_load(&pages[index], page);
    if (!mf_page_resolvable(byte)) {
        if (byte & MF_PAGE_FAULTED)
            return;
        byte = mf_page_fault(&pages[index], page);
        if (!mf_page_resolvable(byte)) {
            pthread_mutex_lock(&asked_lock);
            if (asked_count < ASKED_ROOM)
                asked[asked_count++] = (struct asked){index, page};
            pthread_mutex_unlock(&asked_lock);
            return;
        }
    }
    mf_resolve_page(&reader_lander.resolver, index, page);
}

static void discard(void *arg, uint32_t index, uint64_t first, uint64_t count)
{
    (void)arg;
    atomic_fetch_add(&discarded, count);
    mf_land_discard(&reader_lander, index, first, count, false);
}

static pid_t process_of(uint32_t context)
{
    const struct mf_context *of = mf_context_at(&contexts, context);
    return of->child && !of->pid ? -1 : of->pid;
}

static unsigned observe(void *arg, uint32_t context)
{
    (void)arg;
    int r = companion_observe(&companion, process_of(context),
                              mf_context_at(&contexts, context)->woken);
    if (r == -EBUSY || r == -ETIMEDOUT)
        return MF_EVENTS_BUSY;
    return r >= 0 ? (unsigned)r : 1;
}

static enum mf_removed removed(void *arg, uint32_t context, uint64_t start, uint64_t end)
{
    const struct uffd_msg message = {.event = UFFD_EVENT_REMOVE,
                                     .arg.remove = {.start = start, .end = end}};
    struct mf_change change;
    (void)arg;
    if (!companion_reason(&companion, process_of(context), &message, false, &change))
        events.observed = 0;
    if (change.reason == MF_REASON_UNKNOWN) {
        atomic_fetch_add(&unknown, 1);
        fprintf(stderr, "an unknown call emptied %#llx to %#llx of context %u (process %d)\n",
                (unsigned long long)start, (unsigned long long)end, context, process_of(context));
        for (size_t i = 0; i < companion.blocked_count; i++)
            fprintf(stderr, "  thread %d in call %ld(%#llx, %#llx, %lld)%s%s\n",
                    companion.blocked[i].tid, companion.blocked[i].number,
                    (unsigned long long)companion.blocked[i].args[0],
                    (unsigned long long)companion.blocked[i].args[1],
                    (long long)companion.blocked[i].args[2],
                    companion.blocked[i].certain ? ", certain" : "",
                    companion.blocked[i].taken ? ", taken" : "");
    }
    return change.reason == MF_REASON_DONTNEED ? MF_REMOVED_NOTHING : MF_REMOVED_PAGES;
}

static void watch(uint32_t context)
{
    struct epoll_event event = {.events = EPOLLIN, .data.u32 = context};
    if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, mf_context_uffd(&contexts, context), &event) != 0)
        fail("epoll: %s", strerror(errno));
}

static void forked(void *arg, uint32_t parent, uint32_t context)
{
    struct mf_context *child = mf_context_at(&contexts, context);
    const struct uffd_msg message = {.event = UFFD_EVENT_FORK};
    struct mf_change change;
    (void)arg;
    watch(context);
    if (!companion_reason(&companion, process_of(parent), &message, true, &change))
        events.observed = 0;
    const int maps_fd = change.tid ? companion_child(&companion, change.tid, &child->pid) : -1;
    child->maps_fd = maps_fd < 0 ? -1 : maps_fd;
    child->pid = maps_fd < 0 ? 0 : child->pid;
    atomic_fetch_add(&strangers, maps_fd < 0);
}

static int maps(void *arg, uint32_t context, pid_t tid, uint64_t addr)
{
    pid_t pid = 0;
    (void)arg;
    int r = companion_maps(&companion, tid, addr, &pid);
    if (r >= 0)
        mf_context_at(&contexts, context)->pid = pid;
    return r;
}

/* ---- threads ---- */

static void read_one(uint32_t context)
{
    int r = mf_events_read(&events, context);
    if (r < 0)
        fail("reading context %u failed: %s", context, strerror(-r));
    mf_events_serve(&events, r > 0);
}

static void on_event(void *arg, uint32_t context)
{
    (void)arg;
    int r = mf_events_read(&events, context);
    if (r < 0)
        fail("reading context %u failed: %s", context, strerror(-r));
}

static void nothing(void *arg, uint32_t context)
{
    (void)arg;
    (void)context;
}

static void drop_the_gone(void)
{
    for (uint32_t i = 0; i < contexts.count; i++) {
        const struct mf_context *context = mf_context_at(&contexts, i);
        if (!context || !context->child || mf_uffd_alive(context->uffd))
            continue;
        epoll_ctl(epoll_fd, EPOLL_CTL_DEL, context->uffd, NULL);
        mf_events_drop(&events, i);
    }
}

static void *read_events(void *arg)
{
    uint64_t looked_ns = mf_now_ns();
    (void)arg;
    while (!atomic_load(&stop)) {
        struct epoll_event ready[16];
        int n = epoll_wait(epoll_fd, ready, 16, mf_events_parked(&events) ? 5 : 50);
        for (int i = 0; i < n; i++)
            read_one(ready[i].data.u32);
        mf_events_serve(&events, false);
        if (n == 0)
            mf_events_give_up_parked(&events);
        if (mf_now_ns() - looked_ns > 100000000) {
            drop_the_gone();
            looked_ns = mf_now_ns();
        }
    }
    return NULL;
}

static struct mf_lander lander_of(struct mf_gate_lane *lane, void (*event)(void *, uint32_t))
{
    static const struct mf_lander_ops ops = {served, landed, broken};
    return (struct mf_lander){.resolver = {.region = region,
                                           .layout = &layout,
                                           .contexts = &contexts,
                                           .lane = lane,
                                           .on_event = event},
                              .pages = pages,
                              .ops = &ops};
}

static void bring(const struct mf_lander *lander, uint32_t index, uint64_t first, uint64_t count)
{
    static _Thread_local _Alignas(8) uint8_t payload[RUN_PAGES * PAGE];
    struct mf_frame frame = {.region = (uint16_t)index, .first_page = first, .pages = count};
    if (first + count > shared->pages)
        frame.pages = count = shared->pages - first;
    for (uint64_t i = 0; i < count; i++)
        for (unsigned w = 0; w < PAGE / 8; w++) {
            uint64_t value = word(shared->seed, index, first + i, ORIGINAL, w);
            memcpy(payload + i * PAGE + w * 8u, &value, 8);
        }
    if (count == 1 && came_as_zeros(shared->seed, index, first)) {
        frame.type = MF_FRAME_ZERO;
        mf_land_zero(lander, &frame);
        return;
    }
    frame.type = MF_FRAME_DATA;
    frame.length_bytes = count * PAGE;
    int r = mf_land_data(lander, &frame, payload);
    if (r < 0)
        fail("landing failed: %s", strerror(-r));
}

static void *land(void *arg)
{
    struct mf_lander lander = lander_of(mf_gate_join(&gate), nothing);
    uint64_t random = mix(shared->seed ^ (uintptr_t)arg);
    lander.by_mapping = (uintptr_t)arg & 1;
    while (!atomic_load(&stop)) {
        struct asked want = {UINT32_MAX, 0};
        pthread_mutex_lock(&asked_lock);
        if (asked_count > 0)
            want = asked[--asked_count];
        pthread_mutex_unlock(&asked_lock);
        random = mix(random);
        if (want.region != UINT32_MAX) {
            bring(&lander, want.region, want.page, 1);
            continue;
        }
        bring(&lander, (uint32_t)(random % shared->threads), (random >> 16) % shared->pages,
              1 + (random >> 48) % RUN_PAGES);
        nanosleep(&(struct timespec){.tv_nsec = (long)(random >> 8 & 0x3fffff)}, NULL);
    }
    mf_gate_leave(lander.resolver.lane);
    return NULL;
}

/* ---- a run ---- */

static void make_region(unsigned index)
{
    struct mf_region *r = &region[index];
    struct stat st;
    const uint64_t bytes = (uint64_t)shared->pages * PAGE;
    const int fd = memfd_create("memferry-exact", 0); /* inherited */
    if (fd < 0 || ftruncate(fd, (off_t)bytes) != 0 || fstat(fd, &st) != 0)
        fail("no memory: %s", strerror(errno));
    *r = (struct mf_region){.size_bytes = bytes,
                            .pages = shared->pages,
                            .page_bytes = PAGE,
                            .kind = MF_MEMORY_TMPFS,
                            .fd = fd,
                            .device = st.st_dev,
                            .inode = st.st_ino};
    r->map = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    for (uint64_t i = 0; i < bytes / 8; i++) { /* whose stale bytes they are */
        uint64_t stale = UINT64_C(0xd) << 60 | (uint64_t)index << 52 | i * 8 / PAGE;
        memcpy(r->map + i * 8, &stale, 8);
    }
    pages[index] = (struct mf_pages){.state = calloc(shared->pages + 8, 1), .count = shared->pages};
    for (uint64_t page = 0; page < shared->pages; page++)
        atomic_store(&pages[index].state[page], MF_PAGE_UNCONFIRMED | MF_PAGE_LANDED);
    shared->region_fd[index] = fd;
}

static void start_shifter(const char *program, int shared_fd)
{
    char number[16];
    struct mf_error err;
    snprintf(number, sizeof(number), "%d", shared_fd);
    shifter = fork();
    if (shifter == 0) {
        execl(program, "shifter", number, (char *)NULL);
        _exit(127);
    }
    for (unsigned i = 0; i < 5000 && atomic_load(&shared->uffd) == 0; i++)
        usleep(1000);
    if (atomic_load(&shared->uffd) == 0)
        fail("the shifter does not start");
    cleanup_close int pidfd = (int)syscall(SYS_pidfd_open, shifter, 0);
    int uffd = (int)syscall(SYS_pidfd_getfd, pidfd, atomic_load(&shared->uffd) - 1, 0);
    char path[64];
    snprintf(path, sizeof(path), "/proc/%d/maps", (int)shifter);
    int maps_fd = open(path, O_RDONLY | O_CLOEXEC);
    if (uffd < 0 || maps_fd < 0)
        fail("cannot take hold of the shifter: %s", strerror(errno));
    if (mf_uffd_api(uffd, MF_UFFD_FEATURES | UFFD_FEATURE_EVENT_FORK, MF_UFFD_FEATURES_WANTED, NULL,
                    &err) < 0)
        fail("%s", err.text);
    if (mf_contexts_add(&contexts, uffd, maps_fd, false) != 0 ||
        mf_events_learn(&events, 0, 0, UINT64_C(1) << 47) < 0)
        fail("cannot learn the shifter's layout");
    if (events.at_once) /* as libmemferry's server */
        mf_context_at(&contexts, 0)->info_fd = mf_uffd_open_info(uffd);
    struct mf_mapping known[THREADS_MAX + 1];
    if (mf_layout_get(&layout, known, THREADS_MAX + 1) != shared->threads)
        fail("the shifter does not map what it should");
    watch(0);
    uint64_t files[THREADS_MAX][2];
    for (unsigned i = 0; i < shared->threads; i++) {
        files[i][0] = region[i].device;
        files[i][1] = region[i].inode;
    }
    if (companion_introduce(&companion, shifter, uffd, (const uint64_t(*)[2])files,
                            shared->threads) < 0)
        fail("the companion does not answer");
}

static void check(uint64_t *seen_ns, uint64_t seen[THREADS_MAX])
{
    if (atomic_load(&shared->failed))
        fail("%s", shared->failure);
    int status;
    if (waitpid(shifter, &status, WNOHANG) == shifter)
        fail("the shifter ended with status %#x: %s", (unsigned)status, shared->failure);
    for (unsigned i = 0; i < shared->threads; i++) {
        uint64_t now = atomic_load(&shared->looked[i]);
        if (now != seen[i]) {
            seen[i] = now;
            seen_ns[i] = mf_now_ns();
        } else if (mf_now_ns() - seen_ns[i] > STUCK_NS) {
            fail("thread %u has waited for %llu s; %u faults parked, %llu pages missing", i,
                 (unsigned long long)(STUCK_NS / 1000000000), events.parked_count,
                 (unsigned long long)atomic_load(&missing));
        }
    }
}

static void run(const char *program, uint64_t seed, unsigned threads)
{
    uint64_t seen_ns[THREADS_MAX], seen[THREADS_MAX] = {0};
    pthread_t reader, lander[LANDERS];
    const int shared_fd = memfd_create("memferry-exact-shared", 0);
    if (shared_fd < 0 || ftruncate(shared_fd, sizeof(*shared)) != 0)
        fail("no memory");
    shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED, shared_fd, 0);
    shared->seed = seed;
    shared->threads = threads;
    shared->pages = 256u << (seed % 4);
    shared->forks = seed % 3 != 0;
    shared->discards = seed % 2 == 0;
    memset(&layout, 0, sizeof(layout));
    memset(&events, 0, sizeof(events));
    atomic_store(&stop, false);
    atomic_store(&missing, (uint64_t)threads * shared->pages);
    asked_count = 0;
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    static const struct mf_events_ops ops = {.fault = fault,
                                             .discard = discard,
                                             .observe = observe,
                                             .removed = removed,
                                             .forked = forked,
                                             .maps = maps};
    events.ops = &ops;
    events.layout = &layout;
    events.contexts = &contexts;
    events.gate = &gate;
    events.region = region;
    events.region_count = threads;
    events.at_once = seed / 4 % 2 == 0;
    if (mf_gate_init(&gate) < 0)
        fail("no gate");
    for (unsigned i = 0; i < threads; i++)
        make_region(i);
    start_shifter(program, shared_fd);
    reader_lander = lander_of(NULL, on_event);
    pthread_create(&reader, NULL, read_events, NULL);
    for (uintptr_t i = 0; i < LANDERS; i++)
        pthread_create(&lander[i], NULL, land, (void *)i);
    for (unsigned i = 0; i < threads; i++)
        seen_ns[i] = mf_now_ns();
    atomic_store(&shared->armed, true);
    uint64_t done_ns = 0;
    while (!done_ns || mf_now_ns() - done_ns < SETTLE_NS) {
        check(seen_ns, seen);
        usleep(10000);
        if (!done_ns && atomic_load(&missing) == 0)
            done_ns = mf_now_ns();
    }
    atomic_store(&shared->stop, true);
    int status = 0;
    for (unsigned i = 0; waitpid(shifter, &status, WNOHANG) == 0; i++) {
        if (i > STUCK_NS / 10000000)
            fail("the shifter does not end");
        usleep(10000);
    }
    if (atomic_load(&shared->failed) || status != 0)
        fail("the shifter ended with status %#x: %s", (unsigned)status, shared->failure);
    atomic_store(&stop, true);
    pthread_join(reader, NULL);
    for (unsigned i = 0; i < LANDERS; i++)
        pthread_join(lander[i], NULL);
    drop_the_gone();
    if (atomic_load(&unknown) > 0)
        fail("%llu calls that emptied memory were not seen",
             (unsigned long long)atomic_load(&unknown));
    if (contexts.used != 1)
        fail("%u contexts of children are left", contexts.used - 1);
    uint64_t looked = 0;
    for (unsigned i = 0; i < threads; i++)
        looked += atomic_load(&shared->looked[i]);
    printf("seed %llu: %u pages, %llu looked at, %llu changes (%llu moves, %llu in place, %llu "
           "forks), %llu faults, %llu discarded, %llu unknown, "
           "%llu children not found, longest wait %llu ms\n",
           (unsigned long long)seed, threads * shared->pages, (unsigned long long)looked,
           (unsigned long long)atomic_load(&shared->changes),
           (unsigned long long)atomic_load(&shared->moved),
           (unsigned long long)atomic_load(&shared->grown_in_place),
           (unsigned long long)atomic_load(&shared->forked),
           (unsigned long long)atomic_load(&faults), (unsigned long long)atomic_load(&discarded),
           (unsigned long long)atomic_load(&unknown), (unsigned long long)atomic_load(&strangers),
           (unsigned long long)(atomic_load(&shared->longest_ns) / 1000000));
    fflush(stdout);
    for (unsigned i = 0; i < threads; i++) {
        munmap(region[i].map, region[i].size_bytes);
        close(region[i].fd);
        free((void *)pages[i].state);
    }
    mf_contexts_free(&contexts);
    mf_gate_destroy(&gate);
    munmap(shared, sizeof(*shared));
    close(shared_fd);
    close(epoll_fd);
}

/* The companion, as the mover has one, but with all privileges and without a filter. */
int sandbox_companion(uid_t uid, gid_t gid, struct mf_error *err)
{
    (void)uid;
    (void)gid;
    (void)err;
    return 0;
}

void mover_fatal(const char *fmt, ...)
{
    fail("%s", fmt);
}

/* A run in a process of its own, so that the companion becomes a child of this one. */
static int run_apart(const char *program, uint64_t seed, unsigned threads)
{
    int pair[2], status = 0, last;
    struct mf_error err;
    if (pipe2(pair, O_CLOEXEC) != 0)
        return 1;
    const pid_t pid = fork();
    if (pid == 0) {
        close(pair[1]);
        if (companion_start(&companion, pair[0], 0, 0, &err) < 0)
            return 1;
        run(program, seed, threads);
        exit(0);
    }
    close(pair[0]);
    if (pid < 0 || waitpid(pid, &last, 0) != pid)
        return 1;
    close(pair[1]); /* the companion goes by this */
    while (waitpid(-1, &status, 0) > 0 || errno == EINTR)
        last |= status;
    return last != 0;
}

static uint64_t from_environment(const char *name, uint64_t otherwise)
{
    const char *text = getenv(name);
    return text ? strtoull(text, NULL, 0) : otherwise;
}

int main(int argc, char **argv)
{
    uint64_t features;
    struct mf_error err;
    if (mf_uffd_features(&features, &err) < 0 ||
        (features & MF_UFFD_FEATURES) != MF_UFFD_FEATURES || geteuid() != 0) {
        fprintf(stderr, "skipped: userfaultfd with MINOR_SHMEM and CAP_SYS_PTRACE are not to be "
                        "had here\n");
        return 77;
    }
    if (argc != 2)
        return 2;
    const uint64_t seed = from_environment("MF_SEED", (uint64_t)time(NULL) * 12);
    const uint64_t runs = from_environment("MF_RUNS", 6);
    const unsigned threads = (unsigned)from_environment("MF_THREADS", 4);
    for (uint64_t i = 0; i < runs; i++)
        if (run_apart(argv[1], seed + i, threads < THREADS_MAX ? threads : THREADS_MAX) != 0)
            return 1;
    return 0;
}
