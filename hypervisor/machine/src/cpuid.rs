//! What CPUID tells a guest (Intel SDM Vol. 2A "CPUID", AMD APM Vol. 3 appendix E).
//!
//! The policy is made once for a VM from the machine's own answers: leaves with feature bits
//! pass an allow-list ([`RULES`]), so that a feature nobody thought about is hidden; leaves that
//! describe the machine (topology, frequencies, addresses, the hypervisor) are written afresh;
//! the rest (caches, TLBs, brand) passes. The result is a dense table, so that an exit costs an
//! index and a load; the few leaves that tell of a vCPU's state are adjusted when they are read.

use crate::apic::{ApicMode, LocalApic, MAX_VCPUS, TIMER_HZ};
use abi::cpuid as leaf;
use alloc::vec::Vec;
use arch::{ControlRegister, Cr4, Vcpu};

/// The four registers of an answer: EAX, EBX, ECX, EDX.
pub type Regs = [u32; 4];

const EAX: usize = 0;
const EBX: usize = 1;
const ECX: usize = 2;
const EDX: usize = 3;

const EXTENDED: u32 = 0x8000_0000;
/// The highest basic and extended leaves this policy knows.
const LAST_BASIC: u32 = 0x1f;
const LAST_EXTENDED: u32 = 0x8000_0021;
/// Nested tables of four levels reach 48 bits.
const MAX_PHYS_BITS: u32 = 48;

const fn bits(numbers: &[u32]) -> u32 {
    let mut mask = 0;
    let mut i = 0;
    while i < numbers.len() {
        mask |= 1 << numbers[i];
        i += 1;
    }
    mask
}

/// Feature bits of one register of one leaf: shown if the machine has them and they are in
/// `allow`; shown in any case if they are in `force`, because software provides them.
struct Rule {
    leaf: u32,
    subleaf: u32,
    reg: usize,
    allow: u32,
    force: u32,
}

const fn rule(leaf: u32, subleaf: u32, reg: usize, allow: u32, force: u32) -> Rule {
    Rule {
        leaf,
        subleaf,
        reg,
        allow,
        force,
    }
}

/// The allow-list. What is hidden, and why, stands beside each row; bits not named are reserved
/// or too new for this version.
const RULES: &[Rule] = &[
    // Hidden: 2 DTES64, 4 DS-CPL, 15 PDCM (no debug store, no performance monitoring); 3 MONITOR
    // (a guest would keep the core); 5 VMX, 6 SMX (no nesting); 7 EIST, 8 TM2 (power and heat are
    // the machine's); 10 CNXT-ID, 11 SDBG, 14 xTPR, 18 DCA (chipset matters). 27 OSXSAVE is
    // the vCPU's. Forced: 21 x2APIC, 24 TSC-deadline (emulated), 31 hypervisor.
    rule(
        1,
        0,
        ECX,
        bits(&[0, 1, 9, 12, 13, 17, 19, 20, 22, 23, 25, 26, 28, 29, 30]),
        bits(&[21, 24, 31]),
    ),
    // Hidden: 18 PSN, 21 DS, 22 ACPI (thermal MSRs), 29 TM, 30 IA64, 31 PBE. 28 HTT is set with
    // more than one vCPU. Forced: 9 APIC, 12 MTRR, 16 PAT (all emulated or stored).
    rule(
        1,
        0,
        EDX,
        bits(&[
            0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 13, 14, 15, 17, 19, 23, 24, 25, 26, 27,
        ]),
        bits(&[9, 12, 16]),
    ),
    // Only ARAT: the virtual APIC timer never stops. Hidden: sensors, turbo, HWP, HFI, EPB,
    // APERF/MPERF.
    rule(6, 0, EAX, 0, bits(&[2])),
    // Hidden: 2 SGX; 4 HLE, 11 RTM (abort storms and TAA); 12 PQM, 15 PQE (RDT); 14 MPX (gone);
    // 25 PT. Forced: 1 TSC_ADJUST (emulated).
    rule(
        7,
        0,
        EBX,
        bits(&[
            0, 3, 5, 6, 7, 8, 9, 10, 13, 16, 17, 18, 19, 20, 21, 23, 24, 26, 27, 28, 29, 30, 31,
        ]),
        bits(&[1]),
    ),
    // Hidden: 5 WAITPKG (a guest would keep the core), 7 CET_SS (no CET state), 13 TME, 16 LA57
    // (software page walks know four levels), 17–21 MAWAU (MPX), 23 KL, 24 bus-lock detection,
    // 29 ENQCMD, 30 SGX_LC, 31 PKS. 4 OSPKE is the vCPU's.
    rule(
        7,
        0,
        ECX,
        bits(&[0, 1, 2, 3, 6, 8, 9, 10, 11, 12, 14, 22, 25, 27, 28]),
        0,
    ),
    // Hidden: 4 FSRM (advertised by emulators where it does not hold), 5 UINTR, 9 SRBDS_CTRL,
    // 11 and 13 TSX errata, 15 hybrid, 16 TSXLDTRK, 18 PCONFIG, 19 arch LBR, 20 CET_IBT, 22, 24,
    // 25 AMX (8 KiB of state), 28 L1D_FLUSH, 30 core capabilities.
    rule(7, 0, EDX, bits(&[2, 3, 8, 10, 14, 23, 26, 27, 29, 31]), 0),
    // Hidden: 10–12 fast short REP (as FSRM), 17 FRED, 18 LKGS, 22 HRESET, 26 LAM.
    rule(7, 1, EAX, bits(&[4, 5, 23]), 0),
    rule(7, 1, EDX, bits(&[4, 5, 14]), 0),
    // 0 XSAVEOPT, 1 XSAVEC, 2 XGETBV(1), 3 XSAVES. Hidden: 4 XFD.
    rule(0xd, 1, EAX, bits(&[0, 1, 2, 3]), 0),
    // Hidden: 2 SVM, 12 SKINIT (no nesting); 3 extended APIC space; 10 IBS, 13 WDT, 15 LWP,
    // 19 NodeId MSR, 23, 24, 28 performance counters, 26 data breakpoint extension, 27 PTSC,
    // 29 MONITORX; 4 AltMovCr8, 17 TCE, 30 address masks.
    rule(
        EXTENDED + 1,
        0,
        ECX,
        bits(&[0, 1, 5, 6, 7, 8, 9, 11, 16, 21, 22]),
        0,
    ),
    // AMD repeats leaf 1 here. Hidden: 19 MP.
    rule(
        EXTENDED + 1,
        0,
        EDX,
        bits(&[
            0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 13, 14, 15, 17, 20, 22, 23, 24, 25, 26, 27, 29, 30, 31,
        ]),
        0,
    ),
    // Only the invariant TSC: it is, by the VM's fixed rate. Hidden: RAS and power.
    rule(EXTENDED + 7, 0, EDX, 0, bits(&[8])),
    // Hidden: 1 IRPERF, 3 INVLPGB, 4 RDPRU, 6 memory bandwidth, 8 MCOMMIT, 13 INT_WBINVD,
    // 20 EferLmsleUnsupported, 23 PPIN, 25 VIRT_SPEC_CTRL, 27 CPPC.
    rule(
        EXTENDED + 8,
        0,
        EBX,
        bits(&[0, 2, 9, 12, 14, 15, 16, 17, 18, 19, 24, 26, 28, 29, 30]),
        0,
    ),
    rule(EXTENDED + 0x1a, 0, EAX, bits(&[0, 1, 2]), 0),
    // 0 no nested data breakpoints, 2 LFENCE always serializing, 6 null selector clears base.
    // Hidden: 8 automatic IBRS (an EFER bit), 9 SMM control, prefetch MSRs.
    rule(EXTENDED + 0x21, 0, EAX, bits(&[0, 2, 6]), 0),
];

/// Leaves that pass as the machine gives them: cache and TLB descriptors, brand string.
const PASSED: [u32; 7] = [
    2,
    EXTENDED + 2,
    EXTENDED + 3,
    EXTENDED + 4,
    EXTENDED + 5,
    EXTENDED + 6,
    EXTENDED + 0x19,
];

/// Features whose state is that of AVX (upper halves of YMM), and those of AVX-512.
const AVX: &[(u32, u32, usize, u32)] = &[
    (1, 0, ECX, bits(&[12, 28, 29])),
    (7, 0, EBX, bits(&[5])),
    (7, 0, ECX, bits(&[9, 10])),
    (7, 1, EAX, bits(&[4, 23])),
    (7, 1, EDX, bits(&[4, 5])),
    (EXTENDED + 1, 0, ECX, bits(&[11, 16])),
];
const AVX512: &[(u32, u32, usize, u32)] = &[
    (7, 0, EBX, bits(&[16, 17, 21, 26, 27, 28, 30, 31])),
    (7, 0, ECX, bits(&[1, 6, 11, 12, 14])),
    (7, 0, EDX, bits(&[2, 3, 8, 23])),
    (7, 1, EAX, bits(&[5])),
];
/// Features that rest on IA32_SPEC_CTRL and IA32_PRED_CMD.
const SPECULATION: &[(u32, u32, usize, u32)] = &[
    (7, 0, EDX, bits(&[26, 27, 31])),
    (
        EXTENDED + 8,
        0,
        EBX,
        bits(&[12, 14, 15, 16, 17, 18, 19, 24, 28, 30]),
    ),
];

/// Bits of IA32_ARCH_CAPABILITIES that tell what the CPU is not, or need nothing of us:
/// RDCL_NO, IBRS_ALL, RSBA, SKIP_L1DFL, SSB_NO, MDS_NO, PSCHANGE_MC_NO, TAA_NO, SBDR_SSDP_NO,
/// FBSDP_NO, PSDP_NO, FB_CLEAR, RRSBA, BHI_NO, PBRSB_NO, GDS_NO, RFDS_NO, RFDS_CLEAR.
/// Hidden: TSX_CTRL, MISC_PACKAGE_CTLS, ENERGY_FILTERING, DOITM, XAPIC_DISABLE, …: other MSRs.
const ARCH_CAPABILITIES: u64 = bits(&[
    0, 1, 2, 3, 4, 5, 6, 8, 13, 14, 15, 17, 19, 20, 24, 26, 27, 28,
]) as u64;
const IBRS_ALL: u64 = 1 << 1;

/// What of KVM's services there is.
const KVM_FEATURES: u32 = leaf::kvm::CLOCKSOURCE
    | leaf::kvm::CLOCKSOURCE2
    | leaf::kvm::CLOCKSOURCE_STABLE
    | leaf::kvm::NOP_IO_DELAY
    | leaf::kvm::STEAL_TIME;

/// What of the machine a backend lets guests use, beyond what runs unasked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Enabled {
    /// RDTSCP and RDPID (VT-x: "enable RDTSCP").
    pub rdtscp: bool,
    /// INVPCID (VT-x: "enable INVPCID").
    pub invpcid: bool,
    /// XSAVEC works as the manual says.
    pub xsavec: bool,
    /// XSAVES and XRSTORS (VT-x: "enable XSAVES/XRSTORS").
    pub xsaves: bool,
    /// IA32_SPEC_CTRL is part of the vCPU's state, and the caller does what
    /// [`MsrEffect::PredictionBarrier`](crate::msr::MsrEffect) asks.
    pub spec_ctrl: bool,
    /// Components of extended state that are switched: bits of XCR0; 0 for no XSAVE.
    pub xcr0: u64,
    /// The machine's IA32_ARCH_CAPABILITIES, 0 where it has none.
    pub arch_capabilities: u64,
}

/// What the guest's CPUs are to look like.
#[derive(Clone, Copy, Debug)]
pub struct CpuidConfig {
    /// How many vCPUs the VM has.
    pub vcpus: u32,
    /// Each vCPU owns its core.
    pub dedicated: bool,
    /// The rate of the guest's TSC.
    pub tsc_khz: u32,
    /// What the backend enables.
    pub enabled: Enabled,
}

/// What other policies need to know of the guest's features.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features {
    /// The CPU calls itself Intel's.
    pub intel: bool,
    /// The CPU calls itself AMD's or Hygon's.
    pub amd: bool,
    /// Physical address width in bits.
    pub phys_bits: u8,
    /// Settable bits of XCR0; 0 without XSAVE.
    pub xcr0: u64,
    /// Settable bits of CR4.
    pub cr4: u64,
    /// Settable bits of EFER; LMA follows the CPU.
    pub efer: u64,
    /// Settable bits of IA32_SPEC_CTRL; 0 without the MSR.
    pub spec_ctrl: u64,
    /// IA32_PRED_CMD exists (IBPB).
    pub ibpb: bool,
    /// RDTSCP, and with it IA32_TSC_AUX, exists.
    pub rdtscp: bool,
    /// XSAVES, and with it IA32_XSS, exists.
    pub xsaves: bool,
    /// IA32_ARCH_CAPABILITIES, if it exists.
    pub arch_capabilities: Option<u64>,
    /// AMD's OS-visible workarounds (MSR C0010140H and C0010141H) exist.
    pub osvw: bool,
}

/// What of an answer is the vCPU's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Dynamic {
    No,
    /// Leaf 1: APIC id, OSXSAVE, APIC enabled.
    Leaf1,
    /// Leaf 7: OSPKE.
    Leaf7,
    /// Leaves 0BH and 1FH: EDX is the x2APIC id.
    Topology,
    /// Leaf 0DH: EBX is the size of the state now enabled in XCR0, in the standard (sub-leaf 0)
    /// or the compacted format (1).
    Xsave {
        compacted: bool,
    },
    /// Leaf 80000001H: APIC enabled (AMD).
    Extended1,
    /// Leaf 8000001EH: EAX and EBX hold the APIC id.
    AmdTopology,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    regs: Regs,
    dynamic: Dynamic,
    /// ECX selects among this many sub-leaves more, which stand in `subleaves` from `first`;
    /// beyond them, and where `selects` is false, see [`CpuidPolicy::subleaf`].
    selects: bool,
    more: u16,
    first: u16,
}

/// An extended-state component (leaf 0DH, sub-leaves 2 to 62).
#[derive(Clone, Copy, Debug)]
struct Component {
    mask: u64,
    size: u32,
    offset: u32,
    aligned: bool,
}

/// The CPUID answers of a VM.
#[derive(Clone, Debug)]
pub struct CpuidPolicy {
    basic: Vec<Entry>,
    extended: Vec<Entry>,
    subleaves: Vec<(Regs, Dynamic)>,
    components: Vec<Component>,
    timing: Regs,
    kvm: Regs,
    features: Features,
}

/// The size of the legacy region and the header of an XSAVE area.
const XSAVE_HEADER_END: u32 = 576;

impl CpuidPolicy {
    /// Makes the policy from the machine's answers: `host(leaf, subleaf)` executes CPUID.
    #[must_use]
    pub fn build(host: &dyn Fn(u32, u32) -> Regs, config: &CpuidConfig) -> Self {
        Builder::new(host, config).build()
    }

    /// What other policies need to know.
    #[inline]
    #[must_use]
    pub const fn features(&self) -> &Features {
        &self.features
    }

    /// The answer where it depends on nothing but leaf and sub-leaf and stands in a dense table.
    #[inline]
    #[must_use]
    pub fn constant(&self, leaf: u32, subleaf: u32) -> Option<&Regs> {
        let entry = match self.basic.get(leaf as usize) {
            Some(entry) => entry,
            None => self.extended.get(leaf.wrapping_sub(EXTENDED) as usize)?,
        };
        let sought = entry.selects && subleaf != 0 || entry.dynamic != Dynamic::No;
        (!sought).then_some(&entry.regs)
    }

    /// The answer to CPUID with `leaf` in EAX and `subleaf` in ECX on this vCPU.
    #[must_use]
    #[inline(never)]
    pub fn answer<V: Vcpu + ?Sized>(
        &self,
        leaf: u32,
        subleaf: u32,
        vcpu: &V,
        apic: &LocalApic,
    ) -> Regs {
        let entry = match self.basic.get(leaf as usize) {
            Some(entry) => entry,
            None => match self.extended.get(leaf.wrapping_sub(EXTENDED) as usize) {
                Some(entry) => entry,
                None => match self.beyond(leaf) {
                    Ok(regs) => return regs,
                    Err(entry) => entry,
                },
            },
        };
        let (regs, dynamic) = if entry.selects && subleaf != 0 {
            self.subleaf(entry, subleaf)
        } else {
            (entry.regs, entry.dynamic)
        };
        if dynamic == Dynamic::No {
            regs
        } else {
            self.adjust(regs, dynamic, vcpu, apic)
        }
    }

    /// Leaves outside the dense tables: the hypervisor's, and those that do not exist. Intel
    /// answers the latter as the highest basic leaf, AMD with zeroes.
    #[cold]
    fn beyond(&self, leaf: u32) -> Result<Regs, &Entry> {
        Ok(match leaf {
            leaf::BASE => signature(leaf::TIMING, leaf::SIGNATURE),
            leaf::INTERFACE => [abi::VERSION, 0, 0, 0],
            leaf::KVM_BASE => signature(leaf::KVM_TIMING, leaf::KVM_SIGNATURE),
            leaf::KVM_FEATURES => self.kvm,
            leaf::TIMING | leaf::KVM_TIMING => self.timing,
            _ => match self.basic.last() {
                Some(last) if self.features.intel && leaf >> 28 != 4 => return Err(last),
                _ => [0; 4],
            },
        })
    }

    #[inline(never)]
    fn subleaf(&self, entry: &Entry, subleaf: u32) -> (Regs, Dynamic) {
        if subleaf <= entry.more.into() {
            let index = usize::from(entry.first) + subleaf as usize - 1;
            if let Some(found) = self.subleaves.get(index) {
                return *found;
            }
        }
        match entry.dynamic {
            // "Other sub-leaves: ECX[7:0] as asked, EDX as in sub-leaf 0."
            Dynamic::Topology => ([0, 0, subleaf & 0xff, 0], Dynamic::Topology),
            _ => ([0; 4], Dynamic::No),
        }
    }

    #[inline(never)]
    fn adjust<V: Vcpu + ?Sized>(
        &self,
        mut regs: Regs,
        dynamic: Dynamic,
        vcpu: &V,
        apic: &LocalApic,
    ) -> Regs {
        let cr4 = || Cr4::from_bits_retain(vcpu.cr(ControlRegister::Cr4));
        let apic_bit = u32::from(apic.mode() != ApicMode::Disabled) << 9;
        match dynamic {
            Dynamic::No => {}
            Dynamic::Leaf1 => {
                regs[EBX] |= apic.id() << 24;
                regs[ECX] |= u32::from(cr4().contains(Cr4::OSXSAVE)) << 27;
                regs[EDX] |= apic_bit;
            }
            Dynamic::Leaf7 => regs[ECX] |= u32::from(cr4().contains(Cr4::PKE)) << 4,
            Dynamic::Topology => regs[EDX] = apic.id(),
            Dynamic::Xsave { compacted } => regs[EBX] = self.xsave_size(vcpu.xcr0(), compacted),
            Dynamic::Extended1 => regs[EDX] |= apic_bit,
            Dynamic::AmdTopology => {
                regs[EAX] = apic.id();
                regs[EBX] = apic.id() & 0xff;
            }
        }
        regs
    }

    /// Bytes that XSAVE (or, compacted, XSAVEC) writes for these components.
    fn xsave_size(&self, xcr0: u64, compacted: bool) -> u32 {
        let enabled = self.components.iter().filter(|c| c.mask & xcr0 != 0);
        enabled.fold(XSAVE_HEADER_END, |end, component| {
            if !compacted {
                end.max(component.offset + component.size)
            } else if component.aligned {
                end.next_multiple_of(64) + component.size
            } else {
                end + component.size
            }
        })
    }
}

fn signature(last: u32, text: [u8; 12]) -> Regs {
    let word = |at: usize| u32::from_le_bytes([text[at], text[at + 1], text[at + 2], text[at + 3]]);
    [last, word(0), word(4), word(8)]
}

struct Builder<'a> {
    host: &'a dyn Fn(u32, u32) -> Regs,
    config: &'a CpuidConfig,
    last_basic: u32,
    last_extended: u32,
    intel: bool,
    amd: bool,
    xcr0: u64,
    policy: CpuidPolicy,
}

impl<'a> Builder<'a> {
    fn new(host: &'a dyn Fn(u32, u32) -> Regs, config: &'a CpuidConfig) -> Self {
        let first = host(0, 0);
        let vendor = [first[EBX], first[EDX], first[ECX]].map(u32::to_le_bytes);
        let vendor = vendor.as_flattened();
        Self {
            host,
            config,
            last_basic: first[EAX],
            last_extended: host(EXTENDED, 0)[EAX],
            intel: vendor == b"GenuineIntel",
            amd: vendor == b"AuthenticAMD" || vendor == b"HygonGenuine",
            xcr0: 0,
            policy: CpuidPolicy {
                basic: Vec::new(),
                extended: Vec::new(),
                subleaves: Vec::new(),
                components: Vec::new(),
                timing: [config.tsc_khz, TIMER_HZ / 1000, 0, 0],
                kvm: [
                    // Alone, a vCPU waits for nobody's lock.
                    KVM_FEATURES | (u32::from(config.vcpus > 1) * leaf::kvm::PV_UNHALT),
                    0,
                    0,
                    u32::from(config.dedicated) * leaf::kvm::HINT_DEDICATED,
                ],
                features: Features::default(),
            },
        }
    }

    /// The machine's answer; zeroes for a leaf it does not have.
    fn host(&self, leaf: u32, subleaf: u32) -> Regs {
        let last = if leaf >= EXTENDED {
            self.last_extended
        } else {
            self.last_basic
        };
        if leaf > last {
            [0; 4]
        } else {
            (self.host)(leaf, subleaf)
        }
    }

    /// One feature register after the allow-list and what the backend takes away.
    fn features(&self, leaf: u32, subleaf: u32, reg: usize) -> u32 {
        let Some(rule) = RULES
            .iter()
            .find(|r| (r.leaf, r.subleaf, r.reg) == (leaf, subleaf, reg))
        else {
            return 0;
        };
        let without = |list: &[(u32, u32, usize, u32)]| {
            list.iter()
                .filter(|row| (row.0, row.1, row.2) == (leaf, subleaf, reg))
                .fold(0, |mask, row| mask | row.3)
        };
        let enabled = &self.config.enabled;
        let mut hidden = 0;
        if self.xcr0 & 1 << 2 == 0 {
            hidden |= without(AVX) | without(AVX512);
        }
        if self.xcr0 & 1 << 5 == 0 {
            hidden |= without(AVX512);
        }
        if !enabled.spec_ctrl {
            hidden |= without(SPECULATION);
        }
        hidden |= match (leaf, reg) {
            (1, ECX) if self.xcr0 == 0 => 1 << 26,
            (7, EBX) if subleaf == 0 && !enabled.invpcid => 1 << 10,
            (7, ECX) => u32::from(self.xcr0 & 1 << 9 == 0) << 3 | u32::from(!enabled.rdtscp) << 22,
            (7, EDX) if subleaf == 0 && enabled.arch_capabilities == 0 => 1 << 29,
            (0xd, EAX) => u32::from(!enabled.xsavec) << 1 | u32::from(!enabled.xsaves) << 3,
            // The core count is the VM's.
            (0x8000_0001, ECX) => 1 << 1,
            (0x8000_0001, EDX) if !enabled.rdtscp => 1 << 27,
            _ => 0,
        };
        self.host(leaf, subleaf)[reg] & rule.allow & !hidden | rule.force
    }

    /// Components of extended state that machine and backend have, whole groups only, and
    /// without MPX and AMX.
    fn allowed_xcr0(&self) -> u64 {
        if self.host(1, 0)[ECX] & 1 << 26 == 0 {
            return 0;
        }
        let host = self.host(0xd, 0);
        let mut mask = u64::from(host[EDX]) << 32 | u64::from(host[EAX]);
        mask &= self.config.enabled.xcr0 & 0b10_1110_0111;
        if mask & 3 != 3 {
            return 0;
        }
        if mask & 1 << 2 == 0 || mask & 0xe0 != 0xe0 {
            mask &= !0xe0;
        }
        if self.host(7, 0)[ECX] & 1 << 3 == 0 {
            mask &= !(1 << 9);
        }
        mask
    }

    fn build(mut self) -> CpuidPolicy {
        self.xcr0 = self.allowed_xcr0();
        // Frequencies (leaf 16H) and topology (1FH) are ours, so the range may grow on Intel.
        let last_basic = if self.intel {
            self.last_basic.clamp(0x16, LAST_BASIC)
        } else {
            0xd
        };
        let last_extended = self.last_extended.clamp(
            EXTENDED + 8,
            if self.amd {
                LAST_EXTENDED
            } else {
                EXTENDED + 8
            },
        );
        self.find_components();
        for leaf in 0..=last_basic {
            let entry = self.entry(leaf, last_basic);
            self.policy.basic.push(entry);
        }
        for leaf in EXTENDED..=last_extended {
            let entry = self.entry(leaf, last_extended);
            self.policy.extended.push(entry);
        }
        self.policy.features = self.summary();
        self.policy
    }

    fn find_components(&mut self) {
        for index in 2..63 {
            if self.xcr0 & 1 << index != 0 {
                let [size, offset, flags, _] = self.host(0xd, index);
                self.policy.components.push(Component {
                    mask: 1 << index,
                    size: size & 0xffff,
                    offset: offset & 0xffff,
                    aligned: flags & 2 != 0,
                });
            }
        }
    }

    fn vcpus(&self) -> u32 {
        self.config.vcpus.clamp(1, MAX_VCPUS)
    }

    /// How many bits of an APIC id number the vCPUs of the package.
    fn id_bits(&self) -> u32 {
        self.vcpus().next_power_of_two().ilog2()
    }

    fn filtered(&self, leaf: u32, subleaf: u32) -> Regs {
        [EAX, EBX, ECX, EDX].map(|reg| self.features(leaf, subleaf, reg))
    }

    /// An entry with sub-leaves 1 and up taken from `rest`.
    fn with_subleaves(&mut self, regs: Regs, dynamic: Dynamic, rest: &[(Regs, Dynamic)]) -> Entry {
        let first = self.policy.subleaves.len() as u16;
        self.policy.subleaves.extend_from_slice(rest);
        Entry {
            regs,
            dynamic,
            selects: true,
            more: rest.len() as u16,
            first,
        }
    }

    fn entry(&mut self, leaf: u32, last: u32) -> Entry {
        let vcpus = self.vcpus();
        let shift = self.id_bits();
        let mut dynamic = Dynamic::No;
        let regs = match leaf {
            0 | EXTENDED => {
                let host = self.host(leaf, 0);
                [last, host[EBX], host[ECX], host[EDX]]
            }
            1 => {
                dynamic = Dynamic::Leaf1;
                let host = self.host(1, 0);
                let mut regs = self.filtered(1, 0);
                regs[EAX] = host[EAX];
                // CLFLUSH size and brand index; how many ids the package has (Intel), or vCPUs.
                let ids = if self.amd { vcpus } else { 1 << shift };
                regs[EBX] = host[EBX] & 0xffff | ids << 16;
                regs[EDX] |= u32::from(vcpus > 1) << 28;
                // The vCPU's APIC may be disabled.
                regs[EDX] &= !(1 << 9);
                regs
            }
            4 | 0x8000_001d => return self.caches(leaf),
            7 => {
                let mut regs = self.filtered(7, 0);
                let more = self.filtered(7, 1);
                regs[EAX] = u32::from(more != [0; 4]);
                let rest = [(more, Dynamic::No)];
                let rest = &rest[..regs[EAX] as usize];
                return self.with_subleaves(regs, Dynamic::Leaf7, rest);
            }
            0xb | 0x1f => {
                let core = [shift, vcpus, 2 << 8 | 1, 0];
                let rest = [(core, Dynamic::Topology)];
                return self.with_subleaves([0, 1, 1 << 8, 0], Dynamic::Topology, &rest);
            }
            0xd => return self.xsave(),
            0x15 => {
                let (numerator, denominator) = ratio(self.config.tsc_khz);
                [denominator, numerator, TIMER_HZ, 0]
            }
            0x16 => {
                let mhz = (self.config.tsc_khz / 1000) & 0xffff;
                [mhz, mhz, 100, 0]
            }
            0x8000_0001 => {
                let host = self.host(leaf, 0);
                let mut regs = self.filtered(leaf, 0);
                [regs[EAX], regs[EBX]] = [host[EAX], host[EBX]];
                if self.amd {
                    dynamic = Dynamic::Extended1;
                    // As leaf 1: MTRR and PAT are there; the APIC is added when read.
                    regs[EDX] |= bits(&[12, 16]);
                    regs[ECX] |= u32::from(vcpus > 1) << 1;
                }
                regs
            }
            0x8000_0008 => {
                let mut regs = self.filtered(leaf, 0);
                let host = self.host(leaf, 0)[EAX];
                let (phys, linear) = match (host & 0xff, host >> 8 & 0xff) {
                    (0, _) => (36, 48),
                    (phys, linear) => (phys.min(MAX_PHYS_BITS), linear.min(48)),
                };
                regs[EAX] = linear << 8 | phys;
                if self.amd {
                    regs[ECX] = shift << 12 | (vcpus - 1);
                }
                regs
            }
            0x8000_001e if self.amd => {
                dynamic = Dynamic::AmdTopology;
                [0; 4]
            }
            _ if PASSED.contains(&leaf) => self.host(leaf, 0),
            _ => self.filtered(leaf, 0),
        };
        Entry {
            regs,
            dynamic,
            selects: false,
            more: 0,
            first: 0,
        }
    }

    /// Deterministic cache parameters: the machine's caches, each vCPU a core of one thread; the
    /// first two levels are a core's own, the others the package's.
    fn caches(&mut self, leaf: u32) -> Entry {
        let package = (1 << self.id_bits()) - 1;
        let mut all: Vec<(Regs, Dynamic)> = Vec::new();
        for subleaf in 0..16 {
            let mut regs = self.host(leaf, subleaf);
            if regs[EAX] & 0x1f == 0 {
                break;
            }
            let shared = if regs[EAX] >> 5 & 7 > 2 { package } else { 0 };
            regs[EAX] = regs[EAX] & 0x3fff | shared << 14;
            if leaf == 4 {
                regs[EAX] |= package << 26;
            }
            all.push((regs, Dynamic::No));
        }
        match all.split_first() {
            Some((first, rest)) => self.with_subleaves(first.0, Dynamic::No, rest),
            None => self.with_subleaves([0; 4], Dynamic::No, &[]),
        }
    }

    fn xsave(&mut self) -> Entry {
        if self.xcr0 == 0 {
            return self.with_subleaves([0; 4], Dynamic::No, &[]);
        }
        let size = self.policy.xsave_size(self.xcr0, false);
        let regs = [self.xcr0 as u32, 0, size, (self.xcr0 >> 32) as u32];
        let one = [self.features(0xd, 1, EAX), 0, 0, 0];
        // The size in EBX is that for XSAVEC and XSAVES; without them it is not defined.
        let compacted = if one[EAX] & 0b1010 != 0 {
            Dynamic::Xsave { compacted: true }
        } else {
            Dynamic::No
        };
        let mut rest = Vec::from([(one, compacted)]);
        for index in 2..=self.xcr0.ilog2() {
            let regs = if self.xcr0 & 1 << index != 0 {
                self.host(0xd, index)
            } else {
                [0; 4]
            };
            rest.push((regs, Dynamic::No));
        }
        self.with_subleaves(regs, Dynamic::Xsave { compacted: false }, &rest)
    }

    /// The other policies' view, from the finished table.
    fn summary(&self) -> Features {
        let basic = |leaf: usize| self.policy.basic.get(leaf).map_or([0; 4], |e| e.regs);
        let extended = |leaf: usize| self.policy.extended.get(leaf).map_or([0; 4], |e| e.regs);
        let (one, seven) = (basic(1), basic(7));
        let (ext1, ext8) = (extended(1), extended(8));
        let has = |word: u32, bit: u32| word >> bit & 1 != 0;
        let enabled = &self.config.enabled;

        let mut cr4 = Cr4::PCE;
        for (present, flags) in [
            (has(one[EDX], 1), Cr4::VME | Cr4::PVI),
            (has(one[EDX], 4), Cr4::TSD),
            (has(one[EDX], 2), Cr4::DE),
            (has(one[EDX], 3), Cr4::PSE),
            (has(one[EDX], 6), Cr4::PAE),
            (has(one[EDX], 7), Cr4::MCE),
            (has(one[EDX], 13), Cr4::PGE),
            (has(one[EDX], 24), Cr4::OSFXSR),
            (has(one[EDX], 25), Cr4::OSXMMEXCPT),
            (has(one[ECX], 17), Cr4::PCIDE),
            (has(one[ECX], 26), Cr4::OSXSAVE),
            (has(seven[EBX], 0), Cr4::FSGSBASE),
            (has(seven[EBX], 7), Cr4::SMEP),
            (has(seven[EBX], 20), Cr4::SMAP),
            (has(seven[ECX], 2), Cr4::UMIP),
            (has(seven[ECX], 3), Cr4::PKE),
        ] {
            if present {
                cr4 |= flags;
            }
        }
        let mut efer = 0;
        for (present, bit) in [
            (has(ext1[EDX], 11), 0),
            (has(ext1[EDX], 29), 8),
            (has(ext1[EDX], 20), 11),
            (has(ext1[EDX], 25), 14),
        ] {
            efer |= u64::from(present) << bit;
        }
        let mut spec_ctrl = 0;
        for (present, bit) in [
            (has(seven[EDX], 26) || has(ext8[EBX], 14), 0),
            (has(seven[EDX], 27) || has(ext8[EBX], 15), 1),
            (has(seven[EDX], 31) || has(ext8[EBX], 24), 2),
            (has(ext8[EBX], 28), 7),
        ] {
            spec_ctrl |= u64::from(present) << bit;
        }
        let mut capabilities = enabled.arch_capabilities & ARCH_CAPABILITIES;
        if !enabled.spec_ctrl {
            capabilities &= !IBRS_ALL;
        }
        Features {
            intel: self.intel,
            amd: self.amd,
            phys_bits: (ext8[EAX] & 0xff) as u8,
            xcr0: self.xcr0,
            cr4: cr4.bits(),
            efer,
            spec_ctrl,
            ibpb: has(seven[EDX], 26) || has(ext8[EBX], 12),
            rdtscp: has(ext1[EDX], 27),
            xsaves: self.xcr0 != 0 && has(self.features(0xd, 1, EAX), 3),
            arch_capabilities: has(seven[EDX], 29).then_some(capabilities),
            osvw: has(ext1[ECX], 9),
        }
    }
}

/// `khz` over 1 GHz as a fraction of small numbers, numerator first: the best approximation (by
/// continued fractions) whose numerator times 1,000,000 fits 32 bits, because kernels multiply
/// it by the crystal's kilohertz in 32 bits.
fn ratio(khz: u32) -> (u32, u32) {
    const LIMIT: u64 = u32::MAX as u64 / 1_000_000;
    let (mut num, mut den) = (u64::from(khz.max(1)), u64::from(TIMER_HZ / 1000));
    // The last two convergents.
    let (mut p, mut q, mut p0, mut q0) = (1, 0, 0, 1);
    while den != 0 {
        let term = num / den;
        if term * p + p0 > LIMIT {
            // A shortened term is closer than none if it is more than half of the whole.
            let short = (LIMIT - p0) / p;
            if short * 2 > term {
                (p, q) = (short * p + p0, short * q + q0);
            }
            break;
        }
        (p, q, p0, q0) = (term * p + p0, term * q + q0, p, q);
        (num, den) = (den, num % den);
    }
    (p as u32, q.max(1) as u32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{clock::TscClock, mock::MockVcpu};

    /// A machine that sets every bit of every feature register.
    fn everything(vendor: &'static [u8; 12], leaf: u32, subleaf: u32) -> Regs {
        let [_, first, second, third] = signature(0, *vendor);
        match (leaf, subleaf) {
            // EBX, EDX, ECX hold the vendor in this order.
            (0, _) => [0x20, first, third, second],
            (EXTENDED, _) => [0x8000_0028, first, third, second],
            (4 | 0x8000_001d, 0..3) => [0xfc03_c101 | (subleaf + 1) << 5, 0x1c0_003f, 63, 0],
            (4 | 0x8000_001d, _) => [0; 4],
            (0xd, 0) => [0x602e7, 0xa80, 0xa80, 0],
            (0xd, 2) => [256, 576, 0, 0],
            (0xd, 5) => [64, 832, 0, 0],
            (0xd, 6) => [512, 896, 0, 0],
            (0xd, 7) => [1024, 1408, 0, 0],
            (0xd, 9) => [8, 2432, 0, 0],
            (0x8000_0008, _) => [0x3930, u32::MAX, u32::MAX, u32::MAX],
            _ => [u32::MAX; 4],
        }
    }

    const ALL: Enabled = Enabled {
        rdtscp: true,
        invpcid: true,
        xsavec: true,
        xsaves: true,
        spec_ctrl: true,
        xcr0: u64::MAX,
        arch_capabilities: u64::MAX,
    };

    struct World {
        policy: CpuidPolicy,
        vcpu: MockVcpu,
        apic: LocalApic,
    }

    impl World {
        fn new(vendor: &'static [u8; 12], vcpus: u32, enabled: Enabled) -> Self {
            let config = CpuidConfig {
                vcpus,
                dedicated: vcpus == 5,
                tsc_khz: 2_995_201,
                enabled,
            };
            Self {
                policy: CpuidPolicy::build(&|l, s| everything(vendor, l, s), &config),
                vcpu: MockVcpu::real(),
                apic: LocalApic::new(vcpus - 1, false, 46, TscClock::new(2_995_201)),
            }
        }

        fn cpuid(&self, leaf: u32, subleaf: u32) -> Regs {
            self.policy.answer(leaf, subleaf, &self.vcpu, &self.apic)
        }
    }

    const INTEL: &[u8; 12] = b"GenuineIntel";
    const AMD: &[u8; 12] = b"AuthenticAMD";

    #[test]
    fn the_vendor_passes_and_the_hypervisor_says_so() {
        let world = World::new(INTEL, 1, ALL);
        assert!(world.policy.features().intel);
        let [max, b, c, d] = world.cpuid(0, 0);
        assert_eq!(max, LAST_BASIC);
        let name = [b, d, c].map(u32::to_le_bytes);
        assert_eq!(name.as_flattened(), b"GenuineIntel");
        assert!(World::new(AMD, 1, ALL).policy.features().amd);
    }

    #[test]
    fn what_software_or_nobody_provides() {
        let bit = |word: u32, n: u32| word >> n & 1;
        for vendor in [INTEL, AMD] {
            let world = World::new(vendor, 1, ALL);
            let one = world.cpuid(1, 0);
            for shown in [21, 24, 31] {
                assert_eq!(bit(one[ECX], shown), 1, "1.ECX[{shown}]");
            }
            for hidden in [2, 3, 4, 5, 6, 7, 8, 10, 11, 14, 15, 16, 18, 27] {
                assert_eq!(bit(one[ECX], hidden), 0, "1.ECX[{hidden}]");
            }
            for hidden in [18, 21, 22, 28, 29, 30, 31] {
                assert_eq!(bit(one[EDX], hidden), 0, "1.EDX[{hidden}]");
            }
            let seven = world.cpuid(7, 0);
            assert_eq!(bit(seven[EDX], 4), 0, "FSRM");
            assert_eq!(bit(seven[EBX], 2) | bit(seven[EBX], 25), 0, "SGX, PT");
            assert_eq!(world.cpuid(6, 0), [4, 0, 0, 0], "ARAT only");
            for leaf in [3, 5, 9, 0xa, 0xc, 0xe, 0xf, 0x10, 0x11, 0x12] {
                assert_eq!(world.cpuid(leaf, 0)[EAX..ECX], [0, 0], "leaf {leaf:#x}");
            }
            let ext = world.cpuid(0x8000_0001, 0);
            assert_eq!(bit(ext[ECX], 2), 0, "SVM");
            assert_eq!(world.cpuid(0x8000_0007, 0), [0, 0, 0, 1 << 8]);
            if vendor == AMD {
                assert_eq!(world.cpuid(0x8000_000a, 0), [0; 4], "SVM revision");
            }
        }
    }

    #[test]
    fn a_bare_machine_still_gives_what_software_provides() {
        let config = CpuidConfig {
            vcpus: 1,
            dedicated: false,
            tsc_khz: 1_000_000,
            enabled: Enabled::default(),
        };
        let policy = CpuidPolicy::build(&|_, _| [0; 4], &config);
        let apic = LocalApic::new(0, true, 36, TscClock::new(1_000_000));
        let vcpu = MockVcpu::real();
        let one = policy.answer(1, 0, &vcpu, &apic);
        assert_eq!(one[ECX], bits(&[21, 24, 31]));
        assert_eq!(one[EDX], bits(&[9, 12, 16]));
        assert_eq!(policy.features().phys_bits, 36);
        assert_eq!(policy.features().xcr0, 0);
    }

    #[test]
    fn features_that_need_the_backend_go_with_it() {
        let world = World::new(INTEL, 1, Enabled::default());
        let seven = world.cpuid(7, 0);
        assert_eq!(
            seven[EBX] & bits(&[5, 10, 16, 31]),
            0,
            "AVX2, INVPCID, AVX-512"
        );
        assert_eq!(seven[ECX] & bits(&[3, 22]), 0, "PKU, RDPID");
        assert_eq!(seven[EDX] & bits(&[26, 27, 29, 31]), 0, "speculation");
        assert_eq!(
            world.cpuid(1, 0)[ECX] & bits(&[12, 26, 28, 29]),
            0,
            "XSAVE, AVX"
        );
        assert_eq!(world.cpuid(0xd, 0), [0; 4]);
        assert_eq!(world.cpuid(0x8000_0001, 0)[EDX] >> 27 & 1, 0, "RDTSCP");
        let features = world.policy.features();
        assert_eq!(
            (features.spec_ctrl, features.xcr0, features.ibpb),
            (0, 0, false)
        );
        assert_eq!(features.cr4 & (Cr4::OSXSAVE | Cr4::PKE).bits(), 0);
    }

    #[test]
    fn the_vcpu_shows_through_where_it_should() {
        let mut world = World::new(INTEL, 3, ALL);
        assert_eq!(world.cpuid(1, 0)[EBX] >> 24, 2, "APIC id");
        assert_eq!(world.cpuid(1, 0)[EBX] >> 16 & 0xff, 4, "ids in the package");
        assert_eq!(world.cpuid(1, 0)[ECX] >> 27 & 1, 0);
        assert_eq!(world.cpuid(7, 0)[ECX] >> 4 & 1, 0);
        world.vcpu.cr4 = (Cr4::OSXSAVE | Cr4::PKE).bits();
        assert_eq!(world.cpuid(1, 0)[ECX] >> 27 & 1, 1, "OSXSAVE");
        assert_eq!(world.cpuid(7, 0)[ECX] >> 4 & 1, 1, "OSPKE");
        assert_eq!(world.cpuid(1, 0)[EDX] >> 9 & 1, 1, "APIC");
        world.apic.set_base_msr(0xfee0_0000).unwrap();
        assert_eq!(world.cpuid(1, 0)[EDX] >> 9 & 1, 0, "APIC off");
    }

    #[test]
    fn topology_is_one_package_of_one_thread_cores() {
        let world = World::new(INTEL, 3, ALL);
        for leaf in [0xb, 0x1f] {
            assert_eq!(world.cpuid(leaf, 0), [0, 1, 0x100, 2]);
            assert_eq!(world.cpuid(leaf, 1), [2, 3, 0x201, 2]);
            assert_eq!(world.cpuid(leaf, 2), [0, 0, 2, 2]);
        }
        let l1 = world.cpuid(4, 0)[EAX];
        let l3 = world.cpuid(4, 2)[EAX];
        assert_eq!((l1 >> 14 & 0xfff, l1 >> 26), (0, 3));
        assert_eq!((l3 >> 14 & 0xfff, l3 >> 26), (3, 3));
        assert_eq!(world.cpuid(4, 3), [0; 4]);

        let world = World::new(AMD, 3, ALL);
        assert_eq!(world.cpuid(0xb, 0), [0, 1, 0x100, 2]);
        assert_eq!(world.cpuid(0xb, 1), [2, 3, 0x201, 2]);
        assert_eq!(world.cpuid(0x8000_0008, 0)[ECX], 2 << 12 | 2);
        assert_eq!(world.cpuid(0x8000_001e, 0), [2, 2, 0, 0]);
        assert_eq!(world.cpuid(0x8000_001d, 0)[EAX] >> 26, 0);
        assert_eq!(world.cpuid(0x8000_0001, 0)[ECX] >> 1 & 1, 1);
    }

    /// Packages, cores and threads as Linux, Windows and the manuals' own algorithms count them.
    #[test]
    fn every_way_to_count_comes_to_the_same() {
        for (vcpus, bits) in [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (63, 6), (64, 6)] {
            let last = vcpus - 1;
            let intel = World::new(INTEL, vcpus, ALL);
            let amd = World::new(AMD, vcpus, ALL);
            for world in [&intel, &amd] {
                let one = world.cpuid(1, 0);
                assert_eq!(one[EBX] >> 24, last, "initial APIC id");
                assert_eq!(one[EDX] >> 28 & 1, u32::from(vcpus > 1), "HTT");
                assert_eq!(world.cpuid(0xb, 0), [0, 1, 0x100, last], "one thread");
                assert_eq!(world.cpuid(0xb, 1), [bits, vcpus, 0x201, last], "cores");
                assert_eq!(world.cpuid(0xb, 2), [0, 0, 2, last], "no more levels");
                assert!(last >> bits == 0, "one package");
            }
            for sub in 0..3 {
                assert_eq!(intel.cpuid(0x1f, sub), intel.cpuid(0xb, sub));
                assert_eq!(intel.cpuid(4, sub)[EAX] >> 26, (1 << bits) - 1, "core ids");
                let leaf = [intel.cpuid(4, sub), amd.cpuid(0x8000_001d, sub)];
                let sharing = if sub == 2 { (1 << bits) - 1 } else { 0 };
                assert_eq!(leaf.map(|regs| regs[EAX] >> 14 & 0xfff), [sharing; 2]);
            }
            assert_eq!(intel.cpuid(1, 0)[EBX] >> 16 & 0xff, 1 << bits);
            assert_eq!(amd.cpuid(1, 0)[EBX] >> 16 & 0xff, vcpus);
            assert_eq!(amd.cpuid(0x8000_0008, 0)[ECX], bits << 12 | last);
            let legacy = amd.cpuid(0x8000_0001, 0)[ECX] >> 1 & 1;
            assert_eq!(legacy, u32::from(vcpus > 1), "cores, not threads");
            assert_eq!(amd.cpuid(0x8000_001e, 0), [last, last, 0, 0]);
            assert_eq!(intel.cpuid(0x8000_0008, 0)[ECX], 0);
        }
    }

    #[test]
    fn extended_state_is_sized_by_what_is_enabled() {
        let mut world = World::new(INTEL, 1, ALL);
        // No MPX, no AMX.
        assert_eq!(world.policy.features().xcr0, 0x2e7);
        world.vcpu.xcr0 = 1;
        assert_eq!(world.cpuid(0xd, 0), [0x2e7, 576, 2440, 0]);
        world.vcpu.xcr0 = 7;
        assert_eq!(world.cpuid(0xd, 0)[EBX], 832);
        assert_eq!(world.cpuid(0xd, 1), [0xf, 832, 0, 0]);
        world.vcpu.xcr0 = 0x207;
        assert_eq!(world.cpuid(0xd, 0)[EBX], 2440);
        assert_eq!(world.cpuid(0xd, 1)[EBX], 840);
        assert_eq!(world.cpuid(0xd, 2), [256, 576, 0, 0]);
        assert_eq!(world.cpuid(0xd, 3), [0; 4]);
        assert_eq!(world.cpuid(0xd, u32::MAX), [0; 4]);
        let avx = Enabled { xcr0: 7, ..ALL };
        let world = World::new(INTEL, 1, avx);
        assert_eq!(
            world.cpuid(7, 0)[EBX] & bits(&[5, 16]),
            bits(&[5]),
            "AVX2, no AVX-512"
        );
    }

    #[test]
    fn frequencies_agree_and_fit_a_kernels_arithmetic() {
        let world = World::new(INTEL, 1, ALL);
        let [denominator, numerator, crystal, _] = world.cpuid(0x15, 0);
        assert_eq!(crystal, TIMER_HZ);
        let khz = (crystal / 1000).checked_mul(numerator).unwrap() / denominator;
        assert!(khz.abs_diff(2_995_201) < 300, "{khz}");
        assert_eq!(world.cpuid(0x4000_0010, 0), [2_995_201, 1_000_000, 0, 0]);
        for khz in [
            1, 100_000, 1_000_000, 2_400_000, 1_996_249, 3_999_999, 6_000_000,
        ] {
            let (n, d) = ratio(khz);
            assert!(n.checked_mul(1_000_000).is_some());
            let back = u64::from(n) * 1_000_000 / u64::from(d);
            assert!(
                back.abs_diff(khz.into()) <= 1 + u64::from(khz) / 1_000_000,
                "{khz}: {n}/{d}"
            );
        }
    }

    #[test]
    fn the_hypervisor_is_found_by_its_own_name_and_by_kvms() {
        let world = World::new(AMD, 1, ALL);
        let [max, b, c, d] = world.cpuid(0x4000_0000, 0);
        assert_eq!(max, 0x4000_0010);
        let name = [b, c, d].map(u32::to_le_bytes);
        assert_eq!(name.as_flattened(), b"TesseraTesse");
        let [max, b, c, d] = world.cpuid(0x4000_0100, 0);
        assert!(max >= 0x4000_0101);
        let name = [b, c, d].map(u32::to_le_bytes);
        assert_eq!(name.as_flattened(), b"KVMKVMKVM\0\0\0");
        assert_eq!(world.cpuid(0x4000_0101, 0), [0x0100_002b, 0, 0, 0]);
        let dedicated = World::new(INTEL, 5, ALL);
        assert_eq!(dedicated.cpuid(0x4000_0101, 0), [0x0100_00ab, 0, 0, 1]);
        assert_eq!(world.cpuid(0x4000_0200, 0), [0; 4]);
    }

    #[test]
    fn leaves_that_do_not_exist() {
        let intel = World::new(INTEL, 1, ALL);
        assert_eq!(intel.cpuid(0x20, 1), intel.cpuid(0x1f, 1));
        assert_eq!(intel.cpuid(0x8000_0009, 0), intel.cpuid(0x1f, 0));
        assert_eq!(intel.cpuid(0x4000_4000, 0), [0; 4]);
        let amd = World::new(AMD, 1, ALL);
        assert_eq!(amd.cpuid(0x15, 0), [0; 4]);
        assert_eq!(amd.cpuid(0x8000_0022, 0), [0; 4]);
        assert_eq!(amd.cpuid(u32::MAX, u32::MAX), [0; 4]);
    }

    #[test]
    fn every_rule_names_its_register_once() {
        for (i, a) in RULES.iter().enumerate() {
            assert_eq!(a.allow & a.force, 0, "{:#x}", a.leaf);
            let same = |b: &&Rule| (a.leaf, a.subleaf, a.reg) == (b.leaf, b.subleaf, b.reg);
            assert!(RULES[i + 1..].iter().find(same).is_none());
        }
    }
}
