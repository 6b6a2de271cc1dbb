//! Where to begin looking. While some session reads an old snapshot, InnoDB keeps what was deleted since, and whoever begins at the head of
//! a table from which others delete walks over all of it, more each time. So the last place is kept in memory, and the next look begins
//! there. What enters behind it is found by a look from the head: at every look as long as those are quick, else once in [`INTERVAL`], or
//! when somebody in this process says that something entered.

use std::time::{Duration, Instant};

use super::choose::{HEAD, Look, Ready, Starts};

/// The longest time between two looks from the head. It bounds how long a task can wait behind the mark.
const INTERVAL: Duration = Duration::from_secs(1);
/// A look from the head that takes longer walks over what is deleted.
const QUICK: Duration = Duration::from_millis(5);

/// A place in the order of a table.
#[derive(Debug)]
pub(super) struct Mark<P> {
    head: P,
    place: P,
    looked_at: Option<Instant>,
    took: Duration,
}

impl<P: Copy + Ord> Mark<P> {
    /// `head` is before every place.
    pub(super) fn at(head: P) -> Self {
        Self { head, place: head, looked_at: None, took: Duration::ZERO }
    }

    /// Where to begin: the head, or the place of the last look.
    pub(super) fn start(&self) -> P {
        let due = self.took < QUICK || self.looked_at.is_none_or(|moment| moment.elapsed() >= INTERVAL);
        if due { self.head } else { self.place }
    }

    /// A look from `start` took so long and came to `last`.
    pub(super) fn looked(&mut self, start: P, took: Duration, last: Option<P>) {
        if start == self.head {
            self.looked_at = Some(Instant::now());
            self.took = took;
        }
        if let Some(last) = last {
            self.place = last;
        }
    }

    /// Something entered, perhaps behind the mark.
    pub(super) fn hint(&mut self) {
        self.looked_at = None;
    }
}

/// Where this process came to in the tables that claims take from.
#[derive(Debug)]
pub(super) struct Marks {
    ready: Mark<Ready>,
    of_users: Mark<Ready>,
    pub(super) scheduled: Mark<Ready>,
    changes: Mark<i64>,
}

impl Default for Marks {
    fn default() -> Self {
        Self { ready: Mark::at(HEAD), of_users: Mark::at(HEAD), scheduled: Mark::at(HEAD), changes: Mark::at(0) }
    }
}

impl Marks {
    pub(super) fn starts(&self) -> Starts {
        Starts { ready: self.ready.start(), of_users: self.of_users.start(), changes: self.changes.start() }
    }

    /// Something began to wait, perhaps behind the marks.
    pub(super) fn hint(&mut self) {
        self.ready.hint();
        self.of_users.hint();
    }

    /// Where to begin with users' changes.
    pub(super) fn changes_start(&self) -> i64 {
        self.changes.start()
    }

    /// Users' changes were looked at.
    pub(super) fn changes_looked(&mut self, start: i64, took: Duration, last: Option<i64>) {
        self.changes.looked(start, took, last);
    }

    pub(super) fn looked(&mut self, choice: &Looks) {
        fn note<P: Copy + Ord>(mark: &mut Mark<P>, look: Look<P>) {
            if let Some((start, took, last)) = look {
                mark.looked(start, took, last);
            }
        }
        note(&mut self.ready, choice.ready);
        note(&mut self.of_users, choice.of_users);
        note(&mut self.changes, choice.changes);
    }
}

/// The looks that a choice took.
#[derive(Default)]
pub(super) struct Looks {
    pub(super) ready: Look<Ready>,
    pub(super) of_users: Look<Ready>,
    pub(super) changes: Look<i64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quick_look_always_begins_at_the_head() {
        let mut mark = Mark::at(0);
        mark.looked(0, Duration::from_millis(1), Some(7));
        assert_eq!(mark.start(), 0);
    }

    #[test]
    fn after_a_slow_look_the_next_begins_where_it_came_to_unless_something_entered() {
        let mut mark = Mark::at(0);
        mark.looked(0, Duration::from_secs(1), Some(7));
        assert_eq!(mark.start(), 7);
        mark.looked(7, Duration::from_millis(1), Some(9));
        assert_eq!(mark.start(), 9, "a look from the mark says nothing about the head");
        mark.hint();
        assert_eq!(mark.start(), 0);
        mark.looked(0, Duration::from_secs(1), None);
        assert_eq!(mark.start(), 9);
    }
}
