//! The core's own local APIC (Intel SDM Vol. 3A ch. 11): end of interrupt, messages to other
//! cores, and the timer that takes the core back from a guest.

use crate::DirectMap;
use arch::{HostPhysAddr, msr};
use x86_64::registers::model_specific::Msr;

/// The vector of the core's timer.
pub const TIMER_VECTOR: u8 = 0xf0;
/// The vector by which one core calls another out of guest mode or a halt.
pub const KICK_VECTOR: u8 = 0xf1;
/// The vector of spurious interrupts (low four bits set, for old APICs).
pub const SPURIOUS_VECTOR: u8 = 0xff;

/// The vector of the serial port.
pub const SERIAL_VECTOR: u8 = 0x40;
/// The vector of network cards.
pub const NIC_VECTOR: u8 = 0x41;

const ENABLED: u64 = 1 << 11;
const X2APIC: u64 = 1 << 10;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
const MASKED: u32 = 1 << 16;
const TSC_DEADLINE_MODE: u32 = 2 << 17;

/// Register offsets.
const ID: u32 = 0x20;
const TPR: u32 = 0x80;
const EOI: u32 = 0xb0;
const SVR: u32 = 0xf0;
const ICR_LOW: u32 = 0x300;
const ICR_HIGH: u32 = 0x310;
const LVT_TIMER: u32 = 0x320;
const LVT_LINT0: u32 = 0x350;
const LVT_LINT1: u32 = 0x360;
const LVT_ERROR: u32 = 0x370;
const INITIAL_COUNT: u32 = 0x380;
const CURRENT_COUNT: u32 = 0x390;
const DIVIDE: u32 = 0x3e0;

/// Interrupt command (§11.6.1): delivery modes, level assert, and whether the last one is on its way.
const INIT: u32 = 5 << 8;
const STARTUP: u32 = 6 << 8;
const NMI: u32 = 4 << 8;
const ASSERT: u32 = 1 << 14;
const PENDING: u32 = 1 << 12;
/// How long a message may wait for the bus before it is given up, in reads of the register.
const SEND_LIMIT: u32 = 100_000;
/// The highest id that a message in xAPIC mode can name.
const LAST_XAPIC_ID: u32 = 254;

/// Why a core's local APIC cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ApicError {
    /// Its registers lie where the direct map does not reach.
    NotMapped,
    /// It is in x2APIC mode, or its registers lie elsewhere, unlike the boot core's.
    Unlike,
}

/// The local APIC of the calling core: all cores' are in the same mode at the same address, so one
/// value serves them all.
#[derive(Clone, Copy, Debug)]
pub struct LocalApic {
    /// `None` in x2APIC mode.
    registers: Option<*mut u8>,
}

// SAFETY: the registers are the same address on every core and each core reaches its own.
unsafe impl Send for LocalApic {}
// SAFETY: as above; every access is one aligned register access.
unsafe impl Sync for LocalApic {}

impl LocalApic {
    /// Enables the boot core's local APIC in the mode the firmware chose, with everything masked.
    ///
    /// # Errors
    /// Its registers are not mapped.
    ///
    /// # Safety
    /// Called on the core itself, interrupts off; nothing else drives the local APIC.
    pub unsafe fn enable(map: DirectMap) -> Result<Self, ApicError> {
        let mut base = Msr::new(msr::IA32_APIC_BASE);
        // SAFETY: IA32_APIC_BASE exists on every x86_64 CPU; setting EN keeps the base address.
        let value = unsafe { base.read() };
        // The bit is only ever set: emulators do not take it back once it was cleared.
        if value & ENABLED == 0 {
            // SAFETY: as above.
            unsafe { base.write(value | ENABLED) };
        }
        let registers = if value & X2APIC != 0 {
            None
        } else {
            let page = map.pointer(HostPhysAddr::new(value & ADDRESS), 0x1000);
            Some(page.ok_or(ApicError::NotMapped)?)
        };
        let this = Self { registers };
        this.prepare();
        Ok(this)
    }

    /// Goes into x2APIC mode (§11.12.1) where an id asks for it: messages in xAPIC mode reach no
    /// more than 255 cores. Stays as it is where the processor lacks the mode.
    ///
    /// # Safety
    /// As [`LocalApic::enable`], on the boot core, before another core is started.
    pub unsafe fn widen(&mut self, ids: &[u32]) {
        if ids.iter().any(|id| !self.reaches(*id))
            && core::arch::x86_64::__cpuid(1).ecx & 1 << 21 != 0
        {
            self.registers = None;
            // SAFETY: as in `join`.
            unsafe { set_x2apic() };
            self.prepare();
        }
    }

    /// Enables the calling core's local APIC in the mode of the boot core's, which `self` is.
    ///
    /// # Errors
    /// The firmware left it in another mode or at another address.
    ///
    /// # Safety
    /// As [`LocalApic::enable`].
    pub unsafe fn join(&self, map: DirectMap) -> Result<(), ApicError> {
        // SAFETY: IA32_APIC_BASE exists on every x86_64 CPU.
        let value = unsafe { Msr::new(msr::IA32_APIC_BASE).read() };
        if let Some(registers) = self.registers {
            let page = map.pointer(HostPhysAddr::new(value & ADDRESS), 0x1000);
            if value & X2APIC != 0 || page != Some(registers) {
                return Err(ApicError::Unlike);
            }
            if value & ENABLED == 0 {
                // SAFETY: as above; the address stays.
                unsafe { Msr::new(msr::IA32_APIC_BASE).write(value | ENABLED) };
            }
        } else {
            // SAFETY: the boot core's processor has the mode, and this one is its like.
            unsafe { set_x2apic() };
        }
        self.prepare();
        Ok(())
    }

    fn prepare(&self) {
        for lvt in [LVT_TIMER, LVT_LINT0, LVT_LINT1, LVT_ERROR] {
            self.write(lvt, MASKED);
        }
        self.write(TPR, 0);
        self.write(SVR, 1 << 8 | u32::from(SPURIOUS_VECTOR));
    }

    /// Whether it is in x2APIC mode.
    #[must_use]
    pub const fn is_x2apic(&self) -> bool {
        self.registers.is_none()
    }

    /// Whether messages reach a core of this id.
    #[must_use]
    pub const fn reaches(&self, id: u32) -> bool {
        self.is_x2apic() || id <= LAST_XAPIC_ID
    }

    /// Puts a core into the state after INIT (§9.4.4.1): it then waits for [`LocalApic::send_startup`],
    /// 10 ms later.
    pub fn send_init(&self, id: u32) -> bool {
        self.send(id, INIT | ASSERT)
    }

    /// Lets a core that waits start in real mode at the page of this number, below 1 MiB.
    pub fn send_startup(&self, id: u32, page: u8) -> bool {
        self.send(id, STARTUP | ASSERT | u32::from(page))
    }

    /// Interrupts a core.
    pub fn send_ipi(&self, id: u32, vector: u8) -> bool {
        self.send(id, ASSERT | u32::from(vector))
    }

    /// Sends a core an NMI.
    pub fn send_nmi(&self, id: u32) -> bool {
        self.send(id, NMI | ASSERT)
    }

    /// Sends a message; false when the one before is stuck, or when no message reaches that id. What the caller wrote to memory before
    /// is seen by the core that gets it.
    fn send(&self, id: u32, command: u32) -> bool {
        if self.registers.is_none() {
            // WRMSR to the ICR does not wait for earlier stores (§11.12.3).
            // SAFETY: fences are harmless, and the MSR exists in x2APIC mode.
            unsafe {
                core::arch::asm!("mfence", "lfence", options(nostack, preserves_flags));
                Msr::new(msr::X2APIC_FIRST + (ICR_LOW >> 4)).write(wide_command(id, command));
            }
            return true;
        }
        let idle = (0..SEND_LIMIT).any(|_| {
            core::hint::spin_loop();
            self.read(ICR_LOW) & PENDING == 0
        });
        let sends = idle && self.reaches(id);
        if sends {
            self.write(ICR_HIGH, id << 24);
            self.write(ICR_LOW, command);
        }
        sends
    }

    fn write(&self, register: u32, value: u32) {
        match self.registers {
            // SAFETY: a register of the APIC page that `enable` found mapped.
            Some(page) => unsafe {
                page.add(register as usize)
                    .cast::<u32>()
                    .write_volatile(value)
            },
            // SAFETY: in x2APIC mode these MSRs exist (SDM Vol. 3A §11.12.1.2).
            None => unsafe { Msr::new(msr::X2APIC_FIRST + (register >> 4)).write(value.into()) },
        }
    }

    fn read(&self, register: u32) -> u32 {
        match self.registers {
            // SAFETY: as in `write`.
            Some(page) => unsafe { page.add(register as usize).cast::<u32>().read_volatile() },
            // SAFETY: as in `write`.
            None => unsafe { Msr::new(msr::X2APIC_FIRST + (register >> 4)).read() as u32 },
        }
    }

    /// The core's APIC id.
    #[must_use]
    pub fn id(&self) -> u32 {
        let id = self.read(ID);
        if self.registers.is_some() {
            id >> 24
        } else {
            id
        }
    }

    /// Ends the interrupt in service.
    pub fn end_of_interrupt(&self) {
        self.write(EOI, 0);
    }
}

/// The interrupt command as x2APIC mode has it: one register, 32 bits of id (§11.12.9).
const fn wide_command(id: u32, command: u32) -> u64 {
    (id as u64) << 32 | command as u64
}

/// Puts the calling core into x2APIC mode.
///
/// # Safety
/// The processor has the mode.
unsafe fn set_x2apic() {
    let mut base = Msr::new(msr::IA32_APIC_BASE);
    // SAFETY: promised by the caller. From disabled the way leads through xAPIC mode (§11.12.5).
    unsafe {
        base.write(base.read() | ENABLED);
        base.write(base.read() | X2APIC);
    }
}

/// The core's timer, armed with an absolute TSC value.
pub struct CoreTimer {
    apic: LocalApic,
    /// APIC timer ticks for 2³² TSC ticks; 0 in TSC-deadline mode.
    ratio: u64,
    armed: u64,
}

impl CoreTimer {
    /// Sets the timer up: TSC-deadline mode where the CPU has it, one-shot else.
    ///
    /// # Safety
    /// As [`LocalApic::enable`].
    #[must_use]
    pub unsafe fn new(apic: LocalApic, tsc_hz: u64) -> Self {
        let deadline_mode = core::arch::x86_64::__cpuid(1).ecx & 1 << 24 != 0;
        if deadline_mode {
            apic.write(LVT_TIMER, TSC_DEADLINE_MODE | u32::from(TIMER_VECTOR));
            return Self {
                apic,
                ratio: 0,
                armed: u64::MAX,
            };
        }
        apic.write(DIVIDE, 0b1011);
        apic.write(LVT_TIMER, MASKED);
        apic.write(INITIAL_COUNT, u32::MAX);
        let from = crate::rdtsc();
        while crate::rdtsc() - from < tsc_hz / 100 {
            core::hint::spin_loop();
        }
        let ticks = u32::MAX - apic.read(CURRENT_COUNT);
        let passed = crate::rdtsc() - from;
        apic.write(INITIAL_COUNT, 0);
        apic.write(LVT_TIMER, TIMER_VECTOR.into());
        let ratio = ((u128::from(ticks) << 32) / u128::from(passed.max(1))) as u64;
        Self {
            apic,
            ratio: ratio.max(1),
            armed: u64::MAX,
        }
    }

    /// The timer of the calling core, which runs like the boot core's.
    ///
    /// # Safety
    /// As [`LocalApic::enable`].
    #[must_use]
    pub unsafe fn like(&self) -> Self {
        let mode = if self.ratio == 0 {
            TSC_DEADLINE_MODE
        } else {
            self.apic.write(DIVIDE, 0b1011);
            0
        };
        self.apic.write(LVT_TIMER, mode | u32::from(TIMER_VECTOR));
        Self {
            armed: u64::MAX,
            ..*self
        }
    }

    /// How the timer is driven, for the log.
    #[must_use]
    pub const fn mode(&self) -> &'static str {
        if self.ratio == 0 {
            "TSC deadline"
        } else {
            "one-shot"
        }
    }

    /// Interrupts the core when its TSC reaches `deadline`; `u64::MAX` turns the timer off.
    #[inline]
    pub fn arm(&mut self, deadline: u64) {
        if deadline != self.armed {
            self.armed = deadline;
            self.program(deadline);
        }
    }

    /// Tells the timer that its interrupt came, so that the same deadline can be armed again.
    pub const fn fired(&mut self) {
        self.armed = u64::MAX;
    }

    fn program(&self, deadline: u64) {
        if self.ratio == 0 {
            let value = if deadline == u64::MAX {
                0
            } else {
                deadline.max(1)
            };
            // SAFETY: TSC-deadline mode was found by CPUID and selected in the LVT.
            unsafe { Msr::new(msr::IA32_TSC_DEADLINE).write(value) };
            return;
        }
        let count = if deadline == u64::MAX {
            0
        } else {
            let distance = deadline.saturating_sub(crate::rdtsc());
            let ticks = (u128::from(distance) * u128::from(self.ratio)) >> 32;
            u32::try_from(ticks).unwrap_or(u32::MAX).max(1)
        };
        self.apic.write(INITIAL_COUNT, count);
    }
}

/// How a pin of the I/O APIC is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trigger {
    /// Rising edges, as ISA devices.
    Edge,
    /// While it is low, as PCI devices.
    Level,
}

/// An I/O APIC (82093AA §3.0): interrupts of devices' pins.
#[derive(Debug)]
pub struct IoApic {
    page: *mut u8,
    last_pin: u8,
}

// SAFETY: its registers are mapped alike on every core.
unsafe impl Send for IoApic {}

impl IoApic {
    /// Takes the I/O APIC over, and masks the two 8259A, which firmware may have left open.
    ///
    /// # Errors
    /// Its registers are not mapped.
    ///
    /// # Safety
    /// `registers` is the I/O APIC that the firmware named; nothing else drives it or the 8259As.
    pub unsafe fn new(map: DirectMap, registers: u64) -> Result<Self, &'static str> {
        let page = map.pointer(HostPhysAddr::new(registers), 0x20);
        let mut this = Self {
            page: page.ok_or("I/O APIC is not mapped")?,
            last_pin: 0,
        };
        for port in [0x21u16, 0xa1] {
            // SAFETY: masking the 8259As (promised by the caller).
            unsafe { crate::power::Port::<u8>::new(port).write(0xff) };
        }
        this.last_pin = (this.access(1, None) >> 16) as u8;
        Ok(this)
    }

    fn access(&mut self, index: u32, value: Option<u32>) -> u32 {
        // SAFETY: IOREGSEL and IOWIN of the I/O APIC (promised to `new`), which `self` owns.
        unsafe {
            self.page.cast::<u32>().write_volatile(index);
            let window = self.page.add(0x10).cast::<u32>();
            value.map_or_else(
                || window.read_volatile(),
                |value| {
                    window.write_volatile(value);
                    value
                },
            )
        }
    }

    /// Sends a pin's interrupt to a core.
    ///
    /// # Errors
    /// It has no such pin, or does not reach the core.
    pub fn route(
        &mut self,
        pin: u8,
        trigger: Trigger,
        vector: u8,
        apic_id: u32,
    ) -> Result<(), &'static str> {
        if apic_id > LAST_XAPIC_ID {
            return Err("the I/O APIC reaches ids up to 254 only");
        }
        if pin > self.last_pin {
            return Err("the I/O APIC has no such pin");
        }
        let entry = 0x10 + 2 * u32::from(pin);
        let trigger = match trigger {
            Trigger::Edge => 0,
            Trigger::Level => 1 << 13 | 1 << 15,
        };
        self.access(entry + 1, Some(apic_id << 24));
        self.access(entry, Some(trigger | u32::from(vector)));
        Ok(())
    }

    /// Holds a pin's interrupts back, or lets them through again.
    pub fn set_masked(&mut self, pin: u8, masked: bool) {
        if pin <= self.last_pin {
            let entry = 0x10 + 2 * u32::from(pin);
            let value = self.access(entry, None) & !MASKED;
            self.access(entry, Some(value | if masked { MASKED } else { 0 }));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A local APIC in xAPIC mode whose registers are plain memory.
    fn with_registers(test: impl FnOnce(&LocalApic, &dyn Fn(u32) -> u32)) {
        let mut page = vec![0u32; 1024];
        let pointer = page.as_mut_ptr();
        let apic = LocalApic {
            registers: Some(pointer.cast()),
        };
        // SAFETY: within the vector, which outlives it.
        let look = |register: u32| unsafe { pointer.add(register as usize / 4).read_volatile() };
        test(&apic, &look);
    }

    #[test]
    fn messages_in_xapic_mode_reach_254_and_no_further() {
        for id in [0, 1, 4, 0x7f, 0x80, 254] {
            with_registers(|apic, look| {
                assert!(apic.reaches(id) && apic.send_ipi(id, 0x51));
                assert_eq!((look(ICR_HIGH), look(ICR_LOW)), (id << 24, 0x4051));
                assert!(apic.send_startup(id, 0x9a));
                assert_eq!((look(ICR_HIGH), look(ICR_LOW)), (id << 24, 0x469a));
                assert!(apic.send_init(id) && apic.send_nmi(id));
            });
        }
        // 255 is everybody: an id cut to eight bits would call a core that was not meant.
        for id in [255, 256, 0x1_0004, u32::MAX] {
            with_registers(|apic, look| {
                assert!(!apic.reaches(id) && !apic.send_init(id) && !apic.send_ipi(id, 0x51));
                assert_eq!((look(ICR_HIGH), look(ICR_LOW)), (0, 0), "{id:#x}");
            });
        }
    }

    #[test]
    fn messages_in_x2apic_mode_have_32_bits_of_id() {
        let apic = LocalApic { registers: None };
        for id in [0, 254, 255, 256, 0x1_0004, u32::MAX - 1] {
            assert!(apic.reaches(id));
            assert_eq!(
                wide_command(id, INIT | ASSERT),
                u64::from(id) << 32 | 0x4500
            );
        }
    }

    #[test]
    fn a_message_that_is_stuck_is_told_of() {
        with_registers(|apic, look| {
            apic.write(ICR_LOW, PENDING);
            assert!(!apic.send_ipi(1, 0x51));
            assert_eq!((look(ICR_HIGH), look(ICR_LOW)), (0, PENDING));
        });
    }
}
