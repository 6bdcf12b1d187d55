/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What arrives on a QMP socket. The same bytes in one portion and in small ones give the same
 * messages and the same end; the first byte chooses the portions.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/memferryd/qemu/qmp_parse.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t length_bytes);

#define MAX_BYTES 4096u
#define STOP_AFTER 64u

struct seen {
    unsigned count;
    uint64_t sum;
};

static void require(bool condition)
{
    if (!condition)
        abort();
}

static void mix(uint64_t *sum, const char *text)
{
    for (; text && *text; text++)
        *sum = (*sum ^ (uint8_t)*text) * UINT64_C(0x100000001b3);
}

static bool sink(void *arg, const struct qmp_message *message)
{
    struct seen *seen = arg;
    switch (message->kind) {
    case QMP_GREETING:
    case QMP_RETURN:
        require(message->body != NULL);
        break;
    case QMP_ERROR:
        require(message->desc != NULL);
        break;
    case QMP_EVENT:
        require(message->name != NULL);
        break;
    }
    seen->sum = seen->sum * 31 + (uint64_t)message->kind + (message->has_id ? message->id : 7);
    mix(&seen->sum, message->name);
    mix(&seen->sum, message->desc);
    return ++seen->count < STOP_AFTER;
}

static int feed(const char *text, size_t length_bytes, size_t portion, struct seen *seen)
{
    struct qmp_parser parser = {.max_bytes = MAX_BYTES};
    struct mf_error err = {.text = ""};
    int rc = 0;
    for (size_t at = 0; at < length_bytes && rc == 0 && seen->count < STOP_AFTER; at += portion) {
        size_t piece = length_bytes - at < portion ? length_bytes - at : portion;
        rc = qmp_parser_feed(&parser, text + at, piece, sink, seen, &err);
        require(rc == 0 || err.text[0]);
        require(rc != 0 || parser.length_bytes <= MAX_BYTES);
    }
    qmp_parser_clear(&parser);
    require(parser.text == NULL && parser.depth == 0);
    return rc;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t length_bytes)
{
    if (length_bytes < 1)
        return 0;
    const char *text = (const char *)data + 1;
    struct seen whole = {0}, pieces = {0};
    int rc = feed(text, length_bytes - 1, length_bytes, &whole);
    require(feed(text, length_bytes - 1, 1u + data[0] % 37u, &pieces) == rc);
    require(whole.count == pieces.count && whole.sum == pieces.sum);
    return 0;
}
