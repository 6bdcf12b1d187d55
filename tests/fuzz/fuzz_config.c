/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * memferryd's configuration file. A file that is refused changes nothing and says why; one that is
 * taken leaves every setting within its limits.
 */
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "daemon/memferryd/daemon.h"
#include "lib/log.h"
#include "lib/util.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t length_bytes);

static void require(bool condition)
{
    if (!condition)
        abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t length_bytes)
{
    cleanup_close int fd = memfd_create("memferryd.conf", MFD_CLOEXEC);
    if (fd < 0 || mf_write_all(fd, data, length_bytes) < 0)
        return 0;
    char path[64];
    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    struct config config, before;
    struct mf_error err = {.text = ""};
    config_defaults(&before);
    config = before;
    if (config_load(&config, path, &err) < 0) {
        require(err.text[0] && memcmp(&config, &before, sizeof(config)) == 0);
        return 0;
    }
    require(config.runtime_dir[0] == '/' && config.listen_address[0] && config.listen_port);
    require(config.streams >= 1 && config.streams <= MF_MAX_STREAMS);
    require(config.log_level >= MF_LOG_ERR && config.log_level <= MF_LOG_DEBUG);
    require(!config.mover_path[0] || config.mover_path[0] == '/');
    require(memchr(config.runtime_dir, '\0', sizeof(config.runtime_dir)) &&
            memchr(config.mover_user, '\0', sizeof(config.mover_user)));
    return 0;
}
