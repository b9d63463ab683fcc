//! What a device and the hypervisor share: its registers, and memory that it reaches.

use crate::DirectMap;
use arch::{HostPhysAddr, PhysMemory};
use core::arch::asm;
use nic::{DmaMemory, Registers, Width};

/// Loads from a device's register. Always by the accumulator: some AMD processors answer
/// configuration space in memory to no other (BKDG family 10h §2.11).
///
/// # Safety
/// `at` is mapped, aligned to the width, and a register that may be read.
pub(crate) unsafe fn load(at: *const u8, width: Width) -> u32 {
    let value: u32;
    // SAFETY: promised by the caller.
    unsafe {
        match width {
            Width::Byte => asm!("movzx eax, byte ptr [{}]", in(reg) at, out("eax") value,
                                options(nostack, preserves_flags)),
            Width::Word => asm!("movzx eax, word ptr [{}]", in(reg) at, out("eax") value,
                                options(nostack, preserves_flags)),
            Width::Double => asm!("mov eax, [{}]", in(reg) at, out("eax") value,
                                  options(nostack, preserves_flags)),
        }
    }
    value
}

/// Stores to a device's register. Earlier stores are seen before it: to uncached memory x86 keeps
/// the order.
///
/// # Safety
/// As [`load`], for writing.
pub(crate) unsafe fn store(at: *mut u8, width: Width, value: u32) {
    // SAFETY: promised by the caller.
    unsafe {
        match width {
            Width::Byte => asm!("mov [{}], al", in(reg) at, in("eax") value,
                                options(nostack, preserves_flags)),
            Width::Word => asm!("mov [{}], ax", in(reg) at, in("eax") value,
                                options(nostack, preserves_flags)),
            Width::Double => asm!("mov [{}], eax", in(reg) at, in("eax") value,
                                  options(nostack, preserves_flags)),
        }
    }
}

/// A part of a device's registers.
#[derive(Debug)]
pub struct Window {
    start: *mut u8,
    bytes: u32,
}

// SAFETY: the registers are mapped alike on every core (the invariant of `Window::new`).
unsafe impl Send for Window {}

impl Window {
    /// The registers mapped at `start`.
    ///
    /// # Safety
    /// `start..start + bytes` is mapped uncached in every core's tables for as long as the value
    /// lives, aligned to four bytes, and all of it registers of one device that nothing else
    /// drives. Whatever is written there, the device reaches no memory but what it was given.
    #[must_use]
    pub const unsafe fn new(start: *mut u8, bytes: u32) -> Self {
        Self { start, bytes }
    }

    fn at(&self, offset: u32, width: Width) -> Option<*mut u8> {
        let size = match width {
            Width::Byte => 1,
            Width::Word => 2,
            Width::Double => 4,
        };
        let end = offset.checked_add(size)?;
        let inside = end <= self.bytes && offset.is_multiple_of(size);
        inside.then(|| self.start.wrapping_add(offset as usize))
    }
}

impl Registers for Window {
    fn read(&mut self, offset: u32, width: Width) -> u32 {
        // SAFETY: within the window and aligned (`at`).
        self.at(offset, width)
            .map_or(u32::MAX, |at| unsafe { load(at, width) })
    }

    fn write(&mut self, offset: u32, width: Width, value: u32) {
        if let Some(at) = self.at(offset, width) {
            // SAFETY: within the window and aligned (`at`).
            unsafe { store(at, width, value) };
        }
    }
}

/// Contiguous memory that a device reads and writes.
#[derive(Debug)]
pub struct DmaRegion {
    map: DirectMap,
    start: HostPhysAddr,
    bytes: usize,
}

impl DmaRegion {
    /// The memory from `start` on; `None` where the direct map does not reach it.
    ///
    /// # Safety
    /// It is RAM that nobody else uses, until the device that is given it has been stopped.
    #[must_use]
    pub unsafe fn new(map: DirectMap, start: HostPhysAddr, bytes: usize) -> Option<Self> {
        map.pointer(start, bytes as u64)?;
        map.zero(start, bytes as u64);
        Some(Self { map, start, bytes })
    }

    fn at(&self, offset: usize, length: usize) -> Option<HostPhysAddr> {
        let end = offset.checked_add(length)?;
        (end <= self.bytes).then(|| self.start.wrapping_add(offset as u64))
    }
}

impl DmaMemory for DmaRegion {
    fn address(&self) -> u64 {
        self.start.as_u64()
    }

    fn bytes(&self) -> usize {
        self.bytes
    }

    fn read(&self, offset: usize, to: &mut [u8]) {
        match self.at(offset, to.len()) {
            Some(at) => self.map.read(at, to),
            None => to.fill(0),
        }
    }

    fn write(&mut self, offset: usize, data: &[u8]) {
        if let Some(at) = self.at(offset, data.len()) {
            self.map.write(at, data);
        }
    }

    fn with(&self, offset: usize, length: usize, show: &mut dyn FnMut(&[u8])) {
        let at = self.at(offset, length);
        if let Some(from) = at.and_then(|at| self.map.pointer(at, length as u64)) {
            // SAFETY: the region's own RAM, which nobody writes: software cannot while `self` is
            // borrowed, and the device has given the buffer back (its part of the contract of its
            // rings, and of `DmaMemory::with`).
            show(unsafe { core::slice::from_raw_parts(from, length) });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_ends_where_it_ends() {
        let mut registers = [0u32; 4];
        // SAFETY: ordinary memory stands for the registers.
        let mut window = unsafe { Window::new(registers.as_mut_ptr().cast(), 16) };
        window.write32(4, 0x1234_5678);
        window.write(8, Width::Word, 0xabcd_ef01);
        window.write(15, Width::Byte, 0x7f);
        assert_eq!(window.read(4, Width::Word), 0x5678);
        assert_eq!(window.read(6, Width::Byte), 0x34);
        assert_eq!(window.read32(8), 0xef01);
        assert_eq!(window.read32(12), 0x7f00_0000);
        for beyond in [16, 2, 14, u32::MAX - 3] {
            window.write32(beyond, 1);
            assert_eq!(window.read32(beyond), u32::MAX);
        }
        assert_eq!(window.read(13, Width::Word), u32::MAX);
    }

    #[test]
    fn a_region_ends_where_it_ends() {
        let mut memory = vec![7u8; 64];
        // SAFETY: the "physical" range is the vector, which outlives the map.
        let map = unsafe { DirectMap::new(memory.as_mut_ptr() as u64, 64) };
        // SAFETY: as above.
        let region = |bytes| unsafe { DmaRegion::new(map, HostPhysAddr::new(16), bytes) };
        assert!(region(49).is_none());
        let mut region = region(40).expect("it fits");
        region.write(39, &[1]);
        region.write(39, &[2, 3]);
        region.write64(0, 0x1122);
        assert_eq!((region.read16(0), region.read64(0)), (0x1122, 0x1122));
        assert_eq!((region.read64(33), region.read16(39)), (0, 0));
        let mut seen: Vec<u8> = Vec::new();
        region.with(38, 2, &mut |bytes| seen.extend(bytes));
        region.with(38, 3, &mut |bytes| seen.extend(bytes));
        assert_eq!(seen, [0, 1]);
        assert_eq!((memory[15], memory[56]), (7, 7));
    }
}
