//! The hand-off: build the kernel's address space, write its `BootInfo`, jump.

use crate::paging::{Access, PAGE_1G, PAGE_2M, Tables};
use crate::{Cpu, DIRECT_MAP, Error, Frames, PAGE, STACK_BOTTOM, STACK_SIZE, kernel, memory_map};
use bootloader_api::BootInfo;
use bootloader_api::info::{FrameBuffer, FrameBufferInfo, MemoryRegion, Optional};
use core::mem::{align_of, size_of};

/// Pages for the `BootInfo` and, behind it, its memory regions.
const INFO_PAGES: u64 = 10;
/// Where the regions begin.
const REGIONS_AT: u64 = 512;
/// How many regions fit.
const MAX_REGIONS: usize = (INFO_PAGES * PAGE - REGIONS_AT) as usize / size_of::<MemoryRegion>();

const _: () = assert!(size_of::<BootInfo>() <= REGIONS_AT as usize);
const _: () = assert!(align_of::<BootInfo>() <= PAGE as usize);
const _: () = assert!((REGIONS_AT as usize).is_multiple_of(align_of::<MemoryRegion>()));

const GIB_4: u64 = 4 << 30;

/// A linear framebuffer that the firmware left.
#[derive(Clone, Copy, Debug)]
pub struct Screen {
    /// Physical address of its first byte.
    pub address: u64,
    /// Its layout.
    pub info: FrameBufferInfo,
}

impl Screen {
    /// Firmware that describes a screen larger than its memory gets none.
    fn is_sane(&self, limit: u64) -> bool {
        let info = &self.info;
        let needed = info
            .stride
            .checked_mul(info.bytes_per_pixel)
            .and_then(|line| line.checked_mul(info.height));
        let end = self.address.checked_add(info.byte_len as u64);
        needed.is_some_and(|needed| needed > 0 && needed <= info.byte_len)
            && info.width <= info.stride
            && self.address != 0
            && end.is_some_and(|end| end <= limit)
    }
}

/// The kernel in memory and its address space, all but the `BootInfo`.
#[derive(Debug)]
pub struct Prepared {
    root: u64,
    kernel: kernel::Image,
    /// Physical address of the frames for `BootInfo`.
    info: u64,
    screen: Option<Screen>,
    physical_limit: u64,
}

/// Loads the kernel's ELF file `kernel` and builds the final page tables.
///
/// `memory` is the memory map as it is now: only its highest address counts
/// here.
///
/// # Errors
/// When the kernel's file is not what it must be, or memory runs out.
pub fn prepare(
    frames: &mut dyn Frames,
    cpu: Cpu,
    kernel: &[u8],
    memory: impl Iterator<Item = MemoryRegion>,
    screen: Option<Screen>,
) -> Result<Prepared, Error> {
    let mut tables = Tables::new(frames)?;
    let kernel = kernel::load(kernel, &mut tables, frames)?;

    let stack = frames.allocate(STACK_SIZE / PAGE, "the stack")?;
    tables.map(frames, STACK_BOTTOM, stack, STACK_SIZE, PAGE, Access::Write)?;

    // The first 2 MiB in small pages, the rest below 4 GiB in 2 MiB pages, and
    // only then larger ones: a large page must not span memory types (Intel
    // SDM Vol. 3A §12.11.9), and devices lie below 4 GiB.
    let largest = if cpu.gib_pages { PAGE_1G } else { PAGE_2M };
    let top = memory_map::top_of_ram(memory, cpu.physical_limit)
        .next_multiple_of(PAGE_2M)
        .max(GIB_4);
    let mut from = 0;
    for (to, size) in [(PAGE_2M, PAGE), (GIB_4, PAGE_2M), (top, largest)] {
        tables.map(
            frames,
            DIRECT_MAP + from,
            from,
            to - from,
            size,
            Access::Write,
        )?;
        from = to;
    }
    let screen = screen.filter(|screen| screen.is_sane(cpu.physical_limit));
    if let Some(screen) = screen {
        let from = (screen.address & !(PAGE_2M - 1)).max(top);
        let to = (screen.address + screen.info.byte_len as u64).next_multiple_of(PAGE_2M);
        if from < to {
            tables.map(
                frames,
                DIRECT_MAP + from,
                from,
                to - from,
                PAGE_2M,
                Access::Write,
            )?;
        }
    }

    let page = jump_address() & !(PAGE - 1);
    tables.map(frames, page, page, PAGE, PAGE, Access::Execute)?;
    Ok(Prepared {
        root: tables.root,
        kernel,
        info: frames.allocate(INFO_PAGES, "the boot information")?,
        screen,
        physical_limit: cpu.physical_limit,
    })
}

impl Prepared {
    /// Writes the `BootInfo`. `memory` is the final memory map, with all that
    /// [`Frames::allocate`] gave as `Bootloader`; `rsdp` the physical address
    /// of the ACPI root pointer; `bundle` physical address and length.
    ///
    /// # Errors
    /// When the memory map has no usable memory, or too many pieces.
    pub fn finish(
        self,
        frames: &mut dyn Frames,
        memory: impl Iterator<Item = MemoryRegion> + Clone,
        rsdp: Option<u64>,
        bundle: (u64, u64),
    ) -> Result<HandOff, Error> {
        let bytes = frames.bytes(self.info, (INFO_PAGES * PAGE) as usize);
        let (info, regions) = bytes.split_at_mut(REGIONS_AT as usize);
        // SAFETY: the bytes are ours alone, zeroed or plain data, long enough
        // for MAX_REGIONS, and aligned by the assertions above; a zeroed
        // `MemoryRegion` is a valid one (kind 0 is `Usable`).
        let regions = unsafe {
            core::slice::from_raw_parts_mut(
                regions.as_mut_ptr().cast::<MemoryRegion>(),
                MAX_REGIONS,
            )
        };
        let count = memory_map::normalise(memory, self.physical_limit, regions)?;

        // SAFETY: this is the address of the same regions in the kernel's
        // address space, in the direct map. Nobody follows it before the jump.
        let regions: &'static mut [MemoryRegion] = unsafe {
            let address = DIRECT_MAP + self.info + REGIONS_AT;
            core::slice::from_raw_parts_mut(address as *mut MemoryRegion, count)
        };
        let mut boot_info = BootInfo::new(regions.into());
        boot_info.framebuffer = match self.screen {
            // SAFETY: `prepare` mapped the whole framebuffer there, and the
            // kernel is its only user.
            Some(screen) => Optional::Some(unsafe {
                FrameBuffer::new(DIRECT_MAP + screen.address, screen.info)
            }),
            None => Optional::None,
        };
        boot_info.physical_memory_offset = Optional::Some(DIRECT_MAP);
        boot_info.rsdp_addr = rsdp.into();
        let (bundle, bundle_len) = bundle;
        boot_info.ramdisk_addr = Optional::Some(DIRECT_MAP + bundle);
        boot_info.ramdisk_len = bundle_len;
        boot_info.kernel_addr = self.kernel.phys;
        boot_info.kernel_len = self.kernel.len;
        boot_info.kernel_image_offset = self.kernel.virt;
        boot_info.kernel_stack_bottom = STACK_BOTTOM;
        boot_info.kernel_stack_len = STACK_SIZE;
        // SAFETY: REGIONS_AT bytes at the start of a page: large enough and
        // aligned by the assertions above.
        unsafe { info.as_mut_ptr().cast::<BootInfo>().write(boot_info) };
        Ok(HandOff {
            root: self.root,
            entry: self.kernel.entry,
            boot_info: DIRECT_MAP + self.info,
        })
    }
}

/// All that the jump needs.
#[derive(Debug)]
pub struct HandOff {
    root: u64,
    entry: u64,
    boot_info: u64,
}

impl HandOff {
    /// Jumps to the kernel.
    ///
    /// # Safety
    /// In ring 0 and long mode, with this image and the frames of the
    /// [`Prepared`] identity mapped, and nothing else using the machine any
    /// more: boot services left, other processors at rest.
    pub unsafe fn enter(self) -> ! {
        // SAFETY: the caller's; the tables hold the jump's own page.
        unsafe {
            tessera_boot_jump(
                self.boot_info,
                self.root,
                self.entry,
                STACK_BOTTOM + STACK_SIZE,
            )
        }
    }
}

fn jump_address() -> u64 {
    tessera_boot_jump as *const () as u64
}

unsafe extern "sysv64" {
    fn tessera_boot_jump(boot_info: u64, root: u64, entry: u64, stack: u64) -> !;
}

// Its page is the only one that both address spaces have, so it must not cross
// into the next (128 bytes of alignment, fewer of code). CR4 gets only what
// long mode and SSE need: above all no PGE, so that no translation of the
// firmware survives. Null selectors, because the firmware's GDT is gone after
// CR3. The zero is the return address that a SysV function may expect: the
// stack is off 16 by 8 as after a call.
core::arch::global_asm!(
    ".text",
    ".balign 128",
    ".global tessera_boot_jump",
    "tessera_boot_jump:",
    "cli",
    "cld",
    "mov r8, rcx",
    "mov r9, rdx",
    "mov ecx, 0xc0000080", // EFER.NXE
    "rdmsr",
    "or eax, 0x800",
    "wrmsr",
    "mov rax, cr0", // clear CD, NW, EM, TS; set WP, NE, MP
    "and eax, 0x9ffffff3",
    "or eax, 0x00010022",
    "mov cr0, rax",
    "mov eax, 0x620", // PAE, OSFXSR, OSXMMEXCPT
    "mov cr4, rax",
    "mov cr3, rsi",
    "mov rsp, r8",
    "xor eax, eax",
    "mov ds, eax",
    "mov es, eax",
    "mov fs, eax",
    "mov gs, eax",
    "mov ss, eax",
    "xor ebp, ebp",
    "push rax",
    "jmp r9",
);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{KERNEL_BASE, STACK_GUARD};
    use bootloader_api::info::{MemoryRegionKind, PixelFormat};
    use std::vec;
    use std::vec::Vec;

    /// RAM at 16 MiB, taken frame by frame.
    struct Ram {
        bytes: Vec<u8>,
        taken: u64,
    }

    const RAM_AT: u64 = 16 << 20;

    impl Ram {
        fn new(mib: usize) -> Self {
            // Page aligned, because `BootInfo` is written in place.
            Self {
                bytes: vec![0; (mib << 20) + PAGE as usize],
                taken: 0,
            }
        }
    }

    impl Frames for Ram {
        fn allocate(&mut self, pages: u64, what: &'static str) -> Result<u64, Error> {
            let bytes = pages * PAGE;
            let at = self.taken;
            if at + bytes + PAGE > self.bytes.len() as u64 {
                return Err(Error::OutOfMemory { what, bytes });
            }
            self.taken += bytes;
            Ok(RAM_AT + at)
        }

        fn bytes(&mut self, address: u64, len: usize) -> &mut [u8] {
            let skip = self.bytes.as_ptr().align_offset(PAGE as usize);
            let at = skip + (address - RAM_AT) as usize;
            &mut self.bytes[at..at + len]
        }
    }

    const CPU: Cpu = Cpu {
        gib_pages: true,
        physical_limit: 1 << 40,
    };
    const R: u32 = 4;
    const W: u32 = 2;
    const X: u32 = 1;

    /// An ELF file with these segments (flags, address, data, bytes in
    /// memory), entry at the first one's start.
    fn elf(segments: &[(u32, u64, &[u8], u64)]) -> Vec<u8> {
        let mut file = Vec::new();
        file.extend(b"\x7fELF\x02\x01\x01");
        file.resize(16, 0);
        file.extend(2u16.to_le_bytes());
        file.extend(62u16.to_le_bytes());
        file.extend(1u32.to_le_bytes());
        for word in [segments[0].1, 64, 0] {
            file.extend(word.to_le_bytes());
        }
        file.extend(0u32.to_le_bytes());
        for half in [64u16, 56, segments.len() as u16, 64, 0, 0] {
            file.extend(half.to_le_bytes());
        }
        let mut offset = 0x1000u64;
        for (flags, address, data, len) in segments {
            file.extend(1u32.to_le_bytes());
            file.extend(flags.to_le_bytes());
            for word in [offset, *address, *address, data.len() as u64, *len, 0x1000] {
                file.extend(word.to_le_bytes());
            }
            offset += (data.len() as u64).next_multiple_of(PAGE);
        }
        for (_, _, data, _) in segments {
            file.resize(file.len().next_multiple_of(PAGE as usize), 0);
            file.extend(*data);
        }
        file
    }

    fn good_kernel() -> Vec<u8> {
        elf(&[
            (R | X, KERNEL_BASE, b"code", 4),
            (R, KERNEL_BASE + 0x1000, b"constants", 9),
            (R | W, KERNEL_BASE + 0x2000, b"data", 0x2345),
        ])
    }

    fn usable(start: u64, end: u64) -> MemoryRegion {
        MemoryRegion {
            start,
            end,
            kind: MemoryRegionKind::Usable,
        }
    }

    fn prepared(
        kernel: &[u8],
        memory: &[MemoryRegion],
        screen: Option<Screen>,
    ) -> (Ram, Result<Prepared, Error>) {
        let mut ram = Ram::new(2);
        let result = prepare(&mut ram, CPU, kernel, memory.iter().copied(), screen);
        (ram, result)
    }

    #[test]
    fn the_address_space_is_as_promised() {
        let memory = [usable(0, 3 << 30), usable(4 << 30, (9 << 30) + 0x5000)];
        let (mut ram, prepared) = prepared(&good_kernel(), &memory, None);
        let prepared = prepared.unwrap();
        let tables = Tables {
            root: prepared.root,
        };
        let phys = prepared.kernel.phys;
        let top = (9 << 30) + PAGE_2M;
        for (virt, want) in [
            (KERNEL_BASE, Some((phys, Access::Execute, PAGE))),
            (
                KERNEL_BASE + 0x1004,
                Some((phys + 0x1004, Access::Read, PAGE)),
            ),
            (
                KERNEL_BASE + 0x2000,
                Some((phys + 0x2000, Access::Write, PAGE)),
            ),
            (
                KERNEL_BASE + 0x4344,
                Some((phys + 0x4344, Access::Write, PAGE)),
            ),
            (KERNEL_BASE + 0x5000, None),
            (KERNEL_BASE - 1, None),
            (STACK_GUARD - 1, None),
            (STACK_GUARD, None),
            (STACK_BOTTOM - 1, None),
            (STACK_BOTTOM + STACK_SIZE, None),
            (DIRECT_MAP - 1, None),
            (DIRECT_MAP + 0xb8123, Some((0xb8123, Access::Write, PAGE))),
            (
                DIRECT_MAP + PAGE_2M,
                Some((PAGE_2M, Access::Write, PAGE_2M)),
            ),
            (
                DIRECT_MAP + 0xfee0_0030,
                Some((0xfee0_0030, Access::Write, PAGE_2M)),
            ),
            (
                DIRECT_MAP + (5 << 30) + 7,
                Some(((5 << 30) + 7, Access::Write, PAGE_1G)),
            ),
            (
                DIRECT_MAP + top - 1,
                Some((top - 1, Access::Write, PAGE_2M)),
            ),
            (DIRECT_MAP + top, None),
            (0, None),
        ] {
            assert_eq!(tables.walk(&mut ram, virt), want, "{virt:#x}");
        }
        let (_, access, _) = tables.walk(&mut ram, STACK_BOTTOM).unwrap();
        assert_eq!(access, Access::Write);
        let jump = jump_address();
        assert_eq!(
            tables.walk(&mut ram, jump),
            Some((jump, Access::Execute, PAGE))
        );
        assert_eq!(ram.bytes(phys + 0x1000, 9), b"constants");
        assert_eq!(ram.bytes(phys + 0x2000, 6), b"data\0\0");
    }

    #[test]
    fn boot_info_says_what_is_there() {
        let memory = [usable(0x10_0000, 1 << 30)];
        let screen = Screen {
            address: 0x80_0000_0000,
            info: FrameBufferInfo {
                byte_len: 1024 * 768 * 4,
                width: 1000,
                height: 768,
                pixel_format: PixelFormat::Bgr,
                bytes_per_pixel: 4,
                stride: 1024,
            },
        };
        let (mut ram, prepared) = prepared(&good_kernel(), &memory, Some(screen));
        let prepared = prepared.unwrap();
        let info_at = prepared.info;
        let tables = Tables {
            root: prepared.root,
        };
        let taken = MemoryRegion {
            start: RAM_AT,
            end: RAM_AT + ram.taken,
            kind: MemoryRegionKind::Bootloader,
        };
        let hand_off = prepared
            .finish(
                &mut ram,
                memory.into_iter().chain([taken]),
                Some(0xf_5a00),
                (0x200_0000, 777),
            )
            .unwrap();
        assert_eq!(hand_off.boot_info, DIRECT_MAP + info_at);
        assert_eq!(hand_off.entry, KERNEL_BASE);
        let pointer = ram.bytes(info_at, 512).as_ptr().cast::<BootInfo>();
        // SAFETY: `finish` wrote it there, aligned.
        let info = unsafe { &*pointer };
        assert_eq!(info.rsdp_addr, Optional::Some(0xf_5a00));
        assert_eq!(info.ramdisk_addr, Optional::Some(DIRECT_MAP + 0x200_0000));
        assert_eq!(info.ramdisk_len, 777);
        assert_eq!(info.physical_memory_offset, Optional::Some(DIRECT_MAP));
        assert_eq!(info.kernel_image_offset, KERNEL_BASE);
        assert!(info.framebuffer.as_ref().is_some());
        let end = screen.address + screen.info.byte_len as u64 - 1;
        let at = |ram: &mut Ram, address| tables.walk(ram, DIRECT_MAP + address).map(|w| w.0);
        assert_eq!(at(&mut ram, screen.address), Some(screen.address));
        assert_eq!(at(&mut ram, end), Some(end));
        let regions = ram
            .bytes(info_at + REGIONS_AT, 72)
            .as_ptr()
            .cast::<[MemoryRegion; 3]>();
        // SAFETY: as above.
        let regions = unsafe { *regions };
        assert_eq!(
            regions,
            [
                usable(0x10_0000, taken.start),
                taken,
                usable(taken.end, 1 << 30)
            ]
        );
    }

    #[test]
    fn a_screen_that_cannot_be_is_none() {
        let info = FrameBufferInfo {
            byte_len: 640 * 480 * 4,
            width: 640,
            height: 480,
            pixel_format: PixelFormat::Rgb,
            bytes_per_pixel: 4,
            stride: 640,
        };
        let good = Screen {
            address: 0xe000_0000,
            info,
        };
        let with = |change: fn(&mut Screen)| {
            let mut screen = good;
            change(&mut screen);
            screen.is_sane(1 << 40)
        };
        assert!(with(|_| {}));
        assert!(!with(|s| s.address = 0));
        assert!(!with(|s| s.address = u64::MAX - 5));
        assert!(!with(|s| s.address = (1 << 40) - 5));
        assert!(!with(|s| s.info.height = 481));
        assert!(!with(|s| s.info.height = 0));
        assert!(!with(|s| s.info.stride = usize::MAX));
        assert!(!with(|s| s.info.width = 641));
    }

    #[test]
    fn bad_kernels_are_named() {
        let memory = [usable(0, 1 << 30)];
        let text = |kernel: &[u8]| {
            let (_, result) = prepared(kernel, &memory, None);
            std::format!("{}", result.unwrap_err())
        };
        let patched = |at: usize, bytes: &[u8]| {
            let mut file = good_kernel();
            file[at..at + bytes.len()].copy_from_slice(bytes);
            text(&file)
        };
        let one = |flags, address, len| text(&elf(&[(flags, address, b"code", len)]));
        for (message, want) in [
            (text(b""), "(0 bytes) is damaged or cut off"),
            (
                text(b"#!/bin/sh\nexit 0\nexit 0\nexit 0\nexit 0"),
                "no ELF file",
            ),
            (text(&good_kernel()[..0x1002]), "beyond the end"),
            (text(&good_kernel()[..100]), "beyond its end"),
            (patched(4, &[1]), "damaged"),
            (patched(5, &[2]), "damaged"),
            (patched(7, &[9]), "OS ABI is 0x9"),
            (patched(16, &[3]), "e_type is 0x3, must be 2"),
            (patched(18, &[183]), "e_machine is 0xb7, must be 62"),
            (patched(24, &[0; 8]), "e_entry is 0x0"),
            (patched(64, &[3]), "asks for a dynamic linker"),
            (patched(64, &[7]), "thread-local"),
            (patched(64 + 48, &[3]), "alignment"),
            (one(W | X, KERNEL_BASE, 4), "both writable and executable"),
            (one(X, 0x10_0000, 4), "lies below 0xffffffff80000000"),
            (one(X, KERNEL_BASE + 8, 4), "does not begin on a page"),
            (one(X, KERNEL_BASE, 3), "larger in the file"),
            (one(X, KERNEL_BASE, u64::MAX), "wraps around"),
            (one(X, KERNEL_BASE, 65 << 20), "size in memory is 0x4100000"),
            (
                one(X, KERNEL_BASE, 16 << 20),
                "bytes of free contiguous memory for the kernel",
            ),
            (
                one(R, KERNEL_BASE, 4),
                "an address in an executable segment",
            ),
            (
                text(&elf(&[
                    (X, KERNEL_BASE, b"code", 0x1001),
                    (R, KERNEL_BASE + 0x1000, b"data", 4),
                ])),
                "segment 1 at 0xffffffff80001000 overlaps another one",
            ),
        ] {
            assert!(message.contains(want), "{message:?} lacks {want:?}");
        }
    }
}
