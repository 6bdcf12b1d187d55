/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The control socket's bytes, as either end reads them. What is accepted as a request has to
 * survive being packed and read again, and to be within the limits that its reader relies on.
 */
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "lib/process.h"
#include "lib/control_message.h"
#include "lib/util.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t length_bytes);

static void require(bool condition)
{
    if (!condition)
        abort();
}

/* What memferryd copies into arrays, and runs. */
static void check_process(const Memferry__Control__Process *process, const char *qmp_path)
{
    require(!qmp_path[0] && process->pid > 1 && process->pid <= INT32_MAX);
    require(process->n_regions <= MF_CHOICES_MAX);
    require(process->timeout_s <= MF_CONTROL_TIMEOUT_MAX_S);
    require(strlen(process->save) < MF_CONTROL_COMMAND_MAX_BYTES);
    for (size_t i = 0; i < process->n_regions; i++) {
        struct mf_choice choice;
        require(mf_name_valid(process->regions[i]->name));
        require(strlen(process->regions[i]->what) < sizeof(choice.what));
    }
}

static void try_request(const uint8_t *body, size_t body_bytes)
{
    Memferry__Control__Request *request = NULL, *again = NULL;
    struct mf_error err = {.text = ""};
    if (mf_control_request(body, body_bytes, &request, &err) < 0) {
        require(!request && err.text[0]);
        return;
    }
    if (request->verb_case == MEMFERRY__CONTROL__REQUEST__VERB_MIGRATE) {
        require(mf_name_valid(request->migrate->name));
        if (request->migrate->process)
            check_process(request->migrate->process, request->migrate->qmp_path);
        else
            require(request->migrate->qmp_path[0] == '/');
        require(request->migrate->port <= UINT16_MAX);
        require(request->migrate->streams <= MF_CONTROL_STREAMS_MAX);
        require(mf_control_mode(request->migrate->mode) != NULL);
        require(request->migrate->max_rounds <= MF_CONTROL_ROUNDS_MAX);
        require(request->migrate->switch_after_s <= MF_CONTROL_SWITCH_AFTER_MAX_S);
        require(request->migrate->max_blackout_ms <= MF_CONTROL_BLACKOUT_MAX_MS);
        require(request->migrate->bandwidth_bits_s <= MF_CONTROL_BANDWIDTH_MAX_BITS_S);
        require(!request->migrate->fallback || strcmp(request->migrate->mode, "precopy") == 0);
    }
    if (request->verb_case == MEMFERRY__CONTROL__REQUEST__VERB_RECEIVE) {
        if (request->receive->process)
            check_process(request->receive->process, request->receive->qmp_path);
        else
            require(request->receive->qmp_path[0] == '/');
    }
    if (request->verb_case == MEMFERRY__CONTROL__REQUEST__VERB_SET) {
        require(mf_name_valid(request->set->name));
        require(request->set->bandwidth_bits_s <= MF_CONTROL_BANDWIDTH_MAX_BITS_S);
    }
    cleanup_free uint8_t *frame = NULL;
    size_t frame_bytes = 0, again_bytes = 0;
    /* Every verb of the union begins with its ProtobufCMessage. */
    bool known = !request->base.n_unknown_fields && !request->migrate->base.n_unknown_fields;
    if (known && mf_control_frame(&request->base, &frame, &frame_bytes, NULL) == 0) {
        require(mf_control_body(frame, frame_bytes, &again_bytes, NULL) == 1);
        require(mf_control_request(frame + MF_CONTROL_HEADER_BYTES, again_bytes, &again, NULL) ==
                0);
        memferry__control__request__free_unpacked(again, NULL);
    }
    memferry__control__request__free_unpacked(request, NULL);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t length_bytes)
{
    size_t body_bytes = 0;
    if (mf_control_body(data, length_bytes, &body_bytes, NULL) != 1)
        return 0;
    require(body_bytes <= length_bytes - MF_CONTROL_HEADER_BYTES);
    const uint8_t *body = data + MF_CONTROL_HEADER_BYTES;
    try_request(body, body_bytes);
    Memferry__Control__Reply *reply = NULL;
    if (mf_control_reply(body, body_bytes, &reply, NULL) == 0)
        memferry__control__reply__free_unpacked(reply, NULL);
    return 0;
}
