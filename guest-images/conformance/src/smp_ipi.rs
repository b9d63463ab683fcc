//! Interrupts between CPUs, and from the I/O APIC to other CPUs (Intel SDM Vol. 3A §11.6, §11.7,
//! §11.12.10).

use crate::ioapic::{LEVEL, PIN, REMOTE_IRR, UART_PIN, edge, uart_line};
use crate::smp_start::need_two;
use crate::util::{PATIENCE, need, on_tcg, wait, wait_with_interrupts};
use core::sync::atomic::{AtomicU64, Ordering};
use guest_runtime::cpu::outb;
use guest_runtime::pc::{
    MASKED, eoi, handle_eoi, has_x2apic, ioapic, lapic, reg, set_lapic, set_redirection, set_x2apic,
};
use guest_runtime::smp::{self, ALL, LOGICAL, LOWEST, OTHERS, SELF, apic_id, send};
use guest_runtime::{Frame, count_on, guest_test, on_interrupt};

const VECTOR: u8 = 0x72;

/// All CPUs up, idle and ready for [`VECTOR`]: how many.
fn ready() -> usize {
    need_two();
    on_interrupt(VECTOR, handle_eoi);
    smp::start_all()
}

fn counts(vector: u8) -> [u64; smp::MAX] {
    core::array::from_fn(|cpu| count_on(cpu, vector))
}

/// That `kick` brings `vector` once to each CPU that `wanted` names, and to no other.
#[track_caller]
fn brings(vector: u8, wanted: impl Fn(usize) -> bool, kick: impl FnOnce()) {
    let before = counts(vector);
    let goal: [u64; smp::MAX] =
        core::array::from_fn(|cpu| before[cpu] + u64::from(cpu < smp::count() && wanted(cpu)));
    kick();
    wait_with_interrupts(PATIENCE, || counts(vector) == goal);
    wait_with_interrupts(100, || false);
    let found = counts(vector);
    for cpu in 0..smp::count() {
        assert_eq!(
            found[cpu] - before[cpu],
            goal[cpu] - before[cpu],
            "came to CPU {cpu}"
        );
    }
}

/// That `kick` brings [`VECTOR`] to one CPU of those in `among`: to which.
#[track_caller]
fn brings_one(among: impl Fn(usize) -> bool, kick: impl FnOnce()) -> usize {
    let before = counts(VECTOR);
    let came = |now: [u64; smp::MAX]| (0..smp::MAX).map(|cpu| now[cpu] - before[cpu]).sum::<u64>();
    kick();
    wait_with_interrupts(PATIENCE, || came(counts(VECTOR)) != 0);
    wait_with_interrupts(200, || false);
    let now = counts(VECTOR);
    assert_eq!(came(now), 1, "it comes once");
    match (0..smp::count()).find(|cpu| now[*cpu] != before[*cpu]) {
        Some(cpu) if among(cpu) => cpu,
        other => panic!("it came to {other:?}"),
    }
}

/// Every CPU's part of a set of tests: one after the other sends.
fn from_each(work: impl Fn(usize)) {
    (0..smp::count()).for_each(work);
}

fn physical() {
    from_each(|from| {
        for to in 0..smp::count() {
            brings(
                VECTOR,
                |cpu| cpu == to,
                || {
                    smp::on(from, || send(apic_id(to), VECTOR.into()));
                },
            );
        }
    });
}

fn shorthands() {
    from_each(|from| {
        let kick = |low: u32| move || smp::on(from, || send(0, low | u32::from(VECTOR)));
        brings(VECTOR, |cpu| cpu == from, kick(SELF));
        brings(VECTOR, |_| true, kick(ALL));
        brings(VECTOR, |cpu| cpu != from, kick(OTHERS));
    });
}

fn broadcast(everybody: u32) {
    from_each(|from| {
        brings(
            VECTOR,
            |_| true,
            || smp::on(from, || send(everybody, VECTOR.into())),
        );
    });
}

fn nmis() {
    fn nothing(_: &mut Frame) {}
    on_interrupt(2, nothing);
    from_each(|from| {
        for to in (0..smp::count()).filter(|to| *to != from) {
            brings(
                2,
                |cpu| cpu == to,
                || smp::on(from, || send(apic_id(to), smp::NMI)),
            );
        }
        brings(
            2,
            |cpu| cpu != from,
            || smp::on(from, || send(0, OTHERS | smp::NMI)),
        );
    });
}

#[guest_test]
fn smp_xapic_ipi_to_each_id() {
    ready();
    physical();
}

#[guest_test]
fn smp_xapic_ipi_by_shorthand() {
    ready();
    shorthands();
}

#[guest_test]
fn smp_xapic_ipi_broadcast() {
    ready();
    broadcast(0xff);
}

#[guest_test]
fn smp_xapic_nmi() {
    ready();
    nmis();
}

#[guest_test]
fn smp_xapic_ipi_to_nobody_is_lost() {
    let count = ready() as u32;
    let absent = (0..0xfe).find(|id| (0..count as usize).all(|cpu| apic_id(cpu) != *id));
    brings(
        VECTOR,
        |_| false,
        || send(absent.unwrap_or(0xfe), VECTOR.into()),
    );
}

/// The destinations that every test of a logical mode tries: sets of the first four CPUs.
const SETS: [u32; 6] = [0b0001, 0b0010, 0b0011, 0b0110, 0b1011, 0b1111];

#[guest_test]
fn smp_xapic_logical_flat() {
    ready();
    // Eight CPUs have a bit; the others are in no set.
    smp::everywhere(&|| {
        let cpu = smp::current();
        set_lapic(reg::DFR, u32::MAX);
        set_lapic(reg::LDR, if cpu < 8 { 1 << (24 + cpu) } else { 0 });
    });
    from_each(|from| {
        for set in SETS {
            brings(
                VECTOR,
                |cpu| set >> cpu & 1 != 0,
                || {
                    smp::on(from, || send(set, LOGICAL | u32::from(VECTOR)));
                },
            );
        }
    });
    let all = |cpu: usize| cpu < 8;
    brings(VECTOR, all, || send(0xff, LOGICAL | u32::from(VECTOR)));
    brings(VECTOR, |_| false, || send(0, LOGICAL | u32::from(VECTOR)));
}

#[guest_test]
fn smp_xapic_logical_cluster() {
    ready();
    // Two CPUs to a cluster.
    smp::everywhere(&|| {
        let cpu = smp::current() as u32;
        set_lapic(reg::DFR, 0x0fff_ffff);
        set_lapic(reg::LDR, (cpu / 2) << 28 | 1 << (24 + cpu % 2));
    });
    for cluster in 0..smp::count().div_ceil(2).min(15) {
        for members in 1..4 {
            let inside = |cpu: usize| cpu / 2 == cluster && members >> (cpu % 2) & 1 != 0;
            let destination = (cluster << 4 | members) as u32;
            brings(VECTOR, inside, || {
                send(destination, LOGICAL | u32::from(VECTOR))
            });
        }
    }
    // QEMU's emulation has the broadcast in the flat model only.
    if !on_tcg() {
        brings(VECTOR, |_| true, || send(0xff, LOGICAL | u32::from(VECTOR)));
    }
}

#[guest_test]
fn smp_xapic_lowest_priority_is_one() {
    ready();
    smp::everywhere(&|| {
        let cpu = smp::current();
        set_lapic(reg::DFR, u32::MAX);
        set_lapic(reg::LDR, if cpu < 8 { 1 << (24 + cpu) } else { 0 });
    });
    for set in SETS {
        let inside = |cpu: usize| set >> cpu & 1 != 0;
        if (0..smp::count()).any(inside) {
            brings_one(inside, || send(set, LOGICAL | LOWEST | u32::from(VECTOR)));
        }
    }
}

#[guest_test]
fn smp_ipi_waits_for_the_other_cpus_priority() {
    ready();
    smp::on(1, || set_lapic(reg::TPR, 0x80));
    brings(VECTOR, |_| false, || send(apic_id(1), VECTOR.into()));
    brings(
        VECTOR,
        |cpu| cpu == 1,
        || smp::on(1, || set_lapic(reg::TPR, 0)),
    );
}

#[guest_test]
fn smp_software_disabled_apic_takes_no_fixed_ipi_but_nmis() {
    fn nothing(_: &mut Frame) {}
    ready();
    on_interrupt(2, nothing);
    // It is at work all the time, as an idle one would have to be woken by an IPI.
    let release = AtomicU64::new(0);
    smp::beside(
        [1],
        &|| {
            set_lapic(reg::SVR, 0xff);
            release.store(1, Ordering::SeqCst);
            guest_runtime::with_interrupts(|| {
                while release.load(Ordering::SeqCst) != 2 {
                    core::hint::spin_loop();
                }
            });
            set_lapic(reg::SVR, 0x1ff);
        },
        || {
            while release.load(Ordering::SeqCst) == 0 {
                core::hint::spin_loop();
            }
            brings(VECTOR, |_| false, || send(apic_id(1), VECTOR.into()));
            brings(2, |cpu| cpu == 1, || send(apic_id(1), smp::NMI));
            release.store(2, Ordering::SeqCst);
        },
    );
    brings(VECTOR, |cpu| cpu == 1, || send(apic_id(1), VECTOR.into()));
}

/// All CPUs in x2APIC mode.
fn ready_x2apic() -> usize {
    need_two();
    need(has_x2apic(), "x2APIC");
    let count = ready();
    // Work is given in whichever mode a CPU is.
    smp::everywhere(&|| {
        set_x2apic(true);
        set_lapic(reg::SVR, 0x1ff);
        set_lapic(reg::TPR, 0);
    });
    count
}

#[guest_test]
fn smp_x2apic_ipi_to_each_id() {
    ready_x2apic();
    physical();
}

#[guest_test]
fn smp_x2apic_ipi_by_shorthand() {
    ready_x2apic();
    shorthands();
}

#[guest_test]
fn smp_x2apic_ipi_broadcast() {
    ready_x2apic();
    broadcast(u32::MAX);
}

#[guest_test]
fn smp_x2apic_nmi() {
    ready_x2apic();
    nmis();
}

#[guest_test]
fn smp_x2apic_id_ff_is_no_broadcast() {
    let count = ready_x2apic();
    if (0..count).all(|cpu| apic_id(cpu) != 0xff) {
        brings(VECTOR, |_| false, || send(0xff, VECTOR.into()));
    }
}

#[guest_test]
fn smp_x2apic_logical_ids_come_from_the_id() {
    for cpu in 0..ready_x2apic() {
        let (id, logical) = smp::on(cpu, || (lapic(reg::ID), lapic(reg::LDR)));
        assert_eq!(id, apic_id(cpu));
        assert_eq!(logical, (id >> 4) << 16 | 1 << (id & 15));
    }
}

#[guest_test]
fn smp_x2apic_logical_cluster() {
    let count = ready_x2apic();
    let logical = |cpu: usize| (apic_id(cpu) >> 4, 1u32 << (apic_id(cpu) & 15));
    for to in 0..count {
        let (cluster, bit) = logical(to);
        brings(
            VECTOR,
            |cpu| cpu == to,
            || {
                send(cluster << 16 | bit, LOGICAL | u32::from(VECTOR));
            },
        );
    }
    for set in SETS {
        let set = set | set << 8;
        let inside = |cpu: usize| {
            let (cluster, bit) = logical(cpu);
            cluster == 0 && bit & set != 0
        };
        brings(VECTOR, inside, || send(set, LOGICAL | u32::from(VECTOR)));
    }
    brings(
        VECTOR,
        |_| true,
        || send(u32::MAX, LOGICAL | u32::from(VECTOR)),
    );
    brings_one(
        |cpu| logical(cpu).0 == 0,
        || {
            send(0xffff, LOGICAL | LOWEST | u32::from(VECTOR));
        },
    );
}

#[guest_test]
fn smp_x2apic_is_entered_one_by_one() {
    need_two();
    need(has_x2apic(), "x2APIC");
    let count = ready();
    for next in (1..count).chain([0]) {
        smp::on(next, || {
            set_x2apic(true);
            set_lapic(reg::SVR, 0x1ff);
        });
        // Ids below 255 are the same in both modes.
        physical();
    }
    // And back by INIT, which leaves the mode, and by way of "disabled".
    smp::park_others();
    smp::start_all();
    physical();
}

#[guest_test]
fn smp_ioapic_physical_to_each() {
    for to in 0..ready() {
        set_redirection(PIN, VECTOR.into(), apic_id(to) << 24);
        brings(VECTOR, |cpu| cpu == to, edge);
    }
    set_redirection(PIN, MASKED, 0);
}

#[guest_test]
fn smp_ioapic_broadcast() {
    ready();
    set_redirection(PIN, VECTOR.into(), 0xff << 24);
    brings(VECTOR, |_| true, edge);
    set_redirection(PIN, MASKED, 0);
}

#[guest_test]
fn smp_ioapic_logical_and_lowest_priority() {
    ready();
    smp::everywhere(&|| {
        let cpu = smp::current();
        set_lapic(reg::DFR, u32::MAX);
        set_lapic(reg::LDR, if cpu < 8 { 1 << (24 + cpu) } else { 0 });
    });
    for set in SETS {
        let inside = |cpu: usize| set >> cpu & 1 != 0;
        set_redirection(PIN, LOGICAL | u32::from(VECTOR), set << 24);
        brings(VECTOR, inside, edge);
        if (0..smp::count()).any(inside) {
            set_redirection(PIN, LOGICAL | LOWEST | u32::from(VECTOR), set << 24);
            brings_one(inside, edge);
        }
    }
    set_redirection(PIN, MASKED, 0);
}

#[guest_test]
fn smp_ioapic_nmi_to_another() {
    fn nothing(_: &mut Frame) {}
    ready();
    on_interrupt(2, nothing);
    set_redirection(PIN, 0x400, apic_id(1) << 24);
    brings(2, |cpu| cpu == 1, edge);
    set_redirection(PIN, MASKED, 0);
}

#[guest_test]
fn smp_ioapic_level_ends_with_the_other_cpus_eoi() {
    fn keep(_: &mut Frame) {}
    const LEVEL_VECTOR: u8 = 0x62;
    ready();
    uart_line(false);
    on_interrupt(LEVEL_VECTOR, keep);
    let remote = || ioapic(0x10 + 2 * UART_PIN) & REMOTE_IRR;
    set_redirection(UART_PIN, LEVEL | u32::from(LEVEL_VECTOR), apic_id(1) << 24);
    brings(LEVEL_VECTOR, |cpu| cpu == 1, || uart_line(true));
    let first = remote();
    // An EOI of another CPU is none for this interrupt.
    eoi();
    let second = remote();
    // It came with interrupts off in its handler's wake, so the idle loop takes the next one. The
    // line is still high. Idle CPUs are woken above the priority that is in service.
    brings(LEVEL_VECTOR, |cpu| cpu == 1, || smp::on(1, eoi));
    uart_line(false);
    smp::on(1, eoi);
    let third = remote();
    brings(LEVEL_VECTOR, |_| false, || ());
    set_redirection(UART_PIN, MASKED, 0);
    // SAFETY: the UART is the guest's own: as the console needs it.
    unsafe { outb(0x3fc, 3) };
    assert_eq!([first, second, third], [REMOTE_IRR, REMOTE_IRR, 0]);
}

/// An IPI wakes a halted CPU, which wakes the first one back: many rounds.
#[guest_test]
fn smp_ipi_wakes_halted_cpus_each_time() {
    const ROUNDS: u64 = 200;
    const THERE: u8 = 0x73;
    const BACK: u8 = 0x74;
    ready();
    on_interrupt(THERE, handle_eoi);
    on_interrupt(BACK, handle_eoi);
    for to in 1..smp::count() {
        let (there, back) = (count_on(to, THERE), count_on(0, BACK));
        smp::beside(
            [to],
            &|| {
                for round in 1..=ROUNDS {
                    while count_on(to, THERE) < there + round {
                        guest_runtime::cpu::wait_for_interrupt();
                    }
                    send(apic_id(0), BACK.into());
                }
            },
            || {
                for round in 1..=ROUNDS {
                    send(apic_id(to), THERE.into());
                    while count_on(0, BACK) < back + round {
                        guest_runtime::cpu::wait_for_interrupt();
                    }
                }
            },
        );
        assert_eq!(count_on(to, THERE), there + ROUNDS);
        assert_eq!(count_on(0, BACK), back + ROUNDS);
    }
}

/// All send to all at once; the same vector may merge with itself, so each CPU waits for its own
/// vector to have come before it sends the next.
#[guest_test]
fn smp_ipis_cross_without_loss() {
    const ROUNDS: u64 = 100;
    const FIRST: usize = 0x90;
    let count = ready().min(8);
    for cpu in 0..count {
        on_interrupt((FIRST + cpu) as u8, handle_eoi);
    }
    let before: [u64; 8] =
        core::array::from_fn(|cpu| count_on((cpu + 1) % count, (FIRST + cpu) as u8));
    let work = || {
        let own = smp::current();
        let (to, vector) = ((own + 1) % count, (FIRST + own) as u8);
        guest_runtime::with_interrupts(|| {
            for round in 1..=ROUNDS {
                send(apic_id(to), vector.into());
                while count_on(to, vector) < before[own] + round {
                    core::hint::spin_loop();
                }
            }
        });
        // The others may still send here; an idle CPU takes that too.
    };
    smp::beside(1..count, &work, || {
        work();
        guest_runtime::with_interrupts(|| {
            let (from, vector) = (count - 1, (FIRST + count - 1) as u8);
            while count_on(0, vector) < before[from] + ROUNDS {
                core::hint::spin_loop();
            }
        });
    });
    wait(10);
}
