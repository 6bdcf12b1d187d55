/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The control connection between two movers, as control.c reads it: messages cut by their length,
 * then unpacked. Whatever is accepted has the fields that control.c goes through without a look,
 * and survives being sent again.
 */
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "lib/control_message.h"
#include "lib/util.h"
#include "peer.pb-c.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t length_bytes);

static void require(bool condition)
{
    if (!condition)
        abort();
}

/* protobuf-c takes unknown fields of which it can't read its own copy again. */
static bool any_unknown(const Memferry__Peer__Message *message)
{
    size_t unknown = message->base.n_unknown_fields;
    if (message->body_case == MEMFERRY__PEER__MESSAGE__BODY__NOT_SET)
        return unknown > 0;
    unknown += message->hello->base.n_unknown_fields; /* every body begins with its base */
    if (message->body_case == MEMFERRY__PEER__MESSAGE__BODY_HELLO)
        for (size_t i = 0; i < message->hello->n_regions; i++)
            unknown += message->hello->regions[i]->base.n_unknown_fields;
    if (message->body_case == MEMFERRY__PEER__MESSAGE__BODY_MISSING)
        for (size_t i = 0; i < message->missing->n_runs; i++)
            unknown += message->missing->runs[i]->base.n_unknown_fields;
    if (message->body_case == MEMFERRY__PEER__MESSAGE__BODY_DRAINED && message->drained->faults)
        unknown += message->drained->faults->base.n_unknown_fields;
    return unknown > 0;
}

/* Touch what control.c touches, so that a sanitizer sees what is not there. */
static size_t go_through(const Memferry__Peer__Message *message)
{
    size_t sum = 0;
    switch (message->body_case) {
    case MEMFERRY__PEER__MESSAGE__BODY_HELLO:
        sum += strlen(message->hello->software);
        for (size_t i = 0; i < message->hello->n_regions; i++)
            sum += strlen(message->hello->regions[i]->name);
        break;
    case MEMFERRY__PEER__MESSAGE__BODY_HELLO_REPLY:
        sum += strlen(message->hello_reply->refusal);
        break;
    case MEMFERRY__PEER__MESSAGE__BODY_MISSING:
        for (size_t i = 0; i < message->missing->n_runs; i++)
            sum += message->missing->runs[i]->region;
        break;
    case MEMFERRY__PEER__MESSAGE__BODY_PHASE:
        sum += (size_t)message->phase->phase;
        break;
    case MEMFERRY__PEER__MESSAGE__BODY_DRAINED:
        sum += message->drained->faults ? (size_t)message->drained->faults->count : 0;
        break;
    case MEMFERRY__PEER__MESSAGE__BODY_ABORT:
        sum += strlen(message->abort->reason);
        break;
    default:
        break;
    }
    return sum;
}

static void try_body(const uint8_t *body, size_t body_bytes)
{
    Memferry__Peer__Message *message = memferry__peer__message__unpack(NULL, body_bytes, body);
    if (!message)
        return;
    const size_t sum = go_through(message);
    cleanup_free uint8_t *frame = NULL;
    size_t frame_bytes = 0, again_bytes = 0;
    if (!any_unknown(message) &&
        mf_control_frame(&message->base, &frame, &frame_bytes, NULL) == 0) {
        require(mf_control_body(frame, frame_bytes, &again_bytes, NULL) == 1);
        Memferry__Peer__Message *again =
            memferry__peer__message__unpack(NULL, again_bytes, frame + MF_CONTROL_HEADER_BYTES);
        require(again && again->body_case == message->body_case && go_through(again) == sum);
        memferry__peer__message__free_unpacked(again, NULL);
    }
    memferry__peer__message__free_unpacked(message, NULL);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t length_bytes)
{
    size_t at = 0, body_bytes = 0;
    while (mf_control_body(data + at, length_bytes - at, &body_bytes, NULL) == 1) {
        require(body_bytes <= length_bytes - at - MF_CONTROL_HEADER_BYTES);
        try_body(data + at + MF_CONTROL_HEADER_BYTES, body_bytes);
        at += MF_CONTROL_HEADER_BYTES + body_bytes;
    }
    return 0;
}
