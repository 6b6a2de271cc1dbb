//! Low-water marks: where the next claim begins to look.
//!
//! A claimed task leaves a dead entry in the index of what is ready, and while any transaction of the server is old, those stay: a claim that
//! began at the head would walk over all of them. So it begins where the last one ended. What enters before that place (a task that was given
//! back, of a smaller priority, or whose producer took long to commit) is met by a look from the head: at once if this process put it there itself; else after
//! [`INTERVAL`], or after [`SHARE`] times as long as such a look takes if that is longer; and while a look is cheap also as soon as a claim is
//! not filled or a notice comes.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::fair;

/// Between two looks from the head.
const INTERVAL: Duration = Duration::from_secs(1);
/// Looks from the head take at most one part of this many of the time.
const SHARE: u32 = 20;
/// A look from the head that takes no longer may come at any time.
const CHEAP: Duration = Duration::from_millis(5);

/// A place in the order of claims: a task's turn, and its number.
pub(super) type Place = (i64, i64);

const HEAD: Place = (i64::MIN, i64::MIN);

/// Where one claim begins to look.
#[derive(Clone, Copy, Debug)]
pub(super) struct From {
    /// Among the tasks without user.
    pub(super) ready: Place,
    /// Among those of all users, for who does not look at users.
    pub(super) in_time: Place,
    /// Among what is not due.
    pub(super) due: i64,
    /// Among the changes of accounts.
    pub(super) change: i64,
    head: bool,
    version: u64,
}

impl From {
    /// Where a claim begins that knows of a task at this place.
    pub(super) fn lowered(self, place: Place) -> Self {
        Self { ready: self.ready.min(place), in_time: self.in_time.min(place), ..self }
    }
}

#[derive(Debug)]
struct State {
    ready: Place,
    in_time: Place,
    due: i64,
    change: i64,
    looked_at: Option<Instant>,
    took: Duration,
    hinted: bool,
    /// Raised by whatever makes a mark that an earlier claim brings back too high.
    version: u64,
}

#[derive(Debug)]
pub(super) struct Marks(Mutex<State>);

impl Default for Marks {
    fn default() -> Self {
        Self(Mutex::new(State {
            ready: HEAD,
            in_time: HEAD,
            due: i64::MIN,
            change: i64::MIN,
            looked_at: None,
            took: Duration::ZERO,
            hinted: false,
            version: 0,
        }))
    }
}

impl Marks {
    /// Where a claim begins now.
    pub(super) fn begin(&self) -> From {
        let mut state = self.lock();
        let rest = INTERVAL.max(state.took * SHARE);
        let head = state.looked_at.is_none_or(|looked_at| looked_at.elapsed() >= rest) || (state.hinted && state.took < CHEAP);
        if head { Self::head(&mut state) } else { Self::at(&state) }
    }

    /// The head, for a claim that found too little from `from`, if such a look is cheap and was not just taken.
    pub(super) fn begin_again(&self, from: From) -> Option<From> {
        let mut state = self.lock();
        (!from.head && state.took < CHEAP).then(|| Self::head(&mut state))
    }

    fn head(state: &mut State) -> From {
        state.version += 1;
        state.hinted = false;
        // Only one claim at a time looks from the head.
        state.looked_at = Some(Instant::now());
        From { ready: HEAD, in_time: HEAD, due: i64::MIN, change: i64::MIN, head: true, ..Self::at(state) }
    }

    /// Where the marks are, for who claims nothing.
    pub(super) fn here(&self) -> From {
        Self::at(&self.lock())
    }

    fn at(state: &State) -> From {
        From {
            ready: state.ready,
            in_time: state.in_time,
            due: state.due,
            change: state.change,
            head: false,
            version: state.version,
        }
    }

    /// A look took this long.
    pub(super) fn looked(&self, from: From, took: Duration) {
        if from.head {
            self.lock().took = took;
        }
    }

    /// The last place that a claim took among the tasks without user.
    pub(super) fn took_ready(&self, from: From, place: Place) {
        let mut state = self.lock();
        if state.version == from.version {
            state.ready = place;
        }
    }

    /// The last place that a claim took among those of all users.
    pub(super) fn took_in_time(&self, from: From, place: Place) {
        let mut state = self.lock();
        if state.version == from.version {
            state.in_time = place;
        }
    }

    /// Nothing before this moment is in the schedule any more.
    pub(super) fn moved_due(&self, from: From, moment: i64) {
        let mut state = self.lock();
        if state.version == from.version {
            state.due = moment;
        }
    }

    /// No change of an account before this one is left.
    pub(super) fn entered(&self, from: From, change: i64) {
        let mut state = self.lock();
        if state.version == from.version {
            state.change = change;
        }
    }

    /// A task of this process entered at this place.
    pub(super) fn lower(&self, place: Place) {
        let mut state = self.lock();
        state.version += 1;
        state.ready = state.ready.min(place);
        state.in_time = state.in_time.min(place);
    }

    /// This process stored a task at this place. Most come after all others and leave the marks be; of another priority it may come before them,
    /// or before the place to which a claim under way is about to raise them.
    pub(super) fn stored(&self, place: Place) {
        let is_behind = |state: &State| place > state.ready && place > state.in_time;
        if !fair::is_usual(place.0) || !is_behind(&self.lock()) {
            self.lower(place);
        }
    }

    /// Something may have entered anywhere.
    pub(super) fn hint(&self) {
        self.lock().hinted = true;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where a look for claims whose leases have ended begins: as with what is ready, those that were dealt with leave dead entries in the index.
/// Nothing enters further back than [`LATE_MS`] before the last look, but what another host puts back; looks from the head find that.
#[derive(Debug, Default)]
pub(super) struct Ended(Mutex<EndedState>);

#[derive(Debug, Default)]
struct EndedState {
    after: Option<i64>,
    looked_at: Option<Instant>,
    took: Duration,
}

/// How far back what enters may lie: longer than a claim takes to commit.
const LATE_MS: i64 = 120_000;

impl Ended {
    /// Where a look begins now.
    pub(super) fn begin(&self) -> i64 {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let rest = INTERVAL.max(state.took * SHARE);
        if state.took < CHEAP || state.looked_at.is_none_or(|looked_at| looked_at.elapsed() >= rest) {
            state.looked_at = Some(Instant::now());
            return i64::MIN;
        }
        state.after.unwrap_or(i64::MIN)
    }

    /// A look from there took so long, and nothing had ended at `now`, by the database's clock; None: something had.
    pub(super) fn looked(&self, from: i64, took: Duration, now: Option<i64>) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if from == i64::MIN {
            state.took = took;
        }
        if let Some(now) = now {
            state.after = Some(now - LATE_MS);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_claim_begins_where_the_last_one_ended() {
        let marks = Marks::default();
        let first = marks.begin();
        assert_eq!(first.ready, HEAD);
        marks.looked(first, CHEAP * 2);
        marks.took_ready(first, (5, 7));
        assert_eq!(marks.begin().ready, (5, 7));
        assert!(marks.begin_again(marks.begin()).is_none(), "such a look is not cheap");
    }

    #[test]
    fn what_enters_before_the_mark_lowers_it_even_under_a_claim_that_is_under_way() {
        let marks = Marks::default();
        let first = marks.begin();
        marks.took_ready(first, (5, 7));
        let under_way = marks.begin();
        marks.lower((3, 9));
        marks.took_ready(under_way, (6, 1));
        assert_eq!(marks.begin().ready, (3, 9));
    }

    #[test]
    fn what_is_stored_behind_the_mark_leaves_it_be_unless_its_priority_may_bring_it_before_a_claim_under_way() {
        let marks = Marks::default();
        let first = marks.begin();
        marks.took_ready(first, (500, 7));
        marks.took_in_time(first, (500, 7));
        let under_way = marks.begin();
        marks.stored((600, 8));
        marks.took_ready(under_way, (700, 9));
        assert_eq!(marks.begin().ready, (700, 9));
        let under_way = marks.begin();
        marks.stored((fair::turn(3, 800), 10));
        marks.took_ready(under_way, (fair::turn(4, 1), 2));
        assert_eq!(marks.begin().ready, (700, 9));
        marks.stored((fair::turn(-3, 800), 11));
        assert_eq!(marks.begin().ready, (fair::turn(-3, 800), 11));
    }

    #[test]
    fn a_hint_leads_to_the_head_while_that_is_cheap() {
        let marks = Marks::default();
        let first = marks.begin();
        marks.took_ready(first, (5, 7));
        marks.hint();
        assert_eq!(marks.begin().ready, HEAD);
        let second = marks.begin();
        assert_eq!(second.ready, (5, 7), "once");
        marks.looked(first, CHEAP * 2);
        marks.hint();
        assert_eq!(marks.begin().ready, (5, 7));
    }

    #[test]
    fn a_look_for_ended_leases_begins_where_the_last_one_found_nothing_unless_the_head_is_cheap() {
        let ended = Ended::default();
        assert_eq!(ended.begin(), i64::MIN);
        ended.looked(i64::MIN, CHEAP / 2, Some(500_000));
        assert_eq!(ended.begin(), i64::MIN, "such a look is cheap");
        ended.looked(i64::MIN, CHEAP * 2, Some(600_000));
        assert_eq!(ended.begin(), 600_000 - LATE_MS);
        ended.looked(600_000 - LATE_MS, CHEAP / 2, None);
        assert_eq!(ended.begin(), 600_000 - LATE_MS, "what was found has still to be dealt with");
    }

    #[test]
    fn a_claim_that_is_not_filled_looks_from_the_head_while_that_is_cheap() {
        let marks = Marks::default();
        let first = marks.begin();
        assert!(marks.begin_again(first).is_none(), "it did already");
        marks.took_ready(first, (5, 7));
        let second = marks.begin();
        assert_eq!(marks.begin_again(second).map(|from| from.ready), Some(HEAD));
    }
}
