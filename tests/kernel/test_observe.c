/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What can be seen, from outside, of a thread that changes the memory layout: what lib/observe.h
 * rests on. */
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <liburing.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/shm.h>
#include <sys/wait.h>
#include <unistd.h>

#include "lib/observe.h"
#include "lib/uffd.h"
#include "lib/util.h"
#include "tests/kernel/area.h"
#include "tests/kernel/fact.h"

#define PAGE ((size_t)4096)
#define EVENTS (UFFD_FEATURE_EVENT_UNMAP | UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_EVENT_REMOVE)
#define WAITERS_MAX 64

/** struct scene - private anonymous memory that is watched and never touched, and how we look at
 * ourselves. */
struct scene {
    int uffd, proc_fd;
    bool woken;
    char *memory;
    size_t length_bytes;
    struct mf_blocked blocked[WAITERS_MAX];
    struct mf_observation seen;
};

static void watch(const struct scene *scene, const void *at, size_t length_bytes)
{
    assert_int_equal(range_register(scene->uffd, at, length_bytes, UFFDIO_REGISTER_MODE_MISSING),
                     0);
}

static void scene_make(struct scene *scene, size_t pages, uint64_t more)
{
    struct mf_error err;
    memset(scene, 0, sizeof(*scene));
    scene->length_bytes = pages * PAGE;
    scene->memory = mmap(NULL, scene->length_bytes, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    assert_true(scene->memory != MAP_FAILED);
    scene->uffd = mf_uffd_open();
    assert_true(scene->uffd >= 0);
    assert_int_equal(mf_uffd_api(scene->uffd, EVENTS | more, 0, NULL, &err), 0);
    watch(scene, scene->memory, scene->length_bytes);
    scene->proc_fd = mf_observe_open(getpid(), &err);
    assert_true(scene->proc_fd >= 0);
}

static void scene_end(struct scene *scene)
{
    close(scene->uffd);
    close(scene->proc_fd);
    munmap(scene->memory, scene->length_bytes);
}

static void look(struct scene *scene)
{
    assert_int_equal(
        mf_observe(scene->proc_fd, scene->woken, scene->blocked, WAITERS_MAX, &scene->seen), 0);
    assert_true(scene->seen.complete);
}

/** look_for() - until @count threads wait. */
static void look_for(struct scene *scene, size_t count)
{
    for (unsigned tries = 0; tries < 4000; tries++) {
        look(scene);
        if (scene->seen.count == count && scene->seen.readable == count)
            return;
        usleep(1000);
    }
    fail_msg("%zu threads wait, %zu should", scene->seen.count, count);
}

/** next_change() - look, read one message, match. */
static struct mf_change next_change(struct scene *scene)
{
    struct mf_change change;
    await_readable(scene->uffd);
    look_for(scene, 1);
    struct uffd_msg message = next_message(scene->uffd);
    assert_int_equal(mf_change_from_event(&message, scene->blocked, scene->seen.count, &change), 1);
    return change;
}

/** struct caller - a thread that makes one system call. */
struct caller {
    long number, args[6], result;
    pid_t tid;
    pthread_t thread;
};

static void *call(void *arg)
{
    struct caller *caller = arg;
    const long *args = caller->args;
    caller->tid = (pid_t)syscall(SYS_gettid);
    long result = syscall(caller->number, args[0], args[1], args[2], args[3], args[4], args[5]);
    if (caller->number == SYS_clone && result == 0)
        _exit(0); /* the child comes back here too */
    caller->result = result == -1 ? -errno : result;
    return NULL;
}

static void start(struct caller *caller)
{
    assert_int_equal(pthread_create(&caller->thread, NULL, call, caller), 0);
}

static void expect(const struct mf_change *change, enum mf_change_kind kind, enum mf_reason reason,
                   const void *start_at, size_t length_bytes, const struct caller *who)
{
    assert_string_equal(mf_change_kind_name(change->kind), mf_change_kind_name(kind));
    assert_string_equal(mf_reason_name(change->reason), mf_reason_name(reason));
    assert_true(change->start_addr == (uintptr_t)start_at);
    assert_true(change->end_addr == (uintptr_t)start_at + length_bytes);
    assert_int_equal(change->tid, who->tid);
}

/* ---- what a waiting thread shows ---- */

static void an_advice_is_told_by_the_waiting_thread(void **state)
{
    (void)state;
    static const struct {
        long advice;
        enum mf_reason reason;
    } rows[] = {{MADV_DONTNEED, MF_REASON_DONTNEED},
                {24 /* DONTNEED_LOCKED */, MF_REASON_DONTNEED},
                {MADV_FREE, MF_REASON_DONTNEED}};
    struct scene scene;
    scene_make(&scene, 8, 0);
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        struct caller caller = {
            .number = SYS_madvise,
            .args = {(long)scene.memory + (long)PAGE, PAGE + 5, rows[i].advice}};
        start(&caller);
        struct mf_change change = next_change(&scene);
        expect(&change, MF_CHANGE_REMOVE, rows[i].reason, scene.memory + PAGE, 2 * PAGE, &caller);
        pthread_join(caller.thread, NULL);
        assert_int_equal(caller.result, 0);
    }
    scene_end(&scene);

    struct area area;
    area_make(&area, AREA_SHMEM, 8);
    area_register(&area, BOTH_MODES);
    scene.uffd = area.uffd;
    struct mf_error err;
    scene.proc_fd = mf_observe_open(getpid(), &err);
    struct caller caller = {.number = SYS_madvise,
                            .args = {(long)area.guest, (long)area.length_bytes, MADV_REMOVE}};
    start(&caller);
    struct mf_change change = next_change(&scene);
    expect(&change, MF_CHANGE_REMOVE, MF_REASON_REMOVE, area.guest, area.length_bytes, &caller);
    pthread_join(caller.thread, NULL);
    close(scene.proc_fd);
    area_free(&area);
}

static void every_call_that_unmaps_is_told(void **state)
{
    (void)state;
    struct scene scene;
    scene_make(&scene, 32, 0);
    char *at = scene.memory;
    struct caller unmapper = {.number = SYS_munmap, .args = {(long)at, PAGE + 1}};
    start(&unmapper);
    struct mf_change change = next_change(&scene);
    expect(&change, MF_CHANGE_UNMAP, MF_REASON_MUNMAP, at, 2 * PAGE, &unmapper);
    pthread_join(unmapper.thread, NULL);

    struct caller mapper = {.number = SYS_mmap,
                            .args = {(long)at + 2 * (long)PAGE, 3 * PAGE - 1, PROT_READ,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0}};
    start(&mapper);
    change = next_change(&scene);
    expect(&change, MF_CHANGE_UNMAP, MF_REASON_MMAP_OVER, at + 2 * PAGE, 3 * PAGE, &mapper);
    pthread_join(mapper.thread, NULL);

    struct caller shrinker = {.number = SYS_mremap,
                              .args = {(long)at + 8 * (long)PAGE, 4 * PAGE, 2 * PAGE, 0}};
    start(&shrinker);
    change = next_change(&scene);
    expect(&change, MF_CHANGE_UNMAP, MF_REASON_MREMAP, at + 10 * PAGE, 2 * PAGE, &shrinker);
    pthread_join(shrinker.thread, NULL);

    /* The heap is no thread's own: it is put back before anybody else asks for memory. */
    char *end = sbrk(0);
    end = (char *)(((uintptr_t)end + PAGE - 1) & ~(PAGE - 1));
    assert_true(syscall(SYS_brk, end + 4 * PAGE) == (long)(end + 4 * PAGE));
    watch(&scene, end, 4 * PAGE);
    struct caller breaker = {.number = SYS_brk, .args = {(long)end + (long)PAGE + 7}};
    start(&breaker);
    change = next_change(&scene);
    expect(&change, MF_CHANGE_UNMAP, MF_REASON_MUNMAP, end + 2 * PAGE, 2 * PAGE, &breaker);
    pthread_join(breaker.thread, NULL);
    scene_end(&scene);
}

static void a_move_onto_an_occupied_place_tells_three_times(void **state)
{
    (void)state;
    struct scene scene;
    scene_make(&scene, 32, 0);
    char *from = scene.memory, *to = scene.memory + 16 * PAGE;
    struct caller mover = {
        .number = SYS_mremap,
        .args = {(long)from, 4 * PAGE, 4 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, (long)to}};
    start(&mover);
    struct mf_change change = next_change(&scene);
    expect(&change, MF_CHANGE_UNMAP, MF_REASON_MREMAP, to, 4 * PAGE, &mover);
    change = next_change(&scene);
    expect(&change, MF_CHANGE_REMAP, MF_REASON_MREMAP, from, 4 * PAGE, &mover);
    assert_true(change.to_addr == (uintptr_t)to);
    change = next_change(&scene);
    expect(&change, MF_CHANGE_UNMAP, MF_REASON_MREMAP, from, 4 * PAGE, &mover);
    pthread_join(mover.thread, NULL);
    assert_true(mover.result == (long)to);

    /* Nobody else's memory may come to lie there meanwhile, such as a thread's. */
    map_at(from, 4 * PAGE, MAP_PRIVATE | MAP_ANONYMOUS, -1);

    /* Cut and moved at once: the tail and the rest go as two messages. */
    from = to;
    to = scene.memory;
    struct caller cutter = {
        .number = SYS_mremap,
        .args = {(long)from, 4 * PAGE, 2 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, (long)to}};
    start(&cutter);
    change = next_change(&scene);
    /* The old length on older kernels: test_layout.c */
    bool old = change.end_addr - change.start_addr == 4 * PAGE;
    expect(&change, MF_CHANGE_REMAP, MF_REASON_MREMAP, from, old ? 4 * PAGE : 2 * PAGE, &cutter);
    size_t gone_bytes = 0;
    while (gone_bytes < 4 * PAGE) {
        change = next_change(&scene);
        assert_int_equal(change.kind, MF_CHANGE_UNMAP);
        assert_int_equal(change.reason, MF_REASON_MREMAP);
        gone_bytes += change.end_addr - change.start_addr;
    }
    pthread_join(cutter.thread, NULL);
    assert_int_equal(gone_bytes, 4 * PAGE);

    /* DONTUNMAP: the move alone. */
    struct caller leaver = {.number = SYS_mremap,
                            .args = {(long)scene.memory + 20 * (long)PAGE, 2 * PAGE, 2 * PAGE,
                                     MREMAP_MAYMOVE | 4 /* DONTUNMAP */, 0}};
    start(&leaver);
    change = next_change(&scene);
    expect(&change, MF_CHANGE_REMAP, MF_REASON_MREMAP, scene.memory + 20 * PAGE, 2 * PAGE, &leaver);
    pthread_join(leaver.thread, NULL);
    assert_true(change.to_addr == (uintptr_t)leaver.result);
    assert_true(no_message(scene.uffd));
    scene_end(&scene);
}

static void five_gibibytes_are_one_message(void **state)
{
    (void)state;
    struct scene scene;
    size_t length_bytes = (size_t)5 << 30;
    scene_make(&scene, length_bytes / PAGE, 0);
    struct caller unmapper = {.number = SYS_munmap,
                              .args = {(long)scene.memory, (long)length_bytes}};
    start(&unmapper);
    struct mf_change change = next_change(&scene);
    expect(&change, MF_CHANGE_UNMAP, MF_REASON_MUNMAP, scene.memory, length_bytes, &unmapper);
    pthread_join(unmapper.thread, NULL);
    scene_end(&scene);
}

/* With IORING_SETUP_SQPOLL the worker is made by a kernel thread, which shows the call that made
 * the ring. */
static void advise_by_io_uring(unsigned flags, long shown)
{
    struct scene scene;
    struct io_uring ring;
    scene_make(&scene, 4, 0);
    int rc = io_uring_queue_init(4, &ring, flags);
    if (rc < 0)
        lacking("io_uring (%s)", strerror(-rc));
    struct io_uring_sqe *entry = io_uring_get_sqe(&ring);
    io_uring_prep_madvise(entry, scene.memory, PAGE, MADV_DONTNEED);
    assert_int_equal(io_uring_submit(&ring), 1);
    struct mf_change change = next_change(&scene);
    assert_int_equal(change.kind, MF_CHANGE_REMOVE);
    assert_string_equal(mf_reason_name(change.reason), "unknown");
    assert_true(change.tid != 0 && change.tid != getpid()); /* it waits, and so is known */
    assert_int_equal(scene.blocked[0].number, shown);
    assert_true(mf_blocked_frees(&scene.blocked[0])); /* for all that can be seen */
    struct io_uring_cqe *done;
    assert_int_equal(io_uring_wait_cqe(&ring, &done), 0);
    assert_int_equal(done->res, 0);
    io_uring_queue_exit(&ring);
    scene_end(&scene);
}

static void an_advice_by_io_uring_is_not_told_by_its_worker(void **state)
{
    (void)state;
    advise_by_io_uring(0, SYS_io_uring_enter);
    advise_by_io_uring(IORING_SETUP_SQPOLL, SYS_io_uring_setup);
}

/* ---- several at once ---- */

static void events_are_read_in_the_order_in_which_they_came(void **state)
{
    (void)state;
    enum { THREADS = 8 };
    struct scene scene;
    struct caller callers[THREADS];
    scene_make(&scene, THREADS, 0);
    for (size_t i = 0; i < THREADS; i++) {
        callers[i] = (struct caller){.number = SYS_munmap,
                                     .args = {(long)scene.memory + (long)(i * PAGE), PAGE}};
        start(&callers[i]);
        look_for(&scene, i + 1);
    }
    for (size_t i = 0; i < THREADS; i++) {
        struct uffd_msg message = next_message(scene.uffd);
        struct mf_change change;
        assert_int_equal(mf_change_from_event(&message, scene.blocked, scene.seen.count, &change),
                         1);
        expect(&change, MF_CHANGE_UNMAP, MF_REASON_MUNMAP, scene.memory + i * PAGE, PAGE,
               &callers[i]);
        pthread_join(callers[i].thread, NULL);
    }
    scene_end(&scene);
}

static void whose_message_was_read_goes_on_at_once(void **state)
{
    (void)state;
    /* The same range, given two advices: only who goes on says which message it was. */
    unsigned told = 0;
    for (unsigned round = 0; round < 50; round++) {
        struct scene scene;
        scene_make(&scene, 4, 0);
        struct caller callers[2];
        bool later[2] = {round % 2 == 0, round % 2 != 0};
        for (size_t i = 0; i < 2; i++)
            callers[i] = (struct caller){
                .number = SYS_madvise,
                .args = {(long)scene.memory, PAGE, later[i] ? MADV_FREE : MADV_DONTNEED}};
        start(&callers[0]);
        look_for(&scene, 1);
        start(&callers[1]);
        look_for(&scene, 2);
        for (size_t i = 0; i < 2; i++) {
            struct uffd_msg message = next_message(scene.uffd);
            struct mf_change change;
            size_t candidates =
                mf_change_from_event(&message, scene.blocked, scene.seen.count, &change);
            if (candidates == 1 ||
                mf_observe_settle(scene.proc_fd, scene.blocked, scene.seen.count, &change)) {
                assert_int_equal(change.tid, callers[i].tid);
                told++;
                continue;
            }
            /* On a busy machine it may not get to a CPU in time, which is for nobody to guess. */
            assert_int_equal(candidates, 2);
            assert_int_equal(change.tid, 0);
            look_for(&scene, 1);
        }
        for (size_t i = 0; i < 2; i++)
            pthread_join(callers[i].thread, NULL);
        scene_end(&scene);
    }
    assert_true(told >= 50);
}

/* Of all privileges without the one that reads stacks (proc_pid_stack(5)), like the companion. */
static void drop_sys_admin(void)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2];
    assert_int_equal(syscall(SYS_capget, &header, data), 0);
    data[0].effective &= ~(1u << CAP_SYS_ADMIN);
    assert_int_equal(syscall(SYS_capset, &header, data), 0);
}

static bool run_on(unsigned cpu)
{
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    return sched_setaffinity(0, sizeof(one), &one) == 0;
}

/** struct hog - keeps all others from a processor for a while. */
struct hog {
    unsigned cpu;
    uint64_t for_ns;
    _Atomic int begun; /**< 1, or -1: not permitted */
};

static void *hold_cpu(void *arg)
{
    struct hog *hog = arg;
    const struct sched_param param = {.sched_priority = 10};
    const bool may = run_on(hog->cpu) && sched_setscheduler(0, SCHED_FIFO, &param) == 0;
    const uint64_t start_ns = mf_now_ns();
    atomic_store(&hog->begun, may ? 1 : -1);
    while (may && mf_now_ns() - start_ns < hog->for_ns)
        ;
    return NULL;
}

static void who_was_woken_and_gets_to_no_processor_is_waited_for(void **state)
{
    (void)state;
    struct scene scene;
    struct caller callers[3];
    struct hog hog = {.cpu = 1, .for_ns = 200000000};
    pthread_t thread;
    if (sysconf(_SC_NPROCESSORS_ONLN) < 2 || !run_on(0))
        lacking("two processors");
    scene_make(&scene, 8, 0);
    drop_sys_admin();
    for (size_t i = 0; i < 3; i++)
        callers[i] = (struct caller){
            .number = SYS_madvise,
            .args = {(long)scene.memory + (long)(i * PAGE), (long)PAGE, MADV_DONTNEED}};
    start(&callers[0]);
    look_for(&scene, 1);
    /* The second waits on the other processor, of which it is kept when it is woken. */
    assert_true(run_on(hog.cpu));
    start(&callers[1]);
    assert_true(run_on(0));
    look_for(&scene, 2);
    assert_int_equal(pthread_create(&thread, NULL, hold_cpu, &hog), 0);
    while (!atomic_load(&hog.begun))
        usleep(100);
    if (atomic_load(&hog.begun) < 0)
        lacking("real-time priority");
    next_message(scene.uffd);
    scene.woken = poll(&(struct pollfd){.fd = scene.uffd, .events = POLLIN}, 1, 0) > 0;
    assert_true(scene.woken);
    pthread_join(callers[0].thread, NULL);
    start(&callers[2]);
    usleep(20000); /* it sleeps by now, and is all that is to be seen */
    look(&scene);
    assert_int_equal(scene.seen.readable, 2);
    for (size_t i = 1; i < 3; i++) {
        struct mf_change change;
        struct uffd_msg message = next_message(scene.uffd);
        assert_int_equal(mf_change_from_event(&message, scene.blocked, scene.seen.count, &change),
                         1);
        expect(&change, MF_CHANGE_REMOVE, MF_REASON_DONTNEED, scene.memory + i * PAGE, PAGE,
               &callers[i]);
        pthread_join(callers[i].thread, NULL);
    }
    pthread_join(thread, NULL);
    scene_end(&scene);
}

static void *touch(void *at)
{
    *(volatile char *)at = 1;
    return NULL;
}

static void who_waits_for_a_page_is_no_candidate(void **state)
{
    (void)state;
    struct area area;
    struct mf_error err;
    area_make(&area, AREA_SHMEM, 8);
    area_register(&area, BOTH_MODES);
    pthread_t thread;
    assert_int_equal(pthread_create(&thread, NULL, touch, page_of(&area, 1)), 0);
    int pipe_fds[2];
    assert_int_equal(pipe(pipe_fds), 0);
    /* And one inside a system call that has to do with memory in nothing but its buffer. */
    struct caller writer = {.number = SYS_write, .args = {pipe_fds[1], (long)page_of(&area, 2), 1}};
    start(&writer);
    await_pending(area.uffd, 2);
    struct scene scene = {.uffd = area.uffd, .proc_fd = mf_observe_open(getpid(), &err)};
    look(&scene);
    assert_int_equal(scene.seen.count, 0);
    assert_int_equal(mf_uffd_event_pending(area.uffd), 0);
    put(&area, 1, 'a');
    put(&area, 2, 'a');
    assert_int_equal(continue_pages(&area, 1, 2, NULL), 0);
    pthread_join(thread, NULL);
    pthread_join(writer.thread, NULL);
    close(pipe_fds[0]);
    close(pipe_fds[1]);
    close(scene.proc_fd);
    area_free(&area);
}

/* ---- whether there is an event at all ---- */

static void a_pending_event_shows_without_being_read(void **state)
{
    (void)state;
    struct scene scene;
    scene_make(&scene, 8, 0);
    assert_int_equal(mf_uffd_event_pending(scene.uffd), 0);
    struct caller caller = {.number = SYS_munmap, .args = {(long)scene.memory, PAGE}};
    start(&caller);
    await_readable(scene.uffd);
    assert_int_equal(mf_uffd_event_pending(scene.uffd), 1);
    assert_int_equal(mf_uffd_event_pending(scene.uffd), 1);
    next_message(scene.uffd);
    pthread_join(caller.thread, NULL);
    assert_int_equal(mf_uffd_event_pending(scene.uffd), 0);
    assert_true(mf_uffd_alive(scene.uffd));
    int none = open("/dev/null", O_RDWR | O_CLOEXEC);
    assert_true(mf_uffd_event_pending(none) < 0);
    close(none);
    scene_end(&scene);
}

/* ---- forks ---- */

static void a_fork_is_told_before_the_child_exists(void **state)
{
    (void)state;
    struct scene scene;
    scene_make(&scene, 8, UFFD_FEATURE_EVENT_FORK);
    struct caller forker = {.number = SYS_clone, .args = {SIGCHLD}};
    start(&forker);
    await_readable(scene.uffd);
    look_for(&scene, 1);
    char path[64], text[64] = "";
    snprintf(path, sizeof(path), "/proc/self/task/%d/children", forker.tid);
    cleanup_close int children = open(path, O_RDONLY | O_CLOEXEC);
    assert_true(children >= 0);
    assert_int_equal(pread(children, text, sizeof(text) - 1, 0), 0);
    struct uffd_msg message = next_message(scene.uffd);
    struct mf_change change;
    assert_int_equal(mf_change_from_event(&message, scene.blocked, scene.seen.count, &change), 1);
    assert_int_equal(change.kind, MF_CHANGE_FORK);
    assert_int_equal(change.reason, MF_REASON_FORK);
    assert_int_equal(change.tid, forker.tid);
    int child_uffd = (int)message.arg.fork.ufd;
    pthread_join(forker.thread, NULL);
    assert_true(forker.result > 0);
    assert_int_equal(waitpid((pid_t)forker.result, NULL, __WALL), forker.result);
    assert_false(mf_uffd_alive(child_uffd));
    close(child_uffd);
    scene_end(&scene);
}

/* ---- the end ---- */

static void the_last_close_frees_who_waits_for_a_reader(void **state)
{
    (void)state;
    struct scene scene;
    scene_make(&scene, 8, 0);
    struct caller caller = {.number = SYS_munmap, .args = {(long)scene.memory, PAGE}};
    start(&caller);
    look_for(&scene, 1);
    close(scene.uffd);
    pthread_join(caller.thread, NULL);
    assert_int_equal(caller.result, 0);
    scene.uffd = -1;
    look(&scene);
    assert_int_equal(scene.seen.count, 0);
    scene_end(&scene);
}

int main(int argc, char **argv)
{
    static const struct fact facts[] = {
        FACT(an_advice_is_told_by_the_waiting_thread),
        FACT(every_call_that_unmaps_is_told),
        FACT(a_move_onto_an_occupied_place_tells_three_times),
        FACT(five_gibibytes_are_one_message),
        FACT(an_advice_by_io_uring_is_not_told_by_its_worker),
        FACT(events_are_read_in_the_order_in_which_they_came),
        FACT(whose_message_was_read_goes_on_at_once),
        FACT(who_was_woken_and_gets_to_no_processor_is_waited_for),
        FACT(who_waits_for_a_page_is_no_candidate),
        FACT(a_pending_event_shows_without_being_read),
        FACT_NEEDS(a_fork_is_told_before_the_child_exists, UFFD_FEATURE_EVENT_FORK),
        FACT(the_last_close_frees_who_waits_for_a_reader),
    };
    return facts_main(argc, argv, facts, sizeof(facts) / sizeof(facts[0]), MF_UFFD_FEATURES);
}
