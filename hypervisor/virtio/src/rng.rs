//! The entropy device (virtio 1.2 §5.4): fills the buffers that the driver gives it.
//!
//! The bytes are the key stream of ChaCha20 (RFC 8439 §2.3), of which the first half block of each
//! call becomes the next key, so that what was given stays secret when the state comes to light.

use alloc::boxed::Box;

use arch::{GuestMemory, Nanos};

use crate::chain::{Chain, QueueError};
use crate::device::{Device, Signals};
use crate::queue::Queue;

const QUEUE_SIZE: u16 = 64;
/// The most bytes given for one buffer: a driver that wants more asks again.
const PIECE: usize = 256;
/// Bytes of a block of the key stream.
const BLOCK: usize = 64;
/// Bytes given in one go, each buffer counted as a block at least: some ten thousand instructions,
/// after which the core looks at what else there is.
const BUDGET: usize = 256;

/// The generator: its key.
struct Generator([u32; 8]);

impl Generator {
    fn new(seed: [u8; 32]) -> Self {
        let mut words = seed
            .as_chunks()
            .0
            .iter()
            .map(|word| u32::from_le_bytes(*word));
        Self(core::array::from_fn(|_| words.next().unwrap_or(0)))
    }

    /// One block of the key stream; `nonce` is counter and nonce of the standard.
    fn block(&self, nonce: [u32; 4]) -> [u32; 16] {
        let [e, f, g, h, i, j, k, l] = self.0;
        let start = [
            [0x6170_7865, 0x3320_646e, 0x7962_2d32, 0x6b20_6574],
            [e, f, g, h],
            [i, j, k, l],
            nonce,
        ];
        let [mut a, mut b, mut c, mut d] = start;
        for _ in 0..10 {
            // Columns; then diagonals, which are columns of rows moved along.
            for (left, right) in [(1, 3), (3, 1)] {
                mix(&mut a, &b, &mut d, 16);
                mix(&mut c, &d, &mut b, 12);
                mix(&mut a, &b, &mut d, 8);
                mix(&mut c, &d, &mut b, 7);
                b.rotate_left(left);
                c.rotate_left(2);
                d.rotate_left(right);
            }
        }
        let mut words = [0; 16];
        let rows = [a, b, c, d];
        let pairs = rows.as_flattened().iter().zip(start.as_flattened());
        for (word, (end, start)) in words.iter_mut().zip(pairs) {
            *word = end.wrapping_add(*start);
        }
        words
    }

    fn fill(&mut self, buf: &mut [u8]) {
        for (counter, piece) in (1..).zip(buf.chunks_mut(BLOCK)) {
            let block = self.block([counter, 0, 0, 0]);
            let bytes = block.iter().flat_map(|word| word.to_le_bytes());
            for (to, from) in piece.iter_mut().zip(bytes) {
                *to = from;
            }
        }
        let next = self.block([0; 4]);
        for (key, word) in self.0.iter_mut().zip(next) {
            *key = word;
        }
    }
}

/// A quarter of the quarter round (§2.1) on four columns at once.
fn mix(sum: &mut [u32; 4], of: &[u32; 4], to: &mut [u32; 4], shift: u32) {
    for ((sum, of), to) in sum.iter_mut().zip(of).zip(to) {
        *sum = sum.wrapping_add(*of);
        *to = (*to ^ *sum).rotate_left(shift);
    }
}

/// The device.
pub struct Rng {
    generator: Generator,
    queue: Option<Queue>,
    notified: bool,
    signals: Signals,
    chain: Box<Chain>,
}

impl Rng {
    /// A device whose bytes all come from `seed`, which must be random.
    #[must_use]
    pub fn new(seed: [u8; 32]) -> Self {
        Self {
            generator: Generator::new(seed),
            queue: None,
            notified: false,
            signals: Signals::default(),
            chain: Box::default(),
        }
    }

    /// Fills buffers, a bounded number of bytes. `true`: there may be more.
    fn fill(&mut self, mem: &mut dyn GuestMemory) -> Result<bool, QueueError> {
        let Some(queue) = &mut self.queue else {
            return Ok(false);
        };
        let mut more = true;
        let mut budget = BUDGET;
        while budget > 0 {
            if !queue.pop(mem, &mut self.chain)? {
                more = false;
                break;
            }
            let mut bytes = [0; PIECE];
            let length = self.chain.writable_bytes().min(PIECE as u64) as usize;
            let bytes = bytes.get_mut(..length).unwrap_or_default();
            self.generator.fill(bytes);
            let written = self.chain.write(mem, 0, bytes)?;
            budget = budget.saturating_sub(written.max(BLOCK));
            // One or more bytes it has to be (§5.4.6.2).
            if written == 0 {
                return Err(QueueError::Request {
                    found: 0,
                    wanted: 1,
                });
            }
            queue.push(mem, self.chain.token(), written as u32)?;
        }
        if queue.wants_interrupt(mem)? {
            self.signals.queues |= 1;
        }
        if !more {
            queue.ask_for_notification(mem, true)?;
            more = queue.has_next(mem)?;
        }
        Ok(more)
    }
}

impl Device for Rng {
    fn kind(&self) -> u16 {
        4
    }
    fn class(&self) -> u32 {
        0xff_0000
    }
    fn features(&self) -> u64 {
        0
    }
    fn queues(&self) -> u16 {
        1
    }
    fn queue_size(&self, _index: u16) -> u16 {
        QUEUE_SIZE
    }
    fn config_size(&self) -> u32 {
        0
    }
    fn read_config(&mut self, _offset: u32, _buf: &mut [u8]) {}
    fn start(&mut self, _features: u64) {}
    fn attach(&mut self, _index: u16, queue: Queue) {
        (self.queue, self.notified) = (Some(queue), true);
    }
    fn detach(&mut self, _index: u16) {
        self.queue = None;
    }
    fn reset(&mut self) {
        (self.queue, self.notified) = (None, false);
        self.signals = Signals::default();
    }
    fn notify(&mut self, _index: u16) {
        self.notified = true;
    }
    fn wants_service(&self) -> bool {
        self.notified && self.queue.is_some()
    }
    fn serve(&mut self, mem: &mut dyn GuestMemory, _now: Nanos) {
        match self.fill(mem) {
            Ok(more) => self.notified = more,
            Err(_) => (self.notified, self.signals.broken) = (false, true),
        }
    }
    fn take_signals(&mut self) -> Signals {
        core::mem::take(&mut self.signals)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::features;
    use crate::testing::{Driver, Ram, kinds};

    #[test]
    fn the_key_stream_is_that_of_the_standard() {
        // RFC 8439 §2.3.2.
        let generator = Generator::new(core::array::from_fn(|n| n as u8));
        let block = generator.block([1, 0x0900_0000, 0x4a00_0000, 0]);
        assert_eq!(
            block[..4],
            [0xe4e7_f110, 0x1559_3bd1, 0x1fdd_0f50, 0xc471_20a3]
        );
        assert_eq!(
            block[12..],
            [0xd19c_12b5, 0xb94e_16de, 0xe883_d0cb, 0x4e3c_50a2]
        );
    }

    #[test]
    fn no_two_calls_give_the_same() {
        let mut generator = Generator::new([1; 32]);
        let mut seen = std::collections::HashSet::new();
        for length in [1usize, 32, 64, 65, 256, 32] {
            let mut bytes = vec![0; length];
            generator.fill(&mut bytes);
            assert!(seen.insert(bytes.clone()) && (length < 8 || bytes.iter().any(|b| *b != 0)));
        }
    }

    #[test]
    fn each_buffer_gets_bytes_and_says_how_many() {
        for kind in kinds() {
            let mut ram = Ram::new(0x8_0000);
            let mut driver = Driver::new(0x1_0000, 64, kind);
            let mut rng = Rng::new([3; 32]);
            rng.start(kind);
            rng.attach(0, driver.queue());
            driver.want_interrupt(&mut ram, true);
            for (n, length) in [1u32, 16, 256, 5000].into_iter().enumerate() {
                let at = 0x4_0000 + 0x2000 * n as u64;
                let parts = [(at, length.min(7), true), (at + 7, length.max(7) - 7, true)];
                driver.offer(&mut ram, &parts, true).unwrap();
            }
            rng.notify(0);
            let mut goes = 0;
            while rng.wants_service() {
                rng.serve(&mut ram, Nanos::ZERO);
                goes += 1;
            }
            assert_eq!(goes, 3, "no more than its budget in one go");
            assert_eq!(rng.take_signals().queues, 1);
            for (n, want) in [1, 16, 256, 256].into_iter().enumerate() {
                assert_eq!(driver.take(&mut ram).unwrap().1, want);
                let bytes: [u8; 512] = ram.get(0x4_0000 + 0x2000 * n as u64);
                let (given, rest) = bytes.split_at(want as usize);
                assert!(given.iter().any(|b| *b != 0) && rest.iter().all(|b| *b == 0));
            }
        }
    }

    #[test]
    fn a_request_without_room_breaks_the_rules() {
        let mut ram = Ram::new(0x8_0000);
        let mut driver = Driver::new(0x1_0000, 64, features::VERSION_1);
        let mut rng = Rng::new([3; 32]);
        rng.attach(0, driver.queue());
        driver.offer(&mut ram, &[(0x4_0000, 8, false)], false);
        rng.serve(&mut ram, Nanos::ZERO);
        assert!(rng.take_signals().broken && !rng.wants_service());
        rng.reset();
        rng.notify(0);
        assert!(!rng.wants_service(), "no queue");
    }
}
