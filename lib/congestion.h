/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Which TCP congestion control the connections between two hosts use.
 *
 * BBR is made for long and lossy ways. It paces: the kernel sets a timer for every segment that it
 * sends (unless the interface's queue is fq), and on a fast, short link these timers take more of
 * the processor than copying the bytes does (doc/performance.md has figures). The memory of a VM
 * is moved at whatever speed the processors allow, beside guests that need them, so on a short way
 * the mode "auto" takes an algorithm in BBR's place that goes by acknowledgements alone.
 */
#pragma once

#include "lib/error.h"

#define MF_CONGESTION_MAX 16u /**< longest name and its NUL: the kernel's TCP_CA_NAME_MAX */
#define MF_CONGESTION_AUTO "auto"
#define MF_CONGESTION_SYSTEM "system"

/**
 * mf_congestion_check() - is this "auto", "system", or an algorithm that this process may use?
 *
 * Return: 0, or -EINVAL with a clause that says what would be right.
 */
int mf_congestion_check(const char *name, struct mf_error *err);

/**
 * mf_congestion_apply() - have a connection use what the setting says.
 * @fd: a TCP socket; for "auto" a connected one that has carried something both ways, because its
 *      round-trip time decides.
 * @name: as mf_congestion_check() accepts it.
 * @used: what it uses from now on. Empty where the kernel does not say.
 *
 * Where it is not possible the connection stays as it is: it works, if slower.
 *
 * Return: 1 if the algorithm was changed, 0 if not. See tcp(7), TCP_CONGESTION.
 */
int mf_congestion_apply(int fd, const char *name, char used[MF_CONGESTION_MAX]);
