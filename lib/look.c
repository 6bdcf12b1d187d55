/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib/look.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "lib/util.h"

#define EXTENTS_MAX 1000000u /**< 16 MiB of memory a file; one in more pieces is not compared */

struct mf_look {
    struct mf_look *next;
    int fd, rc;
    uint64_t page_bytes, took_ns;
    struct mf_extents data;
    bool done, abandoned; /**< under the looker's lock */
};

static void look_free(struct mf_look *look)
{
    close(look->fd);
    mf_extents_free(&look->data);
    free(look);
}

/** data_of() - which pages hold data. The last one counts whole: SEEK_HOLE says the file's size of
 * it. */
static int data_of(int fd, uint64_t page_bytes, struct mf_extents *out)
{
    for (off_t at = 0;;) {
        off_t data = lseek(fd, at, SEEK_DATA);
        if (data < 0)
            return errno == ENXIO ? 0 : -errno;
        at = lseek(fd, data, SEEK_HOLE);
        if (at < 0)
            return errno == ENXIO ? 0 : -errno; /* cut off between the two calls */
        uint64_t end_bytes = ((uint64_t)at + page_bytes - 1) & ~(page_bytes - 1);
        int rc = mf_extents_add(out, (uint64_t)data, end_bytes);
        if (rc == 0 && out->count > EXTENTS_MAX)
            rc = -E2BIG;
        if (rc < 0)
            return rc;
    }
}

static void *run(void *arg)
{
    struct mf_looker *looker = arg;
    prctl(PR_SET_NAME, "memferry-look");
    pthread_mutex_lock(&looker->lock);
    while (!looker->closing) {
        struct mf_look *look = looker->first;
        if (!look) {
            pthread_cond_wait(&looker->asked, &looker->lock);
            continue;
        }
        looker->first = look->next;
        if (!looker->first)
            looker->last = &looker->first;
        if (!look->abandoned) {
            pthread_mutex_unlock(&looker->lock);
            uint64_t start_ns = mf_now_ns();
            look->rc = data_of(look->fd, look->page_bytes, &look->data);
            look->took_ns = mf_now_ns() - start_ns;
            pthread_mutex_lock(&looker->lock);
        }
        look->done = true;
        if (look->abandoned)
            look_free(look);
    }
    pthread_mutex_unlock(&looker->lock);
    return NULL;
}

int mf_looker_start(struct mf_looker *looker)
{
    *looker = (struct mf_looker){.lock = PTHREAD_MUTEX_INITIALIZER,
                                 .asked = PTHREAD_COND_INITIALIZER,
                                 .last = &looker->first};
    return -pthread_create(&looker->thread, NULL, run, looker);
}

void mf_looker_end(struct mf_looker *looker)
{
    pthread_mutex_lock(&looker->lock);
    looker->closing = true;
    pthread_cond_signal(&looker->asked);
    pthread_mutex_unlock(&looker->lock);
    pthread_join(looker->thread, NULL);
    for (struct mf_look *look = looker->first, *next; look; look = next) {
        next = look->next;
        look_free(look);
    }
}

struct mf_look *mf_look_begin(struct mf_looker *looker, int fd, uint64_t page_bytes)
{
    struct mf_look *look = calloc(1, sizeof(*look));
    int own_fd = look ? fcntl(fd, F_DUPFD_CLOEXEC, 0) : -1;
    if (own_fd < 0) {
        free(look);
        return NULL;
    }
    *look = (struct mf_look){.fd = own_fd, .page_bytes = page_bytes};
    pthread_mutex_lock(&looker->lock);
    *looker->last = look;
    looker->last = &look->next;
    pthread_cond_signal(&looker->asked);
    pthread_mutex_unlock(&looker->lock);
    return look;
}

bool mf_look_done(struct mf_looker *looker, struct mf_look *look)
{
    pthread_mutex_lock(&looker->lock);
    bool done = look->done;
    pthread_mutex_unlock(&looker->lock);
    return done;
}

int mf_look_end(struct mf_looker *looker, struct mf_look *look, struct mf_extents *data,
                uint64_t *took_ns)
{
    pthread_mutex_lock(&looker->lock);
    bool done = look->done;
    look->abandoned = true; /* then the thread frees it */
    pthread_mutex_unlock(&looker->lock);
    if (!done)
        return -EAGAIN;
    int rc = look->rc;
    *took_ns = look->took_ns;
    if (rc == 0) {
        *data = look->data;
        look->data = (struct mf_extents){0};
    }
    look_free(look);
    return rc;
}
