/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib/owner.h"

#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <sys/ioctl.h>

#include "lib/uapi.h"
#include "lib/util.h"

/** is_watched() - is the first page of the range registered with some userfaultfd with WP_ASYNC? */
static bool is_watched(int pagemap_fd, uint64_t start_addr)
{
    struct page_region found;
    struct pm_scan_arg arg = {.size = sizeof(arg),
                              .flags = PM_SCAN_CHECK_WPASYNC,
                              .start = start_addr,
                              .end = start_addr + (uint64_t)sysconf(_SC_PAGESIZE),
                              .vec = (uintptr_t)&found,
                              .vec_len = 1,
                              .category_mask = PAGE_IS_WPALLOWED,
                              .return_mask = PAGE_IS_WPALLOWED};
    return ioctl(pagemap_fd, PAGEMAP_SCAN, &arg) == 1;
}

/** follows() - does what the process shows follow what is done by way of @uffd? */
static bool follows(pid_t pid, int uffd, uint64_t start_addr, uint64_t end_addr)
{
    char path[48];
    snprintf(path, sizeof(path), "/proc/%d/pagemap", pid);
    cleanup_close int pagemap = open(path, O_RDONLY | O_CLOEXEC);
    if (pagemap < 0 || !is_watched(pagemap, start_addr))
        return false;
    struct uffdio_range range = {.start = start_addr, .len = end_addr - start_addr};
    struct uffdio_register again = {.range = range, .mode = UFFDIO_REGISTER_MODE_WP};
    if (ioctl(uffd, UFFDIO_UNREGISTER, &range) != 0)
        return false;
    bool gone = !is_watched(pagemap, start_addr);
    if (ioctl(uffd, UFFDIO_REGISTER, &again) != 0)
        return false;
    return gone && is_watched(pagemap, start_addr);
}

pid_t mf_owner_find(int uffd, uint64_t start_addr, uint64_t end_addr)
{
    pid_t found = 0;
    cleanup_closedir DIR *proc = opendir("/proc");
    for (struct dirent *entry; proc && (entry = readdir(proc));) {
        pid_t pid = (pid_t)strtol(entry->d_name, NULL, 10);
        if (pid <= 0 || !follows(pid, uffd, start_addr, end_addr))
            continue;
        if (found)
            return 0;
        found = pid;
    }
    return found;
}
