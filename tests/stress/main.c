/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * usage: stress [--memory shmem|hugetlb|anonymous] [--same-process] [--processes N] [--threads N]
 *               [--contexts N] [--operations N] [--seconds N] [--rounds N]
 *               [--quiet-children] [--sabotage wrong-page|lost-fault]
 *
 * --quiet-children: children of fork(2) read, fork and exec, but change nothing. What they may
 * change and what not is in memferry.h (MEMFERRY_FOLLOW_FORKS); without this option they do all the
 * same.
 *
 * Rounds until the time is over or so many are done. MF_SEED=N replays: the first round's seed is
 * N, each further one's is one more. Exit 0: not one wrong page, no fault unanswered, nothing
 * leaked.
 *
 * The watchdog. That a thread waits for long proves nothing on a machine with a lot to do. It fails
 * if for more than a second a thread that waits was asleep four times out of five that it was
 * looked at, together with all threads of the server: who is about to answer is running or wants
 * to. Whatever its reason, a wait of 30 seconds fails. The longest one is told.
 */
#include "tests/stress/stress.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "lib/util.h"
#include "tests/kernel/area.h"

#define LOOK_US 20000u
#define UNANSWERED_NS UINT64_C(1000000000)
#define LOOKS_MIN 20u
#define ENDLESS_NS UINT64_C(30000000000)
#define SLOTS (OWNERS_MAX * SLOTS_OF_THREAD)

struct config config = {
    .memory = MEMFERRY_SHMEM, .processes = 1, .threads = 3, .contexts = 2, .operations = 300};
struct shared *shared;
int region_fd[REGIONS_MAX] = {-1, -1, -1};

static const struct serving *serving_here;
static unsigned rounds = UINT32_MAX;
static uint64_t seconds = 5;

/* ---- requests of target processes ---- */

struct requests {
    pthread_t thread;
    int socket;
    struct serving *serving;
};

static void *answer_requests(void *argument)
{
    struct requests *r = argument;
    for (;;) {
        struct request request;
        union {
            struct cmsghdr header;
            char room[CMSG_SPACE(sizeof(int))];
        } control;
        struct iovec part = {&request, sizeof(request)};
        struct msghdr message = {.msg_iov = &part,
                                 .msg_iovlen = 1,
                                 .msg_control = &control,
                                 .msg_controllen = sizeof(control)};
        int fd = -1;
        if (recvmsg(r->socket, &message, MSG_CMSG_CLOEXEC) != (ssize_t)sizeof(request))
            return NULL;
        const struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        if (header && header->cmsg_type == SCM_RIGHTS)
            memcpy(&fd, CMSG_DATA(header), sizeof(fd));
        const int answer = serving_request(r->serving, &request, fd);
        if (fd >= 0)
            close(fd);
        send(r->socket, &answer, sizeof(answer), MSG_NOSIGNAL);
    }
}

/* ---- the watchdog ---- */

struct watch {
    uint64_t since_ns, looks;
    uint64_t awake; /* so often somebody was */
};

static bool sleeps(int pid, int tid)
{
    char path[64], text[512];
    snprintf(path, sizeof(path), "/proc/%d/task/%d/stat", pid, tid);
    FILE *file = fopen(path, "re");
    if (!file)
        return false;
    size_t length = fread(text, 1, sizeof(text) - 1, file);
    fclose(file);
    text[length] = '\0';
    const char *state = strrchr(text, ')');
    return state && (state[2] == 'S' || state[2] == 'D');
}

static bool server_sleeps(void)
{
    const unsigned count = atomic_load(&shared->server_tasks);
    for (unsigned i = 0; i < count && i < SERVER_TASKS; i++)
        if (!sleeps(shared->server[i].pid, shared->server[i].tid))
            return false;
    return true;
}

static void show_file(int pid, int tid, const char *name)
{
    char path[64], text[1024];
    snprintf(path, sizeof(path), "/proc/%d/task/%d/%s", pid, tid, name);
    FILE *file = fopen(path, "re");
    if (!file)
        return;
    size_t length = fread(text, 1, sizeof(text) - 1, file);
    fclose(file);
    text[length] = '\0';
    fprintf(stderr, "  %s: %s\n", name, text);
}

/* What each userfaultfd of the server has: faults not read, and all that wait. */
static void show_userfaultfds(int pid)
{
    char path[64], line[128];
    snprintf(path, sizeof(path), "/proc/%d/fdinfo", pid);
    cleanup_closedir DIR *list = opendir(path);
    for (const struct dirent *entry; list && (entry = readdir(list));) {
        unsigned pending = 0, total = 0;
        cleanup_close int dir = open(path, O_PATH | O_CLOEXEC);
        int fd = openat(dir, entry->d_name, O_RDONLY | O_CLOEXEC);
        FILE *file = fd >= 0 ? fdopen(fd, "re") : NULL;
        while (file && fgets(line, sizeof(line), file))
            if (sscanf(line, "pending: %u", &pending) == 1 ||
                sscanf(line, "total: %u", &total) == 1)
                continue;
        if (file)
            fclose(file);
        if (total > 0)
            fprintf(stderr, "  descriptor %s: %u faults not read, %u wait\n", entry->d_name,
                    pending, total);
    }
}

static void unanswered(const struct slot *slot, uint64_t waited_ns, const char *why)
{
    const int pid = slot->pid, tid = slot->tid;
    fprintf(stderr, "UNANSWERED thread %d of process %d waits for %.1f s: %s at %#llx; %s\n", tid,
            pid, (double)waited_ns / 1e9, slot->what, (unsigned long long)slot->addr, why);
    show_file(pid, tid, "stack");
    show_userfaultfds(shared->server[0].pid);
    if (config.same_process) {
        atomic_store(&shared->tell_addr, slot->addr);
        atomic_store(&shared->tell_id, slot->id);
        kill(shared->server[0].pid, SIGUSR1);
        nap_us(100000);
    }
    if (serving_here)
        serving_tell(serving_here, slot->id, slot->addr);
    for (unsigned i = 0; i < atomic_load(&shared->server_tasks); i++) {
        fprintf(stderr, "  server's thread %d:\n", shared->server[i].tid);
        show_file(shared->server[i].pid, shared->server[i].tid, "stack");
    }
    atomic_store(&shared->stop, true);
}

static void look(struct watch *watch)
{
    const uint64_t now_ns = mf_now_ns();
    int idle = -1; /* not looked yet */
    for (unsigned i = 0; i < SLOTS; i++) {
        const struct slot *slot = &shared->slot[i];
        const uint64_t since_ns = atomic_load(&slot->since_ns);
        if (since_ns != watch[i].since_ns)
            watch[i] = (struct watch){.since_ns = since_ns};
        if (since_ns == 0 || now_ns < since_ns + UNANSWERED_NS / 10 ||
            strcmp(slot->what, "waiting for a child") == 0)
            continue;
        if (idle < 0)
            idle = server_sleeps();
        watch[i].looks++;
        watch[i].awake += !idle || !sleeps(slot->pid, slot->tid);
        const uint64_t waited_ns = now_ns - since_ns;
        if (atomic_load(&slot->since_ns) != since_ns)
            continue;
        if (atomic_load(&slot->touches) && watch[i].awake * 5 <= watch[i].looks &&
            watch[i].looks >= LOOKS_MIN && waited_ns > UNANSWERED_NS)
            unanswered(slot, waited_ns, "and all that could answer sleep");
        else if (waited_ns > ENDLESS_NS)
            unanswered(slot, waited_ns, "too long for whatever reason");
        else
            continue;
        return;
    }
}

/* ---- rounds ---- */

static void make_regions(void)
{
    for (uint32_t id = 0; id < REGION_IDS; id++) {
        atomic_store(&shared->page[id].generation, initial_generation(id));
        atomic_store(&shared->page[id].next, initial_generation(id));
        atomic_store(&shared->mapped[id], config.memory != MEMFERRY_ANONYMOUS);
    }
    for (unsigned i = 0; i < config.regions && config.memory != MEMFERRY_ANONYMOUS; i++) {
        region_fd[i] = memfd_create(
            "memferry-stress", MFD_CLOEXEC | (config.memory == MEMFERRY_HUGETLB ? MFD_HUGETLB : 0));
        need(region_fd[i] >= 0 &&
             ftruncate(region_fd[i], (off_t)(config.pages * config.page_bytes)) == 0);
    }
}

static void free_regions(void)
{
    for (unsigned i = 0; i < REGIONS_MAX; i++) {
        mf_close_p(&region_fd[i]);
        region_fd[i] = -1;
    }
}

static pid_t start_target(unsigned number, int socket)
{
    fflush(NULL);
    pid_t pid = fork();
    need(pid >= 0);
    if (pid > 0)
        return pid;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    exit(target_main(number, socket));
}

/* Return: did every target end well? */
static bool await_targets(const pid_t *pid)
{
    static struct watch watch[SLOTS];
    unsigned left = config.processes;
    bool well = true;
    pid_t running[PROCESSES_MAX];
    memcpy(running, pid, sizeof(running));
    memset(watch, 0, sizeof(watch));
    uint64_t stopped_ns = 0;
    /* MF_HOLD=1: time to attach a debugger. */
    const uint64_t grace_ns = getenv("MF_HOLD") ? 2 * ENDLESS_NS : UNANSWERED_NS;
    while (left > 0) {
        nap_us(LOOK_US);
        if (!atomic_load(&shared->stop))
            look(watch);
        else if (!stopped_ns)
            stopped_ns = mf_now_ns();
        for (unsigned i = 0; i < config.processes; i++) {
            int status = 0;
            if (running[i] == 0)
                continue;
            /* After a failure the others may wait for what never comes. */
            if (stopped_ns && mf_now_ns() > stopped_ns + grace_ns)
                kill(running[i], SIGKILL);
            if (waitpid(running[i], &status, WNOHANG) != running[i])
                continue;
            running[i] = 0;
            left--;
            if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) {
                fprintf(stderr, "a target ended with status %#x\n", (unsigned)status);
                atomic_store(&shared->stop, true);
                well = false;
            }
        }
    }
    return well;
}

static bool play_round(void)
{
    pid_t pid[PROCESSES_MAX] = {0};
    struct requests requests[PROCESSES_MAX];
    struct serving *serving = NULL;
    atomic_store(&shared->server_tasks, 0);
    atomic_store(&shared->set_up, 0);
    for (unsigned i = 0; i < SLOTS; i++)
        atomic_store(&shared->slot[i].since_ns, 0);
    make_regions();
    for (unsigned i = 0; i < config.processes; i++) {
        int pair[2] = {-1, -1};
        if (!config.same_process)
            need(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) == 0);
        pid[i] = start_target(i, pair[1]);
        mf_close_p(&pair[1]);
        requests[i].socket = pair[0];
    }
    if (!config.same_process) {
        serving = serving_start();
        serving_here = serving;
        for (unsigned i = 0; i < config.processes; i++) {
            requests[i].serving = serving;
            need(pthread_create(&requests[i].thread, NULL, answer_requests, &requests[i]) == 0);
        }
    }
    bool well = await_targets(pid);
    for (unsigned i = 0; i < config.processes && !config.same_process; i++) {
        shutdown(requests[i].socket, SHUT_RDWR);
        pthread_join(requests[i].thread, NULL);
        close(requests[i].socket);
    }
    serving_here = NULL;
    serving_free(serving);
    free_regions();
    return well && !atomic_load(&shared->stop);
}

static void report(unsigned played)
{
    printf("%u rounds: %llu operations, %llu pages verified, %llu faults, %llu events, %llu forks, "
           "%llu execs, %llu kills, %llu pages of data, %llu of zeros, %llu discarded, %llu "
           "refused by the kernel; the longest wait %.1f ms\n",
           played, (unsigned long long)shared->operations,
           (unsigned long long)shared->verified_pages, (unsigned long long)shared->faults,
           (unsigned long long)shared->events, (unsigned long long)shared->forks,
           (unsigned long long)shared->execs, (unsigned long long)shared->kills,
           (unsigned long long)shared->data_pages, (unsigned long long)shared->zero_pages,
           (unsigned long long)shared->discarded_pages, (unsigned long long)shared->refused,
           (double)shared->longest_wait_ns / 1e6);
}

static bool parse(int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        const char *value = i + 1 < argc ? argv[i + 1] : "";
        if (strcmp(argv[i], "--same-process") == 0) {
            config.same_process = true;
            continue;
        }
        if (strcmp(argv[i], "--quiet-children") == 0) {
            config.quiet_children = true;
            continue;
        }
        i++;
        if (strcmp(argv[i - 1], "--memory") == 0)
            config.memory = strcmp(value, "hugetlb") == 0     ? MEMFERRY_HUGETLB
                            : strcmp(value, "anonymous") == 0 ? MEMFERRY_ANONYMOUS
                                                              : MEMFERRY_SHMEM;
        else if (strcmp(argv[i - 1], "--sabotage") == 0)
            config.sabotage =
                strcmp(value, "wrong-page") == 0 ? SABOTAGE_WRONG_PAGE : SABOTAGE_LOST_FAULT;
        else if (strcmp(argv[i - 1], "--processes") == 0)
            config.processes = (unsigned)atoi(value);
        else if (strcmp(argv[i - 1], "--threads") == 0)
            config.threads = (unsigned)atoi(value);
        else if (strcmp(argv[i - 1], "--contexts") == 0)
            config.contexts = (unsigned)atoi(value);
        else if (strcmp(argv[i - 1], "--operations") == 0)
            config.operations = (unsigned)atoi(value);
        else if (strcmp(argv[i - 1], "--seconds") == 0)
            seconds = (uint64_t)atoi(value);
        else if (strcmp(argv[i - 1], "--rounds") == 0)
            rounds = (unsigned)atoi(value);
        else
            return false;
    }
    return config.processes >= 1 && config.processes <= PROCESSES_MAX && config.threads >= 1 &&
           config.threads <= THREADS_MAX && config.contexts >= 1 &&
           config.contexts <= CONTEXTS_MAX &&
           (config.processes == 1 || (!config.same_process && config.memory != MEMFERRY_ANONYMOUS));
}

int main(int argc, char **argv)
{
    if (argc == 2 && strcmp(argv[1], "exec-child") == 0)
        _exit(0);
    if (!parse(argc, argv)) {
        fprintf(stderr, "usage: see tests/stress/main.c\n");
        return 2;
    }
    const bool huge = config.memory == MEMFERRY_HUGETLB;
    config.regions = huge ? 2 : REGIONS_MAX;
    config.pages = huge ? 8 : REGION_PAGES_MAX;
    config.page_bytes = huge ? UINT64_C(2) << 20 : 4096;
    if (huge && !huge_pages_reserve(2 * config.regions * (unsigned)config.pages))
        return 77;
    shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (shared == MAP_FAILED)
        return 2;
    atomic_store(&shared->generation, INITIAL);
    uint64_t first_seed = 0;
    const char *given = getenv("MF_SEED");
    if (given)
        first_seed = strtoull(given, NULL, 0);
    else if (getrandom(&first_seed, 4, 0) != 4)
        return 2;
    printf("MF_SEED=%llu\n", (unsigned long long)first_seed);
    const unsigned descriptors = open_descriptors();
    const uint64_t end_ns = mf_now_ns() + seconds * UINT64_C(1000000000);
    bool well = true;
    unsigned played = 0;
    for (; well && played < rounds && (played == 0 || mf_now_ns() < end_ns); played++) {
        config.seed = first_seed + played;
        well = play_round();
    }
    report(played);
    if (!well)
        fprintf(stderr, "failed in the round of MF_SEED=%llu\n", (unsigned long long)config.seed);
    const unsigned left = open_descriptors();
    if (left != descriptors) {
        fprintf(stderr, "%u descriptors before, %u afterwards\n", descriptors, left);
        well = false;
    }
    return well ? 0 : 1;
}
