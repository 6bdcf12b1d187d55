/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib/layout_file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "lib/util.h"

/* Two copies: the one that `current` does not name is written, then named. */
struct mf_layout_file {
    _Atomic uint32_t current; /**< 0: none; else 1 + the index of the copy that is complete */
    struct {
        uint32_t count;
        struct mf_mapping mapping[MF_LAYOUT_MAX];
    } copy[2];
    uint64_t words; /**< how many follow */
    uint64_t bits[];
};

static uint64_t words_of(const uint64_t *pages, unsigned region_count)
{
    uint64_t words = 0;
    for (unsigned i = 0; i < region_count; i++)
        words += mf_zeros_words(pages[i]);
    return words;
}

static uint64_t file_bytes(uint64_t words)
{
    return sizeof(struct mf_layout_file) + words * sizeof(uint64_t);
}

int mf_layout_file_create(const uint64_t *pages, unsigned region_count, struct mf_error *err)
{
    const uint64_t words = words_of(pages, region_count);
    int fd = memfd_create("memferry-layout", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd >= 0 && ftruncate(fd, (off_t)file_bytes(words)) == 0 &&
        pwrite(fd, &words, sizeof(words), offsetof(struct mf_layout_file, words)) ==
            (ssize_t)sizeof(words))
        return fd;
    int code = errno;
    if (fd >= 0)
        close(fd);
    return mf_fail(err, code, "cannot make the file that keeps the layout: %s", strerror(code));
}

struct mf_layout_file *mf_layout_file_map(int fd, struct mf_error *err)
{
    struct stat st;
    uint64_t words = 0;
    if (fstat(fd, &st) != 0 ||
        pread(fd, &words, sizeof(words), offsetof(struct mf_layout_file, words)) !=
            (ssize_t)sizeof(words) ||
        words > UINT32_MAX || st.st_size != (off_t)file_bytes(words)) {
        mf_fail(err, EPROTO, "the file that keeps the layout is of another version");
        return NULL;
    }
    void *at = mmap(NULL, file_bytes(words), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED) {
        mf_fail(err, errno, "cannot map the file that keeps the layout: %s", strerror(errno));
        return NULL;
    }
    return at;
}

void mf_layout_file_unmap(struct mf_layout_file *file)
{
    if (file)
        munmap(file, file_bytes(file->words));
}

struct mf_zeros *mf_layout_file_zeros(struct mf_layout_file *file, const uint64_t *pages,
                                      unsigned region_count)
{
    struct mf_zeros *zeros = mf_pages_alloc(sizeof(*zeros));
    if (!zeros || region_count > MF_REGIONS_MAX || words_of(pages, region_count) != file->words) {
        mf_pages_free(zeros);
        return NULL;
    }
    zeros->kept = true;
    uint64_t at = 0;
    for (unsigned i = 0; i < region_count; i++) {
        if (pages[i])
            zeros->bits[i] = file->bits + at;
        at += mf_zeros_words(pages[i]);
    }
    return zeros;
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
