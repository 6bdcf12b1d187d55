/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Is this host able? One row a thing that memferry needs of the kernel, the permissions and the
 * memory.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>

#define MF_CHECKS_MAX 32 /**< room for all rows */

enum mf_check_state {
    MF_CHECK_OK,
    MF_CHECK_MISSING, /**< memferry can't work without it */
    MF_CHECK_LIMITED, /**< works, with a named disadvantage */
};

/** struct mf_check - one row of `memferry check`. */
struct mf_check {
    const char *name;  /**< stable identifier, e.g. "userfaultfd-minor-shmem": JSON key */
    const char *title; /**< what a person reads */
    enum mf_check_state state;
    char found[400];  /**< what was found */
    char remedy[320]; /**< how to get it; empty when OK */
};

/**
 * mf_check_host() - run all checks (opens throw-away descriptors; changes nothing).
 * Return: how many rows were written to @rows (at most @max).
 */
size_t mf_check_host(struct mf_check *rows, size_t max);

/** mf_check_first_missing() - the first row with MF_CHECK_MISSING, or NULL. */
const struct mf_check *mf_check_first_missing(const struct mf_check *rows, size_t count);
