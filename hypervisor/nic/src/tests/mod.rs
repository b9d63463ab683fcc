//! The drivers against models of the cards.

mod intel;
mod random;
mod virtio;

use crate::intel::Family;
use crate::*;
use std::cell::RefCell;
use std::rc::Rc;

const MS: u64 = 1_000_000;
const SECOND: u64 = 1000 * MS;
pub const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];

/// Memory that driver and model share. Its address has more than 32 bits.
#[derive(Clone)]
pub struct Memory(pub Rc<RefCell<Vec<u8>>>);

impl Memory {
    pub const BASE: u64 = 0x12_3456_7000;

    fn new() -> Self {
        Self(Rc::new(RefCell::new(vec![0xa5; MEMORY])))
    }

    /// What the card finds at a device address.
    pub fn get<const N: usize>(&self, address: u64) -> [u8; N] {
        let at = (address - Self::BASE) as usize;
        self.0.borrow()[at..at + N].try_into().expect("N bytes")
    }

    pub fn bytes_at(&self, address: u64, length: usize) -> Vec<u8> {
        let at = (address - Self::BASE) as usize;
        self.0.borrow()[at..at + length].to_vec()
    }

    pub fn put(&self, address: u64, data: &[u8]) {
        let at = (address - Self::BASE) as usize;
        self.0.borrow_mut()[at..at + data.len()].copy_from_slice(data);
    }
}

impl DmaMemory for Memory {
    fn address(&self) -> u64 {
        Self::BASE
    }

    fn bytes(&self) -> usize {
        self.0.borrow().len()
    }

    fn read(&self, offset: usize, to: &mut [u8]) {
        let memory = self.0.borrow();
        match memory.get(offset..offset + to.len()) {
            Some(from) => to.copy_from_slice(from),
            None => to.fill(0),
        }
    }

    fn write(&mut self, offset: usize, data: &[u8]) {
        if let Some(to) = (self.0.borrow_mut()).get_mut(offset..offset + data.len()) {
            to.copy_from_slice(data);
        }
    }

    fn with(&self, offset: usize, length: usize, show: &mut dyn FnMut(&[u8])) {
        let frame = self.0.borrow()[offset..offset + length].to_vec();
        show(&frame);
    }
}

/// What a model does wrong with the next frame it receives.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Lie {
    Length(u32),
    /// More of the frame is said to follow.
    NoEnd,
    Damaged,
}

/// How a model is.
#[derive(Clone, Default)]
pub struct Mood {
    pub link_down: bool,
    /// Takes nothing from its transmit ring, puts nothing into its receive ring.
    pub stalled: bool,
    /// Reads all ones.
    pub dead: bool,
    pub endless_reset: bool,
    pub lie: Option<Lie>,
}

/// A card as the wire and the test see it.
pub trait Model {
    fn mood(&mut self) -> &mut Mood;
    /// A frame from the wire; false where the card has no room.
    fn arrive(&mut self, frame: &[u8]) -> bool;
    /// What came out since last asked.
    fn sent(&mut self) -> Vec<Vec<u8>>;
    /// Whether it would pull its interrupt pin.
    fn interrupts(&self) -> bool;
}

/// A model's register window.
pub struct Shared<T>(
    pub Rc<RefCell<T>>,
    pub fn(&mut T, u32, Width, Option<u32>) -> u32,
);

impl<T> Registers for Shared<T> {
    fn read(&mut self, offset: u32, width: Width) -> u32 {
        self.1(&mut self.0.borrow_mut(), offset, width, None)
    }

    fn write(&mut self, offset: u32, width: Width, value: u32) {
        self.1(&mut self.0.borrow_mut(), offset, width, Some(value));
    }
}

/// A driver on a model.
struct World {
    name: &'static str,
    nic: Box<dyn Nic>,
    model: Rc<RefCell<dyn Model>>,
    now: Nanos,
}

const INTEL: [Family; 3] = [Family::E1000, Family::E1000e, Family::Igb];

fn worlds() -> Vec<World> {
    let mut worlds: Vec<_> = INTEL.into_iter().map(intel::world).collect();
    worlds.push(virtio::world(virtio::ALL));
    worlds
}

impl World {
    fn mood(&self, change: impl FnOnce(&mut Mood)) {
        change(self.model.borrow_mut().mood());
    }

    fn arrive(&self, frame: &[u8]) -> bool {
        self.model.borrow_mut().arrive(frame)
    }

    fn sent(&self) -> Vec<Vec<u8>> {
        self.model.borrow_mut().sent()
    }

    fn receive(&mut self) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        self.nic
            .receive(usize::MAX, &mut |frame| frames.push(frame.to_vec()));
        frames
    }

    /// Looks after the card every 10 ms.
    fn pass(&mut self, nanoseconds: u64) -> Vec<Event> {
        let end = self.now + nanoseconds;
        let mut events = Vec::new();
        while self.now < end {
            self.now = self.now + 10 * MS;
            events.extend(self.nic.poll(self.now));
        }
        events
    }

    /// A frame each way.
    fn assert_works(&mut self) {
        let name = self.name;
        self.sent();
        let out = frame(100, 1);
        self.nic.transmit(&[&out]).expect(name);
        self.nic.flush();
        assert_eq!(self.sent(), [out], "{name}");
        let inward = frame(200, 2);
        assert!(self.arrive(&inward), "{name}");
        assert_eq!(self.receive(), [inward], "{name}");
    }
}

/// A frame of this length whose bytes tell its number.
fn frame(length: usize, number: usize) -> Vec<u8> {
    (0..length).map(|at| (at + 7 * number) as u8).collect()
}

const UP: Event = Event::Link(Link {
    up: true,
    speed: 1000,
    half_duplex: false,
});

fn is_up(event: &Event) -> bool {
    matches!(event, Event::Link(Link { up: true, .. }))
}

#[test]
fn a_card_is_opened_with_its_address_and_link() {
    for mut world in worlds() {
        assert_eq!(world.nic.mac().0, MAC);
        assert!(world.nic.link().up && world.nic.works(), "{}", world.name);
        assert_eq!(world.pass(SECOND), [], "{}", world.name);
        world.assert_works();
    }
}

#[test]
fn frames_are_joined_from_pieces_and_padded_with_zeroes() {
    for mut world in worlds() {
        let long = [0xeeu8; 300];
        for _ in 0..600 {
            world.nic.transmit(&[&long]).expect(world.name);
            world
                .nic
                .transmit(&[&[1; 6], &[], &[2; 8], &[3]])
                .expect(world.name);
            world.nic.flush();
            let mut short = [[1; 6].as_slice(), &[2; 8], &[3]].concat();
            short.resize(MIN_FRAME, 0);
            assert_eq!(world.sent(), [long.to_vec(), short], "{}", world.name);
        }
        assert_eq!(world.nic.counters().transmitted, 1200);
        assert_eq!(world.nic.counters().transmitted_bytes, 600 * 315);
    }
}

#[test]
fn what_is_no_frame_is_refused() {
    for mut world in worlds() {
        for length in [0, 13, MAX_FRAME + 1, 70_000] {
            let refused = world.nic.transmit(&[&vec![0; length]]);
            assert_eq!(refused, Err(TransmitError::Size(length)), "{}", world.name);
        }
        for length in [HEADER, MIN_FRAME, MAX_FRAME] {
            world.nic.transmit(&[&vec![1; length]]).expect(world.name);
        }
        world.nic.flush();
        let lengths: Vec<usize> = world.sent().iter().map(Vec::len).collect();
        assert_eq!(lengths, [MIN_FRAME, MIN_FRAME, MAX_FRAME]);
    }
}

#[test]
fn rings_wrap_in_both_directions() {
    for mut world in worlds() {
        let (mut out, mut inward) = (0, 0);
        for batch in 0..200 {
            let wanted: Vec<_> = (0..batch % 23)
                .map(|n| frame(60 + (out + n) % 1400, n))
                .collect();
            for frame in &wanted {
                world.nic.transmit(&[frame]).expect(world.name);
            }
            world.nic.flush();
            assert_eq!(world.sent(), wanted, "{}", world.name);
            out += wanted.len();
            let wanted: Vec<_> = (0..batch % 37)
                .map(|n| frame(60 + (inward + n) % 1450, n))
                .collect();
            assert!(
                wanted.iter().all(|frame| world.arrive(frame)),
                "{}",
                world.name
            );
            assert_eq!(world.receive(), wanted, "{}", world.name);
            inward += wanted.len();
        }
        let counters = *world.nic.counters();
        assert_eq!(
            (counters.transmitted, counters.received),
            (out as u64, inward as u64)
        );
        assert_eq!(
            (counters.missed, counters.malformed, counters.lost),
            (0, 0, 0)
        );
    }
}

#[test]
fn a_full_transmit_ring_says_so_and_takes_frames_again() {
    for mut world in worlds() {
        world.mood(|mood| mood.stalled = true);
        let mut taken = 0;
        while world.nic.transmit(&[&frame(60, taken)]).is_ok() {
            taken += 1;
        }
        assert!((250..=256).contains(&taken), "{} took {taken}", world.name);
        assert_eq!(world.nic.transmit(&[&[0; 60]]), Err(TransmitError::Full));
        world.mood(|mood| mood.stalled = false);
        // The card goes on by itself.
        world.arrive(&frame(60, 0));
        world.receive();
        assert_eq!(world.sent().len(), taken, "{}", world.name);
        world.assert_works();
    }
}

#[test]
fn a_full_receive_ring_loses_what_comes_and_no_more() {
    for mut world in worlds() {
        let taken = (0..).take_while(|n| world.arrive(&frame(60, *n))).count();
        assert!((250..=256).contains(&taken), "{} took {taken}", world.name);
        assert!(!world.arrive(&frame(60, 0)));
        let mut count = 0;
        while world.nic.receive(7, &mut |seen| {
            assert_eq!(seen, frame(60, count));
            count += 1;
        }) == 7
        {}
        assert_eq!(count, taken, "{}", world.name);
        world.pass(SECOND);
        if world.name != "virtio" {
            assert_eq!(world.nic.counters().missed, 2, "{}", world.name);
        }
        world.assert_works();
    }
}

#[test]
fn the_link_goes_and_comes_back() {
    for mut world in worlds() {
        world.mood(|mood| mood.link_down = true);
        let down = Event::Link(Link::default());
        assert_eq!(world.pass(SECOND), [down], "{}", world.name);
        let refused = world.nic.transmit(&[&[0; 60]]);
        assert_eq!(refused, Err(TransmitError::LinkDown));
        world.mood(|mood| mood.link_down = false);
        let events = world.pass(SECOND);
        assert!(
            matches!(events[..], [up] if is_up(&up)),
            "{} {events:?}",
            world.name
        );
        world.assert_works();
    }
}

#[test]
fn frames_that_wait_for_a_lost_link_are_not_sent_later() {
    for mut world in worlds() {
        world.mood(|mood| mood.stalled = true);
        world.nic.transmit(&[&frame(60, 9)]).expect(world.name);
        world.nic.flush();
        world.mood(|mood| mood.link_down = true);
        assert_eq!(
            world.pass(SECOND),
            [Event::Link(Link::default())],
            "{}",
            world.name
        );
        world.mood(|mood| *mood = Mood::default());
        assert!(matches!(world.pass(SECOND)[..], [up] if is_up(&up)));
        world.assert_works();
        assert_eq!(world.nic.counters().lost, 1, "{}", world.name);
    }
}

#[test]
fn a_transmit_ring_that_stands_still_is_reset() {
    for mut world in worlds() {
        world.mood(|mood| mood.stalled = true);
        for _ in 0..5 {
            world.nic.transmit(&[&frame(60, 1)]).expect(world.name);
        }
        // Even where nobody told the card.
        assert_eq!(world.pass(2 * SECOND), [], "{}", world.name);
        let stalled = Event::Resetting(Fault::Stalled(Direction::Transmit));
        assert_eq!(
            world.pass(3 * SECOND)[..2],
            [stalled, Event::Restarted],
            "{}",
            world.name
        );
        world.mood(|mood| mood.stalled = false);
        world.pass(SECOND);
        assert_eq!(world.nic.counters().lost, 5, "{}", world.name);
        assert_eq!(world.nic.counters().resets, 1, "{}", world.name);
        world.assert_works();
    }
}

#[test]
fn a_slow_card_is_not_taken_for_a_stalled_one() {
    for mut world in worlds() {
        for _ in 0..10 {
            world.mood(|mood| mood.stalled = true);
            world.nic.transmit(&[&frame(60, 1)]).expect(world.name);
            world.nic.flush();
            assert_eq!(world.pass(2 * SECOND), [], "{}", world.name);
            world.mood(|mood| mood.stalled = false);
            world.nic.transmit(&[&frame(60, 1)]).expect(world.name);
            world.nic.flush();
            assert_eq!(world.pass(SECOND), [], "{}", world.name);
        }
    }
}

#[test]
fn a_reset_that_does_not_end_is_given_up_and_tried_again() {
    for mut world in worlds() {
        world.mood(|mood| {
            mood.stalled = true;
            mood.endless_reset = true;
        });
        world.nic.transmit(&[&frame(60, 1)]).expect(world.name);
        let events = world.pass(30 * SECOND);
        let stalled = Event::Resetting(Fault::Stalled(Direction::Transmit));
        assert_eq!(
            events,
            [stalled, Event::Dead(Fault::Reset)],
            "{}",
            world.name
        );
        assert!(!world.nic.works() && !world.nic.link().up);
        assert_eq!(
            world.nic.transmit(&[&[0; 60]]),
            Err(TransmitError::NotWorking)
        );
        assert_eq!(world.receive().len(), 0);
        world.mood(|mood| *mood = Mood::default());
        let events = world.pass(10 * SECOND);
        assert!(
            matches!(events[..], [Event::Restarted, up] if is_up(&up)),
            "{events:?}"
        );
        world.assert_works();
    }
}

#[test]
fn a_card_that_left_the_bus_is_said_once_and_taken_back() {
    for mut world in worlds() {
        world.mood(|mood| mood.dead = true);
        // Some accesses before anybody looks.
        let _ = world.nic.transmit(&[&frame(60, 1)]);
        world.nic.flush();
        world.receive();
        world.nic.interrupt();
        assert_eq!(
            world.pass(20 * SECOND),
            [Event::Dead(Fault::Gone)],
            "{}",
            world.name
        );
        world.mood(|mood| mood.dead = false);
        let events = world.pass(10 * SECOND);
        assert!(
            matches!(events[..], [Event::Restarted, up] if is_up(&up)),
            "{events:?}"
        );
        world.assert_works();
    }
}

#[test]
fn lengths_that_cannot_be_are_dropped_and_counted() {
    for mut world in worlds() {
        let header = if world.name == "virtio" { 12 } else { 0 };
        let lies = [0, 1, 11, 13, 1523, 2049, 0xffff].map(|length| Lie::Length(length + header));
        for (count, lie) in (1..).zip(lies) {
            world.mood(|mood| mood.lie = Some(lie));
            assert!(world.arrive(&frame(60, 3)));
            assert_eq!(world.receive(), [[0u8; 0]; 0], "{} {lie:?}", world.name);
            assert_eq!(
                world.nic.counters().malformed,
                count,
                "{} {lie:?}",
                world.name
            );
            world.assert_works();
        }
        world.mood(|mood| mood.lie = Some(Lie::Length(14 + header)));
        assert!(world.arrive(&frame(60, 3)));
        assert_eq!(world.receive(), [frame(14, 3)]);
    }
}

#[test]
fn a_receive_ring_that_stands_still_is_reset() {
    for family in INTEL {
        let mut world = intel::world(family);
        world.mood(|mood| mood.stalled = true);
        let mut events = Vec::new();
        for _ in 0..50 {
            assert!(!world.arrive(&frame(60, 1)));
            events.extend(world.pass(100 * MS));
        }
        let stalled = Event::Resetting(Fault::Stalled(Direction::Receive));
        assert_eq!(events, [stalled, Event::Restarted, UP], "{}", world.name);
        world.mood(|mood| mood.stalled = false);
        world.assert_works();
    }
    // A receiver that does not look is no fault of the card.
    for mut world in worlds() {
        while world.arrive(&frame(60, 1)) {}
        for _ in 0..50 {
            world.arrive(&frame(60, 1));
            assert_eq!(world.pass(100 * MS), [], "{}", world.name);
        }
    }
}

#[test]
fn interrupts_are_off_at_first_and_stay_as_they_were_set() {
    for mut world in worlds() {
        world.arrive(&frame(60, 1));
        assert!(!world.model.borrow().interrupts(), "{}", world.name);
        world.nic.interrupt();
        world.receive();
        world.nic.set_interrupts(true);
        assert!(
            !world.model.borrow().interrupts() && !world.nic.interrupt(),
            "{}",
            world.name
        );
        world.arrive(&frame(60, 1));
        assert!(
            world.model.borrow().interrupts() && world.nic.interrupt(),
            "{}",
            world.name
        );
        assert!(
            !world.model.borrow().interrupts() && !world.nic.interrupt(),
            "{}",
            world.name
        );
        // Through a reset as well.
        world.mood(|mood| mood.stalled = true);
        world.nic.transmit(&[&frame(60, 1)]).expect(world.name);
        world.pass(4 * SECOND);
        world.mood(|mood| mood.stalled = false);
        world.arrive(&frame(60, 1));
        assert!(world.nic.interrupt(), "{}", world.name);
        world.nic.set_interrupts(false);
        world.arrive(&frame(60, 1));
        assert!(!world.model.borrow().interrupts(), "{}", world.name);
    }
}

#[test]
fn a_stopped_card_is_silent() {
    for mut world in worlds() {
        world.nic.transmit(&[&frame(60, 1)]).expect(world.name);
        world.nic.stop();
        world.nic.flush();
        assert!(!world.arrive(&frame(60, 1)), "{}", world.name);
        assert_eq!(world.pass(20 * SECOND), [], "{}", world.name);
        assert_eq!(world.sent().len(), 0, "{}", world.name);
        assert!(!world.nic.works() && !world.nic.interrupt());
    }
}

#[test]
fn words_for_the_log() {
    let link = |speed, half_duplex| Link {
        up: true,
        speed,
        half_duplex,
    };
    for (event, words) in [
        (Event::Link(Link::default()), "link down"),
        (Event::Link(link(1000, false)), "link up 1000 Mbit/s"),
        (Event::Link(link(10, true)), "link up 10 Mbit/s half duplex"),
        (Event::Link(link(0, false)), "link up"),
        (
            Event::Resetting(Fault::Stalled(Direction::Transmit)),
            "reset, as its transmit ring stands still",
        ),
        (
            Event::Dead(Fault::Gone),
            "given up for now, as it does not answer (its registers read all ones)",
        ),
        (Event::Restarted, "works again"),
    ] {
        assert_eq!(event.to_string(), words);
    }
}

#[test]
fn ids_find_their_driver() {
    use ids::{Kind, find};
    for (vendor, device, name) in [
        (0x8086, 0x100e, "e1000"),
        (0x8086, 0x10d3, "e1000e"),
        (0x8086, 0x10c9, "igb"),
        (0x8086, 0x1521, "igb"),
        (0x8086, 0x1533, "igb"),
        (0x1af4, 0x1000, "virtio-net"),
        (0x1af4, 0x1041, "virtio-net"),
    ] {
        assert_eq!(find(vendor, device).map(Kind::name), Some(name));
    }
    for (vendor, device) in [
        (0x8086, 0x29c0),
        (0x1af4, 0x1042),
        (0x10ec, 0x100e),
        (0x8086, 0x10ca),
    ] {
        assert_eq!(find(vendor, device), None);
    }
}
