//! Which settlements go into one transaction, and when a refused group is tried again: bounded by number, bytes and follow-ups, halved until
//! what is refused stands alone. Pure but for the clock that its caller passes in.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use laelaps_queue::{Settlement, Verdict};
use tokio::time::Instant;

/// What the settlements of one transaction carry together, unless one alone has more: servers refuse messages beyond a size, and everything in
/// a group is in memory several times while it is sent.
const BYTES_MAX: usize = 8 << 20;
/// Follow-up tasks in one transaction, unless one settlement alone has more.
const FOLLOW_UPS_MAX: usize = 2_000;
/// Failures of a kind that strikes all groups alike, after which a group is halved all the same: its size may be the cause, which not every
/// server says.
const FAILURES_UNTIL_HALVED: u32 = 3;
/// The first and the longest wait before a settlement that stands alone is tried again.
pub(super) const RETRY_FIRST: Duration = Duration::from_millis(50);
pub(super) const RETRY_MAX: Duration = Duration::from_secs(5);

/// Settlements that are written together, and what is known of each. Apart, so that nothing is copied to be written.
pub(super) struct Group<K> {
    pub(super) settlements: Vec<Settlement>,
    pub(super) known: Vec<K>,
    /// Failures in a row of a kind that strikes all groups alike.
    failures: u32,
    /// How long the next refusal lets it wait, if it stands alone.
    wait: Duration,
}

/// Why a group was not written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// Something in it is held by a transaction of somebody else.
    Busy,
    /// Something in it can never be written as it is.
    Unfit,
    /// What strikes all groups alike, as a rule: no answer, no permission, no writes.
    Outage,
}

/// What follows a refusal.
pub(super) enum Next<K> {
    /// It waits in [`Lane`], whole or in halves.
    Waits,
    /// It stands alone, and can never be written as it is.
    Culprit(Settlement, K),
}

impl<K> Group<K> {
    pub(super) fn of(settlements: Vec<Settlement>, known: Vec<K>) -> Self {
        Self { settlements, known, failures: 0, wait: RETRY_FIRST }
    }

    pub(super) fn len(&self) -> usize {
        self.settlements.len()
    }

    fn halves(mut self) -> [Self; 2] {
        let middle = self.settlements.len() / 2;
        let later = Self::of(self.settlements.split_off(middle), self.known.split_off(middle));
        [Self::of(self.settlements, self.known), later]
    }
}

/// What waits to be written, in the order in which it is to be tried.
pub(super) struct Lane<K> {
    /// Settlements of one transaction at most.
    group_max: usize,
    arrived: VecDeque<Box<(Settlement, K)>>,
    /// Refused groups by the moment of their next try; the number tells those of one moment apart.
    refused: BTreeMap<(Instant, u64), Group<K>>,
    number: u64,
    /// The last one taken had arrived; then a refused one that is due comes first.
    took_arrived: bool,
}

impl<K> Lane<K> {
    pub(super) fn new(group_max: usize) -> Self {
        Self { group_max, arrived: VecDeque::new(), refused: BTreeMap::new(), number: 0, took_arrived: false }
    }

    pub(super) fn push(&mut self, arrived: Box<(Settlement, K)>) {
        self.arrived.push_back(arrived);
    }

    /// How many more can arrive before a group is full.
    pub(super) fn room(&self) -> usize {
        self.group_max.saturating_sub(self.arrived.len())
    }

    pub(super) fn has_arrived(&self) -> bool {
        !self.arrived.is_empty()
    }

    /// When the next refused group is to be tried again.
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.refused.first_key_value().map(|((due, _), _)| *due)
    }

    /// The next group: what has arrived and what is tried again take turns, so that neither waits for more than one transaction of the other.
    pub(super) fn take(&mut self, now: Instant) -> Option<Group<K>> {
        let due = self.next_due().is_some_and(|due| due <= now);
        self.took_arrived = self.has_arrived() && !(due && self.took_arrived);
        if self.took_arrived {
            return Some(self.take_arrived());
        }
        if due { self.refused.pop_first().map(|(_, group)| group) } else { None }
    }

    fn take_arrived(&mut self) -> Group<K> {
        let (mut bytes, mut follow_ups) = (0, 0);
        let fits = |settlement: &&Settlement| {
            bytes += bytes_of(settlement);
            follow_ups += settlement.follow_ups.len();
            bytes <= BYTES_MAX && follow_ups <= FOLLOW_UPS_MAX
        };
        let fitting = self.arrived.iter().map(|arrived| &arrived.0).take(self.group_max).take_while(fits).count().max(1);
        let fitting = fitting.min(self.arrived.len());
        let (mut settlements, mut known) = (Vec::with_capacity(fitting), Vec::with_capacity(fitting));
        for arrived in self.arrived.drain(..fitting) {
            let (settlement, what_is_known) = *arrived;
            settlements.push(settlement);
            known.push(what_is_known);
        }
        Group::of(settlements, known)
    }

    /// A group was not written: decide when it is tried again, and with whom.
    pub(super) fn refused(&mut self, mut group: Group<K>, refusal: Refusal, now: Instant) -> Next<K> {
        group.failures = if refusal == Refusal::Outage { group.failures + 1 } else { 0 };
        let is_halved = match refusal {
            Refusal::Busy | Refusal::Unfit => true,
            Refusal::Outage => group.failures >= FAILURES_UNTIL_HALVED,
        };
        if group.len() > 1 {
            if is_halved {
                for half in group.halves() {
                    self.wait(half, now);
                }
            } else {
                self.wait(group, now);
            }
            return Next::Waits;
        }
        if refusal == Refusal::Unfit
            && let (Some(settlement), Some(known)) = (group.settlements.pop(), group.known.pop())
        {
            return Next::Culprit(settlement, known);
        }
        let due = now + group.wait;
        group.wait = (group.wait * 2).min(RETRY_MAX);
        self.wait(group, due);
        Next::Waits
    }

    fn wait(&mut self, group: Group<K>, due: Instant) {
        self.number += 1;
        self.refused.insert((due, self.number), group);
    }
}

/// What a settlement carries.
pub(super) fn bytes_of(settlement: &Settlement) -> usize {
    let output = match settlement.verdict() {
        Verdict::Finish { output, .. } => output.as_ref().map_or(0, Vec::len),
        Verdict::Wait { .. } | Verdict::Unserved { .. } | Verdict::Fail { .. } => 0,
    };
    let words = settlement.error_message.as_ref().map_or(0, String::len);
    output + words + settlement.follow_ups.iter().map(|task| task.data.len()).sum::<usize>()
}

#[cfg(test)]
mod tests {
    use laelaps_queue::{Attempt, Event, Lease, LeaseRef, NewTask, Policy, TaskId};

    use super::*;

    fn settlement(number: i64, output: usize, follow_ups: usize) -> Settlement {
        let attempt = Attempt {
            attempt: 1,
            max_attempts: None,
            releases: 0,
            lost: 0,
            lost_alone: 0,
            alone: false,
            lost_for: Duration::ZERO,
        };
        let event = Event::Finish { output: Some(vec![b'x'; output]), retention: None };
        let follow_ups = (0..follow_ups).map(|follow_up| NewTask::new(format!("{number}/{follow_up}"), "t", "{}")).collect();
        let lease_ref = LeaseRef { task: TaskId(number), lease: Lease(number) };
        Settlement::of(lease_ref, event, attempt, &Policy::default(), 0.0, None, follow_ups)
    }

    fn numbers(group: &Group<i64>) -> Vec<i64> {
        assert!(group.settlements.iter().map(|settlement| settlement.lease_ref.task.0).eq(group.known.iter().copied()));
        group.known.clone()
    }

    fn lane(settlements: impl IntoIterator<Item = Settlement>) -> Lane<i64> {
        let mut lane = Lane::new(500);
        for settlement in settlements {
            let number = settlement.lease_ref.task.0;
            lane.push(Box::new((settlement, number)));
        }
        lane
    }

    #[test]
    fn a_group_is_bounded_by_bytes_follow_ups_and_number() {
        let now = Instant::now();
        let mut heavy = lane((0..64).map(|number| settlement(number, 1 << 20, 0)));
        let mut sizes = Vec::new();
        while let Some(group) = heavy.take(now) {
            assert!(group.settlements.iter().map(bytes_of).sum::<usize>() <= BYTES_MAX);
            sizes.push(group.len());
        }
        assert_eq!((sizes.iter().sum::<usize>(), sizes.len()), (64, 8));

        let mut too_heavy = lane([settlement(1, 1, 0), settlement(2, 2 * BYTES_MAX, 0), settlement(3, 1, 0)]);
        let groups: Vec<_> = std::iter::from_fn(|| too_heavy.take(now)).map(|group| numbers(&group)).collect();
        assert_eq!(groups, [vec![1], vec![2], vec![3]], "one that is too large in itself goes alone");

        let mut parents = lane((0..4).map(|number| settlement(number, 0, FOLLOW_UPS_MAX / 2)));
        assert_eq!((parents.take(now).unwrap().len(), parents.take(now).unwrap().len()), (2, 2));
        let mut light = lane((0..1_200).map(|number| settlement(number, 0, 0)));
        assert_eq!(light.take(now).unwrap().len(), 500);
    }

    /// Write everything with one settlement that is refused; returns the sizes of the groups that were refused, and of those that were written.
    fn with_one(refusal: Refusal, culprit: i64, count: i64) -> (Vec<usize>, Vec<i64>, Option<i64>) {
        let now = Instant::now();
        let mut lane = lane((0..count).map(|number| settlement(number, 0, 0)));
        let (mut refused, mut written, mut found) = (Vec::new(), Vec::new(), None);
        while let Some(group) = lane.take(now) {
            if !group.known.contains(&culprit) {
                written.extend(numbers(&group));
                continue;
            }
            refused.push(group.len());
            if let Next::Culprit(_, known) = lane.refused(group, refusal, now) {
                found = Some(known);
            }
        }
        (refused, written, found)
    }

    #[test]
    fn a_refused_group_is_halved_until_the_culprit_stands_alone_and_the_rest_is_written() {
        for culprit in [0, 17, 63] {
            let (refused, mut written, found) = with_one(Refusal::Unfit, culprit, 64);
            assert_eq!(refused, [64, 32, 16, 8, 4, 2, 1]);
            written.sort_unstable();
            assert!(written.into_iter().eq((0..64).filter(|number| *number != culprit)));
            assert_eq!(found, Some(culprit));
            let (refused, written, found) = with_one(Refusal::Busy, culprit, 64);
            assert_eq!((refused.len(), written.len(), found), (7, 63, None), "one that is busy waits for its turn");
        }
    }

    #[test]
    fn one_that_stands_alone_waits_longer_and_longer_and_what_arrives_goes_first() {
        let mut now = Instant::now();
        let mut lane = lane([settlement(1, 0, 0)]);
        let mut waits = Vec::new();
        for _ in 0..9 {
            let busy = lane.take(now).unwrap();
            assert!(matches!(lane.refused(busy, Refusal::Busy, now), Next::Waits));
            lane.push(Box::new((settlement(2, 0, 0), 2)));
            assert_eq!(numbers(&lane.take(now).unwrap()), [2]);
            assert!(lane.take(now).is_none(), "not before its time");
            let due = lane.next_due().unwrap();
            waits.push(due - now);
            now = due;
        }
        assert_eq!((waits[0], waits[1], waits[8]), (RETRY_FIRST, RETRY_FIRST * 2, RETRY_MAX));
    }

    #[test]
    fn what_arrives_without_end_does_not_keep_a_refused_group_waiting() {
        let now = Instant::now();
        let mut lane = lane([settlement(1, 0, 0), settlement(2, 0, 0)]);
        let group = lane.take(now).unwrap();
        let _ = lane.refused(group, Refusal::Busy, now);
        let mut order = Vec::new();
        for number in 10..14 {
            lane.push(Box::new((settlement(number, 0, 0), number)));
            order.extend(numbers(&lane.take(now).unwrap()));
        }
        assert_eq!(order, [1, 10, 11, 2, 12, 13]);
    }

    #[test]
    fn an_outage_leaves_groups_whole_for_a_while_and_halves_what_never_passes() {
        let now = Instant::now();
        let mut lane = lane((0..4).map(|number| settlement(number, 0, 0)));
        let mut sizes = Vec::new();
        for _ in 0..3 {
            let group = lane.take(now).unwrap();
            sizes.push(group.len());
            assert!(matches!(lane.refused(group, Refusal::Outage, now), Next::Waits));
        }
        assert_eq!((sizes, lane.take(now).unwrap().len()), (vec![4, 4, 4], 2));
    }
}
