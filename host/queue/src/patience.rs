//! How long an operation is tried again that a database server could not do.

use std::time::{Duration, Instant};

/// Conflicts after which an operation is tried again however long it has taken: a conflict has changed nothing, and it ends with the
/// transaction that was in the way. PerfectQueue's number.
const CONFLICTS_MIN: u32 = 10;

/// Whether an operation that failed is tried again.
#[derive(Debug)]
pub(crate) struct Patience {
    length: Duration,
    began: Option<Instant>,
    conflicts: u32,
}

impl Patience {
    /// Patience that lasts for `length` from [`Patience::begin`] on, or else from the first failure.
    pub(crate) fn new(length: Duration) -> Self {
        Self { length, began: None, conflicts: 0 }
    }

    /// The operation has its turn. What it waited for until then says nothing about the server.
    pub(crate) fn begin(&mut self) {
        self.began.get_or_insert_with(Instant::now);
    }

    /// The server could not be reached, or the connection was lost: whether another try may follow after this pause.
    pub(crate) fn lasts(&mut self, pause: Duration) -> bool {
        let began = *self.began.get_or_insert_with(Instant::now);
        began.elapsed() + pause < self.length
    }

    /// As [`Patience::lasts`], after another transaction was in the way.
    pub(crate) fn outlasts_conflict(&mut self, pause: Duration) -> bool {
        self.conflicts += 1;
        self.lasts(pause) || self.conflicts <= CONFLICTS_MIN
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(3_600);

    #[test]
    fn patience_ends_with_its_length() {
        let mut patience = Patience::new(LONG);
        assert!((0..1_000).all(|_| patience.lasts(Duration::ZERO) && patience.outlasts_conflict(Duration::ZERO)));
        assert!(!patience.lasts(LONG), "another try would come too late");
        assert!(!Patience::new(Duration::ZERO).lasts(Duration::ZERO));
    }

    #[test]
    fn a_few_conflicts_are_outlasted_without_any_patience() {
        let mut patience = Patience::new(Duration::ZERO);
        assert!((0..CONFLICTS_MIN).all(|_| patience.outlasts_conflict(LONG)));
        assert!(!patience.outlasts_conflict(Duration::ZERO));
    }
}
