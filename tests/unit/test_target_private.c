/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* lib/target_private.c: ranges of maps as the kernel writes them, and this process's own memory. */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cmocka.h>

#include "lib/target.h"
#include "lib/util.h"

#define PAGE 4096u

static size_t parse(const char *const *lines, struct mf_vma *vmas)
{
    size_t count = 0;
    for (; lines[count]; count++)
        assert_int_equal(mf_vma_parse(lines[count], &vmas[count]), 0);
    return count;
}

static const char *const maps[] = {
    "10000-20000 rw-p 00000000 00:00 0                          [heap]\n",
    "30000-32000 rw-p 00000000 00:00 0                          [anon:arena]\n",
    "32000-33000 r--p 00000000 00:00 0                          [anon:arena]\n",
    "33000-35000 ---p 00000000 00:00 0 \n",
    "40000-41000 rw-p 00000000 00:00 0                          [anon:split]\n",
    "42000-43000 rw-p 00000000 00:00 0                          [anon:split]\n",
    "50000-51000 rw-p 00003000 00:1a 4711                       /lib/libc.so\n",
    "51000-52000 rw-s 00000000 00:01 7                          /dev/zero (deleted)\n",
    "60000-61000 rw-p 00000000 00:0f 9                          /anon_hugepage (deleted)\n",
    "7ff000-800000 rw-p 00000000 00:00 0                        [stack]\n",
    NULL,
};

static int find(const char *where, uint64_t size_bytes, struct mf_region_source *out,
                struct mf_error *err)
{
    struct mf_vma vmas[16];
    size_t count = parse(maps, vmas);
    return mf_target_region(getpid(), vmas, count, "mem", where, size_bytes, true, out, err);
}

static void finds(const char *where, uint64_t start_addr, uint64_t length_bytes)
{
    struct mf_region_source found;
    struct mf_error err = {0};
    if (find(where, 0, &found, &err) != 0)
        fail_msg("%s", err.text);
    assert_true(found.start_addr == start_addr && found.size_bytes == length_bytes);
    assert_true(found.kind == MF_MEMORY_PRIVATE && found.page_bytes == PAGE && found.fd >= 0);
    assert_string_equal(found.name, "mem");
    close(found.fd);
}

static void finds_by_name_and_by_addresses(void **state)
{
    (void)state;
    finds("anon:arena", 0x30000, 0x3000);
    finds("anon:30000-35000", 0x30000, 0x5000);
    finds("anon:31000-33000", 0x31000, 0x2000);
    finds("anon:10000-20000", 0x10000, 0x10000);
}

static void refuses(const char *where, uint64_t size_bytes, int code, const char *why)
{
    struct mf_region_source found;
    struct mf_error err = {0};
    assert_int_equal(find(where, size_bytes, &found, &err), -code);
    if (!strstr(err.text, why))
        fail_msg("%s does not say '%s'", err.text, why);
}

static void refuses_by_name(void **state)
{
    (void)state;
    refuses("anon:none", 0, ENOENT, "PR_SET_VMA");
    refuses("anon:are", 0, ENOENT, "named 'are'");
    refuses("anon:", 0, ENOENT, "named ''");
    refuses("anon:split", 0, ENOENT, "not mapped at 0x41000");
    refuses("anon:30000-36000", 0, ENOENT, "not mapped at 0x35000");
    refuses("anon:50000-51000", 0, EOPNOTSUPP, "MAP_PRIVATE");
    refuses("anon:51000-52000", 0, EOPNOTSUPP, "shared memory");
    refuses("anon:60000-61000", 0, EOPNOTSUPP, "MAP_HUGETLB");
    refuses("anon:7ff000-800000", 0, EOPNOTSUPP, "stack");
    refuses("anon:30000-30000", 0, EINVAL, "whole pages");
    refuses("anon:32000-30000", 0, EINVAL, "whole pages");
    refuses("anon:30000-30800", 0, EINVAL, "whole pages");
    refuses("anon:30000-", 0, ENOENT, "named '30000-'");
    refuses("anon:-30000", 0, ENOENT, "named '-30000'");
    refuses("anon:30000-35000-", 0, ENOENT, "named '30000-35000-'");
    refuses("anon:arena", 0x4000, EINVAL, "should have 16384");
}

static void mappings_are_places_in_the_range(void **state)
{
    (void)state;
    struct mf_vma vmas[16];
    cleanup_free struct mf_mapping *out = NULL, *there = NULL;
    struct mf_error err = {0};
    size_t count = parse(maps, vmas);
    const struct mf_region_source regions[] = {
        {.kind = MF_MEMORY_TMPFS, .device = vmas[7].device, .inode = 7, .size_bytes = PAGE},
        {.kind = MF_MEMORY_PRIVATE, .start_addr = 0x31000, .size_bytes = 0x3000},
    };
    assert_int_equal(mf_target_mappings(vmas, count, regions, 2, &out, &err), 2);
    assert_true(out[0].region == 1 && out[0].start_addr == 0x31000 &&
                out[0].length_bytes == 0x3000 && out[0].offset_bytes == 0);
    assert_true(out[1].region == 0 && out[1].start_addr == 0x51000);
    /* Where somebody else's file lies now, there is nothing of it. */
    const struct mf_region_source moved = {
        .kind = MF_MEMORY_PRIVATE, .start_addr = 0x42000, .size_bytes = 0x10000};
    assert_int_equal(mf_target_mappings(vmas, count, &moved, 1, &there, &err), 1);
    assert_true(there[0].start_addr == 0x42000 && there[0].length_bytes == PAGE);
}

static void reads_its_own_memory(void **state)
{
    (void)state;
    struct mf_error err = {0};
    cleanup_free struct mf_vma *vmas = NULL;
    size_t count = 0;
    char where[64], byte = 0;
    char *at = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    assert_true(at != MAP_FAILED);
    at[2 * PAGE + 5] = 'm';
    snprintf(where, sizeof(where), "anon:%lx-%lx", (unsigned long)at, (unsigned long)at + 4 * PAGE);
    assert_int_equal(mf_target_vmas(getpid(), &vmas, &count, &err), 0);
    struct mf_region_source found;
    assert_int_equal(
        mf_target_region(getpid(), vmas, count, "mem", where, 4 * PAGE, false, &found, &err), 0);
    assert_int_equal(pread(found.fd, &byte, 1, (off_t)(found.start_addr + 2 * PAGE + 5)), 1);
    assert_int_equal(byte, 'm');
    close(found.fd);
    munmap(at, 4 * PAGE);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(finds_by_name_and_by_addresses),
        cmocka_unit_test(refuses_by_name),
        cmocka_unit_test(mappings_are_places_in_the_range),
        cmocka_unit_test(reads_its_own_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
