// From the PVH entry (32-bit, flat, paging off, EBX = start info) to 64-bit Rust.
.section .note.Xen, "a", @note
.balign 4
    .long 4, 8, 18              // XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .balign 4
    .quad guest_entry32

.section .text.entry, "ax", @progbits
.code32
.globl guest_entry32
guest_entry32:
    cld
    mov esp, offset guest_stack_top
    mov esi, ebx
    // Four gigabytes, one to one, in 2 MiB pages.
    mov eax, offset guest_pdpt + 3
    mov [guest_pml4], eax
    mov ecx, 4
    mov eax, offset guest_pd + 3
    mov edi, offset guest_pdpt
2:  mov [edi], eax
    add eax, 4096
    add edi, 8
    dec ecx
    jnz 2b
    mov ecx, 2048
    mov eax, 0x83
    mov edi, offset guest_pd
3:  mov [edi], eax
    add eax, 0x200000
    add edi, 8
    dec ecx
    jnz 3b
    mov eax, cr4
    or eax, 0x20                // PAE
    mov cr4, eax
    mov eax, offset guest_pml4
    mov cr3, eax
    mov ecx, 0xc0000080         // EFER
    rdmsr
    or eax, 0x900               // LME, NXE
    wrmsr
    mov eax, cr0
    and eax, 0x9fffffff         // caches on
    or eax, 0x80010021          // PG, WP, NE, PE
    mov cr0, eax
    lgdt [guest_gdt_pointer]
    .byte 0xea                  // jmp 8:guest_entry64
    .long guest_entry64
    .word 8
.code64
guest_entry64:
    mov eax, 16
    mov ds, eax
    mov es, eax
    mov ss, eax
    xor eax, eax
    mov fs, eax
    mov gs, eax
    lea rsp, [guest_stack_top]
    xor ebp, ebp
    mov edi, esi
    call guest_start
    ud2

// One 16-byte stub for each vector, as the CPU pushes an error code for some of them only.
.balign 16
.globl guest_vectors
guest_vectors:
.set vector, 0
.rept 256
.balign 16
.if (vector == 8) || ((vector >= 10) && (vector <= 14)) || (vector == 17) || (vector == 21) || (vector == 29) || (vector == 30)
.else
    push 0
.endif
    push vector
    jmp guest_interrupt
.set vector, vector + 1
.endr
guest_interrupt:
    push rax
    push rbx
    push rcx
    push rdx
    push rsi
    push rdi
    push rbp
    push r8
    push r9
    push r10
    push r11
    push r12
    push r13
    push r14
    push r15
    cld
    mov rdi, rsp
    call guest_dispatch
    pop r15
    pop r14
    pop r13
    pop r12
    pop r11
    pop r10
    pop r9
    pop r8
    pop rbp
    pop rdi
    pop rsi
    pop rdx
    pop rcx
    pop rbx
    pop rax
    add rsp, 16
    iretq

.section .data.guest, "aw", @progbits
.balign 8
.globl guest_gdt
guest_gdt:
    .quad 0
    .quad 0x00af9b000000ffff    // 08: 64-bit code
    .quad 0x00cf93000000ffff    // 10: data
    .quad 0x00cf9b000000ffff    // 18: 32-bit code
    .quad 0x00cff3000000ffff    // 20: data, ring 3
    .quad 0x00affb000000ffff    // 28: 64-bit code, ring 3
    .quad 0x00009b000000ffff    // 30: 16-bit code for real mode
    .quad 0x000093000000ffff    // 38: 16-bit data for real mode
    .quad 0x00cf13000000ffff    // 40: data, not present
    .skip 16 * 64               // 48: a TSS for each CPU
.globl guest_gdt_end
guest_gdt_end:
.globl guest_gdt_pointer
guest_gdt_pointer:
    .word guest_gdt_end - guest_gdt - 1
    .quad guest_gdt

.section .bss.guest, "aw", @nobits
.balign 4096
.globl guest_pml4
guest_pml4: .skip 4096
guest_pdpt: .skip 4096
guest_pd: .skip 16384
guest_stack: .skip 65536
.globl guest_stack_top
guest_stack_top:
