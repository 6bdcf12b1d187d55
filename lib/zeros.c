/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib/zeros.h"

#include <errno.h>
#include <string.h>

#include "lib/util.h"

int mf_zeros_set(struct mf_zeros **zeros, uint32_t region, uint64_t region_pages, uint64_t first,
                 uint64_t pages)
{
    if (!*zeros)
        *zeros = mf_pages_alloc(sizeof(**zeros));
    if (!*zeros)
        return -ENOMEM;
    uint64_t **bits = &(*zeros)->bits[region];
    if (!*bits)
        *bits = mf_pages_alloc(mf_zeros_words(region_pages) * sizeof(**bits));
    if (!*bits)
        return -ENOMEM;
    for (uint64_t page = first; page < first + pages; page++)
        (*bits)[page / 64] |= UINT64_C(1) << page % 64;
    return 0;
}

bool mf_zeros_any(const struct mf_zeros *zeros, uint32_t region, uint64_t first, uint64_t pages)
{
    if (!zeros || !zeros->bits[region])
        return false;
    for (uint64_t page = first; page < first + pages; page++)
        if (zeros->bits[region][page / 64] >> page % 64 & 1)
            return true;
    return false;
}

int mf_zeros_copy(const struct mf_zeros *zeros, const uint64_t *region_pages, struct mf_zeros **out)
{
    *out = NULL;
    if (!zeros)
        return 0;
    struct mf_zeros *copy = mf_pages_alloc(sizeof(*copy));
    if (!copy)
        return -ENOMEM;
    for (uint32_t region = 0; region < MF_REGIONS_MAX; region++) {
        if (!zeros->bits[region])
            continue;
        const uint64_t bytes = mf_zeros_words(region_pages[region]) * sizeof(uint64_t);
        copy->bits[region] = mf_pages_alloc(bytes);
        if (!copy->bits[region]) {
            mf_zeros_free(copy);
            return -ENOMEM;
        }
        memcpy(copy->bits[region], zeros->bits[region], bytes);
    }
    *out = copy;
    return 0;
}

void mf_zeros_free(struct mf_zeros *zeros)
{
    for (uint32_t region = 0; zeros && !zeros->kept && region < MF_REGIONS_MAX; region++)
        mf_pages_free(zeros->bits[region]);
    mf_pages_free(zeros);
}
