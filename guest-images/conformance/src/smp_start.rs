//! INIT and SIPI (Intel SDM Vol. 3A §8.4, §9.1 and table 9-1; §11.4.7 for the local APIC).

use crate::util::{PATIENCE, need, not_in_tcg, wait, wait_until};
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use guest_runtime::cpu::{cpuid, rdmsr, set_dr0, set_dr6, set_dr7, wrmsr};
use guest_runtime::pc::{APIC_BASE, MASKED, lapic, reg, set_lapic};
use guest_runtime::{guest_test, on_interrupt, smp};

/// That there is a second CPU: how many there are.
pub fn need_two() -> usize {
    need(smp::count() > 1, "second CPU");
    smp::count()
}

core::arch::global_asm!(
    // Runs at 800:0. Writes down what a SIPI left in the registers, counts itself, and halts.
    ".text",
    ".code16",
    "smp_probe:",
    "mov dword ptr [0x8800], eax",
    "mov dword ptr [0x8804], ebx",
    "mov dword ptr [0x8808], ecx",
    "mov dword ptr [0x880c], edx",
    "mov dword ptr [0x8810], esi",
    "mov dword ptr [0x8814], edi",
    "mov dword ptr [0x8818], ebp",
    "mov dword ptr [0x881c], esp",
    "mov esp, 0x8ff0",
    "pushfd",
    "pop dword ptr [0x8820]",
    "mov word ptr [0x8824], cs",
    "mov word ptr [0x8828], ds",
    "mov word ptr [0x882c], es",
    "mov word ptr [0x8830], ss",
    "mov word ptr [0x8834], fs",
    "mov word ptr [0x8838], gs",
    "mov eax, cr0",
    "mov dword ptr [0x883c], eax",
    "mov eax, cr2",
    "mov dword ptr [0x8840], eax",
    "mov eax, cr3",
    "mov dword ptr [0x8844], eax",
    "mov eax, cr4",
    "mov dword ptr [0x8848], eax",
    "mov eax, dr6",
    "mov dword ptr [0x884c], eax",
    "mov eax, dr7",
    "mov dword ptr [0x8850], eax",
    "mov eax, dr0",
    "mov dword ptr [0x8854], eax",
    "sgdt [0x8858]",
    "sidt [0x8860]",
    "mov ecx, 0xc0000080",
    "rdmsr",
    "mov dword ptr [0x8868], eax",
    "mov ecx, 0x1b",
    "rdmsr",
    "mov dword ptr [0x886c], eax",
    "mov ecx, 0x277",
    "rdmsr",
    "mov dword ptr [0x8870], eax",
    "mov dword ptr [0x8874], edx",
    "lock inc dword ptr [0x8880]",
    "2: cli",
    "hlt",
    "jmp 2b",
    "smp_probe_nmi:",
    "lock inc dword ptr cs:[0x884]",
    "iret",
    "smp_probe_end:",
    ".code64",
);

unsafe extern "C" {
    static smp_probe: u8;
    static smp_probe_nmi: u8;
    static smp_probe_end: u8;
}

/// What [`smp_probe`] wrote: by its offset.
fn probed(offset: u64) -> u32 {
    // SAFETY: the probe's page is RAM.
    unsafe { ((0x8800 + offset) as *const u32).read_volatile() }
}

fn runs() -> u32 {
    probed(0x80)
}

/// Puts the probe at page 8 and clears what it writes.
fn with_probe(work: impl FnOnce(u8)) {
    let start = &raw const smp_probe;
    let length = &raw const smp_probe_end as usize - start as usize;
    // SAFETY: the symbols enclose the code.
    let code = unsafe { core::slice::from_raw_parts(start, length) };
    smp::with_trampoline(code, |page| {
        for offset in (0..0x100).step_by(4) {
            // SAFETY: as in `probed`.
            unsafe { ((0x8800 + offset) as *mut u32).write_volatile(0) };
        }
        work(page);
    });
}

/// Work for another CPU: counts until it is stopped.
static COUNTER: AtomicU64 = AtomicU64::new(0);
static STOP: AtomicBool = AtomicBool::new(false);

fn count_on() {
    while !STOP.load(Ordering::SeqCst) {
        COUNTER.fetch_add(1, Ordering::SeqCst);
    }
}

fn counts() -> bool {
    let before = COUNTER.load(Ordering::SeqCst);
    wait_until(PATIENCE, || COUNTER.load(Ordering::SeqCst) != before)
}

/// Lets CPU 1 count while `here` runs.
fn while_it_counts(here: impl FnOnce()) {
    STOP.store(false, Ordering::SeqCst);
    smp::beside([1], &count_on, || {
        assert!(counts(), "it does not run");
        here();
        STOP.store(true, Ordering::SeqCst);
    });
}

#[guest_test]
fn smp_every_cpu_of_the_madt_starts() {
    let count = need_two();
    for cpu in 1..count {
        for other in 0..cpu {
            assert_ne!(smp::apic_id(cpu), smp::apic_id(other));
        }
    }
    smp::start_all();
    for cpu in 0..count {
        let (index, id) = smp::on(cpu, || (smp::current(), lapic(reg::ID) >> 24));
        assert_eq!((index, id), (cpu, smp::apic_id(cpu)));
    }
}

#[guest_test]
fn smp_cpus_start_and_park_again_and_again() {
    need_two();
    for _ in 0..20 {
        smp::start_all();
        smp::on(1, || ());
        smp::park_others();
    }
}

#[guest_test]
fn smp_registers_after_init_and_sipi_are_the_manuals() {
    need_two();
    // Something to be reset, and something that stays.
    let pat = smp::on(1, || {
        // SAFETY: no breakpoint is enabled but one where nothing is; the PAT is a legal one, and
        // all memory in use stays write-back by entry 0.
        unsafe {
            set_dr0(0x1234_5678);
            set_dr7(0x401);
            set_dr6(0xffff_0ff1);
            guest_runtime::cpu::set_cr2(0x1000);
            wrmsr(0x277, 0x0007_0106_0007_0406);
            rdmsr(0x277)
        }
    });
    smp::park(1);
    with_probe(|page| {
        wait(1_000);
        assert_eq!(runs(), 0, "it runs before the SIPI");
        smp::send(smp::apic_id(1), smp::STARTUP | u32::from(page));
        assert!(wait_until(PATIENCE, || runs() != 0), "no start");
        for (offset, name) in [
            (0, "EAX"),
            (4, "EBX"),
            (8, "ECX"),
            (0x10, "ESI"),
            (0x14, "EDI"),
            (0x18, "EBP"),
            (0x1c, "ESP"),
            (0x28, "DS"),
            (0x2c, "ES"),
            (0x30, "SS"),
            (0x34, "FS"),
            (0x38, "GS"),
            (0x40, "CR2"),
            (0x44, "CR3"),
            (0x48, "CR4"),
            (0x54, "DR0"),
            (0x68, "EFER"),
        ] {
            assert_eq!(probed(offset), 0, "{name}");
        }
        assert_eq!(probed(0xc), cpuid(1, 0)[0], "EDX");
        assert_eq!(probed(0x20), 2, "EFLAGS");
        assert_eq!(probed(0x24), 0x800, "CS");
        // CD and NW are kept by INIT.
        assert_eq!(probed(0x3c) & !0x6000_0000, 0x10, "CR0");
        assert_eq!(
            (probed(0x4c), probed(0x50)),
            (0xffff_0ff0, 0x400),
            "DR6, DR7"
        );
        for (offset, name) in [(0x58, "GDTR"), (0x60, "IDTR")] {
            assert_eq!(
                (probed(offset), probed(offset + 4) as u16),
                (0xffff, 0),
                "{name}"
            );
        }
        assert_eq!(
            probed(0x6c),
            0xfee0_0800,
            "IA32_APIC_BASE: enabled, and not the BSP"
        );
        let kept = u64::from(probed(0x74)) << 32 | u64::from(probed(0x70));
        assert_eq!(kept, pat, "INIT leaves the PAT alone");
    });
    smp::park(1);
}

static APIC: [AtomicU32; 16] = [const { AtomicU32::new(0) }; 16];
const APIC_REGISTERS: [(u32, u32); 16] = [
    (reg::TPR, 0),
    (reg::PPR, 0),
    (reg::LDR, 0),
    (reg::DFR, 0xffff_ffff),
    (reg::SVR, 0xff),
    (reg::ISR, 0),
    (reg::TMR, 0),
    (reg::IRR + 0x20, 0),
    (reg::ESR, 0),
    (reg::LVT_TIMER, MASKED),
    (reg::LVT_LINT0, MASKED),
    (reg::LVT_LINT1, MASKED),
    (reg::LVT_ERROR, MASKED),
    (reg::INITIAL, 0),
    (reg::CURRENT, 0),
    (reg::DIVIDE, 0),
];

#[guest_test]
fn smp_apic_after_init_is_reset_but_for_its_id() {
    fn note() {
        for (slot, (register, _)) in APIC.iter().zip(APIC_REGISTERS) {
            slot.store(lapic(register), Ordering::SeqCst);
        }
    }
    need_two();
    smp::on(1, || {
        for (register, value) in [
            (reg::LDR, 0x0200_0000),
            (reg::TPR, 0x20),
            (reg::DIVIDE, 0xb),
            (reg::LVT_TIMER, MASKED | 0x55),
            (reg::LVT_LINT0, 0x700),
            (reg::LVT_ERROR, 0x56),
            (reg::INITIAL, 0xffff_ffff),
        ] {
            set_lapic(register, value);
        }
    });
    smp::park(1);
    smp::on_start(Some(note));
    smp::start(1);
    smp::on_start(None);
    for (slot, (register, wanted)) in APIC.iter().zip(APIC_REGISTERS) {
        let found = slot.load(Ordering::SeqCst);
        assert_eq!(found, wanted, "register {register:x}");
    }
    assert_eq!(smp::on(1, || lapic(reg::ID) >> 24), smp::apic_id(1));
}

#[guest_test]
fn smp_only_the_first_cpu_is_the_bootstrap_processor() {
    for cpu in 0..need_two() {
        // SAFETY: every local APIC has this MSR.
        let base = smp::on(cpu, || unsafe { rdmsr(APIC_BASE) });
        assert_eq!(
            base,
            0xfee0_0800 | if cpu == 0 { 0x100 } else { 0 },
            "CPU {cpu}"
        );
    }
}

#[guest_test]
fn smp_sipi_to_a_running_cpu_is_ignored() {
    need_two();
    with_probe(|page| {
        while_it_counts(|| {
            for _ in 0..10 {
                smp::send(smp::apic_id(1), smp::STARTUP | u32::from(page));
            }
            wait(1_000);
            assert!(counts(), "it was stopped");
            assert_eq!(runs(), 0, "it was started again");
        });
    });
    assert_eq!(smp::on(1, smp::current), 1);
}

#[guest_test]
fn smp_second_sipi_is_ignored() {
    need_two();
    with_probe(|page| {
        smp::start_at(1, page);
        assert!(wait_until(PATIENCE, || runs() != 0), "no start");
        smp::send(smp::apic_id(1), smp::STARTUP | u32::from(page));
        wait(2_000);
        assert_eq!(runs(), 1);
    });
    smp::park(1);
}

#[guest_test]
fn smp_init_parks_a_running_cpu_and_sipi_starts_it_again() {
    need_two();
    while_it_counts(|| {
        smp::park(1);
        assert!(
            wait_until(PATIENCE, || {
                let before = COUNTER.load(Ordering::SeqCst);
                wait(1_000);
                COUNTER.load(Ordering::SeqCst) == before
            }),
            "it runs on"
        );
    });
    let came = smp::start_by(1, |page| {
        smp::send(smp::apic_id(1), smp::STARTUP | u32::from(page));
    });
    assert!(came, "no start after INIT");
    while_it_counts(|| ());
}

#[guest_test]
fn smp_init_wakes_nobody_from_a_halt_but_parks() {
    need_two();
    // It halts with interrupts off: INIT and SIPI are the way out.
    smp::beside(
        [1],
        &|| loop {
            // SAFETY: what is wanted.
            unsafe { core::arch::asm!("cli", "hlt") };
        },
        || {
            wait(1_000);
            smp::park(1);
        },
    );
    while_it_counts(|| ());
}

#[guest_test]
fn smp_init_deassert_does_nothing() {
    need_two();
    while_it_counts(|| {
        smp::send(0, smp::ALL | 0x8500);
        wait(500);
        assert!(counts());
    });
}

#[guest_test]
fn smp_sipi_starts_at_its_vector() {
    need_two();
    // At page 9 lies a jump to the probe of page 8.
    const JUMP: u64 = 0x9000;
    // SAFETY: the page is RAM; its first bytes are put back.
    let kept = unsafe { (JUMP as *const u64).read_volatile() };
    with_probe(|_| {
        // ea 00 00 00 08: jmp 800:0.
        // SAFETY: as above.
        unsafe { (JUMP as *mut u64).write_volatile(0x0008_0000_00ea) };
        smp::start_at(1, (JUMP >> 12) as u8);
        assert!(wait_until(PATIENCE, || runs() == 1), "no start at page 9");
    });
    smp::park(1);
    // SAFETY: as above.
    unsafe { (JUMP as *mut u64).write_volatile(kept) };
}

#[guest_test]
fn smp_all_start_by_one_broadcast() {
    let count = need_two() as u32;
    with_probe(|page| {
        smp::send(0, smp::OTHERS | smp::INIT);
        wait(500);
        smp::send(0, smp::OTHERS | smp::STARTUP | u32::from(page));
        assert!(
            wait_until(PATIENCE, || runs() == count - 1),
            "{} started",
            runs()
        );
        smp::send(0, smp::OTHERS | smp::STARTUP | u32::from(page));
        wait(1_000);
        assert_eq!(runs(), count - 1);
        smp::send(0, smp::OTHERS | smp::INIT);
        wait(500);
    });
}

#[guest_test]
fn smp_nmi_and_interrupts_start_no_parked_cpu() {
    need_two();
    not_in_tcg("takes NMIs while it waits for a SIPI");
    const VECTOR_2: u64 = 8;
    on_interrupt(0x71, guest_runtime::pc::handle_eoi);
    smp::park(1);
    // SAFETY: the real-mode vector of NMIs, in RAM, is put back below.
    let kept = unsafe { (VECTOR_2 as *const u32).read_volatile() };
    with_probe(|page| {
        let handler = &raw const smp_probe_nmi as u32 - &raw const smp_probe as u32;
        // SAFETY: as above.
        unsafe { (VECTOR_2 as *mut u32).write_volatile(0x800 << 16 | handler) };
        smp::send(smp::apic_id(1), smp::NMI);
        smp::send(smp::apic_id(1), smp::NMI);
        smp::send(smp::apic_id(1), 0x71);
        wait(1_000);
        assert_eq!((runs(), probed(0x84)), (0, 0), "it runs in wait-for-SIPI");
        smp::send(smp::apic_id(1), smp::STARTUP | u32::from(page));
        assert!(wait_until(PATIENCE, || runs() == 1), "no start");
        wait(1_000);
        assert!(probed(0x84) <= 1, "one NMI at most is kept");
        smp::park(1);
    });
    // SAFETY: as above.
    unsafe { (VECTOR_2 as *mut u32).write_volatile(kept) };
}
