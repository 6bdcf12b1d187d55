/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib/events.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "lib/log.h"
#include "lib/uapi.h"
#include "lib/uffd.h"
#include "lib/util.h"

#define MESSAGES_A_READ 64u

static void let_fault_again(const struct mf_events *events, uint32_t context, uint64_t addr)
{
    mf_uffd_wake(events->context_fd[context], addr & ~UINT64_C(4095), 4096);
}

static void serve(struct mf_events *events, const struct mf_fault *fault)
{
    struct mf_mapping mapping;
    if (!mf_layout_find(events->layout, fault->context, fault->addr, &mapping)) {
        if (events->parked_count < MF_PARKED_ROOM)
            events->parked[events->parked_count++] = *fault;
        else
            let_fault_again(events, fault->context, fault->addr);
        return;
    }
    if (mapping.region == MF_REGION_ZEROS) {
        events->ops->fault(events->arg, fault, MF_REGION_ZEROS, 0);
        return;
    }
    events->ops->fault(events->arg, fault, mapping.region,
                       (fault->addr - mapping.start_addr + mapping.offset_bytes) /
                           events->region[mapping.region].page_bytes);
}

/* Is a part of a private region's pages mapped by anybody beside @except? Then each has or misses
 * pages of its own, and what one discards the other keeps. */
static bool mapped_elsewhere(const struct mf_mapping *mappings, unsigned count,
                             const struct mf_mapping *except, uint64_t offset_bytes,
                             uint64_t length_bytes)
{
    for (unsigned i = 0; i < count; i++) {
        const struct mf_mapping *m = &mappings[i];
        if (m != except && m->region == except->region &&
            m->offset_bytes < offset_bytes + length_bytes &&
            offset_bytes < m->offset_bytes + m->length_bytes)
            return true;
    }
    return false;
}

static int discard_range(struct mf_events *events, uint32_t context, uint64_t start, uint64_t end)
{
    struct mf_mapping mappings[MF_MAPPINGS_MAX];
    unsigned count = mf_layout_get(events->layout, mappings, MF_MAPPINGS_MAX);
    for (unsigned i = 0; i < count; i++) {
        const struct mf_mapping *m = &mappings[i];
        const uint64_t mapped_end = m->start_addr + m->length_bytes;
        if (m->context != context || m->region == MF_REGION_ZEROS || mapped_end <= start ||
            m->start_addr >= end)
            continue;
        const uint64_t page_bytes = events->region[m->region].page_bytes;
        const uint64_t from = start > m->start_addr ? start : m->start_addr;
        const uint64_t to = end < mapped_end ? end : mapped_end;
        const uint64_t offset_bytes = from - m->start_addr + m->offset_bytes;
        if (events->region[m->region].kind == MF_MEMORY_PRIVATE &&
            mapped_elsewhere(mappings, count, m, offset_bytes, to - from)) {
            int r = mf_layout_zeros(events->layout, context, m->region, from, to);
            if (r < 0)
                return r;
            continue;
        }
        const uint64_t first = offset_bytes / page_bytes;
        const uint64_t last = (to - 1 - m->start_addr + m->offset_bytes) / page_bytes;
        events->ops->discard(events->arg, m->region, first, last + 1 - first);
    }
    return 0;
}

/* The pages of private memory went along: what stays mapped at the old place (MREMAP_DONTUNMAP;
 * else an UNMAP follows) reads as zeros. */
static int leave_zeros(struct mf_events *events, uint32_t context, uint64_t start, uint64_t end)
{
    struct mf_mapping mappings[MF_MAPPINGS_MAX];
    unsigned count = mf_layout_get(events->layout, mappings, MF_MAPPINGS_MAX);
    int r = 0;
    for (unsigned i = 0; r == 0 && i < count; i++) {
        const uint32_t region = mappings[i].region;
        if (mappings[i].context == context && region != MF_REGION_ZEROS &&
            events->region[region].kind == MF_MEMORY_PRIVATE && mappings[i].start_addr < end &&
            mappings[i].start_addr + mappings[i].length_bytes > start)
            r = mf_layout_zeros(events->layout, context, region, start, end);
    }
    return r;
}

static int apply_event(struct mf_events *events, uint32_t context, const struct uffd_msg *message)
{
    const int uffd = events->context_fd[context];
    const uint64_t start = message->arg.remove.start, end = message->arg.remove.end;
    int r = 0;
    switch (message->event) {
    case UFFD_EVENT_REMOVE:
        /* DONTNEED or REMOVE: with QEMU either ends its ram_block_discard_range(), which has
         * punched the file before, silently. So the range is discarded either way. */
        r = discard_range(events, context, start, end);
        mf_uffd_wake(uffd, start, end - start);
        break;
    case UFFD_EVENT_UNMAP:
        r = mf_layout_unmap(events->layout, context, start, end);
        mf_uffd_wake(uffd, start, end - start);
        break;
    case UFFD_EVENT_REMAP:
        r = mf_layout_remap(events->layout, context, message->arg.remap.from, message->arg.remap.to,
                            message->arg.remap.len);
        if (r == 0)
            r = leave_zeros(events, context, message->arg.remap.from,
                            message->arg.remap.from + message->arg.remap.len);
        break;
    default:
        mf_log(MF_LOG_WARNING, "a userfaultfd message of unknown kind %#x", message->event);
    }
    return r;
}

static int read_all(struct mf_events *events, uint32_t context)
{
    struct uffd_msg messages[MESSAGES_A_READ];
    int event = 0;
    for (;;) {
        ssize_t n = read(events->context_fd[context], messages, sizeof(messages));
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno != EAGAIN)
            return -errno;
        if (n < (ssize_t)sizeof(messages[0]))
            return event;
        const uint64_t now_ns = mf_now_ns();
        for (size_t i = 0; i < (size_t)n / sizeof(messages[0]); i++) {
            if (messages[i].event != UFFD_EVENT_PAGEFAULT) {
                int r = apply_event(events, context, &messages[i]);
                if (r < 0)
                    return r;
                event = 1;
                continue;
            }
            const uint64_t addr = messages[i].arg.pagefault.address;
            if (events->fault_count < MF_FAULTS_ROOM)
                events->fault[events->fault_count++] =
                    (struct mf_fault){.addr = addr, .since_ns = now_ns, .context = context};
            else /* events must be read whatever happens */
                let_fault_again(events, context, addr);
        }
    }
}

int mf_events_read(struct mf_events *events, uint32_t context)
{
    mf_gate_close(events->gate);
    int r = read_all(events, context);
    mf_gate_open(events->gate);
    return r;
}

void mf_events_serve(struct mf_events *events, bool event)
{
    if (events->serving)
        return;
    events->serving = true;
    if (event && events->parked_count > 0) {
        struct mf_fault again[MF_PARKED_ROOM];
        unsigned count = events->parked_count;
        memcpy(again, events->parked, count * sizeof(again[0]));
        events->parked_count = 0;
        for (unsigned i = 0; i < count; i++)
            serve(events, &again[i]);
    }
    /* Serving may read more: so a batch is taken out, and then the next. */
    while (events->fault_count > 0) {
        struct mf_fault batch[MF_FAULTS_ROOM];
        unsigned count = events->fault_count;
        memcpy(batch, events->fault, count * sizeof(batch[0]));
        events->fault_count = 0;
        for (unsigned i = 0; i < count; i++)
            serve(events, &batch[i]);
    }
    events->serving = false;
}

void mf_events_give_up_parked(struct mf_events *events)
{
    mf_events_serve(events, true);
    for (unsigned i = 0; i < events->parked_count; i++)
        let_fault_again(events, events->parked[i].context, events->parked[i].addr);
    events->parked_count = 0;
}
