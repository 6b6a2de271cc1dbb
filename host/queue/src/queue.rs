//! The queue as a program uses it: open, submit, poll, and an acquired task with everything that may be done to it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::Mutex;

use crate::mysql::MySql;
use crate::perfectqueue::PerfectQueue;
use crate::postgres::Postgres;
use crate::sqlite::Sqlite;
use crate::{
    Accepts, Attempt, AttemptRecord, Backend, Beat, Claim, ClaimedTask, Config, Database, Error, Event, FailureKind, Filter,
    HostDescription, HostId, Kind, LeaseAnswer, Migration, NewTask, Page, Progress, Result, SchemaStatus, Settlement, Stats,
    Submitted, Task, Transaction,
};

/// Between two looks of a polling program for tasks of dead hosts and ended leases.
const RECLAIM_INTERVAL: Duration = Duration::from_secs(1);
/// Between two looks of a polling program whether another one has moved the schema on.
const SCHEMA_INTERVAL: Duration = Duration::from_secs(10);
/// Between two removals of tasks whose retention has ended, by a polling program.
const CLEAN_UP_INTERVAL: Duration = Duration::from_secs(10);
/// Tasks removed at once.
const CLEAN_UP_BATCH: u32 = 1_000;

/// An open queue. Clones share it.
///
/// ```
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// # let folder = tempfile::tempdir()?;
/// # let path = folder.path().join("tasks.db").display().to_string();
/// use laelaps_queue::{Config, NewTask, PollOptions, Queue, State};
///
/// let queue = Queue::open(&Config::new(format!("sqlite:{path}"))).await?;
/// queue.init().await?;
///
/// // A producer: may submit again until it succeeds, since the key makes it one task.
/// queue.submit(NewTask::new("report-2026-11", "report", r#"{"month": 11}"#)).await?;
///
/// // A worker.
/// let mut task = queue.poll(&PollOptions::default()).await?.ok_or("no task")?;
/// assert_eq!(task.task_type(), "report");
/// task.finish(Some(b"42 pages".to_vec()), None).await?;
///
/// let report = queue.get("report-2026-11").await?.ok_or("no such task")?;
/// assert_eq!(report.state, State::Finished);
/// assert_eq!(report.output.as_deref(), Some(&b"42 pages"[..]));
/// queue.close().await;
/// # Ok(())
/// # }
/// # tokio::runtime::Runtime::new().unwrap().block_on(example()).unwrap();
/// ```
#[derive(Clone, Debug)]
pub struct Queue {
    backend: Arc<dyn Backend>,
    config: Config,
    worker: Arc<Worker>,
}

/// What a polling program shares between its polls.
#[derive(Debug, Default)]
struct Worker {
    state: Mutex<WorkerState>,
    /// Acquired tasks that are not settled yet.
    held: Arc<AtomicUsize>,
    /// One of them has to run alone.
    held_alone: Arc<AtomicUsize>,
}

#[derive(Debug, Default)]
struct WorkerState {
    host: Option<HostId>,
    /// When the schema was last seen to admit this program.
    admitted_at: Option<Instant>,
    reclaimed_at: Option<Instant>,
    cleaned_at: Option<Instant>,
}

/// How to poll.
#[derive(Clone, Debug)]
pub struct PollOptions {
    /// How long the leases last unless renewed by [`AcquiredTask::heartbeat`]. PerfectQueue's `alive_time`.
    pub alive_time: Duration,
    /// The most tasks to acquire: 1 to 1,000.
    pub limit: u32,
    /// Acquire tasks without looking at users. PerfectQueue's `disable_resource_limit`.
    pub ignore_users: bool,
    /// Which types to acquire; others wait apart for programs that do. None: all.
    pub accepts: Option<Accepts>,
    /// Only tasks of these queues: 1 to [`Claim::QUEUES_MAX`] names, each once. None: of all.
    pub queues: Option<Arc<[String]>>,
}

impl Default for PollOptions {
    fn default() -> Self {
        Self { alive_time: Duration::from_secs(300), limit: 1, ignore_users: false, accepts: None, queues: None }
    }
}

impl Queue {
    /// Open the database; its tables need not be there yet (see [`Queue::init`]).
    ///
    /// # Errors
    /// [`Error::Config`] for a URL that cannot be used, [`Error::File`], [`Error::Locked`], [`Error::ReadOnly`] or [`Error::Corrupt`] for a
    /// file that cannot.
    pub async fn open(config: &Config) -> Result<Self> {
        // The driver would tell it as a server that cannot be reached.
        if let Some(path) = config.connections.certificate_authority.as_deref().filter(|path| !path.is_file()) {
            let problem =
                format!("there is no file {}, which is to hold the certificate of the server's authority", path.display());
            return Err(Error::Config { setting: "sslca", problem });
        }
        let backend: Arc<dyn Backend> = match config.database()? {
            Database::Sqlite(path) => Arc::new(Sqlite::open(&path, config).await?),
            Database::Postgres => Arc::new(Postgres::open(config).await?),
            Database::MySql => match &config.kind {
                Kind::Native => Arc::new(MySql::open(config).await?),
                Kind::PerfectQueue(table) => Arc::new(PerfectQueue::open(table, config).await?),
            },
        };
        Ok(Self { backend, config: config.clone(), worker: Arc::default() })
    }

    /// The database behind the queue, in its full vocabulary.
    #[must_use]
    pub fn backend(&self) -> &Arc<dyn Backend> {
        &self.backend
    }

    /// Create the tables, or bring them up to what this program needs. Safe to call twice, and by several programs at once.
    ///
    /// # Errors
    /// [`Error::SchemaTooNew`] if a newer program made them and does not admit this one, [`Error::OtherSchema`] if a development build did, and
    /// errors of the database.
    pub async fn init(&self) -> Result<Migration> {
        self.backend.init().await
    }

    /// Compare the tables with what this program needs; [`SchemaStatus::fits`] says whether it can work with them. [`Queue::poll_many`] looks
    /// by itself, a producer may look before its first submit.
    ///
    /// # Errors
    /// [`Error::Corrupt`] if the file is a database of something else, and errors of the database.
    pub async fn schema_status(&self) -> Result<SchemaStatus> {
        self.backend.schema_status().await
    }

    /// Store a task, durably when it returns. A key that the queue has already is not an error: the answer tells.
    ///
    /// # Errors
    /// [`Error::InvalidTask`] if it breaks a bound, and errors of the database.
    pub async fn submit(&self, task: NewTask) -> Result<Submitted> {
        let answers = self.backend.submit(&[task]).await?;
        Ok(answers.first().copied().unwrap_or(Submitted::AlreadyExists))
    }

    /// Store tasks in one transaction, at most [`NewTask::BATCH_MAX`]. Answers stand in the order of the tasks.
    ///
    /// # Errors
    /// [`Error::InvalidTask`] if one of them breaks a bound (then none is stored), and errors of the database.
    pub async fn submit_many(&self, tasks: &[NewTask]) -> Result<Vec<Submitted>> {
        self.backend.submit(tasks).await
    }

    /// Store tasks as part of a transaction of the caller's on the queue's database, for example `&mut *transaction` of an
    /// `sqlx::Transaction`: they are there when it commits, and not at all if it rolls back. Answers stand in the order of the tasks.
    ///
    /// # Errors
    /// [`Error::InvalidTask`] if one of them breaks a bound, [`Error::NotSupported`] if the queue is on another kind of database, and errors of
    /// the database, after which the transaction can only be rolled back.
    pub async fn submit_in(&self, transaction: impl Into<Transaction<'_>>, tasks: &[NewTask]) -> Result<Vec<Submitted>> {
        self.backend.submit_in(transaction.into(), tasks).await
    }

    /// Acquire one task, if there is one.
    ///
    /// # Errors
    /// As [`Queue::poll_many`].
    pub async fn poll(&self, options: &PollOptions) -> Result<Option<AcquiredTask>> {
        Ok(self.poll_many(&PollOptions { limit: 1, ..options.clone() }).await?.pop())
    }

    /// Acquire tasks. The first poll enters this program as a host; from then on polls also take back what dead hosts and ended leases
    /// hold, and remove tasks whose retention has ended. Nothing is acquired while this program holds a task that has to run alone.
    ///
    /// # Errors
    /// As [`SchemaStatus::fits`], looked at with the first poll and then at most every 10 s, and those of the database.
    pub async fn poll_many(&self, options: &PollOptions) -> Result<Vec<AcquiredTask>> {
        let mut state = self.worker.state.lock().await;
        if self.worker.held_alone.load(Ordering::SeqCst) > 0 {
            return Ok(Vec::new());
        }
        self.house_keeping(&mut state).await?;
        let alone = self.worker.held.load(Ordering::SeqCst) == 0;
        let claim = |host| Claim {
            alone,
            ignore_users: options.ignore_users,
            accepts: options.accepts.clone(),
            queues: options.queues.clone(),
            ..Claim::new(host, options.limit, options.alive_time)
        };
        let host = self.host(&mut state).await?;
        let claimed = match self.backend.claim(&claim(host)).await {
            // Somebody removed the lock of this host, or its row: enter again, as a new one.
            Err(Error::UnknownHost(_)) => {
                state.host = None;
                let host = self.host(&mut state).await?;
                self.backend.claim(&claim(host)).await?
            }
            claimed => claimed?,
        };
        let acquired = |task| AcquiredTask::new(task, self, options.alive_time);
        Ok(claimed.tasks.into_iter().map(acquired).collect())
    }

    async fn host(&self, state: &mut WorkerState) -> Result<HostId> {
        if let Some(host) = state.host {
            return Ok(host);
        }
        let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let name = if name.trim().is_empty() { "unknown" } else { name.trim() };
        let description = HostDescription { name: name.to_owned(), process_id: std::process::id(), identity: None };
        let host = self.backend.register_host(&description).await?;
        state.host = Some(host);
        Ok(host)
    }

    async fn house_keeping(&self, state: &mut WorkerState) -> Result<()> {
        let due = |last: Option<Instant>, interval| last.is_none_or(|last| last.elapsed() >= interval);
        if due(state.admitted_at, SCHEMA_INTERVAL) {
            self.backend.schema_status().await?.fits()?;
            state.admitted_at = Some(Instant::now());
        }
        if due(state.reclaimed_at, RECLAIM_INTERVAL) {
            self.backend.reclaim(&self.config.policy).await?;
            state.reclaimed_at = Some(Instant::now());
        }
        if due(state.cleaned_at, CLEAN_UP_INTERVAL) {
            self.backend.clean_up(CLEAN_UP_BATCH).await?;
            state.cleaned_at = Some(Instant::now());
        }
        Ok(())
    }

    /// Wait for a hint that a poll may find something. It can be missing or come for nothing, so poll at an interval as well.
    pub async fn wakeup(&self) {
        self.backend.wakeup().await;
    }

    /// One task with data and output.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn get(&self, key: &str) -> Result<Option<Task>> {
        self.backend.get(key).await
    }

    /// Whether the queue has a task of this key, in whatever state.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn exists(&self, key: &str) -> Result<bool> {
        Ok(self.get(key).await?.is_some())
    }

    /// Past attempts of a task, oldest first.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn attempts(&self, key: &str) -> Result<Vec<AttemptRecord>> {
        self.backend.attempts(key).await
    }

    /// A page of tasks.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn list(&self, filter: &Filter) -> Result<Page> {
        self.backend.list(filter).await
    }

    /// What the queue holds.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn stats(&self) -> Result<Stats> {
        self.backend.stats().await
    }

    /// Cancel a task that is waiting or running. A running attempt loses its lease.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::AlreadyEnded`], and errors of the database.
    pub async fn cancel(&self, key: &str) -> Result<()> {
        self.backend.cancel(key, self.config.policy.retention).await
    }

    /// Finish a task that is waiting or running, by hand; None keeps it for the policy's retention. A running attempt loses its lease.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::AlreadyEnded`], and errors of the database.
    pub async fn force_finish(&self, key: &str, retention_time: Option<Duration>) -> Result<()> {
        self.backend.force_finish(key, retention_time.unwrap_or(self.config.policy.retention)).await
    }

    /// Make a waiting task due now, or give a failed or cancelled one a new life. A held task is refused.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::WrongState`], and errors of the database.
    pub async fn retry(&self, key: &str) -> Result<()> {
        self.backend.retry(key).await
    }

    /// Make a held task (see [`NewTask::held`]) claimable now. False if the queue has no held task of this key.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn release_held(&self, key: &str) -> Result<bool> {
        self.backend.release_held(key).await
    }

    /// Remove a held task; its key is free again. False if the queue has no held task of this key.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn drop_held(&self, key: &str) -> Result<bool> {
        self.backend.drop_held(key).await
    }

    /// The keys of held tasks that begin with `prefix`, in the order of their bytes, at most 10,000.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn held(&self, prefix: &str) -> Result<Vec<String>> {
        self.backend.held(prefix).await
    }

    /// Whether a task whose key begins with `prefix` is waiting (held ones included) or running.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn has_unsettled(&self, prefix: &str) -> Result<bool> {
        self.backend.has_unsettled(prefix).await
    }

    /// Remove tasks whose retention has ended, in batches, until none is left; answers how many.
    ///
    /// # Errors
    /// Those of the database; what was removed until then stays removed.
    pub async fn clean_up(&self) -> Result<u64> {
        let mut removed = 0;
        loop {
            let batch = self.backend.clean_up(CLEAN_UP_BATCH).await?;
            removed += batch;
            if batch == 0 {
                return Ok(removed);
            }
        }
    }

    /// Finish what is under way and close all connections. Acquired tasks that are not settled come back to the queue.
    pub async fn close(&self) {
        if let Some(host) = self.worker.state.lock().await.host.take()
            && let Err(error) = self.backend.unregister_host(host).await
        {
            tracing::debug!(host = host.0, %error, "the host is left to be found dead");
        }
        self.backend.close().await;
    }
}

/// A task that this program has claimed, under a lease that ends after the poll's `alive_time` unless a heartbeat renews it.
///
/// [`LeaseAnswer::Lost`] from any call means that the task is not this program's any more, and that the call changed nothing. A task that is
/// dropped without being settled comes back when its lease ends.
#[derive(Debug)]
pub struct AcquiredTask {
    task: ClaimedTask,
    queue: Queue,
    alive_time: Duration,
    follow_ups: Vec<NewTask>,
    /// Until it is settled: counts it among what this program holds.
    held: Option<Held>,
    held_alone: Option<Held>,
}

impl AcquiredTask {
    fn new(task: ClaimedTask, queue: &Queue, alive_time: Duration) -> Self {
        let held_alone = task.alone.then(|| Held::new(&queue.worker.held_alone));
        let held = Some(Held::new(&queue.worker.held));
        Self { task, queue: queue.clone(), alive_time, follow_ups: Vec::new(), held, held_alone }
    }

    /// The task's key.
    #[must_use]
    pub fn key(&self) -> &str {
        &self.task.key
    }

    /// The task's type.
    #[must_use]
    pub fn task_type(&self) -> &str {
        &self.task.task_type
    }

    /// The task's data: a JSON object in UTF-8.
    #[must_use]
    pub fn data(&self) -> &[u8] {
        &self.task.data
    }

    /// Everything that the claim brought along.
    #[must_use]
    pub fn task(&self) -> &ClaimedTask {
        &self.task
    }

    /// Renew the lease: it lasts `alive_time` from now on, or the poll's. Never shortens it. Shows the progress, if there is one.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn heartbeat(&self, alive_time: Option<Duration>, progress: Option<Progress>) -> Result<LeaseAnswer> {
        let beat = Beat { lease_ref: self.task.lease_ref, alive_time: alive_time.unwrap_or(self.alive_time), progress };
        let answers = self.queue.backend.heartbeat(&[beat]).await?;
        Ok(answers.first().copied().unwrap_or(LeaseAnswer::Lost))
    }

    /// Merge the members of a JSON object into the task's data, durably when it returns. The next attempt sees them, whatever becomes of
    /// this one.
    ///
    /// # Errors
    /// [`Error::InvalidTask`] if `members` is not a JSON object or the merged data is too large, and errors of the database.
    pub async fn update_data(&mut self, members: &[u8]) -> Result<LeaseAnswer> {
        let answer = self.queue.backend.update_data(self.task.lease_ref, members).await?;
        if answer == LeaseAnswer::Held {
            let invalid = |problem| Error::InvalidTask { key: self.task.key.clone(), problem };
            self.task.data = crate::data::merge(&self.task.data, members).map_err(invalid)?;
        }
        Ok(answer)
    }

    /// Add a follow-up task, stored in the same transaction as [`AcquiredTask::finish`], [`AcquiredTask::retry`] or
    /// [`AcquiredTask::release`]; dropped otherwise. A key that the queue has already counts as submitted.
    ///
    /// # Errors
    /// [`Error::InvalidTask`] if it breaks a bound.
    pub fn submit(&mut self, task: NewTask) -> Result<()> {
        task.check()?;
        let descent = self.task.descent.of_follow_up(task.run_at, self.task.claimed_at);
        self.follow_ups.push(NewTask { descent: Some(descent), ..task });
        Ok(())
    }

    /// The work is done. The task is kept for `retention_time`, or the policy's retention.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn finish(&mut self, output: Option<Vec<u8>>, retention_time: Option<Duration>) -> Result<LeaseAnswer> {
        self.settle(Event::Finish { output, retention: retention_time }).await
    }

    /// Another attempt is needed, after `retry_wait` or the policy's back-off. Counts towards the most attempts.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn retry(&mut self, retry_wait: Option<Duration>) -> Result<LeaseAnswer> {
        self.settle(Event::Retry { delay: retry_wait }).await
    }

    /// Hand the task back, now or after a delay. Does not count towards the most attempts.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn release(&mut self, delay: Option<Duration>) -> Result<LeaseAnswer> {
        self.settle(Event::Release { delay }).await
    }

    /// The work failed; `kind` says whether another attempt may succeed.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn fail(&mut self, kind: FailureKind, code: impl Into<String>, message: impl Into<String>) -> Result<LeaseAnswer> {
        self.settle(Event::Failure { kind, code: code.into(), message: message.into() }).await
    }

    async fn settle(&mut self, event: Event) -> Result<LeaseAnswer> {
        let attempt = Attempt::of(&self.task);
        let policy = &self.queue.config.policy;
        let follow_ups = self.follow_ups.clone();
        let settlement = Settlement::of(self.task.lease_ref, event, attempt, policy, fastrand::f64(), None, follow_ups);
        let answers = self.queue.backend.settle(&[settlement]).await?;
        // The task is over for this program, even if its value lives on.
        self.held_alone = None;
        self.held = None;
        Ok(answers.first().copied().unwrap_or(LeaseAnswer::Lost))
    }
}

/// One in a count, for as long as it lives.
#[derive(Debug)]
struct Held(Arc<AtomicUsize>);

impl Held {
    fn new(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::SeqCst);
        Self(Arc::clone(count))
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}
