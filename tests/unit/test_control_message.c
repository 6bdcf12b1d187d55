/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "lib/control_message.h"
#include "lib/endpoint.h"
#include "lib/process.h"
#include "lib/util.h"

static Memferry__Control__MigrateRequest good_migrate(void)
{
    Memferry__Control__MigrateRequest migrate = MEMFERRY__CONTROL__MIGRATE_REQUEST__INIT;
    migrate.name = (char *)"vm1";
    migrate.qmp_path = (char *)"/run/vm1.qmp";
    migrate.host = (char *)"b";
    return migrate;
}

/* Packs a request and takes it apart again. */
static int through(Memferry__Control__Request *request, struct mf_error *err)
{
    cleanup_free uint8_t *frame = NULL;
    size_t frame_bytes = 0, body_bytes = 0;
    Memferry__Control__Request *out = NULL;
    assert_int_equal(mf_control_frame(&request->base, &frame, &frame_bytes, err), 0);
    assert_int_equal(mf_control_body(frame, frame_bytes, &body_bytes, err), 1);
    assert_int_equal(body_bytes, frame_bytes - MF_CONTROL_HEADER_BYTES);
    int rc = mf_control_request(frame + MF_CONTROL_HEADER_BYTES, body_bytes, &out, err);
    if (rc == 0) {
        assert_int_equal(out->verb_case, request->verb_case);
        memferry__control__request__free_unpacked(out, NULL);
    }
    return rc;
}

static int migrate_through(Memferry__Control__MigrateRequest *migrate, struct mf_error *err)
{
    Memferry__Control__Request request = MEMFERRY__CONTROL__REQUEST__INIT;
    request.verb_case = MEMFERRY__CONTROL__REQUEST__VERB_MIGRATE;
    request.migrate = migrate;
    return through(&request, err);
}

static void test_whole_only_when_all_is_there(void **state)
{
    (void)state;
    Memferry__Control__Reply reply = MEMFERRY__CONTROL__REPLY__INIT;
    reply.last = true;
    reply.error = (char *)"sentence";
    cleanup_free uint8_t *frame = NULL;
    size_t frame_bytes = 0, body_bytes = 0;
    assert_int_equal(mf_control_frame(&reply.base, &frame, &frame_bytes, NULL), 0);
    for (size_t have = 0; have < frame_bytes; have++)
        assert_int_equal(mf_control_body(frame, have, &body_bytes, NULL), 0);
    assert_int_equal(mf_control_body(frame, frame_bytes, &body_bytes, NULL), 1);
    Memferry__Control__Reply *out = NULL;
    assert_int_equal(mf_control_reply(frame + MF_CONTROL_HEADER_BYTES, body_bytes, &out, NULL), 0);
    assert_true(out->last);
    assert_string_equal(out->error, "sentence");
    memferry__control__reply__free_unpacked(out, NULL);
}

static void test_length_is_limited(void **state)
{
    (void)state;
    size_t body_bytes = 0;
    const uint8_t most[] = {0, 0, 0x10, 0}, more[] = {1, 0, 0x10, 0}, huge[] = {255, 255, 255, 255};
    assert_int_equal(mf_control_body(most, sizeof(most), &body_bytes, NULL), 0);
    assert_int_equal(body_bytes, MF_CONTROL_MESSAGE_MAX_BYTES);
    assert_int_equal(mf_control_body(more, sizeof(more), &body_bytes, NULL), -EPROTO);
    assert_int_equal(mf_control_body(huge, sizeof(huge), &body_bytes, NULL), -EPROTO);

    cleanup_free char *text = calloc(1, MF_CONTROL_MESSAGE_MAX_BYTES + 1);
    memset(text, 'x', MF_CONTROL_MESSAGE_MAX_BYTES);
    Memferry__Control__Reply reply = MEMFERRY__CONTROL__REPLY__INIT;
    reply.message = text;
    uint8_t *frame = NULL;
    assert_int_equal(mf_control_frame(&reply.base, &frame, &body_bytes, NULL), -EMSGSIZE);
    assert_null(frame);
}

static void test_migrate_is_checked(void **state)
{
    (void)state;
    char long_host[MF_HOST_MAX_BYTES + 1];
    memset(long_host, 'h', sizeof(long_host));
    long_host[sizeof(long_host) - 1] = '\0';
    struct mf_error err;
    Memferry__Control__MigrateRequest m = good_migrate();
    assert_int_equal(migrate_through(&m, &err), 0);
    m.port = 65535;
    m.streams = MF_CONTROL_STREAMS_MAX;
    assert_int_equal(migrate_through(&m, &err), 0);
    m.port = 65536;
    assert_int_equal(migrate_through(&m, &err), -EINVAL);
    m = good_migrate();
    m.streams = MF_CONTROL_STREAMS_MAX + 1;
    assert_int_equal(migrate_through(&m, &err), -EINVAL);
    m = good_migrate();
    m.host = (char *)"";
    assert_int_equal(migrate_through(&m, &err), -EINVAL);
    m.host = long_host;
    assert_int_equal(migrate_through(&m, &err), -EINVAL);
    m = good_migrate();
    m.qmp_path = (char *)"vm1.qmp";
    assert_int_equal(migrate_through(&m, &err), -EINVAL);
    m = good_migrate();
    m.name = (char *)"../vm1";
    assert_int_equal(migrate_through(&m, &err), -EINVAL);
}

static void test_process_is_checked(void **state)
{
    (void)state;
    struct mf_error err;
    char long_command[MF_CONTROL_COMMAND_MAX_BYTES + 1];
    memset(long_command, 'x', sizeof(long_command));
    long_command[sizeof(long_command) - 1] = '\0';
    Memferry__Control__RegionChoice region = MEMFERRY__CONTROL__REGION_CHOICE__INIT;
    Memferry__Control__RegionChoice *regions[MF_CHOICES_MAX + 1];
    for (size_t i = 0; i <= MF_CHOICES_MAX; i++)
        regions[i] = &region;
    region.name = (char *)"heap";
    region.what = (char *)"memfd:heap";
    Memferry__Control__Process good = MEMFERRY__CONTROL__PROCESS__INIT;
    good.pid = 1234;
    good.save = (char *)"save";
    good.timeout_s = MF_CONTROL_TIMEOUT_MAX_S;
    good.regions = regions;
    good.n_regions = 1;
    Memferry__Control__Process process = good;
    Memferry__Control__MigrateRequest m = good_migrate();
    m.process = &process;
    assert_int_equal(migrate_through(&m, &err), -EINVAL); /* a QEMU as well */
    assert_non_null(strstr(err.text, "do not go together"));
    m.qmp_path = (char *)"";
    assert_int_equal(migrate_through(&m, &err), 0);
    process.pid = 1;
    assert_int_equal(migrate_through(&m, &err), -EINVAL);
    process.pid = UINT32_MAX;
    assert_int_equal(migrate_through(&m, &err), -EINVAL);
    process = good;
    process.save = (char *)"";
    assert_int_equal(migrate_through(&m, &err), -EINVAL);
    assert_non_null(strstr(err.text, "--save"));
    process = good;
    process.resume = long_command;
    assert_int_equal(migrate_through(&m, &err), -EINVAL);
    process = good;
    process.timeout_s++;
    assert_int_equal(migrate_through(&m, &err), -EINVAL);
    process = good;
    process.n_regions = MF_CHOICES_MAX + 1;
    assert_int_equal(migrate_through(&m, &err), -EINVAL);
    process = good;
    region.name = (char *)"a=b";
    assert_int_equal(migrate_through(&m, &err), -EINVAL);
    region.name = (char *)"heap";
    region.what = (char *)"relative";
    assert_int_equal(migrate_through(&m, &err), -EINVAL);
    region.what = (char *)"anon:heap";
    assert_int_equal(migrate_through(&m, &err), 0);

    Memferry__Control__ReceiveRequest receive = MEMFERRY__CONTROL__RECEIVE_REQUEST__INIT;
    Memferry__Control__Request request = MEMFERRY__CONTROL__REQUEST__INIT;
    request.verb_case = MEMFERRY__CONTROL__REQUEST__VERB_RECEIVE;
    request.receive = &receive;
    receive.name = (char *)"vm1";
    receive.process = &process;
    assert_int_equal(through(&request, &err), -EINVAL);
    assert_non_null(strstr(err.text, "--load"));
    process.load = (char *)"load";
    assert_int_equal(through(&request, &err), 0);
    receive.process = NULL;
    assert_int_equal(through(&request, &err), -EINVAL); /* neither */
}

static void test_rounds_are_checked(void **state)
{
    (void)state;
    static const struct {
        const char *mode;
        uint32_t max_rounds, switch_after_s, max_blackout_ms;
        bool fallback;
        int rc;
    } cases[] = {
        {"", 0, 0, 0, false, 0},
        {"hybrid", MF_CONTROL_ROUNDS_MAX, MF_CONTROL_SWITCH_AFTER_MAX_S, 0, false, 0},
        {"precopy", 1, 1, MF_CONTROL_BLACKOUT_MAX_MS, true, 0},
        {"postcopy", 0, 0, 0, false, 0},
        {"Hybrid", 0, 0, 0, false, -EINVAL},
        {"hybrid ", 0, 0, 0, false, -EINVAL},
        {"hybrid", MF_CONTROL_ROUNDS_MAX + 1, 0, 0, false, -EINVAL},
        {"hybrid", 0, MF_CONTROL_SWITCH_AFTER_MAX_S + 1, 0, false, -EINVAL},
        {"precopy", 0, 0, MF_CONTROL_BLACKOUT_MAX_MS + 1, false, -EINVAL},
        {"", 0, 0, 1, false, -EINVAL},
        {"", 0, 0, 0, true, -EINVAL},
        {"hybrid", 0, 0, 0, true, -EINVAL},
        {"postcopy", 1, 0, 0, false, -EINVAL},
        {"postcopy", 0, 1, 0, false, -EINVAL},
        {"postcopy", 0, 0, 1, false, -EINVAL},
        {"postcopy", 0, 0, 0, true, -EINVAL},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct mf_error err = {.text = ""};
        Memferry__Control__MigrateRequest m = good_migrate();
        m.mode = (char *)cases[i].mode;
        m.max_rounds = cases[i].max_rounds;
        m.switch_after_s = cases[i].switch_after_s;
        m.max_blackout_ms = cases[i].max_blackout_ms;
        m.fallback = cases[i].fallback;
        if (migrate_through(&m, &err) != cases[i].rc)
            fail_msg("case %zu: %s", i, err.text);
        assert_int_equal(err.text[0] != '\0', cases[i].rc != 0);
    }
    assert_string_equal(mf_control_mode(""), "hybrid");
    assert_string_equal(mf_control_mode("precopy"), "precopy");
    assert_null(mf_control_mode("pre"));
}

static void test_bandwidth_is_checked(void **state)
{
    (void)state;
    static const struct {
        uint64_t bits_s;
        int rc;
    } cases[] = {{0, 0},
                 {1, -EINVAL},
                 {MF_CONTROL_BANDWIDTH_MIN_BITS_S - 1, -EINVAL},
                 {MF_CONTROL_BANDWIDTH_MIN_BITS_S, 0},
                 {MF_CONTROL_BANDWIDTH_MAX_BITS_S, 0},
                 {MF_CONTROL_BANDWIDTH_MAX_BITS_S + 1, -EINVAL},
                 {UINT64_MAX, -EINVAL}};
    struct mf_error err;
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        Memferry__Control__MigrateRequest m = good_migrate();
        m.bandwidth_bits_s = cases[i].bits_s;
        assert_int_equal(migrate_through(&m, &err), cases[i].rc);
        Memferry__Control__SetRequest set = MEMFERRY__CONTROL__SET_REQUEST__INIT;
        set.name = (char *)"vm1";
        set.bandwidth_bits_s = cases[i].bits_s;
        Memferry__Control__Request request = MEMFERRY__CONTROL__REQUEST__INIT;
        request.verb_case = MEMFERRY__CONTROL__REQUEST__VERB_SET;
        request.set = &set;
        assert_int_equal(through(&request, &err), cases[i].rc);
        set.name = (char *)"";
        assert_int_equal(through(&request, &err), -EINVAL);
    }
}

static void test_names_of_every_verb(void **state)
{
    (void)state;
    struct mf_error err;
    Memferry__Control__NameRequest name = MEMFERRY__CONTROL__NAME_REQUEST__INIT;
    Memferry__Control__StatusRequest status = MEMFERRY__CONTROL__STATUS_REQUEST__INIT;
    Memferry__Control__Request request = MEMFERRY__CONTROL__REQUEST__INIT;
    request.verb_case = MEMFERRY__CONTROL__REQUEST__VERB_STATUS;
    request.status = &status;
    assert_int_equal(through(&request, &err), 0);
    status.name = (char *)"a/b";
    assert_int_equal(through(&request, &err), -EINVAL);

    static const Memferry__Control__Request__VerbCase verbs[] = {
        MEMFERRY__CONTROL__REQUEST__VERB_CANCEL, MEMFERRY__CONTROL__REQUEST__VERB_FORGET,
        MEMFERRY__CONTROL__REQUEST__VERB_WATCH, MEMFERRY__CONTROL__REQUEST__VERB_SWITCH_NOW};
    for (size_t i = 0; i < sizeof(verbs) / sizeof(verbs[0]); i++) {
        request.verb_case = verbs[i];
        request.cancel = &name; /* all of them are the same member of the union */
        name.name = (char *)"vm1";
        assert_int_equal(through(&request, &err), 0);
        name.name = (char *)"";
        assert_int_equal(through(&request, &err), -EINVAL);
    }
}

static void test_not_a_request(void **state)
{
    (void)state;
    Memferry__Control__Request *out = NULL;
    const uint8_t junk[] = {0xff, 0xff, 0xff, 0xff}, newer[] = {0xfa, 0x01, 0x00};
    assert_int_equal(mf_control_request(junk, sizeof(junk), &out, NULL), -EPROTO);
    assert_int_equal(mf_control_request(newer, sizeof(newer), &out, NULL), -EPROTO);
    assert_int_equal(mf_control_request(junk, 0, &out, NULL), -EPROTO);
    assert_null(out);
}

static void test_endpoints(void **state)
{
    (void)state;
    static const struct {
        const char *text, *host;
        uint16_t port;
    } good[] = {{"b", "b", 0},
                {"b.example.org:1", "b.example.org", 1},
                {"192.0.2.1:65535", "192.0.2.1", 65535},
                {"[::1]", "::1", 0},
                {"[2001:db8::1]:7466", "2001:db8::1", 7466},
                {"[fe80::1%eth0]:7466", "fe80::1%eth0", 7466},
                {":7466", "", 7466},
                {"", "", 0}};
    for (size_t i = 0; i < sizeof(good) / sizeof(good[0]); i++) {
        struct mf_endpoint endpoint;
        assert_int_equal(mf_endpoint_parse(good[i].text, &endpoint, NULL), 0);
        assert_string_equal(endpoint.host, good[i].host);
        assert_int_equal(endpoint.port, good[i].port);
    }
    static const char *const bad[] = {"::1",        "[::1",    "[::1]x",
                                      "[]",         "[::1]:",  "b:",
                                      "b:0",        "b:65536", "b:99999999999999999999",
                                      "b: 1",       "b c",     "-b",
                                      "[fe80::1%]", "b:1:2",   "[127.0.0.1]"};
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        struct mf_endpoint endpoint;
        if (mf_endpoint_parse(bad[i], &endpoint, NULL) != -EINVAL)
            fail_msg("'%s' was taken for an endpoint", bad[i]);
    }
    char text[300];
    mf_endpoint_print("::1", 7466, text, sizeof(text));
    assert_string_equal(text, "[::1]:7466");
    mf_endpoint_print("b", 7466, text, sizeof(text));
    assert_string_equal(text, "b:7466");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_whole_only_when_all_is_there),
        cmocka_unit_test(test_length_is_limited),
        cmocka_unit_test(test_migrate_is_checked),
        cmocka_unit_test(test_process_is_checked),
        cmocka_unit_test(test_rounds_are_checked),
        cmocka_unit_test(test_bandwidth_is_checked),
        cmocka_unit_test(test_names_of_every_verb),
        cmocka_unit_test(test_not_a_request),
        cmocka_unit_test(test_endpoints),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
