//! The multiboot2 entry, `/tessera/boot32` on the stick: how a BIOS machine
//! comes to Tessera, by GRUB (Multiboot2 Specification 2.0).
//!
//! The loader gives two modules: the kernel's ELF file and the bundle, in
//! this order. The assembly part (`entry.s`) goes to long mode with the first
//! 4 GiB identity mapped; all that multiboot2 hands over lies below that. This
//! part finds free memory around what is occupied (itself, the modules, the
//! information structure), and leaves the rest to `tessera-boot`.
#![no_std]
#![no_main]

mod frames;

use bootloader_api::info::{FrameBufferInfo, MemoryRegion, MemoryRegionKind, PixelFormat};
use core::fmt::{self, Write};
use core::ops::Range;
use frames::FreeMemory;
use multiboot2::{
    BootInformation, BootInformationHeader, FramebufferType, LoadError, MemoryAreaType, ModuleTag,
    RsdpV1Tag, RsdpV2Tag,
};
use multiboot2_common::MaybeDynSized;
use tessera_boot::{Cpu, Frames, HandOff, Screen, Serial};

core::arch::global_asm!(include_str!("entry.s"));

unsafe extern "C" {
    static tessera_stub_start: u8;
    static tessera_stub_end: u8;
}

/// The identity mapping that `entry.s` makes ends here.
const MAPPED: u64 = 4 << 30;

/// What can go wrong here, before or beside [`tessera_boot::Error`].
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Boot(#[from] tessera_boot::Error),
    #[error("the loader's multiboot2 information is damaged ({0:?}); use the GRUB of this image")]
    Information(LoadError),
    #[error("the loader gave no memory map; use the GRUB of this image")]
    NoMemoryMap,
    #[error(
        "{file} is missing or empty: it must be module {number} of the loader; build the image again with `cargo xtask image`"
    )]
    Module { number: usize, file: &'static str },
}

/// Called by `entry.s` with the address of the information structure.
#[unsafe(no_mangle)]
extern "C" fn tessera_multiboot2_main(information: u64) -> ! {
    match load(information) {
        // SAFETY: this is ring 0 and long mode with everything identity
        // mapped; the loader's other code ended when it jumped here, and no
        // other processor was ever started.
        Ok(hand_off) => unsafe { hand_off.enter() },
        Err(error) => stop(format_args!("{error}")),
    }
}

fn load(information: u64) -> Result<HandOff, Error> {
    let cpu = Cpu::probe()?;
    // SAFETY: the loader put the structure there, below 4 GiB (the register
    // has 32 bits), and nothing writes to it: `FreeMemory` spares it.
    let information = unsafe { BootInformation::load(information as *const BootInformationHeader) }
        .map_err(Error::Information)?;
    let kernel = module(&information, 1, "/tessera/kernel")?;
    let bundle = module(&information, 2, "/tessera/bundle")?;
    let screen = screen(&information);
    let areas = information.memory_map_tag().ok_or(Error::NoMemoryMap)?;
    let e820 = areas.memory_areas().iter().map(|area| MemoryRegion {
        start: area.start_address(),
        end: area.start_address().saturating_add(area.size()),
        kind: match area.typ() {
            MemoryAreaType::Available => MemoryRegionKind::Usable,
            other => MemoryRegionKind::UnknownBios(other.val()),
        },
    });
    let stub = &raw const tessera_stub_start as u64..&raw const tessera_stub_end as u64;
    let structure = information.start_address() as u64..information.end_address() as u64;
    let occupied = [&stub, &structure, &kernel, &bundle].map(occupied_by);
    let mut frames = FreeMemory::new(e820.clone(), occupied)?;

    let rsdp = root_pointer(&information, &mut frames)?;
    // SAFETY: the loader put the module there, and `FreeMemory` spares it.
    let file = unsafe {
        core::slice::from_raw_parts(
            kernel.start as *const u8,
            (kernel.end - kernel.start) as usize,
        )
    };
    let prepared = tessera_boot::prepare(&mut frames, cpu, file, e820.clone(), screen)?;

    // From here the kernel's file and the loader's structure are free memory
    // again: the structure itself only after the last use of `e820`.
    let occupied = [&stub, &bundle, &frames.taken()].map(occupied_by);
    let bundle = (bundle.start, bundle.end - bundle.start);
    Ok(prepared.finish(&mut frames, e820.chain(occupied), rsdp, bundle)?)
}

fn occupied_by(range: &Range<u64>) -> MemoryRegion {
    MemoryRegion {
        start: range.start,
        end: range.end,
        kind: MemoryRegionKind::Bootloader,
    }
}

fn module(
    information: &BootInformation<'_>,
    number: usize,
    file: &'static str,
) -> Result<Range<u64>, Error> {
    information
        .module_tags()
        .nth(number - 1)
        .map(|tag: &ModuleTag| tag.start_address().into()..tag.end_address().into())
        .filter(|range: &Range<u64>| range.start < range.end && range.start != 0)
        .ok_or(Error::Module { number, file })
}

/// Multiboot2 gives a copy of the ACPI root pointer, not its address: puts
/// it where the kernel finds it. That of ACPI 2 and later is preferred.
fn root_pointer(
    information: &BootInformation<'_>,
    frames: &mut FreeMemory,
) -> Result<Option<u64>, Error> {
    let copy = information
        .rsdp_v2_tag()
        .map(RsdpV2Tag::payload)
        .or_else(|| information.rsdp_v1_tag().map(RsdpV1Tag::payload));
    let Some(copy) = copy else { return Ok(None) };
    let address = frames.allocate(1, "the ACPI root pointer")?;
    frames.bytes(address, copy.len()).copy_from_slice(copy);
    Ok(Some(address))
}

/// A linear framebuffer of whole bytes a pixel; text and palettes are none.
fn screen(information: &BootInformation<'_>) -> Option<Screen> {
    let tag = information.framebuffer_tag()?.ok()?;
    let FramebufferType::RGB { red, green, blue } = tag.buffer_type().ok()? else {
        return None;
    };
    let bytes_per_pixel = usize::from(tag.bpp() / 8);
    let whole_bytes = tag.bpp() % 8 == 0
        && bytes_per_pixel >= 3
        && [&red, &green, &blue].iter().all(|field| field.size == 8);
    if !whole_bytes || !(tag.pitch() as usize).is_multiple_of(bytes_per_pixel) {
        return None;
    }
    Some(Screen {
        address: tag.address(),
        info: FrameBufferInfo {
            byte_len: tag.pitch() as usize * tag.height() as usize,
            width: tag.width() as usize,
            height: tag.height() as usize,
            pixel_format: match (red.position, green.position, blue.position) {
                (0, 8, 16) => PixelFormat::Rgb,
                (16, 8, 0) => PixelFormat::Bgr,
                (red_position, green_position, blue_position) => PixelFormat::Unknown {
                    red_position,
                    green_position,
                    blue_position,
                },
            },
            bytes_per_pixel,
            stride: tag.pitch() as usize / bytes_per_pixel,
        },
    })
}

/// The VGA text screen, 80 by 25 cells, from its top. In a graphics mode
/// nobody sees this, and it does no harm.
struct TextScreen {
    cell: usize,
}

impl Write for TextScreen {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        const WHITE_ON_RED: u16 = 0x4f00;
        let cells = 0xb8000 as *mut u16;
        for byte in text.bytes().filter(|byte| *byte >= b' ') {
            if self.cell < 80 * 25 {
                // SAFETY: the cell is one of the 2000, identity mapped; this
                // memory is the screen's and nobody else's.
                unsafe {
                    cells
                        .add(self.cell)
                        .write_volatile(WHITE_ON_RED | u16::from(byte))
                };
                self.cell += 1;
            }
        }
        Ok(())
    }
}

/// Tells a person, and stops the machine: there is nothing to return to.
fn stop(message: fmt::Arguments<'_>) -> ! {
    let (mut serial, mut screen) = (Serial::new(), TextScreen { cell: 0 });
    for out in [&mut serial as &mut dyn Write, &mut screen] {
        // Neither ever fails.
        let _ = writeln!(out, "\ntessera boot: {message}");
    }
    loop {
        // SAFETY: stopping the processor touches nothing.
        unsafe { core::arch::asm!("cli", "hlt", options(nomem, nostack)) };
    }
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    stop(format_args!(
        "{info}; the loader's multiboot2 information makes no sense"
    ))
}
