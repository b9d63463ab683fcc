//! The lock around what all cores share. A core counts those it holds or waits for, so that a panic
//! or the watchdog knows whether the work under way may be abandoned.
//!
//! Locks are held for a few instructions, never across a guest's entry, and are taken in the order
//! console's line → its rings → frames → heap.

use crate::cores::watch_while_waiting;
use core::ops::{Deref, DerefMut};
use core::sync::atomic::{AtomicU64, Ordering};
use cpu::percpu::{Core, this};
use spin::{Mutex, MutexGuard};

/// How often a lock is tried before the wait is a long one: far beyond what a holder may take.
const LONG_WAIT: u32 = 1 << 20;

/// A lock that knows its holder.
pub struct Lock<T> {
    mutex: Mutex<T>,
    /// Address of the holder's [`Core`]; 0 for none.
    holder: AtomicU64,
}

/// One more lock on this core's account, until it is dropped.
struct Counted;

impl Counted {
    fn new() -> Self {
        change_held(1);
        Self
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        change_held(-1);
    }
}

/// Only the core itself writes the count; an interrupt in between puts back what it found.
fn change_held(by: i32) {
    let held = &this().held;
    held.store(
        held.load(Ordering::Relaxed).wrapping_add_signed(by),
        Ordering::Relaxed,
    );
}

/// The lock, held.
pub struct Held<'a, T> {
    lock: &'a Lock<T>,
    // Dropped in this order: opened first, counted last.
    guard: MutexGuard<'a, T>,
    _counted: Counted,
}

impl<T> Lock<T> {
    /// An open lock.
    pub const fn new(value: T) -> Self {
        Self {
            mutex: Mutex::new(value),
            holder: AtomicU64::new(0),
        }
    }

    /// Waits for the lock and takes it.
    pub fn lock(&self) -> Held<'_, T> {
        let counted = Counted::new();
        let guard = self.mutex.try_lock().unwrap_or_else(|| self.wait());
        self.holder.store(me(), Ordering::Relaxed);
        Held {
            lock: self,
            guard,
            _counted: counted,
        }
    }

    #[cold]
    fn wait(&self) -> MutexGuard<'_, T> {
        let mut turns = 0u32;
        loop {
            if let Some(guard) = self.mutex.try_lock() {
                return guard;
            }
            turns = turns.wrapping_add(1);
            if turns.is_multiple_of(LONG_WAIT) {
                // Its holder may be stuck, and nobody else left to find that.
                watch_while_waiting();
            }
            core::hint::spin_loop();
        }
    }

    /// Takes the lock if it is free.
    pub fn try_lock(&self) -> Option<Held<'_, T>> {
        let counted = Counted::new();
        let guard = self.mutex.try_lock()?;
        self.holder.store(me(), Ordering::Relaxed);
        Some(Held {
            lock: self,
            guard,
            _counted: counted,
        })
    }

    /// Opens the lock again if this core holds it.
    ///
    /// # Safety
    /// The work that took it will never go on.
    pub unsafe fn release(&self) {
        if self.holder.load(Ordering::Relaxed) == me() {
            // SAFETY: promised by the caller.
            unsafe { self.break_open() };
            change_held(-1);
        }
    }

    /// Opens the lock whoever holds it.
    ///
    /// # Safety
    /// Its holder has stopped for good.
    pub unsafe fn break_open(&self) {
        self.holder.store(0, Ordering::Relaxed);
        if self.mutex.is_locked() {
            // SAFETY: promised by the caller.
            unsafe { self.mutex.force_unlock() };
        }
    }
}

fn me() -> u64 {
    let core: *const Core = this();
    core as u64
}

impl<T> Drop for Held<'_, T> {
    fn drop(&mut self) {
        self.lock.holder.store(0, Ordering::Relaxed);
    }
}

impl<T> Deref for Held<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.guard
    }
}

impl<T> DerefMut for Held<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.guard
    }
}
