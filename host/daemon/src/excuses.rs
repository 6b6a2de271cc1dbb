//! Attempts that the database counts as lost with this host, which lives: it slept, was cut off, or seemed dead to another host.
//!
//! Nobody else can tell a dead host from one that does not answer, so a loss is suspected of its task until the host is back and says that it
//! was not the task ([`Worker::excuse`]). A lease may have ended without anybody having taken it back yet; so this host looks for lost tasks
//! before it excuses its own, and excuses them once more a little later, in case another host was just about to take them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use laelaps_queue::{HostId, LeaseRef, Policy, Worker};
use tokio::sync::Notify;
use tokio::time::Instant;

/// Attempts remembered at most. A host holds fewer leases.
const LOST_MAX: usize = 10_000;
/// Attempts excused in one call.
const GROUP_MAX: usize = 500;
/// Batches of lost tasks that are taken back before an excuse, at most.
const RECLAIMS_MAX: usize = 100;
/// After this time the same are excused once more.
const AGAIN_AFTER: Duration = Duration::from_secs(5);
/// Between two tries while the database does not answer.
const RETRY_FIRST: Duration = Duration::from_millis(200);
const RETRY_MAX: Duration = Duration::from_secs(5);

/// The attempts of a host that are to be excused. Cheap to clone.
#[derive(Clone, Default)]
pub(crate) struct Excuses {
    /// Each with the moment of its next excuse, and whether that is the last one.
    lost: Arc<Mutex<HashMap<LeaseRef, (Instant, bool)>>>,
    noted: Arc<Notify>,
}

impl Excuses {
    /// The database says that this attempt's lease is over, and this host did not end it.
    pub(crate) fn note(&self, lease_ref: LeaseRef) {
        let mut lost = self.lock();
        if lost.len() < LOST_MAX {
            lost.entry(lease_ref).or_insert((Instant::now(), false));
            self.noted.notify_one();
        }
    }

    /// Excuse what is lost, for as long as the host serves.
    pub(crate) async fn run(self, backend: Arc<dyn Worker>, host: HostId, policy: Policy) {
        let mut wait = RETRY_FIRST;
        loop {
            let next = self.lock().values().map(|(due, _)| *due).min();
            tokio::select! {
                () = self.noted.notified() => {}
                () = sleep_until_some(next) => {}
            }
            match self.excuse(backend.as_ref(), host, &policy).await {
                Ok(()) => wait = RETRY_FIRST,
                Err(error) => {
                    tracing::debug!(error = crate::log::chain(&error), "cannot excuse lost attempts; trying again in {wait:?}");
                    tokio::time::sleep(wait).await;
                    wait = (wait * 2).min(RETRY_MAX);
                    self.noted.notify_one();
                }
            }
        }
    }

    /// Excuse everything now, since this host is about to end, or to become another one. Gives up after `patience`.
    pub(crate) async fn settle(&self, backend: &dyn Worker, host: HostId, policy: &Policy, patience: Duration) {
        let excused = async {
            for (due, _) in self.lock().values_mut() {
                *due = Instant::now();
            }
            let mut wait = RETRY_FIRST;
            while let Err(error) = self.excuse(backend, host, policy).await {
                tracing::debug!(error = crate::log::chain(&error), "cannot excuse lost attempts; trying again in {wait:?}");
                tokio::time::sleep(wait).await;
                wait = (wait * 2).min(RETRY_MAX);
            }
        };
        if self.is_empty() {
            return;
        }
        if tokio::time::timeout(patience, excused).await.is_err() {
            tracing::warn!("the database does not answer: tasks that were lost with this host stay under suspicion");
        }
    }

    async fn excuse(&self, backend: &dyn Worker, host: HostId, policy: &Policy) -> laelaps_queue::Result<()> {
        let now = Instant::now();
        let due: Vec<LeaseRef> =
            self.lock().iter().filter(|(_, (due, _))| *due <= now).map(|(lease_ref, _)| *lease_ref).collect();
        if due.is_empty() {
            return Ok(());
        }
        for _ in 0..RECLAIMS_MAX {
            let reclaimed = backend.reclaim(policy).await?;
            crate::reports::reclaimed(&reclaimed);
            if reclaimed.tasks.is_empty() {
                break;
            }
        }
        let mut excused = 0;
        for group in due.chunks(GROUP_MAX) {
            excused += backend.excuse(host, group).await?;
            let mut lost = self.lock();
            for lease_ref in group {
                match lost.get_mut(lease_ref) {
                    Some((due, is_last)) if !*is_last => (*due, *is_last) = (now + AGAIN_AFTER, true),
                    _ => drop(lost.remove(lease_ref)),
                }
            }
        }
        if excused > 0 {
            tracing::info!(attempts = excused, "this host lives: the tasks that were lost with it are not to blame");
        }
        Ok(())
    }

    fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<LeaseRef, (Instant, bool)>> {
        self.lost.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn sleep_until_some(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment).await,
        None => std::future::pending().await,
    }
}
