/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "tests/kernel/fact.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "lib/uffd.h"
#include "lib/util.h"

#define SKIPPED 77
#define ROW_LIMIT_S 60 /* also under emulation and a sanitizer */

static int said_fd; /* of the test's process: what it lacks, or prints */

void lacking(const char *format, ...)
{
    char text[256];
    va_list ap;
    va_start(ap, format);
    int length = vsnprintf(text, sizeof(text), format, ap);
    va_end(ap);
    if (length > 0 && (size_t)length < sizeof(text))
        mf_write_all(said_fd, text, (size_t)length);
    _exit(SKIPPED);
}

/** lacks_features() - the names of the userfaultfd features that this kernel has not got. */
static bool lacks_features(uint64_t wanted, char *names, size_t size)
{
    uint64_t have = 0;
    struct mf_error err = {0};
    int rc = mf_uffd_features(&have, &err);
    if (rc < 0) {
        snprintf(names, size, "userfaultfd (%.300s)", err.text);
        return true;
    }
    size_t used = 0;
    for (uint64_t missing = wanted & ~have; missing; missing &= missing - 1) {
        const char *since, *name = mf_uffd_feature_name(missing & -missing, &since);
        if (used < size)
            used += (size_t)snprintf(names + used, size - used, "%s%s (Linux %s)", used ? ", " : "",
                                     name, since);
    }
    return used > 0;
}

/** in_child() - run it as a group of its own, for cmocka's sake. */
static _Noreturn void in_child(const struct fact *fact, int text_fd, int lack_fd)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    said_fd = lack_fd;
    /* Both: cmocka's verdict goes to one, its reasons to the other. */
    dup2(text_fd, STDOUT_FILENO);
    dup2(text_fd, STDERR_FILENO);
    alarm(ROW_LIMIT_S);
    const struct CMUnitTest test[] = {
        {fact->name, fact->run, fact->setup, fact->teardown, NULL},
    };
    exit(cmocka_run_group_tests_name(fact->name, test, NULL, NULL) ? 1 : 0);
}

static void show(int text_fd)
{
    char text[4096];
    ssize_t length;
    lseek(text_fd, 0, SEEK_SET);
    while ((length = read(text_fd, text, sizeof(text))) > 0)
        mf_write_all(STDOUT_FILENO, text, (size_t)length);
}

#define LACK_ROOM 400

/** run_one() - @lack: room for LACK_ROOM bytes, what was lacking.
 *  Return: 0, 1 or SKIPPED, after its line was printed. */
static int run_one(const struct fact *fact, uint64_t features, char *lack)
{
    if (lacks_features(fact->features | features, lack, LACK_ROOM)) {
        printf("SKIP %s: needs %s\n", fact->name, lack);
        return SKIPPED;
    }
    cleanup_close int text_fd = memfd_create("said", MFD_CLOEXEC);
    cleanup_close int lack_fd = memfd_create("lacks", MFD_CLOEXEC);
    if (text_fd < 0 || lack_fd < 0) {
        perror("memfd_create");
        return 1;
    }
    fflush(stdout);
    pid_t child = fork();
    if (child == 0)
        in_child(fact, text_fd, lack_fd);
    int status = -1;
    if (child < 0 || waitpid(child, &status, 0) != child) {
        perror("fork");
        return 1;
    }
    if (WIFEXITED(status) && WEXITSTATUS(status) == 0) {
        printf("PASS %s\n", fact->name);
        return 0;
    }
    if (WIFEXITED(status) && WEXITSTATUS(status) == SKIPPED) {
        ssize_t length = pread(lack_fd, lack, LACK_ROOM - 1, 0);
        lack[length > 0 ? length : 0] = '\0';
        printf("SKIP %s: needs %s\n", fact->name, lack);
        return SKIPPED;
    }
    if (WIFSIGNALED(status) && WTERMSIG(status) == SIGALRM)
        printf("FAIL %s: not over within %d s\n", fact->name, ROW_LIMIT_S);
    else if (WIFSIGNALED(status))
        printf("FAIL %s: ended by signal %d\n", fact->name, WTERMSIG(status));
    else
        printf("FAIL %s\n", fact->name);
    fflush(stdout);
    show(text_fd);
    return 1;
}

static const struct fact *find(const struct fact *facts, size_t count, const char *name)
{
    for (size_t i = 0; i < count; i++) {
        if (strcmp(facts[i].name, name) == 0)
            return &facts[i];
    }
    fprintf(stderr, "there is no test %s here\n", name);
    return NULL;
}

int facts_main(int argc, char **argv, const struct fact *facts, size_t count, uint64_t features)
{
    bool list = argc > 1 && strcmp(argv[1], "--list") == 0;
    size_t passed = 0, failed = 0, skipped = 0;
    char lack[LACK_ROOM] = "";
    size_t wanted = argc > 1 && !list ? (size_t)argc - 1 : count;
    for (size_t i = 0; i < wanted; i++) {
        const struct fact *fact = &facts[i];
        if (argc > 1 && !list && !(fact = find(facts, count, argv[i + 1])))
            return 2;
        if (list) {
            puts(fact->name);
            continue;
        }
        int result = run_one(fact, features, lack);
        passed += result == 0;
        skipped += result == SKIPPED;
        failed += result == 1;
        fflush(stdout);
    }
    if (list)
        return 0;
    printf("%zu passed, %zu failed, %zu skipped\n", passed, failed, skipped);
    if (skipped && !passed && !failed)
        printf("skipped: needs %s\n", lack);
    return failed ? 1 : passed ? 0 : SKIPPED;
}
