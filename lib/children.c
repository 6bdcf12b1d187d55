/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib/children.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>

#include "lib/util.h"

void mf_children_free(struct mf_children *children)
{
    free(children->list);
    *children = (struct mf_children){0};
}

static int ascending(const void *a, const void *b)
{
    pid_t x = *(const pid_t *)a, y = *(const pid_t *)b;
    return (x > y) - (x < y);
}

int mf_children_read(int proc_fd, pid_t tid, struct mf_children *out)
{
    char path[48];
    *out = (struct mf_children){0};
    snprintf(path, sizeof(path), "task/%d/children", tid);
    int fd = openat(proc_fd, path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    cleanup_fclose FILE *f = fdopen(fd, "r");
    if (!f) {
        close(fd);
        return -ENOMEM;
    }
    size_t room = 0;
    int pid;
    while (fscanf(f, "%d", &pid) == 1) {
        if (out->count == room) {
            room = room ? room * 2 : 64;
            pid_t *grown = reallocarray(out->list, room, sizeof(*grown));
            if (!grown) {
                mf_children_free(out);
                return -ENOMEM;
            }
            out->list = grown;
        }
        out->list[out->count++] = pid;
    }
    if (out->count)
        qsort(out->list, out->count, sizeof(out->list[0]), ascending);
    return 0;
}

pid_t mf_children_new(int proc_fd, pid_t tid, const struct mf_children *before)
{
    struct mf_children now;
    pid_t found = 0;
    if (mf_children_read(proc_fd, tid, &now) < 0)
        return 0;
    for (size_t i = 0; i < now.count && !found; i++) {
        if (!before->count ||
            !bsearch(&now.list[i], before->list, before->count, sizeof(before->list[0]), ascending))
            found = now.list[i];
    }
    mf_children_free(&now);
    return found;
}
