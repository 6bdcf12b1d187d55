/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The fixed-size parts of the peer protocol: the preamble that opens every connection, its answer,
 * and the header of a binary frame. proto/frame.md tells them in prose. Everything is
 * little-endian.
 *
 * The codec (lib/frame.c) is pure: bytes in, struct out, no I/O. Nothing decoded here has been
 * checked against a session; mf_frame_check does that.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define MF_WIRE_VERSION 2u        /**< what this software speaks */
#define MF_WIRE_OLDEST_VERSION 2u /**< the oldest it still understands */

#define MF_PREAMBLE_BYTES 128u
#define MF_PREAMBLE_REPLY_BYTES 32u
#define MF_FRAME_HEADER_BYTES 32u
#define MF_SESSION_ID_BYTES 16u
#define MF_FRAME_DATA_MAX_BYTES                                                                    \
    (1u << 20) /**< payload of a DATA frame, unless one page is larger */
#define MF_PEER_MESSAGE_MAX_BYTES (1u << 20)

enum mf_connection_kind {
    MF_CONNECTION_CONTROL = 1,
    MF_CONNECTION_DEVICE = 2,
    MF_CONNECTION_URGENT = 3,
    MF_CONNECTION_BULK = 4,
    MF_CONNECTION_ABANDON =
        5, /**< nothing follows: the source gave up before RELEASE, its guest runs there */
};

/** struct mf_preamble - the first bytes of a connection, source → destination. */
struct mf_preamble {
    uint32_t version, oldest_version;
    uint8_t session_id[MF_SESSION_ID_BYTES];
    enum mf_connection_kind kind;
    uint16_t stream;  /**< which bulk connection, from 0 */
    uint16_t streams; /**< how many bulk connections the link has */
    uint32_t link;    /**< which link of the session, from 1: connections of two links never mix */
    char name[64];    /**< the session's name, NUL-terminated */
};

enum mf_preamble_status {
    MF_PREAMBLE_OK = 0,
    MF_PREAMBLE_VERSION = 1,      /**< no common version */
    MF_PREAMBLE_UNKNOWN_NAME = 2, /**< nothing waits under this name */
    MF_PREAMBLE_TAKEN = 3,        /**< another session's id holds this name */
    MF_PREAMBLE_BUSY = 4,         /**< not now: the session can't take a connection in its state */
    MF_PREAMBLE_ENDED = 5,        /**< the session has failed or was cancelled here */
    MF_PREAMBLE_DRAINED =
        6, /**< the session is done here: every page arrived, the guest runs here */
};

/** struct mf_preamble_reply - the answer, destination → source. */
struct mf_preamble_reply {
    uint32_t version, oldest_version;
    uint32_t status; /**< enum mf_preamble_status, or a later version's */
};

enum mf_frame_type {
    MF_FRAME_DATA = 1,    /**< a run of pages, bytes follow */
    MF_FRAME_ZERO = 2,    /**< a run of pages that read as zeros */
    MF_FRAME_CURRENT = 3, /**< a run of pages of which the destination holds the right bytes */
    MF_FRAME_DISCARD = 4, /**< of a precopy round: a run of pages whose contents were discarded */
    MF_FRAME_BARRIER = 5, /**< everything sent before it on this connection has arrived */
    MF_FRAME_REQUEST = 6, /**< destination → source, urgent connection: send this page now */
};

#define MF_FRAME_FLAG_HOLE 0x01u /**< ZERO: a hole of the source's file, never touched */
/** DATA, ZERO, DISCARD (always), BARRIER: of a precopy round, while the guest still runs at the
 * source: lands unconfirmed. */
#define MF_FRAME_FLAG_ROUND 0x02u

/** struct mf_frame - a decoded frame header. */
struct mf_frame {
    uint8_t type, flags;
    uint16_t region;
    uint64_t first_page; /**< BARRIER: the sweep's pass number */
    uint64_t pages;
    uint64_t length_bytes; /**< of the payload that follows */
};

/** struct mf_frame_region - what a frame is checked against. */
struct mf_frame_region {
    uint64_t pages;
    uint32_t page_bytes;
};

/** mf_preamble_encode() / _decode() - decode returns 0, or -EPROTO with a static sentence in @why.
 */
void mf_preamble_encode(const struct mf_preamble *preamble, uint8_t out[MF_PREAMBLE_BYTES]);
int mf_preamble_decode(const uint8_t in[MF_PREAMBLE_BYTES], struct mf_preamble *out,
                       const char **why);

void mf_preamble_reply_encode(const struct mf_preamble_reply *reply,
                              uint8_t out[MF_PREAMBLE_REPLY_BYTES]);
int mf_preamble_reply_decode(const uint8_t in[MF_PREAMBLE_REPLY_BYTES],
                             struct mf_preamble_reply *out, const char **why);

/** mf_versions_meet() - do [oldest, version] of the peer and ours overlap? */
bool mf_versions_meet(uint32_t peer_version, uint32_t peer_oldest);

void mf_frame_encode(const struct mf_frame *frame, uint8_t out[MF_FRAME_HEADER_BYTES]);
/** mf_frame_decode() - the reserved bytes must be zero. Return: 0 or -EPROTO with @why. */
int mf_frame_decode(const uint8_t in[MF_FRAME_HEADER_BYTES], struct mf_frame *out,
                    const char **why);

/**
 * mf_frame_check() - every number of a decoded header against the session (I11).
 * @to_destination: REQUEST is allowed the other way, all others that way.
 * Return: 0, or -EPROTO with a static sentence in @why. After 0 every index is in range, products
 * do not overflow and the payload's length is what the pages need.
 */
int mf_frame_check(const struct mf_frame *frame, const struct mf_frame_region *regions,
                   unsigned region_count, bool to_destination, const char **why);
