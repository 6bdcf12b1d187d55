/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The workload without an operating system: 32-bit protected mode, no paging, no interrupts. Memory
 * map: code at 1 MiB, generations from 2 MiB, pages from 8 MiB (so at most 1.5 Mi pages).
 */
#include <stddef.h>

#include "ports.h"
#include "workload.h"

#define GENERATIONS_ADDRESS 0x200000u
#define MEMORY_ADDRESS 0x800000u
#define PIT_HZ 1193182u
#define PORT_PIT_CHANNEL2 0x42u
#define PORT_PIT_COMMAND 0x43u
#define PORT_SYSTEM_CONTROL 0x61u
#define PORT_DEBUG_EXIT 0xf4u

void bare_main(void);

/* The compiler may turn loops into calls of these. */
void *memset(void *to, int value, size_t size);
void *memset(void *to, int value, size_t size)
{
    void *at = to;

    __asm__ volatile("rep stosb" : "+D"(at), "+c"(size) : "a"(value) : "memory");
    return to;
}

void *memcpy(void *restrict to, const void *restrict from, size_t size);
void *memcpy(void *restrict to, const void *restrict from, size_t size)
{
    void *at = to;

    __asm__ volatile("rep movsb" : "+D"(at), "+S"(from), "+c"(size) : : "memory");
    return to;
}

/* Channel 2 of the timer chip counts 20 ms down, its output is readable at the system control port.
 */
static uint32_t measure_ticks_per_ms(void)
{
    uint32_t count = PIT_HZ / 50u;
    uint64_t start = 0;

    port_out(PORT_SYSTEM_CONTROL, 0x01); /* gate on, speaker off */
    port_out(PORT_PIT_COMMAND, 0xb0);    /* channel 2, both bytes, mode 0 */
    port_out(PORT_PIT_CHANNEL2, (uint8_t)(count & 0xff));
    port_out(PORT_PIT_CHANNEL2, (uint8_t)(count >> 8));
    start = ports_ticks();
    while (!(port_in(PORT_SYSTEM_CONTROL) & 0x20))
        ;
    return (uint32_t)(ports_ticks() - start) / 20u;
}

static void idle(uint64_t until_ticks)
{
    while (ports_ticks() < until_ticks)
        __asm__ volatile("pause");
}

static void *memory(uint32_t pages)
{
    return pages ? (void *)MEMORY_ADDRESS : NULL;
}

static uint32_t *generations(uint32_t pages)
{
    uint32_t *table = (uint32_t *)GENERATIONS_ADDRESS;

    if (pages > (MEMORY_ADDRESS - GENERATIONS_ADDRESS) / sizeof(*table))
        return NULL;
    for (uint32_t i = 0; i < pages; i++)
        table[i] = 0;
    return table;
}

/* QEMU's isa-debug-exit device ends QEMU. */
static void __attribute__((noreturn)) power_off(void)
{
    port_out(PORT_DEBUG_EXIT, 0);
    for (;;)
        __asm__ volatile("hlt");
}

void bare_main(void)
{
    ports_init();
    workload_run(&(struct guest_platform){
        .ticks_per_ms = measure_ticks_per_ms(),
        .ticks = ports_ticks,
        .put = ports_put,
        .get = ports_get,
        .idle = idle,
        .memory = memory,
        .generations = generations,
        .poweroff = power_off,
    });
}
