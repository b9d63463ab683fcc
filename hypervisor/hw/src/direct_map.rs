//! All of physical memory at one virtual offset.

use arch::{HostPhysAddr, PhysMemory};
use core::arch::asm;

/// The window through which software reaches physical memory.
#[derive(Clone, Copy, Debug)]
pub struct DirectMap {
    offset: u64,
    limit: u64,
}

impl DirectMap {
    /// A direct map of physical `0..limit` at virtual `offset`.
    ///
    /// # Safety
    /// The page tables map that range readable and writable, and keep doing so for as long as
    /// any copy of the value is used.
    #[must_use]
    pub const unsafe fn new(offset: u64, limit: u64) -> Self {
        Self { offset, limit }
    }

    /// One past the last mapped physical address.
    #[must_use]
    pub const fn limit(self) -> u64 {
        self.limit
    }

    /// Where `bytes` bytes at `addr` appear, or `None` if they are not all mapped.
    #[must_use]
    pub fn pointer(self, addr: HostPhysAddr, bytes: u64) -> Option<*mut u8> {
        let end = addr.as_u64().checked_add(bytes)?;
        (end <= self.limit).then(|| (self.offset + addr.as_u64()) as *mut u8)
    }

    /// The physical address behind a pointer into the map.
    #[must_use]
    pub fn physical<T>(self, pointer: *const T) -> HostPhysAddr {
        HostPhysAddr::new((pointer as u64).wrapping_sub(self.offset))
    }

    /// The pointer for an address that the tables' code got from the frame allocator.
    #[inline]
    fn at(self, addr: HostPhysAddr, bytes: u64) -> *mut u8 {
        debug_assert!(
            self.pointer(addr, bytes).is_some(),
            "{addr} is beyond the direct map"
        );
        self.offset.wrapping_add(addr.as_u64()) as *mut u8
    }
}

// Guest RAM may change under our hands: every access below is one assembly instruction that the
// compiler can neither split, repeat nor leave out.
macro_rules! load {
    ($pointer:expr, $reg:ident, $form:literal, $type:ty) => {{
        let value: $type;
        // SAFETY: the caller's pointer is valid for a read of this size (DirectMap::new).
        unsafe {
            asm!(concat!("mov {0", $form, "}, [{1}]"), out($reg) value, in(reg) $pointer,
                 options(nostack, preserves_flags, readonly));
        }
        value
    }};
}
macro_rules! store {
    ($pointer:expr, $reg:ident, $form:literal, $value:expr) => {{
        // SAFETY: the caller's pointer is valid for a write of this size (DirectMap::new).
        unsafe {
            asm!(concat!("mov [{1}], {0", $form, "}"), in($reg) $value, in(reg) $pointer,
                 options(nostack, preserves_flags));
        }
    }};
}

impl PhysMemory for DirectMap {
    #[inline]
    fn read(&self, addr: HostPhysAddr, buf: &mut [u8]) {
        let from = self.at(addr, buf.len() as u64);
        match buf.len() {
            1 => buf[0] = load!(from, reg_byte, "", u8),
            2 => buf.copy_from_slice(&load!(from, reg, ":x", u16).to_le_bytes()),
            4 => buf.copy_from_slice(&load!(from, reg, ":e", u32).to_le_bytes()),
            8 => buf.copy_from_slice(&load!(from, reg, ":r", u64).to_le_bytes()),
            // SAFETY: `from` is valid for `len` bytes (frames come from the allocator and the
            // direct map is whole), `buf` by its type.
            len => unsafe { copy(buf.as_mut_ptr(), from, len) },
        }
    }

    #[inline]
    fn write(&self, addr: HostPhysAddr, data: &[u8]) {
        let to = self.at(addr, data.len() as u64);
        match *data {
            [byte] => store!(to, reg_byte, "", byte),
            [a, b] => store!(to, reg, ":x", u16::from_le_bytes([a, b])),
            [a, b, c, d] => store!(to, reg, ":e", u32::from_le_bytes([a, b, c, d])),
            // SAFETY: as in `read`.
            _ => unsafe { copy(to, data.as_ptr(), data.len()) },
        }
    }

    #[inline]
    fn read_u64(&self, addr: HostPhysAddr) -> u64 {
        load!(self.at(addr, 8), reg, ":r", u64)
    }

    #[inline]
    fn write_u64(&self, addr: HostPhysAddr, value: u64) {
        store!(self.at(addr, 8), reg, ":r", value);
    }

    fn zero(&self, addr: HostPhysAddr, bytes: u64) {
        let to = self.at(addr, bytes);
        // SAFETY: the frame is the caller's and mapped; DF is clear by the ABI.
        unsafe {
            asm!("rep stosq", inout("rcx") bytes / 8 => _, inout("rdi") to => _, in("rax") 0u64,
                 options(nostack, preserves_flags));
        }
    }

    fn compare_exchange(&self, addr: HostPhysAddr, size: u8, current: u64, new: u64) -> u64 {
        let at = self.at(addr, u64::from(size));
        macro_rules! cmpxchg {
            ($reg:ident, $form:literal, $type:ty) => {{
                let mut seen = current;
                // SAFETY: valid and aligned for this size (`AddressSpace` checks alignment).
                unsafe {
                    asm!(concat!("lock cmpxchg [{0}], {1", $form, "}"), in(reg) at,
                         in($reg) new as $type, inout("rax") seen, options(nostack));
                }
                seen as $type as u64
            }};
        }
        match size {
            1 => cmpxchg!(reg_byte, "", u8),
            2 => cmpxchg!(reg, ":x", u16),
            4 => cmpxchg!(reg, ":e", u32),
            _ => cmpxchg!(reg, ":r", u64),
        }
    }
}

/// Copies with string instructions: eight bytes at a time, then the rest.
///
/// # Safety
/// `to` is valid for writes and `from` for reads of `bytes` bytes.
unsafe fn copy(to: *mut u8, from: *const u8, bytes: usize) {
    // SAFETY: promised by the caller; DF is clear by the ABI.
    unsafe {
        asm!("rep movsq", "mov rcx, {rest}", "rep movsb", rest = in(reg) bytes % 8,
             inout("rcx") bytes / 8 => _, inout("rdi") to => _, inout("rsi") from => _,
             options(nostack, preserves_flags));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_of_every_length_and_offset_are_exact() {
        let mut memory: Vec<u8> = (0..=255).collect();
        // SAFETY: the "physical" range is the vector, which outlives the map.
        let map = unsafe { DirectMap::new(memory.as_mut_ptr() as u64, 256) };
        for len in 0..40 {
            for start in 0..9u8 {
                let mut buf = vec![0; len];
                map.read(HostPhysAddr::new(start.into()), &mut buf);
                let want: Vec<u8> = (start..).take(len).collect();
                assert_eq!(buf, want);
            }
        }
        map.write(HostPhysAddr::new(3), b"nine byte");
        map.write(HostPhysAddr::new(100), &[9]);
        assert_eq!(map.read_u64(HostPhysAddr::new(96)) >> 32 & 0xff, 9);
        assert_eq!(map.compare_exchange(HostPhysAddr::new(100), 1, 9, 10), 9);
        assert_eq!(map.compare_exchange(HostPhysAddr::new(100), 1, 9, 11), 10);
        map.zero(HostPhysAddr::new(8), 16);
        assert_eq!(&memory[3..12], b"nine \0\0\0\0");
        assert_eq!((memory[23], memory[24], memory[100]), (0, 24, 10));
        assert!(map.pointer(HostPhysAddr::new(250), 7).is_none());
        assert!(map.pointer(HostPhysAddr::new(u64::MAX), 7).is_none());
    }
}
