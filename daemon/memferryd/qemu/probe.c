/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Preflight's questions: queries only, nothing is changed. The answers are collected in one JSON
 * object, which preflight.c then judges.
 */
#include <errno.h>
#include <string.h>

#include "daemon/memferryd/qemu/preflight.h"
#include "daemon/memferryd/qemu/qemu.h"

static json_t *reply(const struct vmm *vmm, const char *key)
{
    return json_object_get(vmm->probe, key);
}

#define KEEP(function, key)                                                                        \
    static int function(struct vmm *vmm, json_t *value, const char *error, struct mf_error *err)   \
    {                                                                                              \
        (void)error;                                                                               \
        (void)err;                                                                                 \
        json_object_set(vmm->probe, key, value);                                                   \
        return STEP_NEXT;                                                                          \
    }
KEEP(keep_status, "status")
KEEP(keep_migration, "migration")
KEEP(keep_capabilities, "capabilities")
KEEP(keep_ram_backend, "ram_backend")
KEEP(keep_network, "network")
KEEP(keep_block_nodes, "block_nodes")

static bool list_objects(struct vmm *vmm, json_t **out)
{
    (void)vmm;
    *out = json_pack("{s:s}", "path", "/objects");
    return true;
}

/* "child<TYPE>" → TYPE in @out; false when @type is no child or too long. */
static bool child_type(const char *type, char *out, size_t size)
{
    static const char prefix[] = "child<";
    size_t length = type ? strlen(type) : 0, skip = sizeof(prefix) - 1;
    if (length <= skip + 1 || strncmp(type, prefix, skip) != 0 || length - skip - 1 >= size)
        return false;
    memcpy(out, type + skip, length - skip - 1);
    out[length - skip - 1] = '\0';
    return true;
}

static const char *const backend_properties[] = {"share", "size", "mem-path", "container",
                                                 "discard-data"};
#define BACKEND_PROPERTIES (sizeof(backend_properties) / sizeof(backend_properties[0]))

static int keep_objects(struct vmm *vmm, json_t *value, const char *error, struct mf_error *err)
{
    (void)error;
    (void)err;
    json_t *backends = json_array(), *row;
    size_t at;
    json_array_foreach(value, at, row)
    {
        char type[64];
        const char *name = json_string_value(json_object_get(row, "name"));
        if (name &&
            child_type(json_string_value(json_object_get(row, "type")), type, sizeof(type)) &&
            strncmp(type, "memory-backend-", strlen("memory-backend-")) == 0)
            json_array_append_new(backends, json_pack("{s:s, s:s}", "id", name, "type", type));
    }
    json_object_set_new(vmm->probe, "backends", backends);
    vmm->probe_at = 0;
    return STEP_NEXT;
}

static bool get_ram_backend(struct vmm *vmm, json_t **out)
{
    (void)vmm;
    *out = json_pack("{s:s, s:s}", "path", "/machine", "property", "memory-backend");
    return true;
}

/* One question per backend and property; probe_at counts them. */
static bool get_backend_property(struct vmm *vmm, json_t **out)
{
    json_t *backend = json_array_get(reply(vmm, "backends"), vmm->probe_at / BACKEND_PROPERTIES);
    if (!backend)
        return false;
    const char *id = json_string_value(json_object_get(backend, "id"));
    const char *property = backend_properties[vmm->probe_at % BACKEND_PROPERTIES];
    json_t *path = strcmp(property, "container") == 0
                       ? json_sprintf("/objects/%s/%s[0]", id, id) /* its memory region */
                       : json_sprintf("/objects/%s", id);
    *out = json_pack("{s:o, s:s}", "path", path, "property", property);
    return true;
}

static int keep_backend_property(struct vmm *vmm, json_t *value, const char *error,
                                 struct mf_error *err)
{
    (void)error;
    (void)err;
    json_t *backend = json_array_get(reply(vmm, "backends"), vmm->probe_at / BACKEND_PROPERTIES);
    if (value)
        json_object_set(backend, backend_properties[vmm->probe_at % BACKEND_PROPERTIES], value);
    vmm->probe_at++;
    return STEP_AGAIN;
}

static bool list_named_devices(struct vmm *vmm, json_t **out)
{
    (void)vmm;
    *out = json_pack("{s:s}", "path", "/machine/peripheral");
    return true;
}

static bool list_nameless_devices(struct vmm *vmm, json_t **out)
{
    (void)vmm;
    *out = json_pack("{s:s}", "path", "/machine/peripheral-anon");
    return true;
}

static int keep_devices(struct vmm *vmm, json_t *value, const char *error, struct mf_error *err)
{
    (void)error;
    (void)err;
    json_t *row;
    size_t at;
    json_array_foreach(value, at, row)
    {
        char type[64];
        const char *name = json_string_value(json_object_get(row, "name"));
        if (name && child_type(json_string_value(json_object_get(row, "type")), type, sizeof(type)))
            json_array_append_new(reply(vmm, "devices"),
                                  json_pack("{s:s, s:s}", "name", name, "type", type));
    }
    return STEP_NEXT;
}

/* There is no QMP command that lists network backends. */
static bool info_network(struct vmm *vmm, json_t **out)
{
    (void)vmm;
    *out = json_pack("{s:s}", "command-line", "info network");
    return true;
}

static const struct qemu_step probe_steps[] = {
    {.command = "query-status", .what = "tell its run state", .done = keep_status},
    {.command = "query-migrate", .what = "tell about migrations", .done = keep_migration},
    {.command = "query-migrate-capabilities",
     .what = "list its migration capabilities",
     .done = keep_capabilities},
    {.command = "qom-list",
     .what = "list its memory backends",
     .arguments = list_objects,
     .done = keep_objects},
    {.command = "qom-get",
     .what = "name its main RAM",
     .arguments = get_ram_backend,
     .done = keep_ram_backend,
     .may_fail = true},
    {.command = "qom-get",
     .what = "describe its memory backends",
     .arguments = get_backend_property,
     .done = keep_backend_property,
     .may_fail = true},
    {.command = "qom-list",
     .what = "list its devices",
     .arguments = list_named_devices,
     .done = keep_devices},
    {.command = "qom-list",
     .what = "list its devices",
     .arguments = list_nameless_devices,
     .done = keep_devices},
    {.command = "human-monitor-command",
     .what = "list its network backends",
     .arguments = info_network,
     .done = keep_network,
     .may_fail = true},
    {.command = "query-named-block-nodes",
     .what = "list its block nodes",
     .arguments = common_flat_nodes,
     .done = keep_block_nodes,
     .may_fail = true},
    {0},
};

static void probed(struct vmm *vmm, const struct mf_error *err)
{
    struct qemu_replies replies = {
        .version = qmp_version(vmm->qmp),
        .status = reply(vmm, "status"),
        .migration = reply(vmm, "migration"),
        .capabilities = reply(vmm, "capabilities"),
        .ram_backend = reply(vmm, "ram_backend"),
        .backends = reply(vmm, "backends"),
        .devices = reply(vmm, "devices"),
        .network = reply(vmm, "network"),
        .block_nodes = reply(vmm, "block_nodes"),
    };
    struct mf_error why = {0};
    int rc = 0;
    if (err) {
        why = *err;
        rc = -err->code;
    } else {
        rc = preflight_judge(vmm->role, vmm->name, &replies, &vmm->info, &why);
    }
    vmm->info.pid = qmp_peer_pid(vmm->qmp);
    if (!rc && vmm->info.pid <= 0)
        rc = mf_fail(
            &why, ESRCH,
            "the process at the other end of VM '%s''s QMP socket is not visible to memferryd: "
            "QEMU runs in a pid namespace beside memferryd's; run memferryd outside of it",
            vmm->name);
    vmm->phase = rc ? QEMU_FAILED : QEMU_READY;
    json_decref(vmm->probe);
    vmm->probe = NULL;
    vmm->callbacks.probed(vmm->callbacks.arg, rc ? NULL : &vmm->info, rc ? why.text : NULL);
}

void probe_start(struct vmm *vmm)
{
    vmm->probe = json_pack("{s:[]}", "devices");
    if (!vmm->probe) {
        struct mf_error err;
        mf_fail(&err, ENOMEM, "out of memory while looking at VM '%s'", vmm->name);
        probed(vmm, &err);
        return;
    }
    steps_run(vmm, probe_steps, probed);
}
