//! The APICs of a machine in one place, for tests: each access is followed by all that it causes.

use super::{ApicEffect, ApicMode, Gp, LocalApic, Router, Signals};
use crate::clock::TscClock;
use arch::Nanos;

pub(crate) struct Apics {
    pub local: Vec<LocalApic>,
    pub router: Router,
}

impl Apics {
    pub fn new(vcpus: u32, clock: TscClock) -> Self {
        let router = Router::new(vcpus);
        let mut local: Vec<_> = (0..vcpus)
            .map(|id| LocalApic::new(id, id == 0, 40, clock))
            .collect();
        local[0].virtual_wire();
        let mut this = Self { local, router };
        this.publish();
        this.take_kicks();
        this
    }

    /// After changes behind the fabric's back.
    pub fn publish(&mut self) {
        for apic in &mut self.local {
            self.router.fabric().publish(apic);
        }
        self.collect();
    }

    pub fn collect(&mut self) {
        for apic in &mut self.local {
            self.router.fabric().collect(apic);
        }
    }

    pub fn take_kicks(&mut self) -> u64 {
        self.router.fabric().take_kicks()
    }

    pub fn apply(&mut self, vcpu: usize, effect: ApicEffect) {
        let fabric = self.router.fabric().clone();
        if let Some(apic) = self.local.get_mut(vcpu)
            && fabric.apply(apic, effect)
        {
            self.router.finish(effect);
        }
        self.collect();
    }

    pub fn write_mmio(&mut self, vcpu: usize, offset: u16, value: u32, now: Nanos) {
        if let Some(apic) = self.local.get_mut(vcpu) {
            let effect = apic.write_mmio(offset, value, now);
            self.apply(vcpu, effect);
        }
    }

    pub fn write_msr(&mut self, vcpu: usize, index: u32, value: u64, now: Nanos) -> Result<(), Gp> {
        let effect = self
            .local
            .get_mut(vcpu)
            .ok_or(Gp)?
            .write_msr(index, value, now)?;
        self.apply(vcpu, effect);
        Ok(())
    }

    pub fn set_gsi(&mut self, gsi: u32, asserted: bool) {
        self.router.set_gsi(gsi, asserted);
        self.collect();
    }

    pub fn set_extint(&mut self, asserted: bool) {
        self.router.set_extint(asserted);
        self.collect();
    }

    pub fn write_io(&mut self, offset: u16, value: u32) {
        self.router.write_io(offset, value);
        self.collect();
    }

    pub fn msi(&mut self, address: u64, data: u32) -> bool {
        let taken = self.router.msi(address, data);
        self.collect();
        taken
    }

    pub fn take_signals(&mut self, vcpu: usize) -> Signals {
        self.local
            .get_mut(vcpu)
            .map_or(Signals::default(), LocalApic::take_signals)
    }

    /// Whether the 8259's output, which is up, is for this vCPU.
    pub fn accepts_extint(&self, vcpu: usize) -> bool {
        self.router.fabric().extint_for(&self.local[vcpu])
    }

    pub fn set_base_msr(&mut self, vcpu: usize, value: u64) -> Result<ApicMode, Gp> {
        self.local[vcpu].set_base_msr(value)?;
        self.publish();
        Ok(self.local[vcpu].mode())
    }
}
