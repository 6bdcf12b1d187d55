/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* lib/process.c: which memory of a process is migrated, by which name; what its threads do. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "lib/process.h"
#include "lib/util.h"

/* ---- decisions ---- */

static struct mf_file *files_of(const char *const *lines, size_t count, size_t *file_count)
{
    struct mf_vma vmas[32];
    struct mf_file *files = NULL;
    for (size_t i = 0; i < count; i++)
        assert_int_equal(mf_vma_parse(lines[i], &vmas[i]), 0);
    assert_int_equal(mf_files_of(vmas, count, &files, file_count, NULL), 0);
    return files;
}

#define FILES(count, ...)                                                                          \
    files_of((const char *const[]){__VA_ARGS__},                                                   \
             sizeof((const char *const[]){__VA_ARGS__}) / sizeof(char *), count)

#define HEAP "10000-20000 rw-s 00000000 00:01 11 /memfd:heap (deleted)\n"
#define HEAP_AGAIN "30000-38000 r--s 00008000 00:01 11 /memfd:heap (deleted)\n"
#define LOG "40000-50000 rw-s 00000000 00:02 12 /dev/shm/my log\n"
#define READ_ONLY "50000-60000 r--s 00000000 00:02 13 /dev/shm/table\n"
#define LIBRARY "60000-70000 r-xp 00000000 fe:01 14 /lib/libc.so.6\n"
#define STACK "70000-80000 rw-p 00000000 00:00 0 [stack]\n"
#define NAMED "80000-90000 rw-s 00000000 00:01 15 [anon_shmem:cache]\n"
#define NAMELESS "a0000-b0000 rw-s 00000000 00:01 16 /dev/zero (deleted)\n"
#define NAMELESS_TOO "b0000-c0000 rw-s 00000000 00:01 17 /dev/zero (deleted)\n"
#define ON_DISK "c0000-d0000 rw-s 00000000 fe:01 18 /var/lib/database\n"

static void test_files_once(void **state)
{
    (void)state;
    size_t count;
    cleanup_free struct mf_file *files =
        FILES(&count, HEAP, HEAP_AGAIN, LOG, READ_ONLY, LIBRARY, STACK, NAMED);
    assert_int_equal(count, 5);
    assert_string_equal(files[0].path, "/memfd:heap");
    assert_true(files[0].shared && files[0].written_to && !files[0].private_too);
    assert_int_equal(files[0].start_addr, 0x10000);
    assert_string_equal(files[1].path, "/dev/shm/my log");
    assert_true(files[2].shared && !files[2].written_to);
    assert_true(!files[3].shared && files[3].private_too);
    assert_string_equal(files[4].path, "[anon_shmem:cache]");
}

static void test_all_by_default(void **state)
{
    (void)state;
    size_t count;
    struct mf_error err;
    cleanup_free struct mf_file *files =
        FILES(&count, HEAP, LOG, READ_ONLY, LIBRARY, STACK, NAMED, NAMELESS, ON_DISK);
    for (size_t i = 0; i < count; i++)
        files[i].kind =
            strcmp(files[i].path, "/var/lib/database") == 0 ? MF_MEMORY_OTHER : MF_MEMORY_TMPFS;
    assert_int_equal(mf_files_judge(files, count, NULL, 0, "p", &err), 0);
    const char *names[] = {"heap", "my_log", NULL, NULL, "cache", "zero", NULL};
    assert_int_equal(count, 7);
    for (size_t i = 0; i < count; i++) {
        assert_int_equal(files[i].verdict, names[i] ? MF_FILE_REGION : MF_FILE_LEFT);
        if (names[i])
            assert_string_equal(files[i].name, names[i]);
        else
            assert_non_null(files[i].why);
    }
}

/* The other host would have to guess which of the two is which, and might guess wrong. */
static void test_same_name_is_refused(void **state)
{
    (void)state;
    size_t count;
    struct mf_error err;
    cleanup_free struct mf_file *files = FILES(&count, NAMELESS, NAMELESS_TOO);
    assert_int_equal(mf_files_judge(files, count, NULL, 0, "p", &err), -ENOTUNIQ);
    assert_non_null(strstr(err.text, "--region NAME=0xa0000"));
    struct mf_choice choices[2];
    assert_int_equal(mf_choice_parse("one=0xb8000", &choices[0], &err), 0);
    assert_int_equal(mf_choice_parse("two=0xa0000", &choices[1], &err), 0);
    assert_int_equal(mf_files_judge(files, count, choices, 2, "p", &err), 0);
    assert_string_equal(files[0].name, "two");
    assert_string_equal(files[1].name, "one");
    assert_int_equal(mf_choice_parse("two=/dev/zero", &choices[1], &err), 0);
    assert_int_equal(mf_files_judge(files, count, choices, 2, "p", &err), -ENOTUNIQ);
}

static void test_private_too_is_refused(void **state)
{
    (void)state;
    size_t count;
    struct mf_error err;
    cleanup_free struct mf_file *files =
        FILES(&count, HEAP, "e0000-f0000 rw-p 00000000 00:01 11 /memfd:heap (deleted)\n", LOG);
    assert_int_equal(mf_files_judge(files, count, NULL, 0, "p", &err), -EOPNOTSUPP);
    assert_non_null(strstr(err.text, "privately"));
    struct mf_choice log;
    assert_int_equal(mf_choice_parse("log=/dev/shm/my log", &log, &err), 0);
    assert_int_equal(mf_files_judge(files, count, &log, 1, "p", &err), 0);
    assert_int_equal(files[0].verdict, MF_FILE_LEFT);
    assert_int_equal(files[1].verdict, MF_FILE_REGION);
}

static void test_nothing_is_refused(void **state)
{
    (void)state;
    size_t count;
    struct mf_error err;
    cleanup_free struct mf_file *files = FILES(&count, READ_ONLY, LIBRARY, STACK);
    assert_int_equal(mf_files_judge(files, count, NULL, 0, "p", &err), -ENOENT);
    cleanup_free struct mf_file *none = FILES(&count, STACK);
    assert_int_equal(count, 0);
    assert_int_equal(mf_files_judge(none, count, NULL, 0, "p", &err), -ENOENT);
    /* Private memory may be all there is. */
    struct mf_choice heap;
    assert_int_equal(mf_choice_parse("heap=anon:heap", &heap, &err), 0);
    assert_int_equal(mf_files_judge(none, count, &heap, 1, "p", &err), 0);
}

static void test_choices_that_cannot_be(void **state)
{
    (void)state;
    size_t count;
    struct mf_error err;
    struct mf_choice choice[2];
    cleanup_free struct mf_file *files = FILES(&count, HEAP, LIBRARY, ON_DISK);
    files[1].kind = files[2].kind = MF_MEMORY_OTHER;
    assert_int_equal(mf_choice_parse("a=memfd:other", &choice[0], &err), 0);
    assert_int_equal(mf_files_judge(files, count, choice, 1, "p", &err), -ENOENT);
    assert_int_equal(mf_choice_parse("a=/lib/libc.so.6", &choice[0], &err), 0);
    assert_int_equal(mf_files_judge(files, count, choice, 1, "p", &err), -EOPNOTSUPP);
    assert_int_equal(mf_choice_parse("a=/var/lib/database", &choice[0], &err), 0);
    assert_int_equal(mf_files_judge(files, count, choice, 1, "p", &err), -EOPNOTSUPP);
    assert_non_null(strstr(err.text, "disk"));
    files[2].kind = MF_MEMORY_DAX;
    assert_int_equal(mf_files_judge(files, count, choice, 1, "p", &err), -EOPNOTSUPP);
    assert_non_null(strstr(err.text, "dax"));
    assert_int_equal(mf_choice_parse("a=memfd:heap", &choice[0], &err), 0);
    assert_int_equal(mf_choice_parse("b=0x10000", &choice[1], &err), 0);
    assert_int_equal(mf_files_judge(files, count, choice, 2, "p", &err), -EINVAL);
    assert_int_equal(mf_choice_parse("a=0x10000", &choice[1], &err), 0);
    assert_int_equal(mf_files_judge(files, count, choice, 2, "p", &err), -EINVAL);
}

static void test_choice_parse(void **state)
{
    (void)state;
    struct mf_error err;
    struct mf_choice choice;
    assert_int_equal(mf_choice_parse("heap=/dev/shm/a=b", &choice, &err), 0);
    assert_string_equal(choice.name, "heap");
    assert_string_equal(choice.what, "/dev/shm/a=b");
    const char *const wrong[] = {
        "",        "heap",  "heap=",  "=/dev/shm/a", "../x=/a",  "a=b",   "a=0x",
        "a=0xfoo", "a=0x0", "a b=/a", "a=12",        "a=memfdx", "-a=/a", "a=0x1ffffffffffffffff"};
    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++)
        assert_int_equal(mf_choice_parse(wrong[i], &choice, &err), -EINVAL);
}

/* ---- real processes ---- */

struct child {
    pid_t pid;
    int word;
};

/* A child that has two memfds and a pipe mapped; it waits. */
static struct child start_child(void (*more)(void))
{
    int ready[2], word[2];
    assert_int_equal(pipe(ready), 0);
    assert_int_equal(pipe(word), 0);
    struct child child = {.pid = fork(), .word = word[1]};
    assert_true(child.pid >= 0);
    if (child.pid == 0) {
        char c = 'r';
        close(word[1]);
        const char *const names[] = {"alpha", "beta"};
        for (unsigned i = 0; i < 2; i++) {
            int fd = memfd_create(names[i], 0);
            if (ftruncate(fd, 1 << 20) != 0 ||
                mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) == MAP_FAILED)
                _exit(1);
        }
        if (more)
            more();
        if (write(ready[1], &c, 1) != 1 || read(word[0], &c, 1) < 0)
            _exit(1);
        _exit(0);
    }
    char c;
    close(word[0]);
    assert_int_equal(read(ready[0], &c, 1), 1);
    close(ready[0]);
    close(ready[1]);
    return child;
}

static void end_child(struct child *child)
{
    close(child->word);
    kill(child->pid, SIGKILL);
    waitpid(child->pid, NULL, 0);
}

static const struct mf_file *named(const struct mf_file *files, size_t count, const char *name)
{
    for (size_t i = 0; i < count; i++)
        if (files[i].verdict == MF_FILE_REGION && strcmp(files[i].name, name) == 0)
            return &files[i];
    return NULL;
}

static void test_process_files(void **state)
{
    (void)state;
    struct child child = start_child(NULL);
    cleanup_free struct mf_file *files = NULL;
    size_t count = 0;
    struct mf_error err = {.text = ""};
    assert_int_equal(mf_process_files(child.pid, NULL, 0, &files, &count, &err), 0);
    const struct mf_file *alpha = named(files, count, "alpha");
    assert_non_null(alpha);
    assert_non_null(named(files, count, "beta"));
    assert_int_equal(alpha->size_bytes, 1 << 20);
    assert_int_equal(alpha->kind, MF_MEMORY_TMPFS);
    assert_int_equal(mf_process_recheck(child.pid, files, count, true, &err), 0);
    assert_int_equal(mf_process_child(child.pid, files, count), 0);
    /* To this process the child is one that shares nothing; to its parent's memory it does. */
    end_child(&child);
    cleanup_free struct mf_file *gone = NULL;
    assert_true(mf_process_files(child.pid, NULL, 0, &gone, &count, &err) < 0);
}

static void test_recheck_finds_what_has_come(void **state)
{
    (void)state;
    struct child child = start_child(NULL);
    cleanup_free struct mf_file *files = NULL;
    size_t count = 0;
    struct mf_error err = {.text = ""};
    assert_int_equal(mf_process_files(child.pid, NULL, 0, &files, &count, &err), 0);
    /* As if beta had not been there. */
    struct mf_file *beta = (struct mf_file *)(uintptr_t)named(files, count, "beta");
    beta->verdict = MF_FILE_LEFT;
    beta->inode++;
    assert_int_equal(mf_process_recheck(child.pid, files, count, true, &err), -ESTALE);
    assert_non_null(strstr(err.text, "beta"));
    assert_int_equal(mf_process_recheck(child.pid, files, count, false, &err), 0);
    struct mf_file *alpha = (struct mf_file *)(uintptr_t)named(files, count, "alpha");
    alpha->size_bytes += 4096;
    assert_int_equal(mf_process_recheck(child.pid, files, count, false, &err), -ESTALE);
    assert_non_null(strstr(err.text, "size"));
    end_child(&child);
}

static void fork_on(void)
{
    if (fork() == 0) {
        pause();
        _exit(0);
    }
}

static void test_child_that_shares(void **state)
{
    (void)state;
    struct child child = start_child(fork_on);
    cleanup_free struct mf_file *files = NULL;
    size_t count = 0;
    assert_int_equal(mf_process_files(child.pid, NULL, 0, &files, &count, NULL), 0);
    pid_t found = mf_process_child(child.pid, files, count);
    assert_true(found > 0);
    kill(found, SIGKILL);
    end_child(&child);
}

static void test_run(void **state)
{
    (void)state;
    struct child child = start_child(NULL);
    assert_int_equal(mf_process_run(child.pid), MF_RUN_RUNNING);
    kill(child.pid, SIGSTOP);
    while (mf_process_run(child.pid) != MF_RUN_STOPPED)
        usleep(1000);
    kill(child.pid, SIGCONT);
    while (mf_process_run(child.pid) != MF_RUN_RUNNING)
        usleep(1000);
    end_child(&child);
    assert_int_equal(mf_process_run(child.pid), MF_RUN_GONE);
}

static void open_direct(void)
{
    int fd = open("/tmp", O_TMPFILE | O_RDWR | O_DIRECT, 0600);
    if (fd < 0)
        _exit(77); /* tmpfs before 6.6 has none */
    dup2(fd, 200);
}

static void test_direct(void **state)
{
    (void)state;
    char what[192] = "";
    struct child child = start_child(NULL);
    assert_int_equal(mf_process_direct(child.pid, what, sizeof(what)), 0);
    end_child(&child);
    struct child direct = start_child(open_direct);
    assert_int_equal(mf_process_direct(direct.pid, what, sizeof(what)), 1);
    assert_non_null(strstr(what, "descriptor"));
    end_child(&direct);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_files_once),
        cmocka_unit_test(test_all_by_default),
        cmocka_unit_test(test_same_name_is_refused),
        cmocka_unit_test(test_private_too_is_refused),
        cmocka_unit_test(test_nothing_is_refused),
        cmocka_unit_test(test_choices_that_cannot_be),
        cmocka_unit_test(test_choice_parse),
        cmocka_unit_test(test_process_files),
        cmocka_unit_test(test_recheck_finds_what_has_come),
        cmocka_unit_test(test_child_that_shares),
        cmocka_unit_test(test_run),
        cmocka_unit_test(test_direct),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
