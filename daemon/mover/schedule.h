/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Who goes first on a host without a core to spare. A faulting guest stands still for as long as it
 * takes to wake the fault thread here and the urgent thread there; everything else can wait. So
 * these, and the main thread (whose latency is in the blackout), run with real-time priority 1:
 * they sleep nearly always and never compute for long. Bulk threads step back behind the guests'
 * vCPUs instead: what they take of a core while the guest works is work that it loses, and where
 * the host has time to spare they get all of it in any case. Not far behind: a host that has too
 * little of it is one that VMs are moved away from, and they must get away. (This is among the
 * processes of one control group. Between the unit and the VMs' groups their CPUWeight= decides.)
 */
#pragma once

/** schedule_first() - main thread, before privileges are dropped; later threads inherit it. Without
 * the permission a better nice value is tried, and without that things stay as they are. */
void schedule_first(void);

/** schedule_behind() - a bulk thread steps back. */
void schedule_behind(void);
