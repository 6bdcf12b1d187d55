/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The memory of a process that is no known VMM: what can be migrated, by which name; and what its
 * threads and descriptors say about it. Sources: proc_pid_maps(5), proc_pid_stat(5),
 * proc_pid_fdinfo(5), io_uring's fdinfo (io_uring/fdinfo.c of the kernel).
 */
#include "lib/process.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "lib/proc_stat.h"
#include "lib/util.h"

/* ---- choices ---- */

int mf_choice_parse(const char *text, struct mf_choice *out, struct mf_error *err)
{
    const char *equals = strchr(text, '=');
    size_t name_bytes = equals ? (size_t)(equals - text) : 0;
    struct mf_choice choice = {0};
    if (!equals || !equals[1] || name_bytes >= sizeof(choice.name) ||
        strlen(equals + 1) >= sizeof(choice.what))
        return mf_fail(err, EINVAL,
                       "'%.80s' is not NAME=FILE: a name for the region, and the path of the file "
                       "as /proc/PID/maps has it, memfd:NAME, an address in it (0x...), or of "
                       "private memory anon:NAME or anon:START-END",
                       text);
    memcpy(choice.name, text, name_bytes);
    memcpy(choice.what, equals + 1, strlen(equals + 1));
    if (!mf_name_valid(choice.name))
        return mf_fail(err, EINVAL,
                       "'%.63s' is not usable as the name of a region: it has 1 to %d letters, "
                       "digits, '.', '_' and '-', and starts with neither '.' nor '-'",
                       choice.name, MF_NAME_MAX);
    bool address = strncmp(choice.what, "0x", 2) == 0;
    char *end = NULL;
    errno = 0;
    if (address && (strtoull(choice.what, &end, 16) == 0 || errno || *end))
        return mf_fail(err, EINVAL, "'%.80s' is not an address", choice.what);
    if (!address && choice.what[0] != '/' && strncmp(choice.what, "memfd:", 6) != 0 &&
        !mf_choice_private(&choice))
        return mf_fail(err, EINVAL,
                       "'%.80s' is neither an absolute path, nor memfd:NAME, nor an address "
                       "(0x...), nor private memory (anon:NAME, anon:START-END)",
                       choice.what);
    *out = choice;
    return 0;
}

bool mf_choice_private(const struct mf_choice *choice)
{
    return strncmp(choice->what, MF_TARGET_ANON, strlen(MF_TARGET_ANON)) == 0;
}

static bool chooses(const struct mf_choice *choice, const struct mf_file *file,
                    const struct mf_vma *vmas, size_t vma_count)
{
    if (mf_choice_private(choice))
        return false;
    if (choice->what[0] == '/')
        return strcmp(choice->what, file->path) == 0;
    if (strncmp(choice->what, "memfd:", 6) == 0)
        return file->path[0] == '/' && strcmp(choice->what, file->path + 1) == 0;
    uint64_t addr = strtoull(choice->what, NULL, 16);
    for (size_t i = 0; i < vma_count; i++)
        if (vmas[i].start_addr <= addr && addr < vmas[i].end_addr)
            return vmas[i].inode == file->inode && vmas[i].device == file->device;
    return addr >= file->start_addr && addr < file->end_addr;
}

/* ---- files ---- */

/* What /proc/PID/maps shows of shared anonymous memory that was given a name (prctl(2),
 * PR_SET_VMA_ANON_NAME). */
static const char anon_shmem[] = "[anon_shmem:";

static bool is_file(const struct mf_vma *vma)
{
    return vma->inode != 0 &&
           (vma->path[0] == '/' || strncmp(vma->path, anon_shmem, strlen(anon_shmem)) == 0);
}

int mf_files_of(const struct mf_vma *vmas, size_t vma_count, struct mf_file **out, size_t *count,
                struct mf_error *err)
{
    size_t used = 0;
    struct mf_file *files = calloc(vma_count ? vma_count : 1, sizeof(*files));
    if (!files)
        return mf_fail(err, ENOMEM, "out of memory");
    for (size_t i = 0; i < vma_count; i++) {
        const struct mf_vma *vma = &vmas[i];
        if (!is_file(vma))
            continue;
        size_t at = 0;
        while (at < used && (files[at].inode != vma->inode || files[at].device != vma->device))
            at++;
        struct mf_file *file = &files[at];
        if (at == used) {
            used++;
            file->device = vma->device;
            file->inode = vma->inode;
        }
        /* A file is found through a shared mapping of it, if there is one. */
        if (!file->end_addr || (vma->shared && !file->shared)) {
            snprintf(file->path, sizeof(file->path), "%s", vma->path);
            file->start_addr = vma->start_addr;
            file->end_addr = vma->end_addr;
        }
        file->shared |= vma->shared;
        file->written_to |= vma->shared && vma->writable;
        file->private_too |= !vma->shared;
    }
    *out = files;
    *count = used;
    return 0;
}

/* The name that a file goes by, the same in each run of a program. */
static int name_file(struct mf_file *file, struct mf_error *err)
{
    const char *name = strrchr(file->path, '/');
    size_t length;
    name = name ? name + 1 : file->path;
    if (strncmp(file->path, anon_shmem, strlen(anon_shmem)) == 0) {
        name = file->path + strlen(anon_shmem);
        length = strcspn(name, "]");
    } else {
        if (strncmp(file->path, "/memfd:", 7) == 0)
            name = file->path + 7;
        length = strlen(name);
    }
    if (length == 0 || length >= sizeof(file->name))
        return mf_fail(err, ENAMETOOLONG,
                       "the name of %.200s makes no name for a region; give it one: --region "
                       "NAME=FILE",
                       file->path);
    for (size_t i = 0; i < length; i++) {
        char c = name[i];
        bool plain = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
                     c == '.' || c == '_' || c == '-';
        file->name[i] = plain ? c : '_';
    }
    file->name[length] = '\0';
    return 0;
}

/* Why a file is left alone when nobody names it, or NULL. */
static const char *why_left(const struct mf_file *file)
{
    if (file->device_file)
        return "a device";
    if (!file->shared)
        return "mapped privately";
    if (!file->written_to)
        return "mapped for reading only";
    if (file->kind == MF_MEMORY_DAX)
        return "a file on persistent memory (fs-dax), which userfaultfd can't serve; both hosts "
               "have to see it as it is";
    if (file->kind == MF_MEMORY_OTHER)
        return "a file on a disk, which both hosts have to see as it is";
    return NULL;
}

static int refuse_private(const struct mf_file *file, const char *process, struct mf_error *err)
{
    return mf_fail(err, EOPNOTSUPP,
                   "%s maps %s (region %s) privately as well, and what it wrote there is in no "
                   "file: unmap that, or name the other regions with --region and save this one",
                   process, file->path, file->name);
}

static int judge_choice(struct mf_file *file, const struct mf_choice *choice, const char *process,
                        struct mf_error *err)
{
    snprintf(file->name, sizeof(file->name), "%s", choice->name);
    if (file->verdict == MF_FILE_REGION)
        return mf_fail(err, EINVAL, "--region %s names %s, which another --region names too",
                       choice->name, file->path);
    if (file->device_file || (file->kind != MF_MEMORY_TMPFS && file->kind != MF_MEMORY_HUGETLB))
        return mf_fail(err, EOPNOTSUPP,
                       "%s, which --region %s names, is %s and can't be migrated; it has to be on "
                       "tmpfs or hugetlbfs (memfd_create, /dev/shm)",
                       file->path, choice->name,
                       file->device_file             ? "a device"
                       : file->kind == MF_MEMORY_DAX ? "on persistent memory (fs-dax)"
                                                     : "on a disk file system");
    if (!file->shared)
        return mf_fail(err, EOPNOTSUPP,
                       "%s, which --region %s names, is mapped privately (MAP_PRIVATE): what the "
                       "process wrote there is in no file and can't be migrated",
                       file->path, choice->name);
    if (file->private_too)
        return refuse_private(file, process, err);
    file->verdict = MF_FILE_REGION;
    file->why = NULL;
    return 0;
}

static int judge_all(struct mf_file *files, size_t count, const char *process, struct mf_error *err)
{
    for (size_t i = 0; i < count; i++) {
        files[i].why = why_left(&files[i]);
        files[i].verdict = files[i].why ? MF_FILE_LEFT : MF_FILE_REGION;
        if (files[i].why)
            continue;
        int r = name_file(&files[i], err);
        if (r == 0 && files[i].private_too)
            r = refuse_private(&files[i], process, err);
        if (r < 0)
            return r;
    }
    for (size_t i = 0; i < count; i++)
        for (size_t j = 0; j < i; j++)
            if (files[i].verdict == MF_FILE_REGION && files[j].verdict == MF_FILE_REGION &&
                strcmp(files[i].name, files[j].name) == 0)
                return mf_fail(err, ENOTUNIQ,
                               "%s maps two files by the name %s (at %#" PRIx64 " and %#" PRIx64
                               "), and the other host could not tell which is which; name each: "
                               "--region NAME=0x%" PRIx64 " ..., on both hosts",
                               process, files[i].name, files[j].start_addr, files[i].start_addr,
                               files[j].start_addr);
    return 0;
}

/* @vmas: for choices by address; may be NULL, then the address has to be in the mapping that the
 * file was found by. */
static int judge(struct mf_file *files, size_t count, const struct mf_choice *choices,
                 unsigned choice_count, const char *process, const struct mf_vma *vmas,
                 size_t vma_count, struct mf_error *err)
{
    size_t regions = 0;
    int r = 0;
    if (choice_count == 0)
        r = judge_all(files, count, process, err);
    for (size_t i = 0; choice_count && i < count; i++) {
        files[i].verdict = MF_FILE_LEFT;
        files[i].why = why_left(&files[i]);
        if (!files[i].why)
            files[i].why = "not named by a --region";
    }
    for (unsigned i = 0; r == 0 && i < choice_count; i++) {
        struct mf_file *found = NULL;
        for (unsigned j = 0; j < i; j++)
            if (strcmp(choices[i].name, choices[j].name) == 0)
                return mf_fail(err, EINVAL, "--region %s is given twice", choices[i].name);
        if (mf_choice_private(&choices[i])) {
            regions++;
            continue;
        }
        for (size_t j = 0; j < count; j++) {
            if (!chooses(&choices[i], &files[j], vmas, vma_count))
                continue;
            if (found)
                return mf_fail(err, ENOTUNIQ,
                               "%s maps two files by the name %s, which --region %s names; name it "
                               "by an address: 0x%" PRIx64 " or 0x%" PRIx64,
                               process, choices[i].what, choices[i].name, found->start_addr,
                               files[j].start_addr);
            found = &files[j];
        }
        if (!found)
            return mf_fail(err, ENOENT,
                           "%s does not map %s, which --region %s names; /proc/PID/maps lists what "
                           "it maps",
                           process, choices[i].what, choices[i].name);
        r = judge_choice(found, &choices[i], process, err);
    }
    for (size_t i = 0; i < count; i++)
        regions += files[i].verdict == MF_FILE_REGION;
    if (r == 0 && regions == 0)
        r = mf_fail(err, ENOENT,
                    "%s has no memory that can be migrated: none that it maps shared and writable "
                    "from a file on tmpfs or hugetlbfs (memfd_create, shm_open, MAP_SHARED)",
                    process);
    if (r == 0 && regions > MF_REGIONS_MAX)
        r = mf_fail(err, E2BIG, "%s has %zu regions, more than the %d that can be migrated",
                    process, regions, MF_REGIONS_MAX);
    return r;
}

int mf_files_judge(struct mf_file *files, size_t count, const struct mf_choice *choices,
                   unsigned choice_count, const char *process, struct mf_error *err)
{
    return judge(files, count, choices, choice_count, process, NULL, 0, err);
}

/* Kind and size of those files of which it matters. */
static int look_at(pid_t pid, const struct mf_vma *vmas, size_t vma_count, struct mf_file *file,
                   struct mf_error *err)
{
    const struct mf_vma *vma = NULL;
    for (size_t i = 0; i < vma_count && !vma; i++)
        if (vmas[i].start_addr == file->start_addr)
            vma = &vmas[i];
    struct mf_region_source found = {.kind = MF_MEMORY_OTHER, .fd = -1};
    if (!vma)
        return 0;
    int r = mf_target_file(pid, vma, "?", false, &found, err);
    file->kind = found.kind;
    if (r == -EOPNOTSUPP)
        return 0;
    if (r == -ENODEV) {
        file->device_file = true;
        return 0;
    }
    if (r < 0)
        return r;
    file->size_bytes = found.size_bytes;
    file->page_bytes = found.page_bytes;
    close(found.fd);
    return 0;
}

static void describe(pid_t pid, char *out, size_t size)
{
    char name[64];
    mf_target_comm(pid, name, sizeof(name));
    snprintf(out, size, "%s (pid %d)", name, (int)pid);
}

static int look(pid_t pid, const struct mf_choice *choices, unsigned choice_count,
                const char *process, struct mf_file **out, size_t *count, struct mf_error *err)
{
    cleanup_free struct mf_vma *vmas = NULL;
    cleanup_free struct mf_file *files = NULL;
    size_t vma_count = 0, file_count = 0;
    int r = mf_target_vmas(pid, &vmas, &vma_count, err);
    if (r == 0)
        r = mf_files_of(vmas, vma_count, &files, &file_count, err);
    for (size_t i = 0; r == 0 && i < file_count; i++) {
        bool chosen = false;
        for (unsigned j = 0; j < choice_count; j++)
            chosen |= chooses(&choices[j], &files[i], vmas, vma_count);
        if (files[i].written_to || chosen)
            r = look_at(pid, vmas, vma_count, &files[i], err);
    }
    /* From here on errors are about what was found, not about finding it. */
    if (r == 0 &&
        judge(files, file_count, choices, choice_count, process, vmas, vma_count, err) < 0)
        return -EBADMSG;
    if (r < 0)
        return r;
    *out = files;
    files = NULL;
    *count = file_count;
    return 0;
}

/* A process that maps and unmaps while it is looked at is looked at again. */
#define LOOKS 20

int mf_process_files(pid_t pid, const struct mf_choice *choices, unsigned choice_count,
                     struct mf_file **out, size_t *count, struct mf_error *err)
{
    char process[96];
    describe(pid, process, sizeof(process));
    struct mf_error why = {0};
    int r = -ENOENT;
    for (unsigned i = 0; i < LOOKS && (r == -ENOENT || r == -ESTALE); i++)
        r = look(pid, choices, choice_count, process, out, count, &why);
    return r < 0 ? mf_fail(err, why.code, "%s", why.text) : 0;
}

static int recheck(pid_t pid, const struct mf_file *known, size_t known_count, bool all,
                   const char *process, struct mf_error *err)
{
    cleanup_free struct mf_vma *vmas = NULL;
    cleanup_free struct mf_file *files = NULL;
    size_t vma_count = 0, count = 0;
    int r = mf_target_vmas(pid, &vmas, &vma_count, err);
    if (r == 0)
        r = mf_files_of(vmas, vma_count, &files, &count, err);
    for (size_t i = 0; r == 0 && i < count; i++) {
        const struct mf_file *before = NULL;
        for (size_t j = 0; j < known_count && !before; j++)
            if (known[j].inode == files[i].inode && known[j].device == files[i].device)
                before = &known[j];
        bool is_region = before && before->verdict == MF_FILE_REGION;
        if (!is_region && (!all || !files[i].written_to))
            continue;
        r = look_at(pid, vmas, vma_count, &files[i], err);
        if (r < 0)
            return r;
        if (is_region && files[i].size_bytes != before->size_bytes) {
            mf_fail(err, ESTALE, "%s has changed the size of region %s since the migration began",
                    process, before->name);
            return -EBADMSG;
        }
        if (is_region && files[i].private_too) {
            refuse_private(before, process, err);
            return -EBADMSG;
        }
        if (!is_region && !why_left(&files[i])) {
            mf_fail(err, ESTALE,
                    "%s has come to map %s since the migration began, which is not migrated: try "
                    "again, or name the regions with --region",
                    process, files[i].path);
            return -EBADMSG;
        }
    }
    return r;
}

int mf_process_recheck(pid_t pid, const struct mf_file *known, size_t known_count, bool all,
                       struct mf_error *err)
{
    char process[96];
    describe(pid, process, sizeof(process));
    struct mf_error why = {0};
    int r = -ENOENT;
    for (unsigned i = 0; i < LOOKS && (r == -ENOENT || r == -ESTALE); i++)
        r = recheck(pid, known, known_count, all, process, &why);
    return r < 0 ? mf_fail(err, why.code, "%s", why.text) : 0;
}

unsigned mf_files_regions(const struct mf_file *files, size_t count, struct mf_region_source *out)
{
    unsigned used = 0;
    for (size_t i = 0; i < count && used < MF_REGIONS_MAX; i++)
        if (files[i].verdict == MF_FILE_REGION)
            out[used++] = (struct mf_region_source){.kind = files[i].kind,
                                                    .fd = -1,
                                                    .size_bytes = files[i].size_bytes,
                                                    .page_bytes = files[i].page_bytes,
                                                    .device = files[i].device,
                                                    .inode = files[i].inode};
    return used;
}

/* A child may have a child, and so on; one that is its own ancestor there is not, but a bound costs
 * nothing. */
#define DEPTH_MAX 16u

static pid_t find_child(pid_t pid, const struct mf_region_source *regions, unsigned count,
                        unsigned depth)
{
    char path[320];
    snprintf(path, sizeof(path), "/proc/%d/task", pid);
    cleanup_closedir DIR *tasks = opendir(path);
    pid_t found = 0;
    for (struct dirent *entry; tasks && !found && (entry = readdir(tasks));) {
        if (entry->d_name[0] == '.')
            continue;
        snprintf(path, sizeof(path), "/proc/%d/task/%s/children", pid, entry->d_name);
        cleanup_fclose FILE *children = fopen(path, "re");
        int child;
        while (children && !found && fscanf(children, "%d", &child) == 1) {
            if (mf_target_maps(child, regions, count))
                found = child;
            else if (depth < DEPTH_MAX)
                found = find_child(child, regions, count, depth + 1);
        }
    }
    return found;
}

pid_t mf_process_child(pid_t pid, const struct mf_file *files, size_t count)
{
    struct mf_region_source regions[MF_REGIONS_MAX];
    return find_child(pid, regions, mf_files_regions(files, count, regions), 0);
}

/* ---- threads ---- */

enum mf_run mf_process_run(pid_t pid)
{
    char path[64];
    unsigned alive = 0, stopped = 0;
    snprintf(path, sizeof(path), "/proc/%d/task", pid);
    cleanup_closedir DIR *tasks = opendir(path);
    if (!tasks)
        return MF_RUN_GONE;
    for (struct dirent *entry; (entry = readdir(tasks));) {
        if (entry->d_name[0] == '.')
            continue;
        struct mf_proc_stat stat;
        /* A leader that has ended stays as a zombie while other threads live. */
        if (mf_proc_stat(pid, (pid_t)strtol(entry->d_name, NULL, 10), &stat) < 0 ||
            stat.state == 'Z' || stat.state == 'X')
            continue;
        alive++;
        stopped += stat.state == 'T';
    }
    if (alive == 0)
        return MF_RUN_GONE;
    return stopped == alive ? MF_RUN_STOPPED : MF_RUN_RUNNING;
}

/* ---- descriptors ---- */

/* O_DIRECT in fdinfo's flags, or registered buffers of an io_uring. */
static bool writes_past_processor(const char *path, bool *ring)
{
    char line[256];
    cleanup_fclose FILE *info = fopen(path, "re");
    while (info && fgets(line, sizeof(line), info)) {
        unsigned long value = 0;
        if (sscanf(line, "flags: %lo", &value) == 1 && (value & O_DIRECT))
            return true;
        if (sscanf(line, "UserBufs: %lu", &value) == 1 && value > 0) {
            *ring = true;
            return true;
        }
    }
    return false;
}

int mf_process_direct(pid_t pid, char *what, size_t what_size)
{
    char path[320], link[160];
    snprintf(path, sizeof(path), "/proc/%d/fdinfo", pid);
    cleanup_closedir DIR *dir = opendir(path);
    if (!dir)
        return errno == ENOENT ? -ESRCH : -errno;
    for (struct dirent *entry; (entry = readdir(dir));) {
        bool ring = false;
        if (entry->d_name[0] == '.')
            continue;
        snprintf(path, sizeof(path), "/proc/%d/fdinfo/%s", pid, entry->d_name);
        if (!writes_past_processor(path, &ring))
            continue;
        snprintf(path, sizeof(path), "/proc/%d/fd/%s", pid, entry->d_name);
        ssize_t length = readlink(path, link, sizeof(link) - 1);
        link[length > 0 ? length : 0] = '\0';
        if (!ring && strncmp(link, "pipe:", 5) == 0)
            continue; /* there it means packets */
        snprintf(what, what_size, "descriptor %s (%s)", entry->d_name,
                 ring ? "io_uring with registered buffers" : link);
        return 1;
    }
    return 0;
}
