/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The gate between those who resolve pages and the one who reads a userfaultfd's events.
 *
 * A thread that resolves looks an address up in the layout and then names it to the kernel. The
 * kernel refuses every fill while an event is unread, from before the change that the event tells
 * until after its reading (doc/kernel.md). So what was looked up stays true until the ioctl has
 * ended, provided that nobody reads an event in between: then the address might have been unmapped,
 * its event read, and another page of another region have come to lie there by the time of the
 * ioctl, which would hand out a page that nobody has confirmed.
 *
 * Hence: look-up and ioctl are made inside the gate; events are read, and the layout and the
 * contexts changed, only while the gate is closed and nobody is inside.
 *
 * Each resolving thread has a lane of its own, a lock that nobody else touches except to close the
 * gate: entering costs one compare-and-swap in a cache line of that thread. The locks inherit
 * priority: the reader runs with real-time priority and must not wait for a resolving thread that
 * was preempted inside by something else; it is run instead until it comes out.
 *
 * The reader needs no lane: it resolves while it does not read. Neither does a single thread.
 */
#pragma once

#include <pthread.h>
#include <stdbool.h>

#define MF_GATE_LANES 32u

/** struct mf_gate_lane - of one thread; a cache line of its own. */
struct mf_gate_lane {
    _Alignas(64) pthread_mutex_t lock;
    struct mf_gate *gate;
    bool taken; /**< guarded by the gate's `lanes` */
};

struct mf_gate {
    pthread_mutex_t lanes; /**< held while the gate is closed and while lanes come and go */
    struct mf_gate_lane lane[MF_GATE_LANES];
};

/** mf_gate_init() - open, without lanes. Return: 0 or -errno. */
int mf_gate_init(struct mf_gate *gate);
/** mf_gate_destroy() - nobody uses it any more. */
void mf_gate_destroy(struct mf_gate *gate);

/** mf_gate_join() - a lane for the calling thread, until mf_gate_leave(). Waits while the gate is
 * closed. Return: NULL if all are taken. */
struct mf_gate_lane *mf_gate_join(struct mf_gate *gate);
void mf_gate_leave(struct mf_gate_lane *lane);

/** mf_gate_enter(), mf_gate_exit() - waits while the gate is closed. Between the two, nothing that
 * waits for another thread. @lane: NULL for the thread that reads events. */
static inline void mf_gate_enter(struct mf_gate_lane *lane)
{
    if (lane)
        pthread_mutex_lock(&lane->lock);
}
static inline void mf_gate_exit(struct mf_gate_lane *lane)
{
    if (lane)
        pthread_mutex_unlock(&lane->lock);
}

/** mf_gate_close() - nobody is inside when it returns, and nobody gets in until mf_gate_open().
 * One thread at a time. @gate: NULL where nobody else resolves. */
void mf_gate_close(struct mf_gate *gate);
void mf_gate_open(struct mf_gate *gate);
