//! Tasks in a PostgreSQL database, 14 or later.
//!
//! Authority: the server. Any number of hosts and producers share it; a commit is durable when it is answered, as far as the server was not
//! told otherwise. Each operation is one statement or one short transaction in READ COMMITTED (see [`session`]), and moments are the server's.
//!
//! Everything stands in a schema of its own, `laelaps`. A claim deletes from a narrow `ready` with SKIP LOCKED and writes the task's row; a
//! settlement writes that row again; neither touches an index of it, nor a row that another host's claim or settlement has to write. What is
//! counted is appended as differences. Only users have rows of their own that claims lock, one each, so that their limits hold.

mod accounts;
mod around;
mod asked;
mod audit;
mod between;
mod claim;
mod connections;
mod due;
mod excuse;
mod failure;
mod got;
mod heads;
mod held;
mod hosts;
mod keep;
mod list;
mod listen;
mod mark;
mod mend;
mod open_accounts;
mod operate;
mod pooled;
mod read;
mod rehearse;
mod schema;
mod session;
mod settle;
mod several;
mod signs;
mod submit;
mod suspects;
mod tally;
mod unreadable;
mod unserved;
mod versions;

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::task::JoinHandle;

use self::connections::Connections;
use self::operate::Name;
use self::pooled::Db;
use self::session::Shared;
use crate::batch::Batch;
use crate::earlier::Earlier;
use crate::schema::Steps;
use crate::unserved::{ROUNDS_MAX, Sieve};
use crate::{
    AttemptRecord, Backend, Beat, Claim, Claimed, Config, Error, Filter, HostDescription, HostId, HostRecord, LeaseAnswer,
    LeaseRef, Migration, NewTask, Operator, Page, PlannedStep, PluginVersion, Policy, Producer, Quarantine, QueuedType,
    Reclaimed, Result, Schema, SchemaStatus, Serves, Settlement, Sign, Stats, Submitted, Task, TaskId, Timestamp, Transaction,
    Update, Worker,
};

/// A PostgreSQL database with tasks.
#[derive(Debug)]
pub(crate) struct Postgres {
    shared: Arc<Shared>,
}

impl Postgres {
    /// Connect, with patience if the server cannot be reached.
    pub(crate) async fn open(config: &Config) -> Result<Self> {
        let connections = Connections::open(config).await?;
        Ok(Self {
            shared: Shared::new(connections, Steps::new(&schema::STEPS, config), config.patience, config.connections.listen),
        })
    }
}

#[async_trait]
impl Schema for Postgres {
    async fn init(&self) -> Result<Migration> {
        let making = schema::MAKING_MAX;
        self.shared.run_long("creating the tables", making, |session| Box::pin(schema::migrate(session))).await
    }

    async fn plan(&self) -> Result<Vec<PlannedStep>> {
        self.shared.run("planning the schema", |session| Box::pin(schema::plan(session))).await
    }

    async fn drift(&self) -> Result<Vec<String>> {
        self.shared.run("comparing the schema", |session| Box::pin(schema::drift(session))).await
    }

    async fn schema_status(&self) -> Result<SchemaStatus> {
        self.shared.run("looking at the schema", |session| Box::pin(schema::status(session))).await
    }

    async fn rehearse(&self) -> Result<Vec<String>> {
        self.shared.run("rehearsing what a host does", |session| Box::pin(rehearse::rehearse(session))).await
    }

    async fn warnings(&self) -> Result<Vec<String>> {
        let connections = &self.shared.connections;
        let mut warnings = connections.pooler().map(pooled::Pooler::warnings).unwrap_or_default();
        warnings.extend(self.shared.listener.deafness(connections).map(str::to_owned));
        Ok(warnings)
    }

    async fn audit(&self) -> Result<Vec<String>> {
        self.shared.run_long("comparing the tables", audit::TIME_MAX, |session| Box::pin(audit::audit(session))).await
    }
}

#[async_trait]
impl Producer for Postgres {
    async fn now(&self) -> Result<Timestamp> {
        const NOW: &str = "SELECT (extract(epoch FROM clock_timestamp()) * 1000)::int8";
        let now = self.shared.run("asking for the time", |session| {
            Box::pin(async move { Ok(sqlx::query_scalar(NOW).fetch_one(session.db()?).await?) })
        });
        Ok(Timestamp(now.await?))
    }

    async fn submit(&self, tasks: &[NewTask]) -> Result<Vec<Submitted>> {
        let batch = Arc::new(Batch::new(tasks)?);
        if batch.is_empty() {
            return Ok(Vec::new());
        }
        let submitted = self.shared.run("submitting tasks", move |session| {
            let batch = Arc::clone(&batch);
            Box::pin(async move {
                let answers = submit::submit(session, &batch).await?;
                if answers.contains(&Submitted::Created) {
                    session.afterwards(Shared::wake);
                }
                if batch.rows.iter().map(|row| (row.queue.as_str(), row.user.as_str())).collect::<HashSet<(&str, &str)>>().len()
                    > accounts::CHANGES_MIN
                {
                    session.afterwards(Shared::enter_changes);
                }
                Ok(answers)
            })
        });
        submitted.await
    }

    async fn submit_in(&self, transaction: Transaction<'_>, tasks: &[NewTask]) -> Result<Vec<Submitted>> {
        let Transaction::Postgres(connection) = transaction else { return Err(transaction.foreign("PostgreSQL")) };
        let batch = Batch::new(tasks)?;
        let stored = submit::submit_in(Db::of_caller(connection), &batch).await;
        stored.map_err(|failure| failure.into_error("submitting tasks", self.shared.connections.place()))
    }

    async fn release_held(&self, key: &str) -> Result<bool> {
        let key = key.to_owned();
        let released = self.shared.run("releasing a held task", move |session| {
            let key = key.clone();
            Box::pin(async move { operate::release_held(session, &key).await })
        });
        released.await
    }

    async fn drop_held(&self, key: &str) -> Result<bool> {
        let asked = Arc::new((key.to_owned(), Earlier::default()));
        let dropped = self.shared.run("dropping a held task", move |session| {
            let asked = Arc::clone(&asked);
            Box::pin(async move { operate::drop_held(session, &asked.0, &asked.1).await })
        });
        dropped.await
    }

    async fn held(&self, prefix: &str) -> Result<Vec<String>> {
        let prefix = prefix.to_owned();
        let read = self.shared.run("reading held tasks", move |session| {
            let prefix = prefix.clone();
            Box::pin(async move { read::held(session, &prefix).await })
        });
        read.await
    }

    async fn has_unsettled(&self, prefix: &str) -> Result<bool> {
        let prefix = prefix.to_owned();
        let read = self.shared.run("looking for tasks that are not settled", move |session| {
            let prefix = prefix.clone();
            Box::pin(async move { read::has_unsettled(session, &prefix).await })
        });
        read.await
    }
}

#[async_trait]
impl Worker for Postgres {
    async fn claim(&self, claim: &Claim) -> Result<Claimed> {
        let mut claimed = Claimed::default();
        let mut sieve = Sieve::new(claim);
        for _ in 0..ROUNDS_MAX {
            let asked = sieve.asked().into_owned();
            let (found, apart) = self.claim_once(asked, &mut sieve).await?;
            claimed = found;
            let Some(apart) = apart.filter(|_| claimed.tasks.is_empty()) else { return Ok(claimed) };
            // What was met is out of the way then. Whether it could be written was told.
            let _ = apart.await;
            if sieve.is_enough() {
                break;
            }
        }
        // The next claim goes on.
        self.shared.hint();
        Ok(claimed)
    }

    async fn heartbeat(&self, beats: &[Beat]) -> Result<Vec<LeaseAnswer>> {
        if beats.is_empty() {
            return Ok(Vec::new());
        }
        let beats = keep::Beats::new(beats);
        let renewed = self.shared.run("renewing leases", move |session| {
            let beats = beats.clone();
            Box::pin(async move { beats.write(session).await })
        });
        renewed.await
    }

    async fn settle(&self, settlements: &[Settlement]) -> Result<Vec<LeaseAnswer>> {
        if settlements.is_empty() {
            return Ok(Vec::new());
        }
        let answers = settle::Group::new(settlements)?.write(&self.shared, "settling attempts").await;
        self.shared.unserved.settled(settlements);
        answers
    }

    async fn update_data(&self, lease_ref: LeaseRef, members: &[u8]) -> Result<LeaseAnswer> {
        let update = Update { lease_ref, members: members.to_vec() };
        keep::update_many(&self.shared, &[update]).await?.pop().unwrap_or(Err(Error::Closed))
    }

    async fn update_many(&self, updates: &[Update]) -> Result<Vec<Result<LeaseAnswer>>> {
        keep::update_many(&self.shared, updates).await
    }

    async fn excuse(&self, host: HostId, leases: &[LeaseRef]) -> Result<u64> {
        let asked = Arc::new((leases.to_vec(), Earlier::default()));
        let excused = self.shared.run("taking losses back", move |session| {
            let asked = Arc::clone(&asked);
            Box::pin(async move { excuse::excuse(session, host, &asked.0, &asked.1).await })
        });
        excused.await
    }

    async fn note_running(&self, host: HostId, versions: &[PluginVersion]) -> Result<()> {
        let versions = versions.to_vec();
        let noted = self.shared.run("noting what runs on a host", move |session| {
            let versions = versions.clone();
            Box::pin(async move { versions::note_running(session, host, &versions).await })
        });
        noted.await
    }

    async fn quarantined(&self) -> Result<Vec<Quarantine>> {
        self.shared.run("reading plugin versions under quarantine", |session| Box::pin(versions::quarantined(session))).await
    }

    async fn reclaim(&self, policy: &Policy) -> Result<Reclaimed> {
        let asked = Arc::new((policy.clone(), Earlier::default()));
        let taken = self.shared.run("taking back lost tasks", move |session| {
            let asked = Arc::clone(&asked);
            Box::pin(async move { hosts::take_back(session, &asked.0, &asked.1).await })
        });
        taken.await
    }

    async fn register_host(&self, description: &HostDescription) -> Result<HostId> {
        hosts::register(&self.shared, description).await
    }

    async fn unregister_host(&self, host: HostId) -> Result<()> {
        self.shared.run("striking off a host", move |session| Box::pin(async move { hosts::leave(session, &[host]).await })).await
    }

    async fn hand_on(&self, identities: &[String], policy: &Policy) -> Result<Reclaimed> {
        let identities: Vec<String> = identities.iter().map(|identity| settle::clean(identity)).collect();
        let asked = Arc::new((identities, policy.clone(), Earlier::default()));
        let handed_on = self.shared.run("handing tasks on", move |session| {
            let asked = Arc::clone(&asked);
            Box::pin(async move { hosts::hand_on(session, &asked.0, &asked.1, &asked.2).await })
        });
        handed_on.await
    }

    async fn give_sign(&self, host: HostId, timeout: Duration) -> Result<()> {
        let doing = "giving a sign of life";
        self.shared.run(doing, move |session| Box::pin(async move { signs::give(session, host, timeout).await })).await
    }

    async fn signs(&self) -> Result<Vec<Sign>> {
        self.shared.run("reading signs of life", |session| Box::pin(signs::read(session))).await
    }

    async fn mark_dead(&self, silent: &[Sign]) -> Result<Vec<HostId>> {
        let silent = silent.to_vec();
        let marked = self.shared.run("marking hosts as dead", move |session| {
            let silent = silent.clone();
            Box::pin(async move { signs::mark_dead(session, &silent).await })
        });
        marked.await
    }

    async fn relatives(&self, root: TaskId, task: TaskId, limit: u32) -> Result<Option<u32>> {
        let counted = self.shared.run("counting follow-ups", move |session| {
            Box::pin(async move { read::relatives(session, root, task, limit).await })
        });
        counted.await.map(Some)
    }

    async fn hosts(&self) -> Result<Vec<HostRecord>> {
        self.shared.run("reading hosts", |session| Box::pin(hosts::hosts(session))).await
    }

    async fn note_plugins(&self, host: HostId, digests: &[String]) -> Result<()> {
        let digests = digests.to_vec();
        let noted = self.shared.run("noting plugin versions", move |session| {
            let digests = digests.clone();
            Box::pin(async move { versions::note_plugins(session, host, &digests).await })
        });
        noted.await
    }

    async fn note_serves(&self, host: HostId, serves: &Serves) -> Result<()> {
        let serves = serves.to_text();
        let noted = self.shared.run("noting what a host serves", move |session| {
            let serves = serves.clone();
            Box::pin(async move { hosts::note_serves(session, host, &serves).await })
        });
        noted.await
    }

    async fn clean_up(&self, limit: u32) -> Result<u64> {
        let earlier = Earlier::default();
        let removed = self.shared.run("removing old tasks", move |session| {
            let earlier = earlier.clone();
            Box::pin(async move { operate::clean_up(session, limit, &earlier).await })
        });
        removed.await
    }

    async fn wakeup(&self) {
        self.shared.listener.start(&self.shared);
        self.shared.wakeup.notified().await;
    }
}

#[async_trait]
impl Operator for Postgres {
    async fn release_plugin(&self, digest: &str) -> Result<bool> {
        let asked = Arc::new((digest.to_owned(), Earlier::default()));
        let released = self.shared.run("releasing a plugin version", move |session| {
            let asked = Arc::clone(&asked);
            Box::pin(async move { versions::release(session, &asked.0, &asked.1).await })
        });
        released.await
    }

    async fn host_plugins(&self, host: HostId) -> Result<Vec<String>> {
        let doing = "reading the plugin versions of a host";
        self.shared.run(doing, move |session| Box::pin(async move { versions::served_by(session, host).await })).await
    }

    async fn get(&self, key: &str) -> Result<Option<Task>> {
        self.read(Name::Key(key.to_owned())).await
    }

    async fn get_by_id(&self, id: TaskId) -> Result<Option<Task>> {
        self.read(Name::Id(id)).await
    }

    async fn cancel_by_id(&self, id: TaskId, retention: Duration) -> Result<()> {
        self.end("cancelling a task", Name::Id(id), operate::ByHand::Cancel, retention).await
    }

    async fn retry_by_id(&self, id: TaskId) -> Result<()> {
        self.retry_one(Name::Id(id)).await
    }

    async fn attempts(&self, key: &str) -> Result<Vec<AttemptRecord>> {
        let key = key.to_owned();
        let read = self.shared.run("reading attempts", move |session| {
            let key = key.clone();
            Box::pin(async move { read::attempts(session, &key).await })
        });
        read.await
    }

    async fn list(&self, filter: &Filter) -> Result<Page> {
        let filter = filter.clone();
        let read = self.shared.run("listing tasks", move |session| {
            let filter = filter.clone();
            Box::pin(async move { list::list(session, &filter).await })
        });
        read.await
    }

    async fn types(&self) -> Result<Option<Vec<QueuedType>>> {
        self.shared.run("counting tasks by type", |session| Box::pin(read::types(session))).await.map(Some)
    }

    async fn stats(&self) -> Result<Stats> {
        self.shared.run("counting tasks", |session| Box::pin(read::stats(session))).await
    }

    async fn force_finish(&self, key: &str, retention: Duration) -> Result<()> {
        self.end("finishing a task by force", Name::Key(key.to_owned()), operate::ByHand::Finish, retention).await
    }

    async fn cancel(&self, key: &str, retention: Duration) -> Result<()> {
        self.end("cancelling a task", Name::Key(key.to_owned()), operate::ByHand::Cancel, retention).await
    }

    async fn retry(&self, key: &str) -> Result<()> {
        self.retry_one(Name::Key(key.to_owned())).await
    }
}

#[async_trait]
impl Backend for Postgres {
    async fn close(&self) {
        self.shared.listener.stop();
        if !self.shared.end().await {
            return;
        }
        let hosts: Vec<HostId> = self.shared.hosts().drain().collect();
        if !hosts.is_empty() {
            // What they still hold can be taken back at once instead of when the leases end.
            let left = self.shared.try_once(move |session| {
                let hosts = hosts.clone();
                Box::pin(async move { hosts::leave(session, &hosts).await })
            });
            if let Err(error) = left.await {
                tracing::debug!(?error, "the hosts of this program are left to be found gone");
            }
        }
        self.shared.connections.close().await;
    }
}

impl Postgres {
    /// Claim. Beside what the claimer serves it may be given other tasks, which are put apart: also answers when that is done.
    async fn claim_once(&self, claim: Claim, sieve: &mut Sieve<'_>) -> Result<(Claimed, Option<JoinHandle<()>>)> {
        let limit = claim.limit;
        let asked = Arc::new(asked::Asked::new(claim));
        let taken = self.shared.run_or_give_back(
            "claiming tasks",
            move |session| {
                let asked = Arc::clone(&asked);
                Box::pin(async move { claim::claim(session, &asked).await })
            },
            |shared, taken: asked::Taken| Box::pin(async move { taken.give_back(&shared).await }),
        );
        let mut taken = taken.await?;
        let found = taken.value_mut().map_or(0, |taken| taken.len());
        self.shared.listener.claimed(found, limit);
        let broken = taken.value_mut().map(asked::Taken::open).unwrap_or_default();
        let others = taken.value_mut().map(|taken| taken.sift(sieve)).unwrap_or_default();
        let apart = (!others.is_empty()).then(|| unserved::put_apart(&self.shared, others));
        // The good ones are the caller's, whatever becomes of the others, which come back when their leases end.
        if !broken.is_empty()
            && let Err(error) = self.set_aside(broken).await
        {
            tracing::error!(%error, "damaged tasks cannot be set aside yet");
        }
        Ok((taken.take().map(asked::Taken::into_claimed).unwrap_or_default(), apart))
    }

    async fn end(&self, doing: &'static str, name: Name, by: operate::ByHand, retention: Duration) -> Result<()> {
        let asked = Arc::new((name, Earlier::default()));
        let ended = self.shared.run(doing, move |session| {
            let asked = Arc::clone(&asked);
            Box::pin(async move { operate::end(session, &asked.0, by, retention, &asked.1).await })
        });
        ended.await
    }

    async fn retry_one(&self, name: Name) -> Result<()> {
        let asked = Arc::new((name, Earlier::default()));
        let retried = self.shared.run("retrying a task", move |session| {
            let asked = Arc::clone(&asked);
            Box::pin(async move { operate::retry(session, &asked.0, &asked.1).await })
        });
        retried.await
    }

    async fn read(&self, name: Name) -> Result<Option<Task>> {
        let read = self.shared.run("reading a task", move |session| {
            let name = name.clone();
            Box::pin(async move { read::get(session, &name).await })
        });
        read.await
    }

    /// Whether or not the caller waits.
    async fn set_aside(&self, broken: Vec<unreadable::Broken>) -> Result<()> {
        let pass = self.shared.pass().await?;
        let shared = Arc::clone(&self.shared);
        let aside = tokio::spawn(async move {
            let aside = unreadable::set_aside(&shared, broken).await;
            drop(pass);
            aside
        });
        aside.await.unwrap_or(Err(Error::Closed))
    }
}
