/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A fact is a row of doc/kernel.md and the test of the same name. Each runs in a process of its
 * own, so that one that hangs or dies leaves the others be, and each is told of by one line:
 *
 *   PASS name
 *   FAIL name          followed by what it printed
 *   SKIP name: needs what the kernel or the machine lacks
 */
#pragma once

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#include <cmocka.h>

/** struct fact - see FACT(). */
struct fact {
    const char *name;
    CMUnitTestFunction run;
    CMFixtureFunction setup, teardown; /**< or NULL */
    uint64_t features;                 /**< userfaultfd's, UFFD_FEATURE_...; without them: SKIP */
};

/* clang-format off: it takes them for blocks */
/** FACT() - @run, which needs nothing beyond what its group needs. */
#define FACT(run)                                                                                  \
    {                                                                                              \
#run, run, NULL, NULL, 0                                                                   \
    }
/** FACT_WITH() - @run between @setup and @teardown. */
#define FACT_WITH(run, setup, teardown)                                                            \
    {                                                                                              \
#run, run, setup, teardown, 0                                                              \
    }
/** FACT_NEEDS() - @run, which also needs @features of userfaultfd. */
#define FACT_NEEDS(run, features)                                                                  \
    {                                                                                              \
#run, run, NULL, NULL, features                                                            \
    }
/** FACT_FULL() - all of that. */
#define FACT_FULL(run, setup, teardown, features)                                                  \
    {                                                                                              \
#run, run, setup, teardown, features                                                       \
    }
/* clang-format on */

/** lacking() - end the running test as skipped; the format says what is needed, e.g. "guard pages
 *  (Linux 6.15)". */
void lacking(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));

/**
 * facts_main() - run all of @facts, or those that @argv[1..] names; "--list" prints their names.
 * @features: what every one needs of userfaultfd.
 * Return: for main(): 0, 1 if any failed, 77 if all were skipped, 2 for an unknown name.
 */
int facts_main(int argc, char **argv, const struct fact *facts, size_t count, uint64_t features);
