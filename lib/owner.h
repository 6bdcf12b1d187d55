/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Which process a userfaultfd belongs to. The kernel does not say so anywhere; but what is
 * registered with it shows in the process's pagemap (PAGEMAP_SCAN, Linux 6.7), and so does it if it
 * no longer is.
 */
#pragma once

#include <stdint.h>
#include <sys/types.h>

/**
 * mf_owner_find() - look through all processes for the one.
 * @uffd: with WP_ASYNC.
 * @start_addr, @end_addr: a whole mapping that is registered with it for WP; it is unregistered for
 *        some microseconds, and registered again. An event on just this range can be missed
 *        meanwhile, so it should be one that is not likely to change: the program's own code.
 * Needs ptrace access to the process. Takes about 10 µs a process that runs on this host. Return: a
 * process id, or 0 if there is none or it can't be told (several processes with one address space).
 */
pid_t mf_owner_find(int uffd, uint64_t start_addr, uint64_t end_addr);
