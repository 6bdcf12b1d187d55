/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The urgent thread: answers REQUESTs. The page that is waited for goes out first and alone; when
 * nothing more is asked for, the neighbours of what was asked last follow, the newest first.
 *
 * After precopy most neighbours are current, and a word lets the guest have many of them. Bytes are
 * sent only where the guest was seen to go from page to page: for one that jumps about they would
 * be in the way of the next fault, and the sweep brings them for half the price.
 */
#include "daemon/mover/mover.h"
#include "daemon/mover/ring.h"
#include "daemon/mover/source/sender.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/uio.h>

#define REQUESTS_ROOM 512u
#define NEIGHBOURS 16u        /**< pages in the aligned window around a fault */
#define NEIGHBOURS_COPIED 64u /**< the same after precopy: most need no bytes, only a word */
#define RECENT 32u            /**< windows remembered */
#define ASKED 8u              /**< windows of the last requests */

struct recent {
    uint32_t region;
    bool bytes; /**< not only words */
    uint64_t first;
};

struct urgent {
    struct sender sender; /* first: it has the strictest alignment */
    struct mover *mover;
    struct io_uring ring;
    int fd;
    uint8_t in[REQUESTS_ROOM * MF_FRAME_HEADER_BYTES];
    size_t in_have;
    struct recent recent[RECENT]; /**< a stack that forgets its bottom */
    unsigned recent_count;
    struct recent asked[ASKED]; /**< a ring */
    unsigned asked_at;
};

static uint64_t window_pages(const struct urgent *u)
{
    return u->mover->pagemap_fd >= 0 ? NEIGHBOURS_COPIED : NEIGHBOURS;
}

/* Was something in this window or beside it asked for a moment ago? */
static bool goes_on(struct urgent *u, uint32_t region, uint64_t first, uint64_t pages)
{
    bool found = false;
    for (unsigned i = 0; i < ASKED && !found; i++)
        found = u->asked[i].bytes && u->asked[i].region == region &&
                first + pages >= u->asked[i].first && u->asked[i].first + pages >= first;
    u->asked[u->asked_at++ % ASKED] = (struct recent){region, true, first};
    return found;
}

static void remember(struct urgent *u, uint32_t region, uint64_t page)
{
    /* The neighbours of a huge page are the sweep's, and so are all while the bandwidth is limited:
     * nobody waits for them yet. */
    if (u->mover->region[region].page_bytes > 65536 ||
        atomic_load_explicit(&u->mover->sweep.pace_bits_s, memory_order_relaxed))
        return;
    const uint64_t pages = window_pages(u), first = page - page % pages;
    const bool bytes = goes_on(u, region, first, pages) || u->mover->pagemap_fd < 0;
    for (unsigned i = 0; i < u->recent_count; i++)
        if (u->recent[i].region == region && u->recent[i].first == first) {
            u->recent[i].bytes |= bytes;
            return;
        }
    if (u->recent_count == RECENT) {
        memmove(&u->recent[0], &u->recent[1], sizeof(u->recent[0]) * (RECENT - 1));
        u->recent_count--;
    }
    u->recent[u->recent_count++] = (struct recent){region, bytes, first};
}

static int answer(struct urgent *u, const struct mf_frame *request)
{
    struct mover *mover = u->mover;
    for (uint64_t i = 0; i < request->pages; i++) {
        int r = sender_pages(&u->sender, request->region, request->first_page + i, 1, true);
        if (r < 0)
            return r;
    }
    int r = sender_flush(&u->sender);
    if (r < 0)
        return r;
    sweep_set_pivot(mover, request->region, request->first_page);
    atomic_fetch_add_explicit(&mover->figures->faults_asked, request->pages, memory_order_relaxed);
    remember(u, request->region, request->first_page);
    return 0;
}

static int answer_all(struct urgent *u)
{
    size_t at = 0;
    int r = 0;
    while (r == 0 && u->in_have - at >= MF_FRAME_HEADER_BYTES) {
        struct mf_frame request;
        const char *why = NULL;
        if (mf_frame_decode(u->in + at, &request, &why) < 0 ||
            mf_frame_check(&request, u->mover->frame_region, u->mover->region_count, false, &why) <
                0) {
            link_fail(u->mover, "the destination sent %s", why);
            return -EPROTO;
        }
        if (request.pages > REQUESTS_ROOM) {
            link_fail(u->mover, "the destination asked for too many pages in one request");
            return -EPROTO;
        }
        at += MF_FRAME_HEADER_BYTES;
        r = answer(u, &request);
    }
    u->in_have -= at;
    memmove(u->in, u->in + at, u->in_have);
    return r;
}

static int send_neighbours(struct urgent *u)
{
    struct recent window = u->recent[--u->recent_count];
    const struct mf_region *region = &u->mover->region[window.region];
    uint64_t pages = window_pages(u);
    if (pages > region->pages - window.first)
        pages = region->pages - window.first;
    int r = window.bytes ? sender_pages(&u->sender, window.region, window.first, pages, false)
                         : sender_confirm(&u->sender, window.region, window.first, pages);
    return r < 0 ? r : sender_flush(&u->sender);
}

void *source_urgent_main(void *argument)
{
    struct mover *mover = argument;
    struct urgent *u = aligned_alloc(64, sizeof(*u));
    prctl(PR_SET_NAME, "urgent-send");
    int r = u ? ring_open(&u->ring, 8) : -ENOMEM;
    if (r < 0)
        mover_fatal("cannot use io_uring: %s (sysctl kernel.io_uring_disabled?)", strerror(-r));
    u->mover = mover;
    u->in_have = u->recent_count = u->asked_at = 0;
    memset(u->asked, 0, sizeof(u->asked));
    u->fd = mover->link.urgent_fd;
    sender_init(&u->sender, mover, &u->ring, u->fd);
    const char *what = NULL;
    /* While the guest still runs here no answer would stay true. Requests wait in the socket. */
    sweep_wait_frozen(mover);
    while (!atomic_load_explicit(&mover->link.stop, memory_order_relaxed)) {
        ssize_t n;
        if (u->recent_count > 0)
            /* Not to be waited for: there is something else to do. */
            n = recv(u->fd, u->in + u->in_have, sizeof(u->in) - u->in_have, MSG_DONTWAIT);
        else
            n = ring_recv(&u->ring, u->fd, u->in + u->in_have, sizeof(u->in) - u->in_have);
        if (n < 0 && u->recent_count > 0)
            n = errno == EAGAIN || errno == EINTR ? -EAGAIN : -errno;
        if (n == -EAGAIN) {
            if ((r = send_neighbours(u)) < 0)
                break;
            continue;
        }
        if (n <= 0) {
            what = n < 0 ? strerror((int)-n) : "the destination closed it";
            break;
        }
        u->in_have += (size_t)n;
        atomic_store_explicit(&mover->sweep.urgent_busy, 1, memory_order_relaxed);
        r = answer_all(u);
        atomic_store_explicit(&mover->sweep.urgent_busy, 0, memory_order_relaxed);
        if (r < 0)
            break;
    }
    if (r < 0)
        what = strerror(-r);
    if (what && !atomic_load(&mover->link.stop))
        link_fail(mover, "the urgent connection to the destination broke: %s", what);
    ring_close(&u->ring);
    free(u);
    return NULL;
}
