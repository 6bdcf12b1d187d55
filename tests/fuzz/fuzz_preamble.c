/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The preamble and its answer: what is accepted is in range and is encoded to the same bytes again.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "proto/frame.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t length_bytes);

static void require(bool condition)
{
    if (!condition)
        abort();
}

static void try_preamble(const uint8_t *data)
{
    struct mf_preamble preamble, again;
    uint8_t bytes[MF_PREAMBLE_BYTES];
    const char *why = NULL;
    if (mf_preamble_decode(data, &preamble, &why) < 0) {
        require(why && why[0]);
        return;
    }
    require(!why && preamble.oldest_version <= preamble.version);
    require(memchr(preamble.name, '\0', sizeof(preamble.name)) != NULL);
    if (!mf_versions_meet(preamble.version, preamble.oldest_version)) {
        require(preamble.name[0] == '\0' && preamble.link == 0); /* not parsed */
        return;
    }
    require(preamble.kind >= MF_CONNECTION_CONTROL && preamble.kind <= MF_CONNECTION_ABANDON);
    require(preamble.kind == MF_CONNECTION_BULK ? preamble.stream < preamble.streams
                                                : preamble.stream == 0);
    require(preamble.link > 0);
    mf_preamble_encode(&preamble, bytes);
    require(mf_preamble_decode(bytes, &again, &why) == 0);
    /* What lies behind the name's end is not sent again; all before it is the same. */
    require(memcmp(bytes, data, 64 + strlen(preamble.name)) == 0);
    require(strcmp(preamble.name, again.name) == 0);
}

static void try_answer(const uint8_t *data)
{
    struct mf_preamble_reply reply;
    uint8_t bytes[MF_PREAMBLE_REPLY_BYTES];
    const char *why = NULL;
    if (mf_preamble_reply_decode(data, &reply, &why) < 0) {
        require(why && why[0]);
        return;
    }
    require(!why);
    if (!mf_versions_meet(reply.version, reply.oldest_version))
        return;
    mf_preamble_reply_encode(&reply, bytes);
    require(memcmp(bytes, data, sizeof(bytes)) == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t length_bytes)
{
    if (length_bytes >= MF_PREAMBLE_BYTES)
        try_preamble(data);
    if (length_bytes >= MF_PREAMBLE_REPLY_BYTES)
        try_answer(data);
    return 0;
}
