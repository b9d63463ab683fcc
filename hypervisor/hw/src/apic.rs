//! The core's own local APIC (Intel SDM Vol. 3A ch. 11): end of interrupt, and the timer that
//! takes the core back from a guest.

use crate::DirectMap;
use arch::{HostPhysAddr, msr};
use x86_64::registers::model_specific::Msr;

/// The vector of the core's timer.
pub const TIMER_VECTOR: u8 = 0xf0;
/// The vector of spurious interrupts (low four bits set, for old APICs).
pub const SPURIOUS_VECTOR: u8 = 0xff;

/// The vector of the serial port.
pub const SERIAL_VECTOR: u8 = 0x40;

const ENABLED: u64 = 1 << 11;
const X2APIC: u64 = 1 << 10;
const MASKED: u32 = 1 << 16;
const TSC_DEADLINE_MODE: u32 = 2 << 17;

/// Register offsets.
const ID: u32 = 0x20;
const TPR: u32 = 0x80;
const EOI: u32 = 0xb0;
const SVR: u32 = 0xf0;
const LVT_TIMER: u32 = 0x320;
const LVT_LINT0: u32 = 0x350;
const LVT_LINT1: u32 = 0x360;
const LVT_ERROR: u32 = 0x370;
const INITIAL_COUNT: u32 = 0x380;
const CURRENT_COUNT: u32 = 0x390;
const DIVIDE: u32 = 0x3e0;

/// The local APIC of the calling core.
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
    /// Enables the core's local APIC in the mode the firmware chose, with everything masked.
    /// `None` where there is none or its registers are not mapped.
    ///
    /// # Safety
    /// Called on the core itself, interrupts off; nothing else drives the local APIC.
    #[must_use]
    pub unsafe fn enable(map: DirectMap) -> Option<Self> {
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
            Some(map.pointer(HostPhysAddr::new(value & 0x000f_ffff_ffff_f000), 0x1000)?)
        };
        let this = Self { registers };
        for lvt in [LVT_TIMER, LVT_LINT0, LVT_LINT1, LVT_ERROR] {
            this.write(lvt, MASKED);
        }
        this.write(TPR, 0);
        this.write(SVR, 1 << 8 | u32::from(SPURIOUS_VECTOR));
        Some(this)
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

/// Sends one edge-triggered interrupt of the I/O APIC at `registers` (82093AA §3.0) to a core,
/// and masks the two 8259A, which firmware may have left open.
///
/// # Errors
/// The I/O APIC's registers are not mapped, or it has no such pin.
///
/// # Safety
/// `registers` is the I/O APIC that the firmware named; nothing else drives it or the 8259As.
pub unsafe fn route_interrupt(
    map: DirectMap,
    registers: u64,
    pin: u8,
    vector: u8,
    apic_id: u32,
) -> Result<(), &'static str> {
    let page = map
        .pointer(HostPhysAddr::new(registers), 0x20)
        .ok_or("I/O APIC is not mapped")?;
    let access = |index: u32, value: Option<u32>| {
        // SAFETY: IOREGSEL and IOWIN of the I/O APIC (promised by the caller).
        unsafe {
            page.cast::<u32>().write_volatile(index);
            let window = page.add(0x10).cast::<u32>();
            value.map_or_else(
                || window.read_volatile(),
                |value| {
                    window.write_volatile(value);
                    value
                },
            )
        }
    };
    let last_pin = access(1, None) >> 16 & 0xff;
    if u32::from(pin) > last_pin {
        return Err("the I/O APIC has no such pin");
    }
    for port in [0x21u16, 0xa1] {
        // SAFETY: masking the 8259As (promised by the caller).
        unsafe { crate::power::Port::<u8>::new(port).write(0xff) };
    }
    let entry = 0x10 + 2 * u32::from(pin);
    access(entry + 1, Some((apic_id & 0xff) << 24));
    access(entry, Some(vector.into()));
    Ok(())
}
