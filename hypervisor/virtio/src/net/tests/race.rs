//! The race around notifications, in all interleavings: a driver makes frames available and looks
//! whether it is to notify, while the device finds the queue empty, asks to be notified, and looks
//! again. No frame may stay in a queue that nobody will look at.

use super::*;
use arch::{GuestPhysAddr, MemoryFault};

const RING_AT: u64 = 0;
const FRAME_AT: u64 = 0xf000;
const MEMORY_SIZE: usize = 0x1_0000;
/// Frames that the driver sends; each takes two steps.
const FRAMES_SENT: usize = 2;
const STEPS: usize = 2 * FRAMES_SENT;
/// Accesses of the device to memory before which a step may come.
const ACCESSES: usize = 26;

/// A guest's memory in which the driver takes its steps before certain accesses of the device.
struct Memory {
    ram: Ram,
    driver: testing::Driver,
    net: SharedNet,
    /// Before which access each step comes.
    schedule: [usize; STEPS],
    next: usize,
    accesses: usize,
    before: (u16, bool),
    doorbells: usize,
}

impl Memory {
    fn step(&mut self) {
        if self.next.is_multiple_of(2) {
            self.before = self.driver.mark();
            let frame = [(FRAME_AT, 72, false)];
            self.driver.offer(&mut self.ram, &frame, false).unwrap();
        } else if self.driver.must_notify(&self.ram, self.before) {
            self.doorbells += 1;
            self.net.notify(tx(0));
        }
        self.next += 1;
    }
    fn access(&mut self) {
        while self.next < STEPS && self.schedule[self.next] <= self.accesses {
            self.step();
        }
        self.accesses += 1;
    }
}

impl GuestMemory for Memory {
    fn read(&mut self, addr: GuestPhysAddr, buf: &mut [u8]) -> Result<(), MemoryFault> {
        self.access();
        self.ram.read(addr, buf)
    }
    fn write(&mut self, addr: GuestPhysAddr, data: &[u8]) -> Result<(), MemoryFault> {
        self.access();
        self.ram.write(addr, data)
    }
    fn compare_exchange(
        &mut self,
        addr: GuestPhysAddr,
        _: u8,
        _: u64,
        _: u64,
    ) -> Result<u64, MemoryFault> {
        Err(MemoryFault::NotRam(addr))
    }
}

/// One look of the device at the queue: how many frames it took.
type Look<'a> = &'a mut dyn FnMut(&mut Memory, Ask) -> Transmitted;

/// Runs a schedule to its end; how many frames were taken, and the doorbells.
fn run(kind: u64, asks: &[Ask], schedule: [usize; STEPS], look: Look<'_>) -> (u32, usize) {
    let mut net = SharedNet::new(NetDevice::new(NetConfig::new(MAC)).unwrap());
    let driver = testing::Driver::new(RING_AT, 4, kind);
    net.start(kind);
    net.attach(tx(0), driver.queue());
    let mut memory = Memory {
        ram: Ram::new(MEMORY_SIZE),
        driver,
        net: net.clone(),
        schedule,
        next: 0,
        accesses: 0,
        before: (0, true),
        doorbells: 0,
    };
    let mut asks = asks.iter().copied();
    let mut taken = 0;
    loop {
        if net.take_notified() != 0 {
            let done = look(&mut memory, asks.next().unwrap_or(Ask::Idle));
            taken += done.chains;
            if done.more {
                net.notify_again(0);
            } else if done.silent {
                net.leave_silent(0);
            }
        } else if memory.next < STEPS {
            // Nobody looks until the driver says something.
            memory.step();
        } else {
            return (taken, memory.doorbells);
        }
    }
}

/// All schedules: steps in their order, each before any access.
fn schedules() -> impl Iterator<Item = [usize; STEPS]> {
    let mut next = Some([0; STEPS]);
    std::iter::from_fn(move || {
        let now = next?;
        let grows = (0..STEPS).rev().find(|&at| now[at] < ACCESSES);
        next = grows.map(|at| {
            let mut then = now;
            then[at..].fill(now[at] + 1);
            then
        });
        Some(now)
    })
}

fn kinds() -> [u64; 4] {
    [0, 1, 2, 3].map(|mix| {
        let bit = |at: u64, feature| if mix & at != 0 { feature } else { 0 };
        features::VERSION_1 | bit(1, features::RING_PACKED) | bit(2, features::RING_EVENT_IDX)
    })
}

#[test]
fn no_frame_is_left_behind_whatever_comes_between() {
    let mut buffer = vec![0; 4 * FRAME_ROOM];
    for kind in kinds() {
        for asks in [
            &[Ask::Now, Ask::Now][..],
            &[Ask::Now],
            &[Ask::Idle],
            &[Ask::Never, Ask::Now],
        ] {
            let mut rung = 0;
            for schedule in schedules() {
                let (taken, doorbells) = run(kind, asks, schedule, &mut |memory, ask| {
                    let net = memory.net.clone();
                    let mut net = net.lock();
                    net.transmit(memory, 0, 4, ask, &mut buffer, |_, _| ())
                });
                assert_eq!(
                    taken as usize, FRAMES_SENT,
                    "{kind:#x} {asks:?} {schedule:?}"
                );
                rung += doorbells;
            }
            assert!(
                rung != 0,
                "some schedules need a doorbell: {kind:#x} {asks:?}"
            );
        }
    }
}

/// The model finds what it is for.
#[test]
fn a_device_that_does_not_look_again_is_found_out() {
    for kind in kinds() {
        let lost = schedules().any(|schedule| {
            let mut queue = testing::Driver::new(RING_AT, 4, kind).queue();
            let mut chain = Chain::new();
            let (taken, _) = run(kind, &[], schedule, &mut |memory, _| {
                let mut done = Transmitted::default();
                queue.ask_for_notification(memory, false).unwrap();
                while queue.pop(memory, &mut chain).unwrap() {
                    done.chains += 1;
                }
                queue.ask_for_notification(memory, true).unwrap();
                done
            });
            (taken as usize) < FRAMES_SENT
        });
        assert!(lost, "{kind:#x}");
    }
}
