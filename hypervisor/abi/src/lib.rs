//! What the hypervisor and its guests agree on: how a guest finds out that it runs on Tessera,
//! and how it calls. Numbers here never change their meaning; new ones are added.
#![no_std]
#![forbid(unsafe_code)]

/// The version of this interface: CPUID leaf [`cpuid::INTERFACE`] and [`hypercall::VERSION`].
pub const VERSION: u32 = 1;

/// CPUID leaves of the hypervisor range.
pub mod cpuid {
    /// EAX: the highest leaf of Tessera's own block. EBX, ECX, EDX: [`SIGNATURE`].
    pub const BASE: u32 = 0x4000_0000;
    /// EAX: [`crate::VERSION`]. EBX, ECX and EDX are zero.
    pub const INTERFACE: u32 = 0x4000_0001;
    /// EAX: the TSC's rate in kHz. EBX: the rate of the local APIC timer's input clock in kHz.
    /// The place and layout are those that several hypervisors share.
    pub const TIMING: u32 = 0x4000_0010;
    /// Who answers at [`BASE`].
    pub const SIGNATURE: [u8; 12] = *b"TesseraTesse";

    /// The block of leaves as KVM defines them, which Linux and the BSDs look for in steps of
    /// 100H. EAX: the block's highest leaf. EBX, ECX, EDX: [`KVM_SIGNATURE`].
    pub const KVM_BASE: u32 = 0x4000_0100;
    /// EAX: what is offered, EDX: what the guest may count on, see [`kvm`].
    pub const KVM_FEATURES: u32 = 0x4000_0101;
    /// As [`TIMING`].
    pub const KVM_TIMING: u32 = 0x4000_0110;
    /// Who KVM-compatible guests look for.
    pub const KVM_SIGNATURE: [u8; 12] = *b"KVMKVMKVM\0\0\0";

    /// Bits of EAX (and, named so, of EDX) in leaf [`KVM_FEATURES`]; those without a name here
    /// are never set.
    pub mod kvm {
        /// Paravirtual clock by MSR 11H and 12H.
        pub const CLOCKSOURCE: u32 = 1 << 0;
        /// Port accesses need no delay between them: no device here is slower than the CPU.
        pub const NOP_IO_DELAY: u32 = 1 << 1;
        /// Paravirtual clock by MSR 4B564D00H and 4B564D01H.
        pub const CLOCKSOURCE2: u32 = 1 << 3;
        /// Time taken from a vCPU, by MSR 4B564D03H.
        pub const STEAL_TIME: u32 = 1 << 5;
        /// [`crate::hypercall::KICK_CPU`] wakes a vCPU that halted in wait for a lock.
        pub const PV_UNHALT: u32 = 1 << 7;
        /// The clock's "stable" flag tells whether all vCPUs' readings agree.
        pub const CLOCKSOURCE_STABLE: u32 = 1 << 24;
        /// EDX: each vCPU owns its core, and is never taken off it.
        pub const HINT_DEDICATED: u32 = 1 << 0;
    }
}

/// MSRs of the KVM-compatible clock and of stolen time.
pub mod msr {
    /// Guest-physical address at which the wall clock at boot is to be written (old number).
    pub const WALL_CLOCK_OLD: u32 = 0x11;
    /// Guest-physical address of this vCPU's time record, bit 0: enabled (old number).
    pub const SYSTEM_TIME_OLD: u32 = 0x12;
    /// As [`WALL_CLOCK_OLD`].
    pub const WALL_CLOCK: u32 = 0x4b56_4d00;
    /// As [`SYSTEM_TIME_OLD`].
    pub const SYSTEM_TIME: u32 = 0x4b56_4d01;
    /// Guest-physical address, a multiple of 64, of this vCPU's record of stolen time, bit 0:
    /// enabled.
    pub const STEAL_TIME: u32 = 0x4b56_4d03;
}

/// Hypercalls: `VMCALL` or `VMMCALL` with the number in RAX and arguments in RBX, RCX, RDX and
/// RSI; the result comes in RAX, negative for an error. Only from CPL 0.
///
/// KVM's calls have small numbers; Tessera's own begin at [`OWN`](hypercall::OWN).
pub mod hypercall {
    /// The first of Tessera's own numbers ("Te", and zeroes).
    pub const OWN: u64 = 0x5465_0000;
    /// Gives [`crate::VERSION`].
    pub const VERSION: u64 = OWN;
    /// Gives how often the hypervisor read (bits 31:0) and wrote (bits 62:32) fields of a VMCS, for
    /// benches; only in builds that count (else [`ERROR_UNKNOWN`]).
    pub const VMCS_ACCESSES: u64 = OWN + 1;

    /// Gives up the rest of the caller's turn, where others wait for its core; for a vCPU that waits
    /// for another one's progress. Gives 0.
    pub const YIELD: u64 = OWN + 2;
    /// The hypervisor fails while it works for the caller, at the place in RBX (see [`fault`]); only
    /// in builds for tests of that (else [`ERROR_UNKNOWN`]).
    pub const FAULT: u64 = OWN + 3;
    /// Gives how often the calling vCPU has left guest mode for the reason with the number in RBX,
    /// this call counted: 0 CPUID, 1 hypercalls, 2 RDMSR, 3 WRMSR, 4 ports, 5 local APIC, 6 memory,
    /// 7 HLT, 8 interrupts and timers of the machine, 9 windows, 10 all others
    /// (else [`ERROR_ARGUMENT`]).
    pub const EXITS: u64 = OWN + 4;
    /// KVM's call: the vCPU whose APIC id is in RCX leaves HLT, whatever its interrupt flag says;
    /// if it is not in HLT, its next HLT is over at once. RBX is 0. Gives 0, also when there is no
    /// such vCPU. Offered with [`crate::cpuid::kvm::PV_UNHALT`].
    pub const KICK_CPU: u64 = 5;

    /// The places of [`FAULT`].
    pub mod fault {
        /// A panic in the call's handler.
        pub const HANDLER: u64 = 0;
        /// A panic while the lock on the VM's devices is held.
        pub const BOARD: u64 = 1;
        /// A panic while the lock on the VM's memory is held.
        pub const MEMORY: u64 = 2;
        /// A panic in the preparation of the next entry.
        pub const ENTRY: u64 = 3;
        /// The stack runs into its guard page: a page fault.
        pub const STACK: u64 = 4;
        /// A handler that does not return.
        pub const ENDLESS: u64 = 5;
        /// The same, while the lock on the VM's devices is held.
        pub const ENDLESS_BOARD: u64 = 6;
        /// The same, while a lock that all cores share is held: the host stops.
        pub const ENDLESS_SHARED: u64 = 7;
    }

    /// No such call (KVM's number for it).
    pub const ERROR_UNKNOWN: i64 = -1000;
    /// Called from a CPL other than 0.
    pub const ERROR_PRIVILEGE: i64 = -1;
    /// An argument is not valid.
    pub const ERROR_ARGUMENT: i64 = -22;
}
