/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A session file as a crash or an attacker's mover may have left it. The input is the header; the
 * first two bytes choose the file's size. Whatever is mapped can be walked from end to end.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "lib/session_file.h"
#include "lib/util.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t length_bytes);

static void nothing(void *arg, uint64_t page)
{
    (void)arg;
    (void)page;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t length_bytes)
{
    if (length_bytes < 2)
        return 0;
    cleanup_close int fd = memfd_create("fuzz-session", MFD_CLOEXEC);
    struct mf_session_view view;
    struct mf_error err = {.text = ""};
    off_t size = (off_t)(data[0] | data[1] << 8) * 256;
    if (fd < 0 || mf_write_all(fd, data + 2, length_bytes - 2) < 0 || ftruncate(fd, size) != 0)
        abort();
    if (mf_session_file_map(fd, &view, &err) < 0) {
        if (!err.text[0])
            abort();
        return 0;
    }
    const uint8_t *begin = (const uint8_t *)view.file, *end = begin + view.mapped_bytes;
    const uint8_t *before = begin + MF_SESSION_FILE_HEADER_BYTES;
    for (unsigned i = 0; i < view.file->region_count; i++) {
        const struct mf_pages *pages = &view.pages[i];
        const uint8_t *first = (const uint8_t *)pages->state;
        if (first < before || pages->count > (uint64_t)(end - first))
            abort();
        before = first + pages->count; /* no byte belongs to two regions */
        (void)mf_page_restart(pages, nothing, NULL);
        (void)mf_page_confirm_empty(pages, 0, pages->count, NULL, NULL);
        uint64_t at = 0;
        while (mf_page_next_run(pages, MF_PAGE_CONFIRMED, &at) > 0)
            at++;
    }
    struct mf_quantiles quantiles;
    mf_histogram_read(&view.file->figures.faults, &quantiles);
    mf_session_file_unmap(&view);
    return 0;
}
