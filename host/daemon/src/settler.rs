//! Settlements on their way to the database: grouped into one transaction, repeated while their leases live, never lost on the way.

use std::sync::Arc;
use std::time::Duration;

use laelaps_queue::{Attempt, Backend, Error, Event, LeaseAnswer, Policy, Settlement};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::leases::Leases;
use crate::plugin::{Cancellation, Control};

/// Settlements in one transaction at most.
const GROUP_MAX: usize = 500;
/// Settlements that wait for their transaction at most; an attempt that ends beyond it waits with its slot.
const UNFLUSHED_MAX: usize = 2_000;
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
}

/// The way to the database. Clones share it.
#[derive(Clone)]
pub(crate) struct Settler {
    sender: mpsc::Sender<Settled>,
}

impl Settler {
    /// Start writing. The task ends once every clone is gone and all that was sent is written or lost.
    pub(crate) fn start(backend: Arc<dyn Backend>, leases: Leases) -> (Self, JoinHandle<()>) {
        let (sender, receiver) = mpsc::channel(UNFLUSHED_MAX);
        let writer = Writer { backend, leases };
        (Self { sender }, tokio::spawn(writer.run(receiver)))
    }

    /// Hand over an attempt's end. Waits while too many are unwritten.
    pub(crate) async fn settle(&self, settled: Settled) {
        // The writer outlives every sender, so the channel is open.
        let _ = self.sender.send(settled).await;
    }
}

struct Writer {
    backend: Arc<dyn Backend>,
    leases: Leases,
}

impl Writer {
    async fn run(self, mut receiver: mpsc::Receiver<Settled>) {
        let mut group = Vec::with_capacity(GROUP_MAX);
        while receiver.recv_many(&mut group, GROUP_MAX).await > 0 {
            tokio::time::sleep(GROUPING).await;
            while group.len() < GROUP_MAX
                && let Ok(next) = receiver.try_recv()
            {
                group.push(next);
            }
            self.write(std::mem::take(&mut group)).await;
        }
    }

    /// Write one group, or, if something in it cannot be written, each by itself.
    async fn write(&self, group: Vec<Settled>) {
        let Err((error, group)) = self.write_with_patience(group).await else { return };
        tracing::warn!(
            error = crate::log::chain(&error),
            settlements = group.len(),
            "a group of settlements was refused; settling one by one"
        );
        for settled in group {
            let Err((error, refused)) = self.write_with_patience(vec![settled]).await else { continue };
            for settled in refused {
                self.write_as_failure(settled, &error).await;
            }
        }
    }

    /// A settlement that the database refuses for itself fails its own task, and nobody else's.
    async fn write_as_failure(&self, mut settled: Settled, error: &Error) {
        let event = Event::Malformed { message: format!("the outcome cannot be stored: {}", crate::log::chain(error)) };
        tracing::error!(
            task = settled.key,
            error = crate::log::chain(error),
            "an outcome cannot be stored; the attempt counts as malformed"
        );
        let digest = settled.settlement.plugin_digest.take();
        settled.settlement = Settlement::of(
            settled.settlement.lease_ref,
            event,
            settled.attempt,
            &settled.policy,
            fastrand::f64(),
            digest,
            Vec::new(),
        );
        let lease_ref = settled.settlement.lease_ref;
        if let Err((error, _)) = self.write_with_patience(vec![settled]).await {
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
    async fn write_with_patience(&self, mut group: Vec<Settled>) -> Result<(), (Error, Vec<Settled>)> {
        let mut wait = RETRY_FIRST;
        loop {
            let settlements: Vec<Settlement> = group.iter().map(|settled| settled.settlement.clone()).collect();
            match self.backend.settle(&settlements).await {
                Ok(answers) => {
                    for (settled, answer) in group.iter().zip(answers) {
                        self.written(settled, answer);
                    }
                    return Ok(());
                }
                Err(error) if error.is_about_the_request() => return Err((error, group)),
                Err(error) => {
                    tracing::warn!(
                        error = crate::log::chain(&error),
                        hint = error.hint().unwrap_or_default(),
                        settlements = group.len(),
                        "cannot settle; trying again in {wait:?}"
                    );
                    tokio::time::sleep(wait).await;
                    wait = (wait * 2).min(RETRY_MAX);
                    let (lost, held): (Vec<_>, Vec<_>) =
                        group.into_iter().partition(|settled| settled.control.state() == Some(Cancellation::LeaseLost));
                    for settled in &lost {
                        self.written(settled, LeaseAnswer::Lost);
                    }
                    if held.is_empty() {
                        return Ok(());
                    }
                    group = held;
                }
            }
        }
    }

    fn written(&self, settled: &Settled, answer: LeaseAnswer) {
        self.leases.forget(settled.settlement.lease_ref);
        if answer == LeaseAnswer::Lost {
            tracing::warn!(
                task = settled.key,
                event = settled.settlement.event,
                "the lease had ended before the outcome was stored; the outcome does not count"
            );
        }
    }
}
