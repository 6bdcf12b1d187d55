/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/memferryd/qemu/preflight.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/memferryd/qemu/settings.h"

/* The oldest QEMU that the tests run against (Debian 12's). */
#define OLDEST_MAJOR 7
#define OLDEST_MINOR 2

struct judge {
    const char *vm;
    const struct qemu_replies *replies;
    struct vmm_info *info;
    struct mf_error *err;
    json_int_t release; /* 100 × major + minor */
};

static const char *text_of(json_t *object, const char *key)
{
    const char *text = json_string_value(json_object_get(object, key));
    return text ? text : "";
}

static int judge_version(struct judge *j)
{
    json_t *qemu = json_object_get(j->replies->version, "qemu");
    json_int_t major = json_integer_value(json_object_get(qemu, "major"));
    json_int_t minor = json_integer_value(json_object_get(qemu, "minor"));
    json_int_t micro = json_integer_value(json_object_get(qemu, "micro"));
    j->release = 100 * major + minor;
    snprintf(j->info->version, sizeof(j->info->version), "QEMU %lld.%lld.%lld", (long long)major,
             (long long)minor, (long long)micro);
    if (j->release < 100 * OLDEST_MAJOR + OLDEST_MINOR)
        return mf_fail(
            j->err, ENOTSUP,
            "VM '%s' runs in %s; memferry needs %d.%d or newer: start the VM with a newer "
            "QEMU (a running one can't be changed)",
            j->vm, j->info->version, OLDEST_MAJOR, OLDEST_MINOR);
    const char *missing = settings_missing_capability(j->replies->capabilities);
    if (missing)
        return mf_fail(
            j->err, ENOTSUP,
            "the QEMU of VM '%s' (%s) was built without the migration capability '%s' that "
            "memferry needs; use a QEMU that has it",
            j->vm, j->info->version, missing);
    return 0;
}

static int judge_migration(struct judge *j)
{
    static const char *const at_rest[] = {"", "none", "completed", "failed", "cancelled"};
    const char *status = text_of(j->replies->migration, "status");
    for (size_t i = 0; i < sizeof(at_rest) / sizeof(at_rest[0]); i++)
        if (strcmp(status, at_rest[i]) == 0)
            return 0;
    return mf_fail(
        j->err, EBUSY,
        "VM '%s' has a migration of QEMU's own going on (status '%s'): wait for its end, or "
        "end it with migrate_cancel on its monitor",
        j->vm, status);
}

static int judge_blockers(struct judge *j)
{
    const char *reason = json_string_value(
        json_array_get(json_object_get(j->replies->migration, "blocked-reasons"), 0));
    if (!reason)
        return 0;
    return mf_fail(
        j->err, ENOTSUP,
        "QEMU says that VM '%s' can't be migrated: %s; remove what blocks it (often a device: "
        "device_del) and try again",
        j->vm, reason);
}

static int judge_source_state(struct judge *j)
{
    static const struct {
        const char *state, *remedy;
    } refusals[] = {
        {"prelaunch",
         "the guest was never started: start it (`cont`), or move it by starting it there"},
        {"inmigrate",
         "it waits for an incoming migration itself: it is a destination, use `memferry "
         "receive` for it"},
        {"postmigrate",
         "it was migrated away before; only if its guest runs nowhere else, let it go on "
         "with `cont` on its monitor and try again"},
        {"finish-migrate", "a migration of QEMU's own is just ending: wait for it"},
        {"save-vm", "a snapshot is being saved: try again when it is done"},
        {"restore-vm", "a snapshot is being loaded: try again when it is done"},
        {"shutdown", "the guest has shut down: there is nothing to move"},
        {"guest-panicked", "the guest has panicked: reset it, or let it end"},
        {"internal-error", "KVM stopped the guest with an internal error: reset it, or let it end"},
        {"io-error",
         "the guest waits because of a disk's I/O error: mend that, `cont`, and try again"},
        {"watchdog", "its watchdog stopped the guest: `cont` or reset it, and try again"},
        {"colo", "it is one half of a COLO pair: end that first"},
        {"debug", "a debugger holds the guest: let it go on, and try again"},
    };
    const char *state = text_of(j->replies->status, "status");
    j->info->dontneed_discards = true; /* ram_block_discard_range() */
    j->info->was_running = strcmp(state, "running") == 0 || strcmp(state, "suspended") == 0;
    if (j->info->was_running || strcmp(state, "paused") == 0)
        return 0;
    /* A paused guest whose migration was cancelled: older QEMUs leave it like this. It went
     * nowhere. */
    const char *last = text_of(j->replies->migration, "status");
    if (strcmp(state, "postmigrate") == 0 &&
        (strcmp(last, "cancelled") == 0 || strcmp(last, "failed") == 0))
        return 0;
    for (size_t i = 0; i < sizeof(refusals) / sizeof(refusals[0]); i++)
        if (strcmp(state, refusals[i].state) == 0)
            return mf_fail(j->err, EINVAL, "VM '%s' is in QEMU's run state '%s': %s", j->vm, state,
                           refusals[i].remedy);
    return mf_fail(j->err, EINVAL,
                   "VM '%s' is in QEMU's run state '%s': only one that is running or paused can be "
                   "migrated",
                   j->vm, state);
}

static int judge_destination_state(struct judge *j)
{
    const char *state = text_of(j->replies->status, "status");
    if (strcmp(state, "inmigrate") != 0)
        return mf_fail(j->err, EINVAL,
                       "VM '%s' is in QEMU's run state '%s' and waits for no migration: start the "
                       "destination's QEMU with the source's options and `-S -incoming defer`",
                       j->vm, state);
    const char *status = text_of(j->replies->migration, "status");
    if (*status && strcmp(status, "none") != 0)
        return mf_fail(
            j->err, EINVAL,
            "VM '%s' listens already for a migration of QEMU's own (status '%s'): start the "
            "destination's QEMU with `-incoming defer` instead of an address",
            j->vm, status);
    return 0;
}

static bool is_main_ram(const struct judge *j, json_t *backend)
{
    const char *path = json_string_value(j->replies->ram_backend);
    const char *slash = path ? strrchr(path, '/') : NULL;
    return path && strcmp(slash ? slash + 1 : path, text_of(backend, "id")) == 0;
}

/* An object that no guest address leads to holds nothing to move: only the main RAM (which a PC
 * maps by aliases, so that it has no container) and what lies in a container (NUMA nodes, DIMMs,
 * virtio-mem). */
static bool in_use(const struct judge *j, json_t *backend)
{
    return *text_of(backend, "container") || is_main_ram(j, backend);
}

static int judge_backend(struct judge *j, json_t *backend)
{
    const char *id = text_of(backend, "id"), *type = text_of(backend, "type");
    const char *path = text_of(backend, "mem-path");
    json_int_t size = json_integer_value(json_object_get(backend, "size"));
    bool is_file = strcmp(type, "memory-backend-file") == 0;

    /* A PC names its default RAM "pc.ram": a new one need not be called that. */
    const char *new_id = is_file || strchr(id, '.') == NULL ? id : "ram0";
    char remedy[320];
    snprintf(remedy, sizeof(remedy),
             "start the VM with -object memory-backend-file,id=%.60s,share=on,mem-path=/dev/shm/"
             "%.63s-%.60s,size=%lld and %s=%.60s",
             new_id, j->vm, new_id, (long long)size,
             is_main_ram(j, backend) ? "-machine …,memory-backend"
                                     : "its NUMA node's or DIMM's memdev",
             new_id);
    if (strcmp(type, "memory-backend-memfd") == 0)
        return mf_fail(
            j->err, ENOTSUP, "RAM '%s' of VM '%s' is a memory-backend-memfd, %s; %s", id, j->vm,
            j->release >= 801 ? "which this QEMU's own migration would send as well"
                              : "which has no file name by which both sides could find it",
            remedy);
    if (!is_file)
        return mf_fail(
            j->err, ENOTSUP,
            "RAM '%s' of VM '%s' is private to its QEMU (%s), so nobody else can move it; %s", id,
            j->vm, *type ? type : "of unknown type", remedy);
    if (!json_is_true(json_object_get(backend, "share")))
        return mf_fail(
            j->err, ENOTSUP,
            "RAM '%s' of VM '%s' is a memory-backend-file without share=on, so what the guest "
            "writes never reaches the file; %s",
            id, j->vm, remedy);

    if (json_is_true(json_object_get(backend, "discard-data")))
        return mf_fail(j->err, ENOTSUP,
                       "RAM '%s' of VM '%s' has discard-data=on: when its QEMU ends, its memory is "
                       "thrown away, perhaps before all of it has been sent; start it without",
                       id, j->vm);

    struct vmm_backend *out = &j->info->backends[j->info->backend_count];
    if (size <= 0 || !*path || strlen(path) >= sizeof(out->path) || strlen(id) >= sizeof(out->id))
        return mf_fail(
            j->err, EINVAL,
            "RAM '%.80s' of VM '%s' has an unusable size (%lld), path or name: names may have "
            "up to %zu characters, paths up to %zu",
            id, j->vm, (long long)size, sizeof(out->id) - 1, sizeof(out->path) - 1);
    snprintf(out->id, sizeof(out->id), "%s", id);
    snprintf(out->path, sizeof(out->path), "%s", path);
    out->size_bytes = (uint64_t)size;
    j->info->backend_count++;
    return 0;
}

static int by_id(const void *a, const void *b)
{
    return strcmp(((const struct vmm_backend *)a)->id, ((const struct vmm_backend *)b)->id);
}

static int judge_backends(struct judge *j)
{
    size_t at, count = json_array_size(j->replies->backends);
    json_t *backend;
    j->info->backends = calloc(count ? count : 1, sizeof(*j->info->backends));
    if (!j->info->backends)
        return mf_fail(j->err, ENOMEM, "out of memory while looking at VM '%s'", j->vm);
    json_array_foreach(j->replies->backends, at, backend)
    {
        if (!in_use(j, backend))
            continue;
        int rc = judge_backend(j, backend);
        if (rc)
            return rc;
    }
    if (j->info->backend_count == 0)
        return mf_fail(
            j->err, ENOTSUP,
            "VM '%s' has no RAM that memferry can move; start it with -object "
            "memory-backend-file,id=ram0,share=on,mem-path=/dev/shm/%.40s,size=… and -machine "
            "…,memory-backend=ram0",
            j->vm, j->vm);
    qsort(j->info->backends, j->info->backend_count, sizeof(*j->info->backends), by_id);
    return 0;
}

/* Devices that read or write guest RAM from outside QEMU's page tables: their writes are not seen
 * by the dirty tracking, and their reads do not wait for a page that has yet to come. */
static int judge_devices(struct judge *j)
{
    static const struct {
        const char *part, *why;
    } refusals[] = {
        {"vfio",
         "passes a physical device through, which reads and writes RAM behind everybody's back"},
        {"vhost-user-", "lets another process (vhost-user) read and write the guest's RAM"},
        {"vhost-vdpa", "lets a physical device (vDPA) read and write the guest's RAM"},
        {"vdpa-", "lets a physical device (vDPA) read and write the guest's RAM"},
        {"ivshmem-", "shares memory with other processes, which would stay behind"},
    };
    size_t at;
    json_t *device;
    json_array_foreach(j->replies->devices, at, device)
    {
        const char *type = text_of(device, "type");
        for (size_t i = 0; i < sizeof(refusals) / sizeof(refusals[0]); i++)
            if (strstr(type, refusals[i].part))
                return mf_fail(
                    j->err, ENOTSUP,
                    "device '%s' (%s) of VM '%s' %s: unplug it (device_del) or start the VM "
                    "without it",
                    text_of(device, "name"), type, j->vm, refusals[i].why);
    }
    const char *network = json_string_value(j->replies->network);
    if (network && strstr(network, "type=vhost-user"))
        return mf_fail(
            j->err, ENOTSUP,
            "VM '%s' has a vhost-user network backend, by which another process reads and "
            "writes the guest's RAM: use -netdev tap (vhost=on is all right) instead",
            j->vm);
    if (network && strstr(network, "type=vhost-vdpa"))
        return mf_fail(
            j->err, ENOTSUP,
            "VM '%s' has a vhost-vdpa network backend, by which a physical device reads and "
            "writes the guest's RAM: use -netdev tap (vhost=on is all right) instead",
            j->vm);
    return 0;
}

const char *preflight_direct_drive(const json_t *block_nodes)
{
    const json_t *node;
    size_t at;
    json_array_foreach(block_nodes, at, node)
    {
        const char *name = json_string_value(json_object_get(node, "node-name"));
        if (json_is_true(json_object_get(json_object_get(node, "cache"), "direct")))
            return name ? name : "?";
    }
    return NULL;
}

/* No refusal: vmm.h says what it means. */
static int note_direct_io(struct judge *j)
{
    json_t *node;
    size_t at;
    const char *drive = preflight_direct_drive(j->replies->block_nodes);
    snprintf(j->info->direct_io, sizeof(j->info->direct_io), "%s", drive ? drive : "");
    if (drive)
        return 0;
    /* These hand guest pages to the host's SCSI layer themselves. */
    static const char *const passing[] = {"scsi-block", "scsi-generic", "vhost-scsi"};
    json_array_foreach(j->replies->devices, at, node)
    {
        const char *type = json_string_value(json_object_get(node, "type"));
        for (size_t i = 0; type && i < sizeof(passing) / sizeof(passing[0]); i++)
            if (strncmp(type, passing[i], strlen(passing[i])) == 0)
                snprintf(j->info->direct_io, sizeof(j->info->direct_io), "%s", type);
    }
    return 0;
}

int preflight_judge(enum vmm_role role, const char *vm_name, const struct qemu_replies *replies,
                    struct vmm_info *info, struct mf_error *err)
{
    int (*const checks[])(struct judge *) = {
        judge_version,
        role == VMM_SOURCE ? judge_migration : judge_destination_state,
        role == VMM_SOURCE ? judge_source_state : NULL,
        judge_devices,
        judge_backends,
        role == VMM_SOURCE ? judge_blockers : NULL,
        note_direct_io,
    };
    struct judge j = {.vm = vm_name, .replies = replies, .info = info, .err = err};
    for (size_t i = 0; i < sizeof(checks) / sizeof(checks[0]); i++) {
        int rc = checks[i] ? checks[i](&j) : 0;
        if (rc)
            return rc;
    }
    return 0;
}
