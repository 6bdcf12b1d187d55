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
    uint64_t end_bytes;    /**< what lies behind is zeros */
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

/* Return: how many of @length_bytes are there, of which those behind the end are zeros; fewer: the
 * rest can't be read; -errno: nothing can. */
static ssize_t read_all(const struct source *source, uint8_t *to, uint64_t length_bytes,
                        uint64_t at)
{
    uint64_t done = 0;
    const uint64_t data_bytes =
        source->end_bytes - at < length_bytes ? source->end_bytes - at : length_bytes;
    while (done < data_bytes) {
        ssize_t n = pread(source->fd, to + done, data_bytes - done, (off_t)(at + done));
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0) /* it had more when its extents were looked up */
            return done ? (ssize_t)done : n < 0 ? -errno : -EIO;
        done += (uint64_t)n;
    }
    memset(to + data_bytes, 0, length_bytes - data_bytes);
    return (ssize_t)length_bytes;
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
    ssize_t n = read_all(source, want->bytes, pages * page_bytes, at);
    if (pages > 1 && n < (ssize_t)page_bytes) /* not for what is wrong with its neighbours */
        n = read_all(source, want->bytes, page_bytes, at);
    want->pages = n > 0 ? (uint64_t)n / page_bytes : 0;
    return n < 0 ? (int)n : want->pages > 0 ? MEMFERRY_DATA : -EIO;
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

static int add_extent(struct source *source, size_t *room, uint64_t start, uint64_t end)
{
    if (source->count == *room) {
        *room = *room ? *room * 2 : 64;
        struct extent *more = realloc(source->extent, *room * sizeof(*more));
        if (!more)
            return -ENOMEM;
        source->extent = more;
    }
    source->extent[source->count++] = (struct extent){start, end};
    return 0;
}

/* @length_bytes: 0: up to the file's end. */
static int find_extents(struct source *source, uint64_t length_bytes)
{
    size_t room = 0;
    const off_t size = lseek(source->fd, 0, SEEK_END);
    if (size < 0)
        return -errno;
    uint64_t at = source->offset_bytes;
    const uint64_t there = at < (uint64_t)size ? (uint64_t)size - at : 0;
    if (length_bytes > there)
        return -ENODATA;
    source->end_bytes = at + (length_bytes ? length_bytes : there);
    int r = 0;
    while (r == 0 && at < source->end_bytes) {
        const off_t start = lseek(source->fd, (off_t)at, SEEK_DATA);
        if (start < 0 &&
            errno == EINVAL) /* a block device: it has no holes that it would tell of */
            return add_extent(source, &room, at, source->end_bytes);
        if (start < 0)
            return errno == ENXIO ? 0 : -errno; /* ENXIO: nothing but a hole up to the end */
        if ((uint64_t)start >= source->end_bytes)
            return 0;
        const off_t hole = lseek(source->fd, start, SEEK_HOLE);
        if (hole < 0)
            return -errno;
        at = (uint64_t)hole < source->end_bytes ? (uint64_t)hole : source->end_bytes;
        r = add_extent(source, &room, (uint64_t)start, at);
    }
    return r;
}

int memferry_provider_file(const struct memferry_file *files, unsigned count,
                           struct memferry_provider *out)
{
    if (server_check_out(out) < 0)
        return -EINVAL;
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
        int r = server_take(&file, sizeof(file), at, "struct memferry_file");
        if (r < 0) {
            free_files(all);
            return r;
        }
        at += size;
        struct source *source = &all->source[all->count];
        source->offset_bytes = file.offset_bytes;
        source->fd = fcntl(file.fd, F_DUPFD_CLOEXEC, 0);
        r = source->fd < 0 ? -errno : 0;
        all->count++;
        if (r == 0)
            r = find_extents(source, file.length_bytes);
        if (r == -ENODATA) {
            free_files(all);
            return server_fail(EINVAL,
                               "snapshot %u is shorter than the %llu bytes that it should have", i,
                               (unsigned long long)file.length_bytes);
        }
        if (r < 0) {
            free_files(all);
            return server_fail(-r, "cannot read snapshot %u: %s", i, strerror(-r));
        }
    }
    return server_give_provider(
        &(struct memferry_provider){.arg = all, .want = want, .close = free_files}, out);
}
