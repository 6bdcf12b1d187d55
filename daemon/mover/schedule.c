/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/mover/schedule.h"

#include <sched.h>
#include <sys/resource.h>

#define NICE_FIRST (-10)
#define NICE_BEHIND 0

void schedule_first(void)
{
    const struct sched_param first = {.sched_priority = 1};
    if (sched_setscheduler(0, SCHED_RR, &first) != 0)
        setpriority(PRIO_PROCESS, 0, NICE_FIRST);
}

void schedule_behind(void)
{
    const struct sched_param none = {.sched_priority = 0};
    sched_setscheduler(0, SCHED_OTHER, &none);
    setpriority(PRIO_PROCESS, 0, NICE_BEHIND);
}
