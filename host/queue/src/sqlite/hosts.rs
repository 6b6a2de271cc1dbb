//! Hosts, and how it is known that one is dead.
//!
//! Authority: the operating system. A host holds an exclusive lock on `DATABASE-hosts/ID.lock`; the lock goes with its process, however that
//! ends. The file is made and locked before the host's row can be seen, and removed after the row is struck off, so that a host without file
//! or with a free lock is dead. So is one that has left, whatever its process does: a watchdog knows better. Numbers are never used twice. If somebody removes the folder under living hosts, they count as dead: their
//! tasks are taken back, their late writes fail at the fence, and they have to register again.

use std::collections::{HashMap, HashSet};
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use super::Sqlite;
use super::accounts::json;
use super::claim::Broken;
use super::failure::{self, Failure};
use super::rows::Columns;
use super::settle::Group;
use super::suspicion;
use super::writer::Session;
use crate::{
    Attempt, Error, Event, FailureKind, HostDescription, HostId, HostRecord, Lease, LeaseAnswer, LeaseRef, Lost, Policy,
    Reclaimed, Result, Serves, Settlement, TaskId, Timestamp, Verdict,
};

/// Tasks taken back in one transaction.
const RECLAIMED_MAX: i64 = 1_000;
/// Hosts that are gone and still kept, for tracing lost attempts.
const GONE_HOSTS_KEPT: i64 = 1_000;

/// The locks that this process holds for its hosts.
#[derive(Clone, Debug)]
pub(super) struct Locks {
    folder: PathBuf,
    held: Arc<Mutex<HashMap<HostId, File>>>,
}

impl Locks {
    pub(super) fn beside(database: &Path) -> Self {
        let mut folder = database.as_os_str().to_owned();
        folder.push("-hosts");
        Self { folder: PathBuf::from(folder), held: Arc::default() }
    }

    fn path(&self, host: HostId) -> PathBuf {
        self.folder.join(format!("{}.lock", host.0))
    }

    /// Take the lock of a new host.
    fn take(&self, host: HostId) -> Result<()> {
        let failed =
            |path: &Path, problem: &str, source| Error::File { path: path.to_path_buf(), problem: problem.to_owned(), source };
        std::fs::create_dir_all(&self.folder)
            .map_err(|error| failed(&self.folder, "the folder of the hosts' locks cannot be made", Some(error)))?;
        let path = self.path(host);
        let file = File::options().create(true).truncate(false).write(true).open(&path);
        let file = file.map_err(|error| failed(&path, "the host's lock cannot be made", Some(error)))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(failed(&path, "another process holds the lock of this new host", None)),
            Err(TryLockError::Error(error)) => return Err(failed(&path, "the host's lock cannot be taken", Some(error))),
        }
        self.held().insert(host, file);
        Ok(())
    }

    /// Let go of a host's lock and remove its file.
    fn release(&self, host: HostId) {
        if self.held().remove(&host).is_some() {
            self.remove(host);
        }
    }

    /// Remove the file of a host that was struck off, whosever it is. A process that is stuck keeps its lock on what is no file any more, to
    /// no effect: nobody asks for the life of a host whose row has ended.
    fn clear(&self, host: HostId) {
        self.held().remove(&host);
        self.remove(host);
    }

    pub(super) fn release_all(&self) {
        // Files stay: the hosts' rows do, and with free locks they are dead.
        self.held().clear();
    }

    fn remove(&self, host: HostId) {
        let path = self.path(host);
        if let Err(error) = std::fs::remove_file(&path)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(path = %path.display(), %error, "the lock file of a host that is gone cannot be removed; remove it by hand");
        }
    }

    /// Whether the host's process lives; None if that cannot be found out.
    fn is_alive(&self, host: HostId) -> Option<bool> {
        let path = self.path(host);
        match File::options().write(true).open(&path) {
            Ok(file) => match file.try_lock() {
                Ok(()) => Some(false),
                Err(TryLockError::WouldBlock) => Some(true),
                Err(TryLockError::Error(_)) => None,
            },
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Some(false),
            Err(_) => None,
        }
    }

    fn held(&self) -> std::sync::MutexGuard<'_, HashMap<HostId, File>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Sqlite {
    pub(super) async fn enter_host(&self, description: &HostDescription) -> Result<HostId> {
        const ENTER: &str = "INSERT INTO host (name, process_id, started_at, identity) VALUES (?1, ?2, ?3, ?4) RETURNING id";
        description.check()?;
        let HostDescription { name, process_id, identity } = description.clone();
        let locks = self.hosts.clone();
        let taken = Arc::new(OnceLock::new());
        let host = Arc::clone(&taken);
        let entered = self.writer.run("registering a host", move |session| {
            Box::pin(async move {
                let now = session.now;
                let query = sqlx::query_scalar(ENTER).bind(name).bind(process_id).bind(now).bind(identity);
                let id = HostId(query.fetch_one(session.db()).await?);
                locks.take(id)?;
                host.get_or_init(|| id);
                Ok(id)
            })
        });
        let entered = entered.await;
        // A row that was not committed leaves its number to the next host, and so it must leave the lock.
        if let (Err(_), Some(host)) = (&entered, taken.get()) {
            self.hosts.release(*host);
        }
        entered
    }

    /// A host that still has tasks keeps its row, but not its lock, so that it is found dead.
    pub(super) async fn strike_off(&self, host: HostId) -> Result<()> {
        self.writer
            .run("striking off a host", move |session| {
                Box::pin(async move {
                    suspicion::leave(session, &[host]).await?;
                    strike_off(session, vec![host]).await
                })
            })
            .await?;
        self.hosts.release(host);
        Ok(())
    }

    pub(super) async fn known_hosts(&self) -> Result<Vec<HostRecord>> {
        const HOSTS: &str = "SELECT id, name, process_id, started_at,
                (SELECT count(*) FROM task WHERE task.host = host.id AND task.state = 'running'), identity, left_at, serves
            FROM host INDEXED BY host_here WHERE ended_at IS NULL ORDER BY id";
        let rows = sqlx::query(HOSTS).fetch_all(&self.readers).await.map_err(self.reading("reading hosts"))?;
        let locks = self.hosts.clone();
        let record = |row: &sqlx::sqlite::SqliteRow| {
            let mut columns = Columns::of(row);
            let id = HostId(columns.whole(0, "number"));
            HostRecord {
                id,
                name: columns.text(1, "name"),
                process_id: columns.count(2, "process_id"),
                started_at: Timestamp(columns.whole(3, "started_at")),
                running: columns.whole(4, "running").unsigned_abs(),
                alive: if columns.maybe_whole(6, "left_at").is_some() { Some(false) } else { locks.is_alive(id) },
                identity: columns.maybe_text(5, "identity"),
                serves: Serves::of_text(columns.maybe_text(7, "serves").as_deref()),
            }
        };
        Ok(rows.iter().map(record).collect())
    }

    /// Take back what dead hosts and ended leases hold, at most a batch, and strike dead hosts off that hold nothing any more.
    pub(super) async fn take_back(&self, policy: &Policy) -> Result<Reclaimed> {
        let (dead_hosts, others): (Vec<HostRecord>, Vec<HostRecord>) =
            self.known_hosts().await?.into_iter().partition(|host| host.alive == Some(false));
        let ended: bool =
            sqlx::query_scalar(ENDED).fetch_one(&self.readers).await.map_err(self.reading("looking for lost tasks"))?;
        if dead_hosts.is_empty() && !ended {
            return Ok(Reclaimed::default());
        }
        let living = others.iter().filter(|host| host.alive == Some(true)).map(|host| host.id).collect();
        let (dead, policy) = (dead_hosts.iter().map(|host| host.id).collect::<Vec<_>>(), policy.clone());
        let (tasks, gone) = self
            .writer
            .run("taking back lost tasks", move |session| {
                Box::pin(async move { take_back(session, dead, Leases::OfHostsAndEnded { living }, &policy).await })
            })
            .await?;
        Ok(Reclaimed { tasks, dead_hosts: self.cleared(dead_hosts, &gone) })
    }

    /// Take back what the hosts with these identities hold, at most a batch, and strike them off once they hold nothing any more. They have
    /// left with the first batch, and the database lets one write at a time: no claim comes in between.
    pub(super) async fn hand_hosts_on(&self, identities: &[String], policy: &Policy) -> Result<Reclaimed> {
        let named = |host: &HostRecord| host.identity.as_ref().is_some_and(|identity| identities.contains(identity));
        let named: Vec<HostRecord> = self.known_hosts().await?.into_iter().filter(named).collect();
        if named.is_empty() {
            return Ok(Reclaimed::default());
        }
        let (hosts, policy) = (named.iter().map(|host| host.id).collect::<Vec<_>>(), policy.clone());
        let (tasks, gone) = self
            .writer
            .run("handing tasks on", move |session| Box::pin(async move { hand_on(session, hosts, &policy).await }))
            .await?;
        Ok(Reclaimed { tasks, dead_hosts: self.cleared(named, &gone) })
    }

    /// Those of the hosts that are gone. Their lock files go as well.
    fn cleared(&self, hosts: Vec<HostRecord>, gone: &[HostId]) -> Vec<HostRecord> {
        for host in gone {
            self.hosts.clear(*host);
        }
        let gone = hosts.into_iter().filter(|host| gone.contains(&host.id));
        gone.map(|host| HostRecord { running: 0, alive: Some(false), ..host }).collect()
    }

    /// Fail claimed tasks that nobody can read, so that they stop nobody.
    pub(super) async fn set_aside(&self, host: HostId, broken: Vec<Broken>) -> Result<()> {
        let policy = Policy::default();
        let mut settlements = Vec::with_capacity(broken.len());
        for Broken { task, problem } in broken {
            tracing::error!(task = task.key, host = host.0, problem, "the data of a task is damaged; it is set aside as failed");
            let event = Event::Failure {
                kind: FailureKind::Reject,
                code: "damaged-data".to_owned(),
                message: format!("the stored data cannot be used: {problem}"),
            };
            settlements.push(Settlement::of(task.lease_ref, event, Attempt::of(&task), &policy, 0.0, None, Vec::new()));
        }
        let group = Group::new(&settlements)?;
        self.writer.run("setting aside damaged tasks", move |session| Box::pin(group.write(session))).await?;
        Ok(())
    }
}

/// A task that its host has lost.
struct Stray {
    lease_ref: LeaseRef,
    key: String,
    host: HostId,
    attempt: Attempt,
    event: Event,
}

/// Which leases are taken back.
#[derive(Clone, Debug)]
enum Leases {
    OfHosts,
    /// Also those that ran out. The living hosts' tasks are not to blame for it.
    OfHostsAndEnded {
        living: HashSet<HostId>,
    },
}

async fn hand_on(session: &mut Session, hosts: Vec<HostId>, policy: &Policy) -> Result<(Vec<Lost>, Vec<HostId>), Failure> {
    const LEAVE: &str =
        "UPDATE host SET left_at = ?2 WHERE id IN (SELECT value FROM json_each(?1)) AND left_at IS NULL AND ended_at IS NULL";
    let now = session.now;
    sqlx::query(LEAVE).bind(json(&hosts)).bind(now).execute(session.db()).await?;
    take_back(session, hosts, Leases::OfHosts, policy).await
}

async fn take_back(
    session: &mut Session,
    dead: Vec<HostId>,
    leases: Leases,
    policy: &Policy,
) -> Result<(Vec<Lost>, Vec<HostId>), Failure> {
    let strays = strays(session, &dead, leases).await?;
    // No back-off follows a loss, so no random number is needed.
    let settled =
        |stray: &Stray| Settlement::of(stray.lease_ref, stray.event.clone(), stray.attempt, policy, 0.0, None, Vec::new());
    let settlements: Vec<Settlement> = strays.iter().map(settled).collect();
    let failed: Vec<bool> = settlements.iter().map(|settlement| matches!(settlement.verdict(), Verdict::Fail { .. })).collect();
    let answers = if settlements.is_empty() { Vec::new() } else { Group::of_lost(&settlements)?.write(session).await? };
    let lost = strays.into_iter().zip(failed).zip(answers).filter(|(_, answer)| *answer == LeaseAnswer::Held);
    let lost =
        lost.map(|((stray, failed), _)| Lost { lease_ref: stray.lease_ref, key: stray.key, host: stray.host, failed }).collect();
    suspicion::died(session, &dead).await?;
    let gone = strike_off(session, dead).await?;
    Ok((lost, gone))
}

/// The hosts that running tasks name, read off the index, whether they are known or not.
macro_rules! holders {
    () => {
        "WITH RECURSIVE holder (host) AS (
            SELECT min(host) FROM task INDEXED BY task_running WHERE state = 'running'
            UNION ALL
            SELECT (SELECT min(task.host) FROM task INDEXED BY task_running WHERE task.state = 'running' AND task.host > holder.host)
            FROM holder WHERE holder.host IS NOT NULL)"
    };
}

const ENDED: &str = concat!(
    holders!(),
    " SELECT EXISTS (SELECT 1 FROM holder CROSS JOIN task INDEXED BY task_running ON task.host = holder.host
            WHERE task.state = 'running' AND task.until <= (SELECT CAST(round(unixepoch('subsec') * 1000) AS INTEGER)))
        OR EXISTS (SELECT 1 FROM task INDEXED BY task_running WHERE task.host IS NULL AND task.state = 'running'
            AND task.until <= (SELECT CAST(round(unixepoch('subsec') * 1000) AS INTEGER)))"
);

pub(super) const STRAYS: &str = concat!(
    holders!(),
    " SELECT task.id, task.lease, task.key, task.host, task.attempts, task.max_attempts, task.releases, task.lost,
            task.lost_alone, task.alone, task.lost_at
        FROM (SELECT task.id FROM json_each(?1) AS dead CROSS JOIN task INDEXED BY task_running ON task.host = dead.value
                WHERE task.state = 'running'
            UNION
            SELECT task.id FROM holder CROSS JOIN task INDEXED BY task_running ON task.host = holder.host
                WHERE task.state = 'running' AND task.until <= ?2
            UNION
            SELECT id FROM task INDEXED BY task_running WHERE host IS NULL AND state = 'running' AND until <= ?2
            LIMIT ?3) AS stray
        CROSS JOIN task ON task.id = stray.id"
);

/// Running tasks of dead hosts, and those whose lease ran out, if these count.
async fn strays(session: &mut Session, dead: &[HostId], leases: Leases) -> Result<Vec<Stray>, Failure> {
    let now = session.now;
    // No lease ends before NULL.
    let (ended_by, living) = match leases {
        Leases::OfHosts => (None, HashSet::new()),
        Leases::OfHostsAndEnded { living } => (Some(now), living),
    };
    let rows = sqlx::query(STRAYS).bind(json(dead)).bind(ended_by).bind(RECLAIMED_MAX).fetch_all(session.db()).await?;
    let stray = |row: &sqlx::sqlite::SqliteRow| {
        let mut columns = Columns::of(row);
        let host = HostId(columns.whole(3, "host"));
        let lost_at = columns.maybe_whole(10, "lost_at").map(Timestamp);
        Stray {
            lease_ref: LeaseRef { task: TaskId(columns.whole(0, "number")), lease: Lease(columns.whole(1, "lease")) },
            key: columns.text(2, "key"),
            host,
            attempt: Attempt {
                attempt: columns.count(4, "attempts").saturating_add(1),
                max_attempts: columns.maybe_count(5, "max_attempts"),
                releases: columns.count(6, "releases"),
                lost: columns.count(7, "lost"),
                lost_alone: columns.count(8, "lost_alone"),
                alone: columns.whole(9, "alone") != 0,
                lost_for: lost_at.map_or(Duration::ZERO, |lost_at| Timestamp(now).since(lost_at)),
            },
            event: if living.contains(&host) { Event::Overdue } else { Event::Lost },
        }
    };
    Ok(rows.iter().map(stray).collect())
}

/// Strike off those of the hosts that hold no task. Answers which are gone. Hosts gone long ago are forgotten.
async fn strike_off(session: &mut Session, hosts: Vec<HostId>) -> Result<Vec<HostId>, Failure> {
    const OFF: &str = "UPDATE host SET ended_at = ?2 WHERE id IN (SELECT value FROM json_each(?1)) AND ended_at IS NULL
        AND NOT EXISTS (SELECT 1 FROM task WHERE task.host = host.id AND task.state = 'running') RETURNING id";
    const FORGET: &str = "DELETE FROM host WHERE ended_at IS NOT NULL AND id <= (SELECT max(id) FROM host) - ?1";
    const FORGET_PLUGINS: &str = "DELETE FROM host_plugin WHERE host NOT IN (SELECT id FROM host)";
    let now = session.now;
    let gone: Vec<i64> = sqlx::query_scalar(OFF).bind(json(&hosts)).bind(now).fetch_all(session.db()).await?;
    if !gone.is_empty() && sqlx::query(FORGET).bind(GONE_HOSTS_KEPT).execute(session.db()).await?.rows_affected() > 0 {
        sqlx::query(FORGET_PLUGINS).execute(session.db()).await?;
    }
    Ok(gone.into_iter().map(HostId).collect())
}

/// Note which plugin versions a host serves from now on; those it served before stay noted.
pub(super) async fn note_plugins(session: &mut Session, host: HostId, digests: &[String]) -> Result<(), Failure> {
    const ENTER: &str =
        "INSERT INTO plugin_version (digest) SELECT value FROM json_each(?1) WHERE true ON CONFLICT (digest) DO NOTHING";
    const NOTE: &str = "INSERT INTO host_plugin (host, plugin, noted_at)
        SELECT host.id, plugin_version.id, ?3 FROM host, plugin_version
        WHERE host.id = ?2 AND plugin_version.digest IN (SELECT value FROM json_each(?1))
        ON CONFLICT (host, plugin) DO NOTHING";
    if !suspicion::is_here(session, host).await? {
        return Err(failure::unknown_host(host));
    }
    let now = session.now;
    let digests = json(digests);
    sqlx::query(ENTER).bind(digests.clone()).execute(session.db()).await?;
    sqlx::query(NOTE).bind(digests).bind(host.0).bind(now).execute(session.db()).await?;
    Ok(())
}

/// Note what a host serves from now on.
pub(super) async fn note_serves(session: &mut Session, host: HostId, serves: &str) -> Result<(), Failure> {
    const NOTE: &str = "UPDATE host SET serves = ?2 WHERE id = ?1 AND left_at IS NULL AND ended_at IS NULL";
    let noted = sqlx::query(NOTE).bind(host.0).bind(serves).execute(session.db()).await?;
    if noted.rows_affected() == 0 { Err(failure::unknown_host(host)) } else { Ok(()) }
}
