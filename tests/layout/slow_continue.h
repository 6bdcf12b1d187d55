/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Included before anything else where test_gate compiles lib/resolve.c: between the look at the
 * layout and the ioctl lies a while, as if the thread had been preempted there. */
#pragma once

#include "lib/uffd.h"

int slow_continue(int uffd, uint64_t start_addr, uint64_t length_bytes, uint64_t *done_bytes);
#define mf_uffd_continue slow_continue
