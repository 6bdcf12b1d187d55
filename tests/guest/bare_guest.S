/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The firmware image (64 KiB, QEMU's -bios) of the guest without a system: from the reset vector to
 * 32-bit protected mode, copy everything to 1 MiB, run it there. Small enough to run under a nested KVM
 * that can't run a Linux guest, and its code lies in guest RAM, so that instructions fault too.
 */
#define CODE_SELECTOR 0x08
#define DATA_SELECTOR 0x10
#define ROM_ADDRESS 0xf0000
#define CR0_PE 0x00000001
#define CR0_NW 0x20000000
#define CR0_CD 0x40000000
#define IMAGE_BYTES 0x10000
#define RUN_ADDRESS 0x100000

    .section .rom, "ax"
    .code16
rom_start:
    cli
    cld
    lgdtl %cs:(gdt_pointer - rom_start)
    movl %cr0, %eax
    andl $~(CR0_NW | CR0_CD), %eax
    orl $CR0_PE, %eax
    movl %eax, %cr0
    ljmpl $CODE_SELECTOR, $(ROM_ADDRESS + protected - rom_start)

    .code32
protected:
    movw $DATA_SELECTOR, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movl $ROM_ADDRESS, %esi
    movl $RUN_ADDRESS, %edi
    movl $(IMAGE_BYTES / 4), %ecx
    rep movsl
    movl $bss_start, %edi
    movl $bss_end, %ecx
    subl %edi, %ecx
    xorl %eax, %eax
    rep stosb
    movl $stack_top, %esp
    movl $bare_main, %eax
    call *%eax

    .balign 8
gdt:
    /* Marked accessed, since this table is in ROM and a processor can not mark it. */
    .quad 0
    .quad 0x00cf9b000000ffff /* code: flat, 4 GiB */
    .quad 0x00cf93000000ffff /* data: flat, 4 GiB */
gdt_pointer:
    .word gdt_pointer - gdt - 1
    .long ROM_ADDRESS + gdt - rom_start

    .section .reset, "ax"
    .code16
    /* At 0xfffffff0; the same image is seen at ROM_ADDRESS. */
    ljmpw $(ROM_ADDRESS >> 4), $0

    .bss
    .balign 16
    .skip 16384
stack_top:

    .section .note.GNU-stack, "", @progbits
