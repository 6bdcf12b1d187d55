/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The migration capabilities and parameters that memferry needs in a QEMU, and how to put back what
 * was there. Pure functions over QMP's JSON. Source of names: QEMU's qapi/migration.json.
 */
#pragma once

#include <jansson.h>

/** struct qemu_change - the arguments of the command that applies the change and of the one that
 * undoes it; both NULL when there is nothing to change. Owned by whoever holds the struct. */
struct qemu_change {
    json_t *apply, *undo;
};

/** settings_missing_capability() - @capabilities: reply of query-migrate-capabilities. Return: the
 * name of a capability that memferry can't do without and this QEMU does not have, or NULL. */
const char *settings_missing_capability(json_t *capabilities);

/** settings_capabilities() - for migrate-set-capabilities. Everything that would make QEMU's own
 *  migration do more than carry device state (postcopy, multifd, throttling, …) is turned off. */
struct qemu_change settings_capabilities(json_t *capabilities);

/** settings_parameters() - for migrate-set-parameters; @parameters: reply of
 * query-migrate-parameters. */
struct qemu_change settings_parameters(json_t *parameters);

/** settings_downtime() - arguments that set the downtime limit, in milliseconds, and nothing else.
 */
json_t *settings_downtime(unsigned limit_ms);

/** settings_change_clear() - drop both sides' references. */
void settings_change_clear(struct qemu_change *change);

/* What may still be dirty of the RAM that QEMU itself moves (video memory, ROMs) when the guest
 * stops is sent inside the blackout, so the limit starts low and is raised step by step while QEMU
 * does not get below it: a guest that redraws its screen over a thin link must still get across. */
#define QEMU_DOWNTIME_FIRST_MS 20u
#define QEMU_DOWNTIME_MOST_MS 2000u
