//! The first instructions of a core that is started by a SIPI (Intel SDM Vol. 3A §9.4.4): from
//! real mode to 64-bit mode on a stack of its own, any number of cores at once.
//!
//! The code is copied into a page below 1 MiB and takes all it needs relative to it. Four more
//! pages behind it hold page tables of its own: that one page by its physical address, readable
//! and executable, and the hypervisor's upper half. So the hypervisor's own tables never hold an
//! identity mapping, and may lie above 4 GiB, where CR3 of a 32-bit core cannot reach.
//!
//! In real mode each core takes a ticket, which is the number of its stack. One that comes when
//! no tickets are left (too late, or uninvited) halts there, touching nothing.

use arch::{HostPhysAddr, PAGE_SIZE, PhysMemory};
use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicU32, Ordering};
use x86::msr::{rdmsr, wrmsr};

/// Pages below 1 MiB that starting needs, one behind the other.
pub const PAGES: u64 = 5;

/// What the code finds behind itself.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Parameters {
    /// Pseudo-descriptor: limit, address.
    gdt_limit: u16,
    gdt_low: u16,
    gdt_high: u16,
    padding: u16,
    /// Far pointers: offset, selector.
    far32: [u32; 2],
    far64: [u32; 2],
    /// Root of the tables to start with.
    cr3: u32,
    efer: u32,
    /// Counted up by each core that comes.
    tickets: u32,
    limit: u32,
    /// Null, 32-bit code, data, 64-bit code.
    gdt: [u64; 4],
    /// Where the upper half begins.
    entry: u64,
    /// Root of the hypervisor's tables.
    root: u64,
    /// Top of the stack of ticket 0, and how far the next ones are.
    stack: u64,
    stride: u64,
    /// [`Plan::main`].
    main: u64,
}

const OFFSET: usize = 256;
const _: () = assert!(OFFSET + size_of::<Parameters>() <= 4096);

/// Selectors of its GDT.
const CODE32: u32 = 0x08;
const CODE64: u32 = 0x18;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const EFER_NXE: u64 = 1 << 11;
const EFER_SVME: u64 = 1 << 12;
const CR4_VMXE: u64 = 1 << 13;

// Data, not code of the hypervisor's: only the copy is ever run.
global_asm!(
    ".section .rodata.tessera_start, \"a\"",
    ".globl tessera_start",
    ".globl tessera_start_32",
    ".globl tessera_start_64",
    ".globl tessera_start_end",
    "tessera_start:",
    ".code16",
    "cli",
    "cld",
    "mov ax, cs",
    "mov ds, ax",
    "mov eax, 1",
    "lock xadd dword ptr [{tickets}], eax",
    "cmp eax, dword ptr [{limit}]",
    "jae 7f",
    "mov esi, eax",
    // Where this page lies.
    "xor ebx, ebx",
    "mov bx, cs",
    "shl ebx, 4",
    "lgdt [{gdt}]",
    "mov eax, cr0",
    "or al, 1",
    "mov cr0, eax",
    // jmp far [far32], with a 32-bit offset
    ".byte 0x66, 0xff, 0x2e",
    ".short {far32}",
    "7:",
    "hlt",
    "jmp 7b",
    ".code32",
    "tessera_start_32:",
    "mov ax, 0x10",
    "mov ds, ax",
    "mov es, ax",
    "mov ss, ax",
    // To IA-32e mode in the order of §10.8.5: PAE, CR3, LME, PG.
    "mov eax, 0x20",
    "mov cr4, eax",
    "mov eax, dword ptr [ebx + {cr3}]",
    "mov cr3, eax",
    "mov ecx, 0xc0000080",
    "mov eax, dword ptr [ebx + {efer}]",
    "xor edx, edx",
    "wrmsr",
    "mov eax, cr0",
    "or eax, 0x80010000",
    "mov cr0, eax",
    // jmp far [ebx + far64]
    ".byte 0xff, 0xab",
    ".long {far64}",
    ".code64",
    "tessera_start_64:",
    // A change of mode leaves the upper halves undefined (Vol. 1 §3.4.1.1).
    "mov ebx, ebx",
    "mov rax, qword ptr [rbx + {entry}]",
    "jmp rax",
    "tessera_start_end:",
    ".text",
    // From here on in the upper half, at its own address.
    ".globl tessera_start_upper",
    "tessera_start_upper:",
    "mov esi, esi",
    "mov rdi, qword ptr [rbx + {main}]",
    "mov rcx, qword ptr [rbx + {stack}]",
    "mov rdx, qword ptr [rbx + {stride}]",
    // The page is not there any more after this.
    "mov rax, qword ptr [rbx + {root}]",
    "mov cr3, rax",
    "imul rdx, rsi",
    "lea rsp, [rcx + rdx]",
    "xor ebp, ebp",
    "xchg rdi, rsi",
    "call rsi",
    "ud2",
    tickets = const OFFSET + core::mem::offset_of!(Parameters, tickets),
    limit = const OFFSET + core::mem::offset_of!(Parameters, limit),
    gdt = const OFFSET + core::mem::offset_of!(Parameters, gdt_limit),
    far32 = const OFFSET + core::mem::offset_of!(Parameters, far32),
    far64 = const OFFSET + core::mem::offset_of!(Parameters, far64),
    cr3 = const OFFSET + core::mem::offset_of!(Parameters, cr3),
    efer = const OFFSET + core::mem::offset_of!(Parameters, efer),
    entry = const OFFSET + core::mem::offset_of!(Parameters, entry),
    root = const OFFSET + core::mem::offset_of!(Parameters, root),
    stack = const OFFSET + core::mem::offset_of!(Parameters, stack),
    stride = const OFFSET + core::mem::offset_of!(Parameters, stride),
    main = const OFFSET + core::mem::offset_of!(Parameters, main),
);

unsafe extern "C" {
    static tessera_start: u8;
    static tessera_start_32: u8;
    static tessera_start_64: u8;
    static tessera_start_end: u8;
    fn tessera_start_upper() -> !;
}

/// How cores are to be started.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// [`PAGES`] pages below 1 MiB.
    pub at: HostPhysAddr,
    /// How many cores may come.
    pub cores: u32,
    /// Top of the first stack, 16-byte aligned, and the distance to each of the next.
    pub stack: u64,
    /// See `stack`.
    pub stride: u64,
    /// Where each core goes on with its ticket (from 0), on its stack, with interrupts off and without tables.
    pub main: extern "C" fn(ticket: u64) -> !,
}

/// Cores may come, until this is closed.
#[derive(Debug)]
pub struct Gate {
    tickets: *const AtomicU32,
    limit: u32,
}

impl Gate {
    /// How many cores have come.
    #[must_use]
    pub fn taken(&self) -> u32 {
        // SAFETY: a word of the page that `open` wrote, which is mapped for good.
        let tickets = unsafe { &*self.tickets };
        tickets.load(Ordering::Acquire).min(self.limit)
    }

    /// Lets no more in, and says how many came.
    pub fn close(self) -> u32 {
        // SAFETY: as in `taken`. Half of the range is far from an overflow by further cores.
        let tickets = unsafe { &*self.tickets };
        tickets.swap(1 << 31, Ordering::AcqRel).min(self.limit)
    }
}

/// The code as bytes.
fn code() -> &'static [u8] {
    // SAFETY: both symbols are in one section, in this order.
    unsafe {
        let start = &raw const tessera_start;
        let length = (&raw const tessera_start_end).offset_from_unsigned(start);
        core::slice::from_raw_parts(start, length)
    }
}

/// Where a part of the code lies in it.
fn offset(part: *const u8) -> u32 {
    (part as u64 - &raw const tessera_start as u64) as u32
}

/// What the copy at `plan.at` finds behind itself.
fn parameters(plan: &Plan, root: HostPhysAddr, efer: u64) -> Parameters {
    let base = plan.at.as_u64() as u32;
    let gdt = base + (OFFSET + core::mem::offset_of!(Parameters, gdt)) as u32;
    Parameters {
        gdt_limit: 4 * 8 - 1,
        gdt_low: gdt as u16,
        gdt_high: (gdt >> 16) as u16,
        padding: 0,
        far32: [base + offset(&raw const tessera_start_32), CODE32],
        far64: [base + offset(&raw const tessera_start_64), CODE64],
        cr3: base + PAGE_SIZE as u32,
        efer: (efer & EFER_NXE | EFER_LME) as u32,
        tickets: 0,
        limit: plan.cores,
        gdt: [
            0,
            0x00cf_9b00_0000_ffff,
            0x00cf_9300_0000_ffff,
            0x00af_9b00_0000_ffff,
        ],
        entry: tessera_start_upper as *const () as u64,
        root: root.as_u64(),
        stack: plan.stack,
        stride: plan.stride,
        main: plan.main as *const () as u64,
    }
}

/// Writes code, parameters and tables. Cores that get a SIPI for `plan.at` come, until the gate is
/// closed.
///
/// # Safety
/// The pages are free RAM, mapped at `pointer` for good, and stay what this makes of them. `root`
/// is in use by the caller; `phys` reaches all of it. The stacks are mapped and nobody's.
pub unsafe fn open(
    phys: &impl PhysMemory,
    pointer: *mut u8,
    root: HostPhysAddr,
    plan: &Plan,
) -> Gate {
    const PRESENT: u64 = 1;
    const WRITABLE: u64 = 1 << 1;
    // SAFETY: EFER exists in 64-bit mode.
    let parameters = parameters(plan, root, unsafe { rdmsr(arch::msr::IA32_EFER) });
    phys.zero(plan.at, PAGES * PAGE_SIZE);
    phys.write(plan.at, code());
    // SAFETY: within the first page (asserted above), which the caller gives us.
    unsafe {
        pointer
            .add(OFFSET)
            .cast::<Parameters>()
            .write_unaligned(parameters)
    };
    let table = |index: u64| plan.at.wrapping_add((1 + index) * PAGE_SIZE);
    for index in 256..512 {
        let at = 8 * index;
        phys.write_u64(
            table(0).wrapping_add(at),
            phys.read_u64(root.wrapping_add(at)),
        );
    }
    for level in 0..3 {
        let next = table(level + 1).as_u64() | PRESENT | WRITABLE;
        phys.write_u64(table(level), next);
    }
    let page = plan.at.as_u64();
    phys.write_u64(table(3).wrapping_add(8 * (page >> 12)), page | PRESENT);
    // SAFETY: in the first page, aligned to 4, and accessed by atomic instructions alone.
    let tickets = unsafe {
        pointer
            .add(OFFSET + core::mem::offset_of!(Parameters, tickets))
            .cast()
    };
    Gate {
        tickets,
        limit: plan.cores,
    }
}

/// Control registers and MSRs that all cores must have alike.
#[derive(Clone, Copy, Debug)]
pub struct Control {
    cr0: u64,
    cr4: u64,
    efer: u64,
    pat: u64,
    /// Sum over the memory-type range registers; 0 without any.
    memory_types: u64,
}

impl Control {
    /// Those of the calling core, without what turns virtualization on.
    #[must_use]
    pub fn read() -> Self {
        let (cr0, cr4): (u64, u64);
        // SAFETY: reads in ring 0; PAT and EFER exist on every processor with 64-bit mode.
        unsafe {
            asm!("mov {}, cr0", "mov {}, cr4", out(reg) cr0, out(reg) cr4, options(nomem, nostack));
            Self {
                cr0,
                cr4: cr4 & !CR4_VMXE,
                efer: rdmsr(arch::msr::IA32_EFER) & !EFER_SVME,
                pat: rdmsr(arch::msr::IA32_PAT),
                memory_types: memory_types(),
            }
        }
    }

    /// Gives them to the calling core. Memory types are the firmware's (Intel SDM Vol. 3A §12.11.8):
    /// `false` when they are not those of the other core.
    ///
    /// # Safety
    /// The calling core runs on the same page tables as the one they were read on.
    #[must_use]
    pub unsafe fn apply(&self) -> bool {
        // SAFETY: a core of the same machine takes the same values. CR0 turns caching on, which
        // INIT leaves off; reloading CR3 drops translations with the old memory types.
        unsafe {
            asm!("mov cr0, {}", "mov cr4, {}", in(reg) self.cr0, in(reg) self.cr4, options(nostack));
            wrmsr(arch::msr::IA32_EFER, self.efer | EFER_LMA);
            wrmsr(arch::msr::IA32_PAT, self.pat);
            asm!("mov {0}, cr3", "mov cr3, {0}", out(reg) _, options(nostack));
        }
        memory_types() == self.memory_types
    }
}

/// A sum over all memory-type range registers (§12.11).
fn memory_types() -> u64 {
    const MTRR_CAP: u32 = 0xfe;
    const DEFAULT_TYPE: u32 = 0x2ff;
    const FIXED: [u32; 11] = [
        0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f,
    ];
    if core::arch::x86_64::__cpuid(1).edx & 1 << 12 == 0 {
        return 0;
    }
    // SAFETY: CPUID says that there are MTRRs; MTRRcap says which.
    let read = |index| unsafe { rdmsr(index) };
    let cap = read(MTRR_CAP);
    let fixed = FIXED.iter().copied().filter(|_| cap & 1 << 8 != 0);
    let variable = 0x200..0x200 + 2 * (cap as u32 & 0xff);
    fixed
        .chain(variable)
        .chain([DEFAULT_TYPE])
        .fold(1, |sum: u64, index| {
            sum.rotate_left(7).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ read(index)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_fits_before_its_parameters() {
        assert!(code().len() <= OFFSET, "{} bytes", code().len());
        let part = |part: *const u8| offset(part) as usize;
        let (code32, code64) = (
            part(&raw const tessera_start_32),
            part(&raw const tessera_start_64),
        );
        assert!(0 < code32 && code32 < code64 && code64 < code().len());
        assert_eq!(code()[0], 0xfa, "interrupts go off first");
    }

    #[test]
    fn a_core_that_comes_after_the_gate_was_closed_gets_no_ticket() {
        let tickets = AtomicU32::new(0);
        // What the code does in real mode: `lock xadd`, then the comparison without sign.
        let comes = || tickets.fetch_add(1, Ordering::AcqRel) < 3;
        let gate = Gate {
            tickets: &raw const tickets,
            limit: 3,
        };
        assert!(comes() && comes());
        assert_eq!(gate.taken(), 2);
        assert_eq!(gate.close(), 2);
        assert!(!comes() && !comes());
    }

    #[test]
    fn far_pointers_and_the_gdt_are_where_the_page_is() {
        extern "C" fn main(_: u64) -> ! {
            unreachable!("only its address is used")
        }
        let plan = Plan {
            at: HostPhysAddr::new(0x9_8000),
            cores: 3,
            stack: 0x1000,
            stride: 0x4_0000,
            main,
        };
        let parameters = parameters(
            &plan,
            HostPhysAddr::new(5 << 32),
            EFER_NXE | EFER_LMA | EFER_SVME,
        );
        let gdt = u32::from(parameters.gdt_low) | u32::from(parameters.gdt_high) << 16;
        assert_eq!(gdt % 8, 0);
        assert_eq!(
            gdt,
            0x9_8000 + 256 + core::mem::offset_of!(Parameters, gdt) as u32
        );
        assert_eq!(parameters.far32[0] >> 12, 0x98);
        assert_eq!((parameters.far32[1], parameters.far64[1]), (0x08, 0x18));
        assert_eq!((parameters.cr3, parameters.root), (0x9_9000, 5 << 32));
        assert_eq!(u64::from(parameters.efer), EFER_LME | EFER_NXE);
    }
}
