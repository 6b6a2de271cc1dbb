//! Tasks in PerfectQueue's own table, which its Ruby producers and workers use at the same moment (`type: rdb_compat`).
//!
//! Authority: the table, and within it `timeout` says almost everything. With now in seconds by the server's clock:
//!
//! ```text
//!   1,300,000,000 < timeout <= now   may be acquired: waiting, or its lease ran out
//!   timeout = 1,300,000,000          held, if created_at; see [`hold`]
//!   timeout > now, created_at        running, or waiting for its time
//!   created_at NULL                  finished (failed and cancelled as well); timeout = end - 1,000,000,000 + retention
//!   timeout <= now - 1,000,000,000   may be removed
//! ```
//!
//! Our workers acquire under the same lock as Ruby's (see [`claim`]) and in the same order (see [`order`]), but every write of theirs is fenced
//! (see [`lease`]). Ruby's writes are not: whatever Ruby writes to a row of ours wins, and our lease is lost. Times are whole seconds
//! here: leases and delays are rounded up. What the table has no columns for stands in a table of ours beside it (see [`side`]), if the
//! operator allows it, else in the log. So do the hosts that a watchdog watches (see [`hosts`]); others are left to their leases.

mod audit;
mod blob;
mod broken;
mod candidates;
mod claim;
mod deaths;
mod excuse;
mod hand_on;
mod hold;
mod hosts;
mod keep;
mod lease;
mod lock;
mod lost;
mod operate;
mod order;
mod read;
mod rehearse;
mod run;
mod schema;
mod settle;
mod side;
mod submit;
mod suspects;
mod table;
mod take;
mod walk;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use sqlx::mysql::{MySqlConnection, MySqlPool};
use tokio::sync::{Notify, OnceCell, watch};

use self::run::Patience;
use self::schema::Columns;
use self::table::Names;
use crate::earlier::Earlier;
use crate::mysql::connect::Access;
use crate::mysql::failure::Failure;
use crate::{
    AttemptRecord, Backend, Beat, Claim, Claimed, Config, Error, Filter, HostDescription, HostId, HostRecord, LeaseAnswer,
    LeaseRef, Migration, NewTask, Operator, Page, PlannedStep, PluginVersion, Policy, Producer, Quarantine, Reclaimed, Result,
    Schema, SchemaStatus, Settlement, State, Stats, Submitted, Task, TaskId, Timestamp, Transaction, Update, Worker,
};

/// How long closing waits for what is under way.
const CLOSED_WITHIN: Duration = Duration::from_secs(5);

/// PerfectQueue's table.
#[derive(Debug)]
pub(crate) struct PerfectQueue {
    shared: Arc<Shared>,
}

/// What the operations of a process share.
#[derive(Debug)]
struct Shared {
    config: crate::PerfectQueue,
    policy: Policy,
    patience: Duration,
    /// How long a try of an operation may take.
    limit: Duration,
    access: Access,
    pool: MySqlPool,
    /// Known once the table was found.
    names: OnceCell<Arc<Names>>,
    leases: lease::Leases,
    claimer: tokio::sync::Mutex<claim::Claimer>,
    hosts: hosts::Hosts,
    pages: Arc<read::Pages>,
    strays: Arc<operate::Strays>,
    wakeup: Notify,
    /// Whether the queue is being closed.
    closes: watch::Sender<bool>,
}

impl PerfectQueue {
    /// Connect, with patience if the server cannot be reached; the table need not be there yet.
    pub(crate) async fn open(table: &crate::PerfectQueue, config: &Config) -> Result<Self> {
        Names::new(table)?;
        if config.policy.max_attempts.is_some() && !table.side_table {
            let problem = "PerfectQueue's table cannot count attempts; turn `side_table` on, or leave it out".to_owned();
            return Err(Error::Config { setting: "max_attempts", problem });
        }
        let access = Access::new(config)?;
        let (_, server) = access.connect_with_patience(config.patience).await?;
        let shared = Shared {
            config: table.clone(),
            policy: config.policy.clone(),
            patience: config.patience,
            // An operation has several statements.
            limit: config.connections.statement_timeout.saturating_mul(2),
            pool: access.pool(&server),
            access,
            names: OnceCell::new(),
            leases: lease::Leases::default(),
            claimer: tokio::sync::Mutex::default(),
            hosts: hosts::Hosts::default(),
            pages: Arc::default(),
            strays: Arc::default(),
            wakeup: Notify::new(),
            closes: watch::Sender::new(false),
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// What the server says of the tables, on a connection of the pool.
    async fn columns(&self, doing: &'static str) -> Result<Columns> {
        async fn find(shared: &Shared) -> Result<Columns, sqlx::Error> {
            let mut connection = shared.pool.acquire().await?;
            Columns::find(&shared.config, &mut connection).await
        }
        let mut patience = Patience::new(self.shared.patience);
        loop {
            match self.shared.bounded(find(&self.shared)).await {
                Ok(columns) => return Ok(columns),
                Err(error) => self.shared.pause_or_give_up(&mut patience, error, doing).await?,
            }
        }
    }
}

impl Shared {
    /// The names in statements, once the table is there and as it has to be.
    async fn names(&self, connection: &mut MySqlConnection) -> Result<Arc<Names>, Failure> {
        let find = async {
            let columns = Columns::find(&self.config, connection).await?;
            columns.status(&self.config).fits()?;
            Ok(Arc::new(Names::with(&self.config, &columns)?))
        };
        self.names.get_or_try_init(|| find).await.cloned()
    }

    /// The server's clock, whether the table is there or not.
    async fn now(&self) -> Result<Timestamp> {
        const NOW: &str = "SELECT CAST(CEILING(UNIX_TIMESTAMP(NOW(6)) * 1000) AS SIGNED)";
        let mut patience = Patience::new(self.patience);
        loop {
            match self.bounded(sqlx::query_scalar(NOW).fetch_one(&self.pool)).await {
                Ok(now) => return Ok(Timestamp(now)),
                Err(error) => self.pause_or_give_up(&mut patience, error, "asking for the time").await?,
            }
        }
    }

    /// What a read answers, unless the server keeps silent.
    async fn bounded<T>(&self, read: impl Future<Output = Result<T, sqlx::Error>>) -> Result<T, sqlx::Error> {
        let silence = || sqlx::Error::Io(std::io::Error::new(std::io::ErrorKind::TimedOut, "the server gave no answer"));
        tokio::time::timeout(self.limit, read).await.unwrap_or_else(|_| Err(silence()))
    }

    /// Ready when the queue is being closed.
    async fn closing(&self) {
        // It is there as long as this is.
        let _ = self.closes.subscribe().wait_for(|closes| *closes).await;
    }

    /// A read failed: wait before the next try, unless it would fail again or comes too late.
    async fn pause_or_give_up(&self, patience: &mut Patience, error: sqlx::Error, doing: &'static str) -> Result<()> {
        let again = patience.after(Failure::from(error)).map_err(|failure| failure.into_error(doing, &self.access.place));
        tokio::time::sleep(again?).await;
        Ok(())
    }

    /// Tell those of this process who wait for work.
    fn wake(&self) {
        self.wakeup.notify_waiters();
        self.wakeup.notify_one();
    }
}

#[async_trait]
impl Schema for PerfectQueue {
    async fn init(&self) -> Result<Migration> {
        let shared = &self.shared;
        let done = async {
            // Not out of the pool: what is left of a lock must not stay with a connection that others use.
            let (mut connection, _) = shared.access.connect_with_patience(shared.patience).await?;
            schema::migrate(&shared.config, &mut connection).await
        };
        done.await.map_err(|failure: Failure| failure.into_error("making the tables", &shared.access.place))
    }

    async fn plan(&self) -> Result<Vec<PlannedStep>> {
        let steps = self.columns("looking at the tables").await?.steps(&self.shared.config);
        steps.map(schema::planned).map_err(|failure| failure.into_error("looking at the tables", &self.shared.access.place))
    }

    async fn drift(&self) -> Result<Vec<String>> {
        Ok(self.columns("comparing the tables").await?.drift(&self.shared.config))
    }

    async fn warnings(&self) -> Result<Vec<String>> {
        self.shared.perform(schema::Warnings).await
    }

    async fn rehearse(&self) -> Result<Vec<String>> {
        self.shared.rehearsed().await
    }

    /// Without our tables, PerfectQueue's alone.
    async fn audit(&self) -> Result<Vec<String>> {
        self.shared.perform(audit::Audit).await
    }

    async fn schema_status(&self) -> Result<SchemaStatus> {
        Ok(self.columns("looking at the tables").await?.status(&self.shared.config))
    }
}

#[async_trait]
impl Producer for PerfectQueue {
    async fn now(&self) -> Result<Timestamp> {
        self.shared.now().await
    }

    fn check(&self, task: &NewTask) -> Result<()> {
        submit::check(task, self.shared.config.side_table)?;
        // Once the table is known; what only the server can tell is refused when it is stored.
        match self.shared.names.get().map(|names| names.fit(&task.key, task.user.as_deref())) {
            Some(table::Fit::No(problem)) => Err(Error::InvalidTask { key: task.key.clone(), problem }),
            _ => Ok(()),
        }
    }

    async fn submit(&self, tasks: &[NewTask]) -> Result<Vec<Submitted>> {
        let batch = submit::Batch::new(tasks, self.shared.config.side_table)?;
        if batch.is_empty() {
            return Ok(Vec::new());
        }
        let answers = self.shared.perform(batch).await?;
        if answers.contains(&Submitted::Created) {
            self.shared.wake();
        }
        Ok(answers)
    }

    async fn submit_in(&self, transaction: Transaction<'_>, tasks: &[NewTask]) -> Result<Vec<Submitted>> {
        let Transaction::MySql(connection) = transaction else { return Err(transaction.foreign("MySQL")) };
        let batch = submit::Batch::new(tasks, self.shared.config.side_table)?;
        let submitted = async {
            let names = self.shared.names(connection).await?;
            batch.store_in(&names, connection).await
        };
        submitted.await.map_err(|failure: Failure| failure.into_error("submitting tasks", &self.shared.access.place))
    }

    async fn release_held(&self, key: &str) -> Result<bool> {
        let released = self.shared.perform(hold::Release { key: key.to_owned(), earlier: Earlier::default() }).await?;
        if released {
            self.shared.wake();
        }
        Ok(released)
    }

    async fn drop_held(&self, key: &str) -> Result<bool> {
        self.shared.perform(hold::Remove { key: key.to_owned(), earlier: Earlier::default() }).await
    }

    async fn held(&self, prefix: &str) -> Result<Vec<String>> {
        self.shared.perform(hold::Keys { prefix: prefix.to_owned() }).await
    }

    async fn has_unsettled(&self, prefix: &str) -> Result<bool> {
        self.shared.perform(hold::HasUnsettled { prefix: prefix.to_owned() }).await
    }
}

#[async_trait]
impl Worker for PerfectQueue {
    async fn claim(&self, claim: &Claim) -> Result<Claimed> {
        // The table is the default queue.
        if claim.queues.as_ref().is_some_and(|queues| !queues.iter().any(|queue| queue == NewTask::DEFAULT_QUEUE)) {
            return Ok(Claimed::default());
        }
        self.shared.claim(claim).await
    }

    async fn heartbeat(&self, beats: &[Beat]) -> Result<Vec<LeaseAnswer>> {
        if beats.is_empty() {
            return Ok(Vec::new());
        }
        self.shared.renew(beats).await
    }

    async fn settle(&self, settlements: &[Settlement]) -> Result<Vec<LeaseAnswer>> {
        if settlements.is_empty() {
            return Ok(Vec::new());
        }
        self.shared.settle(settlements).await
    }

    async fn update_data(&self, lease_ref: LeaseRef, members: &[u8]) -> Result<LeaseAnswer> {
        let update = Update { lease_ref, members: members.to_vec() };
        self.shared.update(&[update]).await?.pop().unwrap_or(Ok(LeaseAnswer::Lost))
    }

    async fn update_many(&self, updates: &[Update]) -> Result<Vec<Result<LeaseAnswer>>> {
        if updates.is_empty() {
            return Ok(Vec::new());
        }
        self.shared.update(updates).await
    }

    /// Nothing to do: a row whose lease ran out may be acquired as it is, and is counted as lost then.
    async fn reclaim(&self, _policy: &Policy) -> Result<Reclaimed> {
        Ok(Reclaimed::default())
    }

    async fn register_host(&self, description: &HostDescription) -> Result<HostId> {
        self.shared.register(description).await
    }

    async fn unregister_host(&self, host: HostId) -> Result<()> {
        self.shared.unregister(host).await
    }

    async fn excuse(&self, host: HostId, leases: &[LeaseRef]) -> Result<u64> {
        if !self.shared.config.side_table {
            return Ok(0);
        }
        let mut leases = self.shared.leases.keys(leases);
        leases.sort_unstable();
        leases.dedup();
        self.shared.perform(excuse::Excuse { number: hosts::number(host), leases, earlier: Earlier::default() }).await
    }

    /// Of a host that nobody watches there is no place to note it, and nobody finds it dead.
    async fn note_running(&self, host: HostId, versions: &[PluginVersion]) -> Result<()> {
        match hosts::number(host) {
            0 => Ok(()),
            number => self.shared.perform(deaths::NoteRunning { number, versions: versions.to_vec() }).await,
        }
    }

    async fn quarantined(&self) -> Result<Vec<Quarantine>> {
        if !self.shared.config.side_table {
            return Ok(Vec::new());
        }
        self.shared.perform(deaths::Quarantined).await
    }

    /// The policy has its say when the tasks are met again, as with all leases here that were lost.
    async fn hand_on(&self, identities: &[String], _policy: &Policy) -> Result<Reclaimed> {
        self.shared.hand_on(identities).await
    }

    async fn relatives(&self, root: TaskId, task: TaskId, limit: u32) -> Result<Option<u32>> {
        if !self.shared.config.side_table {
            return Ok(None);
        }
        self.shared.perform(hold::Relatives { root, task, limit }).await.map(Some)
    }

    /// Those of this process, and all that a watchdog watches.
    async fn hosts(&self) -> Result<Vec<HostRecord>> {
        self.shared.host_records().await
    }

    /// The version that ran an attempt is noted with its settlement; there is no place for more.
    async fn note_plugins(&self, _host: HostId, _digests: &[String]) -> Result<()> {
        Ok(())
    }

    async fn clean_up(&self, limit: u32) -> Result<u64> {
        self.shared.clean_up(limit).await
    }

    async fn wakeup(&self) {
        self.shared.wakeup.notified().await;
    }
}

#[async_trait]
impl Operator for PerfectQueue {
    async fn release_plugin(&self, digest: &str) -> Result<bool> {
        if !self.shared.config.side_table {
            return Ok(false);
        }
        self.shared.perform(deaths::ReleasePlugin { digest: digest.to_owned(), earlier: Earlier::default() }).await
    }

    async fn host_plugins(&self, _host: HostId) -> Result<Vec<String>> {
        Ok(Vec::new())
    }

    async fn get(&self, key: &str) -> Result<Option<Task>> {
        self.shared.perform(read::Get { which: operate::Which::Key(key.to_owned()) }).await
    }

    async fn get_by_id(&self, id: TaskId) -> Result<Option<Task>> {
        self.shared.perform(read::Get { which: operate::Which::Number(id) }).await
    }

    async fn cancel_by_id(&self, id: TaskId, retention: Duration) -> Result<()> {
        self.shared.end(operate::Which::Number(id), State::Cancelled, retention).await
    }

    async fn retry_by_id(&self, id: TaskId) -> Result<()> {
        self.shared.retry(operate::Which::Number(id)).await
    }

    async fn attempts(&self, key: &str) -> Result<Vec<AttemptRecord>> {
        self.shared.perform(read::Attempts { key: key.to_owned() }).await
    }

    async fn list(&self, filter: &Filter) -> Result<Page> {
        self.shared.perform(read::List { filter: filter.clone(), pages: Arc::clone(&self.shared.pages) }).await
    }

    async fn stats(&self) -> Result<Stats> {
        self.shared.perform(read::Count).await
    }

    async fn force_finish(&self, key: &str, retention: Duration) -> Result<()> {
        self.shared.end(operate::Which::Key(key.to_owned()), State::Finished, retention).await
    }

    async fn cancel(&self, key: &str, retention: Duration) -> Result<()> {
        self.shared.end(operate::Which::Key(key.to_owned()), State::Cancelled, retention).await
    }

    async fn retry(&self, key: &str) -> Result<()> {
        self.shared.retry(operate::Which::Key(key.to_owned())).await
    }
}

#[async_trait]
impl Backend for PerfectQueue {
    async fn close(&self) {
        self.shared.closes.send_replace(true);
        // A claim that waits for the lock ends at once; one in the middle of a statement ends by itself.
        if let Ok(mut claimer) = tokio::time::timeout(CLOSED_WITHIN, self.shared.claimer.lock()).await {
            claimer.close();
        }
        let _ = tokio::time::timeout(CLOSED_WITHIN, self.shared.pool.close()).await;
    }
}
