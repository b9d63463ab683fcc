//! Stands in for the kernel in the boot tests: looks at everything the
//! hand-off promises, prints what it finds on the serial port, and ends with
//! `probe: ok` or with what is not as promised.
#![no_std]
#![no_main]

use bootloader_api::BootInfo;
use bootloader_api::info::{MemoryRegion, MemoryRegionKind, Optional};
use core::arch::asm;
use core::fmt::Write;
use core::sync::atomic::{AtomicU32, Ordering};
use tessera_boot::{DIRECT_MAP, KERNEL_BASE, PAGE, STACK_BOTTOM, STACK_GUARD, STACK_SIZE, Serial};

type Check = Result<(), &'static str>;

/// Lies in `.data`, as something that must have come from the file …
static LOADED: AtomicU32 = AtomicU32::new(0x7e55_e7a5);
/// … and in `.bss`, as something that must be zero.
static ZEROED: [AtomicU32; 4096] = [const { AtomicU32::new(0) }; 4096];

/// The entry: reached by a jump, with the stack as after a call.
#[unsafe(no_mangle)]
extern "sysv64" fn _start(info: &'static mut BootInfo) -> ! {
    let rsp: u64;
    // SAFETY: reads a register.
    unsafe { asm!("mov {}, rsp", out(reg) rsp, options(nomem, nostack, preserves_flags)) };
    let mut out = Serial::new();
    match check(info, rsp, &mut out) {
        Ok(()) => say(&mut out, format_args!("ok")),
        Err(what) => say(&mut out, format_args!("FAILED: {what}")),
    }
    halt()
}

fn check(info: &mut BootInfo, rsp: u64, out: &mut Serial) -> Check {
    registers(rsp)?;
    if LOADED.swap(0, Ordering::Relaxed) != 0x7e55_e7a5 {
        return Err(".data does not hold what the file holds");
    }
    if ZEROED
        .iter()
        .any(|word| word.swap(1, Ordering::Relaxed) != 0)
    {
        return Err(".bss is not zero");
    }
    if info.physical_memory_offset != Optional::Some(DIRECT_MAP) {
        return Err("physical_memory_offset is not the direct map's address");
    }
    regions(&info.memory_regions, out)?;
    bundle(info, out)?;
    rsdp(info, out)?;
    framebuffer(info, out)?;
    tables(info, out)
}

/// CR0.WP, EFER.NXE, interrupts off, the stack.
fn registers(rsp: u64) -> Check {
    let (cr0, flags, efer): (u64, u64, u32);
    // SAFETY: reads registers; 0xc0000080 is EFER, which long mode has.
    unsafe {
        asm!("mov {}, cr0", out(reg) cr0, options(nomem, nostack, preserves_flags));
        asm!("pushfq", "pop {}", out(reg) flags);
        asm!("rdmsr", in("ecx") 0xc000_0080u32, out("eax") efer, out("edx") _, options(nomem, nostack));
    }
    if cr0 & 1 << 16 == 0 {
        return Err("CR0.WP is off");
    }
    if efer & 1 << 11 == 0 {
        return Err("EFER.NXE is off");
    }
    if flags & 1 << 9 != 0 {
        return Err("interrupts are on");
    }
    if !(STACK_BOTTOM..STACK_BOTTOM + STACK_SIZE).contains(&rsp) {
        return Err("the stack is not where it should be");
    }
    Ok(())
}

fn regions(regions: &[MemoryRegion], out: &mut Serial) -> Check {
    let mut usable = 0;
    for region in regions {
        let MemoryRegion { start, end, kind } = *region;
        say(out, format_args!("{start:#012x}..{end:#012x} {kind:?}"));
        if start >= end || (start | end) % PAGE != 0 {
            return Err("a memory region is empty or not on pages");
        }
        if kind == MemoryRegionKind::Usable {
            usable += end - start;
        }
    }
    if regions.windows(2).any(|pair| pair[0].end > pair[1].start) {
        return Err("the memory regions overlap or are not sorted");
    }
    say(
        out,
        format_args!("usable: {} KiB in {} regions", usable / 1024, regions.len()),
    );
    if usable == 0 {
        return Err("no memory is usable");
    }
    // All of it must be there: first and last word of each usable region.
    for region in regions
        .iter()
        .filter(|r| r.kind == MemoryRegionKind::Usable)
    {
        for address in [region.start, region.end - 8] {
            let pointer = (DIRECT_MAP + address) as *mut u64;
            // SAFETY: usable memory belongs to nobody, and the direct map
            // holds all RAM; a lie about either is what this would find.
            let same = unsafe {
                pointer.write_volatile(address ^ 0x5a5a);
                pointer.read_volatile() == address ^ 0x5a5a
            };
            if !same {
                return Err("a usable region is no memory");
            }
        }
    }
    Ok(())
}

/// The bundle is whole: `MANIFEST` names each file's CRC and length.
fn bundle(info: &BootInfo, out: &mut Serial) -> Check {
    let Optional::Some(address) = info.ramdisk_addr else {
        return Err("there is no bundle");
    };
    is_bootloader(info, address - DIRECT_MAP, info.ramdisk_len)?;
    // SAFETY: the loader says so, and marks it as `Bootloader` (just checked).
    let bytes =
        unsafe { core::slice::from_raw_parts(address as *const u8, info.ramdisk_len as usize) };
    say(
        out,
        format_args!(
            "bundle: {} bytes, crc32 {:08x}",
            bytes.len(),
            crc32fast::hash(bytes)
        ),
    );
    let (name, manifest, mut rest) = file(bytes).ok_or("the bundle has no first file")?;
    if name != "MANIFEST" {
        return Err("the bundle's first file is not MANIFEST");
    }
    let manifest = core::str::from_utf8(manifest).map_err(|_| "MANIFEST is not text")?;
    for line in manifest.lines() {
        let mut words = line.splitn(3, ' ');
        let (Some(crc), Some(size), Some(name)) = (words.next(), words.next(), words.next()) else {
            return Err("a line of MANIFEST has no three words");
        };
        let (found, data, next) = file(rest).ok_or("the bundle lacks a file of MANIFEST")?;
        rest = next;
        let good = found == name
            && size.parse() == Ok(data.len())
            && u32::from_str_radix(crc, 16) == Ok(crc32fast::hash(data));
        say(
            out,
            format_args!("bundle: {line} {}", if good { "good" } else { "BAD" }),
        );
        if !good {
            return Err("a file of the bundle is not as MANIFEST says");
        }
    }
    Ok(())
}

/// The first file of a ustar archive: name, content, the archive behind it.
fn file(archive: &[u8]) -> Option<(&str, &[u8], &[u8])> {
    let (header, rest) = archive.split_at_checked(512)?;
    let text = |range: core::ops::Range<usize>| {
        let field = header
            .get(range)?
            .split(|&byte| byte == 0 || byte == b' ')
            .next()?;
        core::str::from_utf8(field).ok()
    };
    if text(257..262)? != "ustar" {
        return None;
    }
    let len = usize::from_str_radix(text(124..136)?, 8).ok()?;
    let data = rest.get(..len)?;
    Some((text(0..100)?, data, rest.get(len.next_multiple_of(512)..)?))
}

fn rsdp(info: &BootInfo, out: &mut Serial) -> Check {
    let Optional::Some(address) = info.rsdp_addr else {
        say(out, format_args!("rsdp: none"));
        return Ok(());
    };
    // SAFETY: the direct map holds the firmware's tables; 20 bytes are there
    // in every version, 36 if the revision says 2.
    let bytes = unsafe { core::slice::from_raw_parts((DIRECT_MAP + address) as *const u8, 20) };
    let sum = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    say(
        out,
        format_args!("rsdp: {address:#x}, revision {}", bytes[15]),
    );
    if !bytes.starts_with(b"RSD PTR ") || sum != 0 {
        return Err("the ACPI root pointer is none");
    }
    Ok(())
}

fn framebuffer(info: &mut BootInfo, out: &mut Serial) -> Check {
    let Optional::Some(screen) = &mut info.framebuffer else {
        say(out, format_args!("framebuffer: none"));
        return Ok(());
    };
    let layout = screen.info();
    let buffer = screen.buffer_mut();
    say(
        out,
        format_args!(
            "framebuffer: {:p}, {}x{}, stride {}, {} bytes a pixel, {:?}",
            buffer.as_ptr(),
            layout.width,
            layout.height,
            layout.stride,
            layout.bytes_per_pixel,
            layout.pixel_format
        ),
    );
    for pixel in [0, layout.stride * layout.height - 1] {
        let at = pixel * layout.bytes_per_pixel;
        let pixel = &mut buffer[at..at + 3];
        pixel.fill(0x5a);
        if pixel != [0x5a; 3] {
            return Err("the framebuffer does not keep what is written to it");
        }
    }
    Ok(())
}

/// Walks the page tables from CR3: nothing writable and executable, a guard
/// below the stack, in the lower half one page only, the kernel where it must
/// be, and the frames of all this marked as taken.
fn tables(info: &BootInfo, out: &mut Serial) -> Check {
    let root: u64;
    // SAFETY: reads a register.
    unsafe { asm!("mov {}, cr3", out(reg) root, options(nomem, nostack, preserves_flags)) };
    let mut walk = Walk {
        info,
        leaves: 0,
        lower: 0,
        kernel: 0,
        executable: 0,
        guard: true,
    };
    walk.table(root & !0xfff, 39, 0)?;
    say(
        out,
        format_args!(
            "tables: {} leaves, {} executable, {} of the kernel, {} in the lower half",
            walk.leaves, walk.executable, walk.kernel, walk.lower
        ),
    );
    let image_pages = info.kernel_len / PAGE;
    if !walk.guard {
        Err("the page below the stack is mapped")
    } else if walk.lower != 1 {
        Err("the lower half holds more than the page of the jump")
    } else if walk.kernel != image_pages {
        Err("the kernel's pages are not all mapped, or more than those")
    } else {
        Ok(())
    }
}

struct Walk<'a> {
    info: &'a BootInfo,
    leaves: u64,
    lower: u64,
    kernel: u64,
    executable: u64,
    guard: bool,
}

impl Walk<'_> {
    fn table(&mut self, address: u64, shift: u32, base: u64) -> Check {
        is_bootloader(self.info, address, PAGE)?;
        for index in 0..512 {
            // SAFETY: a page table of ours, seen through the direct map.
            let entry = unsafe { *((DIRECT_MAP + address + index * 8) as *const u64) };
            let mut virt = base | index << shift;
            if shift == 39 && index >= 256 {
                virt |= 0xffff << 48;
            }
            if entry & 1 == 0 {
                continue;
            }
            let target = entry & 0x000f_ffff_ffff_f000;
            if shift == 12 || entry & 1 << 7 != 0 {
                self.leaf(virt, 1 << shift, entry, target)?;
            } else {
                self.table(target, shift - 9, virt)?;
            }
        }
        Ok(())
    }

    fn leaf(&mut self, virt: u64, size: u64, entry: u64, target: u64) -> Check {
        let (writable, executable) = (entry & 2 != 0, entry >> 63 == 0);
        self.leaves += 1;
        self.executable += u64::from(executable);
        if writable && executable {
            return Err("a page is both writable and executable");
        }
        if entry & 4 != 0 {
            return Err("a page is open to user mode");
        }
        if virt <= STACK_GUARD && STACK_GUARD - virt < size {
            self.guard = false;
        }
        if virt < DIRECT_MAP {
            self.lower += 1;
            if virt != target || writable {
                return Err("the page of the jump is not identity mapped, or writable");
            }
        } else if virt >= KERNEL_BASE {
            self.kernel += 1;
            is_bootloader(self.info, target, PAGE)?;
        } else if virt < STACK_GUARD && (virt - DIRECT_MAP != target || executable) {
            return Err("the direct map is not direct, or executable");
        }
        Ok(())
    }
}

/// Whether the memory map shows this range as the loader's.
fn is_bootloader(info: &BootInfo, start: u64, len: u64) -> Check {
    info.memory_regions
        .iter()
        .any(|region| {
            region.kind == MemoryRegionKind::Bootloader
                && region.start <= start
                && start + len <= region.end
        })
        .then_some(())
        .ok_or("something the loader placed is not marked in the memory map")
}

fn say(out: &mut Serial, message: core::fmt::Arguments<'_>) {
    // The serial port never fails.
    let _ = writeln!(out, "probe: {message}");
}

fn halt() -> ! {
    loop {
        // SAFETY: stopping the processor touches nothing.
        unsafe { asm!("cli", "hlt", options(nomem, nostack)) };
    }
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    say(&mut Serial::new(), format_args!("FAILED: {info}"));
    halt()
}
