//! The KVM-compatible paravirtual clock and record of stolen time, which Linux and the BSDs know
//! how to use (Linux Documentation/virt/kvm/x86/msr.rst; the clock's layout is Xen's).
//!
//! A guest names a place in its memory for each vCPU, and one for the wall clock. What is
//! written there tells how to make nanoseconds since the VM's power-on out of its own TSC, so
//! that reading the time needs no exit. As the TSC is invariant and all vCPUs' readings agree,
//! a record is written when it is registered, and again only when the vCPU's TSC was written.
//! What tells how long a vCPU could have run and did not is written each time it comes to run.

use crate::clock::TscClock;
use arch::{GuestMemory, GuestPhysAddr, MemoryFault, Nanos};

/// Readings of all vCPUs agree: the guest may take any record on any vCPU.
const TSC_STABLE: u8 = 1 << 0;
/// Bit 0 of the system-time and steal-time MSRs.
const ENABLED: u64 = 1 << 0;
/// Bits of the steal-time MSR that must be zero.
pub(crate) const STEAL_TIME_RESERVED: u64 = 0x3e;

/// Where the record of a vCPU is, from its system-time or steal-time MSR; `None` when it is off.
#[must_use]
pub const fn record_address(msr: u64) -> Option<GuestPhysAddr> {
    if msr & ENABLED != 0 {
        Some(GuestPhysAddr::new(msr & !ENABLED))
    } else {
        None
    }
}

/// Nanoseconds out of TSC ticks: `((ticks << shift) × mul) >> 32`, a negative shift to the right.
const fn scale(khz: u32) -> (u32, i8) {
    let mut shift = 0_i8;
    let mut mul = (1_000_000_u128 << 64) / khz as u128;
    // Here in units of 2⁻⁶⁴; the result has 32 significant bits.
    while mul >> 64 != 0 {
        mul >>= 1;
        shift += 1;
    }
    while mul >> 63 == 0 {
        mul <<= 1;
        shift -= 1;
    }
    ((mul >> 32) as u32, shift)
}

/// Writes `body` at `at`; the version number at `version` is odd while it changes.
fn publish<M: GuestMemory + ?Sized>(
    memory: &mut M,
    version: GuestPhysAddr,
    at: GuestPhysAddr,
    body: &[u8],
) -> Result<(), MemoryFault> {
    let busy = memory.read_u32(version)? | 1;
    memory.write(version, &busy.to_le_bytes())?;
    memory.write(at, body)?;
    memory.write(version, &busy.wrapping_add(1).to_le_bytes())
}

/// Writes the time record of a vCPU (`struct pvclock_vcpu_time_info`, 32 bytes).
///
/// # Errors
/// The guest named memory that it does not have.
pub fn write_time<M: GuestMemory + ?Sized>(
    memory: &mut M,
    at: GuestPhysAddr,
    clock: &TscClock,
    now: Nanos,
) -> Result<(), MemoryFault> {
    let (mul, shift) = scale(clock.khz());
    let mut body = [0; 28];
    body[4..12].copy_from_slice(&clock.tsc(now).to_le_bytes());
    body[12..20].copy_from_slice(&now.0.to_le_bytes());
    body[20..24].copy_from_slice(&mul.to_le_bytes());
    body[24] = shift.to_le_bytes()[0];
    body[25] = TSC_STABLE;
    publish(memory, at, at.wrapping_add(4), &body)
}

/// Writes the wall clock record (`struct pvclock_wall_clock`, 12 bytes): the time of day, in
/// nanoseconds since 1970, at which the VM's time was zero. Seconds are 32 bits.
///
/// # Errors
/// The guest named memory that it does not have.
pub fn write_wall_clock<M: GuestMemory + ?Sized>(
    memory: &mut M,
    at: GuestPhysAddr,
    power_on: u64,
) -> Result<(), MemoryFault> {
    let seconds = u32::try_from(power_on / 1_000_000_000).unwrap_or(u32::MAX);
    let nanos = (power_on % 1_000_000_000) as u32;
    let mut body = [0; 8];
    body[..4].copy_from_slice(&seconds.to_le_bytes());
    body[4..].copy_from_slice(&nanos.to_le_bytes());
    publish(memory, at, at.wrapping_add(4), &body)
}

/// Writes a vCPU's record of stolen time (`struct kvm_steal_time`, 64 bytes: nanoseconds, version,
/// flags, and whether the vCPU is preempted). `stolen` counts since the record was registered: how
/// long the vCPU could have run while its core was another's. It is to be written when the vCPU
/// comes to run, and with `preempted` when it is taken off its core though it could go on:
/// whoever waits for it then knows that spinning is in vain.
///
/// # Errors
/// The guest named memory that it does not have.
pub fn write_steal_time<M: GuestMemory + ?Sized>(
    memory: &mut M,
    at: GuestPhysAddr,
    stolen: u64,
    preempted: bool,
) -> Result<(), MemoryFault> {
    const VERSION: u64 = 8;
    const PREEMPTED: u64 = 16;
    // The flag stands alone: others read it while its vCPU does not run.
    memory.write(at.wrapping_add(PREEMPTED), &[preempted.into()])?;
    publish(memory, at.wrapping_add(VERSION), at, &stolen.to_le_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mock::FlatMemory;

    /// As a guest reads it.
    fn nanos(ram: &[u8], tsc: u64) -> u64 {
        let u64_at = |at: usize| u64::from_le_bytes(ram[at..at + 8].try_into().unwrap());
        let u32_at = |at: usize| u32::from_le_bytes(ram[at..at + 4].try_into().unwrap());
        let delta = tsc - u64_at(8);
        let shift = ram[28] as i8;
        let delta = if shift < 0 {
            delta >> -shift
        } else {
            delta << shift
        };
        u64_at(16) + ((u128::from(delta) * u128::from(u32_at(24))) >> 32) as u64
    }

    #[test]
    fn a_guest_reads_the_vm_time_from_its_tsc() {
        for khz in [100_000, 1_000_000, 2_995_201, 5_000_000] {
            let clock = TscClock::new(khz);
            let mut ram = FlatMemory::new(64);
            let start = Nanos(1_000_000_007);
            write_time(&mut ram, GuestPhysAddr::new(0), &clock, start).unwrap();
            assert_eq!(ram.ram[0..4], [2, 0, 0, 0], "even, and not zero");
            assert_eq!(ram.ram[29], 1);
            for after in [0, 1_000, 1_000_000_000, 3_600_000_000_000] {
                let now = start + after;
                let read = nanos(&ram.ram, clock.tsc(now));
                let error = read.abs_diff(now.0);
                assert!(error <= 20 + after / 1_000_000_000, "{khz}: {error} ns off");
            }
        }
    }

    #[test]
    fn each_update_raises_the_version_by_two() {
        let mut ram = FlatMemory::new(12);
        let at = GuestPhysAddr::new(0);
        write_wall_clock(&mut ram, at, 1_700_000_000_123_456_789).unwrap();
        write_wall_clock(&mut ram, at, 1_700_000_000_123_456_789).unwrap();
        assert_eq!(ram.ram[0], 4);
        assert_eq!(ram.ram[4..8], 1_700_000_000_u32.to_le_bytes());
        assert_eq!(ram.ram[8..12], 123_456_789_u32.to_le_bytes());
    }

    #[test]
    fn stolen_time_is_found_where_linux_looks() {
        let mut ram = FlatMemory::new(128);
        let at = GuestPhysAddr::new(64);
        write_steal_time(&mut ram, at, 0x0102_0304_0506_0708, true).unwrap();
        let mut expected = [0; 64];
        expected[..8].copy_from_slice(&[8, 7, 6, 5, 4, 3, 2, 1]);
        (expected[8], expected[16]) = (2, 1);
        assert_eq!(ram.ram[64..], expected);
        write_steal_time(&mut ram, at, 9, false).unwrap();
        assert_eq!(ram.ram[64..72], 9_u64.to_le_bytes());
        assert_eq!((ram.ram[72], ram.ram[80]), (4, 0));
        assert!(ram.ram[..64].iter().all(|byte| *byte == 0));
        assert!(write_steal_time(&mut ram, GuestPhysAddr::new(128), 9, false).is_err());
    }

    #[test]
    fn a_bad_address_is_an_error_and_no_more() {
        let mut ram = FlatMemory::new(16);
        let clock = TscClock::new(1_000_000);
        let at = GuestPhysAddr::new(u64::MAX - 1);
        assert!(write_time(&mut ram, at, &clock, Nanos(0)).is_err());
        assert_eq!(record_address(0x1000), None);
        assert_eq!(record_address(0x1001), Some(GuestPhysAddr::new(0x1000)));
    }
}
