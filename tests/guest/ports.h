/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * How a test guest talks to the host: writes to QEMU's isa-debugcon (one instruction a line, no
 * driver, no interrupt), reads from the second serial port by polling it.
 */
#pragma once

#include <stdint.h>

#define PORT_DEBUGCON 0xe9u
#define PORT_COM2 0x2f8u
#define PORT_COM2_COUNT 8u

static inline void port_out(uint16_t port, uint8_t value)
{
    __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static inline uint8_t port_in(uint16_t port)
{
    uint8_t value = 0;

    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

/** ports_init() - the serial port to 8 bits with its FIFO on, without interrupts. */
static inline void ports_init(void)
{
    port_out(PORT_COM2 + 1, 0);    /* no interrupts */
    port_out(PORT_COM2 + 3, 0x03); /* 8n1 */
    port_out(PORT_COM2 + 2, 0x07); /* FIFO on and empty */
    port_out(PORT_COM2 + 4, 0x03); /* DTR, RTS */
}

static inline void ports_put(const char *text, uint32_t size)
{
    uintptr_t count = size;

    __asm__ volatile("rep outsb" : "+S"(text), "+c"(count) : "d"(PORT_DEBUGCON) : "memory");
}

/** ports_get() - a byte from the host, or -1. */
static inline int ports_get(void)
{
    return port_in(PORT_COM2 + 5) & 1 ? port_in(PORT_COM2) : -1;
}

static inline uint64_t ports_ticks(void)
{
    uint32_t low = 0, high = 0;

    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
    return (uint64_t)high << 32 | low;
}
