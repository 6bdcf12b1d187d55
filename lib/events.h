/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What a userfaultfd says: messages read, events applied to the layout, faults handed on.
 *
 * Rules (I4): read until EAGAIN; apply events before serving the faults that were read with them; a
 * fault at an address that no mapping covers is parked and tried again after the next event, for
 * read(2) hands out waiting faults before events that explain them. What there is no room for is
 * made to fault again, so nobody is ever left waiting.
 *
 * One thread reads, and it is the layout's one writer. Nothing here allocates, takes a lock or
 * makes a system call beside read(2) and UFFDIO_WAKE.
 *
 * Reading and serving are two calls because serving may read: a fill that meets EAGAIN can go on
 * only when the events are read (mf_resolver.on_event). What was read meanwhile is served
 * afterwards, in order.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "lib/gate.h"
#include "lib/layout.h"
#include "lib/region.h"

#define MF_FAULTS_ROOM 1024u /**< faults read but not served yet */
#define MF_PARKED_ROOM 256u

/** struct mf_fault - a thread waits. */
struct mf_fault {
    uint64_t addr;
    uint64_t since_ns; /**< when its message was read, mf_now_ns() */
    uint32_t context;
};

/** struct mf_events_ops - what the owner does. All are called on the reading thread. */
struct mf_events_ops {
    /** fault: somebody waits for @page of @region, which may be MF_REGION_ZEROS (@page says nothing
     * then: give zeros at the address). From mf_events_serve() only. */
    void (*fault)(void *arg, const struct mf_fault *fault, uint32_t region, uint64_t page);
    /** discard: pages whose contents the target discarded (REMOVE). The event is sent before the
     * pages go, and the target goes on once it was read. From mf_events_read(), so it must not
     * resolve (that may read events in the middle of a batch of them, and so apply them out of
     * order): who waits is woken and faults again. */
    void (*discard)(void *arg, uint32_t region, uint64_t first, uint64_t pages);
};

/** struct mf_events - zeroed, then the first group set by its owner. */
struct mf_events {
    const struct mf_events_ops *ops;
    void *arg;
    struct mf_layout *layout;
    const struct mf_region *region; /**< all regions, by index */
    const int *context_fd;          /**< the userfaultfd of each context of the layout */
    struct mf_gate *gate;           /**< where there are regions of private memory, else NULL */

    bool serving;
    unsigned fault_count, parked_count;
    struct mf_fault fault[MF_FAULTS_ROOM];
    struct mf_fault parked[MF_PARKED_ROOM];
};

/**
 * mf_events_read() - read all that a context's userfaultfd has to say: events take effect now,
 * faults are queued for mf_events_serve().
 * Return: 1 if there was an event, 0 if there was none, -E2BIG when a target maps its memory in
 * more pieces than a layout holds, or -errno of read(2).
 */
int mf_events_read(struct mf_events *events, uint32_t context);

/** mf_events_serve() - hand the queued faults on; with @event, those that were parked first. Does
 * nothing if it is already under way. */
void mf_events_serve(struct mf_events *events, bool event);

/** mf_events_parked() - are faults waiting for an event that explains them? Then call
 * mf_events_give_up_parked() within some milliseconds. */
static inline bool mf_events_parked(const struct mf_events *events)
{
    return events->parked_count > 0;
}

/** mf_events_give_up_parked() - try the parked ones once more, and let those that still nothing
 * explains fault again. */
void mf_events_give_up_parked(struct mf_events *events);
