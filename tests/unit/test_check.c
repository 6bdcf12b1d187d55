/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* lib/check.c: the form of its answers, whatever the machine is like, and that it leaves nothing
 * behind. */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>

#include <cmocka.h>

#include "lib/check.h"
#include "lib/util.h"

static unsigned open_files(void)
{
    unsigned count = 0;
    cleanup_closedir DIR *dir = opendir("/proc/self/fd");
    while (readdir(dir))
        count++;
    return count;
}

static void rows_are_well_formed(void **state)
{
    (void)state;
    struct mf_check rows[MF_CHECKS_MAX];
    unsigned files = open_files();
    size_t count = mf_check_host(rows, MF_CHECKS_MAX);
    assert_in_range(count, 10, MF_CHECKS_MAX);
    const struct mf_check *first = NULL;
    for (size_t i = 0; i < count; i++) {
        assert_int_equal(strspn(rows[i].name, "abcdefghijklmnopqrstuvwxyz-"), strlen(rows[i].name));
        for (size_t k = 0; k < i; k++)
            assert_string_not_equal(rows[i].name, rows[k].name);
        assert_true(rows[i].title[0] && rows[i].found[0]);
        assert_int_equal(rows[i].state == MF_CHECK_OK, rows[i].remedy[0] == '\0');
        if (!first && rows[i].state == MF_CHECK_MISSING)
            first = &rows[i];
    }
    assert_ptr_equal(mf_check_first_missing(rows, count), first);
    assert_int_equal(open_files(), files);
    assert_int_equal(waitpid(-1, NULL, WNOHANG), -1);
    assert_int_equal(errno, ECHILD);
}

static void keeps_to_the_room_it_has(void **state)
{
    (void)state;
    struct mf_check rows[3] = {[2] = {.name = "untouched"}};
    assert_int_equal(mf_check_host(rows, 2), 2);
    assert_string_equal(rows[2].name, "untouched");
    assert_int_equal(mf_check_host(rows, 0), 0);
    assert_null(mf_check_first_missing(rows, 0));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(rows_are_well_formed),
        cmocka_unit_test(keeps_to_the_room_it_has),
    };
    return cmocka_run_group_tests_name("check", tests, NULL, NULL);
}
