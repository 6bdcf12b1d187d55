/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/memferryd/qemu/settings.h"

#include <stdbool.h>
#include <string.h>

/* Bytes per second that no link reaches: QEMU shall not hold back what little it sends. */
#define UNLIMITED_BANDWIDTH ((json_int_t)1 << 40)

static const char *const needed[] = {
    "x-ignore-shared", /* shared RAM stays out of QEMU's stream: it is memferry's */
    "return-path",     /* without it the source reports success whatever the destination did */
    "events",          /* MIGRATION events */
    "pause-before-switchover", /* RELEASE comes between the pause and the device state */
};

/* Turned on where there is one: */
static const char *const wanted[] = {
    /* The destination takes its disks' locks when it is told to run, not when it has loaded: until
     * RELEASE the source must be able to go on with them. */
    "late-block-activate",
};

/* The administrator's own business, left as found: */
static const char *const untouched[] = {"dirty-bitmaps", "validate-uuid"};

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

static bool among(const char *name, const char *const *names, size_t count)
{
    for (size_t i = 0; i < count; i++)
        if (strcmp(name, names[i]) == 0)
            return true;
    return false;
}

const char *settings_missing_capability(json_t *capabilities)
{
    for (size_t i = 0; i < COUNT(needed); i++) {
        size_t at;
        json_t *row;
        bool found = false;
        json_array_foreach(capabilities, at, row)
        {
            const char *name = json_string_value(json_object_get(row, "capability"));
            if (name && strcmp(name, needed[i]) == 0)
                found = true;
        }
        if (!found)
            return needed[i];
    }
    return NULL;
}

struct qemu_change settings_capabilities(json_t *capabilities)
{
    json_t *apply = json_array(), *undo = json_array();
    size_t at;
    json_t *row;
    json_array_foreach(capabilities, at, row)
    {
        const char *name = json_string_value(json_object_get(row, "capability"));
        if (!name || among(name, untouched, COUNT(untouched)))
            continue;
        bool was = json_is_true(json_object_get(row, "state"));
        bool shall = among(name, needed, COUNT(needed)) || among(name, wanted, COUNT(wanted));
        if (was == shall)
            continue;
        json_array_append_new(apply, json_pack("{s:s, s:b}", "capability", name, "state", shall));
        json_array_append_new(undo, json_pack("{s:s, s:b}", "capability", name, "state", was));
    }
    if (json_array_size(apply) == 0) {
        json_decref(apply);
        json_decref(undo);
        return (struct qemu_change){0};
    }
    return (struct qemu_change){.apply = json_pack("{s:o}", "capabilities", apply),
                                .undo = json_pack("{s:o}", "capabilities", undo)};
}

struct qemu_change settings_parameters(json_t *parameters)
{
    const struct {
        const char *name;
        json_t *value;
    } shall[] = {
        {"downtime-limit", json_integer(QEMU_DOWNTIME_FIRST_MS)},
        {"max-bandwidth", json_integer(UNLIMITED_BANDWIDTH)},
        {"tls-creds",
         json_string("")}, /* the device stream runs inside memferry's own connection */
        {"mode", json_string("normal")},
    };
    json_t *apply = json_object(), *undo = json_object();
    for (size_t i = 0; i < COUNT(shall); i++) {
        /* What this QEMU does not know can't be set; what is right already is not touched. */
        json_t *was = json_object_get(parameters, shall[i].name);
        if (was && !json_equal(was, shall[i].value)) {
            json_object_set(apply, shall[i].name, shall[i].value);
            json_object_set(undo, shall[i].name, was);
        }
        json_decref(shall[i].value);
    }
    if (json_object_size(apply) == 0) {
        json_decref(apply);
        json_decref(undo);
        return (struct qemu_change){0};
    }
    return (struct qemu_change){.apply = apply, .undo = undo};
}

json_t *settings_downtime(unsigned limit_ms)
{
    return json_pack("{s:I}", "downtime-limit", (json_int_t)limit_ms);
}

void settings_change_clear(struct qemu_change *change)
{
    json_decref(change->apply);
    json_decref(change->undo);
    *change = (struct qemu_change){0};
}
