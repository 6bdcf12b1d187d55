/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Who goes first on a host without a core to spare. A faulting guest stands still for as long as it
 * takes to wake the fault thread here and the urgent thread there; everything else can wait. So
 * these, and the main thread (whose latency is in the blackout), run with real-time priority 1:
 * they sleep nearly always and never compute for long. Bulk threads are ordinary ones, and while
 * the guest runs at the source memferryd puts them behind its vCPUs (mover_step_behind()): what
 * they take of a core then is work that it loses, and where the host has time to spare they get all
 * of it in any case. After RELEASE it lets them come back: the guest waits for what they bring, and
 * one that was put off with a page half landed would keep it waiting.
 */
#pragma once

/** schedule_first() - main thread, before privileges are dropped; later threads inherit it. Without
 * the permission a better nice value is tried, and without that things stay as they are. */
void schedule_first(void);

/** schedule_beside() - a bulk thread becomes an ordinary one, beside the guests' vCPUs. With the
 * nice value that it has by then, which memferryd may have set. */
void schedule_beside(void);
