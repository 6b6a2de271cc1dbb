//! Settlements on their way to the database: grouped into one transaction, repeated while their leases live, never lost on the way.

use std::sync::Arc;
use std::time::Duration;

use laelaps_queue::{Attempt, Backend, Error, Event, LeaseAnswer, Policy, Settlement, Verdict};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinHandle;

use crate::leases::Leases;
use crate::plugin::{Cancellation, Control};
use crate::unstored::UntilStored;

/// Settlements in one transaction at most.
const GROUP_MAX: usize = 500;
/// Settlements that wait for their transaction at most; an attempt that ends beyond it waits with its slot.
const UNFLUSHED_MAX: usize = 2_000;
/// What unwritten settlements carry, in KiB: outputs, and the data of follow-up tasks. An attempt that ends beyond it waits with its slot. One that
/// has more than this in itself waits until it is alone.
const UNFLUSHED_KIB_MAX: u32 = 64 << 10;
/// How long a small group waits for company. Larger groups form by themselves while the one before them is written.
const GROUPING: Duration = Duration::from_millis(1);
const RETRY_FIRST: Duration = Duration::from_millis(50);
const RETRY_MAX: Duration = Duration::from_secs(5);

/// An attempt that is over, with what is needed if its settlement itself cannot be written.
pub(crate) struct Settled {
    /// What is to be written.
    pub settlement: Settlement,
    /// The task's key, for the log.
    pub key: String,
    /// The facts and rules from which the settlement was decided.
    pub attempt: Attempt,
    /// The same.
    pub policy: Policy,
    /// Tells whether the lease is known to be lost.
    pub control: Arc<Control>,
    /// Counts its follow-ups for as long as the database does not.
    pub unstored: Option<UntilStored>,
}

/// The way to the database. Clones share it.
#[derive(Clone)]
pub(crate) struct Settler {
    sender: mpsc::Sender<(Settlement, Known)>,
    room: Arc<Semaphore>,
}

/// What is known of a settlement beside itself.
struct Known {
    key: String,
    attempt: Attempt,
    policy: Policy,
    control: Arc<Control>,
    /// Its share of what may be unwritten.
    _room: Option<OwnedSemaphorePermit>,
    _unstored: Option<UntilStored>,
}

/// Settlements that are written together, and what is known of each. Apart, so that nothing is copied to be written.
type Group = (Vec<Settlement>, Vec<Known>);

impl Settler {
    /// Start writing. The task ends once every clone is gone and all that was sent is written or lost.
    pub(crate) fn start(backend: Arc<dyn Backend>, leases: Leases) -> (Self, JoinHandle<()>) {
        let (sender, receiver) = mpsc::channel(UNFLUSHED_MAX);
        let writer = Writer { backend, leases };
        let room = Arc::new(Semaphore::new(UNFLUSHED_KIB_MAX as usize));
        (Self { sender, room }, tokio::spawn(writer.run(receiver)))
    }

    /// Hand over an attempt's end. Waits while too many, or too large ones, are unwritten.
    pub(crate) async fn settle(&self, settled: Settled) {
        let Settled { settlement, key, attempt, policy, control, unstored } = settled;
        let kib = u32::try_from(bytes(&settlement) / 1024).unwrap_or(u32::MAX).min(UNFLUSHED_KIB_MAX);
        // It is never closed.
        let room = if kib == 0 { None } else { Arc::clone(&self.room).acquire_many_owned(kib).await.ok() };
        // The writer outlives every sender, so the channel is open.
        let known = Known { key, attempt, policy, control, _room: room, _unstored: unstored };
        let _ = self.sender.send((settlement, known)).await;
    }
}

/// What a settlement carries.
fn bytes(settlement: &Settlement) -> usize {
    let output = match settlement.verdict() {
        Verdict::Finish { output, .. } => output.as_ref().map_or(0, Vec::len),
        Verdict::Wait { .. } | Verdict::Fail { .. } => 0,
    };
    output + settlement.follow_ups.iter().map(|task| task.data.len()).sum::<usize>()
}

struct Writer {
    backend: Arc<dyn Backend>,
    leases: Leases,
}

impl Writer {
    async fn run(self, mut receiver: mpsc::Receiver<(Settlement, Known)>) {
        let mut group = Vec::with_capacity(GROUP_MAX);
        while receiver.recv_many(&mut group, GROUP_MAX).await > 0 {
            tokio::time::sleep(GROUPING).await;
            while group.len() < GROUP_MAX
                && let Ok(next) = receiver.try_recv()
            {
                group.push(next);
            }
            self.write(group.drain(..).unzip()).await;
        }
    }

    /// Write one group, or, if something in it cannot be written, each by itself.
    async fn write(&self, group: Group) {
        let Err((error, (settlements, known))) = self.write_with_patience(group).await else { return };
        tracing::warn!(
            error = crate::log::chain(&error),
            settlements = settlements.len(),
            "a group of settlements was refused; settling one by one"
        );
        for (settlement, known) in settlements.into_iter().zip(known) {
            let one = (vec![settlement], vec![known]);
            let Err((error, (settlements, known))) = self.write_with_patience(one).await else { continue };
            for (settlement, known) in settlements.into_iter().zip(known) {
                self.write_as_failure(settlement, known, &error).await;
            }
        }
    }

    /// A settlement that the database refuses for itself fails its own task, and nobody else's.
    async fn write_as_failure(&self, refused: Settlement, known: Known, error: &Error) {
        let event = Event::Malformed { message: format!("the outcome cannot be stored: {}", crate::log::chain(error)) };
        tracing::error!(
            task = known.key,
            error = crate::log::chain(error),
            "an outcome cannot be stored; the attempt counts as malformed"
        );
        let lease_ref = refused.lease_ref;
        let digest = refused.plugin_digest;
        let settlement = Settlement::of(lease_ref, event, known.attempt, &known.policy, fastrand::f64(), digest, Vec::new());
        if let Err((error, _)) = self.write_with_patience((vec![settlement], vec![known])).await {
            tracing::error!(
                error = crate::log::chain(&error),
                "the failure cannot be stored either; the task comes back when its lease ends"
            );
            self.leases.forget(lease_ref);
        }
    }

    /// Repeat until the database took the group, or every lease of it is lost: whatever the server, the network or an administrator does to all
    /// alike ends one day, and the leases are renewed as long as that is possible.
    ///
    /// # Errors
    /// An error of the settlements themselves, which repeating cannot mend, with what is not written.
    async fn write_with_patience(&self, mut group: Group) -> Result<(), (Error, Group)> {
        let mut wait = RETRY_FIRST;
        loop {
            let (settlements, known) = &group;
            match self.backend.settle(settlements).await {
                Ok(answers) => {
                    for ((settlement, known), answer) in settlements.iter().zip(known).zip(answers) {
                        self.written(settlement, known, answer);
                    }
                    return Ok(());
                }
                Err(error) if error.is_about_the_request() => return Err((error, group)),
                Err(error) => {
                    tracing::warn!(
                        error = crate::log::chain(&error),
                        hint = error.hint().unwrap_or_default(),
                        settlements = settlements.len(),
                        "cannot settle; trying again in {wait:?}"
                    );
                    tokio::time::sleep(wait).await;
                    wait = (wait * 2).min(RETRY_MAX);
                    let (settlements, known) = group;
                    let (lost, held): (Vec<_>, Vec<_>) = settlements
                        .into_iter()
                        .zip(known)
                        .partition(|(_, known)| known.control.state() == Some(Cancellation::LeaseLost));
                    for (settlement, known) in &lost {
                        self.written(settlement, known, LeaseAnswer::Lost);
                    }
                    if held.is_empty() {
                        return Ok(());
                    }
                    group = held.into_iter().unzip();
                }
            }
        }
    }

    fn written(&self, settlement: &Settlement, known: &Known, answer: LeaseAnswer) {
        self.leases.forget(settlement.lease_ref);
        if answer == LeaseAnswer::Lost {
            tracing::warn!(
                task = known.key,
                event = settlement.event,
                "the lease had ended before the outcome was stored; the outcome does not count"
            );
        }
    }
}
