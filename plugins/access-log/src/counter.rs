//! Counting without end in memory that has one.

use std::borrow::Borrow;
use std::collections::hash_map::RandomState;
use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher, Hash};

/// How often each thing was seen. Exact up to a number of different things; beyond it the rarest are forgotten, and what is reported for the
/// rest may be too low by at most [`Counter::error`].
#[derive(Debug)]
pub(crate) struct Counter<K> {
    counts: HashMap<K, u64>,
    different_max: usize,
    error: u64,
}

impl<K: Clone + Hash + Ord> Counter<K> {
    pub(crate) fn new(different_max: usize) -> Self {
        Self { counts: HashMap::new(), different_max, error: 0 }
    }

    /// Counts one, which is made into a key only if it is new.
    pub(crate) fn add<Q: Hash + Eq + ?Sized + ToOwned<Owned = K>>(&mut self, thing: &Q)
    where
        K: Borrow<Q>,
    {
        if let Some(count) = self.counts.get_mut(thing) {
            *count += 1;
            return;
        }
        if self.counts.len() >= self.different_max {
            self.forget_the_rarest();
        }
        self.counts.insert(thing.to_owned(), 1);
    }

    /// By how much a count may be too low. 0: all are exact.
    pub(crate) fn error(&self) -> u64 {
        self.error
    }

    /// The `most` that were seen most often, most first; the same number in the order of the keys.
    pub(crate) fn top(&self, most: usize) -> Vec<(&K, u64)> {
        let mut all: Vec<(&K, u64)> = self.counts.iter().map(|(key, count)| (key, *count)).collect();
        all.sort_unstable_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(b.0)));
        all.truncate(most);
        all
    }

    /// All of them in the order of the keys.
    pub(crate) fn sorted(&self) -> Vec<(&K, u64)> {
        let mut all = self.top(usize::MAX);
        all.sort_unstable_by(|a, b| a.0.cmp(b.0));
        all
    }

    /// Takes the lower half of the counts away. Whoever comes back begins at 1, so what was forgotten adds to the error.
    fn forget_the_rarest(&mut self) {
        let mut counts: Vec<u64> = self.counts.values().copied().collect();
        let middle = counts.len() / 2;
        let (_, median, _) = counts.select_nth_unstable(middle);
        let median = *median;
        self.error += median;
        self.counts.retain(|_, count| *count > median);
    }
}

/// How many different visitors there were, and who.
///
/// Exact up to a number of them. Beyond it only a sample chosen by their hash is kept, a half, a quarter and so on, and the number is an estimate
/// (within one per cent, most likely, for the number used here).
#[derive(Debug)]
pub(crate) struct Visitors {
    kept: HashSet<String>,
    kept_max: usize,
    /// Of the hashes only those that end in so many zero bits are kept.
    zero_bits: u32,
    hasher: RandomState,
}

impl Visitors {
    pub(crate) fn new(kept_max: usize) -> Self {
        Self { kept: HashSet::new(), kept_max, zero_bits: 0, hasher: RandomState::new() }
    }

    pub(crate) fn add(&mut self, address: &str) {
        if !self.is_sampled(address) || self.kept.contains(address) {
            return;
        }
        self.kept.insert(address.to_owned());
        while self.kept.len() > self.kept_max {
            self.zero_bits += 1;
            let (hasher, zero_bits) = (&self.hasher, self.zero_bits);
            self.kept.retain(|address| hasher.hash_one(address.as_str()).trailing_zeros() >= zero_bits);
        }
    }

    pub(crate) fn count(&self) -> u64 {
        u64::try_from(self.kept.len()).unwrap_or(u64::MAX) << self.zero_bits
    }

    pub(crate) fn is_exact(&self) -> bool {
        self.zero_bits == 0
    }

    /// Who they were, in order. None: only a sample is known.
    pub(crate) fn addresses(&self) -> Option<Vec<&str>> {
        self.is_exact().then(|| {
            let mut addresses: Vec<&str> = self.kept.iter().map(String::as_str).collect();
            addresses.sort_unstable();
            addresses
        })
    }

    fn is_sampled(&self, address: &str) -> bool {
        self.hasher.hash_one(address).trailing_zeros() >= self.zero_bits
    }
}
