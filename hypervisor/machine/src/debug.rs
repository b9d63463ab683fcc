//! Ports that test kernels and firmware talk to: a debug exit (0xf4, and Bochs' own at 0x8900), a
//! debug console (0xe9) and the POST code latch (0x80). All but the latch exist only where the VM's
//! configuration asks for them.

use heapless::Deque;
use serde::{Deserialize, Serialize};

/// Bytes that can wait for the owner to print them.
const OUTPUT: usize = 1024;
/// What, written byte by byte to port 0x8900, switches Bochs off.
const SHUTDOWN: &[u8] = b"Shutdown";

/// The ports' state.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Debug {
    exit_enabled: bool,
    console_enabled: bool,
    post: u8,
    /// How much of [`SHUTDOWN`] was written.
    shutdown: u8,
    output: Deque<u8, OUTPUT>,
    /// Bytes written while the buffer was full.
    lost: u64,
}

impl Debug {
    /// What a read of the console port gives where there is one.
    const PRESENT: u8 = 0xe9;

    /// The ports that are there.
    #[must_use]
    pub fn new(exit_enabled: bool, console_enabled: bool) -> Self {
        Self {
            exit_enabled,
            console_enabled,
            ..Self::default()
        }
    }

    /// The last POST code.
    #[must_use]
    pub const fn post(&self) -> u8 {
        self.post
    }

    /// Latches a POST code.
    pub const fn set_post(&mut self, code: u8) {
        self.post = code;
    }

    /// Whether port 0xf4 is there.
    #[must_use]
    pub const fn exit_enabled(&self) -> bool {
        self.exit_enabled
    }

    /// The code with which writing `value` to port 0xf4 ends the VM.
    #[must_use]
    pub const fn exit_code(value: u32) -> u32 {
        value << 1 | 1
    }

    /// Takes a byte written to port 0x8900: whether it completes the word that switches off. `None`
    /// where there is no such port.
    pub fn write_shutdown(&mut self, byte: u8) -> Option<bool> {
        self.exit_enabled.then(|| {
            let expected = SHUTDOWN.get(usize::from(self.shutdown)) == Some(&byte);
            self.shutdown = match expected {
                true => self.shutdown + 1,
                false => (Some(&byte) == SHUTDOWN.first()).into(),
            };
            let complete = usize::from(self.shutdown) == SHUTDOWN.len();
            if complete {
                self.shutdown = 0;
            }
            complete
        })
    }

    /// Reads port 0xe9; `None` where there is none.
    #[must_use]
    pub fn read_console(&self) -> Option<u8> {
        self.console_enabled.then_some(Self::PRESENT)
    }

    /// Writes bytes to port 0xe9; `false` where there is none.
    pub fn write_console(&mut self, bytes: &[u8]) -> bool {
        if self.console_enabled {
            for &byte in bytes {
                if self.output.push_back(byte).is_err() {
                    self.lost = self.lost.saturating_add(1);
                }
            }
        }
        self.console_enabled
    }

    /// Bytes that can be written before any is lost.
    #[must_use]
    pub fn room(&self) -> usize {
        OUTPUT - self.output.len()
    }

    /// Bytes that were lost because nobody took the output.
    #[must_use]
    pub const fn lost(&self) -> u64 {
        self.lost
    }

    /// Hands what was written to `print`, in up to two pieces.
    pub fn take_output(&mut self, print: &mut impl FnMut(&[u8])) {
        let (first, second) = self.output.as_slices();
        for piece in [first, second] {
            if !piece.is_empty() {
                print(piece);
            }
        }
        self.output.clear();
    }
}
