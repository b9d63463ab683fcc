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
        let [a, b, c, d] = [0x6170_7865, 0x3320_646e, 0x7962_2d32, 0x6b20_6574];
        let [e, f, g, h, i, j, k, l] = self.0;
        let [m, n, o, p] = nonce;
        let start = [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p];
        let mut state = start;
        for _ in 0..10 {
            for column in 0..4 {
                quarter(&mut state, [column, 4 + column, 8 + column, 12 + column]);
            }
            for diagonal in 0..4 {
                let at = |row: usize| 4 * row + (diagonal + row) % 4;
                quarter(&mut state, [at(0), at(1), at(2), at(3)]);
            }
        }
        for (word, first) in state.iter_mut().zip(start) {
            *word = word.wrapping_add(first);
        }
        state
    }

    fn fill(&mut self, buf: &mut [u8]) {
        for (counter, piece) in (1..).zip(buf.chunks_mut(64)) {
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

/// The quarter round on these words of the state.
fn quarter(state: &mut [u32; 16], [a, b, c, d]: [usize; 4]) {
    // The places are constants below 16.
    for (a, b, c, shift) in [(a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)] {
        state[a & 15] = state[a & 15].wrapping_add(state[b & 15]);
        state[c & 15] = (state[c & 15] ^ state[a & 15]).rotate_left(shift);
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

    /// Fills at most a queue's worth of buffers. `true`: there may be more.
    fn fill(&mut self, mem: &mut dyn GuestMemory) -> Result<bool, QueueError> {
        let Some(queue) = &mut self.queue else {
            return Ok(false);
        };
        let mut more = true;
        for _ in 0..QUEUE_SIZE {
            if !queue.pop(mem, &mut self.chain)? {
                more = false;
                break;
            }
            let mut bytes = [0; PIECE];
            self.generator.fill(&mut bytes);
            let written = self.chain.write(mem, 0, &bytes)?;
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
