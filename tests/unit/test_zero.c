/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* lib/zero.c: every single bit that is set is seen, wherever it is; nothing behind the end is
 * looked at. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "lib/zero.h"

#define PAGE 4096u

static void sees_every_bit(void **state)
{
    (void)state;
    static _Alignas(64) uint8_t page[2 * PAGE];
    for (size_t length = 256; length <= sizeof(page); length *= 2) {
        assert_true(mf_is_zero(page, length));
        for (size_t at = 0; at < length; at++) {
            page[at] = (uint8_t)(1u << (at % 8));
            assert_false(mf_is_zero(page, length));
            page[at] = 0;
        }
    }
    assert_true(mf_is_zero(page, 768));
    /* Bits that cancel each other out in a sum or an exclusive or. */
    memset(page, 0x80, 2);
    page[64] = page[128] = 0xff;
    assert_false(mf_is_zero(page, PAGE));
}

static void looks_no_further(void **state)
{
    (void)state;
    uint8_t *room =
        mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    assert_ptr_not_equal(room, MAP_FAILED);
    assert_int_equal(mprotect(room + PAGE, PAGE, PROT_NONE), 0);
    for (size_t length = 256; length <= PAGE; length += 256) {
        uint8_t *at = room + PAGE - length;
        assert_true(mf_is_zero(at, length)); /* reading on would end the test */
        at[length - 1] = 1;
        assert_false(mf_is_zero(at, length));
        at[length - 1] = 0;
        if (at > room)
            at[-1] = 1; /* what lies before is not looked at either */
        assert_true(mf_is_zero(at, length));
        if (at > room)
            at[-1] = 0;
    }
    munmap(room, 2 * PAGE);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sees_every_bit),
        cmocka_unit_test(looks_no_further),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
