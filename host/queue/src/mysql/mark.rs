//! Where to begin looking. While some session reads an old snapshot, InnoDB keeps what was deleted since, and whoever begins at the head of
//! a table from which others delete walks over all of it, more each time. So the last place is kept in memory, and the next look begins
//! there. What enters behind it, as a task of a smaller priority does, is found by a look from the head: at every look as long as those are quick,
//! else once in [`INTERVAL`], or when somebody in this process says that something entered.

//!
//! Of ready tasks there is such a place in each queue, its front. A look from the head also learns which queues there are, and once those are many it
//! takes its time: then it is one a second, and what this process knows to have entered moves the front of its queue back. Claims of other queues
//! have fronts of their own.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::choose::{HEAD, Look, Ready, Starts};
use super::fronts::{ARMS, Learn, Looked, QUEUES_MAX, Start};
use super::session::Entered;

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
}

/// The queues that a claim names, as they stand in the tables, in order and each once. None: all.
pub(super) type Asked = Option<Arc<[String]>>;

/// So many sets of queues that claims named are remembered.
const ASKED_MAX: usize = 64;

/// The front of a queue: nothing that could be claimed stands before it, or at it.
#[derive(Clone, Copy, Debug)]
struct Front {
    place: Ready,
    /// The first that entered since the last look that has ended, and when the last of it did (see [`Marks::entered`]).
    entered: Option<(Ready, u64)>,
}

impl Front {
    /// What a look that began when `entered` was so much makes of it.
    fn looked(&mut self, place: Ready, entered: u64) {
        self.place = place;
        match self.entered.filter(|(_, at)| *at > entered) {
            Some((first, _)) => self.place = self.place.min(first),
            None => self.entered = None,
        }
    }
}

/// The fronts of the queues that have something in a table, and may be of some that had.
#[derive(Debug, Default)]
struct Fronts {
    queues: BTreeMap<Vec<u8>, Front>,
    /// When it was looked from the head, and how long that took.
    looked_at: Option<Instant>,
    took: Duration,
    /// The next look from the head goes on behind this queue.
    behind: Option<Vec<u8>>,
    /// There are more queues than a look finds: others may have something when these have nothing.
    is_part: bool,
    /// All that the last look found is taken, and others may have something.
    goes_on: bool,
}

impl Fronts {
    fn start(&self, asked: &Asked) -> Start {
        let is_head = self.took < QUICK || self.looked_at.is_none_or(|moment| moment.elapsed() >= INTERVAL);
        if !is_head {
            let fronts = self.queues.iter().map(|(queue, front)| (queue.clone(), front.place)).collect();
            return Start { is_head, fronts, learn: None };
        }
        match asked.as_deref() {
            None => Start { is_head, fronts: Vec::new(), learn: Some(Learn::From(self.behind.clone().unwrap_or_default())) },
            Some([queue]) => Start { is_head, fronts: vec![(queue.as_bytes().to_vec(), HEAD)], learn: None },
            Some(_) => Start { is_head, fronts: Vec::new(), learn: asked.clone().map(Learn::Of) },
        }
    }

    fn looked(&mut self, looked: &Looked, entered: u64) {
        if looked.is_head {
            self.looked_at = Some(Instant::now());
            // Each queue costs a look.
            self.took = if looked.fronts.len() > ARMS { looked.took.max(QUICK) } else { looked.took };
            self.is_part = self.behind.is_some() || looked.behind.is_some();
            self.behind.clone_from(&looked.behind);
        }
        if looked.learnt {
            let found: HashSet<&[u8]> = looked.fronts.iter().map(|(queue, _)| queue.as_slice()).collect();
            // Where few queues are known, it costs little to look again into those that had something.
            let room = self.queues.len() + found.len() <= ARMS;
            self.queues.retain(|queue, front| {
                room || found.contains(queue.as_slice()) || front.entered.is_some_and(|(_, at)| at > entered)
            });
        }
        let many = self.queues.len() > ARMS || self.is_part;
        for (queue, place) in &looked.fronts {
            match (place, self.queues.get_mut(queue)) {
                (Some(place), Some(front)) => front.looked(*place, entered),
                (Some(place), None) => drop(self.queues.insert(queue.clone(), Front { place: *place, entered: None })),
                (None, Some(front)) if many && front.entered.is_none_or(|(_, at)| at <= entered) => {
                    self.queues.remove(queue);
                }
                (None, Some(front)) => front.looked(front.place, entered),
                (None, None) => {}
            }
        }
        self.goes_on = self.is_part && self.queues.is_empty();
        if self.goes_on {
            self.hint();
        }
    }

    /// Something entered where nobody knows.
    fn hint(&mut self) {
        self.looked_at = None;
    }

    fn entered(&mut self, queue: &str, turn: i64, entered: u64) {
        let place = (turn, 0);
        if self.queues.len() >= QUEUES_MAX && !self.queues.contains_key(queue.as_bytes()) {
            return self.hint();
        }
        let front = self.queues.entry(queue.as_bytes().to_vec()).or_insert(Front { place, entered: None });
        front.place = front.place.min(place);
        let first = front.entered.map_or(place, |(first, _)| first.min(place));
        front.entered = Some((first, entered));
    }
}

/// What is known of the queues that some claims ask for.
#[derive(Debug, Default)]
struct Known {
    ready: Fronts,
    of_users: Fronts,
    /// When a task without user was last picked for them by this process.
    picked: Option<i64>,
}

/// Where this process came to in the tables that claims take from.
#[derive(Debug)]
pub(super) struct Marks {
    known: HashMap<Asked, Known>,
    pub(super) scheduled: Mark<Ready>,
    changes: Mark<i64>,
    /// How often something entered, as far as this process knows.
    entered: u64,
}

impl Default for Marks {
    fn default() -> Self {
        Self { known: HashMap::new(), scheduled: Mark::at(HEAD), changes: Mark::at(0), entered: 0 }
    }
}

impl Marks {
    pub(super) fn starts(&mut self, asked: &Asked) -> Starts {
        if self.known.len() >= ASKED_MAX && !self.known.contains_key(asked) {
            self.known.clear();
        }
        let known = self.known.entry(asked.clone()).or_default();
        Starts {
            asked: asked.clone(),
            ready: known.ready.start(asked),
            of_users: known.of_users.start(asked),
            changes: self.changes.start(),
            others: false,
            picked: known.picked.filter(|_| asked.is_some()),
            entered: self.entered,
        }
    }

    /// Something began to wait, perhaps behind the marks: there, or nobody knows where.
    pub(super) fn hint(&mut self, entered: &[Entered]) {
        self.entered += 1;
        for (asked, known) in &mut self.known {
            if entered.is_empty() {
                known.ready.hint();
                known.of_users.hint();
            }
            for Entered { queue, of_user, turn } in entered {
                if asked.as_ref().is_some_and(|asked| asked.binary_search(queue).is_err()) {
                    continue;
                }
                let fronts = if *of_user { &mut known.of_users } else { &mut known.ready };
                fronts.entered(queue, *turn, self.entered);
            }
        }
    }

    /// Whether a claim that found nothing should look once more, since it knew some of the queues only. Says so once.
    pub(super) fn goes_on(&mut self, asked: &Asked) -> bool {
        let Some(known) = self.known.get_mut(asked) else { return false };
        [&mut known.ready, &mut known.of_users].map(|fronts| std::mem::take(&mut fronts.goes_on)).contains(&true)
    }

    /// Where to begin with users' changes.
    pub(super) fn changes_start(&self) -> i64 {
        self.changes.start()
    }

    /// Users' changes were looked at.
    pub(super) fn changes_looked(&mut self, start: i64, took: Duration, last: Option<i64>) {
        self.changes.looked(start, took, last);
    }

    pub(super) fn looked(&mut self, looks: &Looks) {
        if let Some((start, took, last)) = looks.changes {
            self.changes.looked(start, took, last);
        }
        let Some(known) = self.known.get_mut(&looks.asked) else { return };
        for (fronts, looked) in [(&mut known.ready, &looks.ready), (&mut known.of_users, &looks.of_users)] {
            if let Some(looked) = looked {
                fronts.looked(looked, looks.entered);
            }
        }
        known.picked = looks.picked.or(known.picked);
    }
}

/// The looks that a choice took.
#[derive(Default)]
pub(super) struct Looks {
    pub(super) asked: Asked,
    pub(super) ready: Option<Looked>,
    pub(super) of_users: Option<Looked>,
    pub(super) changes: Look<i64>,
    /// There may be changes of users' accounts that were not folded in.
    pub(super) unfolded: bool,
    /// When a task without user was picked last; or since when none was.
    pub(super) picked: Option<i64>,
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
    fn after_a_slow_look_the_next_begins_where_it_came_to() {
        let mut mark = Mark::at(0);
        mark.looked(0, Duration::from_secs(1), Some(7));
        assert_eq!(mark.start(), 7);
        mark.looked(7, Duration::from_millis(1), Some(9));
        assert_eq!(mark.start(), 9, "a look from the mark says nothing about the head");
    }

    fn slow_look(asked: &Asked, entered: u64, fronts: &[(&str, Option<Ready>)]) -> Looks {
        let fronts = fronts.iter().map(|(queue, place)| (queue.as_bytes().to_vec(), *place)).collect();
        let looked = Looked::of(true, Duration::from_secs(1), fronts);
        Looks { asked: asked.clone(), ready: Some(looked.clone()), of_users: Some(looked), entered, ..Looks::default() }
    }

    fn fronts(start: &Start) -> Vec<(&str, Ready)> {
        start.fronts.iter().map(|(queue, place)| (std::str::from_utf8(queue).unwrap(), *place)).collect()
    }

    fn entered(queue: &str, of_user: bool, turn: i64) -> Entered {
        Entered { queue: queue.to_owned(), of_user, turn }
    }

    #[test]
    fn what_entered_during_a_look_is_looked_for_by_the_next() {
        let mut marks = Marks::default();
        let undisturbed = marks.starts(&None);
        assert!(undisturbed.ready.is_head);
        marks.looked(&slow_look(&None, undisturbed.entered, &[("", Some((7, 1)))]));
        assert_eq!(fronts(&marks.starts(&None).ready), [("", (7, 1))]);
        let disturbed = marks.starts(&None);
        marks.hint(&[entered("", false, 5), entered("mail", true, 9)]);
        marks.looked(&slow_look(&None, disturbed.entered, &[("", Some((8, 1)))]));
        let starts = marks.starts(&None);
        assert_eq!(fronts(&starts.ready), [("", (5, 0))]);
        assert_eq!(fronts(&starts.of_users), [("", (8, 1)), ("mail", (9, 0))]);
        marks.looked(&slow_look(&None, starts.entered, &[("", Some((9, 1)))]));
        assert_eq!(fronts(&marks.starts(&None).ready), [("", (9, 1))]);
        marks.hint(&[]);
        assert!(marks.starts(&None).ready.is_head, "nobody knows where");
    }

    #[test]
    fn claims_of_some_queues_have_marks_of_their_own() {
        let mut marks = Marks::default();
        let asked: Asked = Some(Arc::from(["a".to_owned(), "b".to_owned()]));
        for asked in [&None, &asked] {
            let starts = marks.starts(asked);
            marks.looked(&slow_look(asked, starts.entered, &[("a", Some((7, 1))), ("b", Some((8, 1)))]));
        }
        marks.hint(&[entered("b", false, 3), entered("c", false, 4)]);
        assert_eq!(fronts(&marks.starts(&asked).ready), [("a", (7, 1)), ("b", (3, 0))]);
        assert_eq!(fronts(&marks.starts(&None).ready), [("a", (7, 1)), ("b", (3, 0)), ("c", (4, 0))]);
    }

    #[test]
    fn of_many_queues_those_that_have_nothing_are_forgotten() {
        let mut marks = Marks::default();
        let names: Vec<String> = (0..=ARMS).map(|number| format!("{number:02}")).collect();
        let places = |place| names.iter().map(|name| (name.as_str(), place)).collect::<Vec<_>>();
        let starts = marks.starts(&None);
        marks.looked(&slow_look(&None, starts.entered, &places(Some((7, 1)))));
        assert_eq!(marks.starts(&None).ready.fronts.len(), ARMS + 1);
        marks.hint(&[entered("03", false, 3)]);
        marks.looked(&slow_look(&None, starts.entered, &places(None)));
        assert_eq!(fronts(&marks.starts(&None).ready), [("03", (3, 0))]);
    }
}
