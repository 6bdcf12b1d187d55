/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib/smaps.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "lib/util.h"

/** struct reader - lines of a file, by read(2) alone: a mover's system-call filter allows that. */
struct reader {
    int fd;
    size_t have, at;
    char line[1024]; /**< longer ones are cut: what matters is in front */
    char buffer[16384];
};

/* Return: 1, 0 at the end, or -errno. */
static int next_line(struct reader *r)
{
    size_t length = 0;
    for (;;) {
        if (r->at == r->have) {
            ssize_t n = read(r->fd, r->buffer, sizeof(r->buffer));
            if (n < 0 && errno == EINTR)
                continue;
            if (n <= 0)
                return n < 0 ? -errno : 0;
            r->have = (size_t)n;
            r->at = 0;
        }
        const char c = r->buffer[r->at++];
        if (c != '\n') {
            if (length + 1 < sizeof(r->line))
                r->line[length++] = c;
            continue;
        }
        r->line[length] = '\0';
        return 1;
    }
}

int mf_served_spans(int smaps_fd, bool (*wanted)(const struct mf_vma *vma, const void *arg),
                    const void *arg, struct mf_span **out, unsigned *count)
{
    cleanup_free struct mf_span *spans = NULL;
    struct reader reader = {.fd = smaps_fd};
    unsigned used = 0, room = 0;
    struct mf_vma vma = {0};
    bool is_wanted = false;
    int r;
    if (lseek(smaps_fd, 0, SEEK_SET) < 0)
        return -errno;
    while ((r = next_line(&reader)) > 0) {
        if (strncmp(reader.line, "VmFlags:", 8) != 0) {
            struct mf_vma next;
            if (mf_vma_parse(reader.line, &next) == 0) {
                vma = next;
                is_wanted = wanted(&vma, arg);
            }
            continue;
        }
        if (!is_wanted || (!strstr(reader.line, " um") && !strstr(reader.line, " ui")))
            continue;
        if (used > 0 && spans[used - 1].end_addr == vma.start_addr) {
            spans[used - 1].end_addr = vma.end_addr;
            continue;
        }
        if (used == room) {
            room = room ? 2 * room : 64;
            struct mf_span *grown = reallocarray(spans, room, sizeof(*spans));
            if (!grown)
                return -ENOMEM;
            spans = grown;
        }
        spans[used++] = (struct mf_span){vma.start_addr, vma.end_addr};
    }
    if (r < 0)
        return r;
    *out = spans;
    spans = NULL;
    *count = used;
    return 0;
}

bool mf_served_private(const struct mf_vma *vma, const void *arg)
{
    (void)arg;
    return mf_vma_is_private(vma);
}

struct regions {
    const struct mf_region_source *region;
    unsigned count;
};

static bool in_a_region(const struct mf_vma *vma, const void *arg)
{
    const struct regions *regions = arg;
    struct mf_mapping part;
    return mf_region_of(vma, regions->region, regions->count, &part) >= 0;
}

int mf_refuse_served(pid_t pid, const struct mf_region_source *regions, unsigned region_count,
                     struct mf_error *err)
{
    const struct regions all = {regions, region_count};
    cleanup_free struct mf_span *served = NULL;
    unsigned count = 0;
    char path[64], name[64];
    mf_target_comm(pid, name, sizeof(name));
    snprintf(path, sizeof(path), "/proc/%d/smaps", (int)pid);
    cleanup_close int fd = open(path, O_RDONLY | O_CLOEXEC);
    int r = fd < 0 ? -errno : mf_served_spans(fd, in_a_region, &all, &served, &count);
    if (r < 0)
        return mf_fail(err, -r, "cannot read how the memory of %s (pid %d) is mapped (%s): %s",
                       name, (int)pid, path, strerror(-r));
    if (count > 0)
        return mf_fail(err, EBUSY,
                       "the faults of %s (pid %d) in its memory at %#llx are served by a "
                       "userfaultfd (a restore or a migration that is not over yet?), and what has "
                       "not arrived there can't be told from what was never touched: wait until "
                       "that is complete",
                       name, (int)pid, (unsigned long long)served[0].start_addr);
    return 0;
}
