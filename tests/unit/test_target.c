/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* lib/target_maps.c on lines as the kernel writes them and as it never should, and lib/target.c on
 * this process's own files. */
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "lib/proc_stat.h"
#include "lib/target.h"
#include "lib/util.h"

#define MIB (UINT64_C(1) << 20)

static void parses_a_shared_file(void **state)
{
    (void)state;
    struct mf_vma vma;
    assert_int_equal(mf_vma_parse("7f1234500000-7f1274500000 rw-s 00200000 00:1a 4711"
                                  "                       /dev/shm/vm 1\n",
                                  &vma),
                     0);
    assert_true(vma.start_addr == 0x7f1234500000 && vma.end_addr == 0x7f1274500000);
    assert_true(vma.offset_bytes == 0x200000);
    assert_true(vma.readable && vma.writable && !vma.executable && vma.shared && !vma.deleted);
    assert_true(vma.device == makedev(0, 0x1a) && vma.inode == 4711);
    assert_string_equal(vma.path, "/dev/shm/vm 1");
}

static void parses_lines_without_a_path(void **state)
{
    (void)state;
    struct mf_vma vma;
    assert_int_equal(mf_vma_parse("00400000-00401000 r-xp 00000000 00:00 0 \n", &vma), 0);
    assert_true(vma.executable && !vma.shared && !vma.writable && vma.inode == 0);
    assert_string_equal(vma.path, "");
    assert_int_equal(mf_vma_parse("00400000-00401000 ---p 00000000 00:00 0", &vma), 0);
    assert_false(vma.readable);
    assert_int_equal(
        mf_vma_parse("ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0  [vsyscall]\n", &vma),
        0);
    assert_true(vma.end_addr == 0xffffffffff601000);
    assert_string_equal(vma.path, "[vsyscall]");
}

static void tells_deleted_files(void **state)
{
    (void)state;
    struct mf_vma vma;
    const char *head = "1000-2000 rw-s 00000000 00:01 7 ";
    char line[128];
    snprintf(line, sizeof(line), "%s/memfd:ram (deleted)\n", head);
    assert_int_equal(mf_vma_parse(line, &vma), 0);
    assert_true(vma.deleted);
    assert_string_equal(vma.path, "/memfd:ram");
    /* A file may be called that way and be deleted on top. */
    snprintf(line, sizeof(line), "%s/a (deleted) (deleted)\n", head);
    assert_int_equal(mf_vma_parse(line, &vma), 0);
    assert_true(vma.deleted);
    assert_string_equal(vma.path, "/a (deleted)");
    snprintf(line, sizeof(line), "%s/a(deleted)\n", head);
    assert_int_equal(mf_vma_parse(line, &vma), 0);
    assert_false(vma.deleted);
    snprintf(line, sizeof(line), "%s/with\\012newline\n", head);
    assert_int_equal(mf_vma_parse(line, &vma), 0);
    assert_string_equal(vma.path, "/with\\012newline");
}

static void truncates_overlong_paths(void **state)
{
    (void)state;
    struct mf_vma vma;
    char line[6000];
    int head = snprintf(line, sizeof(line), "1000-2000 rw-s 00000000 00:01 7 /");
    memset(line + head, 'x', 5000);
    strcpy(line + head + 5000, " (deleted)\n");
    assert_int_equal(mf_vma_parse(line, &vma), 0);
    assert_true(vma.deleted);
    assert_int_equal(strlen(vma.path), sizeof(vma.path) - 1);
    assert_int_equal(vma.path[sizeof(vma.path) - 2], 'x');
}

static void refuses_what_is_no_line(void **state)
{
    (void)state;
    static const char *const bad[] = {
        "",
        "\n",
        "garbage\n",
        "1000\n",
        "1000-\n",
        "1000-2000\n",
        "1000-2000 rw-s\n",
        "1000-2000 rw-\n",
        "1000-2000 rw-s 0\n",
        "1000-2000 rw-s 0 00:01\n",
        "1000-2000 rw-s 0 00:01 \n",
        "1000-2000 rw-s 0 0001 7 /x\n",
        "1000-2000 rw-s 0 00:01 x /x\n",
        "1000-2000 rw-s 0 00:01 7/x\n",
        "1000-2000 rwqs 0 00:01 7 /x\n",
        "1000-2000 rw-z 0 00:01 7 /x\n",
        "1000-2000 w-rs 0 00:01 7 /x\n",
        "2000-1000 rw-s 0 00:01 7 /x\n",
        "1000-1000 rw-s 0 00:01 7 /x\n",
        "-1000-2000 rw-s 0 00:01 7 /x\n",
        "+1000-2000 rw-s 0 00:01 7 /x\n",
        " 1000-2000 rw-s 0 00:01 7 /x\n",
        "1000- 2000 rw-s 0 00:01 7 /x\n",
        "10000000000000000-20000000000000000 rw-s 0 00:01 7 /x\n",
        "1000-2000 rw-s 0 00:01 99999999999999999999999 /x\n",
        "1000-2000 rw-s 0 100000000:01 7 /x\n",
    };
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        struct mf_vma vma;
        if (mf_vma_parse(bad[i], &vma) != -EINVAL)
            fail_msg("accepted: '%s'", bad[i]);
    }
}

static struct mf_vma line_of(const char *line)
{
    struct mf_vma vma;
    assert_int_equal(mf_vma_parse(line, &vma), 0);
    return vma;
}

static void merges_neighbours(void **state)
{
    (void)state;
    const struct mf_vma vmas[] = {
        line_of("10000-20000 rw-s 00000000 00:01 7 /a\n"),
        line_of("20000-30000 r--s 00010000 00:01 7 /a\n"), /* mprotect split it: same mapping */
        line_of("30000-40000 rw-s 00030000 00:01 7 /a\n"), /* offset jumps */
        line_of("40000-50000 rw-s 00000000 00:01 8 /b\n"), /* another file */
        line_of("60000-70000 rw-s 00010000 00:01 8 /b\n"), /* addresses jump */
        line_of("70000-80000 rw-s 00020000 00:02 8 /c\n"), /* same inode elsewhere: not ours */
        line_of("80000-90000 rw-p 00000000 00:00 0 \n"),
    };
    const struct mf_region_source regions[] = {
        {.name = "b", .device = makedev(0, 1), .inode = 8},
        {.name = "a", .device = makedev(0, 1), .inode = 7},
    };
    cleanup_free struct mf_mapping *out = NULL;
    assert_int_equal(mf_target_mappings(vmas, 7, regions, 2, &out, NULL), 4);
    assert_true(out[0].start_addr == 0x10000 && out[0].length_bytes == 0x20000 &&
                out[0].region == 1);
    assert_true(out[1].start_addr == 0x30000 && out[1].offset_bytes == 0x30000);
    assert_true(out[2].region == 0 && out[2].start_addr == 0x40000);
    assert_true(out[3].region == 0 && out[3].start_addr == 0x60000 &&
                out[3].offset_bytes == 0x10000);
}

static void refuses_private_mappings(void **state)
{
    (void)state;
    const struct mf_vma vmas[] = {line_of("10000-20000 rw-s 00000000 00:01 7 /a\n"),
                                  line_of("50000-60000 rw-p 00000000 00:01 7 /a\n")};
    const struct mf_region_source region = {.name = "ram7", .device = makedev(0, 1), .inode = 7};
    struct mf_mapping *out = NULL;
    struct mf_error err = {0};
    assert_int_equal(mf_target_mappings(vmas, 2, &region, 1, &out, &err), -EINVAL);
    assert_null(out);
    assert_non_null(strstr(err.text, "ram7"));
    assert_non_null(strstr(err.text, "share=on"));
}

/** A file that is mapped here, as a VMM would. */
struct ram {
    char dir[64], path[128];
    int fd;
    char *at;
    size_t length_bytes;
};

static void map_ram(struct ram *ram, const char *parent, const char *file, int flags)
{
    ram->length_bytes = 2 * MIB;
    snprintf(ram->dir, sizeof(ram->dir), "%s/memferry-test-XXXXXX", parent);
    assert_non_null(mkdtemp(ram->dir));
    snprintf(ram->path, sizeof(ram->path), "%s/%s", ram->dir, file);
    ram->fd = open(ram->path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    assert_true(ram->fd >= 0);
    assert_int_equal(ftruncate(ram->fd, (off_t)ram->length_bytes), 0);
    ram->at = mmap(NULL, ram->length_bytes, PROT_READ | PROT_WRITE, flags, ram->fd, 0);
    assert_true(ram->at != MAP_FAILED);
}

static void unmap_ram(struct ram *ram)
{
    munmap(ram->at, ram->length_bytes);
    close(ram->fd);
    unlink(ram->path);
    rmdir(ram->dir);
}

static int find(const char *mem_path, uint64_t size_bytes, struct mf_region_source *out,
                struct mf_error *err)
{
    cleanup_free struct mf_vma *vmas = NULL;
    size_t count;
    assert_int_equal(mf_target_vmas(getpid(), &vmas, &count, err), 0);
    return mf_target_region(getpid(), vmas, count, "ram0", mem_path, size_bytes, true, out, err);
}

static void assert_found(const struct ram *ram, const char *mem_path)
{
    struct mf_region_source region;
    struct mf_error err = {0};
    if (find(mem_path, ram->length_bytes, &region, &err) != 0)
        fail_msg("%s: %s", mem_path, err.text);
    struct stat st, mine;
    assert_int_equal(fstat(region.fd, &st), 0);
    assert_int_equal(fstat(ram->fd, &mine), 0);
    assert_true(st.st_ino == mine.st_ino && st.st_dev == mine.st_dev);
    assert_string_equal(region.name, "ram0");
    assert_int_equal(region.kind, MF_MEMORY_TMPFS);
    assert_int_equal(region.page_bytes, sysconf(_SC_PAGESIZE));
    assert_true(region.size_bytes == ram->length_bytes && region.inode == mine.st_ino);
    assert_int_equal(pwrite(region.fd, "q", 1, 12345), 1);
    assert_int_equal(ram->at[12345], 'q');
    close(region.fd);
}

static void finds_a_file(void **state)
{
    (void)state;
    struct ram ram;
    map_ram(&ram, "/dev/shm", "vm1", MAP_SHARED);
    assert_found(&ram, ram.path);

    char link_path[160];
    snprintf(link_path, sizeof(link_path), "%s/link", ram.dir);
    assert_int_equal(symlink(ram.path, link_path), 0);
    assert_found(&ram, link_path);
    unlink(link_path);
    unmap_ram(&ram);
}

static void finds_a_deleted_file(void **state)
{
    (void)state;
    struct ram ram;
    map_ram(&ram, "/dev/shm", "vm1", MAP_SHARED);
    unlink(ram.path);
    assert_found(&ram, ram.path);
    /* Somebody makes a new file of that name: it is not the RAM. */
    int other = open(ram.path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    assert_true(other >= 0);
    assert_found(&ram, ram.path);
    close(other);
    unmap_ram(&ram);
}

static void finds_the_file_in_a_directory(void **state)
{
    (void)state;
    struct ram ram, neighbour;
    map_ram(&ram, "/dev/shm", "qemu_back_mem.ram0.Ab12Cd", MAP_SHARED);
    unlink(ram.path);
    assert_found(&ram, ram.dir);
    /* A second backend of the same size: told apart by its name. */
    map_ram(&neighbour, "/dev/shm", "qemu_back_mem._objects_ram01.Ab12Cd", MAP_SHARED);
    unlink(neighbour.path);
    assert_found(&ram, ram.dir);
    assert_found(&ram, "/dev/shm");
    unmap_ram(&neighbour);
    unmap_ram(&ram);

    map_ram(&ram, "/dev/shm", "a", MAP_SHARED);
    map_ram(&neighbour, "/dev/shm", "b", MAP_SHARED);
    unlink(ram.path);
    unlink(neighbour.path);
    struct mf_region_source region;
    struct mf_error err = {0};
    assert_int_equal(find("/dev/shm", ram.length_bytes, &region, &err), -ENOTUNIQ);
    assert_non_null(strstr(err.text, "mem-path of its own"));
    unmap_ram(&neighbour);
    unmap_ram(&ram);
}

static void finds_a_memfd(void **state)
{
    (void)state;
    struct ram ram = {.length_bytes = 3 * MIB,
                      .fd = memfd_create("memory-backend-memfd", MFD_CLOEXEC)};
    assert_int_equal(ftruncate(ram.fd, (off_t)ram.length_bytes), 0);
    ram.at = mmap(NULL, ram.length_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, ram.fd, 0);
    assert_true(ram.at != MAP_FAILED);
    assert_found(&ram, "");
    assert_found(&ram, NULL);
    munmap(ram.at, ram.length_bytes);
    close(ram.fd);
}

static void assert_refused(const char *mem_path, uint64_t size_bytes, int code, const char *word)
{
    struct mf_region_source region = {.fd = -7};
    struct mf_error err = {0};
    assert_int_equal(find(mem_path, size_bytes, &region, &err), -code);
    assert_int_equal(err.code, code);
    assert_int_equal(region.fd, -7);
    if (!strstr(err.text, word))
        fail_msg("no '%s' in: %s", word, err.text);
}

static void refuses_with_a_remedy(void **state)
{
    (void)state;
    struct ram ram;
    map_ram(&ram, "/dev/shm", "private", MAP_PRIVATE);
    assert_refused(ram.path, ram.length_bytes, EINVAL, "share=on");
    unmap_ram(&ram);

    map_ram(&ram, "/dev/shm", "short", MAP_SHARED);
    assert_refused(ram.path, ram.length_bytes + MIB, EINVAL, "must agree");
    assert_refused("/dev/shm/memferry-no-such-file", MIB, ENOENT, "memory-backend-file");
    unmap_ram(&ram);

    map_ram(&ram, ".", "disk", MAP_SHARED);
    struct mf_region_source region;
    struct mf_error err = {0};
    int rc = find(ram.path, ram.length_bytes, &region, &err);
    if (rc == 0) { /* the build directory is itself on tmpfs */
        close(region.fd);
        unmap_ram(&ram);
        skip();
    }
    assert_int_equal(rc, -EOPNOTSUPP);
    assert_non_null(strstr(err.text, "disk file system"));
    assert_non_null(strstr(err.text, "tmpfs"));
    unmap_ram(&ram);
}

static void notices_foreign_mappings(void **state)
{
    (void)state;
    struct ram ram;
    struct mf_region_source region;
    char who[96] = "";
    map_ram(&ram, "/dev/shm", "vm1", MAP_SHARED);
    assert_int_equal(find(ram.path, ram.length_bytes, &region, NULL), 0);
    assert_int_equal(mf_target_foreign(getpid(), true, 0, &region, 1, who, sizeof(who)), 0);

    int told[2];
    pid_t grandchild = 0;
    const uint64_t before_ticks = mf_proc_ticks();
    assert_int_equal(pipe(told), 0);
    pid_t child = fork(); /* inherits the mapping, as a mover has it; its child is a stranger */
    if (child == 0) {
        pid_t own = fork();
        if (own != 0 && write(told[1], &own, sizeof(own)) != sizeof(own))
            _exit(1);
        for (;;)
            pause();
    }
    assert_int_equal(read(told[0], &grandchild, sizeof(grandchild)), sizeof(grandchild));
    int without = mf_target_foreign(getpid(), false, 0, &region, 1, who, sizeof(who));
    int rc = mf_target_foreign(getpid(), true, 0, &region, 1, who, sizeof(who));
    int young = mf_target_foreign(getpid(), true, before_ticks, &region, 1, who, sizeof(who));
    int younger =
        mf_target_foreign(getpid(), true, mf_proc_ticks() + 1, &region, 1, who, sizeof(who));
    int as_target = mf_target_foreign(grandchild, true, 0, &region, 1, who + 48, sizeof(who) - 48);
    kill(grandchild, SIGKILL);
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
    close(told[0]);
    close(told[1]);
    assert_int_equal(without, 0);
    assert_int_equal(rc, 1);
    assert_int_equal(young, 1);
    assert_int_equal(younger, 0);
    assert_non_null(strstr(who, "test_target (pid "));
    assert_int_equal(as_target, 0); /* the caller's own mapping and its child's do not count */
    close(region.fd);
    unmap_ram(&ram);
}

static void speaks_of_the_gone(void **state)
{
    (void)state;
    pid_t child = fork();
    if (child == 0)
        _exit(0);
    siginfo_t info;
    assert_int_equal(waitid(P_PID, (id_t)child, &info, WEXITED | WNOWAIT), 0);

    struct mf_vma *vmas = NULL;
    size_t count;
    struct mf_error err = {0};
    assert_int_equal(mf_target_vmas(child, &vmas, &count, &err), -ESRCH); /* a zombie */
    waitpid(child, NULL, 0);
    assert_int_equal(mf_target_vmas(child, &vmas, &count, &err), -ESRCH);
    assert_null(vmas);
    assert_non_null(strstr(err.text, "is gone"));
    assert_int_equal(mf_target_vfio(child), -ESRCH);
    assert_int_equal(mf_target_vfio(getpid()), 0);
}

static void knows_how_much_fits(void **state)
{
    (void)state;
    uint64_t shm_bytes = 0, memfd_bytes = 0;
    cleanup_close int shm = open("/dev/shm", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    cleanup_close int memfd = memfd_create("memferry-test", MFD_CLOEXEC);
    assert_int_equal(mf_memory_available(shm, &shm_bytes), 0);
    assert_int_equal(mf_memory_available(memfd, &memfd_bytes), 0);
    assert_true(shm_bytes > 0 && memfd_bytes >= shm_bytes / 2);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(parses_a_shared_file),
        cmocka_unit_test(parses_lines_without_a_path),
        cmocka_unit_test(tells_deleted_files),
        cmocka_unit_test(truncates_overlong_paths),
        cmocka_unit_test(refuses_what_is_no_line),
        cmocka_unit_test(merges_neighbours),
        cmocka_unit_test(refuses_private_mappings),
        cmocka_unit_test(finds_a_file),
        cmocka_unit_test(finds_a_deleted_file),
        cmocka_unit_test(finds_the_file_in_a_directory),
        cmocka_unit_test(finds_a_memfd),
        cmocka_unit_test(refuses_with_a_remedy),
        cmocka_unit_test(notices_foreign_mappings),
        cmocka_unit_test(speaks_of_the_gone),
        cmocka_unit_test(knows_how_much_fits),
    };
    return cmocka_run_group_tests_name("target", tests, NULL, NULL);
}
