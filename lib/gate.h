/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The gate between filling private memory and reading what the target changed.
 *
 * Bytes that are copied to a place of private memory can't be taken back from outside. So between
 * the look at where a page is mapped, and whether it was discarded, and the ioctl that fills it
 * there, no event may be taken from the userfaultfd: its reader alone would know, and the target
 * goes on as soon as it was read. While an event is unread the kernel itself refuses every fill
 * (EAGAIN), and that is the other half. (A page of a file needs no gate: what is mapped too late is
 * what the file holds, and a discarded page is punched out of it.)
 *
 * Fillers are many and pass together; the reader goes alone. A filler must not enter twice.
 * Waiting is by futex(2): a reader of real-time priority must not spin in the way of the filler it
 * waits for.
 */
#pragma once

#include <stdatomic.h>
#include <stdint.h>

/** struct mf_gate - zeroed at first. */
struct mf_gate {
    _Atomic uint32_t filling; /**< how many are inside */
    _Atomic uint32_t closed;  /**< 0 open, 1 closed, 2 closed and somebody waits */
};

/** mf_gate_enter() / mf_gate_leave() - around a look at layout and states and the fills that follow
 * from it; short, and never over a wait for an event. NULL: no gate, for memory that needs none. */
void mf_gate_enter(struct mf_gate *gate);
void mf_gate_leave(struct mf_gate *gate);

/** mf_gate_close() / mf_gate_open() - around reading events and applying them. One thread. */
void mf_gate_close(struct mf_gate *gate);
void mf_gate_open(struct mf_gate *gate);
