//! The leases this host holds: renewed together, one statement an interval, and watched for their loss.
//!
//! Authority: the database. A renewal that answers [`LeaseAnswer::Lost`] stops the attempt at once. If the database does not answer at all, a
//! lease counts as held until its time has passed on this machine's monotonic clock since the last renewal was sent; then the attempt is
//! stopped too, since somebody else may have the task by then.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use laelaps_queue::{Backend, Beat, ClaimedTask, LeaseAnswer, LeaseRef, NewTask, Progress, TaskId, Timestamp};
use tokio::sync::{mpsc, oneshot};

use crate::plugin::{Cancellation, Control, Services};
use crate::unstored::Share;

/// How long a renewal that a handler asked for waits for others to join its statement.
const GROUPING: Duration = Duration::from_millis(10);
/// Renewals that handlers asked for and that are not sent yet; a handler that asks beyond it waits.
const REQUESTS_MAX: usize = 1_024;

/// The leases of this host. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Leases {
    held: Arc<Mutex<HashMap<LeaseRef, Held>>>,
    requests: mpsc::Sender<Request>,
}

struct Held {
    key: String,
    control: Arc<Control>,
    alive_time: Duration,
    /// When the lease ends if no renewal gets through, on this machine's monotonic clock.
    ends: Instant,
    /// Its settlement is on the way and tells itself whether the lease still held.
    settling: bool,
}

struct Request {
    lease_ref: LeaseRef,
    progress: Option<Progress>,
    alive_time: Option<Duration>,
    answer: oneshot::Sender<bool>,
}

impl Leases {
    /// Start renewing. The renewing task ends when the last clone is gone.
    pub(crate) fn start(backend: Arc<dyn Backend>, interval: Duration) -> Self {
        let held = Arc::new(Mutex::new(HashMap::new()));
        let (requests, incoming) = mpsc::channel(REQUESTS_MAX);
        let renewer = Renewer { backend, held: Arc::clone(&held), incoming, failing: false };
        tokio::spawn(renewer.run(interval));
        Self { held, requests }
    }

    /// Hold a claimed task's lease from now on, until [`Leases::forget`]. Loss is told to `control`.
    pub(crate) fn hold(&self, task: &ClaimedTask, claimed_at: Instant, alive_time: Duration, control: Arc<Control>) {
        let held = Held { key: task.key.clone(), control, alive_time, ends: claimed_at + alive_time, settling: false };
        self.lock().insert(task.lease_ref, held);
    }

    /// The attempt's settlement is on its way. The lease is renewed until it is written; that it has ended then is no loss.
    pub(crate) fn settling(&self, lease_ref: LeaseRef) {
        if let Some(held) = self.lock().get_mut(&lease_ref) {
            held.settling = true;
        }
    }

    /// Stop renewing a lease: its attempt is settled, or lost.
    pub(crate) fn forget(&self, lease_ref: LeaseRef) {
        self.lock().remove(&lease_ref);
    }

    /// Renew now, and learn whether the lease holds. Waits for its group; true if the database cannot be asked and the lease has time left.
    pub(crate) async fn beat(&self, lease_ref: LeaseRef, progress: Option<Progress>, alive_time: Option<Duration>) -> bool {
        let (answer, answered) = oneshot::channel();
        if self.requests.send(Request { lease_ref, progress, alive_time, answer }).await.is_err() {
            return false;
        }
        answered.await.unwrap_or(false)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<LeaseRef, Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Renewer {
    backend: Arc<dyn Backend>,
    held: Arc<Mutex<HashMap<LeaseRef, Held>>>,
    incoming: mpsc::Receiver<Request>,
    failing: bool,
}

impl Renewer {
    async fn run(mut self, interval: Duration) {
        let mut ticks = tokio::time::interval(interval);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = ticks.tick() => self.renew_all().await,
                request = self.incoming.recv() => {
                    let Some(first) = request else { return };
                    let mut group = vec![first];
                    tokio::time::sleep(GROUPING).await;
                    while group.len() < REQUESTS_MAX && let Ok(next) = self.incoming.try_recv() {
                        group.push(next);
                    }
                    self.renew_asked(group).await;
                }
            }
        }
    }

    /// The host's own renewal of everything it holds.
    async fn renew_all(&mut self) {
        let beats: Vec<Beat> = self
            .lock()
            .iter()
            .map(|(lease_ref, held)| Beat { lease_ref: *lease_ref, alive_time: held.alive_time, progress: None })
            .collect();
        if !beats.is_empty() {
            self.renew(&beats).await;
        }
    }

    /// Renewals that handlers asked for, with their progress.
    async fn renew_asked(&mut self, group: Vec<Request>) {
        // Of several reports of one task in a group the last one counts.
        let mut beats: HashMap<LeaseRef, Beat> = HashMap::new();
        {
            let held = self.lock();
            for request in &group {
                let Some(known) = held.get(&request.lease_ref) else { continue };
                let beat = beats.entry(request.lease_ref).or_insert_with(|| Beat {
                    lease_ref: request.lease_ref,
                    alive_time: known.alive_time,
                    progress: None,
                });
                beat.alive_time = beat.alive_time.max(request.alive_time.unwrap_or_default());
                if request.progress.is_some() {
                    beat.progress.clone_from(&request.progress);
                }
            }
        }
        let beats: Vec<Beat> = beats.into_values().collect();
        if !beats.is_empty() {
            self.renew(&beats).await;
        }
        let held = self.lock();
        for request in group {
            let holds = held.get(&request.lease_ref).is_some_and(|held| held.control.state() != Some(Cancellation::LeaseLost));
            // A handler that was stopped in the meantime no longer waits for its answer.
            let _ = request.answer.send(holds);
        }
    }

    async fn renew(&mut self, beats: &[Beat]) {
        let sent = Instant::now();
        match self.backend.heartbeat(beats).await {
            Ok(answers) => {
                if std::mem::take(&mut self.failing) {
                    tracing::info!("leases are renewed again");
                }
                let mut held = self.lock();
                for (beat, answer) in beats.iter().zip(answers) {
                    let Some(known) = held.get_mut(&beat.lease_ref) else { continue };
                    match answer {
                        LeaseAnswer::Held => known.ends = known.ends.max(sent + beat.alive_time),
                        LeaseAnswer::Lost if known.settling => {}
                        LeaseAnswer::Lost => lose(known, "the database says so"),
                    }
                }
            }
            Err(error) => {
                if !std::mem::replace(&mut self.failing, true) {
                    tracing::warn!(error = crate::log::chain(&error), leases = beats.len(), "cannot renew leases; trying again");
                }
                let now = Instant::now();
                for known in self.lock().values_mut().filter(|known| known.ends <= now) {
                    lose(known, "its time passed while the database did not answer");
                }
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<LeaseRef, Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn lose(held: &Held, why: &str) {
    if held.control.state() != Some(Cancellation::LeaseLost) {
        tracing::warn!(task = held.key, why, "lease lost; stopping the attempt");
        held.control.cancel(Cancellation::LeaseLost);
    }
}

/// What a handler may do to its task while it runs: bound to one lease.
pub(crate) struct LeasedTask {
    /// The leases of this host.
    pub leases: Leases,
    /// The queue.
    pub backend: Arc<dyn Backend>,
    /// The lease of this attempt.
    pub lease_ref: LeaseRef,
    /// A moment by the database's clock ...
    pub database_time: Timestamp,
    /// ... and when that was, by this machine's monotonic clock.
    pub at: Instant,
    /// The producer's task from which its own comes.
    pub root: TaskId,
    /// Whether the host's routes lead a type to the plugin of this attempt.
    pub leads_here: Box<dyn Fn(&str) -> bool + Send + Sync>,
    /// What it has submitted.
    pub share: Arc<Share>,
}

#[async_trait]
impl Services for LeasedTask {
    async fn heartbeat(&self, progress: Option<Progress>, alive_time: Option<Duration>) -> bool {
        self.leases.beat(self.lease_ref, progress, alive_time).await
    }

    async fn update_data(&self, members: Vec<u8>) -> Result<LeaseAnswer, laelaps_queue::Error> {
        self.backend.update_data(self.lease_ref, &members).await
    }

    async fn now(&self) -> Timestamp {
        self.database_time.plus(self.at.elapsed())
    }

    async fn relatives(&self, limit: u32) -> Result<Option<u32>, laelaps_queue::Error> {
        self.backend.relatives(self.root, self.lease_ref.task, limit).await
    }

    fn count_follow_up(&self, most: u32) -> bool {
        self.share.count(most)
    }

    fn leads_here(&self, task_type: &str) -> bool {
        (self.leads_here)(task_type)
    }

    fn check(&self, task: &NewTask) -> Result<(), laelaps_queue::Error> {
        self.backend.check(task)
    }
}
