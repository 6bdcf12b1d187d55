/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/mover/schedule.h"

#include <sched.h>
#include <stdbool.h>
#include <sys/resource.h>

#define NICE_FIRST (-10)
#define NICE_BESIDE 0
#define NICE_BEHIND 5

static bool may_come_back; /* from behind: a process without privileges needs RLIMIT_NICE for it */

void schedule_first(void)
{
    const struct sched_param first = {.sched_priority = 1};
    const struct rlimit beside = {20 - NICE_BESIDE, 20 - NICE_BESIDE}; /* as setrlimit(2) counts */
    struct rlimit limit;
    if (sched_setscheduler(0, SCHED_RR, &first) != 0)
        setpriority(PRIO_PROCESS, 0, NICE_FIRST);
    may_come_back = (getrlimit(RLIMIT_NICE, &limit) == 0 && limit.rlim_cur >= beside.rlim_cur) ||
                    setrlimit(RLIMIT_NICE, &beside) == 0;
}

void schedule_beside(void)
{
    const struct sched_param none = {.sched_priority = 0};
    sched_setscheduler(0, SCHED_OTHER, &none);
    setpriority(PRIO_PROCESS, 0, NICE_BESIDE);
}

void schedule_behind(void)
{
    schedule_beside();
    if (may_come_back)
        setpriority(PRIO_PROCESS, 0, NICE_BEHIND);
}
