/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * "HOST[:PORT]" as a person writes it, taken apart. Pure: nothing is resolved, nothing allocated.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "lib/error.h"

#define MF_HOST_MAX_BYTES 254u /**< longest DNS name (RFC 1035: 253 characters) and the NUL */

/** struct mf_endpoint - where a daemon listens.
 * @host: a name or numeric address without brackets; may be empty when the caller allowed it.
 * @port: 1 to 65535, or 0 when the text named none.
 */
struct mf_endpoint {
    char host[MF_HOST_MAX_BYTES];
    uint16_t port;
};

/**
 * mf_endpoint_parse() - take "HOST", "HOST:PORT", "[V6]" or "[V6]:PORT" apart.
 * @text:       NUL-terminated, of any length and content.
 * @out:        written only on success.
 * @err:        names the text, what is wrong with it and how to write it.
 *
 * An IPv6 address must stand in brackets: without them "::1:7466" would be two things at once. An
 * empty host (":7466", "") is passed on as such. Return: 0 or -EINVAL.
 */
int mf_endpoint_parse(const char *text, struct mf_endpoint *out, struct mf_error *err);

/** mf_ipv4_valid() - is it a dotted IPv4 address? */
bool mf_ipv4_valid(const char *host);

/** mf_endpoint_print() - the reverse: "HOST:PORT" with brackets where needed, into @text. */
void mf_endpoint_print(const char *host, uint16_t port, char *text, size_t text_bytes);

/**
 * mf_number_parse() - an unsigned decimal number and nothing else: no sign, no blanks.
 * @least, @most: what is allowed, both included.
 * Return: 0 or -EINVAL (not a number) or -ERANGE; @out is written only on success.
 */
int mf_number_parse(const char *text, uint64_t least, uint64_t most, uint64_t *out);
