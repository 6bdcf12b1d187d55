/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib/gate.h"

#include <errno.h>

int mf_gate_init(struct mf_gate *gate)
{
    pthread_mutexattr_t attr;
    int r = pthread_mutexattr_init(&attr);
    if (r != 0)
        return -r;
    /* Where the kernel can't (CONFIG_FUTEX_PI off), it is an ordinary lock, and a wait may be
     * longer. */
    pthread_mutexattr_setprotocol(&attr, PTHREAD_PRIO_INHERIT);
    r = pthread_mutex_init(&gate->lanes, &attr);
    for (unsigned i = 0; r == 0 && i < MF_GATE_LANES; i++) {
        gate->lane[i].gate = gate;
        gate->lane[i].taken = false;
        r = pthread_mutex_init(&gate->lane[i].lock, &attr);
    }
    pthread_mutexattr_destroy(&attr);
    return -r;
}

void mf_gate_destroy(struct mf_gate *gate)
{
    for (unsigned i = 0; i < MF_GATE_LANES; i++)
        pthread_mutex_destroy(&gate->lane[i].lock);
    pthread_mutex_destroy(&gate->lanes);
}

struct mf_gate_lane *mf_gate_join(struct mf_gate *gate)
{
    struct mf_gate_lane *found = NULL;
    pthread_mutex_lock(&gate->lanes);
    for (unsigned i = 0; !found && i < MF_GATE_LANES; i++)
        if (!gate->lane[i].taken)
            found = &gate->lane[i];
    if (found)
        found->taken = true;
    pthread_mutex_unlock(&gate->lanes);
    return found;
}

void mf_gate_leave(struct mf_gate_lane *lane)
{
    if (!lane)
        return;
    pthread_mutex_lock(&lane->gate->lanes);
    lane->taken = false;
    pthread_mutex_unlock(&lane->gate->lanes);
}

void mf_gate_close(struct mf_gate *gate)
{
    if (!gate)
        return;
    pthread_mutex_lock(&gate->lanes);
    for (unsigned i = 0; i < MF_GATE_LANES; i++)
        if (gate->lane[i].taken)
            pthread_mutex_lock(&gate->lane[i].lock);
}

void mf_gate_open(struct mf_gate *gate)
{
    if (!gate)
        return;
    for (unsigned i = 0; i < MF_GATE_LANES; i++)
        if (gate->lane[i].taken)
            pthread_mutex_unlock(&gate->lane[i].lock);
    pthread_mutex_unlock(&gate->lanes);
}
