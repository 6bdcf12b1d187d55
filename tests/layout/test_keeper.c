/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A child that the target forked waits for its pages whatever is killed: the mover, or its
 * companion, again and again. This is memferryd's part, with the real memferry-mover; pages
 * "arrive" by being put into the file and into the session file.
 *
 * Usage: test_keeper MEMFERRY-MOVER
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "daemon/memferryd/keeper.h"
#include "lib/ipc.h"
#include "lib/session_file.h"
#include "lib/uffd.h"
#include "lib/util.h"

#define PAGE 4096u
#define PAGES 64u
#define CHILDREN 3u

static struct shared {
    _Atomic int uffd; /**< number in the target, plus one */
    _Atomic bool fork_now, exit_now;
    _Atomic uint32_t page; /**< what all of them read next */
    _Atomic uint32_t turn, read_turn[CHILDREN];
    _Atomic uint64_t found[CHILDREN];
    _Atomic int advice[CHILDREN]; /**< for madvise(2), plus one; 0: it is done */
    _Atomic uint32_t advised_page;
} * shared;

static const char *program;
static pid_t target;
static int region_fd, session_fd, uffd, sock;
static uint8_t *bytes; /* the region, as memferryd could map it */
static char *mapped;   /* where the target maps it */
static struct mf_session_view view;
static pid_t mover, companion;
static struct keeper keeper;

static _Noreturn void fail(const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    vfprintf(stderr, fmt, ap);
    va_end(ap);
    fputc('\n', stderr);
    if (mover > 0)
        kill(mover, SIGKILL);
    if (companion > 0)
        kill(companion, SIGKILL);
    if (target > 0)
        kill(-target, SIGKILL);
    exit(1);
}

static void until(bool (*so)(void), const char *what)
{
    for (unsigned i = 0; i < 20000; i++) {
        if (so())
            return;
        usleep(1000);
    }
    fail("not within 20 s: %s", what);
}

/* ---- the target and its children ---- */

static _Noreturn void be_child(unsigned index)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    for (uint32_t turn = 0; !atomic_load(&shared->exit_now);) {
        const int advice = atomic_load(&shared->advice[index]);
        if (advice) {
            madvise(mapped + atomic_load(&shared->advised_page) * PAGE, PAGE, advice - 1);
            atomic_store(&shared->advice[index], 0);
        }
        if (atomic_load(&shared->turn) == turn) {
            usleep(1000);
            continue;
        }
        turn = atomic_load(&shared->turn);
        const volatile uint64_t *at =
            (const volatile uint64_t *)(void *)(mapped + atomic_load(&shared->page) * PAGE);
        atomic_store(&shared->found[index], *at);
        atomic_store(&shared->read_turn[index], turn);
    }
    _exit(0);
}

static _Noreturn void be_target(void)
{
    setpgid(0, 0);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    mapped = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, region_fd, 0);
    atomic_store(&shared->uffd, (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK) + 1);
    while (!atomic_load(&shared->fork_now))
        usleep(1000);
    for (unsigned i = 0; i < CHILDREN; i++) {
        if (fork() != 0)
            continue;
        if (i + 1 == CHILDREN && fork() != 0) { /* the last one is a grandchild */
            wait(NULL);
            _exit(0);
        }
        be_child(i);
    }
    while (wait(NULL) > 0)
        ;
    pause();
    _exit(0);
}

/* ---- memferryd's part ---- */

static void give(const struct mf_ipc *message, int fd)
{
    int r = mf_ipc_send(sock, message, fd);
    if (r < 0)
        fail("the mover does not take its orders: %s", strerror(-r));
}

static void start_mover(bool restarted)
{
    int pair[2];
    struct stat st;
    struct mf_ipc message;
    char path[64];
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) != 0 ||
        fstat(region_fd, &st) != 0)
        fail("no socket");
    mover = fork();
    if (mover == 0) {
        if (dup2(pair[1], 3) < 0)
            _exit(127);
        fcntl(3, F_SETFD, 0);
        execl(program, "memferry-mover", "3", "65534", "65534", "5", "destination", (char *)NULL);
        _exit(127);
    }
    close(pair[1]);
    sock = pair[0];
    struct mf_ipc setup = {.type = MF_IPC_SETUP,
                           .setup = {.role = MF_DESTINATION,
                                     .region_count = 1,
                                     .context_count = 1,
                                     .name = "keeper",
                                     .pid = target,
                                     .restarted = restarted}};
    give(&setup, session_fd);
    struct mf_ipc region = {.type = MF_IPC_REGION,
                            .region = {.name = "ram",
                                       .size_bytes = PAGES * PAGE,
                                       .page_bytes = PAGE,
                                       .kind = MF_MEMORY_TMPFS,
                                       .device = st.st_dev,
                                       .inode = st.st_ino}};
    give(&region, region_fd);
    give(&(struct mf_ipc){.type = MF_IPC_CONTEXT}, uffd);
    snprintf(path, sizeof(path), "/proc/%d/maps", (int)target);
    cleanup_close int maps_fd = open(path, O_RDONLY | O_CLOEXEC);
    give(&(struct mf_ipc){.type = MF_IPC_MAPS}, maps_fd);
    for (unsigned i = 0; i < keeper.count; i++)
        give(&(struct mf_ipc){.type = MF_IPC_CONTEXT, .context = {.child = true}}, keeper.uffd[i]);
    give(&(struct mf_ipc){.type = MF_IPC_MAPPING,
                          .mapping = {.start_addr = (uintptr_t)mapped,
                                      .length_bytes = PAGES * PAGE}},
         -1);
    give(&(struct mf_ipc){.type = MF_IPC_GO}, -1);
    companion = 0;
    do {
        int fd = -1;
        if (mf_ipc_receive(sock, &message, &fd) <= 0)
            fail("the mover does not get ready");
        if (message.type == MF_IPC_COMPANION)
            companion = message.companion_pid;
    } while (message.type != MF_IPC_READY);
    if (companion <= 0)
        fail("the mover has no companion");
    keeper_drop(&keeper);
}

static void reap(pid_t *pid, int expected_signal)
{
    int status;
    if (waitpid(*pid, &status, 0) != *pid || !WIFSIGNALED(status) ||
        WTERMSIG(status) != expected_signal)
        fail("process %d ended in another way than it was ended (%#x)", (int)*pid, status);
    *pid = 0;
}

static unsigned held(pid_t pid)
{
    struct mf_error err;
    struct keeper seen = {0};
    int r = keeper_take(&seen, pid, uffd, &err);
    if (r < 0)
        fail("%s", err.text);
    keeper_drop(&seen);
    return (unsigned)r;
}

/* ---- what is waited for ---- */

static bool has_uffd(void)
{
    return atomic_load(&shared->uffd) > 0;
}

static bool holds_all(void)
{
    return held(mover) == CHILDREN + 1; /* and the one between */
}

/* Its descriptors too, not only that they are of no use any more. */
static bool holds_none(void)
{
    char path[64], link[64];
    unsigned count = 0;
    for (int fd = 0; fd < 256; fd++) {
        snprintf(path, sizeof(path), "/proc/%d/fd/%d", (int)mover, fd);
        ssize_t n = readlink(path, link, sizeof(link) - 1);
        link[n > 0 ? n : 0] = '\0';
        count += strcmp(link, "anon_inode:[userfaultfd]") == 0;
    }
    return count == 1;
}

static bool all_have_read(void)
{
    for (unsigned i = 0; i < CHILDREN; i++)
        if (atomic_load(&shared->read_turn[i]) != atomic_load(&shared->turn))
            return false;
    return true;
}

static void nobody_reads_on(const char *when)
{
    usleep(100000);
    for (unsigned i = 0; i < CHILDREN; i++)
        if (atomic_load(&shared->read_turn[i]) == atomic_load(&shared->turn))
            fail("child %u went on %s, and found %#llx", i, when,
                 (unsigned long long)atomic_load(&shared->found[i]));
}

static void read_page(uint32_t page)
{
    atomic_store(&shared->page, page);
    atomic_fetch_add(&shared->turn, 1);
}

/* The page arrives; who waits faults again, as after a restart. */
static void arrive(uint32_t page)
{
    const uint64_t value = UINT64_C(0xa5a5000000000000) | page;
    memcpy(bytes + (size_t)page * PAGE, &value, sizeof(value));
    atomic_store(&view.pages[0].state[page], MF_PAGE_CONFIRMED);
    struct mf_error err;
    struct keeper seen = {0};
    if (keeper_take(&seen, mover, uffd, &err) < 0)
        fail("%s", err.text);
    for (unsigned i = 0; i < seen.count; i++)
        mf_uffd_wake(seen.uffd[i], (uintptr_t)mapped, PAGES * PAGE);
    keeper_drop(&seen);
    until(all_have_read, "all children have the page");
    for (unsigned i = 0; i < CHILDREN; i++)
        if (atomic_load(&shared->found[i]) != value)
            fail("child %u found %#llx on page %u", i,
                 (unsigned long long)atomic_load(&shared->found[i]), page);
}

static bool has_advised(void)
{
    for (unsigned i = 0; i < CHILDREN; i++)
        if (atomic_load(&shared->advice[i]))
            return false;
    return true;
}

/* A child that has touched nothing yet: which call it makes is seen all the same. */
static void advise(unsigned child, int advice, uint32_t page, enum mf_page_state expected)
{
    atomic_store(&shared->advised_page, page);
    atomic_store(&shared->advice[child], advice + 1);
    until(has_advised, "a child discards");
    /* The child goes on when its event was read, and that is applied a moment later. */
    enum mf_page_state found = MF_PAGE_UNCONFIRMED;
    for (unsigned i = 0; i < (expected == MF_PAGE_UNCONFIRMED ? 5 : 5000); i++) {
        usleep(1000);
        found = mf_page_state_of(atomic_load(&view.pages[0].state[page]));
        if (found != MF_PAGE_UNCONFIRMED)
            break;
    }
    if (found != expected || atomic_load(&view.file->figures.removes_unknown) > 0)
        fail("after madvise %d by child %u page %u is in state %d", advice, child, page, found);
}

static void take_from(pid_t pid)
{
    struct mf_error err;
    int r = keeper_take(&keeper, pid, uffd, &err);
    if (r != (int)CHILDREN + 1)
        fail("%d userfaultfds were left where %u should have been: %s", r, CHILDREN + 1,
             r < 0 ? err.text : "");
}

static void kill_mover(void)
{
    kill(mover, SIGKILL);
    reap(&mover, SIGKILL);
    nobody_reads_on("when the mover was killed");
    take_from(companion);
    kill(companion, SIGKILL);
    reap(&companion, SIGKILL);
    close(sock);
}

static void kill_companion(void)
{
    kill(companion, SIGKILL);
    reap(&companion, SIGKILL);
    nobody_reads_on("when the companion was killed");
    kill(mover, SIGSTOP);
    take_from(mover);
    kill(mover, SIGKILL);
    reap(&mover, SIGKILL);
    close(sock);
}

/* While nobody waits. */
static void take_over_quietly(void)
{
    kill(mover, SIGKILL);
    reap(&mover, SIGKILL);
    take_from(companion);
    kill(companion, SIGKILL);
    reap(&companion, SIGKILL);
    close(sock);
    start_mover(true);
}

int main(int argc, char **argv)
{
    uint64_t features;
    const uint64_t pages = PAGES;
    struct mf_error err;
    if (mf_uffd_features(&features, &err) < 0 ||
        (features & MF_UFFD_FEATURES) != MF_UFFD_FEATURES || geteuid() != 0) {
        fprintf(stderr, "skipped: userfaultfd with MINOR_SHMEM and CAP_SYS_PTRACE are not to be "
                        "had here\n");
        return 77;
    }
    if (argc != 2)
        return 2;
    program = argv[1];
    signal(SIGPIPE, SIG_IGN);
    shared = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    region_fd = memfd_create("memferry-keeper-ram", MFD_CLOEXEC);
    session_fd = memfd_create("memferry-keeper", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (shared == MAP_FAILED || ftruncate(region_fd, PAGES * PAGE) != 0)
        fail("no memory");
    if (mf_session_file_create(session_fd, &pages, 1, &err) < 0 ||
        mf_session_file_map(session_fd, &view, &err) < 0)
        fail("%s", err.text);
    bytes = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, region_fd, 0);
    target = fork();
    if (target == 0)
        be_target();
    until(has_uffd, "the target starts");
    cleanup_close int pidfd = (int)syscall(SYS_pidfd_open, target, 0);
    uffd = (int)syscall(SYS_pidfd_getfd, pidfd, atomic_load(&shared->uffd) - 1, 0);
    cleanup_free struct mf_vma *vmas = NULL;
    size_t vma_count = 0;
    struct stat st;
    if (uffd < 0 || fstat(region_fd, &st) != 0 ||
        mf_target_vmas(target, &vmas, &vma_count, &err) < 0)
        fail("cannot take hold of the target");
    /* The target maps it first, so its copy of ours, from the fork, lies elsewhere. */
    for (size_t i = 0; i < vma_count; i++)
        if (vmas[i].inode == st.st_ino && vmas[i].device == st.st_dev &&
            vmas[i].start_addr != (uintptr_t)bytes)
            mapped = (char *)(uintptr_t)vmas[i].start_addr; /* NOLINT: there */
    if (!mapped ||
        mf_uffd_api(uffd, MF_UFFD_FEATURES | UFFD_FEATURE_EVENT_FORK, MF_UFFD_FEATURES_WANTED, NULL,
                    &err) < 0 ||
        mf_uffd_register(uffd, (uintptr_t)mapped, PAGES * PAGE, &err) < 0)
        fail("cannot arm the target: %s", err.text);
    start_mover(false);
    atomic_store(&shared->fork_now, true);
    until(holds_all, "the mover follows all children");
    for (unsigned i = 0; i < CHILDREN; i++) {
        advise(i, MADV_DONTNEED, 20 + i, MF_PAGE_UNCONFIRMED);
        advise(i, MADV_REMOVE, 30 + i, MF_PAGE_DISCARDED);
    }
    read_page(0);
    nobody_reads_on("before the page arrived");
    for (uint32_t page = 0; page < 8; page++) {
        if (page % 2)
            kill_companion();
        else
            kill_mover();
        start_mover(true);
        nobody_reads_on("when the next mover took over");
        arrive(page);
        read_page(page + 1);
        nobody_reads_on("before the page arrived");
    }
    arrive(8);
    /* Nor does the next mover know which process a context is of. */
    read_page(0);
    until(all_have_read, "all children are through");
    take_over_quietly();
    for (unsigned i = 0; i < CHILDREN; i++) {
        advise(i, MADV_DONTNEED, 40 + i, MF_PAGE_UNCONFIRMED);
        advise(i, MADV_REMOVE, 50 + i, MF_PAGE_DISCARDED);
    }
    atomic_store(&shared->exit_now, true);
    until(holds_none, "the mover lets go of children that are gone");
    close(sock);
    int status;
    if (waitpid(mover, &status, 0) != mover || status != 0)
        fail("the mover ends with status %#x", (unsigned)status);
    if (waitpid(companion, &status, 0) != companion || status != 0)
        fail("the companion ends with status %#x", (unsigned)status);
    kill(target, SIGKILL);
    waitpid(target, &status, 0);
    printf("8 kills, and every child found its pages\n");
    return 0;
}
