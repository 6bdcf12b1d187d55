/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Taking over what memferryd hands a new mover. */
#include "daemon/mover/mover.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "lib/log.h"
#include "lib/uffd.h"
#include "lib/util.h"

static void take_region(struct mover *mover, const struct mf_ipc *message, int fd)
{
    if (mover->region_count == MF_REGIONS_MAX || fd < 0 || message->region.page_bytes == 0)
        mover_fatal("memferryd handed over a region that can't be used");
    struct mf_region *region = &mover->region[mover->region_count];
    memcpy(region->name, message->region.name, sizeof(region->name));
    region->name[sizeof(region->name) - 1] = '\0';
    region->size_bytes = message->region.size_bytes;
    region->page_bytes = message->region.page_bytes;
    region->pages = region->size_bytes / region->page_bytes;
    region->kind = (enum mf_memory_kind)message->region.kind;
    region->fd = fd;
    region->device = (dev_t)message->region.device;
    region->inode = (ino_t)message->region.inode;
    mover->frame_region[mover->region_count++] =
        (struct mf_frame_region){.pages = region->pages, .page_bytes = region->page_bytes};
    if (region->kind == MF_MEMORY_PRIVATE) {
        mover->private_memory = true;
        mover->layout.keep |= UINT64_C(1) << (mover->region_count - 1);
        if (mover->role == MF_SOURCE)
            return; /* read, not mapped */
    }
    int prot = mover->role == MF_SOURCE ? PROT_READ : PROT_READ | PROT_WRITE;
    void *at = mmap(NULL, region->size_bytes, prot, MAP_SHARED | MAP_NORESERVE, fd, 0);
    if (at == MAP_FAILED)
        mover_fatal("cannot map the memory %s of %s: %s", region->name, mover->name,
                    strerror(errno));
    region->map = at;
}

static void punch_page(void *arg, uint64_t page)
{
    const struct mf_region *region = arg;
    if (fallocate(region->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                  (off_t)(page * region->page_bytes), region->page_bytes) != 0)
        mover_fatal("cannot punch a page out of %s: %s", region->name, strerror(errno));
}

/*
 * The first mover of a destination empties the RAM files: every mapping is registered, so from then
 * on every touch of the guest is a MISSING fault, also of what a prealloc or an earlier touch had
 * mapped (I3). Here and not in memferryd because gigabytes take seconds.
 */
static void empty_files(const struct mover *mover)
{
    for (unsigned i = 0; i < mover->region_count; i++)
        if (fallocate(mover->region[i].fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0,
                      (off_t)mover->region[i].size_bytes) != 0)
            mover_fatal("cannot empty the memory %s of %s: %s", mover->region[i].name, mover->name,
                        strerror(errno));
}

/* What a predecessor left. Nobody else touches the states yet. */
static void take_over(struct mover *mover, bool restarted)
{
    uint64_t missing = 0;
    if (mover->role == MF_DESTINATION && !restarted)
        empty_files(mover);
    for (unsigned i = 0; i < mover->region_count; i++) {
        missing += mf_page_restart(&mover->view.pages[i], punch_page, &mover->region[i]);
    }
    atomic_store(&mover->figures->missing_pages, missing);
    if (mover->role == MF_DESTINATION && missing == 0) {
        atomic_store(&mover->confirmed_all, true);
        mover_wake(mover);
    }
}

static bool is_private_mapping(const struct mover *mover, const struct mf_mapping *mapping)
{
    return mapping->region == MF_REGION_ZEROS ||
           mover->region[mapping->region].kind == MF_MEMORY_PRIVATE;
}

void mover_keep_layout(struct mover *mover)
{
    static struct mf_mapping mappings[MF_LAYOUT_MAX];
    if (!mover->layout_file)
        return;
    unsigned count = mf_layout_get(&mover->layout, mappings, MF_LAYOUT_MAX), kept = 0;
    for (unsigned i = 0; i < count; i++)
        if (is_private_mapping(mover, &mappings[i]))
            mappings[kept++] = mappings[i];
    mf_layout_file_store(mover->layout_file, mappings, kept);
}

/* memferryd hands over where private memory lay when it was armed; a predecessor knew more. */
static void set_layout(struct mover *mover, const struct mf_mapping *handed, unsigned handed_count,
                       bool restarted)
{
    static struct mf_mapping mappings[MF_LAYOUT_MAX];
    int kept = mover->layout_file && restarted ? mf_layout_file_load(mover->layout_file, mappings)
                                               : -ENODATA;
    unsigned count = 0, childrens = 0;
    for (int i = 0; i < kept; i++) {
        if ((mappings[i].region != MF_REGION_ZEROS && mappings[i].region >= mover->region_count) ||
            !is_private_mapping(mover, &mappings[i]))
            mover_fatal("the file that keeps the layout does not fit the regions");
        /* Children have other numbers with each mover, and what they had discarded is not kept. */
        if (mappings[i].context == 0)
            mappings[count++] = mappings[i];
        else
            childrens++;
    }
    if (kept < 0 && mover->smaps_fd >= 0) {
        close(mover->smaps_fd);
        mover->smaps_fd = -1;
    }
    if (mover->smaps_fd >= 0)
        mf_layout_unsettle(&mover->layout);
    for (unsigned i = 0; i < handed_count && count < MF_LAYOUT_MAX; i++)
        if (kept < 0 || !is_private_mapping(mover, &handed[i]))
            mappings[count++] = handed[i];
    mf_layout_set(&mover->layout, mappings, count);
    if (childrens > 0) {
        mf_log(MF_LOG_WARNING,
               "%s: forked processes wait for ever for private memory that has not arrived: only "
               "the memferry-mover that was killed knew where it belongs",
               mover->name);
        mf_layout_lose(&mover->layout);
    }
    mover_keep_layout(mover);
    struct mf_context *target = mf_context_at(&mover->contexts, 0);
    if (!mover->layout_file || !target)
        return;
    uint64_t pages[MF_REGIONS_MAX];
    for (unsigned i = 0; i < mover->region_count; i++)
        pages[i] = mover->region[i].kind == MF_MEMORY_PRIVATE ? mover->region[i].pages : 0;
    target->zeros = mf_layout_file_zeros(mover->layout_file, pages, mover->region_count);
    if (!target->zeros)
        mover_fatal("the file that keeps the layout does not fit the regions");
}

static void introduce(struct mover *mover, pid_t target)
{
    uint64_t files[MF_REGIONS_MAX][2];
    unsigned count = 0;
    for (unsigned i = 0; i < mover->region_count; i++) {
        if (mover->region[i].kind == MF_MEMORY_PRIVATE)
            continue;
        files[count][0] = mover->region[i].device;
        files[count++][1] = mover->region[i].inode;
    }
    int r = companion_introduce(&mover->companion, target, mf_context_uffd(&mover->contexts, 0),
                                files, count);
    if (r < 0)
        mover_fatal("the mover's companion of %s does not answer: %s", mover->name, strerror(-r));
    for (uint32_t i = 0; i < mover->contexts.count; i++)
        *mover->companion.children += mf_context_at(&mover->contexts, i)->child;
}

void mover_setup(struct mover *mover)
{
    struct mf_mapping mappings[MF_MAPPINGS_MAX];
    unsigned mapping_count = 0;
    int session_fd = -1;
    bool restarted = false;
    struct mf_context *context;
    pid_t target = 0;
    struct mf_ipc message;
    struct mf_error err;

    if (mf_gate_init(&mover->gate) < 0)
        mover_fatal("cannot make the locks of the gate");
    for (;;) {
        int fd = -1;
        int r = mf_ipc_receive(mover->ipc_fd, &message, &fd);
        if (r <= 0)
            _exit(EXIT_SUCCESS); /* memferryd changed its mind */
        switch ((enum mf_ipc_type)message.type) {
        case MF_IPC_SETUP:
            mover->role = message.setup.role == MF_SOURCE ? MF_SOURCE : MF_DESTINATION;
            memcpy(mover->session_id, message.setup.session_id, sizeof(mover->session_id));
            memcpy(mover->name, message.setup.name, sizeof(mover->name) - 1);
            restarted = message.setup.restarted;
            target = message.setup.pid;
            mover->dontneed_discards = message.setup.dontneed_discards;
            session_fd = fd;
            break;
        case MF_IPC_REGION:
            take_region(mover, &message, fd);
            break;
        case MF_IPC_CONTEXT:
            r = fd < 0 ? -EBADF : mf_contexts_add(&mover->contexts, fd, -1, message.context.child);
            if (r < 0)
                mover_fatal("memferryd handed over a userfaultfd that can't be used");
            mf_context_at(&mover->contexts, (uint32_t)r)->unknown = message.context.child;
            break;
        case MF_IPC_MAPS:
            context = mf_context_at(&mover->contexts, message.context.index);
            if (!context || context->maps_fd >= 0 || fd < 0)
                mover_fatal("memferryd handed over the maps of nothing");
            context->maps_fd = fd;
            break;
        case MF_IPC_PAGEMAP:
            mover->pagemap_fd = fd;
            break;
        case MF_IPC_SMAPS:
            mover->smaps_fd = fd;
            break;
        case MF_IPC_LAYOUT:
            mover->layout_file = mf_layout_file_map(fd, &err);
            if (!mover->layout_file)
                mover_fatal("%s", err.text);
            close(fd);
            break;
        case MF_IPC_POPULATED:
            mover->populated_fd = fd;
            break;
        case MF_IPC_MAPPING:
            /* A source that does not track writes has no context. */
            if (mapping_count == MF_MAPPINGS_MAX || message.mapping.region >= mover->region_count ||
                (!mf_context_at(&mover->contexts, message.mapping.context) &&
                 !(mover->role == MF_SOURCE && mover->contexts.count == 0)))
                mover_fatal("memferryd handed over a mapping of nothing");
            mappings[mapping_count++] = message.mapping;
            break;
        case MF_IPC_GO:
            goto all;
        default:
            mover_fatal("memferryd sent a message of type %u before GO", message.type);
        }
    }
all:
    if (session_fd < 0 || mover->region_count == 0)
        mover_fatal("memferryd handed over no session file or no region");
    if (mf_session_file_map(session_fd, &mover->view, &err) < 0)
        mover_fatal("%s", err.text);
    close(session_fd);
    if (mover->private_memory && mover->role == MF_SOURCE && mover->populated_fd < 0)
        mover_fatal("memferryd handed over private memory without its pagemap");
    if (mover->view.file->region_count != mover->region_count)
        mover_fatal("the session file does not fit the regions");
    for (unsigned i = 0; i < mover->region_count; i++)
        if (mover->view.pages[i].count != mover->region[i].pages)
            mover_fatal("the session file does not fit the region %s", mover->region[i].name);
    mover->figures = &mover->view.file->figures;
    mover->copies = &mover->view.file->copies;
    set_layout(mover, mappings, mapping_count, restarted);
    take_over(mover, restarted);
    if (mover->role == MF_SOURCE && sweep_init(mover) < 0)
        mover_fatal("out of memory for the sweep of %s", mover->name);
    if (mover->role == MF_SOURCE)
        return;
    introduce(mover, target);
    /* Whoever waits on a fault that a predecessor had read must fault again (doc/kernel.md). */
    for (uint32_t i = 0; i < mover->contexts.count; i++)
        mf_uffd_wake_all(mf_context_uffd(&mover->contexts, i));
}
