//! A vCPU that is only its registers, for host tests.

use alloc::collections::BTreeMap;
use arch::{
    ControlRegister, DebugRegister, DescriptorTable, Event, Exit, Gprs, HostPhysAddr,
    Interruptibility, RFlags, Segment, SegmentRegister, Vcpu, msr::VCPU_STATE,
};

/// Control registers are kept; what no test here looks at reads as zero.
#[derive(Default)]
pub struct FakeVcpu {
    pub gprs: Gprs,
    pub cr0: u64,
    pub cr4: u64,
    pub efer: u64,
    pub xcr0: u64,
    pub msrs: BTreeMap<u32, u64>,
}

impl Vcpu for FakeVcpu {
    fn load(&mut self) {}
    fn unload(&mut self) {}
    fn enter(&mut self) -> Exit {
        Exit::Benign
    }
    fn gprs(&self) -> &Gprs {
        &self.gprs
    }
    fn gprs_mut(&mut self) -> &mut Gprs {
        &mut self.gprs
    }
    fn rsp(&self) -> u64 {
        0
    }
    fn set_rsp(&mut self, _: u64) {}
    fn rip(&self) -> u64 {
        0
    }
    fn set_rip(&mut self, _: u64) {}
    fn next_rip(&self) -> Option<u64> {
        None
    }
    fn rflags(&self) -> RFlags {
        RFlags::FIXED
    }
    fn set_rflags(&mut self, _: RFlags) {}
    fn cr(&self, register: ControlRegister) -> u64 {
        match register {
            ControlRegister::Cr0 => self.cr0,
            ControlRegister::Cr4 => self.cr4,
            _ => 0,
        }
    }
    fn set_cr(&mut self, _: ControlRegister, _: u64) {}
    fn dr(&self, _: DebugRegister) -> u64 {
        0
    }
    fn set_dr(&mut self, _: DebugRegister, _: u64) {}
    fn segment(&self, _: SegmentRegister) -> Segment {
        Segment::default()
    }
    fn set_segment(&mut self, _: SegmentRegister, _: Segment) {}
    fn gdtr(&self) -> DescriptorTable {
        DescriptorTable::default()
    }
    fn set_gdtr(&mut self, _: DescriptorTable) {}
    fn idtr(&self) -> DescriptorTable {
        DescriptorTable::default()
    }
    fn set_idtr(&mut self, _: DescriptorTable) {}
    fn efer(&self) -> u64 {
        self.efer
    }
    fn set_efer(&mut self, value: u64) {
        self.efer = value;
    }
    fn msr(&self, index: u32) -> Option<u64> {
        VCPU_STATE
            .contains(&index)
            .then(|| self.msrs.get(&index).copied().unwrap_or(0))
    }
    fn set_msr(&mut self, index: u32, value: u64) -> bool {
        if VCPU_STATE.contains(&index) {
            self.msrs.insert(index, value);
        }
        VCPU_STATE.contains(&index)
    }
    fn xcr0(&self) -> u64 {
        self.xcr0
    }
    fn set_xcr0(&mut self, value: u64) {
        self.xcr0 = value;
    }
    fn interruptibility(&self) -> Interruptibility {
        Interruptibility::default()
    }
    fn inject(&mut self, _: Event) -> bool {
        true
    }
    fn pending_event(&self) -> Option<Event> {
        None
    }
    fn request_interrupt_window(&mut self, _: bool) {}
    fn request_nmi_window(&mut self, _: bool) {}
    fn set_tsc_offset(&mut self, _: u64) {}
    fn set_deadline(&mut self, _: u64) -> bool {
        false
    }
    fn flush_nested(&mut self, _: HostPhysAddr) {}
    fn virtual_tpr(&self) -> Option<u8> {
        None
    }
    fn set_virtual_tpr(&mut self, _: u8, _: u8) {}
    fn reset(&mut self) {}
}

/// Numbers that look random and are the same each time (xorshift64*).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}
