//! A small machine's memory for host tests.

use crate::{FrameAllocator, FrameRange};
use arch::{HostPhysAddr, PhysMemory};
use std::cell::RefCell;
use std::rc::Rc;

/// Physical memory from 0 to its size, as a vector that clones share.
#[derive(Clone)]
pub struct TestMemory(Rc<RefCell<Vec<u8>>>);

impl TestMemory {
    /// Memory full of 0xa5 (nothing comes zeroed) and an allocator over all of it.
    pub fn pair(bytes: usize) -> (Self, FrameAllocator) {
        let range = FrameRange {
            start: HostPhysAddr::new(0),
            end: HostPhysAddr::new(bytes as u64),
        };
        (
            Self(Rc::new(RefCell::new(vec![0xa5; bytes]))),
            FrameAllocator::new(&[range]),
        )
    }
}

impl PhysMemory for TestMemory {
    fn read(&self, addr: HostPhysAddr, buf: &mut [u8]) {
        let start = addr.as_u64() as usize;
        buf.copy_from_slice(&self.0.borrow()[start..start + buf.len()]);
    }
    fn write(&self, addr: HostPhysAddr, data: &[u8]) {
        let start = addr.as_u64() as usize;
        self.0.borrow_mut()[start..start + data.len()].copy_from_slice(data);
    }
    fn read_u64(&self, addr: HostPhysAddr) -> u64 {
        assert!(addr.is_aligned(8));
        let mut bytes = [0; 8];
        self.read(addr, &mut bytes);
        u64::from_le_bytes(bytes)
    }
    fn write_u64(&self, addr: HostPhysAddr, value: u64) {
        assert!(addr.is_aligned(8));
        self.write(addr, &value.to_le_bytes());
    }
    fn zero(&self, addr: HostPhysAddr, bytes: u64) {
        let start = addr.as_u64() as usize;
        self.0.borrow_mut()[start..start + bytes as usize].fill(0);
    }
    fn compare_exchange(&self, addr: HostPhysAddr, size: u8, current: u64, new: u64) -> u64 {
        let mut bytes = [0; 8];
        self.read(addr, &mut bytes[..usize::from(size)]);
        let old = u64::from_le_bytes(bytes);
        if old == current {
            self.write(addr, &new.to_le_bytes()[..usize::from(size)]);
        }
        old
    }
}
