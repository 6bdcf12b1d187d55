/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * layout-victim: a process that changes its memory layout exactly as it is told, for the tests of
 * `memferry monitor`. Commands come in lines by one descriptor, an answer to each goes out by
 * another (standard input and output at first):
 *
 *   THREAD call COUNT NUMBER A B C D E F   COUNT times a system call      THREAD TID RESULT
 *   THREAD fork IN OUT                     a child that obeys IN          THREAD TID CHILD
 *   THREAD orphan IN OUT                   the same, not its own child    THREAD TID CHILD
 *   THREAD uffd ADDR LENGTH                watch it by a userfaultfd      THREAD TID RESULT
 *   THREAD spin COUNT A LENGTH B           discard, move to B, and back   THREAD TID RESULT
 *   THREAD advise COUNT SEED ADDR PAGES    see advise()                   THREAD TID RESULT
 *
 * THREAD is 0 to 15; each is a thread of its own that does one thing after another, while the other
 * ones do theirs. Numbers are decimal, hexadecimal or octal as strtoull(3) reads them. At the end
 * of the input the process exits. Nothing is allocated: what is not asked for does not change.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/sched.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "lib/uapi.h"

#define THREADS 16
#define WORDS 10
#define LINE_BYTES 256

struct worker {
    pthread_t thread;
    int pipe[2];
};

static struct worker workers[THREADS];
static int in_fd = STDIN_FILENO, out_fd = STDOUT_FILENO;

static long result_of(long rc)
{
    return rc == -1 ? -(long)errno : rc;
}

static void answer(unsigned thread, long result)
{
    char line[64];
    int length = snprintf(line, sizeof(line), "%u %ld %ld\n", thread, syscall(SYS_gettid), result);
    if (write(out_fd, line, (size_t)length) != length)
        _exit(3);
}

/** read_line() - without a buffer, which a fork would copy. Return: 0 at the end. */
static int read_line(int fd, char *line)
{
    for (size_t used = 0; used < LINE_BYTES - 1; used++) {
        if (read(fd, line + used, 1) != 1)
            return 0;
        if (line[used] == '\n') {
            line[used] = '\0';
            return 1;
        }
    }
    _exit(4);
}

static long watch(uint64_t start_addr, uint64_t length_bytes)
{
    int fd = (int)syscall(SYS_userfaultfd, O_NONBLOCK);
    struct uffdio_api api = {.api = UFFD_API};
    struct uffdio_register reg = {.range = {.start = start_addr, .len = length_bytes},
                                  .mode = UFFDIO_REGISTER_MODE_MISSING};
    if (fd < 0 || ioctl(fd, UFFDIO_API, &api) != 0)
        return result_of(-1);
    return result_of(ioctl(fd, UFFDIO_REGISTER, &reg));
}

/** pointer() - addresses are the caller's business. */
static void *pointer(uint64_t addr)
{
    return (void *)(uintptr_t)addr; /* NOLINT(performance-no-int-to-ptr) */
}

static long spin(uint64_t count, uint64_t a_addr, uint64_t length_bytes, uint64_t b_addr)
{
    void *a = pointer(a_addr), *b = pointer(b_addr);
    int flags = MREMAP_MAYMOVE | MREMAP_FIXED;
    for (uint64_t i = 0; i < count; i++) {
        if (madvise(a, length_bytes, MADV_DONTNEED) != 0 ||
            mremap(a, length_bytes, length_bytes, flags, b) != b ||
            mremap(b, length_bytes, length_bytes, flags, a) != a)
            return result_of(-1);
    }
    return 0;
}

/** advise() - @count times MADV_DONTNEED or MADV_REMOVE of some of the @pages, by chance: which the
 * test can tell from the seed. */
static long advise(uint64_t count, uint64_t seed, uint64_t addr, uint64_t pages)
{
    for (uint64_t i = 0; i < count; i++) {
        seed = seed * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
        uint64_t first = (seed >> 33) % pages, rest = pages - first;
        uint64_t length = 1 + (seed >> 45) % (rest < 4 ? rest : 4);
        int advice = (seed >> 60) & 1 ? MADV_REMOVE : MADV_DONTNEED;
        if (madvise(pointer(addr + first * 4096), length * 4096, advice) != 0)
            return result_of(-1);
    }
    return 0;
}

static void serve_child(int child_in, int child_out);

static void obey(char *line)
{
    char *words[WORDS] = {0};
    uint64_t n[WORDS] = {0};
    unsigned count = 0;
    for (char *save, *word = strtok_r(line, " ", &save); word && count < WORDS;
         word = strtok_r(NULL, " ", &save)) {
        n[count] = strtoull(word, NULL, 0);
        words[count++] = word;
    }
    if (count < 2)
        _exit(5);
    long result = 0;
    if (strcmp(words[1], "call") == 0) {
        for (uint64_t i = 0; i < n[2]; i++)
            result = result_of(syscall((long)n[3], n[4], n[5], n[6], n[7], n[8], n[9]));
    } else if (strcmp(words[1], "fork") == 0 || strcmp(words[1], "orphan") == 0) {
        long flags = words[1][0] == 'o' ? CLONE_PARENT : 0;
        result = syscall(SYS_clone, flags | SIGCHLD, 0, 0, 0, 0);
        if (result == 0)
            serve_child((int)n[2], (int)n[3]);
        result = result_of(result);
    } else if (strcmp(words[1], "uffd") == 0) {
        result = watch(n[2], n[3]);
    } else if (strcmp(words[1], "advise") == 0) {
        result = advise(n[2], n[3], n[4], n[5]);
    } else if (strcmp(words[1], "spin") == 0) {
        result = spin(n[2], n[3], n[4], n[5]);
    } else {
        _exit(6);
    }
    answer((unsigned)n[0], result);
}

/** serve_child() - a child has one thread, which obeys whatever thread is named. */
static void serve_child(int child_in, int child_out)
{
    char line[LINE_BYTES];
    in_fd = child_in;
    out_fd = child_out;
    while (read_line(in_fd, line))
        obey(line);
    _exit(0);
}

static void *work(void *arg)
{
    struct worker *worker = arg;
    char line[LINE_BYTES];
    while (read_line(worker->pipe[0], line))
        obey(line);
    return NULL;
}

int main(void)
{
    char line[LINE_BYTES];
    for (size_t i = 0; i < THREADS; i++) {
        if (pipe2(workers[i].pipe, O_CLOEXEC) != 0 ||
            pthread_create(&workers[i].thread, NULL, work, &workers[i]) != 0)
            return 1;
    }
    while (read_line(in_fd, line)) {
        unsigned long thread = strtoul(line, NULL, 10);
        size_t length = strlen(line);
        line[length] = '\n';
        if (thread >= THREADS || write(workers[thread].pipe[1], line, length + 1) < 0)
            return 2;
    }
    return 0;
}
