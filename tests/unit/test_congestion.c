/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Which congestion control a connection gets: over real connections on the loopback interface,
 * since the kernel decides what is allowed. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <arpa/inet.h>
#include <cmocka.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "lib/congestion.h"

struct pair {
    int fd[2];
};

static void connect_pair(struct pair *pair)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof(address);
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_true(listener >= 0);
    assert_int_equal(bind(listener, (struct sockaddr *)&address, sizeof(address)), 0);
    assert_int_equal(listen(listener, 1), 0);
    assert_int_equal(getsockname(listener, (struct sockaddr *)&address, &length), 0);
    pair->fd[0] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_int_equal(connect(pair->fd[0], (struct sockaddr *)&address, sizeof(address)), 0);
    pair->fd[1] = accept4(listener, (struct sockaddr *)&address, &length, SOCK_CLOEXEC);
    assert_true(pair->fd[1] >= 0);
    close(listener);
    char byte = 0;
    for (unsigned i = 0; i < 2; i++) {
        assert_int_equal(send(pair->fd[i], &byte, 1, 0), 1);
        assert_int_equal(recv(pair->fd[1 - i], &byte, 1, 0), 1);
    }
}

static void disconnect(const struct pair *pair)
{
    close(pair->fd[0]);
    close(pair->fd[1]);
}

static void get(int fd, char name[MF_CONGESTION_MAX])
{
    socklen_t length = MF_CONGESTION_MAX;
    assert_int_equal(getsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, name, &length), 0);
}

static int set(int fd, const char *name)
{
    return setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, name, (socklen_t)strlen(name));
}

static void test_a_name_is_used(void **state)
{
    (void)state;
    struct pair pair;
    char used[MF_CONGESTION_MAX], now[MF_CONGESTION_MAX];
    struct mf_error err;
    assert_int_equal(mf_congestion_check("reno", &err), 0);
    connect_pair(&pair);
    assert_int_equal(mf_congestion_apply(pair.fd[0], "reno", used), 1);
    get(pair.fd[0], now);
    assert_string_equal(now, "reno");
    assert_string_equal(used, "reno");
    disconnect(&pair);
}

static void test_system_changes_nothing(void **state)
{
    (void)state;
    struct pair pair;
    char used[MF_CONGESTION_MAX], before[MF_CONGESTION_MAX], now[MF_CONGESTION_MAX];
    connect_pair(&pair);
    get(pair.fd[0], before);
    assert_int_equal(mf_congestion_apply(pair.fd[0], "system", used), 0);
    get(pair.fd[0], now);
    assert_string_equal(now, before);
    assert_string_equal(used, before);
    disconnect(&pair);
}

/* An algorithm that somebody chose for his network and that does not pace stays. */
static void test_auto_keeps_what_does_not_pace(void **state)
{
    (void)state;
    struct pair pair;
    char used[MF_CONGESTION_MAX], now[MF_CONGESTION_MAX];
    connect_pair(&pair);
    assert_int_equal(set(pair.fd[0], "reno"), 0);
    assert_int_equal(mf_congestion_apply(pair.fd[0], "auto", used), 0);
    get(pair.fd[0], now);
    assert_string_equal(now, "reno");
    assert_string_equal(used, "reno");
    disconnect(&pair);
}

static void test_auto_replaces_bbr_on_a_short_way(void **state)
{
    (void)state;
    struct pair pair;
    char used[MF_CONGESTION_MAX], now[MF_CONGESTION_MAX];
    connect_pair(&pair);
    if (set(pair.fd[0], "bbr") != 0) {
        print_message("skipped: this kernel has no BBR (tcp_bbr), or does not allow it: %s\n",
                      strerror(errno));
        disconnect(&pair);
        skip();
    }
    assert_int_equal(mf_congestion_apply(pair.fd[0], "auto", used), 1);
    get(pair.fd[0], now);
    assert_true(strcmp(now, "cubic") == 0 || strcmp(now, "reno") == 0);
    assert_string_equal(used, now);
    disconnect(&pair);
}

static void test_what_is_no_connection_stays(void **state)
{
    (void)state;
    int fd[2];
    char used[MF_CONGESTION_MAX];
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fd), 0);
    assert_int_equal(mf_congestion_apply(fd[0], "auto", used), 0);
    assert_string_equal(used, "");
    assert_int_equal(mf_congestion_apply(fd[0], "reno", used), 0);
    close(fd[0]);
    close(fd[1]);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_name_is_used),
        cmocka_unit_test(test_system_changes_nothing),
        cmocka_unit_test(test_auto_keeps_what_does_not_pace),
        cmocka_unit_test(test_auto_replaces_bbr_on_a_short_way),
        cmocka_unit_test(test_what_is_no_connection_stays),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
