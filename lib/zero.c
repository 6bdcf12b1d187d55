/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib/zero.h"

#include <stdint.h>

/* GCC's and clang's vector types: eight words at a time, compiled to what the machine has. */
typedef uint64_t block __attribute__((vector_size(64), may_alias));

static bool block_is_zero(block b)
{
    return (b[0] | b[1] | b[2] | b[3] | b[4] | b[5] | b[6] | b[7]) == 0;
}

bool mf_is_zero(const void *at, size_t length_bytes)
{
    const block *from = at;
    const block *end = (const block *)((const char *)at + length_bytes);
    if (!block_is_zero(*from))
        return false;
    for (; from < end; from += 4)
        if (!block_is_zero(from[0] | from[1] | from[2] | from[3]))
            return false;
    return true;
}
