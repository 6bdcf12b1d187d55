/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The messages of the control socket (proto/control.proto) as bytes: 4 bytes of length,
 * little-endian, then that many bytes of protobuf. Pure: no I/O, no state; both ends use it, and so
 * does a fuzzer.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "control.pb-c.h"
#include "lib/error.h"

#define MF_CONTROL_SOCKET_NAME "control.sock" /**< in the runtime directory */
#define MF_CONTROL_HEADER_BYTES 4u
#define MF_CONTROL_MESSAGE_MAX_BYTES (1u << 20) /**< without the header */
#define MF_CONTROL_STREAMS_MAX 16u              /**< bulk connections that may be asked for */
#define MF_CONTROL_ROUNDS_MAX 1000u             /**< precopy rounds that may be asked for */
#define MF_CONTROL_SWITCH_AFTER_MAX_S 604800u   /**< a week */
#define MF_CONTROL_BLACKOUT_MAX_MS 60000u       /**< longer, and it is no live migration */
#define MF_CONTROL_COMMAND_MAX_BYTES 8192u      /**< a command of --pause, --save … */
#define MF_CONTROL_TIMEOUT_DEFAULT_S 60u        /**< of such a command */
#define MF_CONTROL_TIMEOUT_MAX_S 3600u
/** A limit below this is a forgotten suffix: no migration would ever end. */
#define MF_CONTROL_BANDWIDTH_MIN_BITS_S UINT64_C(64000)
#define MF_CONTROL_BANDWIDTH_MAX_BITS_S UINT64_C(1000000000000000) /**< 1000T */

/**
 * mf_control_frame() - a message with its length before it.
 * @message: any message of control.proto.
 * @frame:   malloc'ed, the caller's to free; untouched on failure.
 * Return: 0, -EMSGSIZE when the message is over the limit, -ENOMEM.
 */
int mf_control_frame(const ProtobufCMessage *message, uint8_t **frame, size_t *frame_bytes,
                     struct mf_error *err);

/**
 * mf_control_body() - is there a whole message at the start of what was received?
 * @data, @have_bytes: what was received so far.
 * @body_bytes: the message's length; it starts MF_CONTROL_HEADER_BYTES into @data. Set as soon as
 *              the header is there.
 * Return: 1 a whole message, 0 more is needed, -EPROTO the length is over the limit.
 */
int mf_control_body(const uint8_t *data, size_t have_bytes, size_t *body_bytes,
                    struct mf_error *err);

/**
 * mf_control_mode() - the mode that a request or a command line names.
 * Return: "hybrid" (for "" too), "postcopy" or "precopy", a constant that outlives the request;
 * NULL for anything else.
 */
const char *mf_control_mode(const char *text);

/**
 * mf_control_migrate_mode() - the mode of a request to migrate, as mf_control_mode(). Where none is
 * given it is hybrid for a VM and postcopy for any other process: what a program may do to its
 * memory while it is watched for writes is limited (memferry(1)), and only who knows the program
 * can tell.
 */
const char *mf_control_migrate_mode(const Memferry__Control__MigrateRequest *migrate);

/** struct mf_control_rounds - how memory is sent before RELEASE, as it was asked for; 0: not said.
 */
struct mf_control_rounds {
    const char *mode; /**< a value of mf_control_mode() */
    uint32_t max_rounds, switch_after_s, max_blackout_ms;
    bool fallback;
};

/**
 * mf_control_rounds_check() - do these go together? An option that the mode has no use for is
 * refused rather than ignored. Return: 0 or -EINVAL with a sentence that names the option.
 */
int mf_control_rounds_check(const struct mf_control_rounds *rounds, struct mf_error *err);

/**
 * mf_control_request() - unpack a request and check everything in it before anyone acts on it: that
 * there is a verb, names, absolute paths, host, port, and the numbers and modes of a migration.
 * @out: on success the caller's, to be freed with memferry__control__request__free_unpacked().
 * Return: 0, -EPROTO (not a request, or of a newer memferry), -EINVAL (a field is wrong), -ENOMEM.
 */
int mf_control_request(const uint8_t *body, size_t body_bytes, Memferry__Control__Request **out,
                       struct mf_error *err);

/** mf_control_reply() - unpack a reply; to be freed with memferry__control__reply__free_unpacked().
 *  Return: 0 or -EPROTO. */
int mf_control_reply(const uint8_t *body, size_t body_bytes, Memferry__Control__Reply **out,
                     struct mf_error *err);
