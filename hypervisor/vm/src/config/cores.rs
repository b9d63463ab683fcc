//! A set of cores, as configurations name them.

/// Cores have numbers below this, in the order in which the machine has them.
pub const MAX_CORES: u16 = 256;

const WORDS: usize = MAX_CORES as usize / 64;

/// A set of cores: core `n` is bit `n % 64` of word `n / 64`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CoreSet(pub [u64; WORDS]);

impl CoreSet {
    /// Whether a core is in the set.
    #[must_use]
    pub fn contains(&self, core: u16) -> bool {
        let word = self.0.get(usize::from(core / 64));
        word.is_some_and(|word| word >> (core % 64) & 1 != 0)
    }

    /// The cores, in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = u16> {
        (0..MAX_CORES).filter(|core| self.contains(*core))
    }

    /// Adds what a list of cores and ranges such as `0-3,6` names; `None` if it is none.
    pub(super) fn add(&mut self, list: &str) -> Option<()> {
        for part in list.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let [first, last] = [first, last].map(|core| core.trim().parse::<u16>().ok());
            let (first, last) = (first?, last?);
            if first > last || last >= MAX_CORES {
                return None;
            }
            for core in first..=last {
                *self.0.get_mut(usize::from(core / 64))? |= 1 << (core % 64);
            }
        }
        Some(())
    }
}
