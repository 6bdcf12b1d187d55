/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Every row is found by doing the thing, as this process, on throw-away objects: distributions
 * carry features back, and sysctls, capabilities, security modules and container limits decide as
 * much as the version does.
 */
#include "lib/check.h"

#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/utsname.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <unistd.h>

#include "lib/inject.h"
#include "lib/target.h"
#include "lib/uapi.h"
#include "lib/uffd.h"
#include "lib/util.h"

#define OLDEST_MAJOR                                                                               \
    5 /**< Linux 5.14 brought MINOR_SHMEM, the last thing that is indispensable                    \
       */
#define OLDEST_MINOR 14
#define NOFILE_WANTED                                                                              \
    1024 /**< descriptors: connections, RAM files, userfaultfds, rings of many sessions */

static void found(struct mf_check *row, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static void found(struct mf_check *row, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(row->found, sizeof(row->found), fmt, ap);
    va_end(ap);
}

static void verdict(struct mf_check *row, enum mf_check_state state, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
static void verdict(struct mf_check *row, enum mf_check_state state, const char *fmt, ...)
{
    va_list ap;
    row->state = state;
    va_start(ap, fmt);
    vsnprintf(row->remedy, sizeof(row->remedy), fmt, ap);
    va_end(ap);
}

/** read_number() - the first number in a file, or -1. */
static long read_number(const char *path)
{
    long value;
    cleanup_fclose FILE *f = fopen(path, "re");
    if (!f)
        return -1;
    return fscanf(f, "%ld", &value) == 1 ? value : -1;
}

/* --------------------------------------------------------------------------- kernel, userfaultfd
 */

static void check_kernel(struct mf_check *row, uint64_t unused)
{
    (void)unused;
    struct utsname name;
    int major = 0, minor = 0;
    uname(&name);
    sscanf(name.release, "%d.%d", &major, &minor);
    found(row, "Linux %.60s %.30s", name.release, name.machine);
    if (major < OLDEST_MAJOR || (major == OLDEST_MAJOR && minor < OLDEST_MINOR))
        verdict(row, MF_CHECK_MISSING, "boot Linux %d.%d or newer", OLDEST_MAJOR, OLDEST_MINOR);
    else if (strcmp(name.machine, "x86_64") != 0)
        verdict(row, MF_CHECK_MISSING, "attaching to a VMM is implemented for x86-64 only");
}

static void check_privileges(struct mf_check *row, uint64_t unused)
{
    (void)unused;
    uid_t uid = geteuid();
    found(row, uid == 0 ? "running as root" : "running as uid %u", uid);
    if (uid != 0)
        verdict(row, MF_CHECK_LIMITED,
                "rows below say what this user may do; memferryd runs as root: run the check as "
                "root to "
                "see what it may do");
}

static void check_userfaultfd(struct mf_check *row, uint64_t unused)
{
    (void)unused;
    cleanup_close int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    int code = errno;
    cleanup_close int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    found(row, "userfaultfd(2): %s; /dev/userfaultfd: %s", fd >= 0 ? "permitted" : strerror(code),
          device >= 0 ? "usable" : strerror(errno));
    if (fd >= 0)
        return;
    if (code == ENOSYS)
        verdict(row, MF_CHECK_MISSING, "boot a kernel with CONFIG_USERFAULTFD=y");
    else
        verdict(
            row, MF_CHECK_MISSING,
            "run as root or with CAP_SYS_PTRACE; in a container, its seccomp profile must allow "
            "userfaultfd");
}

static void check_unprivileged(struct mf_check *row, uint64_t unused)
{
    (void)unused;
    long value = read_number("/proc/sys/vm/unprivileged_userfaultfd");
    found(row, "vm.unprivileged_userfaultfd = %ld", value);
    if (value != 1)
        verdict(
            row, MF_CHECK_LIMITED,
            "a VMM that does not run as root (libvirt's as a rule) can't be received: run 'sysctl "
            "vm.unprivileged_userfaultfd=1'");
}

/** continues() - does filling a shared page by UFFDIO_CONTINUE truly work? Return: 0 or -errno. */
static int continues(void)
{
    size_t page_bytes = (size_t)sysconf(_SC_PAGESIZE);
    cleanup_close int uffd = mf_uffd_open();
    cleanup_close int memory = memfd_create("memferry-check", MFD_CLOEXEC);
    if (uffd < 0)
        return uffd;
    if (memory < 0 || ftruncate(memory, (off_t)page_bytes) != 0)
        return -errno;
    int rc =
        mf_uffd_api(uffd, UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MINOR_SHMEM, 0, NULL, NULL);
    if (rc < 0)
        return rc;
    char *guest = mmap(NULL, page_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);
    if (guest == MAP_FAILED)
        return -errno;
    uint64_t done_bytes = 0;
    rc = mf_uffd_register(uffd, (uintptr_t)guest, page_bytes, NULL);
    if (rc == 0)
        rc = pwrite(memory, "m", 1, 0) == 1 ? 0 : -errno;
    if (rc == 0)
        rc = mf_uffd_continue(uffd, (uintptr_t)guest, page_bytes, &done_bytes);
    if (rc == 0 && guest[0] != 'm')
        rc = -EIO;
    munmap(guest, page_bytes);
    return rc;
}

/** What tracking of writes is for: sending memory while the guest still runs at the source. */
#define NO_ROUNDS                                                                                  \
    "hybrid becomes postcopy here: no memory is sent ahead while the guest still runs on this "    \
    "host, all of it follows the guest: "

static void check_feature(struct mf_check *row, uint64_t feature)
{
    uint64_t have = 0;
    const char *since;
    mf_uffd_feature_name(feature, &since);
    int rc = mf_uffd_features(&have, NULL);
    if (rc < 0) {
        found(row, "not known: userfaultfd is refused (%s)", strerror(-rc));
        bool optional = feature & (MF_UFFD_FEATURES_WANTED | UFFD_FEATURE_WP_ASYNC);
        verdict(row, optional ? MF_CHECK_LIMITED : MF_CHECK_MISSING, "see the row on userfaultfd");
        return;
    }
    bool there = have & feature;
    if (there && feature == UFFD_FEATURE_MINOR_SHMEM && (rc = continues()) < 0) {
        found(row, "offered, but a page could not be filled: %s", strerror(-rc));
        verdict(row, MF_CHECK_MISSING, "boot Linux %s or newer", since);
        return;
    }
    found(row, there ? "yes" : "no");
    if (there)
        return;
    switch (feature) {
    case UFFD_FEATURE_MISSING_HUGETLBFS:
    case UFFD_FEATURE_MINOR_HUGETLBFS:
        verdict(row, MF_CHECK_LIMITED,
                "VMs with RAM on hugetlbfs can't be received: boot Linux %s or newer", since);
        break;
    case UFFD_FEATURE_THREAD_ID:
        verdict(row, MF_CHECK_LIMITED, "faults can't be told apart by vCPU: boot Linux %s or newer",
                since);
        break;
    case UFFD_FEATURE_WP_ASYNC:
        verdict(row, MF_CHECK_LIMITED, NO_ROUNDS "boot Linux %s or newer", since);
        break;
    default:
        verdict(row, MF_CHECK_MISSING, "boot Linux %s or newer", since);
    }
}

static void check_pagemap_scan(struct mf_check *row, uint64_t unused)
{
    (void)unused;
    volatile char page = 1; /* written, hence present */
    struct page_region region;
    uintptr_t page_bytes = (uintptr_t)sysconf(_SC_PAGESIZE);
    uintptr_t start = (uintptr_t)&page & ~(page_bytes - 1);
    struct pm_scan_arg arg = {.size = sizeof(arg),
                              .start = start,
                              .end = start + page_bytes,
                              .vec = (uintptr_t)&region,
                              .vec_len = 1,
                              .category_mask = PAGE_IS_PRESENT,
                              .return_mask = PAGE_IS_PRESENT};
    cleanup_close int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (fd >= 0 && ioctl(fd, PAGEMAP_SCAN, &arg) == 1) {
        found(row, "yes");
        return;
    }
    found(row, "no (%s)", strerror(errno));
    verdict(row, MF_CHECK_LIMITED, NO_ROUNDS "boot Linux 6.7 or newer");
}

/* ------------------------------------------------------------------------ getting at the target */

static void check_pidfd(struct mf_check *row, uint64_t unused)
{
    (void)unused;
    cleanup_close int pidfd = (int)syscall(SYS_pidfd_open, getpid(), 0);
    cleanup_close int memory = memfd_create("memferry-check", MFD_CLOEXEC);
    cleanup_close int copy = pidfd >= 0 ? (int)syscall(SYS_pidfd_getfd, pidfd, memory, 0) : -1;
    if (copy >= 0) {
        found(row, "yes");
        return;
    }
    found(row, "no (%s)", strerror(errno));
    verdict(row, MF_CHECK_MISSING,
            errno == ENOSYS
                ? "boot Linux 5.6 or newer"
                : "a seccomp filter or security module refuses pidfd_getfd(2): allow it");
}

/** filter_all() - a seccomp filter that allows everything: all that counts is that there is one. */
static int filter_all(void)
{
    struct sock_filter allow = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    struct sock_fprog program = {.len = 1, .filter = &allow};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 ||
        prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program, 0, 0) != 0)
        return -errno;
    return 0;
}

/** A child that stands for a VMM; ended by end_target(). */
struct stand_in {
    pid_t pid;
    int pidfd;
};

/** start_target() - @filtered: it runs under a seccomp filter. Return: 0 or -errno. */
static int start_target(struct stand_in *target, bool filtered)
{
    target->pidfd = -1;
    pid_t parent = getpid();
    target->pid = fork();
    if (target->pid < 0)
        return -errno;
    if (target->pid == 0) {
        /* Whatever becomes of us, the child must not stay. */
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (getppid() != parent || (filtered && filter_all() < 0))
            _exit(1);
        for (;;)
            pause();
    }
    target->pidfd = (int)syscall(SYS_pidfd_open, target->pid, 0);
    return target->pidfd >= 0 ? 0 : -errno;
}

static void end_target(struct stand_in *target)
{
    if (target->pid > 0) {
        kill(target->pid, SIGKILL);
        while (waitpid(target->pid, NULL, 0) < 0 && errno == EINTR)
            ;
    }
    if (target->pidfd >= 0)
        close(target->pidfd);
}

static void check_attach(struct mf_check *row, uint64_t filtered)
{
    struct stand_in target;
    struct mf_error err = {0};
    int remote_fd = -1;
    int fd = start_target(&target, filtered);
    if (fd < 0)
        mf_fail(&err, -fd, "cannot start a child process: %s", strerror(-fd));
    else
        fd = mf_inject_userfaultfd(target.pid, target.pidfd, &remote_fd, &err);
    end_target(&target);
    if (fd >= 0) {
        close(fd);
        found(row, "a child process was attached to");
        return;
    }
    found(row, "%s", err.text);
    if (filtered) {
        verdict(row, MF_CHECK_LIMITED,
                "VMMs other than QEMU can't be received when they run under a seccomp filter: "
                "memferryd "
                "needs CAP_SYS_ADMIN and must not run under a filter itself (SystemCallFilter= in "
                "its unit)");
        return;
    }
    long scope = read_number("/proc/sys/kernel/yama/ptrace_scope");
    if (scope > 0)
        verdict(row, MF_CHECK_MISSING,
                "kernel.yama.ptrace_scope is %ld: memferryd needs CAP_SYS_PTRACE%s", scope,
                scope == 3 ? ", and 3 forbids even that until the next boot" : "");
    else
        verdict(
            row, MF_CHECK_MISSING,
            "run memferryd as root or with CAP_SYS_PTRACE; in a container, ptrace must be allowed");
}

static void check_map_files(struct mf_check *row, uint64_t unused)
{
    (void)unused;
    size_t page_bytes = (size_t)sysconf(_SC_PAGESIZE);
    cleanup_close int memory = memfd_create("memferry-check", MFD_CLOEXEC);
    void *at = MAP_FAILED;
    if (memory >= 0 && ftruncate(memory, (off_t)page_bytes) == 0)
        at = mmap(NULL, page_bytes, PROT_READ, MAP_SHARED, memory, 0);
    int code = errno;
    cleanup_close int fd = -1;
    if (at != MAP_FAILED) {
        char path[96];
        /* A neighbour of the same file would be merged into one entry; a fresh memfd has none. */
        snprintf(path, sizeof(path), "/proc/self/map_files/%lx-%lx", (unsigned long)(uintptr_t)at,
                 (unsigned long)((uintptr_t)at + page_bytes));
        fd = open(path, O_RDONLY | O_CLOEXEC);
        code = errno;
        munmap(at, page_bytes);
    }
    if (fd >= 0) {
        found(row, "readable");
        return;
    }
    found(row, "not readable (%s)", strerror(code));
    verdict(row, MF_CHECK_LIMITED,
            "RAM files can only be opened where the VMM keeps a descriptor or the path still "
            "exists: run "
            "memferryd with CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE");
}

/** What memory of a process is read through where it is private; see proc_pid_mem(5). */
static void check_protected(struct mf_check *row, uint64_t unused)
{
    (void)unused;
    size_t page_bytes = (size_t)sysconf(_SC_PAGESIZE);
    cleanup_close int mem = open("/proc/self/mem", O_RDONLY | O_CLOEXEC);
    char *at = mmap(NULL, page_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    char byte = 0;
    int code = errno;
    if (mem >= 0 && at != MAP_FAILED) {
        at[0] = 'p';
        mprotect(at, page_bytes, PROT_NONE);
        ssize_t length = pread(mem, &byte, 1, (off_t)(uintptr_t)at);
        code = errno;
        munmap(at, page_bytes);
        if (length == 1 && byte == 'p') {
            found(row, "readable");
            return;
        }
    }
    found(row, "not readable (%s)", strerror(code));
    verdict(
        row, MF_CHECK_LIMITED,
        "processes whose private memory is partly protected (PROT_NONE) can't be sent from this "
        "host: boot with proc_mem.force_override=always");
}

/* ------------------------------------------------------------------------------------ the mover */

static void check_io_uring(struct mf_check *row, uint64_t unused)
{
    (void)unused;
    struct io_uring ring;
    long disabled = read_number("/proc/sys/kernel/io_uring_disabled");
    int rc = io_uring_queue_init(8, &ring, 0);
    if (rc == 0) {
        struct io_uring_cqe *cqe;
        struct io_uring_sqe *sqe = io_uring_get_sqe(&ring);
        io_uring_prep_nop(sqe);
        rc = io_uring_submit(&ring);
        rc = rc == 1 ? io_uring_wait_cqe(&ring, &cqe) : rc < 0 ? rc : -EIO;
        io_uring_queue_exit(&ring);
    }
    if (rc == 0 && disabled <= 0) {
        found(row, "usable");
        return;
    }
    found(row, "%s; kernel.io_uring_disabled = %ld", rc < 0 ? strerror(-rc) : "usable", disabled);
    if (rc == -ENOSYS)
        verdict(row, MF_CHECK_MISSING, "boot a kernel with CONFIG_IO_URING=y");
    else if (disabled > 0)
        verdict(row, MF_CHECK_MISSING,
                "memferry-mover gives up its privileges and needs io_uring then: run 'sysctl "
                "kernel.io_uring_disabled=0'");
    else
        verdict(
            row, MF_CHECK_MISSING,
            "a seccomp filter, a container profile or RLIMIT_MEMLOCK forbids io_uring: allow it");
}

static void check_seccomp(struct mf_check *row, uint64_t unused)
{
    (void)unused;
    uint32_t action = SECCOMP_RET_KILL_PROCESS;
    if (syscall(SYS_seccomp, SECCOMP_GET_ACTION_AVAIL, 0, &action) == 0) {
        found(row, "available");
        return;
    }
    found(row, "not available (%s)", strerror(errno));
    verdict(row, MF_CHECK_MISSING, "boot a kernel with CONFIG_SECCOMP_FILTER=y");
}

/* ----------------------------------------------------------------------------- memory and limits
 */

static void check_shm(struct mf_check *row, uint64_t unused)
{
    (void)unused;
    uint64_t available_bytes = 0;
    struct statfs fs;
    cleanup_close int fd = open("/dev/shm", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0 || fstatfs(fd, &fs) != 0 || (unsigned long)fs.f_type != TMPFS_MAGIC) {
        found(row, "/dev/shm is no tmpfs");
        verdict(
            row, MF_CHECK_LIMITED,
            "guest RAM needs a tmpfs: mount one there, or name another tmpfs or hugetlbfs in the "
            "VM's mem-path");
        return;
    }
    int rc = mf_memory_available(fd, &available_bytes);
    if (rc < 0) {
        found(row, "not known: %s", strerror(-rc));
        verdict(row, MF_CHECK_LIMITED, "mount /proc");
        return;
    }
    found(row, "%llu MiB can be taken in /dev/shm", (unsigned long long)(available_bytes >> 20));
    if (available_bytes < (UINT64_C(64) << 20))
        verdict(row, MF_CHECK_LIMITED,
                "no VM of any size fits: free memory, or mount a larger tmpfs");
}

static void check_huge_pages(struct mf_check *row, uint64_t unused)
{
    (void)unused;
    static const unsigned long sizes_kib[] = {2048, 1048576};
    char path[128];
    long total = 0;
    size_t used = 0;
    for (size_t i = 0; i < sizeof(sizes_kib) / sizeof(sizes_kib[0]); i++) {
        snprintf(path, sizeof(path), "/sys/kernel/mm/hugepages/hugepages-%lukB/nr_hugepages",
                 sizes_kib[i]);
        long reserved = read_number(path);
        snprintf(path, sizeof(path), "/sys/kernel/mm/hugepages/hugepages-%lukB/free_hugepages",
                 sizes_kib[i]);
        long unused_pages = read_number(path);
        if (reserved < 0)
            continue;
        total += reserved;
        used += (size_t)snprintf(row->found + used, sizeof(row->found) - used,
                                 "%s%ld of %ld pages of %lu MiB free", used ? ", " : "",
                                 unused_pages, reserved, sizes_kib[i] >> 10);
    }
    if (used == 0)
        found(row, "this kernel has no huge pages");
    if (total == 0)
        verdict(
            row, MF_CHECK_LIMITED,
            "only VMs with RAM on tmpfs can be received; for RAM on hugetlbfs reserve huge pages: "
            "'sysctl vm.nr_hugepages=N'");
}

static void check_nofile(struct mf_check *row, uint64_t unused)
{
    (void)unused;
    struct rlimit limit = {0};
    getrlimit(RLIMIT_NOFILE, &limit);
    found(row, "%llu descriptors, may be raised to %llu", (unsigned long long)limit.rlim_cur,
          (unsigned long long)limit.rlim_max);
    if (limit.rlim_max < NOFILE_WANTED)
        verdict(
            row, MF_CHECK_LIMITED,
            "few sessions at a time: raise the limit on open files to %d or more (LimitNOFILE=)",
            NOFILE_WANTED);
}

static const struct check {
    const char *name, *title;
    void (*run)(struct mf_check *row, uint64_t argument);
    uint64_t argument;
} checks[] = {
    {"kernel-version", "kernel", check_kernel, 0},
    {"privileges", "privileges of this check", check_privileges, 0},
    {"userfaultfd", "userfaultfd", check_userfaultfd, 0},
    {"userfaultfd-unprivileged", "userfaultfd for VMMs without privileges", check_unprivileged, 0},
    {"userfaultfd-missing-shmem", "faults on holes of shared memory", check_feature,
     UFFD_FEATURE_MISSING_SHMEM},
    {"userfaultfd-minor-shmem", "faults on pages of shared memory (MINOR)", check_feature,
     UFFD_FEATURE_MINOR_SHMEM},
    {"userfaultfd-event-unmap", "notice of unmapping", check_feature, UFFD_FEATURE_EVENT_UNMAP},
    {"userfaultfd-event-remap", "notice of remapping", check_feature, UFFD_FEATURE_EVENT_REMAP},
    {"userfaultfd-event-remove", "notice of discarding", check_feature, UFFD_FEATURE_EVENT_REMOVE},
    {"userfaultfd-missing-hugetlbfs", "faults on holes of huge pages", check_feature,
     UFFD_FEATURE_MISSING_HUGETLBFS},
    {"userfaultfd-minor-hugetlbfs", "faults on huge pages (MINOR)", check_feature,
     UFFD_FEATURE_MINOR_HUGETLBFS},
    {"userfaultfd-thread-id", "faults by thread", check_feature, UFFD_FEATURE_THREAD_ID},
    {"userfaultfd-wp-async", "tracking of writes", check_feature, UFFD_FEATURE_WP_ASYNC},
    {"pagemap-scan", "list of written pages", check_pagemap_scan, 0},
    {"pidfd-getfd", "fetching descriptors", check_pidfd, 0},
    {"attach", "attaching to a process (ptrace)", check_attach, false},
    {"attach-seccomp", "attaching under a seccomp filter", check_attach, true},
    {"map-files", "opening mapped files", check_map_files, 0},
    {"protected-memory", "reading protected memory", check_protected, 0},
    {"io-uring", "io_uring", check_io_uring, 0},
    {"seccomp", "seccomp filters", check_seccomp, 0},
    {"shm-memory", "memory for guest RAM", check_shm, 0},
    {"huge-pages", "huge pages", check_huge_pages, 0},
    {"open-files", "limit on open files", check_nofile, 0},
};

size_t mf_check_host(struct mf_check *rows, size_t max)
{
    size_t count = sizeof(checks) / sizeof(checks[0]);
    if (count > max)
        count = max;
    for (size_t i = 0; i < count; i++) {
        rows[i] = (struct mf_check){
            .name = checks[i].name, .title = checks[i].title, .state = MF_CHECK_OK};
        checks[i].run(&rows[i], checks[i].argument);
    }
    return count;
}

const struct mf_check *mf_check_first_missing(const struct mf_check *rows, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        if (rows[i].state == MF_CHECK_MISSING)
            return &rows[i];
    }
    return NULL;
}
