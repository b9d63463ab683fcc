//! Work that may be abandoned: a panic while a core works for one VM gives up that work's stack
//! and comes back here, so that the VM dies and the machine does not.

use crate::host::InterruptFrame;
use crate::percpu::this;
use core::arch::global_asm;
use core::sync::atomic::{AtomicU64, Ordering};

// The callee-saved registers of the System V ABI are what `abandon` must bring back.
global_asm!(
    ".text",
    ".globl tessera_guard_run",
    ".globl tessera_guard_abandon",
    "tessera_guard_run:", // rdi = work, rsi = argument, rdx = &resume of this core
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "push rdx",
    "mov [rdx], rsp",
    "mov rax, rdi",
    "mov rdi, rsi",
    "call rax",
    "xor eax, eax",
    "tessera_guard_leave:",
    "pop rdx",
    "mov qword ptr [rdx], 0",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
    "tessera_guard_abandon:", // rdi = the saved stack pointer
    "mov rsp, rdi",
    "mov eax, 1",
    "jmp tessera_guard_leave",
);

unsafe extern "C" {
    fn tessera_guard_run(
        work: unsafe extern "C" fn(*mut u8),
        argument: *mut u8,
        resume: *const AtomicU64,
    ) -> u64;
    fn tessera_guard_abandon(stack: u64) -> !;
}

/// The work was given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Abandoned;

/// Runs `work` so that [`abandon`] can give it up. What it had on its stack is not dropped then:
/// anything it owned leaks, and anything it borrowed may be half done, which is why the caller
/// destroys the VM it worked for.
///
/// # Errors
/// The work was abandoned.
pub fn run<F: FnOnce()>(work: F) -> Result<(), Abandoned> {
    unsafe extern "C" fn call<F: FnOnce()>(work: *mut u8) {
        // SAFETY: `argument` below is this `Option<F>`, alive until `run` returns.
        if let Some(work) = unsafe { (*work.cast::<Option<F>>()).take() } {
            work();
        }
    }
    let mut work = Some(work);
    // SAFETY: the routine keeps the ABI, whichever way it is left.
    let left = unsafe { tessera_guard_run(call::<F>, (&raw mut work).cast(), &this().resume) };
    if left == 0 { Ok(()) } else { Err(Abandoned) }
}

/// Whether the core is inside [`run`].
#[must_use]
pub fn is_running() -> bool {
    this().resume.load(Ordering::Relaxed) != 0
}

/// Makes the work under way one that cannot be given up.
pub fn forget() {
    this().resume.store(0, Ordering::Relaxed);
}

/// Gives up the work under way; [`run`] returns an error. Comes back only when there is none.
///
/// # Safety
/// No lock and no other shared state is held by the work.
pub unsafe fn abandon() {
    let stack = this().resume.load(Ordering::Relaxed);
    if stack != 0 {
        // SAFETY: `stack` is the frame of a `tessera_guard_run` that has not returned.
        unsafe { tessera_guard_abandon(stack) }
    }
}

/// [`abandon`] for an interrupt's handler: the work that was interrupted is given up when the
/// handler returns. Its IRET does that, because without one NMIs would stay blocked (Intel SDM
/// Vol. 3A §6.7.1). False when there is no such work.
///
/// # Safety
/// As for [`abandon`], about what was interrupted.
pub unsafe fn abandon_after(frame: &mut InterruptFrame) -> bool {
    const RDI: usize = 9;
    let stack = this().resume.load(Ordering::Relaxed);
    if stack != 0 {
        frame.rip = tessera_guard_abandon as *const () as u64;
        frame.registers[RDI] = stack;
    }
    stack != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finished_work_returns_and_abandoned_work_is_reported() {
        let mut done = 0;
        assert_eq!(run(|| done += 1), Ok(()));
        let result = run(|| {
            done += 1;
            assert!(is_running());
            // SAFETY: nothing is held.
            unsafe { abandon() };
            done += 100;
        });
        assert_eq!((result, done), (Err(Abandoned), 2));
        assert!(!is_running());
    }
}
