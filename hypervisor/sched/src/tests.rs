//! What a person sees of the scheduler, one property a test.

use crate::simulate::{Load, World};
use crate::*;

const MS: u64 = 1_000_000;
const SECOND: u64 = 1_000 * MS;

fn weight(weight: u32) -> Policy {
    Policy {
        weight,
        ..Policy::default()
    }
}

fn on(cores: &[u16]) -> Policy {
    Policy {
        affinity: set(cores),
        ..Policy::default()
    }
}

fn set(cores: &[u16]) -> CoreSet {
    cores.iter().copied().map(CoreId).collect()
}

fn class(class: Class) -> Policy {
    Policy {
        class,
        ..Policy::default()
    }
}

fn vcpu(vm: u16, index: u16) -> VcpuId {
    VcpuId {
        vm: VmId(vm),
        index,
    }
}

/// What each VM used in the time.
fn usage(world: &mut World, vms: u16, nanos: u64) -> Vec<u64> {
    let before: Vec<u64> = (0..vms).map(|vm| world.used(vm)).collect();
    world.run(nanos);
    (0..vms)
        .zip(before)
        .map(|(vm, before)| world.used(vm) - before)
        .collect()
}

/// The greatest difference from what is due, in parts of a hundred thousand of that.
fn error(got: &[u64], due: &[u64]) -> u64 {
    let errors = got
        .iter()
        .zip(due)
        .map(|(got, due)| got.abs_diff(*due) * 100_000 / due);
    errors.max().unwrap_or(0)
}

/// One per cent.
const PERCENT: u64 = 1000;

#[test]
fn a_vcpu_alone_is_not_disturbed() {
    let mut world = Scheduler::new();
    world.add_core(CoreId(0), Nanos(0));
    world.add_vm(VmId(3), 1, Policy::default()).unwrap();
    assert_eq!(
        world.next(CoreId(0), Nanos(0)),
        Decision::Idle {
            until: Nanos::NEVER
        }
    );
    world.wake(vcpu(3, 0), Nanos(5));
    assert!(world.kicks().iter().eq([CoreId(0)]));
    let run = |until| Decision::Run {
        vcpu: vcpu(3, 0),
        until,
    };
    assert_eq!(world.next(CoreId(0), Nanos(6)), run(Nanos::NEVER));
    assert_eq!(world.stolen(vcpu(3, 0), Nanos(9)), 1);
    assert_eq!(world.used(vcpu(3, 0), Nanos(9)), 3);
    world.sleep(vcpu(3, 0), Nanos(50), Nanos(10));
    assert_eq!(
        world.next(CoreId(0), Nanos(10)),
        Decision::Idle { until: Nanos(50) }
    );
    assert_eq!(world.next(CoreId(0), Nanos(50)), run(Nanos::NEVER));
    assert!(world.kicks().is_empty());
    assert_eq!(world.busy(CoreId(0), Nanos(60)), 14);
}

#[test]
fn shares_follow_weights_across_cores() {
    // Eight VMs, 32 vCPUs, four cores.
    let mut world = World::new(4);
    let weights = [100, 100, 200, 200, 300, 300, 400, 400];
    for (vm, w) in (0..).zip(weights) {
        world.add(vm, &weight(w), &[Load::Busy; 4]);
    }
    for _ in 0..5 {
        let got = usage(&mut world, 8, SECOND);
        let due = weights.map(|w| 4 * SECOND * u64::from(w) / 2000);
        assert!(error(&got, &due) < PERCENT, "{got:?}");
    }
}

#[test]
fn vcpus_that_do_not_divide_by_the_cores_share_them_all() {
    for (cores, vms) in [(2, 3), (3, 10), (4, 5), (16, 23), (7, 50)] {
        let mut world = World::new(cores);
        for vm in 0..vms {
            world.add(vm, &Policy::default(), &[Load::Busy]);
        }
        world.run(100 * MS);
        let got = usage(&mut world, vms, SECOND);
        let due = vec![SECOND * u64::from(cores) / u64::from(vms); usize::from(vms)];
        let error = error(&got, &due);
        println!("{vms} on {cores}: {error} {}", world.migrations());
        assert!(error < PERCENT, "{vms} on {cores}: {got:?}");
    }
}

#[test]
fn a_weight_that_one_core_cannot_serve_takes_one_core() {
    let mut world = World::new(2);
    for (vm, w) in [(0, 10_000), (1, 100), (2, 100), (3, 200)] {
        world.add(vm, &weight(w), &[Load::Busy]);
    }
    let due = [SECOND, SECOND / 4, SECOND / 4, SECOND / 2];
    let got = usage(&mut world, 4, SECOND);
    assert!(error(&got, &due) < PERCENT, "{got:?}");
    // Another core comes; it saved nothing up.
    world.add(4, &weight(10_000), &[Load::Busy]);
    let got = usage(&mut world, 5, SECOND);
    assert!(error(&got[..1], &due[..1]) < 5 * PERCENT, "{got:?}");
}

#[test]
fn who_cheats_gets_a_share_and_no_more() {
    let cheats = [
        Load::Dodges,
        Load::Yields(5_000),
        Load::Sleeps(5_000, 1),
        Load::Sleeps(20_000, 20_000),
        Load::Woken(1_000, 1_000),
        Load::Woken(SLICE, 1_000),
    ];
    for cheat in cheats {
        for cores in [1, 2] {
            let mut world = World::new(cores);
            let honest = usize::from(2 * cores);
            world.add(0, &Policy::default(), &vec![Load::Busy; honest]);
            world.add(1, &Policy::default(), &vec![cheat; honest]);
            world.run(100 * MS);
            let got = usage(&mut world, 2, SECOND);
            let half = SECOND * u64::from(cores) / 2;
            println!("{cheat:?} {cores}: {got:?} latency {}", world.latency(990));
            assert!(got[0] * 100 >= half * 98, "{cheat:?}: {got:?}");
        }
    }
}

#[test]
fn a_long_sleep_saves_up_little() {
    let mut world = World::new(1);
    world.add(0, &Policy::default(), &[Load::Busy]);
    world.add(1, &Policy::default(), &[Load::Still]);
    world.run(10 * SECOND);
    world.change(1, Load::Busy);
    world.wake(1, 0);
    let got = usage(&mut world, 2, 100 * MS);
    assert!(got[1] <= 50 * MS + CREDIT && got[1] >= 40 * MS, "{got:?}");
}

#[test]
fn a_cap_is_never_exceeded_by_more_than_a_slice() {
    for (cap, vcpus, cores) in [
        (1, 1, 1),
        (30, 1, 1),
        (50, 4, 4),
        (130, 3, 4),
        (250, 8, 8),
        (100, 2, 1),
    ] {
        for load in [
            Load::Busy,
            Load::Dodges,
            Load::Sleeps(300_000, 100_000),
            Load::Woken(SLICE, 1000),
        ] {
            let mut world = World::new(cores);
            let policy = Policy {
                cap: Some(cap),
                ..Policy::default()
            };
            world.add(0, &policy, &vec![load; vcpus]);
            world.add(1, &Policy::default(), &[Load::Sleeps(MS, MS)]);
            let mut samples = vec![0];
            for _ in 0..4_000 {
                world.run(250_000);
                samples.push(world.used(0));
            }
            // Over every window of 1, 10, 100 and 1000 ms.
            for width in [4, 40, 400, 4_000] {
                let most = samples
                    .windows(width + 1)
                    .map(|w| w[width] - w[0])
                    .max()
                    .unwrap();
                let due = width as u64 * 250_000 * u64::from(cap) / 100;
                let slices = u64::from(cap).div_ceil(100) * SLICE;
                assert!(most <= due + slices, "{cap} {load:?} {width}: {most} {due}");
            }
            let whole = u64::from(cap) * 10 * MS;
            let able = whole.min(u64::from(cores) * SECOND * 9 / 10);
            let got = samples[4_000];
            if load == Load::Busy && cap != 100 {
                assert!(
                    got + SLICE >= able * 97 / 100,
                    "{cap} {vcpus}: {got} of {whole}"
                );
            }
        }
    }
}

#[test]
fn real_time_has_its_budget_in_every_period_and_no_more() {
    let mut world = World::new(2);
    let period = 10 * MS;
    for vm in 0..4 {
        let budget = 4 * MS;
        world.add(
            vm,
            &class(Class::RealTime { budget, period }),
            &[Load::Busy],
        );
    }
    for vm in 4..8 {
        world.add(
            vm,
            &weight(10_000),
            &[Load::Busy, Load::Sleeps(50_000, 200_000)],
        );
    }
    let asked = class(Class::RealTime { budget: MS, period });
    assert_eq!(
        world.scheduler.add_vm(VmId(9), 1, asked),
        Err(PolicyError::NoBudget { index: 0 })
    );
    world.run(100 * MS);
    for _ in 0..100 {
        let got = usage(&mut world, 8, period);
        for vm in 0..4 {
            assert!(got[vm].abs_diff(4 * MS) < MS / 2, "{got:?}");
        }
        assert!(got[4..].iter().sum::<u64>() > 3 * MS, "{got:?}");
    }
    let got = usage(&mut world, 8, SECOND);
    assert!(error(&got[..4], &[400 * MS; 4]) < PERCENT, "{got:?}");
}

#[test]
fn real_time_that_sleeps_runs_before_its_deadline() {
    let mut world = World::new(1);
    let real_time = |budget, period| class(Class::RealTime { budget, period });
    world.add(0, &real_time(MS, 5 * MS), &[Load::Woken(MS / 2, 12 * MS)]);
    world.add(1, &Policy::default(), &[Load::Busy; 100]);
    world.run(SECOND);
    world.latencies.clear();
    world.run(20 * SECOND);
    assert!(world.latencies.len() > 1_000);
    assert!(world.latency(1000) <= MIN_TURN, "{}", world.latency(1000));
}

#[test]
fn a_reservation_is_served_before_weights() {
    for (cores, percent, vcpus) in [(1, 50, 1), (2, 150, 2), (4, 300, 8)] {
        let mut world = World::new(cores);
        let policy = Policy {
            reservation: percent,
            ..weight(1)
        };
        world.add(0, &policy, &vec![Load::Busy; vcpus]);
        for vm in 1..9 {
            world.add(vm, &weight(10_000), &[Load::Busy; 4]);
        }
        world.run(100 * MS);
        let got = usage(&mut world, 9, SECOND);
        let due = u64::from(percent) * 10 * MS;
        assert!(
            got[0] > due * 98 / 100 && got[0] < due * 110 / 100,
            "{percent}: {got:?}"
        );
        let got = usage(&mut world, 9, 4 * SECOND);
        let rest = vec![(4 * u64::from(cores) * SECOND - got[0]) / 8; 8];
        assert!(error(&got[1..], &rest) < 2 * PERCENT, "{got:?}");
    }
}

#[test]
fn a_dedicated_vcpu_owns_its_core() {
    let mut world = World::new(4);
    for vm in 0..4 {
        world.add(
            vm,
            &Policy::default(),
            &[Load::Busy, Load::Sleeps(MS, MS), Load::Woken(MS, MS)],
        );
    }
    world.run(50 * MS);
    world.add(9, &class(Class::Dedicated), &[Load::Busy, Load::Busy]);
    world.run(50 * MS);
    let got = usage(&mut world, 10, SECOND);
    assert_eq!(got[9], 2 * SECOND);
    for index in 0..2 {
        let view = world
            .scheduler
            .view(vcpu(9, index), Nanos(world.now))
            .unwrap();
        assert_eq!(view.migrations, 0);
        let State::Running(core) = view.state else {
            panic!("{view:?}")
        };
        let decision = world.scheduler.next(core, Nanos(world.now));
        assert_eq!(
            decision,
            Decision::Run {
                vcpu: vcpu(9, index),
                until: Nanos::NEVER
            }
        );
    }
    assert!(world.set_policy(9, &Policy::default()));
    let got = usage(&mut world, 10, SECOND);
    assert!(
        got[9] < SECOND * 13 / 10 && got[..4].iter().all(|got| *got > SECOND * 6 / 10),
        "{got:?}"
    );
}

#[test]
fn pins_and_masks_hold_and_cores_share_what_they_may() {
    let mut world = World::new(4);
    // One core has four pinned to it, the others one each and two that may be on either.
    world.add(0, &on(&[0]), &[Load::Busy; 4]);
    world.add(1, &on(&[1, 2, 3]), &[Load::Busy; 3]);
    let pins = Policy {
        pins: vec![set(&[1]), set(&[]), set(&[3])],
        ..on(&[2, 3])
    };
    world.add(2, &pins, &[Load::Busy; 3]);
    world.run(100 * MS);
    let got = usage(&mut world, 3, SECOND);
    assert_eq!(got[0], SECOND);
    assert!(error(&got[1..], &[3 * SECOND / 2; 2]) < PERCENT, "{got:?}");
    // Two VMs of two vCPUs, a pinned one of each on the same core: no starving by the sibling.
    let mut world = World::new(2);
    let pins = Policy {
        pins: vec![set(&[0]), set(&[1])],
        ..Policy::default()
    };
    world.add(0, &pins, &[Load::Busy; 2]);
    world.add(1, &on(&[0]), &[Load::Busy]);
    let got = usage(&mut world, 2, SECOND);
    assert!(
        error(&got, &[4 * SECOND / 3, 2 * SECOND / 3]) < PERCENT,
        "{got:?}"
    );
}

#[test]
fn cores_share_again_after_one_was_far_ahead() {
    let mut world = World::new(2);
    world.add(
        0,
        &Policy {
            weight: 10_000,
            ..on(&[0])
        },
        &[Load::Busy; 100],
    );
    world.add(
        1,
        &Policy {
            weight: 100,
            ..on(&[1])
        },
        &[Load::Busy],
    );
    world.add(2, &weight(100), &[Load::Busy]);
    // It runs on core 1 beside one, for core 0 is crowded.
    world.run(10 * SECOND);
    let got = usage(&mut world, 3, SECOND);
    assert!(error(&got[1..], &[SECOND / 2; 2]) < PERCENT, "{got:?}");
    // It must leave, and is not made to wait for what it had there.
    assert!(world.set_policy(
        2,
        &Policy {
            weight: 100,
            ..on(&[0])
        }
    ));
    world.run(4 * SECOND);
    let got = usage(&mut world, 3, 5 * SECOND);
    assert!(got[2] > SECOND / 25, "{got:?}");
}

#[test]
fn a_core_with_something_else_to_do_gives_its_vcpu_away_and_charges_nothing_for_the_time() {
    let mut world = Scheduler::new();
    world.add_core(CoreId(0), Nanos(0));
    world.add_vm(VmId(0), 1, Policy::default()).unwrap();
    world.wake(vcpu(0, 0), Nanos(0));
    let runs = |decision| matches!(decision, Decision::Run { vcpu: who, .. } if who == vcpu(0, 0));
    assert!(runs(world.next(CoreId(0), Nanos(0))));
    // Nothing ran: nothing happens.
    world.put_off(CoreId(1), Nanos(MS));
    world.put_off(CoreId(0), Nanos(MS));
    world.put_off(CoreId(0), Nanos(2 * MS));
    assert!(world.kicks().is_empty());
    let view = world.view(vcpu(0, 0), Nanos(2 * MS)).unwrap();
    assert_eq!((view.state, view.used), (State::Waiting, MS));
    assert!(runs(world.next(CoreId(0), Nanos(3 * MS))));
    let view = world.view(vcpu(0, 0), Nanos(4 * MS)).unwrap();
    assert_eq!((view.used, view.stolen), (2 * MS, 2 * MS));
    // Another core that idles takes it.
    world.add_core(CoreId(1), Nanos(4 * MS));
    assert!(!runs(world.next(CoreId(1), Nanos(4 * MS))));
    world.put_off(CoreId(0), Nanos(5 * MS));
    assert!(world.kicks().contains(CoreId(1)));
    assert!(runs(world.next(CoreId(1), Nanos(5 * MS))));
    let here = world.next(CoreId(0), Nanos(5 * MS));
    assert!(!runs(here), "{here:?}");
}

/// Loads as on a machine with many guests.
fn mixed(vcpus: usize) -> Vec<Load> {
    let loads = [
        Load::Busy,
        Load::Sleeps(200_000, 20 * MS),
        Load::Woken(50_000, 5 * MS),
        Load::Woken(MS, 50 * MS),
    ];
    loads.into_iter().cycle().take(vcpus).collect()
}

#[test]
fn thousands_of_vcpus_over_a_million_decisions() {
    let mut world = World::new(64);
    world.check_every = 4096;
    for vm in 0..256 {
        world.add(vm, &Policy::default(), &mixed(16));
    }
    world.decide(1_000_000);
    let end = world.now;
    world.check();
    println!("{} ms, {} migrations", end / MS, world.migrations());
    for vcpu in world.vcpus() {
        assert!(
            world.scheduler.used(vcpu, Nanos(end)) > 0,
            "{vcpu:?} starved"
        );
    }
    let (p50, p99) = (world.latency(500), world.latency(990));
    println!(
        "wake-up latency p50 {p50} ns, p99 {p99} ns, max {} ns",
        world.latency(1000)
    );
    assert!(p99 <= 2 * SLICE, "{p99}");
}

#[test]
fn the_shares_of_thousands_over_a_million_decisions() {
    // 2048 vCPUs of 32 VMs on 64 cores: each has two cores' worth, whatever it is made of.
    let mut world = World::new(64);
    world.check_every = 4096;
    for vm in 0..32 {
        world.add(
            vm,
            &weight(100 * (1 + u32::from(vm) % 2)),
            &[Load::Busy; 64],
        );
    }
    world.run(SECOND / 2);
    let mut before: Vec<u64> = world
        .vcpus()
        .map(|v| world.scheduler.used(v, Nanos(world.now)))
        .collect();
    while world.decisions < 1_000_000 {
        let got = usage(&mut world, 32, SECOND);
        let due: Vec<u64> = (0..32).map(|vm| 64 * SECOND * (1 + vm % 2) / 48).collect();
        let error = error(&got, &due);
        println!(
            "share error {error} of 100000 after {} decisions",
            world.decisions
        );
        assert!(error < PERCENT, "{got:?}");
        let used: Vec<u64> = world
            .vcpus()
            .map(|v| world.scheduler.used(v, Nanos(world.now)))
            .collect();
        assert!(
            before.iter().zip(&used).all(|(before, now)| now > before),
            "one starved"
        );
        before = used;
    }
    assert_eq!(world.busy(), 64 * world.now);
}

#[test]
fn a_decision_takes_few_steps_however_many_wait() {
    for vcpus in [10, 100, 1_000, 10_000] {
        let mut world = World::new(4);
        world.check_every = u64::MAX;
        for vm in 0..vcpus / 10 {
            world.add(vm, &weight(100 + u32::from(vm) % 300), &[Load::Busy; 10]);
        }
        world.run(10 * MS);
        let (steps, decisions) = (world.scheduler.steps(), world.decisions);
        world.decide(20_000);
        let each = (world.scheduler.steps() - steps) / (world.decisions - decisions);
        println!("{vcpus}: {each} steps a decision");
        assert!(each <= 8 * u64::from(vcpus.ilog2() + 1), "{each}");
    }
}

#[test]
fn it_holds_after_a_century_and_with_clocks_that_differ() {
    let start = 100 * 365 * 24 * 3600 * SECOND;
    let mut world = World::new(2);
    world.add(0, &weight(1), &[Load::Busy; 2]);
    world.add(1, &weight(10_000), &[Load::Still]);
    world.run(MS);
    world.now = start;
    world.run(SECOND);
    world.change(1, Load::Busy);
    world.wake(1, 0);
    world.run(SECOND);
    let got = usage(&mut world, 2, SECOND);
    assert!(error(&got, &[SECOND; 2]) < 2 * PERCENT, "{got:?}");
}

#[test]
fn any_change_of_vms_and_policies_keeps_what_must_hold() {
    for seed in 0..4 {
        changes(seed);
    }
}

fn changes(mut seed: u64) {
    let mut random = move |below: u64| {
        seed = seed
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) % below
    };
    let mut world = World::new(6);
    world.check_every = 4;
    let load = |random: &mut dyn FnMut(u64) -> u64| match random(6) {
        0 => Load::Busy,
        1 => Load::Dodges,
        2 => Load::Yields(9_000),
        3 => Load::Sleeps(100_000, MS),
        4 => Load::Sleeps(3 * MS, 2 * MS),
        _ => Load::Woken(70_000, MS),
    };
    let mut vms: Vec<u16> = Vec::new();
    let mut accepted = 0;
    for round in 0..1_000 {
        world.lateness = random(2) * 700;
        world.run(random(3 * MS));
        if vms.len() < 12 {
            let loads: Vec<Load> = (0..=random(2)).map(|_| load(&mut random)).collect();
            world.add(round, &Policy::default(), &loads);
            vms.push(round);
        }
        let chosen = random(vms.len() as u64) as usize;
        if random(20) == 0 {
            world.remove(vms.swap_remove(chosen));
            continue;
        }
        let mask = |bits: u64| {
            let cores = (0..6).filter(|core| bits >> core & 1 != 0);
            cores.map(CoreId).collect()
        };
        let affinity = match random(3) {
            0 => CoreSet::ALL,
            _ => mask(random(63) + 1),
        };
        let pins = (0..random(3)).map(|_| mask(random(64))).collect();
        let mut policy = Policy {
            affinity,
            pins,
            ..weight(1 + random(10_000) as u32)
        };
        match random(6) {
            0 => policy.class = Class::Dedicated,
            1 => {
                let budget = MIN_BUDGET * (1 + random(9));
                policy.class = Class::RealTime {
                    budget,
                    period: 2 * MS,
                };
            }
            2 => policy.cap = Some(1 + random(200) as u32),
            3 => policy.reservation = random(60) as u32,
            _ => {}
        }
        accepted += u32::from(world.set_policy(vms[chosen], &policy));
    }
    assert!(accepted > 300, "{accepted}");
    for &vm in vms.iter().chain(&vms) {
        // Twice, since one may stand in another's way.
        world.set_policy(vm, &Policy::default());
    }
    world.run(SECOND);
    let before: Vec<u64> = vms.iter().map(|vm| world.used(*vm)).collect();
    world.run(SECOND);
    for (vm, before) in vms.into_iter().zip(before) {
        assert!(world.used(vm) - before > 10 * MS, "VM {vm} starved");
    }
}

#[test]
fn a_policy_that_cannot_be_kept_changes_nothing() {
    let mut world = Scheduler::new();
    for core in 0..2 {
        world.add_core(CoreId(core), Nanos(0));
    }
    world.add_vm(VmId(0), 1, on(&[0])).unwrap();
    world
        .add_vm(
            VmId(1),
            1,
            Policy {
                reservation: 60,
                ..Policy::default()
            },
        )
        .unwrap();
    let plain = Policy::default;
    let dedicated = |cores: &[u16]| Policy {
        class: Class::Dedicated,
        ..on(cores)
    };
    let cases = [
        (0, plain(), PolicyError::Vcpus(0)),
        (1, weight(0), PolicyError::Weight(0)),
        (1, weight(10_001), PolicyError::Weight(10_001)),
        (1, on(&[1, 7]), PolicyError::NoSuchCore(CoreId(7))),
        (
            1,
            Policy {
                pins: vec![set(&[9])],
                ..plain()
            },
            PolicyError::NoSuchCore(CoreId(9)),
        ),
        (1, on(&[]), PolicyError::NoCore { index: 0 }),
        (
            2,
            Policy {
                cap: Some(201),
                ..plain()
            },
            PolicyError::Cap {
                asked: 201,
                most: 200,
            },
        ),
        (
            2,
            Policy {
                cap: Some(0),
                ..plain()
            },
            PolicyError::Cap {
                asked: 0,
                most: 200,
            },
        ),
        (
            1,
            Policy {
                reservation: 101,
                ..plain()
            },
            PolicyError::Reservation {
                asked: 101,
                most: 100,
            },
        ),
        (
            1,
            Policy {
                reservation: 40,
                cap: Some(30),
                ..plain()
            },
            PolicyError::Reservation {
                asked: 40,
                most: 30,
            },
        ),
        (
            2,
            Policy {
                reservation: 121,
                ..plain()
            },
            PolicyError::Guarantees {
                asked: 181,
                most: 180,
            },
        ),
        (
            1,
            Policy {
                reservation: 91,
                ..on(&[1])
            },
            PolicyError::Guarantees {
                asked: 91,
                most: 90,
            },
        ),
        (
            1,
            Policy {
                cap: Some(5),
                ..dedicated(&[1])
            },
            PolicyError::NotFair,
        ),
        (1, dedicated(&[0]), PolicyError::Needed(CoreId(0))),
        (2, dedicated(&[0, 1]), PolicyError::Needed(CoreId(0))),
        (
            1,
            class(Class::RealTime {
                budget: 81,
                period: 100,
            }),
            PolicyError::Budget {
                budget: 81,
                period: 100,
            },
        ),
        (
            3,
            class(Class::RealTime {
                budget: 5 * MS,
                period: 10 * MS,
            }),
            PolicyError::NoBudget { index: 2 },
        ),
    ];
    for (vcpus, policy, error) in cases {
        assert_eq!(
            world.add_vm(VmId(5), vcpus, policy.clone()),
            Err(error),
            "{policy:?}"
        );
        assert_eq!(
            world.set_policy(VmId(5), plain(), Nanos(0)),
            Err(PolicyError::NoSuchVm(VmId(5)))
        );
    }
    assert_eq!(
        world.add_vm(VmId(0), 1, plain()),
        Err(PolicyError::Exists(VmId(0)))
    );
    // What is refused to a VM that is there leaves it as it was.
    let mut world = Scheduler::new();
    for core in 0..2 {
        world.add_core(CoreId(core), Nanos(0));
    }
    world.add_vm(VmId(0), 1, dedicated(&[1])).unwrap();
    world.add_vm(VmId(1), 1, plain()).unwrap();
    assert_eq!(
        world.add_vm(VmId(2), 1, on(&[1])),
        Err(PolicyError::NoCore { index: 0 })
    );
    assert_eq!(
        world.add_vm(VmId(2), 1, dedicated(&[1])),
        Err(PolicyError::NoCore { index: 0 })
    );
    assert_eq!(world.set_policy(VmId(0), dedicated(&[0]), Nanos(0)), Ok(()));
    assert_eq!(
        world.set_policy(VmId(1), on(&[0]), Nanos(0)),
        Err(PolicyError::NoCore { index: 0 })
    );
    world.wake(vcpu(1, 0), Nanos(0));
    assert!(matches!(
        world.next(CoreId(1), Nanos(0)),
        Decision::Run { .. }
    ));
    world.sleep(vcpu(1, 0), Nanos::NEVER, Nanos(1));
    world.remove_vm(VmId(0));
    world.remove_vm(VmId(1));
    world.add_vm(VmId(1), 2, dedicated(&[0, 1])).unwrap();
}
