//! The leases this host holds: renewed together, one statement an interval, and watched for their loss.
//!
//! Authority: the database. A renewal that answers [`LeaseAnswer::Lost`] stops the attempt at once. If the database does not answer at all, the
//! lease of an attempt that runs counts as held until its time has passed on this machine's monotonic clock since the last renewal was sent;
//! then the attempt is stopped, since somebody else may have the task by then. An outcome that waits to be written is no such attempt: its
//! lease is renewed for as long as that is possible, and only the database says that it is lost. What the database calls lost is excused
//! ([`crate::excuses`]).

mod renewal;
mod task;

use std::collections::{HashMap, VecDeque};
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use laelaps_queue::{ClaimedTask, LeaseRef, Progress, Worker};
use tokio::sync::{Notify, mpsc, oneshot};

use self::renewal::{Renewer, Request};
pub(crate) use self::task::LeasedTask;
use crate::excuses::Excuses;
use crate::plugin::{Cancellation, Control};

/// Renewals that handlers asked for and that are not sent yet; a handler that asks beyond it waits.
const REQUESTS_MAX: usize = 1_024;
/// A report of progress is written so much later, with what was reported last by then. Nobody waits for it, and most attempts are over before.
const PROGRESS_DELAY: Duration = Duration::from_millis(50);

/// The leases of this host. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Leases {
    held: Arc<Mutex<Table>>,
    requests: mpsc::Sender<Request>,
    /// A handler said something new about its progress.
    progressed: Arc<Notify>,
    excuses: Excuses,
}

/// All leases, and those whose progress is to be written, by the moment when.
#[derive(Default)]
struct Table {
    held: HashMap<LeaseRef, Held>,
    reported: VecDeque<(Instant, LeaseRef)>,
}

impl Deref for Table {
    type Target = HashMap<LeaseRef, Held>;

    fn deref(&self) -> &Self::Target {
        &self.held
    }
}

impl DerefMut for Table {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.held
    }
}

struct Held {
    key: Arc<str>,
    control: Arc<Control>,
    alive_time: Duration,
    /// When the lease ends if no renewal gets through, on this machine's monotonic clock.
    ends: Instant,
    /// Its settlement is on the way and tells itself whether the lease still held.
    settling: bool,
    /// The database has said that it is over.
    lost: bool,
    /// What the handler said last about its progress, if it is not written yet.
    progress: Option<Progress>,
}

impl Leases {
    /// Start renewing. The renewing task ends when the last clone is gone.
    pub(crate) fn start(backend: Arc<dyn Worker>, interval: Duration, excuses: Excuses) -> Self {
        let held: Arc<Mutex<Table>> = Arc::default();
        let (requests, incoming) = mpsc::channel(REQUESTS_MAX);
        let progressed = Arc::new(Notify::new());
        let leases = Self { held: Arc::clone(&held), requests, progressed: Arc::clone(&progressed), excuses: excuses.clone() };
        tokio::spawn(Renewer { backend, held, incoming, progressed, excuses, failing: false }.run(interval));
        leases
    }

    /// Hold a claimed task's lease from now on, until [`Leases::forget`]. Loss is told to `control`. Returns the task's key, for others who name it.
    pub(crate) fn hold(&self, task: &ClaimedTask, claimed_at: Instant, alive_time: Duration, control: Arc<Control>) -> Arc<str> {
        let key: Arc<str> = task.key.as_str().into();
        let held = Held {
            key: Arc::clone(&key),
            control,
            alive_time,
            ends: claimed_at + alive_time,
            settling: false,
            lost: false,
            progress: None,
        };
        self.lock().insert(task.lease_ref, held);
        key
    }

    /// The attempt's settlement is on its way. The lease is renewed until it is written; that it has ended then is no loss.
    pub(crate) fn settling(&self, lease_ref: LeaseRef) {
        if let Some(held) = self.lock().get_mut(&lease_ref) {
            held.settling = true;
            // Progress is only shown of what runs.
            held.progress = None;
        }
    }

    /// Stop renewing a lease: its attempt is settled, or lost.
    pub(crate) fn forget(&self, lease_ref: LeaseRef) {
        self.lock().remove(&lease_ref);
    }

    /// The database has refused the attempt's settlement, because its lease is over.
    pub(crate) fn note_lost(&self, lease_ref: LeaseRef) {
        self.excuses.note(lease_ref);
    }

    /// Whether the database has said that this lease is over.
    pub(crate) fn is_lost(&self, lease_ref: LeaseRef) -> bool {
        self.lock().get(&lease_ref).is_none_or(|held| held.lost)
    }

    /// Whether a lease may have run out that the database has not been asked about since: this process slept, or the database did not answer.
    /// Until it has answered, this host does not take back what seems lost, which may be its own.
    pub(crate) fn is_behind(&self) -> bool {
        let now = Instant::now();
        self.lock().values().any(|held| !held.lost && held.ends <= now)
    }

    /// What is known here about a lease, and a report of progress to be written soon. None if only the database knows whether it holds.
    pub(crate) fn note_progress(&self, lease_ref: LeaseRef, progress: Option<Progress>) -> Option<bool> {
        let mut leases = self.lock();
        let Some(held) = leases.get_mut(&lease_ref) else { return Some(false) };
        if held.lost || held.control.state() == Some(Cancellation::LeaseLost) {
            return Some(false);
        }
        let now = Instant::now();
        if held.ends <= now {
            return None;
        }
        if progress.is_some() && !held.settling && std::mem::replace(&mut held.progress, progress).is_none() {
            leases.reported.push_back((now + PROGRESS_DELAY, lease_ref));
            // Whoever waits for the first of several comes by the others.
            if leases.reported.len() == 1 {
                self.progressed.notify_one();
            }
        }
        Some(true)
    }

    /// Renew now, and learn whether the lease holds. Waits for its group; true if the database cannot be asked and the lease has time left.
    pub(crate) async fn beat(&self, lease_ref: LeaseRef, progress: Option<Progress>, alive_time: Option<Duration>) -> bool {
        let (answer, answered) = oneshot::channel();
        if self.requests.send(Request { lease_ref, progress, alive_time, answer }).await.is_err() {
            return false;
        }
        answered.await.unwrap_or(false)
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        lock(&self.held)
    }
}

fn lock(held: &Mutex<Table>) -> MutexGuard<'_, Table> {
    held.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
