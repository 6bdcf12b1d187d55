/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The layout of the structs and the numbers that programs were compiled with. A failure here breaks
 * them: fields are only ever added at the end. */
#include <stddef.h>

#include "memferry.h"

#define AT(type, field, offset)                                                                    \
    _Static_assert(offsetof(struct type, field) == (offset), #type "." #field " has moved")
#define SIZE(type, bytes) _Static_assert(sizeof(struct type) >= (bytes), #type " has shrunk")
#define IS(name, value) _Static_assert((name) == (value), #name " has changed")

#if __SIZEOF_POINTER__ == 8
AT(memferry_change, kind, 8);
AT(memferry_change, reason, 12);
AT(memferry_change, context, 16);
AT(memferry_change, new_context, 20);
AT(memferry_change, start_addr, 24);
AT(memferry_change, end_addr, 32);
AT(memferry_change, to_addr, 40);
AT(memferry_change, time_ns, 48);
AT(memferry_change, tid, 56);
AT(memferry_change, child_pid, 60);
SIZE(memferry_change, 64);
AT(memferry_failure, region, 8);
AT(memferry_failure, error, 12);
AT(memferry_failure, first_page, 16);
AT(memferry_failure, pages, 24);
SIZE(memferry_failure, 32);
AT(memferry_server_options, arg, 8);
AT(memferry_server_options, on_change, 16);
AT(memferry_server_options, on_failure, 24);
AT(memferry_server_options, around_pages, 32);
AT(memferry_server_options, spin_us, 36);
AT(memferry_server_options, flags, 40);
SIZE(memferry_server_options, 48);
AT(memferry_region, memory, 8);
AT(memferry_region, page_bytes, 12);
AT(memferry_region, length_bytes, 16);
AT(memferry_region, fd, 24);
AT(memferry_region, states_fd, 28);
AT(memferry_region, states_in_file, 32);
AT(memferry_region, flags, 36);
AT(memferry_region, states_offset_bytes, 40);
SIZE(memferry_region, 48);
AT(memferry_mapping, context, 8);
AT(memferry_mapping, region, 12);
AT(memferry_mapping, start_addr, 16);
AT(memferry_mapping, length_bytes, 24);
AT(memferry_mapping, offset_bytes, 32);
AT(memferry_mapping, flags, 40);
SIZE(memferry_mapping, 48);
AT(memferry_want, region, 8);
AT(memferry_want, page_bytes, 12);
AT(memferry_want, first_page, 16);
AT(memferry_want, pages, 24);
AT(memferry_want, bytes, 32);
SIZE(memferry_want, 40);
AT(memferry_provider, arg, 8);
AT(memferry_provider, want, 16);
AT(memferry_provider, close, 24);
SIZE(memferry_provider, 32);
AT(memferry_file, fd, 8);
AT(memferry_file, offset_bytes, 16);
AT(memferry_file, length_bytes, 24);
SIZE(memferry_file, 32);
AT(memferry_figures, faults, 8);
AT(memferry_figures, events, 56);
SIZE(memferry_figures, 64);
#endif

IS(MEMFERRY_UNMAP, 1);
IS(MEMFERRY_FORK, 4);
IS(MEMFERRY_EXIT, 5);
IS(MEMFERRY_UNKNOWN, 0);
IS(MEMFERRY_BY_FORK, 6);
IS(MEMFERRY_AGAIN, 0);
IS(MEMFERRY_POISON, 2);
IS(MEMFERRY_FOLLOW_FORKS, 1);
IS(MEMFERRY_REMOVE_DISCARDS, 2);
IS(MEMFERRY_USER_FAULTS, 4);
IS(MEMFERRY_END_ZEROS, 2);
IS(MEMFERRY_SHMEM, 1);
IS(MEMFERRY_ANONYMOUS, 3);
IS(MEMFERRY_REGION_TAKE_OVER, 1);
IS(MEMFERRY_MAPPING_REGISTERED, 1);
IS(MEMFERRY_DATA, 0);
IS(MEMFERRY_LATER, 3);
IS(MEMFERRY_PAGE_MISSING, 0);
IS(MEMFERRY_PAGE_DISCARDED, 3);

int main(void)
{
    return 0;
}
