/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/memferry/verbs.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "daemon/memferry/show.h"
#include "daemon/memferry/units.h"
#include "lib/check.h"
#include "lib/process.h"
#include "lib/smaps.h"
#include "lib/target.h"
#include "lib/util.h"

#define ROWS_MAX 64u

static const char *word(enum mf_check_state state)
{
    switch (state) {
    case MF_CHECK_OK:
        return "ok";
    case MF_CHECK_MISSING:
        return "missing";
    case MF_CHECK_LIMITED:
        return "limited";
    }
    return "unknown";
}

static json_t *to_json(const struct mf_check *rows, size_t count, bool able)
{
    json_t *checks = json_object();
    for (size_t i = 0; i < count; i++) {
        json_t *row =
            json_pack("{s:s, s:o, s:o, s:o}", "state", word(rows[i].state), "title",
                      show_json_text(rows[i].title), "found", show_json_text(rows[i].found),
                      "remedy", show_json_text(rows[i].remedy));
        if (json_object_set_new(checks, rows[i].name, row) < 0) {
            json_decref(checks);
            return NULL;
        }
    }
    return json_pack("{s:b, s:o}", "able", able, "checks", checks);
}

static void print(const struct mf_check *rows, size_t count, bool able)
{
    int title = 0;
    unsigned missing = 0, limited = 0;
    for (size_t i = 0; i < count; i++) {
        int length = (int)strlen(rows[i].title);
        title = length > title ? length : title;
        missing += rows[i].state == MF_CHECK_MISSING;
        limited += rows[i].state == MF_CHECK_LIMITED;
    }
    for (size_t i = 0; i < count; i++) {
        printf("%-7s  %-*s  %s\n", word(rows[i].state), title, rows[i].title, rows[i].found);
        if (rows[i].remedy[0])
            printf("         -> %s\n", rows[i].remedy);
    }
    if (!able)
        printf("\nThis host is not able to run memferry: %u of %zu things are missing.\n", missing,
               count);
    else if (limited)
        printf("\nThis host is able to run memferry; %u things are limited, as said above.\n",
               limited);
    else
        puts("\nThis host is able to run memferry.");
    if (geteuid() != 0)
        puts("This was checked as an ordinary user; memferryd runs as root, so look again with "
             "sudo.");
}

/* ---- a process ---- */

static const char *kind_word(enum mf_memory_kind kind)
{
    switch (kind) {
    case MF_MEMORY_TMPFS:
        return "tmpfs";
    case MF_MEMORY_HUGETLB:
        return "hugetlbfs";
    case MF_MEMORY_PRIVATE:
        return "private";
    default:
        return "other";
    }
}

/* Private memory that is in use, of any kind, in bytes: RssAnon of /proc/PID/status, and what of it
 * is swapped out. */
static uint64_t private_bytes(pid_t pid)
{
    char path[64], line[128];
    unsigned long long kib = 0, sum = 0;
    snprintf(path, sizeof(path), "/proc/%d/status", (int)pid);
    cleanup_fclose FILE *status = fopen(path, "re");
    while (status && fgets(line, sizeof(line), status))
        if (sscanf(line, "RssAnon: %llu kB", &kib) == 1 ||
            sscanf(line, "VmSwap: %llu kB", &kib) == 1)
            sum += kib;
    return sum << 10;
}

/* What a --region names that no file holds. */
struct private_regions {
    struct mf_region_source found[MF_REGIONS_MAX];
    const char *what[MF_REGIONS_MAX];
    unsigned count;
};

static int find_private(const struct cli_args *args, struct private_regions *out,
                        struct mf_error *err)
{
    const pid_t pid = (pid_t)args->process.pid;
    cleanup_free struct mf_vma *vmas = NULL;
    size_t count = 0;
    int r = mf_target_vmas(pid, &vmas, &count, err);
    for (unsigned i = 0; r == 0 && i < args->process.region_count; i++) {
        const struct mf_choice *choice = &args->process.region[i];
        struct mf_region_source *found = &out->found[out->count];
        if (!mf_choice_private(choice))
            continue;
        r = mf_target_private(pid, vmas, count, choice->name, choice->what, 0, false, found, err);
        if (r == 0) {
            close(found->fd);
            out->what[out->count++] = choice->what;
        }
    }
    return r;
}

static json_t *region_json(const char *name, const char *path, enum mf_memory_kind kind,
                           uint64_t size_bytes, uint32_t page_bytes)
{
    return json_pack("{s:o, s:o, s:s, s:I, s:i}", "name", show_json_text(name), "path",
                     show_json_text(path), "kind", kind_word(kind), "size_bytes",
                     (json_int_t)size_bytes, "page_bytes", (int)page_bytes);
}

static json_t *process_json(pid_t pid, const struct mf_file *files, size_t count,
                            const struct private_regions *private, const char *direct,
                            const char *reason)
{
    json_t *regions = json_array(), *left = json_array();
    for (unsigned i = 0; i < private->count; i++) {
        const struct mf_region_source *one = &private->found[i];
        json_array_append_new(regions, region_json(one->name, private->what[i], one->kind,
                                                   one->size_bytes, one->page_bytes));
    }
    for (size_t i = 0; i < count; i++) {
        const struct mf_file *f = &files[i];
        if (f->verdict == MF_FILE_REGION)
            json_array_append_new(
                regions, region_json(f->name, f->path, f->kind, f->size_bytes, f->page_bytes));
        else if (f->shared)
            json_array_append_new(left, json_pack("{s:o, s:o}", "path", show_json_text(f->path),
                                                  "why", show_json_text(f->why)));
    }
    return json_pack("{s:i, s:b, s:o, s:o, s:o, s:I, s:o}", "pid", (int)pid, "able", !reason[0],
                     "reason", show_json_text(reason), "regions", regions, "left", left,
                     "private_bytes", (json_int_t)private_bytes(pid), "untracked",
                     show_json_text(direct));
}

static void print_region(const char *name, uint64_t size_bytes, enum mf_memory_kind kind,
                         const char *path)
{
    char clean[PATH_MAX + 16];
    snprintf(clean, sizeof(clean), "%s", path);
    mf_clean_text(clean);
    printf("  %-20s %10s  %s  %s\n", name, show_bytes(size_bytes).text, kind_word(kind), clean);
}

static void print_process(pid_t pid, const struct mf_file *files, size_t count,
                          const struct private_regions *private, const char *direct)
{
    puts("Migrated:");
    for (unsigned i = 0; i < private->count; i++)
        print_region(private->found[i].name, private->found[i].size_bytes, private->found[i].kind,
                     private->what[i]);
    for (size_t i = 0; i < count; i++)
        if (files[i].verdict == MF_FILE_REGION)
            print_region(files[i].name, files[i].size_bytes, files[i].kind, files[i].path);
    puts("Left to the program's own commands (--save, --load):");
    printf("  private memory (heap, stacks, ...) of which %s is in use\n",
           show_bytes(private_bytes(pid)).text);
    for (size_t i = 0; i < count; i++)
        if (files[i].verdict == MF_FILE_LEFT && files[i].shared) {
            char line[PATH_MAX + 512];
            snprintf(line, sizeof(line), "%s: %s", files[i].path, files[i].why);
            mf_clean_text(line);
            printf("  %s\n", line);
        }
    if (direct[0])
        printf("It holds %s, and what is read through that into memory is not seen as written:\n"
               "only --mode postcopy is possible.\n",
               direct);
}

/* What stands in the way although the memory itself is as it should be. */
static int refuse(pid_t pid, const struct mf_file *files, size_t count,
                  const struct private_regions *private, struct mf_error *err)
{
    struct mf_region_source regions[2 * MF_REGIONS_MAX];
    char who[96];
    unsigned file_count = mf_files_regions(files, count, regions), all = file_count;
    for (unsigned i = 0; i < private->count; i++)
        regions[all++] = private->found[i];
    if (mf_target_vfio(pid) > 0)
        return mf_fail(err, ENOTSUP,
                       "process %d has a device passed through (VFIO or vDPA): its memory is "
                       "pinned and written behind the host's back",
                       (int)pid);
    pid_t child = mf_process_child(pid, files, count);
    if (child > 0)
        return mf_fail(err, EBUSY,
                       "process %d has a child process (pid %d) that shares this memory; only one "
                       "process can be migrated",
                       (int)pid, (int)child);
    if (mf_target_foreign(pid, true, 0, regions, file_count, who, sizeof(who)) > 0)
        return mf_fail(err, ENOTSUP,
                       "the memory of process %d is also mapped by %s; only one process can be "
                       "migrated",
                       (int)pid, who);
    return mf_refuse_served(pid, regions, all, err);
}

static int check_process(const struct cli_args *args)
{
    const pid_t pid = (pid_t)args->process.pid;
    cleanup_free struct mf_file *files = NULL;
    struct private_regions private = {.count = 0};
    size_t count = 0;
    char direct[192] = "";
    struct mf_error err = {.text = ""};
    int r = mf_process_files(pid, args->process.region, args->process.region_count, &files, &count,
                             &err);
    if (r == 0)
        r = find_private(args, &private, &err);
    if (r == 0)
        r = refuse(pid, files, count, &private, &err);
    if (r == 0 && mf_process_direct(pid, direct, sizeof(direct)) <= 0)
        direct[0] = '\0';
    if (args->json) {
        int code = show_json(process_json(pid, files, count, &private, direct, err.text));
        return code ? code : r < 0 ? CLI_FAILED : CLI_DONE;
    }
    if (files)
        print_process(pid, files, count, &private, direct);
    return r < 0 ? verb_complain(CLI_FAILED, err.text) : CLI_DONE;
}

int verb_check(const struct cli_args *args)
{
    if (args->process.pid)
        return check_process(args);
    static struct mf_check rows[ROWS_MAX];
    size_t count = mf_check_host(rows, ROWS_MAX);
    bool able = !mf_check_first_missing(rows, count);
    if (args->json) {
        int rc = show_json(to_json(rows, count, able));
        return rc ? rc : able ? CLI_DONE : CLI_FAILED;
    }
    print(rows, count, able);
    return able ? CLI_DONE : CLI_FAILED;
}
