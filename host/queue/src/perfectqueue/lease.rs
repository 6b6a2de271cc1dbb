//! The leases that this process holds. The table has no room for what tells one claim from another, so it is kept here: the key, the token in
//! `owner`, and the `timeout` that was written last. A restarted host has no leases; what it had comes back when their time is over.
//!
//! The fence of every write of an attempt is (key, owner = token, timeout = what was written last, not yet over). A write that may or may not
//! have reached the table leaves two values that count. Writes of one lease follow each other, since one that does not know of the value that
//! another has just written would believe the lease lost.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::OwnedMutexGuard;

use crate::{HostId, Lease, LeaseRef, TaskId};

/// Leases that ended otherwise than by a settlement and are remembered, so that a host that comes back can excuse them.
const LOST_MAX: usize = 20_000;
/// Between two looks for leases that nobody settled.
const FORGET_INTERVAL: Duration = Duration::from_secs(10);

/// A lease of this process.
#[derive(Clone, Debug)]
pub(super) struct Held {
    pub(super) key: String,
    pub(super) token: u64,
    /// The values that `timeout` may have if it was written by us last; as a rule one.
    pub(super) timeouts: Vec<i64>,
    /// Held by the write that is under way.
    turn: Arc<tokio::sync::Mutex<()>>,
    /// As the claim asked for it.
    pub(super) alive_time: Duration,
    pub(super) host: HostId,
    /// Other tasks of its user may wait for its end.
    pub(super) is_limited: bool,
    /// It may have been settled by a try whose answer was lost.
    pub(super) in_doubt: bool,
    /// When it is over at the latest, by this machine's monotonic clock.
    over: Instant,
}

impl Held {
    pub(super) fn new(key: String, token: u64, timeout: i64, alive_time: Duration, host: HostId) -> Self {
        let over = Instant::now() + longest(alive_time);
        Self {
            key,
            token,
            timeouts: vec![timeout],
            turn: Arc::default(),
            alive_time,
            host,
            is_limited: false,
            in_doubt: false,
            over,
        }
    }
}

impl Held {
    /// The same; whether others of its user may wait for its end.
    pub(super) fn limited(self, is_limited: bool) -> Self {
        Self { is_limited, ..self }
    }
}

/// The longest that a lease can last which was asked for now.
fn longest(alive_time: Duration) -> Duration {
    alive_time.saturating_add(Duration::from_secs(60)).min(Duration::from_secs(30 * 365 * 24 * 3600))
}

/// How much later than `alive_time` a lease ends, in seconds, rounding apart: three to five if it is ten or more, else nothing. A Ruby worker that
/// had the task before, and has the same `alive_time`, writes by its heartbeat a value that is three seconds later only three seconds later: we have renewed by
/// then, every two seconds if nothing else is configured, so it does not write by chance the very value that stands there, and is noticed. One with
/// another `alive_time` may, but not again and again, since each renewal draws anew.
pub(super) fn apart(alive_time: Duration) -> i64 {
    if alive_time < Duration::from_secs(10) { 0 } else { fastrand::i64(3..=5) }
}

/// One's turn to write under some leases.
#[derive(Debug)]
pub(super) struct Turns {
    _turns: Vec<OwnedMutexGuard<()>>,
}

#[derive(Debug, Default)]
pub(super) struct Leases {
    held: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    leases: HashMap<LeaseRef, Held>,
    /// Keys of leases that were lost, and the leases in the order in which they were.
    lost: HashMap<LeaseRef, String>,
    lost_order: VecDeque<LeaseRef>,
    looked_at: Option<Instant>,
}

/// What a task's lease is called outside: the row's number, and the token.
pub(super) fn lease_ref(number: i64, token: u64) -> LeaseRef {
    LeaseRef { task: TaskId(number), lease: Lease(token.cast_signed()) }
}

impl Leases {
    /// Enter what was claimed, and forget what is over and was never settled.
    pub(super) fn enter(&self, leases: impl IntoIterator<Item = (LeaseRef, Held)>) {
        let mut known = self.lock();
        known.leases.extend(leases);
        if known.looked_at.is_none_or(|looked_at| looked_at.elapsed() > FORGET_INTERVAL) {
            let now = Instant::now();
            known.looked_at = Some(now);
            let over: Vec<LeaseRef> =
                known.leases.iter().filter(|(_, held)| held.over <= now).map(|(lease_ref, _)| *lease_ref).collect();
            over.into_iter().for_each(|lease_ref| known.lose(lease_ref));
        }
    }

    pub(super) fn get(&self, lease_ref: LeaseRef) -> Option<Held> {
        self.lock().leases.get(&lease_ref).cloned()
    }

    /// How many a host has.
    pub(super) fn of(&self, host: HostId) -> u64 {
        self.lock().leases.values().filter(|held| held.host == host).count() as u64
    }

    /// Wait for one's turn to write under these leases, which lasts as long as the answer lives. All take turns in the same order.
    pub(super) async fn turns(&self, leases: impl Iterator<Item = LeaseRef>) -> Turns {
        let mut waiting: Vec<(String, LeaseRef, Arc<tokio::sync::Mutex<()>>)> = {
            let known = self.lock();
            let entry =
                |lease_ref| known.leases.get(&lease_ref).map(|held| (held.key.clone(), lease_ref, Arc::clone(&held.turn)));
            leases.filter_map(entry).collect()
        };
        waiting.sort_unstable_by(|one, other| (&one.0, one.1.lease).cmp(&(&other.0, other.1.lease)));
        waiting.dedup_by_key(|(_, lease_ref, _)| *lease_ref);
        let mut turns = Vec::with_capacity(waiting.len());
        for (_, _, turn) in waiting {
            turns.push(turn.lock_owned().await);
        }
        Turns { _turns: turns }
    }

    /// A new `timeout` is about to be written; from now on it counts too.
    pub(super) fn writing(&self, lease_ref: LeaseRef, timeout: i64, alive_time: Duration) {
        if let Some(held) = self.lock().leases.get_mut(&lease_ref) {
            held.over = held.over.max(Instant::now() + longest(alive_time));
            if !held.timeouts.contains(&timeout) {
                held.timeouts.push(timeout);
            }
        }
    }

    /// A `timeout` stands in the table: only this one counts from now on.
    pub(super) fn written(&self, lease_ref: LeaseRef, timeout: i64) {
        if let Some(held) = self.lock().leases.get_mut(&lease_ref) {
            held.timeouts = vec![timeout];
        }
    }

    /// It may have been settled.
    pub(super) fn doubt(&self, lease_ref: LeaseRef) {
        if let Some(held) = self.lock().leases.get_mut(&lease_ref) {
            held.in_doubt = true;
        }
    }

    /// It was settled.
    pub(super) fn forget(&self, lease_ref: LeaseRef) {
        self.lock().leases.remove(&lease_ref);
    }

    /// It does not hold any more, although nobody here settled it.
    pub(super) fn lose(&self, lease_ref: LeaseRef) {
        self.lock().lose(lease_ref);
    }

    /// The keys of these leases, as far as they are known, with their tokens.
    pub(super) fn keys(&self, leases: &[LeaseRef]) -> Vec<(String, u64)> {
        let known = self.lock();
        let key = |lease_ref| known.lost.get(lease_ref).or_else(|| known.leases.get(lease_ref).map(|held| &held.key));
        leases.iter().filter_map(|lease_ref| Some((key(lease_ref)?.clone(), lease_ref.lease.0.cast_unsigned()))).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    fn lose(&mut self, lease_ref: LeaseRef) {
        let Some(held) = self.leases.remove(&lease_ref) else { return };
        if self.lost.insert(lease_ref, held.key).is_none() {
            self.lost_order.push_back(lease_ref);
        }
        while self.lost_order.len() > LOST_MAX
            && let Some(oldest) = self.lost_order.pop_front()
        {
            self.lost.remove(&oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_value_counts_that_may_have_been_written() {
        let leases = Leases::default();
        let lease = lease_ref(7, 1 << 62);
        leases.enter([(lease, Held::new("a".to_owned(), 1 << 62, 100, Duration::from_secs(9), HostId(1)))]);
        let turns = leases.turns([lease, lease].into_iter()).await;
        leases.writing(lease, 102, Duration::from_secs(9));
        assert_eq!(leases.get(lease).unwrap().timeouts, [100, 102]);
        leases.writing(lease, 104, Duration::from_secs(9));
        leases.written(lease, 104);
        assert_eq!(leases.get(lease).unwrap().timeouts, [104]);
        let next = leases.turns([lease].into_iter());
        tokio::pin!(next);
        assert!(futures_none(next.as_mut()).await, "one after the other");
        drop(turns);
        next.await;
        leases.forget(lease);
        assert!(leases.get(lease).is_none());
    }

    /// Whether it is not ready at once.
    async fn futures_none<F: Future>(future: std::pin::Pin<&mut F>) -> bool {
        tokio::select! {
            biased;
            _ = future => false,
            () = std::future::ready(()) => true,
        }
    }

    #[test]
    fn a_lease_stands_apart_from_what_ruby_writes() {
        for seconds in [10, 60, 300, 86_400] {
            let drawn: std::collections::BTreeSet<i64> = (0..200).map(|_| apart(Duration::from_secs(seconds))).collect();
            assert_eq!(drawn.into_iter().collect::<Vec<_>>(), [3, 4, 5], "after {seconds} s");
        }
        assert_eq!([0, 9].map(|seconds| apart(Duration::from_secs(seconds))), [0, 0], "it would be another lease");
    }
}
