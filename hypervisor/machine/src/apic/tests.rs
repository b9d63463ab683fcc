//! The APICs as a guest sees them, register by register.

use super::rig::Apics;
use super::*;
use crate::{clock::TscClock, random::Random};
use arch::Nanos;

const NOW: Nanos = Nanos(1_000_000);

/// An enabled local APIC in xAPIC mode.
fn xapic() -> LocalApic {
    let mut apic = LocalApic::new(0, true, 40, TscClock::new(2_000_000));
    write(&mut apic, 0xf0, 0x1ff);
    apic
}

/// An enabled local APIC in x2APIC mode.
fn x2apic(id: u32) -> LocalApic {
    let mut apic = LocalApic::new(id, id == 0, 40, TscClock::new(2_000_000));
    apic.set_base_msr(0xfee0_0c00).unwrap();
    wrmsr(&mut apic, 0x80f, 0x1ff);
    apic
}

fn write(apic: &mut LocalApic, offset: u16, value: u32) {
    let _ = apic.write_mmio(offset, value, NOW);
}

fn read(apic: &mut LocalApic, offset: u16) -> u32 {
    apic.read_mmio(offset, NOW)
}

fn wrmsr(apic: &mut LocalApic, index: u32, value: u64) {
    let _ = apic.write_msr(index, value, NOW).unwrap();
}

fn fixed(vector: u8, dest: u32) -> Message {
    Message {
        vector: Vector(vector),
        mode: DeliveryMode::Fixed,
        logical: false,
        dest,
        level: false,
    }
}

#[test]
fn registers_after_power_on() {
    let mut apic = LocalApic::new(3, false, 40, TscClock::new(1_000_000));
    for (offset, value) in [
        (0x20, 3 << 24),
        (0x30, 0x0105_0014),
        (0x80, 0),
        (0xa0, 0),
        (0xd0, 0),
        (0xe0, u32::MAX),
        (0xf0, 0xff),
        (0x320, 0x1_0000),
        (0x350, 0x1_0000),
        (0x380, 0),
        (0x390, 0),
        (0x3e0, 0),
    ] {
        assert_eq!(read(&mut apic, offset), value, "{offset:#x}");
    }
    assert_eq!(apic.base_msr(), 0xfee0_0800);
    assert_eq!(apic.next_event(), Nanos::NEVER);
    assert!(!apic.has_work());
}

#[test]
fn the_highest_vector_goes_first_and_priorities_hold_back() {
    let mut apic = xapic();
    for vector in [0x31, 0x92, 0x95, 0xef] {
        assert!(apic.accept(Vector(vector), false));
    }
    assert_eq!(apic.acknowledge(), Vector(0xef));
    assert_eq!(read(&mut apic, 0xa0), 0xe0, "PPR");
    assert_eq!(apic.pending(), None, "0x95 waits");
    let _ = apic.eoi();
    assert_eq!(apic.acknowledge(), Vector(0x95));
    assert_eq!(apic.pending(), None, "the same class waits too");
    let _ = apic.eoi();
    apic.set_tpr(0x90);
    assert_eq!((apic.pending(), apic.tpr_threshold()), (None, 9));
    apic.set_tpr(0x8f);
    assert_eq!(
        (apic.pending(), apic.tpr_threshold()),
        (Some(Vector(0x92)), 0)
    );
    assert_eq!(apic.acknowledge(), Vector(0x92));
    let _ = apic.eoi();
    apic.set_tpr(0);
    assert_eq!(apic.acknowledge(), Vector(0x31));
    let _ = apic.eoi();
    assert_eq!(apic.acknowledge(), Vector(0xff), "spurious");
    assert_eq!(apic.eoi(), ApicEffect::None, "nothing in service");
}

#[test]
fn only_level_interrupts_broadcast_their_eoi() {
    let mut apic = xapic();
    for level in [false, true, false] {
        apic.accept(Vector(0x40), level);
        assert_eq!(read(&mut apic, 0x1a0) & 1, u32::from(level), "TMR");
        apic.acknowledge();
        let effect = apic.write_mmio(0xb0, 0, NOW);
        assert_eq!(effect == ApicEffect::Eoi(Vector(0x40)), level);
    }
    write(&mut apic, 0xf0, 0x11ff);
    apic.accept(Vector(0x40), true);
    apic.acknowledge();
    assert_eq!(
        apic.write_mmio(0xb0, 0, NOW),
        ApicEffect::None,
        "suppressed"
    );
}

#[test]
fn software_disable_masks_the_lvt_and_refuses_interrupts() {
    let mut apic = xapic();
    write(&mut apic, 0x320, 0x30);
    assert_eq!(read(&mut apic, 0x320), 0x30);
    write(&mut apic, 0xf0, 0xff);
    assert_eq!(read(&mut apic, 0x320), 0x1_0030);
    write(&mut apic, 0x320, 0x30);
    assert_eq!(read(&mut apic, 0x320), 0x1_0030, "cannot be unmasked");
    assert!(!apic.accept(Vector(0x40), false));
    let nmi = Message {
        mode: DeliveryMode::Nmi,
        ..fixed(0, 0)
    };
    let mut apics = Apics::new(1, TscClock::new(2_000_000));
    apics.write_mmio(0, 0xf0, 0xff, NOW);
    let router = &apics.router;
    assert!(!router.fabric().deliver(&fixed(0x40, 0)));
    assert!(router.fabric().deliver(&nmi));
    apics.collect();
    assert!(apics.take_signals(0).nmi);
}

#[test]
fn only_settable_bits_are_set() {
    let mut apic = xapic();
    for (offset, value) in [
        (0x20, 0),
        (0x30, 0x0105_0014),
        (0x80, 0xff),
        (0xd0, 0xff00_0000),
        (0xf0, 0x11ff),
        (0x310, 0xff00_0000),
        (0x320, 0x7_00ff),
        (0x330, 0x1_07ff),
        (0x340, 0x1_07ff),
        (0x350, 0x1_a7ff),
        (0x360, 0x1_a7ff),
        (0x370, 0x1_00ff),
        (0x3e0, 0xb),
    ] {
        write(&mut apic, offset, u32::MAX);
        assert_eq!(read(&mut apic, offset), value, "{offset:#x}");
    }
    write(&mut apic, 0xe0, 0);
    assert_eq!(read(&mut apic, 0xe0), 0x0fff_ffff);
}

#[test]
fn errors_are_shown_after_a_write_to_esr_and_interrupt_once() {
    let mut apic = xapic();
    write(&mut apic, 0x370, 0xfe);
    let _ = read(&mut apic, 0x40);
    write(&mut apic, 0x300, 0x4005);
    apic.accept(Vector(3), false);
    assert_eq!(read(&mut apic, 0x280), 0);
    assert_eq!(apic.acknowledge(), Vector(0xfe));
    let _ = apic.eoi();
    assert_eq!(apic.pending(), None);
    write(&mut apic, 0x280, 0);
    assert_eq!(read(&mut apic, 0x280), 0xe0);
    write(&mut apic, 0x280, 0);
    assert_eq!(read(&mut apic, 0x280), 0);
    let _ = read(&mut apic, 0x400);
    assert_eq!(apic.pending(), Some(Vector(0xfe)), "armed again");
}

#[test]
fn modes_change_only_along_the_arrows() {
    let (off, x, x2, bad) = (0xfee0_0000, 0xfee0_0800, 0xfee0_0c00, 0xfee0_0400);
    let path = |values: &[u64]| {
        let mut apic = LocalApic::new(1, false, 40, TscClock::new(1_000_000));
        values
            .iter()
            .map(|value| apic.set_base_msr(*value))
            .last()
            .unwrap_or(Ok(()))
    };
    assert_eq!(path(&[off, x]), Ok(()));
    assert_eq!(path(&[x2, off]), Ok(()));
    assert_eq!(path(&[x2, off, x, x2]), Ok(()));
    assert_eq!(path(&[x2, x2]), Ok(()));
    assert_eq!(path(&[x2, x]), Err(Gp));
    assert_eq!(path(&[off, x2]), Err(Gp));
    assert_eq!(path(&[bad]), Err(Gp));
    assert_eq!(path(&[x | 1 << 40]), Err(Gp));
    assert_eq!(path(&[x | 1]), Err(Gp));
    assert_eq!(path(&[0xf_fee0_0800]), Ok(()), "moved");
}

#[test]
fn x2apic_has_its_own_registers_and_checks() {
    let mut apic = x2apic(0x25);
    assert_eq!(apic.read_msr(0x802, NOW), Ok(0x25));
    assert_eq!(
        apic.read_msr(0x80d, NOW),
        Ok(0x0002_0020),
        "cluster 2, bit 5"
    );
    assert_eq!(apic.read_mmio(0x20, NOW), u32::MAX, "no page");
    for absent in [0x800, 0x80b, 0x80e, 0x82f, 0x831, 0x83f, 0x840, 0x8ff] {
        assert_eq!(apic.read_msr(absent, NOW), Err(Gp), "{absent:#x}");
    }
    for (index, value) in [
        (0x802, 0),
        (0x803, 0),
        (0x80a, 0),
        (0x80b, 1),
        (0x80d, 0),
        (0x80f, 0x2000),
        (0x810, 0),
        (0x828, 1),
        (0x830, 1 << 12),
        (0x831, 0),
        (0x832, 1 << 19),
        (0x838, 1 << 32),
        (0x839, 0),
        (0x83e, 4),
        (0x83f, 0x100),
    ] {
        assert_eq!(apic.write_msr(index, value, NOW), Err(Gp), "{index:#x}");
    }
    wrmsr(&mut apic, 0x830, 0x0000_0007_0000_4031);
    assert_eq!(apic.read_msr(0x830, NOW), Ok(0x0000_0007_0000_4031));
    wrmsr(&mut apic, 0x83f, 0x77);
    assert_eq!(apic.pending(), Some(Vector(0x77)), "self IPI");
    let mut old = xapic();
    assert_eq!(old.read_msr(0x802, NOW), Err(Gp));
    assert_eq!(old.write_msr(0x80b, 0, NOW), Err(Gp));
}

#[test]
fn every_icr_form_goes_where_table_11_3_says() {
    let send = |icr: u64| {
        let mut apic = x2apic(0);
        let effect = apic.write_msr(0x830, icr, NOW).unwrap();
        (effect, apic.pending(), apic.outgoing())
    };
    let sent = |icr: u64| match send(icr) {
        (ApicEffect::Ipi, _, ipi) => Some((ipi.message.mode, ipi.shorthand, ipi.message.dest)),
        _ => None,
    };
    use DeliveryMode::{Fixed, Init, LowestPriority, Nmi, StartUp};
    assert_eq!(sent(5 << 32 | 0x4031), Some((Fixed, Shorthand::None, 5)));
    assert_eq!(
        sent(5 << 32 | 0x4131),
        Some((LowestPriority, Shorthand::None, 5))
    );
    assert_eq!(sent(5 << 32 | 0x4400), Some((Nmi, Shorthand::None, 5)));
    assert_eq!(sent(5 << 32 | 0xc500), Some((Init, Shorthand::None, 5)));
    assert_eq!(sent(5 << 32 | 0x8500), None, "INIT level de-assert");
    assert_eq!(sent(5 << 32 | 0x4608), Some((StartUp, Shorthand::None, 5)));
    assert_eq!(sent(0x8_4031), Some((Fixed, Shorthand::All, 0)));
    assert_eq!(sent(0xc_4500), Some((Init, Shorthand::Others, 0)));
    assert_eq!(sent(0x8_4500), None, "INIT to all and self");
    assert_eq!(sent(0x4_4400), None, "NMI to self");
    assert_eq!(sent(0x4300), None, "reserved mode");
    assert_eq!(sent(0x4005), None, "illegal vector");
    assert_eq!(send(0x4_4031).1, Some(Vector(0x31)));
}

#[test]
fn one_shot_counts_down_once() {
    let mut apic = xapic();
    write(&mut apic, 0x320, 0x40);
    write(&mut apic, 0x3e0, 3);
    assert_eq!(apic.write_mmio(0x380, 1_000, NOW), ApicEffect::Timer);
    assert_eq!(apic.next_event(), NOW + 16_000);
    assert_eq!(apic.read_mmio(0x390, NOW), 1_000);
    assert_eq!(apic.read_mmio(0x390, NOW + 8_000), 500);
    assert_eq!(apic.read_mmio(0x390, NOW + 15_999), 1);
    apic.tick(NOW + 15_999);
    assert_eq!(apic.pending(), None);
    apic.tick(NOW + 16_000);
    assert_eq!(apic.acknowledge(), Vector(0x40));
    assert_eq!(apic.read_mmio(0x390, NOW + 17_000), 0);
    assert_eq!(apic.next_event(), Nanos::NEVER);
    write(&mut apic, 0x380, 5);
    write(&mut apic, 0x380, 0);
    assert_eq!(apic.next_event(), Nanos::NEVER, "stopped");
}

#[test]
fn every_divider_divides() {
    for (code, divider) in [
        (0, 2),
        (1, 4),
        (2, 8),
        (3, 16),
        (8, 32),
        (9, 64),
        (10, 128),
        (11, 1),
    ] {
        let mut apic = xapic();
        write(&mut apic, 0x320, 0x40);
        write(&mut apic, 0x3e0, code);
        write(&mut apic, 0x380, 1_000_000);
        assert_eq!(apic.next_event(), NOW + 1_000_000 * divider);
    }
    let mut apic = xapic();
    write(&mut apic, 0x320, 0x40);
    write(&mut apic, 0x380, 1_000);
    let _ = apic.write_mmio(0x3e0, 3, NOW + 1_000);
    assert_eq!(
        apic.read_mmio(0x390, NOW + 1_000),
        500,
        "goes on at the new rate"
    );
    assert_eq!(apic.next_event(), NOW + 9_000);
}

#[test]
fn periodic_keeps_its_grid_and_coalesces() {
    let mut apic = xapic();
    write(&mut apic, 0x3e0, 0xb);
    write(&mut apic, 0x320, 0x2_0040);
    write(&mut apic, 0x380, 100_000);
    apic.tick(NOW + 100_000);
    assert_eq!(apic.acknowledge(), Vector(0x40));
    assert_eq!(apic.next_event(), NOW + 200_000);
    assert_eq!(apic.read_mmio(0x390, NOW + 130_000), 70_000);
    apic.tick(NOW + 555_000);
    assert_eq!(apic.next_event(), NOW + 600_000);
    write(&mut apic, 0x320, 0x3_0040);
    assert_eq!(apic.next_event(), Nanos::NEVER, "masked");
    assert_eq!(
        apic.read_mmio(0x390, NOW + 1_025_000),
        75_000,
        "and counts on"
    );
    // Too fast to serve: later, and on the grid.
    write(&mut apic, 0x320, 0x2_0040);
    write(&mut apic, 0x380, 3);
    apic.tick(NOW + 3);
    let next = apic.next_event().since(NOW);
    assert!(next >= 10_000 && next.is_multiple_of(3), "{next}");
}

#[test]
fn a_timer_that_ran_out_while_masked_is_lost() {
    let mut apic = xapic();
    write(&mut apic, 0x320, 0x1_0040);
    write(&mut apic, 0x380, 1_000);
    let _ = apic.write_mmio(0x320, 0x40, NOW + 5_000);
    apic.tick(NOW + 5_000);
    assert_eq!((apic.pending(), apic.next_event()), (None, Nanos::NEVER));
}

#[test]
fn tsc_deadline_fires_once_and_reads_zero_then() {
    let mut apic = x2apic(0);
    assert_eq!(
        apic.set_tsc_deadline(5, NOW),
        ApicEffect::None,
        "another mode"
    );
    wrmsr(&mut apic, 0x832, 0x4_0040);
    let target = apic.clock().tsc(NOW) + 2_000;
    assert_eq!(apic.set_tsc_deadline(target, NOW), ApicEffect::Timer);
    assert_eq!(apic.tsc_deadline(NOW), target);
    let due = apic.next_event();
    assert!((NOW + 1_000..=NOW + 1_002).contains(&due));
    wrmsr(&mut apic, 0x838, 77);
    assert_eq!(apic.read_msr(0x838, NOW), Ok(0), "no count in this mode");
    apic.tick(due);
    assert_eq!(apic.acknowledge(), Vector(0x40));
    assert_eq!(
        (apic.tsc_deadline(due), apic.next_event()),
        (0, Nanos::NEVER)
    );
    let _ = apic.eoi();

    let _ = apic.set_tsc_deadline(1, due);
    assert_eq!(apic.next_event(), due, "already past");
    let _ = apic.set_tsc_deadline(0, due);
    apic.tick(due);
    assert!(apic.pending().is_some(), "it was due when it was disarmed");

    // The target is a TSC value: writing the TSC moves the due time.
    let mut apic = x2apic(0);
    wrmsr(&mut apic, 0x832, 0x4_0040);
    let _ = apic.set_tsc_deadline(target, NOW);
    apic.shift_tsc(1_000, NOW);
    assert!((NOW + 500..=NOW + 502).contains(&apic.next_event()));
    wrmsr(&mut apic, 0x832, 0x40);
    assert_eq!(
        (apic.tsc_deadline(NOW), apic.next_event()),
        (0, Nanos::NEVER)
    );
}

#[test]
fn lint0_is_the_virtual_wire_or_an_interrupt_of_its_own() {
    let mut fabric = Apics::new(2, TscClock::new(1_000_000));
    assert!(!fabric.accepts_extint(0));
    fabric.set_extint(true);
    assert_eq!(fabric.take_kicks(), 0b1);
    assert!(fabric.accepts_extint(0) && !fabric.accepts_extint(1));
    fabric.write_mmio(0, 0x350, 0x1_0700, NOW);
    assert!(!fabric.accepts_extint(0));
    fabric.set_extint(false);
    fabric.write_mmio(0, 0x350, 0x31, NOW);
    fabric.set_extint(true);
    fabric.set_extint(true);
    assert_eq!(fabric.local[0].acknowledge(), Vector(0x31), "one edge");
    assert_eq!(fabric.local[0].pending(), None);
    fabric.set_extint(false);
    let apic = &mut fabric.local[0];
    let _ = apic.eoi();
    apic.set_lint(0, false);
    write(apic, 0x350, 0x8031);
    apic.set_lint(0, true);
    assert_eq!(read(apic, 0x350), 0xc031, "remote IRR");
    apic.acknowledge();
    let _ = apic.eoi();
    assert_eq!(apic.pending(), Some(Vector(0x31)), "still asserted");
    write(apic, 0x350, 0x400);
    apic.set_lint(0, false);
    apic.set_lint(0, true);
    assert!(apic.take_signals().nmi);
    apic.set_base_msr(0xfee0_0000).unwrap();
    assert!(apic.accepts_extint(), "INTR");
    apic.set_lint(1, true);
    assert!(apic.take_signals().nmi, "NMI");
}

#[test]
fn pin_0_as_extint_passes_the_8259_on() {
    let mut fabric = Apics::new(2, TscClock::new(1_000_000));
    fabric.write_mmio(0, 0x350, 0x1_0000, NOW);
    fabric.set_extint(true);
    assert!(!fabric.accepts_extint(0) && !fabric.accepts_extint(1));
    fabric.write_io(0, 0x11);
    fabric.write_io(0x10, 1 << 24);
    fabric.write_io(0, 0x10);
    fabric.take_kicks();
    fabric.write_io(0x10, 0x700);
    assert_eq!(fabric.take_kicks(), 0b10, "the level is up already");
    assert!(!fabric.accepts_extint(0) && fabric.accepts_extint(1));
    fabric.set_gsi(0, true);
    assert!(!fabric.local[1].has_work(), "a line, not a message");
}

#[test]
fn logical_destinations() {
    let mut apic = xapic();
    let to = |dest| Message {
        logical: true,
        ..fixed(0x40, dest)
    };
    write(&mut apic, 0xd0, 0x24 << 24);
    assert!(apic.address().is_destination(&to(0x04)) && apic.address().is_destination(&to(0xe0)));
    assert!(!apic.address().is_destination(&to(0x08)));
    write(&mut apic, 0xe0, 0);
    assert!(apic.address().is_destination(&to(0x24)) && apic.address().is_destination(&to(0x2f)));
    assert!(!apic.address().is_destination(&to(0x14)) && !apic.address().is_destination(&to(0x28)));
    assert!(apic.address().is_destination(&to(Message::ALL)));
    let apic = x2apic(0x13);
    assert!(
        apic.address().is_destination(&to(0x0001_0008))
            && apic.address().is_destination(&to(0x0001_ffff))
    );
    assert!(
        !apic.address().is_destination(&to(0x0001_0004))
            && !apic.address().is_destination(&to(0x0000_0008))
    );
    assert!(
        apic.address().is_destination(&fixed(0x40, 0x13))
            && !apic.address().is_destination(&fixed(0x40, 0xff))
    );
}

#[test]
fn messages_reach_those_they_are_for() {
    let mut fabric = Apics::new(4, TscClock::new(1_000_000));
    for id in 0..4 {
        fabric.write_mmio(id, 0xf0, 0x1ff, NOW);
        fabric.write_mmio(id, 0xd0, 1 << (24 + id), NOW);
    }
    fabric.take_kicks();
    let got = |fabric: &mut Apics| {
        let mut takers = 0;
        for apic in &mut fabric.local {
            if apic.pending().is_some() {
                takers |= 1 << apic.id();
                apic.acknowledge();
                let _ = apic.eoi();
            }
        }
        assert_eq!(fabric.take_kicks(), takers);
        takers
    };
    assert!(fabric.msi(0xfee0_2000, 0x4041));
    assert_eq!(got(&mut fabric), 0b100, "physical");
    assert!(fabric.msi(0xfeef_f000, 0x4041));
    assert_eq!(got(&mut fabric), 0b1111, "broadcast");
    assert!(fabric.msi(0xfee0_a004, 0x4041));
    assert_eq!(got(&mut fabric), 0b1010, "logical");
    // Lowest priority: one of those that are addressed and enabled, in turn.
    fabric.write_mmio(2, 0xf0, 0xff, NOW);
    let mut takers = 0;
    for _ in 0..8 {
        assert!(fabric.msi(0xfee0_e00c, 0x4041));
        let taker = got(&mut fabric);
        assert_eq!(taker.count_ones(), 1);
        takers |= taker;
    }
    assert_eq!(takers, 0b1010);
    assert!(!fabric.msi(0xfee0_9000, 0x4041), "nobody");
    assert!(!fabric.msi(0xfed0_0000, 0x4041), "no MSI");
    // IPIs by shorthand.
    fabric.write_mmio(2, 0xf0, 0x1ff, NOW);
    fabric.write_mmio(1, 0x300, 0x8_4041, NOW);
    assert_eq!(got(&mut fabric), 0b1111);
    fabric.write_mmio(1, 0x300, 0xc_4041, NOW);
    assert_eq!(got(&mut fabric), 0b1101);
}

/// Senders on other threads: no vector is lost, and none is kept from its vCPU for want of a kick.
#[test]
fn nothing_is_lost_between_threads() {
    use core::sync::atomic::{AtomicU64, Ordering};
    const ROUNDS: u64 = 20_000;
    let mut apics = Apics::new(2, TscClock::new(1_000_000));
    apics.write_mmio(1, 0xf0, 0x1ff, NOW);
    apics.take_kicks();
    let fabric = apics.router.fabric().clone();
    let (done, kicked) = (AtomicU64::new(0), AtomicU64::new(0));
    let mut apic = apics.local.remove(1);
    std::thread::scope(|scope| {
        for vector in [0x40, 0x81] {
            let (fabric, done, kicked) = (&fabric, &done, &kicked);
            scope.spawn(move || {
                for _ in 0..ROUNDS {
                    assert!(fabric.deliver(&fixed(vector, 1)));
                    kicked.fetch_or(fabric.take_kicks(), Ordering::SeqCst);
                }
                done.fetch_add(1, Ordering::SeqCst);
            });
        }
        let mut taken = 0;
        let mut last = false;
        while !last {
            last = done.load(Ordering::SeqCst) == 2;
            if kicked.swap(0, Ordering::SeqCst) & 0b10 != 0 {
                fabric.collect(&mut apic);
                while apic.pending().is_some() {
                    apic.acknowledge();
                    let _ = apic.eoi();
                    taken += 1;
                }
            }
        }
        assert!(taken >= 2);
    });
    // Whatever came last was followed by a kick.
    if kicked.load(Ordering::SeqCst) == 0 {
        assert!(!fabric.is_signalled(1));
    }
}

#[test]
fn a_cpu_is_started_by_init_and_start_up() {
    let mut fabric = Apics::new(2, TscClock::new(1_000_000));
    for icr in [0xc500, 0x8500, 0x4699, 0x469a] {
        fabric.write_mmio(0, 0x310, 1 << 24, NOW);
        fabric.write_mmio(0, 0x300, icr, NOW);
    }
    assert_eq!(fabric.take_kicks(), 0b10);
    let signals = fabric.take_signals(1);
    assert_eq!((signals.init, signals.startup), (true, Some(0x9a)));
    assert_eq!(fabric.take_signals(1), Signals::default());
    assert_eq!(fabric.take_signals(7), Signals::default(), "no such vCPU");
}

#[test]
fn a_level_pin_waits_for_its_eoi_and_for_an_enabled_apic() {
    let mut fabric = Apics::new(1, TscClock::new(1_000_000));
    fabric.local[0].reset();
    fabric.publish();
    fabric.write_io(0, 0x10 + 2 * 9);
    fabric.write_io(0x10, 0x8059);
    fabric.set_gsi(9, true);
    assert_eq!(fabric.local[0].pending(), None);
    fabric.write_mmio(0, 0xf0, 0x1ff, NOW);
    assert_eq!(fabric.local[0].acknowledge(), Vector(0x59));
    fabric.set_gsi(9, true);
    fabric.write_mmio(0, 0xb0, 0, NOW);
    assert_eq!(
        fabric.local[0].acknowledge(),
        Vector(0x59),
        "still asserted"
    );
    fabric.set_gsi(9, false);
    fabric.write_mmio(0, 0xb0, 0, NOW);
    assert_eq!(fabric.local[0].pending(), None);
    // Directed EOI: the local one does not tell, the I/O APIC's register does.
    fabric.write_mmio(0, 0xf0, 0x11ff, NOW);
    fabric.set_gsi(9, true);
    fabric.local[0].acknowledge();
    fabric.write_mmio(0, 0xb0, 0, NOW);
    assert_eq!(fabric.local[0].pending(), None);
    fabric.write_io(0x40, 0x59);
    assert_eq!(fabric.local[0].pending(), Some(Vector(0x59)));
}

#[test]
fn what_was_sent_before_an_apic_was_disabled_stays_until_an_init() {
    let mut fabric = Apics::new(1, TscClock::new(1_000_000));
    fabric.local[0].reset();
    fabric.publish();
    fabric.write_mmio(0, 0xf0, 0x1ff, NOW);
    fabric.write_io(0, 0x10 + 2 * 9);
    fabric.write_io(0x10, 0x8059);
    // The pin rises while the vCPU is on its way to disable its APIC.
    fabric.router.set_gsi(9, true);
    fabric.write_mmio(0, 0xf0, 0xff, NOW);
    fabric.write_mmio(0, 0xf0, 0x1ff, NOW);
    assert_eq!(fabric.local[0].acknowledge(), Vector(0x59));
    fabric.router.set_gsi(9, false);
    fabric.write_mmio(0, 0xb0, 0, NOW);
    fabric.set_gsi(9, true);
    assert_eq!(
        fabric.local[0].acknowledge(),
        Vector(0x59),
        "the pin is free"
    );
    fabric.set_gsi(9, false);
    fabric.write_mmio(0, 0xb0, 0, NOW);
    fabric.router.set_gsi(9, true);
    fabric.local[0].init();
    let carrier = fabric.router.fabric().clone();
    carrier.publish_init(&mut fabric.local[0]);
    fabric.collect();
    assert_eq!(fabric.local[0].pending(), None);
}

#[test]
fn a_write_that_hardware_made_has_the_same_effects() {
    // The hardware has stored the value; then the exit comes.
    let trap = |apic: &mut LocalApic, offset: u16, value: u32| {
        let stored = usize::from(offset) / 4;
        apic.poke(stored, value);
        apic.apic_write_done(offset, NOW)
    };
    let mut apic = xapic();
    let _ = trap(&mut apic, 0x320, 0xffff_0040);
    assert_eq!(read(&mut apic, 0x320), 0x7_0040);
    let _ = trap(&mut apic, 0x320, 0x40);
    assert_eq!(trap(&mut apic, 0x380, 1_000), ApicEffect::Timer);
    assert_eq!(apic.next_event(), NOW + 2_000);
    apic.accept(Vector(0x50), true);
    apic.acknowledge();
    assert_eq!(trap(&mut apic, 0xb0, 0), ApicEffect::Eoi(Vector(0x50)));
    let _ = trap(&mut apic, 0x20, 0x1234_5678);
    assert_eq!(read(&mut apic, 0x20), 0);
    let _ = trap(&mut apic, 0x310, 2 << 24);
    assert_eq!(trap(&mut apic, 0x300, 0x4041), ApicEffect::Ipi);
    assert_eq!(apic.outgoing().message.dest, 2);
    let _ = trap(&mut apic, 0xf0, 0xff);
    assert_eq!(read(&mut apic, 0x320), 0x1_0040);
    assert_eq!(apic.next_event(), Nanos::NEVER);
}

#[test]
fn saved_state_continues_where_it_was() {
    let mut apic = x2apic(1);
    wrmsr(&mut apic, 0x832, 0x4_0040);
    let _ = apic.set_tsc_deadline(9_000_000, NOW);
    apic.accept(Vector(0x91), true);
    apic.accept(Vector(0x33), false);
    apic.acknowledge();
    apic.raise_nmi();
    let state = apic.save();
    let mut copy = LocalApic::new(1, false, 40, TscClock::new(1));
    copy.restore(&state).unwrap();
    assert_eq!(copy.mode(), ApicMode::X2Apic);
    assert_eq!(copy.next_event(), apic.next_event());
    assert_eq!(copy.eoi(), ApicEffect::Eoi(Vector(0x91)));
    assert_eq!(copy.acknowledge(), Vector(0x33));
    assert!(copy.take_signals().nmi);
    let mut short = state.clone();
    short.registers_for_test().pop();
    assert_eq!(copy.restore(&short), Err(RestoreError::Registers(63)));
}

/// Request, acknowledge, end, and priority against sets of vectors.
#[test]
fn interrupts_behave_as_two_sets() {
    let mut random = Random(1);
    let mut apic = xapic();
    let (mut requested, mut serving) = ([false; 256], [false; 256]);
    let top = |set: &[bool; 256]| set.iter().rposition(|on| *on).unwrap_or(0) as u8;
    for _ in 0..100_000 {
        match random.next() % 8 {
            0..3 => {
                let vector = 16 + (random.next() % 240) as u8;
                apic.accept(Vector(vector), random.next() & 1 != 0);
                requested[usize::from(vector)] = true;
            }
            3 => apic.set_tpr(random.next() as u8 & 0x7f),
            4 => {
                let _ = apic.eoi();
                serving[usize::from(top(&serving))] = false;
            }
            5 => apic.resync(),
            _ => {
                if let Some(vector) = apic.pending() {
                    assert_eq!(apic.acknowledge(), vector);
                    requested[usize::from(vector.0)] = false;
                    serving[usize::from(vector.0)] = true;
                }
            }
        }
        let priority = (apic.tpr() >> 4).max(top(&serving) >> 4);
        assert_eq!(apic.ppr() >> 4, priority);
        let next = top(&requested);
        assert_eq!(
            apic.pending(),
            (next >> 4 > priority).then_some(Vector(next))
        );
    }
}

#[test]
fn no_access_does_harm() {
    let mut random = Random(3);
    let mut fabric = Apics::new(3, TscClock::new(1_234_567));
    let mut now = Nanos(0);
    for _ in 0..300_000 {
        let vcpu = random.next() as usize % 4;
        let value = random.next() >> (random.next() % 64);
        now = now + (random.next() >> (40 + random.next() % 20));
        let offset = (random.next() % 0x420) as u16;
        let offset = if value & 1 == 0 {
            offset & !0xf
        } else {
            offset
        };
        match random.next() % 12 {
            0 => fabric.write_io([0, 0x10, 0x40][value as usize % 3], value as u32),
            1 => fabric.set_gsi(value as u32 % 26, random.next() & 1 != 0),
            2 => {
                fabric.msi(0xfee0_0000 | value & 0xfffff, random.next() as u32);
            }
            3..6 => {
                fabric.write_mmio(vcpu, offset, value as u32, now);
                fabric.local[vcpu % 3].read_mmio(offset, now);
            }
            6..8 => {
                let index = 0x800 + random.next() as u32 % 0x42;
                let _ = fabric.write_msr(vcpu, index, value, now);
                let _ = fabric.local[vcpu % 3].read_msr(index, now);
            }
            8 => {
                let modes = [0xfee0_0000, 0xfee0_0800, 0xfee0_0c00, value];
                let _ = fabric.set_base_msr(vcpu % 3, modes[random.next() as usize % 4]);
            }
            9 => fabric.set_extint(value & 1 != 0),
            10 => {
                let effect = fabric.local[vcpu % 3].set_tsc_deadline(value, now);
                fabric.apply(vcpu, effect);
            }
            _ => {
                let apic = &mut fabric.local[vcpu % 3];
                apic.tick(now);
                apic.shift_tsc(value, now);
                if apic.pending().is_some() {
                    apic.acknowledge();
                }
                let effect = apic.apic_write_done(offset & !0xf, now);
                fabric.apply(vcpu, effect);
                fabric.take_signals(vcpu);
            }
        }
    }
}
