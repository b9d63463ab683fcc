//! The way between the APICs of a VM: from a pin, an MSI or an IPI to the vCPUs it is for.

use super::io::PINS;
use super::{
    ApicEffect, DeliveryMode, Gp, IoApic, Ipi, LocalApic, LocalApicState, Message, RestoreError,
    Shorthand, Signals,
};
use crate::clock::TscClock;
use alloc::vec::Vec;
use arch::Nanos;
use serde::{Deserialize, Serialize};

/// The most vCPUs a VM can have.
pub const MAX_VCPUS: u32 = 64;

/// What the caller has to do after a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Then {
    /// Nothing.
    Nothing,
    /// The vCPU's [`LocalApic::next_event`] has changed.
    Timer,
}

/// The APICs of a VM. APIC ids are vCPU numbers.
pub struct ApicFabric {
    /// One for each vCPU.
    pub local: Vec<LocalApic>,
    /// The I/O APIC.
    pub io: IoApic,
    /// vCPUs that got something since [`ApicFabric::take_kicks`].
    kicks: u64,
}

/// Everything the APICs remember, for saving.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ApicFabricState {
    local: Vec<LocalApicState>,
    io: IoApic,
}

impl ApicFabric {
    /// The APICs of `vcpus` vCPUs (1 to [`MAX_VCPUS`]) as firmware leaves them: vCPU 0 is the
    /// boot CPU in virtual wire mode, the others are as after RESET.
    #[must_use]
    pub fn new(vcpus: u32, phys_bits: u8, clock: TscClock) -> Self {
        let mut local: Vec<_> = (0..vcpus.clamp(1, MAX_VCPUS))
            .map(|id| LocalApic::new(id, id == 0, phys_bits, clock))
            .collect();
        local[0].virtual_wire();
        Self {
            local,
            io: IoApic::default(),
            kicks: 0,
        }
    }

    /// RESET of the machine, and what its firmware does then.
    pub fn reset(&mut self) {
        self.io.reset();
        self.local.iter_mut().for_each(LocalApic::reset);
        if let Some(boot) = self.local.first_mut() {
            boot.virtual_wire();
        }
        self.kicks = 0;
    }

    /// A set of the vCPUs that got an interrupt or a signal since the last call, by bit number:
    /// wake them.
    pub const fn take_kicks(&mut self) -> u64 {
        core::mem::replace(&mut self.kicks, 0)
    }

    /// The signals that wait for a vCPU; they are gone then.
    pub fn take_signals(&mut self, vcpu: usize) -> Signals {
        self.local
            .get_mut(vcpu)
            .map_or(Signals::default(), LocalApic::take_signals)
    }

    /// Delivers a message from a pin or a device; `false` if nobody took it.
    pub fn deliver(&mut self, message: &Message) -> bool {
        self.deliver_but(message, usize::MAX)
    }

    fn deliver_but(&mut self, message: &Message, except: usize) -> bool {
        // By far the most: one CPU by its id.
        if !message.logical && message.dest != Message::ALL {
            let target = message.dest as usize;
            return target != except && self.take(target, message);
        }
        if message.mode == DeliveryMode::LowestPriority {
            let target = self.targets(message, except).min_by_key(|&i| {
                let apic = &self.local[i];
                (!apic.is_enabled(), apic.ppr())
            });
            return target.is_some_and(|target| self.take(target, message));
        }
        let mut taken = false;
        for target in 0..self.local.len() {
            taken |= target != except && self.take(target, message);
        }
        taken
    }

    fn targets(&self, message: &Message, except: usize) -> impl Iterator<Item = usize> {
        self.local
            .iter()
            .enumerate()
            .filter(move |(i, apic)| *i != except && apic.is_destination(message))
            .map(|(i, _)| i)
    }

    /// Gives `message` to a vCPU if it is for that one.
    fn take(&mut self, target: usize, message: &Message) -> bool {
        let Some(apic) = self.local.get_mut(target) else {
            return false;
        };
        let taken = apic.is_destination(message) && apic.take(message);
        if taken {
            self.kicks |= 1 << (target & 63);
        }
        taken
    }

    /// Routes an IPI from vCPU `from`.
    pub fn send(&mut self, from: usize, ipi: &Ipi) {
        let all = Message {
            dest: Message::ALL,
            logical: false,
            ..ipi.message
        };
        match ipi.shorthand {
            Shorthand::None => self.deliver(&ipi.message),
            Shorthand::SelfOnly => self
                .local
                .get_mut(from)
                .is_some_and(|apic| apic.take(&ipi.message)),
            Shorthand::All => self.deliver(&all),
            Shorthand::Others => self.deliver_but(&all, from),
        };
    }

    /// A message-signalled interrupt: a device's write of `data` to `address`. `false` if it is
    /// none or nobody took it.
    pub fn msi(&mut self, address: u64, data: u32) -> bool {
        Message::from_msi(address, data).is_some_and(|message| self.deliver(&message))
    }

    /// Sets the level of a global system interrupt, a pin of the I/O APIC. Pin 0 is that of the
    /// 8259: see [`ApicFabric::set_extint`].
    #[inline]
    pub fn set_gsi(&mut self, gsi: u32, asserted: bool) {
        let pin = gsi as usize;
        if let Some(edge) = self.io.set_pin(pin, asserted) {
            self.deliver(&edge);
        } else if asserted {
            self.service(pin);
        }
    }

    /// Sets the level of the 8259's output, which is wired to LINT0 of every local APIC.
    pub fn set_extint(&mut self, asserted: bool) {
        for (i, apic) in self.local.iter_mut().enumerate() {
            apic.set_lint(0, asserted);
            self.kicks |= u64::from(asserted) << (i & 63);
        }
    }

    /// Whether an interrupt of the 8259 would be taken by this vCPU: through LINT0, or through
    /// pin 0 of the I/O APIC programmed as ExtINT.
    #[must_use]
    pub fn accepts_extint(&self, vcpu: usize) -> bool {
        self.local.get(vcpu).is_some_and(|apic| {
            apic.accepts_extint()
                || self
                    .io
                    .extint()
                    .is_some_and(|message| apic.is_destination(&message))
        })
    }

    fn service(&mut self, pin: usize) {
        if let Some(message) = self.io.level_message(pin)
            && self.deliver(&message)
        {
            self.io.level_taken(pin);
        }
    }

    fn service_all(&mut self, mut pins: u32) {
        while pins != 0 {
            self.service(pins.trailing_zeros() as usize);
            pins &= pins - 1;
        }
    }

    /// Tries level-triggered pins again that nobody would take: after a local APIC was enabled
    /// or moved to another mode.
    pub fn retry(&mut self) {
        self.service_all((1 << PINS) - 1);
    }

    /// Reads in the I/O APIC's MMIO window.
    #[must_use]
    pub fn read_io(&self, offset: u16) -> u32 {
        self.io.read(offset)
    }

    /// Writes in the I/O APIC's MMIO window.
    pub fn write_io(&mut self, offset: u16, value: u32) {
        let pins = self.io.write(offset, value);
        self.service_all(pins);
    }

    /// Reads in the local APIC's page of a vCPU.
    pub fn read_mmio(&mut self, vcpu: usize, offset: u16, now: Nanos) -> u32 {
        self.local
            .get_mut(vcpu)
            .map_or(u32::MAX, |apic| apic.read_mmio(offset, now))
    }

    /// Writes in the local APIC's page of a vCPU, and does all that follows.
    pub fn write_mmio(&mut self, vcpu: usize, offset: u16, value: u32, now: Nanos) -> Then {
        match self.local.get_mut(vcpu) {
            Some(apic) => {
                let effect = apic.write_mmio(offset, value, now);
                self.apply(vcpu, effect)
            }
            None => Then::Nothing,
        }
    }

    /// Writes an x2APIC register of a vCPU, and does all that follows.
    ///
    /// # Errors
    /// As [`LocalApic::write_msr`].
    #[inline]
    pub fn write_msr(
        &mut self,
        vcpu: usize,
        index: u32,
        value: u64,
        now: Nanos,
    ) -> Result<Then, Gp> {
        let effect = self
            .local
            .get_mut(vcpu)
            .ok_or(Gp)?
            .write_msr(index, value, now)?;
        Ok(self.apply(vcpu, effect))
    }

    /// Does what a write to the local APIC of `vcpu` has left to do.
    #[inline]
    pub fn apply(&mut self, vcpu: usize, effect: ApicEffect) -> Then {
        match effect {
            ApicEffect::None => Then::Nothing,
            ApicEffect::Timer => Then::Timer,
            other => {
                self.carry(vcpu, other);
                Then::Nothing
            }
        }
    }

    #[inline(never)]
    fn carry(&mut self, vcpu: usize, effect: ApicEffect) {
        match effect {
            ApicEffect::Eoi(vector) => {
                let pins = self.io.eoi(vector);
                self.service_all(pins);
            }
            ApicEffect::Ipi => {
                if let Some(ipi) = self.local.get(vcpu).map(LocalApic::outgoing) {
                    self.send(vcpu, &ipi);
                }
            }
            ApicEffect::Reachable => self.retry(),
            ApicEffect::None | ApicEffect::Timer => {}
        }
    }

    /// All state, for saving.
    #[must_use]
    pub fn save(&self) -> ApicFabricState {
        ApicFabricState {
            local: self.local.iter().map(LocalApic::save).collect(),
            io: self.io.clone(),
        }
    }

    /// Puts saved state in place.
    ///
    /// # Errors
    /// The state is of another number of vCPUs, or not that of local APICs.
    pub fn restore(&mut self, state: &ApicFabricState) -> Result<(), RestoreError> {
        let (found, wanted) = (state.local.len(), self.local.len());
        if found != wanted {
            return Err(RestoreError::Count { found, wanted });
        }
        for (apic, saved) in self.local.iter_mut().zip(&state.local) {
            apic.restore(saved)?;
        }
        self.io = state.io.clone();
        Ok(())
    }
}
