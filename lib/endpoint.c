/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib/endpoint.h"

#include <arpa/inet.h>
#include <errno.h>
#include <net/if.h>
#include <stdio.h>
#include <string.h>

int mf_number_parse(const char *text, uint64_t least, uint64_t most, uint64_t *out)
{
    uint64_t value = 0;
    if (!*text)
        return -EINVAL;
    for (; *text; text++) {
        if (*text < '0' || *text > '9')
            return -EINVAL;
        if (__builtin_mul_overflow(value, 10u, &value) ||
            __builtin_add_overflow(value, (uint64_t)(*text - '0'), &value))
            return -ERANGE;
    }
    if (value < least || value > most)
        return -ERANGE;
    *out = value;
    return 0;
}

bool mf_ipv4_valid(const char *host)
{
    struct in_addr ignored;
    return inet_pton(AF_INET, host, &ignored) == 1;
}

/* fe80::1%eth0: the zone is no business of inet_pton(3). */
static bool is_ipv6(const char *host)
{
    struct in6_addr ignored;
    char address[INET6_ADDRSTRLEN];
    const char *zone = strchr(host, '%');
    size_t length = zone ? (size_t)(zone - host) : strlen(host);
    if (length >= sizeof(address) || (zone && (!zone[1] || strlen(zone + 1) >= IF_NAMESIZE)))
        return false;
    memcpy(address, host, length);
    address[length] = '\0';
    return inet_pton(AF_INET6, address, &ignored) == 1;
}

static bool is_name_or_ipv4(const char *host)
{
    static const char allowed[] =
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-";
    return host[0] != '-' && host[strspn(host, allowed)] == '\0';
}

int mf_endpoint_parse(const char *text, struct mf_endpoint *out, struct mf_error *err)
{
    const char *host = text, *host_end, *port = NULL;
    if (text[0] == '[') {
        host = text + 1;
        host_end = strchr(host, ']');
        if (!host_end)
            return mf_fail(err, EINVAL,
                           "'%.80s' lacks the closing bracket; write [V6-ADDRESS]:PORT", text);
        if (host_end[1] == ':')
            port = host_end + 2;
        else if (host_end[1])
            return mf_fail(err, EINVAL,
                           "'%.80s' has something after the bracket that is not a port; write "
                           "[V6-ADDRESS]:PORT",
                           text);
    } else {
        host_end = strchrnul(text, ':');
        if (*host_end && strchr(host_end + 1, ':'))
            return mf_fail(
                err, EINVAL,
                "'%.80s' has more than one colon; put an IPv6 address in brackets, as in "
                "[::1]:7466",
                text);
        if (*host_end)
            port = host_end + 1;
    }

    struct mf_endpoint parsed = {.port = 0};
    size_t host_bytes = (size_t)(host_end - host);
    if (host_bytes >= sizeof(parsed.host))
        return mf_fail(err, EINVAL, "'%.40s…' is longer than a host name can be (%u characters)",
                       text, MF_HOST_MAX_BYTES - 1);
    memcpy(parsed.host, host, host_bytes);
    if (text[0] == '[' ? !is_ipv6(parsed.host) : !is_name_or_ipv4(parsed.host))
        return mf_fail(err, EINVAL, "'%.80s' is not %s", parsed.host,
                       text[0] == '[' ? "an IPv6 address, which is what brackets are for"
                                      : "a host name or an address");

    uint64_t number = 0;
    if (port && mf_number_parse(port, 1, UINT16_MAX, &number) < 0)
        return mf_fail(err, EINVAL, "'%.80s' is not a port in '%.80s'; a port is 1 to 65535", port,
                       text);
    parsed.port = (uint16_t)number;
    *out = parsed;
    return 0;
}

void mf_endpoint_print(const char *host, uint16_t port, char *text, size_t text_bytes)
{
    snprintf(text, text_bytes, strchr(host, ':') ? "[%s]:%u" : "%s:%u", host, (unsigned)port);
}
