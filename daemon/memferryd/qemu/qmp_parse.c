/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/memferryd/qemu/qmp_parse.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* How much of a stranger's text an error sentence repeats. */
#define QUOTE_BYTES 60

/* Printable ASCII only: the text goes to a terminal. */
static void quote(char out[QUOTE_BYTES + 1], const char *text, size_t length_bytes)
{
    size_t n = 0;
    for (; n < length_bytes && n < QUOTE_BYTES; n++)
        out[n] = text[n] >= 0x20 && text[n] < 0x7f ? text[n] : '.';
    out[n] = '\0';
}

static int refuse(struct mf_error *err, const char *why, const char *text, size_t length_bytes)
{
    char shown[QUOTE_BYTES + 1];
    quote(shown, text, length_bytes);
    return mf_fail(err, EPROTO, "%s (\"%s\"): is it a QMP socket", why, shown);
}

/* Which kind of message @object is. */
static int classify(json_t *object, struct qmp_message *out)
{
    *out = (struct qmp_message){0};
    json_t *value = json_object_get(object, "id");
    if (json_is_integer(value) && json_integer_value(value) >= 0) {
        out->has_id = true;
        out->id = (uint64_t)json_integer_value(value);
    }
    if ((value = json_object_get(object, "return"))) {
        out->kind = QMP_RETURN;
        out->body = value;
        return 0;
    }
    if ((value = json_object_get(object, "event"))) {
        out->kind = QMP_EVENT;
        out->name = json_string_value(value);
        out->body = json_object_get(object, "data");
        return out->name ? 0 : -EPROTO;
    }
    if ((value = json_object_get(object, "error"))) {
        out->kind = QMP_ERROR;
        out->name = json_string_value(json_object_get(value, "class"));
        out->desc = json_string_value(json_object_get(value, "desc"));
        return out->desc ? 0 : -EPROTO;
    }
    if ((value = json_object_get(object, "QMP"))) {
        out->kind = QMP_GREETING;
        out->body = json_object_get(value, "version");
        return out->body ? 0 : -EPROTO;
    }
    return -EPROTO;
}

/* One whole message is in @text: parse, classify, hand on. Return: 1 go on, 0 stop, or -errno. */
static int deliver(const char *text, size_t length_bytes, qmp_sink sink, void *arg,
                   struct mf_error *err)
{
    json_error_t why;
    json_t *object = json_loadb(text, length_bytes, JSON_REJECT_DUPLICATES, &why);
    if (!object)
        return refuse(err, "sent something that is not JSON", text, length_bytes);
    struct qmp_message message;
    int rc = classify(object, &message);
    if (rc)
        rc = refuse(err, "sent JSON that is no QMP message", text, length_bytes);
    else
        rc = sink(arg, &message);
    json_decref(object);
    return rc;
}

/* Room for @more_bytes more. */
static int reserve(struct qmp_parser *parser, size_t more_bytes)
{
    size_t need = parser->length_bytes + more_bytes;
    if (need <= parser->size_bytes)
        return 0;
    size_t size = parser->size_bytes ? parser->size_bytes : 4096;
    while (size < need)
        size *= 2;
    char *text = realloc(parser->text, size);
    if (!text)
        return -ENOMEM;
    parser->text = text;
    parser->size_bytes = size;
    return 0;
}

/* Follow the JSON structure over one character. Return: true when it closes the outermost brace. */
static bool closes_message(struct qmp_parser *parser, char c)
{
    if (parser->in_string) {
        if (parser->escaped)
            parser->escaped = false;
        else if (c == '\\')
            parser->escaped = true;
        else if (c == '"')
            parser->in_string = false;
        return false;
    }
    switch (c) {
    case '"':
        parser->in_string = true;
        return false;
    case '{':
    case '[':
        parser->depth++;
        return false;
    case '}':
    case ']':
        return --parser->depth == 0;
    default:
        return false;
    }
}

static bool is_space(char c)
{
    return c == ' ' || c == '\t' || c == '\r' || c == '\n';
}

int qmp_parser_feed(struct qmp_parser *parser, const char *data, size_t length_bytes, qmp_sink sink,
                    void *arg, struct mf_error *err)
{
    size_t max_bytes = parser->max_bytes ? parser->max_bytes : QMP_MAX_MESSAGE_BYTES;
    size_t at = 0;

    while (at < length_bytes) {
        if (parser->depth == 0) {
            if (is_space(data[at])) {
                at++;
                continue;
            }
            if (data[at] != '{')
                return refuse(err, "sent something that is not JSON", data + at, length_bytes - at);
        }
        size_t start = at;
        bool whole = false;
        while (at < length_bytes && !whole)
            whole = closes_message(parser, data[at++]);

        size_t piece_bytes = at - start;
        if (piece_bytes > max_bytes || parser->length_bytes > max_bytes - piece_bytes)
            return mf_fail(err, EMSGSIZE,
                           "sent a message of more than %zu bytes: is it a QMP socket", max_bytes);
        if (whole && parser->length_bytes == 0) {
            /* The usual case: the message lies in one piece, no copy needed. */
            int rc = deliver(data + start, piece_bytes, sink, arg, err);
            if (rc <= 0)
                return rc;
            continue;
        }
        if (reserve(parser, piece_bytes))
            return mf_fail(err, ENOMEM, "sent a message for which there is no memory");
        memcpy(parser->text + parser->length_bytes, data + start, piece_bytes);
        parser->length_bytes += piece_bytes;
        if (whole) {
            /* The sink may end the parser: what is delivered must not be the parser's own. */
            char *text = parser->text;
            size_t text_bytes = parser->length_bytes;
            parser->text = NULL;
            parser->length_bytes = parser->size_bytes = 0;
            int rc = deliver(text, text_bytes, sink, arg, err);
            free(text);
            if (rc <= 0)
                return rc;
        }
    }
    return 0;
}

void qmp_parser_clear(struct qmp_parser *parser)
{
    size_t max_bytes = parser->max_bytes;
    free(parser->text);
    *parser = (struct qmp_parser){.max_bytes = max_bytes};
}
