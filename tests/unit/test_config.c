/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "daemon/memferryd/daemon.h"
#include "lib/log.h"
#include "lib/util.h"

/* Loads a configuration text into the defaults. */
static int load(struct config *config, const char *text, struct mf_error *err)
{
    cleanup_close int fd = memfd_create("memferryd.conf", MFD_CLOEXEC);
    char path[64];
    assert_int_equal(mf_write_all(fd, text, strlen(text)), 0);
    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    config_defaults(config);
    return config_load(config, path, err);
}

static void test_defaults_listen_on_this_host_only(void **state)
{
    (void)state;
    struct config config;
    config_defaults(&config);
    assert_string_equal(config.listen_address, "127.0.0.1");
    assert_int_equal(config.listen_port, 7466);
    assert_string_equal(config.runtime_dir, "/run/memferry");
    assert_in_range(config.streams, 1, 4); /* by the number of processors */
    assert_int_equal(config.log_level, MF_LOG_INFO);
    assert_string_equal(config.mover_path, "");
    assert_string_equal(config.congestion, "auto");
    assert_true(config.mover_user[0]);
}

static void test_every_setting(void **state)
{
    (void)state;
    struct config config;
    struct mf_error err = {.text = ""};
    int rc = load(&config,
                  "# a comment\n"
                  "[memferryd]\n"
                  "runtime-dir = /tmp/mf   ; behind a value\n"
                  "listen = [::1]:7000\n"
                  "streams=16\n"
                  "mover-user = nobody\n"
                  "mover-path = /opt/memferry-mover\n"
                  "congestion-control = reno\n"
                  "log-level = debug",
                  &err);
    assert_string_equal(err.text, "");
    assert_int_equal(rc, 0);
    assert_string_equal(config.runtime_dir, "/tmp/mf");
    assert_string_equal(config.listen_address, "::1");
    assert_int_equal(config.listen_port, 7000);
    assert_int_equal(config.streams, 16);
    assert_string_equal(config.mover_user, "nobody");
    assert_string_equal(config.mover_path, "/opt/memferry-mover");
    assert_string_equal(config.congestion, "reno");
    assert_int_equal(config.log_level, MF_LOG_DEBUG);
}

static void test_mistakes_name_the_line(void **state)
{
    (void)state;
    static const struct {
        const char *text, *line, *says;
    } mistakes[] = {
        {"streams = 4\n", ":1: ", "before any section"},
        {"[memferry]\nstreams = 4\n", ":2: ", "another section"},
        {"[memferryd]\n\nstream = 4\n", ":3: ", "no setting 'stream'"},
        {"[memferryd]\nstreams = 0\n", ":2: ", "1 to 16"},
        {"[memferryd]\nstreams = 17\n", ":2: ", "1 to 16"},
        {"[memferryd]\nstreams = -1\n", ":2: ", "1 to 16"},
        {"[memferryd]\nstreams = 4\nlisten = :7466\nstreams = 5\n",
         ":4: ", "second time (first in line 2)"},
        {"[memferryd]\nstreams = 4\n  5\n", ":3: ", "second time"},
        {"[memferryd]\nlisten = somewhere:7466\n", ":2: ", "not a numeric address"},
        {"[memferryd]\nlisten = ::1\n", ":2: ", "brackets"},
        {"[memferryd]\nlisten = :0\n", ":2: ", "1 to 65535"},
        {"[memferryd]\nlisten =\n", ":2: ", "empty address"},
        {"[memferryd]\nruntime-dir = run\n", ":2: ", "absolute"},
        {"[memferryd]\nmover-path = mover\n", ":2: ", "absolute"},
        {"[memferryd]\nmover-user = nobody-of-that-name\n", ":2: ", "no such user"},
        {"[memferryd]\nmover-user = root\n", ":2: ", "must not run as root"},
        {"[memferryd]\nlog-level = 7\n", ":2: ", "one of error"},
        {"[memferryd]\ncongestion-control = fastest\n", ":2: ", "auto, system or one of those"},
        {"[memferryd]\ncongestion-control =\n", ":2: ", "auto, system or one of those"},
        {"[memferryd]\ncongestion-control = reno-reno-reno-reno\n", ":2: ", "auto, system or one"},
        {"[memferryd]\nlog-level\n", ":2: ", "neither a [section] nor"},
        {"[memferryd\nstreams = 4\n", ":1: ", "neither a [section] nor"},
    };
    for (size_t i = 0; i < sizeof(mistakes) / sizeof(mistakes[0]); i++) {
        struct config config, before;
        struct mf_error err = {.text = ""};
        config_defaults(&before);
        assert_int_equal(load(&config, mistakes[i].text, &err), -EINVAL);
        if (!strstr(err.text, mistakes[i].line) || !strstr(err.text, mistakes[i].says))
            fail_msg("'%s' gave '%s'", mistakes[i].text, err.text);
        assert_memory_equal(&config, &before, sizeof(config));
    }
}

static void test_long_lines_are_not_cut_in_two(void **state)
{
    (void)state;
    char text[600];
    int start = snprintf(text, sizeof(text), "[memferryd]\nruntime-dir = /");
    memset(text + start, 'x', sizeof(text) - (size_t)start);
    text[sizeof(text) - 1] = '\0';
    struct config config;
    struct mf_error err;
    assert_int_equal(load(&config, text, &err), -EINVAL);
    assert_non_null(strstr(err.text, ":2: the line is longer than"));
}

static void test_missing_file_and_directory(void **state)
{
    (void)state;
    struct config config;
    struct mf_error err;
    config_defaults(&config);
    assert_int_equal(config_load(&config, "/nonexistent/memferryd.conf", &err), -ENOENT);
    assert_non_null(strstr(err.text, "/nonexistent/memferryd.conf"));
    assert_int_equal(config_load(&config, "/", &err), -EISDIR);
}

static void test_listen_keeps_what_is_not_named(void **state)
{
    (void)state;
    struct config config;
    config_defaults(&config);
    assert_int_equal(config_listen(&config, ":7000", NULL), 0);
    assert_string_equal(config.listen_address, "127.0.0.1");
    assert_int_equal(config_listen(&config, "192.0.2.1", NULL), 0);
    assert_string_equal(config.listen_address, "192.0.2.1");
    assert_int_equal(config.listen_port, 7000);
    assert_int_equal(config_listen(&config, "[fe80::1%eth0]", NULL), 0);
    assert_string_equal(config.listen_address, "fe80::1%eth0");
    assert_int_equal(config_listen(&config, "", NULL), -EINVAL);
    assert_int_equal(config_listen(&config, ":", NULL), -EINVAL);
    assert_int_equal(config_listen(&config, "localhost", NULL), -EINVAL);
    assert_int_equal(config_listen(&config, "127.1", NULL), -EINVAL);
    assert_string_equal(config.listen_address, "fe80::1%eth0");
}

/* The example that is installed is one that loads. @state: nothing; its path comes from meson. */
static void test_example(void **state)
{
    (void)state;
    struct config config, defaults;
    struct mf_error err = {.text = ""};
    config_defaults(&config);
    config_defaults(&defaults);
    config_load(&config, MF_EXAMPLE_CONFIG, &err);
    assert_string_equal(err.text, "");
    assert_memory_equal(&config, &defaults, sizeof(config));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_defaults_listen_on_this_host_only),
        cmocka_unit_test(test_every_setting),
        cmocka_unit_test(test_mistakes_name_the_line),
        cmocka_unit_test(test_long_lines_are_not_cut_in_two),
        cmocka_unit_test(test_missing_file_and_directory),
        cmocka_unit_test(test_listen_keeps_what_is_not_named),
        cmocka_unit_test(test_example),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
