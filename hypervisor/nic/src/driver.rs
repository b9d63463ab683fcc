//! What all cards share: their states, and what becomes of frames on the way in and out.
//!
//! ```text
//! open → working ⇄ resetting → dead
//!           └────── stop ──────┘ └→ resetting, every five seconds
//! ```

use crate::{
    BUFFER, Counters, DmaMemory, Event, Fault, HEADER, Link, MAX_FRAME, MEMORY, MIN_FRAME, Nic,
    RING, TransmitError,
};
use arch::Nanos;
use vswitch::MacAddr;

const MS: u64 = 1_000_000;
/// How often a card is looked at.
const LOOK: u64 = 100 * MS;
/// How long a ring may stand still with work in it. Half-duplex Ethernet gives a frame up sooner.
const STALL: u64 = 3000 * MS;
/// How long a card takes to read its settings after a reset (82574 datasheet §4.2: up to 20 ms).
const SETTLE: u64 = 20 * MS;
/// When a reset has failed.
const RESET_LIMIT: u64 = 2000 * MS;
/// How long a dead card is left alone.
const RETRY: u64 = 5000 * MS;

const ZEROES: [u8; MIN_FRAME] = [0; MIN_FRAME];

/// A buffer that the card gave back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    /// So many bytes of a whole frame at this offset of the memory.
    Frame { offset: usize, length: usize },
    /// The card says that the frame is damaged.
    Damaged,
    /// What the card says cannot be, or a frame that is longer than a buffer.
    Malformed,
}

/// What differs between cards. All calls come from [`Driver`], which keeps the order.
pub(crate) trait Hardware {
    type Memory: DmaMemory;

    fn memory(&mut self) -> &mut Self::Memory;

    /// Ends all access to memory and begins a reset. Rings are forgotten.
    fn begin_reset(&mut self);
    /// Whether it is over. No access may be made before a time that the caller keeps.
    fn reset_ended(&mut self) -> bool;
    /// From reset to a card that sends and receives.
    fn set_up(&mut self) -> Result<(), Fault>;
    /// The address, read while the card is set up.
    fn mac(&self) -> MacAddr;

    /// How it is.
    fn look(&mut self) -> Result<Link, Fault>;
    /// Frames that it had no buffer for since it was last asked.
    fn missed(&mut self) -> u32;

    /// Where the next frame goes, if a descriptor is free.
    fn slot(&mut self) -> Option<usize>;
    /// Queues what was written there.
    fn post(&mut self, length: usize);
    /// Tells the card of what was queued.
    fn tell(&mut self);
    /// Takes back what was sent: the number of frames.
    fn reclaim(&mut self) -> Result<usize, Fault>;
    /// Frames that were queued and did not come back.
    fn pending(&self) -> usize;

    /// Whether a buffer came from the card.
    fn ready(&self) -> bool;
    /// The next buffer that came from the card.
    fn take(&mut self) -> Result<Option<Taken>, Fault>;
    /// Gives the buffer just taken to the card again.
    fn recycle(&mut self);
    /// Tells the card of what was given to it.
    fn refill(&mut self);

    fn set_interrupts(&mut self, on: bool);
    /// Takes an interrupt's cause away from the card; false when there was none.
    fn acknowledge(&mut self) -> bool;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Working,
    Resetting { since: Nanos },
    Dead { since: Nanos },
    Stopped,
}

/// Since when something stands still.
#[derive(Default)]
struct Still(Option<Nanos>);

impl Still {
    fn too_long(&mut self, still: bool, now: Nanos) -> bool {
        if !still {
            self.0 = None;
            return false;
        }
        now.since(*self.0.get_or_insert(now)) >= STALL
    }
}

/// A card at work.
pub(crate) struct Driver<H> {
    hardware: H,
    state: State,
    link: Link,
    counters: Counters,
    next_look: Nanos,
    /// What a frame's way met, for the next look.
    fault: Option<Fault>,
    /// Say so when it works again.
    announce: bool,
    /// It was said that it is dead.
    told: bool,
    interrupts: bool,
    sending: Still,
    receiving: Still,
    /// Frames received when last looked at.
    seen: u64,
    /// Frames that came back from transmission since last looked at.
    sent: usize,
}

impl<H: Hardware> Driver<H> {
    /// Resets the card and sets it up. `wait` waits so many microseconds.
    pub(crate) fn open(mut hardware: H, wait: &mut dyn FnMut(u64)) -> Result<Self, Fault> {
        let memory = hardware.memory();
        if memory.bytes() < MEMORY || !memory.address().is_multiple_of(4096) {
            return Err(Fault::Memory);
        }
        if hardware.look() == Err(Fault::Gone) {
            return Err(Fault::Gone);
        }
        hardware.begin_reset();
        let mut waited = 0;
        loop {
            wait(SETTLE / 1000);
            waited += SETTLE;
            if hardware.reset_ended() {
                break;
            }
            if waited >= RESET_LIMIT {
                return Err(Fault::Reset);
            }
        }
        let link = match hardware.set_up().and_then(|()| hardware.look()) {
            Ok(link) => link,
            Err(fault) => {
                hardware.begin_reset();
                return Err(fault);
            }
        };
        Ok(Self {
            hardware,
            state: State::Working,
            link,
            counters: Counters::default(),
            next_look: Nanos::ZERO,
            fault: None,
            announce: false,
            told: false,
            interrupts: false,
            sending: Still::default(),
            receiving: Still::default(),
            seen: 0,
            sent: 0,
        })
    }

    fn reset(&mut self, now: Nanos) {
        self.counters.lost += self.hardware.pending() as u64;
        self.counters.resets += 1;
        self.hardware.begin_reset();
        self.state = State::Resetting { since: now };
        self.link = Link::default();
        self.fault = None;
        self.sending = Still::default();
        self.receiving = Still::default();
    }

    fn die(&mut self, fault: Fault, now: Nanos) -> Option<Event> {
        if fault != Fault::Gone {
            self.hardware.begin_reset();
        }
        self.state = State::Dead { since: now };
        self.link = Link::default();
        self.announce = true;
        let told = core::mem::replace(&mut self.told, true);
        (!told).then_some(Event::Dead(fault))
    }

    fn fail(&mut self, fault: Fault, now: Nanos) -> Option<Event> {
        if matches!(fault, Fault::Gone | Fault::Refuses) {
            self.counters.lost += self.hardware.pending() as u64;
            return self.die(fault, now);
        }
        self.reset(now);
        self.announce = true;
        Some(Event::Resetting(fault))
    }

    /// Looks at a card that works.
    fn look(&mut self, now: Nanos) -> Option<Event> {
        let link = match self.fault.map_or_else(|| self.hardware.look(), Err) {
            Ok(link) => link,
            Err(fault) => return self.fail(fault, now),
        };
        let missed = u64::from(self.hardware.missed());
        self.counters.missed += missed;
        self.hardware.tell();
        self.reclaim();
        let was = core::mem::replace(&mut self.link, link);
        if was.up && !link.up && self.hardware.pending() > 0 {
            // What waits for the link would go out late, when others have taken over.
            self.reset(now);
        }
        if was != link {
            return Some(Event::Link(link));
        }
        let sent = core::mem::take(&mut self.sent);
        let stuck = link.up && sent == 0 && self.hardware.pending() > 0;
        if self.sending.too_long(stuck, now) {
            return self.fail(Fault::Stalled(crate::Direction::Transmit), now);
        }
        // Frames are missed while all buffers are with the card.
        let came = self.counters.received + self.counters.errors + self.counters.malformed;
        let stuck = missed > 0 && came == self.seen && !self.hardware.ready();
        self.seen = came;
        if self.receiving.too_long(stuck, now) {
            return self.fail(Fault::Stalled(crate::Direction::Receive), now);
        }
        None
    }

    fn reclaim(&mut self) {
        match self.hardware.reclaim() {
            Ok(count) => self.sent += count,
            Err(fault) => self.broken(fault),
        }
    }

    /// Remembers a fault for the next look, which is then at once.
    fn broken(&mut self, fault: Fault) {
        self.fault = Some(fault);
        self.next_look = Nanos::ZERO;
    }
}

impl<H: Hardware> Nic for Driver<H> {
    fn mac(&self) -> MacAddr {
        self.hardware.mac()
    }

    fn link(&self) -> Link {
        self.link
    }

    fn works(&self) -> bool {
        self.state == State::Working
    }

    fn counters(&self) -> &Counters {
        &self.counters
    }

    fn transmit(&mut self, frame: &[&[u8]]) -> Result<(), TransmitError> {
        let length = frame
            .iter()
            .fold(0usize, |sum, piece| sum.saturating_add(piece.len()));
        if !(HEADER..=MAX_FRAME).contains(&length) {
            return Err(TransmitError::Size(length));
        }
        if self.state != State::Working {
            return Err(TransmitError::NotWorking);
        }
        if !self.link.up {
            return Err(TransmitError::LinkDown);
        }
        let mut slot = self.hardware.slot();
        if slot.is_none() {
            self.reclaim();
            slot = self.hardware.slot();
        }
        let Some(start) = slot else {
            self.hardware.tell();
            return Err(TransmitError::Full);
        };
        let memory = self.hardware.memory();
        let mut at = start;
        for piece in frame {
            memory.write(at, piece);
            at += piece.len();
        }
        if let Some(short) = MIN_FRAME.checked_sub(length) {
            memory.write(at, ZEROES.get(..short).unwrap_or_default());
        }
        self.hardware.post(length.max(MIN_FRAME));
        self.counters.transmitted += 1;
        self.counters.transmitted_bytes += length as u64;
        Ok(())
    }

    fn flush(&mut self) {
        if self.state == State::Working {
            self.hardware.tell();
        }
    }

    fn receive(&mut self, budget: usize, show: &mut dyn FnMut(&[u8])) -> usize {
        if self.state != State::Working || self.fault.is_some() {
            return 0;
        }
        let mut count = 0;
        // A ring at most: the card may fill it as fast as it is emptied.
        while count < budget.min(RING.into()) {
            match self.hardware.take() {
                Ok(None) => break,
                Ok(Some(taken)) => self.deliver(taken, show),
                Err(fault) => {
                    self.broken(fault);
                    break;
                }
            }
            self.hardware.recycle();
            count += 1;
        }
        if count > 0 {
            self.hardware.refill();
        }
        count
    }

    fn poll(&mut self, now: Nanos) -> Option<Event> {
        match self.state {
            State::Stopped => None,
            State::Working => {
                if now < self.next_look {
                    return None;
                }
                self.next_look = now + LOOK;
                self.look(now)
            }
            State::Resetting { since } => {
                let passed = now.since(since);
                if passed < SETTLE {
                    return None;
                }
                if !self.hardware.reset_ended() {
                    let over = passed >= RESET_LIMIT;
                    return over.then(|| self.die(Fault::Reset, now)).flatten();
                }
                if let Err(fault) = self.hardware.set_up() {
                    return self.die(fault, now);
                }
                self.hardware.set_interrupts(self.interrupts);
                self.state = State::Working;
                self.next_look = Nanos::ZERO;
                self.told = false;
                core::mem::take(&mut self.announce).then_some(Event::Restarted)
            }
            State::Dead { since } => {
                if now.since(since) >= RETRY {
                    if self.hardware.look() == Err(Fault::Gone) {
                        self.state = State::Dead { since: now };
                    } else {
                        self.reset(now);
                    }
                }
                None
            }
        }
    }

    fn set_interrupts(&mut self, on: bool) {
        self.interrupts = on;
        if self.state == State::Working {
            self.hardware.set_interrupts(on);
        }
    }

    fn interrupt(&mut self) -> bool {
        let ours = self.state == State::Working && self.hardware.acknowledge();
        if ours {
            self.next_look = Nanos::ZERO;
        }
        ours
    }

    fn stop(&mut self) {
        if !matches!(self.state, State::Dead { .. }) {
            self.hardware.begin_reset();
        }
        self.state = State::Stopped;
        self.link = Link::default();
    }
}

impl<H: Hardware> Driver<H> {
    fn deliver(&mut self, taken: Taken, show: &mut dyn FnMut(&[u8])) {
        let counters = &mut self.counters;
        match taken {
            Taken::Damaged => counters.errors += 1,
            Taken::Frame { offset, length }
                if (HEADER..=MAX_FRAME).contains(&length) && length <= BUFFER =>
            {
                counters.received += 1;
                counters.received_bytes += length as u64;
                self.hardware.memory().with(offset, length, show);
            }
            Taken::Frame { .. } | Taken::Malformed => counters.malformed += 1,
        }
    }
}
