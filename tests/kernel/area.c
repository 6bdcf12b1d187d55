/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "tests/kernel/area.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#include "lib/uffd.h"
#include "lib/util.h"

#define PATIENCE_MS 20000

static void put_back(void);

/** give_up() - a thread may still stand on memory that would go away: end the program, tidily. */
static _Noreturn void give_up(void)
{
    put_back();
    _exit(1);
}

static void nap(void)
{
    nanosleep(&(struct timespec){.tv_nsec = 200000}, NULL);
}

static void make(struct area *area, enum area_kind kind, size_t pages, uint64_t features,
                 uint64_t wanted)
{
    struct mf_error err;
    unsigned flags = MFD_CLOEXEC | (kind == AREA_HUGETLB ? MFD_HUGETLB : 0);
    memset(area, 0, sizeof(*area));
    area->file = memfd_create("memferry-test", flags);
    assert_true(area->file >= 0);
    struct stat st;
    assert_int_equal(fstat(area->file, &st), 0);
    area->page_bytes = kind == AREA_HUGETLB ? (size_t)st.st_blksize : (size_t)sysconf(_SC_PAGESIZE);
    area->pages = pages;
    area->length_bytes = pages * area->page_bytes;
    assert_int_equal(ftruncate(area->file, (off_t)area->length_bytes), 0);
    area->guest = mmap(NULL, area->length_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, area->file, 0);
    area->second =
        mmap(NULL, area->length_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, area->file, 0);
    assert_true(area->guest != MAP_FAILED && area->second != MAP_FAILED);
    area->uffd = mf_uffd_open();
    assert_true(area->uffd >= 0);
    assert_int_equal(mf_uffd_api(area->uffd, features, wanted, NULL, &err), 0);
}

void area_make(struct area *area, enum area_kind kind, size_t pages)
{
    make(area, kind, pages, MF_UFFD_FEATURES, MF_UFFD_FEATURES_WANTED);
}

void area_make_with(struct area *area, enum area_kind kind, size_t pages, uint64_t features)
{
    make(area, kind, pages, features, 0);
}

void map_at(void *at, size_t length_bytes, int flags, int file)
{
    const void *got = mmap(at, length_bytes, PROT_READ | PROT_WRITE, flags | MAP_FIXED, file, 0);
    assert_true(got == at);
}

int range_register(int uffd, const void *at, size_t length_bytes, uint64_t modes)
{
    struct uffdio_register reg = {.range = {.start = (uintptr_t)at, .len = length_bytes},
                                  .mode = modes};
    return ioctl_errno(uffd, UFFDIO_REGISTER, &reg);
}

int area_register_pages(const struct area *area, size_t first, size_t pages, uint64_t modes)
{
    return range_register(area->uffd, page_of(area, first), pages * area->page_bytes, modes);
}

void area_register(const struct area *area, uint64_t modes)
{
    assert_int_equal(area_register_pages(area, 0, area->pages, modes), 0);
}

void area_free(struct area *area)
{
    if (area->uffd >= 0)
        close(area->uffd);
    munmap(area->guest, area->length_bytes);
    munmap(area->second, area->length_bytes);
    close(area->file);
}

void put(const struct area *area, size_t index, char value)
{
    memset(area->second + index * area->page_bytes, value, area->page_bytes);
}

static void *act(void *arg)
{
    struct actor *actor = arg;
    volatile char *at = actor->at;
    switch (actor->act) {
    case ACT_READ:
        actor->value = *at;
        break;
    case ACT_WRITE:
        *at = actor->value;
        break;
    case ACT_REMOVE:
        actor->rc = madvise(actor->at, actor->length_bytes, MADV_REMOVE);
        break;
    case ACT_DONTNEED:
        actor->rc = madvise(actor->at, actor->length_bytes, MADV_DONTNEED);
        break;
    case ACT_UNMAP:
        actor->rc = munmap(actor->at, actor->length_bytes);
        break;
    case ACT_REMAP:
        actor->rc = mremap(actor->at, actor->length_bytes, actor->length_bytes,
                           MREMAP_MAYMOVE | MREMAP_FIXED, actor->to) == actor->to
                        ? 0
                        : -1;
        break;
    case ACT_CALL:
        actor->rc = actor->call(actor);
        break;
    }
    actor->code = errno;
    atomic_store(&actor->through, true);
    return NULL;
}

void actor_start(struct actor *actor)
{
    atomic_store(&actor->through, false);
    assert_int_equal(pthread_create(&actor->thread, NULL, act, actor), 0);
}

void actor_finish(struct actor *actor)
{
    struct timespec limit;
    clock_gettime(CLOCK_REALTIME, &limit);
    limit.tv_sec += PATIENCE_MS / 1000;
    if (pthread_timedjoin_np(actor->thread, NULL, &limit) != 0) {
        /* It can't be joined, and its memory is about to go: nothing sane can follow. */
        fprintf(stderr, "a thread waits for ever on memory that should have been served\n");
        give_up();
    }
}

void await_through(const struct actor *actor)
{
    for (uint64_t start_ns = mf_now_ns(); mf_now_ns() - start_ns < PATIENCE_MS * UINT64_C(1000000);
         nap()) {
        if (atomic_load(&actor->through))
            return;
    }
    fprintf(stderr, "a thread waits for ever\n");
    give_up();
}

bool actor_waits(const struct actor *actor)
{
    for (int i = 0; i < 50 && !atomic_load(&actor->through); i++)
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    return !atomic_load(&actor->through);
}

void await_readable(int uffd)
{
    struct pollfd ready = {.fd = uffd, .events = POLLIN};
    if (poll(&ready, 1, PATIENCE_MS) != 1 || ready.revents != POLLIN) {
        fprintf(stderr, "no message came (poll says %#x)\n", (unsigned)ready.revents);
        give_up();
    }
}

struct uffd_msg next_message(int uffd)
{
    struct uffd_msg message;
    await_readable(uffd);
    assert_int_equal(read(uffd, &message, sizeof(message)), sizeof(message));
    return message;
}

bool no_message(int uffd)
{
    struct uffd_msg message;
    return read(uffd, &message, sizeof(message)) < 0 && errno == EAGAIN;
}

void await_pending(int uffd, unsigned count)
{
    cleanup_close int info_fd = mf_uffd_open_info(uffd);
    size_t pending = 0;
    for (uint64_t start_ns = mf_now_ns(); mf_now_ns() - start_ns < PATIENCE_MS * UINT64_C(1000000);
         nap()) {
        pending = mf_uffd_faults_pending(info_fd);
        if (pending >= count)
            return;
    }
    fprintf(stderr, "%zu faults are pending, %u were expected\n", pending, count);
    give_up();
}

int ioctl_errno(int fd, unsigned long request, void *argument)
{
    return ioctl(fd, request, argument) == 0 ? 0 : errno;
}

int continue_pages(const struct area *area, size_t first, size_t pages, int64_t *result)
{
    struct uffdio_continue arg = {
        .range = {.start = (uintptr_t)page_of(area, first), .len = pages * area->page_bytes},
        .mapped = 12345};
    int code = ioctl_errno(area->uffd, UFFDIO_CONTINUE, &arg);
    if (result)
        *result = arg.mapped;
    return code;
}

static const char nr_hugepages[] = "/proc/sys/vm/nr_hugepages";
static long nr_hugepages_before = -1;
static pid_t nr_hugepages_owner;

static long read_nr(void)
{
    long value = -1;
    cleanup_fclose FILE *f = fopen(nr_hugepages, "re");
    return f && fscanf(f, "%ld", &value) == 1 ? value : -1;
}

/** meminfo() - a row of /proc/meminfo, e.g. "HugePages_Free". */
static long meminfo(const char *name)
{
    long value = 0;
    char line[128];
    const size_t length = strlen(name);
    cleanup_fclose FILE *f = fopen("/proc/meminfo", "re");
    while (f && fgets(line, sizeof(line), f))
        if (strncmp(line, name, length) == 0 && line[length] == ':')
            value = strtol(line + length + 1, NULL, 10);
    return value;
}

static long free_huge_pages(void)
{
    return meminfo("HugePages_Free") - meminfo("HugePages_Rsvd");
}

static void write_nr(long value)
{
    char text[24];
    int length = snprintf(text, sizeof(text), "%ld\n", value);
    cleanup_close int fd = open(nr_hugepages, O_WRONLY | O_CLOEXEC);
    if (fd >= 0)
        mf_write_all(fd, text, (size_t)length);
}

static void put_back(void)
{
    if (nr_hugepages_before >= 0 && nr_hugepages_owner == getpid())
        write_nr(nr_hugepages_before);
}

static void put_back_and_die(int number)
{
    put_back();
    signal(number, SIG_DFL);
    raise(number);
}

bool huge_pages_reserve(unsigned count)
{
    nr_hugepages_owner = getpid();
    nr_hugepages_before = read_nr();
    if (nr_hugepages_before < 0) {
        fprintf(stderr, "skipped: this kernel has no huge pages (%s)\n", nr_hugepages);
        return false;
    }
    atexit(put_back);
    static const int fatal[] = {SIGTERM, SIGINT, SIGHUP, SIGABRT};
    for (size_t i = 0; i < sizeof(fatal) / sizeof(fatal[0]); i++)
        signal(fatal[i], put_back_and_die);
    /* On top of what others hold beyond the setting ("surplus"), which would else be counted in. */
    write_nr(meminfo("HugePages_Total") + (long)count);
    /* What another test has just given back may take a moment to be free. */
    bool free = false;
    for (int i = 0; i < 5000 && !(free = free_huge_pages() >= (long)count); i++)
        usleep(1000);
    if (!free) {
        fprintf(stderr,
                "skipped: %u huge pages can't be reserved in %s (not root, or no memory in one "
                "piece)\n",
                count, nr_hugepages);
        return false;
    }
    return true;
}
