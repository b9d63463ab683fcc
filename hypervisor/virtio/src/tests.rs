//! Both ring formats against the driver's side of the standard.

use std::collections::{HashMap, VecDeque};

use arch::GuestPhysAddr;

use crate::testing::{Driver, INDIRECT, NEXT, Part, Ram, Random, WRITE, kinds};
use crate::{Chain, Queue, QueueError, QueueLayout, features};

const BASE: u64 = 0x1_0000;
const DESC: u64 = BASE;
const AVAIL: u64 = BASE + 0x2000;
const USED: u64 = BASE + 0x3000;
const DATA: u64 = 0x4_0000;
const RAM: usize = 0x8_0000;

fn world(size: u16, negotiated: u64) -> (Ram, Driver, Queue, Chain) {
    let driver = Driver::new(BASE, size, negotiated);
    let queue = driver.queue();
    (Ram::new(RAM), driver, queue, Chain::new())
}

#[test]
fn a_request_goes_out_and_its_answer_comes_back() {
    for kind in kinds() {
        for indirect in [false, true] {
            let (mut ram, mut driver, mut queue, mut chain) = world(8, kind);
            assert!(!queue.pop(&mut ram, &mut chain).unwrap());
            assert!(!queue.has_next(&mut ram).unwrap());
            ram.put(DATA, b"request");
            let parts = [
                (DATA, 3, false),
                (DATA + 3, 4, false),
                (DATA + 0x100, 2, true),
                (DATA + 0x200, 100, true),
            ];
            let id = driver.offer(&mut ram, &parts, indirect).unwrap();
            assert!(queue.has_next(&mut ram).unwrap());
            assert!(queue.pop(&mut ram, &mut chain).unwrap());
            assert_eq!((chain.readable().len(), chain.writable().len()), (2, 2));
            assert_eq!((chain.readable_bytes(), chain.writable_bytes()), (7, 102));
            let mut bytes = [0; 16];
            assert_eq!(chain.read(&mut ram, 2, &mut bytes[..3]).unwrap(), 3);
            assert_eq!(&bytes[..3], b"que");
            assert_eq!(chain.read(&mut ram, 3, &mut bytes).unwrap(), 4);
            assert_eq!(chain.read(&mut ram, 7, &mut bytes).unwrap(), 0);
            assert_eq!(chain.write(&mut ram, 1, b"answer").unwrap(), 6);
            assert_eq!(chain.write(&mut ram, 100, b"answer").unwrap(), 2);
            assert_eq!(ram.get(DATA + 0x101), *b"a");
            assert_eq!(ram.get(DATA + 0x200), *b"nswer\0");
            assert_eq!(ram.get(DATA), *b"request", "the device reads that part");
            driver.want_interrupt(&mut ram, true);
            assert!(driver.take(&mut ram).is_none());
            queue.push(&mut ram, chain.token(), 7).unwrap();
            assert!(queue.wants_interrupt(&mut ram).unwrap());
            assert!(!queue.wants_interrupt(&mut ram).unwrap());
            assert_eq!(driver.take(&mut ram), Some((id, 7)));
            assert!(driver.take(&mut ram).is_none());
        }
    }
}

#[test]
fn what_is_staged_shows_at_once_and_what_is_rewound_comes_again() {
    for kind in kinds() {
        let (mut ram, mut driver, mut queue, mut chain) = world(4, kind);
        for round in 0..5 {
            driver.want_interrupt(&mut ram, true);
            let ids = [0, 1, 2].map(|n| {
                let part = [(DATA + 64 * n, 64, true)];
                driver.offer(&mut ram, &part, false).unwrap()
            });
            let start = queue.position();
            for _ in 0..3 {
                assert!(queue.pop(&mut ram, &mut chain).unwrap());
            }
            assert!(!queue.pop(&mut ram, &mut chain).unwrap());
            queue.rewind(start);
            for n in 0..3 {
                assert!(queue.pop(&mut ram, &mut chain).unwrap());
                queue.stage(&mut ram, chain.token(), 10 + n).unwrap();
                assert!(driver.take(&mut ram).is_none(), "round {round}");
            }
            queue.publish(&mut ram).unwrap();
            assert!(queue.wants_interrupt(&mut ram).unwrap());
            for (id, n) in ids.into_iter().zip(10..) {
                assert_eq!(driver.take(&mut ram), Some((id, n)));
            }
        }
    }
}

#[test]
fn each_field_of_a_descriptor_is_read_once() {
    for kind in kinds() {
        for indirect in [false, true] {
            let (mut ram, mut driver, mut queue, mut chain) = world(8, kind);
            let parts = [(DATA, 8, false), (DATA + 64, 8, true)];
            driver.offer(&mut ram, &parts, indirect).unwrap();
            ram.reads.clear();
            queue.pop(&mut ram, &mut chain).unwrap();
            let descriptors = DESC..DESC + 0x1000;
            let mut seen = std::collections::HashSet::new();
            for (at, length) in &ram.reads {
                // Of a packed chain's first descriptor the flags are looked at first; the whole
                // is read after it, and its flags are left aside.
                if descriptors.contains(at) && *length == 16 {
                    assert!(seen.insert(*at), "{at:#x} twice");
                }
            }
            assert!(ram.reads.len() <= 5);
        }
    }
    // What the driver changes behind the flags that were looked at changes nothing.
    let (mut ram, mut driver, mut queue, mut chain) = world(8, features::RING_PACKED);
    driver.offer(&mut ram, &[(DATA, 8, true)], false).unwrap();
    struct Turncoat(Ram);
    impl arch::GuestMemory for Turncoat {
        fn read(&mut self, addr: GuestPhysAddr, buf: &mut [u8]) -> Result<(), arch::MemoryFault> {
            self.0.read(addr, buf)?;
            self.0.put16(DESC + 14, NEXT | INDIRECT);
            Ok(())
        }
        fn write(&mut self, addr: GuestPhysAddr, data: &[u8]) -> Result<(), arch::MemoryFault> {
            self.0.write(addr, data)
        }
        fn compare_exchange(
            &mut self,
            addr: GuestPhysAddr,
            _: u8,
            _: u64,
            _: u64,
        ) -> Result<u64, arch::MemoryFault> {
            Err(arch::MemoryFault::NotRam(addr))
        }
    }
    assert!(queue.pop(&mut Turncoat(ram), &mut chain).unwrap());
    assert_eq!(chain.writable().len(), 1);
}

#[test]
fn only_what_is_the_devices_is_written_and_the_last_word_last() {
    for kind in kinds() {
        let (mut ram, mut driver, mut queue, mut chain) = world(8, kind);
        let packed = kind & features::RING_PACKED != 0;
        for round in 0..20 {
            for n in 0..2 {
                let at = DATA + 0x100 * n;
                driver.offer(&mut ram, &[(at, 8, false), (at + 8, 8, true)], n == 0);
            }
            ram.writes.clear();
            for _ in 0..2 {
                queue.pop(&mut ram, &mut chain).unwrap();
                chain.write(&mut ram, 0, b"answered").unwrap();
                queue.stage(&mut ram, chain.token(), 8).unwrap();
            }
            queue.publish(&mut ram).unwrap();
            queue.wants_interrupt(&mut ram).unwrap();
            queue
                .ask_for_notification(&mut ram, round % 2 == 0)
                .unwrap();
            let device = USED..USED + 0x100;
            for &(at, length) in &ram.writes {
                let data = [DATA + 8, DATA + 0x108].contains(&at) && length == 8;
                let own = device.contains(&at) || packed && (DESC..DESC + 128).contains(&at);
                assert!(data || own, "{at:#x}");
            }
            // What shows it all to the driver: the used index, or the first descriptor's flags.
            let shows = |&(at, _): &(u64, usize)| {
                if packed {
                    (DESC..DESC + 128).contains(&at)
                } else {
                    device.contains(&at) && at < USED + 4 + 64 && at != USED
                }
            };
            let ring: Vec<_> = ram.writes.iter().copied().filter(|w| shows(w)).collect();
            let last = ring.last().unwrap();
            let data = ram
                .writes
                .iter()
                .rposition(|w| w.0 == DATA + 0x108)
                .unwrap();
            let end = ram.writes.iter().rposition(|w| w == last).unwrap();
            assert!(data < end);
            if packed {
                let [first, second, third, fourth] = ring[..] else {
                    panic!("{ring:?}");
                };
                assert_eq!((first.1, second.1, third.1, fourth.1), (6, 6, 2, 2));
                assert_eq!(fourth.0, first.0 + 6, "the first one's flags");
                assert_eq!(third.0, second.0 + 6);
            } else {
                assert_eq!(*last, (USED + 2, 2));
            }
            while driver.take(&mut ram).is_some() {}
        }
    }
}

type Break = fn(&mut Ram);

fn describe(ram: &mut Ram, table: u64, n: u64, addr: u64, length: u32, flags: u16, next: u16) {
    Driver::descriptor(ram, table + 16 * n, addr, length, flags, next);
}

/// One chain at descriptor 0 of a split ring.
fn offer(ram: &mut Ram) {
    ram.put16(AVAIL + 2, 1);
}

#[test]
fn rules_that_a_driver_of_a_split_ring_breaks_are_named() {
    let cases: &[(Break, QueueError)] = &[
        (
            |ram| {
                ram.put16(AVAIL + 4, 8);
                offer(ram);
            },
            QueueError::Descriptor(8),
        ),
        (
            |ram| {
                describe(ram, DESC, 0, DATA, 1, NEXT, 9);
                offer(ram);
            },
            QueueError::Descriptor(9),
        ),
        (
            |ram| {
                describe(ram, DESC, 0, DATA, 1, NEXT, 0);
                offer(ram);
            },
            QueueError::Chain,
        ),
        (
            |ram| {
                describe(ram, DESC, 0, DATA, 24, INDIRECT, 0);
                offer(ram);
            },
            QueueError::Indirect(24),
        ),
        (
            |ram| {
                describe(ram, DESC, 0, DATA, 0, INDIRECT, 0);
                offer(ram);
            },
            QueueError::Indirect(0),
        ),
        (
            |ram| {
                describe(ram, DESC, 0, DATA, 1 << 24, INDIRECT, 0);
                offer(ram);
            },
            QueueError::Indirect(1 << 24),
        ),
        (
            |ram| {
                describe(ram, DESC, 0, DATA, 32, INDIRECT | NEXT, 1);
                offer(ram);
            },
            QueueError::Indirect(32),
        ),
        (
            |ram| {
                describe(ram, DESC, 0, DATA, 16, INDIRECT, 0);
                describe(ram, DATA, 0, DATA, 16, INDIRECT, 0);
                offer(ram);
            },
            QueueError::Indirect(16),
        ),
        (
            |ram| {
                describe(ram, DESC, 0, DATA, 32, INDIRECT, 0);
                describe(ram, DATA, 0, DATA, 16, NEXT, 0);
                offer(ram);
            },
            QueueError::Chain,
        ),
        (
            |ram| {
                describe(ram, DESC, 0, 1 << 40, 16, INDIRECT, 0);
                offer(ram);
            },
            QueueError::Ring(GuestPhysAddr::new(1 << 40)),
        ),
        (
            |ram| {
                describe(ram, DESC, 0, DATA, 1, WRITE | NEXT, 1);
                describe(ram, DESC, 1, DATA, 1, 0, 0);
                offer(ram);
            },
            QueueError::Order,
        ),
        (|ram| ram.put16(AVAIL + 2, 9), QueueError::Overrun(9)),
    ];
    for (break_it, want) in cases {
        let (mut ram, _, mut queue, mut chain) = world(8, features::RING_INDIRECT_DESC);
        break_it(&mut ram);
        assert_eq!(queue.pop(&mut ram, &mut chain), Err(*want));
    }
    let (mut ram, _, mut queue, mut chain) = world(8, 0);
    describe(&mut ram, DESC, 0, DATA, 16, INDIRECT, 0);
    offer(&mut ram);
    assert_eq!(
        queue.pop(&mut ram, &mut chain),
        Err(QueueError::Indirect(16)),
        "not negotiated"
    );
}

#[test]
fn rules_that_a_driver_of_a_packed_ring_breaks_are_named() {
    const NEW: u16 = 1 << 7;
    let cases: &[(Break, QueueError)] = &[
        (
            |ram| (0..8).for_each(|n| describe(ram, DESC, n, DATA, 1, 0, NEW | NEXT)),
            QueueError::Chain,
        ),
        (
            |ram| describe(ram, DESC, 0, DATA, 40, 0, NEW | INDIRECT),
            QueueError::Indirect(40),
        ),
        (
            |ram| describe(ram, DESC, 0, DATA, 16, 0, NEW | INDIRECT | NEXT),
            QueueError::Indirect(16),
        ),
        (
            |ram| {
                describe(ram, DESC, 1, DATA, 16, 0, INDIRECT);
                describe(ram, DESC, 0, DATA, 1, 0, NEW | NEXT);
            },
            QueueError::Indirect(16),
        ),
        (
            |ram| {
                describe(ram, DATA, 0, DATA, 48, 0, INDIRECT);
                describe(ram, DESC, 0, DATA, 16, 0, NEW | INDIRECT);
            },
            QueueError::Indirect(48),
        ),
        (
            |ram| describe(ram, DESC, 0, DATA, 16 * 257, 0, NEW | INDIRECT),
            QueueError::Chain,
        ),
        (
            |ram| {
                describe(ram, DESC, 1, DATA, 1, 0, 0);
                describe(ram, DESC, 0, DATA, 1, 0, NEW | NEXT | WRITE);
            },
            QueueError::Order,
        ),
    ];
    for (break_it, want) in cases {
        let kind = features::RING_PACKED | features::RING_INDIRECT_DESC;
        let (mut ram, _, mut queue, mut chain) = world(8, kind);
        break_it(&mut ram);
        assert_eq!(queue.pop(&mut ram, &mut chain), Err(*want));
    }
}

#[test]
fn queues_have_a_sound_size_and_place() {
    let gpa = GuestPhysAddr::new;
    let layout = |size, descriptors, driver, device| QueueLayout {
        size,
        descriptors: gpa(descriptors),
        driver: gpa(driver),
        device: gpa(device),
    };
    let packed = features::RING_PACKED;
    for (layout, negotiated, good) in [
        (layout(8, 16, 2, 4), 0, true),
        (layout(8, 16, 2, 4), packed, false),
        (layout(8, 16, 4, 4), packed, true),
        (layout(6, 16, 4, 4), packed, true),
        (layout(6, 16, 4, 4), 0, false),
        (layout(0, 0, 0, 0), 0, false),
        (layout(0, 0, 0, 0), packed, false),
        (layout(32769, 0, 0, 0), packed, false),
        (layout(8, 8, 0, 0), 0, false),
        (layout(8, 0, 1, 0), 0, false),
        (layout(8, 0, 0, 2), 0, false),
    ] {
        assert_eq!(Queue::new(layout, negotiated).is_ok(), good, "{layout:?}");
    }
    // A ring at the end of everything is an error when it is used.
    let layout = layout(8, u64::MAX - 15, u64::MAX - 3, u64::MAX - 3);
    for negotiated in [0, packed] {
        let mut queue = Queue::new(layout, negotiated).unwrap();
        let mut ram = Ram::new(16);
        assert!(queue.pop(&mut ram, &mut Chain::new()).is_err());
        assert!(queue.push(&mut ram, Chain::new().token(), 0).is_err());
        assert!(queue.ask_for_notification(&mut ram, true).is_err());
    }
}

#[test]
fn chained_descriptors_may_end_in_an_indirect_table() {
    let (mut ram, _, mut queue, mut chain) = world(8, features::RING_INDIRECT_DESC);
    describe(&mut ram, DESC, 0, DATA, 1, NEXT, 5);
    describe(&mut ram, DESC, 5, DATA + 0x100, 48, INDIRECT | WRITE, 0);
    describe(&mut ram, DATA + 0x100, 0, DATA, 2, NEXT, 2);
    describe(&mut ram, DATA + 0x100, 2, DATA, 3, WRITE, 0);
    offer(&mut ram);
    assert!(queue.pop(&mut ram, &mut chain).unwrap());
    let lengths: Vec<_> = chain
        .buffers()
        .iter()
        .map(|b| (b.length, b.writable))
        .collect();
    assert_eq!(lengths, [(1, false), (2, false), (3, true)]);
}

#[test]
fn without_event_index_flags_alone_decide() {
    for kind in kinds().filter(|kind| kind & features::RING_EVENT_IDX == 0) {
        let (mut ram, mut driver, mut queue, mut chain) = world(8, kind);
        let packed = kind & features::RING_PACKED != 0;
        if !packed {
            ram.put16(AVAIL + 4 + 16, 0x5555);
        }
        for on in [true, false, true, false, false] {
            driver.want_interrupt(&mut ram, on);
            driver.offer(&mut ram, &[(DATA, 1, true)], false).unwrap();
            queue.pop(&mut ram, &mut chain).unwrap();
            queue.push(&mut ram, chain.token(), 1).unwrap();
            assert_eq!(queue.wants_interrupt(&mut ram).unwrap(), on);
            driver.take(&mut ram).unwrap();
            queue.ask_for_notification(&mut ram, on).unwrap();
            let at = if packed { USED + 2 } else { USED };
            assert_eq!(ram.get16(at), u16::from(!on));
            assert_eq!(driver.must_notify(&ram, driver.mark()), on);
        }
        if packed {
            ram.put16(AVAIL + 2, 2);
            driver.offer(&mut ram, &[(DATA, 1, true)], false).unwrap();
            queue.pop(&mut ram, &mut chain).unwrap();
            queue.push(&mut ram, chain.token(), 1).unwrap();
            assert!(
                queue.wants_interrupt(&mut ram).unwrap(),
                "reserved: rather one too many"
            );
        }
    }
}

#[test]
fn with_event_index_only_the_asked_for_entry_interrupts() {
    for kind in kinds().filter(|kind| kind & features::RING_EVENT_IDX != 0) {
        let (mut ram, mut driver, mut queue, mut chain) = world(8, kind);
        if kind & features::RING_PACKED == 0 {
            ram.put16(AVAIL, 1);
        }
        for round in 0..40 {
            driver.want_interrupt(&mut ram, true);
            for n in 0..3 {
                driver.offer(&mut ram, &[(DATA, 1, true)], false).unwrap();
                queue.pop(&mut ram, &mut chain).unwrap();
                queue.push(&mut ram, chain.token(), 1).unwrap();
                let interrupt = queue.wants_interrupt(&mut ram).unwrap();
                assert_eq!(interrupt, n == 0, "round {round}");
            }
            while driver.take(&mut ram).is_some() {}
            if kind & features::RING_PACKED == 0 {
                assert_eq!(ram.get16(USED), 0, "flags stay zero");
            }
        }
    }
}

#[test]
fn notifications_come_when_they_were_asked_for() {
    for kind in kinds() {
        let (mut ram, mut driver, mut queue, mut chain) = world(4, kind);
        for round in 0..20 {
            queue.ask_for_notification(&mut ram, true).unwrap();
            let old = driver.mark();
            driver.offer(&mut ram, &[(DATA, 1, true)], false).unwrap();
            assert!(driver.must_notify(&ram, old), "round {round}");
            queue.ask_for_notification(&mut ram, false).unwrap();
            let old = driver.mark();
            driver.offer(&mut ram, &[(DATA, 1, true)], false).unwrap();
            assert!(!driver.must_notify(&ram, old), "round {round}");
            while queue.pop(&mut ram, &mut chain).unwrap() {
                queue.push(&mut ram, chain.token(), 1).unwrap();
            }
            while driver.take(&mut ram).is_some() {}
        }
    }
}

#[test]
fn random_traffic_arrives_whole_in_order_and_with_its_interrupts() {
    let mut random = Random(17);
    for kind in kinds() {
        let size = if kind & features::RING_PACKED != 0 {
            13
        } else {
            16
        };
        let (mut ram, mut driver, mut queue, mut chain) = world(size, kind);
        if kind & features::RING_PACKED == 0 {
            // Indices wrap soon.
            let mut state = match queue {
                Queue::Split(queue) => queue,
                Queue::Packed(_) => unreachable!(),
            };
            state.start_at(0xfff0);
            driver.start_at(&mut ram, 0xfff0);
            queue = Queue::Split(state);
        }
        let mut waiting: VecDeque<(u16, Vec<Part>)> = VecDeque::new();
        let mut answered: HashMap<u16, (u32, u8)> = HashMap::new();
        let mut order: VecDeque<u16> = VecDeque::new();
        let mut armed = false;
        for step in 0..3_000u32 {
            match random.below(4) {
                0 | 1 => {
                    let count = 1 + random.below(5) as usize;
                    let writable = random.below(count as u64 + 1) as usize;
                    let parts: Vec<Part> = (0..count)
                        .map(|n| {
                            let at = DATA + random.below(0x1000);
                            (at, random.below(200) as u32, n >= count - writable)
                        })
                        .collect();
                    if let Some(id) = driver.offer(&mut ram, &parts, random.below(2) == 0) {
                        waiting.push_back((id, parts));
                    }
                }
                2 => {
                    let mut published = 0;
                    for _ in 0..random.below(4) {
                        if !queue.pop(&mut ram, &mut chain).unwrap() {
                            assert!(waiting.is_empty());
                            break;
                        }
                        let (id, parts) = waiting.pop_front().expect("only what was offered");
                        let found: Vec<Part> = chain
                            .buffers()
                            .iter()
                            .map(|b| (b.addr.as_u64(), b.length, b.writable))
                            .collect();
                        assert_eq!(found, parts);
                        let written = chain.writable_bytes() as u32;
                        let pattern = vec![step as u8; written as usize];
                        assert_eq!(chain.write(&mut ram, 0, &pattern).unwrap(), pattern.len());
                        queue.stage(&mut ram, chain.token(), written).unwrap();
                        answered.insert(id, (written, step as u8));
                        order.push_back(id);
                        published += 1;
                    }
                    queue.publish(&mut ram).unwrap();
                    let interrupt = queue.wants_interrupt(&mut ram).unwrap();
                    if published == 0 {
                        assert!(!interrupt);
                    } else if armed {
                        assert!(interrupt, "the driver sleeps");
                    }
                    armed &= !interrupt;
                }
                _ => {
                    while let Some((id, written)) = driver.take(&mut ram) {
                        assert_eq!(order.pop_front(), Some(id));
                        assert_eq!(answered.remove(&id).map(|a| a.0), Some(written));
                    }
                    armed = random.below(2) == 0;
                    driver.want_interrupt(&mut ram, armed);
                }
            }
        }
    }
}

#[test]
fn random_rings_never_panic_and_take_bounded_work() {
    let mut random = Random(5);
    for kind in kinds() {
        for _ in 0..400 {
            let (mut ram, mut driver, mut queue, mut chain) = world(8, kind);
            for _ in 0..4 {
                let parts = [(DATA, 8, false), (DATA, 8, true)];
                driver.offer(&mut ram, &parts, random.below(2) == 0);
            }
            for _ in 0..random.below(200) {
                let at = BASE + random.below(0x3100);
                ram.put(at, &[random.next() as u8]);
            }
            for _ in 0..10 {
                ram.accesses = 0;
                let popped = queue.pop(&mut ram, &mut chain);
                assert!(ram.accesses <= 2 + 256 + 2, "{} accesses", ram.accesses);
                if popped != Ok(true) {
                    break;
                }
                let mut buf = [0; 64];
                let _ = chain.read(&mut ram, random.next() >> (random.next() & 63), &mut buf);
                let _ = chain.write(&mut ram, random.next() >> (random.next() & 63), &buf);
                let _ = queue.push(&mut ram, chain.token(), random.next() as u32);
                let _ = queue.wants_interrupt(&mut ram);
                let _ = queue.ask_for_notification(&mut ram, random.next() & 1 == 0);
            }
        }
    }
}
