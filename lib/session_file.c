/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib/session_file.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "lib/util.h"

#define SESSION_FILE_MAGIC UINT64_C(0x5452524546464d45)
#define SESSION_FILE_VERSION 1u

static uint64_t padded(uint64_t bytes)
{
    return (bytes + 4095u) & ~UINT64_C(4095);
}

int mf_session_file_create(int fd, const uint64_t *pages, unsigned region_count,
                           struct mf_error *err)
{
    if (region_count < 1 || region_count > MF_REGIONS_MAX)
        return mf_fail(err, EINVAL, "a session has 1 to %u memory regions, not %u", MF_REGIONS_MAX,
                       region_count);
    cleanup_free struct mf_session_file *header = calloc(1, sizeof(*header));
    if (!header)
        return mf_fail(err, ENOMEM, "out of memory for the session file");
    header->magic = SESSION_FILE_MAGIC;
    header->version = SESSION_FILE_VERSION;
    header->region_count = region_count;
    uint64_t at = MF_SESSION_FILE_HEADER_BYTES;
    for (unsigned i = 0; i < region_count; i++) {
        header->region[i].pages = pages[i];
        header->region[i].offset_bytes = at;
        at += padded(pages[i]);
    }
    if (ftruncate(fd, (off_t)at) != 0)
        return mf_fail(err, errno, "cannot make the session file %llu bytes long: %s",
                       (unsigned long long)at, strerror(errno));
    int r = mf_write_all(fd, header, sizeof(*header));
    if (r < 0)
        return mf_fail(err, -r, "cannot write the session file: %s", strerror(-r));
    /* memferryd reads its mapping of this file. A mover in an attacker's hands must not be able to
     * shorten it under memferryd (SIGBUS). A file that can't be sealed is one that no other program
     * gets. */
    if (fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0 && errno != EPERM &&
        errno != EINVAL)
        return mf_fail(err, errno, "cannot seal the session file: %s", strerror(errno));
    return 0;
}

int mf_session_file_map(int fd, struct mf_session_view *out, struct mf_error *err)
{
    struct stat st;
    if (fstat(fd, &st) != 0)
        return mf_fail(err, errno, "cannot look at the session file: %s", strerror(errno));
    uint64_t size = (uint64_t)st.st_size;
    if (size < MF_SESSION_FILE_HEADER_BYTES)
        return mf_fail(err, EPROTO, "the session file is too short");
    void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED)
        return mf_fail(err, errno, "cannot map the session file: %s", strerror(errno));
    *out = (struct mf_session_view){.file = at, .mapped_bytes = size};
    struct mf_session_file *file = out->file;
    bool good = file->magic == SESSION_FILE_MAGIC && file->version == SESSION_FILE_VERSION &&
                file->region_count >= 1 && file->region_count <= MF_REGIONS_MAX;
    /* There is one layout for given regions: each follows the one before, the file ends with the
     * last. */
    uint64_t at_bytes = MF_SESSION_FILE_HEADER_BYTES;
    for (unsigned i = 0; good && i < file->region_count; i++) {
        uint64_t offset = file->region[i].offset_bytes, pages = file->region[i].pages;
        good = offset == at_bytes && offset <= size && pages <= size - offset;
        at_bytes += padded(pages);
        if (good)
            out->pages[i] = (struct mf_pages){
                .state = (_Atomic uint8_t *)at + offset,
                .count = pages,
            };
    }
    if (!good || at_bytes != size) {
        mf_session_file_unmap(out);
        return mf_fail(err, EPROTO, "the session file is damaged or from another version");
    }
    return 0;
}

void mf_session_file_unmap(struct mf_session_view *view)
{
    if (view->file)
        munmap(view->file, view->mapped_bytes);
    *view = (struct mf_session_view){0};
}
