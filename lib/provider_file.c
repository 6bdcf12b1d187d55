/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Pages from files. Where a file has data is asked once (SEEK_DATA, lseek(2)) and remembered, so a
 * fault costs one pread(2) or, in a hole, none.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "lib/server.h"
#include "lib/util.h"

/** struct extent - [start, end) of a file is data. */
struct extent {
    uint64_t start_bytes, end_bytes;
};

struct source {
    int fd;
    uint64_t offset_bytes;
    struct extent *extent; /**< in order, apart from each other */
    size_t count;
};

struct files {
    unsigned count;
    struct source source[MEMFERRY_REGIONS_MAX];
};

/* Is there data in [start, end)? */
static bool any_data(const struct source *source, uint64_t start, uint64_t end)
{
    size_t low = 0, high = source->count;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (source->extent[middle].end_bytes <= start)
            low = middle + 1;
        else
            high = middle;
    }
    return low < source->count && source->extent[low].start_bytes < end;
}

static int read_all(const struct source *source, uint8_t *to, uint64_t length_bytes, uint64_t at)
{
    while (length_bytes > 0) {
        ssize_t n = pread(source->fd, to, length_bytes, (off_t)at);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -errno;
        if (n == 0) { /* the file ends in the middle of a page */
            memset(to, 0, length_bytes);
            return 0;
        }
        to += n;
        at += (uint64_t)n;
        length_bytes -= (uint64_t)n;
    }
    return 0;
}

static int want(void *argument, struct memferry_server *server, struct memferry_want *want)
{
    (void)server;
    const struct files *files = argument;
    if (want->region >= files->count)
        return -ENXIO;
    const struct source *source = &files->source[want->region];
    const uint64_t page_bytes = want->page_bytes;
    const uint64_t at = source->offset_bytes + want->first_page * page_bytes;
    /* A run of one kind. */
    const bool data = any_data(source, at, at + page_bytes);
    uint64_t pages = 1;
    while (pages < want->pages &&
           any_data(source, at + pages * page_bytes, at + (pages + 1) * page_bytes) == data)
        pages++;
    want->pages = pages;
    if (!data)
        return MEMFERRY_ZERO;
    int r = read_all(source, want->bytes, pages * page_bytes, at);
    return r < 0 ? r : MEMFERRY_DATA;
}

static void free_files(void *argument)
{
    struct files *files = argument;
    for (unsigned i = 0; i < files->count; i++) {
        mf_close_p(&files->source[i].fd);
        free(files->source[i].extent);
    }
    free(files);
}

static int find_extents(struct source *source)
{
    size_t room = 0;
    off_t at = (off_t)source->offset_bytes;
    for (;;) {
        off_t start = lseek(source->fd, at, SEEK_DATA);
        if (start < 0)
            return errno == ENXIO ? 0 : -errno; /* ENXIO: nothing but a hole up to the end */
        off_t end = lseek(source->fd, start, SEEK_HOLE);
        if (end < 0)
            return -errno;
        if (source->count == room) {
            room = room ? room * 2 : 64;
            struct extent *more = realloc(source->extent, room * sizeof(*more));
            if (!more)
                return -ENOMEM;
            source->extent = more;
        }
        source->extent[source->count++] = (struct extent){(uint64_t)start, (uint64_t)end};
        at = end;
    }
}

int memferry_provider_file(const struct memferry_file *files, unsigned count,
                           struct memferry_provider *out)
{
    if (count > MEMFERRY_REGIONS_MAX)
        return server_fail(EINVAL, "%u files are more than a server has regions", count);
    struct files *all = calloc(1, sizeof(*all));
    if (!all)
        return server_fail(ENOMEM, "out of memory for a provider");
    /* An array of structs that may be smaller than ours: go by the size that they say. */
    const char *at = (const char *)files;
    for (unsigned i = 0; i < count; i++) {
        struct memferry_file file = {0};
        size_t size;
        memcpy(&size, at, sizeof(size));
        if (size <= offsetof(struct memferry_file, fd)) {
            free_files(all);
            return server_fail(EINVAL, "snapshot %u has no struct_bytes", i);
        }
        memcpy(&file, at, size < sizeof(file) ? size : sizeof(file));
        at += size;
        struct source *source = &all->source[all->count];
        source->offset_bytes = file.offset_bytes;
        source->fd = fcntl(file.fd, F_DUPFD_CLOEXEC, 0);
        int r = source->fd < 0 ? -errno : 0;
        all->count++;
        if (r == 0)
            r = find_extents(source);
        if (r < 0) {
            free_files(all);
            return server_fail(-r, "cannot read snapshot %u: %s", i, strerror(-r));
        }
    }
    return server_give_provider(
        &(struct memferry_provider){.arg = all, .want = want, .close = free_files}, out);
}
