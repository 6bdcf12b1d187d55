/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/memferryd/control_socket.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "lib/util.h"

/* Two daemons in one runtime directory would take each other's files for their own. The lock is on
 * the directory, so it leaves nothing behind; the kernel drops it with the process. */
int control_lock_directory(const char *runtime_dir, int *out, struct mf_error *err)
{
    if (mkdir(runtime_dir, 0755) < 0 && errno != EEXIST)
        return mf_fail(err, errno, "cannot make the runtime directory %s: %s", runtime_dir,
                       strerror(errno));
    cleanup_close int fd = open(runtime_dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return mf_fail(err, errno, "cannot open the runtime directory %s: %s", runtime_dir,
                       strerror(errno));
    if (flock(fd, LOCK_EX | LOCK_NB) < 0) {
        if (errno == EWOULDBLOCK)
            return mf_fail(err, EADDRINUSE,
                           "another memferryd serves %s already; stop it first, or give this one "
                           "its own --runtime-dir",
                           runtime_dir);
        return mf_fail(err, errno, "cannot lock the runtime directory %s: %s", runtime_dir,
                       strerror(errno));
    }
    *out = mf_steal_fd(&fd);
    return 0;
}

/* With the directory locked, a socket that lies there is a dead daemon's. */
int control_bind(const char *path, int *out, struct mf_error *err)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof(address.sun_path), "%s", path);
    cleanup_close int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return mf_fail(err, errno, "cannot make the control socket: %s", strerror(errno));
    if (unlink(path) < 0 && errno != ENOENT)
        return mf_fail(err, errno, "cannot replace the stale control socket %s: %s", path,
                       strerror(errno));
    mode_t old_mask = umask(0177); /* bind(2) makes the file: it is never open to others */
    int rc = bind(fd, (struct sockaddr *)&address, sizeof(address));
    int code = errno;
    umask(old_mask);
    if (rc < 0)
        return mf_fail(err, code, "cannot bind the control socket %s: %s", path, strerror(code));
    *out = mf_steal_fd(&fd);
    return 0;
}
