//! Random damage for tests, the same on every run.

/// Marsaglia's xorshift.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// A number below `bound`.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % bound
    }

    /// Changes up to four bytes of `image[start..start + length]`, and now and then cuts it off.
    pub(crate) fn damage(&mut self, image: &mut Vec<u8>, start: u64, length: u64) {
        const TELLING: [u8; 6] = [0, 1, 0x7f, 0x80, 0xf0, 0xff];
        for _ in 0..=self.below(4) {
            let at = (start + self.below(length)) as usize;
            let value = match self.below(8) {
                n @ 0..6 => TELLING[n as usize],
                _ => self.below(256) as u8,
            };
            if let Some(byte) = image.get_mut(at) {
                *byte = value;
            }
        }
        if self.below(16) == 0 {
            image.truncate(self.below(image.len() as u64 + 1) as usize);
        }
    }
}
