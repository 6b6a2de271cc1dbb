//! The figures that the project promises: how large a test is, and what it measured.

use std::fmt::{Debug, Display};

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

/// Holds a measured figure against its bound, under `tests/soak` only: on a machine that runs other tests beside it, a time says nothing.
///
/// # Panics
/// Under `tests/soak`, if `value` is above `bound`.
pub fn promised<T: PartialOrd + Debug>(what: &str, value: T, bound: T) {
    assert!(!is_full() || value <= bound, "{what}: {value:?}, promised is at most {bound:?}");
}
