//! ELF kernels with a PVH entry note (Xen's docs/misc/pvh.pandoc and
//! include/public/arch-x86/hvm/start_info.h): Linux's uncompressed `vmlinux` among them.

use alloc::vec::Vec;

use arch::GuestPhysAddr;
use zerocopy::{Immutable, IntoBytes};

use super::{
    Boot, EntryState, Image, LoadError, Problem,
    elf::{self, Elf},
    ram::{BELOW_4G, BOOT_AREA, Place, Ram},
    sniff::sniff,
};
use crate::{config::Kind, layout::Region};

/// `XEN_HVM_START_MAGIC_VALUE`: "xEn3" with the high bit of the E set.
const MAGIC: u32 = 0x336e_c578;

/// `struct hvm_start_info`, version 1.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    modules: u32,
    module_list: u64,
    cmdline: u64,
    rsdp: u64,
    memory_map: u64,
    memory_map_entries: u32,
    reserved: u32,
}

const _: () = assert!(size_of::<StartInfo>() == 56);

/// `struct hvm_modlist_entry`.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Module {
    address: u64,
    size: u64,
    cmdline: u64,
    reserved: u64,
}

/// `struct hvm_memmap_table_entry`; the kinds are those of E820.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct MapEntry {
    address: u64,
    size: u64,
    kind: u32,
    reserved: u32,
}

pub(super) fn load<'i>(
    boot: &Boot<'_, 'i>,
    ram: &mut Ram<'_, 'i>,
    rsdp: GuestPhysAddr,
) -> Result<EntryState, LoadError> {
    let of_kernel = |problem: Problem| problem.of(&boot.kernel);
    let entry = load_kernel(&boot.kernel, ram).map_err(of_kernel)?;
    let mut modules = Vec::new();
    for image in boot.initrd.iter().chain(boot.modules) {
        modules.push(load_module(image, ram).map_err(|problem| problem.of(image))?);
    }
    finish(boot, entry, &modules, rsdp, ram).map_err(of_kernel)
}

fn load_kernel<'i>(image: &Image<'i>, ram: &mut Ram<'_, 'i>) -> Result<u64, Problem> {
    let file = image.data;
    let wrong = || Problem::WrongKind {
        wanted: Kind::Pvh,
        looks: sniff(file),
    };
    if !file.starts_with(elf::MAGIC) {
        return Err(wrong());
    }
    let elf = Elf::parse(file)?;
    let entry = elf.pvh_entry().ok_or_else(wrong)?;
    elf.load(image, ram)?;
    if elf.holds(entry) && entry < 1 << 32 {
        return Ok(entry);
    }
    let (field, right) = (
        "the PVH entry point",
        "it must lie in a segment, below 4 GiB",
    );
    Err(Problem::Field {
        field,
        found: entry,
        right,
    })
}

/// Puts a module as high as possible, out of the way of a kernel that unpacks or grows.
fn load_module<'i>(image: &Image<'i>, ram: &mut Ram<'_, 'i>) -> Result<Module, Problem> {
    let address = ram.put_image("the module", image, Place::Highest(BELOW_4G))?;
    let cmdline = ram.put_string("the module's name", image.name)?;
    Ok(Module {
        address,
        size: image.data.len() as u64,
        cmdline,
        reserved: 0,
    })
}

fn finish(
    boot: &Boot<'_, '_>,
    entry: u64,
    modules: &[Module],
    rsdp: GuestPhysAddr,
    ram: &mut Ram<'_, '_>,
) -> Result<EntryState, Problem> {
    let cmdline = ram.put_string("the command line", boot.cmdline)?;
    let map: Vec<MapEntry> = ram
        .layout
        .regions()
        .iter()
        .map(|Region { range, kind }| MapEntry {
            address: range.start,
            size: range.end - range.start,
            kind: *kind as u32,
            reserved: 0,
        })
        .collect();
    let place = || Place::Lowest(BOOT_AREA);
    let memory_map = ram.put("the memory map", map.as_bytes(), 16, place())?;
    let module_list = ram.put("the module list", modules.as_bytes(), 16, place())?;
    let info = StartInfo {
        magic: MAGIC,
        version: 1,
        flags: 0,
        modules: modules.len() as u32,
        module_list,
        cmdline,
        rsdp: rsdp.as_u64(),
        memory_map,
        memory_map_entries: map.len() as u32,
        reserved: 0,
    };
    let info = ram.put("the start information", info.as_bytes(), 16, place())?;
    let state = EntryState::new(ram, false, entry)?;
    Ok(EntryState { rbx: info, ..state })
}
