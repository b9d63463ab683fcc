//! A window of 4 KiB pages for tests: 512 of them from [`WINDOW`] up, each mapped as one wants.

use core::arch::asm;
use core::cell::UnsafeCell;

/// Bytes of a page.
pub const PAGE: u64 = 4096;
/// Where the window lies: the second 512 GiB.
pub const WINDOW: u64 = 1 << 39;

/// An aligned page of memory for a test's own use.
#[repr(C, align(4096))]
#[derive(Debug)]
pub struct Page(UnsafeCell<[u64; 512]>);

// SAFETY: who takes the address keeps order.
unsafe impl Sync for Page {}

impl Page {
    /// All zero.
    pub const fn zero() -> Self {
        Self(UnsafeCell::new([0; 512]))
    }

    /// Its address, which is also its physical one.
    pub fn address(&self) -> u64 {
        self.0.get() as u64
    }

    fn set(&self, index: usize, value: u64) {
        // SAFETY: the CPU's table walk is the only other reader, and an entry is written whole.
        unsafe {
            self.0
                .get()
                .cast::<u64>()
                .add(index & 511)
                .write_volatile(value)
        };
    }
}

static TABLES: [Page; 3] = [const { Page::zero() }; 3];

unsafe extern "C" {
    static mut guest_pml4: [u64; 512];
}

/// The address of page `index` of the window.
pub const fn window(index: usize) -> u64 {
    WINDOW + (index as u64 & 511) * PAGE
}

/// Sets the page-table entry of page `index` of the window (bit 0 present, 1 writable, 2 user,
/// 63 no execution) and gives its address.
pub fn set_window(index: usize, entry: u64) -> u64 {
    let [pdpt, pd, pt] = &TABLES;
    pdpt.set(0, pd.address() | 7);
    pd.set(0, pt.address() | 7);
    set_window_unflushed(index, entry);
    let address = window(index);
    // SAFETY: slot 1 of the root belongs to this module; the rest of the map is untouched.
    unsafe {
        (&raw mut guest_pml4)
            .cast::<u64>()
            .add(1)
            .write_volatile(pdpt.address() | 7);
        asm!("invlpg [{}]", in(reg) address, options(nostack));
    }
    address
}

/// Sets the page-table entry of page `index` and leaves what the CPU may remember of the old one.
pub fn set_window_unflushed(index: usize, entry: u64) {
    TABLES[2].set(index, entry);
}

/// The page-table entry of page `index` of the window, with what the CPU has noted in it.
pub fn window_entry(index: usize) -> u64 {
    // SAFETY: the table is this module's; the CPU's walk writes bits of it.
    unsafe {
        (TABLES[2].address() as *const u64)
            .add(index & 511)
            .read_volatile()
    }
}
