/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Drives two real QEMUs with the QEMU adapter alone: no mover, no network. The device stream goes
 * over a socketpair whose ends the two QEMUs get; guest RAM is copied file to file while the source
 * waits in pre-switchover. The guest is a tiny firmware that counts in memory, so that "runs" and
 * "stands still" can be read from the RAM files.
 *
 * Usage: adapter_drive [--qemu PROGRAM] [--accel NAME] [--ram-mib N] [--verbose] [CASE…]
 * Exit: 0 all cases passed, 1 a case failed, 77 QEMU is missing.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "lib/log.h"
#include "lib/util.h"
#include "tests/e2e/adapter_host.h"

#define CASE_TIMEOUT_S 90

/* ---- parts of a migration ---- */

static bool both(enum memory memory, const char *const *more)
{
    return host_start(&source, "src", VMM_SOURCE, memory, more) &&
           host_start(&destination, "dst", VMM_DESTINATION, memory, more) &&
           check(counts(&source), "the guest does not count") && attach_passing(&source) &&
           attach_passing(&destination);
}

static bool connect_both(void)
{
    int ends[2];
    if (!check(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0, "socketpair"))
        return false;
    vmm_qemu.start_incoming(destination.vmm, ends[1]);
    close(ends[1]);
    bool listening = wait_for(&destination, VMM_INCOMING, "VMM_INCOMING");
    if (listening)
        vmm_qemu.start_outgoing(source.vmm, ends[0]);
    close(ends[0]);
    return listening;
}

static bool until_paused(void)
{
    if (!connect_both() || !wait_for(&source, VMM_STOPPED, "VMM_STOPPED") ||
        !wait_for(&source, VMM_PAUSED, "VMM_PAUSED"))
        return false;
    return check(copy_ram(), "copying RAM: %s", strerror(errno)) &&
           check(stands_still(&source), "the guest runs in pre-switchover");
}

/* The guest is back, as it was, and QEMU's settings are what they were. */
static void check_returned(json_t *capabilities, json_t *parameters, bool runs)
{
    source.at_ns[VMM_FAILED] = 0;
    vmm_qemu.return_guest(source.vmm);
    if (!wait_for(&source, VMM_RETURNED, "VMM_RETURNED"))
        return;
    if (runs) {
        check_run_state(&source, "running");
        check(counts(&source), "the guest does not run after return_guest");
    } else {
        check(stands_still(&source), "a paused guest runs after return_guest");
    }
    json_t *now = ask(&source, "query-migrate-capabilities");
    check(json_equal(now, capabilities), "migration capabilities are not restored");
    json_decref(now);
    now = ask(&source, "query-migrate-parameters");
    check(json_equal(now, parameters), "migration parameters are not restored");
    json_decref(now);
}

static double ms(uint64_t from_ns, uint64_t to_ns)
{
    return (double)(to_ns - from_ns) / 1e6;
}

/* ---- cases ---- */

static void migrate_with(const char *const *more, bool runs)
{
    if (!both(FILE_SHARED, more))
        return;
    if (!runs) {
        json_decref(ask(&source, "stop"));
        moment(50000);
    }
    check(source.info->was_running == runs, "was_running is wrong");
    if (!until_paused())
        return;
    uint32_t at_pause = counter(&source);
    uint64_t finish_ns = mf_now_ns();
    vmm_qemu.finish_outgoing(source.vmm);
    if (!wait_for(&destination, VMM_LOADED, "VMM_LOADED") ||
        !wait_for(&source, VMM_COMPLETED, "VMM_COMPLETED"))
        return;
    check_run_state(&destination, "paused");
    check(counter(&destination) == at_pause, "the destination's guest ran before resume");
    uint64_t resume_ns = mf_now_ns();
    vmm_qemu.resume(destination.vmm, runs);
    if (!wait_for(&destination, VMM_RUNNING, "VMM_RUNNING"))
        return;
    if (runs)
        check(counts(&destination), "the guest does not run at the destination");
    else
        check(stands_still(&destination), "a paused guest runs at the destination");
    check(counter(&source) == at_pause, "the guest ran at the source after pre-switchover");
    vmm_qemu.quit(source.vmm);
    if (wait_for(&source, VMM_GONE, "VMM_GONE")) {
        waitpid(source.pid, NULL, 0);
        source.pid = 0;
    }
    printf("     %s: stop to pre-switchover %.2f ms, continue to loaded %.2f, to completed %.2f, "
           "cont to "
           "running %.2f\n",
           source.info->version, ms(source.at_ns[VMM_STOPPED], source.at_ns[VMM_PAUSED]),
           ms(finish_ns, destination.at_ns[VMM_LOADED]), ms(finish_ns, source.at_ns[VMM_COMPLETED]),
           ms(resume_ns, destination.at_ns[VMM_RUNNING]));
}

static void case_migrate(void)
{
    migrate_with(NULL, true);
}

static void case_migrate_paused(void)
{
    migrate_with(NULL, false);
}

static void case_sandbox(void)
{
    static const char *const more[] = {"-sandbox", "on", NULL};
    migrate_with(more, true);
}

enum point {
    BEFORE,
    STARTING,
    PAUSED,
    FINISHING,
    COMPLETED,
    DESTINATION_DEAD,
    DESTINATION_STALLED
};

static void return_at(enum point point, bool runs)
{
    if (!both(FILE_SHARED, NULL))
        return;
    if (!runs) {
        json_decref(ask(&source, "stop"));
        moment(50000);
    }
    json_t *capabilities = ask(&source, "query-migrate-capabilities");
    json_t *parameters = ask(&source, "query-migrate-parameters");
    bool there = true;
    if (point == STARTING)
        there = connect_both();
    else if (point > STARTING)
        there = until_paused();
    if (there && point == DESTINATION_DEAD) {
        host_kill(&destination);
        wait_for(&destination, VMM_FAILED, "VMM_FAILED");
    }
    if (there && point == DESTINATION_STALLED)
        kill(destination.pid, SIGSTOP);
    if (there && point >= FINISHING)
        vmm_qemu.finish_outgoing(source.vmm);
    /* The destination has loaded and lives on: it must not hold the disk's lock before it runs. */
    if (there && point == COMPLETED)
        there = wait_for(&source, VMM_COMPLETED, "VMM_COMPLETED");
    if (there && point == DESTINATION_DEAD)
        there = wait_for(&source, VMM_FAILED, "VMM_FAILED");
    if (there)
        check_returned(capabilities, parameters, runs);
    json_decref(capabilities);
    json_decref(parameters);
}

/* A link so thin that the screen gets dirty faster than the first downtime limit allows for. */
struct link {
    int source, destination;
};

static void *thin_link(void *arg)
{
    struct link *link = arg;
    struct pollfd ends[2] = {{.fd = link->source, .events = POLLIN},
                             {.fd = link->destination, .events = POLLIN}};
    char data[2048];
    for (;;) {
        poll(ends, 2, -1);
        for (int i = 0; i < 2; i++) {
            if (!ends[i].revents)
                continue;
            ssize_t n = read(ends[i].fd, data, sizeof(data));
            if (n <= 0 || mf_write_all(ends[1 - i].fd, data, (size_t)n)) {
                shutdown(ends[0].fd, SHUT_RDWR);
                shutdown(ends[1].fd, SHUT_RDWR);
                return NULL;
            }
            if (i == 0)
                usleep(4000); /* about 0.5 MB/s towards the destination */
        }
    }
}

static void case_thin_link(void)
{
    int out[2], in[2];
    pthread_t thread;
    if (!both(FILE_SHARED, NULL))
        return;
    if (!check(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, out) == 0 &&
                   socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, in) == 0,
               "socketpair"))
        return;
    int few = 4096;
    setsockopt(out[0], SOL_SOCKET, SO_SNDBUF, &few, sizeof(few));
    struct link link = {out[1], in[0]};
    vmm_qemu.start_incoming(destination.vmm, in[1]);
    close(in[1]);
    vmm_qemu.start_outgoing(source.vmm, out[0]);
    close(out[0]);
    pthread_create(&thread, NULL, thin_link, &link);
    if (wait_for(&source, VMM_PAUSED, "VMM_PAUSED") && check(copy_ram(), "copying RAM")) {
        vmm_qemu.finish_outgoing(source.vmm);
        if (wait_for(&source, VMM_COMPLETED, "VMM_COMPLETED") &&
            wait_for(&destination, VMM_LOADED, "VMM_LOADED"))
            printf("     stop to loaded %.0f ms over the thin link\n",
                   ms(source.at_ns[VMM_STOPPED], destination.at_ns[VMM_LOADED]));
    }
    host_kill(&source);
    pthread_join(thread, NULL);
    close(link.source);
    close(link.destination);
}

static void case_return_before(void)
{
    return_at(BEFORE, true);
}
static void case_return_starting(void)
{
    return_at(STARTING, true);
}
static void case_return_paused(void)
{
    return_at(PAUSED, true);
}
static void case_return_paused_guest(void)
{
    return_at(PAUSED, false);
}
static void case_return_finishing(void)
{
    return_at(FINISHING, true);
}
static void case_return_completed(void)
{
    return_at(COMPLETED, true);
}
static void case_destination_stalled(void)
{
    return_at(DESTINATION_STALLED, true);
}
static void case_destination_dead(void)
{
    return_at(DESTINATION_DEAD, true);
}

/* Whenever the guest is called back, whatever is under way, it comes back. */
static void case_return_anytime(void)
{
    if (!host_start(&source, "src", VMM_SOURCE, FILE_SHARED, NULL) || !attach_passing(&source))
        return;
    json_t *capabilities = ask(&source, "query-migrate-capabilities");
    json_t *parameters = ask(&source, "query-migrate-parameters");
    unsigned rounds = 0, completed = 0;
    for (long after_us = 0; after_us < 45000 && !failures; after_us += 1500) {
        memset(source.at_ns, 0, sizeof(source.at_ns));
        source.finish_when_paused = true;
        if (host_start(&destination, "dst", VMM_DESTINATION, FILE_SHARED, NULL) &&
            attach_passing(&destination) && connect_both()) {
            moment(after_us);
            check_returned(capabilities, parameters, true);
        }
        completed += source.at_ns[VMM_COMPLETED] != 0;
        rounds++;
        host_stop(&destination);
    }
    printf("     %u rounds, in %u of them the migration had completed\n", rounds, completed);
    json_decref(capabilities);
    json_decref(parameters);
}

/* After a return the same QEMU can be migrated again. */
static void case_again(void)
{
    if (!both(FILE_SHARED, NULL) || !until_paused())
        return;
    vmm_qemu.return_guest(source.vmm);
    if (!wait_for(&source, VMM_RETURNED, "VMM_RETURNED"))
        return;
    host_stop(&destination);
    memset(source.at_ns, 0, sizeof(source.at_ns));
    if (!host_start(&destination, "dst", VMM_DESTINATION, FILE_SHARED, NULL) ||
        !attach_passing(&destination) || !until_paused())
        return;
    vmm_qemu.finish_outgoing(source.vmm);
    if (!wait_for(&source, VMM_COMPLETED, "VMM_COMPLETED") ||
        !wait_for(&destination, VMM_LOADED, "VMM_LOADED"))
        return;
    vmm_qemu.resume(destination.vmm, true);
    if (wait_for(&destination, VMM_RUNNING, "VMM_RUNNING"))
        check(counts(&destination), "the guest does not run at the destination");
}

/* A device stream that is not one: the destination says so, the source's guest is safe. */
static void case_garbage(void)
{
    if (!host_start(&destination, "dst", VMM_DESTINATION, FILE_SHARED, NULL) ||
        !attach_passing(&destination))
        return;
    int ends[2];
    if (!check(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0, "socketpair"))
        return;
    vmm_qemu.start_incoming(destination.vmm, ends[1]);
    close(ends[1]);
    if (wait_for(&destination, VMM_INCOMING, "VMM_INCOMING")) {
        static const char text[] = "this is no migration stream, and it is long enough to be read";
        mf_write_all(ends[0], text, sizeof(text));
        wait_for(&destination, VMM_FAILED, "VMM_FAILED");
        printf("     %s\n", destination.why);
    }
    close(ends[0]);
}

static void refused(struct host *host, const char *part)
{
    if (!attach(host))
        return;
    check(host->info == NULL, "%s was not refused", host->name);
    check(strstr(host->why, part) != NULL, "the refusal does not speak of '%s': %s", part,
          host->why);
    printf("     %s\n", host->why);
}

static void case_refuse_private_file(void)
{
    if (host_start(&source, "src", VMM_SOURCE, FILE_PRIVATE, NULL))
        refused(&source, "without share=on");
}
static void case_refuse_anonymous(void)
{
    if (host_start(&source, "src", VMM_SOURCE, ANONYMOUS, NULL))
        refused(&source, "memory-backend-file,id=");
}
static void case_refuse_memfd(void)
{
    if (host_start(&source, "src", VMM_SOURCE, MEMFD, NULL))
        refused(&source, "memory-backend-memfd");
}
static void case_refuse_roles(void)
{
    if (host_start(&source, "src", VMM_SOURCE, FILE_SHARED, NULL)) {
        source.role = VMM_DESTINATION;
        refused(&source, "-incoming defer");
    }
    if (host_start(&destination, "dst", VMM_DESTINATION, FILE_SHARED, NULL)) {
        destination.role = VMM_SOURCE;
        refused(&destination, "memferry receive");
    }
}
static void case_refuse_prelaunch(void)
{
    static const char *const more[] = {"-S", NULL};
    if (host_start(&source, "src", VMM_SOURCE, FILE_SHARED, more))
        refused(&source, "never started");
}
static void case_refuse_shared_device(void)
{
    static const char *const more[] = {"-object", "memory-backend-memfd,id=other,share=on,size=1M",
                                       "-device", "ivshmem-plain,memdev=other,id=window", NULL};
    if (host_start(&source, "src", VMM_SOURCE, FILE_SHARED, more))
        refused(&source, "ivshmem-plain");
}
/* A backend that no guest address leads to is nobody's business. */
static void case_unused_backend(void)
{
    static const char *const more[] = {"-object", "memory-backend-ram,id=spare,size=1M", NULL};
    if (host_start(&source, "src", VMM_SOURCE, FILE_SHARED, more))
        attach_passing(&source);
}
/* Each NUMA node's backend counts. */
static void case_two_nodes(void)
{
    char first[160], second[160];
    size_t half = ram_bytes / 2;
    snprintf(first, sizeof(first),
             "memory-backend-file,id=n0,share=on,mem-path=%s/src.ram,size=%zu", dir, half);
    snprintf(second, sizeof(second), "memory-backend-file,id=n1,share=on,mem-path=%s,size=%zu", dir,
             half);
    const char *const more[] = {"-object",        first,   "-object",        second, "-numa",
                                "node,memdev=n0", "-numa", "node,memdev=n1", NULL};
    if (!host_start(&source, "src", VMM_SOURCE, TWO_NODES, more) || !attach(&source) ||
        !check(source.info != NULL, "refused: %s", source.why))
        return;
    check(source.info->backend_count == 2 && strcmp(source.info->backends[0].id, "n0") == 0 &&
              strcmp(source.info->backends[1].id, "n1") == 0 &&
              source.info->backends[0].size_bytes == half &&
              source.info->backends[1].size_bytes == half,
          "the two nodes' backends are not both found");
}
static void case_refuse_occupied(void)
{
    if (!host_start(&source, "src", VMM_SOURCE, FILE_SHARED, NULL) || !attach_passing(&source))
        return;
    struct host second = source;
    second.vmm = NULL;
    second.probed = false;
    refused(&second, "one client at a time");
    vmm_qemu.close(second.vmm);
}

/* QEMU dies under the adapter's hands. */
static void case_source_dead(void)
{
    if (!both(FILE_SHARED, NULL) || !until_paused())
        return;
    host_kill(&source);
    if (!wait_for(&source, VMM_FAILED, "VMM_FAILED"))
        return;
    printf("     %s\n", source.why);
    source.at_ns[VMM_FAILED] = 0;
    vmm_qemu.return_guest(source.vmm);
    wait_for(&source, VMM_FAILED, "VMM_FAILED after return_guest");
    vmm_qemu.quit(source.vmm);
    source.at_ns[VMM_FAILED] = 0;
    wait_for(&source, VMM_GONE, "VMM_GONE of a dead QEMU");
}

static const struct {
    const char *name;
    void (*run)(void);
} cases[] = {
    {"migrate", case_migrate},
    {"migrate-paused", case_migrate_paused},
    {"sandbox", case_sandbox},
    {"return-before", case_return_before},
    {"return-starting", case_return_starting},
    {"return-paused", case_return_paused},
    {"return-paused-guest", case_return_paused_guest},
    {"return-finishing", case_return_finishing},
    {"return-completed", case_return_completed},
    {"destination-dead", case_destination_dead},
    {"destination-stalled", case_destination_stalled},
    {"source-dead", case_source_dead},
    {"return-anytime", case_return_anytime},
    {"again", case_again},
    {"thin-link", case_thin_link},
    {"garbage", case_garbage},
    {"refuse-private-file", case_refuse_private_file},
    {"refuse-anonymous", case_refuse_anonymous},
    {"refuse-memfd", case_refuse_memfd},
    {"refuse-roles", case_refuse_roles},
    {"refuse-prelaunch", case_refuse_prelaunch},
    {"refuse-shared-device", case_refuse_shared_device},
    {"unused-backend", case_unused_backend},
    {"two-nodes", case_two_nodes},
    {"refuse-occupied", case_refuse_occupied},
};

static unsigned open_descriptors(void)
{
    unsigned count = 0;
    cleanup_closedir DIR *fds = opendir("/proc/self/fd");
    while (fds && readdir(fds))
        count++;
    return count;
}

static bool wanted(const char *name, char **names)
{
    if (!*names)
        return true;
    for (; *names; names++)
        if (strcmp(*names, name) == 0)
            return true;
    return false;
}

static bool have_qemu(void)
{
    pid_t pid = fork();
    if (pid == 0) {
        int null = open("/dev/null", O_WRONLY);
        dup2(null, 1);
        execlp(qemu, qemu, "-version", (char *)NULL);
        _exit(127);
    }
    int status = 0;
    waitpid(pid, &status, 0);
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

int main(int argc, char **argv)
{
    static const struct option options[] = {{"qemu", required_argument, NULL, 'q'},
                                            {"accel", required_argument, NULL, 'a'},
                                            {"ram-mib", required_argument, NULL, 'r'},
                                            {"verbose", no_argument, NULL, 'v'},
                                            {0}};
    for (int c; (c = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        if (c == 'q')
            qemu = optarg;
        else if (c == 'a')
            accel = optarg;
        else if (c == 'r')
            ram_bytes = (size_t)strtoul(optarg, NULL, 10) << 20;
        else if (c == 'v')
            verbose = true;
        else
            return 2;
    }
    mf_log_setup("adapter_drive", verbose ? MF_LOG_DEBUG : MF_LOG_WARNING);
    if (!have_qemu()) {
        fprintf(stderr, "skip: %s is not installed\n", qemu);
        return 77;
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    snprintf(dir, sizeof(dir), "/dev/shm/memferry-adapter-XXXXXX");
    if (!mkdtemp(dir))
        return 1;
    char bios[96], disk[96];
    snprintf(bios, sizeof(bios), "%s/bios.img", dir);
    snprintf(disk, sizeof(disk), "%s/disk.img", dir);
    base = event_base_new();
    struct event *limit = event_new(base, -1, 0, on_case_timeout, NULL);
    bool ready = write_images(bios, disk);
    int bad = !ready;
    for (size_t i = 0; ready && i < sizeof(cases) / sizeof(cases[0]); i++) {
        if (!wanted(cases[i].name, argv + optind))
            continue;
        case_name = cases[i].name;
        failures = 0;
        timed_out = false;
        struct timeval tv = {.tv_sec = CASE_TIMEOUT_S};
        event_add(limit, &tv);
        unsigned descriptors = open_descriptors();
        cases[i].run();
        host_stop(&source);
        host_stop(&destination);
        check(open_descriptors() == descriptors, "descriptors are left open");
        printf("%s %s\n", failures ? "FAIL" : "ok  ", case_name);
        bad += failures;
    }
    event_free(limit);
    event_base_free(base);
    unlink(bios);
    unlink(disk);
    rmdir(dir);
    return bad ? 1 : 0;
}
