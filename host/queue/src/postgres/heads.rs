//! Where a claim begins in each queue, and which queues it looks at together.
//!
//! What is ready of several queues is merged in the order of turns, [`TOGETHER`] queues at a time: those whose first tasks are thought to come first.
//! Nothing is taken behind the place where the next one's first task is thought to be, so what is taken is first among all of them. Where a queue
//! goes on is learnt with each look, so mostly one is enough.

use std::collections::HashMap;
use std::sync::Arc;

/// Queues that one statement looks at.
pub(super) const TOGETHER: usize = 16;

/// A place in the order of claims: a task's turn, and its number.
pub(super) type Place = (i64, i64);

/// Before all places.
pub(super) const HEAD: Place = (i64::MIN, i64::MIN);
/// Behind all places.
pub(super) const END: Place = (i64::MAX, i64::MAX);

/// The queues of a claim, as the tables name them. None: all.
pub(super) type Scope = Option<Arc<[String]>>;

/// Where ready tasks of one sort are looked for in a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Spot {
    /// Here the look begins.
    pub(super) at: Place,
    /// Where the first one is thought to be, or before it. None: there is thought to be none.
    pub(super) next: Option<Place>,
}

/// The place right behind one.
pub(super) fn behind((turn, task): Place) -> Place {
    (turn, task.saturating_add(1))
}

impl Spot {
    /// One of which nothing is known.
    pub(super) const UNKNOWN: Self = Self { at: HEAD, next: Some(HEAD) };
    /// One where nothing is.
    pub(super) const EMPTY: Self = Self { at: HEAD, next: None };
}

/// The first places of some queues.
#[derive(Clone, Debug, Default)]
pub(super) struct Places(HashMap<String, Place>);

impl Places {
    pub(super) fn add(&mut self, queue: &str, place: Place) {
        if let Some(first) = self.0.get_mut(queue) {
            *first = place.min(*first);
        } else {
            self.0.insert(queue.to_owned(), place);
        }
    }

    pub(super) fn extend(&mut self, other: Self) {
        for (queue, place) in other.0 {
            self.add(&queue, place);
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, Place)> {
        self.0.iter().map(|(queue, place)| (queue.as_str(), *place))
    }
}

/// Sorts of ready tasks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Sort {
    /// Without user.
    Nobodys,
    /// Of any user.
    Users,
}

/// A queue, and where a claim begins in it.
#[derive(Clone, Debug)]
pub(super) struct Head {
    pub(super) queue: Arc<str>,
    pub(super) nobodys: Spot,
    pub(super) users: Spot,
}

impl Head {
    pub(super) fn spot(&self, sort: Sort) -> &Spot {
        match sort {
            Sort::Nobodys => &self.nobodys,
            Sort::Users => &self.users,
        }
    }

    fn spot_mut(&mut self, sort: Sort) -> &mut Spot {
        match sort {
            Sort::Nobodys => &mut self.nobodys,
            Sort::Users => &mut self.users,
        }
    }

    /// Where its first task of these sorts is thought to be.
    pub(super) fn next(&self, sorts: &[Sort]) -> Option<Place> {
        sorts.iter().filter_map(|sort| self.spot(*sort).next).min()
    }

    /// By this the queues are looked at: first those whose next task is first, and at last those that are thought to be empty.
    pub(super) fn rank(&self, sorts: &[Sort]) -> (bool, Option<Place>) {
        let next = self.next(sorts);
        (next.is_none(), next)
    }
}

/// The queues of one claim.
#[derive(Clone, Debug, Default)]
pub(super) struct Heads {
    pub(super) list: Vec<Head>,
    /// Those that are left out of the list have nothing before this place, as far as is known. None: nothing at all.
    pub(super) rest: Option<Place>,
}

/// Queues that are looked at together: so many of the first of the list.
#[derive(Clone, Copy, Debug)]
pub(super) struct Group {
    pub(super) count: usize,
    /// Nothing is taken from this place on.
    pub(super) bound: Option<Place>,
}

impl Group {
    /// The last that may be taken of what was met.
    pub(super) fn last_of(self, met: &[Met]) -> Option<Place> {
        met.iter().map(|met| met.place).rfind(|place| self.bound.is_none_or(|bound| *place < bound))
    }
}

/// A ready task that a look met: in which queue of the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Met {
    pub(super) head: usize,
    pub(super) sort: Sort,
    pub(super) place: Place,
}

/// How a look ended.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ended {
    /// All that it met up to this place is taken, or somebody else's. None: nothing is.
    pub(super) upto: Option<Place>,
    /// It met as much as it may, so there may be more.
    pub(super) is_full: bool,
}

/// What is bound for the queues of a group.
pub(super) struct Columns {
    pub(super) queues: Vec<String>,
    pub(super) turns: Vec<i64>,
    pub(super) tasks: Vec<i64>,
}

impl Heads {
    /// The only queue, if there is one only.
    pub(super) fn only(&self) -> Option<&Head> {
        self.list.first().filter(|_| self.list.len() == 1 && self.rest.is_none())
    }

    /// The queues to be looked at next. The list is in their order from now on.
    pub(super) fn group(&mut self, sorts: &[Sort]) -> Group {
        self.list.sort_by_key(|head| head.rank(sorts));
        let count = self.list.len().min(TOGETHER);
        let others = self.list.get(count).and_then(|head| head.next(sorts));
        Group { count, bound: others.into_iter().chain(self.rest).min() }
    }

    /// Whether some queue is thought to have something.
    pub(super) fn has_more(&self, sorts: &[Sort]) -> bool {
        self.list.iter().any(|head| head.next(sorts).is_some())
    }

    /// What is bound for the queues of a group.
    pub(super) fn columns(&self, group: Group, sort: Sort) -> Columns {
        let heads = || self.list.iter().take(group.count);
        let (turns, tasks) = heads().map(|head| head.spot(sort).at).unzip();
        Columns { queues: heads().map(|head| head.queue.to_string()).collect(), turns, tasks }
    }

    /// Learn from a look at a group where its queues go on. `met` is in the order of places.
    pub(super) fn learn(&mut self, group: Group, sorts: &[Sort], met: &[Met], ended: Ended) {
        let left: Vec<&Met> = met.iter().filter(|met| ended.upto.is_none_or(|upto| met.place > upto)).collect();
        let further = met.last().filter(|_| ended.is_full).map(|met| met.place);
        for (number, head) in self.list.iter_mut().take(group.count).enumerate() {
            for sort in sorts {
                let first = left.iter().find(|met| met.head == number && met.sort == *sort);
                let spot = head.spot_mut(*sort);
                spot.next = first.map(|met| met.place).or(further);
                spot.at = spot.at.max(ended.upto.map_or(HEAD, behind));
            }
        }
    }

    /// These are still there.
    pub(super) fn put_back(&mut self, places: &HashMap<(&str, Sort), Place>) {
        for head in &mut self.list {
            for sort in [Sort::Nobodys, Sort::Users] {
                let place = places.get(&(&*head.queue, sort)).copied();
                let spot = head.spot_mut(sort);
                spot.next = spot.next.into_iter().chain(place).min();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOBODYS: [Sort; 1] = [Sort::Nobodys];

    fn heads(nexts: impl IntoIterator<Item = Option<i64>>) -> Heads {
        let head = |(number, next): (usize, Option<i64>)| Head {
            queue: format!("q{number}").into(),
            nobodys: Spot { at: HEAD, next: next.map(|turn| (turn, 1)) },
            users: Spot::UNKNOWN,
        };
        Heads { list: nexts.into_iter().enumerate().map(head).collect(), rest: None }
    }

    fn met(head: usize, turn: i64) -> Met {
        Met { head, sort: Sort::Nobodys, place: (turn, 1) }
    }

    #[test]
    fn those_that_come_first_are_looked_at_and_nothing_behind_the_next_one() {
        let mut heads = heads((0..20).rev().map(|turn| (turn != 3).then_some(turn)));
        let group = heads.group(&NOBODYS);
        assert_eq!((group.count, group.bound), (TOGETHER, Some((17, 1))));
        assert_eq!(heads.columns(group, Sort::Nobodys).queues[..4], ["q19", "q18", "q17", "q15"]);
        heads.rest = Some((16, 5));
        assert_eq!(heads.group(&NOBODYS).bound, Some((16, 5)));
    }

    #[test]
    fn queues_where_nothing_is_keep_no_other_waiting() {
        let mut heads = heads((0..TOGETHER).map(|_| Some(1)).chain([Some(9)]));
        let group = heads.group(&NOBODYS);
        heads.learn(group, &NOBODYS, &[met(3, 12)], Ended { upto: None, is_full: false });
        let group = heads.group(&NOBODYS);
        assert_eq!((&*heads.list[0].queue, &*heads.list[1].queue, group.bound), ("q16", "q3", None));
    }

    #[test]
    fn a_look_tells_where_each_queue_goes_on() {
        let mut heads = heads([Some(1), Some(2), Some(3)]);
        let group = heads.group(&NOBODYS);
        let looked = [met(0, 1), met(1, 2), met(0, 4), met(1, 5)];
        heads.learn(group, &NOBODYS, &looked, Ended { upto: Some((2, 1)), is_full: true });
        let nexts: Vec<Option<Place>> = heads.list.iter().map(|head| head.nobodys.next).collect();
        assert_eq!(nexts, [Some((4, 1)), Some((5, 1)), Some((5, 1))], "the third is not before the last one met");
        assert!(heads.list.iter().all(|head| head.nobodys.at == (2, 2)));
        heads.learn(group, &NOBODYS, &[met(1, 5)], Ended { upto: Some((5, 1)), is_full: false });
        assert!(!heads.has_more(&NOBODYS));
        heads.put_back(&HashMap::from([(("q1", Sort::Nobodys), (5, 1))]));
        assert!(heads.has_more(&NOBODYS));
    }
}
