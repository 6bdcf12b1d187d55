/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * How fast are faults served: by libmemferry's server, and by a bare loop that reads one
 * userfaultfd and fills, which is what this machine can do at all. tests/bench/faults runs it and
 * prints tables.
 *
 * usage: bench-faults KIND THREADS PAGES ROUNDS [SPIN_US]
 * KIND: minor        4 KiB pages that lie in a memfd already, CONTINUE
 *       missing      4 KiB pages of a memfd that come from a table; the bare loop: COPY
 *       anonymous    the same into private anonymous memory
 *       huge-minor, huge-missing   2 MiB pages of hugetlbfs
 * SPIN_US: of the server; the bare loop then reads without sleeping.
 *
 * Both ways serve the same pages of the same file to the same threads in the same order, in turns
 * that alternate, so that whatever else the machine does meets both. The serving thread has the
 * first processor for itself, the threads that touch share the others. Every page's first word is
 * checked. For each turn a line: WAY FAULTS_PER_SECOND P50_NS P99_NS P999_NS MAX_NS.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "lib/uapi.h"
#include "lib/uffd.h"
#include "lib/util.h"
#include "memferry.h"
#include "tests/kernel/area.h"

#define THREADS_MAX 64u
#define FIRST_WORD(page) ((uint64_t)(page)*UINT64_C(0x9e3779b97f4a7c15) + 1)

static enum memferry_memory memory;
static bool minor_faults;
static unsigned thread_count, spin_us;
static uint64_t page_bytes = 4096, pages;
static int file = -1;
static uint8_t *at;     /* served */
static uint8_t *second; /* of the same file, populated: minor faults */
static uint8_t *source; /* where missing pages come from: a few pages again and again, warm */
#define SOURCE_PAGES 16u
static uint64_t *latency_ns;
static pthread_barrier_t start;

static void must(bool condition, const char *what)
{
    if (condition)
        return;
    fprintf(stderr, "%s: %s (%s)\n", what, strerror(errno), memferry_why());
    exit(1);
}

static void run_on(bool serving)
{
    cpu_set_t set;
    const long processors = sysconf(_SC_NPROCESSORS_ONLN);
    CPU_ZERO(&set);
    for (size_t i = 0; i < (size_t)processors; i++)
        if (processors == 1 || (i == 0) == serving)
            CPU_SET(i, &set);
    sched_setaffinity(0, sizeof(set), &set);
}

/* What a page begins with. The bytes of a page that is copied are the same for several pages, so
 * the server writes its number into them before. */
static const void *page_source(uint64_t page)
{
    uint8_t *bytes = source + page % SOURCE_PAGES * page_bytes;
    *(uint64_t *)(void *)bytes = FIRST_WORD(page);
    return bytes;
}

/* ---- those who touch ---- */

static void *touch(void *argument)
{
    const uint64_t number = (uintptr_t)argument;
    run_on(false);
    pthread_barrier_wait(&start);
    for (uint64_t page = number; page < pages; page += thread_count) {
        const uint64_t begin_ns = mf_now_ns();
        const uint64_t word = *(volatile uint64_t *)(void *)(at + page * page_bytes);
        latency_ns[page] = mf_now_ns() - begin_ns;
        must(word == FIRST_WORD(page), "a wrong page");
    }
    return NULL;
}

static int compare(const void *a, const void *b)
{
    const uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

static uint64_t quantile(double of)
{
    uint64_t rank = (uint64_t)((double)pages * of);
    return latency_ns[rank < pages ? rank : pages - 1];
}

static void touch_all(const char *way)
{
    pthread_t thread[THREADS_MAX] = {0};
    pthread_barrier_init(&start, NULL, thread_count + 1);
    for (uintptr_t i = 0; i < thread_count; i++)
        must(pthread_create(&thread[i], NULL, touch, (void *)i) == 0, "a thread");
    pthread_barrier_wait(&start);
    const uint64_t begin_ns = mf_now_ns();
    for (unsigned i = 0; i < thread_count; i++)
        pthread_join(thread[i], NULL);
    const uint64_t took_ns = mf_now_ns() - begin_ns;
    pthread_barrier_destroy(&start);
    qsort(latency_ns, pages, sizeof(*latency_ns), compare);
    printf("%s %.0f %llu %llu %llu %llu\n", way, (double)pages * 1e9 / (double)took_ns,
           (unsigned long long)quantile(0.5), (unsigned long long)quantile(0.99),
           (unsigned long long)quantile(0.999), (unsigned long long)quantile(1));
    fflush(stdout);
}

/* ---- the bare loop ---- */

struct bare {
    int uffd;
    _Atomic bool stop;
};

static void *serve_bare(void *argument)
{
    struct bare *bare = argument;
    struct uffd_msg message;
    run_on(true);
    while (!atomic_load_explicit(&bare->stop, memory_order_relaxed)) {
        ssize_t n = read(bare->uffd, &message, sizeof(message));
        if (n < 0 && (errno == EAGAIN || errno == EINTR))
            continue;
        must(n == sizeof(message), "read of a userfaultfd");
        const uint64_t addr = message.arg.pagefault.address & ~(page_bytes - 1);
        if (minor_faults) {
            struct uffdio_continue arg = {.range = {addr, page_bytes}};
            must(ioctl(bare->uffd, UFFDIO_CONTINUE, &arg) == 0, "UFFDIO_CONTINUE");
        } else {
            struct uffdio_copy arg = {
                .dst = addr,
                .src = (uintptr_t)page_source((addr - (uintptr_t)at) / page_bytes),
                .len = page_bytes};
            must(ioctl(bare->uffd, UFFDIO_COPY, &arg) == 0, "UFFDIO_COPY");
        }
    }
    return NULL;
}

static void turn_bare(void)
{
    struct bare bare = {.uffd = mf_uffd_open()};
    struct mf_error err;
    pthread_t thread;
    must(bare.uffd >= 0, "a userfaultfd");
    must(mf_uffd_api(bare.uffd, MF_UFFD_FEATURES, MF_UFFD_FEATURES_WANTED, NULL, &err) == 0, "API");
    must((memory == MEMFERRY_ANONYMOUS ? mf_uffd_register_private : mf_uffd_register)(
             bare.uffd, (uintptr_t)at, pages * page_bytes, &err) == 0,
         "registering");
    if (!spin_us) /* read(2) sleeps */
        must(fcntl(bare.uffd, F_SETFL, 0) == 0, "fcntl");
    must(pthread_create(&thread, NULL, serve_bare, &bare) == 0, "a thread");
    touch_all("bare");
    atomic_store(&bare.stop, true);
    fcntl(bare.uffd, F_SETFL, O_NONBLOCK);
    if (!spin_us)
        pthread_cancel(thread); /* it sleeps in read(2) */
    pthread_join(thread, NULL);
    mf_uffd_unregister(bare.uffd, (uintptr_t)at, pages * page_bytes);
    close(bare.uffd);
}

/* ---- libmemferry ---- */

static int want_page(void *arg, struct memferry_server *server, struct memferry_want *want)
{
    (void)arg;
    (void)server;
    want->pages = 1;
    if (minor_faults)
        return MEMFERRY_PRESENT;
    want->bytes = (void *)(uintptr_t)page_source(want->first_page);
    return MEMFERRY_DATA;
}

static void turn_memferry(void)
{
    struct memferry_server *server;
    const struct memferry_provider provider = {.struct_bytes = sizeof(provider), .want = want_page};
    const struct memferry_server_options options = {.struct_bytes = sizeof(options),
                                                    .spin_us = spin_us};
    must(memferry_server_new(&options, &server) == 0, "a server");
    must(memferry_server_set_provider(server, &provider) == 0, "a provider");
    const int context = memferry_context_open(server);
    must(context >= 0, "a context");
    must(memferry_region_add(
             server, &(struct memferry_region){.struct_bytes = sizeof(struct memferry_region),
                                               .memory = memory,
                                               .length_bytes = pages * page_bytes,
                                               .fd = file}) == 0,
         "a region");
    must(memferry_mapping_add(
             server, &(struct memferry_mapping){.struct_bytes = sizeof(struct memferry_mapping),
                                                .context = (uint32_t)context,
                                                .start_addr = (uintptr_t)at,
                                                .length_bytes = pages * page_bytes}) == 0,
         "a mapping");
    run_on(true); /* its thread will be where this one is */
    must(memferry_server_start(server) == 0, "starting");
    run_on(false);
    touch_all("memferry");
    must(memferry_server_free(server, MEMFERRY_END_ZEROS) == 0, "the end");
}

/* ---- */

/* As it was before anybody touched it; the memory is warm, for it has just been in use. */
static void prepare(void)
{
    const uint64_t bytes = pages * page_bytes;
    if (at)
        munmap(at, bytes);
    if (file >= 0 && !minor_faults)
        must(fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, (off_t)bytes) == 0,
             "punching");
    at = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
              file >= 0 ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS, file, 0);
    must(at != MAP_FAILED, "mmap");
    if (file < 0)
        madvise(at, bytes, MADV_NOHUGEPAGE);
}

static void set_up(void)
{
    const bool huge = memory == MEMFERRY_HUGETLB;
    const uint64_t bytes = pages * page_bytes;
    if (memory != MEMFERRY_ANONYMOUS) {
        file = memfd_create("memferry-bench", MFD_CLOEXEC | (huge ? MFD_HUGETLB : 0));
        must(file >= 0 && ftruncate(file, (off_t)bytes) == 0, "a file");
        second = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, file, 0);
        must(second != MAP_FAILED, "mmap");
        for (uint64_t page = 0; page < pages; page++)
            *(uint64_t *)(void *)(second + page * page_bytes) = FIRST_WORD(page);
        munmap(second, bytes);
    }
    source = mmap(NULL, SOURCE_PAGES * page_bytes, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    latency_ns = calloc(pages, sizeof(*latency_ns));
    must(source != MAP_FAILED && latency_ns, "memory");
}

int main(int argc, char **argv)
{
    if (argc < 5) {
        fprintf(stderr, "usage: bench-faults KIND THREADS PAGES ROUNDS [SPIN_US]\n");
        return 2;
    }
    const char *kind = argv[1];
    const bool huge = strncmp(kind, "huge", 4) == 0;
    memory = huge                             ? MEMFERRY_HUGETLB
             : strcmp(kind, "anonymous") == 0 ? MEMFERRY_ANONYMOUS
                                              : MEMFERRY_SHMEM;
    minor_faults = strstr(kind, "minor") != NULL;
    thread_count = (unsigned)atoi(argv[2]);
    pages = strtoull(argv[3], NULL, 10);
    const unsigned rounds = (unsigned)atoi(argv[4]);
    spin_us = argc > 5 ? (unsigned)atoi(argv[5]) : 0;
    if (huge)
        page_bytes = UINT64_C(2) << 20;
    if (thread_count == 0 || thread_count > THREADS_MAX || pages == 0)
        return 2;
    if (huge && !huge_pages_reserve((unsigned)pages))
        return 77;
    set_up();
    run_on(false);
    for (unsigned round = 0; round < rounds + 1; round++) {
        /* The first is to warm up, and its lines are dropped by who reads them. */
        prepare();
        (round % 2 ? turn_bare : turn_memferry)();
        prepare();
        (round % 2 ? turn_memferry : turn_bare)();
    }
    return 0;
}
