/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib/layout_file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* Two copies: the one that `current` does not name is written, then named. */
struct mf_layout_file {
    _Atomic uint32_t current; /**< 0: none; else 1 + the index of the copy that is complete */
    struct {
        uint32_t count;
        struct mf_mapping mapping[MF_LAYOUT_MAX];
    } copy[2];
};

int mf_layout_file_create(struct mf_error *err)
{
    int fd = memfd_create("memferry-layout", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd >= 0 && ftruncate(fd, sizeof(struct mf_layout_file)) == 0)
        return fd;
    int code = errno;
    if (fd >= 0)
        close(fd);
    return mf_fail(err, code, "cannot make the file that keeps the layout: %s", strerror(code));
}

struct mf_layout_file *mf_layout_file_map(int fd, struct mf_error *err)
{
    struct stat st;
    if (fstat(fd, &st) != 0 || st.st_size != (off_t)sizeof(struct mf_layout_file)) {
        mf_fail(err, EPROTO, "the file that keeps the layout is of another version");
        return NULL;
    }
    void *at = mmap(NULL, sizeof(struct mf_layout_file), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED) {
        mf_fail(err, errno, "cannot map the file that keeps the layout: %s", strerror(errno));
        return NULL;
    }
    return at;
}

void mf_layout_file_unmap(struct mf_layout_file *file)
{
    if (file)
        munmap(file, sizeof(*file));
}

void mf_layout_file_store(struct mf_layout_file *file, const struct mf_mapping *mappings,
                          unsigned count)
{
    const uint32_t current = atomic_load_explicit(&file->current, memory_order_relaxed);
    const uint32_t next = current == 1 ? 1 : 0;
    if (count > MF_LAYOUT_MAX)
        count = MF_LAYOUT_MAX;
    memcpy(file->copy[next].mapping, mappings, count * sizeof(*mappings));
    file->copy[next].count = count;
    atomic_store_explicit(&file->current, next + 1, memory_order_release);
}

int mf_layout_file_load(const struct mf_layout_file *file, struct mf_mapping *out)
{
    const uint32_t current = atomic_load_explicit(&file->current, memory_order_acquire);
    if (current < 1 || current > 2 || file->copy[current - 1].count > MF_LAYOUT_MAX)
        return -ENODATA;
    const uint32_t count = file->copy[current - 1].count;
    memcpy(out, file->copy[current - 1].mapping, count * sizeof(*out));
    return (int)count;
}
