//! Tasks in a MySQL or MariaDB database, beside the tables of whoever submits them.
//!
//! Authority: the server, and its clock. Any number of processes on any number of machines use it at once, each through a pool of
//! connections. Every operation is one short READ COMMITTED transaction on a tokio task of its own (see [`session`]). Rows that several
//! operations would have to change are not there: counts and changes of users' accounts are appended (see [`accounts`]), so that tasks
//! without user are claimed by many hosts beside each other. Only claims that choose between users follow one another.
//!
//! A host's life cannot be seen by a server; leases say what is lost (see [`hosts`]).

mod accounts;
mod audit;
mod before;
mod between;
mod choose;
mod claim;
mod claims;
pub(crate) mod connect;
mod deaths;
mod due;
mod excuse;
pub(crate) mod failure;
mod fronts;
mod hosts;
mod keep;
mod list;
mod mark;
mod mend;
mod operate;
mod outlook;
mod read;
pub(crate) mod rehearse;
mod repair;
mod rows;
mod schema;
mod served;
mod session;
mod settle;
mod signs;
mod submit;
mod suspects;
mod together;
mod unserved;

#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use sqlx::Row as _;
use sqlx::mysql::{MySqlArguments, MySqlRow};
use sqlx::query::Query;
use tokio::sync::{Semaphore, oneshot};

use self::claims::Claims;
use self::connect::Access;
use self::mark::{Mark, Marks};
use self::operate::Name;
use self::repair::Repaired;
use self::session::{Entered, Runner, Session, Waiting, Work, now};
use crate::batch::Batch;
use crate::schema::Steps;
use crate::task::stored_queue;
use crate::unserved::Watch;
use crate::{
    AttemptRecord, Backend, Beat, Claim, Claimed, Config, Error, Filter, HostDescription, HostId, HostRecord, LeaseAnswer,
    LeaseRef, Migration, NewTask, Operator, Page, PlannedStep, PluginVersion, Policy, Producer, Quarantine, QueuedType,
    Reclaimed, Result, Schema, SchemaStatus, Serves, Settlement, Sign, Stats, Submitted, Task, TaskId, Timestamp, Transaction,
    Update, Worker, fair,
};

/// Submits at once that somebody may be in the way of: fewer than there are connections.
const ALONE_MAX: usize = 2;

/// A MySQL or MariaDB database with tasks. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct MySql {
    access: Arc<Access>,
    steps: Arc<Steps>,
    runner: Runner,
    marks: Arc<Mutex<Marks>>,
    claims: Arc<Mutex<Claims>>,
    /// When a server took no writes, and another was looked for.
    looked_for_primary: Arc<Mutex<Option<Instant>>>,
    /// When accounts were compared with tasks.
    repaired: Arc<Mutex<Repaired>>,
    tally: Arc<Mutex<Mark<i64>>>,
    /// The numbers of plugin versions.
    plugins: Arc<Mutex<HashMap<String, i64>>>,
    /// The hosts that this process registered, and when each was last noted to be here.
    hosts: Arc<Mutex<HashMap<HostId, Instant>>>,
    submits: Arc<together::Together>,
    /// For submits that somebody may be in the way of.
    alone: Arc<Semaphore>,
    /// When claims looked for what waits apart.
    unserved: Arc<Watch>,
    /// Leases of settlements that failed in a way that leaves open whether they were committed.
    in_doubt: Arc<Mutex<HashSet<LeaseRef>>>,
}

/// What nobody holds for longer than a moment.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl MySql {
    /// Connect, with patience if the server cannot be reached, to see that it can be used.
    pub(crate) async fn open(config: &Config) -> Result<Self> {
        let access = Arc::new(Access::new(config)?);
        let (connection, server) = access.connect_with_patience(config.patience).await?;
        drop(connection);
        let runner = Runner::new(Arc::clone(&access), &server, config.patience, config.connections.statement_timeout);
        Ok(Self {
            access,
            steps: Arc::new(Steps::new(&schema::STEPS, config)),
            marks: Arc::clone(&runner.marks),
            runner,
            claims: Arc::default(),
            looked_for_primary: Arc::default(),
            repaired: Arc::default(),
            tally: Arc::new(Mutex::new(Mark::at(0))),
            plugins: Arc::default(),
            hosts: Arc::default(),
            submits: Arc::default(),
            alone: Arc::new(Semaphore::new(ALONE_MAX)),
            unserved: Arc::default(),
            in_doubt: Arc::default(),
        })
    }

    /// As [`Runner::run`], and waits long for locks.
    async fn run<T, F>(&self, doing: &'static str, operation: F) -> Result<T>
    where
        T: Send + 'static,
        F: for<'s, 'c> Fn(&'s mut Session<'c>) -> Work<'s, T> + Send + Sync + 'static,
    {
        self.run_waiting(Waiting::Long, doing, operation).await
    }

    /// As [`MySql::run`], with another way to wait for locks.
    async fn run_waiting<T, F>(&self, waiting: Waiting, doing: &'static str, operation: F) -> Result<T>
    where
        T: Send + 'static,
        F: for<'s, 'c> Fn(&'s mut Session<'c>) -> Work<'s, T> + Send + Sync + 'static,
    {
        self.runner.run(waiting, doing, operation).await
    }

    /// One row of a query, asked again if the connection was lost.
    async fn read<'q>(
        &self,
        doing: &'static str,
        query: impl Fn() -> Query<'q, sqlx::MySql, MySqlArguments>,
    ) -> Result<MySqlRow> {
        self.runner.read_row(doing, query).await
    }

    /// Claim, on a task of its own. If nobody is there any more to take them, the tasks go back.
    async fn claim_or_give_back(&self, claim: &Claim) -> Result<Claimed> {
        let (answer, answered) = oneshot::channel();
        let (mysql, claim) = (self.clone(), claim.clone());
        let host = claim.host;
        tokio::spawn(async move {
            let taken = mysql.take_served(&claim).await;
            if let Err(Ok(unheard)) = answer.send(taken) {
                mysql.give_back(&unheard).await;
            }
        });
        let taken = answered.await.map_err(|_| Error::Closed)??;
        let (claimed, broken) = taken.into_claimed();
        // The good ones are the caller's, whatever becomes of the others, which come back when their leases end.
        if !broken.is_empty()
            && let Err(error) = self.set_broken_aside(host, broken).await
        {
            tracing::error!(%error, "damaged tasks cannot be set aside yet");
        }
        Ok(claimed)
    }

    async fn give_back(&self, unheard: &claim::Taken) {
        let settlements = unheard.give_back();
        if settlements.is_empty() {
            return;
        }
        if let Err(error) = self.settle_group(&settlements).await {
            tracing::warn!(%error, tasks = settlements.len(), "claimed tasks cannot be handed back; they come back when their leases end");
        }
    }
}

#[async_trait]
impl Schema for MySql {
    async fn init(&self) -> Result<Migration> {
        self.migrate().await
    }

    async fn plan(&self) -> Result<Vec<PlannedStep>> {
        self.planned().await
    }

    async fn drift(&self) -> Result<Vec<String>> {
        self.differences().await
    }

    async fn schema_status(&self) -> Result<SchemaStatus> {
        self.status().await
    }

    async fn rehearse(&self) -> Result<Vec<String>> {
        self.rehearsed().await
    }

    async fn audit(&self) -> Result<Vec<String>> {
        self.compare_tables().await
    }
}

#[async_trait]
impl Producer for MySql {
    async fn now(&self) -> Result<Timestamp> {
        const NOW: &str = concat!("SELECT ", now!());
        let doing = "asking for the time";
        let row = self.read(doing, || sqlx::query(NOW)).await?;
        row.try_get(0).map(Timestamp).map_err(|error| self.runner.place.worded(error, doing))
    }

    async fn submit(&self, tasks: &[NewTask]) -> Result<Vec<Submitted>> {
        let batch = Batch::new(tasks)?;
        if batch.is_empty() {
            return Ok(Vec::new());
        }
        self.store_with_others(batch).await
    }

    async fn submit_in(&self, transaction: Transaction<'_>, tasks: &[NewTask]) -> Result<Vec<Submitted>> {
        let Transaction::MySql(connection) = transaction else { return Err(transaction.foreign("MySQL")) };
        let answers = submit::submit_in(connection, tasks, &self.runner.place).await?;
        // They will be found behind the marks, whenever the caller commits. When they may run is only known to be no earlier than this.
        let entered = |task: &NewTask| Entered {
            queue: stored_queue(task.queue.as_deref()).to_owned(),
            of_user: task.user.as_ref().is_some_and(|user| !user.is_empty()),
            turn: fair::turn(i64::from(task.priority), 0),
        };
        locked(&self.marks).hint(&tasks.iter().map(entered).collect::<Vec<_>>());
        Ok(answers)
    }

    async fn release_held(&self, key: &str) -> Result<bool> {
        self.release(key).await
    }

    async fn drop_held(&self, key: &str) -> Result<bool> {
        self.drop_from_hold(key).await
    }

    async fn held(&self, prefix: &str) -> Result<Vec<String>> {
        self.held_keys(prefix).await
    }

    async fn has_unsettled(&self, prefix: &str) -> Result<bool> {
        self.any_unsettled(prefix).await
    }
}

#[async_trait]
impl Worker for MySql {
    async fn claim(&self, claim: &Claim) -> Result<Claimed> {
        self.claim_or_give_back(claim).await
    }

    async fn heartbeat(&self, beats: &[Beat]) -> Result<Vec<LeaseAnswer>> {
        if beats.is_empty() {
            return Ok(Vec::new());
        }
        self.renew(beats).await
    }

    async fn settle(&self, settlements: &[Settlement]) -> Result<Vec<LeaseAnswer>> {
        if settlements.is_empty() {
            return Ok(Vec::new());
        }
        let answers = self.settle_group(settlements).await;
        self.unserved.settled(settlements);
        answers
    }

    async fn update_many(&self, updates: &[Update]) -> Result<Vec<Result<LeaseAnswer>>> {
        self.merge_many(updates).await
    }

    async fn update_data(&self, lease_ref: LeaseRef, members: &[u8]) -> Result<LeaseAnswer> {
        self.merge_data(lease_ref, members).await
    }

    async fn excuse(&self, host: HostId, leases: &[LeaseRef]) -> Result<u64> {
        self.excuse_host(host, leases).await
    }

    async fn note_running(&self, host: HostId, versions: &[PluginVersion]) -> Result<()> {
        self.note_running_versions(host, versions).await
    }

    async fn quarantined(&self) -> Result<Vec<Quarantine>> {
        self.versions_under_quarantine().await
    }

    async fn reclaim(&self, policy: &Policy) -> Result<Reclaimed> {
        self.take_back(policy).await
    }

    async fn register_host(&self, description: &HostDescription) -> Result<HostId> {
        self.enter_host(description).await
    }

    async fn unregister_host(&self, host: HostId) -> Result<()> {
        self.leave(vec![host]).await
    }

    async fn hand_on(&self, identities: &[String], policy: &Policy) -> Result<Reclaimed> {
        self.hand_hosts_on(identities, policy).await
    }

    async fn give_sign(&self, host: HostId, timeout: Duration) -> Result<()> {
        self.leave_sign(host, timeout).await
    }

    async fn signs(&self) -> Result<Vec<Sign>> {
        self.read_signs().await
    }

    async fn mark_dead(&self, silent: &[Sign]) -> Result<Vec<HostId>> {
        self.mark_hosts_dead(silent).await
    }

    async fn relatives(&self, root: TaskId, task: TaskId, limit: u32) -> Result<Option<u32>> {
        self.count_relatives(root, task, limit).await.map(Some)
    }

    async fn hosts(&self) -> Result<Vec<HostRecord>> {
        self.known_hosts().await
    }

    async fn note_plugins(&self, host: HostId, digests: &[String]) -> Result<()> {
        self.note_versions(host, digests).await
    }

    async fn note_serves(&self, host: HostId, serves: &Serves) -> Result<()> {
        self.note_service(host, serves).await
    }

    async fn clean_up(&self, limit: u32) -> Result<u64> {
        self.remove_old(limit).await
    }

    async fn wakeup(&self) {
        self.runner.wakeup.notified().await;
    }
}

#[async_trait]
impl Operator for MySql {
    async fn release_plugin(&self, digest: &str) -> Result<bool> {
        self.release_version(digest).await
    }

    async fn host_plugins(&self, host: HostId) -> Result<Vec<String>> {
        self.served_by(host).await
    }

    async fn get(&self, key: &str) -> Result<Option<Task>> {
        self.task_of(Name::Key(key.to_owned())).await
    }

    async fn get_by_id(&self, id: TaskId) -> Result<Option<Task>> {
        self.task_of(Name::Id(id)).await
    }

    async fn cancel_by_id(&self, id: TaskId, retention: Duration) -> Result<()> {
        self.end_by_hand(Name::Id(id), operate::ByHand::Cancel, retention).await
    }

    async fn retry_by_id(&self, id: TaskId) -> Result<()> {
        self.retry_by_hand(Name::Id(id)).await
    }

    async fn attempts(&self, key: &str) -> Result<Vec<AttemptRecord>> {
        self.attempts_of(key).await
    }

    async fn list(&self, filter: &Filter) -> Result<Page> {
        self.page_of(filter).await
    }

    async fn types(&self) -> Result<Option<Vec<QueuedType>>> {
        self.count_types().await.map(Some)
    }

    async fn stats(&self) -> Result<Stats> {
        self.count_all().await
    }

    async fn force_finish(&self, key: &str, retention: Duration) -> Result<()> {
        self.end_by_hand(Name::Key(key.to_owned()), operate::ByHand::Finish, retention).await
    }

    async fn cancel(&self, key: &str, retention: Duration) -> Result<()> {
        self.end_by_hand(Name::Key(key.to_owned()), operate::ByHand::Cancel, retention).await
    }

    async fn retry(&self, key: &str) -> Result<()> {
        self.retry_by_hand(Name::Key(key.to_owned())).await
    }
}

#[async_trait]
impl Backend for MySql {
    /// The hosts of this process leave, so that what they still hold comes back at once.
    async fn close(&self) {
        let hosts: Vec<HostId> = locked(&self.hosts).keys().copied().collect();
        if !self.runner.pool.is_closed()
            && let Err(error) = self.leave(hosts).await
        {
            tracing::debug!(%error, "the hosts of this process are left to their leases");
        }
        self.runner.close().await;
    }
}
