/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Long-term pins, which io_uring's registered buffers are: why guest memory is never registered
 * (a pin outlives the page), and that the mover's rings can't do it.
 *
 *     test_pins [ROW...]
 *     test_pins --dax FILE
 *     test_pins --hold FILE PROGRAM [ARGUMENT...]
 *
 * --dax: only what can't be done to this file, which lies on a file system mounted for direct
 * access. --hold: map it and some memory that can be served, and run PROGRAM meanwhile, with
 * "--pid" and the number of this process behind its arguments.
 */
#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "daemon/mover/ring.h"
#include "lib/target.h"
#include "lib/uffd.h"
#include "lib/util.h"
#include "tests/kernel/area.h"
#include "tests/kernel/fact.h"

#define PAGES 64

static void open_ring(struct io_uring *ring)
{
    int rc = io_uring_queue_init(8, ring, 0);
    if (rc < 0)
        lacking("io_uring (%s)", strerror(-rc));
}

/** pin() - register one buffer; 0 or the errno. */
static int pin(struct io_uring *ring, void *at, size_t length_bytes)
{
    struct iovec buffer = {at, length_bytes};
    return -io_uring_register_buffers(ring, &buffer, 1);
}

static blkcnt_t blocks(int file)
{
    struct stat st;
    assert_int_equal(fstat(file, &st), 0);
    return st.st_blocks;
}

static void registering_allocates_every_hole(void **state)
{
    (void)state;
    struct area area;
    struct io_uring ring;
    open_ring(&ring);
    area_make(&area, AREA_SHMEM, PAGES);
    assert_int_equal(blocks(area.file), 0);
    assert_int_equal(pin(&ring, area.second, area.length_bytes), 0);
    assert_int_equal(blocks(area.file) * 512, area.length_bytes);
    io_uring_queue_exit(&ring);
    area_free(&area);
}

static void a_read_only_mapping_is_efault(void **state)
{
    (void)state;
    struct area area;
    struct io_uring ring;
    open_ring(&ring);
    area_make(&area, AREA_SHMEM, PAGES);
    put(&area, 0, 'a');
    assert_int_equal(mprotect(area.second, area.page_bytes, PROT_READ), 0);
    assert_int_equal(pin(&ring, area.second, area.page_bytes), EFAULT);
    io_uring_queue_exit(&ring);
    area_free(&area);
}

/** How the memory is taken away after it was pinned. */
enum taking { PUNCH, TRUNCATE, UNMAP };

/** sent_from_pinned() - pin page 0, take it away, write it anew; the byte that WRITE_FIXED sends.
 */
static char sent_from_pinned(enum taking taking)
{
    struct area area;
    struct io_uring ring;
    struct io_uring_cqe *cqe;
    int ends[2];
    char sent = 0;
    open_ring(&ring);
    area_make(&area, AREA_SHMEM, PAGES);
    put(&area, 0, 'o');
    assert_int_equal(pin(&ring, area.second, area.page_bytes), 0);
    if (taking == PUNCH)
        assert_int_equal(fallocate(area.file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0,
                                   (off_t)area.page_bytes),
                         0);
    if (taking == TRUNCATE) {
        assert_int_equal(ftruncate(area.file, 0), 0);
        assert_int_equal(ftruncate(area.file, (off_t)area.length_bytes), 0);
    }
    if (taking == UNMAP)
        map_at(area.second, area.page_bytes, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    area.second[0] = 'n';
    assert_int_equal(pipe2(ends, O_CLOEXEC), 0);
    io_uring_prep_write_fixed(io_uring_get_sqe(&ring), ends[1], area.second, 1, 0, 0);
    assert_int_equal(io_uring_submit(&ring), 1);
    assert_int_equal(io_uring_wait_cqe(&ring, &cqe), 0);
    assert_int_equal(cqe->res, 1);
    assert_int_equal(read(ends[0], &sent, 1), 1);
    assert_int_equal(area.second[0], 'n'); /* what everybody else reads there */
    close(ends[0]);
    close(ends[1]);
    io_uring_queue_exit(&ring);
    area_free(&area);
    return sent;
}

static void after_a_punch_the_old_bytes_are_sent(void **state)
{
    (void)state;
    assert_int_equal(sent_from_pinned(PUNCH), 'o');
}

static void after_a_truncation_the_old_bytes_are_sent(void **state)
{
    (void)state;
    assert_int_equal(sent_from_pinned(TRUNCATE), 'o');
}

static void after_an_unmap_the_old_bytes_are_sent(void **state)
{
    (void)state;
    assert_int_equal(sent_from_pinned(UNMAP), 'o');
}

static void pins_count_against_memlock(void **state)
{
    (void)state;
    struct area area;
    struct io_uring ring;
    const struct rlimit none = {0, 0};
    open_ring(&ring);
    io_uring_queue_exit(&ring);
    area_make(&area, AREA_SHMEM, PAGES);
    if (geteuid() != 0)
        lacking("root");
    /* Whose pins are counted is settled when the ring is made, by CAP_IPC_LOCK, which goes here. */
    assert_int_equal(setrlimit(RLIMIT_MEMLOCK, &none), 0);
    assert_int_equal(setresuid(65534, 65534, 65534), 0);
    int rc = io_uring_queue_init(8, &ring, 0);
    if (rc == 0) {
        assert_int_equal(pin(&ring, area.second, area.length_bytes), ENOMEM);
        io_uring_queue_exit(&ring);
    } else {
        assert_int_equal(rc, -ENOMEM); /* an older kernel counts the ring itself as well */
    }
    area_free(&area);
}

/** I10: what the mover's own rings let anybody do with them, whatever it has mapped. */
static void the_movers_ring_pins_nothing(void **state)
{
    (void)state;
    struct area area;
    struct io_uring ring;
    int rc = ring_open(&ring, 8);
    if (rc < 0)
        lacking("io_uring with restrictions (Linux 5.10: %s)", strerror(-rc));
    area_make(&area, AREA_SHMEM, PAGES);
    /* Every register operation there is, and some that are not yet. */
    for (unsigned opcode = 0; opcode < 64; opcode++) {
        struct iovec buffer = {area.second, area.page_bytes};
        long done = syscall(SYS_io_uring_register, ring.ring_fd, opcode, &buffer, 1);
        if (done >= 0 || (errno != EACCES && errno != EINVAL && errno != EBADFD))
            fail_msg("io_uring_register operation %u is not refused (%ld, %s)", opcode, done,
                     strerror(errno));
        if (opcode == IORING_REGISTER_BUFFERS)
            assert_int_equal(errno, EACCES);
    }
    /* Nor requests that use registered memory, give the kernel memory to keep, or have it lie in a
     * pipe or a socket while the page is gone. */
    static const uint8_t refused[] = {
        IORING_OP_READ_FIXED, IORING_OP_WRITE_FIXED, IORING_OP_PROVIDE_BUFFERS, IORING_OP_SPLICE,
        IORING_OP_SEND_ZC,    IORING_OP_SENDMSG_ZC,  IORING_OP_URING_CMD};
    for (size_t i = 0; i < sizeof(refused); i++) {
        struct io_uring_cqe *cqe;
        struct io_uring_sqe *sqe = io_uring_get_sqe(&ring);
        assert_non_null(sqe);
        io_uring_prep_nop(sqe);
        sqe->opcode = refused[i];
        sqe->fd = area.file;
        sqe->addr = (uintptr_t)area.second;
        sqe->len = 1;
        assert_int_equal(io_uring_submit(&ring), 1);
        assert_int_equal(io_uring_wait_cqe(&ring, &cqe), 0);
        if (cqe->res != -EACCES && cqe->res != -EINVAL)
            fail_msg("io_uring request %u is not refused (%d)", refused[i], cqe->res);
        io_uring_cqe_seen(&ring, cqe);
    }
    assert_int_equal(blocks(area.file), 0);
    ring_close(&ring);
    area_free(&area);
}

/* ---------------------------------------------------------------------------------------- fs-dax
 */

static const char *dax_path;

/** open_dax() - a file of some pages there, mapped shared and written. */
static char *open_dax(size_t length_bytes, int *file)
{
    *file = open(dax_path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (*file < 0)
        fail_msg("%s: %s", dax_path, strerror(errno));
    assert_int_equal(ftruncate(*file, (off_t)length_bytes), 0);
    char *at = mmap(NULL, length_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, *file, 0);
    assert_true(at != MAP_FAILED);
    memset(at, 'd', length_bytes);
    return at;
}

static void fs_dax_says_so(void **state)
{
    (void)state;
    int file;
    struct statx stx;
    char *at = open_dax(PAGES * 4096, &file);
    assert_int_equal(statx(file, "", AT_EMPTY_PATH, 0, &stx), 0);
    assert_true(stx.stx_attributes & STATX_ATTR_DAX);
    munmap(at, PAGES * 4096);
    close(file);
}

static void fs_dax_refuses_a_long_term_pin(void **state)
{
    (void)state;
    int file;
    struct io_uring ring;
    open_ring(&ring);
    char *at = open_dax(PAGES * 4096, &file);
    assert_int_equal(pin(&ring, at, PAGES * 4096), EOPNOTSUPP);
    /* A pin for the length of one call is another matter: this is what the mover does. */
    int ends[2];
    char sent = 0;
    assert_int_equal(pipe2(ends, O_CLOEXEC), 0);
    assert_int_equal(write(ends[1], at, 1), 1);
    assert_int_equal(read(ends[0], &sent, 1), 1);
    assert_int_equal(sent, 'd');
    io_uring_queue_exit(&ring);
    munmap(at, PAGES * 4096);
    close(file);
}

static void fs_dax_can_not_be_served(void **state)
{
    (void)state;
    int file;
    struct mf_error err = {0};
    char *at = open_dax(PAGES * 4096, &file);
    cleanup_close int uffd = mf_uffd_open();
    assert_int_equal(mf_uffd_api(uffd, MF_UFFD_FEATURES, 0, NULL, &err), 0);
    assert_int_equal(range_register(uffd, at, PAGES * 4096, UFFDIO_REGISTER_MODE_MISSING), EINVAL);
    assert_int_equal(range_register(uffd, at, PAGES * 4096, UFFDIO_REGISTER_MODE_MINOR), EINVAL);
    assert_int_equal(mf_uffd_register(uffd, (uintptr_t)at, PAGES * 4096, &err), -EINVAL);
    assert_non_null(strstr(err.text, "neither tmpfs nor hugetlbfs"));

    struct mf_vma *vmas;
    size_t count;
    struct mf_region_source region;
    assert_int_equal(mf_target_vmas(getpid(), &vmas, &count, &err), 0);
    assert_int_equal(mf_target_region(getpid(), vmas, count, "ram", dax_path, PAGES * 4096, false,
                                      &region, &err),
                     -EOPNOTSUPP);
    assert_non_null(strstr(err.text, "fs-dax"));
    assert_non_null(strstr(err.text, dax_path));
    puts(err.text);
    free(vmas);
    munmap(at, PAGES * 4096);
    close(file);
}

/** hold() - Return: the exit code of the program. */
static int hold(char **argv)
{
    char pid[16], *arguments[16] = {NULL};
    size_t count = 0, length_bytes = PAGES * 4096;
    int status, file = open(argv[0], O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    int ram = memfd_create("served", MFD_CLOEXEC);
    if (file < 0 || ram < 0 || ftruncate(file, (off_t)length_bytes) != 0 ||
        ftruncate(ram, (off_t)length_bytes) != 0) {
        perror(argv[0]);
        return 1;
    }
    const char *there = mmap(NULL, length_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    const char *here = mmap(NULL, length_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, ram, 0);
    if (there == MAP_FAILED || here == MAP_FAILED) {
        perror(argv[0]);
        return 1;
    }
    snprintf(pid, sizeof(pid), "%d", (int)getpid());
    for (char **word = argv + 1; *word && count < 13; word++)
        arguments[count++] = *word;
    arguments[count++] = "--pid";
    arguments[count] = pid;
    pid_t child = fork();
    if (child == 0) {
        execv(arguments[0], arguments);
        perror(arguments[0]);
        _exit(127);
    }
    return child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status)
               ? WEXITSTATUS(status)
               : 1;
}

int main(int argc, char **argv)
{
    static const struct fact facts[] = {
        FACT(registering_allocates_every_hole),
        FACT(a_read_only_mapping_is_efault),
        FACT(after_a_punch_the_old_bytes_are_sent),
        FACT(after_a_truncation_the_old_bytes_are_sent),
        FACT(after_an_unmap_the_old_bytes_are_sent),
        FACT(pins_count_against_memlock),
        FACT(the_movers_ring_pins_nothing),
    };
    static const struct fact dax_facts[] = {
        FACT(fs_dax_says_so),
        FACT(fs_dax_refuses_a_long_term_pin),
        FACT(fs_dax_can_not_be_served),
    };
    if (argc == 3 && strcmp(argv[1], "--dax") == 0) {
        dax_path = argv[2];
        return facts_main(1, argv, dax_facts, sizeof(dax_facts) / sizeof(dax_facts[0]),
                          MF_UFFD_FEATURES);
    }
    if (argc > 3 && strcmp(argv[1], "--hold") == 0)
        return hold(argv + 2);
    return facts_main(argc, argv, facts, sizeof(facts) / sizeof(facts[0]), MF_UFFD_FEATURES);
}
