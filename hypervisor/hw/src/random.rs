//! Where the machine's randomness comes from: RDRAND (SDM Vol. 1 §7.3.17), stirred together with the
//! time stamp counter, which is all there is where the processor has no such instruction.

use x86_64::instructions::random::RdRand;

use crate::clock::rdtsc;

/// How often the counter is read for each word; its low bits depend on what memory and caches do.
const READS: u32 = 64;
/// How often RDRAND is tried; it may be out of entropy for a moment.
const TRIES: u32 = 10;

/// A seed for a generator, another one with each call.
#[must_use]
pub fn random_seed() -> [u8; 32] {
    let source = RdRand::new();
    let mut seed = [0; 32];
    let mut state = 0u64;
    for word in seed.chunks_exact_mut(8) {
        for _ in 0..READS {
            state = (state ^ rdtsc()).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            state ^= state >> 29;
        }
        let drawn = source.and_then(|source| (0..TRIES).find_map(|_| source.get_u64()));
        word.copy_from_slice(&(state ^ drawn.unwrap_or(0)).to_le_bytes());
    }
    seed
}
