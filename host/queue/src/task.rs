//! The words of the queue: a task, its states, and what producers and operators see of it.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{Error, Result, data};

/// A moment: milliseconds since 1970-01-01T00:00:00Z, always by the clock of the database.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Timestamp(pub i64);

impl Timestamp {
    /// This moment plus a length of time; saturates at the ends of the range.
    #[must_use]
    pub fn plus(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)))
    }

    /// The time from `earlier` to this moment; zero if `earlier` is later.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0))
    }
}

/// The number of a task's row. Never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TaskId(pub i64);

/// The number of one claim of a task. It grows with every claim in the database and never repeats; it is not the attempt counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Lease(pub i64);

/// A task under a certain lease: what every write about an attempt names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LeaseRef {
    /// The task.
    pub task: TaskId,
    /// The claim of it that the caller believes to hold.
    pub lease: Lease,
}

/// The number under which a running host is known to the database. A restarted host gets a new one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct HostId(pub i64);

/// Where a task stands. The same five stand in the schema's CHECK.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// May be claimed, now or from its `run_at` on.
    Waiting,
    /// Claimed by a host under a lease.
    Running,
    /// Done. Kept until its retention ends, and its key with it.
    Finished,
    /// Given up: rejected by its handler, out of attempts, or lost alone too often.
    Failed,
    /// Called off by an operator or producer.
    Cancelled,
}

impl State {
    /// All states, in the order of a task's life.
    pub const ALL: [Self; 5] = [Self::Waiting, Self::Running, Self::Finished, Self::Failed, Self::Cancelled];

    /// The word that stands in the database, in lists and in JSON.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Running => "running",
            Self::Finished => "finished",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    /// Whether nothing follows this state.
    #[must_use]
    pub fn is_terminal(self) -> bool {
        matches!(self, Self::Finished | Self::Failed | Self::Cancelled)
    }
}

/// How a task's data is stored. Readers always get it decompressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// As it is.
    #[default]
    None,
    /// gzip.
    Gzip,
}

/// Where a task comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Descent {
    /// The task that a producer submitted and from which all this follows. It may be gone by now.
    pub root: TaskId,
    /// How many generations of follow-ups lie between the root and this task, counted from the last one that was due
    /// [`Descent::FRESH_AFTER`] or longer after its parent's claim. 0: the root itself, or such a one.
    pub depth: u32,
}

impl Descent {
    /// A follow-up that is due this long after its parent was claimed, or later, starts again at depth 0: a task may submit its successor for
    /// ever, but not quickly.
    pub const FRESH_AFTER: Duration = Duration::from_secs(60);
    /// So much earlier is let pass, since handlers reckon by clocks of their own.
    const CLOCKS_DIFFER: Duration = Duration::from_secs(1);

    /// That of a follow-up which a task of this descent, claimed at `claimed_at`, submits to run at `run_at`. The root stays.
    #[must_use]
    pub fn of_follow_up(self, run_at: Option<Timestamp>, claimed_at: Timestamp) -> Self {
        let fresh_from = claimed_at.plus(Self::FRESH_AFTER - Self::CLOCKS_DIFFER);
        let is_fresh = run_at.is_some_and(|run_at| run_at >= fresh_from);
        Self { depth: if is_fresh { 0 } else { self.depth.saturating_add(1) }, ..self }
    }
}

/// A task to be submitted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewTask {
    /// Unique in the queue, compared as bytes, until the task's retention ends. 1 to 255 bytes, without control characters.
    pub key: String,
    /// What sort of work it is. 1 to 255 bytes, without control characters. `kind` in WIT.
    pub task_type: String,
    /// A JSON object in UTF-8. At most [`NewTask::DATA_BYTES_MAX`] bytes before compression; empty means `{}`.
    pub data: Vec<u8>,
    /// Not before this moment. None, or a moment that has passed: at once.
    pub run_at: Option<Timestamp>,
    /// The queue in which it waits: 1 to [`NewTask::QUEUE_BYTES_MAX`] letters, digits and characters out of `_-.:/`, all of them ASCII. None:
    /// [`NewTask::DEFAULT_QUEUE`]. A queue is there as soon as a task names it.
    pub queue: Option<String>,
    /// The user on whose account it runs. At most 255 bytes; an empty text is none.
    pub user: Option<String>,
    /// The most tasks of this user at once in its queue, as this task sees it; 0 lets it start only while none runs. None: no limit.
    pub max_running: Option<u32>,
    /// The most counted attempts before it ends as failed; at least 1. None: no limit.
    pub max_attempts: Option<u32>,
    /// -100 to 100. Of the tasks of one user, and of those without user, the smaller runs first; 0 is the usual one.
    pub priority: i32,
    /// How the data is stored.
    pub compression: Compression,
    /// Nobody may claim it, and no retention removes it, until [`crate::Producer::release_held`]. `run_at` counts for nothing then.
    pub held: bool,
    /// Where a follow-up comes from; see [`ClaimedTask::descent`]. None: a producer submits it.
    pub descent: Option<Descent>,
}

impl Task {
    /// Whether it waits to be released and nobody may claim it before; see [`NewTask::held`].
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.state == State::Waiting && self.run_at == NewTask::HELD_AT
    }
}

impl NewTask {
    /// The most bytes of data a task may carry: 16 MiB.
    pub const DATA_BYTES_MAX: usize = 16 << 20;
    /// The most bytes of a key, a type or a user.
    pub const NAME_BYTES_MAX: usize = 255;
    /// The most bytes of a queue's name.
    pub const QUEUE_BYTES_MAX: usize = 64;
    /// The queue of tasks that name none.
    pub const DEFAULT_QUEUE: &str = "default";
    /// The most tasks of one submit.
    pub const BATCH_MAX: usize = 10_000;
    /// What [`NewTask::priority`] may be.
    pub const PRIORITIES: std::ops::RangeInclusive<i32> = -100..=100;
    /// The latest moment a task may wait for: the end of the year 9999.
    pub const RUN_AT_MAX: Timestamp = Timestamp(253_402_300_799_999);
    /// The `run_at` of a held task: one millisecond after the latest moment that a task may wait for, so never.
    pub const HELD_AT: Timestamp = Timestamp(Self::RUN_AT_MAX.0 + 1);

    /// A task that may run at once, without user or limits.
    pub fn new(key: impl Into<String>, task_type: impl Into<String>, data: impl Into<Vec<u8>>) -> Self {
        Self {
            key: key.into(),
            task_type: task_type.into(),
            data: data.into(),
            run_at: None,
            queue: None,
            user: None,
            max_running: None,
            max_attempts: None,
            priority: 0,
            compression: Compression::None,
            held: false,
            descent: None,
        }
    }

    /// The same task, held: see [`NewTask::held`].
    #[must_use]
    pub fn on_hold(self) -> Self {
        Self { held: true, ..self }
    }

    /// Check the bounds that the fields state.
    ///
    /// # Errors
    /// [`Error::InvalidTask`] with the bound that is broken.
    pub fn check(&self) -> Result<()> {
        let invalid = |problem: String| {
            let mut key = self.key.clone();
            key.truncate(key.floor_char_boundary(Self::NAME_BYTES_MAX));
            Error::InvalidTask { key, problem }
        };
        check_name("key", &self.key).map_err(invalid)?;
        check_name("type", &self.task_type).map_err(invalid)?;
        if let Some(queue) = &self.queue {
            check_queue(queue).map_err(invalid)?;
        }
        if let Some(user) = self.user.as_deref().filter(|user| !user.is_empty()) {
            check_name("user", user).map_err(invalid)?;
        }
        if self.max_attempts == Some(0) {
            return Err(invalid("max_attempts is 0; it has to be at least 1".to_owned()));
        }
        if !Self::PRIORITIES.contains(&self.priority) {
            return Err(invalid(format!("priority is {}; -100 to 100 are allowed", self.priority)));
        }
        if let Some(moment) = self.run_at.filter(|moment| *moment > Self::RUN_AT_MAX) {
            return Err(invalid(format!("run_at is {} ms, later than the year 9999", moment.0)));
        }
        if self.data.len() > Self::DATA_BYTES_MAX {
            return Err(invalid(format!("the data has {} bytes; at most {} are allowed", self.data.len(), Self::DATA_BYTES_MAX)));
        }
        if self.data.is_empty() {
            Ok(())
        } else {
            data::check(&self.data).map_err(|problem| invalid(format!("the data is {problem}")))
        }
    }
}

/// Check a key, a type or a user.
fn check_name(what: &str, name: &str) -> std::result::Result<(), String> {
    if name.is_empty() {
        return Err(format!("the {what} is empty"));
    }
    if name.len() > NewTask::NAME_BYTES_MAX {
        return Err(format!("the {what} has {} bytes; at most {} are allowed", name.len(), NewTask::NAME_BYTES_MAX));
    }
    match name.chars().find(|character| character.is_control()) {
        Some(character) => Err(format!("the {what} contains the control character {character:?}")),
        None => Ok(()),
    }
}

/// Check the name of a queue.
///
/// # Errors
/// What is wrong with it, in words.
pub fn check_queue(name: &str) -> std::result::Result<(), String> {
    if name.is_empty() {
        return Err("the queue's name is empty".to_owned());
    }
    if name.len() > NewTask::QUEUE_BYTES_MAX {
        let bytes = name.len();
        return Err(format!("the queue's name has {bytes} bytes; at most {} are allowed", NewTask::QUEUE_BYTES_MAX));
    }
    match name.chars().find(|character| !(character.is_ascii_alphanumeric() || "_-.:/".contains(*character))) {
        Some(character) => {
            Err(format!("the queue's name contains {character:?}; letters and digits of ASCII and _ - . : / are allowed"))
        }
        None => Ok(()),
    }
}

/// A queue's name as it stands in the tables, where '' is the default queue.
pub(crate) fn stored_queue(name: Option<&str>) -> &str {
    name.filter(|name| *name != NewTask::DEFAULT_QUEUE).unwrap_or_default()
}

/// The name of a queue that the tables name so.
pub(crate) fn queue_name(stored: String) -> String {
    if stored.is_empty() { NewTask::DEFAULT_QUEUE.to_owned() } else { stored }
}

/// What became of one submitted task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Submitted {
    /// It is stored, durably.
    Created,
    /// The queue already has a task of this key, in whatever state; nothing was changed.
    AlreadyExists,
}

/// A task as its claimer gets it.
#[derive(Clone, Debug)]
pub struct ClaimedTask {
    /// The task and the lease under which it was claimed.
    pub lease_ref: LeaseRef,
    /// Its key.
    pub key: String,
    /// Its type.
    pub task_type: String,
    /// Its data, decompressed: a JSON object in UTF-8.
    pub data: Vec<u8>,
    /// The queue in which it waited.
    pub queue: String,
    /// Its user.
    pub user: Option<String>,
    /// The most tasks of its user at once, as it was submitted.
    pub max_running: Option<u32>,
    /// Where it comes from. PerfectQueue's table without ours beside it does not tell: there every task is a root.
    pub descent: Descent,
    /// Its data is stored compressed.
    pub compression: Compression,
    /// The number of this attempt: counted attempts so far, plus one.
    pub attempt: u32,
    /// The most counted attempts. None: no limit.
    pub max_attempts: Option<u32>,
    /// How often it was lost with its host so far.
    pub lost: u32,
    /// It was claimed alone, because it was lost too often in company.
    pub alone: bool,
    /// How often it was released in a row.
    pub releases: u32,
    /// How often it was lost while it ran alone.
    pub lost_alone: u32,
    /// When it was submitted.
    pub created_at: Timestamp,
    /// When it was claimed.
    pub claimed_at: Timestamp,
    /// When the lease ends unless it is renewed.
    pub until: Timestamp,
}

/// How far a running task says it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Units of work done.
    pub done: u64,
    /// Units of work in all, if known.
    pub total: Option<u64>,
    /// What is being done. At most 1,024 bytes.
    pub note: String,
}

/// A task as a producer or operator sees it.
#[derive(Clone, Debug, Serialize)]
pub struct Task {
    /// Its row.
    pub id: TaskId,
    /// Its key.
    pub key: String,
    /// Its type.
    #[serde(rename = "type")]
    pub task_type: String,
    /// Where it stands.
    pub state: State,
    /// Its queue.
    pub queue: String,
    /// Its user.
    pub user: Option<String>,
    /// The most tasks of its user at once.
    pub max_running: Option<u32>,
    /// Counted attempts so far.
    pub attempts: u32,
    /// The most counted attempts.
    pub max_attempts: Option<u32>,
    /// Of its user's tasks, or of those without user, the smaller runs first.
    pub priority: i32,
    /// How often it was lost with its host.
    pub lost: u32,
    /// When it was submitted.
    pub created_at: Timestamp,
    /// Waiting: when it may run. Else when it could last.
    pub run_at: Timestamp,
    /// Running: when its lease ends unless renewed.
    pub until: Option<Timestamp>,
    /// Running: the host that has it.
    pub host: Option<HostId>,
    /// Running: how far it says it is.
    pub progress: Option<Progress>,
    /// When it came to its terminal state.
    pub finished_at: Option<Timestamp>,
    /// When it will be removed, once terminal.
    pub retained_until: Option<Timestamp>,
    /// The digest (sha256, hexadecimal) of the plugin version that settled it last.
    pub plugin_digest: Option<String>,
    /// The short name of the last failure.
    pub error_code: Option<String>,
    /// The last failure, in words.
    pub error_message: Option<String>,
    /// What of its row cannot be read, if something cannot; such a task is set aside as failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unreadable: Option<String>,
    /// Its data, decompressed; None where a list leaves it out. The bytes are a JSON object.
    #[serde(skip)]
    pub data: Option<Vec<u8>>,
    /// What the handler returned; None where there is none or a list leaves it out.
    #[serde(skip)]
    pub output: Option<Vec<u8>>,
}

/// One attempt of the past. At most [`AttemptRecord::KEPT`] are kept for a task.
#[derive(Clone, Debug, Serialize)]
pub struct AttemptRecord {
    /// Its number among the counted attempts.
    pub attempt: u32,
    /// The claim under which it ran.
    pub lease: Lease,
    /// The host that ran it, in words (`name, process id`).
    pub host: String,
    /// The digest of the plugin version it ran on; None if it was lost or never began.
    pub plugin_digest: Option<String>,
    /// When it was settled or found lost.
    pub ended_at: Timestamp,
    /// How it ended: `finish`, `retry`, `failure`, `trap`, `time-out`, `memory`, `malformed`, `release`, `stop`, `unrouted`, `lost`, `overdue`, `excused`, ...
    pub event: String,
    /// The short name of the failure.
    pub error_code: Option<String>,
    /// The failure in words.
    pub error_message: Option<String>,
}

impl AttemptRecord {
    /// The most attempts kept for one task; older ones are dropped.
    pub const KEPT: usize = 20;
}

/// Which tasks to list.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Only these states; empty means all.
    pub states: Vec<State>,
    /// Only this queue.
    pub queue: Option<String>,
    /// Only this type.
    pub task_type: Option<String>,
    /// Only this user.
    pub user: Option<String>,
    /// Only keys that start with this.
    pub key_prefix: Option<String>,
    /// Tasks with a larger row number than this: the paging cursor.
    pub after: Option<TaskId>,
    /// The most tasks to return: 1 to 10,000.
    pub limit: u32,
    /// Return data and output too.
    pub with_data: bool,
}

/// One page of a list, by ascending row number. What is looked at for it has a bound: where few of many tasks are wanted, it may have fewer than
/// [`Filter::limit`], or none, and still not be the last.
#[derive(Clone, Debug)]
pub struct Page {
    /// The tasks.
    pub tasks: Vec<Task>,
    /// Pass as [`Filter::after`] to get what follows; None at the end.
    pub next: Option<TaskId>,
}

/// What the queue holds.
#[derive(Clone, Debug, Serialize)]
pub struct Stats {
    /// Tasks that may be claimed now.
    pub ready: u64,
    /// Tasks that wait for their time.
    pub scheduled: u64,
    /// Tasks that hosts have.
    pub running: u64,
    /// Finished tasks that are retained.
    pub finished: u64,
    /// Failed tasks that are retained.
    pub failed: u64,
    /// Cancelled tasks that are retained.
    pub cancelled: u64,
    /// How long the oldest ready task has been ready, in milliseconds. What hosts met and do not serve is not among them, although it counts as
    /// ready: it waits for a plugin, not for a free processor.
    pub oldest_ready_ms: Option<u64>,
    /// Tasks waiting or running, by type, most first; at most 100.
    pub types: Vec<(String, u64)>,
    /// Tasks waiting or running, by queue, most first; at most 100.
    pub queues: Vec<(String, u64)>,
}
