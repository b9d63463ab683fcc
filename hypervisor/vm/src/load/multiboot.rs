//! Multiboot kernels (Multiboot Specification 0.6.96): 32-bit ELF, or any file whose header gives
//! load addresses.
//!
//! The command line begins with the kernel's name and each module's string is the module's name,
//! as GRUB Legacy and QEMU have it.

use alloc::{format, vec::Vec};

use zerocopy::{Immutable, IntoBytes};

use super::{
    Boot, EntryState, Image, LOADER_NAME, LoadError, Problem,
    elf::{self, Elf},
    ram::{BELOW_4G, BOOT_AREA, Place, Ram},
    sniff::sniff,
};
use crate::{config::Kind, layout::Region};

/// The header lies in the first 8 KiB, aligned to four bytes (§3.1).
const SEARCH: usize = 8192;
const HEADER_MAGIC: u32 = 0x1bad_b002;
/// In EAX at entry (§3.2).
const LOADER_MAGIC: u32 = 0x2bad_b002;
/// Header flags that must be understood: 0 page-aligned modules (ours always are), 1 memory
/// information, 2 video mode (a wish: there is no video, and the information says so).
const KNOWN: u32 = 0b111;
const MANDATORY: u32 = 0xffff;
/// Header flag: the address fields are valid.
const ADDRESSES: u32 = 1 << 16;

/// A multiboot header that was found.
#[derive(Clone, Copy, Debug)]
pub(super) struct Header {
    offset: usize,
    flags: u32,
}

/// Finds the header: magic, flags, and a checksum that makes their sum zero.
pub(super) fn find_header(file: &[u8]) -> Option<Header> {
    let head = file.get(..SEARCH).unwrap_or(file);
    let words = head.as_chunks::<4>().0;
    words
        .windows(3)
        .zip((0..).step_by(4))
        .find_map(|(words, offset)| match words {
            &[magic, flags, checksum] => {
                let [magic, flags, checksum] = [magic, flags, checksum].map(u32::from_le_bytes);
                let sum = magic.wrapping_add(flags).wrapping_add(checksum);
                (magic == HEADER_MAGIC && sum == 0).then_some(Header { offset, flags })
            }
            _ => None,
        })
}

/// The information structure up to the loader's name (§3.3); the rest is zero.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Info {
    flags: u32,
    mem_lower: u32,
    mem_upper: u32,
    boot_device: u32,
    cmdline: u32,
    mods_count: u32,
    mods_addr: u32,
    symbols: [u32; 4],
    mmap_length: u32,
    mmap_addr: u32,
    drives: [u32; 2],
    config_table: u32,
    boot_loader_name: u32,
    apm_table: u32,
    vbe: [u32; 4],
    framebuffer: [u32; 7],
}

const _: () = assert!(size_of::<Info>() == 116);

/// Information flags: memory sizes, command line, modules, memory map, loader name.
const INFO_FLAGS: u32 = 1 << 0 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9;

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Module {
    start: u32,
    end: u32,
    string: u32,
    reserved: u32,
}

#[derive(IntoBytes, Immutable)]
#[repr(C, packed)]
struct MapEntry {
    /// Of what follows.
    size: u32,
    base: u64,
    length: u64,
    kind: u32,
}

pub(super) fn load<'i>(
    boot: &Boot<'_, 'i>,
    ram: &mut Ram<'_, 'i>,
) -> Result<EntryState, LoadError> {
    let of_kernel = |problem: Problem| problem.of(&boot.kernel);
    let (entry, end) = load_kernel(&boot.kernel, ram).map_err(of_kernel)?;
    let mut modules = Vec::new();
    for image in boot.initrd.iter().chain(boot.modules) {
        modules.push(load_module(image, end, ram).map_err(|problem| problem.of(image))?);
    }
    finish(boot, entry, &modules, ram).map_err(of_kernel)
}

/// Loads the kernel; gives its entry point and the address after its last byte.
fn load_kernel<'i>(image: &Image<'i>, ram: &mut Ram<'_, 'i>) -> Result<(u64, u64), Problem> {
    let file = image.data;
    let wrong = Problem::WrongKind {
        wanted: Kind::Multiboot,
        looks: sniff(file),
    };
    let header = find_header(file).ok_or(wrong)?;
    let unknown = header.flags & MANDATORY & !KNOWN;
    if unknown != 0 {
        let (field, found) = ("the multiboot header's flags word", header.flags.into());
        let right = "of the bits 0 to 15 only 0, 1 and 2 are defined";
        return Err(Problem::Field {
            field,
            found,
            right,
        });
    }
    if header.flags & ADDRESSES != 0 {
        return load_flat(image, header.offset, ram);
    }
    if !file.starts_with(elf::MAGIC) {
        let (field, found) = ("the multiboot header's flags word", header.flags.into());
        let right = "a file that is no ELF needs bit 16 and the address fields";
        return Err(Problem::Field {
            field,
            found,
            right,
        });
    }
    let elf = Elf::parse(file)?;
    if elf.wide {
        let right = "multiboot loads 32-bit ELF (1) only: use objcopy -O elf32-i386, or address \
                     fields in the header, or a PVH note and kind = \"pvh\"";
        return Err(Problem::Field {
            field: "the ELF class",
            found: 2,
            right,
        });
    }
    let end = elf.load(image, ram)?;
    Ok((elf.physical_entry()?, end))
}

/// Loads by the header's address fields (§3.1.3).
fn load_flat<'i>(
    image: &Image<'i>,
    offset: usize,
    ram: &mut Ram<'_, 'i>,
) -> Result<(u64, u64), Problem> {
    let file = image.data;
    let size = file.len() as u64;
    let fields = file
        .get(offset + 12..offset + 32)
        .map(|bytes| bytes.as_chunks::<4>().0);
    let Some(&[header, load, load_end, bss_end, entry]) = fields else {
        let (what, end) = ("the multiboot header", offset as u64 + 32);
        return Err(Problem::Truncated { what, end, size });
    };
    let [header, load, load_end, bss_end, entry] =
        [header, load, load_end, bss_end, entry].map(|field| u64::from(u32::from_le_bytes(field)));
    let field = |field, found, right| Problem::Field {
        field,
        found,
        right,
    };
    let start = header
        .checked_sub(load)
        .and_then(|before| (offset as u64).checked_sub(before))
        .ok_or_else(|| {
            field(
                "load_addr",
                load,
                "it must be at most header_addr, by no more than the file has",
            )
        })?;
    let length = match load_end {
        0 => size - start,
        end => end
            .checked_sub(load)
            .filter(|length| *length != 0)
            .ok_or_else(|| field("load_end_addr", end, "it must be zero or above load_addr"))?,
    };
    let end = start + length;
    let data = usize::try_from(start).ok().zip(usize::try_from(end).ok());
    let data = data.and_then(|(start, end)| file.get(start..end));
    let data = data.ok_or(Problem::Truncated {
        what: "the load image",
        end,
        size,
    })?;
    let image_end = load + length;
    let memory_end = match bss_end {
        0 => image_end,
        end if end < image_end => {
            return Err(field(
                "bss_end_addr",
                end,
                "it must be zero or not below load_end_addr",
            ));
        }
        end => end,
    };
    if !(load..memory_end).contains(&entry) {
        return Err(field(
            "entry_addr",
            entry,
            "it must lie in the loaded image",
        ));
    }
    ram.claim("the kernel", memory_end - load, 1, Place::At(load))?;
    ram.copy(load, image, data);
    Ok((entry, memory_end))
}

/// Puts a module behind the kernel, where kernels expect it, page-aligned.
fn load_module<'i>(
    image: &Image<'i>,
    above: u64,
    ram: &mut Ram<'_, 'i>,
) -> Result<Module, Problem> {
    let place = Place::Lowest(above.max(1 << 20)..BELOW_4G.end);
    let start = ram.put_image("the module", image, place)?;
    let string = ram.put_string("the module's name", image.name)?;
    // Below 4 GiB, by the place.
    let end = start + image.data.len() as u64;
    Ok(Module {
        start: start as u32,
        end: end as u32,
        string: string as u32,
        reserved: 0,
    })
}

fn finish(
    boot: &Boot<'_, '_>,
    entry: u64,
    modules: &[Module],
    ram: &mut Ram<'_, '_>,
) -> Result<EntryState, Problem> {
    let cmdline = match boot.cmdline {
        "" => boot.kernel.name.into(),
        line => format!("{} {line}", boot.kernel.name),
    };
    let cmdline = ram.put_string("the command line", &cmdline)?;
    let name = ram.put_string("the loader's name", LOADER_NAME)?;
    let entries: Vec<MapEntry> = ram
        .layout
        .regions()
        .iter()
        .map(|Region { range, kind }| MapEntry {
            size: size_of::<MapEntry>() as u32 - 4,
            base: range.start,
            length: range.end - range.start,
            kind: *kind as u32,
        })
        .collect();
    let place = || Place::Lowest(BOOT_AREA);
    let map = ram.put("the memory map", entries.as_bytes(), 16, place())?;
    let list = ram.put("the module list", modules.as_bytes(), 16, place())?;
    // Everything in the boot area lies far below 4 GiB; KiB of low RAM fit as well.
    let lower = ram.layout.usable().next().map_or(0, |range| range.end);
    let info = Info {
        flags: INFO_FLAGS,
        mem_lower: (lower >> 10) as u32,
        mem_upper: (ram.layout.extended_memory() >> 10) as u32,
        boot_device: 0,
        cmdline: cmdline as u32,
        mods_count: modules.len() as u32,
        mods_addr: list as u32,
        symbols: [0; 4],
        mmap_length: entries.as_bytes().len() as u32,
        mmap_addr: map as u32,
        drives: [0; 2],
        config_table: 0,
        boot_loader_name: name as u32,
        apm_table: 0,
        vbe: [0; 4],
        framebuffer: [0; 7],
    };
    let info = ram.put("the multiboot information", info.as_bytes(), 16, place())?;
    let state = EntryState::new(ram, false, entry)?;
    Ok(EntryState {
        rax: LOADER_MAGIC.into(),
        rbx: info,
        ..state
    })
}
