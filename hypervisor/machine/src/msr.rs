//! What RDMSR and WRMSR do for a guest (Intel SDM Vol. 4, AMD APM Vol. 2 appendix A, and the
//! processor programming references).
//!
//! An MSR is one of: part of the vCPU's switched state (reached through [`Vcpu::msr`]), part of
//! the local APIC, kept in [`MsrState`], a constant, or absent; [`TABLE`] has a row for each one
//! that Linux or Windows is known to touch and that does nothing but read back. Everything else
//! is #GP, and [`MsrFault::Unknown`] tells the caller to count and log it.

use crate::{
    apic::{ApicEffect, LocalApic},
    cpuid::Features,
    pvclock,
};
use abi::msr as pv;
use arch::{ControlRegister, Cr0, Efer, GuestPhysAddr, Nanos, Vcpu, msr as index};
use serde::{Deserialize, Serialize};

const IA32_TSC_ADJUST: u32 = 0x3b;
const IA32_PRED_CMD: u32 = 0x49;
const IA32_BIOS_SIGN_ID: u32 = 0x8b;
const PLATFORM_INFO: u32 = 0xce;
const IA32_MTRRCAP: u32 = 0xfe;
const IA32_ARCH_CAPABILITIES: u32 = 0x10a;
const IA32_PERF_STATUS: u32 = 0x198;
const MTRR_VARIABLE_FIRST: u32 = 0x200;
const MTRR_VARIABLE_LAST: u32 = 0x20f;
const MTRR_FIX64K: u32 = 0x250;
const MTRR_FIX16K_FIRST: u32 = 0x258;
const MTRR_FIX16K_LAST: u32 = 0x259;
const MTRR_FIX4K_FIRST: u32 = 0x268;
const MTRR_FIX4K_LAST: u32 = 0x26f;
const MTRR_DEF_TYPE: u32 = 0x2ff;

/// Eight variable ranges, fixed ranges, write-combining.
const MTRRCAP_VALUE: u64 = 8 | 1 << 8 | 1 << 10;
const MTRR_ENABLE: u64 = 1 << 11;
const MTRR_FIXED_ENABLE: u64 = 1 << 10;
const WRITE_BACK: u64 = 6;

/// Single-step on branches; the other bits of IA32_DEBUGCTL are branch records and counters.
const DEBUGCTL_BTF: u64 = 1 << 1;
const DEBUGCTL_LBR: u64 = 1 << 0;

/// What a guest's access to an MSR ends in, when it is #GP(0).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MsrFault {
    /// The MSR is known; it does not exist on this CPU, or not in this way.
    Protection,
    /// Nobody thought of this MSR: count it, and log it now and then.
    Unknown,
}

/// What a WRMSR leaves for the caller to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum MsrEffect {
    /// Nothing.
    None,
    /// For [`ApicFabric::apply`](crate::apic::ApicFabric::apply).
    Apic(ApicEffect),
    /// The local APIC's mode or address may have changed.
    ApicBase,
    /// The vCPU's TSC moved: set the hardware's offset from the new
    /// [`TscClock::base`](crate::clock::TscClock::base), and write the time record again
    /// ([`MsrState::system_time`]).
    Tsc,
    /// The time record was registered or dropped ([`MsrState::system_time`]).
    SystemTime,
    /// Write the wall clock record ([`MsrState::wall_clock`]).
    WallClock,
    /// The record of stolen time was registered or dropped ([`MsrState::steal_time`]): what is
    /// stolen counts from here.
    StealTime,
    /// Make an indirect branch prediction barrier (write IA32_PRED_CMD).
    PredictionBarrier,
}

/// What an access works on.
pub struct MsrContext<'a, V: Vcpu + ?Sized> {
    /// The vCPU's hardware state.
    pub vcpu: &'a mut V,
    /// The vCPU's local APIC.
    pub apic: &'a mut LocalApic,
    /// What CPUID promises.
    pub features: &'a Features,
    /// The VM's time.
    pub now: Nanos,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Vendor {
    Any,
    Intel,
    Amd,
}

#[derive(Clone, Copy)]
enum Rule {
    /// Known, and not there: CPUID says so, or probing kernels expect #GP.
    Absent,
    /// Reads as this; a write is #GP.
    Constant(u64),
    /// Reads as this; writes go nowhere, as nothing is behind it.
    Ignored(u64),
    /// Kept in [`MsrState::stored`]: the bits of the mask can be set, others keep their values.
    Stored(Slot, u64),
}

#[derive(Clone, Copy)]
enum Slot {
    MiscEnable,
    McgStatus,
    Hwcr,
    DeCfg,
}
const SLOTS: usize = 4;

/// What the stored MSRs hold after reset: fast strings, no BTS, no PEBS; nothing; the TSC counts
/// at the P0 frequency; LFENCE is serializing.
const STORED_AT_RESET: [u64; SLOTS] = [1 | 1 << 11 | 1 << 12, 0, 1 << 24, 1 << 1];

struct Row {
    first: u32,
    last: u32,
    vendor: Vendor,
    rule: Rule,
}

const fn row(first: u32, last: u32, vendor: Vendor, rule: Rule) -> Row {
    Row {
        first,
        last,
        vendor,
        rule,
    }
}

/// MSRs without behaviour, by number. On the other vendor's CPU a row counts as absent.
#[rustfmt::skip]
const TABLE: &[Row] = {
    use Rule::{Absent, Constant, Ignored, Stored};
    use Vendor::{Amd, Any, Intel};
    &[
        row(0x0000_0000, 0x0000_0001, Any,   Constant(0)),       // P5_MC_ADDR, P5_MC_TYPE
        row(0x0000_0017, 0x0000_0017, Intel, Constant(0)),       // PLATFORM_ID
        row(0x0000_002a, 0x0000_002a, Intel, Ignored(0)),        // EBL_CR_POWERON
        row(0x0000_002c, 0x0000_002c, Intel, Constant(1 << 24)), // EBC_FREQUENCY_ID: ratio 1
        row(0x0000_0033, 0x0000_0033, Any,   Absent),            // TEST_CTRL
        row(0x0000_0034, 0x0000_0034, Intel, Constant(0)),       // SMI_COUNT
        row(0x0000_0035, 0x0000_0035, Any,   Absent),            // CORE_THREAD_COUNT
        row(0x0000_003a, 0x0000_003a, Intel, Constant(1)),       // FEATURE_CONTROL: locked, off
        row(0x0000_004e, 0x0000_004f, Any,   Absent),            // PPIN
        row(0x0000_0079, 0x0000_0079, Intel, Ignored(0)),        // BIOS_UPDT_TRIG
        row(0x0000_009b, 0x0000_009b, Any,   Absent),            // SMM_MONITOR_CTL
        row(0x0000_00c1, 0x0000_00c8, Any,   Absent),            // PMC0–7: no counters
        row(0x0000_00cd, 0x0000_00cd, Intel, Constant(5)),       // FSB_FREQ: 100 MHz
        row(0x0000_00cf, 0x0000_00cf, Any,   Absent),            // CORE_CAPABILITIES
        row(0x0000_00e1, 0x0000_00e1, Any,   Absent),            // UMWAIT_CONTROL
        row(0x0000_00e2, 0x0000_00e2, Intel, Ignored(0)),        // PKG_CST_CONFIG_CONTROL
        row(0x0000_00e7, 0x0000_00e8, Any,   Absent),            // MPERF, APERF
        row(0x0000_010b, 0x0000_010b, Any,   Absent),            // FLUSH_CMD
        row(0x0000_011e, 0x0000_011e, Intel, Constant(0x101)),   // BBL_CR_CTL3: L2 there and on
        row(0x0000_0122, 0x0000_0123, Any,   Absent),            // TSX_CTRL, MCU_OPT_CTRL
        row(0x0000_0140, 0x0000_0140, Any,   Absent),            // MISC_FEATURES_ENABLES
        row(0x0000_0179, 0x0000_0179, Any,   Constant(0)),       // MCG_CAP: no banks
        row(0x0000_017a, 0x0000_017a, Any,   Stored(Slot::McgStatus, 7)),
        row(0x0000_017b, 0x0000_017b, Any,   Absent),            // MCG_CTL
        row(0x0000_0186, 0x0000_018d, Any,   Absent),            // PERFEVTSEL0–7
        row(0x0000_0199, 0x0000_0199, Intel, Ignored(0)),        // PERF_CTL
        row(0x0000_019a, 0x0000_019d, Intel, Ignored(0)),        // CLOCK_MODULATION, THERM_*
        row(0x0000_01a0, 0x0000_01a0, Intel, Stored(Slot::MiscEnable, 1)),
        row(0x0000_01a2, 0x0000_01a2, Any,   Absent),            // TEMPERATURE_TARGET
        row(0x0000_01a4, 0x0000_01a4, Intel, Ignored(0)),        // MISC_FEATURE_CONTROL
        row(0x0000_01a6, 0x0000_01a7, Any,   Absent),            // OFFCORE_RSP
        row(0x0000_01aa, 0x0000_01aa, Intel, Ignored(0)),        // MISC_PWR_MGMT
        row(0x0000_01ad, 0x0000_01af, Intel, Constant(0)),       // TURBO_RATIO_LIMIT
        row(0x0000_01b0, 0x0000_01b2, Any,   Absent),            // ENERGY_PERF_BIAS, PACKAGE_THERM
        row(0x0000_01c4, 0x0000_01c5, Any,   Absent),            // XFD
        row(0x0000_01c8, 0x0000_01c9, Any,   Absent),            // LBR_SELECT, LASTBRANCH_TOS
        row(0x0000_01db, 0x0000_01de, Any,   Constant(0)),       // last branch, last interrupt
        row(0x0000_01f2, 0x0000_01f8, Any,   Absent),            // SMRR, DCA
        row(0x0000_01fc, 0x0000_01fc, Intel, Ignored(0)),        // POWER_CTL
        row(0x0000_0280, 0x0000_029f, Any,   Absent),            // MC_CTL2
        row(0x0000_0309, 0x0000_030c, Any,   Absent),            // FIXED_CTR
        row(0x0000_0329, 0x0000_0329, Any,   Absent),            // PERF_METRICS
        row(0x0000_0345, 0x0000_0345, Any,   Absent),            // PERF_CAPABILITIES
        row(0x0000_038d, 0x0000_0396, Any,   Absent),            // FIXED_CTR_CTRL, PERF_GLOBAL_*
        row(0x0000_03f1, 0x0000_03fe, Any,   Absent),            // PEBS, residency
        row(0x0000_0400, 0x0000_047f, Any,   Absent),            // machine-check banks
        row(0x0000_0480, 0x0000_0493, Any,   Absent),            // VMX capabilities
        row(0x0000_04c1, 0x0000_04c8, Any,   Absent),            // A_PMC
        row(0x0000_0560, 0x0000_0587, Any,   Absent),            // processor trace
        row(0x0000_0600, 0x0000_0600, Any,   Absent),            // DS_AREA
        row(0x0000_0601, 0x0000_06df, Any,   Absent),            // RAPL, residency, LBRs, CET
        row(0x0000_06e1, 0x0000_06e1, Any,   Absent),            // PKRS
        row(0x0000_0770, 0x0000_0777, Any,   Absent),            // HWP
        row(0x0000_0981, 0x0000_0982, Any,   Absent),            // TME
        row(0x0000_0c80, 0x0000_0d93, Any,   Absent),            // DEBUG_INTERFACE, RDT, BNDCFGS
        row(0x0000_0db0, 0x0000_0db2, Any,   Absent),            // hardware duty cycling
        row(0x4000_0000, 0x4000_01ff, Any,   Absent),            // Hyper-V
        row(0x4b56_4d02, 0x4b56_4d02, Any,   Absent),            // KVM: asynchronous page faults
        row(0x4b56_4d04, 0x4b56_4d08, Any,   Absent),            // KVM's other services
        row(0xc000_00e7, 0xc000_00e9, Any,   Absent),            // MPERF, APERF (read-only)
        row(0xc000_0104, 0xc000_0104, Any,   Absent),            // TSC_RATIO
        row(0xc000_0300, 0xc000_0302, Any,   Absent),            // PERF_CNTR_GLOBAL
        row(0xc000_0408, 0xc000_040f, Any,   Absent),            // MCA thresholds
        row(0xc000_2000, 0xc000_23ff, Any,   Absent),            // scalable MCA
        row(0xc001_0000, 0xc001_0007, Amd,   Ignored(0)),        // legacy counters: CPUID has no bit
        row(0xc001_0010, 0xc001_0010, Amd,   Ignored(0)),        // SYSCFG
        row(0xc001_0015, 0xc001_0015, Amd,   Stored(Slot::Hwcr, 1 << 18)),
        row(0xc001_0016, 0xc001_0019, Amd,   Ignored(0)),        // IORR
        row(0xc001_001a, 0xc001_001a, Amd,   Ignored(0)),        // TOP_MEM
        row(0xc001_001d, 0xc001_001d, Amd,   Ignored(0)),        // TOP_MEM2
        row(0xc001_001f, 0xc001_001f, Amd,   Ignored(0)),        // NB_CFG
        row(0xc001_0020, 0xc001_0020, Amd,   Ignored(0)),        // PATCH_LOADER
        row(0xc001_0044, 0xc001_004a, Amd,   Ignored(0)),        // MC_CTL_MASK
        row(0xc001_0055, 0xc001_0056, Amd,   Ignored(0)),        // INT_PENDING, SMI trigger
        row(0xc001_0058, 0xc001_0058, Amd,   Ignored(0)),        // MMIO_CONF_BASE: by ACPI MCFG
        row(0xc001_0061, 0xc001_006b, Amd,   Ignored(0)),        // P-states
        row(0xc001_0071, 0xc001_0071, Amd,   Constant(0)),       // COFVID_STATUS
        row(0xc001_0111, 0xc001_0113, Any,   Absent),            // SMBASE, SMM_ADDR, SMM_MASK
        row(0xc001_0114, 0xc001_0114, Amd,   Constant(0x18)),    // VM_CR: SVM off and locked
        row(0xc001_0117, 0xc001_0118, Any,   Absent),            // VM_HSAVE_PA, SVM_KEY
        row(0xc001_0130, 0xc001_0131, Any,   Absent),            // SEV
        row(0xc001_0140, 0xc001_0140, Amd,   Constant(5)),       // OSVW_ID_LENGTH
        row(0xc001_0141, 0xc001_0141, Amd,   Constant(0)),       // OSVW_STATUS: none needed
        row(0xc001_0200, 0xc001_020b, Any,   Absent),            // PERF_CTL0–5
        row(0xc001_0230, 0xc001_0247, Any,   Absent),            // L3 and northbridge counters
        row(0xc001_0292, 0xc001_029b, Any,   Absent),            // power and energy
        row(0xc001_02b0, 0xc001_02b4, Any,   Absent),            // CPPC
        row(0xc001_02f0, 0xc001_02f1, Any,   Absent),            // PPIN
        row(0xc001_1002, 0xc001_1005, Any,   Absent),            // CPUID overrides
        row(0xc001_100c, 0xc001_100d, Any,   Absent),            // K8 CPUID overrides
        row(0xc001_1019, 0xc001_101b, Any,   Absent),            // DR1–3 address masks
        row(0xc001_1020, 0xc001_1020, Any,   Absent),            // LS_CFG: would promise SSBD
        row(0xc001_1021, 0xc001_1023, Amd,   Ignored(0)),        // IC_CFG, DC_CFG, BU_CFG
        row(0xc001_1027, 0xc001_1027, Any,   Absent),            // DR0 address mask
        row(0xc001_1028, 0xc001_1028, Amd,   Ignored(0)),        // FP_CFG
        row(0xc001_1029, 0xc001_1029, Amd,   Stored(Slot::DeCfg, 0)),
        row(0xc001_102a, 0xc001_102d, Amd,   Ignored(0)),        // BU_CFG2, CU_CFG, LS_CFG2
        row(0xc001_1030, 0xc001_103d, Any,   Absent),            // IBS
    ]
};

fn rule(index: u32, features: &Features) -> Result<Rule, MsrFault> {
    let after = TABLE.partition_point(|row| row.first <= index);
    match after.checked_sub(1).and_then(|at| TABLE.get(at)) {
        Some(row) if index <= row.last => Ok(match row.vendor {
            Vendor::Any => row.rule,
            Vendor::Intel if features.intel => row.rule,
            Vendor::Amd if features.amd => row.rule,
            _ => Rule::Absent,
        }),
        _ => Err(MsrFault::Unknown),
    }
}

/// Memory type range registers. They are kept for the guest; the memory types in effect are
/// those of the nested tables and of PAT.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Mtrrs {
    def_type: u64,
    /// 64 KiB ranges, 16 KiB ranges (2), 4 KiB ranges (8).
    fixed: [u64; 11],
    /// Base and mask, in turn.
    variable: [u64; 16],
}

impl Mtrrs {
    /// As firmware leaves them on a PC: write-back, but for the VGA window and the last GiB
    /// below 4 GiB, where devices are.
    fn new(phys_bits: u8) -> Self {
        const ALL_WRITE_BACK: u64 = 0x0606_0606_0606_0606;
        let mut fixed = [ALL_WRITE_BACK; 11];
        fixed[2] = 0;
        let mut variable = [0; 16];
        variable[0] = 0xc000_0000;
        variable[1] = physical_mask(phys_bits) & !0x3fff_ffff | MTRR_ENABLE;
        Self {
            def_type: MTRR_ENABLE | MTRR_FIXED_ENABLE | WRITE_BACK,
            fixed,
            variable,
        }
    }

    fn register(&mut self, index: u32) -> Option<&mut u64> {
        let at = |first: u32, offset: usize| (index - first) as usize + offset;
        match index {
            MTRR_DEF_TYPE => Some(&mut self.def_type),
            MTRR_FIX64K => self.fixed.get_mut(0),
            MTRR_FIX16K_FIRST..=MTRR_FIX16K_LAST => self.fixed.get_mut(at(MTRR_FIX16K_FIRST, 1)),
            MTRR_FIX4K_FIRST..=MTRR_FIX4K_LAST => self.fixed.get_mut(at(MTRR_FIX4K_FIRST, 3)),
            MTRR_VARIABLE_FIRST..=MTRR_VARIABLE_LAST => {
                self.variable.get_mut(at(MTRR_VARIABLE_FIRST, 0))
            }
            _ => None,
        }
    }

    /// Intel SDM Vol. 3A §12.11.2.
    fn is_valid(index: u32, value: u64, phys_bits: u8) -> bool {
        let memory_type = |value: u64| matches!(value & 0xff, 0 | 1 | 4 | 5 | 6);
        match index {
            MTRR_DEF_TYPE => value & !0xcff == 0 && memory_type(value),
            MTRR_VARIABLE_FIRST..=MTRR_VARIABLE_LAST => {
                let address = physical_mask(phys_bits) & !0xfff;
                if index & 1 == 0 {
                    value & !(address | 0xff) == 0 && memory_type(value)
                } else {
                    value & !(address | MTRR_ENABLE) == 0
                }
            }
            _ => (0..8).all(|byte| memory_type(value >> (byte * 8))),
        }
    }
}

const fn physical_mask(bits: u8) -> u64 {
    if bits >= 64 {
        u64::MAX
    } else {
        (1 << bits) - 1
    }
}

/// Whether IA32_PAT may hold `value`: eight times one of UC (0), WC (1), WT (4), WP (5), WB (6)
/// and UC− (7) (Intel SDM Vol. 3A §12.12.2).
#[inline]
#[must_use]
pub const fn is_pat(value: u64) -> bool {
    const BIT_1: u64 = 0x0202_0202_0202_0202;
    // Three bits each, and bit 1 only together with bit 2.
    value & !(7 * (BIT_1 >> 1)) == 0 && value & BIT_1 & !(value >> 1) == 0
}

/// Whether bits 63:47 are equal: a linear address with four levels of tables.
const fn is_canonical(address: u64) -> bool {
    ((address << 16) as i64 >> 16) as u64 == address
}

/// The MSRs of a vCPU that live neither in its hardware state nor in its local APIC.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsrState {
    tsc_adjust: u64,
    system_time: u64,
    steal_time: u64,
    wall_clock: u64,
    mtrrs: Mtrrs,
    stored: [u64; SLOTS],
}

impl MsrState {
    /// After RESET and what firmware does then.
    #[must_use]
    pub fn new(features: &Features) -> Self {
        Self {
            tsc_adjust: 0,
            system_time: 0,
            steal_time: 0,
            wall_clock: 0,
            mtrrs: Mtrrs::new(features.phys_bits),
            stored: STORED_AT_RESET,
        }
    }

    /// RESET. The TSC, and so its adjustment, goes on.
    pub fn reset(&mut self, features: &Features) {
        *self = Self {
            tsc_adjust: self.tsc_adjust,
            ..Self::new(features)
        };
    }

    /// INIT. All registers here keep their values (Intel SDM Vol. 3A §10.1.1, AMD APM Vol. 2
    /// §14.1.3); but the records in memory are those of the kernel that was, and are let go.
    pub const fn init(&mut self) {
        self.system_time = 0;
        self.steal_time = 0;
    }

    /// The steal-time MSR: see [`pvclock::record_address`].
    #[must_use]
    pub const fn steal_time(&self) -> u64 {
        self.steal_time
    }

    /// The system-time MSR of the paravirtual clock: see
    /// [`pvclock::record_address`].
    #[must_use]
    pub const fn system_time(&self) -> u64 {
        self.system_time
    }

    /// Where the wall clock record is wanted.
    #[must_use]
    pub const fn wall_clock(&self) -> GuestPhysAddr {
        GuestPhysAddr::new(self.wall_clock)
    }

    /// RDMSR.
    ///
    /// # Errors
    /// #GP(0).
    #[inline]
    pub fn read<V: Vcpu + ?Sized>(
        &mut self,
        msr: u32,
        context: &mut MsrContext<'_, V>,
    ) -> Result<u64, MsrFault> {
        if let index::X2APIC_FIRST..=index::X2APIC_LAST = msr {
            return context
                .apic
                .read_msr(msr, context.now)
                .map_err(|_| MsrFault::Protection);
        }
        self.read_other(msr, context)
    }

    #[inline(never)]
    fn read_other<V: Vcpu + ?Sized>(
        &mut self,
        msr: u32,
        context: &mut MsrContext<'_, V>,
    ) -> Result<u64, MsrFault> {
        let features = context.features;
        let if_there = |there: bool, value| {
            if there {
                Ok(value)
            } else {
                Err(MsrFault::Protection)
            }
        };
        match msr {
            index::IA32_EFER => Ok(context.vcpu.efer()),
            index::IA32_TSC => Ok(context.apic.clock().tsc(context.now)),
            index::IA32_TSC_DEADLINE => Ok(context.apic.tsc_deadline(context.now)),
            index::IA32_APIC_BASE => Ok(context.apic.base_msr()),
            index::IA32_TSC_AUX if !features.rdtscp => Err(MsrFault::Protection),
            index::IA32_XSS => if_there(features.xsaves, 0),
            index::IA32_DEBUGCTL => Ok(context.vcpu.msr(msr).unwrap_or(0)),
            index::IA32_SPEC_CTRL if features.spec_ctrl == 0 => Err(MsrFault::Protection),
            IA32_TSC_ADJUST => Ok(self.tsc_adjust),
            IA32_PRED_CMD => Err(MsrFault::Protection),
            IA32_ARCH_CAPABILITIES => features.arch_capabilities.ok_or(MsrFault::Protection),
            // A microcode revision that is no update of anything.
            IA32_BIOS_SIGN_ID if features.amd => Ok(0x0100_0065),
            IA32_BIOS_SIGN_ID => Ok(1 << 32),
            PLATFORM_INFO | IA32_PERF_STATUS => {
                // In units of 100 MHz: the maximum (or present) ratio, and the minimum.
                let ratio = u64::from(context.apic.clock().khz() / 100_000).clamp(1, 0xff);
                if_there(features.intel, ratio << 40 | ratio << 8)
            }
            IA32_MTRRCAP => Ok(MTRRCAP_VALUE),
            pv::SYSTEM_TIME | pv::SYSTEM_TIME_OLD => Ok(self.system_time),
            pv::WALL_CLOCK | pv::WALL_CLOCK_OLD => Ok(self.wall_clock),
            pv::STEAL_TIME => Ok(self.steal_time),
            MTRR_VARIABLE_FIRST..=MTRR_DEF_TYPE
                if let Some(register) = self.mtrrs.register(msr) =>
            {
                Ok(*register)
            }
            _ => {
                if let Some(value) = context.vcpu.msr(msr) {
                    return Ok(value);
                }
                match rule(msr, features)? {
                    Rule::Absent => Err(MsrFault::Protection),
                    Rule::Constant(value) | Rule::Ignored(value) => Ok(value),
                    Rule::Stored(slot, _) => Ok(self.stored[slot as usize]),
                }
            }
        }
    }

    /// WRMSR.
    ///
    /// # Errors
    /// #GP(0).
    #[inline]
    pub fn write<V: Vcpu + ?Sized>(
        &mut self,
        msr: u32,
        value: u64,
        context: &mut MsrContext<'_, V>,
    ) -> Result<MsrEffect, MsrFault> {
        match msr {
            index::X2APIC_FIRST..=index::X2APIC_LAST => {
                match context.apic.write_msr(msr, value, context.now) {
                    Ok(ApicEffect::None) => Ok(MsrEffect::None),
                    Ok(effect) => Ok(MsrEffect::Apic(effect)),
                    Err(_) => Err(MsrFault::Protection),
                }
            }
            index::IA32_TSC_DEADLINE => Ok(MsrEffect::Apic(
                context.apic.set_tsc_deadline(value, context.now),
            )),
            _ => self.write_other(msr, value, context),
        }
    }

    #[inline(never)]
    fn write_other<V: Vcpu + ?Sized>(
        &mut self,
        msr: u32,
        value: u64,
        context: &mut MsrContext<'_, V>,
    ) -> Result<MsrEffect, MsrFault> {
        let features = context.features;
        let done = Ok(MsrEffect::None);
        let needs = |condition: bool| {
            if condition {
                Ok(())
            } else {
                Err(MsrFault::Protection)
            }
        };
        match msr {
            index::IA32_EFER => {
                let old = context.vcpu.efer();
                let lma = Efer::LMA.bits();
                needs(value & !(features.efer | lma) == 0)?;
                // Long mode is switched on and off with paging off (SDM Vol. 3A §10.8.5).
                let paging = context.vcpu.cr(ControlRegister::Cr0) & Cr0::PG.bits() != 0;
                needs(!paging || (old ^ value) & Efer::LME.bits() == 0)?;
                context.vcpu.set_efer(value & !lma | old & lma);
                done
            }
            index::IA32_TSC => {
                let jump = value.wrapping_sub(context.apic.clock().tsc(context.now));
                self.tsc_adjust = self.tsc_adjust.wrapping_add(jump);
                context.apic.shift_tsc(jump, context.now);
                Ok(MsrEffect::Tsc)
            }
            IA32_TSC_ADJUST => {
                let jump = value.wrapping_sub(self.tsc_adjust);
                self.tsc_adjust = value;
                if jump == 0 {
                    return done;
                }
                context.apic.shift_tsc(jump, context.now);
                Ok(MsrEffect::Tsc)
            }
            index::IA32_APIC_BASE => {
                needs(context.apic.set_base_msr(value).is_ok())?;
                Ok(MsrEffect::ApicBase)
            }
            index::IA32_PAT => {
                needs(is_pat(value))?;
                needs(context.vcpu.set_msr(msr, value))?;
                done
            }
            index::IA32_LSTAR
            | index::IA32_CSTAR
            | index::IA32_FS_BASE
            | index::IA32_GS_BASE
            | index::IA32_KERNEL_GS_BASE
            | index::IA32_SYSENTER_ESP
            | index::IA32_SYSENTER_EIP => {
                needs(is_canonical(value))?;
                needs(context.vcpu.set_msr(msr, value))?;
                done
            }
            index::IA32_SYSENTER_CS => {
                // 16 bits count; the upper ones are not checked by hardware.
                needs(context.vcpu.set_msr(msr, value & 0xffff_ffff))?;
                done
            }
            index::IA32_TSC_AUX => {
                needs(features.rdtscp && value >> 32 == 0)?;
                needs(context.vcpu.set_msr(msr, value))?;
                done
            }
            index::IA32_DEBUGCTL => {
                needs(value & !(DEBUGCTL_BTF | DEBUGCTL_LBR) == 0)?;
                // Where the backend cannot switch it, it is a register without effect.
                let _ = context.vcpu.set_msr(msr, value & DEBUGCTL_BTF);
                done
            }
            index::IA32_SPEC_CTRL => {
                needs(features.spec_ctrl != 0 && value & !features.spec_ctrl == 0)?;
                needs(context.vcpu.set_msr(msr, value))?;
                done
            }
            IA32_PRED_CMD => {
                needs(features.ibpb && value & !1 == 0)?;
                Ok(if value == 0 {
                    MsrEffect::None
                } else {
                    MsrEffect::PredictionBarrier
                })
            }
            // No supervisor component is offered.
            index::IA32_XSS => needs(features.xsaves && value == 0).and(done),
            IA32_BIOS_SIGN_ID => needs(features.intel).and(done),
            IA32_ARCH_CAPABILITIES | PLATFORM_INFO | IA32_PERF_STATUS | IA32_MTRRCAP => {
                Err(MsrFault::Protection)
            }
            pv::SYSTEM_TIME | pv::SYSTEM_TIME_OLD => {
                self.system_time = value;
                Ok(MsrEffect::SystemTime)
            }
            pv::WALL_CLOCK | pv::WALL_CLOCK_OLD => {
                self.wall_clock = value;
                Ok(MsrEffect::WallClock)
            }
            pv::STEAL_TIME => {
                needs(value & pvclock::STEAL_TIME_RESERVED == 0)?;
                self.steal_time = value;
                Ok(MsrEffect::StealTime)
            }
            MTRR_VARIABLE_FIRST..=MTRR_DEF_TYPE
                if let Some(register) = self.mtrrs.register(msr) =>
            {
                needs(Mtrrs::is_valid(msr, value, features.phys_bits))?;
                *register = value;
                done
            }
            _ => {
                // STAR and FMASK: any value.
                if context.vcpu.set_msr(msr, value) {
                    return done;
                }
                match rule(msr, features)? {
                    Rule::Absent | Rule::Constant(_) => Err(MsrFault::Protection),
                    Rule::Ignored(_) => done,
                    Rule::Stored(slot, mask) => {
                        let kept = &mut self.stored[slot as usize];
                        *kept = *kept & !mask | value & mask;
                        done
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{apic::ApicMode, clock::TscClock, mock::MockVcpu};

    struct World {
        state: MsrState,
        vcpu: MockVcpu,
        apic: LocalApic,
        features: Features,
        now: Nanos,
    }

    impl World {
        fn new(intel: bool) -> Self {
            let features = Features {
                intel,
                amd: !intel,
                phys_bits: 40,
                efer: 0x901,
                spec_ctrl: 7,
                ibpb: true,
                rdtscp: true,
                xsaves: true,
                ..Features::default()
            };
            Self {
                state: MsrState::new(&features),
                vcpu: MockVcpu::real(),
                apic: LocalApic::new(0, true, 40, TscClock::new(2_000_000)),
                features,
                now: Nanos(1_000),
            }
        }

        fn read(&mut self, msr: u32) -> Result<u64, MsrFault> {
            let mut context = MsrContext {
                vcpu: &mut self.vcpu,
                apic: &mut self.apic,
                features: &self.features,
                now: self.now,
            };
            self.state.read(msr, &mut context)
        }

        fn write(&mut self, msr: u32, value: u64) -> Result<MsrEffect, MsrFault> {
            let mut context = MsrContext {
                vcpu: &mut self.vcpu,
                apic: &mut self.apic,
                features: &self.features,
                now: self.now,
            };
            self.state.write(msr, value, &mut context)
        }
    }

    const GP: Result<MsrEffect, MsrFault> = Err(MsrFault::Protection);
    const DONE: Result<MsrEffect, MsrFault> = Ok(MsrEffect::None);

    #[test]
    fn the_table_is_sorted_and_does_not_overlap() {
        for row in TABLE {
            assert!(row.first <= row.last, "{:#x}", row.first);
        }
        for pair in TABLE.windows(2) {
            assert!(pair[0].last < pair[1].first, "{:#x}", pair[1].first);
        }
    }

    #[test]
    fn unknown_is_told_apart_from_known_and_absent() {
        let mut world = World::new(true);
        assert_eq!(world.read(0x1234_5678), Err(MsrFault::Unknown));
        assert_eq!(world.write(0x1234_5678, 0), Err(MsrFault::Unknown));
        assert_eq!(world.read(0x186), Err(MsrFault::Protection));
        assert_eq!(
            world.read(0xc001_0015),
            Err(MsrFault::Protection),
            "AMD's on Intel"
        );
        assert_eq!(World::new(false).read(0xc001_0015), Ok(1 << 24));
    }

    #[test]
    fn efer_keeps_the_rules_of_long_mode() {
        let mut world = World::new(true);
        assert_eq!(world.write(index::IA32_EFER, 0x901), DONE);
        assert_eq!(world.write(index::IA32_EFER, 1 << 12), GP, "SVME");
        world.vcpu.cr0 = Cr0::PG.bits();
        world.vcpu.efer |= 0x400;
        assert_eq!(
            world.write(index::IA32_EFER, 0x801),
            GP,
            "LME with paging on"
        );
        assert_eq!(world.write(index::IA32_EFER, 0x101), DONE);
        assert_eq!(world.vcpu.efer, 0x501, "LMA follows the CPU");
    }

    #[test]
    fn addresses_must_be_canonical_and_memory_types_exist() {
        let mut world = World::new(true);
        assert_eq!(world.write(index::IA32_LSTAR, 0xffff_8000_0000_0000), DONE);
        assert_eq!(world.write(index::IA32_LSTAR, 0x8000_0000_0000), GP);
        assert_eq!(world.write(index::IA32_PAT, 0x0007_0406_0007_0406), DONE);
        assert_eq!(world.write(index::IA32_PAT, 0x0002_0406_0007_0406), GP);
        assert_eq!(world.read(index::IA32_PAT), Ok(0x0007_0406_0007_0406));
        assert_eq!(world.write(index::IA32_TSC_AUX, 1 << 32), GP);
        assert_eq!(world.write(index::IA32_XSS, 1), GP);
    }

    #[test]
    fn mtrrs_hold_what_is_valid() {
        let mut world = World::new(true);
        assert_eq!(world.read(IA32_MTRRCAP), Ok(0x508));
        assert_eq!(world.write(IA32_MTRRCAP, 0x508), GP);
        assert_eq!(world.read(MTRR_DEF_TYPE), Ok(0xc06));
        assert_eq!(world.read(0x200), Ok(0xc000_0000));
        assert_eq!(world.read(0x201), Ok(0xff_c000_0800));
        assert_eq!(world.read(MTRR_FIX16K_LAST), Ok(0), "VGA is uncached");
        assert_eq!(world.write(0x20e, 0xff_0000_0005), DONE);
        assert_eq!(world.read(0x20e), Ok(0xff_0000_0005));
        assert_eq!(world.write(0x20e, 2), GP, "no such type");
        assert_eq!(world.write(0x20e, 1 << 40), GP, "beyond physical addresses");
        assert_eq!(world.write(0x20f, 0x400), GP);
        assert_eq!(world.write(MTRR_DEF_TYPE, 0x1000), GP);
        assert_eq!(world.write(MTRR_FIX4K_LAST, 0x0606_0606_0606_0607), GP);
        assert_eq!(world.read(0x210), Err(MsrFault::Unknown));
        assert_eq!(world.read(0x251), Err(MsrFault::Unknown));
    }

    #[test]
    fn the_tsc_and_its_adjustment_move_together() {
        let mut world = World::new(true);
        assert_eq!(world.read(index::IA32_TSC), Ok(2_000));
        assert_eq!(world.write(index::IA32_TSC, 10), Ok(MsrEffect::Tsc));
        assert_eq!(world.read(index::IA32_TSC), Ok(10));
        let adjust = world.read(IA32_TSC_ADJUST).unwrap();
        assert_eq!(adjust, 0_u64.wrapping_sub(1_990));
        assert_eq!(world.write(IA32_TSC_ADJUST, adjust), DONE);
        assert_eq!(world.write(IA32_TSC_ADJUST, 0), Ok(MsrEffect::Tsc));
        assert_eq!(world.read(index::IA32_TSC), Ok(2_000));
        assert_eq!(world.apic.clock().base(), 0);
    }

    #[test]
    fn the_apic_is_reached_and_changes_mode() {
        let mut world = World::new(true);
        assert_eq!(world.read(0x80b), Err(MsrFault::Protection), "xAPIC mode");
        assert_eq!(world.read(index::IA32_APIC_BASE), Ok(0xfee0_0900));
        let x2 = 0xfee0_0d00;
        assert_eq!(
            world.write(index::IA32_APIC_BASE, x2),
            Ok(MsrEffect::ApicBase)
        );
        assert_eq!(world.apic.mode(), ApicMode::X2Apic);
        assert_eq!(world.write(index::IA32_APIC_BASE, 0xfee0_0900), GP);
        assert_eq!(world.write(0x808, 0x20), Ok(MsrEffect::None));
        assert_eq!(world.read(0x808), Ok(0x20));
        assert_eq!(world.write(0x808, 0x100), GP);
    }

    #[test]
    fn speculation_controls_follow_cpuid() {
        let mut world = World::new(true);
        assert_eq!(
            world.write(IA32_PRED_CMD, 1),
            Ok(MsrEffect::PredictionBarrier)
        );
        assert_eq!(world.write(IA32_PRED_CMD, 2), GP);
        assert_eq!(world.write(index::IA32_SPEC_CTRL, 8), GP);
        assert_eq!(
            world.read(IA32_ARCH_CAPABILITIES),
            Err(MsrFault::Protection)
        );
        world.features.arch_capabilities = Some(0x21);
        assert_eq!(world.read(IA32_ARCH_CAPABILITIES), Ok(0x21));
        world.features.ibpb = false;
        assert_eq!(world.write(IA32_PRED_CMD, 1), GP);
    }

    #[test]
    fn the_paravirtual_clock_has_old_and_new_numbers() {
        let mut world = World::new(false);
        for msr in [pv::SYSTEM_TIME, pv::SYSTEM_TIME_OLD] {
            assert_eq!(world.write(msr, 0x5001), Ok(MsrEffect::SystemTime));
            assert_eq!(world.read(msr), Ok(0x5001));
        }
        assert_eq!(
            world.write(pv::WALL_CLOCK, 0x6000),
            Ok(MsrEffect::WallClock)
        );
        assert_eq!(world.state.wall_clock(), GuestPhysAddr::new(0x6000));
        assert_eq!(world.state.system_time(), 0x5001);
    }

    #[test]
    fn stolen_time_is_told_at_a_multiple_of_64() {
        let mut world = World::new(true);
        assert_eq!(
            world.write(pv::STEAL_TIME, 0x5041),
            Ok(MsrEffect::StealTime)
        );
        assert_eq!(world.read(pv::STEAL_TIME), Ok(0x5041));
        let record = pvclock::record_address(world.state.steal_time());
        assert_eq!(record, Some(GuestPhysAddr::new(0x5040)));
        for bad in [0x5003, 0x5005, 0x5009, 0x5011, 0x5021, 2] {
            assert_eq!(world.write(pv::STEAL_TIME, bad), GP, "{bad:#x}");
        }
        assert_eq!(world.read(pv::STEAL_TIME), Ok(0x5041));
        assert_eq!(world.read(0x4b56_4d02), Err(MsrFault::Protection));
        assert_eq!(world.read(0x4b56_4d04), Err(MsrFault::Protection));
    }

    /// What Linux compares over its CPUs, and complains about if one is unlike the others.
    #[test]
    fn all_vcpus_begin_alike() {
        for intel in [true, false] {
            let mut first = World::new(intel);
            let mut second = World::new(intel);
            second.apic = LocalApic::new(3, false, 40, TscClock::new(2_000_000));
            for row in TABLE {
                assert_eq!(first.read(row.first), second.read(row.first));
            }
            let mtrrs = (MTRR_VARIABLE_FIRST..=MTRR_VARIABLE_LAST)
                .chain(MTRR_FIX4K_FIRST..=MTRR_FIX4K_LAST)
                .chain([
                    MTRR_FIX64K,
                    MTRR_FIX16K_FIRST,
                    MTRR_FIX16K_LAST,
                    MTRR_DEF_TYPE,
                ]);
            let rest = [
                IA32_MTRRCAP,
                IA32_BIOS_SIGN_ID,
                IA32_TSC_ADJUST,
                index::IA32_TSC,
                index::IA32_PAT,
                index::IA32_EFER,
                index::IA32_DEBUGCTL,
                PLATFORM_INFO,
            ];
            for msr in mtrrs.chain(rest) {
                assert_eq!(first.read(msr), second.read(msr), "{msr:#x}");
            }
            // But for the one that booted.
            let [base, other] =
                [&mut first, &mut second].map(|world| world.read(index::IA32_APIC_BASE).unwrap());
            assert_eq!(base ^ other, 1 << 8, "BSP");
        }
    }

    #[test]
    fn init_lets_go_of_the_records_and_keeps_the_rest() {
        let mut world = World::new(true);
        assert!(world.write(IA32_TSC_ADJUST, 5).is_ok());
        assert!(world.write(0x20e, 0xff_0000_0005).is_ok());
        assert!(world.write(0x1a0, 0).is_ok());
        assert!(world.write(pv::WALL_CLOCK, 0x6000).is_ok());
        let before = world.state.clone();
        assert!(world.write(pv::SYSTEM_TIME, 0x5001).is_ok());
        assert!(world.write(pv::STEAL_TIME, 0x5041).is_ok());
        world.state.init();
        assert_eq!(world.state, before);
        world.state.reset(&world.features);
        assert_eq!(world.read(IA32_TSC_ADJUST), Ok(5), "the TSC goes on");
        assert_eq!(world.read(0x20e), Ok(0));
    }

    #[test]
    fn stored_bits_change_and_the_others_stay() {
        let mut world = World::new(true);
        assert_eq!(world.write(0x1a0, 0), DONE);
        assert_eq!(world.read(0x1a0), Ok(1 << 11 | 1 << 12));
        let mut world = World::new(false);
        assert_eq!(world.write(0xc001_1029, 0), DONE);
        assert_eq!(world.read(0xc001_1029), Ok(2), "LFENCE stays serializing");
    }

    #[test]
    fn no_number_and_no_value_does_harm() {
        let mut random = crate::random::Random(7);
        for intel in [true, false] {
            let mut world = World::new(intel);
            for _ in 0..200_000 {
                let row = &TABLE[random.next() as usize % TABLE.len()];
                let msr = match random.next() % 4 {
                    0 => random.next() as u32,
                    1 => row.first.wrapping_add(random.next() as u32 % 4),
                    2 => 0x800 + random.next() as u32 % 0x50,
                    _ => random.next() as u32 % 0x1000,
                };
                let value = random.next() >> (random.next() % 64);
                world.now = Nanos(random.next() >> (random.next() % 64));
                let _ = world.write(msr, value);
                let _ = world.read(msr);
            }
        }
    }
}
