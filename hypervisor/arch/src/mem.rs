//! The walls around memory: guest-physical for devices, host-physical for the tables.

use crate::{GuestPhysAddr, HostPhysAddr, PageSize};

/// A guest-physical access could not be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryFault {
    /// No RAM at this address (a device, a hole, or beyond the end).
    NotRam(GuestPhysAddr),
    /// RAM that may not be written this way (ROM).
    ReadOnly(GuestPhysAddr),
    /// RAM that has no frame yet, and none can be had.
    OutOfMemory(GuestPhysAddr),
}

/// A guest's physical memory, as software reaches it: bounded copies, never references.
///
/// Touching RAM that has no frame yet gives it one, zeroed; writing marks it dirty. A copy that
/// fails part-way may have copied the pages before the one named in the error.
pub trait GuestMemory {
    /// Copies guest memory at `addr` into `buf`.
    ///
    /// # Errors
    /// The first address that cannot be read.
    fn read(&mut self, addr: GuestPhysAddr, buf: &mut [u8]) -> Result<(), MemoryFault>;

    /// Copies `data` into guest memory at `addr`.
    ///
    /// # Errors
    /// The first address that cannot be written.
    fn write(&mut self, addr: GuestPhysAddr, data: &[u8]) -> Result<(), MemoryFault>;

    /// Reads a naturally aligned little-endian u32 in one access.
    ///
    /// # Errors
    /// As [`GuestMemory::read`].
    fn read_u32(&mut self, addr: GuestPhysAddr) -> Result<u32, MemoryFault> {
        let mut bytes = [0; 4];
        self.read(addr, &mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    /// Reads a naturally aligned little-endian u64 in one access.
    ///
    /// # Errors
    /// As [`GuestMemory::read`].
    fn read_u64(&mut self, addr: GuestPhysAddr) -> Result<u64, MemoryFault> {
        let mut bytes = [0; 8];
        self.read(addr, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Atomically replaces the naturally aligned `size`-byte (1, 2, 4 or 8) value at `addr` with
    /// `new` if it is `current`; gives back what stood there.
    ///
    /// # Errors
    /// As [`GuestMemory::write`].
    fn compare_exchange(
        &mut self,
        addr: GuestPhysAddr,
        size: u8,
        current: u64,
        new: u64,
    ) -> Result<u64, MemoryFault>;
}

/// The machine's memory as the tables' code reaches it. Implemented in `hw` by volatile accesses
/// through the direct map, and by a plain vector in host tests.
///
/// Addresses come from a [`FrameSource`] (or from an entry that holds such an address), so they
/// lie in RAM that belongs to the caller; an implementation may still check.
pub trait PhysMemory {
    /// Copies host memory into `buf`.
    fn read(&self, addr: HostPhysAddr, buf: &mut [u8]);
    /// Copies `data` into host memory.
    fn write(&self, addr: HostPhysAddr, data: &[u8]);
    /// One aligned 8-byte load.
    fn read_u64(&self, addr: HostPhysAddr) -> u64;
    /// One aligned 8-byte store.
    fn write_u64(&self, addr: HostPhysAddr, value: u64);
    /// Fills `bytes` bytes (a multiple of 8) with zeroes.
    fn zero(&self, addr: HostPhysAddr, bytes: u64);
    /// Atomic compare-and-exchange of an aligned value of 1, 2, 4 or 8 bytes; gives back what
    /// stood there before.
    fn compare_exchange(&self, addr: HostPhysAddr, size: u8, current: u64, new: u64) -> u64;
}

/// Where frames come from and go back to.
pub trait FrameSource {
    /// A naturally aligned frame of this size, contents unspecified; `None` when there is none.
    fn allocate(&mut self, size: PageSize) -> Option<HostPhysAddr>;
    /// Gives a frame back.
    fn free(&mut self, frame: HostPhysAddr, size: PageSize);
}
