/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* proto/peer.proto through the framing that it shares with the control socket
 * (lib/control_message.c). */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "lib/control_message.h"
#include "lib/util.h"
#include "peer.pb-c.h"
#include "proto/frame.h"

_Static_assert(MF_PEER_MESSAGE_MAX_BYTES == MF_CONTROL_MESSAGE_MAX_BYTES,
               "one framing, one limit: control.c relies on it");

/* Frames @message behind @before other bytes, reads it again. The caller frees. */
static Memferry__Peer__Message *through(const Memferry__Peer__Message *message)
{
    cleanup_free uint8_t *frame = NULL;
    size_t frame_bytes = 0, body_bytes = 0;
    struct mf_error err = {0};
    assert_int_equal(mf_control_frame(&message->base, &frame, &frame_bytes, &err), 0);
    for (size_t have = 0; have < frame_bytes; have++)
        assert_int_equal(mf_control_body(frame, have, &body_bytes, &err), 0);
    assert_int_equal(mf_control_body(frame, frame_bytes, &body_bytes, &err), 1);
    assert_int_equal(body_bytes + MF_CONTROL_HEADER_BYTES, frame_bytes);
    Memferry__Peer__Message *out =
        memferry__peer__message__unpack(NULL, body_bytes, frame + MF_CONTROL_HEADER_BYTES);
    assert_non_null(out);
    assert_int_equal(out->body_case, message->body_case);
    return out;
}

static void hello_goes_round(void **state)
{
    (void)state;
    Memferry__Peer__Region region = MEMFERRY__PEER__REGION__INIT;
    region.name = (char *)(uintptr_t) "ram0";
    region.size_bytes = UINT64_C(3) << 40;
    region.page_bytes = 1u << 30;
    Memferry__Peer__Region *regions[] = {&region, &region};
    Memferry__Peer__Hello hello = MEMFERRY__PEER__HELLO__INIT;
    hello.version = MF_WIRE_VERSION;
    hello.oldest_version = MF_WIRE_OLDEST_VERSION;
    hello.regions = regions;
    hello.n_regions = 2;
    hello.capabilities = UINT64_MAX;
    hello.released = true;
    hello.link = UINT32_MAX;
    Memferry__Peer__Message message = MEMFERRY__PEER__MESSAGE__INIT;
    message.body_case = MEMFERRY__PEER__MESSAGE__BODY_HELLO;
    message.hello = &hello;
    Memferry__Peer__Message *out = through(&message);
    assert_int_equal(out->hello->n_regions, 2);
    assert_string_equal(out->hello->regions[1]->name, "ram0");
    assert_int_equal(out->hello->regions[1]->size_bytes, region.size_bytes);
    assert_int_equal(out->hello->capabilities, UINT64_MAX);
    assert_true(out->hello->released);
    assert_false(out->hello->guest_running);
    assert_int_equal(out->hello->link, UINT32_MAX);
    assert_string_equal(out->hello->software, "");
    memferry__peer__message__free_unpacked(out, NULL);
}

/* control.c sends at most so many runs in one message; with the largest numbers it must still fit.
 */
#define RUNS_PER_MESSAGE 4096u

static void fullest_missing_fits(void **state)
{
    (void)state;
    static Memferry__Peer__Run runs[RUNS_PER_MESSAGE], *pointers[RUNS_PER_MESSAGE];
    for (unsigned i = 0; i < RUNS_PER_MESSAGE; i++) {
        memferry__peer__run__init(&runs[i]);
        runs[i].region = UINT32_MAX;
        runs[i].first_page = UINT64_MAX;
        runs[i].pages = UINT64_MAX;
        pointers[i] = &runs[i];
    }
    Memferry__Peer__Missing missing = MEMFERRY__PEER__MISSING__INIT;
    missing.runs = pointers;
    missing.n_runs = RUNS_PER_MESSAGE;
    missing.last = true;
    Memferry__Peer__Message message = MEMFERRY__PEER__MESSAGE__INIT;
    message.body_case = MEMFERRY__PEER__MESSAGE__BODY_MISSING;
    message.missing = &missing;
    Memferry__Peer__Message *out = NULL;
    cleanup_free uint8_t *frame = NULL;
    size_t frame_bytes = 0, body_bytes = 0;
    assert_int_equal(mf_control_frame(&message.base, &frame, &frame_bytes, NULL), 0);
    assert_int_equal(mf_control_body(frame, frame_bytes, &body_bytes, NULL), 1);
    out = memferry__peer__message__unpack(NULL, body_bytes, frame + MF_CONTROL_HEADER_BYTES);
    assert_non_null(out);
    assert_int_equal(out->missing->n_runs, RUNS_PER_MESSAGE);
    assert_int_equal(out->missing->runs[RUNS_PER_MESSAGE - 1]->pages, UINT64_MAX);
    memferry__peer__message__free_unpacked(out, NULL);
}

static void later_versions_are_readable(void **state)
{
    (void)state;
    /* A body that this version does not know (field 15), and an unknown field beside a known body.
     */
    static const uint8_t unknown_body[] = {0x7a, 0x02, 0x08, 0x01};
    static const uint8_t unknown_field[] = {0x22, 0x02, 0x08, 0x03, 0xa0, 0x06, 0x01};
    Memferry__Peer__Message *out =
        memferry__peer__message__unpack(NULL, sizeof(unknown_body), unknown_body);
    assert_non_null(out);
    assert_int_equal(out->body_case, MEMFERRY__PEER__MESSAGE__BODY__NOT_SET);
    memferry__peer__message__free_unpacked(out, NULL);
    out = memferry__peer__message__unpack(NULL, sizeof(unknown_field), unknown_field);
    assert_non_null(out);
    assert_int_equal(out->body_case, MEMFERRY__PEER__MESSAGE__BODY_PHASE);
    assert_int_equal(out->phase->phase, MEMFERRY__PEER__PHASE__PHASE_RELEASE);
    memferry__peer__message__free_unpacked(out, NULL);
}

static void refuses_what_is_too_long_or_broken(void **state)
{
    (void)state;
    size_t body_bytes = 0;
    struct mf_error err = {0};
    assert_int_equal(mf_control_body((const uint8_t *)"\x01\0\x10\0", 4, &body_bytes, &err),
                     -EPROTO);
    assert_int_equal(mf_control_body((const uint8_t *)"\xff\xff\xff\xff", 4, &body_bytes, &err),
                     -EPROTO);
    assert_int_equal(mf_control_body((const uint8_t *)"\0\0\x10\0", 4, &body_bytes, &err), 0);
    assert_int_equal(body_bytes, MF_PEER_MESSAGE_MAX_BYTES);
    static const char *const broken[] = {"\x0a\x7f", "\xff", "\x0a\x02\x22\x7f", "\x22\x02\x08"};
    for (size_t i = 0; i < sizeof(broken) / sizeof(broken[0]); i++)
        assert_null(
            memferry__peer__message__unpack(NULL, strlen(broken[i]), (const uint8_t *)broken[i]));
    cleanup_free char *text = malloc(MF_PEER_MESSAGE_MAX_BYTES + 1);
    assert_non_null(text);
    memset(text, 'x', MF_PEER_MESSAGE_MAX_BYTES);
    text[MF_PEER_MESSAGE_MAX_BYTES] = '\0';
    Memferry__Peer__Abort abort_message = MEMFERRY__PEER__ABORT__INIT;
    abort_message.reason = text;
    Memferry__Peer__Message message = MEMFERRY__PEER__MESSAGE__INIT;
    message.body_case = MEMFERRY__PEER__MESSAGE__BODY_ABORT;
    message.abort = &abort_message;
    uint8_t *frame = NULL;
    size_t frame_bytes = 0;
    assert_int_equal(mf_control_frame(&message.base, &frame, &frame_bytes, &err), -EMSGSIZE);
    assert_null(frame);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(hello_goes_round),
        cmocka_unit_test(fullest_missing_fits),
        cmocka_unit_test(later_versions_are_readable),
        cmocka_unit_test(refuses_what_is_too_long_or_broken),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
