/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* lib/error.c, lib/util.c */
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "lib/error.h"
#include "lib/util.h"

static void fails_with_a_sentence(void **state)
{
    (void)state;
    struct mf_error err = {0};
    assert_int_equal(mf_fail(&err, EBUSY, "VM '%s' is busy", "vm1"), -EBUSY);
    assert_int_equal(err.code, EBUSY);
    assert_string_equal(err.text, "VM 'vm1' is busy");
    assert_int_equal(mf_fail(NULL, EPERM, "nobody listens"), -EPERM);
    assert_int_equal(mf_fail(&err, EIO, "%01000d", 7), -EIO); /* longer than there is room for */
    assert_int_equal(strlen(err.text), sizeof(err.text) - 1);
    /* A process may call itself anything, and this ends on a terminal. */
    mf_fail(&err, EIO, "%s", "\033]0;x\a \302\233 \177 \303\244");
    assert_string_equal(err.text, "?]0;x? ?? ? \303\244");
}

static void names_of_sessions(void **state)
{
    (void)state;
    static const char *const good[] = {"a", "vm1", "VM_1.b-c", "0", "_x"};
    static const char *const bad[] = {"",    ".",   "..", ".a",  "-a", "a/b",
                                      "a b", "a\n", "ä",  "a:b", "a%s"};
    for (size_t i = 0; i < sizeof(good) / sizeof(good[0]); i++)
        assert_true(mf_name_valid(good[i]));
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++)
        assert_false(mf_name_valid(bad[i]));
    char longest[MF_NAME_MAX + 2];
    memset(longest, 'a', sizeof(longest));
    longest[MF_NAME_MAX] = '\0';
    assert_true(mf_name_valid(longest));
    longest[MF_NAME_MAX] = 'a';
    longest[MF_NAME_MAX + 1] = '\0';
    assert_false(mf_name_valid(longest));
}

static void writes_everything(void **state)
{
    (void)state;
    int ends[2];
    char out[1000], in[1000];
    assert_int_equal(pipe2(ends, O_CLOEXEC), 0);
    memset(out, 'w', sizeof(out));
    assert_int_equal(mf_write_all(ends[1], out, sizeof(out)), 0);
    assert_int_equal(mf_write_all(ends[1], out, 0), 0);
    assert_int_equal(read(ends[0], in, sizeof(in)), sizeof(in));
    assert_memory_equal(in, out, sizeof(in));
    close(ends[1]);
    assert_int_equal(mf_write_all(ends[0], out, 1), -EBADF);
    close(ends[0]);
}

static void cleans_up(void **state)
{
    (void)state;
    int fd = dup(STDIN_FILENO), kept;
    assert_true(fd >= 0);
    {
        cleanup_close int owner = fd;
        kept = mf_steal_fd(&owner);
        assert_int_equal(owner, -1);
    }
    assert_int_equal(fcntl(kept, F_GETFD), 0);
    {
        cleanup_close int owner = kept;
        (void)owner;
    }
    assert_int_equal(fcntl(kept, F_GETFD), -1);
    uint64_t before_ns = mf_now_ns();
    assert_true(mf_now_ns() >= before_ns);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(fails_with_a_sentence),
        cmocka_unit_test(names_of_sessions),
        cmocka_unit_test(writes_everything),
        cmocka_unit_test(cleans_up),
    };
    return cmocka_run_group_tests_name("error and util", tests, NULL, NULL);
}
