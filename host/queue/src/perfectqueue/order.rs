//! Whose task is next, in PerfectQueue's order. Pure.
//!
//! Each waiting row has a weight, `ifnull(max_running, 1) / (running + 1)` with `running` of its user; the greatest goes first, then the
//! oldest. A row waits while its user has `max_running` or more running, but may always go while none runs. So rows of one user and one
//! `max_running` are a class within which only age counts, and the order needs the oldest rows of each class, not all rows: they are kept
//! here between claims (see [`super::walk`]). `running` counts the rows that are picked, so that no batch goes over a limit.

use std::collections::{BTreeMap, BinaryHeap, HashMap, btree_map};

/// A user as the table compares users; None: no user.
pub(super) type User = Option<Vec<u8>>;
/// Where a row stands in the order of times.
pub(super) type Place = (i64, String);

/// Rows that are kept, over all classes, but never fewer than [`LEAST_OF_CLASS`] of each.
const KEPT_MAX: usize = 200_000;
const LEAST_OF_CLASS: usize = 16;
/// Classes that are kept; what belongs to more of them waits until some are done.
const CLASSES_MAX: usize = 100_000;

/// Waiting rows, as far as they are known.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    classes: HashMap<(User, Option<i64>), Class>,
    rows: usize,
    /// The number of the walk that is under way: rows that the walk does not meet again are gone.
    walk: u32,
}

#[derive(Debug, Default)]
struct Class {
    /// Oldest first; each with the walk that met it last.
    rows: BTreeMap<Place, u32>,
    /// The first row that there was no room for.
    left_out: Option<Place>,
}

/// A row that was picked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pick {
    pub(super) place: Place,
    pub(super) user: User,
    pub(super) max_running: Option<i64>,
}

impl Waiting {
    /// Whether there are rows of users.
    pub(super) fn has_users(&self) -> bool {
        self.classes.keys().any(|(user, _)| user.is_some())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.rows == 0
    }

    pub(super) fn len(&self) -> usize {
        self.rows
    }

    /// A walk begins at the oldest row.
    pub(super) fn begin_walk(&mut self) {
        self.walk = self.walk.wrapping_add(1);
    }

    /// The walk has met all rows there are: what it did not meet is gone.
    pub(super) fn end_walk(&mut self) {
        let walk = self.walk;
        let mut rows = 0;
        self.classes.retain(|_, class| {
            class.rows.retain(|_, met| *met == walk);
            rows += class.rows.len();
            !class.rows.is_empty() || class.left_out.is_some()
        });
        self.rows = rows;
    }

    /// A row was met.
    pub(super) fn meet(&mut self, place: Place, user: User, max_running: Option<i64>) {
        let classes = self.classes.len();
        let kept = (KEPT_MAX / classes.max(1)).max(LEAST_OF_CLASS);
        let class = match self.classes.entry((user, max_running)) {
            std::collections::hash_map::Entry::Occupied(class) => class.into_mut(),
            std::collections::hash_map::Entry::Vacant(_) if classes >= CLASSES_MAX => return,
            std::collections::hash_map::Entry::Vacant(class) => class.insert(Class::default()),
        };
        let behind = class.rows.len() >= kept && class.rows.last_key_value().is_some_and(|(last, _)| *last < place);
        if behind {
            if class.left_out.as_ref().is_none_or(|left_out| place < *left_out) {
                class.left_out = Some(place);
            }
        } else if class.rows.insert(place, self.walk).is_none() {
            self.rows += 1;
        }
    }

    /// A row is taken, or is not as it was.
    pub(super) fn remove(&mut self, pick: &Pick) {
        let Some(class) = self.classes.get_mut(&(pick.user.clone(), pick.max_running)) else { return };
        if class.rows.remove(&pick.place).is_some() {
            self.rows -= 1;
        }
        if class.rows.is_empty() && class.left_out.is_none() {
            self.classes.remove(&(pick.user.clone(), pick.max_running));
        }
    }

    /// Where to read on, if a class that has less than `few` rows left had more than there was room for.
    pub(super) fn left_out(&mut self, few: usize) -> Option<Place> {
        let needy = |class: &Class| class.rows.len() < few && class.left_out.is_some();
        let first = self.classes.values().filter(|class| needy(class)).filter_map(|class| class.left_out.clone()).min()?;
        // What comes behind it is met again.
        for class in self.classes.values_mut().filter(|class| class.left_out.as_ref().is_some_and(|place| *place >= first)) {
            class.left_out = None;
        }
        Some(first)
    }

    /// At most `limit` rows, `limited` of them of users with a limit, first the one that is first. `running` is what each user has running, and
    /// counts the picks as well.
    pub(super) fn pick(&self, running: &mut HashMap<Vec<u8>, i64>, limit: usize, limited: usize) -> Vec<Pick> {
        let mut next: Vec<Next<'_>> = self
            .classes
            .iter()
            .filter(|((user, max_running), _)| limited > 0 || !is_limited(user.as_ref(), *max_running))
            .filter_map(|((user, max_running), class)| Next::of(user.as_ref(), *max_running, class.rows.iter()))
            .collect();
        let mut places: BinaryHeap<Standing<'_>> =
            (0..next.len()).filter_map(|class| next[class].standing(class, running)).collect();
        let mut picks = Vec::with_capacity(limit.min(self.rows));
        let mut limited = limited;
        while picks.len() < limit
            && let Some(first) = places.pop()
        {
            let class = first.class;
            let counts = is_limited(next[class].user, next[class].max_running);
            if counts && limited == 0 {
                continue;
            }
            // Another class of the same user was picked since: it stands further down now.
            if first.running == next[class].running(running) {
                picks.push(next[class].pick());
                limited -= usize::from(counts);
                if let Some(user) = next[class].user {
                    *running.entry(user.clone()).or_default() += 1;
                }
                if !next[class].advance() {
                    continue;
                }
            }
            places.extend(next[class].standing(class, running));
        }
        picks
    }
}

impl Pick {
    /// Whether its user may have another row running.
    pub(super) fn is_open(&self, running: &HashMap<Vec<u8>, i64>) -> bool {
        let running = self.user.as_ref().and_then(|user| running.get(user)).copied().unwrap_or(0);
        self.user.is_none() || is_open(self.max_running, running)
    }
}

/// Whether a row of a user with so many running may run.
fn is_open(max_running: Option<i64>, running: i64) -> bool {
    running == 0 || max_running.is_none_or(|most| most.saturating_sub(running) > 0)
}

/// Whether rows of this kind wait for others of their user.
fn is_limited(user: Option<&Vec<u8>>, max_running: Option<i64>) -> bool {
    user.is_some() && max_running.is_some()
}

/// The next row of a class.
struct Next<'w> {
    user: Option<&'w Vec<u8>>,
    max_running: Option<i64>,
    place: &'w Place,
    rest: btree_map::Iter<'w, Place, u32>,
}

impl<'w> Next<'w> {
    fn of(user: Option<&'w Vec<u8>>, max_running: Option<i64>, mut rows: btree_map::Iter<'w, Place, u32>) -> Option<Self> {
        let (place, _) = rows.next()?;
        Some(Self { user, max_running, place, rest: rows })
    }

    fn advance(&mut self) -> bool {
        let next = self.rest.next();
        self.place = next.map_or(self.place, |(place, _)| place);
        next.is_some()
    }

    fn running(&self, running: &HashMap<Vec<u8>, i64>) -> i64 {
        self.user.and_then(|user| running.get(user)).copied().unwrap_or(0)
    }

    /// None while it has to wait.
    fn standing(&self, class: usize, running: &HashMap<Vec<u8>, i64>) -> Option<Standing<'w>> {
        let running = self.running(running);
        let open = self.user.is_none() || is_open(self.max_running, running);
        open.then(|| Standing { max_running: self.max_running.unwrap_or(1), running, place: self.place, class })
    }

    fn pick(&self) -> Pick {
        Pick { place: self.place.clone(), user: self.user.cloned(), max_running: self.max_running }
    }
}

/// Where a class stands in the order. The greatest is first.
struct Standing<'w> {
    max_running: i64,
    running: i64,
    place: &'w Place,
    class: usize,
}

impl Ord for Standing<'_> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        // max_running / (running + 1) without rounding.
        let mine = i128::from(self.max_running) * (i128::from(other.running) + 1);
        let theirs = i128::from(other.max_running) * (i128::from(self.running) + 1);
        mine.cmp(&theirs).then_with(|| other.place.cmp(self.place)).then_with(|| other.class.cmp(&self.class))
    }
}

impl PartialOrd for Standing<'_> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Standing<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == std::cmp::Ordering::Equal
    }
}

impl Eq for Standing<'_> {}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn user(name: u8) -> User {
        Some(vec![name])
    }

    fn waiting(rows: &[(i64, u8, Option<i64>)]) -> Waiting {
        let mut waiting = Waiting::default();
        waiting.begin_walk();
        for (number, (time, name, max_running)) in rows.iter().enumerate() {
            let user = if *name == 0 { None } else { user(*name) };
            waiting.meet((*time, format!("{number:04}")), user, *max_running);
        }
        waiting.end_walk();
        waiting
    }

    fn numbers(picks: &[Pick]) -> Vec<usize> {
        picks.iter().map(|pick| pick.place.1.parse().unwrap()).collect()
    }

    /// PerfectQueue's own query, after each pick again: all rows, the greatest weight, then the oldest.
    fn slowly(rows: &[(i64, u8, Option<i64>)], mut running: HashMap<u8, i64>, limit: usize) -> Vec<usize> {
        let mut taken: Vec<usize> = Vec::new();
        for _ in 0..limit {
            let running_of = |name: u8| if name == 0 { 0 } else { running.get(&name).copied().unwrap_or(0) };
            let open = (0..rows.len()).filter(|number| !taken.contains(number)).filter(|&number| {
                let (_, name, most) = rows[number];
                running_of(name) == 0 || most.is_none_or(|most| most - running_of(name) > 0)
            });
            let first = open.min_by(|&one, &other| {
                let weight = |number: usize| {
                    let (_, name, most) = rows[number];
                    (i128::from(most.unwrap_or(1)), i128::from(running_of(name)) + 1)
                };
                let ((a, b), (c, d)) = (weight(one), weight(other));
                (c * b).cmp(&(a * d)).then((rows[one].0, one).cmp(&(rows[other].0, other)))
            });
            let Some(first) = first else { break };
            taken.push(first);
            if rows[first].1 != 0 {
                *running.entry(rows[first].1).or_default() += 1;
            }
        }
        taken
    }

    #[test]
    fn limits_hold_within_a_batch() {
        let waiting =
            waiting(&[(1, 1, Some(2)), (2, 1, Some(2)), (3, 1, Some(2)), (4, 2, Some(0)), (5, 2, Some(0)), (6, 0, Some(1))]);
        let mut running = HashMap::from([(vec![1], 1)]);
        assert_eq!(numbers(&waiting.pick(&mut running, 9, 9)), [0, 5, 3]);
        assert_eq!(running, HashMap::from([(vec![1], 2), (vec![2], 1)]));
    }

    #[test]
    fn tasks_of_limited_users_are_picked_up_to_their_number() {
        let waiting = waiting(&[(1, 1, Some(9)), (2, 1, Some(9)), (3, 2, None), (4, 0, Some(9)), (5, 2, Some(9))]);
        let pick = |limit, limited| numbers(&waiting.pick(&mut HashMap::new(), limit, limited));
        assert_eq!(pick(9, 9), [0, 3, 4, 1, 2]);
        assert_eq!(pick(9, 1), [0, 3, 2]);
        assert_eq!(pick(9, 0), [3, 2], "who has no user has no limit");
        assert_eq!(pick(2, 1), [0, 3]);
    }

    #[test]
    fn what_a_walk_does_not_meet_again_is_gone() {
        let mut waiting = waiting(&[(1, 1, None), (2, 1, None)]);
        waiting.begin_walk();
        waiting.meet((2, "0001".to_owned()), user(1), None);
        waiting.end_walk();
        assert_eq!(numbers(&waiting.pick(&mut HashMap::new(), 9, 9)), [1]);
        waiting.remove(&waiting.pick(&mut HashMap::new(), 1, 1)[0].clone());
        assert!(waiting.is_empty() && waiting.classes.is_empty());
    }

    #[test]
    fn what_there_is_no_room_for_is_read_when_it_is_needed() {
        let mut waiting = Waiting::default();
        waiting.begin_walk();
        let rows = i64::try_from(KEPT_MAX).unwrap() + 10;
        for time in 0..rows {
            waiting.meet((time, "k".to_owned()), None, None);
        }
        assert_eq!(waiting.len(), KEPT_MAX);
        assert_eq!(waiting.left_out(100), None, "there is enough");
        assert_eq!(waiting.left_out(usize::MAX).map(|place| place.0), Some(rows - 10));
        assert_eq!(waiting.left_out(usize::MAX), None);
    }

    proptest! {
        #[test]
        fn the_order_is_perfectqueues(
            rows in proptest::collection::vec((0i64..6, 0u8..5, proptest::option::of(0i64..4)), 0..40),
            running in proptest::collection::hash_map(1u8..5, 1i64..4, 0..4),
            limit in 0usize..50,
        ) {
            let mut counted: HashMap<Vec<u8>, i64> = running.iter().map(|(name, count)| (vec![*name], *count)).collect();
            let picks = waiting(&rows).pick(&mut counted, limit, limit);
            prop_assert_eq!(numbers(&picks), slowly(&rows, running, limit));
        }
    }
}
