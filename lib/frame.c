/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "proto/frame.h"

#include <endian.h>
#include <errno.h>
#include <string.h>

static const uint8_t preamble_magic[8] = {'M', 'E', 'M', 'F', 'E', 'R', 'R', 'Y'};
static const uint8_t reply_magic[8] = {'M', 'F', 'A', 'N', 'S', 'W', 'E', 'R'};

/* Offsets of the preamble. */
enum {
    P_VERSION = 8,
    P_OLDEST = 12,
    P_ID = 16,
    P_KIND = 32,
    P_STREAM = 34,
    P_STREAMS = 36,
    P_PAD = 38,
    P_LINK = 40,
    P_RESERVED = 44,
    P_NAME = 64
};
/* Offsets of the answer. */
enum { R_VERSION = 8, R_OLDEST = 12, R_STATUS = 16, R_RESERVED = 20 };
/* Offsets of a frame header. */
enum {
    F_TYPE = 0,
    F_FLAGS = 1,
    F_REGION = 2,
    F_RESERVED = 4,
    F_FIRST = 8,
    F_PAGES = 16,
    F_LENGTH = 24
};

static void put16(uint8_t *at, uint16_t v)
{
    v = htole16(v);
    memcpy(at, &v, sizeof(v));
}
static void put32(uint8_t *at, uint32_t v)
{
    v = htole32(v);
    memcpy(at, &v, sizeof(v));
}
static void put64(uint8_t *at, uint64_t v)
{
    v = htole64(v);
    memcpy(at, &v, sizeof(v));
}
static uint16_t get16(const uint8_t *at)
{
    uint16_t v;
    memcpy(&v, at, sizeof(v));
    return le16toh(v);
}
static uint32_t get32(const uint8_t *at)
{
    uint32_t v;
    memcpy(&v, at, sizeof(v));
    return le32toh(v);
}
static uint64_t get64(const uint8_t *at)
{
    uint64_t v;
    memcpy(&v, at, sizeof(v));
    return le64toh(v);
}
static bool all_zero(const uint8_t *at, size_t length_bytes)
{
    for (size_t i = 0; i < length_bytes; i++)
        if (at[i])
            return false;
    return true;
}
static int wrong(const char **why, const char *sentence)
{
    *why = sentence;
    return -EPROTO;
}

void mf_preamble_encode(const struct mf_preamble *p, uint8_t out[MF_PREAMBLE_BYTES])
{
    memset(out, 0, MF_PREAMBLE_BYTES);
    memcpy(out, preamble_magic, sizeof(preamble_magic));
    put32(out + P_VERSION, p->version);
    put32(out + P_OLDEST, p->oldest_version);
    memcpy(out + P_ID, p->session_id, MF_SESSION_ID_BYTES);
    put16(out + P_KIND, (uint16_t)p->kind);
    put16(out + P_STREAM, p->stream);
    put16(out + P_STREAMS, p->streams);
    put32(out + P_LINK, p->link);
    memcpy(out + P_NAME, p->name, strnlen(p->name, sizeof(p->name) - 1));
}

int mf_preamble_decode(const uint8_t in[MF_PREAMBLE_BYTES], struct mf_preamble *out,
                       const char **why)
{
    if (memcmp(in, preamble_magic, sizeof(preamble_magic)) != 0)
        return wrong(why, "the connection does not begin like one of memferry's");
    memset(out, 0, sizeof(*out));
    out->version = get32(in + P_VERSION);
    out->oldest_version = get32(in + P_OLDEST);
    if (out->oldest_version > out->version)
        return wrong(why, "the preamble's oldest version is newer than its version");
    /* What follows is laid out by the version; a peer of another version is answered, not parsed.
     */
    if (!mf_versions_meet(out->version, out->oldest_version))
        return 0;
    memcpy(out->session_id, in + P_ID, MF_SESSION_ID_BYTES);
    uint16_t kind = get16(in + P_KIND);
    if (kind < MF_CONNECTION_CONTROL || kind > MF_CONNECTION_ABANDON)
        return wrong(why, "the preamble names an unknown kind of connection");
    out->kind = (enum mf_connection_kind)kind;
    out->stream = get16(in + P_STREAM);
    out->streams = get16(in + P_STREAMS);
    if (out->kind == MF_CONNECTION_BULK ? out->stream >= out->streams : out->stream != 0)
        return wrong(why, "the preamble's stream number is out of range");
    out->link = get32(in + P_LINK);
    if (out->link == 0)
        return wrong(why, "the preamble's link number is zero");
    if (!all_zero(in + P_PAD, 2) || !all_zero(in + P_RESERVED, P_NAME - P_RESERVED))
        return wrong(why, "the preamble's reserved bytes are not zero");
    memcpy(out->name, in + P_NAME, sizeof(out->name));
    if (out->name[sizeof(out->name) - 1] != '\0')
        return wrong(why, "the preamble's session name does not end");
    return 0;
}

void mf_preamble_reply_encode(const struct mf_preamble_reply *reply,
                              uint8_t out[MF_PREAMBLE_REPLY_BYTES])
{
    memset(out, 0, MF_PREAMBLE_REPLY_BYTES);
    memcpy(out, reply_magic, sizeof(reply_magic));
    put32(out + R_VERSION, reply->version);
    put32(out + R_OLDEST, reply->oldest_version);
    put32(out + R_STATUS, reply->status);
}

int mf_preamble_reply_decode(const uint8_t in[MF_PREAMBLE_REPLY_BYTES],
                             struct mf_preamble_reply *out, const char **why)
{
    if (memcmp(in, reply_magic, sizeof(reply_magic)) != 0)
        return wrong(why, "the answer does not come from a memferryd");
    out->version = get32(in + R_VERSION);
    out->oldest_version = get32(in + R_OLDEST);
    out->status = get32(in + R_STATUS);
    if (mf_versions_meet(out->version, out->oldest_version) &&
        !all_zero(in + R_RESERVED, MF_PREAMBLE_REPLY_BYTES - R_RESERVED))
        return wrong(why, "the answer's reserved bytes are not zero");
    return 0;
}

bool mf_versions_meet(uint32_t peer_version, uint32_t peer_oldest)
{
    return peer_version >= MF_WIRE_OLDEST_VERSION && peer_oldest <= MF_WIRE_VERSION;
}

void mf_frame_encode(const struct mf_frame *frame, uint8_t out[MF_FRAME_HEADER_BYTES])
{
    out[F_TYPE] = frame->type;
    out[F_FLAGS] = frame->flags;
    put16(out + F_REGION, frame->region);
    put32(out + F_RESERVED, 0);
    put64(out + F_FIRST, frame->first_page);
    put64(out + F_PAGES, frame->pages);
    put64(out + F_LENGTH, frame->length_bytes);
}

int mf_frame_decode(const uint8_t in[MF_FRAME_HEADER_BYTES], struct mf_frame *out, const char **why)
{
    out->type = in[F_TYPE];
    out->flags = in[F_FLAGS];
    out->region = get16(in + F_REGION);
    out->first_page = get64(in + F_FIRST);
    out->pages = get64(in + F_PAGES);
    out->length_bytes = get64(in + F_LENGTH);
    if (get32(in + F_RESERVED) != 0)
        return wrong(why, "a frame's reserved bytes are not zero");
    return 0;
}

int mf_frame_check(const struct mf_frame *frame, const struct mf_frame_region *regions,
                   unsigned region_count, bool to_destination, const char **why)
{
    const bool request = frame->type == MF_FRAME_REQUEST;
    if (frame->type < MF_FRAME_DATA || frame->type > MF_FRAME_REQUEST)
        return wrong(why, "a frame of unknown type");
    if (request == to_destination)
        return wrong(why, "a frame in the wrong direction");
    const uint8_t allowed[] = {
        [MF_FRAME_DATA] = MF_FRAME_FLAG_ROUND,
        [MF_FRAME_ZERO] = MF_FRAME_FLAG_HOLE | MF_FRAME_FLAG_ROUND,
        [MF_FRAME_DISCARD] = MF_FRAME_FLAG_ROUND,
        [MF_FRAME_BARRIER] = MF_FRAME_FLAG_ROUND,
        [MF_FRAME_REQUEST] = 0,
    };
    if (frame->flags & ~allowed[frame->type])
        return wrong(why, "a frame with unknown flags");
    /* Later the source's memory doesn't change any more: what is a hole then is a ZERO. */
    if (frame->type == MF_FRAME_DISCARD && !(frame->flags & MF_FRAME_FLAG_ROUND))
        return wrong(why, "a discard that belongs to no round");
    if (frame->type == MF_FRAME_BARRIER) {
        if (frame->region != 0 || frame->pages != 0 || frame->length_bytes != 0)
            return wrong(why, "a barrier frame that carries pages");
        return 0;
    }
    if (frame->region >= region_count)
        return wrong(why, "a frame for a region that does not exist");
    const struct mf_frame_region *region = &regions[frame->region];
    if (frame->pages == 0 || frame->first_page >= region->pages ||
        frame->pages > region->pages - frame->first_page)
        return wrong(why, "a frame for pages beyond the region's end");
    if (frame->type != MF_FRAME_DATA) {
        if (frame->length_bytes != 0)
            return wrong(why, "a frame with a payload that its type does not have");
        return 0;
    }
    uint64_t most_pages = region->page_bytes >= MF_FRAME_DATA_MAX_BYTES
                              ? 1
                              : MF_FRAME_DATA_MAX_BYTES / region->page_bytes;
    if (frame->pages > most_pages)
        return wrong(why, "a data frame that is too long");
    if (frame->length_bytes != frame->pages * region->page_bytes)
        return wrong(why, "a data frame whose length does not fit its pages");
    return 0;
}
