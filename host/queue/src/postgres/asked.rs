//! What a claim asks for, and what it took.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::heads::Scope;
use super::mark::Way;
use super::session::Shared;
use super::settle::Group;
use super::unreadable::{self, Broken};
use crate::outcome::ms;
use crate::unserved::Sieve;
use crate::{Attempt, Claim, Claimed, ClaimedTask, Event, Policy, Settlement, data, task};

/// The most tasks of one claim.
const CLAIMED_MAX: u32 = 1_000;

/// What a claim took out of the database, data as it is stored.
#[derive(Default)]
pub(super) struct Taken {
    pub(super) tasks: Vec<ClaimedTask>,
    /// What was taken and cannot be read.
    pub(super) broken: Vec<Broken>,
    pub(super) alone_waiting: bool,
    pub(super) next_due_in: Option<Duration>,
}

impl Taken {
    pub(super) fn len(&self) -> usize {
        self.tasks.len()
    }

    /// Hand the tasks back, since nobody is there any more to take them.
    pub(super) async fn give_back(self, shared: &Arc<Shared>) {
        let policy = Policy::default();
        let handed_back = |task: &ClaimedTask| {
            Settlement::of(task.lease_ref, Event::Stopped, Attempt::of(task), &policy, 0.0, None, Vec::new())
        };
        let settlements: Vec<Settlement> = self.tasks.iter().map(handed_back).collect();
        if let Err(error) = unreadable::set_aside(shared, self.broken).await {
            tracing::warn!(%error, "unreadable tasks come back when their leases end");
        }
        if settlements.is_empty() {
            return;
        }
        if let Ok(group) = Group::new(&settlements)
            && let Err(error) = group.write_within(shared, "handing back claimed tasks").await
        {
            tracing::warn!(%error, "claimed tasks that nobody waits for come back when their leases end");
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.tasks.is_empty() && self.broken.is_empty()
    }

    /// Decompress. Tasks whose data is damaged are taken out and answered.
    pub(super) fn open(&mut self) -> Vec<Broken> {
        let mut broken = std::mem::take(&mut self.broken);
        for mut task in std::mem::take(&mut self.tasks) {
            task.compression = data::compression(&task.data);
            let plain = data::decompress(std::mem::take(&mut task.data));
            match plain.and_then(|plain| data::check(&plain).map(|()| plain)) {
                Ok(plain) => self.tasks.push(ClaimedTask { data: plain, ..task }),
                Err(problem) => broken.push(Broken::by_data(&task, problem)),
            }
        }
        broken
    }

    /// Take out what the claimer does not serve; answers what puts it apart.
    pub(super) fn sift(&mut self, sieve: &mut Sieve<'_>) -> Vec<Settlement> {
        let (served, others) = sieve.sift(std::mem::take(&mut self.tasks));
        self.tasks = served;
        others
    }

    pub(super) fn into_claimed(self) -> Claimed {
        Claimed { tasks: self.tasks, alone_waiting: self.alone_waiting, next_due_in: self.next_due_in }
    }
}

/// What a claim is about to do, and under which number.
#[derive(Clone)]
pub(super) struct Asked {
    pub(super) claim: Claim,
    pub(super) limit: usize,
    /// Of these, the most of users with a limit.
    pub(super) limited: usize,
    pub(super) alive_ms: i64,
    pub(super) way: Way,
    /// Drawn by this program for each try, so that what was taken can be found if the answer is lost.
    pub(super) number: i64,
    numbers: Arc<Mutex<Vec<i64>>>,
}

impl Asked {
    pub(super) fn new(claim: Claim) -> Self {
        let limit = usize::try_from(claim.limit.clamp(1, CLAIMED_MAX)).unwrap_or(1);
        let limited = claim.limited.map_or(limit, |limited| usize::try_from(limited).unwrap_or(limit));
        let stored = |queues: &Arc<[String]>| queues.iter().map(|queue| task::stored_queue(Some(queue)).to_owned()).collect();
        let way = Way { queues: claim.queues.as_ref().map(stored), ignore_users: claim.ignore_users };
        Self { limit, limited, alive_ms: ms(claim.alive_time), way, number: 0, numbers: Arc::default(), claim }
    }

    /// The queues that it asks for, as the tables name them.
    pub(super) fn queues(&self) -> &Scope {
        &self.way.queues
    }

    /// The numbers of earlier tries.
    pub(super) fn earlier(&self) -> Vec<i64> {
        self.numbers.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// For another try.
    pub(super) fn with_number(&self) -> Self {
        let number = fastrand::i64(1..);
        self.numbers.lock().unwrap_or_else(PoisonError::into_inner).push(number);
        Self { number, ..self.clone() }
    }

    /// For the rest of it, after so many were taken.
    pub(super) fn for_rest(&self, taken: usize) -> Self {
        Self { limit: self.limit.saturating_sub(taken), ..self.with_number() }
    }
}
