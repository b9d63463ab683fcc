//! Named cases, run one after the other.

use crate::{cmdline, exit, interrupts, println, serial, smp};
use core::fmt::Display;
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};

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

static BEFORE_EACH: AtomicPtr<()> = AtomicPtr::new(core::ptr::null_mut());
static RUNNING: AtomicPtr<Case> = AtomicPtr::new(core::ptr::null_mut());
static PASSED: AtomicUsize = AtomicUsize::new(0);
static FAILED: AtomicUsize = AtomicUsize::new(0);
static SKIPPED: AtomicUsize = AtomicUsize::new(0);
/// A CPU has left the running case; the others find out.
static LEFT: AtomicBool = AtomicBool::new(false);
static NEXT: AtomicUsize = AtomicUsize::new(0);

fn cases() -> &'static [Case] {
    let start = (&raw const guest_tests_start).cast::<Case>();
    let end = (&raw const guest_tests_end).cast::<Case>();
    let count = (end as usize - start as usize) / size_of::<Case>();
    // SAFETY: the linker script puts all cases, and nothing else, between the two symbols.
    unsafe { core::slice::from_raw_parts(start, count) }
}

/// Runs all cases, or those whose name holds one of the command line's words, each after
/// `before_each`; prints `test <name> ... ok`, `FAILED` or `skipped (<why>)` for each and a
/// closing line `<n> passed, <m> failed, <k> skipped`; and ends the guest: value 0 when none
/// failed, 1 else.
pub fn run_tests(before_each: fn()) -> ! {
    BEFORE_EACH.store(before_each as *mut (), Ordering::Relaxed);
    go_on()
}

fn wanted(case: &Case) -> bool {
    // A loader may put its own name first, which holds a slash or a dot; and options hold `=`.
    let mut words = cmdline()
        .split_whitespace()
        .filter(|word| !word.contains(['/', '.', '=']))
        .peekable();
    words.peek().is_none() || words.any(|word| case.name.contains(word))
}

extern "C" fn go_on() -> ! {
    // SAFETY: only `run_tests` stores here, and before anything comes here.
    let before_each =
        unsafe { core::mem::transmute::<*mut (), fn()>(BEFORE_EACH.load(Ordering::Relaxed)) };
    while let Some(case) = cases().get(NEXT.fetch_add(1, Ordering::Relaxed)) {
        if !wanted(case) {
            continue;
        }
        before_each();
        LEFT.store(false, Ordering::SeqCst);
        RUNNING.store(core::ptr::from_ref(case).cast_mut(), Ordering::Relaxed);
        (case.run)();
        RUNNING.store(core::ptr::null_mut(), Ordering::Relaxed);
        before_each();
        PASSED.fetch_add(1, Ordering::Relaxed);
        println!("test {} ... ok", case.name);
    }
    let failed = FAILED.load(Ordering::Relaxed);
    println!(
        "{} passed, {failed} failed, {} skipped",
        PASSED.load(Ordering::Relaxed),
        SKIPPED.load(Ordering::Relaxed)
    );
    exit(u32::from(failed > 0))
}

/// Leaves the running case, with all CPUs' stacks, and goes on with the next one, on the CPU that
/// booted.
pub(crate) fn leave() -> ! {
    if smp::current() != 0 {
        smp::leave();
    }
    smp::park_others();
    serial::abandon();
    interrupts::abandon();
    // SAFETY: what is on the stack is never looked at again; interrupts off and a flat stack is
    // how every case starts.
    unsafe {
        core::arch::asm!(
            "cli",
            "lea rsp, [guest_stack_top]",
            "xor ebp, ebp",
            "call {}",
            "ud2",
            sym go_on,
            options(noreturn)
        )
    }
}

/// Ends the running case: this machine lacks what it checks.
pub fn skip(why: impl Display) -> ! {
    let case = RUNNING.swap(core::ptr::null_mut(), Ordering::Relaxed);
    // SAFETY: `go_on` stored a case of the program, which lives for ever, or null.
    if let Some(case) = unsafe { case.as_ref() } {
        LEFT.store(true, Ordering::SeqCst);
        SKIPPED.fetch_add(1, Ordering::Relaxed);
        println!("test {} ... skipped ({why})", case.name);
        leave()
    }
    panic!("{why}, outside a case")
}

/// A panic in a case: the case failed, and the others still run.
pub(crate) fn failed(info: &core::panic::PanicInfo<'_>) {
    let case = RUNNING.swap(core::ptr::null_mut(), Ordering::Relaxed);
    // SAFETY: `go_on` stored a case of the program, which lives for ever, or null.
    let Some(case) = (unsafe { case.as_ref() }) else {
        if LEFT.load(Ordering::SeqCst) {
            leave()
        }
        return;
    };
    LEFT.store(true, Ordering::SeqCst);
    FAILED.fetch_add(1, Ordering::Relaxed);
    println!("test {} ... FAILED", case.name);
    println!("    {info}");
    leave()
}
