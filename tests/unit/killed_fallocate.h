/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Included before anything else where test_land compiles lib/land.c: the process can be killed
 * before any call that takes pages out of a file. */
#pragma once

#include <fcntl.h>

int killed_fallocate(int fd, int mode, off_t offset_bytes, off_t length_bytes);
#define fallocate killed_fallocate
