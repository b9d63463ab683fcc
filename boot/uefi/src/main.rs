//! The UEFI loader, `/EFI/BOOT/BOOTX64.EFI` on the stick (UEFI 2.10 §3.5).
//!
//! It reads `/tessera/kernel` and `/tessera/bundle` from the volume it was
//! itself started from, notes the framebuffer and the ACPI root pointer, lets
//! `tessera-boot` load and map, leaves boot services, and jumps. What it
//! allocates is `LoaderData`, which is how the final memory map says
//! `Bootloader` of it without any list of our own.
#![no_std]
#![no_main]

use bootloader_api::info::{FrameBufferInfo, MemoryRegion, MemoryRegionKind, PixelFormat};
use core::fmt::{self, Write};
use core::time::Duration;
use tessera_boot::{Cpu, Frames, HandOff, Screen, Serial};
use uefi::boot::{AllocateType, MemoryType, OpenProtocolAttributes, OpenProtocolParams};
use uefi::mem::memory_map::{MemoryMap, MemoryMapOwned};
use uefi::proto::console::gop::{self, GraphicsOutput};
use uefi::proto::media::file::{Directory, File, FileAttribute, FileInfo, FileMode};
use uefi::table::cfg::ConfigTableEntry;
use uefi::{CStr16, prelude::*};

/// How long an error stays on the screen before the firmware goes on.
const READING_TIME: Duration = Duration::from_secs(20);

/// What can go wrong here, before or beside [`tessera_boot::Error`].
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Boot(#[from] tessera_boot::Error),
    #[error(
        "cannot open the volume this loader was started from ({0}); start it from the image that `cargo xtask image` builds"
    )]
    Volume(Status),
    #[error(
        "{0} is missing on the boot volume ({1}); build the image again with `cargo xtask image`"
    )]
    Missing(&'static str, Status),
    #[error("{0} is empty; build the image again with `cargo xtask image`")]
    Empty(&'static str),
    #[error("{path}: read {got} of {want} bytes ({status}); the medium is damaged: write it again")]
    Read {
        path: &'static str,
        got: usize,
        want: u64,
        status: Status,
    },
    #[error("the firmware gives no memory map ({0}); update the firmware")]
    MemoryMap(Status),
}

#[entry]
fn main() -> Status {
    match load() {
        // SAFETY: boot services were left in `load`, firmware runs other
        // processors only during boot services, and UEFI for x86-64 runs with
        // all memory identity mapped (UEFI 2.10 §2.3.4).
        Ok(hand_off) => unsafe { hand_off.enter() },
        Err(error) => {
            report(format_args!("{error}"));
            boot::stall(READING_TIME);
            Status::LOAD_ERROR
        }
    }
}

/// Everything up to the jump. Returns an error only while boot services live:
/// what fails after that is told on the serial port, and the machine stops.
fn load() -> Result<HandOff, Error> {
    let cpu = Cpu::probe()?;
    let mut frames = Firmware;
    let mut volume = volume().map_err(|error| Error::Volume(error.status()))?;
    let (kernel, kernel_len) = read(&mut volume, "/tessera/kernel", cstr16!("\\tessera\\kernel"))?;
    let bundle = read(&mut volume, "/tessera/bundle", cstr16!("\\tessera\\bundle"))?;
    let screen = screen();
    let rsdp = rsdp();
    let map = boot::memory_map(MemoryType::LOADER_DATA)
        .map_err(|error| Error::MemoryMap(error.status()))?;
    // SAFETY: `read` allocated these bytes and nobody else knows of them; the
    // loader's own allocations do not overlap.
    let kernel = unsafe { core::slice::from_raw_parts(kernel as *const u8, kernel_len as usize) };
    let prepared = tessera_boot::prepare(&mut frames, cpu, kernel, regions(&map), screen)?;
    drop(map);
    drop(volume);

    // SAFETY: no protocol and no pointer into boot services is used below.
    let map = unsafe { boot::exit_boot_services(Some(MemoryType::LOADER_DATA)) };
    match prepared.finish(&mut frames, regions(&map), rsdp, bundle) {
        Ok(hand_off) => {
            // The map is the kernel's to forget: there is nothing to free it to.
            core::mem::forget(map);
            Ok(hand_off)
        }
        Err(error) => {
            say(&mut Serial::new(), format_args!("{error}"));
            stop()
        }
    }
}

/// Frames from the firmware, identity mapped like everything.
struct Firmware;

impl Frames for Firmware {
    fn allocate(&mut self, pages: u64, what: &'static str) -> Result<u64, tessera_boot::Error> {
        let bytes = pages.saturating_mul(tessera_boot::PAGE);
        let address = boot::allocate_pages(
            AllocateType::AnyPages,
            MemoryType::LOADER_DATA,
            pages as usize,
        )
        .map_err(|_| tessera_boot::Error::OutOfMemory { what, bytes })?;
        // SAFETY: the firmware just gave us these pages.
        unsafe { address.write_bytes(0, bytes as usize) };
        Ok(address.as_ptr() as u64)
    }

    fn bytes(&mut self, address: u64, len: usize) -> &mut [u8] {
        // SAFETY: only called for frames of `allocate`, which are ours for
        // good, and the borrow of `self` makes it one slice at a time.
        unsafe { core::slice::from_raw_parts_mut(address as *mut u8, len) }
    }
}

fn volume() -> uefi::Result<Directory> {
    boot::get_image_file_system(boot::image_handle())?.open_volume()
}

/// Reads a whole file into pages of its own: address and length. `path` is
/// how people write `uefi_path`.
fn read(
    volume: &mut Directory,
    path: &'static str,
    uefi_path: &CStr16,
) -> Result<(u64, u64), Error> {
    let missing = |status| Error::Missing(path, status);
    let mut file = volume
        .open(uefi_path, FileMode::Read, FileAttribute::empty())
        .map_err(|error| missing(error.status()))?
        .into_regular_file()
        .ok_or(missing(Status::NOT_FOUND))?;
    // The fixed part is 80 bytes, the name at most 255 UCS-2 characters.
    #[repr(align(8))]
    struct Buffer([u8; 80 + 2 * 256]);
    let mut buffer = Buffer([0; 80 + 2 * 256]);
    let want = file
        .get_info::<FileInfo>(&mut buffer.0)
        .map_err(|error| missing(error.status()))?
        .file_size();
    if want == 0 {
        return Err(Error::Empty(path));
    }
    let address = Firmware.allocate(
        want.div_ceil(tessera_boot::PAGE),
        "a file of the boot volume",
    )?;
    let mut firmware = Firmware;
    let bytes = firmware.bytes(address, want as usize);
    let (got, status) = match file.read(bytes) {
        Ok(got) => (got, Status::SUCCESS),
        Err(error) => (0, error.status()),
    };
    if got as u64 != want {
        return Err(Error::Read {
            path,
            got,
            want,
            status,
        });
    }
    Ok((address, want))
}

/// The framebuffer of the first graphics output that has one.
fn screen() -> Option<Screen> {
    let handle = boot::get_handle_for_protocol::<GraphicsOutput>().ok()?;
    // SAFETY: not exclusive, so that the firmware's console stays on the
    // screen for our errors; the protocol is only asked, and cannot go away
    // while no other program runs.
    let mut gop = unsafe {
        boot::open_protocol::<GraphicsOutput>(
            OpenProtocolParams {
                handle,
                agent: boot::image_handle(),
                controller: None,
            },
            OpenProtocolAttributes::GetProtocol,
        )
    }
    .ok()?;
    let mode = gop.current_mode_info();
    let pixel_format = match mode.pixel_format() {
        gop::PixelFormat::Rgb => PixelFormat::Rgb,
        gop::PixelFormat::Bgr => PixelFormat::Bgr,
        gop::PixelFormat::Bitmask => {
            let mask = mode.pixel_bitmask()?;
            PixelFormat::Unknown {
                red_position: mask.red.trailing_zeros() as u8,
                green_position: mask.green.trailing_zeros() as u8,
                blue_position: mask.blue.trailing_zeros() as u8,
            }
        }
        gop::PixelFormat::BltOnly => return None,
    };
    let (width, height) = mode.resolution();
    let mut buffer = gop.frame_buffer();
    Some(Screen {
        address: buffer.as_mut_ptr() as u64,
        info: FrameBufferInfo {
            byte_len: buffer.size(),
            width,
            height,
            pixel_format,
            bytes_per_pixel: 4,
            stride: mode.stride(),
        },
    })
}

/// The ACPI root pointer: of ACPI 2 and later if there is one, else of ACPI 1.
fn rsdp() -> Option<u64> {
    system::with_config_table(|tables| {
        [ConfigTableEntry::ACPI2_GUID, ConfigTableEntry::ACPI_GUID]
            .into_iter()
            .find_map(|guid| tables.iter().find(|table| table.guid == guid))
            .map(|table| table.address as u64)
    })
}

fn regions(map: &MemoryMapOwned) -> impl Iterator<Item = MemoryRegion> + Clone {
    map.entries().map(|entry| MemoryRegion {
        start: entry.phys_start,
        end: entry
            .phys_start
            .saturating_add(entry.page_count.saturating_mul(tessera_boot::PAGE)),
        kind: match entry.ty {
            MemoryType::CONVENTIONAL
            | MemoryType::BOOT_SERVICES_CODE
            | MemoryType::BOOT_SERVICES_DATA => MemoryRegionKind::Usable,
            MemoryType::LOADER_CODE | MemoryType::LOADER_DATA => MemoryRegionKind::Bootloader,
            other => MemoryRegionKind::UnknownUefi(other.0),
        },
    })
}

/// Tells a person, wherever they look.
fn report(message: fmt::Arguments<'_>) {
    system::with_stdout(|console| say(console, message));
    say(&mut Serial::new(), message);
}

fn say(console: &mut dyn Write, message: fmt::Arguments<'_>) {
    // A console that fails cannot be told of.
    let _ = writeln!(console, "\ntessera boot: {message}");
}

fn stop() -> ! {
    loop {
        // SAFETY: stopping the processor touches nothing.
        unsafe { core::arch::asm!("cli", "hlt", options(nomem, nostack)) };
    }
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    // Only the serial port: a panic may come from the console itself.
    say(
        &mut Serial::new(),
        format_args!("{info}; this is a fault of the loader"),
    );
    stop()
}
