/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib/congestion.h"

#include <errno.h>
#include <linux/tcp.h> /* not <netinet/tcp.h>, whose tcp_info ends before tcpi_min_rtt */
#include <netinet/in.h>
#include <stdbool.h>
#include <stddef.h>
#include <string.h>
#include <sys/socket.h>

#include "lib/util.h"

/* Hosts of one place. A busy host answers late, so the least time counts, and with room to spare.
 */
#define SHORT_WAY_US 2000u

static int use(int fd, const char *algorithm)
{
    return setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, algorithm, (socklen_t)strlen(algorithm)) == 0
               ? 0
               : -errno;
}

int mf_congestion_check(const char *name, struct mf_error *err)
{
    if (strcmp(name, MF_CONGESTION_AUTO) == 0 || strcmp(name, MF_CONGESTION_SYSTEM) == 0)
        return 0;
    cleanup_close int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0) /* a host with IPv6 alone */
        fd = socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0);
    /* The kernel would cut a longer name to what it knows. */
    const int r = name[0] && strlen(name) < MF_CONGESTION_MAX ? use(fd, name) : -ENOENT;
    if (r == -EPERM)
        return mf_fail(err, EINVAL,
                       "the kernel does not allow it to everybody (sysctl "
                       "net.ipv4.tcp_allowed_congestion_control)");
    if (r < 0)
        return mf_fail(err, EINVAL,
                       "it is auto, system or one of those that sysctl "
                       "net.ipv4.tcp_available_congestion_control lists");
    return 0;
}

static bool is_short_way(int fd)
{
    struct tcp_info info = {0};
    socklen_t length = sizeof(info);
    if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &length) != 0 ||
        length < offsetof(struct tcp_info, tcpi_min_rtt) + sizeof(info.tcpi_min_rtt))
        return false;
    return info.tcpi_min_rtt <= SHORT_WAY_US;
}

int mf_congestion_apply(int fd, const char *name, char used[MF_CONGESTION_MAX])
{
    /* The last is always there and always allowed. */
    static const char *const unpaced[] = {"cubic", "reno"};
    socklen_t length = MF_CONGESTION_MAX;
    int r = -ENOENT;
    memset(used, 0, MF_CONGESTION_MAX);
    if (getsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, used, &length) != 0)
        used[0] = '\0';
    used[MF_CONGESTION_MAX - 1] = '\0';
    if (strcmp(name, MF_CONGESTION_SYSTEM) == 0)
        return 0;
    if (strcmp(name, MF_CONGESTION_AUTO) != 0) {
        r = use(fd, name);
    } else if (strncmp(used, "bbr", 3) == 0 && is_short_way(fd)) {
        for (size_t i = 0; r < 0 && i < sizeof(unpaced) / sizeof(unpaced[0]); i++)
            r = use(fd, name = unpaced[i]);
    }
    if (r < 0)
        return 0;
    memset(used, 0, MF_CONGESTION_MAX);
    memcpy(used, name, strnlen(name, MF_CONGESTION_MAX - 1));
    return 1;
}
