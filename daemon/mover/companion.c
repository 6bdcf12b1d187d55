/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/mover/companion.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#include "daemon/mover/mover.h"
#include "daemon/mover/schedule.h"
#include "lib/children.h"
#include "lib/proc_stat.h"
#include "lib/uapi.h"
#include "lib/util.h"
#include "lib/vma.h"

/* Reading an event wakes all whose events wait to be read; they sleep again as soon as they get to
 * a processor, but who is awake just then is overlooked. So if one was read a moment ago, it is
 * looked until nobody new is seen. */
#define SOON_NS 2000000u
#define SOON_EACH_NS 20000u /**< so much longer for each who waited */
#define SOON_LOOKS 6u
#define SOON_PAUSE_NS 30000u /**< before the second look; longer, the more there are */
#define CHILD_TRIES 60u      /**< 50 µs each */

enum question { INTRODUCE = 1, OBSERVE, SETTLE, MAPS, CHILD, SENDER };

/** struct talk - a question, and the same as its answer. */
struct talk {
    uint32_t question;
    uint32_t number; /**< of the question */
    int32_t result;  /**< answer: 0 or more, or -errno */
    int32_t pid;
    uint32_t count; /**< of files or blocked, the only ones that are sent */
    bool woken;     /**< see mf_observe() */
    bool complete, others_free;
    uint64_t addr;
    struct mf_change change;
    union {
        uint64_t files[MF_REGIONS_MAX][2];
        struct mf_blocked blocked[MF_OBSERVE_MAX];
    };
};

static size_t bytes_of(const struct talk *talk)
{
    return offsetof(struct talk, files) +
           talk->count *
               (talk->question == INTRODUCE ? sizeof(talk->files[0]) : sizeof(talk->blocked[0]));
}

static bool send_talk(int sock, const struct talk *talk)
{
    const size_t bytes = bytes_of(talk);
    return send(sock, talk, bytes, MSG_NOSIGNAL) == (ssize_t)bytes;
}

/* Return: 1, 0 at the end, or -errno. */
static int receive_talk(int sock, struct talk *talk, int flags)
{
    const ssize_t n = recv(sock, talk, sizeof(*talk), flags);
    if (n <= 0)
        return n < 0 ? -errno : 0;
    const bool whole =
        (size_t)n >= offsetof(struct talk, files) &&
        talk->count <= (talk->question == INTRODUCE ? MF_REGIONS_MAX : MF_OBSERVE_MAX) &&
        (size_t)n == bytes_of(talk);
    return whole ? 1 : -EPROTO;
}

/* ---- the companion's side ---- */

static struct {
    pid_t target;
    unsigned file_count;
    uint64_t files[MF_REGIONS_MAX][2]; /**< device, inode */
    ino_t own;                         /**< of the target's own userfaultfd: each has another */
    _Atomic uint32_t *children;
} known;

static bool is_ours(const struct mf_vma *vma, uint64_t addr)
{
    for (unsigned i = 0; i < known.file_count; i++)
        if (vma->shared && addr >= vma->start_addr && vma->inode == known.files[i][1] &&
            vma->device == (dev_t)known.files[i][0])
            return true;
    return false;
}

/* The maps of a process or thread, if they have memory of the session at @addr (0: anywhere). */
static int open_maps(pid_t pid, uint64_t addr)
{
    char path[48];
    struct mf_vma vma;
    snprintf(path, sizeof(path), "/proc/%d/maps", (int)pid);
    cleanup_close int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    if (addr)
        return mf_vma_find(fd, addr, &vma) == 0 && is_ours(&vma, addr) ? mf_steal_fd(&fd) : -EPERM;
    for (uint64_t at = 0; mf_vma_find(fd, at, &vma) == 0; at = vma.end_addr)
        if (is_ours(&vma, vma.start_addr))
            return mf_steal_fd(&fd);
    return -EPERM;
}

/* Process and innermost number of a thread. */
static bool read_status(const char *path, pid_t *process, pid_t *innermost)
{
    char line[256];
    cleanup_fclose FILE *f = fopen(path, "re");
    *process = *innermost = 0;
    while (f && fgets(line, sizeof(line), f)) {
        if (strncmp(line, "Tgid:", 5) == 0)
            *process = (pid_t)strtol(line + 5, NULL, 10);
        if (strncmp(line, "NSpid:", 6) == 0) {
            const char *last = strrchr(line, '\t');
            *innermost = last ? (pid_t)strtol(last, NULL, 10) : 0;
            return *process > 0;
        }
    }
    return false;
}

/* In a container threads have other numbers for themselves than they have here. */
static pid_t search(pid_t tid, uint64_t addr)
{
    cleanup_closedir DIR *proc = opendir("/proc");
    for (struct dirent *p; proc && (p = readdir(proc));) {
        char path[600];
        const pid_t pid = (pid_t)strtol(p->d_name, NULL, 10);
        if (pid <= 0)
            continue;
        const int fd = open_maps(pid, addr);
        if (fd < 0)
            continue;
        close(fd);
        snprintf(path, sizeof(path), "/proc/%d/task", (int)pid);
        cleanup_closedir DIR *tasks = opendir(path);
        for (struct dirent *t; tasks && (t = readdir(tasks));) {
            pid_t process, innermost;
            snprintf(path, sizeof(path), "/proc/%d/task/%s/status", (int)pid, t->d_name);
            if (t->d_name[0] != '.' && read_status(path, &process, &innermost) && innermost == tid)
                return pid;
        }
    }
    return -ESRCH;
}

static int find_maps(pid_t tid, uint64_t addr, int32_t *pid)
{
    char path[48];
    pid_t process, innermost;
    snprintf(path, sizeof(path), "/proc/%d/status", (int)tid);
    if (read_status(path, &process, &innermost) && innermost == tid) {
        int fd = open_maps(process, addr);
        *pid = process;
        if (fd >= 0)
            return fd;
    }
    process = search(tid, addr);
    *pid = process;
    return process < 0 ? process : open_maps(process, addr);
}

/* Processes the mover knows, or may still take for new. */
static struct {
    pid_t pid[1024];
    unsigned next;
} tellings;

static bool is_told(pid_t pid)
{
    for (unsigned i = 0; i < sizeof(tellings.pid) / sizeof(tellings.pid[0]); i++)
        if (tellings.pid[i] == pid)
            return true;
    return false;
}

static void told(pid_t pid)
{
    if (!is_told(pid))
        tellings.pid[tellings.next++ % (sizeof(tellings.pid) / sizeof(tellings.pid[0]))] = pid;
}

/* The target itself, or a process that has its memory. */
static int open_process(pid_t pid)
{
    struct mf_error err;
    if (pid != known.target) {
        int fd = open_maps(pid, 0);
        if (fd < 0)
            return fd;
        close(fd);
    }
    return mf_observe_open(pid, &err);
}

/* What thread @tid has forked a moment ago: a child that maps the session's memory and that nobody
 * was told of. It appears when the event has been read and the thread goes on. */
static int find_child(pid_t tid, int32_t *pid)
{
    cleanup_close int proc_fd = mf_observe_open(tid, NULL);
    if (proc_fd < 0)
        return proc_fd;
    for (unsigned i = 0; i < CHILD_TRIES; i++) {
        struct mf_children now;
        int fd = mf_children_read(proc_fd, tid, &now);
        if (fd < 0)
            return fd; /* it is gone, or the kernel has no such file (CONFIG_PROC_CHILDREN) */
        fd = -1;
        /* From the highest number on: most likely that is the newest. */
        for (size_t left = now.count; left > 0 && fd < 0; left--) {
            const pid_t child = now.list[left - 1];
            fd = is_told(child) ? -1 : open_maps(child, 0);
            if (fd >= 0) {
                *pid = child;
                told(child);
            }
        }
        mf_children_free(&now);
        if (fd >= 0)
            return fd;
        nanosleep(&(struct timespec){.tv_nsec = 50000}, NULL);
    }
    return -ESRCH;
}

/* Time of a process's start in clock ticks, proc_pid_stat(5); 0: it is gone. */
static uint64_t started(pid_t pid)
{
    struct mf_proc_stat stat;
    return mf_proc_stat(pid, 0, &stat) == 0 ? stat.start_ticks : 0;
}

/* A child that nobody knows yet: whoever waits in a process younger than the target. */
static int observe_the_young(struct talk *talk)
{
    const uint64_t since = started(known.target);
    cleanup_closedir DIR *proc = opendir("/proc");
    int readable = 0;
    bool unsettled = false;
    talk->complete = true;
    talk->others_free = false;
    talk->count = 0;
    for (struct dirent *entry; proc && (entry = readdir(proc));) {
        struct mf_observation seen;
        const pid_t pid = (pid_t)strtol(entry->d_name, NULL, 10);
        if (pid <= 0 || pid == known.target || is_told(pid) || started(pid) < since)
            continue;
        cleanup_close int fd = open_process(pid);
        if (fd < 0 || mf_observe(fd, talk->woken, talk->blocked + talk->count,
                                 MF_OBSERVE_MAX - talk->count, &seen) < 0)
            continue;
        talk->count += (uint32_t)seen.count;
        talk->complete &= seen.complete;
        talk->others_free |= seen.others_free;
        readable += (int)seen.readable;
        unsettled |= seen.unsettled;
    }
    return unsettled ? -EBUSY : readable;
}

/* What the mover keeps must not be of those that are left for looking. */
static int may_stay(int fd)
{
    struct rlimit limit;
    if (fd < 0 || getrlimit(RLIMIT_NOFILE, &limit) != 0 ||
        (rlim_t)fd + COMPANION_FDS < limit.rlim_cur)
        return fd;
    close(fd);
    return -EMFILE;
}

static void answer(struct talk *talk)
{
    const pid_t pid = talk->pid ? talk->pid : known.target;
    struct mf_observation seen = {0};
    switch ((enum question)talk->question) {
    case INTRODUCE:
        talk->result = known.target ? -EALREADY : 0;
        if (known.target)
            break;
        known.target = talk->pid;
        known.file_count = talk->count;
        known.own = (ino_t)talk->addr;
        memcpy(known.files, talk->files, sizeof(known.files));
        break;
    case OBSERVE: {
        if (pid == -1) {
            talk->result = observe_the_young(talk);
            break;
        }
        cleanup_close int fd = open_process(pid);
        talk->result =
            fd < 0 ? fd : mf_observe(fd, talk->woken, talk->blocked, MF_OBSERVE_MAX, &seen);
        talk->count = (uint32_t)seen.count;
        talk->complete = seen.complete;
        talk->others_free = seen.others_free;
        if (talk->result == 0)
            talk->result = seen.unsettled ? -EBUSY : (int32_t)seen.readable;
        break;
    }
    case SETTLE: {
        cleanup_close int fd = pid == -1 ? -1 : open_process(pid);
        talk->result = fd;
        if (fd >= 0 || pid == -1)
            talk->result = mf_observe_settle(fd, talk->blocked, talk->count, &talk->change);
        break;
    }
    case MAPS:
        talk->result = may_stay(find_maps(talk->pid, talk->addr, &talk->pid));
        if (talk->result >= 0)
            told(talk->pid);
        break;
    case SENDER: {
        char path[48];
        pid_t innermost;
        snprintf(path, sizeof(path), "/proc/%d/status", (int)talk->pid);
        talk->result = -ESRCH;
        if (!read_status(path, &talk->pid, &innermost))
            break;
        talk->result = may_stay(open_maps(talk->pid, talk->addr));
        if (talk->result >= 0)
            told(talk->pid);
        break;
    }
    case CHILD:
        talk->result = may_stay(find_child(talk->pid, &talk->pid));
        break;
    default:
        talk->result = -EINVAL;
    }
}

/* Is @fd a userfaultfd whose address space still exists? */
static bool keeps_somebody(int fd)
{
    struct uffdio_writeprotect lowest = {.range = {.start = 0x10000, .len = 0x1000}, .mode = 0};
    struct stat st;
    if (fstat(fd, &st) != 0 || st.st_ino == known.own)
        return false;
    return ioctl(fd, UFFDIO_WRITEPROTECT, &lowest) == 0 || errno == ENOENT || errno == EAGAIN;
}

/* memferryd is gone, and the mover follows it. What keeps nobody is let go, so that the peer sees
 * the end of its connections. */
static void keep_on(void)
{
    struct rlimit limit;
    if (atomic_load(known.children) == 0)
        _exit(EXIT_SUCCESS);
    schedule_beside();
    const int most = getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur < 1u << 20
                         ? (int)limit.rlim_cur
                         : 1 << 20;
    for (;;) {
        bool somebody = false;
        nanosleep(&(struct timespec){.tv_sec = 1}, NULL);
        for (int fd = STDERR_FILENO + 1; fd < most; fd++) {
            if (keeps_somebody(fd))
                somebody = true;
            else
                close(fd);
        }
        if (!somebody)
            _exit(EXIT_SUCCESS);
    }
}

_Noreturn static void be_companion(int sock, int ipc_fd, uid_t uid, gid_t gid)
{
    struct mf_error err;
    prctl(PR_SET_NAME, "memferry-keep");
    /* By itself, so that memferryd knows whom to reap though the mover be killed at this moment. If
     * it is gone, that shows below. */
    mf_ipc_send(ipc_fd, &(struct mf_ipc){.type = MF_IPC_COMPANION, .companion_pid = getpid()}, -1);
    if (sandbox_companion(uid, gid, &err) < 0)
        mover_fatal("%s", err.text);
    static struct talk talk;
    for (;;) {
        struct pollfd wait[] = {{.fd = sock, .events = POLLIN}, {.fd = ipc_fd}};
        if (poll(wait, 2, -1) < 0 && errno != EINTR)
            _exit(EXIT_FAILURE);
        if (wait[1].revents & (POLLHUP | POLLERR | POLLNVAL))
            keep_on();
        if (!wait[0].revents || receive_talk(sock, &talk, MSG_DONTWAIT) <= 0)
            continue;
        answer(&talk);
        send_talk(sock, &talk);
    }
}

/* ---- the mover's side ---- */

int companion_start(struct companion *companion, int ipc_fd, uid_t uid, gid_t gid,
                    struct mf_error *err)
{
    int pair[2];
    const struct timeval patience = {.tv_sec = 10}; /* a look takes up to 4 s */
    *companion = (struct companion){.sock = -1};
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) != 0)
        return mf_fail(err, errno, "cannot make a socket for the mover's companion: %s",
                       strerror(errno));
    void *shared = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (shared == MAP_FAILED)
        return mf_fail(err, errno, "out of memory for the mover's companion");
    known.children = companion->children = shared;
    setsockopt(pair[0], SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
    /* Without a stack of its own it is a fork(2) that shares descriptors. The C library does not
     * know of it, so what runs there uses no threads. */
    const pid_t pid = (pid_t)syscall(
        SYS_clone, (unsigned long)(CLONE_FILES | CLONE_PARENT | SIGCHLD), NULL, NULL, NULL, 0UL);
    if (pid == 0)
        be_companion(pair[1], ipc_fd, uid, gid);
    if (pid < 0)
        return mf_fail(err, errno, "cannot start the mover's companion: %s", strerror(errno));
    companion->sock = pair[0];
    return 0;
}

static int ask(struct companion *companion, struct talk *talk)
{
    int r;
    if (companion->sock < 0)
        return -ENOTCONN;
    const uint32_t number = talk->number = ++companion->asked;
    if (!send_talk(companion->sock, talk))
        return -errno;
    do
        r = receive_talk(companion->sock, talk, 0);
    while (r == -EINTR || (r > 0 && talk->number != number));
    if (r <= 0)
        return r == -EAGAIN ? -ETIMEDOUT : -EPROTO;
    return talk->result;
}

int companion_introduce(struct companion *companion, pid_t target, int uffd,
                        const uint64_t (*files)[2], unsigned count)
{
    struct stat st = {0};
    if (fstat(uffd, &st) != 0)
        return -errno;
    struct talk talk = {.question = INTRODUCE, .pid = target, .addr = st.st_ino, .count = count};
    memcpy(talk.files, files, count * sizeof(files[0]));
    return ask(companion, &talk);
}

/* One look. What is in `blocked` and was not seen again stays: nothing was read meanwhile, so it
 * waits still. */
static int observe_more(struct companion *companion, pid_t pid, bool woken)
{
    struct talk talk = {.question = OBSERVE, .pid = pid, .woken = woken};
    int r = ask(companion, &talk);
    if (r < 0)
        return r;
    companion->complete &= talk.complete;
    companion->others_free |= talk.others_free;
    for (uint32_t i = 0; i < talk.count; i++) {
        size_t at = 0;
        while (at < companion->blocked_count && companion->blocked[at].tid != talk.blocked[i].tid)
            at++;
        if (at == MF_OBSERVE_MAX) {
            companion->complete = false;
            companion->others_free |= mf_blocked_frees(&talk.blocked[i]);
            continue;
        }
        companion->blocked[at] = talk.blocked[i];
        companion->blocked_count += at == companion->blocked_count;
    }
    return r;
}

/* Whoever's message was read may be seen once more before it has gone on: it has none to come. */
static void carry_over(const struct mf_blocked *before, size_t before_count,
                       struct mf_blocked *blocked, size_t count)
{
    for (size_t i = 0; i < count; i++)
        for (size_t k = 0; k < before_count; k++)
            if (before[k].taken && before[k].tid == blocked[i].tid &&
                before[k].switches == blocked[i].switches)
                blocked[i].taken = true;
}

int companion_observe(struct companion *companion, pid_t pid, bool woken)
{
    struct mf_blocked before[MF_OBSERVE_MAX];
    const size_t before_count = companion->blocked_count;
    memcpy(before, companion->blocked, before_count * sizeof(before[0]));
    const bool soon =
        mf_now_ns() - companion->read_ns < SOON_NS + before_count * (uint64_t)SOON_EACH_NS;
    companion->blocked_count = 0;
    companion->complete = true;
    companion->others_free = false;
    int r = observe_more(companion, pid, woken);
    for (unsigned i = 0; soon && r > 0 && i < SOON_LOOKS; i++) {
        const size_t seen = companion->blocked_count;
        const size_t many = seen > before_count ? seen : before_count;
        nanosleep(&(struct timespec){.tv_nsec = (long)(SOON_PAUSE_NS << i) + (long)many * 10000},
                  NULL);
        r = observe_more(companion, pid, woken);
        if (companion->blocked_count == seen)
            break;
    }
    carry_over(before, before_count, companion->blocked, companion->blocked_count);
    companion->read_ns = mf_now_ns();
    return r;
}

int companion_settle(struct companion *companion, pid_t pid, struct mf_change *change)
{
    struct talk talk = {.question = SETTLE, .pid = pid, .change = *change};
    talk.count = (uint32_t)companion->blocked_count;
    memcpy(talk.blocked, companion->blocked, talk.count * sizeof(talk.blocked[0]));
    int r = ask(companion, &talk);
    if (r >= 0) {
        memcpy(companion->blocked, talk.blocked,
               companion->blocked_count * sizeof(talk.blocked[0]));
        *change = talk.change;
    }
    return r;
}

int companion_maps(struct companion *companion, pid_t tid, uint64_t addr, pid_t *pid)
{
    struct talk talk = {.question = MAPS, .pid = tid, .addr = addr};
    int r = ask(companion, &talk);
    *pid = talk.pid;
    return r;
}

int companion_sender(struct companion *companion, pid_t tid, uint64_t addr, pid_t *pid)
{
    struct talk talk = {.question = SENDER, .pid = tid, .addr = addr};
    int r = ask(companion, &talk);
    *pid = talk.pid;
    return r;
}

int companion_child(struct companion *companion, pid_t tid, pid_t *pid)
{
    struct talk talk = {.question = CHILD, .pid = tid};
    int r = ask(companion, &talk);
    *pid = talk.pid;
    return r;
}

/* Is anybody who may have sent the last event about to free a file's pages? */
static bool is_freed(const struct companion *companion)
{
    for (size_t i = 0; i < companion->blocked_count; i++)
        if (companion->blocked[i].candidate && mf_blocked_frees(&companion->blocked[i]))
            return true;
    return false;
}

bool companion_reason(struct companion *companion, pid_t pid, const struct uffd_msg *message,
                      bool who, struct mf_change *change)
{
    const size_t candidates =
        mf_change_from_event(message, companion->blocked, companion->blocked_count, change);
    bool told = true;
    companion->read_ns = mf_now_ns();
    if (candidates == 0)
        change->reason = MF_REASON_UNKNOWN;
    if (!companion->complete) {
        /* Of some who wait it is known at best that they free nothing. So the event may not be the
         * one's whom it fits, who stays in the list. */
        for (size_t i = 0; i < companion->blocked_count; i++)
            companion->blocked[i].taken = false;
        change->tid = 0;
        if (message->event == UFFD_EVENT_REMOVE)
            change->reason = companion->others_free ? MF_REASON_UNKNOWN : MF_REASON_DONTNEED;
    } else if (candidates > 1 && change->reason != MF_REASON_DONTNEED &&
               (who || change->reason == MF_REASON_UNKNOWN)) {
        told = companion_settle(companion, pid, change) > 0;
    }
    if (message->event == UFFD_EVENT_REMOVE && !change->tid && is_freed(companion))
        change->reason = MF_REASON_REMOVE;
    return told;
}
