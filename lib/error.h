/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Errors that a person will read.
 *
 * Functions of lib and daemon that can fail return a negative errno value and, where they take a
 * `struct mf_error *` (always the last parameter, may be NULL), leave in it one sentence: what
 * failed, on which VM or host, why, and what to do. It is untouched on success.
 */
#pragma once

#include <stdarg.h>

/** struct mf_error - why something failed.
 * @code: positive errno value.
 * @text: one sentence without a trailing newline.
 */
struct mf_error {
    int code;
    char text[768];
};

/**
 * mf_fail() - fill an error and return its negative code.
 * @err:  where the sentence goes, or NULL.
 * @code: positive errno value.
 * @fmt:  printf format of the sentence. "%m" is not used here: pass strerror() explicitly.
 *
 * Thread-safe for distinct @err. Return: -@code, so that callers write `return mf_fail(...)`.
 */
int mf_fail(struct mf_error *err, int code, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

/** mf_clean_text() - what may end on a terminal and comes from others (a process, another host):
 * what could steer that (C0 and C1 controls, the latter as UTF-8) is made '?'. mf_fail() does it.
 */
void mf_clean_text(char *text);
