/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The control connection: length-prefixed protobuf messages (proto/peer.proto), on the main thread,
 * never blocking. Everything that the peer says is checked here before anything acts on it (I11).
 */
#include "daemon/mover/mover.h"
#include "daemon/mover/source/private.h"

#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "lib/control_message.h"
#include "lib/log.h"
#include "lib/util.h"

#define SOFTWARE "memferry " MF_VERSION
#define RUNS_PER_MESSAGE 4096u
#define RECEIVE_BYTES 65536u

static bool make_room(uint8_t **buffer, size_t *room, size_t need)
{
    if (*room >= need)
        return true;
    size_t next = *room ? *room : 4096;
    while (next < need)
        next *= 2;
    uint8_t *grown = realloc(*buffer, next);
    if (!grown)
        return false;
    *buffer = grown;
    *room = next;
    return true;
}

void control_close(struct control_connection *control)
{
    if (control->fd >= 0)
        close(control->fd);
    free(control->in);
    free(control->out);
    *control = (struct control_connection){.fd = -1};
}

void control_writable(struct mover *mover)
{
    struct control_connection *c = &mover->link.control;
    while (c->out_have > 0) {
        ssize_t n = send(c->fd, c->out, c->out_have, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (n < 0 && (errno == EAGAIN || errno == EINTR))
            return;
        if (n < 0) {
            c->out_have = 0; /* the reader of this socket sees the end, with what came before it */
            return;
        }
        c->out_have -= (size_t)n;
        memmove(c->out, c->out + n, c->out_have);
    }
}

void control_flush(struct mover *mover, int timeout_ms)
{
    struct control_connection *c = &mover->link.control;
    if (c->fd < 0)
        return;
    struct pollfd wait = {.fd = c->fd, .events = POLLOUT};
    if (c->out_have > 0 && poll(&wait, 1, timeout_ms) > 0)
        control_writable(mover);
    wait.events = POLLRDHUP;
    if (c->last_word && c->out_have == 0)
        poll(&wait, 1, timeout_ms);
}

void control_send(struct mover *mover, const Memferry__Peer__Message *message)
{
    struct control_connection *c = &mover->link.control;
    if (c->fd < 0)
        return;
    cleanup_free uint8_t *frame = NULL;
    size_t frame_bytes = 0;
    struct mf_error err;
    if (mf_control_frame(&message->base, &frame, &frame_bytes, &err) < 0)
        mover_fatal("a message to the peer could not be made: %s", err.text);
    if (!make_room(&c->out, &c->out_room, c->out_have + frame_bytes))
        mover_fatal("out of memory for messages to the peer");
    memcpy(c->out + c->out_have, frame, frame_bytes);
    c->out_have += frame_bytes;
    control_writable(mover);
}

void control_send_phase(struct mover *mover, uint32_t phase, uint64_t blackout_us)
{
    Memferry__Peer__PhaseChange change = MEMFERRY__PEER__PHASE_CHANGE__INIT;
    Memferry__Peer__Message message = MEMFERRY__PEER__MESSAGE__INIT;
    if (phase == MEMFERRY__PEER__PHASE__PHASE_DRAINED) {
        struct mf_quantiles q;
        mf_histogram_read(&mover->figures->faults, &q);
        Memferry__Peer__Faults faults = MEMFERRY__PEER__FAULTS__INIT;
        faults.count = q.count;
        faults.p50_ns = q.p50_ns;
        faults.p99_ns = q.p99_ns;
        faults.p999_ns = q.p999_ns;
        faults.max_ns = q.max_ns;
        Memferry__Peer__Drained drained = MEMFERRY__PEER__DRAINED__INIT;
        drained.faults = &faults;
        drained.received_bytes = atomic_load(&mover->figures->wire_bytes);
        message.body_case = MEMFERRY__PEER__MESSAGE__BODY_DRAINED;
        message.drained = &drained;
        control_send(mover, &message);
        return;
    }
    change.phase = (Memferry__Peer__Phase)phase;
    change.blackout_us = blackout_us;
    message.body_case = MEMFERRY__PEER__MESSAGE__BODY_PHASE;
    message.phase = &change;
    control_send(mover, &message);
}

void control_send_round_landed(struct mover *mover, uint32_t round)
{
    Memferry__Peer__PhaseChange change = MEMFERRY__PEER__PHASE_CHANGE__INIT;
    Memferry__Peer__Message message = MEMFERRY__PEER__MESSAGE__INIT;
    change.phase = MEMFERRY__PEER__PHASE__PHASE_ROUND_LANDED;
    change.round = round;
    message.body_case = MEMFERRY__PEER__MESSAGE__BODY_PHASE;
    message.phase = &change;
    control_send(mover, &message);
}

void control_send_device_end(struct mover *mover, uint64_t bytes)
{
    Memferry__Peer__DeviceEnd end = MEMFERRY__PEER__DEVICE_END__INIT;
    Memferry__Peer__Message message = MEMFERRY__PEER__MESSAGE__INIT;
    end.bytes = bytes;
    message.body_case = MEMFERRY__PEER__MESSAGE__BODY_DEVICE_END;
    message.device_end = &end;
    control_send(mover, &message);
}

void control_send_abort(struct mover *mover, const char *reason, bool cancelled)
{
    Memferry__Peer__Abort abort_message = MEMFERRY__PEER__ABORT__INIT;
    Memferry__Peer__Message message = MEMFERRY__PEER__MESSAGE__INIT;
    abort_message.reason = (char *)(uintptr_t)reason;
    abort_message.cancelled = cancelled;
    message.body_case = MEMFERRY__PEER__MESSAGE__BODY_ABORT;
    message.abort = &abort_message;
    control_send(mover, &message);
    mover->link.control.last_word = mover->link.control.fd >= 0;
}

static uint64_t allocated_bytes(const struct mover *mover)
{
    uint64_t sum = 0;
    for (unsigned i = 0; i < mover->region_count; i++) {
        struct stat st;
        if (mover->region[i].kind == MF_MEMORY_PRIVATE)
            sum += private_allocated_bytes(mover, i);
        else if (fstat(mover->region[i].fd, &st) == 0)
            sum += (uint64_t)st.st_blocks * 512u;
    }
    return sum;
}

void control_send_hello(struct mover *mover)
{
    Memferry__Peer__Region regions[MF_REGIONS_MAX], *pointers[MF_REGIONS_MAX];
    for (unsigned i = 0; i < mover->region_count; i++) {
        memferry__peer__region__init(&regions[i]);
        regions[i].name = mover->region[i].name;
        regions[i].size_bytes = mover->region[i].size_bytes;
        regions[i].page_bytes = mover->region[i].page_bytes;
        pointers[i] = &regions[i];
    }
    Memferry__Peer__Hello hello = MEMFERRY__PEER__HELLO__INIT;
    hello.version = MF_WIRE_VERSION;
    hello.oldest_version = MF_WIRE_OLDEST_VERSION;
    hello.software = (char *)(uintptr_t)SOFTWARE;
    hello.n_regions = mover->region_count;
    hello.regions = pointers;
    hello.streams = mover->link.streams;
    hello.allocated_bytes = allocated_bytes(mover);
    hello.released = mover->released;
    hello.guest_running = mover->guest_running;
    hello.link = mover->link.number;
    Memferry__Peer__Message message = MEMFERRY__PEER__MESSAGE__INIT;
    message.body_case = MEMFERRY__PEER__MESSAGE__BODY_HELLO;
    message.hello = &hello;
    control_send(mover, &message);
}

static void send_hello_reply(struct mover *mover, const char *refusal)
{
    Memferry__Peer__HelloReply reply = MEMFERRY__PEER__HELLO_REPLY__INIT;
    reply.version = MF_WIRE_VERSION;
    reply.oldest_version = MF_WIRE_OLDEST_VERSION;
    reply.software = (char *)(uintptr_t)SOFTWARE;
    reply.refusal = (char *)(uintptr_t)refusal;
    Memferry__Peer__Message message = MEMFERRY__PEER__MESSAGE__INIT;
    message.body_case = MEMFERRY__PEER__MESSAGE__BODY_HELLO_REPLY;
    message.hello_reply = &reply;
    control_send(mover, &message);
}

void control_send_missing(struct mover *mover)
{
    static Memferry__Peer__Run runs[RUNS_PER_MESSAGE], *pointers[RUNS_PER_MESSAGE];
    Memferry__Peer__Missing missing = MEMFERRY__PEER__MISSING__INIT;
    Memferry__Peer__Message message = MEMFERRY__PEER__MESSAGE__INIT;
    message.body_case = MEMFERRY__PEER__MESSAGE__BODY_MISSING;
    message.missing = &missing;
    missing.runs = pointers;
    for (unsigned region = 0; region < mover->region_count; region++) {
        const struct mf_pages *pages = &mover->view.pages[region];
        uint64_t first = 0, count;
        /* A page that is landing right now is named too: its second copy will be dropped. */
        while (first < pages->count) {
            uint64_t at = first;
            while (at < pages->count && mf_page_resolvable(mf_page_load(pages, at)))
                at++;
            first = at;
            while (at < pages->count && !mf_page_resolvable(mf_page_load(pages, at)))
                at++;
            count = at - first;
            if (count == 0)
                break;
            if (missing.n_runs == RUNS_PER_MESSAGE) {
                control_send(mover, &message);
                missing.n_runs = 0;
            }
            Memferry__Peer__Run *run = &runs[missing.n_runs];
            memferry__peer__run__init(run);
            run->region = region;
            run->first_page = first;
            run->pages = count;
            pointers[missing.n_runs++] = run;
            first = at;
        }
    }
    missing.last = true;
    control_send(mover, &message);
}

/* The peer's strings go to logs and terminals: printable, and no longer than ours. */
static void copy_text(char *out, size_t size, const char *text)
{
    size_t at = 0;
    for (; text && *text && at + 1 < size; text++)
        out[at++] = (unsigned char)*text < 0x20 || *text == 0x7f ? ' ' : *text;
    out[at] = '\0';
}

static bool regions_agree(const struct mover *mover, const Memferry__Peer__Hello *hello, char *why,
                          size_t why_size)
{
    if (hello->n_regions != mover->region_count) {
        snprintf(why, why_size,
                 "the source has %zu regions of memory and the destination %u; both need the same "
                 "(QEMU: the same -object memory-backend-file options)",
                 hello->n_regions, mover->region_count);
        return false;
    }
    for (unsigned i = 0; i < mover->region_count; i++) {
        const Memferry__Peer__Region *theirs = hello->regions[i];
        const struct mf_region *ours = &mover->region[i];
        char name[64];
        copy_text(name, sizeof(name), theirs->name);
        if (strcmp(name, ours->name) == 0 && theirs->size_bytes == ours->size_bytes &&
            theirs->page_bytes == ours->page_bytes)
            continue;
        snprintf(why, why_size,
                 "the memory of the two differs: the source has %s (%" PRIu64
                 " MiB, pages of %" PRIu64 " KiB) where the destination has %s (%" PRIu64
                 " MiB, pages of %u KiB); both need the same (QEMU: the same -object options)",
                 name, theirs->size_bytes >> 20, theirs->page_bytes >> 10, ours->name,
                 ours->size_bytes >> 20, ours->page_bytes >> 10);
        return false;
    }
    return true;
}

static void on_hello(struct mover *mover, const Memferry__Peer__Hello *hello)
{
    char why[400] = "";
    struct link *link = &mover->link;
    if (mover->role != MF_DESTINATION || link->hello_seen) {
        link_fail(mover, "the source greeted at the wrong moment");
        return;
    }
    link->hello_seen = true;
    if (!mf_versions_meet(hello->version, hello->oldest_version))
        snprintf(why, sizeof(why),
                 "the source speaks version %u of the protocol (oldest %u) and the destination %u "
                 "(oldest %u)",
                 hello->version, hello->oldest_version, MF_WIRE_VERSION, MF_WIRE_OLDEST_VERSION);
    else if (hello->capabilities != 0)
        snprintf(why, sizeof(why),
                 "the source wants capabilities (%#" PRIx64
                 ") that the destination's %s does not have; update the destination first",
                 hello->capabilities, SOFTWARE);
    else if (hello->streams != link->streams || hello->link != link->number)
        snprintf(why, sizeof(why), "the source's greeting belongs to another link");
    else if (regions_agree(mover, hello, why, sizeof(why))) {
        mover->released = hello->released;
        mover->guest_running = hello->guest_running;
        mover_tell(mover, &(struct mf_ipc){.type = MF_IPC_PEER_HELLO,
                                           .hello = {.allocated_bytes = hello->allocated_bytes,
                                                     .released = hello->released != 0,
                                                     .guest_running = hello->guest_running != 0}});
        return;
    }
    control_proceed(mover, why);
}

void control_proceed(struct mover *mover, const char *refusal)
{
    if (!mover->link.number || !mover->link.hello_seen || mover->link.up)
        return;
    send_hello_reply(mover, refusal);
    if (refusal[0]) {
        control_flush(mover, 200);
        link_fail(mover, "refused the source: %s", refusal);
        return;
    }
    for (unsigned i = 0; i < mover->link.streams; i++)
        if (mover->link.bulk[i].fd < 0 || mover->link.urgent_fd < 0) {
            link_fail(mover, "the source greeted before all its connections were there");
            return;
        }
    control_send_missing(mover);
    link_start_threads(mover);
    mover_tell(mover, &(struct mf_ipc){.type = MF_IPC_LINK_UP});
}

static void on_hello_reply(struct mover *mover, const Memferry__Peer__HelloReply *reply)
{
    if (mover->role != MF_SOURCE || mover->link.up || mover->link.hello_seen) {
        link_fail(mover, "the destination greeted at the wrong moment");
        return;
    }
    mover->link.hello_seen = true;
    if (reply->refusal && reply->refusal[0] && mover->released) {
        /* The guest is there and needs its pages: no refusal ends that. */
        char why[200];
        copy_text(why, sizeof(why), reply->refusal);
        link_fail(mover, "the destination refused: %s", why);
        return;
    }
    if (reply->refusal && reply->refusal[0]) {
        struct mf_ipc refused = {.type = MF_IPC_PEER_ABORT};
        copy_text(refused.text, sizeof(refused.text), reply->refusal);
        mover_tell(mover, &refused);
        return;
    }
    if (!mf_versions_meet(reply->version, reply->oldest_version))
        link_fail(mover, "the destination speaks version %u of the protocol, we speak %u",
                  reply->version, MF_WIRE_VERSION);
}

static void on_missing(struct mover *mover, const Memferry__Peer__Missing *missing)
{
    struct link *link = &mover->link;
    const bool first = !link->missing_open;
    if (mover->role != MF_SOURCE || !link->hello_seen ||
        (link->up && first && !sweep_pass_finished(mover))) {
        link_fail(mover, "the destination named missing pages at the wrong moment");
        return;
    }
    if (first)
        sweep_forget_sent(mover);
    link->missing_open = !missing->last;
    for (size_t i = 0; i < missing->n_runs; i++) {
        const Memferry__Peer__Run *run = missing->runs[i];
        if (sweep_missing(mover, run->region, run->first_page, run->pages) < 0) {
            link_fail(mover, "the destination misses pages that the VM does not have");
            return;
        }
    }
    if (!missing->last)
        return;
    sweep_next_pass(mover);
    if (!link->up) {
        link_start_threads(mover);
        mover_tell(mover, &(struct mf_ipc){.type = MF_IPC_LINK_UP});
    }
}

static void on_drained(struct mover *mover, const Memferry__Peer__Drained *drained)
{
    struct mf_ipc tell = {.type = MF_IPC_PEER_DRAINED};
    tell.drained.received_bytes = drained->received_bytes;
    if (drained->faults) {
        tell.drained.count = drained->faults->count;
        tell.drained.p50_ns = drained->faults->p50_ns;
        tell.drained.p99_ns = drained->faults->p99_ns;
        tell.drained.p999_ns = drained->faults->p999_ns;
        tell.drained.max_ns = drained->faults->max_ns;
    }
    mover_tell(mover, &tell);
}

static void on_message(struct mover *mover, const Memferry__Peer__Message *message)
{
    struct mf_ipc tell = {0};
    switch (message->body_case) {
    case MEMFERRY__PEER__MESSAGE__BODY_HELLO:
        on_hello(mover, message->hello);
        break;
    case MEMFERRY__PEER__MESSAGE__BODY_HELLO_REPLY:
        on_hello_reply(mover, message->hello_reply);
        break;
    case MEMFERRY__PEER__MESSAGE__BODY_MISSING:
        on_missing(mover, message->missing);
        break;
    case MEMFERRY__PEER__MESSAGE__BODY_PHASE:
        if (message->phase->phase == MEMFERRY__PEER__PHASE__PHASE_ROUND_LANDED) {
            if (mover->role == MF_SOURCE)
                sweep_round_landed(mover, message->phase->round);
            break;
        }
        tell.type = MF_IPC_PEER_PHASE;
        tell.phase = (uint32_t)message->phase->phase;
        tell.blackout_us = message->phase->blackout_us;
        mover_tell(mover, &tell);
        break;
    case MEMFERRY__PEER__MESSAGE__BODY_DRAINED:
        on_drained(mover, message->drained);
        break;
    case MEMFERRY__PEER__MESSAGE__BODY_ABORT:
        tell.type = MF_IPC_PEER_ABORT;
        tell.cancelled = message->abort->cancelled != 0;
        copy_text(tell.text, sizeof(tell.text), message->abort->reason);
        mover_tell(mover, &tell);
        break;
    case MEMFERRY__PEER__MESSAGE__BODY_DEVICE_END:
        tunnel_expect(mover, message->device_end->bytes);
        break;
    default:
        link_fail(mover, "the peer sent a message that this version does not know");
    }
}

void control_readable(struct mover *mover)
{
    struct control_connection *c = &mover->link.control;
    if (c->fd < 0 || atomic_load(&mover->link.failed))
        return;
    if (!make_room(&c->in, &c->in_room, c->in_have + RECEIVE_BYTES))
        mover_fatal("out of memory for messages of the peer");
    ssize_t n = recv(c->fd, c->in + c->in_have, RECEIVE_BYTES, MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (n <= 0) {
        link_fail(mover, "the peer closed the control connection%s%s", n < 0 ? ": " : "",
                  n < 0 ? strerror(errno) : "");
        return;
    }
    c->in_have += (size_t)n;
    size_t at = 0;
    const uint32_t number = mover->link.number;
    while (mover->link.number == number && !atomic_load(&mover->link.failed)) {
        size_t body_bytes = 0;
        struct mf_error err;
        int r = mf_control_body(c->in + at, c->in_have - at, &body_bytes, &err);
        if (r < 0)
            link_fail(mover, "the peer sent a message that is too long");
        if (r <= 0)
            break;
        Memferry__Peer__Message *message =
            memferry__peer__message__unpack(NULL, body_bytes, c->in + at + MF_CONTROL_HEADER_BYTES);
        at += MF_CONTROL_HEADER_BYTES + body_bytes;
        if (!message) {
            link_fail(mover, "the peer sent a message that can't be read");
            break;
        }
        on_message(mover, message);
        memferry__peer__message__free_unpacked(message, NULL);
    }
    if (mover->link.number == number && c->in) {
        c->in_have -= at;
        memmove(c->in, c->in + at, c->in_have);
    }
}
