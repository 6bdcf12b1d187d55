/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What arrives on a QMP socket, cut into messages: no socket, no event loop, no clock.
 *
 * Source: QEMU's qmp-spec. A message is one JSON object. QEMU ends it with CR LF and, with
 * `-mon pretty=on`, spreads it over many lines; so messages are cut by their braces, not by lines.
 * Everything that arrives is bounded: a message longer than QMP_MAX_MESSAGE_BYTES is an error.
 */
#pragma once

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "lib/error.h"

#define QMP_MAX_MESSAGE_BYTES ((size_t)16 << 20)

enum qmp_kind {
    QMP_GREETING, /**< {"QMP": {"version": …}} */
    QMP_RETURN,   /**< {"return": …, "id": n} */
    QMP_ERROR,    /**< {"error": {"class", "desc"}, "id": n} */
    QMP_EVENT,    /**< {"event": name, "data": …, "timestamp": …} */
};

/** struct qmp_message - one message, classified. All pointers are borrowed from the message and
 * valid during the sink's call only. */
struct qmp_message {
    enum qmp_kind kind;
    bool has_id;
    uint64_t id;      /**< of QMP_RETURN and QMP_ERROR, when has_id */
    json_t *body;     /**< greeting: the version object; return: the value; event: data or NULL */
    const char *name; /**< event: its name; error: its class */
    const char *desc; /**< error: QEMU's sentence */
};

/** qmp_sink - gets each message. Return: true to go on, false to stop parsing (the parser may be
 *  gone by then: qmp_parser_feed touches it no more). */
typedef bool (*qmp_sink)(void *arg, const struct qmp_message *message);

/** struct qmp_parser - what has arrived of a message that is not complete yet. Zeroed: ready. */
struct qmp_parser {
    char *text;
    size_t length_bytes, size_bytes;
    size_t max_bytes; /**< 0: QMP_MAX_MESSAGE_BYTES */
    unsigned depth;   /**< open braces and brackets */
    bool in_string, escaped;
};

/**
 * qmp_parser_feed() - take @length_bytes at @data as they came from the socket, in any portions.
 * Return: 0, or -EPROTO (not QMP, not JSON), -EMSGSIZE (too long), -ENOMEM with @err: a sentence
 * part like "sent something that is not JSON …", to be completed by the caller's subject. After an
 * error only qmp_parser_clear may be called.
 */
int qmp_parser_feed(struct qmp_parser *parser, const char *data, size_t length_bytes, qmp_sink sink,
                    void *arg, struct mf_error *err);

/** qmp_parser_clear() - free what is held; the parser is ready for another stream. */
void qmp_parser_clear(struct qmp_parser *parser);
