//! Linux bzImage, by the x86 boot protocol 2.06 and up (Documentation/arch/x86/boot.rst).
//!
//! The setup code (the real-mode part) is skipped, as the protocol allows: its header is copied
//! into a zero page made here, and the protected-mode kernel is entered at its 64-bit entry point
//! if it has one, otherwise at the 32-bit one.

use arch::GuestPhysAddr;

use super::{
    Boot, EntryState, LoadError, Problem,
    ram::{BELOW_4G, BOOT_AREA, Place, Ram},
    sniff::sniff,
};
use crate::{config::Kind, layout::Region};

/// Size of the zero page (`struct boot_params`).
const ZERO_PAGE: usize = 4096;
/// Sectors of the setup code are this large.
const SECTOR: u64 = 512;
/// Where a kernel that does not name a place goes, and the lowest place for any.
const ONE_MIB: u64 = 1 << 20;
/// Oldest protocol taken: the first with a command-line limit (Linux 2.6.22).
const OLDEST: u16 = 0x0206;

/// Offsets in the file and in the zero page alike, but for the first three.
mod field {
    pub const ACPI_RSDP: usize = 0x070;
    pub const E820_ENTRIES: usize = 0x1e8;
    pub const E820_TABLE: usize = 0x2d0;
    pub const SETUP_SECTS: usize = 0x1f1;
    pub const SYSSIZE: usize = 0x1f4;
    pub const JUMP_LENGTH: usize = 0x201;
    pub const MAGIC: usize = 0x202;
    pub const VERSION: usize = 0x206;
    pub const LOADER_TYPE: usize = 0x210;
    pub const LOADFLAGS: usize = 0x211;
    pub const CODE32_START: usize = 0x214;
    pub const RAMDISK_IMAGE: usize = 0x218;
    pub const RAMDISK_SIZE: usize = 0x21c;
    pub const CMD_LINE_PTR: usize = 0x228;
    pub const INITRD_ADDR_MAX: usize = 0x22c;
    pub const KERNEL_ALIGNMENT: usize = 0x230;
    pub const RELOCATABLE: usize = 0x234;
    pub const XLOADFLAGS: usize = 0x236;
    pub const CMDLINE_SIZE: usize = 0x238;
    pub const PREF_ADDRESS: usize = 0x258;
    pub const INIT_SIZE: usize = 0x260;
    /// The largest setup header there can be.
    pub const HEADER_END: usize = 0x290;
}

const MAGIC: &[u8] = b"HdrS";
/// `loadflags`: the protected-mode code belongs at 1 MiB, not at 64 KiB.
const LOADED_HIGH: u8 = 1 << 0;
/// `loadflags`: no early messages.
const CAN_USE_HEAP: u8 = 1 << 7;
/// `xloadflags`: there is a 64-bit entry point at 0x200.
const KERNEL_64: u16 = 1 << 0;
const ENTRY_64: u64 = 0x200;

/// Whether the file has a Linux setup header.
pub(super) fn has_magic(file: &[u8]) -> bool {
    file.get(field::MAGIC..field::MAGIC + 4) == Some(MAGIC)
}

/// What of the setup header decides how to load.
#[derive(Debug)]
struct Header {
    version: u16,
    relocatable: bool,
    alignment: u64,
    /// Where the kernel would like to be.
    preferred: u64,
    /// Bytes it needs from there on before it reads the memory map.
    init_size: u64,
    initrd_max: u64,
    cmdline_max: u64,
    entry_64: bool,
}

impl Header {
    /// Checks the header; gives it with the protected-mode code.
    fn parse(file: &[u8]) -> Result<(Self, &[u8]), Problem> {
        if !has_magic(file) {
            return Err(Problem::WrongKind {
                wanted: Kind::Linux,
                looks: sniff(file),
            });
        }
        let truncated = |what, end| Problem::Truncated {
            what,
            end,
            size: file.len() as u64,
        };
        let header = file
            .first_chunk::<{ field::HEADER_END }>()
            .ok_or(truncated("the setup header", field::HEADER_END as u64))?;
        let u16_at = |at| u16::from_le_bytes(bytes(header, at));
        let u32_at = |at| u64::from(u32::from_le_bytes(bytes(header, at)));
        let version = u16_at(field::VERSION);
        if version < OLDEST {
            let right = "boot protocol 2.06 or newer is needed (Linux 2.6.22)";
            let field = "the boot protocol version";
            return Err(Problem::Field {
                field,
                found: version.into(),
                right,
            });
        }
        if header[field::LOADFLAGS] & LOADED_HIGH == 0 {
            let right = "LOADED_HIGH must be set: this is a zImage, build a bzImage";
            let found = header[field::LOADFLAGS].into();
            return Err(Problem::Field {
                field: "loadflags",
                found,
                right,
            });
        }
        let sectors = match header[field::SETUP_SECTS] {
            0 => 4,
            n => u64::from(n),
        };
        let setup = (sectors + 1) * SECTOR;
        let size = u32_at(field::SYSSIZE) * 16;
        // The size is in paragraphs, and some builds do not pad the file to one.
        let (end, least) = (setup + size, setup + size.saturating_sub(15));
        let code = usize::try_from(setup).ok().and_then(|at| file.get(at..));
        let code = code.filter(|_| least <= file.len() as u64 && size != 0);
        let code = code.ok_or(truncated("the protected-mode kernel", end.max(setup + 1)))?;
        let code = code.get(..size as usize).unwrap_or(code);

        let alignment = u32_at(field::KERNEL_ALIGNMENT);
        let relocatable = header[field::RELOCATABLE] != 0;
        if relocatable && !alignment.is_power_of_two() {
            let right = "a power of two is needed";
            return Err(Problem::Field {
                field: "kernel_alignment",
                found: alignment,
                right,
            });
        }
        let (preferred, init_size) = if version >= 0x020a {
            (
                u64::from_le_bytes(bytes(header, field::PREF_ADDRESS)),
                u32_at(field::INIT_SIZE),
            )
        } else {
            (ONE_MIB, size)
        };
        if init_size < size && relocatable {
            let right = "it must not be smaller than the kernel";
            return Err(Problem::Field {
                field: "init_size",
                found: init_size,
                right,
            });
        }
        let header = Self {
            version,
            relocatable,
            alignment,
            preferred,
            init_size,
            initrd_max: u32_at(field::INITRD_ADDR_MAX),
            cmdline_max: u32_at(field::CMDLINE_SIZE),
            entry_64: version >= 0x020c && u16_at(field::XLOADFLAGS) & KERNEL_64 != 0,
        };
        Ok((header, code))
    }

    /// Claims the room that the kernel unpacks into; gives the address to load it at.
    fn place(&self, size: u64, ram: &mut Ram<'_, '_>) -> Result<u64, Problem> {
        const WHAT: &str = "the kernel with its working space";
        let preferred = self.preferred.max(ONE_MIB);
        if !self.relocatable {
            // Loaded at 1 MiB, it moves itself to where it was linked.
            let end = preferred.saturating_add(self.init_size).max(ONE_MIB + size);
            return ram.claim(WHAT, end - ONE_MIB, 1, Place::At(ONE_MIB));
        }
        let aligned = preferred.is_multiple_of(self.alignment) && preferred < 1 << 32;
        if aligned && ram.check(WHAT, preferred, self.init_size).is_ok() {
            return ram.claim(WHAT, self.init_size, 1, Place::At(preferred));
        }
        ram.claim(
            WHAT,
            self.init_size,
            self.alignment,
            Place::Lowest(ONE_MIB..1 << 32),
        )
    }
}

/// `N` bytes of the header; offsets are constants within it.
fn bytes<const N: usize>(header: &[u8; field::HEADER_END], at: usize) -> [u8; N] {
    let mut value = [0; N];
    value.copy_from_slice(&header[at..at + N]);
    value
}

pub(super) fn load<'i>(
    boot: &Boot<'_, 'i>,
    ram: &mut Ram<'_, 'i>,
    rsdp: GuestPhysAddr,
) -> Result<EntryState, LoadError> {
    let of_kernel = |problem: Problem| problem.of(&boot.kernel);
    let (header, code) = Header::parse(boot.kernel.data).map_err(of_kernel)?;
    let length = boot.cmdline.len() as u64;
    if length > header.cmdline_max {
        return Err(of_kernel(Problem::CommandLine {
            limit: header.cmdline_max,
            length,
        }));
    }
    let at = header.place(code.len() as u64, ram).map_err(of_kernel)?;
    ram.copy(at, &boot.kernel, code);

    let initrd = boot
        .initrd
        .filter(|image| !image.data.is_empty())
        .map(|image| {
            let within = BELOW_4G.start..header.initrd_max.saturating_add(1).min(BELOW_4G.end);
            let place = Place::Highest(within);
            let at = ram.put_image("the initrd", &image, place);
            at.map(|at| (at, image.data.len() as u64))
                .map_err(|problem| problem.of(&image))
        });
    let initrd = initrd.transpose()?.unwrap_or((0, 0));
    finish(boot, &header, at, initrd, ram, rsdp).map_err(of_kernel)
}

/// Writes zero page, command line and entry state.
fn finish(
    boot: &Boot<'_, '_>,
    header: &Header,
    kernel: u64,
    initrd: (u64, u64),
    ram: &mut Ram<'_, '_>,
    rsdp: GuestPhysAddr,
) -> Result<EntryState, Problem> {
    let file = boot.kernel.data;
    let mut page = [0; ZERO_PAGE];
    // The header ends where the jump over it leads.
    let end = field::MAGIC + usize::from(file.get(field::JUMP_LENGTH).copied().unwrap_or(0));
    let end = end.min(field::HEADER_END);
    if let Some(from) = file.get(field::SETUP_SECTS..end) {
        page[field::SETUP_SECTS..end].copy_from_slice(from);
    }

    let cmdline = ram.put_string("the command line", boot.cmdline)?;
    let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
    // All of these lie below 4 GiB: the placements above see to it.
    let mut put_u32 = |at, value: u64| put(at, &(value as u32).to_le_bytes());
    put_u32(field::CODE32_START, kernel);
    put_u32(field::RAMDISK_IMAGE, initrd.0);
    put_u32(field::RAMDISK_SIZE, initrd.1);
    put_u32(field::CMD_LINE_PTR, cmdline);
    put(field::LOADER_TYPE, &[0xff]);
    put(
        field::LOADFLAGS,
        &[file.get(field::LOADFLAGS).unwrap_or(&0) & !CAN_USE_HEAP],
    );
    if header.version >= 0x020e {
        put(field::ACPI_RSDP, &rsdp.as_u64().to_le_bytes());
    }
    let regions = ram.layout.regions();
    put(field::E820_ENTRIES, &[regions.len() as u8]);
    for (i, Region { range, kind }) in regions.iter().enumerate() {
        let at = field::E820_TABLE + 20 * i;
        put(at, &range.start.to_le_bytes());
        put(at + 8, &(range.end - range.start).to_le_bytes());
        put(at + 16, &(*kind as u32).to_le_bytes());
    }
    let place = Place::Lowest(BOOT_AREA);
    let zero_page = ram.put("the zero page", &page, arch::PAGE_SIZE, place)?;

    let rip = if header.entry_64 {
        kernel + ENTRY_64
    } else {
        kernel
    };
    let entry = EntryState::new(ram, header.entry_64, rip)?;
    Ok(EntryState {
        rsi: zero_page,
        ..entry
    })
}
