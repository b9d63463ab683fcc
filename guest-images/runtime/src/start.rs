//! What the loader left: PVH start info (Xen's `arch-x86/hvm/start_info.h`).

use core::sync::atomic::{AtomicU64, Ordering};

/// `struct hvm_start_info`, version 1.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct StartInfo {
    /// 336EC578H.
    pub magic: u32,
    /// 1 or more: the memory map is there.
    pub version: u32,
    /// `SIF_*`.
    pub flags: u32,
    /// How many modules the list has.
    pub modules: u32,
    /// Physical address of the module list.
    pub module_list: u64,
    /// Physical address of the command line, 0 for none.
    pub cmdline: u64,
    /// Physical address of the ACPI root pointer.
    pub rsdp: u64,
    /// Physical address of the memory map.
    pub memory_map: u64,
    /// How many entries it has: 24 bytes each.
    pub memory_map_entries: u32,
    /// 0.
    pub reserved: u32,
}

static START_INFO: AtomicU64 = AtomicU64::new(0);

pub(crate) fn set(address: u64) {
    START_INFO.store(address, Ordering::Relaxed);
}

/// The start info.
pub fn start_info() -> StartInfo {
    // SAFETY: the loader put it there, and the guest leaves that page alone.
    unsafe { (START_INFO.load(Ordering::Relaxed) as *const StartInfo).read_unaligned() }
}

/// The command line, without the name that some loaders put first; empty if there is none.
pub fn cmdline() -> &'static str {
    let address = start_info().cmdline;
    if address == 0 {
        return "";
    }
    // SAFETY: the loader put a string there, and the guest leaves that page alone.
    let text = unsafe { core::ffi::CStr::from_ptr(address as *const core::ffi::c_char) };
    text.to_str().unwrap_or("").trim()
}
