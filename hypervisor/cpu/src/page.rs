//! A page of the machine that the hardware shares with us: VMCS, VMCB, VMXON region,
//! permission bitmaps, host save area.

use arch::HostPhysAddr;
use core::ptr::NonNull;

/// One owned 4 KiB page, zeroed when it came into being.
///
/// The kernel makes these from its frames; the backends own them for as long as the processor may
/// reach them, and give them back by [`HostPage::into_phys`].
#[derive(Debug)]
pub struct HostPage {
    phys: HostPhysAddr,
    virt: NonNull<u8>,
}

// SAFETY: the page is owned and mapped alike on every core (the invariant of `HostPage::new`),
// so that it may move between cores like a box.
unsafe impl Send for HostPage {}
// SAFETY: as above; what is shared gives only addresses.
unsafe impl Sync for HostPage {}

impl HostPage {
    /// Bytes in the page.
    pub const SIZE: usize = 4096;

    /// Takes a page and fills it with zeroes.
    ///
    /// # Safety
    /// `phys` is a 4 KiB-aligned page of RAM, and `virt` its address in every core's tables,
    /// mapped writable and write-back. Nothing else reads or writes the page until it is given
    /// back by [`HostPage::into_phys`].
    #[must_use]
    pub unsafe fn new(phys: HostPhysAddr, virt: NonNull<u8>) -> Self {
        // SAFETY: the caller hands over a whole writable page.
        unsafe { virt.write_bytes(0, Self::SIZE) };
        Self { phys, virt }
    }

    /// Where the page lies in physical memory.
    #[must_use]
    pub const fn phys(&self) -> HostPhysAddr {
        self.phys
    }

    /// The first byte of the page as software reaches it.
    #[must_use]
    pub const fn as_ptr(&self) -> *mut u8 {
        self.virt.as_ptr()
    }

    /// The page as bytes, for pages that only software writes (permission bitmaps).
    pub const fn bytes_mut(&mut self) -> &mut [u8; Self::SIZE] {
        // SAFETY: the page is owned, mapped, and initialized by `new`; `&mut self` makes the
        // reference unique. The processor only reads such pages, and only in guest mode.
        unsafe { self.virt.cast().as_mut() }
    }

    /// Gives the page back.
    #[must_use]
    pub const fn into_phys(self) -> HostPhysAddr {
        self.phys
    }

    /// A page on the host's heap, with its address in place of the physical one.
    #[cfg(test)]
    pub(crate) fn for_test() -> Self {
        #[repr(align(4096))]
        struct Page(#[allow(dead_code)] [u8; HostPage::SIZE]);
        let page = Box::leak(Box::new(Page([0xff; Self::SIZE])));
        let virt = NonNull::from(page).cast();
        // SAFETY: a leaked, aligned box is a page that nobody else has.
        unsafe { Self::new(HostPhysAddr::new(virt.as_ptr() as u64), virt) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_page_is_zeroed() {
        let mut page = HostPage::for_test();
        assert!(page.bytes_mut().iter().all(|byte| *byte == 0));
        assert!(page.phys().is_aligned(4096));
    }
}
