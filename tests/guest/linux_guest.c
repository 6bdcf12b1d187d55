/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The only process (init) of the Linux test guest: the workload on anonymous memory. Loads
 * /modules/0.ko, 1.ko... */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/io.h>
#include <sys/mman.h>
#include <sys/reboot.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "pattern.h"
#include "ports.h"
#include "workload.h"

static uint32_t ticks_per_ms;

static uint64_t clock_ns(void)
{
    struct timespec now = {0};

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static uint32_t measure_ticks_per_ms(void)
{
    uint64_t start_ns = clock_ns(), start_ticks = ports_ticks(), ns = 0;

    while ((ns = clock_ns() - start_ns) < 20000000u)
        ;
    return (uint32_t)((ports_ticks() - start_ticks) * 1000000u / ns);
}

static void idle(uint64_t until_ticks)
{
    uint64_t now = ports_ticks();
    struct timespec pause = {0};

    if (now >= until_ticks)
        return;
    pause.tv_nsec = (long)((until_ticks - now) * 1000u / ticks_per_ms * 1000u);
    nanosleep(&pause, NULL);
}

static void *map(size_t size)
{
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    return memory == MAP_FAILED ? NULL : memory;
}

static void *memory(uint32_t pages)
{
    return map((size_t)pages * GUEST_PAGE_BYTES);
}

static uint32_t *generations(uint32_t pages)
{
    return map(pages * sizeof(uint32_t));
}

/* The page that is touched here next is another one of the kernel's, which had anything done to it.
 */
static void discard(void *page)
{
    madvise(page, GUEST_PAGE_BYTES, MADV_DONTNEED);
}

static void __attribute__((noreturn)) power_off(void)
{
    reboot(RB_POWER_OFF);
    for (;;)
        pause();
}

static void load_modules(void)
{
    char path[32];
    int fd = -1;

    for (unsigned i = 0;; i++) {
        snprintf(path, sizeof(path), "/modules/%u.ko", i);
        fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0)
            return;
        if (syscall(SYS_finit_module, fd, "", 0))
            perror(path);
        close(fd);
    }
}

int main(void)
{
    if (ioperm(PORT_DEBUGCON, 1, 1) || ioperm(PORT_COM2, PORT_COM2_COUNT, 1)) {
        perror("test guest: ioperm");
        return EXIT_FAILURE;
    }
    load_modules();
    ports_init();
    ticks_per_ms = measure_ticks_per_ms();
    workload_run(&(struct guest_platform){
        .ticks_per_ms = ticks_per_ms,
        .ticks = ports_ticks,
        .put = ports_put,
        .get = ports_get,
        .idle = idle,
        .memory = memory,
        .generations = generations,
        .discard = discard,
        .poweroff = power_off,
    });
}
