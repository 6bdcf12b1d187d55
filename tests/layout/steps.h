/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Included before anything else where test_learn compiles lib/events.c: what happens between the
 * looks at the maps and the registrations is the test's to say. */
#pragma once

#include "lib/uffd.h"
#include "lib/vma.h"

int step_find(int maps_fd, uint64_t addr, struct mf_vma *out);
int step_register(int uffd, uint64_t start_addr, uint64_t length_bytes, struct mf_error *err);
#define mf_vma_find step_find
#define mf_uffd_register step_register
