//! Where to begin looking. While some session reads an old snapshot, InnoDB keeps what was deleted since, and whoever begins at the head of
//! a table from which others delete walks over all of it, more each time. So the last place is kept in memory, and the next look begins
//! there. What enters behind it, as a task of a smaller priority does, is found by a look from the head: at every look as long as those are quick,
//! else once in [`INTERVAL`], or when somebody in this process says that something entered.

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
    /// How often something entered, as far as this process knows.
    entered: u64,
}

impl Default for Marks {
    fn default() -> Self {
        Self { ready: Mark::at(HEAD), of_users: Mark::at(HEAD), scheduled: Mark::at(HEAD), changes: Mark::at(0), entered: 0 }
    }
}

impl Marks {
    pub(super) fn starts(&self) -> Starts {
        let (ready, of_users, changes) = (self.ready.start(), self.of_users.start(), self.changes.start());
        Starts { ready, of_users, changes, entered: self.entered }
    }

    /// Something began to wait, perhaps behind the marks.
    pub(super) fn hint(&mut self) {
        self.entered += 1;
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
        // It may have entered after the look had passed there.
        if choice.entered != self.entered {
            self.ready.hint();
            self.of_users.hint();
        }
    }
}

/// The looks that a choice took.
#[derive(Default)]
pub(super) struct Looks {
    pub(super) ready: Look<Ready>,
    pub(super) of_users: Look<Ready>,
    pub(super) changes: Look<i64>,
    /// As in the [`Starts`] that they began with.
    pub(super) entered: u64,
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

    #[test]
    fn what_entered_during_a_look_is_looked_for_by_the_next() {
        let mut marks = Marks::default();
        let slow_look = |starts: Starts| Looks {
            ready: Some((starts.ready, Duration::from_secs(1), Some((7, 1)))),
            of_users: Some((starts.of_users, Duration::from_secs(1), Some((7, 1)))),
            changes: None,
            entered: starts.entered,
        };
        let undisturbed = marks.starts();
        marks.looked(&slow_look(undisturbed));
        assert_eq!((marks.starts().ready, marks.starts().of_users), ((7, 1), (7, 1)));
        let disturbed = marks.starts();
        marks.hint();
        marks.looked(&slow_look(disturbed));
        assert_eq!((marks.starts().ready, marks.starts().of_users), (HEAD, HEAD));
    }
}
