//! Tasks in an SQLite file: the embedded default.
//!
//! Authority: the file. Any number of processes of one machine may use it at once; SQLite's lock lets one write at a time, and within a
//! process all writes go through one connection (see [`writer`]). Reads run beside it on a few connections of their own. A commit is on the
//! disk when it is answered (WAL, `synchronous=FULL`), so that a crash at any moment loses nothing and needs no repair. Only claims and renewals
//! are not: after a power loss their tasks wait, as if nobody had claimed them.
//!
//! A host lives as long as its process holds a lock on a file of its own, in a folder beside the database (see [`hosts`]).

mod accounts;
mod aside;
mod audit;
mod by_time;
mod checkpoint;
mod choose;
mod claim;
mod failure;
mod hosts;
mod keep;
mod list;
mod neighbours;
mod operate;
mod pieces;
mod read;
mod rows;
mod schema;
mod served;
mod settle;
mod submit;
mod suspicion;
mod together;
mod unserved;
mod writer;

#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use sqlx::sqlite::{SqliteAutoVacuum, SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous};
use sqlx::{ConnectOptions, Connection};
use tokio::sync::Notify;

use self::neighbours::{Seen, Watch};
use self::operate::Named;
use self::writer::{Access, Flush, Original, Writer};
use crate::batch::Batch;
use crate::schema::Steps;
use crate::{
    AttemptRecord, Backend, Beat, Claim, Claimed, Config, Error, Filter, HostDescription, HostId, HostRecord, LeaseAnswer,
    LeaseRef, Migration, NewTask, Operator, Page, PlannedStep, PluginVersion, Policy, Producer, Quarantine, QueuedType,
    Reclaimed, Result, Schema, SchemaStatus, Serves, Settlement, Stats, Submitted, Task, TaskId, Timestamp, Update, Worker,
};

/// Connections that read.
const READERS: u32 = 4;
/// How long SQLite itself waits for a lock before the writer's own patience, which does not block a thread, takes over.
const BUSY_TIMEOUT: Duration = Duration::from_millis(50);
/// The log is cut back to this after a checkpoint.
const LOG_BYTES_MAX: &str = "67108864";
/// Rows that SQLite's thread may be ahead of their reader, so that a batch does not bounce between two threads.
const ROWS_AHEAD: usize = 1_024;
/// Memory for pages of the writer's connection, in KiB (negative, as SQLite has it).
const WRITER_CACHE: &str = "-65536";

/// An SQLite file with tasks.
#[derive(Debug)]
pub(crate) struct Sqlite {
    path: Arc<PathBuf>,
    steps: Arc<Steps>,
    readers: SqlitePool,
    writer: Writer,
    submits: Arc<together::Together>,
    wakeup: Arc<Notify>,
    hosts: hosts::Locks,
    /// When accounts were compared with what they count.
    repaired: Mutex<Option<Instant>>,
    file: Arc<Original>,
    seen: Arc<Seen>,
    /// When claims look for tasks that wait apart.
    unserved: Arc<crate::unserved::Watch>,
    /// Begun by the first who waits for a hint: producers do not.
    watch: Mutex<Option<Watch>>,
}

impl Sqlite {
    /// Open the file, made anew if there is none; its folder has to exist.
    pub(crate) async fn open(path: &Path, config: &Config) -> Result<Self> {
        if path.is_dir() {
            return Err(Error::File {
                path: path.to_path_buf(),
                problem: "is a folder, not a database file".to_owned(),
                source: None,
            });
        }
        if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty())
            && !folder.is_dir()
        {
            let problem = format!("the folder {} does not exist", folder.display());
            return Err(Error::File { path: path.to_path_buf(), problem, source: None });
        }
        Self::open_with(path, options(path), config).await
    }

    async fn open_with(path: &Path, options: SqliteConnectOptions, config: &Config) -> Result<Self> {
        let connection = connect_with_patience(&options, path, config.patience).await?;
        // One file may be reached by several paths; hosts meet at the real one.
        let real = std::fs::canonicalize(path).map_err(|source| Error::File {
            path: path.to_path_buf(),
            problem: "cannot be resolved".to_owned(),
            source: Some(source),
        })?;
        let path = Arc::new(real);
        let wakeup = Arc::new(Notify::new());
        let (file, seen) = (Arc::new(Original::at(&path)), Arc::<Seen>::default());
        let access = Access {
            options: options.clone(),
            path: Arc::clone(&path),
            patience: config.patience,
            wakeup: Arc::clone(&wakeup),
            file: Arc::clone(&file),
            seen: Arc::clone(&seen),
        };
        let readers = SqlitePoolOptions::new()
            .max_connections(READERS)
            .acquire_timeout(config.patience)
            .connect_lazy_with(options.busy_timeout(config.patience).pragma("query_only", "ON").pragma("cache_size", "-8192"));
        let hosts = hosts::Locks::beside(&path);
        let writer = Writer::start(connection, access);
        Ok(Self {
            writer,
            submits: Arc::default(),
            readers,
            wakeup,
            hosts,
            repaired: Mutex::default(),
            path,
            steps: Arc::new(Steps::new(&schema::STEPS, config)),
            file,
            seen,
            unserved: Arc::default(),
            watch: Mutex::default(),
        })
    }

    async fn cancel_named(&self, named: Named, retention: Duration) -> Result<()> {
        self.writer
            .run("cancelling a task", move |session| Box::pin(operate::end(session, named, operate::ByHand::Cancel, retention)))
            .await
    }

    /// Set right what accounts count wrongly, at most once a minute. Only who writes into the tables by hand can bring that about.
    async fn repair_accounts(&self) -> Result<()> {
        {
            let mut repaired = self.repaired.lock().unwrap_or_else(PoisonError::into_inner);
            if repaired.is_some_and(|repaired| repaired.elapsed() < aside::REPAIR_INTERVAL) {
                return Ok(());
            }
            *repaired = Some(Instant::now());
        }
        let accounts = aside::misfits(&self.readers).await.map_err(self.reading("comparing accounts"))?;
        if accounts.is_empty() {
            return Ok(());
        }
        tracing::error!(accounts = accounts.len(), "accounts do not count what their users have; they are counted anew");
        self.writer
            .run("counting accounts anew", move |session| {
                Box::pin(async move {
                    for account in accounts {
                        aside::recount(session, &account).await?;
                    }
                    session.wake = true;
                    Ok(())
                })
            })
            .await
    }

    /// A reader's error in the queue's words.
    fn reading(&self, doing: &'static str) -> impl FnOnce(sqlx::Error) -> Error + '_ {
        move |error| failure::worded(error, doing, &self.path)
    }
}

fn options(path: &Path) -> SqliteConnectOptions {
    SqliteConnectOptions::new()
        .filename(path)
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .auto_vacuum(SqliteAutoVacuum::None)
        .foreign_keys(false)
        .busy_timeout(BUSY_TIMEOUT)
        .pragma("journal_size_limit", LOG_BYTES_MAX)
        .pragma("wal_autocheckpoint", checkpoint::WITHIN_COMMIT_PAGES)
        .pragma("cache_size", WRITER_CACHE)
        .pragma("temp_store", "MEMORY")
        .statement_cache_capacity(100)
        .row_buffer_size(ROWS_AHEAD)
        .disable_statement_logging()
}

/// Open the connection that writes. The first one turns the write-ahead log on, for which it needs the file for itself.
async fn connect_with_patience(
    options: &SqliteConnectOptions,
    path: &Path,
    patience: Duration,
) -> Result<sqlx::sqlite::SqliteConnection> {
    let started = Instant::now();
    loop {
        let opened = async {
            let mut connection = options.connect().await?;
            // The first read finds out whether this is a database at all, and whether it may be read.
            if let Err(error) = sqlx::query("SELECT count(*) FROM sqlite_schema").execute(&mut connection).await {
                connection.close().await?;
                return Err(error);
            }
            Ok(connection)
        };
        match opened.await {
            Ok(connection) => return Ok(connection),
            Err(error) if failure::is_busy(&error) => {
                let waited = started.elapsed();
                if waited >= patience {
                    return Err(Error::Locked { path: path.to_path_buf(), waited });
                }
                tokio::time::sleep(BUSY_TIMEOUT).await;
            }
            Err(error) => return Err(failure::worded(error, "opening the database", path)),
        }
    }
}

#[async_trait]
impl Schema for Sqlite {
    async fn init(&self) -> Result<Migration> {
        let (steps, path) = (Arc::clone(&self.steps), Arc::clone(&self.path));
        self.writer
            .run("creating the tables", move |session| Box::pin(async move { schema::migrate(&steps, session, &path).await }))
            .await
    }

    async fn schema_status(&self) -> Result<SchemaStatus> {
        let mut connection = self.readers.acquire().await.map_err(self.reading("looking at the schema"))?;
        schema::status(&self.steps, &mut connection, &self.path)
            .await
            .map_err(|failure| failure.into_error("looking at the schema", &self.path))
    }

    async fn plan(&self) -> Result<Vec<PlannedStep>> {
        let doing = "planning the schema";
        let mut connection = self.readers.acquire().await.map_err(self.reading(doing))?;
        schema::plan(&self.steps, &mut connection, &self.path).await.map_err(|failure| failure.into_error(doing, &self.path))
    }

    async fn drift(&self) -> Result<Vec<String>> {
        let doing = "comparing the schema";
        let mut connection = self.readers.acquire().await.map_err(self.reading(doing))?;
        schema::drift(&self.steps, &mut connection).await.map_err(|failure| failure.into_error(doing, &self.path))
    }

    async fn audit(&self) -> Result<Vec<String>> {
        audit::audit(&self.readers).await.map_err(self.reading("comparing the tables"))
    }
}

#[async_trait]
impl Producer for Sqlite {
    async fn now(&self) -> Result<Timestamp> {
        let now = sqlx::query_scalar(writer::NOW).fetch_one(&self.readers).await.map_err(self.reading("asking for the time"))?;
        Ok(Timestamp(now))
    }

    async fn submit(&self, tasks: &[NewTask]) -> Result<Vec<Submitted>> {
        let batch = Batch::new(tasks)?;
        if batch.is_empty() {
            return Ok(Vec::new());
        }
        self.submits.submit(batch, &self.writer, &self.path).await
    }

    async fn release_held(&self, key: &str) -> Result<bool> {
        let key = key.to_owned();
        self.writer.run("releasing a held task", move |session| Box::pin(operate::release_held(session, key))).await
    }

    async fn drop_held(&self, key: &str) -> Result<bool> {
        let key = key.to_owned();
        self.writer.run("dropping a held task", move |session| Box::pin(operate::drop_held(session, key))).await
    }

    async fn held(&self, prefix: &str) -> Result<Vec<String>> {
        read::held(&self.readers, prefix).await.map_err(self.reading("reading held tasks"))
    }

    async fn has_unsettled(&self, prefix: &str) -> Result<bool> {
        read::has_unsettled(&self.readers, prefix).await.map_err(self.reading("looking for tasks that are not settled"))
    }
}

#[async_trait]
impl Worker for Sqlite {
    async fn claim(&self, claim: &Claim) -> Result<Claimed> {
        let (claim, host, unserved) = (claim.clone(), claim.host, Arc::clone(&self.unserved));
        let taken = self
            .writer
            .run_or_give_back(
                Flush::Later,
                "claiming tasks",
                move |session| Box::pin(async move { claim::claim(session, &claim, &unserved).await }),
                claim::Taken::give_back,
            )
            .await;
        // The old file knows this host, and nobody else does any more.
        let taken = taken.map_err(|error| if self.file.is_gone() { Error::UnknownHost(host) } else { error })?;
        let (claimed, broken) = taken.into_claimed();
        // The good ones are the caller's, whatever becomes of the others, which come back when their leases end.
        if !broken.is_empty()
            && let Err(error) = self.set_aside(host, broken).await
        {
            tracing::error!(%error, "damaged tasks cannot be set aside yet");
        }
        Ok(claimed)
    }

    async fn heartbeat(&self, beats: &[Beat]) -> Result<Vec<LeaseAnswer>> {
        if beats.is_empty() {
            return Ok(Vec::new());
        }
        let beats = keep::Beats::new(beats);
        self.writer.run_with(Flush::Later, "renewing leases", move |session| Box::pin(beats.write(session))).await
    }

    async fn settle(&self, settlements: &[Settlement]) -> Result<Vec<LeaseAnswer>> {
        if settlements.is_empty() {
            return Ok(Vec::new());
        }
        let group = settle::Group::new(settlements)?;
        let answers = self.writer.run("settling attempts", move |session| Box::pin(group.write(session))).await;
        self.unserved.settled(settlements);
        answers
    }

    async fn update_data(&self, lease_ref: LeaseRef, members: &[u8]) -> Result<LeaseAnswer> {
        let answers = self.merge_data(&[Update { lease_ref, members: members.to_vec() }]).await?;
        answers.into_iter().next().unwrap_or(Ok(LeaseAnswer::Lost))
    }

    async fn update_many(&self, updates: &[Update]) -> Result<Vec<Result<LeaseAnswer>>> {
        self.merge_data(updates).await
    }

    async fn excuse(&self, host: HostId, leases: &[LeaseRef]) -> Result<u64> {
        let leases = leases.to_vec();
        self.writer
            .run("taking back losses", move |session| Box::pin(async move { suspicion::excuse(session, host, &leases).await }))
            .await
    }

    async fn note_running(&self, host: HostId, versions: &[PluginVersion]) -> Result<()> {
        let versions = versions.to_vec();
        self.writer
            .run("noting what runs", move |session| {
                Box::pin(async move { suspicion::note_running(session, host, &versions).await })
            })
            .await
    }

    async fn quarantined(&self) -> Result<Vec<Quarantine>> {
        suspicion::quarantined(&self.readers).await.map_err(self.reading("reading the quarantine"))
    }

    async fn reclaim(&self, policy: &Policy) -> Result<Reclaimed> {
        self.take_back(policy).await
    }

    async fn register_host(&self, description: &HostDescription) -> Result<HostId> {
        self.enter_host(description).await
    }

    async fn unregister_host(&self, host: HostId) -> Result<()> {
        self.strike_off(host).await
    }

    async fn hand_on(&self, identities: &[String], policy: &Policy) -> Result<Reclaimed> {
        self.hand_hosts_on(identities, policy).await
    }

    async fn relatives(&self, root: TaskId, task: TaskId, limit: u32) -> Result<Option<u32>> {
        let counted = read::relatives(&self.readers, root, task, limit).await;
        counted.map(Some).map_err(self.reading("counting follow-ups"))
    }

    async fn hosts(&self) -> Result<Vec<HostRecord>> {
        self.known_hosts().await
    }

    async fn note_plugins(&self, host: HostId, digests: &[String]) -> Result<()> {
        let digests = digests.to_vec();
        self.writer
            .run("noting plugin versions", move |session| {
                Box::pin(async move { hosts::note_plugins(session, host, &digests).await })
            })
            .await
    }

    async fn note_serves(&self, host: HostId, serves: &Serves) -> Result<()> {
        let serves = serves.to_text();
        let doing = "noting what a host serves";
        self.writer.run(doing, move |session| Box::pin(async move { hosts::note_serves(session, host, &serves).await })).await
    }

    async fn clean_up(&self, limit: u32) -> Result<u64> {
        self.repair_accounts().await?;
        if !operate::has_garbage(&self.readers).await.map_err(self.reading("looking for ended retention"))? {
            return Ok(0);
        }
        let mut removed = 0;
        loop {
            let left = limit.saturating_sub(u32::try_from(removed).unwrap_or(u32::MAX));
            let cleaning = self.writer.run("removing old tasks", move |session| Box::pin(operate::clean_up(session, left)));
            let (more, is_cut) = cleaning.await?;
            removed += more;
            if !is_cut || removed >= u64::from(limit) {
                return Ok(removed);
            }
        }
    }

    async fn wakeup(&self) {
        self.watch.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(|| {
            let wakeup = Arc::clone(&self.wakeup);
            Watch::start(&self.path, Arc::clone(&self.seen), self.writer.looker(), self.readers.clone(), wakeup)
        });
        self.wakeup.notified().await;
    }
}

#[async_trait]
impl Operator for Sqlite {
    async fn release_plugin(&self, digest: &str) -> Result<bool> {
        let digest = digest.to_owned();
        self.writer.run("releasing a plugin version", move |session| Box::pin(suspicion::release(session, digest))).await
    }

    async fn host_plugins(&self, host: HostId) -> Result<Vec<String>> {
        self.served_by(host).await
    }

    async fn get(&self, key: &str) -> Result<Option<Task>> {
        read::get(&self.readers, key).await.map_err(self.reading("reading a task"))
    }

    async fn get_by_id(&self, id: TaskId) -> Result<Option<Task>> {
        read::get_by_id(&self.readers, id).await.map_err(self.reading("reading a task"))
    }

    async fn attempts(&self, key: &str) -> Result<Vec<AttemptRecord>> {
        read::attempts(&self.readers, key).await.map_err(self.reading("reading attempts"))
    }

    async fn list(&self, filter: &Filter) -> Result<Page> {
        list::list(&self.readers, filter).await.map_err(self.reading("listing tasks"))
    }

    async fn types(&self) -> Result<Option<Vec<QueuedType>>> {
        read::types(&self.readers).await.map(Some).map_err(self.reading("counting tasks by type"))
    }

    async fn stats(&self) -> Result<Stats> {
        read::stats(&self.readers).await.map_err(self.reading("counting tasks"))
    }

    async fn force_finish(&self, key: &str, retention: Duration) -> Result<()> {
        let key = key.to_owned();
        self.writer
            .run("finishing a task by force", move |session| {
                Box::pin(operate::end(session, Named::Key(key), operate::ByHand::Finish, retention))
            })
            .await
    }

    async fn cancel(&self, key: &str, retention: Duration) -> Result<()> {
        self.cancel_named(Named::Key(key.to_owned()), retention).await
    }

    async fn cancel_by_id(&self, id: TaskId, retention: Duration) -> Result<()> {
        self.cancel_named(Named::Id(id), retention).await
    }

    async fn retry(&self, key: &str) -> Result<()> {
        let named = Named::Key(key.to_owned());
        self.writer.run("retrying a task", move |session| Box::pin(operate::retry(session, named))).await
    }

    async fn retry_by_id(&self, id: TaskId) -> Result<()> {
        let named = Named::Id(id);
        self.writer.run("retrying a task", move |session| Box::pin(operate::retry(session, named))).await
    }
}

#[async_trait]
impl Backend for Sqlite {
    async fn close(&self) {
        drop(self.watch.lock().unwrap_or_else(PoisonError::into_inner).take());
        self.writer.close().await;
        self.readers.close().await;
        self.hosts.release_all();
    }
}
