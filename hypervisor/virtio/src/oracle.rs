//! The split ring beside rust-vmm's: what we take, it takes alike, and it leaves the same bytes.

use virtio_queue::{Queue as Theirs, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::testing::{Driver, Part, Ram, Random};
use crate::{Chain, features};

const BASE: u64 = 0x1_0000;
const DATA: u64 = 0x4_0000;
const RAM: usize = 0x5_0000;
const SIZE: u16 = 16;

#[test]
fn what_is_taken_and_left_is_what_another_device_takes_and_leaves() {
    let mut random = Random(99);
    let mut compared = 0;
    for round in 0..1_000 {
        let event_index = round % 2 == 0;
        let mut negotiated = features::VERSION_1 | features::RING_INDIRECT_DESC;
        if event_index {
            negotiated |= features::RING_EVENT_IDX;
        }
        let mut driver = Driver::new(BASE, SIZE, negotiated);
        let mut ours = driver.queue();
        let mut ram = Ram::new(RAM);
        let mut theirs = Theirs::new(SIZE).unwrap();
        let low = |addr: arch::GuestPhysAddr| Some(addr.as_u64() as u32);
        theirs.set_desc_table_address(low(driver.layout.descriptors), Some(0));
        theirs.set_avail_ring_address(low(driver.layout.driver), Some(0));
        theirs.set_used_ring_address(low(driver.layout.device), Some(0));
        theirs.set_event_idx(event_index);
        theirs.set_ready(true);
        let memory: GuestMemoryMmap =
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM)]).unwrap();
        let mut chain = Chain::new();
        let mut asked = false;
        'steps: for _ in 0..20 {
            for _ in 0..random.below(4) {
                let count = 1 + random.below(4);
                let writable = random.below(count + 1);
                let parts: Vec<Part> = (0..count)
                    .map(|n| {
                        (
                            DATA + 64 * n,
                            random.below(64) as u32,
                            n >= count - writable,
                        )
                    })
                    .collect();
                driver.offer(&mut ram, &parts, random.below(2) == 0);
            }
            driver.want_interrupt(&mut ram, random.below(2) == 0);
            if round % 4 >= 2 && random.below(4) == 0 {
                // A lie, anywhere in the descriptors.
                ram.put(
                    BASE + random.below(16 * u64::from(SIZE)),
                    &[random.next() as u8],
                );
            }
            memory.write_slice(&ram.bytes, GuestAddress(0)).unwrap();
            for _ in 0..random.below(4) {
                let Ok(found) = ours.pop(&mut ram, &mut chain) else {
                    break 'steps;
                };
                let other = theirs.pop_descriptor_chain(&memory);
                assert_eq!(other.is_some(), found);
                let Some(other) = other else { break };
                let head = other.head_index();
                assert_eq!(chain.token().id, head);
                let other: Vec<Part> = other
                    .map(|d| (d.addr().0, d.len(), d.is_write_only()))
                    .collect();
                let buffers: Vec<Part> = chain
                    .buffers()
                    .iter()
                    .map(|b| (b.addr.as_u64(), b.length, b.writable))
                    .collect();
                assert_eq!(buffers, other);
                let written = random.below(100) as u32;
                ours.push(&mut ram, chain.token(), written).unwrap();
                theirs.add_used(&memory, head, written).unwrap();
                compared += 1;
            }
            let wants = ours.wants_interrupt(&mut ram).unwrap();
            let others = theirs.needs_notification(&memory).unwrap();
            // The first time it says yes whatever was asked for, and flags it does not look at.
            if event_index && asked {
                assert_eq!(wants, others);
            }
            asked = true;
            if random.below(2) == 0 {
                ours.ask_for_notification(&mut ram, true).unwrap();
                let more = theirs.enable_notification(&memory).unwrap();
                assert_eq!(ours.has_next(&mut ram).unwrap(), more);
            }
            let mut bytes = vec![0; RAM];
            memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
            assert!(bytes == ram.bytes, "the same bytes everywhere");
            while driver.take(&mut ram).is_some() {}
        }
    }
    assert!(compared > 5_000, "{compared}");
}
