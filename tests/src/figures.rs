//! The figures that the project promises: how large a test is, and what it measured.

use std::fmt::{Debug, Display};
use std::time::Duration;

/// Whether figures are taken at full size, on a machine that is left alone for it (`tests/soak`).
#[must_use]
#[expect(clippy::disallowed_methods, reason = "tests read what tests/run sets")]
pub(crate) fn is_full() -> bool {
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

/// Times the promise that a figure may come to in `tests/soak`, for what a clock of milliseconds and an operating system's turns add.
const SLACK: f64 = 1.5;

/// Prints a measured figure beside its promise, and in `tests/soak` holds it to that with [`SLACK`]. `tests/run` holds it to nothing: its
/// programs are not optimised, and other tests run beside them. `tests/soak` runs one test at a time.
///
/// # Panics
/// In `tests/soak`, if `value` is above what is allowed.
pub fn promised<T: Figure>(what: &str, value: T, promise: T) {
    measured(what, format!("{value:?} (promise {promise:?})"));
    if is_full() {
        hold(what, value, promise);
    }
}

fn hold<T: Figure>(what: &str, value: T, promise: T) {
    let bound = promise.times(SLACK);
    assert!(value <= bound, "{what}: {value:?}, promised is at most {promise:?}, allowed here {bound:?}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[should_panic(expected = "promised is at most 2s")]
    fn a_promise_that_is_not_kept_fails() {
        hold("a re-run", Duration::from_millis(3_001), Duration::from_secs(2));
    }
}
