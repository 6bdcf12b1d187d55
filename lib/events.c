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
    events->ops->fault(events->arg, fault, mapping.region,
                       (fault->addr - mapping.start_addr + mapping.offset_bytes) /
                           events->region[mapping.region].page_bytes);
}

static void discard_range(struct mf_events *events, uint32_t context, uint64_t start, uint64_t end)
{
    struct mf_mapping mappings[MF_MAPPINGS_MAX];
    unsigned count = mf_layout_get(events->layout, mappings, MF_MAPPINGS_MAX);
    for (unsigned i = 0; i < count; i++) {
        const struct mf_mapping *m = &mappings[i];
        const uint64_t mapped_end = m->start_addr + m->length_bytes;
        if (m->context != context || mapped_end <= start || m->start_addr >= end)
            continue;
        const uint64_t page_bytes = events->region[m->region].page_bytes;
        const uint64_t from = start > m->start_addr ? start : m->start_addr;
        const uint64_t to = end < mapped_end ? end : mapped_end;
        const uint64_t first = (from - m->start_addr + m->offset_bytes) / page_bytes;
        const uint64_t last = (to - 1 - m->start_addr + m->offset_bytes) / page_bytes;
        events->ops->discard(events->arg, m->region, first, last + 1 - first);
    }
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
        discard_range(events, context, start, end);
        mf_uffd_wake(uffd, start, end - start);
        break;
    case UFFD_EVENT_UNMAP:
        r = mf_layout_unmap(events->layout, context, start, end);
        mf_uffd_wake(uffd, start, end - start);
        break;
    case UFFD_EVENT_REMAP:
        r = mf_layout_remap(events->layout, context, message->arg.remap.from, message->arg.remap.to,
                            message->arg.remap.len);
        break;
    default:
        mf_log(MF_LOG_WARNING, "a userfaultfd message of unknown kind %#x", message->event);
    }
    return r;
}

int mf_events_read(struct mf_events *events, uint32_t context)
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
