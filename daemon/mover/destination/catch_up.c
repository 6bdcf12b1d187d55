/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A successor learns where private memory lies: what the predecessor wrote down, the events that
 * wait to be read, and the one that the predecessor may have read and not written down.
 *
 * Until it knows, nothing private is copied and no zeros are given (layout.unsettled): who waits,
 * and who lands pages, waits a few milliseconds more.
 */
#include "daemon/mover/destination/destination.h"

#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "lib/log.h"
#include "lib/reconcile.h"
#include "lib/uffd.h"
#include "lib/util.h"

#define TRIES 200u
/* No program can be mapped there, so nothing is ever watched there. */
#define NOWHERE (UINT64_C(1) << 62)

static unsigned private_pieces(const struct mover *mover, struct mf_mapping *out)
{
    unsigned count = mf_layout_get(&mover->layout, out, MF_LAYOUT_MAX), kept = 0;
    for (unsigned i = 0; i < count; i++)
        if (out[i].context == 0 && (out[i].region == MF_REGION_ZEROS ||
                                    mover->region[out[i].region].kind == MF_MEMORY_PRIVATE))
            out[kept++] = out[i];
    return kept;
}

/* The first pages of @piece that none of @now maps, as a piece that lies nowhere. (More than one
 * event is not missing, so there is not more than one such part.) */
static bool lost_part(const struct mf_mapping *piece, const struct mf_mapping *now, unsigned count,
                      struct mf_mapping *out)
{
    uint64_t at = piece->offset_bytes, end = at + piece->length_bytes;
    for (bool moved = true; moved && at < end;) {
        moved = false;
        for (unsigned i = 0; i < count; i++) {
            const uint64_t from = now[i].offset_bytes, to = from + now[i].length_bytes;
            if (now[i].region == piece->region && from <= at && at < to) {
                at = to;
                moved = true;
            }
        }
    }
    for (unsigned i = 0; i < count; i++)
        if (now[i].region == piece->region && now[i].offset_bytes > at && now[i].offset_bytes < end)
            end = now[i].offset_bytes;
    if (at >= end)
        return false;
    *out = *piece;
    out->offset_bytes = at;
    out->length_bytes = end - at;
    out->start_addr = NOWHERE + at;
    return true;
}

/* Read all there is, until nobody is in the middle of a change. */
static bool read_events(const struct mover *mover, void (*read)(void *arg, uint32_t context),
                        void *arg)
{
    const int uffd = mf_context_uffd(&mover->contexts, 0);
    for (unsigned i = 0; i < TRIES; i++) {
        read(arg, 0);
        if (mf_uffd_event_pending(uffd) <= 0)
            return true;
        nanosleep(&(struct timespec){.tv_nsec = 200000}, NULL);
    }
    return false;
}

static void put_back(struct mover *mover, const struct mf_mapping *pieces, unsigned count)
{
    static struct mf_mapping all[MF_LAYOUT_MAX];
    unsigned had = mf_layout_get(&mover->layout, all, MF_LAYOUT_MAX), kept = 0;
    for (unsigned i = 0; i < had; i++)
        if (all[i].context != 0 || (all[i].region != MF_REGION_ZEROS &&
                                    mover->region[all[i].region].kind != MF_MEMORY_PRIVATE))
            all[kept++] = all[i];
    for (unsigned i = 0; i < count && kept < MF_LAYOUT_MAX; i++)
        all[kept++] = pieces[i];
    mf_gate_close(&mover->gate);
    mf_layout_set(&mover->layout, all, kept);
    mf_gate_open(&mover->gate);
}

void catch_up(struct mover *mover, void (*read)(void *arg, uint32_t context), void *arg)
{
    static struct mf_mapping before[MF_LAYOUT_MAX], now[MF_LAYOUT_MAX];
    cleanup_free struct mf_span *watched = NULL;
    unsigned before_count, now_count = 0, watched_count = 0;
    if (mover->smaps_fd < 0)
        return;
    before_count = private_pieces(mover, before);
    bool known = false;
    for (unsigned i = 0; !known && i < TRIES; i++) {
        free(watched);
        watched = NULL;
        known = read_events(mover, read, arg) &&
                mf_served_spans(mover->smaps_fd, mf_served_private, NULL, &watched,
                                &watched_count) == 0 &&
                mf_uffd_event_pending(mf_context_uffd(&mover->contexts, 0)) <= 0;
    }
    now_count = private_pieces(mover, now);
    const unsigned known_count = now_count;
    for (unsigned i = 0; i < before_count && now_count < MF_LAYOUT_MAX; i++)
        if (before[i].region != MF_REGION_ZEROS &&
            lost_part(&before[i], now, known_count, &now[now_count]))
            now_count++;
    unsigned unclear =
        known ? mf_reconcile(now, &now_count, MF_LAYOUT_MAX, watched, watched_count) : 1;
    if (unclear > 0) {
        mf_log(MF_LOG_ERR,
               "%s: its private memory was being moved when memferry-mover died, and it can't be "
               "told to where: who touches that waits until the session ends",
               mover->name);
        mf_layout_lose(&mover->layout);
    }
    if (known)
        put_back(mover, now, now_count);
    close(mover->smaps_fd);
    mover->smaps_fd = -1;
    mf_layout_settle(&mover->layout);
    mover_keep_layout(mover);
}
