//! The figures that the project promises: how large a test is, and what it measured.

use std::fmt::{Debug, Display};
use std::time::Duration;

/// Whether figures are taken at full size, on a machine that is left alone for it (`tests/soak`).
#[must_use]
#[expect(clippy::disallowed_methods, reason = "tests read what tests/run sets")]
fn is_full() -> bool {
    std::env::var_os("LAELAPS_SCALE").is_some_and(|scale| scale == "full")
}

/// `full` under `tests/soak` (`LAELAPS_SCALE=full`), a tenth of it otherwise, at least 1.
#[must_use]
pub fn scaled(full: usize) -> usize {
    if is_full() { full } else { (full / 10).max(1) }
}

/// Prints a figure for `tests/soak`, which collects these lines.
pub fn measured(what: &str, value: impl Display) {
    println!("measured: {what}: {value}");
}

/// A figure that is held against a promise.
pub trait Figure: PartialOrd + Debug + Copy {
    /// So many times as much.
    #[must_use]
    fn times(self, factor: f64) -> Self;
}

impl Figure for Duration {
    fn times(self, factor: f64) -> Self {
        self.mul_f64(factor)
    }
}

impl Figure for f64 {
    fn times(self, factor: f64) -> Self {
        self * factor
    }
}

/// Times the promise that a figure may come to: in `tests/run` binaries are not optimised and the machine may be any; in `tests/soak` it is
/// left alone, and the rest is what a clock of milliseconds and an operating system's turns add.
fn slack() -> f64 {
    if is_full() { 1.5 } else { 5.0 }
}

/// Holds a measured figure against its promise, with [`slack`], and prints both. The test has to have the machine to itself.
///
/// # Panics
/// If `value` is above what is allowed.
pub fn promised<T: Figure>(what: &str, value: T, promise: T) {
    measured(what, format!("{value:?} (promise {promise:?})"));
    let bound = promise.times(slack());
    assert!(value <= bound, "{what}: {value:?}, promised is at most {promise:?}, allowed here {bound:?}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[should_panic(expected = "promised is at most 2s")]
    fn a_promise_that_is_not_kept_fails_at_every_scale() {
        promised("a re-run", Duration::from_millis(10_001), Duration::from_secs(2));
    }
}
