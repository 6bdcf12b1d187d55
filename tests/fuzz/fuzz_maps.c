/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A line of /proc/PID/maps. A target chooses the names of the files that it maps, and so a part of
 * it. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "lib/target.h"
#include "lib/util.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t length_bytes);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t length_bytes)
{
    cleanup_free char *line = malloc(length_bytes + 1);
    struct mf_vma vma;
    if (!line)
        return 0;
    memcpy(line, data, length_bytes);
    line[length_bytes] = '\0';
    if (mf_vma_parse(line, &vma) < 0)
        return 0;
    if (vma.start_addr >= vma.end_addr || !memchr(vma.path, '\0', sizeof(vma.path)) ||
        strchr(vma.path, '\n'))
        abort();
    return 0;
}
