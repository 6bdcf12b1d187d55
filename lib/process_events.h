/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Forks and execs, told by the kernel as they happen: the process events connector
 * (linux/cn_proc.h). Unlike /proc it also tells of processes that are gone a moment later. Needs
 * CAP_NET_ADMIN, the initial namespaces and a kernel with CONFIG_PROC_EVENTS: a help where it is to
 * be had. Thread-safe for distinct descriptors.
 */
#pragma once

#include <stdint.h>
#include <sys/types.h>

/** mf_forks_listen() - from now on, forks of all processes are queued. Closing ends it, and should
 * be soon: every fork on the host costs a little more meanwhile. Return: a descriptor (the
 * caller's), or -errno (-EPERM, -ECONNREFUSED, …: not to be had here). */
int mf_forks_listen(void);

/** mf_forks_child() - the first process that thread @tid has forked since mf_forks_listen(),
 * whether it still exists or not. Does not wait, and forgets what came before it. Return: its id,
 * or 0 if there is none (yet). */
pid_t mf_forks_child(int fd, pid_t tid);

/** mf_execs_listen() - from now on, execs of all processes are queued. As mf_forks_listen(), but
 * may stay open: execs are rarer. Readable when there is one. */
int mf_execs_listen(void);

/** mf_execs_next() - the next one, without waiting. @when_ns: mf_now_ns() at its time. If too many
 * came at once some are lost. Return: the process, or 0 if there is none. */
pid_t mf_execs_next(int fd, uint64_t *when_ns);
