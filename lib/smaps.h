/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What of a process's memory is served by a userfaultfd: /proc/PID/smaps (proc_pid_smaps(5)), the
 * flags "um" (MISSING) and "ui" (MINOR) of its mappings. "uw" alone means that somebody watches for
 * writes, and nothing is missing.
 *
 * Reading smaps walks the page tables, some 100 ms for each 10 GiB of memory in small pages.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "lib/error.h"
#include "lib/target.h"

/** struct mf_span - addresses. */
struct mf_span {
    uint64_t start_addr, end_addr;
};

/**
 * mf_served_spans() - the served mappings among those that are @wanted. Neighbours are merged.
 * @smaps_fd: open for reading; read from its beginning, by read(2) alone. @out: malloc'ed array of
 * *@count, the caller's. Return: 0 or -errno.
 */
int mf_served_spans(int smaps_fd, bool (*wanted)(const struct mf_vma *vma, const void *arg),
                    const void *arg, struct mf_span **out, unsigned *count);

/** mf_served_private() - for @wanted: private anonymous memory. */
bool mf_served_private(const struct mf_vma *vma, const void *arg);

/**
 * mf_refuse_served() - a source must have all of its memory: where somebody serves its faults (a
 * lazy restore, a migration to it that is not over) what has not arrived yet looks like memory that
 * was never touched.
 * Return: 0, -EBUSY with a sentence, or -errno with a sentence when it can't be said.
 */
int mf_refuse_served(pid_t pid, const struct mf_region_source *regions, unsigned region_count,
                     struct mf_error *err);
