/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib/uffd.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "lib/util.h"

static const struct {
    uint64_t bit;
    const char *name, *since;
} features_known[] = {
    {UFFD_FEATURE_PAGEFAULT_FLAG_WP, "PAGEFAULT_FLAG_WP", "5.7"},
    {UFFD_FEATURE_EVENT_FORK, "EVENT_FORK", "4.11"},
    {UFFD_FEATURE_EVENT_REMAP, "EVENT_REMAP", "4.11"},
    {UFFD_FEATURE_EVENT_REMOVE, "EVENT_REMOVE", "4.11"},
    {UFFD_FEATURE_MISSING_HUGETLBFS, "MISSING_HUGETLBFS", "4.11"},
    {UFFD_FEATURE_MISSING_SHMEM, "MISSING_SHMEM", "4.11"},
    {UFFD_FEATURE_EVENT_UNMAP, "EVENT_UNMAP", "4.11"},
    {UFFD_FEATURE_SIGBUS, "SIGBUS", "4.14"},
    {UFFD_FEATURE_THREAD_ID, "THREAD_ID", "4.14"},
    {UFFD_FEATURE_MINOR_HUGETLBFS, "MINOR_HUGETLBFS", "5.13"},
    {UFFD_FEATURE_MINOR_SHMEM, "MINOR_SHMEM", "5.14"},
    {UFFD_FEATURE_EXACT_ADDRESS, "EXACT_ADDRESS", "5.18"},
    {UFFD_FEATURE_WP_HUGETLBFS_SHMEM, "WP_HUGETLBFS_SHMEM", "5.19"},
    {UFFD_FEATURE_WP_UNPOPULATED, "WP_UNPOPULATED", "6.4"},
    {UFFD_FEATURE_POISON, "POISON", "6.6"},
    {UFFD_FEATURE_WP_ASYNC, "WP_ASYNC", "6.7"},
    {UFFD_FEATURE_MOVE, "MOVE", "6.8"},
};

const char *mf_uffd_feature_name(uint64_t feature, const char **since)
{
    for (size_t i = 0; i < sizeof(features_known) / sizeof(features_known[0]); i++) {
        if (features_known[i].bit == feature) {
            if (since)
                *since = features_known[i].since;
            return features_known[i].name;
        }
    }
    if (since)
        *since = "a newer kernel";
    return "unknown";
}

int mf_uffd_open(void)
{
    int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (fd >= 0)
        return fd;
    int code = errno;
    /* Without CAP_SYS_PTRACE and with vm.unprivileged_userfaultfd=0 the device's file mode decides.
     */
    cleanup_close int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    if (device >= 0)
        fd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
    return fd >= 0 ? fd : -code;
}

int mf_uffd_open_user(void)
{
    int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
    return fd >= 0 ? fd : -errno;
}

/* @fd: a throw-away userfaultfd, or the -errno with which it could not be had. */
static int features_of(int fd, uint64_t *features, struct mf_error *err)
{
    if (fd < 0)
        return mf_fail(
            err, -fd,
            fd == -ENOSYS ? "this kernel was built without userfaultfd (%s): boot one that has "
                            "CONFIG_USERFAULTFD=y"
                          : "cannot make a userfaultfd: %s; it needs CAP_SYS_PTRACE, or the sysctl "
                            "vm.unprivileged_userfaultfd=1",
            strerror(-fd));
    /* Asking for nothing tells everything: the kernel answers with all that it has. */
    struct uffdio_api api = {.api = UFFD_API};
    if (ioctl(fd, UFFDIO_API, &api) != 0) {
        int code = errno;
        return mf_fail(err, code, "this kernel refuses the userfaultfd handshake: %s",
                       strerror(code));
    }
    *features = api.features;
    return 0;
}

int mf_uffd_features(uint64_t *features, struct mf_error *err)
{
    cleanup_close int fd = mf_uffd_open();
    return features_of(fd, features, err);
}

int mf_uffd_api(int uffd, uint64_t required, uint64_t wanted, uint64_t *enabled,
                struct mf_error *err)
{
    /* The handshake can be done once only and fails as a whole on a single unknown bit, so what the
     * kernel has is found on a throw-away descriptor. */
    uint64_t available = 0;
    cleanup_close int throw_away = mf_uffd_open();
    if (throw_away == -EPERM) /* what is asked for may be one for user mode */
        throw_away = mf_uffd_open_user();
    int rc = features_of(throw_away, &available, err);
    if (rc < 0)
        return rc;
    uint64_t missing = required & ~available;
    if (missing) {
        const char *since;
        const char *name = mf_uffd_feature_name(missing & (~missing + 1), &since);
        return mf_fail(err, EOPNOTSUPP,
                       "this kernel's userfaultfd lacks %s: boot Linux %s or newer, built with it",
                       name, since);
    }
    uint64_t asked = required | (wanted & available);
    struct uffdio_api api = {.api = UFFD_API, .features = asked};
    if (ioctl(uffd, UFFDIO_API, &api) != 0) {
        int code = errno;
        if (code == EPERM)
            return mf_fail(
                err, code,
                "the userfaultfd handshake was refused: following forks (EVENT_FORK) needs "
                "CAP_SYS_PTRACE");
        if (code == EINVAL)
            return mf_fail(err, code,
                           "the userfaultfd handshake was refused: it has been done before on this "
                           "descriptor, so another program is using it");
        return mf_fail(err, code, "the userfaultfd handshake failed: %s", strerror(code));
    }
    if (enabled)
        *enabled = asked;
    return 0;
}

static int register_modes(int uffd, uint64_t start_addr, uint64_t length_bytes, uint64_t modes,
                          unsigned needed_ioctl, const char *needed, struct mf_error *err)
{
    struct uffdio_register reg = {
        .range = {.start = start_addr, .len = length_bytes},
        .mode = modes,
    };
    if (ioctl(uffd, UFFDIO_REGISTER, &reg) == 0) {
        /* A kernel that could not do this here says so by leaving it out. */
        if (reg.ioctls & ((__u64)1 << needed_ioctl))
            return 0;
        mf_uffd_unregister(uffd, start_addr, length_bytes);
        return mf_fail(err, EOPNOTSUPP, "memory at %#llx (%llu MiB) can't be %s on this kernel",
                       (unsigned long long)start_addr, (unsigned long long)(length_bytes >> 20),
                       needed);
    }
    int code = errno;
    const char *why = strerror(code);
    switch (code) {
    case EBUSY:
        why = "another program (a second migration tool, a snapshot handler) has registered it";
        break;
    case ENOMEM:
        why = "the process has ended or replaced itself by exec";
        break;
    case EPERM:
        why = "the file is sealed or mapped without the right to write";
        break;
    case EINVAL:
        why = "nothing is mapped there, or the memory is neither tmpfs nor hugetlbfs";
        break;
    }
    return mf_fail(err, code, "cannot watch memory at %#llx (%llu MiB) with userfaultfd: %s",
                   (unsigned long long)start_addr, (unsigned long long)(length_bytes >> 20), why);
}

int mf_uffd_register(int uffd, uint64_t start_addr, uint64_t length_bytes, struct mf_error *err)
{
    return register_modes(uffd, start_addr, length_bytes,
                          UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR,
                          _UFFDIO_CONTINUE, "filled by UFFDIO_CONTINUE", err);
}

int mf_uffd_register_private(int uffd, uint64_t start_addr, uint64_t length_bytes,
                             struct mf_error *err)
{
    return register_modes(uffd, start_addr, length_bytes, UFFDIO_REGISTER_MODE_MISSING,
                          _UFFDIO_COPY, "filled by UFFDIO_COPY", err);
}

int mf_uffd_register_wp(int uffd, uint64_t start_addr, uint64_t length_bytes, struct mf_error *err)
{
    return register_modes(uffd, start_addr, length_bytes, UFFDIO_REGISTER_MODE_WP,
                          _UFFDIO_WRITEPROTECT, "write-protected by userfaultfd", err);
}

int mf_uffd_protect(int uffd, uint64_t start_addr, uint64_t length_bytes)
{
    struct uffdio_writeprotect arg = {.range = {.start = start_addr, .len = length_bytes},
                                      .mode = UFFDIO_WRITEPROTECT_MODE_WP};
    return ioctl(uffd, UFFDIO_WRITEPROTECT, &arg) == 0 ? 0 : -errno;
}

int mf_uffd_wake(int uffd, uint64_t start_addr, uint64_t length_bytes)
{
    struct uffdio_range range = {.start = start_addr, .len = length_bytes};
    return ioctl(uffd, UFFDIO_WAKE, &range) == 0 ? 0 : -errno;
}

void mf_uffd_wake_all(int uffd)
{
    /* The kernel wants addresses that a program could use, and how far up these go depends on the
     * processor. */
    const uint64_t lowest = 0x10000; /* or what vm.mmap_min_addr says, which is less or equal */
    for (unsigned bits = 57; bits > 30; bits--)
        if (mf_uffd_wake(uffd, lowest, (UINT64_C(1) << (bits - 1)) - lowest - 65536) == 0)
            return;
}

int mf_uffd_unregister(int uffd, uint64_t start_addr, uint64_t length_bytes)
{
    struct uffdio_range range = {.start = start_addr, .len = length_bytes};

    mf_uffd_wake(uffd, start_addr, length_bytes);
    int rc = ioctl(uffd, UFFDIO_UNREGISTER, &range) == 0 ? 0 : -errno;
    /* Whoever faulted between the two calls would wait for ever on a range that nobody serves. */
    mf_uffd_wake(uffd, start_addr, length_bytes);
    /* EINVAL: nothing is mapped in the range any more (its alignment was checked by REGISTER).
     * ENOMEM, ESRCH: the address space is gone. */
    if (rc == -EINVAL || rc == -ENOMEM || rc == -ESRCH || rc == -ENOENT)
        return 0;
    return rc;
}

/** filled() - turn the outcome of a fill ioctl and its result field into our convention. */
static int filled(int ioctl_rc, int64_t result, uint64_t *done_bytes)
{
    int code = errno;
    *done_bytes = result > 0 ? (uint64_t)result : 0;
    return ioctl_rc == 0 ? 0 : -code;
}

int mf_uffd_continue(int uffd, uint64_t start_addr, uint64_t length_bytes, uint64_t *done_bytes)
{
    struct uffdio_continue arg = {.range = {.start = start_addr, .len = length_bytes}};
    int rc = ioctl(uffd, UFFDIO_CONTINUE, &arg);
    return filled(rc, arg.mapped, done_bytes);
}

int mf_uffd_zeropage(int uffd, uint64_t start_addr, uint64_t length_bytes, uint64_t *done_bytes)
{
    struct uffdio_zeropage arg = {.range = {.start = start_addr, .len = length_bytes}};
    int rc = ioctl(uffd, UFFDIO_ZEROPAGE, &arg);
    return filled(rc, arg.zeropage, done_bytes);
}

int mf_uffd_event_pending(int uffd)
{
    /* What is asked for is nothing, which is refused as EINVAL; but the kernel looks first whether
     * the layout is changing (mmap_changing), which is EAGAIN. */
    struct uffdio_writeprotect nothing = {0};
    if (ioctl(uffd, UFFDIO_WRITEPROTECT, &nothing) == 0 || errno == EINVAL)
        return 0;
    return errno == EAGAIN ? 1 : -errno;
}

int mf_uffd_open_info(int uffd)
{
    char path[32];
    snprintf(path, sizeof(path), "/proc/self/fdinfo/%d", uffd);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    return fd >= 0 ? fd : -errno;
}

size_t mf_uffd_faults_pending(int info_fd)
{
    static const char wanted[] = "\npending:"; /* fs/userfaultfd.c */
    char text[512];
    ssize_t length = pread(info_fd, text, sizeof(text) - 1, 0);
    if (length <= 0)
        return 0;
    text[length] = '\0';
    const char *at = strstr(text, wanted);
    return at ? strtoul(at + sizeof(wanted) - 1, NULL, 10) : 0;
}

bool mf_uffd_alive(int uffd)
{
    /* Lifting a protection that nobody has set. Most likely nothing is registered at the lowest
     * address that programs may use (sysctl vm.mmap_min_addr), which is ENOENT. */
    struct uffdio_writeprotect lowest = {.range = {.start = 0x10000, .len = 0x1000}, .mode = 0};
    return ioctl(uffd, UFFDIO_WRITEPROTECT, &lowest) == 0 || errno != ESRCH;
}

int mf_uffd_copy(int uffd, uint64_t start_addr, const void *from, uint64_t length_bytes,
                 uint64_t *done_bytes)
{
    struct uffdio_copy arg = {
        .dst = start_addr, .src = (uint64_t)(uintptr_t)from, .len = length_bytes};
    int rc = ioctl(uffd, UFFDIO_COPY, &arg);
    return filled(rc, arg.copy, done_bytes);
}
