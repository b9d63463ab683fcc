//! Named cases, run one after the other.

use crate::{exit, println};
use core::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

/// A case: see [`crate::guest_test`].
#[repr(C)]
#[derive(Debug)]
pub struct Case {
    /// The function's name.
    pub name: &'static str,
    /// Returns when the case passes; panics when it fails.
    pub run: fn(),
}

unsafe extern "C" {
    static guest_tests_start: u8;
    static guest_tests_end: u8;
}

static RUNNING: AtomicPtr<Case> = AtomicPtr::new(core::ptr::null_mut());
static PASSED: AtomicUsize = AtomicUsize::new(0);
static FAILED: AtomicUsize = AtomicUsize::new(0);
static NEXT: AtomicUsize = AtomicUsize::new(0);

fn cases() -> &'static [Case] {
    let start = (&raw const guest_tests_start).cast::<Case>();
    let end = (&raw const guest_tests_end).cast::<Case>();
    let count = (end as usize - start as usize) / size_of::<Case>();
    // SAFETY: the linker script puts all cases, and nothing else, between the two symbols.
    unsafe { core::slice::from_raw_parts(start, count) }
}

/// Runs all cases, prints `test <name> ... ok` or `FAILED` for each, a closing line
/// `<n> passed, <m> failed`, and ends the guest: value 0 when all passed, 1 else.
pub fn run_tests() -> ! {
    let cases = cases();
    loop {
        let index = NEXT.fetch_add(1, Ordering::Relaxed);
        let Some(case) = cases.get(index) else { break };
        RUNNING.store(core::ptr::from_ref(case).cast_mut(), Ordering::Relaxed);
        (case.run)();
        RUNNING.store(core::ptr::null_mut(), Ordering::Relaxed);
        PASSED.fetch_add(1, Ordering::Relaxed);
        println!("test {} ... ok", case.name);
    }
    let failed = FAILED.load(Ordering::Relaxed);
    println!("{} passed, {failed} failed", PASSED.load(Ordering::Relaxed));
    exit(u32::from(failed > 0))
}

/// A panic in a case: the case failed, and the others still run. What the case had set up (an
/// interrupt left on, a device left armed) is its own fault and may show in the next one.
pub(crate) fn failed(info: &core::panic::PanicInfo<'_>) {
    let case = RUNNING.swap(core::ptr::null_mut(), Ordering::Relaxed);
    if case.is_null() {
        return;
    }
    // SAFETY: `run_tests` stored a case of the program, which lives for ever.
    let case = unsafe { &*case };
    FAILED.fetch_add(1, Ordering::Relaxed);
    println!("test {} ... FAILED", case.name);
    println!("    {info}");
    // SAFETY: interrupts off is how every case starts.
    unsafe { core::arch::asm!("cli") };
    run_tests()
}
