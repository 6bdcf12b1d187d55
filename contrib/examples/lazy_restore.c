/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Restore a process's memory lazily: a program that saves its memory to a file, and when it is
 * started again goes on at once, while its pages are still in that file.
 *
 *     lazy-restore save FILE [MIB]     make data, write the snapshot
 *     lazy-restore run FILE            map it where it was, use all of it, check every page
 *
 * Its memory is of two kinds: a heap of private anonymous memory full of pointers, restored with
 * UFFDIO_COPY, and a table in a memfd, as a cache shared between processes would be, restored by
 * way of its file with UFFDIO_CONTINUE. libmemferry tells them apart; this program only says which
 * is which. Pages that were never touched are holes in the snapshot, and stay holes.
 *
 * Build: cc lazy_restore.c $(pkg-config --cflags --libs libmemferry)
 */
#include <errno.h>
#include <fcntl.h>
#include <memferry.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096u
#define HEAP_AT ((void *)0x200000000000) /* pointers are saved as they are, so always here */
#define NODES_A_PAGE (PAGE / sizeof(struct node))

/** The first page of the file. The heap's pages follow it, then the table's. */
struct header {
    char magic[8];
    uint64_t heap_bytes, table_bytes;
    uint64_t nodes, sum;
    struct node *first;
};

/** One of a list that leads through the whole heap, in no order. */
struct node {
    struct node *next;
    uint64_t number, value[6];
};

static _Noreturn void die(const char *what)
{
    fprintf(stderr, "lazy-restore: %s: %s\n", what,
            *memferry_why() ? memferry_why() : strerror(errno));
    exit(1);
}

static uint64_t scatter(uint64_t x)
{
    x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
    return x ^ (x >> 31);
}

/* Every fourth page is never touched. */
static bool is_hole(uint64_t page)
{
    return page % 4 == 3;
}

static double now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec / 1e6;
}

static void map_heap(uint64_t bytes)
{
    void *at = mmap(HEAP_AT, bytes, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);
    if (at != HEAP_AT)
        die("cannot map the heap where it belongs");
}

static uint64_t *map_table(uint64_t bytes, int *fd)
{
    *fd = memfd_create("table", MFD_CLOEXEC);
    if (*fd < 0 || ftruncate(*fd, (off_t)bytes) != 0)
        die("cannot make the table's file");
    void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, *fd, 0);
    if (at == MAP_FAILED)
        die("cannot map the table");
    return at;
}

/* ---- save ---- */

/* A list that visits the heap's nodes in a scattered order. */
static void make_heap(struct header *h)
{
    const uint64_t pages = h->heap_bytes / PAGE;
    struct node **order = malloc(pages * NODES_A_PAGE * sizeof(*order));
    if (!order)
        die("out of memory");
    for (uint64_t page = 0; page < pages; page++)
        for (uint64_t i = 0; i < NODES_A_PAGE && !is_hole(page); i++)
            order[h->nodes++] = (struct node *)((char *)HEAP_AT + page * PAGE) + i;
    for (uint64_t i = h->nodes - 1; i > 0; i--) {
        uint64_t other = scatter(i) % (i + 1);
        struct node *swap = order[i];
        order[i] = order[other];
        order[other] = swap;
    }
    for (uint64_t i = 0; i < h->nodes; i++) {
        struct node *node = order[i];
        *node = (struct node){.next = i + 1 < h->nodes ? order[i + 1] : NULL, .number = i};
        for (uint64_t k = 0; k < 6; k++)
            h->sum += node->value[k] = scatter(i * 6 + k);
    }
    h->first = order[0];
    free(order);
}

static void make_table(uint64_t *table, uint64_t bytes)
{
    for (uint64_t i = 0; i < bytes / 8; i++)
        if (!is_hole(i * 8 / PAGE))
            table[i] = scatter(i) | 1;
}

static void write_pages(int fd, const void *memory, uint64_t bytes, uint64_t at)
{
    for (uint64_t page = 0; page < bytes / PAGE; page++)
        if (!is_hole(page) &&
            pwrite(fd, (const char *)memory + page * PAGE, PAGE, (off_t)(at + page * PAGE)) != PAGE)
            die("cannot write the snapshot");
}

static void save(const char *path, uint64_t mib)
{
    struct header h = {.magic = "LAZYREST", .heap_bytes = mib << 20, .table_bytes = mib << 20};
    int table_fd;
    map_heap(h.heap_bytes);
    uint64_t *table = map_table(h.table_bytes, &table_fd);
    make_heap(&h);
    make_table(table, h.table_bytes);
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (fd < 0)
        die(path);
    write_pages(fd, HEAP_AT, h.heap_bytes, PAGE);
    write_pages(fd, table, h.table_bytes, PAGE + h.heap_bytes);
    if (pwrite(fd, &h, sizeof(h), 0) != sizeof(h) ||
        ftruncate(fd, (off_t)(PAGE + h.heap_bytes + h.table_bytes)) != 0 || close(fd) != 0)
        die("cannot write the snapshot");
    printf("saved %llu nodes and a table, %llu MiB each\n", (unsigned long long)h.nodes,
           (unsigned long long)mib);
}

/* ---- run ---- */

static void serve(struct memferry_server *server, int snapshot, const struct header *h,
                  uint64_t *table, int table_fd)
{
    struct memferry_file files[] = {
        {.struct_bytes = sizeof(files[0]), .fd = snapshot, .offset_bytes = PAGE},
        {.struct_bytes = sizeof(files[0]), .fd = snapshot, .offset_bytes = PAGE + h->heap_bytes},
    };
    struct memferry_region regions[] = {
        {.struct_bytes = sizeof(regions[0]),
         .memory = MEMFERRY_ANONYMOUS,
         .length_bytes = h->heap_bytes},
        {.struct_bytes = sizeof(regions[0]),
         .memory = MEMFERRY_SHMEM,
         .length_bytes = h->table_bytes,
         .fd = table_fd},
    };
    void *at[] = {HEAP_AT, table};
    struct memferry_provider provider = {.struct_bytes = sizeof(provider)};
    if (memferry_provider_file(files, 2, &provider) < 0 ||
        memferry_server_set_provider(server, &provider) < 0)
        die("cannot read the snapshot");
    int context = memferry_context_open(server);
    if (context < 0)
        die("cannot watch memory");
    for (int i = 0; i < 2; i++) {
        int region = memferry_region_add(server, &regions[i]);
        if (region < 0 ||
            memferry_mapping_add(
                server, &(struct memferry_mapping){.struct_bytes = sizeof(struct memferry_mapping),
                                                   .context = (uint32_t)context,
                                                   .region = (uint32_t)region,
                                                   .start_addr = (uintptr_t)at[i],
                                                   .length_bytes = regions[i].length_bytes}) < 0)
            die("cannot serve the memory");
    }
    if (memferry_server_start(server) < 0)
        die("cannot serve the memory");
}

struct background {
    struct memferry_server *server;
    int snapshot;
    uint64_t heap_bytes;
};

/* What nobody has asked for comes too, so that the snapshot can go. */
static void *fill(void *argument)
{
    static _Alignas(8) char bytes[16 * PAGE];
    const struct background *b = argument;
    for (uint32_t region = 0; region < 2; region++) {
        uint64_t page = 0, run;
        while ((run = memferry_next_missing(b->server, region, &page)) > 0) {
            const uint64_t at = PAGE + (region ? b->heap_bytes : 0) + page * PAGE;
            if (is_hole(page)) {
                if (memferry_fill_zero(b->server, region, page++, 1) < 0)
                    die("cannot fill");
                continue;
            }
            if (run > 16)
                run = 16;
            for (uint64_t i = 1; i < run; i++)
                if (is_hole(page + i))
                    run = i;
            if (pread(b->snapshot, bytes, run * PAGE, (off_t)at) != (ssize_t)(run * PAGE) ||
                memferry_fill(b->server, region, page, run, bytes) < 0)
                die("cannot fill");
            page += run;
        }
    }
    return NULL;
}

static void check_heap(const struct header *h)
{
    uint64_t nodes = 0, sum = 0;
    for (const struct node *node = h->first; node; node = node->next) {
        bool good = node->number == nodes++;
        for (uint64_t k = 0; k < 6; k++) {
            good = good && node->value[k] == scatter(node->number * 6 + k);
            sum += node->value[k];
        }
        if (!good) {
            fprintf(stderr, "lazy-restore: node %p is wrong\n", (const void *)node);
            exit(1);
        }
    }
    if (nodes != h->nodes || sum != h->sum) {
        fprintf(stderr, "lazy-restore: the list has %llu nodes, not %llu\n",
                (unsigned long long)nodes, (unsigned long long)h->nodes);
        exit(1);
    }
}

static void check_words(const char *name, const uint64_t *words, uint64_t bytes, bool table)
{
    for (uint64_t i = 0; i < bytes / 8; i++) {
        const bool hole = is_hole(i * 8 / PAGE);
        if (hole ? words[i] != 0 : table && words[i] != (scatter(i) | 1)) {
            fprintf(stderr, "lazy-restore: word %llu of the %s is wrong\n", (unsigned long long)i,
                    name);
            exit(1);
        }
    }
}

static void run(const char *path)
{
    struct header h;
    struct memferry_server *server;
    pthread_t thread;
    int table_fd, snapshot = open(path, O_RDONLY | O_CLOEXEC);
    if (snapshot < 0 || pread(snapshot, &h, sizeof(h), 0) != sizeof(h))
        die(path);
    if (memcmp(h.magic, "LAZYREST", 8) != 0) {
        fprintf(stderr, "lazy-restore: %s is no snapshot of this program\n", path);
        exit(1);
    }
    const double start_ms = now_ms();
    map_heap(h.heap_bytes);
    uint64_t *table = map_table(h.table_bytes, &table_fd);
    if (memferry_server_new(
            &(struct memferry_server_options){
                .struct_bytes = sizeof(struct memferry_server_options), .around_pages = 8},
            &server) < 0)
        die("cannot make a server");
    serve(server, snapshot, &h, table, table_fd);

    /* Here it is where it was when it saved itself. */
    if (h.first->number != 0 || table[PAGE] != (scatter(PAGE) | 1))
        die("the first page is wrong");
    printf("running after %.1f ms with %llu pages still in the snapshot\n", now_ms() - start_ms,
           (unsigned long long)memferry_missing_pages(server));
    struct background background = {server, snapshot, h.heap_bytes};
    if (pthread_create(&thread, NULL, fill, &background) != 0)
        die("cannot start a thread");
    check_heap(&h);
    check_words("heap", HEAP_AT, h.heap_bytes, false);
    check_words("table", table, h.table_bytes, true);
    pthread_join(thread, NULL);

    struct memferry_figures figures = {.struct_bytes = sizeof(figures)};
    memferry_figures(server, &figures);
    if (memferry_server_free(server, MEMFERRY_END_COMPLETE) < 0)
        die("not all pages came");
    close(snapshot);
    check_heap(&h); /* without anybody's help */
    printf("every page is right: %llu were waited for, %llu came by the way\n",
           (unsigned long long)figures.wanted,
           (unsigned long long)(figures.data_pages + figures.zero_pages - figures.wanted));
}

int main(int argc, char **argv)
{
    if (argc >= 3 && strcmp(argv[1], "save") == 0) {
        save(argv[2], argc > 3 ? strtoull(argv[3], NULL, 0) : 16);
    } else if (argc == 3 && strcmp(argv[1], "run") == 0) {
        run(argv[2]);
    } else {
        fprintf(stderr, "usage: lazy-restore save FILE [MIB] | lazy-restore run FILE\n");
        return 2;
    }
    return 0;
}
