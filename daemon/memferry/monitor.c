/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * memferry monitor: every change of a process's memory layout, as it happens. One thread reads the
 * events of the process and of the children it forks, and looks after the rest at a steady pace:
 * mappings that appear, an exec, files that lose pages. The process waits while its events are not
 * read, so nothing here waits for long.
 */
#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <time.h>

#include "daemon/memferry/monitor_output.h"
#include "daemon/memferry/units.h"
#include "daemon/memferry/verbs.h"
#include "lib/process_events.h"
#include "lib/target.h"
#include "lib/uffd.h"
#include "lib/util.h"
#include "lib/watch.h"
#include "lib/watch_files.h"

#define PACE_MS 5 /**< between two looks at what sends no event */
#define SCAN_ANYWAY_NS                                                                             \
    UINT64_C(250000000)                  /**< mappings may be replaced by others of equal size     \
                                          */
#define IDENTIFY_NS UINT64_C(500000000)  /**< between two searches for a child's number */
#define RETRY_NS UINT64_C(1000000000)    /**< after a failure to attach to what was executed */
#define SERVE_NS UINT64_C(200000)        /**< for looking while events may wait */
#define EXEC_NEWS_NS UINT64_C(200000000) /**< for the kernel to tell of an exec that is noticed */
#define SPARE_DESCRIPTORS 48 /**< for looking, and for what a process takes beside its first */

/** struct attachment - to what a process has executed, by a thread of its own: it may take seconds
 * where the process does not run, and others must not wait for that. */
struct attachment {
    pthread_t thread;
    struct mf_watch watch; /**< only the process; its userfaultfd is handed over */
    struct mf_error err;
    int rc;
    atomic_bool done;
};

/** struct followed - a process that is monitored.
 * @since_ns: earlier execs are none of ours.
 * @identified_ns: when it was last tried to find out its number.
 * @retry_ns: when to try again to attach to what it has executed. */
struct followed {
    struct mf_watch watch;
    struct mf_watch_files files;
    struct attachment *attachment; /**< under way, or NULL */
    uint64_t identified_ns, since_ns, scanned_ns, scan_cost_ns, dead_since_ns, retry_ns;
    bool failure_told, unwatched; /**< not attached to what it has executed, for the time being */
};

struct monitor {
    struct followed **list; /**< the first one is the process that was asked for */
    size_t count;
    struct monitor_output output;
    struct mf_looker looker;
    uint64_t served_ns; /**< when events were read last */
    int execs_fd;       /**< of mf_execs_listen(), or -errno: then they are noticed by the way */
    uint64_t epoch_us;  /**< what CLOCK_MONOTONIC is behind the time of day */
    rlim_t descriptors; /**< we may have so many open */
    bool json, no_room_told;
};

static uint64_t now_us(const struct monitor *monitor)
{
    return monitor->epoch_us + mf_now_ns() / 1000;
}

/** notice() - a sentence, unless saying it would make us wait: a terminal can be held (Ctrl-S). */
__attribute__((format(printf, 1, 2))) static void notice(const char *format, ...)
{
    struct pollfd room = {.fd = STDERR_FILENO, .events = POLLOUT};
    if (poll(&room, 1, 0) <= 0 || !(room.revents & POLLOUT))
        return;
    va_list args;
    char sentence[1024];
    va_start(args, format);
    vsnprintf(sentence, sizeof(sentence), format, args);
    va_end(args);
    mf_clean_text(sentence);
    fprintf(stderr, "memferry: %s\n", sentence);
}

static void print_change(struct monitor *monitor, const struct mf_change *change)
{
    char line[MONITOR_LINE_BYTES];
    struct mf_change stamped = *change;
    stamped.time_us = now_us(monitor);
    size_t length_bytes =
        monitor->json ? monitor_json(&stamped, line) : monitor_line(&stamped, line);
    monitor_output_add(&monitor->output, line, length_bytes);
}

/* ---- who is followed ---- */

static struct followed *follow(struct monitor *monitor)
{
    struct followed **grown =
        reallocarray(monitor->list, monitor->count + 1, sizeof(struct followed *));
    struct followed *one = calloc(1, sizeof(*one));
    if (grown)
        monitor->list = grown;
    if (!grown || !one) {
        free(one);
        return NULL;
    }
    one->files.looker = &monitor->looker;
    monitor->list[monitor->count++] = one;
    return one;
}

/** end_attachment() - waits for it. Return: its userfaultfd, or -errno with a sentence. */
static int end_attachment(struct followed *one, struct mf_error *err)
{
    struct attachment *attachment = one->attachment;
    one->attachment = NULL;
    pthread_join(attachment->thread, NULL);
    int rc = attachment->rc < 0 ? attachment->rc : mf_steal_fd(&attachment->watch.uffd);
    *err = attachment->err;
    mf_watch_end(&attachment->watch);
    free(attachment);
    return rc;
}

static void unfollow(struct monitor *monitor, size_t index)
{
    struct followed *one = monitor->list[index];
    struct mf_error err;
    int uffd = one->attachment ? end_attachment(one, &err) : -1;
    if (uffd >= 0)
        close(uffd);
    mf_watch_files_free(&one->files);
    mf_watch_end(&one->watch);
    free(one);
    monitor->count--;
    memmove(&monitor->list[index], &monitor->list[index + 1],
            (monitor->count - index) * sizeof(struct followed *));
}

static struct followed *followed_of(struct mf_watch *watch)
{
    return (struct followed *)((char *)watch - offsetof(struct followed, watch));
}

/** on_twin() - mf_watch_fn: what is already explained. */
static void on_twin(struct mf_watch *watch, const struct mf_change *change, int child_uffd,
                    void *arg)
{
    (void)watch, (void)child_uffd;
    print_change(arg, change);
}

/** on_change() - mf_watch_fn. */
static void on_change(struct mf_watch *watch, const struct mf_change *change, int child_uffd,
                      void *arg)
{
    struct monitor *monitor = arg;
    print_change(monitor, change);
    mf_watch_files_explain(&followed_of(watch)->files, watch, change, on_twin, monitor);
    if (child_uffd < 0)
        return;
    /* The lowest free number was taken, so that many are in use. */
    bool room = (rlim_t)child_uffd + SPARE_DESCRIPTORS < monitor->descriptors;
    struct followed *child = room ? follow(monitor) : NULL;
    if (!child) {
        close(child_uffd); /* it goes on unwatched, and without knowing */
        if (!monitor->no_room_told)
            notice("there are more forked children than can be followed at a time: some are left "
                   "out (raise the limit on open files: ulimit -Hn)");
        monitor->no_room_told = true;
        return;
    }
    mf_watch_adopt(&child->watch, watch, change->child, child_uffd); /* its execs are all later */
    mf_watch_files_inherit(&child->files, &followed_of(watch)->files);
}

static void read_events(struct monitor *monitor, struct followed *one)
{
    if (one->watch.uffd >= 0)
        mf_watch_read(&one->watch, on_change, monitor);
}

static void serve(struct monitor *monitor)
{
    /* Children that a fork adds are at the end. */
    for (size_t i = 0; i < monitor->count; i++)
        read_events(monitor, monitor->list[i]);
    monitor->served_ns = mf_now_ns();
}

/* ---- what sends no event ---- */

static void scan(struct monitor *monitor, struct followed *one)
{
    uint64_t start_ns = mf_now_ns();
    if (mf_watch_scan(&one->watch, on_change, monitor) == 0)
        mf_watch_files_refresh(&one->files, &one->watch);
    one->scanned_ns = mf_now_ns();
    one->scan_cost_ns = one->scanned_ns - start_ns;
}

/** scan_if_due() - when the layout has changed, but for a tenth of the time at most. */
static void scan_if_due(struct monitor *monitor, struct followed *one)
{
    uint64_t ago_ns = mf_now_ns() - one->scanned_ns;
    if (ago_ns < 10 * one->scan_cost_ns)
        return;
    if (one->watch.stale || ago_ns > SCAN_ANYWAY_NS || mf_watch_grown(&one->watch))
        scan(monitor, one);
}

static void tell_exec(struct monitor *monitor, const struct followed *one)
{
    const struct mf_change change = {.pid = one->watch.pid,
                                     .tid = one->watch.pid, /* whoever did it has this id now */
                                     .kind = MF_CHANGE_EXEC,
                                     .reason = MF_REASON_EXEC};
    print_change(monitor, &change);
}

static void *attach(void *arg)
{
    struct attachment *attachment = arg;
    attachment->rc = mf_watch_attach(&attachment->watch, &attachment->err);
    atomic_store(&attachment->done, true);
    return NULL;
}

/** attach_again() - begin to, after an exec, to what it is now. */
static void attach_again(struct followed *one)
{
    struct attachment *attachment = calloc(1, sizeof(*attachment));
    mf_watch_files_free(&one->files);
    mf_watch_let_go(&one->watch);
    one->dead_since_ns = 0;
    one->unwatched = true;
    one->retry_ns = mf_now_ns() + RETRY_NS;
    if (attachment && mf_watch_find(&attachment->watch, one->watch.pid, NULL) == 0) {
        if (pthread_create(&attachment->thread, NULL, attach, attachment) == 0) {
            one->attachment = attachment;
            return;
        }
        mf_watch_end(&attachment->watch);
    }
    free(attachment);
}

/** attached() - see what has come of it. */
static void attached(struct monitor *monitor, struct followed *one)
{
    struct mf_error err;
    int uffd = end_attachment(one, &err);
    if (uffd < 0) {
        if (!one->failure_told && err.code != ESRCH)
            notice("the program that process %d executed is not watched, for now: %s",
                   one->watch.pid, err.text);
        one->failure_told |= err.code != ESRCH;
        one->retry_ns = mf_now_ns() + RETRY_NS;
        return;
    }
    if (!mf_uffd_alive(uffd)) { /* of what it was before one more exec */
        close(uffd);
        if (monitor->execs_fd < 0 && mf_watch_has_memory(&one->watch))
            tell_exec(monitor, one);
        one->retry_ns = 0;
        return;
    }
    one->watch.uffd = uffd;
    one->watch.stale = true;
    one->unwatched = one->failure_told = false;
    scan(monitor, one);
}

static struct followed *find_followed(const struct monitor *monitor, pid_t pid)
{
    for (size_t i = 0; i < monitor->count; i++) {
        if (monitor->list[i]->watch.pid == pid)
            return monitor->list[i];
    }
    return NULL;
}

/** attach_if_due() - what an exec has left unwatched. */
static void attach_if_due(struct monitor *monitor, struct followed *one)
{
    if (!one->unwatched || (one->attachment && !atomic_load(&one->attachment->done)))
        return;
    if (one->attachment)
        attached(monitor, one);
    else if (mf_now_ns() >= one->retry_ns && !mf_watch_has_ended(&one->watch))
        attach_again(one);
}

/** read_execs() - those that the kernel tells of. What a process did before comes first; several in
 * a row are told one by one, and only the last program is attached to. */
static void read_execs(struct monitor *monitor)
{
    uint64_t when_ns;
    bool any = false;
    for (pid_t pid; monitor->execs_fd >= 0 && (pid = mf_execs_next(monitor->execs_fd, &when_ns));) {
        struct followed *one = find_followed(monitor, pid);
        if (!one || when_ns < one->since_ns)
            continue;
        read_events(monitor, one);
        tell_exec(monitor, one);
        if (one->watch.uffd >= 0 && mf_uffd_alive(one->watch.uffd))
            continue;
        mf_watch_let_go(&one->watch);
        one->unwatched = any = true;
        one->retry_ns = 0; /* at once */
    }
    for (size_t i = 0; any && i < monitor->count; i++)
        attach_if_due(monitor, monitor->list[i]);
}

/** look_after() - what sends no event: an exec, new mappings, files. */
static void look_after(struct monitor *monitor, struct followed *one)
{
    attach_if_due(monitor, one);
    if (one->watch.pid == 0 && mf_now_ns() - one->identified_ns > IDENTIFY_NS) {
        mf_watch_identify(&one->watch);
        one->identified_ns = mf_now_ns();
    }
    if (one->unwatched || mf_watch_has_ended(&one->watch))
        return;
    if (!mf_uffd_alive(one->watch.uffd)) {
        uint64_t now_ns = mf_now_ns();
        one->dead_since_ns = one->dead_since_ns ? one->dead_since_ns : now_ns;
        if (!mf_watch_has_memory(&one->watch))
            return; /* it is about to end */
        if (monitor->execs_fd >= 0 && now_ns - one->dead_since_ns < EXEC_NEWS_NS)
            return; /* read_execs() will have it */
        tell_exec(monitor, one);
        attach_again(one);
        return;
    }
    scan_if_due(monitor, one);
    if (!one->watch.stale) /* where files are mapped has to be known */
        mf_watch_files_compare(&one->files, &one->watch, on_change, monitor);
}

/* ---- events ---- */

/** wait_for_something() - Return: true if a signal asks to end. */
static bool wait_for_something(const struct monitor *monitor, int signal_fd)
{
    size_t count = 2;
    cleanup_free struct pollfd *fds = calloc(2 + 2 * monitor->count, sizeof(*fds));
    if (!fds)
        return true;
    fds[0] = (struct pollfd){.fd = signal_fd, .events = POLLIN};
    fds[1] = (struct pollfd){.fd = monitor->execs_fd, .events = POLLIN};
    for (size_t i = 0; i < monitor->count; i++) {
        const struct mf_watch *watch = &monitor->list[i]->watch;
        fds[count++] = (struct pollfd){.fd = watch->uffd, .events = POLLIN};
        fds[count++] = (struct pollfd){.fd = watch->pidfd, .events = POLLIN};
    }
    poll(fds, count, PACE_MS);
    return fds[0].revents != 0;
}

/** see_off() - tell that one has ended, after what it did last. Return: false if it goes on. */
static bool see_off(struct monitor *monitor, size_t index)
{
    struct followed *one = monitor->list[index];
    if (!mf_watch_has_ended(&one->watch) ||
        (one->attachment && !atomic_load(&one->attachment->done)))
        return false; /* if only because attaching must find that out first */
    read_events(monitor, one);
    if (one->watch.pid) {
        const struct mf_change change = {
            .pid = one->watch.pid, .kind = MF_CHANGE_EXIT, .reason = MF_REASON_EXIT};
        print_change(monitor, &change);
    }
    unfollow(monitor, index);
    return true;
}

/** see_off_children() - before what others do later is told. */
static void see_off_children(struct monitor *monitor)
{
    for (size_t i = 1; i < monitor->count; i++)
        i -= see_off(monitor, i);
}

static void run(struct monitor *monitor, int signal_fd)
{
    uint64_t looked_ns = 0, cost_ns = 0;
    while (!monitor_output_failed(&monitor->output)) {
        bool asked = wait_for_something(monitor, signal_fd);
        read_execs(monitor);
        see_off_children(monitor);
        serve(monitor);
        /* The first is the last: once it has ended, so has all that was done before. */
        if (asked || mf_watch_has_ended(&monitor->list[0]->watch)) {
            read_execs(monitor);
            see_off_children(monitor);
            if (see_off(monitor, 0) || asked)
                return;
        }
        /* With many children it takes a while: a tenth of the time at most. */
        uint64_t begin_ns = mf_now_ns();
        bool due = begin_ns - looked_ns > PACE_MS * UINT64_C(1000000) + 10 * cost_ns;
        for (size_t i = 0; i < monitor->count; i++) {
            struct followed *one = monitor->list[i];
            if (due || one->scanned_ns == 0)
                look_after(monitor, one);
            else if (one->watch.stale && !one->unwatched)
                scan_if_due(monitor, one);
            if (mf_now_ns() - monitor->served_ns > SERVE_NS)
                serve(monitor);
        }
        if (due) {
            looked_ns = mf_now_ns();
            cost_ns = looked_ns - begin_ns;
        }
    }
}

/* ---- beginning and end ---- */

/** look_first() - at the files there are, so that what goes from now on is told. */
static void look_first(struct monitor *monitor, struct followed *first, int signal_fd)
{
    struct pollfd asked = {.fd = signal_fd, .events = POLLIN};
    scan(monitor, first);
    for (int pause_ms = 0; poll(&asked, 1, pause_ms) == 0; pause_ms = 1) {
        mf_watch_files_compare(&first->files, &first->watch, on_change, monitor);
        if (mf_watch_files_known(&first->files))
            return;
        serve(monitor);
    }
}

/** introduce() - the sentence that says what is watched. */
static void introduce(const struct mf_watch *watch)
{
    char name[64], text[256] = "";
    size_t watched = 0, read_only = 0, others = 0, odd = 0;
    uint64_t watched_bytes = 0;
    for (size_t i = 0; i < watch->count; i++) {
        const struct mf_watched *map = &watch->maps[i];
        watched += !map->refused;
        watched_bytes += map->refused ? 0 : map->end_addr - map->start_addr;
        read_only += map->refused == EPERM;
        others += map->refused == EBUSY;
        odd += map->refused && map->refused != EPERM && map->refused != EBUSY;
    }
    size_t length = 0;
    if (read_only)
        length += (size_t)snprintf(text + length, sizeof(text) - length,
                                   ", %zu shared without the right to write", read_only);
    if (others)
        length += (size_t)snprintf(text + length, sizeof(text) - length,
                                   ", %zu of another userfaultfd", others);
    if (odd)
        snprintf(text + length, sizeof(text) - length, ", %zu special", odd);
    mf_target_comm(watch->pid, name, sizeof(name));
    notice("watching %zu of %zu mappings (%s) of %s (pid %d)%s%s", watched, watch->count,
           show_bytes(watched_bytes).text, name, watch->pid, text[0] ? "; can't be watched: " : "",
           text[0] ? text + 2 : "");
}

/** block_signals() - those that ask to end come by a descriptor. Ctrl-Z would stop us, and with us
 * the process at its next event, so it is not heard; and a terminal that wants no output from the
 * background ("stty tostop") gets it. */
static int block_signals(void)
{
    sigset_t wanted;
    sigemptyset(&wanted);
    sigaddset(&wanted, SIGINT);
    sigaddset(&wanted, SIGTERM);
    sigaddset(&wanted, SIGHUP);
    pthread_sigmask(SIG_BLOCK, &wanted, NULL);
    signal(SIGTSTP, SIG_IGN);
    signal(SIGTTOU, SIG_IGN);
    return signalfd(-1, &wanted, SFD_CLOEXEC | SFD_NONBLOCK);
}

/** raise_descriptor_limit() - every forked child takes a few. Return: the limit. */
static rlim_t raise_descriptor_limit(void)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0)
        return 1024;
    limit.rlim_cur = limit.rlim_max;
    if (setrlimit(RLIMIT_NOFILE, &limit) != 0)
        getrlimit(RLIMIT_NOFILE, &limit);
    return limit.rlim_cur;
}

static uint64_t epoch_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000 - mf_now_ns() / 1000;
}

int verb_monitor(const struct cli_args *args)
{
    struct monitor monitor = {
        .json = args->json, .epoch_us = epoch_us(), .descriptors = raise_descriptor_limit()};
    struct mf_error err;
    cleanup_close int execs_fd = mf_execs_listen();
    monitor.execs_fd = execs_fd;
    prctl(PR_SET_TIMERSLACK, 1); /* somebody waits while we nap */
    cleanup_close int signal_fd = block_signals();
    struct followed *first = follow(&monitor);
    if (!first)
        return verb_complain(CLI_FAILED, "out of memory");
    int rc = mf_watch_find(&first->watch, args->pid, &err);
    if (rc == 0)
        rc = mf_watch_attach(&first->watch, &err);
    first->since_ns = mf_now_ns();
    if (rc == 0) {
        int code = -mf_looker_start(&monitor.looker);
        if (code == 0)
            code = -monitor_output_start(&monitor.output, signal_fd);
        if (code)
            rc = mf_fail(&err, code, "cannot start a thread: %s", strerror(code));
    }
    if (rc < 0) {
        unfollow(&monitor, 0);
        free(monitor.list);
        return verb_complain(CLI_FAILED, err.text);
    }
    if (!monitor.json)
        monitor_output_add(&monitor.output, monitor_header(), strlen(monitor_header()));
    look_first(&monitor, first, signal_fd);
    introduce(&first->watch);
    if (first->files.refused)
        notice("files behind shared memory can't be opened (that takes CAP_SYS_ADMIN or "
               "CAP_CHECKPOINT_RESTORE), so holes punched into them are not seen");

    run(&monitor, signal_fd);
    /* Letting go of a process is closing the descriptor: the kernel unregisters everything. What is
     * still being attached to is waited for, but not by the others. */
    for (size_t i = 0; i < monitor.count; i++)
        mf_watch_let_go(&monitor.list[i]->watch);
    while (monitor.count)
        unfollow(&monitor, monitor.count - 1);
    free(monitor.list);
    mf_looker_end(&monitor.looker);
    if (!monitor_output_finish(&monitor.output))
        return verb_complain(CLI_FAILED, "cannot write to the standard output");
    return CLI_DONE;
}
