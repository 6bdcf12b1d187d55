/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/mover/schedule.h"

#include <sched.h>
#include <stdbool.h>
#include <sys/resource.h>

#define NICE_FIRST (-10)
#define NICE_BESIDE 0

static bool by_nice; /* real-time priority was not to be had */

void schedule_first(void)
{
    const struct sched_param first = {.sched_priority = 1};
    by_nice = sched_setscheduler(0, SCHED_RR, &first) != 0;
    /* What memferryd was started with is not for bulk threads to inherit. */
    setpriority(PRIO_PROCESS, 0, by_nice ? NICE_FIRST : NICE_BESIDE);
}

void schedule_beside(void)
{
    const struct sched_param none = {.sched_priority = 0};
    sched_setscheduler(0, SCHED_OTHER, &none);
    /* Else the nice value is what memferryd may already have set. */
    if (by_nice)
        setpriority(PRIO_PROCESS, 0, NICE_BESIDE);
}
