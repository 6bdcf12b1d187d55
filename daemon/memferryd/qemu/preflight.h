/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * May this QEMU be migrated (or received into)? Pure decisions over QMP's replies; the asking is
 * probe.c's. Nothing here changes anything.
 */
#pragma once

#include <jansson.h>
#include <sys/types.h>

#include "daemon/memferryd/vmm.h"
#include "lib/error.h"

/**
 * struct qemu_replies - what QEMU answered. Borrowed JSON; NULL where it gave an error.
 * @version:      the greeting's version object
 * @status:       query-status
 * @migration:    query-migrate
 * @capabilities: query-migrate-capabilities
 * @ram_backend:  qom-get /machine memory-backend: the path of the machine's main RAM or ""
 * @backends:     array of {id, type, share, size, mem-path, container}, one per memory-backend-*
 * object; container is the QOM path of the region its memory lies in, "" when in none
 * @devices:      array of {name, type}: all of /machine/peripheral and /machine/peripheral-anon
 * @network:      what `info network` printed
 * @block_nodes:  query-named-block-nodes, flat
 */
struct qemu_replies {
    json_t *version, *status, *migration, *capabilities, *ram_backend, *backends, *devices,
        *network, *block_nodes;
};

/**
 * preflight_judge() - decide, and describe.
 * @info: on success version, was_running, direct_io, backend_count and backends (malloc'd; sorted
 * by id) are set. Return: 0, or -errno with @err: the cause and the remedy.
 */
int preflight_judge(enum vmm_role role, const char *vm_name, const struct qemu_replies *replies,
                    struct vmm_info *info, struct mf_error *err);

/** preflight_direct_drive() - the first drive of query-named-block-nodes' answer that bypasses the
 * page cache (vmm_info.direct_io says what that means), or NULL. Valid as long as @block_nodes. */
const char *preflight_direct_drive(const json_t *block_nodes);
