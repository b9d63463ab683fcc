//! Sets of cores: where a vCPU may run, which cores idle, which are to be interrupted.

use crate::CoreId;
use core::fmt;

/// How many cores a machine may have.
pub const MAX_CORES: u16 = 256;

const WORDS: usize = MAX_CORES as usize / 64;

/// A set of cores, one bit each.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct CoreSet([u64; WORDS]);

impl CoreSet {
    /// No core.
    pub const EMPTY: Self = Self([0; WORDS]);
    /// Every core that there is or will be.
    pub const ALL: Self = Self([u64::MAX; WORDS]);

    /// One core.
    #[must_use]
    pub fn only(core: CoreId) -> Self {
        let mut set = Self::EMPTY;
        set.insert(core);
        set
    }

    /// Adds what a list of cores and ranges such as `0-3,6` names; `None` if it is none.
    pub fn add_list(&mut self, list: &str) -> Option<()> {
        // Digits alone: Rust's own parser takes a sign as well.
        let number = |text: &str| -> Option<u16> {
            let digits = text.bytes().all(|byte| byte.is_ascii_digit());
            digits.then(|| text.parse().ok())?
        };
        for part in list.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last) = (number(first.trim())?, number(last.trim())?);
            if first > last || last >= MAX_CORES {
                return None;
            }
            (first..=last).for_each(|core| self.insert(CoreId(core)));
        }
        Some(())
    }

    /// Adds a core. Numbers from [`MAX_CORES`] on are left out.
    pub fn insert(&mut self, core: CoreId) {
        if let Some(word) = self.0.get_mut(usize::from(core.0 / 64)) {
            *word |= 1 << (core.0 % 64);
        }
    }

    /// Takes a core out; true if it was in.
    pub fn remove(&mut self, core: CoreId) -> bool {
        let was = self.contains(core);
        if let Some(word) = self.0.get_mut(usize::from(core.0 / 64)) {
            *word &= !(1 << (core.0 % 64));
        }
        was
    }

    /// Whether a core is in.
    #[must_use]
    pub fn contains(&self, core: CoreId) -> bool {
        self.0
            .get(usize::from(core.0 / 64))
            .is_some_and(|word| word >> (core.0 % 64) & 1 != 0)
    }

    /// Whether no core is in.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|word| *word == 0)
    }

    /// How many cores are in.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.0.iter().map(|word| word.count_ones()).sum()
    }

    /// The cores that are in both.
    #[must_use]
    pub fn and(&self, other: &Self) -> Self {
        self.with(other, |a, b| a & b)
    }

    /// The cores that are in this set and not in the other.
    #[must_use]
    pub fn minus(&self, other: &Self) -> Self {
        self.with(other, |a, b| a & !b)
    }

    fn with(&self, other: &Self, join: fn(u64, u64) -> u64) -> Self {
        let mut set = *self;
        for (word, other) in set.0.iter_mut().zip(other.0) {
            *word = join(*word, other);
        }
        set
    }

    /// The first core from this one on.
    #[must_use]
    pub fn first_from(&self, core: u16) -> Option<CoreId> {
        let mut at = usize::from(core / 64);
        let mut mask = u64::MAX << (core % 64);
        while let Some(word) = self.0.get(at) {
            let rest = word & mask;
            if rest != 0 {
                return Some(CoreId(at as u16 * 64 + rest.trailing_zeros() as u16));
            }
            (at, mask) = (at + 1, u64::MAX);
        }
        None
    }

    /// The first core that is in both.
    #[must_use]
    pub fn first_common(&self, other: &Self) -> Option<CoreId> {
        (0..WORDS).find_map(|at| {
            let both = self.0[at] & other.0[at];
            (both != 0).then(|| CoreId(at as u16 * 64 + both.trailing_zeros() as u16))
        })
    }

    /// The cores in order.
    pub fn iter(&self) -> impl Iterator<Item = CoreId> + use<> {
        let set = *self;
        let mut next = set.first_from(0);
        core::iter::from_fn(move || {
            let core = next?;
            next = set.first_from(core.0 + 1);
            Some(core)
        })
    }
}

impl FromIterator<CoreId> for CoreSet {
    fn from_iter<T: IntoIterator<Item = CoreId>>(cores: T) -> Self {
        let mut set = Self::EMPTY;
        for core in cores {
            set.insert(core);
        }
        set
    }
}

impl fmt::Debug for CoreSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Self::ALL {
            return f.write_str("all");
        }
        f.debug_set()
            .entries(self.iter().map(|core| core.0))
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_holds_what_was_put_in() {
        let cores = [0, 1, 63, 64, 200, 255].map(CoreId);
        let mut set: CoreSet = cores.into_iter().collect();
        assert!(set.iter().eq(cores));
        assert_eq!(set.len(), 6);
        assert!(set.remove(CoreId(64)) && !set.remove(CoreId(64)));
        assert!(!set.contains(CoreId(64)) && set.contains(CoreId(63)));
        set.insert(CoreId(256));
        assert_eq!(set.len(), 5);
        assert_eq!(set.and(&CoreSet::ALL), set);
        assert!(set.minus(&CoreSet::ALL).is_empty());
        assert_eq!(set.first_from(64), Some(CoreId(200)));
        assert_eq!(
            set.first_common(&CoreSet::only(CoreId(255))),
            Some(CoreId(255))
        );
        assert_eq!(CoreSet::EMPTY.first_common(&set), None);
        assert_eq!(format!("{set:?}"), "{0, 1, 63, 200, 255}");
    }

    #[test]
    fn lists_name_cores_and_ranges() {
        let read = |list: &str| {
            let mut set = CoreSet::EMPTY;
            set.add_list(list).map(|()| set)
        };
        let cores = [0, 1, 2, 3, 6, 255].map(CoreId);
        assert_eq!(read("0-3, 6,255"), Some(cores.into_iter().collect()));
        for wrong in [
            "",
            "3-1",
            "256",
            "1,",
            "-2",
            "+1",
            "1-2-3",
            "a",
            "99999999999",
        ] {
            assert_eq!(read(wrong), None, "{wrong}");
        }
    }
}
