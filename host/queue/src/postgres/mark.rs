//! Low-water marks: where the next claim begins to look.
//!
//! A claimed task leaves a dead entry in the index of what is ready, and while any transaction of the server is old, those stay: a claim that
//! began at the head would walk over all of them. So it begins where the last one ended, in each queue. What enters before that place (a task that was
//! given back, of a smaller priority, or whose producer took long to commit) is met by a look from the head: at once if this process put it there
//! itself; else after [`INTERVAL`], or after [`SHARE`] times as long as such a look takes if that is longer; and while a look is cheap also as soon as
//! a claim is not filled or a notice comes. The same look finds queues that this process does not know yet.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::heads::{Head, Heads, Place, Scope, Sort, Spot, TOGETHER};
use crate::fair;

/// Between two looks from the head.
const INTERVAL: Duration = Duration::from_secs(1);
/// Looks from the head take at most one part of this many of the time.
const SHARE: u32 = 20;
/// A look from the head that takes no longer may come at any time.
const CHEAP: Duration = Duration::from_millis(5);
/// A queue where nothing was found for so long is forgotten.
const FORGOTTEN: Duration = Duration::from_secs(60);
/// Queues remembered, and ways to ask for them. Beyond that all are forgotten, and looked for again.
pub(super) const QUEUES_MAX: usize = 20_000;
const WAYS_MAX: usize = 100;

/// What a claim asks for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Way {
    pub(super) queues: Scope,
    pub(super) ignore_users: bool,
}

impl Way {
    /// The sorts of tasks that it merges.
    pub(super) fn sorts(&self) -> &'static [Sort] {
        if self.ignore_users { &[Sort::Nobodys, Sort::Users] } else { &[Sort::Nobodys] }
    }
}

/// Where one claim begins to look.
#[derive(Clone, Debug)]
pub(super) struct From {
    pub(super) way: Way,
    /// In the queues that it asks for, as far as they are known.
    pub(super) heads: Heads,
    /// Among what is not due.
    pub(super) due: i64,
    /// Among the changes of accounts.
    pub(super) change: i64,
    /// It looks from the head.
    pub(super) head: bool,
    /// It has asked which of its queues have something, and that took so long.
    pub(super) looked_around: Option<Duration>,
    /// So many tasks may be wanted.
    limit: usize,
    version: u64,
    stores: u64,
}

impl From {
    /// Whether it has to be asked first which of its queues have something, and where: they are more than are looked at together.
    pub(super) fn has_to_look_around(&self) -> bool {
        self.head
            && match &self.way.queues {
                Some(queues) => queues.len() > TOGETHER,
                None => self.heads.only().is_none(),
            }
    }

    /// The only queue, if there is one only.
    pub(super) fn only(&self) -> Option<&Head> {
        self.heads.only()
    }
}

/// What a look around found in a queue.
#[derive(Clone, Debug)]
pub(super) struct Found {
    pub(super) queue: String,
    pub(super) nobodys: Option<Place>,
    /// Only looked for by who ignores users.
    pub(super) users: Option<Place>,
}

/// A queue as it is remembered.
#[derive(Clone, Debug)]
struct Known {
    nobodys: Spot,
    users: Spot,
    /// Which of the tasks that this process stored entered here last.
    stored: u64,
    found_at: Instant,
}

impl Known {
    fn new(nobodys: Spot, users: Spot) -> Self {
        Self { nobodys, users, stored: 0, found_at: Instant::now() }
    }

    /// As [`Head::rank`].
    fn rank(&self, sorts: &[Sort]) -> (bool, Option<Place>) {
        let spot = |sort: &Sort| if *sort == Sort::Nobodys { self.nobodys.next } else { self.users.next };
        let next = sorts.iter().filter_map(spot).min();
        (next.is_none(), next)
    }

    fn lower(&mut self, place: Place) {
        for spot in [&mut self.nobodys, &mut self.users] {
            *spot = Spot { at: spot.at.min(place), next: Some(spot.next.map_or(place, |next| next.min(place))) };
        }
    }
}

/// When a way was looked from the head last.
#[derive(Debug, Default)]
struct Looked {
    at: Option<Instant>,
    took: Duration,
    /// The hints that came before.
    hints: u64,
}

#[derive(Debug)]
struct State {
    queues: HashMap<Arc<str>, Known>,
    /// Behind this queue the look around goes on: it had more than it may look at.
    around: Option<String>,
    ways: HashMap<Way, Looked>,
    due: i64,
    change: i64,
    hints: u64,
    /// Raised by whatever makes a mark that an earlier claim brings back too high.
    version: u64,
    /// Raised by each batch that this process stores.
    stores: u64,
}

#[derive(Debug)]
pub(super) struct Marks(Mutex<State>);

impl Default for Marks {
    fn default() -> Self {
        Self(Mutex::new(State {
            queues: HashMap::new(),
            around: None,
            ways: HashMap::new(),
            due: i64::MIN,
            change: i64::MIN,
            hints: 0,
            version: 0,
            stores: 0,
        }))
    }
}

impl Marks {
    /// Where a claim of so many tasks begins now.
    pub(super) fn begin(&self, way: &Way, limit: usize) -> From {
        let mut state = self.lock();
        let hints = state.hints;
        let looked = state.way(way);
        let rest = INTERVAL.max(looked.took * SHARE);
        let is_hinted = looked.hints < hints && looked.took < CHEAP;
        let head = is_hinted || looked.at.is_none_or(|looked_at| looked_at.elapsed() >= rest);
        state.from(way, limit, head)
    }

    /// The head, for a claim that found too little from `from`, if such a look is cheap and was not just taken.
    pub(super) fn begin_again(&self, from: &From) -> Option<From> {
        let mut state = self.lock();
        (!from.head && state.way(&from.way).took < CHEAP).then(|| state.from(&from.way, from.limit, true))
    }

    /// Where its queues stand now, after it was asked which they are or something of this process entered.
    pub(super) fn begin_anew(&self, from: &mut From) {
        from.heads = self.lock().heads(&from.way, from.limit, from.head);
    }

    /// The change of an account from which on some are left.
    pub(super) fn change(&self) -> i64 {
        self.lock().change
    }

    /// A claim took this long; what counts of it is the look from the head.
    pub(super) fn looked(&self, from: &From, took: Duration) {
        if from.head {
            self.lock().way(&from.way).took = from.looked_around.unwrap_or(took);
        }
    }

    /// The queue from which on a look around over all of them goes on.
    pub(super) fn around(&self) -> Option<String> {
        self.lock().around.clone()
    }

    /// What was found by a look around over all queues from one on. `last`: it may go on behind this one.
    pub(super) fn found(&self, from: &From, first: Option<&str>, last: Option<String>, found: Vec<Found>) {
        let mut state = self.lock();
        let is_within = |queue: &str| first.is_none_or(|first| queue > first) && last.as_deref().is_none_or(|last| queue <= last);
        let (is_same, stores) = (state.version == from.version, from.stores);
        let names: HashSet<&str> = found.iter().map(|found| found.queue.as_str()).collect();
        state.queues.retain(|queue, known| {
            if !is_within(queue) || names.contains(&**queue) || !is_same || known.stored > stores {
                return true;
            }
            (known.nobodys.next, known.users.next) = (None, None);
            known.found_at.elapsed() < FORGOTTEN
        });
        drop(names);
        state.around = last;
        state.note(from, found);
    }

    /// What was found by a look into the queues that were asked for.
    pub(super) fn found_of(&self, from: &From, found: Vec<Found>) {
        self.lock().note(from, found);
    }

    /// How far a claim came in its queues, and the last places that it took.
    pub(super) fn learnt(&self, from: &From, heads: &Heads, took: &HashMap<(&str, Sort), Place>) {
        let mut state = self.lock();
        if state.version != from.version {
            return;
        }
        for head in &heads.list {
            let Some(known) = state.queues.get_mut(&*head.queue) else { continue };
            let is_same = known.stored <= from.stores;
            for (sort, spot) in [(Sort::Nobodys, &mut known.nobodys), (Sort::Users, &mut known.users)] {
                if let Some(place) = took.get(&(&*head.queue, sort)) {
                    spot.at = *place;
                }
                if is_same && from.way.sorts().contains(&sort) {
                    spot.next = head.spot(sort).next;
                }
            }
        }
    }

    /// The last place that a claim took in its only queue.
    pub(super) fn took(&self, from: &From, queue: &str, sort: Sort, place: Place) {
        let mut state = self.lock();
        if state.version != from.version {
            return;
        }
        let known = state.known(queue, Spot::UNKNOWN, Spot::UNKNOWN);
        known.found_at = Instant::now();
        let spot = if sort == Sort::Nobodys { &mut known.nobodys } else { &mut known.users };
        *spot = Spot { at: place, next: Some(place) };
    }

    /// Nothing before this moment is in the schedule any more.
    pub(super) fn moved_due(&self, from: &From, moment: i64) {
        let mut state = self.lock();
        if state.version == from.version {
            state.due = moment;
        }
    }

    /// No change of an account before this one is left.
    pub(super) fn entered(&self, from: &From, change: i64) {
        let mut state = self.lock();
        if state.version == from.version {
            state.change = change;
        }
    }

    /// A task of this process entered at this place of a queue.
    pub(super) fn lower(&self, queue: &str, place: Place) {
        let mut state = self.lock();
        state.version += 1;
        state.stores += 1;
        let stores = state.stores;
        let known = state.known(queue, Spot::EMPTY, Spot::EMPTY);
        known.lower(place);
        known.stored = stores;
    }

    /// This process stored a task at this place of a queue. Most come after all others and leave the marks be; of another priority it may come before
    /// them, or before the place to which a claim under way is about to raise them.
    pub(super) fn stored(&self, queue: &str, place: Place) {
        let mut state = self.lock();
        let is_behind = |known: &Known| place > known.nobodys.at && place > known.users.at;
        if !fair::is_usual(place.0) || !state.queues.get(queue).is_none_or(is_behind) {
            drop(state);
            return self.lower(queue, place);
        }
        state.stores += 1;
        let stores = state.stores;
        let known = state.known(queue, Spot::EMPTY, Spot::EMPTY);
        known.stored = stores;
        for spot in [&mut known.nobodys, &mut known.users] {
            spot.next = Some(spot.next.map_or(place, |next| next.min(place)));
        }
    }

    /// Something may have entered anywhere.
    pub(super) fn hint(&self) {
        self.lock().hints += 1;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn way(&mut self, way: &Way) -> &mut Looked {
        if self.ways.len() >= WAYS_MAX && !self.ways.contains_key(way) {
            self.ways.clear();
        }
        self.ways.entry(way.clone()).or_default()
    }

    /// The queue, remembered as given if it is not yet.
    fn known(&mut self, queue: &str, nobodys: Spot, users: Spot) -> &mut Known {
        if self.queues.len() >= QUEUES_MAX && !self.queues.contains_key(queue) {
            self.queues.clear();
            self.ways.clear();
        }
        if !self.queues.contains_key(queue) {
            self.queues.insert(queue.into(), Known::new(nobodys, users));
        }
        self.queues.entry(queue.into()).or_insert_with(|| Known::new(nobodys, users))
    }

    fn from(&mut self, way: &Way, limit: usize, head: bool) -> From {
        if head {
            self.version += 1;
            let hints = self.hints;
            let looked = self.way(way);
            // Only one claim at a time looks from the head.
            looked.at = Some(Instant::now());
            looked.hints = hints;
        }
        let (due, change) = if head { (i64::MIN, i64::MIN) } else { (self.due, self.change) };
        let heads = self.heads(way, limit, head);
        From {
            way: way.clone(),
            heads,
            due,
            change,
            head,
            looked_around: None,
            limit,
            version: self.version,
            stores: self.stores,
        }
    }

    /// The queues that a claim looks at: so many that those left out have nothing for it, or little.
    fn heads(&self, way: &Way, limit: usize, head: bool) -> Heads {
        let of =
            |(queue, known): (&Arc<str>, &Known)| Head { queue: Arc::clone(queue), nobodys: known.nobodys, users: known.users };
        let at_head = |queue: &str| Head { queue: queue.into(), nobodys: Spot::UNKNOWN, users: Spot::UNKNOWN };
        let known: Vec<(&Arc<str>, &Known)> = match &way.queues {
            Some(queues) if queues.len() <= TOGETHER => {
                let known = |queue: &String| self.queues.get_key_value(queue.as_str()).filter(|_| !head);
                let list = queues.iter().map(|queue| known(queue).map_or_else(|| at_head(queue), of)).collect();
                return Heads { list, rest: None };
            }
            Some(queues) => queues.iter().filter_map(|queue| self.queues.get_key_value(queue.as_str())).collect(),
            None if self.queues.is_empty() => return Heads { list: vec![at_head("")], rest: None },
            None if self.queues.len() == 1 && head => {
                return Heads { list: self.queues.keys().map(|queue| at_head(queue)).collect(), rest: None };
            }
            None => self.queues.iter().collect(),
        };
        let most = limit + 2 * TOGETHER;
        let (mut known, mut rest) = (known, None);
        if known.len() > most {
            let (_, (_, next), _) = known.select_nth_unstable_by_key(most, |(_, known)| known.rank(way.sorts()));
            rest = next.rank(way.sorts()).1;
            known.truncate(most);
        }
        Heads { list: known.into_iter().map(of).collect(), rest }
    }

    /// Remember where queues go on, as a look from their heads has told.
    fn note(&mut self, from: &From, found: Vec<Found>) {
        let is_same = self.version == from.version;
        for Found { queue, nobodys, users } in found {
            let spot = |place: Option<Place>| place.map_or(Spot::EMPTY, |place| Spot { at: place, next: Some(place) });
            let known = self.known(&queue, spot(nobodys), spot(users));
            known.found_at = Instant::now();
            let is_new = known.stored <= from.stores && is_same;
            for (sort, place, known) in [(Sort::Nobodys, nobodys, &mut known.nobodys), (Sort::Users, users, &mut known.users)] {
                if !from.way.sorts().contains(&sort) {
                    continue;
                }
                match place {
                    Some(place) if is_new => *known = Spot { at: place, next: Some(place) },
                    Some(place) => {
                        *known = Spot { at: known.at.min(place), next: Some(known.next.map_or(place, |next| next.min(place))) };
                    }
                    None if is_new => known.next = None,
                    None => {}
                }
            }
        }
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
    use super::super::heads::HEAD;
    use super::*;

    fn all() -> Way {
        Way { queues: None, ignore_users: false }
    }

    /// Where a claim over all queues begins, with where it begins in the default queue.
    fn begin(marks: &Marks) -> (From, Place) {
        let from = marks.begin(&all(), 10);
        let at = from.only().expect("one queue is known").nobodys.at;
        (from, at)
    }

    fn took(marks: &Marks, from: &From, place: Place) {
        marks.took(from, "", Sort::Nobodys, place);
    }

    #[test]
    fn a_claim_begins_where_the_last_one_ended() {
        let marks = Marks::default();
        let (first, at) = begin(&marks);
        assert_eq!(at, HEAD);
        marks.looked(&first, CHEAP * 2);
        took(&marks, &first, (5, 7));
        assert_eq!(begin(&marks).1, (5, 7));
        assert!(marks.begin_again(&begin(&marks).0).is_none(), "such a look is not cheap");
    }

    #[test]
    fn what_enters_before_the_mark_lowers_it_even_under_a_claim_that_is_under_way() {
        let marks = Marks::default();
        let (first, _) = begin(&marks);
        took(&marks, &first, (5, 7));
        let (under_way, _) = begin(&marks);
        marks.lower("", (3, 9));
        took(&marks, &under_way, (6, 1));
        assert_eq!(begin(&marks).1, (3, 9));
    }

    #[test]
    fn what_is_stored_behind_the_mark_leaves_it_be_unless_its_priority_may_bring_it_before_a_claim_under_way() {
        let marks = Marks::default();
        let (first, _) = begin(&marks);
        took(&marks, &first, (500, 7));
        marks.took(&first, "", Sort::Users, (500, 7));
        let (under_way, _) = begin(&marks);
        marks.stored("", (600, 8));
        took(&marks, &under_way, (700, 9));
        assert_eq!(begin(&marks).1, (700, 9));
        let (under_way, _) = begin(&marks);
        marks.stored("", (fair::turn(3, 800), 10));
        took(&marks, &under_way, (fair::turn(4, 1), 2));
        assert_eq!(begin(&marks).1, (700, 9));
        marks.stored("", (fair::turn(-3, 800), 11));
        assert_eq!(begin(&marks).1, (fair::turn(-3, 800), 11));
    }

    #[test]
    fn a_hint_leads_to_the_head_while_that_is_cheap() {
        let marks = Marks::default();
        let (first, _) = begin(&marks);
        took(&marks, &first, (5, 7));
        marks.hint();
        assert_eq!(begin(&marks).1, HEAD);
        assert_eq!(begin(&marks).1, (5, 7), "once");
        marks.looked(&first, CHEAP * 2);
        marks.hint();
        assert_eq!(begin(&marks).1, (5, 7));
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
        let (first, _) = begin(&marks);
        assert!(marks.begin_again(&first).is_none(), "it did already");
        took(&marks, &first, (5, 7));
        let (second, _) = begin(&marks);
        assert_eq!(marks.begin_again(&second).and_then(|from| from.only().map(|head| head.nobodys.at)), Some(HEAD));
    }

    fn found(queue: &str, turn: i64) -> Found {
        Found { queue: queue.to_owned(), nobodys: Some((turn, 1)), users: None }
    }

    #[test]
    fn a_queue_where_something_is_stored_is_known_whatever_an_earlier_look_found() {
        let marks = Marks::default();
        let (from, _) = begin(&marks);
        marks.found(&from, None, None, vec![found("", 5), found("mail", 7)]);
        marks.stored("video", (9, 9));
        let mut nexts: Vec<_> =
            marks.begin(&all(), 10).heads.list.iter().map(|head| (head.queue.to_string(), head.nobodys.next)).collect();
        nexts.sort();
        let next = |turn, task| Some((turn, task));
        let expected =
            [("", next(5, 1)), ("mail", next(7, 1)), ("video", next(9, 9))].map(|(queue, next)| (queue.to_owned(), next));
        assert_eq!(nexts, expected);
        // That look began before.
        marks.found(&from, None, None, vec![found("", 5)]);
        let from = marks.begin(&all(), 10);
        let next = |queue: &str| from.heads.list.iter().find(|head| &*head.queue == queue).and_then(|head| head.nobodys.next);
        assert_eq!((next("mail"), next("video")), (None, Some((9, 9))));
    }

    #[test]
    fn each_way_of_asking_looks_from_the_head_by_itself_and_one_of_many_queues_asks_first() {
        let marks = Marks::default();
        let some = |count: usize| Way {
            queues: Some((0..count).map(|number| format!("q{number}")).collect::<Vec<String>>().into()),
            ignore_users: false,
        };
        assert!(marks.begin(&all(), 10).head);
        assert!(!marks.begin(&all(), 10).head);
        let few = marks.begin(&some(3), 10);
        assert!(few.head && !few.has_to_look_around());
        assert_eq!(few.heads.list.len(), 3);
        let many = marks.begin(&some(TOGETHER + 1), 10);
        assert!(many.has_to_look_around());
        marks.found_of(&many, vec![found("q1", 5)]);
        let from = marks.begin(&some(TOGETHER + 1), 10);
        assert!(!from.head);
        assert_eq!(from.only().map(|head| &*head.queue), Some("q1"));
    }

    #[test]
    fn of_many_queues_those_with_the_first_tasks_are_looked_at() {
        let marks = Marks::default();
        let (from, _) = begin(&marks);
        marks.found(&from, None, None, (0..500).map(|number| found(&format!("q{number}"), 1_000 - number)).collect());
        let from = marks.begin(&all(), 10);
        assert_eq!((from.heads.list.len(), from.heads.rest), (10 + 2 * TOGETHER, Some((543, 1))));
        assert!(from.heads.list.iter().all(|head| head.nobodys.at < (543, 1)));
    }
}
