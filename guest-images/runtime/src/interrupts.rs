//! Every vector ends here: counted, handled if a handler was set, expected if a test said so,
//! and otherwise the end of the guest.

use crate::segments::{CODE, DATA};
use crate::smp::{MAX, WAKE, current};
use core::arch::asm;
use core::sync::atomic::{AtomicPtr, AtomicU64, Ordering};

/// What an interrupt or exception found.
#[derive(Debug)]
#[repr(C)]
pub struct Frame {
    /// R15, R14, R13, R12, R11, R10, R9, R8, RBP, RDI, RSI, RDX, RCX, RBX, RAX.
    pub registers: [u64; 15],
    /// 0 to 255.
    pub vector: u64,
    /// The error code, or 0.
    pub error_code: u64,
    /// Where it hit.
    pub rip: u64,
    /// Code segment.
    pub cs: u64,
    /// Flags.
    pub rflags: u64,
    /// Stack pointer.
    pub rsp: u64,
    /// Stack segment.
    pub ss: u64,
}

/// A fault that [`expect_fault`] caught.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Its vector.
    pub vector: u8,
    /// Its error code, or 0.
    pub error_code: u64,
    /// CR2 at that time.
    pub address: u64,
}

/// What [`on_interrupt`] calls.
pub type Handler = fn(&mut Frame);

static HANDLERS: [AtomicPtr<()>; 256] = [const { AtomicPtr::new(core::ptr::null_mut()) }; 256];

/// What each CPU has for itself.
struct Own {
    counts: [AtomicU64; 256],
    /// Stack pointer to go back to when a fault is expected; 0 when none is.
    resume: AtomicU64,
    caught: [AtomicU64; 3],
}

static OWN: [Own; MAX] = [const {
    Own {
        counts: [const { AtomicU64::new(0) }; 256],
        resume: AtomicU64::new(0),
        caught: [const { AtomicU64::new(0) }; 3],
    }
}; MAX];

fn own() -> &'static Own {
    &OWN[current()]
}

#[repr(C, align(16))]
struct Table(core::cell::UnsafeCell<[[u64; 2]; 256]>);

// SAFETY: `init` fills it before it is loaded, and `set_gate` keeps every entry a gate.
unsafe impl Sync for Table {}

static IDT: Table = Table(core::cell::UnsafeCell::new([[0; 2]; 256]));

unsafe extern "C" {
    static guest_vectors: [u8; 4096];
}

#[repr(C, packed)]
struct Pointer {
    limit: u16,
    base: u64,
}

pub(crate) fn init() {
    let stubs = &raw const guest_vectors as u64;
    // SAFETY: nobody else uses the table yet.
    let idt = unsafe { &mut *IDT.0.get() };
    for (vector, gate) in idt.iter_mut().enumerate() {
        let offset = stubs + 16 * vector as u64;
        // Selector 8, present interrupt gate.
        gate[0] = offset & 0xffff | 8 << 16 | 0x8e << 40 | (offset & 0xffff_0000) << 32;
        gate[1] = offset >> 32;
    }
    load_idt();
}

/// Sets the interrupt stack (0 for none, else 1) of a vector, and the ring that may call it by
/// INT n.
pub fn set_gate(vector: u8, ist: u8, ring: u8) {
    // SAFETY: the entry stays a valid gate at every moment.
    unsafe {
        let gate = IDT.0.get().cast::<u64>().add(2 * usize::from(vector));
        let kept = gate.read_volatile() & !(7 << 32 | 3 << 45);
        gate.write_volatile(kept | u64::from(ist & 7) << 32 | u64::from(ring & 3) << 45);
    }
}

/// Forgets all handlers, and makes every gate what it was at first.
pub fn reset_interrupts() {
    for vector in 0..=255 {
        HANDLERS[usize::from(vector)].store(core::ptr::null_mut(), Ordering::Relaxed);
        set_gate(vector, 0, 0);
    }
}

/// What `expect_fault` waited for will not come any more, on any CPU.
pub(crate) fn abandon() {
    for own in &OWN {
        own.resume.store(0, Ordering::Relaxed);
    }
}

/// Loads the IDT register: for whoever has changed it.
pub fn load_idt() {
    let pointer = Pointer {
        limit: 4095,
        base: IDT.0.get() as u64,
    };
    // SAFETY: the table is complete and lives for ever.
    unsafe { asm!("lidt [{}]", in(reg) &pointer, options(nostack)) };
}

/// Calls `handler` for every interrupt of `vector` from now on.
pub fn on_interrupt(vector: u8, handler: Handler) {
    HANDLERS[usize::from(vector)].store(handler as *mut (), Ordering::Relaxed);
}

/// How often `vector` came to this CPU so far.
pub fn count(vector: u8) -> u64 {
    count_on(current(), vector)
}

/// How often `vector` came to a CPU so far.
pub fn count_on(cpu: usize, vector: u8) -> u64 {
    OWN[cpu].counts[usize::from(vector)].load(Ordering::Relaxed)
}

/// Runs `work` with interrupts on.
pub fn with_interrupts<T>(work: impl FnOnce() -> T) -> T {
    // SAFETY: every vector has a handler.
    unsafe { asm!("sti") };
    let result = work();
    // SAFETY: as before the call.
    unsafe { asm!("cli") };
    result
}

core::arch::global_asm!(
    ".text",
    ".globl guest_try",
    ".globl guest_resume",
    "guest_try:", // rdi = work, rsi = argument, rdx = &resume
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
    "2:",
    "pop rdx",
    "mov qword ptr [rdx], 0",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
    "guest_resume:",
    "mov eax, 1",
    "jmp 2b",
);

unsafe extern "C" {
    fn guest_try(
        work: unsafe extern "C" fn(*mut u8),
        argument: *mut u8,
        resume: *const AtomicU64,
    ) -> u64;
    fn guest_resume();
}

/// Runs `work`, in which an exception is expected: gives the exception, or `None` if none came.
/// After an exception interrupts are off, and the CPU is in ring 0 and 64-bit mode, wherever it
/// happened. An exception with a handler of its own is not caught.
pub fn expect_fault<F: FnOnce()>(work: F) -> Option<Fault> {
    unsafe extern "C" fn call<F: FnOnce()>(work: *mut u8) {
        // SAFETY: the argument is the `Option<F>` below.
        if let Some(work) = unsafe { (*work.cast::<Option<F>>()).take() } {
            work();
        }
    }
    let mut work = Some(work);
    let own = own();
    // SAFETY: the routine keeps the ABI, whichever way it is left.
    let faulted = unsafe { guest_try(call::<F>, (&raw mut work).cast(), &own.resume) };
    (faulted != 0).then(|| Fault {
        vector: own.caught[0].load(Ordering::Relaxed) as u8,
        error_code: own.caught[1].load(Ordering::Relaxed),
        address: own.caught[2].load(Ordering::Relaxed),
    })
}

#[unsafe(no_mangle)]
extern "C" fn guest_dispatch(frame: &mut Frame) {
    let vector = frame.vector as u8;
    let own = own();
    own.counts[usize::from(vector)].fetch_add(1, Ordering::Relaxed);
    let resume = own.resume.load(Ordering::Relaxed);
    let handler = HANDLERS[usize::from(vector)].load(Ordering::Relaxed);
    if vector == WAKE {
        crate::pc::eoi();
    } else if !handler.is_null() {
        // SAFETY: only `on_interrupt` stores here.
        let handler = unsafe { core::mem::transmute::<*mut (), Handler>(handler) };
        handler(frame);
    } else if vector < 32 && resume != 0 {
        let address: u64;
        // SAFETY: reading CR2 changes nothing.
        unsafe { asm!("mov {}, cr2", out(reg) address, options(nomem, nostack)) };
        for (slot, value) in own
            .caught
            .iter()
            .zip([frame.vector, frame.error_code, address])
        {
            slot.store(value, Ordering::Relaxed);
        }
        frame.rip = guest_resume as *const () as u64;
        frame.rsp = resume;
        frame.cs = CODE.into();
        frame.ss = DATA.into();
        frame.rflags = 2;
    } else if vector < 32 {
        let address: u64;
        // SAFETY: reading CR2 changes nothing.
        unsafe { asm!("mov {}, cr2", out(reg) address, options(nomem, nostack)) };
        panic!("unexpected exception, CR2 {address:x}: {frame:x?}");
    }
}
