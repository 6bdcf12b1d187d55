/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <stdbool.h>
#include <stddef.h>

/** mf_is_zero() - are all @length_bytes zero? A multiple of 256, aligned to 64. Stops at the first
 *  non-zero block; a page of data usually costs one cache line. Pure, thread-safe. */
bool mf_is_zero(const void *at, size_t length_bytes);
