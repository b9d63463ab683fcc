//! The places of a VM's vCPUs: which core has taken each of them, and which have left the cores by
//! order.
//!
//! Whoever leaves something for a vCPU writes it down first and then asks [`Seats::core`] where to
//! send word. A core that takes a vCPU says so before it looks at what was left, and one that puts
//! it back looks again afterwards, so that one of the two always sees the other.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};
use spin::Mutex;

/// No core.
const NOWHERE: u32 = u32::MAX;

/// The places of a VM's vCPUs.
pub struct Seats<T> {
    seats: Box<[Seat<T>]>,
    /// vCPUs, by bit number, that left the cores by order.
    out: AtomicU64,
}

struct Seat<T> {
    /// The core that has taken it, or [`NOWHERE`]. Changed with the seat locked, so that it never
    /// tells of one who had it before.
    core: AtomicU32,
    vcpu: Mutex<Option<T>>,
}

impl<T> Seats<T> {
    /// vCPUs (1 to 64) that sit in their places.
    #[must_use]
    pub fn new(vcpus: Vec<T>) -> Self {
        let seat = |vcpu| Seat {
            core: AtomicU32::new(NOWHERE),
            vcpu: Mutex::new(Some(vcpu)),
        };
        Self {
            seats: vcpus.into_iter().map(seat).collect(),
            out: AtomicU64::new(0),
        }
    }

    /// All vCPUs, by bit number.
    #[must_use]
    pub fn all(&self) -> u64 {
        u64::MAX >> (64 - self.seats.len().clamp(1, 64))
    }

    /// The core that has taken a vCPU; `None` if none has, or if there is no such vCPU.
    #[must_use]
    pub fn core(&self, index: usize) -> Option<usize> {
        let core = self.seats.get(index)?.core.load(SeqCst);
        (core != NOWHERE).then_some(core as usize)
    }

    /// Takes a vCPU to a core. The core that had it last may be about to put it back, and is waited
    /// for. `None` if there is no such vCPU.
    pub fn take(&self, index: usize, core: usize) -> Option<T> {
        let seat = self.seats.get(index)?;
        loop {
            let mut place = seat.vcpu.lock();
            if let Some(vcpu) = place.take() {
                seat.core.store(core as u32, SeqCst);
                return Some(vcpu);
            }
            drop(place);
            core::hint::spin_loop();
        }
    }

    /// Puts a vCPU back, for any core to take.
    pub fn put_back(&self, index: usize, vcpu: T) {
        if let Some(seat) = self.seats.get(index) {
            let mut place = seat.vcpu.lock();
            seat.core.store(NOWHERE, SeqCst);
            *place = Some(vcpu);
        }
    }

    /// Looks at a vCPU that sits in its place; `None` if it does not.
    pub fn look<R>(&self, index: usize, look: impl FnOnce(&mut T) -> R) -> Option<R> {
        self.seats.get(index)?.vcpu.lock().as_mut().map(look)
    }

    /// A vCPU leaves the cores by order: it is not to be woken any more. Called by the core that has
    /// it, in one with putting it to sleep, so that no wake-up comes between.
    pub fn leave(&self, index: usize) {
        self.out.fetch_or(1 << (index & 63), SeqCst);
    }

    /// Whether a vCPU may be woken: it has not left by order. Called in one with waking it.
    #[must_use]
    pub fn may_wake(&self, index: usize) -> bool {
        self.out.load(SeqCst) >> (index & 63) & 1 == 0
    }

    /// Lets all come again that left by order. Called in one with what [`Seats::leave`] is.
    pub fn let_in(&self) {
        self.out.store(0, SeqCst);
    }

    /// Whether all have left by order and sit in their places.
    #[must_use]
    pub fn are_out(&self) -> bool {
        self.out.load(SeqCst) == self.all()
            && (self.seats.iter()).all(|seat| seat.core.load(SeqCst) == NOWHERE)
    }

    /// The vCPUs, out of their seats; all of them once [`Seats::are_out`].
    pub fn empty(&self) -> impl Iterator<Item = T> {
        self.seats.iter().filter_map(|seat| seat.vcpu.lock().take())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::String;

    #[test]
    fn all_are_out_when_all_have_left_and_sit_down() {
        let seats = Seats::new(alloc::vec!['a', 'b']);
        let first = seats.take(0, 3).unwrap();
        assert_eq!((seats.core(0), seats.core(1)), (Some(3), None));
        assert_eq!(seats.take(2, 3), None);
        seats.leave(0);
        seats.leave(1);
        assert!(!seats.may_wake(0) && !seats.are_out(), "one is not back");
        seats.put_back(0, first);
        assert!(seats.are_out());
        seats.let_in();
        assert!(seats.may_wake(1) && !seats.are_out());
        assert_eq!(seats.empty().collect::<String>(), "ab");
    }
}
