//! What was decided for the last frames' keys: one cache per core and switch, of fixed size.
//!
//! It is set-associative: a key's keyed hash names a set of eight, and nothing outside of it is
//! looked at, so a lookup takes the same bounded time whatever guests send. Within a set it is the
//! port with the most entries that gives one up: a guest that sprays random headers displaces its
//! own decisions, not its neighbours'. Decisions of an older state of the switch carry its
//! generation and are never used.

use alloc::vec::Vec;

use crate::PortId;
use crate::counters::DropCause;
use crate::key::{FlowKey, KEY_WORDS};
use crate::tables::FlowIndex;
use crate::translate::Step;

/// Entries of a set.
const WAYS: usize = 8;

/// How many steps a decision may have to be kept. One with more has many outputs, and copying to
/// those costs more than deciding again.
pub(crate) const INLINE: usize = 8;

/// How many flows may have decided a decision that is kept.
pub(crate) const HITS: usize = 4;

/// A keyed hash of a few words: multiplications of pairs of words, each hidden by a word of the
/// secret (the NH family, Black and others, UMAC, 1999), folded and mixed. Who does not know the
/// secret finds collisions by luck alone.
#[derive(Clone, Debug)]
pub struct Hasher([u64; KEY_WORDS]);

impl Hasher {
    /// Takes 128 bits that nobody guesses.
    #[must_use]
    pub fn new(secret: [u64; 2]) -> Self {
        let mut state = secret[0];
        Self([(); KEY_WORDS].map(|()| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            mix(state, secret[1])
        }))
    }

    /// The hash of up to [`KEY_WORDS`] words.
    #[must_use]
    pub fn hash(&self, words: &[u64]) -> u64 {
        let mut sum = 0u128;
        let secrets = self.0.chunks_exact(2);
        for (pair, secret) in words.chunks(2).zip(secrets) {
            if let ([a, rest @ ..], [c, d]) = (pair, secret) {
                let b = rest.first().copied().unwrap_or(0);
                let product = u128::from(a.wrapping_add(*c)) * u128::from(b.wrapping_add(*d));
                sum = sum.wrapping_add(product);
            }
        }
        mix(sum as u64 ^ (sum >> 64) as u64, self.0[0])
    }

    /// The same of a whole key, which is what is hashed for each frame.
    fn hash_key(&self, words: &[u64; KEY_WORDS]) -> u64 {
        let mut sum = 0u128;
        let (words, _) = words.as_chunks::<2>();
        let (secrets, _) = self.0.as_chunks::<2>();
        for ([a, b], [c, d]) in words.iter().zip(secrets) {
            let product = u128::from(a.wrapping_add(*c)) * u128::from(b.wrapping_add(*d));
            sum = sum.wrapping_add(product);
        }
        mix(sum as u64 ^ (sum >> 64) as u64, self.0[0])
    }
}

/// Spreads what two words have over one.
const fn mix(word: u64, key: u64) -> u64 {
    let product = (word ^ key) as u128 * 0xd6e8_feb8_6659_fd93;
    let folded = product as u64 ^ (product >> 64) as u64;
    let product = (folded ^ key.rotate_left(32)) as u128 * 0xa076_1d64_78bd_642f;
    product as u64 ^ (product >> 64) as u64
}

/// What is done with the frames of a key, beside the steps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Notes {
    /// Why they go nowhere, or not everywhere.
    pub drop: Option<DropCause>,
    /// They count against the storm limit.
    pub storm: bool,
    /// Meters, limited ports or captures are among the steps: they are looked at one by one.
    pub careful: bool,
    /// Where their source was learned.
    pub learned: Option<u32>,
    /// How many flows decided.
    pub hits: u8,
}

#[derive(Clone, Debug)]
struct Entry {
    key: FlowKey,
    generation: u64,
    notes: Notes,
    count: u8,
    steps: [Step; INLINE],
    hits: [FlowIndex; HITS],
}

#[derive(Clone, Copy, Debug)]
struct Way {
    hash: u64,
    used: u64,
    port: PortId,
}

/// A cache of decisions.
#[derive(Clone, Debug)]
pub struct Cache {
    ways: Vec<[Way; WAYS]>,
    entries: Vec<Entry>,
    hasher: Hasher,
    clock: u64,
    /// Where the last look-up found something.
    last: usize,
    hits: u64,
    misses: u64,
}

impl Cache {
    /// With room for `entries` decisions, rounded up to a power of two of sets; 0 keeps nothing.
    #[must_use]
    pub fn new(entries: usize, secret: [u64; 2]) -> Self {
        let sets = match entries {
            0 => 0,
            entries => entries.div_ceil(WAYS).next_power_of_two(),
        };
        let way = Way {
            hash: 0,
            used: 0,
            port: PortId::NONE,
        };
        let entry = Entry {
            key: FlowKey::default(),
            generation: 0,
            notes: Notes::default(),
            count: 0,
            steps: [Step::PopVlan; INLINE],
            hits: [FlowIndex::default(); HITS],
        };
        Self {
            ways: alloc::vec![[way; WAYS]; sets],
            entries: alloc::vec![entry; sets * WAYS],
            hasher: Hasher::new(secret),
            clock: 0,
            last: 0,
            hits: 0,
            misses: 0,
        }
    }

    /// How many lookups found something, and how many did not.
    #[must_use]
    pub fn statistics(&self) -> (u64, u64) {
        (self.hits, self.misses)
    }

    /// The hash of a key: for [`find`](Self::find) and [`insert`](Self::insert).
    fn hash(&self, key: &FlowKey) -> u64 {
        self.hasher.hash_key(key.words())
    }

    /// Where what was decided for `key` is.
    ///
    /// # Errors
    /// Nowhere: its hash, for [`insert`](Self::insert).
    pub(crate) fn look_up(&mut self, key: &FlowKey, generation: u64) -> Result<usize, u64> {
        // Frames of a flow come in bursts.
        if let Some(entry) = self.entries.get(self.last)
            && entry.generation == generation
            && same(entry.key.words(), key.words())
        {
            self.hits += 1;
            return Ok(self.last);
        }
        let hash = self.hash(key);
        self.last = self.find(hash, key, generation).ok_or(hash)?;
        Ok(self.last)
    }

    fn set(&self, hash: u64) -> usize {
        // The high half: the low one is compared.
        (hash >> 32) as usize & self.ways.len().saturating_sub(1)
    }

    fn find(&mut self, hash: u64, key: &FlowKey, generation: u64) -> Option<usize> {
        let set = self.set(hash);
        self.clock += 1;
        let clock = self.clock;
        for (way, place) in self
            .ways
            .get_mut(set)
            .into_iter()
            .flatten()
            .zip(set * WAYS..)
        {
            if way.hash == hash
                && let Some(entry) = self.entries.get(place)
                && entry.generation == generation
                && same(entry.key.words(), key.words())
            {
                way.used = clock;
                self.hits += 1;
                return Some(place);
            }
        }
        self.misses += 1;
        None
    }

    /// The decision at a place.
    pub(crate) fn get(&self, place: usize) -> Option<(&[Step], &[FlowIndex], Notes)> {
        let entry = self.entries.get(place)?;
        let steps = entry.steps.get(..entry.count.into())?;
        Some((
            steps,
            entry.hits.get(..entry.notes.hits.into())?,
            entry.notes,
        ))
    }

    /// Keeps a decision, unless it has too many steps, or too many flows decided it.
    pub(crate) fn insert(
        &mut self,
        hash: u64,
        key: &FlowKey,
        generation: u64,
        (steps, hits): (&[Step], &[FlowIndex]),
        notes: Notes,
    ) {
        let (set, clock) = (self.set(hash), self.clock);
        let Some(ways) = self.ways.get_mut(set) else {
            return;
        };
        let entries = self.entries.get_mut(set * WAYS..).unwrap_or(&mut []);
        let victim = victim(ways, entries, generation, key.in_port);
        let (Some(way), Some(entry)) = (ways.get_mut(victim), entries.get_mut(victim)) else {
            return;
        };
        let kept = entry.steps.get_mut(..steps.len());
        let (Some(kept), Some(by)) = (kept, entry.hits.get_mut(..hits.len())) else {
            return;
        };
        kept.copy_from_slice(steps);
        by.copy_from_slice(hits);
        entry.count = steps.len() as u8;
        (entry.key, entry.generation, entry.notes) = (*key, generation, notes);
        entry.notes.hits = hits.len() as u8;
        *way = Way {
            hash,
            used: clock,
            port: key.in_port,
        };
    }
}

/// Whether two keys are the same, without a branch for each word.
fn same(a: &[u64; KEY_WORDS], b: &[u64; KEY_WORDS]) -> bool {
    a.iter().zip(b).fold(0, |all, (a, b)| all | (a ^ b)) == 0
}

/// Which entry of a set makes room for one of `port`: one of an older generation, or the least
/// recently used of the port that has most, the new one counted.
fn victim(ways: &[Way; WAYS], entries: &[Entry], generation: u64, port: PortId) -> usize {
    let mut best = (0, u64::MAX);
    let mut at = 0;
    let ports = ways.each_ref().map(|way| way.port.0);
    for (place, (way, entry)) in ways.iter().zip(entries).enumerate() {
        if entry.generation != generation {
            return place;
        }
        // Compared all at once.
        let own = way.port.0;
        let same: u16 = ports.iter().map(|other| u16::from(*other == own)).sum();
        let share = same + u16::from(way.port == port);
        if share > best.0 || (share == best.0 && way.used < best.1) {
            (best, at) = ((share, way.used), place);
        }
    }
    at
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SECRET: [u64; 2] = [0x0123_4567, 0x89ab_cdef];

    fn key(port: u16, n: u64) -> FlowKey {
        let mut key = FlowKey {
            in_port: PortId(port),
            ..FlowKey::default()
        };
        key.nw_src[..8].copy_from_slice(&n.to_le_bytes());
        key
    }

    fn keep(cache: &mut Cache, key: &FlowKey, out: u16) {
        let hash = cache.hash(key);
        assert_eq!(cache.find(hash, key, 1), None);
        let steps = [Step::Output(PortId(out))];
        cache.insert(hash, key, 1, (&steps, &[]), Notes::default());
    }

    fn has(cache: &mut Cache, key: &FlowKey, generation: u64) -> Option<Vec<Step>> {
        let place = cache.find(cache.hash(key), key, generation)?;
        cache.get(place).map(|(steps, ..)| steps.to_vec())
    }

    #[test]
    fn a_decision_is_found_until_the_generation_changes() {
        let mut cache = Cache::new(64, SECRET);
        keep(&mut cache, &key(1, 1), 7);
        assert_eq!(
            has(&mut cache, &key(1, 1), 1),
            Some(vec![Step::Output(PortId(7))])
        );
        assert_eq!(has(&mut cache, &key(1, 2), 1), None);
        assert_eq!(has(&mut cache, &key(2, 1), 1), None);
        assert_eq!(has(&mut cache, &key(1, 1), 2), None);
        assert_eq!(cache.statistics(), (1, 4));
    }

    #[test]
    fn a_cache_of_nothing_keeps_nothing() {
        let mut cache = Cache::new(0, SECRET);
        keep(&mut cache, &key(1, 1), 7);
        assert_eq!(has(&mut cache, &key(1, 1), 1), None);
    }

    #[test]
    fn what_has_too_many_steps_is_not_kept() {
        let mut cache = Cache::new(8, SECRET);
        let (key, steps) = (key(1, 1), [Step::PopVlan; INLINE + 1]);
        let hash = cache.hash(&key);
        cache.insert(hash, &key, 1, (&steps, &[]), Notes::default());
        assert_eq!(has(&mut cache, &key, 1), None);
        cache.insert(hash, &key, 1, (&steps[1..], &[]), Notes::default());
        assert_eq!(
            has(&mut cache, &key, 1).map(|steps| steps.len()),
            Some(INLINE)
        );
    }

    #[test]
    fn who_sprays_displaces_his_own() {
        let mut cache = Cache::new(256, SECRET);
        for n in 0..32 {
            keep(&mut cache, &key(1, n), 1);
        }
        let known: Vec<u64> = (0..32)
            .filter(|n| has(&mut cache, &key(1, *n), 1).is_some())
            .collect();
        assert!(known.len() >= 30);
        for n in 1_000..100_000 {
            keep(&mut cache, &key(2, n), 2);
        }
        let left = known
            .iter()
            .filter(|n| has(&mut cache, &key(1, **n), 1).is_some())
            .count();
        // Up to four of a set stay; a set that had more gave up the rest.
        assert!(left * 10 >= known.len() * 9, "{left} of {}", known.len());
    }

    #[test]
    fn hashes_spread_and_depend_on_the_secret() {
        let (one, other) = (Hasher::new(SECRET), Hasher::new([SECRET[0], 1]));
        let mut sets = [0; 64];
        for n in 0..6400 {
            let hash = one.hash(key(1, n).words());
            assert_ne!(hash, other.hash(key(1, n).words()));
            sets[(hash >> 32) as usize & 63] += 1;
        }
        assert!(
            sets.iter().all(|count| (50..170).contains(count)),
            "{sets:?}"
        );
    }

    proptest! {
        #[test]
        fn every_bit_of_a_key_counts(word in 0..KEY_WORDS, bit in 0..64, base in any::<u64>()) {
            let hasher = Hasher::new(SECRET);
            let words = [base; KEY_WORDS];
            let mut other = words;
            other[word] ^= 1u64 << bit;
            prop_assert_ne!(hasher.hash(&words), hasher.hash(&other));
        }
    }
}
