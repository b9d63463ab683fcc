//! What strangers can send, and what must hold for all of it.
//!
//! Each target takes bytes and panics where something is wrong. libFuzzer drives them
//! (`cargo xtask test fuzz`); the seeds in `corpus` are played by `cargo test`, too.
#![forbid(unsafe_code)]

mod device;
mod switch;

pub use device::{console, net, rng};
pub use switch::{flow, frame};

/// A target.
pub type Target = fn(&[u8]);

/// The targets, by name.
pub const TARGETS: [(&str, Target); 5] = [
    ("frame", frame),
    ("flow", flow),
    ("net", net),
    ("rng", rng),
    ("console", console),
];

/// Bytes to take numbers from; behind the end there are zeroes.
struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (now, rest) = self.0.split_at(N.min(self.0.len()));
        self.0 = rest;
        let mut bytes = [0; N];
        bytes[..now.len()].copy_from_slice(now);
        bytes
    }
    fn u8(&mut self) -> u8 {
        u8::from_le_bytes(self.take())
    }
    fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.take())
    }
    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }
    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }
    /// Up to `most` bytes, by a length in front of them.
    fn some(&mut self, most: usize) -> &'a [u8] {
        let length = usize::from(self.u8()).min(most).min(self.0.len());
        let (now, rest) = self.0.split_at(length);
        self.0 = rest;
        now
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_and_a_little_is_taken_by_every_target() {
        for (_, target) in TARGETS {
            target(&[]);
            for byte in 0..=255 {
                target(&[byte; 40]);
            }
        }
    }

    #[test]
    fn the_seeds_are_taken() {
        for (name, target) in TARGETS {
            let folder = format!("{}/corpus/{name}", env!("CARGO_MANIFEST_DIR"));
            let files = std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{folder}: {e}"));
            let mut count = 0;
            for file in files {
                target(&std::fs::read(file.unwrap().path()).unwrap());
                count += 1;
            }
            assert!(count >= 4, "{name} has {count} seeds");
        }
    }
}
