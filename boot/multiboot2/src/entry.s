# The multiboot2 header, and the way from there to long mode.
#
# Multiboot2 2.0, 3.3: EAX holds the magic, EBX the address of the information
# structure; 32-bit protected mode, flat segments, paging off, interrupts off.
#
# The header asks for no graphics: on a BIOS machine the text screen at 0xb8000
# is what is always there, and what the firmware's own messages are on.

.set MAGIC,        0x36d76289
.set CPUID_ID,     1 << 21          # EFLAGS.ID: CPUID exists
.set LONG_MODE,    1 << 29          # CPUID 8000_0001H, EDX
.set NO_EXECUTE,   1 << 20
.set TABLE,        0x003            # present, writable
.set LARGE_PAGE,   0x083            # present, writable, 2 MiB
.set IA32_EFER,    0xc0000080
.set EFER_LME,     1 << 8
.set CR4_PAE,      1 << 5
.set CR0_PG,       1 << 31

.section .multiboot2, "a"
.balign 8
header:
    .long 0xe85250d6                # magic
    .long 0                         # architecture: i386
    .long header_end - header
    .long -(0xe85250d6 + (header_end - header))

    .balign 8
    .short 1, 0                     # information request
    .long 8 + 4 * 2
    .long 3, 6                      # modules, memory map
    .balign 8
    .short 1, 1                     # information request, optional
    .long 8 + 4 * 3
    .long 8, 14, 15                 # framebuffer, ACPI old and new RSDP
    .balign 8
    .short 6, 0                     # modules on page boundaries
    .long 8
    .balign 8
    .short 0, 0                     # end
    .long 8
header_end:

.text
.code32
.global tessera_multiboot2_entry
tessera_multiboot2_entry:
    cli
    cld
    mov edi, ebx                    # for the Rust part, and CPUID spoils EBX
    lea esp, [stack_top]

    lea esi, [no_multiboot2]
    cmp eax, MAGIC
    jne fail

    lea esi, [no_long_mode]
    pushfd
    pop eax
    mov ecx, eax
    xor eax, CPUID_ID
    push eax
    popfd
    pushfd
    pop eax
    cmp eax, ecx
    je fail
    mov eax, 0x80000000
    cpuid
    cmp eax, 0x80000001
    jb fail
    mov eax, 0x80000001
    cpuid
    test edx, LONG_MODE
    jz fail
    lea esi, [no_nx]
    test edx, NO_EXECUTE
    jz fail

    # Identity mapping of the first 4 GiB in 2 MiB pages: one page of PML4, one
    # of PDPT, four of page directories, all zero so far.
    lea eax, [pdpt + TABLE]
    mov [pml4], eax
    xor ecx, ecx
    lea eax, [directories + TABLE]
2:  mov [pdpt + ecx * 8], eax
    add eax, 4096
    inc ecx
    cmp ecx, 4
    jb 2b
    xor ecx, ecx
    mov eax, LARGE_PAGE
3:  mov [directories + ecx * 8], eax
    add eax, 2 << 20
    inc ecx
    cmp ecx, 4 * 512
    jb 3b

    mov eax, CR4_PAE
    mov cr4, eax
    lea eax, [pml4]
    mov cr3, eax
    mov ecx, IA32_EFER
    rdmsr
    or eax, EFER_LME
    wrmsr
    mov eax, cr0
    or eax, CR0_PG
    mov cr0, eax
    lgdt [gdt_pointer]
    push 8
    lea eax, [long_mode]
    push eax
    retf

# ESI: a message, ended by 0. To the serial port and to the text screen.
fail:
    lea ebx, [com1_setup]
4:  movzx edx, byte ptr [ebx]
    test edx, edx
    jz 5f
    add edx, 0x300
    mov al, [ebx + 1]
    out dx, al
    add ebx, 2
    jmp 4b
5:  mov edi, 0xb8000
6:  mov bl, [esi]
    inc esi
    test bl, bl
    jz 9f
    mov edx, 0x3fd                  # wait for the transmitter, but not for ever
    mov ecx, 100000
7:  in al, dx
    test al, 0x20
    jnz 8f
    dec ecx
    jnz 7b
8:  mov edx, 0x3f8
    mov al, bl
    out dx, al
    cmp bl, ' '
    jb 6b
    mov bh, 0x4f                    # white on red
    mov [edi], bx
    add edi, 2
    jmp 6b
9:  cli
    hlt
    jmp 9b

.code64
long_mode:
    xor eax, eax
    mov ds, eax
    mov es, eax
    mov fs, eax
    mov gs, eax
    mov ss, eax
    mov edi, edi
    lea rsp, [stack_top]
    call tessera_multiboot2_main
    ud2

.section .rodata
# Pairs of low port byte (COM1 is 0x3f8) and value: interrupts off, divisor 1,
# 8N1, FIFOs, DTR and RTS.
com1_setup:
    .byte 0xf9, 0, 0xfb, 0x80, 0xf8, 1, 0xf9, 0, 0xfb, 3, 0xfa, 7, 0xfc, 3, 0
no_multiboot2:
    .asciz "\r\ntessera boot: not started by a multiboot2 loader; use the GRUB entry that `cargo xtask image` makes\r\n"
no_long_mode:
    .asciz "\r\ntessera boot: this processor has no 64-bit long mode; Tessera needs an x86-64 machine\r\n"
no_nx:
    .asciz "\r\ntessera boot: this processor has no no-execute bit (NX); turn on \"NX\", \"XD\" or \"Execute Disable\" in the firmware's setup\r\n"
.balign 8
gdt:
    .quad 0
    .quad 0x00209b0000000000        # 64-bit code, ring 0
gdt_pointer:
    .short 15
    .long gdt

.section .bss
.balign 4096
pml4:        .skip 4096
pdpt:        .skip 4096
directories: .skip 4 * 4096
stack:       .skip 64 * 1024
stack_top:
.text
