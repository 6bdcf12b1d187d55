/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "daemon/memferry/monitor_output.h"
#include "daemon/memferry/progress.h"
#include "daemon/memferry/show.h"
#include "daemon/memferry/units.h"
#include "daemon/memferry/verbs.h"
#include "lib/util.h"

#define PARSE(args, err, ...)                                                                      \
    cli_parse((int)(sizeof((char *[]){"memferry", __VA_ARGS__}) / sizeof(char *)),                 \
              (char *[]){"memferry", __VA_ARGS__, NULL}, cli_verbs, args, err)

static void test_everything_of_migrate(void **state)
{
    (void)state;
    struct cli_args args;
    assert_int_equal(PARSE(&args, NULL, "--runtime-dir", "/r", "migrate", "vm1", "--qmp", "q.sock",
                           "--to", "[2001:db8::1]:7000", "--json", "--detach", "--keep-source",
                           "--streams", "16"),
                     0);
    assert_string_equal(args.verb->word, "migrate");
    assert_string_equal(args.runtime_dir, "/r");
    assert_string_equal(args.name, "vm1");
    assert_string_equal(args.qmp_path, "q.sock");
    assert_string_equal(args.to.host, "2001:db8::1");
    assert_int_equal(args.to.port, 7000);
    assert_int_equal(args.streams, 16);
    assert_true(args.json && args.detach && args.keep_source);
}

static void test_a_process(void **state)
{
    (void)state;
    struct cli_args args;
    struct mf_error err;
    assert_int_equal(PARSE(&args, &err, "migrate", "db", "--pid", "4711", "--pause", "p", "--save",
                           "s", "--load", "l", "--resume=r x", "--timeout", "30", "--region",
                           "a=memfd:a", "--region", "b=/dev/shm/b", "--to", "b"),
                     0);
    assert_int_equal(args.process.pid, 4711);
    assert_string_equal(args.process.pause, "p");
    assert_string_equal(args.process.save, "s");
    assert_string_equal(args.process.load, "l");
    assert_string_equal(args.process.resume, "r x");
    assert_int_equal(args.process.timeout_s, 30);
    assert_int_equal(args.process.region_count, 2);
    assert_string_equal(args.process.region[1].name, "b");
    assert_string_equal(args.process.region[1].what, "/dev/shm/b");
    assert_null(args.qmp_path);
    assert_string_equal(args.rounds.mode, "postcopy");
    assert_int_equal(PARSE(&args, &err, "migrate", "db", "--pid", "4711", "--save", "s", "--to",
                           "b", "--mode", "hybrid"),
                     0);
    assert_string_equal(args.rounds.mode, "hybrid");
    assert_int_equal(PARSE(&args, &err, "receive", "db", "--pid", "4711", "--load", "true"), 0);
    assert_string_equal(args.process.pause, "");
    assert_int_equal(PARSE(&args, &err, "check", "--pid", "4711", "--region", "a=0x1000"), 0);
    assert_int_equal(args.process.region_count, 1);
}

static void test_defaults(void **state)
{
    (void)state;
    struct cli_args args;
    assert_int_equal(PARSE(&args, NULL, "migrate", "vm1", "--qmp=q", "--to=b"), 0);
    assert_string_equal(args.runtime_dir, "/run/memferry");
    assert_int_equal(args.to.port, 0);
    assert_int_equal(args.streams, 0);
    assert_false(args.json || args.detach || args.keep_source);

    assert_int_equal(PARSE(&args, NULL, "status"), 0);
    assert_null(args.name);
    assert_int_equal(PARSE(&args, NULL, "status", "--", "vm"), 0);
    assert_string_equal(args.name, "vm");
}

static void test_rounds_of_migrate(void **state)
{
    (void)state;
    struct cli_args args;
    assert_int_equal(PARSE(&args, NULL, "migrate", "vm1", "--qmp=q", "--to=b"), 0);
    assert_string_equal(args.rounds.mode, "hybrid");
    assert_true(!args.rounds.max_rounds && !args.rounds.switch_after_s &&
                !args.rounds.max_blackout_ms && !args.rounds.fallback);
    assert_true(args.bandwidth_bits_s == 0 && !args.bandwidth_given);

    assert_int_equal(PARSE(&args, NULL, "migrate", "vm1", "--qmp=q", "--to=b", "--fallback",
                           "--max-rounds=1000", "--switch-after", "604800", "--max-blackout",
                           "60000", "--bandwidth=2.5G", "--mode", "precopy"),
                     0);
    assert_string_equal(args.rounds.mode, "precopy");
    assert_int_equal(args.rounds.max_rounds, 1000);
    assert_int_equal(args.rounds.switch_after_s, 604800);
    assert_int_equal(args.rounds.max_blackout_ms, 60000);
    assert_true(args.rounds.fallback);
    assert_int_equal(args.bandwidth_bits_s, 2500000000);

    assert_int_equal(PARSE(&args, NULL, "migrate", "vm1", "--qmp=q", "--to=b", "--mode=postcopy",
                           "--bandwidth", "none"),
                     0);
    assert_string_equal(args.rounds.mode, "postcopy");
    assert_true(args.bandwidth_bits_s == 0 && args.bandwidth_given);
}

static void test_set_and_switch(void **state)
{
    (void)state;
    struct cli_args args;
    assert_int_equal(PARSE(&args, NULL, "set", "vm1", "bandwidth=64k"), 0);
    assert_string_equal(args.verb->word, "set");
    assert_string_equal(args.name, "vm1");
    assert_int_equal(args.bandwidth_bits_s, 64000);
    assert_int_equal(PARSE(&args, NULL, "set", "vm1", "bandwidth=0"), 0);
    assert_int_equal(args.bandwidth_bits_s, 0);
    assert_true(PARSE(&args, NULL, "set", "vm1") < 0);
    assert_int_equal(PARSE(&args, NULL, "set", "--help"), 0);
    assert_int_equal(PARSE(&args, NULL, "switch", "vm1"), 0);
    assert_string_equal(args.name, "vm1");
}

static void test_rates(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        uint64_t bits_s;
    } good[] = {{"none", 0},
                {"0", 0},
                {"0.0", 0},
                {"0M", 0},
                {"0.1", 1},
                {"1", 1},
                {"1k", 1000},
                {"1K", 1000},
                {"100M", 100000000},
                {"2.5G", 2500000000},
                {"2.5g", 2500000000},
                {"0.000001T", 1000000},
                {"1.999999", 1},
                {"1000T", 1000000000000000},
                {"18446744073709551615", UINT64_MAX}};
    for (size_t i = 0; i < sizeof(good) / sizeof(good[0]); i++) {
        uint64_t bits_s = 7;
        assert_int_equal(rate_parse(good[i].text, &bits_s), 0);
        assert_int_equal(bits_s, good[i].bits_s);
    }
    static const struct {
        const char *text;
        int rc;
    } bad[] = {{"", -EINVAL},
               {"G", -EINVAL},
               {".5G", -EINVAL},
               {"1.G", -EINVAL},
               {"1.2.3", -EINVAL},
               {"1.0000001", -EINVAL},
               {"-1M", -EINVAL},
               {"+1M", -EINVAL},
               {" 1M", -EINVAL},
               {"1 M", -EINVAL},
               {"1Mi", -EINVAL},
               {"1P", -EINVAL},
               {"1e9", -EINVAL},
               {"NONE", -EINVAL},
               {"18446744073709551616", -ERANGE},
               {"18446744073709551615k", -ERANGE},
               {"18446744.999999T", -ERANGE},
               {"99999999999999999999x", -EINVAL}};
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        uint64_t bits_s = 7;
        if (rate_parse(bad[i].text, &bits_s) != bad[i].rc)
            fail_msg("'%s' was taken otherwise than expected", bad[i].text);
        assert_int_equal(bits_s, 7);
    }
    assert_string_equal(show_bits(0).text, "0 bit/s");
    assert_string_equal(show_bits(999).text, "999 bit/s");
    assert_string_equal(show_bits(64000).text, "64 kbit/s");
    assert_string_equal(show_bits(2500000000).text, "2.5 Gbit/s");
    assert_string_equal(show_bits(999500000).text, "1.0 Gbit/s");
    assert_string_equal(show_bits(UINT64_MAX).text, "18 Ebit/s");
}

static void test_forecast(void **state)
{
    (void)state;
    struct forecast forecast = {0};
    uint64_t bytes = 0;
    forecast_update(&forecast, 1, 1000);
    forecast_update(&forecast, 1, 400);
    /* Nothing to compare with yet: the rest of the round. */
    assert_true(forecast_bytes(&forecast, 400, false, &bytes));
    assert_int_equal(bytes, 400);
    /* Each round has half of the one before: 300 left, then 250 + 125 + ... */
    forecast_update(&forecast, 2, 500);
    assert_true(forecast_bytes(&forecast, 300, false, &bytes));
    assert_int_equal(bytes, 800);
    /* No less than before: an end only if the rest may follow. */
    forecast_update(&forecast, 3, 500);
    assert_false(forecast_bytes(&forecast, 500, false, &bytes));
    assert_true(forecast_bytes(&forecast, 500, true, &bytes));
    assert_int_equal(bytes, 1000);
    /* A round that was not seen: no comparison. */
    forecast_update(&forecast, 5, 100);
    assert_true(forecast_bytes(&forecast, 100, false, &bytes));
    assert_int_equal(bytes, 100);
    /* An empty round, and one after it. */
    forecast_update(&forecast, 6, 0);
    assert_true(forecast_bytes(&forecast, 0, false, &bytes));
    assert_int_equal(bytes, 0);
    forecast_update(&forecast, 7, 100);
    assert_true(forecast_bytes(&forecast, 100, false, &bytes));
    assert_int_equal(bytes, 100);
    /* It began anew. */
    forecast_update(&forecast, 1, 5000);
    assert_true(forecast_bytes(&forecast, 4000, false, &bytes));
    assert_int_equal(bytes, 4000);
}

static void test_share(void **state)
{
    (void)state;
    Memferry__Control__Session session = MEMFERRY__CONTROL__SESSION__INIT;
    assert_true(show_share(&session) <= 0);
    session.ram_bytes = 1000;
    session.confirmed_bytes = 250;
    session.state = (char *)"precopy";
    assert_int_equal((int)(show_share(&session) * 100), 25);
    session.rounds = 1;
    session.round_left_bytes = 500;
    assert_int_equal((int)(show_share(&session) * 100), 50);
    session.round_left_bytes = 2000;
    assert_true(show_share(&session) <= 0);
    session.state = (char *)"postcopy";
    session.confirmed_bytes = 2000;
    assert_int_equal((int)(show_share(&session) * 100), 100);
}

static void test_help_wants_nothing_else(void **state)
{
    (void)state;
    struct cli_args args;
    assert_int_equal(PARSE(&args, NULL, "migrate", "--help"), 0);
    assert_true(args.help);
    assert_int_equal(PARSE(&args, NULL, "--version"), 0);
    assert_true(args.version);
}

static void test_json_is_known_before_and_after_a_mistake(void **state)
{
    (void)state;
    struct cli_args args;
    struct mf_error err;
    assert_true(PARSE(&args, &err, "migrate", "vm", "--bad", "--json") < 0);
    assert_true(args.json);
    assert_true(PARSE(&args, &err, "migrate", "--json", "vm") < 0);
    assert_true(args.json);
    assert_string_equal(args.name, "vm");
    assert_true(PARSE(&args, &err, "cancel", "vm", "--json") < 0);
    assert_false(args.json);
}

static void test_verbs_require_what_they_allow(void **state)
{
    (void)state;
    for (const struct cli_verb *verb = cli_verbs; verb->word; verb++) {
        assert_int_equal(verb->required & ~verb->allowed, 0);
        assert_non_null(verb->run);
        assert_true(verb->help[strlen(verb->help) - 1] == '\n');
    }
}

static void test_absolute(void **state)
{
    (void)state;
    cleanup_free char *here = getcwd(NULL, 0), *absolute = NULL, *relative = NULL, *root = NULL;
    assert_int_equal(cli_absolute("/a/b", &absolute, NULL), 0);
    assert_string_equal(absolute, "/a/b");
    assert_int_equal(cli_absolute("vm.qmp", &relative, NULL), 0);
    assert_memory_equal(relative, here, strlen(here));
    assert_string_equal(relative + strlen(here), "/vm.qmp");
    assert_int_equal(chdir("/"), 0);
    assert_int_equal(cli_absolute("vm.qmp", &root, NULL), 0);
    assert_string_equal(root, "/vm.qmp");
    assert_int_equal(chdir(here), 0);
}

static void test_units(void **state)
{
    (void)state;
    static const struct {
        uint64_t bytes;
        const char *text;
    } bytes[] = {{0, "0 B"},
                 {1023, "1023 B"},
                 {1024, "1.0 KiB"},
                 {10 * 1024 - 1, "10 KiB"},
                 {(1 << 20) - 1, "1.0 MiB"},
                 {440u << 20, "440 MiB"},
                 {UINT64_MAX, "16 EiB"}};
    for (size_t i = 0; i < sizeof(bytes) / sizeof(bytes[0]); i++)
        assert_string_equal(show_bytes(bytes[i].bytes).text, bytes[i].text);
    static const struct {
        double us;
        const char *text;
    } times[] = {{0, "0 µs"},
                 {180.5, "180 µs"},
                 {999.6, "1.0 ms"},
                 {43210, "43 ms"},
                 {999600, "1.0 s"},
                 {3.21e6, "3.2 s"},
                 {59.96e6, "1 min 00 s"},
                 {125e6, "2 min 05 s"},
                 {11220e6, "3 h 07 min"}};
    for (size_t i = 0; i < sizeof(times) / sizeof(times[0]); i++)
        assert_string_equal(show_us(times[i].us).text, times[i].text);
    assert_string_equal(show_count(0).text, "0");
    assert_string_equal(show_count(999).text, "999");
    assert_string_equal(show_count(1234567).text, "1,234,567");
    assert_string_equal(show_count(UINT64_MAX).text, "18,446,744,073,709,551,615");
}

static void test_rate(void **state)
{
    (void)state;
    const uint64_t second = 1000000000u;
    struct rate rate = {0};
    rate_update(&rate, 0, second);
    assert_true(rate.per_second <= 0);
    rate_update(&rate, 100, 2 * second);
    assert_true(rate.per_second > 99.9 && rate.per_second < 100.1);
    /* Too early to tell anything: no spike. */
    rate_update(&rate, 200, 2 * second + 1000);
    assert_true(rate.per_second < 100.1);
    for (uint64_t i = 3; i < 30; i++)
        rate_update(&rate, 100 + i * 50, i * second);
    assert_true(rate.per_second > 49 && rate.per_second < 51);
    rate_update(&rate, 10, 31 * second);
    assert_true(rate.per_second <= 0);
}

static void test_process_of_monitor(void **state)
{
    (void)state;
    struct cli_args args;
    struct mf_error err;
    assert_int_equal(PARSE(&args, NULL, "monitor", "1234", "--json"), 0);
    assert_int_equal(args.pid, 1234);
    assert_true(args.json);
    static char *const wrong[] = {"0", "-1", "+1", "1x", "vm1", "2147483648", "0x10", ""};
    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        assert_int_equal(PARSE(&args, &err, "monitor", wrong[i]), -EINVAL);
        assert_int_equal(args.pid, 0);
    }
    assert_int_equal(PARSE(&args, &err, "monitor", "--json"), -EINVAL);
    assert_non_null(strstr(err.text, "needs the id of a process"));
    assert_int_equal(PARSE(&args, &err, "monitor", "1", "2"), -EINVAL);
    assert_non_null(strstr(err.text, "one process at a time"));
    assert_int_equal(PARSE(&args, &err, "monitor", "1", "--qmp", "q"), -EINVAL);
}

static void assert_ends(const char *line, const char *wanted)
{
    size_t length = strlen(line), wanted_length = strlen(wanted);
    assert_true(length > wanted_length);
    assert_string_equal(line + length - wanted_length, wanted);
}

static void test_lines_of_monitor(void **state)
{
    (void)state;
    char line[MONITOR_LINE_BYTES];
    struct mf_change change = {.time_us = 1700000000123456,
                               .pid = 12,
                               .tid = 34,
                               .kind = MF_CHANGE_REMAP,
                               .reason = MF_REASON_MREMAP,
                               .start_addr = UINT64_C(0x7f0000000000),
                               .end_addr = UINT64_C(0x7f0140000000),
                               .to_addr = UINT64_C(0x7e0000000000)};
    size_t length = monitor_json(&change, line);
    assert_int_equal(length, strlen(line));
    assert_string_equal(line, "{\"time_us\": 1700000000123456, \"pid\": 12, \"tid\": 34, "
                              "\"event\": \"remap\", \"start\": 139637976727552, "
                              "\"end\": 139643345436672, \"to\": 138538465099776, "
                              "\"reason\": \"mremap\"}\n");
    length = monitor_line(&change, line);
    assert_int_equal(length, strlen(line));
    assert_ends(line, ".123456       12       34  remap   7f0000000000-7f0140000000    5.0 GiB  "
                      "mremap to 7e0000000000\n");
    size_t reason_at = strlen(monitor_header()) - strlen("REASON\n");
    assert_int_equal(strncmp(line + reason_at, "mremap", 6), 0);

    change = (struct mf_change){
        .pid = 12, .kind = MF_CHANGE_FORK, .reason = MF_REASON_FORK, .child = 99};
    monitor_json(&change, line);
    assert_ends(line, "\"to\": 0, \"reason\": \"fork\", \"child\": 99}\n");
    monitor_line(&change, line);
    assert_ends(line, "12        -  fork    -                                  -  fork of 99\n");

    /* The longest there can be. */
    memset(&change, 0xff, sizeof(change));
    change.time_us = UINT64_MAX / 1000000;
    change.pid = change.tid = change.child = INT_MIN;
    change.kind = MF_CHANGE_REMAP;
    change.reason = MF_REASON_MMAP_OVER;
    assert_true(monitor_json(&change, line) < sizeof(line));
    assert_true(monitor_line(&change, line) < sizeof(line));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_process_of_monitor),
        cmocka_unit_test(test_lines_of_monitor),
        cmocka_unit_test(test_everything_of_migrate),
        cmocka_unit_test(test_a_process),
        cmocka_unit_test(test_defaults),
        cmocka_unit_test(test_rounds_of_migrate),
        cmocka_unit_test(test_set_and_switch),
        cmocka_unit_test(test_rates),
        cmocka_unit_test(test_forecast),
        cmocka_unit_test(test_share),
        cmocka_unit_test(test_help_wants_nothing_else),
        cmocka_unit_test(test_json_is_known_before_and_after_a_mistake),
        cmocka_unit_test(test_verbs_require_what_they_allow),
        cmocka_unit_test(test_absolute),
        cmocka_unit_test(test_units),
        cmocka_unit_test(test_rate),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
