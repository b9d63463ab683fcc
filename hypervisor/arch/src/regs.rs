//! Registers as values. The flags carry the names of the manuals and no words of their own.
#![allow(missing_docs)]

use serde::{Deserialize, Serialize};

/// A general-purpose register, numbered as instructions encode it (Intel SDM Vol. 2A table 2-2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[repr(u8)]
pub enum Gpr {
    Rax = 0,
    Rcx = 1,
    Rdx = 2,
    Rbx = 3,
    Rsp = 4,
    Rbp = 5,
    Rsi = 6,
    Rdi = 7,
    R8 = 8,
    R9 = 9,
    R10 = 10,
    R11 = 11,
    R12 = 12,
    R13 = 13,
    R14 = 14,
    R15 = 15,
}

impl Gpr {
    /// All sixteen, in encoding order.
    pub const ALL: [Self; 16] = [
        Self::Rax,
        Self::Rcx,
        Self::Rdx,
        Self::Rbx,
        Self::Rsp,
        Self::Rbp,
        Self::Rsi,
        Self::Rdi,
        Self::R8,
        Self::R9,
        Self::R10,
        Self::R11,
        Self::R12,
        Self::R13,
        Self::R14,
        Self::R15,
    ];

    /// The register with the low four bits of `number`.
    #[must_use]
    pub const fn from_number(number: u8) -> Self {
        Self::ALL[(number & 15) as usize]
    }
}

/// The general-purpose registers but RSP, which the hardware keeps in its own control structure
/// on both vendors (and RAX on AMD, where the backend mirrors it here). Indexed by [`Gpr`]; the
/// slot of RSP is not used: see [`crate::Vcpu::rsp`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[repr(C, align(64))]
pub struct Gprs(pub [u64; 16]);

impl core::ops::Index<Gpr> for Gprs {
    type Output = u64;
    fn index(&self, gpr: Gpr) -> &u64 {
        &self.0[gpr as usize]
    }
}

impl core::ops::IndexMut<Gpr> for Gprs {
    fn index_mut(&mut self, gpr: Gpr) -> &mut u64 {
        &mut self.0[gpr as usize]
    }
}

/// A control register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ControlRegister {
    Cr0,
    Cr2,
    Cr3,
    Cr4,
    Cr8,
}

/// A debug register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DebugRegister {
    Dr0,
    Dr1,
    Dr2,
    Dr3,
    Dr4,
    Dr5,
    Dr6,
    Dr7,
}

impl DebugRegister {
    /// The register with the low three bits of `number`.
    #[must_use]
    pub const fn from_number(number: u8) -> Self {
        match number & 7 {
            0 => Self::Dr0,
            1 => Self::Dr1,
            2 => Self::Dr2,
            3 => Self::Dr3,
            4 => Self::Dr4,
            5 => Self::Dr5,
            6 => Self::Dr6,
            _ => Self::Dr7,
        }
    }
}

bitflags::bitflags! {
    /// CR0 (Intel SDM Vol. 3A §2.5).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Cr0: u64 {
        const PE = 1 << 0;
        const MP = 1 << 1;
        const EM = 1 << 2;
        const TS = 1 << 3;
        const ET = 1 << 4;
        const NE = 1 << 5;
        const WP = 1 << 16;
        const AM = 1 << 18;
        const NW = 1 << 29;
        const CD = 1 << 30;
        const PG = 1 << 31;
        const _ = !0;
    }

    /// CR4 (Intel SDM Vol. 3A §2.5).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Cr4: u64 {
        const VME = 1 << 0;
        const PVI = 1 << 1;
        const TSD = 1 << 2;
        const DE = 1 << 3;
        const PSE = 1 << 4;
        const PAE = 1 << 5;
        const MCE = 1 << 6;
        const PGE = 1 << 7;
        const PCE = 1 << 8;
        const OSFXSR = 1 << 9;
        const OSXMMEXCPT = 1 << 10;
        const UMIP = 1 << 11;
        const LA57 = 1 << 12;
        const VMXE = 1 << 13;
        const SMXE = 1 << 14;
        const FSGSBASE = 1 << 16;
        const PCIDE = 1 << 17;
        const OSXSAVE = 1 << 18;
        const SMEP = 1 << 20;
        const SMAP = 1 << 21;
        const PKE = 1 << 22;
        const CET = 1 << 23;
        const PKS = 1 << 24;
        const _ = !0;
    }

    /// IA32_EFER (Intel SDM Vol. 3A §2.2.1, AMD APM Vol. 2 §3.1.7).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Efer: u64 {
        const SCE = 1 << 0;
        const LME = 1 << 8;
        const LMA = 1 << 10;
        const NXE = 1 << 11;
        const SVME = 1 << 12;
        const LMSLE = 1 << 13;
        const FFXSR = 1 << 14;
        const TCE = 1 << 15;
        const _ = !0;
    }

    /// RFLAGS (Intel SDM Vol. 1 §3.4.3). Bit 1 always reads as one.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct RFlags: u64 {
        const CF = 1 << 0;
        const FIXED = 1 << 1;
        const PF = 1 << 2;
        const AF = 1 << 4;
        const ZF = 1 << 6;
        const SF = 1 << 7;
        const TF = 1 << 8;
        const IF = 1 << 9;
        const DF = 1 << 10;
        const OF = 1 << 11;
        const IOPL = 3 << 12;
        const NT = 1 << 14;
        const RF = 1 << 16;
        const VM = 1 << 17;
        const AC = 1 << 18;
        const VIF = 1 << 19;
        const VIP = 1 << 20;
        const ID = 1 << 21;
        const _ = !0;
    }
}

/// A segment register by its instruction encoding; LDTR and TR follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[repr(u8)]
pub enum SegmentRegister {
    Es = 0,
    Cs = 1,
    Ss = 2,
    Ds = 3,
    Fs = 4,
    Gs = 5,
    Ldtr = 6,
    Tr = 7,
}

/// Segment attributes in the VMX access-rights layout (Intel SDM Vol. 3C table 25-2):
/// type 3:0, S 4, DPL 6:5, P 7, AVL 12, L 13, D/B 14, G 15, unusable 16.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AccessRights(pub u32);

impl AccessRights {
    /// A segment that must not be used (a null selector).
    pub const UNUSABLE: Self = Self(1 << 16);

    /// The type field, 0 to 15.
    #[must_use]
    pub const fn kind(self) -> u8 {
        (self.0 & 15) as u8
    }
    /// Descriptor privilege level, 0 to 3.
    #[must_use]
    pub const fn dpl(self) -> u8 {
        ((self.0 >> 5) & 3) as u8
    }
    /// Present.
    #[must_use]
    pub const fn present(self) -> bool {
        self.0 & (1 << 7) != 0
    }
    /// 64-bit code segment.
    #[must_use]
    pub const fn long(self) -> bool {
        self.0 & (1 << 13) != 0
    }
    /// D/B: 32-bit default operand and address size.
    #[must_use]
    pub const fn default_big(self) -> bool {
        self.0 & (1 << 14) != 0
    }
    /// Whether the segment must not be used.
    #[must_use]
    pub const fn unusable(self) -> bool {
        self.0 & (1 << 16) != 0
    }
}

/// A segment register with its hidden part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// The visible part.
    pub selector: u16,
    /// Attributes.
    pub rights: AccessRights,
    /// Limit in bytes (granularity already applied).
    pub limit: u32,
    /// Linear base address.
    pub base: u64,
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DescriptorTable {
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u16,
}
