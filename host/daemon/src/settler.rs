//! Settlements on their way to the database: grouped into one transaction, repeated until the database took them, never lost on the way.
//!
//! Authority: the database. Only its own answer says that a settlement does not count any more; leases are renewed for as long as an outcome
//! waits. Settlements with follow-ups have a lane of their own, since a follow-up's key may be held by a producer's transaction that nobody
//! sees the end of: what waits there holds up no other outcome. A group that is refused is halved until what is refused stands alone, and
//! everything else goes on.

mod group;

use std::sync::Arc;
use std::time::Duration;

use laelaps_queue::{Attempt, Error, Event, LeaseAnswer, Policy, Settlement, Worker};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use self::group::{Group, Next, RETRY_FIRST, RETRY_MAX, Refusal, bytes_of};
use crate::leases::Leases;
use crate::plugin::{Cancellation, Control};
use crate::unstored::UntilStored;

/// Settlements in one transaction at most.
const GROUP_MAX: usize = 500;
/// The same where each has follow-ups: more rows, and one that is locked means that the group is written again in halves.
const FOLLOW_UPS_GROUP_MAX: usize = 64;
/// Settlements of one lane that wait for their transaction at most; an attempt that ends beyond it waits with its slot.
const UNFLUSHED_MAX: usize = 2_000;
/// What unwritten settlements of one lane carry, in KiB: outputs, and the data of follow-up tasks. An attempt that ends beyond it waits with its
/// slot. One that has more than this in itself waits until it is alone.
const UNFLUSHED_KIB_MAX: u32 = 32 << 10;
/// How long a small group waits for company. Larger groups form by themselves while the one before them is written.
const GROUPING: Duration = Duration::from_millis(1);

/// An attempt that is over, with what is needed if its settlement itself cannot be written.
pub(crate) struct Settled {
    /// What is to be written.
    pub settlement: Settlement,
    /// The task's key, for the log.
    pub key: Arc<str>,
    /// The facts and rules from which the settlement was decided.
    pub attempt: Attempt,
    /// The same.
    pub policy: Policy,
    /// Tells whether the lease is known to be lost.
    pub control: Arc<Control>,
    /// Counts its follow-ups for as long as the database does not.
    pub unstored: Option<UntilStored>,
    /// Its user has a limit: once it is written, another task of the user may run.
    pub is_limited: bool,
}

/// The way to the database. Clones share it.
#[derive(Clone)]
pub(crate) struct Settler {
    plain: Entrance,
    with_follow_ups: Entrance,
}

/// Where settlements enter a lane.
#[derive(Clone)]
struct Entrance {
    sender: mpsc::Sender<Box<(Settlement, Known)>>,
    places: Arc<Semaphore>,
    kib: Arc<Semaphore>,
}

/// What is known of a settlement beside itself.
struct Known {
    key: Arc<str>,
    attempt: Attempt,
    policy: Policy,
    control: Arc<Control>,
    is_limited: bool,
    /// It stands for one that the database refused.
    is_failure: bool,
    /// It was told that its outcome waits for somebody else's transaction.
    is_told: bool,
    /// Its shares of what may be unwritten.
    _place: Option<OwnedSemaphorePermit>,
    _kib: Option<OwnedSemaphorePermit>,
    _unstored: Option<UntilStored>,
}

impl Settler {
    /// Start writing. The task ends once every clone is gone and all that was sent is written or lost. `opened` is notified whenever another
    /// task of a user with a limit may run.
    pub(crate) fn start(backend: Arc<dyn Worker>, leases: Leases, opened: Arc<Notify>) -> (Self, JoinHandle<()>) {
        let lane = |group_max| {
            let (sender, receiver) = mpsc::channel(UNFLUSHED_MAX);
            let (places, kib) = (Semaphore::new(UNFLUSHED_MAX), Semaphore::new(UNFLUSHED_KIB_MAX as usize));
            let writer = Writer {
                backend: Arc::clone(&backend),
                leases: leases.clone(),
                opened: Arc::clone(&opened),
                lane: group::Lane::new(group_max),
                outage: None,
            };
            (Entrance { sender, places: Arc::new(places), kib: Arc::new(kib) }, tokio::spawn(writer.run(receiver)))
        };
        let (plain, plain_writer) = lane(GROUP_MAX);
        let (with_follow_ups, follow_ups_writer) = lane(FOLLOW_UPS_GROUP_MAX);
        let written = tokio::spawn(async move {
            for writer in [plain_writer, follow_ups_writer] {
                if let Err(error) = writer.await {
                    tracing::error!(%error, "a writer of settlements broke down; tasks come back when their leases end");
                }
            }
        });
        (Self { plain, with_follow_ups }, written)
    }

    /// Hand over an attempt's end. Waits while too many, or too large ones, are unwritten.
    pub(crate) fn settle(&self, settled: Settled) -> impl Future<Output = ()> + Send + use<> {
        let Settled { settlement, key, attempt, policy, control, unstored, is_limited } = settled;
        let entrance = if settlement.follow_ups.is_empty() { self.plain.clone() } else { self.with_follow_ups.clone() };
        let kib = u32::try_from(bytes_of(&settlement) / 1024).unwrap_or(u32::MAX).min(UNFLUSHED_KIB_MAX);
        let known = Known {
            key,
            attempt,
            policy,
            control,
            is_limited,
            is_failure: false,
            is_told: false,
            _place: None,
            _kib: None,
            _unstored: unstored,
        };
        // It is moved from hand to hand from here on.
        let mut settled = Box::new((settlement, known));
        async move {
            // They are never closed.
            settled.1._place = entrance.places.acquire_owned().await.ok();
            if kib > 0 {
                settled.1._kib = entrance.kib.acquire_many_owned(kib).await.ok();
            }
            // The writer outlives every sender, so the channel is open; and it has room for as many as there are places.
            let _ = entrance.sender.try_send(settled);
        }
    }
}

/// What writes the settlements of one lane.
struct Writer {
    backend: Arc<dyn Worker>,
    leases: Leases,
    opened: Arc<Notify>,
    lane: group::Lane<Known>,
    /// Nothing is written before this moment, and how long the wait was: the last try failed for a reason that strikes all alike.
    outage: Option<(Instant, Duration)>,
}

impl Writer {
    async fn run(mut self, mut receiver: mpsc::Receiver<Box<(Settlement, Known)>>) {
        let mut arriving = Vec::with_capacity(GROUP_MAX);
        let mut is_open = true;
        loop {
            if !self.lane.has_arrived() {
                let due = self.lane.next_due();
                if !is_open && due.is_none() {
                    return;
                }
                tokio::select! {
                    biased;
                    arrived = receiver.recv_many(&mut arriving, GROUP_MAX), if is_open => is_open = arrived > 0,
                    () = sleep_until_some(due) => {}
                }
                // A task of the same user waits for it.
                let is_awaited = arriving.iter().any(|arrived| arrived.1.is_limited);
                if !arriving.is_empty() && !is_awaited {
                    tokio::time::sleep(GROUPING).await;
                }
                for arrived in arriving.drain(..) {
                    self.lane.push(arrived);
                }
            }
            while self.lane.room() > 0
                && let Ok(arrived) = receiver.try_recv()
            {
                self.lane.push(arrived);
            }
            if let Some((until, _)) = self.outage {
                tokio::time::sleep_until(until).await;
            }
            if let Some(group) = self.lane.take(Instant::now()) {
                self.write(group).await;
            }
        }
    }

    async fn write(&mut self, group: Group<Known>) {
        match self.backend.settle(&group.settlements).await {
            Ok(answers) => {
                self.outage = None;
                for ((settlement, known), answer) in group.settlements.iter().zip(&group.known).zip(answers) {
                    self.written(settlement, known, answer);
                }
            }
            Err(error) => self.refused(group, &error),
        }
    }

    /// Whatever the server, the network or an administrator does to all alike ends one day, and so does somebody else's transaction: then the same
    /// is written again. Leases are renewed as long as that is possible.
    fn refused(&mut self, group: Group<Known>, error: &Error) {
        let refusal = match error {
            Error::Busy { .. } => Refusal::Busy,
            error if error.is_about_the_request() => Refusal::Unfit,
            _ => Refusal::Outage,
        };
        let Some(mut group) = self.without_lost(group) else { return };
        let now = Instant::now();
        let count = group.len();
        if refusal == Refusal::Outage {
            let wait = self.outage.map_or(RETRY_FIRST, |(_, wait)| (wait * 2).min(RETRY_MAX));
            self.outage = Some((now + wait, wait));
            let hint = error.hint().unwrap_or_default();
            tracing::warn!(
                error = crate::log::chain(error),
                hint,
                settlements = count,
                "cannot settle; trying again in {wait:?}"
            );
        } else if count > 1 {
            tracing::warn!(
                error = crate::log::chain(error),
                settlements = count,
                "a group of settlements was refused; settling it in halves"
            );
        } else if refusal == Refusal::Busy
            && let Some(known) = group.known.first_mut()
            && !std::mem::replace(&mut known.is_told, true)
        {
            let hint = error.hint().unwrap_or_default();
            tracing::warn!(
                task = &*known.key,
                error = crate::log::chain(error),
                hint,
                "an outcome waits for somebody else's transaction; others go on"
            );
        }
        if let Next::Culprit(settlement, known) = self.lane.refused(group, refusal, now) {
            self.write_as_failure(settlement, known, error);
        }
    }

    /// A settlement that the database refuses for itself fails its own task, and nobody else's.
    fn write_as_failure(&mut self, refused: Settlement, known: Known, error: &Error) {
        if known.is_failure {
            tracing::error!(
                task = &*known.key,
                error = crate::log::chain(error),
                "the failure cannot be stored either; the task comes back when its lease ends"
            );
            self.leases.forget(refused.lease_ref);
            return;
        }
        let event = Event::Malformed { message: format!("the outcome cannot be stored: {}", crate::log::chain(error)) };
        tracing::error!(
            task = &*known.key,
            error = crate::log::chain(error),
            "an outcome cannot be stored; the attempt counts as malformed"
        );
        let digest = refused.plugin_digest;
        let random = fastrand::f64();
        let settlement = Settlement::of(refused.lease_ref, event, known.attempt, &known.policy, random, digest, Vec::new());
        self.lane.push(Box::new((settlement, Known { is_failure: true, ..known })));
    }

    /// What the database has called lost meanwhile need not be written any more. None if nothing is left.
    fn without_lost(&self, group: Group<Known>) -> Option<Group<Known>> {
        let is_lost = |known: &Known| known.control.state() == Some(Cancellation::LeaseLost);
        if !group.known.iter().any(is_lost) {
            return Some(group);
        }
        let all = group.settlements.into_iter().zip(group.known);
        let (lost, held): (Vec<_>, Vec<_>) =
            all.partition(|(settlement, known)| is_lost(known) && self.leases.is_lost(settlement.lease_ref));
        for (settlement, known) in &lost {
            self.written(settlement, known, LeaseAnswer::Lost);
        }
        let (settlements, known): (Vec<_>, Vec<_>) = held.into_iter().unzip();
        if settlements.is_empty() { None } else { Some(Group::of(settlements, known)) }
    }

    fn written(&self, settlement: &Settlement, known: &Known, answer: LeaseAnswer) {
        if answer == LeaseAnswer::Lost {
            self.leases.note_lost(settlement.lease_ref);
            tracing::warn!(
                task = &*known.key,
                event = settlement.event,
                "the lease had ended before the outcome was stored; the outcome does not count"
            );
        }
        self.leases.forget(settlement.lease_ref);
        if known.is_limited {
            self.opened.notify_one();
        }
    }
}

async fn sleep_until_some(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests;
