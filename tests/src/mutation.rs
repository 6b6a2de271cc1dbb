//! Mutated inputs: what is read is changed at random, for a stated time, from a seed that is printed.
//! `tests/run` always begins with the same one, `tests/soak mutation` with a new one.
//!
//! A test asks [`Mutation::next_case`] for one [`Dice`] after the other, each with a number of its own, and prints the number of the case that
//! fails. `LAELAPS_SEED=NUMBER` begins with that case; `LAELAPS_SECONDS` says for how long to go on (docs: CONTRIBUTING.md).

use std::hash::{BuildHasher as _, RandomState};
use std::time::{Duration, Instant};

use crate::figures::is_full;
use crate::measured;

/// How long a target is tried in `tests/run`, and in `tests/soak mutation`.
const SECONDS: u64 = 10;
const SECONDS_FULL: u64 = 600;

/// One target's cases.
#[derive(Debug)]
pub struct Mutation {
    target: &'static str,
    next: u64,
    cases: u64,
    until: Instant,
}

/// The random numbers of one case. If the test fails while it lives, its number is printed.
#[derive(Debug)]
pub struct Dice {
    target: &'static str,
    case: u64,
    random: fastrand::Rng,
}

impl Mutation {
    /// Begins, and prints with which case.
    #[must_use]
    pub fn begin(target: &'static str) -> Self {
        // A run of the suite tries the same cases each time: what it finds is somebody's change. A soak looks for what nobody has seen.
        let first = if is_full() { RandomState::new().hash_one(target) >> 16 } else { 1 };
        let first = variable("LAELAPS_SEED").unwrap_or(first);
        let seconds = variable("LAELAPS_SECONDS").unwrap_or(if is_full() { SECONDS_FULL } else { SECONDS });
        println!("mutation of {target}: {seconds} s, from case {first}");
        Self { target, next: first, cases: 0, until: Instant::now() + Duration::from_secs(seconds) }
    }

    /// The next case; None when the time is over. There is always a first one.
    pub fn next_case(&mut self) -> Option<Dice> {
        if self.cases > 0 && Instant::now() >= self.until {
            measured(&format!("cases of {}", self.target), self.cases);
            return None;
        }
        let case = self.next;
        self.next = self.next.wrapping_add(1);
        self.cases += 1;
        Some(Dice { target: self.target, case, random: fastrand::Rng::with_seed(case) })
    }
}

#[expect(clippy::disallowed_methods, reason = "a case that failed is repeated by its number")]
fn variable(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    Some(value.parse().unwrap_or_else(|error| panic!("{name} is {value:?}: {error}")))
}

impl Drop for Dice {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("mutation of {}: this was case {}; LAELAPS_SEED={} begins with it", self.target, self.case, self.case);
        }
    }
}

impl Dice {
    /// A number below `end`, which is not 0.
    pub fn below(&mut self, end: usize) -> usize {
        self.random.usize(..end)
    }

    /// Whether something happens that happens once in so many times.
    pub fn one_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }

    /// One of these.
    pub fn choose<'a, T: ?Sized>(&mut self, choices: &[&'a T]) -> &'a T {
        choices[self.below(choices.len())]
    }

    /// Any byte, more often one at an edge.
    pub fn byte(&mut self) -> u8 {
        const EDGES: [u8; 8] = [0, 1, 0x40, 0x7f, 0x80, 0xc0, 0xfe, 0xff];
        if self.one_in(2) { EDGES[self.below(EDGES.len())] } else { self.random.u8(..) }
    }

    /// Any number, more often one at an edge.
    pub fn number(&mut self) -> i64 {
        const EDGES: [i64; 12] =
            [0, 1, -1, 255, 256, 65_536, i32::MAX as i64, i32::MIN as i64, u32::MAX as i64, i64::MAX, i64::MIN, i64::MAX - 1];
        if self.one_in(2) { EDGES[self.below(EDGES.len())] } else { self.random.i64(..) >> self.below(64) }
    }

    /// So many bytes at most, of any sort.
    pub fn bytes(&mut self, length_max: usize) -> Vec<u8> {
        let length = self.below(length_max + 1);
        (0..length).map(|_| self.byte()).collect()
    }

    /// Changes bytes in one to eight places: flipped, inserted, removed, doubled, moved, cut off, or taken from `other`.
    pub fn mutate(&mut self, bytes: &mut Vec<u8>, other: &[u8]) {
        for _ in 0..=self.below(8) {
            self.mutate_once(bytes, other);
        }
    }

    fn mutate_once(&mut self, bytes: &mut Vec<u8>, other: &[u8]) {
        if bytes.is_empty() {
            bytes.extend(self.bytes(64));
            return;
        }
        let at = self.below(bytes.len());
        let length_max = 1 << self.below(12);
        let length = 1 + self.below((bytes.len() - at).min(length_max));
        match self.below(9) {
            0 => bytes[at] ^= 1 << self.below(8),
            1 => bytes[at] = self.byte(),
            2 => {
                let inserted = self.bytes(16);
                bytes.splice(at..at, inserted);
            }
            3 => drop(bytes.drain(at..at + length)),
            4 => {
                let doubled = bytes[at..at + length].to_vec();
                let to = self.below(bytes.len());
                bytes.splice(to..to, doubled);
            }
            5 => bytes[at..at + length].reverse(),
            6 if self.one_in(4) => bytes.truncate(at),
            7 if !other.is_empty() => {
                let from = self.below(other.len());
                let length = 1 + self.below((other.len() - from).min(256));
                bytes.splice(at..at, other[from..from + length].iter().copied());
            }
            _ => bytes[at] = bytes[at].wrapping_add(self.byte()),
        }
    }
}
