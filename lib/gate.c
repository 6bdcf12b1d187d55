/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib/gate.h"

#include <linux/futex.h>
#include <stddef.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { OPEN, CLOSED, AWAITED };

static void wait_while(_Atomic uint32_t *word, uint32_t value)
{
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

static void wake_all(_Atomic uint32_t *word)
{
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
}

/*
 * All orders are sequentially consistent: a filler counts itself and then looks whether the gate is
 * closed, the reader closes it and then looks whether anybody is counted; one of the two sees the
 * other.
 */
void mf_gate_enter(struct mf_gate *gate)
{
    if (!gate)
        return;
    for (;;) {
        atomic_fetch_add(&gate->filling, 1);
        if (atomic_load(&gate->closed) == OPEN)
            return;
        mf_gate_leave(gate);
        uint32_t closed = CLOSED;
        if (atomic_compare_exchange_strong(&gate->closed, &closed, AWAITED) || closed == AWAITED)
            wait_while(&gate->closed, AWAITED);
    }
}

void mf_gate_leave(struct mf_gate *gate)
{
    if (gate && atomic_fetch_sub(&gate->filling, 1) == 1 && atomic_load(&gate->closed) != OPEN)
        wake_all(&gate->filling);
}

void mf_gate_close(struct mf_gate *gate)
{
    if (!gate)
        return;
    atomic_store(&gate->closed, CLOSED);
    for (uint32_t filling; (filling = atomic_load(&gate->filling)) != 0;)
        wait_while(&gate->filling, filling);
}

void mf_gate_open(struct mf_gate *gate)
{
    if (gate && atomic_exchange(&gate->closed, OPEN) == AWAITED)
        wake_all(&gate->closed);
}
