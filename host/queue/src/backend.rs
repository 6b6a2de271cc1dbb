//! The seam between the queue and a database: what every database has to do, in words of the queue.

use std::fmt::Debug;
use std::time::Duration;

use async_trait::async_trait;
use serde::Serialize;

use crate::{
    AttemptRecord, Claim, Claimed, Filter, HostId, LeaseRef, NewTask, Page, Policy, Progress, QueuedType, Result, Serves,
    Settlement, Sign, Stats, Submitted, Task, TaskId, Timestamp,
};

/// Whether a write about an attempt still counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeaseAnswer {
    /// The lease held, and the write is durable. (On SQLite a renewal is durable with the next other write; a power loss that comes first ends
    /// the attempt anyway.)
    Held,
    /// The lease had ended: nothing was changed.
    Lost,
}

/// One renewal of a lease.
#[derive(Clone, Debug)]
pub struct Beat {
    /// The lease to renew.
    pub lease_ref: LeaseRef,
    /// It lasts this long from now on. A renewal never shortens a lease.
    pub alive_time: Duration,
    /// How far the task says it is, if it said something new.
    pub progress: Option<Progress>,
}

/// New members for the data of one running task.
#[derive(Clone, Debug)]
pub struct Update {
    /// The lease under which it runs.
    pub lease_ref: LeaseRef,
    /// A JSON object; its members take the place of those in the data (the top level only).
    pub members: Vec<u8>,
}

/// A plugin version that runs tasks.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct PluginVersion {
    /// The plugin's name.
    pub name: String,
    /// Its content: sha256, hexadecimal.
    pub digest: String,
}

/// A plugin version that no host runs any more, because hosts died while it alone ran on them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Quarantine {
    /// Which one.
    pub version: PluginVersion,
    /// Hosts that died so, since it was released last.
    pub deaths: u32,
    /// When the last of them was found dead.
    pub since: Timestamp,
}

impl Quarantine {
    /// So many deaths within [`Quarantine::WITHIN`] put a version under quarantine, until it is released.
    pub const DEATHS: u32 = 3;
    /// Power cuts and kills that are further apart than this are no reason to stop a plugin: on many hosts one version alone runs all the time.
    pub const WITHIN: Duration = Duration::from_secs(3_600);
    /// Deaths that are remembered belong to the last so many hosts; what is older counts for nothing any more.
    pub(crate) const HOSTS: u32 = 10_000;
}

/// A host that registers itself.
#[derive(Clone, Debug)]
pub struct HostDescription {
    /// The machine's name.
    pub name: String,
    /// The process.
    pub process_id: u32,
    /// Who it is to a watchdog that notices its death, printed; at most 255 bytes, never given twice. None: it is left to its leases. A host
    /// that becomes somebody else registers anew.
    pub identity: Option<String>,
}

impl HostDescription {
    /// The most bytes of an identity.
    pub const IDENTITY_BYTES_MAX: usize = 255;

    /// Check the bound that the identity has.
    ///
    /// # Errors
    /// [`crate::Error::Config`] if it breaks it.
    pub(crate) fn check(&self) -> Result<()> {
        let bytes = self.identity.as_deref().map_or(0, str::len);
        if bytes > Self::IDENTITY_BYTES_MAX {
            let problem = format!("has {bytes} bytes; at most {} are allowed", Self::IDENTITY_BYTES_MAX);
            return Err(crate::Error::Config { setting: "the host's identity", problem });
        }
        Ok(())
    }
}

/// A host as the database knows it.
#[derive(Clone, Debug, Serialize)]
pub struct HostRecord {
    /// Its number.
    pub id: HostId,
    /// The machine's name.
    pub name: String,
    /// The process.
    pub process_id: u32,
    /// When it registered.
    pub started_at: Timestamp,
    /// How many tasks it has.
    pub running: u64,
    /// Whether it lives, as far as this back end can know without leases: None if it cannot.
    pub alive: Option<bool>,
    /// Who it is to its watchdog, if it has one.
    pub identity: Option<String>,
    /// What it serves, if it has said so, and this back end has a place for it.
    pub serves: Option<Serves>,
}

/// A task that was taken back from a host that lost it.
#[derive(Clone, Debug)]
pub struct Lost {
    /// The task and the lease that ended.
    pub lease_ref: LeaseRef,
    /// Its key.
    pub key: String,
    /// The host that had it.
    pub host: HostId,
    /// What follows: waiting again, or failed after being lost alone too often.
    pub failed: bool,
}

/// What taking back lost tasks did.
#[derive(Clone, Debug, Default)]
pub struct Reclaimed {
    /// The tasks, at most 1,000 a call.
    pub tasks: Vec<Lost>,
    /// Hosts found dead and struck off, in words.
    pub dead_hosts: Vec<HostRecord>,
}

/// What `init` did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Migration {
    /// The schema's version before; 0 if there was none.
    pub from: i64,
    /// The versions applied now, oldest first; empty if there was nothing to do.
    pub applied: Vec<i64>,
    /// The schema's version from now on.
    pub version: i64,
}

/// A step that `init` would take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannedStep {
    /// The schema's version after it.
    pub version: i64,
    /// The least version that a program must know to go on working after it.
    pub oldest_program: i64,
    /// What it runs.
    pub sql: String,
}

/// A transaction of the caller's, on the database of the queue.
#[derive(Debug)]
pub enum Transaction<'a> {
    /// On PostgreSQL.
    Postgres(&'a mut sqlx::PgConnection),
    /// On MySQL or MariaDB.
    MySql(&'a mut sqlx::MySqlConnection),
}

impl Transaction<'_> {
    /// The error of a queue that is on another kind of database.
    pub(crate) fn foreign(&self, database: &str) -> crate::Error {
        let on = match self {
            Self::Postgres(_) => "PostgreSQL",
            Self::MySql(_) => "MySQL",
        };
        let why = format!("the transaction is on {on}, the tasks are on {database}");
        crate::Error::NotSupported { what: "submitting in a caller's transaction", why }
    }
}

impl<'a> From<&'a mut sqlx::PgConnection> for Transaction<'a> {
    fn from(connection: &'a mut sqlx::PgConnection) -> Self {
        Self::Postgres(connection)
    }
}

impl<'a> From<&'a mut sqlx::MySqlConnection> for Transaction<'a> {
    fn from(connection: &'a mut sqlx::MySqlConnection) -> Self {
        Self::MySql(connection)
    }
}

/// How the database's schema stands to this program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SchemaStatus {
    /// It fits.
    Current(i64),
    /// There is none yet.
    Missing,
    /// `init` would move it on.
    Old {
        /// The schema's version.
        found: i64,
        /// The version needed.
        needed: i64,
    },
    /// A newer program moved it on, and programs as old as this one can work with it.
    Newer {
        /// The schema's version.
        found: i64,
        /// The newest version known here.
        known: i64,
        /// The version of Laelaps that made it, if that is written down.
        program: Option<String>,
    },
    /// A newer program moved it on, and this one cannot work with it any more.
    TooNew {
        /// The schema's version.
        found: i64,
        /// The newest version known here.
        known: i64,
        /// The least version that a program must know to work with it.
        oldest: i64,
        /// The version of Laelaps that made it, if that is written down.
        program: Option<String>,
    },
    /// A build from between two releases made it: its number is known here, and its tables are others.
    Other {
        /// The version whose tables are others.
        found: i64,
    },
}

/// The tables of a queue, and whether they are as they have to be. See [`Backend`].
#[async_trait]
pub trait Schema: Debug + Send + Sync {
    /// Bring the schema up to what this program needs. Safe to call twice, and by several hosts at once, also while hosts work. A newer schema
    /// that admits this program is left as it is.
    async fn init(&self) -> Result<Migration>;

    /// What [`Schema::init`] would do now, oldest step first; empty if nothing. Changes nothing.
    async fn plan(&self) -> Result<Vec<PlannedStep>>;

    /// How the tables differ from those that [`Schema::init`] makes, each difference in words; empty if they do not. Somebody may have
    /// altered or dropped one by hand. Only sensible while [`Schema::schema_status`] is [`SchemaStatus::Current`]: of a newer schema this program does not know the tables.
    async fn drift(&self) -> Result<Vec<String>>;

    /// Compare the schema with what this program needs.
    async fn schema_status(&self) -> Result<SchemaStatus>;

    /// Compare every table with every other, and name each row that contradicts another: at most 1,000 findings, each in words with the
    /// row's number. Empty if all is well. Reads one moment of the database; takes time that grows with it.
    async fn audit(&self) -> Result<Vec<String>> {
        Ok(Vec::new())
    }

    /// What of the tables works, and may surprise: a sentence each, for whoever checks an installation.
    async fn warnings(&self) -> Result<Vec<String>> {
        Ok(Vec::new())
    }

    /// Do what a host does, on rows of its own and in a transaction that is rolled back, and answer what it lacks for that: privileges, or
    /// settings of the server that are in the way; each in words. Empty if a host could work. Waits for no lock longer than a
    /// second.
    async fn rehearse(&self) -> Result<Vec<String>> {
        Ok(Vec::new())
    }
}

/// What a producer asks of a queue. See [`Backend`].
#[async_trait]
pub trait Producer: Debug + Send + Sync {
    /// The database's clock.
    async fn now(&self) -> Result<Timestamp>;

    /// Whether a task could be stored: its bounds, and what the tables have room for. Asks nobody.
    ///
    /// # Errors
    /// As [`Producer::submit`].
    fn check(&self, task: &NewTask) -> Result<()> {
        task.check()
    }

    /// Store tasks, durably when it returns: all that are new, in one transaction. Answers stand in the order of `tasks`; two tasks of one
    /// key in a call: the first wins. If one task breaks a bound, none is stored.
    async fn submit(&self, tasks: &[NewTask]) -> Result<Vec<Submitted>>;

    /// Store tasks as part of a caller's own transaction: they are there when it commits, and not at all if it rolls back.
    ///
    /// # Errors
    /// [`crate::Error::InvalidTask`] as [`Producer::submit`]; [`crate::Error::NotSupported`] if the transaction is on another kind of database, or
    /// this one has no other programs' transactions.
    async fn submit_in(&self, transaction: Transaction<'_>, tasks: &[NewTask]) -> Result<Vec<Submitted>> {
        let _ = tasks;
        Err(transaction.foreign("this database"))
    }

    /// Make a held task claimable now. False if the queue has no held task of this key: it was released or dropped before.
    async fn release_held(&self, key: &str) -> Result<bool>;

    /// Remove a held task; its key is free again. False if the queue has no held task of this key.
    async fn drop_held(&self, key: &str) -> Result<bool>;

    /// The keys of held tasks that begin with `prefix`, in the order of their bytes, at most 10,000.
    async fn held(&self, prefix: &str) -> Result<Vec<String>>;

    /// Whether a task whose key begins with `prefix` is waiting (held ones included) or running. Costs the same at any number of other tasks.
    async fn has_unsettled(&self, prefix: &str) -> Result<bool>;
}

/// What a host asks of a queue: tasks, their leases and ends, and who is alive. See [`Backend`].
#[async_trait]
pub trait Worker: Debug + Send + Sync {
    /// Hand out waiting tasks under new leases.
    async fn claim(&self, claim: &Claim) -> Result<Claimed>;

    /// Renew leases. Answers stand in the order of `beats`.
    async fn heartbeat(&self, beats: &[Beat]) -> Result<Vec<LeaseAnswer>>;

    /// Settle attempts, each with its follow-up tasks, in one transaction. Answers stand in the order of `settlements`.
    async fn settle(&self, settlements: &[Settlement]) -> Result<Vec<LeaseAnswer>>;

    /// Merge the members of a JSON object into a running task's data (the top level only; compressed stays compressed).
    ///
    /// # Errors
    /// [`crate::Error::InvalidTask`] if `members` is not a JSON object or the merged data is too large.
    async fn update_data(&self, lease_ref: LeaseRef, members: &[u8]) -> Result<LeaseAnswer>;

    /// As [`Worker::update_data`] for several tasks, in one transaction where the database gains by it. Answers stand in the order of
    /// `updates`; a refusal concerns its own update alone.
    ///
    /// # Errors
    /// Those of the database; then none was made.
    async fn update_many(&self, updates: &[Update]) -> Result<Vec<Result<LeaseAnswer>>> {
        let mut answers = Vec::with_capacity(updates.len());
        for update in updates {
            match self.update_data(update.lease_ref, &update.members).await {
                Err(error) if !error.is_about_the_request() => return Err(error),
                answer => answers.push(answer),
            }
        }
        Ok(answers)
    }

    /// A host that was thought dead, or cut off, is there again: its attempts under these leases were counted as lost, and did not end it. What
    /// each loss did to its task (`lost`, `lost_alone`, running alone) is taken back, and so is its part in a death. A lease whose attempt
    /// was not counted as lost, or was excused before, is passed over. Answers how many were excused.
    async fn excuse(&self, host: HostId, leases: &[LeaseRef]) -> Result<u64> {
        let _ = (host, leases);
        Ok(0)
    }

    /// Note which plugin versions run tasks on a host, or are being admitted, from now on: the whole set. Durable when it returns, so that a death
    /// in what follows finds it.
    async fn note_running(&self, host: HostId, versions: &[PluginVersion]) -> Result<()> {
        let _ = (host, versions);
        Ok(())
    }

    /// The plugin versions under quarantine: [`Quarantine::DEATHS`] hosts died within [`Quarantine::WITHIN`] while each ran alone on them. Empty if this queue has no
    /// place for them.
    async fn quarantined(&self) -> Result<Vec<Quarantine>> {
        Ok(Vec::new())
    }

    /// Take back what dead hosts and ended leases hold, and strike dead hosts off. `policy` decides what follows, by [`crate::decide`].
    async fn reclaim(&self, policy: &Policy) -> Result<Reclaimed>;

    /// Enter a host. It is alive until [`Worker::unregister_host`], or until its process ends, as far as the database can see that.
    async fn register_host(&self, description: &HostDescription) -> Result<HostId>;

    /// Strike a host off that holds no task any more; tasks it still holds are left to [`Worker::reclaim`].
    async fn unregister_host(&self, host: HostId) -> Result<()>;

    /// Take back, in one transaction for each thousand, what the hosts with these identities hold, whether their leases have ended or not, and
    /// strike them off. From now on they claim nothing ([`crate::Error::UnknownHost`]), and what they write about their attempts is
    /// [`LeaseAnswer::Lost`]. Hosts with another identity, or none, are left alone. `policy` decides what follows, by [`crate::decide`]. Worth calling again
    /// until it answers no more tasks; identities that are not known (any more) are passed over.
    async fn hand_on(&self, identities: &[String], policy: &Policy) -> Result<Reclaimed>;

    /// Give a sign of life for a host, which may go without another one for `timeout`: as long as whoever watches over it says.
    ///
    /// # Errors
    /// [`crate::Error::UnknownHost`] if the host was struck off, or has left; [`crate::Error::NotSupported`] if this queue keeps no signs.
    async fn give_sign(&self, host: HostId, timeout: Duration) -> Result<()> {
        let _ = (host, timeout);
        Err(crate::Error::NotSupported { what: "giving a sign of life", why: "this queue has no place for it".to_owned() })
    }

    /// The latest sign of life of every host that gives some and has not left, in the order of their numbers.
    async fn signs(&self) -> Result<Vec<Sign>> {
        Ok(Vec::new())
    }

    /// Mark as gone those hosts that have given no sign since these were read: from now on they claim nothing, and what they hold is taken back by
    /// [`Worker::hand_on`] or [`Worker::reclaim`]. One that has given another sign is left alone. Answers which of them have left by now, also
    /// by the word of others.
    async fn mark_dead(&self, silent: &[Sign]) -> Result<Vec<HostId>> {
        let _ = silent;
        Ok(Vec::new())
    }

    /// How many follow-ups that come from `root` have not ended, other than `task`; at most `limit`, and no more are counted. None if this
    /// queue does not keep it: PerfectQueue's table without ours beside it.
    async fn relatives(&self, root: TaskId, task: TaskId, limit: u32) -> Result<Option<u32>>;

    /// The hosts that the database knows.
    async fn hosts(&self) -> Result<Vec<HostRecord>>;

    /// Note which plugin versions (sha256, hexadecimal) a host serves, so that an attempt lost with it can be traced.
    async fn note_plugins(&self, host: HostId, digests: &[String]) -> Result<()>;

    /// Note what a host serves from now on, in place of what it served before.
    ///
    /// # Errors
    /// [`crate::Error::UnknownHost`] if the host was struck off, or has left.
    async fn note_serves(&self, host: HostId, serves: &Serves) -> Result<()> {
        let _ = (host, serves);
        Ok(())
    }

    /// Remove at most `limit` tasks whose retention has ended; answers how many.
    async fn clean_up(&self, limit: u32) -> Result<u64>;

    /// Wait for a hint that a claim may find something: a submit or a release in this process, or the database's own notice. Only a hint:
    /// it can be missing or come for nothing, so callers poll as well.
    async fn wakeup(&self);
}

/// What an operator asks of a queue. See [`Backend`].
#[async_trait]
pub trait Operator: Debug + Send + Sync {
    /// Let a plugin version run again; its deaths count for nothing any more. False if it had none.
    async fn release_plugin(&self, digest: &str) -> Result<bool> {
        let _ = digest;
        Ok(false)
    }

    /// The plugin versions that a host has served, in the order of [`Worker::note_plugins`]; empty if the back end has no place for them, or
    /// does not know the host.
    async fn host_plugins(&self, host: HostId) -> Result<Vec<String>>;

    /// One task with data and output, or None.
    async fn get(&self, key: &str) -> Result<Option<Task>>;

    /// One task by its number, with data and output, or None. What cannot be read of its texts is shown as U+FFFD, and
    /// [`Task::unreadable`] says what is wrong.
    async fn get_by_id(&self, id: TaskId) -> Result<Option<Task>> {
        let _ = id;
        Err(crate::Error::NotSupported { what: "naming a task by its number", why: "this queue does not know it".to_owned() })
    }

    /// As [`Operator::cancel`], by number; also a task that was set aside as unreadable, which is removed at once.
    ///
    /// # Errors
    /// [`crate::Error::NoSuchId`], else as [`Operator::cancel`].
    async fn cancel_by_id(&self, id: TaskId, retention: Duration) -> Result<()> {
        let _ = (id, retention);
        Err(crate::Error::NotSupported { what: "naming a task by its number", why: "this queue does not know it".to_owned() })
    }

    /// As [`Operator::retry`], by number.
    ///
    /// # Errors
    /// [`crate::Error::NoSuchId`], else as [`Operator::retry`].
    async fn retry_by_id(&self, id: TaskId) -> Result<()> {
        let _ = id;
        Err(crate::Error::NotSupported { what: "naming a task by its number", why: "this queue does not know it".to_owned() })
    }

    /// Past attempts of a task, oldest first.
    async fn attempts(&self, key: &str) -> Result<Vec<AttemptRecord>>;

    /// A page of tasks.
    async fn list(&self, filter: &Filter) -> Result<Page>;

    /// How many tasks wait or run of each type in each queue, most first; at most [`QueuedType::MOST`]. None if it is not known who serves a type:
    /// on PerfectQueue's table, where workers in Ruby say nothing of themselves.
    async fn types(&self) -> Result<Option<Vec<QueuedType>>> {
        Ok(None)
    }

    /// What the queue holds.
    async fn stats(&self) -> Result<Stats>;

    /// Finish a task that is waiting or running, by hand. A running attempt loses its lease.
    async fn force_finish(&self, key: &str, retention: Duration) -> Result<()>;

    /// Cancel a task that is waiting or running. A running attempt loses its lease.
    async fn cancel(&self, key: &str, retention: Duration) -> Result<()>;

    /// Make a waiting task due now, or give a failed or cancelled one a new life (its counters start again). Running and finished tasks
    /// are refused with [`crate::Error::WrongState`], and so are held ones, which only their holder releases.
    async fn retry(&self, key: &str) -> Result<()>;
}

/// A database that keeps tasks, whole. Who needs a part of it asks for that part: [`Schema`], [`Producer`], [`Worker`] or [`Operator`].
/// Implementations pass the conformance suite in `tests/`.
///
/// All operations can be called at once from many threads. Dropping the future of a write leaves it either wholly done or not done.
#[async_trait]
pub trait Backend: Schema + Producer + Worker + Operator {
    /// Finish what is under way and close all connections.
    async fn close(&self);
}
