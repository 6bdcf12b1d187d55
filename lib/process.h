/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Which memory of a process that is no known VMM is migrated, and under which names.
 *
 * Both hosts have to come to the same answer by looking at their own process, so it follows from
 * what stays the same: the name of a file. Addresses, inode numbers and the order of mappings are
 * different in each run of a program.
 *
 * Memory that is migrated is that of files on tmpfs and hugetlbfs (memfd_create(2), shm_open(3),
 * shmget(2) and shared anonymous memory are such files too) which the process maps shared and
 * writable. All else is left alone: it is for the program's own commands to save and load.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "lib/error.h"
#include "lib/target.h"

/** What is to become of a mapped file. */
enum mf_file_verdict {
    MF_FILE_REGION, /**< migrated */
    MF_FILE_LEFT,   /**< not migrated, and no harm in that */
};

/** struct mf_file - one file that a process maps. */
struct mf_file {
    char name[64];  /**< of the region; of no meaning unless it is one */
    char path[512]; /**< as /proc/PID/maps has it */
    dev_t device;
    ino_t inode;
    uint64_t start_addr, end_addr; /**< of one of its mappings; a shared one if there is one */
    bool shared, written_to;       /**< mapped shared; so that it can be written to */
    bool private_too;              /**< mapped privately as well */
    bool device_file;              /**< no regular file */
    enum mf_memory_kind kind;
    uint64_t size_bytes;
    uint32_t page_bytes;
    enum mf_file_verdict verdict;
    const char *why; /**< it is left alone: a constant */
};

/** struct mf_choice - a region as an operator names it (`--region NAME=WHAT`).
 * @what: a path as /proc/PID/maps has it, "memfd:NAME", or "0x…", an address inside of it; private
 * anonymous memory: "anon:NAME" or "anon:START-END", as mf_target_private() takes it. */
struct mf_choice {
    char name[64];
    char what[512];
};

#define MF_CHOICES_MAX MF_REGIONS_MAX

/**
 * mf_choice_parse() - "NAME=WHAT". NAME as mf_name_valid(). Pure.
 * Return: 0 or -EINVAL with a sentence.
 */
int mf_choice_parse(const char *text, struct mf_choice *out, struct mf_error *err);

/** mf_choice_private() - does it name private anonymous memory, which no file holds? The functions
 * below that look for files leave such a choice to mf_target_private(). */
bool mf_choice_private(const struct mf_choice *choice);

/**
 * mf_files_of() - the files among @vmas, each once; `kind` and what follows it are not filled.
 * Pure.
 * @out: malloc'ed array of *@count, the caller's. Return: 0 or -ENOMEM.
 */
int mf_files_of(const struct mf_vma *vmas, size_t vma_count, struct mf_file **out, size_t *count,
                struct mf_error *err);

/**
 * mf_files_judge() - say which of @files are regions and name them. Pure.
 * @choices: what an operator named; none: every file that can be migrated is, under the last part
 * of its path, a memfd and named shared memory under their names.
 * Return: 0, or -errno with the cause and the remedy: two files of one name, a choice that is not
 * mapped or can't be served, a region that is mapped privately too, none at all.
 */
int mf_files_judge(struct mf_file *files, size_t count, const struct mf_choice *choices,
                   unsigned choice_count, const char *process, struct mf_error *err);

/**
 * mf_process_files() - both, and what lies between them: look at each file of process @pid.
 * @out: as of mf_files_of, filled on success only. Return: 0 or -errno with a sentence.
 */
int mf_process_files(pid_t pid, const struct mf_choice *choices, unsigned choice_count,
                     struct mf_file **out, size_t *count, struct mf_error *err);

/**
 * mf_process_recheck() - is the memory of @pid still what it was found to be?
 * @known: as mf_process_files gave it. @all: every file that can be migrated is a region; then one
 * that has appeared since is an error.
 * A region that is not mapped at the moment is none. Return: 0 or -errno with a sentence.
 */
int mf_process_recheck(pid_t pid, const struct mf_file *known, size_t known_count, bool all,
                       struct mf_error *err);

/** mf_files_regions() - those of @files that are regions, as far as it takes to know a mapping of
 * them (mf_region_of()). @out: room for MF_REGIONS_MAX. Return: how many. */
unsigned mf_files_regions(const struct mf_file *files, size_t count, struct mf_region_source *out);

/** mf_process_child() - has the process a child (or grandchild) that maps one of the regions?
 * Children that left it to init are not seen. Return: its process id, or 0. */
pid_t mf_process_child(pid_t pid, const struct mf_file *files, size_t count);

/** enum mf_run - what the threads of a process do, taken together. */
enum mf_run {
    MF_RUN_RUNNING, /**< at least one may run */
    MF_RUN_STOPPED, /**< every one is stopped (job control) */
    MF_RUN_GONE,
};

/** mf_process_run() - from /proc/PID/task/TID/stat of every thread. */
enum mf_run mf_process_run(pid_t pid);

/**
 * mf_process_direct() - does the process hold something that may write to its memory past the
 * processor, so that the kernel does not see which pages were written: a file opened with O_DIRECT,
 * or buffers registered with an io_uring. (The page is pinned when the read begins and written
 * when it ends.)
 * Return: 1 with @what filled (such as "descriptor 7 (/dev/sda, O_DIRECT)"), 0, or -errno.
 */
int mf_process_direct(pid_t pid, char *what, size_t what_size);
