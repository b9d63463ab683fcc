//! The local APIC: xAPIC by MMIO and x2APIC by MSR (Intel SDM Vol. 3A §11.4–11.12,
//! AMD APM Vol. 2 §16.3–16.16).
//!
//! Registers live in one 4 KiB page in the hardware's layout, so that VT-x can use the very page
//! as a vCPU's virtual-APIC page. Only TPR may change there behind this code's back (TPR shadow),
//! so TPR is always read from the page; what else the run loop asks for at each entry (the
//! highest requested and the highest in-service vector) is kept beside it.
//!
//! The timer's input clock is 1 GHz, so that one tick is a nanosecond and the divider a shift.
//! CPUID leaf 15H names the same frequency as the core crystal clock.

use super::{DeliveryMode, Ipi, Message, Shorthand};
use crate::clock::TscClock;
use alloc::{boxed::Box, vec::Vec};
use arch::{Nanos, Vector};
use core::sync::atomic::{AtomicU32, Ordering::Relaxed};
use serde::{Deserialize, Serialize};

/// Frequency of the timer's input clock, before the divider.
pub const TIMER_HZ: u32 = 1_000_000_000;

/// The shortest period at which a periodic timer interrupts, in nanoseconds. Shorter periods
/// keep their phase but skip turns: else a guest could ask for the next interrupt to be due
/// before its handler has run an instruction.
const MIN_PERIOD: u64 = 10_000;

/// Version 14H, six LVT entries (the highest is 5), EOI-broadcast suppression.
const VERSION_VALUE: u32 = 0x14 | 5 << 16 | 1 << 24;

// Register numbers: MMIO offset / 16, MSR index − 800H.
const ID: u8 = 0x02;
const VERSION: u8 = 0x03;
const TPR: u8 = 0x08;
const APR: u8 = 0x09;
const PPR: u8 = 0x0a;
const EOI: u8 = 0x0b;
const RRR: u8 = 0x0c;
const LDR: u8 = 0x0d;
const DFR: u8 = 0x0e;
const SVR: u8 = 0x0f;
const ISR: u8 = 0x10;
const TMR: u8 = 0x18;
const IRR: u8 = 0x20;
const ESR: u8 = 0x28;
const ICR: u8 = 0x30;
const ICR_HIGH: u8 = 0x31;
const LVT_TIMER: u8 = 0x32;
const LVT_THERMAL: u8 = 0x33;
const LVT_PERF: u8 = 0x34;
const LVT_LINT0: u8 = 0x35;
const LVT_LINT1: u8 = 0x36;
const LVT_ERROR: u8 = 0x37;
const INITIAL_COUNT: u8 = 0x38;
const CURRENT_COUNT: u8 = 0x39;
const DIVIDE: u8 = 0x3e;
const SELF_IPI: u8 = 0x3f;
const REGISTERS: usize = 0x40;

const LVT_MASKED: u32 = 1 << 16;
const LVT_LEVEL: u32 = 1 << 15;
const SVR_ENABLE: u32 = 1 << 8;
const SVR_NO_EOI_BROADCAST: u32 = 1 << 12;
/// Read-only in every LVT entry and in the ICR: delivery status and remote IRR.
const READ_ONLY: u32 = 1 << 12 | 1 << 14;

const BASE_BSP: u64 = 1 << 8;
const BASE_X2: u64 = 1 << 10;
const BASE_ENABLE: u64 = 1 << 11;
const BASE_DEFAULT: u64 = 0xfee0_0000;

const ERROR_SEND_VECTOR: u32 = 1 << 5;
const ERROR_RECEIVE_VECTOR: u32 = 1 << 6;
const ERROR_REGISTER: u32 = 1 << 7;

const SIGNAL_NMI: u8 = 1 << 0;
const SIGNAL_INIT: u8 = 1 << 1;
const SIGNAL_SIPI: u8 = 1 << 2;

const fn slots(numbers: &[u8]) -> u64 {
    let mut set = 0;
    let mut i = 0;
    while i < numbers.len() {
        set |= 1 << numbers[i];
        i += 1;
    }
    set
}

/// Registers that can be read in both modes.
const READABLE: u64 = slots(&[
    ID,
    VERSION,
    TPR,
    PPR,
    LDR,
    SVR,
    ESR,
    ICR,
    LVT_TIMER,
    LVT_THERMAL,
    LVT_PERF,
    LVT_LINT0,
    LVT_LINT1,
    LVT_ERROR,
    INITIAL_COUNT,
    CURRENT_COUNT,
    DIVIDE,
]) | 0xff_ffff << ISR;
/// Registers that only xAPIC mode can read. EOI is write-only and reads as zero;
/// APR and RRR are those of older APICs.
const READABLE_XAPIC: u64 = READABLE | slots(&[APR, EOI, RRR, DFR, ICR_HIGH]);
/// Registers that x2APIC mode can write (Intel SDM Vol. 3A table 11-6). The ICR is apart.
const WRITABLE_X2: u64 = slots(&[
    TPR,
    EOI,
    SVR,
    ESR,
    LVT_TIMER,
    LVT_THERMAL,
    LVT_PERF,
    LVT_LINT0,
    LVT_LINT1,
    LVT_ERROR,
    INITIAL_COUNT,
    DIVIDE,
    SELF_IPI,
]);

/// The bits of a register that a guest can set.
const fn settable(register: u8) -> u32 {
    match register {
        TPR | SELF_IPI => 0xff,
        SVR => 0x1ff | SVR_NO_EOI_BROADCAST,
        LVT_TIMER => 0x700ff,
        LVT_THERMAL | LVT_PERF => 0x107ff,
        LVT_LINT0 | LVT_LINT1 => 0x1a7ff,
        LVT_ERROR => 0x100ff,
        INITIAL_COUNT => u32::MAX,
        DIVIDE => 0b1011,
        LDR | ICR_HIGH => 0xff00_0000,
        DFR => 0xf000_0000,
        _ => 0,
    }
}

/// What a WRMSR in x2APIC mode may hold without #GP: the settable bits, and read-only ones.
const ACCEPTED_X2: [u32; REGISTERS] = {
    let mut bits = [0; REGISTERS];
    let mut register = 0;
    while register < REGISTERS {
        bits[register] = settable(register as u8);
        if register >= LVT_TIMER as usize && register <= LVT_ERROR as usize {
            bits[register] |= READ_ONLY;
        }
        register += 1;
    }
    bits
};

/// The register page, in the hardware's layout: a 32-bit register each 16 bytes.
///
/// Words are atomics because VT-x reads and writes them while the guest runs; all accesses are
/// relaxed, plain loads and stores.
#[repr(C, align(4096))]
pub struct ApicPage([AtomicU32; 1024]);

const _: () = assert!(size_of::<ApicPage>() == 4096);

impl ApicPage {
    fn new() -> Box<Self> {
        Box::new(Self([const { AtomicU32::new(0) }; 1024]))
    }

    #[inline]
    fn get(&self, register: u8) -> u32 {
        self.0[usize::from(register & 0x3f) * 4].load(Relaxed)
    }

    #[inline]
    fn set(&self, register: u8, value: u32) {
        self.0[usize::from(register & 0x3f) * 4].store(value, Relaxed);
    }

    /// The x2APIC ICR is 64 bits wide; its upper half is the destination.
    fn icr_dest(&self) -> u32 {
        self.0[usize::from(ICR) * 4 + 1].load(Relaxed)
    }

    fn set_icr_dest(&self, dest: u32) {
        self.0[usize::from(ICR) * 4 + 1].store(dest, Relaxed);
    }

    #[inline]
    fn bit(&self, bank: u8, vector: u8) -> bool {
        self.get(bank + (vector >> 5)) & 1 << (vector & 31) != 0
    }

    #[inline]
    fn set_bit(&self, bank: u8, vector: u8, on: bool) {
        let register = bank + (vector >> 5);
        let bit = 1 << (vector & 31);
        let word = self.get(register);
        self.set(register, if on { word | bit } else { word & !bit });
    }
}

/// A bank of 256 bits in the page (IRR or ISR), with what is needed to know its highest bit
/// without a search.
#[derive(Clone, Copy, Debug, Default)]
struct Bank {
    /// The highest set bit; 0 for none, as vectors below 16 are never set.
    top: u8,
    /// Which of the eight words are not zero.
    words: u8,
}

impl Bank {
    #[inline]
    fn insert(&mut self, page: &ApicPage, bank: u8, vector: u8) {
        page.set_bit(bank, vector, true);
        self.words |= 1 << (vector >> 5);
        self.top = self.top.max(vector);
    }

    /// Clears the highest bit.
    #[inline]
    fn remove_top(&mut self, page: &ApicPage, bank: u8) {
        let index = self.top >> 5;
        let word = page.get(bank + index) & !(1 << (self.top & 31));
        page.set(bank + index, word);
        if word != 0 {
            self.top = index << 5 | word.ilog2() as u8;
        } else {
            self.words &= !(1 << index);
            self.top = self.find(page, bank);
        }
    }

    fn find(&self, page: &ApicPage, bank: u8) -> u8 {
        let Some(index) = self.words.checked_ilog2() else {
            return 0;
        };
        let index = index as u8;
        page.get(bank + index)
            .checked_ilog2()
            .map_or(0, |bit| index << 5 | bit as u8)
    }

    /// Looks at the page afresh.
    fn scan(page: &ApicPage, bank: u8) -> Self {
        let mut this = Self::default();
        for index in 0..8 {
            this.words |= u8::from(page.get(bank + index) != 0) << index;
        }
        this.top = this.find(page, bank);
        this
    }
}

/// The operating modes (Intel SDM Vol. 3A §11.12.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ApicMode {
    /// Globally disabled: the CPU behaves as one without a local APIC.
    Disabled,
    /// Registers by MMIO.
    XApic,
    /// Registers by MSR.
    X2Apic,
}

/// The guest's access is answered with #GP(0).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gp;

/// What a register write leaves to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum ApicEffect {
    /// Nothing.
    None,
    /// A level-triggered interrupt ended: tell the I/O APIC.
    Eoi(Vector),
    /// Send what [`LocalApic::outgoing`] gives.
    Ipi,
    /// [`LocalApic::next_event`] has changed.
    Timer,
    /// What it takes, or how it is addressed, has changed.
    Reachable,
}

/// How a local APIC is addressed, and whether it would take an interrupt: what senders must
/// know, in one word. The default is that of one which nothing reaches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Address(pub(super) u64);

impl Address {
    const ENABLED: u64 = 1 << 32;
    const FLAT: u64 = 1 << 33;
    const LINT0: u64 = 1 << 34;
    const XAPIC: u64 = 1 << 35;
    const X2APIC: u64 = 1 << 36;
    const ID_SHIFT: u32 = 40;

    /// The operating mode.
    #[must_use]
    pub const fn mode(self) -> ApicMode {
        if self.0 & Self::XAPIC != 0 {
            ApicMode::XApic
        } else if self.0 & Self::X2APIC != 0 {
            ApicMode::X2Apic
        } else {
            ApicMode::Disabled
        }
    }

    /// Whether fixed interrupts are accepted (software-enabled by SVR).
    #[must_use]
    pub const fn is_enabled(self) -> bool {
        self.0 & Self::ENABLED != 0
    }

    /// Whether a change of LINT0 would be felt.
    #[must_use]
    pub const fn hears_lint0(self) -> bool {
        self.0 & Self::LINT0 != 0
    }

    /// Whether `message` is for this APIC (§11.6.2).
    #[must_use]
    pub const fn is_destination(self, message: &Message) -> bool {
        let (dest, own, id) = (
            message.dest,
            self.0 as u32,
            (self.0 >> Self::ID_SHIFT) as u32,
        );
        match self.mode() {
            ApicMode::Disabled => false,
            _ if dest == Message::ALL => true,
            ApicMode::X2Apic if message.logical => {
                dest >> 16 == own >> 16 && dest & own & 0xffff != 0
            }
            ApicMode::XApic if message.logical => {
                if self.0 & Self::FLAT != 0 {
                    dest & own != 0
                } else {
                    dest >> 4 == own >> 4 && dest & own & 0xf != 0
                }
            }
            ApicMode::X2Apic => dest == id,
            ApicMode::XApic => dest == id & 0xff,
        }
    }
}

/// Events for a vCPU that are no maskable interrupt, in the order in which to take them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signals {
    /// INIT: reset the vCPU but for memory and the x87/XSAVE state, then wait for a start-up.
    pub init: bool,
    /// Start-up: if the vCPU waits for one, it starts in real mode at this page (CS = page << 8).
    pub startup: Option<u8>,
    /// A non-maskable interrupt.
    pub nmi: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
enum TimerMode {
    #[default]
    OneShot,
    Periodic,
    TscDeadline,
}

impl TimerMode {
    const fn from_lvt(lvt: u32) -> Self {
        match (lvt >> 17) & 3 {
            1 => Self::Periodic,
            2 => Self::TscDeadline,
            _ => Self::OneShot,
        }
    }
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Timer {
    /// The LVT entry in force. The page may already hold the next one (APIC-write exits).
    lvt: u32,
    mode: TimerMode,
    /// log2 of the divider.
    shift: u8,
    /// When the count reaches zero or the TSC its target; NEVER when stopped.
    deadline: Nanos,
    /// When the caller has to call: `deadline` unless the interrupt is masked.
    event: Nanos,
    /// IA32_TSC_DEADLINE, 0 when disarmed.
    target: u64,
}

impl Timer {
    const STOPPED: Self = Self {
        lvt: LVT_MASKED,
        mode: TimerMode::OneShot,
        shift: 1,
        deadline: Nanos::NEVER,
        event: Nanos::NEVER,
        target: 0,
    };
}

/// One of the two local interrupt pins.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
struct Lint {
    asserted: bool,
    /// A level-triggered fixed interrupt was taken and its EOI is due.
    remote_irr: bool,
}

/// Everything a local APIC remembers, for saving.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LocalApicState {
    base: u64,
    /// The 64 registers of the page, and the destination half of the x2APIC ICR.
    registers: Vec<u32>,
    icr_dest: u32,
    timer: Timer,
    errors: u32,
    error_armed: bool,
    lints: [Lint; 2],
    signals: Signals,
    clock: TscClock,
}

impl LocalApicState {
    #[cfg(test)]
    pub(super) const fn registers_for_test(&mut self) -> &mut Vec<u32> {
        &mut self.registers
    }
}

/// A saved state cannot be that of a local APIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RestoreError {
    /// There must be 64 registers.
    Registers(usize),
    /// IA32_APIC_BASE holds a mode that does not exist.
    Base(u64),
}

/// A vCPU's local APIC.
pub struct LocalApic {
    page: Box<ApicPage>,
    requested: Bank,
    in_service: Bank,
    signals: u8,
    startup: u8,
    mode: ApicMode,
    /// SVR bit 8.
    enabled: bool,
    error_armed: bool,
    lints: [Lint; 2],
    timer: Timer,
    /// The vCPU's TSC, in which TSC-deadline mode counts.
    clock: TscClock,
    id: u32,
    /// Errors since the last write to ESR.
    errors: u32,
    /// The last IPI that [`ApicEffect::Ipi`] told of.
    outgoing: Ipi,
    base: u64,
    /// Bits of IA32_APIC_BASE that must be zero.
    base_reserved: u64,
}

impl LocalApic {
    /// A local APIC after power-on. `id` is the x2APIC id (the xAPIC id is its low byte);
    /// `phys_bits` is the guest's physical address width.
    #[must_use]
    pub fn new(id: u32, bsp: bool, phys_bits: u8, clock: TscClock) -> Self {
        let address = 1_u64
            .checked_shl(phys_bits.into())
            .unwrap_or(0)
            .wrapping_sub(1)
            & !0xfff;
        let mut this = Self {
            page: ApicPage::new(),
            requested: Bank::default(),
            in_service: Bank::default(),
            signals: 0,
            startup: 0,
            mode: ApicMode::XApic,
            enabled: false,
            error_armed: true,
            lints: [Lint::default(); 2],
            timer: Timer::STOPPED,
            clock,
            id,
            errors: 0,
            outgoing: Ipi {
                message: Message {
                    vector: Vector(0),
                    mode: DeliveryMode::Fixed,
                    logical: false,
                    dest: 0,
                    level: false,
                },
                shorthand: Shorthand::None,
            },
            base: if bsp { BASE_BSP } else { 0 },
            base_reserved: !(address | BASE_BSP | BASE_X2 | BASE_ENABLE),
        };
        this.reset();
        this
    }

    /// Power-on or RESET: every register, IA32_APIC_BASE included (§11.4.7.1). The TSC goes on.
    pub fn reset(&mut self) {
        self.base = BASE_DEFAULT | BASE_ENABLE | self.base & BASE_BSP;
        self.mode = ApicMode::XApic;
        self.signals = 0;
        self.init();
    }

    /// INIT: as RESET, but the mode and the ids stay (§11.4.7.3, §11.12.5.1).
    pub fn init(&mut self) {
        for register in 0..REGISTERS as u8 {
            self.page.set(register, 0);
        }
        self.page.set_icr_dest(0);
        self.page.set(VERSION, VERSION_VALUE);
        self.page.set(SVR, 0xff);
        self.page.set(DFR, u32::MAX);
        for lvt in LVT_TIMER..=LVT_ERROR {
            self.page.set(lvt, LVT_MASKED);
        }
        self.set_ids();
        self.requested = Bank::default();
        self.in_service = Bank::default();
        self.enabled = false;
        self.errors = 0;
        self.error_armed = true;
        self.timer = Timer::STOPPED;
        for lint in &mut self.lints {
            lint.remote_irr = false;
        }
    }

    /// What a PC's firmware leaves on the boot CPU: enabled, LINT0 as ExtINT from the 8259 and
    /// LINT1 as NMI, the virtual wire mode (MultiProcessor Specification 1.4 §3.6.2.2).
    pub fn virtual_wire(&mut self) {
        self.enabled = true;
        self.page.set(SVR, 0xff | SVR_ENABLE);
        self.page.set(LVT_LINT0, 0x700);
        self.page.set(LVT_LINT1, 0x400);
    }

    fn set_ids(&mut self) {
        if self.mode == ApicMode::X2Apic {
            self.page.set(ID, self.id);
            self.page.set(LDR, self.x2_logical_id());
        } else {
            self.page.set(ID, self.id << 24);
        }
    }

    /// §11.12.10.2: cluster in the upper half, one bit of sixteen in the lower.
    const fn x2_logical_id(&self) -> u32 {
        (self.id >> 4) << 16 | 1 << (self.id & 15)
    }

    /// The x2APIC id.
    #[must_use]
    pub const fn id(&self) -> u32 {
        self.id
    }

    /// The operating mode.
    #[must_use]
    pub const fn mode(&self) -> ApicMode {
        self.mode
    }

    /// The vCPU's TSC.
    #[must_use]
    pub const fn clock(&self) -> &TscClock {
        &self.clock
    }

    /// Moves the vCPU's TSC (a write to IA32_TSC or IA32_TSC_ADJUST) and with it an armed
    /// TSC-deadline timer.
    pub fn shift_tsc(&mut self, ticks: u64, now: Nanos) {
        self.tick(now);
        self.clock.shift(ticks);
        if self.timer.target != 0 {
            self.timer.deadline = self.clock.deadline(self.timer.target, now);
            self.update_event();
        }
    }

    /// The register page, 4 KiB and aligned so: what VT-x may use as the virtual-APIC page.
    /// It stays where it is for the life of this struct.
    ///
    /// With APIC-register virtualization, CURRENT_COUNT (MSR 839H, offset 390H) and PPR (80AH,
    /// 0A0H) must still exit: both are computed when they are read.
    #[must_use]
    pub fn page_ptr(&self) -> *const u8 {
        core::ptr::from_ref::<ApicPage>(&self.page).cast()
    }

    /// Stores into the page as hardware does.
    #[cfg(test)]
    pub(super) fn poke(&self, word: usize, value: u32) {
        self.page.0[word].store(value, Relaxed);
    }

    // The run loop's questions.

    /// The interrupt to deliver next, if its priority is above PPR.
    #[inline]
    #[must_use]
    pub fn pending(&self) -> Option<Vector> {
        let top = self.requested.top;
        if top == 0 {
            return None;
        }
        let bound = self.tpr().max(self.in_service.top);
        (top & 0xf0 > bound & 0xf0).then_some(Vector(top))
    }

    /// Whether there is an interrupt request (deliverable or not) or a signal.
    #[inline]
    #[must_use]
    pub const fn has_work(&self) -> bool {
        self.requested.top | self.signals != 0
    }

    /// Whether [`LocalApic::take_signals`] has something to give.
    #[inline]
    #[must_use]
    pub const fn has_signals(&self) -> bool {
        self.signals != 0
    }

    /// The highest vectors requested and in service; 0 for none.
    #[must_use]
    pub const fn highest(&self) -> [u8; 2] {
        [self.requested.top, self.in_service.top]
    }

    /// Moves the pending interrupt into service and gives it (INTA). Only after
    /// [`LocalApic::pending`] gave one; else the spurious vector comes, as from the hardware.
    #[inline]
    pub fn acknowledge(&mut self) -> Vector {
        let Some(vector) = self.pending() else {
            return Vector((self.page.get(SVR) & 0xff) as u8);
        };
        self.requested.remove_top(&self.page, IRR);
        self.in_service.insert(&self.page, ISR, vector.0);
        vector
    }

    /// The TPR threshold for hardware that virtualizes TPR: the priority class of the request
    /// that only TPR holds back, 0 for none. The guest's lowering of TPR below it must exit.
    #[must_use]
    pub fn tpr_threshold(&self) -> u8 {
        let class = self.requested.top >> 4;
        if class > self.in_service.top >> 4 && class <= self.tpr() >> 4 {
            class
        } else {
            0
        }
    }

    /// The signals that wait; they are gone then.
    #[cfg(test)]
    pub(crate) const fn take_signals(&mut self) -> Signals {
        let signals = self.signals();
        self.signals = 0;
        signals
    }

    /// Takes a waiting INIT.
    pub const fn take_init(&mut self) {
        self.signals &= !SIGNAL_INIT;
    }

    /// Takes a waiting start-up.
    pub const fn take_startup(&mut self) -> Option<u8> {
        let startup = self.signals().startup;
        self.signals &= !SIGNAL_SIPI;
        startup
    }

    /// Takes a waiting NMI.
    pub const fn take_nmi(&mut self) {
        self.signals &= !SIGNAL_NMI;
    }

    /// The signals that wait.
    #[must_use]
    pub const fn signals(&self) -> Signals {
        let set = self.signals;
        Signals {
            init: set & SIGNAL_INIT != 0,
            startup: if set & SIGNAL_SIPI != 0 {
                Some(self.startup)
            } else {
                None
            },
            nmi: set & SIGNAL_NMI != 0,
        }
    }

    /// The task-priority register; CR8 is its upper half.
    #[inline]
    #[must_use]
    pub fn tpr(&self) -> u8 {
        self.page.get(TPR) as u8
    }

    /// Sets the task-priority register.
    #[inline]
    pub fn set_tpr(&mut self, tpr: u8) {
        self.page.set(TPR, tpr.into());
    }

    /// The processor priority (§11.8.3.1).
    #[must_use]
    pub fn ppr(&self) -> u8 {
        let (tpr, isr) = (self.tpr(), self.in_service.top);
        if tpr >> 4 >= isr >> 4 {
            tpr
        } else {
            isr & 0xf0
        }
    }

    /// Ends the interrupt in service (a write to the EOI register).
    #[inline]
    pub fn eoi(&mut self) -> ApicEffect {
        let vector = self.in_service.top;
        if vector == 0 {
            return ApicEffect::None;
        }
        self.in_service.remove_top(&self.page, ISR);
        if self.page.bit(TMR, vector) {
            self.eoi_level(vector)
        } else {
            ApicEffect::None
        }
    }

    #[cold]
    fn eoi_level(&mut self, vector: u8) -> ApicEffect {
        for (pin, lvt) in [(0, LVT_LINT0), (1, LVT_LINT1)] {
            let entry = self.page.get(lvt);
            if self.lints[pin].remote_irr && entry as u8 == vector {
                self.lints[pin].remote_irr = false;
                if self.lints[pin].asserted {
                    self.lint_event(pin);
                }
            }
        }
        if self.page.get(SVR) & SVR_NO_EOI_BROADCAST != 0 {
            ApicEffect::None
        } else {
            ApicEffect::Eoi(Vector(vector))
        }
    }

    // What arrives.

    /// Takes a fixed interrupt: `false` if it is lost, because the APIC is disabled or the
    /// vector illegal.
    #[inline]
    pub fn accept(&mut self, vector: Vector, level: bool) -> bool {
        if !self.enabled {
            return false;
        }
        if vector.0 < 16 {
            self.error(ERROR_RECEIVE_VECTOR);
            return false;
        }
        self.request(vector, level);
        true
    }

    /// Adds a request that was accepted before, when it was sent: it stays, even if the APIC is
    /// disabled since (SDM Vol. 3A §11.4.7.2). Else the end of a level-triggered one would never come,
    /// and its pin would wait for that for ever.
    pub(super) fn request(&mut self, vector: Vector, level: bool) {
        self.requested.insert(&self.page, IRR, vector.0);
        self.page.set_bit(TMR, vector.0, level);
    }

    /// Adds signals to those that wait. An INIT takes a start-up that came before it out of the
    /// way.
    pub const fn add_signals(&mut self, new: Signals) {
        if new.init {
            self.signals = self.signals & !SIGNAL_SIPI | SIGNAL_INIT;
        }
        if let Some(page) = new.startup {
            self.signals |= SIGNAL_SIPI;
            self.startup = page;
        }
        if new.nmi {
            self.raise_nmi();
        }
    }

    /// A message with an illegal vector came.
    pub fn receive_error(&mut self) {
        self.error(ERROR_RECEIVE_VECTOR);
    }

    /// Raises a non-maskable interrupt.
    pub const fn raise_nmi(&mut self) {
        self.signals |= SIGNAL_NMI;
    }

    /// How it is addressed.
    #[must_use]
    pub fn address(&self) -> Address {
        let (mode, own) = match self.mode {
            ApicMode::Disabled => (0, 0),
            ApicMode::XApic => (Address::XAPIC, self.page.get(LDR) >> 24),
            ApicMode::X2Apic => (Address::X2APIC, self.x2_logical_id()),
        };
        let flag = |on: bool, bit: u64| if on { bit } else { 0 };
        let flat = self.page.get(DFR) >> 28 == 0xf;
        let lint0 = self.mode == ApicMode::Disabled || self.page.get(LVT_LINT0) & LVT_MASKED == 0;
        Address(
            mode | u64::from(own)
                | u64::from(self.id) << Address::ID_SHIFT
                | flag(self.enabled, Address::ENABLED)
                | flag(flat, Address::FLAT)
                | flag(lint0, Address::LINT0),
        )
    }

    /// Whether an interrupt of the 8259 reaches this CPU: LINT0 is an unmasked ExtINT, or the
    /// APIC is disabled and LINT0 is the CPU's INTR pin.
    #[must_use]
    pub fn accepts_extint(&self) -> bool {
        self.mode == ApicMode::Disabled || self.page.get(LVT_LINT0) & (LVT_MASKED | 0x700) == 0x700
    }

    /// Sets the level of LINT0 (the 8259's output) or LINT1 (the board's NMI).
    pub fn set_lint(&mut self, pin: usize, asserted: bool) {
        let Some(lint) = self.lints.get_mut(pin) else {
            return;
        };
        if core::mem::replace(&mut lint.asserted, asserted) != asserted && asserted {
            self.lint_event(pin);
        }
    }

    /// Pin `pin` is asserted, or still asserted after its EOI.
    fn lint_event(&mut self, pin: usize) {
        if self.mode == ApicMode::Disabled {
            // The pins are INTR and NMI then.
            if pin == 1 {
                self.raise_nmi();
            }
            return;
        }
        let lvt = self.page.get(if pin == 0 { LVT_LINT0 } else { LVT_LINT1 });
        if lvt & LVT_MASKED != 0 {
            return;
        }
        match DeliveryMode::from_bits(lvt) {
            DeliveryMode::Fixed => {
                // LINT1 is always edge-triggered (§11.5.1).
                let level = lvt & LVT_LEVEL != 0 && pin == 0;
                if !self.lints[pin].remote_irr && self.accept(Vector(lvt as u8), level) {
                    self.lints[pin].remote_irr = level;
                }
            }
            DeliveryMode::Nmi => self.raise_nmi(),
            DeliveryMode::Init => self.signals |= SIGNAL_INIT,
            _ => {}
        }
    }

    fn error(&mut self, bits: u32) {
        self.errors |= bits;
        if !core::mem::replace(&mut self.error_armed, false) {
            return;
        }
        let lvt = self.page.get(LVT_ERROR);
        // An illegal vector in the error entry itself would lead back here.
        if lvt & LVT_MASKED == 0 && lvt & 0xff >= 16 {
            self.accept(Vector(lvt as u8), false);
        }
    }

    // The timer.

    /// When [`LocalApic::tick`] must be called.
    #[inline]
    #[must_use]
    pub const fn next_event(&self) -> Nanos {
        self.timer.event
    }

    /// Lets the timer come up to `now`.
    #[inline]
    pub fn tick(&mut self, now: Nanos) {
        if now >= self.timer.deadline {
            self.expire(now);
        }
    }

    fn expire(&mut self, now: Nanos) {
        let lvt = self.timer.lvt;
        if lvt & LVT_MASKED == 0 {
            self.accept(Vector(lvt as u8), false);
        }
        self.timer.target = 0;
        let period = self.period();
        self.timer.deadline = if self.timer.mode == TimerMode::Periodic && period != 0 {
            // Due times lie on a grid; those already past are one interrupt.
            let late = now.since(self.timer.deadline);
            let skipped = if period >= MIN_PERIOD {
                late
            } else {
                late.saturating_add(MIN_PERIOD)
            };
            self.timer.deadline + (skipped / period + 1).saturating_mul(period)
        } else {
            Nanos::NEVER
        };
        self.update_event();
    }

    fn update_event(&mut self) {
        self.timer.event = if self.timer.lvt & LVT_MASKED != 0 {
            Nanos::NEVER
        } else {
            self.timer.deadline
        };
    }

    /// The initial count in nanoseconds: below 2³⁹.
    fn period(&self) -> u64 {
        u64::from(self.page.get(INITIAL_COUNT)) << self.timer.shift
    }

    /// The current-count register: a running count is at least 1.
    fn current_count(&self, now: Nanos) -> u32 {
        let timer = &self.timer;
        if timer.deadline == Nanos::NEVER || timer.mode == TimerMode::TscDeadline {
            return 0;
        }
        let left = match (timer.deadline.since(now), self.period()) {
            (0, period) if timer.mode == TimerMode::Periodic && period != 0 => {
                period - now.since(timer.deadline) % period
            }
            (0, _) => return 0,
            (left, period) if left > period && period != 0 => (left - 1) % period + 1,
            (left, _) => left,
        };
        u32::try_from(left.div_ceil(1 << timer.shift)).unwrap_or(u32::MAX)
    }

    fn start_timer(&mut self, now: Nanos) -> ApicEffect {
        if self.timer.mode == TimerMode::TscDeadline {
            return ApicEffect::None;
        }
        let period = self.period();
        self.timer.deadline = if period == 0 {
            Nanos::NEVER
        } else {
            now + period
        };
        self.update_event();
        ApicEffect::Timer
    }

    fn set_divide(&mut self, value: u32, now: Nanos) -> ApicEffect {
        self.tick(now);
        let count = self.current_count(now);
        // Bits 3, 1 and 0: 000 divides by 2, … 110 by 128, 111 by 1.
        let code = (value & 3 | (value >> 1) & 4) as u8;
        self.timer.shift = (code + 1) & 7;
        if count != 0 {
            self.timer.deadline = now + (u64::from(count) << self.timer.shift);
            self.update_event();
        }
        ApicEffect::Timer
    }

    fn set_lvt_timer(&mut self, value: u32, now: Nanos) -> ApicEffect {
        self.tick(now);
        let mode = TimerMode::from_lvt(value);
        // To and from TSC-deadline mode the timer is disarmed (§11.5.4.1).
        if (mode == TimerMode::TscDeadline) != (self.timer.mode == TimerMode::TscDeadline) {
            self.timer.deadline = Nanos::NEVER;
            self.timer.target = 0;
            self.page.set(INITIAL_COUNT, 0);
        }
        self.timer.mode = mode;
        self.timer.lvt = value;
        self.page.set(LVT_TIMER, value);
        self.update_event();
        ApicEffect::Timer
    }

    /// IA32_TSC_DEADLINE: the target, 0 once it was reached or in another mode.
    #[must_use]
    pub fn tsc_deadline(&self, now: Nanos) -> u64 {
        if now >= self.timer.deadline {
            0
        } else {
            self.timer.target
        }
    }

    /// Writes IA32_TSC_DEADLINE: arms the timer for this guest TSC, or disarms it with 0;
    /// ignored in other modes.
    #[inline]
    pub fn set_tsc_deadline(&mut self, target: u64, now: Nanos) -> ApicEffect {
        if self.timer.mode != TimerMode::TscDeadline {
            return ApicEffect::None;
        }
        self.tick(now);
        self.timer.target = target;
        self.timer.deadline = if target == 0 {
            Nanos::NEVER
        } else {
            self.clock.deadline(target, now)
        };
        self.update_event();
        ApicEffect::Timer
    }

    // Registers.

    fn read(&self, register: u8, now: Nanos) -> u32 {
        match register {
            PPR => self.ppr().into(),
            CURRENT_COUNT => self.current_count(now),
            LVT_LINT0 | LVT_LINT1 => {
                let lint = self.lints[usize::from(register - LVT_LINT0)];
                self.page.get(register) | u32::from(lint.remote_irr) << 14
            }
            EOI => 0,
            _ => self.page.get(register),
        }
    }

    /// Writes a register, in either mode. Does not look at what stood there, because after an
    /// APIC-write exit the new value already stands in the page.
    fn write(&mut self, register: u8, value: u32, now: Nanos) -> ApicEffect {
        let value_set = value & settable(register);
        match register {
            EOI => {
                return self.eoi();
            }
            TPR | ICR_HIGH => self.page.set(register, value_set),
            ICR => {
                let dest = Message::narrow_dest((self.page.get(ICR_HIGH) >> 24) as u8);
                return self.send(value, dest);
            }
            INITIAL_COUNT => {
                if self.timer.mode == TimerMode::TscDeadline {
                    self.page.set(INITIAL_COUNT, 0);
                    return ApicEffect::None;
                }
                self.tick(now);
                self.page.set(INITIAL_COUNT, value);
                return self.start_timer(now);
            }
            DIVIDE => {
                let effect = self.set_divide(value_set, now);
                self.page.set(DIVIDE, value_set);
                return effect;
            }
            LVT_TIMER => return self.set_lvt_timer(value_set | self.forced_mask(), now),
            LVT_THERMAL | LVT_PERF | LVT_ERROR => {
                self.page.set(register, value_set | self.forced_mask());
            }
            LVT_LINT0 | LVT_LINT1 => {
                self.page.set(register, value_set | self.forced_mask());
                let pin = usize::from(register - LVT_LINT0);
                let level = value_set & LVT_LEVEL != 0 && pin == 0;
                self.lints[pin].remote_irr &= level;
                // A level that was held back by the mask is taken now.
                if level && self.lints[pin].asserted {
                    self.lint_event(pin);
                }
                return ApicEffect::Reachable;
            }
            SVR => {
                self.page.set(SVR, value_set);
                self.enabled = value_set & SVR_ENABLE != 0;
                if !self.enabled {
                    self.mask_all(now);
                }
                return ApicEffect::Reachable;
            }
            LDR | DFR => {
                // The low 28 bits of DFR are ones.
                let ones = if register == DFR { 0x0fff_ffff } else { 0 };
                self.page.set(register, value_set | ones);
                return ApicEffect::Reachable;
            }
            ESR => {
                self.page.set(ESR, core::mem::take(&mut self.errors));
                self.error_armed = true;
            }
            SELF_IPI if self.mode == ApicMode::X2Apic => {
                return self.send_self(Vector(value as u8));
            }
            // Read-only here (changing it is model-specific): put it back.
            ID => self.set_ids(),
            VERSION => self.page.set(VERSION, VERSION_VALUE),
            _ => self.error(ERROR_REGISTER),
        }
        ApicEffect::None
    }

    /// While the APIC is software-disabled, LVT entries stay masked (§11.4.7.2).
    const fn forced_mask(&self) -> u32 {
        if self.enabled { 0 } else { LVT_MASKED }
    }

    fn mask_all(&mut self, now: Nanos) {
        self.tick(now);
        for lvt in LVT_TIMER..=LVT_ERROR {
            self.page.set(lvt, self.page.get(lvt) | LVT_MASKED);
        }
        self.timer.lvt |= LVT_MASKED;
        self.update_event();
    }

    fn send_self(&mut self, vector: Vector) -> ApicEffect {
        if vector.0 < 16 {
            self.error(ERROR_SEND_VECTOR);
        } else {
            self.accept(vector, false);
        }
        ApicEffect::None
    }

    /// Sends an IPI (§11.6.1, table 11-3). The delivery status always reads as idle.
    fn send(&mut self, low: u32, dest: u32) -> ApicEffect {
        self.page.set(ICR, low & 0x000c_cfff);
        let vector = Vector(low as u8);
        let mode = DeliveryMode::from_bits(low);
        let shorthand = match (low >> 18) & 3 {
            0 => Shorthand::None,
            1 => Shorthand::SelfOnly,
            2 => Shorthand::All,
            _ => Shorthand::Others,
        };
        match (mode, shorthand) {
            (DeliveryMode::Fixed, Shorthand::SelfOnly) => return self.send_self(vector),
            (DeliveryMode::Fixed | DeliveryMode::LowestPriority, _) if vector.0 < 16 => {
                self.error(ERROR_SEND_VECTOR);
                return ApicEffect::None;
            }
            // INIT level de-assert synchronized arbitration ids; there are none any more.
            (DeliveryMode::Init, _) if low & 0xc000 == 0x8000 => return ApicEffect::None,
            (DeliveryMode::Reserved | DeliveryMode::ExtInt, _) => return ApicEffect::None,
            (DeliveryMode::Fixed, _) | (_, Shorthand::None | Shorthand::Others) => {}
            _ => return ApicEffect::None,
        }
        self.outgoing = Ipi {
            message: Message {
                vector,
                mode,
                logical: low & 1 << 11 != 0,
                dest,
                level: false,
            },
            shorthand,
        };
        ApicEffect::Ipi
    }

    /// The IPI that a write has just made.
    #[must_use]
    pub const fn outgoing(&self) -> Ipi {
        self.outgoing
    }

    /// Reads in the MMIO page; `offset` is in bytes. Registers are 32 bits wide on 16-byte
    /// boundaries; a narrower read gets its part, the rest of the 16 bytes is zero. In modes
    /// without the page, all ones.
    pub fn read_mmio(&mut self, offset: u16, now: Nanos) -> u32 {
        if self.mode != ApicMode::XApic {
            return u32::MAX;
        }
        if offset & 0xc != 0 {
            return 0;
        }
        let register = offset >> 4;
        if register >= REGISTERS as u16 || READABLE_XAPIC >> register & 1 == 0 {
            self.error(ERROR_REGISTER);
            return 0;
        }
        self.read(register as u8, now) >> ((offset & 3) * 8)
    }

    /// Writes in the MMIO page. Only whole, aligned registers can be written.
    pub fn write_mmio(&mut self, offset: u16, value: u32, now: Nanos) -> ApicEffect {
        if self.mode != ApicMode::XApic || offset & 0xf != 0 {
            return ApicEffect::None;
        }
        match u8::try_from(offset >> 4) {
            Ok(register) if usize::from(register) < REGISTERS => self.write(register, value, now),
            _ => {
                self.error(ERROR_REGISTER);
                ApicEffect::None
            }
        }
    }

    /// Does what is due after hardware put a guest's write into the page at `offset`
    /// (VT-x APIC-write exit, Intel SDM Vol. 3C §30.4.3.2).
    pub fn apic_write_done(&mut self, offset: u16, now: Nanos) -> ApicEffect {
        let register = ((offset >> 4) & 0x3f) as u8;
        let value = self.page.get(register);
        if self.mode == ApicMode::X2Apic && register == ICR {
            return self.send(value, self.page.icr_dest());
        }
        self.write(register, value, now)
    }

    /// Reads an x2APIC register by MSR index (800H to 8FFH).
    ///
    /// # Errors
    /// #GP in another mode, for a register that does not exist or is write-only.
    pub fn read_msr(&self, index: u32, now: Nanos) -> Result<u64, Gp> {
        let register = self.x2_register(index)?;
        if READABLE >> register & 1 == 0 {
            return Err(Gp);
        }
        let high = if register == ICR {
            self.page.icr_dest()
        } else {
            0
        };
        Ok(u64::from(high) << 32 | u64::from(self.read(register, now)))
    }

    /// Whether this WRMSR is an end of interrupt, which goes to [`LocalApic::eoi`].
    #[inline]
    #[must_use]
    pub fn is_x2_eoi(&self, index: u32, value: u64) -> bool {
        index == arch::msr::X2APIC_FIRST + EOI as u32 && value == 0 && self.mode == ApicMode::X2Apic
    }

    /// Writes an x2APIC register by MSR index (800H to 8FFH).
    ///
    /// # Errors
    /// #GP in another mode, for a register that does not exist or is read-only, and for
    /// reserved bits that are not zero.
    #[inline]
    pub fn write_msr(&mut self, index: u32, value: u64, now: Nanos) -> Result<ApicEffect, Gp> {
        let register = self.x2_register(index)?;
        // The two hot ones first.
        if register == EOI && value == 0 {
            return Ok(self.eoi());
        }
        if register == TPR && value <= 0xff {
            self.page.set(TPR, value as u32);
            return Ok(ApicEffect::None);
        }
        self.write_x2(register, value, now)
    }

    #[inline(never)]
    fn write_x2(&mut self, register: u8, value: u64, now: Nanos) -> Result<ApicEffect, Gp> {
        let low = value as u32;
        if register == ICR {
            if low & !0x000c_cfff != 0 {
                return Err(Gp);
            }
            let dest = (value >> 32) as u32;
            self.page.set_icr_dest(dest);
            return Ok(self.send(low, dest));
        }
        let accepted = ACCEPTED_X2[usize::from(register & 0x3f)];
        if WRITABLE_X2 >> register & 1 == 0 || value & !u64::from(accepted) != 0 {
            return Err(Gp);
        }
        Ok(self.write(register, low, now))
    }

    #[inline]
    fn x2_register(&self, index: u32) -> Result<u8, Gp> {
        let register = index.wrapping_sub(arch::msr::X2APIC_FIRST);
        if self.mode != ApicMode::X2Apic || register >= REGISTERS as u32 {
            return Err(Gp);
        }
        Ok(register as u8)
    }

    /// IA32_APIC_BASE.
    #[must_use]
    pub const fn base_msr(&self) -> u64 {
        self.base
    }

    /// The guest-physical address of the register page in xAPIC mode.
    #[must_use]
    pub const fn base_address(&self) -> u64 {
        self.base & !0xfff
    }

    /// Writes IA32_APIC_BASE. [`LocalApic::mode`] and [`LocalApic::base_address`] tell what
    /// became of it.
    ///
    /// # Errors
    /// #GP for reserved bits and for a change of mode that does not exist (§11.12.5,
    /// figure 11-27).
    pub fn set_base_msr(&mut self, value: u64) -> Result<(), Gp> {
        if value & self.base_reserved != 0 {
            return Err(Gp);
        }
        let mode = Self::mode_of(value).ok_or(Gp)?;
        match (self.mode, mode) {
            (ApicMode::X2Apic, ApicMode::XApic) | (ApicMode::Disabled, ApicMode::X2Apic) => {
                return Err(Gp);
            }
            (from, to) if from == to => {}
            (ApicMode::XApic, ApicMode::X2Apic) => {
                self.mode = mode;
                self.page.set(ICR_HIGH, 0);
                self.page.set_icr_dest(0);
                self.page.set(DFR, 0);
                self.set_ids();
            }
            // Disabling loses all state, so enabling finds that of a reset (§11.4.3).
            _ => {
                self.mode = mode;
                self.init();
            }
        }
        self.base = value;
        Ok(())
    }

    const fn mode_of(base: u64) -> Option<ApicMode> {
        match (base & BASE_ENABLE != 0, base & BASE_X2 != 0) {
            (false, false) => Some(ApicMode::Disabled),
            (true, false) => Some(ApicMode::XApic),
            (true, true) => Some(ApicMode::X2Apic),
            (false, true) => None,
        }
    }

    /// All state, for saving.
    #[must_use]
    pub fn save(&self) -> LocalApicState {
        LocalApicState {
            base: self.base,
            registers: (0..REGISTERS as u8).map(|r| self.page.get(r)).collect(),
            icr_dest: self.page.icr_dest(),
            timer: self.timer,
            errors: self.errors,
            error_armed: self.error_armed,
            lints: self.lints,
            signals: self.signals(),
            clock: self.clock,
        }
    }

    /// Puts saved state in place. It may come from a file, so nothing in it is trusted to be
    /// consistent; registers hold only what a guest could have written.
    ///
    /// # Errors
    /// The state cannot be that of a local APIC; nothing has changed then.
    pub fn restore(&mut self, state: &LocalApicState) -> Result<(), RestoreError> {
        if state.registers.len() != REGISTERS {
            return Err(RestoreError::Registers(state.registers.len()));
        }
        let mode = Self::mode_of(state.base)
            .filter(|_| state.base & self.base_reserved == 0)
            .ok_or(RestoreError::Base(state.base))?;
        for (register, value) in (0_u8..).zip(&state.registers) {
            self.page.set(register, *value);
        }
        // Vectors below 16 are never set.
        for bank in [IRR, ISR, TMR] {
            self.page.set(bank, self.page.get(bank) & !0xffff);
        }
        self.page.set_icr_dest(state.icr_dest);
        self.page.set(VERSION, VERSION_VALUE);
        self.base = state.base;
        self.mode = mode;
        self.set_ids();
        self.enabled = self.page.get(SVR) & SVR_ENABLE != 0;
        self.timer = state.timer;
        self.timer.shift &= 7;
        self.timer.lvt = self.page.get(LVT_TIMER);
        self.timer.mode = TimerMode::from_lvt(self.timer.lvt);
        self.errors = state.errors;
        self.error_armed = state.error_armed;
        self.lints = state.lints;
        self.clock = state.clock;
        self.signals = 0;
        for (on, bit) in [
            (state.signals.nmi, SIGNAL_NMI),
            (state.signals.init, SIGNAL_INIT),
            (state.signals.startup.is_some(), SIGNAL_SIPI),
        ] {
            self.signals |= if on { bit } else { 0 };
        }
        self.startup = state.signals.startup.unwrap_or(0);
        self.resync();
        self.update_event();
        Ok(())
    }

    /// Looks at IRR and ISR in the page afresh, after hardware with virtual-interrupt delivery
    /// or a restore changed them.
    pub fn resync(&mut self) {
        self.requested = Bank::scan(&self.page, IRR);
        self.in_service = Bank::scan(&self.page, ISR);
    }
}
