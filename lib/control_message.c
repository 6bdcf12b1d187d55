/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib/control_message.h"

#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "lib/endpoint.h"
#include "lib/process.h"
#include "lib/util.h"

int mf_control_frame(const ProtobufCMessage *message, uint8_t **frame, size_t *frame_bytes,
                     struct mf_error *err)
{
    size_t body_bytes = protobuf_c_message_get_packed_size(message);
    if (body_bytes > MF_CONTROL_MESSAGE_MAX_BYTES)
        return mf_fail(err, EMSGSIZE,
                       "the message for the control socket is %zu bytes long, over the limit of %u",
                       body_bytes, MF_CONTROL_MESSAGE_MAX_BYTES);
    uint8_t *bytes = malloc(MF_CONTROL_HEADER_BYTES + body_bytes);
    if (!bytes)
        return mf_fail(err, ENOMEM, "out of memory for a message of the control socket");
    for (unsigned i = 0; i < MF_CONTROL_HEADER_BYTES; i++)
        bytes[i] = (uint8_t)(body_bytes >> (8 * i));
    protobuf_c_message_pack(message, bytes + MF_CONTROL_HEADER_BYTES);
    *frame = bytes;
    *frame_bytes = MF_CONTROL_HEADER_BYTES + body_bytes;
    return 0;
}

int mf_control_body(const uint8_t *data, size_t have_bytes, size_t *body_bytes,
                    struct mf_error *err)
{
    if (have_bytes < MF_CONTROL_HEADER_BYTES)
        return 0;
    uint32_t length = 0;
    for (unsigned i = 0; i < MF_CONTROL_HEADER_BYTES; i++)
        length |= (uint32_t)data[i] << (8 * i);
    if (length > MF_CONTROL_MESSAGE_MAX_BYTES)
        return mf_fail(
            err, EPROTO,
            "a message of the control socket claims %u bytes, over the limit of %u: what "
            "speaks there is not memferry",
            length, MF_CONTROL_MESSAGE_MAX_BYTES);
    *body_bytes = length;
    return have_bytes - MF_CONTROL_HEADER_BYTES >= length;
}

static int check_name(const char *name, struct mf_error *err)
{
    if (mf_name_valid(name))
        return 0;
    return mf_fail(err, EINVAL,
                   "the name of the VM is not usable: it has 1 to %d letters, digits, '.', '_' and "
                   "'-', and starts with neither '.' nor '-'",
                   MF_NAME_MAX);
}

static int check_path(const char *path, struct mf_error *err)
{
    if (path[0] == '/' && strlen(path) < PATH_MAX)
        return 0;
    return mf_fail(err, EINVAL,
                   "the path of the QMP socket must be absolute and shorter than %d bytes",
                   PATH_MAX);
}

const char *mf_control_mode(const char *text)
{
    static const char *const modes[] = {"hybrid", "postcopy", "precopy"};
    if (!text[0])
        return modes[0];
    for (size_t i = 0; i < sizeof(modes) / sizeof(modes[0]); i++) {
        if (strcmp(text, modes[i]) == 0)
            return modes[i];
    }
    return NULL;
}

const char *mf_control_migrate_mode(const Memferry__Control__MigrateRequest *migrate)
{
    return mf_control_mode(!migrate->mode[0] && migrate->process ? "postcopy" : migrate->mode);
}

int mf_control_rounds_check(const struct mf_control_rounds *rounds, struct mf_error *err)
{
    bool precopy = strcmp(rounds->mode, "precopy") == 0;
    bool postcopy = strcmp(rounds->mode, "postcopy") == 0;
    if (rounds->fallback && !precopy)
        return mf_fail(err, EINVAL,
                       "--fallback goes with --mode precopy only: it has a precopy that does not "
                       "converge become hybrid, and the mode here is %s",
                       rounds->mode);
    if (rounds->max_blackout_ms && !precopy)
        return mf_fail(err, EINVAL,
                       "--max-blackout goes with --mode precopy only: with %s the pause does not "
                       "depend on how much is left to send",
                       rounds->mode);
    if (postcopy && (rounds->max_rounds || rounds->switch_after_s))
        return mf_fail(err, EINVAL,
                       "%s does not go with --mode postcopy, which sends nothing ahead and has no "
                       "rounds; leave it out, or use --mode hybrid",
                       rounds->max_rounds ? "--max-rounds" : "--switch-after");
    return 0;
}

static int check_bandwidth(uint64_t bits_s, struct mf_error *err)
{
    if (bits_s == 0 ||
        (bits_s >= MF_CONTROL_BANDWIDTH_MIN_BITS_S && bits_s <= MF_CONTROL_BANDWIDTH_MAX_BITS_S))
        return 0;
    return mf_fail(err, EINVAL,
                   "a bandwidth of %" PRIu64 " bits per second is out of range; 64k to 1000T are "
                   "possible, and 0 for no limit",
                   bits_s);
}

static int check_rounds(const Memferry__Control__MigrateRequest *migrate, struct mf_error *err)
{
    struct mf_control_rounds rounds = {.mode = mf_control_migrate_mode(migrate),
                                       .max_rounds = migrate->max_rounds,
                                       .switch_after_s = migrate->switch_after_s,
                                       .max_blackout_ms = migrate->max_blackout_ms,
                                       .fallback = migrate->fallback};
    if (!rounds.mode)
        return mf_fail(err, EINVAL,
                       "the mode is none that this memferryd (%s) knows; it is hybrid, postcopy or "
                       "precopy",
                       MF_VERSION);
    if (rounds.max_rounds > MF_CONTROL_ROUNDS_MAX)
        return mf_fail(err, EINVAL, "%u rounds are too many; 1 to %u are possible",
                       rounds.max_rounds, MF_CONTROL_ROUNDS_MAX);
    if (rounds.switch_after_s > MF_CONTROL_SWITCH_AFTER_MAX_S)
        return mf_fail(err, EINVAL, "switching after %u seconds is too late; 1 to %u are possible",
                       rounds.switch_after_s, MF_CONTROL_SWITCH_AFTER_MAX_S);
    if (rounds.max_blackout_ms > MF_CONTROL_BLACKOUT_MAX_MS)
        return mf_fail(err, EINVAL,
                       "a blackout of %u milliseconds is too long; 1 to %u are possible",
                       rounds.max_blackout_ms, MF_CONTROL_BLACKOUT_MAX_MS);
    return mf_control_rounds_check(&rounds, err);
}

static int check_command(const char *option, const char *text, struct mf_error *err)
{
    if (strlen(text) < MF_CONTROL_COMMAND_MAX_BYTES)
        return 0;
    return mf_fail(err, EINVAL,
                   "the command of %s is longer than %u characters; put it in a script", option,
                   MF_CONTROL_COMMAND_MAX_BYTES - 1);
}

static int check_process(const Memferry__Control__Process *process, bool source,
                         struct mf_error *err)
{
    struct mf_choice choice;
    if (process->pid < 2 || process->pid > INT32_MAX)
        return mf_fail(err, EINVAL, "%u is not the id of a process that could be migrated",
                       process->pid);
    int rc = check_command("--pause", process->pause, err);
    if (rc == 0)
        rc = check_command("--save", process->save, err);
    if (rc == 0)
        rc = check_command("--load", process->load, err);
    if (rc == 0)
        rc = check_command("--resume", process->resume, err);
    if (rc < 0)
        return rc;
    if (source ? !process->save[0] : !process->load[0])
        return mf_fail(err, EINVAL,
                       "--pid needs %s on this host: %s (a program that has no state "
                       "but its shared memory: %s true)",
                       source ? "--save COMMAND" : "--load COMMAND",
                       source ? "what writes the program's state to its standard output"
                              : "what reads the program's state from its standard input",
                       source ? "--save" : "--load");
    if (process->timeout_s > MF_CONTROL_TIMEOUT_MAX_S)
        return mf_fail(err, EINVAL,
                       "a command's time of %u seconds is too long; 1 to %u are possible",
                       process->timeout_s, MF_CONTROL_TIMEOUT_MAX_S);
    if (process->n_regions > MF_CHOICES_MAX)
        return mf_fail(err, EINVAL, "%zu regions are too many; 1 to %u are possible",
                       process->n_regions, MF_CHOICES_MAX);
    for (size_t i = 0; i < process->n_regions; i++) {
        const Memferry__Control__RegionChoice *region = process->regions[i];
        char text[sizeof(choice.name) + sizeof(choice.what) + 2];
        int length = snprintf(text, sizeof(text), "%s=%s", region->name, region->what);
        if (length < 0 || (size_t)length >= sizeof(text) || strchr(region->name, '='))
            return mf_fail(err, EINVAL, "the name or the file of a region is too long");
        rc = mf_choice_parse(text, &choice, err);
        if (rc < 0)
            return rc;
    }
    return 0;
}

/* One of the two says what is migrated. */
static int check_target(const char *qmp_path, const Memferry__Control__Process *process,
                        bool source, struct mf_error *err)
{
    if (process && qmp_path[0])
        return mf_fail(err, EINVAL,
                       "--qmp and --pid do not go together: a QEMU is driven by its QMP "
                       "socket, any other process by commands");
    return process ? check_process(process, source, err) : check_path(qmp_path, err);
}

static int check_migrate(const Memferry__Control__MigrateRequest *migrate, struct mf_error *err)
{
    int rc = check_name(migrate->name, err);
    if (rc == 0)
        rc = check_target(migrate->qmp_path, migrate->process, true, err);
    if (rc < 0)
        return rc;
    size_t host_bytes = strlen(migrate->host);
    if (host_bytes == 0 || host_bytes >= MF_HOST_MAX_BYTES)
        return mf_fail(err, EINVAL,
                       "the host to migrate to has %zu characters; 1 to %u are possible",
                       host_bytes, MF_HOST_MAX_BYTES - 1);
    if (migrate->port > UINT16_MAX)
        return mf_fail(err, EINVAL, "%u is not a port; a port is 1 to 65535", migrate->port);
    if (migrate->streams > MF_CONTROL_STREAMS_MAX)
        return mf_fail(err, EINVAL, "%u streams are too many; 1 to %u are possible",
                       migrate->streams, MF_CONTROL_STREAMS_MAX);
    rc = check_bandwidth(migrate->bandwidth_bits_s, err);
    return rc < 0 ? rc : check_rounds(migrate, err);
}

static int check_request(const Memferry__Control__Request *request, struct mf_error *err)
{
    switch (request->verb_case) {
    case MEMFERRY__CONTROL__REQUEST__VERB_RECEIVE: {
        int rc = check_name(request->receive->name, err);
        return rc < 0 ? rc
                      : check_target(request->receive->qmp_path, request->receive->process, false,
                                     err);
    }
    case MEMFERRY__CONTROL__REQUEST__VERB_MIGRATE:
        return check_migrate(request->migrate, err);
    case MEMFERRY__CONTROL__REQUEST__VERB_STATUS:
        return request->status->name[0] ? check_name(request->status->name, err) : 0;
    case MEMFERRY__CONTROL__REQUEST__VERB_CANCEL:
        return check_name(request->cancel->name, err);
    case MEMFERRY__CONTROL__REQUEST__VERB_FORGET:
        return check_name(request->forget->name, err);
    case MEMFERRY__CONTROL__REQUEST__VERB_WATCH:
        return check_name(request->watch->name, err);
    case MEMFERRY__CONTROL__REQUEST__VERB_SET: {
        int rc = check_name(request->set->name, err);
        return rc < 0 ? rc : check_bandwidth(request->set->bandwidth_bits_s, err);
    }
    case MEMFERRY__CONTROL__REQUEST__VERB_SWITCH_NOW:
        return check_name(request->switch_now->name, err);
    case MEMFERRY__CONTROL__REQUEST__VERB__NOT_SET:
    case _MEMFERRY__CONTROL__REQUEST__VERB__CASE_IS_INT_SIZE:
        break;
    }
    return mf_fail(err, EPROTO,
                   "the request has no verb that this memferryd (%s) knows; memferry and memferryd "
                   "must be of the same version",
                   MF_VERSION);
}

int mf_control_request(const uint8_t *body, size_t body_bytes, Memferry__Control__Request **out,
                       struct mf_error *err)
{
    Memferry__Control__Request *request =
        memferry__control__request__unpack(NULL, body_bytes, body);
    if (!request)
        return mf_fail(err, EPROTO,
                       "what came over the control socket is not a request of memferry");
    int rc = check_request(request, err);
    if (rc < 0) {
        memferry__control__request__free_unpacked(request, NULL);
        return rc;
    }
    *out = request;
    return 0;
}

int mf_control_reply(const uint8_t *body, size_t body_bytes, Memferry__Control__Reply **out,
                     struct mf_error *err)
{
    Memferry__Control__Reply *reply = memferry__control__reply__unpack(NULL, body_bytes, body);
    if (!reply)
        return mf_fail(err, EPROTO,
                       "what came over the control socket is not a reply of memferryd");
    *out = reply;
    return 0;
}
