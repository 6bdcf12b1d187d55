/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib/context.h"

#include <errno.h>
#include <unistd.h>

#include "lib/util.h"

static struct mf_context *place(struct mf_contexts *contexts, uint32_t index)
{
    return &contexts->chunk[index / MF_CONTEXT_CHUNK][index % MF_CONTEXT_CHUNK];
}

int mf_contexts_add(struct mf_contexts *contexts, int uffd, int maps_fd, bool child)
{
    uint32_t index = 0;
    if (contexts->used < contexts->count) {
        while (place(contexts, index)->uffd >= 0)
            index++;
    } else {
        index = contexts->count;
        if (index == MF_CONTEXTS_MAX)
            return -EMFILE;
        struct mf_context **chunk = &contexts->chunk[index / MF_CONTEXT_CHUNK];
        if (!*chunk)
            *chunk = mf_pages_alloc(MF_CONTEXT_CHUNK * sizeof(**chunk));
        if (!*chunk)
            return -ENOMEM;
        contexts->count++;
    }
    *place(contexts, index) = (struct mf_context){
        .uffd = uffd, .maps_fd = maps_fd, .info_fd = -1, .woken = true, .child = child};
    contexts->used++;
    return (int)index;
}

void mf_contexts_drop(struct mf_contexts *contexts, uint32_t index)
{
    struct mf_context *context = mf_context_at(contexts, index);
    if (!context)
        return;
    close(context->uffd);
    if (context->maps_fd >= 0)
        close(context->maps_fd);
    if (context->info_fd >= 0)
        close(context->info_fd);
    mf_zeros_free(context->zeros);
    *context = (struct mf_context){.uffd = -1, .maps_fd = -1, .info_fd = -1};
    contexts->used--;
    while (contexts->count > 0 && place(contexts, contexts->count - 1)->uffd < 0)
        contexts->count--;
}

void mf_contexts_free(struct mf_contexts *contexts)
{
    for (uint32_t i = contexts->count; i > 0; i--)
        mf_contexts_drop(contexts, i - 1);
    for (uint32_t i = 0; i < MF_CONTEXT_CHUNKS; i++)
        mf_pages_free(contexts->chunk[i]);
    *contexts = (struct mf_contexts){0};
}
